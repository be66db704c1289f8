"""``python -m ln_images``: the same command as ``ln-images``."""

from ln_images.cli import main

main(prog_name="ln-images")
