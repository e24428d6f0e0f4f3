"""KV events over real ZeroMQ sockets on loopback: what a publisher says is what the index believes, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import msgspec
import pytest
import trio

from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockHasher, BlockSettings
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.worker import Status, Worker, WorkerSpec
from smg.services import kv_events
from smg.services.kv_events import KvEvents
from tests.smg.fleet.builders import registry

zmq = pytest.importorskip("zmq")
pack = msgspec.msgpack.encode
SIZE = 4
PATIENCE_S = 10.0


class Silent:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, /, **fields: object) -> None:
        self.lines.append(f"{message} {fields}")

    warn = info


class Publisher:
    """An engine's two sockets. XPUB, so that a test knows when somebody listens."""

    def __init__(self, context, port: int = 0, form: str = "map") -> None:
        self.form = form
        self.number = 0
        self.kept: list[tuple[int, bytes]] = []
        self.names: dict[tuple[int, ...], int] = {}
        self.events = context.socket(zmq.XPUB)
        self.events.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.replay = context.socket(zmq.ROUTER)
        self.replay.bind("tcp://127.0.0.1:*")
        self.port = int(self.events.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
        self.replay_port = int(self.replay.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
        self.asked: list[int] = []

    async def heard(self) -> None:
        """Until a subscriber is there."""
        await until(lambda: self.events.poll(0))
        assert self.events.recv() == b"\x01"

    def batch(self, *rows) -> bytes:
        if self.form == "map":
            return pack({"ts": 1.0, "events": list(rows), "data_parallel_rank": 0})
        return pack([1.0, [list(row.values()) for row in rows], 0])

    def say(self, *rows, is_lost: bool = False) -> None:
        self.say_bytes(self.batch(*rows), is_lost)

    def say_bytes(self, payload: bytes, is_lost: bool = False) -> None:
        self.kept.append((self.number, payload))
        if not is_lost:
            self.send(self.number, payload)
        self.number += 1

    def send(self, number: int, payload: bytes) -> None:
        self.events.send_multipart([b"kv-events", number.to_bytes(8, "big"), payload])

    def stored(self, tokens: list[int], start: int = 0):
        names = [
            self.names.setdefault(tuple(tokens[:end]), len(self.names) + 1)
            for end in range(SIZE, len(tokens) + 1, SIZE)
        ]
        return {
            "type": "BlockStored",
            "block_hashes": names[start:],
            "parent_block_hash": names[start - 1] if start else None,
            "token_ids": tokens[start * SIZE :],
            "block_size": SIZE,
            "lora_id": None,
        }

    def removed(self, tokens: list[int], start: int):
        names = [self.names[tuple(tokens[:end])] for end in range(SIZE, len(tokens) + 1, SIZE)]
        return {"type": "BlockRemoved", "block_hashes": names[start:]}

    async def serve_replays(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await until(lambda: self.replay.poll(0), limit_s=1e9)
            client, empty, first = self.replay.recv_multipart()
            assert empty == b""
            self.asked.append(int.from_bytes(first, "big"))
            for number, payload in self.kept:
                if number >= self.asked[-1]:
                    self.replay.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
            self.replay.send_multipart([client, b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self.events.close(linger=0)
        self.replay.close(linger=0)


async def publisher_at(context, port: int) -> Publisher:
    """ZeroMQ closes in its own thread, so the port is free a moment later."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                return Publisher(context, port=port)
            except zmq.ZMQError:
                await trio.sleep(0.002)


async def until(condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.002)


class Site:
    """A gateway's side: one worker, its index, and the service that listens."""

    def __init__(self, publisher: Publisher, template: str = "tcp://{host}:{port}", **labels: str) -> None:
        self.registry = registry()
        self.index = PrefixIndex()
        self.hasher = BlockHasher(BlockSettings(block_tokens=8))
        self.log = Silent()
        self.sizes: list[tuple[str, int]] = []
        self.speaks_ids = False
        self.service = KvEvents(
            self.registry,
            self.index,
            self.hasher,
            template.replace("REPLAY", str(publisher.replay_port)),
            log=self.log,
            measured=lambda worker, tokens: self.sizes.append((worker.id, tokens)),
            speaks_ids=lambda: self.speaks_ids,
        )
        self.labels = labels
        self.worker: Worker | None = None
        self.port = publisher.port

    def add(self, **spec) -> Worker:
        url = f"http://127.0.0.1:{self.port}"
        self.worker = self.registry.add(WorkerSpec(url, model_id="m", labels=self.labels, **spec), 0.0)
        return self.worker

    def depth(self, tokens: list[int]) -> int:
        hashes = self.hasher.token_blocks(tokens, self.hasher.seed("m"))
        return self.index.match(hashes).depth_of(self.index.bits_of(self.worker.id))

    def place(self, tokens: list[int]) -> None:
        self.index.place(self.worker.id, self.hasher.token_blocks(tokens, self.hasher.seed("m")))

    async def batches(self, count: int) -> None:
        await until(lambda: self.service.counts["batch"] >= count)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@asynccontextmanager
async def listening(
    publisher: Publisher, template: str = "tcp://{host}:{port}", **labels: str
) -> AsyncIterator[Site]:
    site = Site(publisher, template, **labels)
    async with trio.open_nursery() as nursery:
        await nursery.start(site.service.run)
        await nursery.start(publisher.serve_replays)
        site.add()
        await publisher.heard()
        yield site
        nursery.cancel_scope.cancel()


def prompt(seed: int, count: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(50_000) for _ in range(count)]


WITH_REPLAY = "tcp://{host}:{port},tcp://{host}:REPLAY"


@pytest.mark.parametrize("form", ["map", "array"])
async def test_stored_and_removed_blocks_are_what_the_index_believes(context, form):
    publisher, tokens = Publisher(context, form=form), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens[:32]))
        publisher.say(publisher.stored(tokens, start=8))
        await site.batches(2)
        assert site.depth(tokens) == 8
        publisher.say(publisher.removed(tokens, start=6))
        await site.batches(3)
        assert site.depth(tokens) == 3


async def test_a_flush_takes_placements_too(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        site.place(prompt(2, 64))
        publisher.say(publisher.stored(tokens))
        publisher.say({"type": "AllBlocksCleared"})
        await site.batches(2)
        assert site.depth(tokens) == site.depth(prompt(2, 64)) == 0


async def test_a_lost_message_without_replay_takes_what_was_told(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        site.place(tokens[:16])
        publisher.say(publisher.stored(tokens))
        publisher.say(publisher.removed(tokens, start=2), is_lost=True)
        publisher.say(publisher.stored(prompt(2, 32)))
        await site.batches(2)
        assert site.depth(tokens) == 2  # the guess, not the claim
        assert site.depth(prompt(2, 32)) == 4
        assert site.service.counts["lost"] == 1


async def test_a_lost_message_is_brought_by_a_replay(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher, WITH_REPLAY) as site:
        publisher.say(publisher.stored(tokens))
        publisher.say(publisher.removed(tokens, start=6), is_lost=True)
        publisher.say(publisher.stored(prompt(3, 16)), is_lost=True)
        publisher.say(publisher.stored(prompt(2, 32)))
        await site.batches(2)
        await until(lambda: site.depth(prompt(2, 32)) == 4)
        assert site.depth(tokens) == 3
        assert site.depth(prompt(3, 16)) == 2
        assert publisher.asked == [1]
        assert site.service.counts["lost"] == 0


async def test_who_comes_late_asks_for_what_was_said_before(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    publisher.say(publisher.stored(tokens), is_lost=True)
    async with listening(publisher, WITH_REPLAY) as site:
        publisher.say(publisher.stored(prompt(2, 32)))
        await until(lambda: site.depth(prompt(2, 32)) == 4)
        assert site.depth(tokens) == 8
        assert publisher.asked == [0]


async def test_a_replay_that_has_forgotten_the_beginning_is_taken_as_far_as_it_goes(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher, WITH_REPLAY) as site:
        publisher.say(publisher.stored(tokens))
        publisher.say(publisher.removed(tokens, start=2), is_lost=True)
        publisher.say(publisher.stored(prompt(3, 32)), is_lost=True)
        publisher.kept = publisher.kept[2:]
        publisher.say(publisher.stored(prompt(2, 32)))
        await until(lambda: site.depth(prompt(2, 32)) == 4)
        assert site.depth(tokens) == 0
        assert site.depth(prompt(3, 32)) == 4


async def test_a_replay_nobody_answers_is_given_up(context, monkeypatch):
    monkeypatch.setattr(kv_events, "REPLAY_TIMEOUT_S", 0.05)
    publisher, tokens = Publisher(context), prompt(1, 64)
    publisher.serve_replays = lambda task_status: _nobody(task_status)
    async with listening(publisher, WITH_REPLAY) as site:
        publisher.say(publisher.stored(tokens))
        publisher.say({"type": "AllBlocksCleared"}, is_lost=True)
        publisher.say(publisher.stored(prompt(2, 32)))
        await until(lambda: site.depth(prompt(2, 32)) == 4)
        assert site.depth(tokens) == 0
        publisher.say({"type": "AllBlocksCleared"}, is_lost=True)
        publisher.say(publisher.stored(prompt(3, 32)))
        await until(lambda: site.depth(prompt(3, 32)) == 4)
        assert site.service.counts["lost"] == 2
        assert sum("replay" in line for line in site.log.lines) == 1


async def _nobody(task_status) -> None:
    task_status.started()


async def test_an_engine_that_counts_anew_has_an_empty_cache(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        publisher.say(publisher.stored(prompt(4, 16)))
        await site.batches(2)
        site.place(prompt(5, 32))
        publisher.number = 0
        publisher.say(publisher.stored(prompt(2, 32)))
        await site.batches(3)
        assert site.depth(tokens) == site.depth(prompt(5, 32)) == 0
        assert site.depth(prompt(2, 32)) == 4
        assert site.service.counts["restart"] == 1


async def test_a_publisher_that_comes_back_is_another_engine(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        await site.batches(1)
        port = publisher.port
        publisher.events.close(linger=0)
        second = await publisher_at(context, port)
        second.number = 1  # the first message of the new process was missed: its number alone would fit
        await second.heard()
        second.say(second.stored(prompt(2, 32)))
        await site.batches(2)
        assert site.depth(tokens) == 0
        assert site.depth(prompt(2, 32)) == 4


async def test_a_worker_that_was_away_is_doubted(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        await site.batches(1)
        site.registry.set_status(site.worker, Status.NOT_READY, 1.0)
        publisher.say(publisher.stored(prompt(2, 32)))
        await site.batches(2)
        assert site.depth(tokens) == 0


async def test_the_same_message_twice_changes_nothing(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        publisher.send(*publisher.kept[0])
        await site.batches(2)
        assert site.depth(tokens) == 8
        assert site.service.counts["restart"] == 0


@pytest.mark.parametrize(
    "parts", [[b"x"], [b"t", b"short", b"x"], [b"t", b"\0" * 7 + b"\1", b"\xc1garbage"], [b"", b""]]
)
async def test_garbage_takes_the_claims_and_the_stream_goes_on(context, parts):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        publisher.events.send_multipart(parts)
        if len(parts) == 3 and len(parts[1]) == 8:
            publisher.number += 1
        publisher.say(publisher.stored(prompt(2, 32)))
        await site.batches(3)
        assert site.depth(tokens) == 0
        assert site.depth(prompt(2, 32)) == 4
        assert site.service.counts["refused"] == 1


async def test_a_removed_worker_is_not_listened_to_and_owns_nothing(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        await site.batches(1)
        site.registry.remove(site.worker)
        await until(lambda: publisher.events.poll(0))  # it unsubscribed
        assert site.depth(tokens) == 0


async def test_the_size_of_the_cache_is_told_when_it_is_full(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    async with listening(publisher) as site:
        publisher.say(publisher.stored(tokens))
        publisher.say(publisher.removed(tokens, start=12))
        await site.batches(2)
        assert site.sizes == [(site.worker.id, 64)]


async def test_a_label_names_another_endpoint_or_none(context):
    publisher, tokens = Publisher(context), prompt(1, 64)
    label = f"tcp://127.0.0.1:{publisher.port}"
    async with listening(publisher, "tcp://{host}:1", kv_events=label) as site:
        publisher.say(publisher.stored(tokens))
        await site.batches(1)
        assert site.depth(tokens) == 8
    deaf = Site(publisher, kv_events="off")
    deaf.add()
    wrong = Site(publisher, kv_events="http://nonsense")
    wrong.add()
    assert not deaf.service._followers and not wrong.service._followers
    assert wrong.log.lines


async def test_any_losses_and_repeats_leave_no_wrong_claim(context):
    publisher, rng = Publisher(context), Random(7)
    held: list[list[int]] = []
    async with listening(publisher) as site:
        sent = 0
        for round_ in range(120):
            is_lost = rng.random() < 0.15
            if held and rng.random() < 0.4:
                gone = held.pop(rng.randrange(len(held)))
                publisher.say(publisher.removed(gone, start=0), is_lost=is_lost)
                publisher.names = {key: name for key, name in publisher.names.items() if key[0] != gone[0]}
            else:
                fresh = [round_, *prompt(round_, 31)]
                publisher.names.update({tuple(fresh[:end]): 1000 * round_ + end for end in range(4, 33, 4)})
                held.append(fresh)
                publisher.say(publisher.stored(fresh), is_lost=is_lost)
            sent += not is_lost
            if rng.random() < 0.1:
                publisher.events.send_multipart([b"", b"junk", rng.randbytes(9)])
                sent += 1
            if rng.random() < 0.1 and not is_lost:
                publisher.send(*publisher.kept[-1])
                sent += 1
        publisher.say({"type": "Nothing"})  # after the last loss, so that it shows
        await site.batches(sent + 1)
        for seed in range(120):
            tokens = [seed, *prompt(seed, 31)]
            assert site.depth(tokens) in ((0, 4) if tokens in held else (0,))
        assert any(site.depth(tokens) for tokens in held)


async def test_without_pyzmq_the_flag_says_what_to_install(context, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "zmq":
            raise ImportError(name)
        return real(name, *rest, **more)

    publisher = Publisher(context)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match="pip install"):
        Site(publisher)


async def test_unconfirmed_placements_fade_where_prompts_come_as_token_ids(context, autojump_clock):
    publisher = Publisher(context)
    site = Site(publisher)
    site.add()
    tokens = prompt(1, 64)
    hashes = site.hasher.token_blocks(tokens, site.hasher.seed("m"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.service._fade)
        for speaks_ids, left in ((False, 8), (True, 0)):
            site.speaks_ids = speaks_ids
            site.index.stored(site.worker.id, 0, [1])
            site.index.place(site.worker.id, hashes)
            await trio.sleep(2 * kv_events.AGE_INTERVAL_S + 1)
            assert site.depth(tokens) == left
        nursery.cancel_scope.cancel()
