"""The textfile for node_exporter, as the command writes it."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import ln_images
from conftest import COMMAND, Node

DATA = b"\1" * 5000


def metrics(path: Path) -> dict[str, float]:
    """Every sample of the file, read by prometheus-client's own parser; labels follow the name."""
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


@pytest.fixture
def file(node: Node) -> Path:
    """Where the metrics go, in a directory of their own."""
    directory = node.cache.with_suffix(".metrics")
    directory.mkdir()
    return directory / "ln_images.prom"


def test_a_pass_is_told(node: Node, file: Path) -> None:
    """Images by outcome, what deleted ones hold, the room, the times and the version, in units of bytes and seconds."""
    gone = node.cloud.image("gone", DATA)
    node.run("-q")
    node.cloud.delete(gone)
    node.cloud.image("image", DATA)
    node.cloud.create("queued")
    assert node.run("-q", "--metrics-file", str(file)).returncode == 0
    told = metrics(file)
    assert told["ln_images_images linked"] == 1
    assert told["ln_images_images waiting"] == 1
    assert told["ln_images_images failed"] == 0
    assert (told["ln_images_orphans"], told["ln_images_orphans_bytes"]) == (1, len(DATA))
    assert 0 < told["ln_images_cache_free_bytes"] < told["ln_images_cache_size_bytes"]
    assert told["ln_images_cache_free_inodes"] > 0
    assert 0 < told["ln_images_pass_duration_seconds"] < 60
    assert told["ln_images_exit_status"] == 0
    assert told["ln_images_last_pass_timestamp_seconds"] == told["ln_images_last_success_timestamp_seconds"] > 1e9
    assert told[f"ln_images_build_info {ln_images.__version__}"] == 1


@pytest.mark.parametrize(
    ("variables", "status"), [({"OS_PASSWORD": "wrong"}, 2), ({"LN_IMAGES_CACHE_DIR": "/none"}, 2)]
)
def test_a_failed_pass_is_told_and_keeps_the_last_success(
    node: Node, file: Path, variables: dict[str, str], status: int
) -> None:
    """A pass that cannot be made writes its exit status and time, and does not forget the last success."""
    node.run("-q", "--metrics-file", str(file))
    before = metrics(file)
    assert node.run("-q", "--metrics-file", str(file), **variables).returncode == status
    told = metrics(file)
    assert told["ln_images_exit_status"] == status
    assert told["ln_images_last_pass_timestamp_seconds"] > before["ln_images_last_pass_timestamp_seconds"]
    assert told["ln_images_last_success_timestamp_seconds"] == before["ln_images_last_success_timestamp_seconds"]


def test_a_file_of_rubbish_is_written_anew(node: Node, file: Path) -> None:
    """A file that cannot be read is no hindrance: without a last success there is none to tell."""
    file.write_bytes(b"\xff{{{")
    assert node.run("-q", "--metrics-file", str(file), OS_PASSWORD="wrong").returncode == 2
    assert "ln_images_last_success_timestamp_seconds" not in metrics(file)


def test_the_collector_can_read_it_whatever_the_umask(node: Node, file: Path) -> None:
    """Under the strictest umask the file has mode 0644, and nothing but it is left in the directory."""
    command = ["/bin/sh", "-c", 'umask 077; exec "$0" "$@"', str(COMMAND), "-q", "--metrics-file", str(file)]
    subprocess.run(command, env=node.environment(), check=True)
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_a_dry_run_and_a_run_that_finds_another_write_nothing(node: Node, file: Path) -> None:
    """A dry run touches nothing; a run that finds the lock held leaves the file to the one at work."""
    assert node.run("-q", "--dry-run", "--metrics-file", str(file)).returncode == 0
    descriptor = os.open(node.cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert node.run("-q", "--metrics-file", str(file)).returncode == 75
    os.close(descriptor)
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_named(node: Node) -> None:
    """The pass is made all the same, and the error names the file."""
    image = node.cloud.image("image", DATA)
    run = node.run("-q", "--metrics-file", "/no/such/directory/x.prom")
    assert run.returncode == 2
    assert run.stderr.startswith("ln-images: --metrics-file /no/such/directory/x.prom: No such file or directory")
    assert node.linked(image)


@pytest.mark.parametrize(
    ("module", "option", "extra"),
    [
        ("prometheus_client", "--metrics-file=/tmp/x.prom", "ln-images[metrics]"),
        ("openstack", "--os-cloud=x", "ln-images[clouds]"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(node: Node, module: str, option: str, extra: str) -> None:
    """Without the library of an extra its option says what to install."""
    code = f"import sys; sys.modules[{module!r}] = None; from ln_images.cli import main; main([{option!r}])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=node.environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert f"pip install '{extra}'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
