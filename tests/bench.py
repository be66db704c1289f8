"""``make bench``: what a pass costs on a real Keystone and Glance, beside what it replaces and what it cannot go below.

Everything is measured in one run, and what is compared takes turns, so that the ratios hold on any machine.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cloud import KEYSTONE_CONF, Cloud

COMMAND = str(Path(sys.executable).with_name("ln-images"))
OWNER = (65534, 65534) if os.getuid() == 0 else (os.getuid(), os.getgid())
UNLINKABLE, UPLOADS, EVERY_SECONDS, CRON_SECONDS = 500, 20, 20, 10
MIB = 1024 * 1024
ALONE, REPEATED, SCRIPTED = "nothing to do, again", "--every 1, one more pass", "shell-per-image script"
LOOKED = "only looking"
BESIDE = {f"beside {UNLINKABLE} {outcome}": outcome for outcome in ("skipped", "refused")}

# A process begins with the peak memory of the one that it was forked from: this one is small.
STOPWATCH = """
import json, os, sys, time
start = time.monotonic()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
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

LOOK = """
import os
images, cache = (os.environ["LN_IMAGES_" + name] for name in ("IMAGES_DIR", "CACHE_DIR"))
for name in os.scandir(images):
    name.inode()
for name in os.scandir(cache):
    name.stat(follow_symlinks=False)
    os.getxattr(name.path, "user.ln_images.image_id")
"""

NOTES = f"""
A pass is `ln-images -q`, as cron runs it. "Bare" is a process that imports the clients, gets one token and lists one
image. "Only looking" is a process that makes the system calls without which no link can be told to be right, and does
nothing with the answers: one for each image to read owner and mode, one to read the mark, and those that list the two
directories. A new image is one whose link was taken away before the pass. The script lists all images twice with the
OpenStack command line client, of an environment of its own, and runs a shell with `ln`, `chown` and `chmod` for each.
"One more pass" is what {EVERY_SECONDS} s of `--every 1` took beyond a single pass, divided by the passes. Skipped
images have a format that is not linked, refused ones a content that is not what Glance says. Requests are those to
Keystone and Glance, without Glance's own.
"""


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

    def __init__(self, cloud: Cloud, size: int) -> None:
        self.cloud, self.size = cloud, size
        self.cache = cloud.directory / "imagecache"
        self._aside = cloud.directory / "aside"
        for directory in (self.cache, self._aside):
            directory.mkdir()
        self.ids = cloud.add_many(size)
        self._environment = cloud.environment() | {
            "PATH": f"{os.environ['OPENSTACK_VENV']}/bin:{os.environ['PATH']}",
            "LN_IMAGES_IMAGES_DIR": str(cloud.images),
            "LN_IMAGES_CACHE_DIR": str(self.cache),
            "LN_IMAGES_OWNER": f"{OWNER[0]}:{OWNER[1]}",
        }

    @contextlib.contextmanager
    def started(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A process with nothing of this one's environment; it and its children end with the block."""
        process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, text=True, start_new_session=True
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
        """A pass as cron makes it, after ``new`` links have been taken away; it must link every image."""
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
        """Makes active images that can never be linked: ``skipped`` for their format, or ``refused`` for their content.

        Their files are laid aside, so that no pass sees them.
        """
        ids = self.cloud.add_many(UNLINKABLE)
        if outcome == "skipped":
            with self.cloud.database() as database:
                database.execute("BEGIN")
                database.executemany("UPDATE images SET disk_format = 'vmdk' WHERE id = ?", ((each,) for each in ids))
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

    def _requests(self) -> int:
        """How many requests the servers have logged, but for those by which Glance checks a token."""
        logs = [self.cloud.directory / f"{name}-access.log" for name in ("keystone", "glance")]
        lines = itertools.chain.from_iterable(log.read_text().splitlines() for log in logs if log.exists())
        return sum("python-keystoneclient" not in line and "keystonemiddleware" not in line for line in lines)


def compare(labs: Sequence[Lab], rounds: int) -> Figures:
    """Measures everything that takes turns. The first round of each is not counted: it fills the caches."""
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
            taken[REPEATED, labs[0].size] = repeated(labs[0], taken["nothing to do", labs[0].size])
            for key, sample in taken.items():
                figures[key].append(sample)
    return figures


def repeated(lab: Lab, single: Sample) -> Sample:
    """What one more pass costs a process that is at work already. ``single`` is a process for one pass."""
    sample, lines = lab.measured(COMMAND, "--every", "1", "--for", str(EVERY_SECONDS), "--format", "json")
    more = len(lines) - 1
    wall = statistics.median(json.loads(line)["duration_seconds"] for line in lines)
    return Sample(wall, (sample.cpu - single.cpu) / more, sample.memory, (sample.requests - single.requests) / more)


def compare_unlinkable(lab: Lab, rounds: int) -> Figures:
    """A pass with nothing to do, alone and beside images that can never be linked, in turns."""
    ids = {what: (lab.unlinkable(outcome), outcome) for what, outcome in BESIDE.items()}
    figures: Figures = defaultdict(list)
    for number in range(rounds):
        say(f"{UNLINKABLE} images that can never be linked, round {number + 1} of {rounds}")
        for what, (unlinkable, outcome) in {ALONE: ([], "skipped"), **ids}.items():
            figures[what, lab.size].append(lab.beside(unlinkable, outcome))
    return figures


def delays(lab: Lab) -> list[float]:
    """Seconds from Glance's answer to an upload until the link is there, under ``--every 1``, at random moments."""
    say(f"{UPLOADS} uploads under --every 1")
    found = []
    who = lab.cloud.as_user()
    # The last link has just appeared, at a beat of the clock: the moments are spread evenly over a whole beat.
    moments = [0.5, *random.sample([0.5 + number / UPLOADS for number in range(UPLOADS)], UPLOADS)]
    with lab.started(COMMAND, "--every", "1", "-q"):
        for moment in moments:
            image_id = lab.cloud.create("upload", who)
            time.sleep(moment)
            lab.cloud.upload(image_id, b"\1" * MIB, who)
            start = time.monotonic()
            while not lab.entry(image_id).exists():
                if time.monotonic() - start > 30:
                    raise RuntimeError("an upload is not linked after 30 s")
                time.sleep(0.005)
            found.append(time.monotonic() - start)
    # While the first is uploaded the process is still starting.
    return found[1:]


def cron_delays(duration: float) -> list[float]:
    """The same under six cron lines, by their schedule, if a link is there when its pass of ``duration`` ends."""
    return [CRON_SECONDS - moment / 100 + duration for moment in range(100 * CRON_SECONDS)]


def report_targets(figures: Figures, every: Sequence[float], sizes: Sequence[int]) -> None:
    """The table of ratios, each beside its target."""
    small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    bare, idle = ({size: median(figures[what, size]) for size in sizes} for what in ("bare", "nothing to do"))
    script, more, again, skipped, refused = (
        median(figures[what, small]) for what in (SCRIPTED, REPEATED, ALONE, *BESIDE)
    )
    usage = median(figures["--help", 0]).wall / median(figures["import click", 0]).wall
    looked = median(figures[LOOKED, large]).wall
    rows = [
        (f"shell-per-image script / pass, at {small:,}", script.wall / idle[small].wall, "at least", 12),
        (f"pass at {middle:,} / pass at {small:,}", idle[middle].wall / idle[small].wall, "at most", 1.15),
        (f"pass at {middle:,} / bare", idle[middle].wall / bare[middle].wall, "at most", 1.25),
        (f"pass at {large:,} / bare", idle[large].wall / bare[large].wall, "at most", 2),
        (f"bare and only looking, at {large:,} / bare", (bare[large].wall + looked) / bare[large].wall, "", 0),
        (f"pass at {large:,} / bare, peak memory", idle[large].memory / bare[large].memory, "at most", 2),
        ("HTTP requests of a pass", max(idle[size].requests for size in sizes), "at most", 6),
        ("`--every 1`: seconds of CPU a pass", more.cpu, "at most", 0.15),
        ("`--every 1`: median seconds from active to linked", statistics.median(every), "less than", 1),
        ('`ln-images --help` / `python -c "import click"`', usage, "at most", 3),
        (f"pass beside {UNLINKABLE} skipped / without, at {small:,}", skipped.wall / again.wall, "", 0),
        (f"pass beside {UNLINKABLE} refused / without, at {small:,}", refused.wall / again.wall, "", 0),
    ]
    table("a pass has nothing to do; wall time", "ratio", "target", "")
    for what, ratio, how, limit in rows:
        met = {"at least": ratio >= limit, "at most": ratio <= limit, "less than": ratio < limit}.get(how)
        row(what, f"{ratio:.2f}", how and f"{how} {limit:g}", {True: "met", False: "not met", None: ""}[met])


def report_medians(figures: Figures, every: Sequence[float], cron: Sequence[float]) -> None:
    """The tables of what was measured."""
    table("from active to linked", "median, s", "longest, s", "images")
    row("`--every 1`, measured", f"{statistics.median(every):.2f}", f"{max(every):.2f}", f"{len(every)}")
    row("six cron lines, by their schedule", f"{statistics.median(cron):.2f}", f"{max(cron):.2f}", "any")
    table("median", "images", "wall, s", "CPU, s", "peak memory, MiB", "HTTP requests", "runs")
    for (what, size), samples in figures.items():
        wall, cpu, memory, requests = median(samples)
        count = f"{size:,}" if size else ""
        row(what, count, f"{wall:.3f}", f"{cpu:.3f}", f"{memory / MIB:.1f}", f"{requests:g}", f"{len(samples)}")


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
    """Measures and prints Markdown; 130 when it was interrupted. Servers and files are gone afterwards, either way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,10000,100000", help="how many linked images; the least first")
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with contextlib.ExitStack() as opened:
            directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="ln-images-bench-")))
            labs = []
            for size in map(int, options.sizes.split(",")):
                say(f"starting a real Keystone and a real Glance for {size:,} images")
                labs.append(Lab(opened.enter_context(Cloud(directory / str(size))), size))
            figures = compare(labs, options.rounds) | compare_unlinkable(labs[0], options.rounds)
            every = delays(labs[0])
        cron = cron_delays(median(figures["one new image", labs[0].size]).wall)
        report_targets(figures, every, [lab.size for lab in labs])
        report_medians(figures, every, cron)
        print(f"{NOTES}\n{machine()}")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
