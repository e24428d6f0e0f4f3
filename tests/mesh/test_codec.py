"""Membership messages as bytes: whole and back, cut, mutated, from the future, and never more memory than they bring."""

from __future__ import annotations

import tracemalloc
from random import Random

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import codec
from mesh.errors import DecodeError
from mesh.member import Accusation, Record, Status
from mesh.messages import (
    Ack,
    Conflict,
    Gossip,
    Message,
    Nack,
    Packet,
    Ping,
    PingReq,
    Source,
    TablePull,
    TablePush,
)
from mesh.settings import PACKET_BODY_BYTES_MAX
from tests.mesh.swim_play import record

NAMES = st.text(min_size=1, max_size=32).filter(lambda name: ":" not in name and len(name.encode()) <= 128)
BOOTS = st.binary(min_size=8, max_size=8)
INCARNATIONS = st.integers(0, (1 << 48) - 1)
U32 = st.integers(0, (1 << 32) - 1)
HOSTS = st.text(min_size=1, max_size=32).filter(lambda host: len(host.encode()) <= 128)
PORTS = st.integers(1, 65535)
TAILS = st.lists(st.integers(0, 9) | st.binary(max_size=8) | st.text(max_size=3), max_size=3).map(tuple)


def _records(statuses: st.SearchStrategy[Status]) -> st.SearchStrategy[Record]:
    return st.builds(
        Record,
        name=NAMES,
        boot=BOOTS,
        incarnation=INCARNATIONS,
        status=statuses,
        host=HOSTS,
        port=PORTS,
        born_s=U32,
        protocol_min=st.integers(0, 255),
        protocol_max=st.integers(0, 255),
        features=st.integers(0, (1 << 64) - 1),
        key_ids=st.lists(U32, max_size=8).map(tuple),
        meta=st.binary(max_size=256),
        down_s=U32,
        tail=TAILS,
    )


RECORDS = _records(st.just(Status.ALIVE))
ACCUSATIONS = st.builds(
    Accusation,
    name=NAMES,
    boot=BOOTS,
    incarnation=INCARNATIONS,
    status=st.sampled_from([Status.SUSPECT, Status.DEAD, Status.LEFT]),
    accuser=NAMES,
    tail=TAILS,
)
SOURCES = st.builds(Source, name=NAMES, boot=BOOTS, incarnation=INCARNATIONS, fingerprint=U32)
BODIES = st.one_of(
    st.builds(
        Ping, seq=U32, target_name=NAMES, target_boot=BOOTS | st.just(b""), target_incarnation=INCARNATIONS
    ),
    st.builds(Ack, seq=U32, boot=BOOTS, lag_ms=U32, known_incarnation=INCARNATIONS),
    st.builds(
        PingReq,
        seq=U32,
        target_name=NAMES,
        target_boot=BOOTS | st.just(b""),
        target_incarnation=INCARNATIONS,
        host=HOSTS,
        port=PORTS,
        dials=st.booleans(),
    ),
    st.builds(Nack, seq=U32, is_refused=st.booleans()),
    st.just(Gossip()),
)
PACKETS = st.builds(
    Packet, source=SOURCES, body=BODIES, news=st.lists(RECORDS | ACCUSATIONS, max_size=2).map(tuple)
).filter(lambda packet: len(codec.encode(packet)) <= PACKET_BODY_BYTES_MAX)
ANY_RECORDS = st.lists(_records(st.sampled_from(list(Status))), max_size=3).map(tuple)
TABLES = st.one_of(
    st.builds(TablePush, source=SOURCES, records=ANY_RECORDS, wants_reply=st.booleans()),
    st.builds(TablePull, source=SOURCES, records=ANY_RECORDS),
)
MESSAGES = PACKETS | TABLES


@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    assert codec.decode(codec.encode(message)) == message


def test_a_conflict_of_the_longest_names_survives_too() -> None:
    long = msgspec.structs.replace(record("x"), name="n" * 128, host="h" * 128)
    packet = Packet(Source("n" * 128, b"1" * 8, 5, 0), Conflict(long, long))
    data = codec.encode(packet)
    assert codec.decode(data) == packet
    assert len(data) <= PACKET_BODY_BYTES_MAX


@given(PACKETS)
def test_a_packet_is_never_larger_than_the_machine_counts(packet: Packet) -> None:
    assert 0 <= codec.packet_bytes(packet) - len(codec.encode(packet)) <= 48


@given(MESSAGES, st.data())
def test_every_cut_is_refused(message: Message, data: st.DataObject) -> None:
    whole = codec.encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DecodeError):
        codec.decode(whole[:cut])


@given(MESSAGES, st.randoms(use_true_random=False), st.integers(1, 8))
@settings(max_examples=400)
def test_a_mutated_message_is_a_message_or_a_decode_error(
    message: Message, rng: Random, changes: int
) -> None:
    data = bytearray(codec.encode(message))
    for _ in range(changes):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        codec.encode(codec.decode(bytes(data)))
    except DecodeError:
        pass


@given(st.binary(max_size=1500))
@settings(max_examples=400)
def test_garbage_is_a_decode_error_or_a_message(data: bytes) -> None:
    try:
        codec.decode(data)
    except DecodeError:
        pass


@given(
    st.integers(1, 40),
    st.recursive(st.integers() | st.binary(max_size=4), lambda inner: st.lists(inner), max_leaves=9),
)
def test_well_formed_arrays_of_the_wrong_things_are_refused(kind: int, rest: object) -> None:
    try:
        data = msgpack.packb([1, kind, rest, rest, rest])
    except (OverflowError, ValueError):
        return
    with pytest.raises(DecodeError):
        codec.decode(data)


def _grown(message: Message, place: tuple[int, ...]) -> bytes:
    """The encoding with one more element at the tail of the array at `place`."""
    tree = msgpack.unpackb(codec.encode(message))
    array = tree
    for step in place:
        array = array[step]
    array.append("new")
    return bytes(msgpack.packb(tree))


@pytest.mark.parametrize("place", [(), (2,), (3,)])
def test_unknown_elements_at_the_tail_of_head_and_body_are_ignored(place: tuple[int, ...]) -> None:
    packet = Packet(Source("a", b"1" * 8, 5, 9), Ping(1, "b", b"2" * 8, 6), (record("c"),))
    assert codec.decode(_grown(packet, place)) == packet


def test_unknown_elements_of_news_are_kept_and_forwarded() -> None:
    doubt = Accusation("d", b"3" * 8, 7, Status.DEAD, "a")
    packet = Packet(Source("a", b"1" * 8, 5, 9), Gossip(), (record("c"), doubt))
    for place in ((4, 0), (4, 1)):
        seen = codec.decode(_grown(packet, place))
        assert isinstance(seen, Packet)
        assert seen.news[place[1]].tail == ("new",)
        assert codec.decode(codec.encode(seen)) == seen


def test_too_much_of_the_unknown_is_dropped_not_forwarded() -> None:
    big = msgspec.structs.replace(record("c"), tail=(b"x" * (codec.TAIL_BYTES_MAX + 1),))
    seen = codec.decode(codec.encode(Packet(Source("a", b"1" * 8, 5, 9), Gossip(), (big,))))
    assert isinstance(seen, Packet) and seen.news == (record("c"),)


def test_news_with_a_status_of_a_newer_protocol_is_skipped_alone() -> None:
    tree = msgpack.unpackb(codec.encode(Packet(Source("a", b"1" * 8, 5, 9), Gossip(), (record("c"),) * 2)))
    tree[4][0] = [9, "whatever"]
    seen = codec.decode(msgpack.packb(tree))
    assert isinstance(seen, Packet) and seen.news == (record("c"),)


def test_a_protocol_version_of_tomorrow_with_a_known_kind_is_read() -> None:
    data = bytearray(codec.encode(Packet(Source("a", b"1" * 8, 5, 9), Gossip())))
    data[1] = 7
    assert codec.decode(bytes(data)) == Packet(Source("a", b"1" * 8, 5, 9), Gossip())


@pytest.mark.parametrize("value", [True, -1, 1 << 48, 1.0, None, "5"])
def test_an_incarnation_is_a_whole_number_in_range(value: object) -> None:
    with pytest.raises(DecodeError):
        codec.decode(msgpack.packb([1, 5, ["a", b"1" * 8, value, 0], [], []]))


def test_more_news_than_the_cap_is_refused() -> None:
    news = [[1, "a", b"1" * 8, 5, "b"]] * (codec.NEWS_MAX + 1)
    with pytest.raises(DecodeError):
        codec.decode(msgpack.packb([1, 5, ["a", b"1" * 8, 5, 0], [], news]))


HEAD = msgpack.packb(["a", b"1" * 8, 5, 0])


@pytest.mark.parametrize(
    "data",
    [
        b"\x95\x01\x05" + b"\xdd\xff\xff\xff\xff" * 200,  # arrays of four billion, nested
        b"\x95\x01\x05" + b"\xdc\x00\x40" * 440,  # the longest arrays allowed, nested
        b"\x95\x01\x05" + b"\xdf\xff\xff\xff\xff" * 200,  # maps of four billion
        b"\x95\x01\x05\xc6\xff\xff\xff\xff",  # a binary of four gigabytes
        b"\x95\x01\x10" + HEAD + b"\x91\xc3\xdd\xff\xff\xff\xff",  # a table of four billion records
        b"\x95\x01\x10" + HEAD + b"\x91\xc3\xdc\x04\x00" + b"\xdc\x00\x40" * 300_000,  # nested in a table
        b"\x95\x01\x10" + b"\x91" * 1_000_000,  # a megabyte of nesting
    ],
)
def test_no_length_word_is_believed(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            codec.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000 + 4 * len(data)


def test_a_datagram_or_table_beyond_its_cap_is_refused_unread() -> None:
    with pytest.raises(DecodeError, match="packet too long"):
        codec.decode(b"\x95\x01\x05" + b"\xc0" * 1400)
    with pytest.raises(DecodeError, match="table too long"):
        codec.decode(b"\x95\x01\x10" + b"\xc0" * codec.TABLE_BYTES_MAX)


def test_the_largest_table_of_the_largest_records_fits_its_cap() -> None:
    big = msgspec.structs.replace(
        record("x"),
        name="n" * 128,
        host="h" * 128,
        meta=b"m" * 256,
        key_ids=(0xFFFFFFFF,) * 8,
        features=(1 << 64) - 1,
        tail=(b"t" * 60,),
    )
    table = TablePull(Source("a", b"1" * 8, 5, 9), (big,) * codec.TABLE_RECORDS_MAX)
    data = codec.encode(table)
    assert len(data) <= codec.TABLE_BYTES_MAX
    assert codec.decode(data) == table
