"""``make test-knfs``.

What a kernel NFS server says that its clients hold open, and what ``--prune`` makes of it.

Debian's kernel runs in QEMU, without KVM: it is the storage node with the NFS server, and in
network namespaces it is two compute nodes. Its root is this machine's, shared read-only, so that
the same Python and the same command run in there (``knfs_inside.py``), against a real Keystone and
Glance out here. Nothing is installed, and nothing remains.
"""

import json
import lzma
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from knfs_inside import DATA, FILE_SYSTEMS, WORK
from support.cloud import REGION, Cloud
from support.compute import Compute

SECONDS = 1200
PACKAGES = ("linux-image-amd64", "busybox-static")
# libcrc32c asks for an algorithm, and names no module that has it.
MODULES = (
    "crc32c_generic",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "veth",
    "9p",
    "9pnet_virtio",
    "nfsd",
    "nfsv4",
)
INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
for module in $(cat /order); do insmod $module; done
share="-t 9p -o trans=virtio,version=9p2000.L,msize=262144"
mount $share,ro,cache=loose root /root
mount -t proc none /root/proc
mount -t sysfs none /root/sys
mount -o bind /dev /root/dev
mount $share work /root{work}
mount -t nfsd none /root/proc/fs/nfsd
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR={work} chroot /root {command}
echo $? > /root{work}/status
poweroff -f
"""


def unpacked(package: str, directory: Path) -> Path:
    """A Debian package, or the one that it stands for, unpacked and not installed."""
    depends = subprocess.run(
        ["apt-cache", "depends", package], capture_output=True, text=True, check=True
    ).stdout
    name = next(
        iter(re.findall(rf"Depends: ({package.removesuffix('-amd64')}\S+)", depends)), package
    )
    (directory / package).mkdir()
    subprocess.run(
        ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name],
        cwd=directory,
        check=True,
    )
    subprocess.run(
        ["dpkg-deb", "-x", next(directory.glob(f"{name}_*.deb")), directory / package], check=True
    )
    return directory / package


def modules(kernel: Path) -> Iterator[Path]:
    """The files of ``MODULES`` and of the file systems, each after those that it depends on."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in kernel.rglob("*.ko*")}
    done: set[str] = set()

    def needed(module: str) -> Iterator[Path]:
        # What has no file is a part of the kernel.
        if module in files and module not in done:
            done.add(module)
            content = files[module].read_bytes()
            said = re.search(
                rb"\0depends=([^\0]*)",
                lzma.decompress(content) if content[:1] == b"\xfd" else content,
            )
            for other in said[1].decode().replace("-", "_").split(",") if said else ():
                yield from needed(other)
            yield files[module]

    for module in (*MODULES, *FILE_SYSTEMS, "overlay"):
        yield from needed(module)


def initrd(kernel: Path, busybox: Path, directory: Path, command: str) -> Path:
    """What loads the modules, and then runs ``command`` in the root that is shared."""
    for name in ("bin", "dev", "root"):
        (directory / "initrd" / name).mkdir(parents=True)
    (directory / "initrd" / "bin" / "sh").symlink_to("busybox")
    order = list(modules(kernel))
    for file in (*order, busybox):
        shutil.copy(file, directory / "initrd" / ("bin" if file == busybox else "."))
    (directory / "initrd" / "order").write_text("".join(f"/{file.name}\n" for file in order))
    init = directory / "initrd" / "init"
    init.write_text(INIT.format(work=WORK, command=command))
    init.chmod(0o755)
    names = "".join(f"{path.relative_to(init.parent)}\n" for path in sorted(init.parent.rglob("*")))
    with (directory / "initrd.img").open("wb") as image:
        archive: list[str | Path] = [busybox, "cpio", "-o", "-H", "newc"]
        subprocess.run(
            archive,
            cwd=init.parent,
            input=names.encode(),
            stdout=image,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return directory / "initrd.img"


def boot(directory: Path, share: Path) -> int:
    """Runs ``knfs_inside.py`` in the virtual machine; its exit status.

    ``share`` is read-write in there.
    """
    kernel, busybox = (unpacked(package, directory) for package in PACKAGES)
    inside = Path(__file__).resolve().with_name("knfs_inside.py")
    image = initrd(
        kernel,
        busybox / "bin" / "busybox",
        directory,
        shlex.join([sys.executable, "-B", str(inside)]),
    )
    disks: list[str] = []
    for name in FILE_SYSTEMS:
        with (directory / name).open("wb") as disk:
            disk.truncate(512 * 1024 * 1024)
        disks += ["-drive", f"if=virtio,format=raw,file={directory / name}"]
    machine = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "1024", "-no-reboot"),
            *("-display", "none", "-serial", "stdio", "-monitor", "none"),
            *("-kernel", next(kernel.glob("boot/vmlinuz-*")), "-initrd", image),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *(
                "-virtfs",
                "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
            ),
            *("-virtfs", f"local,path={share},mount_tag=work,security_model=none"),
            *disks,
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        machine.wait(SECONDS)
    finally:
        machine.kill()
        machine.wait()
    status = share / "status"
    return int(status.read_text()) if status.exists() else 1


def main() -> int:
    """Ends as the virtual machine did.

    Whatever ends it, servers, machine and files are gone afterwards.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ln-images-knfs-") as name:
        directory, share = Path(name), Path(name) / "share"
        share.mkdir()
        (directory / "cloud").mkdir()
        with Cloud(directory / "cloud") as cloud, Compute() as compute:
            identity = cloud.identity()
            service = identity.post("/services", json={"service": {"type": "compute"}}).json()[
                "service"
            ]["id"]
            endpoint = {
                "service_id": service,
                "interface": "public",
                "region_id": REGION,
                "url": compute.url,
            }
            identity.post("/endpoints", json={"endpoint": endpoint})
            here, gone = (cloud.image(name, DATA) for name in ("here", "gone"))
            cloud.delete(gone)
            told = {
                "environment": cloud.environment(),
                "ports": [
                    urllib.parse.urlsplit(url).port
                    for url in (cloud.keystone, cloud.glance, compute.url)
                ],
                "here": here,
                "gone": gone,
            }
            (share / "cloud.json").write_text(json.dumps(told))
            return boot(directory, share)


if __name__ == "__main__":
    sys.exit(main())
