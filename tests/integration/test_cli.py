"""The command as its users run it, against the real Keystone and Glance."""

import fcntl
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ln_images.inode import MARK

import ln_images
from support.cloud import wait_until
from support.node import COMMAND, OWNER, SCHEMA, UNCOVERED, Node, needs_root

DATA = b"\1" * 100_000
INTERRUPTED = "ln-images: interrupted: what was linked stays, the next run does the rest\n"


def one_line(text: str) -> str:
    """The one line of error that a run printed."""
    assert re.fullmatch(r"ln-images: [^\n]+\n", text), text
    return text


def inode(path: Path) -> tuple[int, ...]:
    """What a run could change of a file."""
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
    """Each image is judged on its own.

    Finished ones are linked, whatever state the others are in.
    """
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

    expected = dict.fromkeys(linked, ("linked", ""))
    expected |= {image_id: ("waiting", f"status {status}") for status, image_id in waiting.items()}
    expected |= {image_id: ("skipped", f"status {status}") for status, image_id in skipped.items()}
    expected |= {
        partial: ("waiting", f"1000 of {len(DATA)} bytes are here"),
        empty: ("skipped", "empty"),
        elsewhere: ("skipped", "no file here"),
        vmdk: ("skipped", "disk format vmdk"),
    }
    assert node.outcomes() == expected
    assert all(node.linked(image_id) for image_id in linked)
    assert node.names() == {node.entry(image_id).name for image_id in linked}

    assert node.outcomes() == expected | dict.fromkeys(linked, ("present", ""))

    upload.finish(DATA)
    stage.finish(DATA)
    gone = linked.pop()
    cloud.delete(gone)
    third = node.outcomes()
    assert third[waiting["saving"]] == ("linked", "")
    assert node.linked(waiting["saving"])
    assert gone not in third
    assert node.entry(gone).exists(), "a link is never taken away unasked"


def test_images_of_two_projects_are_linked(node: Node) -> None:
    """The administrator's credential links the private images of every project."""
    tenant = node.cloud.add_user("tenant", "tenants", "member")
    images = [node.cloud.image("private", DATA, tenant), node.cloud.image("mine", DATA)]
    assert node.outcomes() == dict.fromkeys(images, ("linked", ""))


def test_a_drifted_a_lost_and_an_occupied_link(node: Node) -> None:
    """Owner and mode are repaired, a lost link is put back, a name of another file is left alone and reported."""
    drifted, lost, taken = (node.cloud.image(name, DATA) for name in ("drifted", "lost", "taken"))
    node.outcomes()
    node.entry(drifted).chmod(0o600)
    node.entry(lost).unlink()
    node.entry(taken).unlink()
    node.entry(taken).write_bytes(b"nova's own")
    outcomes = {image_id: outcome for image_id, (outcome, _) in node.outcomes().items()}
    assert outcomes == {drifted: "repaired", lost: "linked", taken: "occupied"}
    assert node.linked(drifted)
    assert node.linked(lost)
    assert node.entry(taken).read_bytes() == b"nova's own"


def test_mode_owner_and_formats_are_what_the_options_say(node: Node) -> None:
    """--mode and --disk-format, given as options or in the environment, decide.

    Formats are repeatable.
    """
    raw = node.cloud.image("raw", DATA)
    ramdisk = node.cloud.image("ramdisk", DATA, disk_format="ari", container_format="ari")
    assert node.process("--mode", "0444", "--disk-format", "raw").returncode == 0
    assert node.entry(raw).stat().st_mode & 0o7777 == 0o444
    assert not node.entry(ramdisk).exists()
    assert node.process(LN_IMAGES_MODE="0644", LN_IMAGES_DISK_FORMAT="raw ARI").returncode == 0
    assert node.linked(raw)
    assert node.linked(ramdisk)


def test_a_dry_run_touches_nothing(node: Node) -> None:
    """--dry-run reports what the next run does, changes nothing on disk, and does not need the lock."""
    image = node.cloud.image("image", DATA)
    before = inode(node.images / image)
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run = node.process("--dry-run")
    os.close(descriptor)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("dry run: 1 linked, ")
    assert inode(node.images / image) == before
    assert not node.names()


def test_a_text_report_is_a_table_and_a_summary(node: Node) -> None:
    """Images present are counted, and listed only with --full, or by id alone with -v.

    All else is a row.
    """
    image = node.cloud.image("debian", DATA)
    queued = node.cloud.create("tomorrow")
    row = f"debian    {image}  active  97.7 KiB  {{}}"
    waits = f"tomorrow  {queued}  queued  -         waiting  status queued"
    head = f"NAME      {'ID':36}  STATUS  SIZE      OUTCOME  REASON"
    assert node.process().stdout.splitlines()[:-1] == [head, waits, row.format("linked")]
    second = node.process().stdout.splitlines()
    assert second[1:-1] == [waits.replace("  -         ", "  -     ")]
    assert re.fullmatch(r"1 present, 1 waiting, \d+\.\d s", second[-1])
    assert node.process("--full").stdout.splitlines()[:-1] == [head, waits, row.format("present")]
    assert f"-         {image}  -       -     present" in node.process("-v").stdout.splitlines()


def test_a_json_report_is_one_line_of_the_documents_shape(node: Node) -> None:
    """The document has the fields, the counts and the images of the contract.

    Those present only with -v.
    """
    image = node.cloud.image("de\u202ebian\n", DATA)
    run = node.process("--format", "json")
    assert run.stdout.count("\n") == 1
    assert run.stdout.isascii()
    document = json.loads(run.stdout)
    assert (document["version"], document["dry_run"]) == (1, False)
    assert (document["exit_status"], document["fault"]) == (0, None)
    assert document["held"]["orphans"] == {"count": 0, "bytes": 0}
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
            "reason": "",
        }
    ]
    assert json.loads(node.process("--format", "json").stdout)["images"] == []
    image_of_it = document["images"][0]
    wrongs: tuple[dict[str, Any], ...] = (
        {"version": 2},
        {"more": 1},
        {"started_at": "today"},
        {"counts": {"linked": 1}},
        {"images": [image_of_it | {"outcome": "done"}]},
        {"images": [image_of_it | {"outcome": "refused"}]},
        {"exit_status": 3},
        {"held": {}},
    )
    for wrong in wrongs:
        assert not SCHEMA.is_valid(document | wrong), wrong


def test_quiet_prints_nothing_while_all_is_well(node: Node) -> None:
    """Under -q a pass that fails nothing prints nothing, so that cron sends no mail.

    JSON tells of changes only.
    """
    node.cloud.image("image", DATA)
    node.cloud.create("queued")
    first, second = node.process("-q"), node.run("-q")
    assert [(run.returncode, run.stdout, run.stderr) for run in (first, second)] == [
        (0, "", "")
    ] * 2
    assert node.process("-q", "--format", "json").stdout == ""
    node.cloud.image("another", DATA)
    assert json.loads(node.process("-q", "--format", "json").stdout)["counts"]["linked"] == 1


def test_the_log_file_tells_what_changed_and_where(node: Node, tmp_path: Path) -> None:
    """Each change is one line with its time, level and place.

    A pass in which nothing changes adds none.
    """
    log = tmp_path / "log"
    image = node.cloud.image("two\nlines \x1b[31m", DATA)
    node.process("-q", "--log-file", str(log))
    node.process("-q", "--log-file", str(log))
    line = (
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO run\.py:\d+ linked: {image}"
        rf" \(two\\nlines \\x1b\[31m\) as {node.entry(image).name}\n"
    )
    assert re.fullmatch(line, log.read_text())


def test_a_refused_and_an_occupied_image_are_warnings_in_the_log_file_alone(
    node: Node, tmp_path: Path
) -> None:
    """Each run of cron logs them again, and cron mails nothing; the log is for root alone."""
    log = tmp_path / "log"
    refused, taken = (node.cloud.image(name, DATA) for name in ("refused", "taken"))
    (node.images / refused).write_bytes(b"QFI\xfb\0\0\0\3" + DATA[8:])
    node.entry(taken).write_bytes(b"nova's")
    for _ in range(2):
        run = node.process("-q", "--log-file", str(log))
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    logged = re.findall(r"WARNING run\.py:\d+ (refused|occupied): (\S+)", log.read_text())
    assert sorted(logged) == sorted([("refused", refused), ("occupied", taken)] * 2)
    assert log.stat().st_mode & 0o777 == 0o600


def test_the_log_file_rotates(node: Node, tmp_path: Path) -> None:
    """At 1 MiB the log is set aside, and no more than five old ones are kept."""
    log = tmp_path / "log"
    for number in range(1, 6):
        Path(f"{log}.{number}").write_text(str(number))
    log.write_bytes(b"x" * (1024 * 1024 - 1))
    node.cloud.image("image", DATA)
    node.process("--log-file", str(log))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log",
        *(f"log.{number}" for number in range(1, 6)),
    ]
    assert "linked" in log.read_text()
    assert Path(f"{log}.1").stat().st_size == 1024 * 1024 - 1
    assert Path(f"{log}.5").read_text() == "4"


def test_a_log_that_cannot_be_opened_now_is_told_beside(node: Node) -> None:
    """Nothing can be made below /sys.

    The image is linked all the same, and the status says that something is wrong.
    """
    image = node.cloud.image("image", DATA)
    run = node.run("-q", "--log-file", "/sys/log")
    assert run.returncode == 2
    assert one_line(run.stderr).startswith("ln-images: --log-file /sys/log: ")
    assert node.linked(image)


def test_the_first_line_after_a_log_was_renamed_is_in_a_new_one(tmp_path: Path) -> None:
    """A service may have nothing to log for weeks, and logrotate renames the file meanwhile."""
    code = "import logging, os; from ln_images import logs; logs.to_stderr(); logs.set_up('log', False, False)"
    code += "; os.rename('log', 'log.1'); logging.getLogger('ln_images.any').error('first')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert ["first" in (tmp_path / name).read_text() for name in ("log", "log.1")] == [True, False]


@needs_root
def test_a_failed_image_is_exit_status_1(node: Node, tmp_path: Path) -> None:
    """What the system refuses is that image's failed line, on standard error too, and the status is 1."""
    image = node.cloud.image("image", DATA)
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        images, cache = tmp_path / "images", tmp_path / "cache"
        images.mkdir()
        cache.mkdir()
        (images / image).write_bytes(DATA)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        run = node.process("-q", LN_IMAGES_IMAGES_DIR=str(images), LN_IMAGES_CACHE_DIR=str(cache))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert one_line(run.stderr).endswith(
        f"failed: {image} (image) as {node.entry(image).name}: Read-only file system\n"
    )


def test_the_lock_of_another_run_is_exit_status_75(node: Node) -> None:
    """A run that finds another at work does nothing and says so."""
    node.cloud.image("image", DATA)
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run = node.process()
    os.close(descriptor)
    assert (run.returncode, run.stdout) == (75, "")
    assert f"another run holds the lock on {node.cache}" in one_line(run.stderr)
    assert not node.names()


def test_configuration_beats_the_lock(node: Node) -> None:
    """Where several faults hold, the most severe one decides: 2 before 75."""
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run = node.process(OS_PASSWORD=None)
    os.close(descriptor)
    assert run.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["surplus"], "surplus"),
        (["--mode", "0600"], "everybody must read"),
        (["--timeout", "nan"], "--timeout"),
        (["--owner", "no-such-user"], "no-such-user"),
        (
            ["--images-dir", "/no/such/directory"],
            "--images-dir /no/such/directory: No such file or directory",
        ),
        (
            ["--cache-dir", "/no/such/directory"],
            "--cache-dir /no/such/directory: No such file or directory",
        ),
        (["--log-file", "/no/such/directory/log"], "--log-file /no/such/directory/log"),
    ],
)
def test_wrong_usage_is_exit_status_2(node: Node, arguments: list[str], named: str) -> None:
    """A wrong option is one line that names it, and nothing is done."""
    run = node.process(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert named in one_line(run.stderr)


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        (">/dev/full", "the report cannot be written: No space left on device"),
        (">&-", ""),
        ("2>&-", ""),
        (">&- 2>&-", ""),
        ("| :", "the report cannot be written: Broken pipe"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_report_that_cannot_be_written_takes_nothing_away(
    node: Node, tmp_path: Path, redirection: str, told: str, form: str
) -> None:
    """The image is linked, the status is that of the pass, and the fault is told beside on one line, if anywhere."""
    image = node.cloud.image("image", DATA)
    # The reader of a pipe ends first.
    pause = "sleep 0.5; " if redirection == "| :" else ""
    line = f"{{ {pause}{COMMAND} --format {form}; echo $? >{tmp_path}/status; }} {redirection}"
    run = subprocess.run(
        ["/bin/sh", "-c", line], env=node.environment(), capture_output=True, text=True, check=False
    )
    assert (tmp_path / "status").read_text() == "0\n"
    assert node.linked(image)
    if "2>&-" not in redirection:
        assert run.stderr == (f"ln-images: {told}\n" if told else "")


def test_many_images_are_linked_without_a_standard_error(node: Node, tmp_path: Path) -> None:
    """Where there is none, there is no progress to show."""
    images = node.cloud.add_many(200)
    line = f"{COMMAND} -q 2>&-; echo $? >{tmp_path}/status"
    subprocess.run(["/bin/sh", "-c", line], env=node.environment(), capture_output=True, check=True)
    assert (tmp_path / "status").read_text() == "0\n"
    assert all(map(node.linked, images))


def test_names_of_any_script_are_printed_under_any_locale(node: Node) -> None:
    """A terminal that cannot show a name gets it escaped."""
    node.cloud.image("\N{CJK UNIFIED IDEOGRAPH-4E2D}\u6587", DATA)
    assert "\\u4e2d\\u6587" in node.process(PYTHONIOENCODING="iso-8859-1").stdout
    assert "\u4e2d\u6587" in node.process("--full", PYTHONIOENCODING="utf-8").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_that_waits_for_the_cloud(node: Node, number: int) -> None:
    """Ctrl-C, SIGTERM and SIGHUP end a run with status 130 and one line, also while a server is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [COMMAND],
            env=node.environment(
                OS_AUTH_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/v3", **UNCOVERED
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
        connection.close()
    assert (process.returncode, output) == (130, "")
    assert "interrupted" in one_line(errors)


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler for a signal (proc_pid_status(5))."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_signal_at_any_moment_is_one_line(node: Node) -> None:
    """Whatever is imported or asked when one comes, or two.

    The run ends with 130 and one line, or was done before.
    """
    node.cloud.image("image", DATA)
    numbers = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    for milliseconds in range(0, 301, 20):
        process = subprocess.Popen(
            [COMMAND, "-q", "--dry-run"],
            env=node.environment(**UNCOVERED),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda process=process: catches(process, signal.SIGTERM), "the command to begin")
        time.sleep(milliseconds / 1000)
        for _ in range(2):
            process.send_signal(next(numbers))
        output, errors = process.communicate(timeout=30)
        ended = (process.returncode, output, errors)
        assert ended in ((0, "", ""), (130, "", INTERRUPTED)), milliseconds


UNRAISABLE = """
import os, signal, weakref
from ln_images import __main__, cli

class Thing:
    pass

def main(**_):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: [os.kill(os.getpid(), signal.SIGTERM), sum(range(1000))])
    del thing
    print("goes on")

cli.main = main
__main__.start()
"""


def test_a_signal_in_what_python_calls_when_an_object_dies_ends_the_run() -> None:
    """Python drops an exception that is raised there.

    The run ends all the same, and says so in its one line.
    """
    run = subprocess.run(
        [sys.executable, "-c", UNRAISABLE], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", INTERRUPTED)


AT_THE_END = """
import os, signal, sys
from ln_images import __main__, cli

class Thing:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

# It dies with the modules, after Python has given up its handlers.
sys.modules["thing"] = Thing()
cli.main = lambda **_: sys.exit(0)
__main__.start()
"""


def test_a_signal_at_the_very_end_leaves_the_status_of_what_was_done() -> None:
    """While Python takes itself down the run is over.

    A signal changes neither its status nor what it said.
    """
    run = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_under_nohup_the_end_of_a_session_ends_nothing(node: Node) -> None:
    """Where SIGHUP is ignored when the command starts, as nohup(1) has it, it stays so."""
    image = node.cloud.image("image", DATA)
    process = subprocess.Popen(
        ["nohup", COMMAND, "-q"],
        env=node.environment(**UNCOVERED),
        stdin=subprocess.DEVNULL,
        text=True,
    )
    wait_until(lambda: catches(process, signal.SIGTERM), "the command to begin")
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert node.linked(image)


def test_the_module_takes_nothing_from_the_current_directory(tmp_path: Path) -> None:
    """A click.py where `python -m ln_images` is started, as anybody can put into /tmp, is not run."""
    for module in ("click", "signal", "logging", "wcwidth"):
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


def begin_linking(node: Node) -> subprocess.Popen[str]:
    """Starts the command and returns when it has made its first links."""
    before = len(node.names())
    process = subprocess.Popen(
        [COMMAND, "-q"], env=node.environment(**UNCOVERED), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(
            lambda: len(node.names()) > before + 10 or process.poll() is not None, "the first links"
        )
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def test_killed_at_any_moment_only_right_names_are_there(node: Node) -> None:
    """SIGKILL while thousands are linked leaves names that are right, and the next run makes the rest."""
    images = node.cloud.add_many(2000)
    for delay in (0.0, 0.01, 0.03, 0.1):
        process = begin_linking(node)
        time.sleep(delay)
        process.kill()
        process.communicate()
        by_name = {node.entry(image).name: image for image in images}
        assert all(node.linked(by_name[name]) for name in node.names())
        for name in list(node.names())[:300]:
            (node.cache / name).unlink()
    assert node.process("-q").returncode == 0
    assert all(node.linked(image) for image in images)
    assert all(os.getxattr(node.entry(image), MARK) == image.encode() for image in images)


def test_a_signal_stops_between_images(node: Node) -> None:
    """SIGTERM while thousands are linked ends with status 130.

    Every name there is right and marked.
    """
    images = node.cloud.add_many(2000)
    process = begin_linking(node)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in one_line(errors)
    by_name = {node.entry(image).name: image for image in images}
    assert 10 < len(node.names()) < len(images)
    assert all(node.linked(by_name[name]) for name in node.names())


def test_eight_runs_at_once_do_the_work_once(node: Node, tmp_path: Path) -> None:
    """Of runs started together one has the lock at a time; those that find it held end with 75."""
    images = node.cloud.add_many(500)
    runs = [
        subprocess.Popen(
            [COMMAND, "-q", "--log-file", str(tmp_path / str(number))],
            env=node.environment(),
            stderr=subprocess.DEVNULL,
        )
        for number in range(8)
    ]
    statuses = sorted(run.wait(timeout=120) for run in runs)
    assert set(statuses) == {0, 75}
    assert all(node.linked(image) for image in images)
    logged = "".join((tmp_path / str(number)).read_text() for number in range(8))
    assert logged.count(" linked: ") == len(images)


def test_help_and_version_need_no_cloud() -> None:
    """--help and --version answer without an environment, and without the OpenStack clients."""
    code = (
        "import sys, ln_images.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "sys.exit(any(m.startswith(('keystoneauth1', 'glanceclient', 'oslo')) for m in sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )
    for flag in ("-h", "--help"):
        assert "Usage: ln-images [OPTIONS]" in subprocess.check_output([COMMAND, flag], text=True)
    version = subprocess.check_output([sys.executable, "-m", "ln_images", "--version"], text=True)
    assert version == f"ln-images, version {ln_images.__version__}\n"


def test_an_owner_of_the_options_owns_the_link(node: Node) -> None:
    """--owner takes numbers, and without a group the user's own."""
    image = node.cloud.image("image", DATA)
    if OWNER[0] != os.getuid():
        assert node.process("--owner", "root").returncode == 0
        assert node.entry(image).stat().st_uid == 0
    assert node.process("--owner", f"{OWNER[0]}:{OWNER[1]}").returncode == 0
    assert node.linked(image)
