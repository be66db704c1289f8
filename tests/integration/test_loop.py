"""Passes made one after another: real directories, mounts and inotify, then the command at work.

Orders, no times.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from ln_images.watch import Watch, repeat
from test_run import DATA, requests

from support.cloud import wait_until
from support.faulty import Answer, Faulty
from support.node import COMMAND, Node, needs_root
from support.repeating import running

NEVER = 3600.0
Asked = frozenset[str] | None
Unfinished = Collection[str] | None
IDS = [str(uuid.UUID(int=number)) for number in range(100)]
FIRST, SECOND, THIRD = IDS[:3]


class Over(Exception):  # noqa: N818
    """The passes of a test have all been made."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Glance's store, empty."""
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


def passes(store: Path, *steps: Callable[[], Unfinished], every: float = NEVER) -> list[Asked]:
    """Lets the passes do and answer what ``steps`` say, one after another, and returns what each was asked for."""
    asked: list[Asked] = []

    def make(ids: Collection[str] | None) -> Unfinished:
        asked.append(None if ids is None else frozenset(ids))
        if len(asked) > len(steps):
            raise Over
        return steps[len(asked) - 1]()

    with pytest.raises(Over):
        repeat(str(store), every, None, make)
    return asked


def closed(*paths: Path, unfinished: Unfinished = ()) -> Callable[[], Unfinished]:
    """A pass during which files are closed after writing."""

    def step() -> Unfinished:
        for path in paths:
            path.write_bytes(b"x")
        return unfinished

    return step


def test_a_file_that_is_closed_or_moved_in_is_asked_about_by_itself(store: Path) -> None:
    """Also where it happens during a pass, and together where they come together.

    Files of other names are ignored.
    """

    def step() -> Unfinished:
        for name in (FIRST, f"{SECOND}.part", "notes", THIRD.replace("-", "")):
            (store / name).write_bytes(b"x")
        (store / f"{SECOND}.part").rename(store / SECOND)
        return ()

    assert passes(store, step) == [None, {FIRST, SECOND}]
    assert passes(store, closed(store / "notes"), closed(store / THIRD), every=0.2) == [
        None,
        None,
        {THIRD},
    ]


def test_an_upload_that_lasts_causes_no_question_until_it_is_closed(store: Path) -> None:
    """What is written, touched, read and given away is of no interest; only the end of it is."""
    with (store / FIRST).open("wb") as upload:

        def step() -> Unfinished:
            for _ in range(100):
                upload.write(b"x")
                upload.flush()
            (store / FIRST).read_bytes()
            (store / FIRST).chmod(0o644)
            return closed(store / SECOND)()

        def end() -> Unfinished:
            upload.close()
            return ()

        assert passes(store, step, end) == [None, {SECOND}, {FIRST}]


def test_who_is_not_active_yet_is_asked_about_again(store: Path) -> None:
    """Until it is, or there was no pass.

    One that comes to be finished later is asked about no more than is needed.
    """
    again = closed(unfinished=[FIRST])
    steps = (closed(store / FIRST), again, again, closed(unfinished=None), closed(store / SECOND))
    assert passes(store, *steps) == [None, {FIRST}, {FIRST}, {FIRST}, {FIRST}, {SECOND}]


def test_others_that_come_in_do_not_make_it_be_asked_about_more(store: Path) -> None:
    """One that is not active yet waits twice as long each time, from 20 ms on, whatever is closed meanwhile."""
    begun = []

    def step(name: str) -> Unfinished:
        begun.append(time.monotonic())
        time.sleep(0.002)
        return closed(store / name, unfinished=[FIRST])()

    asked = passes(store, *(functools.partial(step, name) for name in IDS))
    assert set(IDS) <= frozenset[str]().union(*(ids for ids in asked if ids))
    when = [at for at, ids in zip(begun, asked, strict=False) if ids and FIRST in ids]
    waits = [later - earlier for earlier, later in itertools.pairwise(when)]
    assert len(waits) >= 2
    assert all(wait >= 0.02 * 2**number for number, wait in enumerate(waits))


def test_many_at_once_cause_a_whole_pass(store: Path) -> None:
    """Past fifty, one pass over everything costs less.

    Who is unfinished then is asked about by itself.
    """
    steps = (closed(*(store / name for name in IDS)), closed(unfinished=[FIRST]))
    assert passes(store, *steps) == [None, None, {FIRST}]


def test_an_overflow_causes_a_whole_pass(store: Path) -> None:
    """Where the kernel has lost events, everything is looked at, and events are seen again."""
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if events > 100_000:
        pytest.skip("the kernel's queue is too long to overflow it")

    def step() -> Unfinished:
        for number in range(events + 1):
            os.close(os.open(store / str(number % 2), os.O_WRONLY | os.O_CREAT))
        return ()

    assert passes(store, step, closed(store / FIRST)) == [None, None, {FIRST}]


def test_a_store_that_is_replaced_is_watched_anew(store: Path) -> None:
    """A whole pass at once, and from then on what is there now is watched, and no more what was."""
    old = store.with_name("old")

    def replace() -> Unfinished:
        store.rename(old)
        store.mkdir()
        return ()

    assert passes(store, replace, closed(old / FIRST, store / SECOND)) == [None, None, {SECOND}]


def test_a_store_that_is_removed_is_noticed(store: Path) -> None:
    """A whole pass at once, which can say so; when it is there again, it is watched again."""

    def remove() -> Unfinished:
        store.rmdir()
        return ()

    def come_back() -> Unfinished:
        store.mkdir()
        return ()

    assert passes(store, remove, come_back, closed(store / FIRST), every=0.2) == [
        None,
        None,
        None,
        {FIRST},
    ]


@pytest.fixture
def mounted(store: Path) -> Iterator[Path]:
    """A file system of its own on the store."""
    mount(store)
    yield store
    while subprocess.run(["umount", "--quiet", store], check=False).returncode == 0:
        pass


def mount(store: Path) -> Unfinished:
    """Mounts an empty file system on the store, or over what is mounted there."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", store], check=True)
    return ()


@needs_root
def test_a_store_that_is_unmounted_is_watched_anew(mounted: Path) -> None:
    """The kernel tells, so that there is a whole pass at once; then what is under it is watched."""

    def unmount() -> Unfinished:
        subprocess.run(["umount", mounted], check=True)
        return ()

    assert passes(mounted, unmount, closed(mounted / FIRST)) == [None, None, {FIRST}]


@needs_root
def test_a_store_that_is_mounted_over_is_watched_from_the_next_beat_on(mounted: Path) -> None:
    """The kernel tells nothing then; the next whole pass meets it and so do the events after it."""
    asked = passes(mounted, lambda: mount(mounted), closed(mounted / FIRST), every=0.2)
    assert asked == [None, None, {FIRST}]


def test_without_a_watch_the_clock_alone_makes_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, however often it is tried again."""
    store = tmp_path / "store"
    step = closed()
    with caplog.at_level("DEBUG", "ln_images"):
        assert passes(store, step, step, step, every=0.05) == [None] * 4
    assert [record.getMessage() for record in caplog.records] == [
        f"no watch on {store}: No such file or directory: passes are made by the clock alone"
    ]


def test_a_watch_that_lasts_holds_one_descriptor(store: Path) -> None:
    """However often the directory is another one."""
    watch = Watch()
    watch.renew(str(store))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store.rename(store.with_name(f"store-{number}"))
        store.mkdir()
        watch.renew(str(store))
        assert watch.wait(0) == frozenset()
    assert len(os.listdir("/proc/self/fd")) == before
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_no_pass_begins_early_nor_ends_late(store: Path) -> None:
    """Whole passes begin no sooner than on the beat; none does that would end too late.

    Events are met to the end.
    """
    begun, asked = [], []

    def make(ids: Collection[str] | None) -> Unfinished:
        asked.append(ids)
        if ids is None:
            begun.append(time.monotonic())
        return ()

    start = time.monotonic()
    repeat(str(store), 0.1, 0.5, make)
    assert time.monotonic() - start >= 0.5
    assert 1 <= len(begun) <= 5
    assert all(at - start >= 0.1 * beat for beat, at in enumerate(begun))

    def slow(ids: Collection[str] | None) -> Unfinished:
        if ids is None:
            closed(store / FIRST)()
            time.sleep(0.3)
        return make(ids)

    asked.clear()
    repeat(str(store), 0.1, 0.5, slow)
    assert asked == [None, [FIRST]]


# The command at work


@contextlib.contextmanager
def locked(node: Node) -> Iterator[None]:
    """The lock of the node's cache, held as by another run."""
    directory = os.open(node.cache, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


INTERRUPTED = "ln-images: interrupted: what was linked stays, the next run does the rest"
ONCE = ("--every", "3600")


def test_an_image_is_linked_between_two_beats(node: Node, tmp_path: Path) -> None:
    """While it is uploaded nothing is asked, and then about it alone.

    The report, log and metrics tell of it.

    SIGHUP changes nothing, a log file that is renamed is begun anew, and SIGTERM ends it.
    """
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    node.cloud.image("before", DATA)
    with running(node, *ONCE, "--log-file", str(log), "--metrics-file", str(metrics)) as run:
        assert run.report()["counts"]["linked"] == 1
        wait_until(metrics.exists, "the metrics of the first pass")
        run.process.send_signal(signal.SIGHUP)
        log.rename(tmp_path / "log.1")
        image = node.cloud.create("image")
        upload = node.cloud.slow_upload(image, b"\1" * 100_000)
        wait_until(lambda: (node.images / image).exists(), "the upload to reach the disk")
        before = requests(node)
        upload.finish(b"\1" * 100_000)
        report = run.report()
        assert [one["id"] for one in report["images"]] == [image]
        assert (report["counts"]["linked"], report["counts"]["present"]) == (1, 0)
        assert node.linked(image)
        asked = requests(node) - before
        assert 1 <= sum(asked.values()) <= 20
        assert all(f"id=in%3A{image}" in line for line in asked)
        assert run.ended() == (130, [INTERRUPTED])
    assert f"linked: {image}" in log.read_text()
    assert 'ln_images_images{outcome="linked"} 2.0' in metrics.read_text()


def test_two_thousand_files_at_once_cost_a_few_passes(node: Node) -> None:
    """They are linked by whole passes, and not by thousands of questions."""
    with running(node, *ONCE) as run:
        run.report()
        before = requests(node)
        left = len(node.cloud.add_many(2000))
        # Read meanwhile: a report of so many does not fit into the pipe, and whoever writes it
        # waits.
        while left:
            left -= run.report()["counts"].get("linked", 0)
        assert sum((requests(node) - before).values()) < 100
        assert run.ended()[0] == 130


def test_two_runs_at_once_do_the_work_once(node: Node) -> None:
    """Each waits for the lock without a word; each image is linked by one of them."""
    with running(node, *ONCE) as one, running(node, *ONCE) as other:
        with locked(node):
            first = node.cloud.image("first", DATA)
        reports = [one.report(), other.report()]
        images = [first, *(node.cloud.image("image", DATA) for _ in range(3))]
        wait_until(lambda: all(map(node.linked, images)), "the links")
        for run in (one, other):
            run.process.send_signal(signal.SIGTERM)
            reports += run.reports
            assert run.ended(None) == (130, [INTERRUPTED])
    linked = [
        image["id"]
        for report in reports
        for image in report["images"]
        if image["outcome"] == "linked"
    ]
    assert sorted(linked) == sorted(images)


def test_a_run_that_never_comes_to_a_pass_ends_with_75(node: Node) -> None:
    """One that could make none in its whole time says so once.

    One that made a pass before or after does not.
    """
    with locked(node):
        run = node.process("--every", "0.2", "--for", "0.5")
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (75, "", 1)
    assert "another run holds the lock" in run.stderr
    with running(node, "--every", "0.2", "--for", "1") as met:
        met.report()
        with locked(node):
            assert met.ended(None) == (0, [])


@contextlib.contextmanager
def fronts(node: Node) -> Iterator[tuple[dict[str, Iterator[Answer]], dict[str, str | None]]]:
    """Servers before Keystone and Glance, what each answers before it answers really, and what chooses them."""
    answers: dict[str, Iterator[Answer]] = {"keystone": iter(()), "glance": iter(())}
    identity = node.cloud.identity()
    service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
    with (
        Faulty(node.cloud.glance, lambda path: next(answers["glance"], path)) as glance,
        Faulty(node.cloud.keystone, lambda path: next(answers["keystone"], path)) as keystone,
    ):
        region = f"port-{glance.server_port}"
        endpoint = {
            "service_id": service,
            "interface": "public",
            "region": region,
            "url": glance.url,
        }
        made = identity.post("/endpoints", json={"endpoint": endpoint}).json()["endpoint"]["id"]
        try:
            yield answers, {"OS_REGION_NAME": region, "OS_AUTH_URL": f"{keystone.url}/v3"}
        finally:
            identity.delete(f"/endpoints/{made}")


def test_a_cloud_that_goes_away_and_comes_back(node: Node, tmp_path: Path) -> None:
    """Each service that goes away is told of once when it does and once when it is back.

    Then linking goes on.

    A token that expires meanwhile is a new token, without a word.
    """
    log = tmp_path / "log"
    arguments = ("-q", "--every", "0.1", "--log-file", str(log))
    with fronts(node) as (answers, variables), running(node, *arguments, **variables) as run:

        def works() -> None:
            image = node.cloud.image("image", DATA)
            wait_until(lambda: node.linked(image), "the link")

        def comes_back(name: str) -> None:
            wait_until(
                lambda: f"{name} cannot be asked" in log.read_text(), "the line that it is away"
            )
            image = node.cloud.image("image", DATA)
            assert not node.linked(image)
            answers.update(glance=iter(()), keystone=iter(()))
            wait_until(lambda: node.linked(image), "the link")
            wait_until(lambda: f"it is over: {name}" in log.read_text(), "the line that it is back")

        works()
        answers["glance"] = iter([Answer(401)])
        works()
        answers["glance"] = itertools.repeat(Answer(503))
        comes_back("Glance")
        answers["keystone"] = itertools.repeat(Answer(503))
        answers["glance"] = iter([Answer(401)])
        comes_back("Keystone")
        status, errors = run.ended()
    assert (status, [line.split(": ")[1] for line in errors]) == (
        130,
        ["Glance cannot be asked", "Keystone cannot be asked", "interrupted"],
    )
    told = [
        line.split(" ", 4)[4].split(":")[0]
        for line in log.read_text().splitlines()
        if " linked: " not in line
    ]
    assert told == [
        "Glance cannot be asked",
        "it is over",
        "Keystone cannot be asked",
        "it is over",
    ]


def test_a_password_that_is_changed_ends_it(node: Node) -> None:
    """With one line and status 2.

    A password that is refused is not tried again and again, which locks accounts.
    """
    name = f"user-{uuid.uuid4()}"
    who = node.cloud.add_user(name, name, "admin")
    image = node.cloud.image("image", DATA)
    user: dict[str, str | None] = {"OS_USERNAME": name, "OS_PROJECT_NAME": name}
    with (
        fronts(node) as (answers, variables),
        running(node, "-q", "--every", "0.1", **user, **variables) as run,
    ):
        wait_until(lambda: node.linked(image), "the link")
        node.cloud.identity().patch(
            f"/users/{who.get_user_id()}", json={"user": {"password": "another"}}
        )
        answers["glance"] = iter([Answer(401)])
        status, errors = run.ended(None)
    assert (status, errors) == (
        2,
        ["ln-images: Keystone refuses the credentials: HTTP 401: check your openrc"],
    )


def test_without_inotify_the_clock_alone_links(node: Node) -> None:
    """Where the kernel gives no watch there is one line under -v, and passes as if there were no such thing."""
    limit = "echo 0 > /proc/sys/user/max_inotify_instances"
    space = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{limit}; exec "$0" "$@"']
    if subprocess.run([*space, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespace here")
    command = [*space, str(COMMAND), "-v", "--every", "0.2", "--for", "2", "--owner", "0:0"]
    node.cloud.image("image", DATA)
    run = subprocess.run(
        command, env=node.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("no watch on") == 1
    assert len(node.names()) == 1
