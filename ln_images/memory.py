"""What a process remembers between its passes: small objects with one purpose each."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from ln_images.model import FAULTS, File, Outcome, Reason, Result, Verdict

# For how many seconds a verdict is remembered.
_REMEMBERED_SECONDS = 600
# A file that Glance does not know is queried again in every pass for this many seconds: a replica
# of Glance's database may lag.
_UNKNOWN_SECONDS = 3600


class VerdictCache:
    """The verdicts on files that get no link, as long as the files do not change.

    Only verdicts that nothing but the file or its image can change are remembered: not those of
    images that may become active, and not those of names that are occupied.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._verdicts: dict[str, tuple[File, Result]] = {}
        self._expires_at = 0.0

    def recall(self, files: Mapping[str, File]) -> dict[str, Result]:
        """Return the results of those files, by image id, that have not changed.

        Every ten minutes all are forgotten, because Glance may say something else by then.
        """
        now = self._monotonic()
        if now >= self._expires_at:
            self._verdicts = {}
            self._expires_at = now + _REMEMBERED_SECONDS
        return {
            image_id: result
            for image_id, (file, result) in self._verdicts.items()
            if image_id in files and _is_unchanged(files[image_id], file)
        }

    def remember(self, files: Mapping[str, File], results: Iterable[Result]) -> None:
        """Remember the results of ``files``, which were looked at before they were judged."""
        self._verdicts = {
            result.id: (files[result.id], result)
            for result in results
            if result.id is not None and result.id in files and _is_stable(result, files[result.id])
        }


def _is_unchanged(file: File, before: File) -> bool:
    """Return whether a file is what it was. Our mark on a refused file changes its ctime."""
    return file == before._replace(changed=file.changed)


def _is_stable(result: Result, file: File) -> bool:
    """Return whether a verdict holds for as long as its file does not change."""
    if result.verdict.reason is Reason.UNKNOWN_TO_GLANCE:
        return time.time() - file.modified > _UNKNOWN_SECONDS
    is_active = result.status == "active"
    return is_active and result.verdict.outcome in (Outcome.SKIPPED, Outcome.REFUSED)


class StandingProblems:
    """The problems that somebody should look at, each logged once for as long as it stands."""

    _LOGGED = FAULTS | {Outcome.REFUSED, Outcome.OCCUPIED}

    def __init__(self) -> None:
        self._standing: dict[str, Verdict] = {}

    def list_new(self, results: Iterable[Result], partial: bool) -> list[Result]:
        """Return the problems among ``results`` that were not there before.

        After a partial pass, the problems of all other images still stand.
        """
        results = list(results)
        problems = [result for result in results if result.verdict.outcome in self._LOGGED]
        new = [
            problem
            for problem in problems
            if self._standing.get(problem.cache_name) != problem.verdict
        ]
        standing = {problem.cache_name: problem.verdict for problem in problems}
        if partial:
            covered = {result.cache_name for result in results}
            others = {name: old for name, old in self._standing.items() if name not in covered}
            standing |= others
        self._standing = standing
        return new


class NewRepairs:
    """Remembers which links were repaired, so that each is logged once in a process."""

    def __init__(self) -> None:
        self._repaired: set[str] = set()

    def list_new(self, results: Iterable[Result]) -> list[Result]:
        """Return the results of links that were repaired for the first time in this process."""
        repaired = [result for result in results if result.verdict.outcome is Outcome.REPAIRED]
        new = [result for result in repaired if result.cache_name not in self._repaired]
        self._repaired.update(result.cache_name for result in new)
        return new


class RepeatedRepairs:
    """Notices when a link is repaired again and again."""

    def __init__(self) -> None:
        self._repaired: set[str] = set()
        self._is_reported = False

    def find_first(self, results: Iterable[Result]) -> str | None:
        """Return the cache name of a link that was repaired before, or None.

        A process reports that once: the cause is the same for all links.
        """
        repaired = _cache_names(results, Reason.WRONG_ATTRIBUTES)
        repeated = sorted(repaired & self._repaired)
        self._repaired |= repaired
        if not repeated or self._is_reported:
            return None
        self._is_reported = True
        return repeated[0]


class RemovedLinks:
    """Counts the links that were made again, and notices when that starts."""

    def __init__(self) -> None:
        self._was_removing = False

    def count_if_new(self, results: Iterable[Result]) -> int:
        """Return how many links were made again, or 0 if the pass before had some as well."""
        count = len(_cache_names(results, Reason.LINK_WAS_REMOVED))
        is_new = bool(count) and not self._was_removing
        self._was_removing = bool(count)
        return count if is_new else 0


class LogOnChange:
    """Logs a line that every pass would repeat only if it differs from the one before.

    When there is nothing to log any more, the log file gets a line that says what is over.
    """

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        self._line: str | None = None

    def log(self, line: str | None) -> None:
        """Log ``line``, or that the one before is over if there is nothing to log."""
        if line is None and self._line is not None:
            self._logger.info("over: %s", self._line, stacklevel=2)
        elif line is not None and line != self._line:
            self._logger.log(self._level, "%s", line, stacklevel=2)
        self._line = line


def _cache_names(results: Iterable[Result], reason: Reason) -> set[str]:
    return {result.cache_name for result in results if result.verdict.reason is reason}
