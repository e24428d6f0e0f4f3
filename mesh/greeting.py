"""How a stream begins and why it ends: the words of HELLO, WELCOME, REFUSED and KEEPALIVE, and of questions.

Owns their layout (MessagePack arrays that may grow at their tail, docs/mesh/agent.md) and the rules of acceptance that
need no memory: label and protocol range. It must never wait, nor know which streams there are.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from mesh.errors import DecodeError
from mesh.frames import Frame, FrameType
from mesh.member import BOOT_BYTES, PROTOCOL_MAX, PROTOCOL_MIN, Address
from mesh.seal import LABEL_BYTES_MAX
from mesh.settings import HOST_BYTES_MAX, NAME_BYTES_MAX

KEPT = 1
"""HELLO flag: the dialer wants this stream to stay and to carry state. Without it the stream is for one errand."""

TEXT_BYTES_MAX = 256
QUESTION_BYTES_MAX = 64 * 1024
"""Cap of a question and of an answer; as large as a value of the replicated state."""

U64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Version = Annotated[int, msgspec.Meta(ge=0, le=255)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_BYTES_MAX)]
Boot = Annotated[bytes, msgspec.Meta(min_length=BOOT_BYTES, max_length=BOOT_BYTES)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_BYTES_MAX)]
Question = Annotated[bytes, msgspec.Meta(max_length=QUESTION_BYTES_MAX)]


class Hello(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Who speaks, and what it speaks. Sent once by each side: HELLO by the dialer, WELCOME by the acceptor."""

    protocol_min: Version
    protocol_max: Version
    name: Name
    boot: Boot
    born_s: U32
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=HOST_BYTES_MAX)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    label: Annotated[str, msgspec.Meta(max_length=LABEL_BYTES_MAX)]
    features: U64 = 0
    flags: U32 = 0

    @property
    def address(self) -> Address:
        """Where the speaker says it can be dialled."""
        return (self.host, self.port)

    @property
    def is_kept(self) -> bool:
        """The dialer wants the stream to stay."""
        return bool(self.flags & KEPT)


class Refused(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The last frame of a stream: why it ends. Act on `code`, show `text`; `name` and `boot` say who refused.

    As the body of a NOTICE: what the peer should tell its operator."""

    code: Annotated[str, msgspec.Meta(max_length=32)]
    text: Text = ""
    name: Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)] = ""
    boot: Annotated[bytes, msgspec.Meta(max_length=BOOT_BYTES)] = b""


LABEL, VERSION, DUPLICATE, BUSY, IDLE = "label", "version", "duplicate", "busy", "idle"
"""Codes of `Refused`: another cluster; no common protocol; we have a stream already; too many; no longer needed."""
UNREACHABLE = "unreachable"
"""Code of a NOTICE: the address the peer advertises cannot be dialled from here."""


class Keepalive(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One-way, when nothing else was said: digest of the sender's replicated state, fingerprint of its members."""

    digest: bytes
    fingerprint: U32


class Asked(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """ASK: a question of the library's user. ANSWER: what the other user said, with the number of the question."""

    number: U32
    content: Question | None
    """None in an answer: nobody there answers questions."""


_hello = msgspec.msgpack.Decoder(Hello)
_refused = msgspec.msgpack.Decoder(Refused)
_keepalive = msgspec.msgpack.Decoder(Keepalive)
_asked = msgspec.msgpack.Decoder(Asked)
encode = msgspec.msgpack.Encoder().encode

_FOREIGN = (msgspec.MsgspecError, RecursionError, ValueError, TypeError, OverflowError)

T = TypeVar("T")


def _decode(decoder: Any, body: bytes, what: str) -> Any:
    try:
        return decoder.decode(body)
    except _FOREIGN as error:
        raise DecodeError(f"bad {what}") from error


def decode_hello(body: bytes) -> Hello:
    """The greeting. Raises DecodeError."""
    hello: Hello = _decode(_hello, body, "greeting")
    if ":" in hello.name or len(hello.name.encode()) > NAME_BYTES_MAX:
        raise DecodeError("bad name in a greeting")
    return hello


def decode_refused(body: bytes) -> Refused:
    """The goodbye. Raises DecodeError."""
    refused: Refused = _decode(_refused, body, "goodbye")
    return refused


def decode_keepalive(body: bytes) -> Keepalive:
    """A sign of life. Raises DecodeError."""
    keepalive: Keepalive = _decode(_keepalive, body, "keep-alive")
    return keepalive


def decode_asked(body: bytes) -> Asked:
    """A question or an answer. Raises DecodeError."""
    asked: Asked = _decode(_asked, body, "question")
    return asked


def goodbye(code: str, text: str, name: str, boot: bytes) -> Frame:
    """The frame of a goodbye."""
    return Frame(FrameType.REFUSED, encode(Refused(code, text[:TEXT_BYTES_MAX], name, boot)))


def notice(code: str, text: str, name: str, boot: bytes) -> Frame:
    """The frame of a notice."""
    return Frame(FrameType.NOTICE, encode(Refused(code, text[:TEXT_BYTES_MAX], name, boot)))


def refusal(own: Hello, other: Hello) -> Refused | None:
    """Why these two cannot talk, in words for the log of the one who asked; None if they can."""
    if own.label != other.label:
        text = f"this is cluster {own.label!r}, you are of {other.label!r}"
        return Refused(LABEL, text[:TEXT_BYTES_MAX], own.name, own.boot)
    if other.protocol_min > own.protocol_max or own.protocol_min > other.protocol_max:
        text = f"{own.name} speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}, you {other.protocol_min} to {other.protocol_max}"
        return Refused(VERSION, text[:TEXT_BYTES_MAX], own.name, own.boot)
    return None
