"""The inference endpoints of contract section 9, as one table.

Owns what is fixed per endpoint: path, error dialect, request-id prefix, required members, where the prompt is.
Never looks at a request; checks over bodies are in `api/checks.py`, prompt text in `api/prompt.py`.
"""

from __future__ import annotations

import msgspec


class Endpoint(msgspec.Struct, frozen=True, eq=False):
    """One inference endpoint.

    `path` is the route template and the path sent to the worker (`upstream_path` where they differ, UP-3).
    `dialect` decides error bodies and stream failure frames: `openai`, `anthropic` or `responses`.
    `id_prefix` is the prefix of generated request ids (RID-2). `is_json` is False for multipart bodies (UP-8).
    `needs_model` is True where a missing `model` is an error (MOD-5). `may_retry` is False when a sent body may not
    be sent again (RTY-1). `takes_token_ids`: the prompt may come as token ids (`api/prompt.py`).
    """

    name: str
    path: str
    dialect: str = "openai"
    id_prefix: str = "req-"
    upstream_path: str = ""
    is_json: bool = True
    needs_model: bool = True
    may_retry: bool = True
    is_rerank: bool = False
    takes_token_ids: bool = False

    @property
    def sent_path(self) -> str:
        """The path the worker sees."""
        return self.upstream_path or self.path


CHAT = Endpoint("chat", "/v1/chat/completions", id_prefix="chatcmpl-")
COMPLETIONS = Endpoint("completions", "/v1/completions", id_prefix="cmpl-", takes_token_ids=True)
GENERATE = Endpoint("generate", "/generate", id_prefix="gnt-", needs_model=False, takes_token_ids=True)
EMBEDDINGS = Endpoint("embeddings", "/v1/embeddings", takes_token_ids=True)
RERANK_SHORT = Endpoint("rerank", "/rerank", upstream_path="/v1/rerank", needs_model=False, is_rerank=True)
RERANK = Endpoint("rerank", "/v1/rerank", needs_model=False, is_rerank=True)
CLASSIFY = Endpoint("classify", "/v1/classify", needs_model=False)
MESSAGES = Endpoint("messages", "/v1/messages", dialect="anthropic", id_prefix="msg_")
COUNT_TOKENS = Endpoint("count_tokens", "/v1/messages/count_tokens", dialect="anthropic", id_prefix="msg_")
RESPONSES = Endpoint("responses", "/v1/responses", dialect="responses", id_prefix="resp-")
TRANSCRIPTIONS = Endpoint("transcriptions", "/v1/audio/transcriptions", is_json=False, may_retry=False)

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        CHAT,
        COMPLETIONS,
        GENERATE,
        EMBEDDINGS,
        RERANK_SHORT,
        RERANK,
        CLASSIFY,
        MESSAGES,
        COUNT_TOKENS,
        RESPONSES,
        TRANSCRIPTIONS,
    )
}
