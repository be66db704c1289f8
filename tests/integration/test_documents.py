"""What the documents say is what the commands do."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ln_images.model import OUTCOMES, Command, Outcome, Reason
from support.cloud import ROOT, SERVERS, wait_until
from support.node import MODULES, REFERENCE, Node, block, executable, needs_root

CRONTAB = (ROOT / "crontab.example").read_text(encoding="utf-8")
PACKAGE = ROOT / "ln_images"


def list_commands() -> Iterator[Command]:
    """Yield each command that exists."""
    for command, module in MODULES.items():
        package = module.rpartition(".")[0]
        if importlib.util.find_spec(package) and importlib.util.find_spec(module):
            yield command


COMMANDS = list(list_commands())


def section(heading: str) -> str:
    """Return a section of the reference, without its heading."""
    _, found, rest = REFERENCE.partition(f"\n## {heading}\n")
    assert found, heading
    return rest.partition("\n## ")[0]


def table(heading: str) -> list[list[str]]:
    """Return the cells of each row of the tables of a section, without headings."""
    rows = re.findall(r"^\| (.*) \|$", section(heading), re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    return [row for row in cells if row[0].startswith("`") or row[0].isdigit()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documents_show_the_help_of_each_command(command: Command) -> None:
    """A document has exactly what --help prints on a terminal of 100 columns."""
    shown = subprocess.check_output(
        [executable(command), "--help"], text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert block(f"{command} --help") == shown


def test_the_manual_pages_are_those_of_the_commands(tmp_path: Path) -> None:
    """Every command has its manual page, and it is the one that `make manual` writes now."""
    subprocess.run([sys.executable, ROOT / "tools" / "man.py", tmp_path], check=True)
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert set(pages) >= {f"{command}.1" for command in COMMANDS}
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_manual_page_is_valid_roff(command: Command) -> None:
    """Groff formats the page without a warning, and the page has every option."""
    run = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou", ROOT / "docs" / f"{command}.1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    for option in re.findall(r"^  .*?(--[a-z-]+)", block(f"{command} --help"), re.MULTILINE):
        assert option in run.stdout


@pytest.mark.parametrize(("shell", "word"), [("bash", "1"), ("zsh", "1"), ("fish", "--dry")])
def test_the_shell_completes_options(shell: str, word: str) -> None:
    """The line of the reference for a shell makes it complete options."""
    source = subprocess.check_output(
        [executable()], text=True, env={**os.environ, "_LN_IMAGES_COMPLETE": f"{shell}_source"}
    )
    assert "_LN_IMAGES_COMPLETE" in source
    assert f"_LN_IMAGES_COMPLETE={shell}_source ln-images" in REFERENCE
    words = {"COMP_WORDS": "ln-images --dry", "COMP_CWORD": word}
    environment = {**os.environ, **words, "_LN_IMAGES_COMPLETE": f"{shell}_complete"}
    assert "--dry-run" in subprocess.check_output([executable()], text=True, env=environment)


def test_the_reference_has_every_outcome_with_its_commands() -> None:
    """The table of outcomes is the enum, in its order, with the commands that have each."""
    expected = []
    for outcome in Outcome:
        commands = [command for command in Command if outcome in OUTCOMES[command]]
        names = ", ".join(f"`{command}`" for command in commands)
        expected.append([f"`{outcome}`", "all" if commands == list(Command) else names])
    assert [row[:2] for row in table("Outcomes")] == expected


def test_the_reference_has_every_reason_code() -> None:
    """The table of reason codes is the enum, and each code has outcomes and a meaning."""
    rows = table("Reason codes")
    codes = [code for code, _outcomes, _meaning in rows]
    assert sorted(codes) == sorted(f"`{reason}`" for reason in Reason)
    for _code, outcomes, meaning in rows:
        assert {Outcome(outcome) for outcome in outcomes.split(", ")}
        assert meaning


def test_the_reference_has_every_exit_status() -> None:
    """The table of exit statuses has those of the contract."""
    statuses = [status for status, _meaning in table("Exit status")]
    assert statuses == ["0", "1", "2", "75", "130"]


@pytest.fixture(scope="module")
def demo() -> str:
    """Return what the demo prints."""
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py"],
        env={**os.environ, "CLOUD_VENV": str(SERVERS), "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def without_what_varies(text: str) -> str:
    """Return a transcript without durations, the demo's user, and real inode numbers.

    Inode numbers become A, B, ... in the order of their appearance, so equal ones stay equal.
    """
    inodes = dict.fromkeys(re.findall(r"^(\d+) [0-9a-f-]+$", text, re.MULTILINE))
    for letter, inode in zip("ABC", inodes, strict=False):
        text = re.sub(rf"^{inode} ", f"{letter} ", text, flags=re.MULTILINE)
    text = re.sub(r"\d+\.\d s$", "TIME s", text, flags=re.MULTILINE)
    return re.sub(r"--owner \w+", "--owner USER", text)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_transcript_of_a_readme_is_what_the_demo_prints(page: str, demo: str) -> None:
    """The first run of each README is a part of what the demo prints."""
    transcript = block("demo", ROOT / page)
    assert "$ ln-images " in transcript
    assert without_what_varies(transcript) in without_what_varies(demo)


def crontab_lines() -> list[str]:
    """Return the commands of crontab.example as the shell gets them, commented ones included."""
    lines = [
        line.removeprefix("#")
        for line in CRONTAB.splitlines()
        if re.match(r"#?[*0-9]+ \* \* \* \* ", line)
    ]
    return [line.split(None, 5)[5] for line in lines]


def test_the_crontab_makes_a_pass_every_ten_seconds() -> None:
    """Each of six lines starts its pass ten seconds later than the one before."""
    sleeps = [
        int(found[1]) if (found := re.match(r"sleep (\d+)", line)) else 0
        for line in crontab_lines()[:6]
    ]
    assert sleeps == [0, 10, 20, 30, 40, 50]


def write_openrc(node: Node, directory: Path) -> Path:
    """Write the openrc that the crontab reads."""
    openrc = directory / "admin-openrc"
    openrc.write_text(
        "".join(f"export {key}='{value}'\n" for key, value in node.cloud.environment().items())
    )
    return openrc


@pytest.mark.parametrize("line", [0, 1, 6])
def test_a_line_of_the_crontab_works_under_crons_shell(
    node: Node, tmp_path: Path, line: int
) -> None:
    """A line links under /bin/sh with cron's few variables, and prints nothing."""
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
        "PATH": settings["PATH"].replace("/opt/ln-images/bin", str(executable().parent)),
        "LN_IMAGES_LOG_FILE": str(tmp_path / "log"),
    }
    run = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert node.is_linked(image)
    assert f"linked: {image}" in (tmp_path / "log").read_text()


# Cron in namespaces of its own, with one crontab and nothing of the machine's.
CRON = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /etc/cron.d
mount -t tmpfs none /var/spool/cron/crontabs
mount --bind /dev/null /etc/crontab
printf '%s required pam_permit.so\\n' session account auth > /run/pam
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
    text = text.replace("/opt/ln-images/bin", str(executable().parent)).replace(
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
        wait_until(lambda: node.is_linked(first), "the next minute", 120)
        second = node.cloud.image("second", b"\1" * 1000)
        wait_until(lambda: node.is_linked(second), "the second image", 120)
        assert cron.poll() is None
    finally:
        cron.kill()
        cron.wait()


UNITS = ROOT / "docs" / "systemd"
SERVICES = sorted(UNITS.glob("ln-images*.service"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("unit", sorted(UNITS.iterdir()), ids=lambda unit: unit.name)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    """Systemd knows every line of each unit, and the program that a service starts exists."""
    for source in UNITS.iterdir():
        text = source.read_text(encoding="utf-8")
        text = text.replace("/opt/ln-images/bin", str(executable().parent))
        text = text.replace("/usr/local/sbin", str(ROOT / "tools"))
        (tmp_path / source.name).write_text(text)
    check = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in check.stderr.splitlines() if str(tmp_path) in line]
    assert complaints == []


@pytest.mark.parametrize(
    "service", [path for path in SERVICES if "node" not in path.name], ids=lambda path: path.name
)
def test_a_service_logs_errors_and_stops_without_failing(service: Path) -> None:
    """A service logs its errors in the journal, and one that a signal stops has not failed."""
    lines = set(service.read_text(encoding="utf-8").splitlines())
    assert {"StandardError=journal", "SuccessExitStatus=130"} <= lines


@needs_root
def test_every_setting_of_the_example_works(node: Node, tmp_path: Path) -> None:
    """With the example of /etc/ln-images.env each command writes its own log and metrics.

    The test replaces the credential and the directories, and uses every line that is a comment.
    """
    text = (ROOT / "docs" / "ln-images.env.example").read_text(encoding="utf-8")
    text = re.sub(r"^#(LN_IMAGES_)", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^OS_.*\n", "", text, flags=re.MULTILINE)
    for directory in ("/var/log", "/var/lib/prometheus/node-exporter"):
        text = text.replace(directory, str(tmp_path))
    text = text.replace("/var/lib/glance/images", str(node.images))
    (tmp_path / "ln-images.env").write_text(text)
    image = node.cloud.image("image", b"\1" * 1000)
    shell = f"set -a; . {tmp_path}/ln-images.env; set +a;"
    environment = node.environment(LN_IMAGES_OWNER=None, LN_IMAGES_IMAGES_DIR=None)
    statuses = {}
    for command in Command:
        run = subprocess.run(
            ["/bin/sh", "-c", f"{shell} exec {executable(command)}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        statuses[command] = run.returncode
        name = command.value.replace("-", "_")
        assert (tmp_path / f"{name}.prom").exists(), run.stderr
        assert (tmp_path / f"{command}.log").exists(), run.stderr
    # The cloud of the tests has no Nova.
    assert statuses == {Command.LINK: 0, Command.PRUNE: 2, Command.VERIFY: 0}
    assert node.entry(image).stat().st_uid == 64055


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files_that_exist(page: Path) -> None:
    """Each link from a page to another file of the project leads to one."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def list_code(page: Path) -> Iterator[str]:
    """Yield each line of a page's fenced and indented code, without comments."""
    is_fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif (is_fenced or line.startswith("    ")) and not line.lstrip().startswith("#"):
            yield line.strip()


def test_the_chinese_readme_has_the_commands_of_the_english_pages() -> None:
    """Each line of code in README.zh.md is in an English page or in crontab.example.

    Its transcript and its picture of the directories are no commands.
    """
    page = ROOT / "README.zh.md"
    english = {line for other in PAGES if other != page for line in list_code(other)}
    crontab = {
        line.removeprefix("#").replace("/root/admin-openrc", "/etc/ln-images.env")
        for line in CRONTAB.splitlines()
    }
    transcript = set(map(str.strip, block("demo", page).splitlines()))
    picture = {line for line in list_code(page) if not line.isascii()}
    assert set(list_code(page)) - english - crontab - transcript - picture == set()


def module_name(path: Path) -> str:
    """Return the name of a module of the package, such as ``prune.rules``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


# Every module of the package, by name.
SOURCES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
}


def list_imports(module: str) -> set[str]:
    """Return the modules of ours that a module imports, wherever in its code."""
    names: set[str] = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {name.removeprefix("ln_images.") for name in names if name.startswith("ln_images.")}
    return ours & SOURCES.keys()


def list_tables_of_modules() -> list[list[str]]:
    """Return the modules of each table of CONTRIBUTING.md, from top to bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tables = [
        re.findall(r"^\| `(?:ln_images/)?([\w/]+)\.py` \|", part, re.MULTILINE)
        for part in text.split("\n\n")
    ]
    return [[name.replace("/", ".") for name in names] for names in tables if names]


def test_no_module_imports_one_that_stands_above_it() -> None:
    """The tables of CONTRIBUTING.md have every module, and each imports only from below."""
    tables = list_tables_of_modules()
    listed = [module for modules in tables for module in modules]
    packages = {module.rpartition(".")[0] for module in SOURCES} - {""}
    starters = {"__init__", "__main__", "prune.__main__"}
    assert sorted(listed) == sorted(SOURCES.keys() - packages - starters)
    for modules in tables:
        for position, module in enumerate(modules):
            assert list_imports(module).isdisjoint(modules[: position + 1]), module


def is_of_linking(module: str) -> bool:
    """Return whether a module is one that ``ln-images`` may import."""
    return module != "verify" and not module.startswith("prune")


# __main__ starts each of the commands, and imports the one that was called.
LINKING = sorted(filter(is_of_linking, SOURCES))


@pytest.mark.parametrize("module", [module for module in LINKING if module != "__main__"])
def test_linking_imports_nothing_of_the_clean_up(module: str) -> None:
    """The modules beside prune/ and verify.py import neither of them."""
    assert [name for name in list_imports(module) if not is_of_linking(name)] == []


# Every call of the standard library that renames or removes a file.
REMOVING = {"rename", "renames", "unlink", "remove", "removedirs", "rmdir", "rmtree", "move"}


def list_removing_calls(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that could rename or remove a file.

    ``replace`` with one argument is that of a path: that of a text has two.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in REMOVING)
        elif isinstance(node, ast.Attribute) and node.attr in REMOVING:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_of_os = ast.unparse(node.func.value) in ("os", "shutil")
            if node.func.attr == "replace" and (is_of_os or len(node.args) < 2):
                yield ast.unparse(node)


@pytest.mark.parametrize("module", LINKING)
def test_linking_has_no_call_that_renames_or_removes(module: str) -> None:
    """No code of ours that ``ln-images`` imports could rename or remove a file."""
    assert list(list_removing_calls(SOURCES[module])) == []


@pytest.mark.parametrize(
    "code",
    [
        "os.unlink(name, dir_fd=cache)",
        "os.replace(old, new)",
        "path.replace(new)",
        "from os import remove",
        "call(shutil.rmtree)",
    ],
)
def test_a_call_that_removes_is_found(code: str) -> None:
    """The search for such calls finds each form of them."""
    assert list(list_removing_calls(ast.parse(code)))
