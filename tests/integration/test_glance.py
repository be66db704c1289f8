"""Every way in which a Glance answers, whole and broken: the installed command, and a real wire."""

import contextlib
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ln_images.keystone import connect

from ln_images.glance import Glance, image_of
from ln_images.model import ConfigurationError, TemporaryError
from support.faulty import Answer, Faulty, Front, Rule
from support.node import Node
from support.wire import refusal, run

DATA = b"\1" * 4096

# Faults on the wire. Each is (exit status, answer).

FAULTS = {
    "401": (2, Answer(401, b'{"error": {"code": 401, "message": "no"}}')),
    "403": (2, Answer(403, b'{"error": {"code": 403, "message": "no"}}')),
    "403, HTML": (2, Answer(403, b"<html>\n<h1>no</h1>\n\n</html>", "text/html")),
    "500": (75, Answer(500, b"Traceback (most recent call last):\n  boom\n", "text/plain")),
    "502, HTML": (75, Answer(502, b"<html>\n<h1>Bad\n\nGateway</h1>\n</html>", "text/html")),
    "503": (75, Answer(503, b'{"error": {"code": 503, "message": "later\\n\\u001b[2J"}}')),
    "504, no body": (75, Answer(504)),
    "hangs": (75, Answer(0, hang=True)),
    "hangs in the body": (75, Answer(200, b'{"images": [', missing=1000, hang=True)),
    "hangs up": (75, Answer(0)),
    "cut short": (75, Answer(200, b'{"images": []}', missing=1000)),
    "empty": (75, Answer(200)),
    "HTML": (75, Answer(200, b"<html>Log in first</html>", "text/html")),
    "no JSON": (75, Answer(200, b'{"images": [}')),
    "no UTF-8": (75, Answer(200, b'\xff\xfe{"images": []}')),
    "null": (75, Answer(200, b"null")),
    "a list": (75, Answer(200, b"[]")),
    "nested too deeply": (75, Answer(200, b'{"images": ' + b"[" * 100_000)),
}


@pytest.mark.parametrize(
    ("service", "status", "answer"),
    [
        *(
            pytest.param(service, *FAULTS[name], id=f"{service}: {name}")
            for service in ("Keystone", "Glance")
            for name in FAULTS
        ),
        pytest.param(
            "Glance", 2, Answer(401, b'{"message": "no", "code": 1}'), id="Glance: a gateway's 401"
        ),
    ],
)
def test_a_service_that_breaks(
    node: Node, front: Front, service: str, status: int, answer: Answer
) -> None:
    """Whatever comes in place of a token or a list, it is one line, the right status, and nothing is touched."""
    glance, region = front(lambda path: answer if service == "Glance" else path)
    rule: Rule = lambda path: answer if service == "Keystone" and path.endswith("/tokens") else path  # noqa: E731
    with Faulty(node.cloud.keystone, rule) as keystone:
        variables = region | {"OS_AUTH_URL": f"{keystone.url}/v3"}
        line = refusal(node, status, variables, *soon(answer), secrets=keystone.secrets)
    assert line.startswith(f"ln-images: {service} ")
    assert bool(keystone.secrets) is bool(glance.paths) is (service == "Glance")


def soon(answer: Answer) -> tuple[str, ...]:
    """The option with which a server that hangs is given up soon."""
    return ("--timeout", "5") if answer.hang else ()


@pytest.mark.parametrize(
    "body",
    [
        '{"images": null}',
        '{"images": 1}',
        '{"images": [1]}',
        '{"images": [[]]}',
        '{"images": [{}]}',
        '{"images": [{"id": null}]}',
        '{"images": [], "next": 1}',
        '{"error": "none"}',
    ],
)
def test_a_glance_of_another_shape(node: Node, front: Front, body: str) -> None:
    """JSON that is no list of images is not taken for one."""
    _, region = front(
        lambda path: Answer(200, body.encode()) if path.startswith("/v2/images") else path
    )
    assert "Glance" in refusal(node, 75, region)


def test_a_cloud_that_is_down(node: Node, front: Front) -> None:
    """Connections that are refused, by Glance or by Keystone, are status 75 and a line that names the service."""
    server, region = front()
    server.stop()
    assert "Glance" in refusal(node, 75, region)
    assert "Keystone" in refusal(node, 75, {"OS_AUTH_URL": f"{server.url}/v3"})


# Listings in pages of two images, as the real Glance makes them, for PAGE_SIZE is more than a test
# makes


def small(path: str) -> str:
    """Asks for pages of two."""
    return path.replace("limit=1000", "limit=2")


def on_page_two(answer: Answer) -> Rule:
    """Gives this answer in place of the second page."""
    return lambda path: answer if "marker=" in path else small(path)


PAGES: dict[str, tuple[int, Rule]] = {
    "fails": (75, on_page_two(Answer(500))),
    "is refused": (2, on_page_two(Answer(403, b"no", "text/plain"))),
    "is cut short": (75, on_page_two(Answer(200, b'{"images": []', missing=9))),
    "is of another shape": (75, on_page_two(Answer(200, b'{"images": [1]}'))),
    "repeats page one": (75, lambda path: re.sub("&marker=[^&]*", "", small(path))),
    "is the hidden images', and fails": (
        75,
        lambda path: Answer(503) if "os_hidden" in path else path,
    ),
}


def test_every_page_is_read(node: Node, front: Front) -> None:
    """Images on any page are linked, those of the hidden listing included."""
    images = [*node.cloud.add_many(5), node.cloud.image("hidden", DATA, os_hidden=True)]
    server, region = front(small)
    ended = run(node, region, "--full", secrets=server.secrets)
    assert (ended.returncode, [image for image in images if not node.linked(image)]) == (0, []), (
        ended.stderr
    )
    assert sum("marker=" in path for path in server.paths) >= 2


@pytest.mark.parametrize(("status", "rule"), PAGES.values(), ids=PAGES)
def test_a_page_that_breaks(node: Node, front: Front, status: int, rule: Rule) -> None:
    """A list is whole or it is nothing.

    Where one page fails, no image of the other pages is linked.
    """
    node.cloud.add_many(5)
    assert "Glance" in refusal(node, status, front(rule)[1], "--full")


def test_pages_without_end(node: Node, front: Front) -> None:
    """A page that brings nothing but a next one ends the listing, at the first, and not by the clock."""
    glance, region = front(
        lambda path: Answer(200, json.dumps({"images": [], "next": path}).encode())
    )
    assert "brings nothing: its paging is broken" in refusal(node, 75, region)
    assert len(glance.paths) == 1


def test_a_group_of_ids_that_breaks(node: Node, front: Front) -> None:
    """Where the second request for some ids fails, no image of the first is linked."""
    node.cloud.add_many(60)
    turn = itertools.count(1)
    _, region = front(lambda path: Answer(503) if "id=in" in path and next(turn) == 2 else path)
    assert "Glance" in refusal(node, 75, region)
    assert next(turn) > 2


def test_odd_fields_on_the_wire(node: Node, front: Front) -> None:
    """An image whose fields are not of Glance's types is skipped, and reported on one line, in plain characters."""
    (image,) = node.cloud.add_many(1)
    odd = {
        "id": image,
        "name": "\ud800\n\x1b[2J",
        "status": "active",
        "disk_format": "raw",
        "size": True,
    }
    body = json.dumps({"images": [odd]}).encode()
    _, region = front(lambda path: Answer(200, body) if path.startswith("/v2/images") else path)
    ended = run(node, region)
    assert (ended.returncode, node.names()) == (0, set()), ended.stderr
    assert re.fullmatch(r"([ -~]+\n){3}", ended.stdout)
    assert "Glance gives no size" in ended.stdout


# Answers that bring nothing, never end, or ask to wait: the rooms below, without a run of the
# command


@contextlib.contextmanager
def asking_glance(rule: Rule, timeout: float = 20) -> Iterator[tuple[Faulty, Glance]]:
    """A server in Glance's place, and what asks it."""
    with Faulty("http://127.0.0.1:1", rule) as server:
        yield server, Glance(connect({"OS_AUTH_TYPE": "none", "OS_ENDPOINT": server.url}, timeout))


BOMB = gzip.compress(bytes(200 * 1024 * 1024), 1)
ENDLESS = {
    "drips": (Answer(body=b" ", again=0.01), 0.5, "Glance has not answered whole within 1 s"),
    "never ends": (Answer(body=b" " * 2**20, again=0.0), 20.0, "an answer of more than 64 MiB"),
    "is a bomb": (
        Answer(body=BOMB, headers={"Content-Encoding": "gzip"}),
        20.0,
        "an answer of more than 64 MiB",
    ),
    "is silent": (Answer(0, hang=True), 0.5, "Glance "),
}


@pytest.mark.parametrize(("answer", "timeout", "told"), ENDLESS.values(), ids=ENDLESS)
def test_an_answer_without_end(answer: Answer, timeout: float, told: str) -> None:
    """A body has a bound, unpacked, and a question one deadline, twice --timeout, which its message names."""
    with (
        asking_glance(lambda _: answer, timeout) as (_, glance),
        pytest.raises(TemporaryError, match=told),
    ):
        glance.images()


LOOPS: dict[str, Any] = {
    "the same image": {"images": [{"id": "a"}], "next": "/v2/images?marker=a"},
    "nothing": {"images": [], "next": "/v2/images?marker=a"},
}


@pytest.mark.parametrize("page", LOOPS.values(), ids=LOOPS)
def test_a_page_that_brings_nothing_new_ends_the_listing(page: Any) -> None:
    """Where `next` leads round and round, it is told by the second page at the latest, not by the clock."""
    rule: Rule = lambda _: Answer(body=json.dumps(page).encode())  # noqa: E731
    with (
        asking_glance(rule) as (server, glance),
        pytest.raises(TemporaryError, match="its paging is broken"),
    ):
        glance.images()
    assert len([path for path in server.paths if path.startswith("/v2/images?")]) <= 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("wait", "hint"), [("7", ", it asks to wait 7 s"), ("a while", ""), (None, "")]
)
def test_a_busy_glance_is_named_as_such(status: int, wait: str | None, hint: str) -> None:
    """429 and 503 are told with their number, and with the seconds of Retry-After where it has some."""
    headers = {} if wait is None else {"Retry-After": wait}
    told = rf"^Glance cannot be asked: HTTP {status}{hint}: look at its log"
    with asking_glance(lambda _: Answer(status, b"{}", headers=headers)) as (_, glance):  # noqa: SIM117
        with pytest.raises(TemporaryError, match=told):
            glance.images()


@pytest.mark.parametrize(
    "body",
    [
        '{"images": {}}',
        '{"images": "none"}',
        '{"images": null}',
        "{}",
        "[]",
        "null",
        '"images"',
        "1",
        '{"a": [1]}',
    ],
)
@pytest.mark.parametrize("ids", [None, ["10000000-0000-4000-8000-000000000000"]])
def test_an_answer_that_is_no_list_cannot_be_trusted(body: str, ids: list[str] | None) -> None:
    """Whatever is no list of images is no empty list of images: status 75."""
    with (
        asking_glance(lambda _: Answer(body=body.encode())) as (_, glance),
        pytest.raises(TemporaryError) as error,
    ):
        glance.images(ids)
    assert error.value.exit_status == 75


# The boundary where Glance's JSON becomes an Image

FIELDS = ("id", "name", "status", "disk_format", "os_glance_importing_to_stores", "size")
TEXT = st.text(st.characters())  # surrogates and control characters included, as JSON allows
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300) | st.floats() | TEXT,
    lambda values: st.lists(values) | st.dictionaries(TEXT, values),
    max_leaves=5,
)


OPTIONAL = dict.fromkeys(FIELDS[1:], TEXT | VALUES) | {
    "size": st.integers() | st.booleans() | VALUES,
    "self": VALUES,
}


@given(
    st.fixed_dictionaries({"id": TEXT}, optional=OPTIONAL)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES)
)
def test_any_json_object_is_an_image_or_a_temporary_error(fields: dict[str, Any]) -> None:
    """Fields of Glance's types are taken as they are, any other counts as empty.

    Only a lack of an id is an error.
    """
    document = json.loads(json.dumps(fields))
    if type(fields.get("id")) is not str:
        with pytest.raises(TemporaryError):
            image_of(document)
        return
    image, size = image_of(document), fields.get("size")
    texts = (image.id, image.name, image.status, image.disk_format, image.importing_to)
    assert texts == tuple(
        fields[key] if type(fields.get(key)) is str else "" for key in FIELDS[:-1]
    )
    assert image.size == (size if type(size) is int and size >= 0 else None)
    assert type(image.size) in (int, type(None))


def test_a_404_of_keystone_is_not_glances(node: Node, front: Front) -> None:
    """Where a token has to be renewed while one image is asked for, only Glance's 404 says that there is none."""
    image = node.cloud.image("image", DATA)
    armed: list[bool] = []
    _, region = front(
        lambda path: Answer(401, b"{}") if armed and path == f"/v2/images/{image}" else path
    )
    rule: Rule = lambda path: Answer(404, b"{}") if armed and path.endswith("/tokens") else path  # noqa: E731
    with Faulty(node.cloud.keystone, rule) as keystone:
        glance = Glance(connect(node.environment(**region, OS_AUTH_URL=f"{keystone.url}/v3"), 5))
        assert not glance.is_gone(image)
        assert glance.is_gone("fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0")
        armed.append(True)
        with pytest.raises(ConfigurationError, match="Keystone refuses the credentials: HTTP 404"):
            glance.is_gone(image)
