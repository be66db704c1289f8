"""Start ``ln-images``, which is also ``python -m ln_images``, and ``ln-images-verify``."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to
    # write to.
    del sys.path[0]

from ln_images.interrupts import run_command


def start() -> None:
    """Run the command ``ln-images``."""
    run_command("ln-images", "ln_images.cli")


def start_verify() -> None:
    """Run the command ``ln-images-verify``."""
    run_command("ln-images-verify", "ln_images.verify")


if __name__ == "__main__":
    start()
