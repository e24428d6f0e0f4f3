"""Those who look: one snapshot for all of them, made only while there are any, and nobody waits for a slow one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from smg.errors import ClientGone, GatewayError
from smg.net.plain import StreamResponse
from smg.ui.viewers import INTERVAL_S, PATIENCE_S, VIEWERS_MAX, Ui
from tests.smg.gateway.desk import request


class Desk:
    """A page whose snapshots are numbers."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.switches: list[bool] = []
        self.ui = Ui(self._take, self.switches.append, lambda: 5.0)

    def _take(self, now: float, wall: float) -> object:
        assert wall == 5.0
        self.taken.append(now)
        return len(self.taken)

    async def open(self) -> StreamResponse:
        return await self.ui.events(request("/ui/events"))

    async def look(
        self, send: Callable[[bytes], Awaitable[None]], *, task_status: trio.TaskStatus[None] | None = None
    ) -> None:
        stream = await self.open()
        await stream.source(send)


class Viewer:
    """Takes frames as they come."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    async def send(self, data: bytes) -> None:
        self.frames.append(data)


def frames(*numbers: int) -> list[bytes]:
    return [b"event: snapshot\ndata: %d\n\n" % number for number in numbers]


async def test_nothing_is_made_while_nobody_looks(autojump_clock: MockClock) -> None:
    desk = Desk()
    await trio.sleep(100)
    assert desk.taken == [] and desk.ui.viewers == 0


async def test_a_viewer_gets_a_snapshot_at_once_and_one_each_second(autojump_clock: MockClock) -> None:
    desk, viewer = Desk(), Viewer()
    with trio.move_on_after(3.5):
        await desk.look(viewer.send)
    assert viewer.frames == frames(1, 2, 3, 4)
    assert desk.switches == [True, False]


async def test_all_viewers_share_one_snapshot(autojump_clock: MockClock) -> None:
    desk, viewers = Desk(), [Viewer() for _ in range(5)]
    with trio.move_on_after(2.5):
        async with trio.open_nursery() as nursery:
            for viewer in viewers:
                nursery.start_soon(desk.look, viewer.send)
                await trio.sleep(0.1)
            assert desk.ui.viewers == 5
            await trio.sleep_forever()
    assert len(desk.taken) == 3
    assert all(viewer.frames == frames(1, 2, 3) for viewer in viewers)
    assert desk.switches == [True, False]


async def test_a_slow_viewer_misses_snapshots_and_delays_nobody(autojump_clock: MockClock) -> None:
    desk, quick = Desk(), Viewer()
    slow_frames: list[bytes] = []

    async def slow(data: bytes) -> None:
        await trio.sleep(2.2)
        slow_frames.append(data)

    with trio.move_on_after(6.5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.look, slow)
            nursery.start_soon(desk.look, quick.send)
    assert len(quick.frames) == 7
    assert slow_frames == frames(1, 3)


async def test_a_viewer_that_takes_nothing_is_dropped(autojump_clock: MockClock) -> None:
    desk = Desk()

    async def stuck(data: bytes) -> None:
        await trio.sleep_forever()

    with pytest.raises(ClientGone):
        await desk.look(stuck)
    assert trio.current_time() == pytest.approx(PATIENCE_S)
    assert desk.ui.viewers == 0 and desk.switches == [True, False]


async def test_so_many_may_look_and_no_more(autojump_clock: MockClock) -> None:
    desk = Desk()
    async with trio.open_nursery() as nursery:
        waiting = await desk.open()
        for _ in range(VIEWERS_MAX):
            nursery.start_soon(desk.look, Viewer().send)
        await trio.sleep(0.1)
        with pytest.raises(GatewayError) as refused:
            await desk.open()
        assert (refused.value.status, refused.value.code) == (503, "too_many_viewers")
        late = Viewer()
        await waiting.source(late.send)
        assert late.frames == [], "who was let in while there was room, and is late, is not served either"
        assert desk.ui.viewers == VIEWERS_MAX
        nursery.cancel_scope.cancel()
    assert desk.ui.viewers == 0
    await desk.open()


async def test_a_drain_ends_the_stream_and_refuses_new_ones(autojump_clock: MockClock) -> None:
    desk, viewer = Desk(), Viewer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.look, viewer.send)
        await trio.sleep(INTERVAL_S * 1.5)
        desk.ui.close()
    assert viewer.frames == [*frames(1, 2), b"event: end\ndata: draining\n\n"]
    with pytest.raises(GatewayError) as refused:
        await desk.open()
    assert refused.value.status == 503


async def test_a_fault_of_the_page_ends_one_stream_and_the_next_viewer_is_served(
    autojump_clock: MockClock,
) -> None:
    desk, viewer = Desk(), Viewer()
    good, desk.ui._take = desk.ui._take, lambda now, wall: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await desk.look(viewer.send)
    desk.ui._take = good  # type: ignore[method-assign]
    with trio.move_on_after(0.5):
        await desk.look(viewer.send)
    assert viewer.frames == frames(1) and desk.ui.viewers == 0


async def test_who_comes_again_soon_gets_a_new_snapshot(autojump_clock: MockClock) -> None:
    desk, viewer = Desk(), Viewer()
    for _ in range(2):
        with trio.move_on_after(0.1):
            await desk.look(viewer.send)
    assert viewer.frames == frames(1, 2)
