"""Scan both directories: which images are linked already, and which bases belong to no image."""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ln_images import rules
from ln_images.model import (
    Base,
    DiskUsage,
    File,
    LinkPolicy,
    Reclaimable,
    Verdict,
    cache_name,
    is_image_id,
)
from ln_images.store import Store

RETIRED_SUFFIX = ".retired"
# Nova's other files (``<sha1>_20``, ``ephemeral_*``, ``swap_*``) have names of other forms.
_BASE_NAME = re.compile(r"([0-9a-f]{40})(\.retired)?")
# A compute node can create any number of names in the cache. We look at so many of those that
# belong to no image in the store.
MOST_BASES = 10_000


class Scan(NamedTuple):
    """What both directories show, without a query to Glance.

    ``settled`` are the ids whose links are as they must be. ``unsettled`` are the others that have
    a name in the store. ``bases`` belong to no image in the store; at most MOST_BASES of them are
    looked at, and ``has_more_bases`` says that there are more. ``broken`` are the entries of the
    cache that could not be looked at, by name.
    """

    settled: Sequence[str]
    unsettled: Sequence[str]
    bases: Sequence[Base]
    has_more_bases: bool
    broken: Mapping[str, Verdict]


def scan(store: Store, policy: LinkPolicy | None) -> Scan:
    """Scan both directories.

    An image is settled if its cache name is on the very inode of its file, with owner, mode and
    marks as they must be. Without a ``policy`` no image is settled. If the store's file system
    lists other inodes than stat(2) returns, no image is settled either, and each is looked at by
    itself.
    """
    inodes = store.list_store()
    ids_by_name = {cache_name(image_id): image_id for image_id in inodes}
    ids_by_inode = defaultdict(list)
    for image_id, inode in inodes.items():
        ids_by_inode[inode].append(image_id)
    settled: list[str] = []
    bases: list[Base] = []
    broken: dict[str, Verdict] = {}
    has_more_bases = False
    for name in store.list_cache():
        match = _BASE_NAME.fullmatch(name)
        if match is None:
            continue
        linked_id = ids_by_name.get(name)
        if linked_id is None and len(bases) >= MOST_BASES:
            has_more_bases = True
            continue
        try:
            entry = store.cache_file(name)
        except OSError as error:
            broken[name] = rules.judge_error(error, is_root=os.geteuid() == 0)
            continue
        if entry is None:
            continue
        if linked_id is None:
            bases += list_base(match[1], bool(match[2]), entry)
        elif policy is not None and _is_settled(
            entry, ids_by_inode[entry.inode], linked_id, policy
        ):
            settled.append(linked_id)
    unsettled = sorted(inodes.keys() - settled)
    return Scan(settled, unsettled, bases, has_more_bases, broken)


def _is_settled(
    entry: File, ids_of_inode: Collection[str], image_id: str, policy: LinkPolicy
) -> bool:
    return image_id in ids_of_inode and rules.is_correct(entry, ids_of_inode, policy)


def list_base(name: str, retired: bool, entry: File) -> list[Base]:
    """Return the base that an entry is, in a list; nothing if it is no regular file."""
    if not stat.S_ISREG(entry.mode):
        return []
    marked_id = entry.marks.image_id if entry.marks else None
    # A mark proves its image id by the name: it may have been written by somebody else.
    is_proved = marked_id is not None and is_image_id(marked_id) and cache_name(marked_id) == name
    return [Base(name, marked_id if is_proved else None, retired, entry)]


def reclaimable(bases: Collection[Base]) -> Reclaimable:
    """Return the disk usage of bases by kind. A base with another name elsewhere frees nothing."""
    sole = [base for base in bases if base.file.links == 1]
    active = [base for base in sole if not base.retired]
    return Reclaimable(
        orphans=_usage([base for base in active if base.image_id is not None]),
        unmarked=_usage([base for base in active if base.image_id is None]),
        retired=_usage([base for base in sole if base.retired]),
    )


def _usage(bases: Collection[Base]) -> DiskUsage:
    return DiskUsage(count=len(bases), bytes=sum(base.file.size for base in bases))
