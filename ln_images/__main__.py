"""``ln-images`` and ``python -m ln_images``."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to
    # write to.
    del sys.path[0]

from ln_images.interrupts import run_command


def start() -> None:
    """Run the command ``ln-images``."""
    run_command("ln-images", "ln_images.cli")


if __name__ == "__main__":
    start()
