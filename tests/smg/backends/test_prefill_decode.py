"""What both legs of a pair are sent (PD-1)."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS, GENERATE, MESSAGES, Endpoint
from smg.backends.prefill_decode import BATCH_MAX, ROOM_BITS, batch_size, bodies_of
from smg.fleet.worker import Worker
from tests.smg.gateway.desk import add, registry


def call_of(endpoint: Endpoint, document: dict[str, Any]) -> Call:
    return Call(endpoint, "m", json.dumps(document).encode(), document)


def prefill(name: str = "p", **spec: Any) -> Worker:
    return add(registry(), name, worker_type="prefill", **spec)


@given(st.integers(0, 2**32), st.integers(1, 64), st.data())
def test_rooms_lead_engines_to_the_rank_that_has_the_prefill(seed: int, ranks: int, data: Any) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    worker = prefill(dp_rank=rank, dp_size=ranks)
    first, second = bodies_of(call_of(CHAT, {"n": 3}), worker, Random(seed))
    rooms = json.loads(first)["bootstrap_room"]
    assert len(rooms) == 3
    for room in rooms:
        assert 0 <= room < 1 << ROOM_BITS and room % ranks == rank
    assert "disagg_prefill_dp_rank" not in json.loads(first)
    assert json.loads(second) == {**json.loads(first), "disagg_prefill_dp_rank": rank}


class Highest(Random):
    """A random state at the end of its range."""

    def getrandbits(self, k: int, /) -> int:
        return (1 << k) - 1


def test_the_highest_room_of_all_stays_a_signed_integer() -> None:
    body, _ = bodies_of(call_of(CHAT, {}), prefill(dp_rank=6, dp_size=7), Highest())
    room = json.loads(body)["bootstrap_room"]
    assert room < 1 << ROOM_BITS and room % 7 == 6


def test_fields_that_the_client_sent_itself_are_replaced() -> None:
    body = b'{"bootstrap_room":1,"messages":[],"bootstrap_host":"evil"}'
    call = Call(CHAT, "m", body, json.loads(body))
    sent, _ = bodies_of(call, prefill(bootstrap_port=8998), Random(1))
    assert sent.count(b"bootstrap_room") == sent.count(b"bootstrap_host") == 1
    document = json.loads(sent)
    assert (document["bootstrap_host"], document["bootstrap_port"]) == ("p", 8998)
    assert document["bootstrap_room"] != 1


@pytest.mark.parametrize(
    ("endpoint", "document", "size"),
    [
        (CHAT, {}, None),
        (CHAT, {"n": 2}, 2),
        (CHAT, {"n": True}, None),
        (CHAT, {"n": None}, None),
        (COMPLETIONS, {"prompt": "a"}, None),
        (COMPLETIONS, {"prompt": "a", "n": 4}, 4),
        (COMPLETIONS, {"prompt": []}, None),
        (COMPLETIONS, {"prompt": ["a"]}, 1),
        (GENERATE, {"text": "a", "sampling_params": {"n": 2}}, 2),
        (GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 1}]}, 2),
        (GENERATE, {"input_ids": [[1], [2], [3]]}, 3),
        (MESSAGES, {"n": 5}, None),
        (CHAT, {"n": BATCH_MAX}, BATCH_MAX),
        (CHAT, {"n": 10**12}, None),
    ],
)
def test_the_size_of_a_batch_is_its_prompts_times_the_copies_of_each(
    endpoint: Endpoint, document: dict[str, Any], size: int | None
) -> None:
    assert batch_size(call_of(endpoint, document)) == size


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())), st.integers())
def test_every_member_of_the_client_stays(document: dict[str, Any], seed: int) -> None:
    call = call_of(CHAT, document)
    first, second = bodies_of(call, prefill(), Random(seed))
    assert first == second
    sent = json.loads(first)
    assert sent.pop("bootstrap_port") is None
    assert sent.pop("bootstrap_host") == "p"
    assert isinstance(sent.pop("bootstrap_room"), int | list)
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
        document.pop(name, None)
    assert sent == document
