"""Start a command so that SIGINT, SIGTERM and SIGHUP end it with status 130 and one line.

This module imports nothing but the standard library, because a signal may come while the rest is
still being imported.
"""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATUS = 130


class Interrupted(BaseException):
    """A signal asks the command to end.

    It is not a KeyboardInterrupt, because click turns that into "Aborted!" and status 1.
    """


def run_command(program: str, module: str) -> None:
    """Import ``main`` from ``module``, and call it. This does not return."""

    def exit_interrupted() -> None:
        # Whatever is only half imported is not used any more.
        line = f"{program}: interrupted; what was done is complete, the next run does the rest\n"
        try:
            os.write(2, line.encode())
        finally:
            os._exit(_STATUS)

    def exit_even_if_swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
        # Python swallows an exception that a signal raises inside a destructor.
        if isinstance(unraisable.exc_value, Interrupted):
            exit_interrupted()
        sys.__unraisablehook__(unraisable)

    try:
        sys.unraisablehook = exit_even_if_swallowed
        for number in _SIGNALS:
            # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _interrupt)
        try:
            main = importlib.import_module(module).main
            main(prog_name=program)
        finally:
            # Python removes its handlers before it exits. A signal after that would kill the
            # process without a line.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    except (Interrupted, KeyboardInterrupt):
        exit_interrupted()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back the signals, so that the command ends between two changes and not inside one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _interrupt(*_: object) -> None:
    raise Interrupted
