"""``make bench``.

What a pass costs on a real Keystone and Glance, beside what it replaces and what it cannot go
below.

Everything is measured in one run, and what is compared takes turns, so that the ratios hold on any
machine.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import inotify_simple

from support.cloud import KEYSTONE_CONF, Cloud, wait_until

COMMAND = str(Path(sys.executable).with_name("ln-images"))
OWNER = (65534, 65534) if os.getuid() == 0 else (os.getuid(), os.getgid())
UNLINKABLE, NARROW = 500, 20
MIB = 1024 * 1024
ALONE, SCRIPTED = "nothing to do, again", "shell-per-image script"
LOOKED = "only looking"
BESIDE = {f"beside {UNLINKABLE} {outcome}": outcome for outcome in ("skipped", "refused")}

# A process begins with the peak memory of the one that it was forked from: this one is small.
STOPWATCH = """
import json, os, sys, time
start = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(child, 0)
wall = time.monotonic() - start
print(json.dumps([os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
CLIENTS = """
import os
from glanceclient.v2.client import Client
from keystoneauth1 import loading, session
loader = loading.get_plugin_loader("password")
auth = loader.load_from_options_getter(lambda option: option.argparse_default)
images = Client(session=session.Session(auth=auth), region_name=os.environ["OS_REGION_NAME"]).images
"""
BARE = f"{CLIENTS}\nnext(images.list(page_size=1, limit=1))"
SCRIPT = """
import hashlib, os, subprocess
images, cache, owner = (os.environ["LN_IMAGES_" + name] for name in ("IMAGES_DIR", "CACHE_DIR", "OWNER"))
for _ in range(2):
    command = ("openstack", "image", "list", "--format", "value", "--column", "ID", "--column", "Status")
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
for image_id in (line.split()[0] for line in listing.stdout.splitlines() if line.endswith(" active")):
    link = cache + "/" + hashlib.sha1(image_id.encode()).hexdigest()
    command = f"ln -f {images}/{image_id} {link} && chown {owner} {link} && chmod 0644 {link}"
    subprocess.run(["/bin/sh", "-c", command], check=True)
"""

# Takes the kernel's word away, and nothing else. There is no other user there than the caller.
MINE = (os.getuid(), os.getgid())
WITHOUT_INOTIFY = (
    *("unshare", "--user", "--map-root-user", "env", "LN_IMAGES_OWNER=0:0", "sh", "-c"),
    'echo 0 > /proc/sys/user/max_inotify_instances; exec "$0" "$@"',
)

LOOK = """
import os
images, cache = (os.environ["LN_IMAGES_" + name] for name in ("IMAGES_DIR", "CACHE_DIR"))
for name in os.scandir(images):
    name.inode()
for name in os.scandir(cache):
    name.stat(follow_symlinks=False)
    os.getxattr(name.path, "user.ln_images.image_id")
"""

NOTES = {
    "passes": """
A pass is `ln-images -q`, as cron runs it. "Bare" is a process that imports the clients, gets one token and lists one
image: about what a pass costs before it has looked at anything. "Only looking" is a process that makes the system calls
without which no link can be told to be right, and does nothing with the answers: one for each image to read owner and
mode, one to read the mark, and those that list the two directories. A new image is one whose link was taken away before
the pass. The script is what `ln-images` replaces: it lists all images twice with the OpenStack command line client, of
an environment of its own, and runs a shell with `ln`, `chown` and `chmod` for each. Skipped images have a format that
is not linked, refused ones a content that is not what Glance says. Requests are those to Keystone and Glance, without
Glance's own.
""",
    "gap": """
From the moment at which `PUT .../file` returns, as a user sees it, to the moment at which the link's name appears, as
the kernel tells. The lines are started once a minute, as cron starts them, and uploads of 10 MB go on through the
turns of the minutes. Below zero, the link was there before the answer. "Clock alone" is `--every 1` as it was, its
watch taken away by a limit of 0 inotify instances. The six lines are by their schedule: an upload at any moment is
linked when the next pass has ended.
""",
    "idle": """
Everything that a minute costs in which nothing happens, with 1,000 links: the processes of that minute, their start
included, and the requests that they send to Keystone and Glance. The service was started before.
""",
    "narrow": """
In one process under `--every`: a pass for one image whose file was just closed, and whole passes with nothing to do,
the first and the later ones.
""",
    "verify": """
Both read the same file with SHA-512. Cold: nothing of the file is in the page cache before. Warm: all of it is.
""",
}


class Sample(NamedTuple):
    """What one process took: seconds, bytes, and HTTP requests that it sent."""

    wall: float
    cpu: float
    memory: float
    requests: float


Figures = defaultdict[tuple[str, int], list[Sample]]


def median(samples: Sequence[Sample]) -> Sample:
    """The median of each column."""
    return Sample(*(statistics.median(column) for column in zip(*samples, strict=True)))


class Lab:
    """A cloud with ``size`` images, and a storage node's cache directory for them."""

    def __init__(self, cloud: Cloud, size: int, owner: tuple[int, int]) -> None:
        self.cloud, self.size = cloud, size
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
        """A process with nothing of this one's environment.

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

    def measured(self, *command: str) -> tuple[Sample, list[str]]:
        """Runs ``command`` to its end: what it took, and the lines that it printed."""
        before = self._requests()
        with self.started(sys.executable, "-I", "-S", "-c", STOPWATCH, *command) as process:
            *lines, last = process.communicate()[0].splitlines()
        status, wall, cpu, memory = json.loads(last)
        if status:
            raise RuntimeError(f"{' '.join(command)[:200]} ended with status {status}")
        # The servers log a request after it has been answered.
        time.sleep(0.1)
        return Sample(wall, cpu, memory, self._requests() - before), lines

    def python(self, code: str) -> Sample:
        """Runs Python code."""
        return self.measured(sys.executable, "-c", code)[0]

    def one_pass(self, new: int = 0) -> Sample:
        """A pass as cron makes it, after ``new`` links have been taken away.

        It must link every image.
        """
        for image_id in self.ids[:new]:
            self.entry(image_id).unlink(missing_ok=True)
        sample, _ = self.measured(COMMAND, "-q")
        if len(os.listdir(self.cache)) != self.size:
            raise RuntimeError(f"{self.size} images and {len(os.listdir(self.cache))} links")
        return sample

    def entry(self, image_id: str) -> Path:
        """Where Nova looks for an image."""
        return self.cache / hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()

    def unlinkable(self, outcome: str) -> list[str]:
        """Makes active images that can never be linked.

        ``skipped`` for their format, or ``refused`` for their content.

        Their files are laid aside, so that no pass sees them.
        """
        ids = self.cloud.add_many(UNLINKABLE)
        if outcome == "skipped":
            with self.cloud.database() as database:
                database.execute("BEGIN")
                database.executemany(
                    "UPDATE images SET disk_format = 'vmdk' WHERE id = ?", ((each,) for each in ids)
                )
                database.execute("COMMIT")
        for image_id in ids:
            file = self.cloud.images / image_id
            if outcome == "refused":
                with file.open("r+b") as content:
                    content.write(b"QFI\xfb\0\0\0\3")
            file.rename(self._aside / image_id)
        return ids

    def beside(self, ids: Sequence[str], outcome: str) -> Sample:
        """A pass with nothing to do but to find that of ``ids`` none can be linked."""
        for image_id in ids:
            (self._aside / image_id).rename(self.cloud.images / image_id)
        sample, lines = self.measured(COMMAND, "--format", "json")
        for image_id in ids:
            (self.cloud.images / image_id).rename(self._aside / image_id)
        counts = json.loads(lines[0])["counts"]
        if (counts["present"], counts[outcome]) != (self.size, len(ids)):
            raise RuntimeError(f"{len(ids)} images should be {outcome}: {counts}")
        return sample

    def gaps(
        self, options: argparse.Namespace, every: float, command: Sequence[str]
    ) -> list[float]:
        """Seconds from each upload to its link, while ``command`` is started every so many seconds, as cron does."""
        say(f"{options.uploads} uploads under {' '.join(command[-4:])}")
        linked: dict[str, float] = {}
        uploaded: dict[str, float] = {}
        over = threading.Event()
        who = self.cloud.as_user()
        start = time.monotonic()

        def watch() -> None:
            with inotify_simple.INotify() as links:
                links.add_watch(self.cache, inotify_simple.flags.CREATE)
                while not over.is_set():
                    events = links.read(timeout=100)
                    now = time.monotonic()
                    linked.update((event.name, now) for event in events if event.name not in linked)

        def lines(opened: contextlib.ExitStack) -> None:
            for minute in itertools.count():
                if over.wait(max(0, start + minute * every - time.monotonic())):
                    return
                opened.enter_context(self.started(*command))

        with contextlib.ExitStack() as opened:
            threads = [
                threading.Thread(target=watch),
                threading.Thread(target=lines, args=(opened,)),
            ]
            for thread in threads:
                thread.start()
                opened.callback(thread.join)
            opened.callback(over.set)
            # The first process is still starting.
            time.sleep(min(5, every / 2))
            gap_between = options.minutes * 60 / options.uploads
            for number in range(options.uploads):
                image_id = self.cloud.create("upload", who)
                moment = start + 5 + (number + random.uniform(0, 1)) * gap_between  # noqa: S311
                time.sleep(max(0, moment - time.monotonic()))
                self.cloud.upload(image_id, b"\1" * 10_000_000, who)
                uploaded[self.entry(image_id).name] = time.monotonic()
            wait_until(lambda: uploaded.keys() <= linked.keys(), "the last links", 60)
        for name in uploaded:
            (self.cache / name).unlink()
        for image in (
            self.cloud.image_api()
            .get("/images", params={"name": "upload", "limit": 1000})
            .json()["images"]
        ):
            self.cloud.delete(image["id"])
        return [linked[name] - at for name, at in uploaded.items()]

    def narrow(self) -> list[str]:
        """What passes took in one process, as cells of a table."""
        with self.started(COMMAND, "--format", "json", "--every", "3600") as process:
            reports = map(json.loads, process.stdout or ())
            next(reports)
            found = []
            before = self._requests()
            for image_id in self.ids[:NARROW]:
                self.entry(image_id).unlink()
                with (self.cloud.images / image_id).open("r+b"):
                    pass
                found.append(next(reports)["duration_seconds"])
            time.sleep(0.3)
            requests = (self._requests() - before) / NARROW
        with self.started(COMMAND, "--format", "json", "--every", "5") as process:
            reports = map(json.loads, process.stdout or ())
            first = next(reports)["duration_seconds"]
            later = statistics.median(next(reports)["duration_seconds"] for _ in range(5))
            memory = _peak(process.pid) / MIB
        return [
            f"{statistics.median(found):.3f}",
            f"{requests:.1f}",
            f"{first:.3f}",
            f"{later:.3f}",
            f"{memory:.0f}",
        ]

    def minute_of_a_service(self) -> Sample:
        """What a process without an end costs in a minute, its start not counted."""
        with self.started(COMMAND, "--format", "json", "--every", "10") as process:
            next(iter(process.stdout or ()))
            before, requests = _used(process.pid), self._requests()
            time.sleep(60)
            return Sample(
                60, _used(process.pid) - before, _peak(process.pid), self._requests() - requests
            )

    def verify(self, gib: float, rounds: int) -> dict[tuple[str, str], list[Sample]]:
        """Reads one file of so many GiB whole, with each command in turns."""
        say(f"one file of {gib:g} GiB")
        file = self.cloud.images / self.ids[0]
        checksum, size = hashlib.sha512(), int(gib * 1024) * MIB
        with file.open("wb") as content:
            for _ in range(size // MIB):
                piece = os.urandom(MIB)
                checksum.update(piece)
                content.write(piece)
            os.fsync(content.fileno())
        with self.cloud.database() as database:
            values = (size, "sha512", checksum.hexdigest(), self.ids[0])
            database.execute(
                "UPDATE images SET size = ?, os_hash_algo = ?, os_hash_value = ? WHERE id = ?",
                values,
            )
        found = defaultdict(list)
        commands = {
            "sha512sum": ["sha512sum", str(file)],
            "ln-images --verify": [COMMAND, "-q", "--verify"],
        }
        self.one_pass()
        for number, cache, (what, command) in itertools.product(
            range(rounds), ("cold", "warm"), commands.items()
        ):
            say(f"{what}, {cache}, round {number + 1} of {rounds}")
            with file.open("rb") as content:
                if cache == "cold":
                    os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while content.read(16 * MIB):
                        pass
            found[what, cache].append(self.measured(*command)[0])
        return found

    def _requests(self) -> int:
        """How many requests the servers have logged, but for those by which Glance checks a token."""
        logs = [self.cloud.directory / f"{name}-access.log" for name in ("keystone", "glance")]
        lines = itertools.chain.from_iterable(
            log.read_text().splitlines() for log in logs if log.exists()
        )
        return sum(
            "python-keystoneclient" not in line and "keystonemiddleware" not in line
            for line in lines
        )


def _used(pid: int) -> float:
    """The seconds of CPU that a process has used (proc_pid_stat(5))."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _peak(pid: int) -> int:
    """The most memory that a process has had, in bytes (proc_pid_status(5))."""
    return (
        int(re.findall(r"^VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[0]) * 1024
    )


def compare(labs: Sequence[Lab], rounds: int) -> Figures:
    """Measures everything that takes turns.

    The first round of each is not counted: it fills the caches.
    """
    figures: Figures = defaultdict(list)
    for lab in labs:
        for _ in range(max(1, rounds * labs[0].size // lab.size)):
            say(f"the first link of {lab.size:,} images")
            figures["the first link of all", lab.size].append(lab.one_pass(new=lab.size))
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}")
        taken: dict[tuple[str, int], Sample] = {}
        for lab in labs:
            taken["bare", lab.size] = lab.python(BARE)
            taken[LOOKED, lab.size] = lab.python(LOOK)
            taken["nothing to do", lab.size] = lab.one_pass()
            taken["one new image", lab.size] = lab.one_pass(new=1)
            taken["ten new images", lab.size] = lab.one_pass(new=10)
        taken["import click", 0] = labs[0].python("import click")
        taken["--help", 0] = labs[0].measured(COMMAND, "--help")[0]
        if number:
            taken[SCRIPTED, labs[0].size] = labs[0].python(SCRIPT)
            for key, sample in taken.items():
                figures[key].append(sample)
    return figures


def compare_unlinkable(lab: Lab, rounds: int) -> Figures:
    """A pass with nothing to do, alone and beside images that can never be linked, in turns."""
    ids = {what: (lab.unlinkable(outcome), outcome) for what, outcome in BESIDE.items()}
    figures: Figures = defaultdict(list)
    for number in range(rounds):
        say(f"{UNLINKABLE} images that can never be linked, round {number + 1} of {rounds}")
        for what, (unlinkable, outcome) in {ALONE: ([], "skipped"), **ids}.items():
            figures[what, lab.size].append(lab.beside(unlinkable, outcome))
    return figures


def ratios(figures: Figures, sizes: Sequence[int]) -> None:
    """The table of what is compared."""
    small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    bare, idle = (
        {size: median(figures[what, size]) for size in sizes} for what in ("bare", "nothing to do")
    )
    script, again, skipped, refused = (
        median(figures[what, small]) for what in (SCRIPTED, ALONE, *BESIDE)
    )
    usage = median(figures["--help", 0]).wall / median(figures["import click", 0]).wall
    looked = median(figures[LOOKED, large]).wall
    table("a pass has nothing to do; wall time", "ratio")
    for what, ratio in (
        (f"shell-per-image script / pass, at {small:,}", script.wall / idle[small].wall),
        (f"pass at {middle:,} / pass at {small:,}", idle[middle].wall / idle[small].wall),
        (f"pass at {middle:,} / bare", idle[middle].wall / bare[middle].wall),
        (f"pass at {large:,} / bare", idle[large].wall / bare[large].wall),
        (
            f"bare and only looking, at {large:,} / bare",
            (bare[large].wall + looked) / bare[large].wall,
        ),
        (f"pass at {large:,} / bare, peak memory", idle[large].memory / bare[large].memory),
        ('`ln-images --help` / `python -c "import click"`', usage),
        (f"pass beside {UNLINKABLE} skipped / without, at {small:,}", skipped.wall / again.wall),
        (f"pass beside {UNLINKABLE} refused / without, at {small:,}", refused.wall / again.wall),
    ):
        row(what, f"{ratio:.2f}")


def medians(figures: Figures) -> None:
    """The table of what was measured."""
    table("median", "images", "wall, s", "CPU, s", "peak memory, MiB", "HTTP requests", "runs")
    for (what, size), samples in figures.items():
        wall, cpu, memory, requests = median(samples)
        count = f"{size:,}" if size else ""
        row(
            what,
            count,
            f"{wall:.3f}",
            f"{cpu:.3f}",
            f"{memory / MIB:.1f}",
            f"{requests:g}",
            f"{len(samples)}",
        )


# The parts, each with a cloud of its own


def passes(directory: Path, options: argparse.Namespace) -> None:
    """What a pass costs, by the number of links."""
    with contextlib.ExitStack() as opened:
        sizes = [int(size) for size in options.sizes.split(",")]
        labs = [opened.enter_context(lab(directory, size)) for size in sizes]
        figures = compare(labs, options.rounds) | compare_unlinkable(labs[0], options.rounds)
    ratios(figures, sizes)
    medians(figures)


def gap(directory: Path, options: argparse.Namespace) -> None:
    """How long after an upload its link is there."""
    with lab(directory, 100, MINE) as one:
        events = one.gaps(options, 60, [COMMAND, "-q", "--every", "10", "--for", "65"])
        clock = one.gaps(
            options, 60, [*WITHOUT_INOTIFY, COMMAND, "-q", "--every", "1", "--for", "58"]
        )
        duration = one.one_pass(new=1).wall
    cron = [10 - moment / 100 + duration for moment in range(1000)]
    table("from active to linked, s", "median", "99 %", "longest", "shortest", "uploads")
    for what, found in (
        ("`--every 10 --for 65`", events),
        ("`--every 1 --for 58`, clock alone", clock),
        ("six cron lines, by their schedule", cron),
    ):
        ordered = sorted(found)
        centile = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        figures = (statistics.median(ordered), centile, ordered[-1], ordered[0])
        row(
            what,
            *(f"{figure:.3f}" for figure in figures),
            "any" if found is cron else f"{len(found)}",
        )


def idle(directory: Path, options: argparse.Namespace) -> None:
    """What a minute costs in which nothing happens."""
    with lab(directory, int(options.sizes.split(",")[0]), MINE) as one:
        one.one_pass()
        say("a minute of each line")
        single = [one.one_pass() for _ in range(6)]
        six = Sample(*(sum(column) for column in zip(*single, strict=True)))
        events, _ = one.measured(COMMAND, "-q", "--every", "10", "--for", "65")
        clock, _ = one.measured(*WITHOUT_INOTIFY, COMMAND, "-q", "--every", "1", "--for", "58")
        service = one.minute_of_a_service()
    table("an idle minute", "HTTP requests", "CPU, s", "peak memory, MiB")
    for what, sample in (
        ("`--every 10 --for 65`", events),
        ("`--every 10`, a service at work", service),
        ("`--every 1 --for 58`, clock alone", clock),
        ("six cron lines", six._replace(memory=max(each.memory for each in single))),
        ("of these, one pass", median(single)),
    ):
        row(what, f"{sample.requests:g}", f"{sample.cpu:.3f}", f"{sample.memory / MIB:.1f}")


def narrow(directory: Path, options: argparse.Namespace) -> None:
    """What a pass for one image costs a process that is at work, and a whole one, by the number of links."""
    table(
        "in one process, s",
        "images",
        "narrow pass",
        "requests",
        "first whole pass",
        "later ones",
        "memory, MiB",
    )
    for size in (100, *map(int, options.sizes.split(",")[1:])):
        with lab(directory, size) as one:
            one.one_pass()
            row("", f"{size:,}", *one.narrow())


def verify(directory: Path, options: argparse.Namespace) -> None:
    """What an audit costs, beside sha512sum on the same file."""
    with lab(directory, 1) as one:
        found = one.verify(options.gib, options.rounds)
    table(
        f"{options.gib:g} GiB, median", "cache", "wall, s", "CPU, s", "MiB/s", "ratio of wall times"
    )
    for cache in ("cold", "warm"):
        base = median(found["sha512sum", cache]).wall
        for what in ("sha512sum", "ln-images --verify"):
            sample = median(found[what, cache])
            rate = options.gib * 1024 / sample.wall
            row(
                f"`{what}`",
                cache,
                f"{sample.wall:.2f}",
                f"{sample.cpu:.2f}",
                f"{rate:.0f}",
                f"{sample.wall / base:.2f}",
            )


PARTS = {part.__name__: part for part in (passes, gap, idle, narrow, verify)}


@contextlib.contextmanager
def lab(directory: Path, size: int, owner: tuple[int, int] = OWNER) -> Iterator[Lab]:
    """A cloud with so many images, gone with the block."""
    say(f"starting a real Keystone and a real Glance for {size:,} images")
    place = Path(tempfile.mkdtemp(dir=directory))
    with Cloud(place / "cloud") as cloud:
        yield Lab(cloud, size, owner)
    shutil.rmtree(place)


def table(*headings: str) -> None:
    """Begins a Markdown table."""
    print()
    row(*headings)
    row("---", *("---:" for _ in headings[1:]))


def row(*cells: str) -> None:
    """One line of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def machine() -> str:
    """The machine's size, and what else the figures depend on."""
    model = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = int(re.findall(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)[0])
    rounds = re.findall(r"^password_hash_rounds = .+$", KEYSTONE_CONF, re.M)[0]
    return (
        f"{os.cpu_count()} cores ({(model or ['unknown'])[0]}) and {memory / MIB:.0f} GiB for servers and client;"
        f" Linux {os.uname().release}; Python {sys.version.split()[0]}."
        f" Keystone has `{rounds}`: a token costs less than in production."
    )


def say(text: str) -> None:
    """Tells what is being done."""
    print(text, file=sys.stderr, flush=True)


def interrupt(number: int, _frame: object) -> None:
    """The first signal ends the benchmark; the clean-up that follows is not to be interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main() -> int:
    """Measures and prints Markdown; 130 when it was interrupted.

    Servers and files are gone afterwards, either way.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="part",
        help=f"which to measure, of {', '.join(PARTS)}; else all",
    )
    parser.add_argument(
        "--sizes", default="1000,10000,100000", help="how many linked images; the least first"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--uploads", type=int, default=200, help="how many uploads under each line")
    parser.add_argument(
        "--minutes", type=float, default=3.2, help="over how many minutes they are spread"
    )
    parser.add_argument(
        "--gib", type=float, default=8, help="the size of the file that is verified"
    )
    options = parser.parse_args()
    if unknown := set(options.parts).difference(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="ln-images-bench-") as directory:
            for name, part in PARTS.items():
                if not options.parts or name in options.parts:
                    part(Path(directory), options)
                    print(NOTES[name], flush=True)
        print(machine())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
