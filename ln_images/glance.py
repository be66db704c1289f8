"""Session -> images."""

import contextlib
import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glanceclient.v2.images import Controller
from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import NotFound

from ln_images.keystone import Connection
from ln_images.model import ConfigurationError, Image, TemporaryError
from ln_images.plan import IN_FLIGHT, is_image_id

LOG = logging.getLogger(__name__)

PAGE_SIZE = 1000
# About 2 KB of a request line, for which every server and proxy has room.
IDS_A_REQUEST = 50
# The property without which Nova verifies nothing (nova.image.glance, cursive.signature_utils).
_SIGNATURE = "img_signature"
# The property in which Nova keeps the server that it took a snapshot of
# (nova.compute.utils.create_image).
_SERVER = "instance_uuid"


class Glance:
    """The image service of a ``connection``."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def images(self, ids: Sequence[str] | None = None) -> dict[str, Image]:
        """Every image that the credential can see, by its id, or those of ``ids`` and those in flight; always whole.

        A page that fails raises: ConfigurationError where the credential is refused or there is no image
        service, TemporaryError where the cloud cannot be reached or answers badly.
        """
        if ids is not None:
            return self._listed(status=f"in:{','.join(sorted(IN_FLIGHT))}") | self.images_of(ids)
        # Without visibility=all, other projects' community images are left out, and hidden ones are
        # only ever listed by themselves.
        return self._listed() | self._listed(os_hidden="true")

    def images_of(self, ids: Sequence[str]) -> dict[str, Image]:
        """Those of ``ids`` that the credential can see. Raises as :meth:`images` does."""
        found: dict[str, Image] = {}
        for start in range(0, len(ids), IDS_A_REQUEST):
            group = ids[start : start + IDS_A_REQUEST]
            found |= self._listed(id=f"in:{','.join(group)}")
            hidden = [image_id for image_id in group if image_id not in found]
            if hidden:
                found |= self._listed(id=f"in:{','.join(hidden)}", os_hidden="true")
        return found

    def has_active(self) -> bool:
        """Whether the credential can see an active image with content.

        Raises as :meth:`images` does.
        """
        query = {"status": "active", "size_min": "1"}
        return bool(self._listed(1, **query) or self._listed(1, **query, os_hidden="true"))

    def is_gone(self, image_id: str) -> bool:
        """Whether Glance, asked for one image by itself, says that there is none.

        That alone is no proof: to others than an administrator 404 means less, and a gateway that
        is ill says it, too. Raises as :meth:`images` does.
        """
        images = self._images
        with (
            self.connection.asking("Glance") as images.http_client.begin,
            contextlib.suppress(NotFound),
        ):
            images.get(image_id)
            return False
        return True

    def _listed(self, at_most: int | None = None, **filters: str) -> dict[str, Image]:
        images = self._images
        found: dict[str, Image] = {}
        with self.connection.asking("Glance") as images.http_client.begin:
            query = {"visibility": "all"} | filters
            for document in images.list(
                page_size=at_most or PAGE_SIZE, limit=at_most, filters=query
            ):
                image = image_of(document)
                if image.id in found:
                    raise TemporaryError(
                        f"Glance lists image {image.id} twice in one listing: its paging is broken"
                    )
                found[image.id] = image
        return found

    @functools.cached_property
    def _images(self) -> Any:
        """Glanceclient's images, behind a look at each page."""
        connection = self.connection
        with connection.asking("Keystone"):
            endpoint = connection.session.get_endpoint(
                service_type="image", region_name=connection.region, interface=connection.interface
            )
        if endpoint is None:
            raise ConfigurationError(
                "the token names no image service: check OS_PROJECT_NAME and OS_REGION_NAME"
            )
        if not connection.is_administrator():
            LOG.warning(
                "the credential has no admin role: other projects' private images are not seen"
            )
        # glanceclient asks for /v2/..., also where the catalog's endpoint ends in a version
        # already.
        unversioned = re.sub(r"/v\d+(\.\d+)?/?$", "", endpoint)
        return _Images(_Pages(Adapter(connection.session, endpoint_override=unversioned)), None)


class _Images(Controller):  # type: ignore[misc]
    """Images as Glance has them: whatever they have, no schema is asked for."""

    unvalidated_model = dict


class _Pages:
    """Each page has its own time.

    One that is no list of images, or brings nothing but a next one, is broken.
    """

    begin: Callable[[], None]

    def __init__(self, glance: Adapter) -> None:
        self._glance = glance

    def get(self, url: str, **_: Any) -> tuple[Any, Any]:
        """The answer to a question, and what it says."""
        self.begin()
        answer = self._glance.get(url)
        body = answer.json() if "json" in answer.headers.get("Content-Type", "") else None
        if url.startswith("/v2/images?"):
            if not isinstance(body, dict) or not isinstance(body.get("images"), list):
                raise TemporaryError(
                    "Glance answers with something that is no list of images: look at its log"
                )
            if body.get("next") and not body["images"]:
                raise TemporaryError(
                    "Glance lists a page that brings nothing: its paging is broken"
                )
        return answer, body


def image_of(document: Mapping[str, Any]) -> Image:
    """The image in one of Glance's JSON documents.

    A field that is missing or of another type than Glance's API has counts as empty, so that the
    image is reported and never linked. Raises TemporaryError where there is not even an id.
    """
    text = defaultdict(
        str, {field: value for field, value in document.items() if isinstance(value, str)}
    )
    size = document.get("size")
    if "id" not in text:
        raise TemporaryError("Glance lists an image without an id: it answers badly")
    return Image(
        id=text["id"],
        name=text["name"],
        status=text["status"],
        disk_format=text["disk_format"],
        size=size if type(size) is int and size >= 0 else None,
        importing_to=text["os_glance_importing_to_stores"],
        checksum=(text["os_hash_algo"], text["os_hash_value"]),
        signed=_SIGNATURE in document,
        server=text[_SERVER] if is_image_id(text[_SERVER]) else "",
    )
