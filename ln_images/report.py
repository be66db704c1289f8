"""Outcomes -> table, JSON, exit status. Pure: it returns text and prints nothing."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from ln_images.model import Image, Outcome, Pass, Result, Verdict
from ln_images.plan import cache_name

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COLUMNS = ("NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON")
_OUTCOME = _COLUMNS.index("OUTCOME")
_WIDEST_NAME, _NARROWEST = 30, 10
_COLOURS: dict[str, str] = {
    Outcome.LINKED: "green",
    Outcome.REPAIRED: "green",
    Outcome.WAITING: "cyan",
    Outcome.REFUSED: "red",
    Outcome.OCCUPIED: "yellow",
    Outcome.FAILED: "red",
    Outcome.PRUNED: "magenta",
}


def printable(text: str) -> str:
    """``text`` with every character escaped that could act on a terminal or forge a line of a log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_status(made: Pass) -> int:
    """The pass's own fault's, else 1 where an image failed, else 0. No fault is less severe than a failed image."""
    if made.fault is not None:
        return made.fault.exit_status
    return int(bool(made.having({Outcome.FAILED})))


def listed(made: Pass, present_too: bool) -> list[Result]:
    """The results that a report lists one by one: all but those already present, unless they are asked for."""
    if not present_too:
        return [result for result in made.results if result.verdict.outcome is not Outcome.PRESENT]
    # Of these nothing was asked, and the id is all that is known.
    settled = (Result(Image(image_id, "", "", "", None), Verdict(Outcome.PRESENT)) for image_id in made.settled)
    return [*made.results, *settled]


def counts(made: Pass) -> Counter[Outcome]:
    """How many images had which outcome."""
    found = Counter(result.verdict.outcome for result in made.results)
    found[Outcome.PRESENT] += len(made.settled)
    return found


def document(made: Pass, present_too: bool) -> dict[str, Any]:
    """The JSON document of one pass."""
    found = counts(made)
    return {
        "version": 1,
        "started_at": made.started_at.isoformat(),
        "duration_seconds": round(made.duration, 3),
        "dry_run": made.dry_run,
        "counts": {outcome.value: found[outcome] for outcome in Outcome},
        "images": [
            {
                "id": image.id,
                "name": image.name,
                "status": image.status,
                "disk_format": image.disk_format,
                "size": image.size,
                "cache_name": cache_name(image.id),
                "outcome": verdict.outcome.value,
                "reason": verdict.reason,
            }
            for image, verdict in ((result.image, result.verdict) for result in listed(made, present_too))
        ],
    }


def held(made: Pass) -> list[int]:
    """The sizes, in bytes, of the links that still hold the blocks of a deleted image after the pass."""
    pruned = {result.image.id for result in made.having({Outcome.PRUNED})}
    return [file.size for image_id, file in made.orphans.items() if image_id not in pruned]


def summary(made: Pass) -> str:
    """One line: how many images had which outcome, and how long the pass took."""
    found = counts(made)
    parts = [f"{found[outcome]} {outcome}" for outcome in Outcome if found[outcome]] or ["no images"]
    pruned = made.having({Outcome.PRUNED})
    freed = sum(made.orphans[result.image.id].size for result in pruned)
    still = held(made)
    if pruned:
        parts.append(f"{size_text(freed)} freed")
    if still:
        parts.append(f"{size_text(sum(still))} held by {len(still)} deleted image{'s' * (len(still) > 1)}")
    return f"{'dry run: ' if made.dry_run else ''}{', '.join(parts)}, {made.duration:.1f} s"


def table(results: Sequence[Result], width: int | None = None, colour: bool = False) -> str:
    """The results as aligned lines under a heading, or nothing where there are none.

    With ``width`` no line takes more columns of the terminal: names are cut first, then reasons.
    """
    if not results:
        return ""
    rows = [_COLUMNS, *(_row(result) for result in results)]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    if width is not None:
        spare = width - sum(widths[1:5]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(_NARROWEST, spare - widths[5]))
        widths[5] = min(widths[5], max(_NARROWEST, spare - widths[0]))
    lines = []
    for row in rows:
        cells = [_padded(_fitted(cell, column), column) for cell, column in zip(row, widths, strict=True)]
        if colour:
            cells[_OUTCOME] = click.style(cells[_OUTCOME], fg=_COLOURS.get(row[_OUTCOME]), bold=row is _COLUMNS)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(result: Result) -> tuple[str, ...]:
    image, verdict = result.image, result.verdict
    return (
        _fitted(printable(image.name) or "-", _WIDEST_NAME),
        printable(image.id)[:8],
        _fitted(printable(image.status) or "-", _WIDEST_NAME),
        size_text(image.size),
        verdict.outcome.value,
        printable(verdict.reason),
    )


def size_text(size: int | None) -> str:
    """A size in bytes as people read it, in powers of 1024."""
    if size is None:
        return "-"
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} B"


def _width(text: str) -> int:
    """How many columns of a terminal ``text`` takes (Unicode TR 11: wide and fullwidth take two)."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _fitted(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return f"{text}~"


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
