"""What a pass costs the cloud, and passes made one after another in one process. Counts, never times."""

import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from cloud import wait_until
from conftest import COMMAND, Node
from faulty import Answer, Faulty

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


@pytest.fixture
def repeating(node: Node) -> Iterator[subprocess.Popen[str]]:
    """The command making a pass ten times a second, one line of JSON each."""
    arguments = ["--every", "0.1", "--format", "json"]
    with Faulty(node.cloud.keystone) as keystone:
        environment = node.environment(OS_AUTH_URL=f"{keystone.url}/v3")
        process = subprocess.Popen(
            [COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        yield process
        process.kill()
        process.communicate()


def test_one_process_makes_passes_with_one_token(node: Node) -> None:
    """With --every the version and the token are asked for once, and the connection is kept."""
    node.cloud.image("image", DATA)
    node.run("-q")
    before = requests(node)
    run = node.run("--every", "0.2", "--for", "3", "--format", "json")
    assert run.returncode == 0, run.stderr
    passes = len(run.stdout.splitlines())
    assert passes >= 3
    asked = list((requests(node) - before).elements())
    assert sum("/v3" in path for path in asked) == 2
    assert len(asked) == 2 + passes


def test_passes_begin_on_a_steady_clock(node: Node) -> None:
    """Passes begin at whole multiples of --every after the first, and none is begun that would end after --for."""
    run = node.run("--every", "0.5", "--for", "6", "--format", "json")
    begun = [json.loads(line)["started_at"][17:26] for line in run.stdout.splitlines()]
    assert 3 <= len(begun) <= 12
    gaps = [(float(later) - float(first)) % 60 % 0.5 for first, later in itertools.pairwise(begun[1:])]
    assert all(min(gap, 0.5 - gap) < 0.2 for gap in gaps)


def test_an_image_is_linked_while_it_runs_and_sigterm_ends_it(node: Node, repeating: subprocess.Popen[str]) -> None:
    """An image that is finished between passes is linked by the next; the lock is free in between."""
    image = node.cloud.image("image", DATA)
    wait_until(lambda: node.linked(image), "the link")
    wait_until(lambda: node.run("-q").returncode == 0, "a moment without the lock")
    repeating.terminate()
    _, errors = repeating.communicate(timeout=30)
    assert repeating.returncode == 130
    assert errors.splitlines()[-1].startswith("ln-images: interrupted")


def test_a_cloud_that_goes_away_and_comes_back(node: Node) -> None:
    """While the cloud is away it is told of once; when it is back, with the token expired, linking goes on."""
    glance_down = {"down": False}
    expired = {"left": 0}

    def rule(path: str) -> str | Answer:
        if glance_down["down"]:
            return Answer(503)
        if expired["left"]:
            expired["left"] -= 1
            return Answer(401)
        return path

    with Faulty(node.cloud.glance, rule) as front:
        identity = node.cloud.identity()
        service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
        region = {"service_id": service, "interface": "public", "region_id": "Away", "url": front.url}
        identity.put("/regions/Away", json={"region": {}})
        identity.post("/endpoints", json={"endpoint": region})
        process = subprocess.Popen(
            [COMMAND, "-q", "--every", "0.1", "--for", "20"],
            env=node.environment(OS_REGION_NAME="Away"),
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: front.paths, "the first pass")
        glance_down["down"] = True
        image = node.cloud.image("image", DATA)
        seen = len(front.paths)
        wait_until(lambda: len(front.paths) > seen + 5, "passes without a cloud")
        assert not node.linked(image)
        expired["left"] = 1
        glance_down["down"] = False
        wait_until(lambda: node.linked(image), "the link")
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert [line[:40] for line in errors.splitlines()] == [
        "ln-images: Glance cannot be asked: HTTP ",
        "ln-images: interrupted: what was linked ",
    ]


def test_a_refused_credential_ends_the_repeating(node: Node) -> None:
    """A wrong password is not tried again every second, which would lock the account."""
    run = node.run("--every", "0.1", "--for", "20", OS_PASSWORD="wrong")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1


def test_for_needs_every(node: Node) -> None:
    """--for alone says nothing."""
    run = node.run("--for", "5")
    assert (run.returncode, run.stderr) == (2, "ln-images: --for needs --every: see ln-images --help\n")
