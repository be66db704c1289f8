"""Prints the man page, made from the command itself: ``python tests/man.py > docs/ln-images.1``."""

import re
from collections.abc import Iterator

import click

from conftest import REFERENCE
from ln_images import __version__
from ln_images.cli import main


def roff(text: str) -> str:
    """``text`` as it stands, for roff."""
    return re.sub(r"(?m)^([.'])", r"\\&\1", text.replace("\\", r"\e").replace("-", r"\-"))


def page() -> Iterator[str]:
    """The lines of the page."""
    context = click.Context(main, info_name="ln-images", **main.context_settings)
    summary, _, details = (main.help or "").partition("\n\n")
    yield f'.TH LN-IMAGES 1 "" "ln-images {__version__}"'
    yield f".SH NAME\nln-images \\- {roff(summary)}"
    yield ".SH SYNOPSIS\n.B ln-images\n[OPTIONS]"
    yield f".SH DESCRIPTION\n{roff(' '.join(details.split()))}"
    yield ".SH OPTIONS"
    for option in main.get_params(context):
        names, text = option.get_help_record(context) or ("", "")
        yield f".TP\n.B {roff(names)}\n{roff(text)}"
    yield ".SH EXIT STATUS"
    for status, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", REFERENCE, re.MULTILINE):
        yield f".TP\n.B {status}\n{roff(meaning)}"


if __name__ == "__main__":
    print("\n".join(page()))
