"""Coordinators that are known from their signed summaries, and which of them have which Cargo."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from protocol.coordination import CoordinatorSummary
from protocol.envelope import Envelope
from protocol.instants import UnixNs
from routing.notary import Stated

P = TypeVar("P")

#: (coordinator, Cargo) pairs that are kept, however many coordinators there are: each takes some 600 bytes
#: here.
MAX_LISTINGS: Final = 65_536


@dataclass(frozen=True, slots=True)
class KnownCoordinator(Generic[P]):
    peer: P
    summary: CoordinatorSummary
    envelope: Envelope
    sequence: int
    expires_unix_ns: UnixNs


class CoordinatorBook(Generic[P]):
    """Latest summaries by coordinator; at most `capacity` of them, and `listings` Cargos in all: the one
    heard of longest ago goes first.
    """

    def __init__(self, capacity: int, *, listings: int = MAX_LISTINGS) -> None:
        self._capacity: Final = capacity
        self._most_listings: Final = listings
        self._listings = 0
        self._known: OrderedDict[P, KnownCoordinator[P]] = OrderedDict()
        # By digest, name and name@version, in the order in which they were learnt.
        self._having: dict[str, dict[P, None]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[KnownCoordinator[P]]:
        return iter(tuple(self._known.values()))

    def get(self, peer: P) -> KnownCoordinator[P] | None:
        return self._known.get(peer)

    def admit(self, stated: Stated[P, CoordinatorSummary], envelope: Envelope) -> bool:
        """False if an equal or newer one is already there."""
        known = self._known.get(stated.peer)
        if known is not None and stated.sequence <= known.sequence:
            return False
        self.drop(stated.peer)
        self._known[stated.peer] = KnownCoordinator(
            stated.peer, stated.body, envelope, stated.sequence, stated.expires_unix_ns
        )
        for name in _names(stated.body):
            self._having.setdefault(name, {})[stated.peer] = None
        self._listings += len(stated.body.cargos)
        while len(self._known) > self._capacity or (
            self._listings > self._most_listings and len(self._known) > 1
        ):
            self.drop(next(iter(self._known)))
        return True

    def drop(self, peer: P) -> None:
        known = self._known.pop(peer, None)
        if known is None:
            return
        self._listings -= len(known.summary.cargos)
        for name in _names(known.summary):
            peers = self._having.get(name)
            if peers is not None:
                peers.pop(peer, None)
                if not peers:
                    del self._having[name]

    def having(self, cargo: str, unix_now: UnixNs) -> Iterator[KnownCoordinator[P]]:
        """Those whose summary lists the Cargo (by digest, name or name@version) and has not expired."""
        for peer in tuple(self._having.get(cargo, ())):
            known = self._known[peer]
            if known.expires_unix_ns >= unix_now:
                yield known


def _names(summary: CoordinatorSummary) -> Iterator[str]:
    for cargo in summary.cargos:
        yield cargo.digest
        yield cargo.name
        yield f"{cargo.name}@{cargo.version}"
