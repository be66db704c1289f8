"""Check that the store, the cache and the cloud belong together, before anything is touched.

A wrong credential, a wrong region or a volume that is not mounted must not look like a cloud
without images.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ln_images.glance import Glance
from ln_images.model import ConfigurationError, Image
from ln_images.scan import Scan
from ln_images.store import Store

# So many images that the answer is not about are queried first, to prove that this is their cloud.
_SAMPLE = 50


class Answer(NamedTuple):
    """Glance's answer to one pass: the images that it is about, by id.

    ``is_complete`` says that these are all the images that exist.
    """

    images: Mapping[str, Image]
    is_complete: bool


def require_same_cloud(
    store: Store, on_disk: Scan, recalled_ids: Collection[str], answer: Answer, glance: Glance
) -> str | None:
    """Return None, or a warning, if the store, the cache and the cloud belong together.

    One image that Glance knows, and that has a file or a marked base here, is enough to prove it.
    ``recalled_ids`` are the images with a file that ``answer`` is not about, because an earlier
    pass judged them. Raises ConfigurationError if nothing proves it, and other LnImagesErrors if
    Glance cannot be queried.
    """
    with_file = on_disk.ids_in_store
    marked = [base.image_id for base in on_disk.bases if base.image_id is not None]
    if not with_file:
        return _judge_empty_store(store, answer, glance, has_marks=bool(marked))
    not_queried = [*on_disk.present, *recalled_ids, *marked]
    known = _find_known(answer, with_file.union(marked), not_queried, glance)
    if known & with_file:
        return None
    if known:
        return _moved_away(store)
    if not any(store.image_file(image_id) for image_id in with_file):
        # Glance has deleted its last images since the scan.
        return None
    raise ConfigurationError(
        f"Glance knows none of the {len(with_file)} images that have a file in"
        f" {store.images_dir}; check OS_AUTH_URL and OS_REGION_NAME (another"
        " cloud's?), the credential's role, and --images-dir"
    )


def _find_known(
    answer: Answer, ids: Collection[str], not_queried: Sequence[str], glance: Glance
) -> set[str]:
    """Return images among ``ids`` that Glance knows: not all of them, but one if there is one."""
    known = answer.images.keys() & ids
    if known or answer.is_complete:
        return known
    known = glance.list_ids(not_queried[:_SAMPLE]).keys() & ids
    if known:
        return known
    # Glance may have deleted just these, so only the complete list proves that it knows none.
    return glance.list_all().keys() & ids


def _judge_empty_store(store: Store, answer: Answer, glance: Glance, has_marks: bool) -> str | None:
    """Return a warning, or raise ConfigurationError, if Glance has images and none has a file here.

    Marked bases in the cache prove that the volume is mounted, because both directories are on one
    file system.
    """
    if answer.is_complete:
        has_active = any(
            image.status == "active" and image.size for image in answer.images.values()
        )
    else:
        has_active = glance.has_active()
    # The first upload may have ended since the scan.
    if not has_active or store.list_store():
        return None
    if has_marks:
        return _moved_away(store)
    raise ConfigurationError(
        f"Glance has active images and none of them has a file in {store.images_dir}; mount its"
        " volume, correct --images-dir, or, if all images are in another store, do not run"
        " ln-images here"
    )


def _moved_away(store: Store) -> str:
    return (
        f"Glance has active images and none of them has a file in {store.images_dir}: are all"
        " images in another store now? Links that exist stay"
    )
