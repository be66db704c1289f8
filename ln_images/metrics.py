"""What a monitoring system is told: a textfile for node_exporter's textfile collector."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ln_images import __version__, report
from ln_images.model import CHANGES, ConfigurationError, Outcome, Pass
from ln_images.plan import RAW_COPY

_PREFIX = "ln_images_"
# What only runs with --prune or --verify know: every other run leaves it alone.
_OF_OTHER_RUNS = ("prune_", "verify_")
_KEPT = "Of the last pass with --prune, or with --verify."
_CLEAN_UP = (Outcome.RESTORED, Outcome.RETIRED, Outcome.PRUNED, Outcome.KEPT)


class Textfile:
    """The file at ``path``. Raises ConfigurationError where prometheus-client is missing."""

    def __init__(self, path: str, prune: bool) -> None:
        try:
            import prometheus_client.parser
        except ImportError:
            raise ConfigurationError(
                "--metrics-file needs prometheus-client: pip install 'ln-images[metrics]'"
            ) from None
        self._path, self._prune = path, prune
        self._client = prometheus_client
        self._gauges: dict[str, Any] = {}

    def write(self, pass_: Pass | None, status: int, now: float) -> None:
        """Tells of a pass that ended with exit ``status`` at ``now``, in seconds since the epoch.

        ``pass_`` is None where it could not be made. Of a narrow one, what it changed is added to
        the last whole one's. The time of the last success is kept across passes that could not be
        made, and is 0 where there never was one. Raises ConfigurationError where the file cannot be
        written.
        """
        if pass_ is not None and pass_.narrow:
            if "images" in self._gauges:
                for outcome in CHANGES:
                    self._gauges["images"].labels(outcome.value).inc(report.counts(pass_)[outcome])
                self._save()
            return
        before = self._read()
        self._registry, self._gauges = self._client.CollectorRegistry(), {}
        self._set("build_info", "Version of ln-images.", 1, version=__version__)
        self._set_times("", "the last pass", status, now, before)
        if self._prune:
            self._set_times("prune_", "the last pass with --prune", status, now, before)
        if pass_ is not None:
            self._set_pass(pass_, now)
        for name, value in before.items():
            if name.startswith(_OF_OTHER_RUNS) and name not in self._gauges:
                self._set(name, _KEPT, value)
        self._save()

    def _set(self, name: str, text: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._client.Gauge(
                _PREFIX + name, text, labels, registry=self._registry
            )
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def _set_times(
        self, prefix: str, what: str, status: int, now: float, before: Mapping[str, float]
    ) -> None:
        success = f"{prefix}last_success_timestamp_seconds"
        since = now if status == 0 else before.get(success, 0)
        self._set(f"{prefix}exit_status", f"Exit status of {what}.", status)
        self._set(f"{prefix}last_pass_timestamp_seconds", f"When {what} ended.", now)
        self._set(success, f"When {what} ended whose exit status was 0, or 0.", since)

    def _set_pass(self, pass_: Pass, now: float) -> None:
        found, unknown = report.counts(pass_), report.unknown(pass_)
        for outcome in Outcome:
            self._set("images", "Images by outcome.", found[outcome], outcome=outcome.value)
        for kind, (count, size) in pass_.held.items():
            self._set("held", "Bases in the cache that no image stands behind.", count, kind=kind)
            self._set("held_bytes", "Bytes that such bases hold.", size, kind=kind)
        self._set("unknown_files", "Files in the store that Glance does not know.", len(unknown))
        self._set(
            "unknown_bytes",
            "Bytes of the files in the store that Glance does not know.",
            sum(unknown),
        )
        raw = sum(result.verdict == RAW_COPY for result in pass_.results)
        self._set("occupied_raw", "Images whose name Nova's raw copy has.", raw)
        self._set("pass_duration_seconds", "How long the last pass took.", pass_.duration)
        size, free, free_inodes = pass_.room
        self._set("cache_size_bytes", "Size of the cache's file system.", size)
        self._set("cache_free_bytes", "Bytes free on the cache's file system.", free)
        self._set("cache_free_inodes", "Inodes free on the cache's file system.", free_inodes)
        self._set("cache_directory_uid", "Owner of the cache directory.", pass_.directory[0])
        self._set("cache_directory_gid", "Group of the cache directory.", pass_.directory[1])
        if self._prune:
            for outcome in _CLEAN_UP:
                self._set(f"prune_{outcome}", _KEPT, found[outcome])
        if pass_.audit is not None:
            self._set("verify_last_pass_timestamp_seconds", _KEPT, now)
            self._set("verify_images", _KEPT, pass_.audit.images)
            self._set("verify_without_checksum", _KEPT, pass_.audit.unverified)
            self._set("verify_damaged", _KEPT, found[Outcome.DAMAGED])

    def _read(self) -> dict[str, float]:
        """The values of the file as it is, without their labels and the common beginning of their names."""
        found = {}
        with contextlib.suppress(OSError, ValueError):
            text = Path(self._path).read_text(encoding="utf-8")
            for family in self._client.parser.text_string_to_metric_families(text):
                for sample in family.samples:
                    found[sample.name.removeprefix(_PREFIX)] = sample.value
        return found

    def _save(self) -> None:
        # Written beside and renamed, and readable by the collector's user, whatever umask cron
        # gives.
        umask = os.umask(0o022)
        try:
            self._client.write_to_textfile(self._path, self._registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-file {self._path}: {error.strerror}: name a file in a directory that exists"
            ) from None
        finally:
            os.umask(umask)
