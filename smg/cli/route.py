"""`smg route explain`: ask a running gateway where a request would go, and why (contract section 13).

Owns the making of a body out of a prompt and the table of candidates that a person reads. Nothing is sent to a worker by
it, and the prompt goes to the gateway only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smg.cli.flags import read_secret
from smg.cli.remote import Gateway, RemoteError, add_common
from smg.errors import SettingsError

PROMPT_BYTES_MAX = 64 << 20
"""Longest prompt or body that is read from a file or a pipe."""

_ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "generate": "/generate",
    "embeddings": "/v1/embeddings",
    "rerank": "/v1/rerank",
}
_MEMBERS = {
    "/v1/completions": "prompt",
    "/generate": "text",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}
_COLUMNS = (
    "rank", "worker", "cached", "in flight", "queued", "kv", "wait", "prefill", "penalty", "cost", "why",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg route`."""
    add_common(parser, is_default=True)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", title="what to do", required=True)
    words = "where a request would go, and why; nothing is sent to a worker"
    explain = commands.add_parser("explain", help=words, description=words.capitalize() + ".")
    add_common(explain, is_default=False)
    explain.add_argument(
        "--model", metavar="NAME", help="model or alias (default: the only one the gateway serves)"
    )
    explain.add_argument("--prompt", metavar="TEXT|@FILE|-", help="the prompt; - reads standard input")
    explain.add_argument(
        "--body", metavar="@FILE|-", help="a whole request body in place of --prompt and --model"
    )
    explain.add_argument(
        "--endpoint", metavar="NAME|PATH", help=f"{', '.join(_ENDPOINTS)}, or a path (default: chat)"
    )
    explain.add_argument("--routing-key", metavar="KEY", help="as X-SMG-Routing-Key")
    explain.add_argument("--target", metavar="ID|INDEX", help="as X-SMG-Target-Worker")


def main(arguments: argparse.Namespace) -> int:
    """Ask and print. Returns 0, or 1 with one line on stderr."""
    key = arguments.api_key
    try:
        gateway = Gateway(
            arguments.gateway, None if key is None else read_secret(key, "--api-key"), arguments.timeout_secs
        )
        found = _explained(gateway, arguments)
    except RemoteError as wrong:
        print(f"smg route: {wrong}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print_explained(found)
    return 0


def _explained(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    path = _path(arguments.endpoint)
    if arguments.body is not None:
        if arguments.prompt is not None:
            raise SettingsError("--body", "", "stands in place of --prompt", is_combination=True)
        try:
            body = json.loads(_text(arguments.body, "--body"))
        except ValueError as wrong:
            raise SettingsError("--body", repr(arguments.body), f"is no JSON: {wrong}") from None
    else:
        body = _body(path or _ENDPOINTS["chat"], _text(arguments.prompt or "", "--prompt"))
        body["model"] = arguments.model or _only_model(gateway)
    headers = {"x-smg-routing-key": arguments.routing_key, "x-smg-target-worker": arguments.target}
    for flag, value in (("--routing-key", arguments.routing_key), ("--target", arguments.target)):
        if value is not None and not (value.isascii() and value.isprintable()):
            raise SettingsError(flag, repr(value), "must be visible ASCII, as a header is")
    query = f"?endpoint={quote(path, safe='')}" if path else ""
    return gateway.ask(
        "POST",
        f"/route/explain{query}",
        body,
        {name: value for name, value in headers.items() if value is not None},
    )


def _path(endpoint: str | None) -> str | None:
    if endpoint is None or endpoint.startswith("/"):
        return endpoint
    path = _ENDPOINTS.get(endpoint)
    if path is None:
        raise SettingsError("--endpoint", repr(endpoint), f"must be a path or one of {', '.join(_ENDPOINTS)}")
    return path


def _body(path: str, text: str) -> dict[str, Any]:
    if path in _MEMBERS:
        return {_MEMBERS[path]: text}
    if path == "/v1/rerank":
        return {"query": text, "documents": [""]}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    return {**body, "max_tokens": 1} if path == "/v1/messages" else body


def _only_model(gateway: Gateway) -> str:
    names = [str(row.get("id")) for row in gateway.ask("GET", "/v1/models").get("data", [])]
    if len(names) != 1:
        told = f"it serves {', '.join(names[:8])}" if names else "it serves none yet"
        raise RemoteError(f"which model? {told}; give --model NAME")
    return names[0]


def _text(given: str, flag: str) -> str:
    """The text itself, of a file (`@path`), or of standard input (`-`). Raises SettingsError."""
    if given == "-":
        data = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    elif given.startswith("@"):
        try:
            with Path(given[1:]).open("rb") as file:
                data = file.read(PROMPT_BYTES_MAX + 1)
        except OSError as wrong:
            raise SettingsError(
                flag, repr(given), wrong.strerror or str(wrong), is_combination=True
            ) from None
    else:
        return given
    if len(data) > PROMPT_BYTES_MAX:
        raise SettingsError(
            flag, repr(given), f"is longer than {PROMPT_BYTES_MAX} bytes", is_combination=True
        )
    return data.decode("utf-8", "replace")


def print_explained(found: dict[str, Any]) -> None:
    """A sentence about the choice, and one table row per worker: candidates by rank, then the others."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(_sentence(found))
    rows = sorted(found["workers"], key=lambda row: (row["rank"] is None, row["rank"] or 0))
    blocks = found["prompt"]["blocks"]
    cells = [_cells(row, blocks) for row in rows]
    kept = [index for index in range(len(_COLUMNS)) if index < 2 or any(row[index] for row in cells)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in kept:
        name = _COLUMNS[index]
        table.add_column(
            name.upper(), justify="left" if name in ("worker", "why") else "right", overflow="fold"
        )
    for row, line in zip(rows, cells, strict=True):
        style = "green" if row["worker_id"] == found["chosen"] else "" if row["eligible"] else "yellow"
        table.add_row(*(Text(line[index], style=style) for index in kept))
    # A pipe has no width; a wide one keeps a row on a line for grep and awk.
    width = (
        None
        if sys.stdout.isatty()
        else sum(max(map(len, column)) + 3 for column in zip(*cells, _COLUMNS, strict=True))
    )
    Console(width=width, highlight=False).print(table)


def _sentence(found: dict[str, Any]) -> str:
    prompt, chosen = found["prompt"], found["chosen"]
    what = f"{found['model'] or 'no model'} {found['endpoint']}, {prompt['chars']} characters in {prompt['blocks']} blocks"
    if chosen is not None:
        url = next((row["url"] for row in found["workers"] if row["worker_id"] == chosen), chosen)
        return f"{what}: {found['policy']} sends it to {url} ({found['decided_by'].replace('_', ' ')})"
    some = found.get("candidates") or []
    if not some:
        return f"{what}: nobody can take it now"
    return f"{what}: {found['policy']} takes one of {len(some)} by chance"


def _cells(row: dict[str, Any], blocks: int) -> tuple[str, ...]:
    terms = row["terms"] or {}
    return (
        "" if row["rank"] is None else str(row["rank"]),
        row["url"],
        f"{row['matched_blocks']}/{blocks}" if row["matched_blocks"] or terms else "",
        str(row["in_flight"]),
        str(row["queued"]),
        "" if row["kv_usage"] is None else f"{row['kv_usage']:.0%}",
        *(_seconds(terms.get(name)) for name in ("wait", "prefill", "penalty")),
        _seconds(row["cost"]),
        f"left out: {row['excluded_by']}" if row["excluded_by"] else row["reason"],
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"
