"""A small compute endpoint that answers as Nova does, for tests that cannot wait for a whole Nova.

Its answers were seen on a real Nova 34.0.0 API (microversions 2.68 to 2.104) with three cells. It
knows the lists that matter here: ``/servers/detail`` with ``all_tenants``, ``deleted``,
``soft_deleted``, ``status``, ``limit`` and ``marker``, and ``/os-services``. Any other filter
counts as one that Nova does not know, and a status that is a task's, such as REBUILD, cannot be
filtered by.
"""

import contextlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import Conflict

NEWEST = (2, 104)
_CELLS, _STRICT = (2, 69), (2, 75)
_PAGING = {"limit", "marker", "sort_key", "sort_dir"}
_KNOWN = {"all_tenants", "deleted", "soft_deleted", "status"} | _PAGING
_TRUE, _FALSE = {"1", "t", "true", "on", "y", "yes"}, {"0", "f", "false", "off", "n", "no"}
_VM_STATES = {
    "SHUTOFF": "stopped",
    "BUILD": "building",
    "VERIFY_RESIZE": "resized",
    "RESCUE": "rescued",
}
_VM_STATES |= {"SOFT_DELETED": "soft-delete", "SHELVED_OFFLOADED": "shelved_offloaded"}
_VM_STATES |= {
    name: name.lower() for name in ("ACTIVE", "PAUSED", "SUSPENDED", "ERROR", "DELETED", "SHELVED")
}
_UP = {
    "binary": "nova-compute",
    "host": "compute-1",
    "zone": "nova",
    "status": "enabled",
    "state": "up",
}
_FAULTS = {400: "badRequest", 403: "forbidden"}


@dataclass(frozen=True)
class Fault:
    """What is said in place of the true answer.

    A status and a body, or, with ``hang``, nothing at all.
    """

    status: int = 200
    body: bytes = b"<html>"
    hang: bool = False


@dataclass(frozen=True)
class Asked:
    """One request.

    Its path without ``/v2.1``, its parameters, and the microversion as it was sent.
    """

    path: str
    query: dict[str, str]
    microversion: str


class RefusedError(Exception):
    """Nova's word for a request that it does not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def server(
    server_id: str, image: str = "", status: str = "ACTIVE", **changes: Any
) -> dict[str, Any]:
    """A server as an administrator sees it; without an image it was booted from a volume.

    ``task`` is its task.
    """
    return {
        "id": server_id,
        "name": f"name of {server_id}",
        "status": status,
        "tenant_id": "p" * 32,
        "created": "2026-01-01T00:00:00Z",
        "image": {
            "id": image,
            "links": [{"rel": "bookmark", "href": f"http://nova/images/{image}"}],
        }
        if image
        else "",
        "OS-EXT-STS:task_state": changes.pop("task", None),
        # A server in REBUILD or REBOOT is still active, and the task tells the rest.
        "OS-EXT-STS:vm_state": _VM_STATES.get(status, "active"),
        # A server that was offloaded, or never got to a host, has none.
        "OS-EXT-SRV-ATTR:host": None if status == "SHELVED_OFFLOADED" else "compute-1",
        "OS-EXT-SRV-ATTR:kernel_id": "",
        "OS-EXT-SRV-ATTR:ramdisk_id": "",
    } | changes


@contextlib.contextmanager
def in_catalog(identity: Adapter, *endpoints: tuple[str, str, str]) -> Iterator[None]:
    """A compute service in a real Keystone's catalog, at each ``(region, interface, URL)``."""
    service = identity.post("/services", json={"service": {"type": "compute"}}).json()["service"][
        "id"
    ]
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

    ``servers`` are all servers, deleted ones too, newest first as Nova lists them. Those whose ids
    are in ``down`` lie in a cell that is down, with the compute hosts ``down_hosts``. ``max_limit``
    is Nova's longest page. ``faults`` maps a part of a request, as ``/os-services`` or ``marker=``,
    to what is said to such a request. ``newest`` is its newest microversion. Without
    ``all_filters`` the token is one that may list all projects and is no administrator's otherwise:
    what it may not filter by is dropped without a word, and host, kernel and ramdisk are not shown.
    ``asked`` are the requests.
    """

    daemon_threads = True

    def __init__(self, *servers: dict[str, Any], max_limit: int = 1000) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v2.1"
        self.servers, self.max_limit = list(servers), max_limit
        self.services: list[dict[str, Any]] = [_UP]
        self.down: set[str] = set()
        self.down_hosts: set[str] = set()
        self.faults: dict[str, Fault] = {}
        self.newest = NEWEST
        self.all_filters = True
        self.asked: list[Asked] = []
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

    def cell_down(self, *server_ids: str, host: str = "compute-2") -> None:
        """Takes down a cell that has these servers and this host."""
        self.down |= set(server_ids)
        self.down_hosts.add(host)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that hang up early are what the hanging is for."""

    def services_shown(self, version: tuple[int, int]) -> dict[str, Any]:
        """The answer to ``/os-services``.

        Of a cell that is down, only the names of its hosts are known.
        """
        unknown = [
            {"binary": "nova-compute", "host": host, "status": "UNKNOWN"}
            for host in sorted(self.down_hosts)
        ]
        return {"services": self.services + (unknown if version >= _CELLS else [])}

    def servers_shown(
        self, query: dict[str, str], version: tuple[int, int], base: str
    ) -> dict[str, Any]:
        """The answer to ``/servers/detail``.

        ``base`` is the URL that was asked, without its parameters.
        """
        size, tenants = self._checked(query, version)
        # To one who may not filter as an administrator does, the filter is not there, and the cell
        # may be told of.
        filters = {
            key: query[key]
            for key in query.keys() & _KNOWN
            if self.all_filters or "deleted" not in key
        }
        seen = [
            one
            for one in self._after(query.get("marker"))
            if one["id"] not in self.down and tenants
        ]
        hidden = () if self.all_filters else ("OS-EXT-SRV-ATTR:",)
        page = [
            {key: value for key, value in one.items() if not key.startswith(hidden)}
            for one in seen
            if _matches(one, filters)
        ][:size]
        if version >= _CELLS and filters.keys() <= {"all_tenants"} and tenants:
            page = self._unknown(base)[: size - len(page)] + page
        answer: dict[str, Any] = {"servers": page}
        if size and len(page) == size:
            following = {key: query[key] for key in sorted(query.keys() & _KNOWN)} | {
                "marker": page[-1]["id"]
            }
            answer["servers_links"] = [
                {"rel": "next", "href": f"{base}?{urllib.parse.urlencode(following)}"}
            ]
        return answer

    def _checked(self, query: dict[str, str], version: tuple[int, int]) -> tuple[int, bool]:
        """The size of the page, and whether every project is asked for.

        Nobody's own project has servers here.
        """
        unknown = sorted(query.keys() - _KNOWN)
        if unknown and version >= _STRICT:
            raise RefusedError(400, f"'{unknown[0]}' does not match any of the regexes: '^_'")
        limit, tenants = (
            query.get("limit", str(self.max_limit)),
            query.get("all_tenants", "0").lower(),
        )
        if not re.fullmatch("[0-9]+", limit):
            raise RefusedError(400, f"Invalid input for query parameters limit. Value: {limit}.")
        if tenants and tenants not in _TRUE | _FALSE:
            raise RefusedError(400, f"Unrecognized value '{tenants}'")
        if query.get("status", "ACTIVE").upper() not in _VM_STATES:
            raise RefusedError(400, "Invalid status value")
        return min(int(limit), self.max_limit), tenants not in _FALSE

    def _after(self, marker: str | None) -> list[dict[str, Any]]:
        """The servers older than the marker, which may be one that the list itself leaves out."""
        if marker is None:
            return self.servers
        if marker in self.down:
            raise RefusedError(500, "Unexpected API Error. Please contact the administrator")
        ids = [one["id"] for one in self.servers]
        if marker not in ids:
            raise RefusedError(400, f"marker [{marker}] not found")
        return self.servers[ids.index(marker) + 1 :]

    def _unknown(self, base: str) -> list[dict[str, Any]]:
        """What Nova knows of the servers of a cell that is down.

        The oldest first, and no deleted ones.
        """
        return [
            {key: one[key] for key in ("id", "tenant_id", "created")}
            | {
                "status": "UNKNOWN",
                "links": [{"rel": "self", "href": f"{base.removesuffix('detail')}{one['id']}"}],
            }
            for one in reversed(self.servers)
            if one["id"] in self.down and one["status"] not in {"DELETED", "SOFT_DELETED"}
        ]


def _matches(one: dict[str, Any], filters: dict[str, str]) -> bool:
    """Whether Nova's filters let a server pass.

    Any text in ``soft_deleted`` counts as yes, "false" and "0" too.
    """
    wanted = filters.get("status", "").upper()
    if wanted and one["OS-EXT-STS:vm_state"] != _VM_STATES[wanted]:
        return False
    deleted = wanted == "DELETED" or filters.get("deleted", "").lower() in _TRUE
    if one["status"] == "SOFT_DELETED":
        return filters["soft_deleted"] != "" if "soft_deleted" in filters else deleted
    return deleted is (one["status"] == "DELETED")


class _Handler(BaseHTTPRequestHandler):
    server: Compute
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        microversion = self.headers.get("OpenStack-API-Version", "").removeprefix("compute ")
        self.server.asked.append(Asked(url.path.removeprefix("/v2.1"), query, microversion))
        fault = next(
            (fault for part, fault in self.server.faults.items() if part in self.path), None
        )
        if fault is None:
            self._answer(url.path, query, microversion)
        elif fault.hang:
            self.close_connection = True
            self.server.ended.wait(60)
        else:
            self._send(fault.status, fault.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keeps the test's output clean."""

    def _answer(self, path: str, query: dict[str, str], microversion: str) -> None:
        try:
            self._send(200, json.dumps(self._document(path, query, microversion)).encode())
        except RefusedError as refusal:
            error = {"code": refusal.status, "message": str(refusal)}
            word = "error" if refusal.status == 401 else _FAULTS.get(refusal.status, "computeFault")
            self._send(refusal.status, json.dumps({word: error}).encode())

    def _document(self, path: str, query: dict[str, str], microversion: str) -> dict[str, Any]:
        if path.rstrip("/") == "/v2.1":
            newest = ".".join(map(str, self.server.newest))
            return {
                "version": {
                    "id": "v2.1",
                    "status": "CURRENT",
                    "version": newest,
                    "min_version": "2.1",
                }
            }
        if not self.headers.get("X-Auth-Token"):
            raise RefusedError(401, "The request you have made requires authentication.")
        version = _version(microversion, self.server.newest)
        if path == "/v2.1/os-services":
            return self.server.services_shown(version)
        if path == "/v2.1/servers/detail":
            return self.server.servers_shown(query, version, f"http://{self.headers['Host']}{path}")
        raise RefusedError(404, "The resource could not be found.")

    def _send(self, status: int, body: bytes) -> None:
        self.close_connection = True
        self.send_response_only(status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def _version(said: str, newest: tuple[int, int]) -> tuple[int, int]:
    """The microversion of a request; without one it is the oldest."""
    if said == "latest":
        return newest
    found = re.fullmatch(r"(\d+)\.(\d+)", said or "2.1")
    if not found:
        raise RefusedError(
            400,
            f"API Version String {said} is of invalid format. Must be of format MajorNum.MinorNum.",
        )
    version = (int(found[1]), int(found[2]))
    if not (2, 1) <= version <= newest:
        most = ".".join(map(str, newest))
        raise RefusedError(
            406,
            f"Version {said} is not supported by the API. Minimum is 2.1 and maximum is {most}.",
        )
    return version
