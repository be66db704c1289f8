"""The command ``ln-images``: its options. Its passes are in ``passes.py``."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from ln_images import logs
from ln_images.console import prepare_standard_output
from ln_images.model import LinkPolicy, Owner
from ln_images.options import (
    CONTEXT_SETTINGS,
    CommonOptions,
    Mode,
    OwnerType,
    Seconds,
    common_options,
    disk_format_option,
    dry_run_option,
)

LOG = logging.getLogger(__name__)

# The variables of 0.2.0 that had this command do the work of another.
_MOVED_VARIABLES = {"LN_IMAGES_PRUNE": "ln-images-prune", "LN_IMAGES_VERIFY": "ln-images-verify"}


def _moved_option(name: str, replacement: str) -> Callable[[Any], Any]:
    """Return a decorator for an option of 0.2.0 that names what has replaced it.

    It takes a value or none, because some of these options had one.
    """

    def refuse(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(f"{name} is gone; use {replacement}", context)

    return click.option(
        name,
        hidden=True,
        is_flag=False,
        flag_value="",
        expose_value=False,
        is_eager=True,
        callback=refuse,
    )


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--owner",
    metavar="USER[:GROUP]",
    envvar="LN_IMAGES_OWNER",
    type=OwnerType(),
    default="qemu:qemu",
    show_default=True,
    help="Owner of the links, by name or number: QEMU's user on the compute nodes.",
)
@click.option(
    "--mode",
    metavar="OCTAL",
    envvar="LN_IMAGES_MODE",
    type=Mode(),
    default="0644",
    show_default=True,
    help="Mode of the links: everybody must be able to read, others must not write.",
)
@disk_format_option("Disk formats to link; repeatable.")
@click.option(
    "--full",
    is_flag=True,
    envvar="LN_IMAGES_FULL",
    help="Query Glance about every image, not only those that are not linked yet.",
)
@click.option(
    "--every",
    metavar="SECONDS",
    envvar="LN_IMAGES_EVERY",
    type=Seconds(),
    help="Repeat the pass in one process, and link at once what Glance finishes.",
)
@click.option(
    "--for",
    "for_seconds",
    metavar="SECONDS",
    envvar="LN_IMAGES_FOR",
    type=Seconds(),
    help="With --every: end after this time; for cron, which starts a line once a minute.",
)
@dry_run_option("LN_IMAGES")
@_moved_option("--prune", "the command ln-images-prune")
@_moved_option("--prune-after", "ln-images-prune --after")
@_moved_option("--prune-unmarked", "ln-images-prune --unmarked")
@_moved_option("--instances-dir", "ln-images-node on each compute node, and ln-images-prune")
@_moved_option("--verify", "the command ln-images-verify")
@common_options("LN_IMAGES")
@click.pass_context
def main(
    context: click.Context,
    *,
    common: CommonOptions,
    owner: Owner,
    mode: int,
    disk_formats: Sequence[str],
    full: bool,
    every: float | None,
    for_seconds: float | None,
    dry_run: bool,
) -> None:
    """Hard-link finished Glance images into Nova's shared image cache.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. Every option can
    also be given as LN_IMAGES_<OPTION> in the environment.
    """
    prepare_standard_output()
    status = logs.set_up("ln-images", common.log_file, common.verbose, common.quiet)
    if for_seconds is not None and every is None:
        raise click.UsageError("--for needs --every")
    for variable, command in _MOVED_VARIABLES.items():
        if os.environ.get(variable):
            LOG.warning("%s has no effect; unset it, and use the command %s", variable, command)
    # The OpenStack clients take long to import, and --help does not need them.
    from ln_images import passes
    from ln_images.sync import SyncOptions

    options = SyncOptions(
        images_dir=common.images_dir,
        cache_dir=common.cache_dir,
        policy=LinkPolicy(owner=owner, mode=mode, disk_formats=disk_formats),
        dry_run=dry_run,
        query_all=full,
        list_in_flight=not common.quiet and every is None,
        repeats=every is not None,
        lock_wait=every or 0,
    )
    status = passes.run(common, options, every=every, for_seconds=for_seconds, status=status)
    context.exit(status)
