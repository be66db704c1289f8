"""The textfile for node_exporter, as the command writes it. ``tests/unit`` has its contents."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.node import Node

DATA = b"\1" * 5000


def read(path: Path) -> dict[str, float]:
    """Return every sample of the file by name, with the value of the label outcome or kind."""
    samples = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        for sample in family.samples:
            name = sample.name.removeprefix("ln_images_")
            label = sample.labels.get("outcome") or sample.labels.get("kind")
            samples[f"{name} {label}" if label else name] = sample.value
    return samples


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of a metrics file in a directory of its own."""
    return tmp_path / "ln_images.prom"


def test_a_pass_that_changes_nothing_writes_no_metrics(node: Node, file: Path) -> None:
    """A dry run, and a run that another one locks out, leave the file as it is."""
    arguments = ("-q", "--metrics-file", str(file))
    assert node.run("--dry-run", *arguments).returncode == 0
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert node.run(*arguments).returncode == 75
    os.close(descriptor)
    assert not file.exists()


def test_the_figures_of_a_pass_are_written(node: Node, file: Path) -> None:
    """The file has the images by outcome, and the base of an image that was deleted."""
    arguments = ("-q", "--metrics-file", str(file))
    deleted = node.cloud.image("deleted", DATA)
    node.cloud.image("image", DATA)
    assert node.run(*arguments).returncode == 0
    assert read(file)["images linked"] == 2
    node.cloud.delete(deleted)
    assert node.run(*arguments).returncode == 0
    samples = read(file)
    assert samples["images present"] == 1
    assert (samples["reclaimable orphans"], samples["reclaimable_bytes orphans"]) == (1, len(DATA))
    assert samples["last_success_timestamp_seconds"] == samples["last_pass_timestamp_seconds"]
    assert samples["lock_seconds"] > 0
    assert samples["cache_directory_uid"] == node.cache.stat().st_uid


@pytest.mark.parametrize("variables", [{"OS_PASSWORD": "wrong"}, {"LN_IMAGES_IMAGES_DIR": "/none"}])
def test_a_pass_that_is_not_possible_keeps_the_last_success(
    node: Node, file: Path, variables: dict[str, Any]
) -> None:
    """Its exit status is written, without figures about images that could be out of date."""
    node.cloud.image("image", DATA)
    arguments = ("-q", "--metrics-file", str(file))
    assert node.run(*arguments).returncode == 0
    before = read(file)
    assert node.run(*arguments, **variables).returncode == 2
    samples = read(file)
    assert samples["exit_status"] == 2
    assert samples["last_success_timestamp_seconds"] == before["last_success_timestamp_seconds"]
    assert samples["last_pass_timestamp_seconds"] > before["last_pass_timestamp_seconds"]
    assert "images linked" not in samples


def test_links_that_somebody_removed_are_counted_from_run_to_run(node: Node, file: Path) -> None:
    """The counter survives a run without removed links, and one that is not possible."""
    images = [node.cloud.image(name, DATA) for name in ("first", "second")]
    arguments = ("-q", "--metrics-file", str(file))
    assert node.run(*arguments).returncode == 0
    assert read(file)["links_removed_total"] == 0
    for image in images:
        node.entry(image).unlink()
    assert node.run(*arguments).returncode == 0
    assert read(file)["links_removed_total"] == 2
    assert node.run(*arguments).returncode == 0
    assert node.run(*arguments, OS_PASSWORD="wrong").returncode == 2
    assert read(file)["links_removed_total"] == 2
    node.entry(images[0]).unlink()
    assert node.run(*arguments).returncode == 0
    assert read(file)["links_removed_total"] == 3


def test_repeated_passes_write_the_figures_of_the_last_full_one(node: Node, file: Path) -> None:
    """A process of --every replaces the figures of an earlier run by its own."""
    node.cloud.image("image", DATA)
    arguments = ("-q", "--metrics-file", str(file))
    assert node.run(*arguments).returncode == 0
    assert node.run(*arguments, "--every", "0.2", "--for", "0.5").returncode == 0
    samples = read(file)
    assert (samples["images linked"], samples["images present"]) == (0, 1)
    assert samples["exit_status"] == 0


def test_a_file_that_cannot_be_written_is_one_line_and_the_pass_is_made(node: Node) -> None:
    """A metrics file and a log that fail are each reported once, even by repeated passes."""
    image = node.cloud.image("image", DATA)
    paths = ("--metrics-file", "/proc/x.prom", "--log-file", "/dev/full")
    run = node.process("-q", "--every", "0.2", "--for", "1.5", *paths)
    assert run.returncode == 2
    things = sorted(line.split(": ")[1] for line in run.stderr.splitlines())
    assert things == ["--log-file /dev/full", "--metrics-file /proc/x.prom"], run.stderr
    assert node.is_linked(image)


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
    """Without the library of an extra, its option prints one line with what to install."""
    code = (
        f"import sys; sys.modules[{module!r}] = None;"
        f" from ln_images.cli import main; main([{option!r}])"
    )
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
