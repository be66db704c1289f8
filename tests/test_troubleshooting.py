"""Each row of the reference's table of troubles: the command says it in that trouble, and the mend ends it."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import COMMAND, NO_OPENRC, REFERENCE, Node, needs_root
from faulty import Answer, Authority, Faulty, Variables

DATA = b"\1" * 5000
TABLE = REFERENCE.partition("## When it does not work")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.+?`) \| .+ \|$", TABLE, re.MULTILINE)
# Gives what a run says, and mends what was wrong when it is asked for more: then a plain run must be right.
Trouble = Callable[[Node, Path], Iterator[str]]


def said(node: Node, *arguments: str, **variables: str | None) -> str:
    """All that a run prints."""
    run = node.run(*arguments, **variables)
    return run.stdout + run.stderr


def given(*arguments: str, **variables: str | None) -> Trouble:
    """Something that was given wrongly. The mend is the plain run, which gives it as it should be."""

    def trouble(node: Node, _: Path) -> Iterator[str]:
        yield said(node, *arguments, **variables)

    return trouble


def http_for_https(node: Node, _: Path) -> Iterator[str]:
    """OS_AUTH_URL says https, and Keystone speaks http."""
    yield said(node, OS_AUTH_URL=node.cloud.keystone.replace("http:", "https:"))


def unknown_authority(node: Node, tmp_path: Path) -> Iterator[str]:
    """Nobody here has the certificate of the authority that signed Keystone's; OS_CACERT names it."""
    authority = Authority(tmp_path)
    with Faulty(node.cloud.keystone, tls=authority.server(False)) as keystone:
        openrc: Variables = {"OS_AUTH_URL": f"{keystone.url}/v3"}
        yield said(node, **openrc)
        assert node.run("--dry-run", OS_CACERT=str(authority.ca), **openrc).returncode == 0


def with_answer(answer: Answer, *arguments: str) -> Trouble:
    """Keystone answers otherwise than it should; the mend is that it does no more."""

    def trouble(node: Node, _: Path) -> Iterator[str]:
        with Faulty(node.cloud.keystone, lambda path: answer if path.endswith("/tokens") else path) as keystone:
            yield said(node, *arguments, OS_AUTH_URL=f"{keystone.url}/v3")
            keystone.rule = str
            assert node.run("--dry-run", OS_AUTH_URL=f"{keystone.url}/v3").returncode == 0

    return trouble


def of_a_limited_credential(node: Node, _: Path) -> Iterator[str]:
    """Its rules let it ask for other things than images; another has those of the guide."""
    user = node.cloud.as_user()
    rules = [{"service": "compute", "method": "GET", "path": "/v2.1/os-services"}]
    yield said(node, **{**NO_OPENRC, **node.cloud.application_credential(user, access_rules=rules)})
    rules = [{"service": "image", "method": "GET", "path": path} for path in ("/v2/images", "/v2/schemas/image")]
    openrc = {**NO_OPENRC, **node.cloud.application_credential(user, access_rules=rules)}
    assert node.run("--dry-run", **openrc).returncode == 0


def of_a_member(node: Node, tmp_path: Path) -> Iterator[str]:
    """It is no administrator, until somebody makes it one."""
    name = f"trouble-{tmp_path.name}"
    who: Variables = {"OS_USERNAME": name, "OS_PROJECT_NAME": name}
    session = node.cloud.add_user(name, name, "member")
    yield said(node, **who)
    identity = node.cloud.identity()
    role = identity.get("/roles", params={"name": "admin"}).json()["roles"][0]["id"]
    identity.put(f"/projects/{session.get_project_id()}/users/{session.get_user_id()}/roles/{role}")
    assert "admin role" not in said(node, "--dry-run", **who)


def beside_another_run(node: Node, _: Path) -> Iterator[str]:
    """It ends soon."""
    directory = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield said(node)
    finally:
        os.close(directory)


def without_privileges(*arguments: str) -> Trouble:
    """As somebody who is not root: the mend is to be root."""

    def trouble(node: Node, _: Path) -> Iterator[str]:
        if not all(parent.stat().st_mode & 0o001 for parent in COMMAND.resolve().parents):
            pytest.skip("the command lies where only root reaches it")
        if "--owner" not in arguments:
            node.cache.parent.chmod(0o755)
            node.images.chmod(0o700)
        run = subprocess.run(
            ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--bounding-set=-all", COMMAND, *arguments],
            env=node.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        yield run.stdout + run.stderr

    return trouble


def volume_not_mounted(node: Node, _: Path) -> Iterator[str]:
    """The store is an empty directory; the plain run has the one that is mounted."""
    empty = node.cache.with_suffix(".empty")
    empty.mkdir()
    yield said(node, LN_IMAGES_IMAGES_DIR=str(empty))


def with_a_name_taken(data: bytes) -> Trouble:
    """Nova has fetched the image before; no server uses the file, and it is taken away."""

    def trouble(node: Node, _: Path) -> Iterator[str]:
        entry = node.entry(only(node))
        entry.write_bytes(data)
        yield said(node)
        entry.unlink()

    return trouble


def with_another_content(node: Node, _: Path) -> Iterator[str]:
    """An ISO was called raw: it is uploaded again as what it is, and this one is deleted."""
    data = bytes(0x8001) + b"CD001" + bytes(50_000)
    image = node.cloud.image("other", data)
    yield said(node)
    again = node.cloud.image("again", data, disk_format="iso")
    node.cloud.delete(image)
    node.run()
    assert node.linked(again)


def with_a_longer_file(node: Node, _: Path) -> Iterator[str]:
    """Something wrote into Glance's file; it is deleted, and uploaded again."""
    image = node.cloud.image("other", DATA)
    with (node.images / image).open("ab") as file:
        file.write(b"more")
    yield said(node)
    node.cloud.delete(image)


def truncated(node: Node, _: Path) -> Iterator[str]:
    """A linked file lost its end; what is lost comes back from a backup, or the image goes."""
    image = only(node)
    node.run()
    file = node.images / image
    os.truncate(file, 100)
    yield said(node)
    file.write_bytes(DATA)


def made_again(node: Node, _: Path) -> Iterator[str]:
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


def unknown_to_glance(node: Node, _: Path) -> Iterator[str]:
    """A leftover of an upload; it is taken away."""
    leftover = node.images / "10000000-0000-4000-8000-000000000000"
    leftover.write_bytes(DATA)
    yield said(node, "-v")
    leftover.unlink()


def full(node: Node, tmp_path: Path) -> Iterator[str]:
    """A file system has no inode left, until somebody makes room."""
    with mounted(tmp_path, "nr_inodes=20") as directories:
        (tmp_path / "cache").mkdir()
        shutil.copytree(node.images, tmp_path / "images")
        with contextlib.suppress(OSError):
            for number in range(20):
                (tmp_path / str(number)).touch()
        yield said(node, **directories)
        for path in tmp_path.glob("[0-9]*"):
            path.unlink()
        assert node.run(**directories).returncode == 0


def read_only(node: Node, tmp_path: Path) -> Iterator[str]:
    """A file system is mounted read-only, until somebody remounts it."""
    with mounted(tmp_path, "size=1m") as directories:
        (tmp_path / "cache").mkdir()
        shutil.copytree(node.images, tmp_path / "images")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        yield said(node, **directories)
        subprocess.run(["mount", "-o", "remount,rw", tmp_path], check=True)
        assert node.run(**directories).returncode == 0


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[Variables]:
    """A small file system of its own, and the settings for a store and a cache there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    try:
        yield {"LN_IMAGES_IMAGES_DIR": str(directory / "images"), "LN_IMAGES_CACHE_DIR": str(directory / "cache")}
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def only(node: Node) -> str:
    """The image that every trouble begins with."""
    (path,) = node.images.iterdir()
    return path.name


TROUBLES: dict[str, Trouble] = {
    "`OS_PASSWORD not set`": given(OS_PASSWORD=None),
    "`OS_AUTH_TYPE=X is no auth plugin known here`": given(OS_AUTH_TYPE="x"),
    "`OS_CACERT=X cannot be read`": given(OS_CACERT="/no/such/file"),
    "`Keystone refuses the credentials: HTTP 401`": given(OS_PASSWORD="wrong"),
    "`Keystone cannot be asked: ConnectFailure: Connection refused`": given(OS_AUTH_URL="http://127.0.0.1:1/v3"),
    "`Keystone cannot be asked: HTTP 503`": with_answer(Answer(503)),
    "`Keystone has not answered whole within X s`": with_answer(Answer(body=b" ", again=0.01), "--timeout", "1"),
    "`Keystone speaks http, not https`": http_for_https,
    "`set OS_CACERT to the CA that signed it`": unknown_authority,
    "`public endpoint for image service in X region not found`": given(OS_REGION_NAME="X"),
    "`Glance refuses the credentials: HTTP 401`": of_a_limited_credential,
    "`the credential has no admin role`": of_a_member,
    "`there is no user 'X' here`": given("--owner", "nobody-of-that-name"),
    "`everybody must read`": given("--mode", "0640"),
    "`--images-dir X: No such file or directory`": given("--images-dir", "/no/such/directory"),
    "`--images-dir X: Permission denied`": without_privileges(),
    "`none of them has a file in X: is its volume mounted`": volume_not_mounted,
    "`are on two file systems or two mounts of one`": given("--cache-dir", "/dev/shm"),
    "`another run holds the lock`": beside_another_run,
    "`--metrics-file X: No such file or directory`": given("--metrics-file", "/no/such/directory/x.prom"),
    "`--log-file X: No such file or directory`": given("--log-file", "/no/such/directory/log"),
    "`failed`: `No space left on device`": full,
    "`failed`: `Read-only file system`": read_only,
    "`failed`: `servers get an earlier image of this id`": made_again,
    "`damaged`: `the linked file has X of X bytes`": truncated,
    "`occupied`: `another file of the same size has the cache name`": with_a_name_taken(DATA),
    "`occupied`: `another file has the cache name, and differs`": with_a_name_taken(b"nova's"),
    "`refused`: `the content is X, Glance says X`": with_another_content,
    "`refused`: `the file has X bytes, Glance says X`": with_a_longer_file,
    "`skipped`: `Glance does not know it`": unknown_to_glance,
}


def pattern(row: str) -> str:
    """What a row says, as a regular expression: X is a word, and a colon between two parts any space."""
    return r"\s+".join(re.escape(part).replace("X", r"[^\s,']+") for part in re.findall("`([^`]+)`", row))


def test_every_row_has_its_trouble() -> None:
    """No line of the table is without a test, and no test without its line."""
    assert list(TROUBLES) == ROWS


@needs_root
@pytest.mark.parametrize("row", TROUBLES)
def test_the_trouble_says_so_and_the_mend_ends_it(node: Node, tmp_path: Path, row: str) -> None:
    """In the situation the command says what the table has; after the mend, carried out, every image is linked."""
    node.cloud.image("image", DATA)
    trouble = TROUBLES[row](node, tmp_path)
    text = next(trouble)
    assert re.search(pattern(row), text), text
    assert next(trouble, None) is None
    run = node.run("--format", "json")
    assert (run.returncode, run.stderr) == (0, "")
    counts = json.loads(run.stdout)["counts"]
    assert {outcome for outcome, count in counts.items() if count} <= {"linked", "repaired", "present"}
