"""What an operator may ask an agent: one struct for the node, one per member. For `/mesh/status` and `python -m mesh`.

Owns the shapes and the reading of them out of the machines. Must never change anything.
"""

from __future__ import annotations

import msgspec

from mesh.member import Member, Record
from mesh.partition import Standing
from mesh.pipe import Pipe


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One other member as this node sees it. Times are seconds ago."""

    name: str
    host: str
    port: int
    state: str
    """alive, suspect, dead or left."""
    incarnation: int
    boot: str
    since_s: float
    """How long it has been in this state."""
    last_seen_s: float
    """Since it was last heard of itself."""
    rtt_s: float | None
    """Smoothed round trip of pings over UDP."""
    lag_s: float
    """How late its loop was, by its own word."""
    transport: str
    """`udp`, or `tcp` where UDP seems blocked."""
    stream: str
    """`dialled`, `accepted` or `none`."""
    is_protected: bool
    """The stream is sealed or inside TLS."""
    last_error: str
    """Of a stream to its address, until one works."""
    is_digest_equal: bool | None
    """Its replicated state was equal to ours at its last word; None if it never said."""
    digest: str
    digest_lag_s: float | None
    """For how long it has not been seen equal to ours; 0 if it is."""
    features: int
    key_ids: tuple[int, ...]
    meta: bytes


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    name: str
    host: str
    port: int
    boot: str
    incarnation: int
    state: str
    """alive, leaving, left or conflict."""
    uptime_s: float
    members: int
    """Known, ourselves included, dead and left too."""
    alive: int
    """Alive or only suspected, ourselves included."""
    health: int
    """0 is well; above, this node found itself slow and waits longer before it accuses others."""
    lag_s: float
    """How late its own loop was lately."""
    fingerprint: int
    """Over the live members; equal everywhere when membership has converged."""
    digest: str
    """Over the replicated state; equal everywhere when that has converged."""
    is_converged: bool
    """All live peers that we have a stream with told the same fingerprint and digest."""
    is_partitioned: bool
    is_minority: bool
    streams: int
    peers: tuple[PeerStatus, ...]
    counts: dict[str, int]
    """Counters since the start and sizes now: what was refused, dropped, sealed; lengths of queues."""


def peer_status(member: Member, pipe: Pipe | None, error: str, own_digest: bytes, now: float) -> PeerStatus:
    """The row of one member."""
    record = member.record
    digest = pipe.peer_digest if pipe is not None else None
    is_equal = None if digest is None else digest == own_digest
    lag_s: float | None = None
    if pipe is not None and digest is not None:
        lag_s = 0.0 if is_equal else now - pipe.equal_s
    stream = "none" if pipe is None else "dialled" if pipe.is_dialer else "accepted"
    return PeerStatus(
        name=record.name,
        host=record.host,
        port=record.port,
        state=record.status.name.lower(),
        incarnation=record.incarnation,
        boot=record.boot.hex(),
        since_s=now - member.since_s,
        last_seen_s=now - max(member.heard_s, pipe.received_s if pipe is not None else member.heard_s),
        rtt_s=member.rtt_s,
        lag_s=member.lag_ms / 1000,
        transport="tcp" if member.stream_only else "udp",
        stream=stream,
        is_protected=pipe is not None and pipe.is_protected,
        last_error=error,
        is_digest_equal=is_equal,
        digest=digest.hex() if digest is not None else "",
        digest_lag_s=lag_s,
        features=record.features,
        key_ids=record.key_ids,
        meta=record.meta,
    )


def node_status(
    own: Record,
    *,
    state: str,
    uptime_s: float,
    health: int,
    lag_s: float,
    fingerprint: int,
    digest: bytes,
    is_converged: bool,
    standing: Standing,
    streams: int,
    peers: tuple[PeerStatus, ...],
    counts: dict[str, int],
) -> Status:
    """The node's own part with its peers."""
    return Status(
        name=own.name,
        host=own.host,
        port=own.port,
        boot=own.boot.hex(),
        incarnation=own.incarnation,
        state=state,
        uptime_s=uptime_s,
        members=len(peers) + 1,
        alive=standing.live,
        health=health,
        lag_s=lag_s,
        fingerprint=fingerprint,
        digest=digest.hex(),
        is_converged=is_converged,
        is_partitioned=standing.is_partitioned,
        is_minority=standing.is_minority,
        streams=streams,
        peers=peers,
        counts=counts,
    )
