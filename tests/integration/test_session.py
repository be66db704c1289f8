"""Credentials, clouds.yaml, endpoints, TLS, proxies and redirects, with a real Keystone."""

import base64
import hmac
import json
import re
import struct
import time
import warnings
from pathlib import Path

import pytest
from keystoneauth1.exceptions import Unauthorized
from keystoneauth1.identity import v3
from keystoneauth1.session import Session

from ln_images.glance import Glance
from ln_images.model import Command, ConfigurationError, TemporaryError
from ln_images.session import connect
from support.cloud import PASSWORD, REGION, ROOT, Cloud
from support.faulty import Answer, Authority, Faulty, Front, Rule, Variables
from support.node import NO_OPENRC, Node
from support.proxy import refusing_proxy
from support.wire import check_links, run, run_refused

DATA = b"\1" * 4096
WRONG = "n0t-the-Password"


# Credentials


@pytest.fixture(scope="session")
def ids(cloud: Cloud) -> dict[str, str]:
    """Return what replaces the names in braces in ``WAYS``."""
    who = cloud.as_user()
    credential = cloud.application_credential(who, name="cron")
    return {
        "keystone": cloud.keystone,
        "user": str(who.get_user_id()),
        "project": str(who.get_project_id()),
        "token": str(who.get_token()),
        "id": credential["OS_APPLICATION_CREDENTIAL_ID"],
        "secret": credential["OS_APPLICATION_CREDENTIAL_SECRET"],
    }


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
    "default domain id": NO_DOMAINS | {"OS_DEFAULT_DOMAIN_ID": "default"},
    "no domain": NO_DOMAINS,
    "default domain": NO_DOMAINS | {"OS_DEFAULT_DOMAIN": "default"},
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
    "application credential beside a system scope": BY_ID | {"OS_SYSTEM_SCOPE": "all"},
    "one method of v3multifactor": {
        "OS_AUTH_TYPE": "v3multifactor",
        "OS_AUTH_METHODS": "v3password",
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_authenticate_links(node: Node, ids: dict[str, str], way: Variables) -> None:
    """Passwords, application credentials and tokens work under the names of any usual openrc."""
    check_links(node, {name: value and value.format(**ids) for name, value in way.items()})


MULTIFACTOR: Variables = {
    "OS_AUTH_TYPE": "v3multifactor",
    "OS_AUTH_METHODS": "v3password, v3totp",
}


@pytest.mark.parametrize(
    ("missing", "variables"),
    [
        ("OS_AUTH_URL", {"OS_AUTH_URL": None}),
        ("OS_USERNAME", {"OS_USERNAME": None}),
        ("OS_PASSWORD", {"OS_PASSWORD": None}),
        ("OS_PASSWORD", {"OS_PASSWORD": ""}),
        ("OS_APPLICATION_CREDENTIAL_ID", APPLICATION),
        ("OS_APPLICATION_CREDENTIAL_SECRET", BY_ID | {"OS_APPLICATION_CREDENTIAL_SECRET": ""}),
        ("OS_TOKEN", {"OS_AUTH_TYPE": "token"}),
        ("OS_TOKEN", {"OS_AUTH_TYPE": "v3token", "OS_TOKEN": ""}),
        ("OS_AUTH_METHODS", {"OS_AUTH_TYPE": "v3multifactor"}),
        ("OS_PASSCODE", MULTIFACTOR),
    ],
)
def test_a_missing_variable_is_named(node: Node, missing: str, variables: Variables) -> None:
    """The error names a variable that is missing or empty, and says where it comes from."""
    line = run_refused(node, 2, variables)
    assert line == (
        f"ln-images: {missing} is not set; run `source admin-openrc` first, or use --os-cloud"
    )


def test_all_missing_variables_are_named(node: Node) -> None:
    """Without any openrc, one error names each variable that is needed."""
    line = run_refused(node, 2, NO_OPENRC)
    assert line.startswith(
        "ln-images: OS_AUTH_URL and OS_PASSWORD and OS_USERNAME are not set; run `source"
    )


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
            "OS_AUTH_TYPE=nonsense is not a known auth plugin; use one of admin_token",
            {"OS_AUTH_TYPE": "nonsense"},
        ),
        ("OS_SYSTEM_SCOPE is set", {"OS_SYSTEM_SCOPE": "all"}),
        ("OS_AUTH_METHODS names v3nonsense", MULTIFACTOR | {"OS_AUTH_METHODS": "v3nonsense"}),
        ("refuses the credentials", NO_DOMAINS | {"OS_DEFAULT_DOMAIN": "nowhere"}),
        ("nonsense is not an http or https URL", {"OS_IMAGE_ENDPOINT_OVERRIDE": "nonsense"}),
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
    """What Keystone refuses, and what cannot work, is status 2, and the error names the cause."""
    assert named in run_refused(node, 2, variables)


@pytest.mark.parametrize(
    "host",
    ["HTTPS://host", "http://host:", "http://[fe80::1%25eth0]:5000", "http://me@dom:pw@host"],
)
def test_an_odd_url_is_accepted(host: str) -> None:
    """A URL that the HTTP library can request is not refused, and nothing is sent yet."""
    assert connect(dict.fromkeys(NO_OPENRC, "admin") | {"OS_AUTH_URL": f"{host}/v3"}, 1)


@pytest.mark.parametrize(
    "host", ["http://host:0", "http://host:99999", "http://[1.2.3.4]", "http://host:\u0665"]
)
def test_an_impossible_url_is_refused(host: str) -> None:
    """A URL that no server can have is status 2, and not a server that cannot be reached."""
    with pytest.raises(ConfigurationError, match="OS_AUTH_URL is not an http or https URL"):
        connect(dict.fromkeys(NO_OPENRC, "admin") | {"OS_AUTH_URL": f"{host}/v3"}, 1)


def test_the_url_of_another_service_is_refused(node: Node) -> None:
    """With Glance's URL as OS_AUTH_URL the run ends, though keystoneauth1 waits for its own lock.

    Glance answers 401 to the discovery of versions.
    """
    line = run_refused(node, 75, {"OS_AUTH_URL": f"{node.cloud.glance}/v2"}, "--timeout", "1")
    assert "Keystone did not send a complete response within 2 s" in line


# clouds.yaml


def clouds_yaml(
    node: Node, path: Path, auth: Variables | None = None, **entry: object
) -> Variables:
    """Write a clouds.yaml with the administrator's entry ``mine``, with some changes.

    Return an environment without an openrc.
    """
    openrc = node.cloud.environment()
    merged: Variables = {name.removeprefix("OS_").lower(): openrc[name] for name in NO_OPENRC}
    merged |= auth or {}
    values = {name: value for name, value in merged.items() if value is not None}
    path.write_text(
        json.dumps({"clouds": {"mine": {"auth": values, "region_name": REGION} | entry}})
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
    """--os-cloud, or else OS_CLOUD, chooses an entry of clouds.yaml, whatever OS_* says."""
    check_links(node, clouds_yaml(node, tmp_path / "clouds.yaml") | variables, *arguments)


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
        ("--os-cloud mine: system_scope", "mine", {"system_scope": "all"}, {}),
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
    """A clouds.yaml without such an entry, or with one that cannot work, is status 2."""
    variables = clouds_yaml(node, tmp_path / "clouds.yaml", auth, **entry)
    assert named in run_refused(node, 2, variables, "--os-cloud", cloud_name, secrets=[WRONG])


def test_the_timeout_holds_for_clouds_yaml_too(node: Node, tmp_path: Path) -> None:
    """The run ends even if a silent Keystone comes from clouds.yaml."""
    with Faulty(node.cloud.keystone, lambda _: Answer(0, hang=True)) as server:
        variables = clouds_yaml(node, tmp_path / "clouds.yaml", {"auth_url": f"{server.url}/v3"})
        line = run_refused(node, 75, variables, "--timeout", "1", "--os-cloud", "mine")
        assert "Keystone" in line


# The catalog, and TLS


@pytest.mark.parametrize(
    ("is_chosen", "variables"),
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
    node: Node, front: Front, is_chosen: bool, variables: Variables
) -> None:
    """OS_INTERFACE, or else OS_ENDPOINT_TYPE, chooses among a region's endpoints."""
    server, region = front(interface="internal", region=REGION)
    check_links(node, region | variables, secrets=server.secrets)
    assert bool(server.paths) is is_chosen


@pytest.mark.parametrize("path", ["", "/", "/v2", "/v2/"])
def test_the_region_chooses_the_endpoint(node: Node, front: Front, path: str) -> None:
    """OS_REGION_NAME chooses the endpoint, and one that ends in /v2 gets no second /v2."""
    server, region = front(path=path)
    check_links(node, region, secrets=server.secrets)
    assert server.paths
    assert server.secrets
    assert all(re.match(r"/v2/\w{3}", requested) for requested in server.paths)


def test_an_endpoint_in_upper_case_is_the_same(node: Node) -> None:
    """A host in upper case, which the HTTP library writes in lower case, is the endpoint's host."""
    with Faulty(node.cloud.glance) as server:
        port = server.server_port
        check_links(node, {"OS_IMAGE_ENDPOINT_OVERRIDE": f"http://LOCALHOST:{port}"})
        assert server.paths


@pytest.mark.parametrize("path", ["", "/", "/v2", "/v2/"])
@pytest.mark.parametrize("place", ["openrc", "clouds.yaml"])
def test_an_endpoint_override_replaces_the_catalog(
    node: Node, tmp_path: Path, place: str, path: str
) -> None:
    """OS_IMAGE_ENDPOINT_OVERRIDE and clouds.yaml's image_endpoint_override choose the endpoint."""
    with Faulty(node.cloud.glance) as server:
        url = f"{server.url}{path}"
        if place == "openrc":
            variables: Variables = {"OS_IMAGE_ENDPOINT_OVERRIDE": url}
        else:
            yaml = tmp_path / "clouds.yaml"
            variables = clouds_yaml(node, yaml, image_endpoint_override=url)
            variables |= {"OS_CLOUD": "mine"}
        check_links(node, variables, secrets=server.secrets)
        assert any(requested.startswith("/v2/images?") for requested in server.paths)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://host:8774/v2.1", "http://host:8774"),
        ("http://host/compute/v2.1/", "http://host/compute"),
        (f"http://host:8774/v2.1/{'0d' * 16}", "http://host:8774"),
        ("http://host:8774/v2.1/%(project_id)s", "http://host:8774"),
        ("http://host/v2/compute", "http://host/v2/compute"),
    ],
)
def test_the_endpoint_of_compute_can_be_overridden(
    node: Node, tmp_path: Path, url: str, endpoint: str
) -> None:
    """Nova's endpoint is that of the override, without its version and project."""
    variables = node.environment(OS_COMPUTE_ENDPOINT_OVERRIDE=url)
    assert connect(variables, 1).endpoint("compute") == endpoint
    clouds = clouds_yaml(node, tmp_path / "clouds.yaml", compute_endpoint_override=url)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds["OS_CLIENT_CONFIG_FILE"]))
        assert connect({}, 1, "mine").endpoint("compute") == endpoint


@pytest.mark.parametrize("demand", [False, True], ids=["any client", "client certificate demanded"])
def test_https_takes_the_files_that_are_named(
    node: Node, front: Front, tmp_path: Path, demand: bool
) -> None:
    """OS_CACERT makes us trust both servers, and OS_CERT and OS_KEY make them trust us.

    Without these nothing is done.
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
            check_links(node, variables, secrets=glance.secrets)
        unknown = (trusting, trusting | {"OS_CERT": str(certificate)}) if demand else ()
        # The error names the innermost cause, since all of what the libraries say is too long.
        assert "Keystone: certificate verify failed: " in run_refused(node, 2, servers)
        for variables in (
            servers,
            servers | {"OS_CACERT": str(other.ca)},
            servers | {"OS_CACERT": str(key)},
            *unknown,
        ):
            assert "OS_CACERT" in run_refused(node, 2, variables)
    assert "OS_CACERT" in run_refused(node, 2, region)
    assert keystone.paths
    assert glance.paths


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        (
            "{https}/v3",
            ConfigurationError,
            "Keystone speaks http, not https; correct OS_AUTH_URL or the catalog",
        ),
        (
            "http://127.0.0.1:1/v3",
            TemporaryError,
            r"Keystone cannot be queried \(ConnectFailure: Connection refused\); ",
        ),
        (
            "http://nowhere.invalid/v3",
            TemporaryError,
            r"ConnectFailure: (Name|Temporary|No address) [ \w]+\); ",
        ),
    ],
)
def test_a_url_that_leads_nowhere(url: str, error: type[Exception], message: str) -> None:
    """The error says whether a server speaks http, a port is closed, or a name is unknown."""
    with Faulty("http://127.0.0.1:1") as plain:
        openrc = dict.fromkeys(NO_OPENRC, "admin")
        openrc["OS_AUTH_URL"] = url.format(https=plain.url.replace("http:", "https:"))
        with pytest.raises(error, match=message):
            Glance(connect(openrc, 20), "admin").list_all()


# Redirects and other URLs: no request leaves the URLs that the user or the catalog chose


THIEVES = {
    "Keystone's discovery": lambda path: path == "/v3",
    "Keystone's tokens": lambda path: path.endswith("/auth/tokens"),
    "Glance's schema": lambda path: path.startswith("/v2/schemas"),
    "Glance's list": lambda path: path.startswith("/v2/images"),
}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", THIEVES)
def test_a_redirect_is_not_followed(node: Node, front: Front, place: str, status: int) -> None:
    """A redirect is status 2, names both URLs, and the other host gets no request at all."""
    with Faulty("http://127.0.0.1:1", lambda _: Answer.of({"images": []})) as thief:

        def rule(path: str) -> str | Answer:
            if THIEVES[place](path):
                return Answer.redirect(f"{thief.url}{path}", status)
            return path

        glance, region = front(rule)
        with Faulty(node.cloud.keystone, rule) as keystone:
            variables = region | {"OS_AUTH_URL": f"{keystone.url}/v3"}
            line = run_refused(node, 2, variables, secrets=glance.secrets)
    source = keystone if place.startswith("Keystone") else glance
    assert f"{source.url}/v" in line
    assert f"redirects to {thief.url}/v" in line
    assert thief.paths == []


@pytest.mark.parametrize("host", ["//", "", "user@"])
def test_a_next_link_with_a_host_is_not_followed(node: Node, front: Front, host: str) -> None:
    """A ``next`` link to another host fails the pass, and that host gets no request."""
    node.cloud.add_many(1)
    with Faulty("http://127.0.0.1:1", lambda _: Answer.of({"images": []})) as thief:
        authority = thief.url.removeprefix("http://")
        url = {"//": f"//{authority}", "": thief.url, "user@": f"http://user@{authority}"}[host]
        page = {"images": [], "next": f"{url}/v2/images?marker=x"}
        _, region = front(lambda path: Answer.of(page) if "/images?" in path else path)
        line = run_refused(node, 75 if host == "//" else 2, region)
    assert host == "//" or f"{thief.url}/v2/images: an answer leads there" in line
    assert thief.paths == []


@pytest.mark.parametrize("path", ["/evil", "/image/%2e%2e/evil", "/image/../evil"])
def test_a_next_link_stays_below_the_endpoint(node: Node, path: str) -> None:
    """A ``next`` link to another path of the endpoint's host gets no request either."""
    paths: list[str] = []

    def rule(requested: str) -> Answer:
        paths.append(requested)
        return Answer.of({"images": [], "next": f"{server.url}{path}"})

    with Faulty("http://127.0.0.1:1", rule) as server:
        override: Variables = {"OS_IMAGE_ENDPOINT_OVERRIDE": f"{server.url}/image"}
        assert "an answer leads there" in run_refused(node, 2, override)
    assert paths
    assert all(requested.startswith("/image/v2/images?") for requested in paths)


def test_the_password_does_not_follow_a_discovery_document(node: Node) -> None:
    """A discovery document that names another host leads no request there."""
    with Faulty("http://127.0.0.1:1") as thief:
        version = {
            "id": "v3.14",
            "status": "stable",
            "links": [{"rel": "self", "href": f"{thief.url}/v3/"}],
        }
        document = Answer.of({"versions": {"values": [version]}})
        rule: Rule = lambda path: document if path == "/" else path  # noqa: E731
        with Faulty(node.cloud.keystone, rule) as keystone:
            check_links(node, {"OS_AUTH_URL": keystone.url})
    assert "/v3/auth/tokens" in keystone.paths
    assert thief.paths == []


def test_a_request_outside_of_a_query_is_refused(node: Node) -> None:
    """No request goes out without the alarm that bounds its time."""
    connection = connect(node.environment(), 1)
    with pytest.raises(RuntimeError, match="outside of a query"):
        connection.session.get(node.cloud.keystone, authenticated=False)


# Proxies


@pytest.mark.parametrize("status", [403, 407, 502, 503, 504])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_answers_in_place_of_a_service(
    node: Node, tmp_path: Path, scheme: str, status: int
) -> None:
    """The error names the proxy without its password, and no_proxy, which then helps; status 75."""
    authority = Authority(tmp_path)
    tls = authority.server(False) if scheme == "https" else None
    with refusing_proxy(status) as proxy, Faulty(node.cloud.keystone, tls=tls) as keystone:
        variables: Variables = {
            "OS_AUTH_URL": f"{keystone.url}/v3",
            "OS_CACERT": str(authority.ca),
            f"{scheme}_proxy": f"http://me:{WRONG}@{proxy}",
        }
        line = run_refused(node, 75, variables, secrets=[WRONG])
        assert f"the proxy http://{proxy} of the environment " in line
        assert str(status) in line
        assert "no_proxy" in line
        check_links(node, variables | {"no_proxy": "127.0.0.1"}, secrets=[WRONG])


def test_a_proxy_that_does_not_run(node: Node) -> None:
    """A proxy that cannot be reached is named as such, and not Keystone."""
    line = run_refused(node, 75, {"http_proxy": "http://127.0.0.1:1"})
    assert "the proxy http://127.0.0.1:1 of the environment does not let us through" in line


def test_an_error_of_a_service_behind_a_proxy_is_its_own(node: Node) -> None:
    """A 403 that an OpenStack service sends through a proxy is the service's."""
    answer = Answer(403, b"{}", headers={"x-openstack-request-id": "req-1"})
    # To a client this server is a proxy that forwards the requests.
    with Faulty(node.cloud.keystone, lambda _: answer) as proxy:
        line = run_refused(node, 2, {"http_proxy": proxy.url})
    assert line.startswith("ln-images: Keystone refuses the credentials (HTTP 403)")


# Roles


def test_what_a_credential_sees_is_linked(node: Node) -> None:
    """A member links what it sees, and an error says that this is not all, even with -q."""
    cloud = node.cloud
    member = cloud.add_user("cloud-member", "cloud-member", "member")
    third = cloud.add_user("cloud-third", "cloud-third", "member")
    visible = {
        cloud.image("own", DATA, member),
        cloud.image("own, hidden", DATA, member, os_hidden=True),
        cloud.image("public", DATA, visibility="public"),
        cloud.image("public, hidden", DATA, visibility="public", os_hidden=True),
        cloud.image("community of another project", DATA, third, visibility="community"),
    }
    private = cloud.image("private of another project", DATA, third)
    hidden = cloud.image("private of another project, hidden", DATA, third, os_hidden=True)
    every_image = {*visible, private, hidden}
    credential: Variables = {"OS_USERNAME": "cloud-member", "OS_PROJECT_NAME": "cloud-member"}
    warning = r"ln-images: the credential does not have the role admin, .* --admin-role\n"
    for arguments in ([], ["-q"]):
        finished = node.run(*arguments, command=Command.LINK, **credential)
        assert finished.returncode == 0
        assert re.fullmatch(warning, finished.stderr)
        assert {image for image in every_image if node.is_linked(image)} == visible
    finished = node.run()
    assert (finished.returncode, finished.stderr) == (0, "")
    assert {image for image in every_image if node.is_linked(image)} == every_image


def test_an_image_that_glance_hides_is_not_called_deleted(node: Node) -> None:
    """The report on a file that Glance does not show never suggests that it may be removed."""
    image = node.cloud.image("private of another project", DATA)
    node.cloud.add_user("hidden-from", "hidden-from", "member")
    # One image that it can see shows that this is the right cloud.
    node.cloud.image("public", DATA, visibility="public")
    document = node.report("--full", OS_USERNAME="hidden-from", OS_PROJECT_NAME="hidden-from")
    (result,) = [result for result in document["images"] if result["id"] == image]
    assert (result["outcome"], result["reason_code"]) == ("skipped", "unknown_to_glance")
    assert result["reason"] == "Glance does not show this image to the credential"


@pytest.mark.parametrize("role", ["reader", "member", "manager", "admin"])
def test_only_the_role_admin_sees_every_image(node: Node, role: str) -> None:
    """With a lesser role another project's private image gets no link, and an error says why."""
    cloud = node.cloud
    image = cloud.image("private of another project", DATA)
    cloud.image("public", DATA, visibility="public")
    cloud.add_user(f"only-{role}", f"only-{role}", role)
    finished = node.run(OS_USERNAME=f"only-{role}", OS_PROJECT_NAME=f"only-{role}")
    assert (finished.returncode, node.is_linked(image)) == (0, role == "admin"), finished.stderr
    assert ("does not have the role admin" in finished.stderr) is (role != "admin")


@pytest.mark.parametrize("role", ["manager", "Manager"])
def test_the_role_of_administrators_can_have_another_name(node: Node, role: str) -> None:
    """--admin-role names the role whose token is not warned about, in whatever case."""
    node.cloud.image("public", DATA, visibility="public")
    node.cloud.add_user(f"boss-{role}", f"boss-{role}", "manager")
    name = f"boss-{role}"
    finished = node.run("--admin-role", role, OS_USERNAME=name, OS_PROJECT_NAME=name)
    assert (finished.returncode, finished.stderr) == (0, "")
    finished = node.run(LN_IMAGES_ADMIN_ROLE="cloud_admin")
    assert "does not have the role cloud_admin" in finished.stderr


def test_a_role_that_is_lost_later_is_noticed(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """A process notices that its new token has lost the role, and logs that once."""
    cloud = node.cloud
    cloud.add_user("demoted", "demoted", "admin")
    identity = cloud.identity()
    (user,) = identity.get("/users", params={"name": "demoted"}).json()["users"]
    (project,) = identity.get("/projects", params={"name": "demoted"}).json()["projects"]
    roles = {role["name"]: role["id"] for role in identity.get("/roles").json()["roles"]}
    place = f"/projects/{project['id']}/users/{user['id']}/roles"
    credential = node.environment(OS_USERNAME="demoted", OS_PROJECT_NAME="demoted")
    glance = Glance(connect(credential, 20), "admin")
    glance.list_all()
    assert caplog.records == []
    identity.put(f"{place}/{roles['reader']}")
    identity.delete(f"{place}/{roles['admin']}")
    glance.connection.forget_token()
    glance.list_all()
    glance.list_all()
    (record,) = caplog.records
    assert "does not have the role admin" in record.getMessage()


def test_an_application_credential_for_listing_alone_suffices(node: Node) -> None:
    """The credential of the documents may list images, and nothing else that its user may do."""
    cloud = node.cloud
    owner = cloud.add_user("owner", "owner", "member")
    image = cloud.image("private of another project", DATA, owner)
    user = cloud.add_user("ln-images", "ln-images", "admin")
    documented = json.loads((ROOT / "docs" / "access-rules.json").read_text(encoding="utf-8"))
    rules = [rule for rule in documented if rule["service"] == "image"]
    openrc = cloud.application_credential(user, roles=[{"name": "admin"}], access_rules=rules)
    check_links(node, {**NO_OPENRC, **openrc})
    assert node.is_linked(image)
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


def test_access_rules_that_are_too_narrow_are_named(node: Node) -> None:
    """If access rules leave out the schema of images, the error names them and service_type."""
    user = node.cloud.add_user("narrow", "narrow", "admin")
    rules = [{"service": "image", "method": "GET", "path": "/v2/images"}]
    openrc = node.cloud.application_credential(user, access_rules=rules)
    line = run_refused(node, 2, NO_OPENRC | {**openrc})
    assert line.startswith("ln-images: Glance refuses the credentials (HTTP 401)")
    assert "service_type" in line
    assert "access rules" in line


def test_more_than_one_method_is_demanded(node: Node) -> None:
    """A user whom Keystone asks for two methods gets a message about v3multifactor."""
    identity = node.cloud.identity()
    node.cloud.add_user("careful", "careful", "admin")
    (user,) = identity.get("/users", params={"name": "careful"}).json()["users"]
    options = {
        "multi_factor_auth_enabled": True,
        "multi_factor_auth_rules": [["password", "totp"]],
    }
    identity.patch(f"/users/{user['id']}", json={"user": {"options": options}})
    credential: Variables = {"OS_USERNAME": "careful", "OS_PROJECT_NAME": "careful"}
    assert "set OS_AUTH_TYPE=v3multifactor" in run_refused(node, 2, credential)
    # The command must send both methods. There is no secret for a passcode here, so it is refused.
    both = credential | MULTIFACTOR | {"OS_PASSCODE": "123456"}
    assert "Keystone refuses the credentials (HTTP 401)" in run_refused(node, 2, both)


def test_both_methods_of_v3multifactor_work(node: Node) -> None:
    """An openrc with v3multifactor, a password and a passcode links."""
    identity = node.cloud.identity()
    node.cloud.add_user("both", "both", "admin")
    (user,) = identity.get("/users", params={"name": "both"}).json()["users"]
    secret = base64.b32encode(b"0123456789abcdef").decode().rstrip("=")
    credential = {"type": "totp", "blob": secret, "user_id": user["id"]}
    identity.post("/credentials", json={"credential": credential})
    options = {
        "multi_factor_auth_enabled": True,
        "multi_factor_auth_rules": [["password", "totp"]],
    }
    identity.patch(f"/users/{user['id']}", json={"user": {"options": options}})
    check_links(
        node,
        MULTIFACTOR
        | {"OS_USERNAME": "both", "OS_PROJECT_NAME": "both", "OS_PASSCODE": passcode(secret)},
    )


def passcode(secret: str) -> str:
    """Return the passcode of this moment (RFC 6238)."""
    counter = struct.pack(">Q", int(time.time()) // 30)
    digest = hmac.digest(base64.b32decode(secret + "=" * (-len(secret) % 8)), counter, "sha1")
    offset = digest[-1] & 15
    (number,) = struct.unpack(">I", digest[offset : offset + 4])
    return f"{(number & 0x7FFFFFFF) % 10**6:06}"


# Secrets


@pytest.mark.parametrize("status", [400, 401, 500])
@pytest.mark.parametrize("service", ["Keystone", "Glance"])
def test_a_service_that_repeats_secrets(
    node: Node, front: Front, service: str, status: int
) -> None:
    """A password or a token that a service repeats in its error gets into no output and no log."""
    glance, region = front()
    with Faulty(node.cloud.keystone) as keystone:

        def repeat(path: str) -> str | Answer:
            secret = PASSWORD if service == "Keystone" else max(glance.secrets)
            body = json.dumps({"error": {"message": f"you sent {secret}"}}).encode()
            return path if path == "/v3" else Answer(status, body)

        (keystone if service == "Keystone" else glance).rule = repeat
        variables = region | {"OS_AUTH_URL": f"{keystone.url}/v3"}
        finished = run(node, variables, secrets=glance.secrets)
    assert finished.returncode in (2, 75)


@pytest.mark.parametrize(
    "variables",
    [
        {
            "OS_AUTH_TYPE": "admin_token",
            "OS_TOKEN": f"{WRONG}\n",
            "OS_ENDPOINT": "http://127.0.0.1:1",
        },
        {"OS_AUTH_URL": f"http://me:{WRONG}@127.0.0.1:1/v3"},
        {"OS_IMAGE_ENDPOINT_OVERRIDE": f"http://me:{WRONG}@127.0.0.1:1"},
        {"OS_IMAGE_ENDPOINT_OVERRIDE": f"http://me:{WRONG}@127.0.0.1:99999"},
    ],
    ids=["a token with a newline", "OS_AUTH_URL", "an endpoint", "an impossible endpoint"],
)
def test_a_secret_in_an_odd_place(node: Node, variables: Variables) -> None:
    """A secret that the HTTP library complains of, or that is part of a URL, is not printed."""
    assert run(node, variables, "--full", secrets=[WRONG]).returncode in (2, 75)
