"""The threshold rule's fourth trigger: one engine that is nearly full."""

from __future__ import annotations

from random import Random

from smg.fleet.prefix_index import PrefixIndex
from smg.policies.threshold import ThresholdRule
from tests.smg.fleet.builders import reported, workers_of


def test_an_overloaded_engine_ends_affinity_and_its_reason_says_so():
    holder, other = workers_of(2)
    index = PrefixIndex()
    index.place(holder.id, [1, 2, 3])
    holder.in_flight = 1
    reported(other, kv_usage=0.95)
    reported(holder, kv_usage=0.5)
    rule = ThresholdRule(overload=0.9)
    assert rule.choose([1, 2, 3], (holder, other), index, Random(1)) == (other, "overload: KV usage 95%")
    reported(other, kv_usage=0.9)
    assert rule.choose([1, 2, 3], (holder, other), index, Random(1))[0] is holder
    reported(other, kv_usage=1.0)
    assert ThresholdRule().choose([1, 2, 3], (holder, other), index, Random(1))[0] is holder
