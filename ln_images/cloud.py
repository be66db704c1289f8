"""Environment -> session -> images. The only module that speaks HTTP.

The exceptions of keystoneauth1, glanceclient and what they stand on end here, as one of our errors.
"""

import contextlib
import logging
import os
import re
import signal
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ln_images import __version__
from ln_images.model import ConfigurationError, Image, LnImagesError, Server, TemporaryError
from ln_images.plan import IN_FLIGHT

if TYPE_CHECKING:
    from keystoneauth1.loading import BaseLoader, Opt
    from keystoneauth1.plugin import BaseAuthPlugin
    from keystoneauth1.session import Session

LOG = logging.getLogger(__name__)

PAGE_SIZE = 1000
# About 2 KB of a request line, for which every server and proxy has room.
IDS_A_REQUEST = 50
_LINE = 200
# A service that is asked for one thing may take as long as so many requests that time out.
_REQUESTS = 20
# From this microversion on Nova shows servers and services of a cell that is down (Nova 19.0.0).
_CELLS = "2.69"
_KERNEL = "OS-EXT-SRV-ATTR:kernel_id"
_MEND = "`source admin-openrc` first, or give --os-cloud"
# An application credential carries its scope; Keystone refuses one that is given beside it.
_SCOPE = re.compile(r"system_scope|trust_id|(project|domain|project_domain)_(id|name)")


class Cloud:
    """Glance, through an authenticated session.

    ``region`` and ``interface`` choose the endpoint from the catalog, as ``OS_REGION_NAME`` and
    ``OS_INTERFACE`` do. ``timeout`` is in seconds, for one request.
    """

    def __init__(
        self, session: "Session", region: str | None, interface: str | list[str] | None, timeout: float
    ) -> None:
        self._session = session
        self._seconds = _REQUESTS * timeout
        self._client: Any = None
        self._endpoint: dict[str, Any] = {"service_type": "image", "region_name": region, "interface": interface}

    def images(self, ids: Sequence[str] | None = None) -> list[Image]:
        """Every image that the credential can see, or those of ``ids`` and those in flight; always whole.

        A page that fails raises: ConfigurationError where the credential is refused or there is no image
        service, TemporaryError where the cloud cannot be reached or answers badly.
        """
        client = self._glance()
        with _asking("Glance", self._seconds):
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
        with _asking("Keystone", self._seconds):
            administrator = self._is_administrator()
        if not administrator:
            raise ConfigurationError("--prune needs a credential with the role admin: nothing was pruned")
        with _asking("Glance", self._seconds):
            known = {image.id: image.status for image in _listed_by_id(client, ids).values()}
            for image_id in set(ids) - known.keys():
                with contextlib.suppress(exc.HTTPNotFound):
                    known[image_id] = image_of(client.images.get(image_id)).status
        return known

    def servers(self) -> list[Server]:
        """Every server of every project, soft-deleted ones included.

        Raises ConfigurationError where there is no compute service or the credential is refused, and
        TemporaryError where Nova cannot be asked or does not see all of its cells.
        """
        from keystoneauth1 import exceptions
        from keystoneauth1.adapter import Adapter

        nova = Adapter(self._session, **self._endpoint | {"service_type": "compute"}, default_microversion=_CELLS)
        endpoint = None
        with _asking("Nova", self._seconds):
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

    def _glance(self) -> Any:
        from glanceclient.v2.client import Client

        if self._client is not None:
            return self._client
        with _asking("Keystone", self._seconds):
            endpoint = self._session.get_endpoint(**self._endpoint)
            if not self._is_administrator():
                LOG.warning("the credential has no admin role: other projects' private images are not seen")
        if endpoint is None:
            raise ConfigurationError("the token names no image service: check OS_PROJECT_NAME and OS_REGION_NAME")
        # glanceclient asks for /v2/..., also where the catalog's endpoint ends in a version already.
        unversioned = re.sub(r"/v\d+(\.\d+)?/?$", "", endpoint)
        self._client = Client(session=self._session, endpoint_override=unversioned, **self._endpoint)
        return self._client

    def _is_administrator(self) -> bool:
        """Glance shows every project's images only to the role ``admin`` (its default policy)."""
        get_access = getattr(self._session.auth, "get_access", None)
        return get_access is None or "admin" in (role.lower() for role in get_access(self._session).role_names)


def connect(environment: Mapping[str, str], timeout: float, os_cloud: str | None = None) -> Cloud:
    """The cloud of an openrc's ``OS_*`` variables, or of the ``clouds.yaml`` entry ``os_cloud``.

    Nothing is sent yet. ``timeout`` is in seconds, for each HTTP request. Raises ConfigurationError
    where something is missing.
    """
    if os_cloud is not None:
        return _connect_by_name(os_cloud, timeout)
    from keystoneauth1.session import Session

    given = {name: value for name, value in environment.items() if value}
    cert, key = _file(given, "OS_CERT"), _file(given, "OS_KEY")
    session = Session(
        auth=_auth(given),
        verify=_file(given, "OS_CACERT") or True,
        cert=(cert, key) if cert and key else cert,
        timeout=timeout,
        app_name="ln-images",
        app_version=__version__,
    )
    interface = given.get("OS_INTERFACE") or given.get("OS_ENDPOINT_TYPE")
    return Cloud(session, given.get("OS_REGION_NAME"), interface, timeout)


def _connect_by_name(os_cloud: str, timeout: float) -> Cloud:
    try:
        from openstack import config
    except ImportError:
        raise ConfigurationError(
            "--os-cloud needs openstacksdk: pip install 'ln-images[clouds]', or unset OS_CLOUD and use an openrc"
        ) from None
    try:
        region = config.OpenStackConfig(app_name="ln-images", app_version=__version__).get_one(
            cloud=os_cloud, api_timeout=timeout
        )
        return Cloud(region.get_session(), region.get_region_name("image"), region.get_interface("image"), timeout)
    except Exception as error:
        raise ConfigurationError(f"--os-cloud {os_cloud}: {_line(error)}: check its entry in clouds.yaml") from None


def _auth(given: Mapping[str, str]) -> "BaseAuthPlugin":
    """The auth plugin that ``OS_AUTH_TYPE`` names, from its own options' ``OS_*`` variables."""
    from keystoneauth1 import exceptions, loading

    auth_type = given.get("OS_AUTH_TYPE", "password")
    try:
        loader: BaseLoader[BaseAuthPlugin] = loading.get_plugin_loader(auth_type)
    except exceptions.NoMatchingPlugin:
        raise ConfigurationError(f"OS_AUTH_TYPE={auth_type} is no auth plugin known here: {_MEND}") from None
    scoped = auth_type == "v3applicationcredential"

    def value(option: "Opt") -> Any:
        if scoped and _SCOPE.fullmatch(option.dest):
            return None
        return next((given[name] for name in _variables(option) if name in given), option.default)

    options = {option.dest: option for option in loader.get_options()}
    missing = _missing({dest: value(option) for dest, option in options.items()}, options)
    if missing:
        raise ConfigurationError(f"{' and '.join(missing)} not set: {_MEND}")
    if "auth_url" in options and not _is_url(str(value(options["auth_url"]))):
        raise ConfigurationError("OS_AUTH_URL is no http or https URL: correct it in your openrc")
    try:
        return loader.load_from_options_getter(value)
    except exceptions.MissingRequiredOptions as error:
        names = [_variables(option)[0] for option in error.options]
        raise ConfigurationError(f"{' and '.join(names)} not set: {_MEND}") from None
    except Exception as error:
        raise ConfigurationError(f"OS_AUTH_TYPE={auth_type}: {_line(error)}: check your openrc") from None


def _variables(option: "Opt") -> list[str]:
    """The variables that an option is read from, deprecated spellings last, as in keystoneauth1's own command lines."""
    return [f"OS_{one.name.replace('-', '_').upper()}" for one in (option, *option.deprecated)]


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _missing(values: Mapping[str, Any], options: Mapping[str, "Opt"]) -> list[str]:
    """The variables without which the plugin would fail late, or with no word of what is missing."""
    default_domain = ("default_domain_name", "default_domain_id")
    needed: list[tuple[str, ...]] = [
        (dest,) for dest, option in options.items() if option.required or option.prompt or dest == "token"
    ]
    if "user_id" in options and any(option.prompt for option in options.values()):
        needed.append(("username", "user_id"))
    if "application_credential_id" in options:
        needed.append(("application_credential_id", "application_credential_name"))
    if "user_domain_id" in options and values.get("username"):
        needed.append(("user_domain_name", "user_domain_id", *default_domain))
    if "project_domain_id" in options and values.get("project_name"):
        needed.append(("project_domain_name", "project_domain_id", *default_domain))
    return [f"OS_{names[0].upper()}" for names in needed if not any(values.get(name) for name in names)]


def _file(given: Mapping[str, str], variable: str) -> str | None:
    """The path in a variable, since a file that cannot be read fails only inside a request, and unnamed."""
    path = given.get(variable)
    if path is not None and not os.access(path, os.R_OK):
        raise ConfigurationError(f"{variable}={path} cannot be read: correct the path or its mode")
    return path


@contextlib.contextmanager
def _asking(service: str, seconds: float) -> Iterator[None]:
    """Turns whatever goes wrong while a service is asked into one of our errors, and ends what takes too long.

    The libraries let more through than their own exceptions: bare ``Exception``, ``OSError`` of requests, and
    ``KeyError`` or ``TypeError`` from answers of another shape. Some servers are never done: glanceclient follows
    ``next`` for ever, a body may come byte by byte, and keystoneauth1 5.18.1 waits for itself where a search for
    Keystone's versions is answered with 401.
    """

    def late(*_: object) -> None:
        raise TemporaryError(f"{service} has not answered whole within {seconds:.0f} s: give a longer --timeout")

    before = signal.signal(signal.SIGALRM, late)
    # Again every second, should a library swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    except (ConfigurationError, TemporaryError):
        raise
    except Exception as error:
        raise _translated(service, error) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _translated(service: str, error: Exception) -> LnImagesError:
    """Our error for one of another library's. What a service says of itself is not repeated: it could be a secret."""
    from glanceclient import exc
    from keystoneauth1 import exceptions

    status = getattr(error, "http_status", None) or getattr(error, "code", None)
    said = f"HTTP {status}" if isinstance(status, int) and status else type(error).__name__
    if status in (401, 403) or (service == "Keystone" and status in (400, 404)):
        return ConfigurationError(f"{service} refuses the credentials: {said}: check your openrc")
    if isinstance(error, exceptions.EndpointNotFound):
        return ConfigurationError(
            f"{_line(error)}: check OS_PROJECT_NAME (a token without a project has no catalog), OS_REGION_NAME and"
            " OS_INTERFACE"
        )
    if isinstance(error, exceptions.SSLError) or isinstance(error.__context__, exceptions.SSLError):
        return ConfigurationError(f"{service}: {_line(error)}: set OS_CACERT to the CA that signed it")
    if service == "Keystone" and type(error) is Exception:
        return ConfigurationError(
            "the credentials lack something, such as a password: check clouds.yaml or your openrc"
        )
    told = (exceptions.ConnectFailure, exceptions.ConnectTimeout, exceptions.DiscoveryFailure)
    if isinstance(error, (*told, exc.CommunicationError, exc.InvalidEndpoint)):
        said = f"{said}: {_line(error)}"
    return TemporaryError(f"{service} cannot be asked: {said}: if it is not down, check OS_AUTH_URL and the catalog")


def _line(error: Exception) -> str:
    """What an exception says, as one line without the password that a URL may hold."""
    text = re.sub(r"//[^/]*@", "//", " ".join(str(error).split())).rstrip(".")
    return text if len(text) <= _LINE else f"{text[:_LINE]}..."


def _listed(client: Any, **filters: str) -> dict[str, Image]:
    found: dict[str, Image] = {}
    for document in client.images.list(page_size=PAGE_SIZE, filters={"visibility": "all"} | filters):
        image = image_of(document)
        if image.id in found:
            raise TemporaryError(f"Glance lists image {image.id} twice in one listing: its paging is broken")
        found[image.id] = image
    return found


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
