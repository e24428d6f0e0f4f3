"""`smg simulate`: replay a trace through the real policies and print which one serves it best.

Owns the command's arguments and its output. The work is in `simulate`, the appearance in `report`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from smg.lab import report, trace, traffic
from smg.lab.rivals import RIVALS
from smg.lab.simulate import Row, SimulateSettings, UnknownPolicy, engine_settings, run
from smg.lab.world import WorldSettings
from smg.policies import POLICIES

T = TypeVar("T")

MADE_UP = "agents"
"""The name that stands for generated traffic instead of a file."""
MAIN_POLICIES = "cache_aware,least_load,power_of_two,round_robin,oracle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg simulate`."""
    add = parser.add_argument
    add(
        "--trace",
        required=True,
        metavar="FILE",
        help=f"Mooncake JSON lines, SGLang or vLLM request log, own --record-trace file; or {MADE_UP!r}: bursts made up here",
    )
    add("--limit", type=_positive, metavar="N", help="the first N requests only")
    add("--workers", type=_positive, default=16, metavar="N", help="engines (16)")
    add(
        "--gateways",
        type=_positive,
        default=1,
        metavar="N",
        help="gateways; each request goes to one by chance (1)",
    )
    add(
        "--delay",
        type=_delay,
        default=1.0,
        metavar="S",
        help="seconds until a gateway's news reaches the others; 'none': never (1)",
    )
    add(
        "--loss",
        type=_ratio,
        default=0.0,
        metavar="R",
        help="share of that news that is lost and repaired a second later (0)",
    )
    add(
        "--owner", action="store_true", help="owner placement: the session's owner among the gateways decides"
    )
    add(
        "--policy",
        default=MAIN_POLICIES,
        metavar="A,B",
        help=f"policies: {', '.join(sorted(POLICIES))}; cache_aware:PRICE, cache_aware:threshold; "
        f"for comparison: {', '.join(sorted(RIVALS))} ({MAIN_POLICIES})",
    )
    add(
        "--load",
        type=_ratio,
        metavar="R",
        help="play the trace so fast that a greedy router with full information uses this share of the prefill time",
    )
    add("--seed", type=_seeds, default=(1,), metavar="N,N", help="seeds; several are averaged (1)")
    add(
        "--poll",
        type=_seconds,
        default=0.25,
        metavar="S",
        help="seconds between load reports of a worker (0.25)",
    )
    add("--cache-blocks", type=_positive, metavar="N", help="KV blocks of the trace's size per engine (1000)")
    add("--prefill-tokens-per-s", type=float, metavar="N", help="speed of an engine's prefill (12000)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", metavar="FILE.svg", help="also draw the distribution of first-token times")


def main(args: argparse.Namespace) -> int:
    """Run it; the exit status: 0, or 2 with one sentence on standard error when the question makes no sense."""
    try:
        told = _trace(args.trace).first(args.limit)
        if args.plot:
            _file("--plot", args.plot, Path(args.plot).touch)  # before minutes of work, not after
        settings = SimulateSettings(
            policies=tuple(name.strip() for name in args.policy.split(",") if name.strip()),
            load=args.load,
            seeds=args.seed,
            world=WorldSettings(
                workers=args.workers,
                gateways=args.gateways,
                delay_s=args.delay,
                loss_ratio=args.loss,
                is_owner_asked=args.owner,
                poll_s=args.poll,
                engine=engine_settings(args.cache_blocks, args.prefill_tokens_per_s),
            ),
        )
        result = run(told, settings, None if args.json else _progress)
    except (UnknownPolicy, trace.TraceError, ValueError) as error:
        sys.stderr.write(f"smg simulate: {error}\n")
        return 2
    sys.stdout.write((report.as_json(result) if args.json else report.table(result)) + "\n")
    if told.skipped_lines and not args.json:
        sys.stdout.write(f"{told.skipped_lines} lines of the trace were no requests\n")
    if args.plot:
        Path(args.plot).write_text(report.plot(result), encoding="utf-8")
    return 0


def _trace(name: str) -> trace.Trace:
    return traffic.agents(seed=1) if name == MADE_UP else _file("--trace", name, lambda: trace.load(name))


def _file(flag: str, name: str, use: Callable[[], T]) -> T:
    """What `use` makes of the file. Raises ValueError that names flag, file and reason."""
    try:
        return use()
    except OSError as error:
        raise ValueError(f"{flag}: {name!r}: {error.strerror or error}") from None


def _progress(row: Row) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{row.policy} seed {row.seed}: mean TTFT {row.measured.ttft_mean_s:.3f} s\n")


def _delay(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither seconds, 0 or more, nor 'none'")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2") from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value
