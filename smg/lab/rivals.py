"""Policies that exist only in the simulation: what `cache_aware` is measured against.

Owns the greedy router with full information and the rules of other routers, written from their
documentation with their defaults. They speak the verbs of a policy but
keep a ledger with exact knowledge of lengths and service times, which is generous to them. Nothing of
this is offered to users as a policy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, cast

import xxhash

from smg.api.call import Call
from smg.fleet.prefix_index import IndexSettings, PrefixIndex
from smg.fleet.worker import Worker
from smg.lab.trace import TraceRequest
from smg.policies.policy import Outcome, Stateless

if TYPE_CHECKING:
    from smg.lab.world import ReplayCall, World


class Rival(Stateless, ABC):
    """The ledger that every rival may look into: counts, tokens, blocks and seconds per worker."""

    name = "rival"
    uses_index = True

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._engine = world.engine_settings
        self._workers = world.settings.workers
        self._block_tokens = world.trace.block_tokens
        self.in_flight = [0] * self._workers
        self.prefill_tokens = [0.0] * self._workers
        self.blocks = [0] * self._workers
        self.seconds = [0.0] * self._workers
        self.waiting: list[dict[str, tuple[float, float, int]]] = [{} for _ in range(self._workers)]
        self.last_first_s = [0.0] * self._workers
        self.index = PrefixIndex(IndexSettings(worker_blocks=self._engine.cache_blocks))

    # -- the verbs -----------------------------------------------------------------------------

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The worker that `pick` names."""
        return workers[self.pick(cast("ReplayCall", call).request, workers, now, rng)]

    @abstractmethod
    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The position of the worker for a request."""

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Book it."""
        self._book(cast("ReplayCall", call), worker.order, now)

    def first_byte(self, call: Call, worker: Worker, ttft_s: float, now: float) -> None:
        """Its prefill is over."""
        self._first(call.request_id, worker.order, now)

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """It is over."""
        self._end(cast("ReplayCall", call).request, worker.order)

    def apply(self, verb: str, call: ReplayCall, position: int, now: float) -> None:
        """A peer's verb, late."""
        if verb == "placed":
            self._book(call, position, now)
        elif verb == "first_byte":
            self._first(call.request_id, position, now)
        else:
            self._end(call.request, position)

    # -- the ledger ----------------------------------------------------------------------------

    def _book(self, call: ReplayCall, position: int, now: float) -> None:
        request = call.request
        uncached, seconds = self.cost(request, self.depths(request)[position] if self.uses_index else 0)
        self.in_flight[position] += 1
        self.prefill_tokens[position] += uncached
        self.blocks[position] += self._blocks_of(request)
        self.seconds[position] += seconds
        self.waiting[position][call.request_id] = (seconds, now, uncached)
        if self.uses_index:
            self.index.place(str(position), request.blocks)

    def _first(self, request_id: str, position: int, now: float) -> None:
        entry = self.waiting[position].pop(request_id, None)
        if entry is not None:
            self.seconds[position] -= entry[0]
            self.prefill_tokens[position] -= entry[2]
        self.last_first_s[position] = max(self.last_first_s[position], now)

    def _end(self, request: TraceRequest, position: int) -> None:
        self.in_flight[position] -= 1
        self.blocks[position] -= self._blocks_of(request)

    def _blocks_of(self, request: TraceRequest) -> int:
        return -(-(request.prompt_tokens + request.output_tokens) // self._block_tokens)

    def depths(self, request: TraceRequest) -> list[int]:
        """Blocks believed cached, per worker."""
        match = self.index.match(request.blocks)
        bits_of = self.index.bits_of
        return [match.depth_of(bits_of(str(position))) for position in range(self._workers)]

    def cost(self, request: TraceRequest, depth: int) -> tuple[int, float]:
        """(uncached tokens, prefill seconds) with `depth` blocks cached."""
        cached = min(depth * self._block_tokens, request.prompt_tokens - 1)
        return request.prompt_tokens - cached, self._engine.prefill_s(request.prompt_tokens - cached, cached)

    def backlog(self, position: int, now: float) -> float:
        """Prefill seconds in front on one worker, as this gateway knows it."""
        waiting = self.waiting[position]
        if not waiting:
            return 0.0
        seconds, sent_s, _ = next(iter(waiting.values()))
        spent = max(0.0, now - max(sent_s, self.last_first_s[position]))
        if self._world.settings.gateways == 1 or self._world.settings.delay_s is None:
            spent = min(spent, seconds)
        return max(0.0, self.seconds[position] - spent)

    def trunk(self, request: TraceRequest) -> int:
        """Blocks of the shared trunk."""
        return self.index.trunk_depth(request.blocks, len(request.blocks))


def _lowest(costs: Sequence[float], rng: Random) -> int:
    lowest = min(costs)
    ties = [position for position, cost in enumerate(costs) if cost <= lowest + 1e-12]
    return ties[0] if len(ties) == 1 else ties[rng.randrange(len(ties))]


def _rendezvous(key: int, workers: int, salt: int = 0) -> list[int]:
    weights = [
        (xxhash.xxh3_64_intdigest(b"%d/%d" % (key, position), salt), position) for position in range(workers)
    ]
    return [position for _, position in sorted(weights, reverse=True)]


class Oracle(Rival):
    """Greedy with full information: true queues and caches, the same price as `cache_aware`. Not an optimum."""

    name = "oracle"
    uses_index = False
    cap = 10.0

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number)
        self._rate = 0.0
        self._rate_s = 0.0

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The lowest wait + price x prefill, by the truth."""
        self._rate *= math.exp((self._rate_s - now) / 30.0)
        self._rate_s = now
        rho = min(self._rate / self._workers, 0.95)
        price = min(2.0 / (1.0 - rho), self.cap)
        costs, seconds = [], []
        for engine in self._world.engines:
            prefill = self.cost(request, engine.match_with_queue(request.blocks))[1]
            seconds.append(prefill)
            costs.append(engine.backlog_s(now) + price * prefill * engine.slowdown())
        position = _lowest(costs, rng)
        self._rate += seconds[position] / 30.0
        return position


class Calibrator(Oracle):
    """The greedy router that defines the load levels (price capped at 5)."""

    name = "calibrator"
    cap = 5.0


class RoundRobin(Rival):
    """In turn."""

    name = "rr"
    uses_index = False

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number)
        self._next = world.rng.randrange(self._workers)

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The next one."""
        self._next = (self._next + 1) % self._workers
        return self._next


class LeastInFlight(Rival):
    """The fewest requests in flight."""

    name = "least_in_flight"
    uses_index = False

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The least burdened."""
        return _lowest(self.in_flight, rng)


class BoundedHash(Rival):
    """Consistent hashing with bounded load (1.25 x mean), by first block or by session."""

    def __init__(self, world: World, number: int, by_session: bool) -> None:
        super().__init__(world, number)
        self._by_session = by_session
        self.name = "chwbl_session" if by_session else "chwbl_first"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The first on the ring with room."""
        depth = min(self.trunk(request), len(request.blocks) - 1) if self._by_session else 0
        key = request.blocks[depth] if request.blocks else rng.getrandbits(64)
        bound = math.ceil((sum(self.in_flight) + 1) / self._workers * 1.25)
        for position in _rendezvous(key, self._workers):
            if self.in_flight[position] + 1 <= bound:
                return position
        return _lowest(self.in_flight, rng)


class Threshold(Rival):
    """The existing system's `cache_aware` with its library defaults: 0.5, 32, 1.1."""

    name = "smg"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """Out of balance: least loaded; else the longest match above the threshold."""
        most, least = max(self.in_flight), min(self.in_flight)
        if not (most - least > 32 and most > 1.1 * least):
            depths = self.depths(request)
            deepest = max(depths)
            if deepest > 0.5 * len(request.blocks):
                return _lowest([-depth for depth in depths], rng)
        return _lowest(self.in_flight, rng)


class Aibrix(Rival):
    """AIBrix prefix-cache: the best match whose load is within two sigmas, if the fleet is balanced."""

    name = "aibrix"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The first acceptable holder, else the least loaded."""
        counts = self.in_flight
        if max(counts) - min(counts) <= 16:
            mean = sum(counts) / self._workers
            sigma = math.sqrt(sum((count - mean) ** 2 for count in counts) / self._workers)
            depths = self.depths(request)
            order = sorted(
                range(self._workers), key=lambda position: (-depths[position], counts[position], rng.random())
            )
            for position in order:
                if not depths[position]:
                    break
                if counts[position] <= mean + 2 * sigma:
                    return position
        return _lowest(counts, rng)


class Llmd(Rival):
    """llm-d / GIE: weighted scores 3 prefix, 2 queue, 2 KV usage over scraped metrics."""

    name = "llmd"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The highest score."""
        depths = self.depths(request)
        reports = [worker.report for worker in workers]
        queues = [report.waiting if report is not None else 0 for report in reports]
        most, least = max(queues), min(queues)
        costs = []
        for position in range(self._workers):
            queue = 1.0 if most == least else (most - queues[position]) / (most - least)
            report = reports[position]
            usage = (report.kv_usage or 0.0) if report is not None else 0.0
            prefix = depths[position] / max(1, len(request.blocks))
            costs.append(-(3.0 * prefix + 2.0 * queue + 2.0 * (1.0 - usage)))
        return _lowest(costs, rng)


class Dynamo(Rival):
    """Dynamo's KV router: prefill blocks + decode blocks, overlap weight 1, temperature 0."""

    name = "dynamo"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The fewest blocks."""
        depths = self.depths(request)
        size = request.prompt_tokens / self._block_tokens
        return _lowest(
            [
                max(self.prefill_tokens[position] / self._block_tokens + size - depths[position], 0.0)
                + self.blocks[position]
                + size
                for position in range(self._workers)
            ],
            rng,
        )


class Lmetric(Rival):
    """LMetric: uncached tokens x batch size."""

    name = "lmetric"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """The lowest product."""
        depths = self.depths(request)
        size = request.prompt_tokens / self._block_tokens
        return _lowest(
            [
                max(self.prefill_tokens[position] / self._block_tokens + size - depths[position], 0.0)
                * (self.in_flight[position] + 1)
                for position in range(self._workers)
            ],
            rng,
        )


class Smetric(Rival):
    """vLLM router's smetric: stay with the longest match while an SLO holds, else least work x load."""

    name = "smetric"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """Sticky within the SLO."""
        depths = self.depths(request)
        deepest = max(depths)
        slo = 0.2 + 4e-4 * request.prompt_tokens
        work = [
            self.seconds[position] + self.cost(request, depths[position])[1]
            for position in range(self._workers)
        ]
        holder = min(
            (position for position in range(self._workers) if depths[position] == deepest),
            key=lambda position: work[position],
        )
        meets = [seconds <= slo for seconds in work]
        is_worth = deepest > self.trunk(request) and deepest > 0.1 * (len(request.blocks) - 2)
        if is_worth and (meets[holder] or not any(meets)):
            return holder
        products = [work[position] * self.in_flight[position] for position in range(self._workers)]
        lowest = min(products)
        ties = [position for position in range(self._workers) if products[position] <= lowest + 1e-12]
        return min(ties, key=lambda position: (work[position], rng.random()))


class Preble(Rival):
    """Preble's E2: exploit a long match, else explore by load of the last three minutes."""

    name = "preble"

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number)
        self._window: deque[tuple[float, int, float]] = deque()
        self._load = [0.0] * self._workers

    def _book(self, call: ReplayCall, position: int, now: float) -> None:
        seconds = self.cost(call.request, self.depths(call.request)[position])[1]
        seconds += call.request.output_tokens * self._engine.decode_base_s
        self._window.append((now, position, seconds))
        self._load[position] += seconds
        super()._book(call, position, now)

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """Exploit or explore."""
        while self._window and self._window[0][0] < now - 180.0:
            _, position, seconds = self._window.popleft()
            self._load[position] -= seconds
        depths = self.depths(request)
        deepest = max(depths)
        cached = deepest * self._block_tokens
        load = self._load
        if cached > request.prompt_tokens - cached:
            holders = [position for position in range(self._workers) if depths[position] == deepest]
            best = min(holders, key=lambda position: load[position])
            least = min(range(self._workers), key=lambda position: load[position])
            if load[best] == max(load) and load[best] > 2 * load[least] + 1:
                return least
            return best
        return min(
            range(self._workers),
            key=lambda position: load[position] + self.cost(request, depths[position])[1],
        )


class DualMap(Rival):
    """DualMap: two hashed candidates, affinity unless the TTFT objective (5 s) breaks."""

    name = "dualmap"

    def pick(self, request: TraceRequest, workers: Sequence[Worker], now: float, rng: Random) -> int:
        """One of two."""
        key = request.blocks[min(self.trunk(request), len(request.blocks) - 1)] if request.blocks else 0
        one = _rendezvous(key, self._workers, 1)[0]
        ranked = _rendezvous(key, self._workers, 2)
        two = ranked[0] if ranked[0] != one or self._workers == 1 else ranked[1]
        depths = self.depths(request)
        if depths[two] > depths[one]:
            one, two = two, one
        first = self.backlog(one, now) + self.cost(request, depths[one])[1]
        second = self.backlog(two, now) + self.cost(request, depths[two])[1]
        if depths[one] == depths[two]:
            return one if first <= second else two
        return one if first <= 5.0 or first <= second else two


RIVALS: dict[str, Callable[[World, int], Rival]] = {
    "oracle": Oracle,
    "calibrator": Calibrator,
    "rr": RoundRobin,
    "least_in_flight": LeastInFlight,
    "chwbl_first": lambda world, number: BoundedHash(world, number, by_session=False),
    "chwbl_session": lambda world, number: BoundedHash(world, number, by_session=True),
    "smg": Threshold,
    "aibrix": Aibrix,
    "llmd": Llmd,
    "dynamo": Dynamo,
    "lmetric": Lmetric,
    "smetric": Smetric,
    "preble": Preble,
    "dualmap": DualMap,
}
"""All rivals by the names that `smg simulate --policy` takes."""
POLL_S = {"llmd": 0.1}
"""Rivals that scrape more often than the gateway polls."""
