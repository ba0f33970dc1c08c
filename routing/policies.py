"""Other ways to choose an Island, of the same type as `placement.soonest`: what the simulator and the
benchmarks compare it with. They filter alike; only the order differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from protocol.dice import Dice
from protocol.instants import Instant
from routing.islands import IslandBook
from routing.placement import UNKNOWN_RTT_NS, Candidate, Policy, Query, candidates
from routing.requirements import Outlook

P = TypeVar("P")


def at_random(dice: Dice) -> Policy[P]:
    """Any order."""

    def policy(now: Instant, book: IslandBook[P], query: Query[P]) -> list[Candidate[P]]:
        found = candidates(now, book.offers(query.job.cargo), query)
        return dice.sample(found, len(found))

    return policy


def _sorted_by(key: Callable[[Candidate[P], IslandBook[P], Outlook[P]], int]) -> Policy[P]:
    def policy(now: Instant, book: IslandBook[P], query: Query[P]) -> list[Candidate[P]]:
        found = candidates(now, book.offers(query.job.cargo), query)
        found.sort(key=lambda candidate: key(candidate, book, query.outlook))
        return found

    return policy


def _rtt_ns(candidate: Candidate[P], book: IslandBook[P], outlook: Outlook[P]) -> int:
    rtt_ns = outlook.rtt_of(candidate.peer)
    island = book.get(candidate.peer)
    if rtt_ns is None and island is not None and island.advert.coordinate:
        rtt_ns = outlook.estimate_of(island.advert.coordinate)
    return UNKNOWN_RTT_NS if rtt_ns is None else rtt_ns


def by_rtt() -> Policy[P]:
    """The nearest first, however busy or slow."""
    return _sorted_by(_rtt_ns)


def by_price() -> Policy[P]:
    """The cheapest first."""
    return _sorted_by(lambda candidate, _book, _outlook: candidate.price_ucr)
