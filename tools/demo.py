"""``make demo``.

The whole job on a real Keystone and Glance, in a temporary directory that is removed again.

``make cloud`` is the same cloud without the show: it stays until it is interrupted. With
``DIRECTORY`` it lies there.
"""

import argparse
import contextlib
import getpass
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.cloud import Cloud, wait_until

MIB = 1024 * 1024
# Chosen ids make every run print the same; Glance lets a user choose.
DEBIAN, RESCUE, SNAPSHOT, NEXT = (f"{n}0000000-0000-4000-8000-000000000000" for n in "1234")


def main() -> int:
    """Runs the demo, or a cloud until it is interrupted; then 130.

    Servers and files are gone afterwards.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep", action="store_true", help="only run the cloud, until it is interrupted"
    )
    parser.add_argument("--directory", type=Path, help="where it lies; must not exist yet")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _fresh(options.directory) as directory:
            print("Starting a real Keystone and a real Glance on loopback ...", flush=True)
            with Cloud(directory) as cloud:
                (cloud.directory / "imagecache").mkdir()
                if options.keep:
                    _keep(cloud)
                _show(cloud)
            print("\nThe servers are stopped and the directory is removed.")
    except KeyboardInterrupt:
        print("\nInterrupted: the servers are stopped and the directory is removed.")
        return 130
    return 0


@contextlib.contextmanager
def _fresh(directory: Path | None) -> Iterator[Path]:
    """The directory, or a temporary one. It is made, and removed in the end."""
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="ln-images-demo-") as temporary:
            yield Path(temporary)
        return
    try:
        directory.mkdir()
    except OSError as error:
        sys.exit(
            f"{directory}: {error.strerror}: name a directory that can be made, and is not there yet"
        )
    try:
        yield directory
    finally:
        # A pass that cron has begun may still write there.
        shutil.rmtree(directory, ignore_errors=True)


def _interrupt(number: int, _frame: object) -> None:
    """The first signal ends the demo; the clean-up that follows is not to be interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _show(cloud: Cloud) -> None:
    owner = _owner()
    cloud.image("debian-12", b"\1" * 3 * MIB, id=DEBIAN)
    cloud.image("rescue", b"\2" * MIB, id=RESCUE)
    cloud.create("tomorrow", id=NEXT)
    cloud.create("snapshot-of-web-1", id=SNAPSHOT)
    upload = cloud.slow_upload(SNAPSHOT, b"\3" * MIB)
    wait_until(
        lambda: (cloud.images / SNAPSHOT).exists() and (cloud.images / SNAPSHOT).stat().st_size,
        "half a file",
    )
    print("Four images: two finished, one queued, and a snapshot that is still being uploaded.")
    _run(
        cloud, "ln-images", "--images-dir", "images", "--cache-dir", "imagecache", "--owner", owner
    )
    _run(cloud, "ls", "-li", "--time-style=+", "images", "imagecache")
    upload.finish(b"\3" * MIB)
    print("\nThe upload is finished. The next pass:")
    _run(
        cloud, "ln-images", "--images-dir", "images", "--cache-dir", "imagecache", "--owner", owner
    )


def _keep(cloud: Cloud) -> None:
    """Writes an openrc, says where it is, and waits for the signal that ends it all."""
    variables = cloud.environment() | {
        "LN_IMAGES_IMAGES_DIR": str(cloud.images),
        "LN_IMAGES_CACHE_DIR": str(cloud.directory / "imagecache"),
        "LN_IMAGES_OWNER": _owner(),
    }
    openrc = cloud.directory / "openrc"
    openrc.touch(mode=0o600)
    openrc.write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    )
    print(f"The cloud is up until Ctrl-C. In another terminal:\n\n    . {openrc}", flush=True)
    while True:
        signal.pause()


def _owner() -> str:
    try:
        return pwd.getpwnam("qemu").pw_name
    except KeyError:
        user = getpass.getuser()
        print(f"This machine has no user qemu: the demo uses {user}.")
        return user


def _run(cloud: Cloud, *command: str) -> None:
    print("\n$", *command, flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OS_", "LN_IMAGES_"))
    }
    environment |= cloud.environment() | {"PATH": path, "LC_ALL": "C.UTF-8"}
    subprocess.run(command, cwd=cloud.directory, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
