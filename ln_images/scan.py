"""Scan both directories: which images are linked already, and which bases belong to no image."""

import contextlib
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from ln_images.system_errors import judge_system_error

RETIRED_SUFFIX = ".retired"
# Nova's other files (``<sha1>_20``, ``ephemeral_*``, ``swap_*``) have names of other forms.
_BASE_NAME = re.compile(r"[0-9a-f]{40}(\.retired)?")
# A compute node can create any number of names in the cache. Of those that belong to no image in
# the store we list so many, and we read so many bases among them.
MOST_FOREIGN_NAMES = 100_000
MOST_BASES = 10_000


class Scan(NamedTuple):
    """What both directories show, without a query to Glance.

    ``present`` are the ids of the images whose links are as they must be. ``to_check`` are the
    other ids that have a name in the store. ``bases`` belong to no image in the store.
    ``has_more_bases`` says that the cache has more names than we read. ``broken`` are the entries
    of the cache that belong to no image in the store and that could not be read, by name.
    """

    present: Sequence[str]
    to_check: Sequence[str]
    bases: Sequence[Base]
    has_more_bases: bool
    broken: Mapping[str, Verdict]

    @property
    def ids_in_store(self) -> set[str]:
        """Return all ids that have a name in the store."""
        return {*self.present, *self.to_check}


def scan(store: Store, policy: LinkPolicy | None) -> Scan:
    """Scan both directories.

    The link of an image is as it must be if the cache name is on the very inode of its file, with
    the owner, mode and marks of ``policy``. Without a policy every image in the store is to be
    checked. The same holds if the store's file system lists other inodes than stat(2) returns.

    Raises LnImagesError if a directory cannot be listed, or its file system stops responding.
    """
    inodes = store.list_store()
    limit = len(inodes) + MOST_FOREIGN_NAMES
    names = set(store.list_cache(limit))
    is_cut_off = len(names) >= limit
    ids_by_name = {cache_name(image_id): image_id for image_id in inodes}
    present: set[str] = set()
    if policy is not None:
        # A name that is not in a list that was cut off may be there all the same.
        listed = ids_by_name if is_cut_off else ids_by_name.keys() & names
        present = _find_present(store, policy, inodes, {name: ids_by_name[name] for name in listed})
    foreign = sorted(name for name in names - ids_by_name.keys() if _BASE_NAME.fullmatch(name))
    bases, broken = _read_bases(store, foreign[:MOST_BASES])
    return Scan(
        present=sorted(present),
        to_check=sorted(inodes.keys() - present),
        bases=bases,
        has_more_bases=is_cut_off or len(foreign) > MOST_BASES,
        broken=broken,
    )


def _find_present(
    store: Store, policy: LinkPolicy, inodes: Mapping[str, int], ids_by_name: Mapping[str, str]
) -> set[str]:
    """Return the ids of the images whose link is as it must be.

    ``inodes`` has the inode of each image in the store. ``ids_by_name`` has the images to check, by
    cache name.
    """
    ids_by_inode = defaultdict(list)
    for image_id, inode in inodes.items():
        ids_by_inode[inode].append(image_id)
    present = set()
    for name, image_id in ids_by_name.items():
        # An entry that cannot be read is the image's own failure, when it is checked.
        with contextlib.suppress(OSError):
            entry = store.cache_file(name)
            if entry is None:
                continue
            ids_of_inode = ids_by_inode[entry.inode]
            if image_id in ids_of_inode and rules.is_correct(entry, ids_of_inode, policy):
                present.add(image_id)
    return present


def _read_bases(store: Store, names: Iterable[str]) -> tuple[Sequence[Base], Mapping[str, Verdict]]:
    """Return the bases that have these names, and the verdicts on those that are broken."""
    bases: list[Base] = []
    broken: dict[str, Verdict] = {}
    for name in names:
        try:
            entry = store.cache_file(name)
        except OSError as error:
            broken[name] = judge_system_error(error, store)
        else:
            # Nova makes regular files only.
            if entry is not None and stat.S_ISREG(entry.mode):
                bases.append(base_of(name, entry))
    return bases, broken


def base_of(name: str, entry: File) -> Base:
    """Return the base that a regular file with a base's name is."""
    original_name = name.removesuffix(RETIRED_SUFFIX)
    marked_id = entry.marks.image_id if entry.marks else None
    # Somebody else may have written the mark. It is true if the id in it gives the base's name.
    is_proved = (
        marked_id is not None and is_image_id(marked_id) and cache_name(marked_id) == original_name
    )
    return Base(
        name=original_name,
        image_id=marked_id if is_proved else None,
        retired=name != original_name,
        file=entry,
    )


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
