"""``ln-images-prune`` keeps what the disks of servers need, whatever was done with the servers."""

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from rig import CACHE, Node, Rig
from rig_fixtures import Disk
from scenes import command_in_recovery, fails, reboot

# With this the clean-up waits a second where production waits a day.
QUICKLY = ("--after", "1s")


class Scene:
    """A linked image that a server uses, another for the server to change to, and an unused one."""

    def __init__(self, rig: Rig, disk: Disk, node: Node | None = None) -> None:
        self.rig = rig
        self.disk = disk
        self.image = rig.image("used", disk.path)
        self.other = rig.image("other", disk.path)
        self.unused = rig.image("unused", disk.path)
        rig.ln_images()
        self.server = rig.boot(self.image, node)
        self.node = node or rig.node

    def act(self, action: str, status: str, arguments: object = None) -> None:
        """Do something with the server, and wait until it has the status."""
        self.rig.act(self.server, action, status, arguments)

    def delete_images_and_prune(self, *images: str) -> list[str]:
        """Delete images, and prune with fresh reports until whatever can go is gone.

        Return the outcomes of the unused image's base, pass by pass.
        """
        for image in images:
            self.rig.cloud.delete(image)
        unused_name = self.rig.entry(self.unused).name
        outcomes = []
        for _ in range(4):
            for node in self.rig.nodes:
                if node.running:
                    node.check("--report")
            time.sleep(1.5)
            report = self.rig.prune(*QUICKLY)
            results = {result["cache_name"]: result["outcome"] for result in report["images"]}
            outcomes.append(results.get(unused_name, "absent"))
        return outcomes

    def prune_all(self) -> None:
        """Delete both images, and prune. What the server's disk needs must stay."""
        outcomes = self.delete_images_and_prune(self.image, self.unused)
        assert outcomes == ["kept", "retired", "pruned", "absent"]
        self.assert_bases_exist()

    def assert_bases_exist(self, disk: str = "disk") -> None:
        """Check that every base of the server's disk is there under its name."""
        bases = self.node.bases(self.server, disk)
        assert bases
        assert bases <= self.rig.names()


def stop(scene: Scene) -> None:
    """Stop and start."""
    scene.act("os-stop", "SHUTOFF")
    scene.prune_all()
    scene.act("os-start", "ACTIVE")


def pause(scene: Scene) -> None:
    """Pause and resume."""
    scene.act("pause", "PAUSED")
    scene.prune_all()
    scene.act("unpause", "ACTIVE")


def suspend(scene: Scene) -> None:
    """Suspend and resume."""
    scene.act("suspend", "SUSPENDED")
    scene.prune_all()
    scene.act("resume", "ACTIVE")


def shelve(scene: Scene) -> None:
    """Shelve and unshelve, while Glance still has the server's image.

    An offloaded server has no disk on any node. It comes back from its snapshot, and Nova then
    fetches the server's image, which Glance must still have.
    """
    scene.act("shelve", "SHELVED_OFFLOADED")
    outcomes = scene.delete_images_and_prune(scene.unused)
    assert outcomes == ["kept", "retired", "pruned", "absent"]
    scene.rig.ln_images()
    scene.act("unshelve", "ACTIVE")
    scene.delete_images_and_prune()


def rebuild(scene: Scene) -> None:
    """Rebuild from another image; the base that the disk no longer uses goes."""
    scene.act("rebuild", "ACTIVE", {"imageRef": scene.other})
    scene.delete_images_and_prune(scene.image, scene.other, scene.unused)
    assert scene.node.bases(scene.server) == {scene.rig.entry(scene.other).name}
    assert not scene.rig.entry(scene.image).exists()


def rescue(scene: Scene) -> None:
    """Rescue with another image, which is deleted meanwhile, and unrescue."""
    scene.act("rescue", "RESCUE", {"rescue_image_ref": scene.other})
    scene.delete_images_and_prune(scene.image, scene.other, scene.unused)
    scene.assert_bases_exist()
    scene.assert_bases_exist("disk.rescue")
    scene.act("unrescue", "ACTIVE")


def rescue_and_reset(scene: Scene) -> None:
    """Rescue, and then reset the state to active, while the guest runs from the rescue image."""
    scene.act("rescue", "RESCUE", {"rescue_image_ref": scene.other})
    scene.act("os-resetState", "ACTIVE", {"state": "active"})
    scene.delete_images_and_prune(scene.image, scene.other, scene.unused)
    scene.assert_bases_exist()
    scene.assert_bases_exist("disk.rescue")
    alive = scene.node.console(scene.server).count("guest: alive")
    scene.rig.alive(scene.server, alive + 2)


def confirm_resize(scene: Scene) -> None:
    """Resize, and confirm."""
    scene.act("resize", "VERIFY_RESIZE", {"flavorRef": "large"})
    scene.prune_all()
    scene.act("confirmResize", "ACTIVE")


def revert_resize(scene: Scene) -> None:
    """Resize, and revert."""
    scene.act("resize", "VERIFY_RESIZE", {"flavorRef": "large"})
    scene.prune_all()
    scene.act("revertResize", "ACTIVE")


def restore(scene: Scene) -> None:
    """Delete softly, and restore."""
    scene.rig.compute.delete(f"/servers/{scene.server}")
    scene.rig.wait(scene.server, "SOFT_DELETED")
    scene.prune_all()
    scene.act("restore", "ACTIVE")


def rebuild_without_glance(scene: Scene) -> None:
    """Rebuild while the node cannot reach Glance: the disk stays on the old base.

    This lost a base with 0.2.0: on Nova 34 the server is ACTIVE, without a task, and names the new
    image.
    """
    scene.node.runs_with(glance="endpoint_override = http://127.0.0.1:9\nnum_retries = 0")
    fails(scene.rig, scene.server, "rebuild", {"imageRef": scene.other})
    scene.node.runs_with()
    assert scene.rig.server(scene.server)["image"]["id"] == scene.other
    assert scene.node.bases(scene.server) == {scene.rig.entry(scene.image).name}
    scene.prune_all()


ACTIONS = (
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
    rebuild_without_glance,
)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_prune_keeps_what_a_disk_needs(
    rig: Rig, raw: Disk, action: Callable[[Scene], None]
) -> None:
    """A server whose image is deleted meanwhile still runs and starts again on its bases."""
    scene = Scene(rig, raw)
    action(scene)
    scene.assert_bases_exist()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5
    assert not rig.entry(scene.unused).exists()


@pytest.fixture
def second(rig: Rig) -> Iterator[Node]:
    """Add a second compute node for one test."""
    node = rig.add_node()
    yield node
    rig.remove_node(node)


@pytest.mark.parametrize("end", ["confirmResize", "revertResize"])
def test_prune_keeps_what_a_migrating_server_needs(
    rig: Rig, raw: Disk, second: Node, end: str
) -> None:
    """A server that migrates between two reports keeps its bases, on whichever node it ends."""
    scene = Scene(rig, raw, rig.node)
    scene.act("migrate", "VERIFY_RESIZE")
    scene.node = second
    scene.prune_all()
    scene.act(end, "ACTIVE")
    scene.node = second if end == "confirmResize" else rig.node
    scene.delete_images_and_prune()
    scene.assert_bases_exist()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server, scene.node) == raw.md5


def test_a_node_that_is_down_blocks_and_is_named(rig: Rig, raw: Disk, second: Node) -> None:
    """While one node does not report, no base is retired, and the reason names that node."""
    scene = Scene(rig, raw, second)
    second.stop()
    for image in (scene.image, scene.unused):
        rig.cloud.delete(image)
    rig.node.check("--report")
    report = rig.prune(*QUICKLY)
    reasons = [
        result["reason"]
        for result in report["images"]
        if result["cache_name"] == rig.entry(scene.unused).name
    ]
    assert report["counts"]["kept"] == 2
    assert second.name in reasons[0]
    assert rig.entry(scene.unused).exists()


def test_an_evacuated_server_keeps_its_base(rig: Rig, raw: Disk, second: Node) -> None:
    """A server that is evacuated runs on its new node, on a base that the clean-up keeps."""
    scene = Scene(rig, raw, second)
    second.stop()
    scene.act("evacuate", "ACTIVE", {"host": rig.node.name})
    scene.node = rig.node
    scene.delete_images_and_prune(scene.image, scene.unused)
    scene.assert_bases_exist()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5


def test_the_base_of_a_deleted_server_is_retired_first_and_then_removed(
    rig: Rig, raw: Disk
) -> None:
    """When the last server of an image is gone, its base gets another name, and goes later."""
    scene = Scene(rig, raw)
    scene.delete_images_and_prune(scene.image)
    rig.delete(scene.server)
    base = rig.entry(scene.image)
    for exists, is_retired in ((True, False), (False, True), (False, False)):
        rig.node.check("--report")
        time.sleep(1.5)
        rig.prune(*QUICKLY)
        assert (base.exists(), base.with_suffix(".retired").exists()) == (exists, is_retired)


def test_a_retired_base_comes_back_when_a_report_names_it(rig: Rig, raw: Disk) -> None:
    """A base that is renamed under a running server is restored by the next pass."""
    scene = Scene(rig, raw)
    base = rig.entry(scene.image)
    rig.cloud.delete(scene.image)
    base.rename(base.with_suffix(".retired"))
    alive = rig.node.console(scene.server).count("guest: alive")
    rig.alive(scene.server, alive + 3)
    report = rig.node.check("--report", status=1)
    assert report["lost"] == [{"server": scene.server, "base": base.name}]
    rig.prune(*QUICKLY)
    assert base.exists()
    scene.act("reboot", "ACTIVE", {"type": "HARD"})
    assert rig.proof(scene.server) == raw.md5


def test_a_retired_base_is_restored_by_hand(rig: Rig, raw: Disk) -> None:
    """The command in docs/recovery.md gives a retired base its name back, and the server starts."""
    scene = Scene(rig, raw)
    base = rig.entry(scene.image)
    rig.cloud.delete(scene.image)
    base.rename(base.with_suffix(".retired"))
    fails(rig, scene.server, "reboot", {"type": "HARD"})
    command = command_in_recovery("mv -n SHA1.retired", {"SHA1": base.name})
    subprocess.run(command.split(), cwd=CACHE, check=True)
    reboot(rig, scene.server)
    assert rig.proof(scene.server) == raw.md5
