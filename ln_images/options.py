"""The options of the command: each one's name, form and check."""

import grp
import pwd
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import click

from ln_images.model import DISK_FORMATS, ConfigurationError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What chown(2) takes for "leave it".
_NO_ID = 2**32 - 1
_USER_MEND = (
    "name the one that QEMU runs as on the compute nodes, or its number; `stat -c %u:%g` of a running server's disk"
    " tells both"
)


class _Seconds(click.FloatRange):
    """A number of seconds: nan is in no range, and passes every comparison."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


# Lengths of time that a clock can be set to.
_LENGTH = _Seconds(min=0, max=_UNITS["d"], min_open=True)


def _disk_format(value: str) -> str:
    if value.lower() not in DISK_FORMATS:
        raise click.BadParameter(
            f"{value!r} is none of {', '.join(DISK_FORMATS)}: QEMU would have to convert any other, and a VMDK can"
            " name files of the host"
        )
    return value.lower()


def _duration(value: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", value)
    if found is None:
        raise click.BadParameter(
            f"{value!r} is not a duration with its unit, such as 90s, 30m, 24h or 7d"
        )
    return int(found[1]) * _UNITS[found[2]]


def _mode(value: str) -> int:
    if not re.fullmatch("0?[0-7]{1,3}", value):
        raise click.BadParameter(f"{value!r} is not an octal mode from 0000 to 0777")
    mode = int(value, 8)
    if mode & 0o444 != 0o444 or mode & 0o002:
        raise click.BadParameter(
            f"{value}: everybody must read, since Glance and Nova are neither owner nor group, and others not write"
        )
    return mode


def _owner(value: str) -> tuple[int, int]:
    """The uid and gid that ``USER[:GROUP]`` stands for, names or numbers, as chown(1) reads it."""
    user, _, group = value.partition(":")
    uid = _id("user", user, pwd.getpwnam, _USER_MEND)
    if group:
        return uid, _id("group", group, grp.getgrnam, "name another, or its number")
    try:
        return uid, pwd.getpwnam(user).pw_gid
    except KeyError:
        raise ConfigurationError(
            f"--owner: {user} is a number: say which group, as {user}:GROUP"
        ) from None


def _id(kind: str, name: str, find: Callable[[str], Any], mend: str) -> int:
    try:
        return int(find(name)[2])
    except (KeyError, ValueError):
        if re.fullmatch("[0-9]{1,10}", name) and int(name) < _NO_ID:
            return int(name)
        raise ConfigurationError(f"--owner: there is no {kind} {name!r} here: {mend}") from None


def _option(usage: str, text: str, **attributes: Any) -> Any:
    """A field of Options, with the option as ``--help`` shows it. Without a value it is a flag."""
    flags, _, metavar = usage.partition(" ")
    names = flags.split(",")
    attributes |= {"metavar": metavar} if metavar else {"is_flag": True}
    attributes.setdefault("envvar", f"LN_IMAGES_{names[-1].strip('-').replace('-', '_').upper()}")

    def option(field_name: str) -> click.Option:
        return click.Option([*names, field_name], help=text, show_default=True, **attributes)

    return field(metadata={"option": option})


@dataclass(frozen=True)
class Options:
    """The options of the command. Durations are in seconds; ``owner`` is a uid and a gid."""

    images_dir: str = _option(
        "--images-dir DIR", "Glance's filesystem store.", default="/var/lib/glance/images"
    )
    cache_dir: str = _option(
        "--cache-dir DIR",
        "What the compute nodes mount as Nova's _base.",
        default="/var/lib/glance/imagecache",
    )
    owner: tuple[int, int] = _option(
        "--owner USER[:GROUP]",
        "Owner of the links; names or numbers. Without a group, the user's own.",
        type=_owner,
        default="qemu:qemu",
    )
    mode: int = _option(
        "--mode OCTAL",
        "Mode of the links: everybody reads, others do not write.",
        type=_mode,
        default="0644",
    )
    disk_formats: Sequence[str] = _option(
        "--disk-format NAME",
        "Formats to link; repeatable.",
        type=_disk_format,
        multiple=True,
        default=DISK_FORMATS,
    )
    os_cloud: str | None = _option(
        "--os-cloud NAME",
        "A clouds.yaml entry; needs ln-images[clouds]. Otherwise OS_* from the environment.",
        envvar=["LN_IMAGES_OS_CLOUD", "OS_CLOUD"],
    )
    timeout: float = _option(
        "--timeout SECONDS", "For each HTTP request.", type=_LENGTH, default=30
    )
    full: bool = _option("--full", "Ask Glance about every image, not just those not yet linked.")
    every: float | None = _option(
        "--every SECONDS",
        "Repeat the pass in one process, and react at once to what Glance finishes.",
        type=_LENGTH,
    )
    for_seconds: float | None = _option(
        "--for SECONDS",
        "End the repeating in time; for crontab lines that start once a minute.",
        type=_LENGTH,
    )
    prune: bool = _option("--prune", "Also retire, and later remove, bases that nothing needs.")
    prune_after: float = _option(
        "--prune-after DURATION",
        "How long nothing must have used a base, until it is retired and again until it is removed.",
        type=_duration,
        default="24h",
    )
    prune_unmarked: bool = _option(
        "--prune-unmarked", "With --prune: also bases that this command did not link."
    )
    instances_dirs: Sequence[str] = _option(
        "--instances-dir DIR",
        "Instance disks whose backing files are never pruned; repeatable.",
        type=click.Path(exists=True, file_okay=False),
        multiple=True,
    )
    verify: bool = _option(
        "--verify", "Also read each linked image and compare it with Glance's checksum."
    )
    dry_run: bool = _option("-n,--dry-run", "Say what would be done; touch nothing.")
    format: str = _option(
        "--format [text|json]",
        "Report on standard output; json is one line a pass.",
        type=click.Choice(["text", "json"]),
        default="text",
    )
    log_file: str | None = _option("--log-file PATH", "Rotating log, 1 MiB x 5.")
    metrics_file: str | None = _option(
        "--metrics-file PATH", "Prometheus textfile; needs ln-images[metrics]."
    )
    verbose: bool = _option("-v,--verbose", "List present images too, and say more.")
    quiet: bool = _option("-q,--quiet", "Errors only.")


def parameters() -> list[click.Parameter]:
    """The options as click reads them, each into the field of its name."""
    return [one.metadata["option"](one.name) for one in fields(Options)]
