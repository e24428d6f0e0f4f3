"""The books of usage of all nodes, asked for when somebody wants to see them.

Owns the question and its answer, a page of a book at a time. Nothing of it is gossiped: books are large, wanted rarely, and
then wanted as they are now. It must never change a book, and never waits longer than its patience for a node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from mesh import MeshError
from smg.bridge import words
from smg.bridge.words import AskedUsage, UsagePage
from smg.tenancy.usage import Book, NodeBook, Row

PATIENCE_S = 2.0
"""For the whole book of a node: a full one is some forty pages, each a round trip."""
PAGE_BYTES = 48 * 1024
"""Rows of one answer: an answer of the mesh has at most 64 KiB."""
PAGE_ROWS = 512
NAME_CHARS = 512
"""What is sent of a tenant's or a model's name; longer ones than this are cut."""
PAGES_MAX = 1024
"""More pages than any book has; a peer that goes on for ever is no book."""


class SharedUsage:
    """See the module. `ask` puts a question to a peer, `names` are the live ones."""

    def __init__(
        self,
        book: Book,
        *,
        since_s: float,
        ask: Callable[[str, bytes], Awaitable[bytes]],
        names: Callable[[], Sequence[str]],
    ) -> None:
        self._book = book
        self._since_s = since_s
        self._ask = ask
        self._names = names

    def answer(self, asked: AskedUsage) -> bytes:
        """A page of this node's book, from the line that was asked for on."""
        rows: list[Row] = []
        size = 0
        place = asked.first
        for row in self._book.page(asked.first, PAGE_ROWS):
            cut = _cut(row)
            size += len(words.encode(cut))
            if rows and size > PAGE_BYTES:
                break
            place += 1
            if asked.tenant in (None, row.tenant) and asked.model in (None, row.model):
                rows.append(cut)
        is_last = place >= self._book.count
        return words.encode(UsagePage(words.VERSION, self._since_s, tuple(rows), place, is_last))

    async def books(self, tenant: str | None, model: str | None) -> tuple[list[NodeBook], list[str]]:
        """The lines of all live peers, and the peers that did not tell them in time. Waits two seconds at most."""
        found: dict[str, NodeBook] = {}
        names = sorted(self._names())
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self._read, name, tenant, model, found)
        return [found[name] for name in names if name in found], [name for name in names if name not in found]

    async def _read(
        self, name: str, tenant: str | None, model: str | None, found: dict[str, NodeBook]
    ) -> None:
        rows: list[Row] = []
        first = 0
        with trio.move_on_after(PATIENCE_S):
            for _ in range(PAGES_MAX):
                question = AskedUsage(words.VERSION, words.USAGE, first, tenant, model)
                try:
                    page = words.read_usage_page(await self._ask(name, words.encode(question)))
                except MeshError:
                    return  # it left, or is of a version that has no book
                if page is None or not (page.is_last or page.next > first):
                    return
                rows += page.rows
                first = page.next
                if page.is_last:
                    found[name] = NodeBook(name, page.since_s, tuple(rows))
                    return


def _cut(row: Row) -> Row:
    """The row with names that an answer can hold."""
    if len(row.tenant) <= NAME_CHARS and len(row.model) <= NAME_CHARS:
        return row
    return Row(row.tenant[:NAME_CHARS], row.model[:NAME_CHARS], *_numbers(row))


def _numbers(row: Row) -> tuple[int, int, int, int, int]:
    return row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.estimated_requests
