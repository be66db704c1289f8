"""Whether content is what Glance says it is, and safe to hand to QEMU.

Nova asks the first question of every image that it downloads
(``nova.virt.images.do_image_deep_inspection``, Nova 34.0.0), and so does this, with the same
library. Nova then has ``qemu-img info`` agree, which this does not run. In its place the first
sector is probed as QEMU does, where the library takes for raw what QEMU does not, and the name of a
data file is looked for. Less than a download: the checksum is compared by ``--verify`` alone.
Signatures are not verified here, so a signed image is left to Nova.
"""

import concurrent.futures
import contextlib
import hashlib
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

_CHUNK = 4096
# Content of every kind here is decided within 256 KiB.
_AT_MOST = 512 * 1024
_SECTOR = 512
QCOW2 = b"QFI\xfb"
# docs/interop/qcow2.txt of QEMU: where the length of the header is, and the type of the extension
# that names a file.
_HEADER_LENGTH, _DATA_FILE = 100, 0x44415441
_READ_BYTES = 4 * 1024 * 1024

# What content may be found under each disk format. Raw disks may carry a partition table, hybrid
# ISOs too, and QEMU reads kernels and ramdisks as raw. For every other format QEMU would have to
# convert a copy; and a VMDK names other files in ways that no check here sees.
_CONTENT: dict[str, tuple[set[str], ...]] = {
    **dict.fromkeys(("raw", "ami", "ari", "aki"), ({"raw"}, {"gpt"})),
    "iso": ({"iso"}, {"iso", "gpt"}),
    "qcow2": ({"qcow2"},),
}

# These are never a server's disk: QEMU loads them without looking at their format.
_NO_DISKS = frozenset({"aki", "ari"})

# What a first sector begins with.
_MAGIC = re.compile(
    rb"(?P<qcow2>QFI\xfb)|(?P<qed>QED\0)|(?P<vhdx>vhdxfile)|(?P<vhd>conectix)|(?P<luks>LUKS\xba\xbe)"
    rb"|(?P<ploop>WithoutFreeSpace|WithouFreSpacExt)|(?P<bochs>Bochs Virtual HD Image)|(?P<vdi>.{64}\x7f\x10\xda\xbe)"
    rb"|(?P<cloop>#!/bin/sh\n#V2\.0 Format\n)|(?P<vmdk>KDMV|COWD|(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n)",
    re.DOTALL,
)

_VIOLATIONS = {
    "backing_file": "with a backing file",
    "data_file": "with an external data file",
    "unknown_features": "of an unknown version or with unknown features",
    "mbr": "with a partition table that is not valid",
}


def objection(descriptor: int, disk_format: str) -> str | None:
    """Why the content of ``descriptor`` must not be linked, or None where it is what it should be.

    ``disk_format`` is Glance's word. The descriptor's offset is neither used nor moved.
    """
    # Imported here, as below, since only a pass that links something new needs it.
    from oslo_utils.imageutils.format_inspector import SafetyCheckFailed

    accepted = _CONTENT[disk_format]
    try:
        found, decided = _inspected(descriptor)
        probed = _probed(os.pread(descriptor, _SECTOR, 0).ljust(_SECTOR, b"\0"))
        names = set(found) if probed is None else found.keys() - {"raw"} | {probed}
        if names not in accepted:
            mend = "upload it again as what it is, and delete this one"
            return (
                f"the content is {' and '.join(sorted(names))}, Glance says {disk_format}: {mend}"
            )
        if probed is not None and probed not in found:
            return f"{disk_format} of a kind that cannot be checked"
        if not decided:
            return f"{disk_format} that cannot be judged by its first {_AT_MOST} bytes"
        # A hybrid ISO is judged as an ISO. The code of a kernel lies where a disk has its partition
        # table.
        if not (disk_format in _NO_DISKS and names == {"gpt"}):
            found["iso" if "iso" in found else min(found)].safety_check()
        if disk_format == "qcow2" and _names_data_file(descriptor):
            return "qcow2 with the name of an external data file"
    except SafetyCheckFailed as error:
        faults = (
            _VIOLATIONS.get(name, f"that fails the check {name}") for name in sorted(error.failures)
        )
        return f"{disk_format} {', '.join(faults)}"
    except OSError:
        raise
    except Exception as error:
        # The library parses hostile bytes; Nova refuses, too, whatever it stumbles over.
        return f"the content cannot be judged ({type(error).__name__})"
    return None


def _inspected(descriptor: int) -> tuple[dict[str, Any], bool]:
    """The library's inspectors whose format the content has, by its name, and whether that was decided in the end."""
    from oslo_utils.imageutils.format_inspector import InspectWrapper

    # Opened anew, it has an offset of its own.
    with open(f"/proc/self/fd/{descriptor}", "rb", buffering=0) as file:
        wrapper = InspectWrapper(file)
        while wrapper.formats is None and file.tell() < _AT_MOST and wrapper.read(_CHUNK):
            pass
        decided = wrapper.formats is not None or file.tell() < _AT_MOST
        wrapper.close()
    return {str(inspector): inspector for inspector in wrapper.formats or ()}, decided


def _probed(sector: bytes) -> str | None:
    """What QEMU takes a file for by its first sector, where it knows more than the library.

    Nova has ``qemu-img info`` agree with its own check after a download, and so must this: QEMU
    opens what it believes to see, and a VMDK can name any file of the host (QEMU, ``vmdk_probe``
    and its like in ``block/``).
    """
    found = _MAGIC.match(sector)
    return found and found.lastgroup


def _names_data_file(descriptor: int) -> bool:
    """Whether the header of a qcow2 disk names a data file.

    Nova refuses the name also without its feature bit.

    The extensions stand between the header and the end of the first cluster. Raises ValueError
    where they do not fit, which QEMU does not open either (QEMU, ``qcow2_read_extensions``).
    """
    header = os.pread(descriptor, _HEADER_LENGTH + 4, 0).ljust(_HEADER_LENGTH + 4, b"\0")
    version, bits = struct.unpack_from(">4xI12xI", header)
    offset = struct.unpack_from(">I", header, _HEADER_LENGTH)[0] if version >= 3 else 72
    # QEMU knows no cluster over 2 MiB.
    end = 1 << min(bits, 21)
    while offset + 8 <= end:
        kind, length = struct.unpack(">II", os.pread(descriptor, 8, offset).ljust(8, b"\0"))
        if kind in (0, _DATA_FILE):
            return bool(kind)
        offset += 8 + (length + 7) // 8 * 8
        if offset > end:
            raise ValueError("a header extension is too long")
    return False


def can_digest(checksum: tuple[str, str]) -> bool:
    """Whether there is a digest to compare with, of an algorithm that hashlib has and of that one's length."""
    algorithm, value = checksum
    try:
        return (
            bool(value)
            and len(value) == 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size
        )
    except (TypeError, ValueError):
        return False


def digest(descriptor: int, algorithm: str, progress: Callable[[int], object]) -> str:
    """The digest, in hex, of all that a descriptor holds, by the name of an algorithm that hashlib has.

    ``progress`` is told the bytes of each step. A thread hashes while the next step is read. It is read past the page
    cache (O_DIRECT), so that what serves boots there is not driven out.
    """
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    # Of whole pages, as O_DIRECT wants them.
    buffer, other = (memoryview(mmap.mmap(-1, _READ_BYTES)) for _ in range(2))
    offset, end = 0, os.fstat(descriptor).st_size
    with _direct(descriptor) as direct, concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(int)
        while offset < end and (size := os.preadv(direct, [buffer], offset)):
            hashing.result()
            hashing = pool.submit(hashed.update, buffer[:size])  # type: ignore[arg-type]
            progress(size)
            offset += size
            buffer, other = other, buffer
    return hashed.hexdigest()


@contextlib.contextmanager
def _direct(descriptor: int) -> Iterator[int]:
    """The same file, open past the page cache, or as it is where its file system cannot do that."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path = f"/proc/self/fd/{descriptor}"
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
        yield descriptor
