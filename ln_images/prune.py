"""What a clean-up may take: the policy, pure, and the gathering of its evidence.

A base that by all evidence nothing needs is retired: renamed in place, so that whoever has it open
reads on and a new server does not start from it. When it has been retired for as long again, and
the same evidence says the same, it is removed. Any doubt keeps.
"""

import logging
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ln_images import nova
from ln_images.disk import Disk
from ln_images.glance import Glance
from ln_images.instances import Disks, open_inodes, read_disks
from ln_images.model import Base, ConfigurationError, Image, LnImagesError, Outcome, Server, Verdict
from ln_images.options import Options
from ln_images.plan import IN_FLIGHT, cache_name

LOG = logging.getLogger(__name__)
# States and tasks of a server (nova.api.openstack.common, nova.compute.task_states) in which its
# disk may be made from another image than the one it names. UNKNOWN is what the API calls a state
# that it does not know.
_RESTLESS = frozenset({"RESCUE", "REBUILD", "UNKNOWN"})
_OLD_NOVA = (
    "Nova is older than 26.0.0, where servers may name another image than their disk's: give --instances-dir with all"
    " disks"
)
# An id may be used again, when Glance has forgotten it: a retired base is then not what is
# uploaded.
_COMING = "an image with this id is being uploaded"
_RESTLESS_TASKS = ("rebuild", "unshelv", "rescu", "resize_finish")


@dataclass(frozen=True)
class Evidence:
    """What is known that could keep a base. ``now`` and ``prune_after`` are in seconds.

    ``needed`` has the reason by the cache name of each image that Glance or a server names, in
    every spelling of its id, and by the id in lower case. ``disks`` is what instance disks say,
    ``opened`` the inodes that NFS clients hold open, and ``doubt`` why anything might need any
    base, or nothing.
    """

    now: float
    prune_after: float
    needed: Mapping[str, str] = field(default_factory=dict)
    disks: Disks = field(default_factory=Disks)
    opened: frozenset[int] = frozenset()
    doubt: str = ""


def judge(base: Base, evidence: Evidence) -> Verdict:
    """``retired``, or ``pruned`` where it is already, if nothing needs the base, else ``restored`` or ``kept``.

    The ctime tells how long nothing has renewed it: Nova touches the base of each server's image (not one that only
    backs a disk), the removal of Glance's own name renews it, and so does retiring. It is one rule among others.
    """
    need = _need(base, evidence)
    idle = evidence.now - base.file.changed
    if base.retired and need and need != _COMING:
        return Verdict(Outcome.RESTORED, need)
    if idle < evidence.prune_after:
        since = "retired" if base.retired else "in use or released"
        return Verdict(
            Outcome.KEPT, f"{since} {age(idle)} ago, kept for {age(evidence.prune_after)}"
        )
    if need or evidence.doubt:
        return Verdict(Outcome.KEPT, f"{need or evidence.doubt}; unused for {age(idle)}")
    if base.retired and base.file.links > 1:
        # One of them may be its own, after a crash: see Disk._rename.
        return Verdict(Outcome.KEPT, "it has another name, too")
    if base.retired:
        return Verdict(Outcome.PRUNED, f"retired {age(idle)} ago")
    return Verdict(Outcome.RETIRED, f"unused for {age(idle)}")


def _need(base: Base, evidence: Evidence) -> str:
    """What needs a base, or nothing.

    Who has its content goes before who is about to bring another.
    """
    needs = [evidence.needed.get(key) for key in (base.name, base.image_id.lower())]
    if base.name in evidence.disks.backed:
        needs.append(f"{evidence.disks.backed[base.name]} is backed by it")
    if base.file.inode in evidence.opened:
        needs.append("an NFS client has it open")
    return min((need for need in needs if need), key=lambda need: need == _COMING, default="")


def needed(images: Iterable[Image], servers: Iterable[Server]) -> dict[str, str]:
    """Why a base is needed, by its cache name and by its image's id in lower case.

    A name cannot be turned back into an id, so each id counts in every spelling: Nova and Glance
    compare ids as their databases do, which on MySQL is without regard to case.
    """
    reasons = {image.id: _reason(image) for image in images}
    reasons |= {
        image_id: f"server {one.id} was built from it" for one in servers for image_id in one.uses
    }
    return {
        key: reason
        for image_id, reason in reasons.items()
        for key in (*_names(image_id), image_id.lower())
    }


def _reason(image: Image) -> str:
    return _COMING if image.status in IN_FLIGHT else f"Glance has the image: status {image.status}"


def _names(image_id: str) -> tuple[str, ...]:
    return tuple(
        cache_name(spelling) for spelling in (image_id, image_id.lower(), image_id.upper())
    )


def restless(servers: Iterable[Server]) -> str:
    """Why a server may use a base that it does not name, or nothing.

    While a server is unshelved its task is soon "spawning", which every build has, too. One in
    ERROR may have died in a rebuild, which names the new image before the disk is made.
    """
    for server in servers:
        unshelved = server.status == "SHELVED_OFFLOADED" and server.task_state
        broken = server.status == "ERROR" and server.host
        task = any(word in server.task_state for word in _RESTLESS_TASKS)
        if server.status in _RESTLESS or unshelved or broken or task:
            state = server.task_state or server.status
            return f"server {server.id} is in {state} and may use any base: bring it to rest"
    return ""


def age(seconds: float) -> str:
    """A duration in seconds as people say it, in its two largest units, as ``1 d 2 h``."""
    parts = []
    rest = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def clean_up(
    options: Options,
    glance: Glance,
    disk: Disk,
    bases: Sequence[Base],
    images: Mapping[str, Image],
    now: float,
) -> Iterator[tuple[Base, Verdict]]:
    """Retires, restores and removes what of ``bases`` the evidence says, and tells of each.

    Raises where it cannot.

    ``images`` are all that Glance has, by id, hidden ones included, listed after ``bases`` were
    looked at; ``now`` is in seconds since the epoch. Nothing is asked while nothing could come of
    it, but in a dry run, which is a rehearsal. The lock is held only while something is done.
    """
    bases = [base for base in bases if base.image_id or base.retired or options.prune_unmarked]
    evidence = Evidence(now, options.prune_after, needed(images.values(), ()))
    waiting = [
        base for base in bases if judge(base, evidence).outcome is not Outcome.KEPT or base.retired
    ]
    fault = None
    if waiting or options.dry_run:
        try:
            evidence = _gathered(options, glance, disk, waiting, images, evidence)
        except LnImagesError as error:
            fault = error
    for base in bases:
        verdict = judge(base, evidence)
        if fault is not None and verdict.outcome not in (Outcome.KEPT, Outcome.RESTORED):
            verdict = Verdict(Outcome.KEPT, "it could not be asked whether anything needs it")
        if verdict.outcome is Outcome.PRUNED and not base.image_id and not options.prune_unmarked:
            verdict = Verdict(
                Outcome.KEPT,
                f"{verdict.reason}; its image is not known: --prune-unmarked removes it",
            )
        if verdict.outcome is not Outcome.KEPT and not options.dry_run:
            with disk.locked(options.timeout):
                verdict = disk.carry_out(base, verdict)
        yield base, verdict
    if options.dry_run and evidence.doubt:
        LOG.warning("nothing could be retired: %s", evidence.doubt)
    if fault is not None:
        raise fault


def _gathered(
    options: Options,
    glance: Glance,
    disk: Disk,
    waiting: Sequence[Base],
    images: Mapping[str, Image],
    known: Evidence,
) -> Evidence:
    """The evidence with all that can be asked.

    Raises ConfigurationError or TemporaryError where it cannot be.
    """
    if not glance.connection.is_administrator():
        raise ConfigurationError(
            "--prune needs a credential with the role admin: nothing was pruned"
        )
    # Both must say that an image is gone: some are in no listing, and a gateway that is ill answers
    # 404, too.
    gone = {base.image_id for base in waiting if base.image_id} - images.keys()
    unlisted = [
        Image(image_id, status="unlisted")
        for image_id in sorted(gone)
        if not glance.is_gone(image_id)
    ]
    servers, proof = nova.servers(glance.connection)
    disks = read_disks(options.instances_dirs)
    reasons = needed([*images.values(), *unlisted], servers)
    old = "" if proof or options.instances_dirs else _OLD_NOVA
    doubt = (
        restless(servers) or disks.doubt or old or _misnamed(servers, proof, images, disk, disks)
    )
    return replace(known, needed=reasons, disks=disks, opened=open_inodes(), doubt=doubt)


def _misnamed(
    servers: Iterable[Server], proof: bool, known: Iterable[str], disk: Disk, disks: Disks
) -> str:
    """Why a server may be backed by another base than the one it names, or nothing.

    It names an image that nobody here knows, or Nova leaves wrong names, which stay after an
    upgrade (LP#1732428, LP#1934094): that of the snapshot from which it was, or should have been,
    unshelved. Where the server's own disk is seen, it decides.
    """
    here = {image_id.lower() for image_id in known}
    for server in servers:
        if not server.image or server.id in disks.servers:
            continue
        if not proof and server.host:
            return f"{_OLD_NOVA}; that of server {server.id} is not seen"
        if server.image.lower() in here:
            continue
        names = [name + suffix for name in _names(server.image) for suffix in ("", ".retired")]
        may_use = "and may use any base: give --instances-dir with its disk"
        try:
            named = [
                name for name in names if (file := disk.entry(name)) and stat.S_ISREG(file.mode)
            ]
            snapshot_of = [disk.server_of(name) for name in named]
        except OSError:
            # What cannot be looked at is a result of its own.
            named, snapshot_of = [], []
        if not named:
            return f"server {server.id} names image {server.image}, which neither Glance nor the cache has, {may_use}"
        if server.id in snapshot_of:
            return f"server {server.id} names its own snapshot {server.image}, which Glance no longer has, {may_use}"
    return ""
