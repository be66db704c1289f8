"""The types of the commands' options, and the options that the commands share."""

import functools
import grp
import math
import os
import pwd
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import IO, Any

import click

from ln_images import __version__
from ln_images.model import DISK_FORMATS, Owner

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# chown(2) takes this number for "leave it as it is".
_NO_ID = 2**32 - 1

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _show_usage_error(error: click.UsageError, file: IO[Any] | None = None) -> None:
    """Print a usage error on one line, as every other error of these commands."""
    program = error.ctx.find_root().info_name if error.ctx else os.path.basename(sys.argv[0])
    message = error.format_message().rstrip(".").replace("\n", " ")
    click.echo(f"{program}: {message}; see {program} --help", file=file, err=True)


# click would print the usage and a hint above the error, on three lines.
click.UsageError.show = _show_usage_error  # type: ignore[assignment, method-assign]


class Seconds(click.FloatRange):
    """A number of seconds, more than 0 and at most a day."""

    def __init__(self) -> None:
        super().__init__(min=0, max=86400, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number. "nan" is refused: it passes every comparison of the range."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return seconds


class Duration(click.ParamType[int]):
    """A whole number with its unit, such as 90s, 30m, 24h or 7d; its value is in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the duration in seconds."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", value)
        if match is None:
            self.fail(
                f"{value!r} is not a duration with its unit, such as 90s, 30m, 24h or 7d",
                param,
                ctx,
            )
        return int(match[1]) * _UNIT_SECONDS[match[2]]


class DiskFormat(click.ParamType[str]):
    """One of the disk formats that can be linked, in whatever case."""

    name = "disk format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the format in lower case."""
        disk_format = str(value).lower()
        if disk_format not in DISK_FORMATS:
            self.fail(
                f"{value!r} is not one of {', '.join(DISK_FORMATS)}: QEMU would have to convert"
                " every other format, and a VMDK can name files of the host",
                param,
                ctx,
            )
        return disk_format


class Mode(click.ParamType[int]):
    """An octal mode with which everybody can read and others cannot write."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the permission bits."""
        if isinstance(value, int):
            return value
        if not re.fullmatch("0?[0-7]{1,3}", value):
            self.fail(f"{value!r} is not an octal mode from 0000 to 0777", param, ctx)
        mode = int(value, 8)
        everybody_reads = mode & 0o444 == 0o444
        others_write = bool(mode & 0o002)
        if not everybody_reads or others_write:
            self.fail(
                f"{value}: everybody must be able to read, because Glance and Nova are neither"
                " owner nor group, and others must not write",
                param,
                ctx,
            )
        return mode


class OwnerType(click.ParamType[Owner]):
    """``USER[:GROUP]``, names or numbers, as chown(1) reads it. Without a group, the user's own."""

    name = "owner"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Owner:
        """Return the user and the group by number."""
        if isinstance(value, Owner):
            return value
        user, _, group = value.partition(":")
        uid = _find_id(user, lambda name: pwd.getpwnam(name).pw_uid)
        if uid is None:
            self.fail(
                f"there is no user {user!r} here; use the name or the number of the user that QEMU"
                " runs as on the compute nodes (`stat -c %u:%g` of a running server's disk)",
                param,
                ctx,
            )
        if group:
            gid = _find_id(group, lambda name: grp.getgrnam(name).gr_gid)
            if gid is None:
                self.fail(f"there is no group {group!r} here; use its number", param, ctx)
            return Owner(uid, gid)
        try:
            return Owner(uid, pwd.getpwnam(user).pw_gid)
        except KeyError:
            self.fail(f"{user} is a number; add its group, as {user}:GROUP", param, ctx)


def _find_id(name: str, find: Callable[[str], int]) -> int | None:
    """Return the number of a user or group, given by name or number; None if there is none."""
    try:
        return find(name)
    except (KeyError, ValueError):
        if re.fullmatch("[0-9]{1,10}", name) and int(name) < _NO_ID:
            return int(name)
        return None


def disk_format_option(help_text: str) -> Callable[[Any], Any]:
    """Return a decorator for ``--disk-format``, which a command gets as ``disk_formats``."""
    return click.option(
        "--disk-format",
        "disk_formats",
        metavar="NAME",
        envvar="LN_IMAGES_DISK_FORMAT",
        type=DiskFormat(),
        multiple=True,
        default=DISK_FORMATS,
        show_default=True,
        help=help_text,
    )


def dry_run_option(variable_prefix: str) -> Callable[[Any], Any]:
    """Return a decorator for ``--dry-run``, whose variable is ``<variable_prefix>_DRY_RUN``."""
    return click.option(
        "-n",
        "--dry-run",
        is_flag=True,
        envvar=f"{variable_prefix}_DRY_RUN",
        help="Report what would be done, and change nothing.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The values of the options that the three commands share. ``timeout`` is in seconds."""

    images_dir: str
    cache_dir: str
    os_cloud: str | None
    timeout: float
    admin_role: str
    format: str
    log_file: str | None
    metrics_file: str | None
    verbose: bool
    quiet: bool


def common_options(variable_prefix: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds the shared options to a command.

    The command gets them as one argument ``common``, a :class:`CommonOptions`. Each option has the
    environment variable ``LN_IMAGES_<OPTION>``; those for files have ``<variable_prefix>_<OPTION>``
    because two commands must not write the same file.
    """
    options = [
        click.option(
            "--images-dir",
            metavar="DIR",
            envvar="LN_IMAGES_IMAGES_DIR",
            default="/var/lib/glance/images",
            show_default=True,
            help="Glance's filesystem store.",
        ),
        click.option(
            "--cache-dir",
            metavar="DIR",
            envvar="LN_IMAGES_CACHE_DIR",
            default="/var/lib/glance/imagecache",
            show_default=True,
            help="The directory that the compute nodes mount as Nova's _base.",
        ),
        click.option(
            "--os-cloud",
            metavar="NAME",
            envvar=["LN_IMAGES_OS_CLOUD", "OS_CLOUD"],
            help="An entry of clouds.yaml; needs ln-images[clouds]. Without it, OS_* variables.",
        ),
        click.option(
            "--timeout",
            metavar="SECONDS",
            envvar="LN_IMAGES_TIMEOUT",
            type=Seconds(),
            default=30,
            show_default=True,
            help="Time limit for each HTTP request.",
        ),
        click.option(
            "--admin-role",
            metavar="NAME",
            envvar="LN_IMAGES_ADMIN_ROLE",
            default="admin",
            show_default=True,
            help="The role that sees every project's images and every compute host.",
        ),
        click.option(
            "--format",
            envvar="LN_IMAGES_FORMAT",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Format of the report on standard output; JSON is one line for each pass.",
        ),
        click.option(
            "--log-file",
            metavar="PATH",
            envvar=f"{variable_prefix}_LOG_FILE",
            help="Rotating log, 1 MiB x 5.",
        ),
        click.option(
            "--metrics-file",
            metavar="PATH",
            envvar=f"{variable_prefix}_METRICS_FILE",
            help="Prometheus textfile; needs ln-images[metrics].",
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            envvar="LN_IMAGES_VERBOSE",
            help="Report images that are as they should be, too, and log more.",
        ),
        click.option(
            "-q", "--quiet", is_flag=True, envvar="LN_IMAGES_QUIET", help="Print errors only."
        ),
        click.version_option(__version__),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_common(**values: Any) -> Any:
            common = CommonOptions(
                **{field.name: values.pop(field.name) for field in fields(CommonOptions)}
            )
            return command(common=common, **values)

        for option in reversed(options):
            with_common = option(with_common)
        return with_common

    return decorate
