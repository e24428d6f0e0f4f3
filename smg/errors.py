"""The one error tree of smg.

Owns the exceptions that cross rooms. Three kinds exist (house rule 26): bugs stay plain Python exceptions; a
client's fault and bad weather are `GatewayError`, which carries all that an answer needs. How such an error looks
on the wire (OpenAI, Anthropic or worker-API shape) is decided in `gateway/problem.py`, never here.
"""

from __future__ import annotations


class SmgError(Exception):
    """Base of every error that smg raises on purpose."""


class SettingsError(SmgError, ValueError):
    """A configuration that may not start (CLI-6): names the flag, the value and the reason.

    `is_combination` tells a value that is wrong by itself (exit code 2) from one that is wrong beside another setting or in
    its surroundings, such as a file that is not there (exit code 1).
    """

    def __init__(self, flag: str, value: str, reason: str, *, is_combination: bool = False) -> None:
        message = f"{flag}: {value}: {reason}" if value else f"{flag}: {reason}"
        # One line whatever was typed: a control character in a flag's name must not reach a terminal or split the line.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
        self.flag = flag
        self.value = value
        self.reason = reason
        self.is_combination = is_combination


class GatewayError(SmgError):
    """An answer the gateway makes itself (contract section 8).

    `status` is the HTTP status, `code` the machine-readable code of section 8, `message` public text (no address of
    a worker, no text of a prompt), `param` the offending member or None. `retry_after_s` becomes `Retry-After`
    (whole seconds, at least 1: ERR-30). `headers` are further header lines of the answer. `is_closing` asks the
    server to close the client's connection after the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        is_closing: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers
        self.is_closing = is_closing


class UpstreamError(SmgError):
    """A worker could not be used for this attempt; `kind` says how, for retries, breaker and metrics.

    `was_sent` is True when at least one byte of the request may have reached the worker.
    """

    REFUSED = "refused"  # no connection: refused, unreachable, name not resolved (ERR-16)
    RESET = "reset"  # closed or broke the protocol before a usable head (ERR-17)
    TIMEOUT = "timeout"  # no head within the timeout (ERR-18)
    BROKEN_STREAM = "broken_stream"  # died after the head (STR-6, DN-5)

    def __init__(self, kind: str, message: str, *, was_sent: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.was_sent = was_sent


class ClientGone(SmgError):
    """The client left (HTTP-13); nobody waits for the answer any more."""


class ShuttingDown(SmgError):
    """The grace period is over (LIFE-6): what is still running ends now, streams with their failure frame."""
