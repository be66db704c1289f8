"""Inspection of content: real files, compared with what QEMU itself recognises."""

import json
import os
import random
import re
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_images.inspection import Objection, inspect
from ln_images.model import Reason
from support import corpus
from support.corpus import ISO, KIB, LINUX, MIB, PROTECTIVE, Make, data, mbr, patched, qemu

DISK_FORMATS = ("raw", "ami", "aki", "ari", "iso", "qcow2")
GPT = mbr(PROTECTIVE) + b"EFI PART".ljust(512, b"\0")
MARKER = b"passw0rd"

BACKED = (Reason.UNSAFE_CONTENT, "qcow2 with a backing file")
NAMED = (Reason.UNSAFE_CONTENT, "qcow2 with the name of an external data file")
FEATURES = (Reason.UNSAFE_CONTENT, "qcow2 of an unknown version or with unknown features")
BROKEN_TABLE = (Reason.UNSAFE_CONTENT, "raw with a partition table that is not valid")
UNCHECKABLE = (Reason.UNCHECKABLE_CONTENT, "the content cannot be inspected (ValueError)")
# Extensions of a qcow2 header: their types and what they hold.
DATA_FILE, ODD, END = (0x44415441, b"/etc/passwd"), (0x0DD, b"12345"), (0, b"")
VERSION_2 = {7: b"\2"}


def extensions(offset: int, *found: tuple[int, bytes]) -> dict[int, bytes]:
    """Return the patches that put extensions at an offset of a header."""
    padded = (
        struct.pack(">II", kind, len(text)) + text + bytes(-len(text) % 8) for kind, text in found
    )
    return {offset: b"".join(padded)}


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file as the command does: for reading only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def inspect_path(path: Path, disk_format: str) -> Objection | None:
    """Return the objection to a file."""
    with opened(path) as descriptor:
        return inspect(descriptor, disk_format)


def recognised_by_qemu(path: str, *descriptors: int) -> dict[str, object] | None:
    """Return what QEMU recognises in a file by itself, or None if it cannot open it."""
    command = ["qemu-img", "info", "--force-share", "--output=json", path]
    run = subprocess.run(
        command, capture_output=True, pass_fds=descriptors, timeout=60, check=False
    )
    return json.loads(run.stdout) if run.returncode == 0 else None


ACCEPTED: dict[str, tuple[str, Make]] = {
    "zeros": ("raw", data(size=MIB)),
    "random bytes": ("raw", corpus.NOISE),
    "one byte": ("raw", data(b"\0")),
    "a few bytes, as tests upload them": ("raw", data(b"hello")),
    "a text": ("raw", data(b"#!/bin/sh\necho hello\n" * 1000)),
    "a short text": ("raw", data(b"#cloud-config\n")),
    "an ext4 file system": ("raw", patched(data(size=MIB), {1080: b"\x53\xef"})),
    "a FAT file system": (
        "raw",
        data(b"\xeb\x3c\x90".ljust(16) + b"\2".ljust(5) + b"\xf8".ljust(489) + b"\x55\xaa"),
    ),
    "a partitioned disk": ("raw", data(mbr(LINUX), MIB)),
    "a disk with four partitions": ("raw", data(mbr(*[LINUX] * 4), MIB)),
    "a GPT disk": ("raw", data(GPT, MIB)),
    "a disk of 64 GiB": ("raw", data(GPT, 64 * KIB * MIB)),
    "a machine image": ("ami", data(size=MIB)),
    "a partitioned machine image": ("ami", data(mbr(LINUX), MIB)),
    "an x86 kernel": ("aki", data(corpus.KERNEL, MIB)),
    "an arm64 kernel": ("aki", data(b"MZ".ljust(56, b"\0") + b"ARM\x64", MIB)),
    "a ramdisk": ("ari", data(b"\x1f\x8b\x08\0" + bytes(range(256)) * 100)),
    "an uncompressed ramdisk": ("ari", data(b"070701" + b"0" * 104 + b".\0\0\0", MIB)),
    "a CD": ("iso", corpus.ISO_9660),
    "a DVD": ("iso", patched(data(size=64 * KIB), {32 * KIB: b"\0NSR03\1"})),
    "a hybrid CD": ("iso", patched(data(GPT, 64 * KIB), ISO)),
    "qcow2 of today": ("qcow2", corpus.QCOW2),
    "qcow2 of 2010": ("qcow2", qemu("qcow2", "-o", "compat=0.10")),
    "qcow2 of 8 TiB": ("qcow2", qemu("qcow2", size="8T")),
    "qcow2 with extensions that nobody knows": (
        "qcow2",
        patched(corpus.QCOW2, extensions(112, ODD, ODD, END, DATA_FILE)),
    ),
    "qcow2 with every harmless feature": (
        "qcow2",
        qemu(
            "qcow2",
            "-o",
            "compression_type=zstd,lazy_refcounts=on,preallocation=metadata,cluster_size=2M",
        ),
    ),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_content_that_is_safe_and_as_glance_says_is_accepted(tmp_path: Path, what: str) -> None:
    """Every kind of disk that people upload passes as what it is, and QEMU recognises the same."""
    disk_format, make = ACCEPTED[what]
    make(tmp_path / "image")
    assert inspect_path(tmp_path / "image", disk_format) is None
    seen = recognised_by_qemu(str(tmp_path / "image"))
    assert seen
    assert seen["format"] == ("qcow2" if disk_format == "qcow2" else "raw")


def other(content: str, stated: str) -> tuple[Reason, str]:
    """Return the objection to content that is something else than Glance says."""
    remedy = "upload it again as what it is, and delete this image"
    return Reason.OTHER_CONTENT, f"the content is {content}, Glance says {stated}; {remedy}"


REFUSED: dict[str, tuple[str, Make, tuple[Reason, str]]] = {
    "a backing file": ("qcow2", corpus.BACKED, BACKED),
    "a backing file, 2010": (
        "qcow2",
        qemu("qcow2", "-F", "raw", "-b", "/etc/passwd", "-o", "compat=0.10"),
        BACKED,
    ),
    "the name of a data file": ("qcow2", corpus.NAMES_DATA_FILE, NAMED),
    "the name of a data file, 2010": (
        "qcow2",
        patched(corpus.QCOW2, VERSION_2, extensions(72, DATA_FILE)),
        NAMED,
    ),
    "the name of a data file behind others": (
        "qcow2",
        patched(corpus.QCOW2, extensions(112, ODD, DATA_FILE)),
        NAMED,
    ),
    "the name of a data file at the end of a cluster": (
        "qcow2",
        patched(corpus.QCOW2, extensions(112, (1, bytes(64 * KIB - 112 - 8 - 16)), DATA_FILE)),
        NAMED,
    ),
    "a header extension that is too long": (
        "qcow2",
        patched(corpus.QCOW2, {112: struct.pack(">II", 1, 64 * KIB)}),
        UNCHECKABLE,
    ),
    "more header extensions than QEMU ever writes": (
        "qcow2",
        patched(corpus.QCOW2, extensions(112, *[(1, b"")] * 101)),
        UNCHECKABLE,
    ),
    "a header extension with a length beyond all clusters": (
        "qcow2",
        patched(corpus.QCOW2, {112: struct.pack(">II", 1, 0xFFFFFFFF)}),
        UNCHECKABLE,
    ),
    "a data file": (
        "qcow2",
        corpus.DATA_FILE,
        (Reason.UNSAFE_CONTENT, "qcow2 with an external data file"),
    ),
    "both": (
        "qcow2",
        qemu("qcow2", "-o", "data_file=data", "-F", "raw", "-b", "/etc/passwd"),
        (Reason.UNSAFE_CONTENT, "qcow2 with a backing file, with an external data file"),
    ),
    "version 1": ("qcow2", qemu("qcow"), FEATURES),
    "version 4": (
        "qcow2",
        patched(corpus.QCOW2, {7: b"\4"}),
        FEATURES,
    ),
    "extended L2 entries": (
        "qcow2",
        qemu("qcow2", "-o", "extended_l2=on"),
        FEATURES,
    ),
    "a feature nobody knows": (
        "qcow2",
        patched(corpus.QCOW2, {72: b"\x80"}),
        FEATURES,
    ),
    "an empty partition table": (
        "raw",
        data(mbr(), MIB),
        BROKEN_TABLE,
    ),
    "a broken partition": (
        "raw",
        data(mbr(corpus.BROKEN), MIB),
        BROKEN_TABLE,
    ),
    "a GPT beside partitions": (
        "raw",
        data(mbr(PROTECTIVE, LINUX), MIB),
        BROKEN_TABLE,
    ),
    "a kernel as a disk": (
        "raw",
        data(corpus.KERNEL, MIB),
        BROKEN_TABLE,
    ),
    "qcow2 as raw": ("raw", corpus.QCOW2, other("qcow2", "raw")),
    "qcow2 as a kernel": ("aki", corpus.BACKED, other("qcow2", "aki")),
    "qcow2 as a ramdisk": ("ari", corpus.BACKED, other("qcow2", "ari")),
    "qcow2 as a machine image": ("ami", corpus.BACKED, other("qcow2", "ami")),
    "qcow2 as a CD": ("iso", corpus.QCOW2, other("qcow2", "iso")),
    "raw as qcow2": ("qcow2", data(size=MIB), other("raw", "qcow2")),
    "a partitioned disk as qcow2": ("qcow2", data(mbr(LINUX), MIB), other("gpt", "qcow2")),
    "raw as a CD": ("iso", data(size=MIB), other("raw", "iso")),
    "a partitioned disk as a CD": ("iso", data(mbr(LINUX), MIB), other("gpt", "iso")),
    "a CD as raw": ("raw", corpus.ISO_9660, other("iso", "raw")),
    "a hybrid CD as raw": ("raw", patched(data(GPT, 64 * KIB), ISO), other("gpt and iso", "raw")),
    "a CD that is cut short": ("iso", patched(corpus.ISO_9660, size=33 * KIB), other("raw", "iso")),
    "vmdk as raw": ("raw", qemu("vmdk"), other("vmdk", "raw")),
    "vdi as raw": ("raw", qemu("vdi"), other("vdi", "raw")),
    "vhd as raw": ("raw", qemu("vpc"), other("vhd", "raw")),
    "vhdx as raw": ("raw", qemu("vhdx"), other("vhdx", "raw")),
    "qed as raw": ("raw", qemu("qed"), other("qed", "raw")),
    "LUKS as raw": ("raw", corpus.LUKS, other("luks", "raw")),
    "qcow2 and CD in one": ("qcow2", patched(corpus.QCOW2, ISO), other("iso and qcow2", "qcow2")),
    "CD and qcow2 in one": ("iso", patched(corpus.QCOW2, ISO), other("iso and qcow2", "iso")),
    "qcow2 and disk in one": (
        "qcow2",
        patched(corpus.QCOW2, {510: b"\x55\xaa"}),
        other("gpt and qcow2", "qcow2"),
    ),
    "CD, disk and vmdk in one": (
        "iso",
        patched(qemu("vmdk"), {510: b"\x55\xaa"}, ISO),
        other("gpt and iso and vmdk", "iso"),
    ),
    "text of a vmdk as raw": (
        "raw",
        qemu("vmdk", "-o", "subformat=monolithicFlat"),
        other("vmdk", "raw"),
    ),
    "tables of vhdx far away": ("raw", corpus.VHDX_FAR_AWAY, other("vhdx", "raw")),
    "tables of vmdk far away": ("raw", corpus.VMDK_WITH_FOOTER, other("vmdk", "raw")),
    # What the library takes for raw and QEMU does not.
    "a qcow2 shorter than a sector": ("raw", corpus.SHORT_QCOW2, other("qcow2", "raw")),
    "a vmdk of version 3 with a parent": ("raw", corpus.VMDK_3, other("vmdk", "raw")),
    "a vmdk that gives its type late": ("raw", corpus.VMDK_LATE, other("vmdk", "raw")),
    "a vmdk that gives its type oddly": ("raw", corpus.VMDK_ODD, other("vmdk", "raw")),
    "a vmdk as a CD": (
        "iso",
        patched(data(b"version=1\n", 64 * KIB), ISO),
        other("iso and vmdk", "iso"),
    ),
    "three bytes, which QEMU fills up with zeros": ("raw", data(b"QED"), other("qed", "raw")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_content_that_is_unsafe_or_something_else_is_refused(tmp_path: Path, what: str) -> None:
    """Each danger and each mismatch has its reason code, and a sentence for operators."""
    disk_format, make, objection = REFUSED[what]
    make(tmp_path / "image")
    assert inspect_path(tmp_path / "image", disk_format) == objection


@pytest.mark.parametrize(
    "make", [corpus.SHORT_QCOW2, corpus.VMDK_3, corpus.VMDK_TEXT, corpus.VMDK_LATE, corpus.VMDK_ODD]
)
def test_the_hidden_dangers_are_real(tmp_path: Path, make: Make) -> None:
    """QEMU opens /etc/passwd for these by itself, though the library may take them for raw."""
    make(tmp_path / "image")
    assert "/etc/passwd" in json.dumps(recognised_by_qemu(str(tmp_path / "image")))


def count_reads(act: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes, and the calls, that this thread reads while it acts (proc_pid_io(5))."""

    def read_so_far() -> tuple[int, int]:
        # rchar: 323934931
        # wchar: 323929600
        # syscr: 632687
        fields = Path("/proc/thread-self/io").read_text().split()
        return int(fields[1]), int(fields[5])

    first, second = read_so_far(), read_so_far()
    act()
    last = read_so_far()
    own = second[0] - first[0], second[1] - first[1]
    return last[0] - second[0] - own[0], last[1] - second[1] - own[1]


@pytest.mark.parametrize(
    ("disk_format", "make", "at_most"),
    [
        ("raw", data(size=64 * KIB * MIB), 256 * KIB),
        ("raw", data(GPT, 64 * KIB * MIB), 256 * KIB),
        ("raw", patched(corpus.NOISE, size=64 * KIB * MIB), 256 * KIB),
        ("aki", data(corpus.KERNEL, 64 * KIB * MIB), 256 * KIB),
        ("qcow2", patched(corpus.QCOW2, size=64 * KIB * MIB), 256 * KIB),
        ("iso", patched(corpus.ISO_9660, size=64 * KIB * MIB), 256 * KIB),
        ("raw", patched(corpus.VHDX_FAR_AWAY, size=64 * KIB * MIB), 512 * KIB),
        ("raw", patched(corpus.VMDK_WITH_FOOTER, size=64 * KIB * MIB), 512 * KIB),
        ("raw", data(b"KDMV" + b"\xff" * 508, 64 * KIB * MIB), 512 * KIB),
    ],
)
def test_a_file_of_any_size_is_inspected_at_its_beginning_alone(
    tmp_path: Path, disk_format: str, make: Make, at_most: int
) -> None:
    """Of 64 GiB we read the first 256 KiB, or 512 KiB if a header claims that more is behind."""
    make(tmp_path / "image")
    inspect_path(tmp_path / "image", disk_format)
    with opened(tmp_path / "image") as descriptor:
        size, calls = count_reads(lambda: inspect(descriptor, disk_format))
    assert size <= at_most + 4 * KIB
    assert calls <= at_most // (4 * KIB) + 10


@pytest.mark.parametrize("length", [0, 8, 64])
def test_header_extensions_are_read_in_bounded_steps(tmp_path: Path, length: int) -> None:
    """A qcow2 whose first cluster is full of header extensions costs a hundred small reads."""
    cluster = qemu("qcow2", "-o", "cluster_size=2M")
    count = (2 * MIB - 112) // (8 + length)
    full = patched(cluster, extensions(112, *[(1, bytes(length))] * count))
    full(tmp_path / "image")
    with opened(tmp_path / "image") as descriptor:
        size, calls = count_reads(lambda: inspect(descriptor, "qcow2"))
    assert inspect_path(tmp_path / "image", "qcow2") == UNCHECKABLE
    assert size <= 260 * KIB
    assert calls <= 64 + 110


def test_the_measure_of_what_is_read_measures(tmp_path: Path) -> None:
    """The tests above would see a file that is read as a whole."""
    data(size=8 * MIB)(tmp_path / "file")
    size, _calls = count_reads((tmp_path / "file").read_bytes)
    assert 8 * MIB <= size <= 8 * MIB + 4 * KIB


@pytest.mark.parametrize("offset", [0, 1, 100 * KIB, 64 * MIB])
def test_the_descriptors_offset_is_neither_used_nor_moved(tmp_path: Path, offset: int) -> None:
    """Whatever a descriptor's offset is, the file is inspected from its beginning."""
    corpus.BACKED(tmp_path / "image")
    with opened(tmp_path / "image") as descriptor:
        os.lseek(descriptor, offset, os.SEEK_SET)
        assert inspect(descriptor, "qcow2") == BACKED
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == offset


@pytest.mark.parametrize("disk_format", DISK_FORMATS)
@pytest.mark.parametrize(
    "make",
    [
        data(MARKER * 10_000),
        qemu("qcow2", "-F", "raw", "-b", f"/{MARKER.decode()}\x1b[31m\n"),
        qemu("qcow2", "-o", f"data_file={MARKER.decode()}"),
        data(b'# Disk DescriptorFile\nversion=1\ncreateType="%s"\n%s\n' % (MARKER, MARKER)),
        patched(qemu("vmdk"), {512: b'createtype="%s"\n' % MARKER}),
        patched(qemu("vhdx"), {0x30000: MARKER}),
    ],
)
def test_no_bytes_of_the_file_are_in_a_sentence(
    tmp_path: Path, disk_format: str, make: Make
) -> None:
    """A sentence has our words alone: a tenant can put nothing into a log or a terminal."""
    make(tmp_path / "image")
    objection = inspect_path(tmp_path / "image", disk_format)
    if objection is not None:
        assert re.fullmatch(r"[A-Za-z0-9_ ,();]*", objection.sentence)
        assert MARKER.decode() not in objection.sentence


def test_a_file_that_cannot_be_read_is_no_objection(tmp_path: Path) -> None:
    """An error of the operating system is raised, and becomes the image's failed outcome."""
    with opened(tmp_path) as descriptor, pytest.raises(IsADirectoryError):
        inspect(descriptor, "raw")


HEADS: dict[str, Make] = {what: make for what, (_, make) in ACCEPTED.items()} | {
    "qcow2": corpus.QCOW2,
    "backed": corpus.BACKED,
    "short": corpus.SHORT_QCOW2,
    "data file": corpus.DATA_FILE,
    "qed": qemu("qed", "-F", "raw", "-b", "/etc/passwd"),
    "vmdk": qemu("vmdk"),
    "vmdk text": corpus.VMDK_ODD,
    "vmdk 3": corpus.VMDK_3,
    "vdi": qemu("vdi"),
    "vhdx": qemu("vhdx"),
    "vhd": qemu("vpc"),
    "ploop": qemu("parallels"),
    "luks": corpus.LUKS,
    "iso": patched(data(GPT, 64 * KIB), ISO),
    "disk": data(GPT),
    "noise": corpus.NOISE,
}
some_head = st.sampled_from(sorted(HEADS))
edits = st.dictionaries(
    st.integers(0, 128) | st.integers(0, 64 * KIB), st.binary(min_size=1, max_size=8), max_size=4
)
lengths = st.none() | st.integers(0, 600) | st.integers(0, 300 * KIB)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the beginnings of real files of every format."""
    directory = tmp_path_factory.mktemp("heads")
    for what, make in HEADS.items():
        patched(make, size=320 * KIB)(directory / what)
    return directory


@contextmanager
def in_memory(content: bytes) -> Iterator[int]:
    """Open a file that has no name."""
    descriptor = os.memfd_create("image")
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


def edited(content: bytes, changes: dict[int, bytes], length: int | None) -> bytes:
    """Return ``content`` with bytes put over it, cut to ``length``."""
    for offset, new in changes.items():
        content = content[:offset].ljust(offset, b"\0") + new + content[offset + len(new) :]
    return content[:length]


def assert_has_a_verdict(content: bytes, disk_format: str) -> None:
    """Assert that content is accepted, or refused with one printable line of our own words."""
    with in_memory(content) as descriptor:
        objection = inspect(descriptor, disk_format)
    assert objection is None or re.fullmatch(r"[A-Za-z0-9_ ,();]+", objection.sentence)


@given(st.binary(max_size=2 * KIB), st.sampled_from(DISK_FORMATS))
def test_any_bytes_have_a_verdict(content: bytes, disk_format: str) -> None:
    """Whatever the bytes are, and whatever Glance says, there is a verdict and no exception."""
    assert_has_a_verdict(content, disk_format)


@settings(max_examples=300)
@given(some_head, edits, lengths, st.sampled_from(DISK_FORMATS))
def test_any_broken_header_has_a_verdict(
    heads: Path, head: str, changes: dict[int, bytes], length: int | None, disk_format: str
) -> None:
    """The same holds for real files of every format that are changed and cut short anywhere."""
    assert_has_a_verdict(edited((heads / head).read_bytes(), changes, length), disk_format)


# The beginnings of other formats, and of what is in nobody's.
MAGIC = (
    b"QFI\xfb",
    b"KDMV",
    b"COWD",
    b"QED\0",
    b"vhdxfile",
    b"conectix",
    b"LUKS\xba\xbe",
    b"# Disk DescriptorFile\nversion=1\n",
)
# So many files are made. After a minute it is enough, if QEMU was run for so many accepted ones.
MUTATIONS, AT_MOST_SECONDS, AT_LEAST_ASKED = 3000, 60, 300


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return ``content`` with a few fields changed where formats have theirs, or its end cut off.

    Sometimes it gets another format's magic.
    """
    changes: dict[int, bytes] = {}
    for _ in range(chance.randint(1, 3)):
        offset = chance.choice(
            [chance.randrange(128), 4 * chance.randrange(64), chance.randrange(64 * KIB)]
        )
        small = chance.choice(
            [0, 1, 2, 4, 8, 0x70, 0x200, 0x10000, 0x44415441, 0xE2792ACA, 0xFFFFFFFF]
        )
        field = chance.choice(
            [struct.pack(">I", small), struct.pack("<I", small), chance.randbytes(1)]
        )
        changes[offset] = field
    if chance.random() < 0.1:
        changes[0] = chance.choice(MAGIC)
    return edited(
        content,
        changes,
        chance.choice([None, None, None, chance.randrange(1, 600), chance.randrange(1, 70 * KIB)]),
    )


def test_qemu_recognises_accepted_content_as_the_same(heads: Path) -> None:
    """No file is accepted in which QEMU sees another format, or a backing or data file.

    The files are some thousand beginnings of real files of every kind, with a few changes each.
    They are the same ones in each run.
    """
    chance = random.Random(34)  # noqa: S311
    kinds = [path.read_bytes() for path in sorted(heads.iterdir())]
    until = time.monotonic() + AT_MOST_SECONDS
    asked = 0
    for number in range(MUTATIONS):
        kind = chance.randrange(len(kinds))
        with in_memory(mutated(kinds[kind], chance)) as descriptor:
            # A machine image is inspected as a raw disk is, and a ramdisk as a kernel.
            formats = ("qcow2", "raw", "iso", "aki")
            accepted = (name for name in formats if inspect(descriptor, name) is None)
            stated = next(accepted, None)
            # QEMU need not be run for each of the many files that are raw.
            if stated is None or (stated != "qcow2" and chance.random() < 0.6):
                continue
            seen = recognised_by_qemu(f"/proc/self/fd/{descriptor}", descriptor)
        asked += 1
        # QEMU cannot open every broken qcow2 file; what is raw it always can.
        assert seen or stated == "qcow2", (number, kind)
        if seen:
            assert seen["format"] == ("qcow2" if stated == "qcow2" else "raw"), (number, kind)
            assert not {"backing-filename", "full-backing-filename"} & set(seen), (number, kind)
            assert "data-file" not in json.dumps(seen.get("format-specific")), (number, kind)
        if time.monotonic() > until and asked >= AT_LEAST_ASKED:
            break
    assert asked >= AT_LEAST_ASKED
