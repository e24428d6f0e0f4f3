"""The simulated network itself: streams keep their order and behave as TCP where it matters here."""

from __future__ import annotations

from random import Random

import pytest

from tests.sim.network import DIAL_TIMEOUT_S, Cut, Endpoint, Loop, Network


class Owner:
    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.ended: list[str] = []

    def stream_frame(self, end: Endpoint, data: bytes) -> None:
        self.got.append(data)

    def stream_eof(self, end: Endpoint) -> None:
        self.ended.append("eof")

    def stream_bye(self, end: Endpoint) -> None:
        self.ended.append("bye")

    def stream_timed_out(self, end: Endpoint) -> None:
        self.ended.append("timed out")


class Pair:
    def __init__(self, loss: float = 0.0) -> None:
        self.loop = Loop()
        self.network = Network(self.loop, Random(4))
        self.network.weather.loss = loss
        self.one, self.other = Owner(), Owner()
        self.end = Endpoint(0, self.one, is_dialler=True)
        self.accepted = Endpoint(1, self.other)
        self.accepted.peer = self.end.peer = ("x", b"")
        self.done: list[tuple[float, bool, bool]] = []

    def dial(self, is_open: bool = True) -> None:
        def accept(end: Endpoint) -> Endpoint | None:
            return self.accepted if is_open else None

        self.network.dial(
            self.end, 1, accept, lambda ok, refused: self.done.append((self.loop.now, ok, refused))
        )


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_frames_arrive_once_and_in_order_whatever_is_lost(loss: float) -> None:
    pair = Pair()
    pair.dial()
    pair.loop.run_until(5.0)
    assert pair.done and pair.done[0][1]
    pair.network.weather.loss = loss
    sent = [b"%d" % number for number in range(50)]
    for data in sent:
        pair.network.send(pair.end, data, pair.loop.now)
    pair.loop.run_until(100.0)
    assert pair.other.got == sent


def test_a_closed_port_refuses_at_once_and_a_cut_is_silent() -> None:
    pair = Pair()
    pair.dial(is_open=False)
    pair.loop.run_until(1.0)
    assert pair.done[0][1:] == (False, True) and pair.done[0][0] < 0.01
    pair = Pair()
    pair.network.cuts.append(Cut({0}))
    pair.dial()
    pair.loop.run_until(10.0)
    assert pair.done == [(DIAL_TIMEOUT_S, False, False)]


def test_a_cut_holds_frames_back_and_a_long_one_ends_the_stream() -> None:
    pair = Pair()
    pair.dial()
    pair.loop.run_until(1.0)
    pair.network.cuts.append(Cut({0}))
    pair.network.send(pair.end, b"late", 1.0)
    pair.loop.run_until(2.0)
    assert pair.other.got == []
    pair.network.cuts.clear()
    pair.loop.run_until(4.0)
    assert pair.other.got == [b"late"]
    pair.network.cuts.append(Cut({0}))
    pair.network.send(pair.end, b"never", 4.0)
    pair.loop.run_until(30.0)
    assert pair.one.ended == ["timed out"] and pair.other.got == [b"late"]


def test_the_other_side_hears_of_an_end_unless_it_is_cut_off_and_then_by_a_reset() -> None:
    pair = Pair()
    pair.dial()
    pair.loop.run_until(1.0)
    pair.network.cuts.append(Cut({0}))
    pair.network.close(pair.end)
    pair.loop.run_until(2.0)
    assert pair.other.ended == []
    pair.network.cuts.clear()
    pair.network.send(pair.accepted, b"anyone?", 2.0)
    pair.loop.run_until(3.0)
    assert pair.other.ended == ["eof"]


def test_cuts_block_what_they_say() -> None:
    one_way = Cut({1}, is_one_way=True)
    assert one_way.blocks(1, 2, True) and not one_way.blocks(2, 1, True)
    udp = Cut({1, 2}, is_udp_only=True, inner=True)
    assert udp.blocks(1, 2, True) and not udp.blocks(1, 2, False) and udp.blocks(1, 3, True)
    assert not Cut({1, 2}).blocks(1, 2, True)


def test_lossy_weather_loses_about_its_share() -> None:
    pair = Pair(loss=0.2)
    got: list[bytes] = []
    for _ in range(2000):
        pair.network.datagram(0, 1, got.append, b"x")
    pair.loop.run_until(1.0)
    assert 1500 < len(got) < 1700
    pair.network.weather.duplication = 1.0
    pair.network.weather.loss = 0.0
    got.clear()
    pair.network.datagram(0, 1, got.append, b"x")
    pair.loop.run_until(2.0)
    assert got == [b"x", b"x"]
