"""What each image needs: the whole policy of linking, in pure functions.

A verdict names what should be done, by the outcome it will have when it is done: ``linked`` means
"link it", ``repaired`` "mend it"; every other one means "touch nothing".
"""

import hashlib
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence

from ln_images.model import UNMARKABLE, Base, File, Image, Look, Outcome, Verdict
from ln_images.options import Options

# Glance accepts ids chosen by the user in this form, upper case included, and stores them as they
# are (glance.api.v2.images, oslo_utils.uuidutils.is_uuid_like).
_IMAGE_ID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# What Nova calls a base, and what this tool calls one that it has set aside. Nova's other files
# (``_20``, ``ephemeral_*``, ``swap_*``) have names of other forms.
_BASE = re.compile(r"([0-9a-f]{40})(\.retired)?")
# Beside a base Nova downloads into the first and converts into the second
# (nova.virt.libvirt.utils.fetch_image, nova.virt.images.fetch_to_raw).
DOWNLOADS = (".part", ".converted")
# How long, in seconds, such a file may rest before it is a leftover of a crash.
_DOWNLOAD_RESTS = 600

# Verdicts that reports and metrics know again.
UNKNOWN = Verdict(Outcome.SKIPPED, "Glance does not know it")
RAW_COPY = Verdict(
    Outcome.OCCUPIED,
    "Nova's raw copy has the cache name: set force_raw_images = False on every node, see docs/recovery.md",
)

IN_FLIGHT = frozenset({"queued", "saving", "uploading", "importing"})

# By the letter that `ls -l` begins a line with.
_KINDS = {
    "l": "a symbolic link",
    "d": "a directory",
    "p": "a FIFO",
    "s": "a socket",
    "c": "a device",
    "b": "a device",
}


def is_image_id(text: str) -> bool:
    """Whether ``text`` has the form of an image id, and so is safe as a file name."""
    return _IMAGE_ID.fullmatch(text) is not None


def cache_name(image_id: str) -> str:
    """The name under which Nova looks for an image in ``_base``.

    It is the SHA-1, in lower-case hex, of the id exactly as Glance stores it (Nova,
    ``nova.virt.libvirt.imagecache.get_cache_fname``). An id that is no valid text, as JSON allows,
    still gets a name, so that it can be reported.
    """
    return hashlib.sha1(
        image_id.encode("utf-8", "surrogatepass"), usedforsecurity=False
    ).hexdigest()


def look(
    sources: Mapping[int, Sequence[str]],
    entries: Iterable[tuple[str, File | Verdict]],
    options: Options,
) -> Look:
    """What the names in the store, by inode, and the entries of the cache tell.

    Each entry is looked at once.

    An entry that cannot be looked at comes with its verdict in place of its file. An id is settled
    when its cache name is on the very inode of its file, with owner, mode, mark and size as they
    must be. Where Glance is asked about every image, and where the inodes in a directory are not
    those of the files, each image is settled by itself.
    """
    store = {name for names in sources.values() for name in names if is_image_id(name)}
    settled: list[str] = []
    bases: list[Base] = []
    downloads: dict[str, File] = {}
    broken: dict[str, Verdict] = {}
    for name, entry in entries:
        if isinstance(entry, Verdict):
            broken[name] = entry
            continue
        names = sources.get(entry.inode, ())
        image_id = next((one for one in names if cache_name(one) == name), None)
        if image_id is not None:
            if not (options.full or options.verify) and _is_right(entry, names, options):
                settled.append(image_id)
        elif (base := _base(name, entry, store, bool(names))) is not None:
            bases.append(base)
        elif name.endswith(DOWNLOADS) and _BASE.fullmatch(name.rpartition(".")[0]):
            downloads[name] = entry
    store.difference_update(settled)
    # With several links, one of them may be an image's whose inode the directory does not give.
    theirs = {cache_name(image_id) for image_id in store}
    bases = [
        base for base in bases if base.file.links == 1 or base.name not in theirs or base.retired
    ]
    return Look(settled, sorted(store), bases, downloads, broken)


def _base(name: str, entry: File, store: Collection[str], has_source: bool) -> Base | None:
    """The base that an entry is, if no image in the store stands behind it."""
    found = _BASE.fullmatch(name)
    if found is None or not stat.S_ISREG(entry.mode):
        return None
    mark = entry.mark or ""
    image_id = mark if is_image_id(mark) and cache_name(mark) == found[1] else ""
    if not found[2] and (image_id in store or (has_source and not image_id)):
        return None
    return Base(found[1], image_id, bool(found[2]), entry)


def judge_image(image: Image, options: Options) -> Verdict | None:
    """Decides by Glance's word alone; None where the disk must be looked at.

    Only ``active`` is a finished image (Glance, "Image Statuses"). A size of 0 is a volume
    snapshot, which has no data. Nova verifies the signature only of what it downloads
    (nova.image.glance).
    """
    if not is_image_id(image.id):
        return Verdict(Outcome.SKIPPED, "not an image id")
    if image.status in IN_FLIGHT:
        return Verdict(Outcome.WAITING, f"status {image.status}")
    reasons = {
        f"status {image.status}": image.status != "active",
        f"disk format {image.disk_format or 'unknown'}": image.disk_format
        not in options.disk_formats,
        "signed: Nova verifies only what it downloads": image.signed,
        "Glance gives no size": image.size is None,
        "empty": image.size == 0,
    }
    return next(
        (Verdict(Outcome.SKIPPED, reason) for reason, holds in reasons.items() if holds), None
    )


def judge_files(image: Image, source: File | None, entry: File | None, options: Options) -> Verdict:
    """Decides by what lies in the store (``source``) and in the cache (``entry``).

    ``image`` is one on which :func:`judge_image` left the decision open.
    """
    copying = f"being copied into {image.importing_to}" if image.importing_to else ""
    if source is None:
        return (
            Verdict(Outcome.WAITING, copying)
            if copying
            else Verdict(Outcome.SKIPPED, "no file here")
        )
    if not stat.S_ISREG(source.mode):
        return Verdict(
            Outcome.REFUSED,
            f"the file is {_KINDS.get(stat.filemode(source.mode)[0], 'not regular')}",
        )
    size = image.size or 0
    if source.size != size and entry is not None and entry.same(source) and not copying:
        return Verdict(
            Outcome.DAMAGED,
            f"the linked file has {source.size} of {size} bytes: see docs/recovery.md",
        )
    if source.size < size:
        return Verdict(Outcome.WAITING, f"{source.size} of {size} bytes are here")
    if source.size > size:
        return Verdict(Outcome.REFUSED, f"the file has {source.size} bytes, Glance says {size}")
    if entry is None:
        return Verdict(Outcome.WAITING, copying) if copying else Verdict(Outcome.LINKED)
    if not entry.same(source):
        return _difference(image, source, entry)
    # One inode may have several names in the store, and then several ids; it bears the mark of one
    # of them.
    ids = (image.id,) if entry.links == 2 or entry.mark is None else (image.id, entry.mark)
    return Verdict(Outcome.PRESENT if _is_right(entry, ids, options) else Outcome.REPAIRED)


def held(bases: Sequence[Base], cleaned: Mapping[Base, Verdict]) -> dict[str, tuple[int, int]]:
    """How many bases, and how many bytes, each kind holds after the pass."""
    held = {"orphans": (0, 0), "unmarked": (0, 0), "retired": (0, 0)}
    for base in bases:
        outcome = cleaned[base].outcome if base in cleaned else Outcome.KEPT
        if outcome is not Outcome.PRUNED:
            retired = outcome is Outcome.RETIRED or (
                base.retired and outcome is not Outcome.RESTORED
            )
            kind = "retired" if retired else "orphans" if base.image_id else "unmarked"
            count, size = held[kind]
            held[kind] = (count + 1, size + base.file.size)
    return held


def is_downloading(file: File, now: float) -> bool:
    """Whether Nova is at work on one of :data:`DOWNLOADS`.

    ``now`` is in seconds since the epoch.
    """
    return abs(now - file.changed) < _DOWNLOAD_RESTS


def _is_right(entry: File, ids: Collection[str], options: Options) -> bool:
    """Whether an entry on an image's inode is as it must be.

    ``ids`` are those of the images on that inode.
    """
    return (
        entry.mode == stat.S_IFREG | options.mode
        and (entry.uid, entry.gid) == options.owner
        and (entry.mark == UNMARKABLE or (entry.mark in ids and entry.marked_size == entry.size))
    )


def _difference(image: Image, source: File, entry: File) -> Verdict:
    if not stat.S_ISREG(entry.mode):
        kind = _KINDS.get(stat.filemode(entry.mode)[0], "not a regular file")
        return Verdict(Outcome.OCCUPIED, f"the cache name is {kind}")
    if entry.mark == image.id:
        name = cache_name(image.id)
        mend = f"in the cache, `mv {name} {name}.retired`, and run again"
        return Verdict(Outcome.FAILED, f"servers get an earlier image of this id: {mend}")
    if entry.size != source.size:
        sizes = f"{entry.size} bytes, the image has {source.size}"
        return Verdict(Outcome.OCCUPIED, f"another file has the cache name, and differs: {sizes}")
    return Verdict(Outcome.OCCUPIED, "another file of the same size has the cache name")
