"""Settings of the membership machine: the defaults are possible, impossible values are refused by name."""

from __future__ import annotations

import msgspec
import pytest

from mesh.errors import SettingsError
from mesh.settings import MEMBERLIST_LAN, PACKET_BODY_BYTES_MAX, PACKET_BYTES_MAX, SwimSettings


def test_the_defaults_are_possible() -> None:
    assert SwimSettings().checked() == SwimSettings()
    assert MEMBERLIST_LAN.checked().probe_interval_s == 1.0


def test_the_seal_has_sixty_four_bytes_of_room() -> None:
    assert PACKET_BYTES_MAX - PACKET_BODY_BYTES_MAX == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("probe_interval_s", 0.0),
        ("suspicion_mult", -1.0),
        ("tombstone_s", 0.0),
        ("probe_timeout_min_s", 0.3),
        ("probe_timeout_max_s", 0.5),
        ("suspicion_max_mult", 0.5),
        ("members_max", 1),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: float) -> None:
    broken = msgspec.structs.replace(SwimSettings(), **{field: value})
    with pytest.raises(SettingsError, match=field):
        broken.checked()
