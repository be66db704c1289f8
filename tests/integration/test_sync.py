"""What a pass costs the cloud, alone and as one of many in a process. Counts, never times."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.corpus import QCOW2
from support.node import Node, needs_root
from support.repeating import running

DATA = b"\1" * 5000


def requests(node: Node) -> Counter[str]:
    """The requests that the command sent so far.

    Glance's own, which checks tokens, do not count.
    """

    def logged() -> list[str]:
        logs = (node.cloud.directory / f"{name}-access.log" for name in ("keystone", "glance"))
        return [line for log in logs for line in log.read_text().splitlines()]

    # A line is written when its answer has been sent, so possibly after the command has ended.
    lines = logged()
    while True:
        time.sleep(0.3)
        if len(logged()) == len(lines):
            break
        lines = logged()
    return Counter(line.split('"')[1] for line in lines if '"ln-images/' in line)


def asked_by(node: Node, *arguments: str) -> list[str]:
    """The requests of one run."""
    before = requests(node)
    run = node.run(*arguments)
    assert run.returncode == 0, run.stderr
    return list((requests(node) - before).elements())


def test_a_pass_with_nothing_to_do_costs_three_requests(node: Node) -> None:
    """One for Keystone's version, one for a token, one for the images in flight, however many images are linked."""
    node.cloud.add_many(120)
    node.run("-q")
    asked = asked_by(node)
    assert len(asked) == 3
    assert not any("id=in" in path for path in asked)


@pytest.mark.parametrize(("new", "groups"), [(1, 1), (50, 1), (51, 2), (120, 3)])
def test_new_images_are_asked_about_in_groups(node: Node, new: int, groups: int) -> None:
    """Fifty ids a request, beside the three of a pass with nothing to do."""
    node.cloud.add_many(new)
    asked = asked_by(node)
    assert sum("id=in" in path for path in asked) == groups
    assert len(asked) == 3 + groups


def test_files_that_glance_does_not_know_cost_two_requests_a_group(node: Node) -> None:
    """An id that is in no listing is looked for once more among the hidden images, and is nothing then."""
    stray = node.images / "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
    stray.write_bytes(DATA)
    assert len(asked_by(node)) == 5
    assert not node.names()


@pytest.mark.parametrize("full", [True, False])
def test_past_some_hundreds_everything_is_listed(node: Node, full: bool) -> None:
    """With --full, and where asking in groups would cost more, all images are listed, hidden ones by themselves."""
    node.cloud.add_many(3 if full else 501)
    asked = asked_by(node, *(["--full"] if full else []))
    assert sum("/v2/images?" in path for path in asked) == 2
    assert not any("id=in" in path or "status=in" in path for path in asked)


def test_hidden_and_in_flight_images_are_found_without_a_listing(node: Node) -> None:
    """The few questions of a pass reach a hidden image, a queued one and one of another state beside."""
    hidden = node.cloud.image("hidden", DATA, os_hidden=True)
    queued = node.cloud.create("queued")
    off = node.cloud.image("off", DATA)
    node.cloud.image_api().post(f"/images/{off}/actions/deactivate")
    document = json.loads(node.run("--format", "json").stdout)
    outcomes = {image["id"]: image["outcome"] for image in document["images"]}
    assert outcomes == {hidden: "linked", queued: "waiting", off: "skipped"}


def several(node: Node, *arguments: str) -> list[dict[str, Any]]:
    """The reports of some passes of one process, in which nothing goes wrong."""
    with running(node, "--every", "0.2", *arguments) as run:
        reports = [run.report() for _ in range(3)]
        run.process.send_signal(signal.SIGTERM)
        reports += run.reports
        status, errors = run.ended(None)
    assert (status, [line.split(":")[1] for line in errors]) == (130, [" interrupted"])
    return reports


def test_one_process_makes_passes_with_one_token(node: Node) -> None:
    """With --every the version and the token are asked for once, and the connection is kept."""
    node.cloud.image("image", DATA)
    node.run("-q")
    before = requests(node)
    passes = len(several(node))
    asked = list((requests(node) - before).elements())
    assert sum("/v3" in path for path in asked) == 2
    assert len(asked) == 2 + passes


def test_what_stands_is_asked_and_logged_once(node: Node, tmp_path: Path) -> None:
    """In one process, what is refused is asked about once while its file stays.

    What stands is in the log once.

    That Nova's raw copy has a qcow2 image's name is a warning, for the log file alone, and a
    metric.
    """
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    refused = node.cloud.image("refused", b"QFI\xfb\0\0\0\3" + bytes(5000))
    content = tmp_path / "qcow2"
    QCOW2(content)
    raw = node.cloud.image("qcow2", content.read_bytes(), disk_format="qcow2")
    node.entry(raw).write_bytes(DATA)
    before = requests(node)
    files = ("--log-file", str(log), "--metrics-file", str(metrics))
    reports = several(node, *files)
    for report in reports:
        assert {image["id"]: image["outcome"] for image in report["images"]} == {
            refused: "refused",
            raw: "occupied",
        }
        assert len(report["images"]) == 2
    asked = list((requests(node) - before).elements())
    assert sum(refused in line for line in asked) == 1
    assert sum(raw in line for line in asked) == len(reports)
    warned = [line.split(" ", 4)[2:] for line in log.read_text().splitlines()]
    assert sorted((level, text.split(":")[0]) for level, _, text in warned) == [
        ("WARNING", "occupied"),
        ("WARNING", "refused"),
    ]
    assert "force_raw_images = False" in log.read_text()
    assert "ln_images_occupied_raw 1.0" in metrics.read_text()


def test_each_image_is_told_of_once_where_all_are_asked(node: Node) -> None:
    """--full asks about every image in each pass, and what is remembered of one is not told beside it."""
    image = node.cloud.image("refused", b"QFI\xfb\0\0\0\3" + bytes(5000))
    reports = several(node, "--full")
    assert [[one["id"] for one in report["images"]] for report in reports] == [[image]] * len(
        reports
    )


@needs_root
def test_an_image_that_nova_downloads_is_not_linked(node: Node, tmp_path: Path) -> None:
    """What has changed within ten minutes beside the cache name is a download.

    What is older is told of under -v.
    """
    images = {name: node.cloud.image(name, DATA) for name in ("fetched", "converted", "left")}
    disk_file, mounted = tmp_path / "ext4", tmp_path / "mounted"
    mounted.mkdir()
    path = {"PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
    subprocess.run(["truncate", "--size=16M", disk_file], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-I", "256", disk_file], check=True, env=path)

    def mount() -> None:
        subprocess.run(["mount", "-o", "loop", disk_file, mounted], check=True)

    mount()
    try:
        shutil.copytree(node.images, mounted / "images")
        here = Node(node.cloud, mounted / "cache")
        here.cache.mkdir()
        for name, suffix in (("fetched", ".part"), ("converted", ".converted"), ("left", ".part")):
            here.entry(images[name]).with_suffix(suffix).write_bytes(DATA)
        subprocess.run(["umount", mounted], check=True)
        # No system call sets a ctime.
        left = f"set_inode_field /cache/{here.entry(images['left']).name}.part ctime 20260101000000"
        subprocess.run(
            ["debugfs", "-w", "-R", left, disk_file], check=True, env=path, capture_output=True
        )
        mount()
        run = here.run("-v", "--format", "json", LN_IMAGES_IMAGES_DIR=str(mounted / "images"))
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)
    assert run.returncode == 0, run.stderr
    found = {
        image["id"]: (image["outcome"], image["reason"])
        for image in json.loads(run.stdout)["images"]
    }
    downloaded = ("waiting", "Nova is downloading it")
    assert found == {
        images["fetched"]: downloaded,
        images["converted"]: downloaded,
        images["left"]: ("linked", ""),
    }
    assert f"leftovers of downloads: 1, {len(DATA)} bytes" in run.stderr
