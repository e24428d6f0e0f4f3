"""Questions of the library's users to other members, and their answers, over the pair's stream.

Owns the numbers and the waiting of questions under way. It must never look into a question. Nothing is repeated: a
question whose stream breaks fails at once, and who asked decides alone.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.errors import BoundError, WeatherError
from mesh.frames import Frame, FrameType
from mesh.greeting import QUESTION_BYTES_MAX, Asked, decode_asked, encode

Answerer = Callable[[str, bytes], bytes | None]
"""(peer, question) → answer, at once; None: we do not answer such questions."""

NUMBER_MASK = 0xFFFFFFFF


class _Question:
    """One that waits: for whom, and the task that is parked until `answer` or `error` is there."""

    __slots__ = ("answer", "error", "peer", "task")

    def __init__(self, peer: str, task: trio.lowlevel.Task) -> None:
        self.peer = peer
        self.task = task
        self.answer: bytes | None = None
        self.error = ""


class Questions:
    """All questions of one agent; at most `waiting_max` without an answer."""

    def __init__(self, waiting_max: int) -> None:
        self._waiting: dict[int, _Question] = {}
        self._max = waiting_max
        self._number = 0
        self.answerer: Answerer | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(self, peer: str, content: bytes, send: Callable[[Frame], None]) -> bytes:
        """The answer. Raises BoundError for too long or too many, WeatherError when no answer can come any more.
        Waits for ever otherwise: put a deadline around it."""
        if len(content) > QUESTION_BYTES_MAX:
            raise BoundError(f"a question has at most {QUESTION_BYTES_MAX} bytes")
        if len(self._waiting) >= self._max:
            raise BoundError("too many questions wait for their answers")
        number = self._number = (self._number + 1) & NUMBER_MASK
        question = self._waiting[number] = _Question(peer, trio.lowlevel.current_task())

        def aborted(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._waiting.pop(number, None)
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            send(Frame(FrameType.ASK, encode(Asked(number, content))))
        except BaseException:
            del self._waiting[number]
            raise
        # Who ends the wait takes the question out of the table first, so that nobody wakes the task twice.
        await trio.lowlevel.wait_task_rescheduled(aborted)
        if question.answer is None:
            raise WeatherError(question.error)
        return question.answer

    def on_ask(self, peer: str, body: bytes) -> Frame:
        """The frame that answers a peer's question. Raises DecodeError."""
        asked = decode_asked(body)
        answer = None
        if self.answerer is not None and asked.content is not None:
            answer = self.answerer(peer, asked.content)
            assert answer is None or len(answer) <= QUESTION_BYTES_MAX
        return Frame(FrameType.ANSWER, encode(Asked(asked.number, answer)))

    def on_answer(self, peer: str, body: bytes) -> None:
        """A peer answered; answers to what was not asked of this peer are ignored. Raises DecodeError."""
        asked = decode_asked(body)
        question = self._waiting.get(asked.number)
        if question is not None and question.peer == peer:
            question.answer = asked.content
            question.error = f"{peer} does not answer such questions"
            self._wake(asked.number, question)

    def peer_gone(self, peer: str) -> None:
        """Its stream is closed: no answer will come."""
        for number, question in list(self._waiting.items()):
            if question.peer == peer:
                question.error = f"the stream to {peer} is closed"
                self._wake(number, question)

    def _wake(self, number: int, question: _Question) -> None:
        del self._waiting[number]
        trio.lowlevel.reschedule(question.task)
