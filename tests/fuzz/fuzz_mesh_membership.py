"""Coverage-guided fuzzing of what comes from peers of membership: datagram bodies and table frames.

`python -m tests.fuzz.fuzz_mesh_membership [-runs=N] [libFuzzer options] [corpus folder]` needs atheris; the target
itself does not, so tests run it on mutated bytes. Whatever decodes is fed to a machine, which must not raise, must
keep its bounds, and must only ever rise in what it holds of anyone.
"""

from __future__ import annotations

import sys
from random import Random

from mesh import codec
from mesh.errors import DecodeError
from mesh.member import Accusation, Status
from mesh.messages import (
    Ack,
    Conflict,
    Gossip,
    Message,
    Nack,
    Packet,
    Ping,
    PingReq,
    Source,
    TablePull,
    TablePush,
)
from mesh.settings import SwimSettings
from mesh.swim import Swim
from tests.mesh.swim_play import WALL_S, record

MEMBERS_MAX = 16
RENEW_AFTER = 300
"""Inputs to one machine: so that it neither stays empty nor is full of tombstones for ever."""
FROM = ("10.0.0.2", 7946)


class Target:
    """A machine that knows two members, and what it held of each name before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.swim = Swim(SwimSettings(members_max=MEMBERS_MAX), record("me"), Random(1), 0.0, WALL_S)
        peer = record("peer", 2)
        known = (peer, record("other", 3))
        self.swim.receive(TablePull(Source("peer", peer.boot, peer.incarnation, 0), known), FROM, 0.0, True)
        self.turn = 0
        self.own = self.swim.own.rank()

    def feed(self, message: Message) -> None:
        swim = self.swim
        self.turn += 1
        self.now += 0.01
        swim.receive(message, FROM, self.now, by_stream=self.turn % 2 == 0)
        swim.tick(self.now)
        for _, packet in swim.packets_to_send(self.now):
            assert len(codec.encode(packet)) <= codec.PACKET_BYTES_MAX
        for effect in swim.effects():
            if hasattr(effect, "message"):
                codec.encode(effect.message)
        while swim.next_event() is not None:
            pass
        counts = swim.counts()
        assert counts["members"] <= MEMBERS_MAX and counts["rumors"] <= MEMBERS_MAX + 1
        assert counts["outbox_dropped"] == 0
        assert swim.own.rank() >= self.own
        self.own = swim.own.rank()


_target = Target()


def knock(data: bytes) -> None:
    """One input: DecodeError, or a message that the machine bears and that encodes to a message again."""
    global _target
    try:
        message = codec.decode(data)
    except DecodeError:
        return
    assert codec.decode(codec.encode(message)) is not None
    _target.feed(message)
    if _target.turn >= RENEW_AFTER or not _target.swim.is_running:
        _target = Target()


def seeds() -> list[bytes]:
    """One real message of each kind."""
    peer, me = record("peer", 2), record("me")
    source = Source("peer", peer.boot, peer.incarnation, 7)
    news = (
        record("new", 4),
        Accusation("me", me.boot, me.incarnation, Status.SUSPECT, "peer"),
        Accusation("other", b"other---", record("other").incarnation, Status.DEAD, "peer"),
        Accusation("peer", peer.boot, peer.incarnation, Status.LEFT, "peer"),
    )
    bodies = (
        Ping(1, "me", me.boot, me.incarnation),
        Ack(1, peer.boot, 3, me.incarnation),
        PingReq(1, "other", b"other---", 5, "10.0.0.3", 7946, True),
        Nack(1, True),
        Gossip(),
        Conflict(peer, record("peer", 9)),
    )
    messages: list[Message] = [Packet(source, body, news[:count]) for body in bodies for count in (0, 4)]
    messages.append(TablePush(source, (peer, record("new", 4)), True))
    messages.append(TablePull(source, (peer, record("other", 3))))
    return [codec.encode(message) for message in messages]


def run_random(count: int, seed: int) -> None:
    """Without coverage: mutations of the seeds, also across each other."""
    rng = Random(seed)
    start = seeds()
    for _ in range(count):
        data = bytearray(rng.choice(start))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at:at] = rng.randbytes(rng.randrange(1, 6))
                case 2:
                    del data[at : at + rng.randrange(1, 6)]
                case 3:
                    other = rng.choice(start)
                    data[at:] = other[rng.randrange(len(other)) :]
                case _:
                    data[at] ^= 1 << rng.randrange(8)
            if not data:
                data = bytearray(3)
        knock(bytes(data))


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, knock)
    atheris.Fuzz()
