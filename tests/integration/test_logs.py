"""The log file, standard error, and what happens to an exception that nothing expected."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.node import Node
from support.observe import one_line

DATA = b"\1" * 100_000


def break_module(directory: Path, module: str) -> str:
    """Put a module that fails on import before the installed one, and return its PYTHONPATH.

    The rest of its package is the installed one.
    """
    *packages, name = module.split(".")
    path = directory
    for package in packages:
        path = path / package
        path.mkdir()
        (path / "__init__.py").write_text(
            "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n"
        )
    (path / f"{name}.py").write_text("raise LookupError('this library is broken')\n")
    return str(directory)


def test_the_log_file_has_each_change_with_its_place(node: Node, tmp_path: Path) -> None:
    """Each change is one line with time, level and place; a pass without changes adds none."""
    log = tmp_path / "log"
    image = node.cloud.image("two\nlines \x1b[31m", DATA)
    node.process("-q", "--log-file", str(log))
    node.process("-q", LN_IMAGES_LOG_FILE=str(log))
    line = (
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO sync\.py:\d+ linked: {image}"
        rf" \(two\\nlines \\x1b\[31m\) as {node.entry(image).name}\n"
    )
    assert re.fullmatch(line, log.read_text())


def test_refused_and_occupied_images_are_in_the_log_file_alone(node: Node, tmp_path: Path) -> None:
    """Each run of cron logs them again, and cron mails nothing; only root can read the log."""
    log = tmp_path / "log"
    refused, taken = (node.cloud.image(name, DATA) for name in ("refused", "taken"))
    (node.images / refused).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    node.entry(taken).write_bytes(b"nova's")
    for _ in range(2):
        run = node.process("-q", "--log-file", str(log))
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    logged = re.findall(r"WARNING sync\.py:\d+ (refused|occupied): (\S+)", log.read_text())
    assert sorted(logged) == sorted([("refused", refused), ("occupied", taken)] * 2)
    assert log.stat().st_mode & 0o777 == 0o600


def test_refused_images_of_a_tenant_do_not_fill_the_log(node: Node, tmp_path: Path) -> None:
    """The log has the first five with 80 characters of their names, and how many more there are."""
    log = tmp_path / "log"
    for _ in range(7):
        refused = node.cloud.image("\u200b" * 255, DATA)
        (node.images / refused).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    assert node.process("-q", "--log-file", str(log)).returncode == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith("refused: 2 more images; run ln-images -n to list them")
    assert max(map(len, lines)) < 1000


def test_the_log_file_rotates(node: Node, tmp_path: Path) -> None:
    """At 1 MiB the log is renamed, and no more than five old ones are kept."""
    log = tmp_path / "log"
    for number in range(1, 6):
        Path(f"{log}.{number}").write_text(str(number))
    log.write_bytes(b"x" * (1024 * 1024 - 1))
    node.cloud.image("image", DATA)
    node.process("--log-file", str(log))
    names = ["log", *(f"log.{number}" for number in range(1, 6))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "linked" in log.read_text()
    assert Path(f"{log}.1").stat().st_size == 1024 * 1024 - 1
    assert Path(f"{log}.5").read_text() == "4"


def test_a_log_that_cannot_be_opened_takes_nothing_away(node: Node) -> None:
    """The image is linked all the same, and the status says that something is wrong."""
    image = node.cloud.image("image", DATA)
    # Nothing can be made below /sys.
    run = node.process("-q", "--log-file", "/sys/log")
    assert run.returncode == 2
    assert one_line(run.stderr).startswith("ln-images: --log-file /sys/log: ")
    assert node.is_linked(image)


@pytest.mark.parametrize("has_reader", [True, False])
def test_a_log_file_that_is_a_fifo_does_not_block(
    node: Node, tmp_path: Path, has_reader: bool
) -> None:
    """A FIFO in place of the log file is one line of error, and nothing is written into it."""
    image = node.cloud.image("image", DATA)
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if has_reader else None
    try:
        run = node.process("-q", "--log-file", str(fifo))
        if reader is not None:
            assert os.read(reader, 1) == b""
    finally:
        if reader is not None:
            os.close(reader)
    assert run.returncode == 2
    assert one_line(run.stderr).startswith(f"ln-images: --log-file {fifo}: ")
    assert node.is_linked(image)


def test_the_first_line_after_a_log_was_renamed_is_in_a_new_one(tmp_path: Path) -> None:
    """A service may have nothing to log for weeks, and logrotate renames the file meanwhile."""
    code = (
        "import logging, os; from ln_images import logs\n"
        "logs.set_up('ln-images', 'log', False, False)\n"
        "os.rename('log', 'log.1'); logging.getLogger('ln_images.any').error('first')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "log").read_text().endswith("first\n")
    assert (tmp_path / "log.1").read_text() == ""


def test_an_unexpected_exception_is_one_line(node: Node, tmp_path: Path) -> None:
    """Its traceback goes to the log file, and with -v to standard error; the status is 1."""
    log = tmp_path / "log"
    broken = break_module(tmp_path, "glanceclient")
    run = node.process("-q", "--log-file", str(log), PYTHONPATH=broken)
    assert (run.returncode, run.stdout) == (1, "")
    line = one_line(run.stderr)
    assert line.startswith("ln-images: a bug: unexpected LookupError; ")
    head, *traceback = log.read_text().splitlines()
    assert " ERROR logs.py:" in head
    assert traceback[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in traceback)
    assert traceback[-1] == "    LookupError: this library is broken"
    verbose = node.process("-v", PYTHONPATH=broken).stderr.splitlines()
    assert verbose[0] == line.rstrip("\n")
    assert verbose[-1] == "    LookupError: this library is broken"


def test_an_unexpected_exception_about_one_image_is_its_verdict(node: Node, tmp_path: Path) -> None:
    """The image is failed with the code bug, the traceback is logged, and the pass goes on."""
    log = tmp_path / "log"
    drifted = node.cloud.image("drifted", DATA)
    node.process("-q")
    node.entry(drifted).chmod(0o600)
    failing = [node.cloud.image(name, DATA) for name in ("one", "two")]
    broken = break_module(tmp_path, "oslo_utils.imageutils.format_inspector")
    run = node.process("-q", "--log-file", str(log), PYTHONPATH=broken)
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert sorted(line.split()[2] for line in lines) == sorted(failing)
    assert all("unexpected LookupError" in line for line in lines)
    assert log.read_text().count("    LookupError: this library is broken\n") == 2
    assert node.is_linked(drifted)
    assert node.process("-q").returncode == 0
    assert all(map(node.is_linked, failing))
