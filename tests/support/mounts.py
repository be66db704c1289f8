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


def run_tool(*command: str | Path) -> str:
    """Run a program of the administrator's, which must succeed. Return what it prints."""
    run = subprocess.run(command, check=True, capture_output=True, env=_ENVIRONMENT, text=True)
    return run.stdout


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


def unmount_everywhere(place: Path) -> None:
    """Unmount the file system of ``formatted``, and wait until the kernel has forgotten it.

    Another test may have copied the mount into a namespace of its own (``unshare --mount``). Until
    that has ended the kernel keeps the file system, and would show its old state after a new mount.
    """
    device = place / "device"
    run_tool("umount", place / "volume")
    wait_until(
        lambda: not run_tool("losetup", "--associated", device), f"the last unmount of {device}"
    )


def edit_unmounted(place: Path, *requests: str) -> None:
    """Unmount the ext4 of ``formatted``, change it with debugfs(8), and mount it again.

    So a file gets what no system call can give it, such as a ctime or an inode that is cleared.
    """
    device, volume = place / "device", place / "volume"
    unmount_everywhere(place)
    for request in requests:
        run_tool("debugfs", "-w", "-R", request, device)
    run_tool("mount", "-o", "loop", device, volume)


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


@contextlib.contextmanager
def bound(place: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Show the directory ``real`` of ``place`` on ``bound`` beside it, with bindfs(1).

    Return its process, as ``fuse`` does.
    """
    (place / "real").mkdir(exist_ok=True)
    with fuse(place / "bound", "bindfs", "-f", *options, place / "real") as process:
        yield process


@contextlib.contextmanager
def merged(place: Path) -> Iterator[Path]:
    """Mount a store and a cache between which no link is possible, with mergerfs(1).

    Each directory exists on another branch of it, so no branch can have a link between them.
    """
    for directory in ("one/images", "two/cache"):
        (place / directory).mkdir(parents=True)
    branches = f"{place}/one:{place}/two"
    options = ("-f", "-o", "category.create=epmfs")
    with fuse(place / "merged", "mergerfs", *options, branches):
        yield place / "merged"
