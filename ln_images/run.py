"""One pass: look, ask, settle image by image, and clean up."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ln_images import plan, prune
from ln_images.disk import Disk
from ln_images.glance import Glance
from ln_images.keystone import Connection
from ln_images.model import CHANGES, Evidence, Image, Outcome, Pass, Result, Wanted

LOG = logging.getLogger(__name__)
# Past this many ids, asking for them in groups costs more than listing every image.
LISTING_PAYS = 500


@dataclass(frozen=True)
class Job:
    """What a pass works with. ``prune_after`` is in seconds, and None where nothing is to be pruned.

    ``watch`` gives the images back one by one, and may show how far it has come.
    """

    connection: Connection
    glance: Glance
    disk: Disk
    wanted: Wanted
    full: bool
    dry_run: bool
    prune_after: float | None
    instances_dirs: tuple[str, ...]
    uninterrupted: Callable[[], Any]
    watch: Callable[[list[Image]], AbstractContextManager[Iterable[Image]]] = contextlib.nullcontext


def run_pass(job: Job) -> Pass:
    """Makes one pass. Raises where it could not be made: nothing on disk is touched before the list is whole.

    It looks before it asks, so that what is known of the disk is never newer than Glance's word for it.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    # A dry run changes nothing, so it neither waits for a run at work nor makes the next one fail.
    with contextlib.nullcontext() if job.dry_run else job.disk.locked():
        look = plan.look(job.disk.sources(), job.disk.entries(), job.wanted)
        settled = () if job.full else look.settled
        known = frozenset(settled)
        asked = job.glance.images(None if job.full or len(look.unsettled) > LISTING_PAYS else look.unsettled)
        with job.watch([image for image in asked if image.id not in known]) as images:
            results = [_settle(job, image) for image in images]
    # Without the lock, since asking Nova takes its time: nothing links an orphan's name, and what is removed is
    # first looked at again.
    fault = None
    if job.prune_after is not None:
        pruned, fault = prune.prune(job, look.orphans, Evidence(started_at.timestamp(), job.prune_after))
        results += [_logged(job, result) for result in pruned]
    return Pass(
        started_at=started_at,
        duration=time.monotonic() - start,
        dry_run=job.dry_run,
        results=tuple(results),
        room=job.disk.room(),
        settled=settled,
        orphans=look.orphans,
        fault=fault,
    )


def _settle(job: Job, image: Image) -> Result:
    with uninterrupted():
        verdict = plan.judge_image(image, job.wanted) or job.disk.settle(image, job.wanted, job.dry_run)
        return _logged(job, Result(image, verdict))


def _logged(job: Job, result: Result) -> Result:
    """Logs what was changed or failed, and nothing of what stands: that would be every image, every 10 seconds."""
    image, verdict = result.image, result.verdict
    what = f"{image.id}{image.name and f' ({image.name})'} as {plan.cache_name(image.id)}"
    if verdict.outcome is Outcome.FAILED:
        LOG.error("failed: %s: %s", what, verdict.reason)
    elif verdict.outcome in CHANGES and not job.dry_run:
        LOG.info("%s: %s%s", verdict.outcome, what, verdict.reason and f": {verdict.reason}")
    return result


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back, so that a run stops between images."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
