"""Query Glance for images, with python-glanceclient."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import glanceclient
import glanceclient.exc

from ln_images.memory import LogOnChange
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
# After so many pages of one size we query pages of twice that size.
_PAGES_BEFORE_GROWTH = 4
# A tenant can create any number of queued images. So many of them are enough for a report.
MOST_IN_FLIGHT = 1000
# The longest text and the largest size that Glance's database has (glance.db.sqlalchemy.models:
# String(255) and BigInteger). What is longer did not come from Glance.
_LONGEST_TEXT = 255
_LARGEST_SIZE = 2**63 - 1
# Nova verifies an image only if it has this property (nova.image.glance, cursive.signature_utils).
_SIGNATURE = "img_signature"
# The filter for hidden images alone.
_HIDDEN = {"os_hidden": "true"}


class Glance:
    """The image service of a connection.

    Each method raises ConfigurationError if the credential is refused or there is no image
    service, and TemporaryError if the cloud cannot be reached or answers badly. A listing is
    complete, or it raises. An answer that is too large raises AnswerTooLargeError only if a single
    image is.
    """

    def __init__(self, connection: Connection, admin_role: str) -> None:
        self.connection = connection
        self._admin_role = admin_role
        # An error, so that -q does not hide it: we could do nothing for months.
        self._role_log = LogOnChange(LOG, logging.ERROR)

    def list_all(self) -> dict[str, Image]:
        """Return every image that the credential can see, by its id.

        Glance lists hidden images only if it is asked for them alone.
        """
        return self._list({}) | self._list(_HIDDEN)

    def list_in_flight(self) -> dict[str, Image]:
        """Return images whose data is not complete yet, by id.

        If there are more than ``MOST_IN_FLIGHT``, the newest are returned and a warning is logged.
        """
        status = f"in:{','.join(sorted(IN_FLIGHT))}"
        images = self._list({"status": status}, most=MOST_IN_FLIGHT)
        if len(images) >= MOST_IN_FLIGHT:
            LOG.warning(
                "Glance has %d or more images without complete data, and we report the newest %d"
                " of them; find out which project creates so many",
                MOST_IN_FLIGHT,
                MOST_IN_FLIGHT,
            )
        return images

    def list_ids(self, ids: Sequence[str]) -> dict[str, Image]:
        """Return those images among ``ids`` that the credential can see, by id."""
        images: dict[str, Image] = {}
        for start in range(0, len(ids), IDS_PER_REQUEST):
            group = ids[start : start + IDS_PER_REQUEST]
            images |= self._list_group(group, {})
            hidden = [image_id for image_id in group if image_id not in images]
            if hidden:
                images |= self._list_group(hidden, _HIDDEN)
        return images

    def _list_group(self, ids: Sequence[str], filters: Mapping[str, str]) -> dict[str, Image]:
        """Return those images among at most ``IDS_PER_REQUEST`` ids that match ``filters``.

        They fit on the first page even if a listing has each of them twice.
        """
        filters = {"id": f"in:{','.join(ids)}", **filters}
        return self._list(filters, page_size=2 * len(ids) + 1)

    def has_active(self) -> bool:
        """Return whether the credential can see an active image that has data."""
        filters = {"status": "active", "size_min": "1"}
        return bool(self._list(filters, most=1) or self._list(filters | _HIDDEN, most=1))

    def has_image(self, image_id: str) -> bool:
        """Return whether Glance, queried for this one image, has it.

        A 404 alone does not prove that it is gone: a credential without the admin role sees less,
        and a broken gateway answers 404 as well.
        """
        with self.connection.querying("Glance"):
            try:
                self._client.get(image_id)
            except glanceclient.exc.HTTPNotFound:
                return False
        return True

    def _list(
        self, filters: Mapping[str, str], most: int | None = None, page_size: int = PAGE_SIZE
    ) -> dict[str, Image]:
        """Return a whole listing, or the first ``most`` images of one.

        A tenant can give images so many properties that a full page exceeds the size that we read.
        Then we query half as many images, down to one. Glance composes the whole page nevertheless,
        which takes seconds, so only after several pages of a size we query twice as many again.
        """
        images: dict[str, Image] = {}
        pages_of_this_size = 0
        marker: str | None = None
        with self.connection.querying("Glance"):
            client = self._client
            self._check_role()
            while True:
                if most is not None:
                    page_size = min(page_size, most - len(images))
                try:
                    page = list(_list_page(client, page_size, marker, filters))
                except AnswerTooLargeError:
                    if page_size == 1:
                        raise
                    page_size //= 2
                    pages_of_this_size = 0
                    continue
                for image in page:
                    _add(images, image)
                if len(page) < page_size or len(images) == most:
                    return images
                marker = page[-1].id
                pages_of_this_size += 1
                if pages_of_this_size >= _PAGES_BEFORE_GROWTH:
                    page_size = min(2 * page_size, PAGE_SIZE)
                    pages_of_this_size = 0

    def _check_role(self) -> None:
        """Log an error if the token does not have the administrator's role.

        It is checked for each listing, because a new token of the same process may have lost it.
        """
        if self.connection.has_role(self._admin_role):
            self._role_log.log(None)
            return
        self._role_log.log(
            f"the credential does not have the role {self._admin_role}, so Glance hides other"
            " projects' private images; use another credential, or name the role with --admin-role"
        )

    @functools.cached_property
    def _client(self) -> Any:
        """Return glanceclient's images. It requests their schema once for each process."""
        endpoint = self.connection.endpoint("image")
        # keystoneauth1 formats the endpoint with the id of the project.
        override = endpoint.replace("%", "%%")
        client = glanceclient.Client(
            "2", session=self.connection.session, endpoint_override=override
        )
        return client.images


def _list_page(
    client: Any, page_size: int, marker: str | None, filters: Mapping[str, str]
) -> Iterator[Image]:
    """Yield the next ``page_size`` images after ``marker``; fewer if there are no more.

    glanceclient follows the ``next`` links if Glance's own limit of a page is lower.
    """
    documents = client.list(
        # Without visibility=all Glance leaves out other projects' community images.
        filters={"visibility": "all", **filters},
        page_size=page_size,
        limit=page_size,
        marker=marker,
    )
    return (image_of(document) for document in documents)


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
    is reported and never linked. A text that is too long is cut off. Raises TemporaryError if there
    is no id, or if it is too long.
    """

    def text(field: str) -> str | None:
        value = document.get(field)
        return value[:_LONGEST_TEXT] if isinstance(value, str) and value else None

    image_id = text("id")
    if image_id is None or image_id != document["id"]:
        raise TemporaryError("Glance lists an image without a valid id; check its log")
    size = document.get("size")
    has_size = type(size) is int and 0 <= size <= _LARGEST_SIZE
    algorithm, digest = text("os_hash_algo"), text("os_hash_value")
    return Image(
        id=image_id,
        name=text("name"),
        status=text("status"),
        disk_format=text("disk_format"),
        container_format=text("container_format"),
        size=size if has_size else None,
        importing_to=text("os_glance_importing_to_stores"),
        checksum=Checksum(algorithm, digest) if algorithm and digest else None,
        signed=_SIGNATURE in document,
    )
