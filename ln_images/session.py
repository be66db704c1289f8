"""Make the session with Keystone, Glance and Nova from ``OS_*`` variables or ``clouds.yaml``.

``openrc.py`` turns the variables into an auth plugin. ``transport.py`` limits what a service may
do. ``errors.py`` turns other libraries' exceptions into ours.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from keystoneauth1.session import Session

from ln_images import __version__
from ln_images.errors import cause, translate
from ln_images.model import ConfigurationError
from ln_images.openrc import find_file, load_plugin, refuse_system_scope
from ln_images.transport import Transport

_CLIENT: dict[str, Any] = {"app_name": "ln-images", "app_version": __version__}
# The service types whose endpoint a user may choose: OS_IMAGE_ENDPOINT_OVERRIDE, ...
_SERVICES = ("image", "compute")
# The version at the end of an endpoint, and the project that follows it at Nova:
# http://host:9292/v2    http://host:8774/v2.1/    http://host:8774/v2.1/0d5e6b61602d758984b3bf0382
_VERSION = re.compile(r"/v\d+(\.\d+)?(/([0-9a-f]{32}|%\(\w+\)s))?/?$")


def connect(
    environment: Mapping[str, str], timeout: float, os_cloud: str | None = None
) -> "Connection":
    """Return the connection for an openrc's ``OS_*`` variables, or for the entry ``os_cloud``.

    Nothing is sent yet. ``timeout`` is in seconds, for each HTTP request. Raises ConfigurationError
    if something is missing.
    """
    if os_cloud is not None:
        return _connect_by_name(os_cloud, timeout)
    # An empty variable counts as unset, as in every OpenStack client.
    variables = {name: value for name, value in environment.items() if value}
    certificate = find_file(variables, "OS_CERT")
    key = find_file(variables, "OS_KEY")
    session = _Session(
        load_plugin(variables),
        verify=find_file(variables, "OS_CACERT") or True,
        cert=(certificate, key) if certificate and key else certificate,
        timeout=timeout,
        **_CLIENT,
    )
    overrides = {
        service: variables.get(f"OS_{service.upper()}_ENDPOINT_OVERRIDE") for service in _SERVICES
    }
    return Connection(
        session,
        region=variables.get("OS_REGION_NAME"),
        interface=variables.get("OS_INTERFACE") or variables.get("OS_ENDPOINT_TYPE"),
        overrides=overrides,
        timeout=timeout,
    )


def _connect_by_name(os_cloud: str, timeout: float) -> "Connection":
    try:
        from openstack import config
    except ImportError:
        raise ConfigurationError(
            "--os-cloud needs openstacksdk; run pip install 'ln-images[clouds]', or unset OS_CLOUD"
            " and use an openrc"
        ) from None
    try:
        clouds = config.OpenStackConfig(session_constructor=_Session, **_CLIENT)
        cloud = clouds.get_one(cloud=os_cloud, api_timeout=timeout)
        if cloud.config.get("auth", {}).get("system_scope"):
            refuse_system_scope(f"--os-cloud {os_cloud}: system_scope")
        return Connection(
            cloud.get_session(),
            region=cloud.get_region_name("image"),
            interface=cloud.get_interface("image"),
            overrides={service: cloud.get_endpoint(service) for service in _SERVICES},
            timeout=timeout,
        )
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"--os-cloud {os_cloud}: {cause(error)}; check its entry in clouds.yaml"
        ) from None


class Connection:
    """An authenticated session, and the choice of endpoints from its catalog.

    ``region`` and ``interface`` are those of ``OS_REGION_NAME`` and ``OS_INTERFACE``. ``overrides``
    has the URL that the user chose in place of the catalog's, by service type. ``timeout`` is in
    seconds, for one request.
    """

    def __init__(
        self,
        session: Session,
        *,
        region: str | None,
        interface: str | list[str] | None,
        overrides: Mapping[str, str | None],
        timeout: float,
    ) -> None:
        self.session = session
        self.region = region
        self.interface = interface
        self.overrides = {service: url for service, url in overrides.items() if url}
        self._transport = Transport(response_seconds=2 * timeout)
        for url in _list_urls(session.auth):
            self._transport.allow_host(url)
        for scheme in ("http://", "https://"):
            session.session.mount(scheme, self._transport)

    def endpoint(self, service_type: str) -> str:
        """Return the URL of a service without a version, and allow requests to it.

        The clients append ``/v2/...`` themselves, even if the catalog's URL ends in a version.
        Raises ConfigurationError if the catalog has no such service.
        """
        url: str | None = self.overrides.get(service_type)
        if url is None:
            with self.querying("Keystone"):
                url = self.session.get_endpoint(
                    service_type=service_type,
                    region_name=self.region,
                    interface=self.interface,
                )
        if url is None:
            raise ConfigurationError(
                f"{self.interface or 'public'} endpoint for {service_type} in region"
                f" {self.region}: the catalog has none; check OS_REGION_NAME and OS_INTERFACE"
            )
        endpoint = _VERSION.sub("", url).rstrip("/")
        self.allow(endpoint)
        return endpoint

    def allow(self, endpoint: str) -> None:
        """Allow requests to every path below ``endpoint``."""
        self._transport.allow(endpoint)

    def has_role(self, role: str) -> bool:
        """Return whether the token has a role of this name, in whatever case.

        A plugin that cannot know, such as ``admin_token``, counts as having it. Raises
        LnImagesError if Keystone gives no token.
        """
        get_access = getattr(self.session.auth, "get_access", None)
        if get_access is None:
            return True
        with self.querying("Keystone"):
            roles = get_access(self.session).role_names
        return role.lower() in {name.lower() for name in roles}

    def forget_token(self) -> None:
        """Make the next request authenticate anew."""
        self.session.invalidate()

    @contextlib.contextmanager
    def querying(self, service: str) -> Iterator[None]:
        """Bound a query of one or more requests, and turn whatever goes wrong into our errors.

        Each response must be complete within twice the timeout (:meth:`Transport.query`).
        """
        try:
            with self._transport.query(service):
                yield
        except Exception as error:
            raise translate(service, error) from None


class _Session(Session):
    """A session in which a failure to get a token is Keystone's, whatever service is queried."""

    def get_auth_headers(self, auth: Any = None) -> dict[str, str] | None:
        """Return the headers that carry the token. Raises LnImagesError if there is none."""
        try:
            return super().get_auth_headers(auth)
        except Exception as error:
            raise translate("Keystone", error) from None


def _list_urls(plugin: Any) -> list[str]:
    """Return the URLs that the user gave an auth plugin, such as ``auth_url`` or ``endpoint``."""
    return [
        value
        for value in vars(plugin).values()
        if isinstance(value, str) and value.lower().startswith(("http://", "https://"))
    ]
