"""``ln-images-prune`` as users run it: real Keystone, Glance and files, and a fake Nova."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ln_images.model import Base, Command, Outcome, Reason, Verdict, cache_name
from ln_images.prune.bases import carry_out
from ln_images.prune.rules import Action, Decision
from ln_images.scan import scan
from ln_images.store import IMAGE_ID_MARK, UNUSED_SINCE_MARK, Store, read_marks
from support.bases import make_base, write_report
from support.cloud import REGION, wait_until
from support.compute import Compute, Fault, in_catalog
from support.mounts import bound
from support.node import NO_OPENRC, UNCOVERED, Node, executable, needs_root

DATA = b"\1" * 5000
ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
NAME = cache_name(ID)
HOSTS = ("compute-1", "compute-2")


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Return the directory of the reports, which both hosts have written just now."""
    directory = tmp_path / "reports"
    for host in HOSTS:
        write_report(directory, host)
    return directory


def prune(
    node: Node, reports: Path, *arguments: str, status: int = 0, **variables: str | None
) -> dict[str, tuple[str, str]]:
    """Run the clean-up with ``--after 0s``. Return outcome and code of each base, by cache name."""
    document = run(node, reports, *arguments, status=status, **variables)
    return {
        each["cache_name"]: (each["outcome"], each["reason_code"]) for each in document["images"]
    }


def run(
    node: Node, reports: Path, *arguments: str, status: int = 0, **variables: str | None
) -> dict[str, Any]:
    """Run the clean-up with ``--after 0s``, and return its JSON report."""
    options = ("--after", "0s", "--reports-dir", str(reports))
    return node.report(*options, *arguments, command=Command.PRUNE, status=status, **variables)


def stderr(node: Node, reports: Path, *arguments: str, status: int, **variables: str | None) -> str:
    """Run the clean-up, which must end with ``status``, and return what it prints on stderr."""
    options = ("--after", "0s", "--reports-dir", str(reports), *arguments)
    result = node.run(*options, command=Command.PRUNE, **variables)
    assert result.returncode == status, result.stderr
    return result.stderr


def report_all(reports: Path, **bases: list[str]) -> None:
    """Let both hosts report anew: ``compute_1=[...]`` are the bases that it uses."""
    # A report must be begun after the mark.
    time.sleep(0.01)
    for host in HOSTS:
        write_report(reports, host, *bases.get(host.replace("-", "_"), []))


def orphan(node: Node, **changes: Any) -> Path:
    """Make a base whose image is gone."""
    return make_base(node.cache, str(uuid.uuid4()), DATA, **changes)


def unused_since(path: Path) -> float | None:
    """Return the mark of a base."""
    return read_marks(str(path)).unused_since


@pytest.mark.usefixtures("nova")
def test_a_base_that_no_disk_uses_goes_in_two_steps(node: Node, reports: Path) -> None:
    """From the upload to the end: linked, deleted in Glance, marked, retired, and removed."""
    gone, stays = node.cloud.image("gone", DATA), node.cloud.image("stays", DATA)
    assert node.run().returncode == 0
    node.cloud.delete(gone)
    entry = node.entry(gone)
    retired = entry.with_name(f"{entry.name}.retired")
    inode = entry.stat().st_ino
    assert prune(node, reports) == {entry.name: ("kept", "first_seen_unused")}
    # The reports were begun before the mark.
    assert prune(node, reports) == {entry.name: ("kept", "waiting_for_reports")}
    write_report(reports, "compute-1")
    assert prune(node, reports) == {entry.name: ("kept", "waiting_for_reports")}
    report_all(reports)
    with entry.open("rb") as reader:
        assert prune(node, reports) == {entry.name: ("retired", "unused")}
        assert node.names() == {node.entry(stays).name, retired.name}
        assert retired.stat().st_ino == inode
        assert prune(node, reports) == {entry.name: ("kept", "waiting_for_reports")}
        report_all(reports)
        assert prune(node, reports) == {entry.name: ("pruned", "unused_while_retired")}
        assert reader.read() == DATA
    assert prune(node, reports) == {}
    assert node.names() == {node.entry(stays).name}


@pytest.mark.usefixtures("nova")
def test_a_base_that_is_used_again_is_restored(node: Node, reports: Path) -> None:
    """Its mark goes, so that its time starts anew."""
    entry = orphan(node)
    prune(node, reports)
    report_all(reports)
    assert prune(node, reports) == {entry.name: ("retired", "unused")}
    report_all(reports, compute_2=[entry.name])
    assert prune(node, reports) == {entry.name: ("restored", "in_use")}
    assert unused_since(entry) is None
    assert prune(node, reports) == {entry.name: ("kept", "in_use")}
    report_all(reports)
    assert prune(node, reports) == {entry.name: ("kept", "first_seen_unused")}


@pytest.mark.usefixtures("nova")
def test_by_default_each_step_takes_a_day(node: Node, reports: Path) -> None:
    """The mark must be older than ``--after``."""
    fresh = orphan(node, unused_since=time.time() - 86000)
    old = orphan(node, unused_since=time.time() - 86500)
    retired = orphan(node, retired=True, unused_since=time.time() - 86000)
    assert prune(node, reports, "--after", "24h") == {
        fresh.name: ("kept", "not_unused_long_enough"),
        old.name: ("retired", "unused"),
        retired.name.removesuffix(".retired"): ("kept", "not_unused_long_enough"),
    }


@pytest.mark.usefixtures("nova")
def test_a_server_that_migrated_between_two_reports_keeps_its_base(
    node: Node, reports: Path
) -> None:
    """The machine that it left names its base as recently used for a day."""
    entry = orphan(node, unused_since=1.0)
    write_report(reports, "compute-1", recent={entry.name: time.time() - 3000})
    assert prune(node, reports, "--after", "24h") == {entry.name: ("kept", "in_use")}
    assert unused_since(entry) is None


@pytest.mark.usefixtures("nova")
def test_a_base_of_a_host_that_is_gone_is_kept(node: Node, reports: Path) -> None:
    """A report counts however old it is, and whether Nova knows its host or not."""
    here, aside = orphan(node, unused_since=1.0), orphan(node, retired=True)
    names = [here.name, aside.name.removesuffix(".retired")]
    path = write_report(reports, "compute-9", *names, age=90 * 86400)
    # Its ctime is now, as after a chown, so it looks fresh to be on the safe side.
    assert prune(node, reports) == {names[0]: ("kept", "in_use"), names[1]: ("restored", "in_use")}
    path.unlink()
    assert prune(node, reports)[names[0]] == ("kept", "first_seen_unused")


@pytest.mark.usefixtures("nova")
def test_what_0_2_0_retired_is_judged_by_the_new_rules(node: Node, reports: Path) -> None:
    """It has no mark of when it was retired, so its time starts now."""
    name = orphan(node, retired=True).name.removesuffix(".retired")
    assert prune(node, reports) == {name: ("kept", "first_seen_unused")}
    report_all(reports)
    assert prune(node, reports) == {name: ("pruned", "unused_while_retired")}


@pytest.mark.usefixtures("nova")
def test_unmarked_bases_are_included_on_request(node: Node, reports: Path) -> None:
    """Nova's files of other forms stay, however old they are."""
    entry = orphan(node, marked=False, unused_since=1.0)
    others = [f"{entry.name}_20", "ephemeral_20_40d1d2c", "swap_512", entry.name.upper()]
    for name in others:
        (node.cache / name).write_bytes(DATA)
        os.utime(node.cache / name, (1, 1))
    assert prune(node, reports) == {entry.name: ("kept", "image_not_known")}
    assert prune(node, reports, "--unmarked") == {entry.name: ("retired", "unused")}
    report_all(reports)
    assert prune(node, reports) == {entry.name: ("kept", "image_not_known")}
    report_all(reports, compute_1=[entry.name])
    assert prune(node, reports) == {entry.name: ("restored", "in_use")}
    report_all(reports)
    for _ in range(3):
        prune(node, reports, "--unmarked")
        report_all(reports)
    assert node.names() == set(others)


@pytest.mark.parametrize("status", ["deactivated", "pending_delete", "killed", "queued"])
@pytest.mark.usefixtures("nova")
def test_an_image_that_glance_has_keeps_its_base(node: Node, reports: Path, status: str) -> None:
    """Whatever its status: a file that is gone is not an image that is gone."""
    image = node.cloud.image("image", DATA)
    node.cloud.set_status(image, status)
    (node.images / image).rename(node.entry(image))
    os.setxattr(node.entry(image), IMAGE_ID_MARK, image.encode())
    os.setxattr(node.entry(image), UNUSED_SINCE_MARK, b"1")
    assert prune(node, reports) == {node.entry(image).name: ("kept", "image_exists")}
    assert unused_since(node.entry(image)) is None
    retired = node.entry(image).rename(node.cache / f"{node.entry(image).name}.retired")
    assert prune(node, reports) == {node.entry(image).name: ("restored", "image_exists")}
    assert not retired.exists()


@pytest.mark.usefixtures("nova")
def test_a_hidden_image_keeps_an_unmarked_base(node: Node, reports: Path) -> None:
    """Glance lists hidden images only if asked for them, in any spelling of the id."""
    hidden = node.cloud.create("hidden", os_hidden=True)
    node.cloud.image("here", DATA)
    entry = make_base(node.cache, hidden.upper(), DATA, marked=False, unused_since=1.0)
    assert prune(node, reports, "--unmarked") == {entry.name: ("kept", "image_exists")}


@pytest.mark.usefixtures("nova")
def test_a_stale_mark_goes_when_the_base_is_a_link_again(node: Node) -> None:
    """Otherwise the next deletion of the image would not start its time anew."""
    image = node.cloud.image("image", DATA)
    assert node.run().returncode == 0
    os.setxattr(node.entry(image), UNUSED_SINCE_MARK, b"1")
    assert node.verdicts()[image] == ("repaired", "wrong_attributes")
    assert unused_since(node.entry(image)) is None


# What blocks.


@pytest.mark.parametrize(
    ("happen", "blocker"),
    [
        (lambda at: (at / "compute-2.json").unlink(), "compute-2 has no report"),
        (
            lambda at: write_report(at, "compute-2", age=3 * 3600 + 60),
            "the report of compute-2 is 3 h 1 min old",
        ),
        (
            lambda at: write_report(at, "compute-2", complete=False, incomplete_because="why"),
            "the report of compute-2 is incomplete: why",
        ),
        (
            lambda at: write_report(at, "compute-2", time=time.time() + 400),
            "the report of compute-2 lies in the future",
        ),
        (
            lambda at: (at / "old.json").write_text("{"),
            "the report of old cannot be read: it is not JSON",
        ),
        (lambda at: write_report(at, "compute-3"), "compute-3 reports, but Nova does not know it"),
    ],
)
@pytest.mark.usefixtures("nova")
def test_a_blocked_clean_up_takes_nothing_and_restores(
    node: Node, reports: Path, happen: Callable[[Path], object], blocker: str, tmp_path: Path
) -> None:
    """Its status is 0, but it warns, and its metrics say so."""
    idle = orphan(node, unused_since=1.0)
    retired, used = (orphan(node, retired=True, unused_since=1.0) for _ in range(2))
    used_name = used.name.removesuffix(".retired")
    happen(reports)
    write_report(reports, "compute-1", used_name)
    metrics = tmp_path / "metrics"
    document = run(node, reports, "--metrics-file", str(metrics))
    reasons = {each["cache_name"]: each["reason"] for each in document["images"]}
    assert reasons[idle.name].startswith(f"the clean-up is blocked: {blocker}")
    assert node.names() == {idle.name, retired.name, used_name}
    assert unused_since(idle) == 1.0
    assert f'ln_images_prune_blocked{{cache_dir="{node.cache}"}} 1.0' in metrics.read_text()
    warning = stderr(node, reports, status=0)
    assert warning.startswith(
        f"ln-images-prune: warning: the clean-up is blocked and removes nothing: {blocker}"
    )
    assert warning.count("\n") == 1
    assert stderr(node, reports, "-q", status=0) == ""


def test_hosts_that_never_use_the_cache_can_be_ignored(
    node: Node, nova: Compute, reports: Path
) -> None:
    """One that has a report uses the cache: status 2."""
    nova.hosts.append("ironic")
    idle = orphan(node, unused_since=1.0)
    assert prune(node, reports) == {idle.name: ("kept", "blocked")}
    assert prune(node, reports, "--ignore-host", "ironic") == {idle.name: ("retired", "unused")}
    message = stderr(node, reports, "--ignore-host", "compute-1", status=2)
    assert "--ignore-host compute-1: this host has a report" in message


def test_every_region_is_queried(node: Node, reports: Path) -> None:
    """Regions may share a cache; ``--region`` narrows that."""
    idle = orphan(node, unused_since=1.0)
    with contextlib.ExitStack() as stack:
        one, two, none = (
            stack.enter_context(Compute(*hosts)) for hosts in (HOSTS, ["compute-1", "far"], [])
        )
        endpoints = [(REGION, "public", one.url), ("RegionTwo", "public", two.url)]
        endpoints += [("Empty", "public", none.url), ("Inner", "internal", one.url)]
        stack.enter_context(in_catalog(node.cloud.identity(), *endpoints))
        assert "Nova in region Empty has no compute host" in stderr(node, reports, status=2)
        assert "Nova in region Inner has no endpoint" in stderr(
            node, reports, "--region", "Inner", status=2
        )
        assert "--region Mars: the catalog has no compute service there" in stderr(
            node, reports, "--region", "Mars", status=2
        )
        regions = ("--region", REGION, "--region", "RegionTwo")
        warning = stderr(node, reports, *regions, "--dry-run", status=0)
        assert "Nova lists 2 compute hosts named compute-1 (and 1 more)" in warning
        two.faults["os-services"] = Fault(503)
        assert "Nova in region RegionTwo answers badly: HTTP 503" in stderr(
            node, reports, *regions, status=75
        )
        assert prune(node, reports, "--region", REGION) == {idle.name: ("retired", "unused")}
        assert {request.path for request in two.requests} == {"/os-services"}


@pytest.mark.parametrize("path", ["", "/v2.1", "/v2.1/", f"/v2.1/{'0' * 32}"])
def test_a_catalog_may_have_the_version_and_the_project(
    node: Node, reports: Path, path: str
) -> None:
    """Nothing is discovered: Nova redirects ``/v2.1`` to ``/v2.1/``."""
    idle = orphan(node, unused_since=1.0)
    with Compute(*HOSTS) as nova:
        url = nova.url.removesuffix("/v2.1") + path
        with in_catalog(node.cloud.identity(), (REGION, "public", url)):
            assert prune(node, reports) == {idle.name: ("retired", "unused")}
        (request,) = nova.requests
        assert request.path.endswith("/os-services")
        assert request.query == {"binary": "nova-compute"}
        assert request.microversion == "2.69"


def test_an_endpoint_override_is_honoured(node: Node, nova: Compute, reports: Path) -> None:
    """It takes the place of the catalog's endpoint in the region of the openrc."""
    idle = orphan(node, unused_since=1.0)
    with Compute(*HOSTS) as other:
        variables: dict[str, str | None] = {"OS_COMPUTE_ENDPOINT_OVERRIDE": other.url}
        assert prune(node, reports, status=0, **variables) == {idle.name: ("retired", "unused")}
        assert other.requests
    assert not nova.requests


def hosts_down(nova: Compute) -> None:
    """Take down a cell."""
    nova.hosts_down = ["compute-3"]


def older(nova: Compute) -> None:
    """Let Nova be older than 19.0.0."""
    nova.newest = (2, 68)


def stripped(nova: Compute) -> None:
    """Stand a proxy before Nova that removes its header."""
    nova.has_microversions = False


def silent(nova: Compute) -> None:
    """Let Nova not answer."""
    nova.faults["os-services"] = Fault(hang=True)


def odd(nova: Compute) -> None:
    """Let Nova answer in an unexpected shape."""
    nova.faults["os-services"] = Fault(200, b'{"services": [{}]}')


def forbidden(nova: Compute) -> None:
    """Let Nova's policy refuse."""
    nova.faults["os-services"] = Fault(403, b"{}")


@pytest.mark.parametrize(
    ("happen", "status", "message"),
    [
        (hosts_down, 75, f"Nova in region {REGION} does not see all of its cells"),
        (older, 2, f"Nova in region {REGION} is older than 19.0.0"),
        (stripped, 75, "does not answer with the microversion that we requested"),
        (silent, 75, f"Nova in region {REGION} cannot be queried (ConnectTimeout"),
        (odd, 75, f"Nova in region {REGION} cannot be queried (KeyError)"),
        (forbidden, 2, f"Nova in region {REGION} refuses the credentials (HTTP 403)"),
    ],
)
def test_while_nova_cannot_be_queried_nothing_goes_but_what_is_needed_comes_back(
    node: Node,
    nova: Compute,
    reports: Path,
    happen: Callable[[Compute], None],
    status: int,
    message: str,
) -> None:
    """A restore needs nothing but a report."""
    happen(nova)
    idle, used = orphan(node, unused_since=1.0), orphan(node, retired=True)
    used_name = used.name.removesuffix(".retired")
    write_report(reports, "compute-1", used_name)
    timeout = ("--timeout", "2") if happen is silent else ()
    options = ("--after", "0s", "--reports-dir", str(reports), "--format", "json", *timeout)
    result = node.run(*options, command=Command.PRUNE)
    assert result.returncode == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert message in json.loads(result.stdout)["error"]
    assert node.names() == {idle.name, used_name}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_of_nova_is_followed(
    node: Node, nova: Compute, reports: Path, status: int
) -> None:
    """Another host that Nova redirects to gets no request, so no token, and nothing goes."""
    idle = orphan(node, unused_since=1.0)
    with Compute(*HOSTS) as other:
        location = f"{other.url}/os-services"
        nova.faults["os-services"] = Fault(status, b"", location=location)
        options = ("--after", "0s", "--reports-dir", str(reports), "--format", "json")
        result = node.run(*options, command=Command.PRUNE)
        assert other.requests == []
    assert result.returncode == 2
    assert nova.url in result.stderr
    assert location in result.stderr
    assert node.names() == {idle.name}


@pytest.mark.parametrize(
    ("variables", "status"),
    [(NO_OPENRC, 2), ({"OS_PASSWORD": "wrong"}, 2), ({"OS_AUTH_URL": "http://127.0.0.1:1/v3"}, 75)],
)
def test_a_restore_needs_no_cloud(
    node: Node, reports: Path, variables: dict[str, str | None], status: int
) -> None:
    """Even without credentials, what a report names comes back."""
    name = orphan(node, retired=True, marked=False).name.removesuffix(".retired")
    write_report(reports, "compute-1", name)
    assert prune(node, reports, status=status, **variables) == {name: ("restored", "in_use")}


def test_without_reports_what_glance_has_comes_back(
    node: Node, nova: Compute, tmp_path: Path
) -> None:
    """A directory of reports that is not there is an error of configuration."""
    image = node.cloud.image("image", DATA)
    retired = node.cache / f"{node.entry(image).name}.retired"
    (node.images / image).rename(retired)
    os.setxattr(retired, IMAGE_ID_MARK, image.encode())
    found = prune(node, tmp_path / "nowhere", status=2)
    assert found == {node.entry(image).name: ("restored", "image_exists")}
    assert nova.requests


@pytest.mark.usefixtures("nova")
def test_a_plain_member_takes_nothing(node: Node, reports: Path) -> None:
    """Glance hides other projects' images from a member."""
    idle = orphan(node, unused_since=1.0)
    node.cloud.add_user("pruner", "pruners", "member")
    variables: dict[str, str | None] = dict(node.cloud.environment("pruner", "pruners"))
    message = stderr(node, reports, status=2, **variables)
    assert "the credential does not have the role admin" in message
    assert idle.exists()


@pytest.mark.usefixtures("nova")
def test_the_wrong_cloud_takes_nothing(node: Node, reports: Path) -> None:
    """If Glance knows none of the images that are here, the status is 2."""
    idle = orphan(node, unused_since=1.0)
    (node.images / str(uuid.uuid4())).write_bytes(DATA)
    message = stderr(node, reports, status=2)
    assert f"Glance knows none of the 1 images that have a file in {node.images}" in message
    assert idle.exists()


# Lost bases, and names that are taken.


@pytest.mark.usefixtures("nova")
def test_a_lost_base_is_named_with_host_and_server(node: Node, reports: Path) -> None:
    """It is status 1, before anybody restarts the server."""
    lost = [{"server": "s1\n", "base": NAME}]
    check = {"name": "hard", "state": "WRONG", "found": "soft", "fix": "mount it hard"}
    write_report(reports, "compute-1", NAME, lost=lost, checks=[check])
    document = run(node, reports, status=1)
    (result,) = document["images"]
    assert (result["cache_name"], result["outcome"]) == (NAME, "lost")
    assert result["reason"].startswith("it is in use on compute-1 by server s1\n, and it is not in")
    first, second = document["nodes"]
    assert (first["host"], first["bases"], first["lost"]) == ("compute-1", 1, lost)
    assert first["wrong"] == ["hard"]
    assert first["complete"]
    assert 0 <= first["report_age_seconds"] < 60
    assert (second["host"], second["bases"], second["wrong"]) == ("compute-2", 0, [])
    assert "lost: " + NAME in stderr(node, reports, status=1)
    # An old report may be about a server that is gone.
    write_report(reports, "compute-1", NAME, age=4 * 3600)
    assert prune(node, reports) == {}


@pytest.mark.usefixtures("nova")
def test_the_text_report_shows_the_nodes(node: Node, reports: Path) -> None:
    """Nothing from a report can act on a terminal."""
    check = {"name": "hard", "state": "WRONG", "found": "so\x1b[31mft", "fix": "mount it hard"}
    write_report(reports, "compute-1", NAME, age=3700, checks=[check])
    make_base(node.cache, ID, DATA)
    (reports / "compute-2.json").unlink()
    options = ("--reports-dir", str(reports))
    output = node.run(*options, command=Command.PRUNE).stdout
    assert "compute-1  1 h 1 min old  1      0     hard" in output
    assert "compute-2  there is none  0      0     -" in output
    assert r"compute-1: hard is WRONG: so\x1b[31mft; mount it hard" in output


@pytest.mark.usefixtures("nova")
def test_a_retired_base_whose_name_is_taken_is_not_touched(node: Node, reports: Path) -> None:
    """A server may read the wrong data: status 1, and the host is named."""
    retired = make_base(node.cache, ID, b"earlier", retired=True)
    entry = make_base(node.cache, ID, b"later", marked=False)
    write_report(reports, "compute-1", NAME)
    document = run(node, reports, status=1)
    by_outcome = {each["outcome"]: each for each in document["images"]}
    assert by_outcome["failed"]["reason_code"] == "name_taken"
    assert "reported by compute-1" in by_outcome["failed"]["reason"]
    assert by_outcome["kept"]["reason_code"] == "in_use"
    assert (retired.read_bytes(), entry.read_bytes()) == (b"earlier", b"later")


@pytest.mark.usefixtures("nova")
def test_a_base_with_another_name_is_kept(node: Node, reports: Path) -> None:
    """Its removal would free nothing, and somebody may use the other name."""
    entry = orphan(node, unused_since=1.0)
    os.link(entry, node.cache / "other")
    assert prune(node, reports) == {entry.name: ("kept", "has_another_name")}


@pytest.mark.usefixtures("nova")
def test_a_base_beside_a_download_is_not_touched(node: Node, reports: Path) -> None:
    """Nova would replace it. A leftover of a download does not count."""
    idle = orphan(node, unused_since=1.0)
    retired = orphan(node, retired=True, unused_since=1.0).name.removesuffix(".retired")
    write_report(reports, "compute-1", retired)
    for name in (idle.name, retired):
        (node.cache / f"{name}.part").write_bytes(b"")
    before = node.names()
    kept = ("kept", "nova_is_downloading")
    assert prune(node, reports) == {idle.name: kept, retired: kept}
    assert node.names() == before


@pytest.mark.usefixtures("nova")
def test_a_dry_run_reports_everything_and_changes_nothing(node: Node, reports: Path) -> None:
    """It changes no mark and no name, and it does not wait for the lock."""
    fresh, old = orphan(node), orphan(node, unused_since=1.0)
    ends, used = (orphan(node, retired=True, unused_since=1.0) for _ in range(2))
    names = {path: path.name.removesuffix(".retired") for path in (fresh, old, ends, used)}
    write_report(reports, "compute-1", names[used])
    before = {path: path.stat() for path in node.cache.iterdir()}
    with Store(str(node.images), str(node.cache)) as store, store.locked():
        found = prune(node, reports, "--dry-run")
    assert {names[path]: found[names[path]][0] for path in names} == {
        names[fresh]: "kept",
        names[old]: "retired",
        names[ends]: "pruned",
        names[used]: "restored",
    }
    after = {path: path.stat() for path in node.cache.iterdir()}
    assert {path: status.st_ctime for path, status in after.items()} == {
        path: status.st_ctime for path, status in before.items()
    }


@pytest.mark.usefixtures("nova")
def test_a_lock_that_another_run_holds_is_temporary(node: Node, reports: Path) -> None:
    """Nothing is done, and the message names the process."""
    idle = orphan(node, unused_since=1.0)
    with Store(str(node.images), str(node.cache)) as store, store.locked():
        message = stderr(node, reports, "--timeout", "3", status=75)
    assert f"process {os.getpid()}" in message
    assert idle.exists()


def test_while_nova_is_queried_other_runs_link(node: Node, nova: Compute, reports: Path) -> None:
    """The lock is held for actions only."""
    orphan(node)
    nova.faults["os-services"] = Fault(hang=True)
    command = [str(executable(Command.PRUNE)), "--reports-dir", str(reports), "--timeout", "60"]
    environment = node.environment(**UNCOVERED)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as pruning:
        try:
            wait_until(lambda: nova.requests, "a query to Nova")
            new = node.cloud.image("new", DATA)
            assert node.run().returncode == 0
            assert node.is_linked(new)
        finally:
            pruning.send_signal(signal.SIGTERM)
    assert pruning.returncode == 130


@needs_root
def test_a_file_system_without_attributes_has_no_clean_up(
    node: Node, nova: Compute, reports: Path, tmp_path: Path
) -> None:
    """It says so, and restores what is needed."""
    with bound(tmp_path, "--xattr-none"):
        images, cache = tmp_path / "bound" / "images", tmp_path / "bound" / "cache"
        images.mkdir()
        cache.mkdir()
        other = cache_name("other")
        (cache / NAME).write_bytes(DATA)
        (cache / f"{other}.retired").write_bytes(DATA)
        write_report(reports, "compute-1", other)
        directories: dict[str, str | None] = {
            "LN_IMAGES_IMAGES_DIR": str(images),
            "LN_IMAGES_CACHE_DIR": str(cache),
        }
        found = prune(node, reports, "--unmarked", status=0, **directories)
        assert found == {NAME: ("kept", "no_marks"), other: ("restored", "in_use")}
        warning = stderr(node, reports, "--unmarked", status=0, **directories)
        assert "keeps no extended attributes, so there is no clean-up" in warning
    assert nova.requests


def test_each_change_is_logged(node: Node, nova: Compute, reports: Path, tmp_path: Path) -> None:
    """The log file has one line for each."""
    retires = orphan(node, unused_since=1.0)
    ends = orphan(node, retired=True, unused_since=1.0).name.removesuffix(".retired")
    log = tmp_path / "log"
    prune(node, reports, "--log-file", str(log))
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    assert f"as {retires.name}: unused for" in next(line for line in lines if "retired: " in line)
    assert f"as {ends}: unused for" in next(line for line in lines if "pruned: " in line)
    assert nova.requests


# Actions on real files, on this machine's file system and on one that has no RENAME_NOREPLACE.


@pytest.fixture(params=["here", pytest.param("without RENAME_NOREPLACE", marks=needs_root)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return where both directories lie."""
    with contextlib.ExitStack() as mounts:
        directory = tmp_path
        if request.param != "here":
            # NFS and CephFS answer EINVAL; so does bindfs, through FUSE.
            mounts.enter_context(bound(tmp_path))
            directory = tmp_path / "bound"
        (directory / "images").mkdir()
        (directory / "cache").mkdir()
        yield directory


def act(store: Store, action: Action, retired: bool) -> Verdict:
    """Carry out an action on the base with NAME as it is now."""
    return carry_out(store, find_base(store, retired), decision_of(action), 1000.0)


def find_base(store: Store, retired: bool) -> Base:
    """Return the base with NAME."""
    bases = scan(store, None).bases
    return next(base for base in bases if base.name == NAME and base.retired is retired)


def decision_of(action: Action) -> Decision:
    """Return a decision with an action."""
    return Decision(Verdict(Outcome.KEPT, Reason.UNUSED, "done"), action)


DONE = Verdict(Outcome.KEPT, Reason.UNUSED, "done")


def test_actions_rename_mark_and_remove(place: Path) -> None:
    """A base stays the same inode; it is marked when it is retired, and unmarked when restored."""
    entry = make_base(place / "cache", ID)
    retired = entry.with_name(f"{NAME}.retired")
    inode = entry.stat().st_ino
    with Store(str(place / "images"), str(place / "cache")) as store:
        assert act(store, Action.SET_MARK, retired=False) == DONE
        assert unused_since(entry) == 1000
        assert act(store, Action.REMOVE_MARK, retired=False) == DONE
        assert unused_since(entry) is None
        assert act(store, Action.RETIRE, retired=False) == DONE
        assert (retired.stat().st_ino, unused_since(retired)) == (inode, 1000)
        assert act(store, Action.RESTORE, retired=True) == DONE
        assert (entry.stat().st_ino, unused_since(entry)) == (inode, None)
        assert act(store, Action.RETIRE, retired=False) == DONE
        assert act(store, Action.REMOVE, retired=True) == DONE
    assert list((place / "cache").iterdir()) == []


def replace_by_fifo(entry: Path) -> None:
    """Put a FIFO in a base's place."""
    entry.unlink()
    os.mkfifo(entry)


@pytest.mark.parametrize("action", [Action.RESTORE, Action.REMOVE, Action.RETIRE, Action.SET_MARK])
@pytest.mark.parametrize(
    "happen",
    [
        pytest.param(os.utime, id="Nova touches it"),
        pytest.param(lambda entry: os.link(entry, entry.with_name("x")), id="it has another link"),
        pytest.param(lambda entry: entry.rename(entry.with_name("x")), id="it is gone"),
        pytest.param(
            lambda entry: (entry.unlink(), entry.write_bytes(b"base")), id="it is another file"
        ),
        pytest.param(
            lambda entry: (entry.unlink(), entry.symlink_to("x")), id="it is a symbolic link"
        ),
        pytest.param(replace_by_fifo, id="it is a FIFO"),
        pytest.param(lambda entry: os.removexattr(entry, IMAGE_ID_MARK), id="its mark is gone"),
    ],
)
def test_a_base_that_changes_in_the_last_moment_is_kept(
    tmp_path: Path, happen: Callable[[Path], object], action: Action
) -> None:
    """It is checked once more immediately before anything is done."""
    for name in ("images", "cache"):
        (tmp_path / name).mkdir()
    is_retired = action in (Action.RESTORE, Action.REMOVE)
    entry = make_base(tmp_path / "cache", ID, retired=is_retired)
    with Store(str(tmp_path / "images"), str(tmp_path / "cache")) as store:
        base = find_base(store, is_retired)
        happen(entry)
        before = sorted(entry.parent.iterdir())
        verdict = carry_out(store, base, decision_of(action), 1000.0)
    assert (verdict.outcome, verdict.reason) == (Outcome.KEPT, Reason.CHANGED_MEANWHILE)
    assert sorted(entry.parent.iterdir()) == before


@pytest.mark.parametrize("retires", [True, False])
def test_nothing_is_replaced(place: Path, retires: bool) -> None:
    """If another file has the new name, both stay, even if the kernel cannot tell."""
    entry = make_base(place / "cache", ID, retired=not retires)
    other = entry.with_name(f"{NAME}.retired" if retires else NAME)
    other.write_bytes(b"other")
    with Store(str(place / "images"), str(place / "cache")) as store:
        action = Action.RETIRE if retires else Action.RESTORE
        verdict = act(store, action, retired=not retires)
    assert verdict.reason is Reason.NAME_TAKEN
    assert verdict.outcome is (Outcome.KEPT if retires else Outcome.FAILED)
    assert (entry.read_bytes(), other.read_bytes()) == (b"base", b"other")


@pytest.mark.usefixtures("nova")
def test_a_crash_between_two_names_is_ended(node: Node, reports: Path) -> None:
    """A link and an unlink leave both names to one inode; the pass removes the retired one."""
    entry = orphan(node, unused_since=1.0)
    os.link(entry, entry.with_name(f"{entry.name}.retired"))
    document = run(node, reports)
    found = sorted((each["outcome"], each["reason_code"]) for each in document["images"])
    assert found == [("kept", "has_another_name"), ("restored", "two_names")]
    assert node.names() == {entry.name}


MOVES = """
import sys, time
from ln_images.model import Outcome, Reason, Verdict
from ln_images.prune.bases import carry_out
from ln_images.prune.rules import Action, Decision
from ln_images.scan import scan
from ln_images.store import Store

with Store(f"{sys.argv[1]}/images", f"{sys.argv[1]}/cache") as store:
    while True:
        for number, base in enumerate(scan(store, None).bases):
            action = Action.RESTORE if base.retired else Action.RETIRE
            decision = Decision(Verdict(Outcome.KEPT, Reason.UNUSED), action)
            carry_out(store, base, decision, time.time())
            if number % 100 == 0:
                print(flush=True)
"""


def test_sigkill_at_any_moment_leaves_each_base_a_name(place: Path) -> None:
    """Each is the same inode, under one of its two names, or at most one of them under both."""
    cache = place / "cache"
    for number in range(1000):
        make_base(cache, str(number), b"")
    inodes = {path.stat().st_ino for path in cache.iterdir()}
    for hundreds in (1, 7, 16):
        command = [sys.executable, "-c", MOVES, str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as moving:
            assert moving.stdout is not None
            for _ in range(hundreds):
                assert moving.stdout.readline()
            moving.kill()
        names: dict[str, set[int]] = {}
        for path in cache.iterdir():
            names.setdefault(path.name.removesuffix(".retired"), set()).add(path.stat().st_ino)
            if path.name.endswith(".retired"):
                # It was marked before it was renamed, so its second day is not lost.
                assert unused_since(path) is not None or place.name == "mounted"
        assert len(names) == 1000
        assert {inode for numbers in names.values() for inode in numbers} == inodes
        assert all(len(numbers) == 1 for numbers in names.values())
        both = len(list(cache.iterdir())) - 1000
        assert both <= (1 if place.name == "mounted" else 0)
