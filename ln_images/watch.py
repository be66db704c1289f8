"""Waits for the clock, or until Glance has finished a file."""

import logging
import math
import os
import time
from collections.abc import Callable, Collection
from typing import Any

from ln_images.plan import is_image_id

LOG = logging.getLogger(__name__)
# Glance closes a file 10 to 500 ms before the image is active: so many seconds until it is asked again, and then twice
# as many each time.
_FIRST_DELAY = 0.02
# Past this many files at once, a whole pass costs less than asking for each.
_MANY = 50


def repeat(
    store: str,
    every: float,
    for_seconds: float | None,
    make: Callable[[Collection[str] | None], Collection[str] | None],
) -> None:
    """Makes passes in the directory ``store`` until ``for_seconds`` are over, or for ever. All times are in seconds.

    ``make`` makes a whole pass where it is given None, and one for some image ids otherwise. It returns the ids that
    are not finished yet, or None where there was no pass. Whole ones begin on a steady clock: one that is too slow
    makes the next ones start later, and none begins that would end too late, if it takes as long as the last.
    """
    start = time.monotonic()
    end = math.inf if for_seconds is None else start + for_seconds
    pending: frozenset[str] = frozenset()
    watch = Watch()
    try:
        while True:
            # A new watch before each whole pass: whatever happened to the directory, nothing is missed from here on.
            pending |= watch.renew(store)
            began = time.monotonic()
            pending = _left(pending, make(None))
            now = time.monotonic()
            beat = start + (int((now - start) / every) + 1) * every
            last = beat + (now - began) > end
            pending = _until(end if last else beat, watch, pending, every, make)
            if last and time.monotonic() >= end:
                return
    finally:
        watch.close()


def _left(pending: frozenset[str], unfinished: Collection[str] | None) -> frozenset[str]:
    return pending if unfinished is None else pending.intersection(unfinished)


def _until(
    until: float,
    watch: "Watch",
    pending: frozenset[str],
    every: float,
    make: Callable[[Collection[str] | None], Collection[str] | None],
) -> frozenset[str]:
    """Makes passes for what Glance finishes before ``until``; returns what is left.

    Ends early where only a whole pass can tell what happened.
    """
    delay, ask_at = _FIRST_DELAY, time.monotonic()
    while (now := time.monotonic()) < until:
        ids = watch.wait(min(until, ask_at if pending else until) - now)
        if ids is None:
            return pending
        if ids:
            pending |= ids
            delay, ask_at = _FIRST_DELAY, now
        if pending and time.monotonic() >= ask_at:
            pending = _left(pending, make(pending if len(pending) <= _MANY else None))
            ask_at = time.monotonic() + delay
            delay *= 2
            if delay > every:
                # Whatever becomes of these is the next whole pass's affair.
                pending = frozenset()
    return pending


class Watch:
    """The kernel's word for files that were closed after writing, or moved into a directory (inotify(7))."""

    def __init__(self) -> None:
        self._inotify: Any = None
        self._told = ""

    def renew(self, directory: str) -> frozenset[str]:
        """Begins to watch what ``directory`` is now; returns the image ids that were not yet waited for."""
        import inotify_simple

        flags = inotify_simple.flags
        rest = self.wait(0) or frozenset()
        self.close()
        try:
            self._inotify = inotify_simple.INotify()
            wanted = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVE_SELF | flags.DELETE_SELF | flags.ONLYDIR
            self._inotify.add_watch(directory, wanted)
        except OSError as error:
            self.close()
            if self._told != str(error):
                LOG.debug("no watch on %s: %s: passes are made by the clock alone", directory, error.strerror)
                self._told = str(error)
        return rest

    def wait(self, seconds: float) -> frozenset[str] | None:
        """The image ids whose files are finished, at the first or after ``seconds`` without; None for a whole pass.

        That is where the queue overflowed, or the directory itself was moved, removed or unmounted.
        """
        if self._inotify is None:
            time.sleep(max(0, seconds))
            return frozenset()
        import inotify_simple

        flags = inotify_simple.flags
        events = list(self._inotify.read(timeout=math.ceil(max(0, seconds) * 1000)))
        if any(event.mask & ~(flags.CLOSE_WRITE | flags.MOVED_TO | flags.ISDIR) for event in events):
            self.close()
            return None
        return frozenset(os.fsdecode(event.name) for event in events if is_image_id(event.name))

    def close(self) -> None:
        """Ends the watch."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
