"""``inside.py COMMAND``: run a command as root on a machine of its own, which then disappears.

The machine is a set of Linux namespaces: processes, mounts, network, host name. What is written
below /etc, /run, /tmp, /var and at home goes into memory, so that users, daemons and their files
can be made with the paths that production has. When the command ends, or this program ends
for whatever reason, the kernel ends every process of that machine, and with them the mounts.
``RIG_DIRECTORY`` names a directory on disk for what is too big for memory. It is removed in the
end.
"""

import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent
# Where the project's ``.nova`` is on that machine: Nova's user may have no access to the project.
NOVA = Path("/run/nova")
UNSHARE = (
    "unshare",
    "--mount",
    "--pid",
    "--net",
    "--uts",
    "--ipc",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def main(*command: str) -> int:
    """Make the machine, run the command there, and return its status."""
    if os.getuid():
        sys.exit(
            "inside.py: it makes users, mounts and virtual machines in namespaces; run it as root"
        )
    directory = tempfile.mkdtemp(prefix="ln-images-nova-")
    os.chmod(directory, 0o755)  # noqa: S103
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        # The machine dies with unshare, and unshare with this process.
        machine = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                *UNSHARE,
                sys.executable,
                __file__,
                "--inside",
                *command,
            ],
            env=os.environ | {"RIG_DIRECTORY": directory},
        )
        try:
            return machine.wait()
        finally:
            machine.kill()
            machine.wait()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    finally:
        _remove(directory)


def _interrupt(number: int, _frame: object) -> None:
    """End at the first signal. The clean-up that follows is not interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _remove(directory: str) -> None:
    """Remove the directory. The last processes that write there may still be ending."""
    deadline = time.monotonic() + 60
    while os.path.exists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def inside(*command: str) -> int:
    """Be the first process of the machine: make the mounts, and run the command.

    It is the parent of every orphan.
    """
    _loopback_up()
    _mount("-t", "tmpfs", "tmpfs", "/run")
    # Without control groups libvirt works as well, and leaves none behind.
    subprocess.run(
        ["umount", "--recursive", "/sys/fs/cgroup"], check=False, stderr=subprocess.DEVNULL
    )
    _write_in_memory()
    NOVA.mkdir()
    _mount("--bind", str(ROOT / ".nova"), str(NOVA))
    _hide_kvm()
    started = subprocess.Popen(command)
    # Children of daemons become children of this process. Whoever waits for their end sees it only
    # after this process has waited for them.
    while True:
        pid, status = os.wait()
        if pid == started.pid:
            return os.waitstatus_to_exitcode(status) & 0xFF


def _write_in_memory() -> None:
    """Lay memory over the directories where daemons write.

    The project and the rig's directory stay as they are.
    """
    kept = {path: os.open(path, os.O_PATH) for path in (str(ROOT), os.environ["RIG_DIRECTORY"])}
    memory = Path("/run/overlays")
    memory.mkdir()
    # Even Nova's user must reach its Python, wherever that is installed.
    closed = {ancestor for ancestor in Path(sys.base_prefix).parents if _closed(ancestor)}
    for path in sorted({Path("/etc"), Path("/tmp"), Path("/var"), Path.home()} | closed):
        upper, work = memory / f"upper{path}", memory / f"work{path}"
        for made in (upper, work):
            made.mkdir(parents=True)
        upper.chmod(0o1777 if path == Path("/tmp") else 0o755)
        _mount(
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={path},upperdir={upper},workdir={work}",
            str(path),
        )
    for target, opened in kept.items():
        _mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{opened}", target)


def _hide_kvm() -> None:
    """Hide hardware virtualisation, which not every machine has.

    If only root may use it, libvirtd finds it and libvirt's QEMU does not. Then libvirt probes QEMU
    anew at every step, which takes each server seven seconds (libvirt 9.0.0, virQEMUCapsIsValid in
    qemu_capabilities.c).
    """
    if Path("/dev/kvm").exists():
        nothing = Path("/run/no-kvm")
        nothing.touch(0o000)
        _mount("--bind", str(nothing), "/dev/kvm")


def _closed(path: Path) -> bool:
    return not path.stat().st_mode & stat.S_IXOTH


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(inside(*sys.argv[2:]))
    sys.exit(main(*sys.argv[1:]))
