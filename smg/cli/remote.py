"""`smg workers`: ask a running gateway for its workers, and change them (contract section 10).

Owns `Gateway`, a small blocking client of the admin endpoints over the standard library, and the table a person reads. One
command is one or a few requests, so nothing here needs trio. It must never print a key, and never guess: what the gateway
refused is shown in the gateway's own words.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from smg.cli.flags import positive_seconds, read_secret
from smg.errors import SettingsError
from smg.settings_flag import worker_url

DEFAULT_GATEWAY = "http://127.0.0.1:30000"
ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""Longest answer that is read: a thousand workers with their models stay far below."""

_POLL_PAUSE_S = 0.2
_COLUMNS = ("id", "url", "model", "type", "engine", "status", "load", "priority", "cost", "note")


class RemoteError(Exception):
    """The gateway could not be asked, or refused; the text is one line for a person."""


class Gateway:
    """The admin endpoints of one running gateway. Calls block, at most `timeout_s` for each wait on the socket."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        try:
            self.url = worker_url(url)
        except ValueError as wrong:
            raise SettingsError("--gateway", repr(url), str(wrong)) from None
        parts = urlsplit(self.url)
        self._host = parts.hostname or ""
        self._port = parts.port
        self._path = parts.path
        self._is_tls = parts.scheme == "https"
        self._api_key = api_key
        self._timeout_s = timeout_s

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON document the gateway answers. Raises RemoteError when there is none, or the status is 400 or above."""
        status, content = self._exchange(method, path, body, headers or {})
        try:
            document = json.loads(content) if content else {}
        except ValueError:
            document = None
        if status >= 400:
            raise RemoteError(_refusal(method, path, status, document))
        if document is None:
            raise RemoteError(f"{self.url} does not answer like a gateway: {method} {path} gave no JSON")
        return document

    def _exchange(
        self, method: str, path: str, body: Any, more_headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        headers = {"accept": "application/json", **more_headers}
        content = None
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        if body is not None:
            content = json.dumps(body).encode()
            headers["content-type"] = "application/json"
        try:
            connection.request(method, self._path + path, body=content, headers=headers)
            answer = connection.getresponse()
            received = answer.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as wrong:
            raise RemoteError(_no_answer(self.url, wrong)) from None
        finally:
            connection.close()
        if len(received) > ANSWER_BYTES_MAX:
            raise RemoteError(f"{self.url}: the answer is longer than {ANSWER_BYTES_MAX} bytes")
        return answer.status, received


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg workers`."""
    add_common(parser, is_default=True)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", title="what to do (default: list)")
    listing = _verb(commands, "list", "all workers, in order of registration")
    listing.add_argument("--model", help="only workers that serve this model or alias")
    show = _verb(commands, "show", "everything about one worker")
    show.add_argument("worker", metavar="ID|URL")
    add = _verb(commands, "add", "add a worker")
    add.add_argument("url", metavar="URL")
    add.add_argument(
        "--model", action="append", default=[], help="model it serves; may be repeated (default: ask it)"
    )
    add.add_argument(
        "--type", choices=("regular", "prefill", "decode"), help="what it computes (default: regular)"
    )
    add.add_argument("--bootstrap-port", type=int, metavar="PORT", help="of a prefill worker")
    add.add_argument("--engine", metavar="NAME", help="sglang, vllm, trtllm ... (default: ask it)")
    add.add_argument("--worker-api-key", metavar="KEY", help="key the worker wants, or @/path/to/file")
    add.add_argument("--wait", action="store_true", help="return when it is ready, fail after --timeout-secs")
    change = _verb(commands, "update", "change a worker, keeping everything that is not named")
    change.add_argument("worker", metavar="ID|URL")
    change.add_argument("--worker-api-key", metavar="KEY", help="key the worker wants, or @/path/to/file")
    for command in (add, change):
        command.add_argument("--priority", type=int, help="ties go to the higher one (default: 50)")
        command.add_argument("--cost", type=float, help="2.0 gets half the load (default: 1.0)")
        command.add_argument(
            "--label", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
        )
    remove = commands.add_parser(
        "remove", help="drain a worker and remove it; its requests in flight end in peace"
    )
    remove.add_argument("worker", metavar="ID|URL")
    remove.add_argument(
        "--wait", action="store_true", help="return when it is gone, fail after --timeout-secs"
    )


def main(arguments: argparse.Namespace) -> int:
    """Do what was asked and print the answer. Returns 0, or 1 with one line on stderr."""
    key = arguments.api_key
    try:
        gateway = Gateway(
            arguments.gateway, None if key is None else read_secret(key, "--api-key"), arguments.timeout_secs
        )
        document = _VERBS[arguments.verb or "list"](gateway, arguments)
    except RemoteError as wrong:
        print(f"smg workers: {wrong}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(document, indent=2))
    elif "workers" in document:
        print_workers(document["workers"])
    else:
        print(_sentence(document))
    return 0


def print_workers(workers: list[dict[str, Any]]) -> None:
    """One table row per worker, in the given order."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not workers:
        print("no workers; add one with: smg workers add http://HOST:PORT")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [_row(worker) for worker in workers]
    columns = [
        index for index, name in enumerate(_COLUMNS) if name != "note" or any(row[index] for row in rows)
    ]
    for index in columns:
        is_number = _COLUMNS[index] in ("load", "priority", "cost")
        table.add_column(_COLUMNS[index].upper(), justify="right" if is_number else "left", overflow="fold")
    for worker, row in zip(workers, rows, strict=True):
        style = "" if worker.get("is_healthy", True) else "yellow"
        table.add_row(*(Text(row[index], style=style) for index in columns))
    # A pipe has no width; a wide one keeps a row on a line for grep and awk.
    widths = [max(len(row[index]) for row in [*rows, _COLUMNS]) for index in columns]
    width = None if sys.stdout.isatty() else sum(widths) + 3 * len(widths)
    Console(width=width, highlight=False).print(table)


def _verb(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """A verb, which takes the common arguments too, so that they may stand before or after it."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    add_common(parser, is_default=False)
    return parser


def add_common(parser: argparse.ArgumentParser, *, is_default: bool) -> None:
    """The arguments of every command that asks a gateway. `is_default` False for a verb: what stands before it counts."""

    def default(value: Any) -> Any:
        return value if is_default else argparse.SUPPRESS

    parser.add_argument(
        "--gateway",
        metavar="URL",
        default=default(os.environ.get("SMG_GATEWAY") or DEFAULT_GATEWAY),
        help=f"gateway to ask (default: SMG_GATEWAY, else {DEFAULT_GATEWAY})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=default(os.environ.get("SMG_API_KEY") or None),
        help="admin key, or @/path/to/file (default: SMG_API_KEY)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=default(False),
        help="print the gateway's JSON instead of a table",
    )
    parser.add_argument(
        "--timeout-secs",
        type=positive_seconds,
        default=default(10.0),
        metavar="SECS",
        help="patience (default: 10)",
    )


def _list(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    model = getattr(arguments, "model", None)
    return gateway.ask("GET", "/workers" + ("" if model is None else f"?model={quote(model, safe='')}"))


def _show(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    worker = gateway.ask("GET", _path(gateway, arguments.worker))
    return worker if arguments.json else {"workers": [worker]}


def _add(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    spec = {"url": arguments.url, **_changes(arguments)}
    if len(arguments.model) == 1:
        spec["model_id"] = arguments.model[0]
    elif arguments.model:
        spec["models"] = [{"id": model} for model in arguments.model]
    for member, value in (
        ("worker_type", arguments.type),
        ("bootstrap_port", arguments.bootstrap_port),
        ("runtime_type", arguments.engine),
    ):
        if value is not None:
            spec[member] = value
    accepted = gateway.ask("POST", "/workers", spec)
    return _wait_ready(gateway, accepted, arguments) if arguments.wait else accepted


def _update(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    changes = _changes(arguments)
    if not changes:
        raise RemoteError("nothing to change; name --priority, --cost, --label or --worker-api-key")
    return gateway.ask("PATCH", _path(gateway, arguments.worker), changes)


def _remove(gateway: Gateway, arguments: argparse.Namespace) -> Any:
    path = _path(gateway, arguments.worker)
    accepted = gateway.ask("DELETE", path)
    if not arguments.wait:
        return accepted
    deadline = time.monotonic() + arguments.timeout_secs
    while any(path == f"/workers/{worker.get('id')}" for worker in gateway.ask("GET", "/workers")["workers"]):
        if time.monotonic() > deadline:
            raise RemoteError(f"{arguments.worker} is still draining after {arguments.timeout_secs:g} s")
        time.sleep(_POLL_PAUSE_S)
    return {**accepted, "status": "removed", "message": "gone"}


_VERBS = {"list": _list, "show": _show, "add": _add, "update": _update, "remove": _remove}


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The members that both a new and a changed worker may have."""
    changes: dict[str, Any] = {}
    if arguments.worker_api_key is not None:
        changes["api_key"] = read_secret(arguments.worker_api_key, "--worker-api-key")
    if arguments.priority is not None:
        changes["priority"] = arguments.priority
    if arguments.cost is not None:
        changes["cost"] = arguments.cost
    if arguments.label:
        pairs = [label.partition("=") for label in arguments.label]
        if not all(name and equals for name, equals, _ in pairs):
            raise SettingsError("--label", repr(arguments.label[-1]), "must be NAME=VALUE")
        changes["labels"] = {name: value for name, _, value in pairs}
    return changes


def _path(gateway: Gateway, worker: str) -> str:
    """The path of a worker that is named by id or by URL."""
    if "://" not in worker:
        return f"/workers/{quote(worker, safe='')}"
    wanted = worker.rstrip("/").lower()
    for known in gateway.ask("GET", "/workers")["workers"]:
        if str(known.get("url", "")).lower() == wanted:
            return f"/workers/{known['id']}"
    raise RemoteError(f"no worker has the URL {worker}; see: smg workers list")


def _wait_ready(gateway: Gateway, accepted: Any, arguments: argparse.Namespace) -> Any:
    path = f"/workers/{accepted['worker_id']}"
    deadline = time.monotonic() + arguments.timeout_secs
    while True:
        worker = gateway.ask("GET", path)
        if worker.get("status") == "ready":
            return worker if arguments.json else {"workers": [worker]}
        if time.monotonic() > deadline:
            why = (worker.get("job_status") or {}).get("message") or f"status {worker.get('status')}"
            raise RemoteError(
                f"{arguments.url} was added but is not ready after {arguments.timeout_secs:g} s: {why}"
            )
        time.sleep(_POLL_PAUSE_S)


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    models = [str(model.get("id", "")) for model in worker.get("models") or [] if isinstance(model, dict)]
    job = worker.get("job_status") or {}
    cells = (
        worker.get("id"),
        worker.get("url"),
        " ".join(models) or worker.get("model_id"),
        worker.get("worker_type"),
        worker.get("runtime_type"),
        worker.get("status"),
        worker.get("load"),
        worker.get("priority"),
        worker.get("cost"),
        job.get("message"),
    )
    return tuple("" if cell is None else str(cell) for cell in cells)


def _sentence(document: dict[str, Any]) -> str:
    """What a 202 says, in a line."""
    named = document.get("worker_id") or document.get("id") or ""
    return " ".join(
        str(word) for word in (document.get("status", "done"), named, document.get("message", "")) if word
    )


def _refusal(method: str, path: str, status: int, document: Any) -> str:
    """The gateway's own words about a refusal; both error forms of contract section 8."""
    text, code = f"{method} {path}", ""
    if isinstance(document, dict):
        error = document.get("error")
        if isinstance(error, dict):
            text, code = str(error.get("message", text)), str(error.get("code", ""))
        elif error is not None:
            text, code = str(error), str(document.get("code", ""))
    hint = {401: "; give an admin key with --api-key or SMG_API_KEY", 403: "; this key may not do that"}.get(
        status, ""
    )
    return f"{status} {code}: {text}{hint}".replace(" :", ":")


def _no_answer(url: str, wrong: Exception) -> str:
    if isinstance(wrong, ConnectionRefusedError):
        return f"no gateway at {url}: connection refused; is it running? another one: --gateway URL"
    if isinstance(wrong, socket.gaierror):
        return f"no gateway at {url}: the host name is not known"
    if isinstance(wrong, TimeoutError):
        return f"no answer from {url} in time; more patience: --timeout-secs"
    if isinstance(wrong, http.client.HTTPException):
        return f"{url} does not speak HTTP like a gateway: {type(wrong).__name__}"
    return f"no answer from {url}: {getattr(wrong, 'strerror', None) or wrong}"
