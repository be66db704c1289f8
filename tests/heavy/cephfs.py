"""``make test-cephfs``: ln-images on a real CephFS with two clients, one line for each claim.

The test starts a Ceph cluster of one node, from Debian's packages, on loopback and without
authentication, in one temporary directory. It has a monitor, a manager, a metadata server and an
OSD on a sparse file. Two ``ceph-fuse`` mounts are two clients: Glance stores its images through the
first, which is the storage node, and the second is a compute node. The test needs root, takes some
minutes, and is no part of ``make test``. Whatever ends it, it leaves no process, mount or file.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ln_images.model import Command
from ln_images.store import IMAGE_ID_MARK, UNUSED_SINCE_MARK
from support.bases import write_report
from support.cloud import REGION, ROOT, Cloud, wait_until
from support.compute import Compute, in_catalog
from support.node import OWNER, Node, executable

MIB = 1024 * 1024
HOST = "compute-1"
START_SECONDS = 120.0
CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}/0]
public_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {directory}
admin_socket = {directory}/$name.$pid.asok
log_file = {directory}/$name.log
crash_dir = {directory}
mon_data = {directory}/mon
mgr_data = {directory}/mgr
mds_data = {directory}/mds
osd_data = {directory}/osd
osd_objectstore = bluestore
bluestore_block_size = 17179869184
osd_memory_target = 1073741824
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
"""


class Ceph:
    """A running cluster with one file system, mounted at ``a`` and at ``b`` by two clients.

    Use it as a context manager.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._configuration = directory / "ceph.conf"
        self.a, self.b = directory / "a", directory / "b"
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ends:
            self._start(ends)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _start(self, ends: contextlib.ExitStack) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        fsid, osd = uuid.uuid4(), str(uuid.uuid4())
        self._configuration.write_text(
            CONFIGURATION.format(fsid=fsid, port=port, directory=self._directory)
        )
        for name in ("mon", "mgr", "mds", "osd", "a", "b"):
            (self._directory / name).mkdir()
        monmap = str(self._directory / "monmap")
        address = f"[v2:127.0.0.1:{port}]"
        self._run("monmaptool", "--create", "--fsid", str(fsid), "--addv", "m", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "m", "--monmap", monmap)
        self._spawn(ends, "ceph-mon", "-f", "-i", "m")
        self._wait("the monitor", "quorum_status")
        self._spawn(ends, "ceph-mgr", "-f", "-i", "x")
        self._run("ceph", "osd", "new", osd, "0")
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        self._spawn(ends, "ceph-osd", "-f", "-i", "0")
        for pool in ("metadata", "data"):
            self._run("ceph", "osd", "pool", "create", pool, "8")
        self._run("ceph", "fs", "new", "fs", "metadata", "data")
        self._spawn(ends, "ceph-mds", "-f", "-i", "s")
        wait_until(
            lambda: b"up:active" in self._run("ceph", "mds", "stat"),
            "the metadata server",
            START_SECONDS,
        )
        for mount in (self.a, self.b):
            self._mount(ends, mount)

    def _mount(self, ends: contextlib.ExitStack, mount: Path) -> None:
        process = self._spawn(ends, "ceph-fuse", "-f", "-n", "client.admin", str(mount))
        ends.callback(_unmount, mount)
        wait_until(
            lambda: mount.is_mount() or process.poll() is not None,
            f"the mount of {mount}",
            START_SECONDS,
        )
        if not mount.is_mount():
            raise RuntimeError(f"{mount} was not mounted; see the logs in {self._directory}")

    def _wait(self, what: str, *query: str) -> None:
        def answers() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                return bool(self._run("ceph", "--connect-timeout", "5", *query))
            return False

        wait_until(answers, what, START_SECONDS)

    def _run(self, program: str, *arguments: str) -> bytes:
        command = [program, "-c", str(self._configuration), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, timeout=START_SECONDS)
        if done.returncode:
            raise subprocess.SubprocessError(
                f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}"
            )
        return done.stdout

    def _spawn(
        self, ends: contextlib.ExitStack, program: str, *arguments: str
    ) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground. When the stack unwinds, it is ended by its own pid."""
        with (self._directory / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                [program, "-c", str(self._configuration), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ends.callback(_end, process)
        return process


def _unmount(mount: Path) -> None:
    for options in ([], ["-l"]):
        if mount.is_mount():
            subprocess.run(
                ["umount", *options, mount], check=False, timeout=30, capture_output=True
            )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Lab:
    """The cluster, a cloud that stores on it, a storage node and a compute node.

    The storage node uses the first client, and the compute node the second. ``reports`` is where
    the compute node's reports are.
    """

    def __init__(self, ceph: Ceph, cloud: Cloud, directory: Path) -> None:
        self.ceph = ceph
        self.cloud = cloud
        self.node = Node(cloud, ceph.a / "imagecache")
        self.reports = ceph.a / "locks" / "ln-images"
        self.instances = directory / "instances"
        self._nova_conf = directory / "nova.conf"
        self._nova_conf.write_text(
            f"[DEFAULT]\nhost = {HOST}\ninstances_path = {self.instances}\n"
            "force_raw_images = False\n[image_cache]\nremove_unused_base_images = False\n"
        )
        self.instances.mkdir()
        # The two directories of a compute node that all nodes share.
        (self.instances / "_base").symlink_to(ceph.b / "imagecache")
        (self.instances / "locks").symlink_to(ceph.b / "locks")

    def clear(self) -> None:
        """Remove every image, base, report and disk."""
        self.cloud.clear()
        for path in (self.node.cache, self.reports.parent):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def there(self, path: Path) -> Path:
        """Return the path of the same file at the other client."""
        return self.ceph.b / path.relative_to(self.ceph.a)

    def link(self) -> None:
        """Run a pass, which must succeed."""
        run = self.node.process("-q")
        ensure(run.returncode == 0, run.stderr)

    def prune(self, name: str) -> tuple[str, str]:
        """Run ``ln-images-prune``, and return outcome and reason code of one base."""
        document = self.node.report(
            "--reports-dir", str(self.reports), "--after", "1s", command=Command.PRUNE
        )
        for base in document["images"]:
            if base["cache_name"] == name:
                return base["outcome"], base["reason_code"]
        raise AssertionError(f"the report does not have {name}: {document}")

    def check(self, *options: str) -> dict[str, Any]:
        """Run the real ``ln-images-node`` on the compute node, and return its report."""
        tool = ROOT / "tools" / "ln-images-node"
        # A nova-compute of this machine is none of this node's.
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            sys.executable,
            str(tool),
        ]
        command += ["--config-file", str(self._nova_conf), "--json", *options]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        ensure(run.stdout, run.stderr)
        report: dict[str, Any] = json.loads(run.stdout)
        return report

    def create_disk(self, name: str) -> Path:
        """Create a server's disk on a base, which need not be there, and return its path."""
        folder = self.instances / str(uuid.uuid4())
        folder.mkdir()
        disk = folder / "disk"
        base = self.instances / "_base" / name
        subprocess.run(
            ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base, disk, "8M"],
            check=True,
        )
        return disk

    def begin(self, *arguments: str, command: Command = Command.LINK) -> subprocess.Popen[bytes]:
        """Start a command, and do not wait for its end."""
        return subprocess.Popen(
            [executable(command), "-q", *arguments],
            env=self.node.environment(),
            stderr=subprocess.DEVNULL,
        )


Claim = Callable[[Lab], str]
CLAIMS: list[Claim] = []


def claim(function: Claim) -> Claim:
    """Register a claim. Its docstring says what holds; it returns what was measured on the way."""
    CLAIMS.append(function)
    return function


def ensure(condition: object, what: str) -> None:
    """Raise AssertionError, which fails the claim, unless the condition holds."""
    if not condition:
        raise AssertionError(what)


@claim
def test_finished_images_are_linked(lab: Lab) -> str:
    """A finished image is linked, and the other client finds it whole at its next look."""
    after: list[float] = []
    during: list[float] = []
    for number in range(10):
        image = lab.cloud.create(f"image {number}")
        here = lab.node.entry(image)
        there = lab.there(here)
        ensure(not there.exists(), "the name is there too early")
        data = bytes([number + 1]) * (3 * MIB + number)
        lab.cloud.upload(image, data)
        # The other client knows Glance's file as it was before.
        with lab.there(lab.node.images / image).open("rb") as open_file:
            process = lab.begin()
            if number % 2:
                wait_until(here.exists, "the link")
                seconds, found = look(there)
                ensure(found, "a look after the link was in vain")
                after.append(seconds)
            else:
                # Looks that fall into the very moment in which the link is made.
                looks = [look(there)]
                while not looks[-1][1]:
                    looks.append(look(there))
                during.append(max(seconds for seconds, _found in looks))
            ensure(process.wait(60) == 0, "the pass failed")
            ensure(open_file.read() == data, "who has it open reads something else")
        status = there.stat()
        ensure((status.st_uid, status.st_gid) == OWNER, "the owner differs")
        ensure(status.st_nlink == 2, "the number of links differs")
        ensure(stat.S_IMODE(status.st_mode) == 0o644, "the mode differs")
        ensure(os.getxattr(there, IMAGE_ID_MARK) == image.encode(), "the mark differs")
        ensure(there.read_bytes() == data, "the content differs")
        ensure(lab.node.is_linked(image), "it is not linked")
    slowest = max(during)
    return f"after {spread(after, 1000)} ms; while the link is made up to {slowest:.1f} s"


def look(path: Path) -> tuple[float, bool]:
    """Return how long it takes to see whether a name is there, and whether it is."""
    start = time.monotonic()
    found = path.exists()
    return time.monotonic() - start, found


@claim
def test_snapshots_in_progress_wait(lab: Lab) -> str:
    """A snapshot that is still uploaded is not linked before it is finished."""
    image = lab.cloud.create("snapshot")
    upload = lab.cloud.slow_upload(image, b"\3" * MIB)
    wait_until(lambda: (lab.node.images / image).exists(), "a part of the file")
    verdict = lab.node.verdicts()[image]
    ensure(verdict == ("waiting", "not_finished"), f"{verdict}")
    ensure(not lab.node.names(), "it has a name")
    upload.finish(b"\3" * MIB)
    verdict = lab.node.verdicts()[image]
    ensure(verdict == ("linked", "no_link_yet"), f"{verdict}")
    ensure(lab.there(lab.node.entry(image)).read_bytes() == b"\3" * 2 * MIB, "the content differs")
    return ""


@claim
def test_hostile_files(lab: Lab) -> str:
    """Hostile files have the outcomes of tests/integration/test_corpus.py, which passes."""
    start = time.monotonic()
    directory = lab.ceph.a / "corpus"
    command = [sys.executable, "-m", "pytest", "tests/integration/test_corpus.py", "-q"]
    # The store and the cache of these tests lie in their temporary directory.
    command += ["-p", "no:cacheprovider", "--basetemp", str(directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    ensure(run.returncode == 0, run.stdout[-2000:])
    shutil.rmtree(directory, ignore_errors=True)
    # 123 passed in 45.67s
    return f"{run.stdout.splitlines()[-1]}; {time.monotonic() - start:.0f} s"


@claim
def test_killed_while_it_links(lab: Lab) -> str:
    """If SIGKILL ends it eight times among 2,000 links, no link is wrong; the next run ends it."""
    images = lab.cloud.add_many(2000)
    by_name = {lab.node.entry(image).name: image for image in images}
    left = [0]
    for _ in range(8):
        process = lab.begin()
        wait_for_more(lambda: len(lab.node.names()), left[-1] + 200, process)
        process.kill()
        ensure(process.wait() == -signal.SIGKILL, "it ended before it was killed")
        names = lab.node.names()
        ensure(names <= by_name.keys(), "there are names of no image")
        ensure(all(lab.node.is_linked(by_name[name]) for name in names), "a link is wrong")
        left.append(len(names))
    lab.link()
    ensure(lab.node.names() == by_name.keys(), "the next run did not make the rest")
    ensure(all(lab.node.is_linked(image) for image in images), "a link is wrong in the end")
    marks = {
        name: os.getxattr(lab.there(lab.node.cache / name), IMAGE_ID_MARK).decode()
        for name in by_name
    }
    ensure(marks == by_name, "a mark is wrong")
    return f"killed with {', '.join(map(str, left[1:]))} links"


def wait_for_more(count: Callable[[], int], number: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until ``count()`` is above ``number``, or the process has ended."""
    wait_until(lambda: count() > number or process.poll() is not None, "more work", 60)


@claim
def test_two_runs_at_once(lab: Lab) -> str:
    """Two runs at once, one on each client, make every link, and none is wrong."""
    # Each link waits until the other client has released the directory, for up to two seconds.
    images = lab.cloud.add_many(200)
    start = time.monotonic()
    other = {
        "LN_IMAGES_IMAGES_DIR": str(lab.there(lab.node.images)),
        "LN_IMAGES_CACHE_DIR": str(lab.there(lab.node.cache)),
    }
    processes = [
        subprocess.Popen(
            [executable(), "--format", "json", "-v"],
            env=lab.node.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in ({}, other)
    ]
    made: list[int] = []
    statuses: list[int] = []
    for process in processes:
        output, errors = process.communicate(timeout=900)
        ensure(process.returncode in (0, 75), errors)
        statuses.append(process.returncode)
        for line in output.splitlines():
            counts = json.loads(line)["counts"]
            ensure(not counts["failed"] and not counts["occupied"], f"{counts}")
            made.append(counts["linked"])
    ensure(0 in statuses, "no run did the work")
    ensure(all(lab.node.is_linked(image) for image in images), "a link is wrong")
    ensure(len(lab.node.names()) == len(images), "there are more names than images")
    ensure(sum(made) >= len(images), "fewer links were reported than made")
    seconds = time.monotonic() - start
    return f"they ended with {statuses} and report {made} links, in {seconds:.0f} s"


@claim
def test_lock(lab: Lab) -> str:
    """A run ends with 75 while another run on the same client holds the lock."""
    image = lab.cloud.image("image", b"\1" * 5000)
    with flock(lab.node.cache):
        run = lab.node.run("-q")
        ensure(run.returncode == 75, f"it ended with {run.returncode}")
        ensure(not lab.node.names(), "it made a link")
    with flock(lab.there(lab.node.cache)):
        across = lab.node.run("-q").returncode
    lab.link()
    ensure(lab.node.is_linked(image), "no link when the lock is free")
    return f"for one on the other client {'too' if across == 75 else 'it does not'}"


@contextlib.contextmanager
def flock(directory: Path) -> Iterator[None]:
    """Hold the lock that a run takes."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@claim
def test_check_of_a_compute_node(lab: Lab) -> str:
    """The ln-images-node of the other client knows CephFS, and finds nothing wrong."""
    report = lab.check("--report")
    wrong = [check for check in report["checks"] if check["state"] == "WRONG"]
    ensure(not wrong, f"{wrong}")
    states = {check["name"]: check["state"] for check in report["checks"]}
    for name in ("base_mount", "locks_mount", "hard_mounts", "lock_options", "report"):
        ensure(states[name] == "ok", f"{report['checks']}")
    ensure((lab.reports / f"{HOST}.json").is_file(), "the storage node does not see the report")
    # Now there is a file to lock.
    (lock,) = [check for check in lab.check()["checks"] if check["name"] == "byte_range_locks"]
    ensure(lock["state"] == "ok", f"{lock}")
    return ""


@claim
def test_clean_up(lab: Lab) -> str:
    """A base is retired, restored, retired and removed, while the other client reads on in it."""
    lab.cloud.image("another", b"\1" * 5000)
    data = os.urandom(8 * MIB)
    image = lab.cloud.image("gone", data)
    lab.link()
    here = lab.node.entry(image)
    retired = lab.there(here.with_name(f"{here.name}.retired"))
    there = lab.there(here)
    disk = lab.create_disk(here.name)
    with there.open("rb") as open_file:
        lab.cloud.delete(image)

        def expect(outcome: str, reason: str) -> None:
            time.sleep(2)
            lab.check("--report")
            verdict = lab.prune(here.name)
            ensure(verdict == (outcome, reason), f"it is {verdict}, not {outcome}: {reason}")
            expected = (outcome in ("kept", "restored"), outcome == "retired")
            names = (there.exists(), retired.exists())
            ensure(names == expected, f"{outcome}: the other client sees {names}")
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            content = os.pread(open_file.fileno(), len(data), 0)
            ensure(content == data, f"{outcome}: who has it open does not read on")

        expect("kept", "in_use")
        shutil.rmtree(disk.parent)
        expect("kept", "first_seen_unused")
        expect("retired", "unused")
        disk = lab.create_disk(here.name)
        expect("restored", "in_use")
        shutil.rmtree(disk.parent)
        expect("kept", "first_seen_unused")
        expect("retired", "unused")
        expect("pruned", "unused_while_retired")
    return "even after it was removed"


@claim
def test_killed_while_it_retires(lab: Lab) -> str:
    """If SIGKILL ends it while it retires bases, it loses none, and the next runs end the work."""
    other = lab.cloud.image("another", b"\1" * 5000)
    images = lab.cloud.add_many(80)
    lab.link()
    inodes: dict[str, int] = {}
    for image in images:
        entry = lab.node.entry(image)
        inodes[entry.name] = entry.stat().st_ino
        os.setxattr(entry, UNUSED_SINCE_MARK, f"{time.time() - 7200:.6f}".encode())
        (lab.node.images / image).unlink()
    with lab.cloud.database() as database:
        database.executemany("DELETE FROM images WHERE id = ?", [(image,) for image in images])
    write_report(lab.reports, HOST)
    # What is retired now is removed in an hour at the earliest.
    options = ("--reports-dir", str(lab.reports), "--after", "1h")
    end = time.monotonic() + 60
    left = [0]
    both = 0
    while len(left) < 5 and time.monotonic() < end:
        process = lab.begin(*options, command=Command.PRUNE)
        wait_for_more(lambda: len(list_retired(lab.node)), left[-1] + 8, process)
        process.kill()
        ensure(process.wait() == -signal.SIGKILL, "it ended before it was killed")
        lost = [name for name, inode in inodes.items() if find_inodes(lab.node, name) != {inode}]
        ensure(not lost, f"bases are lost: {lost}")
        left.append(len(list_retired(lab.node)))
        # CephFS has no rename that replaces nothing. If the kill falls between link and unlink, a
        # base has both names until the next run.
        both += len([name for name in list_retired(lab.node) if name[:40] in lab.node.names()])
    for _ in range(2):
        run = lab.node.process("-q", *options, command=Command.PRUNE)
        ensure(run.returncode == 0, run.stderr)
    names = lab.node.names() - {lab.node.entry(other).name}
    # A base that had both names was restored, and its time began anew.
    ensure(len(names) == len(inodes), f"{len(inodes)} bases have {len(names)} names")
    lost = [name for name, inode in inodes.items() if find_inodes(lab.node, name) != {inode}]
    ensure(not lost, f"bases are lost in the end: {lost}")
    ensure(len(list_retired(lab.node)) >= len(inodes) - both, "not all are retired in the end")
    counts = ", ".join(map(str, left[1:]))
    return f"killed with {counts} retired; {both} had both names for a while"


def list_retired(node: Node) -> list[str]:
    """Return the names of retired bases."""
    return [name for name in node.names() if name.endswith(".retired")]


def find_inodes(node: Node, name: str) -> set[int]:
    """Return the inodes that have a base's name or its name as a retired one."""
    paths = (node.cache / name, node.cache / f"{name}.retired")
    return {path.stat().st_ino for path in paths if path.exists()}


@claim
def test_speed(lab: Lab) -> str:
    """A pass with nothing to do takes longer than on the local file system."""
    count = 2000
    images = lab.cloud.add_many(count)
    lab.link()
    local = lab.cloud.directory / "local"
    for name in ("images", "imagecache"):
        (local / name).mkdir(parents=True)
    for image in images:
        with (local / "images" / image).open("wb") as file:
            file.truncate(4096)
    here = {
        "LN_IMAGES_IMAGES_DIR": str(local / "images"),
        "LN_IMAGES_CACHE_DIR": str(local / "imagecache"),
    }
    first = lab.node.process("-q", command=Command.LINK, **here)
    ensure(first.returncode == 0, first.stderr)
    on_ceph: list[float] = []
    on_local: list[float] = []
    for _ in range(5):
        on_ceph.append(measure_pass(lab.node, {}))
        on_local.append(measure_pass(lab.node, here))
    shutil.rmtree(local)
    ceph, ext4 = statistics.median(on_ceph), statistics.median(on_local)
    return f"{count} links: {ceph:.2f} s and {ext4:.2f} s, {ceph / ext4:.1f} times"


def measure_pass(node: Node, variables: Mapping[str, str]) -> float:
    """Return how many seconds a pass of a process of its own takes. It must succeed."""
    start = time.monotonic()
    run = node.process("-q", command=Command.LINK, **variables)
    ensure(run.returncode == 0, run.stderr)
    return time.monotonic() - start


def spread(values: list[float], factor: float) -> str:
    """Return the least and the most of some values, each multiplied by ``factor``."""
    return f"{min(values) * factor:.0f} to {max(values) * factor:.0f}"


def main() -> int:
    """Start everything, try each claim, and print how it went. Return 0 if all of them hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", help="names of the claims' functions; all by default")
    names = parser.parse_args().claims
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    claims = [function for function in CLAIMS if not names or function.__name__ in names]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="cephfs-") as temporary,
            make_lab(Path(temporary)) as lab,
        ):
            # Not a generator: one claim that fails does not keep the others from being tried.
            results = [is_claimed(lab, function) for function in claims]
    except KeyboardInterrupt:
        print("interrupted: the cluster is stopped and its directory is removed")
        return 130
    failed = results.count(False)
    print(f"{failed} failed" if failed else "all hold")
    return 1 if failed or not results else 0


def interrupt(number: int, _frame: object) -> None:
    """End the test at the first signal. The clean-up that follows is not interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def make_lab(directory: Path) -> Iterator[Lab]:
    """Start the cluster, the cloud and a compute service."""
    (directory / "cloud").mkdir()
    with Ceph(directory) as ceph:
        cloud = Cloud(directory / "cloud")
        cloud.images = ceph.a / "images"
        cloud.images.mkdir(mode=0o700)
        with (
            cloud,
            Compute(HOST) as compute,
            in_catalog(cloud.identity(), (REGION, "public", compute.url)),
        ):
            yield Lab(ceph, cloud, directory)


def is_claimed(lab: Lab, function: Claim) -> bool:
    """Try a claim, print how it went, and return whether it holds."""
    lab.clear()
    try:
        measured = function(lab)
    except Exception as error:
        print(f"FAILED  {function.__doc__} {type(error).__name__}: {error}", flush=True)
        return False
    print(f"holds   {function.__doc__}{f' ({measured})' if measured else ''}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
