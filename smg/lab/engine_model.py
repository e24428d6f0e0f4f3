"""A simulated inference engine: prefix cache, prefill queue and decode slots, in virtual time.

This room answers one question: given these prompts at these times, when does each token leave and
how much of each prompt was cached? It owns one engine's queue, its KV blocks and its clockless
schedule. It is a machine: time comes in as `now`, what happened comes out as events. It never
waits, never reads a clock, never opens a socket (`smg engine` puts HTTP around it, `smg simulate`
drives a fleet of them), and it never looks at text: prompts arrive as chained block hashes.

The model is the one of the routing study (docs/performance-routing.md): one prefill at a time,
first come first served; decoding slows prefill down; the decode rate of a request is fixed when it
starts to decode; blocks of a running request are pinned, others are evicted least recently used.
Not modelled: chunked prefill, priorities, preemption, reuse of generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Literal

import msgspec

from smg.fleet.block_hashes import chain

WAITING, PREFILLING, DECODING, GONE = range(4)
"""States of a run, in the only order in which they follow each other."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one engine. Defaults are an 8B-class model on one recent accelerator."""

    prefill_base_s: float = 0.008
    """Seconds that every prefill costs, however short."""
    prefill_tokens_per_s: float = 12_000.0
    """Uncached prompt tokens per second, the linear part."""
    attention_s_per_pair: float = 2e-9
    """Seconds per (uncached token x context token), the quadratic part."""
    decode_slowdown: float = 0.5
    """A prefill beside a full decode batch takes 1 + this times as long."""
    slots: int = 64
    """Requests that may be in prefill or decode at once."""
    decode_base_s: float = 0.012
    """Seconds between two tokens of a request that decodes alone."""
    decode_per_running_s: float = 0.0003
    """Seconds that every decoding request adds to that."""
    cache_blocks: int = 1_000
    """KV blocks of this engine, for prompts and for generated tokens."""
    block_tokens: int = 512
    """Prompt tokens per block."""
    waiting_max: int = 65_536
    """Bound of the queue; a real engine answers 503 long before."""
    emits_tokens: bool = False
    """Report every token, not only the first and the last (`smg engine` streams; a simulation does not)."""
    emits_blocks: bool = False
    """Report stored and removed blocks, as engines with a KV event publisher do."""

    def prefill_s(self, uncached_tokens: float, cached_tokens: float) -> float:
        """Seconds of prefill for `uncached_tokens` behind `cached_tokens`, on an engine that decodes nothing."""
        return (
            self.prefill_base_s
            + uncached_tokens / self.prefill_tokens_per_s
            + self.attention_s_per_pair * uncached_tokens * (cached_tokens + uncached_tokens / 2)
        )


class FirstToken(msgspec.Struct, frozen=True, gc=False):
    """The prefill of a request ended and its first token left."""

    request_id: str
    at_s: float
    cached_tokens: int
    prefill_s: float
    """Seconds this prefill took, without the wait."""


class Token(msgspec.Struct, frozen=True, gc=False):
    """A later token left. Only with `emits_tokens`."""

    request_id: str
    at_s: float
    number: int
    """2 is the second token."""


class Finished(msgspec.Struct, frozen=True, gc=False):
    """The last token has left; slot and blocks are free again."""

    request_id: str
    at_s: float
    output_tokens: int


class BlocksStored(msgspec.Struct, frozen=True, gc=False):
    """Blocks became reusable, in chain order. Only with `emits_blocks`."""

    at_s: float
    parent: int
    """Hash of the block before the first one, 0 at the start of a prompt."""
    hashes: tuple[int, ...]


class BlocksRemoved(msgspec.Struct, frozen=True, gc=False):
    """Blocks were evicted. Only with `emits_blocks`."""

    at_s: float
    hashes: tuple[int, ...]


class CacheCleared(msgspec.Struct, frozen=True, gc=False):
    """The cache is empty. Only with `emits_blocks`."""

    at_s: float


EngineEvent = FirstToken | Token | Finished | BlocksStored | BlocksRemoved | CacheCleared


class EngineFull(Exception):
    """The queue is at `waiting_max`. The engine's state did not change."""


class _Run:
    """One request inside the engine."""

    __slots__ = (
        "anonymous_blocks",
        "blocks",
        "cached_blocks",
        "cached_tokens",
        "expected_cached_tokens",
        "first_s",
        "interval_s",
        "next_token",
        "output_tokens",
        "prefill_s",
        "prompt_tokens",
        "request_id",
        "state",
    )

    def __init__(
        self, request_id: str, blocks: Sequence[int], prompt_tokens: int, output_tokens: int
    ) -> None:
        self.request_id = request_id
        self.blocks = blocks
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.state = WAITING
        self.cached_blocks = 0
        self.cached_tokens = 0
        self.expected_cached_tokens = 0
        self.anonymous_blocks = 0
        self.prefill_s = 0.0
        self.first_s = 0.0
        self.interval_s = 0.0
        self.next_token = 2


class EngineModel:
    """One simulated engine. Feed it with `submit` and `abort`, move it with `advance`.

    Times must not go backwards. Between calls the engine stands still at the last time it was told.
    """

    __slots__ = (
        "_anonymous_blocks",
        "_current",
        "_current_end_s",
        "_decoding",
        "_events",
        "_heap",
        "_idle",
        "_now_s",
        "_pinned",
        "_running",
        "_runs",
        "_sequence",
        "_waiting",
        "_waiting_blocks",
        "_waiting_prefill_s",
        "_waiting_uncached_tokens",
        "busy_s",
        "cached_tokens_total",
        "finished_total",
        "output_tokens_total",
        "prompt_tokens_total",
        "settings",
    )

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings if settings is not None else EngineSettings()
        self._now_s = 0.0
        self._runs: dict[str, _Run] = {}
        self._waiting: dict[str, _Run] = {}  # a queue that can lose its middle: dicts keep their order
        self._waiting_blocks: dict[int, int] = {}  # block -> waiting runs that will bring it
        self._waiting_prefill_s = 0.0
        self._waiting_uncached_tokens = 0
        self._current: _Run | None = None
        self._current_end_s = 0.0
        self._running = 0  # prefilling + decoding
        self._decoding = 0
        self._pinned: dict[int, int] = {}  # block -> running requests that use it
        self._idle: dict[int, None] = {}  # reusable blocks, least recently used first
        self._anonymous_blocks = 0  # blocks of generated tokens
        self._heap: list[tuple[float, int, _Run]] = []
        self._sequence = 0
        self._events: list[EngineEvent] = []
        self.busy_s = 0.0
        """Seconds spent in prefill so far (counted at its start)."""
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0
        self.output_tokens_total = 0
        self.finished_total = 0

    # -- what goes in --------------------------------------------------------------------------

    def submit(
        self, request_id: str, blocks: Sequence[int], prompt_tokens: int, output_tokens: int, now: float
    ) -> None:
        """Queue a request. `blocks` are the chained hashes of its prompt's blocks (`hash_prompt`).

        Raises `EngineFull`, and `ValueError` for an id that is already here.
        """
        if request_id in self._runs:
            raise ValueError(f"request {request_id!r} is already in this engine")
        if len(self._waiting) >= self.settings.waiting_max:
            raise EngineFull(f"{len(self._waiting)} requests wait")
        self._run_until(now)
        run = _Run(request_id, blocks, max(1, prompt_tokens), max(1, output_tokens))
        run.expected_cached_tokens = self._tokens_of(self.match_with_queue(blocks), run.prompt_tokens)
        self._runs[request_id] = run
        self._waiting[request_id] = run
        self._count_waiting(run, 1)
        self._start_prefill(now)

    def abort(self, request_id: str, now: float) -> bool:
        """Drop a request wherever it is; False if it is not here (any more). Its blocks stay reusable once prefilled."""
        self._run_until(now)
        run = self._runs.get(request_id)
        if run is None:
            return False
        if run.state == WAITING:
            del self._waiting[request_id]
            self._count_waiting(run, -1)
            self._leave(run)
            self._start_prefill(now)  # it may have been the one that waited for memory
            return True
        if run.state == PREFILLING:
            self.busy_s -= max(0.0, self._current_end_s - now)
            self._current = None
            self._release(run, keep_blocks=run.cached_blocks)
        else:
            self._decoding -= 1
            self._release(run, keep_blocks=len(run.blocks))
        self._leave(run)
        self._start_prefill(now)
        return True

    def flush(self, now: float) -> int:
        """Forget every block that no running request uses; the number of blocks forgotten."""
        self._run_until(now)
        dropped = tuple(self._idle)
        self._idle.clear()
        if self.settings.emits_blocks:
            if not self._pinned:
                self._events.append(CacheCleared(now))
            elif dropped:
                self._events.append(BlocksRemoved(now, dropped))
        return len(dropped)

    def advance(self, now: float) -> list[EngineEvent]:
        """Everything that happened up to `now` and was not reported yet, in order of time."""
        self._run_until(now)
        events, self._events = self._events, []
        return events

    def deadline(self) -> float | None:
        """When to call `advance` next; None while nothing is due."""
        if self._events:
            return self._now_s
        heap = self._heap
        while heap and heap[0][2].state == GONE:
            heappop(heap)
        return heap[0][0] if heap else None

    # -- what can be read ----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in prefill or decode."""
        return self._running

    @property
    def decoding(self) -> int:
        """Requests that produce tokens now."""
        return self._decoding

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def waiting_uncached_tokens(self) -> int:
        """Prompt tokens in the queue that neither the cache nor an earlier waiting request will provide."""
        return self._waiting_uncached_tokens

    @property
    def used_blocks(self) -> int:
        """Blocks that running requests hold."""
        return len(self._pinned) + self._anonymous_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks of prompts in the cache, in use or idle."""
        return len(self._pinned) + len(self._idle)

    @property
    def kv_usage_ratio(self) -> float:
        """Share of the blocks that running requests hold, 0 to 1 (idle cached blocks count as free)."""
        return min(1.0, self.used_blocks / self.settings.cache_blocks)

    def backlog_s(self, now: float) -> float:
        """Seconds until a request submitted now would start its prefill, if slots and memory allow."""
        slow = self.slowdown()
        current = max(0.0, self._current_end_s - now) if self._current is not None else 0.0
        return current + self._waiting_prefill_s * slow

    def slowdown(self) -> float:
        """How much longer a prefill takes now because of decoding requests (1.0 and up)."""
        settings = self.settings
        return 1.0 + settings.decode_slowdown * self._decoding / settings.slots

    def match(self, blocks: Sequence[int]) -> int:
        """Leading blocks of `blocks` that are cached now."""
        pinned, idle = self._pinned, self._idle
        depth = 0
        for block in blocks:
            if block not in pinned and block not in idle:
                break
            depth += 1
        return depth

    def match_with_queue(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are cached now or that an earlier waiting request will bring."""
        pinned, idle, coming = self._pinned, self._idle, self._waiting_blocks
        depth = 0
        for block in blocks:
            if block not in pinned and block not in idle and block not in coming:
                break
            depth += 1
        return depth

    # -- the schedule --------------------------------------------------------------------------

    def _run_until(self, now: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= now:
            at_s, _, run = heappop(heap)
            if run.state == PREFILLING:
                self._end_prefill(run, at_s)
            elif run.state == DECODING:
                self._decode(run, at_s)
        if now > self._now_s:
            self._now_s = now

    def _schedule(self, at_s: float, run: _Run) -> None:
        self._sequence += 1
        heappush(self._heap, (at_s, self._sequence, run))
        if len(self._heap) > 4 * self.settings.slots + 64:  # aborted runs leave their entry behind
            self._heap = [entry for entry in self._heap if entry[2].state != GONE]
            heapify(self._heap)

    def _start_prefill(self, now: float) -> None:
        """Start the head of the queue if the prefill unit, a slot and the memory are free."""
        settings = self.settings
        if self._current is not None or not self._waiting or self._running >= settings.slots:
            return
        run = next(iter(self._waiting.values()))
        blocks, pinned, idle = run.blocks, self._pinned, self._idle
        cached = self.match(blocks)
        total_blocks = -(-(run.prompt_tokens + run.output_tokens) // settings.block_tokens)
        run.anonymous_blocks = max(0, total_blocks - len(blocks))
        newly_pinned = sum(1 for block in blocks if block not in pinned)
        if (
            self._running > 0
            and self.used_blocks + newly_pinned + run.anonymous_blocks > settings.cache_blocks
        ):
            return  # waits for memory; a lone request always starts
        del self._waiting[run.request_id]
        self._count_waiting(run, -1)
        for block in reversed(blocks):  # leaves first: a parent must never look older than its child
            users = pinned.get(block)
            if users is not None:
                pinned[block] = users + 1
            else:
                idle.pop(block, None)
                pinned[block] = 1
        self._anonymous_blocks += run.anonymous_blocks
        self._evict(now)
        run.cached_blocks = cached
        run.cached_tokens = self._tokens_of(cached, run.prompt_tokens)
        run.prefill_s = (
            settings.prefill_s(run.prompt_tokens - run.cached_tokens, run.cached_tokens) * self.slowdown()
        )
        run.state = PREFILLING
        self.busy_s += run.prefill_s
        self._current, self._current_end_s = run, now + run.prefill_s
        self._running += 1
        self._schedule(self._current_end_s, run)

    def _end_prefill(self, run: _Run, at_s: float) -> None:
        settings = self.settings
        self._current = None
        self._decoding += 1
        run.state = DECODING
        run.first_s = at_s
        run.interval_s = settings.decode_base_s + settings.decode_per_running_s * self._decoding
        self.prompt_tokens_total += run.prompt_tokens
        self.cached_tokens_total += run.cached_tokens
        self.output_tokens_total += 1
        if settings.emits_blocks and run.cached_blocks < len(run.blocks):
            parent = run.blocks[run.cached_blocks - 1] if run.cached_blocks else 0
            self._events.append(BlocksStored(at_s, parent, tuple(run.blocks[run.cached_blocks :])))
        self._events.append(FirstToken(run.request_id, at_s, run.cached_tokens, run.prefill_s))
        steps = 1 if settings.emits_tokens and run.output_tokens > 1 else run.output_tokens - 1
        self._schedule(at_s + steps * run.interval_s, run)
        self._start_prefill(at_s)

    def _decode(self, run: _Run, at_s: float) -> None:
        if self.settings.emits_tokens and run.next_token <= run.output_tokens:
            self._events.append(Token(run.request_id, at_s, run.next_token))
            self.output_tokens_total += 1
            run.next_token += 1
            if run.next_token <= run.output_tokens:
                # From the first token, not from the last one: rounding must not add up over a long answer.
                self._schedule(run.first_s + (run.next_token - 1) * run.interval_s, run)
                return
        else:
            self.output_tokens_total += run.output_tokens - 1
        self.finished_total += 1
        self._events.append(Finished(run.request_id, at_s, run.output_tokens))
        self._decoding -= 1
        self._release(run, keep_blocks=len(run.blocks))
        self._leave(run)
        self._evict(at_s)
        self._start_prefill(at_s)

    # -- blocks --------------------------------------------------------------------------------

    def _release(self, run: _Run, keep_blocks: int) -> None:
        """Unpin a run's blocks; the first `keep_blocks` stay reusable, the others were never computed."""
        self._running -= 1
        self._anonymous_blocks -= run.anonymous_blocks
        pinned, idle = self._pinned, self._idle
        for position in range(len(run.blocks) - 1, -1, -1):
            block = run.blocks[position]
            users = pinned[block] - 1
            if users:
                pinned[block] = users
            else:
                del pinned[block]
                if position < keep_blocks:
                    idle[block] = None

    def _evict(self, now: float) -> None:
        over = len(self._pinned) + self._anonymous_blocks + len(self._idle) - self.settings.cache_blocks
        if over <= 0 or not self._idle:
            return
        removed = []
        while over > 0 and self._idle:
            block = next(iter(self._idle))
            del self._idle[block]
            removed.append(block)
            over -= 1
        if self.settings.emits_blocks:
            self._events.append(BlocksRemoved(now, tuple(removed)))

    def _tokens_of(self, cached_blocks: int, prompt_tokens: int) -> int:
        """Cached tokens of a match: the last prompt token is always computed, it yields the first logits."""
        return min(cached_blocks * self.settings.block_tokens, prompt_tokens - 1)

    def _count_waiting(self, run: _Run, sign: Literal[1, -1]) -> None:
        uncached = run.prompt_tokens - run.expected_cached_tokens
        self._waiting_uncached_tokens += sign * uncached
        self._waiting_prefill_s += sign * self.settings.prefill_s(uncached, run.expected_cached_tokens)
        if not self._waiting:
            self._waiting_prefill_s = 0.0  # float dust must not outlive the queue
        coming = self._waiting_blocks
        for block in run.blocks:
            count = coming.get(block, 0) + sign
            if count:
                coming[block] = count
            else:
                del coming[block]

    def _leave(self, run: _Run) -> None:
        run.state = GONE
        del self._runs[run.request_id]


def hash_prompt(text: str | bytes, block_bytes: int, seed: int = 0) -> list[int]:
    """Chained hashes of the full blocks of a prompt: equal hashes at a position mean equal prefixes.

    Only full blocks: an engine cannot reuse a block before it is full. `block_bytes` is the engine's
    block in bytes of text, about four times its tokens.
    """
    return chain(text, block_bytes, seed)
