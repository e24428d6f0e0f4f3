"""Traffic made up here: agents that come in bursts, for rules that were not tuned on a recorded trace.

Owns one generator. Agents arrive in waves; each opens a fresh context (a shared system prompt and
documents of its own), starts several parallel calls on it within a fraction of a second, then goes on
in tool turns whose prompts grow. Siblings meet before anybody can have heard of the first one: this is
what separates rules that look alike on ordinary conversation. The numbers are invented, not measured.
"""

from __future__ import annotations

from itertools import count
from random import Random

import msgspec

from smg.lab.trace import Trace, TraceRequest


class AgentTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of the traffic. Times in seconds, lengths in tokens."""

    agents: int = 700
    duration_s: float = 600.0
    templates: int = 24
    """Shared system prompts, of Zipf popularity."""
    template_tokens: tuple[int, int] = (1_000, 6_000)
    context_tokens: tuple[int, int] = (4_000, 24_000)
    siblings: tuple[int, int] = (2, 12)
    sibling_spread_s: float = 0.3
    turns_mean: float = 4.0
    turn_tokens: tuple[int, int] = (300, 3_000)
    think_s: tuple[float, float] = (2.0, 25.0)
    output_tokens: tuple[int, int] = (20, 500)
    wave_s: float = 60.0
    """Length of a wave; in its first fifth half of its agents arrive."""
    block_tokens: int = 512


def agents(settings: AgentTraffic | None = None, seed: int = 1) -> Trace:
    """Make the trace of such traffic; equal seeds make equal traces."""
    settings = settings if settings is not None else AgentTraffic()
    rng = Random(seed)
    fresh = count(1)
    size = settings.block_tokens

    def blocks(tokens: int) -> list[int]:
        return [next(fresh) for _ in range(max(1, tokens // size))]

    templates = [blocks(rng.randint(*settings.template_tokens)) for _ in range(settings.templates)]
    popularity = [1.0 / (rank + 1) for rank in range(settings.templates)]
    requests: list[TraceRequest] = []

    def call(at_s: float, prompt: list[int]) -> None:
        tail = rng.randrange(1, size)  # the last block is rarely full
        tokens = (len(prompt) - 1) * size + tail
        requests.append(TraceRequest(at_s, tokens, rng.randint(*settings.output_tokens), tuple(prompt)))

    for _ in range(settings.agents):
        at_s = _arrival(settings, rng)
        context = [
            *rng.choices(templates, popularity)[0],
            *blocks(rng.randint(*settings.context_tokens)),
        ]
        for _ in range(rng.randint(*settings.siblings)):
            prompt = [*context, *blocks(rng.randint(*settings.turn_tokens))]
            call(at_s + rng.random() * settings.sibling_spread_s, prompt)
            at_turn_s = at_s
            for _ in range(int(rng.expovariate(1.0 / settings.turns_mean)) if rng.random() < 0.5 else 0):
                at_turn_s += rng.uniform(*settings.think_s)
                prompt = [*prompt, *blocks(rng.randint(*settings.turn_tokens))]
                call(at_turn_s, prompt)
    requests.sort(key=lambda request: request.at_s)
    return Trace("agents", tuple(requests), size)


def _arrival(settings: AgentTraffic, rng: Random) -> float:
    wave = rng.randrange(max(1, int(settings.duration_s / settings.wave_s)))
    share = rng.random() * (0.2 if rng.random() < 0.5 else 1.0)
    return (wave + share) * settings.wave_s
