"""Islands of followed Cargos, and which coordinators vouch for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protocol.adverts import IslandAdvert
from protocol.coordination import CargoName
from protocol.envelope import CLOCK_TOLERANCE_NS
from protocol.instants import UnixNs
from routing.following_events import FoundIsland, Sighted

P = TypeVar("P")


@dataclass(slots=True)
class FollowedIsland(Generic[P]):
    """`by`: coordinators that vouch for it, with their smallest round trip to it (0: none)."""

    peer: P
    advert: IslandAdvert
    sequence: int
    expires_unix_ns: UnixNs
    by: dict[P, int] = field(default_factory=dict["P", int])

    def shown(self) -> FoundIsland[P]:
        sighted = tuple(Sighted(peer, rtt_ns) for peer, rtt_ns in self.by.items() if rtt_ns)
        return FoundIsland(self.peer, self.advert, self.sequence, self.expires_unix_ns, sighted)


class Followed(Generic[P]):
    """By Cargo and Island. Bounded by what the follower admits from each coordinator."""

    def __init__(self) -> None:
        self._cargos: dict[CargoName, dict[P, FollowedIsland[P]]] = {}
        # What each coordinator told of each Cargo.
        self._told: dict[tuple[P, CargoName], dict[P, None]] = {}

    def count(self, cargo: CargoName) -> int:
        return len(self._cargos.get(cargo, ()))

    def get(self, cargo: CargoName, island: P) -> FollowedIsland[P] | None:
        return self._cargos.get(cargo, {}).get(island)

    def islands(self, cargo: CargoName) -> Iterator[FollowedIsland[P]]:
        yield from tuple(self._cargos.get(cargo, {}).values())

    def sighted(self, island: P) -> tuple[Sighted[P], ...]:
        """Round trips of coordinators to it, whatever the Cargo; of each coordinator the smallest."""
        least: dict[P, int] = {}
        for islands in self._cargos.values():
            known = islands.get(island)
            if known is not None:
                for peer, rtt_ns in known.by.items():
                    if rtt_ns and rtt_ns < least.get(peer, rtt_ns + 1):
                        least[peer] = rtt_ns
        return tuple(Sighted(peer, rtt_ns) for peer, rtt_ns in least.items())

    def told(self, coordinator: P, cargo: CargoName) -> int:
        """How many Islands this coordinator vouches for."""
        return len(self._told.get((coordinator, cargo), ()))

    def vouched_by(self, coordinator: P, cargo: CargoName) -> tuple[P, ...]:
        return tuple(self._told.get((coordinator, cargo), ()))

    def vouch(self, coordinator: P, cargo: CargoName, seen: FollowedIsland[P], rtt_ns: int) -> bool:
        """True if it is new or its advert is newer."""
        islands = self._cargos.setdefault(cargo, {})
        known = islands.get(seen.peer)
        news = known is None or seen.sequence > known.sequence
        if known is None:
            known = islands[seen.peer] = seen
        elif news:
            known.advert, known.sequence = seen.advert, seen.sequence
            known.expires_unix_ns = seen.expires_unix_ns
        known.by[coordinator] = rtt_ns
        self._told.setdefault((coordinator, cargo), {})[seen.peer] = None
        return news

    def unvouch(self, coordinator: P, cargo: CargoName, island: P) -> bool:
        """True if nobody vouches for it any more (it is kept until `drop`)."""
        told = self._told.get((coordinator, cargo))
        if told is None or told.pop(island, self) is self:
            return False
        if not told:
            del self._told[coordinator, cargo]
        known = self._cargos.get(cargo, {}).get(island)
        if known is None:
            return False
        known.by.pop(coordinator, None)
        return not known.by

    def drop(self, cargo: CargoName, island: P) -> bool:
        """Forget it. False if it was not known."""
        islands = self._cargos.get(cargo, {})
        known = islands.pop(island, None)
        if known is None:
            return False
        for coordinator in known.by:
            told = self._told.get((coordinator, cargo), {})
            told.pop(island, None)
            if not told:
                self._told.pop((coordinator, cargo), None)
        if not islands:
            self._cargos.pop(cargo, None)
        return True

    def expired(self, unix_now: UnixNs) -> list[tuple[CargoName, P]]:
        """Islands whose advert no longer holds, whoever vouches for it."""
        return [
            (cargo, island)
            for cargo, islands in self._cargos.items()
            for island, known in islands.items()
            if unix_now > known.expires_unix_ns + CLOCK_TOLERANCE_NS
        ]
