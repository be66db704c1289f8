"""The passes of one process of ``ln-images``: their reports, their metrics, and the exit status."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection

from ln_images import loop, report
from ln_images.console import MetricsWriter, most_severe, print_report, progress
from ln_images.errors import RefusedCredentialsError
from ln_images.glance import Glance
from ln_images.memory import LogOnChange
from ln_images.metrics import list_link_metrics, removed_links_metric
from ln_images.model import (
    FAULTS,
    AnotherRunError,
    Command,
    LnImagesError,
    Outcome,
    Pass,
    Reason,
    TemporaryError,
)
from ln_images.options import CommonOptions
from ln_images.session import Connection, connect
from ln_images.sync import Sync, SyncOptions

LOG = logging.getLogger(__name__)


def run(
    common: CommonOptions,
    options: SyncOptions,
    *,
    every: float | None,
    for_seconds: float | None,
    status: int,
) -> int:
    """Run one pass, or with ``every`` one after another, and return the exit status.

    The exit status is never less severe than ``status``.
    """
    output = Output(common, options, status)
    try:
        connection = connect(os.environ, common.timeout, common.os_cloud)
        sync = Sync(options, Glance(connection, common.admin_role), progress)
        if every is None:
            output.show(sync.full_pass())
            return output.status
        # A service gets SIGHUP when its log was rotated or its settings were changed, and goes on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        passes = RepeatedPasses(sync, connection, output)
        loop.repeat(passes, common.images_dir, every, for_seconds)
        passes.raise_if_always_locked_out()
    except AnotherRunError as error:
        # The metrics are those of the run that holds the lock.
        error.show()
        return most_severe(output.status, error.exit_code)
    except LnImagesError as error:
        error.show()
        output.show_failure(error.exit_code)
    except Exception:
        # A bug: logs.py logs it.
        output.show_failure(1)
        raise
    return output.status


class Output:
    """Prints the report of each pass and writes its metrics.

    ``status`` is the most severe exit status so far.
    """

    def __init__(self, common: CommonOptions, options: SyncOptions, status: int) -> None:
        self.status = status
        self._common = common
        self._everything = common.verbose or options.query_all
        self._metrics = MetricsWriter(common, Command.LINK, options.dry_run)
        # The last full pass, and the outcome of each image then, or in a partial pass since.
        self._last_full: Pass | None = None
        self._outcomes: dict[str, Outcome] = {}

    def show(self, pass_: Pass) -> None:
        """Print a pass and write its metrics; a partial one only if it changed something."""
        is_news = report.is_news(pass_)
        if pass_.partial and not is_news:
            return
        status = report.exit_status(pass_)
        if is_news or not self._common.quiet:
            print_report(pass_, status, self._common, self._everything)
        self.status = most_severe(self.status, status, self._write_metrics(pass_, status))

    def show_failure(self, status: int) -> None:
        """Write the metrics of a pass that was not possible, whose exit status is ``status``."""
        status = self._metrics.write(status, None, [removed_links_metric(0)])
        self.status = most_severe(self.status, status)

    def _write_metrics(self, pass_: Pass, status: int) -> int:
        """Write the metrics of the last full pass, with what partial passes have changed since.

        Return the most severe of ``status`` and our own.
        """
        outcomes = {
            result.id or result.cache_name: result.verdict.outcome for result in pass_.results
        }
        if pass_.partial:
            self._outcomes |= outcomes
        else:
            self._last_full = pass_
            self._outcomes = dict.fromkeys(pass_.present, Outcome.PRESENT) | outcomes
        if self._last_full is None:
            return status
        if not FAULTS.isdisjoint(self._outcomes.values()):
            # What failed in the last full pass is still wrong after a partial one.
            status = most_severe(status, 1)
        counts = Counter(outcome.value for outcome in self._outcomes.values())
        removed = [
            result for result in pass_.results if result.verdict.reason is Reason.LINK_WAS_REMOVED
        ]
        metrics = [
            *list_link_metrics(self._last_full, counts),
            removed_links_metric(len(removed)),
        ]
        return self._metrics.write(status, self._last_full.duration, metrics)


class RepeatedPasses:
    """The passes of a process that repeats them, and goes on after errors that are temporary."""

    def __init__(self, sync: Sync, connection: Connection, output: Output) -> None:
        self._sync = sync
        self._connection = connection
        self._output = output
        self._error_log = LogOnChange(LOG, logging.ERROR)
        # Another run held the lock, and no pass was possible before or after that.
        self._lock_error: AnotherRunError | None = None
        self._was_ever_possible = False
        # The services have accepted the token at least once since they refused it.
        self._is_token_accepted = False

    def run_full(self) -> loop.Attempt:
        """Run a full pass. Raise LnImagesError if no later pass is possible either."""
        return self._attempt(self._sync.full_pass)

    def run_partial(self, image_ids: Collection[str]) -> loop.Attempt:
        """Run a pass over some images. Raise LnImagesError as :meth:`run_full` does."""
        return self._attempt(lambda: self._sync.partial_pass(image_ids), image_ids)

    def raise_if_always_locked_out(self) -> None:
        """Raise AnotherRunError if another run held the lock and no pass was possible."""
        if self._lock_error is not None and not self._was_ever_possible:
            raise self._lock_error

    def _attempt(self, run: Callable[[], Pass], image_ids: Collection[str] = ()) -> loop.Attempt:
        try:
            pass_ = run()
        except AnotherRunError as error:
            self._lock_error = error
            return loop.Attempt(was_possible=False)
        except TemporaryError as error:
            return self._put_off(error)
        except RefusedCredentialsError as error:
            # A token can be revoked while it is in use, and a service can be wrong once. If a new
            # token is refused as well, more tries could lock the account.
            if not self._is_token_accepted:
                raise
            self._is_token_accepted = False
            self._connection.forget_token()
            return self._put_off(error)
        self._was_ever_possible = True
        self._is_token_accepted = True
        self._error_log.log(None)
        self._output.show(pass_)
        return loop.Attempt(was_possible=True, unfinished=_list_unfinished(pass_, image_ids))

    def _put_off(self, error: LnImagesError) -> loop.Attempt:
        """Log an error once for as long as it stands, and leave the work to a later pass."""
        self._error_log.log(error.message)
        self._output.show_failure(TemporaryError.exit_code)
        return loop.Attempt(was_possible=False)


def _list_unfinished(pass_: Pass, image_ids: Collection[str]) -> set[str]:
    """Return the ids of images that may be finished soon.

    ``image_ids`` are those that a partial pass was about. Glance may not know one of them yet,
    because a replica of its database may lag.
    """
    verdicts = {result.id: result.verdict for result in pass_.results if result.id is not None}
    unfinished = {
        image_id
        for image_id, verdict in verdicts.items()
        if verdict.outcome is Outcome.WAITING or verdict.reason is Reason.UNKNOWN_TO_GLANCE
    }
    return unfinished | (set(image_ids) - verdicts.keys())
