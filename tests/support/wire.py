"""Runs on a wire that breaks: what they say, and that they say no secret and touch nothing."""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from support.cloud import PASSWORD
from support.faulty import Variables
from support.node import Node


def run(
    node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs the command at its most talkative.

    It must end, and no secret may be in anything that it says.
    """
    log, environment = node.cache.with_suffix(".log"), node.environment(**variables)
    ended = node.run("-v", "--log-file", str(log), *arguments, **variables)
    said = ended.stdout + ended.stderr + (log.read_text() if log.exists() else "")
    known = {PASSWORD, *secrets}
    known |= {
        value
        for name, value in environment.items()
        if re.fullmatch("OS_.*(PASSWORD|TOKEN|SECRET)", name) and value
    }
    assert [secret for secret in known if secret in said] == []
    return ended


def links(node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()) -> None:
    """Makes an image, which a run must then link."""
    (image,) = node.cloud.add_many(1)
    ended = run(node, variables, *arguments, secrets=secrets)
    assert (ended.returncode, node.linked(image)) == (0, True), ended.stderr


def refusal(
    node: Node, status: int, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> str:
    """Makes an image, and returns the one line of a run that must end with ``status`` and touch nothing."""
    node.cloud.add_many(1)
    before = everything(node)
    ended = run(node, variables, *arguments, secrets=secrets)
    lines = [
        line for line in ended.stderr.splitlines() if not line.startswith("ln-images: debug: ")
    ]
    assert (ended.returncode, ended.stdout, len(lines)) == (status, "", 1), ended.stderr
    assert re.fullmatch(r"ln-images: (?!a bug)[ -~]+", lines[0])
    assert everything(node) == before
    return lines[0]


def everything(node: Node) -> dict[Path, tuple[int, ...]]:
    """What a run could change: every name in the store and in the cache, and its inode."""
    found = {path: path.lstat() for path in (*node.images.iterdir(), *node.cache.iterdir())}
    return {
        path: (s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_ctime_ns)
        for path, s in found.items()
    }
