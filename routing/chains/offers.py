"""From adverts to the planner's terms: who holds which layers of a Cargo, and who has room for some.

The job's requirements are a filter, and each stage must pass it on its own: jurisdiction, karma, schedule,
price (a stage is paid its share of its own ask for the whole, so if all asks are within the limit, the chain
is, too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protocol.adverts import OfferedCargo
from protocol.instants import Instant
from protocol.limits import MIB
from routing.chains.costs import Holder, P, Room, Speed
from routing.islands import Island
from routing.placement import Query, admitted


def _unmeasured(_peer: object) -> int:
    return 0


def _nothing(_peer: object) -> int:
    return 0


def holders_of(
    now: Instant,
    offers: Iterable[tuple[Island[P], OfferedCargo]],
    query: Query[P],
    measured_layer_ns: Callable[[P], int] = _unmeasured,
) -> list[Holder[P]]:
    """Islands with ready layers that may take a part of the job, as `routing.chains.plan.route` wants them.

    `offers`: `IslandBook.offers(cargo)`. `measured_layer_ns`: by those who fed the Island; 0: not yet.
    """
    found: list[Holder[P]] = []
    for island, offered in offers:
        shard = offered.shard
        if shard is None or shard.first >= shard.last or offered.state != "ready":
            continue
        peer, experience = island.peer, island.experience
        if peer in query.excluded or not admitted(now, island, offered, query):
            continue
        found.append(
            Holder(
                peer,
                shard.first,
                shard.last,
                Speed.of(shard, measured_layer_ns(peer)),
                max(1, offered.slots),
                max(offered.active + offered.queued, experience.reserved),
                query.outlook.karma_of(peer),
                experience.suspect_until > now,
                now - island.advised,
                island.advert.addresses,
            )
        )
    return found


def rooms_of(
    now: Instant,
    offers: Iterable[tuple[Island[P], OfferedCargo]],
    query: Query[P],
    measured_layer_ns: Callable[[P], int] = _unmeasured,
    beside: Callable[[P], int] = _nothing,
) -> list[Room[P]]:
    """Islands that offer room for layers and hold none yet, as `routing.chains.plan.allocate` wants them.

    `beside`: bytes that an Island has beside the room that it offers, or (negative) less.
    """
    found: list[Room[P]] = []
    for island, offered in offers:
        shard = offered.shard
        if shard is None or shard.first < shard.last:
            continue
        peer = island.peer
        room_bytes = shard.room_mib * MIB + beside(peer)
        if room_bytes <= 0:
            continue
        if peer in query.excluded or not admitted(now, island, offered, query):
            continue
        speed, karma = Speed.of(shard, measured_layer_ns(peer)), query.outlook.karma_of(peer)
        suspect = island.experience.suspect_until > now
        found.append(Room(peer, room_bytes, speed, karma, suspect))
    return found


def held_ranges(
    offers: Iterable[tuple[Island[P], OfferedCargo]], excluded: Iterable[P] = ()
) -> list[Holder[P]]:
    """All who hold layers or are loading them, whatever a job may require: an allocation counts with them."""
    out = set(excluded)
    return [
        Holder(island.peer, shard.first, shard.last, Speed.of(shard), max(1, offered.slots), offered.active)
        for island, offered in offers
        if (shard := offered.shard) is not None
        and shard.first < shard.last
        and offered.state != "failed"
        and not island.advert.draining
        and island.peer not in out
    ]
