"""Where log lines go: standard error, and the log file."""

import contextlib
import logging
import logging.handlers
import os
import sys
from typing import Any

from ln_images.model import ConfigurationError
from ln_images.report import printable

_OURS = logging.getLogger("ln_images")
LOG = logging.getLogger(__name__)


def to_stderr() -> None:
    """Sends warnings and errors to standard error.

    What other libraries log and warn of goes nowhere.
    """
    # A standard error that cannot be written is no reason for a traceback, nor to stop linking.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    _OURS.propagate = False
    _OURS.setLevel(logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("ln-images: %(prefix)s%(message)s"))
    handler.setLevel(logging.WARNING)
    # What stands in the report, or is repeated by each run of cron, is for the file.
    handler.addFilter(lambda record: not hasattr(record, "file_only"))
    _OURS.handlers[:] = [handler]


def set_up(log_file: str | None, verbose: bool, quiet: bool) -> int:
    """Says more or less on standard error, and everything that changes in ``log_file``.

    Returns 2 where the file cannot be opened now, and 0 otherwise. Raises ConfigurationError where
    it never can.
    """
    if verbose or quiet:
        _OURS.handlers[0].setLevel(logging.ERROR if quiet else logging.DEBUG)
    if log_file is None:
        return 0
    try:
        handler = _File(
            log_file, maxBytes=2**20, backupCount=5, encoding="utf-8", errors="backslashreplace"
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigurationError(
            f"--log-file {log_file}: {error.strerror}: name a file in a directory that exists"
        ) from None
    except OSError as error:
        LOG.error("--log-file %s: %s: nothing is logged there", log_file, error.strerror)
        return ConfigurationError.exit_status
    # It was opened to see that it can be.
    handler.close()
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s"))
    _OURS.addHandler(handler)
    return 0


class _OneLine(logging.Formatter):
    """Escapes what comes from images and files, so that no line of it can pass for another."""

    def format(self, record: logging.LogRecord) -> str:
        named = record.levelno not in (logging.INFO, logging.ERROR)
        record.prefix = f"{record.levelname.lower()}: " if named else ""
        return printable(super().format(record))


class _File(logging.handlers.RotatingFileHandler):
    """For root alone, since it has the names of private images.

    A fault of it is told once, on standard error.
    """

    told = False

    def _open(self) -> Any:
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=_private,
        )

    def emit(self, record: logging.LogRecord) -> None:
        # Opened anew for each line: another run, or logrotate, may give the file another name.
        super().emit(record)
        with contextlib.suppress(OSError):
            self.close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        if not self.told:
            self.told = True
            LOG.error(
                "--log-file %s: %s: nothing is logged there", self.baseFilename, sys.exc_info()[1]
            )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
