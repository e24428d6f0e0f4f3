"""What engines say of their own KV caches: the event messages of vLLM, SGLang and TensorRT-LLM, decoded.

This room owns the wire form of those messages and the order in which they must come. A message has three
parts: a topic, a sequence number (eight bytes, big-endian) and a batch in msgpack. Engines write batches
as arrays, `[ts, events, dp_rank]` with events like `["BlockStored", hashes, parent, tokens, size, ...]`
(SGLang, TensorRT-LLM, vLLM until 2025), or as maps with a `type` member (vLLM since). Both are read here,
with any number of later fields. It keeps no blocks (`engine_blocks` does), opens no socket and reads no clock.

A message may come from anywhere in the network, so nothing in it is believed before it was looked at:
what is not understood raises `KvEventError`, and the caller must then treat it as lost, because it may have
told of blocks that are gone.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

EVENTS_MAX = 65_536
"""Events of one batch: one step of an engine stores or evicts some thousand blocks at most."""
REQUEST_BYTES = 8
"""A replay is asked for with the first sequence number that is wanted, big-endian."""
END_OF_REPLAY = b"\xff" * 8
"""The sequence number that ends a replay (-1)."""

BlockHash = int | bytes
"""How an engine names a block: an integer, or a digest. Unique within that engine as far as the engine knows."""


class KvEventError(ValueError):
    """A message is none of the known ones. Nothing was changed; it counts as lost."""


class Stored(msgspec.Struct, frozen=True):
    """The engine holds these blocks now: `tokens` cut into blocks of `block_tokens`, behind `parent` (None: a prompt's start)."""

    hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    tokens: tuple[int, ...]
    block_tokens: int
    adapter: str | None = None
    """The LoRA adapter whose cache it is, by name (or by number where that is all the engine tells)."""
    is_plain: bool = True
    """False where more than tokens decides about reuse: images, a cache salt. Such blocks cannot be matched."""
    is_resident: bool = True
    """False for blocks in another memory than the accelerator's, or of a second kind of attention."""


class Removed(msgspec.Struct, frozen=True):
    """The engine has evicted these blocks."""

    hashes: tuple[BlockHash, ...]
    is_resident: bool = True


class Cleared(msgspec.Struct, frozen=True):
    """The engine has emptied its cache."""


Event = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True):
    """One message's events, in their order."""

    at_s: float
    """The engine's wall clock."""
    events: tuple[Event, ...]
    rank: int | None = None
    """The data-parallel rank that speaks, where the engine tells."""


_STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
)
_REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")
_RESIDENT = (None, "GPU", "gpu", "DEVICE", "device")


def decode(payload: bytes) -> Batch:
    """The batch of a message's last part. Raises `KvEventError`."""
    try:
        told = msgspec.msgpack.decode(payload)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as wrong:
        raise KvEventError(f"no msgpack: {wrong}") from None
    if type(told) is dict:
        at_s, rows, rank = told.get("ts"), told.get("events"), told.get("data_parallel_rank")
    elif type(told) is list and len(told) >= 2:
        at_s, rows, rank = told[0], told[1], told[2] if len(told) > 2 else None
    else:
        raise KvEventError("neither a map nor an array of time and events")
    if not isinstance(at_s, (float, int)) or type(rows) is not list or len(rows) > EVENTS_MAX:
        raise KvEventError("no time, or no list of events")
    events = tuple(event for event in map(_event, rows) if event is not None)
    return Batch(float(at_s), events, rank if type(rank) is int else None)


def _event(row: Any) -> Event | None:
    """One event; None for a kind that is not known, which engines may add."""
    if type(row) is dict:
        kind, fields = row.get("type"), row
    elif type(row) is list and row:
        kind = row[0]
        names = _STORED_FIELDS if kind == "BlockStored" else _REMOVED_FIELDS
        fields = dict(zip(names, row[1:], strict=False))
    else:
        raise KvEventError("an event is neither a map nor an array")
    if kind == "BlockStored":
        return _stored(fields)
    if kind == "BlockRemoved":
        return Removed(_hashes(fields.get("block_hashes")), _is_resident(fields))
    if kind == "AllBlocksCleared":
        return Cleared()
    if type(kind) is not str:
        raise KvEventError("an event without a name")
    return None


def _stored(fields: dict[str, Any]) -> Stored:
    hashes = _hashes(fields.get("block_hashes"))
    parent, tokens, size = fields.get("parent_block_hash"), fields.get("token_ids"), fields.get("block_size")
    if parent is not None and type(parent) not in (int, bytes):
        raise KvEventError("a parent that is no hash")
    if type(size) is not int or size < 1 or type(tokens) is not list:
        raise KvEventError("no tokens, or no block size")
    # Some engines hash pairs of tokens (speculative decoding): those are no prompts that anybody sends.
    is_plain = len(tokens) == len(hashes) * size and all(type(token) is int for token in tokens)
    extra = fields.get("extra_keys")
    adapter = fields.get("lora_name")
    if adapter is None:
        adapter = fields.get("lora_id")
    if type(extra) is list and any(key is not None for key in extra):
        # vLLM repeats the adapter's name among the extra keys of a block; alone it says nothing new.
        named = {(adapter,), None} if type(adapter) is str else {None}
        is_plain = is_plain and all(_key(key) in named for key in extra)
    return Stored(
        hashes,
        parent,
        tuple(tokens) if is_plain else (),
        size,
        None if adapter is None else str(adapter),
        is_plain,
        _is_resident(fields),
    )


def _key(key: Any) -> Any:
    if type(key) is not list:
        return key if key is None else object()
    return tuple(key) if all(type(part) in (str, int, bytes) for part in key) else object()


def _hashes(told: Any) -> tuple[BlockHash, ...]:
    if type(told) is not list or not all(type(block) in (int, bytes) for block in told):
        raise KvEventError("no list of block hashes")
    return tuple(told)


def _is_resident(fields: dict[str, Any]) -> bool:
    medium, group = fields.get("medium"), fields.get("group_idx")
    return (type(medium) in (str, type(None)) and medium in _RESIDENT) and group in (None, 0)


class Verdict(enum.Enum):
    """What a sequence number says about the messages before it."""

    NEXT = enum.auto()  # nothing is missing
    REPEATED = enum.auto()  # known already: pass over
    GAP = enum.auto()  # messages are missing
    RESTART = enum.auto()  # the engine counts anew: it is another process with an empty cache


class Sequence:
    """The order of one publisher's messages.

    A publisher's socket neither repeats nor reorders, so a number that is not above the last one heard is
    either what a replay brought before (`replayed_to`), the very same message, or a new process. A gap is
    told, not repaired: the caller asks for a replay, `take`s what it brings, or gives up with `skip_to`.
    """

    __slots__ = ("_last", "_live", "_payload")

    def __init__(self) -> None:
        self._last: int | None = None  # the last message that was applied, replayed or live
        self._live: int | None = None  # the last number heard on the live socket
        self._payload = b""

    @property
    def expected(self) -> int:
        """The number of the next message; 0 before any."""
        return 0 if self._last is None else self._last + 1

    @property
    def has_begun(self) -> bool:
        """Whether any message was applied."""
        return self._last is not None

    def judge(self, number: int, payload: bytes) -> Verdict:
        """A live message came. Only `NEXT` and `RESTART` advance; after `GAP` it must be judged again."""
        if self._live is not None and number <= self._live:
            if number == self._live and payload == self._payload:
                return Verdict.REPEATED
            self._last, self._live, self._payload = None, None, b""
            return Verdict.RESTART
        if self._last is not None and number <= self._last:  # a replay was faster
            self._live, self._payload = number, payload
            return Verdict.REPEATED
        if number != self.expected:
            return Verdict.GAP
        self._last = self._live = number
        self._payload = payload
        return Verdict.NEXT

    def replayed(self, number: int) -> bool:
        """A message of a replay came; whether it is the next one and was taken."""
        if number != self.expected:
            return False
        self._last = number
        return True

    def skip_to(self, number: int) -> None:
        """What is missing before `number` will not come: that one is the next."""
        self._last = number - 1 if number > 0 else None


def number_of(part: bytes) -> int:
    """The sequence number in a message's second part. Raises `KvEventError`."""
    if len(part) != REQUEST_BYTES:
        raise KvEventError("a sequence number has eight bytes")
    return int.from_bytes(part, "big")


def replay_request(first: int) -> bytes:
    """What asks for all messages from `first` on."""
    return first.to_bytes(REQUEST_BYTES, "big")


def split(event: Event, blocks_max: int) -> list[Event]:
    """The event in parts of at most so many blocks, so that nobody has to wait while a long prompt is taken in."""
    if isinstance(event, Cleared) or len(event.hashes) <= blocks_max:
        return [event]
    parts: list[Event] = []
    for start in range(0, len(event.hashes), blocks_max):
        hashes = event.hashes[start : start + blocks_max]
        if isinstance(event, Removed):
            parts.append(Removed(hashes, event.is_resident))
            continue
        size = event.block_tokens
        tokens = event.tokens[start * size : (start + blocks_max) * size]
        parent = event.hashes[start - 1] if start else event.parent
        parts.append(msgspec.structs.replace(event, hashes=hashes, parent=parent, tokens=tokens))
    return parts
