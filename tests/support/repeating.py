"""The command under --every, in a process of its own."""

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from support.node import SCHEMA, UNCOVERED, Node, executable

# A process that hangs is killed after so many seconds. Then whoever waits for its report fails.
ENDS_WITHIN = 300


class Running:
    """The process, which prints its reports as JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.reports = self._read()

    def report(self) -> dict[str, Any]:
        """Return the next report that it prints."""
        return next(self.reports)

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self.process.stdout or ():
            document = json.loads(line)
            SCHEMA.validate(document)
            yield document

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int, list[str]]:
        """Wait for its end, after a signal if one is named. Return its status and its errors."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.splitlines()


@contextlib.contextmanager
def running(node: Node, *arguments: str, **variables: str | None) -> Iterator[Running]:
    """Start the command with reports in JSON, and make sure that it is gone in the end."""
    process = subprocess.Popen(
        [executable(), "--format", "json", *arguments],
        env=node.environment(**variables, **UNCOVERED),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(ENDS_WITHIN, process.kill)
    watchdog.start()
    try:
        yield Running(process)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
