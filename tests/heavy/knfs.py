"""``make test-knfs``: shared caches on Debian's own kernel NFS server and client.

Debian's kernel runs in QEMU. It is the storage node with the NFS server, and in network namespaces
it is two compute nodes. Its root is this machine's, shared read-only and with a layer above it that
can be written to. So the same Python and the same commands run in there (``knfs_inside.py``),
against a real Keystone and Glance out here. Nothing is installed on this machine, and nothing
remains.
"""

import argparse
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
from collections.abc import Iterable, Iterator
from pathlib import Path

from knfs_inside import DATA, DISKS, IMAGES, NODES, WORK
from support.cloud import REGION, Cloud
from support.compute import Compute, in_catalog

SECONDS = 1500
KERNEL = "linux-image-amd64"
BUSYBOX = "busybox-static"
# The NFS server and client, and the libraries that they need and that a small Debian lacks.
NFS_PACKAGES = (
    *("nfs-kernel-server", "nfs-common", "rpcbind", "keyutils"),
    *("libevent-core-2.1-7", "libnfsidmap1", "libtirpc3", "libtirpc-common"),
)
# libcrc32c asks for an algorithm, and names no module that has it.
MODULES = (
    *("crc32c_generic", "virtio_pci", "virtio_blk", "virtio_net", "veth"),
    *("9p", "9pnet_virtio", "overlay", "nfsd", "nfsv3", "nfsv4", *DISKS),
)
INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
for module in $(cat /order); do insmod $module; done
share="-t 9p -o trans=virtio,version=9p2000.L,msize=262144"
mount $share,ro,cache=loose root /machine
mount -t tmpfs none /changes
mkdir /changes/upper /changes/work
mount -t overlay -o lowerdir=/machine,upperdir=/changes/upper,workdir=/changes/work none /root
mount $share,ro,cache=loose packages /packages
cp -af /packages/. /root/
mount -t proc none /root/proc
mount -t sysfs none /root/sys
mount -o bind /dev /root/dev
mount -t tmpfs none /root/run
mount -t tmpfs none /root/tmp
mkdir -p /root{work}
mount $share work /root{work}
mount -t nfsd none /root/proc/fs/nfsd
hostname storage
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot /root {command}
echo $? > /root{work}/status
poweroff -f
"""


def download_packages(directory: Path) -> dict[str, Path]:
    """Download Debian's packages, and unpack each without installing it.

    Return the directories by the packages' names, in which that of the kernel has no version.
    """
    depends = subprocess.run(
        ["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True
    ).stdout
    # Depends: linux-image-6.1.0-56-amd64
    (kernel,) = re.findall(r"Depends: (linux-image-\d\S+)", depends)
    names = {KERNEL: kernel} | {name: name for name in (BUSYBOX, *NFS_PACKAGES)}
    directory.mkdir()
    subprocess.run(
        ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *names.values()],
        cwd=directory,
        check=True,
    )
    for name, package in names.items():
        (file,) = directory.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", file, directory / name], check=True)
    return {name: directory / name for name in names}


def merge(packages: Iterable[Path], layer: Path) -> None:
    """Merge unpacked packages into one tree, in which /sbin and /lib are below /usr.

    On Debian these two are symbolic links to there, which a copy must not replace.
    """
    for package in packages:
        for name in ("sbin", "bin", "lib"):
            if (package / name).is_dir():
                shutil.copytree(
                    package / name, layer / "usr" / name, symlinks=True, dirs_exist_ok=True
                )
                shutil.rmtree(package / name)
        shutil.rmtree(package / "usr" / "share", ignore_errors=True)
        shutil.copytree(package, layer, symlinks=True, dirs_exist_ok=True)


def list_modules(kernel: Path) -> Iterator[Path]:
    """Yield the files of ``MODULES``, each after those that it depends on."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in kernel.rglob("*.ko*")}
    done: set[str] = set()

    def list_with_dependencies(module: str) -> Iterator[Path]:
        # What has no file is a part of the kernel.
        if module in done or module not in files:
            return
        done.add(module)
        for dependency in read_dependencies(files[module]):
            yield from list_with_dependencies(dependency)
        yield files[module]

    for module in MODULES:
        yield from list_with_dependencies(module)


def read_dependencies(module: Path) -> list[str]:
    """Return the names of the modules that a module's file depends on."""
    content = module.read_bytes()
    if content.startswith(b"\xfd7zXZ"):
        content = lzma.decompress(content)
    # depends=sunrpc,lockd,grace
    match = re.search(rb"\0depends=([^\0]+)", content)
    return match[1].decode().replace("-", "_").split(",") if match else []


def make_initrd(kernel: Path, busybox: Path, directory: Path, command: str) -> Path:
    """Make what loads the modules, builds the root, and runs ``command`` in it."""
    tree = directory / "initrd"
    for name in ("bin", "changes", "dev", "machine", "packages", "root"):
        (tree / name).mkdir(parents=True)
    (tree / "bin" / "sh").symlink_to("busybox")
    shutil.copy(busybox, tree / "bin")
    modules = list(list_modules(kernel))
    for module in modules:
        shutil.copy(module, tree)
    (tree / "order").write_text("".join(f"/{module.name}\n" for module in modules))
    init = tree / "init"
    init.write_text(INIT.format(work=WORK, command=command))
    init.chmod(0o755)
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    image = directory / "initrd.img"
    with image.open("wb") as archive:
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            cwd=tree,
            input=names.encode(),
            stdout=archive,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return image


def boot(directory: Path, share: Path, claims: list[str]) -> int:
    """Run ``knfs_inside.py`` in the virtual machine, and return its exit status.

    ``share`` can be written to in there.
    """
    packages = download_packages(directory / "packages")
    kernel = packages[KERNEL]
    busybox = packages[BUSYBOX] / "bin" / "busybox"
    layer = directory / "layer"
    merge([packages[name] for name in NFS_PACKAGES], layer)
    inside = Path(__file__).resolve().with_name("knfs_inside.py")
    # Its output reaches this terminal through a serial line, line by line.
    command = shlex.join([sys.executable, "-u", str(inside), *claims])
    image = make_initrd(kernel, busybox, directory, command)
    disks: list[str] = []
    for name in DISKS:
        with (directory / name).open("wb") as disk:
            disk.truncate(512 * 1024 * 1024)
        disks += ["-drive", f"if=virtio,format=raw,file={directory / name}"]
    machine = subprocess.Popen(
        [
            # KVM is faster, but a virtual machine that has it may still hang in a nested guest.
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "1536", "-no-reboot"),
            *("-display", "none", "-serial", "stdio", "-monitor", "none"),
            *("-kernel", next(kernel.glob("boot/vmlinuz-*")), "-initrd", image),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *share_options("root", Path("/"), writable=False),
            *share_options("packages", layer, writable=False),
            *share_options("work", share, writable=True),
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


def share_options(tag: str, path: Path, writable: bool) -> list[str]:
    """Return QEMU's options that share a directory of this machine with the virtual one."""
    options = f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap"
    return ["-virtfs", options if writable else f"{options},readonly=on"]


def main() -> int:
    """End as the virtual machine did.

    Whatever ends it, servers, machine and files are gone afterwards.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", help="names of the claims' functions; all by default")
    claims = parser.parse_args().claims
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ln-images-knfs-") as name:
        directory = Path(name)
        share = directory / "share"
        share.mkdir()
        (directory / "cloud").mkdir()
        with (
            Cloud(directory / "cloud") as cloud,
            Compute(*NODES) as compute,
            in_catalog(cloud.identity(), (REGION, "public", compute.url)),
        ):
            urls = [cloud.keystone, cloud.glance, compute.url]
            document = {
                "environment": cloud.environment(),
                "glance": cloud.glance,
                "ports": [urllib.parse.urlsplit(url).port for url in urls],
                "images": [cloud.image(f"image {number}", DATA) for number in range(IMAGES)],
            }
            (share / "cloud.json").write_text(json.dumps(document))
            return boot(directory, share, claims)


if __name__ == "__main__":
    sys.exit(main())
