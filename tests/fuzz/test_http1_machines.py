"""A million damaged byte sequences to the parsers of requests, chunked bodies and answers, without an unhandled exception.

Seeded, so that a failure repeats; `fuzz_http1.py` searches with coverage, by hand.
"""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz import http1_machines as machines

ROUNDS = 4
SEQUENCES = 250_000


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_quarter_of_a_million_damaged_sequences_raise_nothing(seed):
    rng = Random(seed)
    random = rng.random
    seen = set()
    for number in range(SEQUENCES):
        kind = number % 4
        if kind < 2:
            data = machines.mutated(machines.REQUESTS[number // 4 % len(machines.REQUESTS)], rng)
            seen.add(("requests", machines.read_requests(data, int(random() * len(data)))))
        elif kind == 2:
            data = machines.mutated(machines.ANSWERS[number // 4 % len(machines.ANSWERS)], rng)
            seen.add(("answers", machines.read_answers(data, int(random() * len(data)))))
        else:
            data = machines.mutated(machines.CHUNKS[number // 4 % len(machines.CHUNKS)], rng)
            seen.add(("chunks", machines.read_chunks(data, int(random() * len(data)))))
    # It must have got somewhere: refused, one and several requests; answers of several kinds; ended and broken bodies.
    assert {("requests", 0), ("requests", 1), ("requests", 2), ("chunks", True), ("chunks", False)} <= seen
    assert {("answers", 0), ("answers", 200), ("answers", 204), ("answers", 503)} <= seen


GOOD_REQUESTS = [
    b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
    b"POST /b HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nx: y\r\n\r\nok",
    b"POST /b HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length:  12\r\n\r\nhello, world",
    b"POST / HTTP/1.1\r\nhost: h\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 1\r\n\r\nx",
    b"POST /b HTTP/1.1\r\nhost: h\r\nx-content-length: 2\r\nCONTENT-LENGTH:2 \r\nx: 2\r\n\r\nok",
]
GOOD_ANSWERS = [
    machines.ANSWERS[0],
    b"HTTP/1.1 200 OK\r\nset-cookie: a\r\nset-cookie: b\r\ncontent-length: 3\r\n\r\nabc",
    b"HTTP/1.1 304 N\r\ncontent-length: 5\r\n\r\n",
    b"HTTP/1.1 204 N\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nt: x\r\n\r\n",
    b"HTTP/1.1 100 C\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
]


def test_what_a_connection_remembers_changes_nothing_of_the_next_request():
    rng = Random(1)
    for number in range(20_000):
        good = GOOD_REQUESTS[number % len(GOOD_REQUESTS)]
        machines.read_after(good, machines.mutated(good, rng))


def test_what_a_connection_remembers_changes_nothing_of_the_next_answer():
    rng = Random(2)
    for number in range(20_000):
        good = GOOD_ANSWERS[number % len(GOOD_ANSWERS)]
        machines.answer_after(good, machines.mutated(good, rng))
