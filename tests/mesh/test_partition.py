"""Are we cut off? Crashes one by one are not a partition; many at once, or everyone, are."""

from __future__ import annotations

from mesh.messages import Left, MemberDown, MemberUp
from mesh.partition import PartitionWatch
from tests.mesh.swim_play import record


def _watch(count: int) -> PartitionWatch:
    watch = PartitionWatch()
    for number in range(count - 1):
        watch.note(MemberUp(record(f"n{number}")), 0.0)
    return watch


def _lose(watch: PartitionWatch, *numbers: int, now: float) -> None:
    for number in numbers:
        watch.note(MemberDown(record(f"n{number}"), "a"), now)


def test_a_whole_mesh_is_not_partitioned() -> None:
    standing = _watch(5).standing(1.0)
    assert (standing.live, standing.last_known) == (5, 5)
    assert not standing.is_partitioned and not standing.is_minority


def test_one_crash_is_a_crash() -> None:
    watch = _watch(5)
    _lose(watch, 0, now=10.0)
    standing = watch.standing(11.0)
    assert (standing.live, standing.last_known) == (4, 5)
    assert not standing.is_partitioned


def test_losing_many_at_once_is_a_partition_and_half_is_no_majority() -> None:
    watch = _watch(6)
    _lose(watch, 0, 1, now=10.0)
    assert watch.standing(11.0).is_partitioned and not watch.standing(11.0).is_minority
    _lose(watch, 2, now=14.0)
    assert watch.standing(15.0).is_minority


def test_losing_everyone_is_a_partition_even_of_two() -> None:
    watch = _watch(2)
    _lose(watch, 0, now=10.0)
    assert watch.standing(11.0).is_minority


def test_losses_far_apart_are_crashes() -> None:
    watch = _watch(8)
    _lose(watch, 0, now=10.0)
    _lose(watch, 1, now=60.0)
    assert not watch.standing(61.0).is_partitioned


def test_a_few_of_very_many_are_not_a_partition() -> None:
    watch = _watch(100)
    _lose(watch, 0, 1, 2, now=10.0)
    assert not watch.standing(11.0).is_partitioned


def test_who_returns_or_leaves_is_not_lost_and_who_stays_away_is_given_up() -> None:
    watch = _watch(6)
    _lose(watch, 0, 1, 2, now=10.0)
    watch.note(MemberUp(record("n0")), 20.0)
    watch.note(Left(record("n1")), 20.0)
    standing = watch.standing(21.0)
    assert (standing.live, standing.last_known) == (4, 5)
    assert watch.standing(10.0 + 600.0).last_known == 4
