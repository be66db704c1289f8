"""``make boot``: measure first boots of images with a link and without, on a real Nova.

What is compared takes turns in one run. Every server is a real guest that proves on its console
that it booted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import guest
from inside import NOVA
from rig import Rig
from scenes import watching
from support.cloud import ROOT, wait_until

DOWNLOADED, LINKED, SECOND, CACHED = "Nova downloads", "linked before", "second boot", "pre-cached"
PRECACHING = "pre-caching itself"
FORMATS = ("raw", "qcow2")
PICTURE = ROOT / "docs" / "first-boot.svg"
GIB = 1024

NOTES = """
The time is from `POST /servers` to the status ACTIVE, and to the first line that the guest prints.
Each image has random data, and this compute node has never used it: between two measurements its
server and its base are removed. Nova has `force_raw_images = False`, as docs/install.md says.
"Second boot" is one more server after "linked before". "Pre-cached" is after
`openstack aggregate cache image`, which takes as long as "pre-caching itself". Guests run without
hardware virtualisation. Glance, Nova and the guests share one machine, its disk and its loopback,
so that a download here never waits for a network.
"""


class Boot(NamedTuple):
    """One boot: seconds until ACTIVE and until the guest's first line, and bytes Glance served."""

    active: float
    guest: float
    served: float


Figures = defaultdict[tuple[int, str, str], list[Boot]]


def main() -> None:
    """Measure, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure each")
    parser.add_argument("--sizes", default="1024,4096,8192", help="sizes of images, in MiB")
    parser.add_argument("--formats", default=",".join(FORMATS), help="their disk formats")
    parser.add_argument("--racers", type=int, default=20, help="how many servers take the race")
    options = parser.parse_args()
    formats = options.formats.split(",")
    sizes = [int(size) for size in options.sizes.split(",")]
    figures: Figures = defaultdict(list)
    print_progress("starting the cloud and a compute node")
    with Rig(Path(os.environ["RIG_DIRECTORY"])) as rig:
        lab = Lab(rig, figures, formats)
        downloads = lab.race(options.racers)
        for size in sizes:
            lab.compare(size, options.rounds)
    print_tables(figures, sizes, formats)
    print(
        f"\nOf {options.racers} servers created the instant their image was active, Nova downloaded"
        f" the image of {downloads}.\n{NOTES}"
    )
    draw(figures, sizes)


class Lab:
    """The rig, and what was measured on it."""

    def __init__(self, rig: Rig, figures: Figures, formats: Sequence[str]) -> None:
        self._rig, self._figures, self._formats = rig, figures, formats
        aggregate = rig.compute.post("/os-aggregates", json={"aggregate": {"name": "all"}}).json()[
            "aggregate"
        ]
        self._aggregate = f"/os-aggregates/{aggregate['id']}"
        rig.compute.post(f"{self._aggregate}/action", json={"add_host": {"host": rig.node.name}})

    def compare(self, size: int, rounds: int) -> None:
        """Boot an image of ``size`` MiB in all ways, in turn.

        Each round begins with another one.
        """
        print_progress(f"{size} MiB: making the images")
        images, proof = self._images(size)
        for number in range(rounds):
            ways = [
                (disk_format, way)
                for way in (DOWNLOADED, LINKED, CACHED)
                for disk_format in self._formats
            ]
            first = number * len(self._formats) % len(ways)
            for disk_format, way in ways[first:] + ways[:first]:
                for name, boot in self._boots(way, images[disk_format], proof):
                    self._figures[size, disk_format, name].append(boot)
                    took = f"{boot.active:.1f} s, {boot.served / guest.MIB:.0f} MiB served"
                    print_progress(
                        f"{size} MiB, round {number + 1} of {rounds}: {disk_format}, {name}: {took}"
                    )
        for image in images.values():
            self._rig.cloud.delete(image)
            self._rig.entry(image).unlink(missing_ok=True)

    def race(self, racers: int) -> int:
        """Create servers the instant their images are active, under ``--every 10``.

        Return how many of the images Nova downloaded.
        """
        print_progress(
            f"the race: {racers} servers of {racers} images, each created when its image is active"
        )
        path = self._rig.directory / "racer.raw"
        guest.make(path, 64 * guest.MIB)
        servers = []
        images = []
        with watching(self._rig):
            for number in range(racers):
                images.append(self._rig.image(f"racer-{number}", path))
                servers.append(self._rig.boot(images[-1], wait=False))
            for server in servers:
                self._rig.wait(server, "ACTIVE", 900)
        self._rig.delete(*servers)
        return sum(self._rig.served(image) > 0 for image in images)

    def _images(self, size: int) -> tuple[dict[str, str], str]:
        raw, qcow2 = (self._rig.directory / f"disk.{disk_format}" for disk_format in FORMATS)
        proof = guest.make(raw, size * guest.MIB)
        images = {}
        if "raw" in self._formats:
            images["raw"] = self._rig.image(f"raw-{size}", raw)
        if "qcow2" in self._formats:
            guest.qcow2(raw, qcow2)
            images["qcow2"] = self._rig.image(f"qcow2-{size}", qcow2, "qcow2")
            qcow2.unlink()
        raw.unlink()
        os.sync()
        return images, proof

    def _boots(self, way: str, image: str, proof: str) -> Iterator[tuple[str, Boot]]:
        """Boot a server of an image that the node has not used yet, in one of the ways.

        In the end remove the server and the base.
        """
        rig = self._rig
        servers = []
        # A pass links every image, even one whose turn is another way.
        rig.entry(image).unlink(missing_ok=True)
        if way == LINKED:
            rig.ln_images()
        if way == CACHED:
            before, start = rig.served(image), time.monotonic()
            rig.compute.post(f"{self._aggregate}/images", json={"cache": [{"id": image}]})
            wait_until(rig.entry(image).exists, "the image in the cache", 600)
            seconds = time.monotonic() - start
            time.sleep(0.5)
            yield PRECACHING, Boot(seconds, seconds, rig.served(image) - before)
        for name in (LINKED, SECOND) if way == LINKED else (way,):
            server, boot = self._boot(image, proof)
            servers.append(server)
            if (boot.served > 0) != (name == DOWNLOADED):
                raise RuntimeError(f"{name}: Glance served {boot.served} bytes")
            yield name, boot
        rig.delete(*servers)
        rig.entry(image).unlink()
        os.sync()

    def _boot(self, image: str, proof: str) -> tuple[str, Boot]:
        rig = self._rig
        before = rig.served(image)
        start = time.monotonic()
        server = rig.boot(image, flavor="boot", wait=False)
        rig.wait(server, "ACTIVE", 900)
        active = time.monotonic() - start
        rig.proof(server, line=guest.UP)
        up = time.monotonic() - start
        if rig.proof(server) != proof:
            raise RuntimeError(f"{server} booted from something else than its image")
        return server, Boot(active, up, rig.served(image) - before)


def median(boots: Sequence[Boot]) -> Boot:
    """Return the median of each column."""
    return Boot(*(statistics.median(column) for column in zip(*boots, strict=True)))


def print_tables(figures: Figures, sizes: Sequence[int], formats: Sequence[str]) -> None:
    """Print the ratios, and then the seconds that they are made of."""
    rounds = len(next(iter(figures.values())))
    print_heading(
        f"medians of {rounds}",
        *("Nova downloads / linked", "pre-caching and boot / linked", "second boot / linked"),
    )
    for size in sizes:
        for disk_format in formats:
            active = {way: median(figures[size, disk_format, way]).active for way in ways()}
            ratios = (active[DOWNLOADED], active[PRECACHING] + active[CACHED], active[SECOND])
            cells = [f"{seconds / active[LINKED]:.1f}" for seconds in ratios]
            print_row(f"{size / GIB:g} GiB, {disk_format}", *cells)
    print_heading(
        *("seconds", "to ACTIVE", "shortest", "longest"),
        *("to the guest's first line", "MiB that Glance served"),
    )
    for size in sizes:
        for disk_format in formats:
            for way in ways():
                boots = figures[size, disk_format, way]
                middle = median(boots)
                print_row(
                    f"{size / GIB:g} GiB, {disk_format}: {way}",
                    f"{middle.active:.1f}",
                    f"{min(boot.active for boot in boots):.1f}",
                    f"{max(boot.active for boot in boots):.1f}",
                    "" if way == PRECACHING else f"{middle.guest:.1f}",
                    f"{middle.served / guest.MIB:.0f}",
                )


def print_heading(*headings: str) -> None:
    """Begin a Markdown table."""
    print()
    print_row(*headings)
    print_row("---", *("---:" for _ in headings[1:]))


def print_row(*cells: str) -> None:
    """Print one line of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def draw(figures: Figures, sizes: Sequence[int]) -> None:
    """Draw the picture: seconds against size, for the first format."""
    disk_format = next(iter(figures))[1]
    lines = {
        way: [median(figures[size, disk_format, way]).active for size in sizes]
        for way in (DOWNLOADED, LINKED)
    }
    document = {"sizes": [size / GIB for size in sizes], "lines": lines, "path": str(PICTURE)}
    script = Path(__file__).with_name("draw.py")
    subprocess.run([NOVA / "bin/python", script], input=json.dumps(document), text=True, check=True)
    print(f"The picture is {PICTURE.relative_to(ROOT)}.")


def ways() -> tuple[str, ...]:
    """Return the names of what is measured, in the order of the tables."""
    return (DOWNLOADED, LINKED, SECOND, PRECACHING, CACHED)


def print_progress(what: str) -> None:
    """Print what is being done, on standard error."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
