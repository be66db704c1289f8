"""Repeat passes by the clock, and at once when Glance has finished a file (``--every``)."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from inotify_simple import INotify, flags

from ln_images.memory import LogOnChange
from ln_images.model import is_image_id

LOG = logging.getLogger(__name__)

# Glance closes a file 10 to 500 ms before the image is active. So many seconds after that we query
# it, and then after twice as many each time.
_FIRST_DELAY = 0.02
# For more files than this at once, a full pass costs less than a partial one.
_MOST_IDS = 50
_FINISHED = flags.CLOSE_WRITE | flags.MOVED_TO
_WATCHED = _FINISHED | flags.MOVE_SELF | flags.DELETE_SELF | flags.ONLYDIR


class Attempt(NamedTuple):
    """How a pass went: whether it was possible, and which images are not finished yet."""

    was_possible: bool
    unfinished: Collection[str] = ()


class Wake(NamedTuple):
    """Why the watch woke up: the ids whose files are finished, or a reason for a full pass."""

    finished: Collection[str] = ()
    needs_full_pass: bool = False


def repeat(
    images_dir: str,
    every: float,
    for_seconds: float | None,
    run_full: Callable[[], Attempt],
    run_partial: Callable[[Collection[str]], Attempt],
) -> None:
    """Run passes until ``for_seconds`` are over, or for ever. All times are in seconds.

    Full passes start on a steady clock, one tick every ``every`` seconds. A pass that takes longer
    delays the next to a later tick. None starts that would end too late if it took as long as the
    last one. In between, a partial pass follows each file that Glance finishes.
    """
    start = time.monotonic()
    end = math.inf if for_seconds is None else start + for_seconds
    retries = Retries(every)
    with contextlib.closing(Watch()) as watch:
        while True:
            # Watch before each full pass: then nothing is missed, whatever happened to the
            # directory.
            watch.renew(images_dir)
            began = time.monotonic()
            retries.run(run_full)
            now = time.monotonic()
            next_tick = start + (int((now - start) / every) + 1) * every
            is_last = next_tick + (now - began) > end
            deadline = end if is_last else next_tick
            _react(watch, retries, deadline, run_full, run_partial)
            if is_last and time.monotonic() >= deadline:
                return


def _react(
    watch: "Watch",
    retries: "Retries",
    deadline: float,
    run_full: Callable[[], Attempt],
    run_partial: Callable[[Collection[str]], Attempt],
) -> None:
    """Run partial passes for what Glance finishes until ``deadline``, or until a full one is due."""
    while (now := time.monotonic()) < deadline:
        wake = watch.wait(min(deadline, retries.next_time()) - now)
        if wake.needs_full_pass:
            return
        retries.add(wake.finished)
        due = retries.list_due()
        if len(due) > _MOST_IDS:
            retries.run(run_full)
        elif due:
            retries.run_for(due, run_partial)


class Retries:
    """Track images whose file is complete but that are not active yet.

    Each has the time of its next query, and the delay after that. A delay of more than ``every``
    seconds is left to the full passes.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._due: dict[str, tuple[float, float]] = {}

    def add(self, image_ids: Collection[str]) -> None:
        """Add images that are due now."""
        now = time.monotonic()
        for image_id in image_ids:
            self._due[image_id] = (now, _FIRST_DELAY)

    def next_time(self) -> float:
        """Return when the next image is due, on the monotonic clock."""
        return min((due for due, _delay in self._due.values()), default=math.inf)

    def list_due(self) -> list[str]:
        """Return the images that are due now."""
        now = time.monotonic()
        return [image_id for image_id, (due, _delay) in self._due.items() if due <= now]

    def run(self, run_full: Callable[[], Attempt]) -> None:
        """Run a full pass, and schedule the images that are still unfinished."""
        delays = self._take(list(self._due))
        self._schedule(delays, run_full())

    def run_for(
        self, image_ids: Collection[str], run_partial: Callable[[Collection[str]], Attempt]
    ) -> None:
        """Run a partial pass, and schedule the images that are still unfinished."""
        delays = self._take(image_ids)
        self._schedule(delays, run_partial(image_ids))

    def _take(self, image_ids: Collection[str]) -> dict[str, float]:
        return {image_id: self._due.pop(image_id)[1] for image_id in image_ids}

    def _schedule(self, delays: Mapping[str, float], attempt: Attempt) -> None:
        now = time.monotonic()
        for image_id, delay in delays.items():
            is_unfinished = not attempt.was_possible or image_id in attempt.unfinished
            if is_unfinished and delay <= self._every:
                self._due[image_id] = (now + delay, 2 * delay)


class Watch:
    """Reports files that were closed after writing, or moved into a directory (inotify(7))."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._number = -1
        self._warning = LogOnChange(LOG, logging.WARNING)

    def renew(self, directory: str) -> None:
        """Watch what ``directory`` is now, and no longer what it was before."""
        try:
            self._inotify = self._inotify or INotify()
            # The number is the same for the same directory, and is never used again for another.
            number = self._inotify.add_watch(directory, _WATCHED)
        except OSError as error:
            self.close()
            self._warning.log(
                f"{directory}: inotify does not work ({error.strerror}), so passes are made by the"
                " clock alone; raise fs.inotify.max_user_instances or max_user_watches"
            )
            return
        self._warning.log(None)
        if number != self._number:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(self._number)
        self._number = number

    def wait(self, seconds: float) -> Wake:
        """Wait at most so many seconds for finished files.

        A full pass is needed if the queue of events overflowed, or if the directory itself was
        moved, removed or unmounted.
        """
        seconds = max(0.0, seconds)
        if self._inotify is None:
            time.sleep(seconds)
            return Wake()
        # The event of an overflow belongs to no watch: its number is -1.
        events = [
            event
            for event in self._inotify.read(timeout=math.ceil(seconds * 1000))
            if event.wd in (self._number, -1)
        ]
        if any(event.mask & ~(_FINISHED | flags.ISDIR) for event in events):
            return Wake(needs_full_pass=True)
        return Wake(finished={event.name for event in events if is_image_id(event.name)})

    def close(self) -> None:
        """End the watch."""
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None
        self._number = -1
