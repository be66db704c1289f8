"""Content: real files, judged through real descriptors, with QEMU's own word as the measure."""

import ctypes
import hashlib
import json
import mmap
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

from ln_images.inspection import can_digest, digest, objection
from support import corpus
from support.corpus import ISO, KIB, LINUX, MIB, PROTECTIVE, Make, data, mbr, patched, qemu
from support.node import needs_root

DISK_FORMATS = ("raw", "ami", "aki", "ari", "iso", "qcow2")
GPT = mbr(PROTECTIVE) + b"EFI PART".ljust(512, b"\0")
MARKER = b"passw0rd"

NAMED = "qcow2 with the name of an external data file"
# Extensions of a qcow2 header: their types and what they hold.
DATA_FILE, ODD, END = (0x44415441, b"/etc/passwd"), (0x0DD, b"12345"), (0, b"")
VERSION_2 = {7: b"\2"}


def extensions(offset: int, *found: tuple[int, bytes]) -> dict[int, bytes]:
    """What puts extensions at an offset of a header."""
    padded = (
        struct.pack(">II", kind, len(text)) + text + bytes(-len(text) % 8) for kind, text in found
    )
    return {offset: b"".join(padded)}


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor as the command has one: for reading only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def judge(path: Path, disk_format: str) -> str | None:
    """The objection to a file."""
    with opened(path) as descriptor:
        return objection(descriptor, disk_format)


def taken_for(path: str, *descriptors: int) -> dict[str, object] | None:
    """What QEMU takes a file for when nobody tells it, or None where it cannot open it."""
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
def test_what_is_as_glance_says_and_safe_is_accepted(tmp_path: Path, what: str) -> None:
    """Every kind of disk that people upload passes under its own disk format, and QEMU takes it for the same."""
    disk_format, make = ACCEPTED[what]
    make(tmp_path / "image")
    assert judge(tmp_path / "image", disk_format) is None
    seen = taken_for(str(tmp_path / "image"))
    assert seen
    assert seen["format"] == ("qcow2" if disk_format == "qcow2" else "raw")


def but(content: str, said: str) -> str:
    """The reason where content is something else than Glance says."""
    mend = "upload it again as what it is, and delete this one"
    return f"the content is {content}, Glance says {said}: {mend}"


REFUSED: dict[str, tuple[str, Make, str]] = {
    "a backing file": ("qcow2", corpus.BACKED, "qcow2 with a backing file"),
    "a backing file, 2010": (
        "qcow2",
        qemu("qcow2", "-F", "raw", "-b", "/etc/passwd", "-o", "compat=0.10"),
        "qcow2 with a backing file",
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
        "the content cannot be judged (ValueError)",
    ),
    "a data file": ("qcow2", corpus.DATA_FILE, "qcow2 with an external data file"),
    "both": (
        "qcow2",
        qemu("qcow2", "-o", "data_file=data", "-F", "raw", "-b", "/etc/passwd"),
        "qcow2 with a backing file, with an external data file",
    ),
    "version 1": ("qcow2", qemu("qcow"), "qcow2 of an unknown version or with unknown features"),
    "version 4": (
        "qcow2",
        patched(corpus.QCOW2, {7: b"\4"}),
        "qcow2 of an unknown version or with unknown features",
    ),
    "extended L2 entries": (
        "qcow2",
        qemu("qcow2", "-o", "extended_l2=on"),
        "qcow2 of an unknown version or with unknown features",
    ),
    "a feature nobody knows": (
        "qcow2",
        patched(corpus.QCOW2, {72: b"\x80"}),
        "qcow2 of an unknown version or with unknown features",
    ),
    "an empty partition table": (
        "raw",
        data(mbr(), MIB),
        "raw with a partition table that is not valid",
    ),
    "a broken partition": (
        "raw",
        data(mbr(corpus.BROKEN), MIB),
        "raw with a partition table that is not valid",
    ),
    "a GPT beside partitions": (
        "raw",
        data(mbr(PROTECTIVE, LINUX), MIB),
        "raw with a partition table that is not valid",
    ),
    "a kernel as a disk": (
        "raw",
        data(corpus.KERNEL, MIB),
        "raw with a partition table that is not valid",
    ),
    "qcow2 as raw": ("raw", corpus.QCOW2, but("qcow2", "raw")),
    "qcow2 as a kernel": ("aki", corpus.BACKED, but("qcow2", "aki")),
    "qcow2 as a ramdisk": ("ari", corpus.BACKED, but("qcow2", "ari")),
    "qcow2 as a machine image": ("ami", corpus.BACKED, but("qcow2", "ami")),
    "qcow2 as a CD": ("iso", corpus.QCOW2, but("qcow2", "iso")),
    "raw as qcow2": ("qcow2", data(size=MIB), but("raw", "qcow2")),
    "a partitioned disk as qcow2": ("qcow2", data(mbr(LINUX), MIB), but("gpt", "qcow2")),
    "raw as a CD": ("iso", data(size=MIB), but("raw", "iso")),
    "a partitioned disk as a CD": ("iso", data(mbr(LINUX), MIB), but("gpt", "iso")),
    "a CD as raw": ("raw", corpus.ISO_9660, but("iso", "raw")),
    "a hybrid CD as raw": ("raw", patched(data(GPT, 64 * KIB), ISO), but("gpt and iso", "raw")),
    "a CD that is cut short": ("iso", patched(corpus.ISO_9660, size=33 * KIB), but("raw", "iso")),
    "vmdk as raw": ("raw", qemu("vmdk"), but("vmdk", "raw")),
    "vdi as raw": ("raw", qemu("vdi"), but("vdi", "raw")),
    "vhd as raw": ("raw", qemu("vpc"), but("vhd", "raw")),
    "vhdx as raw": ("raw", qemu("vhdx"), but("vhdx", "raw")),
    "qed as raw": ("raw", qemu("qed"), but("qed", "raw")),
    "LUKS as raw": ("raw", corpus.LUKS, but("luks", "raw")),
    "qcow2 and CD in one": ("qcow2", patched(corpus.QCOW2, ISO), but("iso and qcow2", "qcow2")),
    "CD and qcow2 in one": ("iso", patched(corpus.QCOW2, ISO), but("iso and qcow2", "iso")),
    "qcow2 and disk in one": (
        "qcow2",
        patched(corpus.QCOW2, {510: b"\x55\xaa"}),
        but("gpt and qcow2", "qcow2"),
    ),
    "CD, disk and vmdk in one": (
        "iso",
        patched(qemu("vmdk"), {510: b"\x55\xaa"}, ISO),
        but("gpt and iso and vmdk", "iso"),
    ),
    "text of a vmdk as raw": (
        "raw",
        qemu("vmdk", "-o", "subformat=monolithicFlat"),
        but("vmdk", "raw"),
    ),
    "tables of vhdx far away": ("raw", corpus.VHDX_FAR_AWAY, but("vhdx", "raw")),
    "tables of vmdk far away": ("raw", corpus.VMDK_WITH_FOOTER, but("vmdk", "raw")),
    # What the library takes for raw and QEMU does not.
    "a qcow2 shorter than a sector": ("raw", corpus.SHORT_QCOW2, but("qcow2", "raw")),
    "a vmdk of version 3 with a parent": ("raw", corpus.VMDK_3, but("vmdk", "raw")),
    "a vmdk that gives its type late": ("raw", corpus.VMDK_LATE, but("vmdk", "raw")),
    "a vmdk that gives its type oddly": ("raw", corpus.VMDK_ODD, but("vmdk", "raw")),
    "a vmdk as a CD": (
        "iso",
        patched(data(b"version=1\n", 64 * KIB), ISO),
        but("iso and vmdk", "iso"),
    ),
    "three bytes, which QEMU fills up with zeros": ("raw", data(b"QED"), but("qed", "raw")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_unsafe_or_something_else_is_refused(tmp_path: Path, what: str) -> None:
    """Each danger and each mismatch has a reason that an operator understands."""
    disk_format, make, reason = REFUSED[what]
    make(tmp_path / "image")
    assert judge(tmp_path / "image", disk_format) == reason


@pytest.mark.parametrize(
    "make", [corpus.SHORT_QCOW2, corpus.VMDK_3, corpus.VMDK_TEXT, corpus.VMDK_LATE, corpus.VMDK_ODD]
)
def test_the_hidden_dangers_are_real(tmp_path: Path, make: Make) -> None:
    """Where nobody tells QEMU the format, these make it open /etc/passwd, though the library may take them for raw."""
    make(tmp_path / "image")
    assert "/etc/passwd" in json.dumps(taken_for(str(tmp_path / "image")))


def read_by(act: Callable[[], object]) -> int:
    """How many bytes this thread reads while it acts (proc_pid_io(5))."""

    def so_far() -> int:
        return int(Path("/proc/thread-self/io").read_text().split()[1])

    start = so_far()
    overhead = so_far() - start
    act()
    return so_far() - start - 2 * overhead


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
def test_a_file_of_any_size_is_judged_by_its_beginning(
    tmp_path: Path, disk_format: str, make: Make, at_most: int
) -> None:
    """Of 64 GiB no more than the first 256 KiB are read, and 512 KiB where a header claims more is further on."""
    make(tmp_path / "image")
    judge(tmp_path / "image", disk_format)
    with opened(tmp_path / "image") as descriptor:
        assert read_by(lambda: objection(descriptor, disk_format)) <= at_most + 4 * KIB


def test_the_measure_of_what_is_read_measures(tmp_path: Path) -> None:
    """The test above would see a file that is read whole."""
    data(size=8 * MIB)(tmp_path / "file")
    assert 8 * MIB <= read_by((tmp_path / "file").read_bytes) <= 8 * MIB + 4 * KIB


@pytest.mark.parametrize("offset", [0, 1, 100 * KIB, 64 * MIB])
def test_the_descriptors_offset_is_neither_used_nor_moved(tmp_path: Path, offset: int) -> None:
    """Wherever a descriptor stands, the file is judged from its beginning and the descriptor stays there."""
    corpus.BACKED(tmp_path / "image")
    with opened(tmp_path / "image") as descriptor:
        os.lseek(descriptor, offset, os.SEEK_SET)
        assert objection(descriptor, "qcow2") == "qcow2 with a backing file"
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
def test_no_bytes_of_the_file_are_in_a_reason(tmp_path: Path, disk_format: str, make: Make) -> None:
    """A reason is made of the tool's own words.

    A tenant can put nothing into a log or a terminal.
    """
    make(tmp_path / "image")
    reason = judge(tmp_path / "image", disk_format) or ""
    assert re.fullmatch(r"[A-Za-z0-9_ ,():]*", reason)
    assert MARKER.decode() not in reason


def test_a_file_that_cannot_be_read_is_the_systems_fault(tmp_path: Path) -> None:
    """An error of the operating system is not an objection.

    It is raised, and becomes the image's failed outcome.
    """
    with opened(tmp_path) as descriptor, pytest.raises(IsADirectoryError):
        objection(descriptor, "raw")


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
    """A directory of the beginnings of real files of every format."""
    directory = tmp_path_factory.mktemp("heads")
    for what, make in HEADS.items():
        patched(make, size=320 * KIB)(directory / what)
    return directory


@contextmanager
def in_memory(content: bytes) -> Iterator[int]:
    """A descriptor of a file that has no name."""
    descriptor = os.memfd_create("image")
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


def edited(content: bytes, changes: dict[int, bytes], length: int | None) -> bytes:
    """``content`` with bytes put over it, cut to ``length``."""
    for offset, new in changes.items():
        content = content[:offset].ljust(offset, b"\0") + new + content[offset + len(new) :]
    return content[:length]


def has_a_verdict(content: bytes, disk_format: str) -> None:
    """Accepted, or refused with one printable line of the tool's own words."""
    with in_memory(content) as descriptor:
        reason = objection(descriptor, disk_format)
    assert reason is None or re.fullmatch(r"[A-Za-z0-9_ ,():]+", reason)


@given(st.binary(max_size=2 * KIB), st.sampled_from(DISK_FORMATS))
def test_any_bytes_have_a_verdict(content: bytes, disk_format: str) -> None:
    """Whatever the bytes, and whatever Glance says they are, there is a verdict and never an exception."""
    has_a_verdict(content, disk_format)


@settings(max_examples=300)
@given(some_head, edits, lengths, st.sampled_from(DISK_FORMATS))
def test_any_broken_header_has_a_verdict(
    heads: Path, head: str, changes: dict[int, bytes], length: int | None, disk_format: str
) -> None:
    """The same holds for real files of every format with bytes changed and cut short anywhere."""
    has_a_verdict(edited((heads / head).read_bytes(), changes, length), disk_format)


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
# So many files are made; after a minute it is enough, if so many were accepted and QEMU was asked
# about them.
MUTATIONS, AT_MOST_SECONDS, AT_LEAST_ASKED = 3000, 60, 300


def mutated(content: bytes, chance: random.Random) -> bytes:
    """``content`` with a few fields changed where formats have theirs, another's magic put in, or its end cut off."""
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


def test_what_is_accepted_qemu_takes_for_the_same(heads: Path) -> None:
    """Of some thousand files none is accepted in which QEMU sees another format, or a backing or data file.

    They are the beginnings of real files of every kind, with a few changes each; the same ones in each run.
    """
    chance = random.Random(34)  # noqa: S311
    kinds = [path.read_bytes() for path in sorted(heads.iterdir())]
    until = time.monotonic() + AT_MOST_SECONDS
    asked = 0
    for number in range(MUTATIONS):
        kind = chance.randrange(len(kinds))
        with in_memory(mutated(kinds[kind], chance)) as descriptor:
            # A machine image is judged as a raw disk is, and a ramdisk as a kernel.
            judged = (
                one for one in ("qcow2", "raw", "iso", "aki") if objection(descriptor, one) is None
            )
            said = next(judged, None)
            # What is raw in a dull way is not asked about each time.
            if said is None or (said != "qcow2" and chance.random() < 0.6):
                continue
            seen = taken_for(f"/proc/self/fd/{descriptor}", descriptor)
        asked += 1
        # QEMU cannot open every broken qcow2 file; what is raw it always can.
        assert seen or said == "qcow2", (number, kind)
        if seen:
            assert seen["format"] == ("qcow2" if said == "qcow2" else "raw"), (number, kind)
            assert not {"backing-filename", "full-backing-filename"} & set(seen), (number, kind)
            assert "data-file" not in json.dumps(seen.get("format-specific")), (number, kind)
        if time.monotonic() > until and asked >= AT_LEAST_ASKED:
            break
    assert asked >= AT_LEAST_ASKED


def sha512(path: Path) -> tuple[str, int]:
    """The digest of a file, and how many bytes were told of."""
    steps: list[int] = []
    with opened(path) as descriptor:
        return digest(descriptor, "sha512", steps.append), sum(steps)


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with opened(path) as descriptor:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> set[int]:
    """The pages of a file that are in the page cache (mincore(2))."""
    with opened(path) as descriptor, mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        fault = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages
        )
        del first
    assert not fault
    return {number for number, page in enumerate(pages) if page & 1}


@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, 4 * MIB - 1, 4 * MIB, 4 * MIB + 513, 9 * MIB + 1]
)
@pytest.mark.parametrize("cold", [True, False])
def test_a_digest_is_of_every_byte(tmp_path: Path, size: int, cold: bool) -> None:
    """Whatever the size, and wherever its content is, a file has the digest that hashlib has for it."""
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    if cold:
        forget(tmp_path / "file")
    assert sha512(tmp_path / "file") == (hashlib.sha512(content).hexdigest(), size)


def test_the_page_cache_is_as_it_was(tmp_path: Path) -> None:
    """What of a file was in the page cache is there after it was read whole, and nothing else of it."""
    path = tmp_path / "file"
    content = os.urandom(12 * MIB)
    path.write_bytes(content)
    forget(path)
    if resident(path):
        pytest.skip("a file system in memory has nothing else to read from")
    with opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in (0, 100 * KIB, 5 * MIB, 8 * MIB - 4 * KIB, 12 * MIB - 1):
            os.pread(descriptor, 8 * KIB, offset)
    before = resident(path)
    assert 5 <= len(before) < 100
    assert sha512(path) == (hashlib.sha512(content).hexdigest(), len(content))
    assert resident(path) == before


@needs_root
def test_a_file_system_that_knows_neither_way_is_read_all_the_same(tmp_path: Path) -> None:
    """Where a file can be read neither past the page cache nor without waiting, it is read plainly."""
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True)
    try:
        (tmp_path / "file").write_bytes(MARKER * MIB)
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
        with opened(tmp_path / "file") as descriptor, pytest.raises(OSError, match="not supported"):
            os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
        assert sha512(tmp_path / "file") == (
            hashlib.sha512(MARKER * MIB).hexdigest(),
            len(MARKER) * MIB,
        )
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize(
    ("algorithm", "value", "can"),
    [
        ("sha512", "0" * 128, True),
        ("md5", "0" * 32, True),
        ("blake2b", "0" * 128, True),
        ("sha512", "0" * 64, False),
        ("sha512", "", False),
        ("", "", False),
        ("", "0" * 128, False),
        ("whirlpool-2", "0" * 128, False),
        ("shake_128", "0" * 32, False),
        ("sha512\0", "0" * 128, False),
        ("\ud800", "0" * 128, False),
    ],
)
def test_a_digest_needs_an_algorithm_and_its_length(algorithm: str, value: str, can: bool) -> None:
    """What Glance says is compared only where hashlib has the algorithm and the value is one of it."""
    assert can_digest((algorithm, value)) is can
