"""`smg mesh`: the mesh as a running gateway sees it, once or live, and leaving it (contract section 20).

Owns the tables a person reads. It asks the admin endpoints of one gateway and opens no mesh itself, so that it works from any
host and shows what that gateway believes. It must never print a key.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from smg.cli import mesh_keys
from smg.cli.flags import positive_seconds, read_secret
from smg.cli.remote import Gateway, RemoteError, add_common

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WATCH_INTERVAL_S = 1.0
_COLUMNS = ("node", "address", "state", "version", "rtt", "seen", "transport", "in step", "note")
_STYLES = {"alive": "green", "suspect": "yellow", "dead": "red", "left": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg mesh`."""
    add_common(parser, is_default=True)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", title="what to do (default: status)")
    status = commands.add_parser("status", help="this node, its stores and its peers", description="Status.")
    status.add_argument("--watch", action="store_true", help="show it again and again until interrupted")
    status.add_argument(
        "--interval-secs",
        type=positive_seconds,
        default=WATCH_INTERVAL_S,
        metavar="SECS",
        help=f"pause between two looks with --watch (default: {WATCH_INTERVAL_S:g})",
    )
    members = commands.add_parser(
        "members", help="all members, dead and left ones too", description="Members."
    )
    leave = commands.add_parser(
        "leave", help="leave the mesh and go on serving", description="The node says farewell to its peers."
    )
    for command in (status, members, leave):
        add_common(command, is_default=False)
    limits = commands.add_parser(
        "limits", help="who holds which part of the limits that are asked now", description="Limits."
    )
    add_common(limits, is_default=False)
    mesh_keys.add_arguments(
        commands.add_parser(
            "keys",
            help="change the secret of the mesh, step by step",
            description="Change the secret of a mesh with --mesh-keys-file while it runs: add a new one on every node, then "
            "use it on every node, then remove the old one on every node.",
        )
    )


def main(arguments: argparse.Namespace) -> int:
    """Do what was asked and print the answer. Returns 0, or 1 with one line on stderr."""
    key = arguments.api_key
    verb = arguments.verb or "status"
    try:
        gateway = Gateway(
            arguments.gateway, None if key is None else read_secret(key, "--api-key"), arguments.timeout_secs
        )
        if verb == "status" and getattr(arguments, "watch", False):
            return _watch(gateway, arguments)
        document = _ask(gateway, verb, arguments)
    except RemoteError as wrong:
        print(f"smg mesh: {wrong}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(document, indent=2))
    elif verb == "keys":
        for line in mesh_keys.sentences(document):
            print(line)
    elif verb == "limits":
        _print(limits_table(document))
    elif verb == "leave":
        print("leaving; it goes on serving with what it knows")
    elif verb == "members":
        _print(members_table(document["members"]))
    else:
        _print(status_view(document))
    return 0


def _ask(gateway: Gateway, verb: str, arguments: argparse.Namespace) -> Any:
    if verb == "keys":
        return mesh_keys.change(gateway, arguments)
    if verb == "leave":
        return gateway.ask("POST", "/mesh/leave")
    return gateway.ask("GET", f"/mesh/{verb}")


def limits_table(document: dict[str, Any]) -> RenderableType:
    """What `/mesh/limits` says, for a person: this node's part first, in percent of the limit."""
    from rich.table import Table
    from rich.text import Text

    if not document["limits"]:
        return Text("no limit is asked now: all are divided evenly")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("LIMIT", "THIS NODE", "ASKED", "OTHERS"):
        table.add_column(name, overflow="fold")
    for row in document["limits"]:
        others = ", ".join(f"{name} {node['held']:.0%}" for name, node in sorted(row["nodes"].items()))
        table.add_row(Text(row["limit"]), f"{row['share']:.0%}", f"{row['demand']:.0%}", Text(others))
    return table


def status_view(status: dict[str, Any]) -> RenderableType:
    """What `/mesh/status` says, for a person."""
    from rich.console import Group
    from rich.text import Text

    if not status.get("enabled"):
        return Text("this gateway is in no mesh; start it with --ha-mesh")
    lag = status["lag_secs"]
    step = "in step" if status["converged"] else "not in step yet"
    lines = [
        f"{status['node']} at {status['address'] or 'no address yet'}: {status['state']}, "
        f"{status['alive']} of {status['members']} members alive, {step}",
        f"news is {lag['p50'] * 1000:.0f} ms old, at most {lag['max'] * 1000:.0f} ms; up {status['uptime_secs']:.0f} s; "
        f"version {status['version']}",
    ]
    if status.get("partitioned"):
        lines.append("cut off from a large part of the mesh; both sides serve")
    lines += [f"{name} is not merged: {why}" for name, why in status.get("mismatched", {}).items()]
    stores = ", ".join(f"{name} {store['entries']}" for name, store in status["stores"].items())
    lines.append(f"entries: {stores or 'none'}")
    owner = status.get("owner")
    if owner:
        told = ", ".join(f"{name} {count}" for name, count in owner.items())
        lines.append(f"owner placement: {told}")
    parts: list[RenderableType] = [Text(line) for line in lines]
    if status.get("peers"):
        parts += [Text(""), _peers_table(status["peers"])]
    return Group(*parts)


def members_table(members: list[dict[str, Any]]) -> Table:
    """One row per member, in the given order."""
    rows: list[tuple[str, ...]] = [
        (
            str(row["name"]) + (" (self)" if row["self"] else ""),
            str(row["address"]),
            str(row["state"]),
            str(row["version"]),
            _milliseconds(row["rtt_ms"]),
            f"{row['last_seen_secs']:.1f} s",
            "",
            "",
            "",
        )
        for row in members
    ]
    return _table(rows)


def _peers_table(peers: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for peer in peers:
        rtt = peer["rtt_s"]
        is_equal = peer["is_digest_equal"]
        rows.append(
            (
                str(peer["name"]),
                f"{peer['host']}:{peer['port']}",
                str(peer["state"]),
                "",
                _milliseconds(None if rtt is None else rtt * 1000),
                f"{max(0.0, peer['last_seen_s']):.1f} s",
                f"{peer['transport']} {peer['stream']}" + (" sealed" if peer["is_protected"] else ""),
                {True: "yes", False: f"{peer['digest_lag_s'] or 0:.0f} s not", None: "?"}[is_equal],
                str(peer["last_error"]),
            )
        )
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [
        place
        for place, name in enumerate(_COLUMNS)
        if name in ("node", "state") or any(row[place] for row in rows)
    ]
    for place in shown:
        table.add_column(_COLUMNS[place].upper(), overflow="fold")
    for row in rows:
        style = _STYLES.get(row[2], "")
        table.add_row(*(Text(row[place], style=style if place == 2 else "") for place in shown))
    return table


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"


def _print(shown: RenderableType) -> None:
    from rich.console import Console

    # A pipe has no width; a wide one keeps a row on a line for grep and awk.
    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(shown)


def _watch(gateway: Gateway, arguments: argparse.Namespace) -> int:
    """Show the status until interrupted; a gateway that does not answer is told of and asked again.

    In a terminal it is a picture that changes; into a pipe, or as JSON, one status follows the other.
    """
    from rich.live import Live
    from rich.text import Text

    def look() -> RenderableType | str:
        try:
            document = gateway.ask("GET", "/mesh/status")
        except RemoteError as wrong:
            return json.dumps({"error": str(wrong)}) if arguments.json else Text(str(wrong), style="red")
        return json.dumps(document) if arguments.json else status_view(document)

    if arguments.json or not sys.stdout.isatty():
        while True:
            shown = look()
            if isinstance(shown, str):
                print(shown, flush=True)
            else:
                _print(shown)
                sys.stdout.flush()
            time.sleep(arguments.interval_secs)
    with Live(auto_refresh=False) as live:
        while True:
            live.update(look(), refresh=True)
            time.sleep(arguments.interval_secs)
