"""Troubles of operators: the command prints the message, and the remedy ends the trouble.

To add a trouble, write a subclass of ``Trouble``. Nothing else is needed: the tests find it. If its
remedy needs more words than the message has, set ``in_table``, and add a row to the table in
docs/reference.md at the same place.
"""

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from ln_images.model import Command
from support.cloud import wait_until
from support.corpus import QCOW2
from support.faulty import Answer, Authority, Faulty, Variables
from support.mounts import (
    edit_unmounted,
    formatted,
    fuse,
    mounted,
    run_tool,
    unmount_everywhere,
)
from support.node import NO_OPENRC, REFERENCE, UNCOVERED, Node, executable, needs_root
from support.observe import held_lock
from support.proxy import refusing_proxy

DATA = b"\1" * 5000
STRANGER = "10000000-0000-4000-8000-000000000000"
TABLE = REFERENCE.partition("\n## When it does not work\n")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.+?`) \| .+ \|$", TABLE, re.MULTILINE)


class Trouble:
    """One trouble of a storage node that has one image, which is not linked yet.

    ``message`` is what the command prints; an X stands for a word. If it is the reason of an image,
    ``outcome`` is the image's.
    """

    message = ""
    outcome: str | None = None
    in_table = False

    def __init__(self, node: Node, place: Path, stack: contextlib.ExitStack) -> None:
        self.node = node
        # An empty directory.
        self.place = place
        # Ends what the trouble has started.
        self.stack = stack
        # What the correct run in the end has in its environment.
        self.settings: Variables = {}
        (file,) = node.images.iterdir()
        self.image = file.name

    def provoke(self) -> str:
        """Bring the trouble about, run the command, and return all that it prints."""
        raise NotImplementedError

    def fix(self) -> None:
        """Do what the message says. The correct run that follows may be all of it."""

    def run(self, *arguments: str, **variables: str | None) -> str:
        """Run the command, and return all that it prints."""
        run = self.node.run(*arguments, command=Command.LINK, **{**self.settings, **variables})
        return run.stdout + run.stderr

    def run_process(self, *command: str | Path, **variables: str | None) -> str:
        """Run a command line in a process of its own, and return all that it prints."""
        run = subprocess.run(
            command,
            env=self.node.environment(**variables),
            capture_output=True,
            text=True,
            check=False,
        )
        return run.stdout + run.stderr

    def use_volume(self, volume: Path) -> None:
        """Have the command use a copy of the store, and an empty cache, on another file system."""
        shutil.copytree(self.node.images, volume / "images")
        (volume / "cache").mkdir()
        self.settings = {
            "LN_IMAGES_IMAGES_DIR": str(volume / "images"),
            "LN_IMAGES_CACHE_DIR": str(volume / "cache"),
        }

    @classmethod
    def row(cls) -> str:
        """Return the first cell of its row in the table."""
        return f"`{cls.message}`" if cls.outcome is None else f"`{cls.outcome}`: `{cls.message}`"

    @classmethod
    def pattern(cls) -> str:
        """Return a regular expression for what is printed."""
        words = re.escape(cls.message).replace("X", r"[^\s,;]+")
        return words if cls.outcome is None else rf"\b{cls.outcome}:? .*{words}"


def list_troubles(kind: type[Trouble] = Trouble) -> Iterator[type[Trouble]]:
    """Yield every subclass that has a message, in the order of this file."""
    for trouble in kind.__subclasses__():
        if trouble.message:
            yield trouble
        yield from list_troubles(trouble)


class WrongSetting(Trouble):
    """Wrong arguments or variables. The remedy is the correct run."""

    arguments: tuple[str, ...] = ()
    variables: ClassVar[Variables] = {}

    def provoke(self) -> str:
        """Run the command with them."""
        return self.run(*self.arguments, **self.variables)


# Credentials and services


class NoPassword(WrongSetting):
    """The openrc was not read."""

    message = "OS_PASSWORD is not set; run `source admin-openrc` first"
    variables: ClassVar[Variables] = {"OS_PASSWORD": None}


class UnknownAuthType(WrongSetting):
    """The openrc names a plugin that is not installed."""

    message = "OS_AUTH_TYPE=x is not a known auth plugin; use one of"
    variables: ClassVar[Variables] = {"OS_AUTH_TYPE": "x"}


class NoUrl(WrongSetting):
    """The URL lacks its scheme."""

    message = "OS_AUTH_URL is not an http or https URL; correct your openrc"
    variables: ClassVar[Variables] = {"OS_AUTH_URL": "keystone:5000"}


class SystemScope(WrongSetting):
    """The openrc asks for a token that Glance does not accept."""

    message = "OS_SYSTEM_SCOPE is set, and Glance and Nova do not accept a token with system scope"
    variables: ClassVar[Variables] = {"OS_SYSTEM_SCOPE": "all", "OS_PROJECT_NAME": None}


class UnknownCloud(WrongSetting):
    """No clouds.yaml has the entry."""

    message = "--os-cloud nobodys: Cloud nobodys was not found"
    arguments = ("--os-cloud", "nobodys")


class UnreadableCertificate(WrongSetting):
    """The file of the CA is not there."""

    message = "OS_CACERT=/no/such/file cannot be read; correct the path or its mode"
    variables: ClassVar[Variables] = {"OS_CACERT": "/no/such/file"}


class WrongPassword(WrongSetting):
    """Keystone does not accept the password."""

    message = "Keystone refuses the credentials (HTTP 401); check your openrc"
    variables: ClassVar[Variables] = {"OS_PASSWORD": "wrong"}


class NoKeystone(WrongSetting):
    """Nothing listens where Keystone should."""

    message = "Keystone cannot be queried (ConnectFailure: Connection refused)"
    variables: ClassVar[Variables] = {"OS_AUTH_URL": "http://127.0.0.1:1/v3"}


class NoRegion(WrongSetting):
    """The catalog has no such region."""

    message = "public endpoint for image service in nowhere region not found; check"
    variables: ClassVar[Variables] = {"OS_REGION_NAME": "nowhere"}


class NoProject(WrongSetting):
    """A token without a project has no catalog."""

    message = "check OS_PROJECT_NAME (a token without a project has no catalog)"
    variables: ClassVar[Variables] = {"OS_PROJECT_NAME": None}


class HttpForHttps(Trouble):
    """OS_AUTH_URL says https, and Keystone speaks http."""

    message = "Keystone speaks http, not https; correct OS_AUTH_URL or the catalog"

    def provoke(self) -> str:
        """Query Keystone by https."""
        return self.run(OS_AUTH_URL=self.node.cloud.keystone.replace("http:", "https:"))


class UnknownAuthority(Trouble):
    """This machine does not know the CA that signed Keystone's certificate."""

    message = "set OS_CACERT to the CA that signed its certificate"
    in_table = True

    def provoke(self) -> str:
        """Put a server with such a certificate in front of Keystone."""
        self.authority = Authority(self.place)
        tls = self.authority.server(False)
        keystone = self.stack.enter_context(Faulty(self.node.cloud.keystone, tls=tls))
        self.settings = {"OS_AUTH_URL": f"{keystone.url}/v3"}
        return self.run()

    def fix(self) -> None:
        """Name the CA."""
        self.settings["OS_CACERT"] = str(self.authority.ca)


class BadKeystone(Trouble):
    """Keystone does not answer as it should. The remedy is that it does."""

    answer = Answer()
    arguments: tuple[str, ...] = ()

    def provoke(self) -> str:
        """Put a server in front of Keystone that refuses tokens."""
        self.keystone = self.stack.enter_context(
            Faulty(
                self.node.cloud.keystone,
                lambda path: self.answer if path.endswith("/tokens") else path,
            )
        )
        self.settings = {"OS_AUTH_URL": f"{self.keystone.url}/v3"}
        return self.run(*self.arguments)

    def fix(self) -> None:
        """Have it answer."""
        self.keystone.rule = str


class BusyKeystone(BadKeystone):
    """Keystone, or what is in front of it, has too much to do."""

    message = "Keystone answers badly: HTTP 503"
    answer = Answer(503)


class SlowKeystone(BadKeystone):
    """Keystone sends its answer byte by byte."""

    message = "Keystone did not send a complete response within 2 s; check its log and the network"
    answer = Answer(body=b" ", again=0.01)
    arguments = ("--timeout", "1")


class Redirect(BadKeystone):
    """The URL of the openrc is an old one, which redirects."""

    message = "redirects to http://elsewhere.example/; we follow no redirect"
    answer = Answer.redirect("http://elsewhere.example/")


class RefusingProxy(Trouble):
    """The environment of the command has a proxy that does not reach Keystone."""

    message = "the proxy X of the environment answers HTTP 403 in place of the service"

    def provoke(self) -> str:
        """Run such a proxy."""
        proxy = self.stack.enter_context(refusing_proxy(403))
        self.settings = {"http_proxy": f"http://{proxy}"}
        return self.run()

    def fix(self) -> None:
        """Name the service's host in no_proxy."""
        self.settings["no_proxy"] = "127.0.0.1"


class AccessRules(Trouble):
    """The access rules of an application credential do not include images."""

    message = "Glance refuses the credentials (HTTP 401)"
    in_table = True

    def provoke(self) -> str:
        """Make one whose rules allow queries of Nova alone."""
        self._use_credential({"service": "compute", "method": "GET", "path": "/v2.1/os-services"})
        return self.run()

    def fix(self) -> None:
        """Make one with the rules that the command needs."""
        self._use_credential(
            {"service": "image", "method": "GET", "path": "/v2/images"},
            {"service": "image", "method": "GET", "path": "/v2/schemas/**"},
        )

    def _use_credential(self, *rules: dict[str, str]) -> None:
        cloud = self.node.cloud
        credential = cloud.application_credential(cloud.as_user(), access_rules=list(rules))
        self.settings = {**NO_OPENRC, **credential}


class NoAdministrator(Trouble):
    """The credential is an ordinary user's."""

    message = "the credential does not have the role admin, so Glance hides other projects'"

    def provoke(self) -> str:
        """Make a user with the role member."""
        name = f"trouble-{self.place.name}"
        # Without it the user would see none of the images that are here.
        self.node.cloud.image("public", DATA, visibility="public")
        self.session = self.node.cloud.add_user(name, name, "member")
        self.settings = {"OS_USERNAME": name, "OS_PROJECT_NAME": name}
        return self.run()

    def fix(self) -> None:
        """Give the user the role admin."""
        identity = self.node.cloud.identity()
        role = identity.get("/roles", params={"name": "admin"}).json()["roles"][0]["id"]
        project, user = self.session.get_project_id(), self.session.get_user_id()
        identity.put(f"/projects/{project}/users/{user}/roles/{role}")


class OtherService(Trouble):
    """The catalog leads to something that is not Glance."""

    message = "Glance cannot be queried (X); if it is not down, check OS_AUTH_URL and the catalog"

    def provoke(self) -> str:
        """Put a server with another answer into the catalog."""
        gateway = self.stack.enter_context(
            Faulty(self.node.cloud.glance, lambda _: Answer(body=b"[]"))
        )
        identity = self.node.cloud.identity()
        services = identity.get("/services", params={"type": "image"}).json()["services"]
        region = self.place.name.replace("_", "-")
        document = {
            "service_id": services[0]["id"],
            "url": gateway.url,
            "region": region,
            "interface": "public",
        }
        endpoint = identity.post("/endpoints", json={"endpoint": document}).json()["endpoint"]
        self.path = f"/endpoints/{endpoint['id']}"
        self.stack.callback(identity.delete, self.path)
        self.settings = {"OS_REGION_NAME": region}
        return self.run()

    def fix(self) -> None:
        """Correct the catalog."""
        document = {"endpoint": {"url": self.node.cloud.glance}}
        self.node.cloud.identity().patch(self.path, json=document)


class OtherCloud(Trouble):
    """The store is another cloud's."""

    message = "Glance knows none of the 1 images that have a file in X"

    def provoke(self) -> str:
        """Use a store with an image that this cloud does not have."""
        other = self.node.cache.with_suffix(".other")
        other.mkdir()
        (other / STRANGER).write_bytes(DATA)
        return self.run(LN_IMAGES_IMAGES_DIR=str(other))


# Options and libraries


class UnknownUser(WrongSetting):
    """QEMU's user of the compute nodes is not on this machine."""

    message = "there is no user 'nobody-of-that-name' here; use the name or the number of the user"
    arguments = ("--owner", "nobody-of-that-name")


class NumberWithoutGroup(WrongSetting):
    """A number is no user here, so its group is not known."""

    message = "12345 is a number; add its group, as 12345:GROUP"
    arguments = ("--owner", "12345")


class ModeForFew(WrongSetting):
    """Glance and Nova could not read the links."""

    message = "0640: everybody must be able to read, because Glance and Nova are neither owner nor"
    arguments = ("--mode", "0640")


class MovedOption(WrongSetting):
    """A crontab has an option of 0.2.0."""

    message = "--prune is gone; use the command ln-images-prune"
    arguments = ("--prune",)


class MovedVariable(WrongSetting):
    """The environment has a variable of 0.2.0."""

    message = "LN_IMAGES_PRUNE has no effect; unset it, and use the command ln-images-prune"
    variables: ClassVar[Variables] = {"LN_IMAGES_PRUNE": "1"}


class NoMetricsDirectory(WrongSetting):
    """The directory of the metrics file is not there."""

    message = "--metrics-file /no/such/directory/x.prom: No such file or directory; name a file in"
    arguments = ("--metrics-file", "/no/such/directory/x.prom")


class NoLogDirectory(WrongSetting):
    """The directory of the log file is not there."""

    message = "--log-file /no/such/directory/log: No such file or directory; name a file in"
    arguments = ("--log-file", "/no/such/directory/log")


class LogIsFifo(Trouble):
    """The log file is no regular file."""

    message = "--log-file X: No such device or address; name a file that can be written"

    def provoke(self) -> str:
        """Make a FIFO in its place."""
        os.mkfifo(self.place / "log")
        return self.run("--log-file", str(self.place / "log"))


class NoInotify(Trouble):
    """Other programs have used up the inotify instances of the user."""

    message = "inotify does not work (Too many open files), so images are linked by the clock alone"

    def provoke(self) -> str:
        """Set the limit to 0 in a namespace of the user's own."""
        script = 'echo 0 > /proc/sys/user/max_inotify_instances; exec "$0" "$@"'
        space = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
        if subprocess.run([*space, "true"], check=False, capture_output=True).returncode:
            pytest.skip("no user namespace here")
        repeat = ("--every", "0.2", "--for", "0.5", "--owner", "0:0")
        return self.run_process(*space, executable(), *repeat)


class MissingLibrary(Trouble):
    """An extra of the package is not installed. The remedy is to do without, or to install it."""

    module = ""
    arguments: tuple[str, ...] = ()

    def provoke(self) -> str:
        """Run the command without the library."""
        code = (
            f"import sys; sys.modules[{self.module!r}] = None;"
            f"from ln_images.cli import main; main({list(self.arguments)!r})"
        )
        return self.run_process(sys.executable, "-c", code)


class NoOpenstacksdk(MissingLibrary):
    """The extra clouds is not installed."""

    message = "--os-cloud needs openstacksdk; run pip install 'ln-images[clouds]'"
    module = "openstack"
    arguments = ("--os-cloud", "x")


class NoPrometheusClient(MissingLibrary):
    """The extra metrics is not installed."""

    message = "--metrics-file needs prometheus-client; run pip install 'ln-images[metrics]'"
    module = "prometheus_client"
    arguments = ("--metrics-file", "/tmp/x.prom")


# Directories and file systems


class NoStore(WrongSetting):
    """The file system of the store is not mounted, or the path is wrong."""

    message = "--images-dir /no/such/directory: No such file or directory; mount its file system"
    arguments = ("--images-dir", "/no/such/directory")


class EmptyStore(Trouble):
    """The volume is not mounted, and the mount point is an empty directory."""

    message = "Glance has active images and none of them has a file in X; mount its volume"

    def provoke(self) -> str:
        """Use an empty directory."""
        empty = self.node.cache.with_suffix(".empty")
        empty.mkdir()
        return self.run(LN_IMAGES_IMAGES_DIR=str(empty))


class TwoFileSystems(Trouble):
    """No hard link crosses file systems."""

    message = "are on two file systems or two mounts of one, and no hard link can cross them"

    def provoke(self) -> str:
        """Use a cache on another file system."""
        cache = self.place / "cache"
        self.stack.enter_context(mounted(cache, "-t", "tmpfs", "-o", "mode=755", "tmpfs"))
        return self.run(LN_IMAGES_CACHE_DIR=str(cache))


class OneDirectory(Trouble):
    """The store is the cache."""

    message = "--images-dir and --cache-dir are the same directory, X; use two"

    def provoke(self) -> str:
        """Use one directory for both."""
        return self.run(LN_IMAGES_CACHE_DIR=str(self.node.images))


class Nested(Trouble):
    """The cache is inside the store."""

    message = "one is inside the other; use two directories beside each other"

    def provoke(self) -> str:
        """Use a cache inside the store."""
        cache = self.node.images / "cache"
        cache.mkdir()
        self.stack.callback(cache.rmdir)
        return self.run(LN_IMAGES_CACHE_DIR=str(cache))


class LinkToCache(Trouble):
    """The cache directory is a symbolic link."""

    message = "is a symbolic link, which somebody could change; name X instead"

    def provoke(self) -> str:
        """Use one."""
        link = self.node.cache.with_suffix(".link")
        link.symlink_to(self.node.cache)
        return self.run(LN_IMAGES_CACHE_DIR=str(link))


class ExportedParent(Trouble):
    """Everybody may replace the cache directory."""

    message = "not only root can replace it"

    def provoke(self) -> str:
        """Let everybody write to the directory above the cache, and do what the message says."""
        parent = self.node.cache.with_suffix(".parent")
        (parent / "cache").mkdir(parents=True)
        parent.chmod(0o777)
        self.settings = {"LN_IMAGES_CACHE_DIR": str(parent / "cache")}
        self.text = self.run()
        return self.text

    def fix(self) -> None:
        """Run the command of the message."""
        remedy = re.search("run `(.+?)`", self.text)
        assert remedy
        subprocess.run(["/bin/sh", "-c", remedy[1]], check=True)


class Unprivileged(Trouble):
    """Somebody who is not root runs the command."""

    message = "Permission denied; run the command as root"

    def provoke(self) -> str:
        """Run it as another user."""
        if not all(parent.stat().st_mode & 0o001 for parent in executable().resolve().parents):
            pytest.skip("only root reaches the command here")
        mode = self.node.cache.parent.stat().st_mode
        self.node.cache.parent.chmod(0o755)
        self.stack.callback(self.node.cache.parent.chmod, mode)
        self.node.images.chmod(0o700)
        user = ("--reuid=12345", "--regid=12345", "--clear-groups", "--bounding-set=-all")
        return self.run_process("setpriv", *user, executable())


class HeldLock(Trouble):
    """Another run is at work."""

    message = "holds the lock; let it finish"

    def provoke(self) -> str:
        """Hold the lock meanwhile."""
        with held_lock(self.node):
            return self.run()


# FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR and FS_XFLAG_PROJINHERIT (linux/fs.h).
FSGETXATTR, FSSETXATTR, PROJINHERIT = 0x801C581F, 0x401C5820, 0x200
FSXATTR = struct.Struct("=5I8x")


class ProjectQuota(Trouble):
    """The cache is under another project than the images."""

    message = "X is under a project quota"
    in_table = True

    def provoke(self) -> str:
        """Give the cache a project."""
        volume = self.stack.enter_context(formatted(self.place, "mkfs.xfs", "-q"))
        self.use_volume(volume)
        self._set_project(volume / "cache")
        self.volume = volume
        return self.run()

    def fix(self) -> None:
        """Give the images the same."""
        self._set_project(self.volume / "images" / self.image)

    def _set_project(self, path: Path) -> None:
        # As `xfs_quota -x -c 'project -s'` does it.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fields = bytearray(FSXATTR.size)
            fcntl.ioctl(descriptor, FSGETXATTR, fields)
            flags, size, extents, _project, cow_size = FSXATTR.unpack(fields)
            flags |= PROJINHERIT if path.is_dir() else 0
            changed = FSXATTR.pack(flags, size, extents, 7, cow_size)
            fcntl.ioctl(descriptor, FSSETXATTR, changed)
        finally:
            os.close(descriptor)


class BrokenLibrary(Trouble):
    """A library does not work."""

    message = "a bug: unexpected X"
    in_table = True

    def provoke(self) -> str:
        """Put a broken one in front of the installed one."""
        (self.place / "glanceclient.py").write_text("raise LookupError\n")
        return self.run_process(executable(), PYTHONPATH=str(self.place))


class FullOutput(Trouble):
    """The file system of standard output is full."""

    message = "the report cannot be written: No space left on device"
    in_table = True

    def provoke(self) -> str:
        """Write to a device that is always full."""
        return self.run_process("/bin/sh", "-c", f"{executable()} >/dev/full")


class DeadMount(Trouble):
    """The process of a FUSE file system, such as GlusterFS's, has died."""

    message = "Transport endpoint is not connected; its file system does not respond; remount it"

    def provoke(self) -> str:
        """Kill one."""
        source, target = self.place / "source", self.place / "target"
        source.mkdir()
        self.use_volume(source)
        self.settings = {
            name: str(path).replace(str(source), str(target))
            for name, path in self.settings.items()
        }
        with fuse(target, "bindfs", "-f", source) as process:
            process.kill()
            process.wait()
            text = self.run()
        self.source, self.target = source, target
        return text

    def fix(self) -> None:
        """Mount it again."""
        self.stack.enter_context(fuse(self.target, "bindfs", "-f", self.source))


class NotKept(Trouble):
    """The file system accepts a change of owner and mode, and forgets it."""

    message = "the file system does not keep them (CIFS and some FUSE file systems do not)"
    outcome = "failed"
    options: tuple[str, ...] = ("--chown-ignore", "--chgrp-ignore", "--chmod-ignore")

    def provoke(self) -> str:
        """Use such a file system."""
        source = self.place / "source"
        source.mkdir()
        target = self.place / "target"
        self.stack.enter_context(fuse(target, "bindfs", "-f", *self.options, source))
        self.use_volume(target)
        self.source = source
        return self.run()

    def fix(self) -> None:
        """Use the file system below it."""
        self.settings = {
            "LN_IMAGES_IMAGES_DIR": str(self.source / "images"),
            "LN_IMAGES_CACHE_DIR": str(self.source / "cache"),
        }


class RootIsRefused(NotKept):
    """The file system refuses a change of owner even to root."""

    message = "Operation not permitted; root is refused, so look for root_squash on an NFS mount"
    options = ("--chown-deny",)


class ImmutableFile(Trouble):
    """Somebody has protected Glance's file."""

    message = "or for an immutable file (`lsattr`)"
    outcome = "failed"

    def provoke(self) -> str:
        """Make the file immutable."""
        volume = self.stack.enter_context(formatted(self.place, "mkfs.ext4", "-q"))
        self.use_volume(volume)
        self.file = volume / "images" / self.image
        run_tool("chattr", "+i", self.file)
        return self.run()

    def fix(self) -> None:
        """Make it an ordinary file."""
        run_tool("chattr", "-i", self.file)


class NoInodes(Trouble):
    """The file system has no inode left."""

    message = "No space left on device; free space or inodes on the file system of the store"
    outcome = "failed"

    def provoke(self) -> str:
        """Use up all inodes."""
        options = "nr_inodes=20,mode=755"
        volume = self.stack.enter_context(
            mounted(self.place / "volume", "-t", "tmpfs", "-o", options, "tmpfs")
        )
        self.use_volume(volume)
        with contextlib.suppress(OSError):
            for number in range(20):
                (volume / str(number)).touch()
        self.volume = volume
        return self.run()

    def fix(self) -> None:
        """Remove files."""
        for path in self.volume.glob("[0-9]*"):
            path.unlink()


class ReadOnly(Trouble):
    """The file system is mounted read-only."""

    message = "Read-only file system; look at the kernel's log, and check the file system"
    outcome = "failed"

    def provoke(self) -> str:
        """Mount it so."""
        volume = self.place / "volume"
        self.stack.enter_context(mounted(volume, "-t", "tmpfs", "-o", "mode=755", "tmpfs"))
        self.use_volume(volume)
        run_tool("mount", "-o", "remount,ro", volume)
        self.volume = volume
        return self.run()

    def fix(self) -> None:
        """Remount it."""
        run_tool("mount", "-o", "remount,rw", self.volume)


class DamagedFileSystem(Trouble):
    """An entry of the cache is broken on the disk."""

    message = "Structure needs cleaning; look at the kernel's log, and check the file system"
    outcome = "failed"

    def provoke(self) -> str:
        """Clear an inode behind the kernel's back."""
        volume = self.stack.enter_context(formatted(self.place, "mkfs.ext4", "-q"))
        self.use_volume(volume)
        entry = volume / "cache" / self.node.entry(self.image).name
        entry.touch()
        self.volume = volume
        edit_unmounted(self.place, f"clri /cache/{entry.name}")
        return self.run()

    def fix(self) -> None:
        """Run fsck, whose status says that it repaired something."""
        unmount_everywhere(self.place)
        device = self.place / "device"
        with pytest.raises(subprocess.CalledProcessError) as error:
            run_tool("fsck.ext4", "-fy", device)
        assert error.value.returncode == 1
        run_tool("mount", "-o", "loop", device, self.volume)


# Images


class TruncatedFile(Trouble):
    """A linked file has lost its end."""

    message = "the linked file has 100 of 5000 bytes; follow docs/recovery.md"
    outcome = "damaged"

    def provoke(self) -> str:
        """Truncate it."""
        self.run()
        os.truncate(self.node.images / self.image, 100)
        return self.run()

    def fix(self) -> None:
        """Write the backup over it."""
        (self.node.images / self.image).write_bytes(DATA)


class ShortFile(Trouble):
    """The file of an active image is too short, and nobody writes to it any more."""

    message = "the file has 100 of 5000 bytes and has not grown for an hour; follow"
    outcome = "damaged"

    def provoke(self) -> str:
        """Truncate it, two hours ago."""
        file = self.node.images / self.image
        os.truncate(file, 100)
        before = time.time() - 7200
        os.utime(file, (before, before))
        return self.run()

    def fix(self) -> None:
        """Write the backup over it."""
        (self.node.images / self.image).write_bytes(DATA)


class CacheName(Trouble):
    """Nova has downloaded the image before it was linked. No server uses the file."""

    outcome = "occupied"
    in_table = True
    content = b""

    def provoke(self) -> str:
        """Put a file into the cache."""
        self.node.entry(self.image).write_bytes(self.content)
        return self.run()

    def fix(self) -> None:
        """Remove the file."""
        self.node.entry(self.image).unlink()


class SameSize(CacheName):
    """It has the size of the image."""

    message = "another file of the same size has the cache name"
    content = DATA


class OtherSize(CacheName):
    """It has another size."""

    message = "another file has the cache name; it has X bytes, the image X"
    content = b"nova's"


class RawCopy(Trouble):
    """A compute node had force_raw_images on, and no server uses the copy."""

    message = "Nova's raw copy has the cache name; set force_raw_images = False on every compute"
    outcome = "occupied"

    def provoke(self) -> str:
        """Put raw content into the cache for a qcow2 image."""
        disk = self.place / "disk"
        QCOW2(disk)
        image = self.node.cloud.image("qcow2", disk.read_bytes(), disk_format="qcow2")
        self.entry = self.node.entry(image)
        self.entry.write_bytes(DATA)
        return self.run()

    def fix(self) -> None:
        """Remove the copy."""
        self.entry.unlink()


class CopyOfLink(Trouble):
    """Both directories were restored without hard links, and no server uses the copy."""

    message = "a file that was linked for this id earlier has the cache name: a copy of it"
    outcome = "occupied"

    def provoke(self) -> str:
        """Copy a link with its marks, and put the copy in its place."""
        self.run()
        entry = self.node.entry(self.image)
        copy = self.place / "copy"
        subprocess.run(["cp", "--archive", entry, copy], check=True)
        entry.unlink()
        subprocess.run(["cp", "--archive", copy, entry], check=True)
        return self.run()

    def fix(self) -> None:
        """Remove the copy."""
        self.node.entry(self.image).unlink()


class OtherContent(Trouble):
    """An ISO was uploaded as a raw image."""

    message = "the content is iso, Glance says raw; upload it again as what it is"
    outcome = "refused"
    content = bytes(0x8001) + b"CD001" + bytes(50_000)

    def provoke(self) -> str:
        """Upload one."""
        self.wrong = self.node.cloud.image("other", self.content)
        return self.run()

    def fix(self) -> None:
        """Upload it as an ISO, and delete the other."""
        self.node.cloud.image("again", self.content, disk_format="iso")
        self.node.cloud.delete(self.wrong)


class LongFile(Trouble):
    """Something has written into Glance's file."""

    message = "the file has 5004 bytes, Glance states 5000; upload it again as a new image"
    outcome = "refused"

    def provoke(self) -> str:
        """Make a file longer."""
        self.wrong = self.node.cloud.image("other", DATA)
        with (self.node.images / self.wrong).open("ab") as file:
            file.write(b"more")
        return self.run()

    def fix(self) -> None:
        """Upload it again, and delete the other."""
        self.node.cloud.image("again", DATA)
        self.node.cloud.delete(self.wrong)


class SignedAfterLinking(Trouble):
    """Somebody has signed an image that has a link."""

    message = "it was signed after it was linked, and Nova does not verify the link; ask its owner"
    outcome = "refused"

    def provoke(self) -> str:
        """Sign it."""
        self.run()
        self._patch({"op": "add", "path": "/img_signature", "value": "x"})
        return self.run("--full")

    def fix(self) -> None:
        """Remove the signature."""
        self._patch({"op": "remove", "path": "/img_signature"})

    def _patch(self, change: dict[str, str]) -> None:
        self.node.cloud.image_api().patch(
            f"/images/{self.image}",
            json=[change],
            headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
        )


class RemovedLink(Trouble):
    """A compute node removes bases that it does not use."""

    message = "set remove_unused_base_images = False on every compute node"
    outcome = "linked"

    def provoke(self) -> str:
        """Remove a link."""
        self.run()
        self.node.entry(self.image).unlink()
        return self.run()


class RepeatedRepair(Trouble):
    """libvirt gives a base to another user and group than --owner names."""

    message = "X is repaired again: libvirt gives it to QEMU's user and group, which --owner"

    def provoke(self) -> str:
        """Take the link away from its owner until the command notices it."""
        log = self.place / "log"
        process = subprocess.Popen(
            [executable(), "-q", "--every", "0.2", "--log-file", log],
            env=self.node.environment(**UNCOVERED),
        )

        def is_noticed() -> bool:
            if self.node.is_linked(self.image):
                os.chown(self.node.entry(self.image), 12345, 12345)
            return "is repaired again" in log.read_text()

        try:
            wait_until(log.exists, "the log")
            wait_until(is_noticed, "the warning")
        finally:
            process.terminate()
            process.wait()
        return log.read_text()


class UnknownFile(Trouble):
    """An upload that failed has left its file behind."""

    message = "Glance does not show this image to the credential"
    outcome = "skipped"
    in_table = True

    def provoke(self) -> str:
        """Put such a file into the store."""
        (self.node.images / STRANGER).write_bytes(DATA)
        return self.run("-v")

    def fix(self) -> None:
        """Remove it, which is safe because no image ever had this id."""
        (self.node.images / STRANGER).unlink()


TROUBLES = list(list_troubles())


def test_the_table_has_the_troubles_that_need_more_words() -> None:
    """Every row of the table has its trouble here, and the other way round."""
    assert sorted(ROWS) == sorted(trouble.row() for trouble in TROUBLES if trouble.in_table)


@needs_root
@pytest.mark.parametrize("kind", TROUBLES, ids=lambda kind: kind.__name__)
def test_the_message_is_printed_and_the_remedy_ends_the_trouble(
    node: Node, tmp_path: Path, kind: type[Trouble]
) -> None:
    """The command prints the message, and after the fix a correct run links every image."""
    node.cloud.image("image", DATA)
    with contextlib.ExitStack() as stack:
        trouble = kind(node, tmp_path, stack)
        text = trouble.provoke()
        assert re.search(kind.pattern(), text), text
        trouble.fix()
        counts = node.report("--full", command=Command.LINK, status=0, **trouble.settings)["counts"]
    outcomes = {outcome for outcome, count in counts.items() if count}
    assert outcomes <= {"linked", "repaired", "present"}
