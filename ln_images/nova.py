"""Session -> servers."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from ln_images.glance import PAGE_SIZE
from ln_images.keystone import Connection, asking
from ln_images.model import ConfigurationError, Server, TemporaryError

# From this microversion on Nova shows servers and services of a cell that is down (Nova 19.0.0).
_CELLS = "2.69"
_KERNEL = "OS-EXT-SRV-ATTR:kernel_id"


def servers(connection: Connection) -> list[Server]:
    """Every server of every project, soft-deleted ones included.

    Raises ConfigurationError where there is no compute service or the credential is refused, and
    TemporaryError where Nova cannot be asked or does not see all of its cells.
    """
    from keystoneauth1 import exceptions
    from keystoneauth1.adapter import Adapter

    nova = Adapter(connection.session, **connection.endpoint("compute"), default_microversion=_CELLS)
    endpoint = None
    with asking("Nova", connection.seconds):
        with contextlib.suppress(exceptions.EndpointNotFound):
            endpoint = nova.get_endpoint()
        if endpoint is None or re.search(r"/v2(/|$)", endpoint):
            raise ConfigurationError("the catalog has no compute service at /v2.1: nothing is pruned without Nova")
        # Only the answer to this one parameter shows the servers of a cell that is down, as UNKNOWN;
        # a list that is paged or filtered leaves them out and says nothing.
        first = _servers(nova.get("/servers/detail", params={"all_tenants": "1"}).json())
        servers = _all_servers(nova)
        # Asked last: also a cell that went down while the list was paged is told here.
        services = nova.get("/os-services").json()["services"]
    if "UNKNOWN" in [*(server.status for server in first + servers), *(one["status"] for one in services)]:
        raise TemporaryError("Nova does not see all of its cells: nothing is pruned until they are up")
    missing = {server.id for server in first} - {server.id for server in servers}
    if missing:
        raise TemporaryError(f"Nova lists server {min(missing)} once and then not: nothing is pruned in this pass")
    return servers


def _all_servers(nova: Any) -> list[Server]:
    """Every page of the servers of all projects.

    To a token that may list them and is no administrator's otherwise, Nova shows no kernel of any server, and drops
    ``soft_deleted`` without a word (seen on Nova 34.0.0): such a list is not the whole one.
    """
    found: dict[str, Server] = {}
    kernels_shown = False
    query = {"all_tenants": "1", "soft_deleted": "1", "limit": str(PAGE_SIZE)}
    while True:
        page = nova.get("/servers/detail", params=query).json()
        servers = _servers(page)
        if found.keys() & {server.id for server in servers}:
            raise TemporaryError("Nova lists a server twice: its paging is broken, or a server was just made")
        found |= {server.id: server for server in servers}
        kernels_shown = kernels_shown or any(_KERNEL in server for server in page["servers"])
        if found and not kernels_shown:
            raise ConfigurationError("Nova shows this credential less than an administrator: nothing is pruned")
        if not any(link["rel"] == "next" for link in page.get("servers_links", [])):
            return list(found.values())
        query["marker"] = servers[-1].id


def _servers(page: Mapping[str, Any]) -> list[Server]:
    """The servers in an answer of Nova's. One that has no image, such as one booted from a volume, has ""."""
    return [
        Server(
            id=str(server["id"]),
            status=str(server["status"]),
            task_state=str(server.get("OS-EXT-STS:task_state") or ""),
            uses=frozenset(
                str(image_id).lower()
                for image_id in (
                    (server.get("image") or {}).get("id"),
                    server.get(_KERNEL),
                    server.get("OS-EXT-SRV-ATTR:ramdisk_id"),
                )
                if image_id
            ),
        )
        for server in page["servers"]
    ]
