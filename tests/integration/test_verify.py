"""``ln-images-verify``: real uploads, real damage, and a cloud that goes on meanwhile."""

import contextlib
import fcntl
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ln_images.glance import Glance
from ln_images.model import Command, Outcome, Pass, Reason, Verdict, cache_name
from ln_images.session import connect
from ln_images.verify import Verifier, VerifyOptions
from support.cloud import wait_until
from support.corpus import MIB
from support.faulty import Answer, Front, Variables
from support.mounts import bound
from support.node import UNCOVERED, Node, executable, needs_root

# Two blocks of reading and a part, without holes.
CONTENT = random.Random(14).randbytes(8 * MIB + 12345)  # noqa: S311
UPLOADED = hashlib.sha512(CONTENT).hexdigest()
MIDDLE = len(CONTENT) // 2
# So many images are verified while others are uploaded and deleted, in at most so many passes.
ENOUGH = 20
MOST_PASSES = 200


def flip_bit(path: Path, offset: int = MIDDLE) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def set_columns(node: Node, image_id: str, **values: object) -> None:
    """Change what Glance says about an image, in its database."""
    with node.cloud.database() as database:
        for name, value in values.items():
            database.execute(f"UPDATE images SET {name} = ? WHERE id = ?", (value, image_id))  # noqa: S608


def sign(node: Node, image_id: str) -> None:
    """Add a signature to an image."""
    node.cloud.image_api().patch(
        f"/images/{image_id}",
        json=[{"op": "add", "path": "/img_signature", "value": "c2lnbmVk"}],
        headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
    )


def state(node: Node) -> dict[Path, tuple[int, ...]]:
    """Return all that a run could change of every file, Glance's access times included."""
    return {
        **{path: _attributes(path.lstat()) for path in (node.images, node.cache)},
        **{path: _attributes(path.lstat()) for path in node.cache.iterdir()},
        **{
            path: (*_attributes(path.lstat()), path.lstat().st_atime_ns)
            for path in node.images.iterdir()
        },
    }


def _attributes(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def verify(node: Node, *during: Callable[[], object], **variables: str | None) -> Pass:
    """Run a pass in this process. Call ``during`` once, when the first block has been read."""
    waiting = list(during)

    @contextlib.contextmanager
    def progress(_label: str, _total: int) -> Iterator[SimpleNamespace]:
        def update(_size: int) -> None:
            if waiting:
                waiting.pop()()

        yield SimpleNamespace(update=update)

    environment = node.environment(**variables)
    options = VerifyOptions(
        images_dir=environment["LN_IMAGES_IMAGES_DIR"],
        cache_dir=environment["LN_IMAGES_CACHE_DIR"],
    )
    connection = connect(environment, 30, None)
    pass_ = Verifier(options, Glance(connection, "admin"), progress).run()
    assert not waiting
    return pass_


def only_verdict(pass_: Pass) -> Verdict:
    """Return the verdict of a pass that has one result."""
    assert len(pass_.results) == 1
    return pass_.results[0].verdict


def test_damage_is_reported_everywhere_and_nothing_is_touched(node: Node, tmp_path: Path) -> None:
    """A linked image with one wrong bit is damaged in every report, and no file is changed.

    A link with wrong attributes is read as well. An image without a usable checksum is skipped. An
    image that is not linked is not read and not linked.
    """
    images = {
        name: node.cloud.image(name, CONTENT)
        for name in ("good", "rotten", "wrong mode", "unknown", "none", "signed", "taken")
    }
    assert node.run("-q").returncode == 0
    node.entry(images["wrong mode"]).chmod(0o600)
    node.entry(images["taken"]).unlink()
    node.entry(images["taken"]).write_bytes(CONTENT)
    images["new"] = node.cloud.image("new", CONTENT)
    for name in ("rotten", "new", "signed", "taken"):
        flip_bit(node.images / images[name])
    set_columns(node, images["unknown"], os_hash_algo="whirlpool")
    set_columns(node, images["none"], os_hash_algo=None, os_hash_value=None)
    sign(node, images["signed"])
    digest = hashlib.sha512((node.images / images["rotten"]).read_bytes()).hexdigest()
    for image_id in images.values():
        # An access time before the modification time is renewed under relatime (mount(8)).
        os.utime(node.images / image_id, (1, 2))
    before = state(node)
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    run = node.run("--log-file", str(log), "--metrics-file", str(metrics), command=Command.VERIFY)
    sentence = (
        f"its sha512 is {digest[:8]}..., Glance states {UPLOADED[:8]}...; follow docs/recovery.md"
    )
    error = f"damaged: {images['rotten']} (rotten) as {cache_name(images['rotten'])}: {sentence}"
    assert run.returncode == 1
    assert run.stderr == f"ln-images-verify: {error}\n"
    assert error in log.read_text()
    assert images["signed"] in log.read_text()
    assert "2 verified, 3 skipped, 1 damaged, 24.0 MiB read at " in run.stdout
    assert "/s, " in run.stdout.splitlines()[-1]

    document = node.report(command=Command.VERIFY, status=1)
    assert document["counts"] == {"verified": 2, "skipped": 3, "damaged": 1, "failed": 0}
    assert {image["name"]: image["reason_code"] for image in document["images"]} == {
        "rotten": "checksum_differs",
        "unknown": "no_checksum",
        "none": "no_checksum",
        "signed": "signed_after_linking",
    }
    everything = node.report("-v", command=Command.VERIFY, status=1)
    verified = [image["name"] for image in everything["images"] if image["outcome"] == "verified"]
    assert sorted(verified) == ["good", "wrong mode"]

    samples = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.read_text().splitlines()
        if line.startswith("ln_images_verify_")
    }
    labels = f'cache_dir="{node.cache}"'
    assert samples == {
        f'ln_images_verify_images{{{labels},outcome="verified"}}': 2,
        f'ln_images_verify_images{{{labels},outcome="skipped"}}': 3,
        f'ln_images_verify_images{{{labels},outcome="damaged"}}': 1,
        f'ln_images_verify_images{{{labels},outcome="failed"}}': 0,
        f"ln_images_verify_bytes{{{labels}}}": 3 * len(CONTENT),
    }
    assert state(node) == before


def test_a_file_of_the_wrong_size_is_damaged(node: Node) -> None:
    """A linked file of another size is damaged, and so is an old file that is too short."""
    linked = node.cloud.image("linked", CONTENT)
    assert node.run("-q").returncode == 0
    short = node.cloud.image("short", CONTENT)
    for image_id in (linked, short):
        os.truncate(node.images / image_id, MIDDLE)
        os.utime(node.images / image_id, (1, 1))
    document = node.report(command=Command.VERIFY, status=1)
    assert {image["name"]: image["reason_code"] for image in document["images"]} == {
        "linked": "linked_file_wrong_size",
        "short": "file_too_short",
    }
    assert document["counts"]["damaged"] == 2


def test_a_disk_format_that_is_not_named_is_not_read(node: Node) -> None:
    """Only images of the disk formats that ln-images links are read."""
    node.cloud.image("raw", CONTENT)
    assert node.run("-q").returncode == 0
    document = node.report("--disk-format", "qcow2", command=Command.VERIFY)
    assert document["counts"]["verified"] == 0
    document = node.report(command=Command.VERIFY, LN_IMAGES_DISK_FORMAT="raw")
    assert document["counts"]["verified"] == 1


def test_other_runs_link_while_it_reads(node: Node) -> None:
    """The lock is free while images are read, so another run links what is finished then."""
    node.cloud.image("long", CONTENT)
    assert node.run("-q").returncode == 0
    new: list[str] = []

    def link_another() -> None:
        new.append(node.cloud.image("new", CONTENT))
        assert node.run("-q").returncode == 0
        assert node.is_linked(new[0])

    assert only_verdict(verify(node, link_another)).outcome is Outcome.VERIFIED
    assert new


def test_it_does_not_wait_for_another_run(node: Node) -> None:
    """A pass succeeds even if another run holds the lock all the time."""
    node.cloud.image("image", CONTENT)
    assert node.run("-q").returncode == 0
    lock = os.open(node.cache, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert node.report(command=Command.VERIFY)["counts"]["verified"] == 1
    finally:
        os.close(lock)


@pytest.mark.parametrize("meanwhile", ["deleted", "restored", "replaced", "changed", "disabled"])
def test_what_changes_while_it_is_read_is_not_damaged(node: Node, meanwhile: str) -> None:
    """An image that changes, or whose file changes, while it is read is skipped."""
    image = node.cloud.image("image", CONTENT)
    assert node.run("-q").returncode == 0
    file = node.images / image
    flip_bit(file)

    def act() -> None:
        if meanwhile == "deleted":
            node.cloud.delete(image)
        elif meanwhile == "restored":
            backup = file.with_name("backup")
            backup.write_bytes(CONTENT)
            backup.rename(file)
        elif meanwhile == "replaced":
            set_columns(node, image, os_hash_value=hashlib.sha512(b"another").hexdigest())
        elif meanwhile == "changed":
            flip_bit(file, 1)
        else:
            node.cloud.image_api().post(f"/images/{image}/actions/deactivate")

    pass_ = verify(node, act)
    assert only_verdict(pass_)[:2] == (Outcome.SKIPPED, Reason.CHANGED_MEANWHILE)
    assert pass_.bytes_read == len(CONTENT)


def test_a_file_that_is_gone_or_unlinked_when_its_turn_comes_is_skipped(node: Node) -> None:
    """An image that is no longer linked when its turn comes is not read."""
    images = sorted(node.cloud.image(name, CONTENT) for name in ("first", "second", "third"))
    assert node.run("-q").returncode == 0

    def act() -> None:
        (node.images / images[1]).unlink()
        node.entry(images[2]).unlink()

    pass_ = verify(node, act)
    assert [result.verdict.reason for result in pass_.results] == [
        Reason.CHECKSUM_MATCHES,
        Reason.CHANGED_MEANWHILE,
        Reason.CHANGED_MEANWHILE,
    ]
    assert pass_.bytes_read == len(CONTENT)


def test_a_touch_does_not_hide_damage(node: Node) -> None:
    """A damaged file is damaged even if Nova sets its modification time while it is read."""
    image = node.cloud.image("image", CONTENT)
    assert node.run("-q").returncode == 0
    flip_bit(node.images / image)
    pass_ = verify(node, lambda: os.utime(node.entry(image)))
    assert only_verdict(pass_)[:2] == (Outcome.DAMAGED, Reason.CHECKSUM_DIFFERS)


def test_damage_that_glance_cannot_confirm_is_a_failure(node: Node, front: Front) -> None:
    """If Glance fails after a file was read, that image is failed and the others still count."""
    images = sorted(node.cloud.image(name, CONTENT) for name in ("first", "second"))
    assert node.run("-q").returncode == 0
    flip_bit(node.images / images[0])
    server, variables = front()

    def fail() -> None:
        server.rule = lambda _path: Answer(500)

    pass_ = verify(node, fail, **variables)
    outcomes = [result.verdict.outcome for result in pass_.results]
    assert outcomes == [Outcome.FAILED, Outcome.VERIFIED]
    assert "could not confirm" in str(pass_.results[0].verdict.sentence)


def test_a_file_that_cannot_be_opened_is_a_failure(node: Node) -> None:
    """A system error with one file makes that image fail, and takes nothing from the others."""
    images = sorted(node.cloud.image(name, CONTENT) for name in ("first", "second"))
    assert node.run("-q").returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # What is open stays open, and no other file can be opened.
        pass_ = verify(node, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [result.id for result in pass_.results] == images
    assert [result.verdict[:2] for result in pass_.results] == [
        (Outcome.VERIFIED, Reason.CHECKSUM_MATCHES),
        (Outcome.FAILED, Reason.SYSTEM_ERROR),
    ]


@needs_root
def test_a_file_system_that_dies_is_a_temporary_error(node: Node, tmp_path: Path) -> None:
    """If the file system dies during a pass, its error is temporary, and earlier results stay."""
    images = {name: node.cloud.image(name, CONTENT) for name in ("whole", "short")}
    for directory in ("images", "cache"):
        (tmp_path / "real" / directory).mkdir(parents=True)
    for image_id in images.values():
        shutil.copy(node.images / image_id, tmp_path / "real" / "images")
    variables: Variables = {
        "LN_IMAGES_IMAGES_DIR": str(tmp_path / "bound" / "images"),
        "LN_IMAGES_CACHE_DIR": str(tmp_path / "bound" / "cache"),
    }
    with bound(tmp_path) as process:
        assert node.run("-q", command=Command.LINK, **variables).returncode == 0
        os.truncate(tmp_path / "bound" / "images" / images["short"], MIDDLE)

        def kill() -> None:
            process.kill()
            process.wait()

        pass_ = verify(node, kill, **variables)
    assert pass_.error is not None
    assert pass_.error.exit_code == 75
    assert [result.id for result in pass_.results] == [images["short"]]


def test_another_clouds_images_are_a_configuration_error(node: Node) -> None:
    """If Glance knows none of the files that are here, the command ends with status 2."""
    image = node.cloud.image("image", CONTENT)
    assert node.run("-q").returncode == 0
    set_columns(node, image, deleted=1)
    run = node.run(command=Command.VERIFY)
    assert run.returncode == 2
    assert "Glance knows none of the 1 images" in run.stderr
    assert run.stdout == ""


def test_a_store_that_is_not_mounted_is_a_configuration_error(node: Node, tmp_path: Path) -> None:
    """If active images have no file here, the status is 2, unless marks prove the mount."""
    image = node.cloud.image("image", CONTENT)
    metrics = tmp_path / "metrics"
    empty = node.cloud.directory / f"empty-{node.cache.name}"
    empty.mkdir()
    run = node.run(
        "--metrics-file",
        str(metrics),
        command=Command.VERIFY,
        LN_IMAGES_IMAGES_DIR=str(empty),
    )
    assert run.returncode == 2
    assert "mount its volume" in run.stderr
    assert 'command="ln-images-verify"} 2.0' in metrics.read_text()
    assert node.run("-q").returncode == 0
    assert node.is_linked(image)
    run = node.run(command=Command.VERIFY, LN_IMAGES_IMAGES_DIR=str(empty))
    assert run.returncode == 0
    assert "are all images in another store now?" in run.stderr


def test_a_pass_without_any_link_warns(node: Node) -> None:
    """If images have files here and none is linked, a warning says that nothing was read."""
    node.cloud.image("image", CONTENT)
    run = node.run(command=Command.VERIFY)
    assert run.returncode == 0
    assert "none of the 1 images" in run.stderr
    assert "nothing to report, 0 B read at " in run.stdout


def test_an_empty_cloud_is_no_error(node: Node) -> None:
    """A store without images verifies nothing, with status 0 and no warning."""
    run = node.run(command=Command.VERIFY)
    assert (run.returncode, run.stderr) == (0, "")


def test_ctrl_c_ends_a_long_read_at_once(node: Node) -> None:
    """Ctrl-C while a file is read that takes minutes ends the command: status 130 and one line."""
    image = node.cloud.add_many(1, size=1024 * 1024 * MIB)[0]
    set_columns(node, image, os_hash_algo="sha512", os_hash_value=UPLOADED)
    assert node.run("-q").returncode == 0
    process = subprocess.Popen(
        [executable(Command.VERIFY)],
        env=node.environment(**UNCOVERED),
        stderr=subprocess.PIPE,
        text=True,
    )

    def is_reading() -> bool:
        # rchar: 323934931
        return int(Path(f"/proc/{process.pid}/io").read_text().split()[1]) > 100 * MIB

    wait_until(is_reading, "the reading")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.count("\n")) == (130, 1)
    assert errors.startswith("ln-images-verify: interrupted")


def test_a_cloud_at_work_gives_no_false_alarm(node: Node) -> None:
    """While images are uploaded, linked and deleted, one pass after another finds no damage."""
    is_over = threading.Event()
    errors: list[BaseException] = []

    def churn() -> None:
        try:
            kept: list[str] = []
            for number in itertools.count():
                if is_over.is_set():
                    return
                kept.append(node.cloud.image(f"image-{number}", CONTENT[number:]))
                snapshot = node.cloud.create(f"snapshot-{number}")
                upload = node.cloud.slow_upload(snapshot, CONTENT[: 5 * MIB])
                kept.append(snapshot)
                if len(kept) > 6:
                    node.cloud.delete(kept.pop(0))
                upload.finish(CONTENT[5 * MIB :])
                if len(kept) > 5:
                    node.cloud.delete(kept.pop(random.Random(number).randrange(len(kept))))  # noqa: S311
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        verified = 0
        for number in range(MOST_PASSES):
            assert node.run("-q").returncode == 0
            results = verify(node).results
            outcomes = {result.verdict.outcome for result in results}
            assert outcomes <= {Outcome.VERIFIED, Outcome.SKIPPED}, number
            verified += sum(result.verdict.outcome is Outcome.VERIFIED for result in results)
            if errors or verified >= ENOUGH:
                break
    finally:
        is_over.set()
        thread.join()
    assert not errors
    assert verified >= ENOUGH
