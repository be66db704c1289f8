"""What somebody sees who runs the command by hand: a real terminal, of a given width."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from typing import Any

import pytest
import wcwidth

from support.node import Node, executable

DATA = b"\1" * 5000
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What a tenant may call an image to act on the terminal of whoever lists it.
HOSTILE = "\x1b[2J\x07\r\n\u202eabc\u200b"


class Terminal:
    """One end of a terminal, and what a process writes to it."""

    def __init__(self, columns: int) -> None:
        self._here, self.there = pty.openpty()
        fcntl.ioctl(self.there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
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
        """Return all that was written, when nobody can write any more."""
        os.close(self.there)
        self._reader.join(30)
        os.close(self._here)
        return self._read.decode().replace("\r\n", "\n")


def run_on_terminal(
    node: Node, *arguments: str, columns: int = 80, **variables: str | None
) -> tuple[str, str]:
    """Return what a run writes to standard output and standard error, each a terminal."""
    output, errors = Terminal(columns), Terminal(columns)
    environment = node.environment(TERM="xterm", LC_ALL="C.UTF-8", **variables)
    try:
        subprocess.run(
            [executable(), *arguments],
            env=environment,
            stdout=output.there,
            stderr=errors.there,
            timeout=120,
            check=True,
        )
    finally:
        texts = output.text(), errors.text()
    return texts


def start_of(column: str, line: str) -> int:
    """Return in which column of the terminal a text of a line starts."""
    return wcwidth.wcswidth(line[: line.index(column)])


@pytest.mark.parametrize("columns", [60, 70, 80, 132])
def test_no_line_is_wider_than_the_terminal(node: Node, columns: int) -> None:
    """Names and reasons are wrapped, the columns are aligned, and nothing acts on the terminal."""
    ids = [
        node.cloud.image("ubuntu-24.04-minimal-cloudimg-amd64-with-a-long-name", DATA),
        node.cloud.image("\u56fe\u50cf\u670d\u52a1\u5668\u64cd\u4f5c\u7cfb\u7edf" * 3, DATA),
        node.cloud.image(HOSTILE, DATA),
        node.cloud.image("other content", DATA),
        node.cloud.create("queued"),
    ]
    (node.images / ids[3]).write_bytes(b"QFI\xfb" + DATA[4:])
    output, errors = run_on_terminal(node, columns=columns)
    lines = COLOUR.sub("", output).splitlines()
    assert errors == ""
    assert all(line.isprintable() for line in lines)
    assert max(wcwidth.wcswidth(line) for line in lines) <= columns
    heading, *rows, summary = lines
    assert re.fullmatch(r"3 linked, 1 waiting, 1 refused, \d+\.\d s", summary)
    for image_id in ids:
        (row,) = [line for line in rows if image_id[:8] in line]
        assert start_of(image_id[:8], row) == start_of("ID", heading)


def test_in_a_pipe_each_image_is_one_line(node: Node) -> None:
    """However long or hostile names are, each image is one line with its whole id."""
    names = ["long name " * 20, "\u56fe\u50cf" * 60, HOSTILE]
    ids = [node.cloud.image(name, DATA) for name in names]
    run = node.process(COLUMNS="40")
    _heading, *rows, _summary = run.stdout.splitlines()
    assert len(rows) == len(ids)
    assert all(row.isprintable() for row in rows)
    assert all(sum(image_id in row for row in rows) == 1 for image_id in ids)


def test_an_output_without_unicode_gets_escapes(node: Node) -> None:
    """What the encoding of standard output lacks is escaped, and the pass goes on."""
    image = node.cloud.image("\u56fe\u50cf", DATA)
    # click takes ASCII for a mistake, and writes UTF-8 then.
    run = node.process(PYTHONIOENCODING="latin-1")
    assert r"\u56fe\u50cf" in run.stdout
    assert node.is_linked(image)


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_outcomes_have_colours_unless_the_user_objects(
    node: Node, variables: dict[str, Any], coloured: bool
) -> None:
    """On a terminal, linked is green. With NO_COLOR or through a pipe, nothing is coloured."""
    node.cloud.image("image", DATA)
    output, _ = run_on_terminal(node, "--dry-run", **variables)
    assert bool(re.search(r"\x1b\[32mlinked\x1b\[0m", output)) is coloured
    assert bool(COLOUR.search(output)) is coloured
    assert not COLOUR.search(node.process("--dry-run").stdout)


@pytest.mark.parametrize(("count", "shown"), [(250, True), (50, False)])
def test_a_long_first_run_has_a_progress_bar(node: Node, count: int, shown: bool) -> None:
    """With hundreds of images, a bar on standard error reaches its end; the report is complete."""
    node.cloud.add_many(count)
    output, errors = run_on_terminal(node)
    assert f"{count} linked" in output
    assert ("Linking" in errors and "100%" in errors) is shown
    assert shown or not errors
