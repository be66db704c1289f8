"""Results as a table, as JSON, as log lines, and as an exit status.

The functions here return text and print nothing.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import click
from prettytable import PrettyTable

from ln_images.model import (
    CHANGES,
    FAULTS,
    OUTCOMES,
    Outcome,
    Pass,
    Reason,
    Result,
    Verdict,
    cache_name,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_HEADINGS = ("NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON")
_PADDING = 2
# A log line has so many characters of a name. Each may become six when it is escaped.
_LONGEST_NAME = 80
# On a terminal that is too narrow, an id has so many characters: its first group, as Git shortens
# hashes. Names and reasons are wrapped, but not to less than so many columns.
_SHORT_ID = 8
_NARROWEST = 8
_COLOURS: dict[Outcome, str] = {
    Outcome.LINKED: "green",
    Outcome.REPAIRED: "green",
    Outcome.RESTORED: "green",
    Outcome.VERIFIED: "green",
    Outcome.REFUSED: "red",
    Outcome.DAMAGED: "red",
    Outcome.FAILED: "red",
    Outcome.LOST: "red",
    Outcome.RETIRED: "magenta",
    Outcome.PRUNED: "magenta",
    Outcome.WAITING: "cyan",
    Outcome.OCCUPIED: "yellow",
}


def printable(text: str) -> str:
    """Return ``text`` with every character escaped that could act on a terminal or forge a line."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def exit_status(pass_: Pass) -> int:
    """Return the status of a pass: its error's, else 1 if an image failed, else 0."""
    if pass_.error is not None:
        return pass_.error.exit_code
    has_fault = any(result.verdict.outcome in FAULTS for result in pass_.results)
    return 1 if has_fault else 0


def is_news(pass_: Pass) -> bool:
    """Return whether the pass changed something, or something failed."""
    return any(result.verdict.outcome in CHANGES | FAULTS for result in pass_.results)


def list_results(pass_: Pass, everything: bool) -> list[Result]:
    """Return the results that a report lists one by one.

    Images that are as they should be, or that Glance does not know, are left out unless
    ``everything`` is asked for.
    """
    if not everything:
        return [result for result in pass_.results if not _is_expected(result.verdict)]
    # Glance was not queried about these, so the id is all that is known.
    verdict = Verdict(Outcome.PRESENT, Reason.CORRECT)
    present = [
        Result(cache_name=cache_name(image_id), verdict=verdict, id=image_id)
        for image_id in pass_.present
    ]
    return [*pass_.results, *present]


def _is_expected(verdict: Verdict) -> bool:
    is_fine = verdict.outcome in (Outcome.PRESENT, Outcome.VERIFIED)
    return is_fine or verdict.reason is Reason.UNKNOWN_TO_GLANCE


def counts(pass_: Pass) -> Counter[Outcome]:
    """Return how many images had which outcome."""
    counter = Counter(result.verdict.outcome for result in pass_.results)
    counter[Outcome.PRESENT] += len(pass_.present)
    return counter


def unknown_file_sizes(pass_: Pass) -> list[int]:
    """Return the sizes, in bytes, of the files in the store that Glance does not know."""
    return [
        result.size or 0
        for result in pass_.results
        if result.verdict.reason is Reason.UNKNOWN_TO_GLANCE
    ]


def document(pass_: Pass, status: int, everything: bool) -> dict[str, Any]:
    """Return the JSON document of a pass that ended with exit ``status``."""
    counter = counts(pass_)
    return {
        "version": 2,
        "command": pass_.command.value,
        "started_at": pass_.started_at.isoformat(),
        "duration_seconds": round(pass_.duration, 3),
        "dry_run": pass_.dry_run,
        "exit_status": status,
        "error": None if pass_.error is None else pass_.error.message,
        "counts": {outcome.value: counter[outcome] for outcome in OUTCOMES[pass_.command]},
        "reclaimable": asdict(pass_.reclaimable),
        "images": [_result_document(result) for result in list_results(pass_, everything)],
        **pass_.extra,
    }


def _result_document(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    del fields["verdict"]
    verdict = result.verdict
    return {
        **fields,
        "outcome": verdict.outcome.value,
        "reason_code": verdict.reason.value,
        "reason": verdict.sentence,
    }


def summary(pass_: Pass) -> str:
    """Return one line: the number of images by outcome, what is reclaimable, and the time."""
    counter = counts(pass_)
    parts = [
        f"{counter[outcome]} {outcome}" for outcome in OUTCOMES[pass_.command] if counter[outcome]
    ]
    if not parts:
        parts = ["nothing to report"]
    removed = [
        result.size or 0 for result in pass_.results if result.verdict.outcome is Outcome.PRUNED
    ]
    if removed:
        parts.append(f"{size_text(sum(removed))} freed")
    if pass_.bytes_read is not None:
        rate = round(pass_.bytes_read / max(pass_.duration, 0.001))
        parts.append(f"{size_text(pass_.bytes_read)} read at {size_text(rate)}/s")
    for kind, usage in pass_.reclaimable.by_kind().items():
        if usage.count:
            parts.append(f"{size_text(usage.bytes)} reclaimable ({usage.count} {kind})")
    parts.append(f"{pass_.duration:.1f} s")
    text = ", ".join(parts)
    return f"dry run: {text}" if pass_.dry_run else text


def plain_table(headings: Sequence[str]) -> PrettyTable:
    """Return an empty table whose columns are aligned and have no lines between them."""
    pretty = PrettyTable(headings, border=False, align="l")
    pretty.left_padding_width = 0
    pretty.right_padding_width = _PADDING
    return pretty


def table(results: Sequence[Result], width: int | None = None, colour: bool = False) -> str:
    """Return the results as aligned lines under a heading, or "" if there are none.

    Each result is one line. With ``width``, the number of columns of a terminal, ids are shortened
    and names and reasons are wrapped if the table is wider than that.
    """
    if not results:
        return ""
    rows = [_row(result) for result in results]
    if width is not None and _table_width(rows) > width:
        rows = _fit(rows, width)
    pretty = plain_table(_HEADINGS)
    for result, row in zip(results, rows, strict=True):
        cells = row._asdict()
        outcome_colour = _COLOURS.get(result.verdict.outcome)
        if colour and outcome_colour is not None:
            cells["outcome"] = click.style(row.outcome, fg=outcome_colour)
        pretty.add_row(list(cells.values()))
    return "\n".join(line.rstrip() for line in pretty.get_string().splitlines())


class _Row(NamedTuple):
    """The cells of one result, in the order of the headings."""

    name: str
    id: str
    status: str
    size: str
    outcome: str
    reason: str


def _row(result: Result) -> _Row:
    return _Row(
        name=printable(result.name or "-"),
        id=printable(result.id or result.cache_name),
        status=printable(result.status or "-"),
        size=size_text(result.size),
        outcome=result.verdict.outcome.value,
        reason=printable(result.verdict.sentence or ""),
    )


def _fit(rows: Sequence[_Row], width: int) -> list[_Row]:
    """Shorten ids, and wrap names and reasons so that the table has at most ``width`` columns.

    A name gets what the reasons leave, or a third if they would leave less than that.
    """
    rows = [row._replace(id=row.id[:_SHORT_ID]) for row in rows]
    names, *_, reasons = _column_widths(rows)
    available = width - (_table_width(rows) - names - reasons)
    name_width = max(min(names, max(available - reasons, available // 3)), _NARROWEST)
    reason_width = max(available - name_width, _NARROWEST)
    return [
        row._replace(name=_wrap(row.name, name_width), reason=_wrap(row.reason, reason_width))
        for row in rows
    ]


def _table_width(rows: Sequence[_Row]) -> int:
    return sum(_column_widths(rows)) + _PADDING * (len(_HEADINGS) - 1)


def _column_widths(rows: Sequence[_Row]) -> list[int]:
    columns = zip(_HEADINGS, *rows, strict=True)
    return [max(_text_width(cell) for cell in column) for column in columns]


def _text_width(text: str) -> int:
    """Return how many columns of a terminal a printable text takes."""
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    # Unicode Standard Annex 11: wide and fullwidth characters, such as Chinese, take two columns.
    if unicodedata.east_asian_width(character) in ("W", "F"):
        return 2
    # Marks, such as accents, are drawn over the character before them.
    return 0 if unicodedata.category(character) in ("Mn", "Me") else 1


def _wrap(text: str, width: int) -> str:
    """Break a text into lines of at most ``width`` columns, at spaces if possible.

    ``textwrap`` counts characters, not columns.
    """
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if _text_width(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:
            if _text_width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(line for line in lines if line)


def line(result: Result) -> str:
    """Return what a log says of one image or base."""
    verdict = result.verdict
    what = result.cache_name
    if result.id is not None:
        name = f" ({result.name[:_LONGEST_NAME]})" if result.name else ""
        what = f"{result.id}{name} as {result.cache_name}"
    if verdict.sentence is None:
        return f"{verdict.outcome}: {what}"
    return f"{verdict.outcome}: {what}: {verdict.sentence}"


def size_text(size: int | None) -> str:
    """Return a size in bytes as people read it, in powers of 1024."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size} B"
    value = float(size)
    unit = 0
    while round(value, 1) >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.1f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units, such as ``1 d 2 h``."""
    parts = []
    rest = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
