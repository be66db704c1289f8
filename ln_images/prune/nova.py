"""List the compute hosts that Nova knows. We query Nova about nothing else."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import NotAcceptable

from ln_images.model import ConfigurationError, TemporaryError
from ln_images.session import Connection

# From this microversion on, Nova lists the services of a cell that is down as UNKNOWN (Nova 19.0.0,
# "Handling a down cell").
_MICROVERSION = "2.69"


class ComputeHost(NamedTuple):
    """One compute service, by its host and region. The region is "" if the catalog names none."""

    name: str
    region: str


def list_hosts(connection: Connection, region_names: Sequence[str]) -> list[ComputeHost]:
    """Return the compute hosts in every cell of every region, or of ``region_names`` alone.

    Raises ConfigurationError if a region has no compute service or no compute host, and
    TemporaryError if one cannot be queried or does not see all of its cells.
    """
    hosts = []
    queried = set()
    for region, url in _list_endpoints(connection, region_names):
        # Two regions may share one Nova.
        if url not in queried:
            queried.add(url)
            hosts += _list_hosts_of_region(connection, region, url)
    return hosts


def _list_endpoints(
    connection: Connection, region_names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the name of each region and the URL of its compute service, with its version."""
    regions = _list_regions(connection)
    unknown = sorted(set(region_names) - set(regions))
    if unknown:
        raise ConfigurationError(
            f"--region {unknown[0]}: the catalog has no compute service there; use one of"
            f" {', '.join(regions) or 'none'}"
        )
    override = connection.overrides.get("compute")
    if override is not None and connection.region is None and len(regions) > 1:
        raise ConfigurationError(
            "the endpoint override of compute is for one region, and the catalog has"
            f" {len(regions)}; set OS_REGION_NAME"
        )
    for region in region_names or regions:
        is_own_region = not connection.region or connection.region == region
        if override is not None and is_own_region:
            url: str | None = override
        else:
            url = _find_endpoint(connection, region)
        if url is None:
            raise ConfigurationError(
                f"Nova in region {region} has no endpoint on the interface in use; correct the"
                " catalog or OS_INTERFACE, or name the regions that use this cache with --region"
            )
        yield region, _versioned(url)


def _list_regions(connection: Connection) -> list[str]:
    """Return every region that has a compute service, on whatever interface.

    A plugin without a catalog, such as ``admin_token``, has one region.
    """
    own_region = connection.region or ""
    if not hasattr(connection.session.auth, "get_access"):
        return [own_region]
    regions = {endpoint.region_name or "" for endpoint in _list_catalog(connection, None, None)}
    if "compute" in connection.overrides and (own_region or not regions):
        regions.add(own_region)
    if not regions:
        raise ConfigurationError(
            "the catalog has no compute service for this credential; check OS_PROJECT_NAME"
        )
    return sorted(regions)


def _find_endpoint(connection: Connection, region: str) -> str | None:
    if not hasattr(connection.session.auth, "get_access"):
        return connection.endpoint("compute")
    interface = connection.interface or "public"
    endpoints = _list_catalog(connection, interface, region or None)
    return str(endpoints[0].url) if endpoints else None


def _list_catalog(connection: Connection, interface: Any, region: str | None) -> list[Any]:
    """Return the compute endpoints in the catalog."""
    with connection.querying("Keystone"):
        auth: Any = connection.session.auth
        catalog = auth.get_access(connection.session).service_catalog
        by_type = catalog.get_endpoints_data("compute", interface, region)
    return [endpoint for endpoints in by_type.values() for endpoint in endpoints]


def _versioned(url: str) -> str:
    """Return the URL with Nova's version, which a catalog may or may not have."""
    # http://controller:8774, http://controller:8774/v2.1, http://controller:8774/v2.1/<project id>
    if re.search(r"/v2\.1(/|$)", url):
        return url.rstrip("/")
    if re.search(r"/v2(/|$)", url):
        raise ConfigurationError(f"{url} is the endpoint of Nova's version 2; use version 2.1")
    return f"{url.rstrip('/')}/v2.1"


def _list_hosts_of_region(connection: Connection, region: str, url: str) -> list[ComputeHost]:
    where = f"Nova in region {region}" if region else "Nova"
    connection.allow(url)
    nova = Adapter(connection.session, endpoint_override=url, service_type="compute")
    with connection.querying(where):
        try:
            services = nova.get(
                "/os-services", params={"binary": "nova-compute"}, microversion=_MICROVERSION
            ).json()["services"]
        except NotAcceptable:
            raise ConfigurationError(
                f"{where} is older than 19.0.0 and does not show a cell that is down; upgrade it"
            ) from None
        computes = [service for service in services if service["binary"] == "nova-compute"]
        if any(compute["status"] == "UNKNOWN" for compute in computes):
            raise TemporaryError(f"{where} does not see all of its cells; wait until they are up")
        if not all(isinstance(compute["id"], str) for compute in computes):
            # Services have a UUID since microversion 2.53.
            raise TemporaryError(
                f"{where} does not answer with the microversion that we requested; look for a"
                " proxy that removes the header OpenStack-API-Version"
            )
        hosts = [ComputeHost(str(compute["host"]), region) for compute in computes]
    if not hosts:
        raise ConfigurationError(
            f"{where} has no compute host; name the regions that use this cache with --region"
        )
    return hosts
