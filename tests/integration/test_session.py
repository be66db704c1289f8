"""Every way to the cloud.

Credentials, catalog and TLS, with the installed command and a real Keystone.
"""

import json
import re
from pathlib import Path

import pytest
from keystoneauth1.exceptions import Unauthorized
from keystoneauth1.identity import v3
from keystoneauth1.session import Session
from ln_images.keystone import connect

from ln_images.glance import Glance
from ln_images.model import ConfigurationError, TemporaryError
from support.cloud import PASSWORD, REGION, Cloud
from support.faulty import Answer, Authority, Faulty, Front, Variables
from support.node import NO_OPENRC, Node, block
from support.wire import links, refusal, run

DATA = b"\1" * 4096
WRONG = "n0t-the-Password"


# Credentials


@pytest.fixture(scope="session")
def facts(cloud: Cloud) -> dict[str, str]:
    """What the variables of ``WAYS`` are filled in with."""
    who = cloud.as_user()
    facts = {"keystone": cloud.keystone, "user": who.get_user_id(), "project": who.get_project_id()}
    credential = cloud.application_credential(who, name="cron")
    facts |= {
        name: credential[f"OS_APPLICATION_CREDENTIAL_{name.upper()}"] for name in ("id", "secret")
    }
    facts["token"] = who.get_token()
    return {name: str(fact) for name, fact in facts.items()}


NO_DOMAINS: Variables = {"OS_USER_DOMAIN_NAME": None, "OS_PROJECT_DOMAIN_NAME": None}
NO_NAMES: Variables = {"OS_USERNAME": None, "OS_PROJECT_NAME": None}
APPLICATION: Variables = {
    "OS_AUTH_TYPE": "v3applicationcredential",
    "OS_APPLICATION_CREDENTIAL_SECRET": "{secret}",
}
BY_ID: Variables = APPLICATION | {"OS_APPLICATION_CREDENTIAL_ID": "{id}"}
BY_NAME: Variables = APPLICATION | {"OS_APPLICATION_CREDENTIAL_NAME": "cron"}
EMPTIES = (
    "AUTH_TYPE",
    "USER_DOMAIN_ID",
    "PROJECT_ID",
    "CACERT",
    "CERT",
    "KEY",
    "CLOUD",
    "INTERFACE",
)
WAYS: dict[str, Variables] = {
    "password": {},
    "password, version discovered": {"OS_AUTH_URL": "{keystone}"},
    "v3password": {"OS_AUTH_TYPE": "v3password"},
    "password, by ids": NO_NAMES
    | NO_DOMAINS
    | {"OS_USER_ID": "{user}", "OS_PROJECT_ID": "{project}"},
    "default domain": NO_DOMAINS | {"OS_DEFAULT_DOMAIN_ID": "default"},
    "domain ids": NO_DOMAINS | {"OS_USER_DOMAIN_ID": "default", "OS_PROJECT_DOMAIN_ID": "default"},
    "deprecated names": NO_NAMES | {"OS_USER_NAME": "admin", "OS_TENANT_NAME": "admin"},
    "deprecated ids": NO_NAMES | {"OS_USERNAME": "admin", "OS_TENANT_ID": "{project}"},
    "empty is unset": {f"OS_{name}": "" for name in EMPTIES},
    "no region": {"OS_REGION_NAME": None},
    "application credential": NO_OPENRC | {"OS_AUTH_URL": "{keystone}/v3"} | BY_ID,
    "application credential beside an openrc": BY_ID,
    "application credential by name": NO_NAMES
    | BY_NAME
    | {"OS_USERNAME": "admin", "OS_PROJECT_DOMAIN_NAME": None},
    "application credential by name, beside an openrc": BY_NAME,
    "token": {
        "OS_AUTH_TYPE": "token",
        "OS_TOKEN": "{token}",
        "OS_USERNAME": None,
        "OS_PASSWORD": None,
    },
    "v3token": {
        "OS_AUTH_TYPE": "v3token",
        "OS_TOKEN": "{token}",
        "OS_USERNAME": None,
        "OS_PASSWORD": None,
    },
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
        (
            "OS_AUTH_TYPE=nonsense is no auth plugin known here: use one of admin_token",
            {"OS_AUTH_TYPE": "nonsense"},
        ),
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


@pytest.mark.parametrize(
    "host",
    ["HTTPS://host", "http://host:", "http://[fe80::1%25eth0]:5000", "http://me@dom:pw@host"],
)
def test_an_odd_url_is_taken(host: str) -> None:
    """Whatever the HTTP library can ask is no wrong variable, and nothing is asked yet."""
    assert connect(dict.fromkeys(NO_OPENRC, "admin") | {"OS_AUTH_URL": f"{host}/v3"}, 1)


@pytest.mark.parametrize(
    "host", ["http://host:0", "http://host:99999", "http://[1.2.3.4]", "http://host:\u0665"]
)
def test_an_impossible_url_is_refused(host: str) -> None:
    """What no server can have is a wrong variable, and not a server that cannot be reached."""
    with pytest.raises(ConfigurationError, match="OS_AUTH_URL is no http or https URL"):
        connect(dict.fromkeys(NO_OPENRC, "admin") | {"OS_AUTH_URL": f"{host}/v3"}, 1)


def test_the_url_of_another_service_is_refused(node: Node) -> None:
    """An OS_AUTH_URL that leads to Glance, which answers 401 to a search for versions, ends the run."""
    line = refusal(node, 75, {"OS_AUTH_URL": f"{node.cloud.glance}/v2"}, "--timeout", "1")
    assert "Keystone has not answered whole within 2 s" in line


# clouds.yaml


def clouds_yaml(
    node: Node, path: Path, auth: Variables | None = None, **entry: object
) -> Variables:
    """Writes a clouds.yaml with the administrator's entry ``mine``.

    Returns an environment without an openrc.
    """
    openrc = node.cloud.environment()
    given: Variables = {name.removeprefix("OS_").lower(): openrc[name] for name in NO_OPENRC}
    changed = {name: value for name, value in (given | (auth or {})).items() if value is not None}
    path.write_text(
        json.dumps({"clouds": {"mine": {"auth": changed, "region_name": REGION} | entry}})
    )
    return NO_OPENRC | {"OS_REGION_NAME": None, "OS_CLIENT_CONFIG_FILE": str(path)}


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--os-cloud", "mine"], {}),
        ([], {"OS_CLOUD": "mine"}),
        (["--os-cloud", "mine"], {"OS_CLOUD": "theirs"}),
        (
            ["--os-cloud", "mine"],
            {"OS_AUTH_URL": "nonsense", "OS_USERNAME": "nobody", "OS_PASSWORD": WRONG},
        ),
    ],
)
def test_an_entry_of_clouds_yaml_links(
    node: Node, tmp_path: Path, arguments: list[str], variables: Variables
) -> None:
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
    node: Node,
    tmp_path: Path,
    named: str,
    cloud_name: str,
    auth: Variables,
    entry: dict[str, object],
) -> None:
    """A clouds.yaml that has no such entry, or one that cannot work, is status 2."""
    variables = clouds_yaml(node, tmp_path / "clouds.yaml", auth, **entry)
    assert named in refusal(node, 2, variables, "--os-cloud", cloud_name, secrets=[WRONG])


def test_the_timeout_holds_for_clouds_yaml_too(node: Node, tmp_path: Path) -> None:
    """A silent Keystone ends the run also where clouds.yaml names it."""
    with Faulty(node.cloud.keystone, lambda _: Answer(0, hang=True)) as server:
        variables = clouds_yaml(node, tmp_path / "clouds.yaml", {"auth_url": f"{server.url}/v3"})
        assert "within 2 s" in refusal(node, 75, variables, "--timeout", "1", "--os-cloud", "mine")


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
def test_the_interface_chooses_the_endpoint(
    node: Node, front: Front, asked: bool, variables: Variables
) -> None:
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
def test_https_takes_the_files_that_are_named(
    node: Node, front: Front, tmp_path: Path, demand: bool
) -> None:
    """OS_CACERT makes both servers trusted, OS_CERT and OS_KEY make the client known.

    Without them nothing is done.
    """
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
        known = (
            trusting | {"OS_CERT": str(both)},
            trusting | {"OS_CERT": str(certificate), "OS_KEY": str(key)},
        )
        for variables in known if demand else (trusting, *known):
            links(node, variables, secrets=glance.secrets)
        unknown = (trusting, trusting | {"OS_CERT": str(certificate)}) if demand else ()
        # What is wrong with it is said, too: the whole chain of the libraries' errors does not fit
        # into a line.
        assert "Keystone: certificate verify failed: " in refusal(node, 2, servers)
        for variables in (
            servers,
            servers | {"OS_CACERT": str(other.ca)},
            servers | {"OS_CACERT": str(key)},
            *unknown,
        ):
            assert "OS_CACERT" in refusal(node, 2, variables)
    assert "OS_CACERT" in refusal(node, 2, region)
    assert keystone.paths
    assert glance.paths


@pytest.mark.parametrize(
    ("url", "error", "told"),
    [
        (
            "{https}/v3",
            ConfigurationError,
            "Keystone speaks http, not https: correct OS_AUTH_URL or the catalog",
        ),
        (
            "http://127.0.0.1:1/v3",
            TemporaryError,
            "Keystone cannot be asked: ConnectFailure: Connection refused: ",
        ),
        (
            "http://nowhere.invalid/v3",
            TemporaryError,
            r"ConnectFailure: (Name|Temporary|No address) [ \w]+: ",
        ),
    ],
)
def test_a_url_that_leads_nowhere_tells_the_cause(
    url: str, error: type[Exception], told: str
) -> None:
    """Https to a server that speaks http, a port that nobody has and a name that nobody knows are told as that."""
    with Faulty("http://127.0.0.1:1") as plain:
        openrc = dict.fromkeys(NO_OPENRC, "admin")
        openrc["OS_AUTH_URL"] = url.format(https=plain.url.replace("http:", "https:"))
        with pytest.raises(error, match=told):
            Glance(connect(openrc, 20)).images()


# What is seen, and what is never said


def test_what_a_credential_sees_is_linked(node: Node) -> None:
    """A member links what it sees and is warned, once, that this is not all.

    The administrator links the rest.
    """
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
    image = cloud.image(
        "private of another project", DATA, cloud.add_user("owner", "owner", "member")
    )
    user = cloud.add_user("ln-images", "ln-images", "admin")
    rules = json.loads(block("access rules"))[:1]
    openrc = cloud.application_credential(user, roles=[{"name": "admin"}], access_rules=rules)
    links(node, {**NO_OPENRC, **openrc})
    assert node.linked(image)
    auth = v3.ApplicationCredential(
        openrc["OS_AUTH_URL"],
        application_credential_id=openrc["OS_APPLICATION_CREDENTIAL_ID"],
        application_credential_secret=openrc["OS_APPLICATION_CREDENTIAL_SECRET"],
    )
    limited = cloud.image_api(Session(auth))
    for method, path in (
        ("DELETE", f"/images/{image}"),
        ("GET", f"/images/{image}/file"),
        ("POST", "/images"),
    ):
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
        {
            "OS_AUTH_TYPE": "admin_token",
            "OS_TOKEN": f"{WRONG}\n",
            "OS_ENDPOINT": "http://127.0.0.1:1",
        },
        {"OS_AUTH_URL": f"http://me:{WRONG}@127.0.0.1:1/v3"},
    ],
    ids=["a token with a newline", "a password in OS_AUTH_URL"],
)
def test_a_secret_in_an_odd_place(node: Node, variables: Variables) -> None:
    """A secret that the HTTP library complains of, or that is part of a URL, is not said either."""
    assert run(node, variables, "--full", secrets=[WRONG]).returncode in (2, 75)
