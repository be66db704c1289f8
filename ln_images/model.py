"""The words of this project: images, files, outcomes and errors. It imports nothing of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """What became of one image, in the order in which reports count them."""

    LINKED = "linked"
    REPAIRED = "repaired"
    PRESENT = "present"
    WAITING = "waiting"
    SKIPPED = "skipped"
    REFUSED = "refused"
    DAMAGED = "damaged"
    OCCUPIED = "occupied"
    FAILED = "failed"
    RESTORED = "restored"
    RETIRED = "retired"
    PRUNED = "pruned"
    KEPT = "kept"


CHANGES = frozenset(
    {Outcome.LINKED, Outcome.REPAIRED, Outcome.RESTORED, Outcome.RETIRED, Outcome.PRUNED}
)
FAULTS = frozenset({Outcome.FAILED, Outcome.DAMAGED})


# Those that can be linked, as Glance calls them.
DISK_FORMATS = ("raw", "iso", "ami", "ari", "aki", "qcow2")


@dataclass(frozen=True, slots=True)
class Image:
    """One image as Glance tells of it. ``size`` is in bytes, and None where Glance gives none.

    ``checksum`` is an algorithm's name and the digest of what was uploaded, or nothing of either.
    ``signed``: its owner wants Nova to verify a signature. ``server`` is the id of the server that
    it is a snapshot of, or "".
    """

    id: str
    name: str = ""
    status: str = ""
    disk_format: str = ""
    size: int | None = None
    importing_to: str = ""
    checksum: tuple[str, str] = ("", "")
    signed: bool = False
    server: str = ""


# The mark of an inode on a file system that cannot bear marks.
UNMARKABLE = ""


class File(NamedTuple):
    """What one name in a directory stands for, never followed.

    Up to ``size`` in the order of ``os.stat_result``. ``mode`` is the whole ``st_mode``, type
    included; ``size`` is in bytes; ``changed`` is the ctime, in seconds since the epoch. ``mark``
    is the image id that this tool left on the inode, and ``marked_size`` the size that the image
    had then, in bytes: both None where there is none.
    """

    mode: int
    inode: int
    device: int
    links: int
    uid: int
    gid: int
    size: int
    changed: float
    mark: str | None = None
    marked_size: int | None = None

    def same(self, other: "File") -> bool:
        """Whether both are names of one inode."""
        return (self.device, self.inode) == (other.device, other.inode)


class Base(NamedTuple):
    """A file in the cache that no image in the store stands behind.

    ``name`` is the SHA-1 under which Nova looks for it, also where it is ``retired`` and has
    another name now. ``image_id`` is "" where its image cannot be known.
    """

    name: str
    image_id: str
    retired: bool
    file: File


class Verdict(NamedTuple):
    """An outcome and, where it is not plain, its reason."""

    outcome: Outcome
    reason: str = ""


class Look(NamedTuple):
    """What the two directories alone tell.

    ``settled`` are the ids that are linked as they should be, and ``unsettled`` the others that
    have a file. ``bases`` are what no image in the store stands behind, ``downloads`` Nova's
    unfinished files, and ``broken`` the entries of the cache that cannot be looked at, with their
    verdicts.
    """

    settled: Sequence[str]
    unsettled: Sequence[str]
    bases: Sequence[Base]
    downloads: Mapping[str, File]
    broken: Mapping[str, Verdict]


class Server(NamedTuple):
    """One server as Nova tells of it.

    ``uses`` are the ids, as spelt there, of its image, kernel and ramdisk.
    """

    id: str
    status: str
    task_state: str
    host: str
    image: str
    uses: frozenset[str]


class Result(NamedTuple):
    """What became of one image, or of one base, whose image may not be known.

    Then it is one without an id.
    """

    image: Image
    cache_name: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass, or a ``narrow`` one for some images alone. ``duration`` is in seconds.

    ``settled`` are the images that the disk alone shows to be linked as they should be: nothing was
    asked about them. ``held`` are, by kind, how many bases no image stands behind and how many
    bytes they hold. ``room`` is the size of the cache's file system and what is free there, in
    bytes, and the free inodes, as an ordinary user has them. ``directory`` is the owner of the
    cache directory, as uid and gid. ``fault`` is why the clean-up could not be made.
    """

    started_at: datetime
    duration: float
    dry_run: bool
    results: Sequence[Result]
    settled: Sequence[str] = ()
    held: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    room: tuple[int, int, int] = (0, 0, 0)
    directory: tuple[int, int] = (0, 0)
    fault: "LnImagesError | None" = None
    audit: "Audit | None" = None
    narrow: bool = False


class Audit(NamedTuple):
    """What ``--verify`` read: images, those without a checksum, and bytes, in how many seconds."""

    images: int
    unverified: int
    size: int
    seconds: float


class LnImagesError(Exception):
    """A fault of the whole pass: one line that names the thing and the mend."""

    exit_status = 1


class ConfigurationError(LnImagesError):
    """The command cannot work as it was told to; trying again does not help."""

    exit_status = 2


class TemporaryError(LnImagesError):
    """The pass could not be made now; a later one may succeed (``EX_TEMPFAIL`` of sysexits.h)."""

    exit_status = 75


class AnotherRunError(TemporaryError):
    """Another run holds the lock."""
