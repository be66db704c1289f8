"""Find the bases that disks use and that are not in the cache any more."""

import stat
from collections import defaultdict

from ln_images.model import Outcome, Reason, Result, Verdict
from ln_images.prune.reports import Report, Reports
from ln_images.prune.rules import Policy, is_fresh, short_list
from ln_images.scan import RETIRED_SUFFIX
from ln_images.store import Store


def find_missing(store: Store, reports: Reports, policy: Policy, now: float) -> list[Result]:
    """Return a result for each base that is missing, as if it were lost.

    A report that is not fresh may be about a server that is gone, so it does not count here.
    """
    users: dict[str, list[Report]] = defaultdict(list)
    for report in reports.readable.values():
        if is_fresh(report, policy, now):
            for name in report.bases:
                users[name].append(report)
    return [_lost(name, users[name]) for name in sorted(users) if not is_there(store, name)]


def is_there(store: Store, name: str) -> bool:
    """Return whether a base has its name, or is at least retired.

    What cannot be looked at counts as there: it is not known to be missing.
    """
    try:
        files = [store.cache_file(name), store.cache_file(name + RETIRED_SUFFIX)]
    except OSError:
        return True
    return any(file is not None and stat.S_ISREG(file.mode) for file in files)


def _lost(name: str, users: list[Report]) -> Result:
    servers = {lost.server for report in users for lost in report.lost if lost.base == name}
    sentence = f"{short_list([report.host for report in users])} uses it"
    if servers:
        sentence += f" for server {short_list(list(servers))}"
    verdict = Verdict(
        Outcome.LOST,
        Reason.BASE_IS_MISSING,
        f"{sentence}, and it is not in the cache; do not stop or restart servers there; follow"
        " docs/recovery.md",
    )
    return Result(cache_name=name, verdict=verdict)
