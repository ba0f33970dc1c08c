"""Who decides about chains: production's planner, chance, and a greedy rule that looks at one step only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from protocol.ring import MAX_SPARES, MAX_STAGES, MIN_STAGES, Chain, Stage, StagePeer
from routing.chains.costs import one_way_ns, stage_ns
from routing.chains.plan import (
    Allocation,
    Assigned,
    Holder,
    ModelShape,
    Room,
    Route,
    allocate,
    best_spare,
    route,
)
from routing.chains.split import furthest
from sim.draws import Draws

#: Attempts to lay out a chain by chance before no more is tried.
_MAX_TRIES: Final = 200

RttOf = Callable[[str, str], int]


@dataclass(frozen=True, slots=True)
class Job:
    """What a route is for. Token counts."""

    prompt: int
    output: int


class Strategy(Protocol):
    """Peers are names."""

    def lay_out(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        """Stages of one chain more out of these, or none."""
        ...

    def join(self, stages: Sequence[Assigned[str]], place: int, rooms: Sequence[Room[str]]) -> str | None:
        """Who of these should hold this place's range, too."""
        ...

    def route(
        self, cargo: str, holders: Sequence[Holder[str]], job: Job, excluded: frozenset[str]
    ) -> Chain | None:
        """A chain for a job."""
        ...


class Planned:
    """Production's planner, with distances estimated from network coordinates."""

    def __init__(self, shape: ModelShape, rtt_of: RttOf, dice: Draws) -> None:
        self._shape = shape
        self._rtt_of = rtt_of
        self._dice = dice

    def lay_out(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        found = allocate(self._shape, rooms, (), self._rtt_of, spares=0)
        return found.stages if isinstance(found, Allocation) else ()

    def join(self, stages: Sequence[Assigned[str]], place: int, rooms: Sequence[Room[str]]) -> str | None:
        return best_spare(self._shape, stages, place, rooms, self._rtt_of)

    def route(
        self, cargo: str, holders: Sequence[Holder[str]], job: Job, excluded: frozenset[str]
    ) -> Chain | None:
        found = route(
            cargo,
            self._shape.layers,
            holders,
            self._rtt_of,
            prompt_tokens=job.prompt,
            output_tokens=job.output,
            excluded=excluded,
            dice=self._dice,
        )
        return found.chain if isinstance(found, Route) else None


class _StepByStep:
    """Chains made stage after stage; subclasses say who comes next."""

    def __init__(self, shape: ModelShape, rtt_of: RttOf, dice: Draws) -> None:
        self._shape = shape
        self._rtt_of = rtt_of
        self._dice = dice

    def _in_order(self, rooms: Sequence[Room[str]]) -> list[Room[str]]:
        """Who is asked first to hold layers."""
        raise NotImplementedError

    def _next(self, before: str | None, able: Sequence[Holder[str]]) -> list[Holder[str]]:
        """Who is asked first to be a job's next stage."""
        raise NotImplementedError

    def lay_out(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        """Each takes as many of the layers that are left as it can."""
        raise NotImplementedError

    def _fill(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        shape, stages, at = self._shape, list[Assigned[str]](), 0
        for room in rooms:
            ends_here = bool(stages) and shape.bytes_of(at, shape.layers) <= room.room_bytes
            end = shape.layers if ends_here else furthest(shape, at, room.room_bytes)
            if end > at:
                stages.append(Assigned(room.peer, at, end))
                at = end
            if at == shape.layers:
                return tuple(stages)
            if len(stages) == MAX_STAGES:
                return ()
        return ()

    def join(self, stages: Sequence[Assigned[str]], place: int, rooms: Sequence[Room[str]]) -> str | None:
        needed = self._shape.bytes_of(stages[place].first, stages[place].last)
        fitting = [room for room in self._in_order(rooms) if room.room_bytes >= needed]
        return fitting[0].peer if fitting else None

    def route(
        self, cargo: str, holders: Sequence[Holder[str]], job: Job, excluded: frozenset[str]
    ) -> Chain | None:
        del job
        free = [h for h in holders if not h.is_full and h.peer not in excluded]
        found = self._walk([], 0, free)
        if found is None or len(found) < MIN_STAGES:
            return None
        peers = {holder.peer for holder in found}
        return Chain(cargo, tuple(self._stage(holder, free, peers) for holder in found))

    def _walk(self, path: list[Holder[str]], at: int, free: Sequence[Holder[str]]) -> list[Holder[str]] | None:
        """The first way to the end, in the order of `_next`; steps that lead nowhere are taken back."""
        if at == self._shape.layers:
            return path
        if len(path) == MAX_STAGES:
            return None
        able = [holder for holder in free if holder.first == at]
        seen: set[int] = set()
        for holder in self._next(path[-1].peer if path else None, able):
            if holder.last in seen:
                continue  # another one that ends there leads nowhere either
            found = self._walk([*path, holder], holder.last, free)
            if found is not None:
                return found
            seen.add(holder.last)
        return None

    def _stage(self, holder: Holder[str], free: Sequence[Holder[str]], taken: set[str]) -> Stage:
        same = [h for h in free if (h.first, h.last) == (holder.first, holder.last) and h.peer not in taken]
        spares = tuple(StagePeer(h.peer) for h in self._next(holder.peer, same)[:MAX_SPARES])
        return Stage(StagePeer(holder.peer), holder.first, holder.last, spares)


class ByChance(_StepByStep):
    """Any Island that can."""

    def lay_out(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        for _ in range(_MAX_TRIES):
            stages = self._fill(self._in_order(rooms))
            if stages:
                return stages
        return ()

    def _in_order(self, rooms: Sequence[Room[str]]) -> list[Room[str]]:
        return self._dice.sample(rooms, len(rooms))

    def _next(self, before: str | None, able: Sequence[Holder[str]]) -> list[Holder[str]]:
        del before
        return self._dice.sample(able, len(able))


class Greedy(_StepByStep):
    """The quickest Islands hold layers; a job takes at each step the next stage that is best from there."""

    def lay_out(self, rooms: Sequence[Room[str]]) -> tuple[Assigned[str], ...]:
        """Where eight are too few, the one with least room makes way for the next in line."""
        order = self._in_order(rooms)
        while order:
            stages = self._fill(order)
            if stages:
                return stages
            order.remove(min(order[:MAX_STAGES], key=lambda room: (room.room_bytes, room.peer)))
        return ()

    def _in_order(self, rooms: Sequence[Room[str]]) -> list[Room[str]]:
        return sorted(rooms, key=lambda room: (room.speed.token_layer_ns, room.peer))

    def _next(self, before: str | None, able: Sequence[Holder[str]]) -> list[Holder[str]]:
        def cost(holder: Holder[str]) -> tuple[int, str]:
            is_head = holder.last == self._shape.layers
            compute_ns = stage_ns(holder.speed, holder.layers, is_head=is_head, active=holder.active)
            hop_ns = 0 if before is None else one_way_ns(self._rtt_of, before, holder.peer)
            return (compute_ns + hop_ns) // holder.layers, holder.peer

        return sorted(able, key=cost)
