"""What the three commands print: reports, metrics and progress bars."""

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import click

from ln_images import interrupts, report
from ln_images.memory import LogOnChange
from ln_images.metrics import Metric, Textfile
from ln_images.model import Command, ConfigurationError, Pass
from ln_images.options import CommonOptions

LOG = logging.getLogger(__name__)

# Makes a progress bar, a context manager, from a label and the total.
Progress = Callable[[str, int], Any]

# Exit statuses, the least severe first.
_SEVERITY = (0, 1, 75, 2)
# A pass over fewer images is over before a progress bar can be read.
_WORTH_A_BAR = 200


def most_severe(*statuses: int) -> int:
    """Return the most severe of exit statuses: 2, then 75, then 1."""
    return max(statuses, key=_SEVERITY.index)


def progress(label: str, total: int) -> Any:
    """Return a progress bar on standard error, hidden if it is short or nobody can see it."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    hidden = total < _WORTH_A_BAR or not is_terminal
    return click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden)


def print_report(
    pass_: Pass, status: int, common: CommonOptions, everything: bool, preface: str = ""
) -> None:
    """Print the report on standard output; with ``--quiet`` only JSON.

    ``preface`` is printed above the table, unless it is empty. If standard output cannot be
    written to, the error is logged, and the pass keeps its exit status.
    """
    try:
        if common.format == "json":
            click.echo(json.dumps(report.document(pass_, status, everything)))
        elif not common.quiet:
            if preface:
                click.echo(preface)
            _print_table(pass_, everything)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        LOG.error("the report cannot be written: %s", error.strerror)
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_table(pass_: Pass, everything: bool) -> None:
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    has_colour = is_terminal and not os.environ.get("NO_COLOR")
    table = report.table(report.list_results(pass_, everything), width, has_colour)
    if table:
        click.echo(table, color=has_colour)
    click.echo(report.summary(pass_))


class MetricsWriter:
    """Writes the metrics of one command, if there is ``--metrics-file``."""

    def __init__(self, common: CommonOptions, command: Command, dry_run: bool = False) -> None:
        self._textfile: Textfile | None = None
        if common.metrics_file is not None and not dry_run:
            self._textfile = Textfile(common.metrics_file, command, common.cache_dir)
        self._failure = LogOnChange(LOG, logging.ERROR)

    def write(self, status: int, duration: float | None, metrics: Iterable[Metric]) -> int:
        """Write the metrics, and return the most severe of ``status`` and our own.

        Our own is 2 if the file cannot be written. That error is logged once for as long as it
        stands.
        """
        if self._textfile is None:
            return status
        try:
            # A signal would leave prometheus-client's temporary file behind.
            with interrupts.held_back():
                self._textfile.write(status, time.time(), duration, metrics)
        except ConfigurationError as error:
            self._failure.log(error.message)
            return most_severe(status, error.exit_code)
        self._failure.log(None)
        return status


def prepare_standard_output() -> None:
    """Let standard output escape what its encoding cannot show."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
