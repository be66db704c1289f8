"""What the production guide says of the export, on a real NFS server with clients of several uids."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nfs import SERVER, Nfs
from support.node import Node, needs_root

# Debian starts the server that it installs: that is for whoever wants these tests to decide, and
# for CI.
pytestmark = [
    pytest.mark.xdist_group("nfs"),
    needs_root,
    pytest.mark.skipif(
        not (shutil.which(SERVER) and shutil.which("nfs-cat")),
        reason="needs an NFS server: apt-get install nfs-ganesha nfs-ganesha-vfs libnfs-utils",
    ),
]
QEMU, NOVA, SOMEBODY, ROOT = 107, 162, 1000, 0
DATA = b"\1" * 5000
EXPORTS = {
    "cache": "Access_Type = RW; Squash = No_Root_Squash;",
    "squashed": "Access_Type = RW; Squash = Root_Squash;",
    "mapped": f"Access_Type = RW; Squash = Root_Squash; Anonymous_Uid = {QEMU}; Anonymous_Gid = {QEMU};",
    "readonly": "Access_Type = RO; Squash = No_Root_Squash;",
}


@pytest.fixture
def nfs(node: Node, tmp_path: Path) -> Iterator[Nfs]:
    """The node's cache directory, Nova's own, exported in each way that the guide speaks of."""
    os.chown(node.cache, NOVA, NOVA)
    with Nfs(tmp_path, node.cache, EXPORTS) as running:
        yield running


def linked(node: Node, *options: str) -> str:
    """The cache name of an image that the command has linked."""
    image_id = node.cloud.create("exported")
    node.cloud.upload(image_id, DATA)
    run = node.run("--owner", f"{QEMU}:{QEMU}", *options)
    assert run.returncode == 0, run.stderr
    return node.entry(image_id).name


def test_every_uid_reads_a_link_over_nfs(node: Node, nfs: Nfs) -> None:
    """With the mode 0644 QEMU and Nova read a base, and so does whoever else is on a compute node."""
    name = linked(node)
    for uid in (QEMU, NOVA, SOMEBODY, ROOT):
        assert nfs.read("cache", name, uid) == DATA


def test_with_0640_nova_does_not_read_a_base(node: Node, nfs: Nfs) -> None:
    """A base that only QEMU reads is of no use to Nova, which looks into it as itself.

    Hence no such --mode.
    """
    name = linked(node)
    (node.cache / name).chmod(0o640)
    assert nfs.read("cache", name, QEMU) == DATA
    assert nfs.read("cache", name, NOVA) is None


def test_a_link_is_seen_at_once(node: Node, nfs: Nfs) -> None:
    """A name that a client has asked for in vain is there for it as soon as it is linked."""
    image_id = node.cloud.create("later")
    name = node.entry(image_id).name
    assert nfs.read("cache", name, QEMU) is None
    node.cloud.upload(image_id, DATA)
    assert node.run("--owner", f"{QEMU}:{QEMU}").returncode == 0
    assert nfs.read("cache", name, QEMU) == DATA


def test_nova_writes_beside_the_links(node: Node, nfs: Nfs) -> None:
    """Nova, who owns the directory, stores there what it fetches itself.

    Others cannot, nor where it is read-only.
    """
    assert nfs.may_create("cache", "fetched.part", NOVA)
    assert (node.cache / "fetched.part").stat().st_uid == NOVA
    assert not nfs.may_create("cache", "other.part", SOMEBODY)
    assert not nfs.may_create("readonly", "other.part", NOVA)


@pytest.mark.parametrize(
    ("export", "renews"),
    [("cache", True), ("mapped", True), ("squashed", False), ("readonly", False)],
)
def test_root_of_a_compute_node_renews_the_times(
    node: Node, nfs: Nfs, export: str, renews: bool
) -> None:
    """Nova touches bases as root.

    That takes no_root_squash, or root mapped to the owner, and read-write.
    """
    name = linked(node)
    assert nfs.may_write(export, name, ROOT) is renews
    if export == "cache":
        assert nfs.may_touch(export, name, ROOT)
        assert (node.cache / name).stat().st_mtime == 10**9


def test_only_the_owner_and_root_write_a_base(node: Node, nfs: Nfs) -> None:
    """A base is Glance's own file: whoever writes it changes the image, and these two can."""
    name = linked(node)
    writers = {uid for uid in (QEMU, NOVA, SOMEBODY, ROOT) if nfs.may_write("cache", name, uid)}
    assert writers == {QEMU, ROOT}
    assert stat.S_IMODE((node.cache / name).stat().st_mode) == 0o644
