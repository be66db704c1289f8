"""Repeat passes by the clock, and at once when Glance has finished a file (``--every``)."""

import contextlib
import errno
import logging
import math
import time
from collections.abc import Collection
from typing import NamedTuple, Protocol

from inotify_simple import INotify, flags

from ln_images.memory import LogOnChange
from ln_images.model import is_image_id

LOG = logging.getLogger(__name__)

# Glance closes a file 10 to 500 ms before the image is active. So many seconds after that we query
# it, and then after twice as many each time.
_FIRST_DELAY = 0.02
# For more files than this at once, a full pass costs less than a partial one.
_MOST_IDS = 50
# Python handles a signal that arrived directly before a system call only when that call returns. So
# no wait takes more seconds than this. A SIGTERM could have no effect until the next full pass.
_LONGEST_WAIT = 1.0
_FINISHED = flags.CLOSE_WRITE | flags.MOVED_TO
_WATCHED = _FINISHED | flags.MOVE_SELF | flags.DELETE_SELF | flags.ONLYDIR
# The limits of inotify(7), by the error that says that one of them is reached.
_LIMITS = {
    errno.EMFILE: "fs.inotify.max_user_instances",
    errno.ENOSPC: "fs.inotify.max_user_watches",
}


class Attempt(NamedTuple):
    """How a pass went: whether it was possible, and which images may be finished soon."""

    was_possible: bool
    unfinished: Collection[str] = ()


class Passes(Protocol):
    """What is repeated. An exception ends the repetition."""

    def run_full(self) -> Attempt:
        """Run a pass over all images."""

    def run_partial(self, image_ids: Collection[str]) -> Attempt:
        """Run a pass over some images."""


def repeat(passes: Passes, images_dir: str, every: float, for_seconds: float | None) -> None:
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
            retries.reschedule(passes.run_full(), retries.list_all())
            now = time.monotonic()
            next_tick = start + (int((now - start) / every) + 1) * every
            is_last = next_tick + (now - began) > end
            deadline = end if is_last else next_tick
            _react(passes, watch, retries, deadline)
            if is_last and time.monotonic() >= deadline:
                return


def _react(passes: Passes, watch: "Watch", retries: "Retries", deadline: float) -> None:
    """Run partial passes for what Glance finishes until ``deadline``, or a full one is due."""
    while (now := time.monotonic()) < deadline:
        wake = watch.wait(min(deadline, retries.next_time()) - now)
        if wake.needs_full_pass:
            return
        retries.add(wake.finished)
        due = retries.list_due()
        if len(due) > _MOST_IDS:
            retries.reschedule(passes.run_full(), retries.list_all())
        elif due:
            retries.reschedule(passes.run_partial(due), due)


class Retries:
    """Track images whose file is complete but that are not active yet.

    Each has the time of its next query, and the delay after that. A delay of more than ``every``
    seconds is left to the full passes.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._schedule: dict[str, tuple[float, float]] = {}

    def add(self, image_ids: Collection[str]) -> None:
        """Add images that are due now."""
        now = time.monotonic()
        for image_id in image_ids:
            self._schedule[image_id] = (now, _FIRST_DELAY)

    def next_time(self) -> float:
        """Return when the next image is due, on the monotonic clock."""
        return min((time_ for time_, _delay in self._schedule.values()), default=math.inf)

    def list_all(self) -> list[str]:
        """Return all images that are tracked."""
        return list(self._schedule)

    def list_due(self) -> list[str]:
        """Return the images that are due now."""
        now = time.monotonic()
        return [image_id for image_id, (time_, _delay) in self._schedule.items() if time_ <= now]

    def reschedule(self, attempt: Attempt, image_ids: Collection[str]) -> None:
        """Schedule those of ``image_ids`` again that a pass has not finished; forget the others."""
        now = time.monotonic()
        for image_id in image_ids:
            _time, delay = self._schedule.pop(image_id)
            is_unfinished = not attempt.was_possible or image_id in attempt.unfinished
            if is_unfinished and delay <= self._every:
                self._schedule[image_id] = (now + delay, 2 * delay)


class Wake(NamedTuple):
    """Why the watch woke up: the ids whose files are finished, or a reason for a full pass."""

    finished: Collection[str] = ()
    needs_full_pass: bool = False


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
        except (FileNotFoundError, NotADirectoryError):
            # The full pass that follows reports it.
            self.close()
            return
        except OSError as error:
            self.close()
            self._warning.log(
                f"{directory}: inotify does not work ({error.strerror}), so images are linked by"
                f" the clock alone; raise {_LIMITS.get(error.errno or 0, 'the limits of inotify')}"
            )
            return
        self._warning.log(None)
        if number != self._number:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(self._number)
        self._number = number

    def wait(self, seconds: float) -> Wake:
        """Wait at most so many seconds for finished files, and never longer than one second.

        A full pass is needed if the queue of events overflowed, or if the directory itself was
        moved, removed or unmounted.
        """
        seconds = max(0.0, min(seconds, _LONGEST_WAIT))
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
