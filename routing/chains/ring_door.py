"""Whose sessions a stage works on.

Whoever has a job done on a chain says so with its signature (`SessionPermit`), which travels with the session
from stage to stage: a stage learns from it who the consumer is, not from the stage before it. Consumers that
this node works for (the coordinators that it chose, who ordered its layers) may use all its slots. All others
together may use half of them, so that no number of strangers keeps those away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from protocol.envelope import Envelope, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.instants import UnixNs
from protocol.ring import MAX_PERMIT_BYTES, SESSION_PERMIT, SESSION_PERMIT_KIND

#: Of slots, one in so many may be taken by guests.
GUEST_SHARE: Final = 2

#: Deterministic sessions of guests at a time: a stage has room for a few, each with a context of its own.
GUEST_LANES: Final = 1


@dataclass(frozen=True, slots=True)
class Door:
    """`works_for`: given a Cargo, the consumers for whom this node holds it."""

    works_for: Callable[[str], Collection[str]]

    def is_guest(self, cargo: str, consumer: str) -> bool:
        """One that is not known here."""
        return consumer not in self.works_for(cargo)


def check_permit_untrusted(
    permit: Envelope | None, *, session: str, cargo: str, consumer: str, now: UnixNs
) -> None:
    """Does this consumer want this session? Raises ProtocolError if nothing shows it."""
    if permit is None:
        raise ProtocolError(Fault.UNEXPECTED, "a session without its consumer's permit")
    if not permit.is_below(MAX_PERMIT_BYTES):
        raise ProtocolError(Fault.OVERSIZE, f"a permit takes less than {MAX_PERMIT_BYTES} bytes")
    opened = open_untrusted(permit, SESSION_PERMIT_KIND, SESSION_PERMIT, now)
    if opened.issuer != consumer:
        raise ProtocolError(Fault.UNEXPECTED, "the permit is somebody else's")
    if (opened.body.session, opened.body.cargo) != (session, cargo):
        raise ProtocolError(Fault.UNEXPECTED, "the permit is for another session")
