"""Session -> servers."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import NotAcceptable

from ln_images.keystone import Connection
from ln_images.model import ConfigurationError, Server, TemporaryError

PAGE_SIZE = 1000
# From this microversion on Nova shows servers and services of a cell that is down (Nova 19.0.0).
_CELLS = "2.69"
# That of Nova 26.0.0. Versions 24 and 25 share 2.90, and 24.0.0 has LP#1934094: a server whose
# first unshelve failed names the deleted snapshot, while its disk is on the original.
_TRUE_NAMES = "2.93"
_SHOWN = "OS-EXT-SRV-ATTR:"


def servers(connection: Connection) -> tuple[list[Server], bool]:
    """Every server of every project and region, soft-deleted ones included.

    And whether what they name is proof.

    Every compute endpoint in the catalog is asked, since regions may share one Glance. Raises
    ConfigurationError where there is no compute service or the credential is refused, and
    TemporaryError where one cannot be asked or does not see all of its cells.
    """
    found: list[Server] = []
    proof = True
    for region, endpoint in _endpoints(connection):
        with connection.asking(f"Nova{region and f' in {region}'}") as begin:
            more, recent = _of_endpoint(connection, endpoint, begin)
        found += more
        proof = proof and recent
    return found, proof


def _endpoints(connection: Connection) -> list[tuple[str, str]]:
    """The region and URL of each compute endpoint in the catalog, on the interface in use, at ``/v2.1``."""
    interface = connection.interface or "public"
    with connection.asking("Keystone"):
        get_access = getattr(connection.session.auth, "get_access", None)
        if get_access is None:
            # Such a plugin, as admin_token, knows one endpoint and no catalog.
            found = [
                (
                    "",
                    connection.session.get_endpoint(service_type="compute", interface=interface)
                    or "",
                )
            ]
        else:
            catalog = get_access(connection.session).service_catalog
            regions = {one.region_name for one in _compute(catalog)}
            found = [
                (region or "", str(one.url) if one else "")
                for region in sorted(regions, key=str)
                for one in _compute(catalog, interface, region) or [None]
            ]
    if not any(url for _, url in found):
        raise ConfigurationError(
            "the catalog has no compute service: nothing is pruned without Nova"
        )
    for region, url in found:
        if not url:
            raise TemporaryError(
                f"Nova in {region} has no endpoint on the interface in use: nothing is pruned"
            )
        if re.search(r"/v2(/|$)", url):
            raise ConfigurationError(
                f"the catalog has no compute service at /v2.1, but {url}: nothing is pruned"
            )
    return [(region, url.rstrip("/") + "/v2.1" * ("/v2.1" not in url)) for region, url in found]


def _compute(catalog: Any, interface: Any = None, region: str | None = None) -> list[Any]:
    return [
        one
        for kind in catalog.get_endpoints_data("compute", interface, region).values()
        for one in kind
    ]


def _of_endpoint(
    connection: Connection, endpoint: str, begin: Callable[[], None]
) -> tuple[list[Server], bool]:
    nova = Adapter(connection.session, endpoint_override=endpoint, service_type="compute")

    def get(path: str, microversion: str = _CELLS, **query: str) -> Any:
        begin()
        return nova.get(path, params=query, microversion=microversion).json()

    # Only the answer to this one parameter shows the servers of a cell that is down, as UNKNOWN;
    # a list that is paged or filtered leaves them out and says nothing.
    try:
        first, proof = get("/servers/detail", _TRUE_NAMES, all_tenants="1"), True
    except NotAcceptable:
        first, proof = get("/servers/detail", all_tenants="1"), False
    found = _all_servers(get)
    # Asked last: also a cell that went down while the list was paged is told here.
    services = get("/os-services")["services"]
    far = [
        one
        for one in first["servers"]
        if one["status"] == "UNKNOWN" and "OS-EXT-STS:vm_state" not in one
    ]
    if far or "UNKNOWN" in [one["status"] for one in services]:
        raise TemporaryError(
            "Nova does not see all of its cells: nothing is pruned until they are up"
        )
    missing = {str(one["id"]) for one in first["servers"]} - {server.id for server in found}
    if missing:
        raise TemporaryError(
            f"Nova lists server {min(missing)} once and then not: nothing is pruned in this pass"
        )
    return found, proof


def _all_servers(get: Callable[..., Any]) -> list[Server]:
    """Every page of the servers of all projects.

    To a token that may list them and is no administrator's otherwise, Nova shows no kernel of any
    server, and drops ``soft_deleted`` without a word (seen on Nova 34.0.0): such a list is not the
    whole one.
    """
    found: dict[str, Server] = {}
    query = {"all_tenants": "1", "soft_deleted": "1", "limit": str(PAGE_SIZE)}
    while True:
        page = get("/servers/detail", **query)
        servers = [_server(one) for one in page["servers"]]
        if found.keys() & {server.id for server in servers}:
            raise TemporaryError(
                "Nova lists a server twice: its paging is broken, or a server was just made"
            )
        found |= {server.id: server for server in servers}
        if servers and not any(f"{_SHOWN}kernel_id" in one for one in page["servers"]):
            raise ConfigurationError(
                "Nova shows this credential less than an administrator: nothing is pruned"
            )
        if not any(link["rel"] == "next" for link in page.get("servers_links", [])):
            return list(found.values())
        if not servers:
            raise TemporaryError("Nova lists a page that brings nothing: its paging is broken")
        query["marker"] = servers[-1].id


def _server(one: Mapping[str, Any]) -> Server:
    """A server in an answer of Nova's.

    One that has no image, such as one booted from a volume, has "".
    """
    image = str((one.get("image") or {}).get("id") or "")
    task, host, kernel, ramdisk = (
        str(one.get(field) or "")
        for field in (
            "OS-EXT-STS:task_state",
            f"{_SHOWN}host",
            f"{_SHOWN}kernel_id",
            f"{_SHOWN}ramdisk_id",
        )
    )
    uses = frozenset({image, kernel, ramdisk} - {""})
    return Server(str(one["id"]), str(one["status"]), task, host, image, uses)
