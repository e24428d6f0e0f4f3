"""The arithmetic of `cache_aware`: what each candidate costs a request, in seconds.

    cost = wait + price x prefill(uncached) + coherence            (docs/routing.md)

This room owns the accounts of one model's workers, the utilisation behind the price, and the choice of
whom to price at all in a large fleet. `wait` is the prefill already in front (`account`). `prefill` is
what the worker would have to compute, given the longest prefix it is believed to hold. `price` is the
shadow price of a second of prefill: it delays everybody behind it, the more the busier the fleet is,
and evicts what others need. `coherence` keeps a session that nobody knows yet on its two homes while
gateways cannot see each other's placements. Pricing changes nothing; bookings come from the policy.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from random import Random

import msgspec

from smg.fleet.prefix_index import NO_MATCH, Match, PrefixIndex
from smg.fleet.service_model import PrefillModel, PrefillModels
from smg.fleet.worker import Worker
from smg.policies.account import KV_FULL, SLOTS, SLOWDOWNS, Account, slowdown
from smg.policies.homes import Homes
from smg.policies.neighbours import Alone, Neighbours, Question

RATE_S = 30.0
"""Time constant of the utilisation behind the price: longer than a burst, shorter than a day's tide."""
AGE_S = 0.03
"""The utilisation is aged in steps of this: by a thousandth of `RATE_S`, which nobody notices."""
UTILISATION_MAX = 0.95
"""Beyond this the queueing formula 1/(1 - rho) says more than we know."""
EVICTION = 1.25
"""What a needless prefill evicts, on top of the dial: the study's rule lost 4 % of hits at low load, this loses 3 %
for 1 % of time to first token (docs/performance-routing.md)."""
PRICE_CAP = 10.0
"""Most seconds of waiting that a saved second of prefill may be worth, at the usual dial."""
PRICE_CAP_PER_DIAL = 3.75
"""For higher dials the cap rises: 8 ("most hits") caps at 30."""
TRUST_S = 10.0
"""Delay of the peers' news at which 2/3 of their placements are taken to be unknown here."""
COHERENCE = 2.0
"""A session placed off its homes costs this many cold prefills more, times the share that peers cannot see."""
FLEET_MAX = 64
"""Above this many candidates only the promising ones are priced: no loss of hits at 16, and constant cost."""
SPARE = 4
"""How many of the least burdened workers are among those."""
OWNERS_MAX = 16
"""How many holders of one prefix are among those; of more, the least burdened."""
DECODE_SEED_S = 5.0
"""Seconds of an answer after its first byte, before any was seen."""
TIE_S = 1e-9
"""Costs closer than this are equal."""


class View(msgspec.Struct, gc=False, eq=False):
    """The facts of one decision that are the same for all candidates."""

    question: Question
    match: Match
    price: float
    penalty_s: float = 0.0
    homes: tuple[str, ...] = ()


class Prices:
    """The prices of one model."""

    __slots__ = (
        "_dial",
        "_fits",
        "_fleet",
        "_homes",
        "_index",
        "_is_alone",
        "_is_mixed",
        "_model",
        "_neighbours",
        "_order",
        "_positions",
        "_price_max",
        "_rate",
        "_rate_s",
        "_row",
        "_row_of",
        "accounts",
        "blind_until_s",
        "decode_s",
        "home_share",
        "is_ordered",
        "mean_s",
    )

    def __init__(
        self, model: str, dial: float, index: PrefixIndex, fits: PrefillModels, neighbours: Neighbours
    ) -> None:
        self._model = model
        self._dial = dial
        self._index = index
        self._fits = fits
        self._neighbours = neighbours
        self._is_alone = isinstance(neighbours, Alone)
        self._price_max = max(PRICE_CAP, PRICE_CAP_PER_DIAL * dial)
        self._homes = Homes()
        self.accounts: dict[str, Account] = {}
        """By worker, opened on first use (`account`)."""
        self._order: list[tuple[float, str]] = []  # (`empty_s`, id) of all accounts, sorted; for large fleets
        self.is_ordered = False
        """Whether the order of accounts is kept, so that `moved` has something to do."""
        self._fleet: Sequence[Worker] = ()  # the candidates that `_positions` was made for
        self._positions: dict[str, int] = {}
        self._row: list[tuple[Worker, Account]] = []  # the candidates with their accounts
        self._row_of: Sequence[Worker] | None = None  # the tuple that `_row` was made for
        self._is_mixed = False  # whether their accounts have more than one fit
        self.blind_until_s = -math.inf
        """Until then no worker is believed to have a prefix cache."""
        self._rate = 0.0  # prefill seconds admitted per second, at `_rate_s`
        self._rate_s = 0.0
        self.mean_s = fits.get(model).seconds(2_000, 0)
        """Mean prefill of an admitted request."""
        self.decode_s = DECODE_SEED_S
        """Mean time from first byte to end."""
        self.home_share = 0.3
        """Share of an unknown session that its first home turned out to hold (learned)."""

    # -- choosing ------------------------------------------------------------------------------

    def view(self, question: Question, workers: Sequence[Worker], now: float) -> View:
        """The facts of a decision. Changes nothing."""
        match = self._index.match(question.blocks) if question.blocks else NO_MATCH
        view = View(question, match, self.price(len(workers), now))
        if not self._is_alone:
            depth = match.depth
            if self._index.is_trunk(question.blocks, depth):
                # Nobody holds more of this prompt than what everybody shares.
                sigma = self.sigma()
                key = session(question, depth) if sigma > 0.0 else None
                if key is not None:
                    cold_s = self._fits.get(self._model).seconds(question.tokens, 0)
                    view.homes = self._homes.pair(key, workers)
                    view.penalty_s = sigma * COHERENCE * cold_s
        return view

    def cheapest(self, view: View, workers: Sequence[Worker], now: float, rng: Random) -> Worker:
        """The candidate with the lowest cost; ties by priority, then by `rng`."""
        row = self._row if workers is self._row_of else self._pairs(workers)
        if len(workers) > FLEET_MAX:
            row = [row[position] for position in self.promising(view, workers, now)]
        question, price, match, has_homes = view.question, view.price, view.match, bool(view.homes)
        steps, tokens, block_tokens = match.steps, question.tokens, question.block_tokens
        bits, is_mixed = self._index.bits, self._is_mixed
        is_flat = not (steps or is_mixed)  # the prefill is the same everywhere
        below = above = (
            math.inf
        )  # costs under `below` are lower than the lowest so far, up to `above` they are as low
        best = row[0][0]  # costs are finite: the first one is lower than nothing
        ties: list[Worker] | None = None
        fit = row[0][1].fit
        priced, depth = 0, 0
        prefill_s = price * fit.seconds(tokens, 0)  # the price of `fit` with `priced` blocks cached
        top_depth, top_owners = steps[0] if steps else (0, 0)
        has_more_steps = len(steps) > 1
        # The arithmetic of `terms` once more, without calls and tuples: this loop is most of a decision.
        # What is rare goes to `terms` itself, and a test holds the two together.
        for worker, account in row:
            if worker.report is not account.usual_report or has_homes:
                wait, prefill, penalty = self.terms(view, worker, now)
                cost = (wait + prefill + penalty) * worker.spec.cost
            else:
                if not is_flat:
                    if steps:
                        own = bits.get(worker.id, 0)
                        if top_owners & own:
                            depth = top_depth
                        else:
                            depth = match.depth_of(own) if has_more_steps else 0
                    if depth != priced or (is_mixed and account.fit is not fit):  # most hold equally little
                        priced, fit = depth, account.fit
                        cached = int(depth * block_tokens)
                        if cached >= tokens:
                            cached = tokens - 1
                        prefill_s = price * fit.seconds(tokens - cached, cached)
                in_flight = worker.in_flight + worker.peers_in_flight
                if account.has_others:
                    report = worker.report
                    if report is not None and worker.report_until_s <= now:
                        report = None
                    wait = account.wait_s(worker, report, now, self.mean_s)
                    if report is not None:
                        in_flight = max(in_flight, report.running + report.waiting + worker.sent_since_report)
                elif now < account.head_until_s:
                    wait = account.busy_until_s - now
                else:
                    wait = account.own_s(now) if account.open else 0.0
                cost = (
                    wait + prefill_s * SLOWDOWNS[in_flight if in_flight < SLOTS else SLOTS]
                ) * worker.spec.cost
            if cost < below:
                best, ties = worker, None
                below, above = cost - TIE_S, cost + TIE_S
            elif cost <= above:
                if ties is None:
                    ties = [best]
                ties.append(worker)
        return best if ties is None else pick(ties, rng, view.homes)

    def terms(self, view: View, worker: Worker, now: float) -> tuple[float, float, float]:
        """(wait, price x prefill, coherence) of one candidate, in seconds."""
        worker_id = worker.id
        account = self.accounts.get(worker_id) or self.account(worker)
        report = worker.report
        if report is not None and worker.report_until_s <= now:
            report = None
        wait = account.wait_s(worker, report, now, self.mean_s)
        steps = view.match.steps
        depth = view.match.depth_of(self._index.bits_of(worker_id)) if steps else 0
        penalty = 0.0
        if view.homes:
            if worker_id == view.homes[0]:
                depth += int(self.home_share * (len(view.question.blocks) - depth))
            elif worker_id not in view.homes:
                penalty = view.penalty_s
        cached = cached_tokens(view.question, depth)
        seconds = account.fit.seconds(view.question.tokens - cached, cached)
        in_flight = worker.in_flight + worker.peers_in_flight
        if report is not None:
            if account.has_others:
                in_flight = max(in_flight, report.running + report.waiting + worker.sent_since_report)
            usage = report.kv_usage
            capacity = report.kv_capacity_tokens
            if usage is not None and usage > KV_FULL and capacity:
                fresh = view.question.tokens - cached
                if fresh > (1.0 - usage) * capacity:
                    wait += 0.5 * self.decode_s
        return wait, view.price * seconds * slowdown(in_flight), penalty

    def promising(self, view: View, workers: Sequence[Worker], now: float) -> list[int]:
        """Positions of the candidates worth pricing in a large fleet: holders, homes, the least burdened."""
        positions = self._places(workers)
        if not self.is_ordered:
            self.is_ordered = True
            for worker_id, account in self.accounts.items():
                self.moved(account, worker_id, now)
        names: list[str] = list(view.homes)
        seen = 0
        trunk = self._index.trunk_depth(view.question.blocks, view.match.depth)
        for depth, owners in view.match.steps:
            if depth <= trunk:
                break  # everybody has the trunk: the least burdened will do
            names += self._holders(owners & ~seen)
            seen |= owners
        found = {positions[name]: None for name in names if name in positions}
        spare = SPARE
        for _, name in self._order:
            position = positions.get(name)
            if position is not None:
                found[position] = None
                spare -= 1
                if not spare:
                    break
        return list(found)

    def _holders(self, owners: int) -> list[str]:
        if owners.bit_count() <= OWNERS_MAX:
            return self._index.owners(owners)
        bits_of = self._index.bits_of
        names = []
        for _, name in self._order[: 8 * OWNERS_MAX]:
            if bits_of(name) & owners:
                names.append(name)
                if len(names) == SPARE:
                    break
        return names

    def price(self, workers: int, now: float) -> float:
        """The shadow price: about 1/(1 - rho) for the delay of others, times the dial for what is evicted."""
        rate = self._rate
        if now - self._rate_s > AGE_S:
            rate *= math.exp((self._rate_s - now) / RATE_S)
        if not self._is_alone:
            count = self._neighbours.count()
            if count > 1 and math.isinf(self._neighbours.delay_s()):
                rate *= count  # peers are as busy as we are, we only do not hear of it
        rho = rate / workers
        price = EVICTION * self._dial / (1.0 - (rho if rho < UTILISATION_MAX else UTILISATION_MAX))
        return price if price < self._price_max else self._price_max

    def sigma(self) -> float:
        """Share of the placements that this gateway cannot know yet, 0 to 1."""
        count = self._neighbours.count()
        if count < 2:
            return 0.0
        return (count - 1) / count * (1.0 - math.exp(-self._neighbours.delay_s() / TRUST_S))

    # -- booking -------------------------------------------------------------------------------

    def account(self, worker: Worker) -> Account:
        """The account of a worker, opened on first use."""
        account = self.accounts.get(worker.id)
        if account is None:
            worker_class = worker.spec.labels.get("class", "")
            account = Account(self._fits.get(self._model, worker_class), is_shared=not self._is_alone)
            self.accounts[worker.id] = account
            self.blind_until_s = -math.inf
            if self.is_ordered:
                insort(self._order, (account.empty_s, worker.id))
        return account

    def known(self, worker_id: str) -> Account | None:
        """The account of a worker, if it has one."""
        return self.accounts.get(worker_id)

    def note(self, account: Account, worker: Worker) -> None:
        """Take in a report that came since the last event; before the event changes anything."""
        report = worker.report
        if report is not None and report is not account.report:
            account.note(worker, report, self.mean_s)

    def admit(self, seconds: float, now: float) -> None:
        """So many seconds of prefill were sent to the fleet, by us or by a peer."""
        if now - self._rate_s > AGE_S:
            self._rate *= math.exp((self._rate_s - now) / RATE_S)
            self._rate_s = now
        self._rate += seconds / RATE_S
        self.mean_s += 0.02 * (seconds - self.mean_s)

    def rescale(self, fit: PrefillModel, ratio: float) -> None:
        """`fit` has learned that prefill takes `ratio` times as long: so does what was booked with it."""
        for account in self.accounts.values():
            if account.fit is fit:
                account.rescale(ratio)
        if not self._is_mixed:
            self._rate *= ratio
            self.mean_s *= ratio

    def moved(self, account: Account, worker_id: str, now: float) -> None:
        """The account changed: put it at its place among the others, if anybody looks at that order."""
        if not self.is_ordered:
            return
        self._unorder(account, worker_id)
        left = max(account.seconds, account.level_s(now) if account.has_others else 0.0)
        account.empty_s = now + left if left > 0.0 else min(account.empty_s, now)
        insort(self._order, (account.empty_s, worker_id))

    def close(self, worker_id: str) -> None:
        """The worker is gone."""
        account = self.accounts.pop(worker_id, None)
        if account is not None:
            self._unorder(account, worker_id)
        self._fleet = ()
        self._row_of, self._row = None, []

    def _pairs(self, workers: Sequence[Worker]) -> list[tuple[Worker, Account]]:
        """The candidates with their accounts; remembered where nobody can change the sequence."""
        row = [(worker, self.account(worker)) for worker in workers]
        self._is_mixed = len({account.fit for _, account in row}) > 1
        if type(workers) is tuple:
            self._row_of, self._row = workers, row
        return row

    def _unorder(self, account: Account, worker_id: str) -> None:
        entry = (account.empty_s, worker_id)
        position = bisect_left(self._order, entry)
        if position < len(self._order) and self._order[position] == entry:
            del self._order[position]

    def _places(self, workers: Sequence[Worker]) -> dict[str, int]:
        """Ids to positions in `workers`, made once as long as the candidates are the same object."""
        if workers is not self._fleet or len(workers) != len(self._positions):
            self._fleet = workers
            self._positions = {worker.id: position for position, worker in enumerate(workers)}
            for worker in workers:
                self.account(worker)
        return self._positions


def cached_tokens(question: Question, depth: int) -> int:
    """Tokens of the first `depth` blocks; the last token of a prompt is always computed."""
    return min(int(depth * question.block_tokens), question.tokens - 1)


def session(question: Question, trunk: int) -> int | None:
    """The key of a question's session: the client's, or the first block below the trunk. None: nothing to share."""
    if question.key is not None:
        return question.key
    blocks = question.blocks
    return blocks[min(trunk, len(blocks) - 1)] if blocks else None


def pick(best: Sequence[Worker], rng: Random, homes: Sequence[str] = ()) -> Worker:
    """One of several equal workers: the highest priority (WRK-16), then the first home if it is known, then chance."""
    first = best[0].spec.priority
    for worker in best:
        if worker.spec.priority != first:
            top = max(worker.spec.priority for worker in best)
            best = [worker for worker in best if worker.spec.priority == top]
            break
    if homes and len(best) > 1:
        for worker in best:
            if worker.id == homes[0]:
                return worker
    return best[0] if len(best) == 1 else best[int(rng.random() * len(best))]
