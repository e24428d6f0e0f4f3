"""The simulated engine in real time: `EngineModel` driven by trio's clock, one `Generation` per request.

Owns the model, the task that moves it, and the counters that its metrics show. Text is only counted and hashed here
(four bytes are a token); what an answer looks like is the faces' business. `speed` makes the engine's own clock run
faster or slower than ours. It never opens a socket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import trio

from smg.lab.engine_model import EngineModel, EngineSettings, Finished, FirstToken, Token, hash_prompt

BYTES_PER_TOKEN = 4
"""Length of a token: the usual mean for English text, and what the gateway assumes too."""
THROUGHPUT_WINDOW_S = 1.0
"""Reported throughput is over at least this time; shorter windows show single tokens."""


class Generation:
    """One request inside the engine; a context manager that takes it out again (an abort when it is not finished).

    `cached_tokens` is known from the first token on, `produced` counts the tokens that have left.
    """

    __slots__ = (
        "_engine",
        "_lot",
        "cached_tokens",
        "id",
        "is_finished",
        "output_tokens",
        "produced",
        "prompt_tokens",
    )

    def __init__(self, engine: Simulated, request_id: str, prompt_tokens: int, output_tokens: int) -> None:
        self._engine = engine
        self._lot = trio.lowlevel.ParkingLot()
        self.id = request_id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.cached_tokens = 0
        self.produced = 0
        self.is_finished = False

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def wait_more(self, than: int) -> int:
        """Waits until more than `than` tokens have left or none will; how many have."""
        while self.produced <= than and not self.is_finished:
            await self._lot.park()
        return self.produced

    async def wait_finished(self) -> None:
        """Waits for the last token."""
        while not self.is_finished:
            await self._lot.park()

    def close(self) -> None:
        """Takes the request out of the engine, wherever it is; nothing when it has finished."""
        self._engine.abort(self)

    def moved(self, produced: int, is_finished: bool) -> None:
        """The engine's word: so many tokens have left."""
        self.produced = produced
        self.is_finished = is_finished
        self._lot.unpark_all()


class Simulated:
    """One simulated engine; `run` must be running for it to make progress."""

    def __init__(self, settings: EngineSettings, *, speed: float = 1.0, seed: int = 0) -> None:
        self.model = EngineModel(settings)
        self._speed = speed
        self._seed = seed
        self._started_s: float | None = None
        self._generations: dict[str, Generation] = {}
        self._sequence = 0
        self._changed = trio.Event()
        self._rate_from: tuple[float, int] = (0.0, 0)
        self._rate = 0.0

    @property
    def settings(self) -> EngineSettings:
        """The numbers of this engine."""
        return self.model.settings

    def now(self) -> float:
        """The engine's own clock, seconds since its first use."""
        if self._started_s is None:
            self._started_s = trio.current_time()
        return (trio.current_time() - self._started_s) * self._speed

    def submit(self, prompt: bytes, output_tokens: int) -> Generation:
        """Queues a prompt. Raises `EngineFull`. Close what you get."""
        settings = self.settings
        blocks = hash_prompt(prompt, settings.block_tokens * BYTES_PER_TOKEN, self._seed)
        return self._submit(blocks, count_tokens(prompt), output_tokens)

    def abort(self, generation: Generation) -> None:
        """Drops a generation; nothing when it is not here any more."""
        if self._generations.pop(generation.id, None) is not None:
            self.model.abort(generation.id, self.now())
            generation.moved(generation.produced, is_finished=True)
            self._changed.set()

    def flush(self) -> int:
        """Empties the prefix cache; the number of blocks forgotten."""
        return self.model.flush(self.now())

    def throughput_tps(self) -> float:
        """Tokens per second that left lately, by the engine's own clock."""
        now, total = self.now(), self.model.output_tokens_total
        since_s, before = self._rate_from
        if now - since_s >= THROUGHPUT_WINDOW_S:
            self._rate = (total - before) / (now - since_s)
            self._rate_from = (now, total)
        return self._rate

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Moves the engine until cancelled."""
        self.now()
        task_status.started()
        while True:
            changed = self._changed = trio.Event()
            self._advance()
            due = self.model.deadline()
            wait_s = math.inf if due is None else max(0.0, (due - self.now()) / self._speed)
            with trio.move_on_after(wait_s):
                await changed.wait()

    def _submit(self, blocks: Sequence[int], prompt_tokens: int, output_tokens: int) -> Generation:
        self._sequence += 1
        generation = Generation(self, f"{self._sequence:012x}", prompt_tokens, max(1, output_tokens))
        self.model.submit(generation.id, blocks, prompt_tokens, generation.output_tokens, self.now())
        self._generations[generation.id] = generation
        self._changed.set()
        return generation

    def _advance(self) -> None:
        for event in self.model.advance(self.now()):
            if not isinstance(event, (FirstToken, Token, Finished)):
                continue
            generation = self._generations.get(event.request_id)
            if generation is None:
                continue
            if isinstance(event, FirstToken):
                generation.cached_tokens = event.cached_tokens
                generation.moved(1, is_finished=False)
            elif isinstance(event, Token):
                generation.moved(event.number, is_finished=False)
            else:
                del self._generations[event.request_id]
                generation.moved(event.output_tokens, is_finished=True)


def count_tokens(prompt: bytes) -> int:
    """Tokens of a prompt: four bytes each, at least one."""
    return max(1, -(-len(prompt) // BYTES_PER_TOKEN))
