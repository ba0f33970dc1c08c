"""What a DHT machine is told by its user and what it tells. A `ticket` is the user's number for an order."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from protocol.envelope import Envelope

Key = int
"""A place in the key space, 0 <= key < 2**256."""

# --- commands -------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, gc=False):
    """Enter (or re-enter) the network by way of these peers. `Joined` follows once, also if nobody answers."""

    seeds: tuple[int, ...]


class FindClosest(msgspec.Struct, frozen=True, gc=False):
    """The k live peers closest to `target`. Ends with `Found`."""

    ticket: int
    target: Key


class GetRecords(msgspec.Struct, frozen=True, gc=False):
    """Records at `key`. Ends with `Found`: once `quorum` answers held some, or the `value_beta` (dht/policy.py)
    closest peers answered.
    """

    ticket: int
    key: Key
    quorum: int = 1


class PutRecord(msgspec.Struct, frozen=True, gc=False):
    """Store a signed record (an envelope of kind dht.records.RECORD_KIND) at its key's k closest peers and
    keep it there (republish) until it expires or `Withdraw`. Ends with `Stored` when first done.
    """

    ticket: int
    envelope: Envelope


class Provide(msgspec.Struct, frozen=True, gc=False):
    """Tell the network that we provide `key`, and keep telling until `Withdraw`. `Stored` when first done."""

    ticket: int
    key: Key


class FindProviders(msgspec.Struct, frozen=True, gc=False):
    """Peers that provide `key`, at least `wanted` if there are so many. Ends with `Found`."""

    ticket: int
    key: Key
    wanted: int = 20


class Withdraw(msgspec.Struct, frozen=True, gc=False):
    """No longer keep the record or the provider record at `key`. What others hold of it expires."""

    key: Key


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits for this ticket any more; no event of it follows."""

    ticket: int


class SetReachable(msgspec.Struct, frozen=True, gc=False):
    """Whether others can dial us (directly or by a relay). Who can not be dialled is a client: it asks, but
    stands in no table and stores nothing.
    """

    reachable: bool


class RoundTripSeen(msgspec.Struct, frozen=True, gc=False):
    """A round trip measured outside the DHT's own messages (heartbeats on a kept stream), nanoseconds."""

    peer: int
    rtt_ns: int


DhtCommand: TypeAlias = (
    Join
    | FindClosest
    | GetRecords
    | PutRecord
    | Provide
    | FindProviders
    | Withdraw
    | Cancel
    | SetReachable
    | RoundTripSeen
)

# --- events ---------------------------------------------------------------------------------------


class Joined(msgspec.Struct, frozen=True, gc=False):
    """`contacts`: entries in the routing table now; 0 says that no seed answered."""

    contacts: int


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a lookup took. `hops`: the longest chain of referrals that led to a result. `queries` sent, of which
    `failures` were not answered in time.
    """

    took_ns: int
    hops: int
    queries: int
    failures: int


class Found(msgspec.Struct, frozen=True):
    """The end of a lookup. `closest`: live peers, nearest first, at most k. `records`: opened and checked, the
    newest of each issuer. `providers`: in the order in which they were learnt.
    """

    ticket: int
    closest: tuple[int, ...]
    records: tuple[Envelope, ...]
    providers: tuple[int, ...]
    cost: Cost


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A record or provider record lies at `copies` peers; 0 says that nobody took it."""

    ticket: int
    copies: int
    cost: Cost


DhtEvent: TypeAlias = Joined | Found | Stored
