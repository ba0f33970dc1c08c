"""The best chain out of held ranges: against every possible chain, and what it says when there is none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.dice import Dice
from routing.chains.costs import cost_of, one_way_ns
from routing.chains.plan import Holder, NoRoute, Route, Speed, route

CARGO = "sha256:" + "1" * 64
MS = 1_000_000


def line(places):
    """Peers on a line: so many ms of round trip between them, and 2 more."""
    return lambda a, b: (abs(places[a] - places[b]) + 2) * MS


def nowhere(a, b):
    return 10 * MS


@st.composite
def worlds(draw):
    layers = draw(st.integers(2, 8))
    count = draw(st.integers(1, 6))
    # Few cuts, so that ranges often meet.
    cuts = sorted({0, layers, *(draw(st.integers(0, layers)) for _ in range(2))})
    holders, places = [], {}
    for number in range(count):
        first, last = draw(st.sampled_from(list(itertools.combinations(cuts, 2))))
        speed = Speed(
            draw(st.integers(1, 20)) * MS, draw(st.integers(0, 20)) * MS, draw(st.integers(0, 40)) * MS
        )
        slots = draw(st.integers(1, 3))
        holders.append(Holder(f"p{number}", first, last, speed, slots, draw(st.integers(0, slots))))
        places[f"p{number}"] = draw(st.integers(0, 80))
    return (
        layers,
        holders,
        line(places),
        draw(st.sampled_from([1, 10, 63, 200, 1000])),
        draw(st.integers(1, 50)),
    )


def every_chain(layers, holders):
    free = [h for h in holders if h.active < h.slots]
    for count in range(2, len(free) + 1):
        for chain in itertools.permutations(free, count):
            whole = chain[0].first == 0 and chain[-1].last == layers
            if whole and all(a.last == b.first for a, b in itertools.pairwise(chain)):
                yield chain


def total_ns(chain, rtt_of, prompt, output):
    rows = [(h.peer, h.speed, h.layers, h.active) for h in chain]
    return cost_of(rows, rtt_of, prompt).total_ns(output)


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_it_is_the_best_of_all_chains(world):
    layers, holders, rtt_of, prompt, output = world
    found = route(CARGO, layers, holders, rtt_of, prompt_tokens=prompt, output_tokens=output)
    known = [total_ns(chain, rtt_of, prompt, output) for chain in every_chain(layers, holders)]
    if not known:
        assert isinstance(found, NoRoute)
        return
    assert isinstance(found, Route)
    assert found.chain.is_whole
    got = total_ns(found.holders, rtt_of, prompt, output)
    # A chunk's share of a row is rounded down per stage: nothing more may lie between the two.
    assert got <= min(known) + len(holders)
    assert abs(found.total_ns - got) <= 8


@settings(max_examples=80, deadline=None)
@given(worlds())
def test_the_reason_is_true(world):
    layers, holders, rtt_of, _, _ = world
    found = route(CARGO, layers, holders, rtt_of)
    if isinstance(found, Route):
        return
    covered = {layer for h in holders for layer in range(h.first, h.last)}
    assert {layer for a, b in found.missing for layer in range(a, b)} == set(range(layers)) - covered
    idle = [Holder(h.peer, h.first, h.last, h.speed, h.slots) for h in holders]
    assert found.busy == any(True for _ in every_chain(layers, idle))


def test_spares_hold_the_same_layers_and_stand_by_best_first():
    holders = [
        Holder("a", 0, 4, Speed(1 * MS)),
        Holder("slow", 0, 4, Speed(9 * MS)),
        Holder("fair", 0, 4, Speed(3 * MS)),
        Holder("full", 0, 4, Speed(2 * MS), 1, 1),
        Holder("other", 0, 3, Speed(2 * MS)),
        Holder("b", 4, 8, Speed(1 * MS)),
    ]
    found = route(CARGO, 8, holders, nowhere, dtype="f32")
    assert isinstance(found, Route)
    assert [stage.holder.peer for stage in found.chain.stages] == ["a", "b"]
    assert [spare.peer for spare in found.chain.stages[0].spares] == ["fair", "slow"]
    assert found.chain.stages[1].spares == ()
    assert found.chain.dtype == "f32"


def test_the_hop_back_to_the_first_stage_counts():
    places = {"a": 0, "b": 61, "far": 100, "near": 20}
    holders = [
        Holder("a", 0, 4, Speed(MS)),
        Holder("b", 4, 6, Speed(MS)),
        Holder("far", 6, 8, Speed(MS)),  # nearer to b than `near` is, but the way home is longer
        Holder("near", 6, 8, Speed(MS)),
    ]
    found = route(CARGO, 8, holders, line(places))
    assert isinstance(found, Route)
    assert found.chain.head.peer == "near"


def test_who_is_suspect_or_unknown_comes_later():
    a = Holder("a", 0, 4, Speed(MS))
    good, bad = Holder("good", 4, 8, Speed(3 * MS)), Holder("bad", 4, 8, Speed(2 * MS), suspect=True)
    unknown = Holder("unknown", 4, 8)
    found = route(CARGO, 8, [unknown, bad, a, good], nowhere)
    assert isinstance(found, Route)
    assert found.chain.head.peer == "good"
    assert [spare.peer for spare in found.chain.stages[1].spares] == ["unknown", "bad"]


def test_excluded_peers_and_nonsense_ranges_are_not_used():
    holders = [Holder("a", 0, 4), Holder("b", 4, 8), Holder("c", 4, 8), Holder("odd", 6, 12), Holder("x", 5, 5)]
    found = route(CARGO, 8, holders, nowhere, excluded={"b"})
    assert isinstance(found, Route)
    assert found.chain.head.peer == "c"
    assert route(CARGO, 8, holders, nowhere, excluded={"b", "c"}) == NoRoute(((4, 8),))


def test_more_than_eight_stages_are_no_chain():
    holders = [Holder(f"p{n}", n, n + 1) for n in range(9)]
    found = route(CARGO, 9, holders, nowhere)
    assert isinstance(found, NoRoute)
    assert found.missing == ()
    assert "more than 8" in found.detail
    assert isinstance(route(CARGO, 8, holders[:8], nowhere), Route)


def test_one_island_with_everything_is_no_chain():
    assert isinstance(route(CARGO, 4, [Holder("a", 0, 4)], nowhere), NoRoute)


def test_old_news_of_load_is_spread_over_near_equals():
    def held(load_age_ns):
        stages = [Holder(f"a{n}", 0, 4, Speed(MS), 8, n % 3, load_age_ns=load_age_ns) for n in range(6)]
        return [*stages, Holder("b", 4, 8, Speed(20 * MS), 8)]

    dice = Dice(1)
    fresh = {route(CARGO, 8, held(0), nowhere, dice=dice).chain.stages[0].holder.peer for _ in range(20)}
    stale = {route(CARGO, 8, held(10**9), nowhere, dice=dice).chain.stages[0].holder.peer for _ in range(20)}
    assert len(fresh) == 1
    assert len(stale) > 1


def test_a_long_prompt_avoids_the_slowest_stage():
    """`b` is quicker for a token but reads prompts slowly; `c` is the other way round."""
    holders = [
        Holder("a", 0, 4, Speed(MS, MS // 10)),
        Holder("b", 4, 8, Speed(MS, MS)),
        Holder("c", 4, 8, Speed(2 * MS, MS // 10)),
    ]
    short = route(CARGO, 8, holders, nowhere, prompt_tokens=1, output_tokens=500)
    long = route(CARGO, 8, holders, nowhere, prompt_tokens=20_000, output_tokens=5)
    assert isinstance(short, Route)
    assert isinstance(long, Route)
    assert (short.chain.head.peer, long.chain.head.peer) == ("b", "c")


def test_a_thousand_holders_give_a_near_and_quick_chain_and_always_the_same():
    dice = Dice(7)
    places = {f"p{n}": dice.below(200) for n in range(1000)}
    cuts = [(0, 20), (20, 40), (40, 60), (60, 80), (0, 40), (40, 80)]
    holders = [
        Holder(peer, *cuts[n % len(cuts)], Speed((1 + dice.below(9)) * MS, 0, MS), 4, dice.below(4))
        for n, peer in enumerate(places)
    ]
    found = route(CARGO, 80, holders, line(places))
    assert isinstance(found, Route)
    assert route(CARGO, 80, holders, line(places)) == found
    ring = itertools.pairwise((*found.holders, found.holders[0]))
    hops = sum(one_way_ns(line(places), a.peer, b.peer) for a, b in ring)
    assert hops < 40 * MS  # they are near each other, though the line is 200 ms long
    assert found.cost.token_ns < 160 * MS  # and among the quickest: 80 layers take 80 ms at the very least


@pytest.mark.parametrize("count", [2, 8])
def test_costs_add_up(count):
    stages = [(f"p{n}", Speed(2 * MS, MS, 5 * MS), 3, 0) for n in range(count)]
    cost = cost_of(stages, nowhere, 63 * 3)
    assert cost.token_ns == count * (3 * 2 + 5) * MS + 5 * MS
    assert cost.bottleneck_ns == 11 * MS
    fill, chunk = count * (63 * 3 + 5) * MS, 63 * 3 * MS
    assert cost.prefill_ns == fill + 2 * chunk + 5 * MS
