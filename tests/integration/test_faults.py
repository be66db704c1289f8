"""Passes, made in the tests' own process against the real cloud.

What they tell, and what stops none of them.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from ln_images.keystone import connect
from ln_images.plan import UNKNOWN
from ln_images.run import Passes

from ln_images.model import ConfigurationError, Outcome, Pass
from support.faulty import Front, Variables
from support.node import DEFAULTS, Node, needs_root

DATA = b"\1" * 5000
EMPTY: Variables = {}
STRANGER = "10000000-0000-4000-8000-000000000000"
# FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of linux/fs.h, FS_XFLAG_PROJINHERIT, and where struct
# fsxattr has the project.
GETXATTR, SETXATTR, INHERIT = 0x801C581F, 0x401C5820, 0x200
FSXATTR = struct.Struct("=5I8x")


def no_progress(_label: str, _total: int) -> Any:
    """Nobody looks."""
    return click.progressbar(length=1, hidden=True)


def passes_of(
    node: Node, variables: Variables = EMPTY, /, progress: Any = no_progress, **options: Any
) -> Passes:
    """What makes passes on a node."""
    given = {"images_dir": str(node.images), "cache_dir": str(node.cache), **options}
    return Passes(replace(DEFAULTS, **given), connect(node.environment(**variables), 30), progress)


def told(made: Pass) -> dict[str, tuple[Outcome, str]]:
    """The outcome and reason of each image, or of a name where it is none's."""
    found = {result.image.id or result.cache_name: tuple(result.verdict) for result in made.results}
    return {**found, **dict.fromkeys(made.settled, (Outcome.PRESENT, ""))}  # type: ignore[dict-item]


def outcomes(made: Pass) -> dict[str, Outcome]:
    """The same without reasons."""
    return {name: outcome for name, (outcome, _) in told(made).items()}


@contextlib.contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[Path]:
    """Something mounted on a directory for a while."""
    subprocess.run(["mount", *arguments, directory], check=True, capture_output=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@contextlib.contextmanager
def formatted(place: Path, *mkfs: str) -> Iterator[Path]:
    """A file system in the file ``device`` of a directory, mounted beside it, with a store and a cache on it."""
    device, directory = place / "device", place / "volume"
    with device.open("wb") as file:
        file.truncate(320 * 2**20)
    subprocess.run([*mkfs, device], check=True, capture_output=True)
    directory.mkdir()
    with mounted(directory, "-o", "loop", str(device)):
        for name in ("images", "cache"):
            (directory / name).mkdir()
        yield directory


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes such a file system for as long as the test takes."""
    with contextlib.ExitStack() as stack:
        yield lambda *mkfs: stack.enter_context(formatted(tmp_path, *mkfs))


def on(directory: Path) -> dict[str, str]:
    """The options for a store and a cache elsewhere than the cloud's."""
    return {"images_dir": f"{directory}/images", "cache_dir": f"{directory}/cache"}


@pytest.mark.parametrize("hidden", [False, True])
def test_an_empty_store_of_a_cloud_with_images_is_not_mounted(node: Node, hidden: bool) -> None:
    """Where no image has a file and Glance has active ones, hidden or not, that is a fault and no success."""
    empty = node.cache.with_suffix(".empty")
    empty.mkdir()
    assert passes_of(node, images_dir=str(empty)).whole().results == [], "a cloud without images"
    node.cloud.create("queued")
    image = node.cloud.image("image", DATA, os_hidden=hidden)
    for options in ({}, {"full": True}, {"dry_run": True}):
        with pytest.raises(
            ConfigurationError, match=r"none of them has a file in .*: is its volume mounted"
        ):
            passes_of(node, images_dir=str(empty), **options).whole()
    node.cloud.image_api().post(f"/images/{image}/actions/deactivate")
    assert Outcome.LINKED not in outcomes(passes_of(node, images_dir=str(empty)).whole()).values()


@needs_root
def test_a_store_that_is_unmounted_while_passes_are_made(node: Node, tmp_path: Path) -> None:
    """The next pass of the same process says so: under the mount point is an empty directory."""
    image = node.cloud.image("image", DATA)
    for name in ("images", "cache"):
        (tmp_path / name).mkdir()
    passes = passes_of(node, every=1.0, **on(tmp_path))
    with mounted(tmp_path, "-t", "tmpfs", "none"):
        shutil.copytree(node.images, tmp_path / "images")
        (tmp_path / "cache").mkdir()
        assert outcomes(passes.whole()) == {image: Outcome.LINKED}
    with pytest.raises(ConfigurationError, match="is its volume mounted"):
        passes.whole()


def test_files_that_glance_does_not_know_are_told(node: Node) -> None:
    """They are skipped with their size, whether they were linked before or not."""
    image = node.cloud.image("image", DATA)
    (node.images / STRANGER).write_bytes(DATA)
    made = passes_of(node).whole()
    assert told(made) == {image: (Outcome.LINKED, ""), STRANGER: UNKNOWN}
    assert [result.image.size for result in made.results if result.image.id == STRANGER] == [
        len(DATA)
    ]
    with node.cloud.database() as database:
        database.execute(
            "UPDATE images SET id = ? WHERE id = ?", (STRANGER.replace("1", "2"), image)
        )
    assert told(passes_of(node, full=True).whole())[image] == UNKNOWN


def test_what_is_odd_is_logged_once_for_as_long_as_it_stands(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused and occupied are warnings for the file, damaged and failed are errors.

    Another verdict is told anew.
    """
    caplog.set_level(logging.INFO)
    refused, taken, damaged = (
        node.cloud.image(name, DATA) for name in ("refused", "taken", "damaged")
    )
    (node.images / refused).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    node.entry(taken).write_bytes(b"nova's")
    passes = passes_of(node, every=1.0)

    def logged() -> dict[str, tuple[str, bool]]:
        passes.whole()
        found = {
            record.getMessage().split()[1]: (record.levelname, hasattr(record, "file_only"))
            for record in caplog.records
        }
        caplog.clear()
        return found

    assert logged() == {
        refused: ("WARNING", True),
        taken: ("WARNING", True),
        damaged: ("INFO", False),
    }
    os.truncate(node.images / damaged, 1000)
    assert logged() == {damaged: ("ERROR", False)}
    assert logged() == {}
    node.entry(taken).unlink()
    node.entry(taken).symlink_to("elsewhere")
    assert logged() == {taken: ("WARNING", True)}


def test_a_linked_file_that_was_truncated_is_found_in_every_pass(node: Node) -> None:
    """The size in the look tells it, without --full."""
    image = node.cloud.image("image", DATA)
    passes_of(node).whole()
    os.truncate(node.images / image, 1000)
    outcome, reason = told(passes_of(node).whole())[image]
    assert outcome is Outcome.DAMAGED
    assert "1000 of 5000 bytes" in reason


def test_an_id_that_was_made_again_fails_with_the_mend(node: Node) -> None:
    """Servers get the earlier image of the id.

    That is a failure, and what its reason says to do ends it.
    """
    image = node.cloud.image("first", DATA)
    passes_of(node).whole()
    again = node.cache.with_suffix(".again")
    again.write_bytes(b"\2" * len(DATA))
    again.replace(node.images / image)
    outcome, reason = told(passes_of(node).whole())[image]
    assert outcome is Outcome.FAILED
    mend = reason.split("`")[1]
    subprocess.run(["/bin/sh", "-c", mend], cwd=node.cache, check=True)
    assert outcomes(passes_of(node).whole()) == {image: Outcome.LINKED}
    assert node.entry(image).read_bytes() == b"\2" * len(DATA)


@needs_root
def test_a_link_that_is_repaired_again_and_again_is_told_once(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """A process says once that something takes the owner away, whatever is repaired after that."""
    images = [node.cloud.image(str(number), DATA) for number in range(2)]
    passes, warned = passes_of(node, every=1.0), []
    for _ in range(5):
        passes.whole()
        for image in images:
            os.chown(node.images / image, 12345, 12345)
        warned.append(sum("is repaired again" in record.getMessage() for record in caplog.records))
    assert warned == [0, 0, 1, 1, 1]
    passes_of(node).whole()
    assert node.linked(images[0])


@needs_root
def test_another_owner_of_the_directory_is_told_when_it_changes(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """At -v the owner of the cache directory is told once, and again when somebody has changed it."""
    caplog.set_level(logging.DEBUG, "ln_images")
    passes = passes_of(node, every=1.0)
    for owner in (0, 0, 42436, 42436):
        os.chown(node.cache, owner, owner)
        assert passes.whole().directory == (owner, owner)
    assert [record.getMessage().partition(", ")[0].split()[-1] for record in caplog.records] == [
        "0:0",
        "42436:42436",
    ]


@needs_root
def test_entries_that_cannot_be_looked_at_stop_nothing(
    node: Node, volume: Callable[..., Path], tmp_path: Path
) -> None:
    """On a damaged ext4 each is named and failed (EUCLEAN), known to Glance or not, and the rest is linked."""
    ext4 = volume("mkfs.ext4", "-q")
    broken, taken, good = (node.cloud.image(name, DATA) for name in ("broken", "taken", "good"))
    images, cache = ext4 / "images", ext4 / "cache"
    skipped = node.cloud.image("skipped", DATA, disk_format="aki", container_format="aki")
    for name in (broken, taken, good, skipped, STRANGER):
        (images / name).write_bytes(DATA)
    foreign = cache / "foreign"
    lost = [
        images / broken,
        images / skipped,
        images / STRANGER,
        cache / node.entry(taken).name,
        foreign,
    ]
    for path in lost[3:]:
        path.touch()
    clear = [f"clri /{path.relative_to(ext4)}" for path in lost]
    subprocess.run(["umount", ext4], check=True)
    for request in clear:
        subprocess.run(
            ["debugfs", "-w", "-R", request, tmp_path / "device"], check=True, capture_output=True
        )
    subprocess.run(["mount", "-o", "loop", tmp_path / "device", ext4], check=True)
    reason = "Structure needs cleaning"
    for options in ({}, {"full": True}, {"every": 1.0}):
        passes = passes_of(node, disk_formats=("raw",), **on(ext4), **options)
        passes.whole()
        made = told(passes.whole())
        assert made.pop(skipped) == (Outcome.SKIPPED, "disk format aki")
        assert made.pop(good)[0] in (Outcome.LINKED, Outcome.PRESENT)
        assert made == dict.fromkeys(
            (broken, taken, STRANGER, "foreign"), (Outcome.FAILED, reason)
        ), options


def test_two_names_of_one_file_are_two_images(node: Node) -> None:
    """A tool that links equal files in the store takes no image from the look.

    The second pass finds both right.
    """
    one, two, three = (node.cloud.image(name, DATA) for name in ("one", "two", "three"))
    for other in (two, three):
        (node.images / other).unlink()
        os.link(node.images / one, node.images / other)
    assert outcomes(passes_of(node).whole()) == dict.fromkeys((one, two, three), Outcome.LINKED)
    for options in ({}, {"full": True}):
        assert outcomes(passes_of(node, **options).whole()) == dict.fromkeys(
            (one, two, three), Outcome.PRESENT
        )
    assert all(node.linked(image) for image in (one, two, three))


def inodes_differ(directory: Path) -> bool:
    """Whether a directory gives other inodes than its files have."""
    with os.scandir(directory) as entries:
        return any(entry.inode() != entry.stat().st_ino for entry in entries)


@needs_root
def test_a_directory_whose_inodes_are_not_those_of_its_files(node: Node, tmp_path: Path) -> None:
    """On an overlay of two file systems every image is linked, and found right by the next pass."""
    images = [node.cloud.image(str(number), DATA) for number in range(3)]
    for name in ("lower", "upper", "merged"):
        (tmp_path / name).mkdir()
    with (
        mounted(tmp_path / "lower", "-t", "tmpfs", "none"),
        mounted(tmp_path / "upper", "-t", "tmpfs", "none"),
    ):
        for directory in ("lower/images", "upper/work", "upper/files"):
            (tmp_path / directory).mkdir()
        (tmp_path / "lower" / "cache").mkdir()
        for image in images:
            (tmp_path / "lower" / "images" / image).write_bytes(DATA)
        layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper/files,workdir={tmp_path}/upper/work,xino=off"
        with mounted(tmp_path / "merged", "-t", "overlay", "-o", layers, "none") as merged:
            store = merged / "images"
            differ = inodes_differ(store)
            assert outcomes(passes_of(node, **on(merged)).whole()) == dict.fromkeys(
                images, Outcome.LINKED
            )
            assert differ or inodes_differ(store), "no such file system"
            for options in ({}, {"full": True}):
                second = passes_of(node, **on(merged), **options).whole()
                assert outcomes(second) == dict.fromkeys(images, Outcome.PRESENT)


def project(path: Path, number: int) -> None:
    """Puts a file or a directory, and what is made in it, under a project, as `xfs_quota -c "project -s"` does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fields = bytearray(FSXATTR.size)
        fcntl.ioctl(descriptor, GETXATTR, fields)
        flags, extent, extents, _, cow = FSXATTR.unpack(fields)
        inherit = INHERIT if path.is_dir() else 0
        fcntl.ioctl(
            descriptor, SETXATTR, FSXATTR.pack(flags | inherit, extent, extents, number, cow)
        )
    finally:
        os.close(descriptor)


@needs_root
def test_a_project_quota_is_told_before_anything_is_changed(
    node: Node, volume: Callable[..., Path]
) -> None:
    """Where the cache inherits another project than the files', no link can be made.

    One fault, and none gives way.
    """
    xfs = volume("mkfs.xfs", "-q")
    image = node.cloud.image("image", DATA)
    file = xfs / "images" / image
    file.write_bytes(DATA)
    before = file.stat()
    project(xfs / "cache", 7)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(
            ConfigurationError, match=r"under a project quota \(project 7\).*put both directories"
        ):
            passes_of(node, **on(xfs), **options).whole()
    assert file.stat() == before
    project(file, 7)
    assert outcomes(passes_of(node, **on(xfs)).whole()) == {image: Outcome.LINKED}


def test_a_file_that_changes_while_it_is_judged_is_judged_anew(node: Node) -> None:
    """Under --every a verdict is remembered for the file that was judged, not for what it has become meanwhile."""
    image = node.cloud.image("image", DATA)
    file = node.images / image
    file.write_bytes(DATA + b"more")

    @contextlib.contextmanager
    def progress(_label: str, _total: int) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(update=lambda _: os.truncate(file, len(DATA)))

    passes = passes_of(node, every=1.0, progress=progress)
    assert told(passes.whole())[image][0] is Outcome.REFUSED
    assert told(passes.whole())[image][0] is Outcome.LINKED


def test_what_was_judged_once_is_not_asked_about_again(node: Node, front: Front) -> None:
    """Under --every 501 files that get no link cost one listing, and then nothing until one of them changes."""
    images = sorted(node.cloud.add_many(501))
    server, region = front()
    passes = passes_of(node, region, every=1.0, disk_formats=("qcow2",))

    def asked() -> tuple[int, list[str]]:
        server.paths.clear()
        made = passes.whole()
        assert told(made) == dict.fromkeys(images, (Outcome.SKIPPED, "disk format raw"))
        return len(server.paths), [path for path in server.paths if "status=in" not in path]

    listing = len(asked()[1])
    assert listing >= 2
    count, others = asked()
    assert (count <= 2, others) == (True, [])
    os.utime(node.images / images[7])
    count, others = asked()
    assert len(others) <= 2
    assert all(images[7] in path and images[8] not in path for path in others)
    assert others
