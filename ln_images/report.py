"""Outcomes -> table, JSON, exit status. Pure: it returns text and prints nothing."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click
import wcwidth

from ln_images.model import CHANGES, FAULTS, Image, Outcome, Pass, Result, Verdict
from ln_images.plan import UNKNOWN, cache_name

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COLUMNS = ("NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON")
_NAME, _OUTCOME, _REASON = 0, 4, 5
_HELD = {"orphans": "of deleted images", "unmarked": "not linked here", "retired": "retired"}
_PRESENT = Verdict(Outcome.PRESENT)
# No name is cut to less, and no reason pushes one under it.
_NARROWEST = 16
_COLOURS: dict[str, str] = {
    **dict.fromkeys((Outcome.LINKED, Outcome.REPAIRED, Outcome.RESTORED), "green"),
    **dict.fromkeys((Outcome.REFUSED, Outcome.DAMAGED, Outcome.FAILED), "red"),
    **dict.fromkeys((Outcome.RETIRED, Outcome.PRUNED), "magenta"),
    Outcome.WAITING: "cyan",
    Outcome.OCCUPIED: "yellow",
}


def printable(text: str) -> str:
    """``text`` with every character escaped that could act on a terminal or forge a line of a log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_status(pass_: Pass) -> int:
    """The pass's own fault's, else 1 where an image failed, else 0.

    No fault is less severe than a failed image.
    """
    if pass_.fault is not None:
        return pass_.fault.exit_status
    return int(any(result.verdict.outcome in FAULTS for result in pass_.results))


def is_news(pass_: Pass) -> bool:
    """Whether something was changed, or has failed."""
    return any(result.verdict.outcome in CHANGES | FAULTS for result in pass_.results)


def listed(pass_: Pass, everything: bool) -> list[Result]:
    """The results that a report lists one by one.

    Those present or unknown to Glance only where they are asked for.
    """
    if not everything:
        return [result for result in pass_.results if result.verdict not in (_PRESENT, UNKNOWN)]
    # Of these nothing was asked, and the id is all that is known.
    settled = (
        Result(Image(image_id), cache_name(image_id), _PRESENT) for image_id in pass_.settled
    )
    return [*pass_.results, *settled]


def counts(pass_: Pass) -> Counter[Outcome]:
    """How many images had which outcome."""
    found = Counter(result.verdict.outcome for result in pass_.results)
    found[Outcome.PRESENT] += len(pass_.settled)
    return found


def unknown(pass_: Pass) -> list[int]:
    """The sizes, in bytes, of the files in the store that Glance does not know."""
    return [result.image.size or 0 for result in pass_.results if result.verdict == UNKNOWN]


def document(pass_: Pass, status: int, everything: bool) -> dict[str, Any]:
    """The JSON document of one pass that ended with exit ``status``."""
    found = counts(pass_)
    return {
        "version": 1,
        "started_at": pass_.started_at.isoformat(),
        "duration_seconds": round(pass_.duration, 3),
        "dry_run": pass_.dry_run,
        "exit_status": status,
        "fault": None if pass_.fault is None else str(pass_.fault),
        "counts": {outcome.value: found[outcome] for outcome in Outcome},
        "held": {
            kind: {"count": count, "bytes": size} for kind, (count, size) in pass_.held.items()
        },
        "images": [
            {
                name: getattr(result.image, name)
                for name in ("id", "name", "status", "disk_format", "size")
            }
            | {
                "cache_name": result.cache_name,
                "outcome": result.verdict.outcome,
                "reason": result.verdict.reason,
            }
            for result in listed(pass_, everything)
        ],
    }


def summary(pass_: Pass) -> str:
    """One line: how many images had which outcome, what other bases hold, and how long it took."""
    found = counts(pass_)
    parts = [f"{found[outcome]} {outcome}" for outcome in Outcome if found[outcome]] or [
        "no images"
    ]
    freed = sum(
        result.image.size or 0
        for result in pass_.results
        if result.verdict.outcome is Outcome.PRUNED
    )
    if found[Outcome.PRUNED]:
        parts.append(f"{size_text(freed)} freed")
    parts += [
        f"{size_text(size)} held by {count} {_HELD[kind]}"
        for kind, (count, size) in pass_.held.items()
        if count
    ]
    if pass_.audit is not None:
        images, without, size, seconds = pass_.audit
        rate = size_text(int(size / seconds)) if seconds else "-"
        parts.append(
            f"{images} verified, {size_text(size)} at {rate}/s, {without} without a checksum"
        )
    return f"{'dry run: ' if pass_.dry_run else ''}{', '.join(parts)}, {pass_.duration:.1f} s"


def table(
    results: Sequence[Result],
    width: int | None = None,
    whole_ids: bool = False,
    colour: bool = False,
) -> str:
    """The results as aligned lines under a heading, or nothing where there are none.

    With ``width`` a line takes no more columns of a terminal where names and reasons can be cut for
    it; ids are whole where they are asked for or there is room.
    """
    if not results:
        return ""
    rows: list[Sequence[str]] = [_COLUMNS, *(_row(result) for result in results)]
    widths = _widths(rows)
    if width is not None:
        room = width - 2 * (len(widths) - 1)
        if sum(widths) > room and not whole_ids:
            rows = [(name, image_id[:8], *rest) for name, image_id, *rest in rows]
            widths = _widths(rows)
        for column, narrowest in (
            (_REASON, _NARROWEST),
            (_NAME, _NARROWEST),
            (_REASON, 8),
            (_NAME, 8),
        ):
            over = max(0, sum(widths) - room)
            widths[column] = max(min(widths[column], narrowest), widths[column] - over)
    lines = []
    for row in rows:
        cells = [_cell(cell, column) for cell, column in zip(row, widths, strict=True)]
        if colour:
            cells[_OUTCOME] = click.style(
                cells[_OUTCOME], fg=_COLOURS.get(row[_OUTCOME]), bold=row is rows[0]
            )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(wcwidth.width(row[column]) for row in rows) for column in range(len(_COLUMNS))]


def _row(result: Result) -> Sequence[str]:
    image, name, verdict = result
    cells = (
        image.name or "-",
        image.id or name,
        image.status or "-",
        size_text(image.size),
        *verdict,
    )
    return [printable(cell) for cell in cells]


def _cell(text: str, width: int) -> str:
    if wcwidth.width(text) > width:
        text = f"{wcwidth.clip(text, 0, width - 1)}~"
    return wcwidth.ljust(text, width)


def line(result: Result) -> str:
    """What a log says of one image or base."""
    image, name, verdict = result
    what = f"{image.id}{image.name and f' ({image.name})'} as {name}" if image.id else name
    return f"{verdict.outcome}: {what}{verdict.reason and f': {verdict.reason}'}"


def size_text(size: int | None) -> str:
    """A size in bytes as people read it, in powers of 1024."""
    if size is None:
        return "-"
    value, unit = float(size), 0
    while round(value, 1) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} B"
