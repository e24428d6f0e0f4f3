"""The errors of the mesh library: one small tree, every leaf with a code to act on.

Owns the names by which the library says no. Each docstring says whether the state of the machine that raised it
changed. Nothing here knows how an error is logged or shown; act on `code`, never on the text.
"""

from __future__ import annotations


class MeshError(Exception):
    """Any failure of the mesh library. `retryable` means: the same call may succeed later without a change."""

    code = "mesh"
    retryable = False


class SettingsError(MeshError):
    """A setting has an impossible value. Raised while building, so no machine exists yet."""

    code = "settings"


class DecodeError(MeshError):
    """Bytes from a peer are not a message of this protocol. Nothing changed; drop the bytes and count them."""

    code = "decode"


class SealError(MeshError):
    """Bytes from a peer do not authenticate, are replayed, or name a key we do not hold. Nothing changed."""

    code = "seal"


class EchoError(SealError):
    """The other end is this very life: we dialled ourselves. Nothing changed."""

    code = "echo"


class BoundError(MeshError):
    """A caller asked for more than a bound allows (a value too long, a table full). Nothing changed."""

    code = "bound"


class ConflictError(MeshError):
    """Another live node with an older life has our name. The membership machine has stopped for good."""

    code = "conflict"


class WeatherError(MeshError):
    """The network or a peer failed us (dial refused, stream cut, time-out). Nothing changed; try again."""

    code = "weather"
    retryable = True


class DialError(WeatherError):
    """A dial failed. `is_refused`: the host answered that the port is closed, so no process listens there."""

    code = "dial"

    def __init__(self, text: str, is_refused: bool = False) -> None:
        super().__init__(text)
        self.is_refused = is_refused
