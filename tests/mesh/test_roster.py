"""The member table: live ones and tombstones apart, the ring fair, the fingerprint true."""

from __future__ import annotations

from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh.member import Status
from mesh.roster import Roster, mark
from tests.mesh.swim_play import record

OPS = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["add", "suspect", "dead", "alive", "remove", "probe"])),
    max_size=80,
)


def _roster(count: int, seed: int = 1) -> Roster:
    roster = Roster(100, record("me"), Random(seed))
    for number in range(count):
        roster.add(record(f"n{number}"), 0.0)
    return roster


def _set(roster: Roster, name: str, status: Status, incarnation: int | None = None) -> None:
    member = roster.get(name)
    assert member is not None
    old = member.record
    put = msgspec.structs.replace(old, status=status, incarnation=incarnation or old.incarnation)
    roster.put(member, put, 1.0)


@given(OPS, st.integers(0, 9))
def test_rows_live_ones_and_the_fingerprint_agree_after_any_history(
    ops: list[tuple[int, str]], seed: int
) -> None:
    roster = Roster(100, record("me"), Random(seed))
    for number, op in ops:
        name = f"n{number}"
        member = roster.get(name)
        if op == "add" and member is None:
            roster.add(record(name), 0.0)
        elif op == "probe":
            roster.next_to_probe()
        elif member is not None and op == "remove":
            roster.remove(name, 0.0)
        elif member is not None and op in ("suspect", "dead", "alive"):
            _set(roster, name, Status[op.upper()], member.record.incarnation + (op == "alive"))
    rows = roster.rows()
    live = {member.name for member in rows if member.status <= Status.SUSPECT}
    assert {member.name for member in roster.live()} == live
    assert {member.name for member in roster.down()} == {member.name for member in rows} - live
    assert roster.live_count == len(live)
    expected = mark(record("me"))
    for member in rows:
        if member.is_live:
            expected ^= mark(member.record)
    assert roster.fingerprint == expected


@given(st.integers(1, 20), st.integers(0, 99), st.lists(st.integers(0, 19), max_size=6))
def test_everyone_who_stays_is_probed_within_two_rounds(count: int, seed: int, dead: list[int]) -> None:
    roster = _roster(count, seed)
    for _ in range(seed % (count + 1)):
        roster.next_to_probe()
    probed: list[str] = []
    for number in dead:
        member = roster.next_to_probe()
        if member is not None:
            probed.append(member.name)
        name = f"n{number}"
        gone = roster.get(name)
        if gone is not None and gone.is_live:
            _set(roster, name, Status.DEAD)
    for _ in range(2 * count - 1):
        member = roster.next_to_probe()
        if member is not None:
            probed.append(member.name)
    assert {member.name for member in roster.live()} <= set(probed)


def test_one_round_of_the_ring_probes_each_once_and_the_next_in_another_order() -> None:
    roster = _roster(30)
    rounds = [[roster.next_to_probe() for _ in range(30)] for _ in range(2)]
    assert len(set(rounds[0])) == len(set(rounds[1])) == 30
    assert rounds[0] != rounds[1]


def test_gossip_tells_nobody_twice_before_everyone_was_told() -> None:
    roster = _roster(9)
    told = [member.name for _ in range(3) for member in roster.next_to_tell(3)]
    assert sorted(told) == sorted(f"n{number}" for number in range(9))
    assert {member.name for member in _roster(2).next_to_tell(3)} == {"n0", "n1"}


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 9))
def test_a_sample_is_distinct_live_and_without_the_excluded(count: int, wanted: int, seed: int) -> None:
    roster = _roster(count, seed)
    if count > 2:
        _set(roster, "n1", Status.DEAD)
    names = [member.name for member in roster.sample(wanted, "n0")]
    possible = {f"n{number}" for number in range(count)} - {"n0"} - ({"n1"} if count > 2 else set())
    assert len(names) == len(set(names)) == min(wanted, len(possible))
    assert set(names) <= possible


def test_a_suspicion_does_not_change_the_fingerprint_and_a_refutation_does() -> None:
    roster = _roster(3)
    before = roster.fingerprint
    _set(roster, "n1", Status.SUSPECT)
    assert roster.fingerprint == before and roster.changed_s == 0.0
    _set(roster, "n1", Status.ALIVE, 99 << 16)
    assert roster.fingerprint != before and roster.changed_s == 1.0


def test_time_since_moves_with_the_status_but_not_with_a_refutation() -> None:
    roster = _roster(1)
    member = roster.get("n0")
    assert member is not None
    _set(roster, "n0", Status.ALIVE, 99 << 16)
    assert member.since_s == 0.0
    _set(roster, "n0", Status.DEAD)
    assert member.since_s == 1.0
    assert roster.oldest_down is member
