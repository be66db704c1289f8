"""``ln-images`` and ``python -m ln_images``: what must hold before anything else is imported."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to write.
    del sys.path[0]

import os
import signal


def start() -> None:
    """Runs the command. Whatever ends it from outside, it ends with status 130 and one line."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Where it is ignored, as under nohup, it stays so.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        from ln_images.cli import main

        main(prog_name="ln-images")
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # Nothing of the interpreter's own end may add to the line, and nothing that was half imported is there.
        try:
            os.write(2, b"ln-images: interrupted: what was linked stays, the next run does the rest\n")
        finally:
            os._exit(130)


if __name__ == "__main__":
    start()
