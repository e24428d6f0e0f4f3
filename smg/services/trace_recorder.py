"""`--record-trace`: one line per answered request, so that policies can be tried on one's own traffic.

Owns the file and the queue before it. A line holds times, lengths and the hashes of the prompt's blocks (keyed with the
node's secret, the same as the prefix index uses), never text and never an address. Requests are never kept waiting:
what the disk does not take in time is dropped and counted. `smg simulate --trace FILE` reads it (`lab/trace.py`).
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import trio

from smg.api.call import Call
from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockHasher
from smg.fleet.worker import Kind, Worker
from smg.policies.policy import Around, Outcome, Policy
from smg.services.asking import Log

QUEUE_LINES = 8_192
"""Lines that wait for the disk: seconds of a node's full load."""
QUEUE_BLOCKS = 1 << 20
"""Block hashes that wait for the disk: about 40 MB."""
WRITE_LINES = 512
"""Lines of one write."""
FILE_BYTES_MAX = 16 << 30
"""A recording that was forgotten must not fill a disk."""
LAST_WRITE_S = 2.0
"""What was recorded before the end of the node may still be written for this time."""

WRITER = trio.CapacityLimiter(1)
"""The thread that writes the file."""


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request, in the member names of the traces that Mooncake published."""

    timestamp: float
    """Arrival at the worker, milliseconds since 1970."""
    input_length: int
    """Prompt tokens: the engine's word, else an estimate."""
    output_length: int | None
    """Answered tokens, None where the engine did not tell."""
    hash_ids: tuple[int, ...]
    """Chained hashes of the prompt's blocks."""
    block_chars: int | None = None
    """Bytes of text per block; None for prompts that came as token ids."""
    block_tokens: int | None = None
    """Token ids per block; None for text."""
    model: str = ""
    cached_tokens: int | None = None
    ttft_ms: float | None = None


class TraceRecorder:
    """Records answered requests. Raises SettingsError when the file cannot be appended to."""

    def __init__(self, path: str, hasher: BlockHasher, *, log: Log) -> None:
        self._path = Path(path)
        self._hasher = hasher
        self._log = log
        self._clock_ms = (time.time() - trio.current_time()) * 1_000.0
        self._queue: deque[Line] = deque()
        self._blocks = 0  # over the queue
        self._work = trio.Event()
        self._encode = msgspec.json.Encoder().encode
        self._bytes = 0
        self._is_failing = False
        self._is_torn = False
        self.written = 0
        """Lines in the file."""
        self.dropped = 0
        """Lines that did not get there."""
        try:
            self._file = self._path.open("ab", buffering=0)
            self._bytes = self._file.tell()
        except OSError as wrong:
            raise SettingsError(
                "--record-trace", repr(path), wrong.strerror or str(wrong), is_combination=True
            ) from None

    def record(
        self,
        call: Call,
        sent_s: float,
        ttft_s: float | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        cached_tokens: int | None,
    ) -> None:
        """A call was answered with 200. Never waits."""
        if len(self._queue) >= QUEUE_LINES or self._blocks >= QUEUE_BLOCKS:
            self.dropped += 1
            return
        hasher = self._hasher
        seed = hasher.seed(call.model)
        settings = hasher.settings
        ids = call.token_ids()
        if ids is not None:
            blocks, length = hasher.token_blocks(ids, seed), len(ids)
        else:
            data = call.text().encode("utf-8", "surrogatepass")
            blocks, length = hasher.text_blocks(data, seed), max(1, len(data) // 4)
        line = Line(
            round(self._clock_ms + sent_s * 1_000.0, 1),
            prompt_tokens or length,
            completion_tokens,
            tuple(blocks),
            settings.block_bytes if ids is None else None,
            settings.block_tokens if ids is not None else None,
            call.model,
            cached_tokens,
            None if ttft_s is None else round(ttft_s * 1_000.0, 2),
        )
        self._queue.append(line)
        self._blocks += len(blocks)
        self._work.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Writes until cancelled, and then what is left."""
        task_status.started()
        try:
            while True:
                self._work = trio.Event()
                if not self._queue:
                    await self._work.wait()
                await self._write()
        finally:
            with trio.move_on_after(LAST_WRITE_S, shield=True):
                while self._queue:
                    await self._write()
            self._file.close()

    async def _write(self) -> None:
        lines = list(islice(self._queue, WRITE_LINES))
        reason = ""
        if self._bytes >= FILE_BYTES_MAX:
            reason = f"the file has reached {FILE_BYTES_MAX >> 30} GiB"
        else:
            try:
                self._bytes += await trio.to_thread.run_sync(self._append, lines, limiter=WRITER)
            except OSError as wrong:
                reason = wrong.strerror or str(wrong)
        for line in lines:  # not before: who is cancelled on the way to the thread has written nothing
            self._queue.popleft()
            self._blocks -= len(line.hash_ids)
        if reason:
            self._fail(len(lines), reason)
        else:
            self.written += len(lines)
            self._is_failing = False

    def _append(self, lines: list[Line]) -> int:
        """In the thread: encodes and writes; the bytes written."""
        data = b"".join([self._encode(line) + b"\n" for line in lines])
        rest = memoryview(b"\n" + data if self._is_torn else data)
        self._is_torn = True  # should the disk fill up inside a line, the next one begins anew
        while rest:
            rest = rest[self._file.write(rest) :]
        self._is_torn = False
        return len(data)

    def _fail(self, count: int, reason: str) -> None:
        self.dropped += count
        if not self._is_failing:
            self._is_failing = True
            self._log.warn("the trace is not recorded", path=str(self._path), reason=reason)


class Recorded(Around):
    """A policy whose answered calls are recorded; in all else it is `inner`. It exists only while somebody records."""

    def __init__(self, inner: Policy, recorder: TraceRecorder) -> None:
        super().__init__(inner)
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # what only one kind of policy has: branches, entries

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """As `inner` does; an answer is recorded once, whatever it took to get it."""
        self.inner.finished(call, worker, outcome, now)
        if outcome.status == 200 and outcome.is_success and worker.kind is not Kind.PREFILL:
            self._recorder.record(
                call,
                now - outcome.duration_s,
                outcome.ttft_s,
                outcome.prompt_tokens,
                outcome.completion_tokens,
                outcome.cached_tokens,
            )
