"""Two compute nodes with one cache."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from rig import STATE, Node, Rig
from rig_fixtures import Disk
from scenes import outcome
from support.cloud import wait_until
from test_cache_manager import OFTEN, OLD


@pytest.fixture(scope="module")
def nodes(rig: Rig) -> Iterator[tuple[Node, Node]]:
    """The first compute node and a second, which the scheduler would give the servers of other tests, too."""
    second = rig.add_node()
    yield rig.node, second
    second.stop()
    rig.nodes.remove(second)


@pytest.fixture
def shared_locks(rig: Rig, nodes: tuple[Node, Node]) -> Iterator[None]:
    """``instances/locks`` is one directory for both nodes."""
    locks = rig.directory / "locks"
    locks.mkdir()
    subprocess.run(["chown", "nova:nova", locks], check=True)
    place = str(STATE / "instances" / "locks")
    for node in nodes:
        node.run("install", "--directory", "--owner=nova", place)
        node.run("mount", "--bind", str(locks), place)
    yield
    for node in nodes:
        node.run("umount", place)


def start_on_both(rig: Rig, nodes: tuple[Node, Node], image: str) -> list[str]:
    """Starts a server of an image on each node at once, and returns what became of them."""
    servers = [rig.boot(image, node, wait=False) for node in nodes]
    states = []
    for server in servers:
        with contextlib.suppress(RuntimeError):
            rig.wait(server, "ACTIVE")
        states.append(rig.server(server)["status"])
    return states


def intact(rig: Rig, image: str, disk: Disk) -> bool:
    """Whether the cache has the image's content under its name."""
    return (
        subprocess.run(["cmp", "--silent", rig.entry(image), disk.path], check=False).returncode
        == 0
    )


def test_two_nodes_that_start_one_linked_image_fetch_nothing(
    rig: Rig, nodes: tuple[Node, Node], raw: Disk
) -> None:
    """Two nodes that start the same linked image at once both run on the link."""
    image = rig.image("linked", raw.path)
    rig.ln_images()
    assert start_on_both(rig, nodes, image) == ["ACTIVE", "ACTIVE"]
    assert rig.served(image) == 0


@pytest.mark.usefixtures("shared_locks")
def test_with_shared_locks_two_nodes_fetch_an_unlinked_image_once(
    rig: Rig, nodes: tuple[Node, Node], slow: Disk
) -> None:
    """With ``instances/locks`` shared, the second node waits for the first one's download, and both are right."""
    image = rig.image("unlinked", slow.path)
    assert start_on_both(rig, nodes, image) == ["ACTIVE", "ACTIVE"]
    assert rig.served(image) == slow.size
    assert intact(rig, image, slow)


def test_without_shared_locks_two_nodes_write_one_file(
    rig: Rig, nodes: tuple[Node, Node], slow: Disk
) -> None:
    """With locks of their own both nodes download into one ``.part``, and one of them fails or gets a wrong base."""
    image = rig.image("unlinked", slow.path)
    states = start_on_both(rig, nodes, image)
    assert "ERROR" in states or not intact(rig, image, slow)


def test_a_node_whose_neighbour_is_down_removes_the_base_under_its_server(
    rig: Rig, nodes: tuple[Node, Node], raw: Disk
) -> None:
    """With one node's nova-compute stopped, the other's cache manager removes the base of the first one's server."""
    first, second = nodes
    image = rig.image("shared", raw.path)
    rig.ln_images()
    rig.boot(image, first)
    os.utime(rig.entry(image), (OLD, OLD))
    first.stop()
    second.runs_with(image_cache=f"{OFTEN}True")
    wait_until(lambda: not rig.entry(image).exists(), "the removal of the base", 120)
    # As long as Glance has the image, the next pass brings the link back.
    assert outcome(rig.ln_images(), image) == "linked"
