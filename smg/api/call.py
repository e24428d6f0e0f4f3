"""`Call`: one inference request in our own words, as dispatch and policies see it.

Owns the facts of a request that routing needs: model, endpoint, keys, prompt. The body's bytes stay as the client
sent them (UP-1). Prompt text is worked out on first use, because most policies never ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smg.api.endpoints import Endpoint
from smg.api.prompt import (
    CHARS_PER_TOKEN,
    output_tokens_asked,
    output_tokens_max,
    prompt_text,
    prompt_tokens_estimate,
    token_ids,
)


class Call:
    """One inference request.

    `model` is the canonical name (aliases resolved, MOD-4), empty when the client gave none and none is needed.
    `body` are the client's bytes; `document` the decoded JSON object ({} for multipart bodies).
    `routing_key` is the sticky key of RT-5 or None; `target` the value of `X-SMG-Target-Worker` (RT-4) or None.
    `told` is what the last attempt found out about its answer (`gateway/relay.Told`), None before any has ended. `begun`
    is to be called with the time when the body of a streamed answer begins; `queued_s` is what the call has waited for its
    turn.
    """

    __slots__ = (
        "_text",
        "begun",
        "body",
        "document",
        "endpoint",
        "is_stream",
        "model",
        "queued_s",
        "request_id",
        "routing_key",
        "target",
        "told",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        body: bytes,
        document: dict[str, Any],
        is_stream: bool = False,
        routing_key: str | None = None,
        target: str | None = None,
        request_id: str = "",
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self.body = body
        self.document = document
        self.is_stream = is_stream
        self.routing_key = routing_key
        self.target = target
        self.request_id = request_id
        self.told: Any = None
        self.begun: Callable[[float], None] | None = None
        self.queued_s = 0.0
        self._text: str | None = None

    def text(self) -> str:
        """The routing text (RT-7), computed once."""
        text = self._text
        if text is None:
            text = self._text = prompt_text(self.endpoint, self.document)
        return text

    def token_ids(self) -> list[int] | None:
        """The prompt as token ids when the client sent token ids, else None."""
        return token_ids(self.endpoint, self.document)

    def output_tokens_max(self) -> int | None:
        """The bound on generated tokens that the client gave, or None."""
        return output_tokens_max(self.document)

    def prompt_tokens_estimate(self) -> int:
        """How many tokens the prompt is, roughly (ADM-4)."""
        return prompt_tokens_estimate(self.endpoint, self.document, self.text())

    def output_tokens_asked(self) -> int:
        """The most tokens that may be generated, over all choices; 0 when the client did not say."""
        return output_tokens_asked(self.endpoint, self.document)

    def tokens_estimate(self) -> int:
        """What the request may use in all, roughly: what is reserved for it before a worker is chosen (ADM-4)."""
        endpoint, document = self.endpoint, self.document
        if endpoint.name == "chat":  # the same without a call
            return -(-len(self.text()) // CHARS_PER_TOKEN) + output_tokens_asked(endpoint, document)
        return prompt_tokens_estimate(endpoint, document, self.text()) + output_tokens_asked(
            endpoint, document
        )
