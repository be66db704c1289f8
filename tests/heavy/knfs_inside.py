"""Runs in the virtual machine that ``knfs.py`` starts, and prints one line for each claim.

The machine is a storage node with a kernel NFS server, set up as the documents say, and two compute
nodes that mount its exports. The first compute node is exported ``locks`` with ``no_root_squash``,
the second with ``root_squash``.
"""

import contextlib
import errno
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
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keystoneauth1.identity import v3
from keystoneauth1.session import Session

PROJECT = Path(__file__).resolve().parents[2]
TOOL = PROJECT / "tools" / "ln-images-node"
# What is shared with the machine outside.
WORK = Path("/mnt/work")
# The NFS server's root. It cannot be this machine's, because an overlay on 9p cannot be exported.
SERVED = Path("/srv/nfs")
# Where the disks of this machine are mounted, by file system. The first has Glance's directories.
DISKS = {"ext4": SERVED, "xfs": SERVED / "xfs", "btrfs": SERVED / "btrfs"}
GLANCE = Path("/var/lib/glance")
STORE, CACHE, LOCKS = GLANCE / "images", GLANCE / "imagecache", GLANCE / "locks"
INSTANCES = Path("/var/lib/nova/instances")
# Where a compute node mounts CACHE and LOCKS.
BASE, NODE_LOCKS = INSTANCES / "_base", INSTANCES / "locks"
NFSD = Path("/proc/fs/nfsd")
NODES = ("compute-1", "compute-2")
# How many images Glance has, each with this content.
IMAGES = 8
DATA = b"\1" * 1024 * 1024
OTHER_DATA = b"\2" * 1024 * 1024
NOVA, QEMU = 162, 107
USERS = f"nova:x:{NOVA}:{NOVA}::/var/lib/nova:/bin/sh\nqemu:x:{QEMU}:{QEMU}::/:/bin/sh\n"
GROUPS = f"nova:x:{NOVA}:\nqemu:x:{QEMU}:\n"
# Seconds; the kernel's own are 90 and 90.
LEASE, GRACE = 10, 15
EXPORTS = f"""
{CACHE}       10.1.0.0/16(rw,no_root_squash,no_subtree_check)
{LOCKS}       10.1.1.2(rw,no_root_squash,no_subtree_check)
{LOCKS}       10.1.2.2(rw,root_squash,no_subtree_check)
/xfs    10.1.0.0/16(rw,no_root_squash,no_subtree_check)
/btrfs  10.1.0.0/16(rw,no_root_squash,no_subtree_check)
"""
NFS_CONF = f"[exports]\nrootdir = {SERVED}\n"
NOVA_CONF = """
[DEFAULT]
state_path = /var/lib/nova
force_raw_images = False
[image_cache]
remove_unused_base_images = False
"""
NOVA_COMPUTE = f"#!{sys.executable}\nimport signal\nsignal.pause()\n"


def run(*command: object) -> str:
    """Run a program to its end, and return what it printed. Raises RuntimeError if it fails."""
    process = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=120
    )
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {process.stderr or process.stdout}")
    return process.stdout


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Poll until ``condition()`` is true. Raises TimeoutError that says what was waited for."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)


def ensure(condition: object, what: str) -> None:
    """Raise AssertionError, which fails the claim, unless the condition holds."""
    if not condition:
        raise AssertionError(what)


def forward(port: int) -> None:
    """Forward connections to a port of loopback to the same port of the machine outside."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept(listener: socket.socket) -> None:
        while True:
            client = listener.accept()[0]
            server = socket.create_connection(("10.0.2.2", port))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    listener = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=accept, args=(listener,), daemon=True).start()


def read_mount_options() -> dict[Path, str]:
    """Return the mount options in the lines of docs/install.md for /etc/fstab, by directory."""
    text = (PROJECT / "docs" / "install.md").read_text(encoding="utf-8")
    # $STORAGE:/var/lib/glance/locks  /var/lib/nova/instances/locks  nfs4  rw,hard,noatime  0  0
    lines = re.findall(r"^\$STORAGE:\S+\s+(\S+)\s+nfs4\s+(\S+)", text, re.MULTILINE)
    return {Path(directory): options for directory, options in lines}


MOUNT_OPTIONS = read_mount_options()


class StorageNode:
    """The storage node: its file systems, its exports, and the real commands on it."""

    def __init__(self) -> None:
        cloud = json.loads((WORK / "cloud.json").read_text())
        for port in cloud["ports"]:
            forward(port)
        self._environment: dict[str, str] = cloud["environment"]
        self._glance: str = cloud["glance"]
        self._images: list[str] = cloud["images"]

    def set_up(self) -> None:
        """Make the file systems and directories, and start the NFS server."""
        for letter, (name, path) in zip("abc", DISKS.items(), strict=True):
            path.mkdir(parents=True, exist_ok=True)
            run(f"mkfs.{name}", "-q", f"/dev/vd{letter}")
            run("mount", "-i", "-t", name, f"/dev/vd{letter}", path)
        served = SERVED / GLANCE.relative_to("/")
        for path in (served, GLANCE):
            path.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", served, GLANCE)
        STORE.mkdir(mode=0o750)
        for path in (CACHE, LOCKS):
            path.mkdir(mode=0o711)
            os.chown(path, NOVA, NOVA)
        Path("/etc/nfs.conf").write_text(NFS_CONF)
        Path("/etc/exports").write_text(EXPORTS)
        recovery = GLANCE / "recovery"
        recovery.mkdir(mode=0o700)
        for name, value in (
            ("nfsv4gracetime", GRACE),
            ("nfsv4leasetime", LEASE),
            # The kernel would start nfsdcltrack outside of this root.
            ("nfsv4recoverydir", recovery),
        ):
            (NFSD / name).write_text(f"{value}\n")
        run("rpcbind")
        run("exportfs", "-a")
        run("rpc.mountd")
        self.start_server()
        # There are no clients of before that the server would have to wait for.
        (NFSD / "v4_end_grace").write_text("Y\n")

    def start_server(self) -> None:
        """Start the NFS server."""
        run("rpc.nfsd", "4")

    def stop_server(self) -> None:
        """Stop the NFS server, which then forgets what its clients have open."""
        run("rpc.nfsd", "0")

    def new_image(self) -> str:
        """Put the file of one more of Glance's images into the store, and return its id."""
        image = self._images.pop()
        (STORE / image).write_bytes(DATA)
        return image

    def delete_image(self, image: str) -> None:
        """Delete an image in Glance, and its file as Glance does."""
        settings = self._environment
        auth = v3.Password(
            auth_url=settings["OS_AUTH_URL"],
            username=settings["OS_USERNAME"],
            password=settings["OS_PASSWORD"],
            project_name=settings["OS_PROJECT_NAME"],
            user_domain_name=settings["OS_USER_DOMAIN_NAME"],
            project_domain_name=settings["OS_PROJECT_DOMAIN_NAME"],
        )
        Session(auth=auth).delete(f"{self._glance}/v2/images/{image}")
        (STORE / image).unlink()

    def link(self) -> None:
        """Run ``ln-images``, which must succeed."""
        self._run("ln-images")

    def prune(self, name: str) -> tuple[str, str, str]:
        """Run ``ln-images-prune``, and return outcome, reason code and reason of one base."""
        document = self._run("ln-images-prune", "--after", "1s")
        for base in document["images"]:
            if base["cache_name"] == name:
                return base["outcome"], base["reason_code"], base["reason"]
        raise AssertionError(f"the report does not have {name}: {document}")

    def _run(self, command: str, *options: str) -> dict[str, Any]:
        program = Path(sys.executable).with_name(command)
        process = subprocess.run(
            [program, "--format", "json", "--timeout", "120", *options],
            env=os.environ | self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        ensure(process.returncode == 0, f"{command}: {process.stderr} {process.stdout}")
        document: dict[str, Any] = json.loads(process.stdout)
        return document


class ComputeNode:
    """A compute node: it has its own host name, network, mounts, instances and nova-compute.

    ``root`` is where this process sees the node's files.
    """

    def __init__(self, number: int) -> None:
        self.name = f"compute-{number}"
        self._server, self._address = f"10.1.{number}.1", f"10.1.{number}.2"
        namespaces = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sleep", "infinity"])
        self._pid = namespaces.pid
        self.root = Path(f"/proc/{self._pid}/root")
        wait_until(self._has_namespaces, f"the namespaces of {self.name}")
        self._set_up_network(number)
        self.run("hostname", self.name)
        self.run("mount", "-t", "tmpfs", "none", "/var/lib/nova")
        for path in (BASE, NODE_LOCKS):
            self.path(path).mkdir(parents=True)
        for path in (INSTANCES, BASE, NODE_LOCKS):
            os.chown(self.path(path), NOVA, NOVA)
        self.mount(BASE)
        self.mount(NODE_LOCKS)
        subprocess.Popen(
            [
                *self._enter(),
                *("setpriv", "--reuid", "nova", "--regid", "nova", "--clear-groups"),
                *("/usr/bin/nova-compute", "--config-file", "/etc/nova/nova.conf"),
            ]
        )

    def _has_namespaces(self) -> bool:
        own = os.readlink("/proc/self/ns/uts")
        return os.readlink(f"/proc/{self._pid}/ns/uts") != own

    def _set_up_network(self, number: int) -> None:
        link, pid = f"to-{number}", self._pid
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid)
        run("ip", "address", "add", f"{self._server}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self._address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "--net", "--mount", "--uts", "--root"]

    def run(self, *command: object) -> str:
        """Run a program on this node. Raises RuntimeError if it fails."""
        return run(*self._enter(), *command)

    def path(self, path: Path) -> Path:
        """Return where this process finds a file of this node."""
        return self.root / path.relative_to("/")

    def mount(
        self,
        target: Path,
        options: str | None = None,
        kind: str = "nfs4",
        source: Path | None = None,
    ) -> None:
        """Mount the export that belongs to ``target``, with the options of the documents."""
        if source is None:
            source = CACHE if target == BASE else LOCKS
        if options is None:
            options = MOUNT_OPTIONS[target]
        self.run("mount", "-t", kind, "-o", options, f"{self._server}:{source}", target)

    @contextlib.contextmanager
    def mounted_otherwise(self, target: Path, options: str, kind: str) -> Iterator[None]:
        """Mount an export with other options for a while."""
        self.run("umount", target)
        self.mount(target, options, kind)
        try:
            yield
        finally:
            self.run("umount", target)
            self.mount(target)

    def check(self, *options: str) -> dict[str, Any]:
        """Run the real ``ln-images-node``, and return its report."""
        process = subprocess.run(
            [*self._enter(), sys.executable, str(TOOL), "--json", *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        ensure(process.returncode in (0, 1) and process.stdout, process.stderr)
        report: dict[str, Any] = json.loads(process.stdout)
        return report

    def report(self) -> dict[str, Any]:
        """Write this node's report, which must be possible and complete."""
        report = self.check("--report")
        ensure(find_check(report, "report")["state"] == "ok", f"{self.name}: {report}")
        ensure(report["complete"], f"{self.name}: {report['incomplete_because']}")
        return report

    def create_server(self, base: str) -> str:
        """Create a server's disk on a base, as Nova does, and return the server's id."""
        server = str(uuid.uuid4())
        folder = INSTANCES / server
        self.run("mkdir", folder)
        # Its base need not be there: then -u and the size make it all the same.
        self.run(
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", BASE / base),
            *(folder / "disk", len(DATA)),
        )
        (self.path(folder) / "disk.info").write_text(json.dumps({f"{folder}/disk": "qcow2"}))
        return server

    def delete_server(self, server: str) -> None:
        """Delete a server's directory."""
        self.run("rm", "-r", INSTANCES / server)

    def opens(self, name: str) -> bool:
        """Return whether this node can open a base by its name, as a server that starts does."""
        try:
            with self.path(BASE / name).open("rb"):
                return True
        except FileNotFoundError:
            return False


class Reader:
    """A process of a compute node that has a base open, as QEMU has. Use it with ``with``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> bytes:
        """Return the whole content, and read it from the server and not from this node's cache."""
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(self._file.fileno(), len(DATA), 0)


def find_check(report: dict[str, Any], name: str) -> dict[str, str]:
    """Return one check of a node's report."""
    check: dict[str, str] = next(check for check in report["checks"] if check["name"] == name)
    return check


def list_wrong(report: dict[str, Any]) -> dict[str, str]:
    """Return what was found by each check that is WRONG, by its name."""
    return {
        check["name"]: check["found"] for check in report["checks"] if check["state"] == "WRONG"
    }


def cache_name(image: str) -> str:
    """Return the name under which Nova looks for an image."""
    return hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()


class Lab:
    """The storage node and both compute nodes."""

    def __init__(self) -> None:
        with Path("/etc/passwd").open("a") as users, Path("/etc/group").open("a") as groups:
            users.write(USERS)
            groups.write(GROUPS)
        # The NFS server looks up the names of its clients. There is no name server here.
        Path("/etc/resolv.conf").write_text("")
        names = [f"10.1.{number}.2 {name}" for number, name in enumerate(NODES, 1)]
        Path("/etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        for path in (Path("/etc/nova"), Path("/etc/libvirt"), Path("/var/lib/nova")):
            path.mkdir(parents=True, exist_ok=True)
        Path("/etc/nova/nova.conf").write_text(NOVA_CONF)
        Path("/etc/libvirt/qemu.conf").write_text('user = "qemu"\ngroup = "qemu"\n')
        nova_compute = Path("/usr/bin/nova-compute")
        nova_compute.write_text(NOVA_COMPUTE)
        nova_compute.chmod(0o755)
        self.storage = StorageNode()
        self.storage.set_up()
        self.first, self.second = ComputeNode(1), ComputeNode(2)
        # One image stays, and shows that store and cloud belong together.
        self.storage.new_image()
        self.storage.link()


Claim = Callable[[Lab], str]
CLAIMS: list[Claim] = []


def claim(function: Claim) -> Claim:
    """Register a claim. Its docstring says what holds; it returns what was measured on the way."""
    CLAIMS.append(function)
    return function


@claim
def test_check_of_the_documented_set_up(lab: Lab) -> str:
    """With the mounts that the documents show, ln-images-node finds nothing wrong."""
    for node in (lab.first, lab.second):
        report = node.report()
        ensure(not list_wrong(report), f"{node.name}: {list_wrong(report)}")
        # Now there is a file to lock.
        report = node.report()
        ensure(not list_wrong(report), f"{node.name}: {list_wrong(report)}")
        names = ["base_mount", "locks_mount", "hard_mounts", "lock_options", "lookupcache"]
        names += ["byte_range_locks", "link_owner", "nova_may_write", "report"]
        for name in names:
            check = find_check(report, name)
            ensure(check["state"] == "ok", f"{node.name}: {check}")
    return ""


@claim
def test_check_of_violated_options(lab: Lab) -> str:
    """ln-images-node finds each mount option that is not as the documents show, and only that."""
    base, locks = MOUNT_OPTIONS[BASE], MOUNT_OPTIONS[NODE_LOCKS]
    version_3 = f"vers=3,nolock,{locks}"
    cases = (
        (BASE, "nfs4", base.replace("hard", "soft"), "hard_mounts"),
        (NODE_LOCKS, "nfs4", locks.replace("hard", "soft"), "hard_mounts"),
        (BASE, "nfs4", base.replace(",lookupcache=positive", ""), "lookupcache"),
        (BASE, "nfs4", base.replace("lookupcache=positive", "lookupcache=all"), "lookupcache"),
        (BASE, "nfs4", base.replace("rw", "ro"), "nova_may_write"),
        (NODE_LOCKS, "nfs", version_3, "lock_options"),
        (NODE_LOCKS, "nfs", f"vers=3,local_lock=all,{locks}", "lock_options"),
        (NODE_LOCKS, "nfs", f"{version_3},local_lock=flock", "lock_options"),
        (NODE_LOCKS, "nfs", f"{version_3},local_lock=posix", "lock_options"),
    )
    for target, kind, options, name in cases:
        with lab.first.mounted_otherwise(target, options, kind):
            wrong = list_wrong(lab.first.check())
            ensure(wrong.keys() == {name}, f"{target.name} with {options}: {wrong}")
            ensure(str(target) in wrong[name], f"{target.name} with {options}: {wrong}")
    # What is no violation is not reported.
    options = base.replace("lookupcache=positive", "lookupcache=none")
    with lab.first.mounted_otherwise(BASE, options, "nfs4"):
        ensure(not list_wrong(lab.first.check()), "lookupcache=none is not wrong")
    return f"{len(cases)} options"


@claim
def test_locks_are_the_servers(lab: Lab) -> str:
    """A byte-range lock of one node is seen by the other, and with nolock it is not."""
    name = "nova-0123"
    (LOCKS / name).touch()
    # Root of the second node is nobody on the server.
    (LOCKS / name).chmod(0o666)
    with lab.first.path(NODE_LOCKS / name).open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        other = lab.second.path(NODE_LOCKS / name)
        ensure(not can_lock(other), "the other node takes the lock as well")
        with lab.second.mounted_otherwise(NODE_LOCKS, "vers=3,rw,hard,nolock", "nfs"):
            ensure(can_lock(other), "with nolock the other node sees the lock")
    # The tool tries its own last report first.
    report = NODE_LOCKS / "ln-images" / f"{lab.second.name}.json"
    with lab.first.path(report).open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        found = find_check(lab.second.check(), "byte_range_locks")
        ensure(found["state"] == "ok", str(found))
        ensure(found["found"].startswith("another process holds a lock"), str(found))
    return ""


def can_lock(path: Path) -> bool:
    """Return whether a lock that excludes others can be taken."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@claim
def test_new_names_are_visible(lab: Lab) -> str:
    """A node finds a link at its first look after it was made, and by default does not."""
    seconds = []
    for _ in range(2):
        image = lab.storage.new_image()
        name = cache_name(image)
        ensure(not lab.first.opens(name), "the name is there too early")
        lab.storage.link()
        start = time.monotonic()
        found = lab.first.opens(name)
        seconds.append(time.monotonic() - start)
        ensure(found, "the first look was in vain")
    options = MOUNT_OPTIONS[BASE].replace(",lookupcache=positive", "")
    with lab.second.mounted_otherwise(BASE, options, "nfs4"):
        image = lab.storage.new_image()
        path = lab.second.path(BASE / cache_name(image))
        ensure(not path.exists(), "the name is there too early")
        lab.storage.link()
        start = time.monotonic()
        ensure(not path.exists(), "without lookupcache=positive the name is there at once, too")
        wait_until(path.exists, "the link without lookupcache=positive")
        default = time.monotonic() - start
    return f"{max(seconds) * 1000:.0f} ms; without lookupcache=positive {default:.0f} s"


@claim
def test_renamed_bases_are_read_on(lab: Lab) -> str:
    """Whoever has a base open over NFSv4 reads on after it was renamed, and after its removal."""
    lab.first.run("mkdir", "-p", "/mnt/other")
    for name, disk in DISKS.items():
        directory = CACHE if name == "ext4" else disk
        export = CACHE if name == "ext4" else Path("/", name)
        path = directory / "base"
        path.write_bytes(DATA)
        lab.first.mount(Path("/mnt/other"), MOUNT_OPTIONS[BASE], source=export)
        try:
            with Reader(lab.first.path(Path("/mnt/other/base"))) as reader:
                ensure(reader.read() == DATA, f"{name}: it cannot be read")
                path.rename(path.with_suffix(".retired"))
                ensure(reader.read() == DATA, f"{name}: it cannot be read under its new name")
                # What is read comes from the server and from no cache.
                path.with_suffix(".retired").write_bytes(OTHER_DATA)
                ensure(reader.read() == OTHER_DATA, f"{name}: what was read is no news")
                path.with_suffix(".retired").unlink()
                ensure(reader.read() == OTHER_DATA, f"{name}: it cannot be read after its end")
        finally:
            lab.first.run("umount", "/mnt/other")
    return ", ".join(DISKS)


@claim
def test_renamed_bases_survive_a_restart(lab: Lab) -> str:
    """Whoever has a base open reads on if it was renamed and the NFS server was started anew."""
    path = CACHE / "base"
    path.write_bytes(DATA)
    with Reader(lab.first.path(BASE / "base")) as reader:
        ensure(reader.read() == DATA, "it cannot be read")
        lab.storage.stop_server()
        path.rename(path.with_suffix(".retired"))
        path.with_suffix(".retired").write_bytes(OTHER_DATA)
        lab.storage.start_server()
        start = time.monotonic()
        ensure(reader.read() == OTHER_DATA, "it cannot be read after the restart")
        seconds = time.monotonic() - start
    path.with_suffix(".retired").unlink()
    return f"after {seconds:.0f} s, with a grace period of {GRACE} s"


@claim
def test_a_base_removed_on_its_own_node_is_still_there(lab: Lab) -> str:
    """A base that a node removes while it has it open stays in the cache as ``.nfs...``."""
    path = CACHE / "base"
    path.write_bytes(DATA)
    with Reader(lab.first.path(BASE / "base")) as reader:
        lab.first.run("rm", BASE / "base")
        ensure(not path.exists(), "it has its name")
        (hidden,) = CACHE.glob(".nfs*")
        ensure(hidden.read_bytes() == DATA, "it has another content")
        ensure(reader.read() == DATA, "it cannot be read any more")
        targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        ensure(
            any(f"{BASE.name}/{hidden.name}" in target for target in targets),
            f"no descriptor shows its name: {targets}",
        )
    wait_until(lambda: not hidden.exists(), "the end of the file")
    return hidden.name


@claim
def test_a_hanging_mount_can_be_replaced(lab: Lab) -> str:
    """The commands of docs/recovery.md mount both directories anew, although a base is open."""
    image = lab.storage.new_image()
    lab.storage.link()
    name = cache_name(image)
    with Reader(lab.first.path(BASE / name)):
        lab.storage.stop_server()
        for directory in (BASE, NODE_LOCKS):
            lab.first.run("umount", "-f", "-l", directory)
        lab.storage.start_server()
        for directory in (BASE, NODE_LOCKS):
            lab.first.mount(directory)
        ensure(lab.first.opens(name), "the base cannot be opened")
    lab.storage.delete_image(image)
    return ""


@claim
def test_reports_under_root_squash(lab: Lab) -> str:
    """Root of a node writes its report as the owner of ``locks``, with root_squash and without."""
    lab.first.run("touch", NODE_LOCKS / "of-root")
    ensure((LOCKS / "of-root").stat().st_uid == 0, "root of the first node is not root")
    try:
        lab.second.run("touch", NODE_LOCKS / "of-nobody")
    except RuntimeError as error:
        ensure(os.strerror(errno.EACCES) in str(error), str(error))
    else:
        raise AssertionError("root of the second node may write to locks")
    (LOCKS / "of-root").unlink()
    for node in (lab.first, lab.second):
        file = LOCKS / "ln-images" / f"{node.name}.json"
        before = time.time()
        node.report()
        ensure(file.stat().st_uid == NOVA, f"{file} belongs to {file.stat().st_uid}")
        ensure(json.loads(file.read_text())["time"] > before - 1, f"{file} is an old one")
    return ""


@claim
def test_clean_up_by_reports(lab: Lab) -> str:
    """ln-images-prune keeps, retires, restores and removes a base as the nodes' disks need it."""
    image = lab.storage.new_image()
    name = cache_name(image)
    lab.storage.link()
    server = lab.first.create_server(name)
    lab.storage.delete_image(image)

    def expect(outcome: str, reason: str) -> None:
        time.sleep(2)
        for node in (lab.first, lab.second):
            node.report()
        verdict = lab.storage.prune(name)
        ensure(verdict[:2] == (outcome, reason), f"{verdict}, not {outcome}: {reason}")

    with Reader(lab.first.path(BASE / name)) as reader:
        expect("kept", "in_use")
        lab.first.delete_server(server)
        expect("kept", "first_seen_unused")
        expect("retired", "unused")
        ensure(reader.read() == DATA, "it cannot be read after it was retired")
        wait_until(lambda: not lab.second.opens(name), "the end of the name on the other node")
        # A disk that no report had: the node whose root is nobody reports it.
        server = lab.second.create_server(name)
        expect("restored", "in_use")
        ensure(reader.read() == DATA, "it cannot be read after it was restored")
        wait_until(lambda: lab.second.opens(name), "the name on the other node")
        lab.second.delete_server(server)
        expect("kept", "first_seen_unused")
        expect("retired", "unused")
        expect("pruned", "unused_while_retired")
        ensure(reader.read() == DATA, "it cannot be read after it was removed")
    ensure(not [path for path in CACHE.iterdir() if path.name.startswith(name)], "it is there")
    return ""


def is_claimed(lab: Lab, function: Claim) -> bool:
    """Try a claim, print how it went, and return whether it holds."""
    start = time.monotonic()
    try:
        measured = function(lab)
    except Exception as error:
        print(f"FAILED  {function.__doc__} {type(error).__name__}: {error}")
        return False
    text = f" ({measured})" if measured else ""
    print(f"holds   {function.__doc__}{text} [{time.monotonic() - start:.0f} s]")
    return True


def main(names: list[str]) -> int:
    """Try all claims, or those with these names. Return 0 if all of them hold."""
    lab = Lab()
    # Not a generator: one claim that fails does not keep the others from being tried.
    claims = [function for function in CLAIMS if not names or function.__name__ in names]
    results = [is_claimed(lab, function) for function in claims]
    failed = results.count(False)
    print(f"{failed} failed" if failed else "all hold")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
