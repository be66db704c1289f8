"""Every rule of the clean-up: what keeps a base, and when it is retired, restored or removed.

A base is removed only after every compute node has reported twice, a day apart, that none of its
disks uses it.

The functions here are pure: they decide from facts and do nothing. :func:`decide` is the ladder.
Its order is the policy:

1. A report names the base: it is needed. A retired base gets its name back, even if the clean-up is
   blocked.
2. Glance still has the image: the same.
3. The clean-up may not judge this base, or is blocked: nothing changes.
4. The base has no mark ``unused_since``: it gets one. So the first report of each node is over.
5. The mark is younger than ``--after``: the base waits.
6. A report was begun before the mark: the base waits. So the second report of each node is over.
7. The base has its name: it is marked anew and retired. Processes that have it open keep reading,
   new servers cannot start from it, and one rename undoes that. All of 1 to 6 applies again.
8. The base is retired: it is removed.

Steps 1 and 2 remove the mark, so that the time of a base that is used again starts anew.
:func:`list_blockers` says when the clean-up is blocked.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from ln_images.model import Base, File, Outcome, Reason, Verdict
from ln_images.prune.nova import ComputeHost
from ln_images.prune.reports import CLOCK_TOLERANCE, Report, Reports
from ln_images.report import duration_text


class Action(StrEnum):
    """What must be done to a base or to its mark ``unused_since``."""

    RESTORE = "restore"
    RETIRE = "retire"
    REMOVE = "remove"
    SET_MARK = "set_mark"
    REMOVE_MARK = "remove_mark"


# These can take a base from somebody who needs it, so the evidence for them must be fresh.
TAKES = frozenset({Action.RETIRE, Action.REMOVE, Action.SET_MARK})


class Decision(NamedTuple):
    """A verdict, and the action that must succeed before it is true; None if nothing is to be done.

    If the action fails, the verdict is replaced by one that says why.
    """

    verdict: Verdict
    action: Action | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The options that decide. ``after`` and ``report_age`` are in seconds."""

    after: float
    report_age: float
    ignored_hosts: frozenset[str] = frozenset()
    unmarked: bool = False


class Facts(NamedTuple):
    """What is known of one base.

    ``namesake`` has the other one of its two names, ``<sha1>`` and ``<sha1>.retired``, or is None.
    ``users`` are the hosts whose reports name it. ``image_status`` is the status of its image in
    Glance, or None if Glance has no such image.
    """

    base: Base
    namesake: File | None = None
    users: Sequence[str] = ()
    image_status: str | None = None
    is_downloading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known of the cloud. ``blocker`` is why no base at all may go, or None.

    ``reports_begun`` says for each compute host when its report was begun, in seconds since the
    epoch.
    """

    blocker: str | None = None
    reports_begun: Mapping[str, float] = field(default_factory=dict)


def decide(facts: Facts, situation: Situation, policy: Policy, now: float) -> Decision:
    """Decide what happens to one base. ``now`` is in seconds since the epoch."""
    base, namesake = facts.base, facts.namesake
    has_two_names = namesake is not None and namesake.is_same_inode(base.file)
    if base.retired and has_two_names:
        return Decision(
            Verdict(
                Outcome.RESTORED,
                Reason.TWO_NAMES,
                "it had both names, because a run ended between two steps",
            ),
            Action.RESTORE,
        )
    is_name_taken = namesake is not None and not has_two_names
    if facts.users:
        users = f"in use: reported by {join(facts.users)}"
        if base.retired and is_name_taken:
            return Decision(
                Verdict(
                    Outcome.FAILED,
                    Reason.NAME_TAKEN,
                    f"{users}; but another file has the name, so servers there may read wrong data;"
                    " follow docs/recovery.md",
                )
            )
        return _decide_on_needed(facts, Reason.IN_USE, users)
    if facts.image_status is not None and not (base.retired and is_name_taken):
        return _decide_on_needed(
            facts, Reason.IMAGE_EXISTS, f"Glance has its image: status {facts.image_status}"
        )
    verdict = _judge_exemption(facts, policy)
    if verdict is not None:
        return Decision(verdict)
    if situation.blocker is not None:
        return _kept(Reason.BLOCKED, f"the clean-up is blocked: {situation.blocker}")
    return _decide_on_unused(facts, situation, policy, now)


def _decide_on_needed(facts: Facts, reason: Reason, sentence: str) -> Decision:
    """Decide about a base that somebody needs: steps 1 and 2."""
    base = facts.base
    if base.retired and facts.is_downloading:
        # The download would replace what we restore.
        return _kept(Reason.NOVA_IS_DOWNLOADING, f"{sentence}; but Nova is downloading it anew")
    if base.retired:
        return Decision(Verdict(Outcome.RESTORED, reason, sentence), Action.RESTORE)
    has_mark = base.file.marks is not None and base.file.marks.unused_since is not None
    return _kept(reason, sentence, Action.REMOVE_MARK if has_mark else None)


def _judge_exemption(facts: Facts, policy: Policy) -> Verdict | None:
    """Return why the clean-up may not judge a base that nobody needs, or None."""
    base = facts.base
    if facts.is_downloading:
        return Verdict(Outcome.KEPT, Reason.NOVA_IS_DOWNLOADING, "Nova is downloading it")
    if base.file.links > 1:
        return Verdict(
            Outcome.KEPT, Reason.HAS_ANOTHER_NAME, "it has another name, so it would free nothing"
        )
    if base.file.marks is None or not base.file.marks.supported:
        return Verdict(
            Outcome.KEPT,
            Reason.NO_MARKS,
            "the file system of the cache keeps no extended attributes, so no time can be noted",
        )
    if base.image_id is None and not policy.unmarked:
        return Verdict(
            Outcome.KEPT,
            Reason.IMAGE_NOT_KNOWN,
            "ln-images did not link it; --unmarked includes such bases",
        )
    return None


def _decide_on_unused(facts: Facts, situation: Situation, policy: Policy, now: float) -> Decision:
    """Decide about a base that nobody needs, with evidence that is complete: steps 4 to 8."""
    base = facts.base
    unused_since = base.file.marks.unused_since if base.file.marks is not None else None
    if unused_since is None:
        return _kept(Reason.FIRST_SEEN_UNUSED, "nobody uses it as of now", Action.SET_MARK)
    if unused_since > now:
        return _kept(
            Reason.FIRST_SEEN_UNUSED,
            "its mark lies in the future, so its time starts anew",
            Action.SET_MARK,
        )
    unused = f"unused for {duration_text(now - unused_since)}"
    if now - unused_since < policy.after:
        return _kept(
            Reason.NOT_UNUSED_LONG_ENOUGH, f"{unused}, kept for {duration_text(policy.after)}"
        )
    late = [host for host, begun in situation.reports_begun.items() if begun <= unused_since]
    if late:
        return _kept(
            Reason.WAITING_FOR_REPORTS, f"{unused}; waiting for a newer report of {join(late)}"
        )
    if base.retired:
        return Decision(Verdict(Outcome.PRUNED, Reason.UNUSED_WHILE_RETIRED, unused), Action.REMOVE)
    if facts.namesake is not None:
        return _kept(Reason.NAME_TAKEN, f"{unused}; an earlier file is still retired")
    return Decision(Verdict(Outcome.RETIRED, Reason.UNUSED, unused), Action.RETIRE)


def list_blockers(
    hosts: Sequence[ComputeHost], reports: Reports, policy: Policy, now: float
) -> list[str]:
    """Return everything that keeps every base for now. ``hosts`` are all that Nova knows."""
    return list(_find_blockers(hosts, reports, policy, now))


def _find_blockers(
    hosts: Sequence[ComputeHost], reports: Reports, policy: Policy, now: float
) -> Iterator[str]:
    # The bases that an unreadable report names are not known, whoever wrote it.
    for host, because in sorted(reports.unreadable.items()):
        yield f"the report of {host} cannot be read: {because}"
    names = Counter(host.name for host in hosts)
    if not names.keys() - policy.ignored_hosts:
        yield "every compute host is ignored, so nobody reports"
    for name, count in sorted(names.items()):
        if name in policy.ignored_hosts:
            continue
        if count > 1:
            # One report cannot be about two machines.
            yield f"Nova lists {count} compute hosts named {name}"
        if name not in reports.hosts:
            yield f"{name} has no report"
        if name in reports.readable:
            yield from _find_problems(reports.readable[name], policy, now)
    for name, report in sorted(reports.readable.items()):
        # Another cloud uses this cache, or the host has another name now.
        if name not in names and now - report.latest < policy.report_age:
            yield f"{name} reports, but Nova does not know it"


def _find_problems(report: Report, policy: Policy, now: float) -> Iterator[str]:
    problem = find_problem(report, policy, now)
    if problem is not None:
        yield f"the report of {report.host} {problem}"


def find_problem(report: Report, policy: Policy, now: float) -> str | None:
    """Return why a report does not count, or None if it is complete and fresh."""
    if is_of_wrong_clock(report, now):
        return "lies in the future; set the clocks of that host and of this machine"
    if now - report.begun >= policy.report_age:
        return f"is {duration_text(now - report.begun)} old"
    if not report.complete:
        return f"is incomplete: {report.incomplete_because or 'it does not say why'}"
    return None


def is_fresh(report: Report, policy: Policy, now: float) -> bool:
    """Return whether a report says what its host uses now, even if it is incomplete."""
    return not is_of_wrong_clock(report, now) and now - report.begun < policy.report_age


def is_of_wrong_clock(report: Report, now: float) -> bool:
    """Return whether a clock is wrong, so that the age of the report is not known."""
    return report.latest - now > CLOCK_TOLERANCE


def _kept(reason: Reason, sentence: str, action: Action | None = None) -> Decision:
    return Decision(Verdict(Outcome.KEPT, reason, sentence), action)


def join(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    text = ", ".join(shown)
    return f"{text} and {more} more" if more else text
