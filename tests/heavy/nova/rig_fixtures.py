"""The rig and its disks for the tests, as a plugin, and a clean cloud after each test."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import guest
from rig import CACHE, Rig


@dataclass(frozen=True)
class Disk:
    """A disk that boots, and the MD5 by which its guest proves it."""

    path: Path
    md5: str

    @property
    def size(self) -> int:
        """Return the number of bytes that Glance serves when it is downloaded."""
        return self.path.stat().st_size


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Run one cloud with one compute node for all tests."""
    with Rig(Path(os.environ["RIG_DIRECTORY"])) as running:
        yield running


@pytest.fixture(scope="session")
def raw(rig: Rig) -> Disk:
    """Make a small raw disk."""
    path = rig.directory / "guest.raw"
    return Disk(path, guest.make(path))


@pytest.fixture(scope="session")
def qcow2(rig: Rig, raw: Disk) -> Disk:
    """Make the same disk as a qcow2 file."""
    path = rig.directory / "guest.qcow2"
    guest.qcow2(raw.path, path)
    return Disk(path, raw.md5)


@pytest.fixture(scope="session")
def slow(rig: Rig) -> Disk:
    """Make a raw disk whose download takes long enough to do something meanwhile."""
    path = rig.directory / "slow.raw"
    return Disk(path, guest.make(path, 768 * guest.MIB))


@pytest.fixture(autouse=True)
def clean_cloud(rig: Rig) -> Iterator[None]:
    """Remove servers, images and the cache's content, and set each node's settings back."""
    yield
    for node in rig.nodes:
        node.runs_with()
    servers = [
        server["id"]
        for query in ({"all_tenants": "1"}, {"all_tenants": "1", "status": "SOFT_DELETED"})
        for server in rig.compute.get("/servers", params=query).json()["servers"]
    ]
    rig.delete(*dict.fromkeys(servers))
    for image in rig.cloud.image_api().get("/images", params={"limit": "100"}).json()["images"]:
        rig.cloud.delete(image["id"])
    for entry in CACHE.iterdir():
        entry.unlink()
