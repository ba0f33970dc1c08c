"""Mixtures of experts: what it would cost to spread every layer's experts over Islands, instead of the layers.

Split by layers, a token makes one hop per stage. Split by experts, one Island (the host) has the attention and
the router of all layers, and the experts are spread over it and its helpers: at *every* layer the token's row
goes to those that have its chosen experts and back, in parallel, and the farthest one hit is waited for. So a
token costs layers x round trip: with 32 layers and 20 ms that is 640 ms of waiting against 20 ms for a chain of
two. It pays where round trips are far below a layer's time (one switch), or where no eight Islands can hold the
layers.

The figures are expectations for a router that chooses evenly. Chains run today split by layers only; this
tells the planner, and who reads its answer, what the alternative would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Final, Generic

from routing.chains.allocation import Allocation, NoAllocation, allocate
from routing.chains.costs import Holder, ModelShape, P, Room, Rtt, one_way_ns

#: Hosts that are tried: the quickest Islands that have room for what every token needs.
MAX_HOSTS: Final = 8

#: Islands that share the experts, the host included: each one more is one more that may be the farthest.
MAX_PARTS: Final = 8


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Of a mixture of experts. `dense_bytes`: of all layers together what every token needs (attention, router,
    shared experts, keys and values), with embedding and head. `expert_bytes`: one expert in all layers.
    `dense_permille`: share of a layer's time that is not the chosen experts'.
    """

    layers: int
    experts: int
    chosen: int
    dense_bytes: int
    expert_bytes: int
    dense_permille: int

    def __post_init__(self) -> None:
        if not (1 <= self.chosen <= self.experts and self.layers >= 1 and 0 <= self.dense_permille <= 1000):
            raise ValueError("a token chooses between one and all of the experts")


@dataclass(frozen=True, slots=True)
class ExpertPart(Generic[P]):
    """So many experts of every layer."""

    peer: P
    experts: int


@dataclass(frozen=True, slots=True)
class ExpertPlan(Generic[P]):
    """The first part is the host's. `token_ns`: expected for a token; `waiting_ns`: of it on the way."""

    parts: tuple[ExpertPart[P], ...]
    token_ns: int
    waiting_ns: int


def hit_by_none_ppb(experts: int, chosen: int, among: int) -> int:
    """The chance, in billionths, that none of `among` experts is chosen."""
    return comb(experts - among, chosen) * 1_000_000_000 // comb(experts, chosen)


def farthest_ns(shape: ExpertShape, ways: Sequence[tuple[int, int]]) -> int:
    """Expected round trip to the farthest helper that a layer needs. `ways`: (round trip ns, experts) each."""
    expected, farther, before = 0, 0, 1_000_000_000
    for rtt_ns, experts in sorted(ways, reverse=True):
        farther += experts
        none = hit_by_none_ppb(shape.experts, shape.chosen, farther)
        expected += rtt_ns * (before - none)  # this one is hit, and none that is farther
        before = none
    return expected // 1_000_000_000


def busiest_ns(shape: ExpertShape, takes: Sequence[tuple[int, int]]) -> int:
    """Expected time of the Island that computes longest in a layer. `takes`: (ns per expert, experts) of each.

    Exact: for each possible time, the share of choices in which nobody takes longer (coefficients of a product
    of polynomials, one per Island).
    """
    times = sorted({ns * count for ns, experts in takes for count in range(min(experts, shape.chosen) + 1)})
    every, expected, before = comb(shape.experts, shape.chosen), 0, 0
    for time_ns in times:
        ways = [1] + [0] * shape.chosen
        for ns, experts in takes:
            most = min(experts, shape.chosen, time_ns // ns if ns else shape.chosen)
            ways = [
                sum(ways[total - own] * comb(experts, own) for own in range(min(most, total) + 1))
                for total in range(shape.chosen + 1)
            ]
        within = ways[shape.chosen]
        expected += time_ns * (within - before)
        before = within
    return expected // every


def cost_ns(shape: ExpertShape, rooms: Sequence[tuple[Room[P], int]], rtt_of: Rtt[P]) -> tuple[int, int]:
    """(a token's time, of it on the way) with these Islands and their experts; the first is the host.

    The longest computation and the longest way are taken to fall together, which is a little too much.
    """
    host = rooms[0][0]
    dense_ns = host.speed.token_layer_ns * shape.dense_permille // 1000
    experts_permille = 1000 - shape.dense_permille
    takes = [
        (room.speed.token_layer_ns * experts_permille // 1000 // shape.chosen, experts)
        for room, experts in rooms
    ]
    ways = [(2 * one_way_ns(rtt_of, host.peer, room.peer), experts) for room, experts in rooms[1:]]
    waiting_ns = farthest_ns(shape, ways) * shape.layers
    return (dense_ns + busiest_ns(shape, takes)) * shape.layers + waiting_ns + host.speed.head_ns, waiting_ns


def _spread(shape: ExpertShape, rooms: Sequence[tuple[Room[P], int]]) -> list[tuple[Room[P], int]] | None:
    """Experts over Islands with room for so many each: one at a time to whoever has the fewest and room for
    more. None if they have too little room.
    """
    if sum(most for _, most in rooms) < shape.experts:
        return None
    counts = [0] * len(rooms)
    for _ in range(shape.experts):
        able = (n for n, (_, most) in enumerate(rooms) if counts[n] < most)
        counts[min(able, key=lambda n: (counts[n], n))] += 1
    return [
        (room, count) for n, ((room, _), count) in enumerate(zip(rooms, counts, strict=True)) if count or not n
    ]


def place_experts(shape: ExpertShape, rooms: Iterable[Room[P]], rtt_of: Rtt[P]) -> ExpertPlan[P] | None:
    """The best of: a host, and the experts evenly over it and its nearest helpers, few or many. None if there
    is too little room.
    """
    able = [room for room in rooms if not room.suspect]
    hosts = sorted(
        (room for room in able if room.room_bytes >= shape.dense_bytes),
        key=lambda room: (room.speed.token_layer_ns, -room.room_bytes),
    )
    best: ExpertPlan[P] | None = None
    for host in hosts[:MAX_HOSTS]:
        helpers = sorted(
            (room for room in able if room.peer != host.peer and room.room_bytes >= shape.expert_bytes),
            key=lambda room: (one_way_ns(rtt_of, host.peer, room.peer), room.speed.token_layer_ns),
        )
        near = [(host, (host.room_bytes - shape.dense_bytes) // shape.expert_bytes)]
        near += [(room, room.room_bytes // shape.expert_bytes) for room in helpers[: MAX_PARTS - 1]]
        for count in range(1, len(near) + 1):
            placed = _spread(shape, near[:count])
            if placed is None:
                continue
            token_ns, waiting_ns = cost_ns(shape, placed, rtt_of)
            if best is None or token_ns < best.token_ns:
                parts = tuple(ExpertPart(room.peer, experts) for room, experts in placed)
                best = ExpertPlan(parts, token_ns, waiting_ns)
    return best


def allocate_mixture(
    shape: ModelShape,
    experts: ExpertShape,
    rooms: Iterable[Room[P]],
    holders: Iterable[Holder[P]],
    rtt_of: Rtt[P],
) -> tuple[Allocation[P] | NoAllocation, ExpertPlan[P] | None]:
    """(split by layers, split by experts if that would be quicker per token, or is the only way)."""
    able = list(rooms)
    by_layers = allocate(shape, able, holders, rtt_of)
    by_experts = place_experts(experts, able, rtt_of)
    if by_experts is not None and isinstance(by_layers, Allocation):
        return by_layers, by_experts if by_experts.token_ns < by_layers.cost.token_ns else None
    return by_layers, by_experts
