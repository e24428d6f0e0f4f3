"""Conversations made up here, with their words: what the demo sends to real nodes.

Owns one generator. People come within some seconds; each talks for several turns with one of a few assistants, first
about a long document of their own, then in short questions, and every question carries all that was said so far. The
numbers are invented, not measured; equal seeds make equal words. It must never know who answers, or how.
"""

from __future__ import annotations

from random import Random

import msgspec

CHARS_PER_TOKEN = 4
"""What the simulated engine takes for a token."""
WORDS = tuple(
    first + last
    for first in ("ba", "do", "fi", "ga", "hu", "ki", "lo", "me", "na", "pi", "ro", "su")
    for last in ("da", "ken", "lim", "mo", "nor", "pel", "ris", "ta", "vun", "zo")
)
"""Words without meaning: only their number and their order count."""


class ConversationTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of the traffic. Times in seconds, lengths in tokens; pairs are the bounds of even distributions."""

    conversations: int = 88
    arrivals_s: float = 7.0
    """Within this time all conversations begin."""
    assistants: int = 6
    """Different system prompts, each shared by those who talk with this assistant."""
    system_tokens: tuple[int, int] = (200, 600)
    opening_tokens: tuple[int, int] = (900, 2_700)
    turns: tuple[int, int] = (4, 7)
    turn_tokens: tuple[int, int] = (100, 400)
    think_s: tuple[float, float] = (0.6, 1.6)
    """From the end of an answer to the next question."""
    output_tokens: tuple[int, int] = (8, 16)


class Turn(msgspec.Struct, frozen=True, gc=False):
    """One question: how long after the last answer, its words, and how long its answer shall be."""

    think_s: float
    question: str
    output_tokens: int


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """One person's talk with one assistant; the first turn is asked at `at_s`."""

    at_s: float
    system: str
    turns: tuple[Turn, ...]


def conversations(settings: ConversationTraffic | None = None, seed: int = 1) -> tuple[Conversation, ...]:
    """Make such traffic, in order of time; equal seeds make equal conversations."""
    settings = settings if settings is not None else ConversationTraffic()
    rng = Random(seed)
    systems = [_text(rng, rng.randint(*settings.system_tokens)) for _ in range(settings.assistants)]
    made = []
    for _ in range(settings.conversations):
        turns = [Turn(0.0, _text(rng, rng.randint(*settings.opening_tokens)), _output(settings, rng))]
        for _ in range(rng.randint(*settings.turns) - 1):
            question = _text(rng, rng.randint(*settings.turn_tokens))
            turns.append(Turn(rng.uniform(*settings.think_s), question, _output(settings, rng)))
        made.append(
            Conversation(rng.uniform(0.0, settings.arrivals_s), rng.choice(systems), tuple(turns)),
        )
    return tuple(sorted(made, key=lambda conversation: conversation.at_s))


def _output(settings: ConversationTraffic, rng: Random) -> int:
    return rng.randint(*settings.output_tokens)


def _text(rng: Random, tokens: int) -> str:
    # The shortest word and its space are more than one token, so there are words enough.
    return " ".join(rng.choices(WORDS, k=tokens))[: tokens * CHARS_PER_TOKEN]
