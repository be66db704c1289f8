"""``ln-images`` and ``python -m ln_images``: what must hold before anything else is imported."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to
    # write.
    del sys.path[0]

import os
import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal that ends the run. Of a KeyboardInterrupt click would make an empty line."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def _end() -> None:
    # Nothing of the interpreter's own end may add to the line, and nothing that was half imported
    # is there.
    try:
        os.write(2, b"ln-images: interrupted: what was linked stays, the next run does the rest\n")
    finally:
        os._exit(130)


def _dropped(dropped: "sys.UnraisableHookArgs") -> None:
    """Ends the run also where Python drops an exception: in what is called when an object dies."""
    if isinstance(dropped.exc_value, Interrupted):
        _end()
    sys.__unraisablehook__(dropped)


def start() -> None:
    """Runs the command. Whatever ends it from outside, it ends with status 130 and one line."""
    try:
        sys.unraisablehook = _dropped
        for number in _ENDING:
            # Where it is ignored, as under nohup, it stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _interrupt)
        try:
            from ln_images.cli import main

            main(prog_name="ln-images")
        finally:
            # Python gives up its handlers before it ends, and a signal would kill it without a
            # word.
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    except (Interrupted, KeyboardInterrupt):
        _end()


if __name__ == "__main__":
    start()
