"""Show the compute nodes: as a table, as JSON and as metrics. Nothing here decides."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ln_images.metrics import Metric, list_reclaimable_metrics
from ln_images.model import OUTCOMES, Command, Pass
from ln_images.prune.nova import ComputeHost
from ln_images.prune.reports import LostBase, Report, Reports, WrongCheck
from ln_images.prune.rules import Policy, find_problem, is_of_wrong_clock
from ln_images.report import counts, duration_text, plain_table, printable

_COLUMNS = ("HOST", "REPORT", "BASES", "LOST", "WRONG")


class Node(NamedTuple):
    """What a report of the clean-up shows of one compute host.

    ``problem`` is why its report does not count, or None. ``report_age`` is in seconds, or None if
    there is no readable report, or if a clock is wrong. ``is_known`` says that Nova lists the host,
    or that Nova did not answer.
    """

    host: str
    problem: str | None
    is_known: bool
    report_age: float | None = None
    complete: bool = False
    bases: int = 0
    lost: Sequence[LostBase] = ()
    wrong: Sequence[WrongCheck] = ()


def list_nodes(
    hosts: Sequence[ComputeHost], reports: Reports, policy: Policy, now: float
) -> list[Node]:
    """Return the nodes: the compute hosts that Nova knows, and those that report."""
    names = {host.name for host in hosts} - policy.ignored_hosts
    # Without an answer of Nova, every host counts as one that it knows.
    known = names if hosts else reports.hosts
    return [
        _node(name, reports, policy, now, is_known=name in known)
        for name in sorted(names | reports.hosts)
    ]


def _node(name: str, reports: Reports, policy: Policy, now: float, *, is_known: bool) -> Node:
    report: Report | None = reports.readable.get(name)
    if report is None:
        because = reports.unreadable.get(name)
        problem = "there is none" if because is None else f"cannot be read: {because}"
        return Node(host=name, problem=problem, is_known=is_known)
    return Node(
        host=name,
        problem=find_problem(report, policy, now),
        is_known=is_known,
        report_age=None if is_of_wrong_clock(report, now) else max(0.0, now - report.begun),
        complete=report.complete,
        bases=len(report.bases),
        lost=report.lost,
        wrong=report.wrong,
    )


def node_document(node: Node) -> dict[str, Any]:
    """Return what the JSON report has of one node."""
    return {
        "host": node.host,
        "report_age_seconds": None if node.report_age is None else round(node.report_age, 3),
        "complete": node.complete,
        "bases": node.bases,
        "lost": [{"server": lost.server, "base": lost.base} for lost in node.lost],
        "wrong": [check.name for check in node.wrong],
    }


def nodes_table(nodes: Sequence[Node]) -> str:
    """Return the nodes as aligned lines, and below them what each wrong check found."""
    if not nodes:
        return ""
    pretty = plain_table(_COLUMNS)
    for node in nodes:
        pretty.add_row([printable(cell) for cell in _row(node)])
    lines = [line.rstrip() for line in pretty.get_string().splitlines()]
    lines += [
        printable(f"{node.host}: {check.name} is WRONG: {check.found}; {check.fix}")
        for node in nodes
        for check in node.wrong
    ]
    # An empty line separates the nodes from the table of the bases.
    return "\n".join([*lines, ""])


def _row(node: Node) -> list[str]:
    report = node.problem
    if report is None:
        report = f"{duration_text(node.report_age or 0)} old"
    wrong = ", ".join(check.name for check in node.wrong)
    return [node.host, report, str(node.bases), str(len(node.lost)), wrong or "-"]


def list_prune_metrics(pass_: Pass, nodes: Sequence[Node], is_blocked: bool) -> list[Metric]:
    """Return the metrics of a pass.

    A host that Nova does not know has none: a node could report under thousands of names, which
    Prometheus would keep. If such a report is fresh, ``prune_blocked`` shows it.
    """
    counter = counts(pass_)
    metrics = [
        Metric("prune_bases", "Bases by outcome.", counter[outcome], {"outcome": outcome.value})
        for outcome in OUTCOMES[Command.PRUNE]
    ]
    metrics += list_reclaimable_metrics(pass_.reclaimable, "prune_reclaimable")
    metrics.append(Metric("prune_blocked", "Whether no base could be removed.", is_blocked, {}))
    for node in nodes:
        if not node.is_known:
            continue
        labels = {"host": node.host}
        if node.report_age is not None:
            metrics.append(
                Metric(
                    "node_report_age_seconds",
                    "How old the report of a compute node is.",
                    node.report_age,
                    labels,
                )
            )
        metrics += [
            Metric(
                "node_wrong",
                "Checks of a compute node's set-up that are wrong.",
                len(node.wrong),
                labels,
            ),
            Metric(
                "node_lost_bases",
                "Disks of a compute node whose base is missing.",
                len(node.lost),
                labels,
            ),
        ]
    return metrics
