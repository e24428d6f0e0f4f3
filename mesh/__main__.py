"""`python -m mesh`: a bare agent that prints what it sees of a mesh, for operators to test a network.

Owns its flags and its lines. It shares no state of its own; it answers, and asks, so that a round trip over the stream
can be seen too. SIGTERM and SIGINT make it leave in order. Must never be needed by the library.

    python -m mesh --name a --port 7946
    python -m mesh --name b --port 7946 --seeds a.example:7946 --json
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence

import msgspec
import trio

from mesh.address import format_address
from mesh.agent import Agent
from mesh.errors import ConflictError, MeshError, SettingsError
from mesh.hooks import Hooks
from mesh.messages import Event
from mesh.namespace import Lww
from mesh.settings import AgentSettings
from mesh.tls import TlsContexts, TlsFiles

EXIT_SETTINGS = 2
EXIT_CONFLICT = 3
NOTES = "notes"
"""Namespace of `--put`: last writer wins."""


class Printer:
    """One line per event: words, or with `is_json` one object."""

    def __init__(self, is_json: bool) -> None:
        self._is_json = is_json
        self._started_s = trio.current_time()

    def line(self, event: str, fields: Mapping[str, object]) -> None:
        """Print one event; `at_s` counts from our start."""
        at_s = round(trio.current_time() - self._started_s, 4)
        if self._is_json:
            print(json.dumps({"at_s": at_s, "event": event, **fields}, default=str), flush=True)
        else:
            words = " ".join(f"{key}={value}" for key, value in fields.items())
            print(f"{at_s:9.3f}  {event:<16} {words}", flush=True)

    def member(self, event: Event) -> None:
        """Print a membership event, `MemberUp` as `member_up` and so on."""
        kind = type(event).__name__
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
        fields: dict[str, object] = {}
        record = getattr(event, "record", None)
        if record is not None:
            fields = {"name": record.name, "address": format_address(record.address)}
            fields["incarnation"] = f"{record.incarnation:x}"
        for field in ("accuser", "is_restart", "told", "acked"):
            if getattr(event, field, None):
                fields[field] = getattr(event, field)
        self.line(name, fields)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m mesh", description="A bare mesh agent that prints membership events."
    )
    found.add_argument("--name", required=True, help="the member's identity: not empty, no colon")
    found.add_argument("--host", default="0.0.0.0", help="address to listen on (0.0.0.0)")
    found.add_argument("--port", type=int, default=7946, help="UDP and TCP port, 0 = any (7946)")
    found.add_argument("--advertise", default="", help="host or host:port others reach us at")
    found.add_argument(
        "--seeds", nargs="*", default=[], help="host:port, several or comma separated; tried for ever"
    )
    found.add_argument("--label", default="", help="meshes of different labels never merge")
    found.add_argument(
        "--secret", default="", help="a secret of 16 bytes or more, or @file with one per line"
    )
    found.add_argument("--accept-plain", action="store_true", help="with --secret: read plain packets too")
    found.add_argument("--tls-ca", default="", help="PEM file of the mesh's CA")
    found.add_argument("--tls-cert", default="", help="PEM file of our certificate")
    found.add_argument("--tls-key", default="", help="PEM file of our key")
    found.add_argument("--tls-name", default="", help="DNS name that every member's certificate must carry")
    found.add_argument(
        "--status-interval", type=float, default=0.0, help="print the status so often, 0 = never"
    )
    found.add_argument("--put", default="", metavar="KEY=VALUE", help="write this once, others print it")
    found.add_argument("--json", action="store_true", help="one JSON object per line")
    return found


def _secrets(text: str) -> tuple[bytes, ...]:
    if not text.startswith("@"):
        return (text.encode(),) if text else ()
    try:
        with open(text[1:], "rb") as file:
            return tuple(line.strip() for line in file if line.strip())
    except OSError as error:
        raise SettingsError(f"cannot read {text[1:]}: {error.strerror}") from error


def _agent(options: argparse.Namespace, printer: Printer) -> Agent:
    tls = None
    files = (options.tls_ca, options.tls_cert, options.tls_key)
    if any(files):
        if not all(files):
            raise SettingsError("--tls-ca, --tls-cert and --tls-key go together")
        ca, certificate, key = files
        tls = TlsContexts(TlsFiles(ca=ca, certificate=certificate, key=key, name=options.tls_name))
    settings = AgentSettings(
        name=options.name,
        host=options.host,
        port=options.port,
        advertise=options.advertise,
        seeds=tuple(seed for text in options.seeds for seed in text.split(",") if seed),
        label=options.label,
        secrets=_secrets(options.secret),
        accepts_plain=options.accept_plain,
    )
    return Agent(settings, [Lww(name=NOTES)], tls=tls, hooks=Hooks(log=printer.line))


async def _leave_on_signal(agent: Agent, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            await agent.leave()


async def _print_status(agent: Agent, printer: Printer, interval_s: float) -> None:
    while True:
        await trio.sleep(interval_s)
        status = msgspec.to_builtins(agent.status(), builtin_types=())
        peers = status.pop("peers")
        printer.line("status", status)
        for peer in peers:
            printer.line("peer", peer)


async def _main(options: argparse.Namespace) -> int:
    printer = Printer(options.json)
    exit_code = 0
    try:
        agent = _agent(options, printer)
        agent.on_member(printer.member)
        agent.on_change(
            NOTES, lambda change: printer.line(type(change).__name__.lower(), msgspec.structs.asdict(change))
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(_leave_on_signal, agent)
            await nursery.start(_run, agent, nursery)
            host, port = agent.address
            printer.line(
                "listening", {"name": agent.name, "host": host, "port": port, "boot": agent.own.boot.hex()}
            )
            if options.put:
                key, _, value = options.put.partition("=")
                agent.state.put(NOTES, key.encode(), value.encode())
            if options.status_interval:
                nursery.start_soon(_print_status, agent, printer, options.status_interval)
    except* MeshError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"python -m mesh: {error}", file=sys.stderr)
        exit_code = EXIT_CONFLICT if isinstance(error, ConflictError) else EXIT_SETTINGS
    return exit_code


async def _run(agent: Agent, nursery: trio.Nursery, task_status: trio.TaskStatus[object]) -> None:
    await agent.run(task_status)
    nursery.cancel_scope.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal; the exit code."""
    return trio.run(_main, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
