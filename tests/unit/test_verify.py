"""How ``ln-images-verify`` reads a file, and what it reports without reading one."""

import ctypes
import hashlib
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ln_images.model import Action, Checksum, Decision, Outcome, Reason, Verdict
from ln_images.verify import compute_digest, is_usable, judge_unequal_readings, judge_unread
from support.corpus import KIB, MIB
from support.mounts import mounted
from support.node import needs_root

# Two blocks of reading and a half, which end at an odd offset.
CONTENT = random.Random(14).randbytes(8 * MIB + 513)  # noqa: S311


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sha512(path: Path) -> tuple[str, int]:
    """Return the digest of a file, and how many bytes were counted."""
    sizes: list[int] = []
    with opened(path) as descriptor:
        return compute_digest(descriptor, "sha512", sizes.append), sum(sizes)


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with opened(path) as descriptor:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> set[int]:
    """Return the pages of a file that are in the page cache (mincore(2))."""
    with opened(path) as descriptor, mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        status = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages
        )
        del first
    assert status == 0
    return {number for number, page in enumerate(pages) if page & 1}


@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, 4 * MIB - 1, 4 * MIB, 4 * MIB + 513, 9 * MIB + 1]
)
@pytest.mark.parametrize("cached", [True, False])
def test_the_digest_covers_every_byte(tmp_path: Path, size: int, cached: bool) -> None:
    """A file of any size has hashlib's digest, whether its content is on disk or in memory."""
    content = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    if not cached:
        evict(path)
    assert sha512(path) == (hashlib.sha512(content).hexdigest(), size)


def test_a_file_that_grows_while_it_is_read_has_an_end(tmp_path: Path) -> None:
    """What is added after the beginning is not read: a compute node could add for ever."""
    path = tmp_path / "file"
    content = os.urandom(9 * MIB + 1)
    path.write_bytes(content)
    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size
        if read < 32 * MIB:
            os.truncate(path, len(content) + read)

    with opened(path) as descriptor:
        digest = compute_digest(descriptor, "sha512", count)
    assert (digest, read) == (hashlib.sha512(content).hexdigest(), len(content))


def test_the_page_cache_stays_as_it_was(tmp_path: Path) -> None:
    """Reading a whole file neither adds its pages to the page cache nor removes any."""
    path = tmp_path / "file"
    content = os.urandom(12 * MIB)
    path.write_bytes(content)
    evict(path)
    if cached_pages(path):
        pytest.skip("a file system in memory has nothing else to read from")
    with opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in (0, 100 * KIB, 5 * MIB, 8 * MIB - 4 * KIB, 12 * MIB - 1):
            os.pread(descriptor, 8 * KIB, offset)
    before = cached_pages(path)
    assert 5 <= len(before) < 100
    assert sha512(path) == (hashlib.sha512(content).hexdigest(), len(content))
    assert cached_pages(path) == before


def test_the_access_time_stays_as_it_was(tmp_path: Path) -> None:
    """Reading a file leaves its access time alone, even where plain reading would renew it."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    # An access time before the modification time is renewed under relatime (mount(8)).
    os.utime(path, (1, 2))
    sha512(path)
    assert path.stat().st_atime == 1


@needs_root
def test_a_file_system_without_direct_reads_is_read_plainly(tmp_path: Path) -> None:
    """A file whose file system has no O_DIRECT is read through the page cache."""
    with mounted(tmp_path, "-t", "ramfs", "none"):
        path = tmp_path / "file"
        path.write_bytes(CONTENT)
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(path, os.O_RDONLY | os.O_DIRECT)
        assert sha512(path) == (hashlib.sha512(CONTENT).hexdigest(), len(CONTENT))


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    """After many files were read, no more descriptors are open than before."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sha512(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        sha512(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_is_an_os_error(tmp_path: Path) -> None:
    """An error of the reading thread reaches the caller as the OSError that it is."""
    with opened(tmp_path) as descriptor, pytest.raises(IsADirectoryError):
        compute_digest(descriptor, "sha512", lambda _size: None)


@pytest.mark.parametrize(
    ("algorithm", "digest", "usable"),
    [
        ("sha512", "0" * 128, True),
        ("md5", "0" * 32, True),
        ("blake2b", "0" * 128, True),
        ("sha512", "0" * 64, False),
        ("sha512", "", False),
        ("", "", False),
        ("", "0" * 128, False),
        ("whirlpool-2", "0" * 128, False),
        ("shake_128", "0" * 32, False),
        ("shake_128", "", False),
        ("sha512\0", "0" * 128, False),
        ("\ud800", "0" * 128, False),
    ],
)
def test_a_usable_checksum_has_a_known_algorithm_and_its_length(
    algorithm: str, digest: str, usable: bool
) -> None:
    """A checksum is used only if hashlib has its algorithm and the digest has its length."""
    assert is_usable(Checksum(algorithm, digest)) is usable


def test_no_checksum_is_not_usable() -> None:
    """An image without a checksum has none that is usable."""
    assert not is_usable(None)


@pytest.mark.parametrize(
    ("decision", "reported"),
    [
        (
            Decision(Verdict(Outcome.PRESENT, Reason.CORRECT)),
            (Outcome.SKIPPED, Reason.NO_CHECKSUM),
        ),
        (
            Decision(Verdict(Outcome.REPAIRED, Reason.WRONG_ATTRIBUTES), Action.REPAIR),
            (Outcome.SKIPPED, Reason.NO_CHECKSUM),
        ),
        (
            Decision(Verdict(Outcome.DAMAGED, Reason.FILE_TOO_SHORT, "too short")),
            (Outcome.DAMAGED, Reason.FILE_TOO_SHORT),
        ),
        (
            Decision(Verdict(Outcome.REFUSED, Reason.SIGNED_AFTER_LINKING, "signed")),
            (Outcome.SKIPPED, Reason.SIGNED_AFTER_LINKING),
        ),
        (Decision(Verdict(Outcome.LINKED, Reason.NO_LINK_YET), Action.LINK), None),
        (Decision(Verdict(Outcome.SKIPPED, Reason.SIGNED, "signed")), None),
        (Decision(Verdict(Outcome.REFUSED, Reason.FILE_TOO_LONG, "too long")), None),
        (Decision(Verdict(Outcome.WAITING, Reason.FILE_INCOMPLETE, "incomplete")), None),
        (Decision(Verdict(Outcome.OCCUPIED, Reason.OTHER_FILE, "other")), None),
    ],
)
def test_what_is_not_read_is_reported_if_it_is_linked_or_damaged(
    decision: Decision, reported: tuple[Outcome, Reason] | None
) -> None:
    """An image that is not read is reported only if it has a link, or if its file is damaged."""
    verdict = judge_unread(decision)
    assert (None if verdict is None else verdict[:2]) == reported


def test_readings_that_differ_without_a_writer_are_a_fault(tmp_path: Path) -> None:
    """Two different readings are a fault of the machine unless somebody wrote to the file."""
    path = tmp_path / "file"
    path.touch()
    before = path.stat()
    assert judge_unequal_readings(before, path.stat()).outcome is Outcome.FAILED
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    verdict = judge_unequal_readings(before, path.stat())
    assert verdict[:2] == (Outcome.SKIPPED, Reason.CHANGED_MEANWHILE)
