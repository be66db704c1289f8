"""Each row of the reference's table of troubles.

The command says it in that trouble, and the mend ends it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_faults import formatted, mounted, project
from test_prune import base_in, overlay

from support.cloud import REGION
from support.compute import Compute, Fault, in_catalog
from support.compute import server as a_server
from support.faulty import Answer, Authority, Faulty, Variables
from support.node import COMMAND, NO_OPENRC, REFERENCE, Node, needs_root

DATA = b"\1" * 5000
TABLE = REFERENCE.partition("## When it does not work")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.+?`) \| .+ \|$", TABLE, re.MULTILINE)
# Gives what a run says, and mends what was wrong when it is asked for more: then a plain run must
# be right.
Trouble = Callable[[Node, Path], Generator[str, None, None]]
GONE, NOBODYS, SERVER = (f"{number}0000000-0000-4000-8000-000000000000" for number in (1, 2, 3))


def said(node: Node, *arguments: str, **variables: str | None) -> str:
    """All that a run prints."""
    run = node.run(*arguments, **variables)
    return run.stdout + run.stderr


def given(*arguments: str, **variables: str | None) -> Trouble:
    """Something that was given wrongly.

    The mend is the plain run, which gives it as it should be.
    """

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        yield said(node, *arguments, **variables)

    return trouble


def without_module(module: str, *arguments: str) -> Trouble:
    """An extra is not installed; the plain run does without."""
    code = f"import sys; sys.modules[{module!r}] = None; from ln_images.cli import main; main({list(arguments)!r})"

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=node.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        yield run.stderr

    return trouble


def http_for_https(node: Node, _: Path) -> Generator[str, None, None]:
    """OS_AUTH_URL says https, and Keystone speaks http."""
    yield said(node, OS_AUTH_URL=node.cloud.keystone.replace("http:", "https:"))


def unknown_authority(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """Nobody here has the certificate of the authority that signed Keystone's.

    OS_CACERT names it.
    """
    authority = Authority(tmp_path)
    with Faulty(node.cloud.keystone, tls=authority.server(False)) as keystone:
        openrc: Variables = {"OS_AUTH_URL": f"{keystone.url}/v3"}
        yield said(node, **openrc)
        assert node.run("--dry-run", OS_CACERT=str(authority.ca), **openrc).returncode == 0


def with_answer(answer: Answer, *arguments: str) -> Trouble:
    """Keystone answers otherwise than it should; the mend is that it does no more."""

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        with Faulty(
            node.cloud.keystone, lambda path: answer if path.endswith("/tokens") else path
        ) as keystone:
            yield said(node, *arguments, OS_AUTH_URL=f"{keystone.url}/v3")
            keystone.rule = str
            assert node.run("--dry-run", OS_AUTH_URL=f"{keystone.url}/v3").returncode == 0

    return trouble


def of_a_limited_credential(node: Node, _: Path) -> Generator[str, None, None]:
    """Its rules let it ask for other things than images; another has those of the guide."""
    user = node.cloud.as_user()
    rules = [{"service": "compute", "method": "GET", "path": "/v2.1/os-services"}]
    yield said(node, **{**NO_OPENRC, **node.cloud.application_credential(user, access_rules=rules)})
    rules = [{"service": "image", "method": "GET", "path": "/v2/images"}]
    openrc = {**NO_OPENRC, **node.cloud.application_credential(user, access_rules=rules)}
    assert node.run("--dry-run", **openrc).returncode == 0


def of_a_member(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """It is no administrator, until somebody makes it one."""
    name = f"trouble-{tmp_path.name}"
    who: Variables = {"OS_USERNAME": name, "OS_PROJECT_NAME": name}
    session = node.cloud.add_user(name, name, "member")
    yield said(node, **who)
    identity = node.cloud.identity()
    role = identity.get("/roles", params={"name": "admin"}).json()["roles"][0]["id"]
    identity.put(f"/projects/{session.get_project_id()}/users/{session.get_user_id()}/roles/{role}")
    assert "admin role" not in said(node, "--dry-run", **who)


def beside_another_run(node: Node, _: Path) -> Generator[str, None, None]:
    """It ends soon."""
    directory = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield said(node)
    finally:
        os.close(directory)


def without_privileges(*arguments: str) -> Trouble:
    """As somebody who is not root: the mend is to be root."""

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        if not all(parent.stat().st_mode & 0o001 for parent in COMMAND.resolve().parents):
            pytest.skip("the command lies where only root reaches it")
        if "--owner" not in arguments:
            node.cache.parent.chmod(0o755)
            node.images.chmod(0o700)
        run = subprocess.run(
            [
                "setpriv",
                "--reuid=12345",
                "--regid=12345",
                "--clear-groups",
                "--bounding-set=-all",
                COMMAND,
                *arguments,
            ],
            env=node.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        yield run.stdout + run.stderr

    return trouble


def under_a_project(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """The cache hands another project on than the images have; they are put under that one, too."""
    with formatted(tmp_path, "mkfs.xfs", "-q") as at:
        project(at / "cache", 7)
        image = at / "images" / only(node)
        shutil.copyfile(node.images / image.name, image)
        yield said(node, **below(at))
        project(image, 7)
        assert node.run(**below(at)).returncode == 0


def damaged(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """An entry of the cache is broken on the disk; fsck takes it away."""
    with formatted(tmp_path, "mkfs.ext4", "-q") as at:
        entry = at / "cache" / node.entry(only(node)).name
        entry.touch()
        shutil.copyfile(node.images / only(node), at / "images" / only(node))
        device = tmp_path / "device"
        subprocess.run(["umount", at], check=True)
        clear = ["debugfs", "-w", "-R", f"clri /cache/{entry.name}", str(device)]
        subprocess.run(clear, check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", device, at], check=True)
        yield said(node, **below(at))
        subprocess.run(["umount", at], check=True)
        # Its status says that something was mended.
        assert (
            subprocess.run(
                ["fsck.ext4", "-fy", device], check=False, capture_output=True
            ).returncode
            == 1
        )
        subprocess.run(["mount", "-o", "loop", device, at], check=True)
        assert node.run(**below(at)).returncode == 0


def other_than_glance(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """What stands at Glance's endpoint answers with something else, until the endpoint is corrected."""
    identity = node.cloud.identity()
    service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
    with Faulty(
        node.cloud.glance, lambda path: Answer(body=b"[]") if "images" in path else path
    ) as gateway:
        region = tmp_path.name.replace("_", "-")
        document = {
            "service_id": service,
            "url": gateway.url,
            "region": region,
            "interface": "public",
        }
        made = identity.post("/endpoints", json={"endpoint": document}).json()["endpoint"]["id"]
        yield said(node, OS_REGION_NAME=region)
        identity.patch(f"/endpoints/{made}", json={"endpoint": {"url": node.cloud.glance}})
        assert node.run("--dry-run", OS_REGION_NAME=region).returncode == 0
        identity.delete(f"/endpoints/{made}")


def with_a_raw_copy(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """A node had force_raw_images on; no server uses the copy, and it is taken away."""
    made = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", made, "1M"], check=True)
    image = node.cloud.image("qcow2", made.read_bytes(), disk_format="qcow2")
    node.entry(image).write_bytes(DATA)
    yield said(node)
    node.entry(image).unlink()


def nowhere_to_report(node: Node, _: Path) -> Generator[str, None, None]:
    """The disk behind standard output is full."""
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [COMMAND],
            env=node.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    yield run.stderr


def pruned(node: Node, *arguments: str, **variables: str | None) -> str:
    """All that a run with --prune prints."""
    return said(node, "--prune", "--prune-after", "0s", *arguments, **variables)


@contextlib.contextmanager
def with_nova(node: Node, *arguments: str) -> Iterator[Compute]:
    """A Nova in the catalog, and a base of which the image is gone.

    In the end, with all mended, that has gone, too.
    """
    base = base_in(node.cache, GONE)
    with Compute() as nova, in_catalog(node.cloud.identity(), (REGION, "public", nova.url)):
        yield nova
        pruned(node, *arguments)
        assert not base.exists()
        base.with_name(f"{base.name}.retired").unlink(missing_ok=True)


def prune_of_a_member(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """The plain run with another credential."""
    name = f"pruner-{tmp_path.name}"
    node.cloud.add_user(name, name, "member")
    # Of others' images it sees those that are public.
    node.cloud.image("public", DATA, visibility="public")
    with with_nova(node):
        yield pruned(node, OS_USERNAME=name, OS_PROJECT_NAME=name)


def busy(nova: Compute) -> None:
    """It answers nothing else."""
    nova.faults = {"detail": Fault(503)}


def of_a_lister(nova: Compute) -> None:
    """A role may list all servers, and is no administrator's otherwise."""
    nova.all_filters, nova.servers = False, [a_server("s")]


def well(nova: Compute) -> None:
    """All of it."""
    nova.all_filters, nova.faults = True, {}
    nova.down_hosts.clear()


def while_nova_is(change: Callable[[Compute], None], mend: Callable[[Compute], None]) -> Trouble:
    """Nova is so that nothing may go, until somebody mends it."""

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        with with_nova(node) as nova:
            change(nova)
            yield pruned(node)
            mend(nova)

    return trouble


def with_servers(*servers: dict[str, Any]) -> Trouble:
    """A server stands against it, until it is brought to rest."""
    return while_nova_is(
        lambda nova: nova.servers.extend(servers), lambda nova: nova.servers.clear()
    )


def with_its_disk(prepare: Callable[[Node, Compute], str]) -> Trouble:
    """What a server's disk is backed by cannot be told, until the disk is seen."""

    def trouble(node: Node, tmp_path: Path) -> Generator[str, None, None]:
        with with_nova(node, "--instances-dir", str(tmp_path)) as nova:
            nova.servers = [a_server(SERVER, prepare(node, nova))]
            yield pruned(node)
            overlay(tmp_path, SERVER, node.cache / "x")

    return trouble


def of_an_old_nova(node: Node, nova: Compute) -> str:
    """It shows no newer microversion; its server is on an image that is there."""
    nova.newest = (2, 90)
    return only(node)


def own_snapshot(node: Node, _: Compute) -> str:
    """It was linked, and is deleted."""
    snapshot = node.cloud.image("shelved", DATA, instance_uuid=SERVER)
    node.run()
    node.cloud.delete(snapshot)
    return snapshot


def without_an_endpoint(node: Node, _: Path) -> Generator[str, None, None]:
    """In one region it has one on another interface, until it gets one on this, too."""
    base, identity = base_in(node.cache, GONE), node.cloud.identity()
    with Compute() as nova:
        endpoints = [(REGION, "public", nova.url), ("RegionTwo", "internal", nova.url)]
        with in_catalog(identity, *endpoints):
            yield pruned(node)
        with in_catalog(identity, *endpoints, ("RegionTwo", "public", nova.url)):
            pruned(node)
    base.with_name(f"{base.name}.retired").unlink()


def without_nova(node: Node, _: Path) -> Generator[str, None, None]:
    """Until it is in the catalog."""
    base_in(node.cache, GONE)
    yield pruned(node)
    with with_nova(node):
        pass


def of_another_cloud(node: Node, _: Path) -> Generator[str, None, None]:
    """The store is another's, as far as this cloud's Glance tells.

    The plain run has the right one.
    """
    other = node.cache.with_suffix(".other")
    other.mkdir()
    (other / GONE).write_bytes(DATA)
    yield pruned(node, LN_IMAGES_IMAGES_DIR=str(other))


def instances_not_mounted(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """An empty directory, until the disks are there."""
    with with_nova(node, "--instances-dir", str(tmp_path)):
        yield pruned(node, "--instances-dir", str(tmp_path))
        overlay(tmp_path, SERVER, node.cache / "x")


def disk_not_read(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """A disk is cut short, and taken away."""
    with with_nova(node, "--instances-dir", str(tmp_path)):
        disk = overlay(tmp_path, SERVER, node.cache / "x").with_name("disk.config")
        disk.write_bytes(b"QFI\xfb")
        yield pruned(node, "--instances-dir", str(tmp_path))
        disk.unlink()


def both_names(node: Node, _: Path) -> Generator[str, None, None]:
    """Nothing needs the retired one, which is removed by hand."""
    with with_nova(node):
        retired = node.entry(GONE).with_name(f"{node.entry(GONE).name}.retired")
        retired.write_bytes(b"other")
        yield pruned(node)
        retired.unlink()


def unmarked(node: Node, _: Path) -> Generator[str, None, None]:
    """The option is given."""
    with with_nova(node):
        base = base_in(node.cache, "nova's", mark=False)
        base.rename(base.with_name(f"{base.name}.retired"))
        yield pruned(node)
        # The other one is that of every row.
        assert "2 pruned" in pruned(node, "--prune-unmarked", "--dry-run")
        base.with_name(f"{base.name}.retired").unlink()


def volume_not_mounted(node: Node, _: Path) -> Generator[str, None, None]:
    """The store is an empty directory; the plain run has the one that is mounted."""
    empty = node.cache.with_suffix(".empty")
    empty.mkdir()
    yield said(node, LN_IMAGES_IMAGES_DIR=str(empty))


def with_a_name_taken(data: bytes) -> Trouble:
    """Nova has fetched the image before; no server uses the file, and it is taken away."""

    def trouble(node: Node, _: Path) -> Generator[str, None, None]:
        entry = node.entry(only(node))
        entry.write_bytes(data)
        yield said(node)
        entry.unlink()

    return trouble


def with_another_content(node: Node, _: Path) -> Generator[str, None, None]:
    """An ISO was called raw: it is uploaded again as what it is, and this one is deleted."""
    data = bytes(0x8001) + b"CD001" + bytes(50_000)
    image = node.cloud.image("other", data)
    yield said(node)
    again = node.cloud.image("again", data, disk_format="iso")
    node.cloud.delete(image)
    node.run()
    assert node.linked(again)


def with_a_longer_file(node: Node, _: Path) -> Generator[str, None, None]:
    """Something wrote into Glance's file; it is deleted, and uploaded again."""
    image = node.cloud.image("other", DATA)
    with (node.images / image).open("ab") as file:
        file.write(b"more")
    yield said(node)
    node.cloud.delete(image)


def truncated(node: Node, _: Path) -> Generator[str, None, None]:
    """A linked file lost its end; what is lost comes back from a backup, or the image goes."""
    image = only(node)
    node.run()
    file = node.images / image
    os.truncate(file, 100)
    yield said(node)
    file.write_bytes(DATA)


def made_again(node: Node, _: Path) -> Generator[str, None, None]:
    """The image was purged and made again under its id; the mend is in the message."""
    image = only(node)
    node.run()
    (node.images / image).unlink()
    (node.images / image).write_bytes(DATA)
    text = said(node)
    yield text
    found = re.search("`(mv .*?)`", text)
    assert found
    subprocess.run(["/bin/sh", "-c", found[1]], cwd=node.cache, check=True)


def unknown_to_glance(node: Node, _: Path) -> Generator[str, None, None]:
    """A leftover of an upload; it is taken away."""
    leftover = node.images / "10000000-0000-4000-8000-000000000000"
    leftover.write_bytes(DATA)
    yield said(node, "-v")
    leftover.unlink()


def full(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """A file system has no inode left, until somebody makes room."""
    directories = below(tmp_path)
    with mounted(tmp_path, "-t", "tmpfs", "-o", "nr_inodes=20", "tmpfs"):
        (tmp_path / "cache").mkdir()
        shutil.copytree(node.images, tmp_path / "images")
        with contextlib.suppress(OSError):
            for number in range(20):
                (tmp_path / str(number)).touch()
        yield said(node, **directories)
        for path in tmp_path.glob("[0-9]*"):
            path.unlink()
        assert node.run(**directories).returncode == 0


def read_only(node: Node, tmp_path: Path) -> Generator[str, None, None]:
    """A file system is mounted read-only, until somebody remounts it."""
    directories = below(tmp_path)
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        (tmp_path / "cache").mkdir()
        shutil.copytree(node.images, tmp_path / "images")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        yield said(node, **directories)
        subprocess.run(["mount", "-o", "remount,rw", tmp_path], check=True)
        assert node.run(**directories).returncode == 0


def below(directory: Path) -> Variables:
    """The settings for a store and a cache below a directory."""
    return {
        "LN_IMAGES_IMAGES_DIR": str(directory / "images"),
        "LN_IMAGES_CACHE_DIR": str(directory / "cache"),
    }


def only(node: Node) -> str:
    """The image that every trouble begins with."""
    (path,) = node.images.iterdir()
    return path.name


TROUBLES: dict[str, Trouble] = {
    "`OS_PASSWORD not set`": given(OS_PASSWORD=None),
    "`OS_AUTH_TYPE=X is no auth plugin known here`": given(OS_AUTH_TYPE="x"),
    "`OS_AUTH_URL is no http or https URL`": given(OS_AUTH_URL="keystone:5000"),
    "`--os-cloud X:`": given("--os-cloud", "nobodys"),
    "`--os-cloud needs openstacksdk`": without_module("openstack", "--os-cloud", "x"),
    "`OS_CACERT=X cannot be read`": given(OS_CACERT="/no/such/file"),
    "`Keystone refuses the credentials: HTTP 401`": given(OS_PASSWORD="wrong"),
    "`Keystone cannot be asked: ConnectFailure: Connection refused`": given(
        OS_AUTH_URL="http://127.0.0.1:1/v3"
    ),
    "`Keystone cannot be asked: HTTP 503`": with_answer(Answer(503)),
    "`Keystone has not answered whole within X s`": with_answer(
        Answer(body=b" ", again=0.01), "--timeout", "1"
    ),
    "`Keystone speaks http, not https`": http_for_https,
    "`set OS_CACERT to the CA that signed it`": unknown_authority,
    "`public endpoint for image service in X region not found`": given(OS_REGION_NAME="X"),
    "`Glance refuses the credentials: HTTP 401`": of_a_limited_credential,
    "`check OS_PROJECT_NAME (a token without a project has no catalog)`": given(
        OS_PROJECT_NAME=None
    ),
    "`Glance answers with something that is no list of images`": other_than_glance,
    "`the credential has no admin role`": of_a_member,
    "`there is no user 'X' here`": given("--owner", "nobody-of-that-name"),
    "`--owner: X is a number: say which group`": given("--owner", "12345"),
    "`everybody must read`": given("--mode", "0640"),
    "`--images-dir X: No such file or directory`": given("--images-dir", "/no/such/directory"),
    "`--images-dir X: Permission denied`": without_privileges(),
    "`none of them has a file in X: is its volume mounted`": volume_not_mounted,
    "`are on two file systems or two mounts of one`": given("--cache-dir", "/dev/shm"),
    "`--images-dir and --cache-dir are one directory`": given(
        "--images-dir", "/dev/shm", "--cache-dir", "/dev/shm"
    ),
    "`X is under a project quota`": under_a_project,
    "`another run holds the lock`": beside_another_run,
    "`--metrics-file needs prometheus-client`": without_module(
        "prometheus_client", "--metrics-file=/tmp/x.prom"
    ),
    "`--metrics-file X: No such file or directory`": given(
        "--metrics-file", "/no/such/directory/x.prom"
    ),
    "`--log-file X: No such file or directory`": given("--log-file", "/no/such/directory/log"),
    "`failed`: `No space left on device`": full,
    "`failed`: `Read-only file system`": read_only,
    "`failed`: `Structure needs cleaning`": damaged,
    "`failed`: `servers get an earlier image of this id`": made_again,
    "`damaged`: `the linked file has X of X bytes`": truncated,
    "`occupied`: `another file of the same size has the cache name`": with_a_name_taken(DATA),
    "`occupied`: `another file has the cache name, and differs`": with_a_name_taken(b"nova's"),
    "`occupied`: `Nova's raw copy has the cache name`": with_a_raw_copy,
    "`refused`: `the content is X, Glance says X`": with_another_content,
    "`refused`: `the file has X bytes, Glance says X`": with_a_longer_file,
    "`skipped`: `Glance does not know it`": unknown_to_glance,
    "`the report cannot be written: No space left on device`": nowhere_to_report,
    "`--prune needs a credential with the role admin`": prune_of_a_member,
    "`Nova in X cannot be asked: HTTP 503`": while_nova_is(busy, well),
    "`Nova in X has no endpoint on the interface in use`": without_an_endpoint,
    "`the catalog has no compute service`": without_nova,
    "`Nova does not see all of its cells`": while_nova_is(Compute.cell_down, well),
    "`Nova shows this credential less than an administrator`": while_nova_is(of_a_lister, well),
    "`Glance knows none of the images whose files are here`": of_another_cloud,
    "`kept`: `it could not be asked whether anything needs it`": while_nova_is(busy, well),
    "`kept`: `server X is in X and may use any base`": with_servers(a_server("s", status="ERROR")),
    "`kept`: `server X names image X, which neither Glance nor the cache has`": with_its_disk(
        lambda *_: NOBODYS
    ),
    "`kept`: `server X names its own snapshot X, which Glance no longer has`": with_its_disk(
        own_snapshot
    ),
    "`kept`: `Nova is older than 26.0.0`": with_its_disk(of_an_old_nova),
    "`kept`: `--instances-dir X has no directory of a server`": instances_not_mounted,
    "`kept`: `what X is backed by cannot be told`": disk_not_read,
    "`kept`: `another file has the name X`": both_names,
    "`kept`: `its image is not known: --prune-unmarked removes it`": unmarked,
}


def pattern(row: str) -> str:
    """What a row says, as a regular expression.

    X is a word, and a colon between two parts any space, or more words.
    """
    return r"\s+(?:[^\n]*; )?".join(
        re.escape(part).replace("X", r"[^\s,']+") for part in re.findall("`([^`]+)`", row)
    )


def test_every_row_has_its_trouble() -> None:
    """No line of the table is without a test, and no test without its line."""
    assert list(TROUBLES) == ROWS


@needs_root
@pytest.mark.parametrize("row", TROUBLES)
def test_the_trouble_says_so_and_the_mend_ends_it(node: Node, tmp_path: Path, row: str) -> None:
    """In the situation the command says what the table has.

    After the mend, carried out, every image is linked.
    """
    node.cloud.image("image", DATA)
    # What it has started ends with it, also where it says something else.
    with contextlib.closing(TROUBLES[row](node, tmp_path)) as trouble:
        text = next(trouble)
        assert re.search(pattern(row), text), text
        assert next(trouble, None) is None
    run = node.run("--format", "json")
    assert (run.returncode, run.stderr) == (0, "")
    counts = json.loads(run.stdout)["counts"]
    assert {outcome for outcome, count in counts.items() if count} <= {
        "linked",
        "repaired",
        "present",
    }
