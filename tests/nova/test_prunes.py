"""``--prune`` keeps what the disks of servers need, whatever has been done with the servers, and takes the rest."""

import time
from collections.abc import Callable

import pytest

from rig import Rig
from rig_fixtures import Disk
from scenes import outcome

AGE = "1s"


class Scene:
    """A linked image that a server uses, another that the server may change to, and one that nothing uses."""

    def __init__(self, rig: Rig, disk: Disk) -> None:
        self.rig, self.disk = rig, disk
        self.image, self.other, self.unused = (rig.image(name, disk.path) for name in ("used", "other", "unused"))
        rig.ln_images()
        self.server = rig.boot(self.image)

    def act(self, action: str, status: str, arguments: object = None) -> None:
        """Does something with the server."""
        self.rig.act(self.server, action, status, arguments)

    def prune(self, *images: str) -> list[str]:
        """Deletes images, if there are any to be deleted, prunes for as long as it takes, and says what was done."""
        for image in images:
            self.rig.cloud.delete(image)
        said = []
        for _ in range(3):
            time.sleep(1.5)
            report = self.rig.ln_images("--prune", "--prune-after", AGE)
            said.append(outcome(report, self.unused))
        return said

    def needs(self, disk: str = "disk") -> None:
        """What the server's disk is backed by must be there under its name."""
        bases = self.rig.node.bases(self.server, disk)
        assert bases
        assert bases <= self.rig.names()


def stop(scene: Scene) -> None:
    """Stopped, and started again."""
    scene.act("os-stop", "SHUTOFF")
    yield_to_prune(scene)
    scene.act("os-start", "ACTIVE")


def yield_to_prune(scene: Scene) -> None:
    """Deletes the server's image and prunes; what backs its disk must stay."""
    assert scene.prune(scene.image, scene.unused) == ["retired", "pruned", "not named"]
    scene.needs()


def pause(scene: Scene) -> None:
    """Paused, and resumed."""
    scene.act("pause", "PAUSED")
    yield_to_prune(scene)
    scene.act("unpause", "ACTIVE")


def suspend(scene: Scene) -> None:
    """Suspended, and resumed."""
    scene.act("suspend", "SUSPENDED")
    yield_to_prune(scene)
    scene.act("resume", "ACTIVE")


def shelve(scene: Scene) -> None:
    """Shelved, unshelved, and started once more: its disk is on the shelve snapshot, which Nova has deleted."""
    scene.act("shelve", "SHELVED_OFFLOADED")
    assert scene.prune(scene.image, scene.unused) == ["retired", "pruned", "not named"]
    scene.rig.ln_images()
    scene.act("unshelve", "ACTIVE")
    scene.needs()
    scene.prune()


def rebuild(scene: Scene) -> None:
    """Rebuilt from another image, which is deleted then."""
    scene.act("rebuild", "ACTIVE", {"imageRef": scene.other})
    assert scene.prune(scene.image, scene.other, scene.unused) == ["retired", "pruned", "not named"]
    assert scene.rig.node.bases(scene.server) == {scene.rig.entry(scene.other).name}
    assert not scene.rig.entry(scene.image).exists()


def rescue(scene: Scene) -> None:
    """Rescued with another image, which is deleted meanwhile, and brought back."""
    scene.act("rescue", "RESCUE", {"rescue_image_ref": scene.other})
    assert scene.prune(scene.image, scene.other, scene.unused) == ["kept", "kept", "kept"]
    scene.needs()
    scene.needs("disk.rescue")
    scene.act("unrescue", "ACTIVE")
    assert scene.prune() == ["retired", "pruned", "not named"]


def rescue_and_reset(scene: Scene) -> None:
    """Rescued, and then said to be active from outside while it still runs from the rescue image."""
    scene.act("rescue", "RESCUE", {"rescue_image_ref": scene.other})
    scene.act("os-resetState", "ACTIVE", {"state": "active"})
    scene.prune(scene.image, scene.other, scene.unused)
    scene.needs()


def confirm_resize(scene: Scene) -> None:
    """Resized, and confirmed."""
    scene.act("resize", "VERIFY_RESIZE", {"flavorRef": "large"})
    yield_to_prune(scene)
    scene.act("confirmResize", "ACTIVE")


def revert_resize(scene: Scene) -> None:
    """Resized, and reverted."""
    scene.act("resize", "VERIFY_RESIZE", {"flavorRef": "large"})
    yield_to_prune(scene)
    scene.act("revertResize", "ACTIVE")


def restore(scene: Scene) -> None:
    """Deleted softly, and restored."""
    scene.rig.compute.delete(f"/servers/{scene.server}")
    scene.rig.wait(scene.server, "SOFT_DELETED")
    yield_to_prune(scene)
    scene.act("restore", "ACTIVE")


DONE = (stop, pause, suspend, shelve, rebuild, rescue, rescue_and_reset, confirm_resize, revert_resize, restore)


@pytest.mark.parametrize("done", DONE, ids=lambda done: done.__name__)
def test_prune_keeps_what_a_server_needs(rig: Rig, raw: Disk, done: Callable[[Scene], None]) -> None:
    """With its image deleted meanwhile, a server still runs, and starts again, on what backs its disk."""
    scene = Scene(rig, raw)
    done(scene)
    scene.needs()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5
    assert not rig.entry(scene.unused).exists()


def test_what_a_deleted_server_used_is_retired_first_and_then_removed(rig: Rig, raw: Disk) -> None:
    """When the last server is gone, its base goes: set aside under another name for a while, and then for good."""
    scene = Scene(rig, raw)
    scene.prune(scene.image)
    rig.delete(scene.server)
    time.sleep(1.5)
    assert outcome(rig.ln_images("--prune", "--prune-after", AGE), scene.image) == "retired"
    assert rig.entry(scene.image).with_suffix(".retired").exists()
    assert not rig.entry(scene.image).exists()
    time.sleep(1.5)
    assert outcome(rig.ln_images("--prune", "--prune-after", AGE), scene.image) == "pruned"
    assert not rig.entry(scene.image).with_suffix(".retired").exists()


def test_a_running_server_reads_on_in_a_base_that_was_retired_under_it(rig: Rig, raw: Disk) -> None:
    """A base that is renamed under a running server is still read by it; only its next start needs the name."""
    scene = Scene(rig, raw)
    entry = rig.entry(scene.image)
    entry.rename(entry.with_suffix(".retired"))
    before = rig.node.console(scene.server).count("guest: alive")
    rig.alive(scene.server, before + 3)
    entry.with_suffix(".retired").rename(entry)
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5
