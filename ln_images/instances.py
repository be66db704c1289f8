"""Instance disks -> the bases they are backed by."""

import contextlib
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator

# O_NOFOLLOW: a symbolic link is an error. O_NONBLOCK: a FIFO does not hold the run up.
_SOURCE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_QCOW2 = b"QFI\xfb"
# The longest name that QEMU allows.
_BACKING_NAME = 1023


def backing_names(directories: Iterable[str]) -> tuple[dict[str, str], str]:
    """What the disks below Nova's instance directories are backed by: ``<directory>/<server>/disk*``.

    Returns the path of a disk by each cache name that its qcow2 header names, and the path of one of which
    that cannot be told, or nothing. Symbolic links are not followed, and cannot be told.
    """
    backed: dict[str, str] = {}
    doubtful: list[str] = []
    for directory in directories:
        errors: list[OSError] = []
        for number, (path, servers, files, descriptor) in enumerate(os.fwalk(directory, onerror=errors.append)):
            if number == 0:
                doubtful += [f"{path}/{name}" for name in servers if _is_link(descriptor, name)]
                continue
            servers.clear()
            for name in files:
                if name.startswith("disk"):
                    try:
                        backed |= dict.fromkeys(_backed_by(descriptor, name), f"{path}/{name}")
                    except FileNotFoundError:
                        continue
                    except (OSError, ValueError):
                        doubtful.append(f"{path}/{name}")
        doubtful += [f"{directory}/{error.filename}" for error in errors]
    return backed, next(iter(doubtful), "")


def _is_link(directory: int, name: str) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)


def _backed_by(directory: int, disk: str) -> list[str]:
    """The cache names in the backing file of a disk; none for what QEMU cannot have as a disk, such as a FIFO."""
    mode = os.stat(disk, dir_fd=directory, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        return []
    with _closing(os.open(disk, _SOURCE, dir_fd=directory)) as descriptor:
        return re.findall(r"[0-9a-f]{40}", backing_file(descriptor).decode("latin-1"))


def backing_file(descriptor: int) -> bytes:
    """What a qcow2 disk names as its backing file; nothing where it has none, or is no qcow2 disk.

    Raises ValueError where the header is cut short or says what cannot be (QEMU, ``docs/interop/qcow2.txt``).
    """
    header = os.pread(descriptor, 20, 0)
    if not header.startswith(_QCOW2):
        return b""
    if len(header) < 20:
        raise ValueError("the header is cut short")
    offset, size = struct.unpack_from(">QI", header, 8)
    if not offset:
        return b""
    name = os.pread(descriptor, size, offset) if size <= _BACKING_NAME and offset < 2**63 else b""
    if len(name) != size or not size:
        raise ValueError("the name of the backing file cannot be read")
    return name


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
