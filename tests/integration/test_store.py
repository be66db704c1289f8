"""The two directories: real files, real mounts, real faults. Nothing of ``os`` is patched."""

import errno
import fcntl
import gc
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ln_images.disk import Disk
from ln_images.inode import MARK, SIZE_MARK
from ln_images.plan import cache_name

from ln_images import inspection
from ln_images.model import AnotherRunError, ConfigurationError, Image, Outcome, Verdict
from ln_images.options import Options
from support.node import DEFAULTS, OWNER, needs_root

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
DATA = b"\x01" * 5000
IMAGE = Image(ID, "name", "active", "raw", len(DATA))
MARKS = (ID.encode(), b"5000")
OPTIONS = replace(DEFAULTS, disk_formats=("raw",))
LINKED, PRESENT, REPAIRED = (
    Verdict(Outcome.LINKED),
    Verdict(Outcome.PRESENT),
    Verdict(Outcome.REPAIRED),
)


@dataclass
class Store:
    """A store with one image and an empty cache beside it."""

    base: Path

    def __post_init__(self) -> None:
        self.images, self.cache = self.base / "images", self.base / "cache"
        self.images.mkdir()
        self.cache.mkdir()
        self.source, self.link = self.images / ID, self.cache / cache_name(ID)
        self.source.write_bytes(DATA)
        self.source.chmod(0o640)

    def open(self) -> Disk:
        """Both directories, as the command opens them."""
        return Disk(str(self.images), str(self.cache))

    def settle(self, image: Image = IMAGE, options: Options = OPTIONS) -> Verdict:
        """What one image gets when it is settled for the tests' owner."""
        with self.open() as disk:
            return disk.settle(image, options)

    def marks(self) -> tuple[bytes, bytes]:
        """The marks of the link: whose it is, and of what size."""
        return os.getxattr(self.link, MARK), os.getxattr(self.link, SIZE_MARK)

    def another(self) -> Image:
        """A second finished image."""
        image = replace(IMAGE, id=ID.replace("f", "e"))
        shutil.copy(self.source, self.images / image.id)
        return image


def fill(directory: Path, make: Callable[[Path], None]) -> None:
    """Makes names in a directory until the file system refuses."""
    for number in range(66_000):
        make(directory / str(number))


def state(path: Path) -> tuple[int, ...]:
    """All that a run could change of a file, times included."""
    status = path.lstat()
    return (
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_ctime_ns,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in the test's own directory."""
    return Store(tmp_path)


Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts file systems below the test's directory, and takes them away again."""
    mounted: list[Path] = []

    def mount(*arguments: str, name: str = "mounted") -> Path:
        target = tmp_path / name
        target.mkdir()
        subprocess.run(["mount", *arguments, target], check=True, capture_output=True)
        mounted.append(target)
        return target

    yield mount
    for target in reversed(mounted):
        subprocess.run(["umount", "--lazy", target], check=True)


def test_a_link_is_the_same_inode_with_owner_mode_and_mark(store: Store) -> None:
    """A linked image has its cache name on Glance's own inode, with the owner, mode and mark it must have."""
    assert store.settle() == LINKED
    assert store.link.samefile(store.source)
    status = store.link.lstat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_nlink) == (
        *OWNER,
        0o644,
        2,
    )
    assert store.marks() == MARKS


def test_a_second_pass_changes_nothing(store: Store) -> None:
    """What is present is not touched.

    Not even its ctime changes, which tells when a base was last used.
    """
    store.settle()
    before = state(store.link)
    assert store.settle() == PRESENT
    assert state(store.link) == before


@pytest.mark.parametrize(
    "drift",
    [
        pytest.param(lambda path: path.chmod(0o600), id="mode"),
        pytest.param(lambda path: os.chown(path, 0, 0), id="owner", marks=needs_root),
        pytest.param(lambda path: os.removexattr(path, MARK), id="mark lost"),
        pytest.param(lambda path: os.setxattr(path, MARK, b"another"), id="mark of another"),
        pytest.param(lambda path: os.setxattr(path, MARK, b"\xff"), id="mark of no text"),
        pytest.param(lambda path: os.setxattr(path, MARK, b""), id="empty mark"),
        pytest.param(lambda path: os.removexattr(path, SIZE_MARK), id="size lost"),
        pytest.param(lambda path: os.setxattr(path, SIZE_MARK, b"4999"), id="another size"),
        pytest.param(
            lambda path: os.setxattr(path, SIZE_MARK, "\N{SUPERSCRIPT TWO}".encode()),
            id="size of no number",
        ),
    ],
)
def test_a_link_that_has_drifted_is_repaired(store: Store, drift: Callable[[Path], None]) -> None:
    """Owner, mode and mark of a link that stands are mended, and then it is present again."""
    store.settle()
    drift(store.link)
    assert store.settle() == REPAIRED
    assert store.marks() == MARKS
    assert store.settle() == PRESENT


def test_a_link_made_by_an_older_script_is_adopted(store: Store) -> None:
    """A hard link that somebody else made is right as it is, and gets the mark that lets it be pruned one day."""
    os.link(store.source, store.link)
    assert store.settle() == REPAIRED
    assert store.marks() == MARKS


def test_a_lost_link_is_put_back(store: Store) -> None:
    """A link that vanished is made again."""
    store.settle()
    store.link.unlink()
    assert store.settle() == LINKED


def test_a_dry_run_says_the_same_and_touches_nothing(store: Store) -> None:
    """Under a dry run the verdicts are those of the real run, and neither directory nor inode changes."""
    before = state(store.source)
    assert store.settle(options=replace(OPTIONS, dry_run=True)) == LINKED
    assert state(store.source) == before
    assert not os.path.lexists(store.link)
    store.settle()
    store.link.chmod(0o600)
    before = state(store.link)
    assert store.settle(options=replace(OPTIONS, dry_run=True)) == REPAIRED
    assert state(store.link) == before


@pytest.mark.parametrize(
    "occupy",
    [
        pytest.param(lambda path, _: path.write_bytes(b"nova"), id="a file"),
        pytest.param(
            lambda path, source: path.write_bytes(source.read_bytes()), id="a copy of the image"
        ),
        pytest.param(
            lambda path, source: path.symlink_to(source), id="a symbolic link to the image"
        ),
        pytest.param(lambda path, _: path.symlink_to("nowhere"), id="a dangling symbolic link"),
        pytest.param(lambda path, _: path.mkdir(), id="a directory"),
        pytest.param(lambda path, _: os.mkfifo(path), id="a FIFO"),
    ],
)
def test_an_occupied_name_is_never_touched(
    store: Store, occupy: Callable[[Path, Path], None]
) -> None:
    """Whatever has the cache name already stays as it is, and so does Glance's file."""
    occupy(store.link, store.source)
    before = state(store.link), state(store.source)
    assert store.settle().outcome is Outcome.OCCUPIED
    assert (state(store.link), state(store.source)) == before


def test_an_unsafe_file_is_refused_before_anything_is_changed(store: Store) -> None:
    """Content that is not what Glance says gets no name, and its owner and mode stay."""
    store.source.write_bytes(b"QFI\xfb" + DATA[4:])
    before = state(store.source)
    assert store.settle().outcome is Outcome.REFUSED
    assert state(store.source) == before
    assert not store.link.exists()


def test_a_file_that_vanishes_while_it_is_inspected_is_skipped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is deleted between look and link is no failure."""

    def objection(*_: object) -> None:
        store.source.unlink()

    monkeypatch.setattr(inspection, "objection", objection)
    with store.open() as disk:
        assert disk.settle(IMAGE, OPTIONS) == Verdict(Outcome.SKIPPED, "no file here")
    assert not store.link.exists()


def test_a_file_that_vanishes_between_open_and_link_is_skipped(store: Store) -> None:
    """A fresh look decides after the open: an image deleted meanwhile is no failure."""
    with store.open() as disk, disk.opened(ID) as descriptor:
        store.source.unlink()
        assert disk._link(descriptor, IMAGE, OPTIONS) == Verdict(Outcome.SKIPPED, "no file here")
    assert not store.link.exists()


def test_a_file_that_vanishes_between_look_and_open_is_skipped(store: Store) -> None:
    """What was there when it was looked at need not be there when it is opened."""

    class Late(Disk):
        def opened(self, image_id: str) -> AbstractContextManager[int]:
            store.source.unlink()
            return super().opened(image_id)

    with Late(str(store.images), str(store.cache)) as disk:
        assert disk.settle(IMAGE, OPTIONS) == Verdict(Outcome.SKIPPED, "no file here")
    assert not store.link.exists()


def test_what_is_linked_is_what_was_opened(store: Store) -> None:
    """A source that is swapped for another file after it was checked is not followed.

    The checked inode is linked.
    """
    with store.open() as disk, disk.opened(ID) as descriptor:
        store.source.rename(store.images / "checked")
        store.source.symlink_to("/etc/passwd")
        assert disk._link(descriptor, IMAGE, OPTIONS) == LINKED
    assert store.link.samefile(store.images / "checked")


def test_a_name_taken_in_the_last_moment_is_judged_anew(store: Store) -> None:
    """Where another process makes the name first, the same inode is present and another is occupied."""
    with store.open() as disk, disk.opened(ID) as descriptor:
        disk._mend(descriptor, IMAGE, OPTIONS)
        os.link(store.source, store.link)
        assert disk._link(descriptor, IMAGE, OPTIONS) == PRESENT
        store.link.unlink()
        store.link.write_bytes(DATA)
        assert disk._link(descriptor, IMAGE, OPTIONS).outcome is Outcome.OCCUPIED


def test_directories_replaced_in_the_middle_of_a_run_lead_nowhere_else(store: Store) -> None:
    """A run keeps to the directories it opened.

    New ones under their names get nothing, and nothing is overwritten.
    """
    with store.open() as disk:
        store.images.rename(store.base / "old-images")
        store.cache.rename(store.base / "old-cache")
        other = Store(store.base)
        assert disk.settle(IMAGE, OPTIONS) == LINKED
    assert not list(other.cache.iterdir())
    assert (store.base / "old-cache" / cache_name(ID)).samefile(store.base / "old-images" / ID)


def test_a_cache_directory_removed_in_the_middle_of_a_run_fails_the_image(store: Store) -> None:
    """Where the cache is gone, the image fails with the operating system's reason."""
    with store.open() as disk:
        store.cache.rmdir()
        assert disk.settle(IMAGE, OPTIONS) == Verdict(Outcome.FAILED, "No such file or directory")


def test_the_lock_is_held_and_dropped(store: Store) -> None:
    """While one run holds the lock another is turned away with a temporary error.

    Afterwards it gets it.
    """
    with store.open() as first, store.open() as second:
        with (
            first.locked(),
            pytest.raises(AnotherRunError, match=re.escape(str(store.cache))),
            second.locked(),
        ):
            pass
        with second.locked():
            pass
    assert not list(store.cache.iterdir())


def test_the_lock_is_an_flock_on_the_directory(store: Store) -> None:
    """Any program can take part: the lock is flock(2) on the cache directory itself."""
    descriptor = os.open(store.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with store.open() as disk, pytest.raises(AnotherRunError), disk.locked():
        pass
    os.close(descriptor)


def test_no_descriptor_is_left_open(store: Store) -> None:
    """A hundred images leave as many descriptors open as there were before."""
    # What other tests have left to be collected is closed at any moment.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with store.open() as disk:
        for _ in range(100):
            disk.settle(IMAGE, OPTIONS)
            store.link.unlink(missing_ok=True)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("missing", ["images", "cache"])
def test_a_missing_directory_is_named(store: Store, missing: str) -> None:
    """A directory that is not there is a configuration error that names its option and itself."""
    shutil.rmtree(getattr(store, missing))
    with pytest.raises(
        ConfigurationError, match=f"--{missing}-dir .*{missing}: No such file or directory"
    ):
        store.open()


def test_a_file_is_no_directory(store: Store) -> None:
    """A path to something else than a directory is a configuration error."""
    with pytest.raises(ConfigurationError, match="Not a directory"):
        Disk(str(store.source), str(store.cache))


def test_one_directory_cannot_be_both(store: Store) -> None:
    """Links are never mixed into Glance's own store."""
    with pytest.raises(ConfigurationError, match="one directory"):
        Disk(str(store.images), str(store.images))


@needs_root
def test_two_file_systems_are_named(store: Store, mount: Mount) -> None:
    """No hard link crosses file systems.

    That is said at the start, with both names and the mend.
    """
    other = mount("-t", "tmpfs", "none")
    with pytest.raises(
        ConfigurationError, match=f"{store.images} and {other} are on two file systems"
    ):
        Disk(str(store.images), str(other))


@needs_root
def test_two_mounts_of_one_file_system_are_named(store: Store, mount: Mount) -> None:
    """A bind mount has the same device number, and link(2) refuses it all the same.

    Said at the start, too.
    """
    other = mount("--bind", str(store.cache))
    assert other.stat().st_dev == store.images.stat().st_dev
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        os.link(store.source, other / "x")
    with pytest.raises(ConfigurationError, match="two mounts of one"):
        Disk(str(store.images), str(other))


@needs_root
def test_no_inodes_left_fails_one_image_and_leaves_no_name(mount: Mount) -> None:
    """A full file system is that image's failure, in the system's words.

    With room again the next pass links it.
    """
    store = Store(mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "none"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fill(store.base, Path.touch)
    assert store.settle() == Verdict(Outcome.FAILED, "No space left on device")
    assert not store.link.exists()
    # One for the name, and one for each mark.
    for number in range(3):
        (store.base / str(number)).unlink()
    assert store.settle() == LINKED


@needs_root
def test_a_read_only_file_system_fails_the_image(mount: Mount) -> None:
    """On a read-only file system nothing is changed, and the reason is the system's."""
    store = Store(mount("-t", "tmpfs", "none"))
    subprocess.run(["mount", "-o", "remount,ro", store.base], check=True)
    assert store.settle() == Verdict(Outcome.FAILED, "Read-only file system")
    assert not store.link.exists()


@needs_root
def test_too_many_links_fail_the_image(mount: Mount, tmp_path: Path) -> None:
    """An inode with all the links its file system allows is that image's failure.

    Another image is linked.
    """
    disk_file = tmp_path / "ext4"
    subprocess.run(["truncate", "--size=16M", disk_file], check=True)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    subprocess.run([str(mkfs), "-q", "-N", "64", "-b", "4096", disk_file], check=True)
    store = Store(mount("-o", "loop", str(disk_file)))
    names = store.base / "names"
    names.mkdir()
    with pytest.raises(OSError, match=os.strerror(errno.EMLINK)):
        fill(names, lambda path: os.link(store.source, path))
    assert store.settle() == Verdict(Outcome.FAILED, "Too many links")
    assert store.settle(store.another()) == LINKED


@needs_root
def test_without_extended_attributes_links_are_made_all_the_same(mount: Mount) -> None:
    """On a file system that knows no user attributes images are linked without a mark, and present afterwards."""
    store = Store(mount("-t", "ramfs", "none"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
        os.setxattr(store.source, MARK, b"x")
    assert store.settle() == LINKED
    assert store.settle() == PRESENT


@needs_root
def test_what_the_user_may_not_do_fails_the_image(store: Store) -> None:
    """Without the right to change an owner, the image fails with the system's words and gets no name."""
    for path in (store.base, *store.base.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)
    os.chown(store.cache, 65534, 65534)
    os.chown(store.source, 1, 1)
    store.source.chmod(0o644)
    # Python itself may lie where only root reads: what it imports on the way it has to have by
    # then.
    options = replace(OPTIONS, owner=(65534, 65534))
    store.settle(options=replace(options, dry_run=True))
    os.setegid(65534)
    os.seteuid(65534)
    try:
        verdict = store.settle(options=options)
    finally:
        os.seteuid(0)
        os.setegid(0)
    assert verdict == Verdict(Outcome.FAILED, "Operation not permitted: run it as root")
    assert not store.link.exists()
