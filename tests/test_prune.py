"""The clean-up.

Any doubt keeps, nothing is beyond recall before it was retired, and all in the cache is told of.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keystoneauth1.session import Session
from keystoneauth1.token_endpoint import Token

from cloud import REGION, wait_until
from compute import Compute, Fault, in_catalog
from compute import server as a_server
from conftest import COMMAND, DEFAULTS, NO_OPENRC, OWNER, Node, block, needs_root
from faulty import Answer, Front
from ln_images.disk import Disk
from ln_images.inode import MARK, SIZE_MARK
from ln_images.instances import Disks, open_inodes
from ln_images.keystone import Connection
from ln_images.model import Base, File, Image, Outcome, Server, Verdict
from ln_images.options import Options
from ln_images.plan import cache_name, look
from ln_images.prune import Evidence, age, clean_up, judge, needed, restless
from test_faults import formatted
from test_instances import qemu_img

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER = "a0000000-0000-4000-8000-000000000000"
NAME = cache_name(ID)
DAY = 86400.0
RETIRE, RESTORE, REMOVE = (
    Verdict(one) for one in (Outcome.RETIRED, Outcome.RESTORED, Outcome.PRUNED)
)
FILE = File(stat.S_IFREG | 0o644, 11, 1, links=1, uid=0, gid=0, size=1000, changed=0.0, mark=ID)
LINKED, UNKNOWN, RETIRED = (
    Base(NAME, ID, False, FILE),
    Base(NAME, "", False, FILE),
    Base(NAME, ID, True, FILE),
)


def server(**changes: object) -> Server:
    """A server that runs from another image."""
    values = {
        "id": "s1",
        "status": "ACTIVE",
        "task_state": "",
        "host": "h",
        "image": OTHER,
        "uses": {OTHER},
    } | changes
    return Server(**values)  # type: ignore[arg-type]


def evidence(now: float = 2 * DAY, images: Any = (), servers: Any = (), **known: Any) -> Evidence:
    """Two days after the last use, with a day to wait and nothing that speaks for the base but ``known``."""
    return Evidence(now, DAY, needed(images, servers), **known)


NEEDS = [
    *(
        (evidence(images=[Image(ID, status=status)]), f"Glance has the image: status {status}")
        for status in ("active", "deactivated", "pending_delete", "unlisted")
    ),
    (evidence(servers=[server(uses={OTHER, ID})]), "server s1 was built from it"),
    (evidence(servers=[server(uses={ID.upper()})]), "server s1 was built from it"),
    (evidence(disks=Disks({NAME: "/i/s1/disk"})), "/i/s1/disk is backed by it"),
    (evidence(opened=frozenset({11})), "an NFS client has it open"),
]
YOUNG = [
    (evidence(now=DAY - 1), "in use or released 23 h 59 min ago, kept for 1 d"),
    (evidence(now=-5.0), "in use or released 0 s ago, kept for 1 d"),
]
# An id that is being uploaded anew keeps, and gives an earlier content no name.
DOUBTS = [
    (evidence(doubt="who knows"), "who knows"),
    (evidence(images=[Image(ID, status="saving")]), "an image with this id is being uploaded"),
]


@pytest.mark.parametrize("base", [LINKED, UNKNOWN])
def test_each_condition_alone_keeps_a_base(base: Base) -> None:
    """Whatever single thing speaks for a base, it is kept, and the report says which.

    Else it is retired.
    """
    for known, reason in NEEDS + DOUBTS:
        assert judge(base, known) == Verdict(Outcome.KEPT, f"{reason}; unused for 2 d")
    for known, reason in YOUNG:
        assert judge(base, known) == Verdict(Outcome.KEPT, reason)
    assert judge(base, evidence()) == Verdict(Outcome.RETIRED, "unused for 2 d")


def test_each_need_alone_restores_a_retired_base() -> None:
    """At once, whatever its age.

    A doubt only keeps it where it is, and else it goes after the same time again.
    """
    for known, reason in NEEDS:
        for now in (-5.0, 1.0, 2 * DAY):
            assert judge(RETIRED, Evidence(**{**vars(known), "now": now})) == Verdict(
                Outcome.RESTORED, reason
            )
    for known, reason in DOUBTS:
        assert judge(RETIRED, known) == Verdict(Outcome.KEPT, f"{reason}; unused for 2 d")
    assert judge(RETIRED, evidence(now=DAY - 1)) == Verdict(
        Outcome.KEPT, "retired 23 h 59 min ago, kept for 1 d"
    )
    assert judge(RETIRED, evidence()) == Verdict(Outcome.PRUNED, "retired 2 d ago")
    twice = RETIRED._replace(file=FILE._replace(links=2))
    assert judge(twice, evidence()) == Verdict(Outcome.KEPT, "it has another name, too")


def test_a_server_needs_what_it_was_built_from_though_the_id_is_uploaded_anew() -> None:
    """Who has the earlier content goes before who is about to bring another."""
    known = evidence(images=[Image(ID, status="saving")], servers=[server(uses={ID})])
    assert judge(RETIRED, known).outcome is Outcome.RESTORED


def test_what_needs_a_base_goes_before_a_new_upload_under_its_id() -> None:
    """A disk or a client has the earlier content.

    It is restored, so that the upload cannot take its name.
    """
    for known in ({"disks": Disks({NAME: "/i/s1/disk"})}, {"opened": frozenset({11})}):
        uploaded = evidence(images=[Image(ID, status="saving")], **known)
        assert judge(RETIRED, uploaded).outcome is Outcome.RESTORED


@pytest.mark.parametrize(
    "unsettled",
    [
        {"status": "RESCUE"},
        {"status": "REBUILD"},
        {"status": "UNKNOWN"},
        {"status": "ERROR"},
        {"status": "SHELVED_OFFLOADED", "task_state": "spawning", "host": ""},
        *(
            {"task_state": task}
            for task in (
                *("rebuilding", "rebuild_block_device_mapping", "rebuild_spawning", "unshelving"),
                *("resize_finish", "rescuing", "unrescuing"),
            )
        ),
    ],
    ids=lambda changes: " ".join(changes.values()),
)
def test_a_server_that_is_not_at_rest_may_use_any_base(unsettled: dict[str, str]) -> None:
    """While its disk may be made from another image than it names, the reason says which server to bring to rest."""
    state = unsettled.get("task_state") or unsettled["status"]
    assert restless([server(), server(id="odd", **unsettled)]) == (
        f"server odd is in {state} and may use any base: bring it to rest"
    )


def test_servers_at_rest_are_no_doubt() -> None:
    """Building is no doubt, since a build names its image.

    Nor is an error of a server that never had a disk.
    """
    at_rest = [
        {},
        {"task_state": "spawning"},
        {"status": "SHUTOFF"},
        {"status": "SHELVED_OFFLOADED", "host": ""},
    ]
    assert not restless(
        server(**one) for one in [*at_rest, {"status": "ERROR", "host": ""}, {"status": "BUILD"}]
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (90061, "1 d 1 h"),
        (86400 * 400, "400 d"),
    ],
)
def test_ages_are_said_in_two_units(seconds: float, text: str) -> None:
    """A duration is short and readable."""
    assert age(seconds) == text


spellings = st.sampled_from([ID, ID.upper(), ID[:8].upper() + ID[8:], OTHER])


@given(ours=spellings, theirs=spellings, server_has_it=st.booleans(), marked=st.booleans())
def test_ids_are_compared_without_regard_to_case(
    ours: str, theirs: str, server_has_it: bool, marked: bool
) -> None:
    """Servers name images in any spelling.

    Of a base without a mark, in the three in which it could have its name.
    """
    base = Base(cache_name(ours), ours if marked else "", False, FILE)
    known = (
        evidence(servers=[server(uses={theirs})])
        if server_has_it
        else evidence(images=[Image(theirs)])
    )
    needs = ours == theirs or (
        ours.lower() == theirs.lower() and (marked or ours in (ours.lower(), ours.upper()))
    )
    assert (judge(base, known).outcome is Outcome.KEPT) is needs


def options(place: Path, **changes: Any) -> Options:
    """A clean-up of what lies in ``images`` and ``cache`` below ``place``.

    By default nothing need be old.
    """
    values: dict[str, Any] = {
        "images_dir": str(place / "images"),
        "cache_dir": str(place / "cache"),
        "prune": True,
        "prune_after": 0,
    }
    return replace(DEFAULTS, **values | changes)


@pytest.fixture(params=["here", pytest.param("without RENAME_NOREPLACE", marks=needs_root)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where both directories lie.

    On the machine's own file system, and on one that knows no such rename.
    """
    with contextlib.ExitStack() as mounts:
        at = tmp_path
        if request.param != "here":
            if shutil.which("bindfs") is None:
                pytest.skip("needs a file system without RENAME_NOREPLACE: apt-get install bindfs")
            (source := tmp_path / "source").mkdir()
            (at := tmp_path / "mounted").mkdir()
            # NFS and CephFS answer EINVAL; so does bindfs, through FUSE.
            subprocess.run(["bindfs", source, at], check=True)
            mounts.callback(lambda: subprocess.run(["umount", "--lazy", at], check=True))
        (at / "images").mkdir()
        (at / "cache").mkdir()
        yield at


def base_in(cache: Path, image_id: str = ID, data: bytes = b"base", mark: bool = True) -> Path:
    """What is left of an image that was linked and deleted, or, without a ``mark``, fetched by Nova."""
    entry = cache / cache_name(image_id)
    entry.write_bytes(data)
    os.chown(entry, *OWNER)
    entry.chmod(0o644)
    if mark:
        os.setxattr(entry, MARK, image_id.encode())
        os.setxattr(entry, SIZE_MARK, str(len(data)).encode())
    return entry


def bases_of(disk: Disk, place: Path) -> dict[tuple[str, bool], Base]:
    """The bases as a pass sees them, by name and whether they are retired."""
    found = look(disk.sources(), disk.entries(), options(place)).bases
    return {(base.name, base.retired): base for base in found}


def test_a_base_is_retired_restored_and_removed(place: Path) -> None:
    """A rename of the same inode, which whoever has it open reads on, and which renews its ctime."""
    entry = base_in(place / "cache")
    retired = entry.with_name(f"{NAME}.retired")
    with Disk(str(place / "images"), str(place / "cache")) as disk, entry.open("rb") as user:
        before = entry.stat()
        wait_until(lambda: time.time() > before.st_ctime + 0.1, "the clock of the file system")
        assert disk.carry_out(bases_of(disk, place)[NAME, False], RETIRE) is RETIRE
        after = retired.stat()
        assert (entry.exists(), after.st_ino) == (False, before.st_ino)
        assert after.st_ctime > before.st_ctime
        assert disk.carry_out(bases_of(disk, place)[NAME, True], RESTORE) is RESTORE
        assert (entry.stat().st_ino, retired.exists()) == (before.st_ino, False)
        assert disk.carry_out(bases_of(disk, place)[NAME, False], REMOVE).outcome is Outcome.KEPT
        assert entry.exists()
        assert disk.carry_out(bases_of(disk, place)[NAME, False], RETIRE) is RETIRE
        assert disk.carry_out(bases_of(disk, place)[NAME, True], REMOVE) is REMOVE
        assert not entry.exists()
        assert not retired.exists()
        assert user.read() == b"base"


@pytest.mark.parametrize("retired", [False, True])
@pytest.mark.parametrize(
    "happen",
    [
        pytest.param(lambda entry: os.utime(entry), id="Nova uses it: its ctime is renewed"),
        pytest.param(lambda entry: os.link(entry, entry.with_name("x")), id="it has another link"),
        pytest.param(lambda entry: entry.rename(entry.with_name("x")), id="it is gone"),
        pytest.param(
            lambda entry: (entry.unlink(), entry.write_bytes(b"base")), id="it is another file"
        ),
        pytest.param(
            lambda entry: (entry.unlink(), entry.symlink_to("x")), id="it is a symbolic link"
        ),
        pytest.param(lambda entry: os.removexattr(entry, MARK), id="its mark is gone"),
    ],
)
def test_a_base_that_changes_in_the_last_moment_is_kept(
    tmp_path: Path, happen: Callable[[Path], object], retired: bool
) -> None:
    """It is looked at once more immediately before anything is done."""
    for name in ("images", "cache"):
        (tmp_path / name).mkdir()
    entry = base_in(tmp_path / "cache")
    if retired:
        entry = entry.rename(entry.with_name(f"{NAME}.retired"))
    with Disk(str(tmp_path / "images"), str(tmp_path / "cache")) as disk:
        base = bases_of(disk, tmp_path)[NAME, retired]
        happen(entry)
        before = sorted(entry.parent.iterdir())
        changed = Verdict(Outcome.KEPT, "it has changed since it was looked at")
        assert disk.carry_out(base, RESTORE if retired else RETIRE) == changed
        assert disk.carry_out(base, REMOVE) == changed
    assert sorted(entry.parent.iterdir()) == before


@pytest.mark.parametrize("retire", [True, False])
def test_nothing_is_replaced(place: Path, retire: bool) -> None:
    """Where another file has the new name, both stay, and the reason says so.

    Also where the kernel cannot tell.
    """
    entry = base_in(place / "cache")
    retired = entry.with_name(f"{NAME}.retired")
    retired.write_bytes(b"other")
    old, new = (entry, retired) if retire else (retired, entry)
    before = {path: path.read_bytes() for path in (place / "cache").iterdir()}
    with Disk(str(place / "images"), str(place / "cache")) as disk:
        verdict = disk.carry_out(
            bases_of(disk, place)[NAME, not retire], RETIRE if retire else RESTORE
        )
    assert verdict == Verdict(
        Outcome.KEPT, f"another file has the name {new.name}: keep the one that servers need"
    ), old
    assert {path: path.read_bytes() for path in (place / "cache").iterdir()} == before


@pytest.mark.parametrize("retire", [True, False])
def test_a_crash_between_two_names_is_mended(place: Path, retire: bool) -> None:
    """Without that rename a base has both names for a moment.

    The next move, either way, leaves it one.
    """
    entry = base_in(place / "cache")
    os.link(entry, retired := entry.with_name(f"{NAME}.retired"))
    with Disk(str(place / "images"), str(place / "cache")) as disk:
        bases = bases_of(disk, place)
        assert {key: base.image_id for key, base in bases.items()} == {
            (NAME, False): ID,
            (NAME, True): ID,
        }
        verdict = RETIRE if retire else RESTORE
        assert disk.carry_out(bases[NAME, not retire], verdict) is verdict
        assert list((place / "cache").iterdir()) == [retired if retire else entry]


def test_a_base_is_not_restored_under_a_download(place: Path) -> None:
    """Nova would replace it when the download ends.

    A leftover of one is no hindrance once it has rested.
    """
    entry = base_in(place / "cache")
    retired, part = (entry.with_name(NAME + suffix) for suffix in (".retired", ".part"))
    entry.rename(retired)
    part.touch()
    with Disk(str(place / "images"), str(place / "cache")) as disk:
        base = bases_of(disk, place)[NAME, True]
        assert disk.carry_out(base, RESTORE) == Verdict(Outcome.KEPT, "Nova is downloading it")
        assert (entry.exists(), retired.exists()) == (False, True)
        part.unlink()
        assert disk.carry_out(base, RESTORE) is RESTORE


MOVES = """
import sys
from ln_images.disk import Disk
from ln_images.model import Base, Outcome, Verdict

with Disk(f"{sys.argv[1]}/images", f"{sys.argv[1]}/cache") as disk:
    while True:
        for number, (name, file) in enumerate(disk.entries()):
            base = Base(name.removesuffix(".retired"), "", name.endswith(".retired"), file)
            disk.carry_out(base, Verdict(Outcome.RESTORED if base.retired else Outcome.RETIRED))
            if number % 100 == 0:
                print(flush=True)
"""


def test_sigkill_in_the_middle_leaves_each_base_one_name(place: Path) -> None:
    """Of thousands that are retired and restored each is the same inode before and after, under one of two names.

    Where there is no such rename, the one that was moved just then may have both.
    """
    cache = place / "cache"
    for number in range(2000):
        (cache / cache_name(str(number))).touch()
    inodes = {path.stat().st_ino for path in cache.iterdir()}
    both = 0
    for hundreds in (1, 7, 33):
        command = [sys.executable, "-c", MOVES, str(place)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as moving:
            assert moving.stdout is not None
            for _ in range(hundreds):
                assert moving.stdout.readline()
            moving.kill()
        names: dict[str, list[int]] = {}
        for path in cache.iterdir():
            names.setdefault(path.name.removesuffix(".retired"), []).append(path.stat().st_ino)
        assert {numbers[0] for numbers in names.values()} == inodes
        assert len(names) == len(inodes)
        assert all(len(set(numbers)) == 1 for numbers in names.values())
        both = max(both, sum(len(numbers) == 2 for numbers in names.values()))
    assert both <= (0 if place.name != "mounted" else 1)


DATA = b"\1" * 5000
S1, S2 = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
# How long something has not been used varies from run to run.
AGE = re.compile(r"(?:; )?(?:unused for|retired) \d+ s(?: ago)?$")


def orphan(node: Node, **changes: Any) -> str:
    """What is left of an image that was linked and deleted.

    In the same way, but unmarked, of one that Nova fetched.
    """
    image = str(uuid.uuid4())
    base_in(node.cache, image, DATA, **changes)
    return image


def retired(node: Node, **changes: Any) -> str:
    """Such a base that was retired."""
    image = orphan(node, **changes)
    node.entry(image).rename(set_aside(node, image))
    return image


def set_aside(node: Node, image: str) -> Path:
    """Where a base lies that was retired."""
    return node.cache / f"{node.entry(image).name}.retired"


Found = dict[str, tuple[str, str]]


def prune(
    node: Node, *arguments: str, status: int = 0, after: str = "0s", **variables: str | None
) -> Found:
    """Runs a pass that prunes.

    (outcome, reason without the age) of each base, by its image's id, or else its name.
    """
    run = node.run("--prune", "--prune-after", after, "--format", "json", *arguments, **variables)
    assert run.returncode == status, run.stderr
    images = json.loads(run.stdout)["images"]
    return {
        one["id"] or one["cache_name"]: (one["outcome"], AGE.sub("", one["reason"]))
        for one in images
    }


def test_a_base_that_nothing_needs_is_retired_and_then_removed(node: Node, nova: Compute) -> None:
    """From the upload to the end.

    Linked, deleted in Glance, retired, restored when a server needs it, and removed.
    """
    gone, stays = node.cloud.image("gone", DATA), node.cloud.image("stays", DATA)
    assert node.run().returncode == 0
    node.cloud.delete(gone)
    inode = node.entry(gone).stat().st_ino
    nova.servers = [a_server(f"s{n}", stays) for n in range(7)]
    assert prune(node) == {gone: ("retired", "")}
    assert node.names() == {node.entry(stays).name, set_aside(node, gone).name}
    nova.servers.append(a_server("late", gone))
    assert prune(node) == {gone: ("restored", "server late was built from it")}
    assert node.entry(gone).stat().st_ino == inode
    assert prune(node) == {gone: ("kept", "server late was built from it")}
    nova.servers.pop()
    assert prune(node)[gone][0] == "retired"
    # By default it then lies there for a day.
    assert [reason.partition(" ago")[2] for _, reason in [prune(node, after="24h")[gone]]] == [
        ", kept for 1 d"
    ]
    assert prune(node) == {gone: ("pruned", "")}
    assert prune(node) == {}
    assert node.names() == {node.entry(stays).name}


def test_what_is_young_is_kept_and_nothing_is_asked(node: Node, nova: Compute) -> None:
    """By default a base stays for a day after its last use, and Nova is not bothered for it."""
    gone = orphan(node)
    ((outcome, reason),) = [prune(node, after="24h")[gone]]
    assert (outcome, reason.endswith("ago, kept for 1 d")) == ("kept", True)
    assert not nova.asked


@pytest.mark.parametrize("bases", [True, False])
def test_a_dry_run_asks_everything_and_touches_nothing(
    node: Node, nova: Compute, bases: bool
) -> None:
    """Also where nothing could be retired, it says which server, which old Nova or which fault would prevent it."""
    if bases:
        orphan(node), retired(node), orphan(node, mark=False)
    before = {path: path.stat() for path in node.cache.iterdir()}
    arguments = ("--dry-run", "--prune", "--prune-after", "0s", "--prune-unmarked")
    run = node.run(*arguments)
    held = "2 retired, 1 pruned, 4.9 KiB freed, 4.9 KiB held by 1 of deleted images, 4.9 KiB held by 1 not linked here"
    assert (
        f"dry run: {held}, 4.9 KiB held by 1 retired," if bases else "dry run: no images,"
    ) in run.stdout
    assert {asked.path for asked in nova.asked} == {"/servers/detail", "/os-services"}
    assert run.stderr == ""
    nova.newest = (2, 90)
    assert "nothing could be retired: Nova is older than 26.0.0" in node.run(*arguments).stderr
    nova.newest, nova.servers = (2, 93), [a_server("odd", status="RESCUE")]
    assert "nothing could be retired: server odd is in RESCUE" in node.run(*arguments).stderr
    nova.cell_down()
    run = node.run(*arguments)
    assert (run.returncode, "does not see all of its cells" in run.stderr) == (75, True)
    assert {path: path.stat() for path in node.cache.iterdir()} == before


def test_every_pass_tells_what_bases_hold(node: Node) -> None:
    """Without --prune, by the disk alone.

    Marked, unmarked and retired ones, and nothing else that lies there.
    """
    orphan(node), orphan(node), retired(node), orphan(node, mark=False), retired(node, mark=False)
    name = node.entry(orphan(node, mark=False)).name
    for other in (
        f"{name}.part",
        f"{name}.converted",
        f"{name}_20",
        "ephemeral_20_40d1d2c",
        "swap_512",
        name.upper(),
    ):
        (node.cache / other).write_bytes(DATA)
    (node.cache / cache_name("a")).symlink_to(name)
    (node.cache / cache_name("b")).mkdir()
    node.cloud.image("present", DATA)
    run = node.run("--format", "json")
    assert json.loads(run.stdout)["held"] == {
        kind: {"count": 2, "bytes": 2 * len(DATA)} for kind in ("orphans", "unmarked", "retired")
    }


def test_unmarked_bases_go_where_it_is_asked_for(node: Node, nova: Compute) -> None:
    """--prune leaves them.

    --prune-unmarked takes those that no image of Glance and no server names, in any spelling.

    Nova's files of other forms stay, however old they are.
    """
    plain, upper = str(uuid.uuid4()), str(uuid.uuid4()).upper()
    mixed = ID[:8].upper() + ID[8:]
    uses = {"OS-EXT-SRV-ATTR:kernel_id": plain, "OS-EXT-SRV-ATTR:ramdisk_id": mixed}
    nova.servers = [a_server("s", upper.lower(), **uses)]
    hidden = node.cloud.create("hidden", os_hidden=True)
    named = {
        image: base_in(node.cache, image, DATA, mark=False)
        for image in (plain, upper, mixed, hidden)
    }
    nobodys = node.entry(orphan(node, mark=False)).name
    own = [f"{nobodys}{suffix}" for suffix in (".part", ".converted", "_20")] + [
        "ephemeral_20_40d1d2c",
        "swap_512",
    ]
    for other in own:
        (node.cache / other).write_bytes(DATA)
    before = node.names()
    assert prune(node) == {hidden: ("waiting", "status queued")}
    assert node.names() == before
    found = prune(node, "--prune-unmarked")
    assert found.pop(hidden)[0] == "waiting"
    built = ("kept", "server s was built from it")
    assert found == {
        nobodys: ("retired", ""),
        named[hidden].name: ("kept", "an image with this id is being uploaded"),
        **dict.fromkeys((named[image].name for image in (plain, upper, mixed)), built),
    }
    # Once retired it is restored without the option, and removed with it alone.
    assert "its image is not known: --prune-unmarked removes it" in prune(node)[nobodys][1]
    assert prune(node, "--prune-unmarked")[nobodys] == ("pruned", "")
    assert node.names() == before - {nobodys}


@pytest.mark.usefixtures("nova")
def test_an_unmarked_base_that_a_disk_needs_is_kept_and_restored(
    node: Node, tmp_path: Path
) -> None:
    """The proof by the disk needs no id; nor does the way back."""
    here, aside = (node.entry(image(node, mark=False)) for image in (orphan, retired))
    for base, one in ((here, S1), (aside, S2)):
        overlay(tmp_path / "instances", one, base)
    found = prune(node, "--prune-unmarked", "--instances-dir", str(tmp_path / "instances"))
    assert found == {
        here.name: ("kept", f"{tmp_path}/instances/{S1}/disk is backed by it"),
        aside.name: ("restored", f"{tmp_path}/instances/{S2}/disk is backed by it"),
    }
    assert node.names() == {here.name, aside.name}


def overlay(instances: Path, server_id: str, base: Path, disk: str = "disk") -> Path:
    """Makes a server's real disk on a base, whatever the base's name is just now."""
    made = instances / server_id / disk
    made.parent.mkdir(parents=True, exist_ok=True)
    # The format and the size are given, so that QEMU does not look for the base.
    qemu_img("create", "-u", "-f", "qcow2", "-b", base, "-F", "raw", made, "1M")
    return made


class Clocked(Disk):
    """A real disk whose ctimes tell a clock that the test sets."""

    def __init__(self, place: Path) -> None:
        super().__init__(str(place / "images"), str(place / "cache"))
        self.now = 0.0
        self.changed: dict[int, float] = {}

    def entry(self, name: str) -> File | None:
        """What has a name, changed when the clock said so."""
        file = super().entry(name)
        return file and file._replace(changed=self.changed.setdefault(file.inode, self.now))

    def _rename(self, old: str, new: str) -> None:
        super()._rename(old, new)
        self.changed[os.stat(new, dir_fd=self._cache).st_ino] = self.now


class World:
    """A cloud in which anything happens, and what in it needs which base.

    The clean-up knows nothing of this.
    """

    # Linked here, and in no case that Nova would try; and two that Nova fetched.
    MARKED = ID[:8].upper() + ID[8:]
    IMAGES = (MARKED, "b0000000-0000-4000-8000-00000000000b".upper(), OTHER)
    SERVERS = (S1, S2)

    def __init__(self, place: Path, nova: Compute, headers: Callable[[str], bytes]) -> None:
        self.place, self.nova, self.headers = place, nova, headers
        for name in ("images", "cache", f"instances/{uuid.UUID(int=0)}", "nfsd/clients/1"):
            (place / name).mkdir(parents=True)
        (place / "nfsd" / "v4_end_grace").write_text("Y\n")
        (place / "nfsd" / "threads").write_text("8\n")
        self.disk = Clocked(place)
        self.glance: dict[str, str] = {}
        self.servers: dict[str, dict[str, Any]] = {}
        self.disks: dict[str, str] = {}
        self.damaged: set[str] = set()
        self.open: set[str] = set()
        self.inodes = {
            one: base_in(place / "cache", one, b"", one == self.MARKED).stat().st_ino
            for one in self.IMAGES
        }
        self.disk.changed = dict.fromkeys(self.inodes.values(), 0.0)
        session = Session(auth=Token(nova.url, "token"))
        self.connection = Connection(session, None, None, 10)

    def is_gone(self, image_id: str) -> bool:
        """Glance's answer to a question for one image."""
        return image_id not in self.glance

    def happen(self, what: str, image: str, server_id: str, number: float) -> None:  # noqa: C901
        """One event."""
        if what == "time passes":
            self.disk.now += number * DAY
        elif what == "the clock is set back":
            self.disk.now -= number * DAY
        elif what == "Nova touches a base":
            self.disk.changed[self.inodes[image]] = self.disk.now
        elif what == "an image comes":
            self.glance[image] = ("active", "saving", "unlisted", "unlisted")[int(number)]
        elif what == "an image goes":
            self.glance.pop(image, None)
        elif what == "a server comes":
            status = "ACTIVE" if number < 2.5 else "RESCUE"
            spelling = (image.lower(), image.upper(), image, image)[int(number)]
            self.servers[server_id] = a_server(server_id, spelling, status)
        elif what == "a server goes":
            self.servers.pop(server_id, None)
        elif what == "a disk comes":
            self.damaged.discard(server_id)
            self.disks[server_id] = image
        elif what == "a disk is damaged":
            self.disks.pop(server_id, None)
            self.damaged.add(server_id)
        elif what == "a disk goes":
            self.damaged.discard(server_id)
            self.disks.pop(server_id, None)
        elif what == "a client opens a base":
            self.open.add(image)
        else:
            self.open.discard(image)

    def needs(self, image: str) -> bool:
        """Whether anything needs the content that the base of an image has."""
        named = {one["image"]["id"].lower() for one in self.servers.values()}
        there = self.is_known(image) and self.glance[image] != "saving"
        return there or image.lower() in named or image in self.open or image in self.disks.values()

    def is_known(self, image: str) -> bool:
        """Whether Glance can tell of an image; one that is in no listing only by its id."""
        return image in self.glance and (self.glance[image] != "unlisted" or image == self.MARKED)

    def restless(self) -> bool:
        """Whether a server may use any base."""
        return bool(self.damaged) or any(one["status"] == "RESCUE" for one in self.servers.values())

    def where(self, image: str) -> tuple[bool, bool]:
        """Whether the base of an image has its name, and whether it is retired.

        Always the same inode.
        """
        entries = (
            self.place / "cache" / f"{cache_name(image)}{suffix}" for suffix in ("", ".retired")
        )
        return tuple(  # type: ignore[return-value]
            entry.exists() and entry.stat().st_ino == self.inodes[image] for entry in entries
        )

    def clean_up(self) -> None:
        """One pass with --prune, of the real thing."""
        self.nova.servers = list(self.servers.values())
        instances = self.place / "instances"
        for server_id in self.SERVERS:
            shutil.rmtree(instances / server_id, ignore_errors=True)
            if server_id in self.disks:
                (instances / server_id).mkdir()
                (instances / server_id / "disk").write_bytes(self.headers(self.disks[server_id]))
            elif server_id in self.damaged:
                (instances / server_id).mkdir()
                (instances / server_id / "disk").write_bytes(b"QFI\xfb")
        lines = (
            f'{{ type: open, superblock: "fe:00:{self.inodes[image]}" }}\n' for image in self.open
        )
        (self.place / "nfsd" / "clients" / "1" / "states").write_text("".join(lines))
        given = options(
            self.place, prune_after=DAY, prune_unmarked=True, instances_dirs=(str(instances),)
        )
        found = look(self.disk.sources(), self.disk.entries(), given).bases
        bases = [
            base._replace(file=file)
            for base in found
            if (file := self.disk.entry(base.name + ".retired" * base.retired)) is not None
        ]
        listed = {
            image_id: status for image_id, status in self.glance.items() if status != "unlisted"
        }
        images = {image_id: Image(image_id, status=status) for image_id, status in listed.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "ln_images.prune.open_inodes", lambda: open_inodes(str(self.place / "nfsd"))
            )
            glance: Any = self
            list(clean_up(given, glance, self.disk, bases, images, self.disk.now))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The first part of a real overlay on the base of each image."""
    place = tmp_path_factory.mktemp("headers")
    made = {
        image: overlay(place, str(n), Path("/_base") / cache_name(image))
        for n, image in enumerate(World.IMAGES)
    }

    def header(image: str) -> bytes:
        return made[image].read_bytes()[:4096]

    return header


WHAT: tuple[str, ...] = (
    "time passes",
    "the clock is set back",
    "Nova touches a base",
    "an image comes",
    "an image goes",
)
WHAT += ("a server comes", "a server goes", "a disk comes", "a disk is damaged", "a disk goes")
WHAT += ("a client opens a base", "it closes it")
events = st.tuples(
    st.sampled_from(WHAT),
    st.sampled_from(World.IMAGES),
    st.sampled_from(World.SERVERS),
    st.floats(0, 3),
)
MARKED, UPPER, LOWER = World.IMAGES
# Each of these shows by itself that one kind of evidence counts, whatever the others do; in an
# empty round all go.
ALONE: tuple[list[list[tuple[Any, ...]]], ...] = (
    [[("a client opens a base", MARKED, S1, 0.0)]],
    [[("a disk comes", MARKED, S1, 0.0)]],
    [[("a server comes", LOWER, S1, 2.8)]],
    [[("a disk is damaged", MARKED, S1, 0.0)]],
    [[("an image comes", MARKED, S1, 2.0)]],
    *([[], [("a server comes", *spelt)]] for spelt in ((MARKED, S1, 0.0), (MARKED, S1, 1.0))),
    *([[], [("a server comes", *spelt)]] for spelt in ((UPPER, S1, 0.0), (LOWER, S1, 1.0))),
    [[], [("the clock is set back", MARKED, S1, 0.5), ("a disk comes", MARKED, S1, 0.0)]],
    [[], [("an image comes", MARKED, S1, 1.0), ("a disk comes", MARKED, S1, 0.0)]],
    [[], [("an image comes", MARKED, S1, 1.0), ("a client opens a base", MARKED, S1, 0.0)]],
    [[], [("the clock is set back", MARKED, S1, 3.0)], [], []],
    [
        [],
        [("the clock is set back", MARKED, S1, 2.0), ("Nova touches a base", MARKED, S1, 0.0)],
        [],
    ],
)


def with_each_alone(test: Callable[..., None]) -> Callable[..., None]:
    """The test with these among its examples."""
    for rounds in ALONE:
        test = example(rounds=rounds)(test)
    return test


@with_each_alone
@settings(max_examples=40)
@given(rounds=st.lists(st.lists(events, max_size=3), min_size=1, max_size=12))
def test_whatever_happens_a_base_that_is_needed_is_there(
    tmp_path_factory: pytest.TempPathFactory,
    headers: Callable[[str], bytes],
    rounds: list[list[tuple[Any, ...]]],
) -> None:
    """In any order of events, by any clock, with a clean-up after each few of them.

    What anything named, backed or held open is never removed, and after one pass it has its name.
    What was removed had been retired for a day, and nothing could need it. While a server may use
    any base, none is taken.
    """
    with Compute() as nova:
        world = World(tmp_path_factory.mktemp("world"), nova, headers)
        with world.disk:
            since: dict[str, float] = {}
            # On a clock that nobody sets back.
            passed = 0.0
            for happened in rounds:
                world.disk.now += DAY
                passed += DAY
                for event in happened:
                    world.happen(*event)
                before = {image: world.where(image) for image in World.IMAGES}
                world.clean_up()
                for image, (named, retired) in before.items():
                    after = world.where(image)
                    if not (named or retired):
                        continue
                    if world.needs(image):
                        assert after == (True, False)
                    elif world.restless() or world.is_known(image):
                        assert after == (named, retired)
                    elif named and after != (True, False):
                        assert after == (False, True)
                        since[image] = passed
                    elif retired and after != (False, True):
                        assert after == (False, False)
                        assert passed - since[image] >= DAY
        world.connection.session.session.close()


# The seven cases: each server, and its disks, as they were seen on a real Nova.


def test_case_1_a_server_that_names_a_deleted_snapshot(
    node: Node, nova: Compute, tmp_path: Path
) -> None:
    """Its disk is on the original (LP#1934094).

    Nova is asked how old it is, and then the server's disk decides.
    """
    original, idle = orphan(node), orphan(node)
    nova.servers = [a_server(S1, str(uuid.uuid4()))]
    stranger = f"server {S1} names image {nova.servers[0]['image']['id']}, which neither Glance nor the cache has, and"
    stranger += " may use any base: give --instances-dir with its disk"
    assert prune(node) == dict.fromkeys((original, idle), ("kept", stranger))
    nova.newest = (2, 90)
    old = "Nova is older than 26.0.0, where servers may name another image than their disk's: give --instances-dir"
    assert prune(node) == dict.fromkeys((original, idle), ("kept", f"{old} with all disks"))
    overlay(tmp_path, S2, node.cache / "x")
    with_disks = ("--instances-dir", str(tmp_path))
    unseen = f"{old} with all disks; that of server {S1} is not seen"
    assert prune(node, *with_disks) == dict.fromkeys((original, idle), ("kept", unseen))
    disk = overlay(tmp_path, S1, node.entry(original))
    assert prune(node, *with_disks) == {
        original: ("kept", f"{disk} is backed by it"),
        idle: ("retired", ""),
    }


def test_case_1_after_an_upgrade_of_nova_with_the_snapshot_still_in_the_cache(
    node: Node, nova: Compute, tmp_path: Path
) -> None:
    """The snapshot was linked, too, so its base is there.

    That it is the server's own makes its name no proof.
    """
    original = orphan(node)
    snapshots = [
        node.cloud.image("web-shelved", DATA, instance_uuid=one) for one in (S1, S2, "../x")
    ]
    assert node.run().returncode == 0
    for snapshot in snapshots:
        node.cloud.delete(snapshot)
    # The second one and the third are others' snapshots, from which servers were built.
    nova.servers = [a_server(S1, snapshots[1]), a_server(S2, snapshots[2])]
    names = {snapshots[0]: "retired", snapshots[1]: "kept", snapshots[2]: "kept"}
    assert {key: value[0] for key, value in prune(node, "--dry-run").items()} == {
        original: "retired",
        **names,
    }
    nova.servers = [a_server(S1, snapshots[0])]
    own = f"server {S1} names its own snapshot {snapshots[0]}, which Glance no longer has, and may use any base:"
    assert prune(node)[original] == ("kept", f"{own} give --instances-dir with its disk")
    disk = overlay(tmp_path, S1, node.entry(original))
    assert prune(node, "--instances-dir", str(tmp_path))[original] == (
        "kept",
        f"{disk} is backed by it",
    )
    node.entry(snapshots[0]).unlink()
    node.entry(snapshots[0]).symlink_to("x")
    assert "neither Glance nor the cache has" in prune(node)[original][1]


@pytest.mark.parametrize("host", ["compute-1", None])
def test_case_2_a_server_in_error_on_another_base(
    node: Node, nova: Compute, host: str | None
) -> None:
    """A rebuild that died on its way names the new image.

    One that never had a host has no disk, either.
    """
    gone = orphan(node)
    nova.servers = [
        a_server("s", node.cloud.image("new", DATA), "ERROR", **{"OS-EXT-SRV-ATTR:host": host})
    ]
    kept = ("kept", "server s is in ERROR and may use any base: bring it to rest")
    assert prune(node)[gone] == (kept if host else ("retired", ""))


def test_case_3_a_rescued_server_whose_state_was_reset(
    node: Node, nova: Compute, tmp_path: Path
) -> None:
    """Its rescue disk keeps the base of the rescue image, and restores it.

    Without that it is retired, and read on.
    """
    rescue = orphan(node)
    nova.servers = [a_server(S1, node.cloud.image("own", DATA))]
    disk = overlay(tmp_path, S1, node.entry(rescue), "disk.rescue")
    with node.entry(rescue).open("rb") as user:
        assert prune(node)[rescue] == ("retired", "")
        assert user.read() == DATA
    assert prune(node, "--instances-dir", str(tmp_path)) == {
        rescue: ("restored", f"{disk} is backed by it")
    }
    assert prune(node, "--instances-dir", str(tmp_path)) == {
        rescue: ("kept", f"{disk} is backed by it")
    }


@pytest.mark.usefixtures("nova")
def test_case_4_instance_disks_whose_file_system_is_not_mounted(node: Node, tmp_path: Path) -> None:
    """An empty directory protects nothing, so everything is kept."""
    gone, aside = orphan(node), retired(node)
    empty = (
        "kept",
        f"--instances-dir {tmp_path} has no directory of a server: mount its file system",
    )
    assert prune(node, "--instances-dir", str(tmp_path)) == {gone: empty, aside: empty}


def test_case_5_a_server_in_another_region(node: Node) -> None:
    """Every region in the catalog is asked.

    Where one cannot be, nothing is done, and links are made all the same.
    """
    used, idle = orphan(node), orphan(node)
    one, two = Compute(), Compute(a_server("far", used))
    with (
        one,
        two,
        in_catalog(
            node.cloud.identity(), (REGION, "public", one.url), ("RegionTwo", "public", two.url)
        ),
    ):
        two.faults = {"detail": Fault(503)}
        new = node.cloud.image("new", DATA)
        unasked = ("kept", "it could not be asked whether anything needs it")
        assert prune(node, status=75) == {used: unasked, idle: unasked, new: ("linked", "")}
        two.faults = {}
        assert prune(node) == {
            used: ("kept", "server far was built from it"),
            idle: ("retired", ""),
        }


@pytest.mark.usefixtures("nova")
def test_case_6_a_base_that_only_backs_a_disk_and_is_not_touched(
    node: Node, tmp_path: Path
) -> None:
    """No server names it, and nothing renews its ctime: its disk keeps it, and brings it back."""
    gone = orphan(node)
    assert prune(node)[gone] == ("retired", "")
    disk = overlay(tmp_path, S1, node.entry(gone))
    assert prune(node, "--instances-dir", str(tmp_path)) == {
        gone: ("restored", f"{disk} is backed by it")
    }


@pytest.mark.usefixtures("nova")
def test_case_7_what_nova_fetched_is_told_and_can_go(node: Node) -> None:
    """It is in the report of every pass, and its way out is that of the others."""
    name = node.entry(orphan(node, mark=False)).name
    assert "4.9 KiB held by 1 not linked here" in node.run("--prune", "--prune-after", "0s").stdout
    assert prune(node, "--prune-unmarked") == {name: ("retired", "")}
    assert prune(node, "--prune-unmarked") == {name: ("pruned", "")}
    assert not node.names()


@pytest.mark.usefixtures("nova")
def test_the_wrong_cloud_is_told_and_nothing_touched(node: Node) -> None:
    """Glance knows none of the images whose files are here, linked already or not: status 2."""
    gone, image = orphan(node), str(uuid.uuid4())
    (node.images / image).write_bytes(DATA)
    for mend in ("", "link"):
        if mend:
            os.link(node.images / image, node.entry(image))
        before = {path: path.stat() for path in node.cache.iterdir()}
        run = node.run("--prune", "--prune-after", "0s", "--prune-unmarked")
        assert (run.returncode, "another cloud's" in run.stderr) == (2, True)
        assert {path: path.stat() for path in node.cache.iterdir()} == before
    assert node.entry(gone).exists()


@needs_root
def test_a_base_that_cannot_be_looked_at_is_a_doubt(
    node: Node, nova: Compute, tmp_path: Path
) -> None:
    """On a damaged ext4 the base that a server names is told of by itself, and the rest of the clean-up is made."""
    image, lost = node.cloud.image("image", DATA), str(uuid.uuid4())
    with formatted(tmp_path, "mkfs.ext4", "-q") as at:
        shutil.copyfile(node.images / image, at / "images" / image)
        base_in(at / "cache", ID, DATA)
        base_in(at / "cache", lost, DATA)
        subprocess.run(["umount", at], check=True)
        clear = ["debugfs", "-w", "-R", f"clri /cache/{cache_name(lost)}", str(tmp_path / "device")]
        subprocess.run(clear, check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", tmp_path / "device", at], check=True)
        nova.servers = [a_server(S1, lost)]
        directories = {"LN_IMAGES_IMAGES_DIR": f"{at}/images", "LN_IMAGES_CACHE_DIR": f"{at}/cache"}
        found = prune(node, status=1, **directories)
    assert found[cache_name(lost)] == ("failed", "Structure needs cleaning")
    assert (found[ID][0], found[ID][1].startswith(f"server {S1} names image {lost}")) == (
        "kept",
        True,
    )


def test_what_glance_has_is_restored_also_while_nova_cannot_be_asked(
    node: Node, nova: Compute
) -> None:
    """A fault keeps what might go, and holds nothing back that is needed."""
    gone, back, here = retired(node), node.cloud.image("back", DATA), node.cloud.image("here", DATA)
    base_in(node.cache, back, DATA).rename(set_aside(node, back))
    (node.images / back).unlink()
    nova.faults = {"detail": Fault(503)}
    found = prune(node, status=75)
    assert found[gone] == ("kept", "it could not be asked whether anything needs it")
    assert node.names() == {
        set_aside(node, gone).name,
        node.entry(back).name,
        node.entry(here).name,
    }


@pytest.mark.parametrize("status", ["deactivated", "pending_delete", "killed", "queued"])
@pytest.mark.usefixtures("nova")
def test_an_image_that_glance_knows_is_kept(node: Node, status: str) -> None:
    """A file that is gone is not an image that is gone.

    Whatever the status, Glance's word keeps the base.
    """
    image = node.cloud.image("image", DATA)
    node.cloud.set_status(image, status)
    (node.images / image).rename(node.entry(image))
    os.setxattr(node.entry(image), MARK, image.encode())
    images = json.loads(node.run("--prune", "--prune-after", "0s", "--format", "json").stdout)[
        "images"
    ]
    assert [one["id"] for one in images if one["outcome"] == "kept"] == [image]
    assert node.entry(image).exists()


def test_a_404_of_a_gateway_alone_is_not_believed(node: Node, nova: Compute, front: Front) -> None:
    """An image that is listed is there, whatever comes back when it is asked for by itself."""
    node.cloud.image("here", DATA)
    image = node.cloud.image("image", DATA)
    (node.images / image).rename(node.entry(image))
    os.setxattr(node.entry(image), MARK, image.encode())
    _, variables = front(lambda path: Answer(404) if path.endswith(image) else path)
    run = node.run("--prune", "--prune-after", "0s", "--format", "json", **variables)
    assert "Glance has the image: status active" in run.stdout
    assert not nova.asked


def test_a_plain_member_prunes_nothing(node: Node, nova: Compute) -> None:
    """To a member Glance answers 404 for other projects' images, too.

    Only an administrator's token may prune.
    """
    gone = orphan(node)
    node.cloud.add_user("pruner", "pruners", "member")
    run = node.run(
        "--prune", "--prune-after", "0s", "-q", **node.cloud.environment("pruner", "pruners")
    )
    assert (run.returncode, "needs a credential with the role admin" in run.stderr) == (2, True)
    assert node.entry(gone).exists()
    assert not nova.asked


def test_while_nova_is_asked_other_runs_link(node: Node, nova: Compute) -> None:
    """A prune that waits for Nova does not hold the lock: the next pass links what is new."""
    gone = orphan(node)
    nova.faults["detail?"] = Fault(hang=True)
    command = [str(COMMAND), "--prune", "--prune-after", "0s", "--timeout", "60"]
    with subprocess.Popen(command, env=node.environment(), stdout=subprocess.DEVNULL) as pruning:
        try:
            wait_until(lambda: nova.asked, "a question to Nova")
            new = node.cloud.image("new", DATA)
            assert node.run().returncode == 0
            assert node.linked(new)
            assert node.entry(gone).exists()
        finally:
            pruning.kill()


class Gate(list[dict[str, Any]]):
    """Servers that Nova tells of only when it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.open.wait(60)
        return super().__iter__()


def test_two_clean_ups_at_once_do_all_once(node: Node, nova: Compute) -> None:
    """Both have judged the same before either acts.

    Each base is retired, restored or removed by one of them.
    """
    node.cloud.image("image", DATA)
    assert node.run().returncode == 0
    needs, goes, ends = ([make(node) for _ in range(20)] for make in (retired, orphan, retired))
    gate = Gate()
    gate.extend(a_server(f"s{n}", image) for n, image in enumerate(needs))
    nova.servers, nova.max_limit = gate, 1000
    command = [str(COMMAND), "--prune", "--prune-after", "0s", "--format", "json"]
    runs = []
    try:
        for number in (1, 2):
            runs.append(subprocess.Popen(command, env=node.environment(), stdout=subprocess.PIPE))
            # Only the pass before it needs the lock for the whole of its time.
            wait_until(lambda number=number: len(nova.asked) == number, "a question to Nova")
        gate.open.set()
        documents = [json.loads(run.communicate(timeout=60)[0]) for run in runs]
    finally:
        gate.open.set()
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0]
    told = [{one["id"]: one["outcome"] for one in document["images"]} for document in documents]
    for images, outcome in ((needs, "restored"), (goes, "retired"), (ends, "pruned")):
        for image in images:
            assert sorted(one[image] for one in told) == sorted(["kept", outcome])
    left = {node.entry(image).name for image in needs} | {
        set_aside(node, image).name for image in goes
    }
    assert node.names() - left == {node.entry(path.name).name for path in node.images.iterdir()}


def test_the_credential_of_the_guide_suffices(node: Node, nova: Compute) -> None:
    """With the access rules of docs/production.md Glance and Nova are asked all that a clean-up asks, and no more."""
    node.cloud.image("stays", DATA)
    gone = orphan(node)
    user = node.cloud.add_user("least", "least", "admin")
    rules = json.loads(block("access rules"))
    variables: dict[str, str | None] = dict(NO_OPENRC)
    variables |= node.cloud.application_credential(
        user, roles=[{"name": "admin"}], access_rules=rules
    )
    assert node.run("--prune", "--prune-after", "0s", **variables).returncode == 0
    assert set_aside(node, gone).exists()
    allowed = {rule["path"] for rule in rules if rule["service"] == "compute"}
    assert {f"/v2.1{asked.path}" for asked in nova.asked} == allowed
