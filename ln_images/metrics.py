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
# By name, what a value says, and the value.
_Values = dict[str, tuple[str, float]]


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
        self._registry = prometheus_client.CollectorRegistry()
        self._images: Any = None

    def write(self, pass_: Pass | None, status: int, now: float) -> None:
        """Tells of a pass that ended with exit ``status`` at ``now``, in seconds since the epoch.

        ``pass_`` is None where it could not be made. Of a narrow one, what it changed is added to the last whole one's.
        The time of the last success is kept across passes that could not be made, and is 0 where there never was one.
        Raises ConfigurationError where the file cannot be written.
        """
        if pass_ is not None and pass_.narrow:
            if self._images is not None:
                for outcome in CHANGES:
                    self._images.labels(outcome.value).inc(report.counts(pass_)[outcome])
                self._save()
            return
        before = self._read()
        self._registry, self._images = self._client.CollectorRegistry(), None
        self._gauge("build_info", "Version of ln-images.", "version").labels(__version__).set(1)
        values = {name: (_KEPT, value) for name, value in before.items() if name.startswith(_OF_OTHER_RUNS)}
        values |= _times("", "the last pass", status, now, before)
        if self._prune:
            values |= _times("prune_", "the last pass with --prune", status, now, before)
        if pass_ is not None:
            values |= self._of_pass(pass_, now)
        for name, (text, value) in values.items():
            self._gauge(name, text).set(value)
        self._save()

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        return self._client.Gauge(_PREFIX + name, text, labels, registry=self._registry)

    def _of_pass(self, pass_: Pass, now: float) -> _Values:
        """The values of a pass; those that have labels are set."""
        found = report.counts(pass_)
        self._images = self._gauge("images", "Images by outcome.", "outcome")
        for outcome in Outcome:
            self._images.labels(outcome.value).set(found[outcome])
        held = self._gauge("held", "Bases in the cache that no image stands behind.", "kind")
        held_bytes = self._gauge("held_bytes", "Bytes that such bases hold.", "kind")
        for kind, (count, size) in pass_.held.items():
            held.labels(kind).set(count)
            held_bytes.labels(kind).set(size)
        unknown = report.unknown(pass_)
        raw = sum(result.verdict == RAW_COPY for result in pass_.results)
        size, free, free_inodes, uid, gid = pass_.cache
        values: _Values = {
            "unknown_files": ("Files in the store that Glance does not know.", len(unknown)),
            "unknown_bytes": ("Bytes of the files in the store that Glance does not know.", sum(unknown)),
            "occupied_raw": ("Images whose name Nova's raw copy has.", raw),
            "pass_duration_seconds": ("How long the last pass took.", pass_.duration),
            "cache_size_bytes": ("Size of the cache's file system.", size),
            "cache_free_bytes": ("Bytes free on the cache's file system.", free),
            "cache_free_inodes": ("Inodes free on the cache's file system.", free_inodes),
            "cache_directory_uid": ("Owner of the cache directory.", uid),
            "cache_directory_gid": ("Group of the cache directory.", gid),
        }
        if self._prune:
            values |= {f"prune_{outcome}": (_KEPT, found[outcome]) for outcome in _CLEAN_UP}
        if pass_.audit is not None:
            values |= {
                "verify_last_pass_timestamp_seconds": (_KEPT, now),
                "verify_images": (_KEPT, pass_.audit.images),
                "verify_without_checksum": (_KEPT, pass_.audit.unverified),
                "verify_damaged": (_KEPT, found[Outcome.DAMAGED]),
            }
        return values

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
        # Written beside and renamed, and readable by the collector's user, whatever umask cron gives.
        umask = os.umask(0o022)
        try:
            self._client.write_to_textfile(self._path, self._registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-file {self._path}: {error.strerror}: name a file in a directory that exists"
            ) from None
        finally:
            os.umask(umask)


def _times(prefix: str, what: str, status: int, now: float, before: Mapping[str, float]) -> _Values:
    success = f"{prefix}last_success_timestamp_seconds"
    return {
        f"{prefix}exit_status": (f"Exit status of {what}.", status),
        f"{prefix}last_pass_timestamp_seconds": (f"When {what} ended.", now),
        success: (f"When {what} ended whose exit status was 0, or 0.", now if status == 0 else before.get(success, 0)),
    }
