"""The policy: every decision, as tables and for any state of cloud and disk."""

import hashlib
import stat
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ln_images.plan import (
    IN_FLIGHT,
    cache_name,
    held,
    is_downloading,
    is_image_id,
    judge_files,
    judge_image,
    look,
)

from ln_images.model import UNMARKABLE, File, Image, Outcome, Verdict
from support.node import DEFAULTS

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER = ID.upper()
OPTIONS = replace(DEFAULTS, owner=(107, 108), disk_formats=("raw", "qcow2"))
IMAGE = Image(ID, "name", "active", "raw", 1000)
SOURCE = File(stat.S_IFREG | 0o640, 11, 1, links=1, uid=64062, gid=64062, size=1000, changed=0.0)
LINK = SOURCE._replace(
    mode=stat.S_IFREG | 0o644, uid=107, gid=108, links=2, mark=ID, marked_size=1000
)

NAME = cache_name(ID)
# What Nova left under the cache name.
NOVAS = SOURCE._replace(inode=12)
TRUNCATED = "the linked file has 999 of 1000 bytes: see docs/recovery.md"
EARLIER = f"servers get an earlier image of this id: in the cache, `mv {NAME} {NAME}.retired`, and run again"


def verdict_of(image: Image, source: File | None, entry: File | None) -> Verdict:
    """What the command decides: first by Glance's word, then by the disk."""
    return judge_image(image, OPTIONS) or judge_files(image, source, entry, OPTIONS)


def test_the_cache_name_is_novas() -> None:
    """The golden vector, made by Nova itself; an id's case counts."""
    assert cache_name(ID) == "0d5e6b61602d758984b3bf038267614d6016eb2a"
    assert (
        cache_name(ID.upper())
        == hashlib.sha1(ID.upper().encode(), usedforsecurity=False).hexdigest()
    )


@pytest.mark.parametrize(
    ("text", "is_id"),
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
def test_only_ids_are_ids(text: str, is_id: bool) -> None:
    """What becomes a file name is 8-4-4-4-12 ASCII hex digits and not one character more."""
    assert is_image_id(text) is is_id


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        ({"id": "../etc/passwd"}, "skipped", "not an image id"),
        ({"status": "queued", "size": None}, "waiting", "status queued"),
        ({"status": "saving"}, "waiting", "status saving"),
        ({"status": "uploading"}, "waiting", "status uploading"),
        ({"status": "importing"}, "waiting", "status importing"),
        ({"status": "deactivated"}, "skipped", "status deactivated"),
        ({"status": "killed"}, "skipped", "status killed"),
        ({"status": "pending_delete"}, "skipped", "status pending_delete"),
        ({"status": "deleted"}, "skipped", "status deleted"),
        ({"status": "Active"}, "skipped", "status Active"),
        ({"status": ""}, "skipped", "status "),
        ({"disk_format": "vmdk"}, "skipped", "disk format vmdk"),
        ({"disk_format": ""}, "skipped", "disk format unknown"),
        ({"signed": True}, "skipped", "signed: Nova verifies only what it downloads"),
        ({"size": 0}, "skipped", "empty"),
        ({"size": None}, "skipped", "Glance gives no size"),
    ],
)
def test_glances_word_alone_decides(change: dict[str, object], outcome: str, reason: str) -> None:
    """What is not finished waits, what cannot be linked is skipped, each with its reason, whatever the disk holds."""
    image = replace(IMAGE, **change)  # type: ignore[arg-type]
    for source, entry in ((SOURCE, None), (None, None), (SOURCE, LINK)):
        assert verdict_of(image, source, entry) == Verdict(Outcome(outcome), reason)


@pytest.mark.parametrize(
    ("source", "entry", "outcome", "reason"),
    [
        (SOURCE, None, "linked", ""),
        (SOURCE, LINK, "present", ""),
        (SOURCE, LINK._replace(uid=0), "repaired", ""),
        (SOURCE, LINK._replace(gid=0), "repaired", ""),
        (SOURCE, LINK._replace(mode=stat.S_IFREG | 0o640), "repaired", ""),
        (SOURCE, LINK._replace(mode=stat.S_IFREG | 0o4644), "repaired", ""),
        (SOURCE, LINK._replace(mark=None), "repaired", ""),
        (SOURCE, LINK._replace(mark=OTHER), "repaired", ""),
        (SOURCE, LINK._replace(marked_size=None), "repaired", ""),
        (SOURCE, LINK._replace(marked_size=999), "repaired", ""),
        (SOURCE, LINK._replace(mark=UNMARKABLE, marked_size=None), "present", ""),
        # With two more names the inode may be two images', and bears the mark of one.
        (SOURCE, LINK._replace(mark=OTHER, links=4), "present", ""),
        (SOURCE, LINK._replace(mark=None, links=4), "repaired", ""),
        (None, None, "skipped", "no file here"),
        (None, LINK, "skipped", "no file here"),
        (SOURCE._replace(size=999), None, "waiting", "999 of 1000 bytes are here"),
        (SOURCE._replace(size=0), None, "waiting", "0 of 1000 bytes are here"),
        (SOURCE._replace(size=1001), None, "refused", "the file has 1001 bytes, Glance says 1000"),
        (SOURCE._replace(size=1001), NOVAS, "refused", "the file has 1001 bytes, Glance says 1000"),
        (
            SOURCE._replace(size=1001),
            LINK._replace(size=1001),
            "damaged",
            TRUNCATED.replace("999", "1001"),
        ),
        (
            SOURCE._replace(mode=stat.S_IFLNK | 0o777),
            None,
            "refused",
            "the file is a symbolic link",
        ),
        (SOURCE._replace(mode=stat.S_IFIFO | 0o644), None, "refused", "the file is a FIFO"),
        (SOURCE._replace(mode=stat.S_IFDIR | 0o755), None, "refused", "the file is a directory"),
        (SOURCE._replace(mode=stat.S_IFSOCK | 0o755), None, "refused", "the file is a socket"),
        (SOURCE._replace(mode=stat.S_IFBLK | 0o600), None, "refused", "the file is a device"),
        (SOURCE._replace(mode=stat.S_IFCHR | 0o600), None, "refused", "the file is a device"),
        (SOURCE._replace(size=999), LINK._replace(size=999), "damaged", TRUNCATED),
        (
            SOURCE._replace(size=999),
            LINK._replace(inode=12),
            "waiting",
            "999 of 1000 bytes are here",
        ),
        (SOURCE, LINK._replace(inode=12), "failed", EARLIER),
        (SOURCE, LINK._replace(inode=12, size=7, marked_size=7), "failed", EARLIER),
        (SOURCE, NOVAS, "occupied", "another file of the same size has the cache name"),
        (
            SOURCE,
            NOVAS._replace(mark=OTHER),
            "occupied",
            "another file of the same size has the cache name",
        ),
        (
            SOURCE,
            NOVAS._replace(inode=11, device=2),
            "occupied",
            "another file of the same size has the cache name",
        ),
        (
            SOURCE,
            NOVAS._replace(size=7),
            "occupied",
            "another file has the cache name, and differs: 7 bytes, the image has 1000",
        ),
        (
            SOURCE,
            LINK._replace(inode=12, mode=stat.S_IFLNK | 0o777),
            "occupied",
            "the cache name is a symbolic link",
        ),
    ],
)
def test_the_disk_decides(
    source: File | None, entry: File | None, outcome: str, reason: str
) -> None:
    """An active image is linked when its file is whole and its name is free.

    A taken name is never replaced.
    """
    assert verdict_of(IMAGE, source, entry) == Verdict(Outcome(outcome), reason)


@pytest.mark.parametrize(
    ("source", "entry", "outcome"),
    [
        (None, None, "waiting"),
        (SOURCE, None, "waiting"),
        (SOURCE._replace(size=999), LINK._replace(size=999), "waiting"),
        (SOURCE, LINK, "present"),
    ],
)
def test_an_image_that_is_being_copied_into_a_store_waits(
    source: File | None, entry: File | None, outcome: str
) -> None:
    """An active image that Glance still copies into a store may be partial in this one.

    A link that stands is right.
    """
    assert verdict_of(replace(IMAGE, importing_to="here"), source, entry).outcome is Outcome(
        outcome
    )


@pytest.mark.parametrize(
    ("name", "entry", "settled"),
    [
        pytest.param(NAME, LINK, True, id="as wanted"),
        pytest.param(
            NAME,
            LINK._replace(mark=UNMARKABLE, marked_size=None),
            True,
            id="where nothing bears marks",
        ),
        pytest.param(NAME.upper(), LINK, False, id="another name"),
        pytest.param(NAME, LINK._replace(inode=12), False, id="another inode"),
        pytest.param(NAME, LINK._replace(uid=0), False, id="another owner"),
        pytest.param(NAME, LINK._replace(gid=0), False, id="another group"),
        pytest.param(NAME, LINK._replace(mode=stat.S_IFREG | 0o600), False, id="another mode"),
        pytest.param(NAME, LINK._replace(mode=stat.S_IFLNK | 0o644), False, id="a symbolic link"),
        pytest.param(NAME, LINK._replace(mark=None, marked_size=None), False, id="no mark"),
        pytest.param(NAME, LINK._replace(mark=OTHER), False, id="the mark of another"),
        pytest.param(NAME, LINK._replace(marked_size=None), False, id="no size"),
        pytest.param(NAME, LINK._replace(size=999), False, id="another size"),
        pytest.param(
            NAME,
            Verdict(Outcome.FAILED, "Structure needs cleaning"),
            False,
            id="not to be looked at",
        ),
    ],
)
def test_only_a_link_that_is_right_in_all_is_settled(
    name: str, entry: File | Verdict, settled: bool
) -> None:
    """Glance is not asked about an image exactly where name, inode, owner, mode, mark and size are all right."""
    found = look(
        {11: [ID], 13: ["lost+found"]}, [("a", LINK._replace(inode=13)), (name, entry)], OPTIONS
    )
    assert (found.settled, found.unsettled) == (([ID], []) if settled else ([], [ID]))
    assert found.broken == ({name: entry} if isinstance(entry, Verdict) else {})


def test_two_images_on_one_inode_are_both_settled() -> None:
    """A tool that links equal files of the store leaves one inode to two images, with the mark of one of them."""
    two = LINK._replace(links=4)
    assert look({11: [ID, OTHER]}, [(NAME, two), (cache_name(OTHER), two)], OPTIONS).settled == [
        ID,
        OTHER,
    ]


def test_inodes_that_the_directory_tells_wrong_settle_nothing() -> None:
    """Where d_ino is not st_ino each image is looked at by itself.

    A link of a file in the store is never a base.
    """
    found = look({99: [ID]}, [(NAME, LINK), (cache_name(OTHER), NOVAS._replace(links=2))], OPTIONS)
    assert (found.settled, found.unsettled) == ([], [ID])
    assert [base.name for base in found.bases] == [cache_name(OTHER)]


ORPHAN = LINK._replace(inode=12, links=1)


@pytest.mark.parametrize(
    ("name", "entry", "base"),
    [
        (NAME, ORPHAN, ("orphans", NAME, ID)),
        (NAME + ".retired", ORPHAN, ("retired", NAME, ID)),
        (NAME, ORPHAN._replace(mark=None), ("unmarked", NAME, "")),
        (NAME, ORPHAN._replace(mark=OTHER), ("unmarked", NAME, "")),
        (NAME, ORPHAN._replace(mark="../" + ID), ("unmarked", NAME, "")),
        (NAME + ".retired", ORPHAN._replace(mark=None), ("retired", NAME, "")),
        (NAME, ORPHAN._replace(mode=stat.S_IFDIR | 0o755), None),
        (NAME.upper(), ORPHAN, None),
        (NAME + "_20", ORPHAN, None),
        (NAME + ".part", ORPHAN, None),
        (NAME[1:], ORPHAN, None),
        ("ephemeral_1_40d1d2c", ORPHAN, None),
    ],
)
def test_what_no_image_stands_behind_is_a_base(
    name: str, entry: File, base: tuple[str, str, str] | None
) -> None:
    """A regular file with the name of a base is one.

    Whose it is, the mark tells where it fits the name.
    """
    found = look({11: ["fd0cb2f1"]}, [(name, entry)], OPTIONS)
    kinds = [kind for kind, (count, _) in held(found.bases, {}).items() if count]
    assert [(*kinds, one.name, one.image_id) for one in found.bases] == ([base] if base else [])
    assert found.downloads == ({name: entry} if name.endswith(".part") else {})


def test_an_earlier_image_of_an_id_is_no_base() -> None:
    """What bears the mark of an image that is in the store is told of with that image, and is not for a clean-up."""
    found = look({11: [ID]}, [(NAME, ORPHAN)], OPTIONS)
    assert (found.unsettled, found.bases) == ([ID], [])


def test_a_download_rests_ten_minutes() -> None:
    """A file that Nova has not written to for longer is a leftover.

    One from the future is no less new.
    """
    assert [is_downloading(NOVAS, now) for now in (-599, 0, 599, 600, -600)] == [
        True,
        True,
        True,
        False,
        False,
    ]


statuses = st.one_of(st.sampled_from(["active", "deactivated", "killed", *IN_FLIGHT]), st.text())
sizes = st.one_of(st.none(), st.integers(0, 3), st.integers(0, 2**70))
kinds = st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
images = st.builds(
    Image,
    id=st.one_of(st.uuids().map(str), st.text()),
    name=st.text(),
    status=statuses,
    disk_format=st.one_of(st.sampled_from(["raw", "qcow2", "vmdk"]), st.text()),
    size=sizes,
    importing_to=st.sampled_from(["", "store"]),
)
files = st.builds(
    File,
    device=st.integers(1, 2),
    inode=st.integers(1, 2),
    mode=st.builds(int.__or__, kinds, st.integers(0, 0o7777)),
    links=st.integers(1, 2),
    uid=st.sampled_from([0, 107]),
    gid=st.sampled_from([0, 108]),
    size=st.integers(0, 3),
    changed=st.just(0.0),
    mark=st.one_of(st.none(), st.just(UNMARKABLE), st.text()),
    marked_size=st.one_of(st.none(), st.integers(0, 3)),
)


@given(images, st.none() | files, st.none() | files)
def test_only_a_whole_active_image_with_a_free_name_is_linked(
    image: Image, source: File | None, entry: File | None
) -> None:
    """For any state of cloud and disk: a link is made only when all that makes it right holds."""
    verdict = verdict_of(image, source, entry)
    if verdict.outcome is Outcome.LINKED:
        assert image.status == "active"
        assert is_image_id(image.id)
        assert image.disk_format in OPTIONS.disk_formats
        assert not image.importing_to
        assert source is not None
        assert stat.S_ISREG(source.mode)
        assert source.size == image.size != 0
        assert entry is None
    if verdict.outcome is Outcome.REPAIRED:
        assert entry is not None
        assert source is not None
        assert entry.same(source)
    if verdict.outcome not in (Outcome.LINKED, Outcome.REPAIRED, Outcome.PRESENT):
        assert verdict.reason


@given(images, st.none() | files, st.none() | files)
def test_planning_again_after_applying_finds_nothing_to_do(
    image: Image, source: File | None, entry: File | None
) -> None:
    """What was linked or repaired is present in the next pass.

    Every other verdict stays what it is.
    """
    verdict = verdict_of(image, source, entry)
    if verdict.outcome in (Outcome.LINKED, Outcome.REPAIRED):
        assert source is not None
        mended = source._replace(
            uid=107, gid=108, mode=stat.S_IFREG | 0o644, mark=image.id, marked_size=source.size
        )
        assert verdict_of(image, mended, mended) == Verdict(Outcome.PRESENT)
    else:
        assert verdict_of(image, source, entry) == verdict
