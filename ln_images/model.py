"""The words of this project: images, files, outcomes and errors. It imports nothing of ours."""

from collections.abc import Iterable, Mapping, Sequence
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
    OCCUPIED = "occupied"
    FAILED = "failed"
    PRUNED = "pruned"
    KEPT = "kept"


CHANGES = frozenset({Outcome.LINKED, Outcome.REPAIRED, Outcome.PRUNED})


@dataclass(frozen=True, slots=True)
class Image:
    """One image as Glance tells of it. ``size`` is in bytes, and None where Glance gives none."""

    id: str
    name: str
    status: str
    disk_format: str
    size: int | None
    importing_to: str = ""


class File(NamedTuple):
    """What one name in a directory stands for, never followed.

    ``mode`` is the whole ``st_mode``, type included; ``size`` is in bytes; ``changed`` is the ctime, in
    seconds since the epoch; ``mark`` is the image id that this tool left on the inode, or None.
    """

    device: int
    inode: int
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    changed: float
    mark: str | None = None

    def same(self, other: "File") -> bool:
        """Whether both are names of one inode."""
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass(frozen=True, slots=True)
class Look:
    """What the two directories alone tell.

    ``settled`` are the ids that are linked as they should be, ``unsettled`` the others that have a file, and
    ``orphans`` the links whose image's file is gone, by image id.
    """

    settled: Sequence[str]
    unsettled: Sequence[str]
    orphans: Mapping[str, File]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a link must be, and which disk formats get one. ``marks``: whether inodes can bear marks here."""

    uid: int
    gid: int
    mode: int
    disk_formats: frozenset[str]
    marks: bool


@dataclass(frozen=True, slots=True)
class Server:
    """One server as Nova tells of it. ``uses`` are the ids, in lower case, of its image, kernel and ramdisk."""

    id: str
    status: str
    task_state: str
    uses: frozenset[str]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known so far that could keep an orphan.

    ``now`` and ``prune_after`` are in seconds. ``images`` has Glance's status of each id it knows.
    ``backed`` has the path of an instance disk by the cache name that it is backed by, and ``unreadable``
    the path of one whose backing file cannot be told, or nothing.
    """

    now: float
    prune_after: float
    images: Mapping[str, str] = field(default_factory=dict)
    servers: Sequence[Server] = ()
    backed: Mapping[str, str] = field(default_factory=dict)
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome and, where it is not plain, its reason."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one image in a pass."""

    image: Image
    verdict: Verdict


class Room(NamedTuple):
    """The room on the cache's file system, in bytes and inodes, as an ordinary user has it."""

    size: int
    free: int
    free_inodes: int


@dataclass(frozen=True, slots=True)
class Pass:
    """One whole pass. ``duration`` is in seconds.

    ``settled`` are the images that the disk alone shows to be linked as they should be: nothing was asked
    about them. ``orphans`` are the links whose image's file is gone, by image id, as they were found;
    ``fault`` is why the clean-up could not be made.
    """

    started_at: datetime
    duration: float
    dry_run: bool
    results: tuple[Result, ...]
    room: Room
    settled: Sequence[str] = ()
    orphans: Mapping[str, File] = field(default_factory=dict)
    fault: "LnImagesError | None" = None

    def having(self, outcomes: Iterable[Outcome]) -> list[Result]:
        """The results whose outcome is one of ``outcomes``."""
        return [result for result in self.results if result.verdict.outcome in outcomes]


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


class InterruptedByUserError(LnImagesError):
    """Ctrl-C or SIGTERM."""

    exit_status = 130
