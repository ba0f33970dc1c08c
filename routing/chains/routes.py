"""The best chain out of ranges that Islands hold already: a shortest path through layers, closed to a ring.

Every range is an edge from its first layer to its last; a chain is a path from layer 0 to the end, of 2 to 8
edges, each with its whole range. A token's time is a sum over the path, so dynamic programming finds the
best one for a given first stage (the head must send back to it, so it must be known). A prompt's time has the
slowest stage in it: the path is sought anew without stages as slow as that one, until no quicker whole is left.

Where very many hold the same range, only those near a few first stages are looked at (`MAX_ANCHORS`,
`MAX_PER_RANGE`); with fewer the answer is the best there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeAlias

from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS
from protocol.ring import MAX_SPARES, MAX_STAGES, MIN_STAGES, Chain, Dtype, Stage, StagePeer
from routing.chains.costs import (
    CHUNK_ROWS,
    ChainCost,
    Holder,
    P,
    Rtt,
    chunk_ns,
    chunks_of,
    cost_of,
    one_way_ns,
    stage_ns,
)

#: First stages that are tried, and holders of each further range near each of them.
MAX_ANCHORS: Final = 12
MAX_PER_RANGE: Final = 8

#: How often a path is sought anew without its slowest stage. Prompts are short beside answers: few do.
MAX_BOTTLENECKS: Final = 8

#: An Island that failed lately counts as this much slower for each token: more than any real stage takes.
SUSPICION_NS: Final = 10_000 * MILLISECOND_NS

#: As in routing.placement: what is near enough to the best, and from when on the word of a load is old.
NEAR_BEST_DIVISOR: Final = 10
STALE_LOAD_NS: Final = 500 * MILLISECOND_NS

#: A job whose length nobody knows.
TYPICAL_PROMPT_TOKENS: Final = 128
TYPICAL_OUTPUT_TOKENS: Final = 256

_Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Route(Generic[P]):
    """A chain, who stands in it (the head last), and what it is expected to cost."""

    chain: Chain
    holders: tuple[Holder[P], ...]
    cost: ChainCost
    total_ns: int


@dataclass(frozen=True, slots=True)
class NoRoute:
    """Why there is no chain. `missing`: layer ranges that nobody holds; `busy`: there would be one if stages
    that have no free slot had one.
    """

    missing: tuple[tuple[int, int], ...] = ()
    busy: bool = False

    @property
    def detail(self) -> str:
        """For people."""
        if self.missing:
            ranges = ", ".join(f"{first}-{last - 1}" for first, last in self.missing)
            return f"no Island holds layers {ranges}"
        if self.busy:
            return "the Islands that hold some of the layers have no free slot"
        return (
            "the ranges that Islands hold do not fit together: they overlap, or need fewer than "
            f"{MIN_STAGES} or more than {MAX_STAGES} stages"
        )


class _Weights(NamedTuple):
    """Of one holder as a stage: `path_ns` adds up, `chunk_ns` is what may hold all others up."""

    path_ns: int
    chunk_ns: int


class _Job(NamedTuple):
    prompt: int
    output: int

    @property
    def hops(self) -> int:
        """Times that a hop counts: once for each token, the first one's with the prompt's last chunk."""
        return max(1, self.output)


def _weigh(holder: Holder[P], job: _Job, *, is_head: bool) -> _Weights:
    token = stage_ns(holder.speed, holder.layers, is_head=is_head, active=holder.active)
    chunk = chunk_ns(holder.speed, holder.layers, active=holder.active)
    fill = chunk * min(job.prompt, CHUNK_ROWS) // CHUNK_ROWS + (holder.speed.head_ns if is_head else 0)
    suspicion = SUSPICION_NS * job.output if holder.suspect else 0
    return _Weights(token * max(0, job.output - 1) + fill + suspicion, chunk)


def missing_layers(layers: int, ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """What of 0..layers no range covers."""
    gaps: list[tuple[int, int]] = []
    at = 0
    for first, last in sorted(ranges):
        if first > at:
            gaps.append((at, first))
        at = max(at, last)
    if at < layers:
        gaps.append((at, layers))
    return tuple(gaps)


def _useful(layers: int, ranges: Iterable[_Range]) -> list[_Range]:
    """Those that lie on a path from 0 to the end of 2 to 8 stages, in order."""
    known = sorted(set(ranges))
    ahead: dict[int, set[int]] = {0: {0}}
    for first, last in known:
        counts = {n + 1 for n in ahead.get(first, ()) if n < MAX_STAGES}
        ahead.setdefault(last, set()).update(counts)
    behind: dict[int, set[int]] = {layers: {0}}
    for first, last in reversed(known):
        counts = {n + 1 for n in behind.get(last, ()) if n < MAX_STAGES}
        behind.setdefault(first, set()).update(counts)
    return [
        (first, last)
        for first, last in known
        if any(
            MIN_STAGES <= a + 1 + b <= MAX_STAGES for a in ahead.get(first, ()) for b in behind.get(last, ())
        )
    ]


def _valid(layers: int, holders: Iterable[Holder[P]], excluded: AbstractSet[P]) -> list[Holder[P]]:
    """Each peer once, with a range that exists."""
    found: dict[P, Holder[P]] = {}
    for holder in holders:
        fits = 0 <= holder.first < holder.last <= layers
        if fits and holder.peer not in excluded and holder.peer not in found:
            found[holder.peer] = holder
    return list(found.values())


def _no_route(layers: int, holders: Sequence[Holder[P]]) -> NoRoute:
    missing = missing_layers(layers, {(h.first, h.last) for h in holders})
    if missing:
        return NoRoute(missing)
    return NoRoute(busy=bool(_useful(layers, {(h.first, h.last) for h in holders})))


class _Search(Generic[P]):
    """The holders on useful ranges, by range, and what each weighs."""

    def __init__(self, layers: int, holders: Sequence[Holder[P]], rtt_of: Rtt[P], job: _Job) -> None:
        self.layers = layers
        self.rtt_of = rtt_of
        self.job = job
        self.by_range: dict[_Range, list[Holder[P]]] = {
            span: [] for span in _useful(layers, {(h.first, h.last) for h in holders})
        }
        self.weights: dict[P, _Weights] = {}
        for holder in holders:
            span = (holder.first, holder.last)
            if span in self.by_range:
                self.by_range[span].append(holder)
                self.weights[holder.peer] = _weigh(holder, job, is_head=holder.last == layers)

    def hop_ns(self, a: P, b: P) -> int:
        return one_way_ns(self.rtt_of, a, b) * self.job.hops

    def anchors(self, near_ns: Callable[[P], int]) -> list[Holder[P]]:
        """First stages to try, the most promising first."""
        firsts = [h for (first, _), held in self.by_range.items() if first == 0 for h in held]
        if len(firsts) > MAX_ANCHORS:
            firsts.sort(key=lambda h: (self.weights[h.peer].path_ns + near_ns(h.peer)) // h.layers)
        return firsts[:MAX_ANCHORS]

    def around(self, anchor: Holder[P]) -> dict[int, list[Holder[P]]]:
        """By first layer: who might follow somewhere behind this first stage."""
        found: dict[int, list[Holder[P]]] = {}
        for (first, _), held in self.by_range.items():
            if first == 0:
                continue
            near = held
            if len(held) > MAX_PER_RANGE:
                near = sorted(
                    held,
                    key=lambda h: (self.weights[h.peer].path_ns + self.hop_ns(anchor.peer, h.peer), h.active),
                )[:MAX_PER_RANGE]
            found.setdefault(first, []).extend(near)
        return found

    def best_from(self, anchor: Holder[P]) -> tuple[int, tuple[Holder[P], ...]] | None:
        """(total ns, stages) of the best ring with this first stage."""
        nearby = self.around(anchor)
        further = chunks_of(self.job.prompt) - 1
        limit_ns: int | None = None
        best: tuple[int, tuple[Holder[P], ...]] | None = None
        for _ in range(MAX_BOTTLENECKS):
            found = self._shortest(anchor, nearby, limit_ns)
            if found is None or (best is not None and found[0] >= best[0]):
                break
            path_ns, stages = found
            slowest_ns = max(self.weights[h.peer].chunk_ns for h in stages)
            total_ns = path_ns + further * slowest_ns
            if best is None or total_ns < best[0]:
                best = (total_ns, stages)
            if not further:
                break
            limit_ns = slowest_ns
        return best

    def _shortest(
        self, anchor: Holder[P], nearby: dict[int, list[Holder[P]]], limit_ns: int | None
    ) -> tuple[int, tuple[Holder[P], ...]] | None:
        """The least sum of a ring with stages below `limit_ns` per chunk; fewer stages on a tie."""
        if limit_ns is not None and self.weights[anchor.peer].chunk_ns >= limit_ns:
            return None
        ends: dict[tuple[int, int], dict[P, tuple[int, tuple[Holder[P], ...]]]] = {
            (anchor.last, 1): {anchor.peer: (self.weights[anchor.peer].path_ns, (anchor,))}
        }
        best: tuple[int, tuple[Holder[P], ...]] | None = None
        for at in sorted({anchor.last, *nearby}):
            for count in range(1, MAX_STAGES):
                for so_far, path in ends.get((at, count), {}).values():
                    for after in nearby.get(at, ()):
                        weights = self.weights[after.peer]
                        if limit_ns is not None and weights.chunk_ns >= limit_ns:
                            continue
                        sum_ns = so_far + self.hop_ns(path[-1].peer, after.peer) + weights.path_ns
                        if after.last == self.layers:
                            sum_ns += self.hop_ns(after.peer, anchor.peer)
                            if best is None or (sum_ns, count + 1) < (best[0], len(best[1])):
                                best = (sum_ns, (*path, after))
                            continue
                        known = ends.setdefault((after.last, count + 1), {})
                        if after.peer not in known or sum_ns < known[after.peer][0]:
                            known[after.peer] = (sum_ns, (*path, after))
        return best


def route(
    cargo: str,
    layers: int,
    holders: Iterable[Holder[P]],
    rtt_of: Rtt[P],
    *,
    prompt_tokens: int = TYPICAL_PROMPT_TOKENS,
    output_tokens: int = TYPICAL_OUTPUT_TOKENS,
    dtype: Dtype = "f16s",
    excluded: AbstractSet[P] = frozenset(),
    consumer: P | None = None,
    dice: Dice | None = None,
    max_spares: int = MAX_SPARES,
) -> Route[P] | NoRoute:
    """The chain that is expected to finish the job first, with spares at each place; or why there is none.

    `holders`: Islands with ready ranges that pass the job's requirements (`routing.chains.offers`).
    `consumer`: who the head answers. `dice`: if the load of the best is old news, the less loaded of two
    near-best chains is taken, so that not all gateways choose the same one.
    """
    job = _Job(max(1, prompt_tokens), max(1, output_tokens))
    usable = _valid(layers, holders, excluded)
    free = [holder for holder in usable if not holder.is_full]
    search = _Search(layers, free, rtt_of, job)

    def answer_ns(peer: P) -> int:
        return 0 if consumer is None else one_way_ns(rtt_of, peer, consumer)

    found: list[tuple[int, tuple[Holder[P], ...]]] = []
    for anchor in search.anchors(answer_ns):
        best = search.best_from(anchor)
        if best is not None:
            found.append((best[0] + 2 * answer_ns(best[1][-1].peer), best[1]))
    if not found:
        return _no_route(layers, usable)
    found.sort(key=lambda each: (each[0], len(each[1])))
    total_ns, stages = _pick(found, dice)
    peers = {holder.peer for holder in stages}
    standby = [holder for holder in free if holder.peer not in peers]
    chain = Chain(
        cargo,
        tuple(
            Stage(_stage_peer(h), h.first, h.last, _spares(n, stages, standby, search, max_spares))
            for n, h in enumerate(stages)
        ),
        dtype,
    )
    rows = [(h.peer, h.speed, h.layers, h.active) for h in stages]
    return Route(chain, stages, cost_of(rows, rtt_of, job.prompt), total_ns)


def _pick(
    found: Sequence[tuple[int, tuple[Holder[P], ...]]], dice: Dice | None
) -> tuple[int, tuple[Holder[P], ...]]:
    best = found[0]
    if dice is None or all(holder.load_age_ns <= STALE_LOAD_NS for holder in best[1]):
        return best
    limit_ns = best[0] + best[0] // NEAR_BEST_DIVISOR
    near = [each for each in found if each[0] <= limit_ns]
    if len(near) == 1 or not any(holder.active for _, stages in near for holder in stages):
        return best
    return min(dice.sample(near, 2), key=lambda each: (_load_permille(each[1]), each[0]))


def _load_permille(stages: Sequence[Holder[P]]) -> int:
    return max(1000 * holder.active // max(1, holder.slots) for holder in stages)


def _stage_peer(holder: Holder[P]) -> StagePeer:
    return StagePeer(str(holder.peer), holder.addresses)


def _spares(
    place: int, stages: Sequence[Holder[P]], standby: Sequence[Holder[P]], search: _Search[P], most: int
) -> tuple[StagePeer, ...]:
    """Who else holds the range of this place, the best as its replacement first."""
    holder = stages[place]
    before, behind = stages[place - 1].peer, stages[(place + 1) % len(stages)].peer
    same = [h for h in standby if (h.first, h.last) == (holder.first, holder.last)]

    def cost(h: Holder[P]) -> int:
        return search.weights[h.peer].path_ns + search.hop_ns(before, h.peer) + search.hop_ns(h.peer, behind)

    return tuple(_stage_peer(h) for h in sorted(same, key=cost)[: min(most, MAX_SPARES)])
