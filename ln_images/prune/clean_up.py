"""One pass of ``ln-images-prune``: scan, gather evidence, decide about all bases, act, report.

Everything is decided before anything is done. The lock is held only for one action at a time, so
that a pass of ``ln-images`` hardly ever waits.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ln_images.prune.evidence import MOST_AGE, Clock, Cloud, Evidence, gather
from ln_images.prune.nodes import Node, list_nodes, node_document
from ln_images.prune.reports import Reports, read_reports
from ln_images.prune.rules import (
    TAKES,
    Decision,
    Facts,
    Policy,
    decide,
    is_fresh,
    join,
)
from ln_images.rules import judge_error
from ln_images.scan import MOST_BASES, RETIRED_SUFFIX, Scan, base_of, reclaimable, scan
from ln_images.store import Store

LOG = logging.getLogger(__name__)

_EVIDENCE_TOO_OLD = Verdict(
    Outcome.KEPT,
    Reason.EVIDENCE_TOO_OLD,
    "this pass took too long to be sure that nobody needs it; the next one tries again",
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
    """What one pass found and did. ``is_blocked`` says that no base could go."""

    pass_: Pass
    nodes: Sequence[Node]
    is_blocked: bool


def clean_up(options: CleanUpOptions, query: Callable[[], Cloud], clock: Clock) -> CleanUp:
    """Run one pass. Raises LnImagesError if the directories cannot be opened.

    ``clock`` has just been started. ``query`` queries the cloud. If it raises LnImagesError, that
    is the error of the pass, and the bases that reports name are restored nevertheless.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    with Store(options.images_dir, options.cache_dir) as store:
        # The reports are read before the cache is scanned: what they name was there before.
        reports = read_reports(options.reports_dir)
        found = scan(store, policy=None)
        bases = [*found.bases, *_find_named(store, found, reports)]
        now = time.time()
        missing = _find_missing(store, reports, options.policy, now)
        evidence = gather(
            clock=clock,
            reports=reports,
            query=query,
            policy=options.policy,
            bases=bases,
            ids_in_store=found.ids_in_store,
            now=now,
        )
        decisions, evidence = _decide_all(store, bases, evidence, options.policy)
        results, lock_error = _act_on_all(store, decisions, evidence.clock, options)
        left = reclaimable(list(_list_left(decisions, results)))
        results += [
            Result(cache_name=name, verdict=broken) for name, broken in found.broken.items()
        ]
        results += _list_lost(store, missing, reports)
    errors = [*evidence.errors, *([lock_error] if lock_error else [])]
    _log(results, errors, evidence)
    nodes = list_nodes(evidence.hosts, reports, options.policy, now)
    pass_ = Pass(
        command=Command.PRUNE,
        started_at=started_at,
        duration=time.monotonic() - start,
        dry_run=options.dry_run,
        results=results,
        reclaimable=left,
        error=_find_most_severe(errors),
        extra={"nodes": [node_document(node) for node in nodes]},
    )
    has_no_marks = any(result.verdict.reason is Reason.NO_MARKS for result in results)
    return CleanUp(pass_, nodes, evidence.situation.blocker is not None or has_no_marks)


def _find_named(store: Store, found: Scan, reports: Reports) -> list[Base]:
    """Return the retired bases that a report names and that the scan did not reach."""
    bases: list[Base] = []
    if not found.has_more_bases:
        return bases
    LOG.warning(
        "the cache has more than %d bases that belong to no image in the store; the others are not"
        " removed; find out what creates them",
        MOST_BASES,
    )
    seen = {base.name for base in found.bases if base.retired}
    named = {
        name for report in reports.readable.values() for name in [*report.bases, *report.recent]
    }
    for name in sorted(named - seen):
        # What cannot be looked at is a result of its own if the scan reaches it.
        with contextlib.suppress(OSError):
            file = store.cache_file(name + RETIRED_SUFFIX)
            if file is not None and stat.S_ISREG(file.mode):
                bases.append(base_of(name + RETIRED_SUFFIX, file))
    return bases


def _decide_all(
    store: Store, bases: Sequence[Base], evidence: Evidence, policy: Policy
) -> tuple[list[tuple[Base, Decision]], Evidence]:
    """Decide about each base. Return the evidence with what failed meanwhile."""
    decisions = []
    for base in bases:
        try:
            decision = _decide(store, base, evidence, policy)
        except LnImagesError as error:
            # Glance cannot be queried about this image, so from now on nothing may go.
            evidence = evidence.with_error(error)
            decision = _decide(store, base, evidence, policy)
        decisions.append((base, decision))
    return decisions, evidence


def _decide(store: Store, base: Base, evidence: Evidence, policy: Policy) -> Decision:
    """Decide about one base. Raises LnImagesError if Glance cannot be queried about its image."""
    now = time.time()
    try:
        facts = Facts(
            base=base,
            namesake=store.cache_file(other_name(base)),
            users=evidence.reports.users(base.name, since=now - policy.after),
            image_status=evidence.images.status(base),
            is_downloading=store.is_downloading(base.name),
        )
    except OSError as error:
        return Decision(judge_error(error, is_root=os.geteuid() == 0))
    decision = decide(facts, evidence.situation, policy, now)
    if decision.action not in TAKES or base.image_id is None:
        return decision
    # An image that is in no list may exist all the same.
    if not evidence.has_time_to_query():
        return Decision(_EVIDENCE_TOO_OLD)
    if not evidence.has_image(base.image_id):
        return decision
    return decide(facts._replace(image_status="unlisted"), evidence.situation, policy, now)


def _act_on_all(
    store: Store,
    decisions: Sequence[tuple[Base, Decision]],
    clock: Clock,
    options: CleanUpOptions,
) -> tuple[list[Result], AnotherRunError | None]:
    """Carry out the decisions, those first that give something back.

    Return a result for each, and the error if another run held the lock too long.
    """
    results = {}
    lock_error: AnotherRunError | None = None
    for base, decision in sorted(decisions, key=lambda pair: pair[1].action in TAKES):
        verdict = decision.verdict
        if decision.action is not None and not options.dry_run:
            if lock_error is None:
                try:
                    verdict = _act(store, base, decision, clock, options.lock_wait)
                except AnotherRunError as error:
                    lock_error = error
            if lock_error is not None:
                verdict = Verdict(Outcome.KEPT, Reason.BLOCKED, lock_error.message)
        results[base] = _result(base, verdict)
    return [results[base] for base, _ in decisions], lock_error


def _act(store: Store, base: Base, decision: Decision, clock: Clock, lock_wait: float) -> Verdict:
    """Carry out one decision, log it, and return what became of the base.

    Raises AnotherRunError.
    """
    with store.locked(lock_wait), interrupts.held_back():
        if decision.action in TAKES and clock.age() > MOST_AGE:
            return _EVIDENCE_TOO_OLD
        try:
            verdict = carry_out(store, base, decision, time.time())
        except OSError as error:
            return judge_error(error, is_root=os.geteuid() == 0)
        level = logging.INFO if verdict.outcome in CHANGES else logging.DEBUG
        LOG.log(level, "%s", report.line(_result(base, verdict)))
        return verdict


def _result(base: Base, verdict: Verdict) -> Result:
    return Result(cache_name=base.name, verdict=verdict, id=base.image_id, size=base.file.size)


def _find_missing(
    store: Store, reports: Reports, policy: Policy, now: float
) -> dict[str, list[str]]:
    """Return the bases that fresh reports name and that are not in the cache, with the hosts."""
    hosts: dict[str, list[str]] = {}
    for report_ in reports.readable.values():
        if is_fresh(report_, policy, now):
            for name in report_.bases:
                hosts.setdefault(name, []).append(report_.host)
    return {name: hosts[name] for name in sorted(hosts) if not _is_there(store, name)}


def _list_lost(
    store: Store, missing: Mapping[str, Sequence[str]], reports: Reports
) -> Iterator[Result]:
    """Yield a result for each of the missing bases that is not there on a second look either."""
    for name, hosts in missing.items():
        if _is_there(store, name):
            continue
        servers = {
            lost.server
            for host in hosts
            for lost in reports.readable[host].lost
            if lost.base == name
        }
        sentence = f"{join(hosts)} uses it"
        if servers:
            sentence += f" for server {join(sorted(servers))}"
        verdict = Verdict(
            Outcome.LOST,
            Reason.BASE_IS_MISSING,
            f"{sentence}, and it is not in the cache; do not stop or restart servers there; follow"
            " docs/recovery.md",
        )
        yield Result(cache_name=name, verdict=verdict)


def _is_there(store: Store, name: str) -> bool:
    """Return whether a base has its name, or is at least retired.

    What cannot be looked at counts as there: it is not known to be missing.
    """
    try:
        files = [store.cache_file(name + suffix) for suffix in ("", RETIRED_SUFFIX)]
    except OSError:
        return True
    return any(file is not None and stat.S_ISREG(file.mode) for file in files)


def _list_left(
    decisions: Sequence[tuple[Base, Decision]], results: Sequence[Result]
) -> Iterator[Base]:
    """Yield the bases that are left, as they are now; in a dry run, as they would be."""
    for (base, _), result in zip(decisions, results, strict=True):
        outcome = result.verdict.outcome
        if outcome is Outcome.RESTORED:
            yield base._replace(retired=False)
        elif outcome is Outcome.RETIRED:
            yield base._replace(retired=True)
        elif outcome is not Outcome.PRUNED:
            yield base


def _log(results: Sequence[Result], errors: Sequence[LnImagesError], evidence: Evidence) -> None:
    """Log what somebody should look at."""
    for result in results:
        if result.verdict.outcome in FAULTS:
            LOG.error("%s", report.line(result))
    for error in errors:
        LOG.error("%s", error.message)
    if evidence.situation.blocker is not None and not evidence.errors:
        LOG.warning(
            "the clean-up is blocked and removes nothing: %s; run ln-images-node on that host",
            evidence.situation.blocker,
        )
    if any(result.verdict.reason is Reason.NO_MARKS for result in results):
        LOG.warning(
            "the file system of the cache keeps no extended attributes, so there is no clean-up;"
            " use another file system"
        )


def _find_most_severe(errors: Sequence[LnImagesError]) -> LnImagesError | None:
    if not errors:
        return None
    status = most_severe(*(error.exit_code for error in errors))
    return next(error for error in errors if error.exit_code == status)
