"""The command ``ln-images`` as its users run it, against the real Keystone and Glance."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ln_images
from ln_images.model import Command
from support.cloud import wait_until
from support.faulty import Answer, Front
from support.mounts import mounted, run_tool
from support.node import OWNER, SCHEMA, UNCOVERED, Node, executable, needs_root
from support.observe import held_lock, one_line

DATA = b"\1" * 100_000
STRANGER = "10000000-0000-4000-8000-000000000000"


def changeable(path: Path) -> tuple[int, ...]:
    """Return what a run could change of a file."""
    status = path.lstat()
    return (
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        status.st_ctime_ns,
    )


def test_every_kind_of_image_over_three_passes(node: Node) -> None:
    """Each image is judged by itself: finished ones are linked, whatever the others are."""
    cloud = node.cloud
    other = cloud.as_user()
    linked = {
        cloud.image("raw", DATA),
        cloud.image("upper", DATA, id="ABCDEF00-8375-44C9-B1F4-3E1F4C4A8EF0"),
        cloud.image("hidden", DATA, os_hidden=True),
        cloud.image("community", DATA, other, visibility="community"),
        cloud.image("public", DATA, visibility="public"),
        cloud.image("kernel", DATA, disk_format="aki", container_format="aki"),
    }
    waiting = {name: cloud.create(name) for name in ("queued", "saving", "importing", "uploading")}
    # One after the other: two writers of one SQLite database that begin together can be in each
    # other's way.
    upload = cloud.slow_upload(waiting["saving"], DATA)
    wait_until(lambda: (node.images / waiting["saving"]).exists(), "a file that is being saved")
    stage = cloud.slow_upload(waiting["uploading"], DATA, "stage")
    wait_until(lambda: cloud.status(waiting["uploading"]) == "uploading", "uploading")
    cloud.set_status(waiting["importing"], "importing")
    skipped = {status: cloud.image(status, DATA) for status in ("deactivated", "pending_delete")}
    cloud.image_api().post(f"/images/{skipped['deactivated']}/actions/deactivate")
    cloud.set_status(skipped["pending_delete"], "pending_delete")
    partial, empty = cloud.image("partial", DATA), cloud.image("empty", b"")
    os.truncate(node.images / partial, 1000)
    elsewhere = cloud.image("elsewhere", DATA)
    (node.images / elsewhere).unlink()
    vmdk = cloud.create("vmdk", disk_format="vmdk")
    cloud.set_status(vmdk, "active")

    others = {
        **dict.fromkeys(waiting.values(), ("waiting", "not_finished")),
        **dict.fromkeys(skipped.values(), ("skipped", "status")),
        partial: ("waiting", "file_incomplete"),
        empty: ("skipped", "empty"),
        elsewhere: ("skipped", "no_file"),
        vmdk: ("skipped", "disk_format"),
    }
    assert node.verdicts() == others | dict.fromkeys(linked, ("linked", "no_link_yet"))
    assert all(node.is_linked(image_id) for image_id in linked)
    assert node.names() == {node.entry(image_id).name for image_id in linked}

    assert node.verdicts() == others | dict.fromkeys(linked, ("present", "correct"))

    upload.finish(DATA)
    stage.finish(DATA)
    deleted = linked.pop()
    cloud.delete(deleted)
    third = node.verdicts()
    assert third[waiting["saving"]] == ("linked", "no_link_yet")
    assert node.is_linked(waiting["saving"])
    assert deleted not in third
    assert node.entry(deleted).exists(), "ln-images never removes a link"


def test_images_of_two_projects_are_linked(node: Node) -> None:
    """The administrator's credential links the private images of every project."""
    tenant = node.cloud.add_user("tenant", "tenants", "member")
    images = [node.cloud.image("private", DATA, tenant), node.cloud.image("mine", DATA)]
    assert node.verdicts() == dict.fromkeys(images, ("linked", "no_link_yet"))


def test_a_drifted_a_lost_and_an_occupied_link(node: Node) -> None:
    """A pass repairs owner and mode, makes a lost link again, and leaves another file alone."""
    drifted, lost, taken = (node.cloud.image(name, DATA) for name in ("drifted", "lost", "taken"))
    node.run()
    node.entry(drifted).chmod(0o600)
    node.entry(lost).unlink()
    node.entry(taken).unlink()
    node.entry(taken).write_bytes(b"nova's own")
    assert node.verdicts() == {
        drifted: ("repaired", "wrong_attributes"),
        lost: ("linked", "link_was_removed"),
        taken: ("occupied", "other_file"),
    }
    assert node.is_linked(drifted)
    assert node.is_linked(lost)
    assert node.entry(taken).read_bytes() == b"nova's own"


def test_mode_and_formats_are_what_the_options_say(node: Node) -> None:
    """--mode and --disk-format, which is repeatable, work as options and from the environment."""
    raw = node.cloud.image("raw", DATA)
    ramdisk = node.cloud.image("ramdisk", DATA, disk_format="ari", container_format="ari")
    assert node.process("--mode", "0444", "--disk-format", "raw").returncode == 0
    assert node.entry(raw).stat().st_mode & 0o7777 == 0o444
    assert not node.entry(ramdisk).exists()
    assert node.process(LN_IMAGES_MODE="0644", LN_IMAGES_DISK_FORMAT="raw ARI").returncode == 0
    assert node.is_linked(raw)
    assert node.is_linked(ramdisk)


def test_an_owner_of_the_options_owns_the_link(node: Node) -> None:
    """--owner takes names and numbers, and without a group it is the user's own."""
    image = node.cloud.image("image", DATA)
    if OWNER.uid != os.getuid():
        assert node.process("--owner", "root").returncode == 0
        assert node.entry(image).stat().st_uid == 0
    assert node.process("--owner", f"{OWNER.uid}:{OWNER.gid}").returncode == 0
    assert node.is_linked(image)


def test_a_dry_run_touches_nothing(node: Node) -> None:
    """--dry-run reports what the next run does, changes nothing, and does not need the lock."""
    image = node.cloud.image("image", DATA)
    before = changeable(node.images / image)
    with held_lock(node):
        run = node.process("--dry-run")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("dry run: 1 linked, ")
    assert changeable(node.images / image) == before
    assert not node.names()


def test_a_text_report_is_a_table_and_a_summary(node: Node) -> None:
    """Images that are present are counted, and listed with --full, or by id alone with -v."""
    image = node.cloud.image("debian", DATA)
    queued = node.cloud.create("tomorrow")

    def report(*arguments: str) -> tuple[list[list[str]], str]:
        heading, *rows, summary = node.process(*arguments).stdout.splitlines()
        table = [heading, *sorted(rows, reverse=True)]
        return [re.split(" {2,}", line) for line in table], summary

    heading = ["NAME", "ID", "STATUS", "SIZE", "OUTCOME", "REASON"]
    waiting = ["tomorrow", queued, "queued", "-", "waiting", "status queued"]
    linked = ["debian", image, "active", "97.7 KiB", "linked"]
    assert report()[0] == [heading, waiting, linked]
    table, summary = report()
    assert table == [heading, waiting]
    assert re.fullmatch(r"1 present, 1 waiting, \d+\.\d s", summary)
    assert report("--full")[0] == [heading, waiting, [*linked[:-1], "present"]]
    assert report("-v")[0] == [heading, waiting, ["-", image, "-", "-", "present"]]


def test_a_json_report_is_one_line_in_the_documented_form(node: Node) -> None:
    """The document has the fields, counts and images of the contract, and its schema is strict."""
    image = node.cloud.image("de\u202ebian\n", DATA)
    run = node.process("--format", "json")
    assert run.stdout.count("\n") == 1
    assert run.stdout.isascii()
    document = json.loads(run.stdout)
    assert (document["version"], document["command"]) == (2, "ln-images")
    assert document["dry_run"] is False
    assert (document["exit_status"], document["error"]) == (0, None)
    assert document["reclaimable"]["orphans"] == {"count": 0, "bytes": 0}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*\+00:00", document["started_at"])
    assert 0 < document["duration_seconds"] < 60
    assert {key: count for key, count in document["counts"].items() if count} == {"linked": 1}
    assert document["images"] == [
        {
            "id": image,
            "name": "de\u202ebian\n",
            "status": "active",
            "disk_format": "raw",
            "size": len(DATA),
            "cache_name": node.entry(image).name,
            "outcome": "linked",
            "reason_code": "no_link_yet",
            "reason": None,
        }
    ]
    assert json.loads(node.process("--format", "json").stdout)["images"] == []
    wrong_fields: tuple[dict[str, Any], ...] = (
        {"version": 1},
        {"more": 1},
        {"started_at": "today"},
        {"counts": {"linked": 1}},
        {"images": [document["images"][0] | {"outcome": "done"}]},
        {"images": [document["images"][0] | {"reason_code": "because"}]},
        {"exit_status": 3},
        {"reclaimable": {}},
    )
    for fields in wrong_fields:
        assert not SCHEMA.is_valid(document | fields), fields


def test_quiet_prints_nothing_while_all_is_well(node: Node) -> None:
    """Under -q cron sends no mail unless something failed; JSON is printed for changes only."""
    node.cloud.image("image", DATA)
    node.cloud.create("queued")
    for run in (node.process("-q"), node.process("-q")):
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert node.process("-q", "--format", "json").stdout == ""
    node.cloud.image("another", DATA)
    assert json.loads(node.process("-q", "--format", "json").stdout)["counts"]["linked"] == 1


@needs_root
def test_a_failed_image_is_exit_status_1(node: Node, tmp_path: Path) -> None:
    """If the system refuses a link, that image is failed, with its line on standard error."""
    image = node.cloud.image("image", DATA)
    with mounted(tmp_path, "-t", "tmpfs", "-o", "mode=755", "none"):
        images, cache = tmp_path / "images", tmp_path / "cache"
        images.mkdir()
        cache.mkdir()
        (images / image).write_bytes(DATA)
        run_tool("mount", "-o", "remount,ro", tmp_path)
        run = node.process("-q", LN_IMAGES_IMAGES_DIR=str(images), LN_IMAGES_CACHE_DIR=str(cache))
    assert (run.returncode, run.stdout) == (1, "")
    assert one_line(run.stderr).startswith(
        f"ln-images: failed: {image} (image) as {node.entry(image).name}: Read-only file system"
    )


def test_the_lock_of_another_run_is_exit_status_75(node: Node) -> None:
    """A run that finds the lock held does nothing, and names the process that holds it."""
    node.cloud.image("image", DATA)
    with held_lock(node):
        run = node.process()
    assert (run.returncode, run.stdout) == (75, "")
    assert f"{node.cache}: process {os.getpid()} (" in one_line(run.stderr)
    assert not node.names()


def test_a_stopped_process_that_holds_the_lock_is_named(node: Node, front: Front) -> None:
    """If Ctrl-Z has stopped the run that holds the lock, the message says so and how to go on."""
    image = node.cloud.image("image", DATA)
    server, region = front(lambda path: Answer(status=0, hang=True) if "id=in" in path else path)
    first = subprocess.Popen(
        [executable(), "-q"], env=node.environment(**region, **UNCOVERED), text=True
    )
    try:
        wait_until(lambda: any("id=in" in path for path in server.paths), "the query of Glance")
        first.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{first.pid}/stat")
        wait_until(lambda: ") T " in state.read_text(), "the stop")
        run = node.process("-q")
        assert run.returncode == 75
        message = one_line(run.stderr)
        assert re.search(rf"process {first.pid} \(.*ln-images -q\), which is stopped", message)
        assert "kill -CONT" in message
        server.rule = str
    finally:
        first.kill()
        first.wait()
    assert node.process("-q").returncode == 0
    assert node.is_linked(image)


def test_the_most_severe_error_decides(node: Node) -> None:
    """If several errors apply, the exit status is that of the most severe: 2, then 75, then 1."""
    with held_lock(node):
        assert node.process(OS_PASSWORD=None).returncode == 2
        # Nothing can be made below /sys.
        run = node.process("--log-file", "/sys/log")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["surplus"], "surplus"),
        (["--mode", "0600"], "everybody must be able to read"),
        (["--timeout", "nan"], "--timeout"),
        (["--owner", "no-such-user"], "no-such-user"),
        (["--for", "60"], "--for needs --every"),
    ],
)
def test_wrong_usage_is_exit_status_2(node: Node, arguments: list[str], named: str) -> None:
    """A wrong option is one line that names it and --help, and nothing is done."""
    run = node.process(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    line = one_line(run.stderr)
    assert named in line
    assert line.endswith("; see ln-images --help\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--images-dir", "/no/such/directory"],
        ["--cache-dir", "/no/such/directory"],
        ["--log-file", "/no/such/directory/log"],
    ],
)
def test_a_missing_directory_is_exit_status_2(node: Node, arguments: list[str]) -> None:
    """A directory that does not exist is one line that names the option and the path."""
    run = node.process(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert f"{' '.join(arguments)}: No such file or directory; " in one_line(run.stderr)


@pytest.mark.parametrize(
    ("arguments", "replacement"),
    [
        (["--prune"], "the command ln-images-prune"),
        (["--prune-after", "24h"], "ln-images-prune --after"),
        (["--prune-after=24h"], "ln-images-prune --after"),
        (["--prune-unmarked"], "ln-images-prune --unmarked"),
        (["--instances-dir", "/var/lib/nova/instances"], "ln-images-node"),
        (["--verify"], "the command ln-images-verify"),
    ],
)
def test_an_option_of_another_command_names_that_command(
    node: Node, arguments: list[str], replacement: str
) -> None:
    """An option that left ln-images ends with status 2, and the line says what replaces it."""
    node.cloud.image("image", DATA)
    run = node.process("-q", *arguments, "--full")
    assert (run.returncode, run.stdout) == (2, "")
    option = arguments[0].partition("=")[0]
    assert one_line(run.stderr).startswith(f"ln-images: {option} is gone; use {replacement}")
    assert not node.names()
    assert option not in node.process("--help").stdout


@pytest.mark.parametrize(
    ("variable", "command"),
    [("LN_IMAGES_PRUNE", "ln-images-prune"), ("LN_IMAGES_VERIFY", "ln-images-verify")],
)
def test_a_leftover_variable_is_one_warning(node: Node, variable: str, command: str) -> None:
    """LN_IMAGES_PRUNE and LN_IMAGES_VERIFY are a warning, and images are linked all the same."""
    image = node.cloud.image("image", DATA)
    run = node.process(command=Command.LINK, **{variable: "1"})
    assert run.returncode == 0
    line = one_line(run.stderr)
    assert line.startswith(f"ln-images: warning: {variable} has no effect")
    assert command in line
    assert node.is_linked(image)


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">/dev/full", "ln-images: the report cannot be written: No space left on device\n"),
        (">&-", ""),
        ("2>&-", None),
        (">&- 2>&-", None),
        ("| :", "ln-images: the report cannot be written: Broken pipe\n"),
    ],
)
@pytest.mark.parametrize("report_format", ["text", "json"])
def test_a_report_that_cannot_be_written_takes_nothing_away(
    node: Node, tmp_path: Path, redirection: str, message: str | None, report_format: str
) -> None:
    """The image is linked, the status is the pass's own, and one line names the problem."""
    image = node.cloud.image("image", DATA)
    # The reader of a pipe ends first.
    pause = "sleep 0.5; " if redirection == "| :" else ""
    command = f"{executable()} --format {report_format}"
    line = f"{{ {pause}{command}; echo $? >{tmp_path}/status; }} {redirection}"
    run = subprocess.run(
        ["/bin/sh", "-c", line], env=node.environment(), capture_output=True, text=True, check=False
    )
    assert (tmp_path / "status").read_text() == "0\n"
    assert node.is_linked(image)
    if message is not None:
        assert run.stderr == message


def test_many_images_are_linked_without_a_standard_error(node: Node, tmp_path: Path) -> None:
    """A run that would show a progress bar works without a standard error, too."""
    images = node.cloud.add_many(200)
    line = f"{executable()} -q 2>&-; echo $? >{tmp_path}/status"
    subprocess.run(["/bin/sh", "-c", line], env=node.environment(), capture_output=True, check=True)
    assert (tmp_path / "status").read_text() == "0\n"
    assert all(map(node.is_linked, images))


def test_names_of_any_script_are_printed_under_any_locale(node: Node) -> None:
    """Standard output that cannot show a character of a name gets it escaped."""
    node.cloud.image("\N{CJK UNIFIED IDEOGRAPH-4E2D}\u6587", DATA)
    assert "\\u4e2d\\u6587" in node.process(PYTHONIOENCODING="iso-8859-1").stdout
    assert "\u4e2d\u6587" in node.process("--full", PYTHONIOENCODING="utf-8").stdout


def test_the_module_takes_nothing_from_the_current_directory(tmp_path: Path) -> None:
    """`python -m ln_images` runs no click.py of the directory in which it is started."""
    for module in ("click", "signal", "logging", "prettytable"):
        (tmp_path / f"{module}.py").write_text("open('taken', 'w').close()\n")
    for flags in ([], ["-P"]):
        run = subprocess.run(
            [sys.executable, *flags, "-m", "ln_images", "--version"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not (tmp_path / "taken").exists(), run.stderr
        assert (run.returncode, run.stdout) == (0, f"ln-images, version {ln_images.__version__}\n")


def test_eight_runs_at_once_do_the_work_once(node: Node, tmp_path: Path) -> None:
    """Of runs that start together one at a time has the lock, and the others end with 75."""
    images = node.cloud.add_many(500)
    runs = [
        subprocess.Popen(
            [executable(), "-q", "--log-file", str(tmp_path / str(number))],
            env=node.environment(),
            stderr=subprocess.DEVNULL,
        )
        for number in range(8)
    ]
    statuses = {run.wait(timeout=120) for run in runs}
    assert statuses == {0, 75}
    assert all(node.is_linked(image) for image in images)
    logged = "".join((tmp_path / str(number)).read_text() for number in range(8))
    assert logged.count(" linked: ") == len(images)


def test_help_and_version_need_no_cloud() -> None:
    """--help and --version need no environment, and do not import the OpenStack clients."""
    code = (
        "import sys, ln_images.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "clients = ('keystoneauth1', 'glanceclient', 'oslo')\n"
        "sys.exit(any(module.startswith(clients) for module in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False, env={}
    )
    assert run.returncode == 0
    for flag in ("-h", "--help"):
        assert "Usage: ln-images [OPTIONS]" in subprocess.check_output(
            [executable(), flag], text=True
        )
    version = subprocess.check_output([sys.executable, "-m", "ln_images", "--version"], text=True)
    assert version == f"ln-images, version {ln_images.__version__}\n"
