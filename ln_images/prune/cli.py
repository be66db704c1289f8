"""The command ``ln-images-prune``: its options and its exit status."""

import os
from collections.abc import Sequence

import click

from ln_images import logs, report
from ln_images.console import (
    MetricsWriter,
    most_severe,
    prepare_standard_output,
    print_report,
)
from ln_images.model import Command, LnImagesError
from ln_images.options import (
    CONTEXT_SETTINGS,
    CommonOptions,
    Duration,
    common_options,
    dry_run_option,
)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--reports-dir",
    metavar="DIR",
    envvar="LN_IMAGES_PRUNE_REPORTS_DIR",
    default="/var/lib/glance/locks/ln-images",
    show_default=True,
    help="Where ln-images-node leaves the reports of the compute nodes.",
)
@click.option(
    "--after",
    metavar="DURATION",
    envvar="LN_IMAGES_PRUNE_AFTER",
    type=Duration(),
    default="24h",
    show_default=True,
    help="Retire a base that nobody has used for so long, and remove it after the same time again.",
)
@click.option(
    "--report-age",
    metavar="DURATION",
    envvar="LN_IMAGES_PRUNE_REPORT_AGE",
    type=Duration(),
    default="3h",
    show_default=True,
    help="How old the report of a compute node may be.",
)
@click.option(
    "--ignore-host",
    "ignored_hosts",
    metavar="HOST",
    envvar="LN_IMAGES_PRUNE_IGNORE_HOST",
    multiple=True,
    help="A compute host that never uses the cache, such as Ironic's; repeatable.",
)
@click.option(
    "--region",
    "region_names",
    metavar="NAME",
    envvar="LN_IMAGES_PRUNE_REGION",
    multiple=True,
    help="A region whose compute hosts use this cache; repeatable. By default all regions.",
)
@click.option(
    "--unmarked",
    is_flag=True,
    envvar="LN_IMAGES_PRUNE_UNMARKED",
    help="Include bases that ln-images did not link, such as those that Nova downloaded.",
)
@dry_run_option("LN_IMAGES_PRUNE")
@common_options("LN_IMAGES_PRUNE")
@click.pass_context
def main(
    context: click.Context,
    *,
    common: CommonOptions,
    reports_dir: str,
    after: int,
    report_age: int,
    ignored_hosts: Sequence[str],
    region_names: Sequence[str],
    unmarked: bool,
    dry_run: bool,
) -> None:
    """Remove bases from Nova's shared image cache that no disk uses any more.

    A base is removed only after every compute node has reported twice, a day apart, that none of
    its disks uses it. The compute nodes report with ln-images-node.

    Credentials come from OS_* variables, as in an openrc, or from clouds.yaml. The options for all
    commands can also be given as LN_IMAGES_<OPTION> in the environment; the others, the log file
    and the metrics file as LN_IMAGES_PRUNE_<OPTION>.
    """
    prepare_standard_output()
    status = logs.set_up("ln-images-prune", common.log_file, common.verbose, common.quiet)
    # What a pass needs is imported only now, so that --help is quick.
    from ln_images.prune.clean_up import CleanUpOptions, clean_up
    from ln_images.prune.evidence import Cloud, boot_time, query_cloud
    from ln_images.prune.nodes import list_prune_metrics, nodes_table
    from ln_images.prune.rules import Policy
    from ln_images.session import connect

    options = CleanUpOptions(
        images_dir=common.images_dir,
        cache_dir=common.cache_dir,
        reports_dir=reports_dir,
        policy=Policy(
            after=after,
            report_age=report_age,
            ignored_hosts=frozenset(ignored_hosts),
            unmarked=unmarked,
        ),
        dry_run=dry_run,
        lock_wait=common.timeout,
    )
    metrics = MetricsWriter(common, Command.PRUNE, dry_run)

    def query() -> Cloud:
        connection = connect(os.environ, common.timeout, common.os_cloud)
        return query_cloud(connection, common.admin_role, region_names)

    try:
        result = clean_up(options, query, boot_time())
    except LnImagesError as error:
        metrics.write(error.exit_code, None, [])
        raise
    pass_ = result.pass_
    status = most_severe(status, report.exit_status(pass_))
    print_report(pass_, status, common, common.verbose, preface=nodes_table(result.nodes))
    prune_metrics = list_prune_metrics(pass_, result.nodes, result.is_blocked)
    status = metrics.write(status, pass_.duration, prune_metrics)
    context.exit(status)
