"""Who a member is: name, life, incarnation, status, and the total order in which records about one name outrank.

Owns the words of identity and the order. Must never know how records travel (`messages`, `codec`) or what a machine
does about them (`roster`, `swim`).

A name is a member's identity. A *life* is one run of its process: `boot`, 8 random bytes. The *incarnation* is
`boot seconds << 16 | counter`: a later life outranks every earlier one at once, and within a life only the owner
raises the counter, to refute what is said about it.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from mesh.errors import SettingsError
from mesh.settings import HOST_BYTES_MAX, KEY_IDS_MAX, META_BYTES_MAX, NAME_BYTES_MAX

Address: TypeAlias = tuple[str, int]
"""(host, port): one port number for both UDP and TCP. The host is an IP address in text."""

BOOT_BYTES = 8
COUNTER_BITS = 16
INCARNATION_MAX = (1 << 48) - 1
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
"""Versions of the membership protocol this code speaks; a pair speaks min(max, max)."""

UNSPECIFIED_HOSTS = frozenset({"", "0.0.0.0", "::", "*"})
"""Nobody can dial these, so nobody may advertise them."""


class Status(enum.IntEnum):
    """Rank of a statement about one incarnation: the higher wins within it. LEFT is dead by own wish."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


def first_incarnation(wall_s: float) -> int:
    """The incarnation a life starts with, from the wall clock in seconds since the epoch."""
    return (max(0, int(wall_s)) & 0xFFFFFFFF) << COUNTER_BITS


def boot_seconds(incarnation: int) -> int:
    """The wall clock in seconds an incarnation claims (exact for a fresh life, at least that after refutations)."""
    return incarnation >> COUNTER_BITS


def check_name(name: str) -> str:
    """Return the name. Raises SettingsError if it is empty, has a colon, is too long or is not UTF-8 text."""
    if not name or ":" in name:
        raise SettingsError("a node name is not empty and has no ':'")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise SettingsError("a node name is UTF-8 text") from error
    if size > NAME_BYTES_MAX:
        raise SettingsError(f"a node name has at most {NAME_BYTES_MAX} bytes")
    return name


class Record(msgspec.Struct, frozen=True, gc=False):
    """All that one member says about itself, and the status its sender gives it. What rumors and tables carry.

    `tail` holds elements a newer protocol put behind the ones we know; they are kept and forwarded untouched.
    """

    name: str
    boot: bytes
    incarnation: int
    status: Status
    host: str
    port: int
    born_s: int
    """Wall clock at the start of this life; decides who is the elder when two lives claim one name."""
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX
    features: int = 0
    """Bitmap of what the node can do; the library's users define the bits."""
    key_ids: tuple[int, ...] = ()
    """Ids of the seal keys the node holds, so that a rotation can wait for N/N."""
    meta: bytes = b""
    """Opaque to the mesh, at most META_BYTES_MAX: software version, HTTP address and the like."""
    down_s: int = 0
    """In tables, for DEAD and LEFT: seconds since, as the sender counts them, so that all forget together."""
    tail: tuple[object, ...] = ()

    @property
    def address(self) -> Address:
        """Where the member says it can be reached, UDP and TCP."""
        return (self.host, self.port)

    def rank(self) -> tuple[int, bytes, int]:
        """Position in the total order of statements about this name: incarnation, then life, then status.

        Two lives with one incarnation (same second, or a broken clock) are ordered by their boot bytes only until
        the loser hears of it and raises its own.
        """
        return (self.incarnation, self.boot, self.status)

    def checked(self) -> Record:
        """Return self. Raises SettingsError if a field breaks its cap or the address cannot be dialled."""
        check_name(self.name)
        if len(self.boot) != BOOT_BYTES:
            raise SettingsError(f"a boot id has {BOOT_BYTES} bytes")
        if self.host in UNSPECIFIED_HOSTS or len(self.host.encode()) > HOST_BYTES_MAX:
            raise SettingsError(f"nobody can dial the advertised host {self.host!r}")
        if not 0 < self.port < 65536:
            raise SettingsError(f"nobody can dial the advertised port {self.port}")
        if not 0 <= self.incarnation <= INCARNATION_MAX:
            raise SettingsError("incarnation out of range")
        if len(self.meta) > META_BYTES_MAX or len(self.key_ids) > KEY_IDS_MAX:
            raise SettingsError("meta or key ids too long")
        return self


class Accusation(msgspec.Struct, frozen=True, gc=False):
    """The short form of a bad (or sad) statement: this life, at this incarnation, is suspect, dead or left.

    Carries no address, so it says nothing to who does not know the member. `accuser` is who saw it itself
    (for LEFT the member); distinct accusers confirm a suspicion.
    """

    name: str
    boot: bytes
    incarnation: int
    status: Status
    accuser: str
    tail: tuple[object, ...] = ()

    def rank(self) -> tuple[int, bytes, int]:
        """As `Record.rank`."""
        return (self.incarnation, self.boot, self.status)


News: TypeAlias = Record | Accusation
"""One rumor."""


class Member:
    """One row of the member table: the best record known and what this node measured itself.

    Read-only for everyone but `roster` and `swim`. Invariant: `record.status` is the status shown to users.
    """

    __slots__ = (
        "confronted_s",
        "heard_s",
        "lag_ms",
        "record",
        "rtt_s",
        "since_s",
        "stream_only",
        "udp_misses",
    )

    def __init__(self, record: Record, now: float) -> None:
        self.record = record
        self.since_s = now
        """Machine time of the last change of status or life."""
        self.heard_s = now
        """Machine time of the last message from the member itself."""
        self.rtt_s: float | None = None
        """Smoothed round trip of direct pings over UDP."""
        self.lag_ms = 0
        """How late the member said its own loop was, in its last ack."""
        self.udp_misses = 0
        """Probes in a row answered by stream only."""
        self.stream_only = False
        """UDP to or from the member seems blocked: speak by stream at once."""
        self.confronted_s = float("-inf")
        """Machine time of our last out-of-turn ping to it."""

    @property
    def name(self) -> str:
        """The member's identity."""
        return self.record.name

    @property
    def status(self) -> Status:
        """ALIVE, SUSPECT, DEAD or LEFT as this node sees it."""
        return self.record.status

    @property
    def address(self) -> Address:
        """Where it says it can be reached."""
        return self.record.address

    @property
    def is_live(self) -> bool:
        """Alive or only suspected: it is probed, gossiped to and counted."""
        return self.record.status <= Status.SUSPECT

    def __repr__(self) -> str:
        record = self.record
        return f"<{record.name} {record.status.name} {record.incarnation:#x} {record.host}:{record.port}>"
