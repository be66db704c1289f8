"""A textfile with metrics, for node_exporter's textfile collector."""

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
# What a sample in the file is about: its name, and its labels in alphabetical order.
_Series = tuple[str, tuple[tuple[str, str], ...]]


class Metric(NamedTuple):
    """One value with its labels. ``name`` is without the common beginning ``ln_images_``.

    A metric whose name ends in ``_total`` is a counter: ``value`` is added to what the file has.
    Metrics of one name have the same description and the same labels.
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
            import prometheus_client.core
            import prometheus_client.parser
        except ImportError:
            raise ConfigurationError(
                "--metrics-file needs prometheus-client; run pip install 'ln-images[metrics]'"
            ) from None
        self._client = prometheus_client
        self._path = path
        self._command = command
        # The path may be no valid text.
        self._cache_dir = os.fsencode(cache_dir).decode("utf-8", "backslashreplace")

    def write(
        self, exit_status: int, now: float, duration: float | None, metrics: Iterable[Metric]
    ) -> None:
        """Replace the file after a pass that ended at ``now``, in seconds since the epoch.

        If the pass was not possible, ``duration`` is None, and ``metrics`` has nothing but
        counters. The time of the last success and the counters are kept from the file as it is.
        Raises ConfigurationError if the file cannot be written.
        """
        before = self._read()
        last_success = Metric(
            "last_success_timestamp_seconds",
            "When the last pass ended whose exit status was 0; 0 if there was none.",
            now,
            {"command": self._command.value},
        )
        if exit_status != 0:
            last_success = last_success._replace(value=before.get(self._series(last_success), 0.0))
        own = [
            self._of_command("exit_status", "Exit status of the last pass.", exit_status),
            self._of_command("last_pass_timestamp_seconds", "When the last pass ended.", now),
            last_success,
            self._of_command("build_info", "Version of ln-images.", 1, version=__version__),
        ]
        if duration is not None:
            own.append(
                self._of_command("pass_duration_seconds", "How long the last pass took.", duration)
            )
        self._save(self._list_families([*own, *metrics], before))

    def _of_command(self, name: str, description: str, value: float, **labels: str) -> Metric:
        return Metric(name, description, value, {"command": self._command.value, **labels})

    def _labels(self, metric: Metric) -> dict[str, str]:
        # A name that Nova answers may be no valid text either: JSON allows surrogates.
        labels = {
            name: value.encode("utf-8", "backslashreplace").decode()
            for name, value in metric.labels.items()
        }
        return {"cache_dir": self._cache_dir, **labels}

    def _series(self, metric: Metric) -> _Series:
        return _PREFIX + metric.name, tuple(sorted(self._labels(metric).items()))

    def _list_families(
        self, metrics: Iterable[Metric], before: Mapping[_Series, float]
    ) -> list[Any]:
        """Return the metrics as prometheus-client's families, counters with what they had."""
        core = self._client.core
        families: dict[str, Any] = {}
        for metric in metrics:
            name, labels = _PREFIX + metric.name, self._labels(metric)
            value = metric.value
            is_counter = metric.name.endswith("_total")
            if is_counter:
                value += before.get(self._series(metric), 0.0)
            if name not in families:
                kind = core.CounterMetricFamily if is_counter else core.GaugeMetricFamily
                families[name] = kind(name, metric.description, labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        return list(families.values())

    def _read(self) -> dict[_Series, float]:
        """Return the values in the file as it is; nothing if it is no file of metrics."""
        values: dict[_Series, float] = {}
        path = Path(self._path)
        # A FIFO would be waited for.
        if not path.is_file():
            return values
        try:
            text = path.read_text(encoding="utf-8")
            for family in self._client.parser.text_string_to_metric_families(text):
                for sample in family.samples:
                    values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        except Exception:
            # The parser raises whatever comes first. Counters then begin at 0, as Prometheus
            # expects of a process that starts.
            return {}
        return values

    def _save(self, families: list[Any]) -> None:
        registry = self._client.CollectorRegistry()
        registry.register(_Collector(families))
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


class _Collector:
    """What prometheus-client collects the metrics from."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        """Return the families."""
        return self._families


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


def list_reclaimable_metrics(reclaimable: Reclaimable, name: str) -> list[Metric]:
    """Return the metrics ``<name>`` and ``<name>_bytes``; each command has a name of its own."""
    metrics = []
    for kind, usage in reclaimable.by_kind().items():
        labels = {"kind": kind}
        metrics += [
            Metric(
                name,
                "Bases that belong to no image in the store, by kind.",
                usage.count,
                labels,
            ),
            Metric(f"{name}_bytes", "What those bases have, in bytes.", usage.bytes, labels),
        ]
    return metrics


def _list_owner_metrics(owner: Owner) -> list[Metric]:
    return [
        Metric("cache_directory_uid", "User that owns the cache directory.", owner.uid, {}),
        Metric("cache_directory_gid", "Group that owns the cache directory.", owner.gid, {}),
    ]
