"""Waits for the clock, or until Glance has finished a file."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection

from inotify_simple import INotify, flags

from ln_images.plan import is_image_id

LOG = logging.getLogger(__name__)
# Glance closes a file 10 to 500 ms before the image is active: so many seconds until it is asked
# again, and then twice as many each time.
_FIRST_DELAY = 0.02
# Past this many files at once, a whole pass costs less than asking for each.
_MANY = 50
_FINISHED = flags.CLOSE_WRITE | flags.MOVED_TO
_WANTED = _FINISHED | flags.MOVE_SELF | flags.DELETE_SELF | flags.ONLYDIR
Make = Callable[[Collection[str] | None], Collection[str] | None]


def repeat(store: str, every: float, for_seconds: float | None, make: Make) -> None:
    """Makes passes in the directory ``store`` until ``for_seconds`` are over, or for ever.

    All times are in seconds.

    ``make`` makes a whole pass where it is given None, and one for some image ids otherwise. It
    returns the ids that are not finished yet, or None where there was no pass. Whole ones begin on
    a steady clock: one that is too slow makes the next ones start later, and none begins that would
    end too late, if it takes as long as the last.
    """
    start = time.monotonic()
    end = math.inf if for_seconds is None else start + for_seconds
    pending = _Pending(every, make)
    with contextlib.closing(Watch()) as watch:
        while True:
            # Before each whole pass: whatever happened to the directory, nothing is missed from
            # here on.
            watch.renew(store)
            began = time.monotonic()
            pending.ask_of_all()
            now = time.monotonic()
            beat = start + (int((now - start) / every) + 1) * every
            last = beat + (now - began) > end
            until = end if last else beat
            while (now := time.monotonic()) < until:
                ids = watch.wait(min(until, pending.due_at()) - now)
                if ids is None:
                    break
                pending.add(ids)
                pending.ask()
            if last and now >= end:
                return


class _Pending:
    """The images whose files are closed and that are not active yet.

    When each is asked about next, and how long then.

    Past ``every`` seconds, whatever becomes of one is the affair of whole passes.
    """

    def __init__(self, every: float, make: Make) -> None:
        self._every, self._make = every, make
        self._due: dict[str, tuple[float, float]] = {}

    def add(self, ids: Collection[str]) -> None:
        self._due |= dict.fromkeys(ids, (time.monotonic(), _FIRST_DELAY))

    def due_at(self) -> float:
        return min((at for at, _ in self._due.values()), default=math.inf)

    def ask(self) -> None:
        """Makes a pass for those that are due, if any are."""
        now = time.monotonic()
        ids = [image_id for image_id, (at, _) in self._due.items() if at <= now]
        if ids:
            self._put_off(ids, self._make(ids if len(ids) <= _MANY else None))

    def ask_of_all(self) -> None:
        """Makes a whole pass."""
        self._put_off(list(self._due), self._make(None))

    def _put_off(self, asked: Collection[str], unfinished: Collection[str] | None) -> None:
        now = time.monotonic()
        for image_id in asked:
            _, delay = self._due.pop(image_id)
            if delay <= self._every and (unfinished is None or image_id in unfinished):
                self._due[image_id] = (now + delay, 2 * delay)


class Watch:
    """The kernel's word for files that were closed after writing, or moved into a directory (inotify(7))."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._number = -1
        self._told = ""

    def renew(self, directory: str) -> None:
        """Watches what ``directory`` is now.

        Of what it was, if that is another, nothing more is told.
        """
        try:
            self._inotify = self._inotify or INotify()
            # The number is the same for the same directory, and never used again.
            number = self._inotify.add_watch(directory, _WANTED)
        except OSError as error:
            self.close()
            if self._told != str(error):
                LOG.debug(
                    "no watch on %s: %s: passes are made by the clock alone",
                    directory,
                    error.strerror,
                )
            self._told = str(error)
            return
        if number != self._number:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(self._number)
        self._number, self._told = number, ""

    def wait(self, seconds: float) -> frozenset[str] | None:
        """The image ids whose files are finished, at the first or after ``seconds`` without.

        None for a whole pass.

        That is where the queue overflowed, or the directory itself was moved, removed or unmounted.
        """
        if self._inotify is None:
            time.sleep(max(0, seconds))
            return frozenset()
        # An overflow is of no watch: -1.
        read = self._inotify.read(timeout=math.ceil(max(0, seconds) * 1000))
        events = [event for event in read if event.wd in (self._number, -1)]
        if any(event.mask & ~(_FINISHED | flags.ISDIR) for event in events):
            return None
        return frozenset(event.name for event in events if is_image_id(event.name))

    def close(self) -> None:
        """Ends the watch."""
        if self._inotify is not None:
            self._inotify.close()
        self._inotify, self._number = None, -1
