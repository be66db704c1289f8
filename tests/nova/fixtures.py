"""The rig of the tests; a plugin by itself, so that they can also be run on a rig that is up already."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig import Rig


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """One cloud with one compute node, for the whole run of the tests."""
    with Rig(Path(os.environ["RIG_DIRECTORY"])) as running:
        yield running
