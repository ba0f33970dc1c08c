"""The errors of the wire.

Two families, never mixed. `ProtocolError` is the remote's fault: bytes it sent break a rule that we
published, so the caller drops the message (and may drop the peer) and goes on. Everything else that
escapes from this package is our own bug and is meant to propagate.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """What a remote did wrong. The value travels in metrics and logs, never free text."""

    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    UNEXPECTED = "unexpected"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    WRONG_ISSUER = "wrong-issuer"


class ProtocolError(Exception):
    """A remote peer broke the protocol.

    `fault` is the machine-readable kind; `detail` is for people, holds no bytes of the remote's
    choosing beyond a bounded, escaped excerpt, and is safe to log.
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault}: {detail}")
        self.fault = fault
        self.detail = detail
