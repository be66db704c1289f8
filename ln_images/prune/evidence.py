"""Gather what the clean-up must know before it takes a base from anybody.

The evidence has three parts: what the nodes reported, the compute hosts that Nova knows, and the
images that Glance has. If a part is missing, no base may be retired or removed. The other parts
still count: a base that a report names is restored even if neither Nova nor Glance can be queried.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ln_images.glance import Glance
from ln_images.model import Base, ConfigurationError, Image, LnImagesError, cache_name
from ln_images.prune.nova import ComputeHost, list_hosts
from ln_images.prune.reports import Reports
from ln_images.prune.rules import Policy, list_blockers
from ln_images.same_cloud import Answer, require_same_cloud
from ln_images.scan import Scan
from ln_images.session import Connection
from ln_images.store import Store

# We do not act on evidence that is older than this, in seconds.
MOST_AGE = 300
# After so many seconds we no longer query Glance about single images, so that time is left to act.
_QUERY_SECONDS = 150


class Cloud(NamedTuple):
    """What the cloud answers: all compute hosts, and all images by id.

    ``glance`` can be queried about one more image.
    """

    hosts: Sequence[ComputeHost]
    images: Mapping[str, Image]
    glance: Glance


@dataclass(slots=True, kw_only=True)
class Evidence:
    """All that was gathered.

    ``start`` is when that began (:func:`boot_time`). ``cloud`` is None if it could not be queried,
    or if it is not the cloud of this store and cache. ``image_statuses`` has the status of each
    image that Glance lists, by the names that its base can have and by its id in lower case.
    ``reports_begun`` says for each compute host when its report was begun, in seconds since the
    epoch. ``blockers`` are the reasons why no base may be retired or removed. ``errors`` say why a
    part is missing, and block as well. ``warning`` blocks nothing, and belongs in the log.
    """

    start: float
    reports: Reports
    cloud: Cloud | None = None
    image_statuses: Mapping[str, str] = field(default_factory=dict)
    reports_begun: Mapping[str, float] = field(default_factory=dict)
    blockers: Sequence[str] = ()
    errors: list[LnImagesError] = field(default_factory=list)
    warning: str | None = None

    @property
    def hosts(self) -> Sequence[ComputeHost]:
        """Return the compute hosts that Nova knows; none if the cloud could not be queried."""
        return [] if self.cloud is None else self.cloud.hosts

    @property
    def blocker(self) -> str | None:
        """Return the first reason why no base may be removed, and how many more there are.

        Return None if there is no reason.
        """
        reasons = [*(error.message for error in self.errors), *self.blockers]
        if len(reasons) > 1:
            return f"{reasons[0]} (and {len(reasons) - 1} more)"
        return reasons[0] if reasons else None

    def is_too_old(self) -> bool:
        """Return whether so much time has passed that somebody may need a base by now."""
        return boot_time() - self.start > MOST_AGE

    def has_time_to_query(self) -> bool:
        """Return whether there is time to query Glance about one more image."""
        return boot_time() - self.start < _QUERY_SECONDS

    def image_status(self, base: Base) -> str | None:
        """Return the status of a base's image, or None if Glance does not list it."""
        status = self.image_statuses.get(base.name)
        if status is None and base.image_id is not None:
            status = self.image_statuses.get(base.image_id.lower())
        return status

    def has_image(self, image_id: str) -> bool:
        """Return whether Glance, queried about this one image, has it. Raises LnImagesError."""
        if self.cloud is None:
            # It cannot be queried, so the image may exist.
            return True
        return self.cloud.glance.has_image(image_id)


def boot_time() -> float:
    """Return for how many seconds the machine has been up, even if it was suspended meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def query_cloud(connection: Connection, admin_role: str, region_names: Sequence[str]) -> Cloud:
    """Query Glance and Nova. Raises LnImagesError if one of them cannot be queried."""
    if not connection.has_role(admin_role):
        raise ConfigurationError(
            f"the credential does not have the role {admin_role}, so Glance hides images from it;"
            " use another credential, or name the role with --admin-role"
        )
    glance = Glance(connection, admin_role)
    hosts = list_hosts(connection, region_names)
    return Cloud(hosts, glance.list_all(), glance)


def gather(
    *,
    store: Store,
    on_disk: Scan,
    reports: Reports,
    query: Callable[[], Cloud],
    policy: Policy,
    start: float,
    now: float,
) -> Evidence:
    """Query the cloud, and return all evidence. ``now`` is in seconds since the epoch.

    The directories and the reports were read before. Whatever goes wrong is in ``errors``.
    """
    evidence = Evidence(start=start, reports=reports)
    if reports.error is not None:
        evidence.errors.append(reports.error)
    for host in sorted(policy.ignored_hosts & reports.hosts):
        evidence.errors.append(
            ConfigurationError(
                f"--ignore-host {host}: this host has a report, so it uses the cache; remove the"
                " option"
            )
        )
    try:
        cloud = query()
        answer = Answer(cloud.images, is_complete=True)
        evidence.warning = require_same_cloud(store, on_disk, [], answer, cloud.glance)
    except LnImagesError as error:
        evidence.errors.append(error)
        return evidence
    evidence.cloud = cloud
    evidence.image_statuses = _index_statuses(cloud.images.values())
    evidence.blockers = list_blockers(cloud.hosts, reports, policy, now)
    evidence.reports_begun = {
        host.name: reports.readable[host.name].begun
        for host in cloud.hosts
        if host.name in reports.readable
    }
    return evidence


def _index_statuses(images: Iterable[Image]) -> dict[str, str]:
    """Return the status of each image by its id in lower case, and by the names of its base.

    MySQL compares ids without regard to case, and so do Nova and Glance there. The name of a base
    is the SHA-1 of one spelling of the id.
    """
    statuses: dict[str, str] = {}
    for image in images:
        status = image.status or "unknown"
        statuses[image.id.lower()] = status
        for spelling in (image.id.lower(), image.id.upper(), image.id):
            statuses[cache_name(spelling)] = status
    return statuses
