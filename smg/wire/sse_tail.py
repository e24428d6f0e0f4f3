"""What the last bytes of an event stream tell: is an event open, was the end marker sent, which number comes next.

Owns these three questions over bytes that are relayed without being parsed (STR-1). Never keeps more than a few bytes
of a stream and never looks into the text of events.
"""

from __future__ import annotations

import re

TAIL_BYTES = 4096
"""The tail that `has_end_marker` needs: engines' last events with `usage` are below 2 KiB."""

_DONE = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\][ \t]*(?:[\r\n]|\Z)")
_MESSAGE_STOP = re.compile(
    rb"(?:\A|[\r\n])(?:event: ?message_stop[ \t]*(?:[\r\n]|\Z)|data: ?\{[^\r\n]*\"type\": ?\"message_stop\")"
)
_RESPONSE_END = re.compile(
    rb"(?:\A|[\r\n])event: ?response\.(?:completed|incomplete|failed)[ \t]*[\r\n]"
    rb"|\"type\": ?\"response\.(?:completed|incomplete|failed)\""
)
_SEQUENCE = re.compile(rb"\"sequence_number\": ?(\d{1,15})[,}\r\n ]")

_TEXTS = re.compile(
    rb"\"(?:content|text|delta|reasoning_content|reasoning|thinking|partial_json|arguments)\": ?\"((?:[^\"\\]|\\.)*)\""
)
BYTES_PER_TOKEN = 4
"""Of text under the usual vocabularies; for estimates (ADM-4)."""

# A watched word may be cut by two chunks: this many bytes of the last chunk are looked at again.
_CARRY_BYTES = 64


def is_between_events(tail: bytes) -> bool:
    """True when `tail`, the last bytes sent, ends with a blank line, or when nothing was sent yet."""
    return not tail or tail.endswith((b"\n\n", b"\n\r\n", b"\r\r"))


def closing(tail: bytes) -> bytes:
    """The bytes that close an incomplete event after `tail` with a blank line (STR-6); empty between events."""
    if is_between_events(tail):
        return b""
    return b"\n" if tail.endswith(b"\n") else b"\n\n"


def has_end_marker(dialect: str, tail: bytes) -> bool:
    """True when the worker's own end marker is in `tail` (STR-8).

    For `responses` the last event carries the whole answer and may be longer than any tail: `ResponsesWatch` sees it
    as it passes, this function only when it is short.
    """
    if dialect == "anthropic":
        return _MESSAGE_STOP.search(tail) is not None
    if dialect == "responses":
        return _RESPONSE_END.search(tail) is not None
    return b"[DONE]" in tail and _DONE.search(tail) is not None


def tokens_streamed(tail: bytes, body_bytes: int) -> int:
    """How many tokens a stream of `body_bytes` brought, roughly, by the look of its last bytes (ADM-4).

    Engines send an event for each token, or for several at once: the larger one counts of the events and a fourth of the text
    in `tail`, and the rest of the stream is taken to be like it.
    """
    if not tail:
        return 0
    events = tail.count(b"data:") - tail.count(b"[DONE]")
    text_bytes = sum(map(len, _TEXTS.findall(tail)))
    share = max(body_bytes / len(tail), 1.0)
    return round(max(events, text_bytes / BYTES_PER_TOKEN, 0) * share)


class ResponsesWatch:
    """Watches a `/v1/responses` stream for its end event and its sequence numbers (STR-7, STR-8).

    Two searches per chunk, only on this endpoint: the failure frame needs the next number, and the end event is too
    long for a tail. `has_ended`: the worker's last event has begun. `next_number`: one more than the last number seen.
    """

    __slots__ = ("_carry", "has_ended", "next_number")

    def __init__(self) -> None:
        self._carry = b"\n"
        self.has_ended = False
        self.next_number = 0

    def feed(self, chunk: bytes) -> None:
        """Looks at the next bytes of the stream."""
        data = self._carry + chunk
        at = data.rfind(b'"sequence_number":')
        while at >= 0:
            match = _SEQUENCE.match(data, at)
            if match is not None:
                self.next_number = int(match[1]) + 1
                break
            at = data.rfind(b'"sequence_number":', 0, at)  # the last one is cut: it is seen whole next time
        if not self.has_ended and b"response." in data:
            self.has_ended = _RESPONSE_END.search(data) is not None
        self._carry = data[-_CARRY_BYTES:]
