"""One question to a worker: its key, its base URL, a deadline, and what became of it.

Owns how services and admin fan-outs address a worker: at its base URL even when it is one rank (WRK-17), with the
worker's own key as the only credential (UP-6). It maps what may go wrong into one small answer; it never judges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import trio

from smg.errors import UpstreamError
from smg.fleet.worker import Worker
from smg.net.client import Fetched, Header

ANSWER_BYTES_MAX = 16 << 20
"""Longest answer that is read; metrics pages of large engines have a few MiB."""

TIMEOUT = UpstreamError.TIMEOUT


class Fetch(Protocol):
    """`Client.fetch`, or a fake of it."""

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[Header] = (),
        body: bytes = b"",
        bytes_max: int = ...,
    ) -> Fetched:
        """One request, one answer. Raises `UpstreamError`; deadlines are the caller's."""
        ...


class Log(Protocol):
    """What services need of `smg.telemetry.log.Logger`."""

    def info(self, message: str, /, **fields: object) -> None:
        """An event that operators may want to read."""
        ...

    def warn(self, message: str, /, **fields: object) -> None:
        """An event that operators should read."""
        ...


class Heard(msgspec.Struct, frozen=True):
    """What a worker answered: `status` 0 and `failure` (a kind of `UpstreamError`) when nothing usable came."""

    status: int
    body: bytes = b""
    failure: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it is a 2xx answer."""
        return 200 <= self.status < 300

    @property
    def has_no_such_path(self) -> bool:
        """Whether the worker says that it does not serve this path; other errors may pass."""
        return self.status in (400, 404, 405, 410, 501)

    def document(self) -> Any:
        """The decoded body of a 2xx answer, None when there is none or it is not JSON."""
        if not self.is_ok:
            return None
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def reason(self, timeout_s: float) -> str:
        """Why this is no good answer, in words for operators."""
        if self.status:
            return f"answered {self.status}"
        if self.failure == UpstreamError.REFUSED:
            return "connection refused or host not reachable"
        if self.failure == TIMEOUT:
            return f"no answer within {timeout_s:g} s"
        return "connection closed without a usable answer"


def worker_headers(worker: Worker) -> list[Header]:
    """The headers of every request that the gateway makes of its own: the worker's key, if it has one (UP-6)."""
    key = worker.spec.api_key
    return [("authorization", f"Bearer {key}")] if key is not None else []


async def ask(
    fetch: Fetch,
    worker: Worker,
    path: str,
    within_s: float,
    *,
    method: str = "GET",
    body: bytes = b"",
    bytes_max: int = ANSWER_BYTES_MAX,
) -> Heard:
    """Asks `worker` for `path`; never raises for what a worker or the network does."""
    with trio.move_on_after(within_s):
        try:
            fetched = await fetch(
                method,
                worker.base_url + path,
                headers=worker_headers(worker),
                body=body,
                bytes_max=bytes_max,
            )
        except UpstreamError as error:
            return Heard(0, failure=error.kind)
        return Heard(fetched.status, fetched.body)
    return Heard(0, failure=TIMEOUT)
