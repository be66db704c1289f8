"""What the tests on the rig share: how they read reports and documents, and what they wait for."""

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rig import COMMAND, Rig
from support.cloud import ROOT, wait_until

RECOVERY = ROOT / "docs" / "recovery.md"
# A time long ago, and a cache manager that runs every 3 seconds.
OLD = 1_000_000_000
OFTEN = (
    "manager_interval = 3\n"
    "remove_unused_original_minimum_age_seconds = 1\n"
    "remove_unused_base_images = "
)


def outcome(report: dict[str, Any], image: str) -> str:
    """Return the outcome of one image in a report."""
    return next((each["outcome"] for each in report["images"] if each["id"] == image), "absent")


def reason_code(report: dict[str, Any], image: str) -> str:
    """Return the reason code of one image in a report."""
    codes = [each["reason_code"] for each in report["images"] if each["id"] == image]
    return str(codes[0]) if codes else "absent"


def command_in_recovery(command: str, values: Mapping[str, str]) -> str:
    """Return the line of docs/recovery.md that begins with a command, with ``values`` filled in."""
    line = next(
        line.strip()
        for line in RECOVERY.read_text(encoding="utf-8").splitlines()
        if line.startswith("    ") and line.strip().startswith(command)
    )
    return fill_in(line, values)


def run_block_in_recovery(command: str, values: Mapping[str, str], rig: Rig) -> None:
    """Run the block of docs/recovery.md that has this command, with ``values`` filled in."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", RECOVERY.read_text(encoding="utf-8"), re.MULTILINE)
    (block,) = [each for each in blocks if command in each]
    subprocess.run(["sh", "-euc", fill_in(block, values)], env=rig.operator(), check=True)


def fill_in(commands: str, values: Mapping[str, str]) -> str:
    """Return commands of a page with ``values`` in place of its names, such as SHA1."""
    for name, value in values.items():
        commands = commands.replace(name, value)
    return commands


def descriptor(rig: Rig, base: str) -> tuple[str, str]:
    """Return a process that has a base open, and its descriptor, as docs/recovery.md finds them."""
    # lr-x------ 1 libvirt-qemu ... 64 Nov 28 22:30 /proc/4711/fd/12 -> /var/lib/nova/...
    listing = rig.node.run("sh", "-c", command_in_recovery("ls -l /proc", {"SHA1": base}))
    match = re.search(r"/proc/(\d+)/fd/(\d+) ", listing)
    assert match
    return match[1], match[2]


def reboot(rig: Rig, server: str) -> None:
    """Bring a server back, as docs/recovery.md says."""
    rig.openstack(*command_in_recovery("openstack server reboot", {"SERVER": server}).split()[1:])
    time.sleep(1)
    rig.wait(server, "ACTIVE")


def fails(rig: Rig, server: str, action: str, arguments: object = None) -> None:
    """Request an action that Nova accepts and that then fails, and wait until it has failed."""

    def failed() -> bool:
        time.sleep(0.2)
        last = rig.compute.get(actions).json()["instanceActions"][0]
        action = rig.compute.get(f"{actions}/{last['request_id']}").json()["instanceAction"]
        return any(event["result"] == "Error" for event in action["events"] or ())

    actions = f"/servers/{server}/os-instance-actions"
    rig.compute.post(f"/servers/{server}/action", json={action: arguments})
    wait_until(failed, f"{action} of {server} to fail", 120)
    wait_until(
        lambda: rig.server(server)["OS-EXT-STS:task_state"] is None, f"{server} to become idle", 60
    )


@contextlib.contextmanager
def watching(rig: Rig) -> Iterator[None]:
    """Run ``ln-images --every 10``."""
    process = subprocess.Popen([COMMAND, "-q", "--every", "10"], env=rig.operator())
    try:
        # Its first pass has ended then, so that what follows is noticed by inotify or by the clock.
        time.sleep(4)
        yield
    finally:
        process.terminate()
        process.wait()
