"""Start a command so that SIGINT, SIGTERM and SIGHUP end it with status 130 and one line.

The handler of these signals ends the process itself. An exception would not do, because Python
swallows one that is raised inside a destructor or a callback. So no ``finally`` runs either, and
what must not be cut off half-way is inside :func:`held_back`. The kernel releases the lock.

This module imports nothing but the standard library, because a signal may arrive while the rest is
still being imported.
"""

import contextlib
import importlib
import os
import signal
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATUS = 130
# A progress bar hides the cursor of a terminal. This shows it again.
_SHOW_CURSOR = "\x1b[?25h\n"


def run_command(program: str, module: str) -> None:
    """Import ``main`` from ``module``, and call it. This does not return."""

    def end_process(*_: object) -> None:
        # From now on no second signal can print the line again.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        line = f"{program}: interrupted; what was done is complete, the next run does the rest\n"
        if os.isatty(2):
            line = _SHOW_CURSOR + line
        try:
            os.write(2, line.encode())
        finally:
            os._exit(_STATUS)

    for number in _SIGNALS:
        # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_process)
    try:
        importlib.import_module(module).main(prog_name=program)
    finally:
        # Python removes its handlers before it exits. A signal after that would kill the process
        # without a line.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back the signals, so that the command ends between two changes and not inside one."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
