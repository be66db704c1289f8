"""Bases as ln-images, Nova and deleted images leave them, and reports of compute nodes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ln_images.glance import Glance
from ln_images.model import cache_name
from ln_images.store import IMAGE_ID_MARK, SIZE_MARK, UNUSED_SINCE_MARK
from support.node import OWNER


def make_base(
    cache: Path,
    image_id: str,
    data: bytes = b"base",
    *,
    marked: bool = True,
    retired: bool = False,
    unused_since: float | None = None,
) -> Path:
    """Make what is left of an image that was linked and deleted.

    One that is not ``marked`` is what Nova downloads. Return its path.
    """
    base = cache / (cache_name(image_id) + (".retired" if retired else ""))
    base.write_bytes(data)
    os.chown(base, *OWNER)
    base.chmod(0o644)
    if marked:
        os.setxattr(base, IMAGE_ID_MARK, image_id.encode())
        os.setxattr(base, SIZE_MARK, str(len(data)).encode())
    if unused_since is not None:
        os.setxattr(base, UNUSED_SINCE_MARK, f"{unused_since:.6f}".encode())
    return base


def report_document(host: str, /, *bases: str, **changes: Any) -> dict[str, Any]:
    """Return a complete report, begun now, of a host whose disks use ``bases``."""
    document = {
        "version": 1,
        "tool_version": "1.0.0",
        "host": host,
        "machine": None,
        "time": time.time(),
        "complete": True,
        "incomplete_because": None,
        "bases": sorted(bases),
        "recent": {},
        "lost": [],
        "servers": len(bases),
        "checks": [{"name": "disks", "state": "ok", "found": "all were read", "fix": ""}],
    }
    return document | changes


def write_report(
    directory: Path, host: str, /, *bases: str, age: float = 0, **changes: Any
) -> Path:
    """Write a report in one step, as ln-images-node does. Return its path.

    With ``age``, in seconds, the report and its file are so old, except for the file's ctime.
    """
    directory.mkdir(exist_ok=True)
    path = directory / f"{host}.json"
    temporary = directory / f".{host}.json.1f2e3d4c"
    changes = {"time": time.time() - age} | changes
    temporary.write_text(json.dumps(report_document(host, *bases, **changes)))
    if age:
        os.utime(temporary, (changes["time"], changes["time"]))
    temporary.rename(path)
    return path


class OneImageGlance(Glance):
    """Glance as the clean-up queries it about one image more: ``has_image`` is plain data."""

    def __init__(self, has_image: Callable[[str], bool]) -> None:
        self._has_image = has_image

    def has_image(self, image_id: str) -> bool:
        """Return what the test says."""
        return self._has_image(image_id)
