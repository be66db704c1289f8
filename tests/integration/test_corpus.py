"""Hostile and unfinished files through the real command on a real cloud.

The table is the specification. Every case is an image with a file where Glance would keep it. One
pass meets them all, beside good images.
"""

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from ln_images.model import Outcome, Reason
from ln_images.store import REFUSED_MARK
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
# These are no columns of Glance's table of images.
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
    """What becomes of an image, the file that it has, and what Glance says of it.

    Glance has an active raw image of the file's own size unless ``glance`` says otherwise.
    ``entry`` puts something under the image's cache name beforehand.
    """

    outcome: Outcome
    reason: Reason
    file: Make
    glance: dict[str, object]
    entry: Make | None = None


def linked(file: Make, entry: Make | None = None, **glance: object) -> Case:
    """Return the case of a good image."""
    return Case(Outcome.LINKED, Reason.NO_LINK_YET, file, glance, entry)


def unsafe(file: Make, **glance: object) -> Case:
    """Return the case of an image whose content is dangerous."""
    return Case(Outcome.REFUSED, Reason.UNSAFE_CONTENT, file, glance)


def other(stated: str, file: Make) -> Case:
    """Return the case of an image whose content is something else than Glance says."""
    return Case(Outcome.REFUSED, Reason.OTHER_CONTENT, file, {"disk_format": stated})


def no_file(file: Make) -> Case:
    """Return the case of an image with something else than a file under its name."""
    return Case(Outcome.REFUSED, Reason.NOT_A_REGULAR_FILE, file, {})


def waiting(reason: Reason, file: Make, entry: Make | None = None, **glance: object) -> Case:
    """Return the case of an image that may be linked later."""
    return Case(Outcome.WAITING, reason, file, glance, entry)


def skipped(reason: Reason, file: Make, **glance: object) -> Case:
    """Return the case of an image that is not to be linked."""
    return Case(Outcome.SKIPPED, reason, file, glance)


def occupied(reason: Reason, entry: Make, file: Make | None = None, **glance: object) -> Case:
    """Return the case of a good image, with something else under its cache name."""
    return Case(Outcome.OCCUPIED, reason, file or DISK, glance, entry)


def link(target: str) -> Make:
    """Make a symbolic link."""
    return lambda path: path.symlink_to(target)


def node_of(kind: int, device: tuple[int, int] = (0, 0)) -> Make:
    """Make a FIFO, a socket or a device."""
    return lambda path: os.mknod(path, kind | 0o644, os.makedev(*device))


def nothing(_path: Path) -> None:
    """Make no file at all."""


def beside(*suffixes: str) -> Make:
    """Make Nova's own files beside a cache name."""

    def make(path: Path) -> None:
        for suffix in suffixes:
            path.with_name(path.name + suffix).write_bytes(b"nova's own")

    return make


def planted(*suffixes: str) -> Make:
    """Make directories with the names of Nova's own files beside a cache name."""

    def make(path: Path) -> None:
        for suffix in suffixes:
            path.with_name(path.name + suffix).mkdir()

    return make


DISK = data(mbr(LINUX), 4096)

GOOD = {
    "a raw disk": linked(DISK, name=EVIL),
    "a qcow2 disk": linked(corpus.QCOW2, disk_format="qcow2"),
    "a hybrid CD": linked(patched(data(mbr(PROTECTIVE), MIB), ISO), disk_format="iso"),
    "an x86 kernel": linked(data(corpus.KERNEL, MIB), disk_format="aki", container_format="aki"),
    "an id in upper case": linked(DISK, id=UPPER),
    "a directory named like a download": linked(DISK, planted(".part", ".converted")),
    "an image that Nova has used": linked(DISK, beside("_20", ".lock", ".info")),
}

HOSTILE = {
    # Content that is not safe.
    "a backing file": unsafe(qemu("qcow2", "-F", "qcow2", "-b", "base"), disk_format="qcow2"),
    "/etc/passwd as backing file": unsafe(corpus.BACKED, disk_format="qcow2"),
    "a device as backing file": unsafe(
        qemu("qcow2", "-F", "raw", "-b", 'json:{"driver": "host_device", "filename": "/dev/sda"}'),
        disk_format="qcow2",
    ),
    "terminal escapes as backing file": unsafe(
        qemu("qcow2", "-F", "raw", "-b", f"file:{EVIL_FILE}"),
        disk_format="qcow2",
        name=EVIL,
    ),
    "a data file": unsafe(corpus.DATA_FILE, disk_format="qcow2"),
    "a data file and a backing file": unsafe(
        qemu("qcow2", "-F", "raw", "-b", "/etc/passwd", "-o", "data_file=data"),
        disk_format="qcow2",
    ),
    "the name of a data file alone": unsafe(corpus.NAMES_DATA_FILE, disk_format="qcow2"),
    "qcow2 of version 1": unsafe(qemu("qcow"), disk_format="qcow2"),
    "extended L2 entries": unsafe(qemu("qcow2", "-o", "extended_l2=on"), disk_format="qcow2"),
    "a feature nobody knows": unsafe(patched(corpus.QCOW2, {72: b"\x80"}), disk_format="qcow2"),
    "an empty partition table": unsafe(data(mbr(), MIB)),
    "a broken partition": unsafe(data(mbr(corpus.BROKEN), MIB)),
    "a GPT beside partitions": unsafe(data(mbr(PROTECTIVE, LINUX), MIB)),
    # Content that is not what Glance says.
    "qcow2 as raw": other("raw", corpus.BACKED),
    "qcow2 as a CD": other("iso", corpus.BACKED),
    "qcow2 as a kernel": other("aki", corpus.BACKED),
    "qcow2 as a ramdisk": other("ari", corpus.BACKED),
    "qcow2 as a machine image": other("ami", corpus.BACKED),
    "raw as qcow2": other("qcow2", data(size=MIB)),
    "raw as a CD": other("iso", data(size=MIB)),
    "a CD as raw": other("raw", corpus.ISO_9660),
    "vmdk as raw": other("raw", qemu("vmdk")),
    "vdi as raw": other("raw", qemu("vdi")),
    "vhdx as raw": other("raw", qemu("vhdx")),
    "vhd as raw": other("raw", qemu("vpc")),
    "qed as raw": other("raw", qemu("qed", "-F", "raw", "-b", "/etc/passwd")),
    "LUKS as raw": other("raw", corpus.LUKS),
    "a vmdk that is /etc/passwd": other("raw", corpus.VMDK_TEXT),
    "a vmdk that gives its type late": other("raw", corpus.VMDK_LATE),
    "a vmdk that gives its type oddly": other("raw", corpus.VMDK_ODD),
    "a vmdk of version 3": other("raw", corpus.VMDK_3),
    "a vmdk with its tables at the end": other("raw", corpus.VMDK_WITH_FOOTER),
    "a vhdx with its tables far away": other("raw", corpus.VHDX_FAR_AWAY),
    "a qcow2 shorter than a sector": other("raw", corpus.SHORT_QCOW2),
    "qcow2 and CD in one": other("qcow2", patched(corpus.QCOW2, ISO)),
    "CD and qcow2 in one": other("iso", patched(corpus.BACKED, ISO)),
    "qcow2 and disk in one": other("qcow2", patched(corpus.QCOW2, {510: b"\x55\xaa"})),
    # What has the image's name is no file.
    "a link to a good file": no_file(link(UPPER)),
    "a link to /etc/shadow": no_file(link("/etc/shadow")),
    "a link to a file elsewhere": no_file(link("../outside")),
    "a link to a device": no_file(link("/dev/zero")),
    "a link to nothing": no_file(link("/no/such/file")),
    "a FIFO": no_file(node_of(stat.S_IFIFO)),
    "a directory": no_file(Path.mkdir),
    "a socket": no_file(node_of(stat.S_IFSOCK)),
    "/dev/null": no_file(node_of(stat.S_IFCHR, (1, 3))),
    "a disk of the host": no_file(node_of(stat.S_IFBLK, (7, 0))),
    "a qcow2 full of header extensions": Case(
        Outcome.REFUSED,
        Reason.UNCHECKABLE_CONTENT,
        patched(qemu("qcow2", "-o", "cluster_size=2M"), {112: struct.pack(">II", 1, 0) * 262_000}),
        {"disk_format": "qcow2"},
    ),
    # The file is not whole, or not this image's.
    "a shorter file": waiting(Reason.FILE_INCOMPLETE, DISK, size=4097),
    "a file of nothing": waiting(Reason.FILE_INCOMPLETE, data(), size=4096),
    "a size beyond all disks": waiting(Reason.FILE_INCOMPLETE, DISK, size=2**62),
    "a longer file": Case(Outcome.REFUSED, Reason.FILE_TOO_LONG, DISK, {"size": 4095}),
    "an empty image": skipped(Reason.EMPTY, data(), size=0),
    "a file of an empty image": skipped(Reason.EMPTY, DISK, size=0),
    "no size": skipped(Reason.NO_SIZE, DISK, size=None),
    "no file": skipped(Reason.NO_FILE, nothing, size=4096),
    "no file, for now": waiting(
        Reason.BEING_COPIED, nothing, size=4096, os_glance_importing_to_stores="file"
    ),
    "a file that is being copied here": waiting(
        Reason.BEING_COPIED, DISK, os_glance_importing_to_stores="file"
    ),
    "an image that Nova downloads": waiting(Reason.NOVA_IS_DOWNLOADING, DISK, beside(".part")),
    "an image that Nova converts": waiting(
        Reason.NOVA_IS_DOWNLOADING, DISK, beside(".part", ".converted")
    ),
    # Glance has not finished it, or offers it no longer; it does not list what is killed.
    "queued": waiting(Reason.NOT_FINISHED, DISK, status="queued"),
    "saving": waiting(Reason.NOT_FINISHED, DISK, status="saving"),
    "uploading": waiting(Reason.NOT_FINISHED, DISK, status="uploading"),
    "importing": waiting(Reason.NOT_FINISHED, DISK, status="importing"),
    "deactivated": skipped(Reason.STATUS, DISK, status="deactivated"),
    "pending_delete": skipped(Reason.STATUS, DISK, status="pending_delete"),
    "killed": skipped(Reason.UNKNOWN_TO_GLANCE, DISK, status="killed"),
    # Nobody asked for the format.
    "vmdk": skipped(Reason.DISK_FORMAT, qemu("vmdk"), disk_format="vmdk"),
    "vdi": skipped(Reason.DISK_FORMAT, qemu("vdi"), disk_format="vdi"),
    "vhd": skipped(Reason.DISK_FORMAT, qemu("vpc"), disk_format="vhd"),
    "vhdx": skipped(Reason.DISK_FORMAT, qemu("vhdx"), disk_format="vhdx"),
    "ploop": skipped(Reason.DISK_FORMAT, qemu("parallels"), disk_format="ploop"),
    "no format": skipped(Reason.DISK_FORMAT, DISK, disk_format=None),
    # No hypervisor boots it.
    "a compressed container": skipped(Reason.COMPRESSED, DISK, container_format="compressed"),
    # Another has the cache name.
    "a name taken by the same bytes": occupied(Reason.OTHER_FILE, DISK),
    "a name taken by other bytes": occupied(Reason.OTHER_FILE, data(b"other")),
    "a name taken by a link to a good file": occupied(
        Reason.OTHER_KIND_OF_FILE, link(f"../images/{UPPER}")
    ),
    "a name taken by a link to nothing": occupied(Reason.OTHER_KIND_OF_FILE, link("/no/such/file")),
    "a name taken by a directory": occupied(Reason.OTHER_KIND_OF_FILE, Path.mkdir),
    "a name taken by a FIFO": occupied(Reason.OTHER_KIND_OF_FILE, node_of(stat.S_IFIFO)),
    "a name taken by a link, and qcow2": occupied(
        Reason.OTHER_KIND_OF_FILE,
        link("/no/such/file"),
        corpus.QCOW2,
        disk_format="qcow2",
    ),
    "a name taken by a socket, and qcow2": occupied(
        Reason.OTHER_KIND_OF_FILE, node_of(stat.S_IFSOCK), corpus.QCOW2, disk_format="qcow2"
    ),
    "a name taken by Nova's raw copy": occupied(
        Reason.RAW_COPY, DISK, corpus.QCOW2, disk_format="qcow2"
    ),
    "a name taken by another qcow2": occupied(
        Reason.OTHER_FILE,
        corpus.QCOW2,
        corpus.QCOW2,
        disk_format="qcow2",
    ),
    "a name taken by a device": occupied(
        Reason.OTHER_KIND_OF_FILE,
        node_of(stat.S_IFCHR, (1, 3)),
        corpus.QCOW2,
        disk_format="qcow2",
    ),
    # Its owner wants Nova to verify it.
    "a signed image": skipped(Reason.SIGNED, DISK, img_signature="c2lnbmVk"),
    # Ids that are none.
    "an id that leads out": skipped(Reason.NOT_AN_IMAGE_ID, DISK, id="../outside"),
    "an id that is a directory": skipped(Reason.NOT_AN_IMAGE_ID, nothing, id=".."),
    "an id that is absolute": skipped(Reason.NOT_AN_IMAGE_ID, nothing, id="/etc/passwd"),
    "an id with a newline": skipped(Reason.NOT_AN_IMAGE_ID, DISK, id=UPPER.lower() + "\n"),
    "an id with terminal escapes": skipped(Reason.NOT_AN_IMAGE_ID, DISK, id="\x1b[31m" + UPPER),
    "an id without dashes": skipped(Reason.NOT_AN_IMAGE_ID, DISK, id=UPPER.replace("-", "")),
    "an id in braces": skipped(Reason.NOT_AN_IMAGE_ID, DISK, id=f"{{{UPPER}}}"),
}
CASES = GOOD | HOSTILE
DEVICES = {"/dev/null", "a disk of the host", "a name taken by a device"}
MET = {what: case for what, case in CASES.items() if os.getuid() == 0 or what not in DEVICES}


@dataclass(frozen=True, repr=False)
class Met:
    """What became of the corpus in two passes: one of cron's, then one over every image."""

    node: Node
    ids: dict[str, str]
    statuses: tuple[int, int]
    codes: dict[str, tuple[str, str]]
    printed: dict[str, str]
    before: "State"
    between: "State"
    after: "State"


State = dict[Path, tuple[object, ...]]


def place(node: Node) -> dict[str, str]:
    """Make every case's image and files, and return the ids."""
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
    """Return all that a pass could change of every file in some places; links are not followed."""

    def of(path: Path) -> tuple[object, ...]:
        status = path.lstat()
        kept = (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            # On CephFS the size of a directory is that of all files in it, with a delay.
            0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        )
        return (*kept, status.st_mtime_ns, status.st_ctime_ns)

    return {path: of(path) for root in places for path in (root, *root.rglob("*"))}


@pytest.fixture(scope="module")
def met(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Met]:
    """Let the command meet the whole corpus."""
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
        codes = {image["id"]: (image["outcome"], image["reason_code"]) for image in images}
        printed = {
            "table": first.stdout,
            "errors": first.stderr,
            "document": second.stdout,
            "more errors": second.stderr,
            "log": log.read_bytes().decode(),
        }
        yield Met(
            node=node,
            ids=ids,
            statuses=(first.returncode, second.returncode),
            codes=codes,
            printed=printed,
            before=before,
            between=between,
            after=after,
        )
    finally:
        outside.unlink(missing_ok=True)
        cloud.clear()


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=needs_root if what in DEVICES else ()) for what in CASES]
)
def test_the_outcome_of(met: Met, what: str) -> None:
    """Every image has the outcome and the reason code that the table says."""
    case = CASES[what]
    expected = (case.outcome, case.reason) if what in HOSTILE else ("present", "correct")
    assert met.codes[met.ids[what]] == expected


@pytest.mark.parametrize("what", GOOD)
def test_a_good_image_is_linked_all_the_same(met: Met, what: str) -> None:
    """A good image among hostile ones is linked by the first pass, with its owner and mode."""
    assert met.node.is_linked(met.ids[what])
    assert met.node.entry(met.ids[what]) in met.between


def test_no_tenant_can_make_a_pass_fail(met: Met) -> None:
    """Whatever tenants upload, nothing fails: exit status and standard error are for faults."""
    assert met.statuses == (0, 0)
    assert "failed" not in met.printed["errors"] + met.printed["more errors"]
    assert set(met.codes) == set(met.ids.values())


def test_nothing_else_has_changed(met: Met) -> None:
    """No hostile file, no target of a link and none of Nova's files is touched.

    The first pass changes the good images' files, and leaves a mark on the files whose content it
    refused, which renews their ctime. It makes the good images' cache names. The second pass
    changes nothing.
    """
    node = met.node
    links = {node.entry(met.ids[what]) for what in GOOD}
    inspected = (Reason.OTHER_CONTENT, Reason.UNSAFE_CONTENT, Reason.UNCHECKABLE_CONTENT)
    marked = {node.images / met.ids[what] for what, case in MET.items() if case.reason in inspected}
    changed = {
        path for path in met.before | met.between if met.before.get(path) != met.between.get(path)
    }
    good = {node.images / met.ids[what] for what in GOOD}
    assert changed == good | marked | links | {node.cache}
    assert met.between.keys() - met.before.keys() == links
    assert met.after == met.between
    for path in marked:
        *before, _ctime = met.before[path]
        *after, _ctime = met.after[path]
        assert before == after, "only the ctime has changed"
        assert os.listxattr(path) == [REFUSED_MARK]


def test_output_has_no_control_characters(met: Met) -> None:
    """Names and ids are escaped in the table, the document, the log and the errors."""
    for text in met.printed.values():
        assert [line for line in text.split("\n") if not line.isprintable()] == []
        assert "evil" not in text
        assert "Traceback" not in text
    escaped = EVIL.encode("unicode_escape").decode()
    assert f"linked: {met.ids['a raw disk']} ({escaped[:60]}" in met.printed["log"]
    assert met.printed["table"].count(escaped[:20]) == 2


def test_each_pass_logs_what_somebody_should_look_at(met: Met) -> None:
    """Each pass of a process logs what it linked, and five of each kind of problem."""
    logged = Counter(line.split()[4] for line in met.printed["log"].splitlines())
    found = Counter(f"{case.outcome}:" for case in MET.values())
    assert logged["linked:"] == len(GOOD)
    for kind in ("refused:", "occupied:"):
        # One more line has the number of the others.
        lines = found[kind] if found[kind] <= 5 else 6
        assert logged[kind] == 2 * lines
