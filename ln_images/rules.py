"""Every rule of linking: when an image is linked, repaired, or left alone, and why.

The functions here are pure: they decide from facts and do nothing. :func:`decide` is the ladder.
Its order is the policy:

1. What Glance says about the image: only a finished image of a format that we link goes on.
2. The image's own file: it must be a regular file of exactly the size that Glance states.
3. Another file has the image's cache name: we never touch that file.
4. The image's own file has the cache name: the link is there, and at most its attributes are
   repaired.
5. The cache name is free: the image is linked, unless Glance is still copying it to this store, or
   Nova is downloading it (``is_fresh_download`` in ``store.py``).

The content of the file is inspected after that, because it is the most expensive rule. See
``inspection.py`` and the story of one image in ``sync.py``.
"""

import errno
import stat
from collections.abc import Collection

from ln_images.model import (
    IN_FLIGHT,
    Action,
    Decision,
    Facts,
    File,
    Image,
    LinkPolicy,
    Outcome,
    Reason,
    Verdict,
    is_image_id,
)

# A file that has not changed for this long, in seconds, is not being written any more.
QUIET_SECONDS = 3600

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def decide(image: Image, facts: Facts, policy: LinkPolicy, now: float) -> Decision:
    """Decide what happens to one image. ``now`` is in seconds since the epoch.

    The comments have the numbers of the rules at the top of this module.
    """
    source, entry = facts.source, facts.entry
    is_linked = source is not None and entry is not None and entry.is_same_inode(source)

    # 1. What Glance says about the image.
    verdict = judge_image(image, policy)
    if verdict is not None:
        if verdict.reason is Reason.SIGNED and is_linked:
            verdict = _judge_signed_link(image)
        return Decision(verdict)

    # 2. The image's own file.
    if source is None:
        return Decision(_judge_missing_file(image))
    verdict = _judge_file(image, source, is_linked, now)
    if verdict is not None:
        return Decision(verdict)

    # 3. Another file has the cache name.
    if entry is not None and not is_linked:
        return Decision(_judge_other_file(image, source, entry, facts.entry_is_raw))

    # 4. The link is there.
    if entry is not None:
        return _decide_on_link(image, entry, facts.mark_is_shared, policy)

    # 5. The cache name is free.
    if _is_being_copied(image, source, now):
        return Decision(_judge_copy(image))
    if facts.is_downloading:
        return Decision(
            Verdict(Outcome.WAITING, Reason.NOVA_IS_DOWNLOADING, "Nova is downloading it")
        )
    return Decision(_judge_new_link(image, source), Action.LINK)


def judge_image(image: Image, policy: LinkPolicy) -> Verdict | None:
    """Return why what Glance says rules out a link, or None if the files decide.

    Only ``active`` is a finished image (Glance, "Image Statuses"). An image of size 0 is a volume
    snapshot, which has no data.
    """
    if not is_image_id(image.id):
        return _skip(Reason.NOT_AN_IMAGE_ID, "its id does not have the form of an image id")
    if image.status in IN_FLIGHT:
        return Verdict(Outcome.WAITING, Reason.NOT_FINISHED, f"status {image.status}")
    if image.status != "active":
        return _skip(Reason.STATUS, f"status {image.status or 'unknown'}")
    if image.disk_format not in policy.disk_formats:
        return _skip(Reason.DISK_FORMAT, f"disk format {image.disk_format or 'unknown'}")
    if image.container_format == "compressed":
        # Nova decompresses what it downloads (nova.virt.images), but not what it finds.
        return _skip(Reason.COMPRESSED, "container format compressed; no hypervisor boots it")
    if image.signed:
        # Nova verifies the signature only of what it downloads (nova.image.glance).
        return _skip(Reason.SIGNED, "signed; Nova verifies only images that it downloads")
    if image.size is None:
        return _skip(Reason.NO_SIZE, "Glance states no size")
    if image.size == 0:
        return _skip(Reason.EMPTY, "empty; a volume snapshot has no data")
    return None


def is_correct(entry: File, image_ids: Collection[str], policy: LinkPolicy) -> bool:
    """Return whether a link has the attributes that it must have.

    ``image_ids`` are those of the images whose file is this inode. There can be several, and the
    mark must name one of them.
    """
    if entry.mode != stat.S_IFREG | policy.mode or entry.owner != policy.owner:
        return False
    marks = entry.marks
    if marks is None or not marks.supported:
        return True
    return marks.image_id in image_ids and marks.size == entry.size and marks.unused_since is None


def judge_error(error: OSError, is_root: bool) -> Verdict:
    """Return the verdict for one image or entry with which a system call failed."""
    sentence = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES):
        if is_root:
            sentence += (
                "; root is refused, so look for root_squash on an NFS mount, for a FUSE file system"
                " that refuses a change of owner, or for an immutable file (`lsattr`)"
            )
        else:
            sentence += "; run the command as root"
    elif error.errno == errno.EINVAL:
        sentence += (
            "; look at the NFSv4 id mapping, because the server may not know the owner (use numbers"
            " and nfs4_disable_idmapping)"
        )
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        sentence += "; free space or inodes on the file system of the store"
    elif error.errno in (errno.EIO, errno.EROFS, errno.EUCLEAN):
        sentence += "; look at the kernel's log, and check the file system"
    elif error.errno == errno.EMLINK:
        sentence += "; the file has as many names as its file system can count"
    return Verdict(Outcome.FAILED, Reason.SYSTEM_ERROR, sentence)


def _judge_signed_link(image: Image) -> Verdict:
    """Return the verdict on an image that was signed after it was linked."""
    return Verdict(
        Outcome.REFUSED,
        Reason.SIGNED_AFTER_LINKING,
        "it was signed after it was linked, and Nova does not verify the link; ask its owner"
        f" to remove the signature from {image.id}, or to upload a new image",
    )


def _judge_missing_file(image: Image) -> Verdict:
    """Return what it means that the image has no file in this store."""
    if image.importing_to is not None:
        return _judge_copy(image)
    return _skip(Reason.NO_FILE, "no file in this store")


def _judge_file(image: Image, source: File, is_linked: bool, now: float) -> Verdict | None:
    """Return why the image's own file rules out a link, or None if it is complete."""
    if not stat.S_ISREG(source.mode):
        return Verdict(Outcome.REFUSED, Reason.NOT_A_REGULAR_FILE, f"the file is {_kind(source)}")
    if source.size == image.size:
        return None
    sizes = f"{source.size} of {image.size} bytes"
    if is_linked and not _is_being_copied(image, source, now):
        # The file was complete when it was linked, so even a copy that was interrupted is damage.
        return Verdict(
            Outcome.DAMAGED,
            Reason.LINKED_FILE_WRONG_SIZE,
            f"the linked file has {sizes}; follow docs/recovery.md",
        )
    if image.size is not None and source.size > image.size:
        return Verdict(
            Outcome.REFUSED,
            Reason.FILE_TOO_LONG,
            f"the file has {source.size} bytes, Glance states {image.size}; upload it"
            " again as a new image",
        )
    # An interrupted copy leaves a short file behind, too. That is no damage, because another store
    # has the whole image.
    if _is_quiet(source, now) and image.importing_to is None:
        return Verdict(
            Outcome.DAMAGED,
            Reason.FILE_TOO_SHORT,
            f"the file has {sizes} and has not grown for an hour; follow docs/recovery.md",
        )
    return Verdict(Outcome.WAITING, Reason.FILE_INCOMPLETE, f"the file has {sizes}")


def _judge_other_file(image: Image, source: File, entry: File, entry_is_raw: bool) -> Verdict:
    """Return what it means that another file has the image's cache name."""
    if not stat.S_ISREG(entry.mode):
        return Verdict(
            Outcome.OCCUPIED,
            Reason.OTHER_KIND_OF_FILE,
            f"{_kind(entry)} has the cache name",
        )
    if entry.marks is not None and entry.marks.image_id == image.id:
        return Verdict(
            Outcome.OCCUPIED,
            Reason.COPY_OR_EARLIER_IMAGE,
            "a file that was linked for this id earlier has the cache name: a copy of it (a restore"
            " or a move without hard links) or an earlier image of the same id; servers may use it;"
            " follow docs/recovery.md",
        )
    if image.disk_format == "qcow2" and entry_is_raw:
        return Verdict(
            Outcome.OCCUPIED,
            Reason.RAW_COPY,
            "Nova's raw copy has the cache name; set force_raw_images = False on every compute"
            " node, then follow docs/recovery.md",
        )
    if entry.size == source.size:
        sentence = "another file of the same size has the cache name"
    else:
        sentence = (
            f"another file has the cache name; it has {entry.size} bytes, the image {source.size}"
        )
    return Verdict(Outcome.OCCUPIED, Reason.OTHER_FILE, sentence)


def _decide_on_link(
    image: Image, entry: File, mark_is_shared: bool, policy: LinkPolicy
) -> Decision:
    """Decide about a link that exists: its attributes may need repair."""
    image_ids = [image.id]
    if mark_is_shared and entry.marks is not None and entry.marks.image_id is not None:
        image_ids.append(entry.marks.image_id)
    if is_correct(entry, image_ids, policy):
        return Decision(Verdict(Outcome.PRESENT, Reason.CORRECT))
    return Decision(Verdict(Outcome.REPAIRED, Reason.WRONG_ATTRIBUTES), Action.REPAIR)


def _judge_new_link(image: Image, source: File) -> Verdict:
    """Return the verdict for an image that gets a link, once it has it.

    If the file has our mark for this image, it had a link before, and somebody removed it. Only an
    open file has its marks, so the first decision about an image never sees that.
    """
    if source.marks is not None and source.marks.image_id == image.id:
        return Verdict(
            Outcome.LINKED,
            Reason.LINK_WAS_REMOVED,
            "the file has our mark, but its link was missing: something removed it, or the store"
            " was restored without the cache; if this repeats, set remove_unused_base_images ="
            " False on every compute node",
        )
    return Verdict(Outcome.LINKED, Reason.NO_LINK_YET)


def _judge_copy(image: Image) -> Verdict:
    """Return the verdict on an image that Glance is copying."""
    return Verdict(
        Outcome.WAITING,
        Reason.BEING_COPIED,
        f"Glance is copying it to the store {image.importing_to}",
    )


def _skip(reason: Reason, sentence: str) -> Verdict:
    return Verdict(Outcome.SKIPPED, reason, sentence)


def _is_being_copied(image: Image, file: File, now: float) -> bool:
    """Return whether Glance is copying an image to a store, which may be this one.

    An interrupted copy leaves ``os_glance_importing_to_stores`` behind for ever (Glance,
    LP#1884596), so a file that nobody writes to shows that the copy is over.
    """
    return image.importing_to is not None and not _is_quiet(file, now)


def _is_quiet(file: File, now: float) -> bool:
    """Return whether nobody has written to a file for an hour.

    A time that is an hour or more in the future is not that of a recent write either.
    """
    return abs(now - file.modified) >= QUIET_SECONDS


def _kind(file: File) -> str:
    return _KINDS.get(stat.S_IFMT(file.mode), "not a regular file")
