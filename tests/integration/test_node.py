"""The tool for compute nodes, run as a program in mount and process namespaces of its own.

Each run has a file system that looks like a compute node's: /etc is an overlay, so that the machine
that runs the tests keeps its own, and a process that is called nova-compute runs beside the tool.
Disks are made by qemu-img. Shared file systems are real FUSE mounts. This machine's kernel has no
NFS client, so for options that only NFS has, the lines that the kernel lists are rewritten.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oslo_config import cfg

from support.cloud import ROOT
from support.node import needs_root

TOOL = ROOT / "tools" / "ln-images-node"
# The number of Nova's and QEMU's users on the node. No user of this machine has one of them.
NOVA, QEMU = 64042, 64055
IMAGE = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
BASE = "0d5e6b61602d758984b3bf038267614d6016eb2a"
OTHER = hashlib.sha1(b"another image", usedforsecurity=False).hexdigest()
SERVER = "11111111-2222-4333-8444-555555555555"
# Root with this prefix may open only what everybody may, and act as other users.
NO_RIGHTS = "setpriv --bounding-set=-dac_override,-dac_read_search"
CHECKS = [
    "configuration",
    "remove_unused_base_images",
    "force_raw_images",
    "images_type",
    "base_mount",
    "locks_mount",
    "hard_mounts",
    "lock_options",
    "lookupcache",
    "byte_range_locks",
    "required_mounts",
    "link_owner",
    "nova_may_write",
    "disks",
    "libvirt_disks",
    "lost_bases",
    "report",
]
# It names itself as nova-compute's script does, reports that it runs, and waits.
FAKE_NOVA = """
import os, signal, sys
if "--as" in sys.argv:
    number = int(sys.argv[sys.argv.index("--as") + 1])
    os.setgid(number)
    os.setuid(number)
with open(os.environ["READY"], "w") as ready:
    ready.write("ready")
signal.pause()
"""
DOMAIN = """<!-- WARNING: THIS IS AN AUTO-GENERATED FILE. -->
<domain type='kvm'>
  <uuid>{server}</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:name>web</nova:name>
      <nova:root type="image" uuid="{image}"/>
    </nova:instance>
  </metadata>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}' cache='none'/>
      <source file='{path}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def load_tool() -> Any:
    """Return the tool as a module, without the cache that an import would leave in tools/."""
    module = types.ModuleType("ln_images_node")
    sys.modules[module.__name__] = module
    exec(compile(TOOL.read_text(), str(TOOL), "exec"), module.__dict__)  # noqa: S102
    return module


tool = load_tool()


class Run:
    """What one run of the tool printed."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.status = process.returncode
        self.output = process.stdout
        self.errors = process.stderr

    @property
    def report(self) -> dict[str, Any]:
        """Return the report of a run with --json."""
        assert self.output, self.errors
        document: dict[str, Any] = json.loads(self.output)
        return document

    def check(self, name: str) -> dict[str, str]:
        """Return one check of the report."""
        return next(check for check in self.report["checks"] if check["name"] == name)

    def state(self, name: str) -> str:
        """Return the state of one check."""
        return self.check(name)["state"]


class ComputeNode:
    """A compute node: its instances, its /etc, and the commands that set up its namespaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etc = folder / "etc"
        self.instances = folder / "state" / "instances"
        self.base = self.instances / "_base"
        self.locks = self.instances / "locks"
        self.shared = folder / "shared"
        for path in (self.etc / "nova", self.base, self.locks, self.shared, folder / "bin"):
            path.mkdir(parents=True)
        (folder / "bin" / "nova-compute").write_text(FAKE_NOVA)
        (self.etc / "machine-id").write_text("c0ffee\n")
        (self.etc / "passwd").write_text(
            f"root:x:0:0::/root:/bin/sh\nnova:x:{NOVA}:{NOVA}::/:/bin/false\n"
        )
        self.configure()
        os.mkfifo(folder / "ready")
        (folder / "ready").chmod(0o666)

    @property
    def report_path(self) -> Path:
        """Return where the report is."""
        return self.locks / "ln-images" / "compute-1.json"

    def configure(self, *, default: str = "", image_cache: str = "", rest: str = "") -> None:
        """Write nova.conf. By default it is right."""
        (self.etc / "nova" / "nova.conf").write_text(
            f"[DEFAULT]\nstate_path = {self.folder}/state\nhost = compute-1\n"
            f"{default or 'force_raw_images = False'}\n"
            f"[image_cache]\n{image_cache or 'remove_unused_base_images = False'}\n{rest}\n"
        )

    def run(
        self,
        *arguments: str,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        nova: str | None = "",
        python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
        local: bool = True,
        prefix: str = "",
        unquoted: str = "",
    ) -> Run:
        """Run the tool with --json in new namespaces.

        `before` are commands that run before nova-compute starts, and `after` before the tool does,
        where $NOVA is the id of nova-compute. `nova` are the arguments of nova-compute, or None if
        it does not run. `prefix` goes before the tool's command; `unquoted` are options in which
        the shell replaces variables.
        """
        options = ["--json", *(["--local"] if local else []), *arguments]
        return self.run_as_is(
            *options,
            before=before,
            after=after,
            nova=nova,
            python=python,
            variables=variables,
            prefix=prefix,
            unquoted=unquoted,
        )

    def run_as_is(
        self,
        *options: str,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        nova: str | None = "",
        python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
        prefix: str = "",
        unquoted: str = "",
    ) -> Run:
        """Run the tool with exactly these options, read from standard input."""
        lines = [
            "set -e",
            f"mount -t overlay overlay -o lowerdir={self.etc}:/etc /etc",
            *before,
        ]
        if nova is not None:
            settings = {"HOME": str(self.folder), "READY": str(self.folder / "ready")}
            settings |= dict(variables or {})
            words = ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
            words += [sys.executable, f"{self.folder}/bin/nova-compute"]
            command = f"{shlex.join(words)} {nova} & NOVA=$!"
            lines += [command, f"read -r started < {self.folder}/ready || true"]
        lines += after
        lines.append(f"{prefix} {python} - {shlex.join(options)} {unquoted} < {TOOL}")
        script = self.folder / "script"
        script.write_text("\n".join(lines))
        return Run(
            subprocess.run(
                ["unshare", "--mount", "--pid", "--kill-child", "--mount-proc", "bash", script],
                env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )

    def share(self, *directories: Path, kind: str = "glusterfs") -> list[str]:
        """Return the commands that mount a shared file system in these directories."""
        lines = []
        for directory in directories or (self.base, self.locks):
            source = self.shared / directory.name
            source.mkdir(exist_ok=True)
            lines.append(f"bindfs -o nonempty,subtype={kind} {source} {directory}")
        return lines

    def add_base(self, name: str = BASE, *options: str) -> Path:
        """Put a base into the cache."""
        path = self.base / name
        qemu_img("create", "-f", "qcow2", *options, path, "1M")
        return path

    def add_disk(
        self,
        *options: object,
        name: str = "disk",
        server: str = SERVER,
        base: Path | None = None,
        info: str | None = "qcow2",
    ) -> Path:
        """Give a server an overlay disk, and record its format in disk.info unless that is None."""
        folder = self.instances / server
        folder.mkdir(exist_ok=True)
        path = folder / name
        backing = base or self.base / BASE
        qemu_img("create", "-u", "-f", "qcow2", *options, "-F", "qcow2", "-b", backing, path, "1M")
        if info is not None:
            self.record_format(path, info)
        return path

    def record_format(self, path: Path, disk_format: str) -> None:
        """Record the format of a disk as Nova does."""
        info = path.parent / "disk.info"
        formats = json.loads(info.read_text()) if info.exists() else {}
        info.write_text(json.dumps(formats | {str(path): disk_format}) + "\n")

    def define(self, path: Path, *, disk_format: str = "qcow2", image: str = IMAGE) -> Path:
        """Write libvirt's definition of a server with one disk."""
        definition = self.etc / "libvirt" / "qemu" / "instance-00000001.xml"
        definition.parent.mkdir(parents=True, exist_ok=True)
        definition.write_text(
            DOMAIN.format(server=SERVER, image=image, format=disk_format, path=path)
        )
        return definition


def qemu_img(*arguments: object) -> None:
    """Run qemu-img."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def node() -> Iterator[ComputeNode]:
    """Make a compute node without servers, set up correctly as far as one machine can.

    It is not below pytest's own directory, which only root can enter: QEMU and Nova cannot.
    """
    with tempfile.TemporaryDirectory(prefix="node-") as folder:
        Path(folder).chmod(0o755)
        yield ComputeNode(Path(folder))


pytestmark = [
    needs_root,
    pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img: make tools"),
]
needs_bindfs = pytest.mark.skipif(
    not shutil.which("bindfs"), reason="needs a FUSE file system: apt-get install bindfs"
)


# --- Use --------------------------------------------------------------------------------------


def test_prints_one_line_per_check_and_a_summary(node: ComputeNode) -> None:
    """A run without options prints each check with its state, and what to do about a wrong one."""
    node.configure(image_cache="remove_unused_base_images = True")
    run = node.run_as_is("--local")
    lines = run.output.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == CHECKS
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "WRONG", "unknown"}
    assert "WRONG    remove_unused_base_images" in run.output
    assert "; set [image_cache] remove_unused_base_images = False" in run.output
    assert lines[-1] == "0 servers, 0 bases in use, 0 lost; the report is complete"
    assert run.status == 1


def test_without_report_it_changes_nothing(node: ComputeNode) -> None:
    """Without --report the tool writes nothing."""
    node.add_disk(base=node.add_base())
    assert node.run().status == 0
    before = {path: path.stat().st_mtime for path in node.instances.rglob("*")}
    assert node.run().status == 0
    assert {path: path.stat().st_mtime for path in node.instances.rglob("*")} == before


def test_writes_a_report(node: ComputeNode) -> None:
    """The report has every key of the contract, is readable by all, and replaces the last one."""
    node.add_disk(base=node.add_base())
    os.chown(node.locks, NOVA, NOVA)
    started = time.time()
    for _ in range(2):
        run = node.run("--report")
        assert run.status == 0, run.output
    document = json.loads(node.report_path.read_text())
    assert document == run.report
    assert document.keys() == {
        *("version", "tool_version", "host", "machine", "time", "complete", "incomplete_because"),
        *("bases", "recent", "lost", "servers", "checks"),
    }
    assert document["version"] == 1
    assert document["host"] == "compute-1"
    assert started < document["time"] < time.time()
    assert document["complete"] is True
    assert document["incomplete_because"] is None
    assert (document["bases"], document["lost"], document["servers"]) == ([BASE], [], 1)
    assert [check["name"] for check in document["checks"]] == CHECKS
    for check in document["checks"]:
        assert check.keys() == {"name", "state", "found", "fix"}
        assert (check["fix"] is None) == (check["state"] == "ok")
    status = node.report_path.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o644, NOVA, NOVA)
    assert list(node.report_path.parent.iterdir()) == [node.report_path]


def test_reports_dir_names_another_place(node: ComputeNode, tmp_path: Path) -> None:
    """With --reports-dir the report is written there, and not below locks."""
    reports = tmp_path / "reports"
    assert node.run("--report", "--reports-dir", str(reports)).status == 0
    assert [path.name for path in reports.iterdir()] == ["compute-1.json"]
    assert list(node.locks.iterdir()) == []


@pytest.mark.parametrize("option", ["--nonsense", "--pid=x"])
def test_wrong_usage_is_status_2(option: str) -> None:
    """A wrong option ends with status 2 and one line that names the command."""
    run = subprocess.run([TOOL, option], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("ln-images-node: error:")


def test_version_and_help() -> None:
    """The tool is executable and knows its version and options."""
    version = subprocess.run([TOOL, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"ln-images-node {tool.VERSION}\n"
    text = subprocess.run([TOOL, "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--report", "--json", "--reports-dir", "--raw-only", "--local", "--config-file"):
        assert option in text


def old_pythons() -> Iterator[str]:
    """Return the interpreters of this machine that are older than the project's own."""
    for minor in range(6, 11):
        found = shutil.which(f"python3.{minor}")
        folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
        installed = sorted(folder.glob(f"3.{minor}.*/bin/python"))
        if installed:
            yield str(installed[0])
        elif found:
            yield found


@pytest.mark.parametrize("python", [*old_pythons()] or [None])
def test_runs_on_old_pythons(node: ComputeNode, python: str | None) -> None:
    """The tool gives the same report on each older Python that is installed here."""
    if python is None:
        pytest.skip("needs a Python that is older than 3.11")
    disk = node.add_disk(base=node.add_base())
    node.define(disk)
    reports = [node.run("--report", python=name).report for name in (sys.executable, python)]
    for report in reports:
        report["time"] = 0
        del report["checks"][CHECKS.index("byte_range_locks")]
        report["checks"][0]["found"] = ""
    assert reports[0] == reports[1]
    assert reports[0]["bases"] == [BASE]


def test_needs_no_more_than_python_3_6() -> None:
    """The tool uses no syntax and no module that is newer than Python 3.6, says vermin."""
    vermin = Path(sys.executable).with_name("vermin")
    run = subprocess.run(
        [vermin, "--target=3.6-", "--no-tips", "--violations", TOOL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


# --- Configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "right", "violated"),
    [
        (
            "remove_unused_base_images",
            {"image_cache": "remove_unused_base_images = no"},
            {"image_cache": "manager_interval = 60"},
        ),
        (
            "remove_unused_base_images",
            {"default": "remove_unused_base_images: 0", "image_cache": "#"},
            {
                "default": "remove_unused_base_images = off",
                "image_cache": "remove_unused_base_images = on",
            },
        ),
        (
            "force_raw_images",
            {"default": "force_raw_images = 'False'"},
            {"default": "force_raw_images = True"},
        ),
        (
            "images_type",
            {"rest": "[libvirt]\nimages_type = qcow2"},
            {"rest": "[libvirt]\nimages_type = rbd"},
        ),
        ("images_type", {}, {"default": "use_cow_images = False"}),
        (
            "images_type",
            {"rest": "[LIBVIRT]\nimages_type=default"},
            {"rest": "[libvirt]\nimages_type = raw"},
        ),
    ],
)
def test_settings(
    node: ComputeNode, check: str, right: dict[str, str], violated: dict[str, str]
) -> None:
    """Each setting is ok if it is right, and WRONG with status 1 if it is not."""
    node.configure(**right)
    assert node.run().state(check) == "ok"
    node.configure(**violated)
    run = node.run()
    assert run.state(check) == "WRONG"
    assert "restart nova-compute" in run.check(check)["fix"]
    assert run.status == 1
    assert run.report["complete"]


def test_raw_only_allows_force_raw_images(node: ComputeNode) -> None:
    """If only raw images are linked, force_raw_images may be on."""
    node.configure(default="force_raw_images = True")
    assert node.run("--raw-only").state("force_raw_images") == "ok"


def test_settings_are_unknown_after_a_change(node: ComputeNode) -> None:
    """If a file is newer than nova-compute, the settings that it runs with are unknown."""
    run = node.run(after=[f"touch {node.etc}/nova/nova.conf"])
    for name in ("configuration", "remove_unused_base_images", "force_raw_images", "images_type"):
        assert run.state(name) == "unknown"
        assert run.check(name)["fix"] == "restart nova-compute"
    assert run.report["complete"]
    assert run.status == 0


def test_a_new_file_in_a_directory_is_a_change(node: ComputeNode) -> None:
    """A file that appeared in a configuration directory makes the settings unknown."""
    (node.etc / "nova" / "nova.conf.d").mkdir()
    added = node.etc / "nova" / "nova.conf.d" / "new.conf"
    added.touch()
    assert node.run().state("force_raw_images") == "ok"
    run = node.run(after=[f"rm {added}"])
    assert run.state("force_raw_images") == "unknown"


def test_without_nova_compute_the_files_count_for_paths_only(node: ComputeNode) -> None:
    """While nova-compute is stopped the settings are unknown, and the report is still written."""
    node.add_disk(base=node.add_base())
    run = node.run("--report", nova=None)
    assert run.state("remove_unused_base_images") == "unknown"
    assert run.check("remove_unused_base_images")["fix"].startswith("start nova-compute")
    assert run.report["complete"]
    assert json.loads(node.report_path.read_text())["bases"] == [BASE]


def test_without_any_configuration_no_report_is_written(node: ComputeNode) -> None:
    """Without nova-compute and its files, the report is incomplete, and is not written."""
    (node.etc / "nova" / "nova.conf").unlink()
    run = node.run("--report", nova=None)
    assert run.state("report") == "WRONG"
    assert not run.report["complete"]
    assert "found no configuration file" in run.check("configuration")["found"]
    assert run.status == 1


def test_without_any_configuration_nothing_is_said_of_disks_and_mounts(node: ComputeNode) -> None:
    """If it is not known where the servers are, no base is called there, and no mount missing."""
    (node.etc / "nova" / "nova.conf").unlink()
    run = node.run(nova=None)
    for name in ("base_mount", "locks_mount", "lost_bases"):
        assert run.state(name) == "unknown", name
    assert "--config-file" in run.check("base_mount")["fix"]


def test_config_file_names_the_files_of_a_stopped_nova(node: ComputeNode) -> None:
    """--config-file and --config-dir say where a nova-compute that is stopped has its options."""
    elsewhere = node.folder / "elsewhere.conf"
    (node.etc / "nova" / "nova.conf").rename(elsewhere)
    folder = node.folder / "more"
    folder.mkdir()
    (folder / "a.conf").write_text("[DEFAULT]\nhost = renamed\n")
    run = node.run("--config-file", str(elsewhere), "--config-dir", str(folder), nova=None)
    assert run.report["host"] == "renamed"


def test_a_file_that_cannot_be_parsed(node: ComputeNode) -> None:
    """If a configuration file is damaged, the settings are unknown, and so are the disks."""
    (node.etc / "nova" / "nova.conf.d").mkdir()
    (node.etc / "nova" / "nova.conf.d" / "x.conf").write_text("no section = 1\n")
    run = node.run()
    assert run.state("force_raw_images") == "unknown"
    assert "x.conf: line 1" in run.report["incomplete_because"]


def test_environment_of_nova_compute_wins(node: ComputeNode) -> None:
    """OS_<GROUP>__<OPTION> in the environment of nova-compute wins over its files."""
    run = node.run(variables={"OS_IMAGE_CACHE__REMOVE_UNUSED_BASE_IMAGES": "True"})
    assert run.state("remove_unused_base_images") == "WRONG"
    run = node.run(variables={"OS_DEFAULT__INSTANCES_PATH": f"{node.folder}/other"})
    assert "other" in run.check("base_mount")["found"]


def test_helpers_are_not_nova_compute(node: ComputeNode) -> None:
    """A privsep helper carries the same options, and its configuration is not read."""
    shutil.copy(node.folder / "bin" / "nova-compute", node.folder / "bin" / "privsep-helper")
    wrong = node.folder / "nova-compute"
    wrong.write_text("[image_cache]\nremove_unused_base_images = True\n")
    helper = f"{sys.executable} {node.folder}/bin/privsep-helper --config-file {wrong} &"
    ready = f"READY={node.folder}/ready"
    run = node.run(before=[f"{ready} {helper}", f"read -r x < {node.folder}/ready || true"])
    assert run.state("remove_unused_base_images") == "ok"


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("/usr/bin/python3|/usr/bin/nova-compute|--config-file=/x", ["--config-file=/x"]),
        ("python3.9|-s|-W|ignore|/opt/nova-compute|-v", ["-v"]),
        ("/usr/bin/nova-compute", []),
        (
            "nova-compute: master process [/usr/bin/nova-compute --config-dir /x]",
            ["--config-dir", "/x"],
        ),
        ("/usr/bin/python3|/usr/bin/privsep-helper|--config-file|/etc/nova/nova-compute", None),
        ("sudo|nova-compute", None),
        ("nova-compute: nova-compute worker(0)", None),
        ("/usr/bin/python3", None),
    ],
)
def test_command_lines(line: str, arguments: list[str] | None) -> None:
    """A nova-compute is recognised by its program, under an interpreter or a title."""
    found = tool.nova_compute_arguments(line.split("|"))
    assert (found[1:] if found else found) == arguments


def test_several_nova_computes(node: ComputeNode) -> None:
    """If several nova-computes run, the tool asks for one, and --pid names it."""
    second = (
        f"READY={node.folder}/ready {sys.executable} {node.folder}/bin/nova-compute & SECOND=$!"
    )
    after = [second, f"read -r x < {node.folder}/ready || true"]
    run = node.run(after=after)
    assert run.status == 2
    assert run.errors.startswith("ln-images-node: nova-compute: several run here (")
    chosen = node.run(after=after, unquoted="--pid $SECOND")
    assert chosen.state("configuration") == "ok"
    assert node.run("--pid", "1").errors.startswith("ln-images-node: --pid 1: ")


def test_somebody_elses_nova_compute(node: ComputeNode) -> None:
    """A user of this machine cannot have root read a configuration and report in a host's name."""
    evil = node.folder / "evil.conf"
    evil.write_text(f"[DEFAULT]\nhost = victim\ninstances_path = {node.folder}/evil\n")
    arguments = f"--as {QEMU} --config-file {evil}"
    run = node.run("--report", nova=arguments)
    assert run.report["host"] == "compute-1"
    assert run.state("configuration") == "unknown"
    run = node.run("--user", str(QEMU), nova=arguments)
    assert run.report["host"] == "victim"
    run = node.run(nova=arguments, unquoted="--pid $NOVA")
    assert run.report["host"] == "victim"


def test_host_that_cannot_be_a_file_name(node: ComputeNode) -> None:
    """A host name that would lead out of the directory of reports is not used."""
    node.configure(default="host = ../../evil")
    run = node.run("--report")
    assert run.state("report") == "WRONG"
    assert not run.report["complete"]
    assert not list(node.folder.rglob("evil*"))


def test_nova_in_a_container(node: ComputeNode) -> None:
    """If nova-compute has other mounts, its files and links are found as it sees them."""
    inside = node.folder / "inside"
    inside.mkdir()
    (inside / "nova.conf").write_text(
        "[DEFAULT]\nhost = inside\ninstances_path = /etc/instances\n"
        "[image_cache]\nremove_unused_base_images = True\n"
    )
    (inside / "instances").mkdir()
    # The absolute link leads to another place for a process outside of the container.
    (inside / "instances" / "locks").mkdir()
    (inside / "real_base").mkdir()
    (inside / "instances" / "_base").symlink_to("/etc/real_base")
    path = inside / "instances" / SERVER
    path.mkdir()
    (inside / "real_base" / BASE).touch()
    qemu_img(
        "create",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        f"/etc/instances/_base/{BASE}",
        path / "disk",
        "1M",
    )
    container = node.folder / "container"
    container.write_text(
        f"mount --bind {inside} /etc\nexec {sys.executable} {node.folder}/bin/nova-compute"
        " --config-file /etc/nova.conf\n"
    )
    start = f"READY={node.folder}/ready unshare --mount bash {container} &"
    run = node.run(nova=None, after=[start, f"read -r x < {node.folder}/ready || true"])
    assert run.report["host"] == "inside"
    assert run.state("remove_unused_base_images") == "WRONG"
    assert run.state("base_mount") == "ok"
    assert run.report["bases"] == [BASE]
    assert run.report["lost"] == []
    assert run.report["complete"], run.report["incomplete_because"]


NOVA_OPTIONS: list[tuple[str, cfg.Opt]] = [
    (
        "image_cache",
        cfg.BoolOpt("remove_unused_base_images", default=True, deprecated_group="DEFAULT"),
    ),
    (
        "image_cache",
        cfg.StrOpt(
            "subdirectory_name",
            default="_base",
            deprecated_name="image_cache_subdirectory_name",
            deprecated_group="DEFAULT",
        ),
    ),
    ("DEFAULT", cfg.BoolOpt("force_raw_images", default=True)),
    ("DEFAULT", cfg.BoolOpt("use_cow_images", default=True)),
    ("DEFAULT", cfg.StrOpt("state_path", default="/var/lib/nova")),
    ("DEFAULT", cfg.StrOpt("instances_path", default="$state_path/instances")),
    ("DEFAULT", cfg.StrOpt("host", default=socket.gethostname())),
    ("libvirt", cfg.StrOpt("images_type", default="default")),
]
NAMES: dict[str, Any] = {
    "remove_unused_base_images": tool.REMOVE_UNUSED,
    "subdirectory_name": tool.SUBDIRECTORY,
    "force_raw_images": tool.FORCE_RAW,
    "use_cow_images": tool.USE_COW,
    "instances_path": tool.INSTANCES_PATH,
    "host": tool.HOST_NAME,
    "images_type": tool.IMAGES_TYPE,
}
GROUPS = st.sampled_from(["DEFAULT", "image_cache", "IMAGE_CACHE", "libvirt", "other", "default"])
KEYS = st.sampled_from([*NAMES, "image_cache_subdirectory_name", "state_path"])
VALUES = st.sampled_from(
    [
        *("True", "false", "on", "0", "No", " yes ", "'False'", '"true"'),
        *("qcow2", "$state_path/x", "${state_path}y", "a$host", "\\$host", "$$host", "$nothing"),
        *(
            "$libvirt.images_type",
            "a: b",
            "x = y",
            "'",
            '""',
            "",
            "first\n  second",
            "# no comment",
        ),
    ]
)
ASSIGNMENTS = st.tuples(KEYS, st.sampled_from([" = ", "=", ": ", ":"]), VALUES).filter(
    lambda assignment: assignment[0] not in assignment[2]
)
NOISE = st.sampled_from(["# comment", "; comment", "", "   "])
LINES = st.one_of(
    GROUPS.map(lambda group: f"[{group}]"),
    NOISE,
    ASSIGNMENTS.map("".join),
    ASSIGNMENTS.map("".join),
    ASSIGNMENTS.map("".join),
)
CONTENTS = st.lists(LINES, max_size=12).map(lambda lines: "\n".join(["[DEFAULT]", *lines, ""]))
ARGUMENTS = st.lists(
    st.sampled_from(["file 1", "file=2", "dir d", "dir=e"]), max_size=4, unique=True
)


def oslo_value(conf: cfg.ConfigOpts, group: str, name: str) -> Any:
    """Return what oslo.config says an option is, or None if Nova would not start with it."""
    try:
        return conf[name] if group == "DEFAULT" else conf[group][name]
    except (cfg.ConfigFileValueError, cfg.ConfigSourceValueError, RecursionError):
        return None
    except cfg.NoSuchOptError:
        # This is how a value that refers to itself ends.
        return None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(CONTENTS, min_size=8, max_size=8),
    arguments=ARGUMENTS,
    variables=st.dictionaries(
        st.sampled_from(["OS_DEFAULT__HOST", "OS_IMAGE_CACHE__SUBDIRECTORY_NAME"]),
        st.sampled_from(["one", "$state_path", "two"]),
    ),
)
def test_options_are_those_of_oslo_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: list[str],
    arguments: list[str],
    variables: dict[str, str],
) -> None:
    """Over files, directories, defaults, old names, variables and quotes, the values are oslo's."""
    names = ["1", "2", "d/a.conf", "d/b.conf", "e/z.conf", ".nova/nova.conf"]
    names += [".nova/nova.conf.d/x.conf", ".nova/nova-compute.conf"]
    for name, content in zip(names, contents, strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    words = []
    for argument in arguments:
        option, separator, name = argument.partition("=" if "=" in argument else " ")
        if separator == "=":
            words.append(f"--config-{option}={tmp_path}/{name}")
        else:
            words += [f"--config-{option}", f"{tmp_path}/{name}"]
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        for name, value in variables.items():
            patch.setenv(name, value)
        conf = cfg.ConfigOpts()
        for group, opt in NOVA_OPTIONS:
            conf.register_opt(opt, group=None if group == "DEFAULT" else group)
        conf(words, project="nova", prog="nova-compute")
        expected = {opt.name: oslo_value(conf, group, opt.name) for group, opt in NOVA_OPTIONS}
    process = tool.Process(
        pid=1,
        parent=0,
        words=["nova-compute", *words],
        uid=0,
        gid=0,
        started=time.time() + 1,
        root="",
        directory="/",
        environment={"HOME": str(tmp_path), **variables},
    )
    configuration = tool.read_configuration(process, tool.Files(), [])
    assert configuration.unknown_because is None
    # The tool has no default for state_path. Nova's own depends on where Nova is installed.
    configuration.sections.append({"DEFAULT": {"state_path": "/var/lib/nova"}})
    for group, opt in NOVA_OPTIONS:
        if opt.name == "state_path":
            continue
        option = NAMES[opt.name]
        if isinstance(opt, cfg.BoolOpt):
            assert tool.read_boolean(configuration, option) == expected[opt.name]
        elif expected[opt.name] is not None:
            assert configuration.get(option) == expected[opt.name], (group, opt.name)


# --- Mounts -----------------------------------------------------------------------------------


@needs_bindfs
def test_shared_mounts(node: ComputeNode) -> None:
    """With _base and locks on a shared file system, the node passes and reports without --local."""
    run = node.run("--report", before=node.share(), local=False)
    for name in ("base_mount", "locks_mount"):
        assert run.state(name) == "ok"
        assert "fuse.glusterfs" in run.check(name)["found"]
    assert run.status == 0, run.output
    assert (node.shared / "locks" / "ln-images" / "compute-1.json").exists()


@needs_bindfs
@pytest.mark.parametrize("missing", ["_base", "locks"])
def test_plain_directories(node: ComputeNode, missing: str) -> None:
    """Without one of the mounts the check is WRONG, and no report is written anywhere."""
    directories = [path for path in (node.base, node.locks) if path.name != missing]
    reports = node.folder / "reports"
    run = node.run(
        *("--report", "--reports-dir", str(reports)),
        before=node.share(*directories),
        local=False,
    )
    assert run.state({"_base": "base_mount", "locks": "locks_mount"}[missing]) == "WRONG"
    assert run.state("report") == "WRONG"
    assert run.status == 1
    assert not run.report["complete"]
    assert not reports.exists()


@needs_bindfs
def test_unknown_file_systems(node: ComputeNode) -> None:
    """A file system that the tool does not know may be shared, so the check is unknown."""
    run = node.run("--report", before=node.share(kind="newfs"), local=False)
    assert run.state("base_mount") == "unknown"
    assert "fuse.newfs" in run.check("base_mount")["found"]
    assert run.status == 0


@needs_bindfs
def test_all_of_instances_shared(node: ComputeNode) -> None:
    """In layout B locks lies in the shared instances directory, and _base is a mount in it."""
    (node.shared / "instances" / "locks").mkdir(parents=True)
    (node.shared / "instances" / "_base").mkdir(parents=True)
    run = node.run(before=node.share(node.instances, node.base), local=False)
    assert run.state("base_mount") == "ok"
    assert run.state("locks_mount") == "ok"
    assert str(node.instances) in run.check("locks_mount")["found"]


@needs_bindfs
def test_symbolic_links_in_the_instances_directory(node: ComputeNode) -> None:
    """_base, locks and instances_path may be symbolic links: the mounts behind them count."""
    real = {}
    for directory in (node.base, node.locks):
        directory.rmdir()
        real[directory.name] = node.folder / "mnt" / directory.name
        real[directory.name].mkdir(parents=True)
        directory.symlink_to(real[directory.name])
    node.instances.rename(node.folder / "moved")
    node.instances.symlink_to(node.folder / "moved")
    (node.shared / "_base").mkdir()
    qemu_img("create", "-f", "qcow2", node.shared / "_base" / BASE, "1M")
    node.add_disk()
    run = node.run("--report", before=node.share(*real.values()), local=False)
    assert run.status == 0, run.output
    assert run.report["bases"] == [BASE]
    assert run.report["lost"] == []
    assert (node.shared / "locks" / "ln-images" / "compute-1.json").exists()


def as_nfs(node: ComputeNode, **options: str) -> list[str]:
    """Return commands that make the mounts of a directory look like those of NFS to the tool.

    The kernel writes such lines (fs/nfs/super.c, nfs_show_mount_options). The tool finds its line
    by the real id of the real mount.
    """
    lines = [f"mount -t tmpfs tmpfs {path}" for path in (node.base, node.locks)]
    lines.append(f"cp /proc/$NOVA/mountinfo {node.folder}/mountinfo")
    for name in ("_base", "locks"):
        text = options.get(name.strip("_"), options["both"])
        lines.append(
            f"sed -i 's# {node.instances}/{name} \\(.*\\) - tmpfs .*# {node.instances}/{name} \\1"
            f" - nfs4 storage:/x {text}#' {node.folder}/mountinfo"
        )
    return [*lines, f"mount --bind {node.folder}/mountinfo /proc/$NOVA/mountinfo"]


NFS_RIGHT = (
    "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,"
    "clientaddr=192.0.2.2,lookupcache=pos,local_lock=none,addr=192.0.2.1"
)


def test_nfs_as_the_documents_mount_it(node: ComputeNode) -> None:
    """With the options of the production guide all checks of NFS mounts are ok."""
    run = node.run(after=as_nfs(node, both=NFS_RIGHT), local=False)
    for name in ("base_mount", "locks_mount", "hard_mounts", "lock_options", "lookupcache"):
        assert run.state(name) == "ok", run.check(name)
    assert run.status == 0


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("hard_mounts", "hard", "soft"),
        ("hard_mounts", "hard", "softerr"),
        ("lock_options", "local_lock=none", "local_lock=all"),
        ("lock_options", "local_lock=none", "local_lock=posix"),
        ("lock_options", "proto=tcp", "proto=tcp,nolock"),
        ("lookupcache", ",lookupcache=pos", ""),
    ],
)
def test_nfs_with_a_wrong_option(node: ComputeNode, check: str, old: str, new: str) -> None:
    """Each mount option that breaks servers is WRONG, and names the option to use."""
    run = node.run(after=as_nfs(node, both=NFS_RIGHT.replace(old, new)), local=False)
    assert run.state(check) == "WRONG"
    assert run.check(check)["fix"].startswith("mount with")
    assert run.status == 1


def test_lookupcache_matters_for_the_cache_only(node: ComputeNode) -> None:
    """Locks may be mounted without lookupcache, and `none` is as good as `positive`."""
    without = NFS_RIGHT.replace(",lookupcache=pos", "")
    none = NFS_RIGHT.replace("lookupcache=pos", "lookupcache=none")
    run = node.run(after=as_nfs(node, both=none, locks=without), local=False)
    assert run.state("lookupcache") == "ok"


def test_options_of_a_mount_that_is_not_there(node: ComputeNode) -> None:
    """If a directory does not exist, the options of its mount are unknown."""
    node.base.rmdir()
    run = node.run(local=False)
    for name in ("hard_mounts", "lock_options", "lookupcache", "nova_may_write"):
        assert run.state(name) == "unknown"
    assert run.state("base_mount") == "WRONG"


def test_byte_range_lock(node: ComputeNode) -> None:
    """The lock is taken on a file that exists: unknown without one, ok with a lock file of Nova."""
    assert node.run().state("byte_range_locks") == "unknown"
    os.mkfifo(node.locks / "a-fifo-is-not-opened")
    (node.locks / "nova-storage-registry-lock").touch()
    assert node.run().state("byte_range_locks") == "ok"


def test_byte_range_lock_that_another_process_holds(node: ComputeNode) -> None:
    """If Nova holds the lock at that moment, locks work."""
    (node.locks / "held").touch()
    program = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "os.write(1, b'locked\\n'); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, node.locks / "held"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        run = node.run()
        holder.kill()
    assert run.state("byte_range_locks") == "ok"
    assert "another process" in run.check("byte_range_locks")["found"]


def with_unit(node: ComputeNode, shown: str) -> list[str]:
    """Return commands that make nova-compute look like a service of systemd.

    systemd does not run in the namespaces, so `systemctl` is a script that prints what the real
    one shows.
    """
    (node.folder / "bin" / "systemctl").write_text(f"#!/bin/sh\ncat <<'END'\n{shown}\nEND\n")
    (node.folder / "bin" / "systemctl").chmod(0o755)
    (node.folder / "cgroup").write_text("0::/system.slice/nova-compute.service\n")
    return [f"mount --bind {node.folder}/cgroup /proc/$NOVA/cgroup"]


def test_required_mounts(node: ComputeNode) -> None:
    """The unit must name paths at or below both mounts. A path above them requires neither."""
    both = f"RequiresMountsFor={node.base} {node.locks}"
    mounts = [f"mount -t tmpfs tmpfs {path}" for path in (node.base, node.locks)]
    run = node.run(before=mounts, after=with_unit(node, both))
    assert run.state("required_mounts") == "ok"
    for shown in (f"RequiresMountsFor={node.base}", f"RequiresMountsFor={node.folder} /var/tmp"):
        run = node.run(before=mounts, after=with_unit(node, shown))
        assert run.state("required_mounts") == "WRONG"
        assert f"RequiresMountsFor={node.base} {node.locks}" in run.check("required_mounts")["fix"]


def test_required_mounts_outside_of_systemd(node: ComputeNode) -> None:
    """If nova-compute is no service, or systemctl shows nothing, the check is unknown."""
    cgroup = node.folder / "cgroup"
    cgroup.write_text("0::/docker-4711.scope\n")
    run = node.run(after=[f"mount --bind {cgroup} /proc/$NOVA/cgroup"])
    assert run.state("required_mounts") == "unknown"
    assert node.run(after=with_unit(node, "")).state("required_mounts") == "unknown"


# --- Owner ------------------------------------------------------------------------------------


def add_link(node: ComputeNode, owner: int) -> None:
    """Put a link into the cache, that is a base with a second name."""
    base = node.add_base()
    os.link(base, node.folder / IMAGE)
    os.chown(base, owner, owner)


def write_qemu_conf(node: ComputeNode, text: str) -> None:
    """Configure libvirt."""
    path = node.etc / "libvirt" / "qemu.conf"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        f'user = "+{QEMU}"\ngroup = "+{QEMU}"\n',
        f'#user = "root"\n  user={QEMU}\ngroup = "{QEMU}" # a comment\n',
    ],
)
def test_links_owned_by_qemu(node: ComputeNode, text: str) -> None:
    """The owner of the links must be the user and group of qemu.conf, by number."""
    write_qemu_conf(node, text)
    assert node.run().state("link_owner") == "unknown"
    add_link(node, QEMU)
    assert node.run().state("link_owner") == "ok"
    os.chown(node.base / BASE, QEMU, QEMU + 1)
    run = node.run()
    assert run.state("link_owner") == "WRONG"
    assert f"{QEMU}:{QEMU + 1}" in run.check("link_owner")["found"]
    assert run.status == 1


def test_names_in_qemu_conf(node: ComputeNode) -> None:
    """Names are looked up on this node."""
    with (node.etc / "passwd").open("a") as users:
        users.write(f"qq:x:{QEMU}:1::/:/bin/false\n")
    (node.etc / "group").write_text(f"root:x:0:\nqq:x:{QEMU}:\n")
    write_qemu_conf(node, 'user = "qq"\ngroup = "qq"\n')
    add_link(node, QEMU)
    assert node.run().state("link_owner") == "ok"


def test_owner_of_a_running_qemu(node: ComputeNode) -> None:
    """If libvirt's configuration does not say who QEMU is, a running one does."""
    add_link(node, QEMU)
    assert node.run().state("link_owner") == "unknown"
    program = node.folder / "bin" / "qemu-system-x86_64"
    program.symlink_to(shutil.which("sleep") or "")
    start = f"setpriv --reuid={QEMU} --regid={QEMU} --clear-groups {program} 60 & sync"
    # The shell has forked; the program has its name when it was executed.
    wait = "while ! grep -qs ^$(printf %s " + str(program) + ") /proc/$!/cmdline; do :; done"
    assert node.run(after=[start, wait]).state("link_owner") == "ok"


def test_a_copy_is_no_link(node: ComputeNode) -> None:
    """A base that Nova downloaded has one name, and may have any owner."""
    write_qemu_conf(node, f'user = "+{QEMU}"\ngroup = "+{QEMU}"\n')
    node.add_base()
    assert node.run().state("link_owner") == "unknown"


def test_nova_may_create_bases(node: ComputeNode) -> None:
    """Nova's user must be able to create files in the cache."""
    arguments = f"--config-file /etc/nova/nova.conf --as {NOVA}"
    assert node.run(nova=arguments).state("nova_may_write") == "WRONG"
    os.chown(node.base, NOVA, NOVA)
    assert node.run(nova=arguments).state("nova_may_write") == "ok"


# --- Disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_overlays(node: ComputeNode, compat: str) -> None:
    """The base of a qcow2 overlay is in use, in both versions of the format."""
    node.add_disk("-o", f"compat={compat}", base=node.add_base())
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert run.report["servers"] == 1
    assert run.status == 0, run.output


def test_chains(node: ComputeNode) -> None:
    """The whole chain below a disk is in use, through relative names and resized copies."""
    node.add_base(OTHER)
    lower = node.base / f"{BASE}_20"
    qemu_img("create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", OTHER, lower, "1M")
    middle = node.add_disk(name="disk_middle", base=lower)
    node.add_disk(base=Path(middle.name))
    run = node.run()
    assert run.report["bases"] == sorted([BASE, OTHER])
    assert run.report["complete"], run.report["incomplete_because"]


def test_a_chain_that_ends_in_itself(node: ComputeNode) -> None:
    """A base that is its own backing file does not keep the tool busy."""
    loop = node.base / BASE
    qemu_img("create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", f"./{BASE}", loop, "1M")
    node.add_disk()
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert run.report["complete"]


@pytest.mark.parametrize(
    "name",
    ["disk", "disk.local", "disk.eph0", "disk.swap", "disk.rescue", "disk_rbase"],
)
def test_every_kind_of_disk(node: ComputeNode, name: str) -> None:
    """Each file that begins with "disk" is read, a rescued server's included."""
    node.add_disk(name=name, base=node.add_base())
    assert node.run().report["bases"] == [BASE]


def test_resized_servers(node: ComputeNode) -> None:
    """The directory that a resize leaves behind is read, and belongs to the same server."""
    node.add_base(OTHER)
    node.add_disk(base=node.add_base())
    node.add_disk(base=node.base / OTHER, server=f"{SERVER}_resize")
    run = node.run()
    assert run.report["bases"] == sorted([BASE, OTHER])
    assert run.report["servers"] == 1


def test_names_that_are_no_server(node: ComputeNode) -> None:
    """Nova's own directories and files have no disks."""
    node.configure(image_cache="remove_unused_base_images=False\nsubdirectory_name=_mine")
    (node.instances / "_mine").mkdir()
    (node.instances / "compute_nodes").write_text("{}")
    for name in ("_base", "locks", "snapshots", "_mine"):
        node.add_disk(server=name)
    run = node.run()
    assert run.report["bases"] == []
    assert run.report["servers"] == 0
    assert run.report["complete"]


def test_what_a_guest_writes_to_a_raw_disk(node: ComputeNode) -> None:
    """A raw disk with a qcow2 header that its guest wrote is not parsed, broken or not."""
    for name, state in (
        ("disk", "disk.info"),
        ("disk.config", "its name"),
        ("disk.eph0", "libvirt"),
    ):
        path = node.add_disk(name=name, info="raw" if state == "disk.info" else None)
        if state == "libvirt":
            node.define(path, disk_format="raw", image="")
        run = node.run()
        assert run.report["bases"] == [], state
        assert run.report["lost"] == []
        path.write_bytes(b"QFI\xfb" + b"\xff" * 2000)
        run = node.run()
        assert run.report["complete"], (state, run.report["incomplete_because"])
        assert run.state("disks") == "ok"


def test_a_disk_whose_format_nothing_states(node: ComputeNode) -> None:
    """Without disk.info and libvirt, a disk that begins like qcow2 is one; others are raw."""
    node.add_disk(base=node.add_base(), info=None)
    (node.instances / SERVER / "disk.swap").write_bytes(bytes(1000))
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert run.report["complete"]


def test_a_disk_that_only_one_source_calls_raw(node: ComputeNode) -> None:
    """If disk.info and libvirt disagree, the disk is read."""
    node.define(node.add_disk(base=node.add_base(), info="raw"), image="")
    assert node.run().report["bases"] == [BASE]


def damage(path: Path, offset: int, data: bytes) -> None:
    """Overwrite a part of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"\0\0\0\0", "does not begin like one"),
        (4, b"\0\0\0\x09", "version 9"),
        (8, b"\x7f" + b"\xff" * 7, "too long"),
        (16, b"\xff\xff\xff\xff", "too long"),
        (16, b"\0\0\x04\0", "too long"),
        (20, b"\0\0\0\xff", "size of clusters"),
    ],
)
def test_damaged_disks(node: ComputeNode, offset: int, data: bytes, reason: str) -> None:
    """A damaged qcow2 disk makes the report incomplete, and the reason names it."""
    disk = node.add_disk(base=node.add_base())
    damage(disk, offset, data)
    run = node.run()
    assert not run.report["complete"]
    assert str(disk) in run.report["incomplete_because"]
    assert reason in run.report["incomplete_because"]
    assert run.state("disks") == run.state("lost_bases") == "unknown"
    assert run.status == 1


@pytest.mark.parametrize("size", [0, 3, 60, 100])
def test_truncated_disks(node: ComputeNode, size: int) -> None:
    """A qcow2 disk that is cut short makes the report incomplete."""
    os.truncate(node.add_disk(base=node.add_base()), size)
    assert not node.run().report["complete"]


def test_a_base_with_content_of_a_tenant(node: ComputeNode) -> None:
    """A base that QEMU would refuse is still in use, and does not block the clean-up."""
    (node.base / BASE).write_bytes(b"QFI\xfb" + b"\xff" * 2000)
    node.add_disk()
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert run.report["complete"]


def test_bases_above_a_file_that_cannot_be_read(node: ComputeNode) -> None:
    """If a chain cannot be followed to its end, the bases that it names until there are in use."""
    (node.base / BASE).mkdir()
    node.add_disk()
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert f"{BASE}: it is not a regular file" in run.report["incomplete_because"]


def test_chains_that_are_too_long(node: ComputeNode) -> None:
    """A chain of files that does not end within limits makes the report incomplete."""
    node.add_base()
    previous = node.base / BASE
    for number in range(tool.MAX_CHAIN + 1):
        path = node.add_disk(name=f"layer{number:03}", base=previous, info=None)
        previous = Path(path.name)
    node.add_disk(base=previous)
    assert "longer than 200" in node.run().report["incomplete_because"]


def test_huge_disks(node: ComputeNode) -> None:
    """A sparse disk of 8 TiB takes no time and no memory."""
    disk = node.add_disk(base=node.add_base())
    os.truncate(disk, 8 << 40)
    raw = disk.with_name("disk.eph0")
    raw.touch()
    os.truncate(raw, 8 << 40)
    (disk.with_name("disk.info")).write_bytes(b"[" * (2 << 20))
    run = node.run(prefix="ulimit -v 500000;")
    assert run.report["bases"] == [BASE]
    assert run.report["complete"]


def test_disk_info_that_is_nested_too_deeply(node: ComputeNode) -> None:
    """A disk.info that no parser can read counts as none."""
    disk = node.add_disk(base=node.add_base())
    disk.with_name("disk.info").write_bytes(b"[" * 100_000)
    run = node.run()
    assert run.report["bases"] == [BASE]


def test_fifos(node: ComputeNode) -> None:
    """A FIFO in place of a directory or of disk.info is ignored; as a disk it is reported."""
    os.mkfifo(node.instances / str(uuid.uuid4()))
    folder = node.instances / SERVER
    folder.mkdir()
    os.mkfifo(folder / "disk.info")
    assert node.run().report["complete"]
    os.mkfifo(folder / "disk")
    run = node.run()
    assert not run.report["complete"]
    assert "disk: it is not a regular file" in run.report["incomplete_because"]


def test_devices_are_not_opened(node: ComputeNode) -> None:
    """A device in place of a disk is reported and not opened."""
    folder = node.instances / SERVER
    folder.mkdir()
    os.mknod(folder / "disk", 0o020666, os.makedev(1, 3))
    assert "not a regular file" in node.run().report["incomplete_because"]


def test_symbolic_links_to_disks(node: ComputeNode) -> None:
    """A disk or a directory that was moved elsewhere is read there. A dangling link is reported."""
    node.add_base(OTHER)
    disk = node.add_disk(base=node.add_base())
    moved = disk.rename(node.folder / "moved-disk")
    disk.symlink_to(moved)
    second = node.add_disk(server="second", base=node.base / OTHER).parent
    second.rename(node.folder / "moved-server")
    second.symlink_to(node.folder / "moved-server")
    run = node.run()
    assert run.report["bases"] == sorted([BASE, OTHER])
    assert run.report["complete"]
    moved.unlink()
    shutil.rmtree(node.folder / "moved-server")
    reason = node.run().report["incomplete_because"]
    assert reason.count("symbolic link to nothing") == 2


def test_other_names_of_backing_files(node: ComputeNode) -> None:
    """A base is found in a json: name and behind file:. A json: name without a base is reported."""
    node.add_base()
    reference = {"driver": "qcow2", "file": {"driver": "file", "filename": f"{node.base}/{BASE}"}}
    for number, name in enumerate([f"json:{json.dumps(reference)}", f"file:{node.base}/{BASE}"]):
        disk = node.add_disk(server=str(number), base=Path("x" * len(name)))
        disk.write_bytes(disk.read_bytes().replace(b"x" * len(name), name.encode()))
        assert node.run().report["bases"] == [BASE]
        assert node.run().report["complete"]
        shutil.rmtree(disk.parent)
    disk = node.add_disk(server="3", base=Path("x" * 20))
    disk.write_bytes(disk.read_bytes().replace(b"x" * 20, b'json:{"driver":"nbd"}'[:20]))
    assert not node.run().report["complete"]


def test_unprivileged_runs(node: ComputeNode) -> None:
    """Without rights the disks cannot be read, and the report says why."""
    disk = node.add_disk(base=node.add_base())
    disk.chmod(0o600)
    run = node.run(prefix="setpriv --reuid=65534 --regid=65534 --clear-groups")
    assert not run.report["complete"]
    assert "cannot read the environment of nova-compute" in run.report["incomplete_because"]
    assert f"cannot read {disk}: Permission denied" in run.report["incomplete_because"]
    assert run.state("remove_unused_base_images") == "unknown"
    assert run.state("nova_may_write") == "unknown"


class Visits:
    """Directories that change while they are visited."""

    def __init__(self, *listings: set[str]) -> None:
        self.listings = list(listings)
        self.visited: list[str] = []

    def names(self) -> set[str]:
        """Return the next listing. The last one stays."""
        return self.listings.pop(0) if len(self.listings) > 1 else self.listings[0]

    def visit(self, name: str) -> bool:
        """Note a visit. What the following listing lacks has vanished."""
        self.visited.append(name)
        return name in self.listings[0]


def test_directories_that_are_renamed_during_the_scan() -> None:
    """A name that vanished is visited again if it is back, and a new one is visited, too."""
    visits = Visits({"id", "other"}, {"id_resize", "other"}, {"id_resize", "other"})
    assert tool.visit_until_stable(visits.names, visits.visit)
    assert visits.visited == ["id", "other", "id_resize"]
    visits = Visits({"id"}, {"id_resize"}, {"id"}, {"id"})
    assert tool.visit_until_stable(visits.names, visits.visit)
    assert visits.visited == ["id", "id_resize", "id"]


def test_directories_that_never_rest() -> None:
    """If each listing has a new name, the scan ends and the report is incomplete."""
    visits = Visits(*({str(number)} for number in range(100)))
    assert not tool.visit_until_stable(visits.names, visits.visit)


def test_servers_that_come_and_go(node: ComputeNode) -> None:
    """While servers come, go and resize during the scan, every lasting disk is read."""
    node.add_base()
    node.add_disk()
    worker = (
        f"cd {node.instances}; i=0; while :; do i=$((i + 1)); mkdir t$i; cp -r {SERVER}/. t$i;"
        " mv t$i t${i}_resize; rm -r t${i}_resize; done 2>/dev/null &"
    )
    for _ in range(5):
        run = node.run(after=[worker])
        assert run.report["bases"] == [BASE]
        assert run.report["lost"] == []


# --- Nothing overlooked -----------------------------------------------------------------------


def test_disks_that_libvirt_knows(node: ComputeNode) -> None:
    """A disk that lies elsewhere is read because libvirt names it, and its image is in use."""
    node.add_base(OTHER)
    elsewhere = node.folder / "volume"
    qemu_img("create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", node.base / OTHER, elsewhere, "1M")
    node.define(elsewhere)
    run = node.run()
    assert run.report["bases"] == sorted([BASE, OTHER])
    assert run.state("libvirt_disks") == "ok"
    assert run.report["complete"]
    elsewhere.unlink()
    run = node.run()
    assert not run.report["complete"]
    assert str(elsewhere) in run.report["incomplete_because"]


def test_instances_that_are_not_mounted(node: ComputeNode) -> None:
    """An instances directory whose volume is not mounted does not pass for one without servers."""
    node.define(node.instances / SERVER / "disk")
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert not run.report["complete"]


def test_the_definition_that_a_migration_leaves_behind(node: ComputeNode) -> None:
    """A server that left for another node has its disk in <id>_resize, and blocks nothing.

    Until the migration is confirmed, libvirt's definition still names the disk in <id>.
    """
    node.add_disk(base=node.add_base(), server=f"{SERVER}_resize")
    node.define(node.instances / SERVER / "disk")
    run = node.run()
    assert run.report["bases"] == [BASE]
    assert run.report["complete"]


def test_without_libvirts_definitions(node: ComputeNode) -> None:
    """If libvirt's definitions are not visible, that is unknown, and the report is complete."""
    node.add_disk(base=node.add_base())
    run = node.run()
    assert run.state("libvirt_disks") == "unknown"
    assert run.report["complete"]


@pytest.mark.parametrize(
    "content",
    [
        b"<domain>",
        b"\xff\xfe",
        b'<!DOCTYPE x [<!ENTITY a "aaaa">]><domain>&a;</domain>',
        b"<domain>" * 200_000,
    ],
)
def test_definitions_that_cannot_be_read(node: ComputeNode, content: bytes) -> None:
    """A definition that cannot be parsed makes the report incomplete."""
    node.define(node.add_disk(base=node.add_base())).write_bytes(content)
    run = node.run()
    assert not run.report["complete"]
    assert "instance-00000001.xml" in run.report["incomplete_because"]
    assert run.report["bases"] == [BASE]


# --- Lost bases -------------------------------------------------------------------------------


def test_lost_bases(node: ComputeNode) -> None:
    """A disk whose base is missing is reported with its server, and the base counts as in use."""
    node.add_disk()
    run = node.run("--report")
    assert run.report["lost"] == [{"server": SERVER, "base": BASE}]
    assert run.report["bases"] == [BASE]
    assert run.state("lost_bases") == "WRONG"
    assert SERVER in run.check("lost_bases")["found"]
    assert run.status == 1
    assert run.report["complete"]
    node.add_base()
    assert node.run().report["lost"] == []


def test_a_missing_file_that_is_no_base(node: ComputeNode) -> None:
    """If another file of the chain is missing, the bases below it are not known."""
    node.add_disk(base=Path("missing.qcow2"))
    run = node.run()
    assert run.report["lost"] == []
    assert "missing.qcow2, which does not exist" in run.report["incomplete_because"]


# --- Reports ----------------------------------------------------------------------------------


def previous_report(node: ComputeNode, **changes: Any) -> None:
    """Write a report as an earlier run did, with some changes."""
    assert node.run("--report").status in (0, 1)
    document = json.loads(node.report_path.read_text()) | changes
    node.report_path.write_text(json.dumps(document))


def test_recent_bases(node: ComputeNode) -> None:
    """A base that an earlier report named stays in `recent` with the time, for 24 hours."""
    now = time.time()
    previous_report(
        node, time=now - 3600, bases=[BASE], recent={OTHER: now - 7200, "f" * 40: now - 90000}
    )
    run = node.run("--report")
    assert run.report["bases"] == []
    assert run.report["recent"] == {BASE: now - 3600, OTHER: now - 7200}
    again = node.run("--report")
    assert again.report["recent"] == run.report["recent"]
    previous_report(node, time=now - 90000, bases=[BASE], recent={})
    assert node.run("--report").report["recent"] == {}


def test_recent_bases_from_the_future(node: ComputeNode) -> None:
    """A time in the future counts as now, so that a wrong clock keeps no base for ever."""
    previous_report(
        node, time=time.time() + 10**9, bases=[BASE], recent={OTHER: time.time() + 10**9}
    )
    run = node.run("--report")
    assert run.report["recent"].keys() == {BASE, OTHER}
    assert max(run.report["recent"].values()) <= run.report["time"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "time": "x", "bases": [], "recent": {}}',
        b'{"version": 1, "time": NaN, "bases": [], "recent": {}}',
        b'{"version": 1, "time": 1, "bases": ["../x"], "recent": {}}',
        b'{"version": 1, "time": 1, "bases": [], "recent": {"x": 1}}',
        b'{"version": 1, "time": 1, "bases": 7, "recent": {}}',
        b"\xff",
    ],
)
def test_damaged_last_reports(node: ComputeNode, content: bytes) -> None:
    """A last report that is damaged makes one run incomplete, and the next is complete."""
    node.report_path.parent.mkdir()
    node.report_path.write_bytes(content)
    run = node.run("--report")
    assert "cannot read the last report" in run.report["incomplete_because"]
    assert node.run("--report").report["complete"]


def test_another_machine_with_this_host_name(node: ComputeNode) -> None:
    """A fresh report of another machine is WRONG and stays. One that is 3 hours old is replaced."""
    previous_report(node, machine="other", bases=[BASE])
    before = node.report_path.read_bytes()
    run = node.run("--report")
    assert run.state("report") == "WRONG"
    assert run.status == 1
    assert node.report_path.read_bytes() == before
    (node.etc / "machine-id").write_text("")
    assert node.run().state("report") == "ok"
    (node.etc / "machine-id").write_text("c0ffee\n")
    previous = json.loads(before) | {"time": time.time() - 3 * 3600 - 1}
    node.report_path.write_text(json.dumps(previous))
    run = node.run("--report")
    assert run.state("report") == "ok"
    assert run.report["recent"].keys() == {BASE}


def test_the_machines_id_is_not_published(node: ComputeNode) -> None:
    """The report has a digest of /etc/machine-id, which is the same in each run."""
    machines = {node.run().report["machine"] for _ in range(2)}
    assert len(machines) == 1
    assert "c0ffee" not in machines.pop()


@pytest.mark.parametrize("planted", ["directory", "report"])
def test_symbolic_links_among_the_reports(node: ComputeNode, planted: str) -> None:
    """Whoever writes to locks cannot lead root's report to another place."""
    target = node.folder / "target"
    target.mkdir()
    (target / "file").write_text("untouched")
    if planted == "directory":
        (node.locks / "ln-images").symlink_to(target)
    else:
        node.report_path.parent.mkdir()
        node.report_path.symlink_to(target / "file")
    run = node.run("--report")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "untouched"
    assert run.status == 1
    if planted == "directory":
        assert run.check("report")["found"].startswith(f"cannot write {node.report_path}")
    else:
        assert node.report_path.is_file()
        assert not node.report_path.is_symlink()


def test_root_squash(node: ComputeNode) -> None:
    """Root without rights, as with root_squash, reads and writes as the owners of files."""
    add_link(node, QEMU)
    write_qemu_conf(node, f'user = "+{QEMU}"\ngroup = "+{QEMU}"\n')
    disk = node.add_disk()
    os.chown(disk, QEMU, QEMU)
    disk.chmod(0o600)
    lock = node.locks / "nova-lock"
    lock.touch(0o600)
    for path, mode in ((node.base, 0o711), (node.locks, 0o711), (lock, 0o600)):
        os.chown(path, NOVA, NOVA)
        path.chmod(mode)
    run = node.run("--report", prefix=NO_RIGHTS, nova=f"--as {NOVA}")
    for name in ("byte_range_locks", "link_owner", "nova_may_write", "disks", "report"):
        assert run.state(name) == "ok", run.check(name)
    assert run.report["bases"] == [BASE]
    assert node.report_path.stat().st_uid == NOVA
    assert run.status == 0


def test_a_report_that_cannot_be_written(node: ComputeNode) -> None:
    """If the report cannot be written, its check is WRONG with the reason."""
    run = node.run("--report", after=[f"mount -t tmpfs -o ro tmpfs {node.locks}"])
    assert "Read-only file system" in run.check("report")["found"]
    assert run.status == 1


# --- Hostile input ----------------------------------------------------------------------------


def test_names_cannot_control_the_terminal(node: ComputeNode) -> None:
    """Control characters in names are printed as escapes, and no name forges a line."""
    (node.instances / "x\x1b[2J\nok       disks").mkdir()
    os.mkfifo(node.instances / "x\x1b[2J\nok       disks" / "disk\u202e")
    run = node.run_as_is("--local")
    assert "\x1b" not in run.output
    assert "\\x1b[2J\\nok" in run.output
    assert len(run.output.splitlines()) == len(CHECKS) + 1


HEADERS = st.builds(
    lambda version, offset, size, bits, rest: (
        b"QFI\xfb"
        + version.to_bytes(4, "big")
        + offset.to_bytes(8, "big")
        + size.to_bytes(4, "big")
        + bits.to_bytes(4, "big")
        + rest
    ),
    st.sampled_from([0, 1, 2, 3, 4, 2**32 - 1]),
    st.one_of(st.integers(0, 700), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 1100), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(8, 22), st.integers(0, 2**32 - 1)),
    st.binary(max_size=700),
)


@given(
    content=st.one_of(st.binary(max_size=200), HEADERS),
    disk_format=st.sampled_from([None, "qcow2", "raw", "vmdk", ""]),
)
@example(content=b"QFI\xfb" + b"\xff" * 200, disk_format=None)
def test_any_bytes_have_a_verdict(content: bytes, disk_format: str | None) -> None:
    """Whatever a disk holds, its header gives a name within limits, nothing, or an error."""
    descriptor = os.memfd_create("disk")
    os.write(descriptor, content)
    with os.fdopen(descriptor), contextlib.suppress(tool.DamagedHeaderError):
        backing = tool.read_backing(descriptor, disk_format)
        if backing is not None:
            assert 0 < len(backing.name) <= 1023
            assert backing.name in content
            tool.resolve_backing("/x/disk", backing.name)


@given(st.text())
def test_printable(text: str) -> None:
    """Whatever a text holds, what is printed of it is ASCII without control characters."""
    shown = tool.printable(text)
    assert all(" " <= character <= "~" for character in shown)
    assert len(shown) <= tool.MAX_MESSAGE + 3


@given(st.binary(max_size=300))
@example(b"<domain><devices><disk><source file='/x'/></disk></devices></domain>")
@example(b"<?xml version='1.0' encoding='nonsense'?><domain/>")
def test_any_definition_has_a_verdict(content: bytes) -> None:
    """Whatever a definition holds, it is parsed or refused with a ValueError."""
    with contextlib.suppress(ValueError):
        assert isinstance(tool.parse_definition(content), tool.Definition)
