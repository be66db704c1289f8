"""The command ``ln-images``: its options, its passes and its exit status."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

from ln_images import logs, loop, report
from ln_images.console import (
    MetricsWriter,
    most_severe,
    prepare_standard_output,
    print_report,
    progress,
)
from ln_images.memory import LogOnChange
from ln_images.metrics import list_link_metrics, removed_links_metric
from ln_images.model import (
    DISK_FORMATS,
    AnotherRunError,
    Command,
    LinkPolicy,
    LnImagesError,
    Outcome,
    Owner,
    Pass,
    Reason,
    TemporaryError,
)
from ln_images.options import (
    CONTEXT_SETTINGS,
    CommonOptions,
    DiskFormat,
    Mode,
    OwnerType,
    Seconds,
    common_options,
)

if TYPE_CHECKING:
    from ln_images.session import Connection
    from ln_images.sync import Sync

LOG = logging.getLogger(__name__)


def _moved_option(name: str, command: str) -> Callable[[Any], Any]:
    """Return a decorator for an option of 0.2.0 that names the command that has replaced it."""

    def refuse(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{name} is gone; use the command {command}", context)

    return click.option(
        name, hidden=True, is_flag=True, expose_value=False, is_eager=True, callback=refuse
    )


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--owner",
    metavar="USER[:GROUP]",
    envvar="LN_IMAGES_OWNER",
    type=OwnerType(),
    default="qemu:qemu",
    show_default=True,
    help="Owner of the links, by name or number: QEMU's user on the compute nodes.",
)
@click.option(
    "--mode",
    metavar="OCTAL",
    envvar="LN_IMAGES_MODE",
    type=Mode(),
    default="0644",
    show_default=True,
    help="Mode of the links: everybody must be able to read, others must not write.",
)
@click.option(
    "--disk-format",
    "disk_formats",
    metavar="NAME",
    envvar="LN_IMAGES_DISK_FORMAT",
    type=DiskFormat(),
    multiple=True,
    default=DISK_FORMATS,
    show_default=True,
    help="Disk formats to link; repeatable.",
)
@click.option(
    "--full",
    is_flag=True,
    envvar="LN_IMAGES_FULL",
    help="Query Glance about every image, not only those that are not linked yet.",
)
@click.option(
    "--every",
    metavar="SECONDS",
    envvar="LN_IMAGES_EVERY",
    type=Seconds(),
    help="Repeat the pass in one process, and link at once what Glance finishes.",
)
@click.option(
    "--for",
    "for_seconds",
    metavar="SECONDS",
    envvar="LN_IMAGES_FOR",
    type=Seconds(),
    help="With --every: end after this time; for cron, which starts a line once a minute.",
)
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    envvar="LN_IMAGES_DRY_RUN",
    help="Report what would be done, and change nothing.",
)
@_moved_option("--prune", "ln-images-prune")
@_moved_option("--prune-after", "ln-images-prune")
@_moved_option("--prune-unmarked", "ln-images-prune")
@_moved_option("--instances-dir", "ln-images-prune")
@_moved_option("--verify", "ln-images-verify")
@common_options("LN_IMAGES")
@click.pass_context
def main(
    context: click.Context,
    *,
    common: CommonOptions,
    owner: Owner,
    mode: int,
    disk_formats: Sequence[str],
    full: bool,
    every: float | None,
    for_seconds: float | None,
    dry_run: bool,
) -> None:
    """Hard-link finished Glance images into Nova's shared image cache.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can
    also be given as LN_IMAGES_<OPTION> in the environment.
    """
    prepare_standard_output()
    status = logs.set_up("ln-images", common.log_file, common.verbose, common.quiet)
    if for_seconds is not None and every is None:
        raise click.UsageError("--for needs --every")
    if os.environ.get("LN_IMAGES_PRUNE"):
        LOG.warning("LN_IMAGES_PRUNE has no effect; use the command ln-images-prune")
    # What a pass needs is imported only now, so that --help is quick.
    from ln_images.sync import SyncOptions

    options = SyncOptions(
        images_dir=common.images_dir,
        cache_dir=common.cache_dir,
        policy=LinkPolicy(owner=owner, mode=mode, disk_formats=disk_formats),
        dry_run=dry_run,
        query_all=full,
        list_in_flight=not common.quiet and every is None,
        repeats=every is not None,
        lock_wait=every or 0,
    )
    passes = _Passes(common, options, status)
    if every is None:
        passes.run_once()
    else:
        # A service gets SIGHUP when its log was rotated or its settings were changed, and goes on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        loop.repeat(common.images_dir, every, for_seconds, passes.run_full, passes.run_partial)
        passes.raise_if_always_locked_out()
    context.exit(passes.status)


class _Passes:
    """The passes of one process, with their reports, metrics and exit status.

    ``status`` is the most severe of their exit statuses.
    """

    def __init__(self, common: CommonOptions, options: Any, status: int) -> None:
        self.status = status
        self._common = common
        self._options = options
        self._connection: Connection | None = None
        self._sync: Sync | None = None
        self._metrics = MetricsWriter(common, Command.LINK, options.dry_run)
        self._last_full: Pass | None = None
        self._counts: Counter[str] = Counter()
        self._was_refused = False
        self._locked_out: AnotherRunError | None = None
        self._error_log = LogOnChange(LOG, logging.ERROR)

    def run_once(self) -> None:
        """Run one full pass. Raise LnImagesError if it is not possible."""
        try:
            pass_ = self._open().full_pass()
        except AnotherRunError:
            # The metrics are those of the run at work.
            raise
        except LnImagesError as error:
            self._metrics.write(error.exit_code, None, [removed_links_metric(0)])
            raise
        self._report(pass_)

    def run_full(self) -> loop.Attempt:
        """Run a full pass of a process that repeats them, whatever temporary errors there are."""
        return self._attempt(lambda: self._open().full_pass(), is_full=True)

    def run_partial(self, image_ids: Collection[str]) -> loop.Attempt:
        """Run a pass over some images of a process that repeats passes."""
        return self._attempt(lambda: self._open().partial_pass(image_ids), is_full=False)

    def raise_if_always_locked_out(self) -> None:
        """Raise AnotherRunError if another run held the lock all the time."""
        if self._locked_out is not None and self._last_full is None:
            raise self._locked_out

    def _open(self) -> "Sync":
        """Return what makes the passes. Raise ConfigurationError if the credentials lack anything."""
        if self._sync is None:
            from ln_images.glance import Glance
            from ln_images.session import connect
            from ln_images.sync import Sync

            self._connection = connect(os.environ, self._common.timeout, self._common.os_cloud)
            glance = Glance(self._connection, self._common.admin_role)
            self._sync = Sync(self._options, glance, progress)
        return self._sync

    def _attempt(self, run: Callable[[], Pass], is_full: bool) -> loop.Attempt:
        """Run a pass, and wait for better times if an error is temporary. Raise other errors."""
        try:
            pass_ = run()
        except AnotherRunError as error:
            self._locked_out = error
            return loop.Attempt(was_possible=False)
        except LnImagesError as error:
            self.status = most_severe(self.status, error.exit_code)
            if is_full:
                self._metrics.write(error.exit_code, None, [removed_links_metric(0)])
            if not self._may_pass_later(error):
                raise
            self._error_log.log(error.message)
            return loop.Attempt(was_possible=False)
        self._was_refused = False
        self._error_log.log(None)
        self._report(pass_)
        return loop.Attempt(was_possible=True, unfinished=_list_unfinished(pass_))

    def _may_pass_later(self, error: LnImagesError) -> bool:
        """Return whether to go on after an error.

        A token can be revoked while it is in use, so the first refusal after a good pass is
        followed by a try with a new token.
        """
        from ln_images.errors import RefusedCredentialsError

        if isinstance(error, TemporaryError):
            return True
        is_first_refusal = isinstance(error, RefusedCredentialsError) and not self._was_refused
        if is_first_refusal and self._last_full is not None and self._connection is not None:
            self._was_refused = True
            self._connection.forget_token()
            return True
        return False

    def _report(self, pass_: Pass) -> None:
        """Print a pass and write its metrics; for a partial one only if it changed something."""
        status = report.exit_status(pass_)
        is_news = report.is_news(pass_)
        if is_news or not (pass_.partial or self._common.quiet):
            everything = self._common.verbose or self._options.query_all
            print_report(pass_, status, self._common, everything)
        if is_news or not pass_.partial:
            status = self._write_metrics(pass_, status)
        self.status = most_severe(self.status, status)

    def _write_metrics(self, pass_: Pass, status: int) -> int:
        counts = report.counts(pass_)
        if not pass_.partial:
            self._last_full = pass_
            self._counts = Counter()
        self._counts.update({outcome.value: count for outcome, count in counts.items()})
        if self._last_full is None:
            return status
        removed = [
            result for result in pass_.results if result.verdict.reason is Reason.LINK_WAS_REMOVED
        ]
        metrics = [
            *list_link_metrics(self._last_full, self._counts),
            removed_links_metric(len(removed)),
        ]
        return self._metrics.write(status, pass_.duration, metrics)


def _list_unfinished(pass_: Pass) -> set[str]:
    """Return the ids of images that may be finished soon.

    A file that Glance does not know may belong to an image that its database has not yet.
    """
    return {
        result.id
        for result in pass_.results
        if result.id is not None
        and (
            result.verdict.outcome is Outcome.WAITING
            or result.verdict.reason is Reason.UNKNOWN_TO_GLANCE
        )
    }
