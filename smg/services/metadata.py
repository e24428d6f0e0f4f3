"""Metadata of one worker: asks it who it is and what it serves, and tells apart "nothing" from "not now".

Owns the questions of WRK-4 and WRK-5 and their deadlines; what answers mean is `fleet/recognition.py`'s. It changes
no worker.
"""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from smg.fleet.recognition import (
    MODELS_PATH,
    SERVER_INFO_PATHS,
    VERSION_PATH,
    answered_models,
    is_server_info,
    recognised_engine,
    told_models,
)
from smg.fleet.worker import Engine, ModelCard, Worker
from smg.services.asking import Fetch, Heard, ask

TIMEOUT_S = 5.0
"""Deadline of one question. A server that never answers one is as good as one without it."""
ANSWER_BYTES_MAX = 4 << 20
"""Longest answer that is read: a thousand models with long cards."""


class Models(msgspec.Struct, frozen=True):
    """What a worker said of its models.

    `cards` None: not to be changed, because the specification names them or the worker could not say; () = it serves
    any name (MOD-3). `document` is the decoded answer. `is_final` is False when asking again soon may tell more.
    """

    cards: tuple[ModelCard, ...] | None
    document: Any
    is_final: bool


class About(msgspec.Struct, frozen=True):
    """What a worker said of itself: engine (None: no answer at all), server info (None: none), and `is_final`."""

    engine: Engine | None
    server_info: Any
    is_final: bool


async def ask_models(fetch: Fetch, worker: Worker) -> Models:
    """Asks for `/v1/models`."""
    heard = await ask(fetch, worker, MODELS_PATH, TIMEOUT_S, bytes_max=ANSWER_BYTES_MAX)
    document = heard.document()
    cards: tuple[ModelCard, ...] | None = None
    if not told_models(worker.spec):
        if document is not None:
            cards = answered_models(document)
        elif heard.has_no_such_path or heard.is_ok:
            cards = ()
    return Models(cards, document, not _may_tell_later(heard))


async def ask_about(fetch: Fetch, worker: Worker, models: Any, *, wants_server_info: bool) -> About:
    """Asks what else is needed to know the engine, and for server info when it is wanted for itself.

    `models` is the decoded answer of `/v1/models`: when its owner tells the engine, nothing more is asked for that.
    """
    engine = worker.engine if worker.spec.runtime_type is not None else None
    if engine is None:
        owner = recognised_engine(models, None, None)
        engine = owner if owner is not Engine.GENERIC else None
    paths = [] if engine is not None else [VERSION_PATH]
    if engine is None or wants_server_info:
        paths += SERVER_INFO_PATHS
    heard: dict[str, Heard] = {}

    async def hear(path: str) -> None:
        heard[path] = await ask(fetch, worker, path, TIMEOUT_S, bytes_max=ANSWER_BYTES_MAX)

    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(hear, path)
    infos = [heard[path].document() for path in SERVER_INFO_PATHS if path in heard]
    info = next((document for document in infos if is_server_info(document)), None)
    if engine is None and (models is not None or any(answer.status for answer in heard.values())):
        engine = recognised_engine(models, heard[VERSION_PATH].document(), info)
    return About(engine, info, not any(_may_tell_later(answer) for answer in heard.values()))


def _may_tell_later(heard: Heard) -> bool:
    """Whether the question may get an answer soon: the worker was away, or its server is not done loading."""
    return bool(heard.failure) or heard.status == 429 or (heard.status >= 500 and heard.status != 501)
