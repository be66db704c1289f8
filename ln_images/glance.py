"""Session -> images."""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ln_images.keystone import Connection, asking
from ln_images.model import ConfigurationError, Image, TemporaryError
from ln_images.plan import IN_FLIGHT

LOG = logging.getLogger(__name__)

PAGE_SIZE = 1000
# About 2 KB of a request line, for which every server and proxy has room.
IDS_A_REQUEST = 50


class Glance:
    """The image service of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._client: Any = None

    def images(self, ids: Sequence[str] | None = None) -> list[Image]:
        """Every image that the credential can see, or those of ``ids`` and those in flight; always whole.

        A page that fails raises: ConfigurationError where the credential is refused or there is no image
        service, TemporaryError where the cloud cannot be reached or answers badly.
        """
        client = self._glance()
        with asking("Glance", self._connection.seconds):
            # Without visibility=all, other projects' community images are left out, and hidden ones are
            # only ever listed by themselves.
            if ids is None:
                return list((_listed(client) | _listed(client, os_hidden="true")).values())
            found = _listed(client, status=f"in:{','.join(sorted(IN_FLIGHT))}")
            found |= _listed_by_id(client, ids)
        return list(found.values())

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """Glance's status of each of ``ids`` that it knows. The others are in no listing, and 404 when asked for.

        Both must say so: some images are in no listing, and a gateway that is ill answers 404, too.

        Raises ConfigurationError without an administrator's token, to which alone 404 means that the image
        is gone; otherwise as :meth:`images` does.
        """
        from glanceclient import exc

        client = self._glance()
        with asking("Keystone", self._connection.seconds):
            administrator = self._connection.is_administrator()
        if not administrator:
            raise ConfigurationError("--prune needs a credential with the role admin: nothing was pruned")
        with asking("Glance", self._connection.seconds):
            known = {image.id: image.status for image in _listed_by_id(client, ids).values()}
            for image_id in set(ids) - known.keys():
                with contextlib.suppress(exc.HTTPNotFound):
                    known[image_id] = image_of(client.images.get(image_id)).status
        return known

    def _glance(self) -> Any:
        from glanceclient.v2.client import Client

        if self._client is not None:
            return self._client
        with asking("Keystone", self._connection.seconds):
            endpoint = self._connection.session.get_endpoint(**self._connection.endpoint("image"))
            if not self._connection.is_administrator():
                LOG.warning("the credential has no admin role: other projects' private images are not seen")
        if endpoint is None:
            raise ConfigurationError("the token names no image service: check OS_PROJECT_NAME and OS_REGION_NAME")
        # glanceclient asks for /v2/..., also where the catalog's endpoint ends in a version already.
        unversioned = re.sub(r"/v\d+(\.\d+)?/?$", "", endpoint)
        self._client = Client(
            session=self._connection.session, endpoint_override=unversioned, **self._connection.endpoint("image")
        )
        return self._client


def _listed(client: Any, **filters: str) -> dict[str, Image]:
    found: dict[str, Image] = {}
    for document in client.images.list(page_size=PAGE_SIZE, filters={"visibility": "all"} | filters):
        image = image_of(document)
        if image.id in found:
            raise TemporaryError(f"Glance lists image {image.id} twice in one listing: its paging is broken")
        found[image.id] = image
    return found


def _listed_by_id(client: Any, ids: Sequence[str]) -> dict[str, Image]:
    found: dict[str, Image] = {}
    for start in range(0, len(ids), IDS_A_REQUEST):
        group = ids[start : start + IDS_A_REQUEST]
        found |= _listed(client, id=f"in:{','.join(group)}")
        hidden = [image_id for image_id in group if image_id not in found]
        if hidden:
            found |= _listed(client, id=f"in:{','.join(hidden)}", os_hidden="true")
    return found


def image_of(document: Mapping[str, Any]) -> Image:
    """The image in one of Glance's JSON documents.

    A field that is missing or of another type than Glance's API has counts as empty, so that the image
    is reported and never linked. Raises TemporaryError where there is not even an id.
    """
    image_id, size = document.get("id"), document.get("size")
    if not isinstance(image_id, str):
        raise TemporaryError("Glance lists an image without an id: it answers badly")

    def text(field: str) -> str:
        value = document.get(field)
        return value if isinstance(value, str) else ""

    return Image(
        id=image_id,
        name=text("name"),
        status=text("status"),
        disk_format=text("disk_format"),
        size=size if type(size) is int and size >= 0 else None,
        importing_to=text("os_glance_importing_to_stores"),
    )
