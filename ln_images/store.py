"""The two directories: Glance's store and Nova's cache.

This module takes the lock, lists both directories, collects facts about one image, and links or
repairs it. ``rules.py`` decides what happens to an image. No call here renames or removes a file,
and link(2) refuses a name that is taken, so no file is ever replaced.

It works through descriptors: both directories are opened once, and the file that is linked is the
file that was opened and checked, whatever its name has become meanwhile. Every entry of the cache
may have been planted by an enemy: only regular files are opened, and no symbolic link is followed.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import stat
import struct
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from ln_images.model import (
    MARKS_UNSUPPORTED,
    NO_MARKS,
    AnotherRunError,
    ConfigurationError,
    Facts,
    File,
    LinkPolicy,
    Marks,
    Outcome,
    Owner,
    Reason,
    TemporaryError,
    Verdict,
    cache_name,
    is_image_id,
)

# The marks on each inode that we link. A SHA-1 cannot be turned back into an image id. These names
# are a contract with files that exist.
IMAGE_ID_MARK = "user.ln_images.image_id"
SIZE_MARK = "user.ln_images.size"
UNUSED_SINCE_MARK = "user.ln_images.unused_since"
# The mark on a file that was refused: what it was and why, so that the next process need not
# inspect it again.
REFUSED_MARK = "user.ln_images.refused"
# Marks are short. A longer one was written by somebody else.
_LONGEST_MARK = 1024
_SIZE = re.compile("[0-9]{1,20}")
_TIME = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")

# Beside a base, Nova downloads into the first and converts into the second
# (nova.virt.libvirt.utils.fetch_image, nova.virt.images.fetch_to_raw).
DOWNLOAD_SUFFIXES = (".part", ".converted")
QCOW2_MAGIC = b"QFI\xfb"

# The file system does not respond, and may respond again later.
NOT_RESPONDING = frozenset(
    {errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN}
)

# A download of Nova that has not changed for this long, in seconds, is a leftover of a crash.
_FRESH_SECONDS = 600

# FS_IOC_FSGETXATTR of linux/fs.h, the fields of struct fsxattr, and the flags FS_XFLAG_IMMUTABLE,
# FS_XFLAG_APPEND and FS_XFLAG_PROJINHERIT.
_FSGETXATTR = 0x801C581F
_FSXATTR = struct.Struct("=5I8x")
_IMMUTABLE = 0x8
_APPEND = 0x10
_PROJINHERIT = 0x200


class NotRegularError(OSError):
    """The name is that of something else than a regular file, so it was not opened."""


class AttributesNotKeptError(Exception):
    """The file system does not keep owner, mode or marks. The text says which, and what to do."""


class LinksImpossibleError(ConfigurationError):
    """No image at all can be linked between these directories."""


class Store(contextlib.ExitStack):
    """Glance's store and Nova's cache, both open. Use it as a context manager.

    ``cache`` is the descriptor of the cache directory.
    """

    def __init__(self, images_dir: str, cache_dir: str) -> None:
        """Open both directories.

        Raises ConfigurationError if they cannot be opened, cannot share inodes, or if somebody else
        could replace the cache, and TemporaryError if their file system does not respond.
        """
        super().__init__()
        self.images_dir = images_dir
        self.cache_dir = cache_dir
        with contextlib.ExitStack() as stack:
            with self._using_images():
                self._images = os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, self._images)
                images_owner = os.fstat(self._images).st_uid
            with self._using_cache():
                _refuse_replaceable_directory(cache_dir, trusted={0, os.geteuid(), images_owner})
                self.cache = _open_without_following(cache_dir)
                stack.callback(os.close, self.cache)
                self._refuse_impossible_pairs()
            self.push(stack.pop_all())

    def _using_images(self) -> contextlib.AbstractContextManager[None]:
        return _translating(f"--images-dir {self.images_dir}")

    def _using_cache(self) -> contextlib.AbstractContextManager[None]:
        return _translating(f"--cache-dir {self.cache_dir}")

    def _refuse_impossible_pairs(self) -> None:
        images, cache = os.fstat(self._images), os.fstat(self.cache)
        if os.path.samestat(images, cache):
            raise ConfigurationError(
                f"--images-dir and --cache-dir are the same directory, {self.cache_dir}; use two"
            )
        paths = [os.path.realpath(self.images_dir), os.path.realpath(self.cache_dir)]
        if os.path.commonpath(paths) in paths:
            raise ConfigurationError(
                f"{self.images_dir} and {self.cache_dir}: one is inside the other; use two"
                " directories beside each other"
            )
        # Two mounts of one file system have one st_dev, and link(2) refuses them all the same.
        same_mount = _mount_id(self._images) == _mount_id(self.cache)
        if images.st_dev != cache.st_dev or not same_mount:
            raise ConfigurationError(
                f"{self.images_dir} and {self.cache_dir} are on two file systems or two mounts of"
                " one, and no hard link can cross them; put both below one mount point"
            )

    @contextlib.contextmanager
    def locked(self, wait_seconds: float = 0) -> Iterator[None]:
        """Hold the lock of the cache. Raise AnotherRunError if it is not free in ``wait_seconds``.

        It is an flock(2) on the directory itself: there is no lock file in ``_base``, and nothing
        is left behind by a crash.
        """
        deadline = time.monotonic() + wait_seconds
        while not self._try_lock():
            if time.monotonic() >= deadline:
                raise AnotherRunError(
                    f"{self.cache_dir}: {self._lock_holder()} holds the lock; let it finish, or end"
                    " it if it is no command of ours"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            # A file system that has died meanwhile must not hide what happened before.
            with contextlib.suppress(OSError):
                fcntl.flock(self.cache, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        """Take the lock and return True, or return False if somebody else has it."""
        with self._using_cache():
            try:
                fcntl.flock(self.cache, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _lock_holder(self) -> str:
        """Describe the process that holds the lock, as far as the kernel shows it."""
        # 1: FLOCK  ADVISORY  WRITE 1234 08:01:131090 0 EOF
        inode = os.fstat(self.cache).st_ino
        line = re.compile(rf"^\d+: FLOCK .* (\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", re.MULTILINE)
        with contextlib.suppress(OSError):
            holder = line.search(Path("/proc/locks").read_text(encoding="ascii"))
            if holder and int(holder[1]) > 0:
                return f"process {holder[1]}{_process_state(int(holder[1]))}"
        return "another run"

    def list_store(self) -> dict[str, int]:
        """Return the image ids that have a name in the store, with the inode of each.

        The inode is the one that the directory lists. On some file systems, such as overlayfs, it
        is not the one that stat(2) returns.
        """
        with self._using_images(), os.scandir(self._images) as entries:
            return {entry.name: entry.inode() for entry in entries if is_image_id(entry.name)}

    def list_cache(self, limit: int | None = None) -> list[str]:
        """Return the names in the cache, or the first ``limit`` of them in no order."""
        with self._using_cache(), os.scandir(self.cache) as entries:
            return [entry.name for entry in itertools.islice(entries, limit)]

    def refuse_dead_file_system(self) -> None:
        """Raise TemporaryError if one of the directories cannot be listed any more."""
        for directory, using in (
            (self._images, self._using_images()),
            (self.cache, self._using_cache()),
        ):
            with using, os.scandir(directory) as entries:
                next(entries, None)

    def image_file(self, image_id: str) -> File | None:
        """Return what has an image's name in the store, or None."""
        try:
            return _file(os.stat(image_id, dir_fd=self._images, follow_symlinks=False), None)
        except FileNotFoundError:
            return None

    def cache_file(self, name: str) -> File | None:
        """Return what has a name in the cache, with its marks, or None."""
        try:
            status = os.stat(name, dir_fd=self.cache, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return _file(status, NO_MARKS)
            return _file(status, read_marks(f"/proc/self/fd/{self.cache}/{name}"))
        except FileNotFoundError:
            return None

    def describe_open_file(self, descriptor: int) -> File:
        """Return what an open file is, with its marks. Raises OSError."""
        return _file(os.fstat(descriptor), read_marks(descriptor))

    def facts(self, image_id: str, descriptor: int | None = None) -> Facts:
        """Return what the two directories have for an image.

        With ``descriptor``, the source is the open file, with its marks, whatever its name has
        become. Raises OSError.
        """
        source = (
            self.image_file(image_id) if descriptor is None else self.describe_open_file(descriptor)
        )
        name = cache_name(image_id)
        entry = self.cache_file(name)
        is_other_file = entry is not None and not (source and entry.is_same_inode(source))
        return Facts(
            source=source,
            entry=entry,
            is_downloading=entry is None and self.is_downloading(name),
            entry_is_raw=is_other_file and self._is_raw(name),
            mark_is_shared=entry is not None and self._is_mark_shared(image_id, entry),
        )

    def is_downloading(self, name: str) -> bool:
        """Return whether Nova has a fresh, unfinished download beside a base."""
        now = time.time()
        files = [self.cache_file(name + suffix) for suffix in DOWNLOAD_SUFFIXES]
        return any(file is not None and is_fresh_download(file, now) for file in files)

    def _is_raw(self, name: str) -> bool:
        """Return whether an entry is a regular file without the magic of qcow2."""
        try:
            with open_regular(name, self.cache) as descriptor:
                return os.pread(descriptor, 4, 0) != QCOW2_MAGIC
        except OSError:
            return False

    def _is_mark_shared(self, image_id: str, entry: File) -> bool:
        """Return whether the entry's mark names another image whose file is the same inode.

        A tool that links equal files of the store to each other leaves one inode to two images.
        """
        other_id = entry.marks.image_id if entry.marks else None
        if other_id is None or other_id == image_id or not is_image_id(other_id):
            return False
        other = self.image_file(other_id)
        return other is not None and other.is_same_inode(entry)

    def open_image(self, image_id: str) -> contextlib.AbstractContextManager[int]:
        """Open an image's file for reading. Raises OSError; NotRegularError if it is not a file."""
        return open_regular(image_id, self._images)

    def directory_owner(self) -> Owner:
        """Return the owner of the cache directory."""
        status = os.fstat(self.cache)
        return Owner(status.st_uid, status.st_gid)

    def refuse_project_quota(self, descriptor: int) -> None:
        """Raise LinksImpossibleError if a project quota refuses every link (xfs(5), ext4(5))."""
        project, inherits = _read_project(self.cache)
        if inherits and _read_project(descriptor)[0] != project:
            raise LinksImpossibleError(
                f"{self.cache_dir} is under a project quota (project {project}) that is not the"
                " images', and no hard link can enter it; put both directories under one project,"
                " or none"
            )

    def link(self, descriptor: int, image_id: str, policy: LinkPolicy) -> None:
        """Give the open inode its attributes, and then its cache name.

        In this order no compute node ever finds the name on an inode with the wrong owner or mode.
        If the link cannot be made, the inode gets its old owner, mode and marks back.

        Raises FileExistsError if the name is another inode's, FileNotFoundError if Glance has
        deleted the file meanwhile, LinksImpossibleError if no link at all is possible, other
        OSErrors, and AttributesNotKeptError.
        """
        before = self.describe_open_file(descriptor)
        try:
            self.set_attributes(descriptor, image_id, policy)
            self._make_name(descriptor, cache_name(image_id))
        except (OSError, AttributesNotKeptError, LinksImpossibleError):
            _restore_attributes(descriptor, before)
            raise
        with contextlib.suppress(OSError):
            os.removexattr(descriptor, REFUSED_MARK)

    def set_attributes(self, descriptor: int, image_id: str, policy: LinkPolicy) -> None:
        """Set owner, mode and marks of the open inode, each only if it differs, and read them back.

        Raises OSError, and AttributesNotKeptError if the file system did not keep owner or mode.
        """
        status = os.fstat(descriptor)
        if Owner(status.st_uid, status.st_gid) != policy.owner:
            os.fchown(descriptor, policy.owner.uid, policy.owner.gid)
        # A change of owner clears bits of the mode, so the mode comes second.
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != policy.mode:
            os.fchmod(descriptor, policy.mode)
        self._refuse_lost_attributes(descriptor, policy)
        marks = read_marks(descriptor)
        if not marks.supported:
            return
        if marks.image_id != image_id:
            _set_mark(descriptor, IMAGE_ID_MARK, image_id)
        if marks.size != status.st_size:
            _set_mark(descriptor, SIZE_MARK, str(status.st_size))
        if marks.unused_since is not None:
            # It was a base without an image once. When it is one again, its time starts anew.
            os.removexattr(descriptor, UNUSED_SINCE_MARK)

    def _refuse_lost_attributes(self, descriptor: int, policy: LinkPolicy) -> None:
        status = os.fstat(descriptor)
        owner = Owner(status.st_uid, status.st_gid)
        mode = stat.S_IMODE(status.st_mode)
        if owner != policy.owner or mode != policy.mode:
            raise AttributesNotKeptError(
                f"the file is {owner.uid}:{owner.gid} {mode:04o} after it was set to"
                f" {policy.owner.uid}:{policy.owner.gid} {policy.mode:04o}; the file system does"
                " not keep them (CIFS and some FUSE file systems do not); use another"
            )

    def _make_name(self, descriptor: int, name: str) -> None:
        """Give the open inode a name in the cache, unless it has it already.

        If another inode has the name, link(2) fails with EEXIST and replaces nothing.
        """
        try:
            os.link(
                f"/proc/self/fd/{descriptor}", name, dst_dir_fd=self.cache, follow_symlinks=True
            )
        except FileExistsError:
            entry = self.cache_file(name)
            if entry is None or not entry.is_same_inode(_file(os.fstat(descriptor), None)):
                raise
        except OSError as error:
            if self._is_every_link_refused(error, descriptor):
                raise self._impossible_links(error) from None
            raise

    def _is_every_link_refused(self, error: OSError, descriptor: int) -> bool:
        """Return whether link(2) failed for a reason that is not about this one file.

        EPERM is about one file if that is immutable or append-only (chattr(1)), and about the user
        if that is not root (``fs.protected_hardlinks``, proc_sys_fs(5)).
        """
        if error.errno == errno.EXDEV:
            return True
        return error.errno == errno.EPERM and os.geteuid() == 0 and not _is_immutable(descriptor)

    def _impossible_links(self, error: OSError) -> LinksImpossibleError:
        if _is_immutable(self.cache):
            return LinksImpossibleError(
                f"{self.cache_dir} is immutable or append-only; run `chattr -i -a {self.cache_dir}`"
            )
        return LinksImpossibleError(
            f"{self.cache_dir}: the file system refuses hard links from {self.images_dir}"
            f" ({error.strerror}); put both directories on one file system that can link between"
            " them, which some, such as mergerfs and BeeGFS, cannot always"
        )

    def remember_refusal(self, descriptor: int, key: str, verdict: Verdict) -> None:
        """Leave a mark that says why a file was refused.

        ``key`` identifies what was judged, for :meth:`read_refusal`. A file system without extended
        attributes keeps no mark, and neither does a file that has no room for one.
        """
        text = f"{key}\n{verdict.reason}\n{verdict.sentence or ''}"
        with contextlib.suppress(OSError):
            os.setxattr(descriptor, REFUSED_MARK, text.encode())

    def read_refusal(self, descriptor: int, key: str) -> Verdict | None:
        """Return the verdict on a file that was refused, if what was judged is still the same.

        Somebody else may have written the mark, so only a short and printable one counts.
        """
        text = None
        with contextlib.suppress(OSError):
            text = _read_mark(descriptor, REFUSED_MARK)
        parts = text.split("\n") if text else []
        if len(parts) != 3 or parts[0] != key or not parts[2].isprintable():
            return None
        try:
            return Verdict(Outcome.REFUSED, Reason(parts[1]), parts[2])
        except ValueError:
            return None


@contextlib.contextmanager
def open_regular(name: str, directory: int) -> Iterator[int]:
    """Open a regular file of a directory for reading.

    The name is opened with O_PATH first, which opens neither a device nor a FIFO and follows no
    symbolic link. What it is, is checked on that descriptor. Raises OSError; NotRegularError if it
    is something else than a regular file.
    """
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotRegularError(errno.ENXIO, "Not a regular file", name)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(f"/proc/self/fd/{handle}", flags)
    finally:
        os.close(handle)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_fresh_download(file: File, now: float) -> bool:
    """Return whether a ``.part`` or ``.converted`` file shows that Nova is at work.

    ``now`` is in seconds since the epoch. Nova makes regular files only.
    """
    return stat.S_ISREG(file.mode) and abs(now - file.changed) < _FRESH_SECONDS


def read_marks(file: int | str) -> Marks:
    """Return the marks of an open file, or of a path, whose last part is not followed.

    What is no mark of ours, such as a number of 5,000 digits, counts as missing. Raises OSError.
    """
    try:
        image_id = _read_mark(file, IMAGE_ID_MARK)
        size = _read_mark(file, SIZE_MARK)
        unused_since = _read_mark(file, UNUSED_SINCE_MARK)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return MARKS_UNSUPPORTED
        raise
    return Marks(
        image_id=image_id,
        size=int(size) if size and _SIZE.fullmatch(size) else None,
        unused_since=float(unused_since)
        if unused_since and _TIME.fullmatch(unused_since)
        else None,
    )


def _read_mark(file: int | str, name: str) -> str | None:
    """Return one extended attribute as text, or None. Raises OSError; ENOTSUP if it cannot be."""
    try:
        # A descriptor has nothing to follow.
        value = os.getxattr(file, name, follow_symlinks=isinstance(file, int))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOENT):
            return None
        raise
    if len(value) > _LONGEST_MARK:
        return None
    return value.decode("utf-8", "replace")


def _set_mark(descriptor: int, name: str, value: str) -> None:
    try:
        os.setxattr(descriptor, name, value.encode())
    except OSError as error:
        # On ext4 all extended attributes of a file share one block (ext4(5), ea_inode). If that is
        # full, the error is ENOSPC, as on a file system that is full.
        is_block_full = error.errno == errno.ENOSPC and not _is_file_system_full(descriptor)
        if is_block_full or error.errno == errno.E2BIG:
            raise AttributesNotKeptError(
                "the file has no room for another extended attribute; remove some of those that"
                " `getfattr -d -m -` prints"
            ) from None
        raise


def _is_file_system_full(descriptor: int) -> bool:
    status = os.fstatvfs(descriptor)
    return status.f_bavail == 0 or (status.f_files > 0 and status.f_favail == 0)


def _restore_attributes(descriptor: int, before: File) -> None:
    """Give an inode back the owner, mode and marks that it had.

    The mark ``unused_since`` stays away: without it the clean-up only waits longer.
    """
    with contextlib.suppress(OSError):
        os.fchown(descriptor, before.owner.uid, before.owner.gid)
        os.fchmod(descriptor, stat.S_IMODE(before.mode))
    marks = before.marks or NO_MARKS
    if not marks.supported:
        return
    values = {
        IMAGE_ID_MARK: marks.image_id,
        SIZE_MARK: None if marks.size is None else str(marks.size),
    }
    for name, value in values.items():
        with contextlib.suppress(OSError):
            if value is None:
                os.removexattr(descriptor, name)
            else:
                os.setxattr(descriptor, name, value.encode())


def _file(status: os.stat_result, marks: Marks | None) -> File:
    return File(
        mode=status.st_mode,
        inode=status.st_ino,
        device=status.st_dev,
        links=status.st_nlink,
        owner=Owner(status.st_uid, status.st_gid),
        size=status.st_size,
        changed=status.st_ctime,
        # After truncate(2), ceph-fuse 16.2 leaves an mtime of 0.
        modified=status.st_mtime or status.st_ctime,
        marks=marks,
    )


def _refuse_replaceable_directory(path: str, trusted: Collection[int]) -> None:
    """Raise ConfigurationError if somebody whose user is not ``trusted`` can replace a directory.

    If the cache lay in a directory that compute nodes can write to, a node could put a symbolic
    link in its place, and root would link into any directory of this machine. The same holds for
    every directory above it, so we check all those of the path as it was given, and of the path
    that it leads to. A path through trusted directories alone cannot change between this check and
    the open. Raises OSError.
    """
    given, real = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    for child in dict.fromkeys([given, *given.parents, real, *real.parents]):
        parent = child.parent
        status = os.stat(parent)
        has_trusted_owner = status.st_uid in trusted
        others_can_write = bool(status.st_mode & 0o022)
        if others_can_write and status.st_mode & stat.S_ISVTX and os.lstat(child).st_uid in trusted:
            # With the sticky bit, as in /tmp, others cannot rename what is not theirs (inode(7)).
            others_can_write = False
        if has_trusted_owner and not others_can_write:
            continue
        remedy = f"chmod go-w {parent}" if has_trusted_owner else f"chown root {parent}"
        raise ConfigurationError(
            f"--cache-dir {path}: not only root can replace it, because {parent} belongs to user"
            f" {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):04o}; run `{remedy}`, or"
            " move the cache to a directory that only root or Glance may write to"
        )


def _open_without_following(path: str) -> int:
    """Open a directory that is no symbolic link itself. Raises OSError and ConfigurationError."""
    try:
        return os.open(
            path.rstrip("/") or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except NotADirectoryError:
        # That is what O_DIRECTORY and O_NOFOLLOW together say of a symbolic link, too.
        if os.path.islink(path.rstrip("/")):
            raise ConfigurationError(
                f"--cache-dir {path} is a symbolic link, which somebody could change; name"
                f" {os.path.realpath(path)} instead"
            ) from None
        raise


@contextlib.contextmanager
def _translating(what: str) -> Iterator[None]:
    """Translate an OSError of a whole directory into an error of the pass."""
    try:
        yield
    except OSError as error:
        raise _translate(what, error) from None


def _translate(what: str, error: OSError) -> ConfigurationError | TemporaryError:
    message = f"{what}: {error.strerror}"
    if error.errno in NOT_RESPONDING:
        return TemporaryError(f"{message}; its file system does not respond; remount it")
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return TemporaryError(f"{message}; free memory or file descriptors")
    if error.errno == errno.ENOLCK:
        return ConfigurationError(
            f"{message}; the lock of the directory needs flock(2), so start rpc.statd, or use NFSv4"
        )
    if error.errno == errno.ENOENT:
        return ConfigurationError(f"{message}; mount its file system, or create it")
    if error.errno in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
        return ConfigurationError(f"{message}; run the command as root")
    if error.errno in (errno.EPERM, errno.EACCES):
        return ConfigurationError(
            f"{message}; root is refused, so look for root_squash on an NFS mount, or for a FUSE"
            " file system without allow_root"
        )
    if error.errno == errno.ENOTDIR:
        return ConfigurationError(f"{message}; name a directory")
    return ConfigurationError(f"{message}; check its file system, and the log of the kernel")


def _process_state(pid: int) -> str:
    """Return a process's command line and whether it is stopped, for a message."""
    with contextlib.suppress(OSError):
        command = (
            Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
        )
        # 1234 (ln-images) T 1 1234 ...
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        stopped = ", which is stopped (continue it with `kill -CONT`)," if state in "Tt" else ""
        return f" ({command[:200]}){stopped}"
    return ""


def _mount_id(descriptor: int) -> str:
    """Return the id of the mount that a descriptor was opened through (proc_pid_fdinfo(5))."""
    # mnt_id:	29
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))


def _read_fsxattr(descriptor: int) -> tuple[int, int]:
    """Return the flags and the project of an inode (linux/fs.h, ``struct fsxattr``).

    A file system that has neither counts as one where both are 0.
    """
    fields = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(descriptor, _FSGETXATTR, fields)
    except OSError:
        return 0, 0
    flags, _extent_size, _extents, project, _cow_extent_size = _FSXATTR.unpack(fields)
    return flags, project


def _read_project(descriptor: int) -> tuple[int, bool]:
    """Return an inode's project, and whether a directory gives it to what is linked there."""
    flags, project = _read_fsxattr(descriptor)
    return project, bool(flags & _PROJINHERIT)


def _is_immutable(descriptor: int) -> bool:
    """Return whether a file is immutable or append-only (chattr(1))."""
    flags, _ = _read_fsxattr(descriptor)
    return bool(flags & (_IMMUTABLE | _APPEND))
