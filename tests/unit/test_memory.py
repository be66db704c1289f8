"""What a process remembers between its passes."""

import logging
import stat
import time

import pytest

from ln_images.memory import (
    LogOnChange,
    NewRepairs,
    RemovedLinks,
    RepeatedRepairs,
    StandingProblems,
    VerdictCache,
)
from ln_images.model import CHANGES, FAULTS, File, Outcome, Owner, Reason, Result, Verdict

FILE = File(
    mode=stat.S_IFREG | 0o640,
    inode=11,
    device=1,
    links=1,
    owner=Owner(0, 0),
    size=1000,
    changed=0.0,
    modified=0.0,
)


def result_of(
    outcome: Outcome,
    reason: Reason = Reason.DISK_FORMAT,
    *,
    image_id: str | None = "a",
    sentence: str | None = None,
    status: str | None = "active",
) -> Result:
    """Return the result of one image."""
    return Result(
        cache_name=f"name of {image_id}",
        verdict=Verdict(outcome, reason, sentence),
        id=image_id,
        status=status,
    )


class Clock:
    """A monotonic clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def remembers(result: Result, file: File = FILE) -> bool:
    """Return whether the cache remembers a result from one pass to the next."""
    cache = VerdictCache()
    assert cache.recall({"a": file}) == {}
    cache.remember({"a": file}, [result])
    recalled = cache.recall({"a": file})
    assert recalled in ({}, {"a": result})
    return bool(recalled)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_what_gets_no_link_is_remembered(outcome: Outcome) -> None:
    """Skipped and refused images need no query while their files do not change; others do."""
    assert remembers(result_of(outcome)) is (outcome in (Outcome.SKIPPED, Outcome.REFUSED))


@pytest.mark.parametrize("status", ["deactivated", "killed", None])
def test_an_image_that_may_become_active_is_not_remembered(status: str | None) -> None:
    """A deactivated image can be activated again, and its file does not change then."""
    assert not remembers(result_of(Outcome.SKIPPED, Reason.STATUS, status=status))


@pytest.mark.parametrize(("age", "expected"), [(0, False), (3500, False), (3700, True)])
def test_a_file_that_glance_does_not_know_is_queried_for_an_hour(age: int, expected: bool) -> None:
    """A lagging replica of Glance's database may list the image later."""
    file = FILE._replace(modified=time.time() - age)
    unknown = result_of(Outcome.SKIPPED, Reason.UNKNOWN_TO_GLANCE, status=None)
    assert remembers(unknown, file) is expected


@pytest.mark.parametrize(
    "changed",
    [
        FILE._replace(modified=FILE.modified + 1),
        FILE._replace(inode=12),
        FILE._replace(size=1001),
        FILE._replace(links=2),
        FILE._replace(owner=Owner(1, 0)),
    ],
)
def test_a_file_that_has_changed_is_judged_anew(changed: File) -> None:
    """A verdict is about one file in one state."""
    cache = VerdictCache()
    cache.recall({})
    cache.remember({"a": FILE}, [result_of(Outcome.REFUSED)])
    assert cache.recall({"a": changed}) == {}
    assert cache.recall({}) == {}
    assert list(cache.recall({"a": FILE})) == ["a"]


def test_our_own_mark_on_a_refused_file_changes_nothing() -> None:
    """A mark changes the file's ctime after it was looked at; the verdict holds all the same."""
    cache = VerdictCache()
    cache.recall({})
    cache.remember({"a": FILE}, [result_of(Outcome.REFUSED)])
    assert list(cache.recall({"a": FILE._replace(changed=FILE.changed + 1)})) == ["a"]


def test_a_result_without_a_file_is_not_remembered() -> None:
    """Without a file that was looked at before, nothing shows that the file has not changed."""
    cache = VerdictCache()
    cache.recall({})
    cache.remember({"b": FILE}, [result_of(Outcome.REFUSED)])
    cache.remember({"b": FILE}, [result_of(Outcome.REFUSED, image_id=None)])
    assert cache.recall({"a": FILE, "b": FILE}) == {}


def test_a_verdict_is_forgotten_after_ten_minutes() -> None:
    """Glance may say something else about an image by then, even if its file is the same."""
    clock = Clock()
    cache = VerdictCache(clock)
    cache.recall({})
    cache.remember({"a": FILE}, [result_of(Outcome.REFUSED)])
    clock.now += 599
    assert cache.recall({"a": FILE})
    # What is recalled is remembered again, which does not prolong it.
    cache.remember({"a": FILE}, [result_of(Outcome.REFUSED)])
    clock.now += 1
    assert cache.recall({"a": FILE}) == {}


@pytest.mark.parametrize("outcome", Outcome)
def test_faults_and_refusals_and_occupied_names_are_problems(outcome: Outcome) -> None:
    """What somebody should look at is logged, and nothing else."""
    is_problem = outcome in FAULTS or outcome in (Outcome.REFUSED, Outcome.OCCUPIED)
    result = result_of(outcome)
    assert StandingProblems().list_new([result], partial=False) == ([result] if is_problem else [])


def test_a_problem_is_new_once_for_as_long_as_it_stands() -> None:
    """A problem is new again if its sentence has changed, or after a full pass without it."""
    problems = StandingProblems()
    first = result_of(Outcome.DAMAGED, sentence="999 of 1000 bytes")
    second = result_of(Outcome.DAMAGED, sentence="998 of 1000 bytes")
    assert problems.list_new([first], partial=False) == [first]
    assert problems.list_new([first], partial=False) == []
    assert problems.list_new([second], partial=False) == [second]
    assert problems.list_new([], partial=False) == []
    assert problems.list_new([second], partial=False) == [second]


def test_a_partial_pass_leaves_other_problems_standing() -> None:
    """A partial pass says nothing about the images that it is not over."""
    problems = StandingProblems()
    first = result_of(Outcome.FAILED)
    other = result_of(Outcome.FAILED, image_id="b")
    assert problems.list_new([first], partial=False) == [first]
    assert problems.list_new([other], partial=True) == [other]
    assert problems.list_new([first, other], partial=False) == []


def test_bases_without_an_image_are_told_apart() -> None:
    """A problem belongs to a cache name, because the image of a base may not be known."""
    broken = [
        Result(cache_name=name, verdict=Verdict(Outcome.FAILED, Reason.SYSTEM_ERROR))
        for name in ("x", "y")
    ]
    assert StandingProblems().list_new(broken, partial=False) == broken


def repaired(image_id: str) -> Result:
    """Return the result of a link that was repaired."""
    return result_of(Outcome.REPAIRED, Reason.WRONG_ATTRIBUTES, image_id=image_id)


def test_a_link_that_is_repaired_twice_is_found_once() -> None:
    """The first link that is repaired again is returned, and then none any more."""
    repairs = RepeatedRepairs()
    assert repairs.find_first([repaired("a"), repaired("b")]) is None
    assert repairs.find_first([repaired("c")]) is None
    assert repairs.find_first([repaired("b"), repaired("a")]) == "name of a"
    assert repairs.find_first([repaired("a"), repaired("c")]) is None


def test_other_changes_are_no_repeated_repairs() -> None:
    """A link that is made again was not repaired."""
    repairs = RepeatedRepairs()
    linked = result_of(Outcome.LINKED, Reason.NO_LINK_YET)
    assert [repairs.find_first([linked]) for _ in range(3)] == [None] * 3


def test_links_that_were_removed_are_counted_when_that_starts() -> None:
    """As long as each pass finds removed links, only the first one counts them."""
    removed_links = RemovedLinks()
    removed = [
        result_of(Outcome.LINKED, Reason.LINK_WAS_REMOVED, image_id=image_id)
        for image_id in ("a", "b")
    ]
    others = [result_of(outcome, Reason.NO_LINK_YET) for outcome in CHANGES]
    passes = [others, removed, removed[:1], [], removed[:1]]
    assert [removed_links.count_if_new(results) for results in passes] == [0, 2, 0, 0, 1]


def test_a_repair_is_new_once_in_a_process() -> None:
    """A link that is repaired in every pass is logged once."""
    repairs = NewRepairs()
    first, second = repaired("a"), repaired("b")
    linked = result_of(Outcome.LINKED, Reason.NO_LINK_YET)
    assert repairs.list_new([first, linked]) == [first]
    assert repairs.list_new([]) == []
    assert repairs.list_new([first, second]) == [second]


def test_a_line_is_logged_only_if_it_differs(caplog: pytest.LogCaptureFixture) -> None:
    """A line that every pass would repeat is logged once, and then that it is over."""
    logger = logging.getLogger("tests.memory")
    log = LogOnChange(logger, logging.WARNING)
    with caplog.at_level(logging.INFO):
        for line in (None, "100%", "100%", "b", "100%", None, None, "100%"):
            log.log(line)
    logged = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert logged == [
        (logging.WARNING, "100%"),
        (logging.WARNING, "b"),
        (logging.WARNING, "100%"),
        (logging.INFO, "over: 100%"),
        (logging.WARNING, "100%"),
    ]
