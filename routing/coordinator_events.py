"""What a coordinator is told by its owner and what it tells: its policy, commands and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import msgspec

from protocol.adverts import IslandAdvert
from protocol.coordination import CoordinatorSummary
from protocol.envelope import Envelope
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.limits import MAX_ISLANDS_PER_COORDINATOR
from routing.karma import Statement

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class CoordinatorPolicy:
    """Bounds and times; durations in nanoseconds."""

    islands: int = MAX_ISLANDS_PER_COORDINATOR
    islands_per_group: int = 1000
    """Of one network (IPv4 /16): a tenth, so that one hoster's machines can not fill a coordinator."""
    island_ttl_ns: int = 8 * SECOND_NS
    """Silence until an Island is gone: four of its signs of life."""

    requests_per_s: int = 20
    request_burst: int = 40
    """Messages of one peer. An Island sends some five a second when its load changes all the time, a
    gateway with 64 followed Cargos ten."""
    metered_peers: int = 20_000
    """Peers whose rate is remembered, the one heard of longest ago forgotten first."""

    follows_per_peer: int = 64
    follows: int = 4096
    """Each remembers up to 256 Islands that it told of: 100 MB if all of them do."""
    follow_lease_ns: int = 30 * SECOND_NS
    push_gap_ns: int = 100 * MILLISECOND_NS
    """Between two pushes of one subscription: changes that come together travel together."""
    push_retry_ns: int = 1 * SECOND_NS
    push_tries: int = 8
    """A follower that takes nothing for this long is forgotten."""

    summary_ns: int = 10 * SECOND_NS
    """How often it tells about itself if something changed; three times as long if nothing did."""
    summary_soon_ns: int = 1 * SECOND_NS
    """A Cargo that was not here, or is ready now, is told of this soon: elsewhere somebody may wait for it."""
    summary_ttl_ns: int = 90 * SECOND_NS
    coordinators: int = 1024
    """Others that it remembers, for referrals."""
    statements_ns: int = 10 * SECOND_NS
    """How often it looks for karma statements that are due."""


class Identity(msgspec.Struct, frozen=True, gc=False):
    """What a coordinator says of itself in its summaries."""

    name: str = ""
    addresses: tuple[str, ...] = ()
    region: str = ""
    country: str = ""
    coordinate: int = 0


# --- commands -------------------------------------------------------------------------------------


class Serve(msgspec.Struct, frozen=True, gc=False):
    """Begin, or go on with another identity (new addresses, a moved coordinate)."""

    identity: Identity


class LearnCoordinator(msgspec.Struct, frozen=True, gc=False):
    """Another coordinator's summary came by gossip."""

    envelope: Envelope


class RoundTripSeen(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A heartbeat's round trip to a peer, nanoseconds."""

    peer: P
    rtt_ns: int


class WorkSeen(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """What happened with a job at an Island, for its karma. Units as in `routing.karma`."""

    peer: P
    work_units: int = 0
    failures: int = 0
    timeouts: int = 0
    lies: int = 0
    audits_passed: int = 0
    audits_failed: int = 0


CoordinatorCommand: TypeAlias = Serve | LearnCoordinator | RoundTripSeen[P] | WorkSeen[P]

# --- events ---------------------------------------------------------------------------------------


class IslandChanged(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """An Island advertises here, anew or differently. `new`: it was not in the book."""

    peer: P
    advert: IslandAdvert
    sequence: int
    new: bool


class IslandGone(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """`reason`: lost, silent, withdrawn."""

    peer: P
    reason: str


class SummaryMade(msgspec.Struct, frozen=True):
    """Spread this among coordinators; it holds for `ttl_ns`."""

    envelope: Envelope
    summary: CoordinatorSummary
    ttl_ns: int


class StatementsDue(msgspec.Struct, Generic[P], frozen=True):
    """Karma statements to sign and spread."""

    statements: tuple[Statement[P], ...]


class PeerMisbehaved(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """It sent what no honest peer sends. `fault`: a protocol.errors.Fault's value, or 'flood'."""

    peer: P
    fault: str


CoordinatorEvent: TypeAlias = (
    IslandChanged[P] | IslandGone[P] | SummaryMade | StatementsDue[P] | PeerMisbehaved[P]
)
