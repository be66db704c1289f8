"""The options of the command: each one's name, form and check."""

import grp
import pwd
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from ln_images.model import DISK_FORMATS, ConfigurationError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What chown(2) takes for "leave it".
_NO_ID = 2**32 - 1
_USER_MEND = (
    "name the one that QEMU runs as on the compute nodes, or its number; `stat -c %u:%g` of a running server's disk"
    " tells both"
)


class _Seconds(click.FloatRange):
    """A length of time that a clock can be set to: nan is in no range, and passes every comparison."""

    def __init__(self) -> None:
        super().__init__(min=0, max=_SECONDS["d"], min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


def _disk_formats(_context: click.Context, _option: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    for value in values:
        if value.lower() not in DISK_FORMATS:
            raise click.BadParameter(
                f"{value!r} is none of {', '.join(DISK_FORMATS)}: QEMU would have to convert any other, and a VMDK can"
                " name files of the host"
            )
    return tuple(value.lower() for value in values)


def _duration(_context: click.Context, _option: click.Parameter, value: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a duration with its unit, such as 90s, 30m, 24h or 7d")
    return int(found[1]) * _SECONDS[found[2]]


def _mode(_context: click.Context, _option: click.Parameter, value: str) -> int:
    if not re.fullmatch("0?[0-7]{1,3}", value):
        raise click.BadParameter(f"{value!r} is not an octal mode from 0000 to 0777")
    mode = int(value, 8)
    if mode & 0o444 != 0o444 or mode & 0o002:
        raise click.BadParameter(
            f"{value}: everybody must read, since Glance and Nova are neither owner nor group, and others not write"
        )
    return mode


def _owner(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    """The uid and gid that ``USER[:GROUP]`` stands for, names or numbers, as chown(1) reads it."""
    user, _, group = value.partition(":")
    uid = _id("user", user, lambda: pwd.getpwnam(user).pw_uid, _USER_MEND)
    if group:
        return uid, _id("group", group, lambda: grp.getgrnam(group).gr_gid, "name another, or its number")
    try:
        return uid, pwd.getpwnam(user).pw_gid
    except KeyError:
        raise ConfigurationError(f"--owner: {user} is a number: say which group, as {user}:GROUP") from None


def _id(kind: str, name: str, find: Callable[[], int], mend: str) -> int:
    try:
        return find()
    except (KeyError, ValueError):
        if re.fullmatch("[0-9]{1,10}", name) and int(name) < _NO_ID:
            return int(name)
        raise ConfigurationError(f"--owner: there is no {kind} {name!r} here: {mend}") from None


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, show_default=True, **attributes)


OPTIONS: list[click.Parameter] = [
    _option("--images-dir", metavar="DIR", default="/var/lib/glance/images", help="Glance's filesystem store."),
    _option(
        "--cache-dir",
        metavar="DIR",
        default="/var/lib/glance/imagecache",
        help="What the compute nodes mount as Nova's _base.",
    ),
    _option(
        "--owner",
        metavar="USER[:GROUP]",
        default="qemu:qemu",
        callback=_owner,
        help="Owner of the links; names or numbers. Without a group, the user's own.",
    ),
    _option(
        "--mode",
        metavar="OCTAL",
        default="0644",
        callback=_mode,
        help="Mode of the links: everybody reads, others do not write.",
    ),
    _option(
        "--disk-format",
        "disk_formats",
        envvar="LN_IMAGES_DISK_FORMAT",
        metavar="NAME",
        multiple=True,
        default=DISK_FORMATS,
        callback=_disk_formats,
        help="Formats to link; repeatable.",
    ),
    _option(
        "--os-cloud",
        metavar="NAME",
        envvar=["LN_IMAGES_OS_CLOUD", "OS_CLOUD"],
        help="A clouds.yaml entry; needs ln-images[clouds]. Otherwise OS_* from the environment.",
    ),
    _option("--timeout", metavar="SECONDS", type=_Seconds(), default=30, help="For each HTTP request."),
    _option("--full", is_flag=True, help="Ask Glance about every image, not just those not yet linked."),
    _option(
        "--every",
        metavar="SECONDS",
        type=_Seconds(),
        help="Repeat the pass in one process, and react at once to what Glance finishes.",
    ),
    _option(
        "--for",
        "for_seconds",
        envvar="LN_IMAGES_FOR",
        metavar="SECONDS",
        type=_Seconds(),
        help="End the repeating in time; for crontab lines that start once a minute.",
    ),
    _option("--prune", is_flag=True, help="Also retire, and later remove, bases that nothing needs."),
    _option(
        "--prune-after",
        metavar="DURATION",
        default="24h",
        callback=_duration,
        help="How long nothing must have used a base, until it is retired and again until it is removed.",
    ),
    _option("--prune-unmarked", is_flag=True, help="With --prune: also bases that this command did not link."),
    _option(
        "--instances-dir",
        "instances_dirs",
        envvar="LN_IMAGES_INSTANCES_DIR",
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False),
        multiple=True,
        help="Instance disks whose backing files are never pruned; repeatable.",
    ),
    _option("--verify", is_flag=True, help="Also read each linked image and compare it with Glance's checksum."),
    _option("-n", "--dry-run", is_flag=True, help="Say what would be done; touch nothing."),
    _option(
        "--format",
        "report_format",
        envvar="LN_IMAGES_FORMAT",
        type=click.Choice(["text", "json"]),
        default="text",
        help="Report on standard output; json is one line a pass.",
    ),
    _option("--log-file", metavar="PATH", help="Rotating log, 1 MiB x 5."),
    _option("--metrics-file", metavar="PATH", help="Prometheus textfile; needs ln-images[metrics]."),
    _option("-v", "--verbose", is_flag=True, help="List present images too, and say more."),
    _option("-q", "--quiet", is_flag=True, help="Errors only."),
]
