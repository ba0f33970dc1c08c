"""What a gateway's follower is told and what it tells: its policy, commands and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import msgspec

from protocol.adverts import IslandAdvert
from protocol.coordination import CargoName, Wanted
from protocol.envelope import Envelope
from protocol.instants import MILLISECOND_NS, SECOND_NS
from routing.candidates import CandidatePolicy, CoordinatorCandidate

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class FollowingPolicy:
    """Durations in nanoseconds."""

    count: int = 2
    """Coordinators to follow each Cargo at..."""
    most: int = 4
    """...and so many while fewer than `enough` Islands are known and others say that they have some."""
    enough: int = 8
    limit: int = 128
    """Islands that one coordinator shall tell of."""
    cargos: int = 256
    """Cargos that may be followed at once; a coordinator admits 64 from each follower."""
    probe_ns: int = 2 * SECOND_NS
    """A coordinator is asked something at least this often..."""
    renew_ns: int = 8 * SECOND_NS
    """...and each Cargo's subscription is renewed this often: leases last 30 s."""
    retry_ns: int = 500 * MILLISECOND_NS
    dead_after_ns: int = 5 * SECOND_NS
    answer_ns: int = 3 * SECOND_NS
    """Until a new one's first answer."""
    orphan_ns: int = 15 * SECOND_NS
    """Islands that no living coordinator vouches for are kept so long: until another one does."""
    find_retry_ns: int = 1 * SECOND_NS
    find_tries: int = 6
    finds: int = 256
    """Questions under way at once."""
    coordinators: int = 256
    candidates: CandidatePolicy = field(default_factory=CandidatePolicy)


# --- commands -------------------------------------------------------------------------------------


class Want(msgspec.Struct, frozen=True, gc=False):
    """Follow this Cargo (a digest)."""

    cargo: CargoName


class Unwant(msgspec.Struct, frozen=True, gc=False):
    cargo: CargoName


class Find(msgspec.Struct, frozen=True, gc=False):
    """Ask once. `cargo`: a digest, a name or name@version. Ends with `FoundIslands`."""

    ticket: int
    cargo: CargoName
    wanted: Wanted = Wanted()
    limit: int = 16


class FoundCoordinators(msgspec.Struct, Generic[P], frozen=True):
    """Candidates, anew or again."""

    candidates: tuple[CoordinatorCandidate[P], ...]


class LearnSummary(msgspec.Struct, frozen=True, gc=False):
    """A coordinator's summary came by gossip or from the DHT."""

    envelope: Envelope


class CoordinatorUp(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A connection to this coordinator has just come up (again)."""

    peer: P


class RoundTripMeasured(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A heartbeat's round trip to a coordinator, nanoseconds."""

    peer: P
    rtt_ns: int


FollowingCommand: TypeAlias = (
    Want | Unwant | Find | FoundCoordinators[P] | LearnSummary | CoordinatorUp[P] | RoundTripMeasured[P]
)

# --- events ---------------------------------------------------------------------------------------


class Sighted(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A coordinator's smallest round trip to an Island."""

    coordinator: P
    rtt_ns: int


class FoundIsland(msgspec.Struct, Generic[P], frozen=True):
    """An Island, in its own signed words."""

    peer: P
    advert: IslandAdvert
    sequence: int
    expires_unix_ns: int
    sighted: tuple[Sighted[P], ...] = ()


class IslandSeen(msgspec.Struct, Generic[P], frozen=True):
    """A followed Cargo's Island, new or with a newer advert. `age_ns`: since its coordinator got the advert."""

    cargo: CargoName
    island: FoundIsland[P]
    age_ns: int


class IslandUnseen(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """No coordinator vouches for it any more as an Island with this Cargo."""

    cargo: CargoName
    peer: P


class IslandsVouched(msgspec.Struct, Generic[P], frozen=True):
    """A coordinator that told of these has just answered: as far as it knows they are still there."""

    peers: tuple[P, ...]


class FoundIslands(msgspec.Struct, Generic[P], frozen=True):
    """The end of a question, best first. `asked`: coordinators that answered."""

    ticket: int
    islands: tuple[FoundIsland[P], ...]
    asked: int


class Served(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A coordinator has accepted the subscription of a Cargo."""

    cargo: CargoName
    coordinator: P


class CoordinatorLost(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """It was used and does not answer any more. `reason`: lost, silent, declined: ..., lied."""

    peer: P
    reason: str


class CoordinatorKnown(msgspec.Struct, Generic[P], frozen=True):
    """Where a coordinator can be dialled, in its own signed words."""

    peer: P
    addresses: tuple[str, ...]


class NeedCoordinators(msgspec.Struct, frozen=True, gc=False):
    """Look for coordinators. Comes again, ever more slowly, until there are enough."""


FollowingEvent: TypeAlias = (
    IslandSeen[P]
    | IslandUnseen[P]
    | IslandsVouched[P]
    | FoundIslands[P]
    | Served[P]
    | CoordinatorLost[P]
    | CoordinatorKnown[P]
    | NeedCoordinators
)
