"""The story that scripts/demo tells: chats through a gateway, an engine that dies, and what the clients saw of it.

Owns the processes it starts and ends them all, whatever happens. Speaks to the gateway as any client would, with the
standard library only; it must never import smg.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from demo_client import Answer, Chat, Client
from demo_processes import Processes

ENGINES = 3
CHATS = 24
TURNS = 5
CLIENTS = 12
MODEL = "sim"
# One core or two do everything here, so the engines think fast and say little.
ENGINE_FLAGS = (
    "--decode-ms",
    "3",
    "--output-tokens",
    "24",
    "--prefill-tokens-per-second",
    "20000",
    "--kv-blocks",
    "6000",
)


@dataclass(frozen=True)
class Act:
    """One part of the story: its title and what was answered."""

    title: str
    answers: list[Answer]


def main(gateway_flags: Sequence[str]) -> int:
    """Plays the story and prints it. Returns 1 when it did not end well."""
    with Processes() as processes:
        urls = [processes.start_engine("--model", MODEL, *ENGINE_FLAGS) for _ in range(ENGINES)]
        gateway = processes.start_gateway("--worker-urls", *urls, *gateway_flags)
        client = Client(gateway)
        client.wait_until_ready(ENGINES)
        names = {worker["id"]: f"engine {urls.index(worker['url']) + 1}" for worker in client.workers()}
        print(f"gateway  {gateway}")
        for number, url in enumerate(urls, 1):
            print(f"engine {number} {url}")
        policy = client.policy(MODEL)
        print(f"policy   {policy}\n")

        acts = [
            play("three engines, every second answer a stream", client, stream=lambda turn: turn % 2 == 0),
            play("engine 3 is killed on the way (kill -9)", client, disturb=lambda: processes.kill(urls[-1])),
            play("two engines, all answers are streams", client, stream=lambda turn: True),
        ]
        in_flight = sum(worker["load"] for worker in client.workers())
        alive = [worker for worker in client.workers() if worker["status"] == "ready"]
    return tell(acts, names, in_flight, len(alive))


def play(
    title: str,
    client: Client,
    *,
    stream: Callable[[int], bool] = lambda turn: False,
    disturb: Callable[[], None] | None = None,
) -> Act:
    """All chats, turn by turn, a few at a time; `disturb` comes when a third of the turns are done."""
    answers: list[Answer] = []
    lock = threading.Lock()

    def converse(number: int) -> None:
        chat = Chat(MODEL, f"{title}: {number}")
        for turn in range(TURNS):
            answer = client.ask(chat, stream=stream(number + turn))
            with lock:
                answers.append(answer)

    with ThreadPoolExecutor(CLIENTS) as pool:
        running: list[Future[None]] = [pool.submit(converse, number) for number in range(CHATS)]
        if disturb is not None:
            while len(answers) < CHATS * TURNS // 3 and not all(chat.done() for chat in running):
                time.sleep(0.01)
            disturb()
    for chat in running:
        chat.result()
    return Act(title, answers)


def tell(acts: Sequence[Act], names: dict[str, str], in_flight: int, alive: int) -> int:
    """Prints the tables. Returns 1 when a request failed, an engine had nothing to do, or something is still counted."""
    rows = []
    for act in acts:
        by_engine = Counter(names.get(answer.worker_id, "-") for answer in act.answers)
        cached = sum(answer.cached_tokens for answer in act.answers)
        prompt = sum(answer.prompt_tokens for answer in act.answers)
        streams = [answer for answer in act.answers if answer.is_stream]
        rows.append(
            [
                act.title,
                str(len(act.answers)),
                str(len(streams)),
                " / ".join(str(by_engine[name]) for name in sorted(names.values())),
                f"{cached / prompt:.0%}" if prompt else "-",
                milliseconds(streams, 0.5),
                milliseconds(streams, 0.99),
                str(sum(not answer.is_good for answer in act.answers)),
            ]
        )
    heads = [
        "",
        "requests",
        "streams",
        "per engine",
        "prompt tokens cached",
        "TTFT p50",
        "TTFT p99",
        "failed",
    ]
    print_table(heads, rows)
    failures = [answer for act in acts for answer in act.answers if not answer.is_good]
    for failure in failures[:5]:
        print(f"failed: {failure.problem}")
    shares = [Counter(answer.worker_id for answer in act.answers) for act in acts]
    print(f"\n{alive} of {len(names)} engines are still ready; requests still counted in flight: {in_flight}")
    is_good = not failures and in_flight == 0 and alive == len(names) - 1
    is_good = is_good and len(shares[0]) == len(names) and len(shares[-1]) == len(names) - 1
    print("No request failed." if is_good else "This did not end as it should; logs are in .demo/")
    return 0 if is_good else 1


def milliseconds(answers: Sequence[Answer], share: float) -> str:
    """A percentile of the times to the first token."""
    times = sorted(answer.first_token_s for answer in answers if answer.is_good)
    if not times:
        return "-"
    return f"{times[min(int(share * len(times)), len(times) - 1)] * 1000:.0f} ms"


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    for line in (heads, ["-" * width for width in widths], *rows):
        cells = (
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
