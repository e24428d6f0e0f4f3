"""The object that clients of `/v1/rerank` expect, around the bare array that some workers answer (MOD-8).

Owns this one change of a worker's answer, the only one the gateway makes. An answer that is no array of scored
documents comes back as it was, byte for byte.
"""

from __future__ import annotations

from typing import Any

import msgspec

from smg.api.endpoints import Endpoint


def wraps(endpoint: Endpoint, status: int, content_type: bytes | None) -> bool:
    """Whether this answer may be a bare array that has to be wrapped."""
    return (
        endpoint.name == "rerank"
        and status == 200
        and content_type is not None
        and content_type.strip().lower().startswith(b"application/json")
    )


def wrapped(body: bytes, document: dict[str, Any], request_id: str, created_s: float) -> bytes:
    """`body` as the rerank object, best score first, `top_k` and `return_documents` of the request applied.

    `document` is the request, `created_s` the Unix time. Anything but an array of objects with a numeric `score` comes
    back unchanged.
    """
    if body[:64].lstrip()[:1] != b"[":
        return body
    try:
        rows = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    if not all(type(row) is dict and type(row.get("score")) in (int, float) for row in rows):
        return body
    rows.sort(key=lambda row: row["score"], reverse=True)  # stable: equal scores keep the worker's order
    top_k = document.get("top_k")
    if type(top_k) is int and top_k >= 0:
        del rows[top_k:]
    shows_documents = document.get("return_documents")
    if shows_documents is False:
        for row in rows:
            row.pop("document", None)
    elif shows_documents is True:
        _add_documents(rows, document.get("documents"))
    return msgspec.json.encode(
        {
            "results": rows,
            "model": document.get("model") or "",
            "usage": None,
            "object": "rerank",
            "id": request_id,
            "created": int(created_s),
        }
    )


def _add_documents(rows: list[dict[str, Any]], documents: object) -> None:
    """Puts the texts in where the worker left them out."""
    if not isinstance(documents, list):
        return
    for row in rows:
        index = row.get("index")
        if "document" not in row and type(index) is int and 0 <= index < len(documents):
            row["document"] = documents[index]
