"""What Nova's own cache manager touches and removes."""

import os
import time

from rig import Rig
from rig_fixtures import Disk
from scenes import OFTEN, OLD, outcome, reason_code
from support.cloud import wait_until


def test_the_cache_manager_removes_links_and_the_next_pass_reports_it(rig: Rig, raw: Disk) -> None:
    """A cache manager that is on removes a link that no server here uses; the next pass says so.

    It renews the times of a base by its server's image. Glance's own name is untouched.
    """
    used, unused = rig.image("used", raw.path), rig.image("unused", raw.path)
    rig.ln_images()
    rig.boot(used)
    for image in (used, unused):
        os.utime(rig.entry(image), (OLD, OLD))
    changed = rig.entry(used).stat().st_ctime_ns
    rig.node.runs_with(image_cache=f"{OFTEN}True")
    wait_until(lambda: not rig.entry(unused).exists(), "the removal of the unused link", 120)
    assert rig.entry(used).stat().st_mtime > OLD
    assert rig.entry(used).stat().st_ctime_ns > changed
    report = rig.ln_images()
    assert outcome(report, unused) == "linked"
    assert reason_code(report, unused) == "link_was_removed"
    wrong = rig.node.wrong_checks()
    assert "remove_unused_base_images" in wrong


def test_a_cache_manager_that_may_not_remove_only_touches(rig: Rig, raw: Disk) -> None:
    """With remove_unused_base_images = False it removes nothing, and touches what is used."""
    used, unused = rig.image("used", raw.path), rig.image("unused", raw.path)
    rig.ln_images()
    rig.boot(used)
    for image in (used, unused):
        os.utime(rig.entry(image), (OLD, OLD))
    rig.node.runs_with(image_cache=f"{OFTEN}False")
    for _ in range(2):
        wait_until(lambda: rig.entry(used).stat().st_mtime > OLD, "a touch of the used base", 120)
        os.utime(rig.entry(used), (OLD, OLD))
    assert rig.entry(unused).stat().st_mtime == OLD
    assert "remove_unused_base_images" not in rig.node.wrong_checks()


def test_the_cache_manager_does_not_touch_a_base_that_only_backs_a_disk(
    rig: Rig, raw: Disk
) -> None:
    """A base that no server names, but whose disk is on it, is neither touched nor removed."""
    named, backing = rig.image("named", raw.path), rig.image("backing", raw.path)
    rig.ln_images()
    server = rig.boot(named)
    rig.act(server, "os-stop", "SHUTOFF")
    rig.node.rebase(server, rig.entry(backing).name)
    for image in (named, backing):
        os.utime(rig.entry(image), (OLD, OLD))
    rig.node.runs_with(image_cache=f"{OFTEN}True")
    wait_until(lambda: rig.entry(named).stat().st_mtime > OLD, "a touch of the named base", 120)
    time.sleep(6)
    assert rig.entry(backing).stat().st_mtime == OLD
