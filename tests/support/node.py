"""A storage node of a running cloud, on which the tests run the real commands."""

import contextlib
import faulthandler
import hashlib
import importlib
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

from ln_images.model import Command, LinkPolicy, Owner
from support.cloud import ROOT, Cloud
from support.faulty import Variables

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "docs" / "report.schema.json").read_text())
)
# The module that has the function ``main`` of each command.
MODULES = {
    Command.LINK: "ln_images.cli",
    Command.PRUNE: "ln_images.prune.cli",
    Command.VERIFY: "ln_images.verify",
}
# A call of a command that has not ended after so many seconds ends the tests' process, with a
# traceback.
ENDS_WITHIN = 60
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
# As root the tests link for somebody else, as in production; otherwise for whoever runs them.
OWNER = Owner(65534, 65534) if os.getuid() == 0 else Owner(os.getuid(), os.getgid())
# What links look like by default, with an owner that every machine has.
POLICY = LinkPolicy(owner=OWNER, mode=0o644)
# These take the credentials of the openrc away, and leave the region.
NO_OPENRC: Variables = dict.fromkeys(
    (
        "OS_AUTH_URL",
        "OS_USERNAME",
        "OS_PASSWORD",
        "OS_PROJECT_NAME",
        "OS_USER_DOMAIN_NAME",
        "OS_PROJECT_DOMAIN_NAME",
    )
)
# For processes that get a signal: one that comes while coverage holds its own lock would hang them.
UNCOVERED: Variables = {"COVERAGE_PROCESS_CONFIG": None}
needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="needs root: mounts, devices and other owners"
)


def executable(command: Command = Command.LINK) -> Path:
    """Return the installed script of a command."""
    return Path(sys.executable).with_name(command.value)


def block(name: str, *pages: Path) -> str:
    """Return the fenced block that follows the comment ``name`` in one of ``pages``.

    Without ``pages`` it is searched in README.md and docs/.
    """
    for page in pages or (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        match = re.search(rf"<!-- {name} -->\n```[a-z]*\n(.*?)```", text, re.DOTALL)
        if match:
            return match[1]
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
        """Return an openrc and this node's settings. None takes a variable away."""
        inherited = {
            name: value for name, value in os.environ.items() if name.startswith(("COV", "PATH"))
        }
        settings = {
            "LN_IMAGES_IMAGES_DIR": str(self.images),
            "LN_IMAGES_CACHE_DIR": str(self.cache),
            "LN_IMAGES_OWNER": f"{OWNER.uid}:{OWNER.gid}",
        }
        merged: dict[str, str | None] = {
            **inherited,
            **self.cloud.environment(),
            **settings,
            **variables,
        }
        return {name: value for name, value in merged.items() if value is not None}

    def run(
        self, *arguments: str, command: Command = Command.LINK, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Call a command in this process, because a new process would take a second to start.

        Whatever JSON it prints must be as the schema says.
        """
        output, errors = io.StringIO(), io.StringIO()
        status = 0
        main = importlib.import_module(MODULES[command]).main
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            logging_restored(),
            hangup_restored(),
            warnings.catch_warnings(action="ignore"),
        ):
            for name in [name for name in os.environ if name.startswith(("OS_", "LN_IMAGES_"))]:
                patch.delenv(name)
            for name, value in self.environment(**variables).items():
                patch.setenv(name, value)
            # This is no alarm: the command has one of its own.
            faulthandler.dump_traceback_later(ENDS_WITHIN, exit=True, file=2)
            try:
                main(list(arguments), prog_name=command.value)
            except SystemExit as exit_:
                status = int(exit_.code or 0)
            finally:
                faulthandler.cancel_dump_traceback_later()
        return _checked(
            subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())
        )

    def process(
        self, *arguments: str, command: Command = Command.LINK, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run the installed command as a process of its own, otherwise as :meth:`run` does."""
        return _checked(
            subprocess.run(
                [executable(command), *arguments],
                env=self.environment(**variables),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        )

    def report(
        self,
        *arguments: str,
        command: Command = Command.LINK,
        status: int = 0,
        **variables: str | None,
    ) -> dict[str, Any]:
        """Call a command that must end with ``status``, and return its JSON report."""
        run = self.run("--format", "json", *arguments, command=command, **variables)
        assert run.returncode == status, run.stderr
        document: dict[str, Any] = json.loads(run.stdout)
        return document

    def verdicts(
        self, *arguments: str, status: int = 0, **variables: str | None
    ) -> dict[str, tuple[str, str]]:
        """Run a pass over every image, and return outcome and reason code by image id."""
        document = self.report(
            "--full", *arguments, command=Command.LINK, status=status, **variables
        )
        return {
            image["id"]: (image["outcome"], image["reason_code"]) for image in document["images"]
        }

    def sentences(
        self, *arguments: str, status: int = 0, **variables: str | None
    ) -> dict[str, str | None]:
        """Run a pass over every image, and return the sentence of each reason by image id."""
        document = self.report(
            "--full", *arguments, command=Command.LINK, status=status, **variables
        )
        return {image["id"]: image["reason"] for image in document["images"]}

    def entry(self, image_id: str) -> Path:
        """Return where Nova looks for an image."""
        name = hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
        return self.cache / name

    def is_linked(self, image_id: str) -> bool:
        """Return whether the image has its link, exactly as it must be."""
        try:
            link, file = self.entry(image_id).lstat(), (self.images / image_id).lstat()
        except FileNotFoundError:
            return False
        return (
            os.path.samestat(link, file)
            and Owner(link.st_uid, link.st_gid) == OWNER
            and link.st_mode & 0o7777 == 0o644
        )

    def names(self) -> set[str]:
        """Return every name in the cache."""
        return {path.name for path in self.cache.iterdir()}


def _checked(run: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if "json" in run.args:
        for line in run.stdout.splitlines():
            SCHEMA.validate(json.loads(line))
    return run


@contextlib.contextmanager
def hangup_restored() -> Iterator[None]:
    """Leave SIGHUP as it was: with --every the command ignores it, and processes inherit that."""
    handler = signal.getsignal(signal.SIGHUP)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, handler)


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Leave the loggers as they were, whatever the command makes of them, and its log closed."""
    root, ours = logging.getLogger(), logging.getLogger("ln_images")
    root_handlers, our_handlers = root.handlers[:], ours.handlers[:]
    propagate, level = ours.propagate, ours.level
    raise_exceptions, excepthook = logging.raiseExceptions, sys.excepthook
    try:
        yield
    finally:
        for handler in set(ours.handlers).difference(our_handlers):
            handler.close()
        root.handlers[:], ours.handlers[:] = root_handlers, our_handlers
        ours.propagate, ours.level = propagate, level
        logging.raiseExceptions, sys.excepthook = raise_exceptions, excepthook
        logging.captureWarnings(False)
