"""The fuzz target of membership on random mutations: bytes of a peer change nothing that must not change.

MESH_FUZZ_RUNS=1000000 for the long run.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.fuzz_mesh_membership import knock, run_random, seeds

RUNS = int(os.environ.get("MESH_FUZZ_RUNS", "20000"))


@pytest.mark.parametrize("seed", range(4))
def test_mutated_messages_change_nothing_and_raise_nothing(seed: int) -> None:
    run_random(RUNS // 4, seed)


def test_every_kind_of_message_is_a_seed_and_passes() -> None:
    assert {data[2] for data in seeds()} == {1, 2, 3, 4, 5, 6, 16, 17}
    for data in seeds():
        knock(data)
