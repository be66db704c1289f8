"""One pass of ``ln-images-prune``: scan, gather evidence, decide about all bases, act, report.

Everything is decided before anything is done. The lock is held only for one action at a time, so
that a pass of ``ln-images`` hardly ever waits.
"""

import logging
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from ln_images import interrupts, report
from ln_images.console import most_severe
from ln_images.model import (
    CHANGES,
    FAULTS,
    AnotherRunError,
    Base,
    Command,
    LnImagesError,
    Outcome,
    Pass,
    Reason,
    Result,
    Verdict,
)
from ln_images.prune.bases import carry_out, other_name
from ln_images.prune.evidence import Cloud, Evidence, boot_time, gather
from ln_images.prune.lost import find_missing, is_there
from ln_images.prune.nodes import Node, list_nodes, node_document
from ln_images.prune.reports import Reports, read_reports
from ln_images.prune.rules import (
    NEEDS_FRESH_EVIDENCE,
    Decision,
    Facts,
    Policy,
    decide,
)
from ln_images.scan import MOST_BASES, RETIRED_SUFFIX, Scan, base_of, reclaimable, scan
from ln_images.store import Store
from ln_images.system_errors import judge_system_error

LOG = logging.getLogger(__name__)

# After one pass, at most so many lost or failed bases get a line of their own in the log.
_MOST_LINES = 100

_EVIDENCE_TOO_OLD = Verdict(
    Outcome.KEPT,
    Reason.EVIDENCE_TOO_OLD,
    "the evidence is too old to be sure that nobody needs it; the next pass tries again",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanUpOptions:
    """What a pass needs to know. ``lock_wait`` is in seconds."""

    images_dir: str
    cache_dir: str
    reports_dir: str
    policy: Policy
    dry_run: bool = False
    lock_wait: float = 0


class CleanUp(NamedTuple):
    """What one pass found and did. ``is_blocked`` says that no base could be removed."""

    pass_: Pass
    nodes: Sequence[Node]
    is_blocked: bool


def clean_up(options: CleanUpOptions, query: Callable[[], Cloud], start: float) -> CleanUp:
    """Run one pass, which started at ``start`` (:func:`boot_time`).

    ``query`` queries the cloud. If it raises an LnImagesError, the pass has that error, and the
    bases that reports name are restored nevertheless. Raises LnImagesError if the directories
    cannot be opened, or if their file system stops responding.
    """
    started_at = datetime.now(UTC)
    policy = options.policy
    with Store(options.images_dir, options.cache_dir) as store:
        # Reports, scan, Glance, in this order: what the reports name was in the cache before the
        # scan, and the scan is never newer than Glance's answer.
        reports = read_reports(options.reports_dir)
        on_disk = scan(store, policy=None)
        bases = [*on_disk.bases, *_find_unscanned(store, on_disk, reports)]
        now = time.time()
        missing = find_missing(store, reports, policy, now)
        evidence = gather(
            store=store,
            on_disk=on_disk,
            reports=reports,
            query=query,
            policy=policy,
            start=start,
            now=now,
        )
        decisions = [(base, decide_on_base(base, store, evidence, policy)) for base in bases]
        verdicts, lock_error = _act_on_all(decisions, store, evidence, options)
        # A base is lost only if it is still missing after all actions.
        lost = [result for result in missing if not is_there(store, result.cache_name)]

    results = [_result(base, verdict) for base, verdict in verdicts]
    results += [
        Result(cache_name=name, verdict=verdict) for name, verdict in on_disk.broken.items()
    ]
    results.sort(key=lambda result: result.cache_name)
    results += lost
    errors: list[LnImagesError] = list(evidence.errors)
    if lock_error is not None:
        errors.append(lock_error)
    _log(results, errors, evidence, on_disk)
    nodes = list_nodes(evidence.hosts, reports, policy, now)
    pass_ = Pass(
        command=Command.PRUNE,
        started_at=started_at,
        duration=boot_time() - start,
        dry_run=options.dry_run,
        results=results,
        reclaimable=reclaimable(_list_left(verdicts)),
        error=_find_most_severe(errors),
        extra={"nodes": [node_document(node) for node in nodes]},
    )
    return CleanUp(pass_, nodes, is_blocked=evidence.blocker is not None or _lacks_marks(results))


def decide_on_base(base: Base, store: Store, evidence: Evidence, policy: Policy) -> Decision:
    """Decide about one base: facts, rules, and a query about its image before anything goes.

    Raises TemporaryError if the file system does not respond any more.
    """
    now = time.time()
    try:
        facts = Facts(
            base=base,
            namesake=store.cache_file(other_name(base)),
            users=evidence.reports.users(base.name, since=now - policy.after),
            image_status=evidence.image_status(base),
            is_downloading=store.is_downloading(base.name),
            blocker=evidence.blocker,
            reports_begun=evidence.reports_begun,
        )
    except OSError as error:
        return Decision(judge_system_error(error, store))
    decision = decide(facts, policy, now)
    if decision.action not in NEEDS_FRESH_EVIDENCE or base.image_id is None:
        return decision

    # Glance may have an image that it does not list, so we query it about this one.
    if not evidence.has_time_to_query():
        return Decision(_EVIDENCE_TOO_OLD)
    try:
        if evidence.has_image(base.image_id):
            facts = facts._replace(image_status="unlisted")
    except LnImagesError as error:
        # Glance does not answer any more. Its error is a blocker, for this base and all others.
        evidence.errors.append(error)
        facts = facts._replace(blocker=evidence.blocker)
    return decide(facts, policy, now)


def _act_on_all(
    decisions: Sequence[tuple[Base, Decision]],
    store: Store,
    evidence: Evidence,
    options: CleanUpOptions,
) -> tuple[list[tuple[Base, Verdict]], AnotherRunError | None]:
    """Carry out the decisions. Those that give something back come first.

    Return what became of each base, and the error if another run held the lock too long. After that
    error nothing else is done. Raises TemporaryError if the file system does not respond any more.
    """
    verdicts = []
    lock_error: AnotherRunError | None = None
    for base, decision in sorted(decisions, key=_may_take_base):
        if decision.action is None or options.dry_run:
            verdicts.append((base, decision.verdict))
            continue
        if lock_error is None:
            try:
                verdict = _act(base, decision, store, evidence, options.lock_wait)
            except AnotherRunError as error:
                lock_error = error
        if lock_error is not None:
            verdict = Verdict(Outcome.KEPT, Reason.BLOCKED, lock_error.message)
        verdicts.append((base, verdict))
    return verdicts, lock_error


def _may_take_base(base_and_decision: tuple[Base, Decision]) -> bool:
    """Return whether a decision may take a base from somebody. False sorts before True."""
    _, decision = base_and_decision
    return decision.action in NEEDS_FRESH_EVIDENCE


def _act(
    base: Base, decision: Decision, store: Store, evidence: Evidence, lock_wait: float
) -> Verdict:
    """Carry out one decision, log it, and return what became of the base.

    Raises AnotherRunError if the lock is not free in time, and TemporaryError if the file system
    does not respond any more.
    """
    with store.locked(lock_wait), interrupts.held_back():
        if decision.action in NEEDS_FRESH_EVIDENCE and evidence.is_too_old():
            return _EVIDENCE_TOO_OLD
        try:
            verdict = carry_out(store, base, decision, time.time())
        except OSError as error:
            return judge_system_error(error, store)
        level = logging.INFO if verdict.outcome in CHANGES else logging.DEBUG
        LOG.log(level, "%s", report.line(_result(base, verdict)))
        return verdict


def _find_unscanned(store: Store, on_disk: Scan, reports: Reports) -> list[Base]:
    """Return the retired bases that a report names and that the scan did not reach.

    A node can create more names in the cache than the scan reads.
    """
    if not on_disk.has_more_bases:
        return []
    scanned = {base.name for base in on_disk.bases if base.retired}
    bases = []
    for name in sorted(reports.names() - scanned):
        try:
            file = store.cache_file(name + RETIRED_SUFFIX)
        except OSError:
            continue
        if file is not None and stat.S_ISREG(file.mode):
            bases.append(base_of(name + RETIRED_SUFFIX, file))
    return bases


def _list_left(verdicts: Sequence[tuple[Base, Verdict]]) -> list[Base]:
    """Return the bases that are left, as they are now; in a dry run, as they would be."""
    left = []
    for base, verdict in verdicts:
        if verdict.outcome is Outcome.RESTORED:
            left.append(base._replace(retired=False))
        elif verdict.outcome is Outcome.RETIRED:
            left.append(base._replace(retired=True))
        elif verdict.outcome is not Outcome.PRUNED:
            left.append(base)
    return left


def _result(base: Base, verdict: Verdict) -> Result:
    return Result(cache_name=base.name, verdict=verdict, id=base.image_id, size=base.file.size)


def _lacks_marks(results: Sequence[Result]) -> bool:
    return any(result.verdict.reason is Reason.NO_MARKS for result in results)


def _log(
    results: Sequence[Result], errors: Sequence[LnImagesError], evidence: Evidence, on_disk: Scan
) -> None:
    """Log the faults, the errors of the pass, and what kept it from removing bases."""
    faults = [result for result in results if result.verdict.outcome in FAULTS]
    for fault in faults[:_MOST_LINES]:
        LOG.error("%s", report.line(fault))
    if len(faults) > _MOST_LINES:
        # One report can name 20,000 bases that do not exist.
        LOG.error("%d more bases are lost or failed; read the report", len(faults) - _MOST_LINES)
    for error in errors:
        LOG.error("%s", error.message)
    if evidence.warning is not None:
        LOG.warning("%s", evidence.warning)
    if evidence.blocker is not None and not evidence.errors:
        LOG.warning(
            "the clean-up is blocked and removes nothing: %s; follow docs/prune.md",
            evidence.blocker,
        )
    if _lacks_marks(results):
        LOG.warning(
            "the file system of the cache keeps no extended attributes, so there is no clean-up;"
            " use another file system"
        )
    if on_disk.has_more_bases:
        LOG.warning(
            "the cache has more than %d bases that belong to no image in the store; the others are"
            " not removed; find out what creates them",
            MOST_BASES,
        )


def _find_most_severe(errors: Sequence[LnImagesError]) -> LnImagesError | None:
    """Return the first of the most severe errors, or None if there is none."""
    if not errors:
        return None
    status = most_severe(*(error.exit_code for error in errors))
    return next(error for error in errors if error.exit_code == status)
