"""The store: a semilattice within its bounds, scores that weigh issuers, and floods that change nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.gossip_quota import QuotaMap
from routing.karma import HOUR_UNITS, SEQUENCE_BITS, Counters, KarmaPolicy, Merge, Past, Statement
from routing.karma_store import KarmaStore, StoreLimits
from routing.trust import FULL, TrustPolicy, attack_flow

EPOCH = 80_000
ME, SEED, ISLAND = 0, 1, 50
POLICY = KarmaPolicy()
small = st.integers(0, 3)


def stated(
    issuer: int, subject: int = ISLAND, *, epoch: int = EPOCH, n: int = 0, **said: int
) -> Statement[int]:
    return Statement(issuer, subject, (epoch << SEQUENCE_BITS) + n, Counters(**said))


#: Attested units far above the floor, so that trust really flows in these examples.
statements = st.builds(
    lambda issuer, subject, n, work, failures, attested, past: Statement(
        issuer,
        subject,
        (EPOCH << SEQUENCE_BITS) + n,
        Counters(work * HOUR_UNITS, failures, attested_units=attested * 10 * HOUR_UNITS),
        Past(past * HOUR_UNITS),
    ),
    st.integers(0, 4),
    st.integers(0, 6),
    small,
    small,
    small,
    small,
    small,
)


@settings(deadline=None)
@given(st.lists(statements, max_size=30).flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))))
def test_order_and_repetition_do_not_matter(
    orders: tuple[list[Statement[int]], list[Statement[int]]],
) -> None:
    one, other = KarmaStore(ME, {SEED: FULL}), KarmaStore(ME, {SEED: FULL})
    for statement in orders[0]:
        one.merge(statement, EPOCH)
    for statement in orders[1]:
        other.merge(statement, EPOCH)
        other.merge(statement, EPOCH)
    assert sorted(one, key=lambda s: (s.issuer, s.subject)) == sorted(
        other, key=lambda s: (s.issuer, s.subject)
    )
    # Which contradictions are seen depends on what was seen; what stands does not.
    contradictions = any(m is Merge.CONTRADICTS for m in (other.merge(s, EPOCH) for s in orders[0]))
    if not contradictions and not one._barred and not other._barred:
        assert [one.standing(s, EPOCH + 3) for s in range(7)] == [
            other.standing(s, EPOCH + 3) for s in range(7)
        ]


@settings(deadline=None)
@given(st.lists(statements, max_size=20), st.lists(statements, max_size=20))
def test_two_stores_that_exchange_agree(left: list[Statement[int]], right: list[Statement[int]]) -> None:
    one, other = KarmaStore(ME), KarmaStore(ME)
    for statement in left:
        one.merge(statement, EPOCH)
    for statement in right:
        other.merge(statement, EPOCH)
    for statement in list(one):
        other.merge(statement, EPOCH)
    for statement in list(other):
        one.merge(statement, EPOCH)
    assert set(one) == set(other)


def test_own_experience_counts_in_full_and_strangers_do_not() -> None:
    store = KarmaStore(ME)
    assert store.points_mpt(ISLAND, EPOCH) == 0
    store.merge(stated(7, work_units=40 * HOUR_UNITS), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH) == 0
    store.merge(stated(ME, work_units=2 * HOUR_UNITS), EPOCH)
    standing = store.standing(ISLAND, EPOCH)
    assert (standing.points_mpt, standing.net_units, standing.issuers) == (3_000, 2 * HOUR_UNITS, 1)


def test_an_opinion_weighs_as_much_as_its_issuer() -> None:
    """A seed at half weight; a coordinator whose statements I verified, at half of my trust."""
    store = KarmaStore(ME, {SEED: FULL // 2})
    store.merge(stated(SEED, work_units=2 * HOUR_UNITS), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH) == 1_500
    store.merge(stated(ME, 9, attested_units=40 * HOUR_UNITS), EPOCH)
    store.merge(stated(9, work_units=2 * HOUR_UNITS), EPOCH)
    assert store.trust(9, EPOCH) == FULL // 2
    assert store.points_mpt(ISLAND, EPOCH) == 3_000
    store.set_seeds({})
    assert store.points_mpt(ISLAND, EPOCH) == 1_500


def test_trust_is_not_drawn_anew_for_each_of_many_edges() -> None:
    store = KarmaStore(ME)
    for peer in range(100, 200):
        store.merge(stated(ME, peer, attested_units=HOUR_UNITS), EPOCH)
    full = store.trust(100, EPOCH)
    for n in range(1, 3):
        store.merge(stated(ME, 99 + n, n=n, attested_units=50 * HOUR_UNITS), EPOCH)
        assert store.trust(100, EPOCH) == full
    store.merge(stated(ME, 102, n=3, attested_units=50 * HOUR_UNITS), EPOCH)
    assert store.trust(100, EPOCH) > full
    assert store._edges == 100


def test_work_as_an_island_buys_no_belief() -> None:
    store = KarmaStore(ME)
    store.merge(stated(ME, 9, work_units=40 * HOUR_UNITS), EPOCH)
    store.merge(stated(9, work_units=40 * HOUR_UNITS), EPOCH)
    assert store.trust(9, EPOCH) == 0
    assert store.points_mpt(ISLAND, EPOCH) == 0


def test_who_cheats_me_can_not_hide_behind_the_praise_of_many() -> None:
    store = KarmaStore(ME, dict.fromkeys(range(1, 6), FULL))
    for issuer in range(6):
        store.merge(stated(issuer, work_units=100 * HOUR_UNITS, lies=int(issuer == ME)), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH) == 0


def test_a_slanderer_meets_all_who_know_better() -> None:
    store = KarmaStore(ME, dict.fromkeys(range(1, 4), FULL))
    for issuer in (ME, 1, 2):
        store.merge(stated(issuer, work_units=100 * HOUR_UNITS), EPOCH)
    store.merge(stated(3, lies=1000, failures=10**6), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH) == 43_333


REGION = range(10, 12)
peers_spoken_of = st.sampled_from([0, 1, 2, *REGION, 50])
hours = st.integers(0, 60)
honest_words = st.lists(st.tuples(st.integers(0, 2), peers_spoken_of, hours, hours), min_size=5, max_size=30)
region_words = st.lists(
    st.tuples(st.sampled_from(REGION), peers_spoken_of, hours, hours, st.integers(0, 3)),
    min_size=3,
    max_size=30,
)


@settings(deadline=None)
@given(honest_words, region_words)
def test_what_a_region_can_do_to_anybody_is_bounded(
    honest: list[tuple[int, int, int, int]], region: list[tuple[int, int, int, int, int]]
) -> None:
    """The guarantee at the end of routing.trust, in hours of karma: whatever the region states about Islands,
    itself or honest coordinators.
    """
    seeds = {ME: FULL, SEED: FULL // 2}
    store = KarmaStore(ME, seeds)
    for issuer, subject, attested, work in {(i, s): (i, s, a, w) for i, s, a, w in honest}.values():
        store.merge(
            stated(issuer, subject, attested_units=attested * HOUR_UNITS, work_units=work * HOUR_UNITS), EPOCH
        )
    before = store.standing(50, EPOCH).net_units
    graph = {issuer: store._row(issuer) for issuer in range(3)}
    policy = TrustPolicy()
    bound = (
        attack_flow(seeds, graph, REGION, policy) * policy.damping_percent // (100 - policy.damping_percent) + 1
    )
    said = {(i, s): (i, s, a, w, lies) for i, s, a, w, lies in region}
    for issuer, subject, attested, work, lies in said.values():
        counters = {"attested_units": attested * HOUR_UNITS, "work_units": work * HOUR_UNITS, "lies": lies}
        store.merge(stated(issuer, subject, **counters), EPOCH)
    after = store.standing(50, EPOCH).net_units
    assert abs(after - before) <= bound * POLICY.credit_cap_units // FULL + 2


def test_a_proven_liar_is_believed_no_more() -> None:
    store = KarmaStore(ME, {SEED: FULL})
    store.merge(stated(SEED, work_units=HOUR_UNITS, failures=3), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH) > 0
    assert store.merge(stated(SEED, work_units=HOUR_UNITS, failures=2), EPOCH) is Merge.CONTRADICTS
    assert store.trust(SEED, EPOCH) == 0
    assert store.points_mpt(ISLAND, EPOCH) == 0


def test_our_own_lost_memory_does_not_bar_us() -> None:
    store = KarmaStore(ME)
    store.merge(stated(ME, failures=3), EPOCH)
    assert store.merge(stated(ME, work_units=HOUR_UNITS), EPOCH) is Merge.CONTRADICTS
    assert store.trust(ME, EPOCH) == FULL


def test_out_of_time_and_about_oneself_is_refused() -> None:
    store = KarmaStore(ME)
    assert store.merge(stated(3, 3, work_units=1), EPOCH) is Merge.REFUSED
    assert store.merge(stated(3, epoch=EPOCH + 2), EPOCH) is Merge.REFUSED
    assert store.merge(stated(3, epoch=EPOCH - POLICY.keep_epochs - 1), EPOCH) is Merge.REFUSED
    assert store.merge(stated(3, epoch=EPOCH - POLICY.keep_epochs), EPOCH) is Merge.NEW
    assert len(store) == 1
    assert store.expire(EPOCH) == 0
    assert store.expire(EPOCH + 1) == 1
    assert len(store) == 0
    assert list(store.about(ISLAND)) == []


def test_karma_decays_while_nobody_speaks() -> None:
    store = KarmaStore(ME)
    store.merge(stated(ME, work_units=4 * HOUR_UNITS), EPOCH)
    assert store.points_mpt(ISLAND, EPOCH + POLICY.half_life_epochs) == 3_000
    assert store.points_mpt(ISLAND, EPOCH) == 6_000


def test_round_trips_come_with_their_issuers_trust() -> None:
    store = KarmaStore(ME, {SEED: FULL // 2})
    store.merge(Statement(SEED, ISLAND, EPOCH << SEQUENCE_BITS, min_rtt_us=900), EPOCH)
    store.merge(Statement(ME, ISLAND, EPOCH << SEQUENCE_BITS, min_rtt_us=700), EPOCH)
    store.merge(Statement(9, ISLAND, EPOCH << SEQUENCE_BITS, min_rtt_us=1), EPOCH)
    assert store.min_rtts(ISLAND, EPOCH) == [(ME, FULL, 700), (SEED, FULL // 2, 900)]
    assert store.min_rtts(ISLAND, EPOCH + 2) == []


def test_a_flood_of_strangers_costs_the_trusted_nothing() -> None:
    limits = StoreLimits(statements=100, of_strangers=20, per_issuer=60)
    store = KarmaStore(ME, {SEED: FULL}, limits=limits)
    for subject in range(100, 150):
        store.merge(stated(SEED, subject, work_units=HOUR_UNITS), EPOCH)
    for sybil in range(1000, 3000):
        store.merge(stated(sybil, 5, lies=9), EPOCH)
    assert len(store) == 70
    assert len(list(store.by(SEED))) == 50
    assert store.points_mpt(5, EPOCH) == 0
    for subject in range(200, 300):
        store.merge(stated(SEED, subject, work_units=HOUR_UNITS), EPOCH)
    assert len(list(store.by(SEED))) == 60
    assert len(store) <= 100
    assert len(store._about) <= 61


# --- the quota map --------------------------------------------------------------------------------

writes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.booleans()), max_size=200)


@settings(deadline=None)
@given(writes, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_the_map_is_bounded_and_counts_right(
    rows: list[tuple[int, int, bool]], capacity: int, strangers: int, per_origin: int
) -> None:
    """Origins 0..3 are favoured. The model: a plain dict, less what the map says went."""
    strangers = min(strangers, capacity)
    quota: QuotaMap[int, int, int] = QuotaMap(capacity, strangers, per_origin, lambda origin: origin < 4)
    model: dict[tuple[int, int], int] = {}
    for number, (origin, key, remove) in enumerate(rows):
        if remove:
            assert quota.pop(origin, key) == model.pop((origin, key), None)
        else:
            gone = quota.put(origin, key, number)
            model[origin, key] = number
            for one, other, value in gone:
                assert model.pop((one, other)) == value
        assert {(o, k): v for o, k, v in quota} == model
        assert len(quota) == len(model) <= capacity
        assert quota.strangers == sum(origin >= 4 for origin, _ in model) <= strangers
        for one in range(10):
            assert len(list(quota.of(one))) <= per_origin


@settings(deadline=None)
@given(writes)
def test_favoured_entries_never_go_for_a_stranger(rows: list[tuple[int, int, bool]]) -> None:
    quota: QuotaMap[int, int, int] = QuotaMap(10, 4, 5, lambda origin: origin < 4)
    for origin, key, _ in rows:
        gone = quota.put(origin, key, 0)
        if origin >= 4:
            assert all(one >= 4 for one, _, _ in gone)


def test_the_largest_makes_room() -> None:
    quota: QuotaMap[int, int, int] = QuotaMap(10, 10, 10, lambda _: True)
    for key in range(8):
        quota.put(1, key, key)
    for origin in (2, 3, 4):
        quota.put(origin, 0, 0)
    assert [key for key, _ in quota.of(1)] == [1, 2, 3, 4, 5, 6, 7]
    assert quota.put(1, 9, 9) == [(1, 1, 1)]


@settings(deadline=None)
@given(writes, st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_favour_may_move(rows: list[tuple[int, int, bool]], first: set[int], then: set[int]) -> None:
    favour = set(first)
    quota: QuotaMap[int, int, int] = QuotaMap(12, 4, 5, favour.__contains__)
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        for origin, key, _ in half:
            quota.put(origin, key, 0)
        favour.clear()
        favour.update(then)
        held = len(quota)
        gone = quota.reconsider()
        assert len(quota) == held - len(gone)
        assert all(origin not in then for origin, _, _ in gone)
        assert quota.strangers == sum(origin not in then for origin, _, _ in quota) <= 4
