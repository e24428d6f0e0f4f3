"""A node with a limits file and two tenants with keys, and what is left to them: for the tests of section 14 and of usage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.fake_worker import FakeWorker, fake_worker
from tests.e2e.gateway import CHAT, HELLO, Gateway, running_gateway

KEYS = ("--tenant-api-key", "red:key-of-red", "--tenant-api-key", "blue:key-of-blue")
RED, BLUE = "authorization: Bearer key-of-red", "authorization: Bearer key-of-blue"
LIMITED = "tenant_rate_limit_exceeded"

ENDPOINTS: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": "m", "prompt": "a"},
    "/generate": {"model": "m", "text": "a"},
    "/v1/embeddings": {"model": "m", "input": "a"},
    "/rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "/v1/classify": {"model": "m", "input": "a"},
    "/v1/messages": {**HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": HELLO,
    "/v1/responses": {"model": "m", "input": "a"},
}


def flags(tmp_path: Path, text: str) -> tuple[str, ...]:
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    return "--tenant-rate-limit-enabled", "--tenant-rate-limit-config", str(file), *KEYS


def red(requests: int | None = None, tokens: int | None = None) -> str:
    lines = ["tenants:", "  - tenant_key: auth:red"]
    lines += [] if requests is None else [f"    requests_per_minute: {requests}"]
    lines += [] if tokens is None else [f"    tokens_per_minute: {tokens}"]
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def limited(tmp_path: Path, text: str, *more: str) -> AsyncIterator[tuple[Gateway, FakeWorker]]:
    async with fake_worker("m") as worker:
        async with running_gateway(*flags(tmp_path, text), *more, workers=[worker]) as gateway:
            yield gateway, worker


@asynccontextmanager
async def still(tmp_path: Path, text: str, *more: str) -> AsyncIterator[tuple[Gateway, FakeWorker]]:
    """As `limited`, and nothing is refilled, so that balances can be compared on a slow machine too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smg.tenancy.limits.SECONDS_PER_MINUTE", 1e12)
        async with limited(tmp_path, text, *more) as both:
            yield both


def left(gateway: Gateway, kind: str = "tokens", tenant: str = "auth:red") -> int:
    """What is left in the only bucket of a kind."""
    limits = gateway.node.accounting.limits
    assert limits is not None
    now = trio.current_time()
    (found,) = [
        bucket.balance(now)
        for bucket in limits.buckets()
        if bucket.kind == kind and bucket.key.startswith(tenant.encode() + b"\0")
    ]
    return round(found)


async def usage(gateway: Gateway, tenant: str = "auth:red", model: str = "m") -> dict[str, int]:
    """The numbers of a line of the book; the admin gate is closed here, so it is read inside."""
    (row,) = gateway.node.accounting.accounts.book.rows(tenant, model)
    return {
        "requests": row.requests,
        "prompt": row.prompt_tokens,
        "cached": row.cached_tokens,
        "completion": row.completion_tokens,
        "estimated": row.estimated_requests,
    }


def told(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}
