"""Where log lines go: standard error, and the log file."""

import logging
import logging.handlers
import sys
from typing import Any

from ln_images.model import ConfigurationError
from ln_images.report import printable

_OURS = logging.getLogger("ln_images")
_BYTES, _FILES = 1024 * 1024, 5


def to_stderr() -> None:
    """Sends warnings and errors to standard error. What other libraries log and warn of goes nowhere."""
    # A log that cannot be written is no reason for a traceback, nor to stop linking.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    _OURS.propagate = False
    _OURS.setLevel(logging.DEBUG)
    handler = _ToStderr(sys.stderr)
    handler.setLevel(logging.WARNING)
    _OURS.handlers[:] = [handler]


def set_up(log_file: str | None, verbose: bool, quiet: bool) -> None:
    """Says more or less on standard error, and everything that changes in ``log_file``.

    Raises ConfigurationError where the file cannot be opened.
    """
    if verbose or quiet:
        _OURS.handlers[0].setLevel(logging.ERROR if quiet else logging.DEBUG)
    if log_file is None:
        return
    try:
        handler = logging.handlers.RotatingFileHandler(
            log_file, maxBytes=_BYTES, backupCount=_FILES, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise ConfigurationError(
            f"--log-file {log_file}: {error.strerror}: name a file in a directory that exists"
        ) from None
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s"))
    _OURS.addHandler(handler)


class _OneLine(logging.Formatter):
    """Escapes what comes from images and files, so that no line of it can pass for another."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _ToStderr(logging.StreamHandler[Any]):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno in (logging.INFO, logging.ERROR) else f"{record.levelname.lower()}: "
        return printable(f"ln-images: {level}{record.getMessage()}")
