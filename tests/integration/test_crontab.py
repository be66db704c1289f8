"""Lines of crontab.example with the openrcs that operators have, under the shell that cron runs."""

import re
import subprocess
from pathlib import Path

import pytest

from support.cloud import ROOT
from support.node import Node, executable

CRONTAB = (ROOT / "crontab.example").read_text(encoding="utf-8")
# The first line, without the five fields of its time.
COMMAND = re.findall(r"^\* \* \* \* \* +(set .*)$", CRONTAB, re.MULTILINE)[0]


def run_line(node: Node, openrc: Path, shell: str = "/bin/sh") -> subprocess.CompletedProcess[str]:
    """Run the first line of the crontab with an openrc, and without other credentials."""
    environment = {
        name: value for name, value in node.environment().items() if not name.startswith("OS_")
    }
    environment["PATH"] = f"{executable().parent}:/usr/bin:/bin"
    return subprocess.run(
        [shell, "-c", COMMAND.replace("/root/admin-openrc", str(openrc))],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
@pytest.mark.parametrize("export", ["export ", ""])
def test_an_openrc_whose_last_command_is_false_is_no_obstacle(
    node: Node, tmp_path: Path, export: str, shell: str
) -> None:
    """The line links and prints nothing, even if the openrc does not export its variables."""
    image = node.cloud.image("image", b"\1" * 1000)
    openrc = tmp_path / "openrc"
    lines = [f"{export}{name}='{value}'\n" for name, value in node.cloud.environment().items()]
    openrc.write_text("".join(lines) + '[ -t 0 ] && echo "admin"\n')
    run = run_line(node, openrc, shell)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert node.is_linked(image)


def test_an_openrc_that_asks_for_the_password_is_an_error(node: Node, tmp_path: Path) -> None:
    """Nobody answers under cron: the line ends at once with an error that cron mails."""
    openrc = tmp_path / "openrc"
    settings = {**node.cloud.environment(), "OS_PASSWORD": "$OS_PASSWORD_INPUT"}
    lines = [f'export {name}="{value}"\n' for name, value in settings.items()]
    openrc.write_text("read -sr OS_PASSWORD_INPUT\n" + "".join(lines))
    run = run_line(node, openrc)
    assert run.returncode == 2
    assert "OS_PASSWORD is not set; " in run.stderr
    assert "asks for the password" in CRONTAB


def test_a_line_without_its_openrc_does_not_start_the_command(node: Node, tmp_path: Path) -> None:
    """If the openrc is missing, the shell ends with an error that cron mails."""
    run = run_line(node, tmp_path / "missing")
    assert run.returncode != 0
    assert "missing" in run.stderr
    assert "ln-images" not in run.stderr
