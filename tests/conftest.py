"""The fixtures of all tests: a real cloud for each worker, and storage nodes."""

import contextlib
import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from keystoneauth1.adapter import Adapter

from support.cloud import REGION, Cloud
from support.compute import Compute, in_catalog
from support.faulty import Faulty, Front, Rule, Variables
from support.node import Node

# Whatever ends the tests, the servers that they started are stopped first. A shell that runs the
# tests in the background makes them ignore SIGINT, and so would the commands that they start.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
# How long an example takes depends on how busy the machine is, not on what is tested.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Run the real Keystone and Glance for all tests of one worker."""
    with Cloud(tmp_path_factory.mktemp("cloud") / "cloud") as running:
        yield running


@pytest.fixture
def node(cloud: Cloud, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Make a storage node with an empty cache, and remove the cloud's images in the end."""
    digest = hashlib.sha1(request.node.nodeid.encode(), usedforsecurity=False).hexdigest()
    cache = cloud.directory / f"cache-{digest[:12]}"
    cache.mkdir()
    yield Node(cloud, cache)
    cloud.clear()


@pytest.fixture(scope="session")
def identity(cloud: Cloud) -> Adapter:
    """Return Keystone's API, with one token for all tests."""
    return cloud.identity()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Return a stack for what must be unmounted after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def front(node: Node, identity: Adapter) -> Iterator[Front]:
    """Stands a server before the real Glance, in the real catalog.

    Returns it and the variables that choose it.

    By default it is the public endpoint of a region of its own.
    """
    service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
    with contextlib.ExitStack() as stack:

        def stand(
            rule: Rule = str, path: str = "", tls: Any = None, **endpoint: str
        ) -> tuple[Faulty, Variables]:
            server = stack.enter_context(Faulty(node.cloud.glance, rule, tls))
            endpoint = {"region": f"port-{server.server_port}", "interface": "public"} | endpoint
            document = {"endpoint": {"service_id": service, "url": server.url + path, **endpoint}}
            made = identity.post("/endpoints", json=document).json()["endpoint"]["id"]
            stack.callback(identity.delete, f"/endpoints/{made}")
            return server, {"OS_REGION_NAME": endpoint["region"]}

        yield stand


@pytest.fixture
def nova(identity: Adapter) -> Iterator[Compute]:
    """Put a compute service with two hosts into the real catalog."""
    with (
        Compute("compute-1", "compute-2") as serving,
        in_catalog(identity, (REGION, "public", serving.url)),
    ):
        yield serving
