"""What one coordinator saw of the peers that worked for it: the source of its karma statements.

Told of each event, it says which statements are due. A peer is restated at most every `restate_ns`, and at once
after a proven lie; an idle peer is not restated at all (readers let its last statement decay). At the turn of
an epoch the counters are folded into the past.

After a restart the owner hands its own former statements to `restore`: those it kept (Persist), or those that
come back by gossip. Without them its words about each peer start from zero, and replace the former ones
everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec

from protocol.instants import SECOND_NS, UnixNs
from protocol.limits import MAX_ISLANDS_PER_COORDINATOR
from routing.karma import MAX_COUNTER, SEQUENCE_BITS, Counters, KarmaPolicy, Past, Statement

P = TypeVar("P")

#: Each restatement travels once to every coordinator. Five minutes keep a thousand coordinators with a
#: hundred busy Islands each at 330 statements a second in the whole network; karma moves by hours.
RESTATE_NS: Final = 300 * SECOND_NS

_NEVER: Final = UnixNs(0)


@dataclass(slots=True)
class _Seen:
    """One subject. `dirty`: it changed since the last statement. `rtts_us`: least of (last epoch, this
    epoch).
    """

    epoch: int
    counters: Counters
    past: Past
    rtts_us: tuple[int, int] = (0, 0)
    dirty: bool = False
    urgent: bool = False
    restored: bool = False
    said_sequence: int = 0
    said_at: UnixNs = _NEVER


class KarmaWitness(Generic[P]):
    """Times are civil (`UnixNs`), since epochs are. Beyond `capacity` the subject seen longest ago is
    forgotten, unless it was stated in this epoch; then newcomers are not counted.
    """

    def __init__(
        self,
        me: P,
        policy: KarmaPolicy = KarmaPolicy(),  # noqa: B008 - frozen: one shared default is safe
        *,
        restate_ns: int = RESTATE_NS,
        capacity: int = MAX_ISLANDS_PER_COORDINATOR,
    ) -> None:
        self.me: Final = me
        self._policy: Final = policy
        self._restate_ns: Final = restate_ns
        self._capacity: Final = capacity
        self._seen: OrderedDict[P, _Seen] = OrderedDict()
        self._first_said = 0  # sequence number of the first statement of this life
        self._epoch = 0  # never goes back, whatever the clock does

    def __len__(self) -> int:
        return len(self._seen)

    def restore(self, statements: Iterable[Statement[P]]) -> None:
        """Our own statements from before a restart, in any order; also when we have counted and stated since.

        What this life has stated itself, and what is not ours, is left out.
        """
        for statement in statements:
            if statement.issuer != self.me or 0 < self._first_said <= statement.sequence:
                continue
            self._epoch = max(self._epoch, statement.epoch)
            seen = self._seen.get(statement.subject)
            if seen is None:
                if len(self._seen) >= self._capacity:
                    self._seen.popitem(last=False)
                seen = self._seen[statement.subject] = _Seen(statement.epoch, Counters(), Past())
                seen.said_sequence = statement.sequence
            elif seen.restored:
                continue
            seen.restored = True
            before, here = seen.rtts_us
            seen.rtts_us = (min(before or statement.min_rtt_us, statement.min_rtt_us), here)
            if statement.epoch >= seen.epoch:
                seen.counters, seen.past = _sum(seen.counters, statement.counters), statement.past
                seen.epoch = statement.epoch
            else:
                seen.past = self._policy.fold(statement, seen.epoch)

    def saw(
        self,
        now: UnixNs,
        subject: P,
        *,
        work_units: int = 0,
        failures: int = 0,
        timeouts: int = 0,
        lies: int = 0,
        audits_passed: int = 0,
        audits_failed: int = 0,
        attested_units: int = 0,
    ) -> bool:
        """Count what happened. False if it is not counted: it is about ourselves, or there is no room.

        Raises ValueError on negatives.
        """
        added = Counters(work_units, failures, timeouts, lies, audits_passed, audits_failed, attested_units)
        if min(msgspec.structs.astuple(added)) < 0:
            raise ValueError("counters only grow")
        if subject == self.me:
            return False
        seen = self._of(now, subject)
        if seen is None:
            return False
        seen.counters = _sum(seen.counters, added)
        seen.dirty = True
        seen.urgent = seen.urgent or lies > 0
        return True

    def measured(self, now: UnixNs, subject: P, rtt_us: int) -> None:
        """A round trip to the subject, microseconds. The first of an epoch, and one much shorter than before,
        make a statement due: others bound by it where the subject can be, also before it has worked.
        """
        if subject == self.me or rtt_us <= 0:
            return
        seen = self._of(now, subject)
        if seen is None:
            return
        before, here = seen.rtts_us
        if not here or rtt_us < here:
            seen.rtts_us = (before, rtt_us)
            seen.dirty = seen.dirty or 10 * rtt_us < 9 * (here or 1 << 62)

    def due(self, now: UnixNs, limit: int = 64) -> list[Statement[P]]:
        """Statements to sign and spread now, at most `limit`, urgent ones first."""
        ready = [
            (not seen.urgent, subject, seen)
            for subject, seen in self._seen.items()
            if seen.dirty and (seen.urgent or now - seen.said_at >= self._restate_ns)
        ]
        ready.sort(key=lambda row: row[0])
        return [self._state(now, subject, seen) for _, subject, seen in ready[:limit]]

    def _state(self, now: UnixNs, subject: P, seen: _Seen) -> Statement[P]:
        self._turn(now, seen)
        first = (
            seen.epoch << SEQUENCE_BITS
        )  # a clock set back must not bring these counts into an earlier epoch
        sequence = max(self._policy.sequence_at(now), seen.said_sequence + 1, first)
        self._first_said = self._first_said or sequence
        seen.dirty = seen.urgent = False
        seen.said_sequence, seen.said_at = sequence, now
        rtts = [rtt for rtt in seen.rtts_us if rtt]
        return Statement(self.me, subject, sequence, seen.counters, seen.past, min(rtts, default=0))

    def _of(self, now: UnixNs, subject: P) -> _Seen | None:
        seen = self._seen.get(subject)
        if seen is not None:
            self._turn(now, seen)
            self._seen.move_to_end(subject)
            return seen
        epoch = self._running_epoch(now)
        if len(self._seen) >= self._capacity:
            oldest = next(iter(self._seen.values()))
            if oldest.said_sequence >> SEQUENCE_BITS >= epoch:
                return None  # to forget it now and state it again would take back what was stated
            self._seen.popitem(last=False)
        seen = self._seen[subject] = _Seen(epoch, Counters(), Past())
        return seen

    def _running_epoch(self, now: UnixNs) -> int:
        self._epoch = max(self._epoch, self._policy.epoch_at(now))
        return self._epoch

    def _turn(self, now: UnixNs, seen: _Seen) -> None:
        """Fold what belongs to earlier epochs."""
        epoch = self._running_epoch(now)
        if epoch <= seen.epoch:
            return
        seen.past = self._policy.fold_counts(seen.counters, seen.past, epoch - seen.epoch)
        seen.counters = Counters()
        seen.rtts_us = (seen.rtts_us[1] if epoch == seen.epoch + 1 else 0, 0)
        seen.epoch = epoch


def _sum(one: Counters, other: Counters) -> Counters:
    pairs = zip(msgspec.structs.astuple(one), msgspec.structs.astuple(other), strict=True)
    return Counters(*(min(MAX_COUNTER, a + b) for a, b in pairs))
