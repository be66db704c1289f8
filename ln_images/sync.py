"""One pass of ``ln-images``: scan, query, decide, link, report.

:func:`link_image` tells the story of one image. :class:`Sync` makes passes over all images, or over
some. It scans the disk before it queries Glance, so that the scan is never newer than Glance's
answer, and it touches nothing before Glance's answer is complete.
"""

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ln_images import __version__, inspection, interrupts, report, rules
from ln_images.console import Progress
from ln_images.glance import Glance
from ln_images.logs import judge_bug, log_problems
from ln_images.memory import (
    LogOnChange,
    NewRepairs,
    RemovedLinks,
    RepeatedRepairs,
    StandingProblems,
    VerdictCache,
)
from ln_images.model import (
    Action,
    AnswerTooLargeError,
    Command,
    Decision,
    File,
    Image,
    LinkPolicy,
    LnImagesError,
    Outcome,
    Pass,
    Reason,
    Result,
    Verdict,
    cache_name,
)
from ln_images.same_cloud import Answer, require_same_cloud
from ln_images.scan import Scan, reclaimable, scan
from ln_images.store import AttributesNotKeptError, NotRegularError, Store
from ln_images.system_errors import judge_system_error

LOG = logging.getLogger(__name__)

# For more ids than this, listing every image costs less than querying them in groups.
_MOST_IDS = 500


def link_image(image: Image, store: Store, policy: LinkPolicy, dry_run: bool) -> Verdict:
    """Link or repair one image if the rules say so, and return what became of it.

    In a dry run, return what would become of it. Whatever goes wrong with this image alone is its
    verdict. Raises LinksImpossibleError if no image at all can be linked, and TemporaryError if the
    file system does not respond any more.
    """
    verdict = rules.judge_image(image, policy)
    if verdict is not None and verdict.reason is not Reason.SIGNED:
        # No file can change this verdict. An id of another form gets one here as well, so it never
        # becomes a file name. A signed image goes on, because it may have been linked before it was
        # signed, and only the directories show that.
        return verdict
    try:
        decision = _decide(image, store, policy)
        if decision.action is None:
            return decision.verdict
        with store.open_image(image.id) as descriptor:
            return _link_open_file(image, store, policy, descriptor, dry_run)
    except OSError as error:
        return _judge_failure(error, image, store, policy)
    except AttributesNotKeptError as error:
        return Verdict(Outcome.FAILED, Reason.ATTRIBUTES_NOT_KEPT, str(error))


def _link_open_file(
    image: Image, store: Store, policy: LinkPolicy, descriptor: int, dry_run: bool
) -> Verdict:
    """Decide again, inspect the content, and carry out the decision."""
    # The name may belong to another file by now. What counts is the file that was opened.
    decision = _decide(image, store, policy, descriptor)
    if decision.action is None:
        return decision.verdict
    if decision.action is Action.LINK:
        store.refuse_project_quota(descriptor)
        refusal = _inspect(image, store, descriptor, dry_run)
        if refusal is not None:
            return refusal
    if dry_run:
        return decision.verdict
    with interrupts.held_back():
        verdict = _carry_out(decision, image, store, policy, descriptor)
        if verdict.outcome is Outcome.LINKED:
            LOG.info("%s", report.line(Result.of_image(image, verdict)))
    return verdict


def _decide(
    image: Image, store: Store, policy: LinkPolicy, descriptor: int | None = None
) -> Decision:
    return rules.decide(image, store.facts(image.id, descriptor), policy, time.time())


def _inspect(image: Image, store: Store, descriptor: int, dry_run: bool) -> Verdict | None:
    """Return why the content must not be linked, or None.

    A refusal is left on the inode as a mark, so that the next process need not inspect the same
    file again.
    """
    status = os.fstat(descriptor)
    key = f"{__version__} {image.disk_format} {status.st_size} {status.st_mtime_ns}"
    refusal = store.read_refusal(descriptor, key)
    if refusal is not None:
        return refusal
    objection = inspection.inspect(descriptor, image.disk_format or "")
    if objection is None:
        return None
    verdict = Verdict(Outcome.REFUSED, objection.reason, objection.sentence)
    if not dry_run:
        store.remember_refusal(descriptor, key, verdict)
    return verdict


def _carry_out(
    decision: Decision, image: Image, store: Store, policy: LinkPolicy, descriptor: int
) -> Verdict:
    """Do what was decided about the open file, and return the verdict that is true afterwards."""
    if decision.action is Action.REPAIR:
        store.set_attributes(descriptor, image.id, policy)
        return decision.verdict
    try:
        store.link(descriptor, image.id, policy)
    except FileExistsError:
        # Another process made the name first: nothing was replaced.
        return _decide(image, store, policy, descriptor).verdict
    return decision.verdict


def _judge_failure(error: OSError, image: Image, store: Store, policy: LinkPolicy) -> Verdict:
    """Return the verdict on an image for which a system call failed.

    If Glance has deleted the file since the first decision, or if something else has its name by
    now, the rules have a verdict for that.
    """
    if isinstance(error, (FileNotFoundError, NotRegularError)):
        with contextlib.suppress(OSError):
            decision = _decide(image, store, policy)
            if decision.action is None:
                return decision.verdict
    return judge_system_error(error, store)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """What the passes of one process have in common.

    With ``query_all`` Glance is queried about every image, even if the scan shows that its link is
    correct. With ``list_in_flight`` the images are reported that have no file here because they are
    not finished. ``lock_wait`` is in seconds. ``repeats`` says that the process makes many passes.
    """

    images_dir: str
    cache_dir: str
    policy: LinkPolicy
    dry_run: bool = False
    query_all: bool = False
    list_in_flight: bool = True
    repeats: bool = False
    lock_wait: float = 0


class _Timer:
    """When a pass started, how long it takes, and for how long it holds the lock, in seconds."""

    def __init__(self) -> None:
        self.started_at = datetime.now(UTC)
        self.lock_seconds = 0.0
        self._start = time.monotonic()

    def duration(self) -> float:
        """Return for how long the pass has been running."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def measuring_lock(self) -> Iterator[None]:
        """Measure for how long the lock is held."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.lock_seconds = time.monotonic() - start


class _PassLog:
    """What a process logs about its passes: each problem once, for as long as it stands."""

    def __init__(self, options: SyncOptions) -> None:
        self._options = options
        self._problems = StandingProblems()
        self._new_repairs = NewRepairs()
        self._repeated_repairs = RepeatedRepairs()
        self._removed_links = RemovedLinks()
        self._owner = LogOnChange(LOG, logging.DEBUG)
        self._foreign_names = LogOnChange(LOG, logging.WARNING)
        self.store_warning = LogOnChange(LOG, logging.WARNING)
        self.answer_warning = LogOnChange(LOG, logging.WARNING)

    def log_results(self, results: Collection[Result], partial: bool) -> None:
        """Log what was repaired, and what somebody should look at."""
        log_problems(self._problems.list_new(results, partial))
        if not self._options.dry_run:
            _log_repairs(self._new_repairs.list_new(results))
        repaired_again = self._repeated_repairs.find_first(results)
        if repaired_again is not None:
            LOG.warning(
                "%s is repaired again: libvirt gives it to QEMU's user and group, which --owner"
                " does not name; correct --owner",
                repaired_again,
            )
        removed = self._removed_links.count_if_new(results)
        if removed:
            LOG.warning(
                "links were missing and are made again (%d): something removes them, or the store"
                " was restored without the cache; set remove_unused_base_images = False on every"
                " compute node",
                removed,
            )

    def log_cache(self, pass_: Pass, on_disk: Scan) -> None:
        """Log what is to be known of the cache directory itself."""
        cache_dir, owner = self._options.cache_dir, pass_.directory_owner
        if owner is not None:
            self._owner.log(
                f"{cache_dir} belongs to {owner.uid}:{owner.gid}, which should be Nova's user"
            )
        foreign_names = None
        if on_disk.has_more_bases:
            foreign_names = (
                f"{cache_dir} has so many names that belong to no image in the store that only"
                f" {len(on_disk.bases)} of its bases are counted; find out what creates them"
            )
        self._foreign_names.log(foreign_names)


class Sync:
    """Passes with the same options and one token, made one after another.

    Each pass opens the directories anew, so that a long run notices when one of them was replaced
    or something was mounted over it.
    """

    def __init__(self, options: SyncOptions, glance: Glance, progress: Progress) -> None:
        self._options = options
        self._glance = glance
        self._progress = progress
        self._verdicts = VerdictCache()
        self._log = _PassLog(options)
        self._reclaimable = reclaimable([])

    def full_pass(self) -> Pass:
        """Run one pass over all images.

        Raises LnImagesError if the pass is not possible. Then nothing on disk was touched, unless
        the file system stopped to respond, or refused the first link, in the middle of the pass.
        """
        options, timer = self._options, _Timer()
        with self._locked_store(timer) as store:
            on_disk = scan(store, None if options.query_all else options.policy)
            files = self._read_files(store, on_disk.to_check)
            recalled = self._verdicts.recall(files)
            answer = self._query(on_disk, recalled)
            warning = require_same_cloud(store, on_disk, recalled, answer, self._glance)
            present = _list_present(on_disk, answer)
            results = self._link_images(store, answer.images, present)
            results += _list_recalled(answer, recalled)
            results += _list_unknown(store, on_disk, answer, recalled)
            results += _list_broken(on_disk)
            owner = store.directory_owner()
        if options.repeats:
            self._verdicts.remember(files, results)
        self._reclaimable = reclaimable(on_disk.bases)
        pass_ = Pass(
            command=Command.LINK,
            started_at=timer.started_at,
            duration=timer.duration(),
            dry_run=options.dry_run,
            results=results,
            present=present,
            reclaimable=self._reclaimable,
            directory_owner=owner,
            lock_seconds=timer.lock_seconds,
        )
        self._log.store_warning.log(warning)
        self._log.log_results(results, partial=False)
        self._log.log_cache(pass_, on_disk)
        return pass_

    def partial_pass(self, ids: Collection[str]) -> Pass:
        """Run a pass over a few images, without a scan of the rest. Raises as :meth:`full_pass`.

        Its disk usage is that of the last full pass. It does not check that this is the right
        cloud: it links only what Glance shows under the id of a file here, which proves that.
        """
        timer = _Timer()
        with self._locked_store(timer) as store:
            images = self._glance.list_ids(sorted(ids))
            results = self._link_images(store, images, present=())
        self._log.log_results(results, partial=True)
        return Pass(
            command=Command.LINK,
            started_at=timer.started_at,
            duration=timer.duration(),
            dry_run=self._options.dry_run,
            results=results,
            reclaimable=self._reclaimable,
            partial=True,
            lock_seconds=timer.lock_seconds,
        )

    @contextlib.contextmanager
    def _locked_store(self, timer: _Timer) -> Iterator[Store]:
        """Open the directories and hold the lock.

        A dry run changes nothing, so it neither waits for another run nor makes one wait.
        """
        options = self._options
        with Store(options.images_dir, options.cache_dir) as store:
            lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if not options.dry_run:
                lock = store.locked(options.lock_wait)
            with lock, timer.measuring_lock():
                yield store

    def _read_files(self, store: Store, ids: Iterable[str]) -> dict[str, File]:
        """Return the files of images, for the verdicts that are remembered between passes.

        They are read before they are judged, so that a change in between is noticed.
        """
        if not self._options.repeats:
            return {}
        files: dict[str, File] = {}
        for image_id in ids:
            with contextlib.suppress(OSError):
                file = store.image_file(image_id)
                if file is not None:
                    files[image_id] = file
        return files

    def _query(self, on_disk: Scan, recalled: Collection[str]) -> Answer:
        """Query Glance about every image, or only about those that the scan leaves open."""
        ids = [image_id for image_id in on_disk.to_check if image_id not in recalled]
        warning = None
        if self._options.query_all or len(ids) > _MOST_IDS:
            try:
                images = self._glance.list_all()
            except AnswerTooLargeError as error:
                warning = f"{error}; this pass queries only images with a file here"
            else:
                self._log.answer_warning.log(None)
                return Answer(images, is_complete=True)
        self._log.answer_warning.log(warning)
        images = self._glance.list_ids(ids)
        if self._options.list_in_flight:
            images |= self._glance.list_in_flight()
        return Answer(images, is_complete=False)

    def _link_images(
        self, store: Store, images: Mapping[str, Image], present: Collection[str]
    ) -> list[Result]:
        """Link what needs a link among ``images``, and return what became of each."""
        options = self._options
        results: list[Result] = []
        done = frozenset(present)
        to_check = [image for image_id, image in images.items() if image_id not in done]
        with self._progress("Linking", len(to_check)) as bar:
            for image in to_check:
                try:
                    verdict = link_image(image, store, options.policy, options.dry_run)
                except LnImagesError:
                    raise
                except Exception as error:
                    verdict = judge_bug(error)
                results.append(Result.of_image(image, verdict))
                bar.update(1)
        return results


def _list_present(on_disk: Scan, answer: Answer) -> Sequence[str]:
    """Return the images whose links are correct, without those that Glance has forgotten."""
    if not answer.is_complete:
        return on_disk.present
    return [image_id for image_id in on_disk.present if image_id in answer.images]


def _list_recalled(answer: Answer, recalled: Mapping[str, Result]) -> Sequence[Result]:
    """Return the results of an earlier pass that Glance's answer does not replace.

    A complete answer replaces all of them.
    """
    if answer.is_complete:
        return []
    return [result for image_id, result in recalled.items() if image_id not in answer.images]


def _list_unknown(
    store: Store, on_disk: Scan, answer: Answer, recalled: Collection[str]
) -> Sequence[Result]:
    """Return the results for the files in the store that Glance does not know.

    A complete answer covers the files that were not queried about as well: those whose link is
    correct, and those that were recalled.
    """
    if answer.is_complete:
        covered = on_disk.ids_in_store
    else:
        covered = set(on_disk.to_check).difference(recalled)
    results = [
        _judge_unknown(image_id, store) for image_id in sorted(covered - answer.images.keys())
    ]
    return [result for result in results if result is not None]


def _list_broken(on_disk: Scan) -> Sequence[Result]:
    """Return the results for the entries of the cache that the scan could not read."""
    return [Result(cache_name=name, verdict=verdict) for name, verdict in on_disk.broken.items()]


def _judge_unknown(image_id: str, store: Store) -> Result | None:
    """Return the result for a file in the store that Glance does not know; None if it is gone."""
    try:
        file = store.image_file(image_id)
    except OSError as error:
        verdict = judge_system_error(error, store)
        return Result(cache_name=cache_name(image_id), verdict=verdict, id=image_id)
    if file is None:
        return None
    verdict = Verdict(
        Outcome.SKIPPED,
        Reason.UNKNOWN_TO_GLANCE,
        "Glance does not show this image to the credential",
    )
    return Result(cache_name=cache_name(image_id), verdict=verdict, id=image_id, size=file.size)


def _log_repairs(repaired: Sequence[Result]) -> None:
    """Log all repairs of a pass on one line.

    A compute node that changes the mode of its bases in a loop must not fill the log.
    """
    if len(repaired) == 1:
        LOG.info("%s", report.line(repaired[0]))
    elif repaired:
        LOG.info("%s, and %d more links", report.line(repaired[0]), len(repaired) - 1)
