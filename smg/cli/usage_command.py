"""`smg usage`: what each tenant has used of each model, as a running gateway counts it.

Owns the table a person reads. It asks `GET /v1/usage` of one gateway and adds nothing up itself. It must never print a key.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any
from urllib.parse import urlencode

from smg.cli.flags import read_secret
from smg.cli.remote import Gateway, RemoteError, add_common

_NUMBERS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "estimated_requests")
_COLUMNS = ("tenant", "model", "requests", "prompt", "cached", "completion", "estimated")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg usage`."""
    add_common(parser, is_default=True)
    parser.add_argument("--tenant", help="only this tenant, such as auth:red")
    parser.add_argument("--model", help="only this model, by its canonical name")


def main(arguments: argparse.Namespace) -> int:
    """Ask and print. Returns 0, or 1 with one line on stderr."""
    key = arguments.api_key
    query = {name: getattr(arguments, name) for name in ("tenant", "model")}
    wanted = urlencode({name: value for name, value in query.items() if value is not None})
    try:
        gateway = Gateway(
            arguments.gateway, None if key is None else read_secret(key, "--api-key"), arguments.timeout_secs
        )
        document = gateway.ask("GET", "/v1/usage" + (f"?{wanted}" if wanted else ""))
    except RemoteError as wrong:
        print(f"smg usage: {wrong}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print_usage(document)
    return 0


def print_usage(document: dict[str, Any]) -> None:
    """One row per tenant and model, then the sum; the first line says who counts since when."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for node in document["nodes"]:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(node["since"]))
        print(f"{node['name']}: since {since}")
    for name in document["missing"]:
        print(f"{name}: did not answer, what it has counted is missing here")
    rows = [
        (row["tenant"], row["model"], *(str(row[name]) for name in _NUMBERS)) for row in document["usage"]
    ]
    if not rows:
        print("nothing was used")
        return
    rows.append(("total", "", *(str(document["total"][name]) for name in _NUMBERS)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(
            name.upper(), justify="left" if name in ("tenant", "model") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A pipe has no width; a wide one keeps a row on a line for grep and awk.
    widths = [max(len(row[index]) for row in (*rows, _COLUMNS)) for index in range(len(_COLUMNS))]
    width = None if sys.stdout.isatty() else sum(widths) + 3 * len(widths)
    Console(width=width, highlight=False).print(table)
