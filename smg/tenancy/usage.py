"""What each tenant has used of each model since the node started: requests and tokens, so that operators can bill.

Owns the book and its bounds. Names of tenants may be made by clients (`ip:`), so only so many of them have a line of their
own; all others are counted together under `other`, and nothing is ever dropped or counted twice. It never reads a clock,
never looks at an answer and never asks a peer: books of other nodes are handed in as rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec

OTHER = "other"
"""The tenant, or model, of what has no line of its own."""

ENTRIES_MAX = 16_384
"""Lines of the book: a thousand tenants with keys times sixteen models."""

GUESTS_MAX = 4_096
"""Lines for tenants that are addresses or values of a header: their number is the clients' choice, and they must not take the
room of those with keys."""

LABELLED_MAX = 1_024
LABELLED_GUESTS_MAX = 256
"""As the two above, for metrics: each line is four series that a scraper keeps for weeks. First come, first named; a name that
was given is kept, because a counter must not jump."""

KEYED = "auth:"
"""The beginning of the names that are in the settings (ADM-5)."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One line of a book, as it is shown and as nodes send it to each other.

    `prompt_tokens` are all of the prompt, `cached_tokens` those of them that came out of a cache. `estimated_requests` of the
    `requests` had no usage told by their worker: their tokens are estimates.
    """

    tenant: str
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated_requests: int


class NodeBook(msgspec.Struct, frozen=True, array_like=True):
    """The book of one node: its name, since when it counts (seconds since 1970), and its rows."""

    node: str
    since_s: float
    rows: tuple[Row, ...]


class Entry:
    """The line of one tenant and model. The request path raises its numbers in place."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "estimated_requests",
        "is_labelled",
        "model",
        "prompt_tokens",
        "requests",
        "tenant",
    )

    def __init__(self, tenant: str, model: str, is_labelled: bool) -> None:
        self.tenant = tenant
        self.model = model
        self.is_labelled = is_labelled
        self.requests = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.estimated_requests = 0

    def row(self) -> Row:
        """The numbers as they are now."""
        return Row(
            self.tenant,
            self.model,
            self.requests,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.estimated_requests,
        )


class Names:
    """Which tenants are named and which are `other`, so that clients cannot make names without end; sticky."""

    __slots__ = ("_guests", "_guests_max", "_keyed", "_most")

    def __init__(self, most: int = LABELLED_MAX, guests_max: int = LABELLED_GUESTS_MAX) -> None:
        self._most = most
        self._guests_max = guests_max
        self._keyed: set[str] = set()
        self._guests: set[str] = set()

    def of(self, tenant: str) -> str:
        """The tenant's name, or `other`."""
        names, most = (
            (self._keyed, self._most) if tenant.startswith(KEYED) else (self._guests, self._guests_max)
        )
        if tenant in names:
            return tenant
        if len(names) >= most:
            return OTHER
        names.add(tenant)
        return tenant


class Book:
    """The book of one node."""

    def __init__(self, entries_max: int = ENTRIES_MAX, guests_max: int = GUESTS_MAX) -> None:
        self._entries_max = entries_max
        self._guests_max = guests_max
        self._entries: dict[tuple[str, str], Entry] = {}
        self._guest_count = 0
        self._labelled_count = 0
        self._labelled_guest_count = 0

    def entry(self, tenant: str, model: str) -> Entry:
        """The line of a tenant and model; that of `other` when there is no room for one more. Keep it if it is the tenant's."""
        entry = self._entries.get((tenant, model))
        if entry is not None:
            return entry
        is_guest = not tenant.startswith(KEYED) and tenant != OTHER
        if len(self._entries) >= self._entries_max or (is_guest and self._guest_count >= self._guests_max):
            if tenant != OTHER:
                return self.entry(OTHER, model)
            model = OTHER  # more models than lines: one line for all that is left
            entry = self._entries.get((OTHER, OTHER))
            if entry is not None:
                return entry
        entry = self._entries[tenant, model] = Entry(tenant, model, self._may_label(is_guest))
        self._guest_count += is_guest
        return entry

    def rows(self, tenant: str | None = None, model: str | None = None) -> tuple[Row, ...]:
        """The book, or the lines of a tenant, a model, or both; in the order of their names."""
        found = [
            entry.row()
            for entry in self._entries.values()
            if (tenant is None or entry.tenant == tenant) and (model is None or entry.model == model)
        ]
        return tuple(sorted(found, key=lambda row: (row.tenant, row.model)))

    @property
    def count(self) -> int:
        """How many lines there are; they are never taken out."""
        return len(self._entries)

    def page(self, first: int, most: int) -> tuple[Row, ...]:
        """Lines in the order in which they were begun, from `first` on; at most `most`."""
        return tuple(entry.row() for entry in islice(self._entries.values(), first, first + most))

    def samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        """What is scraped (MET-9): name, label values, value. Equal ones add up."""
        for entry in self._entries.values():
            tenant = entry.tenant if entry.is_labelled else OTHER
            model = entry.model
            yield "smg_tenant_requests_total", (tenant, model), entry.requests
            yield "smg_tenant_tokens_total", (tenant, model, "prompt"), entry.prompt_tokens
            yield "smg_tenant_tokens_total", (tenant, model, "cached"), entry.cached_tokens
            yield "smg_tenant_tokens_total", (tenant, model, "completion"), entry.completion_tokens

    def _may_label(self, is_guest: bool) -> bool:
        if self._labelled_count >= LABELLED_MAX or (
            is_guest and self._labelled_guest_count >= LABELLED_GUESTS_MAX
        ):
            return False
        self._labelled_count += 1
        self._labelled_guest_count += is_guest
        return True


def summed(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of several books as one: those of the same tenant and model are added up; in the order of their names."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        numbers = sums.setdefault((row.tenant, row.model), [0, 0, 0, 0, 0])
        for place, number in enumerate(
            (
                row.requests,
                row.prompt_tokens,
                row.cached_tokens,
                row.completion_tokens,
                row.estimated_requests,
            )
        ):
            numbers[place] += number
    return tuple(Row(tenant, model, *numbers) for (tenant, model), numbers in sorted(sums.items()))
