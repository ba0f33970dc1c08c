"""What a coordinator knows of the Islands that advertise to it.

Bounded: at most `capacity` Islands, the one heard of longest ago goes first. An advert that is not
repeated expires. What the coordinator itself measures (speed seen, failures seen) stands beside the claim
and corrects it; it outlives the advert, so that nobody becomes innocent by reconnecting.

Indexed by Cargo and by the names that Islands give their Cargos, so that a job costs what its Cargo's Islands
cost and not what all cost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

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

#: Cargos of one peer whose measured speeds are remembered after it left: what an Island usually offers.
MAX_SPEEDS: Final = 64


@dataclass(slots=True)
class Experience:
    """What we saw of a peer ourselves. `reserved`: jobs of ours there now. Rates: tokens/s by Cargo digest."""

    reserved: int = 0
    suspect_until: Instant = _NEVER
    decode_tps: dict[str, float] = field(default_factory=dict[str, float])
    prefill_tps: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(slots=True)
class Island(Generic[P]):
    """One Island: its latest advert and our own experience with it. `heard`: when it last gave a sign of life;
    `advised`: when its advert came.
    """

    peer: P
    advert: IslandAdvert
    sequence: int
    heard: Instant
    experience: Experience
    advised: Instant = _NEVER

    def cargo(self, digest: CargoDigest) -> OfferedCargo | None:
        return next((offered for offered in self.advert.cargos if offered.digest == digest), None)


class Naming(NamedTuple):
    """What an Island says of a Cargo besides its digest."""

    name: str
    version: str
    runtime: str
    publisher: str


class Shelf(Generic[P]):
    """All offers of one Cargo, the oldest first, and what they add up to. For others: read only."""

    __slots__ = ("_best", "contexts", "namings", "offers", "ready", "ready_contexts", "shards")

    def __init__(self) -> None:
        self.offers: dict[P, OfferedCargo] = {}
        #: How many Islands call it so; likewise how many have this context length (of all, of those ready).
        self.namings: dict[Naming, int] = {}
        self.contexts: dict[int, int] = {}
        self.ready_contexts: dict[int, int] = {}
        self.ready = 0
        #: How many have a part of it, or room for one.
        self.shards = 0
        self._best: float | None = 0.0

    @property
    def usable(self) -> bool:
        """Whether somebody has it, or will have it soon."""
        return bool(self.contexts)

    @property
    def islands(self) -> int:
        """How many have it, or will have it soon."""
        return sum(self.contexts.values())

    @property
    def decode_tps(self) -> float:
        """The highest rate claimed by one that has all of it. Counted anew only after the one who claimed it
        has gone or changed.
        """
        if self._best is None:
            rates = (o.decode_tps for o in self.offers.values() if o.state != "failed" and o.shard is None)
            self._best = max(rates, default=0.0)
        return self._best

    @property
    def context_length(self) -> int:
        return max(self.ready_contexts or self.contexts, default=0)

    def put(self, peer: P, offered: OfferedCargo) -> None:
        before = self.offers.pop(peer, None)
        self.offers[peer] = offered
        if before == offered:
            return
        if before is not None:
            self._count(before, -1)
        self._count(offered, 1)

    def drop(self, peer: P) -> None:
        before = self.offers.pop(peer, None)
        if before is not None:
            self._count(before, -1)

    def _count(self, offered: OfferedCargo, by: int) -> None:
        if offered.shard is not None:
            self.shards += by
        if offered.state == "failed":
            return
        _add(self.namings, naming_of(offered), by)
        _add(self.contexts, offered.context_length, by)
        if offered.shard is not None:
            return  # it makes the Cargo known; ready is what a whole Island, or a whole chain, has
        if offered.state == "ready":
            _add(self.ready_contexts, offered.context_length, by)
            self.ready += by
        if by < 0 and self._best is not None and offered.decode_tps >= self._best:
            self._best = None
        elif by > 0 and self._best is not None:
            self._best = max(self._best, offered.decode_tps)


class IslandBook(Generic[P]):
    """Latest adverts by Island. Iteration order: the one heard of longest ago first."""

    def __init__(self, *, ttl_ns: int = ADVERT_TTL_NS, capacity: int = MAX_ISLANDS_PER_COORDINATOR) -> None:
        self._islands: OrderedDict[P, Island[P]] = OrderedDict()
        # Of peers that are not in the book now, the one that left longest ago first; as many as Islands.
        self._past: OrderedDict[P, Experience] = OrderedDict()
        self._shelves: dict[str, Shelf[P]] = {}
        # Digests by what Islands call them (name and name@version), each with the number of Islands that do.
        self._called: dict[str, dict[str, int]] = {}
        self._ttl_ns = ttl_ns
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._islands)

    def __iter__(self) -> Iterator[Island[P]]:
        return iter(tuple(self._islands.values()))

    @property
    def full(self) -> bool:
        return len(self._islands) >= self._capacity

    @property
    def remembered(self) -> int:
        """Peers of which there is experience, in the book or not."""
        return len(self._islands) + len(self._past)

    @property
    def shelves(self) -> Mapping[str, Shelf[P]]:
        """By Cargo digest, in the order in which Cargos were first offered."""
        return self._shelves

    def get(self, peer: P) -> Island[P] | None:
        return self._islands.get(peer)

    def offers(self, digest: str) -> Iterator[tuple[Island[P], OfferedCargo]]:
        """Islands with this Cargo and what they say of it, the one heard of longest ago first."""
        shelf = self._shelves.get(digest)
        if shelf is not None:
            for peer, offered in shelf.offers.items():
                yield self._islands[peer], offered

    def called(self, name: str) -> tuple[str, ...]:
        """Digests of Cargos that some Island calls so: by digest, name or name@version."""
        if name in self._shelves:
            return (name,)
        return tuple(self._called.get(name, ()))

    def admit(self, now: Instant, peer: P, advert: IslandAdvert, sequence: int) -> bool:
        """Take a verified advert. False if an equal or newer one is already there."""
        island = self._islands.get(peer)
        if island is None:
            experience = self._past.pop(peer, None) or Experience()
            self._islands[peer] = Island(peer, advert, sequence, now, experience, now)
            self._shelve(peer, (), advert.cargos)
            if len(self._islands) > self._capacity:
                self.lost(next(iter(self._islands)))
            return True
        if sequence <= island.sequence:
            return False
        self._shelve(peer, island.advert.cargos, advert.cargos)
        island.advert, island.sequence, island.heard, island.advised = advert, sequence, now, now
        self._islands.move_to_end(peer)
        return True

    def touch(self, now: Instant, peer: P) -> None:
        """It lives, and its advert still holds."""
        island = self._islands.get(peer)
        if island is not None:
            island.heard = now
            self._islands.move_to_end(peer)

    def lost(self, peer: P) -> bool:
        """Forget an Island whose connection is gone. False if it was not known."""
        island = self._islands.pop(peer, None)
        if island is None:
            return False
        self._shelve(peer, island.advert.cargos, ())
        self._remember(peer, island.experience)
        return True

    def late(self, now: Instant) -> list[P]:
        """Islands whose advert was not repeated in time."""
        late: list[P] = []
        for peer, island in self._islands.items():
            if now - island.heard <= self._ttl_ns:
                break
            late.append(peer)
        return late

    def expire(self, now: Instant) -> list[P]:
        """Forget Islands whose advert was not repeated in time; returns them."""
        late = self.late(now)
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
        self._learn(peer, self._experience(peer).decode_tps, digest, decode_tps)

    def measured_prefill(self, peer: P, digest: CargoDigest, prefill_tps: float) -> None:
        """How fast a prompt was read there, tokens/s, as we saw it: prompt / (first token - acceptance)."""
        self._learn(peer, self._experience(peer).prefill_tps, digest, prefill_tps)

    def _learn(self, peer: P, speeds: dict[str, float], digest: CargoDigest, tps: float) -> None:
        if tps <= 0:
            return
        before = speeds.pop(digest, tps)
        speeds[digest] = before + SPEED_WEIGHT * (tps - before)
        if island := self._islands.get(peer):
            for gone in speeds.keys() - {offered.digest for offered in island.advert.cargos}:
                del speeds[gone]
        elif len(speeds) > MAX_SPEEDS:
            del speeds[next(iter(speeds))]

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

    def _shelve(self, peer: P, before: tuple[OfferedCargo, ...], after: tuple[OfferedCargo, ...]) -> None:
        """Move a peer's offers in the indices. Of a Cargo that stands twice in an advert the last counts."""
        gone = {offered.digest: offered for offered in before}
        come = {offered.digest: offered for offered in after}
        for digest, offered in gone.items():
            if digest not in come:
                shelf = self._shelves[digest]
                shelf.drop(peer)
                if not shelf.offers:
                    del self._shelves[digest]
            self._count_names(offered, -1)
        for digest, offered in come.items():
            shelf = self._shelves.get(digest)
            if shelf is None:
                shelf = self._shelves[digest] = Shelf()
            shelf.put(peer, offered)
            self._count_names(offered, 1)

    def _count_names(self, offered: OfferedCargo, by: int) -> None:
        for name in (offered.name, f"{offered.name}@{offered.version}"):
            digests = self._called.setdefault(name, {})
            _add(digests, offered.digest, by)
            if not digests:
                del self._called[name]


def naming_of(offered: OfferedCargo) -> Naming:
    return Naming(offered.name, offered.version, offered.runtime, offered.publisher)


K = TypeVar("K")


def _add(counts: dict[K, int], key: K, by: int) -> None:
    count = counts.get(key, 0) + by
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
