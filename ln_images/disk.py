"""The two directories: lock, look, link, mend, rename, remove.

The only module that changes files there.

Through descriptors: both directories are opened once, and what was opened and checked is exactly
what is linked.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from ln_images import inspection
from ln_images.inode import (
    MARK,
    SERVER_MARK,
    SIZE_MARK,
    look_at,
    mark,
    mount,
    opened,
    project,
    unmarked,
)
from ln_images.model import (
    UNMARKABLE,
    AnotherRunError,
    Base,
    ConfigurationError,
    File,
    Image,
    Outcome,
    Verdict,
)
from ln_images.options import Options
from ln_images.plan import DOWNLOADS, RAW_COPY, cache_name, is_downloading, judge_files

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
RETIRED = ".retired"
_RENAME_NOREPLACE = 1  # linux/fs.h


class Disk(contextlib.ExitStack):
    """Glance's store and Nova's cache, both open. Use it as a context manager."""

    def __init__(self, images_dir: str, cache_dir: str) -> None:
        """Opens both.

        Raises ConfigurationError where they cannot be opened or cannot share inodes.
        """
        super().__init__()
        self._cache_dir = cache_dir
        with contextlib.ExitStack() as opened:
            self._images = _open_directory("--images-dir", images_dir)
            opened.callback(os.close, self._images)
            self._cache = _open_directory("--cache-dir", cache_dir)
            opened.callback(os.close, self._cache)
            here, there = os.fstat(self._images), os.fstat(self._cache)
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                raise ConfigurationError(
                    f"--images-dir and --cache-dir are one directory, {cache_dir}: name two"
                )
            # Two mounts of one file system have one st_dev, and link(2) refuses them all the same.
            if here.st_dev != there.st_dev or mount(self._images) != mount(self._cache):
                raise ConfigurationError(
                    f"{images_dir} and {cache_dir} are on two file systems or two mounts of one, which no hard"
                    " link can cross: put both on one, under one mount point"
                )
            self.push(opened.pop_all())

    @contextlib.contextmanager
    def locked(self, seconds: float = 0) -> Iterator[None]:
        """Holds the cache directory's lock.

        Raises AnotherRunError where another run holds it for ``seconds``.

        It is an flock(2) on the directory itself: no lock file in ``_base``, and nothing stale
        after a crash.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._cache, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise AnotherRunError(
                        f"another run holds the lock on {self._cache_dir}: let it finish"
                    ) from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(self._cache, fcntl.LOCK_UN)

    def sources(self) -> dict[int, list[str]]:
        """The names in Glance's store, by inode as the directory gives it."""
        found: dict[int, list[str]] = {}
        with os.scandir(self._images) as names:
            for name in names:
                found.setdefault(name.inode(), []).append(name.name)
        return found

    def source(self, image_id: str) -> File | None:
        """What has an image's name in the store."""
        try:
            return unmarked(os.stat(image_id, dir_fd=self._images, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def entries(self) -> Iterator[tuple[str, File | Verdict]]:
        """The names in the cache and what each stands for, one by one: there may be very many.

        One that cannot be looked at comes with its verdict instead.
        """
        with os.scandir(self._cache) as names:
            for name in names:
                try:
                    yield (
                        name.name,
                        look_at(self._cache, name.name, name.stat(follow_symlinks=False)),
                    )
                except FileNotFoundError:
                    continue
                except OSError as error:
                    yield name.name, failure(error)

    def entry(self, name: str) -> File | None:
        """What has a name in the cache."""
        try:
            return look_at(
                self._cache, name, os.stat(name, dir_fd=self._cache, follow_symlinks=False)
            )
        except FileNotFoundError:
            return None

    def server_of(self, name: str) -> str | None:
        """The server whose snapshot a base was linked from, where it was one."""
        with opened(name, self._cache) as descriptor:
            return mark(descriptor, SERVER_MARK)

    def room(self) -> tuple[int, int, int]:
        """The size of both directories' file system, what is free there, in bytes, and the free inodes."""
        status = os.fstatvfs(self._cache)
        return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize, status.f_favail

    def directory(self) -> tuple[int, int]:
        """The uid and gid that own the cache directory."""
        status = os.fstat(self._cache)
        return status.st_uid, status.st_gid

    def settle(self, image: Image, options: Options) -> Verdict:
        """Gives one finished image what it needs, or in a dry run says what that would be.

        ``image`` is one on which :func:`ln_images.plan.judge_image` left the decision open. A fault
        of the operating system is the image's ``failed`` verdict. Raises ConfigurationError where
        no image at all can be linked.
        """
        try:
            verdict = self._judge(image, self.source(image.id), options)
            if verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED):
                return verdict
            with self.opened(image.id) as source:
                # Its name may have changed hands since the look: what counts is what was opened.
                verdict = self._judge(image, unmarked(os.fstat(source)), options)
                if verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED):
                    return verdict
                if verdict.outcome is Outcome.LINKED:
                    self._refuse_quota(source)
                    if objection := inspection.objection(source, image.disk_format):
                        return Verdict(Outcome.REFUSED, objection)
                if not options.dry_run:
                    self._mend(source, image, options)
                    if verdict.outcome is Outcome.LINKED:
                        return self._link(source, image, options)
                return verdict
        except FileNotFoundError as error:
            # Glance's file may have gone before it was opened; else the cache has.
            gone = not os.access(image.id, os.F_OK, dir_fd=self._images)
            return judge_files(image, None, None, options) if gone else failure(error)
        except OSError as error:
            return failure(error)

    def carry_out(self, base: Base, verdict: Verdict) -> Verdict:
        """Retires, restores or removes a base as ``verdict`` says.

        The verdict, or why it could not be.

        It must still be exactly what was judged, nothing is replaced, and only what is retired is
        removed.
        """
        old, new = base.name + RETIRED, base.name
        if verdict.outcome is Outcome.RETIRED:
            old, new = new, old
        try:
            if self.entry(old) != base.file:
                return Verdict(Outcome.KEPT, "it has changed since it was looked at")
            if verdict.outcome is Outcome.PRUNED:
                os.unlink(old, dir_fd=self._cache)
            elif verdict.outcome is Outcome.RESTORED and self._is_downloaded(new):
                # The download would replace it.
                return Verdict(Outcome.KEPT, "Nova is downloading it")
            else:
                self._rename(old, new)
        except FileExistsError:
            return Verdict(
                Outcome.KEPT, f"another file has the name {new}: keep the one that servers need"
            )
        except OSError as error:
            return failure(error)
        return verdict

    def opened(self, image_id: str) -> AbstractContextManager[int]:
        """Glance's file, open for reading."""
        return opened(image_id, self._images)

    def _judge(self, image: Image, source: File | None, options: Options) -> Verdict:
        name = cache_name(image.id)
        verdict = judge_files(image, source, self.entry(name), options)
        if verdict.outcome is Outcome.LINKED and self._is_downloaded(name):
            return Verdict(Outcome.WAITING, "Nova is downloading it")
        if (
            verdict.outcome is Outcome.OCCUPIED
            and image.disk_format == "qcow2"
            and self._is_raw(name)
        ):
            return RAW_COPY
        return verdict

    def _is_downloaded(self, name: str) -> bool:
        beside = (self.entry(name + suffix) for suffix in DOWNLOADS)
        return any(file is not None and is_downloading(file, time.time()) for file in beside)

    def _is_raw(self, name: str) -> bool:
        """Whether a cache entry is a regular file and no qcow2."""
        # What is no file there, or none any more, need not open.
        with contextlib.suppress(OSError), opened(name, self._cache) as descriptor:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return is_file and os.pread(descriptor, 4, 0) != inspection.QCOW2
        return False

    def _refuse_quota(self, source: int) -> None:
        """Says, before anything is changed, that a project quota keeps every link out (xfs(5), ext4(5): EXDEV)."""
        number, inherited = project(self._cache)
        if inherited and project(source)[0] != number:
            text = "which is not the images', and no hard link enters it: put both directories under one, or none"
            raise ConfigurationError(
                f"{self._cache_dir} is under a project quota (project {number}), {text}"
            )

    def _mend(self, source: int, image: Image, options: Options) -> None:
        """Owner, mode and marks of the open inode, each only where it differs."""
        status = os.fstat(source)
        if (status.st_uid, status.st_gid) != options.owner:
            os.fchown(source, *options.owner)
        # After the owner, since a change of owner takes bits of the mode away.
        if stat.S_IMODE(os.fstat(source).st_mode) != options.mode:
            os.fchmod(source, options.mode)
        for kind, value in (
            (MARK, image.id),
            (SIZE_MARK, str(status.st_size)),
            (SERVER_MARK, image.server),
        ):
            if value and mark(source, kind) not in (value, UNMARKABLE):
                os.setxattr(source, kind, value.encode())

    def _link(self, source: int, image: Image, options: Options) -> Verdict:
        """Gives the open inode its cache name.

        Nothing is ever replaced: the kernel refuses a name that is taken.
        """
        try:
            os.link(
                f"/proc/self/fd/{source}",
                cache_name(image.id),
                dst_dir_fd=self._cache,
                follow_symlinks=True,
            )
        except FileExistsError:
            return self._judge(image, unmarked(os.fstat(source)), options)
        except FileNotFoundError:
            if os.fstat(source).st_nlink:
                raise
            return self._judge(image, None, options)
        return Verdict(Outcome.LINKED)

    def _rename(self, old: str, new: str) -> None:
        """Renames in the cache. Raises FileExistsError where the new name is another file's.

        NFS and CephFS know no rename that replaces nothing (EINVAL): there it is a link and an
        unlink, and a crash between the two leaves both names, which the next call mends.
        """
        import ctypes

        # Python's own rename replaces what has the new name.
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(
            self._cache, old.encode(), self._cache, new.encode(), _RENAME_NOREPLACE
        ):
            return
        fault = ctypes.get_errno()
        if fault not in (errno.EINVAL, errno.ENOSYS, errno.EEXIST):
            raise OSError(fault, os.strerror(fault))
        try:
            os.link(old, new, src_dir_fd=self._cache, dst_dir_fd=self._cache, follow_symlinks=False)
        except FileExistsError:
            here, there = (
                os.stat(name, dir_fd=self._cache, follow_symlinks=False) for name in (old, new)
            )
            if not os.path.samestat(here, there):
                raise
        os.unlink(old, dir_fd=self._cache)


def failure(error: OSError) -> Verdict:
    """An image's ``failed`` verdict for a fault of the operating system, with the mend where it is known."""
    mend = (
        ": run it as root"
        if error.errno in (errno.EPERM, errno.EACCES) and os.geteuid() != 0
        else ""
    )
    return Verdict(Outcome.FAILED, f"{error.strerror or error}{mend}")


def _open_directory(option: str, path: str) -> int:
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        mend = "create it, or name another"
        if isinstance(error, FileNotFoundError):
            mend = f"is its file system mounted? Else {mend}"
        elif isinstance(error, PermissionError) and os.geteuid() != 0:
            mend = "run it as root"
        raise ConfigurationError(f"{option} {path}: {error.strerror}: {mend}") from None
