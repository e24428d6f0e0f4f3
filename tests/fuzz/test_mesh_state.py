"""The fuzz target of replicated state, on random mutations: the doors hold without a coverage guide too.

MESH_FUZZ_RUNS=1000000 for the long run.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.fuzz_mesh_state import DOORS, knock, run_random, seeds

RUNS = int(os.environ.get("MESH_FUZZ_RUNS", "12000"))


@pytest.mark.parametrize("seed", range(4))
def test_mutated_inputs_of_all_doors(seed: int) -> None:
    run_random(RUNS // 4, seed)


def test_the_seeds_reach_every_door_and_pass() -> None:
    inputs = seeds()
    assert {data[0] for data in inputs} == set(range(len(DOORS)))
    for data in inputs:
        knock(data)
