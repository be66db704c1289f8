"""A disk that boots in seconds without hardware help, and proves on its serial console that it did.

Debian's kernel and busybox are on a small FAT file system at its beginning, from which syslinux
starts them. Random data fills the rest. The guest prints the MD5 of the first part of its disk,
random data included, and then again and again that it still reads the disk.
"""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from support.cloud import ROOT

MIB = 1024 * 1024
KERNEL = ROOT / ".nova" / "guest"
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
BOOT_MIB, PROVED_MIB = 20, 24
SMALLEST = 28 * MIB
# The lines that the guest prints begin so.
UP, PROOF, ALIVE = "guest: up", "guest: md5 ", "guest: alive"
SYSLINUX = """DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initrd
  APPEND {append}
"""
APPEND = "console=ttyS0 quiet panic=-1 mitigations=off"
INIT = f"""#!/busybox sh
/busybox mkdir -p /proc /sys /dev
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1
for module in {" ".join(MODULES)}; do /busybox insmod /$module.ko; done
echo "{UP}"
sum=$(/busybox dd if=/dev/vda bs=1M count={PROVED_MIB} 2>/dev/null | /busybox md5sum)
echo "{PROOF}${{sum%% *}}"
while /busybox sleep 3; do
    /busybox dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null && echo "{ALIVE}"
done
"""


def make(path: Path, size: int = SMALLEST) -> str:
    """Make a raw disk of ``size`` bytes of real data. Return the MD5 that its guest will print."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, path.open("wb") as disk:
        directory = Path(scratch)
        boot = directory / "boot"
        boot.write_bytes(bytes(BOOT_MIB * MIB))
        (directory / "syslinux.cfg").write_text(SYSLINUX.format(append=APPEND))
        files = (KERNEL / "vmlinuz", _initrd(directory), directory / "syslinux.cfg")
        _run("mkfs.vfat", str(boot))
        _run("mcopy", "-i", str(boot), *(str(file) for file in files), "::")
        _run("syslinux", "--install", str(boot))
        disk.write(boot.read_bytes())
        written = BOOT_MIB * MIB
        while written < size:
            written += disk.write(os.urandom(min(4 * MIB, size - written)))
    with path.open("rb") as disk:
        return hashlib.md5(disk.read(PROVED_MIB * MIB), usedforsecurity=False).hexdigest()


def qcow2(raw: Path, path: Path) -> None:
    """Make the same disk as a qcow2 file."""
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))


def _initrd(directory: Path) -> Path:
    root = directory / "root"
    root.mkdir()
    for file in (Path("/bin/busybox"), *(KERNEL / f"{module}.ko" for module in MODULES)):
        (root / file.name).write_bytes(file.read_bytes())
    (root / "init").write_text(INIT)
    for name in ("busybox", "init"):
        (root / name).chmod(0o755)
    initrd = directory / "initrd"
    _run(
        "sh",
        "-c",
        'cd "$1" && find . | busybox cpio -o -H newc | gzip -1 >"$2"',
        "sh",
        str(root),
        str(initrd),
    )
    return initrd


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
