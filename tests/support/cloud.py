"""A real Keystone and a real Glance on loopback, with SQLite, in one directory.

The servers run from a virtual environment of their own (``make`` builds it in ``.cloud``), so that
the command under test is imported and timed without them.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import urllib.parse
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from keystoneauth1 import adapter, exceptions, session
from keystoneauth1.identity import v3

ROOT = Path(__file__).resolve().parent.parent.parent
SERVERS = Path(os.environ.get("CLOUD_VENV", ROOT / ".cloud"))
PASSWORD = "s3cret-Of-the-admin"
REGION = "RegionOne"
START_SECONDS = 120.0
# What is made once and copied for each cloud: two databases, and two directories of keys.
SET_UP = ("keystone.sqlite", "glance.sqlite", "fernet", "credential")

# Nobody needs the databases after a crash of the machine: nothing waits until they are on the disk.
KEYSTONE_CONF = """
[DEFAULT]
log_file = {directory}/keystone.log
[database]
connection = sqlite:///{directory}/keystone.sqlite?timeout=30
sqlite_synchronous = False
[fernet_tokens]
key_repository = {directory}/fernet
[fernet_receipts]
key_repository = {directory}/fernet
[credential]
key_repository = {directory}/credential
[identity]
password_hash_rounds = 4
[auth]
methods = password,token,application_credential,totp
"""

GLANCE_CONF = """
[DEFAULT]
log_file = {directory}/glance.log
enabled_backends = file:file
[database]
connection = sqlite:///{directory}/glance.sqlite?timeout=30
sqlite_synchronous = False
[glance_store]
default_backend = file
[file]
filesystem_store_datadir = {images}
[os_glance_tasks_store]
filesystem_store_datadir = {directory}/tasks
[os_glance_staging_store]
filesystem_store_datadir = {directory}/staging
[paste_deploy]
flavor = keystone
config_file = {servers}/etc/glance/glance-api-paste.ini
[keystone_authtoken]
www_authenticate_uri = {keystone}/v3
auth_url = {keystone}/v3
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_name = Default
project_domain_name = Default
service_type = image
"""


class Cloud:
    """A cloud that runs as long as its context.

    ``directory`` must be on the file system where the images are to be. ``images`` is Glance's
    store.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self._http = requests.Session()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets = {
            name: socket.create_server(("127.0.0.1", 0)) for name in ("keystone", "glance")
        }
        self.keystone, self.glance = (
            f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in self._sockets.values()
        )
        # One token for all that the administrator does.
        self.admin = self.as_user()

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

    def environment(
        self, user: str = "admin", project: str = "admin", password: str = PASSWORD
    ) -> dict[str, str]:
        """Return the ``OS_*`` variables of an openrc for ``user`` in ``project``."""
        return {
            "OS_AUTH_URL": f"{self.keystone}/v3",
            "OS_USERNAME": user,
            "OS_PASSWORD": password,
            "OS_PROJECT_NAME": project,
            "OS_USER_DOMAIN_NAME": "Default",
            "OS_PROJECT_DOMAIN_NAME": "Default",
            "OS_REGION_NAME": REGION,
        }

    def as_user(
        self, user: str = "admin", project: str = "admin", password: str = PASSWORD
    ) -> session.Session:
        """Return a keystoneauth1 session of ``user`` in ``project``."""
        return session.Session(
            session=self._http,
            auth=v3.Password(
                auth_url=f"{self.keystone}/v3",
                username=user,
                password=password,
                project_name=project,
                user_domain_name="Default",
                project_domain_name="Default",
            ),
        )

    def identity(self, who: session.Session | None = None) -> adapter.Adapter:
        """Return Keystone's API as the administrator, or as ``who``."""
        return adapter.Adapter(who or self.admin, endpoint_override=f"{self.keystone}/v3")

    def image_api(self, who: session.Session | None = None) -> adapter.Adapter:
        """Return Glance's API as the administrator, or as ``who``."""
        return adapter.Adapter(who or self.admin, endpoint_override=f"{self.glance}/v2")

    def add_user(
        self, name: str, project: str, role: str, password: str = PASSWORD
    ) -> session.Session:
        """Make a project and a user with one role in it, and return the user's session."""
        identity = self.identity()
        made = identity.post(
            "/projects", json={"project": {"name": project, "domain_id": "default"}}
        ).json()
        user = identity.post(
            "/users", json={"user": {"name": name, "password": password, "domain_id": "default"}}
        ).json()
        roles = identity.get("/roles", params={"name": role}).json()["roles"]
        identity.put(
            f"/projects/{made['project']['id']}/users/{user['user']['id']}/roles/{roles[0]['id']}"
        )
        return self.as_user(name, project, password)

    def application_credential(self, user: session.Session, **limits: Any) -> dict[str, str]:
        """Make an application credential of ``user``, and return its ``OS_*`` variables."""
        document = {"application_credential": {"name": str(uuid.uuid4())} | limits}
        made = (
            self.identity(user)
            .post(f"/users/{user.get_user_id()}/application_credentials", json=document)
            .json()
        )
        return {
            "OS_AUTH_URL": f"{self.keystone}/v3",
            "OS_AUTH_TYPE": "v3applicationcredential",
            "OS_APPLICATION_CREDENTIAL_ID": made["application_credential"]["id"],
            "OS_APPLICATION_CREDENTIAL_SECRET": made["application_credential"]["secret"],
        }

    def create(self, name: str, who: session.Session | None = None, **properties: Any) -> str:
        """Make a queued image, by default raw and bare, and return its id."""
        document = {"name": name, "disk_format": "raw", "container_format": "bare"} | properties
        return str(self.image_api(who).post("/images", json=document).json()["id"])

    def upload(self, image_id: str, data: bytes, who: session.Session | None = None) -> None:
        """Upload the whole content of a queued image, which makes it active."""
        self.image_api(who).put(
            f"/images/{image_id}/file",
            data=data,
            headers={"Content-Type": "application/octet-stream"},
        )

    def image(
        self, name: str, data: bytes, who: session.Session | None = None, **properties: Any
    ) -> str:
        """Make an active image and return its id."""
        image_id = self.create(name, who, **properties)
        self.upload(image_id, data, who)
        return image_id

    def delete(self, image_id: str) -> None:
        """Delete an image, and with it Glance's name of its file."""
        self.image_api().delete(f"/images/{image_id}")

    def slow_upload(self, image_id: str, first: bytes, path: str = "file") -> "Upload":
        """Start an upload and send only ``first``: the image is ``saving`` until it is finished.

        Uploads reach the disk in steps of 65,536 bytes, so ``first`` should be longer than that.
        With ``path="stage"`` the image is ``uploading`` instead.
        """
        return Upload(self, image_id, first, path)

    def status(self, image_id: str) -> str:
        """Return the status of an image."""
        return str(self.image_api().get(f"/images/{image_id}").json()["status"])

    def database(self) -> contextlib.closing[sqlite3.Connection]:
        """Open Glance's own database, for states that no API call reaches. It commits by itself."""
        return contextlib.closing(
            sqlite3.connect(self.directory / "glance.sqlite", timeout=30, isolation_level=None)
        )

    def set_status(self, image_id: str, status: str) -> None:
        """Put an image into a state in which no API call leaves it."""
        with self.database() as database:
            database.execute("UPDATE images SET status = ? WHERE id = ?", (status, image_id))

    def add_many(self, count: int, size: int = 4096) -> list[str]:
        """Make ``count`` active raw images at once, as rows and sparse files.

        The API would take minutes.
        """
        ids = [str(uuid.uuid4()) for _ in range(count)]
        # With microseconds, as Glance writes them: it pages by comparing them as text.
        now = time.strftime("%Y-%m-%d %H:%M:%S.000000")
        image = ("active", "raw", "bare", size, 0, 0, 0, 0, "private", "0" * 32, now, now, 0)
        columns = (
            "status, disk_format, container_format, size, min_disk, min_ram, protected, deleted,"
            " visibility, owner, created_at, updated_at, os_hidden"
        )
        with self.database() as database:
            database.execute("BEGIN")
            database.executemany(
                f"INSERT INTO images (id, name, {columns})"  # noqa: S608
                f" VALUES (?, ?{', ?' * len(image)})",
                ((image_id, f"image-{number}", *image) for number, image_id in enumerate(ids)),
            )
            database.executemany(
                "INSERT INTO image_locations"
                " (image_id, value, deleted, status, meta_data, created_at, updated_at)"
                " VALUES (?, ?, 0, 'active', '{\"store\": \"file\"}', ?, ?)",
                ((image_id, f"file://{self.images}/{image_id}", now, now) for image_id in ids),
            )
            database.execute("COMMIT")
        for image_id in ids:
            with (self.images / image_id).open("wb") as file:
                file.truncate(size)
        return ids

    def clear(self) -> None:
        """Remove every image and every file of the store at once."""
        with self.database() as database:
            for table in (
                "image_members",
                "image_tags",
                "image_properties",
                "image_locations",
                "images",
            ):
                database.execute(f"DELETE FROM {table}")  # noqa: S608
        shutil.rmtree(self.images)
        self.images.mkdir(mode=0o700)

    def stop(self) -> None:
        """End every server and wait until it is gone. May be called twice."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        for listener in self._sockets.values():
            listener.close()
        self._http.close()

    def _start(self) -> None:
        fresh = _set_up_once()
        self._configure()
        for name in SET_UP:
            (shutil.copytree if (fresh / name).is_dir() else shutil.copy2)(
                fresh / name, self.directory / name
            )
        with (
            contextlib.closing(sqlite3.connect(self.directory / "keystone.sqlite")) as database,
            database,
        ):
            database.execute("UPDATE endpoint SET url = ?", (f"{self.keystone}/v3",))
        self._serve("keystone")
        self._serve("glance")
        self._wait_for(self.identity(), "/services")
        self._register_glance()
        self._wait_for(self.image_api(), "/images")

    def _configure(self) -> None:
        for name in ("images", "tasks", "staging"):
            (self.directory / name).mkdir(mode=0o700, parents=True)
        values = {
            "directory": self.directory,
            "images": self.images,
            "servers": SERVERS,
            "keystone": self.keystone,
            "password": PASSWORD,
        }
        (self.directory / "keystone.conf").write_text(KEYSTONE_CONF.format(**values))
        (self.directory / "glance-api.conf").write_text(GLANCE_CONF.format(**values))

    def set_up(self) -> None:
        """Make the databases and the keys of a cloud that is to be copied, and start nothing."""
        self._configure()
        for name in ("fernet", "credential"):
            (self.directory / name).mkdir(mode=0o700)
        # The two databases are independent: made side by side they take half the time.
        glance = self._spawn("glance-manage", "db_sync")
        for command in (
            ["db_sync"],
            ["fernet_setup", *self._keystone_user()],
            ["credential_setup", *self._keystone_user()],
            [
                *("bootstrap", "--bootstrap-password", PASSWORD, "--bootstrap-region-id", REGION),
                *("--bootstrap-public-url", f"{self.keystone}/v3"),
                *("--bootstrap-internal-url", f"{self.keystone}/v3"),
            ],
        ):
            self._finished(self._spawn("keystone-manage", *command))
        self._finished(glance)

    def _register_glance(self) -> None:
        identity = self.identity()
        service = identity.post(
            "/services", json={"service": {"type": "image", "name": "glance"}}
        ).json()
        endpoint = {
            "service_id": service["service"]["id"],
            "interface": "public",
            "region_id": REGION,
            "url": self.glance,
        }
        identity.post("/endpoints", json={"endpoint": endpoint})

    @staticmethod
    def _keystone_user() -> list[str]:
        return ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]

    def _wait_for(self, api: adapter.Adapter, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                api.get(path, timeout=10)
                return
            except (exceptions.ClientException, requests.RequestException):
                if time.monotonic() > deadline or any(
                    p.poll() is not None for p in self._processes
                ):
                    raise RuntimeError(
                        f"the cloud did not start: see the logs in {self.directory}"
                    ) from None
                time.sleep(0.2)

    def _serve(self, name: str) -> None:
        listener = self._sockets[name]
        self._spawn(
            *("python", "-m", "gunicorn", "--bind", f"fd://{listener.fileno()}"),
            # A connection that is closed just when it is used again is reset. With gunicorn's two
            # seconds that happened.
            *(
                "--worker-class",
                "gthread",
                "--threads",
                "16",
                "--timeout",
                "120",
                "--keep-alive",
                "75",
            ),
            *("--access-logfile", f"{self.directory}/{name}-access.log"),
            *(
                "--no-control-socket",
                "--pythonpath",
                str(ROOT / "tests" / "support"),
                f"cloud_wsgi:{name}()",
            ),
            log=f"{name}-server.log",
            listener=listener.fileno(),
        )
        # Only the server holds the socket now: if it dies, a request is refused and does not hang.
        listener.close()

    def _spawn(
        self, program: str, *arguments: str, log: str = "setup.log", listener: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program of the servers' environment in a process group of its own."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OS_")}
        environment |= {
            "OS_KEYSTONE_CONFIG_FILES": f"{self.directory}/keystone.conf",
            "OS_GLANCE_CONFIG_DIR": str(self.directory),
        }
        configuration = {
            "keystone-manage": ["--config-file", f"{self.directory}/keystone.conf"],
            "glance-manage": ["--config-file", f"{self.directory}/glance-api.conf"],
        }.get(program, [])
        with (self.directory / log).open("ab") as output:
            process = subprocess.Popen(
                # It does not outlive this process, even one that is killed.
                [
                    "setpriv",
                    "--pdeathsig",
                    "TERM",
                    SERVERS / "bin" / program,
                    *configuration,
                    *arguments,
                ],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if listener is None else (listener,),
            )
        self._processes.append(process)
        return process

    def _finished(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait(START_SECONDS):
            raise RuntimeError(f"{process.args!r} failed: see {self.directory}/setup.log")
        self._processes.remove(process)


def _set_up_once() -> Path:
    """Return the directory of a cloud that was set up and has never run.

    To make it takes 15 s, and to copy it takes no time. It is made anew if the servers' versions or
    their configuration have changed. One process makes it, and others wait.
    """
    made_of = (
        Path(__file__).read_bytes()
        + (ROOT / "tests" / "support" / "cloud-requirements.txt").read_bytes()
    )
    fresh = SERVERS / f"set-up-{hashlib.sha256(made_of).hexdigest()[:16]}"
    with (SERVERS / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not fresh.exists():
            with tempfile.TemporaryDirectory(prefix="setting-up-", dir=SERVERS) as temporary:
                making = Cloud(Path(temporary, "cloud"))
                try:
                    making.set_up()
                finally:
                    making.stop()
                making.directory.rename(fresh)
    return fresh


class Upload:
    """An upload that has begun."""

    def __init__(self, cloud: Cloud, image_id: str, first: bytes, path: str) -> None:
        self._cloud, self._image_id = cloud, image_id
        parts = urllib.parse.urlsplit(cloud.glance)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        self._connection.putrequest("PUT", f"/v2/images/{image_id}/{path}")
        self._connection.putheader("X-Auth-Token", str(cloud.admin.get_token()))
        self._connection.putheader("Content-Type", "application/octet-stream")
        self._connection.putheader("Transfer-Encoding", "chunked")
        self._connection.endheaders()
        self._send(first)

    def _send(self, data: bytes) -> None:
        self._connection.send(b"%x\r\n%s\r\n" % (len(data), data))

    def finish(self, rest: bytes = b"") -> None:
        """Send the rest and wait for Glance's answer."""
        if rest:
            self._send(rest)
        self._connection.send(b"0\r\n\r\n")
        answer = self._connection.getresponse()
        body = answer.read()
        self._connection.close()
        if answer.status != http.HTTPStatus.NO_CONTENT:
            raise RuntimeError(f"upload of {self._image_id}: HTTP {answer.status} {body!r}")


def wait_until(condition: Any, what: str, seconds: float = 120.0) -> None:
    """Wait until ``condition()`` is true. Raises TimeoutError, which names ``what``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.02)
