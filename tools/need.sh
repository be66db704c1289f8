#!/bin/sh
# need.sh CHECK PACKAGE...: where the shell command CHECK fails, installs Debian's packages as root, or says who must.
set -eu
check=$1
shift
if sh -c "$check" >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "This needs from Debian: $*. Run 'apt-get install $*' as root, then make again." >&2
    exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "$@"
