"""Is what is linked still what was uploaded? Reads each image whole, without the lock, and changes nothing."""

import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from ln_images.disk import Disk, failure
from ln_images.glance import Glance
from ln_images.inspection import can_digest, digest
from ln_images.model import Audit, Image, Options, Outcome, Verdict
from ln_images.plan import judge_image

# Shows how far something of a total size has come: it is told the size of each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def audit(options: Options, glance: Glance, disk: Disk, progress: Progress) -> tuple[Audit, dict[str, Verdict]]:
    """What was read of the images that are linked or would be, and the verdict on each that is not right.

    Raises as :meth:`ln_images.glance.Glance.images` does.
    """
    start = time.monotonic()
    images = [image for image in glance.images() if judge_image(image, options) is None and _is_whole(image, disk)]
    checkable = [image for image in images if can_digest(image.checksum)]
    total = sum(image.size or 0 for image in checkable)
    verdicts = {}
    with progress("Verifying", total) as step:
        for image in checkable:
            verdict = _verify(glance, disk, image, step)
            if verdict is not None:
                verdicts[image.id] = verdict
    return Audit(len(checkable), len(images) - len(checkable), total, time.monotonic() - start), verdicts


def _is_whole(image: Image, disk: Disk) -> bool:
    file = disk.source(image.id)
    return file is not None and stat.S_ISREG(file.mode) and file.size == image.size


def _verify(glance: Glance, disk: Disk, image: Image, step: Callable[[int], None]) -> Verdict | None:
    """Why an image is not what was uploaded. What is damaged reads the same twice, and Glance still has it."""
    algorithm, uploaded = image.checksum
    try:
        with disk.opened(image.id) as source:
            found = uploaded if source is None else digest(source, algorithm, step)
            if source is None or found == uploaded:
                return None
            if digest(source, algorithm, lambda _: None) != found or not os.fstat(source).st_nlink:
                return None
    except OSError as error:
        return failure(error)
    still = glance.images_of([image.id])
    if not any(one.checksum == image.checksum and one.status == "active" for one in still):
        return None
    return Verdict(Outcome.DAMAGED, f"{algorithm} is {found[:8]}..., Glance says {uploaded[:8]}...")
