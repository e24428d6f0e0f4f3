"""`GET /v1/usage`: what each tenant has used of each model, for operators who bill.

Owns the answer's form. The numbers are the book's (`tenancy/usage`); books of other nodes are asked of whoever connects
nodes, by one function, and added up here; nodes that do not tell theirs are named. Never changes a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import parse_qs

from smg.errors import GatewayError
from smg.net.plain import Request, Response, json_response
from smg.tenancy.usage import Book, NodeBook, Row, summed

_FILTERS = ("tenant", "model")
_NUMBERS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "estimated_requests")


class PeerBooks(Protocol):
    """The books of the other nodes of a mesh."""

    async def books(self, tenant: str | None, model: str | None) -> tuple[Sequence[NodeBook], Sequence[str]]:
        """The lines of a tenant, a model, or all, and the names of the nodes that did not tell theirs. Waits seconds at most."""
        ...


class UsageApi:
    """The endpoint `usage`. `node` is this node's name and `since_s` its start (seconds since 1970)."""

    def __init__(
        self,
        book: Book,
        *,
        node: str,
        since_s: float,
        peers: PeerBooks | None = None,
    ) -> None:
        self._book = book
        self._node = node
        self._since_s = since_s
        self._peers = peers

    async def usage(self, request: Request) -> Response:
        """200 with the table; `?tenant=` and `?model=` choose lines. Raises `GatewayError` 400 for another parameter."""
        query = parse_qs(request.query, keep_blank_values=True)
        for name, values in query.items():
            if name not in _FILTERS or len(values) > 1:
                raise GatewayError(
                    400, "invalid_value", "The parameters are tenant and model, each once", param=name[:64]
                )
        tenant, model = (query.get(name, [None])[0] for name in _FILTERS)
        others, missing = ((), ()) if self._peers is None else await self._peers.books(tenant, model)
        own = NodeBook(self._node, self._since_s, self._book.rows(tenant, model))
        books = sorted((own, *others), key=lambda book: book.node)
        rows = summed(row for book in books for row in book.rows)
        document: dict[str, Any] = {
            "object": "usage",
            "nodes": [{"name": book.node, "since": round(book.since_s, 3)} for book in books],
            "missing": list(missing),
            "usage": [
                {"tenant": row.tenant, "model": row.model, **{name: getattr(row, name) for name in _NUMBERS}}
                for row in rows
            ],
            "total": _total(rows),
        }
        return json_response(200, document)


def _total(rows: Sequence[Row]) -> dict[str, int]:
    return {name: sum(getattr(row, name) for row in rows) for name in _NUMBERS}
