"""One tenant floods with long prompts, another asks something short once a second: what does the second one wait?

Runs a gateway and simulated engines as processes and measures the time to the first byte of the short requests: alone, beside
the flood without the priority scheduler, and beside the flood with it. Times are shown in the engines' seconds (`--speed`).

    python -m tests.bench.fairness --engines 2 --speed 2 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import trio

from tests.e2e.process import free_ports, running_process

WORDS = [f"{number:05d}" for number in range(100_000)]
"""Each with its space is six bytes: one and a half tokens of the engine."""
SHORT_TOKENS = 100


def request(tenant: str, tokens: int, is_stream: bool, rng: Random) -> bytes:
    """A request whose prompt shares no beginning with any other."""
    text = " ".join(rng.choices(WORDS, k=tokens * 4 // 6))
    document = {
        "model": "sim",
        "messages": [{"role": "user", "content": text}],
        "stream": is_stream,
        "max_tokens": 16,
    }
    body = json.dumps(document).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer key-%b\r\ncontent-length: %d\r\n\r\n" % (tenant.encode(), len(body))
    ) + body


async def ask(port: int, data: bytes) -> tuple[float, float, bool]:
    """Seconds to the first byte of the body and to the last, and whether it was an answer."""
    began = trio.current_time()
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(data)
        head = b""
        while not head.partition(b"\r\n\r\n")[2]:
            data = await stream.receive_some(65536)
            if not data:
                break
            head += data
        first_s = trio.current_time() - began
        while await stream.receive_some(65536):
            pass
    return first_s, trio.current_time() - began, head.startswith(b"HTTP/1.1 200")


@asynccontextmanager
async def engines(count: int, speed: float) -> AsyncIterator[list[str]]:
    """Simulated engines in a process; their URLs."""
    ports = free_ports(count)
    command = [sys.executable, "-m", "smg", "engine", "--port", *map(str, ports), "--speed", str(speed)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
    try:
        for port in ports:
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        process.kill()
        await process.wait()


async def measure(arguments: argparse.Namespace, flags: tuple[str, ...], flood: int) -> dict[str, float]:
    """One run: the short requests' times, and how many of the flood's were answered."""
    speed, rng = arguments.speed, Random(7)
    times: list[float] = []
    counts = {"long": 0, "failed": 0}
    keys = ("--tenant-api-key", "flood:key-flood", "other:key-other")
    async with (
        engines(arguments.engines, speed) as urls,
        running_process(*keys, *flags, "--worker-urls", *urls) as gateway,
    ):
        while (await gateway.ask("/v1/models")).status != 200:
            await trio.sleep(0.05)
        async with trio.open_nursery() as nursery:

            async def flooding() -> None:
                while True:
                    data = request("flood", arguments.tokens, not arguments.plain, rng)
                    _, _, is_answer = await ask(gateway.port, data)
                    counts["long" if is_answer else "failed"] += 1

            async def asking() -> None:
                first_s, _, is_answer = await ask(gateway.port, request("other", SHORT_TOKENS, True, rng))
                times.append(first_s if is_answer else float("inf"))

            for _ in range(flood):
                nursery.start_soon(flooding)
            await trio.sleep(10 / speed if flood else 0)
            counts.update(long=0, failed=0)
            wanted = int(arguments.seconds)
            for _ in range(wanted):
                nursery.start_soon(asking)
                await trio.sleep(1 / speed)
            found = dict(counts)
            with trio.move_on_after(70 / speed):
                while len(times) < wanted:
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    times.sort()
    times += [float("inf")] * (wanted - len(times))
    return {
        "p50_s": times[len(times) // 2] * speed,
        "p99_s": times[int(0.99 * (len(times) - 1))] * speed,
        "max_s": times[-1] * speed,
        "long_answered": found["long"],
        "long_refused": found["failed"],
    }


async def longest(arguments: argparse.Namespace) -> float:
    """One prefill of the flood alone, in engine seconds."""
    rng = Random(9)
    async with engines(1, arguments.speed) as urls:
        port = int(urls[0].rpartition(":")[2])
        times = [(await ask(port, request("flood", arguments.tokens, True, rng)))[0] for _ in range(3)]
    return max(times) * arguments.speed


async def main() -> None:
    """Measures and prints a line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--speed", type=float, default=4.0, help="the engines' clock against ours")
    parser.add_argument("--seconds", type=float, default=60.0, help="engine seconds, one short request each")
    parser.add_argument("--flood", type=int, default=48, help="long requests in flight")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--plain", action="store_true", help="the flood's answers are no streams")
    arguments = parser.parse_args()
    print(f"one prefill of the flood: {await longest(arguments):.2f} s")
    for name, flags, flood in (
        ("alone", (), 0),
        ("flood, scheduler off", (), arguments.flood),
        ("flood, scheduler on", ("--priority-scheduler-enabled",), arguments.flood),
    ):
        found = await measure(arguments, flags, flood)
        print(f"{name:22}", "  ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    trio.run(main)
