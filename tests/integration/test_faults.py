"""Passes, made in the tests' own process against the real cloud: what they report and survive."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from inotify_simple import INotify, flags

from ln_images import report
from ln_images import scan as scan_module
from ln_images.glance import Glance
from ln_images.model import ConfigurationError, Outcome, Pass, Reason, TemporaryError
from ln_images.session import connect
from ln_images.store import LinksImpossibleError
from ln_images.sync import Sync, SyncOptions
from support.faulty import Answer, Front, Variables
from support.mounts import bound, edit_unmounted, formatted, merged, mounted, run_tool
from support.node import POLICY, Node, block, needs_root

DATA = b"\1" * 5000
EMPTY: Variables = {}
STRANGER = "10000000-0000-4000-8000-000000000000"
Codes = tuple[Outcome, Reason]
LINKED = (Outcome.LINKED, Reason.NO_LINK_YET)
PRESENT = (Outcome.PRESENT, Reason.CORRECT)
REPAIRED = (Outcome.REPAIRED, Reason.WRONG_ATTRIBUTES)
UNKNOWN = (Outcome.SKIPPED, Reason.UNKNOWN_TO_GLANCE)
BEING_COPIED = (Outcome.WAITING, Reason.BEING_COPIED)
OTHER_FILE = (Outcome.OCCUPIED, Reason.OTHER_FILE)
COPY = (Outcome.OCCUPIED, Reason.COPY_OR_EARLIER_IMAGE)
SYSTEM_ERROR = (Outcome.FAILED, Reason.SYSTEM_ERROR)
HOUR = 3600
# FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of linux/fs.h, FS_XFLAG_PROJINHERIT, and the fields of
# struct fsxattr.
GETXATTR, SETXATTR, INHERIT = 0x801C581F, 0x401C5820, 0x200
FSXATTR = struct.Struct("=5I8x")


def no_progress(_label: str, _total: int) -> Any:
    """Return a progress bar that nobody sees."""
    return click.progressbar(length=1, hidden=True)


def sync_of(
    node: Node,
    variables: Variables = EMPTY,
    /,
    progress: Any = no_progress,
    disk_formats: Any = POLICY.disk_formats,
    **options: Any,
) -> Sync:
    """Return what makes passes on a node."""
    directories = {"images_dir": str(node.images), "cache_dir": str(node.cache)}
    policy = replace(POLICY, disk_formats=disk_formats)
    connection = connect(node.environment(**variables), 30)
    return Sync(
        SyncOptions(policy=policy, **directories | options), Glance(connection, "admin"), progress
    )


def codes(pass_: Pass) -> dict[str, Codes]:
    """Return outcome and reason code of each image by its id, or by a name if it has no id."""
    results = {
        result.id or result.cache_name: (result.verdict.outcome, result.verdict.reason)
        for result in pass_.results
    }
    return results | dict.fromkeys(pass_.present, PRESENT)


def sentence(pass_: Pass, image_id: str) -> str:
    """Return the sentence of one image's verdict."""
    (result,) = [result for result in pass_.results if result.id == image_id]
    return result.verdict.sentence or ""


def in_directory(directory: Path) -> dict[str, Any]:
    """Return the options for a store and a cache elsewhere than the cloud's, and make both."""
    for name in ("images", "cache"):
        (directory / name).mkdir(exist_ok=True)
    return {"images_dir": f"{directory}/images", "cache_dir": f"{directory}/cache"}


def make_old(path: Path, seconds: float = 2 * HOUR) -> None:
    """Let a file look as if nobody had written to it for some time."""
    status = path.stat()
    os.utime(path, (status.st_atime, status.st_mtime - seconds))


def forget_image(node: Node, image_id: str) -> None:
    """Let Glance forget an image, as if its database had been purged; its file stays."""
    with node.cloud.database() as database:
        for table in ("image_properties", "image_locations", "image_tags", "image_members"):
            database.execute(f"DELETE FROM {table} WHERE image_id = ?", (image_id,))  # noqa: S608
        database.execute("DELETE FROM images WHERE id = ?", (image_id,))


def state(path: Path) -> tuple[int, ...]:
    """Return all that a pass could change of a file."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_uid, status.st_nlink, status.st_ctime_ns


# Whose store is this?


@pytest.mark.parametrize("hidden", [False, True])
def test_an_empty_store_of_a_cloud_with_images_is_not_mounted(node: Node, hidden: bool) -> None:
    """If no image has a file here and Glance has active ones, hidden or not, the pass fails."""
    empty = node.cache.with_suffix(".empty")
    empty.mkdir()
    assert sync_of(node, images_dir=str(empty)).full_pass().results == [], "a cloud without images"
    node.cloud.create("queued")
    image = node.cloud.image("image", DATA, os_hidden=hidden)
    for options in ({}, {"query_all": True}, {"dry_run": True}):
        with pytest.raises(ConfigurationError, match=r"mount its volume.*are in another store"):
            sync_of(node, images_dir=str(empty), **options).full_pass()
    node.cloud.image_api().post(f"/images/{image}/actions/deactivate")
    assert LINKED not in codes(sync_of(node, images_dir=str(empty)).full_pass()).values()


@needs_root
def test_a_store_that_is_unmounted_between_passes(node: Node, tmp_path: Path) -> None:
    """The next pass of the same process fails: under the mount point is an empty directory."""
    image = node.cloud.image("image", DATA)
    sync = sync_of(node, repeats=True, **in_directory(tmp_path))
    with mounted(tmp_path, "-t", "tmpfs", "none"):
        shutil.copytree(node.images, tmp_path / "images")
        (tmp_path / "cache").mkdir()
        assert codes(sync.full_pass()) == {image: LINKED}
    with pytest.raises(ConfigurationError, match="mount its volume"):
        sync.full_pass()


@pytest.mark.parametrize("options", [{}, {"query_all": True}], ids=["in groups", "all"])
@pytest.mark.parametrize("stray", [False, True])
@pytest.mark.parametrize("is_deleted", [False, True])
def test_images_that_moved_to_another_store(
    node: Node,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, bool],
    stray: bool,
    is_deleted: bool,
) -> None:
    """If marked links prove that the volume is mounted, an empty store is a warning, logged once.

    A stray file in the store changes nothing about that while Glance still knows an image that was
    linked here.
    """
    image = node.cloud.image("moved", DATA)
    sync_of(node).full_pass()
    node.cloud.image("elsewhere", DATA)
    for path in node.images.iterdir():
        path.unlink()
    if is_deleted and not stray:
        forget_image(node, image)
    if stray:
        (node.images / STRANGER).write_bytes(DATA)
    sync = sync_of(node, repeats=True, **options)
    for _ in range(2):
        pass_ = sync.full_pass()
        assert report.exit_status(pass_) == 0
        assert pass_.reclaimable.orphans.count == 1
    warnings = [record for record in caplog.records if "in another store" in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert node.entry(image).exists()


@pytest.mark.parametrize("options", [{}, {"query_all": True}, {"repeats": True}])
def test_a_store_that_glance_knows_nothing_of_is_another_clouds(
    node: Node, options: dict[str, bool]
) -> None:
    """If Glance knows none of the files and marks here, the pass fails and touches nothing."""
    image = node.cloud.image("image", DATA)
    sync = sync_of(node, **options)
    sync.full_pass()
    node.entry(image).chmod(0o600)
    forget_image(node, image)
    node.cloud.create("of another cloud")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="Glance knows none of the 1 images"):
            sync.full_pass()
    assert stat.S_IMODE(node.entry(image).stat().st_mode) == 0o600


def test_an_empty_answer_is_noticed_although_everything_is_linked(node: Node, front: Front) -> None:
    """If nothing needs a link, an empty list of Glance's is noticed all the same."""
    node.cloud.add_many(60)
    sync_of(node).full_pass()
    empty = json.dumps({"images": [], "first": "/v2/images", "schema": "/v2/schemas/images"})

    def answer_nothing(path: str) -> str | Answer:
        return Answer(body=empty.encode()) if path.startswith("/v2/images") else path

    _, region = front(answer_nothing)
    for options in ({}, {"repeats": True}, {"query_all": True}):
        with pytest.raises(ConfigurationError, match="Glance knows none of the 60 images"):
            sync_of(node, region, **options).full_pass()


def test_the_last_image_may_be_deleted_during_a_pass(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Glance deletes its only image between the scan and its answer, the pass is fine."""
    image = node.cloud.image("image", DATA)
    list_ids = Glance.list_ids

    def delete_and_list(glance: Glance, ids: list[str]) -> Any:
        if (node.images / image).exists():
            node.cloud.delete(image)
        return list_ids(glance, ids)

    monkeypatch.setattr(Glance, "list_ids", delete_and_list)
    assert codes(sync_of(node).full_pass()) == {}


def test_links_of_another_store_are_not_called_deleted(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """With several stores, no word says of another store's links that their image was deleted."""
    caplog.set_level(logging.DEBUG)
    for name in ("here", "there"):
        node.cloud.image(name, DATA)
    first, second = (node.images.with_name(f"store-{number}") for number in (1, 2))
    for directory, file in zip((first, second), sorted(node.images.iterdir()), strict=True):
        directory.mkdir()
        os.link(file, directory / file.name)
        file.unlink()
    for images_dir in (first, second, first):
        pass_ = sync_of(node, images_dir=str(images_dir)).full_pass()
        assert report.exit_status(pass_) == 0
        ours = [record for record in caplog.records if record.name.startswith("ln_images")]
        messages = [record.getMessage() for record in ours]
        text = "\n".join([report.summary(pass_), report.table(pass_.results), *messages])
        assert "delete" not in text
        assert pass_.reclaimable.orphans.count == 0, "they have another name in their own store"


# What a pass reports.


def test_files_that_glance_does_not_know_are_reported_with_their_size(node: Node) -> None:
    """A file that Glance does not know is skipped, whether it was linked before or not."""
    image, other = (node.cloud.image(name, DATA) for name in ("image", "other"))
    (node.images / STRANGER).write_bytes(DATA)
    pass_ = sync_of(node).full_pass()
    assert codes(pass_) == {image: LINKED, other: LINKED, STRANGER: UNKNOWN}
    assert report.unknown_file_sizes(pass_) == [len(DATA)]
    forget_image(node, image)
    assert codes(sync_of(node, query_all=True).full_pass())[image] == UNKNOWN


def test_leftovers_count_alike_in_every_pass_that_lists_everything(node: Node) -> None:
    """A linked file that Glance has forgotten counts, for whatever reason a pass lists all."""
    image, _ = (node.cloud.image(name, DATA) for name in ("image", "other"))
    sync_of(node).full_pass()
    forget_image(node, image)
    new = node.cloud.add_many(501)
    for options in (
        {},
        {"dry_run": True},
        {"query_all": True},
        {"query_all": True, "dry_run": True},
        {"query_all": True, "repeats": True},
        {"query_all": True, "list_in_flight": False},
    ):
        sync = sync_of(node, **options)
        for _ in range(2 if options.get("repeats") else 1):
            for name in new:
                node.entry(name).unlink(missing_ok=True)
            pass_ = sync.full_pass()
            assert report.unknown_file_sizes(pass_) == [len(DATA)], options
            assert codes(pass_)[image] == UNKNOWN, options


def test_a_problem_is_logged_once_for_as_long_as_it_stands(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused and occupied are warnings for the log file, damaged is an error; all are logged once.

    Another verdict on the same image is logged anew.
    """
    caplog.set_level(logging.INFO)
    refused, taken, damaged = (
        node.cloud.image(name, DATA) for name in ("refused", "taken", "damaged")
    )
    (node.images / refused).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    node.entry(taken).write_bytes(b"nova's")
    sync = sync_of(node, repeats=True)

    def log_of_a_pass() -> dict[str, tuple[str, bool]]:
        sync.full_pass()
        found = {
            record.getMessage().split()[1]: (record.levelname, hasattr(record, "file_only"))
            for record in caplog.records
        }
        caplog.clear()
        return found

    assert log_of_a_pass() == {
        refused: ("WARNING", True),
        taken: ("WARNING", True),
        damaged: ("INFO", False),
    }
    os.truncate(node.images / damaged, 1000)
    assert log_of_a_pass() == {damaged: ("ERROR", False)}
    assert log_of_a_pass() == {}
    node.entry(taken).unlink()
    node.entry(taken).symlink_to("elsewhere")
    assert log_of_a_pass() == {taken: ("WARNING", True)}


@needs_root
def test_repairs_in_a_loop_do_not_fill_the_log(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that changes the mode of its bases in a loop causes one line, and one warning."""
    caplog.set_level(logging.INFO)
    images = node.cloud.add_many(20)
    sync = sync_of(node, repeats=True)
    sync.full_pass()
    caplog.clear()
    for _ in range(10):
        for image in images:
            node.entry(image).chmod(0o600)
        assert set(codes(sync.full_pass()).values()) == {REPAIRED}
    levels = [record.levelname for record in caplog.records if "repaired" in record.getMessage()]
    assert sorted(levels) == ["INFO", "WARNING"]


@needs_root
def test_a_link_that_is_repaired_again_and_again_is_logged_once(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """A process warns once that something changes the owner, whatever is repaired after that."""
    images = [node.cloud.image(str(number), DATA) for number in range(2)]
    sync, warned = sync_of(node, repeats=True), []
    for _ in range(5):
        sync.full_pass()
        for image in images:
            os.chown(node.images / image, 12345, 12345)
        warned.append(sum("is repaired again" in record.getMessage() for record in caplog.records))
    assert warned == [0, 0, 1, 1, 1]
    sync_of(node).full_pass()
    assert node.is_linked(images[0])


@needs_root
def test_the_owner_of_the_cache_is_logged_when_it_changes(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """At -v the owner of the cache directory is logged once, and again when somebody changes it."""
    caplog.set_level(logging.DEBUG, "ln_images")
    sync = sync_of(node, repeats=True)
    for owner in (0, 0, 42436, 42436):
        os.chown(node.cache, owner, owner)
        assert sync.full_pass().directory_owner == (owner, owner)
    owners = [
        record.getMessage().partition(", ")[0].split()[-1]
        for record in caplog.records
        if "should be Nova" in record.getMessage()
    ]
    assert owners == ["0:0", "42436:42436"]


def test_foreign_names_in_the_cache_are_bounded_and_reported(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache full of names that a node made costs a bounded pass and one warning."""
    monkeypatch.setattr(scan_module, "MOST_BASES", 100)
    image = node.cloud.image("image", DATA)
    for number in range(1000):
        (node.cache / f"{number:040x}").touch()
    sync = sync_of(node, repeats=True)
    for expected in (LINKED, PRESENT):
        pass_ = sync.full_pass()
        assert codes(pass_) == {image: expected}
        assert pass_.reclaimable.unmarked.count == 100
        assert len(json.dumps(report.document(pass_, 0, everything=True))) < 4000
    warnings = [record for record in caplog.records if "so many names" in record.getMessage()]
    assert len(warnings) == 1


# What an image becomes.


def test_a_linked_file_that_was_truncated_is_found_in_every_pass(node: Node) -> None:
    """The scan compares the size, so --full is not needed."""
    image = node.cloud.image("image", DATA)
    sync_of(node).full_pass()
    os.truncate(node.images / image, 1000)
    pass_ = sync_of(node).full_pass()
    assert codes(pass_)[image] == (Outcome.DAMAGED, Reason.LINKED_FILE_WRONG_SIZE)
    assert "1000 of 5000 bytes" in sentence(pass_, image)


def test_an_id_that_was_created_again_is_occupied(node: Node) -> None:
    """If a tenant creates an id anew with other content, nothing fails and no base is renamed.

    Servers may use the base of the earlier image, so the sentence suggests no ``mv``.
    """
    image = node.cloud.image("first", DATA)
    sync_of(node).full_pass()
    node.cloud.delete(image)
    forget_image(node, image)
    node.cloud.create("again", id=image)
    node.cloud.upload(image, b"\2" * len(DATA))
    before = state(node.entry(image))
    for options in ({}, {"query_all": True}):
        pass_ = sync_of(node, **options).full_pass()
        assert codes(pass_) == {image: COPY}
        assert report.exit_status(pass_) == 0
        assert not {"mv", "rename", "rm"} & set(sentence(pass_, image).replace("`", " ").split())
    assert state(node.entry(image)) == before
    assert node.entry(image).read_bytes() == DATA


@pytest.mark.parametrize("setting", [{}, {"os_glance_importing_to_stores": "file"}])
def test_a_file_that_is_too_short_is_damaged_after_an_hour(
    node: Node, setting: dict[str, str]
) -> None:
    """A short file waits for an hour; then it is damaged, unless Glance is copying to it."""
    image = node.cloud.image("image", DATA)
    os.truncate(node.images / image, len(DATA) - 1)
    set_properties(node, image, setting)
    assert codes(sync_of(node).full_pass())[image][0] is Outcome.WAITING
    make_old(node.images / image)
    pass_ = sync_of(node).full_pass()
    if setting:
        assert codes(pass_)[image][0] is Outcome.WAITING
    else:
        assert codes(pass_)[image] == (Outcome.DAMAGED, Reason.FILE_TOO_SHORT)
        assert report.exit_status(pass_) == 1


def set_properties(node: Node, image_id: str, properties: dict[str, str]) -> None:
    """Set properties of an image that the API does not let a user set."""
    with node.cloud.database() as database:
        database.executemany(
            "INSERT INTO image_properties (image_id, name, value, deleted, created_at)"
            " VALUES (?, ?, ?, 0, '2026-01-01 00:00:00')",
            [(image_id, name, value) for name, value in properties.items()],
        )


def test_a_complete_file_is_linked_although_a_copy_was_interrupted(node: Node) -> None:
    """A property that an interrupted copy left behind keeps no image waiting for over an hour."""
    image = node.cloud.image("image", DATA)
    set_properties(node, image, {"os_glance_importing_to_stores": "file"})
    assert codes(sync_of(node).full_pass()) == {image: BEING_COPIED}
    make_old(node.images / image)
    assert codes(sync_of(node).full_pass()) == {image: LINKED}


def test_a_file_time_in_the_future_keeps_no_image_waiting(node: Node) -> None:
    """After a clock that was a year ahead, the times of files lie in the future."""
    short, copied = (node.cloud.image(name, DATA) for name in ("short", "copied"))
    os.truncate(node.images / short, 1000)
    set_properties(node, copied, {"os_glance_importing_to_stores": "file"})
    for image in (short, copied):
        make_old(node.images / image, -365 * 24 * HOUR)
    assert codes(sync_of(node).full_pass()) == {
        short: (Outcome.DAMAGED, Reason.FILE_TOO_SHORT),
        copied: LINKED,
    }


def test_an_image_that_is_signed_after_it_was_linked_is_reported(node: Node) -> None:
    """A link of an image that has a signature now stays, and --full reports it."""
    image = node.cloud.image("image", DATA)
    sync_of(node).full_pass()
    set_properties(node, image, {"img_signature": "c2lnbmVk"})
    pass_ = sync_of(node, query_all=True).full_pass()
    assert codes(pass_) == {image: (Outcome.REFUSED, Reason.SIGNED_AFTER_LINKING)}
    assert node.is_linked(image)


def test_a_compressed_image_is_skipped(node: Node) -> None:
    """An image in a compressed container is not linked, because no hypervisor boots it."""
    image = node.cloud.image("image", DATA)
    with node.cloud.database() as database:
        database.execute("UPDATE images SET container_format = 'compressed'")
    assert codes(sync_of(node).full_pass()) == {image: (Outcome.SKIPPED, Reason.COMPRESSED)}


def test_a_refused_file_is_not_read_again_by_the_next_process(node: Node) -> None:
    """The next pass of cron does not read a refused file again, as inotify shows."""
    image = node.cloud.image("image", DATA)
    # Glance itself refuses such an upload.
    (node.images / image).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    refused = {image: (Outcome.REFUSED, Reason.OTHER_CONTENT)}

    def was_read() -> bool:
        with contextlib.closing(INotify()) as inotify:
            inotify.add_watch(node.images / image, flags.ACCESS)
            assert codes(sync_of(node).full_pass()) == refused
            return bool(inotify.read(timeout=0))

    assert was_read()
    assert not was_read()
    os.utime(node.images / image)
    assert was_read()


# File systems that misbehave.


@needs_root
def test_entries_that_cannot_be_looked_at_stop_nothing(
    node: Node, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """On a damaged ext4 each broken entry is failed, known to Glance or not; the rest is linked."""
    ext4 = stack.enter_context(formatted(tmp_path, "mkfs.ext4", "-q"))
    directories = in_directory(ext4)
    broken, taken, good = (node.cloud.image(name, DATA) for name in ("broken", "taken", "good"))
    images, cache = ext4 / "images", ext4 / "cache"
    skipped = node.cloud.image("skipped", DATA, disk_format="aki", container_format="aki")
    for name in (broken, taken, good, skipped, STRANGER):
        (images / name).write_bytes(DATA)
    foreign = cache / ("0" * 40)
    lost = [
        images / broken,
        images / skipped,
        images / STRANGER,
        cache / node.entry(taken).name,
        foreign,
    ]
    for path in lost[3:]:
        path.touch()
    edit_unmounted(tmp_path, *[f"clri /{path.relative_to(ext4)}" for path in lost])
    for options in ({}, {"query_all": True}, {"repeats": True}):
        sync = sync_of(node, disk_formats=("raw",), **directories, **options)
        sync.full_pass()
        pass_ = sync.full_pass()
        found = codes(pass_)
        assert found.pop(skipped) == (Outcome.SKIPPED, Reason.DISK_FORMAT)
        assert found.pop(good) in (LINKED, PRESENT)
        assert found == dict.fromkeys((broken, taken, STRANGER, foreign.name), SYSTEM_ERROR)
        assert "Structure needs cleaning" in sentence(pass_, broken)


@needs_root
def test_a_file_system_that_dies_is_temporary_and_passes_go_on(
    node: Node, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """While a FUSE mount is dead, each pass is a temporary error; after a remount it links."""
    image = node.cloud.image("image", DATA)
    process = stack.enter_context(bound(tmp_path))
    directories = in_directory(tmp_path / "bound")
    shutil.copy(node.images / image, tmp_path / "bound" / "images")
    sync = sync_of(node, repeats=True, **directories)
    assert codes(sync.full_pass()) == {image: LINKED}
    process.kill()
    process.wait()
    for _ in range(2):
        with pytest.raises(TemporaryError, match="does not respond; remount it"):
            sync.full_pass()
        with pytest.raises(TemporaryError, match="does not respond; remount it"):
            sync.partial_pass([image])
    run_tool("umount", "--lazy", tmp_path / "bound")
    stack.enter_context(bound(tmp_path))
    assert codes(sync.full_pass()) == {image: PRESENT}


@needs_root
def test_the_command_ends_with_75_on_a_dead_mount_and_every_goes_on(
    node: Node, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """The command's status on a dead mount is 75, and with --every it makes pass after pass."""
    node.cloud.image("image", DATA)
    process = stack.enter_context(bound(tmp_path))
    directories = in_directory(tmp_path / "bound")
    process.kill()
    process.wait()
    settings = {
        "LN_IMAGES_IMAGES_DIR": directories["images_dir"],
        "LN_IMAGES_CACHE_DIR": directories["cache_dir"],
    }
    run = node.run(**settings)
    assert run.returncode == 75
    assert "remount it" in run.stderr
    run = node.run("--every", "0.1", "--for", "0.5", **settings)
    assert run.returncode == 75
    assert run.stderr.count("remount it") == 1, "the error is logged once"


@needs_root
def test_a_file_system_that_links_nothing_is_one_error(
    node: Node, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """If link(2) says EXDEV for every image, the pass fails once, and no file keeps an owner."""
    images = [node.cloud.image(str(number), DATA) for number in range(3)]
    directories = in_directory(stack.enter_context(merged(tmp_path)))
    files = [tmp_path / "merged" / "images" / image for image in images]
    for file in files:
        shutil.copy(node.images / file.name, file)
    before = [(file.stat().st_uid, file.stat().st_mode, os.listxattr(file)) for file in files]
    with pytest.raises(LinksImpossibleError, match="refuses hard links") as caught:
        sync_of(node, **directories).full_pass()
    assert caught.value.exit_code == 2
    after = [(file.stat().st_uid, file.stat().st_mode, os.listxattr(file)) for file in files]
    assert after == before


def test_two_names_of_one_file_are_two_images(node: Node) -> None:
    """If a tool links equal files of the store to each other, each image gets its link."""
    one, two, three = (node.cloud.image(name, DATA) for name in ("one", "two", "three"))
    for other in (two, three):
        (node.images / other).unlink()
        os.link(node.images / one, node.images / other)
    assert codes(sync_of(node).full_pass()) == dict.fromkeys((one, two, three), LINKED)
    for options in ({}, {"query_all": True}):
        found = codes(sync_of(node, **options).full_pass())
        assert found == dict.fromkeys((one, two, three), PRESENT)
    assert all(node.is_linked(image) for image in (one, two, three))


def inodes_differ(directory: Path) -> bool:
    """Return whether a directory lists other inodes than its files have."""
    with os.scandir(directory) as entries:
        return any(entry.inode() != entry.stat().st_ino for entry in entries)


@needs_root
def test_a_directory_whose_inodes_are_not_those_of_its_files(
    node: Node, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """On an overlay of two file systems every image is linked, and the next pass finds it right."""
    images = [node.cloud.image(str(number), DATA) for number in range(3)]
    for name in ("lower", "upper"):
        stack.enter_context(mounted(tmp_path / name, "-t", "tmpfs", "none"))
    for directory in ("lower/images", "lower/cache", "upper/work", "upper/files"):
        (tmp_path / directory).mkdir()
    for image in images:
        (tmp_path / "lower" / "images" / image).write_bytes(DATA)
    layers = (
        f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper/files,workdir={tmp_path}/upper/work"
    )
    overlay = ("-t", "overlay", "-o", f"{layers},xino=off", "none")
    overlaid = stack.enter_context(mounted(tmp_path / "overlaid", *overlay))
    directories = in_directory(overlaid)
    differ = inodes_differ(overlaid / "images")
    assert codes(sync_of(node, **directories).full_pass()) == dict.fromkeys(images, LINKED)
    assert differ or inodes_differ(overlaid / "images"), "this is no such file system"
    for options in ({}, {"query_all": True}):
        second = sync_of(node, **directories, **options).full_pass()
        assert codes(second) == dict.fromkeys(images, PRESENT)


def set_project(path: Path, number: int) -> None:
    """Put a file, or a directory and what is made in it, under a project (xfs_quota(8))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fields = bytearray(FSXATTR.size)
        fcntl.ioctl(descriptor, GETXATTR, fields)
        flags_, extent, extents, _, cow = FSXATTR.unpack(fields)
        inherit = INHERIT if path.is_dir() else 0
        fcntl.ioctl(
            descriptor, SETXATTR, FSXATTR.pack(flags_ | inherit, extent, extents, number, cow)
        )
    finally:
        os.close(descriptor)


@needs_root
def test_a_project_quota_is_reported_before_anything_is_changed(
    node: Node, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """If the cache inherits another project than the files', the pass fails and changes nothing."""
    xfs = stack.enter_context(formatted(tmp_path, "mkfs.xfs", "-q"))
    directories = in_directory(xfs)
    image = node.cloud.image("image", DATA)
    file = xfs / "images" / image
    file.write_bytes(DATA)
    before = state(file)
    set_project(xfs / "cache", 7)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(
            ConfigurationError, match=r"under a project quota \(project 7\).*put both directories"
        ):
            sync_of(node, **directories, **options).full_pass()
    assert state(file) == before
    set_project(file, 7)
    assert codes(sync_of(node, **directories).full_pass()) == {image: LINKED}


# What a process remembers between its passes.


def test_a_file_that_changes_while_it_is_judged_is_judged_anew(node: Node) -> None:
    """A verdict is remembered for the file that was judged, not for what it has become since."""
    image = node.cloud.image("image", DATA)
    file = node.images / image
    file.write_bytes(DATA + b"more")

    @contextlib.contextmanager
    def progress(_label: str, _total: int) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(update=lambda _: os.truncate(file, len(DATA)))

    sync = sync_of(node, repeats=True, progress=progress)
    assert codes(sync.full_pass())[image] == (Outcome.REFUSED, Reason.FILE_TOO_LONG)
    assert codes(sync.full_pass())[image] == LINKED


def test_a_file_that_was_judged_once_is_not_queried_again(node: Node, front: Front) -> None:
    """With --every, 501 files that get no link cost one listing, and then one request a pass.

    That request is about 50 of them, and proves that this is still their cloud.
    """
    images = sorted(node.cloud.add_many(501))
    server, region = front()
    sync = sync_of(node, region, repeats=True, list_in_flight=False, disk_formats=("qcow2",))

    def list_requests() -> list[str]:
        server.paths.clear()
        skipped = (Outcome.SKIPPED, Reason.DISK_FORMAT)
        assert codes(sync.full_pass()) == dict.fromkeys(images, skipped)
        return [path for path in server.paths if path.startswith("/v2/images")]

    assert len(list_requests()) >= 2, "a listing has a part for hidden images"
    for _ in range(2):
        (request,) = list_requests()
        assert sum(image in request for image in images) == 50
    os.utime(node.images / images[7])
    (request,) = list_requests()
    assert [image for image in images if image in request] == [images[7]]


def test_what_was_remembered_gives_way_to_a_complete_list(node: Node) -> None:
    """If a pass lists everything, an image that Glance has forgotten is reported as unknown."""
    image = node.cloud.image("image", DATA)
    node.cloud.image("other", DATA)
    sync = sync_of(node, repeats=True, disk_formats=("qcow2",))
    assert codes(sync.full_pass())[image] == (Outcome.SKIPPED, Reason.DISK_FORMAT)
    forget_image(node, image)
    node.cloud.add_many(501)
    assert codes(sync.full_pass())[image] == UNKNOWN


# docs/recovery.md: copies of linked files.


@needs_root
@pytest.mark.parametrize("with_attributes", [True, False])
@pytest.mark.parametrize("copied", ["both directories", "deduplicated store"])
def test_the_way_from_copies_back_to_links(
    node: Node, tmp_path: Path, with_attributes: bool, copied: str
) -> None:
    """The block of docs/recovery.md turns copies of linked files into links again.

    A base with other content is left alone, and so is a base that is no regular file. The block
    also completes what an earlier run has left half done.
    """
    one, two, changed, odd = (
        node.cloud.image(name, DATA) for name in ("one", "two", "changed", "odd")
    )
    sync_of(node).full_pass()
    copy = "--archive" if with_attributes else "--recursive"
    place = tmp_path / "glance"
    place.mkdir()
    images, cache = place / "images", place / "imagecache"
    subprocess.run(["cp", copy, node.images, images], check=True)
    subprocess.run(["cp", copy, node.cache, cache], check=True)
    here = Node(node.cloud, cache)
    if copied == "deduplicated store":
        for image in (one, two):
            here.entry(image).unlink()
            os.link(images / image, here.entry(image))
        (images / two).unlink()
        os.link(images / one, images / two)
    (images / changed).write_bytes(b"\2" * len(DATA))
    here.entry(odd).unlink()
    here.entry(odd).symlink_to(images / odd)
    directories: dict[str, Any] = {"images_dir": str(images), "cache_dir": str(cache)}
    expected = COPY if with_attributes else OTHER_FILE
    before = codes(sync_of(node, **directories).full_pass())
    assert before[two] == expected or copied == "deduplicated store"
    assert before[changed] == expected
    script = block("from-copies-to-links").replace("/var/lib/glance", str(place))
    bases = {image: here.entry(image).lstat().st_ino for image in (one, two, changed)}
    # An earlier run was interrupted before its last step.
    kept = cache / f"{here.entry(two).name}.copy"
    os.link(here.entry(two), kept)
    os.link(images / two, kept.with_suffix(".new"))
    subprocess.run(["sh", "-eu", "-c", script], check=True, cwd="/", timeout=60)
    after = codes(sync_of(node, query_all=True, **directories).full_pass())
    assert after[one] in (REPAIRED, PRESENT)
    assert after[two] in (REPAIRED, PRESENT)
    assert after[changed] == expected
    assert after[odd] == (Outcome.OCCUPIED, Reason.OTHER_KIND_OF_FILE)
    for image in (one, two):
        assert here.entry(image).samefile(images / image)
    # What servers may have open is still there, under another name.
    assert kept.stat().st_ino == bases[two]
    assert here.entry(changed).stat().st_ino == bases[changed]
    final = codes(sync_of(node, query_all=True, **directories).full_pass())
    assert (final[one], final[two]) == (PRESENT, PRESENT)
