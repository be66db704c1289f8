"""``--prune`` keeps what the disks of servers need, whatever has been done with the servers, and takes the rest."""

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from inside import NOVA
from rig import CACHE, Rig
from rig_fixtures import Disk
from scenes import fails, outcome, reboot, told

AGE = "1s"


class Scene:
    """A linked image that a server uses, another that the server may change to, and one that nothing uses."""

    def __init__(self, rig: Rig, disk: Disk) -> None:
        self.rig, self.disk = rig, disk
        self.image, self.other, self.unused = (
            rig.image(name, disk.path) for name in ("used", "other", "unused")
        )
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
    """Shelved and unshelved.

    Its disk, made from the shelve snapshot, is put back on the base of its image.
    """
    scene.act("shelve", "SHELVED_OFFLOADED")
    # By this property the clean-up knows a server's own snapshot.
    assert (
        scene.rig.cloud.image_api().get(f"/images/{snapshot(scene)}").json()["instance_uuid"]
        == scene.server
    )
    assert scene.prune(scene.image, scene.unused) == ["retired", "pruned", "not named"]
    scene.rig.ln_images()
    scene.act("unshelve", "ACTIVE")
    assert scene.rig.node.bases(scene.server) == {scene.rig.entry(scene.image).name}
    scene.prune()


def snapshot(scene: Scene) -> str:
    """The image that shelving has made of the server."""
    found = (
        scene.rig.cloud.image_api()
        .get("/images", params={"image_type": "snapshot"})
        .json()["images"]
    )
    assert len(found) == 1
    return str(found[0]["id"])


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
    """Rescued, and then said to be active from outside while it runs from the rescue image.

    Only its disk tells.
    """
    scene.act("rescue", "RESCUE", {"rescue_image_ref": scene.other})
    scene.act("os-resetState", "ACTIVE", {"state": "active"})
    scene.prune(scene.image, scene.other, scene.unused)
    scene.needs()
    assert scene.rig.entry(scene.other).name not in scene.rig.names()
    scene.rig.alive(scene.server, scene.rig.node.console(scene.server).count("guest: alive") + 2)


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


DONE = (
    stop,
    pause,
    suspend,
    shelve,
    rebuild,
    rescue,
    rescue_and_reset,
    confirm_resize,
    revert_resize,
    restore,
)


@pytest.mark.parametrize("done", DONE, ids=lambda done: done.__name__)
def test_prune_keeps_what_a_server_needs(
    rig: Rig, raw: Disk, done: Callable[[Scene], None]
) -> None:
    """With its image deleted meanwhile, a server still runs, and starts again, on what backs its disk."""
    scene = Scene(rig, raw)
    done(scene)
    scene.needs()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5
    assert not rig.entry(scene.unused).exists()


def test_what_a_deleted_server_used_is_retired_first_and_then_removed(rig: Rig, raw: Disk) -> None:
    """When the last server is gone, its base goes.

    Set aside under another name for a while, and then for good.
    """
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
    """A base that is renamed under a running server is still read by it.

    Docs/recovery.md gives it its name back.
    """
    scene = Scene(rig, raw)
    entry = rig.entry(scene.image)
    rig.cloud.delete(scene.image)
    entry.rename(entry.with_suffix(".retired"))
    rig.alive(scene.server, rig.node.console(scene.server).count("guest: alive") + 3)
    fails(rig, scene.server, "reboot", {"type": "HARD"})
    subprocess.run(told("mv -n SHA1.retired", {"SHA1": entry.name}).split(), cwd=CACHE, check=True)
    reboot(rig, scene.server)
    assert rig.proof(scene.server) == raw.md5


@pytest.fixture
def older(rig: Rig) -> Iterator[None]:
    """A nova-compute without the fix of LP#1934094, which is one line.

    The server gets its image's id back.
    """
    module = next((NOVA / "lib").glob("python3*/site-packages/nova/compute/manager.py"))
    code, fix = module.read_text(), f"{' ' * 16}instance.image_ref = shelved_image_ref\n"
    assert code.count(fix) == 1
    unfixed = rig.directory / "manager.py"
    unfixed.write_text(code.replace(fix, ""))
    rig.node.run("mount", "--bind", str(unfixed), str(module))
    rig.node.stop()
    rig.node.runs_with()
    yield
    rig.node.run("umount", str(module))
    rig.node.stop()


@pytest.mark.usefixtures("older")
def test_a_server_whose_first_unshelve_failed_names_a_deleted_snapshot(rig: Rig, raw: Disk) -> None:
    """LP#1934094.

    After the second unshelve it names the snapshot, its disk is on the original, and that is kept.
    """
    scene = Scene(rig, raw)
    scene.act("shelve", "SHELVED_OFFLOADED")
    shelved = snapshot(scene)
    with rig.entry(shelved).open("wb") as too_large:
        too_large.truncate(2 << 30)
    fails(rig, scene.server, "unshelve")
    rig.entry(shelved).unlink()
    rig.ln_images()
    scene.act("unshelve", "ACTIVE")
    assert rig.server(scene.server)["image"]["id"] == shelved
    assert rig.node.bases(scene.server) == {rig.entry(scene.image).name}
    scene.prune(scene.image, scene.unused)
    scene.needs()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5
