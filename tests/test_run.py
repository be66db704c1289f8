"""What a pass costs the cloud, alone and as one of many in a process. Counts, never times."""

import json
import time
from collections import Counter

import pytest

from conftest import Node

DATA = b"\1" * 5000


def requests(node: Node) -> Counter[str]:
    """The requests that the command sent so far; Glance's own, which checks tokens, do not count."""

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
    return Counter(line.split('"')[1] for line in lines if '"ln-images/' in line or '"python-glanceclient"' in line)


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
    """Fifty ids a request, and one more for the schema that glanceclient fetches."""
    node.cloud.add_many(new)
    asked = asked_by(node)
    assert sum("id=in" in path for path in asked) == groups
    assert len(asked) == 3 + groups + 1


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


def test_one_process_makes_passes_with_one_token(node: Node) -> None:
    """With --every the version and the token are asked for once, and the connection is kept."""
    node.cloud.image("image", DATA)
    node.run("-q")
    # On a busy machine three passes take longer.
    for seconds in ("3", "15", "60"):
        before = requests(node)
        run = node.run("--every", "0.2", "--for", seconds, "--format", "json")
        assert run.returncode == 0, run.stderr
        passes = len(run.stdout.splitlines())
        if passes >= 3:
            break
    assert passes >= 3
    asked = list((requests(node) - before).elements())
    assert sum("/v3" in path for path in asked) == 2
    assert len(asked) == 2 + passes
