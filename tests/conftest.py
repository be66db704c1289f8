"""A real cloud for all the tests of a worker, and a storage node on which the real command is run."""

import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, settings
from keystoneauth1.adapter import Adapter

from cloud import REGION, ROOT, Cloud
from compute import Compute, in_catalog
from faulty import Faulty, Front, Rule, Variables
from ln_images.cli import main
from ln_images.options import Options

# Whatever ends the tests, the servers that they started are stopped first. A shell that runs the
# tests in the background has them ignore SIGINT, and so would the command that they start.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "docs" / "report.schema.json").read_text())
)
COMMAND = Path(sys.executable).with_name("ln-images")
# A call of the command that has not ended by then ends the tests' process, with a traceback.
ENDS_WITHIN = 60
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
# As root the tests link for somebody else, as in production; otherwise for whoever runs them.
OWNER = (65534, 65534) if os.getuid() == 0 else (os.getuid(), os.getgid())
# Takes the credentials of the openrc away, and leaves the region.
NO_OPENRC = dict.fromkeys(
    (
        "OS_AUTH_URL",
        "OS_USERNAME",
        "OS_PASSWORD",
        "OS_PROJECT_NAME",
        "OS_USER_DOMAIN_NAME",
        "OS_PROJECT_DOMAIN_NAME",
    )
)
# What the command takes where it is given nothing, but for an owner that every machine has.
with main.make_context("ln-images", [f"--owner={OWNER[0]}:{OWNER[1]}"]) as context:
    DEFAULTS = Options(**context.params)
# For processes that get a signal: one that comes while coverage holds its own lock would hang them.
UNCOVERED: Variables = {"COVERAGE_PROCESS_CONFIG": None}
needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="needs root: mounts, devices and other owners"
)


def block(name: str) -> str:
    """The fenced block of a document that follows the comment ``name``."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        found = re.search(
            rf"<!-- {name} -->\n```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        )
        if found:
            return found[1]
    raise LookupError(f"no document has a block {name}")


@dataclass
class Node:
    """A storage node of the running cloud, with a cache directory of its own."""

    cloud: Cloud
    cache: Path

    @property
    def images(self) -> Path:
        """Glance's store."""
        return self.cloud.images

    def environment(self, **variables: str | None) -> dict[str, str]:
        """What the command runs in: an openrc, and this node's settings.

        None takes a variable away.
        """
        kept = {key: value for key, value in os.environ.items() if key.startswith(("COV", "PATH"))}
        settings = {
            "LN_IMAGES_IMAGES_DIR": str(self.images),
            "LN_IMAGES_CACHE_DIR": str(self.cache),
            "LN_IMAGES_OWNER": f"{OWNER[0]}:{OWNER[1]}",
        }
        merged: dict[str, str | None] = {
            **kept,
            **self.cloud.environment(),
            **settings,
            **variables,
        }
        return {key: value for key, value in merged.items() if value is not None}

    def run(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Calls the command, and sees it to its end, in this process.

        A new one would take a second to start.

        Whatever JSON it prints must be as the schema says.
        """
        said, errors, status = io.StringIO(), io.StringIO(), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(errors),
            logging_put_back(),
            warnings.catch_warnings(action="ignore"),
        ):
            for name in [name for name in os.environ if name.startswith(("OS_", "LN_IMAGES_"))]:
                patch.delenv(name)
            for name, value in self.environment(**variables).items():
                patch.setenv(name, value)
            # Not an alarm: the command has one of its own.
            faulthandler.dump_traceback_later(ENDS_WITHIN, exit=True, file=2)
            try:
                main(list(arguments), prog_name="ln-images")
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                faulthandler.cancel_dump_traceback_later()
        return self._checked(
            subprocess.CompletedProcess(arguments, status, said.getvalue(), errors.getvalue())
        )

    def process(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Runs the installed command as a process of its own, as :meth:`run` does."""
        return self._checked(
            subprocess.run(
                [COMMAND, *arguments],
                env=self.environment(**variables),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        )

    @staticmethod
    def _checked(run: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
        if "json" in run.args:
            for line in run.stdout.splitlines():
                SCHEMA.validate(json.loads(line))
        return run

    def outcomes(self, *arguments: str, status: int = 0) -> dict[str, tuple[str, str]]:
        """Runs the command and returns (outcome, reason) by image id, those present included."""
        run = self.run("--format", "json", "--full", *arguments)
        assert run.returncode == status, run.stderr
        document: dict[str, Any] = json.loads(run.stdout)
        return {image["id"]: (image["outcome"], image["reason"]) for image in document["images"]}

    def entry(self, image_id: str) -> Path:
        """Where Nova looks for an image."""
        return self.cache / hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()

    def linked(self, image_id: str) -> bool:
        """Whether the image has its link, exactly as it must be."""
        try:
            link, file = self.entry(image_id).lstat(), (self.images / image_id).lstat()
        except FileNotFoundError:
            return False
        return (
            (link.st_dev, link.st_ino) == (file.st_dev, file.st_ino)
            and (link.st_uid, link.st_gid) == OWNER
            and link.st_mode & 0o7777 == 0o644
        )

    def names(self) -> set[str]:
        """Every name in the cache."""
        return {path.name for path in self.cache.iterdir()}


@contextlib.contextmanager
def logging_put_back() -> Iterator[None]:
    """Leaves the loggers as they were, whatever the command makes of them, and its log file closed."""
    root, ours = logging.getLogger(), logging.getLogger("ln_images")
    handlers, before = (
        (root.handlers[:], ours.handlers[:]),
        (ours.propagate, ours.level, logging.raiseExceptions),
    )
    try:
        yield
    finally:
        for handler in set(ours.handlers).difference(handlers[1]):
            handler.close()
        root.handlers[:], ours.handlers[:] = handlers
        ours.propagate, ours.level, logging.raiseExceptions = before
        logging.captureWarnings(False)


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """The real Keystone and Glance, for the whole run of the tests, or of those that one worker has."""
    with Cloud(tmp_path_factory.mktemp("cloud") / "cloud") as running:
        yield running


@pytest.fixture
def node(cloud: Cloud, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A storage node with an empty cache; the cloud's images are gone when the test ends."""
    cache = (
        cloud.directory
        / f"cache-{hashlib.sha1(request.node.nodeid.encode(), usedforsecurity=False).hexdigest()[:12]}"
    )
    cache.mkdir()
    yield Node(cloud, cache)
    cloud.clear()


@pytest.fixture(scope="session")
def identity(cloud: Cloud) -> Adapter:
    """Keystone's API, with one token for all tests."""
    return cloud.identity()


@pytest.fixture
def front(node: Node, identity: Adapter) -> Iterator[Front]:
    """Stands a server before the real Glance, in the real catalog.

    Returns it and the variables that choose it.

    Unless told otherwise, it is the public endpoint of a region of its own.
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
    """A compute service in the real catalog, with no servers yet, which shows three at a time."""
    with Compute(max_limit=3) as serving, in_catalog(identity, (REGION, "public", serving.url)):
        yield serving
