"""What somebody sees who runs the command by hand: a real terminal, of a given width."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading

import pytest

from support.node import COMMAND, Node

DATA = b"\1" * 5000
COLUMNS = 70
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def columns(line: str) -> int:
    """How many columns a line takes: a Chinese character takes two."""
    return sum(2 if "\u4e00" <= character <= "\u9fff" else 1 for character in line)


class Terminal:
    """One end of a terminal, and what a process writes to it."""

    def __init__(self) -> None:
        self._here, self.there = pty.openpty()
        fcntl.ioctl(self.there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self._read = bytearray()
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        try:
            while chunk := os.read(self._here, 65536):
                self._read += chunk
        except OSError:
            # Nobody has the other end open any more.
            return

    def text(self) -> str:
        """All that was written, when nobody can write any more."""
        os.close(self.there)
        self._reader.join(30)
        os.close(self._here)
        return self._read.decode().replace("\r\n", "\n")


def on_terminal(node: Node, *arguments: str, **variables: str | None) -> tuple[str, str]:
    """Standard output and standard error of a run, each on a terminal of its own."""
    output, errors = Terminal(), Terminal()
    environment = node.environment(TERM="xterm", LC_ALL="C.UTF-8", **variables)
    try:
        subprocess.run(
            [COMMAND, *arguments],
            env=environment,
            stdout=output.there,
            stderr=errors.there,
            timeout=120,
            check=True,
        )
    finally:
        texts = output.text(), errors.text()
    return texts


def test_the_table_fits_the_terminal(node: Node) -> None:
    """No line is wider than the terminal, wide characters counted double, and the columns are aligned."""
    node.cloud.image("ubuntu-24.04-minimal-cloudimg-amd64-with-a-long-name", DATA)
    node.cloud.image("图像服务器操作系统安装盘二零二六年版", DATA)
    node.cloud.create("queued")
    output, errors = on_terminal(node)
    lines = COLOUR.sub("", output).splitlines()
    assert (len(lines), errors) == (5, "")
    assert max(map(columns, lines)) <= COLUMNS
    starts = {
        columns(line[: found.start()])
        for line in lines
        if (found := re.search(r"[0-9a-f]{8}|ID", line))
    }
    assert len(starts) == 1
    assert re.fullmatch(r"2 linked, 1 waiting, \d+\.\d s", lines[-1])


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_outcomes_have_colours_unless_somebody_minds(
    node: Node, variables: dict[str, str | None], coloured: bool
) -> None:
    """On a terminal what was linked is green.

    With NO_COLOR, as through a pipe, nothing is coloured.
    """
    node.cloud.image("image", DATA)
    output, _ = on_terminal(node, "--dry-run", **variables)
    assert bool(re.search(r"\x1b\[32m(\x1b\[22m)?linked", output)) is coloured
    assert bool(COLOUR.search(output)) is coloured
    assert not COLOUR.search(node.process("--dry-run").stdout)


@pytest.mark.parametrize(("count", "shown"), [(250, True), (50, False)])
def test_a_long_first_run_shows_how_far_it_is(node: Node, count: int, shown: bool) -> None:
    """Over some hundred images there is a bar on standard error, which reaches the end.

    The report is whole.
    """
    node.cloud.add_many(count)
    output, errors = on_terminal(node)
    assert f"{count} linked" in output
    assert ("Linking" in errors and "100%" in errors) is shown
    assert shown or not errors


def test_an_audit_shows_how_far_it_is(node: Node) -> None:
    """While images are read there is a bar over their bytes, and at the end how much was read at what rate."""
    node.cloud.image("image", DATA)
    output, errors = on_terminal(node, "--verify")
    assert "Verifying" in errors
    assert "100%" in errors
    assert re.search(
        r"1 linked, 1 verified, 4\.9 KiB at .+/s, 0 without a checksum, \d+\.\d s", output
    )
