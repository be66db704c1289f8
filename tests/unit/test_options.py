"""What the options take, and what they refuse: read by the command itself, without a run."""

import re
from typing import Any

import click
import pytest

from ln_images.cli import main
from ln_images.model import ConfigurationError


def read(*arguments: str) -> dict[str, Any]:
    """The values that the command takes from its arguments."""
    with main.make_context("ln-images", ["--owner", "0:0", *arguments]) as context:
        return context.params


def refused(*arguments: str) -> str:
    """What it says of arguments that it refuses."""
    with pytest.raises(click.UsageError) as error:
        read(*arguments)
    return error.value.format_message()


@pytest.mark.parametrize("option", ["--timeout", "--every", "--for"])
@pytest.mark.parametrize(
    "value", ["nan", "NaN", "-nan", "inf", "-inf", "1e300", "86401", "0", "-1", "soon", ""]
)
def test_a_length_of_time_is_one_that_a_clock_can_be_set_to(option: str, value: str) -> None:
    """More than nothing and at most a day.

    What is no number, or passes every comparison, is refused and named.
    """
    assert option in refused(f"{option}={value}")


@pytest.mark.parametrize(("value", "seconds"), [("1e-3", 0.001), ("30", 30), ("86400", 86400)])
def test_seconds_may_have_a_fraction(value: str, seconds: float) -> None:
    """Up to a day all are taken as they are."""
    assert [
        read(f"{option}={value}")[name]
        for option, name in (("--every", "every"), ("--for", "for_seconds"))
    ] == [seconds] * 2


@pytest.mark.parametrize(
    ("value", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), ("0s", 0)]
)
def test_a_duration_has_its_unit(value: str, seconds: int) -> None:
    """Whole seconds, minutes, hours and days are read."""
    assert read("--prune-after", value)["prune_after"] == seconds


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
        "1h\n",
        "9" * 10 + "s",
    ],
)
def test_a_duration_without_a_unit_is_refused(value: str) -> None:
    """What may stand for seconds or for hours is no duration."""
    assert "is not a duration with its unit" in refused("--prune-after", value)


@pytest.mark.parametrize(
    ("value", "mode"),
    [("0644", 0o644), ("644", 0o644), ("0664", 0o664), ("755", 0o755), ("444", 0o444)],
)
def test_a_mode_lets_everybody_read(value: str, mode: int) -> None:
    """Modes that Glance and Nova can read are taken."""
    assert read("--mode", value)["mode"] == mode


@pytest.mark.parametrize("value", ["0600", "0640", "0604", "0200", "0", "0666", "0646"])
def test_a_mode_that_locks_glance_out_or_others_in_is_refused(value: str) -> None:
    """A mode that somebody could not read, or others could write, is refused with the reason."""
    assert "Glance and Nova are neither owner nor group" in refused("--mode", value)


@pytest.mark.parametrize("value", ["8", "4755", "0o644", "-1", "", "u+r", "0644\n"])
def test_a_mode_that_is_none_is_refused(value: str) -> None:
    """Only up to three octal digits are a mode."""
    assert f"{value!r} is not an octal mode" in refused("--mode", value)


def test_formats_are_those_that_can_be_linked() -> None:
    """All of them unless some are named, in any case.

    The default is every one that can be chosen.
    """
    assert read()["disk_formats"] == ("raw", "iso", "ami", "ari", "aki", "qcow2")
    assert read("--disk-format", "RAW", "--disk-format", "qcow2")["disk_formats"] == (
        "raw",
        "qcow2",
    )


@pytest.mark.parametrize("value", ["vmdk", "vhd", "vhdx", "vdi", "ploop", "qcow3", ""])
def test_formats_that_qemu_would_have_to_convert_cannot_be_chosen(value: str) -> None:
    """The refusal says why, and which there are."""
    said = refused("--disk-format", value)
    assert f"{value!r} is none of raw, iso, ami, ari, aki, qcow2" in said
    assert "a VMDK can name files of the host" in said


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        ("root", (0, 0)),
        ("root:", (0, 0)),
        ("0:0", (0, 0)),
        ("107:108", (107, 108)),
        ("daemon:root", (1, 0)),
        ("1:root", (1, 0)),
    ],
)
def test_an_owner_is_names_or_numbers(owner: str, ids: tuple[int, int]) -> None:
    """USER, USER:GROUP and numbers are read as chown(1) reads them."""
    assert read("--owner", owner)["owner"] == ids


@pytest.mark.parametrize(
    ("owner", "named"),
    [
        ("nobody-of-this-name", "nobody-of-this-name"),
        ("root:nothing-of-this-name", "nothing-of-this-name"),
        ("107", "107:GROUP"),
        ("4294967295:0", "4294967295"),
        ("0:4294967295", "4294967295"),
        ("-1:0", "-1"),
        ("", "''"),
        (":root", "''"),
        ("\N{SUPERSCRIPT TWO}:0", "no user"),
        ("root\0:0", "no user"),
        ("9" * 5000 + ":0", "no user"),
    ],
)
def test_an_owner_that_does_not_exist_is_named(owner: str, named: str) -> None:
    """An unknown user or group, or a number that means "leave it" to chown(2), is a configuration error."""
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        read("--owner", owner)


def test_an_unknown_owner_is_looked_for_where_qemu_runs() -> None:
    """The mend names the user that QEMU runs as, and where its number is seen.

    Installing QEMU makes no user qemu.
    """
    with pytest.raises(
        ConfigurationError, match=r"QEMU runs as on the compute nodes.*stat -c %u:%g.*disk"
    ):
        read("--owner", "nobody-of-this-name")


@pytest.mark.parametrize(
    "arguments",
    [["--for", "58"], ["--prune-unmarked"], ["--for", "58", "--prune", "--prune-unmarked"]],
)
def test_an_option_that_means_nothing_alone_is_refused(arguments: list[str]) -> None:
    """--for without --every and --prune-unmarked without --prune are usage errors, before anything is done."""
    with pytest.raises(click.UsageError, match=r"needs --every|needs --prune"):
        main.invoke(main.make_context("ln-images", ["--owner", "0:0", *arguments]))


def test_every_option_has_its_variable() -> None:
    """LN_IMAGES_<OPTION> is read for each option of the command."""
    context = click.Context(main, info_name="ln-images", auto_envvar_prefix="LN_IMAGES")
    for option in main.params:
        name = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
        if name in ("HELP", "VERSION"):
            continue
        explicit = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or [])
        assert f"LN_IMAGES_{name}" in [
            *explicit,
            f"{context.auto_envvar_prefix}_{str(option.name).upper()}",
        ]


@pytest.mark.parametrize(
    ("value", "on"), [("0", False), ("false", False), ("", False), ("1", True), ("yes", True)]
)
@pytest.mark.parametrize("name", ["prune", "dry_run", "verify"])
def test_a_flag_of_the_environment_can_say_no(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, on: bool
) -> None:
    """LN_IMAGES_<OPTION> is read as yes or no."""
    monkeypatch.setenv(f"LN_IMAGES_{name.upper()}", value)
    assert read()[name] is on
