"""DHT messages as they travel: MessagePack, peers with their ids and addresses instead of numbers.

`to_wire` and `from_wire_untrusted` convert between these and dht/messages.py; the codec bounds everything.
Short field names are no secret language, they save a third of an answer's bytes; docs/overlay.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Meta

from dht import messages as m
from dht.coordinates import COORDINATE_BITS, ERROR_SCALE
from dht.keys import KEY_BYTES
from dht.limits import (
    MAX_ANSWER_BYTES,
    MAX_CONTACT_ADDRESSES,
    MAX_CONTACTS,
    MAX_DIGESTS,
    MAX_PAGE_CONTACTS,
    MAX_PONG_CONTACTS,
    MAX_PROVIDERS_IN_ANSWER,
    MAX_QUERY_BYTES,
    MAX_RECORD_BYTES_IN_ANSWER,
    MAX_RECORD_VALUE_BYTES,
    MAX_RECORDS_IN_ANSWER,
)
from protocol.codec import Codec, Message
from protocol.envelope import SIGNATURE_BYTES, Envelope
from protocol.errors import Fault, ProtocolError
from protocol.ids import PUBLIC_KEY_BYTES
from protocol.limits import MAX_ADDRESS_CHARS
from protocol.rpc import CallId

#: Method of the RPC notices that carry DHT messages (protocol/rpc.py).
METHOD_DHT: Final = "dht"

Coordinate = Annotated[int, Meta(ge=0, le=(1 << COORDINATE_BITS) - 1)]
ErrorParts = Annotated[int, Meta(ge=0, le=ERROR_SCALE)]
KeyBytes = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
#: Exclusive ends of key ranges: 2**256 is the empty string.
EndBytes = Annotated[bytes, Meta(max_length=KEY_BYTES)]
_PeerText = Annotated[str, Meta(min_length=1, max_length=64)]
_Address = Annotated[str, Meta(min_length=1, max_length=MAX_ADDRESS_CHARS)]


class Contact(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A peer as others are told of it: libp2p peer id, multiaddrs, last known coordinate (0: unknown). The peer
    id's text is not yet checked: who interns it does that (protocol.ids.peer_id_untrusted).
    """

    peer: _PeerText
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_CONTACT_ADDRESSES)] = ()
    coordinate: Coordinate = 0


class WireRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An envelope of a record, bounded."""

    issuer: Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
    kind: Annotated[str, Meta(max_length=32)]
    sequence: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    expires_unix_ns: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    body: Annotated[bytes, Meta(max_length=MAX_RECORD_VALUE_BYTES + 1024)]
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


_Contacts = Annotated[tuple[Contact, ...], Meta(max_length=MAX_CONTACTS)]
_WireRecords = Annotated[tuple[WireRecord, ...], Meta(max_length=MAX_RECORDS_IN_ANSWER)]


class WireSaid(Message, frozen=True, gc=False):
    """`c` call, `x` packed coordinate, `e` its error in parts of 1000, `u` the sender is a client."""

    max_bytes: ClassVar[int] = MAX_QUERY_BYTES

    c: CallId
    x: Coordinate
    e: ErrorParts
    u: bool


class WirePing(WireSaid, frozen=True, gc=False, tag="ping"):
    pass


class WireFindNode(WireSaid, frozen=True, gc=False, tag="find"):
    k: KeyBytes


class WireFindRecords(WireSaid, frozen=True, gc=False, tag="get"):
    k: KeyBytes


class WireFindProviders(WireSaid, frozen=True, gc=False, tag="who"):
    k: KeyBytes


class WireStore(WireSaid, frozen=True, gc=False, tag="put"):
    r: WireRecord


class WireAddProvider(WireSaid, frozen=True, gc=False, tag="provide"):
    k: KeyBytes


class WireGetPage(WireSaid, frozen=True, gc=False, tag="page"):
    k: KeyBytes
    z: EndBytes


class WireCompare(WireSaid, frozen=True, gc=False, tag="compare"):
    d: Annotated[tuple[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)], ...], Meta(max_length=MAX_DIGESTS)]


class WirePong(WireSaid, frozen=True, gc=False, tag="pong"):
    n: Annotated[tuple[Contact, ...], Meta(max_length=MAX_PONG_CONTACTS)] = ()


class WireNodes(WireSaid, frozen=True, gc=False, tag="nodes"):
    max_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    n: _Contacts


class WireRecords(WireSaid, frozen=True, gc=False, tag="records"):
    max_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    n: _Contacts
    r: _WireRecords


class WireProviders(WireSaid, frozen=True, gc=False, tag="providers"):
    max_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    n: _Contacts
    p: Annotated[tuple[Contact, ...], Meta(max_length=MAX_PROVIDERS_IN_ANSWER)]


class WireKept(WireSaid, frozen=True, gc=False, tag="kept"):
    o: Annotated[int, Meta(ge=0, le=int(max(m.Outcome)))]


class WirePage(WireSaid, frozen=True, gc=False, tag="paged"):
    max_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    n: Annotated[tuple[Contact, ...], Meta(max_length=MAX_PAGE_CONTACTS)]
    m: bool


class WireDifferences(WireSaid, frozen=True, gc=False, tag="differ"):
    s: Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_DIGESTS)], ...], Meta(max_length=MAX_DIGESTS)]


WireMessage: TypeAlias = (
    WirePing
    | WireFindNode
    | WireFindRecords
    | WireFindProviders
    | WireStore
    | WireAddProvider
    | WireGetPage
    | WireCompare
    | WirePong
    | WireNodes
    | WireRecords
    | WireProviders
    | WireKept
    | WirePage
    | WireDifferences
)
DHT_CODEC: Final[Codec[WireMessage]] = Codec(WireMessage)

#: What answers a call; all others ask.
WIRE_ANSWERS: Final = (
    WirePong,
    WireNodes,
    WireRecords,
    WireProviders,
    WireKept,
    WirePage,
    WireDifferences,
)

ContactOf: TypeAlias = Callable[[int], Contact]
Intern: TypeAlias = Callable[[Contact], int | None]

_KEY_SPACE: Final = 1 << (8 * KEY_BYTES)


def to_wire(message: m.DhtMessage, contact_of: ContactOf) -> WireMessage:
    """A message of ours for the wire. `contact_of` must know every peer in it, ourselves included; the
    coordinates in the message are sent, not those of `contact_of`.
    """
    head = (message.call, message.coordinate, message.error, message.client)
    match message:
        case m.FindNode():
            return WireFindNode(*head, _key_bytes(message.target))
        case m.Nodes():
            return WireNodes(*head, _contacts(message.contacts, message.coordinates, contact_of))
        case m.Ping():
            return WirePing(*head)
        case m.Pong():
            return WirePong(*head, _contacts(message.contacts, message.coordinates, contact_of))
        case m.FindRecords():
            return WireFindRecords(*head, _key_bytes(message.key))
        case m.Records():
            nodes = _contacts(message.contacts, message.coordinates, contact_of)
            return WireRecords(*head, nodes, tuple(_wire_record(record) for record in message.records))
        case m.FindProvidersOf():
            return WireFindProviders(*head, _key_bytes(message.key))
        case m.Providers():
            nodes = _contacts(message.contacts, message.coordinates, contact_of)
            providers = _contacts(message.providers, message.provider_coordinates, contact_of)
            return WireProviders(*head, nodes, providers)
        case m.Store():
            return WireStore(*head, _wire_record(message.record))
        case m.AddProvider():
            return WireAddProvider(*head, _key_bytes(message.key))
        case m.Kept():
            return WireKept(*head, message.outcome)
        case m.GetPage():
            end = b"" if message.end >= _KEY_SPACE else _key_bytes(message.end)
            return WireGetPage(*head, _key_bytes(message.start), end)
        case m.CompareTables():
            return WireCompare(*head, message.digests)
        case m.Page():
            nodes = _contacts(message.contacts, message.coordinates, contact_of)
            return WirePage(*head, nodes, message.more)
        case m.Differences():
            return WireDifferences(*head, message.segments)


def from_wire_untrusted(wire: WireMessage, intern_untrusted: Intern) -> m.DhtMessage:
    """A decoded message in numbers. `intern_untrusted` gives a peer's number, or None for a contact that it
    does not accept (not a peer id, no address it would dial, its address book is full): such contacts are left
    out.

    Raises ProtocolError (MALFORMED) where the codec's bounds do not suffice.
    """
    head = (wire.c, wire.x, wire.e, wire.u)
    match wire:
        case WireFindNode():
            return m.FindNode(*head, _key(wire.k))
        case WireNodes():
            return m.Nodes(*head, *_interned(wire.n, intern_untrusted))
        case WirePing():
            return m.Ping(*head)
        case WirePong():
            return m.Pong(*head, *_interned(wire.n, intern_untrusted))
        case WireFindRecords():
            return m.FindRecords(*head, _key(wire.k))
        case WireRecords():
            size = sum(len(record.body) for record in wire.r)
            if size > MAX_RECORD_BYTES_IN_ANSWER:
                raise ProtocolError(Fault.OVERSIZE, f"{size} bytes of records in one answer")
            records = tuple(_envelope(record) for record in wire.r)
            return m.Records(*head, *_interned(wire.n, intern_untrusted), records)
        case WireFindProviders():
            return m.FindProvidersOf(*head, _key(wire.k))
        case WireProviders():
            contacts, coordinates = _interned(wire.n, intern_untrusted)
            providers, places = _interned(wire.p, intern_untrusted)
            return m.Providers(*head, contacts, coordinates, providers, places)
        case WireStore():
            return m.Store(*head, _envelope(wire.r))
        case WireAddProvider():
            return m.AddProvider(*head, _key(wire.k))
        case WireKept():
            return m.Kept(*head, wire.o)
        case WireGetPage():
            end = _KEY_SPACE if not wire.z else _key(wire.z)
            if len(wire.z) not in {0, KEY_BYTES}:
                raise ProtocolError(Fault.MALFORMED, "the end of a page is no key")
            return m.GetPage(*head, _key(wire.k), end)
        case WireCompare():
            return m.CompareTables(*head, wire.d)
        case WirePage():
            return m.Page(*head, *_interned(wire.n, intern_untrusted), wire.m)
        case WireDifferences():
            return m.Differences(*head, wire.s)


def _key_bytes(key: int) -> bytes:
    return key.to_bytes(KEY_BYTES, "big")


def _key(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _contacts(peers: Sequence[int], coordinates: Sequence[int], contact_of: ContactOf) -> tuple[Contact, ...]:
    told: list[Contact] = []
    for peer, coordinate in zip(peers, coordinates, strict=True):
        contact = contact_of(peer)
        told.append(Contact(contact.peer, contact.addresses[:MAX_CONTACT_ADDRESSES], coordinate))
    return tuple(told)


def _interned(contacts: Sequence[Contact], intern: Intern) -> tuple[tuple[int, ...], tuple[int, ...]]:
    peers: list[int] = []
    coordinates: list[int] = []
    for contact in contacts:
        peer = intern(contact)
        if peer is not None:
            peers.append(peer)
            coordinates.append(contact.coordinate)
    return tuple(peers), tuple(coordinates)


def _wire_record(envelope: Envelope) -> WireRecord:
    return WireRecord(
        envelope.issuer,
        envelope.kind,
        envelope.sequence,
        envelope.expires_unix_ns,
        envelope.body,
        envelope.signature,
    )


def _envelope(record: WireRecord) -> Envelope:
    return Envelope(
        record.issuer,
        record.kind,
        record.sequence,
        record.expires_unix_ns,
        record.body,
        record.signature,
    )
