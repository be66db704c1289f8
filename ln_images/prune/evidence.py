"""Gather what the clean-up must know before it takes anything from anybody.

That is what the nodes reported, the compute hosts that Nova knows, and the images that Glance has.
A source that fails blocks the clean-up and takes nothing from the others: a base that a report
names is restored even if neither Nova nor Glance can be queried.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

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

    def __init__(self, images: Collection[Image]) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was gathered. ``hosts`` is None if Nova could not be queried.

    ``has_image`` queries Glance for one image.
    """

    clock: Clock
    reports: Reports
    images: Images
    situation: Situation
    has_image: Callable[[str], bool]
    hosts: Sequence[ComputeHost] | None = None
    errors: Sequence[LnImagesError] = ()

    def with_error(self, error: LnImagesError) -> "Evidence":
        """Return this evidence, of which a part has failed now, so that nothing may go."""
        situation = replace(self.situation, blocker=error.message)
        return replace(self, situation=situation, errors=[*self.errors, error])

    def has_time_to_query(self) -> bool:
        """Return whether there is time to query Glance for one more image."""
        return self.clock.age() < _QUERY_SECONDS


def gather(
    *,
    clock: Clock,
    reports: Reports,
    connect: Callable[[], Connection],
    admin_role: str,
    region_names: Sequence[str],
    policy: Policy,
    bases: Sequence[Base],
    ids_in_store: Collection[str],
    now: float,
) -> Evidence:
    """Query Nova and Glance, and return all evidence. ``now`` is in seconds since the epoch.

    The directories and the reports were read before. A failure is in ``errors`` and blocks.
    """
    errors: list[LnImagesError] = [] if reports.error is None else [reports.error]
    errors += [
        ConfigurationError(
            f"--ignore-host {host}: this host has a report, so it uses the cache; remove the option"
        )
        for host in sorted(policy.ignored_hosts & reports.hosts)
    ]
    images: Mapping[str, Image] = {}
    hosts: Sequence[ComputeHost] | None = None
    has_image: Callable[[str], bool] = _refuse_query
    try:
        connection = connect()
        glance = Glance(connection, admin_role)
        images = _list_images(glance, admin_role, bases, ids_in_store)
        has_image = glance.has_image
        hosts = list_hosts(connection, region_names)
    except LnImagesError as error:
        errors.append(error)
    blockers = [error.message for error in errors]
    if hosts is not None:
        blockers += list_blockers(hosts, reports, policy, now)
    begun = {
        host.name: reports.readable[host.name].begun
        for host in hosts or ()
        if host.name in reports.readable
    }
    return Evidence(
        clock=clock,
        reports=reports,
        images=Images(images.values()),
        situation=Situation(blocker=summarize(blockers), reports_begun=begun),
        has_image=has_image,
        hosts=hosts,
        errors=errors,
    )


def summarize(blockers: Sequence[str]) -> str | None:
    """Return the first blocker and how many more there are, or None if there is none."""
    if not blockers:
        return None
    more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
    return f"{blockers[0]}{more}"


def _refuse_query(image_id: str) -> bool:
    raise AssertionError(f"Glance is not queried for {image_id} while the clean-up is blocked")


def _list_images(
    glance: Glance, admin_role: str, bases: Sequence[Base], ids_in_store: Collection[str]
) -> Mapping[str, Image]:
    """Return every image. Raises ConfigurationError if they cannot be those of this store."""
    if not glance.connection.has_role(admin_role):
        raise ConfigurationError(
            f"the credential does not have the role {admin_role}, so Glance hides images from it;"
            " use another credential, or name the role with --admin-role"
        )
    images = glance.list_all()
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
    return images
