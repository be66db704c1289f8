"""File systems that tests mount as root: images on loop devices, and FUSE."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cloud import wait_until

# Debian has mkfs there, and a user's PATH may lack it.
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}


def run_tool(*command: str | Path) -> None:
    """Run a program of the administrator's, which must succeed."""
    subprocess.run(command, check=True, capture_output=True, env=_ENVIRONMENT)


@contextlib.contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[Path]:
    """Mount something on ``directory``, which is made if it is missing, for a while."""
    directory.mkdir(exist_ok=True)
    run_tool("mount", *arguments, directory)
    try:
        yield directory
    finally:
        run_tool("umount", "--lazy", directory)


@contextlib.contextmanager
def formatted(place: Path, *mkfs: str, mebibytes: int = 320) -> Iterator[Path]:
    """Mount a new file system in the file ``device`` of ``place`` on ``volume`` beside it.

    The default size is the smallest that XFS accepts.
    """
    device = place / "device"
    with device.open("wb") as file:
        file.truncate(mebibytes << 20)
    run_tool(*mkfs, device)
    with mounted(place / "volume", "-o", "loop", str(device)) as volume:
        yield volume


@contextlib.contextmanager
def fuse(directory: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a FUSE file system in the foreground, and return its process once it is mounted.

    ``command`` gets ``directory`` as its last argument. The process may be killed meanwhile. The
    test is skipped if the program is not installed.
    """
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    directory.mkdir(exist_ok=True)
    process = subprocess.Popen([*command, directory], stdout=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: process.poll() is not None or os.path.ismount(directory),
            f"{command[0]} on {directory}",
        )
        assert process.poll() is None, f"{command[0]} did not start"
        yield process
    finally:
        subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)
        process.kill()
        process.wait()
