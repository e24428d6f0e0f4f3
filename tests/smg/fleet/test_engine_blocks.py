"""An engine's blocks become claims: exact for token prompts, and never a claim for what is not there."""

from __future__ import annotations

from random import Random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.fleet import engine_blocks
from smg.fleet.block_hashes import BlockHasher, BlockSettings, block_settings
from smg.fleet.engine_blocks import EngineBlocks
from smg.fleet.kv_events import Cleared, Removed, Stored
from smg.fleet.prefix_index import PrefixIndex

SETTINGS = BlockSettings(block_tokens=8, cluster_seed=7)


class Engine:
    """An engine that chains its hashes, tells what it stores and evicts leaves first, oldest first."""

    def __init__(self, size: int, is_chained: bool = True) -> None:
        self.size = size
        self.is_chained = is_chained
        self.held: dict[int, tuple[int, ...]] = {}  # name -> all tokens up to its end

    def names(self, tokens: list[int]) -> list[int]:
        names, parent = [], 0
        for end in range(self.size, len(tokens) + 1, self.size):
            block = tokens[end - self.size : end]
            parent = xxhash.xxh3_64_intdigest(repr(block).encode(), parent if self.is_chained else 0)
            names.append(parent)
        return names

    def store(self, tokens: list[int]) -> list[Stored]:
        names = self.names(tokens)
        known = 0
        while known < len(names) and names[known] in self.held:
            known += 1
        fresh = names[known:]
        for number, name in enumerate(fresh, start=known):
            self.held[name] = tuple(tokens[: (number + 1) * self.size])
        if not fresh:
            return []
        parent = names[known - 1] if known else None
        end = len(names) * self.size
        return [Stored(tuple(fresh), parent, tuple(tokens[known * self.size : end]), self.size)]

    def evict(self, rng: Random, count: int) -> list[Removed]:
        gone = []
        for _ in range(min(count, len(self.held))):
            chains = set(self.held.values())
            leaves = [
                name
                for name, chain in self.held.items()
                if not any(len(other) > len(chain) and other[: len(chain)] == chain for other in chains)
            ]
            name = rng.choice(leaves)
            del self.held[name]
            gone.append(name)
        return [Removed(tuple(gone))] if gone else []

    def depth(self, tokens: list[int], block_tokens: int) -> int:
        """Whole blocks of ours that the engine holds of a prompt."""
        chains = set(self.held.values())
        held = 0
        while tuple(tokens[: held + self.size]) in chains and held + self.size <= len(tokens):
            held += self.size
        return held // block_tokens


class Site:
    def __init__(self, model: str | None = "m") -> None:
        self.index = PrefixIndex()
        self.hasher = BlockHasher(SETTINGS)
        self.blocks = EngineBlocks("w", self.index, self.hasher)
        self.model = model

    def tell(self, *events) -> None:
        for event in events:
            self.blocks.apply(event, lambda adapter: self.model if adapter is None else None)
        self.blocks.settle()

    def depth(self, tokens: list[int]) -> int:
        hashes = self.hasher.token_blocks(tokens, self.hasher.seed("m"))
        return self.index.match(hashes).depth_of(self.index.bits_of("w"))


def prompt(seed: int, count: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(50_000) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 12, 16, 20])
def test_a_stored_prompt_is_claimed_as_deep_as_the_engine_holds_it(size):
    site, engine, tokens = Site(), Engine(size), prompt(1, 100)
    site.tell(*engine.store(tokens))
    assert site.depth(tokens) == len(tokens) // size * size // 8
    assert site.depth(prompt(2, 100)) == 0


def test_a_prompt_told_in_pieces_is_claimed_like_one_told_at_once():
    site, engine, tokens = Site(), Engine(3), prompt(1, 96)
    for end in range(1, 97, 5):
        site.tell(*engine.store(tokens[:end]))
    assert site.depth(tokens) == 12


def test_prompts_that_part_inside_one_of_our_blocks_are_both_claimed():
    site, engine = Site(), Engine(2)
    first = prompt(1, 32)
    second = first[:12] + prompt(2, 20)
    site.tell(*engine.store(first), *engine.store(second))
    assert site.depth(first) == site.depth(second) == 4


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5, 6, 7])
def test_a_block_is_given_up_when_any_part_of_it_is_evicted(position):
    site, engine, tokens = Site(), Engine(2), prompt(1, 16)
    site.tell(*engine.store(tokens))
    assert site.depth(tokens) == 2
    site.tell(Removed(tuple(engine.names(tokens)[position:])))
    assert site.depth(tokens) == position // 4
    assert site.blocks.is_trusted


def test_an_engine_that_evicts_inside_a_prefix_is_not_believed():
    site, engine, tokens = Site(), Engine(2), prompt(1, 16)
    site.tell(*engine.store(tokens))
    site.tell(Removed((engine.names(tokens)[2],)))
    assert not site.blocks.is_trusted
    assert site.depth(tokens) == 0


def test_the_order_within_one_message_does_not_matter():
    site, engine, tokens = Site(), Engine(2), prompt(1, 32)
    site.tell(*engine.store(tokens))
    names = engine.names(tokens)
    site.tell(Removed((names[9], names[8])), Removed((*names[10:],)))
    assert site.blocks.is_trusted
    assert site.depth(tokens) == 2


def test_a_block_stored_again_can_still_be_given_up():
    site, engine, tokens = Site(), Engine(2), prompt(1, 16)
    stored = engine.store(tokens)
    site.tell(*stored, *stored)
    site.tell(Removed(tuple(engine.names(tokens)[5:])))
    assert site.depth(tokens) == 1


def test_blocks_behind_an_unknown_parent_are_not_claimed():
    site, engine, tokens = Site(), Engine(2), prompt(1, 32)
    engine.store(tokens[:8])  # nobody heard of it
    site.tell(*engine.store(tokens))
    assert site.depth(tokens) == 0
    assert site.blocks.held_tokens == 24


def test_a_gap_takes_claims_and_leaves_guesses():
    site, engine, tokens = Site(), Engine(2), prompt(1, 32)
    hashes = site.hasher.token_blocks(tokens[:16], site.hasher.seed("m"))
    site.index.place("w", hashes)
    site.tell(*engine.store(tokens))
    assert site.depth(tokens) == 4
    site.blocks.lost()
    assert site.depth(tokens) == 2
    assert not site.blocks.is_whole


def test_a_flush_takes_claims_and_guesses():
    site, engine, tokens = Site(), Engine(2), prompt(1, 32)
    site.index.place("w", site.hasher.token_blocks(tokens, site.hasher.seed("m")))
    site.tell(*engine.store(tokens), Cleared())
    assert site.depth(tokens) == 0
    assert site.blocks.is_whole and site.blocks.held_tokens == 0
    engine.held.clear()
    site.tell(*engine.store(tokens))
    assert site.depth(tokens) == 4


def test_an_engine_that_gives_one_name_to_two_prefixes_is_not_believed():
    site, engine = Site(), Engine(4, is_chained=False)
    shared = prompt(9, 4)
    first, second = prompt(1, 8) + shared + prompt(3, 4), prompt(2, 8) + shared + prompt(4, 4)
    site.tell(*engine.store(first))
    assert site.depth(first) == 2
    names = engine.names(second)
    site.tell(Stored(tuple(names), None, tuple(second), 4))
    assert not site.blocks.is_trusted
    assert site.depth(first) == site.depth(second) == 0
    site.tell(Stored((123,), names[-1], tuple(prompt(5, 4)), 4))
    assert site.depth(second + prompt(5, 4)) == 0


def test_adapters_nobody_asks_for_and_salted_blocks_are_counted_and_not_claimed():
    site, tokens = Site(), prompt(1, 16)
    site.tell(Stored((1, 2), None, tuple(tokens), 8, adapter="other"))
    site.tell(Stored((3, 4), None, (), 8, is_plain=False))
    site.tell(Stored((5,), 4, tuple(tokens[:8]), 8))
    site.tell(Stored((6,), None, tuple(tokens[:8]), 8, is_resident=False))
    assert site.depth(tokens) == 0
    assert site.blocks.held_tokens == 5 * 8


def test_ids_beyond_32_bits_are_not_claimed():
    site = Site()
    site.tell(Stored((1,), None, (2**32, *range(7)), 8), Stored((2,), None, (-1, *range(7)), 8))
    assert site.blocks.held_tokens == 16
    assert site.index.blocks_of("w") == 0


def test_the_size_of_the_cache_is_what_is_held_when_eviction_begins():
    site, engine = Site(), Engine(2)
    site.tell(Cleared())
    site.tell(*engine.store(prompt(1, 40)), *engine.store(prompt(2, 20)))
    assert site.blocks.full_tokens is None
    site.tell(*engine.evict(Random(1), 3))
    assert site.blocks.full_tokens == 60
    assert site.blocks.held_tokens == 54


def test_without_a_known_start_the_size_is_not_told():
    site, engine = Site(), Engine(2)
    site.tell(*engine.store(prompt(1, 40)), *engine.evict(Random(1), 3))
    assert site.blocks.full_tokens is None


def test_beyond_the_bound_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(engine_blocks, "ENGINE_BLOCKS_MAX", 8)
    site, engine, tokens = Site(), Engine(2), prompt(1, 32)
    site.tell(Cleared(), *engine.store(tokens))
    assert site.depth(tokens) == 2
    assert site.blocks.held_tokens == 32 and len(site.blocks) == 8
    site.tell(Removed(tuple(reversed(engine.names(tokens)))))
    assert site.blocks.held_tokens == 0 and site.depth(tokens) == 0


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 8, 12]))
@settings(max_examples=60, deadline=None)
def test_claims_are_what_the_engine_holds_through_any_history(seed, size):
    rng = Random(seed)
    site, engine = Site(), Engine(size)
    known: list[list[int]] = [[]]
    for _ in range(25):
        if rng.random() < 0.6 or not engine.held:
            base = rng.choice(known)
            tokens = base[: rng.randrange(len(base) + 1)] + [
                rng.randrange(9) for _ in range(rng.randrange(40))
            ]
            known.append(tokens)
            site.tell(*engine.store(tokens))
        else:
            site.tell(*engine.evict(rng, rng.randrange(1, 12)))
        for tokens in known:
            held = engine.depth(tokens, 8)
            if 8 % size == 0:
                assert site.depth(tokens) == held
            else:  # an engine block is used as a whole or not: we may be off by less than one
                assert site.depth(tokens) * 8 < engine.depth(tokens, 1) + size + 8


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_nothing_is_claimed_that_was_lost_when_any_message_is_missing(seed):
    """The rule of the service: after a lost message, `lost` before the next one."""
    rng = Random(seed)
    site, engine = Site(), Engine(2)
    known: list[list[int]] = [[]]
    for _ in range(25):
        base = rng.choice(known)
        if rng.random() < 0.6 or not engine.held:
            tokens = base[: rng.randrange(len(base) + 1)] + [
                rng.randrange(9) for _ in range(rng.randrange(40))
            ]
            known.append(tokens)
            events = engine.store(tokens)
        else:
            events = engine.evict(rng, rng.randrange(1, 12))
        if rng.random() < 0.2:
            site.blocks.lost()
        else:
            site.tell(*events)
        for tokens in known:
            assert site.depth(tokens) <= engine.depth(tokens, 8)


@pytest.mark.parametrize("engine", [1, 8, 16, 24, 48, 128, 200, 256])
def test_blocks_of_the_index_end_where_those_of_the_engine_do(engine):
    found = block_settings(engine, 5)
    assert found.block_tokens % engine == 0 and found.block_tokens >= 128
    assert found.block_tokens < 128 + engine
    assert (found.block_bytes, found.cluster_seed) == (4 * found.block_tokens, 5)
