"""Replay one seed or run many: `python -m tests.sim --seed N`, `python -m tests.sim --seeds 10000 --jobs 2`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from tests.sim.run import play, play_world, report
from tests.sim.workload import draw


def _one(job: tuple[int, bool]) -> tuple[int, list[str]]:
    seed, with_state = job
    try:
        return seed, play(draw(seed), with_state)
    except Exception as error:  # a crash of a machine is a finding like any other
        return seed, [f"{type(error).__name__}: {error}"]


def _replay(seed: int, with_state: bool) -> int:
    plan = draw(seed)
    print(f"seed {seed}: {plan.members} members")
    for fault in plan.faults:
        print(f"  {fault}")
    world, problems = play_world(plan, with_state)
    for when_s, node, event in world.log:
        print(f"{when_s:9.3f} {node.name}@{node.host} {event}")
    for problem in problems:
        print("PROBLEM", problem)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed and print every membership event")
    parser.add_argument("--seeds", type=int, help="run this many seeds")
    parser.add_argument(
        "--state", action="store_true", help="with the replica on the streams and its checkers"
    )
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--shrink", type=int, default=3, help="print the shortest plan of so many failures")
    options = parser.parse_args()
    if options.seed is not None:
        return _replay(options.seed, options.state)
    seeds = range(options.first, options.first + (options.seeds or 100))
    jobs = [(seed, options.state) for seed in seeds]
    started_s = time.monotonic()
    failed: list[tuple[int, list[str]]] = []
    with multiprocessing.Pool(options.jobs) as pool:
        for done, (seed, problems) in enumerate(pool.imap_unordered(_one, jobs, chunksize=4), 1):
            if problems:
                failed.append((seed, problems))
                print(f"seed {seed}: {problems[0]}", flush=True)
            if done % 1000 == 0:
                print(f"{done} seeds, {len(failed)} failed, {time.monotonic() - started_s:.0f} s", flush=True)
    for seed, problems in failed[: options.shrink]:
        print(report(seed, problems, options.state))
    print(f"{len(seeds)} seeds, {len(failed)} failed, {time.monotonic() - started_s:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
