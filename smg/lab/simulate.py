"""Simulate: which policy for this traffic? A trace, a fleet, some policies, one table.

Owns the run of several policies over one trace at one load, and the meaning of "load": the trace is
sped up or slowed down until a greedy router with full information would keep the engines' prefill busy
for that share of the time. It prints nothing; `report` makes tables and plots, `simulate_command` is
the command.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from smg.lab.engine_model import EngineSettings
from smg.lab.rivals import POLL_S, RIVALS
from smg.lab.trace import Trace
from smg.lab.world import MODEL, Measured, Peers, PolicyMaker, World, WorldSettings
from smg.policies import POLICIES
from smg.policies.cache_aware import CacheAware, CacheAwareSettings
from smg.settings import Routing

CALIBRATION_RUNS = 8
CALIBRATION_TOLERANCE = 0.003
"""Utilisation is this near to the load that was asked for."""


class SimulateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the simulator."""

    policies: tuple[str, ...] = ("cache_aware", "least_load", "round_robin", "oracle")
    """Names of the shelf, of `rivals`, and `cache_aware:<price>` or `cache_aware:threshold`."""
    load: float | None = None
    """Prefill utilisation of a greedy full-information router; None: the trace at its own pace."""
    seeds: tuple[int, ...] = (1,)
    world: WorldSettings = WorldSettings()


class Row(msgspec.Struct, frozen=True):
    """One policy, one seed."""

    policy: str
    seed: int
    measured: Measured


class Result(msgspec.Struct, frozen=True):
    """All rows of a run."""

    trace: str
    requests: int
    time_factor: float
    """The trace was replayed this many times faster than recorded."""
    settings: SimulateSettings
    rows: tuple[Row, ...]


class UnknownPolicy(ValueError):
    """A name that neither the shelf nor the rivals know."""


def run(trace: Trace, settings: SimulateSettings, progress: Callable[[Row], None] | None = None) -> Result:
    """Replay `trace` once per policy and seed. Raises `UnknownPolicy` before anything runs."""
    makers = {name: maker(name) for name in settings.policies}
    factor = 1.0 if settings.load is None else calibrate(trace, settings.world, settings.load)
    scaled = trace.scaled(factor)
    rows = []
    for name in settings.policies:
        for seed in settings.seeds:
            world = msgspec.structs.replace(
                settings.world, seed=seed, poll_s=POLL_S.get(name, settings.world.poll_s)
            )
            row = Row(name, seed, World(scaled, world, makers[name]).run())
            rows.append(row)
            if progress is not None:
                progress(row)
    return Result(trace.name, len(trace.requests), factor, settings, tuple(rows))


def calibrate(trace: Trace, world: WorldSettings, load: float) -> float:
    """How much faster the trace must go for the greedy router to use `load` of the prefill time."""
    single = msgspec.structs.replace(world, gateways=1, seed=1)

    def utilisation(factor: float) -> float:
        return World(trace.scaled(factor), single, RIVALS["calibrator"]).run().utilisation

    factor = 1.0
    low, high = 0.0, float("inf")
    for _ in range(CALIBRATION_RUNS):
        got = utilisation(factor)
        if abs(got - load) <= CALIBRATION_TOLERANCE:
            break
        if got < load:
            low = factor
        else:
            high = factor
        # Utilisation is nearly proportional to speed; the bracket catches the cases where it is not.
        guess = factor * load / max(got, 1e-6)
        factor = guess if low < guess < high else (0.5 * (low + high) if high < float("inf") else 2.0 * low)
    return factor


def maker(name: str) -> PolicyMaker:
    """How to make the policy of one gateway, from its name."""
    if name in RIVALS:
        return RIVALS[name]
    shelf, _, dial = name.partition(":")
    if shelf == "cache_aware":
        return _cache_aware(dial)
    if shelf in POLICIES and not dial:
        item = POLICIES[shelf]
        return lambda world, number: item(Routing())
    known = ", ".join(sorted({*POLICIES, *RIVALS, "cache_aware"}))
    raise UnknownPolicy(f"no policy {name!r}; there are {known}")


def _cache_aware(dial: str) -> PolicyMaker:
    if dial == "threshold":
        settings = CacheAwareSettings(mode="threshold")
    else:
        try:
            settings = CacheAwareSettings(price=float(dial)) if dial else CacheAwareSettings()
        except ValueError:
            raise UnknownPolicy(f"cache_aware:{dial}: give a price or 'threshold'") from None
    return lambda world, number: CacheAware(MODEL, settings, neighbours=Peers(world, number))


def engine_settings(cache_blocks: int | None, prefill_tokens_per_s: float | None) -> EngineSettings:
    """The default engine with another cache or speed."""
    settings = EngineSettings()
    if cache_blocks is not None:
        settings = msgspec.structs.replace(settings, cache_blocks=cache_blocks)
    if prefill_tokens_per_s is not None:
        settings = msgspec.structs.replace(settings, prefill_tokens_per_s=prefill_tokens_per_s)
    return settings
