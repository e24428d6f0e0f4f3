"""Membership machines on a table: records to build, a wire that can be cut, and time that is pushed by hand.

Plays read: start some machines, `run` a little, cut something, look at their views.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mesh.codec import decode, encode
from mesh.member import Address, Record, Status, first_incarnation
from mesh.messages import DialSeed, Event, Gossip, Message, Packet, SendByStream, Source
from mesh.settings import SwimSettings
from mesh.swim import Swim

WALL_S = 1_700_000_000.0
NEWS_HEAD = Source("stranger", b"s" * 8, first_incarnation(WALL_S), 0)


def record(name: str, number: int = 1, wall_s: float = WALL_S, boot: bytes | None = None) -> Record:
    return Record(
        name=name,
        boot=boot or name.encode().ljust(8, b"-")[:8],
        incarnation=first_incarnation(wall_s),
        status=Status.ALIVE,
        host=f"10.0.0.{number}",
        port=7946,
        born_s=int(wall_s),
    )


def machine(
    name: str, number: int = 1, settings: SwimSettings | None = None, now: float = 0.0, **more: object
) -> Swim:
    own = record(name, number, **more)  # type: ignore[arg-type]
    return Swim(settings or SwimSettings(), own, Random(name), now, WALL_S + now)


def events(swim: Swim) -> list[Event]:
    found = []
    while (event := swim.next_event()) is not None:
        found.append(event)
    return found


def kinds(found: list[Event]) -> list[str]:
    return [type(event).__name__ for event in found]


def gossip(*news: object, source: Source = NEWS_HEAD) -> Packet:
    return Packet(source, Gossip(), tuple(news))  # type: ignore[arg-type]


class Table:
    """Machines that hear each other at once, by datagram and by stream, except where `lost` says otherwise."""

    def __init__(self, *swims: Swim) -> None:
        self.now = 0.0
        self.swims = {swim.own.address: swim for swim in swims}
        self.lost: Callable[[Address, Address, bool], bool] = lambda source, target, by_stream: False
        self.refuses: set[Address] = set()
        self.sent: list[tuple[Address, Address, Message, bool]] = []
        self.events: dict[str, list[Event]] = {}
        self.seeds: dict[str, Address] = {}

    def deliver(self) -> None:
        """All that waits, and what follows from it."""
        is_busy = True
        while is_busy:
            is_busy = False
            for source, swim in list(self.swims.items()):
                self.events.setdefault(swim.own.name, []).extend(events(swim))
                for target, packet in swim.packets_to_send(self.now):
                    is_busy = True
                    self._pass(source, target, packet, False)
                for effect in swim.effects():
                    is_busy = True
                    if isinstance(effect, DialSeed):
                        self._seed(swim, source, effect)
                    else:
                        self._stream(swim, source, effect)

    def _seed(self, swim: Swim, source: Address, effect: DialSeed) -> None:
        target = self.seeds.get(effect.seed)
        peer = self.swims.get(target) if target is not None else None
        if peer is None or target is None or target in self.refuses:
            swim.seed_failed(effect.seed, self.now)
            return
        swim.seed_answered(effect.seed, peer.own.name, peer.own.boot, self.now)
        if peer is not swim:
            for table in swim.tables(self.now):
                self._pass(source, target, table, True)

    def _stream(self, swim: Swim, source: Address, effect: SendByStream) -> None:
        if effect.address in self.refuses:
            swim.dial_failed(effect.address, True, self.now)
        else:
            self._pass(source, effect.address, effect.message, True)

    def _pass(self, source: Address, target: Address, message: Message, by_stream: bool) -> None:
        self.sent.append((source, target, message, by_stream))
        if target in self.swims and target not in self.refuses and not self.lost(source, target, by_stream):
            self.swims[target].receive(decode(encode(message)), source, self.now, by_stream)

    def run(self, seconds: float) -> None:
        end_s = self.now + seconds
        self.deliver()
        while True:
            due_s = min((swim.deadline() for swim in self.swims.values()), default=end_s)
            if due_s > end_s:
                break
            self.now = max(self.now, due_s)
            for address, swim in list(self.swims.items()):
                if swim.deadline() <= self.now and address not in self.refuses:
                    swim.tick(self.now)
            self.deliver()
        self.now = end_s

    def cut(self, *addresses: Address) -> None:
        """These hear nothing and are heard by nobody."""
        side = set(addresses)
        self.lost = lambda source, target, by_stream: source in side or target in side

    def kill(self, swim: Swim, refuses: bool = True) -> None:
        address = swim.own.address
        del self.swims[address]
        if refuses:
            self.refuses.add(address)

    def status(self, observer: Swim, name: str) -> Status | None:
        member = observer.member(name)
        return member.status if member is not None else None

    def agree(self) -> bool:
        names = {swim.own.name for swim in self.swims.values()}
        return all(
            {member.name for member in swim.live()} == names - {swim.own.name} for swim in self.swims.values()
        )


def mesh_of(count: int, settings: SwimSettings | None = None) -> tuple[Table, list[Swim]]:
    """Machines that know each other, two seconds into their life."""
    swims = [machine(f"n{number}", number + 1, settings) for number in range(count)]
    table = Table(*swims)
    table.seeds["first"] = swims[0].own.address
    for swim in swims[1:]:
        swim.join(["first"], 0.0)
    table.run(2.0)
    assert table.agree()
    for swim in swims:
        table.events[swim.own.name] = []
    return table, swims
