"""One pass: look, ask, settle image by image, and clean up."""

import contextlib
import logging
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import chain

from ln_images import plan, report
from ln_images.audit import Progress, audit
from ln_images.disk import Disk, failure
from ln_images.glance import Glance
from ln_images.keystone import Connection
from ln_images.model import (
    CHANGES,
    FAULTS,
    ConfigurationError,
    File,
    Image,
    LnImagesError,
    Look,
    Outcome,
    Pass,
    Result,
    Verdict,
)
from ln_images.options import Options
from ln_images.prune import clean_up

LOG = logging.getLogger(__name__)
# Past this many ids, asking for them in groups costs more than listing every image.
LISTING_PAYS = 500
# For how many seconds a process remembers that a file that has not changed gets no link.
_RECALL = 600.0
# For how many seconds one that has read for hours waits for another run.
_AFTER_AUDIT = 600.0
# What is logged though nothing was changed: it wants somebody to look.
_ODD = frozenset({Outcome.REFUSED, Outcome.OCCUPIED})


class Passes:
    """Passes with the same options and one token, made one after another, and what is remembered between them.

    Each opens the directories anew: a long run notices when one has been replaced or mounted over.
    ``progress`` is entered with a label and the total.
    """

    def __init__(self, options: Options, connection: Connection, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._glance = Glance(connection)
        self._files: dict[str, File] = {}
        self._judged: dict[str, tuple[File, Result]] = {}
        self._forgets_at = 0.0
        self._told: dict[str, Verdict] = {}
        self._repaired: set[str] = set()
        self._again = ""
        self._directory: tuple[object, ...] = ()
        self._held: Mapping[str, tuple[int, int]] = {}

    def whole(self) -> Pass:
        """Makes one pass.

        Raises where it could not be made: nothing on disk is touched before the list is whole.

        It looks before it asks, so that what is known of the disk is never newer than Glance's word
        for it.
        """
        options = self._options
        started_at, start = datetime.now(UTC), time.monotonic()
        fault = None
        cleaned = {}
        with Disk(options.images_dir, options.cache_dir) as disk:
            read, audited = (
                audit(options, self._glance, disk, self._progress) if options.verify else (None, {})
            )
            look, images, results = self._link(disk, audited)
            if options.prune:
                now = started_at.timestamp()
                try:
                    for base, verdict in clean_up(
                        options, self._glance, disk, look.bases, images, now
                    ):
                        cleaned[base] = verdict
                        results.append(
                            Result(Image(base.image_id, size=base.file.size), base.name, verdict)
                        )
                        self._tell_of_change(results[-1])
                except LnImagesError as error:
                    fault = error
            self._remember(results)
            room, directory = disk.room(), disk.directory()
            self._tell_of_directory(directory, look.downloads)
        self._held = plan.held(look.bases, {} if options.dry_run else cleaned)
        self._told = self._tell(results)
        took, held = time.monotonic() - start, self._held
        return Pass(
            started_at,
            took,
            options.dry_run,
            results,
            look.settled,
            held,
            room,
            directory,
            fault,
            read,
        )

    def narrow(self, ids: Collection[str]) -> Pass:
        """Makes a pass for a few images alone, without a look at the rest.

        Raises as :meth:`whole` does.

        What bases hold is what the last whole one found.
        """
        options = self._options
        started_at, start = datetime.now(UTC), time.monotonic()
        with Disk(options.images_dir, options.cache_dir) as disk, self._locked(disk):
            results = self._settle(disk, self._glance.images_of(sorted(ids)).values(), {})
        self._told |= self._tell(results)
        return Pass(
            started_at,
            time.monotonic() - start,
            options.dry_run,
            results,
            narrow=True,
            held=self._held,
        )

    def _link(
        self, disk: Disk, audited: Mapping[str, Verdict]
    ) -> tuple[Look, dict[str, Image], list[Result]]:
        """What a pass does under the lock.

        The look, what Glance has, and what became of what is not settled.
        """
        with self._locked(disk):
            look = plan.look(disk.sources(), disk.entries(), self._options)
            recalled = self._recalled(disk, look.unsettled)
            images = self._ask(disk, look, recalled)
            settled = frozenset(look.settled)
            results = self._settle(
                disk, [image for image in images.values() if image.id not in settled], audited
            )
            results += [result for image_id, result in recalled.items() if image_id not in images]
            results += self._unknown(
                disk, [one for one in look.unsettled if one not in images and one not in recalled]
            )
            # The entries that could not be looked at, and of which no image has told.
            told = {result.cache_name for result in results}
            results += [
                Result(Image(""), name, verdict)
                for name, verdict in look.broken.items()
                if name not in told
            ]
        return look, images, results

    def _locked(self, disk: Disk) -> AbstractContextManager[None]:
        # A dry run changes nothing, so it neither waits for a run at work nor makes the next one
        # fail.
        if self._options.dry_run:
            return contextlib.nullcontext()
        return disk.locked(self._options.every or (_AFTER_AUDIT if self._options.verify else 0))

    def _ask(self, disk: Disk, look: Look, recalled: Mapping[str, Result]) -> dict[str, Image]:
        """The images that this pass is about, by id.

        Raises ConfigurationError where store and cloud do not belong together.
        """
        options = self._options
        ids = [image_id for image_id in look.unsettled if image_id not in recalled]
        everything = options.full or options.prune or options.verify or len(ids) > LISTING_PAYS
        images = self._glance.images(None if everything else ids)
        here = [*look.settled, *look.unsettled]
        if not here:
            listed = any(image.status == "active" and image.size for image in images.values())
            active = listed if everything else self._glance.has_active()
            # One may have been finished meanwhile.
            if active and not any(map(plan.is_image_id, chain(*disk.sources().values()))):
                raise ConfigurationError(
                    f"Glance has active images and none of them has a file in {options.images_dir}: is its volume"
                    " mounted, or is --images-dir another?"
                )
        if options.prune and here and images.keys().isdisjoint(here):
            raise ConfigurationError(
                "Glance knows none of the images whose files are here: the credential is another cloud's, or another"
                " region's; nothing was touched"
            )
        return images

    def _settle(
        self, disk: Disk, images: Collection[Image], audited: Mapping[str, Verdict]
    ) -> list[Result]:
        options = self._options
        results: list[Result] = []
        with self._progress("Linking", len(images)) as bar:
            for image in images:
                with uninterrupted():
                    verdict = (
                        plan.judge_image(image, options)
                        or audited.get(image.id)
                        or disk.settle(image, options)
                    )
                    results.append(Result(image, plan.cache_name(image.id), verdict))
                    self._tell_of_change(results[-1])
                bar.update(1)
        return results

    def _unknown(self, disk: Disk, ids: Iterable[str]) -> Iterator[Result]:
        for image_id in ids:
            verdict = plan.UNKNOWN
            try:
                source = disk.source(image_id)
            except OSError as error:
                source, verdict = None, failure(error)
            if source is not None or verdict.outcome is Outcome.FAILED:
                image = Image(image_id, size=source and source.size)
                yield Result(image, plan.cache_name(image_id), verdict)

    def _recalled(self, disk: Disk, unsettled: Iterable[str]) -> dict[str, Result]:
        """What is known from an earlier pass of files that get no link, as long as they have not changed."""
        if self._options.every is None:
            return {}
        if time.monotonic() >= self._forgets_at:
            self._judged, self._forgets_at = {}, time.monotonic() + _RECALL
        # Looked at before they are judged: of what changes meanwhile, nothing is known.
        self._files = {image_id: file for image_id in unsettled if (file := _file(disk, image_id))}
        return {
            image_id: one
            for image_id, (file, one) in self._judged.items()
            if self._files.get(image_id) == file
        }

    def _remember(self, results: Iterable[Result]) -> None:
        """Keeps for a while what only another file could change.

        Not what may become active, or is in the way.
        """
        self._judged = {
            result.image.id: (self._files[result.image.id], result)
            for result in results
            if result.verdict.outcome in (Outcome.SKIPPED, Outcome.REFUSED)
            and result.image.status in ("active", "")
            and result.image.id in self._files
        }

    def _tell_of_change(self, result: Result) -> None:
        if result.verdict.outcome in CHANGES and not self._options.dry_run:
            LOG.info("%s", report.line(result))

    def _tell(self, results: Iterable[Result]) -> dict[str, Verdict]:
        """Logs what wants somebody to look, once for as long as it stands.

        The report has it in each pass.

        Returns, by cache name, all that was told and stands.
        """
        repaired = {
            result.cache_name for result in results if result.verdict.outcome is Outcome.REPAIRED
        }
        if not self._again and (again := min(repaired & self._repaired, default="")):
            self._again = again
            LOG.warning(
                "%s is repaired again: libvirt changes it where --owner is not QEMU's user and group",
                again,
            )
        self._repaired |= repaired
        standing = [result for result in results if result.verdict.outcome in FAULTS | _ODD]
        for result in standing:
            if result.verdict != self._told.get(result.cache_name):
                is_fault = result.verdict.outcome in FAULTS
                level = logging.ERROR if is_fault else logging.WARNING
                LOG.log(
                    level,
                    "%s",
                    report.line(result),
                    extra=None if is_fault else {"file_only": True},
                )
        return {result.cache_name: result.verdict for result in standing}

    def _tell_of_directory(self, owner: tuple[int, int], downloads: Mapping[str, File]) -> None:
        leftovers = [
            file.size for file in downloads.values() if not plan.is_downloading(file, time.time())
        ]
        text = "%s belongs to %d:%d, Nova must be able to write there; leftovers of downloads: %d, %d bytes"
        told = (self._options.cache_dir, *owner, len(leftovers), sum(leftovers))
        if told != self._directory:
            LOG.debug(text, *told)
        self._directory = told


def _file(disk: Disk, image_id: str) -> File | None:
    """What has an image's name in the store, where that can be told."""
    with contextlib.suppress(OSError):
        return disk.source(image_id)
    return None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals that end a run back, so that it stops between images."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
