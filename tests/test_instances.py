"""What instance disks are backed by, and what NFS clients hold open: told, or a doubt."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud import ROOT
from ln_images.instances import Disks, open_inodes, read_disks
from ln_images.model import ConfigurationError, TemporaryError
from ln_images.plan import cache_name

NAME = cache_name("fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0")
SERVER = "11111111-1111-4111-8111-111111111111"
HEADER = b"QFI\xfb\0\0\0\3"


def qemu_img(*arguments: object) -> None:
    """Makes a real disk."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The directory of a server, whose disk is a real overlay of a base, with what else Nova leaves there."""
    made = tmp_path / "instances" / SERVER
    made.mkdir(parents=True)
    qemu_img("create", "-f", "raw", tmp_path / NAME, "1M")
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / NAME, "-F", "raw", made / "disk")
    (made / "disk.info").write_text("{}")
    (made / "console.log").write_text(cache_name("another"))
    (made.parent / "compute_nodes").write_text("{}")
    for name in ("_base", "locks", "snapshots"):
        (made.parent / name).mkdir()
    return made


def test_the_base_of_a_disk_is_found(server: Path) -> None:
    """A real qcow2 overlay names its base by its path; other files beside it do not count."""
    assert read_disks([str(server.parent)]) == Disks({NAME: f"{server}/disk"}, {SERVER}, "")
    assert read_disks([]) == Disks()


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize(
    "name",
    [
        "{base}_20",
        'json:{{"driver":"raw","file":{{"driver":"file","filename":"{base}"}}}}',
        "json:{{'driver':'raw','file':{{'driver':'file','filename':'{base}'}}}}",
    ],
)
def test_whatever_way_a_disk_names_its_base_it_is_found(
    server: Path, name: str, version: str
) -> None:
    """A base that Nova once resized by itself, QEMU's json.

    With the path inside, and the older form of qcow2.
    """
    base = server.parent.parent / NAME
    base.with_name(f"{NAME}_20").write_bytes(b"")
    (server / "disk").unlink()
    options = ("-o", f"compat={version}", "-b", name.format(base=base), "-F", "raw")
    qemu_img("create", "-f", "qcow2", *options, server / "disk.rescue", "1M")
    assert read_disks([str(server.parent)]).backed == {NAME: f"{server}/disk.rescue"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda s1: qemu_img(
                "create", "-f", "qcow2", "-b", s1 / "disk", "-F", "qcow2", s1 / "disk.swap"
            ),
            True,
            id="a chain",
        ),
        pytest.param(
            lambda s1: qemu_img("create", "-f", "raw", s1 / "disk.eph0", "1M"),
            True,
            id="a raw disk",
        ),
        pytest.param(lambda s1: (s1 / "disk.tmp").write_bytes(b""), True, id="an empty file"),
        pytest.param(lambda s1: (s1 / "disk.d").mkdir(), True, id="a directory"),
        pytest.param(
            lambda s1: (s1 / "disk.short").write_bytes(HEADER), False, id="a truncated header"
        ),
        pytest.param(
            lambda s1: (s1 / "disk.cut").write_bytes((s1 / "disk").read_bytes()[:30]),
            False,
            id="a truncated name",
        ),
        pytest.param(
            lambda s1: (s1 / "disk.wild").write_bytes(HEADER + b"\xff" * 12),
            False,
            id="a wild header",
        ),
        pytest.param(
            lambda s1: (s1 / "disk.link").symlink_to(s1 / "disk"), False, id="a symbolic link"
        ),
        pytest.param(lambda s1: (s1.parent / "s2").symlink_to(s1), False, id="a linked server"),
        pytest.param(
            lambda s1: (s1.parent / "s2").symlink_to("/not/mounted"),
            False,
            id="one linked to nothing",
        ),
    ],
)
def test_what_a_disk_is_backed_by_is_told_or_named(
    server: Path, make: Callable[[Path], None], told: bool
) -> None:
    """Beside the real overlay.

    What is no disk is passed over, and what cannot be told is named, never followed.
    """
    before = set(server.parent.rglob("*"))
    make(server)
    (added,) = set(server.parent.rglob("*")) - before
    doubt = "" if told else f"what {added} is backed by cannot be told"
    found = read_disks([str(server.parent)])
    assert (found.backed, found.doubt) == ({NAME: f"{server}/disk"}, doubt)
    assert (SERVER in found.servers) is (told or added.parent != server)


def test_a_directory_in_which_there_is_no_server_protects_nothing(
    server: Path, tmp_path: Path
) -> None:
    """It is a mount point without its mount, also beside another that is mounted.

    A server without a disk is one.
    """
    empty = tmp_path / "empty"
    (empty / "_base").mkdir(parents=True)
    (empty / "lost+found").mkdir()
    for given in ([empty], [server.parent, empty], [empty, server.parent]):
        assert "empty has no directory of a server: mount" in read_disks(map(str, given)).doubt
    (empty / SERVER).mkdir()
    assert read_disks([str(empty)]) == Disks()


def test_the_disk_of_a_server_is_its_root_disk(server: Path) -> None:
    """What is left beside a root disk that is gone decides nothing for its server."""
    (server / "disk").unlink()
    assert read_disks([str(server.parent)]) == Disks()


def test_a_disk_that_goes_away_decides_nothing(server: Path) -> None:
    """One that is moved while it is read, as by a migration.

    Its server is not one whose disk was seen.
    """
    disk, away = server / "disk", server / "x"
    moving = threading.Event()

    def move() -> None:
        while not moving.is_set():
            disk.rename(away)
            away.rename(disk)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(500):
            found = read_disks([str(server.parent)])
            assert NAME in found.backed or SERVER not in found.servers
    finally:
        moving.set()
        thread.join()


def test_a_directory_that_goes_away_is_a_doubt(tmp_path: Path) -> None:
    """It was there when the command began."""
    assert "cannot be read: No such file or directory" in read_disks([str(tmp_path / "gone")]).doubt


def nfs_server(
    place: Path, states: bytes | None = None, grace_ended: str = "Y", threads: int = 8
) -> Path:
    """What /proc/fs/nfsd shows.

    A client without files, one that has gone, and one with these states.
    """
    for client in ("3", "4", "5"):
        (place / "clients" / client).mkdir(parents=True)
    (place / "clients" / "3" / "states").write_text("")
    (place / "clients" / "4" / "states").write_bytes(
        states or (ROOT / "tests" / "nfsd-states.txt").read_bytes()
    )
    (place / "v4_end_grace").write_text(f"{grace_ended}\n")
    (place / "threads").write_text(f"{threads}\n")
    return place


def test_what_nfs_clients_hold_open_is_what_a_real_server_lists(tmp_path: Path) -> None:
    """Opens, locks and delegations of ext4, XFS and btrfs, as nfsd of Linux 6.1 wrote them.

    No server, no clients.
    """
    assert open_inodes(str(tmp_path)) == frozenset()
    assert open_inodes(str(nfs_server(tmp_path))) >= {*range(13, 18), *range(19, 23), 131, 257}


@pytest.mark.parametrize("state", [{"grace_ended": "N"}, {"threads": 0}])
def test_a_server_that_was_just_started_is_waited_for(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    """Its clients have files open that it does not know of yet."""
    with pytest.raises(TemporaryError, match="is stopped or was just started"):
        open_inodes(str(nfs_server(tmp_path, **state)))


@pytest.mark.parametrize(("before", "after"), [("N", "Y"), ("Y", "N")])
def test_a_grace_period_that_ends_or_begins_while_clients_are_read_is_noticed(
    tmp_path: Path, before: str, after: str
) -> None:
    """What was read of some of them was read before they had said what they have open."""
    states = nfs_server(tmp_path, grace_ended=before) / "clients" / "3" / "states"
    states.unlink()
    os.mkfifo(states)

    def change() -> None:
        with contextlib.suppress(BrokenPipeError), states.open("w"):
            (tmp_path / "v4_end_grace").write_text(f"{after}\n")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with pytest.raises(TemporaryError, match="is stopped or was just started"):
            open_inodes(str(tmp_path))
    finally:
        # For a thread that nobody has answered.
        reader = os.open(states, os.O_RDONLY | os.O_NONBLOCK)
        thread.join()
        os.close(reader)


def test_where_it_cannot_be_told_nothing_is(tmp_path: Path) -> None:
    """A list that cannot be read is an error, and not an empty one."""
    states = nfs_server(tmp_path) / "clients" / "3" / "states"
    states.unlink()
    states.mkdir()
    with pytest.raises(
        ConfigurationError,
        match="3/states: Is a directory: what NFS clients hold open cannot be told",
    ):
        open_inodes(str(tmp_path))
