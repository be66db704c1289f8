"""A whole OpenStack that boots servers, on one machine, which ``inside.py`` makes.

It has Keystone and Glance (``cloud.py``), placement, Nova's API, conductor and scheduler, MariaDB,
RabbitMQ, and compute nodes with libvirt and QEMU, each in a mount namespace of its own. Every file
is where production has it, so ``ln-images`` runs with its defaults. Neutron is the one part that is
not real: it answers that there are no networks.

``python rig.py`` alone starts it with one node and waits until it is interrupted.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from keystoneauth1 import adapter, exceptions

from inside import NOVA
from support.cloud import PASSWORD, REGION, ROOT, Cloud, wait_until

# The servers must not import modules of the tests.
os.environ.pop("PYTHONPATH", None)
COMMAND = Path(sys.executable).with_name("ln-images")
PRUNE = Path(sys.executable).with_name("ln-images-prune")
NODE_TOOL = ROOT / "tools" / "ln-images-node"
# On Debian libvirt runs QEMU as this user and gives it the disks, bases included.
OWNER = "libvirt-qemu:libvirt-qemu"
GLANCE = Path("/var/lib/glance")
CACHE = GLANCE / "imagecache"
LOCKS = GLANCE / "locks"
STATE = Path("/var/lib/nova")
BASE = STATE / "instances" / "_base"
LOGS = Path("/var/log/rig")
START_SECONDS = 300.0
MICROVERSION = "2.90"
COMPUTE, PLACEMENT, NETWORK = 8774, 8778, 9696
# The kernel's limit of asynchronous requests is for the whole machine.
NO_AIO = "--innodb-use-native-aio=0"
DATABASES = ("placement", "nova_api", "nova_cell0", "nova")

# Whether Nova makes its own copy of a qcow2 image raw, which is its default.
AS_THEY_ARE, CONVERTED = "force_raw_images = False", "force_raw_images = True"
# The setting of Nova's cache manager that the documents demand.
KEEP_BASES = "remove_unused_base_images = False"

AUTH = """
auth_url = {keystone}/v3
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_name = Default
project_domain_name = Default
region_name = {region}
"""
PLACEMENT_CONF = """
[placement_database]
connection = mysql+pymysql://rig@127.0.0.1/placement
[keystone_authtoken]
{auth}
"""
NOVA_CONF = """
[DEFAULT]
log_dir = /var/log/nova
state_path = /var/lib/nova
transport_url = rabbit://guest:guest@127.0.0.1:5672/
compute_driver = libvirt.LibvirtDriver
allow_resize_to_same_host = True
initial_cpu_allocation_ratio = 64
initial_ram_allocation_ratio = 8
initial_disk_allocation_ratio = 64
# Deleted servers can be restored for an hour; guests here do not answer the power button.
reclaim_instance_interval = 3600
shutdown_timeout = 1
[api_database]
connection = mysql+pymysql://rig@127.0.0.1/nova_api
[database]
connection = mysql+pymysql://rig@127.0.0.1/nova
[oslo_concurrency]
lock_path = /var/lib/nova/tmp
[scheduler]
discover_hosts_in_cells_interval = 2
workers = 1
[conductor]
workers = 1
[quota]
instances = -1
cores = -1
ram = -1
[libvirt]
virt_type = qemu
cpu_mode = none
[vnc]
enabled = False
[nova_sys_admin]
helper_command = sudo {nova}/bin/python {nova}/bin/privsep-helper --config-file /etc/nova/nova.conf
[keystone_authtoken]
service_type = compute
{auth}
[service_user]
send_service_user_token = False
{auth}
[placement]
{auth}
[neutron]
{auth}
"""
# Under load a build must not wait for the answer to another one, and no connection may be closed
# because an answer comes late.
LIBVIRTD_CONF = """
unix_sock_group = "libvirt"
auth_unix_ro = "none"
auth_unix_rw = "none"
max_client_requests = 100
max_workers = 40
keepalive_interval = -1
"""
QEMU_CONF = 'security_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'


class Node:
    """A compute node: its own files, host name and libvirt.

    ``settings`` are lines of its nova.conf, by section.
    """

    def __init__(self, rig: "Rig", number: int, **settings: str) -> None:
        self.rig, self.name = rig, f"node-{number}"
        self.address = f"127.0.0.{number}"
        self.state = rig.directory / self.name
        self.settings: dict[str, str] = {}
        self._first, self._last_seen = dict(settings), None
        self._compute: subprocess.Popen[bytes] | None = None
        self._home = rig.spawn(
            f"{self.name}-namespace", "unshare", "--mount", "--uts", "sleep", "infinity"
        )
        time.sleep(0.5)
        self._set_up()
        self.start(**settings)

    @property
    def instances(self) -> Path:
        """Return the directory of the node's servers, as seen from outside of it."""
        return self.state / "instances"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command on the node, as root, and return what it prints."""
        return subprocess.run(
            [*self._entered(), *command], check=check, capture_output=True, text=True
        ).stdout

    def start(self, **settings: str) -> None:
        """Start nova-compute with its former settings and these, and wait until it is up."""
        self.settings |= settings
        lines = [f"[DEFAULT]\nhost = {self.name}\nmy_ip = {self.address}\n"]
        lines += [f"[{section}]\n{text}\n" for section, text in self.settings.items()]
        (Path("/etc/nova") / f"{self.name}.conf").write_text("".join(lines))
        self._last_seen = (self._service() or {}).get("updated_at")
        self._spawn_compute(self.nova_arguments())

    def nova_arguments(self, *more: str) -> tuple[str, ...]:
        """Return the arguments of this node's nova-compute, and ``more``."""
        own = f"/etc/nova/{self.name}.conf"
        return ("--config-file", "/etc/nova/nova.conf", "--config-file", own, *more)

    def restart_with_arguments(self, *arguments: str) -> None:
        """Start nova-compute anew with other arguments; :meth:`runs_with` undoes that."""
        self.stop()
        self.settings = {"other": "arguments"}
        self._last_seen = (self._service() or {}).get("updated_at")
        self._spawn_compute(arguments)

    def _spawn_compute(self, arguments: tuple[str, ...]) -> None:
        self._compute = self.rig.spawn(
            f"{self.name}-nova-compute",
            *(*self._entered(), "setpriv", "--reuid=nova", "--regid=nova", "--init-groups"),
            *(str(NOVA / "bin/python"), str(NOVA / "bin/nova-compute"), *arguments),
        )
        wait_until(self._allow_up, f"{self.name}", START_SECONDS)
        wait_until(self._up, f"{self.name}", START_SECONDS)

    def stop(self) -> None:
        """Kill nova-compute, which would take a minute to end. Its servers run on.

        Nova then lists it as down.
        """
        assert self._compute
        self._compute.kill()
        self._compute.wait()
        self._force_down(True)

    @property
    def running(self) -> bool:
        """Return whether nova-compute runs."""
        return self._compute is not None and self._compute.poll() is None

    def runs_with(self, **settings: str) -> None:
        """Restart nova-compute unless it runs with its first settings and exactly these."""
        wanted = self._first | settings
        if self.running and self.settings == wanted:
            return
        if self.running:
            self.stop()
        self.settings = {}
        self.start(**wanted)

    def console(self, server: str) -> str:
        """Return what the server has printed since it was last started."""
        path = self.instances / server / "console.log"
        return path.read_text(errors="replace").replace("\r", "") if path.exists() else ""

    def check(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """Run ln-images-node here, and return its report.

        The mounts of the rig are bind mounts, so it is an all-in-one node for the command.
        """
        command = [*self._entered(), "python3", str(NODE_TOOL), "--local", "--json", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == status, (run.returncode, run.stdout, run.stderr)
        report: dict[str, Any] = json.loads(run.stdout)
        return report

    def wrong_checks(self) -> list[str]:
        """Return the names of the checks that ln-images-node finds WRONG here."""
        command = [*self._entered(), "python3", str(NODE_TOOL), "--local", "--json"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode in (0, 1), run.stderr
        checks = json.loads(run.stdout)["checks"]
        return [check["name"] for check in checks if check["state"] == "WRONG"]

    def chain(self, server: str, disk: str = "disk") -> list[dict[str, Any]]:
        """Return what ``qemu-img info`` prints of a server's disk and of its backing files."""
        path = STATE / "instances" / server / disk
        chain = self.run(
            "qemu-img", "info", "--force-share", "--backing-chain", "--output=json", str(path)
        )
        files: list[dict[str, Any]] = json.loads(chain)
        return files

    def bases(self, server: str, disk: str = "disk") -> set[str]:
        """Return the names in the cache of the files that back a server's disk."""
        return {Path(each["filename"]).name for each in self.chain(server, disk)[1:]}

    def first_sector(self, server: str) -> bytes:
        """Return what a stopped server would read at the beginning of its disk."""
        disk, read = (STATE / "instances" / server / name for name in ("disk", "read"))
        self.run(
            "qemu-img",
            "dd",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "bs=512",
            "count=1",
            f"if={disk}",
            f"of={read}",
        )
        return (self.instances / server / "read").read_bytes()

    def rebase(self, server: str, base: str) -> None:
        """Put a stopped server's disk on another base of the same content."""
        disk = str(STATE / "instances" / server / "disk")
        self.run("qemu-img", "rebase", "-u", "-F", "raw", "-b", str(BASE / base), disk)

    def _entered(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self._home.pid}", "--mount", "--uts")

    def _set_up(self) -> None:
        locks = self.instances / "locks"
        for directory in (self.state, self.instances, self.instances / "_base", locks):
            directory.mkdir()
            shutil.chown(directory, "nova", "nova")
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"{self.address} {self.name}\n")
        self.run("hostname", self.name)
        self.run("mount", "--bind", str(self.state), str(STATE))
        # In production these are NFS mounts.
        self.run("mount", "--bind", str(CACHE), str(BASE))
        self.run("mount", "--bind", str(LOCKS), str(STATE / "instances" / "locks"))
        for private in ("/run/libvirt", "/var/lib/libvirt/qemu", "/etc/libvirt/qemu"):
            self.run("mkdir", "--parents", private)
            self.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", private)
        for daemon in ("virtlogd", "libvirtd"):
            command = (*self._entered(), daemon, "--pid-file", f"/run/libvirt/{daemon}.pid")
            self.rig.spawn(f"{self.name}-{daemon}", *command)
        self._start_sshd()
        wait_until(
            lambda: self.run("sh", "-c", "ls /run/libvirt/libvirt-sock", check=False),
            "libvirtd",
            60,
        )

    def _start_sshd(self) -> None:
        """Start an SSH server on the node's address: Nova copies disks over SSH in a migration."""
        ssh = self.state / ".ssh"
        shutil.copytree(self.rig.directory / "ssh", ssh)
        _run("chown", "--recursive", "nova:nova", str(ssh))
        options = (
            f"ListenAddress={self.address}",
            f"HostKey={self.rig.directory}/ssh/id_ed25519",
            "StrictModes=no",
            "UsePAM=no",
            "PidFile=none",
        )
        arguments = [argument for option in options for argument in ("-o", option)]
        self.run("mkdir", "--parents", "/run/sshd")
        self.rig.spawn(
            f"{self.name}-sshd", *self._entered(), "/usr/sbin/sshd", "-D", "-e", *arguments
        )

    def _service(self) -> dict[str, Any] | None:
        query = {"binary": "nova-compute", "host": self.name}
        listing = self.rig.compute.get("/os-services", params=query).json()
        services: list[dict[str, Any]] = listing["services"]
        return services[0] if services else None

    def _up(self) -> bool:
        assert self._compute
        time.sleep(0.5)
        if self._compute.poll() is not None:
            raise RuntimeError(
                f"{self.name}: nova-compute ended: {self.rig.log(f'{self.name}-nova-compute')}"
            )
        service = self._service()
        hypervisors = self.rig.compute.get("/os-hypervisors/detail").json()["hypervisors"]
        # A report of the nova-compute that ended before is not one of this nova-compute.
        is_up = service and service["state"] == "up" and service["updated_at"] != self._last_seen
        return bool(is_up) and self.name in {each["hypervisor_hostname"] for each in hypervisors}

    def _allow_up(self) -> bool:
        """Let Nova call the node up again. Return whether it does.

        After an evacuation, Nova refuses that until nova-compute has removed the servers that left.
        """
        time.sleep(0.5)
        try:
            if self._service() is not None:
                self._force_down(False)
        except exceptions.BadRequest:
            return False
        # That request is an update of the service, too: the next one is nova-compute's own.
        self._last_seen = (self._service() or {}).get("updated_at")
        return True

    def delete_service(self) -> None:
        """Delete the node in Nova, so that Nova no longer lists it."""
        service = self._service()
        assert service
        self.rig.compute.delete(f"/os-services/{service['id']}")

    def _force_down(self, down: bool) -> None:
        service = self._service()
        assert service
        self.rig.compute.put(f"/os-services/{service['id']}", json={"forced_down": down})


class Rig:
    """The running cloud; use it as a context manager.

    ``nodes`` are its compute nodes, the first of them at once.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: list[Node] = []
        self._last_number = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._network = ThreadingHTTPServer(("127.0.0.1", NETWORK), _NoNetworks)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def node(self) -> Node:
        """Return the first compute node."""
        return self.nodes[0]

    def add_node(self, **settings: str) -> Node:
        """Start one more compute node, with the settings that the documents demand, and others."""
        settings = {"DEFAULT": AS_THEY_ARE, "image_cache": KEEP_BASES, **settings}
        # A node that was removed leaves its files behind, so no number is used again.
        self._last_number += 1
        self.nodes.append(Node(self, self._last_number, **settings))
        return self.nodes[-1]

    def remove_node(self, node: Node) -> None:
        """Remove a compute node for good, with its servers, as an operator does."""
        node.runs_with()
        servers = self.compute.get("/servers", params={"all_tenants": "1", "host": node.name})
        self.delete(*[server["id"] for server in servers.json()["servers"]])
        node.stop()
        node.delete_service()
        (LOCKS / "ln-images" / f"{node.name}.json").unlink(missing_ok=True)
        self.nodes.remove(node)

    def stop(self) -> None:
        """End what was started, the last first.

        What they started in turn ends with the machine.
        """
        for process in reversed(self._processes):
            if process.poll() is None:
                process.kill()
                process.wait()
        if hasattr(self, "cloud"):
            self.cloud.stop()
        self._network.shutdown()
        self._network.server_close()
        directory = os.environ.get("RIG_LOGS")
        if not directory:
            return
        for logs in (LOGS, Path("/var/log/nova"), Path("/var/log/libvirt")):
            if logs.exists():
                shutil.copytree(logs, Path(directory) / logs.name, dirs_exist_ok=True)

    # What a user of the cloud does.

    def image(self, name: str, path: Path, disk_format: str = "raw", **properties: Any) -> str:
        """Upload a file as an image, which is active then, and return its id."""
        image_id = self.cloud.create(name, disk_format=disk_format, **properties)
        with path.open("rb") as data:
            self.cloud.image_api().put(
                f"/images/{image_id}/file",
                data=data,
                headers={"Content-Type": "application/octet-stream"},
            )
        return image_id

    def boot(
        self, image: str, node: Node | None = None, flavor: str = "small", wait: bool = True
    ) -> str:
        """Create a server, and return its id.

        With ``wait``, wait until it is active and its guest has proved that it booted.
        """
        document: dict[str, Any] = {
            "name": f"of-{image}",
            "imageRef": image,
            "flavorRef": flavor,
            "networks": "none",
        }
        if node:
            document["host"] = node.name
        server = str(
            self.compute.post("/servers", json={"server": document}).json()["server"]["id"]
        )
        if wait:
            self.wait(server, "ACTIVE")
            self.proof(server, node)
        return server

    def server(self, server: str) -> dict[str, Any]:
        """Return a server, as the administrator sees it."""
        document: dict[str, Any] = self.compute.get(f"/servers/{server}").json()["server"]
        return document

    def wait(self, server: str, status: str, seconds: float = 300) -> None:
        """Wait until a server has a status and no task is under way.

        If it is in ERROR instead, raise RuntimeError at once.
        """
        deadline = time.monotonic() + seconds
        while True:
            current = self.server(server)
            if current["OS-EXT-STS:task_state"] is None:
                if current["status"] == status:
                    return
                if current["status"] == "ERROR":
                    raise RuntimeError(
                        f"{server} is in ERROR: {current.get('fault', {}).get('message')}"
                    )
            if time.monotonic() > deadline:
                state = (current["status"], current["OS-EXT-STS:task_state"])
                raise TimeoutError(f"{server} is {state} and not {status} after {seconds} s")
            time.sleep(0.1)

    def act(self, server: str, action: str, status: str, arguments: Any = None) -> None:
        """Request an action, such as ``os-stop``, and wait for the server's new status."""
        self.compute.post(f"/servers/{server}/action", json={action: arguments})
        time.sleep(0.3)
        self.wait(server, status)

    def snapshot(self, server: str) -> str:
        """Start a snapshot of a server. Return the id of its image, which is not active yet."""
        answer = self.compute.post(
            f"/servers/{server}/action", json={"createImage": {"name": f"of-{server}"}}
        )
        return str(answer.json()["image_id"])

    def delete(self, *servers: str) -> None:
        """Delete servers at once and for good, and wait until nothing is left of them."""
        for server in servers:
            self.compute.post(f"/servers/{server}/action", json={"forceDelete": None})
        for server in servers:
            wait_until(lambda server=server: self._gone(server), f"the end of {server}", 120)

    def proof(
        self, server: str, node: Node | None = None, line: str = "guest: md5 ", seconds: float = 600
    ) -> str:
        """Wait until the guest has printed a line that begins so, and return what follows."""
        console = (node or self.node).console

        def list_matches() -> list[str]:
            # The last line may be incomplete.
            lines = console(server).split("\n")[:-1]
            return [each.removeprefix(line) for each in lines if each.startswith(line)]

        wait_until(list_matches, f"{line!r} on {server}'s console", seconds)
        return list_matches()[0]

    def alive(self, server: str, times: int) -> None:
        """Wait until the guest has printed so often that it reads its disk."""
        wait_until(
            lambda: self.node.console(server).count("guest: alive") >= times,
            f"{server} to read its disk",
            60,
        )

    # What an operator does on the storage node.

    def ln_images(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """Run a pass with the defaults of production, and return its report."""
        run = subprocess.run(
            [COMMAND, "--format", "json", "--full", *arguments],
            env=self.operator(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == status, (run.returncode, run.stdout, run.stderr)
        document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return document

    def prune(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """Run ln-images-prune with the defaults of production, and return its report."""
        run = subprocess.run(
            [PRUNE, "--format", "json", *arguments],
            env=self.operator(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == status, (run.returncode, run.stdout, run.stderr)
        document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return document

    def operator(self) -> dict[str, str]:
        """Return the environment of an administrator's openrc."""
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
        return kept | self.cloud.environment() | {"LN_IMAGES_OWNER": OWNER}

    def served(self, image: str) -> int:
        """Return how many bytes of an image Glance has served since it was started."""
        lines = (self.cloud.directory / "glance-access.log").read_text().splitlines()
        requests = [line for line in lines if f'"GET /v2/images/{image}/file' in line]
        # ... "GET /v2/images/<id>/file HTTP/1.1" 200 1048576 ...
        return sum(int(line.split('" ')[1].split()[1].replace("-", "0")) for line in requests)

    @staticmethod
    def names() -> set[str]:
        """Return every name in the cache."""
        return {path.name for path in CACHE.iterdir()}

    def openstack(self, *arguments: str) -> str:
        """Run the OpenStack command line client as the administrator, and answer yes."""
        command = [str(ROOT / ".openstack" / "bin" / "openstack"), *arguments]
        run = subprocess.run(
            command, env=self.operator(), capture_output=True, text=True, input="y\n", check=False
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    @staticmethod
    def entry(image: str) -> Path:
        """Return where Nova looks for an image, on the storage node."""
        return CACHE / hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()

    # How it is started.

    def spawn(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program, whose output goes to a log of its own."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("OS_")}
        LOGS.mkdir(exist_ok=True)
        with (LOGS / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        self._processes.append(process)
        return process

    @staticmethod
    def log(name: str) -> str:
        """Return the end of a program's log."""
        return (LOGS / f"{name}.log").read_text(errors="replace")[-2000:]

    def _start(self) -> None:
        threading.Thread(target=self._network.serve_forever, args=(0.1,), daemon=True).start()
        self._users_and_files()
        self._start_database()
        self.spawn(
            "rabbitmq", *_as("rabbitmq"), "/usr/lib/rabbitmq/bin/rabbitmq-server", **RABBITMQ
        )
        self.cloud = Cloud(GLANCE)
        self._configure()
        self.cloud.__enter__()
        self._register()
        self._start_nova()
        self.add_node()

    def _users_and_files(self) -> None:
        STATE.mkdir(exist_ok=True)
        _run(
            "useradd",
            "--system",
            "--user-group",
            "--home",
            str(STATE),
            "--groups",
            "libvirt,kvm",
            # An account without a password; one that is locked cannot use SSH.
            "--password",
            "*",
            "nova",
        )
        ssh = self.directory / "ssh"
        ssh.mkdir()
        key = ssh / "id_ed25519"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        shutil.copy(f"{key}.pub", ssh / "authorized_keys")
        (ssh / "config").write_text("Host *\n  StrictHostKeyChecking no\n  LogLevel ERROR\n")
        (self.directory / "glance").mkdir()
        GLANCE.mkdir(exist_ok=True)
        _run("mount", "--bind", str(self.directory / "glance"), str(GLANCE))
        for shared in (CACHE, LOCKS):
            shared.mkdir()
            shutil.chown(shared, "nova", "nova")
        for directory in ("/etc/nova", "/etc/placement", "/var/log/nova"):
            Path(directory).mkdir(exist_ok=True)
        shutil.chown("/var/log/nova", "nova", "nova")
        Path("/etc/sudoers.d/nova").write_text(
            f"nova ALL = (root) NOPASSWD: {NOVA}/bin/python {NOVA}/bin/privsep-helper *\n"
        )
        Path("/etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF)
        Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)

    def _start_database(self) -> None:
        data = Path("/var/lib/rig-mysql")
        _run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=mysql",
            f"--datadir={data}",
            "--skip-test-db",
            NO_AIO,
        )
        statements = "".join(f"CREATE DATABASE {name};\n" for name in DATABASES)
        statements += "CREATE USER rig@'%';\nGRANT ALL ON *.* TO rig@'%';\n"
        (data / "init.sql").write_text(statements)
        options = (
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=0",
            f"--socket={data}/socket",
        )
        self.spawn(
            "mariadb",
            *(
                "mariadbd",
                "--no-defaults",
                "--user=mysql",
                f"--datadir={data}",
                "--bind-address=127.0.0.1",
                NO_AIO,
            ),
            *(*options, f"--init-file={data}/init.sql", "--max-connections=500"),
        )

    def _configure(self) -> None:
        values = {"keystone": self.cloud.keystone, "password": PASSWORD, "region": REGION}
        auth = AUTH.format(**values)
        Path("/etc/nova/nova.conf").write_text(NOVA_CONF.format(auth=auth, nova=NOVA))
        shutil.copy(NOVA / "etc/nova/api-paste.ini", "/etc/nova")
        Path("/etc/placement/placement.conf").write_text(PLACEMENT_CONF.format(auth=auth))

    def _register(self) -> None:
        identity = self.cloud.identity()
        urls = {
            "compute": f"http://127.0.0.1:{COMPUTE}/v2.1",
            "placement": f"http://127.0.0.1:{PLACEMENT}",
            "network": f"http://127.0.0.1:{NETWORK}",
        }
        for kind, url in urls.items():
            service = identity.post(
                "/services", json={"service": {"type": kind, "name": kind}}
            ).json()["service"]
            for interface in ("public", "internal"):
                endpoint = {
                    "service_id": service["id"],
                    "interface": interface,
                    "region_id": REGION,
                    "url": url,
                }
                identity.post("/endpoints", json={"endpoint": endpoint})

    def _start_nova(self) -> None:
        self._set_up("placement-manage", "db", "sync")
        self._serve("placement", PLACEMENT, "placement.wsgi.api")
        self._set_up("nova-manage", "api_db", "sync")
        cell0 = "mysql+pymysql://rig@127.0.0.1/nova_cell0"
        self._set_up("nova-manage", "cell_v2", "map_cell0", "--database_connection", cell0)
        self._set_up("nova-manage", "cell_v2", "create_cell", "--name", "cell1")
        self._set_up("nova-manage", "db", "sync")
        for name in ("nova-conductor", "nova-scheduler"):
            self.spawn(name, str(NOVA / "bin/python"), str(NOVA / "bin" / name))
        self._serve("nova-api", COMPUTE, "nova.wsgi.osapi_compute")
        self.compute = adapter.Adapter(
            self.cloud.admin,
            service_type="compute",
            endpoint_override=f"http://127.0.0.1:{COMPUTE}/v2.1",
            default_microversion=MICROVERSION,
        )
        wait_until(self._answers, "Nova's API", START_SECONDS)
        for name, memory, disk in (("small", 128, 1), ("large", 160, 2), ("boot", 128, 10)):
            flavor = {"id": name, "name": name, "ram": memory, "vcpus": 1, "disk": disk}
            self.compute.post("/flavors", json={"flavor": flavor})

    def _answers(self) -> bool:
        time.sleep(0.5)
        try:
            return bool(self.compute.get("/flavors"))
        except (exceptions.ClientException, requests.RequestException):
            return False

    def _gone(self, server: str) -> bool:
        time.sleep(0.2)
        try:
            self.compute.get(f"/servers/{server}")
        except exceptions.NotFound:
            return not any((node.instances / server).exists() for node in self.nodes)
        return False

    def _set_up(self, program: str, *arguments: str) -> None:
        process = self.spawn(
            "setup", str(NOVA / "bin/python"), str(NOVA / "bin" / program), *arguments
        )
        if process.wait(START_SECONDS):
            raise RuntimeError(f"{program} {' '.join(arguments)}: {self.log('setup')}")

    def _serve(self, name: str, port: int, application: str) -> None:
        self.spawn(
            name,
            *(
                str(NOVA / "bin/python"),
                "-m",
                "gunicorn",
                "--bind",
                f"127.0.0.1:{port}",
                "--no-control-socket",
            ),
            *("--worker-class", "gthread", "--threads", "8", "--timeout", "120"),
            *(
                "--pythonpath",
                str(ROOT / "tests" / "heavy" / "nova"),
                f"wsgi:application({application!r})",
            ),
        )


RABBITMQ = {
    "HOME": "/var/lib/rabbitmq",
    "RABBITMQ_NODENAME": "rig@localhost",
    # Erlang's schedulers must not spin, because others need the cores.
    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1 +sbwt none +sbwtdcpu none +sbwtdio none",
}


class _NoNetworks(BaseHTTPRequestHandler):
    """It answers as a Neutron that has nothing of whatever it is asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind = (
            self.path.split("?")[0]
            .rstrip("/")
            .rsplit("/", 1)[-1]
            .removesuffix(".json")
            .replace("-", "_")
        )
        body = json.dumps({kind: []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


def _as(user: str) -> tuple[str, ...]:
    return ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups")


def _run(*command: str) -> None:
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stdout}{run.stderr}")


def main() -> None:
    """Start the rig and wait until it is interrupted."""
    with Rig(Path(os.environ["RIG_DIRECTORY"])) as rig:
        print(f"up, with {rig.node.name}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
