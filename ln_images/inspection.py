"""Whether content is what Glance says it is, and safe to hand to QEMU.

Nova asks this of every image it downloads (``nova.virt.images.do_image_deep_inspection``, Nova 34.0.0).
A hard link bypasses that check, so it is made here, with the same library and the same rules.
"""

import os
import re
from typing import IO, cast

_CHUNK = 4096
# Raw, qcow2 and ISO content is decided within 256 KiB; VHDX has tables further on.
_AT_MOST = 4 * 1024 * 1024
_SECTOR = 512
_QCOW2 = b"QFI\xfb"
# The longest name that QEMU allows.
_BACKING_NAME = 1023

# What content may be found under each disk format. Raw disks may carry a partition table, hybrid ISOs
# too, and QEMU reads kernels and ramdisks as raw.
_RAW = ({"raw"}, {"gpt"})
_CONTENT: dict[str, tuple[set[str], ...]] = {
    "raw": _RAW,
    "ami": _RAW,
    "aki": _RAW,
    "ari": _RAW,
    "iso": ({"iso"}, {"iso", "gpt"}),
    "qcow2": ({"qcow2"},),
    "vmdk": ({"vmdk"},),
    "vhd": ({"vhd"},),
    "vhdx": ({"vhdx"},),
    "vdi": ({"vdi"},),
}

# These are never a server's disk: QEMU loads them without looking at their format.
_NO_DISKS = frozenset({"aki", "ari"})

_MAGIC = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"QED\0": "qed",
    b"vhdxfile": "vhdx",
    b"conectix": "vhd",
    b"LUKS\xba\xbe": "luks",
    b"WithoutFreeSpace": "ploop",
    b"WithouFreSpacExt": "ploop",
    b"Bochs Virtual HD Image": "bochs",
    b"#!/bin/sh\n#V2.0 Format\n": "cloop",
}
_VDI = b"\x7f\x10\xda\xbe"
_VMDK_TEXT = re.compile(rb"(#[^\n]*\n| *\r?\n)*version=[123]\r?\n")

_VIOLATIONS = {
    "backing_file": "with a backing file",
    "data_file": "with an external data file",
    "unknown_features": "of an unknown version or with unknown features",
    "descriptor": "of an unsafe type or with a descriptor that is not valid",
    "mbr": "with a partition table that is not valid",
}


def objection(descriptor: int, disk_format: str) -> str | None:
    """Why the content of ``descriptor`` must not be linked, or None where it is what it should be.

    ``disk_format`` is Glance's word. The descriptor's offset is neither used nor moved.
    """
    # Imported here, since only a pass that links something new needs it.
    from oslo_utils.imageutils import format_inspector

    accepted = _CONTENT.get(disk_format)
    if accepted is None:
        return f"{disk_format} content cannot be checked"
    reader = _Reader(descriptor)
    wrapper = format_inspector.InspectWrapper(cast(IO[bytes], reader))
    try:
        while wrapper.formats is None and not reader.ended:
            wrapper.read(_CHUNK)
        decided = wrapper.formats is not None or not reader.cut_short
        wrapper.close()
        found = {str(inspector): inspector for inspector in wrapper.formats or ()}
        probed = _probed(os.pread(descriptor, _SECTOR, 0).ljust(_SECTOR, b"\0"))
        names = set(found) if probed is None else found.keys() - {"raw"} | {probed}
        if names not in accepted:
            return f"the content is {' and '.join(sorted(names))}, Glance says {disk_format}"
        if probed is not None and probed not in found:
            return f"{disk_format} of a kind that cannot be checked"
        if not decided:
            return f"{disk_format} that cannot be judged by its first {_AT_MOST} bytes"
        # A hybrid ISO is judged as an ISO. The code of a kernel lies where a disk has its partition table.
        if not (disk_format in _NO_DISKS and names == {"gpt"}):
            found["iso" if "iso" in found else min(found)].safety_check()
    except format_inspector.SafetyCheckFailed as error:
        faults = (_VIOLATIONS.get(name, f"that fails the check {name}") for name in sorted(error.failures))
        return f"{disk_format} {', '.join(faults)}"
    except OSError:
        raise
    except Exception as error:
        # The library parses hostile bytes; Nova refuses, too, whatever it stumbles over.
        return f"the content cannot be judged ({type(error).__name__})"
    return None


def _probed(sector: bytes) -> str | None:
    """What QEMU takes a file for by its first sector, where it knows more than the library.

    Nova has ``qemu-img info`` agree with its own check after a download, and so must this: QEMU opens what it
    believes to see, and a VMDK can name any file of the host (QEMU, ``vmdk_probe`` and its like in ``block/``).
    """
    for magic, name in _MAGIC.items():
        if sector.startswith(magic):
            return name
    if sector[64:68] == _VDI:
        return "vdi"
    return "vmdk" if _VMDK_TEXT.match(sector) else None


class _Reader:
    """The first bytes of a descriptor, from the beginning, in the shape that the inspectors read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._offset = 0
        self.ended = False
        self.cut_short = False

    def read(self, size: int) -> bytes:
        data = os.pread(self._descriptor, size, self._offset)
        self._offset += len(data)
        self.cut_short = self._offset >= _AT_MOST
        self.ended = not data or self.cut_short
        return data
