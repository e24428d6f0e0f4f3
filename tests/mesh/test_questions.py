"""Questions under way: numbers, bounds, and who may answer what."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mesh.errors import BoundError, DecodeError, WeatherError
from mesh.frames import Frame, FrameType
from mesh.greeting import Asked, decode_asked, encode
from mesh.questions import Questions


async def test_an_answer_finds_its_question_and_no_other() -> None:
    questions, sent = Questions(10), list[Frame]()
    answers: dict[bytes, bytes] = {}

    async def ask(peer: str, content: bytes) -> None:
        answers[content] = await questions.ask(peer, content, sent.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "b", b"one")
        nursery.start_soon(ask, "c", b"two")
        await trio.testing.wait_all_tasks_blocked()
        assert all(frame.type == FrameType.ASK for frame in sent)
        asked = {decode_asked(frame.body).content: decode_asked(frame.body).number for frame in sent}
        questions.on_answer("x", encode(Asked(asked[b"one"], b"forged")))
        questions.on_answer("c", encode(Asked(asked[b"one"], b"forged")))
        questions.on_answer("b", encode(Asked(12345, b"nobody asked")))
        questions.on_answer("c", encode(Asked(asked[b"two"], b"2")))
        questions.on_answer("b", encode(Asked(asked[b"one"], b"1")))
    assert answers == {b"one": b"1", b"two": b"2"} and len(questions) == 0


async def test_a_lost_stream_ends_its_questions_only() -> None:
    questions = Questions(10)
    async with trio.open_nursery() as nursery:

        async def ask(peer: str) -> None:
            with pytest.raises(WeatherError, match=f"the stream to {peer} is closed"):
                await questions.ask(peer, b"?", lambda frame: None)

        nursery.start_soon(ask, "b")
        nursery.start_soon(ask, "c")
        await trio.testing.wait_all_tasks_blocked()
        questions.peer_gone("b")
        await trio.testing.wait_all_tasks_blocked()
        assert len(questions) == 1
        questions.peer_gone("c")


async def test_no_more_wait_than_may_and_none_is_too_long() -> None:
    questions = Questions(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(questions.ask, "b", b"?", lambda frame: None)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BoundError, match="too many"):
            await questions.ask("b", b"?", lambda frame: None)
        nursery.cancel_scope.cancel()
    with pytest.raises(BoundError, match="at most"):
        await questions.ask("b", bytes(64 * 1024 + 1), lambda frame: None)


def test_who_has_no_answerer_says_so_and_garbage_is_no_question() -> None:
    questions = Questions(1)
    assert decode_asked(questions.on_ask("b", encode(Asked(3, b"?"))).body) == Asked(3, None)
    questions.answerer = lambda peer, question: None if question == b"no" else peer.encode()
    assert decode_asked(questions.on_ask("b", encode(Asked(3, b"?"))).body) == Asked(3, b"b")
    assert decode_asked(questions.on_ask("b", encode(Asked(4, b"no"))).body) == Asked(4, None)
    for body in (
        b"",
        b"\xc1",
        encode([1]),
        encode([-1, b""]),
        encode([1, "text"]),
        encode([1, bytes(65 * 1024)]),
    ):
        with pytest.raises(DecodeError):
            questions.on_ask("b", body)


async def test_an_answer_that_comes_when_its_question_is_given_up_wakes_nobody() -> None:
    questions, sent = Questions(10), list[Frame]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(questions.ask, "b", b"?", sent.append)
        await trio.testing.wait_all_tasks_blocked()
        number = decode_asked(sent[0].body).number
        nursery.cancel_scope.cancel()
        questions.on_answer("b", encode(Asked(number, b"late")))
        questions.peer_gone("b")
        assert len(questions) == 0
    assert nursery.cancel_scope.cancelled_caught


async def test_an_answer_and_the_end_of_its_stream_wake_the_question_once() -> None:
    questions, sent, answers = Questions(10), list[Frame](), list[bytes]()

    async def ask() -> None:
        answers.append(await questions.ask("b", b"?", sent.append))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        number = decode_asked(sent[0].body).number
        questions.on_answer("b", encode(Asked(number, b"yes")))
        questions.on_answer("b", encode(Asked(number, b"twice")))
        questions.peer_gone("b")
    assert answers == [b"yes"]


async def test_a_question_that_cannot_be_sent_is_forgotten() -> None:
    def send(_frame: Frame) -> None:
        raise WeatherError("no stream")

    questions = Questions(1)
    with pytest.raises(WeatherError, match="no stream"):
        await questions.ask("b", b"?", send)
    assert len(questions) == 0
