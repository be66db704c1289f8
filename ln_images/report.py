"""Results as a table, as JSON, as log lines, and as an exit status.

The functions here return text and print nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from prettytable import PrettyTable

from ln_images.model import (
    CHANGES,
    FAULTS,
    OUTCOMES,
    DiskUsage,
    Outcome,
    Pass,
    Reason,
    Reclaimable,
    Result,
    Verdict,
    cache_name,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COLUMNS = ("NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON")
# The columns that a terminal can be too narrow for are wrapped, but not to less than this.
_NARROWEST = 16
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
    present = Verdict(Outcome.PRESENT, Reason.CORRECT)
    settled = [
        Result(cache_name=cache_name(image_id), verdict=present, id=image_id)
        for image_id in pass_.settled
    ]
    return [*pass_.results, *settled]


def _is_expected(verdict: Verdict) -> bool:
    is_fine = verdict.outcome in (Outcome.PRESENT, Outcome.VERIFIED)
    return is_fine or verdict.reason is Reason.UNKNOWN_TO_GLANCE


def counts(pass_: Pass) -> Counter[Outcome]:
    """Return how many images had which outcome."""
    counter = Counter(result.verdict.outcome for result in pass_.results)
    counter[Outcome.PRESENT] += len(pass_.settled)
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
        "reclaimable": {kind: asdict(usage) for kind, usage in _list_usage(pass_.reclaimable)},
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


def _list_usage(usage: Reclaimable) -> list[tuple[str, DiskUsage]]:
    return [
        ("orphans", usage.orphans),
        ("unmarked", usage.unmarked),
        ("retired", usage.retired),
    ]


def summary(pass_: Pass) -> str:
    """Return one line: how many images had which outcome, what is reclaimable, and the time."""
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
    for kind, usage in _list_usage(pass_.reclaimable):
        if usage.count:
            parts.append(f"{size_text(usage.bytes)} reclaimable ({usage.count} {kind})")
    parts.append(f"{pass_.duration:.1f} s")
    text = ", ".join(parts)
    return f"dry run: {text}" if pass_.dry_run else text


def table(results: Sequence[Result], width: int | None = None, colour: bool = False) -> str:
    """Return the results as aligned lines under a heading, or nothing if there are none.

    With ``width``, names and reasons are wrapped so that a line has at most so many columns.
    """
    if not results:
        return ""
    rows = [_row(result) for result in results]
    pretty = PrettyTable(_COLUMNS, border=False, align="l")
    pretty.left_padding_width = 0
    pretty.right_padding_width = 2
    if width is not None:
        _limit_width(pretty, rows, width)
    for result, row in zip(results, rows, strict=True):
        if colour:
            row[4] = click.style(row[4], fg=_COLOURS.get(result.verdict.outcome))
        pretty.add_row(row)
    return "\n".join(line.rstrip() for line in pretty.get_string().splitlines())


def _limit_width(pretty: PrettyTable, rows: Sequence[Sequence[str]], width: int) -> None:
    """Wrap names and reasons, so that together with the other columns they fit."""
    fixed = sum(
        max(len(heading), *(len(row[column]) for row in rows)) + 2
        for column, heading in enumerate(_COLUMNS)
        if heading not in ("NAME", "REASON")
    )
    available = width - fixed - 4
    pretty.max_width["NAME"] = max(_NARROWEST, available // 3)
    pretty.max_width["REASON"] = max(_NARROWEST, available - available // 3)


def _row(result: Result) -> list[str]:
    cells = [
        result.name or "-",
        result.id or result.cache_name,
        result.status or "-",
        size_text(result.size),
        result.verdict.outcome.value,
        result.verdict.sentence or "",
    ]
    return [printable(cell) for cell in cells]


def line(result: Result) -> str:
    """Return what a log says of one image or base."""
    verdict = result.verdict
    what = result.cache_name
    if result.id is not None:
        name = f" ({result.name})" if result.name else ""
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
