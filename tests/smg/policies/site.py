"""A policy with its workers, driven by the verbs in the order in which dispatch says them."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet import load
from smg.fleet.worker import Worker
from smg.policies.cache_aware import CacheAware
from smg.policies.policy import Outcome


def text_of(seed: int, blocks: int) -> str:
    rng = Random(seed)
    return "".join(f"{rng.getrandbits(64):016x}" * 32 for _ in range(blocks))


def call(text: str, *, model: str = "m", is_stream: bool = True, **members: Any) -> Call:
    document = {"messages": [{"role": "user", "content": text}], **members}
    return Call(CHAT, model, b"", document, is_stream=is_stream)


class Site:
    """A policy with its workers: the verbs in the order in which dispatch says them."""

    def __init__(self, workers: tuple[Worker, ...], policy: CacheAware | None = None, seed: int = 1) -> None:
        self.workers = workers
        self.policy = policy if policy is not None else CacheAware("m")
        self.rng = Random(seed)
        self.now = 100.0

    def send(self, text: str, to: Worker | None = None, **fields: Any) -> tuple[Call, Worker]:
        asked = call(text, **fields)
        worker = to or self.policy.choose(asked, self.workers, self.now, self.rng)
        assert worker is not None
        load.begin(worker)
        self.policy.placed(asked, worker, self.now)
        return asked, worker

    def answer(
        self, asked: Call, worker: Worker, after_s: float = 0.1, status: int = 200, **told: Any
    ) -> None:
        self.now += after_s
        if asked.is_stream and status == 200:
            self.policy.first_byte(asked, worker, after_s, self.now)
        load.end(worker)
        outcome = Outcome(status, status == 200, ttft_s=after_s, duration_s=after_s, **told)
        self.policy.finished(asked, worker, outcome, self.now)

    def serve(self, text: str, to: Worker | None = None, **told: Any) -> Worker:
        asked, worker = self.send(text, to)
        self.answer(asked, worker, **told)
        return worker

    def chosen(self, text: str) -> Worker:
        worker = self.policy.choose(call(text), self.workers, self.now, copy.copy(self.rng))
        assert worker is not None
        return worker

    def rows(self, text: str) -> dict[str, Any]:
        told = self.policy.terms(call(text), self.workers, self.now, copy.copy(self.rng))
        return {row.worker_id: row for row in told}
