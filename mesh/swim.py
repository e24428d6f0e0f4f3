"""The membership machine: who is in the cluster and who is alive. SWIM with Lifeguard, as a pure datagram machine.

Owns the member table and every decision about it. Takes messages, evidence and `now` (any steady clock, seconds) and
gives back packets, effects and events; must never await, read a clock, touch a socket or log.

The shell's loop, whole:

    wait until swim.deadline() or until something arrives
    swim.receive(message, address, now) / swim.stream_closed(...) / swim.dial_failed(...) / swim.tick(now)
    for address, packet in swim.packets_to_send(now): datagram out (codec.encode, seal)
    for effect in swim.effects(): perform it (messages.Effect)
    while event := swim.next_event(): tell the subscribers
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from mesh.member import Address, Member, Record
from mesh.messages import Effect, Event, Message, Packet, TablePull, TablePush
from mesh.settings import SwimSettings


class Swim:
    """One node's membership. Five verbs of a datagram machine, and what the shell must tell it besides.

    `own` is this node's record (name, boot, address, ...); build its incarnation with `first_incarnation(wall_s)`.
    `wall_s` is the wall clock at `now`; it is used only to refuse lives from the future. Raises SettingsError.
    """

    def __init__(self, settings: SwimSettings, own: Record, rng: Random, now: float, wall_s: float) -> None:
        raise NotImplementedError

    # -- the five verbs

    def receive(self, message: Message, address: Address, now: float, by_stream: bool = False) -> None:
        """Take one decoded and authenticated message; `address` is where it came from. Never raises."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        """Run every timer that is due. Cheap when none is; also how the machine learns that its loop is late."""
        raise NotImplementedError

    def deadline(self) -> float:
        """When `tick` is due next; infinity when the machine has stopped."""
        raise NotImplementedError

    def packets_to_send(self, now: float) -> list[tuple[Address, Packet]]:
        """Take the datagrams due now, each filled with news up to PACKET_BODY_BYTES_MAX. Drain after every call."""
        raise NotImplementedError

    def effects(self) -> list[Effect]:
        """Take what the shell must do with streams. Drain after every call."""
        raise NotImplementedError

    def next_event(self) -> Event | None:
        """Take the oldest event, or None."""
        raise NotImplementedError

    # -- what the shell must tell

    def stream_closed(self, name: str, boot: bytes, now: float) -> None:
        """The pair's stream ended or was reset by the peer (not by us): a hint, the member is probed at once."""
        raise NotImplementedError

    def dial_failed(self, address: Address, is_refused: bool, now: float) -> None:
        """A dial asked for by SendByStream failed; `is_refused` = the host answered that the port is closed."""
        raise NotImplementedError

    def loop_lag(self, lag_s: float, now: float) -> None:
        """The shell's own loop was this late (beyond what `tick` sees): counts against our health, holds verdicts."""
        raise NotImplementedError

    def clock(self, wall_s: float, now: float) -> None:
        """The wall clock, again: call it once a minute, so that a corrected clock stops refusing its peers."""
        raise NotImplementedError

    def join(self, seeds: Iterable[str], now: float) -> None:
        """Add seeds (`host:port`, names or addresses). Each is dialled at once, in parallel, then for ever."""
        raise NotImplementedError

    def seed_answered(self, seed: str, name: str, boot: bytes, now: float) -> None:
        """A DialSeed reached this peer (it may be ourselves)."""
        raise NotImplementedError

    def seed_failed(self, seed: str, now: float) -> None:
        """A DialSeed reached nobody; it comes again after a backoff."""
        raise NotImplementedError

    def tables(self, is_reply: bool = False) -> list[TablePush] | list[TablePull]:
        """The member table as stream messages of at most 1,024 records each (the last push wants a reply)."""
        raise NotImplementedError

    def merge_table(self, table: TablePush | TablePull, address: Address, now: float) -> None:
        """What `receive` does with a table. The reply to a push appears among the effects."""
        raise NotImplementedError

    def update_own(
        self,
        now: float,
        address: Address | None = None,
        meta: bytes | None = None,
        features: int | None = None,
        key_ids: tuple[int, ...] | None = None,
    ) -> None:
        """Change what we say about ourselves: raises our incarnation and spreads the record. Raises SettingsError."""
        raise NotImplementedError

    def leave(self, now: float) -> None:
        """Say farewell; LeaveDone follows within settings.leave_s, then the machine is silent for good. Idempotent."""
        raise NotImplementedError

    # -- views

    @property
    def own(self) -> Record:
        """What we say about ourselves now."""
        raise NotImplementedError

    @property
    def health(self) -> int:
        """Local health: 0 well ... settings.health_max."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> int:
        """32 bits over the live members; equal on all nodes when the mesh has converged."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """False after a farewell or a name conflict."""
        raise NotImplementedError

    def member(self, name: str) -> Member | None:
        """The row of another member, or None. Read only."""
        raise NotImplementedError

    def members(self) -> list[Member]:
        """All rows, other members only, live and tombstones, by name. Read only."""
        raise NotImplementedError

    def live(self) -> list[Member]:
        """Rows of alive and suspect members, without ourselves."""
        raise NotImplementedError
