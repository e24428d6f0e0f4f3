"""What a prefill costs in seconds, how many characters a token has, and how much a worker's cache holds.

This room owns the numbers that turn a prompt into seconds, each learned online from what answers tell:
the seconds of prefill as a function of uncached and cached tokens (per model and worker class), the
characters per token (per model), and the capacity of each worker's cache (from predicted against
actual cached tokens). It starts from a table, it may start wrong by a factor of two or more, and every
number is clamped, so that one absurd answer cannot bend a choice for long. It never reads a clock.

The form of the prefill is `a + u / R + k * u * (h + u / 2)` for u uncached tokens behind h cached ones:
a fixed part, a linear part and attention (docs/routing.md). It is fitted by exponentiated gradient
(Kivinen and Warmuth 1997): each part is multiplied by the error to the power of its share in the
prediction. The study proposes recursive least squares; that was tried first, and it went astray where
slots were full and most answers said nothing about prefill: clamps and covariance disagreed, and two
parts ran away against each other. Here all parts stay positive, and a part that had no share in a
prediction is left alone.
"""

from __future__ import annotations

import math
import re

import msgspec

GAP_RATIO = 0.5
"""A gap between two first bytes that is longer than expected by more than this was no prefill."""
ERROR_MAX = 1.0
"""Bound of one answer's logarithmic error: a stalled request must not teach much."""
UPWARD_SHARE = 0.25
"""Weight of an answer that took longer than predicted. Nothing makes a prefill shorter than it is, much makes it seem
longer: full slots, full memory, a busy host. So the fit follows the lower part of what is seen (an expectile; Newey
and Powell 1987): some percent too fast on a noisy worker, and never many times too slow on a full one."""
RATE_FIRST = 0.6
RATE_LAST = 0.08
"""Share of an error that is corrected: at first most of it, later about 1 in 12, so that the last dozens count."""
RATE_ANSWERS = 8
"""Answers after which the rate has fallen by half."""
MODELS_MAX = 1_024
"""(model, worker class) pairs with their own fit."""

_BASE_S = (1e-5, 0.5)
_PER_TOKEN_S = (1e-8, 5e-2)
_PER_PAIR_S = 1e-13
_PAIRS_PER_TOKEN = 1 / 8_000
"""Attention costs as much as all the rest at no less context than this (today's models: 20 to 100 thousand)."""


class PrefillSeed(msgspec.Struct, frozen=True):
    """Where a fit starts. The default is an 8B-class dense model on one recent accelerator."""

    base_s: float = 0.008
    per_token_s: float = 1 / 12_000
    per_pair_s: float = 2e-9


_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)b(?![a-z0-9])")
_ACTIVE = re.compile(r"(?<![a-z0-9])a(\d+(?:\.\d+)?)b(?![a-z0-9])")


def seed_for(model: str) -> PrefillSeed:
    """A first guess from the size that a model's name tells: cost grows with the active parameters.

    `Qwen3-30B-A3B` is taken for 3, `Mixtral-8x7B` for 14 (two experts of eight), a name without size for 8.
    """
    name = model.lower().replace("_", "-")
    billions = 8.0
    active, size = _ACTIVE.search(name), _SIZE.search(name)
    if active is not None:
        billions = float(active.group(1))
    elif size is not None:
        billions = float(size.group(2)) * (2.0 if size.group(1) else 1.0)
    scale = min(max(billions / 8.0, 0.05), 64.0)
    base = PrefillSeed()
    return PrefillSeed(base.base_s, base.per_token_s * scale, base.per_pair_s * scale)


class PrefillModel:
    """Seconds of prefill of one model on one class of workers, fitted as answers come in.

    Invariant: all three parameters are within their clamps, so `seconds` grows with uncached tokens.
    """

    __slots__ = ("base_s", "observations", "per_pair_s", "per_token_s")

    def __init__(self, seed: PrefillSeed | None = None) -> None:
        seed = seed if seed is not None else PrefillSeed()
        self.base_s = _clamped(seed.base_s, _BASE_S)
        self.per_token_s = _clamped(seed.per_token_s, _PER_TOKEN_S)
        self.per_pair_s = _clamped(seed.per_pair_s, (_PER_PAIR_S, _PAIRS_PER_TOKEN * self.per_token_s))
        self.observations = 0

    def seconds(self, uncached_tokens: float, cached_tokens: float) -> float:
        """Seconds of prefill for `uncached_tokens` behind `cached_tokens` on a worker that decodes nothing."""
        return (
            self.base_s
            + uncached_tokens * self.per_token_s
            + self.per_pair_s * uncached_tokens * (cached_tokens + 0.5 * uncached_tokens)
        )

    def linear_s(self, seconds: float) -> float:
        """What a prefill of `seconds` with nothing cached would take without attention."""
        rest = max(0.0, seconds - self.base_s)
        per_token, per_pair = self.per_token_s, self.per_pair_s
        tokens = (math.sqrt(per_token * per_token + 2.0 * per_pair * rest) - per_token) / per_pair
        return min(seconds, self.base_s + tokens * per_token)

    def observe(
        self, uncached_tokens: float, cached_tokens: float, seconds: float, is_queued: bool = False
    ) -> float:
        """Learn from one prefill that took `seconds` (without its wait); the relative error before learning.

        `is_queued` when the time is the gap to the first byte before it. Such a gap is the prefill or
        longer: an engine whose slots or memory are full waits for a running answer to end, and that
        must not be taken for prefill. So gaps teach only downwards and a little up.
        """
        predicted = self.seconds(uncached_tokens, cached_tokens)
        error = seconds / predicted - 1.0
        if is_queued and error > GAP_RATIO:
            return error
        change = math.log(max(seconds, 1e-6) / predicted)
        change = max(change, -ERROR_MAX) if change < 0.0 else UPWARD_SHARE * min(change, ERROR_MAX)
        change *= max(RATE_LAST, RATE_FIRST / (1.0 + self.observations / RATE_ANSWERS))
        base = self.base_s / predicted
        linear = self.per_token_s * uncached_tokens / predicted
        self.base_s = _clamped(self.base_s * math.exp(change * base), _BASE_S)
        self.per_token_s = _clamped(self.per_token_s * math.exp(change * linear), _PER_TOKEN_S)
        self.per_pair_s = _clamped(
            self.per_pair_s * math.exp(change * (1.0 - base - linear)),
            (_PER_PAIR_S, _PAIRS_PER_TOKEN * self.per_token_s),
        )
        self.observations += 1
        return error


class PrefillModels:
    """The fits of all (model, worker class) pairs of a node, made on first use."""

    __slots__ = ("_fits", "_seed")

    def __init__(self, seed: PrefillSeed | None = None) -> None:
        self._fits: dict[tuple[str, str], PrefillModel] = {}
        self._seed = seed

    def get(self, model: str, worker_class: str = "") -> PrefillModel:
        """The fit of a pair; a new class starts from what another class of the same model has learned."""
        key = (model, worker_class)
        fit = self._fits.get(key)
        if fit is None:
            if len(self._fits) >= MODELS_MAX:
                del self._fits[next(iter(self._fits))]
            fit = self._fits[key] = PrefillModel(self._first_guess(model))
        return fit

    def _first_guess(self, model: str) -> PrefillSeed:
        for (name, _), fit in self._fits.items():
            if name == model and fit.observations >= 20:
                return PrefillSeed(fit.base_s, fit.per_token_s, fit.per_pair_s)
        return self._seed if self._seed is not None else seed_for(model)


class TokenLength:
    """Characters of routing text per prompt token of one model (the template's own tokens included)."""

    __slots__ = ("_chars", "_tokens", "chars_per_token")

    CHARS_PER_TOKEN = 4.0
    """English text in the vocabularies of today; 1.5 for Chinese, 3 for code. Learned within a few answers."""
    _PRIOR_TOKENS = 2_000.0

    def __init__(self) -> None:
        self._chars = self.CHARS_PER_TOKEN * self._PRIOR_TOKENS
        self._tokens = self._PRIOR_TOKENS
        self.chars_per_token = self.CHARS_PER_TOKEN
        """The estimate, between 0.25 and 32."""

    def tokens(self, chars: int) -> int:
        """Expected prompt tokens of a routing text; at least 1."""
        return max(1, round(chars / self.chars_per_token))

    def observe(self, chars: int, prompt_tokens: int) -> None:
        """An answer told how many tokens a prompt had."""
        if chars <= 0 or prompt_tokens <= 0 or not 0.05 <= chars / prompt_tokens <= 100.0:
            return  # an image, a document: its tokens are not in the text
        self._chars = all_chars = self._chars * 0.99 + chars  # the last hundred answers count
        self._tokens = tokens = self._tokens * 0.99 + prompt_tokens
        ratio = all_chars / tokens
        self.chars_per_token = ratio if 0.25 <= ratio <= 32.0 else min(max(ratio, 0.25), 32.0)


class CacheCapacity:
    """The learned capacity of one worker's prefix cache, in tokens.

    Every minute, or after enough answers, predicted and actual cached tokens are compared. Fewer than
    predicted: the worker forgets sooner than we thought, the bound shrinks by a tenth. As many: it
    grows by 2 %, if the bound is what keeps the index from claiming more.

    Where no answer tells cached tokens (streams whose clients ask for no usage), nothing corrects the size that the
    engine tells, and engines with a second tier hold more than that. Claiming too little costs more than claiming too
    much (docs/performance-routing.md), so until the first such answer `claimable` is above the size told.

    A long row of answers that had nothing cached of what must have been there: `is_absent`, the engine has no prefix
    cache, or it is switched off.
    """

    __slots__ = ("_actual", "_answers", "_misses", "_predicted", "_since_s", "is_judged", "tokens")

    PERIOD_S = 60.0
    ANSWERS = 64
    """Answers that end a period early: a busy worker is learned in seconds."""
    ANSWERS_MIN = 8
    TOLERANCE = 0.1
    """Share of predicted tokens that may be missing: blocks differ, and what waits in a queue may be evicted meanwhile."""
    TOKENS_MIN = 4_096
    MISSES = 128
    """Answers in a row that had nothing cached where something was claimed: more than evictions explain."""
    MISSES_OF_MANY = 32
    """The same where another worker of the model was found to have none."""
    UNJUDGED = 1.5
    """Times the size told that may be claimed while no answer can say otherwise."""

    def __init__(self, tokens: float) -> None:
        self.tokens = max(float(tokens), float(self.TOKENS_MIN))
        self.is_judged = False
        """Whether anything but the engine's own word tells of the size."""
        self._predicted = 0
        self._actual = 0
        self._answers = 0
        self._misses = 0
        self._since_s: float | None = None

    def is_absent(self, is_one_of_many: bool) -> bool:
        """Whether there seems to be no cache at all; `is_one_of_many`: another worker of the model has none."""
        return self._misses >= (self.MISSES_OF_MANY if is_one_of_many else self.MISSES)

    def claimable(self) -> float:
        """Tokens that the index may claim for the worker."""
        return self.tokens if self.is_judged else self.UNJUDGED * self.tokens

    def observe(self, predicted_tokens: int, actual_tokens: int, claimed_tokens: float, now: float) -> bool:
        """`count` and, when a period is over, `judge`; whether the capacity changed."""
        return self.count(predicted_tokens, actual_tokens, now) and self.judge(claimed_tokens, now)

    def count(self, predicted_tokens: int, actual_tokens: int, now: float) -> bool:
        """An answer told its cached tokens; whether it is time to `judge`.

        Only claims can be wrong, so answers with nothing predicted do not count.
        """
        if predicted_tokens <= 0:
            return False
        since_s = self._since_s
        if since_s is None:
            since_s = self._since_s = now
        self.is_judged = True
        self._predicted += predicted_tokens
        if actual_tokens:
            self._misses = 0
            self._actual += actual_tokens if actual_tokens < predicted_tokens else predicted_tokens
        else:
            self._misses += 1
        self._answers = answers = self._answers + 1
        return answers >= self.ANSWERS or now - since_s >= self.PERIOD_S

    def judge(self, claimed_tokens: float, now: float) -> bool:
        """A period is over; whether the capacity changed. `claimed_tokens` are all that the index claims for this
        worker now."""
        before = self.tokens
        if self._answers >= self.ANSWERS_MIN:
            if self._actual < (1.0 - self.TOLERANCE) * self._predicted:
                # From what is claimed, not from a bound that was never reached.
                self.tokens = max(float(self.TOKENS_MIN), 0.9 * min(self.tokens, claimed_tokens))
            elif claimed_tokens >= 0.9 * self.tokens:
                self.tokens *= 1.02
        self._predicted = self._actual = self._answers = 0
        self._since_s = now
        return self.tokens != before


def _clamped(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
