"""The command: options, wiring, exit status. The only place that prints or exits."""

import contextlib
import json
import logging
import logging.handlers
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ln_images import __version__, plan, report
from ln_images.model import CHANGES, ConfigurationError, Image, LnImagesError, Outcome, Pass, Result, Wanted

if TYPE_CHECKING:
    from ln_images.cloud import Cloud
    from ln_images.disk import Disk

LOG = logging.getLogger("ln_images")
_DISK_FORMATS = ("raw", "iso", "ami", "ari", "aki", "qcow2")
_KNOWN_DISK_FORMATS = (*_DISK_FORMATS, "vmdk", "vhd", "vhdx", "vdi", "ploop")
# Past this many ids, asking for them in groups costs more than listing every image.
LISTING_PAYS = 500
_LOG_BYTES, _LOG_FILES = 1024 * 1024, 5


class _InterruptedError(LnImagesError):
    exit_status = 130


class _Command(click.Command):
    """Where every way out of the command ends: one line of error, and one exit status."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            # click would print an empty line of its own.
            raise _InterruptedError("interrupted: what was linked stays, the next run does the rest") from None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        _log_to_stderr()
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
@click.option("-v", "--verbose", is_flag=True, help="List present images too, and say more.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@click.version_option(__version__, prog_name="ln-images")
def main(
    images_dir: str,
    cache_dir: str,
    owner: str,
    mode: int,
    disk_formats: tuple[str, ...],
    os_cloud: str | None,
    timeout: float,
    full: bool,
    dry_run: bool,
    report_format: str,
    log_file: str | None,
    verbose: bool,
    quiet: bool,
) -> int:
    """Hard-link finished Glance images into Nova's shared image cache.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can also
    be given as LN_IMAGES_<OPTION> in the environment.
    """
    _set_up_logs(log_file, verbose, quiet)
    # What a pass needs is imported when it is known that there is one: --help is quick.
    from ln_images.cloud import connect
    from ln_images.disk import Disk, owner_ids

    uid, gid = owner_ids(owner)
    with Disk(images_dir, cache_dir) as disk:
        wanted = Wanted(uid, gid, mode, frozenset(disk_formats), disk.marks)
        if not disk.marks:
            LOG.debug("%s has no extended attributes: links get no mark", cache_dir)
        cloud = connect(os.environ, timeout, os_cloud)
        made = _pass(cloud, disk, wanted, full, dry_run)
    _print_report(made, report_format, verbose or full, quiet)
    return report.exit_status(made.results)


def _pass(cloud: "Cloud", disk: "Disk", wanted: Wanted, full: bool, dry_run: bool) -> Pass:
    """Looks, asks, then settles image by image. The list is whole before anything is touched.

    It looks before it asks, so that what is known of the disk is never newer than Glance's word for it.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    # A dry run changes nothing, so it neither waits for a run at work nor makes the next one fail.
    with contextlib.nullcontext() if dry_run else disk.locked():
        look = disk.look()
        settled = () if full else plan.settled(look, wanted)
        unsettled = plan.unsettled(look, settled)
        images = cloud.images(None if full or len(unsettled) > LISTING_PAYS else unsettled)
        known = frozenset(settled)
        results = tuple(_settle(image, disk, wanted, dry_run) for image in images if image.id not in known)
    return Pass(started_at, time.monotonic() - start, dry_run, results, settled)


def _settle(image: Image, disk: "Disk", wanted: Wanted, dry_run: bool) -> Result:
    with _uninterrupted():
        verdict = plan.judge_image(image, wanted) or disk.settle(image, wanted, dry_run)
    what = f"{image.id} ({image.name}) as {plan.cache_name(image.id)}"
    if verdict.outcome is Outcome.FAILED:
        LOG.error("failed: %s: %s", what, verdict.reason)
    elif verdict.outcome in CHANGES and not dry_run:
        LOG.info("%s: %s", verdict.outcome, what)
    return Result(image, verdict)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back, so that a run stops between images."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _print_report(made: Pass, report_format: str, verbose: bool, quiet: bool) -> None:
    """The report on standard output. Under ``--quiet`` only JSON, and only where something was done or failed."""
    if report_format == "json":
        if not quiet or made.having(CHANGES | {Outcome.FAILED}):
            click.echo(json.dumps(report.document(made, verbose)))
    elif not quiet:
        lines = [report.table(report.listed(made, verbose)), report.summary(made)]
        click.echo("\n".join(line for line in lines if line))


class _OneLine(logging.Formatter):
    """Escapes what comes from images and files, so that no line of it can pass for another."""

    def format(self, record: logging.LogRecord) -> str:
        return report.printable(super().format(record))


class _ToStderr(logging.StreamHandler[Any]):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno in (logging.INFO, logging.ERROR) else f"{record.levelname.lower()}: "
        return report.printable(f"ln-images: {level}{record.getMessage()}")


def _log_to_stderr() -> None:
    """Warnings and errors go to standard error; what other libraries log and warn of goes nowhere."""
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    logging.captureWarnings(True)
    LOG.propagate = False
    LOG.setLevel(logging.DEBUG)
    handler = _ToStderr(sys.stderr)
    handler.setLevel(logging.WARNING)
    LOG.handlers[:] = [handler]


def _set_up_logs(log_file: str | None, verbose: bool, quiet: bool) -> None:
    if verbose or quiet:
        LOG.handlers[0].setLevel(logging.ERROR if quiet else logging.DEBUG)
    if log_file is None:
        return
    try:
        handler = logging.handlers.RotatingFileHandler(
            log_file, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise ConfigurationError(
            f"--log-file {log_file}: {error.strerror}: name a file in a directory that exists"
        ) from None
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s"))
    LOG.addHandler(handler)
