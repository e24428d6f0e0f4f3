"""What is about to be sent: datagrams waiting for their news, and stream effects.

Owns the filling of packets up to the safe MTU and the bound of what waits. Must never decide what to say.
"""

from __future__ import annotations

from collections import deque

from mesh.codec import NEWS_MAX, head_bytes, news_bytes
from mesh.member import Address, Member, News
from mesh.messages import Body, Effect, Gossip, Packet, SendByStream, Source
from mesh.own import Own
from mesh.roster import Roster
from mesh.rumors import Rumors, transmit_limit
from mesh.settings import PACKET_BODY_BYTES_MAX, SwimSettings

WAITING_MAX = 16_384
"""Datagrams or effects that wait for the shell; one that drains after each call never sees a hundredth of it."""


class Outbox:
    """The two queues. News that must travel with one message are given as `first`; rumors fill the rest."""

    __slots__ = ("_datagrams", "_effects", "_own", "_roster", "_rumors", "_settings", "dropped")

    def __init__(self, settings: SwimSettings, own: Own, roster: Roster, rumors: Rumors) -> None:
        self._settings = settings
        self._own = own
        self._roster = roster
        self._rumors = rumors
        self._datagrams: deque[tuple[Address, Body, tuple[News, ...]]] = deque()
        self._effects: deque[Effect] = deque()
        self.dropped = 0

    def datagram(self, address: Address, body: Body, first: tuple[News, ...] = ()) -> None:
        """Send by UDP."""
        if len(self._datagrams) >= WAITING_MAX:
            self._datagrams.popleft()
            self.dropped += 1
        self._datagrams.append((address, body, first))

    def stream(self, peer: str | None, address: Address, body: Body, first: tuple[News, ...] = ()) -> None:
        """Send by the pair's stream."""
        packet = self._filled(self._own.source(self._roster.fingerprint), body, first)
        if packet.news or not isinstance(body, Gossip):
            self.effect(SendByStream(peer, address, packet))

    def to(self, member: Member, body: Body, first: tuple[News, ...] = ()) -> None:
        """Send by whatever reaches the member."""
        if member.stream_only:
            self.stream(member.name, member.address, body, first)
        else:
            self.datagram(member.address, body, first)

    def reply(
        self, peer: str | None, address: Address, by_stream: bool, body: Body, first: tuple[News, ...] = ()
    ) -> None:
        """Answer the way the question came."""
        if by_stream:
            self.stream(peer, address, body, first)
        else:
            self.datagram(address, body, first)

    def effect(self, effect: Effect) -> None:
        """Ask the shell for something."""
        if len(self._effects) >= WAITING_MAX:
            self._effects.popleft()
            self.dropped += 1
        self._effects.append(effect)

    def take_packets(self) -> list[tuple[Address, Packet]]:
        """All waiting datagrams, filled."""
        if not self._datagrams:
            return []
        source = self._own.source(self._roster.fingerprint)
        packets = []
        for address, body, first in self._datagrams:
            packet = self._filled(source, body, first)
            if packet.news or not isinstance(body, Gossip):  # the rumors may have run out before its turn
                packets.append((address, packet))
        self._datagrams.clear()
        return packets

    def take_effects(self) -> list[Effect]:
        """All waiting effects."""
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def clear(self) -> None:
        """The machine stops: unsaid things stay unsaid."""
        self._datagrams.clear()
        self._effects.clear()

    def _filled(self, source: Source, body: Body, first: tuple[News, ...]) -> Packet:
        if not len(self._rumors):
            return Packet(source, body, first)
        room = PACKET_BODY_BYTES_MAX - head_bytes(source, body) - sum(news_bytes(news) for news in first)
        limit = transmit_limit(self._settings.transmit_mult, self._roster.live_count + 1)
        return Packet(source, body, first + tuple(self._rumors.fill(room, limit, NEWS_MAX - len(first))))
