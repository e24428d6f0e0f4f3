"""The mesh library: membership and small replicated state among nodes. Knows nothing of gateways.

The public names. `Agent` is the library with sockets and a clock; the machines inside (`mesh.swim`, `mesh.replica`) can
be driven by another shell.
"""

from mesh.agent import Agent
from mesh.errors import (
    BoundError,
    ConflictError,
    DecodeError,
    MeshError,
    SealError,
    SettingsError,
    WeatherError,
)
from mesh.home import ReplicaSettings
from mesh.hooks import Hooks
from mesh.keyring import Key, Keyring
from mesh.member import Address, Member, Record, Status
from mesh.messages import (
    Cleared,
    ClockAhead,
    Event,
    Forgotten,
    LeaveDone,
    Left,
    MemberChanged,
    MemberDown,
    MemberUp,
    NameConflict,
    Suspected,
)
from mesh.namespace import (
    Appended,
    Change,
    Counted,
    Counter,
    Ended,
    Ephemeral,
    Lost,
    Lww,
    Namespace,
    Owned,
    Put,
    Removed,
    Restarted,
    Restored,
    Stream,
    StreamSource,
)
from mesh.partition import Standing
from mesh.settings import AgentSettings, SwimSettings
from mesh.state import State
from mesh.status import PeerStatus
from mesh.tls import TlsContexts, TlsFiles
from mesh.watch import Watch

__all__ = [
    "Address",
    "Agent",
    "AgentSettings",
    "Appended",
    "BoundError",
    "Change",
    "Cleared",
    "ClockAhead",
    "ConflictError",
    "Counted",
    "Counter",
    "DecodeError",
    "Ended",
    "Ephemeral",
    "Event",
    "Forgotten",
    "Hooks",
    "Key",
    "Keyring",
    "LeaveDone",
    "Left",
    "Lost",
    "Lww",
    "Member",
    "MemberChanged",
    "MemberDown",
    "MemberUp",
    "MeshError",
    "NameConflict",
    "Namespace",
    "Owned",
    "PeerStatus",
    "Put",
    "Record",
    "Removed",
    "ReplicaSettings",
    "Restarted",
    "Restored",
    "SealError",
    "SettingsError",
    "Standing",
    "State",
    "Status",
    "Stream",
    "StreamSource",
    "Suspected",
    "SwimSettings",
    "TlsContexts",
    "TlsFiles",
    "Watch",
    "WeatherError",
]
