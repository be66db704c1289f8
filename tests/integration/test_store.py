"""Linking one image: real files, real mounts, real faults. Nothing of ``os`` is patched."""

import contextlib
import errno
import fcntl
import gc
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from inotify_simple import INotify, flags

from ln_images import inspection
from ln_images.model import (
    AnotherRunError,
    ConfigurationError,
    Image,
    LinkPolicy,
    Marks,
    Outcome,
    Owner,
    Reason,
    TemporaryError,
    Verdict,
    cache_name,
)
from ln_images.scan import scan
from ln_images.store import (
    IMAGE_ID_MARK,
    REFUSED_MARK,
    SIZE_MARK,
    UNUSED_SINCE_MARK,
    LinksImpossibleError,
    Store,
    read_marks,
)
from ln_images.sync import link_image
from support.corpus import QCOW2
from support.mounts import bound, edit_unmounted, formatted, merged, mounted, run_tool
from support.node import OWNER, POLICY, needs_root

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER_ID = "ed0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
DATA = b"\x01" * 5000
IMAGE = Image(id=ID, name="name", status="active", disk_format="raw", size=len(DATA))
MARKS = (ID.encode(), b"5000")
LINKED = (Outcome.LINKED, Reason.NO_LINK_YET)
LINKED_AGAIN = (Outcome.LINKED, Reason.LINK_WAS_REMOVED)
PRESENT = (Outcome.PRESENT, Reason.CORRECT)
REPAIRED = (Outcome.REPAIRED, Reason.WRONG_ATTRIBUTES)
NO_FILE = (Outcome.SKIPPED, Reason.NO_FILE)
SYSTEM_ERROR = (Outcome.FAILED, Reason.SYSTEM_ERROR)
NOT_KEPT = (Outcome.FAILED, Reason.ATTRIBUTES_NOT_KEPT)
Codes = tuple[Outcome, Reason]


@dataclass
class Directories:
    """A store with the file of one image, and an empty cache beside it."""

    base: Path

    def __post_init__(self) -> None:
        self.images, self.cache = self.base / "images", self.base / "cache"
        self.images.mkdir()
        self.cache.mkdir()
        self.source, self.link = self.images / ID, self.cache / cache_name(ID)
        self.source.write_bytes(DATA)
        self.source.chmod(0o640)

    def open(self) -> Store:
        """Open both directories, as the command does."""
        return Store(str(self.images), str(self.cache))

    def judge(
        self, image: Image = IMAGE, policy: LinkPolicy = POLICY, dry_run: bool = False
    ) -> Verdict:
        """Link one image for the tests' owner, and return its verdict."""
        with self.open() as store:
            return link_image(image, store, policy, dry_run)

    def link_image(
        self, image: Image = IMAGE, policy: LinkPolicy = POLICY, dry_run: bool = False
    ) -> Codes:
        """Link one image for the tests' owner, and return its outcome and reason code."""
        verdict = self.judge(image, policy, dry_run)
        return verdict.outcome, verdict.reason

    def marks(self) -> tuple[bytes, bytes]:
        """Return the marks of the link: the image's id and its size."""
        return os.getxattr(self.link, IMAGE_ID_MARK), os.getxattr(self.link, SIZE_MARK)

    def add_image(self) -> Image:
        """Add a second finished image."""
        shutil.copy(self.source, self.images / OTHER_ID)
        return replace(IMAGE, id=OTHER_ID)


def fill(directory: Path, make: Callable[[Path], None]) -> None:
    """Make names in a directory until the file system refuses."""
    for number in range(66_000):
        make(directory / str(number))


def state(path: Path) -> tuple[int, ...]:
    """Return all that a run could change of a file, times included."""
    status = path.lstat()
    return (
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_ctime_ns,
    )


def attributes(path: Path) -> tuple[object, ...]:
    """Return the owner, the mode and the extended attributes of a file."""
    status = path.lstat()
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return status.st_uid, status.st_gid, status.st_mode, xattrs


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    """Return a store and a cache in the test's own directory."""
    return Directories(tmp_path)


def test_a_link_is_the_same_inode_with_owner_mode_and_marks(directories: Directories) -> None:
    """A linked image has its cache name on Glance's inode, with owner, mode and marks."""
    assert directories.link_image() == LINKED
    assert directories.link.samefile(directories.source)
    status = directories.link.lstat()
    assert (status.st_uid, status.st_gid) == OWNER
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o644, 2)
    assert directories.marks() == MARKS


def test_a_second_pass_changes_nothing(directories: Directories) -> None:
    """A link that is correct is not touched: not even its ctime changes."""
    directories.link_image()
    before = state(directories.link)
    assert directories.link_image() == PRESENT
    assert state(directories.link) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: path.chmod(0o600), id="mode"),
        pytest.param(lambda path: os.chown(path, 0, 0), id="owner", marks=needs_root),
        pytest.param(lambda path: os.removexattr(path, IMAGE_ID_MARK), id="mark lost"),
        pytest.param(lambda path: os.setxattr(path, IMAGE_ID_MARK, b"another"), id="foreign mark"),
        pytest.param(lambda path: os.setxattr(path, IMAGE_ID_MARK, b"\xff"), id="mark of no text"),
        pytest.param(lambda path: os.setxattr(path, IMAGE_ID_MARK, b""), id="empty mark"),
        pytest.param(lambda path: os.removexattr(path, SIZE_MARK), id="size lost"),
        pytest.param(lambda path: os.setxattr(path, SIZE_MARK, b"4999"), id="another size"),
        pytest.param(
            lambda path: os.setxattr(path, SIZE_MARK, "\N{SUPERSCRIPT TWO}".encode()),
            id="size of no number",
        ),
        pytest.param(
            lambda path: os.setxattr(path, SIZE_MARK, b"9" * 3000), id="size of 3,000 digits"
        ),
    ],
)
def test_a_link_with_wrong_attributes_is_repaired(
    directories: Directories, change: Callable[[Path], None]
) -> None:
    """A link with another owner, mode or mark is repaired, and then it is present again."""
    directories.link_image()
    change(directories.link)
    assert directories.link_image() == REPAIRED
    assert directories.marks() == MARKS
    assert directories.link_image() == PRESENT


def test_a_link_made_by_an_older_script_is_adopted(directories: Directories) -> None:
    """A hard link that somebody else made gets the marks that let it be pruned one day."""
    os.link(directories.source, directories.link)
    assert directories.link_image() == REPAIRED
    assert directories.marks() == MARKS


def test_a_lost_link_is_made_again(directories: Directories) -> None:
    """A link that vanished is made again, with a reason code of its own."""
    directories.link_image()
    directories.link.unlink()
    assert directories.link_image() == LINKED_AGAIN


def test_a_file_without_a_modification_time_is_judged_by_its_ctime(
    directories: Directories,
) -> None:
    """A short file whose mtime is 0, as ceph-fuse leaves it after truncate(2), is waited for."""
    directories.source.write_bytes(DATA[:100])
    os.utime(directories.source, (0, 0))
    assert directories.link_image() == (Outcome.WAITING, Reason.FILE_INCOMPLETE)
    os.utime(directories.source, (1, 1))
    assert directories.link_image() == (Outcome.DAMAGED, Reason.FILE_TOO_SHORT)


def test_a_dry_run_reports_the_same_and_touches_nothing(directories: Directories) -> None:
    """In a dry run the verdicts are those of a real run, and no inode changes."""
    before = state(directories.source)
    assert directories.link_image(dry_run=True) == LINKED
    assert state(directories.source) == before
    assert not os.path.lexists(directories.link)
    directories.link_image()
    directories.link.chmod(0o600)
    before = state(directories.link)
    assert directories.link_image(dry_run=True) == REPAIRED
    assert state(directories.link) == before


@pytest.mark.parametrize(
    ("occupy", "reason"),
    [
        pytest.param(
            lambda path, _: path.write_bytes(b"nova"), Reason.OTHER_FILE, id="another file"
        ),
        pytest.param(
            lambda path, source: path.write_bytes(source.read_bytes()),
            Reason.OTHER_FILE,
            id="a copy of the image",
        ),
        pytest.param(
            lambda path, source: path.symlink_to(source),
            Reason.OTHER_KIND_OF_FILE,
            id="a symbolic link to the image",
        ),
        pytest.param(
            lambda path, _: path.symlink_to("nowhere"),
            Reason.OTHER_KIND_OF_FILE,
            id="a dangling symbolic link",
        ),
        pytest.param(lambda path, _: path.mkdir(), Reason.OTHER_KIND_OF_FILE, id="a directory"),
        pytest.param(lambda path, _: os.mkfifo(path), Reason.OTHER_KIND_OF_FILE, id="a FIFO"),
    ],
)
def test_an_occupied_name_is_never_touched(
    directories: Directories, occupy: Callable[[Path, Path], None], reason: Reason
) -> None:
    """Whatever has the cache name already stays as it is, and so does Glance's file."""
    occupy(directories.link, directories.source)
    before = state(directories.link), state(directories.source)
    assert directories.link_image() == (Outcome.OCCUPIED, reason)
    assert (state(directories.link), state(directories.source)) == before


def test_an_unsafe_file_gets_no_name_owner_or_mode(directories: Directories) -> None:
    """Content that is not what Glance says gets no link, and keeps its owner and its mode."""
    directories.source.write_bytes(b"QFI\xfb" + DATA[4:])
    before = directories.source.stat()
    assert directories.link_image() == (Outcome.REFUSED, Reason.OTHER_CONTENT)
    after = directories.source.stat()
    assert (before.st_uid, before.st_mode) == (after.st_uid, after.st_mode)
    assert not directories.link.exists()


def test_a_file_that_vanishes_during_the_inspection_is_skipped(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that Glance deletes between the inspection and the link is no failure."""

    def delete_file(*_: object) -> None:
        directories.source.unlink()

    monkeypatch.setattr(inspection, "inspect", delete_file)
    assert directories.link_image() == NO_FILE
    assert not directories.link.exists()


def test_a_file_that_vanishes_before_it_is_opened_is_skipped(directories: Directories) -> None:
    """An image that Glance deletes between the first look and the open is no failure."""

    class Late(Store):
        def open_image(self, image_id: str) -> contextlib.AbstractContextManager[int]:
            directories.source.unlink()
            return super().open_image(image_id)

    with Late(str(directories.images), str(directories.cache)) as store:
        verdict = link_image(IMAGE, store, POLICY, dry_run=False)
    assert (verdict.outcome, verdict.reason) == NO_FILE
    assert not directories.link.exists()


def test_a_file_that_is_swapped_for_a_fifo_is_not_opened(directories: Directories) -> None:
    """A FIFO that takes the file's place after the first look is refused, and is never opened."""

    class Late(Store):
        def open_image(self, image_id: str) -> contextlib.AbstractContextManager[int]:
            directories.source.unlink()
            os.mkfifo(directories.source)
            return super().open_image(image_id)

    with Late(str(directories.images), str(directories.cache)) as store:
        verdict = link_image(IMAGE, store, POLICY, dry_run=False)
    assert (verdict.outcome, verdict.reason) == (Outcome.REFUSED, Reason.NOT_A_REGULAR_FILE)


def test_the_file_that_is_linked_is_the_one_that_was_inspected(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is swapped for a symbolic link after the inspection is not followed."""
    inspected = directories.images / "inspected"

    def swap(*_: object) -> None:
        directories.source.rename(inspected)
        directories.source.symlink_to("/etc/passwd")

    monkeypatch.setattr(inspection, "inspect", swap)
    assert directories.link_image() == LINKED
    assert directories.link.samefile(inspected)


@pytest.mark.parametrize(
    ("take_name", "expected"),
    [
        pytest.param(lambda link, source: os.link(source, link), LINKED, id="the same inode"),
        pytest.param(
            lambda link, _: link.write_bytes(DATA),
            (Outcome.OCCUPIED, Reason.OTHER_FILE),
            id="another file",
        ),
        pytest.param(
            lambda link, _: link.symlink_to("/etc/passwd"),
            (Outcome.OCCUPIED, Reason.OTHER_KIND_OF_FILE),
            id="a symbolic link",
        ),
    ],
)
def test_a_name_that_is_taken_at_the_last_moment_is_not_replaced(
    directories: Directories,
    monkeypatch: pytest.MonkeyPatch,
    take_name: Callable[[Path, Path], None],
    expected: Codes,
) -> None:
    """If somebody else makes the name first, it stays, and another file's attributes stay, too."""
    before = attributes(directories.source)

    def take(*_: object) -> None:
        take_name(directories.link, directories.source)

    monkeypatch.setattr(inspection, "inspect", take)
    assert directories.link_image() == expected
    if expected != LINKED:
        assert attributes(directories.source) == before


def test_directories_that_are_replaced_during_a_run_get_nothing(directories: Directories) -> None:
    """A run keeps to the directories that it opened, whatever has their names later."""
    with directories.open() as store:
        directories.images.rename(directories.base / "old-images")
        directories.cache.rename(directories.base / "old-cache")
        others = Directories(directories.base)
        verdict = link_image(IMAGE, store, POLICY, dry_run=False)
    assert (verdict.outcome, verdict.reason) == LINKED
    assert not list(others.cache.iterdir())
    old_link = directories.base / "old-cache" / cache_name(ID)
    assert old_link.samefile(directories.base / "old-images" / ID)


def test_a_cache_that_is_removed_during_a_run_fails_the_image(directories: Directories) -> None:
    """If the cache is gone, the image fails with the operating system's reason."""
    with directories.open() as store:
        directories.cache.rmdir()
        verdict = link_image(IMAGE, store, POLICY, dry_run=False)
    assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
    assert verdict.sentence == "No such file or directory"


def test_only_one_run_has_the_lock(directories: Directories) -> None:
    """While one run holds the lock, another gets a temporary error, and afterwards the lock."""
    with directories.open() as first, directories.open() as second:
        refusal = pytest.raises(AnotherRunError, match=re.escape(str(directories.cache)))
        with first.locked(), refusal, second.locked():
            pass
        with second.locked():
            pass
    assert not list(directories.cache.iterdir())


def test_the_lock_is_an_flock_on_the_directory(directories: Directories) -> None:
    """Any program can take part: the lock is flock(2) on the cache directory itself."""
    descriptor = os.open(directories.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with directories.open() as store, pytest.raises(AnotherRunError), store.locked():
        pass
    os.close(descriptor)


def test_a_process_that_is_stopped_with_the_lock_is_named(directories: Directories) -> None:
    """The message about a held lock names the process, and how to continue one that is stopped."""
    program = (
        "import fcntl, os, signal, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", program, str(directories.cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            with directories.open() as store, pytest.raises(AnotherRunError) as caught:
                store.locked().__enter__()
        finally:
            process.kill()
    assert f"process {process.pid} " in caught.value.message
    assert "kill -CONT" in caught.value.message


def test_no_descriptor_is_left_open(directories: Directories) -> None:
    """A hundred images leave as many descriptors open as there were before."""
    # What other tests have left to be collected is closed at any moment.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with directories.open() as store:
        for _ in range(100):
            link_image(IMAGE, store, POLICY, dry_run=False)
            directories.link.unlink(missing_ok=True)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("missing", ["images", "cache"])
def test_a_missing_directory_is_named(directories: Directories, missing: str) -> None:
    """A directory that is missing is a configuration error that names its option."""
    shutil.rmtree(getattr(directories, missing))
    expected = f"--{missing}-dir .*{missing}: No such file or directory; mount"
    with pytest.raises(ConfigurationError, match=expected):
        directories.open()


@pytest.mark.parametrize("option", ["images", "cache"])
def test_a_file_is_no_directory(directories: Directories, option: str) -> None:
    """A path to something else than a directory is a configuration error."""
    paths = {"images": directories.images, "cache": directories.cache, option: directories.source}
    with pytest.raises(ConfigurationError, match=f"--{option}-dir .*Not a directory"):
        Store(str(paths["images"]), str(paths["cache"]))


def test_one_directory_cannot_be_both(directories: Directories) -> None:
    """Links are never made in Glance's own store."""
    with pytest.raises(ConfigurationError, match="are the same directory"):
        Store(str(directories.images), str(directories.images))


@pytest.mark.parametrize("outer", ["images", "cache"])
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../{name}"])
def test_neither_directory_can_be_inside_the_other(
    directories: Directories, outer: str, spelling: str
) -> None:
    """A cache inside the store, or a store inside the cache, is a configuration error."""
    outside = getattr(directories, outer)
    inside = outside / "inside" / "further"
    inside.mkdir(parents=True)
    path = spelling.format(inside, name=inside.name)
    arguments = (str(outside), path) if outer == "images" else (path, str(outside))
    with pytest.raises(ConfigurationError, match="one is inside the other"):
        Store(*arguments)


def test_a_directory_whose_name_begins_with_the_others_is_beside_it(tmp_path: Path) -> None:
    """The directories ``images`` and ``images-cache`` are beside each other."""
    for name in ("images", "images-cache"):
        (tmp_path / name).mkdir()
    with Store(str(tmp_path / "images"), str(tmp_path / "images-cache")) as store:
        assert store.list_cache() == []


@needs_root
def test_two_file_systems_are_named(directories: Directories) -> None:
    """Two file systems are a configuration error, which names both and what to do."""
    with mounted(directories.base / "other", "-t", "tmpfs", "none") as other:
        expected = f"{directories.images} and {other} are on two file systems"
        with pytest.raises(ConfigurationError, match=expected):
            Store(str(directories.images), str(other))


@needs_root
def test_two_mounts_of_one_file_system_are_named(directories: Directories) -> None:
    """A bind mount has the same device number, and is a configuration error all the same."""
    with mounted(directories.base / "other", "--bind", str(directories.cache)) as other:
        assert other.stat().st_dev == directories.images.stat().st_dev
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            os.link(directories.source, other / "x")
        with pytest.raises(ConfigurationError, match="two mounts of one"):
            Store(str(directories.images), str(other))


# Who can replace the cache directory. Each layout is the mode and owner of the cache, of its parent
# and of the directory above that; 42415 is Glance's user, who owns the store, and 42436 is Nova's.
GLANCE, NOVA = 42415, 42436
Directory = tuple[int, int]
SAFE_LAYOUTS: dict[str, tuple[Directory, Directory, Directory]] = {
    "production.md": ((0o711, NOVA), (0o750, GLANCE), (0o755, 0)),
    "Kolla, outside Glance's tree": ((0o711, NOVA), (0o755, 0), (0o755, 0)),
    "Kolla, inside Glance's tree": ((0o755, GLANCE), (0o755, GLANCE), (0o755, 0)),
    "a cache of everybody": ((0o777, NOVA), (0o755, 0), (0o755, 0)),
    "a cache of root's in /tmp": ((0o755, 0), (0o1777, 0), (0o755, 0)),
    "a parent of root's in /tmp": ((0o755, NOVA), (0o755, 0), (0o1777, 0)),
}
UNSAFE_LAYOUTS: dict[str, tuple[Directory, Directory, Directory]] = {
    "all of instances is exported": ((0o755, NOVA), (0o755, NOVA), (0o755, 0)),
    "a parent of everybody": ((0o755, NOVA), (0o777, 0), (0o755, 0)),
    "a parent of a group": ((0o755, NOVA), (0o775, 0), (0o755, 0)),
    "Glance's own parent of a group": ((0o755, NOVA), (0o770, GLANCE), (0o755, 0)),
    "a cache of Nova's in /tmp": ((0o755, NOVA), (0o1777, 0), (0o755, 0)),
    "a cache of root's in a sticky directory of Nova's": ((0o755, 0), (0o1777, NOVA), (0o755, 0)),
    "a directory further up": ((0o755, NOVA), (0o755, 0), (0o755, NOVA)),
}


def lay_out(place: Path, layout: tuple[Directory, Directory, Directory]) -> Store:
    """Make a layout, and open it."""
    cache = place / "above" / "parent" / "cache"
    cache.mkdir(parents=True)
    images = place / "images"
    images.mkdir()
    os.chown(images, GLANCE, GLANCE)
    for path, (mode, user) in zip((cache, *cache.parents), layout, strict=False):
        os.chown(path, user, user)
        path.chmod(mode)
    return Store(str(images), str(cache))


@needs_root
@pytest.mark.parametrize("layout", SAFE_LAYOUTS)
def test_a_cache_that_only_root_and_glance_can_replace_is_accepted(
    tmp_path: Path, layout: str
) -> None:
    """The layouts of the documents are accepted, and others that are as safe."""
    with lay_out(tmp_path, SAFE_LAYOUTS[layout]) as store:
        assert store.list_cache() == []


@needs_root
@pytest.mark.parametrize("layout", UNSAFE_LAYOUTS)
def test_a_cache_that_others_can_replace_is_refused(tmp_path: Path, layout: str) -> None:
    """A cache that a compute node could replace by a symbolic link is refused, with a remedy."""
    with pytest.raises(ConfigurationError, match="not only root can replace it") as caught:
        lay_out(tmp_path, UNSAFE_LAYOUTS[layout])
    remedy = re.search("run `(.*)`", caught.value.message)
    assert remedy is not None
    subprocess.run(remedy[1], shell=True, check=True)  # noqa: S602
    # One directory may need both, and a sticky one of everybody's is not safe for Nova's cache.
    with contextlib.suppress(ConfigurationError):
        Store(str(tmp_path / "images"), str(tmp_path / "above" / "parent" / "cache")).close()


@needs_root
def test_a_link_in_a_directory_of_others_does_not_hide_it(tmp_path: Path) -> None:
    """A node that replaces a directory above the cache by a link to root's own gets nothing."""
    with lay_out(tmp_path, SAFE_LAYOUTS["Kolla, outside Glance's tree"]):
        pass
    os.chown(tmp_path / "above", NOVA, NOVA)
    (tmp_path / "above" / "parent").rename(tmp_path / "above" / "away")
    (tmp_path / "roots" / "cache").mkdir(parents=True)
    (tmp_path / "above" / "parent").symlink_to(tmp_path / "roots")
    with pytest.raises(ConfigurationError, match="not only root can replace it"):
        Store(str(tmp_path / "images"), str(tmp_path / "above" / "parent" / "cache"))


@needs_root
def test_a_link_of_roots_into_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    """A path through root's own symbolic link is checked where it leads to, as well."""
    with lay_out(tmp_path, SAFE_LAYOUTS["Kolla, outside Glance's tree"]):
        pass
    os.chown(tmp_path / "above", NOVA, NOVA)
    (tmp_path / "link").symlink_to(tmp_path / "above" / "parent")
    with pytest.raises(ConfigurationError, match="not only root can replace it"):
        Store(str(tmp_path / "images"), str(tmp_path / "link" / "cache"))


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_cache_that_is_a_symbolic_link_is_refused(directories: Directories, slash: str) -> None:
    """A cache directory that is a symbolic link is refused, and the message names its target."""
    link = directories.base / "link"
    link.symlink_to("cache")
    with pytest.raises(ConfigurationError, match=f"symbolic link.* name {directories.cache} "):
        Store(str(directories.images), f"{link}{slash}")


def test_a_symbolic_link_of_roots_above_the_cache_is_accepted(tmp_path: Path) -> None:
    """A symbolic link further up, as /var/lib/glance, is fine if only root can change it."""
    (tmp_path / "data").mkdir()
    Directories(tmp_path / "data")
    (tmp_path / "glance").symlink_to("data")
    with Store(str(tmp_path / "glance" / "images"), str(tmp_path / "glance" / "cache")) as store:
        assert store.list_cache() == []


@needs_root
def test_no_inodes_left_fails_one_image_and_leaves_no_name(tmp_path: Path) -> None:
    """A full file system fails the image; when there is room again, the next pass links it."""
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "none") as base:
        directories = Directories(base)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fill(directories.base, Path.touch)
        before = attributes(directories.source)
        verdict = directories.judge()
        assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
        assert "No space left on device; free space" in (verdict.sentence or "")
        assert not directories.link.exists()
        assert attributes(directories.source) == before
        # One for the name, and one for each mark.
        for number in range(3):
            (directories.base / str(number)).unlink()
        assert directories.link_image() == LINKED


@needs_root
def test_a_file_without_room_for_a_mark_says_so(tmp_path: Path) -> None:
    """If a file's own attributes leave no room on ext4, the advice is not to free space."""
    with formatted(tmp_path, "mkfs.ext4", "-q", "-I", "128", "-b", "4096", mebibytes=16) as volume:
        directories = Directories(volume)
        os.setxattr(directories.source, "user.backup", b"x" * 4000)
        before = attributes(directories.source)
        verdict = directories.judge()
        assert (verdict.outcome, verdict.reason) == NOT_KEPT
        assert "getfattr" in (verdict.sentence or "")
        assert "free space" not in (verdict.sentence or "")
        assert attributes(directories.source) == before
        assert not directories.link.exists()
        os.removexattr(directories.source, "user.backup")
        assert directories.link_image() == LINKED


@needs_root
def test_a_read_only_file_system_fails_the_image(tmp_path: Path) -> None:
    """On a read-only file system nothing is changed, and the reason is the system's."""
    with mounted(tmp_path / "read-only", "-t", "tmpfs", "none") as base:
        directories = Directories(base)
        run_tool("mount", "-o", "remount,ro", base)
        verdict = directories.judge()
        assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
        assert (verdict.sentence or "").startswith("Read-only file system; ")
        assert not directories.link.exists()


@needs_root
def test_too_many_links_fail_one_image(tmp_path: Path) -> None:
    """A file with all the names that ext4 allows fails, and another image is linked."""
    with formatted(tmp_path, "mkfs.ext4", "-q", "-N", "64", "-b", "4096", mebibytes=16) as volume:
        directories = Directories(volume)
        names = directories.base / "names"
        names.mkdir()
        with pytest.raises(OSError, match=os.strerror(errno.EMLINK)):
            fill(names, lambda path: os.link(directories.source, path))
        verdict = directories.judge()
        assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
        assert "Too many links" in (verdict.sentence or "")
        assert directories.link_image(directories.add_image()) == LINKED


@needs_root
def test_without_extended_attributes_links_are_made_all_the_same(tmp_path: Path) -> None:
    """On a file system without extended attributes images are linked, and present afterwards."""
    with mounted(tmp_path / "ramfs", "-t", "ramfs", "none") as base:
        directories = Directories(base)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
            os.setxattr(directories.source, IMAGE_ID_MARK, b"x")
        assert directories.link_image() == LINKED
        assert directories.link_image() == PRESENT


@needs_root
def test_a_user_that_may_not_change_the_owner_fails_the_image(directories: Directories) -> None:
    """Without the right to change an owner, the image fails, and the advice is to be root."""
    for path in (directories.base, *directories.base.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)
    os.chown(directories.cache, 65534, 65534)
    os.chown(directories.source, 1, 1)
    directories.source.chmod(0o644)
    policy = LinkPolicy(owner=Owner(65534, 65534), mode=0o644)
    # Python itself may lie where only root reads, so we import everything beforehand.
    directories.link_image(policy=policy, dry_run=True)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        verdict = directories.judge(policy=policy)
    finally:
        os.seteuid(0)
        os.setegid(0)
    assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
    assert verdict.sentence == "Operation not permitted; run the command as root"
    assert not directories.link.exists()


# File systems that do not do what they are asked, made with bindfs(1) and mergerfs(1).


def bind(stack: contextlib.ExitStack, place: Path, *options: str) -> Directories:
    """Make directories below a bindfs mount, for as long as the test takes."""
    stack.enter_context(bound(place, *options))
    return Directories(place / "bound")


@needs_root
def test_an_owner_that_is_not_kept_fails_the_image(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """If chown and chmod succeed and do nothing, as on CIFS, the image is failed and not linked."""
    options = ("--chown-ignore", "--chgrp-ignore", "--chmod-ignore")
    directories = bind(stack, tmp_path, *options)
    verdict = directories.judge()
    assert (verdict.outcome, verdict.reason) == NOT_KEPT
    assert "does not keep" in (verdict.sentence or "")
    assert not directories.link.exists()
    assert os.listxattr(directories.source) == []
    os.link(directories.source, directories.link)
    assert directories.link_image() == NOT_KEPT, "a link is never repaired for ever"


@needs_root
def test_a_change_of_owner_that_is_refused_has_its_usual_causes(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """If root may not change the owner, the sentence names root_squash and other causes."""
    directories = bind(stack, tmp_path, "--chown-deny")
    verdict = directories.judge()
    assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
    assert "root_squash" in (verdict.sentence or "")
    assert not directories.link.exists()


@needs_root
def test_an_immutable_file_fails_alone(tmp_path: Path) -> None:
    """A file that nobody may change fails with a hint to lsattr, and another image is linked."""
    with formatted(tmp_path, "mkfs.ext4", "-q", mebibytes=16) as volume:
        directories = Directories(volume)
        # Only link(2) is refused then.
        os.chown(directories.source, *OWNER)
        directories.source.chmod(0o644)
        os.setxattr(directories.source, IMAGE_ID_MARK, MARKS[0])
        os.setxattr(directories.source, SIZE_MARK, MARKS[1])
        run_tool("chattr", "+i", directories.source)
        verdict = directories.judge()
        run_tool("chattr", "-i", directories.source)
        assert (verdict.outcome, verdict.reason) == SYSTEM_ERROR
        assert "lsattr" in (verdict.sentence or "")
        assert directories.link_image(directories.add_image()) == LINKED


@needs_root
def test_an_immutable_cache_ends_the_pass(tmp_path: Path) -> None:
    """A cache directory that nobody may change is one error, and the file stays as it was."""
    with formatted(tmp_path, "mkfs.ext4", "-q", mebibytes=16) as volume:
        directories = Directories(volume)
        before = attributes(directories.source)
        run_tool("chattr", "+i", directories.cache)
        try:
            with pytest.raises(LinksImpossibleError, match="chattr -i"):
                directories.judge()
        finally:
            run_tool("chattr", "-i", directories.cache)
        assert attributes(directories.source) == before


@needs_root
def test_a_file_system_that_links_nothing_ends_the_pass(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """If link(2) says EXDEV on one mount, that is one error, and the file stays as it was."""
    directory = stack.enter_context(merged(tmp_path))
    images, cache = directory / "images", directory / "cache"
    source = images / ID
    source.write_bytes(DATA)
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        os.link(source, cache / "link")
    before = attributes(source)
    with (
        Store(str(images), str(cache)) as store,
        pytest.raises(LinksImpossibleError, match="mergerfs"),
    ):
        link_image(IMAGE, store, POLICY, dry_run=False)
    assert attributes(source) == before
    assert not os.listdir(cache)


@needs_root
def test_a_file_system_that_dies_is_a_temporary_error(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """A FUSE file system whose process was killed is a temporary error, before and in a pass."""
    process = stack.enter_context(bound(tmp_path))
    directories = Directories(tmp_path / "bound")
    with directories.open() as store:
        process.kill()
        process.wait()
        with pytest.raises(TemporaryError, match="remount it"):
            link_image(IMAGE, store, POLICY, dry_run=False)
        with pytest.raises(TemporaryError, match="remount it"):
            store.list_store()
        with pytest.raises(TemporaryError, match="remount it"):
            store.list_cache()
    with pytest.raises(TemporaryError, match="remount it"):
        directories.open()


# Entries of the cache that an enemy has planted.


@dataclass
class Opens:
    """Counts the opens of what is in a directory, special files included (inotify(7))."""

    inotify: INotify

    def names(self) -> set[str]:
        """Return what was opened in the directory so far."""
        return {event.name for event in self.inotify.read(timeout=0) if event.name}


@pytest.fixture
def opens(directories: Directories) -> Iterator[Opens]:
    """Watch the cache for opens."""
    with contextlib.closing(INotify()) as inotify:
        inotify.add_watch(directories.cache, flags.OPEN)
        yield Opens(inotify)


def make_qcow2(directories: Directories) -> Image:
    """Make the image a qcow2 image, for which another file's first bytes are looked at."""
    QCOW2(directories.source)
    size = directories.source.stat().st_size
    return replace(IMAGE, disk_format="qcow2", size=size)


def link_and_scan(directories: Directories, image: Image) -> None:
    """Do all that a pass does with the cache."""
    with directories.open() as store:
        scan(store, POLICY)
        link_image(image, store, POLICY, dry_run=False)
        scan(store, POLICY)


def test_opens_of_a_fifo_are_noticed(directories: Directories, opens: Opens) -> None:
    """The watch of the tests below sees that a FIFO is opened."""
    os.mkfifo(directories.link)
    os.close(os.open(directories.link, os.O_RDONLY | os.O_NONBLOCK))
    assert opens.names() == {directories.link.name}


@pytest.mark.parametrize("suffix", ["", ".part", ".converted", ".retired"])
def test_a_fifo_is_never_opened(directories: Directories, opens: Opens, suffix: str) -> None:
    """A writer that waits for a reader of a FIFO in the cache waits on after a pass."""
    fifo = directories.cache / (directories.link.name + suffix)
    os.mkfifo(fifo)
    image = make_qcow2(directories)
    with subprocess.Popen(["sh", "-c", 'exec 3> "$0"', str(fifo)]) as writer:
        try:
            link_and_scan(directories, image)
            assert fifo.name not in opens.names()
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.5)
        finally:
            writer.kill()


@needs_root
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
@pytest.mark.parametrize("suffix", ["", ".part", ".retired"])
def test_a_device_is_never_opened(
    directories: Directories, opens: Opens, kind: int, suffix: str
) -> None:
    """A device node that a compute node plants is never opened: that would arm a watchdog."""
    device = directories.cache / (directories.link.name + suffix)
    os.mknod(device, kind | 0o666, os.makedev(1, 3))
    image = make_qcow2(directories)
    link_and_scan(directories, image)
    assert device.name not in opens.names()


def test_attributes_are_read_without_following_links(directories: Directories) -> None:
    """The marks of a symbolic link are none, whatever its target has, even in a race."""
    os.setxattr(directories.source, IMAGE_ID_MARK, ID.encode())
    directories.link.symlink_to(directories.source)
    assert read_marks(str(directories.link)) == Marks()
    assert read_marks(str(directories.source)) == Marks(image_id=ID)
    dangling = directories.cache / "dangling"
    dangling.symlink_to("nowhere")
    assert read_marks(str(dangling)) == Marks()


@needs_root
@pytest.mark.parametrize("name", [IMAGE_ID_MARK, SIZE_MARK, UNUSED_SINCE_MARK, REFUSED_MARK])
def test_a_mark_of_5000_digits_is_no_mark(tmp_path: Path, name: str) -> None:
    """A mark that is longer than ours can be counts as missing, and the pass goes on."""
    with formatted(tmp_path, "mkfs.xfs", "-q") as volume:
        directories = Directories(volume)
        os.setxattr(directories.source, name, b"9" * 5000)
        assert read_marks(str(directories.source)) == Marks()
        directories.link_image()
        assert directories.link_image() == PRESENT
        assert directories.marks() == MARKS


@pytest.mark.parametrize(
    "digits", ["1e400", "nan", "inf", "-5", "5.5.5", "\N{ARABIC-INDIC DIGIT ONE}"]
)
def test_a_time_that_is_no_number_is_no_mark(directories: Directories, digits: str) -> None:
    """A mark with a time is a decimal number of seconds, or counts as missing."""
    os.setxattr(directories.source, UNUSED_SINCE_MARK, digits.encode())
    os.setxattr(directories.source, SIZE_MARK, digits.encode())
    assert read_marks(str(directories.source)) == Marks()


def test_a_foreign_mark_on_an_inode_with_a_third_name_is_corrected(
    directories: Directories,
) -> None:
    """A mark of another image is corrected, even if the inode has a third name somewhere."""
    directories.link_image()
    os.link(directories.source, directories.base / "third name")
    os.setxattr(directories.link, IMAGE_ID_MARK, directories.add_image().id.encode())
    assert directories.link_image() == REPAIRED
    assert directories.marks() == MARKS


def test_the_mark_of_another_image_on_one_inode_stays(directories: Directories) -> None:
    """If two images share one inode, the mark of either is correct for both."""
    image = directories.add_image()
    (directories.images / image.id).unlink()
    os.link(directories.source, directories.images / image.id)
    directories.link_image()
    assert directories.link_image(image) == LINKED
    assert directories.link_image() == PRESENT
    assert directories.link_image(image) == PRESENT


@pytest.mark.parametrize("suffix", [".part", ".converted"])
def test_a_directory_named_like_a_download_keeps_no_image_waiting(
    directories: Directories, suffix: str
) -> None:
    """Only a regular file is a download of Nova's: a directory that a node plants is none."""
    (directories.cache / (directories.link.name + suffix)).mkdir()
    assert directories.link_image() == LINKED


@pytest.mark.parametrize("suffix", [".part", ".converted"])
def test_an_image_that_nova_is_downloading_waits(directories: Directories, suffix: str) -> None:
    """A fresh regular file beside the cache name keeps the image waiting."""
    (directories.cache / (directories.link.name + suffix)).touch()
    assert directories.link_image() == (Outcome.WAITING, Reason.NOVA_IS_DOWNLOADING)


@needs_root
@pytest.mark.parametrize("ctime", ["20010101000000", "20370101000000"])
def test_a_download_that_was_left_behind_keeps_no_image_waiting(tmp_path: Path, ctime: str) -> None:
    """A download that last changed years ago, or years ahead by a wrong clock, is a leftover."""
    with formatted(tmp_path, "mkfs.ext4", "-q", "-I", "256", mebibytes=16) as volume:
        directories = Directories(volume)
        download = directories.link.with_suffix(".part")
        download.touch()
        request = f"set_inode_field /{download.relative_to(volume)} ctime {ctime}"
        edit_unmounted(tmp_path, request)
        assert directories.link_image() == LINKED


# A refused file is inspected once.


def count_inspections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the disk format of each inspection."""
    inspections: list[str] = []
    inspect = inspection.inspect

    def inspect_and_count(descriptor: int, disk_format: str) -> inspection.Objection | None:
        inspections.append(disk_format)
        return inspect(descriptor, disk_format)

    monkeypatch.setattr(inspection, "inspect", inspect_and_count)
    return inspections


def test_a_refused_file_is_not_inspected_again(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process finds the verdict on a refused file, in the same words."""
    inspections = count_inspections(monkeypatch)
    directories.source.write_bytes(b"QFI\xfb" + DATA[4:])
    first = directories.judge()
    assert first.outcome is Outcome.REFUSED
    assert directories.judge() == first
    assert inspections == ["raw"]


def test_a_dry_run_leaves_no_mark_on_a_refused_file(directories: Directories) -> None:
    """In a dry run, the verdict on a refused file is not written down."""
    directories.source.write_bytes(b"QFI\xfb" + DATA[4:])
    before = state(directories.source)
    assert directories.judge(dry_run=True).outcome is Outcome.REFUSED
    assert state(directories.source) == before


@pytest.mark.parametrize("change", ["content", "format"])
def test_a_refused_file_that_changes_is_inspected_again(
    directories: Directories, change: str
) -> None:
    """If the file or what Glance says of it changes, it is inspected anew, and may be linked."""
    image = make_qcow2(directories)
    as_raw = replace(image, disk_format="raw")
    assert directories.judge(as_raw).reason is Reason.OTHER_CONTENT
    assert REFUSED_MARK in os.listxattr(directories.source)
    if change == "content":
        directories.source.write_bytes(bytes(image.size or 0))
        assert directories.link_image(as_raw) == LINKED
    else:
        assert directories.link_image(image) == LINKED
    assert REFUSED_MARK not in os.listxattr(directories.source)


@pytest.mark.parametrize(
    "forgery",
    [
        b"",
        b"\xff\xfe",
        b"KEY\nother_content",
        b"KEY\nlinked_file_is_fine\nno such code",
        b"KEY\nother_content\n\x1b[31mred",
        b"KEY\nother_content\nsentence\nlinked: another line",
        b"0.0.1 raw 5000 0\nother_content\nan older version",
    ],
)
def test_a_forged_refusal_is_no_refusal(directories: Directories, forgery: bytes) -> None:
    """A mark of a refusal that we cannot have written is ignored."""
    directories.source.write_bytes(b"QFI\xfb" + DATA[4:])
    directories.judge()
    key = os.getxattr(directories.source, REFUSED_MARK).split(b"\n")[0]
    mtime = directories.source.stat().st_mtime_ns
    directories.source.write_bytes(DATA)
    os.utime(directories.source, ns=(mtime, mtime))
    os.setxattr(directories.source, REFUSED_MARK, forgery.replace(b"KEY", key))
    assert directories.link_image() == LINKED
