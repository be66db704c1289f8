"""Hostile and unfinished files through the real command on a real cloud.

This table is the specification.

Every case is an image with a file where Glance would keep it. One run meets them all, beside good
images.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from ln_images.plan import RAW_COPY
from ln_images.plan import UNKNOWN as UNKNOWN_FILE

from support import corpus
from support.cloud import Cloud
from support.corpus import ISO, LINUX, MIB, PROTECTIVE, Make, data, mbr, patched, qemu
from support.node import Node, needs_root

# One run meets the whole corpus, so one worker must have all of its tests.
pytestmark = pytest.mark.xdist_group("corpus")
UPPER = "ABCDEF00-8375-44C9-B1F4-3E1F4C4A8EF0"
# A name that clears the screen, colours it, forges a line, turns the text around and rings the
# bell.
EVIL = "\x1b[2J\x1b[31m\r\nlinked: root\u202e\x07\x9b31m\u2028\x00"
EVIL_FILE = "\x1b]0;evil\x07\n/etc/passwd"
UNKNOWN = "qcow2 of an unknown version or with unknown features"
NAMED = "qcow2 with the name of an external data file"
FETCHED = "Nova is downloading it"
BROKEN_TABLE = "raw with a partition table that is not valid"
SIGNED = "signed: Nova verifies only what it downloads"
# What is no column of Glance's table of images.
PROPERTIES = ("os_glance_importing_to_stores", "img_signature")
NOVAS = (
    "ephemeral_1_40d1d2c",
    "swap_512",
    ".nova-lock",
    "0" * 40,
    "0" * 40 + ".part",
    "0" * 40 + "_20",
)


class Case(NamedTuple):
    """What becomes of an image and why, the file it has, and what Glance says where it is not what it should be.

    Glance has an active raw image of the file's own size unless ``glance`` says otherwise; ``entry`` puts
    something under the image's cache name beforehand.
    """

    outcome: str
    reason: str
    file: Make
    glance: dict[str, object]
    entry: Make | None = None


def linked(file: Make, entry: Make | None = None, **glance: object) -> Case:
    """A good image."""
    return Case("linked", "", file, glance, entry)


def refused(reason: str, file: Make, **glance: object) -> Case:
    """An image with a file that must never be linked."""
    return Case("refused", reason, file, glance)


def mistaken(content: str, said: str, file: Make) -> Case:
    """An image whose content is something else than Glance says."""
    mend = "upload it again as what it is, and delete this one"
    return refused(f"the content is {content}, Glance says {said}: {mend}", file, disk_format=said)


def waiting(reason: str, file: Make, **glance: object) -> Case:
    """An image that may be linked later."""
    return Case("waiting", reason, file, glance)


def skipped(reason: str, file: Make, **glance: object) -> Case:
    """An image that is not to be linked."""
    return Case("skipped", reason, file, glance)


def occupied(reason: str, entry: Make, file: Make | None = None, **glance: object) -> Case:
    """A good image, and something else under its cache name."""
    return Case("occupied", reason, file or DISK, glance, entry)


def link(target: str) -> Make:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def node_of(kind: int, device: tuple[int, int] = (0, 0)) -> Make:
    """A FIFO, a socket or a device."""
    return lambda path: os.mknod(path, kind | 0o644, os.makedev(*device))


def nothing(_path: Path) -> None:
    """No file at all."""


def beside(*suffixes: str) -> Make:
    """Nova's own files beside a cache name."""

    def make(path: Path) -> None:
        for suffix in suffixes:
            path.with_name(path.name + suffix).write_bytes(b"nova's own")

    return make


DISK = data(mbr(LINUX), 4096)

GOOD = {
    "a raw disk": linked(DISK, name=EVIL),
    "a qcow2 disk": linked(corpus.QCOW2, disk_format="qcow2"),
    "a hybrid CD": linked(patched(data(mbr(PROTECTIVE), MIB), ISO), disk_format="iso"),
    "an x86 kernel": linked(data(corpus.KERNEL, MIB), disk_format="aki", container_format="aki"),
    "an id in upper case": linked(DISK, id=UPPER),
    "an image that Nova has used": linked(DISK, beside("_20", ".lock", ".info")),
}

HOSTILE = {
    # Content that is not safe.
    "a backing file": refused(
        "qcow2 with a backing file", qemu("qcow2", "-F", "qcow2", "-b", "base"), disk_format="qcow2"
    ),
    "/etc/passwd as backing file": refused(
        "qcow2 with a backing file", corpus.BACKED, disk_format="qcow2"
    ),
    "a device as backing file": refused(
        "qcow2 with a backing file",
        qemu("qcow2", "-F", "raw", "-b", 'json:{"driver": "host_device", "filename": "/dev/sda"}'),
        disk_format="qcow2",
    ),
    "terminal escapes as backing file": refused(
        "qcow2 with a backing file",
        qemu("qcow2", "-F", "raw", "-b", f"file:{EVIL_FILE}"),
        disk_format="qcow2",
        name=EVIL,
    ),
    "a data file": refused(
        "qcow2 with an external data file", corpus.DATA_FILE, disk_format="qcow2"
    ),
    "a data file and a backing file": refused(
        "qcow2 with a backing file, with an external data file",
        qemu("qcow2", "-F", "raw", "-b", "/etc/passwd", "-o", "data_file=data"),
        disk_format="qcow2",
    ),
    "the name of a data file alone": refused(NAMED, corpus.NAMES_DATA_FILE, disk_format="qcow2"),
    "qcow2 of version 1": refused(UNKNOWN, qemu("qcow"), disk_format="qcow2"),
    "extended L2 entries": refused(
        UNKNOWN, qemu("qcow2", "-o", "extended_l2=on"), disk_format="qcow2"
    ),
    "a feature nobody knows": refused(
        UNKNOWN, patched(corpus.QCOW2, {72: b"\x80"}), disk_format="qcow2"
    ),
    "an empty partition table": refused(BROKEN_TABLE, data(mbr(), MIB)),
    "a broken partition": refused(BROKEN_TABLE, data(mbr(corpus.BROKEN), MIB)),
    "a GPT beside partitions": refused(BROKEN_TABLE, data(mbr(PROTECTIVE, LINUX), MIB)),
    # Content that is not what Glance says.
    "qcow2 as raw": mistaken("qcow2", "raw", corpus.BACKED),
    "qcow2 as a CD": mistaken("qcow2", "iso", corpus.BACKED),
    "qcow2 as a kernel": mistaken("qcow2", "aki", corpus.BACKED),
    "qcow2 as a ramdisk": mistaken("qcow2", "ari", corpus.BACKED),
    "qcow2 as a machine image": mistaken("qcow2", "ami", corpus.BACKED),
    "raw as qcow2": mistaken("raw", "qcow2", data(size=MIB)),
    "raw as a CD": mistaken("raw", "iso", data(size=MIB)),
    "a CD as raw": mistaken("iso", "raw", corpus.ISO_9660),
    "vmdk as raw": mistaken("vmdk", "raw", qemu("vmdk")),
    "vdi as raw": mistaken("vdi", "raw", qemu("vdi")),
    "vhdx as raw": mistaken("vhdx", "raw", qemu("vhdx")),
    "vhd as raw": mistaken("vhd", "raw", qemu("vpc")),
    "qed as raw": mistaken("qed", "raw", qemu("qed", "-F", "raw", "-b", "/etc/passwd")),
    "LUKS as raw": mistaken("luks", "raw", corpus.LUKS),
    "a vmdk that is /etc/passwd": mistaken("vmdk", "raw", corpus.VMDK_TEXT),
    "a vmdk that gives its type late": mistaken("vmdk", "raw", corpus.VMDK_LATE),
    "a vmdk that gives its type oddly": mistaken("vmdk", "raw", corpus.VMDK_ODD),
    "a vmdk of version 3": mistaken("vmdk", "raw", corpus.VMDK_3),
    "a vmdk with its tables at the end": mistaken("vmdk", "raw", corpus.VMDK_WITH_FOOTER),
    "a vhdx with its tables far away": mistaken("vhdx", "raw", corpus.VHDX_FAR_AWAY),
    "a qcow2 shorter than a sector": mistaken("qcow2", "raw", corpus.SHORT_QCOW2),
    "qcow2 and CD in one": mistaken("iso and qcow2", "qcow2", patched(corpus.QCOW2, ISO)),
    "CD and qcow2 in one": mistaken("iso and qcow2", "iso", patched(corpus.BACKED, ISO)),
    "qcow2 and disk in one": mistaken(
        "gpt and qcow2", "qcow2", patched(corpus.QCOW2, {510: b"\x55\xaa"})
    ),
    # What has the image's name is no file.
    "a link to a good file": refused("the file is a symbolic link", link(UPPER)),
    "a link to /etc/shadow": refused("the file is a symbolic link", link("/etc/shadow")),
    "a link to a file elsewhere": refused("the file is a symbolic link", link("../outside")),
    "a link to a device": refused("the file is a symbolic link", link("/dev/zero")),
    "a link to nothing": refused("the file is a symbolic link", link("/no/such/file")),
    "a FIFO": refused("the file is a FIFO", node_of(stat.S_IFIFO)),
    "a directory": refused("the file is a directory", Path.mkdir),
    "a socket": refused("the file is a socket", node_of(stat.S_IFSOCK)),
    "/dev/null": refused("the file is a device", node_of(stat.S_IFCHR, (1, 3))),
    "a disk of the host": refused("the file is a device", node_of(stat.S_IFBLK, (7, 0))),
    # The file is not whole, or not this image's.
    "a shorter file": waiting("4096 of 4097 bytes are here", DISK, size=4097),
    "a file of nothing": waiting("0 of 4096 bytes are here", data(), size=4096),
    "a size beyond all disks": waiting(f"4096 of {2**62} bytes are here", DISK, size=2**62),
    "a longer file": refused("the file has 4096 bytes, Glance says 4095", DISK, size=4095),
    "an empty image": skipped("empty", data(), size=0),
    "a file of an empty image": skipped("empty", DISK, size=0),
    "no size": skipped("Glance gives no size", DISK, size=None),
    "no file": skipped("no file here", nothing, size=4096),
    "no file, for now": waiting(
        "being copied into file", nothing, size=4096, os_glance_importing_to_stores="file"
    ),
    "a file that is being copied here": waiting(
        "being copied into file", DISK, os_glance_importing_to_stores="file"
    ),
    "an image that Nova downloads": Case("waiting", FETCHED, DISK, {}, beside(".part")),
    "an image that Nova converts": Case(
        "waiting", FETCHED, DISK, {}, beside(".part", ".converted")
    ),
    # Glance has not finished it, or offers it no longer; it does not list what is killed.
    "queued": waiting("status queued", DISK, status="queued"),
    "saving": waiting("status saving", DISK, status="saving"),
    "uploading": waiting("status uploading", DISK, status="uploading"),
    "importing": waiting("status importing", DISK, status="importing"),
    "deactivated": skipped("status deactivated", DISK, status="deactivated"),
    "pending_delete": skipped("status pending_delete", DISK, status="pending_delete"),
    "killed": skipped(UNKNOWN_FILE.reason, DISK, status="killed"),
    # Nobody asked for the format.
    "vmdk": skipped("disk format vmdk", qemu("vmdk"), disk_format="vmdk"),
    "vdi": skipped("disk format vdi", qemu("vdi"), disk_format="vdi"),
    "vhd": skipped("disk format vhd", qemu("vpc"), disk_format="vhd"),
    "vhdx": skipped("disk format vhdx", qemu("vhdx"), disk_format="vhdx"),
    "ploop": skipped("disk format ploop", qemu("parallels"), disk_format="ploop"),
    "no format": skipped("disk format unknown", DISK, disk_format=None),
    # Another has the cache name.
    "a name taken by the same bytes": occupied(
        "another file of the same size has the cache name", DISK
    ),
    "a name taken by other bytes": occupied(
        "another file has the cache name, and differs: 5 bytes, the image has 4096", data(b"other")
    ),
    "a name taken by a link to a good file": occupied(
        "the cache name is a symbolic link", link(f"../images/{UPPER}")
    ),
    "a name taken by a link to nothing": occupied(
        "the cache name is a symbolic link", link("/no/such/file")
    ),
    "a name taken by a directory": occupied("the cache name is a directory", Path.mkdir),
    "a name taken by a FIFO": occupied("the cache name is a FIFO", node_of(stat.S_IFIFO)),
    "a name taken by a link, and qcow2": occupied(
        "the cache name is a symbolic link",
        link("/no/such/file"),
        corpus.QCOW2,
        disk_format="qcow2",
    ),
    "a name taken by a socket, and qcow2": occupied(
        "the cache name is a socket", node_of(stat.S_IFSOCK), corpus.QCOW2, disk_format="qcow2"
    ),
    "a name taken by Nova's raw copy": occupied(
        RAW_COPY.reason, DISK, corpus.QCOW2, disk_format="qcow2"
    ),
    "a name taken by another qcow2": occupied(
        "another file of the same size has the cache name",
        corpus.QCOW2,
        corpus.QCOW2,
        disk_format="qcow2",
    ),
    # Its owner wants Nova to verify it.
    "a signed image": skipped(SIGNED, DISK, img_signature="c2lnbmVk"),
    # Ids that are none.
    "an id that leads out": skipped("not an image id", DISK, id="../outside"),
    "an id that is a directory": skipped("not an image id", nothing, id=".."),
    "an id that is absolute": skipped("not an image id", nothing, id="/etc/passwd"),
    "an id with a newline": skipped("not an image id", DISK, id=UPPER.lower() + "\n"),
    "an id with terminal escapes": skipped("not an image id", DISK, id="\x1b[31m" + UPPER),
    "an id without dashes": skipped("not an image id", DISK, id=UPPER.replace("-", "")),
    "an id in braces": skipped("not an image id", DISK, id=f"{{{UPPER}}}"),
}
CASES = GOOD | HOSTILE
DEVICES = {"/dev/null", "a disk of the host"}
MET = {what: case for what, case in CASES.items() if os.getuid() == 0 or what not in DEVICES}


@dataclass(frozen=True, repr=False)
class Met:
    """What became of the corpus in two passes: one as cron makes it, then one over every image."""

    node: Node
    ids: dict[str, str]
    statuses: tuple[int, int]
    outcomes: dict[str, tuple[str, str]]
    printed: dict[str, str]
    before: "State"
    between: "State"
    after: "State"


State = dict[Path, tuple[object, ...]]


def place(node: Node) -> dict[str, str]:
    """Makes every case's image and files, and returns the ids."""
    ids = {}
    for (what, case), given in zip(MET.items(), node.cloud.add_many(len(MET)), strict=True):
        (node.images / given).unlink()
        ids[what] = str(case.glance.get("id", given))
        file = node.images / ids[what]
        case.file(file)
        if case.entry:
            case.entry(node.entry(ids[what]))
        size = file.stat().st_size if file.is_file() and not file.is_symlink() else 4096
        row = {"id": given, "name": what, "size": size} | case.glance
        properties = {name: row.pop(name) for name in PROPERTIES if name in row}
        with node.cloud.database() as database:
            database.execute(
                f"UPDATE images SET {', '.join(f'{column} = ?' for column in row)} WHERE id = ?",  # noqa: S608
                (*row.values(), given),
            )
            database.executemany(
                "INSERT INTO image_properties (image_id, name, value, deleted, created_at)"
                " VALUES (?, ?, ?, 0, '2026-01-01 00:00:00')",
                [(given, name, value) for name, value in properties.items()],
            )
    for name in NOVAS:
        (node.cache / name).write_bytes(b"nova's own")
    return ids


def state(*places: Path) -> State:
    """All that a run could change of every file in some places: never followed."""

    def of(path: Path) -> tuple[object, ...]:
        status = path.lstat()
        kept = (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            status.st_size,
        )
        return (*kept, status.st_mtime_ns, status.st_ctime_ns)

    return {path: of(path) for root in places for path in (root, *root.rglob("*"))}


@pytest.fixture(scope="module")
def met(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Met]:
    """The whole corpus, met by the installed command."""
    node = Node(cloud, cloud.directory / "cache-of-the-corpus")
    node.cache.mkdir()
    outside, log = cloud.directory / "outside", tmp_path_factory.mktemp("log") / "log"
    hosts = [Path(path) for path in ("/etc/passwd", "/etc/shadow", "/dev/null", "/dev/zero")]
    try:
        ids = place(node)
        before = state(outside, cloud.images, node.cache, *hosts)
        first = node.run("-v", "--log-file", str(log))
        between = state(outside, cloud.images, node.cache, *hosts)
        second = node.run("--full", "--format", "json", "-v", "--log-file", str(log))
        after = state(outside, cloud.images, node.cache, *hosts)
        images = json.loads(second.stdout)["images"]
        outcomes = {image["id"]: (image["outcome"], image["reason"]) for image in images}
        printed = {
            "table": first.stdout,
            "errors": first.stderr,
            "document": second.stdout,
            "more errors": second.stderr,
            "log": log.read_bytes().decode(),
        }
        yield Met(
            node,
            ids,
            (first.returncode, second.returncode),
            outcomes,
            printed,
            before,
            between,
            after,
        )
    finally:
        outside.unlink(missing_ok=True)
        cloud.clear()


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=needs_root if what in DEVICES else ()) for what in CASES]
)
def test_the_outcome_of(met: Met, what: str) -> None:
    """Every image has the outcome and the reason that the table says."""
    case = CASES[what]
    expected = (case.outcome, case.reason) if what in HOSTILE else ("present", "")
    assert met.outcomes[met.ids[what]] == expected


@pytest.mark.parametrize("what", GOOD)
def test_what_is_good_is_linked_all_the_same(met: Met, what: str) -> None:
    """A good image among hostile ones is linked by the first pass, with its owner and mode."""
    assert met.node.linked(met.ids[what])
    assert met.node.entry(met.ids[what]) in met.between


def test_no_tenant_can_make_a_pass_fail(met: Met) -> None:
    """Whatever tenants upload, nothing fails.

    The exit status and standard error are the operator's alarm.
    """
    assert met.statuses == (0, 0)
    assert "failed" not in met.printed["errors"] + met.printed["more errors"]
    assert set(met.outcomes) == set(met.ids.values())


def test_nothing_else_has_changed(met: Met) -> None:
    """No hostile file, no target of a link, none of Nova's files and nothing outside is touched, not even its times.

    Only the good images' files have changed, only their cache names are new, and the second pass changes nothing.
    """
    node = met.node
    links = {node.entry(met.ids[what]) for what in GOOD}
    changed = {
        path for path in met.before | met.between if met.before.get(path) != met.between.get(path)
    }
    assert changed == {node.images / met.ids[what] for what in GOOD} | links | {node.cache}
    assert met.between.keys() - met.before.keys() == links
    assert met.after == met.between


def test_what_is_printed_has_no_control_characters(met: Met) -> None:
    """Names and ids are escaped in the table, the document, the log and the errors, and content is in none."""
    for text in met.printed.values():
        assert [line for line in text.split("\n") if not line.isprintable()] == []
        assert "evil" not in text
        assert "Traceback" not in text
    escaped = EVIL.encode("unicode_escape").decode()
    assert f"linked: {met.ids['a raw disk']} ({escaped[:60]}" in met.printed["log"]
    # Each run says what it has linked, and what somebody should look at.
    said = Counter(line.split()[4] for line in met.printed["log"].splitlines())
    found = Counter(f"{case.outcome}:" for case in MET.values())
    assert (said["linked:"], said["refused:"], said["occupied:"]) == (
        len(GOOD),
        2 * found["refused:"],
        2 * found["occupied:"],
    )
    assert met.printed["table"].count(escaped[:20]) == 2
