"""What was seen between two Islands of a chain: links that broke while both lived, and how long the way takes.

A link may be cut though its ends are well: a firewall, a provider's fault, two NATs that let nothing through.
Then nobody has failed, but the next chain should not put these two side by side either. So the pair is taken to
be very far apart for a while, longer each time: others come first, and if there is nobody else, it is tried.

Network coordinates guess distances between places. Where two can only meet at a relay the way is longer than
any guess, so what a chain measured on its links counts before it.

Both ways of a pair are one: who can not dial may be dialled, but a ring that is turned round has the same
pairs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic

from protocol.instants import SECOND_NS, Instant, after
from protocol.ring import Chain
from routing.chains.costs import P
from routing.job_events import StageSeen

#: Twice the time by which a suspect Island counts as slower (`routes.SUSPICION_NS`), as a hop is half of it:
#: beyond any real way, so that every other chain comes first.
BROKEN_RTT_NS: Final = 20 * SECOND_NS

#: A broken pair is avoided for this long, doubling. Restarted routers are back in a minute; what is cut for
#: hours is tried twice an hour.
BROKEN_FIRST_NS: Final = 60 * SECOND_NS
BROKEN_MAX_NS: Final = 1800 * SECOND_NS

#: A measured round trip counts for this long: connections move from relays to direct ways, laptops elsewhere.
MEASURED_NS: Final = 600 * SECOND_NS

#: Weight of the newest measurement: what heads tell is a claim.
MEASURED_WEIGHT: Final = 0.25

#: Pairs that are remembered, those not heard of for longest forgotten first: ninety Islands, each beside each.
MAX_PAIRS: Final = 4096


_NEVER: Final = Instant(0)


@dataclass(slots=True)
class _Pair:
    times: int = 0
    avoid_until: Instant = _NEVER
    rtt_ns: float = 0.0
    measured: Instant = _NEVER


def neighbours(chain: Chain, seen: Sequence[StageSeen]) -> list[tuple[str, str, int]]:
    """Who fed whom at the end, by a head's account of its chain, round the ring, and how far they are (there
    and back, ns; 0: not measured).
    """
    stood = _stood(chain, seen)
    rtts = {stage.index: stage.rtt_ns for stage in seen if not stage.failed}
    return [(stood[index - 1], peer, rtts.get(index, 0)) for index, peer in enumerate(stood)]


def parted(chain: Chain, seen: Sequence[StageSeen]) -> dict[str, str]:
    """Of each stage that its head accuses: who found it at fault, if that is certain. One that stands there all
    the same was tried once more, and did well.
    """
    stood = _stood(chain, seen)
    changed = {stage.index for stage in seen if stage.failed}
    well = {stage.peer for stage in seen if not stage.failed}
    found: dict[str, str] = {}
    for stage in seen:
        if not stage.failed or stage.index >= len(stood) or stage.peer in well:
            continue
        before = (stage.index - 1) % len(stood)
        if before not in changed and stood[before] != stage.peer:
            found[stage.peer] = stood[before]
    return found


def _stood(chain: Chain, seen: Sequence[StageSeen]) -> list[str]:
    stood = {stage.index: stage.peer for stage in seen if not stage.failed}
    return [stood.get(index, stage.holder.peer) for index, stage in enumerate(chain.stages)]


class Pairs(Generic[P]):
    """By two peers, in whatever order. `now` is the caller's clock."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[frozenset[P], _Pair] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pairs)

    def broke(self, now: Instant, a: P, b: P) -> None:
        """The link of these two broke, or could not be made, while both lived."""
        pair = self._of(a, b)
        if pair is None or pair.avoid_until > now:
            return  # one fault is heard of from many sessions
        pair.avoid_until = after(now, min(BROKEN_FIRST_NS << min(pair.times, 10), BROKEN_MAX_NS))
        pair.times += 1

    def worked(self, now: Instant, a: P, b: P, rtt_ns: int = 0) -> None:
        """They worked side by side. `rtt_ns`: what their link took, there and back; 0: not measured."""
        pair = self._of(a, b)
        if pair is None:
            return
        pair.times, pair.avoid_until = 0, _NEVER
        if rtt_ns > 0:
            known = pair.rtt_ns if pair.rtt_ns and now - pair.measured < MEASURED_NS else rtt_ns
            pair.rtt_ns = known + MEASURED_WEIGHT * (rtt_ns - known)
            pair.measured = now

    def is_broken(self, now: Instant, a: P, b: P) -> bool:
        """Are they to be kept apart?"""
        pair = self._pairs.get(frozenset((a, b)))
        return pair is not None and pair.avoid_until > now

    def rtt_ns(self, now: Instant, a: P, b: P, estimate_ns: int | None) -> int | None:
        """For the planner: there and back between them, where `estimate_ns` is all else that is known."""
        pair = self._pairs.get(frozenset((a, b)))
        if pair is None:
            return estimate_ns
        if pair.avoid_until > now:
            return BROKEN_RTT_NS
        return round(pair.rtt_ns) if pair.rtt_ns and now - pair.measured < MEASURED_NS else estimate_ns

    def _of(self, a: P, b: P) -> _Pair | None:
        if a == b:
            return None
        key = frozenset((a, b))
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = _Pair()
            if len(self._pairs) > MAX_PAIRS:
                self._pairs.popitem(last=False)
        self._pairs.move_to_end(key)
        return pair
