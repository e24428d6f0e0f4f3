"""Packets are filled with news to the safe size, and what waits is bounded."""

from __future__ import annotations

from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh.codec import NEWS_MAX, encode, news_bytes
from mesh.member import Accusation, Status
from mesh.messages import Gossip, Ping, SendByStream
from mesh.outbox import WAITING_MAX, Outbox
from mesh.own import Own
from mesh.roster import Roster
from mesh.rumors import Rumors
from mesh.settings import PACKET_BODY_BYTES_MAX, SwimSettings
from tests.mesh.swim_play import record

TO = ("10.0.0.2", 7946)


def _outbox(name: str = "me") -> tuple[Outbox, Rumors]:
    own = Own(record(name))
    roster = Roster(4096, own.record, Random(1))
    rumors = Rumors(name, news_bytes)
    return Outbox(SwimSettings(), own, roster, rumors), rumors


@given(st.integers(0, 200), st.booleans(), st.integers(1, 128))
def test_a_packet_is_full_and_never_too_long(count: int, is_long: bool, name_size: int) -> None:
    outbox, rumors = _outbox("m" * name_size)
    for number in range(count):
        name = f"{number:0{100 if is_long else 4}d}"
        rumors.put(record(name) if number % 3 == 0 else Accusation(name, b"1" * 8, 9, Status.DEAD, "a"))
    first = (msgspec.structs.replace(record("first"), meta=b"m" * 256),)
    outbox.datagram(TO, Ping(1, "x", b"1" * 8, 5), first)
    ((_, packet),) = outbox.take_packets()
    assert packet.news[0] == first[0]
    size = len(encode(packet))
    assert size <= PACKET_BODY_BYTES_MAX
    is_full = size > PACKET_BODY_BYTES_MAX - 300 or len(packet.news) == NEWS_MAX
    assert is_full or len(packet.news) == 1 + count


def test_gossip_without_news_is_not_sent() -> None:
    outbox, rumors = _outbox()
    outbox.datagram(TO, Gossip())
    outbox.stream("x", TO, Gossip())
    assert outbox.take_packets() == [] and outbox.take_effects() == []
    rumors.put(record("x"))
    outbox.stream("x", TO, Gossip())
    (effect,) = outbox.take_effects()
    assert isinstance(effect, SendByStream) and effect.message.news == (record("x"),)  # type: ignore[union-attr]


def test_the_oldest_goes_when_a_shell_does_not_drain() -> None:
    outbox, _ = _outbox()
    for seq in range(WAITING_MAX + 3):
        outbox.datagram(TO, Ping(seq, "x", b"", 0))
        outbox.stream(None, TO, Ping(seq, "x", b"", 0))
    packets = outbox.take_packets()
    assert len(packets) == len(outbox.take_effects()) == WAITING_MAX
    assert packets[0][1].body == Ping(3, "x", b"", 0)
    assert outbox.dropped == 6
