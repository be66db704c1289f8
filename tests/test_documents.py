"""What the documents say is what the command does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import man
from cloud import ROOT, SERVERS
from conftest import COMMAND, Node, block

CRONTAB = (ROOT / "crontab.example").read_text(encoding="utf-8")


def test_the_readmes_options_are_those_of_help() -> None:
    """The README shows exactly what --help prints."""
    shown = subprocess.check_output([COMMAND, "--help"], text=True, env={**os.environ, "COLUMNS": "100"})
    assert block("help") == shown


def test_the_man_page_is_that_of_the_command() -> None:
    """The page that is installed is the one that tests/man.py makes now."""
    path = ROOT / "docs" / "ln-images.1"
    assert path.read_text(encoding="utf-8").splitlines() == "\n".join(man.page()).splitlines()


@pytest.mark.parametrize(("shell", "word"), [("bash", "1"), ("zsh", "1"), ("fish", "--prune")])
def test_the_shell_completes_options(shell: str, word: str) -> None:
    """What the README has a shell ask for its completion answers, and completes an option and its choices."""
    source = subprocess.check_output([COMMAND], text=True, env={**os.environ, "_LN_IMAGES_COMPLETE": f"{shell}_source"})
    assert "_LN_IMAGES_COMPLETE" in source
    assert f"_LN_IMAGES_COMPLETE={shell}_source ln-images" in README
    words = {"COMP_WORDS": "ln-images --prune", "COMP_CWORD": word}
    asked = {**os.environ, **words, "_LN_IMAGES_COMPLETE": f"{shell}_complete"}
    assert "--prune-after" in subprocess.check_output([COMMAND], text=True, env=asked)


def without_what_varies(text: str) -> str:
    """A transcript without inode numbers, durations and the user whom the demo uses."""
    text = re.sub(r"^\d+ -rw", "INODE -rw", text, flags=re.MULTILINE)
    text = re.sub(r"\d+\.\d s$", "TIME s", text, flags=re.MULTILINE)
    text = re.sub(r"^This machine has no user qemu.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"--owner \w+", "--owner USER", text)
    return re.sub(r"(-rw-r--r-- \d) \S+ +\S+", r"\1 USER GROUP", text)


def test_the_readmes_transcript_is_what_the_demo_prints() -> None:
    """The README's first run was really run: the demo prints the same."""
    demo = subprocess.run(
        [sys.executable, ROOT / "tests" / "demo.py"],
        env={**os.environ, "CLOUD_VENV": str(SERVERS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    assert without_what_varies(demo.stdout) == without_what_varies(block("demo"))


def crontab_lines() -> list[str]:
    """The commands of crontab.example, those commented out included, as cron hands them to the shell."""
    lines = [line.removeprefix("#") for line in CRONTAB.splitlines() if re.match(r"#?[*0-9]+ \* \* \* \* ", line)]
    return [line.split(None, 5)[5] for line in lines]


def test_the_crontab_makes_a_pass_every_ten_seconds() -> None:
    """Six lines, each ten seconds later than the one before."""
    sleeps = [int(found[1]) if (found := re.match(r"sleep (\d+)", line)) else 0 for line in crontab_lines()[:6]]
    assert sleeps == [0, 10, 20, 30, 40, 50]


def test_the_crontab_prunes_once_an_hour_only_where_it_is_wanted() -> None:
    """The last line prunes at one minute of each hour, and is commented out."""
    assert "ln-images -q --prune" in crontab_lines()[-1]
    assert re.search(r"^#\d+ \* \* \* \* .*--prune$", CRONTAB, re.MULTILINE)


@pytest.mark.parametrize("line", [0, 1, 6])
def test_a_line_of_the_crontab_works_under_crons_shell(node: Node, tmp_path: Path, line: int) -> None:
    """A line links under /bin/sh with cron's few variables and the crontab's own, and prints nothing."""
    image = node.cloud.image("image", b"\1" * 1000)
    openrc = tmp_path / "admin-openrc"
    openrc.write_text("".join(f"export {key}='{value}'\n" for key, value in node.cloud.environment().items()))
    command = crontab_lines()[line].replace("/root/admin-openrc", str(openrc)).replace("sleep 10", "sleep 1")
    command = command.replace("--for 58", "--for 3")
    settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", CRONTAB, re.MULTILINE))
    assert set(settings) == {"PATH", "MAILTO", "LN_IMAGES_LOG_FILE"}
    here = {key: value for key, value in node.environment().items() if key.startswith(("LN_IMAGES_", "COV"))}
    environment = {
        **here,
        **settings,
        "HOME": str(tmp_path),
        "LOGNAME": "root",
        "SHELL": "/bin/sh",
        "PATH": settings["PATH"].replace("/opt/ln-images/bin", str(COMMAND.parent)),
        "LN_IMAGES_LOG_FILE": str(tmp_path / "log"),
    }
    run = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert node.linked(image)
    assert f"linked: {image}" in (tmp_path / "log").read_text()
