"""Placement with requirements: what may run where, in which order, and that nothing worse comes sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adverts import Hardware, IslandAdvert, OfferedCargo, Window
from protocol.dice import Dice
from protocol.ids import CargoDigest
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from routing.geography import Place
from routing.islands import IslandBook
from routing.jurisdiction import EU_ONLY, Sighting
from routing.placement import STALE_LOAD_NS, Candidate, JobShape, Policy, Query, choose, soonest
from routing.policies import at_random, by_price, by_rtt
from routing.requirements import ANYTHING, Outlook, Requirements, is_open, price_ucr

CARGO = CargoDigest("sha256:" + "c" * 64)
NOW = Instant(100 * SECOND_NS)
JOB = JobShape(CARGO, prompt_tokens=200, output_tokens=100)
DAY = 24 * 60


def advert(name: str = "x", fields: dict[str, Any] | None = None, **offer: Any) -> IslandAdvert:
    base: dict[str, Any] = {
        "digest": CARGO,
        "name": "m",
        "version": "1",
        "runtime": "llmcpp",
        "state": "ready",
        "context_length": 2048,
        "slots": 4,
        "active": 0,
        "queued": 0,
        "decode_tps": 100.0,
        "prefill_tps": 500.0,
    }
    return IslandAdvert(name=name, cargos=(OfferedCargo(**{**base, **offer}),), **(fields or {}))


def book_of(**islands: IslandAdvert) -> IslandBook[str]:
    book: IslandBook[str] = IslandBook()
    for peer, said in islands.items():
        book.admit(NOW, peer, said, 1)
    return book


def names(ranked: list[Candidate[str]]) -> list[str]:
    return [candidate.peer for candidate in ranked]


def placed(
    book: IslandBook[str], requirements: Requirements = ANYTHING, outlook: Outlook[str] | None = None
) -> list[str]:
    return names(soonest(NOW, book, Query(JOB, outlook or Outlook(), frozenset(), requirements)))


def test_prices() -> None:
    offered = advert(prompt_ask_ucr=3, output_ask_ucr=7, unit_ask_ucr=1000).cargos[0]
    assert price_ucr(offered, 0, 0) == 0
    assert price_ucr(offered, 1, 1) == 2  # each part rounded up
    assert price_ucr(offered, 1000, 2000) == 17
    assert price_ucr(offered, 0, 0, units=3) == 3000
    book = book_of(
        cheap=advert(prompt_ask_ucr=100_000, output_ask_ucr=200_000, decode_tps=10.0),
        dear=advert(prompt_ask_ucr=1_000_000, output_ask_ucr=2_000_000),
        free=advert(decode_tps=1.0),
    )
    assert placed(book) == ["dear", "cheap", "free"]
    assert placed(book, Requirements(max_price_ucr=40_000)) == ["cheap", "free"]
    assert placed(book, Requirements(max_price_ucr=39_999)) == ["free"]


def test_a_schedule_opens_and_closes() -> None:
    monday = UnixNs(1_700_438_400 * SECOND_NS)  # 20 November 2023, 00:00 UTC
    minute = 60 * SECOND_NS
    nights = (Window(22 * 60, 9 * 60),)  # Monday 22:00 to Tuesday 07:00
    assert is_open((), monday)
    assert not is_open(nights, UnixNs(monday + (22 * 60 - 1) * minute))
    assert is_open(nights, UnixNs(monday + 22 * 60 * minute))
    assert is_open(nights, UnixNs(monday + (31 * 60 - 1) * minute))
    assert not is_open(nights, UnixNs(monday + 31 * 60 * minute))
    over_the_end = (Window(6 * DAY + 23 * 60, 120),)  # Sunday 23:00 to Monday 01:00
    assert is_open(over_the_end, UnixNs(monday + 59 * minute))
    assert not is_open(over_the_end, UnixNs(monday + 61 * minute))
    assert is_open(over_the_end, UnixNs(monday - 1))
    book = book_of(night=advert(fields={"schedule": nights}), always=advert(decode_tps=1.0))
    assert placed(book, outlook=Outlook(unix_offset_ns=monday - NOW)) == ["always"]
    assert placed(book, outlook=Outlook(unix_offset_ns=monday + 23 * 60 * minute - NOW)) == ["night", "always"]


def test_karma_gpu_and_residency_are_required_where_asked_for() -> None:
    book = book_of(known=advert(decode_tps=1.0), new=advert(), card=advert(vram_mib=4000, decode_tps=2.0))
    karma: Outlook[str] = Outlook(karma_of=lambda peer: 10_000 if peer == "known" else 9_999)
    assert placed(book, Requirements(karma_floor_milli=10_000), karma) == ["known"]
    assert placed(book, Requirements(gpu=True)) == ["card"]
    madrid = [Sighting("a", Place(40.3, -3.8), 900_000), Sighting("b", Place(40.5, -3.6), 900_000)]
    seen: Outlook[str] = Outlook(sightings_of=lambda peer: madrid if peer == "new" else madrid[:1])
    assert placed(book, Requirements(residency=EU_ONLY), seen) == ["new"]
    assert placed(book, Requirements(residency=EU_ONLY)) == []  # nothing known: closed


def test_equal_times_go_by_fit_then_region() -> None:
    roomy = {"hardware": Hardware(memory_mib=10_000)}
    book = book_of(
        tight=advert(fields={"hardware": Hardware(memory_mib=6100)}, memory_mib=6000),
        far=advert(fields={**roomy, "region": "oceania"}, memory_mib=6000),
        next_door=advert(fields={**roomy, "region": "eu-central"}, memory_mib=6000),
        here=advert(fields={**roomy, "region": "eu-west"}, memory_mib=6000),
    )
    rtt = {"tight": 1, "far": 2, "next_door": 3, "here": 4}
    outlook: Outlook[str] = Outlook(rtt_of=lambda peer: rtt[peer] * MILLISECOND_NS)
    assert placed(book, Requirements(region="eu-west"), outlook) == ["here", "next_door", "far", "tight"]


def test_a_better_fit_does_not_outweigh_time() -> None:
    book = book_of(
        tight=advert(fields={"hardware": Hardware(memory_mib=6100)}, memory_mib=6000),
        roomy=advert(fields={"hardware": Hardware(memory_mib=10_000)}, memory_mib=6000, decode_tps=80.0),
    )
    assert placed(book) == ["tight", "roomy"]


def test_a_coordinate_stands_in_for_a_round_trip_never_measured() -> None:
    book = book_of(a=advert(fields={"coordinate": 7}), b=advert(fields={"coordinate": 9}), c=advert())
    outlook: Outlook[str] = Outlook(estimate_of=lambda there: there * 30 * MILLISECOND_NS)
    assert placed(book, outlook=outlook) == ["a", "b", "c"]
    measured: Outlook[str] = Outlook(
        rtt_of=lambda peer: MILLISECOND_NS if peer == "c" else None, estimate_of=outlook.estimate_of
    )
    assert placed(book, outlook=measured) == ["c", "a", "b"]


def test_a_measured_prefill_corrects_the_claim() -> None:
    book = book_of(boaster=advert(prefill_tps=1e6), honest=advert(prefill_tps=400.0))
    assert placed(book) == ["boaster", "honest"]
    book.measured_prefill("boaster", CARGO, 20.0)
    assert placed(book) == ["honest", "boaster"]


# --- policies to compare with ----------------------------------------------------------------------


def test_other_policies_filter_alike_and_order_by_one_thing() -> None:
    book = book_of(
        a=advert(output_ask_ucr=300, decode_tps=1000.0),
        b=advert(output_ask_ucr=100, decode_tps=1.0),
        c=advert(output_ask_ucr=200),
        out=advert(output_ask_ucr=10**9),
    )
    outlook: Outlook[str] = Outlook(rtt_of={"a": 3, "b": 2, "c": 1, "out": 0}.get)
    query = Query(JOB, outlook, frozenset(), Requirements(max_price_ucr=10**6))
    assert names(by_rtt()(NOW, book, query)) == ["c", "b", "a"]
    assert names(by_price()(NOW, book, query)) == ["b", "c", "a"]
    drawn: Policy[str] = at_random(Dice(1))
    orders = {tuple(names(drawn(NOW, book, query))) for _ in range(50)}
    assert len(orders) == 6
    assert all(set(order) == {"a", "b", "c"} for order in orders)


# --- two choices ----------------------------------------------------------------------------------


def candidate(peer: str, expected_ms: int, load: int, age_ns: int) -> Candidate[str]:
    return Candidate(peer, expected_ms * MILLISECOND_NS, 0, load_permille=load, load_age_ns=age_ns)


def test_fresh_loads_are_believed_and_old_ones_drawn_for() -> None:
    fresh = [candidate("a", 100, 900, 0), candidate("b", 100, 0, 10**12)]
    assert choose([], Dice(1)) is None
    dice = Dice(1)
    assert names([choose(fresh, dice)] * 1) == ["a"]  # type: ignore[list-item]
    assert dice.counter == 0
    old = STALE_LOAD_NS + 1
    stale = [candidate("a", 100, 500, old), candidate("b", 110, 200, old), candidate("c", 125, 0, old)]
    stale.append(candidate("far", 200, 0, old))
    taken = {choose(stale, Dice(seed)).peer for seed in range(40)}  # type: ignore[union-attr]
    assert taken == {"b", "c"}  # of a and b it is b, of any pair with c it is c; never the far one


def test_in_a_quiet_network_the_best_is_taken() -> None:
    old = STALE_LOAD_NS + 1
    idle = [candidate("a", 100, 0, old), candidate("b", 101, 0, old)]
    assert all(choose(idle, Dice(seed)) is idle[0] for seed in range(20))


def test_gateways_with_the_same_old_news_do_not_all_choose_the_same() -> None:
    book: IslandBook[int] = IslandBook()
    for peer in range(20):
        book.admit(Instant(0), peer, advert(active=1), 1)
    ranked = soonest(Instant(2 * SECOND_NS), book, Query(JOB, Outlook(rtt_of=lambda _: 10**7)))
    taken = [choose(ranked, Dice(gateway)) for gateway in range(200)]
    counts = [sum(1 for c in taken if c is not None and c.peer == peer) for peer in range(20)]
    assert max(counts) <= 25  # ten each, give or take


Row = tuple[dict[str, Any], int, int]

# --- laws -----------------------------------------------------------------------------------------

offers = st.fixed_dictionaries(
    {
        "decode_tps": st.floats(0, 1e6),
        "prefill_tps": st.floats(0, 1e6),
        "active": st.integers(0, 10),
        "queued": st.integers(0, 10),
        "slots": st.integers(0, 8),
        "context_length": st.integers(0, 4096),
        "state": st.sampled_from(["ready", "loading", "failed"]),
        "prompt_ask_ucr": st.integers(0, 10**12),
        "output_ask_ucr": st.integers(0, 10**12),
        "vram_mib": st.sampled_from([0, 4000]),
    }
)
requirements = st.builds(
    Requirements,
    karma_floor_milli=st.none() | st.integers(-5, 5),
    max_price_ucr=st.none() | st.integers(0, 10**12),
    gpu=st.booleans(),
    region=st.sampled_from(["", "eu-west"]),
)
worlds = st.lists(st.tuples(offers, st.integers(0, 10**9), st.integers(-5, 5)), min_size=1, max_size=6)


def world_of(rows: list[Row]) -> tuple[IslandBook[int], Outlook[int]]:
    book: IslandBook[int] = IslandBook()
    for peer, (offer, _, _) in enumerate(rows):
        book.admit(NOW, peer, advert(**offer), 1)
    return book, Outlook(rtt_of=lambda peer: rows[peer][1], karma_of=lambda peer: rows[peer][2])


def rank_of(rows: list[Row], needs: Requirements, peer: int) -> int | None:
    book, outlook = world_of(rows)
    order = [c.peer for c in soonest(NOW, book, Query(JOB, outlook, frozenset(), needs))]
    return order.index(peer) if peer in order else None


def _dearer(offer: dict[str, Any], by: int) -> dict[str, Any]:
    return {**offer, "output_ask_ucr": min(10**12, offer["output_ask_ucr"] + by)}


def _unloaded(offer: dict[str, Any]) -> dict[str, Any]:
    return {**offer, "state": "failed" if offer["state"] == "failed" else "loading"}


WORSE: dict[str, Callable[[dict[str, Any], int, int, int], Row]] = {
    "rtt": lambda o, rtt, k, by: (o, rtt + by, k),
    "queue": lambda o, rtt, k, by: ({**o, "queued": o["queued"] + by}, rtt, k),
    "active": lambda o, rtt, k, by: ({**o, "active": o["active"] + by}, rtt, k),
    "decode": lambda o, rtt, k, by: ({**o, "decode_tps": o["decode_tps"] / (1 + by)}, rtt, k),
    "prefill": lambda o, rtt, k, by: ({**o, "prefill_tps": o["prefill_tps"] / (1 + by)}, rtt, k),
    "price": lambda o, rtt, k, by: (_dearer(o, by), rtt, k),
    "karma": lambda o, rtt, k, by: (o, rtt, k - by),
    "context": lambda o, rtt, k, by: ({**o, "context_length": max(0, o["context_length"] - by)}, rtt, k),
    "loading": lambda o, rtt, k, by: (_unloaded(o), rtt, k),
}


@pytest.mark.parametrize("what", sorted(WORSE))
@settings(max_examples=60, deadline=None)
@given(rows=worlds, needs=requirements, by=st.integers(1, 10**6), data=st.data())
def test_nothing_worse_comes_sooner(
    what: str, rows: list[Row], needs: Requirements, by: int, data: st.DataObject
) -> None:
    """If one Island gets worse in any one respect, it does not move up, and does not come in if it was out."""
    peer = data.draw(st.integers(0, len(rows) - 1))
    if what in {"decode", "prefill"} and rows[peer][0][f"{what}_tps"] / (1 + by) == 0:
        return  # 0 is no rate: it says that nothing was measured
    before = rank_of(rows, needs, peer)
    worse = [*rows[:peer], WORSE[what](*rows[peer], by), *rows[peer + 1 :]]
    after = rank_of(worse, needs, peer)
    if before is None:
        assert after is None
    elif after is not None:
        assert after >= before


@settings(max_examples=100, deadline=None)
@given(rows=worlds, needs=requirements, excluded=st.sets(st.integers(0, 5)))
def test_the_filter_is_sound_and_complete(rows: list[Row], needs: Requirements, excluded: set[int]) -> None:
    book, outlook = world_of(rows)
    query = Query(JOB, outlook, excluded, needs)
    ranked = soonest(NOW, book, query)
    fine = {
        peer
        for peer, (offer, _, karma) in enumerate(rows)
        if peer not in excluded
        and offer["state"] != "failed"
        and (needs.karma_floor_milli is None or karma >= needs.karma_floor_milli)
        and (not needs.gpu or offer["vram_mib"])
        and (
            needs.max_price_ucr is None or price_ucr(advert(**offer).cargos[0], 200, 100) <= needs.max_price_ucr
        )
    }
    assert {c.peer for c in ranked} == fine
    assert len(ranked) == len(fine)
    assert soonest(NOW, book, query) == ranked
    policies: list[Policy[int]] = [at_random(Dice(1)), by_rtt(), by_price()]
    for policy in policies:
        assert {c.peer for c in policy(NOW, book, query)} == fine


@settings(max_examples=60, deadline=None)
@given(rows=worlds, order=st.permutations(range(6)))
def test_the_order_of_adverts_matters_only_for_ties(rows: list[Row], order: list[int]) -> None:
    book, outlook = world_of(rows)
    shuffled: IslandBook[int] = IslandBook()
    for peer in order:
        if peer < len(rows):
            shuffled.admit(NOW, peer, advert(**rows[peer][0]), 1)
    query = Query(JOB, outlook)
    one, other = soonest(NOW, book, query), soonest(NOW, shuffled, query)
    assert [c.expected_ns for c in one] == [c.expected_ns for c in other]


def test_ranking_costs_what_the_cargos_islands_cost() -> None:
    """Of 3,000 Islands, three have the Cargo: three are looked at."""
    book: IslandBook[int] = IslandBook()
    for peer in range(3000):
        digest = CARGO if peer % 1000 == 0 else "sha256:" + f"{peer:064x}"
        book.admit(NOW, peer, advert(digest=digest), 1)
    asked: list[int] = []

    def rtt_of(peer: int) -> int:
        asked.append(peer)
        return 1

    ranked = soonest(NOW, book, Query(JOB, Outlook(rtt_of=rtt_of)))
    assert sorted(asked) == sorted(c.peer for c in ranked) == [0, 1000, 2000]
