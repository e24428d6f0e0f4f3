"""The prefix index: it claims what it was told and nothing else, forgets leaves first, and stays small."""

from __future__ import annotations

import gc
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from smg.fleet.block_hashes import ROOT, BlockHasher
from smg.fleet.prefix_index import BRANCHES_MAX, ENTRY_BYTES, IndexSettings, Placement, PrefixIndex


def depth(index: PrefixIndex, worker: str, hashes) -> int:
    return index.match(hashes).depth_of(index.bits_of(worker))


def test_a_prompt_matches_where_it_was_placed_as_deep_as_it_is_shared():
    index = PrefixIndex()
    index.place("a", [1, 2, 3, 4])
    index.place("b", [1, 2, 30])
    assert depth(index, "a", [1, 2, 3, 5]) == 3
    assert depth(index, "b", [1, 2, 3, 5]) == 2
    assert depth(index, "c", [1, 2, 3, 5]) == 0
    assert depth(index, "a", [9]) == 0
    assert index.match([1, 2, 3, 5]).steps == (
        (3, index.bits_of("a")),
        (2, index.bits_of("a") | index.bits_of("b")),
    )


def test_owners_names_the_workers_of_a_mask():
    index = PrefixIndex()
    index.place("a", [1])
    index.place("b", [1])
    assert sorted(index.owners(index.match([1]).steps[0][1])) == ["a", "b"]


def test_the_oldest_leaves_go_first_at_the_capacity():
    index = PrefixIndex(IndexSettings(worker_blocks=6))
    index.place("a", [1, 2, 3])
    index.place("a", [1, 20, 30])
    index.place("a", [1, 2, 3])  # used again: younger than 20 and 30
    index.place("a", [100, 200])
    assert depth(index, "a", [1, 2, 3]) == 3
    assert depth(index, "a", [1, 20, 30]) == 2
    assert depth(index, "a", [100, 200]) == 2


def test_a_worker_that_left_owns_nothing_even_before_it_is_swept():
    index = PrefixIndex()
    index.place("a", list(range(1, 200)))
    index.place("b", [1, 2])
    index.forget("a")
    assert index.match(list(range(1, 200))).steps == ((2, index.bits_of("b")),)
    assert index.bits_of("a") == 0
    index.place("a", [7])  # it comes back while its old blocks still wait for the sweep
    assert depth(index, "a", list(range(1, 200))) == 0
    assert depth(index, "a", [7]) == 1
    while index.sweep(10):
        pass
    assert index.entries == 3
    assert depth(index, "b", [1, 2]) == 2


def test_a_bit_is_used_again_only_when_its_old_blocks_are_gone():
    index = PrefixIndex()
    index.place("old", list(range(1, 1000)))
    index.forget("old")
    index.place("new", [5000])
    assert depth(index, "new", list(range(1, 1000))) == 0
    index.sweep(10_000)
    index.place("newer", [6000])
    assert depth(index, "newer", list(range(1, 1000))) == 0
    assert index.bits_of("newer") == 1  # the mask does not grow for ever


def test_placements_tell_a_peer_all_it_needs():
    here, there = PrefixIndex(), PrefixIndex()
    rng = Random(5)
    prompts = []
    for _ in range(300):
        stem = rng.choice(prompts)[: rng.randrange(1, 9)] if prompts and rng.random() < 0.7 else []
        prompt = stem + [rng.getrandbits(60) for _ in range(rng.randrange(1, 6))]
        prompts.append(prompt)
        placement = here.place(rng.choice("abc"), prompt)
        assert there.apply(placement)
    for prompt in prompts:
        for worker in "abc":
            assert depth(here, worker, prompt) == depth(there, worker, prompt)
    for worker in "abc":  # the order of use is equal too: both evict the same blocks
        assert here.chains(worker, 10_000) == there.chains(worker, 10_000)


def test_only_new_blocks_travel():
    index = PrefixIndex()
    assert index.place("a", [1, 2]) == Placement("a", ROOT, (1, 2))
    assert index.place("a", [1, 2, 3]) == Placement("a", 2, (3,))
    assert index.place("a", [1, 2, 3]) == Placement("a", 3, ())
    assert index.place("b", [1, 2, 3]) == Placement("b", ROOT, (1, 2, 3))


def test_a_placement_behind_an_unknown_parent_changes_nothing():
    index = PrefixIndex()
    assert not index.apply(Placement("a", 55, (56, 57)))
    assert index.entries == 0
    assert index.match([55, 56, 57]).depth == 0


def test_chains_of_one_node_replayed_on_another_give_the_same_matches():
    here, there = PrefixIndex(), PrefixIndex()
    here.place("a", [1, 2, 3])
    here.place("a", [1, 2, 4, 5])
    for parent, block in here.chains("a", 100):
        assert there.apply(Placement("a", parent, (block,)))
    assert depth(there, "a", [1, 2, 3]) == 3
    assert depth(there, "a", [1, 2, 4, 5]) == 4


def test_engine_events_and_placements_merge_by_the_deeper_one():
    index = PrefixIndex()
    index.place("a", [1, 2])
    assert index.stored("a", ROOT, [1, 2, 3])
    assert depth(index, "a", [1, 2, 3]) == 3
    index.removed("a", [3])
    assert depth(index, "a", [1, 2, 3]) == 2
    index.removed("a", [2, 1])
    assert depth(index, "a", [1, 2, 3]) == 2  # still placed, perhaps still in the queue
    assert not index.stored("a", 77, [78])


def test_placements_fade_beside_events_and_stay_without_them():
    index = PrefixIndex()
    for worker in "ab":
        index.place(worker, [1, 2, 3])
    index.stored("a", ROOT, [1])
    for _ in range(2):
        index.age("a")
        index.age("b")
    assert depth(index, "a", [1, 2, 3]) == 1
    assert depth(index, "b", [1, 2, 3]) == 3


def test_one_ageing_keeps_what_was_placed_since_the_ageing_before():
    index = PrefixIndex()
    index.stored("a", ROOT, [1])
    index.place("a", [1, 2])
    index.age("a")
    index.place("a", [10, 20])
    assert depth(index, "a", [1, 2]) == 2
    index.age("a")
    assert depth(index, "a", [1, 2]) == 1
    assert depth(index, "a", [10, 20]) == 2


def test_a_cleared_cache_owns_nothing_and_goes_on_listening():
    index = PrefixIndex()
    index.set_capacity("a", 99)
    index.place("a", [1, 2])
    index.stored("a", ROOT, [1, 2])
    index.cleared("a")
    assert depth(index, "a", [1, 2]) == 0
    assert index.has_events("a")
    assert index.capacity_of("a") == 99


def test_a_smaller_capacity_takes_effect_with_the_next_placements():
    index = PrefixIndex()
    for number in range(100):
        index.place("a", [number * 10 + i for i in range(1, 9)])
    index.set_capacity("a", 80)
    index.place("a", [5000])
    assert index.blocks_of("a") <= 81
    assert depth(index, "a", [5000]) == 1


def test_a_block_with_many_continuations_is_trunk():
    index = PrefixIndex()
    for number in range(7):
        index.place("a", [1, 2, 100 + number, 200 + number])
    assert index.trunk_depth([1, 2, 100], 3) == 0
    index.place("b", [1, 2, 999])
    index.place("b", [1, 2, 999])  # the same continuation again counts once
    assert index.trunk_depth([1, 2, 100], 3) == 2
    assert index.trunk_depth([1, 3], 2) == 0
    assert index.trunk() == {2: 8}


def test_peers_trunk_counts_merge_by_max():
    index = PrefixIndex()
    index.learn_trunk(2, 3)
    assert index.trunk() == {}
    index.learn_trunk(2, 12)
    index.learn_trunk(2, 9)
    assert index.trunk() == {2: 12}


def test_a_growing_conversation_does_not_become_trunk():
    index = PrefixIndex()
    chain = [1]
    for turn in range(40):
        index.place("a", chain)
        chain = [*chain, 100 + turn]
    assert index.trunk() == {}


def test_the_whole_index_stays_below_its_bytes_and_the_fullest_worker_gives():
    index = PrefixIndex(IndexSettings(bytes_max=ENTRY_BYTES * 2_000, worker_blocks=100_000))
    index.place("small", [1, 2, 3])
    rng = Random(1)
    for _ in range(2_000):
        index.place("big", [rng.getrandbits(60) for _ in range(10)])
        assert index.entries <= 2_010
    assert index.bytes_used <= ENTRY_BYTES * 2_010
    assert depth(index, "small", [1, 2, 3]) == 3


def test_branch_counts_are_bounded():
    index = PrefixIndex(IndexSettings(worker_blocks=64))
    rng = Random(1)
    for number in range(BRANCHES_MAX * 2):
        block = rng.getrandbits(60)
        index.place("a", [block])
        index.place("a", [block, number + 1])
    assert len(index._branches) <= BRANCHES_MAX


def test_the_garbage_collector_does_not_see_the_blocks():
    index = PrefixIndex()
    before = len(gc.get_objects())
    for number in range(2_000):
        index.place(f"w{number % 4}", [number * 100 + i for i in range(1, 9)])
    assert len(gc.get_objects()) - before < 200


def test_a_chain_that_was_just_used_is_not_moved_and_survives_those_that_were_not():
    index = PrefixIndex(IndexSettings(worker_blocks=160))
    hot = [7, 8, 9]
    for number in range(400):
        index.place("w", [1_000 * number + 100 + i for i in range(3)])
        index.place("w", hot)
        assert depth(index, "w", hot) == 3
    assert index.blocks_of("w") <= 162


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text("xy", min_size=1, max_size=400)), max_size=20))
def test_two_models_never_influence_each_other(prompts):
    hasher = BlockHasher()
    both, alone = PrefixIndex(), PrefixIndex()
    for model, text in prompts:
        blocks = hasher.text_blocks(text * 20, hasher.seed(model))
        both.place("w", blocks)
        if model == "a":
            alone.place("w", blocks)
    for _, text in prompts:
        blocks = hasher.text_blocks(text * 20, hasher.seed("a"))
        assert depth(both, "w", blocks) == depth(alone, "w", blocks)


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_binary_search_finds_what_a_walk_finds(seed):
    rng = Random(seed)
    index = PrefixIndex(IndexSettings(worker_blocks=40))
    prompts = []
    for _ in range(60):
        stem = rng.choice(prompts)[: rng.randrange(12)] if prompts and rng.random() < 0.8 else []
        prompt = stem + [rng.getrandbits(60) | 1 for _ in range(rng.randrange(1, 8))]
        prompts.append(prompt)
        index.place(f"w{rng.randrange(6)}", prompt)
    for prompt in prompts:
        match = index.match(prompt)
        for number in range(6):
            bits = index.bits_of(f"w{number}")
            walked = 0
            while walked < len(prompt) and index.match(prompt[walked : walked + 1]).depth_of(bits):
                walked += 1
            assert match.depth_of(bits) == walked


class IndexMachine(RuleBasedStateMachine):
    """Against a naive record of what was ever placed since a worker came: never more, and prefix-closed."""

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex(IndexSettings(worker_blocks=30, bytes_max=ENTRY_BYTES * 90))
        self.placed: dict[str, set[int]] = {worker: set() for worker in "abcd"}
        self.prompts: list[list[int]] = []
        self.counter = 0

    @rule(
        worker=st.sampled_from("abcd"),
        stem=st.integers(0, 50),
        keep=st.integers(0, 8),
        fresh=st.integers(0, 6),
    )
    def place(self, worker, stem, keep, fresh):
        base = self.prompts[stem % len(self.prompts)][:keep] if self.prompts else []
        prompt = base + [self.counter + i + 1 for i in range(fresh)]
        self.counter += fresh
        self.prompts.append(prompt)
        self.placed[worker].update(prompt)
        self.index.place(worker, prompt)
        if prompt:
            assert depth(self.index, worker, prompt) == len(prompt)

    @rule(worker=st.sampled_from("abcd"))
    def leave(self, worker):
        self.index.forget(worker)
        self.placed[worker].clear()

    @rule(worker=st.sampled_from("abcd"), blocks=st.integers(14, 60))
    def learn_capacity(self, worker, blocks):
        self.index.set_capacity(worker, blocks)
        self.index.place(worker, [])  # takes effect with the next placement

    @invariant()
    def claims_no_more_than_was_placed(self):
        for prompt in self.prompts[-20:]:
            match = self.index.match(prompt)
            for worker, placed in self.placed.items():
                claimed = match.depth_of(self.index.bits_of(worker))
                assert placed.issuperset(prompt[:claimed])

    @invariant()
    def a_parent_outlives_its_children(self):
        for worker in self.placed:
            owned = set()
            for parent, block in self.index.chains(worker, 1000):
                assert parent == ROOT or parent in owned
                owned.add(block)

    @invariant()
    def is_bounded(self):
        for worker in self.placed:
            capacity = self.index.capacity_of(worker)
            assert self.index.blocks_of(worker) <= capacity + (capacity >> 6)
        assert self.index.entries == sum(len(shard_owner) for shard_owner in self._slots())

    def _slots(self):
        for holdings in self.index._workers.values():
            for slot in holdings.slots():
                yield slot.used
        for grave in self.index._graves:
            yield grave.used


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndexMachine = IndexMachine.TestCase
