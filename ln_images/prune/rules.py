"""Every rule of the clean-up: what keeps a base, and when it is retired, restored or removed.

A base is removed only after every compute node has reported twice, a day apart, that none of its
disks uses it.

The functions here are pure: they decide from facts and do nothing. :func:`decide` is the ladder.
Its order is the policy:

1. A report names the base: it is needed. A retired base gets its name back.
2. Glance still has the image: as in 1.
3. The base is exempt (:func:`_judge_exemption`), or the clean-up is blocked: nothing changes.
4. The base has no mark ``unused_since``: it is marked now.
5. The mark is younger than ``--after``: the base waits. A mark in the future is set to now.
6. A report was begun before the mark: the base waits.
7. The base has its name: it is marked anew and retired. Processes that have it open keep reading,
   new servers cannot start from it, and one rename undoes that.
8. The base is retired: it is removed.

Each base goes through steps 4 to 6 twice. So every node reports once before step 7, and once more
before step 8. Steps 1 and 2 remove the mark, so the time of a base that is used again starts anew.
:func:`list_blockers` says when the clean-up is blocked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


# These can take a base from a server that needs it. The others give something back.
NEEDS_FRESH_EVIDENCE = frozenset({Action.RETIRE, Action.REMOVE, Action.SET_MARK})


class Decision(NamedTuple):
    """A verdict, and the action that must succeed before the verdict is true.

    ``action`` is None if there is nothing to do. If the action fails, another verdict that says why
    replaces this one.
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
    """Everything that decides about one base.

    A base has one of two names, ``<sha1>`` or ``<sha1>.retired``. ``namesake`` is the file that has
    the other one, or None. ``users`` are the hosts whose reports name the base. ``image_status`` is
    the status of its image in Glance, or None if Glance has no such image.

    The last two are the same for all bases. ``blocker`` says why no base may be retired or removed;
    it is None if the clean-up is not blocked.
    ``reports_begun`` says for each compute host when its report was begun, in seconds since the
    epoch.
    """

    base: Base
    namesake: File | None = None
    users: Sequence[str] = ()
    image_status: str | None = None
    is_downloading: bool = False
    blocker: str | None = None
    reports_begun: Mapping[str, float] = {}

    @property
    def has_two_names(self) -> bool:
        """Return whether a retired base has its original name as well."""
        return (
            self.base.retired
            and self.namesake is not None
            and self.namesake.is_same_inode(self.base.file)
        )

    @property
    def is_name_taken(self) -> bool:
        """Return whether another file has the original name of a retired base."""
        return self.base.retired and self.namesake is not None and not self.has_two_names


def decide(facts: Facts, policy: Policy, now: float) -> Decision:
    """Decide what happens to one base. ``now`` is in seconds since the epoch.

    The comments have the numbers of the rules at the top of this module.
    """
    base = facts.base

    # An earlier run that renamed it ended between link and unlink. We unlink the retired name.
    if facts.has_two_names:
        sentence = "it had both names, because a run ended between two steps"
        return Decision(Verdict(Outcome.RESTORED, Reason.TWO_NAMES, sentence), Action.RESTORE)

    # 1. A report names the base.
    if facts.users:
        sentence = f"in use: reported by {short_list(facts.users)}"
        return _decide_on_needed(facts, Reason.IN_USE, sentence)

    # 2. Glance has the image. If another file has the name, that one is the base of the image.
    if facts.image_status is not None and not facts.is_name_taken:
        sentence = f"Glance has its image: status {facts.image_status}"
        return _decide_on_needed(facts, Reason.IMAGE_EXISTS, sentence)

    # 3. The base is exempt, or the clean-up is blocked.
    verdict = _judge_exemption(facts, policy)
    if verdict is not None:
        return Decision(verdict)

    # 4. It has no mark.
    unused_since = _unused_since(base)
    if unused_since is None:
        return _kept(Reason.FIRST_SEEN_UNUSED, "nobody uses it as of now", Action.SET_MARK)

    # 5. The mark is too young, or wrong.
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

    # 6. Not every report was begun after the mark.
    late = [host for host, begun in facts.reports_begun.items() if begun <= unused_since]
    if late:
        return _kept(
            Reason.WAITING_FOR_REPORTS,
            f"{unused}; waiting for a newer report of {short_list(late)}",
        )

    # 7. It has its name.
    if not base.retired:
        return _decide_to_retire(facts, unused)

    # 8. It is retired.
    return Decision(Verdict(Outcome.PRUNED, Reason.UNUSED_WHILE_RETIRED, unused), Action.REMOVE)


def _decide_on_needed(facts: Facts, reason: Reason, sentence: str) -> Decision:
    """Decide about a base that somebody needs: it gets its name back, and loses its mark."""
    base = facts.base
    if facts.is_name_taken:
        sentence += (
            "; but another file has the name, so servers there may read wrong data; follow"
            " docs/recovery.md"
        )
        return Decision(Verdict(Outcome.FAILED, Reason.NAME_TAKEN, sentence))
    if base.retired and facts.is_downloading:
        # The download would replace what we restore.
        return _kept(Reason.NOVA_IS_DOWNLOADING, f"{sentence}; but Nova is downloading it anew")
    if base.retired:
        return Decision(Verdict(Outcome.RESTORED, reason, sentence), Action.RESTORE)
    if _unused_since(base) is not None:
        return _kept(reason, sentence, Action.REMOVE_MARK)
    return _kept(reason, sentence)


def _judge_exemption(facts: Facts, policy: Policy) -> Verdict | None:
    """Return why a base that nobody needs stays as it is, whatever its mark; else None."""
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
            "the file system of the cache keeps no extended attributes, so we cannot mark the base",
        )
    if base.image_id is None and not policy.unmarked:
        return Verdict(
            Outcome.KEPT,
            Reason.IMAGE_NOT_KNOWN,
            "ln-images did not link it; --unmarked includes such bases",
        )
    if facts.blocker is not None:
        return Verdict(Outcome.KEPT, Reason.BLOCKED, f"the clean-up is blocked: {facts.blocker}")
    return None


def _decide_to_retire(facts: Facts, unused: str) -> Decision:
    if facts.namesake is not None:
        return _kept(Reason.NAME_TAKEN, f"{unused}; an earlier file is still retired")
    return Decision(Verdict(Outcome.RETIRED, Reason.UNUSED, unused), Action.RETIRE)


def _unused_since(base: Base) -> float | None:
    return None if base.file.marks is None else base.file.marks.unused_since


def _kept(reason: Reason, sentence: str, action: Action | None = None) -> Decision:
    return Decision(Verdict(Outcome.KEPT, reason, sentence), action)


def list_blockers(
    hosts: Sequence[ComputeHost], reports: Reports, policy: Policy, now: float
) -> list[str]:
    """Return each reason why no base may be removed now. ``hosts`` are all that Nova knows."""
    # The bases that an unreadable report names are not known, whoever wrote it.
    blockers = [
        f"the report of {host} cannot be read: {reason}"
        for host, reason in sorted(reports.unreadable.items())
    ]
    counts = Counter(host.name for host in hosts)
    reporting = sorted(counts.keys() - policy.ignored_hosts)
    if not reporting:
        blockers.append("every compute host is ignored, so nobody reports")
    for name in reporting:
        if counts[name] > 1:
            # One report cannot be about two machines.
            blockers.append(f"Nova lists {counts[name]} compute hosts named {name}")
        if name not in reports.hosts:
            blockers.append(f"{name} has no report")
        elif name in reports.readable:
            problem = find_problem(reports.readable[name], policy, now)
            if problem is not None:
                blockers.append(f"the report of {name} {problem}")
    for name, report in sorted(reports.readable.items()):
        # Another cloud uses this cache, or the host has another name now.
        if name not in counts and now - report.latest < policy.report_age:
            blockers.append(f"{name} reports, but Nova does not know it")
    return blockers


def find_problem(report: Report, policy: Policy, now: float) -> str | None:
    """Return why a report does not count, or None if it is complete and fresh."""
    if is_of_wrong_clock(report, now):
        return "lies in the future; set the clocks of that host and of this machine"
    if not is_fresh(report, policy, now):
        return f"is {duration_text(now - report.begun)} old"
    if not report.complete:
        return f"is incomplete: {report.incomplete_because or 'it gives no reason'}"
    return None


def is_fresh(report: Report, policy: Policy, now: float) -> bool:
    """Return whether a report shows what its host uses now, even if it is incomplete."""
    return not is_of_wrong_clock(report, now) and now - report.begun < policy.report_age


def is_of_wrong_clock(report: Report, now: float) -> bool:
    """Return whether a report lies in the future.

    Then a clock is wrong, and nobody knows how old the report is.
    """
    return report.latest - now > CLOCK_TOLERANCE


def short_list(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    text = ", ".join(sorted(names)[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return text
