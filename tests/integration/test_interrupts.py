"""Signals and SIGKILL at any moment: real processes that really get them."""

import contextlib
import itertools
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ln_images.store import IMAGE_ID_MARK
from support.cloud import ROOT, wait_until
from support.node import UNCOVERED, Node, executable
from support.observe import INTERRUPTED, catches_signal, one_line

DATA = b"\1" * 100_000


def list_pythons() -> list[str]:
    """Return every Python that is here: the module needs nothing but the standard library."""
    pythons = [sys.executable]
    for name in ("python3.12", "python3.13", "python3.14"):
        # A name may be there and refuse to start, as those of pyenv do.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([name, "-c", ""], check=True, capture_output=True)
            pythons.append(name)
    return pythons


in_every_python = pytest.mark.parametrize("python", list_pythons())


def start(node: Node, *arguments: str, **variables: str | None) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [executable(), *arguments],
        env=node.environment(**variables, **UNCOVERED),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_linking(node: Node, *arguments: str) -> subprocess.Popen[str]:
    """Start the command, and return when it has made its first links."""
    before = len(node.names())
    process = start(node, "-q", *arguments)
    try:
        wait_until(
            lambda: len(node.names()) > before + 10 or process.poll() is not None, "the first links"
        )
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def run_main(python: str, directory: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose main function has this body, as the installed scripts do."""
    (directory / "example.py").write_text(
        "import os, signal, sys, weakref\n"
        "def kill():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sum(range(1000))\n"
        "class Thing: pass\n"
        f"def main(prog_name):\n{body}"
    )
    code = "from ln_images.interrupts import run_command; run_command('ln-images', 'example')"
    return subprocess.run(
        [python, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{directory}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_that_waits_for_the_cloud(node: Node, number: int) -> None:
    """Ctrl-C, SIGTERM and SIGHUP end a run with 130 and one line even if a server is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start(node, OS_AUTH_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/v3")
        connection, _ = silent.accept()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        connection.close()
    assert (process.returncode, output, errors) == (130, "", INTERRUPTED)


def test_a_signal_at_any_moment_is_one_line(node: Node) -> None:
    """Whatever the run imports or queries when two signals arrive, it prints one line."""
    node.cloud.image("image", DATA)
    numbers = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    for milliseconds in range(0, 301, 20):
        process = start(node, "-q", "--dry-run")
        wait_until(
            lambda process=process: catches_signal(process, signal.SIGTERM), "the command to begin"
        )
        time.sleep(milliseconds / 1000)
        for _ in range(2):
            process.send_signal(next(numbers))
        output, errors = process.communicate(timeout=30)
        ended = (process.returncode, output, errors)
        assert ended in ((0, "", ""), (130, "", INTERRUPTED)), milliseconds


@in_every_python
def test_a_signal_inside_a_weakref_callback_ends_the_run(python: str, tmp_path: Path) -> None:
    """Python swallows an exception that is raised there; the run ends all the same."""
    body = (
        "    thing = Thing()\n"
        "    reference = weakref.ref(thing, lambda _: kill())\n"
        "    del thing\n"
        "    print('goes on')\n"
    )
    run = run_main(python, tmp_path, body)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", INTERRUPTED)


@in_every_python
def test_a_signal_inside_the_unraisablehook_ends_the_run(python: str, tmp_path: Path) -> None:
    """A signal is not lost while Python reports an exception that a destructor raised."""
    body = (
        "    sys.unraisablehook = lambda _: kill()\n"
        "    Thing.__del__ = lambda self: 1 / 0\n"
        "    Thing()\n"
        "    print('goes on')\n"
    )
    run = run_main(python, tmp_path, body)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", INTERRUPTED)


@in_every_python
def test_a_signal_that_is_held_back_ends_the_run_afterwards(python: str, tmp_path: Path) -> None:
    """A change that has begun is completed, and then the run ends before the next one."""
    body = (
        "    from ln_images.interrupts import held_back\n"
        "    with held_back():\n"
        "        with held_back():\n"
        "            kill()\n"
        "        print('complete', flush=True)\n"
        "    print('goes on', flush=True)\n"
    )
    run = run_main(python, tmp_path, body)
    assert (run.returncode, run.stdout, run.stderr) == (130, "complete\n", INTERRUPTED)


@in_every_python
def test_a_signal_at_the_very_end_leaves_the_status(python: str, tmp_path: Path) -> None:
    """While Python shuts down the run is over: a signal changes neither status nor output."""
    body = (
        "    def end(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):\n"
        "        kill(pid, number)\n"
        "    Thing.__del__ = end\n"
        # It dies with the modules, after Python has removed its handlers.
        "    sys.modules['thing'] = Thing()\n"
        "    sys.exit(0)\n"
    )
    run = run_main(python, tmp_path, body)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_closed_standard_error_does_not_change_the_status(tmp_path: Path) -> None:
    """Even if the line cannot be written, the status is 130."""
    run = run_main(sys.executable, tmp_path, "    os.close(2)\n    kill()\n")
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_under_nohup_the_end_of_a_session_ends_nothing(node: Node) -> None:
    """If SIGHUP is ignored when the command starts, as under nohup(1), it stays ignored."""
    image = node.cloud.image("image", DATA)
    process = subprocess.Popen(
        ["nohup", executable(), "-q"],
        env=node.environment(**UNCOVERED),
        stdin=subprocess.DEVNULL,
        text=True,
    )
    wait_until(lambda: catches_signal(process, signal.SIGTERM), "the command to begin")
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert node.is_linked(image)


def test_ctrl_c_shows_the_cursor_of_the_terminal_again(node: Node) -> None:
    """A progress bar hides the cursor; the line of an interrupted run comes after it is back."""
    node.cloud.add_many(2000)
    here, there = pty.openpty()
    process = subprocess.Popen(
        [executable(), "-q"],
        env=node.environment(TERM="xterm", **UNCOVERED),
        stderr=there,
    )
    os.close(there)
    shown = b""
    while b"Linking" not in shown:
        shown += os.read(here, 1024)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(here, 1024):
            shown += chunk
    except OSError:
        # The last process that had the terminal open is gone.
        pass
    os.close(here)
    assert process.wait(30) == 130
    assert b"\x1b[?25l" in shown
    end = shown.rpartition(b"\x1b[?25l")[2]
    assert end.endswith(b"\x1b[?25h\r\n" + INTERRUPTED.replace("\n", "\r\n").encode())


def test_killed_at_any_moment_only_correct_links_are_there(node: Node) -> None:
    """SIGKILL while thousands are linked leaves correct links, and the next run does the rest."""
    images = node.cloud.add_many(2000)
    by_name = {node.entry(image).name: image for image in images}
    for delay in (0.0, 0.01, 0.03, 0.1):
        process = start_linking(node)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert all(node.is_linked(by_name[name]) for name in node.names())
        for name in list(node.names())[:300]:
            (node.cache / name).unlink()
    assert node.process("-q").returncode == 0
    assert all(node.is_linked(image) for image in images)
    marks = [os.getxattr(node.entry(image), IMAGE_ID_MARK).decode() for image in images]
    assert marks == images


def test_a_signal_stops_between_two_images(node: Node, tmp_path: Path) -> None:
    """SIGTERM while thousands are linked leaves correct links, each of which is in the log."""
    log = tmp_path / "log"
    images = node.cloud.add_many(2000)
    process = start_linking(node, "--log-file", str(log))
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert one_line(errors) == INTERRUPTED
    by_name = {node.entry(image).name: image for image in images}
    names = node.names()
    assert 10 < len(names) < len(images)
    assert all(node.is_linked(by_name[name]) for name in names)
    lines = log.read_text().splitlines()
    assert sorted(line.split(" linked: ")[1].split()[0] for line in lines) == sorted(
        by_name[name] for name in names
    )
