"""The book of usage: nothing lost, nothing twice, and no more lines than there may be."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from smg.tenancy.usage import OTHER, Book, Names, NodeBook, Row, summed


def count(book: Book, tenant: str, model: str, prompt: int = 1, completion: int = 0) -> None:
    entry = book.entry(tenant, model)
    entry.requests += 1
    entry.prompt_tokens += prompt
    entry.completion_tokens += completion


def test_a_line_is_a_tenant_and_a_model():
    book = Book()
    count(book, "auth:red", "m", 5, 2)
    count(book, "auth:red", "m", 5, 2)
    count(book, "auth:red", "n")
    count(book, "auth:blue", "m")
    assert book.rows() == (
        Row("auth:blue", "m", 1, 1, 0, 0, 0),
        Row("auth:red", "m", 2, 10, 0, 4, 0),
        Row("auth:red", "n", 1, 1, 0, 0, 0),
    )
    assert [row.model for row in book.rows("auth:red")] == ["m", "n"]
    assert [row.tenant for row in book.rows(model="m")] == ["auth:blue", "auth:red"]
    assert book.rows("auth:red", "n") == (Row("auth:red", "n", 1, 1, 0, 0, 0),)
    assert book.rows("auth:green") == ()


def test_addresses_cannot_take_the_lines_of_tenants_with_keys():
    book = Book(entries_max=10, guests_max=3)
    for number in range(100):
        count(book, f"ip:{number}", "m")
    for number in range(6):
        count(book, f"auth:{number}", "m")
    rows = {row.tenant: row.requests for row in book.rows()}
    assert sum(rows.values()) == 106
    assert rows[OTHER] == 97 and sum(name.startswith("ip:") for name in rows) == 3
    assert sum(name.startswith("auth:") for name in rows) == 6
    count(book, "auth:too-many", "m")
    assert {row.tenant: row.requests for row in book.rows()}[OTHER] == 98


def test_a_full_book_counts_what_is_left_in_one_line():
    book = Book(entries_max=2)
    for number in range(50):
        count(book, f"auth:{number}", f"model-{number}")
    assert len(book.rows()) == 3
    assert book.rows(OTHER) == (Row(OTHER, OTHER, 48, 48, 0, 0, 0),)


@given(
    st.lists(st.tuples(st.sampled_from(("auth:a", "auth:b", "ip:1", "ip:2", OTHER)), st.sampled_from("mno")))
)
def test_every_request_is_in_exactly_one_line(asked: list[tuple[str, str]]):
    book = Book(entries_max=4, guests_max=2)
    for tenant, model in asked:
        count(book, tenant, model)
    assert sum(row.requests for row in book.rows()) == len(asked)
    assert len(book.rows()) <= 4 + 1
    scraped = sum(value for name, _, value in book.samples() if name == "smg_tenant_requests_total")
    assert scraped == len(asked)


def test_scraped_names_are_few_and_sums_are_right(monkeypatch):
    from smg.tenancy import usage

    monkeypatch.setattr(usage, "LABELLED_MAX", 3)
    monkeypatch.setattr(usage, "LABELLED_GUESTS_MAX", 1)
    book = Book()
    for number in range(10):
        count(book, f"ip:{number}", "m", 7)
    for number in range(10):
        count(book, f"auth:{number}", "m", 7)
    prompts = [
        (labels, value)
        for name, labels, value in book.samples()
        if name == "smg_tenant_tokens_total" and labels[2] == "prompt"
    ]
    assert {labels[0] for labels, _ in prompts} == {"ip:0", "auth:0", "auth:1", OTHER}
    assert sum(value for _, value in prompts) == 20 * 7


def test_a_name_that_was_given_is_kept_and_guests_have_room_of_their_own():
    names = Names(most=2, guests_max=1)
    assert [names.of(name) for name in ("ip:1", "ip:2", "auth:a", "auth:b", "auth:c", "ip:1", "auth:a")] == [
        "ip:1", OTHER, "auth:a", "auth:b", OTHER, "ip:1", "auth:a",
    ]  # fmt: skip


def test_books_of_several_nodes_add_up_and_travel():
    one = NodeBook("a", 1.5, (Row("t", "m", 1, 2, 3, 4, 5), Row("t", "n", 1, 0, 0, 0, 0)))
    two = NodeBook("b", 2.5, (Row("t", "m", 10, 20, 30, 40, 50), Row("s", "m", 1, 1, 1, 1, 1)))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode([one, two]), type=list[NodeBook])
    assert sent == [one, two]
    assert summed(row for book in sent for row in book.rows) == (
        Row("s", "m", 1, 1, 1, 1, 1),
        Row("t", "m", 11, 22, 33, 44, 55),
        Row("t", "n", 1, 0, 0, 0, 0),
    )
    assert summed(()) == ()
