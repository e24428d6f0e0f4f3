"""A fleet of simulated engines behind gateways, in virtual time: where policies meet a trace.

This room owns the clock of a simulation and everything between a policy and an engine: arrivals,
load polls, the delay of news between gateways, questions to owners, and the count of what happened.
Policies are the real ones (or `rivals`, which speak the same verbs); engines are `engine_model`. It
opens no socket and reads no clock but, for the cost of a decision, the CPU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, Protocol, cast

import msgspec

from smg.api.call import Call
from smg.api.endpoints import COMPLETIONS
from smg.fleet import load
from smg.fleet.worker import LoadReport, Status, Worker, WorkerSpec
from smg.lab.engine_model import EngineModel, EngineSettings, Finished, FirstToken
from smg.lab.trace import Trace, TraceRequest
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import News
from smg.policies.policy import Outcome, Policy

MODEL = "trace"
TEXT_BLOCK = 512
"""Characters of routing text that stand for one block of the trace."""
ASK_S = 0.05
"""Uncached prefill that makes an owner's answer worth asking for."""

REPAIR_S = 1.0
"""How much later news arrives that was lost: the mesh sees the gap in a stream and asks for it (docs/mesh/state.md)."""

_ARRIVAL, _ENGINE, _POLL, _NEWS = range(4)


class WorldSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What stands between the trace and the engines."""

    workers: int = 16
    gateways: int = 1
    delay_s: float | None = 1.0
    """Until a gateway's news reaches the others; None: never. Without meaning for one gateway."""
    loss_ratio: float = 0.0
    """Share of that news that is lost on the way and brought by a repair, `REPAIR_S` later."""
    is_owner_asked: bool = False
    """The session's owner among the gateways decides (docs/routing.md)."""
    poll_s: float = 0.25
    """Between two load reports of a worker."""
    seed: int = 1
    engine: EngineSettings = EngineSettings()
    warm_up_ratio: float = 0.1
    """Share of the requests, from the start, that the figures leave out."""


class Measured(msgspec.Struct, frozen=True):
    """What a run showed; times in seconds."""

    requests: int
    hit_ratio: float
    """Cached prompt tokens over prompt tokens, as the engines saw it."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    gap_s: float
    """Mean over time of (longest prefill backlog of a worker - mean backlog)."""
    busy_max_over_mean: float
    utilisation: float
    """Prefill seconds over worker seconds until the last arrival."""
    decision_us: float
    """Median CPU of choose + placed."""
    decision_p99_us: float
    ttft_s: tuple[float, ...] = ()
    """All first-token times, sorted, for plots."""


class ReplayCall(Call):
    """A call of the trace. Its text has a block of characters for every block of the trace."""

    __slots__ = ("request",)

    def __init__(self, request: TraceRequest, number: int, block_tokens: int) -> None:
        super().__init__(COMPLETIONS, MODEL, b"", {}, is_stream=True, request_id=str(number))
        self.request = request
        chars = request.prompt_tokens * TEXT_BLOCK // block_tokens
        text = "".join(
            [f"{block & 0xFFFF_FFFF_FFFF_FFFF:016x}" * (TEXT_BLOCK // 16) for block in request.blocks]
        )
        if len(text) < chars:  # records keep full blocks only; the rest of a prompt is its own
            text += (f"{number:015d} " * ((chars - len(text)) // 16 + 1))[: chars - len(text)]
        self.document["prompt"] = text


class Informed(Protocol):
    """A policy of the simulation that shares its ledger with its peers (`rivals`)."""

    def apply(self, verb: str, call: ReplayCall, position: int, now: float) -> None:
        """A peer did this some time ago."""
        ...


class Gateway:
    """One gateway: a policy and its own view of the workers."""

    __slots__ = ("policy", "workers")

    def __init__(self, policy: Policy, workers: tuple[Worker, ...]) -> None:
        self.policy = policy
        self.workers = workers


PolicyMaker = Callable[["World", int], Policy]
"""Makes the policy of one gateway of a world, given its number."""


class _Run:
    """One request on its way."""

    __slots__ = ("cached_tokens", "call", "gateway", "position", "request", "ttft_s")

    def __init__(self, call: ReplayCall, gateway: Gateway, position: int) -> None:
        self.call = call
        self.request = call.request
        self.gateway = gateway
        self.position = position
        self.ttft_s = 0.0
        self.cached_tokens = 0


class World:
    """One simulation. `run` may be called once."""

    def __init__(self, trace: Trace, settings: WorldSettings, make: PolicyMaker) -> None:
        self.trace = trace
        self.settings = settings
        self.rng = Random(settings.seed)
        self.now_s = 0.0
        engine = msgspec.structs.replace(settings.engine, block_tokens=trace.block_tokens)
        self.engine_settings = engine
        self.engines = [EngineModel(engine) for _ in range(settings.workers)]
        self.gateways = [
            Gateway(make(self, number), tuple(_worker(position) for position in range(settings.workers)))
            for number in range(settings.gateways)
        ]
        self._heap: list[tuple[float, int, int, Any]] = []
        self._sequence = 0
        self._wakes: list[float | None] = [None] * settings.workers
        self._runs: dict[str, _Run] = {}
        self._ended = 0
        self._first = int(len(trace.requests) * settings.warm_up_ratio)
        self._ttfts: list[float] = []
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._gaps: list[float] = []
        self._gap_at_s = 0.0
        self._decisions_us: list[float] = []
        self._owner_rng = Random(settings.seed + 1)
        self._asker: int | None = None

    def run(self) -> Measured:
        """Replay the whole trace."""
        requests = self.trace.requests
        for number, request in enumerate(requests):
            self._push(request.at_s, _ARRIVAL, number)
        self._push(0.0, _POLL, None)
        heap = self._heap
        while heap and self._ended < len(requests):
            at_s, _, kind, what = heappop(heap)
            self.now_s = at_s
            if kind == _ARRIVAL:
                self._arrive(what, at_s)
            elif kind == _ENGINE:
                if self._wakes[what] == at_s:
                    self._wakes[what] = None
                    self._advance(what, at_s)
            elif kind == _POLL:
                self._poll(at_s)
            else:
                receiver, news = what
                receiver(*news, at_s)
        return self._measured()

    # -- what policies may use -----------------------------------------------------------------

    def spread(
        self, sender: int, send: Callable[[Gateway], Callable[..., object] | None], *news: Any
    ) -> None:
        """Bring news from one gateway to the others after the delay (or never)."""
        delay_s = self.settings.delay_s
        if self.settings.gateways == 1 or delay_s is None:
            return
        loss = self.settings.loss_ratio
        for number, gateway in enumerate(self.gateways):
            if number in (sender, self._asker):
                continue
            receiver = send(gateway)
            if receiver is not None:
                is_lost = loss and self.rng.random() < loss
                late_s = REPAIR_S if is_lost else 0.0
                self._push(self.now_s + delay_s + late_s, _NEWS, (receiver, news))

    # -- the loop ------------------------------------------------------------------------------

    def _push(self, at_s: float, kind: int, what: Any) -> None:
        self._sequence += 1
        heappush(self._heap, (at_s, self._sequence, kind, what))

    def _arrive(self, number: int, now: float) -> None:
        settings = self.settings
        home = self.rng.randrange(settings.gateways) if settings.gateways > 1 else 0
        gateway = self.gateways[home]
        call = ReplayCall(self.trace.requests[number], number, self.trace.block_tokens)
        policy = gateway.policy
        if settings.is_owner_asked and settings.gateways > 1 and isinstance(policy, CacheAware):
            self._ask_owner(home, policy, call, now)
        started = time.process_time_ns()
        worker = policy.choose(call, gateway.workers, now, self.rng)
        assert worker is not None, "all workers are candidates"
        load.begin(worker, call.request.prompt_tokens)
        policy.placed(call, worker, now)
        self._decisions_us.append((time.process_time_ns() - started) / 1_000)
        position = worker.order
        run = _Run(call, gateway, position)
        self._runs[call.request_id] = run
        self._share("placed", home, run)
        request = call.request
        self.engines[position].submit(
            call.request_id, request.blocks, request.prompt_tokens, request.output_tokens, now
        )
        self._schedule(position)

    def _ask_owner(self, home: int, policy: CacheAware, call: ReplayCall, now: float) -> None:
        question = policy.question(call)
        key = policy.session(question)
        if key is None or policy.uncached_s(question) < ASK_S:
            return
        owner = max(range(len(self.gateways)), key=lambda number: hash((key, number)) & 0xFFFF_FFFF)
        if owner == home:
            return
        other = self.gateways[owner]
        self._asker = home  # it books the answer itself
        decision = cast(CacheAware, other.policy).decide(question, other.workers, now, self._owner_rng)
        self._asker = None
        if decision is not None:
            policy.follow(call, decision)

    def _share(self, verb: str, sender: int, run: _Run) -> None:
        def send(gateway: Gateway) -> Callable[..., object] | None:
            return getattr(gateway.policy, "apply", None)

        if hasattr(self.gateways[sender].policy, "apply"):
            self.spread(sender, send, verb, run.call, run.position)

    def _schedule(self, position: int) -> None:
        deadline = self.engines[position].deadline()
        wake = self._wakes[position]
        if deadline is not None and (wake is None or deadline < wake):
            self._wakes[position] = deadline
            self._push(deadline, _ENGINE, position)

    def _advance(self, position: int, now: float) -> None:
        for event in self.engines[position].advance(now):
            if isinstance(event, FirstToken):
                run = self._runs[event.request_id]
                run.ttft_s = now - run.request.at_s
                run.cached_tokens = event.cached_tokens
                if int(event.request_id) >= self._first:
                    self._ttfts.append(run.ttft_s)
                    self._prompt_tokens += run.request.prompt_tokens
                    self._cached_tokens += event.cached_tokens
                worker = run.gateway.workers[position]
                run.gateway.policy.first_byte(run.call, worker, run.ttft_s, now)
                self._share("first_byte", self.gateways.index(run.gateway), run)
            elif isinstance(event, Finished):
                self._finish(event, position, now)
        self._schedule(position)

    def _finish(self, event: Finished, position: int, now: float) -> None:
        run = self._runs.pop(event.request_id)
        self._ended += 1
        worker = run.gateway.workers[position]
        load.end(worker, run.request.prompt_tokens)
        outcome = Outcome(
            200,
            True,
            ttft_s=run.ttft_s,
            duration_s=now - run.request.at_s,
            prompt_tokens=run.request.prompt_tokens,
            cached_tokens=run.cached_tokens,
            completion_tokens=event.output_tokens,
        )
        run.gateway.policy.finished(run.call, worker, outcome, now)
        self._share("finished", self.gateways.index(run.gateway), run)

    def _poll(self, now: float) -> None:
        rules = load.ReportRules(interval_s=self.settings.poll_s, is_protected=False)
        settings = self.engine_settings
        capacity = settings.cache_blocks * settings.block_tokens
        for position, engine in enumerate(self.engines):
            told = LoadReport(
                now,
                running=engine.running,
                waiting=engine.waiting,
                waiting_tokens=engine.waiting_uncached_tokens,
                kv_usage=engine.kv_usage_ratio,
                kv_capacity_tokens=capacity,
                throughput_tps=settings.prefill_tokens_per_s,
            )
            for gateway in self.gateways:
                load.report(gateway.workers[position], told, rules)
        if now >= self._gap_at_s and len(self._ttfts) > 0:
            self._gap_at_s = now + 1.0
            backlogs = [engine.backlog_s(now) for engine in self.engines]
            self._gaps.append(max(backlogs) - sum(backlogs) / len(backlogs))
        self._push(now + self.settings.poll_s, _POLL, None)

    def _measured(self) -> Measured:
        ttfts = sorted(self._ttfts)
        count = len(ttfts)
        busy = [engine.busy_s for engine in self.engines]
        mean_busy = sum(busy) / len(busy)
        decisions = sorted(self._decisions_us)
        return Measured(
            requests=count,
            hit_ratio=self._cached_tokens / max(1, self._prompt_tokens),
            ttft_mean_s=sum(ttfts) / max(1, count),
            ttft_p50_s=_quantile(ttfts, 0.5),
            ttft_p90_s=_quantile(ttfts, 0.9),
            ttft_p99_s=_quantile(ttfts, 0.99),
            gap_s=sum(self._gaps) / max(1, len(self._gaps)),
            busy_max_over_mean=max(busy) / max(mean_busy, 1e-9),
            utilisation=mean_busy / max(self.trace.requests[-1].at_s, 1e-9),
            decision_us=_quantile(decisions, 0.5),
            decision_p99_us=_quantile(decisions, 0.99),
            ttft_s=tuple(ttfts),
        )


class Peers:
    """The neighbours of one simulated gateway: `smg.policies.neighbours.Neighbours` over a world."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._number = number

    def count(self) -> int:
        """All gateways of the world."""
        return self._world.settings.gateways

    def delay_s(self) -> float:
        """The delay of the world, infinite when nothing is shared."""
        delay_s = self._world.settings.delay_s
        return float("inf") if delay_s is None else delay_s

    def tell(self, news: News, now: float) -> None:
        """To all others, after the delay."""

        self._world.spread(self._number, lambda gateway: cast(CacheAware, gateway.policy).heard, news, now)


def _worker(position: int) -> Worker:
    spec = WorkerSpec(url=f"http://worker-{position}:80")
    # Health and breaker are the gateway's; no policy reads them.
    worker = Worker(spec, position, cast(Any, None), cast(Any, None))
    worker.status = Status.READY
    worker.models = (MODEL,)
    return worker


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
