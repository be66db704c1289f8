"""The clean-up: every condition alone keeps an entry, and what anything refers to is never removed."""

import json
import os
import re
import stat
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keystoneauth1.exceptions import NotFound

from cloud import REGION, wait_until
from compute import Compute, Fault
from compute import server as a_server
from conftest import COMMAND, NO_OPENRC, OWNER, Node, block
from faulty import Answer, Faulty
from ln_images.disk import MARK, Disk
from ln_images.instances import backing_names
from ln_images.model import Evidence, File, Outcome, Server, Verdict, Wanted
from ln_images.plan import cache_name, look
from ln_images.prune import age, judge_orphan

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER = "a0000000-0000-4000-8000-000000000000"
NAME = cache_name(ID)
DAY = 86400.0
WANTED = Wanted(0, 0, 0o644, frozenset({"raw"}), marks=True)
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
    assert look({}, [(name, file)], WANTED).orphans == {}
    assert look({}, [(NAME, ORPHAN)], WANTED).orphans == {ID: ORPHAN}


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
        ({"servers": [server(task_state="resize_finish")]}, "server s1 is in resize_finish and may use any base"),
        (
            {"servers": [server(status="SHELVED_OFFLOADED", task_state="spawning")]},
            "server s1 is in spawning and may use any base",
        ),
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
    at_rest = [
        server(task_state="spawning"),
        server(status="SHUTOFF"),
        server(status="SHELVED_OFFLOADED"),
        server(uses=frozenset()),
    ]
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
    return disk, entry, look(disk.sources(), disk.entries(), WANTED).orphans[ID]


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


DATA = b"\1" * 5000
AGE = re.compile(r"; unused for \d+ s$")


@pytest.fixture
def nova(node: Node) -> Iterator[Compute]:
    """A compute service in the real catalog, with no servers yet, which shows three at a time."""
    identity = node.cloud.identity()
    service = identity.post("/services", json={"service": {"type": "compute"}}).json()["service"]["id"]
    with Compute(max_limit=3) as serving:
        endpoint = {"service_id": service, "interface": "public", "region_id": REGION, "url": serving.url}
        identity.post("/endpoints", json={"endpoint": endpoint})
        yield serving
    identity.delete(f"/services/{service}")


def linked_and_deleted(node: Node) -> str:
    """An image that was linked and then deleted from Glance."""
    image = node.cloud.image("deleted", DATA)
    assert node.outcomes()[image] == ("linked", "")
    node.cloud.delete(image)
    return image


def deleted_image(node: Node) -> str:
    """What is left of such an image, made by hand in a moment."""
    image = str(uuid.uuid4())
    entry = node.entry(image)
    entry.write_bytes(DATA)
    os.chown(entry, *OWNER)
    entry.chmod(0o644)
    os.setxattr(entry, MARK, image.encode())
    return image


def test_what_is_left_of_a_deleted_image(node: Node) -> None:
    """The tests here begin with what linking and deleting leave: one file with one name, Glance's answer a 404."""
    for image in (linked_and_deleted(node), deleted_image(node)):
        status = node.entry(image).lstat()
        assert (status.st_uid, status.st_gid) == OWNER
        assert (stat.S_IMODE(status.st_mode), status.st_nlink, status.st_size) == (0o644, 1, len(DATA))
        assert {name: os.getxattr(node.entry(image), name) for name in os.listxattr(node.entry(image))} == {
            MARK: image.encode()
        }
        assert not (node.images / image).exists()
        with pytest.raises(NotFound):
            node.cloud.image_api().get(f"/images/{image}")


def prune(node: Node, *arguments: str, status: int = 0, after: str = "0") -> dict[str, tuple[str, str]]:
    """Runs a pass that prunes what has not been used for ``after``; the ages in the reasons are left out."""
    outcomes = node.outcomes("--prune", "--prune-after", after, *arguments, status=status)
    return {image: (outcome, AGE.sub("", reason)) for image, (outcome, reason) in outcomes.items()}


def test_an_image_that_nothing_needs_is_pruned_and_a_second_prune_finds_nothing(node: Node, nova: Compute) -> None:
    """Linked first, then pruned: the entry of a deleted image goes, every other one stays."""
    gone, stays = linked_and_deleted(node), node.cloud.image("stays", DATA)
    nova.servers = [a_server(f"s{n}", stays) for n in range(7)]
    outcomes = prune(node)
    assert outcomes[stays] == ("linked", "")
    assert outcomes[gone][0] == "pruned"
    assert node.names() == {node.entry(stays).name}
    assert prune(node) == {stays: ("present", "")}


def test_a_dry_run_asks_everything_and_removes_nothing(node: Node, nova: Compute) -> None:
    """--dry-run --prune reports what would be pruned, and how many bytes that would free."""
    gone = deleted_image(node)
    run = node.run("--dry-run", "--prune", "--prune-after", "0")
    assert "dry run: 1 pruned, 4.9 KiB freed" in run.stdout
    assert nova.asked
    assert node.entry(gone).exists()


def test_what_orphans_hold_is_told_without_prune(node: Node) -> None:
    """The disk alone tells how much the links of deleted images hold, in every pass."""
    gone = linked_and_deleted(node)
    run = node.run()
    assert ", 4.9 KiB held by 1 deleted image, " in run.stdout
    assert node.entry(gone).exists()


def test_the_report_tells_the_age_of_what_is_kept(node: Node, nova: Compute) -> None:
    """Each orphan is a row with its id, its size, its outcome, the reason and its age."""
    gone = deleted_image(node)
    nova.servers = [a_server("s", gone)]
    row = node.run("--prune", "--prune-after", "0").stdout.splitlines()[1]
    assert re.fullmatch(
        rf"-     {gone[:8]}  -       4\.9 KiB  kept     server s was built from it; unused for \d+ s", row
    )


def test_a_young_orphan_is_kept_and_nothing_is_asked(node: Node, nova: Compute) -> None:
    """By default an entry stays for a day after its last use, and Nova is not bothered for it."""
    gone = deleted_image(node)
    outcome, reason = node.outcomes("--prune")[gone]
    assert (outcome, reason.endswith("ago, kept for 1 d")) == ("kept", True)
    assert not nova.asked


def test_the_credential_of_the_readme_suffices(node: Node, nova: Compute) -> None:
    """With the rules that the README gives, Glance and Nova are asked all that pruning asks them."""
    gone = linked_and_deleted(node)
    user = node.cloud.add_user("least", "least", "admin")
    rules = json.loads(block("access rules"))
    openrc = node.cloud.application_credential(user, roles=[{"name": "admin"}], access_rules=rules)
    run = node.run("--prune", "--prune-after", "0", **{**NO_OPENRC, **openrc})
    assert (run.returncode, run.stderr) == (0, "")
    assert not node.entry(gone).exists()
    allowed = {rule["path"] for rule in rules if rule["service"] == "compute"}
    assert {f"/v2.1{asked.path}" for asked in nova.asked} == allowed


USES = {
    "image": lambda image: a_server("s", image),
    "image in upper case": lambda image: a_server("s", image.upper()),
    "soft-deleted": lambda image: a_server("s", image, status="SOFT_DELETED"),
    "shelved": lambda image: a_server("s", image, status="SHELVED_OFFLOADED"),
    "kernel": lambda image: a_server("s", "", **{"OS-EXT-SRV-ATTR:kernel_id": image}),
    "ramdisk": lambda image: a_server("s", "", **{"OS-EXT-SRV-ATTR:ramdisk_id": image}),
}


@pytest.mark.parametrize(("use", "before"), [("image", 0), ("image", 3), *((use, 7) for use in USES)])
def test_a_server_on_any_page_keeps_its_base(node: Node, nova: Compute, use: str, before: int) -> None:
    """Whatever a server uses an image for, and on whichever page of Nova's list it is, the entry is kept."""
    gone = deleted_image(node)
    nova.servers = [a_server(f"v{n}", "") for n in range(before)] + [USES[use](gone)]
    assert prune(node)[gone] == ("kept", "server s was built from it")
    assert node.entry(gone).exists()


@pytest.mark.parametrize("changes", [{"status": "RESCUE"}, {"status": "REBUILD"}, {"task": "rebuild_spawning"}])
def test_a_server_between_images_keeps_everything(node: Node, nova: Compute, changes: dict[str, str]) -> None:
    """While a server is rescued, rebuilt or unshelved, nothing is pruned, and the report says which server."""
    gone = deleted_image(node)
    nova.servers = [a_server("odd", "", **changes)]
    outcome, reason = prune(node)[gone]
    assert (outcome, "server odd is in " in reason) == ("kept", True)


def kept_with_fault(node: Node, image: str, *arguments: str, status: int = 75, **variables: str) -> str:
    """Runs a prune that cannot be made: the new image is linked, the orphan kept. Returns the one line of error."""
    new = node.cloud.image("new", DATA)
    run = node.run("--prune", "--prune-after", "0", "--format", "json", *arguments, **variables)
    assert run.returncode == status, run.stderr
    outcomes = {one["id"]: one["outcome"] for one in json.loads(run.stdout)["images"]}
    assert outcomes == {new: "linked", image: "kept"}
    assert node.linked(new)
    assert node.entry(image).exists()
    (line,) = run.stderr.splitlines()
    return line


def test_while_nova_is_asked_other_runs_link(node: Node, nova: Compute) -> None:
    """A prune that waits for Nova does not hold the lock: the next pass links what is new."""
    gone = deleted_image(node)
    nova.faults["detail?"] = Fault(hang=True)
    command = [str(COMMAND), "--prune", "--prune-after", "0", "--timeout", "20"]
    with subprocess.Popen(command, env=node.environment(), stdout=subprocess.DEVNULL) as pruning:
        try:
            wait_until(lambda: nova.asked, "a question to Nova")
            new = node.cloud.image("new", DATA)
            assert node.run().returncode == 0
            assert node.linked(new)
            assert node.entry(gone).exists()
        finally:
            pruning.kill()


@pytest.mark.parametrize("with_server", [True, False])
def test_a_cell_that_is_down_keeps_everything(node: Node, nova: Compute, with_server: bool) -> None:
    """Its servers are left out of the paged list; the first answer and the services show that they exist."""
    gone = deleted_image(node)
    nova.servers = [a_server("far", gone)] * with_server
    nova.cell_down("far")
    assert "does not see all of its cells" in kept_with_fault(node, gone)


@pytest.mark.parametrize(
    ("request_of", "fault"),
    [
        *(("detail?", Fault(status, b"{}")) for status in (500, 404, 406, 403)),
        *(("detail?", Fault(200, body)) for body in (b"rubbish", b"[]", b'{"servers": null}')),
        ("os-services", Fault(503)),
        ("soft_deleted", Fault(503)),
        ("marker=", Fault(503)),
        ("marker=", Fault()),
    ],
)
def test_a_nova_that_answers_badly_keeps_everything(node: Node, nova: Compute, request_of: str, fault: Fault) -> None:
    """Whichever of its requests fails, the page after the first included, nothing is pruned and links are made."""
    gone = deleted_image(node)
    nova.servers = [a_server(f"s{n}") for n in range(5)]
    nova.faults = {request_of: fault}
    assert "Nova" in kept_with_fault(node, gone, status=2 if fault.status == 403 else 75)


def test_a_nova_that_hangs_keeps_everything(node: Node, nova: Compute) -> None:
    """--timeout holds for Nova, too."""
    gone = deleted_image(node)
    nova.faults = {"detail": Fault(hang=True)}
    assert "timed out" in kept_with_fault(node, gone, "--timeout", "5")


def test_a_token_that_nova_takes_for_less_than_an_administrators_keeps_everything(node: Node, nova: Compute) -> None:
    """Where a policy lets it list all servers and yet drops its filters, the soft-deleted are missing."""
    gone = deleted_image(node)
    nova.servers, nova.all_filters = [a_server("s"), a_server("gone", gone, "SOFT_DELETED")], False
    assert "less than an administrator" in kept_with_fault(node, gone, status=2)


def test_a_cell_that_goes_down_while_servers_are_listed_keeps_everything(node: Node, nova: Compute) -> None:
    """The services are asked for last: a server that only the lost page would have shown is not missed."""
    gone = deleted_image(node)
    nova.servers = [*(a_server(f"s{n}") for n in range(4)), a_server("far", gone)]
    nova.cell_down("far")
    assert "does not see all of its cells" in kept_with_fault(node, gone)
    assert [asked.path for asked in nova.asked][-1] == "/os-services"


def test_a_server_that_is_listed_once_and_then_not_keeps_everything(node: Node, nova: Compute) -> None:
    """What was in the first answer must be in the whole list."""
    gone = deleted_image(node)
    nova.servers = [a_server("s", "")]
    nova.faults = {"soft_deleted": Fault(200, b'{"servers": []}')}
    assert "server s once and then not" in kept_with_fault(node, gone)


def test_a_cloud_without_nova_keeps_everything(node: Node) -> None:
    """Without a compute service in the catalog nothing is pruned, and the error says so."""
    assert "no compute service" in kept_with_fault(node, deleted_image(node), status=2)


def test_a_plain_member_prunes_nothing(node: Node, nova: Compute) -> None:
    """To a member Glance answers 404 for other projects' images, too: only an administrator's token may prune."""
    gone = linked_and_deleted(node)
    node.cloud.add_user("pruner", "pruners", "member")
    run = node.run("--prune", "--prune-after", "0", "-q", **node.cloud.environment("pruner", "pruners"))
    assert run.returncode == 2
    assert "needs a credential with the role admin" in run.stderr
    assert node.entry(gone).exists()
    assert not nova.asked


@pytest.mark.parametrize("status", ["queued", "deactivated", "pending_delete", "killed"])
@pytest.mark.usefixtures("nova")
def test_an_image_that_glance_knows_is_kept(node: Node, status: str) -> None:
    """A file that is gone is not an image that is gone: whatever the status, Glance's word keeps the entry."""
    image = node.cloud.image("image", DATA)
    node.outcomes()
    node.cloud.set_status(image, status)
    (node.images / image).unlink()
    run = json.loads(node.run("--prune", "--prune-after", "0", "--format", "json").stdout)
    kept = [one for one in run["images"] if one["outcome"] == "kept"]
    assert [(one["id"], AGE.sub("", one["reason"])) for one in kept] == [
        (image, f"Glance has the image: status {status}")
    ]
    assert node.entry(image).exists()


def test_a_404_of_a_gateway_alone_is_not_believed(node: Node, nova: Compute) -> None:
    """An image that is listed is there, whatever comes back when it is asked for by itself."""
    image = node.cloud.image("image", DATA)
    node.outcomes()
    (node.images / image).unlink()
    identity = node.cloud.identity()
    service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
    with Faulty(node.cloud.glance, lambda path: Answer(404) if path.endswith(image) else path) as gateway:
        identity.put("/regions/Gateway", json={"region": {}})
        endpoint = {"service_id": service, "interface": "public", "region_id": "Gateway", "url": gateway.url}
        identity.post("/endpoints", json={"endpoint": endpoint})
        run = node.run("--prune", "--prune-after", "0", "--format", "json", OS_REGION_NAME="Gateway")
    (kept,) = json.loads(run.stdout)["images"]
    assert (kept["outcome"], AGE.sub("", kept["reason"])) == ("kept", "Glance has the image: status active")
    assert not nova.asked


@pytest.mark.usefixtures("nova")
def test_an_instance_disk_keeps_its_base(node: Node, tmp_path: Path) -> None:
    """With --instances-dir a real overlay keeps its base, also one that no server names (LP#1732428)."""
    gone, other = deleted_image(node), deleted_image(node)
    server = tmp_path / "instances" / "s1"
    server.mkdir(parents=True)
    qemu_img("create", "-f", "qcow2", "-b", node.entry(gone), "-F", "raw", server / "disk")
    outcomes = prune(node, "--instances-dir", str(server.parent))
    assert outcomes[gone] == ("kept", f"{server}/disk is backed by it")
    assert outcomes[other][0] == "pruned"


@pytest.mark.usefixtures("nova")
def test_novas_own_files_are_never_pruned(node: Node) -> None:
    """Whatever else lies in the cache stays, however old it is."""
    name = cache_name(ID)
    own = [name, f"{name}.part", f"{name}.converted", f"{name}_20", "ephemeral_20_40d1d2c", "swap_512"]
    for path in own:
        (node.cache / path).write_bytes(b"nova")
    assert prune(node) == {}
    assert node.names() == set(own)


@pytest.mark.parametrize("duration", ["", "x", "-1", "1w", "1.5h", "h", "1 h", "99999999999s"])
def test_what_is_no_duration_is_refused(node: Node, duration: str) -> None:
    """--prune-after takes seconds, or a whole number with s, m, h or d."""
    run = node.run("--prune-after", duration)
    assert run.returncode == 2
    assert "--prune-after" in run.stderr


@pytest.mark.parametrize("duration", ["86400", "86400s", "1440m", "24h", "1d"])
@pytest.mark.usefixtures("nova")
def test_durations_are_understood(node: Node, duration: str) -> None:
    """Plain seconds and each unit say the same day."""
    gone = deleted_image(node)
    assert prune(node, after=duration)[gone][1].endswith("kept for 1 d")
