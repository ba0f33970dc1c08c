"""What DHT nodes say to each other, as the machine sees it: peers are small integers (dht/directory.py).

Each message carries `call`, the asker's number for the exchange; the sender's network coordinate (packed,
dht/coordinates.py) and its error in parts of 1000; and whether the sender is a client, which stands in no
table. A contact is a peer number with the coordinate that the sender last heard of it. dht/wire.py turns
messages into bytes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import msgspec

from protocol.envelope import Envelope


class Said(msgspec.Struct, frozen=True, gc=False):
    """What every message has."""

    call: int
    coordinate: int
    error: int
    client: bool


class Ping(Said, frozen=True, gc=False):
    """Are you there? Also measures the round trip."""


class FindNode(Said, frozen=True, gc=False):
    target: int


class FindRecords(Said, frozen=True, gc=False):
    key: int


class FindProvidersOf(Said, frozen=True, gc=False):
    key: int


class Store(Said, frozen=True, gc=False):
    """Keep this record."""

    record: Envelope


class AddProvider(Said, frozen=True, gc=False):
    """I, the sender, provide `key`."""

    key: int


class GetPage(Said, frozen=True, gc=False):
    """Full-table mode: whom do you know from `start` on, in key order, up to `end` (exclusive)?"""

    start: int
    end: int


class CompareTables(Said, frozen=True, gc=False):
    """Full-table mode: digests of `len(digests)` equal segments of the key space, as I know it."""

    digests: tuple[int, ...]


class Pong(Said, frozen=True, gc=False):
    """`contacts`: a few that should be near the asker, for its RTT-aware table."""

    contacts: tuple[int, ...] = ()
    coordinates: tuple[int, ...] = ()


class Nodes(Said, frozen=True, gc=False):
    """The closest that the sender knows; `contacts` and `coordinates` are equally long."""

    contacts: tuple[int, ...]
    coordinates: tuple[int, ...]


class Records(Said, frozen=True, gc=False):
    contacts: tuple[int, ...]
    coordinates: tuple[int, ...]
    records: tuple[Envelope, ...]


class Providers(Said, frozen=True, gc=False):
    contacts: tuple[int, ...]
    coordinates: tuple[int, ...]
    providers: tuple[int, ...]
    provider_coordinates: tuple[int, ...]


class Outcome(IntEnum):
    """What became of a Store or AddProvider."""

    TAKEN = 0
    #: We are not among the closest to the key.
    NOT_CLOSE = 1
    #: A bound of dht/limits.py is reached.
    FULL = 2
    #: A record with a higher sequence number lies here.
    OLDER = 3
    #: Signature, key, owner or expiry are wrong.
    INVALID = 4


class Kept(Said, frozen=True, gc=False):
    """The answer to Store and AddProvider."""

    outcome: int


class Page(Said, frozen=True, gc=False):
    """Contacts in key order; `more`: the page was full."""

    contacts: tuple[int, ...]
    coordinates: tuple[int, ...]
    more: bool


class Differences(Said, frozen=True, gc=False):
    """Numbers of the segments whose digests differ."""

    segments: tuple[int, ...]


DhtQuery: TypeAlias = (
    Ping | FindNode | FindRecords | FindProvidersOf | Store | AddProvider | GetPage | CompareTables
)
DhtAnswer: TypeAlias = Pong | Nodes | Records | Providers | Kept | Page | Differences
DhtMessage: TypeAlias = DhtQuery | DhtAnswer
