"""Books of several nodes: whole over any number of pages, and a node that does not tell its own is named."""

from __future__ import annotations

import pytest
import trio

from mesh import WeatherError
from smg.bridge import usage as usage_module
from smg.bridge import words
from smg.bridge.usage import SharedUsage
from smg.bridge.words import AskedUsage, UsagePage
from smg.tenancy.usage import Book, NodeBook


def book_of(count: int, name: str = "auth:t", model: str = "m") -> Book:
    book = Book()
    for number in range(count):
        entry = book.entry(f"{name}{number}", model)
        entry.requests, entry.prompt_tokens = number, 2 * number
    return book


class Nodes:
    """Nodes that ask each other; `silent` ones never answer."""

    def __init__(self, **books: Book) -> None:
        self.silent: set[str] = set()
        self.gone: set[str] = set()
        self.asked = 0
        self.rooms = {
            name: SharedUsage(
                book,
                since_s=float(place),
                ask=self.ask,
                names=lambda own=name: [n for n in books if n != own],
            )
            for place, (name, book) in enumerate(books.items())
        }

    async def ask(self, peer: str, question: bytes) -> bytes:
        self.asked += 1
        if peer in self.silent:
            await trio.sleep_forever()
        if peer in self.gone:
            raise WeatherError("no stream")
        asked = words.read_question(question)
        assert isinstance(asked, AskedUsage)
        answer = self.rooms[peer].answer(asked)
        assert len(answer) <= 64 * 1024
        return answer


async def test_a_book_of_many_pages_arrives_whole():
    long = "auth:" + "x" * 100
    nodes = Nodes(a=Book(), b=book_of(2000, long), c=book_of(3), d=Book())
    books, missing = await nodes.rooms["a"].books(None, None)
    assert missing == [] and [book.node for book in books] == ["b", "c", "d"]
    assert [len(book.rows) for book in books] == [2000, 3, 0]
    assert sum(row.prompt_tokens for row in books[0].rows) == sum(range(2000)) * 2
    assert len({row.tenant for row in books[0].rows}) == 2000
    assert books[1] == NodeBook("c", 2.0, book_of(3).rows())
    assert nodes.asked > 5


async def test_only_what_was_asked_for_travels():
    nodes = Nodes(a=Book(), b=book_of(1500))
    books, _ = await nodes.rooms["a"].books("auth:t1400", None)
    assert [row.tenant for row in books[0].rows] == ["auth:t1400"]
    assert (await nodes.rooms["a"].books(None, "other"))[0][0].rows == ()


async def test_who_is_silent_or_gone_is_missing_and_holds_up_nobody(autojump_clock: object):
    nodes = Nodes(a=Book(), b=book_of(1), c=book_of(1), d=book_of(1))
    nodes.silent, nodes.gone = {"b"}, {"c"}
    began_s = trio.current_time()
    books, missing = await nodes.rooms["a"].books(None, None)
    assert ([book.node for book in books], missing) == (["d"], ["b", "c"])
    assert trio.current_time() - began_s == pytest.approx(usage_module.PATIENCE_S)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xc1",
        words.encode(UsagePage(words.VERSION, 1.0, (), 0, False)),  # a page that leads nowhere
        words.encode(UsagePage(words.VERSION + 1, 1.0, (), 1, True)),
    ],
)
async def test_an_answer_that_is_no_page_of_a_book_is_none(answer: bytes):
    async def ask(peer: str, question: bytes) -> bytes:
        return answer

    room = SharedUsage(Book(), since_s=0.0, ask=ask, names=lambda: ["b"])
    assert await room.books(None, None) == ([], ["b"])


async def test_a_book_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage_module, "PAGES_MAX", 5)
    asked = []

    async def ask(peer: str, question: bytes) -> bytes:
        asked.append(question)
        return words.encode(UsagePage(words.VERSION, 1.0, (), len(asked), False))

    room = SharedUsage(Book(), since_s=0.0, ask=ask, names=lambda: ["b"])
    assert await room.books(None, None) == ([], ["b"])
    assert len(asked) == 5


async def test_names_that_are_too_long_for_an_answer_are_cut():
    nodes = Nodes(a=Book(), b=book_of(200, "auth:", "m" * 100_000))
    books, missing = await nodes.rooms["a"].books(None, None)
    assert missing == [] and len(books[0].rows) == 200
    assert {len(row.model) for row in books[0].rows} == {usage_module.NAME_CHARS}


def test_a_book_that_grows_while_it_is_read_is_read_on():
    book = book_of(600)
    room = SharedUsage(book, since_s=0.0, ask=Nodes().ask, names=tuple)
    first = words.read_usage_page(room.answer(AskedUsage(words.VERSION, words.USAGE, 0)))
    assert first is not None and not first.is_last
    book.entry("auth:new", "m")
    second = words.read_usage_page(room.answer(AskedUsage(words.VERSION, words.USAGE, first.next)))
    assert second is not None and second.is_last
    assert len(first.rows) + len(second.rows) == 601
    beyond = words.read_usage_page(room.answer(AskedUsage(words.VERSION, words.USAGE, 10_000)))
    assert beyond is not None and beyond.is_last and beyond.rows == ()
