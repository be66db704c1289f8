"""What the tests on the rig share: how a pass is read, and a command that watches."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from rig import COMMAND, Rig


def outcome(report: dict[str, Any], image: str) -> str:
    """What a pass said of one image."""
    return next((each["outcome"] for each in report["images"] if each["id"] == image), "not named")


@contextlib.contextmanager
def watching(rig: Rig) -> Iterator[None]:
    """``ln-images --every 10`` at work."""
    process = subprocess.Popen([COMMAND, "-q", "--every", "10"], env=rig.operator())
    try:
        # Its first pass is over then: what follows is seen by itself or by the clock.
        time.sleep(4)
        yield
    finally:
        process.terminate()
        process.wait()
