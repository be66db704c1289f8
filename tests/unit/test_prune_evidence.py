"""Reports of compute nodes are hostile until checked; Nova and Glance add their evidence."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ln_images.model import (
    Base,
    ConfigurationError,
    File,
    Image,
    Marks,
    Owner,
    TemporaryError,
    cache_name,
)
from ln_images.prune.evidence import Cloud, Evidence, boot_time, gather
from ln_images.prune.nova import ComputeHost
from ln_images.prune.reports import LONGEST_REPORT, LostBase, Report, read_reports
from ln_images.prune.rules import Policy
from ln_images.scan import scan
from ln_images.store import Store
from support.bases import OneImageGlance, make_base, report_document, write_report

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
NAME = cache_name(ID)
POLICY = Policy(after=86400, report_age=10800)


def read_one(directory: Path) -> Report:
    """Return the report of compute-1, which must be readable."""
    reports = read_reports(str(directory))
    assert reports.error is None
    assert reports.unreadable == {}
    return reports.readable["compute-1"]


def test_a_report_of_the_tool_is_read(tmp_path: Path) -> None:
    """Everything that the clean-up needs is taken from it."""
    lost = {"server": "s1", "base": "b" * 40}
    wrong = {"name": "hard", "state": "WRONG", "found": "soft", "fix": "mount it hard"}
    fine = {"name": "disks", "state": "ok", "found": "", "fix": ""}
    before = time.time()
    write_report(
        tmp_path,
        "compute-1",
        NAME,
        recent={"c" * 40: 12.5},
        lost=[lost],
        checks=[wrong, fine],
        unknown_key=["ignored"],
    )
    report = read_one(tmp_path)
    assert report.bases == {NAME, "b" * 40}
    assert report.recent == {"c" * 40: 12.5}
    assert report.lost == [LostBase("s1", "b" * 40)]
    assert [check.name for check in report.wrong] == ["hard"]
    assert report.complete
    assert before - 1 <= report.begun <= report.latest <= time.time()


def test_a_report_is_as_old_as_the_oldest_of_its_times(tmp_path: Path) -> None:
    """A clock that is ahead does not make it younger, nor does a bulk chown."""
    write_report(tmp_path, "compute-1", age=500)
    assert read_one(tmp_path).begun == pytest.approx(time.time() - 500, abs=5)
    # The clock of the node is ahead, and the file's mtime is the truth.
    path = write_report(tmp_path, "compute-1", time=time.time() + 200)
    os.utime(path, (0, time.time() - 900))
    os.chown(path, os.getuid(), os.getgid())
    assert read_one(tmp_path).begun == pytest.approx(time.time() - 900, abs=5)
    assert read_one(tmp_path).latest == pytest.approx(time.time() + 200, abs=5)


def test_only_required_keys_are_required(tmp_path: Path) -> None:
    """A report with nothing else is one without anything to say."""
    keys = ("version", "host", "time", "complete", "bases")
    document = report_document("compute-1")
    (tmp_path / "compute-1.json").write_text(json.dumps({key: document[key] for key in keys}))
    assert read_one(tmp_path).bases == frozenset()


def without(key: str) -> bytes:
    """Return a report that lacks a key."""
    document = report_document("compute-1")
    del document[key]
    return json.dumps(document).encode()


def with_(**changes: Any) -> bytes:
    """Return a report with changes."""
    return json.dumps(report_document("compute-1", **changes)).encode()


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "deep in a key": b'{"version": 1, "x": ' + b'{"a":' * 100_000,
    "no object": b"[]",
    "null": b"null",
    "huge": with_() + b" " * LONGEST_REPORT,
    "other version": with_(version=2),
    "version as text": with_(version="1"),
    "other host": with_(host="compute-2"),
    "host with a newline": with_(host="compute-1\n"),
    "host as a list": with_(host=["compute-1"]),
    **{f"without {key}": without(key) for key in ("version", "host", "time", "complete", "bases")},
    "time NaN": with_(time=float("nan")),
    "time Infinity": with_(time=float("inf")),
    "time -Infinity": with_(time=float("-inf")),
    "time 1e999": with_().replace(b'"time": ', b'"time": 1e999, "x": '),
    "time huge": with_(time=10**400),
    "time of 5000 digits": with_().replace(b'"time": ', b'"time": ' + b"9" * 5000 + b', "x": '),
    "time negative": with_(time=-1),
    "time as text": with_(time="1"),
    "time true": with_(time=True),
    "time null": with_(time=None),
    "complete 1": with_(complete=1),
    "complete as text": with_(complete="true"),
    "bases an object": with_(bases={}),
    "bases null": with_(bases=None),
    "bases of numbers": with_(bases=[1]),
    "bases of lists": with_(bases=[[]]),
    "a base in upper case": with_(bases=["A" * 40]),
    "a base with a newline": with_(bases=["a" * 40 + "\n"]),
    "a base that is a path": with_(bases=["../" + "a" * 37]),
    "a short base": with_(bases=["a" * 39]),
    "recent a list": with_(recent=[]),
    "recent without time": with_(recent={NAME: None}),
    "recent NaN": with_(recent={NAME: float("nan")}),
    "recent no base": with_(recent={"x": 1}),
    "lost an object": with_(lost={}),
    "lost of text": with_(lost=["x"]),
    "lost without base": with_(lost=[{"server": "s1"}]),
    "lost server a number": with_(lost=[{"server": 1, "base": NAME}]),
    "checks an object": with_(checks={}),
    "checks of text": with_(checks=["WRONG"]),
    "a check whose name is a number": with_(checks=[{"name": 1, "state": "WRONG"}]),
    "more checks than there are": with_(checks=[{"state": "WRONG"}] * 101),
    "incomplete because of a number": with_(incomplete_because=1),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_report_that_is_not_as_it_must_be_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    """It is named with a reason, and the reports of other hosts are read."""
    (tmp_path / "compute-1.json").write_bytes(content)
    write_report(tmp_path, "compute-2", NAME)
    reports = read_reports(str(tmp_path))
    assert reports.unreadable.keys() == {"compute-1"}
    assert reports.unreadable["compute-1"].isprintable()
    assert reports.readable.keys() == {"compute-2"}
    assert reports.hosts == {"compute-1", "compute-2"}


def make_socket(path: Path) -> None:
    """Make a socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)
        listener.bind(path.name)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="FIFO"),
        pytest.param(Path.mkdir, id="directory"),
        pytest.param(lambda path: path.symlink_to("compute-2.json"), id="symbolic link"),
        pytest.param(lambda path: path.symlink_to("gone"), id="dangling link"),
        pytest.param(make_socket, id="socket"),
    ],
)
def test_what_is_no_regular_file_is_not_opened(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO would make the reader wait for ever, and a link could name any file."""
    monkeypatch.chdir(tmp_path)
    write_report(tmp_path, "compute-2")
    make(tmp_path / "compute-1.json")
    reports = read_reports(str(tmp_path))
    assert reports.unreadable.keys() == {"compute-1"}
    assert reports.readable.keys() == {"compute-2"}


def test_files_of_other_forms_are_ignored(tmp_path: Path) -> None:
    """Such as the one that a node has not finished."""
    names = (".compute-1.json.1f2e3d4c", "compute-1.json~", "compute-1", ".json", "a b.json")
    for name in (*names, "compute-1.json\n", ".compute-1.json"):
        (tmp_path / name).write_text("{")
    assert read_reports(str(tmp_path)).hosts == set()


def test_a_directory_with_too_many_reports_is_not_read(tmp_path: Path) -> None:
    """A node could make any number of them."""
    for number in range(4097):
        (tmp_path / f"{number}.json").touch()
    reports = read_reports(str(tmp_path))
    assert isinstance(reports.error, ConfigurationError)
    assert "too many entries" in reports.error.message


def test_all_reports_together_are_limited(tmp_path: Path) -> None:
    """What is beyond the limit cannot be read, and so it blocks."""
    for number in range(65):
        path = tmp_path / f"{number:02}.json"
        path.write_bytes(json.dumps(report_document(f"{number:02}")).encode().ljust(LONGEST_REPORT))
    reports = read_reports(str(tmp_path))
    assert reports.unreadable.keys() == {"64"}


@pytest.mark.parametrize("make", [None, Path.touch, lambda path: path.symlink_to("/")])
def test_reports_need_a_directory(tmp_path: Path, make: Callable[[Path], object] | None) -> None:
    """A node may have put something else in its place, such as a link."""
    if make is not None:
        make(tmp_path / "reports")
    error = read_reports(str(tmp_path / "reports")).error
    assert isinstance(error, ConfigurationError)
    assert error.message.startswith(f"--reports-dir {tmp_path}/reports: ")
    assert "install ln-images-node on every compute node" in error.message


def a_base(image_id: str | None = ID, name: str = NAME) -> Base:
    """Return a base."""
    file = File(0o100644, 1, 1, 1, Owner(0, 0), 5, 0.0, 0.0, Marks(image_id))
    return Base(name, image_id, False, file)


@pytest.mark.parametrize(
    ("listed", "base", "expected"),
    [
        (ID, a_base(), "active"),
        (ID.upper(), a_base(), "active"),
        (ID, a_base(ID.upper(), cache_name(ID.upper())), "active"),
        (ID, a_base(None), "active"),
        (ID.upper(), a_base(None), "active"),
        (ID, a_base(None, cache_name(ID.upper())), "active"),
        ("b" + ID[1:], a_base(), None),
        ("b" + ID[1:], a_base(None), None),
    ],
)
def test_ids_are_compared_without_regard_to_case(
    tmp_path: Path, listed: str, base: Base, expected: str | None
) -> None:
    """Of a base without a mark, in the spellings that its name can come from."""
    write_report(tmp_path, "compute-1")
    assert evidence(tmp_path, cloud_of(listed)).image_status(base) == expected


def evidence(tmp_path: Path, cloud: Cloud | Exception, policy: Policy = POLICY) -> Evidence:
    """Gather evidence from a cloud's answers, or from the error in place of them."""

    def query() -> Cloud:
        if isinstance(cloud, Exception):
            raise cloud
        return cloud

    for name in ("images", "cache"):
        (tmp_path / name).mkdir()
    make_base(tmp_path / "cache", ID)
    reports = read_reports(str(tmp_path))
    with Store(str(tmp_path / "images"), str(tmp_path / "cache")) as store:
        return gather(
            store=store,
            on_disk=scan(store, policy=None),
            reports=reports,
            query=query,
            policy=policy,
            start=boot_time(),
            now=time.time(),
        )


def cloud_of(*images: str, hosts: tuple[str, ...] = ("compute-1",)) -> Cloud:
    """Return the answers of a cloud with active images and compute hosts."""
    by_id = {image: Image(id=image, status="active", size=5) for image in images}
    compute_hosts = [ComputeHost(host, "RegionOne") for host in hosts]
    return Cloud(compute_hosts, by_id, OneImageGlance(by_id.__contains__))


def test_nothing_blocks_if_all_is_well(tmp_path: Path) -> None:
    """Every host has reported, and Glance knows the store."""
    write_report(tmp_path, "compute-1", age=7)
    result = evidence(tmp_path, cloud_of(ID))
    assert result.blocker is None
    assert result.errors == []
    assert result.reports_begun == {
        "compute-1": pytest.approx(time.time() - 7, abs=5),
    }


def test_an_error_of_the_cloud_blocks_and_is_kept(tmp_path: Path) -> None:
    """The reports are there all the same."""
    write_report(tmp_path, "compute-1", NAME)
    error = TemporaryError("Nova does not see all of its cells; wait")
    result = evidence(tmp_path, error)
    assert result.errors == [error]
    assert result.blocker == error.message
    assert result.reports.users(NAME, since=0) == ["compute-1"]


def test_an_ignored_host_that_reports_is_an_error(tmp_path: Path) -> None:
    """It uses the cache, so it must not be ignored."""
    write_report(tmp_path, "compute-1")
    policy = Policy(after=1, report_age=10800, ignored_hosts=frozenset({"compute-1", "ironic"}))
    result = evidence(tmp_path, cloud_of(ID), policy=policy)
    assert [error.exit_code for error in result.errors] == [2]
    assert result.errors[0].message.startswith("--ignore-host compute-1: this host has a report")
