"""The report: its table, its JSON document, its summary and its exit status."""

import json
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st

from ln_images import report
from ln_images.model import (
    CHANGES,
    FAULTS,
    OUTCOMES,
    Command,
    ConfigurationError,
    DiskUsage,
    LnImagesError,
    Outcome,
    Pass,
    Reason,
    Reclaimable,
    Result,
    TemporaryError,
    Verdict,
    cache_name,
)
from support.cloud import ROOT
from support.node import SCHEMA

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER_ID = "a0000000-0000-4000-8000-000000000000"
NAME = "ubuntu-24.04-minimal-cloudimg"
SENTENCE = "the content is vmdk, Glance says raw; upload it again as what it is"
NOT_KNOWN = Verdict(Outcome.SKIPPED, Reason.UNKNOWN_TO_GLANCE, "Glance does not show this image")


def result_of(
    outcome: Outcome,
    *,
    reason: Reason = Reason.CORRECT,
    sentence: str | None = None,
    name: str | None = "debian",
    image_id: str | None = ID,
    status: str | None = "active",
) -> Result:
    """Return the result of an image of 3 GiB."""
    return Result(
        cache_name=cache_name(ID),
        verdict=Verdict(outcome, reason, sentence),
        id=image_id,
        name=name,
        status=status,
        disk_format="raw",
        size=3 * 1024**3,
    )


def pass_of(*results: Result, command: Command = Command.LINK, **changes: Any) -> Pass:
    """Return a pass with these results."""
    fields: dict[str, Any] = {
        "command": command,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC),
        "duration": 0.94,
        "dry_run": False,
        "results": results,
        **changes,
    }
    return Pass(**fields)


def pass_with(*outcomes: Outcome, **changes: Any) -> Pass:
    """Return a pass in which images had these outcomes."""
    return pass_of(*(result_of(outcome) for outcome in outcomes), **changes)


ORPHANS = Reclaimable(orphans=DiskUsage(count=1, bytes=2048))
ALL_KINDS = Reclaimable(
    unmarked=DiskUsage(count=2, bytes=1024), retired=DiskUsage(count=1, bytes=1)
)


@pytest.mark.parametrize(
    ("pass_", "line"),
    [
        (pass_of(), "nothing to report, 0.9 s"),
        (pass_with(Outcome.LINKED), "1 linked, 0.9 s"),
        (
            pass_with(Outcome.WAITING, Outcome.LINKED, Outcome.LINKED),
            "2 linked, 1 waiting, 0.9 s",
        ),
        (pass_with(Outcome.LINKED, dry_run=True), "dry run: 1 linked, 0.9 s"),
        (pass_of(present=[ID, OTHER_ID]), "2 present, 0.9 s"),
        (
            pass_of(reclaimable=ORPHANS),
            "nothing to report, 2.0 KiB reclaimable (1 orphans), 0.9 s",
        ),
        (
            pass_with(Outcome.PRUNED, command=Command.PRUNE, reclaimable=ALL_KINDS),
            "1 pruned, 3.0 GiB freed, 1.0 KiB reclaimable (2 unmarked),"
            " 1 B reclaimable (1 retired), 0.9 s",
        ),
        (
            pass_with(Outcome.DAMAGED, Outcome.VERIFIED, command=Command.VERIFY),
            "1 verified, 1 damaged, 0.9 s",
        ),
    ],
)
def test_the_summary_is_one_line_of_counts(pass_: Pass, line: str) -> None:
    """The summary counts the outcomes in their order, and what was freed and is reclaimable."""
    assert report.summary(pass_) == line


@pytest.mark.parametrize(
    ("outcomes", "error", "status"),
    [
        ([], None, 0),
        ([outcome for outcome in Outcome if outcome not in FAULTS], None, 0),
        ([Outcome.FAILED, Outcome.LINKED], None, 1),
        ([Outcome.DAMAGED], None, 1),
        ([Outcome.LOST], None, 1),
        ([Outcome.LINKED], TemporaryError(""), 75),
        ([Outcome.FAILED], TemporaryError(""), 75),
        ([Outcome.FAILED], ConfigurationError(""), 2),
    ],
)
def test_the_exit_status_is_the_most_severe(
    outcomes: Sequence[Outcome], error: LnImagesError | None, status: int
) -> None:
    """A failed, damaged or lost image makes it 1, and an error of the pass takes precedence."""
    assert report.exit_status(pass_with(*outcomes, error=error)) == status


@pytest.mark.parametrize("outcome", Outcome)
def test_changes_and_faults_are_news(outcome: Outcome) -> None:
    """A pass is news if it changed something, or if something failed."""
    is_news = outcome in CHANGES or outcome in FAULTS
    assert report.is_news(pass_with(Outcome.PRESENT, outcome)) is is_news


def test_every_outcome_belongs_to_a_command() -> None:
    """Each command counts its own outcomes, and no outcome is left out."""
    assert {outcome for outcomes in OUTCOMES.values() for outcome in outcomes} == set(Outcome)


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
    """A size has one decimal and a unit, and an unknown one is a dash."""
    assert report.size_text(size) == text


def test_images_that_are_as_expected_are_listed_only_on_request() -> None:
    """Images that are present, and files that Glance does not know, are counted in any case."""
    unknown = Result(cache_name=cache_name(OTHER_ID), verdict=NOT_KNOWN, id=OTHER_ID, size=7)
    pass_ = pass_of(unknown, result_of(Outcome.PRESENT), present=[ID])
    assert report.list_results(pass_, everything=False) == []
    listed = [result.id for result in report.list_results(pass_, everything=True)]
    assert listed == [OTHER_ID, ID, ID]
    assert report.counts(pass_) == {Outcome.SKIPPED: 1, Outcome.PRESENT: 2}
    assert report.unknown_file_sizes(pass_) == [7]
    verified = pass_with(Outcome.VERIFIED, command=Command.VERIFY)
    assert report.list_results(verified, everything=False) == []


def test_the_document_of_a_pass_has_the_fields_of_its_schema() -> None:
    """Absence is null, and the error, the exit status and the reclaimable space are those given."""
    base = Result(
        cache_name="0" * 40,
        verdict=Verdict(Outcome.FAILED, Reason.SYSTEM_ERROR, "Structure needs cleaning"),
    )
    pass_ = pass_of(
        result_of(Outcome.LINKED, reason=Reason.NO_LINK_YET),
        base,
        error=TemporaryError("no Glance"),
        reclaimable=ORPHANS,
    )
    document = json.loads(json.dumps(report.document(pass_, 75, everything=False)))
    SCHEMA.validate(document)
    assert document == {
        "version": 2,
        "command": "ln-images",
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_seconds": 0.94,
        "dry_run": False,
        "exit_status": 75,
        "error": "no Glance",
        "counts": {
            "linked": 1,
            "repaired": 0,
            "present": 0,
            "waiting": 0,
            "skipped": 0,
            "refused": 0,
            "damaged": 0,
            "occupied": 0,
            "failed": 1,
        },
        "reclaimable": {
            "orphans": {"count": 1, "bytes": 2048},
            "unmarked": {"count": 0, "bytes": 0},
            "retired": {"count": 0, "bytes": 0},
        },
        "images": [
            {
                "id": ID,
                "name": "debian",
                "status": "active",
                "disk_format": "raw",
                "size": 3 * 1024**3,
                "cache_name": cache_name(ID),
                "outcome": "linked",
                "reason_code": "no_link_yet",
                "reason": None,
            },
            {
                "id": None,
                "name": None,
                "status": None,
                "disk_format": None,
                "size": None,
                "cache_name": "0" * 40,
                "outcome": "failed",
                "reason_code": "system_error",
                "reason": "Structure needs cleaning",
            },
        ],
    }


def test_the_schema_has_the_outcomes_and_reason_codes_of_the_code() -> None:
    """The schema lists every command, outcome and reason code, and no other."""
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    definitions = schema["$defs"]
    assert definitions["outcome"]["enum"] == [outcome.value for outcome in Outcome]
    assert definitions["reason_code"]["enum"] == [reason.value for reason in Reason]
    assert schema["properties"]["command"]["enum"] == [command.value for command in Command]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"command": "ln"},
        {"exit_status": 130},
        {"error": ""},
        {"fault": None},
        {"started_at": "2026-01-01 00:00:00"},
        {"counts": {"linked": 1}},
        {"reclaimable": {}},
        {"images": [{"id": ID}]},
    ],
)
def test_the_schema_refuses_other_documents(change: dict[str, Any]) -> None:
    """A document with a wrong, missing or unknown field is not valid."""
    document = report.document(pass_with(Outcome.LINKED), 0, everything=False)
    assert SCHEMA.is_valid(document)
    assert not SCHEMA.is_valid({**document, **change})


@given(st.text())
def test_whatever_a_name_has_the_document_is_json(name: str) -> None:
    """A lone surrogate, or any other character, survives in the JSON document."""
    pass_ = pass_of(result_of(Outcome.LINKED, name=name))
    text = json.dumps(report.document(pass_, 0, everything=False))
    assert text.isprintable()
    assert json.loads(text)["images"][0]["name"] == name


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (result_of(Outcome.LINKED), f"linked: {ID} (debian) as {cache_name(ID)}"),
        (result_of(Outcome.LINKED, name=None), f"linked: {ID} as {cache_name(ID)}"),
        (
            result_of(Outcome.FAILED, image_id=None, sentence="Input/output error"),
            f"failed: {cache_name(ID)}: Input/output error",
        ),
    ],
)
def test_a_log_line_names_image_and_base(result: Result, line: str) -> None:
    """A log line has the outcome, the id, the name and the cache name, as far as they are known."""
    assert report.line(result) == line


def test_no_results_make_no_table() -> None:
    """Without results there is not even a heading."""
    assert report.table([]) == ""


def test_columns_are_aligned_below_wide_names() -> None:
    """A Chinese character takes two columns, and a combining accent none."""
    names = ["\u4e2d\u6587\u955c\u50cf", "debian", "de\u0301bian", None]
    lines = report.table([result_of(Outcome.LINKED, name=name) for name in names]).splitlines()
    starts = [wcwidth.wcswidth(line[: line.index(ID)]) for line in lines[1:]]
    assert starts == [lines[0].index("ID")] * 4


@given(st.text(), st.text(), st.text(), st.text())
def test_a_row_is_one_line_that_cannot_act_on_a_terminal(
    name: str, image_id: str, status: str, sentence: str
) -> None:
    """Control characters, bidirectional marks and surrogates of any field are escaped."""
    result = result_of(
        Outcome.LINKED, name=name, image_id=image_id, status=status, sentence=sentence
    )
    lines = report.table([result]).split("\n")
    assert len(lines) == 2
    assert lines[1].isprintable()
    lines[1].encode()


@pytest.mark.parametrize(
    ("character", "escaped"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("\n", r"\n"),
        ("\x9b", r"\x9b"),
        ("\u202e", r"\u202e"),
        ("\u200b", r"\u200b"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_hostile_characters_are_escaped(character: str, escaped: str) -> None:
    """An escape sequence, a line break, a bidirectional override or a surrogate is visible."""
    assert report.printable(f"a{character}b") == f"a{escaped}b"
    assert f"a{escaped}b" in report.table([result_of(Outcome.LINKED, name=f"a{character}b")])


@given(st.text())
def test_escaping_keeps_what_can_be_printed(text: str) -> None:
    """Printable text stays as it is; every other character is escaped, and none is lost."""
    escaped = report.printable(text)
    assert escaped.isprintable()
    assert (escaped == text) is text.isprintable()
    rest = iter(escaped)
    assert all(character in rest for character in text if character.isprintable())
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Zl") for character in escaped)


def refused(name: str = NAME, sentence: str = SENTENCE) -> Result:
    """Return a refused image."""
    return result_of(Outcome.REFUSED, reason=Reason.OTHER_CONTENT, name=name, sentence=sentence)


def test_a_table_that_fits_the_terminal_is_not_changed() -> None:
    """Ids are whole and nothing is wrapped, where the terminal has as many columns as the table."""
    whole = report.table([refused()])
    width = max(len(line) for line in whole.splitlines())
    assert whole.splitlines()[1] == f"{NAME}  {ID}  active  3.0 GiB  refused  {SENTENCE}"
    assert report.table([refused()], width) == whole
    assert report.table([refused()], width - 1) != whole
    # An accent that is drawn over its letter takes no column of its own.
    accented = NAME.replace("m", "m\u0301")
    assert ID in report.table([refused(accented)], width)


def columns_of(table: str) -> list[list[str]]:
    """Return the words of each column below the heading, joined over the lines of a row."""
    heading, *lines = table.splitlines()
    starts = [heading.index(name) for name in ("NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON")]
    ends = [*starts[1:], None]
    return [
        [line[start:end].strip() for line in lines if line[start:end].strip()]
        for start, end in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120])
def test_a_table_is_fitted_to_a_narrow_terminal(width: int) -> None:
    """Ids are shortened and names and reasons wrapped, and no character of these is lost."""
    table = report.table([refused(sentence=SENTENCE * 3)], width)
    assert max(len(line) for line in table.splitlines()) <= width
    name, image_id, status, size, outcome, reason = columns_of(table)
    assert "".join(name) == NAME
    assert image_id == [ID[:8]]
    assert (status, size, outcome) == (["active"], ["3.0 GiB"], ["refused"])
    assert "".join(reason).replace(" ", "") == (SENTENCE * 3).replace(" ", "")


def test_a_line_is_broken_at_a_space_if_there_is_one() -> None:
    """Words that fit into their column stay whole."""
    *_, reason = columns_of(report.table([refused(sentence="alpha beta gamma " * 9)], 80))
    assert set(" ".join(reason).split()) == {"alpha", "beta", "gamma"}


def test_no_long_reason_takes_the_place_of_a_name() -> None:
    """A reason of any length leaves a name a third of what both of them have."""
    name, *_, reason = columns_of(report.table([refused(sentence=SENTENCE * 5)], 80))
    assert len(name[0]) == 14
    assert max(len(line) for line in reason) <= 28
    (short_name,), *_ = columns_of(report.table([refused("debian", SENTENCE * 5)], 80))
    assert short_name == "debian"


@given(st.text(), st.text(), st.integers(60, 200))
def test_no_line_is_wider_than_the_terminal(name: str, sentence: str, width: int) -> None:
    """Whatever characters names and reasons have, wide ones included, every line fits."""
    table = report.table([refused(name, sentence), refused()], width)
    for line in table.splitlines():
        assert report._text_width(line) <= width


@pytest.mark.parametrize("character", ["\u4e2d", "\uff21", "\U0001f600", "e\u0301"])
def test_wide_names_are_wrapped_by_columns(character: str) -> None:
    """A terminal of 70 columns has room for half as many wide characters."""
    table = report.table([refused(character * 60)], 70)
    assert max(wcwidth.wcswidth(line) for line in table.splitlines()) <= 70
    assert table.count(character) == 60


def test_outcomes_have_colours_on_request() -> None:
    """Only the outcome is coloured, and the columns stay where they are."""
    results = [result_of(outcome) for outcome in (Outcome.LINKED, Outcome.FAILED, Outcome.PRESENT)]
    plain, coloured = report.table(results, 100), report.table(results, 100, colour=True)
    assert "\x1b[32mlinked\x1b[0m" in coloured
    assert "\x1b[31mfailed\x1b[0m" in coloured
    assert coloured.count("\x1b[") == 4
    without_colours = coloured.replace("\x1b[32m", "").replace("\x1b[31m", "")
    assert without_colours.replace("\x1b[0m", "") == plain
