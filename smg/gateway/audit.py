"""The record of admin calls: who, what, and how it ended (SEC-8).

Owns the one log event per call of an admin route, admitted or not. It is written whatever the log level, because a record
with holes is none. Never logs a credential or a query, which may hold one.
"""

from __future__ import annotations

from typing import Protocol

from smg.net.exchange import Exchange
from smg.tenancy.claims import TokenRefused
from smg.tenancy.keys import Principal

PATH_CHARS_MAX = 1024
"""What is logged of a path: longer ones lead nowhere."""


class Log(Protocol):
    """What an audit needs of `smg.telemetry.log.Logger`."""

    def always(self, message: str, /, **fields: object) -> None:
        """A line that no level keeps back."""
        ...


class Audit:
    """The audit of one node."""

    __slots__ = ("_log",)

    def __init__(self, log: Log) -> None:
        self._log = log

    def called(
        self,
        exchange: Exchange,
        principal: Principal | None,
        method: str,
        path: str,
        status: int,
        error: BaseException | None,
    ) -> None:
        """An admin call has ended with `status`; `principal` is None when nobody was recognised."""
        refused = error.__cause__ if error is not None else None
        reason = {"reason": refused.reason} if isinstance(refused, TokenRefused) else {}
        self._log.always(
            "admin call",
            principal="unknown" if principal is None else principal.name,
            auth_method="none" if principal is None else principal.method,
            role="none" if principal is None else principal.role,
            method=method,
            path=path[:PATH_CHARS_MAX],
            status=status,
            outcome="denied" if status in (401, 403) else "success" if status < 400 else "failed",
            **reason,
            peer=exchange.peer,
            request_id=exchange.request_id,
        )
