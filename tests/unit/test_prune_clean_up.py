"""One pass of the clean-up on real files, with evidence that is late or incomplete."""

import re
from pathlib import Path
from typing import Any

import pytest

from ln_images.model import Image, LnImagesError, Reason, TemporaryError, cache_name
from ln_images.prune.clean_up import CleanUp, CleanUpOptions, clean_up
from ln_images.prune.evidence import MOST_AGE, Cloud, boot_time
from ln_images.prune.nodes import list_prune_metrics
from ln_images.prune.nova import ComputeHost
from ln_images.prune.rules import Policy
from ln_images.scan import MOST_BASES
from support.bases import OneImageGlance, make_base, write_report
from support.mounts import bound
from support.node import REFERENCE, SCHEMA, needs_root

ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
OTHER = "b0000000-0000-4000-8000-000000000000"
NAME, OTHER_NAME = cache_name(ID), cache_name(OTHER)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return where the directories lie, with a report that is newer than every mark."""
    return make_directories(tmp_path)


def make_directories(place: Path) -> Path:
    """Make a store, a cache, and a report that is newer than every mark."""
    for name in ("images", "cache"):
        (place / name).mkdir()
    write_report(place / "reports", "compute-1")
    return place


def no_image(image_id: str) -> bool:
    """Say that Glance does not have an image."""
    del image_id
    return False


def run(place: Path, has_image: Any = no_image, age: float = 0, *, images: Any = ()) -> CleanUp:
    """Run a pass that waits for nothing, and that began ``age`` seconds ago."""
    options = CleanUpOptions(
        images_dir=str(place / "images"),
        cache_dir=str(place / "cache"),
        reports_dir=str(place / "reports"),
        policy=Policy(after=0, report_age=10800, unmarked=True),
    )
    listed = {image: Image(id=image, status="active", size=5) for image in images}
    cloud = Cloud([ComputeHost("compute-1", "")], listed, OneImageGlance(has_image))
    return clean_up(options, lambda: cloud, boot_time() - age)


def outcomes(result: CleanUp) -> dict[str, str]:
    """Return the reason codes of a pass by cache name."""
    return {each.cache_name: each.verdict.reason.value for each in result.pass_.results}


def test_late_evidence_takes_nothing_and_restores(place: Path) -> None:
    """After five minutes nothing is marked, retired or removed."""
    fresh = make_base(place / "cache", OTHER)
    old = make_base(place / "cache", ID, unused_since=1.0)
    # Glance cannot be queried about this one by itself.
    unmarked = make_base(place / "cache", "unmarked", marked=False, unused_since=1.0)
    used = make_base(place / "cache", "used", retired=True)
    write_report(place / "reports", "compute-1", cache_name("used"))
    assert outcomes(run(place, age=MOST_AGE + 1)) == {
        fresh.name: "evidence_too_old",
        old.name: "evidence_too_old",
        unmarked.name: "evidence_too_old",
        cache_name("used"): "in_use",
    }
    names = {path.name for path in (place / "cache").iterdir()}
    assert names == {NAME, OTHER_NAME, unmarked.name, cache_name("used")}
    assert not used.exists()


def test_what_is_needed_comes_back_before_anything_goes(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass that is interrupted has restored bases first, whatever their names are."""
    first, last = sorted(["one", "two"], key=cache_name)
    make_base(place / "cache", first, marked=False, unused_since=1.0)
    make_base(place / "cache", last, marked=False, retired=True)
    write_report(place / "reports", "compute-1", cache_name(last))
    caplog.set_level("INFO")
    result = run(place)
    assert [line.split(":")[0] for line in caplog.messages] == ["restored", "retired"]
    assert list(outcomes(result)) == [cache_name(first), cache_name(last)]


def test_there_is_time_left_to_act_after_the_queries(place: Path) -> None:
    """An image is not queried by itself so late that nothing could be done any more."""
    make_base(place / "cache", ID, unused_since=1.0)
    assert outcomes(run(place, age=151)) == {NAME: "evidence_too_old"}
    assert outcomes(run(place, age=140)) == {NAME: "unused"}


def test_an_image_that_is_in_no_list_is_queried_by_itself(place: Path) -> None:
    """Its base is restored, and its mark goes."""
    make_base(place / "cache", ID, retired=True, unused_since=1.0)
    result = run(place, has_image=[ID].__contains__)
    assert outcomes(result) == {NAME: "image_exists"}
    assert [path.name for path in (place / "cache").iterdir()] == [NAME]


def test_if_an_image_cannot_be_queried_nothing_goes(place: Path) -> None:
    """The pass ends with the error, and what is needed comes back all the same."""
    make_base(place / "cache", ID, unused_since=1.0)
    make_base(place / "cache", OTHER, retired=True, unused_since=1.0)
    make_base(place / "cache", "used", retired=True)
    write_report(place / "reports", "compute-1", cache_name("used"))
    error = TemporaryError("Glance answers badly; wait")

    def fail(image_id: str) -> bool:
        assert image_id in (ID, OTHER)
        raise error

    result = run(place, has_image=fail)
    codes = {NAME: "blocked", OTHER_NAME: "blocked", cache_name("used"): "in_use"}
    assert outcomes(result) == codes
    assert result.pass_.error is error
    assert result.is_blocked


@needs_root
@pytest.mark.parametrize("ids", [[ID], [ID, OTHER]])
def test_a_file_system_that_dies_ends_the_pass(tmp_path: Path, ids: list[str]) -> None:
    """The error is temporary, between two decisions and directly before an action."""
    with bound(tmp_path) as process:
        directories = make_directories(tmp_path / "bound")
        for image_id in ids:
            make_base(directories / "cache", image_id, unused_since=1.0)

        def die(image_id: str) -> bool:
            assert image_id in ids
            process.kill()
            process.wait()
            return False

        with pytest.raises(TemporaryError, match="does not respond; remount it"):
            run(directories, has_image=die)
    names = {path.name for path in (tmp_path / "real" / "cache").iterdir()}
    assert names == {cache_name(image_id) for image_id in ids}


def test_a_base_that_the_scan_does_not_reach_is_restored(place: Path) -> None:
    """A node can create more names than are looked at. What a report names is looked up."""
    cache = place / "cache"
    names = [cache_name(f"used {number}") for number in range(30)]
    for number in range(MOST_BASES + 30):
        (cache / cache_name(str(number))).touch()
    for name in names:
        (cache / f"{name}.retired").touch()
    write_report(place / "reports", "compute-1", *names)
    run(place)
    assert [name for name in names if not (cache / name).exists()] == []


def test_a_base_that_comes_back_is_not_lost(place: Path) -> None:
    """A base is lost only if it is not there on a second look either."""
    write_report(place / "reports", "compute-1", NAME, OTHER_NAME)
    idle = "c0000000-0000-4000-8000-000000000000"
    make_base(place / "cache", idle, unused_since=1.0)

    def make_it(image_id: str) -> bool:
        assert image_id == idle
        make_base(place / "cache", ID)
        return False

    result = run(place, has_image=make_it)
    assert outcomes(result) == {cache_name(idle): "unused", OTHER_NAME: "base_is_missing"}


def test_many_lost_bases_have_few_lines_in_the_log(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A false report can name thousands of bases that do not exist. Each is in the report."""
    names = [f"{number:040x}" for number in range(3000)]
    lost = [{"server": f"server-{name}", "base": name} for name in names]
    write_report(place / "reports", "compute-1", *names, lost=lost)
    result = run(place)
    assert outcomes(result) == dict.fromkeys(names, "base_is_missing")
    assert all(
        f"server-{each.cache_name}" in (each.verdict.sentence or "")
        for each in result.pass_.results
    )
    assert len(caplog.records) == 101
    assert caplog.records[-1].getMessage() == "2900 more bases are lost or failed; read the report"


@pytest.mark.parametrize(
    ("images", "in_store", "marked", "message"),
    [
        ([OTHER], [ID], False, "Glance knows none of the 1 images"),
        ([], [ID], False, "Glance knows none of the 1 images"),
        ([OTHER], [OTHER, ID], False, None),
        # A marked base proves that it is the same cloud, and that the volume is mounted.
        ([ID], [OTHER], True, None),
        ([OTHER], [], True, None),
        ([OTHER], [], False, "Glance has active images and none of them has a file in"),
        ([], [], False, None),
    ],
)
def test_another_clouds_images_prove_nothing(
    place: Path, images: list[str], in_store: list[str], marked: bool, message: str | None
) -> None:
    """Nothing may go if store, cache and cloud do not belong together."""
    for image_id in in_store:
        (place / "images" / image_id).touch()
    idle = make_base(place / "cache", "idle", marked=False, unused_since=1.0)
    if marked:
        make_base(place / "cache", ID)
    result = run(place, images=images)
    if message is None:
        assert result.pass_.error is None
        assert outcomes(result)[idle.name] == "unused"
    else:
        assert result.pass_.error is not None
        assert result.pass_.error.message.startswith(message)
        assert outcomes(result) == {idle.name: "blocked"}


def test_a_store_that_has_moved_away_is_a_warning(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Marked bases prove that the volume is mounted, so the clean-up goes on."""
    make_base(place / "cache", ID)
    assert run(place, images=[OTHER]).pass_.error is None
    assert "are all images in another store now?" in caplog.text


def test_the_most_severe_error_is_that_of_the_pass(place: Path) -> None:
    """Status 2 goes before 75."""
    options = CleanUpOptions(
        images_dir=str(place / "images"),
        cache_dir=str(place / "cache"),
        reports_dir=str(place / "nowhere"),
        policy=Policy(after=0, report_age=10800),
    )

    def fail() -> Cloud:
        raise TemporaryError("Nova cannot be queried; wait")

    error: LnImagesError | None = clean_up(options, fail, boot_time()).pass_.error
    assert error is not None
    assert error.exit_code == 2


def test_the_reference_has_every_metric_with_its_labels(place: Path) -> None:
    """The table of the reference names each metric that a pass writes, with its own labels."""
    write_report(place / "reports", "compute-1", NAME)
    result = run(place)
    section = REFERENCE.partition("`ln-images-prune` writes these:")[2].partition("\n\n`")[0]
    rows = dict(re.findall(r"^\| `ln_images_(\w+)\{([\w, ]+)\}", section, re.MULTILINE))
    metrics = list_prune_metrics(result.pass_, result.nodes, result.is_blocked)
    labels = {metric.name: ", ".join(["cache_dir", *metric.labels]) for metric in metrics}
    assert labels == rows


def test_hosts_that_nova_does_not_know_have_no_metrics(place: Path) -> None:
    """A node can report under thousands of names, and Prometheus would keep each for weeks."""
    write_report(place / "reports", "compute-7")
    result = run(place)
    metrics = list_prune_metrics(result.pass_, result.nodes, result.is_blocked)
    assert [node.host for node in result.nodes] == ["compute-1", "compute-7"]
    assert {metric.labels["host"] for metric in metrics if "host" in metric.labels} == {"compute-1"}


def test_every_reason_code_is_in_the_schema_and_in_the_reference() -> None:
    """Programs compare these codes."""
    codes = {reason.value for reason in Reason}
    schema: Any = SCHEMA.schema
    assert set(schema["$defs"]["reason_code"]["enum"]) == codes
    assert {code for code in codes if f"\n| `{code}` |" not in REFERENCE} == set()
