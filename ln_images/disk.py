"""The two directories: lock, look, link and mend. The only module that touches files.

Everything is done through descriptors: both directories are opened once, names are looked up relative
to them, and what was opened and checked is exactly what is linked.
"""

import contextlib
import errno
import fcntl
import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterator

from ln_images import inspection
from ln_images.model import AnotherRunError, ConfigurationError, File, Image, Outcome, Room, Verdict, Wanted
from ln_images.plan import cache_name, judge_files

LOG = logging.getLogger(__name__)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NOFOLLOW: a symbolic link is an error. O_NONBLOCK: a FIFO does not hold the run up.
_SOURCE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# The mark on each inode that was linked: a SHA-1 cannot be turned back into an id.
MARK = "user.ln_images.image_id"
_NO_MARKS = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_ID = 2**32 - 1


def owner_ids(owner: str) -> tuple[int, int]:
    """The uid and gid that ``USER[:GROUP]`` stands for, names or numbers, as chown(1) reads it.

    Raises ConfigurationError for a user or group that does not exist.
    """
    user, _, group = owner.partition(":")
    try:
        entry = pwd.getpwnam(user)
    except (KeyError, ValueError):
        uid = _number(user)
        if uid is None:
            raise ConfigurationError(
                f"--owner: there is no user {user!r} here: install QEMU, or name the user it runs as, or its number"
            ) from None
        if not group:
            raise ConfigurationError(f"--owner: {user} is a number: say which group, as {user}:GROUP") from None
    else:
        uid = entry.pw_uid
        if not group:
            return uid, entry.pw_gid
    try:
        return uid, grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        gid = _number(group)
        if gid is None:
            raise ConfigurationError(
                f"--owner: there is no group {group!r} here: name another, or its number"
            ) from None
        return uid, gid


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= len(str(_NO_ID)) and int(text) < _NO_ID:
        return int(text)
    return None


class Disk:
    """Glance's store and Nova's cache, both open. Use it as a context manager."""

    def __init__(self, images_dir: str, cache_dir: str) -> None:
        """Opens both. Raises ConfigurationError where they cannot be opened or cannot share inodes."""
        self._cache_dir = cache_dir
        with contextlib.ExitStack() as opened:
            self._images = _open_directory("--images-dir", images_dir)
            opened.callback(os.close, self._images)
            self._cache = _open_directory("--cache-dir", cache_dir)
            opened.callback(os.close, self._cache)
            here, there = os.fstat(self._images), os.fstat(self._cache)
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                raise ConfigurationError(f"--images-dir and --cache-dir are one directory, {cache_dir}: name two")
            # Two mounts of one file system have one st_dev, and link(2) refuses them all the same.
            if here.st_dev != there.st_dev or _mount(self._images) != _mount(self._cache):
                raise ConfigurationError(
                    f"{images_dir} and {cache_dir} are on two file systems or two mounts of one, which no hard"
                    " link can cross: put both on one, under one mount point"
                )
            self.marks = _bears_marks(self._cache)
            if not self.marks:
                LOG.debug("%s has no extended attributes: links get no mark", cache_dir)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes both directories."""
        self._opened.close()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the cache directory's lock. Raises AnotherRunError where another run holds it.

        It is an flock(2) on the directory itself: no lock file in ``_base``, and nothing stale after a crash.
        """
        try:
            fcntl.flock(self._cache, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnotherRunError(f"another run holds the lock on {self._cache_dir}: let it finish") from None
        try:
            yield
        finally:
            fcntl.flock(self._cache, fcntl.LOCK_UN)

    def sources(self) -> dict[int, str]:
        """The names in Glance's store, by inode."""
        with os.scandir(self._images) as names:
            return {name.inode(): name.name for name in names}

    def entries(self) -> Iterator[tuple[str, File]]:
        """The names in the cache and what each stands for, one by one: there may be very many."""
        with os.scandir(self._cache) as names:
            for name in names:
                try:
                    yield name.name, self._entry(name.name, name.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue

    def room(self) -> Room:
        """The room on the file system of both directories."""
        status = os.fstatvfs(self._cache)
        return Room(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize, status.f_favail)

    def remove(self, image_id: str, orphan: File) -> Verdict | None:
        """Removes the cache entry of a deleted image, if it is still exactly what was found.

        Returns None when it is gone, else why it is not.
        """
        name = cache_name(image_id)
        try:
            if self._look(self._cache, name) != orphan:
                return Verdict(Outcome.KEPT, "it has changed since it was looked at")
            os.unlink(name, dir_fd=self._cache)
        except OSError as error:
            return Verdict(Outcome.FAILED, error.strerror or str(error))
        return None

    def settle(self, image: Image, wanted: Wanted, dry_run: bool) -> Verdict:
        """Gives one finished image what it needs, or with ``dry_run`` says what that would be.

        ``image`` is one on which :func:`ln_images.plan.judge_image` left the decision open. A fault of
        the operating system is the image's ``failed`` verdict.
        """
        try:
            verdict = self._judge(image, self._look(self._images, image.id), wanted)
            if verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED):
                return verdict
            with self._source(image.id) as source:
                # Its name may have changed hands since the look: what counts is what was opened.
                verdict = self._judge(image, _file(os.fstat(source)) if source is not None else None, wanted)
                if source is None or verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED):
                    return verdict
                if verdict.outcome is Outcome.LINKED:
                    objection = inspection.objection(source, image.disk_format)
                    if objection:
                        return Verdict(Outcome.REFUSED, objection)
                if not dry_run:
                    self._mend(source, image.id, wanted)
                    if verdict.outcome is Outcome.LINKED:
                        return self._link(source, image, wanted)
                return verdict
        except OSError as error:
            return Verdict(Outcome.FAILED, error.strerror or str(error))

    def _judge(self, image: Image, source: File | None, wanted: Wanted) -> Verdict:
        return judge_files(image, source, self._look(self._cache, cache_name(image.id)), wanted)

    def _look(self, directory: int, name: str) -> File | None:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self._entry(name, status) if directory == self._cache else _file(status)

    def _entry(self, name: str, status: os.stat_result) -> File:
        """A cache entry with its mark."""
        return _file(status, _mark(f"/proc/self/fd/{self._cache}/{name}") if stat.S_ISREG(status.st_mode) else None)

    @contextlib.contextmanager
    def _source(self, image_id: str) -> Iterator[int | None]:
        """Glance's file, open, or None where it has vanished."""
        try:
            descriptor = os.open(image_id, _SOURCE, dir_fd=self._images)
        except FileNotFoundError:
            yield None
            return
        with _closing(descriptor):
            yield descriptor

    def _mend(self, source: int, image_id: str, wanted: Wanted) -> None:
        """Owner, mode and mark of the open inode, each only where it differs."""
        status = os.fstat(source)
        if (status.st_uid, status.st_gid) != (wanted.uid, wanted.gid):
            os.fchown(source, wanted.uid, wanted.gid)
        # After the owner, since a change of owner takes bits of the mode away.
        if stat.S_IMODE(os.fstat(source).st_mode) != wanted.mode:
            os.fchmod(source, wanted.mode)
        if wanted.marks and _mark(source) != image_id:
            os.setxattr(source, MARK, image_id.encode())

    def _link(self, source: int, image: Image, wanted: Wanted) -> Verdict:
        """Gives the open inode its cache name. Nothing is ever replaced: the kernel refuses a name that is taken."""
        try:
            os.link(f"/proc/self/fd/{source}", cache_name(image.id), dst_dir_fd=self._cache, follow_symlinks=True)
        except FileExistsError:
            return self._judge(image, _file(os.fstat(source)), wanted)
        except FileNotFoundError:
            if os.fstat(source).st_nlink:
                raise
            return self._judge(image, None, wanted)
        return Verdict(Outcome.LINKED)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(option: str, path: str) -> int:
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        raise ConfigurationError(f"{option} {path}: {error.strerror}: create it, or name another") from None


def _mount(descriptor: int) -> str:
    """The id of the mount that a descriptor was opened through (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        return next(line for line in lines if line.startswith("mnt_id:"))


def _bears_marks(directory: int) -> bool:
    """Whether the file system knows user extended attributes (xattr(7))."""
    try:
        os.getxattr(directory, MARK)
    except OSError as error:
        return error.errno not in _NO_MARKS
    return True


def _mark(file: int | str) -> str | None:
    try:
        return os.getxattr(file, MARK).decode("ascii", "replace")
    except OSError as error:
        if error.errno in _NO_MARKS | {errno.ENODATA, errno.ENOENT}:
            return None
        raise


def _file(status: os.stat_result, mark: str | None = None) -> File:
    # Fields by place: by name it takes twice as long, for each entry of each pass.
    return File(
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_ctime,
        mark,
    )
