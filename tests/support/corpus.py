"""Files as tenants and accidents make them. A maker puts one file in its place."""

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path], object]

KIB, MIB = 1024, 1024 * 1024

SIGNATURE = b"\x55\xaa"
# One entry of a partition table: active or not, first sector as CHS, type, last sector as CHS,
# first sector, length.
LINUX = struct.pack("<B3sB3sII", 0x80, b"\x20\x21\x00", 0x83, b"\xfe\xff\xff", 2048, 4096)
PROTECTIVE = struct.pack("<B3sB3sII", 0x00, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, 4096)
BROKEN = b"\x13" + LINUX[1:]

ISO = {32 * KIB: b"\x01CD001\x01"}
# The end of the first sector of Debian's linux-image-6.1.0-56-cloud-amd64, and the magic of what
# follows.
KERNEL = (
    b"MZ".ljust(496, b"\xff") + bytes.fromhex("ff27010020820d000000ffff000055aa") + b"\xeb\x6aHdrS"
)

TEXT_VMDK = (
    b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n%s\n"
    b'RW 2 FLAT "/etc/passwd" 0\n'
)


def mbr(*entries: bytes) -> bytes:
    """Return the first sector of a disk, with a partition table of ``entries``."""
    return bytes(446) + b"".join(entries).ljust(64, b"\0") + SIGNATURE


def data(content: bytes = b"", size: int | None = None) -> Make:
    """Return a maker of ``content``, followed by a hole up to ``size``."""

    def make(path: Path) -> None:
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)

    return make


def qemu(disk_format: str, *arguments: str, size: str = "1M") -> Make:
    """Return a maker of what ``qemu-img create`` makes."""

    def make(path: Path) -> None:
        # In a directory of its own, since some formats leave more than one file.
        with tempfile.TemporaryDirectory() as directory:
            command = [
                "qemu-img",
                "create",
                "-q",
                "-u",
                "-f",
                disk_format,
                *arguments,
                "image",
                size,
            ]
            subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=60)
            shutil.move(Path(directory, "image"), path)

    return make


def patched(make: Make, *patches: dict[int, bytes], size: int | None = None) -> Make:
    """Return a maker of another's file with bytes put over it, cut or stretched to ``size``."""

    def make_it(path: Path) -> None:
        make(path)
        with path.open("r+b") as file:
            for offset, content in (item for patch in patches for item in patch.items()):
                file.seek(offset)
                file.write(content)
        if size is not None:
            os.truncate(path, size)

    return make_it


NOISE = data(bytes(range(1, 251)) * 400)
QCOW2 = qemu("qcow2")
ISO_9660 = patched(data(size=64 * KIB), ISO)
BACKED = qemu("qcow2", "-F", "raw", "-b", "/etc/passwd")
DATA_FILE = qemu("qcow2", "-o", "data_file=data")
# Its feature bit is the third of the incompatible ones.
NAMES_DATA_FILE = patched(DATA_FILE, {72: bytes(8)})
# The magic and the version of LUKS: qemu-img would compute for a second to make a whole header.
LUKS = data(b"LUKS\xba\xbe\x00\x01", MIB)
VMDK_WITH_FOOTER = patched(
    qemu("vmdk", "-o", "subformat=streamOptimized"), {56: b"\xff" * 8}, size=8 * MIB
)
VHDX_FAR_AWAY = patched(qemu("vhdx"), {0x30000 + 16 + entry: b"\xff" * 6 for entry in (16, 48)})
# QEMU recognises each of these, and the library takes them for raw.
SHORT_QCOW2 = patched(
    qemu("qcow2", "-F", "raw", "-b", "/etc/passwd", "-o", "cluster_size=512"), size=400
)
VMDK_3 = data(
    (b"COWD" + struct.pack("<7I", 1, 3, 2048, 1, 4, 1, 128)).ljust(512, b"\0")
    + b'version=1\nCID=fffffffe\nparentCID=fffffffd\nparentFileNameHint="/etc/passwd"\n',
    64 * KIB,
)
VMDK_TEXT = data(TEXT_VMDK % b'createType="monolithicFlat"')
VMDK_LATE = data(TEXT_VMDK % (b"#" + b"-" * 5000 + b'\ncreateType="monolithicFlat"'))
VMDK_ODD = data(TEXT_VMDK % b'createType= monolithicFlat"')
