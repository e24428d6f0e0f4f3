"""Tables and plots of a simulation, written by hand: text, JSON and SVG.

Owns the appearance of results and nothing of their meaning. No plotting library: a plot is a few
hundred bytes of SVG that any browser shows, dark and light.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from math import log10

import msgspec

from smg.lab.simulate import Result, Row
from smg.lab.world import Measured

_COLUMNS = (
    ("policy", 20),
    ("hit", 6),
    ("TTFT mean", 10),
    ("p50", 8),
    ("p90", 8),
    ("p99", 8),
    ("gap s", 7),
    ("busy max/mean", 14),
    ("util", 6),
    ("decision us", 12),
)
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 200, 36, 44


def table(result: Result) -> str:
    """The result as text; one line per policy, the mean over its seeds."""
    settings = result.settings
    world = settings.world
    speed = f"{result.time_factor:.3g} x recorded speed"
    head = (
        f"{result.trace}: {result.requests} requests, {world.workers} workers, {world.gateways} gateway(s)"
        + (f", news after {world.delay_s:g} s" if world.gateways > 1 and world.delay_s is not None else "")
        + (", nothing shared" if world.gateways > 1 and world.delay_s is None else "")
        + (", owners asked" if world.gateways > 1 and world.is_owner_asked else "")
        + (f", load {settings.load:g}" if settings.load is not None else "")
        + f", {speed}, seed(s) {', '.join(map(str, settings.seeds))}"
    )
    lines = [
        head,
        "".join(f"{name:<{width}}" if name == "policy" else f"{name:>{width}}" for name, width in _COLUMNS),
    ]
    lines += [_line(name, mean) for name, mean in means(result)]
    return "\n".join(lines)


def _line(name: str, told: Measured) -> str:
    cells = (
        f"{name:<20}",
        f"{told.hit_ratio:>6.3f}",
        f"{_seconds(told.ttft_mean_s):>10}",
        f"{_seconds(told.ttft_p50_s):>8}",
        f"{_seconds(told.ttft_p90_s):>8}",
        f"{_seconds(told.ttft_p99_s):>8}",
        f"{told.gap_s:>7.2f}",
        f"{told.busy_max_over_mean:>14.2f}",
        f"{told.utilisation:>6.2f}",
        f"{told.decision_us:>12.0f}",
    )
    return "".join(cells)


def means(result: Result) -> list[tuple[str, Measured]]:
    """One row per policy, in the order asked for: the mean over its seeds; first-token times are pooled."""
    found = []
    for name in dict.fromkeys(row.policy for row in result.rows):
        told = [row.measured for row in result.rows if row.policy == name]
        found.append((name, _mean(told)))
    return found


def _mean(told: Sequence[Measured]) -> Measured:
    def average(field: str) -> float:
        return float(sum(getattr(one, field) for one in told)) / len(told)

    numbers = {
        field: average(field) for field in Measured.__struct_fields__ if field not in ("requests", "ttft_s")
    }
    pooled = tuple(sorted(ttft for one in told for ttft in one.ttft_s))
    return Measured(requests=sum(one.requests for one in told), ttft_s=pooled, **numbers)


def as_json(result: Result) -> str:
    """The result for machines: every row, without the single first-token times."""
    rows = [_row(row) for row in result.rows]
    world = msgspec.to_builtins(result.settings.world)
    return json.dumps(
        {
            "trace": result.trace,
            "requests": result.requests,
            "time_factor": result.time_factor,
            "load": result.settings.load,
            "world": world,
            "rows": rows,
        }
    )


def _row(row: Row) -> dict[str, object]:
    told = {field: getattr(row.measured, field) for field in Measured.__struct_fields__ if field != "ttft_s"}
    return {"policy": row.policy, "seed": row.seed, **told}


def plot(result: Result) -> str:
    """An SVG: how first-token times are distributed, and hit ratio and mean TTFT per policy."""
    rows = means(result)
    parts = [_distribution(rows), _bars(rows, _HEIGHT + 20)]
    height = _HEIGHT + 40 + 28 * len(rows) + 60
    title = escape(table(result).splitlines()[0])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><style>text{{fill:#333}}.axis{{stroke:#888}}.grid{{stroke:#8884}}'
        f"@media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>"
        f"<title>{title}</title>{''.join(parts)}</svg>\n"
    )


def _distribution(rows: Sequence[tuple[str, Measured]]) -> str:
    """Share of requests whose first token came within t, over log t."""
    low, high = 0.01, max([told.ttft_s[-1] for _, told in rows if told.ttft_s] + [1.0])
    decades = 0.01
    while decades < high:
        decades *= 10
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(seconds: float) -> float:
        return _LEFT + inner_width * log10(max(seconds, low) / low) / log10(decades / low)

    def y(share: float) -> float:
        return _TOP + inner_height * (1.0 - share)

    parts = [f'<text x="{_LEFT}" y="20">Share of requests answered within t (first token)</text>']
    tick = low
    while tick <= decades * 1.01:
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{_TOP + inner_height}"/>'
            f'<text x="{x(tick):.1f}" y="{_TOP + inner_height + 18}" text-anchor="middle">{tick:g} s</text>'
        )
        tick *= 10
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + inner_width}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    for number, (name, told) in enumerate(rows):
        colour = _COLOURS[number % len(_COLOURS)]
        count = len(told.ttft_s)
        steps = range(201) if count else range(0)
        points = " ".join(
            f"{x(told.ttft_s[min(count - 1, count * step // 200)]):.1f},{y(step / 200):.1f}" for step in steps
        )
        dash = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dash} points="{points}"/>'
            f'<line x1="{_WIDTH - _RIGHT + 12}" x2="{_WIDTH - _RIGHT + 32}" y1="{_TOP + 8 + 17 * number}" '
            f'y2="{_TOP + 8 + 17 * number}" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<text x="{_WIDTH - _RIGHT + 38}" y="{_TOP + 12 + 17 * number}">{escape(name)}</text>'
        )
    return "".join(parts)


def _bars(rows: Sequence[tuple[str, Measured]], top: int) -> str:
    """Two bars per policy: hit ratio (0 to 1) and mean TTFT (to the longest)."""
    longest = max([told.ttft_mean_s for _, told in rows] + [1e-9])
    half = (_WIDTH - 150 - 60) / 2
    parts = [
        f'<text x="150" y="{top + 14}">cache hit ratio</text>'
        f'<text x="{150 + half + 40:.0f}" y="{top + 14}">mean time to first token</text>'
    ]
    for number, (name, told) in enumerate(rows):
        line = top + 26 + 28 * number
        colour = _COLOURS[number % len(_COLOURS)]
        hit, ttft = told.hit_ratio * (half - 50), told.ttft_mean_s / longest * (half - 50)
        right = 150 + half + 40
        parts.append(
            f'<text x="142" y="{line + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="150" y="{line}" width="{hit:.1f}" height="18" fill="{colour}"/>'
            f'<text x="{150 + hit + 5:.1f}" y="{line + 14}">{told.hit_ratio:.3f}</text>'
            f'<rect x="{right:.1f}" y="{line}" width="{ttft:.1f}" height="18" fill="{colour}"/>'
            f'<text x="{right + ttft + 5:.1f}" y="{line + 14}">{_seconds(told.ttft_mean_s)} s</text>'
        )
    return "".join(parts)


def _seconds(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
