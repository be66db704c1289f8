"""Two compute nodes with one cache."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from rig import STATE, Node, Rig
from rig_fixtures import Disk
from scenes import OFTEN, OLD, outcome
from support.cloud import wait_until


@pytest.fixture(scope="module")
def nodes(rig: Rig) -> Iterator[tuple[Node, Node]]:
    """Add a second compute node, for these tests only: the scheduler would use it in others."""
    second = rig.add_node()
    yield rig.node, second
    rig.remove_node(second)


@pytest.fixture
def own_locks(nodes: tuple[Node, Node]) -> Iterator[None]:
    """Give each node an ``instances/locks`` of its own."""
    place = str(STATE / "instances" / "locks")
    for node in nodes:
        node.run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place)
    yield
    for node in nodes:
        node.run("umount", place)


def start_on_both(rig: Rig, nodes: tuple[Node, Node], image: str) -> list[str]:
    """Start a server of an image on each node at once, and return their statuses in the end."""
    servers = [rig.boot(image, node, wait=False) for node in nodes]
    statuses = []
    for server in servers:
        with contextlib.suppress(RuntimeError):
            rig.wait(server, "ACTIVE")
        statuses.append(rig.server(server)["status"])
    return statuses


def is_intact(rig: Rig, image: str, disk: Disk) -> bool:
    """Return whether the cache has the image's content under its name."""
    compared = subprocess.run(["cmp", "--silent", rig.entry(image), disk.path], check=False)
    return compared.returncode == 0


def test_two_nodes_that_start_one_linked_image_download_nothing(
    rig: Rig, nodes: tuple[Node, Node], raw: Disk
) -> None:
    """Two nodes that start the same linked image at once both run on the link."""
    image = rig.image("linked", raw.path)
    rig.ln_images()
    assert start_on_both(rig, nodes, image) == ["ACTIVE", "ACTIVE"]
    assert rig.served(image) == 0


def test_with_shared_locks_two_nodes_download_an_unlinked_image_once(
    rig: Rig, nodes: tuple[Node, Node], slow: Disk
) -> None:
    """With ``instances/locks`` shared, the second node waits for the first one's download."""
    image = rig.image("unlinked", slow.path)
    assert start_on_both(rig, nodes, image) == ["ACTIVE", "ACTIVE"]
    assert rig.served(image) == slow.size
    assert is_intact(rig, image, slow)


@pytest.mark.usefixtures("own_locks")
def test_without_shared_locks_two_nodes_write_one_file(
    rig: Rig, nodes: tuple[Node, Node], slow: Disk
) -> None:
    """With locks of their own both nodes download into one ``.part``; one fails or is wrong."""
    image = rig.image("unlinked", slow.path)
    statuses = start_on_both(rig, nodes, image)
    assert "ERROR" in statuses or not is_intact(rig, image, slow)


def test_a_node_whose_neighbour_is_down_removes_the_base_under_its_server(
    rig: Rig, nodes: tuple[Node, Node], raw: Disk
) -> None:
    """If one node's nova-compute is down, the other's cache manager removes its server's base."""
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
