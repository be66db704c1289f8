"""The clean-up: every condition alone keeps an entry, and what anything refers to is never removed."""

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_images.disk import MARK, Disk, backing_names
from ln_images.model import Evidence, File, Look, Outcome, Server, Verdict
from ln_images.plan import age, cache_name, judge_orphan, orphans

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER = "a0000000-0000-4000-8000-000000000000"
NAME = cache_name(ID)
DAY = 86400.0
ORPHAN = File(1, 11, stat.S_IFREG | 0o644, links=1, uid=0, gid=0, size=1000, changed=0.0, mark=ID)


def server(**changes: object) -> Server:
    """A server that runs from another image."""
    values = {"id": "s1", "status": "ACTIVE", "task_state": "", "uses": frozenset({OTHER})} | changes
    return Server(**values)  # type: ignore[arg-type]


def evidence(**known: object) -> Evidence:
    """Two days after the last use, with a day to wait and nothing that speaks for the entry but ``known``."""
    return Evidence(**({"now": 2 * DAY, "prune_after": DAY} | known))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param(NAME, ORPHAN._replace(links=2), id="Glance's own name is still there"),
        pytest.param(NAME, ORPHAN._replace(mark=None), id="no mark"),
        pytest.param(NAME, ORPHAN._replace(mark=OTHER), id="the mark of another image"),
        pytest.param(NAME, ORPHAN._replace(mark=ID.upper()), id="the mark of another spelling"),
        pytest.param(cache_name("x"), ORPHAN._replace(mark="x"), id="a mark that is no id"),
        pytest.param(NAME.upper(), ORPHAN, id="upper case"),
        pytest.param(f"{NAME}.part", ORPHAN, id="a download of Nova's"),
        pytest.param(f"{NAME}.converted", ORPHAN, id="a conversion of Nova's"),
        pytest.param(f"{NAME}_20", ORPHAN, id="a resized base of Nova's"),
        pytest.param("ephemeral_20_40d1d2c", ORPHAN, id="an ephemeral base of Nova's"),
        pytest.param("swap_512", ORPHAN, id="a swap base of Nova's"),
    ],
)
def test_what_is_no_orphan_is_not_even_judged(name: str, file: File) -> None:
    """Only a marked entry under its own image's name, whose last link it is, can ever be removed."""
    assert orphans(Look({}, {name: file})) == {}
    assert orphans(Look({}, {NAME: ORPHAN})) == {ID: ORPHAN}


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"now": DAY - 1}, "in use or released 23 h 59 min ago, kept for 1 d"),
        ({"now": -5.0}, "in use or released 0 s ago, kept for 1 d"),
        ({"images": {ID: "active"}}, "Glance has the image: status active"),
        ({"images": {ID: "deactivated"}}, "Glance has the image: status deactivated"),
        ({"images": {ID: "pending_delete"}}, "Glance has the image: status pending_delete"),
        ({"servers": [server(uses=frozenset({ID}))]}, "server s1 was built from it"),
        ({"servers": [server(uses=frozenset({OTHER, ID}))]}, "server s1 was built from it"),
        ({"servers": [server(status="SOFT_DELETED", uses=frozenset({ID}))]}, "server s1 was built from it"),
        ({"servers": [server(status="RESCUE")]}, "server s1 is in RESCUE and may use any base"),
        ({"servers": [server(status="REBUILD")]}, "server s1 is in REBUILD and may use any base"),
        (
            {"servers": [server(task_state="rebuild_block_device_mapping")]},
            "server s1 is in rebuild_block_device_mapping and may use any base",
        ),
        ({"servers": [server(task_state="rebuilding")]}, "server s1 is in rebuilding and may use any base"),
        ({"servers": [server(task_state="rebuild_spawning")]}, "server s1 is in rebuild_spawning and may use any base"),
        ({"servers": [server(task_state="unshelving")]}, "server s1 is in unshelving and may use any base"),
        ({"servers": [server(task_state="rescuing")]}, "server s1 is in rescuing and may use any base"),
        ({"servers": [server(task_state="unrescuing")]}, "server s1 is in unrescuing and may use any base"),
        ({"backed": {NAME: "/i/s1/disk"}}, "/i/s1/disk is backed by it"),
        ({"unreadable": "/i/s1/disk"}, "what /i/s1/disk is backed by cannot be told"),
    ],
)
def test_each_condition_alone_keeps_an_entry(known: dict[str, object], reason: str) -> None:
    """Whatever single thing speaks for an entry, it is kept, and the report says which."""
    assert judge_orphan(ID, ORPHAN, evidence(**known)) == Verdict(Outcome.KEPT, reason)


def test_what_nothing_needs_is_pruned() -> None:
    """Where everything was asked and nothing speaks for the entry, it goes; servers at rest do not matter."""
    at_rest = [server(), server(status="SHUTOFF"), server(status="SHELVED_OFFLOADED"), server(uses=frozenset())]
    known = evidence(images={OTHER: "active"}, servers=at_rest, backed={cache_name(OTHER): "/i/s1/disk"})
    assert judge_orphan(ID, ORPHAN, known) == Verdict(Outcome.PRUNED, "unused for 2 d")


def test_ids_are_compared_without_regard_to_case() -> None:
    """A server names its image in another case than Glance's id: it refers to it all the same."""
    orphan = ORPHAN._replace(mark=ID.upper())
    assert judge_orphan(ID.upper(), orphan, evidence(servers=[server(uses=frozenset({ID}))])).outcome is Outcome.KEPT


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-3, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h"), (90061, "1 d 1 h"), (86400 * 400, "400 d")],
)
def test_ages_are_said_in_two_units(seconds: float, text: str) -> None:
    """A duration is short and readable."""
    assert age(seconds) == text


ids = st.sampled_from([f"{n}0000000-0000-4000-8000-00000000000a" for n in "123456"])
worlds_servers = st.lists(
    st.builds(
        Server,
        id=st.uuids().map(str),
        status=st.sampled_from(["ACTIVE", "SHELVED_OFFLOADED", "SOFT_DELETED", "RESCUE", "ERROR"]),
        task_state=st.sampled_from(["", "spawning", "unshelving", "powering-off"]),
        uses=st.frozensets(ids, max_size=3),
    ),
    max_size=5,
)


@given(
    found=st.dictionaries(ids, st.floats(0, 3 * DAY)),
    images=st.dictionaries(ids, st.sampled_from(["active", "queued", "deactivated"])),
    servers=worlds_servers,
    backed=st.dictionaries(ids.map(cache_name), st.just("/i/s/disk")),
)
def test_what_anything_refers_to_is_never_pruned(
    found: dict[str, float], images: dict[str, str], servers: list[Server], backed: dict[str, str]
) -> None:
    """In any world: no entry of an image that Glance knows, a server uses or a disk is backed by is removed."""
    known = evidence(now=3 * DAY, images=images, servers=servers, backed=backed)
    entries = {image_id: ORPHAN._replace(changed=changed, mark=image_id) for image_id, changed in found.items()}
    gone = {i for i, file in entries.items() if judge_orphan(i, file, known).outcome is Outcome.PRUNED}
    assert not gone & images.keys()
    assert not any(gone & server.uses for server in servers)
    assert not {cache_name(image_id) for image_id in gone} & backed.keys()
    assert all(3 * DAY - found[image_id] >= DAY for image_id in gone)
    assert not gone or not any(server.status == "RESCUE" or server.task_state == "unshelving" for server in servers)
    left = {image_id: file for image_id, file in entries.items() if image_id not in gone}
    assert not any(judge_orphan(i, file, known).outcome is Outcome.PRUNED for i, file in left.items())


def orphan_in(tmp_path: Path) -> tuple[Disk, Path, File]:
    """A cache with one real orphan, as the disk finds it."""
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    cache.mkdir()
    entry = cache / NAME
    entry.write_bytes(b"base")
    os.setxattr(entry, MARK, ID.encode())
    disk = Disk(str(images), str(cache))
    return disk, entry, orphans(disk.look())[ID]


def test_an_orphan_is_found_and_removed(tmp_path: Path) -> None:
    """The disk alone tells an orphan, and its entry is removed while it is exactly that."""
    disk, entry, found = orphan_in(tmp_path)
    with disk:
        assert disk.remove(ID, found) is None
    assert not entry.exists()


@pytest.mark.parametrize(
    "happen",
    [
        pytest.param(lambda entry: os.utime(entry), id="Nova uses it: its ctime is renewed"),
        pytest.param(lambda entry: os.link(entry, entry.with_name("x")), id="it has another link"),
        pytest.param(lambda entry: entry.rename(entry.with_name("x")), id="it is gone"),
        pytest.param(lambda entry: (entry.unlink(), entry.write_bytes(b"base")), id="it is another file"),
        pytest.param(lambda entry: os.removexattr(entry, MARK), id="its mark is gone"),
    ],
)
def test_an_orphan_that_changes_in_the_last_moment_is_kept(tmp_path: Path, happen: Callable[[Path], object]) -> None:
    """The entry is looked at once more immediately before it is removed."""
    disk, entry, found = orphan_in(tmp_path)
    happen(entry)
    before = sorted(entry.parent.iterdir())
    with disk:
        assert disk.remove(ID, found) == Verdict(Outcome.KEPT, "it has changed since it was looked at")
    assert sorted(entry.parent.iterdir()) == before


def qemu_img(*arguments: object) -> None:
    """Makes a real disk."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    """A directory of Nova's with one server, whose disk is a real overlay of a base."""
    base = tmp_path / NAME
    qemu_img("create", "-f", "raw", base, "1M")
    (tmp_path / "instances" / "s1").mkdir(parents=True)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "instances" / "s1" / "disk")
    (tmp_path / "instances" / "s1" / "console.log").write_text(cache_name(OTHER))
    (tmp_path / "instances" / "compute_nodes").write_text("{}")
    return tmp_path / "instances"


def test_the_base_of_a_disk_is_found(instances: Path) -> None:
    """A real qcow2 overlay names its base by its path; other files beside it do not count."""
    assert backing_names([str(instances)]) == ({NAME: f"{instances}/s1/disk"}, "")
    assert backing_names([]) == ({}, "")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda s1: qemu_img("create", "-f", "qcow2", "-b", s1 / "disk", "-F", "qcow2", s1 / "disk.swap"),
            True,
            id="a chain",
        ),
        pytest.param(lambda s1: qemu_img("create", "-f", "raw", s1 / "disk.eph0", "1M"), True, id="a raw disk"),
        pytest.param(lambda s1: (s1 / "disk.info").write_text("{}"), True, id="a small file"),
        pytest.param(lambda s1: (s1 / "disk.tmp").write_bytes(b""), True, id="an empty file"),
        pytest.param(lambda s1: os.mkfifo(s1 / "disk.fifo"), True, id="a FIFO"),
        pytest.param(lambda s1: (s1 / "disk.d").mkdir(), True, id="a directory"),
        pytest.param(lambda s1: (s1 / "disk.short").write_bytes(b"QFI\xfb\0\0\0\3"), False, id="a truncated header"),
        pytest.param(
            lambda s1: (s1 / "disk.cut").write_bytes((s1 / "disk").read_bytes()[:30]), False, id="a truncated name"
        ),
        pytest.param(
            lambda s1: (s1 / "disk.wild").write_bytes(b"QFI\xfb\0\0\0\3" + b"\xff" * 12), False, id="a wild header"
        ),
        pytest.param(lambda s1: (s1 / "disk.link").symlink_to(s1 / "disk"), False, id="a symbolic link"),
        pytest.param(lambda s1: (s1.parent / "s2").symlink_to(s1), False, id="a linked server"),
    ],
)
def test_what_a_disk_is_backed_by_is_told_or_named(instances: Path, make: Callable[[Path], None], told: bool) -> None:
    """Beside the real overlay: what is no disk is passed over, and what cannot be told is named, never followed."""
    before = set(instances.rglob("*"))
    make(instances / "s1")
    (added,) = set(instances.rglob("*")) - before
    assert backing_names([str(instances)]) == ({NAME: f"{instances}/s1/disk"}, "" if told else str(added))


def test_a_base_named_by_a_json_backing_file_is_found(instances: Path) -> None:
    """QEMU also writes backing files as json: with the path inside."""
    base = instances.parent / NAME
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{base}"}}}}'
    qemu_img("create", "-f", "qcow2", "-b", name, "-F", "raw", instances / "s1" / "disk.json")
    (instances / "s1" / "disk").unlink()
    assert backing_names([str(instances)]) == ({NAME: f"{instances}/s1/disk.json"}, "")
