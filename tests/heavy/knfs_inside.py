"""Runs in the virtual machine that ``knfs.py`` starts.

A kernel NFS server, two compute nodes, and ``--prune``.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ln_images.instances import open_inodes

from ln_images.model import TemporaryError

# The one place that can be written; the file systems are mounted in it. All of the first is
# exported.
WORK = Path("/media")
FILE_SYSTEMS = ("ext4", "xfs", "btrfs")
ROOT = WORK / "ext4"
NFSD = Path("/proc/fs/nfsd")
RPC = Path("/proc/net/rpc")
# Seconds; the kernel's own are 90 and 90.
LEASE, GRACE = 15, 30
# rw, insecure, no_subtree_check, nohide, fsid=, crossmnt (include/uapi/linux/nfsd/export.h)
EXPORT_FLAGS = 0x2 | 0x400 | 0x200 | 0x2000 | 0x4000
DATA = b"\1" * 100_000


def write(path: Path, text: str) -> None:
    """One write, as the kernel's files want it."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def run(*command: object) -> None:
    """Runs a program to its end."""
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> float:
    """Polls until ``condition()`` is true, or fails; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"waited {seconds} s in vain: {what}")
        time.sleep(0.1)
    return time.monotonic() - start


def in_grace() -> bool:
    """Whether the server still waits for its clients of before to tell what they had open."""
    return (NFSD / "v4_end_grace").read_text().strip() != "Y"


def serve(*exports: Path) -> None:
    """Starts the server. What exportfs and mountd would tell the kernel is told it here."""
    for number in ("1", "2"):
        write(RPC / "auth.unix.ip" / "channel", f"nfsd 10.1.{number}.2 2147483647 nodes\n")
    for fsid, path in enumerate(exports):
        write(
            RPC / "nfsd.export" / "channel",
            f"nodes {path} 2147483647 {EXPORT_FLAGS} 65534 65534 {fsid}\n",
        )
        write(
            RPC / "nfsd.fh" / "channel",
            f"nodes 1 \\x{fsid.to_bytes(4, 'little').hex()} 2147483647 {path}\n",
        )
    write(NFSD / "versions", "-2 -3 +4\n")
    write(NFSD / "portlist", "tcp 2049\n")
    write(NFSD / "threads", "4\n")


class Node:
    """A compute node: host name, network and mounts of its own.

    Its directory ``base`` is the server's root.
    """

    def __init__(self, number: int) -> None:
        server, address = f"10.1.{number}.1", f"10.1.{number}.2"
        name, self._link = f"compute-{number}", f"to-{number}"
        mounted = WORK / name
        mounted.mkdir()
        self._process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sleep", "infinity"]
        )
        pid = str(self._process.pid)
        wait_until(
            lambda: os.readlink(f"/proc/{pid}/ns/uts") != os.readlink("/proc/self/ns/uts"), name
        )
        enter = ("nsenter", "--target", pid, "--net", "--mount", "--uts", "--root")
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", pid)
        run("ip", "address", "add", f"{server}/24", "dev", self._link)
        run("ip", "link", "set", self._link, "up")
        run(*enter, "hostname", name)
        run(*enter, "ip", "link", "set", "lo", "up")
        run(*enter, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        run(*enter, "ip", "link", "set", "eth0", "up")
        # Without mount.nfs4, so with the addresses that it would find.
        options = f"vers=4.2,hard,noatime,lookupcache=positive,addr={server},clientaddr={address}"
        run(*enter, "mount", "-i", "-t", "nfs4", "-o", options, f"{server}:/", mounted)
        self.base = Path(f"/proc/{pid}/root{mounted}")

    def connect(self, up: bool) -> None:
        """Plugs the network in or out."""
        run("ip", "link", "set", self._link, "up" if up else "down")

    def open(self, path: Path, mode: str = "rb") -> IO[bytes]:
        """Opens a file of the server's on the node."""
        file: IO[bytes] = (self.base / path.relative_to(ROOT)).open(mode, buffering=0)
        return file


def states() -> str:
    """What the kernel says of all clients."""
    said = b"".join(path.read_bytes() for path in sorted(NFSD.glob("clients/*/states")))
    return said.decode(errors="backslashreplace")


def held(inode: int) -> list[str]:
    """The kinds of entries for an inode."""
    return re.findall(rf'type: (\w+), [^"]*superblock: "[^"]*:{inode}"', states())


def expect(claim: str, inode: int, *kinds: str) -> None:
    """Prints a claim and what the kernel says.

    Fails where that is not ``kinds``, or the command reads it otherwise.
    """
    print(f"--- {claim}")
    print("".join(f"{line}\n" for line in states().splitlines() if f':{inode}"' in line), end="")
    assert held(inode) == list(kinds), states()
    assert (inode in open_inodes()) is bool(kinds), open_inodes()


def expect_nothing(claim: str, inode: int, *kinds: str) -> None:
    """As :func:`expect`, where the command must not take what the kernel says for the whole truth."""
    print(f"--- {claim}")
    assert held(inode) == list(kinds), states()
    try:
        raise AssertionError(open_inodes())
    except TemporaryError as error:
        print(error)


def new(name: str, directory: Path = ROOT) -> Path:
    """A new file on the server."""
    path = directory / name
    path.write_bytes(DATA)
    return path


def delegations(on: bool) -> None:
    """Lets the server grant them or not."""
    write(Path("/proc/sys/fs/leases-enable"), f"{on:d}\n")


def without_delegations(node: Node) -> None:
    """What is open is listed until it is closed, whatever becomes of its name."""
    delegations(False)
    path = new("base")
    inode = path.stat().st_ino
    expect("nobody has it open", inode)
    file = node.open(path)
    expect("open for reading", inode, "open")
    fcntl.lockf(file, fcntl.LOCK_SH)
    expect("and locked", inode, "open", "lock")
    fcntl.lockf(file, fcntl.LOCK_UN)
    retired = path.rename(path.with_suffix(".retired"))
    expect("renamed on the server while it is open", inode, "open")
    retired.unlink()
    expect("unlinked on the server while it is open", inode, "open")
    assert file.read(len(DATA)) == DATA
    file.close()
    expect("closed", inode)
    with node.open(new("written"), "r+b"):
        expect("open for reading and writing", (ROOT / "written").stat().st_ino, "open")


def with_delegations(node: Node) -> None:
    """A delegation outlives what is closed, and stands alone for what is opened again."""
    delegations(True)
    path = new("delegated")
    inode = path.stat().st_ino
    with node.open(path):
        expect("open for reading with a delegation", inode, "open", "deleg")
    expect("closed", inode, "deleg")
    with node.open(path):
        expect("opened again", inode, "deleg")
    seconds = wait_until(lambda: not held(inode), "for the end of a delegation")
    expect(f"given back {seconds:.0f} s after it was closed, with a lease of {LEASE} s", inode)
    with node.open(path):
        expect("opened once more", inode, "open", "deleg")
        path.rename(path.with_suffix(".retired"))
        expect("renamed on the server, which calls the delegation back", inode, "open")
    expect("closed", inode)


def hostile_name(node: Node) -> None:
    """A name is written as it is: with quotation marks, newlines and bytes that are no UTF-8."""
    path = new('a "b\\c\n\udcff, superblock: "fe:00:9999999"')
    with node.open(path):
        expect("open under an odd name", path.stat().st_ino, "open", "deleg")


def file_systems(node: Node) -> None:
    """The inode is always st_ino.

    The device is st_dev, but on btrfs, where each subvolume has an st_dev of its own.
    """
    delegations(False)
    run("btrfs", "subvolume", "create", ROOT / "btrfs" / "subvolume")
    for directory in (ROOT / "xfs", ROOT / "btrfs", ROOT / "btrfs" / "subvolume", ROOT / "overlay"):
        path = new("open", directory)
        with node.open(path):
            status = path.stat()
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            expect(f"{directory.relative_to(ROOT)}: st_dev is {device}", status.st_ino, "open")
            assert (f'"{device}:{status.st_ino}"' in states()) is (directory.parts[3] != "btrfs")


def lost_node(node: Node) -> None:
    """What a compute node had open when it died is listed on: the server is courteous for a day."""
    path = new("lost")
    inode = path.stat().st_ino
    with node.open(path):
        node.connect(False)

        def infos() -> str:
            return "".join(info.read_text() for info in NFSD.glob("clients/*/info"))

        seconds = wait_until(lambda: "status: courtesy" in infos(), "for the end of a lease")
        expect(f"its node is cut off and its lease over, after {seconds:.0f} s", inode, "open")
        node.connect(True)
        # Whatever the node asks renews its lease.
        wait_until(
            lambda: "status: courtesy" not in infos() and list(node.base.iterdir()), "for the node"
        )
        expect("its node is back", inode, "open")
    expect("closed", inode)


def restarted(node: Node, *exports: Path) -> None:
    """After a restart nothing is listed until the clients have told what they had open, within the grace period."""
    path = new("reclaimed")
    inode = path.stat().st_ino
    with node.open(path) as file:
        expect("open", inode, "open")
        write(NFSD / "threads", "0\n")
        expect_nothing("the server was stopped: it is in use, and not listed", inode)
        serve(*exports)
        assert in_grace()
        expect_nothing("the server was started again: it is in use, and not listed", inode)
        seconds = wait_until(lambda: held(inode), "for a client that reclaims")
        assert in_grace()
        expect_nothing(
            f"listed again {seconds:.0f} s later, but others may not yet be", inode, "open"
        )
        assert file.read(len(DATA)) == DATA


def forward(port: int) -> None:
    """Hands connections to a port of loopback on to the same port of loopback on the machine outside."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept(listener: socket.socket) -> None:
        while True:
            client = listener.accept()[0]
            server = socket.create_connection(("10.0.2.2", port))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(
        target=accept, args=(socket.create_server(("127.0.0.1", port)),), daemon=True
    ).start()


def prune(node: Node) -> None:
    """The real command leaves a base alone that a client holds open, and gives a retired one its name back."""
    wait_until(lambda: not in_grace(), "for the end of the grace period")
    delegations(True)
    told = json.loads((WORK / "cloud.json").read_text())
    for port in told["ports"]:
        forward(port)
    images, cache = ROOT / "images", ROOT / "imagecache"
    images.mkdir()
    cache.mkdir()
    new(told["here"], images)
    base = new(hashlib.sha1(told["gone"].encode()).hexdigest(), cache)  # noqa: S324
    os.setxattr(base, "user.ln_images.image_id", told["gone"].encode())
    retired = base.with_name(f"{base.name}.retired")
    command = [
        Path(sys.executable).with_name("ln-images"),
        "--images-dir",
        images,
        "--cache-dir",
        cache,
    ]
    command += [
        "--owner",
        "0:0",
        "--prune",
        "--prune-after",
        "1s",
        "--format",
        "json",
        "--timeout",
        "120",
    ]

    def outcome(claim: str, expected: str, reason: str = "") -> None:
        time.sleep(2)
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | told["environment"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        (found,) = [
            one for one in json.loads(done.stdout)["images"] if one["cache_name"] == base.name
        ]
        print(f"--- {claim}\n{found['outcome']}: {found['reason']}")
        assert found["outcome"] == expected
        assert reason in found["reason"]

    def closed() -> None:
        wait_until(lambda: inode not in open_inodes(), "for the end of a delegation")

    inode = base.stat().st_ino
    with node.open(base):
        outcome("a client has the base open", "kept", "an NFS client has it open")
    closed()
    outcome("no client has it open", "retired")
    with node.open(retired):
        outcome("a client has it open after all", "restored", "an NFS client has it open")
    closed()
    outcome("no client has it open", "retired")
    outcome("nor after it was retired", "pruned")
    assert not base.exists()
    assert not retired.exists()


def main() -> None:
    """Every case, one after the other; the first that is not as said ends it."""
    for letter, name in zip("abc", FILE_SYSTEMS, strict=True):
        path = ROOT if name == "ext4" else ROOT / name
        path.mkdir()
        run(f"mkfs.{name}", "-q", f"/dev/vd{letter}")
        run("mount", "-i", "-t", name, f"/dev/vd{letter}", path)
    layers = [ROOT / name for name in ("lower", "upper", "work", "overlay", "recovery")]
    for path in layers:
        path.mkdir()
    lower, upper, work, overlay, recovery = layers
    options = f"lowerdir={lower},upperdir={upper},workdir={work},index=on,nfs_export=on"
    run("mount", "-i", "-t", "overlay", "-o", options, "overlay", overlay)
    exports = (ROOT, ROOT / "xfs", ROOT / "btrfs", overlay)
    write(NFSD / "nfsv4gracetime", f"{GRACE}\n")
    write(NFSD / "nfsv4leasetime", f"{LEASE}\n")
    write(NFSD / "nfsv4recoverydir", f"{recovery}\n")
    # It says so before it was ever started, too.
    assert in_grace()
    assert not list(NFSD.glob("clients/*"))
    serve(*exports)
    # Nobody has anything to tell of before the start. To end it later would forget those who are
    # there.
    write(NFSD / "v4_end_grace", "Y\n")
    first, second = Node(1), Node(2)
    without_delegations(first)
    with_delegations(first)
    hostile_name(second)
    file_systems(first)
    lost_node(second)
    restarted(first, *exports)
    prune(first)
    print("All as said.")


if __name__ == "__main__":
    main()
