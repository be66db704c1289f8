"""``--verify``: what is linked is what was uploaded.

Real uploads, real damage, and a cloud that goes on meanwhile.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud import wait_until
from conftest import COMMAND, DEFAULTS, UNCOVERED, Node
from corpus import MIB
from ln_images.keystone import connect
from ln_images.model import Outcome, Pass
from ln_images.run import Passes

# Two steps of reading, and no holes.
CONTENT = random.Random(14).randbytes(8 * MIB + 12345)  # noqa: S311
UPLOADED = hashlib.sha512(CONTENT).hexdigest()
# Uploads, and as many snapshots, while audits are made.
ROUNDS = 10
MIDDLE = len(CONTENT) // 2


def flip(path: Path, offset: int = MIDDLE) -> None:
    """Turns one bit of a file around."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def column(node: Node, image_id: str, **values: object) -> None:
    """Has Glance tell something else of an image."""
    with node.cloud.database() as database:
        for name, value in values.items():
            database.execute(f"UPDATE images SET {name} = ? WHERE id = ?", (value, image_id))  # noqa: S608


def state(node: Node) -> dict[Path, tuple[int, ...]]:
    """All that a run could change of every file."""
    files = {path: path.lstat() for place in (node.images, node.cache) for path in place.iterdir()}
    return {
        path: (one.st_ino, one.st_mode, one.st_nlink, one.st_mtime_ns, one.st_ctime_ns)
        for path, one in files.items()
    }


def verified(node: Node, *during: Callable[[], object]) -> Pass:
    """A pass with ``--verify`` in this process.

    ``during`` is called once, when the first step has been read.
    """
    waiting = list(during)

    @contextlib.contextmanager
    def progress(label: str, _total: int) -> Iterator[SimpleNamespace]:
        def step(_size: int) -> None:
            if waiting and label == "Verifying":
                waiting.pop()()

        yield SimpleNamespace(update=step)

    chosen = replace(DEFAULTS, images_dir=str(node.images), cache_dir=str(node.cache), verify=True)
    made = Passes(chosen, connect(node.cloud.environment(), 30), progress).whole()
    assert not waiting
    return made


def damaged(made: Pass) -> list[str]:
    """The ids of the images that a pass found damaged."""
    return [result.image.id for result in made.results if result.verdict.outcome is Outcome.DAMAGED]


def test_a_flipped_bit_is_found_and_named_and_nothing_is_touched(
    node: Node, tmp_path: Path
) -> None:
    """An image that is linked, or would be, and is not what was uploaded is damaged, in every report.

    An image without a checksum that this Python can compute is counted, one that would not be linked is not read, and
    nothing is unlinked, changed or linked that is damaged.
    """
    images = {
        name: node.cloud.image(name, CONTENT)
        for name in ("good", "rotten", "unknown", "none", "signed", "taken")
    }
    assert node.run("-q").returncode == 0
    node.entry(images["taken"]).unlink()
    node.entry(images["taken"]).write_bytes(CONTENT)
    images["new"] = node.cloud.image("new", CONTENT)
    for name in ("rotten", "new", "signed", "taken"):
        flip(node.images / images[name])
    column(node, images["unknown"], os_hash_algo="whirlpool")
    column(node, images["none"], os_hash_algo=None, os_hash_value=None)
    node.cloud.image_api().patch(
        f"/images/{images['signed']}",
        json=[{"op": "add", "path": "/img_signature", "value": "c2lnbmVk"}],
        headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
    )
    before = state(node)
    files = {name: str(tmp_path / name) for name in ("log", "metrics")}
    run = node.run(
        "--verify",
        "--format",
        "json",
        "--log-file",
        files["log"],
        "--metrics-file",
        files["metrics"],
    )
    found = {
        image["name"]: (image["outcome"], image["reason"])
        for image in json.loads(run.stdout)["images"]
    }
    seen = hashlib.sha512((node.images / images["new"]).read_bytes()).hexdigest()
    reason = f"sha512 is {seen[:8]}..., Glance says {UPLOADED[:8]}...: see docs/recovery.md"
    assert found == {
        "rotten": ("damaged", reason),
        "new": ("damaged", reason),
        "signed": ("skipped", "signed: Nova verifies only what it downloads"),
        "taken": ("occupied", "another file of the same size has the cache name"),
    }
    assert (run.returncode, state(node)) == (1, before)
    errors = sorted(
        f"damaged: {images[name]} ({name}) as {node.entry(images[name]).name}: {reason}"
        for name in ("rotten", "new")
    )
    assert sorted(run.stderr.replace("ln-images: ", "").splitlines()) == errors
    assert (
        sorted(
            line.split(" ", 4)[4]
            for line in Path(files["log"]).read_text().splitlines()
            if "ERROR" in line
        )
        == errors
    )

    def metrics() -> dict[str, str]:
        lines = Path(files["metrics"]).read_text().splitlines()
        return dict(
            line.split()
            for line in lines
            if line.startswith("ln_images_verify") and "timestamp" not in line
        )

    told = {
        "ln_images_verify_damaged": "2.0",
        "ln_images_verify_images": "3.0",
        "ln_images_verify_without_checksum": "2.0",
    }
    assert metrics() == told
    text = node.run("--verify", "--dry-run")
    assert (text.returncode, state(node)) == (1, before)
    assert ", 3 verified, 24.0 MiB at " in text.stdout
    assert "/s, 2 without a checksum, " in text.stdout
    # A plain run does not read, and leaves what the audit has found where it is watched.
    assert node.run("--metrics-file", files["metrics"]).returncode == 0
    assert metrics() == told
    assert node.linked(images["new"])


def test_other_runs_link_while_it_reads(node: Node) -> None:
    """The lock is free while images are read: what is finished meanwhile has its link at once."""
    node.cloud.image("long", CONTENT)
    new = []

    def another() -> None:
        new.append(node.cloud.image("new", CONTENT))
        assert node.run("-q").returncode == 0
        assert node.linked(new[0])

    assert verified(node, another).audit is not None
    assert new


def test_it_waits_for_a_run_at_work(node: Node) -> None:
    """What was read for hours is not thrown away because another run holds the lock when it ends."""
    image = node.cloud.image("image", CONTENT)
    flip(node.images / image)
    lock = os.open(node.cache, os.O_RDONLY)

    def another() -> None:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.5, fcntl.flock, (lock, fcntl.LOCK_UN)).start()

    assert damaged(verified(node, another)) == [image]
    os.close(lock)


@pytest.mark.parametrize("meanwhile", ["deleted", "restored", "replaced", "changed", "disabled"])
def test_what_goes_or_changes_while_it_is_read_is_no_damage(node: Node, meanwhile: str) -> None:
    """Damage is only what reads the same twice and is still the file of an active image with that checksum."""
    image = node.cloud.image("image", CONTENT)
    assert node.run("-q").returncode == 0
    file = node.images / image
    flip(file)

    def act() -> None:
        if meanwhile == "deleted":
            node.cloud.delete(image)
        elif meanwhile == "restored":
            backup = file.with_name("backup")
            backup.write_bytes(CONTENT)
            backup.rename(file)
        elif meanwhile == "replaced":
            column(node, image, os_hash_value=hashlib.sha512(b"another").hexdigest())
        elif meanwhile == "changed":
            flip(file, 1)
        else:
            node.cloud.image_api().post(f"/images/{image}/actions/deactivate")

    made = verified(node, act)
    assert damaged(made) == []
    assert made.audit is not None
    assert made.audit.images == 1


def test_it_can_be_interrupted_at_once(node: Node) -> None:
    """Ctrl-C in the middle of an image that would be read for minutes ends the run with status 130 and one line."""
    image = node.cloud.add_many(1, size=1024 * 1024 * MIB)[0]
    column(node, image, os_hash_algo="sha512", os_hash_value=UPLOADED)
    process = subprocess.Popen(
        [COMMAND, "--verify"], env=node.environment(**UNCOVERED), stderr=subprocess.PIPE, text=True
    )

    def reads() -> bool:
        return int(Path(f"/proc/{process.pid}/io").read_text().split()[1]) > 100 * MIB

    wait_until(reads, "the reading")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.count("\n")) == (130, 1)
    assert errors.startswith("ln-images: interrupted")


def test_a_cloud_at_work_gives_no_false_alarm(node: Node) -> None:
    """While images are uploaded, snapshots taken and images deleted, audits one after another find no damage."""
    over = threading.Event()
    faults: list[BaseException] = []

    def churn() -> None:
        try:
            kept: list[str] = []
            for number in range(ROUNDS):
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
            faults.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=churn)
    thread.start()
    read = 0
    for count in itertools.count(1):
        last = over.is_set()
        made = verified(node)
        read += made.audit.images if made.audit else 0
        assert {result.verdict.outcome for result in made.results} <= {
            Outcome.LINKED,
            Outcome.REPAIRED,
            Outcome.PRESENT,
            Outcome.WAITING,
            Outcome.SKIPPED,
        }, count
        if last:
            break
    thread.join()
    assert not faults
    assert read > ROUNDS
