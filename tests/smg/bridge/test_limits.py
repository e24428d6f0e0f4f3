"""Use of all nodes in a window is the sum of what each took, exactly."""

from __future__ import annotations

import trio

from mesh import Counter
from smg.bridge.limits import LIMITS, LIMITS_MINUTE, MINUTE, SharedUse
from tests.smg.bridge.wire import Wire

NAMESPACES = [
    Counter(name=LIMITS, window_s=1.0, coalesce_s=0.05),
    Counter(name=LIMITS_MINUTE, window_s=60.0, coalesce_s=0.05),
]


async def test_all_nodes_see_the_use_of_all(autojump_clock):
    wire = Wire(**dict.fromkeys("abc", NAMESPACES))
    uses = {name: SharedUse(wire[name].state) for name in "abc"}
    wire.run()
    for name, amount in (("a", 5), ("b", 7), ("c", 1)):
        uses[name].take(b"tenant red", amount, MINUTE)
    uses["a"].take(b"tenant red", -2, MINUTE)
    await wire.pause(0.3)
    assert [use.used(b"tenant red", MINUTE) for use in uses.values()] == [11, 11, 11]
    assert uses["b"].take(b"tenant red", 1, MINUTE) == 12
    assert uses["b"].used(b"tenant blue", MINUTE) == 0
    assert uses["b"].used(b"tenant red") == 0  # seconds are counted apart


async def test_a_window_ends(autojump_clock):
    wire = Wire(**dict.fromkeys("ab", NAMESPACES))
    a, b = (SharedUse(wire[name].state) for name in "ab")
    wire.run()
    await trio.sleep(1.05 - trio.current_time() % 1.0)
    a.take(b"k", 3)
    await wire.pause(0.3)
    assert b.used(b"k") == 3
    await wire.pause(0.8)
    assert (b.used(b"k"), b.used_before(b"k")) == (0, 3)
    await wire.pause(5)
    assert b.used_before(b"k") == 0


async def test_what_the_mesh_has_no_room_for_is_counted(autojump_clock):
    wire = Wire(**{name: [Counter(name=LIMITS, window_s=1.0, bytes_max=500), NAMESPACES[1]] for name in "ab"})
    use = SharedUse(wire["a"].state)
    for number in range(50):
        use.take(b"key %d" % number, 1)
    assert use.refused > 0
