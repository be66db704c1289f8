"""What each image needs: the whole policy, in pure functions.

A verdict names what should be done, by the outcome it will have when it is done: ``linked`` means
"link it", ``repaired`` "mend it"; every other one means "touch nothing".
"""

import hashlib
import re
import stat
from collections.abc import Iterable, Mapping

from ln_images.model import File, Image, Look, Outcome, Verdict, Wanted

# Glance accepts ids chosen by the user in this form, upper case included, and stores them as they are
# (glance.api.v2.images, oslo_utils.uuidutils.is_uuid_like).
_IMAGE_ID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

IN_FLIGHT = frozenset({"queued", "saving", "uploading", "importing"})

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
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
    return hashlib.sha1(image_id.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


def look(sources: Mapping[int, str], entries: Iterable[tuple[str, File]], wanted: Wanted) -> Look:
    """What the names in the store, by inode, and the entries of the cache tell; each entry is looked at once.

    An id is settled when its cache name is on the very inode of its file, with owner, mode and mark as wanted.
    """
    settled, orphans = [], {}
    for name, entry in entries:
        image_id = sources.get(entry.inode, "")
        if is_image_id(image_id) and cache_name(image_id) == name and _is_right(entry, image_id, wanted):
            settled.append(image_id)
        elif is_orphan(name, entry):
            orphans[entry.mark or ""] = entry
    unsettled = sorted(image_id for image_id in {*sources.values()}.difference(settled) if is_image_id(image_id))
    return Look(settled, unsettled, orphans)


def judge_image(image: Image, wanted: Wanted) -> Verdict | None:
    """Decides by Glance's word alone; None where the disk must be looked at.

    Only ``active`` is a finished image (Glance, "Image Statuses"). A size of 0 is a volume snapshot,
    which has no data.
    """
    if not is_image_id(image.id):
        return Verdict(Outcome.SKIPPED, "not an image id")
    if image.status in IN_FLIGHT:
        return Verdict(Outcome.WAITING, f"status {image.status}")
    if image.status != "active":
        return Verdict(Outcome.SKIPPED, f"status {image.status}")
    if image.disk_format not in wanted.disk_formats:
        return Verdict(Outcome.SKIPPED, f"disk format {image.disk_format or 'unknown'}")
    if not image.size:
        return Verdict(Outcome.SKIPPED, "empty" if image.size == 0 else "Glance gives no size")
    return None


def judge_files(image: Image, source: File | None, entry: File | None, wanted: Wanted) -> Verdict:
    """Decides by what lies in the store (``source``) and in the cache (``entry``).

    ``image`` is one on which :func:`judge_image` left the decision open.
    """
    copying = f"being copied into {image.importing_to}" if image.importing_to else ""
    if source is None:
        return Verdict(Outcome.WAITING, copying) if copying else Verdict(Outcome.SKIPPED, "no file here")
    if not stat.S_ISREG(source.mode):
        return Verdict(Outcome.REFUSED, f"the file is {_KINDS.get(stat.S_IFMT(source.mode), 'not regular')}")
    size = image.size or 0
    if source.size < size:
        return Verdict(Outcome.WAITING, f"{source.size} of {size} bytes are here")
    if source.size > size:
        return Verdict(Outcome.REFUSED, f"the file has {source.size} bytes, Glance says {size}")
    if entry is None:
        return Verdict(Outcome.WAITING, copying) if copying else Verdict(Outcome.LINKED)
    if not entry.same(source):
        return Verdict(Outcome.OCCUPIED, _difference(source, entry))
    return Verdict(Outcome.PRESENT) if _is_right(entry, image.id, wanted) else Verdict(Outcome.REPAIRED)


def is_orphan(name: str, entry: File) -> bool:
    """Whether an entry is a link whose image's file is gone.

    It bears Nova's name for an image, is a regular file with one link left, and has the mark of exactly that
    image. Whatever else lies in the cache is not ours to judge.
    """
    mark = entry.mark
    return entry.links == 1 and mark is not None and is_image_id(mark) and cache_name(mark) == name


def _is_right(entry: File, image_id: str, wanted: Wanted) -> bool:
    return (
        entry.mode == stat.S_IFREG | wanted.mode
        and (entry.uid, entry.gid) == (wanted.uid, wanted.gid)
        and (entry.mark == image_id or not wanted.marks)
    )


def _difference(source: File, entry: File) -> str:
    if not stat.S_ISREG(entry.mode):
        return f"the cache name is {_KINDS.get(stat.S_IFMT(entry.mode), 'not a regular file')}"
    if entry.size != source.size:
        return f"another file has the cache name, and differs: {entry.size} bytes, the image has {source.size}"
    return "another file of the same size has the cache name"
