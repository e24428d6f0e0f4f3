"""The words members say to each other, the effects a shell must perform, and the events it may tell its users.

Owns the shapes only: frozen structs without behaviour. Must never know bytes (`codec`), sockets or time.

A `Packet` travels by datagram, or by a stream where UDP is blocked; a `TablePush` / `TablePull` by stream only.
No message is ever answered by one of its own type: Ping by Ack, PingReq by Ack or Nack, TablePush by TablePull,
the others by nothing.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from mesh.member import Address, News, Record

# -- messages ----------------------------------------------------------------------------------------------------


class Source(msgspec.Struct, frozen=True, gc=False):
    """Who speaks: present in every message."""

    name: str
    boot: bytes
    incarnation: int
    fingerprint: int
    """32 bits over the live members the sender knows (name, boot, incarnation); unequal for long = exchange tables."""


class Ping(msgspec.Struct, frozen=True, gc=False):
    """Are you there? Answered by an Ack if the name is ours, whatever the boot."""

    seq: int
    target_name: str
    target_boot: bytes
    """The life the sender knows; empty if none."""
    target_incarnation: int
    """The incarnation the sender knows; if it is not the target's, the Ack carries the target's own record."""


class Ack(msgspec.Struct, frozen=True, gc=False):
    """I am here, or (through a helper) the member you asked about is."""

    seq: int
    boot: bytes
    """The life that answered the ping."""
    lag_ms: int
    """How late the answering loop was lately."""
    known_incarnation: int
    """The incarnation the answerer knows of the pinger, 0 if none; if it is old, the pinger sends its record."""


class PingReq(msgspec.Struct, frozen=True, gc=False):
    """Please ping this member for me: I heard nothing."""

    seq: int
    target_name: str
    target_boot: bytes
    target_incarnation: int
    host: str
    port: int
    dials: bool
    """Dial the target too, and say in the Nack if its port refuses."""


class Nack(msgspec.Struct, frozen=True, gc=False):
    """I am well, but the member you asked about did not answer me either (Lifeguard)."""

    seq: int
    is_refused: bool
    """Its port refused my dial: the host is up, the process is not."""


class Gossip(msgspec.Struct, frozen=True, gc=False):
    """Only news."""


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """Two live processes have one name; sent to the younger, which must stop."""

    elder: Record
    younger: Record


Body: TypeAlias = Ping | Ack | PingReq | Nack | Gossip | Conflict


class Packet(msgspec.Struct, frozen=True, gc=False):
    """One datagram: a body, and as much news as fits."""

    source: Source
    body: Body
    news: tuple[News, ...] = ()


class TablePush(msgspec.Struct, frozen=True, gc=False):
    """My member table (or a slice of a large one); with `wants_reply`, send me yours."""

    source: Source
    records: tuple[Record, ...]
    wants_reply: bool = True


class TablePull(msgspec.Struct, frozen=True, gc=False):
    """The answer to a TablePush: the other table (or a slice). Answered by nothing."""

    source: Source
    records: tuple[Record, ...]


Message: TypeAlias = Packet | TablePush | TablePull

# -- effects: what the shell must do -----------------------------------------------------------------------------


class SendByStream(msgspec.Struct, frozen=True, gc=False):
    """Deliver the message on the pair's stream; dial `address` if there is none.

    `peer` is the member's name, or None when only the address is known. The shell answers with
    `Swim.dial_failed(address, is_refused, now)` when a dial fails, and hands what the peer says to `Swim.receive`.
    Nothing is owed when an open stream breaks, except `Swim.stream_closed`.
    """

    peer: str | None
    address: Address
    message: Message


class DialSeed(msgspec.Struct, frozen=True, gc=False):
    """Resolve the seed anew, dial all its addresses, and after the greeting send `Swim.tables()`.

    Answered by `Swim.seed_answered(seed, name, boot, now)` for each peer that greeted, or `Swim.seed_failed(seed, now)`.
    """

    seed: str


Effect: TypeAlias = SendByStream | DialSeed

# -- events: what users may hear of -----------------------------------------------------------------------------


class MemberUp(msgspec.Struct, frozen=True, gc=False):
    """A member appeared, came back from the dead, or began a new life (then `is_restart`)."""

    record: Record
    is_restart: bool = False


class MemberChanged(msgspec.Struct, frozen=True, gc=False):
    """A live member changed its address, meta, features or keys within its life."""

    record: Record


class Suspected(msgspec.Struct, frozen=True, gc=False):
    """A member did not answer; it will be dead unless it refutes."""

    record: Record
    accuser: str


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """A suspected member refuted."""

    record: Record


class MemberDown(msgspec.Struct, frozen=True, gc=False):
    """A member is dead. `accuser` is who says so."""

    record: Record
    accuser: str


class Left(msgspec.Struct, frozen=True, gc=False):
    """A member left by its own wish."""

    record: Record


class Forgotten(msgspec.Struct, frozen=True, gc=False):
    """A tombstone reached its age, or was pushed out of a full table: the name is unknown again."""

    record: Record


class NameConflict(msgspec.Struct, frozen=True, gc=False):
    """An older live node has our name; the machine has stopped. The shell must exit with both addresses."""

    elder: Record
    own: Record


class OwnOutranked(msgspec.Struct, frozen=True, gc=False):
    """Others know a life of our name that outranked us (our clock was set back, or the name was borrowed). We have
    taken a higher incarnation; whoever orders lives by their birth must go on above this one."""

    boot: bytes
    incarnation: int
    """Ours from now on: above all that was said by or about the other life."""


class ClockAhead(msgspec.Struct, frozen=True, gc=False):
    """A record was refused because its life begins in our future. Log both clocks."""

    name: str
    address: Address
    their_s: int
    our_s: float


class LeaveDone(msgspec.Struct, frozen=True, gc=False):
    """Our farewell is known to `acked` of `told` members, or its time is up; the machine has stopped."""

    told: int
    acked: int


Event: TypeAlias = (
    MemberUp
    | MemberChanged
    | Suspected
    | Cleared
    | MemberDown
    | Left
    | Forgotten
    | NameConflict
    | OwnOutranked
    | ClockAhead
    | LeaveDone
)
