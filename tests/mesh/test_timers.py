"""The heap of things to do later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.timers import CANCELLED_MAX, Timers


def test_calls_run_in_order_of_time_and_of_setting() -> None:
    timers, ran = Timers(), []
    timers.at(2.0, lambda now: ran.append("late"))
    timers.at(1.0, lambda now: ran.append("first"))
    timers.at(1.0, lambda now: ran.append("second"))
    timers.run(1.5)
    assert ran == ["first", "second"]
    assert timers.next_s() == 2.0


def test_a_cancelled_call_never_runs_and_is_not_waited_for() -> None:
    timers, ran = Timers(), []
    timer = timers.at(1.0, lambda now: ran.append("no"))
    timers.at(5.0, lambda now: ran.append("yes"))
    timer.cancel()
    assert timers.next_s() == 5.0
    timers.run(9.0)
    assert ran == ["yes"]
    assert timers.next_s() == float("inf")


def test_a_call_may_set_another_for_now() -> None:
    timers, ran = Timers(), []
    timers.at(1.0, lambda now: timers.at(now, ran.append))
    timers.run(1.0)
    assert ran == [1.0]


def test_cancelled_calls_do_not_pile_up() -> None:
    timers = Timers()
    for number in range(10 * CANCELLED_MAX):
        timers.at(100.0 + number, lambda now: None).cancel()
    assert len(timers) <= CANCELLED_MAX + 1


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=50), st.floats(0, 10))
def test_exactly_the_due_and_uncancelled_run(calls: list[tuple[float, bool]], now: float) -> None:
    timers, ran = Timers(), []
    for place, (when_s, is_cancelled) in enumerate(calls):
        timer = timers.at(when_s, lambda _, place=place: ran.append(place))  # type: ignore[misc]
        if is_cancelled:
            timer.cancel()
            timer.cancel()
    timers.run(now)
    due = [place for place, (when_s, off) in enumerate(calls) if when_s <= now and not off]
    assert ran == sorted(due, key=lambda place: (calls[place][0], place))
