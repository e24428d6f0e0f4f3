"""`cache_aware`, the default policy: the worker that answers soonest, counting caches, queues and the others.

This room owns the verbs of the policy: it turns a call into hashes and tokens (`question`), asks
`price` (or the `threshold` rule) for the choice, books what was placed, and learns from what answers
tell: seconds of prefill, characters per token, sizes of caches. It never sends, never waits and never
reads a clock; choosing and explaining change nothing that a later choice could notice (EXP-1).

Other gateways enter by three calls (docs/routing.md): `heard` takes a peer's placement in,
`decide` answers a peer's question as the owner of its session, `follow` takes such an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from smg.api.call import Call
from smg.fleet.block_hashes import BlockHasher, chain
from smg.fleet.prefix_index import IndexSettings, PrefixIndex
from smg.fleet.service_model import CacheCapacity, PrefillModels, TokenLength
from smg.fleet.worker import Worker
from smg.policies.account import SLOTS, SLOWDOWNS, Account, Open, slowdown
from smg.policies.homes import key_of
from smg.policies.neighbours import Alone, Decision, Neighbours, News, Question
from smg.policies.policy import Outcome, Terms, Wants
from smg.policies.price import FLEET_MAX, Prices, View, cached_tokens, session
from smg.policies.threshold import ThresholdRule
from smg.settings import Routing

FOLLOWED_MAX = 4_096
"""Answers of owners that wait to be followed; each waits for microseconds."""
CHARS_PER_TOKEN = 4
"""For counts of characters where a prompt came as token ids."""
HOME_RATE = 0.02
"""Share of an error that is corrected in the belief of what a first home holds: about the last 50 sessions count."""
NO_CACHE_S = 60.0
"""How long a worker is taken to have no prefix cache after a long row of answers said so; then it is tried again."""
RESCALE = 0.1
"""A lesson that changes the fit by more than this also changes what was booked with it before: only the first lessons do."""
OBSERVE_S = 1e-4
"""A prefill shorter than this is the network's time, not the worker's."""


NO_QUESTION = Question((), 1, 1.0, None, 0)
"""Before the first one."""


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
            overload=routing.overload_token_usage_threshold,
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
        self._followed: dict[int, Decision] = {}  # by id of the call
        self._seed = self._hasher.seed(model)
        self._block_bytes = self._hasher.settings.block_bytes
        self._is_alone = isinstance(self._neighbours, Alone)
        # The last question and its match, from `choose` to `placed`: nothing comes between the two.
        self._asked: Call | None = None
        self._question = NO_QUESTION
        self._view: View | None = None
        self._is_blind = False  # while no worker has a cache, prompts are not hashed
        self._none_until_s = float("-inf")  # until then some worker at least is known to have no cache
        # Counted here and read when somebody scrapes (contract MET-9).
        self.prompt_chars = 0
        """Characters of routing text placed, four for each token where the client sent token ids."""
        self.matched_chars = 0
        """Those of them that the index believed on the worker that got them."""
        self.predicted_tokens = 0
        """Prompt tokens that the index predicted to be cached, over the answers that told `cached_tokens`."""
        self.cached_tokens = 0
        """Prompt tokens that those answers said were cached."""
        self.text_prompts = 0
        """Prompts looked at that came as text."""

    @property
    def model(self) -> str:
        """The model whose requests it places."""
        return self._model

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
        prices = self._prices
        self._is_blind = prices.blind_until_s > now
        question = self.question(call)
        if self._rule is not None:
            return self._rule.choose(question.blocks, workers, self._index, rng)[0]
        self._view = view = prices.view(question, workers, now)
        return prices.cheapest(view, workers, now, rng)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Book the request: its blocks, its seconds, its share of the price; and tell the peers."""
        question = self._question if self._asked is call else self.question(call)
        worker_id, call_id = worker.id, id(call)
        index, prices = self._index, self._prices
        view = self._view
        if view is not None and view.question is question:
            match, homes = view.match, view.homes
        else:
            match, homes = index.match(question.blocks), ()
        self._asked = self._view = None  # a call is placed once: its body must not outlive it here
        account = prices.accounts.get(worker_id) or prices.account(worker)
        report = worker.report
        if report is not None:
            if account.capacity is None:
                self._measure(account, worker, question)
            if report is not account.report:
                prices.note(account, worker)
        tokens, chars, depth, cached = question.tokens, question.chars, 0, 0
        decision = self._followed.pop(call_id, None) if self._followed else None
        is_told = decision is not None and decision.worker_id == worker_id
        if decision is not None and is_told:
            # Its owner has told everybody, and by now perhaps our index too, which then holds this very prompt.
            depth = min(decision.matched_blocks, len(question.blocks))
            cached = cached_tokens(question, depth)
        elif match.steps:
            own = index.bits.get(worker_id, 0)
            deepest, owners = match.steps[0]
            depth = deepest if own & owners else match.depth_of(own)
            if depth:
                cached = cached_tokens(question, depth)
        self.prompt_chars += chars or tokens * CHARS_PER_TOKEN
        self.matched_chars += depth * self._block_bytes if chars else cached * CHARS_PER_TOKEN
        seconds = account.fit.seconds(tokens - cached, cached)
        request = Open(call, seconds, now, call.is_stream, cached, question)
        if homes and homes[0] == worker_id:
            request.home_blocks = len(question.blocks) - depth
        account.placed[call_id] = request
        account.place(call_id, request)
        if prices.is_ordered:
            prices.moved(account, worker_id, now)
        in_flight = worker.in_flight
        prices.admit(seconds * SLOWDOWNS[in_flight if in_flight < SLOTS else SLOTS], now)
        blocks = question.blocks if account.no_cache_until_s <= now else ()
        if self._is_alone:
            if blocks:
                index.use(worker_id, blocks)
        else:
            placement = index.place(worker_id, blocks)
            if not is_told:
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
        worker_id, call_id, prices = worker.id, id(call), self._prices
        account = prices.accounts.get(worker_id)
        if account is None:
            return
        request = account.placed.pop(call_id, None)
        if request is None:
            return
        if worker.report is not account.report:
            prices.note(account, worker)
        account.end(call_id, now)
        if prices.is_ordered:
            prices.moved(account, worker_id, now)
        if not outcome.is_success:
            return
        if not request.is_stream:
            if account.has_others:
                account.passed(request.sent_s, now)
        elif outcome.ttft_s is not None:
            decode_s = outcome.duration_s - outcome.ttft_s
            prices.decode_s += 0.05 * (max(0.0, decode_s) - prices.decode_s)
        if outcome.prompt_tokens:
            self._learn(worker_id, account, request, outcome, now)
        elif request.observed_s is not None and _is_mostly_new(request, request.question.tokens):
            # The client asked for no usage. Where little can be cached, time and our own count of tokens teach too.
            self._learn_pace(account, request, request.question.tokens, request.predicted_tokens)

    def removed(self, worker: Worker) -> None:
        """The worker left: it owns nothing, and its account is closed."""
        self._index.forget(worker.id)
        self._prices.close(worker.id)

    def flushed(self, worker: Worker) -> None:
        """The worker's cache is empty. What is in flight there still costs its seconds."""
        self._index.forget(worker.id)
        account = self._prices.known(worker.id)
        if account is not None:
            account.sized_blocks = 0
            account.no_cache_until_s = self._prices.blind_until_s = self._none_until_s = float("-inf")

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """What every candidate costs, by the arithmetic of `choose`; changes nothing."""
        if not workers:
            return []
        self._is_blind = self._prices.blind_until_s > now
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
        if self._asked is call:
            return self._question
        seed, document = self._seed, call.document
        if "cache_salt" in document and isinstance(document["cache_salt"], str):
            seed = self._hasher.seed(self._model, document["cache_salt"])
        key = key_of(call.routing_key) if call.routing_key else None
        ids = call.token_ids() if call.endpoint.takes_token_ids else None
        if self._is_blind:
            if ids is not None:
                question = Question((), max(1, len(ids)), 1.0, key, 0)
            else:
                text = call.text()
                length = len(text if text.isascii() else text.encode("utf-8", "surrogatepass"))
                question = Question((), round(length / self._length.chars_per_token) or 1, 1.0, key, length)
        elif ids is not None:
            blocks = self._hasher.token_blocks(ids, seed)
            question = Question(
                tuple(blocks), max(1, len(ids)), float(self._hasher.settings.block_tokens), key, 0
            )
        else:
            self.text_prompts += 1
            text = call.text()
            data = text.encode() if text.isascii() else text.encode("utf-8", "surrogatepass")
            length = len(data)
            chars_per_token = self._length.chars_per_token
            block_bytes = self._block_bytes
            question = Question(
                tuple(chain(data, block_bytes, seed)) if length >= block_bytes else (),
                max(1, round(length / chars_per_token)),
                block_bytes / chars_per_token,
                key,
                length,
            )
        self._asked, self._question = call, question
        return question

    def blocks_of(self, call: Call) -> int:
        """Blocks of the call's prompt, as the index counts them."""
        return len(self.question(call).blocks)

    def follows(self, call: Call) -> Decision | None:
        """What an owner has decided about the call; `choose` will follow if that worker is a candidate."""
        return self._followed.get(id(call))

    def session(self, question: Question) -> int | None:
        """The key whose owner should decide a question; None when there is nothing that could be shared."""
        match = self._index.match(question.blocks)
        return session(question, self._index.trunk_depth(question.blocks, match.depth))

    def uncached_s(self, question: Question) -> float:
        """Prefill seconds that are cached nowhere as far as we know: what an owner's answer is worth asking for."""
        cached = cached_tokens(question, self._index.match(question.blocks).depth)
        return self._fits.get(self._model).seconds(question.tokens - cached, cached)

    def owed_s(self, worker_id: str, now: float) -> float:
        """Seconds of prefill that this gateway sent to a worker and that are not done."""
        account = self._prices.known(worker_id)
        return account.own_s(now) if account is not None else 0.0

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

    def foresee(
        self, question: Question, workers: Sequence[Worker], now: float, rng: Random
    ) -> Decision | None:
        """What `decide` would answer now; books nothing."""
        if not workers:
            return None
        view = self._prices.view(question, workers, now)
        worker = self._prices.cheapest(view, workers, now, rng)
        depth = view.match.depth_of(self._index.bits_of(worker.id))
        cached = cached_tokens(question, depth)
        seconds = self._prices.account(worker).fit.seconds(question.tokens - cached, cached)
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

    def peers_done(self, worker_id: str, now: float) -> None:
        """The peers have no request on a worker any more, as far as heard: what they placed there is done."""
        account = self._prices.known(worker_id)
        if account is not None:
            account.others_done(now)
            self._prices.moved(account, worker_id, now)

    # -- learning ------------------------------------------------------------------------------

    def sized(self, worker: Worker, tokens: int) -> None:
        """The worker's engine began to evict when it held so many tokens (`services/kv_events`)."""
        account = self._prices.known(worker.id)
        if account is None:
            return
        if account.capacity is None:
            account.capacity = CacheCapacity(tokens)
        account.capacity.tokens = max(float(CacheCapacity.TOKENS_MIN), float(tokens))
        account.capacity.is_judged = True
        if self._question is not NO_QUESTION:
            self._resize(account, worker.id, self._question)

    def _measure(self, account: Account, worker: Worker, question: Question) -> None:
        """Start the learned size of a worker's cache from what its engine tells, if it does."""
        report = worker.report
        if report is not None and report.kv_capacity_tokens:
            account.capacity = CacheCapacity(report.kv_capacity_tokens)
            self._resize(account, worker.id, question)

    def _resize(self, account: Account, worker_id: str, question: Question) -> None:
        """Fit the index to the cache: also when a token turned out to have another length."""
        if account.capacity is not None:
            blocks = int(account.capacity.claimable() / question.block_tokens)
            if abs(blocks - self._index.capacity_of(worker_id)) > blocks >> 6:
                self._index.set_capacity(worker_id, blocks)
            account.sized_blocks = self._index.capacity_of(worker_id)

    def _cacheless(self, worker_id: str, account: Account, now: float) -> None:
        """The worker has no prefix cache: it owns nothing, and while that is so of all, nobody's blocks matter."""
        self._index.forget(worker_id)
        account.capacity = None
        account.sized_blocks = 0
        account.no_cache_until_s = self._none_until_s = now + NO_CACHE_S
        prices = self._prices
        prices.blind_until_s = min(other.no_cache_until_s for other in prices.accounts.values())

    def _learn_pace(self, account: Account, request: Open, prompt: int, had: int) -> None:
        """Learn from the seconds of a prefill of `prompt` tokens, `had` of which were cached."""
        assert request.observed_s is not None
        if request.observed_s > OBSERVE_S:
            seconds = request.observed_s / request.slowdown
            fit = account.fit
            before = fit.seconds(prompt - had, had)
            if request.is_bound and seconds >= before:
                return  # by what was cached in truth, it tells nothing
            fit.observe(prompt - had, had, seconds, request.is_queued)
            ratio = fit.seconds(prompt - had, had) / before
            if abs(ratio - 1.0) > RESCALE:
                self._prices.rescale(fit, ratio)

    def _learn(self, worker_id: str, account: Account, request: Open, outcome: Outcome, now: float) -> None:
        prices, question = self._prices, request.question
        prompt, cached = outcome.prompt_tokens, outcome.cached_tokens
        assert prompt is not None
        chars = question.chars
        if chars:
            self._length.observe(chars, prompt)
        predicted = request.predicted_tokens
        # An engine that does not tell what it had cached teaches only where it cannot be much.
        if request.observed_s is not None and (cached is not None or _is_mostly_new(request, prompt)):
            had = min(cached if cached is not None else predicted, prompt - 1)
            self._learn_pace(account, request, prompt, had)
        if cached is None:
            return
        self.predicted_tokens += predicted
        self.cached_tokens += cached
        if predicted:
            capacity = account.capacity
            if capacity is None:
                blocks = self._index.capacity_of(worker_id)
                capacity = account.capacity = CacheCapacity(blocks * question.block_tokens)
            is_time = capacity.count(predicted, cached, now)
            if not cached and capacity.is_absent(self._none_until_s > now):
                self._cacheless(worker_id, account, now)
                return
            if is_time:
                capacity.judge(self._index.blocks_of(worker_id) * question.block_tokens, now)
            blocks = int(capacity.tokens / question.block_tokens)
            if abs(blocks - account.sized_blocks) > blocks >> 6:
                self._resize(account, worker_id, question)
        if request.home_blocks:
            # It was unknown here and went to its first home: had a peer chosen that before?
            share = (cached - predicted) / (request.home_blocks * question.block_tokens)
            prices.home_share += HOME_RATE * (min(max(share, 0.0), 1.0) - prices.home_share)


def _is_mostly_new(request: Open, prompt: int) -> bool:
    """Whether at most a quarter of the prompt is believed to be cached: then the belief may be wrong, the lesson is not."""
    return 4 * request.predicted_tokens <= prompt
