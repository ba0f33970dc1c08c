"""What a gossip machine remembers of one neighbour, and the rules of the game as numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant

P = TypeVar("P")

#: Peers that may announce one missing item; the first asked that delivers is enough.
MAX_SOURCES: Final = 4


@dataclass(frozen=True, slots=True)
class KindPolicy:
    """One kind of items. `max_ttl_ns`: what claims to last longer is not held. `max_bytes`: of a payload."""

    max_ttl_ns: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class GossipPolicy:
    """Durations in nanoseconds, rates per second."""

    fan_out: int = 6
    """Neighbours that a new item is pushed to in full. Each node prunes what comes twice too often, so most
    carry two or three."""

    redundancy: int = 2
    """Neighbours that may push to us what others push, too: with two, one that dies or withholds delays
    nothing."""

    lazy_ns: int = 200 * MILLISECOND_NS
    """Ids for the other neighbours wait this long, so that many go in one message."""

    graft_ns: int = 400 * MILLISECOND_NS
    """An announced item is asked for if no push brought it by then: longer than a round trip around the
    world."""

    want_ns: int = 3 * SECOND_NS
    """Then the next neighbour that has it is asked."""

    sync_first_ns: int = 2 * SECOND_NS
    sync_max_ns: int = 32 * SECOND_NS
    """A comparison with a neighbour drawn at random. The interval doubles while nothing was missing and
    starts anew when something was; an idle network pays 30 bytes a neighbour and half minute."""

    capacity: int = 65_536
    """Items held: some 60 MiB of sealed statements."""

    stranger_capacity: int = 8_192
    """Of them by origins that are not favoured."""

    per_origin: int = 16_384
    """More than one coordinator has Islands to speak about."""

    recent: int = 131_072
    """Ids remembered so that nobody makes us fetch them again: twice the capacity."""

    max_missing: int = 16_384
    """Announced items not received yet, in all; per neighbour a quarter."""

    max_asked: int = 256
    """Of them asked of one neighbour at a time: 150 KiB of statements, less than its send queue."""

    max_lazy: int = 4_096
    """Ids waiting to be announced to one neighbour. What overflows is found by comparison."""

    push_rate: int = 128
    push_burst: int = 1_024
    """Items pushed to one neighbour; beyond it they are announced only. Half of what it tolerates."""

    take_rate: int = 256
    take_burst: int = 4_096
    """What one neighbour may cost us: one unit is an item to verify, 0.1 ms. 256 a second is 2.5 % of a
    core."""

    strikes: int = 16
    """Beyond them a neighbour is expelled. An invalid item is four, a message beyond its budget one."""

    strike_ns: int = 30 * SECOND_NS
    """One strike is forgiven in this time."""

    broken_wants: int = 512
    """Asked-for items that a neighbour announced and then did not send, less those it did, before it is
    expelled."""

    expelled_ns: int = 600 * SECOND_NS
    """So long it can not come back."""

    min_neighbours: int = 6
    """Below it the owner is told (`Thin`). With six at random, one node in 1,400 loses all if 30 % die."""

    max_neighbours: int = 64
    """Further ones are ignored. A dozen suffice; a small network may be a full mesh."""


@dataclass(slots=True)
class Budget:
    """A token bucket on integers."""

    rate: int
    burst: int
    level_ns: int
    at: Instant

    @classmethod
    def full(cls, rate: int, burst: int, now: Instant) -> Budget:
        return cls(rate, burst, burst * SECOND_NS, now)

    def take(self, now: Instant, cost: int) -> bool:
        """Whether there was enough; only then it is taken."""
        if now > self.at:
            self.level_ns = min(self.burst * SECOND_NS, self.level_ns + (now - self.at) * self.rate)
            self.at = now
        if self.level_ns < cost * SECOND_NS:
            return False
        self.level_ns -= cost * SECOND_NS
        return True


@dataclass(slots=True)
class Neighbour(Generic[P]):
    """`eager`: we push to it. `pushes`: it pushes to us. `asked`: items it owes us; `waiting`: that it was the
    first to announce and that a push may still bring. `awaits_sums`, `awaits_compare`: the next step of a
    comparison, which is nothing else than an answer.
    """

    peer: P
    inbound: Budget
    outbound: Budget
    strikes_at: Instant
    eager: bool = False
    strikes: int = 0
    useless: int = 0
    asked: int = 0
    waiting: int = 0
    broken: int = 0
    graft: bool = False
    awaits_sums: bool = False
    awaits_compare: bool = False
    pruned_at: Instant | None = None
    lazy: dict[int, None] = field(default_factory=dict[int, None])
    backlog: deque[int] = field(default_factory=deque[int])

    def strike(self, now: Instant, count: int, forgiven_ns: int) -> int:
        """Count against it; returns what stands now."""
        forgiven = (now - self.strikes_at) // forgiven_ns
        if forgiven:
            self.strikes = max(0, self.strikes - forgiven)
            self.strikes_at = Instant(self.strikes_at + forgiven * forgiven_ns)
        self.strikes += count
        return self.strikes
