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
        """What Glance serves when it is downloaded."""
        return self.path.stat().st_size


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """One cloud with one compute node, for the whole run of the tests."""
    with Rig(Path(os.environ["RIG_DIRECTORY"])) as running:
        yield running


@pytest.fixture(scope="session")
def raw(rig: Rig) -> Disk:
    """A small raw disk."""
    path = rig.directory / "guest.raw"
    return Disk(path, guest.make(path))


@pytest.fixture(scope="session")
def qcow2(rig: Rig, raw: Disk) -> Disk:
    """The same as a qcow2 file."""
    path = rig.directory / "guest.qcow2"
    guest.qcow2(raw.path, path)
    return Disk(path, raw.md5)


@pytest.fixture(scope="session")
def slow(rig: Rig) -> Disk:
    """A raw disk whose download takes long enough to do something meanwhile."""
    path = rig.directory / "slow.raw"
    return Disk(path, guest.make(path, 768 * guest.MIB))


@pytest.fixture(autouse=True)
def clean_cloud(rig: Rig) -> Iterator[None]:
    """Leaves no server, no image, nothing in the cache, and every cache manager at rest."""
    yield
    for node in rig.nodes:
        node.runs_with()
    found = [
        server["id"]
        for asked in ({"all_tenants": "1"}, {"all_tenants": "1", "status": "SOFT_DELETED"})
        for server in rig.compute.get("/servers", params=asked).json()["servers"]
    ]
    rig.delete(*dict.fromkeys(found))
    for image in rig.cloud.image_api().get("/images", params={"limit": "100"}).json()["images"]:
        rig.cloud.delete(image["id"])
    for entry in CACHE.iterdir():
        entry.unlink()
