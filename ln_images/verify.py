"""The command ``ln-images-verify``: read each linked image, and compare it with Glance's checksum.

It takes no lock, so other runs link while it reads, and it changes nothing. Read this module from
top to bottom: the command, one pass, the story of one image, and how a file is read.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from ln_images import logs, report, rules
from ln_images.console import (
    MetricsWriter,
    Progress,
    most_severe,
    prepare_standard_output,
    print_report,
    progress,
)
from ln_images.logs import judge_bug, log_problem
from ln_images.metrics import Metric
from ln_images.model import (
    DISK_FORMATS,
    FAULTS,
    OUTCOMES,
    Checksum,
    Command,
    Decision,
    Image,
    LinkPolicy,
    LnImagesError,
    Outcome,
    Owner,
    Pass,
    Reason,
    Result,
    Verdict,
)
from ln_images.options import CONTEXT_SETTINGS, CommonOptions, common_options, disk_format_option
from ln_images.scan import scan
from ln_images.store import NotRegularError, Store
from ln_images.system_errors import judge_system_error

if TYPE_CHECKING:
    from ln_images.glance import Glance

LOG = logging.getLogger(__name__)

# How much is read at once, in bytes. It is a multiple of every block size.
_BLOCK_BYTES = 4 * 1024 * 1024
# How a file is opened: the first way that its file system allows.
_PAST_THE_PAGE_CACHE = (os.O_DIRECT | os.O_NOATIME, os.O_DIRECT)
_THROUGH_THE_PAGE_CACHE = (os.O_NOATIME, 0)
# The owner and the mode of a link decide whether `ln-images` repairs it. Here they do not matter.
_ANY_OWNER = Owner(0, 0)
_ANY_MODE = 0o644


@click.command(context_settings=CONTEXT_SETTINGS)
@disk_format_option("Disk formats that ln-images links; repeatable.")
@common_options("LN_IMAGES_VERIFY")
@click.pass_context
def main(context: click.Context, *, common: CommonOptions, disk_formats: Sequence[str]) -> None:
    """Read each linked image, and compare it with the checksum that Glance has.

    The command changes nothing. It takes as long as the disks need to read all linked images once.
    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can
    also be given as LN_IMAGES_<OPTION> in the environment; the log file and the metrics file as
    LN_IMAGES_VERIFY_<OPTION>.
    """
    prepare_standard_output()
    status = logs.set_up("ln-images-verify", common.log_file, common.verbose, common.quiet)
    metrics = MetricsWriter(common, Command.VERIFY)
    # What a pass needs is imported only now, so that --help is quick.
    from ln_images.glance import Glance
    from ln_images.session import connect

    options = VerifyOptions(
        images_dir=common.images_dir, cache_dir=common.cache_dir, disk_formats=disk_formats
    )
    try:
        connection = connect(os.environ, common.timeout, common.os_cloud)
        pass_ = Verifier(options, Glance(connection, common.admin_role), progress).run()
    except LnImagesError as error:
        metrics.write(error.exit_code, None, [])
        raise
    if pass_.error is not None:
        pass_.error.show()
    pass_status = report.exit_status(pass_)
    print_report(pass_, pass_status, common, everything=common.verbose)
    pass_status = metrics.write(pass_status, pass_.duration, list_verify_metrics(pass_))
    context.exit(most_severe(status, pass_status))


def list_verify_metrics(pass_: Pass) -> list[Metric]:
    """Return the metrics of a pass of ``ln-images-verify``."""
    counts = report.counts(pass_)
    images = [
        Metric(
            "verify_images",
            "Linked images of the last pass, by outcome.",
            counts[outcome],
            {"outcome": outcome.value},
        )
        for outcome in OUTCOMES[Command.VERIFY]
    ]
    read = Metric("verify_bytes", "Bytes that the last pass read.", pass_.bytes_read or 0, {})
    return [*images, read]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What a pass needs to know. It reads images of these disk formats alone."""

    images_dir: str
    cache_dir: str
    disk_formats: Sequence[str] = DISK_FORMATS


class Verifier:
    """A pass over all linked images."""

    def __init__(self, options: VerifyOptions, glance: "Glance", progress: Progress) -> None:
        self._glance = glance
        self._progress = progress
        self._images_dir = options.images_dir
        self._cache_dir = options.cache_dir
        self._policy = LinkPolicy(
            owner=_ANY_OWNER, mode=_ANY_MODE, disk_formats=options.disk_formats
        )
        self._bytes_read = 0

    def run(self) -> Pass:
        """Run one pass. Raise LnImagesError if it is not possible; then nothing was read.

        If the file system stops responding later, the pass has that error, and the results of the
        images that were read before.
        """
        started_at, start = datetime.now(UTC), time.monotonic()
        with Store(self._images_dir, self._cache_dir) as store:
            ids = sorted(store.list_store())
            images = self._glance.list_ids(ids)
            if not images:
                self._require_same_cloud(store)
            # An id that we did not ask for must not become a file name.
            present = [images[image_id] for image_id in ids if image_id in images]
            linked, results = self._select(store, present)
            if present and not linked and not results:
                LOG.warning(
                    "none of the %d images that have a file in %s is linked, so nothing was read;"
                    " check --cache-dir, and run ln-images first",
                    len(present),
                    self._images_dir,
                )
            error = self._read(store, linked, results)
        return Pass(
            command=Command.VERIFY,
            started_at=started_at,
            duration=time.monotonic() - start,
            dry_run=False,
            results=results,
            error=error,
            bytes_read=self._bytes_read,
        )

    def _require_same_cloud(self, store: Store) -> None:
        """Raise ConfigurationError if store, cache and cloud do not belong together.

        Otherwise a pass that reads nothing would look like a success.
        """
        from ln_images.same_cloud import Answer, require_same_cloud

        on_disk = scan(store, self._policy)
        answer = Answer(images={}, is_complete=False)
        warning = require_same_cloud(store, on_disk, [], answer, self._glance)
        if warning is not None:
            LOG.warning("%s", warning)

    def _select(self, store: Store, images: Iterable[Image]) -> tuple[list[Image], list[Result]]:
        """Return the images to read, and the results of those that need not be read.

        An image without a link has no part in either, unless its file is damaged.
        """
        linked: list[Image] = []
        results: list[Result] = []
        for image in images:
            try:
                decision = _decide(image, store, self._policy)
            except Exception as error:
                results.append(_result(image, _judge_exception(error, store)))
                continue
            if _is_linked(decision) and is_usable(image.checksum):
                linked.append(image)
                continue
            verdict = judge_unread(decision)
            if verdict is not None:
                results.append(_result(image, verdict))
        return linked, results

    def _read(
        self, store: Store, images: Collection[Image], results: list[Result]
    ) -> LnImagesError | None:
        """Read images, and add what became of each to ``results``.

        Return the error that ended this early, or None.
        """
        with self._progress("Verifying", sum(image.size or 0 for image in images)) as bar:

            def count(size: int) -> None:
                self._bytes_read += size
                bar.update(size)

            for image in images:
                try:
                    verdict = self._verify(image, store, count)
                except LnImagesError as error:
                    return error
                results.append(_result(image, verdict))
        return None

    def _verify(self, image: Image, store: Store, count: Callable[[int], object]) -> Verdict:
        try:
            return verify_image(image, store, self._glance, self._policy, count)
        except Exception as error:
            return _judge_exception(error, store)


def verify_image(
    image: Image,
    store: Store,
    glance: "Glance",
    policy: LinkPolicy,
    count: Callable[[int], object],
) -> Verdict:
    """Read one linked image that has a usable checksum, and return what became of it.

    Content is only damaged if it reads the same twice, if it is still the image's file, and if
    Glance still states this checksum. ``count`` is called with each number of bytes that the first
    reading reads. Raises OSError.
    """
    assert image.checksum is not None  # noqa: S101 - the images were selected by that
    algorithm, expected = image.checksum
    try:
        with store.open_image(image.id) as descriptor:
            # Other images may have been read for hours, and the name may belong to another file by
            # now. What counts is the file that was opened.
            if not _is_linked(_decide(image, store, policy, descriptor)):
                return _changed()
            before = os.fstat(descriptor)
            digest = compute_digest(descriptor, algorithm, count)
            if os.fstat(descriptor).st_size != before.st_size:
                return _changed()
            if digest == expected:
                return Verdict(Outcome.VERIFIED, Reason.CHECKSUM_MATCHES)
            second_digest = compute_digest(descriptor, algorithm, lambda _size: None)
            after = os.fstat(descriptor)
            if not _has_name(store, image.id, after):
                return _changed()
    except (FileNotFoundError, NotRegularError):
        return _changed()
    if digest != second_digest:
        return judge_unequal_readings(before, after)
    return _confirm_damage(image, digest, glance)


def judge_unequal_readings(before: os.stat_result, after: os.stat_result) -> Verdict:
    """Return the verdict on a file of which two readings differ.

    The modification time says whether somebody wrote to it. It proves no more than that: Nova sets
    it on the bases of all servers, every 40 minutes by default (nova.virt.libvirt.imagecache).
    """
    if before.st_mtime_ns != after.st_mtime_ns:
        return _changed()
    return Verdict(
        Outcome.FAILED,
        Reason.SYSTEM_ERROR,
        "two readings of the file differ, and nobody wrote to it; check the disks, their"
        " controller and the memory of this machine",
    )


def _confirm_damage(image: Image, digest: str, glance: "Glance") -> Verdict:
    """Return the verdict on a file that has another digest, after one more query to Glance."""
    assert image.checksum is not None  # noqa: S101 - the digest was compared with it
    algorithm, expected = image.checksum
    digests = f"its {algorithm} is {digest[:8]}..., Glance states {expected[:8]}..."
    try:
        current = glance.list_ids([image.id]).get(image.id)
    except LnImagesError as error:
        # The readings of the other images still count.
        return Verdict(
            Outcome.FAILED,
            Reason.SYSTEM_ERROR,
            f"{digests}, and Glance could not confirm that the image is still active:"
            f" {error.message}",
        )
    is_same = current is not None and current.checksum == image.checksum
    if current is None or not is_same or current.status != "active":
        return _changed()
    return Verdict(Outcome.DAMAGED, Reason.CHECKSUM_DIFFERS, f"{digests}; follow docs/recovery.md")


def judge_unread(decision: Decision) -> Verdict | None:
    """Return the verdict on an image that is not read, or None if there is nothing to report.

    ``decision`` is what ``ln-images`` would do. An image that was signed after it was linked is
    skipped, because nobody has verified its signature, and a checksum is no replacement for that.
    """
    verdict = decision.verdict
    if _is_linked(decision):
        return Verdict(
            Outcome.SKIPPED,
            Reason.NO_CHECKSUM,
            "Glance has no checksum that this Python can compute",
        )
    if verdict.outcome is Outcome.DAMAGED:
        return verdict
    if verdict.reason is Reason.SIGNED_AFTER_LINKING:
        return verdict._replace(outcome=Outcome.SKIPPED)
    return None


def _decide(
    image: Image, store: Store, policy: LinkPolicy, descriptor: int | None = None
) -> Decision:
    return rules.decide(image, store.facts(image.id, descriptor), policy, time.time())


def _is_linked(decision: Decision) -> bool:
    """Return whether the image has its link, which may need another owner or mode."""
    return decision.verdict.outcome in (Outcome.PRESENT, Outcome.REPAIRED)


def _has_name(store: Store, image_id: str, status: os.stat_result) -> bool:
    """Return whether an open file still has the image's name in the store."""
    file = store.image_file(image_id)
    return file is not None and (file.device, file.inode) == (status.st_dev, status.st_ino)


def _changed() -> Verdict:
    return Verdict(
        Outcome.SKIPPED,
        Reason.CHANGED_MEANWHILE,
        "the image or its file was changed or deleted during this pass; the next pass reads it",
    )


def _judge_exception(error: Exception, store: Store) -> Verdict:
    """Return the verdict for one file. Raise TemporaryError if the whole file system is dead."""
    if not isinstance(error, OSError):
        return judge_bug(error)
    return judge_system_error(error, store)


def _result(image: Image, verdict: Verdict) -> Result:
    """Return the result for an image, and log what somebody should look at.

    It is logged at once, because a pass takes hours and may be interrupted.
    """
    result = Result.of_image(image, verdict)
    if verdict.outcome in FAULTS or verdict.reason is Reason.SIGNED_AFTER_LINKING:
        log_problem(result)
    return result


def is_usable(checksum: Checksum | None) -> bool:
    """Return whether hashlib has the checksum's algorithm, and the digest has its length."""
    if checksum is None:
        return False
    try:
        size = hashlib.new(checksum.algorithm, usedforsecurity=False).digest_size
    except (TypeError, ValueError):
        return False
    # A digest of the algorithms without a fixed length (shake_128) has the size 0.
    return size > 0 and len(checksum.digest) == 2 * size


def compute_digest(descriptor: int, algorithm: str, count: Callable[[int], object]) -> str:
    """Return the digest, in hex, of all content of an open file, up to the size that it has now.

    ``algorithm`` is one of hashlib's. ``count`` is called with each number of bytes that were read.
    Raises OSError.
    """
    with contextlib.closing(_ContentReader(descriptor, count)) as reader:
        digest = hashlib.file_digest(reader, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return digest.hexdigest()


class _ContentReader:
    """The content of an open file, from its beginning, for ``hashlib.file_digest``.

    It is read past the page cache, so that what serves boots stays there, and without a new access
    time. A file system that refuses either is read plainly.

    A thread reads the next block while the last one is hashed, because with O_DIRECT the kernel
    reads nothing ahead.

    It ends at the size that the file had in the beginning. A compute node can write to a base, and
    one that grows it while it is read would keep us reading for ever.
    """

    def __init__(self, descriptor: int, count: Callable[[int], object]) -> None:
        self._descriptor = descriptor
        self._count = count
        self._file = _reopen(descriptor, (*_PAST_THE_PAGE_CACHE, *_THROUGH_THE_PAGE_CACHE))
        self._offset = 0
        self._size = os.fstat(descriptor).st_size
        # O_DIRECT needs buffers that are aligned: these are whole pages.
        self._buffer, self._other_buffer = (
            memoryview(mmap.mmap(-1, _BLOCK_BYTES)) for _ in range(2)
        )
        self._unhashed = self._buffer[:0]
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._next_block = self._thread.submit(self._read_block)

    def readable(self) -> bool:
        """Return True: ``hashlib.file_digest`` wants to know."""
        return True

    def readinto(self, buffer: bytearray) -> int:
        """Copy the next bytes into ``buffer``. Return their number, which is 0 at the end."""
        if not self._unhashed:
            self._unhashed = self._next_block.result()
            self._count(len(self._unhashed))
            if not self._unhashed:
                return 0
            self._next_block = self._thread.submit(self._read_block)
        size = min(len(buffer), len(self._unhashed))
        buffer[:size] = self._unhashed[:size]
        self._unhashed = self._unhashed[size:]
        return size

    def close(self) -> None:
        """Let the thread finish its block, and close the file."""
        self._thread.shutdown()
        os.close(self._file)

    def _read_block(self) -> memoryview:
        """Return the next block, which is empty at the end of the file."""
        try:
            size = os.preadv(self._file, [self._buffer], self._offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems allow O_DIRECT and then refuse to read, or refuse this offset.
            os.close(self._file)
            self._file = _reopen(self._descriptor, _THROUGH_THE_PAGE_CACHE)
            size = os.preadv(self._file, [self._buffer], self._offset)
        block = self._buffer[: min(size, self._size - self._offset)]
        self._offset += len(block)
        self._buffer, self._other_buffer = self._other_buffer, self._buffer
        return block


def _reopen(descriptor: int, ways: Sequence[int]) -> int:
    """Open an open file once more, with the first flags among ``ways`` that it allows.

    ramfs, for one, has no O_DIRECT. O_NOATIME is for root and the file's owner (open(2)). Raises
    OSError if there is no way.
    """
    path = f"/proc/self/fd/{descriptor}"
    *preferred, last = ways
    for flags in preferred:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | last)
