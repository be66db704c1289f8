"""Instance disks -> the bases they are backed by; what the clients of an NFS server hold open."""

import errno
import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ln_images.inode import opened
from ln_images.inspection import QCOW2
from ln_images.model import ConfigurationError, TemporaryError

# The longest name that QEMU allows.
_BACKING_NAME = 1023
_SERVER_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OPEN = re.compile(rb'superblock: "[0-9a-f]+:[0-9a-f]+:(\d+)"')


@dataclass
class Disks:
    """What the disks below Nova's instance directories say.

    ``backed`` has the path of a disk by each cache name that its header names; ``servers`` are the
    ids of those whose root disk is there and all of whose disks were read. ``doubt`` is why
    something may be backed by any base, or nothing.
    """

    backed: dict[str, str] = field(default_factory=dict)
    servers: set[str] = field(default_factory=set)
    doubt: str = ""


def read_disks(directories: Iterable[str]) -> Disks:
    """Reads the disks of every server, ``<directory>/<server>/disk*``.

    A symbolic link is not followed but a doubt.
    """
    disks = Disks()
    for directory in directories:
        errors: list[OSError] = []
        try:
            seen = _read_directory(directory, disks, errors)
        except OSError as error:
            errors.append(error)
        if errors:
            disks.doubt = f"{directory}: {errors[0].filename} cannot be read: {errors[0].strerror}"
        elif not seen:
            disks.doubt = (
                f"--instances-dir {directory} has no directory of a server: mount its file system"
            )
    return disks


def _read_directory(directory: str, disks: Disks, errors: list[OSError]) -> bool:
    """Notes what the disks of its servers say; whether it has a server at all."""
    seen = False
    for number, (path, servers, files, descriptor) in enumerate(
        os.fwalk(directory, onerror=errors.append)
    ):
        if number == 0:
            for name in (*servers, *files):
                if stat.S_ISLNK(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    disks.doubt = f"what {path}/{name} is backed by cannot be told"
            continue
        servers.clear()
        found = [name for name in files if name.startswith("disk")]
        server = os.path.basename(path)
        seen = seen or bool(found) or _SERVER_ID.fullmatch(server) is not None
        unread = [name for name in found if not _read_disk(descriptor, path, name, disks)]
        if unread:
            disks.doubt = f"what {path}/{unread[0]} is backed by cannot be told"
        elif "disk" in found:
            disks.servers.add(server)
    return seen


def _read_disk(directory: int, path: str, name: str, disks: Disks) -> bool:
    """Notes the cache names in the backing file of a disk; whether they could be told.

    What QEMU cannot have as a disk, such as a FIFO, has none.
    """
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            with opened(name, directory) as descriptor:
                names = re.findall(r"[0-9a-f]{40}", _backing_file(descriptor).decode("latin-1"))
            disks.backed |= dict.fromkeys(names, f"{path}/{name}")
    except (OSError, ValueError, struct.error):
        return False
    return True


def _backing_file(descriptor: int) -> bytes:
    """What a qcow2 disk names as its backing file; nothing where it has none, or is no qcow2 disk.

    Raises struct.error where the header is cut short, and ValueError where it says what cannot be
    (QEMU, ``docs/interop/qcow2.txt``).
    """
    header = os.pread(descriptor, 20, 0)
    if not header.startswith(QCOW2):
        return b""
    offset, size = struct.unpack_from(">QI", header, 8)
    if not offset:
        return b""
    name = os.pread(descriptor, size, offset) if size <= _BACKING_NAME and offset < 2**63 else b""
    if len(name) != size or not size:
        raise ValueError("the name of the backing file cannot be read")
    return name


def open_inodes(server: str = "/proc/fs/nfsd") -> frozenset[int]:
    """The inodes that clients of this machine's kernel NFS server hold open.

    None where it serves none.

    It lists them by device and inode since Linux 5.3 (fs/nfsd/nfs4state.c). On btrfs the device
    there is not ``st_dev``, so only the inode counts: one of another file system keeps a base that
    it need not.

    Raises ConfigurationError where there is such a server and this cannot be told, and
    TemporaryError where it was just started: until the grace period is over, clients say again what
    they had open before.
    """
    found: set[int] = set()
    path = server
    try:
        clients = os.listdir(f"{server}/clients")
        # Before and after: a grace period may end, or begin, while the clients are read.
        _refuse_grace(server)
        for client in clients:
            try:
                path = f"{server}/clients/{client}/states"
                found.update(int(inode) for inode in _OPEN.findall(Path(path).read_bytes()))
            except OSError as error:
                # The client may have gone meanwhile: before the file was opened, or after (ENXIO).
                if error.errno not in (errno.ENOENT, errno.ENXIO):
                    raise
        _refuse_grace(server)
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        where = error.filename or path
        raise ConfigurationError(
            f"{where}: {error.strerror}: what NFS clients hold open cannot be told"
        ) from None
    return frozenset(found)


def _refuse_grace(server: str) -> None:
    if (
        Path(server, "v4_end_grace").read_bytes() != b"Y\n"
        or Path(server, "threads").read_bytes() == b"0\n"
    ):
        raise TemporaryError(
            "the NFS server here is stopped or was just started, and its clients have yet to say what they hold"
            f" open: nothing is pruned until its grace period is over, or {server}, if it is not used, unmounted"
        )
