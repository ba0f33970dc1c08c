"""Who should hold which layers: a chain out of Islands with room and ranges that are held already, and spares.

Three questions in one: which Islands, in which order (hops), with how many layers each (speed, memory). For a
given order the cuts are exact (`split`). Orders are tried all where there are few Islands. Where there are
many, the ring is grown from many first stages (anchors): dynamic programming over layers, keeping the best
few for each position and last Island, each stage as full as its memory allows; then the best rings are cut
exactly and improved by exchanging, moving and removing stages until nothing gets better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from protocol.ring import MAX_SPARES, MAX_STAGES, MIN_STAGES
from routing.chains.costs import (
    ChainCost,
    Holder,
    ModelShape,
    P,
    Room,
    Rtt,
    Speed,
    cost_of,
    one_way_ns,
    stage_ns,
)
from routing.chains.split import Place, balanced, furthest, place_of_holder, place_of_room, split

T = TypeVar("T", bound="_Peered")

#: Up to so many Islands every order of every choice of them is looked at: 1,950 orders of 6.
EXACT_ISLANDS: Final = 6

#: Beyond: rings are grown from so many first stages, each with so many Islands that suit it best.
MAX_ANCHORS: Final = 16
MAX_NEIGHBOURS: Final = 10

#: Partial chains kept for each position and last Island, and of each length in all.
MAX_LABELS: Final = 2
MAX_BEAM: Final = 48

#: Rings that are improved at the end, and steps of it.
MAX_POLISHED: Final = 4
MAX_STEPS: Final = 12

#: Fetching weights costs time once, and serves many tokens: 84 ms for a MiB at 100 Mbit/s, over 100,000 tokens.
#: So ranges that are held already are preferred to equal ones that are not.
LOAD_NS_PER_MIB: Final = 840

#: What a token may take longer so that no stage is much slower than the others: 1/50. Cuts between equally
#: fast Islands cost the same wherever they are; this makes them even.
BALANCE_DIVISOR: Final = 50

_MIB: Final = 1 << 20
_NEVER: Final = 1 << 62


class _Peered(Protocol):
    @property
    def peer(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Assigned(Generic[P]):
    """Layers `first` to `last` (exclusive) belong to this Island. `is_new`: it has yet to load them."""

    peer: P
    first: int
    last: int
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class Allocation(Generic[P]):
    """`stages` in order, the head last; `spares` hold ranges of stages too. `cost`: of a token without load."""

    stages: tuple[Assigned[P], ...]
    spares: tuple[Assigned[P], ...]
    cost: ChainCost

    @property
    def orders(self) -> tuple[Assigned[P], ...]:
        """What has to be ordered (`HoldShard`), stages first."""
        return tuple(each for each in (*self.stages, *self.spares) if each.is_new)


@dataclass(frozen=True, slots=True)
class NoAllocation:
    """No 2 to 8 of these Islands can hold the model. Bytes: of all of it, and what the 8 roomiest have."""

    needed_bytes: int
    room_bytes: int

    @property
    def detail(self) -> str:
        """For people."""
        return (
            f"no {MIN_STAGES} to {MAX_STAGES} Islands hold {self.needed_bytes // _MIB} MiB together: "
            f"the roomiest have {self.room_bytes // _MIB} MiB"
        )


class _Ring(NamedTuple):
    """An order of places with its cuts. Compares by cost, then by length."""

    total_ns: int
    stages: int
    order: tuple[int, ...]
    ends: tuple[int, ...]


class _Label(NamedTuple):
    """The beginning of a ring: places by number; their layers end at a position."""

    cost_ns: int
    order: tuple[int, ...]


class _Growth(NamedTuple):
    """Rings that grow. `starts`: where held ranges begin; `longer`: labels with one more stage, by position."""

    starts: tuple[int, ...]
    longer: dict[int, list[_Label]]
    found: list[_Ring]


class _Search(Generic[P]):
    def __init__(self, shape: ModelShape, places: Sequence[Place[P]], rtt_of: Rtt[P]) -> None:
        self.shape = shape
        self.places = places
        self._rtt_of = rtt_of
        self._hops: dict[tuple[int, int], int] = {}
        self._rings: dict[tuple[int, ...], _Ring | None] = {}
        self._quickest_ns = min((place.layer_ns for place in places), default=0)

    def hop_ns(self, a: int, b: int) -> int:
        """One way; the same there and back, as estimates are."""
        pair = (a, b) if a < b else (b, a)
        known = self._hops.get(pair)
        if known is None:
            known = one_way_ns(self._rtt_of, self.places[pair[0]].peer, self.places[pair[1]].peer)
            self._hops[pair] = known
        return known

    def length_ns(self, order: Sequence[int]) -> int:
        """Of all hops, the closing one too."""
        return sum(self.hop_ns(order[n - 1], order[n]) for n in range(len(order)))

    def ring(self, order: tuple[int, ...], below_ns: int = _NEVER) -> _Ring | None:
        """With the best cuts; None if it can not hold the model or can not cost less than `below_ns`."""
        if order in self._rings:
            return self._rings[order]
        hops_ns = self.length_ns(order)
        if hops_ns + self.shape.layers * self._quickest_ns > below_ns:
            return None
        cut = split(self.shape, [self.places[n] for n in order])
        made = None if cut is None else _Ring(cut[0] + hops_ns, len(order), order, cut[1])
        self._rings[order] = made
        return made

    # --- few Islands ------------------------------------------------------------------------------

    def try_all(self) -> _Ring | None:
        best: _Ring | None = None
        for count in range(MIN_STAGES, min(MAX_STAGES, len(self.places)) + 1):
            for order in permutations(range(len(self.places)), count):
                best = _better(best, self.ring(order, _NEVER if best is None else best.total_ns))
        return best

    # --- many -------------------------------------------------------------------------------------

    def grow_all(self) -> _Ring | None:
        """The best of rings grown from many first stages, improved."""
        grown: list[_Ring] = []
        pools: dict[tuple[int, ...], list[int]] = {}
        best: _Ring | None = None
        for anchor in self._anchors():
            pool = self._pool(anchor)
            for ring in self._grow(anchor, pool, _NEVER if best is None else best.total_ns):
                best = _better(best, ring)
                grown.append(ring)
                pools[ring.order] = pool
        grown.sort()
        for ring in grown[:MAX_POLISHED]:
            best = _better(best, self._polish(ring, pools[ring.order]))
        return best

    def _span(self, place: Place[P]) -> int:
        """Layers that it takes, about."""
        if place.fixed is not None:
            return place.fixed[1] - place.fixed[0]
        return place.room_bytes * self.shape.layers // max(1, self.shape.total_bytes)

    def _anchors(self) -> list[int]:
        """First stages to try: half of them the quickest, half spread over the rest."""
        able = [
            n
            for n, place in enumerate(self.places)
            if (place.fixed[0] == 0 if place.fixed else furthest(self.shape, 0, place.room_bytes) > 0)
        ]
        able.sort(
            key=lambda n: (self.places[n].extra_ns, self.places[n].layer_ns, -self._span(self.places[n]), n)
        )
        if len(able) <= MAX_ANCHORS:
            return able
        half = MAX_ANCHORS // 2
        rest = able[half:]
        return able[:half] + [rest[n * len(rest) // half] for n in range(half)]

    def _pool(self, anchor: int) -> list[int]:
        """Who suits this first stage best: what a layer costs there, with its share of the way to it."""

        def score(n: int) -> tuple[int, int]:
            place = self.places[n]
            span = max(1, self._span(place))
            return place.extra_ns + place.layer_ns + self.hop_ns(anchor, n) // span, n

        least = min(self.shape.layer_bytes)
        able = [
            n
            for n, place in enumerate(self.places)
            if n != anchor and (place.fixed or place.room_bytes >= least)
        ]
        free = sorted((n for n in able if self.places[n].fixed is None), key=score)[:MAX_NEIGHBOURS]
        held = sorted((n for n in able if self.places[n].fixed is not None), key=score)[:MAX_NEIGHBOURS]
        return free + held

    def _grow(self, anchor: int, pool: Sequence[int], best_ns: int) -> Iterator[_Ring]:
        """Complete rings from this first stage, those that may turn out to cost less than `best_ns`.

        Stages as full as they can are not yet cut well: a quarter may still be gained.
        """
        below_ns = best_ns + best_ns // 4
        starts = tuple(sorted({f[0] for n in pool if (f := self.places[n].fixed) is not None}))
        quickest_ns = min((self.places[n].layer_ns for n in pool), default=0)
        labels: dict[int, list[_Label]] = {}
        for end in self._ends(anchor, 0, starts):
            place = self.places[anchor]
            labels.setdefault(end, []).append(_Label(place.extra_ns + place.layer_ns * end, (anchor,)))
        found: list[_Ring] = []
        for _ in range(1, MAX_STAGES):
            growth = _Growth(starts, {}, found)
            for at, at_labels in sorted(labels.items()):
                left_ns = (self.shape.layers - at) * quickest_ns
                for label in at_labels:
                    if label.cost_ns + left_ns + self.hop_ns(label.order[-1], anchor) > below_ns:
                        continue
                    for n in pool:
                        if n not in label.order:
                            self._extend(label, at, n, growth)
            labels = self._kept(growth.longer)
        found.sort()
        for ring in found[:MAX_POLISHED]:
            cut = self.ring(ring.order)
            if cut is not None:
                yield cut

    def _extend(self, label: _Label, at: int, n: int, growth: _Growth) -> None:
        place = self.places[n]
        cost_ns = label.cost_ns + self.hop_ns(label.order[-1], n) + place.extra_ns
        order = (*label.order, n)
        layers = self.shape.layers
        if self._fits_to_end(place, at):
            total_ns = cost_ns + place.layer_ns * (layers - at) + place.head_ns + self.hop_ns(n, order[0])
            growth.found.append(_Ring(total_ns, len(order), order, ()))
        for end in self._ends(n, at, growth.starts):
            growth.longer.setdefault(end, []).append(_Label(cost_ns + place.layer_ns * (end - at), order))

    def _fits_to_end(self, place: Place[P], at: int) -> bool:
        if place.fixed is not None:
            return place.fixed == (at, self.shape.layers)
        return self.shape.bytes_of(at, self.shape.layers) <= place.room_bytes

    def _ends(self, n: int, at: int, starts: Sequence[int]) -> list[int]:
        """Where a stage that is not the head would end: as far as it can, or where a held range begins."""
        place = self.places[n]
        if place.fixed is not None:
            return [place.fixed[1]] if place.fixed[0] == at and place.fixed[1] < self.shape.layers else []
        end = furthest(self.shape, at, place.room_bytes)
        if end == at:
            return []
        return [*(start for start in starts if at < start < end), end]

    def _kept(self, labels: dict[int, list[_Label]]) -> dict[int, list[_Label]]:
        """The best of each position and last Island; of all, those that got farthest for their cost."""
        kept: list[tuple[int, int, _Label]] = []
        for at, at_labels in labels.items():
            counts: dict[int, int] = {}
            for label in sorted(at_labels):
                last = label.order[-1]
                counts[last] = counts.get(last, 0) + 1
                if counts[last] <= MAX_LABELS:
                    kept.append((label.cost_ns * self.shape.layers // at, at, label))
        kept.sort()
        thinned: dict[int, list[_Label]] = {}
        for _, at, label in kept[:MAX_BEAM]:
            thinned.setdefault(at, []).append(label)
        return thinned

    # --- improving --------------------------------------------------------------------------------

    def _polish(self, ring: _Ring, pool: Sequence[int]) -> _Ring:
        best = ring
        for _ in range(MAX_STEPS):
            before = best
            for order in self._changes(before.order, pool):
                best = _better(best, self.ring(order, best.total_ns)) or best
            if best == before:
                break
        return best

    def _changes(self, order: tuple[int, ...], pool: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Rings with one change, each turned in every way: who is first has the embedding and who is last the
        head, and what fits there decides as much as who takes part.
        """
        for ring in self._other_rings(order, pool):
            for n in range(len(ring)):
                yield ring[n:] + ring[:n]

    def _other_rings(self, order: tuple[int, ...], pool: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """As it is; a stage moved, removed, exchanged for another Island, or one more put in."""
        yield order
        count = len(order)
        for n in range(count):
            less = order[:n] + order[n + 1 :]
            if count > MIN_STAGES:
                yield less
            for to in range(1, count - 1):
                turned = less[n:] + less[:n]  # begins behind the one that moves
                yield (*turned[:to], order[n], *turned[to:])
        others = [n for n in pool if n not in order]
        for other in others:
            for n in range(count):
                yield (*order[:n], other, *order[n + 1 :])
                if count < MAX_STAGES:
                    yield (*order[:n], other, *order[n:])


def _better(a: _Ring | None, b: _Ring | None) -> _Ring | None:
    """The cheaper one; of equals the shorter, then the first."""
    if a is None or (b is not None and b[:2] < a[:2]):
        return b
    return a


def allocate(
    shape: ModelShape,
    rooms: Iterable[Room[P]],
    holders: Iterable[Holder[P]],
    rtt_of: Rtt[P],
    *,
    spares: int = 1,
    load_ns_per_mib: int = LOAD_NS_PER_MIB,
    exact_islands: int = EXACT_ISLANDS,
) -> Allocation[P] | NoAllocation:
    """The chain with the least expected time for a token, and up to `spares` further Islands for each of its
    ranges out of those left over. `holders`: ranges that are held (or being loaded) already; they stay as
    they are.
    """
    held = _once(holders)
    known = {holder.peer for holder in held}
    free = _once(room for room in rooms if room.peer not in known)
    loading_ns = load_ns_per_mib * shape.total_bytes // shape.layers // _MIB
    places = [
        *(place_of_holder(holder) for holder in held),
        *(place_of_room(room, loading_ns) for room in free),
    ]
    search = _Search(shape, places, rtt_of)
    best = search.try_all() if len(places) <= exact_islands else search.grow_all()
    if best is None:
        roomiest = sorted((room.room_bytes for room in free), reverse=True)[:MAX_STAGES]
        return NoAllocation(shape.total_bytes, sum(roomiest))
    cut = balanced(shape, [places[n] for n in best.order], best.total_ns // BALANCE_DIVISOR)
    ends = best.ends if cut is None else cut[1]
    starts = (0, *ends[:-1])
    stages = tuple(
        Assigned(places[n].peer, first, last, places[n].fixed is None)
        for n, first, last in zip(best.order, starts, ends, strict=True)
    )
    speeds: dict[P, Speed] = {h.peer: h.speed for h in held} | {r.peer: r.speed for r in free}
    loads = {holder.peer: holder.active for holder in held}
    cost = cost_of([(s.peer, speeds[s.peer], s.last - s.first, loads.get(s.peer, 0)) for s in stages], rtt_of)
    return Allocation(stages, _spares(shape, stages, free, held, rtt_of, wanted=min(spares, MAX_SPARES)), cost)


def _once(items: Iterable[T]) -> list[T]:
    """Each peer once, the first word counts."""
    found: dict[object, T] = {}
    for item in items:
        found.setdefault(item.peer, item)
    return list(found.values())


def _spares(
    shape: ModelShape,
    stages: Sequence[Assigned[P]],
    rooms: Sequence[Room[P]],
    held: Sequence[Holder[P]],
    rtt_of: Rtt[P],
    *,
    wanted: int,
) -> tuple[Assigned[P], ...]:
    """Leftover Islands for the ranges that have fewer than `wanted` others.

    First the places with the fewest, of these the one whose holder has the least karma, then the one with most
    layers (the most to replay). For each the one that would be the quickest there.
    """
    peers = {stage.peer for stage in stages}
    karma = {each.peer: each.karma_milli for each in (*rooms, *held)}
    left = {room.peer: room for room in rooms if room.peer not in peers and not room.suspect}
    count = [sum((h.first, h.last) == (s.first, s.last) for h in held if h.peer not in peers) for s in stages]
    open_places = set(range(len(stages)))
    found: list[Assigned[P]] = []
    while open_places:
        n = min(
            open_places,
            key=lambda n: (count[n], karma[stages[n].peer], stages[n].first - stages[n].last, n),
        )
        stage = stages[n]
        best = best_spare(shape, stages, n, list(left.values()), rtt_of) if count[n] < wanted else None
        if best is None:
            open_places.discard(n)
            continue
        del left[best]
        count[n] += 1
        found.append(Assigned(best, stage.first, stage.last))
    return tuple(found)


def best_spare(
    shape: ModelShape, stages: Sequence[Assigned[P]], n: int, rooms: Iterable[Room[P]], rtt_of: Rtt[P]
) -> P | None:
    """Of Islands with room the one that would be the quickest at place `n` of this chain; None if the range
    fits none.
    """
    stage, before, behind = stages[n], stages[n - 1].peer, stages[(n + 1) % len(stages)].peer
    needed = shape.bytes_of(stage.first, stage.last)
    is_head = n == len(stages) - 1
    fitting = [room for room in rooms if room.room_bytes >= needed]
    if not fitting:
        return None

    def cost(room: Room[P]) -> int:
        compute = stage_ns(room.speed, stage.last - stage.first, is_head=is_head)
        return compute + one_way_ns(rtt_of, before, room.peer) + one_way_ns(rtt_of, room.peer, behind)

    return min(fitting, key=cost).peer
