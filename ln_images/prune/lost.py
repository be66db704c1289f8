"""Find the bases that disks use and that are not in the cache any more."""

import stat
from collections import defaultdict
from collections.abc import Collection, Sequence

from ln_images.model import Outcome, Reason, Result, Verdict
from ln_images.prune.reports import Reports
from ln_images.prune.rules import Policy, is_fresh, short_list
from ln_images.scan import RETIRED_SUFFIX
from ln_images.store import Store


def find_missing(store: Store, reports: Reports, policy: Policy, now: float) -> list[Result]:
    """Return a result for each base that a disk uses and that is missing now.

    The result says that it is lost. The caller must check again at the end, because the base may
    come back meanwhile. A report that is not fresh does not count here, because it may be about a
    server that is gone.
    """
    users: dict[str, list[str]] = defaultdict(list)
    servers: dict[str, set[str]] = defaultdict(set)
    for report in reports.readable.values():
        if is_fresh(report, policy, now):
            for name in report.bases:
                users[name].append(report.host)
            for lost in report.lost:
                servers[lost.base].add(lost.server)
    return [
        _lost(name, users[name], servers[name])
        for name in sorted(users)
        if not is_there(store, name)
    ]


def is_there(store: Store, name: str) -> bool:
    """Return whether a base has its name, or is at least retired.

    A base that cannot be read counts as there, because nothing shows that it is missing.
    """
    try:
        files = [store.cache_file(name), store.cache_file(name + RETIRED_SUFFIX)]
    except OSError:
        return True
    return any(file is not None and stat.S_ISREG(file.mode) for file in files)


def _lost(name: str, users: Sequence[str], servers: Collection[str]) -> Result:
    sentence = f"it is in use on {short_list(users)}"
    if servers:
        sentence += f" by server {short_list(list(servers))}"
    verdict = Verdict(
        Outcome.LOST,
        Reason.BASE_IS_MISSING,
        f"{sentence}, and it is not in the cache; do not stop or restart servers there; follow"
        " docs/recovery.md",
    )
    return Result(cache_name=name, verdict=verdict)
