#!/bin/sh
# need.sh CHECK PACKAGE...
# If the shell command CHECK fails, install Debian's packages as root, or print which ones root must
# install.
set -eu
check=$1
shift
if sh -c "$check" >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "need.sh: packages of Debian are missing: $*; run 'apt-get install $*' as root, and then make again" >&2
    exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "$@"
