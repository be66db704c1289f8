"""``ln-images-node`` on real compute nodes."""

import json

import pytest

from inside import NOVA
from rig import Rig
from rig_fixtures import Disk

# Prints the options as oslo.config has them in a nova-compute with these arguments.
READ_OPTIONS = """
import json, sys
import nova.conf
import nova.config
CONF = nova.conf.CONF
nova.config.parse_args(["nova-compute", *sys.argv[1:]])
print(json.dumps({
    "remove": CONF.image_cache.remove_unused_base_images,
    "raw": CONF.force_raw_images,
    "type": CONF.libvirt.images_type,
    "instances": CONF.instances_path,
    "base": CONF.image_cache.subdirectory_name,
    "host": CONF.host,
}))
"""


def test_a_node_that_is_set_up_by_the_documents_passes(rig: Rig, raw: Disk) -> None:
    """On the rig's node nothing is WRONG, and the report names the base that its server uses."""
    image = rig.image("used", raw.path)
    rig.ln_images()
    rig.boot(image)
    report = rig.node.check("--report")
    assert [check for check in report["checks"] if check["state"] == "WRONG"] == []
    assert report["complete"]
    assert rig.entry(image).name in report["bases"]


@pytest.mark.parametrize(
    ("section", "settings", "check"),
    [
        ("image_cache", "remove_unused_base_images = True", "remove_unused_base_images"),
        ("DEFAULT", "force_raw_images = True", "force_raw_images"),
        ("libvirt", "images_type = flat", "images_type"),
    ],
)
def test_each_violated_setting_is_reported(
    rig: Rig, section: str, settings: str, check: str
) -> None:
    """A running nova-compute with a wrong setting makes exactly that check WRONG."""
    rig.node.runs_with(**{section: settings})
    try:
        assert rig.node.wrong_checks() == [check]
    finally:
        rig.node.runs_with()


def test_the_configuration_is_the_one_that_nova_compute_has(rig: Rig) -> None:
    """Options in several files, deprecated names included, are read as oslo.config reads them."""
    extra = rig.directory / "conf.d"
    extra.mkdir()
    (extra / "10-first.conf").write_text(
        "[DEFAULT]\nremove_unused_base_images = False\nforce_raw_images: yes\n"
    )
    (extra / "20-second.conf").write_text(
        "[DEFAULT]\nforce_raw_images=0\n[libvirt]\nimages_type=raw\n"
    )
    arguments = rig.node.nova_arguments("--config-dir", str(extra))
    rig.node.restart_with_arguments(*arguments)
    try:
        options = json.loads(rig.node.run(str(NOVA / "bin/python"), "-c", READ_OPTIONS, *arguments))
        checks = {check["name"]: check for check in rig.node.check(status=1)["checks"]}
    finally:
        rig.node.runs_with()
    assert not options["remove"]
    assert checks["remove_unused_base_images"]["state"] == "ok"
    assert not options["raw"]
    assert checks["force_raw_images"]["state"] == "ok"
    assert options["type"] in checks["images_type"]["found"]
    assert checks["images_type"]["state"] == "WRONG"


def test_a_lost_base_is_reported_before_its_server_is_restarted(rig: Rig, raw: Disk) -> None:
    """A base that disappears under a running server is WRONG, with the server's id."""
    image = rig.image("lost", raw.path)
    rig.ln_images()
    server = rig.boot(image)
    base = rig.entry(image)
    base.unlink()
    report = rig.node.check("--report", status=1)
    assert report["lost"] == [{"server": server, "base": base.name}]
    pruned = rig.prune("--dry-run", status=1)
    assert pruned["counts"]["lost"] == 1
    assert pruned["nodes"][0]["lost"] == report["lost"]
