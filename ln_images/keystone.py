"""Environment -> session.

How a failure of any service becomes one of our errors, and how long one may take.
"""

import contextlib
import os
import re
import signal
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keystoneauth1 import exceptions, loading
from keystoneauth1.loading import Opt
from keystoneauth1.session import Session, TCPKeepAliveAdapter

from ln_images import __version__
from ln_images.model import ConfigurationError, LnImagesError, TemporaryError

_CLIENT: dict[str, Any] = {"app_name": "ln-images", "app_version": __version__}
_LINE = 200
# Several requests may make one question, such as the search for Keystone's version before the
# token.
_REQUESTS = 2
_BODY_BYTES = 64 * 1024 * 1024
_BUSY = (429, 503)
_PLAIN_HTTP = re.compile(
    "WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|record layer failure|wrong version number"
)
# An application credential carries its scope; Keystone refuses one that is given beside it.
_SCOPE = re.compile(r"system_scope|trust_id|(project|domain|project_domain)_(id|name)")


class Connection:
    """An authenticated session, and what chooses the endpoints from its catalog.

    ``region`` and ``interface`` are as ``OS_REGION_NAME`` and ``OS_INTERFACE``. ``timeout`` is in
    seconds, for one request.
    """

    def __init__(
        self,
        session: Session,
        region: str | None,
        interface: str | list[str] | None,
        timeout: float,
    ) -> None:
        for scheme in ("http://", "https://"):
            session.session.mount(scheme, _Bounded())
        _name_keystone(session.auth)
        self.session, self.region, self.interface = session, region, interface
        self._seconds = _REQUESTS * timeout

    def is_administrator(self) -> bool:
        """Glance shows every project's images only to the role ``admin`` (its default policy).

        Raises LnImagesError.
        """
        get_access = getattr(self.session.auth, "get_access", None)
        with self.asking("Keystone"):
            return get_access is None or "admin" in (
                role.lower() for role in get_access(self.session).role_names
            )

    @contextlib.contextmanager
    def asking(self, service: str) -> Iterator[Callable[[], None]]:
        """Turns whatever goes wrong while a service is asked into one of our errors, and ends what takes too long.

        Gives a function that begins the time anew, for the next question of a series. The libraries let more through
        than their own exceptions: bare ``Exception``, ``OSError`` of requests, and ``KeyError`` or ``TypeError`` from
        answers of another shape. And some servers are never done: a body may come byte by byte, and keystoneauth1
        5.18.1 waits for itself where a search for Keystone's versions is answered with 401.
        """

        def late(*_: object) -> None:
            within = f"within {self._seconds:g} s"
            raise TemporaryError(
                f"{service} has not answered whole {within}: look at its log and the network"
            )

        def begin() -> None:
            # Again every second, should a library swallow the first.
            signal.setitimer(signal.ITIMER_REAL, self._seconds, 1)

        before = signal.signal(signal.SIGALRM, late)
        try:
            begin()
            yield begin
        except Exception as error:
            raise _translated(service, error) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _name_keystone(auth: Any) -> None:
    """Lets what goes wrong with a token be Keystone's fault, also where it was renewed while another was asked."""
    ask = getattr(auth, "get_auth_ref", None)

    def asked(*args: Any, **kwargs: Any) -> Any:
        try:
            return ask(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise _translated("Keystone", error) from None

    if ask is not None:
        auth.get_auth_ref = asked


def connect(
    environment: Mapping[str, str], timeout: float, os_cloud: str | None = None
) -> Connection:
    """The connection of an openrc's ``OS_*`` variables, or of the ``clouds.yaml`` entry ``os_cloud``.

    Nothing is sent yet. ``timeout`` is in seconds, for each HTTP request. Raises ConfigurationError
    where something is missing.
    """
    if os_cloud is not None:
        return _connect_by_name(os_cloud, timeout)
    given = {name: value for name, value in environment.items() if value}
    verify = _file(given, "OS_CACERT") or True
    cert, key = _file(given, "OS_CERT"), _file(given, "OS_KEY")
    pair = (cert, key) if cert and key else cert
    session = Session(_auth(given), verify=verify, cert=pair, timeout=timeout, **_CLIENT)
    interface = given.get("OS_INTERFACE") or given.get("OS_ENDPOINT_TYPE")
    return Connection(session, given.get("OS_REGION_NAME"), interface, timeout)


def _connect_by_name(os_cloud: str, timeout: float) -> Connection:
    try:
        from openstack import config
    except ImportError:
        raise ConfigurationError(
            "--os-cloud needs openstacksdk: pip install 'ln-images[clouds]', or unset OS_CLOUD and use an openrc"
        ) from None
    try:
        region = config.OpenStackConfig(**_CLIENT).get_one(cloud=os_cloud, api_timeout=timeout)
        return Connection(
            region.get_session(),
            region.get_region_name("image"),
            region.get_interface("image"),
            timeout,
        )
    except Exception as error:
        raise ConfigurationError(
            f"--os-cloud {os_cloud}: {_line(error)}: check its entry in clouds.yaml"
        ) from None


def _auth(given: Mapping[str, str]) -> Any:
    """The auth plugin that ``OS_AUTH_TYPE`` names, from its own options' ``OS_*`` variables."""
    auth_type = given.get("OS_AUTH_TYPE", "password")
    try:
        loader: Any = loading.get_plugin_loader(auth_type)
    except exceptions.NoMatchingPlugin:
        known = ", ".join(sorted(loading.get_available_plugin_names()))
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type} is no auth plugin known here: use one of {known}"
        ) from None
    scoped = auth_type == "v3applicationcredential"

    def value(option: Opt) -> Any:
        if scoped and _SCOPE.fullmatch(option.dest):
            return None
        # Deprecated spellings last, as in keystoneauth1's own command lines.
        names = [f"OS_{one.name.replace('-', '_').upper()}" for one in (option, *option.deprecated)]
        return next((given[name] for name in names if name in given), option.default)

    options = {option.dest: option for option in loader.get_options()}
    missing = _missing({dest: value(option) for dest, option in options.items()}, options)
    if missing:
        raise ConfigurationError(
            f"{' and '.join(missing)} not set: `source admin-openrc` first, or give --os-cloud"
        )
    if "auth_url" in options and not _is_url(str(value(options["auth_url"]))):
        raise ConfigurationError("OS_AUTH_URL is no http or https URL: correct it in your openrc")
    try:
        return loader.load_from_options_getter(value)
    except Exception as error:
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type}: {_line(error)}: check your openrc"
        ) from None


def _is_url(text: str) -> bool:
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    return False


def _missing(values: Mapping[str, Any], options: Mapping[str, Opt]) -> list[str]:
    """The variables without which the plugin would fail late, or with no word of what is missing."""
    default_domain = ("default_domain_name", "default_domain_id")
    needed: list[tuple[str, ...]] = [
        (dest,)
        for dest, option in options.items()
        if option.required or option.prompt or dest == "token"
    ]
    if "user_id" in options and any(option.prompt for option in options.values()):
        needed.append(("username", "user_id"))
    if "application_credential_id" in options:
        needed.append(("application_credential_id", "application_credential_name"))
    if "user_domain_id" in options and values.get("username"):
        needed.append(("user_domain_name", "user_domain_id", *default_domain))
    if "project_domain_id" in options and values.get("project_name"):
        needed.append(("project_domain_name", "project_domain_id", *default_domain))
    return [
        f"OS_{names[0].upper()}" for names in needed if not any(values.get(name) for name in names)
    ]


def _file(given: Mapping[str, str], variable: str) -> str | None:
    """The path in a variable, since a file that cannot be read fails only inside a request, and unnamed."""
    path = given.get(variable)
    if path is not None and not os.access(path, os.R_OK):
        raise ConfigurationError(f"{variable}={path} cannot be read: correct the path or its mode")
    return path


def _translated(service: str, error: Exception) -> LnImagesError:
    """Our error for one of another library's.

    What a service says of itself is not repeated: it could be a secret.
    """
    if isinstance(error, LnImagesError):
        return error
    status = getattr(error, "http_status", None)
    said = f"HTTP {status}" if status else type(error).__name__
    if status in (401, 403) or (service == "Keystone" and status in (400, 404)):
        return ConfigurationError(f"{service} refuses the credentials: {said}: check your openrc")
    if isinstance(error, exceptions.EndpointNotFound):
        return ConfigurationError(
            f"{_line(error)}: check OS_PROJECT_NAME (a token without a project has no catalog), OS_REGION_NAME and"
            " OS_INTERFACE"
        )
    if isinstance(error, exceptions.SSLError) or isinstance(error.__context__, exceptions.SSLError):
        if _PLAIN_HTTP.search(str(error)):
            return ConfigurationError(
                f"{service} speaks http, not https: correct OS_AUTH_URL or the catalog"
            )
        return ConfigurationError(
            f"{service}: {_line(error)}: set OS_CACERT to the CA that signed it"
        )
    if service == "Keystone" and type(error) is Exception:
        return ConfigurationError(
            "the credentials lack something, such as a password: check clouds.yaml or your openrc"
        )
    if isinstance(error, _AnswerError):
        return TemporaryError(
            f"{service} cannot be asked: {error}: look at its log, the next pass asks again"
        )
    if isinstance(
        error, (exceptions.ConnectFailure, exceptions.ConnectTimeout, exceptions.DiscoveryFailure)
    ):
        said = f"{said}: {_line(error)}"
    return TemporaryError(
        f"{service} cannot be asked: {said}: if it is not down, check OS_AUTH_URL and the catalog"
    )


def _line(error: Exception) -> str:
    """What an exception says, as one line without the password that a URL may hold.

    Of a long one, the cause.
    """
    text = re.sub(r"//[^/]*@", "//", " ".join(str(error).split())).rstrip(".")
    causes = re.findall(r"\[(?:Errno -?\d+|SSL: \w+)\] ([^\[\]'\"()]+)", text)
    if causes:
        return str(causes[-1]).rstrip()
    return text if len(text) <= _LINE else f"{text[:_LINE]}..."


class _Bounded(TCPKeepAliveAdapter):
    """What carries requests and reads no more of an answer than fits into memory, unpacked."""

    def send(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.closing(super().send(*args, **kwargs)) as answer:
            if answer.status_code in _BUSY:
                wait = answer.headers.get("Retry-After", "")
                hint = f", it asks to wait {wait} s" if wait.isascii() and wait.isdecimal() else ""
                raise _AnswerError(f"HTTP {answer.status_code}{hint}")
            body = bytearray()
            for chunk in answer.iter_content(65536):
                body += chunk
                if len(body) > _BODY_BYTES:
                    raise _AnswerError(f"an answer of more than {_BODY_BYTES >> 20} MiB")
        answer._content = bytes(body)
        return answer


class _AnswerError(Exception):
    """An answer that is none: the service is busy, or says too much."""
