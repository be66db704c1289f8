"""A textfile with metrics, for node_exporter's textfile collector."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ln_images import __version__, report
from ln_images.model import (
    OUTCOMES,
    Command,
    ConfigurationError,
    Owner,
    Pass,
    Reason,
    Reclaimable,
)

_PREFIX = "ln_images_"


class Metric(NamedTuple):
    """One value with its labels. ``name`` is without the common beginning ``ln_images_``.

    A metric whose name ends in ``_total`` is a counter: ``value`` is added to what the file has.
    """

    name: str
    description: str
    value: float
    labels: Mapping[str, str]


class Textfile:
    """The metrics file of one command and one cache.

    Every metric has the label ``cache_dir``. Those that several commands write have the label
    ``command`` as well: node_exporter rejects files that have the same series.
    """

    def __init__(self, path: str, command: Command, cache_dir: str) -> None:
        """Raise ConfigurationError if prometheus-client is missing."""
        try:
            import prometheus_client.parser
        except ImportError:
            raise ConfigurationError(
                "--metrics-file needs prometheus-client; run pip install 'ln-images[metrics]'"
            ) from None
        self._client = prometheus_client
        self._path = path
        self._command = command
        self._cache_dir = cache_dir

    def write(
        self, exit_status: int, now: float, duration: float | None, metrics: Iterable[Metric]
    ) -> None:
        """Replace the file after a pass that ended at ``now``, in seconds since the epoch.

        ``duration`` is None and ``metrics`` has counters only if the pass was not possible. The
        time of the last success and the counters are kept from the file as it is. Raises
        ConfigurationError if the file cannot be written.
        """
        before = self._read()
        last_success = before.get(f"{_PREFIX}last_success_timestamp_seconds", 0.0)
        if exit_status == 0:
            last_success = now
        own = [
            self._of_command("exit_status", "Exit status of the last pass.", exit_status),
            self._of_command("last_pass_timestamp_seconds", "When the last pass ended.", now),
            self._of_command(
                "last_success_timestamp_seconds",
                "When the last pass ended whose exit status was 0; 0 if there was none.",
                last_success,
            ),
            self._of_command("build_info", "Version of ln-images.", 1, version=__version__),
        ]
        if duration is not None:
            own.append(
                self._of_command("pass_duration_seconds", "How long the last pass took.", duration)
            )
        registry = self._client.CollectorRegistry()
        families: dict[str, Any] = {}
        for metric in [*own, *metrics]:
            self._add(registry, families, metric, before)
        self._save(registry)

    def _of_command(self, name: str, description: str, value: float, **labels: str) -> Metric:
        return Metric(name, description, value, {"command": self._command.value, **labels})

    def _add(
        self,
        registry: Any,
        families: dict[str, Any],
        metric: Metric,
        before: Mapping[str, float],
    ) -> None:
        name = _PREFIX + metric.name
        labels = {"cache_dir": self._cache_dir, **metric.labels}
        is_counter = metric.name.endswith("_total")
        if name not in families:
            kind = self._client.Counter if is_counter else self._client.Gauge
            families[name] = kind(name, metric.description, list(labels), registry=registry)
        child = families[name].labels(**labels)
        if is_counter:
            child.inc(before.get(name, 0.0) + metric.value)
        else:
            child.set(metric.value)

    def _read(self) -> dict[str, float]:
        """Return the values in the file as it is, by name. Those with more labels are not kept."""
        values: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            text = Path(self._path).read_text(encoding="utf-8")
            for family in self._client.parser.text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.labels.get("cache_dir") == self._cache_dir:
                        values[sample.name] = sample.value
        return values

    def _save(self, registry: Any) -> None:
        # prometheus-client writes a file beside it and renames that. The collector's user must be
        # able to read it, whatever umask cron has.
        umask = os.umask(0o022)
        try:
            self._client.write_to_textfile(self._path, registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-file {self._path}: {error.strerror}; name a file in a directory that"
                " exists"
            ) from None
        finally:
            os.umask(umask)


def list_link_metrics(pass_: Pass, counts: Mapping[str, int]) -> list[Metric]:
    """Return the metrics of a full pass of ``ln-images``.

    ``counts`` has the number of images by outcome, those of later partial passes included.
    """
    unknown = report.unknown_file_sizes(pass_)
    raw_copies = [result for result in pass_.results if result.verdict.reason is Reason.RAW_COPY]
    metrics = [
        Metric(
            "images",
            "Images by outcome.",
            counts.get(outcome, 0),
            {"outcome": outcome.value},
        )
        for outcome in OUTCOMES[Command.LINK]
    ]
    metrics += list_reclaimable_metrics(pass_.reclaimable, "reclaimable")
    metrics += [
        Metric("unknown_files", "Files in the store that Glance does not know.", len(unknown), {}),
        Metric("unknown_bytes", "What those files have, in bytes.", sum(unknown), {}),
        Metric("occupied_raw", "Images whose name Nova's raw copy has.", len(raw_copies), {}),
        Metric("lock_seconds", "How long the last pass held the lock.", pass_.lock_seconds, {}),
    ]
    if pass_.directory_owner is not None:
        metrics += _list_owner_metrics(pass_.directory_owner)
    return metrics


def removed_links_metric(count: int) -> Metric:
    """Return the counter of links that were made again, increased by ``count``."""
    return Metric(
        "links_removed_total",
        "Links that something removed and that were made again.",
        count,
        {},
    )


def list_reclaimable_metrics(usage: Reclaimable, name: str) -> list[Metric]:
    """Return the metrics ``<name>`` and ``<name>_bytes``; each command has a name of its own."""
    metrics = []
    for kind, disk_usage in (
        ("orphans", usage.orphans),
        ("unmarked", usage.unmarked),
        ("retired", usage.retired),
    ):
        labels = {"kind": kind}
        metrics.append(
            Metric(
                name,
                "Bases that belong to no image in the store, by kind.",
                disk_usage.count,
                labels,
            )
        )
        metrics.append(
            Metric(f"{name}_bytes", "What those bases have, in bytes.", disk_usage.bytes, labels)
        )
    return metrics


def _list_owner_metrics(owner: Owner) -> list[Metric]:
    return [
        Metric("cache_directory_uid", "User that owns the cache directory.", owner.uid, {}),
        Metric("cache_directory_gid", "Group that owns the cache directory.", owner.gid, {}),
    ]
