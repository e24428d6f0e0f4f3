"""Coverage-guided fuzzing of what comes from peers of replicated state: state frames, datagrams, streams.

`python -m tests.fuzz.fuzz_mesh_state [-runs=N] [libFuzzer options] [corpus folder]` needs atheris; the target itself
does not, so tests run it on plain random bytes. The first byte of an input says which door it knocks at.
"""

from __future__ import annotations

import sys
from random import Random

from mesh.errors import DecodeError, SealError
from mesh.frames import Frame, FrameReader
from mesh.keyring import Keyring
from mesh.seal import Sealer
from mesh.stream_seal import StreamSeal
from tests.mesh.state_frames import NOW, corpus, drain, feed, target

RING = Keyring.of(b"0123456789abcdef")
GENUINE = Sealer(b"boot---a", "c", RING).seal(b"body")
_replica = target()
_turn = 0


def state(data: bytes) -> None:
    """A state frame, type first. The replica is renewed now and then, so that it neither fills nor stays empty."""
    global _replica, _turn
    _turn += 1
    if _turn % 500 == 0:
        _replica = target()
    feed(_replica, Frame(data[0], data[1:]))
    drain(_replica, NOW + _turn % 500 / 100)


def datagram(data: bytes) -> None:
    """To a node that requires seals and to one without keys. Only the one genuine packet may come in sealed."""
    for sealer in (Sealer(b"boot---b", "c", RING), Sealer(b"boot---b", "c")):
        try:
            assert not sealer.open(data, 0.0).is_sealed or data == GENUINE
        except (DecodeError, SealError):
            pass
        assert sealer.senders == (1 if data == GENUINE and sealer.keyring.keys else 0)


def stream(data: bytes) -> None:
    """Cut in two, to an acceptor of each kind; a valid opening goes before the second half of inputs."""
    for sealer in (Sealer(b"boot---b", "c", RING), Sealer(b"boot---b", "c")):
        end = StreamSeal(sealer, bytes(16), is_dialer=False)
        try:
            if data[0] & 1:
                dialer = Sealer(b"boot---a", "c", sealer.keyring)
                end.feed(StreamSeal(dialer, b"a" * 16, is_dialer=True).opening())
            cut = data[0] % len(data)
            frames = end.feed(data[:cut]) + end.feed(data[cut:])
            assert not (frames and end.is_sealed)
            end.finish()
        except (DecodeError, SealError):
            pass
    reader = FrameReader()
    try:
        reader.feed(data)
        assert reader.buffered_bytes <= len(data)
    except DecodeError:
        pass


DOORS = (state, datagram, stream)


def knock(data: bytes) -> None:
    """One input."""
    if len(data) >= 3:
        DOORS[data[0] % len(DOORS)](data[1:])


def seeds() -> list[bytes]:
    """Inputs to start from: real ones of each door."""
    found = [b"\0" + bytes((frame.type,)) + frame.body for frame in corpus()]
    a = Sealer(b"boot---a", "c", RING)
    found.append(b"\1" + GENUINE)
    found.append(b"\1" + Sealer(b"boot---a", "c").seal(b"body"))
    found.append(b"\2" + StreamSeal(a, bytes(16), is_dialer=True).opening() + b"\0\0\0\5hello")
    return found


def run_random(count: int, seed: int) -> None:
    """Without coverage: mutations of the seeds."""
    rng = Random(seed)
    start = seeds()
    for _ in range(count):
        data = bytearray(rng.choice(start))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at:at] = rng.randbytes(rng.randrange(1, 6))
                case 2:
                    del data[at : at + rng.randrange(1, 6)]
                case _:
                    data[at] ^= 1 << rng.randrange(8)
            if not data:
                data = bytearray(3)
        knock(bytes(data))


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, knock)
    atheris.Fuzz()
