# `make demo` and `make test` need Debian with python3, make and git. Whatever else they need they install:
# Python packages into .venv and .cloud, Debian's through apt where they are run as root.

VENV := .venv
# The servers have an environment of their own: the command must run, and be timed, without them. So has the
# OpenStack command line client, for the benchmark of what the command replaces.
CLOUD := .cloud
OPENSTACK := .openstack
NOVA := .nova
export CLOUD_VENV := $(CURDIR)/$(CLOUD)
export OPENSTACK_VENV := $(CURDIR)/$(OPENSTACK)

# Each worker has a cloud of its own. Three keep two cores at work, since tests also wait; without any, a few
# tests are through before the workers would have begun.
PYTEST = -m pytest -n $(WORKERS) --dist loadgroup
test: WORKERS := 3
test-module: WORKERS := 0

.PHONY: demo cloud tools test test-module test-cephfs test-knfs bench boot test-nova lint clean

demo: $(VENV)/installed $(CLOUD)/installed
	@$(VENV)/bin/python tests/demo.py

cloud: $(VENV)/installed $(CLOUD)/installed $(OPENSTACK)/installed
	@$(VENV)/bin/python tests/demo.py --keep $(if $(DIRECTORY),--directory $(DIRECTORY))

# What the tests run of Debian; file systems are made by root alone.
tools:
	@tests/need.sh "command -v qemu-img" qemu-utils
	@[ "$$(id -u)" != 0 ] || tests/need.sh "ls /sbin/mkfs.xfs /sbin/mkfs.ext4" xfsprogs e2fsprogs
	@[ "$$(id -u)" != 0 ] || tests/need.sh "command -v bindfs" bindfs

test: lint tools $(CLOUD)/installed
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run $(PYTEST)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

test-module: tools $(VENV)/installed $(CLOUD)/installed
	$(VENV)/bin/python $(PYTEST) tests/test_$(MODULE).py $(if $(TESTS),-k "$(TESTS)")

# Takes some minutes, as root: a Ceph cluster of Debian's packages in one directory.
test-cephfs: $(VENV)/installed $(CLOUD)/installed
	@tests/need.sh "command -v qemu-img" qemu-utils
	@tests/need.sh "command -v ceph-mon && command -v ceph-mgr && command -v ceph-osd && command -v ceph-mds && \
		command -v ceph-fuse" ceph-mon ceph-mgr ceph-osd ceph-mds ceph-fuse
	@PYTHONPATH=tests $(VENV)/bin/python tests/heavy/cephfs.py

bench: $(VENV)/installed $(CLOUD)/installed $(OPENSTACK)/installed
	@$(VENV)/bin/python tests/bench.py

# Takes some minutes, and 70 MB of Debian's kernel, which is not installed.
test-knfs: $(VENV)/installed $(CLOUD)/installed
	@tests/need.sh "command -v qemu-system-x86_64 && ls /sbin/ip /sbin/mkfs.ext4 /sbin/mkfs.xfs /sbin/mkfs.btrfs" \
		qemu-system-x86 iproute2 e2fsprogs xfsprogs btrfs-progs
	@PYTHONPATH=tests $(VENV)/bin/python tests/heavy/knfs.py

# A whole Nova that boots servers, below tests/nova: as root, and not part of `make test`, since they take their time.
# ROUNDS, SIZES (in MiB), FORMATS (raw,qcow2) and RACERS make `make boot` shorter;
# TESTS, as in pytest's -k, `make test-nova`.
INSIDE = PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/tests/nova $(VENV)/bin/python tests/nova/inside.py $(VENV)/bin/python

boot: $(VENV)/installed $(CLOUD)/installed $(NOVA)/installed
	@$(INSIDE) tests/nova/boot.py $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SIZES),--sizes $(SIZES)) $(if $(FORMATS),--formats $(FORMATS)) \
		$(if $(RACERS),--racers $(RACERS))

test-nova: $(VENV)/installed $(CLOUD)/installed $(OPENSTACK)/installed $(NOVA)/installed
	@$(INSIDE) -m pytest tests/nova --override-ini=norecursedirs='.*' -p rig_fixtures -p no:cacheprovider -v $(if $(TESTS),-k "$(TESTS)")

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(CLOUD) $(OPENSTACK) $(NOVA)

$(VENV)/installed: setup.py pyproject.toml
	@tests/need.sh "python3 -c 'import ensurepip'" python3-venv
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

$(NOVA)/installed: tests/nova/install.sh tests/nova/requirements.txt
	@tests/nova/install.sh $(CURDIR)/$(NOVA)/guest
	python3 -m venv $(NOVA)
	$(NOVA)/bin/pip install --quiet --requirement tests/nova/requirements.txt "libvirt-python==$$(pkg-config --modversion libvirt)"
	touch $@

.%/installed: tests/%-requirements.txt
	@tests/need.sh "python3 -c 'import ensurepip'" python3-venv
	python3 -m venv .$*
	.$*/bin/pip install --quiet --requirement $<
	touch $@
