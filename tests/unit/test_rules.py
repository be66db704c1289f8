"""The policy of linking, as a table: facts on the left, what becomes of the image on the right."""

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_images.model import (
    IN_FLIGHT,
    MARKS_UNSUPPORTED,
    NO_MARKS,
    Action,
    Base,
    Decision,
    DiskUsage,
    Facts,
    File,
    Image,
    LinkPolicy,
    Marks,
    Outcome,
    Owner,
    Reason,
    Reclaimable,
    Verdict,
    cache_name,
    is_image_id,
)
from ln_images.rules import QUIET_SECONDS, decide, is_correct, judge_error, judge_image
from ln_images.scan import MOST_BASES, MOST_FOREIGN_NAMES, Scan, reclaimable, scan
from ln_images.store import Store, is_fresh_download

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER_ID = "a0000000-0000-4000-8000-000000000000"
NAME = cache_name(ID)
OTHER_NAME = cache_name(OTHER_ID)
NOW = 1e9
POLICY = LinkPolicy(owner=Owner(107, 108), mode=0o644, disk_formats=("raw", "qcow2"))

# An image that Glance has finished.
IMAGE = Image(id=ID, name="name", status="active", disk_format="raw", size=1000)
QCOW2 = replace(IMAGE, disk_format="qcow2")
COPYING = replace(IMAGE, importing_to="store")

# Its complete file in the store, which Glance has just written.
FILE = File(
    mode=stat.S_IFREG | 0o640,
    inode=11,
    device=1,
    links=1,
    owner=Owner(64062, 64062),
    size=1000,
    changed=NOW,
    modified=NOW,
    marks=NO_MARKS,
)
QUIET = FILE._replace(modified=NOW - QUIET_SECONDS)
SHORT = FILE._replace(size=999)
LONG = FILE._replace(size=1001)

# The link as it must be: the same inode, with owner, mode and marks.
MARKS = Marks(image_id=ID, size=1000)
LINK = FILE._replace(mode=stat.S_IFREG | 0o644, links=2, owner=Owner(107, 108), marks=MARKS)
# A file that Nova left under the cache name.
NOVAS = FILE._replace(inode=12)
# Bases that belong to no image in the store.
ORPHAN = LINK._replace(inode=12, links=1)
UNMARKED = ORPHAN._replace(marks=NO_MARKS)


class Case(NamedTuple):
    """A row of the policy."""

    title: str
    image: Image
    facts: Facts
    outcome: Outcome
    reason: Reason
    action: Action | None = None


def of_kind(kind: int, file: File = FILE) -> File:
    """Return the same file as another kind of file, such as a FIFO."""
    return file._replace(mode=kind | 0o644)


# What Glance says about the image rules out a link.
GLANCE_DECIDES = [
    ({"id": "../etc/passwd"}, Outcome.SKIPPED, Reason.NOT_AN_IMAGE_ID),
    ({"status": "queued", "size": None}, Outcome.WAITING, Reason.NOT_FINISHED),
    ({"status": "saving"}, Outcome.WAITING, Reason.NOT_FINISHED),
    ({"status": "uploading"}, Outcome.WAITING, Reason.NOT_FINISHED),
    ({"status": "importing"}, Outcome.WAITING, Reason.NOT_FINISHED),
    ({"status": "deactivated"}, Outcome.SKIPPED, Reason.STATUS),
    ({"status": "killed"}, Outcome.SKIPPED, Reason.STATUS),
    ({"status": "pending_delete"}, Outcome.SKIPPED, Reason.STATUS),
    ({"status": "deleted"}, Outcome.SKIPPED, Reason.STATUS),
    ({"status": "Active"}, Outcome.SKIPPED, Reason.STATUS),
    ({"status": None}, Outcome.SKIPPED, Reason.STATUS),
    ({"disk_format": "vmdk"}, Outcome.SKIPPED, Reason.DISK_FORMAT),
    ({"disk_format": "iso"}, Outcome.SKIPPED, Reason.DISK_FORMAT),
    ({"disk_format": None}, Outcome.SKIPPED, Reason.DISK_FORMAT),
    ({"container_format": "compressed"}, Outcome.SKIPPED, Reason.COMPRESSED),
    ({"signed": True}, Outcome.SKIPPED, Reason.SIGNED),
    ({"size": None}, Outcome.SKIPPED, Reason.NO_SIZE),
    ({"size": 0}, Outcome.SKIPPED, Reason.EMPTY),
]

# Glance allows a link, so the two directories decide.
DIRECTORIES_DECIDE = [
    # The image's own file.
    Case("no file", IMAGE, Facts(None, None), Outcome.SKIPPED, Reason.NO_FILE),
    Case("no file, a base", IMAGE, Facts(None, LINK), Outcome.SKIPPED, Reason.NO_FILE),
    Case(
        "no file, being copied",
        COPYING,
        Facts(None, None),
        Outcome.WAITING,
        Reason.BEING_COPIED,
    ),
    Case(
        "a symbolic link",
        IMAGE,
        Facts(of_kind(stat.S_IFLNK), None),
        Outcome.REFUSED,
        Reason.NOT_A_REGULAR_FILE,
    ),
    Case(
        "a FIFO",
        IMAGE,
        Facts(of_kind(stat.S_IFIFO), None),
        Outcome.REFUSED,
        Reason.NOT_A_REGULAR_FILE,
    ),
    Case(
        "a directory",
        IMAGE,
        Facts(of_kind(stat.S_IFDIR), None),
        Outcome.REFUSED,
        Reason.NOT_A_REGULAR_FILE,
    ),
    Case("a short file", IMAGE, Facts(SHORT, None), Outcome.WAITING, Reason.FILE_INCOMPLETE),
    Case(
        "a short file, unchanged for a second less than an hour",
        IMAGE,
        Facts(SHORT._replace(modified=NOW - QUIET_SECONDS + 1), None),
        Outcome.WAITING,
        Reason.FILE_INCOMPLETE,
    ),
    Case(
        "a short file, unchanged for an hour",
        IMAGE,
        Facts(SHORT._replace(modified=NOW - QUIET_SECONDS), None),
        Outcome.DAMAGED,
        Reason.FILE_TOO_SHORT,
    ),
    Case(
        "a short file, written an hour in the future",
        IMAGE,
        Facts(SHORT._replace(modified=NOW + QUIET_SECONDS), None),
        Outcome.DAMAGED,
        Reason.FILE_TOO_SHORT,
    ),
    Case(
        "a short file, unchanged for an hour, being copied",
        COPYING,
        Facts(SHORT._replace(modified=NOW - QUIET_SECONDS), None),
        Outcome.WAITING,
        Reason.FILE_INCOMPLETE,
    ),
    Case(
        "a short file, another file as base",
        IMAGE,
        Facts(SHORT, NOVAS),
        Outcome.WAITING,
        Reason.FILE_INCOMPLETE,
    ),
    Case("a long file", IMAGE, Facts(LONG, None), Outcome.REFUSED, Reason.FILE_TOO_LONG),
    Case("a long file, Nova's", IMAGE, Facts(LONG, NOVAS), Outcome.REFUSED, Reason.FILE_TOO_LONG),
    Case(
        "a linked file that was truncated",
        IMAGE,
        Facts(SHORT, LINK._replace(size=999)),
        Outcome.DAMAGED,
        Reason.LINKED_FILE_WRONG_SIZE,
    ),
    Case(
        "a linked file that has grown",
        IMAGE,
        Facts(LONG, LINK._replace(size=1001)),
        Outcome.DAMAGED,
        Reason.LINKED_FILE_WRONG_SIZE,
    ),
    Case(
        "a linked file that Glance copies anew",
        COPYING,
        Facts(SHORT, LINK._replace(size=999)),
        Outcome.WAITING,
        Reason.FILE_INCOMPLETE,
    ),
    Case(
        "a linked file of the wrong size after an interrupted copy",
        COPYING,
        Facts(SHORT._replace(modified=NOW - QUIET_SECONDS), LINK._replace(size=999)),
        Outcome.DAMAGED,
        Reason.LINKED_FILE_WRONG_SIZE,
    ),
    # Another file has the cache name.
    Case("Nova's file", IMAGE, Facts(FILE, NOVAS), Outcome.OCCUPIED, Reason.OTHER_FILE),
    Case(
        "Nova's file of another size",
        IMAGE,
        Facts(FILE, NOVAS._replace(size=7), entry_is_raw=True),
        Outcome.OCCUPIED,
        Reason.OTHER_FILE,
    ),
    Case(
        "a file with the mark of another image",
        IMAGE,
        Facts(FILE, NOVAS._replace(marks=Marks(image_id=OTHER_ID))),
        Outcome.OCCUPIED,
        Reason.OTHER_FILE,
    ),
    Case(
        "the same inode number on another device",
        IMAGE,
        Facts(FILE, FILE._replace(device=2)),
        Outcome.OCCUPIED,
        Reason.OTHER_FILE,
    ),
    Case(
        "a copy of the link",
        IMAGE,
        Facts(FILE, LINK._replace(inode=12)),
        Outcome.OCCUPIED,
        Reason.COPY_OR_EARLIER_IMAGE,
    ),
    Case(
        "the link of an earlier image of this id",
        IMAGE,
        Facts(FILE, LINK._replace(inode=12, size=7, marks=Marks(image_id=ID, size=7))),
        Outcome.OCCUPIED,
        Reason.COPY_OR_EARLIER_IMAGE,
    ),
    Case(
        "Nova's raw copy of a qcow2 image",
        QCOW2,
        Facts(FILE, NOVAS, entry_is_raw=True),
        Outcome.OCCUPIED,
        Reason.RAW_COPY,
    ),
    Case(
        "Nova's qcow2 file of a qcow2 image",
        QCOW2,
        Facts(FILE, NOVAS),
        Outcome.OCCUPIED,
        Reason.OTHER_FILE,
    ),
    Case(
        "a symbolic link in the cache",
        IMAGE,
        Facts(FILE, of_kind(stat.S_IFLNK, NOVAS)),
        Outcome.OCCUPIED,
        Reason.OTHER_KIND_OF_FILE,
    ),
    Case(
        "a device in the cache",
        QCOW2,
        Facts(FILE, of_kind(stat.S_IFCHR, NOVAS)),
        Outcome.OCCUPIED,
        Reason.OTHER_KIND_OF_FILE,
    ),
    # The link is there.
    Case("a correct link", IMAGE, Facts(FILE, LINK), Outcome.PRESENT, Reason.CORRECT),
    Case("a link, being copied", COPYING, Facts(FILE, LINK), Outcome.PRESENT, Reason.CORRECT),
    Case(
        "a link of another owner",
        IMAGE,
        Facts(FILE, LINK._replace(owner=Owner(0, 108))),
        Outcome.REPAIRED,
        Reason.WRONG_ATTRIBUTES,
        Action.REPAIR,
    ),
    Case(
        "a link with the mark of another image",
        IMAGE,
        Facts(FILE, LINK._replace(marks=Marks(image_id=OTHER_ID, size=1000))),
        Outcome.REPAIRED,
        Reason.WRONG_ATTRIBUTES,
        Action.REPAIR,
    ),
    Case(
        "a link with the mark of another image that has the same inode",
        IMAGE,
        Facts(
            FILE,
            LINK._replace(marks=Marks(image_id=OTHER_ID, size=1000)),
            mark_is_shared=True,
        ),
        Outcome.PRESENT,
        Reason.CORRECT,
    ),
    # The cache name is free.
    Case(
        "a new image",
        IMAGE,
        Facts(FILE, None),
        Outcome.LINKED,
        Reason.NO_LINK_YET,
        Action.LINK,
    ),
    Case(
        "a new image whose file shows no marks",
        IMAGE,
        Facts(FILE._replace(marks=None), None),
        Outcome.LINKED,
        Reason.NO_LINK_YET,
        Action.LINK,
    ),
    Case(
        "a file with the mark of another image",
        IMAGE,
        Facts(FILE._replace(marks=Marks(image_id=OTHER_ID, size=1000)), None),
        Outcome.LINKED,
        Reason.NO_LINK_YET,
        Action.LINK,
    ),
    Case(
        "a file that we linked before",
        IMAGE,
        Facts(FILE._replace(marks=MARKS), None),
        Outcome.LINKED,
        Reason.LINK_WAS_REMOVED,
        Action.LINK,
    ),
    Case(
        "a complete file, being copied",
        COPYING,
        Facts(FILE, None),
        Outcome.WAITING,
        Reason.BEING_COPIED,
    ),
    Case(
        "a complete file, unchanged for an hour after an interrupted copy",
        COPYING,
        Facts(QUIET, None),
        Outcome.LINKED,
        Reason.NO_LINK_YET,
        Action.LINK,
    ),
    Case(
        "a download by Nova",
        IMAGE,
        Facts(FILE, None, is_downloading=True),
        Outcome.WAITING,
        Reason.NOVA_IS_DOWNLOADING,
    ),
    Case(
        "a download by Nova, after an interrupted copy",
        COPYING,
        Facts(QUIET, None, is_downloading=True),
        Outcome.WAITING,
        Reason.NOVA_IS_DOWNLOADING,
    ),
]


@pytest.mark.parametrize(("change", "outcome", "reason"), GLANCE_DECIDES)
def test_glance_alone_can_rule_out_a_link(
    change: dict[str, object], outcome: Outcome, reason: Reason
) -> None:
    """What Glance says rules out a link, whatever the two directories have."""
    image = replace(IMAGE, **change)  # type: ignore[arg-type]
    verdict = judge_image(image, POLICY)
    assert verdict is not None
    assert verdict[:2] == (outcome, reason)
    assert decide(image, Facts(FILE, None), POLICY, NOW) == Decision(verdict)
    assert decide(image, Facts(None, None), POLICY, NOW) == Decision(verdict)
    assert decide(image, Facts(FILE, NOVAS), POLICY, NOW) == Decision(verdict)


@pytest.mark.parametrize(
    "case", DIRECTORIES_DECIDE, ids=[case.title for case in DIRECTORIES_DECIDE]
)
def test_the_directories_decide_about_a_finished_image(case: Case) -> None:
    """A complete file is linked if its cache name is free; a name that is taken is left alone."""
    assert judge_image(case.image, POLICY) is None
    decision = decide(case.image, case.facts, POLICY, NOW)
    assert decision.verdict[:2] == (case.outcome, case.reason)
    assert decision.action is case.action


@pytest.mark.parametrize("container_format", ["bare", "ovf", "docker", "ami", None])
def test_only_compressed_containers_are_skipped(container_format: str | None) -> None:
    """Nova ignores every container format but compressed, and so do we."""
    assert judge_image(replace(IMAGE, container_format=container_format), POLICY) is None


def test_an_image_that_is_signed_after_linking_is_refused() -> None:
    """A signature that arrives after the link is reported; before it, the image is skipped."""
    signed = replace(IMAGE, signed=True)
    linked = decide(signed, Facts(FILE, LINK), POLICY, NOW)
    assert linked.action is None
    assert linked.verdict[:2] == (Outcome.REFUSED, Reason.SIGNED_AFTER_LINKING)
    other_file = decide(signed, Facts(FILE, NOVAS), POLICY, NOW)
    assert other_file.verdict[:2] == (Outcome.SKIPPED, Reason.SIGNED)
    # Other things that Glance says come first.
    deactivated = decide(replace(signed, status="deactivated"), Facts(FILE, LINK), POLICY, NOW)
    assert deactivated.verdict[:2] == (Outcome.SKIPPED, Reason.STATUS)


@pytest.mark.parametrize(
    ("image", "facts", "sentence"),
    [
        (replace(IMAGE, status="killed"), Facts(FILE, None), "status killed"),
        (replace(IMAGE, status=None), Facts(FILE, None), "status unknown"),
        (replace(IMAGE, disk_format=None), Facts(FILE, None), "disk format unknown"),
        (IMAGE, Facts(SHORT, None), "the file has 999 of 1000 bytes"),
        (
            IMAGE,
            Facts(LONG, None),
            "the file has 1001 bytes, Glance states 1000; upload it again as a new image",
        ),
        (IMAGE, Facts(of_kind(stat.S_IFSOCK), None), "the file is a socket"),
        (IMAGE, Facts(of_kind(stat.S_IFBLK), None), "the file is a device"),
        (IMAGE, Facts(of_kind(0o110000), None), "the file is not a regular file"),
        (
            IMAGE,
            Facts(SHORT, LINK._replace(size=999)),
            "the linked file has 999 of 1000 bytes; follow docs/recovery.md",
        ),
        (
            IMAGE,
            Facts(FILE, NOVAS._replace(size=7)),
            "another file has the cache name; it has 7 bytes, the image 1000",
        ),
        (
            IMAGE,
            Facts(FILE, of_kind(stat.S_IFLNK, NOVAS)),
            "a symbolic link has the cache name",
        ),
        (COPYING, Facts(FILE, None), "Glance is copying it to the store store"),
        (IMAGE, Facts(FILE, LINK), None),
        (IMAGE, Facts(FILE, None), None),
    ],
)
def test_a_sentence_has_the_facts_that_decided(
    image: Image, facts: Facts, sentence: str | None
) -> None:
    """The sentence beside the reason code names the status, format, kind or sizes."""
    assert decide(image, facts, POLICY, NOW).verdict.sentence == sentence


def test_no_sentence_about_a_base_suggests_to_rename_or_remove_it() -> None:
    """Servers may use whatever has a cache name, so the reader is led to docs/recovery.md."""
    for case in DIRECTORIES_DECIDE:
        if case.outcome in (Outcome.OCCUPIED, Outcome.DAMAGED):
            sentence = decide(case.image, case.facts, POLICY, NOW).verdict.sentence or ""
            for word in ("rename", "remove", "delete", "mv ", "rm "):
                assert word not in sentence


@pytest.mark.parametrize(
    ("entry", "correct"),
    [
        pytest.param(LINK, True, id="as it must be"),
        pytest.param(LINK._replace(links=4), True, id="more names elsewhere"),
        pytest.param(LINK._replace(marks=MARKS_UNSUPPORTED), True, id="no marks possible"),
        pytest.param(LINK._replace(owner=Owner(0, 108)), False, id="another user"),
        pytest.param(LINK._replace(owner=Owner(107, 0)), False, id="another group"),
        pytest.param(LINK._replace(mode=stat.S_IFREG | 0o640), False, id="too few permissions"),
        pytest.param(LINK._replace(mode=stat.S_IFREG | 0o4644), False, id="a setuid bit"),
        pytest.param(LINK._replace(mode=stat.S_IFLNK | 0o644), False, id="a symbolic link"),
        pytest.param(LINK._replace(marks=NO_MARKS), False, id="no marks"),
        pytest.param(LINK._replace(marks=Marks(OTHER_ID, 1000)), False, id="another image's mark"),
        pytest.param(LINK._replace(marks=Marks(ID, None)), False, id="no size mark"),
        pytest.param(LINK._replace(marks=Marks(ID, 999)), False, id="another size mark"),
        pytest.param(LINK._replace(size=999), False, id="another size"),
    ],
)
def test_a_link_is_correct_only_with_all_its_attributes(entry: File, correct: bool) -> None:
    """Owner, mode, the image's mark and the size mark must all be right."""
    assert is_correct(entry, [ID], POLICY) is correct
    expected = Outcome.PRESENT if correct else Outcome.REPAIRED
    if entry.size == FILE.size:
        assert decide(IMAGE, Facts(FILE, entry), POLICY, NOW).verdict.outcome is expected


def test_the_mark_of_any_image_on_the_inode_is_correct() -> None:
    """A tool that deduplicates the store gives two images one inode, which has one mark."""
    assert is_correct(LINK, [OTHER_ID, ID], POLICY)
    assert not is_correct(LINK, [OTHER_ID], POLICY)


@pytest.mark.parametrize(
    ("number", "is_root", "advice"),
    [
        (errno.EPERM, True, "root_squash"),
        (errno.EACCES, True, "lsattr"),
        (errno.EPERM, False, "run the command as root"),
        (errno.EACCES, False, "run the command as root"),
        (errno.EINVAL, True, "id mapping"),
        (errno.ENOSPC, True, "free space or inodes"),
        (errno.EDQUOT, True, "free space or inodes"),
        (errno.EMLINK, True, "as many names"),
        (errno.EIO, True, "the kernel's log"),
        (errno.EROFS, True, "the kernel's log"),
        (errno.EUCLEAN, True, "the kernel's log"),
        (errno.ELOOP, True, None),
    ],
)
def test_a_system_error_has_its_usual_cause(number: int, is_root: bool, advice: str | None) -> None:
    """The verdict has the kernel's words, and advice if the errno has a usual cause."""
    outcome, reason, sentence = judge_error(OSError(number, os.strerror(number)), is_root)
    assert (outcome, reason) == (Outcome.FAILED, Reason.SYSTEM_ERROR)
    assert sentence is not None
    happened, _, what_to_do = sentence.partition("; ")
    assert happened == os.strerror(number)
    assert (advice or "") in what_to_do
    assert bool(what_to_do) is (advice is not None)


def test_a_system_error_without_a_text_has_a_sentence() -> None:
    """An OSError that a library raises without an errno is reported in its own words."""
    assert judge_error(OSError("broken"), is_root=True).sentence == "broken"


def test_the_cache_name_is_novas() -> None:
    """The cache name of an id is the one that Nova itself computed; the case of the id counts."""
    assert cache_name(ID) == "0d5e6b61602d758984b3bf038267614d6016eb2a"
    assert cache_name(ID.upper()) != cache_name(ID)


def test_an_id_that_is_no_valid_text_has_a_cache_name() -> None:
    """JSON allows lone surrogates, and an image with such an id can still be reported."""
    assert len(cache_name("\ud800")) == 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ID, True),
        (ID.upper(), True),
        (ID + "\n", False),
        (ID[:-1], False),
        (ID + "0", False),
        (ID.replace("-", ""), False),
        (f"{{{ID}}}", False),
        ("../../../../../../../../../etc/passwd", False),
        ("", False),
        (ID.replace("f", "\N{FULLWIDTH DIGIT ONE}"), False),
        (ID.replace("0", "\N{ARABIC-INDIC DIGIT ONE}"), False),
    ],
)
def test_only_an_image_id_becomes_a_file_name(text: str, expected: bool) -> None:
    """An id is 8-4-4-4-12 ASCII hex digits, and not one character more."""
    assert is_image_id(text) is expected


@pytest.mark.parametrize(
    ("age", "fresh"), [(-599, True), (0, True), (599, True), (600, False), (-600, False)]
)
def test_a_download_is_fresh_for_ten_minutes(age: int, fresh: bool) -> None:
    """A download that has not changed for ten minutes, or is from the future, is a leftover."""
    assert is_fresh_download(NOVAS._replace(changed=NOW - age), NOW) is fresh
    assert not is_fresh_download(of_kind(stat.S_IFDIR), NOW)


class FakeStore:
    """Two directories whose contents a test chooses."""

    def __init__(
        self, images: Mapping[str, int], cache: Mapping[str, File | OSError | None]
    ) -> None:
        self._images = images
        self._cache = cache

    def list_store(self) -> dict[str, int]:
        """Return the inode of each image id."""
        return dict(self._images)

    def list_cache(self, limit: int) -> list[str]:
        """Return the first names in the cache."""
        return list(self._cache)[:limit]

    def cache_file(self, name: str) -> File | None:
        """Return what has a name in the cache."""
        entry = self._cache.get(name)
        if isinstance(entry, OSError):
            raise entry
        return entry


def scan_of(
    images: Mapping[str, int],
    cache: Mapping[str, File | OSError | None],
    policy: LinkPolicy | None = POLICY,
) -> Scan:
    """Return the scan of two directories."""
    return scan(cast(Store, FakeStore(images, cache)), policy)


@pytest.mark.parametrize(
    ("name", "entry", "is_present"),
    [
        pytest.param(NAME, LINK, True, id="as it must be"),
        pytest.param(NAME, LINK._replace(marks=MARKS_UNSUPPORTED), True, id="no marks possible"),
        pytest.param(NAME.upper(), LINK, False, id="another name"),
        pytest.param(NAME, LINK._replace(inode=12), False, id="another inode"),
        pytest.param(
            NAME,
            LINK._replace(inode=12, marks=MARKS_UNSUPPORTED),
            False,
            id="another inode, no marks possible",
        ),
        pytest.param(NAME, LINK._replace(owner=Owner(0, 108)), False, id="another owner"),
        pytest.param(NAME, LINK._replace(marks=NO_MARKS), False, id="no marks"),
        pytest.param(NAME, None, False, id="gone meanwhile"),
    ],
)
def test_only_a_correct_link_is_present(name: str, entry: File | None, is_present: bool) -> None:
    """Glance is not queried about an image whose link is correct in everything."""
    found = scan_of({ID: 11}, {name: entry})
    assert (list(found.present), list(found.to_check)) == (([ID], []) if is_present else ([], [ID]))
    assert scan_of({ID: 11}, {name: entry}, policy=None).to_check == [ID]


def test_an_entry_that_cannot_be_read_does_not_end_the_scan() -> None:
    """What goes wrong with one base is its verdict; with a link, its image is looked at later."""
    error = OSError(errno.EUCLEAN, "Structure needs cleaning")
    other_link = LINK._replace(inode=12, marks=Marks(OTHER_ID, 1000))
    cache: dict[str, File | OSError | None] = {NAME: error}
    cache |= {OTHER_NAME: other_link, "0" * 40: error, "1" * 40: UNMARKED}
    found = scan_of({ID: 11, OTHER_ID: 12}, cache)
    assert (found.present, found.to_check) == ([OTHER_ID], [ID])
    assert found.broken == {"0" * 40: judge_error(error, is_root=True)}
    assert [base.name for base in found.bases] == ["1" * 40]


def test_two_images_on_one_inode_are_both_present() -> None:
    """A tool that deduplicates the store leaves one inode to two images, with one mark."""
    entry = LINK._replace(links=4)
    found = scan_of({ID: 11, OTHER_ID: 11}, {NAME: entry, OTHER_NAME: entry})
    assert sorted(found.present) == sorted([ID, OTHER_ID])


def test_directories_that_list_other_inodes_show_no_link() -> None:
    """On file systems such as overlayfs each image is looked at by itself."""
    found = scan_of({ID: 99}, {NAME: LINK})
    assert (found.present, found.to_check) == ([], [ID])


@pytest.mark.parametrize(
    ("name", "entry", "bases"),
    [
        (NAME, ORPHAN, [Base(NAME, ID, False, ORPHAN)]),
        (NAME, UNMARKED, [Base(NAME, None, False, UNMARKED)]),
        (f"{NAME}.retired", ORPHAN, [Base(NAME, ID, True, ORPHAN)]),
        (f"{NAME}.retired", UNMARKED, [Base(NAME, None, True, UNMARKED)]),
        (NAME, of_kind(stat.S_IFDIR, ORPHAN), []),
        (NAME, of_kind(stat.S_IFLNK, ORPHAN), []),
        (NAME.upper(), ORPHAN, []),
        (f"{NAME}_20", ORPHAN, []),
        (f"{NAME}.part", ORPHAN, []),
        (f"{NAME}.retired\n", ORPHAN, []),
        (NAME[1:], ORPHAN, []),
        ("ephemeral_1_40d1d2c", ORPHAN, []),
    ],
)
def test_a_base_is_a_regular_file_with_a_cache_name_and_no_image(
    name: str, entry: File, bases: Sequence[Base]
) -> None:
    """Every regular file under a cache name, retired or not, that has no image here is a base."""
    assert list(scan_of({OTHER_ID: 11}, {name: entry}).bases) == bases


@pytest.mark.parametrize("mark", [OTHER_ID, f"../{ID}", ID.upper(), ""])
def test_a_mark_counts_only_if_it_fits_the_name(mark: str) -> None:
    """Somebody else may have written a mark, so the cache name must prove its image id."""
    entry = ORPHAN._replace(marks=Marks(image_id=mark))
    assert scan_of({}, {NAME: entry}).bases[0].image_id is None


def test_an_entry_under_the_name_of_an_image_here_is_no_base() -> None:
    """A copy or an earlier image of an id belongs to that image's verdict, not to the bases."""
    found = scan_of({ID: 11}, {NAME: ORPHAN})
    assert (found.to_check, found.bases) == ([ID], [])


def test_a_cache_full_of_foreign_names_is_not_read_to_its_end() -> None:
    """The scan looks at a bounded number of bases, and still finds the link of each image."""
    names = {f"{number:040x}": UNMARKED for number in range(MOST_BASES + 1)}
    found = scan_of({ID: 11}, {**names, NAME: LINK})
    assert (len(found.bases), found.has_more_bases, found.present) == (MOST_BASES, True, [ID])
    assert not scan_of({ID: 11}, {NAME: LINK}).has_more_bases


def test_a_list_of_names_that_was_cut_off_hides_no_link() -> None:
    """If the cache has too many names to list all, each image's own name is looked at."""
    names = dict.fromkeys((f"x{number}" for number in range(MOST_FOREIGN_NAMES + 1)), UNMARKED)
    found = scan_of({ID: 11}, {**names, NAME: LINK})
    assert (found.present, list(found.bases), found.has_more_bases) == ([ID], [], True)


def test_reclaimable_space_is_that_of_files_with_one_name() -> None:
    """A base that has another name elsewhere would free nothing."""
    bases = [
        Base(NAME, ID, False, ORPHAN),
        Base(NAME, None, False, UNMARKED._replace(size=5)),
        Base(NAME, None, False, UNMARKED._replace(size=6)),
        Base(NAME, ID, True, ORPHAN._replace(size=7)),
        Base(NAME, ID, False, ORPHAN._replace(links=2)),
    ]
    assert reclaimable(bases) == Reclaimable(
        orphans=DiskUsage(count=1, bytes=1000),
        unmarked=DiskUsage(count=2, bytes=11),
        retired=DiskUsage(count=1, bytes=7),
    )


statuses = st.one_of(st.sampled_from(["active", "deactivated", *IN_FLIGHT]), st.none(), st.text())
sizes = st.one_of(st.none(), st.integers(0, 3), st.integers(0, 2**70))
kinds = st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
times = st.sampled_from([0.0, NOW - QUIET_SECONDS, NOW, NOW + 2 * QUIET_SECONDS])
images = st.builds(
    Image,
    id=st.one_of(st.sampled_from([ID, OTHER_ID]), st.text()),
    status=statuses,
    disk_format=st.one_of(st.sampled_from(["raw", "qcow2", "vmdk"]), st.none()),
    container_format=st.sampled_from([None, "bare", "compressed"]),
    size=sizes,
    importing_to=st.sampled_from([None, "store"]),
    signed=st.booleans(),
)
marks = st.one_of(
    st.none(),
    st.just(MARKS_UNSUPPORTED),
    st.builds(Marks, image_id=st.sampled_from([None, ID, OTHER_ID]), size=sizes),
)
files = st.builds(
    File,
    device=st.integers(1, 2),
    inode=st.integers(1, 2),
    mode=st.builds(int.__or__, kinds, st.sampled_from([0o644, 0o640, 0o4644])),
    links=st.integers(1, 2),
    owner=st.sampled_from([Owner(0, 0), POLICY.owner]),
    size=st.integers(0, 3),
    changed=times,
    modified=times,
    marks=marks,
)
facts_of_any_kind = st.builds(
    Facts,
    source=st.none() | files,
    entry=st.none() | files,
    is_downloading=st.booleans(),
    entry_is_raw=st.booleans(),
    mark_is_shared=st.booleans(),
)


@given(images, facts_of_any_kind)
def test_only_a_complete_active_image_with_a_free_name_is_linked(
    image: Image, facts: Facts
) -> None:
    """Whatever cloud and disk look like, a link or repair is decided only if all of it is right."""
    decision = decide(image, facts, POLICY, NOW)
    source, entry = facts.source, facts.entry
    if decision.action is not None:
        assert image.status == "active"
        assert is_image_id(image.id)
        assert image.disk_format in POLICY.disk_formats
        assert image.container_format != "compressed"
        assert not image.signed
        assert source is not None
        assert stat.S_ISREG(source.mode)
        assert source.size == image.size != 0
    if decision.action is Action.LINK:
        assert decision.verdict.outcome is Outcome.LINKED
        assert entry is None
        assert not facts.is_downloading
    if decision.action is Action.REPAIR:
        assert decision.verdict.outcome is Outcome.REPAIRED
        assert source is not None
        assert entry is not None
        assert entry.is_same_inode(source)
    if decision.action is None:
        assert decision.verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED)
        assert decision.verdict.sentence or decision.verdict.outcome is Outcome.PRESENT


@given(images, facts_of_any_kind)
def test_an_image_is_correct_after_its_action(image: Image, facts: Facts) -> None:
    """An image that was linked or repaired is present in the next pass."""
    decision = decide(image, facts, POLICY, NOW)
    if decision.action is None or facts.source is None:
        return
    after = facts.source._replace(
        owner=POLICY.owner,
        mode=stat.S_IFREG | POLICY.mode,
        marks=Marks(image.id, facts.source.size),
    )
    again = decide(image, Facts(after, after), POLICY, NOW)
    assert again == Decision(Verdict(Outcome.PRESENT, Reason.CORRECT))
