"""One pass of ``ln-images``: scan, query, decide, link, report.

:func:`link_image` tells the story of one image. :class:`Sync` makes passes over all images, or over
some. It scans the disk before it queries Glance, so that the scan is never newer than Glance's
answer, and it touches nothing before Glance's answer is complete.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ln_images import __version__, inspection, interrupts, report, rules
from ln_images.glance import Glance
from ln_images.memory import (
    LogOnChange,
    RemovedLinks,
    RepeatedRepairs,
    StandingProblems,
    VerdictCache,
)
from ln_images.model import (
    FAULTS,
    Action,
    AnswerTooLargeError,
    Command,
    ConfigurationError,
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
    is_image_id,
)
from ln_images.scan import MOST_BASES, Scan, reclaimable, scan
from ln_images.store import AttributesNotKeptError, Facts, NotRegularError, Store

LOG = logging.getLogger(__name__)

# For more ids than this, listing every image costs less than querying them in groups.
_MOST_IDS = 500
# So many of the images that are linked already are queried, to prove that this is their cloud.
_SAMPLE = 50

# Makes a progress bar, a context manager, from a label and the total.
Progress = Callable[[str, int], Any]


def link_image(image: Image, store: Store, policy: LinkPolicy, dry_run: bool) -> Verdict:
    """Link or repair one image if the rules say so, and return what became of it.

    In a dry run, return what would become of it. Whatever goes wrong with this image alone is its
    verdict. Raises LinksImpossibleError if no image at all can be linked.
    """
    if not is_image_id(image.id):
        # Such an id must not become a file name.
        return rules.decide(image, Facts(None, None), policy, time.time()).verdict
    try:
        decision = _decide(image, store, policy)
        if decision.action is None:
            return decision.verdict
        with store.open_image(image.id) as descriptor:
            return _link_open_file(image, store, policy, descriptor, dry_run)
    except OSError as error:
        return _explain(error, image, store, policy)
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


def _explain(error: OSError, image: Image, store: Store, policy: LinkPolicy) -> Verdict:
    """Return the verdict on an image for which a system call failed.

    Glance may have deleted the file after the first look, or something else has its name by now:
    then the rules have a verdict for that.
    """
    if isinstance(error, (FileNotFoundError, NotRegularError)):
        with contextlib.suppress(OSError):
            decision = _decide(image, store, policy)
            if decision.action is None:
                return decision.verdict
    return rules.judge_error(error, is_root=os.geteuid() == 0)


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
        reason, sentence = refusal
        return Verdict(Outcome.REFUSED, reason, sentence)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """What the passes of one process have in common.

    With ``query_all`` every image is queried and every link is looked at by itself. With
    ``list_in_flight`` the images are reported that have no file here because they are not finished.
    ``lock_wait`` is in seconds. ``repeats`` says that the process makes many passes.
    """

    images_dir: str
    cache_dir: str
    policy: LinkPolicy
    dry_run: bool = False
    query_all: bool = False
    list_in_flight: bool = True
    repeats: bool = False
    lock_wait: float = 0


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
        self._problems = StandingProblems()
        self._repairs = RepeatedRepairs()
        self._removed_links = RemovedLinks()
        self._owner_log = LogOnChange(LOG, logging.DEBUG)
        self._warnings = LogOnChange(LOG, logging.WARNING)
        self._reclaimable = reclaimable([])

    def full_pass(self) -> Pass:
        """Run one pass over all images.

        Raises LnImagesError if the pass is not possible; then nothing on disk was touched.
        """
        options = self._options
        started_at, start = datetime.now(UTC), time.monotonic()
        with Store(options.images_dir, options.cache_dir) as store, self._lock(store):
            locked_at = time.monotonic()
            found = scan(store, None if options.query_all else options.policy)
            files = self._look_at(store, found.unsettled)
            recalled = self._verdicts.recall(files)
            images, is_complete_list = self._query(store, found, recalled)
            settled = [
                image_id for image_id in found.settled if not is_complete_list or image_id in images
            ]
            results = self._link(store, images.values(), frozenset(settled))
            results += [result for id_, result in recalled.items() if id_ not in images]
            unknown = (found.settled if is_complete_list else ()), found.unsettled
            results += self._list_unknown(store, unknown, images, recalled)
            results += self._list_broken(found, results)
            owner = store.directory_owner()
            lock_seconds = time.monotonic() - locked_at
        if options.repeats:
            self._verdicts.remember(files, results)
        self._reclaimable = reclaimable(found.bases)
        self._log(results, partial=False)
        self._owner_log.log(
            f"{options.cache_dir} belongs to {owner.uid}:{owner.gid}; Nova must be able to write"
            " there"
        )
        self._log_foreign_names(found)
        return Pass(
            command=Command.LINK,
            started_at=started_at,
            duration=time.monotonic() - start,
            dry_run=options.dry_run,
            results=results,
            settled=settled,
            reclaimable=self._reclaimable,
            directory_owner=owner,
            lock_seconds=lock_seconds,
        )

    def partial_pass(self, ids: Collection[str]) -> Pass:
        """Run a pass over a few images, without a scan of the rest. Raises as :meth:`full_pass`.

        Its disk usage is that of the last full pass.
        """
        options = self._options
        started_at, start = datetime.now(UTC), time.monotonic()
        with Store(options.images_dir, options.cache_dir) as store, self._lock(store):
            locked_at = time.monotonic()
            images = self._glance.list_ids(sorted(ids))
            results = self._link(store, images.values(), frozenset())
            lock_seconds = time.monotonic() - locked_at
        self._log(results, partial=True)
        return Pass(
            command=Command.LINK,
            started_at=started_at,
            duration=time.monotonic() - start,
            dry_run=options.dry_run,
            results=results,
            reclaimable=self._reclaimable,
            partial=True,
            lock_seconds=lock_seconds,
        )

    def _lock(self, store: Store) -> contextlib.AbstractContextManager[None]:
        # A dry run changes nothing, so it neither waits for another run nor makes one wait.
        if self._options.dry_run:
            return contextlib.nullcontext()
        return store.locked(self._options.lock_wait)

    def _look_at(self, store: Store, ids: Iterable[str]) -> dict[str, File]:
        """Return the files of images, for the verdicts that are remembered between passes.

        They are looked at before they are judged, so that a change in between is noticed.
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

    def _query(
        self, store: Store, found: Scan, recalled: Mapping[str, Result]
    ) -> tuple[dict[str, Image], bool]:
        """Return the images that this pass is about, by id, and whether those are all that exist.

        Raises ConfigurationError if the store and the cloud do not belong together.
        """
        ids = [image_id for image_id in found.unsettled if image_id not in recalled]
        if self._options.query_all or len(ids) > _MOST_IDS:
            try:
                images = self._glance.list_all()
            except AnswerTooLargeError as error:
                LOG.warning("%s; this pass queries only images with a file here", error)
            else:
                self._refuse_other_cloud(store, found, images, is_complete_list=True)
                return images, True
        images = self._glance.list_ids(ids)
        self._refuse_other_cloud(store, found, images, is_complete_list=False)
        if self._options.list_in_flight:
            images |= self._glance.list_in_flight()
        return images, False

    def _refuse_other_cloud(
        self, store: Store, found: Scan, images: Mapping[str, Image], is_complete_list: bool
    ) -> None:
        """Raise ConfigurationError if nothing shows that store, cache and cloud belong together.

        One image that Glance knows, and that has a file or a marked base here, is enough.
        """
        here = [*found.settled, *found.unsettled]
        marked = [base.image_id for base in found.bases if base.image_id is not None]
        if not here:
            self._refuse_missing_volume(store, images, is_complete_list, has_marks=bool(marked))
            return
        if any(image_id in images for image_id in [*here, *marked]):
            return
        if not is_complete_list:
            if self._glance.list_ids(found.settled[:_SAMPLE]):
                return
            images = self._glance.list_all()
            if any(image_id in images for image_id in [*here, *marked]):
                return
        raise ConfigurationError(
            f"Glance knows none of the {len(here)} images that have a file in"
            f" {self._options.images_dir}; nothing was touched; check OS_AUTH_URL and"
            " OS_REGION_NAME (another cloud's?), the credential's role, and --images-dir"
        )

    def _refuse_missing_volume(
        self, store: Store, images: Mapping[str, Image], is_complete_list: bool, has_marks: bool
    ) -> None:
        """Raise ConfigurationError, or warn, if Glance has active images and none has a file here.

        Marked bases in the cache prove that the volume is mounted, because both directories are on
        one file system.
        """
        if is_complete_list:
            has_active = any(image.status == "active" and image.size for image in images.values())
        else:
            has_active = self._glance.has_active()
        # An upload may have finished meanwhile.
        if not has_active or store.list_store():
            self._warnings.log(None)
            return
        images_dir = self._options.images_dir
        if not has_marks:
            raise ConfigurationError(
                f"Glance has active images and none of them has a file in {images_dir}; mount its"
                " volume, correct --images-dir, or, if all images are in another store, do not run"
                " ln-images here"
            )
        self._warnings.log(
            f"Glance has active images and none of them has a file in {images_dir}: are all images"
            " in another store now? Links that exist stay"
        )

    def _link(
        self, store: Store, images: Collection[Image], settled: Collection[str]
    ) -> list[Result]:
        """Link what needs a link among ``images``, and return what became of each."""
        options = self._options
        results: list[Result] = []
        unsettled = [image for image in images if image.id not in settled]
        with self._progress("Linking", len(unsettled)) as bar:
            for image in unsettled:
                try:
                    verdict = link_image(image, store, options.policy, options.dry_run)
                except LnImagesError:
                    raise
                except Exception as error:
                    verdict = judge_bug(error)
                results.append(Result.of_image(image, verdict))
                bar.update(1)
        return results

    def _list_unknown(
        self,
        store: Store,
        ids: tuple[Iterable[str], Iterable[str]],
        images: Mapping[str, Image],
        recalled: Mapping[str, Result],
    ) -> Iterator[Result]:
        """Yield a result for each file in the store that Glance does not know."""
        for image_id in [*ids[0], *ids[1]]:
            if image_id in images or image_id in recalled:
                continue
            verdict = Verdict(
                Outcome.SKIPPED,
                Reason.UNKNOWN_TO_GLANCE,
                "Glance does not show this image to the credential",
            )
            size = None
            try:
                source = store.image_file(image_id)
                if source is None:
                    continue
                size = source.size
            except OSError as error:
                verdict = rules.judge_error(error, is_root=os.geteuid() == 0)
            yield Result(cache_name=cache_name(image_id), verdict=verdict, id=image_id, size=size)

    def _list_broken(self, found: Scan, results: Collection[Result]) -> list[Result]:
        """Return a result for each broken entry of the cache that no image's result covers."""
        covered = {result.cache_name for result in results}
        return [
            Result(cache_name=name, verdict=verdict)
            for name, verdict in found.broken.items()
            if name not in covered
        ]

    def _log(self, results: Collection[Result], partial: bool) -> None:
        """Log what somebody should look at, once for as long as it stands."""
        for problem in self._problems.list_new(results, partial):
            log_problem(problem)
        if not self._options.dry_run:
            _log_repairs(results)
        repaired_again = self._repairs.find_first(results)
        if repaired_again is not None:
            LOG.warning(
                "%s is repaired again: libvirt gives it to QEMU's user and group, which --owner"
                " does not name; correct --owner",
                repaired_again,
            )
        removed = self._removed_links.count_if_new(results)
        if removed:
            LOG.warning(
                "%d links were missing and are made again: something removes them, or the store was"
                " restored without the cache; set remove_unused_base_images = False on every"
                " compute node",
                removed,
            )

    def _log_foreign_names(self, found: Scan) -> None:
        if found.has_more_bases:
            self._warnings.log(
                f"{self._options.cache_dir} has more than {MOST_BASES} bases that belong to no"
                " image in the store; the others are not counted; find out what creates them"
            )


def _log_repairs(results: Iterable[Result]) -> None:
    """Log all repairs of a pass on one line.

    A compute node that changes the mode of its bases in a loop must not fill the log.
    """
    repaired = [result for result in results if result.verdict.outcome is Outcome.REPAIRED]
    if len(repaired) == 1:
        LOG.info("%s", report.line(repaired[0]))
    elif repaired:
        LOG.info("%s, and %d more links", report.line(repaired[0]), len(repaired) - 1)


def judge_bug(error: Exception) -> Verdict:
    """Log an unexpected exception with its traceback, and return the image's verdict."""
    LOG.info("unexpected exception", exc_info=error)
    return Verdict(
        Outcome.FAILED,
        Reason.BUG,
        f"unexpected {type(error).__name__}; report it with the traceback that -v prints",
    )


def log_problem(result: Result) -> None:
    """Log a problem: a fault everywhere, the rest in the log file alone."""
    if result.verdict.outcome in FAULTS:
        LOG.error("%s", report.line(result))
    else:
        LOG.warning("%s", report.line(result), extra={"file_only": True})
