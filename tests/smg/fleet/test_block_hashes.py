"""Chained block hashes: equal prefixes meet, everything else stays apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.block_hashes import PROMPT_BLOCKS_MAX, BlockHasher, BlockSettings

HASHER = BlockHasher()


@given(st.text(max_size=3000), st.text(max_size=3000), st.text(max_size=3000))
def test_hashes_agree_exactly_as_far_as_the_full_blocks_of_the_bytes_do(common, left, right):
    hasher = BlockHasher(BlockSettings(block_bytes=64))
    seed = hasher.seed("m")
    one, two = (common + left).encode(), (common + right).encode()
    first, second = hasher.text_blocks(one, seed), hasher.text_blocks(two, seed)
    assert len(first) == len(one) // 64
    for position in range(min(len(first), len(second))):
        end = 64 * (position + 1)
        assert (first[position] == second[position]) == (one[:end] == two[:end])


def test_text_and_its_bytes_hash_alike_also_with_lone_surrogates():
    seed = HASHER.seed("m")
    text = "é\ud800" * 600
    assert HASHER.text_blocks(text, seed) == HASHER.text_blocks(text.encode("utf-8", "surrogatepass"), seed)


def test_models_salts_and_cluster_seeds_never_meet():
    text = b"x" * 5120
    other_cluster = BlockHasher(BlockSettings(cluster_seed=7))
    chains = [
        HASHER.text_blocks(text, HASHER.seed("a")),
        HASHER.text_blocks(text, HASHER.seed("b")),
        HASHER.text_blocks(text, HASHER.seed("a", "salt")),
        HASHER.text_blocks(text, HASHER.seed("", "a")),
        HASHER.text_blocks(text, HASHER.seed("as", "alt")),
        other_cluster.text_blocks(text, other_cluster.seed("a")),
    ]
    assert len({block for chain in chains for block in chain}) == 60


def test_token_ids_chain_by_blocks_and_never_meet_text():
    seed = HASHER.seed("m")
    ids = list(range(1000, 1000 + 300))
    chain = HASHER.token_blocks(ids, seed)
    assert len(chain) == 2
    assert HASHER.token_blocks([*ids[:200], 1, 2], seed)[:1] == chain[:1]
    as_text = b"".join(token.to_bytes(4, "little") for token in ids)
    assert not set(HASHER.text_blocks(as_text, seed)) & set(chain)


def test_what_is_no_token_id_has_no_blocks():
    seed = HASHER.seed("m")
    assert HASHER.token_blocks([-1] * 200, seed) == []
    assert HASHER.token_blocks([2**40] * 200, seed) == []
    assert HASHER.token_blocks(["a"] * 200, seed) == []


def test_a_huge_prompt_has_a_bounded_number_of_blocks():
    seed = HASHER.seed("m")
    assert len(HASHER.text_blocks(b"x" * (512 * PROMPT_BLOCKS_MAX + 9999), seed)) == PROMPT_BLOCKS_MAX
    assert len(HASHER.token_blocks([5] * (128 * (PROMPT_BLOCKS_MAX + 3)), seed)) == PROMPT_BLOCKS_MAX


def test_more_models_than_remembered_seeds_keep_their_hashes():
    hasher = BlockHasher()
    before = hasher.seed("model-0")
    for number in range(5000):
        hasher.seed(f"model-{number}")
    assert hasher.seed("model-0") == before
