"""Gather what the clean-up must know before it takes anything from anybody.

That is what the nodes reported, the compute hosts that Nova knows, and the images that Glance has.
A source that fails blocks the clean-up and takes nothing from the others: a base that a report
names is restored even if neither Nova nor Glance can be queried.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ln_images.glance import Glance
from ln_images.model import (
    Base,
    ConfigurationError,
    Image,
    LnImagesError,
    cache_name,
)
from ln_images.prune.nova import ComputeHost, list_hosts
from ln_images.prune.reports import Reports
from ln_images.prune.rules import Policy, Situation, list_blockers
from ln_images.session import Connection

# We do not act on evidence that is older than this, in seconds.
MOST_AGE = 300
# An image is queried by itself only within so many seconds, so that there is time left to act.
_QUERY_SECONDS = 150


class Clock:
    """The age of evidence. It counts the time that the machine was suspended as well."""

    def __init__(self) -> None:
        self._start = time.clock_gettime(time.CLOCK_BOOTTIME)

    def age(self) -> float:
        """Return how many seconds ago the evidence began to be gathered."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._start


class Images:
    """The images that Glance lists, by the names of their bases.

    MySQL compares ids without regard to case, and so do Nova and Glance there. The name of a base
    comes from one spelling of the id.
    """

    def __init__(self, images: Iterable[Image]) -> None:
        self._statuses: dict[str, str] = {}
        for image in images:
            status = image.status or "unknown"
            self._statuses[image.id.lower()] = status
            for spelling in (image.id.lower(), image.id.upper(), image.id):
                self._statuses[cache_name(spelling)] = status

    def status(self, base: Base) -> str | None:
        """Return the status of a base's image, or None if Glance does not list it."""
        by_id = None if base.image_id is None else self._statuses.get(base.image_id.lower())
        return by_id or self._statuses.get(base.name)


class Cloud(NamedTuple):
    """What the services of the cloud answer.

    ``images`` are all that Glance lists, by id. ``has_image`` queries it for one image, and raises
    LnImagesError if that is not possible.
    """

    hosts: Sequence[ComputeHost]
    images: Mapping[str, Image]
    has_image: Callable[[str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was gathered. ``cloud`` is None if it could not be queried.

    ``errors`` are why a part is missing. Then the situation has a blocker.
    """

    clock: Clock
    reports: Reports
    images: Images
    situation: Situation
    cloud: Cloud | None
    errors: Sequence[LnImagesError] = ()

    @property
    def hosts(self) -> Sequence[ComputeHost]:
        """The compute hosts that Nova knows; none if it did not answer."""
        return [] if self.cloud is None else self.cloud.hosts

    def has_image(self, image_id: str) -> bool:
        """Return whether Glance, queried for this one image, has it. Raises LnImagesError."""
        return self.cloud is None or self.cloud.has_image(image_id)

    def has_time_to_query(self) -> bool:
        """Return whether there is time to query Glance for one more image."""
        return self.clock.age() < _QUERY_SECONDS

    def with_error(self, error: LnImagesError) -> "Evidence":
        """Return this evidence, of which a part has failed now, so that nothing may go."""
        situation = replace(self.situation, blocker=error.message)
        return replace(self, situation=situation, errors=[*self.errors, error])


def query_cloud(connection: Connection, admin_role: str, region_names: Sequence[str]) -> Cloud:
    """Query Glance and Nova. Raises LnImagesError if one of them cannot be queried."""
    if not connection.has_role(admin_role):
        raise ConfigurationError(
            f"the credential does not have the role {admin_role}, so Glance hides images from it;"
            " use another credential, or name the role with --admin-role"
        )
    glance = Glance(connection, admin_role)
    return Cloud(
        hosts=list_hosts(connection, region_names),
        images=glance.list_all(),
        has_image=glance.has_image,
    )


def gather(
    *,
    clock: Clock,
    reports: Reports,
    query: Callable[[], Cloud],
    policy: Policy,
    bases: Sequence[Base],
    ids_in_store: Collection[str],
    now: float,
) -> Evidence:
    """Query the cloud, and return all evidence. ``now`` is in seconds since the epoch.

    The directories and the reports were read before. A failure is in ``errors`` and blocks.
    """
    errors: list[LnImagesError] = [] if reports.error is None else [reports.error]
    errors += [
        ConfigurationError(
            f"--ignore-host {host}: this host has a report, so it uses the cache; remove the option"
        )
        for host in sorted(policy.ignored_hosts & reports.hosts)
    ]
    cloud: Cloud | None = None
    try:
        answers = query()
        _refuse_other_cloud(answers.images, bases, ids_in_store)
        cloud = answers
    except LnImagesError as error:
        errors.append(error)
    blockers = [error.message for error in errors]
    begun: dict[str, float] = {}
    if cloud is not None:
        blockers += list_blockers(cloud.hosts, reports, policy, now)
        begun = {
            host.name: reports.readable[host.name].begun
            for host in cloud.hosts
            if host.name in reports.readable
        }
    return Evidence(
        clock=clock,
        reports=reports,
        images=Images(cloud.images.values() if cloud is not None else ()),
        situation=Situation(blocker=summarize(blockers), reports_begun=begun),
        cloud=cloud,
        errors=errors,
    )


def summarize(blockers: Sequence[str]) -> str | None:
    """Return the first blocker and how many more there are, or None if there is none."""
    if not blockers:
        return None
    more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
    return f"{blockers[0]}{more}"


def _refuse_other_cloud(
    images: Mapping[str, Image], bases: Sequence[Base], ids_in_store: Collection[str]
) -> None:
    """Raise ConfigurationError if Glance's images cannot be those of this store."""
    marked_ids = {base.image_id for base in bases if base.image_id is not None}
    if ids_in_store and not images.keys() & {*ids_in_store, *marked_ids}:
        raise ConfigurationError(
            f"Glance knows none of the {len(ids_in_store)} images that have a file here; check"
            " OS_AUTH_URL and OS_REGION_NAME (another cloud's?) and --images-dir"
        )
    has_active = any(image.status == "active" and image.size for image in images.values())
    if not ids_in_store and not marked_ids and has_active:
        raise ConfigurationError(
            "Glance has active images and none of them has a file here; mount the volume of the"
            " store, or correct --images-dir"
        )
