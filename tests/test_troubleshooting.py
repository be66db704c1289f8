"""Each line of the README's table of troubles is what the command says when that trouble is there."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import COMMAND, NO_OPENRC, REFERENCE, Node, needs_root

DATA = b"\1" * 5000
TABLE = REFERENCE.partition("## When it does not work")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.+?`) \| [^|]+ \|$", TABLE, re.MULTILINE)


def said(node: Node, *arguments: str, **variables: str | None) -> str:
    """What a run says of a cloud with one image."""
    node.cloud.image("image", DATA)
    run = node.run(*arguments, **variables)
    return run.stdout + run.stderr


def of_a_limited_credential(node: Node) -> str:
    """One whose rules let it ask for other things than images."""
    rules = [{"service": "compute", "method": "GET", "path": "/v2.1/os-services"}]
    openrc = node.cloud.application_credential(node.cloud.as_user(), access_rules=rules)
    return said(node, **{**NO_OPENRC, **openrc})


def of_a_member(node: Node) -> str:
    """One that is no administrator."""
    node.cloud.add_user("trouble", "trouble", "member")
    return said(node, OS_USERNAME="trouble", OS_PROJECT_NAME="trouble")


def beside_another_run(node: Node) -> str:
    """One that has the lock."""
    directory = os.open(node.cache, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        return said(node)
    finally:
        os.close(directory)


def without_privileges(node: Node) -> str:
    """As somebody who may not give files away, which root is without its capabilities."""
    node.cloud.image("image", DATA)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    command = [*drop, str(COMMAND), "--owner", "12345:12345"]
    return subprocess.run(command, env=node.environment(), capture_output=True, text=True, check=False).stdout


def with_a_name_taken(node: Node) -> str:
    """Nova has fetched the image before."""
    image = node.cloud.image("image", DATA)
    node.entry(image).write_bytes(DATA)
    return node.run().stdout


def with_another_content(node: Node) -> str:
    """The image is called raw and is not."""
    node.cloud.image("image", b"QFI\xfb\0\0\0\3" + bytes(5000))
    return node.run().stdout


SITUATIONS: dict[str, Callable[[Node], str]] = {
    "`OS_PASSWORD not set`": lambda node: said(node, OS_PASSWORD=None),
    "`Keystone refuses the credentials: HTTP 401`": lambda node: said(node, OS_PASSWORD="wrong"),
    "`Keystone cannot be asked: ConnectFailure`": lambda node: said(node, OS_AUTH_URL="http://127.0.0.1:1/v3"),
    "`public endpoint for image service in X region not found`": lambda node: said(node, OS_REGION_NAME="X"),
    "`Glance refuses the credentials: HTTP 401`": of_a_limited_credential,
    "`the credential has no admin role`": of_a_member,
    "`there is no user 'X' here`": lambda node: said(node, "--owner", "nobody-of-that-name"),
    "`are on two file systems or two mounts of one`": lambda node: said(node, LN_IMAGES_CACHE_DIR="/dev/shm"),
    "`another run holds the lock`": beside_another_run,
    "`failed`: `Operation not permitted`": without_privileges,
    "`occupied`: `another file of the same size has the cache name`": with_a_name_taken,
    "`refused`: `the content is X, Glance says X`": with_another_content,
}
FULL = "`failed`: `No space left on device`"


def pattern(row: str) -> str:
    """What a row says, as a regular expression: X is a word, and a colon between two parts any space."""
    return r"\s+".join(re.escape(part).replace("X", r"[^\s,']+") for part in re.findall("`([^`]+)`", row))


def test_every_row_has_its_situation() -> None:
    """No line of the table is without a test."""
    assert sorted(ROWS) == sorted([*SITUATIONS, FULL])


@pytest.mark.parametrize("row", SITUATIONS)
def test_the_trouble_says_so(node: Node, row: str) -> None:
    """In the situation the command says what the table has."""
    text = SITUATIONS[row](node)
    assert re.search(pattern(row), text), text


@pytest.fixture
def small(node: Node, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with few inodes, and the cloud's images on it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=20", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "cache").mkdir()
        node.cloud.image("image", DATA)
        shutil.copytree(node.images, tmp_path / "images")
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@needs_root
def test_a_full_file_system_says_so(node: Node, small: Path) -> None:
    """Where no inode is left the image fails for that reason."""
    with contextlib.suppress(OSError):
        for number in range(20):
            (small / str(number)).touch()
    directories = {"LN_IMAGES_IMAGES_DIR": str(small / "images"), "LN_IMAGES_CACHE_DIR": str(small / "cache")}
    text = node.run(**directories).stdout
    assert re.search(pattern(FULL), text), text
