"""A compute endpoint that answers like Nova 34.0.0, in the real catalog: the whole of Nova is too heavy for each run.

What it does was read in Nova's source (``nova.api.openstack.compute.servers`` and ``services``,
``nova.db.main.api.instance_get_all_by_filters_sort``): soft-deleted servers are listed only with
``soft_deleted``, paging by ``limit`` and ``marker`` with ``servers_links``, and a cell that is down shows its servers
as ``UNKNOWN`` only where ``all_tenants`` is the one parameter, and leaves them out of every other answer.
"""

import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from cloud import REGION, Cloud


def a_server(server_id: str, image: str | None, **changes: Any) -> dict[str, Any]:
    """A server as ``GET /servers/detail`` shows it to an administrator; without an image it boots from a volume."""
    return {
        "id": server_id,
        "name": f"name of {server_id}",
        "status": "ACTIVE",
        "image": {"id": image, "links": []} if image else "",
        "OS-EXT-STS:task_state": None,
        "OS-EXT-STS:vm_state": "active",
        "OS-EXT-SRV-ATTR:kernel_id": "",
        "OS-EXT-SRV-ATTR:ramdisk_id": "",
    } | changes


class Nova:
    """Use it as a context manager: it is in the catalog of ``cloud`` while it serves.

    ``servers`` are all servers, those of a cell that is down under ``down``. ``answers`` holds, by the number of a
    request from 0 on, what is answered in place of the truth: a status code, or bytes. ``paths`` are the requests.
    """

    def __init__(self, cloud: Cloud, max_limit: int = 1000) -> None:
        self.cloud, self.max_limit = cloud, max_limit
        self.servers: list[dict[str, Any]] = []
        self.down: list[str] = []
        self.answers: dict[int, int | bytes] = {}
        self.hangs = False
        self.paths: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        identity = self.cloud.identity()
        service = {"service": {"type": "compute", "name": "nova"}}
        self._service = identity.post("/services", json=service).json()["service"]["id"]
        endpoint = {
            "service_id": self._service,
            "interface": "public",
            "region_id": REGION,
            "url": f"http://127.0.0.1:{self._http.server_address[1]}/v2.1",
        }
        identity.post("/endpoints", json={"endpoint": endpoint})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self.cloud.identity().delete(f"/services/{self._service}")

    def answer(self, path: str, headers: Any) -> tuple[int, bytes]:
        """Status and body of one request."""
        number = len(self.paths)
        self.paths.append(path)
        if self.hangs:
            time.sleep(5)
        planned = self.answers.get(number)
        if isinstance(planned, int):
            return planned, b'{"error": {"message": "as planned"}}'
        if planned is not None:
            return 200, planned
        if not headers.get("X-Auth-Token"):
            return 401, b"{}"
        if headers.get("OpenStack-API-Version") != "compute 2.69":
            return 406, b"{}"
        url = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/v2.1/os-services":
            return 200, json.dumps({"services": self._services()}).encode()
        if url.path != "/v2.1/servers/detail" or not query.get("all_tenants"):
            return 404, b"{}"
        return 200, json.dumps(self._listed(query)).encode()

    def _services(self) -> list[dict[str, str]]:
        up = {"binary": "nova-compute", "host": "compute-1", "status": "enabled", "state": "up"}
        return [up, *([{"binary": "nova-compute", "host": "compute-2", "status": "UNKNOWN"}] if self.down else [])]

    def _listed(self, query: dict[str, str]) -> dict[str, Any]:
        seen = [one for one in self.servers if one["status"] != "SOFT_DELETED" or query.get("soft_deleted")]
        if list(query) == ["all_tenants"]:
            unknown = [{"id": one["id"], "status": "UNKNOWN", "links": []} for one in seen if one["id"] in self.down]
            seen = unknown + [one for one in seen if one["id"] not in self.down]
        else:
            seen = [one for one in seen if one["id"] not in self.down]
        if "marker" in query:
            seen = seen[[one["id"] for one in seen].index(query["marker"]) + 1 :]
        limit = min(int(query.get("limit", self.max_limit)), self.max_limit)
        page: dict[str, Any] = {"servers": seen[:limit]}
        if len(seen) >= limit:
            page["servers_links"] = [{"rel": "next", "href": "http://nova.example/a-proxy-that-is-wrong"}]
        return page


def _handler(nova: Nova) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = nova.answer(self.path, self.headers)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
