"""The text of a prompt that routing looks at (RT-7), and how large a request is in tokens, out of a decoded body.

Pure functions over decoded JSON. Bodies were checked only as far as MOD-6 goes, so anything may hide in them: what
is not text is passed over, never an error. Text never leaves the node from here; the index keeps hashes.
"""

from __future__ import annotations

from typing import Any

from smg.api.endpoints import Endpoint

CHARS_PER_TOKEN = 4
"""Of English text under the usual vocabularies; what estimates of the size of a request go by (ADM-4)."""

_IDS_MEMBER = {"generate": "input_ids", "completions": "prompt", "embeddings": "input"}
_OUTPUT_MEMBERS = {
    "chat": "max_tokens",
    "completions": "max_tokens",
    "messages": "max_tokens",
    "responses": "max_output_tokens",
    "generate": "max_new_tokens",
}


def prompt_text(endpoint: Endpoint, document: dict[str, Any]) -> str:
    """The routing text of a request body (RT-7); empty when there is none.

    Chat and messages: system and message texts in order; completions: prompt; generate: text; responses:
    instructions and input; rerank: query; embeddings and classify: input. Token-id prompts have no text here, see
    `token_ids`.
    """
    name = endpoint.name
    pieces: list[str] = []
    if name in ("chat", "messages", "count_tokens"):
        system = document.get("system")
        if system is not None:
            _add_content(system, pieces)
        messages = document.get("messages")
        if type(messages) is list:
            for message in messages:  # `_add_messages` without a call: most prompts of all
                content = message.get("content") if type(message) is dict else None
                if type(content) is str:
                    pieces.append(content)
                elif content is not None:
                    _add_content(content, pieces)
                elif type(message) is str:
                    pieces.append(message)
    elif name == "completions":
        _add_content(document.get("prompt"), pieces)
    elif name == "generate":
        _add_content(document.get("text"), pieces)
    elif name == "responses":
        _add_content(document.get("instructions"), pieces)
        given = document.get("input")
        if isinstance(given, str):
            pieces.append(given)
        else:
            _add_messages(given, pieces)
    elif name == "rerank":
        _add_content(document.get("query"), pieces)
    else:
        _add_content(document.get("input"), pieces)
    return pieces[0] if len(pieces) == 1 else "\n".join(pieces)


def token_ids(endpoint: Endpoint, document: dict[str, Any]) -> list[int] | None:
    """The prompt as token ids where the client sent it so (`input_ids`, or a flat list of ints as `prompt`/`input`)."""
    if endpoint.name == "generate":
        given = document.get("input_ids")
    elif endpoint.name == "completions":
        given = document.get("prompt")
    elif endpoint.name == "embeddings":
        given = document.get("input")
    else:
        return None
    if isinstance(given, list) and given and type(given[0]) is int:
        return given if all(type(token) is int for token in given) else None
    return None


def output_tokens_max(document: dict[str, Any]) -> int | None:
    """The bound on generated tokens that the client gave, or None."""
    for member in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = document.get(member)
        if type(value) is int and value >= 0:
            return value
    sampling = document.get("sampling_params")
    if isinstance(sampling, dict):
        value = sampling.get("max_new_tokens")
        if type(value) is int and value >= 0:
            return value
    return None


def prompt_tokens_estimate(endpoint: Endpoint, document: dict[str, Any], text: str) -> int:
    """How many tokens a prompt is, roughly: its characters / 4, or as many as ids were sent (ADM-4).

    `text` is its routing text. A reranker reads the query with each document. 0 for what no model reads (count_tokens) and for
    what has no text (audio).
    """
    name = endpoint.name
    if name == "count_tokens":
        return 0
    if endpoint.takes_token_ids:
        given = document.get(_IDS_MEMBER[name])
        if isinstance(given, list) and given:
            if type(given[0]) is int:
                return len(given)
            if isinstance(given[0], list):
                return sum(len(ids) for ids in given if isinstance(ids, list))
    chars = len(text)
    if name == "rerank":
        documents = document.get("documents")
        if isinstance(documents, list):
            pieces: list[str] = []
            _add_content(documents, pieces)
            chars = chars * len(documents) + sum(map(len, pieces))
    return -(-chars // CHARS_PER_TOKEN)


def output_tokens_asked(endpoint: Endpoint, document: dict[str, Any]) -> int:
    """The most tokens that may be generated as the endpoint's own members say, over all choices; 0 when they say nothing."""
    if endpoint.name == "chat":  # most of all: the lines below without their calls
        most = document.get("max_completion_tokens")
        if type(most) is not int or most <= 0:
            most = document.get("max_tokens")
            if type(most) is not int or most <= 0:
                return 0
        return most * (_count(document["n"]) or 1) if "n" in document else most
    member = _OUTPUT_MEMBERS.get(endpoint.name)
    if member is None:
        return 0
    words: Any = document
    if endpoint.name == "generate":
        words = document.get("sampling_params")
        if not isinstance(words, dict):
            return 0
    most = _count(words.get(member))
    if not most:
        return 0
    prompts = document.get("text" if endpoint.name == "generate" else "prompt")
    is_batch = isinstance(prompts, list) and bool(prompts) and type(prompts[0]) is not int
    return most * max(_count(words.get("n")), 1) * (len(prompts) if is_batch and prompts else 1)


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def _add_messages(messages: object, pieces: list[str]) -> None:
    if not isinstance(messages, list):
        return
    for message in messages:
        if type(message) is dict:
            content = message.get("content")
            if type(content) is str:
                pieces.append(content)
            else:
                _add_content(content, pieces)
        elif type(message) is str:
            pieces.append(message)


def _add_content(content: object, pieces: list[str]) -> None:
    """Adds a string, a list of strings, or the texts of a list of content parts."""
    if isinstance(content, str):
        pieces.append(content)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, dict):
                text = part.get("text")
                if isinstance(text, str):
                    pieces.append(text)
