"""From a prompt to chained block hashes: what the prefix index, the mesh and the traces speak of.

A prompt is cut into blocks, and each block's hash is seeded with the hash of the block before it
(xxh64), so one number stands for a whole prefix. The first seed is made of the cluster's seed, the
model and the cache salt: two models, or two salts, can never meet. This room owns that rule and
nothing else; it keeps no prompt. The hash is fast (64 blocks of 512 bytes in about 7 us), it is not
cryptographic: a secret cluster seed is what keeps strangers from naming blocks. Why not xxh3: decision 0011.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

import msgspec
import xxhash

ROOT = 0
"""The parent of a prompt's first block."""
PROMPT_BLOCKS_MAX = 8_192
"""Blocks of one prompt that are looked at (4 MiB of text at 512); what follows them does not count."""
SEEDS_MAX = 4_096
"""(model, salt) pairs whose seed is remembered; others are hashed again."""

digest = xxhash.xxh64_intdigest
"""The hash of one block, seeded with the block before it: (bytes, 64 bits) to 64 bits."""

_TOKENS = 0x746F6B656E
"""Sets chains of token ids apart from chains of text."""


class BlockSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts are cut. Equal on all nodes of a mesh, else their hashes do not meet."""

    block_bytes: int = 512
    """Text bytes (UTF-8) per block: at most about 20 ms of prefill is misjudged (docs/routing.md)."""
    block_tokens: int = 128
    """Token ids per block, for prompts that arrive as token ids."""
    cluster_seed: int = 0
    """A secret of the cluster, 64 bits."""


def block_settings(engine_block_tokens: int, cluster_seed: int) -> BlockSettings:
    """Blocks that end where those of the engines do, so that an engine's events and matches can be told exactly."""
    size = -(-BlockSettings().block_tokens // engine_block_tokens) * engine_block_tokens
    return BlockSettings(block_bytes=4 * size, block_tokens=size, cluster_seed=cluster_seed)


class BlockHasher:
    """Cuts and hashes prompts. Its only state is a bounded memory of seeds."""

    __slots__ = ("_seeds", "settings")

    def __init__(self, settings: BlockSettings | None = None) -> None:
        self.settings = settings if settings is not None else BlockSettings()
        self._seeds: dict[tuple[str, str], int] = {}

    def seed(self, model: str, salt: str = "") -> int:
        """Where the chains of a model and cache salt start."""
        key = (model, salt)
        seed = self._seeds.get(key)
        if seed is None:
            if len(self._seeds) >= SEEDS_MAX:
                self._seeds.clear()
            name = model.encode("utf-8", "surrogatepass")
            pair = b"%d:%b%b" % (len(name), name, salt.encode("utf-8", "surrogatepass"))
            seed = self._seeds[key] = xxhash.xxh3_64_intdigest(pair, self.settings.cluster_seed)
        return seed

    def text_blocks(self, text: str | bytes, seed: int) -> list[int]:
        """The chained hashes of a text's full blocks, at most `PROMPT_BLOCKS_MAX`.

        Blocks are cut at UTF-8 bytes, also inside a character: equal texts are cut equally, and that
        is all that matters. A last block that is not full does not count, for it will change.
        """
        return chain(text, self.settings.block_bytes, seed)

    def token_seed(self, seed: int) -> int:
        """Where chains of token ids start, given the seed of their model."""
        return seed ^ _TOKENS

    def token_blocks(self, token_ids: Sequence[int], seed: int) -> list[int]:
        """The chained hashes of full blocks of token ids; they never equal a text's.

        Empty when `token_ids` are not all 32-bit unsigned ints.
        """
        size = self.settings.block_tokens
        try:
            tokens = array("I", token_ids[: PROMPT_BLOCKS_MAX * size])
        except (OverflowError, TypeError):
            return []
        return chain(tokens.tobytes(), size * tokens.itemsize, self.token_seed(seed))


def chain(text: str | bytes, block_bytes: int, seed: int) -> list[int]:
    """The chained hashes of the full blocks of `text`, at most `PROMPT_BLOCKS_MAX`."""
    # surrogatepass: JSON may hold lone surrogates, which no prompt loses its cache for.
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    link = seed
    count = min(len(data) // block_bytes, PROMPT_BLOCKS_MAX)
    return [link := digest(block, link) for block in _cutter(count, block_bytes).unpack_from(data)]


@lru_cache(maxsize=256)  # of up to 8,192 counts; the frequent ones stay
def _cutter(count: int, block_bytes: int) -> Struct:
    """Cuts the first `count` blocks off: all slices in one call."""
    return Struct(f"{block_bytes}s" * count)
