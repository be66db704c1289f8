# `make demo` and `make test` need Debian with python3, make and git. They install whatever else they
# need: Python packages into .venv and .cloud, and Debian's packages through apt if root runs them.

VENV := .venv
# The servers have an environment of their own: the command must run, and be timed, without them. So
# does the OpenStack command line client, for the benchmark of what the command replaces.
CLOUD := .cloud
OPENSTACK := .openstack
NOVA := .nova
export CLOUD_VENV := $(CURDIR)/$(CLOUD)
export OPENSTACK_VENV := $(CURDIR)/$(OPENSTACK)

# Each worker has a cloud of its own. Three keep two cores busy, since tests also wait.
PYTEST := $(VENV)/bin/coverage run -m pytest -n 3 --dist loadgroup

.PHONY: demo cloud tools test test-unit test-module test-cephfs test-knfs test-nova bench boot
.PHONY: lint manual clean

demo: $(VENV)/installed $(CLOUD)/installed
	@PYTHONPATH=tests $(VENV)/bin/python tools/demo.py

# A cloud to try the commands on, until Ctrl-C.
cloud: $(VENV)/installed $(CLOUD)/installed
	@PYTHONPATH=tests $(VENV)/bin/python tools/demo.py --keep \
		$(if $(DIRECTORY),--directory $(DIRECTORY))

# What the tests run of Debian. File systems are made by root alone.
tools:
	@tools/need.sh "command -v qemu-img" qemu-utils
	@[ "$$(id -u)" != 0 ] || tools/need.sh "command -v rsync" rsync
	@[ "$$(id -u)" != 0 ] || \
		tools/need.sh "ls /sbin/mkfs.xfs /sbin/mkfs.ext4" xfsprogs e2fsprogs
	@[ "$$(id -u)" != 0 ] || tools/need.sh "command -v bindfs" bindfs

test: lint tools $(CLOUD)/installed
	$(VENV)/bin/coverage erase
	$(PYTEST)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

# The tests that need no cloud, in seconds.
test-unit: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/unit

# One file of tests, for example: make test-module MODULE=integration/test_cli TESTS=signal
test-module: tools $(VENV)/installed $(CLOUD)/installed
	$(VENV)/bin/python -m pytest tests/$(MODULE).py $(if $(TESTS),-k "$(TESTS)")

# Takes some minutes, as root: a Ceph cluster of Debian's packages in one directory.
test-cephfs: $(VENV)/installed $(CLOUD)/installed
	@tools/need.sh "command -v qemu-img" qemu-utils
	@tools/need.sh "command -v ceph-mon && command -v ceph-mgr && command -v ceph-osd && \
		command -v ceph-mds && command -v ceph-fuse" ceph-mon ceph-mgr ceph-osd ceph-mds ceph-fuse
	@PYTHONPATH=tests $(VENV)/bin/python tests/heavy/cephfs.py

# Takes some minutes, and 70 MB for Debian's kernel, which is not installed.
test-knfs: $(VENV)/installed $(CLOUD)/installed
	@tools/need.sh "command -v qemu-system-x86_64 && \
		ls /sbin/ip /sbin/mkfs.ext4 /sbin/mkfs.xfs /sbin/mkfs.btrfs" \
		qemu-system-x86 iproute2 e2fsprogs xfsprogs btrfs-progs
	@PYTHONPATH=tests $(VENV)/bin/python tests/heavy/knfs.py

bench: $(VENV)/installed $(CLOUD)/installed $(OPENSTACK)/installed
	@PYTHONPATH=tests $(VENV)/bin/python tools/bench.py

# A whole Nova that boots servers, as root. It is not part of `make test`, because it takes long.
# ROUNDS, SIZES (in MiB), FORMATS (raw,qcow2) and RACERS make `make boot` shorter.
# TESTS, as in pytest's -k, makes `make test-nova` shorter.
INSIDE := PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/tests/heavy/nova \
	$(VENV)/bin/python tests/heavy/nova/inside.py $(VENV)/bin/python

boot: $(VENV)/installed $(CLOUD)/installed $(NOVA)/installed
	@$(INSIDE) tests/heavy/nova/boot.py $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(SIZES),--sizes $(SIZES)) $(if $(FORMATS),--formats $(FORMATS)) \
		$(if $(RACERS),--racers $(RACERS))

test-nova: $(VENV)/installed $(CLOUD)/installed $(OPENSTACK)/installed $(NOVA)/installed
	@$(INSIDE) -m pytest tests/heavy/nova --override-ini=norecursedirs='.*' -p rig_fixtures \
		-p no:cacheprovider -v $(if $(TESTS),-k "$(TESTS)")

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The manual pages, made from the commands' --help.
manual: $(VENV)/installed
	$(VENV)/bin/python tools/man.py docs

clean:
	rm -rf $(VENV) $(CLOUD) $(OPENSTACK) $(NOVA)

$(VENV)/installed: pyproject.toml
	@tools/need.sh "python3 -c 'import ensurepip'" python3-venv
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

$(NOVA)/installed: tests/heavy/nova/install.sh tests/heavy/nova/requirements.txt
	@tests/heavy/nova/install.sh $(CURDIR)/$(NOVA)/guest
	python3 -m venv $(NOVA)
	$(NOVA)/bin/pip install --quiet --requirement tests/heavy/nova/requirements.txt \
		"libvirt-python==$$(pkg-config --modversion libvirt)"
	touch $@

$(CLOUD)/installed: tests/support/cloud-requirements.txt
	@tools/need.sh "python3 -c 'import ensurepip'" python3-venv
	python3 -m venv $(CLOUD)
	$(CLOUD)/bin/pip install --quiet --requirement $<
	touch $@

$(OPENSTACK)/installed: tools/openstack-requirements.txt
	@tools/need.sh "python3 -c 'import ensurepip'" python3-venv
	python3 -m venv $(OPENSTACK)
	$(OPENSTACK)/bin/pip install --quiet --requirement $<
	touch $@
