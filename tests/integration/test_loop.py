"""Passes made one after another: real directories, mounts and inotify, then the command at work.

The tests compare orders and counts, and no times.
"""

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from ln_images.loop import Attempt, Watch, repeat
from support.cloud import wait_until
from support.faulty import Answer, Faulty, Front, Variables
from support.node import Node, executable, needs_root
from support.observe import INTERRUPTED, count_requests, held_lock, one_line
from support.repeating import running

DATA = b"\1" * 5000
NEVER = 3600.0
ONCE = ("--every", "3600")
IDS = [str(uuid.UUID(int=number)) for number in range(100)]
FIRST, SECOND, THIRD = IDS[:3]
DONE = Attempt(was_possible=True)
IMPOSSIBLE = Attempt(was_possible=False)

# A full pass is None, a partial one the ids that it is about.
Requested = frozenset[str] | None


class AllMadeError(Exception):
    """All passes of a test have been made."""


class Steps:
    """Passes that do what ``steps`` say, one after another, and remember what they were about."""

    def __init__(self, *steps: Callable[[], Attempt]) -> None:
        self.requested: list[Requested] = []
        self._steps = steps

    def run_full(self) -> Attempt:
        """Take the next step as a full pass."""
        return self._run(None)

    def run_partial(self, image_ids: Collection[str]) -> Attempt:
        """Take the next step as a partial pass."""
        return self._run(frozenset(image_ids))

    def _run(self, requested: Requested) -> Attempt:
        self.requested.append(requested)
        if len(self.requested) > len(self._steps):
            raise AllMadeError
        return self._steps[len(self.requested) - 1]()


def passes(store: Path, *steps: Callable[[], Attempt], every: float = NEVER) -> list[Requested]:
    """Return what the passes were about that take these steps, and the one that comes next."""
    made = Steps(*steps)
    with pytest.raises(AllMadeError):
        repeat(made, str(store), every, None)
    return made.requested


def close_files(*paths: Path, unfinished: Collection[str] = ()) -> Callable[[], Attempt]:
    """Return a step during which files are closed after writing."""

    def step() -> Attempt:
        for path in paths:
            path.write_bytes(b"x")
        return Attempt(was_possible=True, unfinished=unfinished)

    return step


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Make a store without images."""
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


def test_a_file_that_is_closed_or_moved_in_causes_a_partial_pass(store: Path) -> None:
    """Files that are finished together, even during a pass, share one; other names cause none."""

    def step() -> Attempt:
        for name in (FIRST, f"{SECOND}.part", "notes", THIRD.replace("-", "")):
            (store / name).write_bytes(b"x")
        (store / f"{SECOND}.part").rename(store / SECOND)
        return DONE

    assert passes(store, step) == [None, {FIRST, SECOND}]
    steps = (close_files(store / "notes"), close_files(store / THIRD))
    assert passes(store, *steps, every=0.2) == [None, None, {THIRD}]


def test_an_upload_causes_no_pass_until_it_is_closed(store: Path) -> None:
    """Writing, reading and changing the mode of a file cause no pass; only its close does."""
    with (store / FIRST).open("wb") as upload:

        def write() -> Attempt:
            for _ in range(100):
                upload.write(b"x")
                upload.flush()
            (store / FIRST).read_bytes()
            (store / FIRST).chmod(0o644)
            return close_files(store / SECOND)()

        def close() -> Attempt:
            upload.close()
            return DONE

        assert passes(store, write, close) == [None, {SECOND}, {FIRST}]


def test_an_image_that_is_not_active_yet_is_queried_again(store: Path) -> None:
    """It is queried until it is finished, even after a pass that was not possible."""
    again = close_files(unfinished=[FIRST])
    steps = (
        close_files(store / FIRST),
        again,
        again,
        lambda: IMPOSSIBLE,
        close_files(store / SECOND),
    )
    assert passes(store, *steps) == [None, {FIRST}, {FIRST}, {FIRST}, {FIRST}, {SECOND}]


def test_other_files_do_not_make_an_image_be_queried_more_often(store: Path) -> None:
    """The delay doubles each time, from 20 ms on, whatever files are closed meanwhile."""
    begun = []

    def step(name: str) -> Attempt:
        begun.append(time.monotonic())
        time.sleep(0.002)
        return close_files(store / name, unfinished=[FIRST])()

    requested = passes(store, *(functools.partial(step, name) for name in IDS))
    assert set(IDS) <= frozenset[str]().union(*(ids for ids in requested if ids))
    times = [at for at, ids in zip(begun, requested, strict=False) if ids and FIRST in ids]
    delays = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(delays) >= 2
    assert all(delay >= 0.02 * 2**number for number, delay in enumerate(delays))


def test_many_files_at_once_cause_a_full_pass(store: Path) -> None:
    """For more than fifty, a full pass costs less; what it has not finished is queried alone."""
    steps = (close_files(*(store / name for name in IDS)), close_files(unfinished=[FIRST]))
    assert passes(store, *steps) == [None, None, {FIRST}]


def test_an_overflow_of_the_queue_causes_a_full_pass(store: Path) -> None:
    """If the kernel has lost events, a full pass follows at once, and then events count again."""
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if events > 100_000:
        pytest.skip("the kernel's queue is too long to overflow it")

    def overflow() -> Attempt:
        for number in range(events + 1):
            os.close(os.open(store / str(number % 2), os.O_WRONLY | os.O_CREAT))
        return DONE

    assert passes(store, overflow, close_files(store / FIRST)) == [None, None, {FIRST}]


def test_a_store_that_is_replaced_is_watched_anew(store: Path) -> None:
    """A full pass follows at once; then the new directory is watched, and the old one is not."""
    old = store.with_name("old")

    def replace() -> Attempt:
        store.rename(old)
        store.mkdir()
        return DONE

    steps = (replace, close_files(old / FIRST, store / SECOND))
    assert passes(store, *steps) == [None, None, {SECOND}]


def test_a_store_that_is_removed_is_noticed(store: Path) -> None:
    """A full pass follows at once and can report it; a store that comes back is watched again."""

    def remove() -> Attempt:
        store.rmdir()
        return DONE

    def restore() -> Attempt:
        store.mkdir()
        return DONE

    steps = (remove, restore, close_files(store / FIRST))
    assert passes(store, *steps, every=0.2) == [None, None, None, {FIRST}]


@pytest.fixture
def mounted(store: Path) -> Iterator[Path]:
    """Mount a file system of its own on the store."""
    mount(store)
    yield store
    while subprocess.run(["umount", "--quiet", store], check=False).returncode == 0:
        pass


def mount(store: Path) -> Attempt:
    """Mount an empty file system on the store, or over what is mounted there."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", store], check=True)
    return DONE


@needs_root
def test_a_store_that_is_unmounted_is_watched_anew(mounted: Path) -> None:
    """The kernel reports it, so a full pass follows at once; then what was under it is watched."""

    def unmount() -> Attempt:
        subprocess.run(["umount", mounted], check=True)
        return DONE

    assert passes(mounted, unmount, close_files(mounted / FIRST)) == [None, None, {FIRST}]


@needs_root
def test_a_store_that_is_mounted_over_is_watched_from_the_next_tick(mounted: Path) -> None:
    """The kernel does not report it; the next full pass sees the new mount, and then its events."""
    steps = (lambda: mount(mounted), close_files(mounted / FIRST))
    assert passes(mounted, *steps, every=0.2) == [None, None, {FIRST}]


def test_a_store_that_is_missing_is_left_to_the_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock alone makes passes then, and they report the directory; the watch logs nothing."""
    assert passes(tmp_path / "store", *[close_files()] * 3, every=0.05) == [None] * 4
    assert caplog.records == []


def test_a_watch_holds_one_descriptor(store: Path) -> None:
    """However often the directory is replaced, the process has one descriptor for it."""
    watch = Watch()
    watch.renew(str(store))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store.rename(store.with_name(f"store-{number}"))
        store.mkdir()
        watch.renew(str(store))
        assert watch.wait(0) == (set(), False)
    assert len(os.listdir("/proc/self/fd")) == before
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


# Waits an hour each time. An alarm rings at a random moment around the start of the wait, and its
# handler ends the wait.
WAITS_THAT_A_SIGNAL_ENDS = """
import random
import signal
import sys
from ln_images.loop import Watch

class Rang(Exception):
    pass

def ring(*_):
    raise Rang

signal.signal(signal.SIGALRM, ring)
watch = Watch()
watch.renew(sys.argv[1])
ended = 0
for _ in range(500):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 6e-5))
        watch.wait(3600)
        while True:
            watch.wait(3600)
    except Rang:
        ended += 1
print(ended)
"""


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_signal_at_any_moment_ends_a_wait(tmp_path: Path, is_watched: bool) -> None:
    """Not even a signal that arrives directly before the system call that waits is lost.

    About one alarm of fifty rings at that moment.
    """
    directory = tmp_path if is_watched else tmp_path / "none"
    run = subprocess.run(
        [sys.executable, "-c", WAITS_THAT_A_SIGNAL_ENDS, str(directory)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == "500\n"


class Timed:
    """Passes that take ``seconds`` if they are full, and close a file then."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.requested: list[Requested] = []
        self.full_times: list[float] = []
        self._file = file
        self._seconds = seconds

    def run_full(self) -> Attempt:
        """Close the file, and sleep."""
        self.requested.append(None)
        self.full_times.append(time.monotonic())
        if self._seconds:
            self._file.write_bytes(b"x")
            time.sleep(self._seconds)
        return DONE

    def run_partial(self, image_ids: Collection[str]) -> Attempt:
        """Remember the ids."""
        self.requested.append(frozenset(image_ids))
        return DONE


def test_no_full_pass_starts_early(store: Path) -> None:
    """Full passes start no sooner than at their tick, and the process lasts to its end."""
    quick = Timed(store / FIRST, 0)
    start = time.monotonic()
    repeat(quick, str(store), 0.1, 0.5)
    assert time.monotonic() - start >= 0.5
    assert 1 <= len(quick.full_times) <= 5
    assert all(at - start >= 0.1 * tick for tick, at in enumerate(quick.full_times))


def test_no_full_pass_ends_late(store: Path) -> None:
    """None starts that would end too late; files are linked until the end all the same."""
    slow = Timed(store / FIRST, 0.3)
    repeat(slow, str(store), 0.1, 0.5)
    assert slow.requested == [None, {FIRST}]


# The command at work


def test_an_image_is_linked_between_two_ticks(node: Node, tmp_path: Path) -> None:
    """An image is queried alone when its file is closed; report, log and metrics have it.

    SIGHUP changes nothing, a log file that is renamed is begun anew, and SIGTERM ends the process.
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
        before = count_requests(node)
        upload.finish(b"\1" * 100_000)
        report = run.report()
        assert [result["id"] for result in report["images"]] == [image]
        assert (report["counts"]["linked"], report["counts"]["present"]) == (1, 0)
        assert node.is_linked(image)
        requests = count_requests(node) - before
        assert 1 <= sum(requests.values()) <= 20
        assert all(f"id=in%3A{image}" in line for line in requests)
        assert run.end() == (130, INTERRUPTED.splitlines())
    assert f"linked: {image}" in log.read_text()
    linked = rf'ln_images_images{{cache_dir="{node.cache}",outcome="linked"}} 2.0'
    assert linked in metrics.read_text()


def test_the_metrics_count_each_image_once(node: Node, tmp_path: Path) -> None:
    """A partial pass moves an image from waiting to linked, and what failed before stays failed."""
    metrics = tmp_path / "metrics"
    damaged = node.cloud.image("damaged", DATA)
    os.truncate(node.images / damaged, 100)
    os.utime(node.images / damaged, (1, 1))
    image = node.cloud.create("image")
    upload = node.cloud.slow_upload(image, b"\1" * 100_000)
    wait_until(lambda: (node.images / image).exists(), "the upload to reach the disk")

    def values(*names: str) -> list[float]:
        text = metrics.read_text()
        return [float(re.findall(rf"^ln_images_{name} (\S+)$", text, re.M)[0]) for name in names]

    cache = f'{{cache_dir="{node.cache}"'
    counted = [f'images{cache},outcome="{name}"}}' for name in ("waiting", "linked", "damaged")]
    status = f'exit_status{cache},command="ln-images"}}'
    with running(node, *ONCE, "--metrics-file", str(metrics)) as run:
        assert run.report()["counts"]["damaged"] == 1
        wait_until(metrics.exists, "the metrics of the first pass")
        assert values(*counted, status) == [1, 0, 1, 1]
        upload.finish(b"\1" * 100_000)
        assert run.report()["exit_status"] == 0
        wait_until(lambda: values(*counted, status) == [0, 1, 1, 1], "the metrics of the second")
        assert run.end()[0] == 130


def test_two_thousand_files_at_once_cost_a_few_passes(node: Node) -> None:
    """Full passes link them, and not thousands of queries."""
    with running(node, *ONCE) as run:
        run.report()
        before = count_requests(node)
        missing = len(node.cloud.add_many(2000))
        # The reports are read meanwhile: one about so many images does not fit into the pipe.
        while missing:
            missing -= run.report()["counts"].get("linked", 0)
        assert sum((count_requests(node) - before).values()) < 100
        assert run.end()[0] == 130


def test_two_runs_at_once_do_the_work_once(node: Node) -> None:
    """Each waits for the lock without a message, and each image is linked by one of them."""
    with running(node, *ONCE) as one, running(node, *ONCE) as other:
        with held_lock(node):
            first = node.cloud.image("first", DATA)
        reports = [one.report(), other.report()]
        images = [first, *(node.cloud.image("image", DATA) for _ in range(3))]
        wait_until(lambda: all(map(node.is_linked, images)), "the links")
        for run in (one, other):
            run.process.send_signal(signal.SIGTERM)
            reports += run.reports
            assert run.end(None) == (130, INTERRUPTED.splitlines())
    linked = [
        image["id"]
        for report in reports
        for image in report["images"]
        if image["outcome"] == "linked"
    ]
    assert sorted(linked) == sorted(images)


def test_a_run_that_never_gets_the_lock_ends_with_75(node: Node) -> None:
    """It says so once in the end; a run that made a pass before or after does not."""
    with held_lock(node):
        run = node.process("--every", "0.2", "--for", "0.5")
    assert (run.returncode, run.stdout) == (75, "")
    assert "holds the lock; " in one_line(run.stderr)
    with running(node, "--every", "0.2", "--for", "1") as made:
        made.report()
        with held_lock(node):
            assert made.end(None) == (0, [])


class Fronts:
    """Servers before Keystone and Glance. Each gives its ``answers`` first, then the real ones."""

    def __init__(self, node: Node, front: Front) -> None:
        self.keystone_answers: Iterator[Answer] = iter(())
        self.glance_answers: Iterator[Answer] = iter(())
        self.keystone = Faulty(node.cloud.keystone, lambda p: next(self.keystone_answers, p))
        self.glance, region = front(lambda path: next(self.glance_answers, path))
        self.variables: Variables = {"OS_AUTH_URL": f"{self.keystone.url}/v3", **region}

    def end_trouble(self) -> None:
        """Give the real answers again."""
        self.keystone_answers = self.glance_answers = iter(())


@pytest.fixture
def fronts(node: Node, front: Front) -> Iterator[Fronts]:
    """Put servers before Keystone and Glance."""
    both = Fronts(node, front)
    with both.keystone:
        yield both


def link_one(node: Node) -> None:
    """Make an image, and wait until it is linked."""
    image = node.cloud.image("image", DATA)
    wait_until(lambda: node.is_linked(image), "the link")


def test_a_cloud_that_goes_away_and_comes_back(node: Node, fronts: Fronts, tmp_path: Path) -> None:
    """Each outage is one error and, when it is over, one line of the log; then linking goes on.

    A token that expires is replaced without a message.
    """
    log = tmp_path / "log"
    arguments = ("-q", "--every", "0.1", "--log-file", str(log))
    with running(node, *arguments, **fronts.variables) as run:

        def come_back(service: str) -> None:
            wait_until(
                lambda: f"ERROR passes.py:{service}" in re.sub(r"py:\d+ ", "py:", log.read_text()),
                "the line that it is away",
            )
            image = node.cloud.image("image", DATA)
            assert not node.is_linked(image)
            fronts.end_trouble()
            wait_until(lambda: node.is_linked(image), "the link")
            wait_until(lambda: f"over: {service}" in log.read_text(), "the line that it is back")

        link_one(node)
        fronts.glance_answers = iter([Answer(401)])
        link_one(node)
        fronts.glance_answers = itertools.repeat(Answer(503))
        come_back("Glance")
        fronts.keystone_answers = itertools.repeat(Answer(503))
        fronts.glance_answers = iter([Answer(401)])
        come_back("Keystone")
        status, errors = run.end()
    assert status == 130
    assert [line.split()[1] for line in errors] == ["Glance", "Keystone", "interrupted;"]
    lines = [line.split(" ", 4)[4] for line in log.read_text().splitlines()]
    words = [line.split()[:2] for line in lines if not line.startswith("linked: ")]
    assert [words[0][0], words[1], words[2][0], words[3]] == [
        "Glance",
        ["over:", "Glance"],
        "Keystone",
        ["over:", "Keystone"],
    ]
    assert len(words) == 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_credential_that_is_refused_once_is_tried_again(
    node: Node, fronts: Fronts, status: int
) -> None:
    """A later pass gets a new token, and linking goes on; the refusal is one line of error."""
    with running(node, "-q", "--every", "0.1", **fronts.variables) as run:
        link_one(node)
        # keystoneauth itself tries once more after a 401.
        refusals = [Answer(status)] * (2 if status == 401 else 1)
        fronts.glance_answers = (refusals.pop() for _ in list(refusals))
        wait_until(lambda: not refusals, "the refusal")
        link_one(node)
        ended, errors = run.end()
    assert ended == 130
    assert len(errors) == 2
    assert f"Glance refuses the credentials (HTTP {status})" in errors[0]


def test_a_credential_that_is_refused_at_once_ends_it(node: Node, fronts: Fronts) -> None:
    """A refusal before the first pass ends the process with status 2."""
    fronts.glance_answers = itertools.repeat(Answer(403))
    with running(node, "-q", "--every", "0.1", **fronts.variables) as run:
        status, errors = run.end(None)
    assert status == 2
    assert len(errors) == 1


def test_a_password_that_is_changed_ends_it(node: Node, fronts: Fronts) -> None:
    """It is tried twice, because more tries could lock the account; the status is 2."""
    name = f"user-{uuid.uuid4()}"
    session = node.cloud.add_user(name, name, "admin")
    user: Variables = {"OS_USERNAME": name, "OS_PROJECT_NAME": name}
    with running(node, "-q", "--every", "0.1", **user, **fronts.variables) as run:
        link_one(node)
        node.cloud.identity().patch(
            f"/users/{session.get_user_id()}", json={"user": {"password": "another"}}
        )
        before = len(fronts.keystone.paths)
        fronts.glance_answers = iter([Answer(401)])
        status, errors = run.end(None)
    tries = [path for path in fronts.keystone.paths[before:] if path.endswith("/auth/tokens")]
    assert len(tries) == 2
    message = "ln-images: Keystone refuses the credentials (HTTP 401); check your openrc"
    assert status == 2
    assert set(errors) == {message}


def test_an_image_that_a_lagging_replica_does_not_list_is_linked(node: Node, front: Front) -> None:
    """A file that Glance does not know yet is queried again, by itself and in each full pass."""
    hidden: list[str] = []
    refusals: list[str] = []

    def hide(path: str) -> str:
        if not any(image_id in path for image_id in hidden):
            return path
        refusals.append(path)
        return path.replace(hidden[0], IDS[0])

    _server, region = front(hide)
    with running(node, "-q", "--every", "0.5", **region) as run:
        link_one(node)
        image = node.cloud.create("image")
        hidden.append(image)
        node.cloud.upload(image, DATA)
        # By itself after 20, 60 and 140 ms and so on, and then in full passes.
        wait_until(lambda: len(refusals) > 20, "some passes")
        assert not node.is_linked(image)
        hidden.clear()
        wait_until(lambda: node.is_linked(image), "the link")
        assert run.end() == (130, INTERRUPTED.splitlines())
    assert any(path.count("-") == 4 for path in map(query_of, refusals)), refusals


def query_of(path: str) -> str:
    """Return the ids of a request."""
    return path.partition("id=in%3A")[2].partition("&")[0]


def test_a_partial_pass_tries_an_unlisted_image_again_at_once(node: Node, front: Front) -> None:
    """An image that Glance lists only at the third query is linked without a full pass."""
    unlisted = itertools.chain([True, True, True, True], itertools.repeat(False))
    created: list[str] = []

    def hide(path: str) -> str:
        if created and created[0] in path and next(unlisted):
            return path.replace(created[0], IDS[0])
        return path

    _server, region = front(hide)
    with running(node, "-q", *ONCE, **region) as run:
        before = node.cloud.image("before", DATA)
        wait_until(lambda: node.is_linked(before), "the link")
        created.append(node.cloud.create("image"))
        node.cloud.upload(created[0], DATA)
        wait_until(lambda: node.is_linked(created[0]), "the link", 30)
        assert run.end()[0] == 130


@pytest.mark.parametrize(
    ("limit", "variable"),
    [
        ("max_inotify_instances", "fs.inotify.max_user_instances"),
        ("max_inotify_watches", "fs.inotify.max_user_watches"),
    ],
)
def test_without_inotify_the_clock_alone_links(node: Node, limit: str, variable: str) -> None:
    """If the kernel's limit is reached, one warning names it, and the clock makes the passes."""
    script = f'echo 0 > /proc/sys/user/{limit}; exec "$0" "$@"'
    space = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
    if subprocess.run([*space, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespace here")
    command = [*space, str(executable()), "--every", "0.2", "--for", "2", "--owner", "0:0"]
    node.cloud.image("image", DATA)
    run = subprocess.run(
        command, env=node.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    line = one_line(run.stderr)
    assert line.startswith(f"ln-images: warning: {node.images}: inotify does not work (")
    assert variable in line
    assert len(node.names()) == 1
