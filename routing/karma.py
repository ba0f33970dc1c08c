"""Karma: what coordinators state about peers, and what such statements are worth.

A coordinator states about each peer that worked for it how much useful work it did and which promises it broke
(`Statement`). One statement holds all that its issuer has to say: counters of the running epoch, and the past
as one decayed sum. So of each (issuer, subject) only the latest statement matters, and replicas agree by one
law: the higher sequence number wins, ties go to the greater content (`join`). The epoch is the upper
part of the sequence number. That order is total, so the join (the greater of two) is commutative, associative
and idempotent whatever a lying issuer signs; and since an honest issuer's counters only grow within an epoch,
it equals the pointwise maximum for honest ones. Winning statements are forwarded as they were signed, which a
pointwise maximum of two could not be.

Work is counted in reference microseconds, not in claimed minutes: how long the reference machine would have
needed for the tokens that were really delivered. A machine half as fast earns half as much an hour.

All arithmetic is on integers, so that a score is the same bits on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from protocol.instants import SECOND_NS, UnixNs
from protocol.work import Part

P = TypeVar("P")

# --- work -----------------------------------------------------------------------------------------

#: The reference machine streams 40 GB/s of weights through its processor: a desktop with two channels of
#: DDR4-3200 as measured. Decoding a token reads all active weights once, so a 4 GB model gives 10 tokens/s
#: there.
REFERENCE_BYTES_PER_S: Final = 40_000_000_000

#: A prompt token costs an eighth of a generated one: measured 2 to 6 on processors (docs/runtime.md), 20 to 50
#: on graphics cards. Low enough that nobody prefers long prompts for their karma.
PROMPT_TOKENS_PER_TOKEN: Final = 8

#: One work unit is one microsecond of the reference machine: an hour of it is one point.
HOUR_UNITS: Final = 3_600_000_000

#: Bound of every counter on the wire: 2.5 million hours of work in an epoch, beyond any machine; sums stay
#: exact.
MAX_COUNTER: Final = (1 << 53) - 1


def work_units(active_weight_bytes: int, generated_tokens: int, prompt_tokens: int) -> int:
    """Work units of a generation.

    `active_weight_bytes`: weights read per token, from the Cargo's manifest (locked by its digest, so nobody's
    claim). `generated_tokens` and `prompt_tokens`: as delivered and accepted by the consumer's side; prompt
    tokens served from a cache do not count. Raises ValueError on negatives.
    """
    if active_weight_bytes < 0 or generated_tokens < 0 or prompt_tokens < 0:
        raise ValueError("bytes and tokens can not be negative")
    eighths = PROMPT_TOKENS_PER_TOKEN * generated_tokens + prompt_tokens
    return eighths * active_weight_bytes * 1_000_000 // (PROMPT_TOKENS_PER_TOKEN * REFERENCE_BYTES_PER_S)


# --- statements -----------------------------------------------------------------------------------

Counter = Annotated[int, Meta(ge=0, le=MAX_COUNTER)]

#: Bits of a sequence number that count within its epoch: one step is under a millisecond of a six-hour epoch.
SEQUENCE_BITS: Final = 25


class Counters(Part, frozen=True, gc=False, array_like=True):
    """What happened between issuer and subject in one epoch. Each only grows.

    `work_units`: useful work the subject did. `failures`: jobs it accepted and broke. `timeouts`: jobs it let
    hang. `audits_failed`: replays that disagreed (numerics of two machines differ at times, so one is no
    proof). `lies`: proven ones: signed contradictions, receipts refuted by two independent replays.
    `attested_units`: work that the subject, as a coordinator, stated about others and that the issuer
    replayed and found right.
    """

    work_units: Counter = 0
    failures: Counter = 0
    timeouts: Counter = 0
    lies: Counter = 0
    audits_passed: Counter = 0
    audits_failed: Counter = 0
    attested_units: Counter = 0

    def covers(self, other: Counters) -> bool:
        """No counter is below the other's."""
        return all(
            a >= b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        )

    def joined(self, other: Counters) -> Counters:
        """The pointwise maximum."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Counters(*(max(a, b) for a, b in pairs))


class Past(Part, frozen=True, gc=False, array_like=True):
    """All epochs before the statement's, folded and decayed to its beginning, in work units.

    `merit_units`: work less broken promises, at most the credit cap; may be negative. `lie_units`: the price of
    proven lies, which work does not wash off.
    """

    merit_units: Annotated[int, Meta(ge=-MAX_COUNTER, le=MAX_COUNTER)] = 0
    lie_units: Counter = 0
    attested_units: Counter = 0


class Statement(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """What `issuer` says about `subject`. `min_rtt_us`: the shortest round trip that the issuer measured to
    it in this epoch or the one before, microseconds; 0: none. It bounds where the subject can be.
    """

    issuer: P
    subject: P
    sequence: int
    counters: Counters = Counters()
    past: Past = Past()
    min_rtt_us: int = 0

    @property
    def epoch(self) -> int:
        return self.sequence >> SEQUENCE_BITS


def order_of(statement: Statement[Any]) -> tuple[int, ...]:
    """The total order of the statements of one (issuer, subject): sequence number first, then content."""
    counters = msgspec.structs.astuple(statement.counters)
    past = msgspec.structs.astuple(statement.past)
    return (statement.sequence, *counters, *past, statement.min_rtt_us)


def join(one: Statement[P], other: Statement[P]) -> Statement[P]:
    """The one that stands, of two by the same issuer about the same subject."""
    return one if order_of(one) >= order_of(other) else other


def contradict(one: Statement[P], other: Statement[P]) -> bool:
    """Together they prove that their issuer lies: it gave one number to two statements, to tell each listener
    another. Both are signed, so the pair convinces everybody. (To take a count back under a higher number is
    no proof: the issuer may have lost its memory, and everybody comes to hold the same word.)
    """
    return one.sequence == other.sequence and one != other


# --- epochs and value -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KarmaPolicy:
    """How statements turn into points. Penalties are hours of trust lost: so many hours of work make good for
    one, wherever the peer stands. Units: work units (`HOUR_UNITS` an hour), thousandths of a point, percent.
    """

    epoch_ns: int = 6 * 3_600 * SECOND_NS
    """Coarse enough that clocks minutes apart agree about it nearly always and that an issuer restates idle
    peers rarely; fine enough that decay has no visible steps (112 a half-life) and that a round-trip minimum
    is at most 12 h old, so that an Island that moved is not tied to its old place."""

    half_life_epochs: int = 112
    """Four weeks. A fortnight's holiday costs 30 %, what happened half a year ago counts 1 %."""

    keep_epochs: int = 448
    """Statements not renewed for 16 weeks are dropped: 1/16 of their value was left."""

    threshold_mpt: int = 10_000
    """Monetization threshold, +10 points (product)."""

    recovery_percent: int = 150
    """Work below the threshold counts 1.5 times (product)."""

    credit_cap_units: int = 40 * HOUR_UNITS
    """The most that a peer can save up, with one issuer and with all together: a working week. More stock would
    only be a sleeper's booty; beyond it karma would measure age. It also bounds what an untrue issuer can give
    (routing/trust.py)."""

    debit_cap_units: int = 80 * HOUR_UNITS
    """What one issuer can hold against one subject at most: twice the credit, so that a liar is below zero
    whatever it did before, and a slanderer's reach is bounded, too."""

    failure_units: int = HOUR_UNITS // 10
    """A broken job costs the consumer a pause of a second and another Island its prompt again. At one job a
    minute, more than one failure in six eats all that is earned."""

    timeout_units: int = HOUR_UNITS // 4
    """A hanging one costs the consumer seconds, until the stall limit."""

    audit_failed_units: int = 5 * HOUR_UNITS
    """May be honest numerics, so it does not ruin; one in a hundred jobs does, unless the machine is very
    fast."""

    lie_units: int = 40 * HOUR_UNITS
    """A proven lie takes all that can be saved up. Unlike the others it is not netted against work of the
    same time, of which a fast machine does much, but only fades."""

    def epoch_at(self, now: UnixNs) -> int:
        return now // self.epoch_ns

    def sequence_at(self, now: UnixNs) -> int:
        """The sequence number of a statement made now: civil time, so it grows across restarts, too."""
        epoch, rest = divmod(now, self.epoch_ns)
        return (epoch << SEQUENCE_BITS) | (rest << SEQUENCE_BITS) // self.epoch_ns

    def worth(self, counters: Counters, past: Past) -> Past:
        """Counters and past in one, in work units, within the caps."""
        price = (
            counters.failures * self.failure_units
            + counters.timeouts * self.timeout_units
            + counters.audits_failed * self.audit_failed_units
        )
        merit = past.merit_units + counters.work_units - price
        return Past(
            max(-self.debit_cap_units, min(self.credit_cap_units, merit)),
            min(self.debit_cap_units, past.lie_units + counters.lies * self.lie_units),
            min(self.credit_cap_units, past.attested_units + counters.attested_units),
        )

    def decayed(self, units: int, epochs: int) -> int:
        """What is left of `units` after so many epochs; all of it if `epochs` is not positive."""
        if epochs <= 0:
            return units
        if units < 0:
            return -self.decayed(-units, epochs)
        halvings, rest = divmod(epochs, self.half_life_epochs)
        return units * _root_of_half(rest, self.half_life_epochs) >> (_ROOT_BITS + min(halvings, 64))

    def fold_counts(self, counters: Counters, past: Past, epochs: int) -> Past:
        """The past, as of so many epochs later."""
        worth = self.worth(counters, past)
        return Past(
            self.decayed(worth.merit_units, epochs),
            self.decayed(worth.lie_units, epochs),
            self.decayed(worth.attested_units, epochs),
        )

    def fold(self, statement: Statement[Any], epoch: int) -> Past:
        """What a statement is worth in a later epoch."""
        return self.fold_counts(statement.counters, statement.past, epoch - statement.epoch)

    def for_and_against(self, statement: Statement[Any], epoch: int) -> tuple[int, int]:
        """(credit, debit) of a statement in this epoch, work units, each at most its cap and not negative."""
        past = self.fold(statement, epoch)
        return max(0, past.merit_units), min(self.debit_cap_units, past.lie_units - min(0, past.merit_units))

    def hearsay_units(self, credit_units: int, debit_units: int) -> int:
        """What another's statement counts, before it is weighed by trust: blame at most as much as praise."""
        return max(-self.credit_cap_units, credit_units - debit_units)

    def net_units(self, own_credit_units: int, own_debit_units: int, hearsay_units: int) -> int:
        """First-hand credit and debit, and the weighed sum of others' words, in one.

        Credit from all sides together is capped, and what was held against the peer first-hand is taken off
        after that: no praise by others outweighs what one saw oneself, so a cheat can not hide behind those
        it serves well. Blame by others is set against praise by others, so a slanderer meets all who know
        better.
        """
        return min(self.credit_cap_units, own_credit_units + hearsay_units) - own_debit_units

    def points_mpt(self, net_units: int) -> int:
        """Thousandths of a point for so many net hours: 1.5 a unit of work below the threshold, 1 above."""
        knee_units = self.threshold_mpt * HOUR_UNITS * 100 // (1_000 * self.recovery_percent)
        if net_units <= knee_units:
            return net_units * 10 * self.recovery_percent // HOUR_UNITS
        return self.threshold_mpt + (net_units - knee_units) * 1_000 // HOUR_UNITS

    def monetizable(self, points_mpt: int) -> bool:
        return points_mpt >= self.threshold_mpt


_ROOT_BITS: Final = 32


@cache
def _root_of_half(numerator: int, denominator: int) -> int:
    """floor(2**32 * 2**(-numerator/denominator)), exactly: the integer root of a power of two."""
    power = 1 << (_ROOT_BITS * denominator - numerator)
    low, high = 0, (1 << _ROOT_BITS) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if middle**denominator <= power:
            low = middle
        else:
            high = middle
    return low


class Merge(Enum):
    """What came of a statement offered to a store."""

    NEW = "new"
    STALE = "stale"
    CONTRADICTS = "contradicts"
    """It and the one held before prove that the issuer lies; the later one stands."""
    REFUSED = "refused"
    """No room for strangers' statements, or it is about the issuer itself, or out of time."""
