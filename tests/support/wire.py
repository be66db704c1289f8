"""Run the command against services that break: it must print no secret and touch nothing."""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from ln_images.model import Command
from support.cloud import PASSWORD
from support.faulty import Variables
from support.node import Node


def run(
    node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command with its longest log, and check that no secret is in what it writes."""
    log = node.cache.with_suffix(".log")
    finished = node.run("-v", "--log-file", str(log), *arguments, command=Command.LINK, **variables)
    written = finished.stdout + finished.stderr + (log.read_text() if log.exists() else "")
    known = {PASSWORD, *secrets}
    known |= {
        value
        for name, value in node.environment(**variables).items()
        if re.fullmatch("OS_.*(PASSWORD|TOKEN|SECRET)", name) and value
    }
    assert [secret for secret in known if secret in written] == []
    return finished


def check_links(
    node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> None:
    """Make an image, and check that a run links it."""
    (image,) = node.cloud.add_many(1)
    finished = run(node, variables, *arguments, secrets=secrets)
    assert (finished.returncode, node.is_linked(image)) == (0, True), finished.stderr


def run_refused(
    node: Node, status: int, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> str:
    """Make an image, and return the one line of a run that must fail with ``status``.

    The run must touch nothing.
    """
    node.cloud.add_many(1)
    before = list_everything(node)
    finished = run(node, variables, *arguments, secrets=secrets)
    lines = [
        line for line in finished.stderr.splitlines() if not line.startswith("ln-images: debug: ")
    ]
    assert (finished.returncode, finished.stdout, len(lines)) == (status, "", 1), finished.stderr
    assert re.fullmatch(r"ln-images: (?!unexpected)[ -~]+; [ -~]+", lines[0])
    assert list_everything(node) == before
    return lines[0]


def list_everything(node: Node) -> dict[Path, tuple[int, ...]]:
    """Return what a run could change: each name in the store and in the cache, and its inode."""
    files = {path: path.lstat() for path in (*node.images.iterdir(), *node.cache.iterdir())}
    return {
        path: (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            status.st_ctime_ns,
        )
        for path, status in files.items()
    }
