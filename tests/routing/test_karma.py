"""Statements and their worth: the CRDT's laws, what a point costs, and that scores move the right way."""

from __future__ import annotations

from functools import reduce

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.instants import SECOND_NS, UnixNs
from routing.karma import (
    HOUR_UNITS,
    REFERENCE_BYTES_PER_S,
    SEQUENCE_BITS,
    Counters,
    KarmaPolicy,
    Past,
    Statement,
    contradict,
    join,
    order_of,
    work_units,
)
from routing.karma_witness import RESTATE_NS, KarmaWitness

POLICY = KarmaPolicy()
LEFT_OF_10_12 = [993830297142, 957603280665, 707106780959, 503104001982, 496915148571, 2052259059]
EPOCH = 80_000
START = UnixNs(EPOCH * POLICY.epoch_ns)

small = st.integers(0, 5)
counters = st.builds(Counters, *[small] * 7)
pasts = st.builds(Past, st.integers(-5, 5), small, small)
#: Whatever a lying issuer may sign: equal numbers with different content, counters that go back.
statements = st.builds(
    Statement[int],
    st.just(1),
    st.just(2),
    st.integers(EPOCH << SEQUENCE_BITS, (EPOCH << SEQUENCE_BITS) + 3),
    counters,
    pasts,
    small,
)


def stated(sequence: int = 0, *, epoch: int = EPOCH, **said: int) -> Statement[int]:
    return Statement(1, 2, (epoch << SEQUENCE_BITS) + sequence, Counters(**said))


@settings(deadline=None)
@given(statements, statements)
def test_join_is_commutative(a: Statement[int], b: Statement[int]) -> None:
    assert join(a, b) == join(b, a)


@settings(deadline=None)
@given(statements, statements, statements)
def test_join_is_associative(a: Statement[int], b: Statement[int], c: Statement[int]) -> None:
    assert join(a, join(b, c)) == join(join(a, b), c)


@settings(deadline=None)
@given(statements, statements)
def test_join_is_idempotent_and_an_upper_bound(a: Statement[int], b: Statement[int]) -> None:
    assert join(a, a) == a
    assert join(a, join(a, b)) == join(a, b)
    assert order_of(join(a, b)) == max(order_of(a), order_of(b))


@settings(deadline=None)
@given(st.lists(st.tuples(counters, st.integers(0, 2)), min_size=1, max_size=8), st.randoms())
def test_for_an_honest_issuer_the_join_is_the_pointwise_maximum(
    rows: list[tuple[Counters, int]], random: object
) -> None:
    """Honest: each statement's counters cover those before it."""
    grown: list[Statement[int]] = []
    total = Counters()
    for number, (more, _) in enumerate(rows):
        total = Counters(
            *map(sum, zip(msgspec.structs.astuple(total), msgspec.structs.astuple(more), strict=True))
        )
        grown.append(Statement(1, 2, (EPOCH << SEQUENCE_BITS) + number, total))
    shuffled = list(grown)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert reduce(join, shuffled).counters == reduce(Counters.joined, [s.counters for s in shuffled])
    assert not any(contradict(a, b) for a in grown for b in grown)


@settings(deadline=None)
@given(statements, statements)
def test_contradiction_is_symmetric_and_about_one_number(a: Statement[int], b: Statement[int]) -> None:
    assert contradict(a, b) == contradict(b, a)
    assert contradict(a, b) == (a.sequence == b.sequence and a != b)


def test_what_a_contradiction_is() -> None:
    assert contradict(stated(1, work_units=2), stated(1, work_units=3))
    assert not contradict(stated(1, failures=2), stated(2, failures=1))
    assert not contradict(stated(1, failures=1), stated(1, failures=1))


# --- work -----------------------------------------------------------------------------------------


def test_an_hour_of_the_reference_machine_is_one_unit_hour() -> None:
    tokens = 3600 * 10
    assert work_units(REFERENCE_BYTES_PER_S // 10, tokens, 0) == HOUR_UNITS
    assert work_units(REFERENCE_BYTES_PER_S // 10, 0, 8 * tokens) == HOUR_UNITS


@settings(deadline=None)
@given(st.integers(1, 10**11), st.integers(1, 1000), st.integers(0, 1000), st.integers(1, 50))
def test_a_slow_machine_does_not_earn_more(weights: int, generated: int, prompt: int, slower: int) -> None:
    """In an hour the slower one makes fewer tokens; what a token brings depends on the model only."""
    fast = work_units(weights, generated * slower, prompt * slower)
    assert fast >= slower * work_units(weights, generated, prompt)


def test_negative_work_is_our_bug() -> None:
    with pytest.raises(ValueError, match="negative"):
        work_units(1, -1, 0)


# --- points ---------------------------------------------------------------------------------------


def net(statement: Statement[int], epoch: int = EPOCH) -> int:
    return POLICY.net_units(*POLICY.for_and_against(statement, epoch), 0)


def points(statement: Statement[int], epoch: int = EPOCH) -> int:
    return POLICY.points_mpt(net(statement, epoch))


def test_the_products_figures() -> None:
    """Start at 0; 40 minutes a point below +10; from there an hour."""
    assert points(stated()) == 0
    assert points(stated(work_units=HOUR_UNITS * 40 // 60)) == 1_000
    assert points(stated(work_units=HOUR_UNITS * 400 // 60)) == 10_000
    assert points(stated(work_units=HOUR_UNITS * 400 // 60 + HOUR_UNITS)) == 11_000
    assert POLICY.monetizable(10_000)
    assert not POLICY.monetizable(9_999)


def test_penalties_are_ordered_and_a_lie_outweighs_any_credit() -> None:
    full = POLICY.credit_cap_units
    assert points(stated(work_units=full)) == points(stated(work_units=10**15)) == 43_333
    costs = [
        43_333 - points(stated(work_units=full, **{name: 1}))
        for name in ("failures", "timeouts", "audits_failed", "lies")
    ]
    assert costs == sorted(costs)
    assert costs[0] == 100
    assert costs[3] == 43_333


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_an_hours_penalty_costs_exactly_an_hours_work(worked_h: int, penalty_tenths: int) -> None:
    """Wherever one stands, below zero or above the threshold (below the cap: 25 + 5 of 40 hours here)."""
    before = net(stated(work_units=worked_h * HOUR_UNITS // 2))
    redone = worked_h * HOUR_UNITS // 2 + penalty_tenths * HOUR_UNITS // 10
    after = net(stated(work_units=redone, failures=penalty_tenths))
    assert after == before


@settings(deadline=None)
@given(
    counters, pasts, st.integers(0, 400), st.sampled_from(Counters.__struct_fields__), st.integers(1, 10**12)
)
def test_scores_move_the_right_way(said: Counters, past: Past, age: int, name: str, more: int) -> None:
    statement = Statement(1, 2, EPOCH << SEQUENCE_BITS, said, past)
    grown = msgspec.structs.replace(said, **{name: getattr(said, name) + more})
    before, after = (
        points(statement, EPOCH + age),
        points(msgspec.structs.replace(statement, counters=grown), EPOCH + age),
    )
    if name == "work_units":
        assert after >= before
    elif name in {"failures", "timeouts", "lies", "audits_failed"}:
        assert after <= before
    else:
        assert after == before


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 10**12))
def test_points_grow_with_net_work(net: int, more: int) -> None:
    assert POLICY.points_mpt(net) <= POLICY.points_mpt(net + more)


def test_much_work_does_not_wash_off_a_lie_but_makes_good_for_failures() -> None:
    """A fast machine: a hundred hours' work in an epoch, fifty failures, or one proven lie."""
    assert points(stated(work_units=100 * HOUR_UNITS, failures=50)) == points(
        stated(work_units=100 * HOUR_UNITS)
    )
    assert points(stated(work_units=100 * HOUR_UNITS, lies=1)) == 0


def test_all_praise_together_is_worth_no_more_than_a_week() -> None:
    full = POLICY.credit_cap_units
    assert POLICY.net_units(full, 0, 10 * full) == full
    assert POLICY.net_units(full, POLICY.lie_units, 10 * full) == 0
    assert POLICY.hearsay_units(0, POLICY.debit_cap_units) == -POLICY.hearsay_units(full, 0) == -full


# --- decay ----------------------------------------------------------------------------------------


def test_half_is_left_after_a_half_life() -> None:
    assert POLICY.decayed(1 << 40, POLICY.half_life_epochs) == 1 << 39
    assert POLICY.decayed(1 << 40, 10 * POLICY.half_life_epochs) == 1 << 30
    assert POLICY.decayed(12345, 0) == POLICY.decayed(12345, -3) == 12345
    assert POLICY.decayed(10**15, 10**6) == 0


@settings(deadline=None)
@given(st.integers(0, 10**18), st.integers(0, 500), st.integers(0, 500))
def test_decay_only_shrinks(units: int, epochs: int, more: int) -> None:
    assert 0 <= POLICY.decayed(units, epochs + more) <= POLICY.decayed(units, epochs) <= units


def test_decay_is_the_same_bits_everywhere() -> None:
    """Fixed numbers: another machine, another Python must give these."""
    epochs = (1, 7, 56, 111, 113, 1000)
    left = [POLICY.decayed(10**12, epoch) for epoch in epochs]
    assert left == LEFT_OF_10_12
    assert all(abs(one - 10**12 * 2 ** (-e / 112)) < 500 for one, e in zip(left, epochs, strict=True))


# --- the witness ----------------------------------------------------------------------------------


def at(seconds: float, epoch: int = EPOCH) -> UnixNs:
    return UnixNs(epoch * POLICY.epoch_ns + round(seconds * SECOND_NS))


def test_a_witness_states_at_intervals_and_lies_at_once() -> None:
    witness = KarmaWitness(1)
    assert witness.saw(at(0), 2, work_units=5)
    [first] = witness.due(at(0))
    assert (first.issuer, first.subject, first.counters) == (1, 2, Counters(5))
    assert witness.due(at(1)) == []
    witness.saw(at(2), 2, work_units=5)
    assert witness.due(at(3)) == []
    [second] = witness.due(at(RESTATE_NS / SECOND_NS + 1))
    assert second.counters == Counters(10)
    witness.saw(at(400), 2, lies=1)
    [third] = witness.due(at(400))
    assert third.counters == Counters(10, lies=1)
    assert first.sequence < second.sequence < third.sequence


def test_a_witness_says_nothing_of_itself() -> None:
    witness = KarmaWitness(1)
    assert not witness.saw(at(0), 1, work_units=5)
    assert witness.due(at(0)) == []


def test_the_past_is_folded_at_the_turn_of_an_epoch() -> None:
    witness = KarmaWitness(1)
    witness.saw(at(0), 2, work_units=HOUR_UNITS, failures=1)
    [first] = witness.due(at(0))
    witness.saw(at(0, EPOCH + 112), 2, work_units=7)
    [later] = witness.due(at(0, EPOCH + 112))
    assert later.counters == Counters(7)
    assert later.past == POLICY.fold(first, EPOCH + 112) == Past(HOUR_UNITS * 9 // 20, 0, 0)
    assert not contradict(first, later)
    assert join(first, later) == later


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3 * 6 * 3600), st.integers(0, 4), st.booleans()), max_size=30))
def test_an_honest_witness_never_contradicts_itself(events: list[tuple[int, int, bool]]) -> None:
    """Whatever its clock does, backward steps included."""
    witness: KarmaWitness[int] = KarmaWitness(0, restate_ns=0, capacity=2)
    said: list[Statement[int]] = []
    for second, subject, failed in events:
        witness.saw(at(second), subject, work_units=1, failures=int(failed))
        said += witness.due(at(second))
    for one in said:
        assert not any(contradict(one, other) for other in said if other.subject == one.subject)
    for subject in {s.subject for s in said}:
        numbers = [s.sequence for s in said if s.subject == subject]
        assert numbers == sorted(set(numbers))


def test_a_restored_witness_goes_on_where_it_was() -> None:
    witness = KarmaWitness(1)
    witness.saw(at(0), 2, work_units=5)
    said = witness.due(at(0))
    again = KarmaWitness(1)
    again.restore(said)
    again.saw(at(1), 2, work_units=1)
    [more] = again.due(at(1000))
    assert more.counters == Counters(6)
    again.restore([*said, more])
    again.saw(at(1001), 2, work_units=1)
    assert again.due(at(2000))[0].counters == Counters(7)


@pytest.mark.parametrize("epochs", [0, 3])
def test_memory_may_come_back_after_the_first_new_statement(epochs: int) -> None:
    """By gossip, a moment after the restart: nothing is lost, nothing counted twice."""
    witness = KarmaWitness(1)
    witness.saw(at(0), 2, work_units=HOUR_UNITS)
    said = witness.due(at(0))
    again = KarmaWitness(1)
    again.saw(at(5, EPOCH + epochs), 2, work_units=7)
    own = again.due(at(5, EPOCH + epochs))
    for _ in range(2):
        again.restore([*own, *said])
    again.saw(at(6, EPOCH + epochs), 2, failures=1)
    [more] = again.due(at(1000, EPOCH + epochs))
    if epochs:
        assert (more.counters, more.past) == (Counters(7, 1), POLICY.fold(said[0], EPOCH + epochs))
    else:
        assert (more.counters, more.past) == (Counters(HOUR_UNITS + 7, 1), Past())


def test_round_trips_are_the_least_of_two_epochs() -> None:
    witness = KarmaWitness(1, restate_ns=0)

    def rtt(epoch: int, *measured: int) -> int:
        witness.saw(at(1, epoch), 2, work_units=1)
        for rtt_us in measured:
            witness.measured(at(1, epoch), 2, rtt_us)
        return witness.due(at(2, epoch))[0].min_rtt_us

    assert rtt(EPOCH, 900, 500, 700) == 500
    assert rtt(EPOCH + 1) == 500
    assert rtt(EPOCH + 2, 800) == 800
    assert rtt(EPOCH + 9) == 0


def test_a_round_trip_alone_is_worth_a_statement_once() -> None:
    witness = KarmaWitness(1, restate_ns=0)
    witness.measured(at(0), 2, 900)
    assert [s.min_rtt_us for s in witness.due(at(0))] == [900]
    witness.measured(at(1), 2, 1000)
    witness.measured(at(1), 2, 850)
    assert witness.due(at(1)) == []
    witness.measured(at(2), 2, 700)
    assert [s.min_rtt_us for s in witness.due(at(2))] == [700]
    witness.measured(at(0, EPOCH + 1), 2, 950)
    assert [s.min_rtt_us for s in witness.due(at(0, EPOCH + 1))] == [700]


def test_a_full_witness_forgets_nobody_of_this_epoch() -> None:
    witness = KarmaWitness(0, capacity=2)
    for subject in (1, 2):
        witness.saw(at(0), subject, work_units=1)
    assert len(witness.due(at(0))) == 2
    assert not witness.saw(at(1), 3, work_units=1)
    assert witness.saw(at(1, EPOCH + 1), 3, work_units=1)
    assert len(witness) == 2
