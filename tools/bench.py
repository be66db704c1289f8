"""Measure what a pass costs, on a real Keystone and a real Glance, and print tables in Markdown.

Beside each pass stand what it replaces and what no such program can do without. Everything is
measured in one run, and what is compared takes turns, so that the ratios hold on any machine. The
seconds hold for a machine that does nothing else.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import inotify_simple

from support.cloud import KEYSTONE_CONF, Cloud, wait_until

MIB = 1024 * 1024
# How many images can never be linked, and how many partial passes are measured.
UNLINKABLE = 500
PARTIAL_PASSES = 20
ME = (os.getuid(), os.getgid())
OWNER = (65534, 65534) if os.getuid() == 0 else ME

BARE = "bare"
SCAN = "scan alone"
IDLE = "nothing to do"
SCRIPT = "shell-per-image script"
IDLE_AGAIN = "nothing to do, again"

# The peak memory of a process begins with that of the process that it was forked from. This one is
# small.
STOPWATCH = """
import json, os, sys, time
start = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(child, 0)
wall = time.monotonic() - start
cpu = used.ru_utime + used.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), wall, cpu, used.ru_maxrss * 1024]))
"""
CLIENT_CODE = """
import os, time
import glanceclient
from keystoneauth1 import loading, session
loader = loading.get_plugin_loader("password")
# By default, each option has the value of its variable.
auth = loader.load_from_options_getter(lambda option: option.argparse_default)
session = session.Session(auth=auth)
client = glanceclient.Client("2", session=session, region_name=os.environ["OS_REGION_NAME"])
"""
BARE_CODE = f"{CLIENT_CODE}\nnext(client.images.list(page_size=1, limit=1))"
# The request before it gets the token and opens the connection, which a pass does in any case.
SCHEMA_CODE = f"""{CLIENT_CODE}
client.http_client.get("/v2/images?limit=1")
start = time.monotonic()
client.schemas.get("image")
print(time.monotonic() - start)
"""
SCRIPT_CODE = """
import hashlib, os, subprocess
images, cache, owner = (
    os.environ["LN_IMAGES_" + name] for name in ("IMAGES_DIR", "CACHE_DIR", "OWNER")
)
command = ["openstack", "image", "list", "--format", "value"]
command += ["--column", "ID", "--column", "Status"]
for _ in range(2):
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
for line in listing.stdout.splitlines():
    image_id, status = line.split()
    if status != "active":
        continue
    link = cache + "/" + hashlib.sha1(image_id.encode()).hexdigest()
    command = f"ln -f {images}/{image_id} {link} && chown {owner} {link} && chmod 0644 {link}"
    subprocess.run(["/bin/sh", "-c", command], check=True)
"""
SCAN_CODE = """
import os
images, cache = (os.environ["LN_IMAGES_" + name] for name in ("IMAGES_DIR", "CACHE_DIR"))
for entry in os.scandir(images):
    entry.inode()
for entry in os.scandir(cache):
    entry.stat(follow_symlinks=False)
    os.getxattr(entry.path, "user.ln_images.image_id")
"""
# Runs a command that cannot watch a directory. It has a user namespace, in which there is no other
# user than the caller.
WITHOUT_INOTIFY = (
    *("unshare", "--user", "--map-root-user", "env", "LN_IMAGES_OWNER=0:0", "sh", "-c"),
    'echo 0 > /proc/sys/user/max_inotify_instances; exec "$0" "$@"',
)


class Sample(NamedTuple):
    """What one process took: seconds, bytes, and the number of HTTP requests that it sent."""

    wall: float
    cpu: float
    memory: float
    requests: float


# The samples of each thing that was measured, by its name and the number of images.
Figures = defaultdict[tuple[str, int], list[Sample]]


def median(samples: Sequence[Sample]) -> Sample:
    """Return the median of each column."""
    return Sample(*(statistics.median(column) for column in zip(*samples, strict=True)))


class Lab:
    """A cloud with ``size`` images, and a storage node's cache directory for them.

    ``command`` is the ``ln-images`` that is measured.
    """

    def __init__(self, cloud: Cloud, command: str, size: int, owner: tuple[int, int]) -> None:
        self.cloud = cloud
        self.command = command
        self.size = size
        self.cache = cloud.directory / "imagecache"
        self._aside = cloud.directory / "aside"
        for directory in (self.cache, self._aside):
            directory.mkdir()
        self.ids = cloud.add_many(size)
        self._environment = cloud.environment() | {
            "PATH": f"{os.environ.get('OPENSTACK_VENV', '')}/bin:{os.environ['PATH']}",
            "LN_IMAGES_IMAGES_DIR": str(cloud.images),
            "LN_IMAGES_CACHE_DIR": str(self.cache),
            "LN_IMAGES_OWNER": f"{owner[0]}:{owner[1]}",
        }

    @contextlib.contextmanager
    def started(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """Start a process with an environment of its own.

        It and its children end with the block.
        """
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def measure(self, *command: str) -> tuple[Sample, list[str]]:
        """Run ``command`` to its end. Return what it took, and the lines that it printed."""
        before = self._count_requests()
        with self.started(sys.executable, "-I", "-S", "-c", STOPWATCH, *command) as process:
            *lines, last = process.communicate()[0].splitlines()
        status, wall, cpu, memory = json.loads(last)
        if status:
            raise RuntimeError(f"{' '.join(command)[:200]} ended with status {status}")
        # The servers log a request after they have answered it.
        time.sleep(0.1)
        requests = self._count_requests() - before
        return Sample(wall=wall, cpu=cpu, memory=memory, requests=requests), lines

    def measure_python(self, code: str) -> Sample:
        """Run Python code, and return what it took."""
        return self.measure(sys.executable, "-c", code)[0]

    def measure_schema_request(self) -> float:
        """Return how many seconds a new glanceclient takes to get the schema of images."""
        _sample, lines = self.measure(sys.executable, "-c", SCHEMA_CODE)
        return float(lines[0])

    def measure_pass(self, new: int = 0) -> Sample:
        """Remove ``new`` links, and measure a pass as cron runs it.

        It must link every image.
        """
        for image_id in self.ids[:new]:
            self.entry(image_id).unlink(missing_ok=True)
        sample, _lines = self.measure(self.command, "-q")
        links = len(os.listdir(self.cache))
        if links != self.size:
            raise RuntimeError(f"there are {links} links of {self.size} images")
        return sample

    def entry(self, image_id: str) -> Path:
        """Return where Nova looks for an image."""
        name = hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
        return self.cache / name

    def add_skipped(self) -> list[str]:
        """Add active images of a disk format that is not linked, and lay their files aside."""
        ids = self.cloud.add_many(UNLINKABLE)
        with self.cloud.database() as database:
            database.execute("BEGIN")
            database.executemany(
                "UPDATE images SET disk_format = 'vmdk' WHERE id = ?",
                [(image_id,) for image_id in ids],
            )
            database.execute("COMMIT")
        self._lay_aside(ids)
        return ids

    def add_refused(self) -> list[str]:
        """Add active raw images whose content is qcow2, and lay their files aside."""
        ids = self.cloud.add_many(UNLINKABLE)
        for image_id in ids:
            with (self.cloud.images / image_id).open("r+b") as content:
                content.write(b"QFI\xfb\0\0\0\3")
        self._lay_aside(ids)
        return ids

    def _lay_aside(self, ids: Sequence[str]) -> None:
        for image_id in ids:
            (self.cloud.images / image_id).rename(self._aside / image_id)

    def measure_with(self, ids: Sequence[str], outcome: str) -> Sample:
        """Measure a pass that has nothing to do but to find that ``ids`` cannot be linked."""
        for image_id in ids:
            (self._aside / image_id).rename(self.cloud.images / image_id)
        sample, lines = self.measure(self.command, "--format", "json")
        self._lay_aside(ids)
        counts = json.loads(lines[0])["counts"]
        if (counts["present"], counts.get(outcome, 0)) != (self.size, len(ids)):
            raise RuntimeError(f"{len(ids)} images should be {outcome}: {counts}")
        return sample

    def measure_delays(
        self, options: argparse.Namespace, every: float, command: Sequence[str]
    ) -> list[float]:
        """Return the seconds from each upload to its link.

        Meanwhile ``command`` is started every ``every`` seconds, as cron does.
        """
        print_progress(f"{options.uploads} uploads under {' '.join(command[-4:])}")
        linked: dict[str, float] = {}
        uploaded: dict[str, float] = {}
        is_over = threading.Event()
        session = self.cloud.as_user()
        start = time.monotonic()

        def watch_cache() -> None:
            with inotify_simple.INotify() as links:
                links.add_watch(self.cache, inotify_simple.flags.CREATE)
                while not is_over.is_set():
                    events = links.read(timeout=100)
                    now = time.monotonic()
                    for event in events:
                        linked.setdefault(event.name, now)

        def start_commands(stack: contextlib.ExitStack) -> None:
            for number in itertools.count():
                if is_over.wait(max(0, start + number * every - time.monotonic())):
                    return
                stack.enter_context(self.started(*command))

        with contextlib.ExitStack() as stack:
            threads = [
                threading.Thread(target=watch_cache),
                threading.Thread(target=start_commands, args=(stack,)),
            ]
            for thread in threads:
                thread.start()
                stack.callback(thread.join)
            stack.callback(is_over.set)
            # The first process is still starting.
            warm_up = min(5, every / 2)
            time.sleep(warm_up)
            interval = options.minutes * 60 / options.uploads
            for number in range(options.uploads):
                image_id = self.cloud.create("upload", session)
                moment = start + warm_up + (number + random.uniform(0, 1)) * interval  # noqa: S311
                time.sleep(max(0, moment - time.monotonic()))
                self.cloud.upload(image_id, b"\1" * 10_000_000, session)
                uploaded[self.entry(image_id).name] = time.monotonic()
            wait_until(lambda: uploaded.keys() <= linked.keys(), "the last links", 60)
        for name in uploaded:
            (self.cache / name).unlink()
        self._delete_images("upload")
        return [linked[name] - moment for name, moment in uploaded.items()]

    def _delete_images(self, name: str) -> None:
        query = {"name": name, "limit": 1000}
        listing = self.cloud.image_api().get("/images", params=query).json()
        for image in listing["images"]:
            self.cloud.delete(image["id"])

    def measure_partial_passes(self) -> list[str]:
        """Return what passes of one process take, as cells of a table."""
        with self.started(self.command, "--format", "json", "--every", "3600") as process:
            reports = map(json.loads, process.stdout or ())
            next(reports)
            partial: list[float] = []
            before = self._count_requests()
            for image_id in self.ids[:PARTIAL_PASSES]:
                self.entry(image_id).unlink()
                # The process learns that the file was closed.
                with (self.cloud.images / image_id).open("r+b"):
                    pass
                partial.append(next(reports)["duration_seconds"])
            time.sleep(0.3)
            requests = (self._count_requests() - before) / len(partial)
        with self.started(self.command, "--format", "json", "--every", "5") as process:
            reports = map(json.loads, process.stdout or ())
            first = next(reports)["duration_seconds"]
            later = [next(reports)["duration_seconds"] for _ in range(5)]
            memory = read_peak_memory(process.pid) / MIB
        return [
            f"{statistics.median(partial):.3f}",
            f"{requests:.1f}",
            f"{first:.3f}",
            f"{statistics.median(later):.3f}",
            f"{memory:.0f}",
        ]

    def measure_minute_of_service(self) -> Sample:
        """Return what a process without an end takes in a minute, its start not counted."""
        with self.started(self.command, "--format", "json", "--every", "10") as process:
            next(iter(process.stdout or ()))
            cpu, requests = read_cpu_seconds(process.pid), self._count_requests()
            time.sleep(60)
            return Sample(
                wall=60,
                cpu=read_cpu_seconds(process.pid) - cpu,
                memory=read_peak_memory(process.pid),
                requests=self._count_requests() - requests,
            )

    def make_large_image(self, gib: float) -> Path:
        """Give the first image ``gib`` GiB of random data and their checksum. Return its file."""
        file = self.cloud.images / self.ids[0]
        checksum = hashlib.sha512()
        size = int(gib * 1024) * MIB
        with file.open("wb") as content:
            for _ in range(size // MIB):
                block = os.urandom(MIB)
                checksum.update(block)
                content.write(block)
            os.fsync(content.fileno())
        with self.cloud.database() as database:
            database.execute(
                "UPDATE images SET size = ?, os_hash_algo = ?, os_hash_value = ? WHERE id = ?",
                (size, "sha512", checksum.hexdigest(), self.ids[0]),
            )
        return file

    def _count_requests(self) -> int:
        """Return how many requests the servers have logged.

        Those by which Glance checks a token are not counted.
        """
        count = 0
        for name in ("keystone", "glance"):
            log = self.cloud.directory / f"{name}-access.log"
            for line in log.read_text().splitlines() if log.exists() else ():
                if "python-keystoneclient" not in line and "keystonemiddleware" not in line:
                    count += 1
        return count


def read_cpu_seconds(pid: int) -> float:
    """Return the seconds of CPU that a process has used (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def read_peak_memory(pid: int) -> int:
    """Return the most memory that a process has had, in bytes (proc_pid_status(5))."""
    # VmHWM:	   54812 kB
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^VmHWM:\s*(\d+)", status, re.MULTILINE)[0]) * 1024


@dataclass(frozen=True)
class Bench:
    """The options of the command line, and the directory where the clouds are."""

    options: argparse.Namespace
    directory: Path

    @property
    def sizes(self) -> list[int]:
        """Return how many images the clouds have, the fewest first."""
        return sorted(int(size) for size in self.options.sizes.split(","))

    @contextlib.contextmanager
    def lab(self, size: int, owner: tuple[int, int] = OWNER) -> Iterator[Lab]:
        """Start a cloud with so many images, and remove it in the end."""
        print_progress(f"starting a real Keystone and a real Glance for {size:,} images")
        place = Path(tempfile.mkdtemp(dir=self.directory))
        with Cloud(place / "cloud") as cloud:
            yield Lab(cloud, self.options.command, size, owner)
        shutil.rmtree(place)


# The parts. Each has a cloud of its own.


def measure_passes(bench: Bench) -> None:
    """Measure what a pass costs, by the number of links."""
    rounds = bench.options.rounds
    with contextlib.ExitStack() as stack:
        labs = [stack.enter_context(bench.lab(size)) for size in bench.sizes]
        figures = compare_passes(labs, rounds)
        figures |= compare_unlinkable(labs[0], rounds)
        schema = [labs[0].measure_schema_request() for _ in range(rounds)]
    print_ratios(figures, bench.sizes)
    print_medians(figures)
    print_schema_request(figures, bench.sizes[0], statistics.median(schema))
    print(
        """
A pass is `ln-images -q`, as cron runs it. "Bare" is a process that imports the clients, gets one
token and lists one image. This is about what a pass costs before it has scanned anything. "Scan
alone" is a process that makes only the system calls that every check of links needs. A new image is
one whose link was removed before the pass. The script is what `ln-images` replaces: it lists all
images twice with the OpenStack command line client, and runs a shell with `ln`, `chown` and `chmod`
for each. Skipped images have a format that is not linked. Refused images have content that is not
what Glance states. Requests are those to Keystone and Glance, without Glance's own. glanceclient
requests the schema of images once in each process, before its first listing.
"""
    )


def compare_passes(labs: Sequence[Lab], rounds: int) -> Figures:
    """Measure everything that takes turns.

    The first round of each does not count: it fills the caches.
    """
    figures: Figures = defaultdict(list)
    for lab in labs:
        for _ in range(max(1, rounds * labs[0].size // lab.size)):
            print_progress(f"the first link of {lab.size:,} images")
            figures["the first link of all", lab.size].append(lab.measure_pass(new=lab.size))
    small = labs[0]
    for number in range(rounds + 1):
        print_progress(f"round {number} of {rounds}")
        samples: dict[tuple[str, int], Sample] = {}
        for lab in labs:
            samples[BARE, lab.size] = lab.measure_python(BARE_CODE)
            samples[SCAN, lab.size] = lab.measure_python(SCAN_CODE)
            samples[IDLE, lab.size] = lab.measure_pass()
            samples["one new image", lab.size] = lab.measure_pass(new=1)
            samples["ten new images", lab.size] = lab.measure_pass(new=10)
        samples["import click", 0] = small.measure_python("import click")
        samples["--help", 0] = small.measure(small.command, "--help")[0]
        if number == 0:
            continue
        samples[SCRIPT, small.size] = small.measure_python(SCRIPT_CODE)
        for key, sample in samples.items():
            figures[key].append(sample)
    return figures


def compare_unlinkable(lab: Lab, rounds: int) -> Figures:
    """Measure passes with nothing to do, alone and beside images that can never be linked."""
    skipped, refused = lab.add_skipped(), lab.add_refused()
    figures: Figures = defaultdict(list)
    for number in range(rounds):
        print_progress(f"{UNLINKABLE} images that cannot be linked, round {number + 1} of {rounds}")
        for name, ids, outcome in (
            (IDLE_AGAIN, [], "skipped"),
            (name_with("skipped"), skipped, "skipped"),
            (name_with("refused"), refused, "refused"),
        ):
            figures[name, lab.size].append(lab.measure_with(ids, outcome))
    return figures


def name_with(outcome: str) -> str:
    """Return the name of a pass with images that cannot be linked."""
    return f"with {UNLINKABLE} {outcome}"


def print_ratios(figures: Figures, sizes: Sequence[int]) -> None:
    """Print the table of what is compared."""
    small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    bare = {size: median(figures[BARE, size]) for size in sizes}
    idle = {size: median(figures[IDLE, size]) for size in sizes}

    def wall(name: str, size: int) -> float:
        return median(figures[name, size]).wall

    scan = wall(SCAN, large)
    alone = wall(IDLE_AGAIN, small)
    skipped, refused = (wall(name_with(outcome), small) for outcome in ("skipped", "refused"))
    ratios = {
        f"shell-per-image script / pass, at {small:,}": wall(SCRIPT, small) / idle[small].wall,
        f"pass at {middle:,} / pass at {small:,}": idle[middle].wall / idle[small].wall,
        f"pass at {middle:,} / bare": idle[middle].wall / bare[middle].wall,
        f"pass at {large:,} / bare": idle[large].wall / bare[large].wall,
        f"bare and scan alone, at {large:,} / bare": (bare[large].wall + scan) / bare[large].wall,
        f"pass at {large:,} / bare, peak memory": idle[large].memory / bare[large].memory,
        '`ln-images --help` / `python -c "import click"`': wall("--help", 0)
        / wall("import click", 0),
        f"pass with {UNLINKABLE} skipped / without, at {small:,}": skipped / alone,
        f"pass with {UNLINKABLE} refused / without, at {small:,}": refused / alone,
    }
    print_heading("a pass has nothing to do; wall time", "ratio")
    for name, ratio in ratios.items():
        print_row(name, f"{ratio:.2f}")


def print_medians(figures: Figures) -> None:
    """Print the table of what was measured."""
    columns = ("wall, s", "CPU, s", "peak memory, MiB", "HTTP requests", "runs")
    print_heading("median", "images", *columns)
    for (name, size), samples in figures.items():
        sample = median(samples)
        print_row(
            name,
            f"{size:,}" if size else "",
            f"{sample.wall:.3f}",
            f"{sample.cpu:.3f}",
            f"{sample.memory / MIB:.1f}",
            f"{sample.requests:g}",
            f"{len(samples)}",
        )


def print_schema_request(figures: Figures, size: int, seconds: float) -> None:
    """Print what glanceclient's request for the schema costs an idle pass."""
    idle = median(figures[IDLE, size]).wall
    print_heading("the schema of images", "s", "share of an idle pass, %")
    print_row(f"one request, at {size:,}", f"{seconds:.4f}", f"{100 * seconds / idle:.1f}")


def measure_delay(bench: Bench) -> None:
    """Measure how long after an upload its link is there."""
    command = bench.options.command
    with bench.lab(100, ME) as lab:
        watching = [command, "-q", "--every", "10", "--for", "65"]
        with_inotify = lab.measure_delays(bench.options, 60, watching)
        by_clock = [*WITHOUT_INOTIFY, command, "-q", "--every", "1", "--for", "58"]
        without_inotify = lab.measure_delays(bench.options, 60, by_clock)
        duration = lab.measure_pass(new=1).wall
    # An upload at any moment waits for the next start, and then for the whole pass.
    six_lines = [10 - moment / 100 + duration for moment in range(1000)]
    print_heading("from active to linked, s", "median", "99 %", "longest", "shortest", "uploads")
    print_delays("`--every 10 --for 65`", with_inotify, f"{len(with_inotify)}")
    print_delays("`--every 1 --for 58`, clock alone", without_inotify, f"{len(without_inotify)}")
    print_delays("six cron lines, by their schedule", six_lines, "any")
    print(
        """
From the moment at which `PUT .../file` returns, as a user sees it, to the moment at which the
link's name appears, as the kernel reports it. The commands are started once a minute, as cron
starts them, and uploads of 10 MB go on while one process follows the other. Below zero, the link
was there before the answer. "Clock alone" is `--every 1` with a limit of 0 inotify instances, so
that it cannot watch the store. The six lines are by their schedule: an upload at any moment is
linked when the next pass has ended.
"""
    )


def print_delays(name: str, delays: Sequence[float], uploads: str) -> None:
    """Print one row of the table of delays."""
    ordered = sorted(delays)
    centile = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    figures = (statistics.median(ordered), centile, ordered[-1], ordered[0])
    print_row(name, *(f"{figure:.3f}" for figure in figures), uploads)


def measure_idle(bench: Bench) -> None:
    """Measure what a minute costs in which nothing happens."""
    command = bench.options.command
    with bench.lab(bench.sizes[0], ME) as lab:
        lab.measure_pass()
        print_progress("an idle minute of each")
        passes = [lab.measure_pass() for _ in range(6)]
        watching, _ = lab.measure(command, "-q", "--every", "10", "--for", "65")
        by_clock, _ = lab.measure(*WITHOUT_INOTIFY, command, "-q", "--every", "1", "--for", "58")
        service = lab.measure_minute_of_service()
    six_lines = Sample(
        wall=sum(each.wall for each in passes),
        cpu=sum(each.cpu for each in passes),
        memory=max(each.memory for each in passes),
        requests=sum(each.requests for each in passes),
    )
    print_heading("an idle minute", "HTTP requests", "CPU, s", "peak memory, MiB")
    for name, sample in (
        ("`--every 10 --for 65`", watching),
        ("`--every 10`, a running service", service),
        ("`--every 1 --for 58`, clock alone", by_clock),
        ("six cron lines", six_lines),
        ("of these, one pass", median(passes)),
    ):
        print_row(name, f"{sample.requests:g}", f"{sample.cpu:.3f}", f"{sample.memory / MIB:.1f}")
    print(
        f"""
Everything that a minute costs in which nothing happens, with {bench.sizes[0]:,} links: the
processes of that minute, their start included, and the requests that they send to Keystone and
Glance. The service was started before.
"""
    )


def measure_partial(bench: Bench) -> None:
    """Measure a pass for one image in a running process, and a full one, by the number of links."""
    print_heading(
        "images",
        *("partial pass, s", "requests", "first full pass, s", "later ones, s", "memory, MiB"),
    )
    for size in sorted({min(100, bench.sizes[0]), *bench.sizes[1:]}):
        with bench.lab(size) as lab:
            lab.measure_pass()
            print_row(f"{size:,}", *lab.measure_partial_passes())
    print(
        """
All in one process with `--every`: a partial pass, for one image whose file was just closed, and
full passes with nothing to do, the first one and the later ones.
"""
    )


def measure_verify(bench: Bench) -> None:
    """Measure what it costs to verify a checksum, beside sha512sum on the same file."""
    options = bench.options
    verify = find_verify_command(options.command)
    # ln-images --verify, or ln-images-verify
    name = " ".join([Path(verify[0]).name, *verify[2:]])
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    with bench.lab(1) as lab:
        print_progress(f"one file of {options.gib:g} GiB")
        file = lab.make_large_image(options.gib)
        lab.measure_pass()
        commands = {"sha512sum": ["sha512sum", str(file)], name: verify}
        for number, cache, (program, command) in itertools.product(
            range(options.rounds), ("cold", "warm"), commands.items()
        ):
            print_progress(f"{program}, {cache}, round {number + 1} of {options.rounds}")
            prepare_page_cache(file, is_warm=cache == "warm")
            samples[program, cache].append(lab.measure(*command)[0])
    print_heading(
        f"{options.gib:g} GiB, median",
        *("page cache", "wall, s", "CPU, s", "MiB/s", "memory, MiB", "ratio of wall times"),
    )
    for cache, program in itertools.product(("cold", "warm"), commands):
        sample = median(samples[program, cache])
        base = median(samples["sha512sum", cache])
        print_row(
            f"`{program}`",
            cache,
            f"{sample.wall:.2f}",
            f"{sample.cpu:.2f}",
            f"{options.gib * 1024 / sample.wall:.0f}",
            f"{sample.memory / MIB:.1f}",
            f"{sample.wall / base.wall:.2f}",
        )
    print(
        """
Both read the same file with SHA-512. Cold: the page cache has nothing of the file. Warm: it has
all of it.
"""
    )


def find_verify_command(command: str) -> list[str]:
    """Return the command that verifies images; before 0.3.0 it is a flag of ``ln-images``."""
    verify = Path(command).with_name("ln-images-verify")
    if verify.exists():
        return [str(verify), "-q"]
    return [command, "-q", "--verify"]


def prepare_page_cache(file: Path, is_warm: bool) -> None:
    """Read a whole file into the page cache, or remove it from there."""
    with file.open("rb") as content:
        if not is_warm:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while content.read(16 * MIB):
            pass


PARTS: dict[str, Callable[[Bench], None]] = {
    "passes": measure_passes,
    "delay": measure_delay,
    "idle": measure_idle,
    "partial": measure_partial,
    "verify": measure_verify,
}


def print_heading(*headings: str) -> None:
    """Begin a Markdown table."""
    print()
    print_row(*headings)
    print_row("---", *("---:" for _ in headings[1:]))


def print_row(*cells: str) -> None:
    """Print one line of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_progress(text: str) -> None:
    """Print what is being done, on standard error."""
    print(text, file=sys.stderr, flush=True)


def describe(command: str) -> str:
    """Return what was measured, the machine's size, and what else the figures depend on."""
    version = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    # model name	: AMD EPYC
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    # MemTotal:       24680596 kB
    memory = re.findall(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    rounds = re.findall(r"^password_hash_rounds = .+$", KEYSTONE_CONF, re.MULTILINE)
    return (
        f"{version.stdout.strip()}. {os.cpu_count()} cores ({models[0] if models else 'unknown'})"
        f" and {int(memory[0]) / MIB:.0f} GiB for servers and client; Linux {os.uname().release};"
        f" Python {sys.version.split()[0]}. Keystone has `{rounds[0]}`, so a token costs less than"
        " in production."
    )


def interrupt(number: int, _frame: Any) -> None:
    """End the benchmark at the first signal. The clean-up that follows is not interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def parse_options() -> argparse.Namespace:
    """Return the options. Exit with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"what to measure, of {', '.join(PARTS)}; everything if none is named",
    )
    parser.add_argument(
        "--command",
        metavar="FILE",
        default=str(Path(sys.executable).with_name("ln-images")),
        help="the ln-images to measure, such as that of an older release in another environment",
    )
    parser.add_argument(
        "--sizes",
        metavar="NUMBERS",
        default="1000,10000,100000",
        help="how many linked images there are, separated by commas",
    )
    parser.add_argument(
        "--rounds", metavar="NUMBER", type=int, default=5, help="how often to measure each thing"
    )
    parser.add_argument(
        "--uploads",
        metavar="NUMBER",
        type=int,
        default=200,
        help="how many images to upload for each line of the part delay",
    )
    parser.add_argument(
        "--minutes",
        metavar="NUMBER",
        type=float,
        default=3.2,
        help="over how many minutes to spread these uploads",
    )
    parser.add_argument(
        "--gib",
        metavar="NUMBER",
        type=float,
        default=8,
        help="the size of the image that is verified, in GiB",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.parts).difference(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    return options


def main() -> int:
    """Measure, and print Markdown. Return 130 if a signal interrupted it.

    Servers and files are gone afterwards, either way.
    """
    options = parse_options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="ln-images-bench-") as directory:
            bench = Bench(options, Path(directory))
            for name, measure in PARTS.items():
                if not options.parts or name in options.parts:
                    measure(bench)
        print(describe(options.command))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
