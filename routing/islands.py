"""What a coordinator knows of the Islands that advertise to it.

Bounded: at most `capacity` Islands, the one heard of longest ago goes first. An advert that is not
repeated expires. What the coordinator itself measures (speed seen, failures seen) stands beside the claim
and corrects it; it outlives the advert, so that nobody becomes innocent by reconnecting.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.adverts import ADVERT_TTL_NS, IslandAdvert, OfferedCargo
from protocol.ids import CargoDigest
from protocol.instants import SECOND_NS, Instant, after
from protocol.limits import MAX_ISLANDS_PER_COORDINATOR

P = TypeVar("P")

_NEVER: Final = Instant(0)

#: How long an Island that broke a promise (died, stalled, lied) is placed last. Long enough for its
#: heartbeats to tell what is wrong, short enough that a hiccup costs it little.
SUSPICION_NS: Final = 10 * SECOND_NS

#: Weight of the newest measurement in the running mean of a speed.
SPEED_WEIGHT: Final = 0.3


@dataclass(slots=True)
class Experience:
    """What we saw of a peer ourselves. `reserved`: jobs of ours there now. `decode_tps`: by Cargo digest."""

    reserved: int = 0
    suspect_until: Instant = _NEVER
    decode_tps: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(slots=True)
class Island(Generic[P]):
    """One Island: its latest advert and our own experience with it."""

    peer: P
    advert: IslandAdvert
    sequence: int
    heard: Instant
    experience: Experience

    def cargo(self, digest: CargoDigest) -> OfferedCargo | None:
        return next((offered for offered in self.advert.cargos if offered.digest == digest), None)


class IslandBook(Generic[P]):
    """Latest adverts by Island. Iteration order: the one heard of longest ago first."""

    def __init__(self, *, ttl_ns: int = ADVERT_TTL_NS, capacity: int = MAX_ISLANDS_PER_COORDINATOR) -> None:
        self._islands: OrderedDict[P, Island[P]] = OrderedDict()
        # Of peers that are not in the book now, the one that left longest ago first; as many as Islands.
        self._past: OrderedDict[P, Experience] = OrderedDict()
        self._ttl_ns = ttl_ns
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._islands)

    def __iter__(self) -> Iterator[Island[P]]:
        return iter(tuple(self._islands.values()))

    @property
    def remembered(self) -> int:
        """Peers of which there is experience, in the book or not."""
        return len(self._islands) + len(self._past)

    def get(self, peer: P) -> Island[P] | None:
        return self._islands.get(peer)

    def admit(self, now: Instant, peer: P, advert: IslandAdvert, sequence: int) -> bool:
        """Take a verified advert. False if an equal or newer one is already there."""
        island = self._islands.get(peer)
        if island is None:
            experience = self._past.pop(peer, None) or Experience()
            self._islands[peer] = Island(peer, advert, sequence, now, experience)
            if len(self._islands) > self._capacity:
                self.lost(next(iter(self._islands)))
            return True
        if sequence <= island.sequence:
            return False
        island.advert, island.sequence, island.heard = advert, sequence, now
        self._islands.move_to_end(peer)
        return True

    def lost(self, peer: P) -> bool:
        """Forget an Island whose connection is gone. False if it was not known."""
        island = self._islands.pop(peer, None)
        if island is None:
            return False
        self._remember(peer, island.experience)
        return True

    def expire(self, now: Instant) -> list[P]:
        """Forget Islands whose advert was not repeated in time; returns them."""
        late: list[P] = []
        for peer, island in self._islands.items():
            if now - island.heard <= self._ttl_ns:
                break
            late.append(peer)
        for peer in late:
            self.lost(peer)
        return late

    def next_expiry(self) -> Instant | None:
        first = next(iter(self._islands.values()), None)
        return None if first is None else after(first.heard, self._ttl_ns)

    def reserve(self, peer: P) -> None:
        """One more job of ours is on its way to this Island."""
        self._experience(peer).reserved += 1

    def release(self, peer: P) -> None:
        experience = self._experience(peer)
        experience.reserved = max(0, experience.reserved - 1)

    def suspect(self, now: Instant, peer: P) -> None:
        """It broke a promise: place it last for a while."""
        self._experience(peer).suspect_until = after(now, SUSPICION_NS)

    def measured(self, peer: P, digest: CargoDigest, decode_tps: float) -> None:
        """A job's speed there, tokens/s, as we saw it."""
        if decode_tps <= 0:
            return
        speeds = self._experience(peer).decode_tps
        before = speeds.get(digest, decode_tps)
        speeds[digest] = before + SPEED_WEIGHT * (decode_tps - before)
        if island := self._islands.get(peer):
            for gone in speeds.keys() - {offered.digest for offered in island.advert.cargos}:
                del speeds[gone]

    def _experience(self, peer: P) -> Experience:
        """What there is of it, also after it left: its job's end may be noticed after its link's."""
        if island := self._islands.get(peer):
            return island.experience
        past = self._past.get(peer)
        if past is None:
            past = Experience()
            self._remember(peer, past)
        return past

    def _remember(self, peer: P, experience: Experience) -> None:
        self._past[peer] = experience
        if len(self._past) > self._capacity:
            self._past.popitem(last=False)
