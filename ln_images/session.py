"""Turn ``OS_*`` variables or a ``clouds.yaml`` entry into a session with Keystone, Glance and Nova.

This module holds every limit on what a service may send (:class:`_Transport`), and it turns the
exceptions of the libraries into ours (:func:`_translate`).
"""

import contextlib
import os
import re
import signal
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import glanceclient.exc
import requests.exceptions
from keystoneauth1 import exceptions, loading
from keystoneauth1.loading import Opt
from keystoneauth1.session import Session, TCPKeepAliveAdapter
from requests.utils import select_proxy

from ln_images import __version__
from ln_images.model import (
    AnswerTooLargeError,
    ConfigurationError,
    LnImagesError,
    TemporaryError,
)

_CLIENT: dict[str, Any] = {"app_name": "ln-images", "app_version": __version__}
_LONGEST_CAUSE = 200
_MOST_BYTES = 64 * 1024 * 1024
# The most requests of one query. A page has up to 1000 images, so this is enough for two million.
_MOST_REQUESTS = 2000
# keystoneauth sends a request again after a 401, with a new token.
_MOST_REQUESTS_OF_ONE_URL = 2
_REDIRECTS = (301, 302, 303, 305, 307, 308)
_BUSY = (429, 503)
# What a proxy answers if it refuses a request or does not reach the server (RFC 9110, section 15).
_PROXY_ANSWERS = (403, 407, 502, 503, 504)
# An application credential carries its scope; Keystone refuses one that is given beside it.
_SCOPE = re.compile(r"system_scope|trust_id|(project|domain|project_domain)_(id|name)")
# [SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:992)
# [SSL] record layer failure (_ssl.c:1006)
_PLAIN_HTTP = re.compile("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|record layer failure|wrong v")
# ... Failed to establish a new connection: [Errno 111] Connection refused'))
# ... (Caused by SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed
_CAUSE = re.compile(r"\[(?:Errno -?\d+|SSL: \w+)\] ([^\[\]'\"()]+)")


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
        overrides: Mapping[str, str],
        timeout: float,
    ) -> None:
        self.session = session
        self.region = region
        self.interface = interface
        self.overrides = overrides
        self._transport = _Transport(response_seconds=2 * timeout)
        auth_url = getattr(session.auth, "auth_url", None)
        if auth_url:
            self._transport.allow(_origin(auth_url))
        for scheme in ("http://", "https://"):
            session.session.mount(scheme, self._transport)

    def endpoint(self, service_type: str) -> str:
        """Return the unversioned URL of a service, and allow requests to it.

        The clients append ``/v2/...``, even if the catalog's URL ends in a version. Raises
        ConfigurationError if the catalog has no such service.
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
                f"the catalog has no service of type {service_type} for this credential;"
                " check OS_PROJECT_NAME, OS_REGION_NAME and OS_INTERFACE"
            )
        unversioned = re.sub(r"/v\d+(\.\d+)?/?$", "", url).rstrip("/")
        self.allow(unversioned)
        return unversioned

    def allow(self, endpoint: str) -> None:
        """Allow requests with a token to every path below ``endpoint``."""
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
        """Bound a query of one or more requests, and translate whatever goes wrong into our errors.

        Each response must be complete within twice ``--timeout``. An alarm enforces that: a server
        can send headers and body byte by byte for ever, and keystoneauth1 5.18.1 waits for its own
        lock if discovery is answered with 401. The transport restarts the alarm with each request.
        """
        seconds = self._transport.response_seconds

        def interrupt(*_: object) -> None:
            raise TemporaryError(
                f"{service} did not send a complete response within {seconds:g} s;"
                " check its log and the network"
            )

        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            self._transport.begin_query()
            yield
        except Exception as error:
            raise _translate(service, error) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


class _Transport(TCPKeepAliveAdapter):
    """The HTTP adapter of every request. It enforces the limits on what a service may send.

    - A request with a token goes to an endpoint that we chose, and to nothing else: not to another
      host that a redirect or the ``next`` link of a page names.
    - A query has a bounded number of requests.
    - A response is complete within ``response_seconds``, and has a bounded number of bytes after
      decompression.
    """

    def __init__(self, response_seconds: float) -> None:
        self.response_seconds = response_seconds
        self._allowed: list[str] = []
        self._requests: list[str] = []
        super().__init__()

    def allow(self, endpoint: str) -> None:
        """Allow requests with a token to every path below ``endpoint``."""
        if endpoint not in self._allowed:
            self._allowed.append(endpoint)

    def begin_query(self) -> None:
        """Forget the requests of the query before, and start the alarm."""
        self._requests = []
        self._restart_alarm()

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Send one request and return its response, completely read.

        Raises _ResponseError or LnImagesError if the request or the response breaks a limit.
        """
        self._refuse_other_endpoints(request)
        self._count(request.url)
        self._restart_alarm()
        proxy = select_proxy(request.url, kwargs.get("proxies"))
        try:
            response = super().send(request, *args, **kwargs)
        except requests.exceptions.ProxyError as error:
            raise _proxy_error(proxy, _cause(error)) from None
        with contextlib.closing(response):
            self._refuse_redirect(request.url, response)
            if proxy and _is_from_proxy(response):
                raise _proxy_error(proxy, f"HTTP {response.status_code}")
            if response.status_code in _BUSY:
                raise _ResponseError(f"HTTP {response.status_code}{_wait_hint(response)}")
            response._content = _read(response)
        return response

    def _restart_alarm(self) -> None:
        # The alarm repeats every second in case a library swallows the first exception.
        signal.setitimer(signal.ITIMER_REAL, self.response_seconds, 1)

    def _refuse_other_endpoints(self, request: Any) -> None:
        if "X-Auth-Token" not in request.headers:
            return
        path = urllib.parse.urlsplit(request.url).path
        below = [url for url in self._allowed if _is_below(request.url, url)]
        if not below or ".." in path.split("/"):
            raise ConfigurationError(
                f"{_without_secrets(request.url)} is not below an endpoint of this cloud; we did not"
                " send the token there; check the service that names it, or OS_AUTH_URL"
            )

    def _count(self, url: str) -> None:
        self._requests.append(url)
        if len(self._requests) > _MOST_REQUESTS:
            raise _ResponseError(f"one query needs more than {_MOST_REQUESTS} requests")
        if self._requests.count(url) > _MOST_REQUESTS_OF_ONE_URL:
            raise _ResponseError("its pages lead round in a circle")

    def _refuse_redirect(self, url: str, response: Any) -> None:
        target = response.headers.get("Location")
        if response.status_code in _REDIRECTS and target:
            raise ConfigurationError(
                f"{_without_secrets(url)} redirects to {_without_secrets(target)}; we never follow"
                " a redirect; set OS_AUTH_URL or the endpoint in the catalog to the right URL"
            )


class _ResponseError(Exception):
    """A response that we do not accept. The text says why."""


class _Session(Session):
    """A session in which a failure to get a token is Keystone's, whatever service is queried."""

    def get_auth_headers(self, auth: Any = None) -> dict[str, str] | None:
        """Return the headers that carry the token. Raises LnImagesError if there is none."""
        try:
            return super().get_auth_headers(auth)
        except Exception as error:
            raise _translate("Keystone", error) from None


def _read(response: Any) -> bytes:
    """Return the decompressed body. Raises AnswerTooLargeError if it is too large."""
    body = bytearray()
    for chunk in response.iter_content(65536):
        body += chunk
        if len(body) > _MOST_BYTES:
            raise AnswerTooLargeError(
                f"{_without_secrets(response.url)}: the response has more than"
                f" {_MOST_BYTES >> 20} MiB; check what answers there"
            )
    return bytes(body)


def _wait_hint(response: Any) -> str:
    seconds = response.headers.get("Retry-After", "")
    if seconds.isascii() and seconds.isdecimal():
        return f", it asks to wait {seconds} s"
    return ""


def _is_from_proxy(response: Any) -> bool:
    """Return whether a proxy, and not an OpenStack service, seems to have sent the response.

    The services give each response an id (oslo.middleware, ``request_id.py``).
    """
    is_from_service = "x-openstack-request-id" in response.headers
    return response.status_code in _PROXY_ANSWERS and not is_from_service


def _proxy_error(proxy: str | None, cause: str) -> TemporaryError:
    return TemporaryError(
        f"the proxy {_without_secrets(proxy or '')} of the environment answers {cause} in place of"
        " the service; check the proxy, or name the service's host in no_proxy"
    )


def _is_below(url: str, endpoint: str) -> bool:
    return url == endpoint or url.startswith((f"{endpoint}/", f"{endpoint}?"))


def _origin(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def connect(
    environment: Mapping[str, str], timeout: float, os_cloud: str | None = None
) -> Connection:
    """Return the connection for an openrc's ``OS_*`` variables, or for the entry ``os_cloud``.

    Nothing is sent yet. ``timeout`` is in seconds, for each HTTP request. Raises ConfigurationError
    if something is missing.
    """
    if os_cloud is not None:
        return _connect_by_name(os_cloud, timeout)
    variables = {name: value for name, value in environment.items() if value}
    verify = _readable_file(variables, "OS_CACERT") or True
    certificate = _readable_file(variables, "OS_CERT")
    key = _readable_file(variables, "OS_KEY")
    session = _Session(
        _plugin(variables),
        verify=verify,
        cert=(certificate, key) if certificate and key else certificate,
        timeout=timeout,
        **_CLIENT,
    )
    overrides = {
        service: variables[variable]
        for service in ("image", "compute")
        if (variable := f"OS_{service.upper()}_ENDPOINT_OVERRIDE") in variables
    }
    return Connection(
        session,
        region=variables.get("OS_REGION_NAME"),
        interface=variables.get("OS_INTERFACE") or variables.get("OS_ENDPOINT_TYPE"),
        overrides=overrides,
        timeout=timeout,
    )


def _connect_by_name(os_cloud: str, timeout: float) -> Connection:
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
        overrides = {
            service: url
            for service in ("image", "compute")
            if (url := cloud.config.get(f"{service}_endpoint_override"))
        }
        return Connection(
            cloud.get_session(),
            region=cloud.get_region_name("image"),
            interface=cloud.get_interface("image"),
            overrides=overrides,
            timeout=timeout,
        )
    except Exception as error:
        raise ConfigurationError(
            f"--os-cloud {os_cloud}: {_cause(error)}; check its entry in clouds.yaml"
        ) from None


def _plugin(variables: Mapping[str, str]) -> Any:
    """Return the auth plugin that ``OS_AUTH_TYPE`` names, with its options from ``OS_*``."""
    auth_type = variables.get("OS_AUTH_TYPE", "password")
    if "OS_SYSTEM_SCOPE" in variables:
        raise ConfigurationError(
            "OS_SYSTEM_SCOPE is set, and Glance and Nova do not accept a token with system scope;"
            " unset it and set OS_PROJECT_NAME"
        )
    try:
        loader: Any = loading.get_plugin_loader(auth_type)
    except exceptions.NoMatchingPlugin:
        known = ", ".join(sorted(loading.get_available_plugin_names()))
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type} is not a known auth plugin; use one of {known}"
        ) from None
    values = _plugin_values(auth_type, loader, variables)
    options = {option.dest: option for option in _plugin_options(loader, variables)}
    missing = _missing_variables(values, options)
    if missing:
        raise ConfigurationError(
            f"{' and '.join(missing)} not set; run `source admin-openrc` first, or use --os-cloud"
        )
    if "auth_url" in options and not _is_url(str(values["auth_url"])):
        raise ConfigurationError("OS_AUTH_URL is not an http or https URL; correct your openrc")
    own_options = {option.dest for option in loader.get_options()}
    of_methods = {
        dest: value
        for dest, value in values.items()
        if dest not in own_options or dest == "auth_methods"
    }
    try:
        return loader.load_from_options_getter(lambda option: values.get(option.dest), **of_methods)
    except Exception as error:
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type}: {_cause(error)}; check your openrc"
        ) from None


def _plugin_options(loader: Any, variables: Mapping[str, str]) -> list[Opt]:
    """Return the options of a plugin, and those of each method that ``OS_AUTH_METHODS`` names."""
    options = list(loader.get_options())
    if "auth_methods" in {option.dest for option in options}:
        for method in _split(variables.get("OS_AUTH_METHODS", "")):
            try:
                options += loading.get_plugin_options(method)
            except exceptions.NoMatchingPlugin:
                raise ConfigurationError(
                    f"OS_AUTH_METHODS names {method}, which is not a known auth plugin; use names"
                    " such as v3password and v3totp"
                ) from None
    return options


def _plugin_values(auth_type: str, loader: Any, variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of each option, by the option's ``dest``. None if a variable is not set."""
    values: dict[str, Any] = {}
    for option in _plugin_options(loader, variables):
        # Deprecated spellings come last, as in keystoneauth1's own command lines.
        spellings = [
            f"OS_{spelling.name.replace('-', '_').upper()}"
            for spelling in (option, *option.deprecated)
        ]
        set_values = [variables[name] for name in spellings if name in variables]
        values[option.dest] = set_values[0] if set_values else option.default
    if isinstance(values.get("auth_methods"), str):
        values["auth_methods"] = _split(values["auth_methods"])
    if auth_type == "v3applicationcredential":
        return {dest: value for dest, value in values.items() if not _SCOPE.fullmatch(dest)}
    # As the openstack client does it (osc_lib.cli.client_config, ``_auth_default_domain``).
    default_domain = variables.get("OS_DEFAULT_DOMAIN", "default")
    for kind, subject in (("user", "username"), ("project", "project_name")):
        has_domain = values.get(f"{kind}_domain_id") or values.get(f"{kind}_domain_name")
        has_default = values.get("default_domain_id") or values.get("default_domain_name")
        is_known = f"{kind}_domain_id" in values
        if is_known and values.get(subject) and not has_domain and not has_default:
            values[f"{kind}_domain_id"] = default_domain
    return values


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_url(text: str) -> bool:
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    return False


def _missing_variables(values: Mapping[str, Any], options: Mapping[str, Opt]) -> list[str]:
    """Return the variables without which the plugin fails late, or without naming what it lacks."""
    needed: list[tuple[str, ...]] = []
    for dest, option in options.items():
        if option.required or option.prompt or dest == "token":
            needed.append((dest,))
    if "user_id" in options and any(option.prompt for option in options.values()):
        needed.append(("username", "user_id"))
    if "application_credential_id" in options:
        needed.append(("application_credential_id", "application_credential_name"))
    return [
        f"OS_{alternatives[0].upper()}"
        for alternatives in needed
        if not any(values.get(name) for name in alternatives)
    ]


def _readable_file(variables: Mapping[str, str], variable: str) -> str | None:
    """Return the path in a variable. Raises ConfigurationError if we cannot read the file.

    Otherwise the error would appear only inside a request, without the file's name.
    """
    path = variables.get(variable)
    if path is not None and not os.access(path, os.R_OK):
        raise ConfigurationError(f"{variable}={path} cannot be read; correct the path or its mode")
    return path


def _translate(service: str, error: Exception) -> LnImagesError:
    """Return our error for an exception of a library, raised while ``service`` was queried.

    We do not repeat what a service says of itself, because it could contain a secret. The order
    matters: the first line that fits decides.
    """
    if isinstance(error, LnImagesError):
        return error

    # keystoneauth1: "The request you have made requires authentication. (HTTP 401)"
    # glanceclient: "HTTP 403 Forbidden: ..."
    status = getattr(error, "http_status", None) or getattr(error, "code", None)
    what = f"HTTP {status}" if isinstance(status, int) else type(error).__name__
    if status in (401, 403):
        return RefusedCredentialsError(
            f"{service} refuses the credentials ({what}); check your openrc"
        )
    if service == "Keystone" and status in (400, 404):
        return ConfigurationError(
            f"{service} refuses the credentials ({what}); check your openrc and OS_AUTH_URL"
        )

    # "public endpoint for image service in nowhere region not found"
    if isinstance(error, exceptions.EndpointNotFound):
        return ConfigurationError(
            f"{_cause(error)}; check OS_PROJECT_NAME (a token without a project has no catalog),"
            " OS_REGION_NAME and OS_INTERFACE"
        )

    # "SSL exception connecting to https://...: [SSL: CERTIFICATE_VERIFY_FAILED] certificate ..."
    if isinstance(error, exceptions.SSLError) or isinstance(error.__context__, exceptions.SSLError):
        if _PLAIN_HTTP.search(str(error)):
            return ConfigurationError(
                f"{service} speaks http, not https; correct OS_AUTH_URL or the catalog"
            )
        return ConfigurationError(
            f"{service}: {_cause(error)}; set OS_CACERT to the CA that signed its certificate"
        )

    # keystoneauth1 raises a bare Exception if a credential lacks its password.
    if service == "Keystone" and type(error) is Exception:
        return ConfigurationError(
            "the credentials lack something, such as a password; check clouds.yaml or your openrc"
        )

    # Ours: "HTTP 503, it asks to wait 30 s"
    if isinstance(error, _ResponseError):
        return TemporaryError(
            f"{service} answers badly: {error}; check its log, the next pass tries again"
        )

    # "Unable to establish connection to http://...: ... [Errno 111] Connection refused'))"
    unreachable = (
        exceptions.ConnectFailure,
        exceptions.ConnectTimeout,
        exceptions.DiscoveryFailure,
        glanceclient.exc.CommunicationError,
        glanceclient.exc.InvalidEndpoint,
    )
    if isinstance(error, unreachable):
        what = f"{type(error).__name__}: {_cause(error)}"

    # All the rest, such as a KeyError or TypeError from an answer of an unexpected shape.
    return TemporaryError(
        f"{service} cannot be queried ({what}); if it is not down, check OS_AUTH_URL and the"
        " catalog"
    )


class RefusedCredentialsError(ConfigurationError):
    """A service answered 401 or 403."""


def _cause(error: Exception) -> str:
    """Return what an exception says, on one line and without a password that a URL may hold.

    Of a long one this is the innermost cause, such as "Connection refused".
    """
    text = _without_secrets(" ".join(str(error).split())).rstrip(".")
    causes = _CAUSE.findall(text)
    if causes:
        return str(causes[-1]).rstrip()
    if len(text) > _LONGEST_CAUSE:
        return f"{text[:_LONGEST_CAUSE]}..."
    return text


def _without_secrets(text: str) -> str:
    """Return ``text`` without the user and the password of each URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)
