"""Every HTTP request goes through here. This module holds each limit on what a service may do.

- A request goes below a URL that the user or the catalog chose, and to nothing else: not where a
  redirect, a discovery document or the ``next`` link of a page leads. So no other host ever gets
  the password or a token.
- A query has a bounded number of requests.
- A response is complete within a bounded time, and has a bounded number of bytes after
  decompression.
"""

import contextlib
import re
import signal
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import requests
from keystoneauth1.session import TCPKeepAliveAdapter
from requests.utils import select_proxy

from ln_images.errors import ResponseError, cause, without_passwords
from ln_images.model import AnswerTooLargeError, ConfigurationError, TemporaryError

_MOST_BYTES = 64 * 1024 * 1024
# The most requests of one query. A page has up to 1000 images, so this is enough for two million.
_MOST_REQUESTS = 2000
# keystoneauth sends a request again after a 401, with a new token.
_MOST_REQUESTS_OF_ONE_URL = 2
_REDIRECTS = (301, 302, 303, 305, 307, 308)
_BUSY = (429, 503)
_FIRST_ERROR = 400
# A server chooses some of the texts in our messages. They are cut off at so many characters.
_LONGEST_URL = 200
# What a proxy answers if it refuses a request or does not reach the server (RFC 9110, section 15).
_PROXY_ANSWERS = (403, 407, 502, 503, 504)


class Transport(TCPKeepAliveAdapter):
    """The HTTP adapter of a session, with the limits.

    ``response_seconds`` is the time within which each response must be complete.
    """

    def __init__(self, response_seconds: float) -> None:
        self._response_seconds = response_seconds
        self._allowed: list[str] = []
        self._requested: list[str] | None = None
        self._deadline = 0.0
        super().__init__()

    def allow(self, url: str) -> None:
        """Allow requests to ``url`` and to every path below it.

        Raises ConfigurationError if it is not an http or https URL.
        """
        self._add_allowed(_normalized(url).rstrip("/"))

    def allow_host(self, url: str) -> None:
        """Allow requests to every path on the host and port of ``url``. Raises as :meth:`allow`."""
        parts = urllib.parse.urlsplit(_normalized(url))
        self._add_allowed(f"{parts.scheme}://{parts.netloc}")

    @contextlib.contextmanager
    def query(self, service: str) -> Iterator[None]:
        """Bound the time and the number of the requests that are made in this context.

        An alarm bounds the time. The timeout of the HTTP library does not: a server can send
        headers and body byte by byte for ever. Even without a response there may be no end:
        keystoneauth1 5.18.1 waits for its own lock if discovery is answered with 401. Each request
        starts the alarm anew. A query within another one has the alarm to itself.

        The alarm rings every second. So Python handles a SIGTERM within a second even if that
        arrived directly before a system call that waits. It also rings again if a library swallows
        the exception.
        """

        def interrupt(*_: object) -> None:
            if time.monotonic() < self._deadline:
                return
            raise TemporaryError(
                f"{service} did not send a complete response within"
                f" {self._response_seconds:g} s; check its log and the network"
            )

        outer_requested = self._requested
        outer_handler = signal.signal(signal.SIGALRM, interrupt)
        try:
            self._requested = []
            self._start_alarm()
            yield
        finally:
            # First of all, and in one call, so that no alarm is left even if one rings just now.
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, outer_handler)
            self._requested = outer_requested
            if outer_requested is not None:
                self._start_alarm()

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Send one request and return its response, completely read.

        Raises ResponseError or LnImagesError if the request or the response breaks a limit.
        """
        self._refuse_other_urls(request.url)
        self._count(request.url)
        self._start_alarm()
        proxy = select_proxy(request.url, kwargs.get("proxies"))
        try:
            response = super().send(request, *args, **kwargs)
        except requests.exceptions.ProxyError as error:
            # "... 'Unable to connect to proxy', OSError('Tunnel connection failed: 403 Forbidden')"
            raise _proxy_error(proxy, f"does not let us through ({cause(error)})") from None
        with contextlib.closing(response):
            _refuse_redirect(request.url, response)
            if proxy and _is_from_proxy(request.url, response):
                raise _proxy_error(
                    proxy, f"answers HTTP {response.status_code} in place of the service"
                )
            _refuse_single_factor(response)
            if response.status_code in _BUSY:
                raise ResponseError(f"HTTP {response.status_code}{_wait_hint(response)}")
            # The text of an error could repeat a secret, and glanceclient 4.13 fails if it is JSON
            # of an unusual shape. So the clients get the status alone.
            is_error = response.status_code >= _FIRST_ERROR
            response._content = b"" if is_error else _read(response)
        return response

    def _add_allowed(self, url: str) -> None:
        if url not in self._allowed:
            self._allowed.append(url)

    def _start_alarm(self) -> None:
        self._deadline = time.monotonic() + self._response_seconds
        tick = min(1.0, self._response_seconds)
        signal.setitimer(signal.ITIMER_REAL, tick, tick)

    def _refuse_other_urls(self, url: str) -> None:
        is_allowed = any(_is_below(url, allowed) for allowed in self._allowed)
        # A server may take "/images/../x" for "/x". requests makes ".." of "%2e%2e".
        if not is_allowed or ".." in urllib.parse.urlsplit(url).path.split("/"):
            endpoints = without_passwords(" and ".join(self._allowed))
            raise ConfigurationError(
                f"{_without_query(url)}: an answer leads there, and we query only {endpoints};"
                " nothing was sent there; correct OS_AUTH_URL, the catalog, or the public URL in"
                " the configuration of the service"
            )

    def _count(self, url: str) -> None:
        if self._requested is None:
            raise RuntimeError("a request outside of a query has no limit")
        self._requested.append(url)
        if len(self._requested) > _MOST_REQUESTS:
            raise ResponseError(f"one query needs more than {_MOST_REQUESTS} requests")
        if self._requested.count(url) > _MOST_REQUESTS_OF_ONE_URL:
            raise ResponseError("its pages lead round in a circle")


def _refuse_redirect(url: str, response: Any) -> None:
    target = response.headers.get("Location")
    if response.status_code in _REDIRECTS and target:
        raise ConfigurationError(
            f"{_without_query(url)} redirects to {_without_query(target)}; we follow no redirect,"
            " since it could lead a password to another host; set OS_AUTH_URL or the endpoint in"
            " the catalog to the right URL"
        )


def _refuse_single_factor(response: Any) -> None:
    """Raise ConfigurationError if Keystone demands more than one authentication method.

    It sends a receipt for the first one then (Keystone's API, "Multi-Factor Authentication").
    """
    if "Openstack-Auth-Receipt" in response.headers:
        raise ConfigurationError(
            "Keystone demands more than one authentication method of this user; set"
            " OS_AUTH_TYPE=v3multifactor and OS_AUTH_METHODS, or use an application credential"
        )


def _read(response: Any) -> bytes:
    """Return the decompressed body. Raises AnswerTooLargeError if it is too large."""
    body = bytearray()
    for chunk in response.iter_content(65536):
        body += chunk
        if len(body) > _MOST_BYTES:
            raise AnswerTooLargeError(
                f"{_without_query(response.url)}: the response has more than"
                f" {_MOST_BYTES >> 20} MiB; check what answers there"
            )
    return bytes(body)


def _wait_hint(response: Any) -> str:
    seconds = response.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,6}", seconds):
        return f", it asks to wait {seconds} s"
    return ""


def _is_from_proxy(url: str, response: Any) -> bool:
    """Return whether a proxy, and not an OpenStack service, seems to have sent the response.

    A proxy only tunnels https, so it cannot answer there. The services give each response an id
    (oslo.middleware, ``request_id.py``).
    """
    if url.startswith("https:") or "x-openstack-request-id" in response.headers:
        return False
    return response.status_code in _PROXY_ANSWERS


def _proxy_error(proxy: str | None, what: str) -> TemporaryError:
    return TemporaryError(
        f"the proxy {without_passwords(proxy or '')} of the environment {what}; check the proxy,"
        " or name the service's host in no_proxy"
    )


def _normalized(url: str) -> str:
    """Return ``url`` as requests sends it, for example with the host in lower case."""
    try:
        return str(requests.Request("GET", url).prepare().url)
    except (requests.exceptions.RequestException, ValueError):
        raise ConfigurationError(
            f"{without_passwords(url)} is not an http or https URL; correct the endpoint in the"
            " catalog, or the variable that overrides it"
        ) from None


def _is_below(url: str, allowed: str) -> bool:
    return url == allowed or url.startswith((f"{allowed}/", f"{allowed}?"))


def _without_query(url: str) -> str:
    """Return ``url`` for a message. A query may hold a secret, and a path may be long."""
    text = without_passwords(url).partition("?")[0]
    return f"{text[:_LONGEST_URL]}..." if len(text) > _LONGEST_URL else text
