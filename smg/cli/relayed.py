"""A page of one process, passed on as it comes: how the supervisor shows what only a process can draw.

Owns one connection to the loopback per page that is open. It asks in HTTP/1.0, so that the answer is a head, a body and an end,
whatever its length, and a stream of events passes event by event. It must never carry a client's inference: every byte is copied.
"""

from __future__ import annotations

import trio

from smg.errors import GatewayError
from smg.net.plain import Request, Send, StreamResponse

HEAD_PATIENCE_S = 2.0
"""A page is drawn in milliseconds."""
PIECE_BYTES = 65_536

_WRITTEN_ANEW = frozenset(
    {"connection", "content-length", "transfer-encoding", "date", "x-request-id", "content-type"}
)


async def relayed(host: str, port: int, request: Request) -> StreamResponse:
    """The answer of the process that listens there. Raises `GatewayError` 503 when it gives none in time."""
    try:
        with trio.fail_after(HEAD_PATIENCE_S):
            stream = await trio.open_tcp_stream(host, port)
            try:
                await stream.send_all(_question(request))
                status, fields, rest = await _read_head(stream)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
    except (OSError, ValueError, trio.BrokenResourceError, trio.TooSlowError):
        raise no_page() from None

    async def pass_on(send: Send) -> None:
        async with stream:
            await send(rest)
            while True:
                try:
                    piece = await stream.receive_some(PIECE_BYTES)
                except trio.BrokenResourceError:
                    return  # the process is gone, and the page ends
                if not piece:
                    return
                await send(piece)

    if request.is_head:
        await trio.aclose_forcefully(stream)
    content_type = next((value for name, value in fields if name == "content-type"), "")
    kept = [(name, value) for name, value in fields if name not in _WRITTEN_ANEW]
    return StreamResponse(status, pass_on, content_type, kept)


def no_page() -> GatewayError:
    """No process serves, or none answers."""
    return GatewayError(
        503, "no_available_workers", "no process of this node shows its page now", retry_after_s=1
    )


def _question(request: Request) -> bytes:
    return request.method.encode() + b" " + request.target + b" HTTP/1.0\r\nhost: smg\r\n\r\n"


async def _read_head(stream: trio.SocketStream) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, header fields, and what has come of the body. Raises ValueError for what is no head."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some(PIECE_BYTES)
        data += piece
        if not piece or len(data) > 2 * PIECE_BYTES:
            raise ValueError("no head")
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split(" ")[1]) if first.count(" ") else 0
    if not 200 <= status < 600:
        raise ValueError("no head")
    fields = []
    for line in lines:
        name, _, value = line.partition(":")
        fields.append((name.lower(), value.strip()))
    return status, fields, rest
