"""``ln-images-prune`` and ``python -m ln_images.prune``."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for modules in the current directory first, which others may be able to
    # write to.
    del sys.path[0]

from ln_images.interrupts import run_command


def start() -> None:
    """Run the command ``ln-images-prune``."""
    run_command("ln-images-prune", "ln_images.prune.cli")


if __name__ == "__main__":
    start()
