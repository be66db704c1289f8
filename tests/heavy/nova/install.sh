#!/bin/sh
# install.sh DIRECTORY
# Install what the rig needs from Debian, and put the guests' kernel into the directory. Nothing that is
# installed is started, because the rig starts its own daemons.
set -eu
here=$(dirname "$0")
policy=/usr/sbin/policy-rc.d
if [ "$(id -u)" = 0 ] && [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
"$here/../../../tools/need.sh" "python3 -c 'import ensurepip'" python3-venv
# libvirt's Python binding is compiled here, for the python3 that runs it.
"$here/../../../tools/need.sh" "command -v cc && command -v pkg-config && pkg-config libvirt" gcc libc6-dev pkgconf libvirt-dev
"$here/../../../tools/need.sh" "test -e \"\$(python3 -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')/Python.h\"" python3-dev
"$here/../../../tools/need.sh" "test -e /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so && command -v libvirtd" \
    libvirt-daemon-system libvirt-daemon-driver-qemu
"$here/../../../tools/need.sh" "command -v qemu-system-x86_64 && command -v qemu-img" qemu-system-x86 qemu-utils
"$here/../../../tools/need.sh" "command -v rabbitmq-server && command -v mariadbd && command -v sudo" \
    rabbitmq-server mariadb-server sudo
"$here/../../../tools/need.sh" "test -x /usr/sbin/sshd && command -v ssh-keygen && command -v scp" \
    openssh-server openssh-client
"$here/../../../tools/need.sh" "command -v syslinux && command -v mcopy && command -v mkfs.vfat && test -x /bin/busybox" \
    syslinux mtools dosfstools busybox-static
# The kernel that the guests boot is unpacked. If it were installed, this machine would boot it as well.
guest=$1
if [ ! -e "$guest/vmlinuz" ]; then
    rm -rf "$guest"
    mkdir -p "$guest/unpacked"
    apt-get update --quiet
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p')
    (cd "$guest" && apt-get download --quiet "$kernel")
    dpkg-deb --extract "$guest"/*.deb "$guest/unpacked"
    for module in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
        find "$guest/unpacked" -name "$module.ko" -exec cp {} "$guest" \;
    done
    cp "$guest"/unpacked/boot/vmlinuz-* "$guest/vmlinuz"
    rm -rf "$guest/unpacked" "$guest"/*.deb
fi
