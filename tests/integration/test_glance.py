"""What a Glance answers, good and broken: pages, limits, and how documents become images."""

import contextlib
import gzip
import itertools
import json
import re
import signal
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_images.glance import IDS_PER_REQUEST, MOST_IN_FLIGHT, Glance, image_of
from ln_images.model import AnswerTooLargeError, ConfigurationError, TemporaryError
from ln_images.session import connect
from support.faulty import Answer, Faulty, Front, Rule
from support.node import Node
from support.wire import run, run_refused

DATA = b"\1" * 4096

# Faults of a server: the exit status that each leads to, and the answer.

FAULTS = {
    "401": (2, Answer(401, b'{"error": {"code": 401, "message": "no"}}')),
    "403": (2, Answer(403, b'{"error": {"code": 403, "message": "no"}}')),
    "403, no content type": (2, Answer(403, b"no", content_type=None)),
    "401, JSON of another shape": (2, Answer(401, b'{"message": "no", "code": 1}')),
    "403, no JSON": (2, Answer(403, b"{")),
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
        pytest.param(service, *FAULTS[name], id=f"{service}: {name}")
        for service in ("Keystone", "Glance")
        for name in FAULTS
    ],
)
def test_a_service_that_breaks(
    node: Node, front: Front, service: str, status: int, answer: Answer
) -> None:
    """Whatever comes in place of a token or a list is one line, and the run touches nothing."""
    glance, region = front(lambda path: answer if service == "Glance" else path)
    rule: Rule = lambda path: answer if service == "Keystone" and path.endswith("/tokens") else path  # noqa: E731
    with Faulty(node.cloud.keystone, rule) as keystone:
        variables = region | {"OS_AUTH_URL": f"{keystone.url}/v3"}
        arguments = ["--timeout", "5"] if answer.hang else []
        line = run_refused(node, status, variables, *arguments, secrets=keystone.secrets)
    assert line.startswith(f"ln-images: {service} ")
    assert bool(keystone.secrets) is bool(glance.paths) is (service == "Glance")


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
def test_a_list_of_another_shape(node: Node, front: Front, body: str) -> None:
    """JSON that is not a list of images fails the pass."""
    _, region = front(
        lambda path: Answer(200, body.encode()) if path.startswith("/v2/images") else path
    )
    assert "Glance" in run_refused(node, 75, region)


def test_a_cloud_that_is_down(node: Node, front: Front) -> None:
    """A refused connection is status 75, and the error names the service."""
    server, region = front()
    server.stop()
    assert "Glance" in run_refused(node, 75, region)
    assert "Keystone" in run_refused(node, 75, {"OS_AUTH_URL": f"{server.url}/v3"})


# Pages. The tests make fewer images than a page has, so the server in front makes pages of two.


def small(path: str) -> str:
    """Return the path with which the real Glance answers in pages of two images."""
    return path.replace("limit=1000", "limit=2")


def on_page_two(answer: Answer) -> Rule:
    """Return the rule that gives this answer in place of the second page."""
    return lambda path: answer if "marker=" in path else small(path)


PAGES: dict[str, tuple[int, Rule]] = {
    "fails": (75, on_page_two(Answer(500))),
    "is refused": (2, on_page_two(Answer(403, b"no", "text/plain"))),
    "is cut short": (75, on_page_two(Answer(200, b'{"images": []', missing=9))),
    "is of another shape": (75, on_page_two(Answer(200, b'{"images": [1]}'))),
    "repeats page one": (75, lambda path: re.sub("&marker=[^&]*", "", small(path))),
    "is of the hidden images, and fails": (
        75,
        lambda path: Answer(503) if "os_hidden" in path else path,
    ),
}


def test_every_page_is_read(node: Node, front: Front) -> None:
    """Images on any page are linked, and so are hidden images."""
    images = [*node.cloud.add_many(5), node.cloud.image("hidden", DATA, os_hidden=True)]
    server, region = front(small)
    finished = run(node, region, "--full", secrets=server.secrets)
    missing = [image for image in images if not node.is_linked(image)]
    assert (finished.returncode, missing) == (0, []), finished.stderr
    assert sum("marker=" in path for path in server.paths) >= 2


@pytest.mark.parametrize(("status", "rule"), PAGES.values(), ids=PAGES)
def test_a_page_that_breaks(node: Node, front: Front, status: int, rule: Rule) -> None:
    """If one page fails, no image of the other pages is linked."""
    node.cloud.add_many(5)
    assert "Glance" in run_refused(node, status, front(rule)[1], "--full")


@pytest.mark.parametrize(
    "link",
    [
        "{path}",
        "/v2/images?marker=x",
        "//v2/images?marker=x",
        "v2/images",
        "/prefix/v2/images?marker=x",
        "/v2/images/?marker=x",
        "?",
        "",
    ],
)
@pytest.mark.parametrize("images", [[], [{"id": "a"}]], ids=["an empty page", "the same image"])
def test_pages_without_end(images: list[Any], link: str) -> None:
    """A ``next`` link that leads round in a circle ends after a few requests, whatever it is."""
    rule: Rule = lambda path: Answer.of({"images": images, "next": link.format(path=path)})  # noqa: E731
    with glance_of(rule) as (server, glance), pytest.raises((TemporaryError, ConfigurationError)):
        glance.list_all()
    assert len([path for path in server.paths if "schemas" not in path]) <= 4


def test_pages_with_a_new_link_each_time_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pages with a new ``next`` link each time end at the bound of requests."""
    monkeypatch.setattr("ln_images.transport._MOST_REQUESTS", 20)
    count = itertools.count()
    rule: Rule = lambda _: Answer.of({"images": [], "next": f"/v2/images?marker={next(count)}"})  # noqa: E731
    with (
        glance_of(rule) as (server, glance),
        pytest.raises(TemporaryError, match="one query needs more than 20 requests"),
    ):
        glance.list_all()
    assert len(server.paths) == 20


def test_a_group_of_ids_that_breaks(node: Node, front: Front) -> None:
    """If the second request for some ids fails, no image of the first is linked."""
    node.cloud.add_many(60)
    turn = itertools.count(1)
    _, region = front(lambda path: Answer(503) if "id=in" in path and next(turn) == 2 else path)
    assert "Glance" in run_refused(node, 75, region)
    assert next(turn) > 2


def test_odd_fields_on_the_wire(node: Node, front: Front) -> None:
    """An image with fields of other types is skipped, and reported in plain characters."""
    (image,) = node.cloud.add_many(1)
    odd = {
        "id": image,
        "name": "\ud800\n\x1b[2J",
        "status": "active",
        "disk_format": "raw",
        "size": True,
    }
    _, region = front(
        lambda path: Answer.of({"images": [odd]}) if path.startswith("/v2/images") else path
    )
    finished = run(node, region)
    assert (finished.returncode, node.names()) == (0, set()), finished.stderr
    assert re.fullmatch(r"([ -~]+\n)+", finished.stdout)
    assert re.search(f"{image} .* skipped ", finished.stdout)


def test_one_image_twice_is_harmless(node: Node, front: Front) -> None:
    """A listing that has an image twice, with equal fields, links it."""
    (image,) = node.cloud.add_many(1)
    document = {"id": image, "status": "active", "disk_format": "raw", "size": 4096}
    _, region = front(
        lambda path: (
            Answer.of({"images": [document, document]}) if path.startswith("/v2/images") else path
        )
    )
    finished = run(node, region)
    assert (finished.returncode, node.is_linked(image)) == (0, True), finished.stderr


def test_one_image_twice_with_different_fields_fails_the_pass(node: Node, front: Front) -> None:
    """A listing that contradicts itself about an image touches nothing."""
    (image,) = node.cloud.add_many(1)
    document = {"id": image, "status": "active", "disk_format": "raw", "size": 4096}
    page = {"images": [document, document | {"disk_format": "qcow2"}]}
    _, region = front(lambda path: Answer.of(page) if path.startswith("/v2/images") else path)
    assert f"lists image {image} twice" in run_refused(node, 75, region)


@pytest.mark.parametrize("arguments", [[], ["-q"], ["--full"], ["--every", "1", "--for", "1"]])
def test_an_empty_list_is_no_success(node: Node, front: Front, arguments: list[str]) -> None:
    """If Glance suddenly knows none of the files that are here, the status is 2, even with -q."""
    images = node.cloud.add_many(3)
    assert node.run().returncode == 0
    _, region = front(
        lambda path: Answer.of({"images": []}) if path.startswith("/v2/images") else path
    )
    line = run_refused(node, 2, region, *arguments)
    assert "Glance knows none of the 4 images that have a file in" in line
    assert all(node.is_linked(image) for image in images)


# keystoneauth1 itself tries once more after a 401, and not after a 403.
@pytest.mark.parametrize(("status", "refusals"), [(401, 2), (403, 1)])
def test_a_single_refusal_does_not_end_a_service(
    node: Node, front: Front, status: int, refusals: int
) -> None:
    """A request that is refused in a later pass of --every is retried with a new token."""
    (image,) = node.cloud.add_many(1)
    later: list[str] = []
    answers = [Answer(status, b"{}")] * refusals

    def rule(path: str) -> str | Answer:
        if not path.startswith("/v2/images") or not node.is_linked(image):
            return path
        if not later:
            later.extend(node.cloud.add_many(1))
        return answers.pop() if answers else path

    glance, region = front(rule)
    finished = run(node, region, "--every", "0.3", "--for", "8", secrets=glance.secrets)
    assert answers == []
    assert node.is_linked(later[0]), finished.stderr
    error = f"ln-images: Glance refuses the credentials (HTTP {status})"
    assert finished.stderr.count(error) == 1
    assert finished.returncode == TemporaryError.exit_code


# Limits, without a run of the command


@contextlib.contextmanager
def glance_of(rule: Rule, timeout: float = 20) -> Iterator[tuple[Faulty, Glance]]:
    """Run a server in Glance's place, and return it and its client."""

    def with_schema(path: str) -> str | Answer:
        return Answer.of(SCHEMA) if path == "/v2/schemas/image" else rule(path)

    with Faulty("http://127.0.0.1:1", with_schema) as server:
        openrc = {"OS_AUTH_TYPE": "none", "OS_ENDPOINT": server.url}
        yield server, Glance(connect(openrc, timeout), "admin")


SCHEMA = {"name": "image", "properties": {"id": {"type": "string"}}}
BOMB = gzip.compress(bytes(200 * 1024 * 1024), 1)
TOO_LATE = "Glance did not send a complete response within 1 s; "
TOO_LARGE = "the response has more than 64 MiB; "
ENDLESS = {
    "a body that drips": (Answer(body=b" ", again=0.01), 0.5, TOO_LATE),
    "headers that drip": (
        Answer(head=b"HTTP/1.1 200 OK\r\nX-Header: ", body=b"x", again=0.01),
        0.5,
        TOO_LATE,
    ),
    "a status line that drips": (
        Answer(head=b"HTTP/1.1 200 ", body=b"x", again=0.01),
        0.5,
        TOO_LATE,
    ),
    "chunks that drip": (
        Answer(
            head=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            body=b"1\r\n \r\n",
            again=0.01,
        ),
        0.5,
        TOO_LATE,
    ),
    "chunks without end": (
        Answer(
            head=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            body=b"100000\r\n" + bytes(2**20) + b"\r\n",
            again=0.0,
        ),
        20.0,
        TOO_LARGE,
    ),
    "a body without end": (Answer(body=b" " * 2**20, again=0.0), 20.0, TOO_LARGE),
    "a length of 4 EiB": (Answer(body=b"{}", missing=2**62, hang=True), 0.5, "Glance "),
    "a bomb": (Answer(body=BOMB, headers={"Content-Encoding": "gzip"}), 20.0, TOO_LARGE),
    "a bomb in a bomb": (
        Answer(body=gzip.compress(BOMB), headers={"Content-Encoding": "gzip, gzip"}),
        20.0,
        TOO_LARGE,
    ),
    "silence": (Answer(0, hang=True), 0.5, "Glance "),
    "thousands of headers": (
        Answer(head=b"HTTP/1.1 200 OK\r\n", body=b"X-Header: x\r\n" * 1000, again=0.0),
        5.0,
        "Glance ",
    ),
}


@pytest.mark.parametrize(("answer", "timeout", "message"), ENDLESS.values(), ids=ENDLESS)
def test_an_answer_without_end(answer: Answer, timeout: float, message: str) -> None:
    """A response is complete within twice --timeout, and has at most 64 MiB after decompression."""
    with (
        glance_of(lambda _: answer, timeout) as (_, glance),
        pytest.raises(TemporaryError, match=message),
    ):
        glance.list_all()


def test_no_alarm_is_left_after_a_query() -> None:
    """After a query, good or bad, neither an alarm nor our handler of it is left."""
    handler = signal.getsignal(signal.SIGALRM)
    for answer in (Answer.of({"images": []}), Answer(500), Answer(0, hang=True)):
        with glance_of(lambda _, answer=answer: answer, 0.2) as (_, glance):  # type: ignore[misc]
            with contextlib.suppress(TemporaryError):
                glance.list_all()
            assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
            assert signal.getsignal(signal.SIGALRM) is handler


def listing(images: Sequence[Any]) -> Rule:
    """Return the rule of a Glance with these images, which answers as the real one does."""

    def rule(path: str) -> Answer:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query))
        matching = [] if "os_hidden" in query else list(images)
        if "id" in query:
            ids = query["id"].removeprefix("in:").split(",")
            matching = [image for image in matching if image["id"] in ids]
        if "marker" in query:
            position = [image["id"] for image in matching].index(query["marker"])
            matching = matching[position + 1 :]
        limit = int(query["limit"])
        page: dict[str, Any] = {"images": matching[:limit]}
        if len(matching) > limit:
            marker = matching[limit - 1]["id"]
            page["next"] = f"/v2/images?{urllib.parse.urlencode(query | {'marker': marker})}"
        return Answer.of(page)

    return rule


def make_images(count: int, large: int, size: int = 30_000) -> list[dict[str, str]]:
    """Return image documents, the first of which are ``large`` with a property of ``size``."""
    return [
        {"id": f"10000000-0000-4000-8000-{number:012}"}
        | ({"x": "x" * size} if number < large else {})
        for number in range(count)
    ]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a response have 100 KB at most, so that a test need not make 64 MiB."""
    monkeypatch.setattr("ln_images.transport._MOST_BYTES", 100_000)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("large", [4, 9, 40])
def test_a_page_that_is_too_large_is_halved(large: int) -> None:
    """Images with huge properties do not keep the others from being listed."""
    images = make_images(300, large)
    with glance_of(listing(images)) as (server, glance):
        assert sorted(glance.list_all()) == [image["id"] for image in images]
        # After the large images the pages grow again.
        assert len(server.paths) < 2 * large + 40


@pytest.mark.usefixtures("small_limit")
def test_a_group_of_ids_that_is_too_large_is_halved() -> None:
    """The same for images that are queried by id."""
    images = make_images(IDS_PER_REQUEST + 1, 9)
    ids = [image["id"] for image in images]
    with glance_of(listing(images)) as (_, glance):
        assert sorted(glance.list_ids(ids)) == ids


@pytest.mark.usefixtures("small_limit")
def test_large_images_in_a_group_cost_few_requests() -> None:
    """Glance composes each page that is too large in full, so we query few of them."""
    images = make_images(12, 12, size=60_000)
    with glance_of(listing(images)) as (server, glance):
        assert len(glance.list_ids([image["id"] for image in images])) == 12
    limits = [int(limit) for limit in re.findall(r"limit=(\d+)", " ".join(server.paths))]
    assert sum(limits) < 70


@pytest.mark.usefixtures("small_limit")
def test_a_single_image_that_is_too_large() -> None:
    """An image that alone is larger than the limit ends the listing with an error of its own."""
    with (
        glance_of(listing(make_images(20, 1, size=200_000))) as (_, glance),
        pytest.raises(AnswerTooLargeError, match="the response has more than"),
    ):
        glance.list_all()


def test_images_in_flight_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Of 5,000 queued images a report has 1,000, one request brings them, and a warning says so."""
    with glance_of(listing(make_images(5000, 0))) as (server, glance):
        assert len(glance.list_in_flight()) == MOST_IN_FLIGHT
    assert len([path for path in server.paths if path.startswith("/v2/images?")]) == 1
    (record,) = caplog.records
    assert "1000 or more images without complete data" in record.getMessage()


@pytest.mark.parametrize("arguments", [["-q"], ["--every", "1", "--for", "1"]])
def test_images_in_flight_are_listed_for_a_report_alone(
    node: Node, front: Front, arguments: list[str]
) -> None:
    """Images in flight are in the report, and are not listed with -q or under --every."""
    node.cloud.add_many(1)
    queued = node.cloud.create("queued")
    server, region = front()
    assert queued in run(node, region).stdout
    assert any("status=in" in path for path in server.paths)
    server.paths.clear()
    run(node, region, *arguments)
    assert server.paths
    assert not any("status=in" in path for path in server.paths)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("wait", "hint"),
    [("7", ", it asks to wait 7 s"), ("a while", ""), ("9" * 60_000, ""), (None, "")],
)
def test_a_busy_glance_is_named_as_such(status: int, wait: str | None, hint: str) -> None:
    """The error names 429 and 503, and the seconds of Retry-After if there are any."""
    headers = {} if wait is None else {"Retry-After": wait}
    message = rf"^Glance answers badly: HTTP {status}{hint}; check its log"
    with (
        glance_of(lambda _: Answer(status, b"{}", headers=headers)) as (_, glance),
        pytest.raises(TemporaryError, match=message),
    ):
        glance.list_all()


def test_a_long_url_of_a_redirect_does_not_fill_the_log() -> None:
    """A server can send 64 KB in a header, and each pass would log all of it."""
    answer = Answer.redirect(f"http://other/{'x' * 60_000}")
    with (
        glance_of(lambda _: answer) as (_, glance),
        pytest.raises(ConfigurationError, match=r"redirects to http://other/x+\.\.\.;") as raised,
    ):
        glance.list_all()
    assert len(raised.value.message) < 600


@pytest.mark.parametrize(
    "body",
    [
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
    """Whatever is not a list of images does not count as an empty one: status 75."""
    with (
        glance_of(lambda _: Answer(body=body.encode())) as (_, glance),
        pytest.raises(TemporaryError) as error,
    ):
        glance.list_all() if ids is None else glance.list_ids(ids)
    assert error.value.exit_code == 75


@pytest.mark.parametrize(
    "answer", [Answer(500), Answer.of([]), Answer.of({}), Answer.of({"name": 1, "properties": 1})]
)
def test_a_schema_that_breaks(answer: Answer) -> None:
    """If Glance's schema of images, which glanceclient requests, is broken, the status is 75."""
    rule: Rule = lambda path: answer if "schemas" in path else listing(make_images(1, 0))(path)  # noqa: E731
    with Faulty("http://127.0.0.1:1", rule) as server:
        connection = connect({"OS_AUTH_TYPE": "none", "OS_ENDPOINT": server.url}, 20)
        with pytest.raises(TemporaryError, match="Glance cannot be queried"):
            Glance(connection, "admin").list_all()


def test_the_schema_is_requested_once() -> None:
    """However many listings a process makes, it requests the schema once."""
    with glance_of(listing(make_images(3, 0))) as (server, glance):
        paths = server.paths
        for _ in range(3):
            glance.list_all()
    assert len([path for path in paths if "schemas" in path]) == 1


HOSTILE = ["self", "pop", "get", "items", "validate", "schema", "args", "kwargs", "__dict__", "id "]


def test_fields_that_are_named_like_methods_are_harmless() -> None:
    """A tenant may call properties like the methods of glanceclient's models."""
    document = dict.fromkeys(HOSTILE, "x") | make_images(1, 0)[0] | {"size": 7, "name": "n"}
    with glance_of(listing([document])) as (_, glance):
        (image,) = glance.list_all().values()
    assert (image.id, image.size, image.name) == (document["id"], 7, "n")


# How a document becomes an Image

FIELDS = ("id", "name", "status", "disk_format", "os_glance_importing_to_stores", "size")
# JSON allows surrogates and control characters.
TEXT = st.text(st.characters())
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
    """A field of Glance's type is kept, and any other is None; only a lack of an id is an error."""
    document = json.loads(json.dumps(fields))
    if type(fields.get("id")) is not str or not fields["id"]:
        with pytest.raises(TemporaryError):
            image_of(document)
        return
    image, size = image_of(document), fields.get("size")
    texts = (image.id, image.name, image.status, image.disk_format, image.importing_to)
    assert texts == tuple(
        fields[key] if type(fields.get(key)) is str and fields[key] else None for key in FIELDS[:-1]
    )
    assert image.size == (size if type(size) is int and 0 <= size < 2**63 else None)
    assert type(image.size) in (int, type(None))


def test_texts_and_sizes_that_no_database_has_are_bounded() -> None:
    """A name of megabytes is cut off, so the table stays narrow; a huge size is no size."""
    document = {"id": str(uuid.uuid4()), "name": "n" * 256, "size": 10**400}
    image = image_of(document)
    assert (image.name, image.size) == ("n" * 255, None)
    with pytest.raises(TemporaryError, match="an image without a valid id"):
        image_of(document | {"id": "1" * 256})


def test_a_404_of_keystone_is_not_glances(node: Node, front: Front) -> None:
    """If a new token is needed to query one image, only Glance's 404 says that there is none."""
    image = node.cloud.image("image", DATA)
    fails: list[bool] = []
    _, region = front(
        lambda path: Answer(401, b"{}") if fails and path == f"/v2/images/{image}" else path
    )
    rule: Rule = lambda path: Answer(404, b"{}") if fails and path.endswith("/tokens") else path  # noqa: E731
    with Faulty(node.cloud.keystone, rule) as keystone:
        variables = node.environment(**region, OS_AUTH_URL=f"{keystone.url}/v3")
        glance = Glance(connect(variables, 5), "admin")
        assert glance.has_image(image)
        assert not glance.has_image("fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0")
        fails.append(True)
        message = r"Keystone refuses the credentials \(HTTP 404\)"
        with pytest.raises(ConfigurationError, match=message):
            glance.has_image(image)
