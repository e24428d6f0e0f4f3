"""What nodes say to each other, as bytes: one layout per kind of knowledge, MessagePack arrays, the version first.

Owns the layouts and the tolerance of their readers: an array may have grown at its tail (a newer node says more), an unknown
version or kind is no word of ours and gives None, and nothing that a peer sends raises. It must never act on what it reads,
and it has no place for the text of a prompt: prompts are hashes here.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import xxhash

from smg.fleet.worker import WorkerSpec
from smg.tenancy.usage import Row

VERSION = 1
REF_BYTES = 8
"""Of a worker's id: 60 random bits set 16,384 workers apart."""
HASH_BYTES = 8
TRUNK_BYTES = 10
"""A trunk block and how many children it has."""
BLOCKS_PER_WORD_MAX = 8_000
"""Blocks in one word: below the mesh's cap of a value. A longer placement is told in parts."""
CHILDREN_MAX = 0xFFFF
TEXT_MAX = 512

U64 = Annotated[int, msgspec.Meta(ge=0)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Ref = Annotated[bytes, msgspec.Meta(min_length=REF_BYTES, max_length=REF_BYTES)]
Name = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]

FLAG, DISCOVERY, API, ADOPTED = 1, 2, 3, 0
"""By whom a worker was listed; the higher one's word on its specification counts."""

REFUSES, FAILS, BREAKS = 1, 2, 3
"""What is bad about a worker: it is not ready, it failed for long, its breaker is open."""

DELETED, EDITED = 1, 2
"""What an order of the worker API says."""


class Word(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The shared beginning: the version of the layout."""

    version: int


class Parameters(Word, frozen=True, gc=False):
    """How a node cuts and hashes prompts; hashes of nodes that differ do not meet. Travels in the member record."""

    block_bytes: U32
    block_tokens: U32
    seed_check: U64
    """A digest of the cluster seed: equal seeds, equal digests."""
    release: Name = ""


class Listing(Word, frozen=True, gc=False):
    """A worker that a node lists."""

    origin: int
    listed_s: float
    """Wall time of the listing or of its last change."""
    spec: WorkerSpec
    adopted_from: Name = ""


class Order(Word, frozen=True, gc=False):
    """What somebody asked of a worker through the API of any node: it is gone, or it has another specification."""

    kind: int
    url: Annotated[str, msgspec.Meta(max_length=4096)]
    at_s: float
    """Wall time."""
    by: Name
    spec: WorkerSpec | None = None


class Observation(Word, frozen=True, gc=False):
    """What is bad about a worker as one node sees it."""

    kind: int


class Burden(Word, frozen=True, gc=False):
    """Requests that one node has in flight: (worker, requests, milliseconds of prefill not begun or not done)."""

    rows: tuple[tuple[Ref, U32, U32], ...]


class EngineLoad(Word, frozen=True, gc=False):
    """An engine's own report, passed on by the node that asked it."""

    age_ms: U32
    running: U32
    waiting: U32
    waiting_tokens: U64 | None
    running_tokens: U64 | None
    kv_usage: float | None
    kv_capacity_tokens: U64 | None
    throughput_tps: float | None
    cache_hit_rate: float | None
    count: U32 = 0
    """Sets equal reports apart: the mesh tells only what changed."""


Gift = tuple[Ref, U64, U64, U64, U64, U64]
"""(peer, its book, given, accepted, tokens given, tokens accepted), see `tenancy.share_book.Gift`."""


class Share(Word, frozen=True, gc=False):
    """What a node holds of a limit, and what is asked of it; see `tenancy.share_book.Told`."""

    teller: Ref
    epoch: U64
    demand: U64
    held: U64
    refill_s: float
    view: U32
    gifts: tuple[Gift, ...]


class StickyKey(Word, frozen=True, gc=False):
    """Where a routing key lives, and when it was last used (wall seconds)."""

    ref: Ref
    used_s: float


class Placed(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=0):
    """`hashes` follow `parent` on a worker, sent there `age_ms` before this was said."""

    ref: Ref
    model: U32
    parent: U64
    prefill_ms: float
    age_ms: U32
    hashes: bytes
    asker: U32 = 0
    """`model_ref` of the node for which the teller decided as owner: it has booked the request itself."""


class Flushed(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """A worker's cache is empty."""

    ref: Ref


class Trunk(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """Blocks that many prompts continue, each with its number of children."""

    rows: bytes


class Run(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """Part of a snapshot: blocks that a worker holds, as chains: (parent, hashes)."""

    ref: Ref
    runs: tuple[tuple[U64, bytes], ...]


class Basis(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=4):
    """The beginning of a snapshot: what had been announced up to `sequence`: (worker, blocks, their xor)."""

    sequence: U64
    rows: tuple[tuple[Ref, U64, U64], ...]


class Gone(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=5):
    """The teller will announce nothing more of a worker: it left the teller's fleet. Says nothing of its cache."""

    ref: Ref


Item = Placed | Flushed | Trunk | Run | Basis | Gone


class Batch(Word, frozen=True, gc=False):
    """Several items of one node, in order."""

    items: tuple[msgspec.Raw, ...]


class Asked(Word, frozen=True, gc=False):
    """A question to the owner of a session. `books`: it is meant, not only explained."""

    kind: int
    books: bool
    model: Name
    tokens: U64
    block_tokens: float
    key: U64 | None
    chars: U64
    hashes: bytes


class Told(Word, frozen=True, gc=False):
    """The owner's answer; no worker: it knows none."""

    worker_id: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    prefill_s: float = 0.0
    matched_blocks: U32 = 0


class AskedChains(Word, frozen=True, gc=False):
    """A question for chains whose beginning was lost here: (worker, last known block) each."""

    kind: int
    rows: tuple[tuple[Ref, U64], ...]


class AskedPage(Word, frozen=True, gc=False):
    """A question of a node that has just begun: a page of the chains that a worker holds, the newest first."""

    kind: int
    ref: Ref
    page: U32


class AskedUsage(Word, frozen=True, gc=False):
    """A question for a page of a node's book of usage, from line `first` on; only these lines, where one is named."""

    kind: int
    first: U32
    tenant: str | None = None
    model: str | None = None


class UsagePage(Word, frozen=True):
    """Its answer: since when that node counts (seconds since 1970), lines, the line that follows, and whether none does."""

    since_s: float
    rows: tuple[Row, ...]
    next: U32
    is_last: bool


PLACEMENT, CHAINS, PAGE, USAGE = 1, 2, 3, 4
"""Kinds of questions."""
_PLACEMENT_HEAD = bytes((0x90 + len(Asked.__struct_fields__), VERSION, PLACEMENT))
"""How a question for a placement begins in MessagePack, as long as both nodes know the same fields."""

W = TypeVar("W", bound=Word)
_pack = msgspec.msgpack.Encoder().encode
_items = msgspec.msgpack.Decoder(Item)
_batch = msgspec.msgpack.Decoder(Batch)
_kind = msgspec.msgpack.Decoder(tuple[Any, ...])


class Reader(Generic[W]):
    """Reads one kind of word; its decoder is made once."""

    __slots__ = ("_decode", "_floats")

    def __init__(self, kind: type[W]) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._floats = tuple(
            field.name for field in msgspec.structs.fields(kind) if field.type in (float, float | None)
        )

    def __call__(self, data: bytes) -> W | None:
        """The word, or None when it is none of this kind or of another version."""
        try:
            word = self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
            return None
        if word.version != VERSION:
            return None
        for name in self._floats:  # NaN and infinity are numbers in MessagePack, and poison in arithmetic
            value = getattr(word, name)
            if value is not None and not math.isfinite(value):
                return None
        return word


def encode(word: msgspec.Struct) -> bytes:
    """The bytes of any word."""
    return _pack(word)


_parameters = Reader(Parameters)
_listing = Reader(Listing)
_order = Reader(Order)
_observation = Reader(Observation)
_burden = Reader(Burden)
_engine_load = Reader(EngineLoad)
_share = Reader(Share)
_sticky_key = Reader(StickyKey)
_asked = Reader(Asked)
_told = Reader(Told)
_asked_chains = Reader(AskedChains)
_asked_page = Reader(AskedPage)
_asked_usage = Reader(AskedUsage)
_usage_page = Reader(UsagePage)


def read_parameters(data: bytes) -> Parameters | None:
    """A peer's parameters."""
    return _parameters(data)


def read_listing(data: bytes) -> Listing | None:
    """A peer's listing; its specification is not checked yet."""
    return _listing(data)


def read_order(data: bytes) -> Order | None:
    """An order of the worker API; an edit has a specification."""
    order = _order(data)
    if order is None or order.kind not in (DELETED, EDITED) or (order.kind == EDITED and order.spec is None):
        return None
    return order


def read_observation(data: bytes) -> Observation | None:
    """A peer's bad news of a worker."""
    return _observation(data)


def read_burden(data: bytes) -> Burden | None:
    """A peer's requests in flight."""
    return _burden(data)


def read_engine_load(data: bytes) -> EngineLoad | None:
    """An engine's report."""
    return _engine_load(data)


def read_share(data: bytes) -> Share | None:
    """A peer's part of a limit."""
    share = _share(data)
    return share if share is not None and share.refill_s > 0.0 else None


def read_sticky_key(data: bytes) -> StickyKey | None:
    """Where a key lives."""
    return _sticky_key(data)


def read_told(data: bytes) -> Told | None:
    """An owner's answer."""
    return _told(data)


def read_question(data: bytes) -> Asked | AskedChains | AskedPage | AskedUsage | None:
    """A peer's question of a known kind."""
    if data[:3] == _PLACEMENT_HEAD:
        return _asked(data)  # most of them, and a request waits: it is not read twice
    try:
        parts = _kind.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    kind = parts[1] if len(parts) > 1 else None
    if kind == PLACEMENT:
        return _asked(data)
    if kind == PAGE:
        return _asked_page(data)
    if kind == USAGE:
        return _asked_usage(data)
    return _asked_chains(data) if kind == CHAINS else None


def read_usage_page(data: bytes) -> UsagePage | None:
    """A page of a peer's book."""
    return _usage_page(data)


def batch(items: Iterable[msgspec.Struct]) -> bytes:
    """The bytes of several items."""
    return _pack(Batch(VERSION, tuple(msgspec.Raw(_pack(item)) for item in items)))


def read_batch(data: bytes) -> tuple[list[Item], int]:
    """The items that we understand, and how many we do not; what is no batch at all counts as one."""
    try:
        found = _batch.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [], 1
    if found.version != VERSION:
        return [], 1
    items: list[Item] = []
    unknown = 0
    for raw in found.items:
        try:
            item = _items.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            unknown += 1
            continue
        if type(item) is Placed and not (0.0 <= item.prefill_ms < math.inf):
            unknown += 1
            continue
        items.append(item)
    return items, unknown


def pack_hashes(hashes: Sequence[int]) -> bytes:
    """Block hashes, 8 bytes each, little-endian."""
    numbers = array("Q", hashes)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def unpack_hashes(data: bytes) -> tuple[int, ...]:
    """What `pack_hashes` packed; bytes that are no whole hash are left out."""
    numbers = array("Q")
    numbers.frombytes(data[: len(data) - len(data) % HASH_BYTES])
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


_trunk_row = struct.Struct("<QH")
assert _trunk_row.size == TRUNK_BYTES


def pack_trunk(rows: Iterable[tuple[int, int]]) -> bytes:
    """(block, children) pairs."""
    return b"".join(_trunk_row.pack(block, min(children, CHILDREN_MAX)) for block, children in rows)


def unpack_trunk(data: bytes) -> list[tuple[int, int]]:
    """What `pack_trunk` packed."""
    return list(_trunk_row.iter_unpack(data[: len(data) - len(data) % TRUNK_BYTES]))


def worker_ref(worker_id: str) -> bytes:
    """The beginning of a worker's id, by which nodes name it to each other."""
    return bytes.fromhex(worker_id.replace("-", "")[: 2 * REF_BYTES])


def worker_key(worker_id: str) -> bytes:
    """A worker's whole id in 16 bytes."""
    return bytes.fromhex(worker_id.replace("-", ""))


def id_of_key(key: bytes) -> str:
    """The id in `worker_key`, empty when it is none."""
    text = key.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) if len(key) == 16 else ""


def model_ref(model: str) -> int:
    """A model's name in 32 bits; peers know it by the names they serve themselves."""
    return xxhash.xxh32_intdigest(model.encode("utf-8", "surrogatepass"))


def seed_check(seed: int) -> int:
    """A digest by which nodes compare cluster seeds without telling them."""
    return xxhash.xxh3_64_intdigest(seed.to_bytes(8, "big"), 0x736D67)
