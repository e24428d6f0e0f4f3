"""STR-4, STR-6 to STR-8: what the end of a stream tells."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.wire.sse_tail import ResponsesWatch, closing, has_end_marker, is_between_events, tokens_streamed


@pytest.mark.parametrize(
    "tail", [b"", b"data: 1\n\n", b"data: 1\r\n\r\n", b": ping\n\n", b"x\n\n\n", b"data: 1\r\r", b"a\n\r\n"]
)
def test_str_4_between_two_events(tail: bytes) -> None:
    assert is_between_events(tail)
    assert closing(tail) == b""


@pytest.mark.parametrize(
    "tail", [b"data: 1", b"data: 1\n", b"data: 1\r\n", b"data: 1\r", b"data: 1\r\n\r", b"\n\ndata: {"]
)
def test_str_4_inside_an_event(tail: bytes) -> None:
    assert not is_between_events(tail)


@pytest.mark.parametrize(
    "tail", [b"data: 1", b"data: 1\n", b"data: 1\r\n", b"data: 1\r", b"data: 1\r\n\r", b"\n\ndata: {"]
)
def test_str_6_an_open_event_is_closed_by_a_blank_line(tail: bytes) -> None:
    closed = (tail + closing(tail)).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert closed.endswith(b"\n\n")


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DONE]\n\n",
        b"data:[DONE]\n\n",
        b'data: {"x":1}\r\n\r\ndata: [DONE]\r\n\r\n',
        b"data: {}\n\ndata: [DONE]",
        b"data: {}\n\ndata: [DONE]\n\n: ping\n\n",
    ],
)
def test_str_8_the_marker_of_openai_streams(tail: bytes) -> None:
    assert has_end_marker("openai", tail)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n',
        b'data: {"content":"x\\ndata: [DONE]\\n\\n"}\n\n',
        b"data: [DONE",
        b"data: [DONE]x\n\n",
        b"event: message_stop\n\n",
    ],
)
def test_str_8_text_that_speaks_of_the_marker_is_none(tail: bytes) -> None:
    assert not has_end_marker("openai", tail)


@pytest.mark.parametrize(
    "tail",
    [
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        b'event:message_stop\r\ndata: {"type": "message_stop"}\r\n\r\n',
        b'data: {"type":"message_stop"}\n\n',
        b"event: message_stop\n",
    ],
)
def test_str_8_the_marker_of_messages(tail: bytes) -> None:
    assert has_end_marker("anthropic", tail)


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DONE]\n\n",
        b'event: message_delta\ndata: {"type":"message_delta"}\n\n',
        b'data: {"delta":{"text":"event: message_stop"}}\n\n',
        b'data: {"delta":{"text":"{\\"type\\":\\"message_stop\\"}"}}\n\n',
    ],
)
def test_str_8_messages_without_the_marker(tail: bytes) -> None:
    assert not has_end_marker("anthropic", tail)


def responses_events(last: str = "response.completed", text: str = "hi", named: bool = True) -> bytes:
    pieces = []
    kinds = ["response.created", "response.output_text.delta", last]
    for number, kind in enumerate(kinds):
        document = {"type": kind, "sequence_number": number, "response": {"text": text}}
        pieces.append((f"event: {kind}\n" if named else "") + f"data: {json.dumps(document)}\n\n")
    return "".join(pieces).encode()


@pytest.mark.parametrize("last", ["response.completed", "response.incomplete", "response.failed"])
@pytest.mark.parametrize("named", [True, False])
def test_str_8_the_marker_of_responses_is_seen_however_long_its_event_is(last: str, named: bool) -> None:
    whole = responses_events(last, "x" * 20_000, named)
    for seed in range(5):
        watch = ResponsesWatch()
        rng, at = Random(seed), 0
        while at < len(whole):
            size = rng.randint(1, 700)
            watch.feed(whole[at : at + size])
            at += size
        assert watch.has_ended
        assert watch.next_number == 3


def test_str_8_responses_that_speak_of_the_marker_have_not_ended() -> None:
    text = 'event: response.completed\n{"type":"response.completed","sequence_number":99}'
    watch = ResponsesWatch()
    watch.feed(responses_events("response.output_text.done", text))
    assert not watch.has_ended
    assert watch.next_number == 3
    assert not has_end_marker("responses", responses_events("response.output_text.done", text))
    assert has_end_marker("responses", responses_events())


@given(st.lists(st.integers(1, 40)))
def test_str_7_the_next_number_is_the_same_for_every_cut(cuts: list[int]) -> None:
    whole = b"".join(b'data: {"sequence_number": %d, "type": "x"}\n\n' % number for number in range(12))
    watch = ResponsesWatch()
    at = 0
    for size in cuts:
        watch.feed(whole[at : at + size])
        at += size
    watch.feed(whole[at:])
    assert watch.next_number == 12


def test_str_7_a_stream_without_numbers_starts_at_0() -> None:
    watch = ResponsesWatch()
    watch.feed(b"data: {}\n\n")
    assert watch.next_number == 0


def chat_piece(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


def test_adm_4_an_event_counts_as_a_token_and_a_long_text_as_more() -> None:
    events = chat_piece("a") * 20
    assert tokens_streamed(events, len(events)) == 20
    assert tokens_streamed(events + b"data: [DONE]\n\n", len(events)) == 20
    several = chat_piece("x" * 40) * 3
    assert tokens_streamed(several, len(several)) == 30
    quoted = chat_piece('x\\"' * 20)
    assert tokens_streamed(quoted, len(quoted)) == 15


def test_adm_4_what_went_by_is_taken_to_be_like_the_tail() -> None:
    tail = chat_piece("a") * 10
    assert tokens_streamed(tail, 50 * len(tail)) == 500
    assert tokens_streamed(tail, 1) == 10
    assert tokens_streamed(b"", 1_000_000) == 0


@given(st.binary(max_size=300), st.integers(0, 10**9))
def test_adm_4_any_bytes_give_a_number(tail: bytes, size: int) -> None:
    assert tokens_streamed(tail, size) >= 0
