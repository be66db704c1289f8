"""Procedures of docs/recovery.md, run as the page says."""

import re
import subprocess
from pathlib import Path

import pytest

from ln_images.model import Command, cache_name
from support.bases import make_base, write_report
from support.cloud import ROOT
from support.node import Node, needs_root

PAGE = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
DATA = b"\1" * 5000
DELETED = "00000000-0000-4000-8000-00000000dead"


def list_commands(heading: str) -> list[str]:
    """Return the indented commands of a section."""
    _, _, rest = PAGE.partition(f"\n## {heading}\n")
    section = rest.partition("\n## ")[0]
    return re.findall(r"^ {4,}(?=[a-z])(.+)$", section, re.MULTILINE)


def run_shell(script: str) -> None:
    """Run commands that must all succeed."""
    subprocess.run(["sh", "-euc", script], check=True, timeout=60, stdout=subprocess.DEVNULL)


@needs_root
def test_a_backup_brings_images_and_bases_back(node: Node, tmp_path: Path) -> None:
    """The commands for the backup and for the new node keep links, marks, owners and modes.

    Even the base of a deleted image is there again, and nothing is stored twice.
    """
    image = node.cloud.image("image", DATA)
    node.run()
    deleted = make_base(node.cache, DELETED)
    backup, new = tmp_path / "backup", tmp_path / "new"
    backup.mkdir()
    new.mkdir()
    to_backup, to_new_node = [
        line for line in list_commands("The storage node is lost") if line.startswith("rsync")
    ]
    run_shell(
        to_backup.replace("/var/lib/glance/imagecache", str(node.cache))
        .replace("/var/lib/glance/images", str(node.images))
        .replace("BACKUP:/glance", str(backup))
    )
    images, cache = new / node.images.name, new / node.cache.name
    run_shell(
        to_new_node.replace("BACKUP:/glance/imagecache", str(backup / cache.name))
        .replace("BACKUP:/glance/images", str(backup / images.name))
        .replace("/var/lib/glance", str(new))
    )
    restored = Node(node.cloud, cache)
    report = restored.report("--full", "--dry-run", LN_IMAGES_IMAGES_DIR=str(images))
    outcomes = {each["id"]: each["outcome"] for each in report["images"]}
    assert outcomes[image] == "present"
    assert report["counts"]["occupied"] == 0
    assert (cache / deleted.name).read_bytes() == deleted.read_bytes()
    assert report["reclaimable"]["orphans"]["count"] == 1
    verified = restored.report(command=Command.VERIFY, LN_IMAGES_IMAGES_DIR=str(images))
    assert verified["counts"]["verified"] >= 1


@needs_root
@pytest.mark.usefixtures("nova")
def test_the_retired_one_of_two_files_gets_its_name_back(node: Node, tmp_path: Path) -> None:
    """The commands put the retired file back and keep the other one aside.

    After that, the clean-up keeps the base because of the report that names it.
    """
    retired = make_base(node.cache, DELETED, b"earlier", retired=True)
    make_base(node.cache, DELETED, b"later", marked=False)
    sha1 = cache_name(DELETED)
    reports = tmp_path / "reports"
    for host in ("compute-1", "compute-2"):
        write_report(reports, host, sha1)
    options = ("--reports-dir", str(reports))
    node.report(*options, command=Command.PRUNE, status=1)
    moves = [line for line in list_commands("Two files for one base") if line.startswith("mv")]
    run_shell("\n".join([f"cd {node.cache}", *moves]).replace("SHA1", sha1))
    assert (node.cache / sha1).read_bytes() == b"earlier"
    assert (node.cache / f"{sha1}.other").read_bytes() == b"later"
    assert not retired.exists()
    report = node.report(*options, command=Command.PRUNE)
    assert [each["reason_code"] for each in report["images"]] == ["in_use"]
