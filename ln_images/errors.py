"""Turn the exceptions of other libraries into ours, in one line that repeats no secret."""

import re

import glanceclient.exc
from keystoneauth1 import exceptions

from ln_images.model import ConfigurationError, LnImagesError, TemporaryError

_LONGEST_CAUSE = 200
# [SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:992)
# [SSL] record layer failure (_ssl.c:1006)
_PLAIN_HTTP = re.compile("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|record layer failure|wrong v")
# ... Failed to establish a new connection: [Errno 111] Connection refused'))
# ... (Caused by SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed
# ... 'Unable to connect to proxy', OSError('Tunnel connection failed: 403 Forbidden')))
_CAUSE = re.compile(
    r"(?:\[(?:Errno -?\d+|SSL: \w+)\] |(?=Tunnel connection failed))([^\[\]'\"()]+)"
)
# http://user:password@proxy:3128/
_USER_INFO = re.compile(r"//[^/\s]*@")


class RefusedCredentialsError(ConfigurationError):
    """A service answered 401 or 403."""


class ResponseError(Exception):
    """A response that we do not accept. The text says why."""


def translate(service: str, error: Exception) -> LnImagesError:
    """Return our error for an exception of a library, raised while ``service`` was queried.

    We do not repeat what a service says of itself, because it could contain a secret. Above each
    case is what such an exception says. The order matters: the first case that fits decides.
    """
    if isinstance(error, LnImagesError):
        return error

    # keystoneauth1: "The request you have made requires authentication. (HTTP 401)"
    # glanceclient: "HTTP 403 Forbidden: You are not authorized to complete this action."
    status = getattr(error, "http_status", None) or getattr(error, "code", None)
    what = f"HTTP {status}" if isinstance(status, int) else type(error).__name__
    if status in (401, 403):
        return _refused_credentials(service, what)

    # "Expecting to find domain in project. ... (HTTP 400)"
    if service == "Keystone" and status in (400, 404):
        return ConfigurationError(
            f"Keystone refuses the credentials ({what}); check your openrc and OS_AUTH_URL"
        )

    # "The service catalog is empty."
    if isinstance(error, exceptions.EndpointNotFound):
        return ConfigurationError(
            f"{cause(error)}; check OS_PROJECT_NAME (a token without a project has no catalog),"
            " OS_REGION_NAME and OS_INTERFACE"
        )

    # "SSL exception connecting to https://...: [SSL: CERTIFICATE_VERIFY_FAILED] certificate ..."
    if isinstance(error, exceptions.SSLError) or isinstance(error.__context__, exceptions.SSLError):
        if _PLAIN_HTTP.search(str(error)):
            return ConfigurationError(
                f"{service} speaks http, not https; correct OS_AUTH_URL or the catalog"
            )
        return ConfigurationError(
            f"{service}: {cause(error)}; set OS_CACERT to the CA that signed its certificate"
        )

    # keystoneauth1 raises a bare Exception if a credential lacks its password.
    if service == "Keystone" and type(error) is Exception:
        return ConfigurationError(
            "the credentials lack something, such as a password; check clouds.yaml or your openrc"
        )

    # Ours: "HTTP 503, it asks to wait 30 s"
    if isinstance(error, ResponseError):
        return TemporaryError(
            f"{service} answers badly: {error}; check its log, or wait for the next pass"
        )

    # "Unable to establish connection to http://...: ... [Errno 111] Connection refused'))"
    # "Could not find versioned identity endpoints when attempting to authenticate. ..."
    unreachable = (
        exceptions.ConnectFailure,
        exceptions.ConnectTimeout,
        exceptions.DiscoveryFailure,
        glanceclient.exc.CommunicationError,
        glanceclient.exc.InvalidEndpoint,
    )
    if isinstance(error, unreachable):
        what = f"{type(error).__name__}: {cause(error)}"

    # All the rest, such as a KeyError or TypeError from an answer of an unexpected shape.
    return TemporaryError(
        f"{service} cannot be queried ({what}); if it is not down, check OS_AUTH_URL and the"
        " catalog"
    )


def _refused_credentials(service: str, what: str) -> RefusedCredentialsError:
    """Return the error for ``service`` that answered ``what``, with a remedy.

    A service whose configuration has no service_type answers 401 to every credential with access
    rules (keystonemiddleware 13.0.1, auth_token/__init__.py, validate_allowed_request).
    """
    remedy = "check your openrc"
    if service != "Keystone":
        remedy += (
            "; if the credential has access rules, check them, and service_type in the service's"
            " [keystone_authtoken]"
        )
    return RefusedCredentialsError(f"{service} refuses the credentials ({what}); {remedy}")


def cause(error: Exception) -> str:
    """Return what an exception says, on one line and without a password that a URL may hold.

    Of a long one this is the innermost cause, such as "Connection refused".
    """
    text = without_passwords(" ".join(str(error).split())).rstrip(".")
    causes = _CAUSE.findall(text)
    if causes:
        return str(causes[-1]).rstrip()
    if len(text) > _LONGEST_CAUSE:
        return f"{text[:_LONGEST_CAUSE]}..."
    return text


def without_passwords(text: str) -> str:
    """Return ``text`` without the user and the password of each URL in it."""
    return _USER_INFO.sub("//", text)
