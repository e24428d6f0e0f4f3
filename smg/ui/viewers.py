"""Those who look at the page: one snapshot a second for all of them, made only while there are any.

Owns the stream `GET /ui/events` (server-sent events): how many may look, how long a slow one is waited for, and the end when the
node drains. There is no task beside the viewers: the first of them whose second is over makes the snapshot and the others send
it too, so that a fault of the page ends a stream and never the node. A viewer gets the newest snapshot or none; nothing queues.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from smg.errors import ClientGone, GatewayError
from smg.gateway import problem
from smg.net.plain import Request, Response, Send, StreamResponse
from smg.ui.page import page

VIEWERS_MAX = 16
"""At 20 to 60 kB a second each; a team looking at an incident fits."""
INTERVAL_S = 1.0
PATIENCE_S = 5.0
"""A viewer that has taken nothing for so long is dropped; its browser comes again when it can."""
RETRY_AFTER_S = 10

HEADERS = [("cache-control", "no-store"), ("x-content-type-options", "nosniff"), ("x-accel-buffering", "no")]
"""The last one asks nginx not to hold events back."""
END = b"event: end\ndata: draining\n\n"


class Ui:
    """The paths `/ui` and `/ui/events`.

    `take(now, wall)` makes a snapshot; `switch(is_on)` is told when the first viewer comes and when the last one leaves; `wall` gives
    seconds since 1970.
    """

    def __init__(
        self,
        take: Callable[[float, float], object],
        switch: Callable[[bool], None],
        wall: Callable[[], float],
    ) -> None:
        self._take = take
        self._switch = switch
        self._wall = wall
        self._page = page()
        self._viewers = 0
        self._frame = b""
        self._number = 0
        self._due_s = 0.0
        self._closed = trio.Event()

    @property
    def viewers(self) -> int:
        """How many look (`smg_ui_viewers`)."""
        return self._viewers

    def close(self) -> None:
        """The node drains: streams end, and none begins any more."""
        self._closed.set()

    async def show(self, request: Request) -> Response:
        """The page."""
        return self._page

    async def events(self, request: Request) -> StreamResponse:
        """The stream. Raises `GatewayError` 503 while the node drains, or when too many look."""
        if self._closed.is_set():
            raise GatewayError(
                503, "no_available_workers", "the node is shutting down", retry_after_s=RETRY_AFTER_S
            )
        if self._viewers >= VIEWERS_MAX:
            raise problem.too_many_viewers(VIEWERS_MAX, RETRY_AFTER_S)
        return StreamResponse(200, self._stream, "text/event-stream", HEADERS)

    async def _stream(self, send: Send) -> None:
        if self._viewers >= VIEWERS_MAX:  # others came while the head was sent
            return
        self._viewers += 1
        if self._viewers == 1:
            self._switch(True)
        try:
            await self._show_all(send)
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._switch(False)
                self._frame, self._due_s = b"", 0.0

    async def _show_all(self, send: Send) -> None:
        sent = 0
        while not self._closed.is_set():
            now = trio.current_time()
            if now >= self._due_s:
                self._due_s = now + INTERVAL_S
                self._frame = frame(self._take(now, self._wall()))
                self._number += 1
            if sent != self._number:
                sent = self._number
                await _send_soon(send, self._frame)
                continue  # a newer one may have been made meanwhile
            with trio.move_on_at(self._due_s):
                await self._closed.wait()
        await _send_soon(send, END)


def frame(snapshot: object) -> bytes:
    """One event. JSON has no line ends, so that one `data` line holds it."""
    return b"event: snapshot\ndata: " + msgspec.json.encode(snapshot) + b"\n\n"


async def _send_soon(send: Send, data: bytes) -> None:
    """Sends. Raises `ClientGone` when the viewer does not take it in time."""
    with trio.move_on_after(PATIENCE_S):
        await send(data)
        return
    raise ClientGone
