"""Check whether content is what Glance says it is, and safe to give to QEMU.

Nova inspects images that it downloads, but not files that it finds in the cache
(``nova.virt.images.do_image_deep_inspection``, Nova 34.0.0). So we run the same inspection with the
same library. Nova then runs ``qemu-img info`` and compares. We do not run it: instead we also check
what QEMU would recognise in the first sector, and look for the name of a data file.

The checksum is compared by ``ln-images-verify`` alone. Signatures are not verified here, so signed
images are left to Nova.
"""

import os
import re
import struct
from typing import Any, NamedTuple

from ln_images.model import Reason
from ln_images.store import QCOW2_MAGIC

_CHUNK = 4096
# The library decides about every format here within 256 KiB.
_MOST_BYTES = 512 * 1024
_SECTOR = 512

# From docs/interop/qcow2.txt of QEMU: the fields of a header of version 3 that we need (version,
# the number of bits of a cluster's size, length of the header), the length of a header of version
# 2, an extension's type and length, the type of the one that names a data file, and the largest
# cluster.
_HEADER = struct.Struct(">4s I 12x I 76x I")
_HEADER_LENGTH_V2 = 72
_EXTENSION = struct.Struct(">II")
_END_OF_EXTENSIONS = 0
_DATA_FILE_EXTENSION = 0x44415441
_LARGEST_CLUSTER_BITS = 21
# QEMU itself writes up to five extensions.
_MOST_EXTENSIONS = 100

# Which content may be found under each disk format. Raw disks may carry a partition table, hybrid
# ISOs too, and QEMU reads kernels and ramdisks as raw.
_RAW_CONTENT = ({"raw"}, {"gpt"})
_CONTENT: dict[str, tuple[set[str], ...]] = {
    "raw": _RAW_CONTENT,
    "ami": _RAW_CONTENT,
    "ari": _RAW_CONTENT,
    "aki": _RAW_CONTENT,
    "iso": ({"iso"}, {"iso", "gpt"}),
    "qcow2": ({"qcow2"},),
}

# Kernels and ramdisks are never a server's disk: QEMU loads them without a look at their format.
_NO_DISKS = frozenset({"aki", "ari"})

# How the first sector of each format begins, for QEMU (block/*.c, the functions *_probe).
_MAGIC = re.compile(
    rb"""
      (?P<qcow2> QFI\xfb )
    | (?P<qed> QED\0 )
    | (?P<vhdx> vhdxfile )
    | (?P<vhd> conectix )
    | (?P<luks> LUKS\xba\xbe )
    | (?P<ploop> WithoutFreeSpace | WithouFreSpacExt )
    | (?P<bochs> Bochs\ Virtual\ HD\ Image )
    | (?P<vdi> .{64}\x7f\x10\xda\xbe )
    | (?P<cloop> \#!/bin/sh\n\#V2\.0\ Format\n )
    | (?P<vmdk> KDMV | COWD | (?:\#[^\n]*\n|\ *\r?\n)*version=[123]\r?\n )
    """,
    re.DOTALL | re.VERBOSE,
)

# The library's names for what its safety checks find.
_VIOLATIONS = {
    "backing_file": "with a backing file",
    "data_file": "with an external data file",
    "unknown_features": "of an unknown version or with unknown features",
    "mbr": "with a partition table that is not valid",
}


class Objection(NamedTuple):
    """Why content must not be linked."""

    reason: Reason
    sentence: str


def inspect(descriptor: int, disk_format: str) -> Objection | None:
    """Return why the content of an open file must not be linked, or None if it may be.

    ``disk_format`` is what Glance says. The descriptor's offset is neither used nor moved. Raises
    OSError if the file cannot be read.
    """
    # The library takes a while to import, and only a pass that links something needs it.
    from oslo_utils.imageutils.format_inspector import SafetyCheckFailed

    try:
        return _inspect(descriptor, disk_format)
    except SafetyCheckFailed as error:
        faults = [
            _VIOLATIONS.get(name, f"that fails the check {name}") for name in sorted(error.failures)
        ]
        return Objection(Reason.UNSAFE_CONTENT, f"{disk_format} {', '.join(faults)}")
    except OSError:
        raise
    except Exception as error:
        # The library parses hostile bytes. Nova refuses, too, whatever the exception.
        return Objection(
            Reason.UNCHECKABLE_CONTENT,
            f"the content cannot be inspected ({type(error).__name__})",
        )


def _inspect(descriptor: int, disk_format: str) -> Objection | None:
    inspectors, is_decided = _run_inspectors(descriptor)
    recognised = _recognise(os.pread(descriptor, _SECTOR, 0).ljust(_SECTOR, b"\0"))
    formats = set(inspectors)
    if recognised is not None:
        formats = formats - {"raw"} | {recognised}
    if formats not in _CONTENT[disk_format]:
        return Objection(
            Reason.OTHER_CONTENT,
            f"the content is {' and '.join(sorted(formats))}, Glance says {disk_format};"
            " upload it again as what it is, and delete this image",
        )
    if recognised is not None and recognised not in inspectors:
        return Objection(
            Reason.UNCHECKABLE_CONTENT, f"{disk_format} of a kind that cannot be inspected"
        )
    if not is_decided:
        return Objection(
            Reason.UNCHECKABLE_CONTENT,
            f"{disk_format} whose first {_MOST_BYTES} bytes do not show what it is",
        )
    # The code of a kernel lies where a disk has its partition table.
    is_kernel_code = disk_format in _NO_DISKS and formats == {"gpt"}
    if not is_kernel_code:
        # There is one inspector, or two for a hybrid ISO, which is checked as an ISO.
        checked = "iso" if "iso" in inspectors else min(inspectors)
        inspectors[checked].safety_check()
    if disk_format == "qcow2" and _names_data_file(descriptor):
        return Objection(Reason.UNSAFE_CONTENT, "qcow2 with the name of an external data file")
    return None


def _run_inspectors(descriptor: int) -> tuple[dict[str, Any], bool]:
    """Return the library's inspectors that recognise the content, and whether they have decided."""
    from oslo_utils.imageutils.format_inspector import InspectWrapper

    # Opened anew, the file has an offset of its own.
    with open(f"/proc/self/fd/{descriptor}", "rb", buffering=0) as file:
        wrapper = InspectWrapper(file)
        while wrapper.formats is None and file.tell() < _MOST_BYTES:
            if not wrapper.read(_CHUNK):
                break
        # Of a shorter file the library decides when the wrapper is closed.
        is_decided = wrapper.formats is not None or file.tell() < _MOST_BYTES
        wrapper.close()
    return {str(inspector): inspector for inspector in wrapper.formats or ()}, is_decided


def _recognise(sector: bytes) -> str | None:
    """Return the format that QEMU recognises in a first sector, beyond what the library knows.

    QEMU opens what it believes to see, and a VMDK can name any file of the host (QEMU,
    ``vmdk_probe`` and the like in ``block/``).
    """
    match = _MAGIC.match(sector)
    return match.lastgroup if match else None


def _names_data_file(descriptor: int) -> bool:
    """Return whether the header of a qcow2 disk names a data file.

    Nova refuses such a name even without its feature bit. The extensions are between the header and
    the end of the first cluster. Raises ValueError if they do not fit there, which QEMU does not
    open either (QEMU, ``qcow2_read_extensions``), or if there are far more than QEMU ever writes.
    """
    magic, version, cluster_bits, header_length = _read(descriptor, _HEADER, 0)
    if magic != QCOW2_MAGIC:
        raise ValueError("not a qcow2 header")
    offset = header_length if version >= 3 else _HEADER_LENGTH_V2
    end = 1 << min(cluster_bits, _LARGEST_CLUSTER_BITS)
    for _ in range(_MOST_EXTENSIONS):
        if offset + _EXTENSION.size > end:
            return False
        kind, length = _read(descriptor, _EXTENSION, offset)
        if kind == _END_OF_EXTENSIONS:
            return False
        if kind == _DATA_FILE_EXTENSION:
            return True
        # An extension is padded to a multiple of 8 bytes.
        offset += _EXTENSION.size + (length + 7) // 8 * 8
        if offset > end:
            raise ValueError("a header extension is too long")
    raise ValueError("too many header extensions")


def _read(descriptor: int, fields: struct.Struct, offset: int) -> tuple[Any, ...]:
    """Return fields of an open file. Behind its end, zeros follow, as QEMU sees it."""
    return fields.unpack(os.pread(descriptor, fields.size, offset).ljust(fields.size, b"\0"))
