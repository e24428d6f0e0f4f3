"""Who is this worker: engine, model names and data-parallel size, read out of its own answers.

Owns the rules WRK-4 (which engine), WRK-5 (which model names) and the `dp_size` of WRK-17. Works on documents that
somebody else fetched and decoded; a worker may answer anything, so what does not fit is passed over and never an
error. It never asks, waits or remembers: `services/worker_jobs.py` does.
"""

from __future__ import annotations

from typing import Any

from smg.fleet.worker import Engine, ModelCard, WorkerSpec

MODELS_PATH = "/v1/models"
VERSION_PATH = "/version"
SERVER_INFO_PATHS = ("/server_info", "/get_server_info")
"""Where engines describe themselves; newer SGLang has the first, older ones only the second."""

MODELS_MAX = 1024
"""Most models that one worker may bring (adapters count as models); each costs a pool in the registry."""
NAME_CHARS_MAX = 512
"""Longest model name or alias that is believed; real ones are paths of at most a few hundred characters."""
DP_SIZE_MAX = 512
"""Most data-parallel ranks that one answer may create: each becomes a worker with probes of its own."""

_OWNERS = {"sglang": Engine.SGLANG, "nvidia": Engine.SGLANG, "vllm": Engine.VLLM}
_NAME_LABELS = ("served_model_name", "model_path")
_NO_NAME = ("", "unknown")


def recognised_engine(models: Any, version: Any, server_info: Any) -> Engine:
    """The engine behind the decoded answers of `/v1/models`, `/version` and `/server_info`; None = no answer (WRK-4).

    `owned_by` of the models decides first, then who answers at all; `GENERIC` when nothing tells. `nvidia` is what
    NVIDIA's builds of SGLang say.
    """
    for entry in _entries(models):
        owner = entry.get("owned_by")
        if isinstance(owner, str) and owner.lower() in _OWNERS:
            return _OWNERS[owner.lower()]
    if isinstance(version, dict) and isinstance(version.get("version"), str):
        return Engine.VLLM
    if is_server_info(server_info):
        return Engine.SGLANG
    return Engine.GENERIC


def is_server_info(document: Any) -> bool:
    """Whether this is an engine's description of itself, not the catch-all answer of a server without such a path."""
    return (
        isinstance(document, dict)
        and bool(document)
        and not any(member in document for member in ("error", "choices", "detail"))
    )


def told_models(spec: WorkerSpec) -> tuple[ModelCard, ...]:
    """The models that the specification names: `model_id`, `models[]`, else its labels; empty when it names none.

    What is here wins over what the worker says (WRK-5). The name `unknown` counts as none (MOD-3).
    """
    cards: dict[str, ModelCard] = {}
    if spec.model_id is not None and _is_name(spec.model_id):
        cards[spec.model_id] = ModelCard(spec.model_id)
    for card in spec.models:
        if _is_name(card.id):
            cards[card.id] = card
    if cards:
        return tuple(cards.values())
    for label in _NAME_LABELS:
        name = spec.labels.get(label)
        if name is not None and _is_name(name):
            return (ModelCard(name),)
    return ()


def answered_models(models: Any) -> tuple[ModelCard, ...]:
    """All models of a decoded `/v1/models` answer in their order, with aliases where entries carry some (MOD-4)."""
    cards: dict[str, ModelCard] = {}
    for entry in _entries(models):
        name = entry.get("id")
        if not isinstance(name, str) or not _is_name(name) or name in cards:
            continue
        given = entry.get("aliases")
        aliases = given[:MODELS_MAX] if isinstance(given, list) else []
        cards[name] = ModelCard(
            name,
            tuple(alias for alias in aliases if isinstance(alias, str) and _is_name(alias) and alias != name),
        )
        if len(cards) == MODELS_MAX:
            break
    return tuple(cards.values())


def dp_size(spec: WorkerSpec, server_info: Any) -> int:
    """Data-parallel ranks of the worker: specification, its label `dp_size`, or `/server_info`; 1 when nothing tells."""
    if spec.dp_size is not None:
        return _bounded(spec.dp_size)
    label = spec.labels.get("dp_size", "")
    if label.isascii() and label.isdigit():
        return _bounded(int(label[:9]))
    if isinstance(server_info, dict):
        told = server_info.get("dp_size")
        if type(told) is int:
            return _bounded(told)
    return 1


def _entries(models: Any) -> list[dict[str, Any]]:
    """The model entries of `{"data":[...]}`, of `{"models":[...]}` or of a bare list."""
    found = models
    if isinstance(models, dict):
        found = models.get("data")
        if not isinstance(found, list):
            found = models.get("models")
    if not isinstance(found, list):
        return []
    return [entry for entry in found if isinstance(entry, dict)]


def _is_name(name: str) -> bool:
    return name not in _NO_NAME and len(name) <= NAME_CHARS_MAX and name.isprintable()


def _bounded(size: int) -> int:
    return max(1, min(size, DP_SIZE_MAX))
