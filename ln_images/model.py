"""The vocabulary of this project. This module imports nothing of ours.

image       what Glance has; its file is in the *store* (``--images-dir``)
cache       ``--cache-dir``, which the compute nodes mount as Nova's ``_base``
base        a file in the cache under the SHA-1 of an image id (Nova's own word)
link        a base that is a hard link to the image's file
mark        an extended attribute that we leave on an inode that we linked
orphan      a base that we linked and whose image's file is gone
unmarked    a base that we did not link
retired     renamed to ``<sha1>.retired``, waiting to be removed
pass        one run over all images; a *partial* pass is one over some
verdict     what became of an image or base: an outcome, a reason code and a sentence
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import IO, Any, NamedTuple

import click

LOG = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What became of one image or base, in the order in which reports count them."""

    LINKED = "linked"
    REPAIRED = "repaired"
    PRESENT = "present"
    VERIFIED = "verified"
    WAITING = "waiting"
    SKIPPED = "skipped"
    REFUSED = "refused"
    DAMAGED = "damaged"
    OCCUPIED = "occupied"
    RESTORED = "restored"
    RETIRED = "retired"
    PRUNED = "pruned"
    KEPT = "kept"
    LOST = "lost"
    FAILED = "failed"


class Command(StrEnum):
    """The three commands of the storage node."""

    LINK = "ln-images"
    PRUNE = "ln-images-prune"
    VERIFY = "ln-images-verify"


# The outcomes that the results of each command can have.
OUTCOMES: Mapping[Command, Sequence[Outcome]] = {
    Command.LINK: (
        Outcome.LINKED,
        Outcome.REPAIRED,
        Outcome.PRESENT,
        Outcome.WAITING,
        Outcome.SKIPPED,
        Outcome.REFUSED,
        Outcome.DAMAGED,
        Outcome.OCCUPIED,
        Outcome.FAILED,
    ),
    Command.PRUNE: (
        Outcome.RESTORED,
        Outcome.RETIRED,
        Outcome.PRUNED,
        Outcome.KEPT,
        Outcome.LOST,
        Outcome.FAILED,
    ),
    Command.VERIFY: (Outcome.VERIFIED, Outcome.SKIPPED, Outcome.DAMAGED, Outcome.FAILED),
}

CHANGES = frozenset(
    {Outcome.LINKED, Outcome.REPAIRED, Outcome.RESTORED, Outcome.RETIRED, Outcome.PRUNED}
)
FAULTS = frozenset({Outcome.FAILED, Outcome.DAMAGED, Outcome.LOST})


class Reason(StrEnum):
    """Why an image or base has its outcome: a stable code for programs.

    Users' scripts compare these codes. The sentence beside a code is for people and may change.
    """

    # linked, repaired, present
    NO_LINK_YET = "no_link_yet"
    LINK_WAS_REMOVED = "link_was_removed"
    WRONG_ATTRIBUTES = "wrong_attributes"
    CORRECT = "correct"
    # waiting
    NOT_FINISHED = "not_finished"
    BEING_COPIED = "being_copied"
    FILE_INCOMPLETE = "file_incomplete"
    NOVA_IS_DOWNLOADING = "nova_is_downloading"
    # skipped
    NOT_AN_IMAGE_ID = "not_an_image_id"
    STATUS = "status"
    DISK_FORMAT = "disk_format"
    COMPRESSED = "compressed"
    SIGNED = "signed"
    NO_SIZE = "no_size"
    EMPTY = "empty"
    NO_FILE = "no_file"
    UNKNOWN_TO_GLANCE = "unknown_to_glance"
    # refused
    SIGNED_AFTER_LINKING = "signed_after_linking"
    NOT_A_REGULAR_FILE = "not_a_regular_file"
    FILE_TOO_LONG = "file_too_long"
    OTHER_CONTENT = "other_content"
    UNSAFE_CONTENT = "unsafe_content"
    UNCHECKABLE_CONTENT = "uncheckable_content"
    # damaged
    LINKED_FILE_WRONG_SIZE = "linked_file_wrong_size"
    FILE_TOO_SHORT = "file_too_short"
    CHECKSUM_DIFFERS = "checksum_differs"
    # occupied
    OTHER_FILE = "other_file"
    OTHER_KIND_OF_FILE = "other_kind_of_file"
    COPY_OR_EARLIER_IMAGE = "copy_or_earlier_image"
    RAW_COPY = "raw_copy"
    # failed
    SYSTEM_ERROR = "system_error"
    ATTRIBUTES_NOT_KEPT = "attributes_not_kept"
    BUG = "bug"
    # ln-images-verify
    CHECKSUM_MATCHES = "checksum_matches"
    NO_CHECKSUM = "no_checksum"
    CHANGED_MEANWHILE = "changed_meanwhile"
    # ln-images-prune
    TWO_NAMES = "two_names"
    IN_USE = "in_use"
    NAME_TAKEN = "name_taken"
    IMAGE_EXISTS = "image_exists"
    HAS_ANOTHER_NAME = "has_another_name"
    NO_MARKS = "no_marks"
    IMAGE_NOT_KNOWN = "image_not_known"
    BLOCKED = "blocked"
    FIRST_SEEN_UNUSED = "first_seen_unused"
    NOT_UNUSED_LONG_ENOUGH = "not_unused_long_enough"
    WAITING_FOR_REPORTS = "waiting_for_reports"
    UNUSED = "unused"
    UNUSED_WHILE_RETIRED = "unused_while_retired"
    EVIDENCE_TOO_OLD = "evidence_too_old"
    BASE_IS_MISSING = "base_is_missing"


class Verdict(NamedTuple):
    """What became of one image or base. ``sentence`` is None if the outcome says it all."""

    outcome: Outcome
    reason: Reason
    sentence: str | None = None


class Action(StrEnum):
    """What must be done to an image's link."""

    LINK = "link"
    REPAIR = "repair"


class Decision(NamedTuple):
    """A verdict, and the action that must succeed before it is true; None if nothing is to be done.

    If the action fails, the verdict is replaced by one that says why.
    """

    verdict: Verdict
    action: Action | None = None


# The disk formats that can be linked, as Glance calls them.
DISK_FORMATS = ("raw", "iso", "ami", "ari", "aki", "qcow2")

# The statuses of an image whose data is not complete yet (Glance, "Image Statuses").
IN_FLIGHT = frozenset({"queued", "saving", "uploading", "importing"})

# Glance accepts ids chosen by the user in this form, upper case included, and stores them as they
# are (glance.api.v2.images, oslo_utils.uuidutils.is_uuid_like).
_IMAGE_ID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_image_id(text: str) -> bool:
    """Return whether ``text`` has the form of an image id, and so is safe as a file name."""
    return _IMAGE_ID.fullmatch(text) is not None


def cache_name(image_id: str) -> str:
    """Return the name under which Nova looks for an image in ``_base``.

    It is the SHA-1, in lower-case hex, of the id exactly as Glance stores it (Nova,
    ``nova.virt.libvirt.imagecache.get_cache_fname``). An id that is no valid text, as JSON allows,
    still has a name, so that it can be reported.
    """
    encoded = image_id.encode("utf-8", "surrogatepass")
    return hashlib.sha1(encoded, usedforsecurity=False).hexdigest()


class Checksum(NamedTuple):
    """The digest of what was uploaded, in hex, and the algorithm as ``hashlib`` calls it."""

    algorithm: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image as Glance describes it. A field is None if Glance gives no usable value.

    ``size`` is in bytes. ``importing_to`` names the stores that Glance is copying the image to.
    ``signed`` says whether the image's owner wants Nova to verify a signature.
    """

    id: str
    name: str | None = None
    status: str | None = None
    disk_format: str | None = None
    container_format: str | None = None
    size: int | None = None
    importing_to: str | None = None
    checksum: Checksum | None = None
    signed: bool = False


class Owner(NamedTuple):
    """The user and the group of a file, by number."""

    uid: int
    gid: int


class Marks(NamedTuple):
    """The extended attributes that we left on an inode. Each is None if the inode lacks it.

    ``size`` is the size in bytes that the image had when it was marked. ``unused_since`` is the
    time, in seconds since the epoch, since which no report has named the base. ``supported`` is
    False on a file system that cannot keep extended attributes.
    """

    image_id: str | None = None
    size: int | None = None
    unused_since: float | None = None
    supported: bool = True


NO_MARKS = Marks()
MARKS_UNSUPPORTED = Marks(supported=False)


class File(NamedTuple):
    """What one name in a directory stands for. Symbolic links are not followed.

    ``mode`` is the whole ``st_mode``, which includes the type. ``size`` is in bytes. ``changed``
    (ctime) and ``modified`` (mtime) are in seconds since the epoch. ``marks`` is None if they were
    not read: a file in the store has them only once it is open.
    """

    mode: int
    inode: int
    device: int
    links: int
    owner: Owner
    size: int
    changed: float
    modified: float
    marks: Marks | None = None

    def is_same_inode(self, other: "File") -> bool:
        """Return whether both are names of one inode."""
        return (self.device, self.inode) == (other.device, other.inode)


class Facts(NamedTuple):
    """What the two directories have for one image.

    ``source`` is its file in the store, ``entry`` what has its cache name; None if there is none.
    ``is_downloading`` says that Nova is downloading the image. ``entry_is_raw`` says that the entry
    is another regular file than the source, without the magic of qcow2. ``mark_is_shared`` says
    that the entry's mark names another image whose file is the same inode.
    """

    source: File | None
    entry: File | None
    is_downloading: bool = False
    entry_is_raw: bool = False
    mark_is_shared: bool = False


class Base(NamedTuple):
    """A file in the cache that is no link of an image in the store.

    ``name`` is the SHA-1 under which Nova looks for it, even if the base is ``retired`` and has
    another name now. ``image_id`` is None if it cannot be known.
    """

    name: str
    image_id: str | None
    retired: bool
    file: File


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """A number of files and how many bytes they have."""

    count: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaimable:
    """The disk usage of bases that belong to no image in the store."""

    orphans: DiskUsage = field(default_factory=DiskUsage)
    unmarked: DiskUsage = field(default_factory=DiskUsage)
    retired: DiskUsage = field(default_factory=DiskUsage)

    def by_kind(self) -> dict[str, DiskUsage]:
        """Return the disk usage under the name that reports and metrics have for its kind."""
        return {"orphans": self.orphans, "unmarked": self.unmarked, "retired": self.retired}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPolicy:
    """What links must look like, and the disk formats of images that get one.

    ``mode`` holds the permission bits alone.
    """

    owner: Owner
    mode: int
    disk_formats: Sequence[str] = DISK_FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one image, or of one base, whose image may not be known.

    The fields are those of the JSON report. ``size`` is in bytes.
    """

    cache_name: str
    verdict: Verdict
    id: str | None = None
    name: str | None = None
    status: str | None = None
    disk_format: str | None = None
    size: int | None = None

    @classmethod
    def of_image(cls, image: Image, verdict: Verdict) -> "Result":
        """Return the result for an image that Glance described."""
        return cls(
            cache_name=cache_name(image.id),
            verdict=verdict,
            id=image.id,
            name=image.name,
            status=image.status,
            disk_format=image.disk_format,
            size=image.size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one pass of a command found and did. ``duration`` is in seconds.

    ``present`` are the ids of images whose links the disk alone shows to be correct: Glance was not
    queried about them. ``directory_owner`` owns the cache directory. ``error`` says why the pass
    could not do all of its work. ``partial`` says that the pass was over some images only.
    ``lock_seconds`` is how long it held the lock. ``bytes_read`` is how much image content it read;
    None if its command reads none. ``extra`` has the JSON report's fields of one command alone.
    """

    command: Command
    started_at: datetime
    duration: float
    dry_run: bool
    results: Sequence[Result]
    present: Sequence[str] = ()
    reclaimable: Reclaimable = field(default_factory=Reclaimable)
    directory_owner: Owner | None = None
    error: "LnImagesError | None" = None
    partial: bool = False
    lock_seconds: float = 0.0
    bytes_read: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class LnImagesError(click.ClickException):
    """An error of the whole pass, in one line: ``<thing>: <what happened>; <what to do>``.

    click shows it and ends the command with ``exit_code``.
    """

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002
        """Log the error, which prints it on standard error and writes it to the log file."""
        LOG.error("%s", self.message)


class ConfigurationError(LnImagesError):
    """The command cannot work as it is configured; trying again does not help."""

    exit_code = 2


class TemporaryError(LnImagesError):
    """The pass was not possible now; a later one may succeed (``EX_TEMPFAIL`` of sysexits.h)."""

    exit_code = 75


class AnotherRunError(TemporaryError):
    """Another run holds the lock."""


class AnswerTooLargeError(TemporaryError):
    """A service sent a larger response than we read."""
