"""Binds the mesh's metrics once, so that counting a datagram is one addition (MET-9).

Owns which family takes what; it must never be asked on the way of a request.
"""

from __future__ import annotations

from smg.bridge.mesh_node import Meters, Tally
from smg.telemetry.metrics import Metrics


def mesh_meters(metrics: Metrics) -> Meters:
    """The bound meters."""

    def messages(kind: str, direction: str) -> Tally:
        return metrics.counter("smg_mesh_messages_total", kind=kind, direction=direction)

    return Meters(
        messages=messages,
        bytes_in=metrics.counter("smg_mesh_bytes_total", direction="in"),
        bytes_out=metrics.counter("smg_mesh_bytes_total", direction="out"),
        rtt=metrics.histogram("smg_mesh_rtt_seconds"),
        lag=metrics.histogram("smg_mesh_lag_seconds"),
        owner_wait=metrics.histogram("smg_mesh_owner_wait_seconds"),
    )
