"""The other nodes as this one's rooms see them: who is alive, who counts prompts as we do, how old their news is.

Owns the reading of the mesh's membership into a few numbers that the request path may look at for nothing. It decides
nothing about members; the mesh does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mesh import Agent, Member, Status
from smg.bridge import words
from smg.bridge.words import Parameters

NEWS_DELAY_S = 0.05
"""How old a placement is when it arrives, before any has been timed: half of the rhythm in which they are told."""
LAG_SHARE = 0.1
"""Weight of the newest measured delay in the smoothed one."""
SILENT_S = 5.0
"""A live member that was not heard for so long (keep-alives come that often) sends no placements either."""


class Peers:
    """See the module. `refresh` several times a second and with each event; everything else only reads. `observe` is
    told each delay that was timed."""

    def __init__(self, agent: Agent, parameters: Parameters, observe: Callable[[float], None]) -> None:
        self._agent = agent
        self._observe = observe
        self._parameters = parameters
        self.name = agent.name
        self.live_names: tuple[str, ...] = ()
        """Live members without this node."""
        self.count = 1
        """Nodes that send to the same workers, this one included; those beyond a partition count."""
        self.delay_s = NEWS_DELAY_S
        """Age of peers' placements when they arrive; infinite while some do not."""
        self.mismatched: dict[str, str] = {}
        """Live members whose hashes do not meet ours, and why."""
        self._members: dict[str, Member] = {}
        self._lag_s: dict[str, float] = {}
        self._read: dict[bytes, str] = {}  # meta of a member → why it does not match, "" when it does
        self.is_gone = False
        """This node has left, or its agent has ended: nobody is there."""

    def refresh(self, now: float) -> None:
        """Read the membership anew."""
        if self.is_gone:
            self._members, self.live_names, self.count, self.delay_s = {}, (), 1, NEWS_DELAY_S
            self.mismatched = {}
            return
        self._members = {member.name: member for member in self._agent.members}
        live = [member for member in self._members.values() if member.is_live]
        self.live_names = tuple(member.name for member in live)
        self.mismatched = {member.name: why for member in live if (why := self._mismatch(member.record.meta))}
        for name in self._lag_s.keys() - self._members.keys():
            del self._lag_s[name]
        ours = [member for member in live if member.name not in self.mismatched]
        standing = self._agent.standing
        if standing.is_partitioned:
            self.count, self.delay_s = max(standing.last_known - len(self.mismatched), 1), math.inf
        else:
            self.count = 1 + len(ours)
            self.delay_s = max((self.lag_s(member.name, now) for member in ours), default=NEWS_DELAY_S)

    def live(self) -> tuple[str, ...]:
        """Names of the live members, without this node."""
        return self.live_names

    def is_live(self, name: str) -> bool:
        """Is it alive, or only suspected?"""
        member = self._members.get(name)
        return member is not None and member.is_live

    def is_well(self, name: str) -> bool:
        """Is it alive and not even suspected?"""
        member = self._members.get(name)
        return member is not None and member.status is Status.ALIVE

    def dead_for_s(self, name: str, now: float) -> float | None:
        """How long a member is dead; None when it is not, or not known."""
        member = self._members.get(name)
        if member is None or member.status is not Status.DEAD:
            return None
        return now - member.since_s

    def hashes_meet(self, name: str) -> bool:
        """Does this node cut and hash prompts as we do?"""
        return name not in self.mismatched

    def rtt_s(self, name: str) -> float:
        """Smoothed round trip to a member, 0 while not measured."""
        member = self._members.get(name)
        return (member.rtt_s or 0.0) if member is not None else 0.0

    def timed(self, name: str, age_s: float) -> None:
        """News of a peer arrived, so old when it was sent; the way here is half a round trip."""
        sample_s = age_s + self.rtt_s(name) / 2
        self._observe(sample_s)
        known = self._lag_s.get(name)
        self._lag_s[name] = sample_s if known is None else known + LAG_SHARE * (sample_s - known)

    def lag_s(self, name: str, now: float) -> float:
        """How old the news of a peer is when it arrives, or how long none can have come."""
        member = self._members.get(name)
        if member is not None and (member.status is not Status.ALIVE or now - member.heard_s > SILENT_S):
            return max(now - member.heard_s, NEWS_DELAY_S)
        return max(self._lag_s.get(name, NEWS_DELAY_S), self.rtt_s(name) / 2)

    def _mismatch(self, meta: bytes) -> str:
        why = self._read.get(meta)
        if why is None:
            if len(self._read) > 4096:
                self._read.clear()
            why = self._read[meta] = mismatch(self._parameters, words.read_parameters(meta))
        return why


def mismatch(ours: Parameters, theirs: Parameters | None) -> str:
    """Why hashes of the two do not meet, in words for operators; empty when they do."""
    if theirs is None:
        return "says nothing of its prompt hashes: no gateway, or one of another version"
    if theirs.block_bytes != ours.block_bytes or theirs.block_tokens != ours.block_tokens:
        return (
            f"cuts prompts into blocks of {theirs.block_bytes} bytes or {theirs.block_tokens} tokens, not "
            f"{ours.block_bytes} and {ours.block_tokens}"
        )
    if theirs.seed_check != ours.seed_check:
        return "hashes prompts with another secret: --mesh-secret and --mesh-label must be equal"
    return ""
