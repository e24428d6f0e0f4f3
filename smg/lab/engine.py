"""`smg engine`: simulated OpenAI-compatible engines on one or more ports, for demos, tests and sizing.

Owns the command's flags, the listeners and the process's life: it says where it listens, one line per engine, and
ends with 0 on SIGTERM or SIGINT. Everything an engine does is in `engine_server.py` and below.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import trio

from smg.errors import SmgError
from smg.lab.engine_face import FLAVOURS
from smg.lab.engine_model import EngineSettings
from smg.lab.engine_server import EngineServer, refuse
from smg.lab.simulated import Simulated
from smg.net.exchange import Exchange, ServerLimits
from smg.net.readiness import Readiness
from smg.net.server import Server

BACKLOG = 1024
ENGINES_MAX = 256
"""Most engines of one process: it has one core, and each engine a listener."""


class CannotListen(SmgError):
    """A port that cannot be bound."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `smg engine`."""
    defaults = EngineSettings()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=_port,
        nargs="+",
        default=[8000],
        help="port of each engine; one port and --count N means N in a row, 0 lets the system choose "
        "(default: 8000)",
    )
    add("--count", type=_count, default=None, help="engines to start (default: one per --port)")
    add("--model", nargs="+", default=["sim"], help="names of the models it serves (default: sim)")
    add(
        "--engine",
        choices=FLAVOURS,
        default="vllm",
        help="whose admin endpoints and metric names it has (default: %(default)s)",
    )
    add(
        "--kv-blocks",
        type=_whole,
        default=32_000,
        help="blocks of its KV cache (default: %(default)s: 512,000 tokens)",
    )
    add("--block-tokens", type=_whole, default=16, help="tokens per block (default: %(default)s)")
    add(
        "--prefill-tokens-per-second",
        type=_positive,
        default=defaults.prefill_tokens_per_s,
        help="uncached prompt tokens computed per second (default: %(default)s)",
    )
    add(
        "--ttft-ms",
        type=_not_negative,
        default=8.0,
        help="least time to the first token (default: %(default)s)",
    )
    add(
        "--decode-ms",
        type=_positive,
        default=12.0,
        help="time per token of one request (default: %(default)s)",
    )
    add(
        "--slots",
        type=_whole,
        default=defaults.slots,
        help="requests computed at once (default: %(default)s)",
    )
    add(
        "--output-tokens",
        type=_whole,
        default=32,
        help="length of an answer; max_tokens cuts it, with ignore_eos max_tokens is the length "
        "(default: %(default)s)",
    )
    add("--speed", type=_positive, default=1.0, help="how much faster than real time (default: %(default)s)")
    add("--api-key", default=None, help="key that callers must bring (default: none)")
    add("--seed", type=int, default=0, help="of hashes and ordered faults (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Runs the engines until a signal ends them; the exit code."""
    try:
        trio.run(run_engines, arguments, _say)
    except CannotListen as error:
        sys.stderr.write(f"smg engine: {error}\n")
        return 1
    return 0


async def run_engines(
    arguments: argparse.Namespace,
    say: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[list[tuple[EngineServer, str]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until SIGTERM, SIGINT or cancellation; `started` gives each engine with its URL. Raises `CannotListen`."""
    sockets = listeners(arguments.host, arguments.port, arguments.count)
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        running = []
        for number, listener in enumerate(sockets):
            simulated = Simulated(engine_settings(arguments), speed=arguments.speed, seed=arguments.seed)
            server = EngineServer(
                simulated,
                models=tuple(arguments.model),
                flavour=arguments.engine,
                api_key=arguments.api_key,
                output_tokens=arguments.output_tokens,
                seed=arguments.seed + number,
            )
            await nursery.start(simulated.run)
            http = Server(server.handle, refuse, _report, readiness, ServerLimits())
            await nursery.start(http.serve, [listener])
            running.append((server, _url(listener)))
        for _, url in running:
            say(f"smg engine listening on {url}")
        task_status.started(running)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


def engine_settings(arguments: argparse.Namespace) -> EngineSettings:
    """The model's numbers that the flags give."""
    return EngineSettings(
        prefill_base_s=arguments.ttft_ms / 1000,
        prefill_tokens_per_s=arguments.prefill_tokens_per_second,
        slots=arguments.slots,
        decode_base_s=arguments.decode_ms / 1000,
        decode_per_running_s=arguments.decode_ms
        / 1000
        / 40,  # a full batch of 64 is 2.6 times slower, as measured
        cache_blocks=arguments.kv_blocks,
        block_tokens=arguments.block_tokens,
        emits_tokens=True,
    )


def listeners(host: str, ports: Sequence[int], count: int | None) -> list[socket.socket]:
    """Bound listening sockets: one per port, or `count` from the one port on. Raises `CannotListen`."""
    wanted = list(ports)
    if count is not None and len(wanted) == 1:
        wanted = [wanted[0] + number if wanted[0] else 0 for number in range(count)]
    if count is not None and count != len(wanted):
        raise CannotListen(f"--count {count} does not fit {len(wanted)} ports")
    bound: list[socket.socket] = []
    try:
        for port in wanted:
            bound.append(_listen(host, port))
    except BaseException:
        for listener in bound:
            listener.close()
        raise
    return bound


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"{host}:{port}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise CannotListen(f"{host}:{port}: {getattr(error, 'strerror', error)}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _report(exchange: Exchange, error: BaseException) -> None:
    sys.stderr.write(f"smg engine: fault while serving {exchange.head.target!r}: {error!r}\n")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be between 0 and 65535")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= ENGINES_MAX:
        raise argparse.ArgumentTypeError(f"must be between 1 and {ENGINES_MAX}")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be greater than 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must not be negative")
    return value
