"""Query Glance for images, with python-glanceclient."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import glanceclient
import glanceclient.exc

from ln_images.model import (
    IN_FLIGHT,
    AnswerTooLargeError,
    Checksum,
    Image,
    TemporaryError,
)
from ln_images.session import Connection

LOG = logging.getLogger(__name__)

# Glance's own maximum (glance.conf, api_limit_max).
PAGE_SIZE = 1000
# About 2 KB of a request line, for which every server and proxy has room.
IDS_PER_REQUEST = 50
# Nova verifies an image only if it has this property (nova.image.glance, cursive.signature_utils).
_SIGNATURE = "img_signature"


class Glance:
    """The image service of a connection.

    Each method raises ConfigurationError if the credential is refused or there is no image
    service, and TemporaryError if the cloud cannot be reached or answers badly. A listing is
    complete, or it raises.
    """

    def __init__(self, connection: Connection, admin_role: str) -> None:
        self.connection = connection
        self._admin_role = admin_role

    def list_all(self) -> dict[str, Image]:
        """Return every image that the credential can see, by its id.

        Without ``visibility=all`` Glance leaves out other projects' community images. It lists
        hidden images only if it is asked for them alone.
        """
        return self._list() | self._list(os_hidden="true")

    def list_in_flight(self) -> dict[str, Image]:
        """Return the images whose data is not complete yet, by id."""
        return self._list(status=f"in:{','.join(sorted(IN_FLIGHT))}")

    def list_ids(self, ids: Sequence[str]) -> dict[str, Image]:
        """Return those images among ``ids`` that the credential can see, by id."""
        images: dict[str, Image] = {}
        for start in range(0, len(ids), IDS_PER_REQUEST):
            group = ids[start : start + IDS_PER_REQUEST]
            images |= self._list(id=f"in:{','.join(group)}")
            hidden = [image_id for image_id in group if image_id not in images]
            if hidden:
                images |= self._list(id=f"in:{','.join(hidden)}", os_hidden="true")
        return images

    def has_active(self) -> bool:
        """Return whether the credential can see an active image that has data."""
        filters = {"status": "active", "size_min": "1"}
        return bool(self._first(**filters) or self._first(**filters, os_hidden="true"))

    def has_image(self, image_id: str) -> bool:
        """Return whether Glance, queried for this one image, has it.

        A 404 alone does not prove that it is gone: a credential without the admin role sees less,
        and a broken gateway answers 404 as well.
        """
        with self.connection.querying("Glance"):
            try:
                self._images.get(image_id)
            except glanceclient.exc.HTTPNotFound:
                return False
        return True

    def _list(self, **filters: str) -> dict[str, Image]:
        """Return a whole listing, page by page.

        A tenant can give images so many properties that a full page exceeds the size that we read.
        So a page that is too large is requested again with half as many images, down to one.
        """
        images: dict[str, Image] = {}
        page_size = PAGE_SIZE
        marker: str | None = None
        with self.connection.querying("Glance"):
            while True:
                try:
                    for document in self._request(page_size, marker, filters):
                        image = image_of(document)
                        _add(images, image)
                        marker = image.id
                    return images
                except AnswerTooLargeError:
                    if page_size == 1:
                        raise
                    page_size //= 2

    def _first(self, **filters: str) -> bool:
        with self.connection.querying("Glance"):
            return any(True for _ in self._request(1, None, filters, limit=1))

    def _request(
        self,
        page_size: int,
        marker: str | None,
        filters: Mapping[str, str],
        limit: int | None = None,
    ) -> Any:
        """Return glanceclient's generator of image documents, which requests page after page."""
        arguments: dict[str, Any] = {"page_size": page_size}
        if marker is not None:
            arguments["marker"] = marker
        if limit is not None:
            arguments["limit"] = limit
        # glanceclient changes the dict that it gets.
        return self._images.list(filters={"visibility": "all", **filters}, **arguments)

    @functools.cached_property
    def _images(self) -> Any:
        """Glanceclient's images. It requests their schema once for each process."""
        endpoint = self.connection.endpoint("image")
        if not self.connection.has_role(self._admin_role):
            # An error, so that -q does not hide it: the tool may do nothing for months.
            LOG.error(
                "the credential does not have the role %s, so Glance hides other projects' private"
                " images; use another credential, or name the role with --admin-role",
                self._admin_role,
            )
        client = glanceclient.Client(
            "2", session=self.connection.session, endpoint_override=endpoint
        )
        return client.images


def _add(images: dict[str, Image], image: Image) -> None:
    """Add an image to a listing. Raises TemporaryError if another of the same id is in it."""
    if images.get(image.id, image) != image:
        raise TemporaryError(
            f"Glance lists image {image.id} twice, with different fields, in one listing;"
            " check its database and what is in front of it"
        )
    images[image.id] = image


def image_of(document: Mapping[str, Any]) -> Image:
    """Return the image in one of Glance's JSON documents.

    A field that is missing, or whose type is not that of Glance's API, is None. So such an image
    is reported and never linked. Raises TemporaryError if there is no id.
    """

    def text(field: str) -> str | None:
        value = document.get(field)
        return value if isinstance(value, str) and value else None

    image_id = text("id")
    if image_id is None:
        raise TemporaryError("Glance lists an image without an id; check its log")
    size = document.get("size")
    algorithm, digest = text("os_hash_algo"), text("os_hash_value")
    return Image(
        id=image_id,
        name=text("name"),
        status=text("status"),
        disk_format=text("disk_format"),
        container_format=text("container_format"),
        size=size if type(size) is int and size >= 0 else None,
        importing_to=text("os_glance_importing_to_stores"),
        checksum=Checksum(algorithm, digest) if algorithm and digest else None,
        signed=_SIGNATURE in document,
    )
