"""Write the manual pages, made from the commands' ``--help``: ``python tools/man.py docs``."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import ln_images.cli
import ln_images.prune.cli
import ln_images.verify
from ln_images import __version__

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
COMMANDS: dict[str, click.Command] = {
    "ln-images": ln_images.cli.main,
    "ln-images-prune": ln_images.prune.cli.main,
    "ln-images-verify": ln_images.verify.main,
}


def roff(text: str) -> str:
    """Return ``text`` for roff, which then shows it as it is."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", escaped)


def page(program: str) -> Iterator[str]:
    """Yield the lines of one command's manual page."""
    command = COMMANDS[program]
    context = click.Context(command, info_name=program, **command.context_settings)
    summary, _, details = (command.help or "").partition("\n\n")
    yield f'.TH {program.upper()} 1 "" "ln-images {__version__}"'
    yield f".SH NAME\n{roff(program)} \\- {roff(summary)}"
    yield f".SH SYNOPSIS\n.B {roff(program)}\n[OPTIONS]"
    yield f".SH DESCRIPTION\n{roff(' '.join(details.split()))}"
    yield ".SH OPTIONS"
    for option in command.get_params(context):
        names, text = option.get_help_record(context) or ("", "")
        if names:
            yield f".TP\n.B {roff(names)}\n{roff(text)}"
    yield ".SH EXIT STATUS"
    reference = REFERENCE.read_text(encoding="utf-8")
    for status, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", reference, re.MULTILINE):
        yield f".TP\n.B {status}\n{roff(meaning)}"


if __name__ == "__main__":
    for name in COMMANDS:
        path = Path(sys.argv[1], f"{name}.1")
        path.write_text("\n".join(page(name)) + "\n", encoding="utf-8")
