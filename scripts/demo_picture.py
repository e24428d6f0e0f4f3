"""The picture of the demo: bars of hits and of waiting, and the hits of each run over its time, as one SVG.

Owns where things stand on the paper and nothing else: every number comes from the acts. Written by hand, so that it
needs no package and can be looked at in any browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from demo_figures import Act, milliseconds

WIDTH, HEIGHT = 980, 500
COLOURS = ("#7b8a96", "#b07d2b", "#23527c")
"""One per act: grey for what all are compared with, ochre for without, blue for with."""
WIDTHS = (6.0, 2.5, 2.5)
"""Of the lines: the first is the widest, for the last is to lie on it."""
BARS_TOP, ROW = 84, 34
LABEL_X, HITS_X, WAIT_X = 30, 190, 570
BAR_WIDTH, BAR_HEIGHT = 280, 20
LINES_LEFT, LINES_RIGHT, LINES_TOP, LINES_BOTTOM = 70, 950, 256, 450
STYLE = """
    .ground { fill: #ffffff; }
    .name { fill: #1d2b36; font-weight: bold; }
    .note { fill: #4a5a67; font-size: 12px; }
    .whole { fill: #eef2f5; }
    .grid { stroke: #dfe5ea; stroke-width: 1; }
    .mark { stroke: #a33a2a; stroke-width: 1.2; stroke-dasharray: 4 3; }
    .told { fill: #a33a2a; font-size: 12px; }
"""


def draw(acts: Sequence[Act]) -> str:
    """The whole SVG."""
    requests = len(acts[0].answers)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f"  <title>{escape(_told(acts))}</title>",
        f"  <style>{STYLE}  </style>",
        f'  <rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        _text(
            LABEL_X,
            32,
            f"The same {requests} requests, three times, through a load balancer",
            "name",
            size=16,
        ),
        *_bars(acts),
        *_lines(acts),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _told(acts: Sequence[Act]) -> str:
    told = [
        f"{act.title}: {act.hit_ratio:.1%} of prompt tokens cached, first token after {milliseconds(act.ttft_mean_s)}"
        for act in acts
    ]
    return "; ".join(told)


def _bars(acts: Sequence[Act]) -> list[str]:
    parts = [
        _text(HITS_X, 66, "prompt tokens found in a cache", "note"),
        _text(WAIT_X, 66, "time to the first token: mean (bar) and 99th percentile (line)", "note"),
    ]
    longest_s = max(max(act.ttft_s(0.99), act.ttft_mean_s) for act in acts) or 1.0
    for number, act in enumerate(acts):
        top = BARS_TOP + number * ROW
        middle = top + BAR_HEIGHT / 2
        wait = BAR_WIDTH * act.ttft_mean_s / longest_s
        far = WAIT_X + BAR_WIDTH * act.ttft_s(0.99) / longest_s
        parts += [
            _text(LABEL_X, middle + 5, act.title, "name"),
            f'  <rect class="whole" x="{HITS_X}" y="{top}" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" rx="3"/>',
            _bar(HITS_X, top, BAR_WIDTH * act.hit_ratio, number),
            _text(HITS_X + BAR_WIDTH + 8, middle + 5, f"{act.hit_ratio:.1%}"),
            _bar(WAIT_X, top, wait, number),
            f'  <path d="M{WAIT_X + wait:.1f} {middle:.1f}H{far:.1f}M{far:.1f} {top + 4}v{BAR_HEIGHT - 8}" '
            f'stroke="{COLOURS[number]}" stroke-width="2" fill="none"/>',
            _text(far + 8, middle + 5, f"{act.ttft_mean_s * 1000:.0f} / {milliseconds(act.ttft_s(0.99))}"),
        ]
    return parts


def _lines(acts: Sequence[Act]) -> list[str]:
    longest_s = max((answer.asked_s for act in acts for answer in act.answers), default=0.0) or 1.0

    def x(at_s: float) -> float:
        return LINES_LEFT + (LINES_RIGHT - LINES_LEFT) * at_s / longest_s

    def y(ratio: float) -> float:
        return LINES_BOTTOM - (LINES_BOTTOM - LINES_TOP) * ratio

    parts = [_text(LABEL_X, LINES_TOP - 40, "cache hits while the trace runs", "note")]
    for percent in (0, 25, 50, 75, 100):
        height = y(percent / 100)
        parts.append(f'  <path class="grid" d="M{LINES_LEFT} {height:.1f}H{LINES_RIGHT}"/>')
        parts.append(_text(LINES_LEFT - 8, height + 4, f"{percent} %", "note", anchor="end"))
    for second in range(0, int(longest_s) + 1, 5 if longest_s > 12 else 1):
        parts.append(_text(x(second), LINES_BOTTOM + 20, f"{second} s", "note", anchor="middle"))
    for number, act in enumerate(acts):
        points = " ".join(f"{x(at_s):.1f},{y(ratio):.1f}" for at_s, ratio in act.hits_over_time())
        parts.append(
            f'  <polyline points="{points}" fill="none" stroke="{COLOURS[number]}" stroke-width="{WIDTHS[number]}" '
            'stroke-linejoin="round"/>'
        )
        for row, (at_s, what) in enumerate(act.events):
            parts.append(f'  <path class="mark" d="M{x(at_s):.1f} {LINES_TOP - 14}V{LINES_BOTTOM}"/>')
            # The first to the left of its line and the next to the right, since they may be close to each other.
            gap, anchor = (-6, "end") if row % 2 == 0 else (6, "start")
            parts.append(_text(x(at_s) + gap, LINES_TOP - 6, what, "told", anchor=anchor))
    parts += _legend(acts)
    return parts


def _legend(acts: Sequence[Act]) -> list[str]:
    parts = []
    for number, act in enumerate(acts):
        left = LINES_LEFT + 190 * number
        parts.append(
            f'  <path d="M{left} {LINES_BOTTOM + 37}h22" stroke="{COLOURS[number]}" stroke-width="3" fill="none"/>'
        )
        parts.append(_text(left + 30, LINES_BOTTOM + 41, act.title, "note"))
    return parts


def _bar(left: float, top: float, width: float, number: int) -> str:
    return f'  <rect x="{left}" y="{top}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="3" fill="{COLOURS[number]}"/>'


def _text(
    left: float, base: float, words: str, kind: str = "", *, anchor: str = "start", size: int = 0
) -> str:
    extra = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    extra += f' font-size="{size}"' if size else ""
    return f'  <text x="{left:.1f}" y="{base:.1f}"{extra}>{escape(words)}</text>'
