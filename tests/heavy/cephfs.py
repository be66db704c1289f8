"""``make test-cephfs``: ln-images on a real CephFS with two clients, one line for each claim.

A Ceph cluster of one node, from Debian's packages, on loopback, without authentication, in one
temporary directory: a monitor, a manager, a metadata server and an OSD on a sparse file. Two
``ceph-fuse`` mounts are two clients. Glance stores its images through the first, where the command
runs as on a storage node; the second is a compute node. It needs root, takes some minutes, and is
no part of ``make test``. Whatever ends it, processes, mounts and files go.
"""

import argparse
import contextlib
import fcntl
import functools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from support.cloud import REGION, Cloud, wait_until
from support.compute import Compute
from support.compute import server as a_server
from support.node import COMMAND, OWNER, Node

MIB = 1024 * 1024
MARK = "user.ln_images.image_id"
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

    Use it with ``with``.
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
            raise RuntimeError(f"{mount} was not mounted: see the logs in {self._directory}")

    def _wait(self, what: str, *question: str) -> None:
        def answers() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                return bool(self._run("ceph", "--connect-timeout", "5", *question))
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
        """Starts a daemon in the foreground; it ends, by its own pid, when the stack unwinds."""
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
    """What the claims are made on.

    The cluster, a cloud that stores on it, and the storage node's side of it.
    """

    def __init__(self, ceph: Ceph, cloud: Cloud, nova: Compute) -> None:
        self.ceph, self.cloud, self.nova = ceph, cloud, nova
        self.node = Node(cloud, ceph.a / "imagecache")

    def fresh(self) -> None:
        """No image and an empty cache."""
        self.cloud.clear()
        self.nova.servers = []
        shutil.rmtree(self.node.cache, ignore_errors=True)
        self.node.cache.mkdir()

    def there(self, path: Path) -> Path:
        """The same file as the other client knows it."""
        return self.ceph.b / path.relative_to(self.ceph.a)

    def outcomes(self, *arguments: str) -> dict[str, tuple[str, str]]:
        """Makes a pass over every image, and returns (outcome, reason) by image id."""
        run = self.node.run("--full", *arguments, LN_IMAGES_FORMAT="json")
        hold(run.returncode == 0, run.stderr)
        return {
            image["id"]: (image["outcome"], image["reason"])
            for image in json.loads(run.stdout)["images"]
        }

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a pass and does not wait for it."""
        return subprocess.Popen(
            [COMMAND, "-q", *arguments], env=self.node.environment(), stderr=subprocess.DEVNULL
        )


Claim = Callable[[Lab], str]
CLAIMS: list[Claim] = []


def claim(function: Claim) -> Claim:
    """Registers a claim: its docstring says what holds. What it returns was measured on the way."""
    CLAIMS.append(function)
    return function


def hold(condition: object, what: str) -> None:
    """Fails the claim with ``what`` where the condition does not hold."""
    if not condition:
        raise AssertionError(what)


@claim
def main_job(lab: Lab) -> str:
    """A finished image is linked, and the other client finds it at its first look afterwards, with all that it is."""
    after, during = [], []
    for number in range(10):
        image = lab.cloud.create(f"image {number}")
        here, there = lab.node.entry(image), lab.there(lab.node.entry(image))
        hold(not there.exists(), "the name is there too early")
        data = bytes([number + 1]) * (3 * MIB + number)
        lab.cloud.upload(image, data)
        # The other client knows Glance's file as it was before.
        with lab.there(lab.node.images / image).open("rb") as held:
            process = lab.begin()
            if number % 2:
                wait_until(here.exists, "the link")
                seconds, found = look(there)
                hold(found, "a look after the link was in vain")
                after.append(seconds)
            else:
                # Looks that fall into the very moment in which the link is made.
                looks = [look(there)]
                while not looks[-1][1]:
                    looks.append(look(there))
                during.append(max(seconds for seconds, _ in looks))
            status = there.stat()
            hold(process.wait(60) == 0, "the pass failed")
            hold(held.read() == data, "who has it open reads something else")
        hold(
            (status.st_uid, status.st_gid, status.st_nlink) == (*OWNER, 2),
            "the owner or the link count differs",
        )
        hold(stat.S_IMODE(status.st_mode) == 0o644, "the mode differs")
        hold(os.getxattr(there, MARK) == image.encode(), "the mark differs")
        hold(there.read_bytes() == data and lab.node.linked(image), "the content differs")
    return f"it takes {spread(after, 1000)} ms; a look in the moment of the link takes up to {max(during):.1f} s"


def look(path: Path) -> tuple[float, bool]:
    """How long it takes to see whether a name is there, and whether it is."""
    began = time.monotonic()
    found = path.exists()
    return time.monotonic() - began, found


@claim
def in_flight(lab: Lab) -> str:
    """A snapshot that is still uploaded is not linked before it is finished."""
    image = lab.cloud.create("snapshot")
    upload = lab.cloud.slow_upload(image, b"\3" * MIB)
    wait_until(lambda: (lab.node.images / image).exists(), "a part of the file")
    hold(lab.outcomes()[image][0] == "waiting", "it is not waiting")
    hold(not lab.node.names(), "it has a name")
    upload.finish(b"\3" * MIB)
    hold(lab.outcomes()[image][0] == "linked", "it is not linked")
    hold(lab.there(lab.node.entry(image)).read_bytes() == b"\3" * 2 * MIB, "the content differs")
    return ""


@claim
def hostile(lab: Lab) -> str:
    """Hostile files have the outcomes of tests/test_corpus.py.

    Links, FIFOs, sockets, devices, backing files.
    """
    from test_corpus import GOOD, MET, place

    began = time.monotonic()
    ids = place(lab.node)
    first, outcomes = lab.node.run("-q"), lab.outcomes()
    hold(first.returncode == 0, first.stderr)
    wrong = {
        what: outcomes.get(ids[what], ("unlisted", ""))
        for what, case in MET.items()
        if outcomes.get(ids[what], ("unlisted", ""))[0]
        != ("present" if what in GOOD else case.outcome)
    }
    hold(not wrong, f"other outcomes: {wrong}")
    (lab.ceph.a / "outside").unlink(missing_ok=True)
    return f"{len(MET)} cases in {time.monotonic() - began:.0f} s"


@claim
def killed(lab: Lab) -> str:
    """Killed with SIGKILL among 2,000 links, eight times, it leaves right names only.

    The next run makes the rest.
    """
    images = lab.cloud.add_many(2000)
    by_name = {lab.node.entry(image).name: image for image in images}
    left = [0]
    for _ in range(8):
        process = lab.begin()
        enough = functools.partial(
            _more_than, lambda: len(lab.node.names()), left[-1] + 200, process
        )
        wait_until(enough, "more links", 60)
        process.kill()
        hold(process.wait() == -signal.SIGKILL, "it ended before it was killed")
        names = lab.node.names()
        hold(names <= by_name.keys(), "there are names of no image")
        hold(all(lab.node.linked(by_name[name]) for name in names), "a name is not right")
        left.append(len(names))
    run = lab.node.run("-q")
    hold(run.returncode == 0, run.stderr)
    hold(lab.node.names() == by_name.keys(), "the next run did not make the rest")
    hold(all(lab.node.linked(image) for image in images), "a link is not right in the end")
    marks = {name: os.getxattr(lab.there(lab.node.cache / name), MARK).decode() for name in by_name}
    hold(marks == by_name, "a mark is not right")
    return f"killed with {', '.join(map(str, left[1:]))} links"


def _more_than(count: Callable[[], int], number: int, process: subprocess.Popen[bytes]) -> bool:
    return count() > number or process.poll() is not None


@claim
def two_runs(lab: Lab) -> str:
    """Two runs at once, one on each client, do the work once."""
    # Each link waits until the other client has let the directory go, for up to two seconds.
    images = lab.cloud.add_many(200)
    start = time.monotonic()
    other = {
        "LN_IMAGES_IMAGES_DIR": str(lab.there(lab.node.images)),
        "LN_IMAGES_CACHE_DIR": str(lab.there(lab.node.cache)),
    }
    processes = [
        subprocess.Popen(
            [COMMAND, "--format", "json", "-v"],
            env=lab.node.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in ({}, other)
    ]
    made, ends = [], []
    for process in processes:
        output, errors = process.communicate(timeout=900)
        hold(process.returncode in {0, 75}, errors)
        ends.append(process.returncode)
        for line in output.splitlines():
            counts = json.loads(line)["counts"]
            hold(not counts.get("failed") and not counts.get("occupied"), f"{counts}")
            made.append(counts.get("linked", 0))
    hold(0 in ends, "no run did the work")
    hold(all(lab.node.linked(image) for image in images), "a link is not right")
    hold(len(lab.node.names()) == len(images), "there are more names than images")
    hold(sum(made) >= len(images), "fewer links were reported than made")
    return f"they ended with {ends} and report {made} links, in {time.monotonic() - start:.0f} s"


@claim
def locked(lab: Lab) -> str:
    """A run stops for the lock of another on the same client."""
    image = lab.cloud.image("image", b"\1" * 5000)
    with flock(lab.node.cache):
        run = lab.node.run("-q")
        hold(run.returncode == 75, f"it ended with {run.returncode}")
        hold(not lab.node.names(), "it made a link")
    with flock(lab.there(lab.node.cache)):
        across = lab.node.run("-q").returncode
    lab.node.run("-q")
    hold(lab.node.linked(image), "no link when the lock is free")
    return f"for one on the other client {'too' if across == 75 else 'it does not'}"


@contextlib.contextmanager
def flock(directory: Path) -> Iterator[None]:
    """Holds the lock that a run takes."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@claim
def clean_up(lab: Lab) -> str:
    """A base is retired, restored, retired and removed.

    The other client, which has it open, reads on all the while.
    """
    lab.cloud.image("another", b"\1" * 5000)
    data = os.urandom(8 * MIB)
    image = lab.cloud.image("gone", data)
    hold(lab.node.run("-q").returncode == 0 and lab.node.linked(image), "no link")
    there = lab.there(lab.node.entry(image))
    aside = there.with_name(there.name + ".retired")
    with there.open("rb") as held:
        lab.cloud.delete(image)
        for outcome, servers in (
            ("retired", []),
            ("restored", [a_server("s", image)]),
            ("retired", []),
            ("pruned", []),
        ):
            time.sleep(1.1)
            lab.nova.servers = servers
            seen = lab.outcomes("--prune", "--prune-after", "1s").get(image, ("", ""))
            hold(seen[0] == outcome, f"it is {seen}, not {outcome}")
            names = (there.exists(), aside.exists())
            hold(
                names == (outcome == "restored", outcome == "retired"),
                f"the other client sees {names}: {outcome}",
            )
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            hold(
                os.pread(held.fileno(), len(data), 0) == data,
                f"who has it open does not read on: {outcome}",
            )
    return "also after it was removed"


@claim
def killed_in_clean_up(lab: Lab) -> str:
    """Killed with SIGKILL while it retires bases it loses none, and the next run retires the rest."""
    lab.cloud.image("another", b"\1" * 5000)
    images = lab.cloud.add_many(80)
    hold(lab.node.run("-q").returncode == 0, "it could not link")
    inodes = {lab.node.entry(image).name: lab.node.entry(image).stat().st_ino for image in images}
    with lab.cloud.database() as database:
        database.executemany("DELETE FROM images WHERE id = ?", [(image,) for image in images])
    for image in images:
        (lab.node.images / image).unlink()
    # Whatever was retired after this is not removed before as much time has passed again.
    time.sleep(91)
    end, left = time.monotonic() + 60, [0]
    while len(left) < 5 and time.monotonic() < end:
        process = lab.begin("--prune", "--prune-after", "90s")
        enough = functools.partial(
            _more_than, lambda: len(_retired(lab.node)), left[-1] + 8, process
        )
        wait_until(enough, "more retired bases", 60)
        process.kill()
        hold(process.wait() == -signal.SIGKILL, "it ended before it was killed")
        lost = [name for name, inode in inodes.items() if not _one_base(lab.node, name, inode)]
        hold(not lost, f"bases are lost: {lost}")
        left.append(len(_retired(lab.node)))
    run = lab.node.run("-q", "--prune", "--prune-after", "90s")
    hold(run.returncode == 0, run.stderr)
    hold(
        _retired(lab.node) == {f"{name}.retired" for name in inodes},
        "not all are retired in the end",
    )
    # CephFS has no rename that replaces nothing: killed between link and unlink, a base has both
    # names for a while.
    both = len(lab.node.names() & inodes.keys())
    return f"killed with {', '.join(map(str, left[1:]))} retired; {both} have both names for another --prune-after"


def _retired(node: Node) -> set[str]:
    return {name for name in node.names() if name.endswith(".retired")}


def _one_base(node: Node, name: str, inode: int) -> bool:
    """Whether a base has its name or that of a retired one.

    Or both, where the file system has no other way.
    """
    found = {
        path.stat().st_ino
        for path in (node.cache / name, node.cache / f"{name}.retired")
        if path.exists()
    }
    return found == {inode}


@claim
def speed(lab: Lab) -> str:
    """A pass with nothing to do costs more than on the local file system."""
    count = 2000
    images = lab.cloud.add_many(count)
    hold(lab.node.run("-q").returncode == 0, "it could not link")
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
    hold(lab.node.run("-q", **here).returncode == 0, "it could not link on the local file system")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for taken, variables in zip(times, ({}, here), strict=True):
            began = time.monotonic()
            hold(lab.node.run("-q", **variables).returncode == 0, "a pass failed")
            taken.append(time.monotonic() - began)
    shutil.rmtree(local)
    ceph, ext4 = (statistics.median(taken) for taken in times)
    return f"{count} links: {ceph:.2f} s and {ext4:.2f} s, {ceph / ext4:.1f} times"


def spread(values: list[float], factor: float = 1.0) -> str:
    """The least and the most of some values."""
    digits = 0 if factor > 1 else 2
    return f"{min(values) * factor:.{digits}f} to {max(values) * factor:.{digits}f}"


def main() -> int:
    """Starts everything, tries each claim and says how it went; 0 where all hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of the claims' functions; all by default")
    only = parser.parse_args().only
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="cephfs-") as temporary,
            _lab(Path(temporary)) as lab,
        ):
            failed = sum([_try(lab, one) for one in CLAIMS if not only or one.__name__ in only])
    except KeyboardInterrupt:
        print("interrupted: the cluster is stopped and its directory removed")
        return 130
    print(f"{failed} failed" if failed else "all hold")
    return 1 if failed else 0


def _interrupt(number: int, _frame: object) -> None:
    """The first signal ends it; the clean-up that follows is not to be interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def _lab(directory: Path) -> Iterator[Lab]:
    (directory / "cloud").mkdir()
    with Ceph(directory) as ceph:
        cloud = Cloud(directory / "cloud")
        cloud.images = ceph.a / "images"
        cloud.images.mkdir(mode=0o700)
        with cloud, Compute(max_limit=3) as nova:
            identity = cloud.identity()
            service = identity.post("/services", json={"service": {"type": "compute"}}).json()[
                "service"
            ]["id"]
            endpoint = {
                "service_id": service,
                "interface": "public",
                "region_id": REGION,
                "url": nova.url,
            }
            identity.post("/endpoints", json={"endpoint": endpoint})
            yield Lab(ceph, cloud, nova)


def _try(lab: Lab, function: Claim) -> bool:
    """Whether a claim fails. It is printed, with what was measured."""
    lab.fresh()
    try:
        seen = function(lab)
    except Exception as error:
        print(f"FAILED  {function.__doc__} {type(error).__name__}: {error}", flush=True)
        return True
    print(f"holds   {function.__doc__}{f' ({seen})' if seen else ''}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
