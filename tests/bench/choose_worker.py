"""What a decision of `cache_aware` costs, and that its index stays small: `python -m tests.bench.choose_worker`.

First a million blocks are placed, then decisions are timed in CPU time over prompts of 64 blocks (32 KB of text), one
in two known to some worker, with 16, 64 and 256 workers. With `--soak N` instead: N distinct prefixes pass through one
index; memory must be flat, no call and no garbage collection may take long. Not part of the test run.
"""

from __future__ import annotations

import argparse
import gc
import time
from random import Random

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet import load
from smg.fleet.block_hashes import BlockHasher
from smg.fleet.prefix_index import ENTRY_BYTES, IndexSettings, PrefixIndex
from smg.fleet.worker import Worker
from smg.policies.cache_aware import CacheAware
from smg.policies.policy import Outcome
from tests.smg.fleet.builders import reported, workers_of

BLOCKS = 1_000_000
PROMPT_BLOCKS = 64
BUDGETS_US = {16: 60.0, 64: 120.0, 256: 120.0}
"""`choose` with this many workers, a 64-block prompt and a million blocks indexed (issue of the policy)."""
PAUSE_BUDGET_MS = 5.0
ROUNDS = 5


def text_of(rng: Random, blocks: int) -> str:
    return "".join(f"{rng.getrandbits(64):016x}" * 32 for _ in range(blocks))


def call_of(text: str) -> Call:
    return Call(CHAT, "m", b"", {"messages": [{"role": "user", "content": text}]}, is_stream=True)


def filled(workers: tuple[Worker, ...], rng: Random) -> tuple[CacheAware, list[tuple[str, Worker]]]:
    """A policy whose index holds a million blocks, and some prompts that it knows."""
    index = PrefixIndex(IndexSettings(worker_blocks=65_536, bytes_max=4 * BLOCKS * ENTRY_BYTES))
    hasher = BlockHasher()
    policy = CacheAware("m", None, index, hasher)
    seed = hasher.seed("m")
    trunk = text_of(rng, 4)
    known: list[tuple[str, Worker]] = []
    while index.entries < BLOCKS - 3_000 * PROMPT_BLOCKS:
        chain = hasher.text_blocks(trunk, seed) + [rng.getrandbits(64) for _ in range(PROMPT_BLOCKS - 4)]
        index.place(workers[rng.randrange(len(workers))].id, chain)
    while index.entries < BLOCKS:
        text = trunk + text_of(rng, PROMPT_BLOCKS - 4)
        worker = workers[rng.randrange(len(workers))]
        index.place(worker.id, hasher.text_blocks(text, seed))
        known.append((text, worker))
    return policy, known


def decisions(count: int) -> None:
    rng = Random(1)
    workers = workers_of(count)
    policy, known = filled(workers, rng)
    for number, worker in enumerate(workers):
        reported(worker, 100.0, running=3, waiting=0, kv_usage=0.4, kv_capacity_tokens=16_000_000)
        for other in range(number % 4):  # some load, so that nothing is a tie
            busy = call_of(f"{number} {other} " * 2_000)
            load.begin(worker)
            policy.placed(busy, worker, 100.0)
    gc.collect()
    gc.freeze()
    prompts = [text for text, _ in known[:1_000]] + [
        known[0][0][: 4 * 512] + text_of(rng, PROMPT_BLOCKS - 4) for _ in range(1_000)
    ]
    rng.shuffle(prompts)
    choose_us, placed_us, finished_us = [], [], []
    for _ in range(ROUNDS):
        calls = [call_of(text) for text in prompts]
        for one in calls:
            one.text()  # working the text out of the body belongs to the request, not to the policy
        spent = [0, 0, 0]
        clock = time.process_time_ns
        for number, one in enumerate(calls):
            now = 100.0 + number * 1e-3
            started = clock()
            worker = policy.choose(one, workers, now, rng)
            chosen = clock()
            assert worker is not None
            load.begin(worker)
            policy.placed(one, worker, now)
            placed = clock()
            policy.first_byte(one, worker, 0.2, now)
            load.end(worker)
            outcome = Outcome(200, True, 0.2, 1.0, prompt_tokens=8_000)
            policy.finished(one, worker, outcome, now)
            ended = clock()
            spent[0] += chosen - started
            spent[1] += placed - chosen
            spent[2] += ended - placed
        for told, total in zip((choose_us, placed_us, finished_us), spent, strict=True):
            told.append(total / len(calls) / 1_000)
    best = min(choose_us)
    budget = BUDGETS_US[count]
    print(
        f"{count:4} workers: choose {best:6.1f} us (budget {budget:.0f}){'  OVER' if best > budget else ''}; "
        f"placed {min(placed_us):6.1f} us; first byte and end {min(finished_us):6.1f} us; "
        f"{policy._index.entries} blocks"
    )
    gc.unfreeze()


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4_096


def soak(prefixes: int) -> None:
    """Distinct prefixes through a bounded index; workers come and go."""
    rng = Random(2)
    index = PrefixIndex(IndexSettings(worker_blocks=65_536, bytes_max=100_000_000))
    gc.collect()
    gc.freeze()
    before = resident_bytes()
    samples: list[float] = []
    worst_ms = worst_gc_ms = 0.0
    placed = 0
    clock = time.process_time_ns  # CPU time: a neighbour's turn is no pause of ours
    while placed < prefixes:
        chain = [rng.getrandbits(64) for _ in range(16)]
        started = clock()
        index.place(f"worker-{rng.randrange(16)}", chain)
        if placed % 200_000 < 16:
            index.forget(f"worker-{rng.randrange(16)}")
        worst_ms = max(worst_ms, (clock() - started) / 1e6)
        placed += len(chain)  # every block ends a prefix that nobody had before
        if placed % (prefixes // 20) < 16:
            started = clock()
            gc.collect()
            worst_gc_ms = max(worst_gc_ms, (clock() - started) / 1e6)
            samples.append((resident_bytes() - before) / 1e6)
    half = len(samples) // 2
    early, late = max(samples[:half]), max(samples[half:])
    print(
        f"{placed} prefixes: {index.entries} entries, memory {early:.0f} MB in the first half, {late:.0f} MB in the second; "
        f"longest call {worst_ms:.2f} ms, longest collection {worst_gc_ms:.2f} ms (budget {PAUSE_BUDGET_MS:.0f})"
        + ("  OVER" if max(worst_ms, worst_gc_ms) > PAUSE_BUDGET_MS or late > 1.05 * early + 2 else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=int, metavar="N", help="pass N distinct prefixes through one index")
    parser.add_argument("--workers", default="16,64,256", help="fleet sizes to time (16,64,256)")
    args = parser.parse_args()
    if args.soak:
        soak(args.soak)
        return
    for count in args.workers.split(","):
        decisions(int(count))


if __name__ == "__main__":
    main()
