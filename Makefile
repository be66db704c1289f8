# `make demo` and `make test` need Debian with python3, make and git; what else they need they install,
# as root through apt where it is no Python package.

VENV := .venv
# The servers have an environment of their own: the command must work, and be timed, without them.
CLOUD := .cloud
PYTHON := $(VENV)/bin/python
export CLOUD_VENV := $(CURDIR)/$(CLOUD)

.PHONY: demo test lint clean

demo: $(VENV)/installed $(CLOUD)/installed
	@$(PYTHON) tests/demo.py

test: lint $(CLOUD)/installed tests/system-packages.installed
	$(VENV)/bin/coverage erase
	$(PYTHON) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(CLOUD) tests/system-packages.installed

