"""Trust: the bound on any set of identities behind attack edges, and what else flows and does not flow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import trust as routing_trust
from routing.karma import HOUR_UNITS, KarmaPolicy
from routing.trust import FULL, TrustPolicy, attack_flow

POLICY = TrustPolicy()


def trust_of(
    seeds: Mapping[int, int],
    graph: Mapping[int, Mapping[int, int]],
    policy: TrustPolicy,
    barred: Collection[int] = (),
) -> dict[int, int]:
    return routing_trust.trust_of(seeds, lambda issuer: graph.get(issuer, {}), policy, barred)


KNEE = Fraction(20, 3) / 40  # 6.7 of 40 hours

honest_nodes = range(6)
sybil_nodes = range(100, 112)
hours = st.integers(0, 60 * HOUR_UNITS)


def edges_between(sources: range, targets: range) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    return st.lists(st.tuples(st.sampled_from(sources), st.sampled_from(targets), hours), max_size=40)


def graph_of(*lists: list[tuple[int, int, int]]) -> dict[int, dict[int, int]]:
    graph: dict[int, dict[int, int]] = {}
    for rows in lists:
        for source, target, units in rows:
            graph.setdefault(source, {})[target] = units
    return graph


seeds_strategy = st.dictionaries(st.sampled_from(honest_nodes), st.integers(1, FULL), min_size=1, max_size=4)


@settings(deadline=None, max_examples=400)
@given(
    seeds_strategy,
    edges_between(honest_nodes, honest_nodes),
    edges_between(honest_nodes, sybil_nodes),  # attack edges
    edges_between(sybil_nodes, sybil_nodes),
    edges_between(sybil_nodes, honest_nodes),
    st.integers(1, 95),
)
def test_a_region_gets_at_most_what_the_attack_edges_let_in(
    seeds: dict[int, int],
    among_honest: list[tuple[int, int, int]],
    attack: list[tuple[int, int, int]],
    among_sybils: list[tuple[int, int, int]],
    back: list[tuple[int, int, int]],
    damping: int,
) -> None:
    """The guarantee of routing.trust, whatever the region states within itself and about honest nodes."""
    policy = TrustPolicy(damping_percent=damping)
    graph = graph_of(among_honest, attack, among_sybils, back)
    trust = trust_of(seeds, graph, policy)
    phi = attack_flow(seeds, graph, sybil_nodes, policy)
    gained = sum(weight for peer, weight in trust.items() if peer in sybil_nodes)
    assert gained <= Fraction(damping, 100 - damping) * phi
    assert all(0 < weight <= FULL for weight in trust.values())


@settings(deadline=None)
@given(edges_between(honest_nodes, honest_nodes), edges_between(sybil_nodes, honest_nodes))
def test_without_attack_edges_a_region_gets_nothing(
    among_honest: list[tuple[int, int, int]], back: list[tuple[int, int, int]]
) -> None:
    praise = {a: {b: HOUR_UNITS for b in sybil_nodes if b != a} for a in sybil_nodes}
    trust = trust_of({0: FULL}, {**graph_of(among_honest, back), **praise}, POLICY)
    assert not any(peer in sybil_nodes for peer in trust)


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_thousand_identities_get_no_more_than_one(size: int) -> None:
    """One attack edge, a ring of praise behind it; the bound is nearly reached by one and by none passed."""
    ring = {100 + i: {100 + (i + 1) % size: HOUR_UNITS * 1000} for i in range(size)}
    graph = {0: {1: 30 * HOUR_UNITS, 100: 10 * HOUR_UNITS}, **ring}
    trust = trust_of({0: FULL}, graph, POLICY)
    gained = sum(weight for peer, weight in trust.items() if peer >= 100)
    phi = attack_flow({0: FULL}, graph, range(100, 100 + size), POLICY)
    assert phi == FULL // 4
    assert FULL // 8 <= gained <= phi


def test_a_star_and_a_chain_gain_no_more() -> None:
    star = {100: {101 + i: HOUR_UNITS for i in range(500)}}
    chain = {100 + i: {101 + i: HOUR_UNITS * 100} for i in range(500)}
    for region in (star, chain):
        trust = trust_of({0: FULL}, {0: {100: 40 * HOUR_UNITS}, **region}, POLICY)
        assert sum(weight for peer, weight in trust.items() if peer >= 100) <= FULL


def test_a_first_small_edge_is_not_an_issuers_whole_opinion() -> None:
    trust = trust_of({0: FULL}, {0: {1: HOUR_UNITS // 2}}, POLICY)
    assert trust[1] == FULL // 2 // 80


def test_seeds_keep_their_weight_and_the_barred_get_nothing() -> None:
    graph = {0: {1: 50 * HOUR_UNITS, 2: 50 * HOUR_UNITS}, 1: {2: 50 * HOUR_UNITS}}
    assert trust_of({0: FULL, 5: 7}, {}, POLICY) == {0: FULL, 5: 7}
    trust = trust_of({0: FULL, 1: FULL}, graph, POLICY, barred=[1])
    assert 1 not in trust
    assert trust[2] == FULL // 4
    assert trust_of({0: 3 * FULL}, {}, POLICY) == {0: FULL}


def test_praising_oneself_moves_nothing() -> None:
    plain = trust_of({0: FULL}, {0: {1: 40 * HOUR_UNITS}}, POLICY)
    assert trust_of({0: FULL}, {0: {1: 40 * HOUR_UNITS, 0: 10**15}, 1: {1: 10**15}}, POLICY) == plain


@settings(deadline=None)
@given(st.permutations(list(range(1, 8))), edges_between(range(8), range(8)))
def test_the_order_of_anything_does_not_matter(names: list[int], rows: list[tuple[int, int, int]]) -> None:
    graph = graph_of(rows)
    shuffled = {i: dict(sorted(graph[i].items(), reverse=True)) for i in [0, *names] if i in graph}
    seeds = {0: FULL, 3: FULL // 2}
    assert trust_of(seeds, graph, POLICY) == trust_of(dict(reversed(seeds.items())), shuffled, POLICY)


def test_below_a_sixth_nobody_is_lifted_over_the_threshold() -> None:
    """What the bound means for karma, with the policy's own numbers."""
    karma = KarmaPolicy()
    weight = FULL * KNEE - 1
    lifted = int(weight * karma.credit_cap_units) // FULL
    assert karma.points_mpt(lifted) < karma.threshold_mpt
