"""Every way to the cloud and every way it breaks: the installed command, a real Keystone and Glance, a real wire."""

import contextlib
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keystoneauth1.adapter import Adapter
from keystoneauth1.exceptions import Unauthorized
from keystoneauth1.identity import v3
from keystoneauth1.session import Session

from cloud import PASSWORD, REGION, Cloud
from conftest import COMMAND, NO_OPENRC, Node, block
from faulty import Answer, Authority, Faulty, Rule
from ln_images.glance import image_of
from ln_images.model import TemporaryError

DATA = b"\1" * 4096
HANG_SECONDS = 60
WRONG = "n0t-the-Password"
Variables = dict[str, str | None]
Front = Callable[..., tuple[Faulty, Variables]]


def run(
    node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs the command at its most talkative: it must end, and no secret may be in anything that it says."""
    log, environment = node.cache.with_suffix(".log"), node.environment(**variables)
    ended = subprocess.run(
        [COMMAND, "-v", "--log-file", log, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    said = ended.stdout + ended.stderr + (log.read_text() if log.exists() else "")
    known = {PASSWORD, *secrets}
    known |= {
        value for name, value in environment.items() if re.fullmatch("OS_.*(PASSWORD|TOKEN|SECRET)", name) and value
    }
    assert [secret for secret in known if secret in said] == []
    return ended


def links(node: Node, variables: Variables, *arguments: str, secrets: Collection[str] = ()) -> None:
    """Makes an image, which a run must then link."""
    (image,) = node.cloud.add_many(1)
    ended = run(node, variables, *arguments, secrets=secrets)
    assert (ended.returncode, node.linked(image)) == (0, True), ended.stderr


def refusal(node: Node, status: int, variables: Variables, *arguments: str, secrets: Collection[str] = ()) -> str:
    """Makes an image, and returns the one line of a run that must end with ``status`` and touch nothing."""
    node.cloud.add_many(1)
    before = everything(node)
    ended = run(node, variables, *arguments, secrets=secrets)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("ln-images: debug: ")]
    assert (ended.returncode, ended.stdout, len(lines)) == (status, "", 1), ended.stderr
    assert re.fullmatch(r"ln-images: (?!a bug)[ -~]+", lines[0])
    assert everything(node) == before
    return lines[0]


def everything(node: Node) -> dict[Path, tuple[int, ...]]:
    """What a run could change: every name in the store and in the cache, and its inode."""
    found = {path: path.lstat() for path in (*node.images.iterdir(), *node.cache.iterdir())}
    return {path: (s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_ctime_ns) for path, s in found.items()}


@pytest.fixture(scope="session")
def identity(cloud: Cloud) -> Adapter:
    """Keystone's API, with one token for all tests."""
    return cloud.identity()


@pytest.fixture
def front(node: Node, identity: Adapter) -> Iterator[Front]:
    """Stands a server before the real Glance, in the real catalog; returns it and the variables that choose it.

    Unless told otherwise, it is the public endpoint of a region of its own.
    """
    service = identity.get("/services", params={"type": "image"}).json()["services"][0]["id"]
    with contextlib.ExitStack() as stack:

        def stand(rule: Rule = str, path: str = "", tls: Any = None, **endpoint: str) -> tuple[Faulty, Variables]:
            server = stack.enter_context(Faulty(node.cloud.glance, rule, tls))
            endpoint = {"region": f"port-{server.server_port}", "interface": "public"} | endpoint
            document = {"endpoint": {"service_id": service, "url": server.url + path, **endpoint}}
            made = identity.post("/endpoints", json=document).json()["endpoint"]["id"]
            stack.callback(identity.delete, f"/endpoints/{made}")
            return server, {"OS_REGION_NAME": endpoint["region"]}

        yield stand


# Credentials


@pytest.fixture(scope="session")
def facts(cloud: Cloud) -> dict[str, str]:
    """What the variables of ``WAYS`` are filled in with."""
    who = cloud.as_user()
    facts = {"keystone": cloud.keystone, "user": who.get_user_id(), "project": who.get_project_id()}
    credential = cloud.application_credential(who, name="cron")
    facts |= {name: credential[f"OS_APPLICATION_CREDENTIAL_{name.upper()}"] for name in ("id", "secret")}
    facts["token"] = who.get_token()
    return {name: str(fact) for name, fact in facts.items()}


NO_DOMAINS: Variables = {"OS_USER_DOMAIN_NAME": None, "OS_PROJECT_DOMAIN_NAME": None}
NO_NAMES: Variables = {"OS_USERNAME": None, "OS_PROJECT_NAME": None}
APPLICATION: Variables = {"OS_AUTH_TYPE": "v3applicationcredential", "OS_APPLICATION_CREDENTIAL_SECRET": "{secret}"}
BY_ID: Variables = APPLICATION | {"OS_APPLICATION_CREDENTIAL_ID": "{id}"}
BY_NAME: Variables = APPLICATION | {"OS_APPLICATION_CREDENTIAL_NAME": "cron"}
EMPTIES = ("AUTH_TYPE", "USER_DOMAIN_ID", "PROJECT_ID", "CACERT", "CERT", "KEY", "CLOUD", "INTERFACE")
WAYS: dict[str, Variables] = {
    "password": {},
    "password, version discovered": {"OS_AUTH_URL": "{keystone}"},
    "v3password": {"OS_AUTH_TYPE": "v3password"},
    "password, by ids": NO_NAMES | NO_DOMAINS | {"OS_USER_ID": "{user}", "OS_PROJECT_ID": "{project}"},
    "default domain": NO_DOMAINS | {"OS_DEFAULT_DOMAIN_ID": "default"},
    "domain ids": NO_DOMAINS | {"OS_USER_DOMAIN_ID": "default", "OS_PROJECT_DOMAIN_ID": "default"},
    "deprecated names": NO_NAMES | {"OS_USER_NAME": "admin", "OS_TENANT_NAME": "admin"},
    "deprecated ids": NO_NAMES | {"OS_USERNAME": "admin", "OS_TENANT_ID": "{project}"},
    "empty is unset": {f"OS_{name}": "" for name in EMPTIES},
    "no region": {"OS_REGION_NAME": None},
    "application credential": NO_OPENRC | {"OS_AUTH_URL": "{keystone}/v3"} | BY_ID,
    "application credential beside an openrc": BY_ID,
    "application credential by name": NO_NAMES | BY_NAME | {"OS_USERNAME": "admin", "OS_PROJECT_DOMAIN_NAME": None},
    "application credential by name, beside an openrc": BY_NAME,
    "token": {"OS_AUTH_TYPE": "token", "OS_TOKEN": "{token}", "OS_USERNAME": None, "OS_PASSWORD": None},
    "v3token": {"OS_AUTH_TYPE": "v3token", "OS_TOKEN": "{token}", "OS_USERNAME": None, "OS_PASSWORD": None},
    "token beside an openrc": {"OS_AUTH_TYPE": "token", "OS_TOKEN": "{token}"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_authenticate_links(node: Node, facts: dict[str, str], way: Variables) -> None:
    """Passwords, application credentials and tokens work under the names that operators have in their openrc."""
    links(node, {name: value and value.format(**facts) for name, value in way.items()})


@pytest.mark.parametrize(
    ("missing", "variables"),
    [
        *((name, {name: None}) for name in NO_OPENRC if name != "OS_PROJECT_NAME"),
        ("OS_PASSWORD", {"OS_PASSWORD": ""}),
        ("OS_APPLICATION_CREDENTIAL_ID", APPLICATION),
        ("OS_APPLICATION_CREDENTIAL_SECRET", BY_ID | {"OS_APPLICATION_CREDENTIAL_SECRET": ""}),
        ("OS_TOKEN", {"OS_AUTH_TYPE": "token"}),
        ("OS_TOKEN", {"OS_AUTH_TYPE": "v3token", "OS_TOKEN": ""}),
    ],
)
def test_a_missing_variable_is_named(node: Node, missing: str, variables: Variables) -> None:
    """Without a variable that is needed, or with an empty one, the line names it and says where it comes from."""
    line = refusal(node, 2, variables)
    assert line == f"ln-images: {missing} not set: `source admin-openrc` first, or give --os-cloud"


NO_APPLICATION: Variables = APPLICATION | {"OS_APPLICATION_CREDENTIAL_ID": "0" * 32}


@pytest.mark.parametrize(
    ("named", "variables"),
    [
        ("Keystone refuses the credentials", {"OS_PASSWORD": WRONG}),
        ("Keystone refuses the credentials", {"OS_USERNAME": "nobody"}),
        ("Keystone refuses the credentials", {"OS_PROJECT_NAME": "nothing"}),
        ("Keystone refuses the credentials", NO_APPLICATION),
        ("Keystone refuses", {"OS_AUTH_TYPE": "v3token", "OS_TOKEN": WRONG}),
        ("OS_PROJECT_NAME", {"OS_PROJECT_NAME": None}),
        ("OS_AUTH_TYPE=nonsense", {"OS_AUTH_TYPE": "nonsense"}),
        ("OS_AUTH_URL", {"OS_AUTH_URL": "nonsense"}),
        ("OS_AUTH_URL", {"OS_AUTH_URL": "ftp://127.0.0.1/v3"}),
        ("OS_AUTH_URL", {"OS_AUTH_URL": "http://"}),
        ("OS_AUTH_URL", {"OS_AUTH_URL": "http://[::1/v3"}),
        ("OS_AUTH_URL", {"OS_AUTH_URL": "http://host:port/v3"}),
        ("OS_REGION_NAME", {"OS_REGION_NAME": "Atlantis"}),
        ("OS_INTERFACE", {"OS_INTERFACE": "admin"}),
        ("OS_CACERT=/nonexistent cannot be read", {"OS_CACERT": "/nonexistent"}),
        ("OS_CERT=/nonexistent cannot be read", {"OS_CERT": "/nonexistent"}),
        ("OS_KEY=/nonexistent cannot be read", {"OS_KEY": "/nonexistent"}),
    ],
    ids=str,
)
def test_a_wrong_variable_is_named(node: Node, variables: Variables, named: str) -> None:
    """What Keystone refuses, and what cannot work, is status 2 and a line that says what to look at."""
    assert named in refusal(node, 2, variables)


def test_the_url_of_another_service_is_refused(node: Node) -> None:
    """An OS_AUTH_URL that leads to Glance, which answers 401 to a search for versions, ends the run."""
    line = refusal(node, 75, {"OS_AUTH_URL": f"{node.cloud.glance}/v2"}, "--timeout", "1")
    assert "Keystone has not answered whole within 20 s" in line


# clouds.yaml


def clouds_yaml(node: Node, path: Path, auth: Variables | None = None, **entry: object) -> Variables:
    """Writes a clouds.yaml with the administrator's entry ``mine``; returns an environment without an openrc."""
    openrc = node.cloud.environment()
    given: Variables = {name.removeprefix("OS_").lower(): openrc[name] for name in NO_OPENRC}
    changed = {name: value for name, value in (given | (auth or {})).items() if value is not None}
    path.write_text(json.dumps({"clouds": {"mine": {"auth": changed, "region_name": REGION} | entry}}))
    return NO_OPENRC | {"OS_REGION_NAME": None, "OS_CLIENT_CONFIG_FILE": str(path)}


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--os-cloud", "mine"], {}),
        ([], {"OS_CLOUD": "mine"}),
        (["--os-cloud", "mine"], {"OS_CLOUD": "theirs"}),
        (["--os-cloud", "mine"], {"OS_AUTH_URL": "nonsense", "OS_USERNAME": "nobody", "OS_PASSWORD": WRONG}),
    ],
)
def test_an_entry_of_clouds_yaml_links(node: Node, tmp_path: Path, arguments: list[str], variables: Variables) -> None:
    """--os-cloud, or OS_CLOUD without it, takes a clouds.yaml entry, whatever openrc is around it."""
    links(node, clouds_yaml(node, tmp_path / "clouds.yaml") | variables, *arguments)


@pytest.mark.parametrize(
    ("named", "cloud_name", "auth", "entry"),
    [
        ("--os-cloud theirs", "theirs", {}, {}),
        ("--os-cloud mine", "mine", {"auth_url": None}, {}),
        ("password", "mine", {"password": None}, {}),
        ("Keystone refuses the credentials", "mine", {"password": WRONG}, {}),
        ("nonsense", "mine", {}, {"auth_type": "nonsense"}),
        ("Atlantis", "mine", {}, {"region_name": "Atlantis"}),
        ("admin endpoint", "mine", {}, {"interface": "admin"}),
    ],
)
def test_a_wrong_entry_of_clouds_yaml_is_named(
    node: Node, tmp_path: Path, named: str, cloud_name: str, auth: Variables, entry: dict[str, object]
) -> None:
    """A clouds.yaml that has no such entry, or one that cannot work, is status 2."""
    variables = clouds_yaml(node, tmp_path / "clouds.yaml", auth, **entry)
    assert named in refusal(node, 2, variables, "--os-cloud", cloud_name, secrets=[WRONG])


def test_the_timeout_holds_for_clouds_yaml_too(node: Node, tmp_path: Path) -> None:
    """A silent Keystone ends the run also where clouds.yaml names it."""
    with Faulty(node.cloud.keystone, lambda _: Answer(0, hang=True)) as server:
        variables = clouds_yaml(node, tmp_path / "clouds.yaml", {"auth_url": f"{server.url}/v3"})
        assert "timed out" in refusal(node, 75, variables, "--timeout", "1", "--os-cloud", "mine")


# The catalog, and TLS


@pytest.mark.parametrize(
    ("asked", "variables"),
    [
        (False, {}),
        (False, {"OS_INTERFACE": "public"}),
        (True, {"OS_INTERFACE": "internal"}),
        (True, {"OS_ENDPOINT_TYPE": "internalURL"}),
        (True, {"OS_INTERFACE": "", "OS_ENDPOINT_TYPE": "internal"}),
        (True, {"OS_INTERFACE": "internal", "OS_ENDPOINT_TYPE": "public"}),
    ],
)
def test_the_interface_chooses_the_endpoint(node: Node, front: Front, asked: bool, variables: Variables) -> None:
    """OS_INTERFACE, or OS_ENDPOINT_TYPE without it, says which of a region's endpoints is asked."""
    server, region = front(interface="internal", region=REGION)
    links(node, region | variables, secrets=server.secrets)
    assert bool(server.paths) is asked


@pytest.mark.parametrize("path", ["", "/", "/v2", "/v2/"])
def test_the_region_chooses_the_endpoint(node: Node, front: Front, path: str) -> None:
    """OS_REGION_NAME's endpoint is asked, and one that ends in /v2 gets no second /v2."""
    server, region = front(path=path)
    links(node, region, secrets=server.secrets)
    assert server.paths
    assert server.secrets
    assert all(re.match(r"/v2/\w{3}", asked) for asked in server.paths)


@pytest.mark.parametrize("demand", [False, True], ids=["any client", "client certificate demanded"])
def test_https_takes_the_files_that_are_named(node: Node, front: Front, tmp_path: Path, demand: bool) -> None:
    """OS_CACERT makes both servers trusted, OS_CERT and OS_KEY make the client known; without them nothing is done."""
    authority = Authority(tmp_path)
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    certificate, key = authority.issue("client")
    both = tmp_path / "both"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    tls = authority.server(demand)
    glance, region = front(tls=tls)
    with Faulty(node.cloud.keystone, tls=tls) as keystone:
        servers = region | {"OS_AUTH_URL": f"{keystone.url}/v3"}
        trusting = servers | {"OS_CACERT": str(authority.ca)}
        known = (trusting | {"OS_CERT": str(both)}, trusting | {"OS_CERT": str(certificate), "OS_KEY": str(key)})
        for variables in known if demand else (trusting, *known):
            links(node, variables, secrets=glance.secrets)
        unknown = (trusting, trusting | {"OS_CERT": str(certificate)}) if demand else ()
        for variables in (servers, servers | {"OS_CACERT": str(other.ca)}, servers | {"OS_CACERT": str(key)}, *unknown):
            assert "OS_CACERT" in refusal(node, 2, variables)
    assert "OS_CACERT" in refusal(node, 2, region)
    assert keystone.paths
    assert glance.paths


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
        # glanceclient cannot read such a body, and says nothing of the status.
        pytest.param("Glance", 75, Answer(401, b'{"message": "no", "code": 1}'), id="Glance: a gateway's 401"),
    ],
)
def test_a_service_that_breaks(node: Node, front: Front, service: str, status: int, answer: Answer) -> None:
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
    return ("--timeout", "2") if answer.hang else ()


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
    _, region = front(lambda path: Answer(200, body.encode()) if path.startswith("/v2/images") else path)
    assert "Glance" in refusal(node, 75, region)


def test_a_cloud_that_is_down(node: Node, front: Front) -> None:
    """Connections that are refused, by Glance or by Keystone, are status 75 and a line that names the service."""
    server, region = front()
    server.stop()
    assert "Glance" in refusal(node, 75, region)
    assert "Keystone" in refusal(node, 75, {"OS_AUTH_URL": f"{server.url}/v3"})


# Listings in pages of two images, as the real Glance makes them, for PAGE_SIZE is more than a test makes


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
    "is the hidden images', and fails": (75, lambda path: Answer(503) if "os_hidden" in path else path),
}


def test_every_page_is_read(node: Node, front: Front) -> None:
    """Images on any page are linked, those of the hidden listing included."""
    images = [*node.cloud.add_many(5), node.cloud.image("hidden", DATA, os_hidden=True)]
    server, region = front(small)
    ended = run(node, region, "--full", secrets=server.secrets)
    assert (ended.returncode, [image for image in images if not node.linked(image)]) == (0, []), ended.stderr
    assert sum("marker=" in path for path in server.paths) >= 2


@pytest.mark.parametrize(("status", "rule"), PAGES.values(), ids=PAGES)
def test_a_page_that_breaks(node: Node, front: Front, status: int, rule: Rule) -> None:
    """A list is whole or it is nothing: where one page fails, no image of the other pages is linked."""
    node.cloud.add_many(5)
    assert "Glance" in refusal(node, status, front(rule)[1], "--full")


def test_pages_without_end(node: Node, front: Front) -> None:
    """A Glance that names an empty page as the next one, again and again, ends the run."""
    _, region = front(lambda path: Answer(200, json.dumps({"images": [], "next": path}).encode()))
    assert "Glance has not answered whole within 20 s" in refusal(node, 75, region, "--timeout", "1")


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
    odd = {"id": image, "name": "\ud800\n\x1b[2J", "status": "active", "disk_format": "raw", "size": True}
    body = json.dumps({"images": [odd]}).encode()
    _, region = front(lambda path: Answer(200, body) if path.startswith("/v2/images") else path)
    ended = run(node, region)
    assert (ended.returncode, node.names()) == (0, set()), ended.stderr
    assert re.fullmatch(r"([ -~]+\n){3}", ended.stdout)
    assert "Glance gives no size" in ended.stdout


# What is seen, and what is never said


def test_what_a_credential_sees_is_linked(node: Node) -> None:
    """A member links what it sees and is warned, once, that this is not all; the administrator links the rest."""
    cloud = node.cloud
    member = cloud.add_user("cloud-member", "cloud-member", "member")
    third = cloud.add_user("cloud-third", "cloud-third", "member")
    seen = {
        cloud.image("own", DATA, member),
        cloud.image("own, hidden", DATA, member, os_hidden=True),
        cloud.image("public", DATA, visibility="public"),
        cloud.image("public, hidden", DATA, visibility="public", os_hidden=True),
        cloud.image("community of another project", DATA, third, visibility="community"),
    }
    unseen = {
        cloud.image("private of another project", DATA, third),
        cloud.image("private of another project, hidden", DATA, third, os_hidden=True),
    }
    credential = {"OS_USERNAME": "cloud-member", "OS_PROJECT_NAME": "cloud-member"}
    ended = node.run(**credential)
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(r"ln-images: warning: .*admin role.*\n", ended.stderr)
    assert {image for image in seen | unseen if node.linked(image)} == seen
    quiet = node.run("-q", **credential)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    ended = node.run()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {image for image in seen | unseen if node.linked(image)} == seen | unseen


@pytest.mark.parametrize("role", ["reader", "member", "manager", "admin"])
def test_only_the_role_admin_sees_every_image(node: Node, role: str) -> None:
    """With each lesser role another project's private image stays without a link, and a warning says so."""
    cloud = node.cloud
    image = cloud.image("private of another project", DATA)
    cloud.add_user(f"only-{role}", f"only-{role}", role)
    ended = node.run(OS_USERNAME=f"only-{role}", OS_PROJECT_NAME=f"only-{role}")
    assert (ended.returncode, node.linked(image)) == (0, role == "admin"), ended.stderr
    assert ("no admin role" in ended.stderr) is (role != "admin")


def test_an_application_credential_for_nothing_but_the_listing_suffices(node: Node) -> None:
    """The credential of the README may list images, and nothing else of what its user may do."""
    cloud = node.cloud
    image = cloud.image("private of another project", DATA, cloud.add_user("owner", "owner", "member"))
    user = cloud.add_user("ln-images", "ln-images", "admin")
    rules = json.loads(block("access rules"))[:2]
    openrc = cloud.application_credential(user, roles=[{"name": "admin"}], access_rules=rules)
    links(node, {**NO_OPENRC, **openrc})
    assert node.linked(image)
    auth = v3.ApplicationCredential(
        openrc["OS_AUTH_URL"],
        application_credential_id=openrc["OS_APPLICATION_CREDENTIAL_ID"],
        application_credential_secret=openrc["OS_APPLICATION_CREDENTIAL_SECRET"],
    )
    limited = cloud.image_api(Session(auth))
    for method, path in (("DELETE", f"/images/{image}"), ("GET", f"/images/{image}/file"), ("POST", "/images")):
        with pytest.raises(Unauthorized):
            limited.request(path, method)


@pytest.mark.parametrize("status", [400, 401, 500])
@pytest.mark.parametrize("service", ["Keystone", "Glance"])
def test_a_service_that_echoes_secrets(node: Node, front: Front, service: str, status: int) -> None:
    """A service that repeats the password or the token in its error does not bring it to a terminal or a log."""
    glance, region = front()
    with Faulty(node.cloud.keystone) as keystone:

        def echo(path: str) -> str | Answer:
            secret = PASSWORD if service == "Keystone" else max(glance.secrets)
            body = json.dumps({"error": {"message": f"you sent {secret}"}}).encode()
            return path if path == "/v3" else Answer(status, body)

        (keystone if service == "Keystone" else glance).rule = echo
        ended = run(node, region | {"OS_AUTH_URL": f"{keystone.url}/v3"}, secrets=glance.secrets)
    assert ended.returncode in (2, 75)


@pytest.mark.parametrize(
    "variables",
    [
        {"OS_AUTH_TYPE": "admin_token", "OS_TOKEN": f"{WRONG}\n", "OS_ENDPOINT": "http://127.0.0.1:1"},
        {"OS_AUTH_URL": f"http://me:{WRONG}@127.0.0.1:1/v3"},
    ],
    ids=["a token with a newline", "a password in OS_AUTH_URL"],
)
def test_a_secret_in_an_odd_place(node: Node, variables: Variables) -> None:
    """A secret that the HTTP library complains of, or that is part of a URL, is not said either."""
    assert run(node, variables, "--full", secrets=[WRONG]).returncode in (2, 75)


# The boundary where Glance's JSON becomes an Image

FIELDS = ("id", "name", "status", "disk_format", "os_glance_importing_to_stores", "size")
TEXT = st.text(st.characters())  # surrogates and control characters included, as JSON allows
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300) | st.floats() | TEXT,
    lambda values: st.lists(values) | st.dictionaries(TEXT, values),
    max_leaves=5,
)


OPTIONAL = dict.fromkeys(FIELDS[1:], TEXT | VALUES) | {"size": st.integers() | st.booleans() | VALUES, "self": VALUES}


@given(st.fixed_dictionaries({"id": TEXT}, optional=OPTIONAL) | st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_any_json_object_is_an_image_or_a_temporary_error(fields: dict[str, Any]) -> None:
    """Fields of Glance's types are taken as they are, any other counts as empty; only a lack of an id is an error."""
    document = json.loads(json.dumps(fields))
    if type(fields.get("id")) is not str:
        with pytest.raises(TemporaryError):
            image_of(document)
        return
    image, size = image_of(document), fields.get("size")
    texts = (image.id, image.name, image.status, image.disk_format, image.importing_to)
    assert texts == tuple(fields[key] if type(fields.get(key)) is str else "" for key in FIELDS[:-1])
    assert image.size == (size if type(size) is int and size >= 0 else None)
    assert type(image.size) in (int, type(None))
