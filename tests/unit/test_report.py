"""The report's pure functions."""

import unicodedata
from dataclasses import replace
from datetime import UTC, datetime

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ln_images.plan import UNKNOWN, cache_name

from ln_images import report
from ln_images.model import (
    FAULTS,
    Audit,
    ConfigurationError,
    Image,
    LnImagesError,
    Outcome,
    Pass,
    Result,
    TemporaryError,
    Verdict,
)

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
ORPHAN = "a0000000-0000-4000-8000-000000000000"


def made_of(*outcomes: Outcome, name: str = "debian", **changes: object) -> Pass:
    """A pass in which images had these outcomes."""
    image = Image(ID, name, "active", "raw", 3 * 1024**3)
    results = tuple(Result(image, cache_name(ID), Verdict(outcome)) for outcome in outcomes)
    made = Pass(datetime(2026, 1, 1, tzinfo=UTC), 0.94, False, results)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (made_of(), "no images, 0.9 s"),
        (made_of(Outcome.LINKED), "1 linked, 0.9 s"),
        (made_of(Outcome.WAITING, Outcome.LINKED, Outcome.LINKED), "2 linked, 1 waiting, 0.9 s"),
        (made_of(Outcome.LINKED, dry_run=True), "dry run: 1 linked, 0.9 s"),
        (made_of(settled=(ID, ORPHAN)), "2 present, 0.9 s"),
        (
            made_of(held={"orphans": (1, 2048)}),
            "no images, 2.0 KiB held by 1 of deleted images, 0.9 s",
        ),
        (
            made_of(
                Outcome.PRUNED, held={"orphans": (0, 0), "unmarked": (2, 1024), "retired": (1, 1)}
            ),
            "1 pruned, 3.0 GiB freed, 1.0 KiB held by 2 not linked here, 1 B held by 1 retired, 0.9 s",
        ),
        (
            made_of(settled=(ID,), audit=Audit(3, 1, 4 * 1024**3, 2.0)),
            "1 present, 3 verified, 4.0 GiB at 2.0 GiB/s, 1 without a checksum, 0.9 s",
        ),
        (
            made_of(audit=Audit(0, 0, 0, 0.0)),
            "no images, 0 verified, 0 B at -/s, 0 without a checksum, 0.9 s",
        ),
    ],
)
def test_the_summary_counts_and_says_what_is_held(made: Pass, line: str) -> None:
    """One line.

    Outcomes in their order, bytes freed, bytes still held by kind, what was verified, and the time.
    """
    assert report.summary(made) == line


@pytest.mark.parametrize(
    ("outcomes", "fault", "status"),
    [
        ([], None, 0),
        ([o for o in Outcome if o not in FAULTS], None, 0),
        ([Outcome.FAILED, Outcome.LINKED], None, 1),
        ([Outcome.DAMAGED], None, 1),
        ([Outcome.LINKED], TemporaryError(""), 75),
        ([Outcome.FAILED], TemporaryError(""), 75),
        ([Outcome.FAILED], ConfigurationError(""), 2),
    ],
)
def test_the_exit_status_is_that_of_the_worst(
    outcomes: list[Outcome], fault: LnImagesError | None, status: int
) -> None:
    """Failed and damaged images are a fault, no others are.

    A fault of the pass beats a failed image.
    """
    assert report.exit_status(made_of(*outcomes, fault=fault)) == status


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (1024**6, "1024.0 PiB"),
    ],
)
def test_sizes_are_in_powers_of_1024(size: int | None, text: str) -> None:
    """Sizes are said as people read them."""
    assert report.size_text(size) == text


def test_columns_line_up_for_wide_names() -> None:
    """A Chinese name takes two columns for each character, and what follows still lines up."""
    made = (
        made_of(Outcome.LINKED, name=name).results[0]
        for name in ("\u4e2d\u6587\u955c\u50cf", "debian")
    )
    lines = report.table(list(made)).splitlines()
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


def row(name: str, reason: str, width: int, whole_ids: bool = False) -> str:
    """The one row, under its heading, of an image in a terminal."""
    result = made_of(Outcome.REFUSED, name=name).results[0]
    return report.table(
        [result._replace(verdict=Verdict(Outcome.REFUSED, reason))], width, whole_ids
    ).splitlines()[1]


NAME, REASON = (
    "ubuntu-24.04-minimal-cloudimg",
    "the content is vmdk, Glance says raw: upload it again as that",
)


def test_a_table_is_fitted_to_the_terminal() -> None:
    """Ids are cut first, to what tells them apart, then reasons and names, and outcomes never.

    No line is too wide.
    """
    assert row(NAME, REASON, 200) == f"{NAME}  {ID}  active  3.0 GiB  refused  {REASON}"
    assert row(NAME, REASON, 140) == f"{NAME}  {ID[:8]}  active  3.0 GiB  refused  {REASON}"
    assert row("debian", "", 80) == f"debian  {ID}  active  3.0 GiB  refused"
    lines = {width: row(NAME, REASON * 3, width) for width in (80, 70, 60)}
    assert [len(line) <= width for width, line in lines.items()] == [True] * 3
    assert all("  refused  " in line and line.endswith("~") for line in lines.values())


def test_no_long_reason_cuts_a_name_short() -> None:
    """At 80 columns a reason of any length leaves a name all that a reason can spare, and 16 columns of it at least."""
    assert row("debian-12-generic", REASON * 5, 80).startswith("debian-12-generic  ")
    assert row(NAME, REASON * 5, 80).startswith(NAME[:15])


def test_whole_ids_are_never_cut() -> None:
    """Under -v and --full an id can be copied, however narrow the terminal."""
    assert f"  {ID}  " in row(NAME, REASON, 60, whole_ids=True)


def test_what_glance_does_not_know_is_counted_and_listed_only_where_it_is_asked_for() -> None:
    """Files that Glance does not know stand in no list by default, as those present, and always in the counts."""
    unknown = Result(Image(ORPHAN, size=7), cache_name(ORPHAN), UNKNOWN)
    made = made_of(settled=(ID,), results=(unknown,))
    assert report.listed(made, everything=False) == []
    assert [result.image.id for result in report.listed(made, everything=True)] == [ORPHAN, ID]
    assert (report.counts(made)[Outcome.SKIPPED], report.unknown(made)) == (1, [7])


def test_the_document_tells_its_status_its_fault_and_what_is_held() -> None:
    """A pass whose clean-up could not be made says why, with the status that the command ends with."""
    made = made_of(Outcome.LINKED, fault=TemporaryError("no Nova"), held={"orphans": (2, 10)})
    document = report.document(made, 75, False)
    assert (document["exit_status"], document["fault"]) == (75, "no Nova")
    assert document["held"] == {"orphans": {"count": 2, "bytes": 10}}


def test_outcomes_have_colours_where_they_are_wanted() -> None:
    """Only the outcome is coloured, and the columns stay where they are."""
    results = made_of(Outcome.LINKED, Outcome.FAILED).results
    coloured = report.table(results, 100, colour=True)
    assert "\x1b[32m" in coloured
    assert "\x1b[31m" in coloured
    assert click.unstyle(coloured).split() == report.table(results).split()
