"""The options of every command: what they accept, and what they refuse. No pass is run."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click
import pytest

from ln_images.cli import main
from ln_images.model import DISK_FORMATS, Command, Owner
from ln_images.options import CommonOptions, Duration
from support.node import MODULES

# The variables of each command begin with this.
PREFIXES = {
    Command.LINK: "LN_IMAGES_",
    Command.PRUNE: "LN_IMAGES_PRUNE_",
    Command.VERIFY: "LN_IMAGES_VERIFY_",
}
# Two commands must not write the same file, so each has variables of its own for these.
FILES = ("LOG_FILE", "METRICS_FILE")


def list_commands() -> Iterator[tuple[Command, click.Command]]:
    """Yield each command that exists, with its function."""
    for command, module in MODULES.items():
        package = module.rpartition(".")[0]
        if importlib.util.find_spec(package) and importlib.util.find_spec(module):
            yield command, importlib.import_module(module).main


COMMANDS = dict(list_commands())


@contextmanager
def context_of(*arguments: str) -> Iterator[click.Context]:
    """Parse the arguments of ``ln-images``, with an owner that every machine has."""
    with main.make_context("ln-images", ["--owner", "0:0", *arguments]) as context:
        yield context


def parse(*arguments: str) -> dict[str, Any]:
    """Return the values of the options of ``ln-images``."""
    with context_of(*arguments) as context:
        return context.params


def refusal(*arguments: str) -> str:
    """Return the message with which ``ln-images`` refuses its arguments."""
    with pytest.raises(click.UsageError) as error, context_of(*arguments) as context:
        main.invoke(context)
    return error.value.format_message()


@pytest.mark.parametrize("option", ["--timeout", "--every", "--for"])
@pytest.mark.parametrize(
    "value", ["nan", "NaN", "-nan", "inf", "-inf", "1e300", "86401", "0", "-1", "soon", ""]
)
def test_a_number_of_seconds_is_more_than_none_and_at_most_a_day(option: str, value: str) -> None:
    """A value that is no number, or passes every comparison as nan does, is refused."""
    assert option in refusal(f"{option}={value}")


@pytest.mark.parametrize(("value", "seconds"), [("1e-3", 0.001), ("30", 30), ("86400", 86400)])
def test_seconds_may_have_a_fraction(value: str, seconds: float) -> None:
    """Every number up to a day is accepted as it is."""
    values = parse("--every", value, "--for", value, "--timeout", value)
    assert (values["every"], values["for_seconds"], values["timeout"]) == (seconds,) * 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), ("0s", 0), (5, 5)],
)
def test_a_duration_has_a_unit(value: str | int, seconds: int) -> None:
    """Whole seconds, minutes, hours and days are accepted, and so is a default in seconds."""
    assert Duration().convert(value, None, None) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "24",
        "1.5h",
        "-1h",
        "h",
        "1 h",
        "1w",
        "",
        "1h30m",
        "1H",
        "\N{SUPERSCRIPT TWO}h",
        "\N{ARABIC-INDIC DIGIT ONE}h",
        "1h\n",
        "9999999999s",
    ],
)
def test_a_duration_without_a_unit_is_refused(value: str) -> None:
    """A number alone could mean seconds or hours."""
    with pytest.raises(click.BadParameter, match="is not a duration with its unit, such as 90s"):
        Duration().convert(value, None, None)


@pytest.mark.parametrize(
    ("value", "mode"),
    [("0644", 0o644), ("644", 0o644), ("0664", 0o664), ("755", 0o755), ("444", 0o444)],
)
def test_a_mode_lets_everybody_read(value: str, mode: int) -> None:
    """Modes with which Glance and Nova can read are accepted."""
    assert parse("--mode", value)["mode"] == mode


@pytest.mark.parametrize("value", ["0600", "0640", "0604", "0200", "0", "0666", "0646", "0777"])
def test_a_mode_that_excludes_readers_or_admits_writers_is_refused(value: str) -> None:
    """The refusal of a mode says why everybody must read and others must not write."""
    assert "Glance and Nova are neither owner nor group" in refusal("--mode", value)


@pytest.mark.parametrize("value", ["8", "4755", "0o644", "-1", "", "u+r", "0644\n", "00644"])
def test_a_mode_has_up_to_three_octal_digits(value: str) -> None:
    """A mode with other bits, other digits or in words is refused."""
    assert f"{value!r} is not an octal mode" in refusal("--mode", value)


def test_every_disk_format_is_linked_unless_some_are_named() -> None:
    """The default is every format that can be chosen, and a format may be in any case."""
    assert parse()["disk_formats"] == DISK_FORMATS
    chosen = parse("--disk-format", "RAW", "--disk-format", "qcow2")["disk_formats"]
    assert chosen == ("raw", "qcow2")


@pytest.mark.parametrize("value", ["vmdk", "vhd", "vhdx", "vdi", "ploop", "qcow3", ""])
def test_a_disk_format_that_qemu_would_convert_is_refused(value: str) -> None:
    """The refusal of a disk format lists those that can be linked, and says why."""
    message = refusal("--disk-format", value)
    assert f"{value!r} is not one of raw, iso, ami, ari, aki, qcow2" in message
    assert "a VMDK can name files of the host" in message


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("root", Owner(0, 0)),
        ("root:", Owner(0, 0)),
        ("0:0", Owner(0, 0)),
        ("107:108", Owner(107, 108)),
        ("daemon:root", Owner(1, 0)),
        ("1:root", Owner(1, 0)),
        ("4294967294:4294967294", Owner(4294967294, 4294967294)),
    ],
)
def test_an_owner_has_names_or_numbers(text: str, owner: Owner) -> None:
    """An owner is read as chown(1) reads it."""
    assert parse("--owner", text)["owner"] == owner


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody-of-this-name", "there is no user 'nobody-of-this-name' here"),
        ("root:nothing-of-this-name", "there is no group 'nothing-of-this-name' here"),
        ("107", "107 is a number; add its group, as 107:GROUP"),
        ("4294967295:0", "there is no user '4294967295' here"),
        ("0:4294967295", "there is no group '4294967295' here"),
        ("-1:0", "there is no user '-1' here"),
        ("", "there is no user '' here"),
        (":root", "there is no user '' here"),
        ("0:0:0", "there is no group '0:0' here"),
        ("\N{SUPERSCRIPT TWO}:0", "there is no user"),
        ("root\0:0", "there is no user"),
        ("9" * 5000 + ":0", "there is no user"),
    ],
)
def test_an_owner_that_does_not_exist_is_refused(text: str, message: str) -> None:
    """An unknown name, and the number that chown(2) takes for "leave it", are refused and named."""
    assert message in refusal("--owner", text)


def test_an_unknown_owner_is_to_be_looked_up_on_a_compute_node() -> None:
    """Installing QEMU creates no user qemu, so the message says where to find the number."""
    message = refusal("--owner", "nobody-of-this-name")
    assert re.search(r"QEMU runs as on the compute nodes.*stat -c %u:%g.*disk", message)


def test_for_needs_every() -> None:
    """An end without a repetition is a usage error before anything is done."""
    assert refusal("--for", "58") == "--for needs --every"


@pytest.mark.parametrize(
    ("option", "replacement"),
    [
        ("--prune", "ln-images-prune"),
        ("--prune-after", "ln-images-prune --after"),
        ("--prune-unmarked", "ln-images-prune --unmarked"),
        ("--instances-dir", "ln-images-node on each compute node"),
        ("--verify", "ln-images-verify"),
    ],
)
def test_an_option_of_the_past_names_what_has_replaced_it(option: str, replacement: str) -> None:
    """The options that became commands are refused, with or without their old value."""
    for arguments in ([option], [option, "24h"], [f"{option}=24h"], [option, "-n"]):
        message = refusal(*arguments)
        assert message.startswith(f"{option} is gone; use ")
        assert replacement in message


def test_an_owner_that_does_not_exist_does_not_hide_an_option_of_the_past() -> None:
    """An option of the past is the first thing that is refused."""
    with pytest.raises(click.UsageError, match="use the command ln-images-prune"):
        main.make_context("ln-images", ["--owner", "nobody-of-this-name", "--prune"])


@pytest.mark.parametrize("name", ["verbose", "quiet"])
def test_flags_are_off_by_default(name: str) -> None:
    """Without arguments, a command is neither verbose nor quiet."""
    assert parse()[name] is False


@pytest.mark.parametrize(
    ("value", "expected"), [("0", False), ("false", False), ("", False), ("1", True), ("yes", True)]
)
@pytest.mark.parametrize("name", ["dry_run", "full", "quiet"])
def test_a_variable_can_turn_a_flag_on_and_off(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: bool
) -> None:
    """LN_IMAGES_<FLAG> is read as yes or no, and an empty one counts as unset."""
    monkeypatch.setenv(f"LN_IMAGES_{name.upper()}", value)
    assert parse()[name] is expected


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty LN_IMAGES_<OPTION> leaves the default, and an empty OS_CLOUD names no cloud."""
    for name in ("MODE", "CACHE_DIR", "OS_CLOUD", "LOG_FILE", "EVERY", "DISK_FORMAT"):
        monkeypatch.setenv(f"LN_IMAGES_{name}", "")
    monkeypatch.setenv("OS_CLOUD", "")
    assert parse() == {**parse(), "mode": 0o644, "os_cloud": None, "log_file": None, "every": None}
    assert parse()["cache_dir"] == "/var/lib/glance/imagecache"
    assert parse()["disk_formats"] == DISK_FORMATS


def test_several_disk_formats_fit_into_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeatable option is a list, separated by spaces, in the environment."""
    monkeypatch.setenv("LN_IMAGES_DISK_FORMAT", "raw iso")
    assert parse()["disk_formats"] == ("raw", "iso")


def test_our_variable_takes_precedence_over_os_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """OS_CLOUD is honoured, as in the OpenStack client, unless LN_IMAGES_OS_CLOUD is set."""
    monkeypatch.setenv("OS_CLOUD", "theirs")
    assert parse()["os_cloud"] == "theirs"
    monkeypatch.setenv("LN_IMAGES_OS_CLOUD", "ours")
    assert parse()["os_cloud"] == "ours"


def list_options(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    """Yield each visible option of a command, and its long name as in a variable."""
    for option in command.params:
        name = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
        hidden = isinstance(option, click.Option) and option.hidden
        if not hidden and name not in ("HELP", "VERSION"):
            yield name, option


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_variable(command: Command) -> None:
    """An option has the variable of its command, or LN_IMAGES_<OPTION>, which commands share."""
    for name, option in list_options(COMMANDS[command]):
        variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
        expected = {f"{PREFIXES[command]}{name}"}
        if name not in FILES:
            expected.add(f"LN_IMAGES_{name}")
        assert expected & set(variables), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: Command) -> None:
    """A help text is a sentence that ends in a full stop."""
    for name, option in list_options(COMMANDS[command]):
        assert isinstance(option, click.Option)
        assert (option.help or "").endswith("."), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_shared_options(command: Command) -> None:
    """The options that the design shares have the same name in every command."""
    names = {option.name for option in COMMANDS[command].params}
    assert names >= {field.name for field in fields(CommonOptions)}
