"""The command: options, wiring, exit status. The only place that prints or exits."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from ln_images import __version__, logs, report
from ln_images.metrics import Textfile
from ln_images.model import (
    CHANGES,
    AnotherRunError,
    Image,
    InterruptedByUserError,
    LnImagesError,
    Outcome,
    Pass,
    TemporaryError,
    Wanted,
)

LOG = logging.getLogger(__name__)
_DISK_FORMATS = ("raw", "iso", "ami", "ari", "aki", "qcow2")
_KNOWN_DISK_FORMATS = (*_DISK_FORMATS, "vmdk", "vhd", "vhdx", "vdi", "ploop")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
# Exit statuses, the least severe first.
_SEVERITY = (0, 1, 75, 2)
# A pass over fewer images is over before a progress bar can be read.
_WORTH_A_BAR = 200


class _Command(click.Command):
    """Where every way out of the command ends: one line of error, and one exit status."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            # click would print an empty line of its own.
            raise InterruptedByUserError("interrupted: what was linked stays, the next run does the rest") from None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        logs.to_stderr()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        # cron and systemd end a run with SIGTERM: it stops it as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
            sys.stdout.flush()
        except click.ClickException as error:
            LOG.error("%s: see ln-images --help", error.format_message().rstrip(".").replace("\n", " "))
            status = error.exit_code
        except LnImagesError as error:
            LOG.error("%s", error)
            status = error.exit_status
        except OSError as error:
            LOG.error("the report cannot be written: %s", error.strerror)
            status = 1
            # What is left in the buffer would fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error("a bug, please report it: %r at %s:%s", error, os.path.basename(where.filename), where.lineno)
            status = 1
        sys.exit(status)


@dataclass(frozen=True)
class _Settings:
    """The options, by their names."""

    images_dir: str
    cache_dir: str
    owner: str
    mode: int
    disk_formats: tuple[str, ...]
    os_cloud: str | None
    timeout: float
    full: bool
    every: float | None
    for_seconds: float | None
    prune: bool
    prune_after: int
    instances_dirs: tuple[str, ...]
    dry_run: bool
    report_format: str
    log_file: str | None
    metrics_file: str | None
    verbose: bool
    quiet: bool


def _duration(_context: click.Context, _option: click.Parameter, value: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a duration such as 90s, 30m, 24h or 7d")
    return int(found[1]) * _SECONDS[found[2]]


def _mode(_context: click.Context, _option: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{value!r} is not an octal mode from 0000 to 0777")
    return mode


@click.command(
    cls=_Command,
    context_settings={
        "auto_envvar_prefix": "LN_IMAGES",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.option("--images-dir", metavar="DIR", default="/var/lib/glance/images", help="Glance's filesystem store.")
@click.option(
    "--cache-dir",
    metavar="DIR",
    default="/var/lib/glance/imagecache",
    help="What the compute nodes mount as Nova's _base.",
)
@click.option(
    "--owner",
    metavar="USER[:GROUP]",
    default="qemu:qemu",
    help="Owner of the links; names or numbers. Without a group, the user's own.",
)
@click.option("--mode", metavar="OCTAL", default="0644", callback=_mode, help="Mode of the links.")
@click.option(
    "--disk-format",
    "disk_formats",
    envvar="LN_IMAGES_DISK_FORMAT",
    metavar="NAME",
    multiple=True,
    default=_DISK_FORMATS,
    type=click.Choice(_KNOWN_DISK_FORMATS, case_sensitive=False),
    help="Formats to link; repeatable.",
)
@click.option(
    "--os-cloud",
    metavar="NAME",
    envvar=["LN_IMAGES_OS_CLOUD", "OS_CLOUD"],
    help="A clouds.yaml entry; needs ln-images[clouds]. Otherwise OS_* from the environment.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    help="For each HTTP request.",
)
@click.option("--full", is_flag=True, help="Ask Glance about every image, not just those not yet linked.")
@click.option(
    "--every",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Repeat the pass inside one process.",
)
@click.option(
    "--for",
    "for_seconds",
    envvar="LN_IMAGES_FOR",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="End the repeating in time; for crontab lines that start once a minute.",
)
@click.option("--prune", is_flag=True, help="Also remove links whose image is gone and that nothing uses.")
@click.option(
    "--prune-after",
    metavar="DURATION",
    default="24h",
    callback=_duration,
    help="How long nothing must have used such a link; 90s, 30m, 24h, 7d.",
)
@click.option(
    "--instances-dir",
    "instances_dirs",
    envvar="LN_IMAGES_INSTANCES_DIR",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="Instance disks whose backing files are never pruned; repeatable.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; touch nothing.")
@click.option(
    "--format",
    "report_format",
    envvar="LN_IMAGES_FORMAT",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Report on standard output; json is one line a pass.",
)
@click.option("--log-file", metavar="PATH", help="Rotating log, 1 MiB x 5.")
@click.option("--metrics-file", metavar="PATH", help="Prometheus textfile; needs ln-images[metrics].")
@click.option("-v", "--verbose", is_flag=True, help="List present images too, and say more.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@click.version_option(__version__, prog_name="ln-images")
def main(**options: Any) -> int:
    """Hard-link finished Glance images into Nova's shared image cache.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can also
    be given as LN_IMAGES_<OPTION> in the environment.
    """
    settings = _Settings(**options)
    logs.set_up(settings.log_file, settings.verbose, settings.quiet)
    if settings.for_seconds is not None and settings.every is None:
        raise click.UsageError("--for needs --every")
    textfile = Textfile(settings.metrics_file) if settings.metrics_file and not settings.dry_run else None
    with _failure_told(textfile):
        make = _passes(settings)

    def one_pass() -> int:
        with _failure_told(textfile):
            made = make()
        status = report.exit_status(made)
        if made.fault is not None:
            LOG.error("%s", made.fault)
        _print_report(made, settings)
        if textfile is not None:
            textfile.write(made, status, time.time())
        return status

    return one_pass() if settings.every is None else _repeat(one_pass, settings.every, settings.for_seconds)


@contextlib.contextmanager
def _failure_told(textfile: Textfile | None) -> Iterator[None]:
    """Writes the metrics of a pass that could not be made. A run that finds another at work leaves them to that one."""
    try:
        yield
    except LnImagesError as error:
        if textfile is not None and not isinstance(error, AnotherRunError):
            textfile.write(None, error.exit_status, time.time())
        raise


def _passes(settings: _Settings) -> Callable[[], Pass]:
    """All that passes share, as a function that makes one."""
    # What a pass needs is imported when it is known that there is one: --help is quick.
    from ln_images.disk import Disk, owner_ids
    from ln_images.glance import Glance
    from ln_images.keystone import connect
    from ln_images.run import Job, run_pass, uninterrupted

    uid, gid = owner_ids(settings.owner)
    # Wrong directories and missing credentials are told before anything is asked or locked.
    Disk(settings.images_dir, settings.cache_dir).close()
    connection = connect(os.environ, settings.timeout, settings.os_cloud)
    glance = Glance(connection)

    def make() -> Pass:
        # Opened for each pass: a long run notices when a directory has been replaced or mounted over.
        with Disk(settings.images_dir, settings.cache_dir) as disk:
            return run_pass(
                Job(
                    connection=connection,
                    glance=glance,
                    disk=disk,
                    wanted=Wanted(uid, gid, settings.mode, frozenset(settings.disk_formats), disk.marks),
                    full=settings.full,
                    dry_run=settings.dry_run,
                    prune_after=settings.prune_after if settings.prune else None,
                    instances_dirs=settings.instances_dirs,
                    uninterrupted=uninterrupted,
                    watch=_progress,
                )
            )

    return make


def _repeat(one_pass: Callable[[], int], every: float, for_seconds: float | None) -> int:
    """Makes passes on a steady clock and returns the status of the worst.

    A pass that is too slow makes the next ones start later, never two at once. A cloud that goes away is waited
    for, and told of once. With ``for_seconds``, no pass begins that would end later, if it takes as long as the last.
    """
    start = time.monotonic()
    worst, fault = 0, ""
    while True:
        began = time.monotonic()
        try:
            worst = max(worst, one_pass(), key=_SEVERITY.index)
            fault = ""
        except TemporaryError as error:
            worst = max(worst, error.exit_status, key=_SEVERITY.index)
            if fault != str(error):
                fault = str(error)
                LOG.error("%s", error)
        now = time.monotonic()
        after = start + (int((now - start) / every) + 1) * every
        if for_seconds is not None and after + (now - began) > start + for_seconds:
            return worst
        time.sleep(after - now)


@contextlib.contextmanager
def _progress(images: list[Image]) -> Iterator[Iterator[Image]]:
    """A progress bar on standard error for a long list, where somebody sits before it."""
    if len(images) < _WORTH_A_BAR or not sys.stderr.isatty():
        yield iter(images)
    else:
        with click.progressbar(images, label="Linking", file=sys.stderr) as bar:
            yield iter(bar)


def _print_report(made: Pass, settings: _Settings) -> None:
    """The report on standard output. Under ``--quiet`` only JSON, and only where something was done or failed."""
    everything = settings.verbose or settings.full
    if settings.report_format == "json":
        if not settings.quiet or made.having(CHANGES | {Outcome.FAILED}):
            click.echo(json.dumps(report.document(made, everything)))
    elif not settings.quiet:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else None
        colour = terminal and not os.environ.get("NO_COLOR")
        lines = [report.table(report.listed(made, everything), width, colour), report.summary(made)]
        click.echo("\n".join(line for line in lines if line), color=colour)
