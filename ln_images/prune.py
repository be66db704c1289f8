"""What a clean-up may take: the policy, pure, and the gathering of its evidence."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ln_images import nova
from ln_images.instances import backing_names
from ln_images.model import Evidence, File, Image, LnImagesError, Outcome, Result, Server, Verdict
from ln_images.plan import cache_name

# States and tasks of a server (nova.api.openstack.common, nova.compute.task_states) in which its disk may
# be made from another image than the one it names.
_RESTLESS = frozenset({"RESCUE", "REBUILD"})
_RESTLESS_TASKS = ("rebuild", "unshelv", "rescu", "resize_finish")


def judge_orphan(image_id: str, file: File, evidence: Evidence) -> Verdict:
    """``pruned`` where nothing known can need the entry any more, else ``kept`` with the first reason.

    Nova renews the ctime of every base in use at each pass of its cache manager, and the removal of Glance's
    own name renews it, too: it tells how long nothing has used or released the entry (Nova,
    ``nova.virt.libvirt.imagecache``). A server that is being rescued, rebuilt or unshelved may use a base
    that its ``image`` does not name.
    """
    idle = evidence.now - file.changed
    if idle < evidence.prune_after:
        return Verdict(Outcome.KEPT, f"in use or released {age(idle)} ago, kept for {age(evidence.prune_after)}")
    if image_id in evidence.images:
        return Verdict(Outcome.KEPT, f"Glance has the image: status {evidence.images[image_id]}")
    for server in evidence.servers:
        if image_id.lower() in server.uses:
            return Verdict(Outcome.KEPT, f"server {server.id} was built from it")
    for server in evidence.servers:
        if _is_restless(server):
            state = server.task_state or server.status
            return Verdict(Outcome.KEPT, f"server {server.id} is in {state} and may use any base")
    if cache_name(image_id) in evidence.backed:
        return Verdict(Outcome.KEPT, f"{evidence.backed[cache_name(image_id)]} is backed by it")
    if evidence.unreadable:
        return Verdict(Outcome.KEPT, f"what {evidence.unreadable} is backed by cannot be told")
    return Verdict(Outcome.PRUNED, f"unused for {age(idle)}")


def _is_restless(server: Server) -> bool:
    # While a server is unshelved its task is soon "spawning", which every build has, too.
    unshelved = server.status == "SHELVED_OFFLOADED" and server.task_state
    return bool(server.status in _RESTLESS or unshelved or any(word in server.task_state for word in _RESTLESS_TASKS))


def age(seconds: float) -> str:
    """A duration in seconds as people say it, in its two largest units, as ``1 d 2 h``."""
    parts = []
    rest = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def prune(job: Any, orphans: Mapping[str, File], evidence: Evidence) -> tuple[list[Result], LnImagesError | None]:
    """Removes the orphans that nothing can need. Where something cannot be asked, it keeps all, and returns why."""
    fault = None
    try:
        evidence = _gathered(job, orphans, evidence)
    except LnImagesError as error:
        fault = error
    return [_settle_orphan(job, image_id, file, evidence, fault) for image_id, file in orphans.items()], fault


def _gathered(job: Any, orphans: Mapping[str, File], evidence: Evidence) -> Evidence:
    """Asks for more only while something would be pruned by what is known so far."""

    def doubtful(known: Evidence) -> list[str]:
        return [
            image_id
            for image_id, file in orphans.items()
            if judge_orphan(image_id, file, known).outcome is Outcome.PRUNED
        ]

    if ids := doubtful(evidence):
        evidence = replace(evidence, images=job.glance.statuses(ids))
    if doubtful(evidence):
        evidence = replace(evidence, servers=nova.servers(job.connection))
    if doubtful(evidence):
        backed, unreadable = backing_names(job.instances_dirs)
        evidence = replace(evidence, backed=backed, unreadable=unreadable)
    return evidence


def _settle_orphan(job: Any, image_id: str, file: File, evidence: Evidence, fault: LnImagesError | None) -> Result:
    image = Image(image_id, "", evidence.images.get(image_id, ""), "", file.size)
    verdict = judge_orphan(image_id, file, evidence)
    with job.uninterrupted():
        if verdict.outcome is Outcome.PRUNED and fault is not None:
            verdict = Verdict(Outcome.KEPT, "it could not be asked whether anything needs it")
        elif verdict.outcome is Outcome.PRUNED and not job.dry_run:
            verdict = job.disk.remove(image_id, file) or verdict
        if verdict.outcome is Outcome.KEPT and evidence.now - file.changed >= evidence.prune_after:
            verdict = replace(verdict, reason=f"{verdict.reason}; unused for {age(evidence.now - file.changed)}")
        return Result(image, verdict)
