"""Links that broke between two healthy Islands: kept apart for a while, and used if there is nobody else."""

from __future__ import annotations

import itertools

import pytest

from protocol.instants import SECOND_NS, Instant
from protocol.ring import Chain, Stage, StagePeer
from routing.chains import pairs as pairs_module
from routing.chains.pairs import (
    BROKEN_FIRST_NS,
    BROKEN_MAX_NS,
    BROKEN_RTT_NS,
    MEASURED_NS,
    Pairs,
    neighbours,
    parted,
)
from routing.chains.plan import Holder, Route, Speed, route
from routing.job_events import StageSeen

CARGO = "sha256:" + "1" * 64
MS = 1_000_000
NOW = Instant(5 * SECOND_NS)
CHAIN = Chain(
    CARGO, tuple(Stage(StagePeer(name), first, first + 4) for name, first in (("a", 0), ("b", 4), ("c", 8)))
)


def later(ns: int) -> Instant:
    return Instant(NOW + ns)


def seen(peer: str, index: int, *, failed: bool = False, rtt_ns: int = 0) -> StageSeen:
    return StageSeen(peer, index, 4 * index, 4 * index + 4, 0, failed, "silent" if failed else "", None, rtt_ns)


def best(pairs: Pairs[str], holders: list[Holder[str]], now: Instant = NOW) -> list[str]:
    found = route(CARGO, 12, holders, lambda a, b: pairs.rtt_ns(now, a, b, 10 * MS))
    assert isinstance(found, Route)
    stages = [holder.peer for holder in found.holders]
    for index, stage in enumerate(found.chain.stages):
        assert stage.holder.peer == stages[index]
    return stages


def holders(*names: str) -> list[Holder[str]]:
    """a, b, c are quick; others are slow spares of the place that their first letter names."""
    places = {"a": (0, 4), "b": (4, 8), "c": (8, 12)}
    return [Holder(n, *places[n[0]], Speed((1 if len(n) == 1 else 5) * MS)) for n in names]


def test_the_next_chain_goes_round_a_broken_pair_and_comes_back_later() -> None:
    pairs: Pairs[str] = Pairs()
    everybody = holders("a", "b", "c", "b-spare")
    assert best(pairs, everybody) == ["a", "b", "c"]
    pairs.broke(NOW, "a", "b")
    assert best(pairs, everybody) == ["a", "b-spare", "c"]
    assert best(pairs, everybody, later(BROKEN_FIRST_NS + 1)) == ["a", "b", "c"]
    # Whom a spare would stand beside counts, too: that of the third place can not be fed by the broken one.
    found = route(CARGO, 12, everybody, lambda a, b: pairs.rtt_ns(NOW, a, b, 10 * MS))
    assert isinstance(found, Route)
    assert [spare.peer for spare in found.chain.stages[1].spares] == ["b"]


def test_if_there_is_nobody_else_it_is_tried() -> None:
    pairs: Pairs[str] = Pairs()
    pairs.broke(NOW, "b", "a")
    assert best(pairs, holders("a", "b", "c")) == ["a", "b", "c"]
    assert pairs.rtt_ns(NOW, "a", "b", None) == BROKEN_RTT_NS
    assert pairs.is_broken(NOW, "a", "b")
    assert not pairs.is_broken(NOW, "a", "c")


def test_each_time_it_is_avoided_for_longer_until_it_works() -> None:
    pairs: Pairs[str] = Pairs()
    now = NOW
    lasted = []
    for _ in range(12):
        pairs.broke(now, "a", "b")
        pairs.broke(later(now - NOW + 1), "b", "a")  # another session tells of the same fault
        began = now
        while pairs.is_broken(now, "a", "b"):
            now = Instant(now + SECOND_NS)
        lasted.append(now - began)
    assert lasted[0] == BROKEN_FIRST_NS
    assert all(b in {2 * a, BROKEN_MAX_NS} for a, b in itertools.pairwise(lasted))
    assert lasted[-1] == BROKEN_MAX_NS
    pairs.broke(now, "a", "b")
    pairs.worked(now, "b", "a")
    assert not pairs.is_broken(now, "a", "b")
    pairs.broke(now, "a", "b")
    assert not pairs.is_broken(Instant(now + BROKEN_FIRST_NS), "a", "b")


def test_what_was_measured_counts_before_a_guess_for_a_while() -> None:
    pairs: Pairs[str] = Pairs()
    pairs.worked(NOW, "a", "b")
    assert pairs.rtt_ns(NOW, "a", "b", 7) == 7
    pairs.worked(NOW, "a", "b", 80 * MS)
    assert pairs.rtt_ns(NOW, "b", "a", 7) == 80 * MS
    pairs.worked(later(1), "a", "b", 40 * MS)
    assert pairs.rtt_ns(later(1), "a", "b", None) == 70 * MS
    assert pairs.rtt_ns(later(MEASURED_NS + 1), "a", "b", 7) == 7
    pairs.worked(later(2 * MEASURED_NS), "a", "b", 40 * MS)
    assert pairs.rtt_ns(later(2 * MEASURED_NS), "a", "b", 7) == 40 * MS


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "MAX_PAIRS", 8)
    pairs: Pairs[str] = Pairs()
    pairs.broke(NOW, "a", "a")
    for number in range(100):
        pairs.broke(NOW, "a", str(number))
    assert len(pairs) == 8
    assert pairs.is_broken(NOW, "99", "a")


def test_who_is_kept_apart_by_a_heads_account() -> None:
    assert neighbours(CHAIN, []) == [("c", "a", 0), ("a", "b", 0), ("b", "c", 0)]
    # It could not go on: only who failed is named.
    assert parted(CHAIN, [seen("b", 1, failed=True)]) == {"b": "a"}
    assert parted(CHAIN, [seen("a", 0, failed=True)]) == {"a": "c"}
    # A spare took over: those who stood at the end worked together.
    account = [seen("a", 0), seen("s", 1, rtt_ns=70), seen("c", 2), seen("b", 1, failed=True)]
    assert neighbours(CHAIN, account) == [("c", "a", 0), ("a", "s", 70), ("s", "c", 0)]
    assert parted(CHAIN, account) == {"b": "a"}
    # The same one was tried once more, and did well.
    assert parted(CHAIN, [seen("a", 0), seen("b", 1), seen("c", 2), seen("b", 1, failed=True)]) == {}
    # The one before it was replaced, too: nobody knows whose link broke.
    assert parted(CHAIN, [seen("a", 0, failed=True), seen("b", 1, failed=True)]) == {"a": "c"}
    # Nonsense.
    assert parted(CHAIN, [seen("x", 7, failed=True)]) == {}
