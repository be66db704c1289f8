"""What tests observe of a command from outside: its errors, its signals, its requests, its lock."""

import contextlib
import fcntl
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.node import Node

INTERRUPTED = "ln-images: interrupted; what was done is complete, the next run does the rest\n"


def one_line(text: str) -> str:
    """Return the one line of error that a command printed."""
    assert re.fullmatch(r"ln-images(-\w+)?: [^\n]+\n", text), text
    return text


def catches_signal(process: subprocess.Popen[str], number: int) -> bool:
    """Return whether a process has a handler for a signal (proc_pid_status(5))."""
    # SigCgt:	0000000000004002
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def count_requests(node: Node) -> Counter[str]:
    """Return how often the commands have sent each request so far.

    Glance's own requests, which check tokens, do not count.
    """

    def read_logs() -> list[str]:
        logs = (node.cloud.directory / f"{name}-access.log" for name in ("keystone", "glance"))
        return [line for log in logs for line in log.read_text().splitlines()]

    # A server writes a line after it has sent its answer, so possibly after the command has ended.
    lines = read_logs()
    while True:
        time.sleep(0.3)
        if len(read_logs()) == len(lines):
            break
        lines = read_logs()
    # 127.0.0.1 - - [...] "GET /v3 HTTP/1.1" 200 250 "-" "ln-images/0.2.0 keystoneauth1/5.18.1 ..."
    # 127.0.0.1 - - [...] "GET /v2/images?... HTTP/1.1" 200 1047 "-" "python-glanceclient"
    ours = ('"ln-images/', '"python-glanceclient')
    return Counter(line.split('"')[1] for line in lines if any(agent in line for agent in ours))


@contextlib.contextmanager
def held_lock(node: Node) -> Iterator[None]:
    """Hold the lock of the node's cache, as another run does."""
    directory = os.open(node.cache, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
