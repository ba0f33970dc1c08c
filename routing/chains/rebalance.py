"""Ranges that many want are joined by other Islands; and nobody is sent back and forth.

A session takes a slot at every place of its chain, so the range with the fewest slots for what is asked of it
bounds all. An Island with room, or else one of a range that has slots to spare, is sent there. Each move costs
a fetch of gigabytes, so four things hold it back: the load is smoothed over time, a range must really be busy,
the move must make the busiest of the two ranges clearly less so, and an Island stays where it is for a while.

Under constant demand every move lowers the greater of two utilisations by a fixed part, so there is an end to
it. Under demand that changes, an Island moves at most once in `dwell_ns`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias

from protocol.instants import SECOND_NS, Instant
from routing.chains.allocation import Allocation, allocate
from routing.chains.costs import Holder, ModelShape, P, Room, Rtt

_Range: TypeAlias = tuple[int, int]

#: Means are kept in millionths of a thousandth of a session: looks may follow each other in milliseconds, and
#: what so short a time changes must not be rounded away.
_FINE: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class BalancePolicy:
    """Durations in nanoseconds, shares in thousandths."""

    smoothing_ns: int = 120 * SECOND_NS
    """Time constant of the demand's mean: a burst shorter than this moves nobody."""
    busy_permille: int = 700
    """Of a range's slots in use: below, it is left alone. Above 80 % or so, sessions begin to find no slot."""
    gain_permille: int = 150
    """The greater utilisation of the two ranges must fall by this part of itself."""
    dwell_ns: int = 900 * SECOND_NS
    """An Island that moved stays so long. Fetching 10 GB takes 15 minutes at 100 Mbit/s."""
    patience_ns: int = 1800 * SECOND_NS
    """An Island that was sent somewhere counts there for so long, though it is still loading."""
    max_moves: int = 2
    """At a time: what they do is seen before more are sent."""
    keep_holders: int = 2
    """A range never has fewer left because somebody was sent elsewhere: one to work and one to stand by."""


@dataclass(frozen=True, slots=True)
class Move(Generic[P]):
    """An Island should hold layers `first` to `last`. `leaves`: what it holds now; None: nothing."""

    peer: P
    first: int
    last: int
    leaves: tuple[int, int] | None = None


@dataclass(slots=True)
class _Mean:
    """A smoothed demand. `latest`: thousandths of a session seen at `at`; they hold until the next look, which
    comes when they change.
    """

    fine: int
    latest: int
    at: Instant

    @property
    def milli(self) -> int:
        return self.fine // _FINE


class Balancer(Generic[P]):
    """`watch` whenever adverts were heard, `moves` now and then. One per Cargo."""

    def __init__(self, policy: BalancePolicy | None = None) -> None:
        self._policy: Final = policy or BalancePolicy()
        self._demand: dict[_Range, _Mean] = {}
        self._moved: dict[P, tuple[_Range | None, Instant]] = {}

    def demand_milli(self, first: int, last: int) -> int:
        """Smoothed sessions of a range, thousandths."""
        mean = self._demand.get((first, last))
        return 0 if mean is None else mean.milli

    def watch(self, now: Instant, holders: Iterable[Holder[P]]) -> None:
        """Take in the sessions that each range has now, waiting ones included."""
        totals: dict[_Range, int] = {}
        for holder in holders:
            span = (holder.first, holder.last)
            totals[span] = totals.get(span, 0) + 1000 * holder.active
        for span in [span for span in self._demand if span not in totals]:
            del self._demand[span]
        for span, milli in totals.items():
            mean = self._demand.get(span)
            if mean is None:
                self._demand[span] = _Mean(0, milli, now)  # what was before we looked is not known
                continue
            since_ns = max(0, now - mean.at)
            lacking = mean.latest * _FINE - mean.fine
            mean.fine += lacking * since_ns // (since_ns + self._policy.smoothing_ns)
            mean.latest, mean.at = milli, now

    def moves(
        self,
        now: Instant,
        shape: ModelShape,
        rooms: Sequence[Room[P]],
        holders: Sequence[Holder[P]],
        *,
        ordered: Collection[P] = (),
    ) -> tuple[Move[P], ...]:
        """Who should go where, at most `max_moves`; they count as moved from now on. `ordered`: who was sent
        somewhere by somebody else just now, and is left there.
        """
        round_ = self._round(now, shape, rooms, holders)
        found: list[Move[P]] = []
        bound = self._bound(now) | set(ordered)
        for _ in range(self._policy.max_moves):
            move = round_.best(rooms, bound)
            if move is None:
                break
            bound.add(move.peer)
            self._moved[move.peer] = ((move.first, move.last), now)
            round_.apply(move)
            found.append(move)
        return tuple(found)

    def further(
        self,
        now: Instant,
        shape: ModelShape,
        rooms: Sequence[Room[P]],
        holders: Sequence[Holder[P]],
        rtt_of: Rtt[P],
        *,
        ordered: Collection[P] = (),
    ) -> tuple[Move[P], ...]:
        """One more chain, if some layers are busy wherever they are held and nobody has room for one of those
        ranges: smaller ones may fit. To be asked when `moves` has none.
        """
        if self._round(now, shape, rooms, holders).scarcest() < self._policy.busy_permille:
            return ()
        bound = self._bound(now) | set(ordered)
        free = [room for room in rooms if room.peer not in bound and not room.suspect]
        found = allocate(shape, free, (), rtt_of, spares=0)
        if not isinstance(found, Allocation):
            return ()
        for stage in found.stages:
            self._moved[stage.peer] = ((stage.first, stage.last), now)
        return tuple(Move(stage.peer, stage.first, stage.last) for stage in found.stages)

    def refused(self, peer: P, *, stays: bool) -> None:
        """It does not go where it was sent. `stays`: it holds something else, and is left alone for a while as
        if it had moved; else it may be sent again.
        """
        if peer in self._moved and stays:
            self._moved[peer] = (None, self._moved[peer][1])
        elif peer in self._moved:
            del self._moved[peer]

    def _round(
        self, now: Instant, shape: ModelShape, rooms: Iterable[Room[P]], holders: Sequence[Holder[P]]
    ) -> _Round[P]:
        """As it is, and with those who are on their way, as long as they are here at all."""
        round_ = _Round(self._policy, shape, holders, self._demand)
        self._moved = {peer: (s, at) for peer, (s, at) in self._moved.items() if not self._is_over(now, at)}
        arrived = {holder.peer: (holder.first, holder.last) for holder in holders}
        here = arrived.keys() | {room.peer for room in rooms}
        for peer, (span, at) in self._moved.items():
            coming = span is not None and peer in here and arrived.get(peer) != span
            if span is not None and coming and now - at < self._policy.patience_ns:
                round_.expect(peer, span)
        return round_

    def _bound(self, now: Instant) -> set[P]:
        """Those that moved lately."""
        return {peer for peer, (_, at) in self._moved.items() if now - at < self._policy.dwell_ns}

    def _is_over(self, now: Instant, moved: Instant) -> bool:
        return now - moved >= max(self._policy.dwell_ns, self._policy.patience_ns)


class _Round(Generic[P]):
    """Slots and demand by range, as they would be after the moves so far."""

    def __init__(
        self,
        policy: BalancePolicy,
        shape: ModelShape,
        holders: Sequence[Holder[P]],
        demand: dict[_Range, _Mean],
    ) -> None:
        self._policy = policy
        self._shape = shape
        self._demand = {span: mean.milli for span, mean in demand.items()}
        self._at: dict[_Range, dict[P, int]] = {}
        self._active = {holder.peer: holder.active for holder in holders}
        self._slots = {holder.peer: max(1, holder.slots) for holder in holders}
        for holder in holders:
            self._at.setdefault((holder.first, holder.last), {})[holder.peer] = max(1, holder.slots)

    def expect(self, peer: P, span: _Range) -> None:
        """It is on its way there, and will leave where it is."""
        for held in self._at.values():
            held.pop(peer, None)
        self._at.setdefault(span, {})[peer] = self._slots_of(peer)

    def apply(self, move: Move[P]) -> None:
        self.expect(move.peer, (move.first, move.last))

    def best(self, rooms: Sequence[Room[P]], bound: set[P]) -> Move[P] | None:
        """The move that helps the busiest range for which there is one."""
        for span in sorted(self._at, key=lambda span: (-self._busy(span), span)):
            busy = self._busy(span)
            if busy < self._policy.busy_permille:
                return None
            move = self._from_room(span, rooms, bound) or self._from_idle(span, busy, bound)
            if move is not None:
                return move
        return None

    def scarcest(self) -> int:
        """The busiest layer: thousandths of its slots that are asked for, whatever ranges it is held in."""
        cuts = sorted({end for span in self._at for end in span})
        worst = 0
        for at in cuts[:-1]:
            spans = [span for span in self._at if span[0] <= at < span[1]]
            slots = sum(sum(self._at[span].values()) for span in spans)
            demand = sum(self._demand.get(span, 0) for span in spans)
            worst = max(worst, demand // max(1, slots))
        return worst

    def _slots_of(self, peer: P) -> int:
        """Of one that holds nothing yet: as many as the others have."""
        known = self._slots.get(peer)
        if known is not None:
            return known
        return max(1, sum(self._slots.values()) // max(1, len(self._slots)))

    def _busy(self, span: _Range, change: int = 0) -> int:
        """Thousandths of its slots that are asked for, after so many slots more."""
        slots = sum(self._at[span].values()) + change
        return self._demand.get(span, 0) // max(1, slots)

    def _from_room(self, span: _Range, rooms: Sequence[Room[P]], bound: set[P]) -> Move[P] | None:
        needed = self._shape.bytes_of(*span)
        fitting = [r for r in rooms if r.peer not in bound and not r.suspect and r.room_bytes >= needed]
        if not fitting or self._busy(span, self._slots_of(fitting[0].peer)) > self._limit(self._busy(span)):
            return None
        # The quickest; of equals the one with least to spare: the roomy ones are wanted for larger ranges.
        best = min(fitting, key=lambda r: (r.speed.token_layer_ns, r.room_bytes))
        return Move(best.peer, *span)

    def _from_idle(self, span: _Range, busy: int, bound: set[P]) -> Move[P] | None:
        """Somebody of a range that can spare it, where it is least missed."""
        needed = self._shape.bytes_of(*span)
        found: list[tuple[int, int, _Range, P]] = []
        for other, held in self._at.items():
            # What fits an Island with no room left is what it holds: ranges that are as large, or larger.
            if other == span or len(held) <= self._policy.keep_holders or self._shape.bytes_of(*other) < needed:
                continue
            for peer, slots in held.items():
                after = max(self._busy(other, -slots), self._busy(span, slots))
                if peer not in bound and after <= self._limit(busy):
                    found.append((after, self._active.get(peer, 0), other, peer))
        if not found:
            return None
        _, _, leaves, peer = min(found, key=lambda each: each[:3])
        return Move(peer, *span, leaves=leaves)

    def _limit(self, busy: int) -> int:
        return busy * (1000 - self._policy.gain_permille) // 1000
