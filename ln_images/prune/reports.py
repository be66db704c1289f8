"""Read the reports in which the compute nodes name the bases that their disks use.

``tools/ln-images-node`` writes them, as ``<host>.json``. Every compute node can write to their
directory, so everything in it is hostile until it is checked.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ln_images.model import ConfigurationError, LnImagesError, TemporaryError
from ln_images.store import NOT_RESPONDING, open_regular

# Longer reports, or more of them, are not read. A base is 43 bytes, so this is some 20,000 of them.
LONGEST_REPORT = 2**20
MOST_REPORTS = 4096
_MOST_BYTES = 64 * 2**20
# ln-images-node makes some 20 checks.
_MOST_CHECKS = 100
# The directory may have other entries, such as files that a node has not finished.
_MOST_ENTRIES = 100_000
# If a report lies further in the future than this, in seconds, a clock is wrong.
CLOCK_TOLERANCE = 300

# compute-1.example.org.json. The file that a node has not finished, .compute-1.json.1f2e3d4c, has
# another form.
_REPORT_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,249})\.json")
_BASE_NAME = re.compile("[0-9a-f]{40}")
_LONGEST_TEXT = 300


class LostBase(NamedTuple):
    """A base that a server's disk uses and that its node does not find in the cache."""

    server: str
    base: str


class WrongCheck(NamedTuple):
    """A check of the node's set-up that failed: its name, what was found, and what to do."""

    name: str
    found: str
    fix: str


class Report(NamedTuple):
    """What one node reported. Times are in seconds since the epoch.

    ``begun`` is when the scan of the node's disks began. It is the earliest of the time in the
    report, the file's mtime and its ctime: a bulk chown renews the ctime, and a node's clock may be
    ahead. ``latest`` is the latest of the three. ``bases`` are in use. ``recent`` has bases that
    were in use not long ago, with the time. ``lost`` are bases in use that the node does not find.
    """

    host: str
    begun: float
    latest: float
    complete: bool
    bases: frozenset[str]
    incomplete_because: str | None = None
    recent: Mapping[str, float] = {}
    lost: Sequence[LostBase] = ()
    wrong: Sequence[WrongCheck] = ()


class Reports(NamedTuple):
    """All reports by host, and for each host whose report cannot be read, the reason.

    ``error`` is why the directory cannot be read at all.
    """

    readable: Mapping[str, Report] = {}
    unreadable: Mapping[str, str] = {}
    error: LnImagesError | None = None

    @property
    def hosts(self) -> set[str]:
        """Return the hosts that have a report, be it readable or not."""
        return {*self.readable, *self.unreadable}

    def users(self, base_name: str, since: float) -> list[str]:
        """Return the hosts whose report names a base as in use, or as in use after ``since``.

        It does not matter how old a report is, nor whether Nova knows its host.
        """
        return sorted(
            host
            for host, report in self.readable.items()
            if base_name in report.bases
            or (base_name in report.recent and report.recent[base_name] > since)
        )

    def names(self) -> set[str]:
        """Return the names of all bases that a report names."""
        return {
            name for report in self.readable.values() for name in (*report.bases, *report.recent)
        }


class _UnreadableError(Exception):
    """A report, or the whole directory, that we do not accept. The text says why."""


def read_reports(path: str) -> Reports:
    """Return the reports in the directory ``path``."""
    try:
        # A node can put a symbolic link in place of the directory. O_NOFOLLOW does not refuse it if
        # its name ends in a slash, so we remove that.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(path.rstrip("/") or path, flags)
    except OSError as error:
        return Reports(error=_directory_error(path, error))
    try:
        return _read_all(directory)
    except OSError as error:
        return Reports(error=_directory_error(path, error))
    except _UnreadableError as error:
        return Reports(
            error=ConfigurationError(f"--reports-dir {path}: {error}; find out what creates them")
        )
    finally:
        os.close(directory)


def _directory_error(path: str, error: OSError) -> LnImagesError:
    what = f"--reports-dir {path}: {error.strerror}"
    if error.errno in NOT_RESPONDING:
        return TemporaryError(f"{what}; its file system does not respond; remount it")
    return ConfigurationError(
        f"{what}; install ln-images-node on every compute node, or name the directory that has"
        " their reports"
    )


def _read_all(directory: int) -> Reports:
    readable: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    bytes_left = _MOST_BYTES
    for host in _list_hosts(directory):
        try:
            with open_regular(f"{host}.json", directory) as descriptor:
                limit = min(LONGEST_REPORT, bytes_left)
                content = _read_content(descriptor, limit)
                bytes_left -= len(content)
                readable[host] = _parse(host, content, os.fstat(descriptor))
        except FileNotFoundError:
            # Somebody has removed it since the directory was listed.
            continue
        except OSError as error:
            unreadable[host] = error.strerror or str(error)
        except _UnreadableError as error:
            unreadable[host] = str(error)
    return Reports(readable, unreadable)


def _list_hosts(directory: int) -> list[str]:
    """Return the hosts that have a report. Raises _UnreadableError if there are too many."""
    hosts = []
    with os.scandir(directory) as entries:
        for number, entry in enumerate(entries):
            match = _REPORT_NAME.fullmatch(entry.name)
            if match is not None:
                hosts.append(match[1])
            if number >= _MOST_ENTRIES or len(hosts) > MOST_REPORTS:
                raise _UnreadableError("it has too many entries")
    return sorted(hosts)


def _read_content(descriptor: int, limit: int) -> bytes:
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _UnreadableError("it is too large, alone or with the reports before it")
    return content


def _parse(host: str, content: bytes, status: os.stat_result) -> Report:
    """Return the report in a file. Raises _UnreadableError if anything in it is not as it must be.

    ``version``, ``host``, ``time``, ``complete`` and ``bases`` are required. Unknown keys are
    ignored.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise _UnreadableError("it is not JSON") from None
    if not isinstance(document, dict):
        raise _UnreadableError("it is not a JSON object")
    if document.get("version") != 1:
        raise _UnreadableError("it is not of version 1; update ln-images on this machine")
    if document.get("host") != host:
        raise _UnreadableError("it names another host than its file does")
    reported_time: Any = document.get("time")
    if not _is_time(reported_time):
        raise _UnreadableError("it has no time")
    complete = document.get("complete")
    if not isinstance(complete, bool):
        raise _UnreadableError('it has no "complete" that is true or false')
    lost = [_lost_base(entry) for entry in _list(document, "lost")]
    if "bases" not in document:
        raise _UnreadableError("it has no bases")
    in_use = [_base_name(base) for base in _list(document, "bases")]
    times = (float(reported_time), status.st_mtime, status.st_ctime)
    return Report(
        host=host,
        begun=min(times),
        latest=max(times),
        complete=complete,
        incomplete_because=_text(document.get("incomplete_because") or ""),
        bases=frozenset([*in_use, *(entry.base for entry in lost)]),
        recent=_recent(document),
        lost=lost,
        wrong=_list_wrong(document),
    )


def _is_time(value: Any) -> bool:
    """Return whether a value is a plausible time in seconds since the epoch."""
    # Python counts true and false as integers. They are no times.
    return type(value) in (int, float) and 0 <= value < 1e11


def _list(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise _UnreadableError(f"its {key} are not a list")
    return value


def _recent(document: Mapping[str, Any]) -> dict[str, float]:
    recent = document.get("recent", {})
    if not isinstance(recent, dict):
        raise _UnreadableError("its recent bases are not an object")
    if not all(_is_time(seen) for seen in recent.values()):
        raise _UnreadableError("a recent base has no time")
    return {_base_name(base): float(seen) for base, seen in recent.items()}


def _list_wrong(document: Mapping[str, Any]) -> list[WrongCheck]:
    checks = _list(document, "checks")
    if len(checks) > _MOST_CHECKS:
        raise _UnreadableError(f"it has more than {_MOST_CHECKS} checks")
    wrong = []
    for check in checks:
        if not isinstance(check, dict):
            raise _UnreadableError("a check is not an object")
        if check.get("state") == "WRONG":
            wrong.append(
                WrongCheck(
                    name=_text(check.get("name", "")),
                    found=_text(check.get("found", "")),
                    fix=_text(check.get("fix", "")),
                )
            )
    return wrong


def _lost_base(entry: Any) -> LostBase:
    if not isinstance(entry, dict):
        raise _UnreadableError("a lost base is not an object")
    return LostBase(server=_text(entry.get("server", "")), base=_base_name(entry.get("base")))


def _base_name(value: Any) -> str:
    if not isinstance(value, str) or not _BASE_NAME.fullmatch(value):
        raise _UnreadableError("it names something that is no base")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnreadableError("something in it is not text")
    return value[:_LONGEST_TEXT]
