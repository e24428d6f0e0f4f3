"""A node that begins asks one peer for what is cached where, so that its first choices are as good as the others'.

Owns the asking: whom (the peer that is there for longest), page by page, the newest chains of each worker first, and another
peer if that one fails. Snapshots of the streams would not do: each origin tells what it announced itself, and this node's own
former life is no origin any more. It must never hold up a request; until it is done, choices are made with what is known.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh import Agent, MeshError
from smg.bridge import words
from smg.bridge.chains import Chains
from smg.bridge.peers import Peers
from smg.bridge.prefixes import SharedPrefixes
from smg.bridge.words import PAGE, VERSION, AskedPage

LOOK_S = 0.05
"""Pause between two looks whether there is a peer, and before another one is tried."""
GIVE_UP_S = 30.0
"""A node that found no peer for so long began its mesh, or is cut off: what comes later comes by the streams."""
SETTLE_S = 2.0
"""Workers that are heard of so long after the others are asked about, too."""
PATIENCE_S = 2.0
"""Of one page."""
PAGES_MAX = 64
"""Of one worker: an index holds 65,536 blocks of it at most."""


class Warming:
    """See the module. Runs once in the life of a node, then ends."""

    def __init__(
        self, agent: Agent, peers: Peers, chains: Chains, prefixes: SharedPrefixes, info: Callable[..., None]
    ) -> None:
        self._agent = agent
        self._peers = peers
        self._chains = chains
        self._prefixes = prefixes
        self._info = info

    async def run(self) -> None:
        """Until this node is warm, or nobody could be asked."""
        done: set[bytes] = set()
        failed: set[str] = set()
        pages, began_s, ended_s = 0, 0.0, 0.0
        with trio.move_on_after(GIVE_UP_S):
            while not ended_s or trio.current_time() - ended_s < SETTLE_S:
                await trio.sleep(LOOK_S)
                if done.issuperset(self._chains.workers):
                    continue
                peer = self._oldest(failed)
                if peer is None:
                    failed.clear()
                    continue
                began_s = began_s or trio.current_time()
                try:
                    pages += await self._ask_all(peer, done)
                    ended_s = trio.current_time()
                except (MeshError, trio.TooSlowError):
                    failed.add(peer)
        if pages:
            self._info("mesh: warmed by a peer", pages=pages, secs=round(ended_s - began_s, 3))

    def _oldest(self, failed: set[str]) -> str | None:
        """The live peer that began first; None while there is none to ask."""
        members = [
            member
            for member in self._agent.members
            if member.is_live and member.name not in failed and self._peers.hashes_meet(member.name)
        ]
        oldest = min(members, key=lambda member: (member.record.incarnation, member.name), default=None)
        return None if oldest is None else oldest.name

    async def _ask_all(self, peer: str, done: set[bytes]) -> int:
        """Pages read. Raises `MeshError` and `trio.TooSlowError`; workers that are in `done` need not be asked again."""
        pages = 0
        while left := [ref for ref in self._chains.workers if ref not in done]:
            for ref in left:
                for page in range(PAGES_MAX):
                    with trio.fail_after(PATIENCE_S):
                        question = words.encode(AskedPage(VERSION, PAGE, ref, page))
                        answer = await self._agent.ask(peer, question)
                    if not self._prefixes.warmed(answer):
                        break
                    pages += 1
                done.add(ref)
        return pages
