"""Is what is linked still what was uploaded? Reads each image whole, without the lock, and changes nothing."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ln_images.disk import Disk, failure
from ln_images.glance import Glance
from ln_images.inspection import can_digest, digest
from ln_images.model import Audit, Image, Outcome, Verdict
from ln_images.options import Options
from ln_images.plan import judge_image

# What has a link, or gets one.
_LINKS = frozenset({Outcome.LINKED, Outcome.REPAIRED, Outcome.PRESENT})
# Makes click's progress bar for something of a total size.
Progress = Callable[[str, int], Any]


def audit(
    options: Options, glance: Glance, disk: Disk, progress: Progress
) -> tuple[Audit, dict[str, Verdict]]:
    """What was read of the images that are linked or would be, and the verdict on each that is not right.

    Raises as :meth:`ln_images.glance.Glance.images` does.
    """
    start = time.monotonic()
    rehearsal = replace(options, dry_run=True)
    asked = [image for image in glance.images().values() if judge_image(image, options) is None]
    images = [image for image in asked if disk.settle(image, rehearsal).outcome in _LINKS]
    checkable = [image for image in images if can_digest(image.checksum)]
    total = sum(image.size or 0 for image in checkable)
    with progress("Verifying", total) as bar:
        verdicts = {
            image.id: verdict
            for image in checkable
            if (verdict := _verify(glance, disk, image, bar.update))
        }
    return Audit(
        len(checkable), len(images) - len(checkable), total, time.monotonic() - start
    ), verdicts


def _verify(
    glance: Glance, disk: Disk, image: Image, step: Callable[[int], None]
) -> Verdict | None:
    """Why an image is not what was uploaded.

    What is damaged reads the same twice, and is still the image's.
    """
    algorithm, uploaded = image.checksum
    try:
        with disk.opened(image.id) as source:
            found = digest(source, algorithm, step)
            if found == uploaded:
                return None
            again, now = digest(source, algorithm, lambda _: None), disk.source(image.id)
            if again != found or now is None or now.inode != os.fstat(source).st_ino:
                return None
    except FileNotFoundError:
        return None
    except OSError as error:
        return failure(error)
    still = glance.images_of([image.id]).get(image.id)
    if still is None or still.checksum != image.checksum or still.status != "active":
        return None
    return Verdict(
        Outcome.DAMAGED,
        f"{algorithm} is {found[:8]}..., Glance says {uploaded[:8]}...: see docs/recovery.md",
    )
