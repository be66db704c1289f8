"""What makes a pass between two beats of the clock: real directories, mounts and inotify. Orders, and no times."""

import os
import subprocess
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from conftest import needs_root
from ln_images.watch import Watch, repeat

NEVER = 3600.0
Asked = frozenset[str] | None
Answer = Collection[str] | None
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


def passes(store: Path, *steps: Callable[[], Answer], every: float = NEVER) -> list[Asked]:
    """Lets the passes do and answer what ``steps`` say, one after another, and returns what each was asked for."""
    asked: list[Asked] = []

    def make(ids: Collection[str] | None) -> Answer:
        asked.append(None if ids is None else frozenset(ids))
        if len(asked) > len(steps):
            raise Over
        return steps[len(asked) - 1]()

    with pytest.raises(Over):
        repeat(str(store), every, None, make)
    return asked


def closed(*paths: Path, unfinished: Answer = ()) -> Callable[[], Answer]:
    """A pass during which files are closed after writing."""

    def step() -> Answer:
        for path in paths:
            path.write_bytes(b"x")
        return unfinished

    return step


def test_a_file_that_is_closed_or_moved_in_is_asked_about_by_itself(store: Path) -> None:
    """Also where it happens during a pass, and together where they come together; files of other names are ignored."""

    def step() -> Answer:
        for name in (FIRST, f"{SECOND}.part", "notes", THIRD.replace("-", "")):
            (store / name).write_bytes(b"x")
        (store / f"{SECOND}.part").rename(store / SECOND)
        return ()

    assert passes(store, step) == [None, {FIRST, SECOND}]
    assert passes(store, closed(store / "notes"), closed(store / THIRD), every=0.2) == [None, None, {THIRD}]


def test_an_upload_that_lasts_causes_no_question_until_it_is_closed(store: Path) -> None:
    """What is written, touched, read and given away is of no interest; only the end of it is."""
    with (store / FIRST).open("wb") as upload:

        def step() -> Answer:
            for _ in range(100):
                upload.write(b"x")
                upload.flush()
            (store / FIRST).read_bytes()
            (store / FIRST).chmod(0o644)
            return closed(store / SECOND)()

        def end() -> Answer:
            upload.close()
            return ()

        assert passes(store, step, end) == [None, {SECOND}, {FIRST}]


def test_who_is_not_active_yet_is_asked_about_again(store: Path) -> None:
    """Until it is, or there was no pass; one that comes to be finished later is asked about no more than is needed."""
    again = closed(unfinished=[FIRST])
    steps = (closed(store / FIRST), again, again, closed(unfinished=None), closed(store / SECOND))
    assert passes(store, *steps) == [None, {FIRST}, {FIRST}, {FIRST}, {FIRST}, {SECOND}]


def test_others_that_come_in_do_not_make_it_be_asked_about_more(store: Path) -> None:
    """An image that never becomes active is asked about a few times, whatever is closed meanwhile."""
    steps = [closed(store / name, unfinished=[FIRST]) for name in IDS[:80]]
    asked = passes(store, *steps, every=1)
    assert set(IDS[:80]) <= frozenset[str]().union(*(ids for ids in asked if ids))
    assert 2 <= sum(FIRST in ids for ids in asked if ids) <= 8


def test_many_at_once_cause_a_whole_pass(store: Path) -> None:
    """Past fifty, one pass over everything costs less; who is unfinished then is asked about by itself."""
    steps = (closed(*(store / name for name in IDS)), closed(unfinished=[FIRST]))
    assert passes(store, *steps) == [None, None, {FIRST}]


def test_an_overflow_causes_a_whole_pass(store: Path) -> None:
    """Where the kernel has lost events, everything is looked at, and events are seen again."""
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if events > 100_000:
        pytest.skip("the kernel's queue is too long to overflow it")

    def step() -> Answer:
        for number in range(events + 1):
            os.close(os.open(store / str(number % 2), os.O_WRONLY | os.O_CREAT))
        return ()

    assert passes(store, step, closed(store / FIRST)) == [None, None, {FIRST}]


def test_a_store_that_is_replaced_is_watched_anew(store: Path) -> None:
    """A whole pass at once, and from then on what is there now is watched, and no more what was."""
    old = store.with_name("old")

    def replace() -> Answer:
        store.rename(old)
        store.mkdir()
        return ()

    assert passes(store, replace, closed(old / FIRST, store / SECOND)) == [None, None, {SECOND}]


def test_a_store_that_is_removed_is_noticed(store: Path) -> None:
    """A whole pass at once, which can say so; when it is there again, it is watched again."""

    def remove() -> Answer:
        store.rmdir()
        return ()

    def come_back() -> Answer:
        store.mkdir()
        return ()

    assert passes(store, remove, come_back, closed(store / FIRST), every=0.2) == [None, None, None, {FIRST}]


@pytest.fixture
def mounted(store: Path) -> Iterator[Path]:
    """A file system of its own on the store."""
    mount(store)
    yield store
    while subprocess.run(["umount", "--quiet", store], check=False).returncode == 0:
        pass


def mount(store: Path) -> Answer:
    """Mounts an empty file system on the store, or over what is mounted there."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", store], check=True)
    return ()


@needs_root
def test_a_store_that_is_unmounted_is_watched_anew(mounted: Path) -> None:
    """The kernel tells, so that there is a whole pass at once; then what is under it is watched."""

    def unmount() -> Answer:
        subprocess.run(["umount", mounted], check=True)
        return ()

    assert passes(mounted, unmount, closed(mounted / FIRST)) == [None, None, {FIRST}]


@needs_root
def test_a_store_that_is_mounted_over_is_watched_from_the_next_beat_on(mounted: Path) -> None:
    """The kernel tells nothing then; the next whole pass meets it and so do the events after it."""
    asked = passes(mounted, lambda: mount(mounted), closed(mounted / FIRST), every=0.2)
    assert asked == [None, None, {FIRST}]


def test_without_a_watch_the_clock_alone_makes_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
