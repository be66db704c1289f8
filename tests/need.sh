#!/bin/sh
# need.sh CHECK PACKAGE: where the shell command CHECK fails, installs Debian's PACKAGE as root, or says who must.
set -eu
if sh -c "$1" >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "This needs Debian's package $2: run 'apt-get install $2' as root, then make again." >&2
    exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "$2"
