"""The exports of docs/install.md, on a real NFS server with clients of several uids.

``make test-knfs`` tests mounts and the compute node's check on the kernel's server and client.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cloud import ROOT
from support.nfs import SERVER, Nfs
from support.node import Node, needs_root

# Debian starts the server that it installs. So only CI, and whoever wants these tests, installs it.
pytestmark = [
    pytest.mark.xdist_group("nfs"),
    needs_root,
    pytest.mark.skipif(
        not (shutil.which(SERVER) and shutil.which("nfs-cat")),
        reason="needs an NFS server: apt-get install nfs-ganesha nfs-ganesha-vfs libnfs-utils",
    ),
]
QEMU, NOVA, OTHER_USER, ROOT_USER = 107, 162, 1000, 0
DATA = b"\1" * 5000
# How ganesha calls the options of /etc/exports.
WORDS = {"rw": "Access_Type = RW;", "no_root_squash": "Squash = No_Root_Squash;"}
ANONYMOUS = f"Anonymous_Uid = {QEMU}; Anonymous_Gid = {QEMU};"
EXPORTS = {
    "cache": "Access_Type = RW; Squash = No_Root_Squash;",
    "squashed": "Access_Type = RW; Squash = Root_Squash;",
    "mapped": f"Access_Type = RW; Squash = Root_Squash; {ANONYMOUS}",
    "readonly": "Access_Type = RO; Squash = No_Root_Squash;",
}


@pytest.fixture
def nfs(node: Node, tmp_path: Path) -> Iterator[Nfs]:
    """Export the node's cache directory, which belongs to Nova, in several ways."""
    os.chown(node.cache, NOVA, NOVA)
    with Nfs(tmp_path, node.cache, EXPORTS) as running:
        yield running


def link_image(node: Node) -> str:
    """Make an image, link it for QEMU, and return its cache name."""
    image_id = node.cloud.create("exported")
    node.cloud.upload(image_id, DATA)
    run = node.run("--owner", f"{QEMU}:{QEMU}")
    assert run.returncode == 0, run.stderr
    return node.entry(image_id).name


def test_the_documented_options_are_those_of_the_tested_export() -> None:
    """The export that these tests call "cache" has the options that docs/install.md shows."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    # echo "/var/lib/glance/imagecache $NETWORK(rw,no_root_squash,no_subtree_check)" >> ...
    exports = re.findall(r"/var/lib/glance/imagecache \$NETWORK\(([a-z_,]+)\)", text)
    assert exports
    for options in exports:
        # A server in user space, as this one is, knows no subtree_check.
        words = [WORDS[option] for option in options.split(",") if option != "no_subtree_check"]
        assert " ".join(words) == EXPORTS["cache"]


def test_every_uid_reads_a_link_over_nfs(node: Node, nfs: Nfs) -> None:
    """With mode 0644 QEMU and Nova read a base, and so does every other user of a compute node."""
    name = link_image(node)
    for uid in (QEMU, NOVA, OTHER_USER, ROOT_USER):
        assert nfs.read("cache", name, uid) == DATA


def test_nova_does_not_read_a_base_of_mode_0640(node: Node, nfs: Nfs) -> None:
    """Nova, which reads a base as its own user, cannot read one of mode 0640.

    Hence --mode refuses such a mode.
    """
    name = link_image(node)
    (node.cache / name).chmod(0o640)
    assert nfs.read("cache", name, QEMU) == DATA
    assert nfs.read("cache", name, NOVA) is None


def test_a_missing_name_is_visible_once_it_is_linked(node: Node, nfs: Nfs) -> None:
    """A client that looked for a name in vain finds it as soon as it is linked."""
    image_id = node.cloud.create("later")
    name = node.entry(image_id).name
    assert nfs.read("cache", name, QEMU) is None
    node.cloud.upload(image_id, DATA)
    assert node.run("--owner", f"{QEMU}:{QEMU}").returncode == 0
    assert nfs.read("cache", name, QEMU) == DATA


def test_nova_creates_files_beside_the_links(node: Node, nfs: Nfs) -> None:
    """Nova can store its own downloads in the cache; others cannot, nor in a read-only export."""
    assert nfs.create("cache", "downloaded.part", NOVA)
    assert (node.cache / "downloaded.part").stat().st_uid == NOVA
    assert not nfs.create("cache", "other.part", OTHER_USER)
    assert not nfs.create("readonly", "other.part", NOVA)
    assert node.names() == {"downloaded.part"}


@pytest.mark.parametrize(
    ("export", "may_renew"),
    [("cache", True), ("mapped", True), ("squashed", False), ("readonly", False)],
)
def test_root_of_a_compute_node_renews_the_times(
    node: Node, nfs: Nfs, export: str, may_renew: bool
) -> None:
    """Nova renews the times of bases as root, which takes no_root_squash and a writable export.

    Root that is mapped to the owner of the links can do it as well.
    """
    name = link_image(node)
    assert nfs.may_write(export, name, ROOT_USER) is may_renew
    if export == "cache":
        assert nfs.touch(export, name, ROOT_USER)
        assert (node.cache / name).stat().st_mtime == 10**9


def test_only_the_owner_and_root_write_a_base(node: Node, nfs: Nfs) -> None:
    """Of all users of a compute node, only QEMU's and root can change a base, and so the image."""
    name = link_image(node)
    users = (QEMU, NOVA, OTHER_USER, ROOT_USER)
    assert {uid for uid in users if nfs.may_write("cache", name, uid)} == {QEMU, ROOT_USER}
    assert stat.S_IMODE((node.cache / name).stat().st_mode) == 0o644
