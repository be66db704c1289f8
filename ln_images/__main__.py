"""``ln-images`` and ``python -m ln_images``: what must hold before anything else is imported."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to write.
    del sys.path[0]

import os
import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal that ends the run. Of a KeyboardInterrupt click would make an empty line."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def start() -> None:
    """Runs the command. Whatever ends it from outside, it ends with status 130 and one line."""
    try:
        for number in _ENDING:
            # Where it is ignored, as under nohup, it stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _interrupt)
        from ln_images.cli import main

        main(prog_name="ln-images")
    except (Interrupted, KeyboardInterrupt):
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        # Nothing of the interpreter's own end may add to the line, and nothing that was half imported is there.
        try:
            os.write(2, b"ln-images: interrupted: what was linked stays, the next run does the rest\n")
        finally:
            os._exit(130)


if __name__ == "__main__":
    start()
