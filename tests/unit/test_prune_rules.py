"""The rules of the clean-up: the ladder as a table, and over everything that can happen to bases.

The table passes facts to the pure rules. The machine at the end runs the real clean-up on real
files: only what Nova and Glance answer is plain data.
"""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from ln_images.model import Base, File, Image, Marks, Outcome, Owner, Reason, cache_name
from ln_images.prune.clean_up import CleanUpOptions, clean_up
from ln_images.prune.evidence import Cloud, boot_time
from ln_images.prune.nova import ComputeHost
from ln_images.prune.reports import Report, Reports
from ln_images.prune.rules import (
    Action,
    Decision,
    Facts,
    Policy,
    decide,
    list_blockers,
)
from ln_images.store import UNUSED_SINCE_MARK
from support.bases import OneImageGlance, make_base, report_document

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
NAME = cache_name(ID)
HOUR, DAY = 3600.0, 86400.0
NOW = 1_800_000_000.0
POLICY = Policy(after=DAY, report_age=3 * HOUR)


def base(
    retired: bool = False,
    unused_since: float | None = None,
    image_id: str | None = ID,
    links: int = 1,
    supported: bool = True,
) -> Base:
    """Return a base, by default one that ln-images linked."""
    file = File(
        mode=stat.S_IFREG | 0o644,
        inode=11,
        device=1,
        links=links,
        owner=Owner(107, 108),
        size=1000,
        changed=NOW,
        modified=NOW,
        marks=Marks(image_id, 1000, unused_since, supported),
    )
    return Base(NAME, image_id, retired, file)


OTHER_FILE = base().file._replace(inode=12)
BLOCKED: dict[str, Any] = {"blocker": "compute-2 has no report"}
ALL_REPORTED: dict[str, Any] = {
    "reports_begun": {"compute-1": NOW - 60, "compute-2": NOW - 3500},
}
# Two days ago, a day and a second ago, a minute ago, and in an hour.
LONG_AGO, JUST_LONG_ENOUGH, SHORTLY, FUTURE = NOW - 2 * DAY, NOW - DAY - 1, NOW - 60, NOW + HOUR

K, R = Outcome.KEPT, Reason

LADDER = [
    # Whoever reports a base needs it, whatever blocks the clean-up.
    ("used", Facts(base(), users=["a"]), K, R.IN_USE, None),
    (
        "used, with a mark",
        Facts(base(unused_since=LONG_AGO), users=["a"]),
        K,
        R.IN_USE,
        "remove_mark",
    ),
    ("used and unmarked", Facts(base(image_id=None), users=["a"]), K, R.IN_USE, None),
    (
        "used and retired",
        Facts(base(retired=True, unused_since=LONG_AGO), users=["a"]),
        "restored",
        R.IN_USE,
        "restore",
    ),
    (
        "used, retired, unmarked",
        Facts(base(retired=True, image_id=None), users=["a"]),
        "restored",
        R.IN_USE,
        "restore",
    ),
    (
        "used, retired, no marks",
        Facts(base(retired=True, supported=False), users=["a"]),
        "restored",
        R.IN_USE,
        "restore",
    ),
    (
        "used, retired, other name",
        Facts(base(retired=True, links=2), users=["a"]),
        "restored",
        R.IN_USE,
        "restore",
    ),
    (
        "used, retired, name taken",
        Facts(base(retired=True), OTHER_FILE, ["a"]),
        "failed",
        R.NAME_TAKEN,
        None,
    ),
    (
        "used, retired, name taken, image there",
        Facts(base(retired=True), OTHER_FILE, ["a"], "active"),
        "failed",
        R.NAME_TAKEN,
        None,
    ),
    (
        "used, retired, being downloaded",
        Facts(base(retired=True), users=["a"], is_downloading=True),
        K,
        R.NOVA_IS_DOWNLOADING,
        None,
    ),
    # So does Glance.
    ("image there", Facts(base(), image_status="deactivated"), K, R.IMAGE_EXISTS, None),
    (
        "image there, with a mark",
        Facts(base(unused_since=LONG_AGO), image_status="active"),
        K,
        R.IMAGE_EXISTS,
        "remove_mark",
    ),
    (
        "image there, retired",
        Facts(base(retired=True, unused_since=LONG_AGO), image_status="queued"),
        "restored",
        R.IMAGE_EXISTS,
        "restore",
    ),
    # A crash between a link and an unlink left both names.
    (
        "both names",
        Facts(base(retired=True, links=2), base(links=2).file),
        "restored",
        R.TWO_NAMES,
        "restore",
    ),
    # These are not judged.
    (
        "being downloaded",
        Facts(base(unused_since=LONG_AGO), is_downloading=True),
        K,
        R.NOVA_IS_DOWNLOADING,
        None,
    ),
    ("another name", Facts(base(unused_since=LONG_AGO, links=2)), K, R.HAS_ANOTHER_NAME, None),
    ("no marks", Facts(base(supported=False)), K, R.NO_MARKS, None),
    ("unmarked", Facts(base(image_id=None, unused_since=LONG_AGO)), K, R.IMAGE_NOT_KNOWN, None),
    (
        "unmarked and retired",
        Facts(base(image_id=None, retired=True, unused_since=LONG_AGO)),
        K,
        R.IMAGE_NOT_KNOWN,
        None,
    ),
]

UNUSED = [
    ("no mark", Facts(base()), K, R.FIRST_SEEN_UNUSED, "set_mark"),
    ("no mark, retired by 0.2.0", Facts(base(retired=True)), K, R.FIRST_SEEN_UNUSED, "set_mark"),
    ("mark in the future", Facts(base(unused_since=FUTURE)), K, R.FIRST_SEEN_UNUSED, "set_mark"),
    (
        "retired, mark in the future",
        Facts(base(retired=True, unused_since=FUTURE)),
        K,
        R.FIRST_SEEN_UNUSED,
        "set_mark",
    ),
    ("young", Facts(base(unused_since=SHORTLY)), K, R.NOT_UNUSED_LONG_ENOUGH, None),
    (
        "retired, young",
        Facts(base(retired=True, unused_since=SHORTLY)),
        K,
        R.NOT_UNUSED_LONG_ENOUGH,
        None,
    ),
    ("old", Facts(base(unused_since=LONG_AGO)), "retired", R.UNUSED, "retire"),
    ("just old", Facts(base(unused_since=JUST_LONG_ENOUGH)), "retired", R.UNUSED, "retire"),
    (
        "old, and an earlier file is retired",
        Facts(base(unused_since=LONG_AGO), OTHER_FILE),
        K,
        R.NAME_TAKEN,
        None,
    ),
    (
        "retired and old",
        Facts(base(retired=True, unused_since=LONG_AGO)),
        "pruned",
        R.UNUSED_WHILE_RETIRED,
        "remove",
    ),
    (
        "retired and old, and a new image has the name",
        Facts(base(retired=True, unused_since=LONG_AGO), OTHER_FILE, image_status="active"),
        "pruned",
        R.UNUSED_WHILE_RETIRED,
        "remove",
    ),
]


def outcome_of(decision: Decision) -> tuple[str, Reason, Action | None]:
    """Return what a table compares."""
    return decision.verdict.outcome, decision.verdict.reason, decision.action


@pytest.mark.parametrize("situation", [BLOCKED, ALL_REPORTED], ids=["blocked", "all reported"])
@pytest.mark.parametrize(
    ("facts", "outcome", "reason", "action"),
    [row[1:] for row in LADDER],
    ids=[row[0] for row in LADDER],
)
def test_what_is_needed_or_exempt_is_so_even_if_the_clean_up_is_blocked(
    facts: Facts, outcome: str, reason: Reason, action: str | None, situation: dict[str, Any]
) -> None:
    """A blocked clean-up restores what is needed, and takes nothing."""
    assert outcome_of(decide(facts._replace(**situation), POLICY, NOW)) == (outcome, reason, action)


@pytest.mark.parametrize(
    ("facts", "outcome", "reason", "action"),
    [row[1:] for row in UNUSED],
    ids=[row[0] for row in UNUSED],
)
def test_what_nobody_needs_goes_in_two_steps(
    facts: Facts, outcome: str, reason: Reason, action: str | None
) -> None:
    """Its mark decides; if the clean-up is blocked, nothing happens, not even to the mark."""
    assert outcome_of(decide(facts._replace(**ALL_REPORTED), POLICY, NOW)) == (
        outcome,
        reason,
        action,
    )
    assert outcome_of(decide(facts._replace(**BLOCKED), POLICY, NOW)) == (K, R.BLOCKED, None)


@pytest.mark.parametrize("retired", [False, True])
def test_every_report_must_have_been_begun_after_the_mark(retired: bool) -> None:
    """One report that was begun before keeps the base, and is named."""
    facts = Facts(
        base(retired=retired, unused_since=LONG_AGO), reports_begun={"new": NOW, "old": LONG_AGO}
    )
    decision = decide(facts, POLICY, NOW)
    assert outcome_of(decision) == (K, R.WAITING_FOR_REPORTS, None)
    assert decision.verdict.sentence == "unused for 2 d; waiting for a newer report of old"


def test_unmarked_bases_go_the_same_way_if_they_are_included() -> None:
    """With ``--unmarked`` the ladder is the same for them."""
    policy = Policy(after=DAY, report_age=HOUR, unmarked=True)
    steps = [base(image_id=None), base(image_id=None, unused_since=LONG_AGO)]
    steps.append(base(image_id=None, retired=True, unused_since=LONG_AGO))
    actions = [decide(Facts(step, **ALL_REPORTED), policy, NOW).action for step in steps]
    assert actions == [Action.SET_MARK, Action.RETIRE, Action.REMOVE]


def report(host: str, begun: float = NOW - 60, **changes: Any) -> Report:
    """Return a complete report without bases."""
    values: dict[str, Any] = {
        "host": host,
        "begun": begun,
        "latest": begun,
        "complete": True,
        "bases": frozenset(),
    }
    return Report(**values | changes)


HOSTS = [ComputeHost("a", "RegionOne"), ComputeHost("b", "RegionTwo")]


@pytest.mark.parametrize(
    ("reports", "blockers"),
    [
        ([report("a"), report("b")], []),
        ([report("a")], ["b has no report"]),
        ([report("a"), report("b", NOW - 3 * HOUR)], ["the report of b is 3 h old"]),
        ([report("a"), report("b", NOW - 3 * HOUR + 1)], []),
        (
            [report("a"), report("b", complete=False, incomplete_because="disk X")],
            ["the report of b is incomplete: disk X"],
        ),
        (
            [report("a"), report("b", latest=NOW + 301)],
            ["the report of b lies in the future; set the clocks of that host and of this machine"],
        ),
        ([report("a"), report("b", latest=NOW + 299)], []),
        ([report("a"), report("b"), report("c")], ["c reports, but Nova does not know it"]),
        ([report("a"), report("b"), report("c", NOW - 3 * HOUR)], []),
        (
            [report("a"), report("b"), report("c", NOW - 9 * HOUR, latest=NOW)],
            ["c reports, but Nova does not know it"],
        ),
    ],
)
def test_one_report_that_is_not_as_it_must_be_blocks(
    reports: list[Report], blockers: list[str]
) -> None:
    """Every host in every region must have a complete, fresh report, and nobody else may."""
    by_host = {report.host: report for report in reports}
    assert list_blockers(HOSTS, Reports(by_host), POLICY, NOW) == blockers


def test_an_unreadable_report_blocks_whoever_wrote_it() -> None:
    """The bases that it names are not known."""
    reports = Reports({"a": report("a"), "b": report("b")}, {"gone": "it is not JSON"})
    expected = ["the report of gone cannot be read: it is not JSON"]
    assert list_blockers(HOSTS, reports, POLICY, NOW) == expected


def test_one_host_name_in_two_regions_blocks() -> None:
    """Two machines would write one report."""
    hosts = [*HOSTS, ComputeHost("a", "RegionTwo")]
    reports = Reports({"a": report("a"), "b": report("b")})
    assert list_blockers(hosts, reports, POLICY, NOW) == ["Nova lists 2 compute hosts named a"]


def test_ignored_hosts_need_no_report_but_somebody_must() -> None:
    """If nobody is left who reports, nothing proves anything."""
    policy = Policy(after=DAY, report_age=3 * HOUR, ignored_hosts=frozenset({"b"}))
    assert list_blockers(HOSTS, Reports({"a": report("a")}), policy, NOW) == []
    everybody = Policy(after=DAY, report_age=3 * HOUR, ignored_hosts=frozenset({"a", "b"}))
    blockers = list_blockers(HOSTS, Reports(), everybody, NOW)
    assert blockers == ["every compute host is ignored, so nobody reports"]


def test_recent_use_counts_for_as_long_as_after() -> None:
    """A base that a report names as recently used is in use for ``--after``, however old it is."""
    reports = Reports({"a": report("a", NOW - 90 * DAY, recent={NAME: NOW - 100})})
    assert reports.users(NAME, since=NOW - 101) == ["a"]
    assert reports.users(NAME, since=NOW - 100) == []
    in_use = Reports({"a": report("a", NOW - 90 * DAY, bases=frozenset({NAME}))})
    assert in_use.users(NAME, since=NOW) == ["a"]


IMAGES = (ID, ID.upper(), "b0000000-0000-4000-8000-000000000000")
UNMARKED = IMAGES[2]
MACHINES = ("a", "b", "c")
SERVERS = ("s1", "s2")
# A machine's clock, or the storage node's, jumps by so many seconds.
JUMPS = st.sampled_from([-3 * DAY, -4 * HOUR, -200.0, 200.0, 4 * HOUR, 3 * DAY, 40 * DAY])
PASSING = st.sampled_from([HOUR, 2 * HOUR, 12 * HOUR, DAY + HOUR, 30 * DAY])


@dataclass
class Machine:
    """A compute node. ``clock`` is how far its clock is ahead of the true time, in seconds.

    ``is_listed`` says that Nova lists it. ``document`` is its last report, in its own time, and
    ``garbage`` what lies in its place.
    """

    clock: float = 0.0
    is_listed: bool = True
    document: dict[str, Any] | None = None
    written: float = 0.0
    garbage: str | None = None


@dataclass
class Disk:
    """A server's disk, on a machine and on the base with an inode.

    ``is_reported`` says that the machine has reported since the disk came there.
    """

    host: str
    image: str
    inode: int
    is_reported: bool = False


@dataclass
class World:
    """A cache and what uses it, at a true time in seconds, with the storage node's clock ahead."""

    place: Path
    now: float = 1e9
    clock: float = 0.0
    machines: dict[str, Machine] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    in_glance: dict[str, str] = field(default_factory=dict)


class Bases(RuleBasedStateMachine):
    """Anything happens to compute nodes, disks, reports, clocks and images, in any order.

    A base that any disk uses is never removed. One that is retired and that a report or Glance
    names is back after one pass. When nothing uses the bases any more and all nodes report, they
    are gone after two periods of ``--after``.

    Time passes by making every mark and every report older. What the true time is, only the test
    knows. A server's disk does not leave a machine before that has reported once: a server that
    migrates between any two reports of two machines, for days, is the one thing that no report can
    show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Path(tempfile.mkdtemp(prefix="ln-images-")))
        for name in ("images", "cache", "reports"):
            (self.world.place / name).mkdir()
        self.world.machines = {name: Machine() for name in MACHINES}
        for image in IMAGES:
            make_base(self.cache, image, marked=image != UNMARKED)

    def teardown(self) -> None:
        """Everything ends, and every base goes."""
        try:
            self._end()
        finally:
            shutil.rmtree(self.world.place)

    @property
    def cache(self) -> Path:
        """Return the cache."""
        return self.world.place / "cache"

    def inode(self, image: str, suffix: str = "") -> int | None:
        """Return the inode of what has a base's name, or None."""
        try:
            return (self.cache / (cache_name(image) + suffix)).stat().st_ino
        except FileNotFoundError:
            return None

    def tick(self, seconds: float = 60) -> None:
        """Let time pass."""
        self.world.now += seconds
        self._age_marks(seconds)

    def _age_marks(self, seconds: float) -> None:
        for base in self.cache.iterdir():
            try:
                mark = float(os.getxattr(base, UNUSED_SINCE_MARK))
            except OSError:
                continue
            os.setxattr(base, UNUSED_SINCE_MARK, f"{mark - seconds:.6f}".encode())

    @rule(seconds=PASSING)
    def time_passes(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self.tick(seconds)

    @rule(seconds=JUMPS)
    def storage_clock_jumps(self, seconds: float) -> None:
        """Set the storage node's clock. Every mark and every report appears that much older."""
        self.tick()
        self.world.clock += seconds
        self._age_marks(seconds)

    @rule(name=st.sampled_from(MACHINES), seconds=JUMPS)
    def machine_clock_jumps(self, name: str, seconds: float) -> None:
        """Set a compute node's clock."""
        self.tick()
        self.world.machines[name].clock += seconds

    @rule()
    def clocks_are_right(self) -> None:
        """Set all clocks right."""
        self.tick()
        self._age_marks(-self.world.clock)
        self.world.clock = 0
        for machine in self.world.machines.values():
            machine.clock = 0

    @rule(names=st.sets(st.sampled_from(MACHINES), min_size=1))
    def report(self, names: AbstractSet[str]) -> None:
        """Let some machines report, as ln-images-node does it."""
        for name in sorted(names):
            self.tick()
            self._report(name, self._used_bases(name), complete=True)
            for disk in self.world.disks.values():
                disk.is_reported |= disk.host == name

    @rule(name=st.sampled_from(MACHINES))
    def report_in_part(self, name: str) -> None:
        """Let a machine report that cannot read its disks."""
        self.tick()
        self._report(name, set(), complete=False)

    def _used_bases(self, name: str) -> set[str]:
        disks = self.world.disks.values()
        return {cache_name(disk.image) for disk in disks if disk.host == name}

    def _report(self, name: str, bases: set[str], complete: bool) -> None:
        machine = self.world.machines[name]
        now = self.world.now + machine.clock
        recent: dict[str, float] = {}
        if machine.document is not None and machine.garbage is None:
            for base_name, seen in machine.document["recent"].items():
                recent[base_name] = min(seen, now)
            for base_name in machine.document["bases"]:
                recent[base_name] = min(machine.document["time"], now)
        recent = {
            base_name: seen
            for base_name, seen in recent.items()
            if base_name not in bases and now - seen <= DAY
        }
        if machine.garbage is not None:
            # What it named before is not known any more.
            complete = False
        document = {"complete": complete, "recent": recent, "time": now}
        machine.document = report_document(name, *bases, **document)
        machine.written = self.world.now + self.world.clock
        machine.garbage = None

    @rule(
        name=st.sampled_from(MACHINES), garbage=st.sampled_from(["{", "fifo", "link", "[" * 9999])
    )
    def report_is_destroyed(self, name: str, garbage: str) -> None:
        """Put something hostile in a report's place."""
        self.tick()
        self.world.machines[name].garbage = garbage

    @rule(name=st.sampled_from(MACHINES))
    def machine_leaves(self, name: str) -> None:
        """Delete a machine in Nova, which refuses while it has servers."""
        self.tick()
        if not any(disk.host == name for disk in self.world.disks.values()):
            self.world.machines[name].is_listed = False

    @rule(name=st.sampled_from(MACHINES))
    def machine_comes(self, name: str) -> None:
        """Start nova-compute on a machine."""
        self.tick()
        self.world.machines[name].is_listed = True

    @rule(
        server=st.sampled_from(SERVERS),
        image=st.sampled_from(IMAGES),
        name=st.sampled_from(MACHINES),
    )
    def server_is_built(self, server: str, image: str, name: str) -> None:
        """Build a server. If the base is not there, Nova downloads it from Glance."""
        self.tick()
        if server in self.world.disks or not self.world.machines[name].is_listed:
            return
        if self.inode(image) is None and self.world.in_glance.get(image) == "active":
            make_base(self.cache, image, b"downloaded", marked=False)
        inode = self.inode(image)
        if inode is not None:
            self.world.disks[server] = Disk(name, image, inode)

    @precondition(lambda self: self.world.disks)
    @rule(data=st.data(), name=st.sampled_from(MACHINES))
    def server_migrates(self, data: st.DataObject, name: str) -> None:
        """Move a disk to another machine."""
        self.tick()
        server = data.draw(st.sampled_from(sorted(self.world.disks)))
        disk = self.world.disks[server]
        if disk.is_reported and self.world.machines[name].is_listed:
            self.world.disks[server] = Disk(name, disk.image, disk.inode)

    @precondition(lambda self: self.world.disks)
    @rule(data=st.data())
    def server_is_deleted(self, data: st.DataObject) -> None:
        """Delete a server."""
        self.tick()
        del self.world.disks[data.draw(st.sampled_from(sorted(self.world.disks)))]

    @rule(
        image=st.sampled_from(IMAGES), status=st.sampled_from(["active", "deactivated", "queued"])
    )
    def image_comes(self, image: str, status: str) -> None:
        """Let Glance have an image."""
        self.tick()
        self.world.in_glance[image] = status

    @rule()
    def images_go(self) -> None:
        """Delete every image."""
        self.tick()
        self.world.in_glance = {}

    @rule()
    def clean_up(self) -> None:
        """Run a pass, and check what it must never do, and what it must do at once."""
        self.tick()
        named = self._write_reports()
        before = {image: (self.inode(image), self.inode(image, ".retired")) for image in IMAGES}
        self._run()
        for server, disk in self.world.disks.items():
            inodes = [self.inode(disk.image, suffix) for suffix in ("", ".retired")]
            assert disk.inode in inodes, f"the base of {server} is gone"
        for image, (active, retired) in before.items():
            is_needed = cache_name(image) in named or self._is_in_glance(image)
            if is_needed and active is not None:
                assert self.inode(image) == active
            if is_needed and active is None and retired is not None:
                assert self.inode(image) == retired

    @rule(days=st.integers(1, 4), silent=st.sampled_from([None, *MACHINES]))
    def days_pass_in_order(self, days: int, silent: str | None) -> None:
        """Let all machines, or all but one, report each day, and run a pass after that."""
        for _ in range(days):
            self.tick(DAY + HOUR)
            self.report({name for name in MACHINES if name != silent})
            self.clean_up()

    def _is_in_glance(self, image: str) -> bool:
        return image.lower() in {image_id.lower() for image_id in self.world.in_glance}

    def _write_reports(self) -> set[str]:
        """Write every report as it is to be read now. Return the bases that readable ones name."""
        reports = self.world.place / "reports"
        shutil.rmtree(reports)
        reports.mkdir()
        named: set[str] = set()
        # What is shown as this machine's time is real; all else is relative to it.
        ahead = time.time() - (self.world.now + self.world.clock)
        for name, machine in self.world.machines.items():
            path = reports / f"{name}.json"
            if machine.garbage == "fifo":
                os.mkfifo(path)
            elif machine.garbage == "link":
                path.symlink_to("/etc/passwd")
            elif machine.garbage is not None:
                path.write_text(machine.garbage)
            elif machine.document is not None:
                document = machine.document
                named |= set(document["bases"])
                recent = {base: seen + ahead for base, seen in document["recent"].items()}
                changes = {"time": document["time"] + ahead, "recent": recent}
                path.write_text(json.dumps(document | changes))
                os.utime(path, (time.time(), machine.written + ahead))
        return named

    def _run(self) -> dict[str, str]:
        """Run the real clean-up. Return the outcomes by cache name."""
        options = CleanUpOptions(
            images_dir=str(self.world.place / "images"),
            cache_dir=str(self.cache),
            reports_dir=str(self.world.place / "reports"),
            policy=Policy(after=DAY, report_age=3 * HOUR, unmarked=True),
        )
        hosts = [ComputeHost(name, "") for name in MACHINES if self.world.machines[name].is_listed]
        # An image without a size is none that a mounted volume must have.
        images = {
            image: Image(id=image, status=status) for image, status in self.world.in_glance.items()
        }
        cloud = Cloud(hosts, images, OneImageGlance(images.__contains__))
        result = clean_up(options, lambda: cloud, boot_time())
        return {each.cache_name: each.verdict.outcome for each in result.pass_.results}

    def _end(self) -> None:
        """Let all disks and images go and all nodes report, and wait for two periods."""
        self.clocks_are_right()
        self.world.disks = {}
        self.world.in_glance = {}
        for machine in self.world.machines.values():
            machine.is_listed = True
            machine.garbage = None
        # What was in use may be recent for one more day. Then there is a pass that marks, one that
        # retires and one that removes. If an earlier file of the same name is still retired, the
        # later one waits until that is gone.
        passes = 4 + (2 if self._has_namesakes() else 0)
        for _ in range(passes):
            self.tick(DAY + HOUR)
            self.report(set(MACHINES))
            self.tick()
            self._write_reports()
            self._run()
        assert not list(self.cache.iterdir())

    def _has_namesakes(self) -> bool:
        return any(self.inode(image) and self.inode(image, ".retired") for image in IMAGES)


TestBases = Bases.TestCase
TestBases.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
