"""The command: options, wiring, exit status. The only place that prints or exits."""

import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Collection
from typing import Any, NoReturn

import click

from ln_images import __version__, logs, report
from ln_images.metrics import Textfile
from ln_images.model import (
    AnotherRunError,
    ConfigurationError,
    LnImagesError,
    Outcome,
    Pass,
    TemporaryError,
)
from ln_images.options import Options, parameters

LOG = logging.getLogger(__name__)
# Exit statuses, the least severe first.
_SEVERITY = (0, 1, 75, 2)
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# A pass over fewer images is over before a progress bar can be read.
_WORTH_A_BAR = 200


class _Command(click.Command):
    """Where every way out of the command ends: one line of error, and one exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        logs.to_stderr()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
        except click.ClickException as error:
            LOG.error(
                "%s: see ln-images --help", error.format_message().rstrip(".").replace("\n", " ")
            )
            status = error.exit_code
        except LnImagesError as error:
            LOG.error("%s", error)
            status = error.exit_status
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error(
                "a bug, please report it: %r at %s:%s",
                error,
                os.path.basename(where.filename),
                where.lineno,
            )
            status = 1
        sys.exit(status)


@click.command(cls=_Command, params=parameters(), context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ln-images")
def main(**given: Any) -> int:
    """Hard-link finished Glance images into Nova's shared image cache.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can
    also be given as LN_IMAGES_<OPTION> in the environment.
    """
    options = Options(**given)
    status = logs.set_up(options.log_file, options.verbose, options.quiet)
    if options.for_seconds is not None and options.every is None:
        raise click.UsageError("--for needs --every")
    if options.prune_unmarked and not options.prune:
        raise click.UsageError("--prune-unmarked needs --prune")
    run = _Run(options, status)
    if options.every is None:
        run.make(None)
        return run.status
    from ln_images.watch import repeat

    # A service is sent it when its log was rotated or its settings were changed, and goes on.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    repeat(options.images_dir, options.every, options.for_seconds, run.make)
    if run.turned_away is not None:
        raise run.turned_away
    return run.status


class _Run:
    """The passes of one process, and what is said of them.

    ``status`` is the most severe of their exit statuses.

    ``turned_away`` is why there was no pass so far, where another run held the lock.
    """

    def __init__(self, options: Options, status: int) -> None:
        self._options = options
        self.status = status
        self.turned_away: AnotherRunError | None = None
        self._has_passed = False
        self._fault = self._metrics_fault = ""
        self._passes: Any = None
        self._textfile: Textfile | None = None
        if options.metrics_file and not options.dry_run:
            self._textfile = Textfile(options.metrics_file, options.prune)

    def make(self, ids: Collection[str] | None) -> Collection[str] | None:
        """Makes a whole pass, or one for some ``ids``.

        The ids that are not finished, or None where there was none.

        A repeated one waits for a cloud that goes away, and for another run. Raises LnImagesError
        otherwise.
        """
        try:
            pass_ = self._pass(ids)
        except AnotherRunError as error:
            # The metrics are those of the run at work.
            if self._options.every is None:
                raise
            self.turned_away = None if self._has_passed else error
            return None
        except LnImagesError as error:
            self._note(error.exit_status)
            if ids is None:
                self._measure(None, error.exit_status)
            if self._options.every is None or not isinstance(error, TemporaryError):
                raise
            self._tell(str(error))
            return None
        self._has_passed, self.turned_away = True, None
        if not pass_.narrow:
            # A pass for some images cannot tell whether a clean-up would work again.
            self._tell("" if pass_.fault is None else str(pass_.fault))
        self._report(pass_)
        waiting = {
            result.image.id for result in pass_.results if result.verdict.outcome is Outcome.WAITING
        }
        # An image whose file is there and which Glance does not list is about to be.
        return waiting.union(set(ids or ()).difference(result.image.id for result in pass_.results))

    def _pass(self, ids: Collection[str] | None) -> Pass:
        # What a pass needs is imported when it is known that there is one: --help is quick.
        from ln_images.keystone import connect
        from ln_images.run import Passes

        options = self._options
        try:
            if self._passes is None:
                self._passes = Passes(
                    options, connect(os.environ, options.timeout, options.os_cloud), _progress
                )
            return self._passes.whole() if ids is None else self._passes.narrow(ids)  # type: ignore[no-any-return]
        except OSError as error:
            # What belongs to one image or one entry is its outcome: this is the directory's.
            where = error.filename or options.cache_dir
            raise TemporaryError(
                f"{where}: {error.strerror}: look at its file system in the kernel's log"
            ) from None

    def _tell(self, fault: str) -> None:
        """Says what keeps passes from being made once when it begins, and once when it has ended."""
        if fault and fault != self._fault:
            LOG.error("%s", fault)
        elif self._fault and not fault:
            LOG.info("it is over: %s", self._fault)
        self._fault = fault

    def _note(self, status: int) -> int:
        self.status = max(self.status, status, key=_SEVERITY.index)
        return status

    def _report(self, pass_: Pass) -> None:
        """What is printed and measured of a pass.

        Of a narrow one only where it changed something.
        """
        status = self._note(report.exit_status(pass_))
        is_news = report.is_news(pass_)
        if is_news or not (pass_.narrow or self._options.quiet):
            _print_report(pass_, status, self._options)
        if is_news or not pass_.narrow:
            self._measure(pass_, status)

    def _measure(self, pass_: Pass | None, status: int) -> None:
        """Writes the metrics.

        A file that cannot be written takes nothing from the pass, and is told once.
        """
        try:
            if self._textfile is not None:
                self._textfile.write(pass_, status, time.time())
        except ConfigurationError as error:
            self._note(error.exit_status)
            if str(error) != self._metrics_fault:
                LOG.error("%s", error)
            self._metrics_fault = str(error)


def _progress(label: str, total: int) -> Any:
    """A progress bar on standard error for a long way, where somebody sits before it."""
    hidden = total < _WORTH_A_BAR or not (sys.stderr and sys.stderr.isatty())
    return click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden)


def _print_report(pass_: Pass, status: int, options: Options) -> None:
    """The report on standard output.

    Under ``--quiet`` only JSON. One that cannot be written takes nothing away.
    """
    everything = options.verbose or options.full
    try:
        if options.format == "json":
            click.echo(json.dumps(report.document(pass_, status, everything)))
        elif not options.quiet:
            terminal = sys.stdout is not None and sys.stdout.isatty()
            width = shutil.get_terminal_size().columns if terminal else None
            colour = terminal and not os.environ.get("NO_COLOR")
            lines = [
                report.table(report.listed(pass_, everything), width, everything, colour),
                report.summary(pass_),
            ]
            click.echo("\n".join(line for line in lines if line), color=colour)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        LOG.error("the report cannot be written: %s", error.strerror)
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
