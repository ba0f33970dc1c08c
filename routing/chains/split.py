"""How many layers each stage of a given order gets: dynamic programming over cuts, exact.

With Islands in a given order the hops are given, and what is left is where to cut. A stage's time grows
linearly with its layers, up to what its memory holds, so the best cut before position `p` is the least of a
window that slides with `p`: all cuts of a stage cost as many steps as there are layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic

from routing.chains.costs import Holder, ModelShape, P, Room, stage_ns

_NEVER: Final = 1 << 62

#: An Island that failed lately: only if there is no other way. More than any real token takes.
SUSPICION_NS: Final = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Place(Generic[P]):
    """An Island that could be a stage. `fixed`: the range that it holds already; None: `room_bytes` for any.
    `layer_ns`, `head_ns`: what a layer and the head cost there; `extra_ns`: whatever it holds.
    """

    peer: P
    layer_ns: int
    head_ns: int
    extra_ns: int = 0
    room_bytes: int = 0
    fixed: tuple[int, int] | None = None


def place_of_holder(holder: Holder[P]) -> Place[P]:
    """A range as it is. Its load counts as in `stage_ns`."""
    alone = stage_ns(holder.speed, holder.layers, is_head=False)
    loaded = stage_ns(holder.speed, holder.layers, is_head=False, active=holder.active)
    return Place(
        holder.peer,
        holder.speed.token_layer_ns,
        stage_ns(holder.speed, 0, is_head=True, active=holder.active),
        loaded - alone + (SUSPICION_NS if holder.suspect else 0),
        fixed=(holder.first, holder.last),
    )


def place_of_room(room: Room[P], layer_loading_ns: int = 0) -> Place[P]:
    """`layer_loading_ns`: what fetching a layer costs, shared among the tokens that it will serve."""
    return Place(
        room.peer,
        room.speed.token_layer_ns + layer_loading_ns,
        room.speed.head_ns,
        SUSPICION_NS if room.suspect else 0,
        room.room_bytes,
    )


def furthest(shape: ModelShape, first: int, room_bytes: int) -> int:
    """The last layer (exclusive) that fits beside `first` without the head; `first` if none does."""
    low, high = first, shape.layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        if shape.bytes_of(first, middle) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return max(first, low)


def split(
    shape: ModelShape, order: Sequence[Place[P]], most_ns: int = _NEVER
) -> tuple[int, tuple[int, ...]] | None:
    """(ns of a token without hops, where each stage ends) of the best cuts; None if these in this order can not
    hold the model. The last one is the head. No stage that is not held yet takes longer than `most_ns`.
    """
    layers = shape.layers
    best = [_NEVER] * (layers + 1)
    best[0] = 0
    chosen: list[list[int]] = []
    last = len(order) - 1
    for n, place in enumerate(order):
        best, cuts = _stage(shape, place, best, most_ns, is_head=n == last)
        chosen.append(cuts)
    if best[layers] >= _NEVER:
        return None
    ends, at = [layers], layers
    for cuts in reversed(chosen[1:]):
        at = cuts[at]
        ends.append(at)
    return best[layers], tuple(reversed(ends))


def _stage(
    shape: ModelShape, place: Place[P], before: list[int], most_ns: int, *, is_head: bool
) -> tuple[list[int], list[int]]:
    """The least time of everything up to each position, with one more stage; and where that stage begins."""
    layers = shape.layers
    best, cuts = [_NEVER] * (layers + 1), [0] * (layers + 1)
    fixed = place.extra_ns + (place.head_ns if is_head else 0)
    if place.fixed is not None:
        first, last = place.fixed
        if before[first] < _NEVER and (last == layers) == is_head:
            best[last] = before[first] + fixed + place.layer_ns * (last - first)
            cuts[last] = first
        return best, cuts
    most = max(0, most_ns - (place.head_ns if is_head else 0)) // max(1, place.layer_ns)
    if is_head:
        for first in range(layers - 1, max(-1, layers - 1 - most), -1):
            if shape.bytes_of(first, layers) > place.room_bytes:
                break
            sum_ns = before[first] + fixed + place.layer_ns * (layers - first)
            if sum_ns < best[layers]:
                best[layers], cuts[layers] = sum_ns, first
        return best, cuts
    window: deque[tuple[int, int]] = deque()  # (time before it less its layers' time here, position), growing
    low = 0
    for at in range(1, layers):
        if before[at - 1] < _NEVER:
            value = before[at - 1] - place.layer_ns * (at - 1)
            while window and window[-1][0] >= value:
                window.pop()
            window.append((value, at - 1))
        while low < at and (at - low > most or shape.bytes_of(low, at) > place.room_bytes):
            low += 1
        while window and window[0][1] < low:
            window.popleft()
        if window:
            best[at] = window[0][0] + fixed + place.layer_ns * at
            cuts[at] = window[0][1]
    return best, cuts


def balanced(shape: ModelShape, order: Sequence[Place[P]], slack_ns: int) -> tuple[int, tuple[int, ...]] | None:
    """As `split`, but with the slowest stage as quick as it can be for at most `slack_ns` more per token: it
    bounds what all sessions together get, and how fast prompts are read.
    """
    best = split(shape, order)
    if best is None:
        return None
    limit_ns = best[0] + slack_ns
    low, high = 0, max(place.layer_ns for place in order) * shape.layers + max(place.head_ns for place in order)
    while low < high - high // 64 - 1:
        middle = (low + high) // 2
        found = split(shape, order, middle)
        if found is not None and found[0] <= limit_ns:
            best, high = found, middle
        else:
            low = middle
    return _evened(shape, order, best, limit_ns)


def _evened(
    shape: ModelShape, order: Sequence[Place[P]], best: tuple[int, tuple[int, ...]], limit_ns: int
) -> tuple[int, tuple[int, ...]]:
    """Layers go from a stage to its neighbour, one at a time, while that makes the two more alike."""
    total_ns, ends = best[0], list(best[1])
    moved = True
    while moved:
        moved = False
        for n in range(len(order) - 1):
            for step in (-1, 1):
                changed = ends.copy()
                changed[n] += step
                before, behind = order[n], order[n + 1]
                if before.fixed or behind.fixed or not _fits(shape, order, changed, n):
                    continue
                costs_ns = step * (before.layer_ns - behind.layer_ns)
                gain = _square(order, ends, n) - _square(order, changed, n)
                if gain > 0 and total_ns + costs_ns <= limit_ns:
                    total_ns, ends, moved = total_ns + costs_ns, changed, True
    return total_ns, tuple(ends)


def _span(ends: Sequence[int], n: int) -> tuple[int, int]:
    return (ends[n - 1] if n else 0), ends[n]


def _fits(shape: ModelShape, order: Sequence[Place[P]], ends: Sequence[int], n: int) -> bool:
    """Whether stages `n` and `n + 1` have layers, and room for them."""
    return all(
        _span(ends, at)[0] < _span(ends, at)[1] and shape.bytes_of(*_span(ends, at)) <= order[at].room_bytes
        for at in (n, n + 1)
    )


def _square(order: Sequence[Place[P]], ends: Sequence[int], n: int) -> int:
    """Of the times of stages `n` and `n + 1`: the sum of squares falls as they become more alike."""
    total = 0
    for at in (n, n + 1):
        first, last = _span(ends, at)
        head_ns = order[at].head_ns if at == len(order) - 1 else 0
        total += (order[at].layer_ns * (last - first) + head_ns) ** 2
    return total
