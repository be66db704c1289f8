"""What the documents say is what the command does."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import man
import pytest

from support.cloud import ROOT, SERVERS, wait_until
from support.node import COMMAND, REFERENCE, Node, block, needs_root

CRONTAB = (ROOT / "crontab.example").read_text(encoding="utf-8")


def test_the_options_of_the_reference_are_those_of_help() -> None:
    """The reference shows exactly what --help prints."""
    shown = subprocess.check_output(
        [COMMAND, "--help"], text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert block("help") == shown


def test_the_man_page_is_that_of_the_command() -> None:
    """The page that is installed is the one that tests/man.py makes now."""
    path = ROOT / "docs" / "ln-images.1"
    assert path.read_text(encoding="utf-8").splitlines() == "\n".join(man.page()).splitlines()


@pytest.mark.parametrize(("shell", "word"), [("bash", "1"), ("zsh", "1"), ("fish", "--prune")])
def test_the_shell_completes_options(shell: str, word: str) -> None:
    """What the reference has a shell ask for its completion answers, and completes an option and its choices."""
    source = subprocess.check_output(
        [COMMAND], text=True, env={**os.environ, "_LN_IMAGES_COMPLETE": f"{shell}_source"}
    )
    assert "_LN_IMAGES_COMPLETE" in source
    assert f"_LN_IMAGES_COMPLETE={shell}_source ln-images" in REFERENCE
    words = {"COMP_WORDS": "ln-images --prune", "COMP_CWORD": word}
    asked = {**os.environ, **words, "_LN_IMAGES_COMPLETE": f"{shell}_complete"}
    assert "--prune-after" in subprocess.check_output([COMMAND], text=True, env=asked)


def without_what_varies(text: str) -> str:
    """A transcript without inode numbers, durations and the user whom the demo uses."""
    text = re.sub(r"^\d+ -rw", "INODE -rw", text, flags=re.MULTILINE)
    text = re.sub(r"^total \d+$", "total BLOCKS", text, flags=re.MULTILINE)
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
    lines = [
        line.removeprefix("#")
        for line in CRONTAB.splitlines()
        if re.match(r"#?[*0-9]+ \* \* \* \* ", line)
    ]
    return [line.split(None, 5)[5] for line in lines]


def test_the_crontab_makes_a_pass_every_ten_seconds() -> None:
    """Six lines, each ten seconds later than the one before."""
    sleeps = [
        int(found[1]) if (found := re.match(r"sleep (\d+)", line)) else 0
        for line in crontab_lines()[:6]
    ]
    assert sleeps == [0, 10, 20, 30, 40, 50]


def test_the_crontab_prunes_once_an_hour_only_where_it_is_wanted() -> None:
    """The last line prunes at one minute of each hour, and is commented out."""
    assert "ln-images -q --prune" in crontab_lines()[-1]
    assert re.search(r"^#\d+ \* \* \* \* .*--prune$", CRONTAB, re.MULTILINE)


def write_openrc(node: Node, directory: Path) -> Path:
    """The openrc that the crontab reads."""
    openrc = directory / "admin-openrc"
    openrc.write_text(
        "".join(f"export {key}='{value}'\n" for key, value in node.cloud.environment().items())
    )
    return openrc


@pytest.mark.parametrize("line", [0, 1, 6])
def test_a_line_of_the_crontab_works_under_crons_shell(
    node: Node, tmp_path: Path, line: int
) -> None:
    """A line links under /bin/sh with cron's few variables and the crontab's own, and prints nothing."""
    image = node.cloud.image("image", b"\1" * 1000)
    openrc = write_openrc(node, tmp_path)
    command = (
        crontab_lines()[line]
        .replace("/root/admin-openrc", str(openrc))
        .replace("sleep 10", "sleep 1")
    )
    command = command.replace("--for 65", "--for 3")
    settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", CRONTAB, re.MULTILINE))
    assert set(settings) == {"PATH", "MAILTO", "LN_IMAGES_LOG_FILE"}
    here = {
        key: value
        for key, value in node.environment().items()
        if key.startswith(("LN_IMAGES_", "COV"))
    }
    environment = {
        **here,
        **settings,
        "HOME": str(tmp_path),
        "LOGNAME": "root",
        "SHELL": "/bin/sh",
        "PATH": settings["PATH"].replace("/opt/ln-images/bin", str(COMMAND.parent)),
        "LN_IMAGES_LOG_FILE": str(tmp_path / "log"),
    }
    run = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert node.linked(image)
    assert f"linked: {image}" in (tmp_path / "log").read_text()


# Cron in namespaces of its own, with one crontab and nothing of the machine's.
CRON = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /etc/cron.d
mount -t tmpfs none /var/spool/cron/crontabs
mount --bind /dev/null /etc/crontab
echo 'session required pam_permit.so\naccount required pam_permit.so\nauth required pam_permit.so' > /run/pam
mount --bind /run/pam /etc/pam.d/cron
install -m 0600 "$0" /var/spool/cron/crontabs/root
exec cron -f -L 0
"""
needs_cron = pytest.mark.skipif(shutil.which("cron") is None, reason="needs Debian's cron")


@needs_root
@needs_cron
def test_the_line_that_reacts_links_under_a_real_cron(node: Node, tmp_path: Path) -> None:
    """The crontab word for word, the line in place of the six.

    An image is linked, and one that comes after it.
    """
    text = re.sub(r"^\*", "#*", CRONTAB, flags=re.MULTILINE)
    text = re.sub(r"^#(.*--every 10 --for 65)$", r"\1", text, flags=re.MULTILINE)
    text = text.replace("/root/admin-openrc", str(write_openrc(node, tmp_path)))
    text = text.replace("/opt/ln-images/bin", str(COMMAND.parent)).replace(
        "/var/log/ln-images.log", f"{tmp_path}/log"
    )
    settings = [
        f"{name}={value}\n"
        for name, value in node.environment().items()
        if name.startswith("LN_IMAGES_")
    ]
    crontab = tmp_path / "crontab"
    crontab.write_text("".join(settings) + text)
    first = node.cloud.image("first", b"\1" * 1000)
    space = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    cron = subprocess.Popen([*space, "sh", "-c", CRON, crontab])
    try:
        wait_until(lambda: node.linked(first), "the next minute", 120)
        second = node.cloud.image("second", b"\1" * 1000)
        wait_until(lambda: node.linked(second), "the second image", 120)
        assert cron.poll() is None
    finally:
        cron.kill()
        cron.wait()


def test_the_units_of_the_guide_tell_what_fails_and_stop_without_failing() -> None:
    """Each service of the guide says its errors in the journal, and one that is stopped by a signal has not failed."""
    guide = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    services = [
        text for text in re.findall(r"```ini\n(.*?)```", guide, re.DOTALL) if "ExecStart=" in text
    ]
    assert len(services) == 2
    for service in services:
        assert {"StandardError=journal", "SuccessExitStatus=130"} <= set(service.splitlines())


PAGES = [ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    """Each link from a page to another file of the project leads to one."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_no_module_imports_one_that_stands_above_it() -> None:
    """The table of CONTRIBUTING.md has every module, and each imports from below alone.

    The house has no circle.
    """
    table = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("| --- | --- |")[2]
        .partition("\n\n")[0]
    )
    order = re.findall(r"`(\w+)\.py`", table)
    package = ROOT / "ln_images"
    assert sorted(order) == sorted(
        path.stem for path in package.glob("*.py") if not path.stem.startswith("__")
    )
    for above, module in enumerate(order):
        for one in ast.walk(ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(one, ast.ImportFrom) and str(one.module).startswith("ln_images"):
                names = (
                    [alias.name for alias in one.names]
                    if one.module == "ln_images"
                    else [str(one.module)[10:]]
                )
                assert {name for name in names if name in order} <= set(order[above + 1 :]), module


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_is_a_page_and_a_half(name: str) -> None:
    """At most 200 lines are read before somebody begins."""
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 200
