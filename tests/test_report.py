"""The report's pure functions."""

import unicodedata
from dataclasses import replace
from datetime import UTC, datetime

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_images import report
from ln_images.model import (
    ConfigurationError,
    File,
    Image,
    LnImagesError,
    Outcome,
    Pass,
    Result,
    Room,
    TemporaryError,
    Verdict,
)

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
ORPHAN = "a0000000-0000-4000-8000-000000000000"


def made_of(*outcomes: Outcome, name: str = "debian", **changes: object) -> Pass:
    """A pass in which images had these outcomes."""
    image = Image(ID, name, "active", "raw", 3 * 1024**3)
    results = tuple(Result(image, Verdict(outcome)) for outcome in outcomes)
    made = Pass(datetime(2026, 1, 1, tzinfo=UTC), 0.94, False, results, Room(10**9, 10**8, 10**6))
    return replace(made, **changes)  # type: ignore[arg-type]


def file_of(size: int) -> File:
    """An orphan of so many bytes."""
    return File(1, 1, 0o100644, 1, 0, 0, size, 0.0)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (made_of(), "no images, 0.9 s"),
        (made_of(Outcome.LINKED), "1 linked, 0.9 s"),
        (made_of(Outcome.WAITING, Outcome.LINKED, Outcome.LINKED), "2 linked, 1 waiting, 0.9 s"),
        (made_of(Outcome.LINKED, dry_run=True), "dry run: 1 linked, 0.9 s"),
        (made_of(settled=(ID, ORPHAN)), "2 present, 0.9 s"),
        (made_of(orphans={ORPHAN: file_of(2048)}), "no images, 2.0 KiB held by 1 deleted image, 0.9 s"),
        (
            made_of(settled=(ID,), orphans={ORPHAN: file_of(1024), ID: file_of(1024)}),
            "1 present, 2.0 KiB held by 2 deleted images, 0.9 s",
        ),
        (made_of(Outcome.PRUNED, orphans={ID: file_of(2048)}), "1 pruned, 2.0 KiB freed, 0.9 s"),
        (
            made_of(Outcome.PRUNED, orphans={ID: file_of(2048), ORPHAN: file_of(1)}),
            "1 pruned, 2.0 KiB freed, 1 B held by 1 deleted image, 0.9 s",
        ),
    ],
)
def test_the_summary_counts_and_says_what_orphans_hold(made: Pass, line: str) -> None:
    """One line: outcomes in their order, bytes freed, bytes still held, and the time it took."""
    assert report.summary(made) == line


@pytest.mark.parametrize(
    ("outcomes", "fault", "status"),
    [
        ([], None, 0),
        ([o for o in Outcome if o is not Outcome.FAILED], None, 0),
        ([Outcome.FAILED, Outcome.LINKED], None, 1),
        ([Outcome.LINKED], TemporaryError(""), 75),
        ([Outcome.FAILED], TemporaryError(""), 75),
        ([Outcome.FAILED], ConfigurationError(""), 2),
    ],
)
def test_the_exit_status_is_that_of_the_worst(
    outcomes: list[Outcome], fault: LnImagesError | None, status: int
) -> None:
    """Waiting, skipped and refused images are no fault; a fault of the pass beats a failed image."""
    assert report.exit_status(made_of(*outcomes, fault=fault)) == status


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1024.0 KiB"),
        (3 * 1024**3, "3.0 GiB"),
        (1024**6, "1024.0 PiB"),
    ],
)
def test_sizes_are_in_powers_of_1024(size: int | None, text: str) -> None:
    """Sizes are said as people read them."""
    assert report.size_text(size) == text


def test_columns_line_up_for_wide_names() -> None:
    """A Chinese name takes two columns for each character, and what follows still lines up."""
    made = made_of(Outcome.LINKED, name="\u4e2d\u6587\u955c\u50cf").results + made_of(Outcome.LINKED).results
    lines = report.table(made).splitlines()
    assert lines[1].index(ID[:8]) + 4 == lines[2].index(ID[:8]) == lines[0].index("ID")


@given(st.text())
def test_nothing_printed_can_act_on_a_terminal(name: str) -> None:
    """Whatever a name holds, a row of the table is one line without control characters, marks or surrogates."""
    row = report.table(made_of(Outcome.LINKED, name=name).results).split("\n")
    assert len(row) == 2
    assert row[1].isprintable()
    row[1].encode()


@given(st.text())
def test_escaping_keeps_what_can_be_printed(text: str) -> None:
    """Printable text stays as it is; every other character is escaped and none is lost."""
    escaped = report.printable(text)
    assert escaped.isprintable()
    assert (escaped == text) is text.isprintable()
    kept = [c for c in text if c.isprintable()]
    rest = iter(escaped)
    assert all(c in rest for c in kept)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in escaped)


def test_a_table_is_fitted_to_the_terminal() -> None:
    """No line takes more columns than there are; names are cut first, then reasons, and outcomes never."""
    long = made_of(Outcome.LINKED, name="a name of more than ten characters").results[0]
    lines = report.table([replace(long, verdict=Verdict(Outcome.REFUSED, "a long reason " * 10))], 70).splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[1].startswith("a name of~  ")
    assert "refused" in lines[1]
    assert lines[1].endswith("~")


def test_outcomes_have_colours_where_they_are_wanted() -> None:
    """Only the outcome is coloured, and the columns stay where they are."""
    results = made_of(Outcome.LINKED, Outcome.FAILED).results
    coloured = report.table(results, 100, True)
    assert "\x1b[32m" in coloured
    assert "\x1b[31m" in coloured
    assert click.unstyle(coloured).split() == report.table(results).split()
