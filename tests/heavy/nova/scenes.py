"""What the tests on the rig share.

How a pass and a document are read, and a command that watches.
"""

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rig import COMMAND, Rig
from support.cloud import ROOT, wait_until

# A time long ago, and a cache manager that runs every 3 seconds.
OLD = 1_000_000_000
OFTEN = (
    "manager_interval = 3\n"
    "remove_unused_original_minimum_age_seconds = 1\n"
    "remove_unused_base_images = "
)


def outcome(report: dict[str, Any], image: str) -> str:
    """What a pass said of one image."""
    return next((each["outcome"] for each in report["images"] if each["id"] == image), "not named")


def reason_code(report: dict[str, Any], image: str) -> str:
    """Return the reason code of one image in a report."""
    codes = [each["reason_code"] for each in report["images"] if each["id"] == image]
    return str(codes[0]) if codes else "absent"


def command_in_recovery(command: str, values: Mapping[str, str]) -> str:
    """The line of docs/recovery.md that begins with a command, with its placeholders filled in."""
    lines = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8").splitlines()
    found = next(
        line.strip()
        for line in lines
        if line.startswith("    ") and line.strip().startswith(command)
    )
    for name, value in values.items():
        found = found.replace(name, value)
    return found


def descriptor(rig: Rig, base: str) -> tuple[str, str]:
    """The process that has a base open and the number of its descriptor, as docs/recovery.md finds them."""
    found = re.search(
        r"/proc/(\d+)/fd/(\d+) ",
        rig.node.run("sh", "-c", command_in_recovery("ls -l /proc", {"SHA1": base})),
    )
    assert found
    return found[1], found[2]


def reboot(rig: Rig, server: str) -> None:
    """Brings a server back, as docs/recovery.md says."""
    rig.openstack(*command_in_recovery("openstack server reboot", {"SERVER": server}).split()[1:])
    time.sleep(1)
    rig.wait(server, "ACTIVE")


def fails(rig: Rig, server: str, action: str, arguments: object = None) -> None:
    """Does something with a server that Nova accepts, and that fails then."""

    def failed() -> bool:
        time.sleep(0.2)
        last = rig.compute.get(actions).json()["instanceActions"][0]
        found = rig.compute.get(f"{actions}/{last['request_id']}").json()["instanceAction"]
        return any(event["result"] == "Error" for event in found["events"] or ())

    actions = f"/servers/{server}/os-instance-actions"
    rig.compute.post(f"/servers/{server}/action", json={action: arguments})
    wait_until(failed, f"{action} of {server} to fail", 120)
    wait_until(
        lambda: rig.server(server)["OS-EXT-STS:task_state"] is None, f"{server} to come to rest", 60
    )


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
