"""Whom a request asks, for how long, and what an owner answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio

from mesh import BoundError, WeatherError
from smg.bridge import rendezvous, words
from smg.bridge.owner import PATIENCE_MAX_S, PATIENCE_MIN_S, REST_MAX_S, REST_MIN_S, Owners
from smg.bridge.words import VERSION
from smg.fleet.worker import Status
from smg.policies.cache_aware import CacheAware
from smg.policies.sticky_key import StickyKey
from tests.smg.bridge.wire import FakePeers
from tests.smg.fleet.builders import call, fleet

LONG = "word " * 8_000


class FakePrefixes:
    def __init__(self) -> None:
        self.decided_for: list[str | None] = []

    def decide_for(self, peer: str | None) -> None:
        self.decided_for.append(peer)


class Node:
    def __init__(self, name: str, *peers: str, is_on: bool = True) -> None:
        self.registry, self.workers = fleet(3)
        self.peers = FakePeers(name, *peers)
        self.policy = CacheAware("m")
        self.prefixes = FakePrefixes()
        self.questions: list[tuple[str, bytes]] = []
        self.waits: list[float] = []
        self.reply: Callable[[str, bytes], Awaitable[bytes]] = self.hang
        self.owners = Owners(
            self.peers,  # type: ignore[arg-type]
            self.registry,
            self.prefixes,  # type: ignore[arg-type]
            ask=self.ask,
            policy_of=lambda model: self.policy,
            clock=trio.current_time,
            rng=Random(1),
            waited=self.waits.append,
            is_on=is_on,
        )

    async def hang(self, peer: str, question: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def ask(self, peer: str, question: bytes) -> bytes:
        self.questions.append((peer, question))
        return await self.reply(peer, question)

    def owned_by(self, name: str, text: str = LONG):
        """A call whose session another node owns."""
        for number in range(1_000):
            asked = call(f"{number} {text}")
            session = self.policy.session(self.policy.question(asked))
            nodes = [self.peers.name, *self.peers.live_names]
            if session is not None and rendezvous.first(session.to_bytes(8, "big"), nodes) == name:
                return asked
        raise AssertionError("nobody's")

    async def consult(self, asked) -> str | None:
        worth = self.owners.worth(asked, self.policy)
        assert worth is not None
        return await self.owners.consult(asked, worth)


def connected() -> tuple[Node, Node]:
    a, b = Node("a", "b"), Node("b", "a")

    async def reply(peer: str, question: bytes) -> bytes:
        await trio.sleep(0.001)
        return b.owners.answer("a", words.read_question(question))  # type: ignore[arg-type]

    a.reply = reply
    return a, b


async def test_an_owners_answer_is_followed_and_booked_there(autojump_clock):
    a, b = connected()
    asked = a.owned_by("b")
    assert await a.consult(asked) == "b"
    assert a.policy.follows(asked)
    worker = a.policy.choose(asked, a.workers, trio.current_time(), Random(1))
    assert worker is not None
    again = call(asked.document["messages"][0]["content"] + " sibling")
    assert b.policy.choose(again, b.workers, trio.current_time(), Random(9)).id == worker.id  # type: ignore[union-attr]
    assert a.owners.counts["followed"] == b.owners.answered == 1
    assert a.waits == [pytest.approx(0.001)]
    assert b.prefixes.decided_for == ["a", None]


async def test_questions_are_asked_only_where_they_pay(autojump_clock):
    a, _ = connected()
    theirs = a.owned_by("b")
    assert a.owners.worth(theirs, a.policy) is not None
    assert a.owners.worth(a.owned_by("a"), a.policy) is None  # our own session
    assert a.owners.worth(call("short"), a.policy) is None
    a.policy.placed(theirs, a.workers[0], trio.current_time())
    assert a.owners.worth(theirs, a.policy) is None  # it is cached
    other = a.owned_by("b", LONG + "x")
    for change in (
        lambda: a.peers.unwell.add("b"),
        lambda: a.peers.strangers.add("b"),
        lambda: setattr(a.peers, "live_names", ()),
    ):
        change()
        assert a.owners.worth(other, a.policy) is None
        a.peers = a.owners._peers = FakePeers("a", "b")  # type: ignore[assignment]
    assert Node("a", "b", is_on=False).owners.worth(other, a.policy) is None


async def test_keys_that_stick_are_decided_here(autojump_clock):
    a, _ = connected()
    asked = a.owned_by("b")
    sticky = StickyKey(a.policy, 100.0)
    assert a.owners.worth(asked, sticky) is not None
    asked.routing_key = "k"
    assert a.owners.worth(asked, sticky) is None


async def test_a_prompt_too_long_for_a_question_is_decided_here(autojump_clock):
    a, _ = connected()
    assert a.owners.worth(call("x" * 512 * 7_600), a.policy) is None


async def test_an_owner_that_hangs_costs_a_few_waits(autojump_clock):
    a = Node("a", "b")
    asked = a.owned_by("b")
    waited_s = 0.0
    for _ in range(400):  # four seconds, until it is known dead
        started_s = trio.current_time()
        assert await a.consult(asked) is None
        waited_s += trio.current_time() - started_s
        await trio.sleep(0.01)
    assert a.owners.counts["late"] <= 10
    assert a.owners.counts["resting"] >= 380
    assert waited_s <= 10 * PATIENCE_MAX_S + 0.001
    assert len(a.questions) == a.owners.counts["late"]


async def test_patience_is_a_share_of_what_is_at_stake(autojump_clock):
    a = Node("a", "b")
    for text, patience_s in (("word " * 500, None), (LONG * 4, PATIENCE_MAX_S)):
        started_s = trio.current_time()
        assert await a.consult(a.owned_by("b", text)) is None
        took_s = trio.current_time() - started_s
        assert PATIENCE_MIN_S <= took_s <= PATIENCE_MAX_S + 0.001
        assert patience_s is None or took_s == pytest.approx(patience_s)


async def test_an_owner_that_was_late_once_is_asked_at_once_and_one_that_recovers_again(autojump_clock):
    a, _ = connected()
    good, asked = a.reply, a.owned_by("b")
    a.reply = a.hang
    await a.consult(asked)
    a.reply = good
    assert await a.consult(asked) == "b"
    a.reply = a.hang
    for _ in range(30):
        await a.consult(asked)
        await trio.sleep(REST_MAX_S)
    a.reply = good
    await trio.sleep(REST_MAX_S)
    assert await a.consult(asked) == "b"
    a.reply = a.hang
    await a.consult(asked)
    a.reply = good
    assert await a.consult(asked) == "b"  # all is forgiven


@pytest.mark.parametrize("error", [WeatherError("gone"), BoundError("too many")])
async def test_a_stream_that_breaks_is_a_local_decision(autojump_clock, error):
    a = Node("a", "b")

    async def fail(peer: str, question: bytes) -> bytes:
        raise error

    a.reply = fail
    asked = a.owned_by("b")
    assert await a.consult(asked) is None
    assert a.owners.counts["failed"] == 1
    await trio.sleep(REST_MIN_S)
    assert a.policy.choose(asked, a.workers, trio.current_time(), Random(1)) is not None


@pytest.mark.parametrize("answer", [b"", b"garbage", words.encode(words.Told(VERSION))])
async def test_an_answer_that_names_nobody_is_a_local_decision(autojump_clock, answer):
    a = Node("a", "b")

    async def reply(peer: str, question: bytes) -> bytes:
        return answer

    a.reply = reply
    asked = a.owned_by("b")
    assert await a.consult(asked) is None
    assert a.owners.counts["refused"] == 1
    assert not a.policy.follows(asked)


async def test_a_prediction_books_nothing_and_tells_what_a_question_would(autojump_clock):
    a, b = connected()
    asked = a.owned_by("b")
    found = await a.owners.predict(asked, a.policy, a.workers)
    assert found is not None and found[1] == "b"
    assert await a.owners.predict(asked, a.policy, a.workers) == found
    assert b.policy._index.entries == 0
    assert sum(a.owners.counts.values()) == b.owners.answered == 0
    assert await a.consult(asked) == "b"
    worker = a.policy.choose(asked, a.workers, trio.current_time(), Random(1))
    assert worker is found[0]
    assert await a.owners.predict(asked, a.policy, a.workers[:0]) is None


async def test_an_owner_without_candidates_or_of_an_unknown_model_names_nobody(autojump_clock):
    a, b = connected()
    for worker in b.workers:
        b.registry.set_status(worker, Status.NOT_READY, 0.0)
    assert await a.consult(a.owned_by("b")) is None
    question = words.Asked(VERSION, words.PLACEMENT, True, "no such model", 500, 128.0, None, 0, b"")
    assert words.read_told(b.owners.answer("a", question)) == words.Told(VERSION)
    b.peers.strangers.add("a")
    known = words.Asked(VERSION, words.PLACEMENT, True, "m", 500, 128.0, None, 0, b"")
    assert words.read_told(b.owners.answer("a", known)) == words.Told(VERSION)
