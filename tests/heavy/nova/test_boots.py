"""What Nova does with linked images, shown with servers that boot."""

import grp
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rig import AS_THEY_ARE, CACHE, CONVERTED, Rig
from rig_fixtures import Disk
from scenes import (
    command_in_recovery,
    descriptor,
    fails,
    outcome,
    reason_code,
    reboot,
    run_block_in_recovery,
    watching,
)
from support.cloud import wait_until


def test_an_image_without_a_link_is_downloaded_whole(rig: Rig, raw: Disk) -> None:
    """Without a link Glance serves every byte of an image, which is what the other tests count."""
    image = rig.image("unlinked", raw.path)
    server = rig.boot(image)
    assert rig.served(image) == raw.size
    assert rig.proof(server) == raw.md5


def test_a_linked_raw_image_boots_without_a_download(rig: Rig, raw: Disk) -> None:
    """A server of a linked raw image runs on the link itself, and Glance serves no byte of it."""
    image = rig.image("raw", raw.path)
    assert outcome(rig.ln_images(), image) == "linked"
    server = rig.boot(image)
    assert rig.served(image) == 0
    assert rig.proof(server) == raw.md5
    assert rig.node.chain(server)[0]["backing-filename-format"] == "raw"
    assert rig.node.bases(server) == {rig.entry(image).name}
    assert rig.entry(image).samefile(rig.cloud.images / image)


def test_a_start_gives_a_base_to_the_documented_owner(rig: Rig, raw: Disk) -> None:
    """At each start libvirt gives a base to QEMU's user and group, so a pass repairs nothing."""
    image = rig.image("owned", raw.path)
    rig.ln_images()
    before = rig.entry(image).stat()
    server = rig.boot(image)
    for group in (before.st_gid, grp.getgrnam("kvm").gr_gid):
        rig.act(server, "os-stop", "SHUTOFF")
        os.chown(rig.entry(image), -1, group)
        rig.act(server, "os-start", "ACTIVE")
        after = rig.entry(image).stat()
        assert (after.st_uid, after.st_gid, after.st_mode) == (
            before.st_uid,
            before.st_gid,
            before.st_mode,
        )
        assert outcome(rig.ln_images(), image) == "present"


def test_a_guest_reads_its_base_past_the_nodes_memory(rig: Rig, raw: Disk) -> None:
    """QEMU opens a base with O_DIRECT, so that each read goes to the storage node."""
    image = rig.image("direct", raw.path)
    rig.ln_images()
    server = rig.boot(image)
    process, number = descriptor(rig, rig.entry(image).name)
    flags = re.search(
        r"^flags:\s*(\d+)$", Path(f"/proc/{process}/fdinfo/{number}").read_text(), re.MULTILINE
    )
    assert flags
    assert int(flags[1], 8) & os.O_DIRECT
    assert rig.proof(server) == raw.md5


def test_no_server_builds_on_a_base_that_not_everybody_may_read(rig: Rig, raw: Disk) -> None:
    """No server builds on a base of mode 0640, because Nova reads it as its own user."""
    image = rig.image("closed", raw.path)
    rig.ln_images()
    rig.entry(image).chmod(0o640)
    with pytest.raises(RuntimeError, match="ERROR"):
        rig.boot(image)


@pytest.mark.parametrize("setting", [AS_THEY_ARE, CONVERTED])
def test_a_linked_qcow2_image_is_used_as_it_is(rig: Rig, qcow2: Disk, setting: str) -> None:
    """With either force_raw_images, Nova uses a linked qcow2 image as it is, without a download."""
    rig.node.runs_with(DEFAULT=setting)
    image = rig.image("qcow2", qcow2.path, "qcow2")
    rig.ln_images()
    server = rig.boot(image)
    assert rig.served(image) == 0
    assert rig.proof(server) == qcow2.md5
    assert rig.node.chain(server)[0]["backing-filename-format"] == "qcow2"


def test_a_qcow2_link_lost_under_force_raw_images_breaks_its_servers(rig: Rig, qcow2: Disk) -> None:
    """Nova puts a raw copy in place of a lost link; servers fail until the link is back."""
    rig.node.runs_with(DEFAULT=CONVERTED)
    image = rig.image("lost-qcow2", qcow2.path, "qcow2")
    rig.ln_images()
    server = rig.boot(image)
    rig.entry(image).unlink()
    fails(rig, server, "reboot", {"type": "HARD"})
    assert rig.server(server)["status"] == "ERROR"
    fault = rig.server(server)["fault"]
    assert fault["message"] == "libvirtError"
    assert "Image is not in qcow2 format" in fault["details"]
    assert "Image is not in qcow2 format" in Path("/var/log/nova/nova-compute.log").read_text()
    assert rig.served(image) == qcow2.size
    report = rig.ln_images()
    assert outcome(report, image) == "occupied"
    assert reason_code(report, image) == "raw_copy"
    subprocess.run(
        command_in_recovery("mv -n SHA1 SHA1.raw", {"SHA1": rig.entry(image).name}).split(),
        cwd=CACHE,
        check=True,
    )
    assert outcome(rig.ln_images(), image) == "linked"
    reboot(rig, server)
    assert rig.proof(server) == qcow2.md5


def test_a_server_built_on_a_raw_copy_lives_on_in_its_snapshot(rig: Rig, qcow2: Disk) -> None:
    """A server that was built on Nova's raw copy cannot use the link, but its snapshot can boot."""
    rig.node.runs_with(DEFAULT=CONVERTED)
    image = rig.image("copied-qcow2", qcow2.path, "qcow2")
    built = rig.boot(image)
    assert rig.node.chain(built)[0]["backing-filename-format"] == "raw"
    snapshot = rig.snapshot(built)
    wait_until(lambda: rig.cloud.status(snapshot) == "active", "the snapshot", 120)
    rig.wait(built, "ACTIVE")
    rig.act(built, "os-stop", "SHUTOFF")
    subprocess.run(
        command_in_recovery("mv -n SHA1 SHA1.raw", {"SHA1": rig.entry(image).name}).split(),
        cwd=CACHE,
        check=True,
    )
    report = rig.ln_images()
    assert [outcome(report, each) for each in (image, snapshot)] == ["linked", "linked"]
    # What was its boot sector is now the header of a qcow2 file.
    assert rig.node.first_sector(built).startswith(b"QFI\xfb")
    rig.delete(built)
    for each in (image, snapshot):
        assert rig.proof(rig.boot(each)) == qcow2.md5
        assert rig.served(each) == (qcow2.size if each == image else 0)


def test_a_lost_raw_copy_can_be_made_again(rig: Rig, qcow2: Disk) -> None:
    """What the page makes of Glance's file is what a server on Nova's lost raw copy reads."""
    rig.node.runs_with(DEFAULT=CONVERTED)
    image = rig.image("lost-copy", qcow2.path, "qcow2")
    server = rig.boot(image)
    assert rig.node.chain(server)[0]["backing-filename-format"] == "raw"
    rig.act(server, "os-stop", "SHUTOFF")
    rig.entry(image).unlink()
    assert outcome(rig.ln_images(), image) == "linked"
    names = {"SHA1": rig.entry(image).name, "IMAGE_ID": image}
    run_block_in_recovery("qemu-img convert", names, rig)
    reboot(rig, server)
    assert rig.proof(server) == qcow2.md5
    assert reason_code(rig.ln_images(), image) == "raw_copy"


def test_a_qcow2_link_lost_without_force_raw_images_is_only_downloaded_again(
    rig: Rig, qcow2: Disk
) -> None:
    """Without force_raw_images Nova's own copy is the same qcow2, so the server starts."""
    rig.node.runs_with(DEFAULT=AS_THEY_ARE)
    image = rig.image("fetched-qcow2", qcow2.path, "qcow2")
    rig.ln_images()
    server = rig.boot(image)
    rig.entry(image).unlink()
    rig.act(server, "reboot", "ACTIVE", {"type": "HARD"})
    assert rig.served(image) == qcow2.size
    assert rig.proof(server) == qcow2.md5


def test_a_snapshot_of_a_running_server_is_linked_when_it_is_active_and_boots(
    rig: Rig, raw: Disk
) -> None:
    """A snapshot is linked once it is active, and a server boots from it without a download."""
    image = rig.image("original", raw.path)
    rig.ln_images()
    server = rig.boot(image)
    snapshot = rig.snapshot(server)
    seen: list[tuple[str, str]] = []
    while not seen or seen[-1][0] != "active":
        before = rig.cloud.status(snapshot)
        seen.append((before, outcome(rig.ln_images(), snapshot)))
        assert (
            before == "active"
            or not rig.entry(snapshot).exists()
            or rig.cloud.status(snapshot) == "active"
        )
    assert seen[-1][1] in ("linked", "present")
    rig.wait(server, "ACTIVE")
    second = rig.boot(snapshot)
    assert rig.served(snapshot) == 0
    assert rig.proof(second) == raw.md5
    assert rig.node.bases(second) == {rig.entry(snapshot).name}


def test_a_process_that_watches_links_before_a_server_downloads(rig: Rig, raw: Disk) -> None:
    """With ``--every 10``, servers created when their image becomes active download nothing."""
    with watching(rig):
        images = []
        for number in range(5):
            images.append(rig.image(f"fresh-{number}", raw.path))
            rig.boot(images[-1], wait=False)
        wait_until(lambda: all(rig.entry(image).exists() for image in images), "five links", 60)
    assert [rig.served(image) for image in images] == [0] * len(images)


def test_a_download_that_is_under_way_replaces_a_link_made_meanwhile(rig: Rig, slow: Disk) -> None:
    """Nova renames its own copy over a link made during its download, so such an image waits."""
    image = rig.image("late", slow.path)
    server = rig.boot(image, wait=False)
    part = rig.entry(image).with_suffix(".part")
    wait_until(part.exists, "the download", 60)
    assert outcome(rig.ln_images(), image) == "waiting"
    os.link(rig.cloud.images / image, rig.entry(image))
    assert part.exists()
    wait_until(lambda: not part.exists(), "the end of the download", 120)
    rig.wait(server, "ACTIVE")
    assert not rig.entry(image).samefile(rig.cloud.images / image)
    assert outcome(rig.ln_images(), image) == "occupied"
    assert rig.proof(server) == slow.md5


LOST = [("os-start", None, "SHUTOFF"), ("reboot", {"type": "HARD"}, "ERROR")]


@pytest.mark.parametrize(("action", "arguments", "status"), LOST)
def test_a_server_whose_base_was_lost_comes_back_by_a_hard_reboot(
    rig: Rig, raw: Disk, action: str, arguments: object, status: str
) -> None:
    """When a lost base is put back from a backup, a hard reboot alone starts the server."""
    image = rig.image("lost", raw.path)
    rig.ln_images()
    server = rig.boot(image)
    owner = rig.entry(image).stat()
    rig.cloud.delete(image)
    if status == "SHUTOFF":
        rig.act(server, "os-stop", status)
    rig.entry(image).unlink()
    fails(rig, server, action, arguments)
    assert rig.server(server)["status"] == status
    put_back(rig, raw.path, image, owner)
    reboot(rig, server)
    assert rig.proof(server) == raw.md5


def test_a_base_that_is_gone_is_copied_off_a_running_server(rig: Rig, raw: Disk) -> None:
    """The commands of docs/recovery.md copy a removed base out of a running server."""
    image = rig.image("gone", raw.path)
    rig.ln_images()
    server = rig.boot(image)
    owner = rig.entry(image).stat()
    rig.cloud.delete(image)
    rig.entry(image).unlink()
    rig.alive(server, rig.node.console(server).count("guest: alive") + 2)
    name = {"SHA1": rig.entry(image).name}
    opened = "/fd/".join(descriptor(rig, name["SHA1"]))
    rig.node.run("sh", "-c", command_in_recovery("cp --sparse", name | {"PID/fd/N": opened}))
    put_back(rig, rig.node.instances / f"{name['SHA1']}.rescued", image, owner)
    reboot(rig, server)
    assert rig.proof(server) == raw.md5


def put_back(rig: Rig, content: Path, image: str, owner: os.stat_result) -> None:
    """Make a copy the base of an image, with the owner and mode of the other links."""
    shutil.copyfile(content, rig.entry(image))
    os.chown(rig.entry(image), owner.st_uid, owner.st_gid)
    rig.entry(image).chmod(0o644)
