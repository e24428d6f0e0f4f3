"""What came of a run, in numbers and as a table.

Owns the arithmetic from answers to figures, and columns of text. Ratios are of tokens, times in seconds. It must never
print, or know how a run was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demo_client import Answer

WINDOW_S = 1.5


@dataclass(frozen=True)
class Act:
    """One run: what was answered, and what happened meanwhile as (seconds since its begin, what)."""

    title: str
    answers: list[Answer]
    events: list[tuple[float, str]]
    in_flight: int

    @property
    def good(self) -> list[Answer]:
        """Those that came whole."""
        return [answer for answer in self.answers if not answer.problem]

    @property
    def hit_ratio(self) -> float:
        """Cached prompt tokens over prompt tokens, as the engines counted them."""
        return hit_ratio(self.good)

    @property
    def ttft_mean_s(self) -> float:
        """Mean time to the first token."""
        return sum(answer.ttft_s for answer in self.good) / max(1, len(self.good))

    @property
    def reconnects(self) -> int:
        """Connections that broke and were made again."""
        return sum(answer.reconnects for answer in self.answers)

    def ttft_s(self, share: float) -> float:
        """A percentile of the times to the first token; 0 when nothing was answered."""
        times = sorted(answer.ttft_s for answer in self.good)
        return times[min(int(share * len(times)), len(times) - 1)] if times else 0.0

    def hits_over_time(self) -> list[tuple[float, float]]:
        """(seconds since the run began, hit ratio around then)."""
        points = []
        last_s = max((answer.asked_s for answer in self.good), default=0.0)
        at_s = WINDOW_S / 2
        while at_s <= last_s:
            near = [answer for answer in self.good if abs(answer.asked_s - at_s) <= WINDOW_S / 2]
            if near:
                points.append((at_s, hit_ratio(near)))
            at_s += WINDOW_S / 3
        return points


def hit_ratio(answers: Sequence[Answer]) -> float:
    """Cached prompt tokens over prompt tokens."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    return sum(answer.cached_tokens for answer in answers) / prompt if prompt else 0.0


def table(acts: Sequence[Act]) -> list[str]:
    """The acts side by side; the first is what the others are compared with."""
    first = acts[0]
    rows = [
        ["", "cache hits", "of one node", "TTFT mean", "p50", "p99", "requests", "reconnects", "failed"]
    ] + [
        [
            act.title,
            f"{act.hit_ratio:.1%}",
            f"{act.hit_ratio / first.hit_ratio:.2f}" if first.hit_ratio else "-",
            milliseconds(act.ttft_mean_s),
            milliseconds(act.ttft_s(0.5)),
            milliseconds(act.ttft_s(0.99)),
            str(len(act.answers)),
            str(act.reconnects),
            str(len(act.answers) - len(act.good)),
        ]
        for act in acts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def milliseconds(seconds: float) -> str:
    """`123 ms`."""
    return f"{seconds * 1000:.0f} ms"
