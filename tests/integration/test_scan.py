"""The scan of both directories: what is present, what is a base, and what a hostile cache costs."""

import os
from pathlib import Path

import pytest

from ln_images import scan as scan_module
from ln_images.model import LinkPolicy, cache_name
from ln_images.scan import Scan, reclaimable, scan
from ln_images.store import IMAGE_ID_MARK, Store
from support.node import POLICY

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER_ID = "ed0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store with one image and its correct link, both open."""
    for name in ("images", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / ID).write_bytes(b"data")
    store = Store(str(tmp_path / "images"), str(tmp_path / "cache"))
    with store.open_image(ID) as descriptor:
        store.link(descriptor, ID, POLICY)
    return store


def scan_and_close(store: Store, policy: LinkPolicy | None = POLICY) -> Scan:
    """Scan the directories of a store, and close it."""
    with store:
        return scan(store, policy)


def count_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each entry of the cache that is looked at."""
    looks: list[str] = []
    cache_file = store.cache_file

    def look(name: str) -> object:
        looks.append(name)
        return cache_file(name)

    monkeypatch.setattr(store, "cache_file", look)
    return looks


def test_a_correct_link_is_present(store: Store) -> None:
    """An image whose link is correct need not be checked."""
    found = scan_and_close(store)
    assert (found.present, found.to_check, found.bases) == ([ID], [], [])


def test_without_a_policy_every_image_is_to_be_checked(store: Store) -> None:
    """Without a policy no link is correct."""
    found = scan_and_close(store, policy=None)
    assert (found.present, found.to_check, found.bases) == ([], [ID], [])


def test_bases_are_those_of_no_image_in_the_store(store: Store) -> None:
    """A scan distinguishes orphans, unmarked and retired bases, and Nova's other files are none."""
    cache = Path(store.cache_dir)
    orphan, unmarked, forged = (cache / cache_name(name) for name in (OTHER_ID, "1", "2"))
    retired = cache / f"{'0' * 40}.retired"
    for path in (orphan, unmarked, forged, retired):
        path.write_bytes(b"base")
    os.setxattr(orphan, IMAGE_ID_MARK, OTHER_ID.encode())
    os.setxattr(forged, IMAGE_ID_MARK, OTHER_ID.encode())
    for name in (f"{'1' * 40}_20", f"{'1' * 40}.part", "swap_512", "A" * 40, f"{'1' * 39}"):
        (cache / name).write_bytes(b"nova's own")
    found = scan_and_close(store)
    bases = {base.name: (base.image_id, base.retired) for base in found.bases}
    assert bases == {
        orphan.name: (OTHER_ID, False),
        unmarked.name: (None, False),
        forged.name: (None, False),
        "0" * 40: (None, True),
    }
    usage = reclaimable(found.bases)
    counts = (usage.orphans.count, usage.unmarked.count, usage.retired.count)
    assert counts == (1, 2, 1)
    assert usage.unmarked.bytes == 8


def test_a_base_with_another_name_elsewhere_frees_nothing(store: Store) -> None:
    """A base that is a link of another store's image is not counted as reclaimable."""
    base = Path(store.cache_dir, cache_name(OTHER_ID))
    base.write_bytes(b"base")
    os.link(base, Path(store.cache_dir).parent / OTHER_ID)
    found = scan_and_close(store)
    assert len(found.bases) == 1
    assert reclaimable(found.bases) == reclaimable([])


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
def test_a_cache_full_of_foreign_names_is_looked_at_in_part(
    store: Store, monkeypatch: pytest.MonkeyPatch, make: object
) -> None:
    """However many names a node creates, of whatever kind, so many are looked at and no more."""
    monkeypatch.setattr(scan_module, "MOST_BASES", 10)
    for number in range(50):
        make(Path(store.cache_dir, f"{number:040x}"))  # type: ignore[operator]
    looks = count_looks(store, monkeypatch)
    found = scan_and_close(store)
    assert len(looks) == 11
    assert found.present == [ID]
    assert found.has_more_bases
    assert len(found.bases) == (10 if make is Path.touch else 0)


@pytest.mark.parametrize("name", ["{:040x}", "whatever-{}"])
def test_a_list_of_the_cache_that_is_cut_off_hides_no_link(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """If the cache has more names than are listed, the links of images are found all the same."""
    monkeypatch.setattr(scan_module, "MOST_FOREIGN_NAMES", 10)
    for number in range(500):
        Path(store.cache_dir, name.format(number)).touch()
    found = scan_and_close(store)
    assert found.present == [ID]
    assert found.has_more_bases
    assert len(found.bases) <= 11


def test_an_ordinary_cache_has_no_more_bases(store: Store) -> None:
    """A cache with a few bases is looked at as a whole, and says so."""
    Path(store.cache_dir, "0" * 40).touch()
    assert not scan_and_close(store).has_more_bases
