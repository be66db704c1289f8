"""One inode: what a name stands for, its marks, its project, its mount."""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator

from ln_images.model import UNMARKABLE, File

# O_NOFOLLOW: a symbolic link is an error. O_NONBLOCK: a FIFO does not hold the run up.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# The mark on each inode that was linked: a SHA-1 cannot be turned back into an id. Beside it, the
# image's size, and of a snapshot the server.
MARK = "user.ln_images.image_id"
SIZE_MARK = "user.ln_images.size"
SERVER_MARK = "user.ln_images.server_id"
# FS_IOC_FSGETXATTR and FS_XFLAG_PROJINHERIT of linux/fs.h, and the fields of struct fsxattr.
_FSGETXATTR, _PROJINHERIT, _FSXATTR = 0x801C581F, 0x200, struct.Struct("=5I8x")


@contextlib.contextmanager
def opened(name: str, directory: int) -> Iterator[int]:
    """A file of a directory, open for reading and never followed."""
    descriptor = os.open(name, READ, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def look_at(directory: int, name: str, status: os.stat_result) -> File:
    """What a name in a directory, of which ``status`` is known, stands for, with its marks."""
    if not stat.S_ISREG(status.st_mode):
        return unmarked(status)
    path = f"/proc/self/fd/{directory}/{name}"
    image_id = mark(path, MARK)
    size = mark(path, SIZE_MARK) if image_id else None
    return unmarked(
        status, image_id, int(size) if size and size.isascii() and size.isdecimal() else None
    )


def mark(file: int | str, name: str) -> str | None:
    """One of the marks of an inode, None where it has none, UNMARKABLE where its file system knows none (xattr(7))."""
    try:
        return os.getxattr(file, name).decode("ascii", "replace") or "?"
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return UNMARKABLE
        if error.errno in (errno.ENODATA, errno.ENOENT):
            return None
        raise


def unmarked(
    status: os.stat_result, mark: str | None = None, marked_size: int | None = None
) -> File:
    """The file of a status, without its marks unless they are given."""
    # Fields by place: by name it takes twice as long, for each entry of each pass.
    return File(*status[:7], status.st_ctime, mark, marked_size)


def project(descriptor: int) -> tuple[int, bool]:
    """The project of an inode, and whether a directory hands it on to what is linked there (linux/fs.h)."""
    fields = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(descriptor, _FSGETXATTR, fields)
    except OSError:
        return 0, False
    flags, _, _, number, _ = _FSXATTR.unpack(fields)
    return number, bool(flags & _PROJINHERIT)


def mount(descriptor: int) -> str:
    """The id of the mount that a descriptor was opened through (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        return next(line for line in lines if line.startswith("mnt_id:"))
