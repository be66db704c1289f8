"""The textfile for node_exporter, as it is written, and as the command writes it."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ln_images.plan import RAW_COPY, UNKNOWN
from prometheus_client.parser import text_string_to_metric_families

import ln_images
from ln_images.metrics import Textfile
from ln_images.model import Audit, Image, Outcome, Pass, Result, Verdict
from support.cloud import ROOT
from support.compute import Compute, Fault, server
from support.node import REFERENCE, Node

DATA = b"\1" * 5000
ALERTS = ROOT / "docs" / "alerts.yml"


def metrics(path: Path) -> dict[str, float]:
    """Every sample of the file, read by prometheus-client's own parser; labels follow the name."""
    return {
        " ".join((sample.name.removeprefix("ln_images_"), *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def a_pass(*outcomes: Outcome | Verdict, audit: Audit | None = None) -> Pass:
    """A pass with these outcomes, one present image, and bases of each kind."""
    verdicts: Iterable[Verdict] = (
        one if isinstance(one, Verdict) else Verdict(one) for one in outcomes
    )
    return Pass(
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        duration=1.5,
        dry_run=False,
        results=[
            Result(Image(str(n), size=10 + n), str(n), verdict)
            for n, verdict in enumerate(verdicts)
        ],
        settled=["present"],
        held={"orphans": (1, 100), "unmarked": (2, 200), "retired": (3, 300)},
        room=(1000, 500, 50),
        directory=(162, 163),
        audit=audit,
    )


def written(
    path: Path, made: Pass | None, status: int, now: float, prune: bool = False
) -> dict[str, float]:
    """What a new process writes after a pass."""
    Textfile(str(path), prune).write(made, status, now)
    return metrics(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the metrics go, in a directory of their own."""
    return tmp_path / "ln_images.prom"


def test_a_pass_is_told(file: Path) -> None:
    """Outcomes, what is held by kind, what Glance does not know, the room, the times, the directory, the version."""
    skipped, raw = UNKNOWN, RAW_COPY
    told = written(
        file, a_pass(Outcome.LINKED, Outcome.REFUSED, skipped, raw, Outcome.OCCUPIED), 0, 1e9
    )
    assert [
        told[f"images {outcome}"] for outcome in ("linked", "refused", "occupied", "present")
    ] == [1, 1, 2, 1]
    assert {f"images {outcome}" for outcome in Outcome} <= told.keys()
    assert [told[f"held {kind}"] for kind in ("orphans", "unmarked", "retired")] == [1, 2, 3]
    assert [told[f"held_bytes {kind}"] for kind in ("orphans", "unmarked", "retired")] == [
        100,
        200,
        300,
    ]
    assert (told["unknown_files"], told["unknown_bytes"], told["occupied_raw"]) == (1, 12, 1)
    assert (told["cache_size_bytes"], told["cache_free_bytes"], told["cache_free_inodes"]) == (
        1000,
        500,
        50,
    )
    assert (told["cache_directory_uid"], told["cache_directory_gid"]) == (162, 163)
    assert (told["exit_status"], told["pass_duration_seconds"]) == (0, 1.5)
    assert told["last_pass_timestamp_seconds"] == told["last_success_timestamp_seconds"] == 1e9
    assert told[f"build_info {ln_images.__version__}"] == 1


def test_a_set_up_that_never_succeeded_says_so(file: Path) -> None:
    """The time of the last success is 0 from the first, so that its alert fires, also over a file of rubbish."""
    for before in (None, b"\xff{{{", b""):
        if before is not None:
            file.write_bytes(before)
        told = written(file, None, 2, 1e9, prune=True)
        assert (told["exit_status"], told["last_pass_timestamp_seconds"]) == (2, 1e9)
        assert (
            told["last_success_timestamp_seconds"]
            == told["prune_last_success_timestamp_seconds"]
            == 0
        )


def test_a_failed_pass_keeps_the_last_success(file: Path) -> None:
    """A pass that could not be made, and one in which an image failed, do not forget when one succeeded."""
    written(file, a_pass(), 0, 100)
    for now, made, status in ((200, None, 75), (300, a_pass(Outcome.FAILED), 1)):
        told = written(file, made, status, now)
        assert (told["exit_status"], told["last_pass_timestamp_seconds"]) == (status, now)
        assert told["last_success_timestamp_seconds"] == 100


def test_what_the_clean_up_and_the_audit_said_outlives_the_passes_between(file: Path) -> None:
    """A run with --prune, or --verify, keeps figures of its own, which runs without leave alone."""
    pruned = a_pass(Outcome.PRUNED, Outcome.PRUNED, Outcome.RETIRED, Outcome.KEPT)
    written(file, pruned, 0, 100, prune=True)
    written(file, a_pass(Outcome.DAMAGED, audit=Audit(7, 2, 10**9, 1.0)), 1, 200)
    for now in (300, 400):
        told = written(file, a_pass(), 0, now)
    outcomes = ("restored", "retired", "pruned", "kept")
    assert [told[f"prune_{outcome}"] for outcome in outcomes] == [0, 1, 2, 1]
    assert (
        told["prune_last_pass_timestamp_seconds"]
        == told["prune_last_success_timestamp_seconds"]
        == 100
    )
    assert told["prune_exit_status"] == 0
    assert told["verify_last_pass_timestamp_seconds"] == 200
    assert [told[f"verify_{name}"] for name in ("images", "without_checksum", "damaged")] == [
        7,
        2,
        1,
    ]
    told = written(file, a_pass(Outcome.KEPT), 75, 500, prune=True)
    assert (told["prune_exit_status"], told["prune_last_pass_timestamp_seconds"]) == (75, 500)
    assert (
        told["prune_last_success_timestamp_seconds"],
        told["prune_pruned"],
        told["prune_kept"],
    ) == (100, 0, 1)
    assert told["verify_damaged"] == 1


def test_what_is_linked_between_whole_passes_is_added(file: Path) -> None:
    """A narrow pass adds to what the last whole one of the process counted."""
    textfile = Textfile(str(file), False)
    textfile.write(replace(a_pass(Outcome.LINKED), narrow=True), 0, 99)
    assert not file.exists()
    textfile.write(a_pass(Outcome.LINKED), 0, 100)
    textfile.write(replace(a_pass(Outcome.LINKED, Outcome.LINKED), narrow=True), 0, 101)
    told = metrics(file)
    assert (told["images linked"], told["images present"], told["last_pass_timestamp_seconds"]) == (
        3,
        1,
        100,
    )


def test_the_reference_has_every_metric(file: Path) -> None:
    """The table of the reference names each metric, and no other."""
    written(file, a_pass(audit=Audit(1, 1, 1, 1.0)), 0, 1, prune=True)
    table = REFERENCE.partition("## Metrics")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `ln_images_(\w+)", table, re.MULTILINE)
    assert sorted(named) == sorted({name.partition(" ")[0] for name in metrics(file)})


def test_the_alert_rules_are_about_metrics_that_there_are(file: Path) -> None:
    """Every metric in an expression is one that is written, and a rule watches each of what must not stay unseen."""
    written(file, a_pass(audit=Audit(1, 1, 1, 1.0)), 0, 1, prune=True)
    rules = ALERTS.read_text(encoding="utf-8")
    expressions = "\n".join(re.findall(r"expr: (.*)", rules))
    names = set(re.findall(r"ln_images_(\w+)", expressions))
    assert names <= {name.partition(" ")[0] for name in metrics(file)}
    watched = {
        "last_success_timestamp_seconds",
        "occupied_raw",
        "held_bytes",
        "cache_directory_uid",
    }
    assert watched | {"prune_last_success_timestamp_seconds", "verify_damaged"} <= names
    assert set(re.findall(r'outcome="(\w+)"', expressions)) == {
        "failed",
        "damaged",
        "refused",
        "occupied",
    }


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's prometheus"
)
def test_prometheus_takes_the_alert_rules(file: Path, tmp_path: Path) -> None:
    """Promtool reads the rules and the metrics, and the alert of a set-up that never succeeded fires."""
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True)
    written(file, a_pass(audit=Audit(1, 1, 1, 1.0)), 0, 1, prune=True)
    subprocess.run(["promtool", "check", "metrics"], input=file.read_bytes(), check=True)
    case = tmp_path / "case.yml"
    series = {
        "last_success_timestamp_seconds": "0x9",
        'images{outcome="refused"}': "0 1x8",
        "occupied_raw": "0x9",
    }
    series |= {"cache_directory_uid": "42436x4 0x4", "cache_directory_gid": "42436x9"}
    lines = "".join(
        f"      - {{series: 'ln_images_{name}', values: '{values}'}}\n"
        for name, values in series.items()
    )
    fire = {
        "LnImagesNoSuccess": 1,
        "LnImagesRefused": 1,
        "LnImagesDirectoryOwner": 1,
        "LnImagesOccupiedByRawCopies": 0,
    }
    checks = "".join(
        f'      - {{expr: \'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)\', eval_time: 9m,'
        f" exp_samples: [{{value: {value}}}]}}\n"
        for name, value in fire.items()
    )
    case.write_text(
        f"rule_files: ['{ALERTS}']\ntests:\n  - interval: 1m\n    input_series:\n{lines}    promql_expr_test:\n{checks}"
    )
    run = subprocess.run(
        ["promtool", "test", "rules", case], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_collector_can_read_it_whatever_the_umask(file: Path) -> None:
    """Under the strictest umask the file has mode 0644, and nothing but it is left in the directory."""
    umask = os.umask(0o077)
    try:
        written(file, a_pass(), 0, 1)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_passes_good_bad_and_none_as_the_command_tells_them(node: Node, file: Path) -> None:
    """A dry run and one that finds the lock held write nothing.

    One that succeeds and one that cannot be made do.
    """
    arguments = ("-q", "--metrics-file", str(file))
    assert node.run("--dry-run", *arguments).returncode == 0
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert node.run(*arguments).returncode == 75
    os.close(descriptor)
    assert not file.exists()
    gone = node.cloud.image("gone", DATA)
    assert node.run(*arguments).returncode == 0
    node.cloud.delete(gone)
    assert node.run(*arguments).returncode == 0
    before = metrics(file)
    assert (before["held orphans"], before["held_bytes orphans"]) == (1, len(DATA))
    assert 0 < before["cache_free_bytes"] < before["cache_size_bytes"]
    for variables in ({"OS_PASSWORD": "wrong"}, {"LN_IMAGES_CACHE_DIR": "/none"}):
        assert node.run(*arguments, **variables).returncode == 2
        told = metrics(file)
        assert told["exit_status"] == 2
        assert told["last_success_timestamp_seconds"] == before["last_success_timestamp_seconds"]


def test_a_clean_up_as_the_command_tells_it(node: Node, nova: Compute, file: Path) -> None:
    """What one with --prune did stays until the next, whatever passes without say.

    One that fails counts.
    """
    gone = [node.cloud.image(name, DATA) for name in ("gone", "too")]
    assert node.run("-q").returncode == 0
    for image in gone:
        node.cloud.delete(image)
    nova.servers = [server("s", gone[0])]
    prune, path = ("-q", "--prune", "--prune-after", "0s"), ("--metrics-file", str(file))
    assert node.run(*prune, *path).returncode == 0
    before = {name: value for name, value in metrics(file).items() if name.startswith("prune_")}
    assert [
        before[f"prune_{outcome}"] for outcome in ("restored", "retired", "pruned", "kept")
    ] == [0, 1, 0, 1]
    assert (
        before["prune_last_success_timestamp_seconds"]
        == before["prune_last_pass_timestamp_seconds"]
        > 0
    )
    assert node.run("-q", *path).returncode == 0
    told = metrics(file)
    assert {name: told[name] for name in before} == before
    assert (told["images kept"], told["held orphans"], told["held retired"]) == (0, 1, 1)
    nova.faults = {"detail": Fault(503)}
    assert node.run(*prune, *path).returncode == 75
    told = metrics(file)
    assert (told["prune_exit_status"], told["prune_kept"], told["exit_status"]) == (75, 2, 75)
    assert (
        told["prune_last_success_timestamp_seconds"]
        == before["prune_last_success_timestamp_seconds"]
    )
    assert told["prune_last_pass_timestamp_seconds"] > before["prune_last_pass_timestamp_seconds"]


def test_a_file_that_cannot_be_written_is_told_beside(node: Node) -> None:
    """Neither a metrics file nor a log that cannot be written hides what the pass says, nor ends a repeated one."""
    image = node.cloud.image("image", DATA)
    run = node.process(
        "-q",
        "--every",
        "0.2",
        "--for",
        "1.5",
        "--metrics-file",
        "/proc/x.prom",
        "--log-file",
        "/dev/full",
    )
    assert run.returncode == 2
    told = sorted(line.partition(": ")[2].partition(": ")[0] for line in run.stderr.splitlines())
    assert told == ["--log-file /dev/full", "--metrics-file /proc/x.prom"], run.stderr
    assert node.linked(image)


@pytest.mark.parametrize(
    ("module", "option", "extra"),
    [
        ("prometheus_client", "--metrics-file=/tmp/x.prom", "ln-images[metrics]"),
        ("openstack", "--os-cloud=x", "ln-images[clouds]"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(
    node: Node, module: str, option: str, extra: str
) -> None:
    """Without the library of an extra its option says what to install."""
    code = f"import sys; sys.modules[{module!r}] = None; from ln_images.cli import main; main([{option!r}])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=node.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert f"pip install '{extra}'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
