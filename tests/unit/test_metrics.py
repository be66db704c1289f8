"""The textfile for node_exporter: what is written, and what is kept from the file before."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import ln_images
from ln_images import report
from ln_images.metrics import Metric, Textfile, list_link_metrics, removed_links_metric
from ln_images.model import (
    OUTCOMES,
    Command,
    ConfigurationError,
    DiskUsage,
    Outcome,
    Owner,
    Pass,
    Reason,
    Reclaimable,
    Result,
    Verdict,
)
from support.cloud import ROOT
from support.node import REFERENCE

CACHE = "/cache"
ALERTS = (ROOT / "docs" / "alerts.yml").read_text(encoding="utf-8")


def read(path: Path) -> dict[str, float]:
    """Return every sample of the file; the values of its labels but cache_dir follow the name."""
    samples = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "cache_dir"]
            samples[" ".join((sample.name.removeprefix("ln_images_"), *labels))] = sample.value
    return samples


def pass_of(*verdicts: Verdict) -> Pass:
    """Return a pass with these verdicts, one present image, and bases of each kind."""
    return Pass(
        command=Command.LINK,
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        duration=1.5,
        dry_run=False,
        results=[
            Result(cache_name=str(number), verdict=verdict, id=str(number), size=10 + number)
            for number, verdict in enumerate(verdicts)
        ],
        present=["present"],
        reclaimable=Reclaimable(
            orphans=DiskUsage(count=1, bytes=100),
            unmarked=DiskUsage(count=2, bytes=200),
            retired=DiskUsage(count=3, bytes=300),
        ),
        directory_owner=Owner(162, 163),
        lock_seconds=0.5,
    )


def metrics_of(pass_: Pass, removed: int = 0) -> list[Metric]:
    """Return the metrics of a pass, as the command writes them."""
    counts = {outcome.value: count for outcome, count in report.counts(pass_).items()}
    return [*list_link_metrics(pass_, counts), removed_links_metric(removed)]


def write(
    path: Path,
    status: int = 0,
    now: float = 1e9,
    metrics: Iterable[Metric] = (),
    command: Command = Command.LINK,
    cache_dir: str = CACHE,
) -> dict[str, float]:
    """Write the file as a new process does, and return its samples."""
    Textfile(str(path), command, cache_dir).write(status, now, 1.5, metrics)
    return read(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of a metrics file in a directory of its own."""
    return tmp_path / "ln_images.prom"


def test_a_pass_is_written(file: Path) -> None:
    """The file has the outcomes, reclaimable bases, unknown files, times, owner and version."""
    pass_ = pass_of(
        Verdict(Outcome.LINKED, Reason.NO_LINK_YET),
        Verdict(Outcome.REFUSED, Reason.OTHER_CONTENT),
        Verdict(Outcome.SKIPPED, Reason.UNKNOWN_TO_GLANCE),
        Verdict(Outcome.OCCUPIED, Reason.RAW_COPY),
        Verdict(Outcome.OCCUPIED, Reason.OTHER_FILE),
    )
    samples = write(file, metrics=metrics_of(pass_, removed=3))
    expected: dict[str, float] = {
        "images linked": 1,
        "images repaired": 0,
        "images present": 1,
        "images waiting": 0,
        "images skipped": 1,
        "images refused": 1,
        "images damaged": 0,
        "images occupied": 2,
        "images failed": 0,
        "reclaimable orphans": 1,
        "reclaimable unmarked": 2,
        "reclaimable retired": 3,
        "reclaimable_bytes orphans": 100,
        "reclaimable_bytes unmarked": 200,
        "reclaimable_bytes retired": 300,
        "unknown_files": 1,
        "unknown_bytes": 12,
        "occupied_raw": 1,
        "lock_seconds": 0.5,
        "cache_directory_uid": 162,
        "cache_directory_gid": 163,
        "links_removed_total": 3,
        "exit_status ln-images": 0,
        "pass_duration_seconds ln-images": 1.5,
        "last_pass_timestamp_seconds ln-images": 1e9,
        "last_success_timestamp_seconds ln-images": 1e9,
        f"build_info ln-images {ln_images.__version__}": 1,
    }
    assert samples == expected


def test_every_series_names_the_cache(file: Path) -> None:
    """Every sample has the label cache_dir, whatever characters the path has."""
    path = 'a "b"\\c\nd/\udcff'
    write(file, metrics=metrics_of(pass_of()), cache_dir=path)
    families = text_string_to_metric_families(file.read_text(encoding="utf-8"))
    caches = {sample.labels.get("cache_dir") for family in families for sample in family.samples}
    assert caches == {'a "b"\\c\nd/\\xff'}


def test_no_two_commands_write_the_same_series(tmp_path: Path) -> None:
    """node_exporter rejects a scrape in which two files have one series."""
    all_series: list[str] = []
    for command in Command:
        path = tmp_path / f"{command}.prom"
        write(
            path, metrics=metrics_of(pass_of()) if command is Command.LINK else (), command=command
        )
        lines = path.read_text(encoding="utf-8").splitlines()
        all_series += [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(all_series) == len(set(all_series))


def test_a_label_that_is_no_valid_text_is_escaped(tmp_path: Path) -> None:
    """JSON can have half of a character in the name of a host."""
    path = tmp_path / "metrics.prom"
    metric = Metric("node_wrong", "Checks that are wrong.", 2, {"host": 'a\ud800\n"b'})
    Textfile(str(path), Command.PRUNE, CACHE).write(0, 1.0, 1.0, [metric])
    assert read(path)['node_wrong a\\ud800\n"b'] == 2


@pytest.mark.parametrize("content", [None, b"\xff{{{", b"", b"a{ 1\n", b"ln_images_x{a=} y\n"])
def test_without_any_success_its_time_is_0(file: Path, content: bytes | None) -> None:
    """The alert about the last success fires from the first pass on, even over a broken file."""
    if content is not None:
        file.write_bytes(content)
    samples = write(file, status=2)
    assert samples["exit_status ln-images"] == 2
    assert samples["last_success_timestamp_seconds ln-images"] == 0


@given(
    content=st.one_of(
        st.binary(), st.text().map(lambda text: f"ln_images_a{text}".encode("utf-8", "replace"))
    )
)
def test_whatever_the_file_has_it_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """A file that is no file of metrics costs the counters, and never the pass."""
    path = tmp_path_factory.getbasetemp() / "any.prom"
    path.write_bytes(content)
    assert write(path)["exit_status ln-images"] == 0


def test_a_fifo_is_not_waited_for(file: Path) -> None:
    """A FIFO under the name of the file is replaced, and not opened."""
    os.mkfifo(file)
    assert write(file)["exit_status ln-images"] == 0


def test_a_pass_that_fails_keeps_the_last_success(file: Path) -> None:
    """A pass that was not possible, and one in which an image failed, do not forget the success."""
    write(file, now=100)
    for now, status in ((200, 75), (300, 1)):
        samples = write(file, status=status, now=now)
        assert samples["exit_status ln-images"] == status
        assert samples["last_pass_timestamp_seconds ln-images"] == now
        assert samples["last_success_timestamp_seconds ln-images"] == 100


def test_a_pass_that_was_not_possible_has_no_figures(file: Path) -> None:
    """Without a pass there is no duration, and no number of images that could be out of date."""
    write(file, metrics=metrics_of(pass_of()))
    Textfile(str(file), Command.LINK, CACHE).write(75, 2e9, None, [removed_links_metric(0)])
    assert {name.partition(" ")[0] for name in read(file)} == {
        "exit_status",
        "last_pass_timestamp_seconds",
        "last_success_timestamp_seconds",
        "build_info",
        "links_removed_total",
    }


def test_the_counter_of_removed_links_never_falls(file: Path) -> None:
    """Each run adds to the counter, and so does one whose pass was not possible."""
    for removed, expected in ((0, 0), (2, 2), (0, 2), (1, 3)):
        samples = write(file, metrics=[removed_links_metric(removed)])
        assert samples["links_removed_total"] == expected
    textfile = Textfile(str(file), Command.LINK, CACHE)
    for _ in range(2):
        textfile.write(75, 2e9, None, [removed_links_metric(1)])
    assert read(file)["links_removed_total"] == 5


def test_a_counter_belongs_to_its_labels(file: Path) -> None:
    """Counters of another cache, command or label are not added."""
    counters = [
        Metric("x_total", "X.", value, {"host": host}) for host, value in (("a", 1), ("b", 5))
    ]
    write(file, metrics=counters)
    samples = write(file, metrics=counters)
    assert (samples["x_total a"], samples["x_total b"]) == (2, 10)
    assert write(file, metrics=counters, cache_dir="/other")["x_total a"] == 1
    samples = write(file, status=1, command=Command.PRUNE)
    assert samples["last_success_timestamp_seconds ln-images-prune"] == 0


def test_the_collector_can_read_the_file_whatever_the_umask(file: Path) -> None:
    """The file has mode 0644, nothing else is left in its directory, and the umask is unchanged."""
    umask = os.umask(0o077)
    try:
        write(file)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    """The message has the path, the kernel's words and what to do."""
    with pytest.raises(ConfigurationError, match=r"No such file.*; name a file in a directory"):
        write(tmp_path / "none" / "x.prom")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigurationError, match="Is a directory"):
        write(tmp_path / "directory")


def reference_rows() -> dict[str, str]:
    """Return the labels of each metric in the table of the reference."""
    section = REFERENCE.partition("\n## Metrics")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `ln_images_(\w+)\{([\w, ]+)\}", section, re.MULTILINE))


def test_the_reference_has_every_metric_with_its_labels(file: Path) -> None:
    """The table of the reference names each metric, with exactly the labels that it has."""
    write(file, metrics=metrics_of(pass_of()))
    families = text_string_to_metric_families(file.read_text(encoding="utf-8"))
    labels = {
        sample.name.removeprefix("ln_images_"): ", ".join(sample.labels)
        for family in families
        for sample in family.samples
    }
    rows = reference_rows()
    assert {name: rows.get(name) for name in labels} == labels


def expressions() -> str:
    """Return the expressions of all alert rules."""
    return "\n".join(re.findall(r"expr: (.*)", ALERTS))


def test_the_alert_rules_are_about_metrics_that_exist() -> None:
    """Every metric of ours in an expression is in the reference, with every label that it names."""
    rows = reference_rows()
    for name, selector in re.findall(r"ln_images_(\w+)(\{[^}]*\})?", expressions()):
        assert name in rows
        assert set(re.findall(r"(\w+)[=!]", selector)) <= set(rows[name].split(", ")), name
    outcomes = set(re.findall(r'ln_images_images\{outcome="(\w+)"', expressions()))
    assert outcomes <= {outcome.value for outcome in OUTCOMES[Command.LINK]}


@pytest.mark.parametrize(
    "watched",
    [
        'ln_images_last_success_timestamp_seconds{command="ln-images"}',
        'ln_images_images{outcome="failed"}',
        'ln_images_images{outcome="damaged"}',
        'ln_images_images{outcome="refused"}',
        'ln_images_images{outcome="occupied"}',
        'ln_images_images{outcome="waiting"}',
        "ln_images_occupied_raw",
        "ln_images_links_removed_total",
        "ln_images_unknown_files",
        "ln_images_reclaimable_bytes",
        "ln_images_cache_directory_uid",
        "ln_images_cache_directory_gid",
        "node_filesystem_avail_bytes",
        "node_filesystem_files_free",
    ],
)
def test_an_alert_rule_watches_what_must_not_stay_unseen(watched: str) -> None:
    """Each of these has an alert rule."""
    assert watched in expressions()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's prometheus")
def test_prometheus_accepts_the_metrics_and_the_alert_rules(file: Path, tmp_path: Path) -> None:
    """Promtool accepts both, and the alert rules fire and stay silent when they should."""
    subprocess.run(["promtool", "check", "rules", ROOT / "docs" / "alerts.yml"], check=True)
    write(file, metrics=metrics_of(pass_of()))
    subprocess.run(["promtool", "check", "metrics"], input=file.read_bytes(), check=True)
    series: dict[str, Any] = {
        'last_success_timestamp_seconds{command="ln-images"}': "0x120",
        'images{outcome="refused"}': "0 1x119",
        'images{outcome="waiting"}': "1x50 0 1x70",
        "occupied_raw": "0x120",
        "unknown_files": "1x120",
        "links_removed_total": "0x60 3x60",
        "cache_directory_uid": "42436x4 0x116",
        "cache_directory_gid": "42436x120",
    }
    fires_at = {
        "LnImagesNoSuccess": "9m",
        "LnImagesRefused": "9m",
        "LnImagesDirectoryOwner": "9m",
        "LnImagesUnknownFiles": "61m",
        "LnImagesLinksRemoved": "62m",
    }
    silent_at = {
        "LnImagesOccupiedByRawCopies": "9m",
        "LnImagesUnknownFiles": "59m",
        "LnImagesLinksRemoved": "59m",
        "LnImagesWaiting": "100m",
    }
    lines = ["rule_files:", f"  - {ROOT / 'docs' / 'alerts.yml'}", "tests:", "  - interval: 1m"]
    lines.append("    input_series:")
    for name, values in series.items():
        lines.append(f"      - {{series: 'ln_images_{name}', values: '{values}'}}")
    lines.append("    promql_expr_test:")
    for alerts, value in ((fires_at, 1), (silent_at, 0)):
        for alert, at in alerts.items():
            query = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
            lines.append(f"      - expr: 'count({query}) or vector(0)'")
            lines.append(f"        eval_time: {at}")
            lines.append(f"        exp_samples: [{{value: {value}}}]")
    case = tmp_path / "case.yml"
    case.write_text("\n".join(lines), encoding="utf-8")
    run = subprocess.run(
        ["promtool", "test", "rules", case], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
