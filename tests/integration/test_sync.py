"""What a pass costs the cloud, alone and as one of many in a process. Counts, never times."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from support.corpus import QCOW2
from support.mounts import edit_unmounted, formatted
from support.node import Node, needs_root
from support.observe import INTERRUPTED, count_requests
from support.repeating import running

DATA = b"\1" * 5000
STRANGER = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
# Keystone's version and a token, and the schema of images, which glanceclient wants.
START = 3


def requests_of(node: Node, *arguments: str) -> list[str]:
    """Return the requests of one run."""
    before = count_requests(node)
    run = node.run(*arguments)
    assert run.returncode == 0, run.stderr
    return list((count_requests(node) - before).elements())


def several_passes(node: Node, *arguments: str) -> list[dict[str, Any]]:
    """Return the reports of some passes of one process, in which nothing goes wrong."""
    with running(node, "--every", "0.2", *arguments) as run:
        reports = [run.report() for _ in range(3)]
        run.process.send_signal(signal.SIGTERM)
        reports += run.reports
        assert run.end(None) == (130, INTERRUPTED.splitlines())
    return reports


def test_an_idle_pass_costs_one_request_for_images(node: Node) -> None:
    """Under -q it queries a sample of the linked images, however many there are."""
    node.cloud.add_many(120)
    node.run("-q")
    requests = requests_of(node, "-q")
    assert len(requests) == START + 1
    (query,) = [path for path in requests if "/v2/images?" in path]
    assert query.count("%2C") == 49


def test_a_report_costs_a_listing_of_images_in_flight(node: Node) -> None:
    """Images that are queued or being saved are queried only if a report shows them."""
    node.cloud.add_many(1)
    node.run("-q")
    requests = requests_of(node)
    assert len(requests) == START + 2
    assert sum("status=in" in path for path in requests) == 1


@pytest.mark.parametrize(("new", "groups"), [(1, 1), (50, 1), (51, 2), (120, 3)])
def test_new_images_are_queried_in_groups(node: Node, new: int, groups: int) -> None:
    """A request has fifty ids. Images that Glance knows prove the cloud, so there is no sample."""
    node.cloud.add_many(new)
    requests = requests_of(node, "-q")
    assert sum("id=in" in path for path in requests) == groups
    assert len(requests) == START + groups


def test_files_that_glance_does_not_know_cost_two_requests(node: Node) -> None:
    """An id that Glance does not list is queried once more among the hidden images."""
    node.cloud.add_many(1)
    node.run("-q")
    (node.images / STRANGER).write_bytes(DATA)
    requests = requests_of(node, "-q")
    assert sum(STRANGER in path for path in requests) == 2
    assert len(requests) == START + 2 + 1
    assert not node.entry(STRANGER).exists()


@pytest.mark.parametrize("full", [True, False])
def test_for_many_images_everything_is_listed(node: Node, full: bool) -> None:
    """With --full, or for more than 500 files without a link, Glance lists all images."""
    node.cloud.add_many(3 if full else 501)
    requests = requests_of(node, *(["--full"] if full else []))
    assert sum("/v2/images?" in path for path in requests) == 2
    assert not any("id=in" in path or "status=in" in path for path in requests)


def test_hidden_and_in_flight_images_are_found_without_a_listing(node: Node) -> None:
    """The few queries of a pass find a hidden image, a queued one and a deactivated one."""
    hidden = node.cloud.image("hidden", DATA, os_hidden=True)
    queued = node.cloud.create("queued")
    deactivated = node.cloud.image("deactivated", DATA)
    node.cloud.image_api().post(f"/images/{deactivated}/actions/deactivate")
    outcomes = {image["id"]: image["outcome"] for image in node.report()["images"]}
    assert outcomes == {hidden: "linked", queued: "waiting", deactivated: "skipped"}


def test_one_process_makes_passes_with_one_token(node: Node) -> None:
    """With --every the token and the schema are requested once, and a pass costs one request."""
    node.cloud.image("image", DATA)
    node.run("-q")
    before = count_requests(node)
    passes = len(several_passes(node))
    requests = list((count_requests(node) - before).elements())
    assert sum("/v3" in path for path in requests) == 2
    assert sum("/v2/schemas/" in path for path in requests) == 1
    assert sum("id=in" in path for path in requests) == passes
    assert len(requests) == START + passes


def test_what_stands_is_queried_and_logged_once(node: Node, tmp_path: Path) -> None:
    """A process queries a refused image once while its file stays, and logs each problem once."""
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    refused = node.cloud.image("refused", b"QFI\xfb\0\0\0\3" + bytes(5000))
    content = tmp_path / "qcow2"
    QCOW2(content)
    raw_copy = node.cloud.image("qcow2", content.read_bytes(), disk_format="qcow2")
    node.entry(raw_copy).write_bytes(DATA)
    before = count_requests(node)
    reports = several_passes(node, "--log-file", str(log), "--metrics-file", str(metrics))
    for report in reports:
        assert len(report["images"]) == 2
        assert {image["id"]: image["outcome"] for image in report["images"]} == {
            refused: "refused",
            raw_copy: "occupied",
        }
    requests = list((count_requests(node) - before).elements())
    assert sum(refused in path for path in requests) == 1
    assert sum(raw_copy in path for path in requests) == len(reports)
    lines = [line.split(" ", 4)[2:] for line in log.read_text().splitlines()]
    assert sorted((level, text.split(":")[0]) for level, _place, text in lines) == [
        ("WARNING", "occupied"),
        ("WARNING", "refused"),
    ]
    assert "force_raw_images = False" in log.read_text()
    assert f'ln_images_occupied_raw{{cache_dir="{node.cache}"}} 1.0' in metrics.read_text()


def test_each_image_is_reported_once_if_all_are_queried(node: Node) -> None:
    """--full queries every image in each pass, and does not add what is remembered of one."""
    image = node.cloud.image("refused", b"QFI\xfb\0\0\0\3" + bytes(5000))
    for report in several_passes(node, "--full"):
        assert [result["id"] for result in report["images"]] == [image]


@needs_root
def test_an_image_that_nova_downloads_is_not_linked(node: Node, tmp_path: Path) -> None:
    """A .part or .converted that changed within ten minutes is a download; others are leftovers.

    A change in the future, as after a clock that jumped, is no download.
    """
    downloads = {"fetched": ".part", "converted": ".converted"}
    leftovers = {"left": "20200101000000", "future": "20370101000000"}
    images = {name: node.cloud.image(name, DATA) for name in (*downloads, *leftovers)}
    with formatted(tmp_path, "mkfs.ext4", "-q", "-I", "256", mebibytes=16) as volume:
        shutil.copytree(node.images, volume / "images")
        here = Node(node.cloud, volume / "cache")
        here.cache.mkdir()
        for name in images:
            suffix = downloads.get(name, ".part")
            here.entry(images[name]).with_suffix(suffix).write_bytes(DATA)
        edit_unmounted(
            tmp_path,
            *[
                f"set_inode_field /cache/{here.entry(images[name]).name}.part ctime {changed}"
                for name, changed in leftovers.items()
            ],
        )
        verdicts = here.verdicts(LN_IMAGES_IMAGES_DIR=str(volume / "images"))
    assert verdicts == {
        **{images[name]: ("waiting", "nova_is_downloading") for name in downloads},
        **{images[name]: ("linked", "no_link_yet") for name in leftovers},
    }
