"""One engine's KV blocks as its events tell them, turned into claims of the prefix index.

This room owns the translation. An engine names blocks by hashes of its own and cuts prompts into blocks of
its own size (16 tokens, say); the index speaks of chained hashes over `BlockSettings.block_tokens` (128).
So every engine block is kept with what it takes to continue the chain behind it, and whenever one of our
blocks is complete it is claimed; it is given up as soon as any engine block in it goes. The room also knows
how many tokens an engine holds when it begins to evict, which is the size of its cache.

A claim must never be wrong. What is not certain is not claimed: blocks behind an unknown parent, blocks
that stand for more than tokens, and everything of an engine that gives one name to two different prefixes
(some hash a block's tokens without what is before them). It sees token ids, keeps them no longer than a
block needs to be completed, and never sees text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import msgspec

from smg.fleet.block_hashes import ROOT, BlockHasher
from smg.fleet.block_hashes import digest as block_digest
from smg.fleet.kv_events import BlockHash, Cleared, Event, Removed, Stored
from smg.fleet.prefix_index import PrefixIndex

ENGINE_BLOCKS_MAX = 262_144
"""Engine blocks kept for one worker: four million tokens in blocks of 16, about 80 MB. What is beyond is not claimed."""
TOKEN_BYTES = 4

ModelOf = Callable[[str | None], str | None]
"""The model whose prompts an adapter serves (None: the engine's own model); None when nobody asks for it here."""


class _Block(msgspec.Struct, gc=False, eq=False):
    """One block of the engine."""

    parent: BlockHash | None
    digest: int = 0
    """Of all tokens up to its end: two prefixes under one name show by it."""
    link: int = ROOT
    """Our chain's hash at the last end of a block of ours that is not behind this block's end."""
    depth: int = -1
    """Our blocks up to there; -1: nothing is known for certain of what is before it, so nothing can follow."""
    own: bytes = b""
    """Its tokens behind that end."""
    offset: int = 0
    """Bytes from that end to its own, over this block and those before it."""
    claims: tuple[int, ...] = ()
    """Our blocks that hold tokens of this one."""
    children: int = 0
    """Blocks told to follow it."""


class EngineBlocks:
    """The blocks of one worker."""

    __slots__ = (
        "_block_bytes",
        "_blocks",
        "_hasher",
        "_index",
        "_torn",
        "_unkept",
        "_worker_id",
        "block_tokens",
        "full_tokens",
        "held_tokens",
        "is_trusted",
        "is_whole",
    )

    def __init__(self, worker_id: str, index: PrefixIndex, hasher: BlockHasher) -> None:
        self._worker_id = worker_id
        self._index = index
        self._hasher = hasher
        self._block_bytes = hasher.settings.block_tokens * TOKEN_BYTES
        self._blocks: dict[BlockHash, _Block] = {}
        self._torn: dict[BlockHash, int] = {}  # evicted blocks, and how many that follow them are still held
        self._unkept = 0  # blocks beyond the bound
        self.block_tokens = 0
        """Tokens of an engine block, 0 before any was told."""
        self.held_tokens = 0
        """Tokens the engine told to hold."""
        self.full_tokens: int | None = None
        """Tokens it held when it last evicted; None while that is not known."""
        self.is_whole = False
        """Whether all its blocks are known: its events were heard from the start, or from a flush on."""
        self.is_trusted = True
        """False once it gave one name to two prefixes; then nothing of it is claimed any more."""

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, event: Event, model_of: ModelOf) -> None:
        """Take an event in. Bounded work per block of the event."""
        if isinstance(event, Cleared):
            self.cleared()
        elif isinstance(event, Removed):
            if event.is_resident:
                self._remove(event)
        elif event.is_resident:
            self._store(event, model_of)

    def settle(self) -> None:
        """A message is taken in. Whoever evicts a block and keeps those behind it cannot be followed: the index
        believes that a holder of a block holds all before it."""
        if self._torn and self.is_trusted:
            self._distrust()

    def cleared(self) -> None:
        """The engine emptied its cache, or is another process: nothing is there, neither told nor guessed."""
        self._empty()
        self.is_whole = True
        self._index.cleared(self._worker_id)

    def lost(self) -> None:
        """Messages are missing: what the engine told may be gone. Guesses of the gateway stay what they are."""
        self._empty()
        self.is_whole = False
        self._index.unlearn(self._worker_id)

    def _empty(self) -> None:
        self._blocks.clear()
        self._torn.clear()
        self._unkept = 0
        self.held_tokens = 0
        self.full_tokens = None
        self.is_trusted = True

    # -- storing -------------------------------------------------------------------------------

    def _store(self, event: Stored, model_of: ModelOf) -> None:
        self.block_tokens = event.block_tokens
        above = self._above(event, model_of)
        width = event.block_tokens * TOKEN_BYTES
        data = array("I", event.tokens).tobytes() if above is not None else b""
        parent = ROOT if above is None or above.depth == 0 else above.link
        claims: list[int] = []
        before = event.parent
        for number, name in enumerate(event.hashes):
            block = _Block(before)
            completed = len(claims)
            if above is not None:
                block = self._behind(above, before, data[number * width : (number + 1) * width], claims)
            kept = self._keep(name, block)
            # Only what is kept can be given up again, so only that may be claimed or followed.
            if kept is None:
                del claims[completed:]
            above = kept if kept is not None and kept.depth >= 0 else None
            if above is None and claims:
                self._claim(parent, claims)
                claims = []
            before = name
        if claims:
            self._claim(parent, claims)

    def _claim(self, parent: int, claims: list[int]) -> None:
        if self.is_trusted:
            self._index.stored(self._worker_id, parent, claims)

    def _above(self, event: Stored, model_of: ModelOf) -> _Block | None:
        """What the event's first block follows, a block without tokens at the start of a prompt; None when unsure."""
        if not event.is_plain or not self.is_trusted or not _are_tokens(event.tokens):
            return None
        if event.parent is not None:
            above = self._blocks.get(event.parent)
            return above if above is not None and above.depth >= 0 else None
        model = model_of(event.adapter)
        if model is None:
            return None
        seed = self._hasher.token_seed(self._hasher.seed(model))
        return _Block(None, digest=seed, link=seed, depth=0)

    def _behind(self, above: _Block, before: BlockHash | None, tokens: bytes, claims: list[int]) -> _Block:
        """The block of `tokens` behind `above`, whose name is `before`; our blocks that it completes go to `claims`."""
        size = self._block_bytes
        digest = block_digest(tokens, above.digest)
        offset = above.offset + len(tokens)
        if offset < size:
            return _Block(before, digest, above.link, above.depth, tokens, offset)
        members = self._since_end(above)
        if members is None:
            return _Block(before)
        data = b"".join([member.own for member in reversed(members)]) + tokens
        link, depth, first = above.link, above.depth, len(claims)
        start = 0
        while len(data) - start >= size:
            link = block_digest(data[start : start + size], link)
            claims.append(link)
            depth += 1
            start += size
        for member in members:
            member.claims += (claims[first],)
        return _Block(before, digest, link, depth, data[start:], len(data) - start, tuple(claims[first:]))

    def _since_end(self, block: _Block) -> list[_Block] | None:
        """The blocks behind the last end of a block of ours, `block` first; None if one of them is gone."""
        members = []
        missing = block.offset
        while missing > 0:
            members.append(block)
            missing -= len(block.own)
            if missing > 0:
                above = self._blocks.get(block.parent) if block.parent is not None else None
                if above is None:
                    return None
                block = above
        return members

    def _keep(self, name: BlockHash, block: _Block) -> _Block | None:
        """The block under this name from now on; None when there is no room, or the name cannot be trusted."""
        known = self._blocks.get(name)
        if known is None:
            self.held_tokens += self.block_tokens
            if len(self._blocks) >= ENGINE_BLOCKS_MAX:
                self._unkept += 1
                return None
            self._blocks[name] = block
            above = self._blocks.get(block.parent) if block.parent is not None else None
            if above is not None:
                above.children += 1
            return block
        if known.depth < 0 <= block.depth:
            block.children = known.children
            self._blocks[name] = block
            return block
        if block.depth < 0:
            return known
        if known.digest != block.digest:
            self._distrust()
            return None
        known.claims = tuple(dict.fromkeys(known.claims + block.claims))
        return known

    def _distrust(self) -> None:
        """One name for two prefixes: what is told of that name cannot be understood, nor what follows it."""
        self.is_trusted = False
        self._index.unlearn(self._worker_id)

    # -- removing ------------------------------------------------------------------------------

    def _remove(self, event: Removed) -> None:
        if self.is_whole and event.hashes:
            self.full_tokens = self.held_tokens
        gone: list[int] = []
        for name in event.hashes:
            block = self._blocks.pop(name, None)
            if block is not None:
                gone += block.claims
                self._part(name, block)
            elif self._unkept:
                self._unkept -= 1
            else:
                continue
            self.held_tokens -= self.block_tokens
        if gone:
            self._index.removed(self._worker_id, gone)

    def _part(self, name: BlockHash, block: _Block) -> None:
        """Keeps count of the blocks whose parent is gone: they are held, and useless."""
        if block.children:
            self._torn[name] = block.children
        if block.parent is None:
            return
        above = self._blocks.get(block.parent)
        if above is not None:
            above.children -= 1
        elif block.parent in self._torn:
            self._torn[block.parent] -= 1
            if not self._torn[block.parent]:
                del self._torn[block.parent]


def _are_tokens(tokens: tuple[int, ...]) -> bool:
    """Whether all are ids that fit in 32 bits."""
    return not tokens or (min(tokens) >= 0 and max(tokens) < 1 << 32)
