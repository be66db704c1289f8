"""Show the whole job on a real Keystone and Glance, in a directory that is removed again.

``make demo`` runs it. With ``--keep``, which is ``make cloud``, it only starts the services, and
keeps them until Ctrl-C, so that the commands can be tried on them.
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
from typing import Any, NoReturn

from support.cloud import Cloud, wait_until

MIB = 1024 * 1024
# Glance lets users choose ids. With these, every run prints the same.
DEBIAN = "10000000-0000-4000-8000-000000000000"
SNAPSHOT = "20000000-0000-4000-8000-000000000000"


def main() -> int:
    """Run the demo, or keep a cloud. Return 130 if a signal interrupted it.

    The servers are stopped and the files are removed in either case.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep", action="store_true", help="only start the services, and keep them until Ctrl-C"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="where everything is; it must not exist yet (default: a temporary directory)",
    )
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with make_directory(options.directory) as directory:
            print("Starting a real Keystone and a real Glance on loopback ...", flush=True)
            with Cloud(directory) as cloud:
                (cloud.directory / "imagecache").mkdir()
                if options.keep:
                    keep_cloud(cloud)
                show_job(cloud)
            print("\nThe servers are stopped and the directory is removed.")
    except KeyboardInterrupt:
        print("\nInterrupted: the servers are stopped and the directory is removed.")
        return 130
    return 0


@contextlib.contextmanager
def make_directory(path: Path | None) -> Iterator[Path]:
    """Make a directory, by default a temporary one, and remove it in the end."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="ln-images-demo-") as temporary:
            yield Path(temporary)
        return
    try:
        path.mkdir()
    except OSError as error:
        sys.exit(f"--directory {path}: {error.strerror}; name one that does not exist yet")
    try:
        yield path
    finally:
        # A pass that somebody started may still write there.
        shutil.rmtree(path, ignore_errors=True)


def interrupt(number: int, _frame: Any) -> None:
    """End the demo at the first signal. The clean-up that follows is not interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def show_job(cloud: Cloud) -> None:
    """Run two passes, one while a snapshot is being uploaded and one after that."""
    owner = find_owner()
    directories = ("--images-dir", "images", "--cache-dir", "imagecache")
    cloud.image("debian-12", b"\1" * 3 * MIB, id=DEBIAN)
    cloud.create("snapshot-of-web-1", id=SNAPSHOT)
    upload = cloud.slow_upload(SNAPSHOT, b"\3" * MIB)
    file = cloud.images / SNAPSHOT
    wait_until(lambda: file.exists() and file.stat().st_size, "the first half of the snapshot")
    print("Two images: one is finished, and a snapshot is still being uploaded.")
    run(cloud, "ln-images", *directories, "--owner", owner)
    run(cloud, "ls", "-i", "images", "imagecache")
    upload.finish(b"\3" * MIB)
    print("\nThe upload is finished. The next pass:")
    run(cloud, "ln-images", *directories, "--owner", owner)


def run(cloud: Cloud, *command: str) -> None:
    """Print a command as a user types it, and run it with an administrator's openrc."""
    print("\n$", *command, flush=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OS_", "LN_IMAGES_"))
    }
    environment |= cloud.environment()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["LC_ALL"] = "C.UTF-8"
    subprocess.run(command, cwd=cloud.directory, env=environment, check=True)


def keep_cloud(cloud: Cloud) -> NoReturn:
    """Write an openrc, print what to type, and wait for the signal that ends everything."""
    variables = cloud.environment() | {
        "LN_IMAGES_IMAGES_DIR": str(cloud.images),
        "LN_IMAGES_CACHE_DIR": str(cloud.directory / "imagecache"),
        "LN_IMAGES_OWNER": find_owner(),
    }
    openrc = cloud.directory / "openrc"
    # It has a password.
    openrc.touch(mode=0o600)
    openrc.write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    )
    command = Path(sys.executable).with_name("ln-images")
    print(
        "The cloud runs until Ctrl-C. In another terminal:\n"
        f"\n    . {shlex.quote(str(openrc))}"
        f"\n    {shlex.quote(str(command))} --full",
        flush=True,
    )
    while True:
        signal.pause()


def find_owner() -> str:
    """Return the user whom links shall belong to: qemu, or else whoever runs the demo."""
    try:
        return pwd.getpwnam("qemu").pw_name
    except KeyError:
        user = getpass.getuser()
        print(f"This machine has no user qemu: the demo uses {user}.")
        return user


if __name__ == "__main__":
    sys.exit(main())
