"""A small compute endpoint that answers as Nova does, for tests that cannot wait for a whole Nova.

Its answers were seen on a real Nova 34.0.0 API (microversions 2.1 to 2.104) with three cells. It
has ``/os-services``, with its filters ``host`` and ``binary``, which is all that we query.
"""

import contextlib
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import Conflict

NEWEST = (2, 104)
# From these on, Nova shows a cell that is down, and a service has a UUID in place of a number.
_CELLS, _UUIDS = (2, 69), (2, 53)
_ERRORS = {400: "badRequest", 401: "error", 404: "itemNotFound", 406: "computeFault"}


@dataclass(frozen=True)
class Fault:
    """What is answered in place of the truth: a status and a body, or with ``hang`` nothing.

    ``location`` is where a redirect leads.
    """

    status: int = 200
    body: bytes = b"<html>"
    hang: bool = False
    location: str | None = None


@dataclass(frozen=True)
class Request:
    """One request: its path without ``/v2.1``, its parameters, and the microversion as sent."""

    path: str
    query: dict[str, str]
    microversion: str


class RefusedError(Exception):
    """What Nova says of a request that it does not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def in_catalog(identity: Adapter, *endpoints: tuple[str, str, str]) -> Iterator[None]:
    """Put a compute service into a real Keystone's catalog, at each (region, interface, URL)."""
    document = {"service": {"type": "compute"}}
    service = identity.post("/services", json=document).json()["service"]["id"]
    try:
        for region, interface, url in endpoints:
            with contextlib.suppress(Conflict):
                identity.put(f"/regions/{region}", json={"region": {}})
            endpoint = {
                "service_id": service,
                "interface": interface,
                "region_id": region,
                "url": url,
            }
            identity.post("/endpoints", json={"endpoint": endpoint})
        yield
    finally:
        identity.delete(f"/services/{service}")


class Compute(ThreadingHTTPServer):
    """It serves at ``url`` from the moment it is made until its context ends.

    ``hosts`` are the compute hosts; a conductor is there as well. ``hosts_down`` are those in a
    cell that is down. ``faults`` maps a part of a request's path to what is answered to such a
    request. ``newest`` is its newest microversion. ``requests`` are those that came. Without
    ``has_microversions`` it is behind a proxy that removes the header.
    """

    daemon_threads = True

    def __init__(self, *hosts: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v2.1"
        self.hosts = list(hosts)
        self.hosts_down: list[str] = []
        self.faults: dict[str, Fault] = {}
        self.newest = NEWEST
        self.has_microversions = True
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that hang up early are what the hanging is for."""

    def services(self, version: tuple[int, int], query: dict[str, str]) -> dict[str, Any]:
        """Return the answer to ``/os-services``.

        Of a cell that is down, only the names of its hosts are known.
        """
        services = [_service(host, "nova-compute", version) for host in self.hosts]
        services.append(_service("controller", "nova-conductor", version))
        if version >= _CELLS:
            services += [
                {"binary": "nova-compute", "host": host, "status": "UNKNOWN"}
                for host in self.hosts_down
            ]
        return {
            "services": [
                service
                for service in services
                if all(service[key] == query.get(key, service[key]) for key in ("host", "binary"))
            ]
        }


def _service(host: str, binary: str, version: tuple[int, int]) -> dict[str, Any]:
    identifier = uuid.uuid5(uuid.NAMESPACE_DNS, host + binary)
    return {
        "id": str(identifier) if version >= _UUIDS else identifier.int % 1000,
        "binary": binary,
        "host": host,
        "zone": "nova",
        "status": "enabled",
        "state": "up",
    }


class _Handler(BaseHTTPRequestHandler):
    server: Compute
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        microversion = self.headers.get("OpenStack-API-Version", "").removeprefix("compute ")
        self.server.requests.append(Request(url.path.removeprefix("/v2.1"), query, microversion))
        faults = self.server.faults
        fault = next((faults[part] for part in faults if part in self.path), None)
        if fault is None:
            self._answer(url.path, query, microversion)
        elif fault.hang:
            self.close_connection = True
            self.server.ended.wait(60)
        else:
            self._send(fault.status, fault.body, fault.location)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep the test's output clean."""

    def _answer(self, path: str, query: dict[str, str], microversion: str) -> None:
        try:
            self._send(200, json.dumps(self._document(path, query, microversion)).encode())
        except RefusedError as refusal:
            error = {"code": refusal.status, "message": str(refusal)}
            self._send(refusal.status, json.dumps({_ERRORS[refusal.status]: error}).encode())

    def _document(self, path: str, query: dict[str, str], microversion: str) -> dict[str, Any]:
        if not self.headers.get("X-Auth-Token"):
            raise RefusedError(401, "The request you have made requires authentication.")
        if not self.server.has_microversions:
            microversion = ""
        version = _version(microversion, self.server.newest)
        # A catalog may have the project in the URL.
        if re.fullmatch("/v2.1(/[0-9a-f]{32})?/os-services", path):
            return self.server.services(version, query)
        raise RefusedError(404, "The resource could not be found.")

    def _send(self, status: int, body: bytes, location: str | None = None) -> None:
        self.close_connection = True
        self.send_response_only(status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        if location is not None:
            headers["Location"] = location
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _version(sent: str, newest: tuple[int, int]) -> tuple[int, int]:
    """Return the microversion of a request; without one it is the oldest."""
    if sent == "latest":
        return newest
    match = re.fullmatch(r"(\d+)\.(\d+)", sent or "2.1")
    if match is None:
        raise RefusedError(
            400,
            f"API Version String {sent} is of invalid format. Must be of format MajorNum.MinorNum.",
        )
    version = (int(match[1]), int(match[2]))
    if not (2, 1) <= version <= newest:
        most = ".".join(map(str, newest))
        raise RefusedError(
            406,
            f"Version {sent} is not supported by the API. Minimum is 2.1 and maximum is {most}.",
        )
    return version
