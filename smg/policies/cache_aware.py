"""`cache_aware`, the default policy: the worker that answers soonest, counting caches, queues and the others.

This room owns the verbs of the policy: it turns a call into hashes and tokens (`question`), asks
`price` (or the `threshold` rule) for the choice, books what was placed, and learns from what answers
tell: seconds of prefill, characters per token, sizes of caches. It never sends, never waits and never
reads a clock; choosing and explaining change nothing that a later choice could notice (EXP-1).

Other gateways enter by three calls (docs/routing.md 4.2 and 4.5): `heard` takes a peer's placement in,
`decide` answers a peer's question as the owner of its session, `follow` takes such an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from smg.api.call import Call
from smg.fleet.block_hashes import BlockHasher
from smg.fleet.prefix_index import IndexSettings, Match, PrefixIndex
from smg.fleet.service_model import CacheCapacity, PrefillModels, TokenLength
from smg.fleet.worker import Worker
from smg.policies.account import Account, Open, slowdown
from smg.policies.homes import key_of
from smg.policies.neighbours import Alone, Decision, Neighbours, News, Question
from smg.policies.policy import Outcome, Terms, Wants
from smg.policies.price import FLEET_MAX, Prices, cached_tokens, session
from smg.policies.threshold import ThresholdRule
from smg.settings import Routing

FOLLOWED_MAX = 4_096
"""Answers of owners that wait to be followed; each waits for microseconds."""
OBSERVE_S = 1e-4
"""A prefill shorter than this is the network's time, not the worker's."""


class CacheAwareSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The dials of `cache_aware`."""

    mode: str = "price"
    """`price` or `threshold`."""
    price: float = 2.0
    """`--cache-price`: 1 is fastest at low load, 2 the best over all, 8 reaches the highest hit ratio."""
    threshold: ThresholdRule = ThresholdRule()


def cache_aware_settings(routing: Routing) -> CacheAwareSettings:
    """The dials as the command line sets them."""
    return CacheAwareSettings(
        mode=routing.cache_aware_mode,
        price=routing.cache_price,
        threshold=ThresholdRule(
            threshold=routing.cache_threshold,
            balance_abs=routing.balance_abs_threshold,
            balance_rel=routing.balance_rel_threshold,
            token_usage=routing.balance_token_usage_threshold,
        ),
    )


class CacheAware:
    """The policy of one model. Index, hasher and fits belong to the node and are shared by its models."""

    name = "cache_aware"
    wants = Wants.TEXT | Wants.KEY
    is_random = False

    def __init__(
        self,
        model: str,
        settings: CacheAwareSettings | None = None,
        index: PrefixIndex | None = None,
        hasher: BlockHasher | None = None,
        fits: PrefillModels | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        settings = settings if settings is not None else CacheAwareSettings()
        self._model = model
        self._rule = settings.threshold if settings.mode == "threshold" else None
        self._index = index if index is not None else PrefixIndex()
        self._hasher = hasher if hasher is not None else BlockHasher()
        self._fits = fits if fits is not None else PrefillModels()
        self._neighbours: Neighbours = neighbours if neighbours is not None else Alone()
        self._prices = Prices(model, settings.price, self._index, self._fits, self._neighbours)
        self._length = TokenLength()
        self._open: dict[tuple[int, str], Open] = {}  # by (id of the call, worker): placed and not finished
        self._followed: dict[int, Decision] = {}  # by id of the call
        self._memo: tuple[Call, Question] | None = None
        self._matched: tuple[Question, Match] | None = None  # what the last choice saw

    @classmethod
    def alone(cls, routing: Routing) -> CacheAware:
        """A policy with an index of its own, for whoever has one model and no mesh (tests, tools)."""
        return cls(
            "", cache_aware_settings(routing), PrefixIndex(IndexSettings(bytes_max=routing.max_tree_size))
        )

    # -- the verbs of a policy -----------------------------------------------------------------

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The candidate with the lowest cost; ties by priority, then by `rng`."""
        if not workers:
            return None
        if self._followed:
            decision = self._followed.get(id(call))
            if decision is not None:
                for worker in workers:
                    if worker.id == decision.worker_id:
                        return worker
        question = self.question(call)
        if self._rule is not None:
            return self._rule.choose(question.blocks, workers, self._index, rng)[0]
        view = self._prices.view(question, workers, now)
        self._matched = (question, view.match)
        return self._prices.cheapest(view, workers, now, rng)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Book the request: its blocks, its seconds, its share of the price; and tell the peers."""
        question = self.question(call)
        followed = self._followed.pop(id(call), None) if self._followed else None
        matched, self._matched = self._matched, None
        if matched is not None and matched[0] is question:  # chosen just now
            match = matched[1]
        else:
            match = self._index.match(question.blocks)
        cached = cached_tokens(question, match.depth_of(self._index.bits_of(worker.id)))
        account = self._prices.account(worker)
        if account.capacity is None:
            self._measure(account, worker, question)
        seconds = account.fit.seconds(question.tokens - cached, cached)
        request = Open(seconds, now, call.is_stream, cached, question)
        self._open[(id(call), worker.id)] = request
        self._prices.note(account, worker)
        account.place(id(call), request)
        self._prices.moved(account, worker.id, now)
        self._prices.admit(seconds * slowdown(worker.in_flight), now)
        placement = self._index.place(worker.id, question.blocks)
        if followed is None or followed.worker_id != worker.id:  # else its owner has told it
            self._neighbours.tell(News(placement, seconds), now)

    def first_byte(self, call: Call, worker: Worker, ttft_s: float, now: float) -> None:
        """The prefill of the call is over."""
        account = self._prices.known(worker.id)
        if account is not None:
            self._prices.note(account, worker)
            account.first_byte(id(call), slowdown(worker.in_flight), now)
            self._prices.moved(account, worker.id, now)

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """Settle the account and learn from the answer."""
        request = self._open.pop((id(call), worker.id), None)
        account = self._prices.known(worker.id)
        if request is None or account is None:
            return
        self._prices.note(account, worker)
        account.end(id(call), now)
        self._prices.moved(account, worker.id, now)
        if outcome.is_success:
            self._learn(worker.id, account, request, outcome, now)

    def removed(self, worker: Worker) -> None:
        """The worker left: it owns nothing, and its account is closed."""
        self._index.forget(worker.id)
        self._prices.close(worker.id)

    def flushed(self, worker: Worker) -> None:
        """The worker's cache is empty. What is in flight there still costs its seconds."""
        self._index.forget(worker.id)

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """What every candidate costs, by the arithmetic of `choose`; changes nothing."""
        if not workers:
            return []
        question = self.question(call)
        view = self._prices.view(question, workers, now)
        depths = [view.match.depth_of(self._index.bits_of(worker.id)) for worker in workers]
        if self._rule is not None:
            chosen, reason = self._rule.choose(question.blocks, workers, self._index, rng)
            return [
                Terms(worker.id, matched_blocks=depth, reason=reason if worker is chosen else "")
                for worker, depth in zip(workers, depths, strict=True)
            ]
        priced = set(self._prices.promising(view, workers, now)) if len(workers) > FLEET_MAX else None
        rows = []
        for position, worker in enumerate(workers):
            wait, prefill, penalty = self._prices.terms(view, worker, now)
            cost = (wait + prefill + penalty) * worker.spec.cost
            reason = f"{depths[position]} of {len(question.blocks)} blocks cached"
            if priced is not None and position not in priced:
                reason += "; not among the promising of a large fleet"
            rows.append(Terms(worker.id, cost, wait, prefill, penalty, depths[position], reason))
        return rows

    # -- other gateways ------------------------------------------------------------------------

    def question(self, call: Call) -> Question:
        """What deciding needs of a call. Remembered for the last call: it is asked for more than once."""
        memo = self._memo
        if memo is not None and memo[0] is call:
            return memo[1]
        salt = call.document.get("cache_salt")
        seed = self._hasher.seed(self._model, salt if isinstance(salt, str) else "")
        key = key_of(call.routing_key) if call.routing_key else None
        ids = call.token_ids()
        if ids is not None:
            blocks = self._hasher.token_blocks(ids, seed)
            question = Question(
                tuple(blocks), max(1, len(ids)), float(self._hasher.settings.block_tokens), key, 0
            )
        else:
            data = call.text().encode("utf-8", "surrogatepass")
            blocks = self._hasher.text_blocks(data, seed)
            block_tokens = self._hasher.settings.block_bytes / self._length.chars_per_token
            question = Question(tuple(blocks), self._length.tokens(len(data)), block_tokens, key, len(data))
        self._memo = (call, question)
        return question

    def session(self, question: Question) -> int | None:
        """The key whose owner should decide a question; None when there is nothing that could be shared."""
        match = self._index.match(question.blocks)
        return session(question, self._index.trunk_depth(question.blocks, match.depth))

    def uncached_s(self, question: Question) -> float:
        """Prefill seconds that are cached nowhere as far as we know: what an owner's answer is worth asking for."""
        cached = cached_tokens(question, self._index.match(question.blocks).depth)
        return self._fits.get(self._model).seconds(question.tokens - cached, cached)

    def decide(
        self, question: Question, workers: Sequence[Worker], now: float, rng: Random
    ) -> Decision | None:
        """Answer a peer's question as the owner of its session, and book the placement at once."""
        if not workers:
            return None
        view = self._prices.view(question, workers, now)
        worker = self._prices.cheapest(view, workers, now, rng)
        depth = view.match.depth_of(self._index.bits_of(worker.id))
        account = self._prices.account(worker)
        cached = cached_tokens(question, depth)
        seconds = account.fit.seconds(question.tokens - cached, cached)
        self._prices.note(account, worker)
        account.peer_placed(seconds, now)
        self._prices.moved(account, worker.id, now)
        self._prices.admit(seconds, now)
        placement = self._index.place(worker.id, question.blocks)
        self._neighbours.tell(News(placement, seconds), now)
        return Decision(worker.id, seconds, depth)

    def follow(self, call: Call, decision: Decision) -> None:
        """The owner has answered: the next `choose` of this call follows if that worker is a candidate."""
        if len(self._followed) >= FOLLOWED_MAX:
            del self._followed[next(iter(self._followed))]
        self._followed[id(call)] = decision

    def heard(self, news: News, sent_s: float, now: float) -> bool:
        """A peer's placement, sent at `sent_s` of our clock. False if its parent blocks are not known here."""
        worker_id = news.placement.worker_id
        account = self._prices.known(worker_id)
        if account is not None:
            account.peer_placed(news.seconds, sent_s)
            self._prices.moved(account, worker_id, now)
        self._prices.admit(news.seconds, now)
        return self._index.apply(news.placement)

    # -- learning ------------------------------------------------------------------------------

    def _measure(self, account: Account, worker: Worker, question: Question) -> None:
        """Start the learned size of a worker's cache from what its engine tells, if it does."""
        report = worker.report
        if report is not None and report.kv_capacity_tokens:
            account.capacity = CacheCapacity(report.kv_capacity_tokens)
            self._resize(account, worker.id, question)

    def _resize(self, account: Account, worker_id: str, question: Question) -> None:
        """Fit the index to the cache: also when a token turned out to have another length."""
        if account.capacity is not None:
            blocks = int(account.capacity.tokens / question.block_tokens)
            if abs(blocks - self._index.capacity_of(worker_id)) > blocks >> 6:
                self._index.set_capacity(worker_id, blocks)

    def _learn(self, worker_id: str, account: Account, request: Open, outcome: Outcome, now: float) -> None:
        prices, question = self._prices, request.question
        if request.is_stream and outcome.ttft_s is not None:
            decode_s = max(0.0, outcome.duration_s - outcome.ttft_s)
            prices.decode_s += 0.05 * (decode_s - prices.decode_s)
        prompt, cached = outcome.prompt_tokens, outcome.cached_tokens
        if not prompt:
            return
        if question.chars:
            self._length.observe(question.chars, prompt)
        predicted = request.predicted_tokens
        if request.observed_s is not None and request.observed_s > OBSERVE_S:
            # An engine that does not tell what it had cached teaches only where nothing could be.
            had = min(cached, prompt - 1) if cached is not None else 0
            if cached is not None or not predicted:
                seconds = request.observed_s / request.slowdown
                account.fit.observe(prompt - had, had, seconds, request.is_queued)
        if cached is None:
            return
        if predicted:
            if account.capacity is None:
                account.capacity = CacheCapacity(self._index.capacity_of(worker_id) * question.block_tokens)
            claimed = self._index.blocks_of(worker_id) * question.block_tokens
            account.capacity.observe(predicted, cached, claimed, now)
            self._resize(account, worker_id, question)
        elif question.blocks and prices.sigma() > 0.0:
            # Nothing was known of this session here: how much did a worker hold that a peer had chosen?
            share = min(1.0, cached / max(1.0, len(question.blocks) * question.block_tokens))
            prices.home_share += 0.02 * (share - prices.home_share)
