"""Coordinators that one could turn to: how far they are, in which network, and which of them failed lately."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec

from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, after

P = TypeVar("P")

#: Where nothing was measured or estimated: after all that are known, but not never.
UNKNOWN_RTT_NS: Final = 10 * SECOND_NS

_NEVER: Final = Instant(0)


@dataclass(frozen=True, slots=True)
class CandidatePolicy:
    """Durations in nanoseconds."""

    capacity: int = 256
    """Candidates that are remembered: the nearest ones."""
    backoff_first_ns: int = 2 * SECOND_NS
    backoff_max_ns: int = 300 * SECOND_NS
    """Doubled at each failure in a row, up to this, plus up to a half by chance."""
    forgive_ns: int = 120 * SECOND_NS
    """One that failed in this time comes after all that did not."""
    search_first_ns: int = 1 * SECOND_NS
    search_max_ns: int = 60 * SECOND_NS
    """While there are too few, it is asked for more at growing distances..."""
    review_ns: int = 60 * SECOND_NS
    """...and when there are enough, this is how often it is looked whether better ones turned up."""
    better_percent: int = 25
    better_ns: int = 5 * MILLISECOND_NS
    """Only one that is nearer by both is worth a change."""


class CoordinatorCandidate(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """`rtt_ns`: measured, or estimated from network coordinates; None: unknown. `group`: the network of its
    address, 0: not limited. `pinned`: named by the owner, always to be used.
    """

    peer: P
    rtt_ns: int | None = None
    group: int = 0
    pinned: bool = False


@dataclass(slots=True)
class _Known:
    rtt_ns: int
    group: int
    pinned: bool
    number: int
    failures: int = 0
    not_before: Instant = _NEVER
    failed: Instant = _NEVER
    barred_until: Instant = _NEVER


class CandidateBook(Generic[P]):
    """At most `capacity`; the farthest that is not in use goes first. Pinned ones stay."""

    def __init__(self, policy: CandidatePolicy, dice: Dice) -> None:
        self._policy: Final = policy
        self._dice: Final = dice
        self._known: dict[P, _Known] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, peer: P) -> bool:
        return peer in self._known

    def learn(self, found: Iterable[CoordinatorCandidate[P]], using: Collection[P] = ()) -> None:
        for candidate in found:
            known = self._known.get(candidate.peer)
            if known is None:
                self._number += 1
                rtt_ns = UNKNOWN_RTT_NS if candidate.rtt_ns is None else candidate.rtt_ns
                self._known[candidate.peer] = _Known(rtt_ns, candidate.group, candidate.pinned, self._number)
                self._bound(using)
                continue
            if candidate.rtt_ns is not None:
                known.rtt_ns = candidate.rtt_ns
            known.group = candidate.group or known.group
            known.pinned = known.pinned or candidate.pinned

    def measured(self, peer: P, rtt_ns: int) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.rtt_ns = rtt_ns

    def rtt_ns(self, peer: P) -> int:
        known = self._known.get(peer)
        return UNKNOWN_RTT_NS if known is None else known.rtt_ns

    def group(self, peer: P) -> int:
        known = self._known.get(peer)
        return 0 if known is None else known.group

    def pinned(self, peer: P) -> bool:
        known = self._known.get(peer)
        return known is not None and known.pinned

    def failed(self, now: Instant, peer: P, least_ns: int = 0, *, lied: bool = False) -> None:
        """Leave it alone for a while, `least_ns` at least. Who `lied` is not forgiven before that."""
        known = self._known.get(peer)
        if known is None:
            return
        wait_ns = min(self._policy.backoff_first_ns << min(known.failures, 20), self._policy.backoff_max_ns)
        known.failures += 1
        known.failed = now
        known.not_before = after(now, max(least_ns, wait_ns) + self._dice.below(wait_ns // 2 + 1))
        if lied:
            known.barred_until = known.not_before

    def worked(self, peer: P) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.failures, known.not_before = 0, known.barred_until

    def forgive(self) -> None:
        """What failed, failed for reasons of ours: all may be turned to, except those that lied."""
        for peer in self._known:
            self.worked(peer)

    def usable(self, now: Instant) -> list[P]:
        """Those that are not to be left alone: first such that did not fail lately, of these pinned ones
        first, then the nearest.
        """
        rows = [
            (
                known.failures > 0 and now - known.failed < self._policy.forgive_ns,
                not known.pinned,
                known.rtt_ns,
                known.number,
                peer,
            )
            for peer, known in self._known.items()
            if known.not_before <= now
        ]
        rows.sort(key=lambda row: row[:4])
        return [row[4] for row in rows]

    def pick(self, now: Instant, using: Collection[P]) -> P | None:
        """The next to turn to: not in a network that is in use already, unless there is no other."""
        groups = [self.group(peer) for peer in using]
        second: P | None = None
        for peer in self.usable(now):
            if peer in using:
                continue
            group = self.group(peer)
            if not group or group not in groups or self.pinned(peer):
                return peer
            if second is None:
                second = peer
        return second

    def better(self, now: Instant, using: Collection[P]) -> tuple[P, P] | None:
        """(one to turn to, the one that it should replace), or None if things are well as they are."""
        loose = [peer for peer in using if not self.pinned(peer)]
        if not loose:
            return None
        groups = [self.group(peer) for peer in using]
        doubled = [peer for peer in loose if self.group(peer) and groups.count(self.group(peer)) > 1]
        worst = max(doubled or loose, key=self.rtt_ns)
        others = [peer for peer in using if peer != worst]
        best = self.pick(now, using)
        if best is None:
            return None
        other_groups = [self.group(peer) for peer in others]
        best_doubles = self.group(best) != 0 and self.group(best) in other_groups
        if doubled:
            return None if best_doubles else (best, worst)
        limit_ns = self.rtt_ns(worst) * 100 // (100 + self._policy.better_percent) - self._policy.better_ns
        return (best, worst) if self.rtt_ns(best) < limit_ns and not best_doubles else None

    def next_usable(self, now: Instant) -> Instant | None:
        """When the next one comes out of its backoff."""
        later = [known.not_before for known in self._known.values() if known.not_before > now]
        return min(later, default=None)

    def _bound(self, using: Collection[P]) -> None:
        while len(self._known) > self._policy.capacity:
            loose = [p for p, known in self._known.items() if not known.pinned and p not in using]
            if not loose:
                return
            del self._known[max(loose, key=lambda p: (self._known[p].rtt_ns, self._known[p].number))]
