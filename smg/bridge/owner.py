"""Owner placement: one node decides for all requests of a session while much prefill is at stake (docs/routing.md 4.5).

Owns the question to the owner, its deadline, the rest of an owner that did not answer, and the answering side. A request that
asks is late by `PATIENCE_MAX_S` at worst, and then decided here as ever; an owner that hangs costs one such wait and is left alone
for a while (MSH-7). It must never ask twice for one request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random

import msgspec
import trio

from mesh import BoundError, WeatherError
from smg.api.call import Call
from smg.bridge import rendezvous, words
from smg.bridge.peers import Peers
from smg.bridge.prefixes import SharedPrefixes, cache_aware_of, is_sticky
from smg.bridge.words import PLACEMENT, VERSION, Asked, Told
from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, Worker
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import Decision, Question
from smg.policies.policy import Policy

WORTH_S = 0.04
"""Uncached prefill from which a question pays, about 400 tokens of a mid-size model: many times what it costs."""
PATIENCE_MIN_S = 0.005
PATIENCE_MAX_S = 0.02
PATIENCE_SHARE = 0.2
"""How long an answer is waited for: a share of the prefill that is at stake, within these bounds. A LAN answers within one
millisecond; what is late was held up by a busy loop."""
REST_MIN_S = 0.02
REST_MAX_S = 10.0
"""An owner that did not answer twice in a row is not asked for this long, doubled each time, until it answers again: one that
hangs costs nine waits until it is known dead, one that was only busy is asked again at once."""
BLOCKS_MAX = 7_500
"""A question must fit into 64 KB; a longer prompt is decided here."""

RESULTS = ("followed", "late", "failed", "refused", "resting")
"""What became of questions: the answer counted; none in time; the stream broke; the owner knew no worker; not asked."""


class Worth(msgspec.Struct, frozen=True, gc=False):
    """A question that is worth asking."""

    owner: str
    policy: CacheAware
    question: Question
    stake_s: float
    """Seconds of prefill that are cached nowhere."""


class _Rest:
    __slots__ = ("misses", "until_s")

    def __init__(self) -> None:
        self.misses = 0
        self.until_s = 0.0


class Owners:
    """See the module. `ask` is `Agent.ask`; `policy_of` gives the policy of a model, made if need be; `waited` is told
    how long each answer took."""

    def __init__(
        self,
        peers: Peers,
        registry: Registry,
        prefixes: SharedPrefixes,
        *,
        ask: Callable[[str, bytes], Awaitable[bytes]],
        policy_of: Callable[[str], Policy],
        clock: Callable[[], float],
        rng: Random,
        waited: Callable[[float], None],
        is_on: bool = True,
    ) -> None:
        self._peers = peers
        self._registry = registry
        self._prefixes = prefixes
        self._ask = ask
        self._policy_of = policy_of
        self._clock = clock
        self._rng = rng
        self._waited = waited
        self._is_on = is_on
        self._rests: dict[str, _Rest] = {}
        self.counts = dict.fromkeys(RESULTS, 0)
        self.answered = 0
        """Questions of peers that this node answered with a worker."""

    # -- asking

    def worth(self, call: Call, policy: Policy) -> Worth | None:
        """Who should decide instead of us, and what to ask; None when nobody should. Changes nothing."""
        if not self._is_on or self._peers.count < 2:
            return None
        cache_aware = cache_aware_of(policy)
        if cache_aware is None or (call.routing_key and is_sticky(policy)):
            return None  # a key that sticks is decided by the sticky map
        question = cache_aware.question(call)
        if len(question.blocks) > BLOCKS_MAX:
            return None
        stake_s = cache_aware.uncached_s(question)
        if stake_s < WORTH_S:
            return None
        session = cache_aware.session(question)
        if session is None:
            return None
        peers = self._peers
        nodes = [peers.name, *(name for name in peers.live_names if peers.hashes_meet(name))]
        owner = rendezvous.first(session.to_bytes(8, "big"), nodes)
        if owner is None or owner == peers.name or not peers.is_well(owner):
            return None
        return Worth(owner, cache_aware, question, stake_s)

    async def consult(self, call: Call, worth: object) -> str | None:
        """Ask the owner of this call's session; the next `choose` of the call follows its answer.

        The owner's name when it answered, else None. Waits `PATIENCE_MAX_S` at most.
        """
        assert isinstance(worth, Worth)
        decision = await self._decision(call, worth, books=True)
        if decision is None:
            return None
        worth.policy.follow(call, decision)
        return worth.owner

    async def predict(
        self, call: Call, policy: Policy, candidates: Sequence[Worker]
    ) -> tuple[Worker, str] | None:
        """Whom the owner would choose, and its name, for `explain`; books nothing anywhere."""
        worth = self.worth(call, policy)
        if worth is None:
            return None
        decision = await self._decision(call, worth, books=False)
        for worker in candidates:
            if decision is not None and worker.id == decision.worker_id:
                return worker, worth.owner
        return None

    async def _decision(self, call: Call, worth: Worth, *, books: bool) -> Decision | None:
        owner, question, now = worth.owner, worth.question, self._clock()
        rest = self._rests.get(owner)
        if rest is not None and now < rest.until_s:
            self.counts["resting"] += books
            return None
        if rest is not None and rest.misses > 1:
            rest.until_s = now + REST_MIN_S  # one question at a time finds out whether it answers again
        asked = Asked(
            VERSION,
            PLACEMENT,
            books,
            call.model,
            question.tokens,
            question.block_tokens,
            question.key,
            question.chars,
            words.pack_hashes(question.blocks),
        )
        started_s = trio.current_time()
        answer = None
        patience_s = min(max(PATIENCE_SHARE * worth.stake_s, PATIENCE_MIN_S), PATIENCE_MAX_S)
        with trio.move_on_after(patience_s) as patience:
            try:
                answer = await self._ask(owner, words.encode(asked))
            except (WeatherError, BoundError):
                pass
        if answer is None:
            self.counts["late" if patience.cancelled_caught else "failed"] += books
            self._missed(owner)
            return None
        self._rests.pop(owner, None)
        self._waited(trio.current_time() - started_s)
        told = words.read_told(answer)
        worker_id = "" if told is None else words.id_of_key(told.worker_id)
        if told is None or not worker_id:
            self.counts["refused"] += books
            return None
        self.counts["followed"] += books
        return Decision(worker_id, max(0.0, told.prefill_s), told.matched_blocks, owner)

    def _missed(self, owner: str) -> None:
        rest = self._rests.setdefault(owner, _Rest())
        rest.misses += 1
        if rest.misses > 1:
            rest.until_s = self._clock() + min(REST_MIN_S * 2.0 ** min(rest.misses - 2, 9), REST_MAX_S)
        if len(self._rests) > 4096:
            self._rests = {name: one for name, one in self._rests.items() if self._peers.is_live(name)}

    # -- answering

    def answer(self, peer: str, asked: Asked) -> bytes:
        """This node is the owner of a peer's session: choose, and book it if it is meant."""
        decision = self._decide(peer, asked)
        if decision is None:
            return words.encode(Told(VERSION))
        if asked.books:
            self.answered += 1
        return words.encode(
            Told(VERSION, words.worker_key(decision.worker_id), decision.seconds, decision.matched_blocks)
        )

    def _decide(self, peer: str, asked: Asked) -> Decision | None:
        if not self._peers.hashes_meet(peer):
            return None
        pool = self._registry.pool_of(asked.model, Kind.REGULAR)
        if pool is None or (asked.model and pool.model != asked.model):
            return None  # a policy is made for models that workers claim, not for whatever a peer names
        policy = cache_aware_of(self._policy_of(asked.model))
        now = self._clock()
        candidates = pool.candidates(now)
        if policy is None or not candidates:
            return None
        question = Question(
            words.unpack_hashes(asked.hashes),
            max(1, asked.tokens),
            asked.block_tokens,
            asked.key,
            asked.chars,
        )
        if not asked.books:
            foreseen = Random()
            foreseen.setstate(self._rng.getstate())  # explaining must not change what is chosen next (EXP-1)
            return policy.foresee(question, candidates, now, foreseen)
        self._prefixes.decide_for(peer)
        try:
            return policy.decide(question, candidates, now, self._rng)
        finally:
            self._prefixes.decide_for(None)
