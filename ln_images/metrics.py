"""What a monitoring system is told: a textfile for node_exporter's textfile collector."""

import contextlib
import os
from pathlib import Path

from ln_images import __version__, report
from ln_images.model import ConfigurationError, Outcome, Pass

_SUCCESS = "ln_images_last_success_timestamp_seconds"


class Textfile:
    """The file at ``path``. Raises ConfigurationError where prometheus-client is missing."""

    def __init__(self, path: str) -> None:
        try:
            import prometheus_client
            import prometheus_client.parser
        except ImportError:
            raise ConfigurationError(
                "--metrics-file needs prometheus-client: pip install 'ln-images[metrics]'"
            ) from None
        self._path = path
        self._client = prometheus_client

    def write(self, made: Pass | None, status: int, now: float) -> None:
        """Tells of a pass that ended with exit ``status`` at ``now``, in seconds since the epoch.

        ``made`` is None where the pass could not be made. The time of the last success is kept across such
        passes. Raises ConfigurationError where the file cannot be written.
        """
        registry = self._client.CollectorRegistry()

        def gauge(name: str, text: str, value: float | None) -> None:
            if value is not None:
                self._client.Gauge(f"ln_images_{name}", text, registry=registry).set(value)

        gauge("exit_status", "Exit status of the last pass.", status)
        gauge("last_pass_timestamp_seconds", "When the last pass ended.", now)
        success = now if status == 0 else self._last_success()
        gauge("last_success_timestamp_seconds", "When the last pass ended whose exit status was 0.", success)
        self._client.Gauge("ln_images_build_info", "Version of ln-images.", ["version"], registry=registry).labels(
            __version__
        ).set(1)
        if made is not None:
            images = self._client.Gauge("ln_images_images", "Images by outcome.", ["outcome"], registry=registry)
            for outcome, count in ((outcome, report.counts(made)[outcome]) for outcome in Outcome):
                images.labels(outcome.value).set(count)
            held = report.held(made)
            gauge("orphans", "Links that hold the blocks of deleted images.", len(held))
            gauge("orphans_bytes", "Bytes held by the links of deleted images.", sum(held))
            gauge("pass_duration_seconds", "How long the last pass took.", made.duration)
            gauge("cache_size_bytes", "Size of the cache's file system.", made.room.size)
            gauge("cache_free_bytes", "Bytes free on the cache's file system.", made.room.free)
            gauge("cache_free_inodes", "Inodes free on the cache's file system.", made.room.free_inodes)
        # Written beside and renamed, and readable by the collector's user, whatever umask cron gives.
        umask = os.umask(0o022)
        try:
            self._client.write_to_textfile(self._path, registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-file {self._path}: {error.strerror}: name a file in a directory that exists"
            ) from None
        finally:
            os.umask(umask)

    def _last_success(self) -> float | None:
        with contextlib.suppress(OSError, ValueError):
            text = Path(self._path).read_text(encoding="utf-8")
            for family in self._client.parser.text_string_to_metric_families(text):
                if family.name == _SUCCESS:
                    return float(family.samples[0].value)
        return None
