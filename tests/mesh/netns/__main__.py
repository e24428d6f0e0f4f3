"""The long form, with a table: `python -m tests.mesh.netns --rounds 20 [scenario ...]`."""

from __future__ import annotations

import argparse
import sys
import traceback

from tests.mesh.netns.run import ALL, play


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mesh.netns", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=7)
    options = parser.parse_args()
    results = play(options.scenarios or list(ALL), options.rounds, options.at_once)
    failed = 0
    print("| what | n | p50 | p95 | max |\n|---|---|---|---|---|")
    for name, result in results.items():
        if isinstance(result, BaseException):
            failed += 1
            print(f"| FAILED {name} | | | | |")
            traceback.print_exception(result, file=sys.stderr)
            continue
        for what, values in result.items():
            p50, p95, most = quantile(values, 0.5), quantile(values, 0.95), max(values)
            print(f"| {what} | {len(values)} | {p50:.3g} | {p95:.3g} | {most:.3g} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
