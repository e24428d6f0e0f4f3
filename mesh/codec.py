"""Membership messages as bytes and back: msgpack arrays that may grow at their tail.

Owns the wire format (`docs/mesh/membership.md`) and its caps. `decode` raises nothing but DecodeError, whatever the
bytes, and never allocates by a peer's word: every length is checked against what is there and against a cap. Must
never authenticate (`seal`) nor judge.

Layout: `[protocol, kind, source, body, list, *tail]`. Byte 0 is a msgpack fixarray, bytes 1 and 2 are positive
fixints, so a reader knows the kind before it parses. Unknown elements at the tail of any array are ignored; those of
a record or an accusation are kept (up to TAIL_BYTES_MAX) and forwarded.
"""

from __future__ import annotations

from typing import Any

import msgpack

from mesh.errors import DecodeError
from mesh.member import BOOT_BYTES, INCARNATION_MAX, PROTOCOL_MAX, Accusation, News, Record, Status
from mesh.messages import (
    Ack,
    Body,
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
from mesh.settings import HOST_BYTES_MAX, KEY_IDS_MAX, META_BYTES_MAX, NAME_BYTES_MAX, PACKET_BYTES_MAX

NEWS_MAX = 64
"""Pieces of news in one packet."""
TABLE_RECORDS_MAX = 1024
"""Records in one TablePush or TablePull: 1,024 of the largest are below TABLE_BYTES_MAX."""
TABLE_BYTES_MAX = 1 << 20
TAIL_ELEMENTS_MAX = 4
TAIL_BYTES_MAX = 64
"""Of what a newer protocol adds to a record we keep this much; more is ignored, not forwarded."""
TEXT_BYTES_MAX = 1024
"""Cap of any string or binary inside a message, known or not."""

KIND_PING, KIND_ACK, KIND_PING_REQ, KIND_NACK, KIND_GOSSIP, KIND_CONFLICT = range(1, 7)
KIND_TABLE_PUSH, KIND_TABLE_PULL = 16, 17
_TABLE_KINDS = (KIND_TABLE_PUSH, KIND_TABLE_PULL)

_U32 = 0xFFFFFFFF
_U64 = 0xFFFFFFFFFFFFFFFF
_STATUSES = (Status.ALIVE, Status.SUSPECT, Status.DEAD, Status.LEFT)
_LIMITS: dict[str, Any] = {
    "use_list": False,
    "raw": False,
    "strict_map_key": False,
    "max_str_len": TEXT_BYTES_MAX,
    "max_bin_len": TEXT_BYTES_MAX,
    "max_array_len": NEWS_MAX,
    "max_map_len": TAIL_ELEMENTS_MAX * 4,
    "max_ext_len": TAIL_BYTES_MAX,
}
_FOREIGN = (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException)
"""All that msgpack raises on bad bytes: its own tree, UnicodeDecodeError, unhashable map keys, deep nesting."""

_pack = msgpack.Packer(use_bin_type=True).pack


# -- out ---------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The message as bytes. A packet built by the machine is never above PACKET_BODY_BYTES_MAX."""
    source = message.source
    head = (source.name, source.boot, source.incarnation, source.fingerprint)
    if isinstance(message, Packet):
        kind, body = _body_out(message.body)
        return bytes(_pack((PROTOCOL_MAX, kind, head, body, [_news_out(news) for news in message.news])))
    records = [_record_out(record) for record in message.records]
    if isinstance(message, TablePush):
        return bytes(_pack((PROTOCOL_MAX, KIND_TABLE_PUSH, head, (message.wants_reply,), records)))
    return bytes(_pack((PROTOCOL_MAX, KIND_TABLE_PULL, head, (), records)))


def news_bytes(news: News) -> int:
    """Encoded size of one piece of news."""
    return len(_pack(_news_out(news)))


def head_bytes(source: Source, body: Body) -> int:
    """Encoded size of a packet without its news (the news' array header, at most 3 bytes, included)."""
    size = 3 + 1 + _text_bytes(source.name) + 10 + 9 + 5 + 1 + 3
    if isinstance(body, Ping):
        return size + 5 + _text_bytes(body.target_name) + 10 + 9
    if isinstance(body, Ack):
        return size + 5 + 10 + 5 + 9
    if isinstance(body, PingReq):
        return size + 5 + _text_bytes(body.target_name) + 10 + 9 + _text_bytes(body.host) + 3 + 1
    if isinstance(body, Nack):
        return size + 6
    if isinstance(body, Conflict):
        return size + news_bytes(body.elder) + news_bytes(body.younger)
    return size


def packet_bytes(packet: Packet) -> int:
    """Size of the packet as the machine counts it: never below, and at most 48 bytes above, its encoding."""
    return head_bytes(packet.source, packet.body) + sum(news_bytes(news) for news in packet.news)


def _text_bytes(text: str) -> int:
    return 2 + (len(text) if text.isascii() else len(text.encode()))


def _body_out(body: Body) -> tuple[int, tuple[object, ...]]:
    if isinstance(body, Ping):
        return KIND_PING, (body.seq, body.target_name, body.target_boot, body.target_incarnation)
    if isinstance(body, Ack):
        return KIND_ACK, (body.seq, body.boot, body.lag_ms, body.known_incarnation)
    if isinstance(body, Gossip):
        return KIND_GOSSIP, ()
    if isinstance(body, PingReq):
        target = (body.target_name, body.target_boot, body.target_incarnation)
        return KIND_PING_REQ, (body.seq, *target, body.host, body.port, body.dials)
    if isinstance(body, Nack):
        return KIND_NACK, (body.seq, body.is_refused)
    return KIND_CONFLICT, (_record_out(body.elder), _record_out(body.younger))


def _news_out(news: News) -> tuple[object, ...]:
    if isinstance(news, Record):
        return _record_out(news)
    return (int(news.status), news.name, news.boot, news.incarnation, news.accuser, *news.tail)


def _record_out(record: Record) -> tuple[object, ...]:
    return (
        int(record.status),
        record.name,
        record.boot,
        record.incarnation,
        record.host,
        record.port,
        record.born_s,
        record.protocol_min,
        record.protocol_max,
        record.features,
        record.key_ids,
        record.meta,
        record.down_s,
        *record.tail,
    )


# -- in ----------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Message:
    """The message in these bytes. Raises DecodeError, and nothing else, if there is none."""
    if len(data) < 3 or not 0x90 <= data[0] <= 0x9F:
        raise DecodeError("not a membership message")
    if not 1 <= data[1] < 128:
        raise DecodeError("no protocol version")
    try:
        if data[2] in _TABLE_KINDS:
            return _table_in(data)
        if len(data) > PACKET_BYTES_MAX:
            raise DecodeError("packet too long")
        return _packet_in(msgpack.unpackb(data, **_LIMITS))
    except _FOREIGN as error:
        raise DecodeError(f"not msgpack of ours: {type(error).__name__}") from error


def _packet_in(parts: tuple[Any, ...]) -> Packet:
    if len(parts) < 5:
        raise DecodeError("short packet")
    decode_body = _BODIES.get(parts[1])
    if decode_body is None:
        raise DecodeError("unknown kind")
    news = []
    for entry in _array(parts[4]):
        known = _news_in(_array(entry))
        if known is not None:
            news.append(known)
    return Packet(_source_in(parts[2]), decode_body(_array(parts[3])), tuple(news))


def _table_in(data: bytes) -> TablePush | TablePull:
    if len(data) > TABLE_BYTES_MAX:
        raise DecodeError("table too long")
    # A streaming reader: only one record's worth of objects exists beyond what was accepted.
    unpacker = msgpack.Unpacker(max_buffer_size=len(data), **_LIMITS)
    unpacker.feed(data)
    if unpacker.read_array_header() < 5:
        raise DecodeError("short table")
    unpacker.skip()
    kind = unpacker.unpack()
    source = _source_in(unpacker.unpack())
    body = _array(unpacker.unpack())
    count = unpacker.read_array_header()
    if count > TABLE_RECORDS_MAX:
        raise DecodeError("too many records")
    records = tuple([_record_in(_array(unpacker.unpack())) for _ in range(count)])
    if kind == KIND_TABLE_PULL:
        return TablePull(source, records)
    if not body or type(body[0]) is not bool:
        raise DecodeError("bad table head")
    return TablePush(source, records, body[0])


def _array(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise DecodeError("not an array")
    return value


def _whole(value: Any, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise DecodeError("number out of range")
    return value


def _text(value: Any, bytes_max: int) -> str:
    if type(value) is not str or not value or len(value) > bytes_max or len(value.encode()) > bytes_max:
        raise DecodeError("bad text")
    return value


def _name(value: Any) -> str:
    name = _text(value, NAME_BYTES_MAX)
    if ":" in name:
        raise DecodeError("bad name")
    return name


def _boot(value: Any) -> bytes:
    if type(value) is not bytes or len(value) != BOOT_BYTES:
        raise DecodeError("bad boot id")
    return value


def _boot_or_none(value: Any) -> bytes:
    return b"" if value == b"" else _boot(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise DecodeError("not a flag")
    return value


def _at_least(parts: tuple[Any, ...], count: int) -> None:
    if len(parts) < count:
        raise DecodeError("short array")


def _source_in(value: Any) -> Source:
    parts = _array(value)
    _at_least(parts, 4)
    return Source(_name(parts[0]), _boot(parts[1]), _whole(parts[2], INCARNATION_MAX), _whole(parts[3], _U32))


def _tail_in(tail: tuple[Any, ...]) -> tuple[object, ...]:
    if not tail:
        return ()
    if len(tail) > TAIL_ELEMENTS_MAX or len(_pack(tail)) > TAIL_BYTES_MAX:
        return ()
    return tail


def _news_in(parts: tuple[Any, ...]) -> News | None:
    """None for a status of a newer protocol: the rest of the packet is still good."""
    _at_least(parts, 1)
    rank = _whole(parts[0], _U32)
    if rank == Status.ALIVE:
        return _record_in(parts)
    if rank > Status.LEFT:
        return None
    _at_least(parts, 5)
    return Accusation(
        _name(parts[1]),
        _boot(parts[2]),
        _whole(parts[3], INCARNATION_MAX),
        _STATUSES[rank],
        _name(parts[4]),
        _tail_in(parts[5:]),
    )


def _record_in(parts: tuple[Any, ...]) -> Record:
    _at_least(parts, 13)
    key_ids = _array(parts[10])
    if len(key_ids) > KEY_IDS_MAX:
        raise DecodeError("too many key ids")
    meta = parts[11]
    if type(meta) is not bytes or len(meta) > META_BYTES_MAX:
        raise DecodeError("bad meta")
    return Record(
        _name(parts[1]),
        _boot(parts[2]),
        _whole(parts[3], INCARNATION_MAX),
        _STATUSES[_whole(parts[0], Status.LEFT)],
        _text(parts[4], HOST_BYTES_MAX),
        _whole(parts[5], 65535, 1),
        _whole(parts[6], _U32),
        _whole(parts[7], 255),
        _whole(parts[8], 255),
        _whole(parts[9], _U64),
        tuple([_whole(key_id, _U32) for key_id in key_ids]),
        meta,
        _whole(parts[12], _U32),
        _tail_in(parts[13:]),
    )


def _ping_in(parts: tuple[Any, ...]) -> Ping:
    _at_least(parts, 4)
    return Ping(
        _whole(parts[0], _U32), _name(parts[1]), _boot_or_none(parts[2]), _whole(parts[3], INCARNATION_MAX)
    )


def _ack_in(parts: tuple[Any, ...]) -> Ack:
    _at_least(parts, 4)
    return Ack(
        _whole(parts[0], _U32), _boot(parts[1]), _whole(parts[2], _U32), _whole(parts[3], INCARNATION_MAX)
    )


def _ping_req_in(parts: tuple[Any, ...]) -> PingReq:
    _at_least(parts, 7)
    return PingReq(
        _whole(parts[0], _U32),
        _name(parts[1]),
        _boot_or_none(parts[2]),
        _whole(parts[3], INCARNATION_MAX),
        _text(parts[4], HOST_BYTES_MAX),
        _whole(parts[5], 65535, 1),
        _flag(parts[6]),
    )


def _nack_in(parts: tuple[Any, ...]) -> Nack:
    _at_least(parts, 2)
    return Nack(_whole(parts[0], _U32), _flag(parts[1]))


def _gossip_in(_parts: tuple[Any, ...]) -> Gossip:
    return Gossip()


def _conflict_in(parts: tuple[Any, ...]) -> Conflict:
    _at_least(parts, 2)
    return Conflict(_record_in(_array(parts[0])), _record_in(_array(parts[1])))


_BODIES: dict[int, Any] = {
    KIND_PING: _ping_in,
    KIND_ACK: _ack_in,
    KIND_PING_REQ: _ping_req_in,
    KIND_NACK: _nack_in,
    KIND_GOSSIP: _gossip_in,
    KIND_CONFLICT: _conflict_in,
}
