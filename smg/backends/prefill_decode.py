"""Sends one call to a prefill and a decode worker at the same time and joins the two (contract section 18).

Owns what both receive, which is the client's body with the fields by which the workers find each other, and the join:
the decode worker's answer is handed out when the prefill worker's was read to its end, so that whatever goes wrong with
the prefill is known before a byte is with the client. The first leg that fails ends the other; so does a client that
leaves. Never chooses workers, never counts, never builds an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import msgspec
import trio

from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS, GENERATE
from smg.backends.http_worker import HttpWorkers, Lines
from smg.errors import ClientGone, ShuttingDown, SmgError, UpstreamError
from smg.fleet.worker import Worker
from smg.net.connection import DeadlinePassed
from smg.net.exchange import Exchange
from smg.net.readiness import Parking, Readiness
from smg.net.upstream import Upstream
from smg.wire.http1 import RequestHead
from smg.wire.json_splice import insert_members, quoted

ROOM_BITS = 63  # rooms are 0..2^63-1, what fits the engines' signed integers (PD-1)
ERROR_STATUS_MIN = 400
TAIL_BYTES = 4096  # what is kept of a good prefill answer: its usage stands at the end
ERROR_BYTES_MAX = 64 << 10  # what is kept of a bad one: its message stands at the start
BATCH_MAX = 4096  # rooms of one call (1 ms); a larger batch gets one, from which engines number on themselves


class PrefillFailed(SmgError):
    """The prefill worker could not be used or refused; `Prefill.error` or `Prefill.status` says how."""


def _nobody(prefill: Prefill) -> None:
    """Nobody wants to know."""


class Prefill:
    """The prefill leg of one call, with what both legs send, and how it ended.

    `ended` is called once when the leg is over, however it ended, while the decode leg may still be running. Then
    `error` is set when the worker could not be used; else `status`, `headers` and `body` are its answer when
    `is_whole` is true (of a good answer the last bytes, of a bad one the first); else it was cancelled.
    """

    __slots__ = (
        "body",
        "call",
        "decode_call",
        "ended",
        "error",
        "headers",
        "is_whole",
        "lines",
        "status",
        "worker",
    )

    def __init__(self, worker: Worker, lines: Lines, call: Call, decode_call: Call) -> None:
        self.worker = worker
        self.lines = lines
        self.call = call
        self.decode_call = decode_call
        self.ended: Callable[[Prefill], None] = _nobody
        self.error: UpstreamError | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.is_whole = False

    @property
    def has_failed(self) -> bool:
        """Whether the worker could not be used or answered with an error."""
        return self.error is not None or (self.is_whole and self.status >= ERROR_STATUS_MIN)


class _Asker(msgspec.Struct, frozen=True, eq=False):
    """What sending needs of an exchange, for the leg that is not sent from the exchange's own task."""

    head: RequestHead
    trace_lines: bytes | None
    parking: Parking


class PrefillDecode:
    """The backend of pairs of HTTP workers. `rng` makes the rooms."""

    def __init__(self, workers: HttpWorkers, readiness: Readiness, rng: Random) -> None:
        self._workers = workers
        self._readiness = readiness
        self._rng = rng

    def lines(self, worker: Worker) -> Lines:
        """The constant parts for a worker."""
        return self._workers.lines(worker)

    def prefill(self, call: Call, worker: Worker) -> Prefill:
        """The prefill of `call` on `worker`, ready to be sent."""
        body, decode_body = bodies_of(call, worker, self._rng)
        return Prefill(worker, self.lines(worker), with_body(call, body), with_body(call, decode_body))

    async def open(
        self, prefill: Prefill, decode: Worker, lines: Lines, query: bytes, exchange: Exchange
    ) -> Upstream:
        """The head of the decode worker's answer, the prefill being done; the caller gives it back with `close`.

        An error status of the decode worker is an answer too: then the prefill was ended. Raises `PrefillFailed`;
        `UpstreamError` of the decode worker; `ClientGone`, `ShuttingDown`. In each case both legs are over.
        """
        deadline_s = exchange.parking.deadline_s  # before the decode leg lends it to its connecting
        upstream: Upstream | None = None
        failure: SmgError | None = None
        try:
            async with trio.open_nursery() as legs:
                scope = legs.cancel_scope
                done = trio.Event()
                legs.start_soon(self._prefill, prefill, query, exchange, deadline_s, done, scope)
                try:
                    call = prefill.decode_call
                    upstream = await self._workers.open(call, decode, lines, query, exchange)
                    if upstream.status >= ERROR_STATUS_MIN:
                        scope.cancel()
                    else:
                        await _wait_out(done, exchange.parking)
                except (UpstreamError, ClientGone, ShuttingDown) as error:
                    failure = _blamed(error, prefill)
                    scope.cancel()
            if failure is None and prefill.has_failed:
                is_refused = upstream is not None and upstream.status >= ERROR_STATUS_MIN
                failure = None if is_refused else PrefillFailed()
            if failure is not None:
                raise failure
        except BaseException:
            if upstream is not None:
                self._workers.discard(lines, upstream)
            raise
        assert upstream is not None
        return upstream

    def close(self, lines: Lines, upstream: Upstream) -> None:
        """Ends the use of a decode worker's answer."""
        self._workers.close(lines, upstream)

    async def _prefill(
        self,
        prefill: Prefill,
        query: bytes,
        exchange: Exchange,
        deadline_s: float,
        done: trio.Event,
        legs: trio.CancelScope,
    ) -> None:
        """The prefill leg, in a task of its own with a parking of its own."""
        parking = self._readiness.open_parking()
        parking.deadline_s = deadline_s
        asker = _Asker(exchange.head, exchange.trace_lines, parking)
        upstream: Upstream | None = None
        try:
            upstream = await self._workers.open(prefill.call, prefill.worker, prefill.lines, query, asker)
            prefill.status = upstream.status
            prefill.headers = upstream.headers
            prefill.body = await _read_and_drop(upstream, parking)
            prefill.is_whole = True
        except UpstreamError as error:
            prefill.error = error
        finally:
            self._readiness.close_parking(parking)
            if upstream is not None:
                self._workers.close(prefill.lines, upstream)
            prefill.ended(prefill)
        if prefill.has_failed:
            legs.cancel()
        done.set()


def _blamed(error: SmgError, prefill: Prefill) -> SmgError:
    """What the failure of the decode leg means: a worker that waited in vain for the prefill is not to blame for it."""
    if not isinstance(error, UpstreamError) or error.kind != UpstreamError.TIMEOUT or prefill.is_whole:
        return error
    if prefill.error is None:
        prefill.error = error
    return PrefillFailed()


async def _wait_out(done: trio.Event, parking: Parking) -> None:
    """Waits for the prefill, which keeps the deadline itself and is the one to blame when it passes."""
    if done.is_set():
        return
    deadline_s, parking.deadline_s = parking.deadline_s, math.inf
    try:
        await parking.run(done.wait)
    finally:
        parking.deadline_s = deadline_s


async def _read_and_drop(upstream: Upstream, parking: Parking) -> bytes:
    """Reads an answer to its end in bounded memory; what is kept of it. Raises `UpstreamError`.

    Of an error that is too long for anybody's message the rest is not read; the connection is closed then.
    """
    kept = b""
    is_error = upstream.status >= ERROR_STATUS_MIN
    try:
        while True:
            kept += upstream.take()
            if is_error and len(kept) >= ERROR_BYTES_MAX:
                return kept[:ERROR_BYTES_MAX]
            if not is_error:
                kept = kept[-TAIL_BYTES:]
            if upstream.is_complete:
                return kept
            await upstream.read_more(parking)
    except DeadlinePassed:
        raise UpstreamError(
            UpstreamError.TIMEOUT, "prefill not complete within the timeout", was_sent=True
        ) from None


def bodies_of(call: Call, prefill: Worker, rng: Random) -> tuple[bytes, bytes]:
    """The bodies for both legs: the client's with the bootstrap fields, equal on both (PD-1).

    Engines that spread requests over data-parallel ranks by room find the rank of the prefill by the room's
    remainder; the decode leg is told it in words too.
    """
    spec = prefill.spec
    host = quoted(prefill.host)
    port = b"null" if spec.bootstrap_port is None else b"%d" % spec.bootstrap_port
    size = batch_size(call)
    rooms = [_room(rng, spec.dp_rank, spec.dp_size) for _ in range(size or 1)]
    if size is None:
        members = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": b"%d" % rooms[0]}
    else:
        members = {
            "bootstrap_host": _array([host] * size),
            "bootstrap_port": _array([port] * size),
            "bootstrap_room": _array([b"%d" % room for room in rooms]),
        }
    body = insert_members(call.body, members)
    if spec.dp_rank is None:
        return body, body
    return body, insert_members(body, {"disagg_prefill_dp_rank": b"%d" % spec.dp_rank})


def batch_size(call: Call) -> int | None:
    """How many sequences the call asks for when its fields must be arrays, else None."""
    document = call.document
    endpoint = call.endpoint
    prompts: object = None
    copies: object = document.get("n")
    if endpoint is COMPLETIONS:
        prompts = document.get("prompt")
    elif endpoint is GENERATE:
        text = document.get("text")
        prompts = text if text is not None else document.get("input_ids")
        sampling = document.get("sampling_params")
        copies = sampling.get("n") if isinstance(sampling, dict) else None
    elif endpoint is not CHAT:
        return None
    # An array of numbers is one prompt in tokens.
    is_batch = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], (str, list))
    per_prompt = copies if type(copies) is int and copies > 1 else 1
    if not is_batch and per_prompt == 1:
        return None
    size = (len(prompts) if is_batch and isinstance(prompts, list) else 1) * per_prompt
    return size if size <= BATCH_MAX else None


def with_body(call: Call, body: bytes) -> Call:
    """The call as a leg sends it."""
    return Call(
        call.endpoint,
        call.model,
        body,
        call.document,
        is_stream=call.is_stream,
        request_id=call.request_id,
    )


def _room(rng: Random, rank: int | None, ranks: int | None) -> int:
    room = rng.getrandbits(ROOM_BITS)
    if rank is None or not ranks:
        return room
    congruent = room - room % ranks + rank
    return congruent if congruent < 1 << ROOM_BITS else congruent - ranks


def _array(values: list[bytes]) -> bytes:
    return b"[" + b",".join(values) + b"]"
