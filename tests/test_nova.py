"""Every server of every project, region and cell, or an error: at the wire, with a real catalog."""

from collections.abc import Callable, Iterator

import pytest

from cloud import REGION
from compute import Compute, Fault, in_catalog, server
from conftest import Node
from ln_images.keystone import Connection, connect
from ln_images.model import ConfigurationError, LnImagesError, Server, TemporaryError
from ln_images.nova import servers

IMAGE = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


Ask = Callable[..., tuple[list[Server], bool]]


@pytest.fixture
def ask(node: Node) -> Iterator[Ask]:
    """Asks for all servers with a token of its own, whose catalog is as it is then."""
    made: list[Connection] = []

    def asked(timeout: float = 10, **variables: str) -> tuple[list[Server], bool]:
        made.append(connect(node.environment(**variables), timeout))
        return servers(made[-1])

    yield asked
    for connection in made:
        connection.session.session.close()


def test_every_server_on_every_page_is_told_with_all_that_it_names(ask: Ask, nova: Compute) -> None:
    """Soft-deleted ones too; one without an image is on a volume.

    Of a deleted one Nova knows nothing.
    """
    others = [server(f"s{n}", status="SHELVED_OFFLOADED") for n in range(6)]
    kernel, ramdisk = {"OS-EXT-SRV-ATTR:kernel_id": "k"}, {"OS-EXT-SRV-ATTR:ramdisk_id": "r"}
    soft = server("soft", IMAGE, "SOFT_DELETED", task="deleting", **kernel, **ramdisk)
    nova.servers = [*others, soft, server("gone", IMAGE, "DELETED")]
    found, proof = ask()
    assert found[6:] == [
        Server("soft", "SOFT_DELETED", "deleting", "compute-1", IMAGE, frozenset({IMAGE, "k", "r"}))
    ]
    assert [(one.id, one.host, one.image, one.uses) for one in found[:6]] == [
        (f"s{n}", "", "", frozenset()) for n in range(6)
    ]
    assert proof
    assert {asked.microversion for asked in nova.asked} == {"2.69", "2.93"}


@pytest.mark.parametrize(("newest", "proof"), [((2, 90), False), ((2, 92), False), ((2, 93), True)])
def test_an_older_nova_answers_and_is_not_enough_proof(
    ask: Ask, nova: Compute, newest: tuple[int, int], proof: bool
) -> None:
    """Before 26.0.0, which 2.93 shows, what servers name may be wrong.

    It answers 406 and is asked as before.
    """
    nova.newest, nova.servers = newest, [server("s", IMAGE)]
    found, recent = ask()
    assert ([one.id for one in found], recent) == (["s"], proof)


def test_a_nova_that_cannot_tell_of_cells_is_refused(ask: Ask, nova: Compute) -> None:
    """Before 19.0.0 the servers of a cell that is down are missing without a word."""
    nova.newest = (2, 68)
    with pytest.raises(TemporaryError, match="Nova in RegionOne cannot be asked: HTTP 406"):
        ask()


@pytest.mark.parametrize("first", [REGION, "RegionTwo"])
def test_every_region_is_asked_whichever_is_ones_own(ask: Ask, node: Node, first: str) -> None:
    """Regions may share one Glance. One of them is older: what all of them say is no proof then."""
    one, two = Compute(server("one", IMAGE)), Compute(server("two", IMAGE))
    two.newest = (2, 90)
    # The second stands in the catalog without the version in its path, and with a slash.
    endpoints = [(REGION, "public", one.url), ("RegionTwo", "public", two.url.removesuffix("v2.1"))]
    with one, two, in_catalog(node.cloud.identity(), *endpoints):
        found, proof = ask(OS_REGION_NAME=first)
    assert [(found.id, found.image) for found in found] == [("one", IMAGE), ("two", IMAGE)]
    assert not proof


@pytest.mark.parametrize("path", ["", "/", "/v2.1/"])
def test_an_endpoint_needs_no_version_in_its_path(ask: Ask, node: Node, path: str) -> None:
    """It is asked at /v2.1 all the same."""
    with Compute() as nova:
        endpoint = (REGION, "public", nova.url.removesuffix("/v2.1") + path)
        with in_catalog(node.cloud.identity(), endpoint):
            assert ask() == ([], True)


@pytest.mark.parametrize(
    ("endpoints", "error", "told"),
    [
        ([], ConfigurationError, "the catalog has no compute service"),
        (
            [(REGION, "public", "http://127.0.0.1:9/v2")],
            ConfigurationError,
            "no compute service at /v2.1",
        ),
        ([(REGION, "internal", "URL")], ConfigurationError, "the catalog has no compute service"),
        (
            [(REGION, "public", "URL"), ("RegionTwo", "internal", "URL")],
            TemporaryError,
            "Nova in RegionTwo has no",
        ),
        (
            [(REGION, "public", "URL"), ("RegionTwo", "public", "http://127.0.0.1:9/v2.1")],
            TemporaryError,
            "RegionTwo",
        ),
    ],
)
def test_a_region_that_cannot_be_asked_stops(
    ask: Ask,
    node: Node,
    endpoints: list[tuple[str, str, str]],
    error: type[LnImagesError],
    told: str,
) -> None:
    """Not even one may be missing: its servers may use any base."""
    with Compute() as nova:
        given = [
            (region, interface, url.replace("URL", nova.url))
            for region, interface, url in endpoints
        ]
        with in_catalog(node.cloud.identity(), *given), pytest.raises(error, match=told):
            ask()


def test_the_interface_in_use_is_asked(ask: Ask, node: Node) -> None:
    """Where the credential's interface is the internal one, so is Nova's."""
    with Compute() as nova, in_catalog(node.cloud.identity(), (REGION, "internal", nova.url)):
        assert ask(OS_INTERFACE="internal") == ([], True)


@pytest.mark.parametrize("with_server", [True, False])
def test_a_cell_that_is_down_stops(ask: Ask, nova: Compute, with_server: bool) -> None:
    """Its servers are left out of the paged list.

    The first answer and the services show that they exist.
    """
    nova.servers = [server("far", IMAGE)] * with_server
    nova.cell_down("far")
    with pytest.raises(TemporaryError, match="does not see all of its cells"):
        ask()
    assert nova.asked[-1].path == "/os-services"


def test_one_server_in_a_state_that_nobody_knows_is_no_cell_that_is_down(
    ask: Ask, nova: Compute
) -> None:
    """Nova calls it UNKNOWN, too, but tells its vm_state.

    It is a server like others, and not at rest.
    """
    nova.servers = [server("odd", IMAGE, "UNKNOWN")]
    ((odd,), _) = ask()
    assert (odd.status, odd.uses) == ("UNKNOWN", frozenset({IMAGE}))


@pytest.mark.parametrize(
    ("part", "fault", "error"),
    [
        *(("detail?", Fault(status, b"{}"), TemporaryError) for status in (500, 404, 406, 409)),
        ("detail?", Fault(403, b"{}"), ConfigurationError),
        *(
            ("detail?", Fault(200, body), TemporaryError)
            for body in (b"rubbish", b"[]", b'{"servers": null}')
        ),
        ("os-services", Fault(503), TemporaryError),
        ("soft_deleted", Fault(503), TemporaryError),
        ("soft_deleted", Fault(200, b'{"servers": []}'), TemporaryError),
        ("marker=", Fault(503), TemporaryError),
        ("marker=", Fault(), TemporaryError),
    ],
)
def test_a_nova_that_answers_badly_stops(
    ask: Ask, nova: Compute, part: str, fault: Fault, error: type[LnImagesError]
) -> None:
    """Whichever of its requests fails, the page after the first included, or loses what the first answer had."""
    nova.servers = [server(f"s{n}") for n in range(5)]
    nova.faults = {part: fault}
    with pytest.raises(error, match="Nova"):
        ask()


def test_a_nova_that_hangs_stops(ask: Ask, nova: Compute) -> None:
    """--timeout holds for Nova, too."""
    nova.faults = {"detail": Fault(hang=True)}
    with pytest.raises(TemporaryError, match=r"timed out|not answered whole"):
        ask(timeout=0.5)


def test_a_token_that_nova_takes_for_less_than_an_administrators_stops(
    ask: Ask, nova: Compute
) -> None:
    """Where a policy lets it list all servers and yet drops its filters, the soft-deleted are missing."""
    nova.servers, nova.all_filters = [server("s"), server("gone", IMAGE, "SOFT_DELETED")], False
    with pytest.raises(ConfigurationError, match="less than an administrator"):
        ask()
