"""Where log lines go: standard error, and the log file."""

import contextlib
import errno
import logging
import logging.handlers
import os
import stat
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ln_images import report
from ln_images.model import FAULTS, ConfigurationError, Outcome, Reason, Result, Verdict

_OURS = logging.getLogger("ln_images")
LOG = logging.getLogger(__name__)

# What a user of the log file alone wants to read has this attribute: it is in the report as well,
# or each run of cron repeats it.
_FILE_ONLY = "file_only"
# So many refused or occupied images have a line of their own in the log file after one pass.
_MOST_LINES = 5


def set_up(program: str, log_file: str | None, verbose: bool, quiet: bool) -> int:
    """Log warnings and errors to standard error, and everything that changes to ``log_file``.

    Return 2 if the file cannot be opened now, and 0 otherwise. Raises ConfigurationError if it can
    never be opened. An unexpected exception becomes one line on standard error; its traceback goes
    to the file and, with ``verbose``, to standard error.
    """
    # A standard error that cannot be written is no reason for a traceback, nor to stop linking.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    # What other libraries log goes nowhere.
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    _OURS.propagate = False
    _OURS.setLevel(logging.DEBUG)
    _OURS.handlers[:] = [_standard_error(program, verbose, quiet)]
    sys.excepthook = _log_bug
    if log_file is None:
        return 0
    try:
        handler = _LogFile(
            log_file, maxBytes=2**20, backupCount=5, encoding="utf-8", errors="backslashreplace"
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigurationError(
            f"--log-file {log_file}: {error.strerror}; name a file in a directory that exists"
        ) from None
    except OSError as error:
        LOG.error("--log-file %s: %s; name a file that can be written", log_file, error.strerror)
        return ConfigurationError.exit_code
    # It was opened to see that it can be.
    handler.close()
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s"))
    _OURS.addHandler(handler)
    return 0


def _standard_error(program: str, verbose: bool, quiet: bool) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(f"{program}: %(prefix)s%(message)s", with_traceback=verbose))
    handler.setLevel(logging.WARNING)
    if verbose:
        handler.setLevel(logging.DEBUG)
    if quiet:
        handler.setLevel(logging.ERROR)
    handler.addFilter(lambda record: not hasattr(record, _FILE_ONLY))
    return handler


def _log_bug(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Log an exception that nothing expected; Python ends the process with status 1 then."""
    LOG.error(
        "a bug: unexpected %s; report it with its traceback, which -v prints and --log-file keeps",
        kind.__name__,
        exc_info=(kind, error, traceback),
    )


def judge_bug(error: Exception) -> Verdict:
    """Log an unexpected exception with its traceback, and return the image's verdict."""
    LOG.info("unexpected exception", exc_info=error, stacklevel=2)
    return Verdict(
        Outcome.FAILED,
        Reason.BUG,
        f"unexpected {type(error).__name__}; report it with the traceback that -v prints",
    )


def log_problems(results: Sequence[Result]) -> None:
    """Log the problems of a pass: each fault, and the first of those that only the file gets.

    A tenant can have any number of refused images, and each run of cron logs them again.
    """
    for result in results:
        if result.verdict.outcome in FAULTS:
            log_problem(result, stacklevel=3)
    for outcome in (Outcome.REFUSED, Outcome.OCCUPIED):
        others = [result for result in results if result.verdict.outcome is outcome]
        for result in others[:_MOST_LINES]:
            log_problem(result, stacklevel=3)
        if len(others) > _MOST_LINES:
            LOG.warning(
                "%s: %d more images; run ln-images -n to list them",
                outcome,
                len(others) - _MOST_LINES,
                extra={_FILE_ONLY: True},
                stacklevel=2,
            )


def log_problem(result: Result, stacklevel: int = 2) -> None:
    """Log a problem: a fault everywhere, the rest in the log file alone.

    ``stacklevel`` is that of logging: it chooses the function whose place the line has.
    """
    line = report.line(result)
    if result.verdict.outcome in FAULTS:
        LOG.error("%s", line, stacklevel=stacklevel)
    else:
        LOG.warning("%s", line, extra={_FILE_ONLY: True}, stacklevel=stacklevel)


class _OneLine(logging.Formatter):
    """Escapes what comes from images and files, so that no line of it can pass for another.

    A traceback follows on lines of its own, each indented.
    """

    def __init__(self, text: str, with_traceback: bool = True) -> None:
        super().__init__(text)
        self._with_traceback = with_traceback

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and its traceback."""
        is_plain = record.levelno in (logging.INFO, logging.ERROR)
        record.prefix = "" if is_plain else f"{record.levelname.lower()}: "
        record.message = record.getMessage()
        if self.usesTime():
            record.asctime = self.formatTime(record)
        lines = [report.printable(self.formatMessage(record))]
        if record.exc_info and self._with_traceback:
            traceback = self.formatException(record.exc_info).splitlines()
            lines += [f"    {report.printable(line)}" for line in traceback]
        return "\n".join(lines)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file for root alone, because it has the names of private images.

    It is opened anew for each line, since another run, or logrotate, may rename it. A failure is
    reported once, on standard error.
    """

    _has_failed = False

    def _open(self) -> Any:
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=_open_private,
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, and close the file."""
        super().emit(record)
        with contextlib.suppress(OSError):
            self.close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        """Report the first failure."""
        if not self._has_failed:
            self._has_failed = True
            error = sys.exc_info()[1]
            reason = error.strerror if isinstance(error, OSError) else str(error)
            LOG.error(
                "--log-file %s: %s; name a file that can be written", self.baseFilename, reason
            )


def _open_private(path: str, flags: int) -> int:
    """Open a regular file with mode 0600. Raises OSError, without waiting for a FIFO's reader."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor
