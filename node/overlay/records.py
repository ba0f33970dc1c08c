"""What a peer says of itself in the DHT, in the namespace "peer" under its own name: addresses and roles."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from dht.records import NAMESPACE_PEER, RecordBody, seal_record
from protocol.codec import Codec, Message, encode
from protocol.envelope import Envelope, Signer
from protocol.instants import SECOND_NS, UnixNs
from protocol.limits import MAX_ADDRESS_CHARS, MAX_NAME_CHARS

#: Addresses in the record: the record's value has 4 KiB at most, and eight relayed addresses 2 KiB.
MAX_RECORD_ADDRESSES: Final = 8

#: A peer record holds this long, and is made anew after half of it: the address of a machine that went is gone
#: from the network within this time.
PEER_RECORD_TTL_NS: Final = 4 * 3600 * SECOND_NS

_Address = Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)]
_ShortName = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]


class PeerRecord(Message, frozen=True, gc=False, omit_defaults=True, tag="peer"):
    """`coordinate`: packed (dht/coordinates.py); 0: unknown."""

    addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_RECORD_ADDRESSES)]
    roles: Annotated[tuple[_ShortName, ...], Meta(max_length=8)] = ()
    region: _ShortName = ""
    coordinate: Annotated[int, Meta(ge=0)] = 0


PEER_RECORD: Final[Codec[PeerRecord]] = Codec(PeerRecord)


def seal_peer_record(
    signer: Signer, record: PeerRecord, unix_now: UnixNs, *, sequence: int | None = None
) -> Envelope:
    """Numbered by the clock unless told otherwise, so that a restarted peer's record replaces its earlier
    one.
    """
    expires = UnixNs(unix_now + PEER_RECORD_TTL_NS)
    value = encode(record)
    number = unix_now if sequence is None else sequence
    return seal_record(signer, NAMESPACE_PEER, signer.peer, value, sequence=number, expires_unix_ns=expires)


def peer_record_untrusted(body: RecordBody) -> PeerRecord:
    """The record in a body that was opened. Raises ProtocolError."""
    return PEER_RECORD.decode_untrusted(body.value)
