"""What relays, reachability checks and hole punching say: small protobuf messages with a length before each.

Formats: libp2p specs, circuit-v2, autonat-v1, DCUtR, RFC 0002 (signed envelopes). The protobuf classes are
py-libp2p's; nothing else of its services is used. All decoding of remote bytes is in this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import base58
from google.protobuf.message import DecodeError, Message
from libp2p.host.autonat.pb.autonat_pb2 import Message as AutoNatMessage
from libp2p.peer.pb.envelope_pb2 import Envelope
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    UNEXPECTED_MESSAGE,
    HopMessage,
    Limit,
    Reservation,
    Status,
    StopMessage,
    Voucher,
)
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as CircuitPeer
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from nacl.signing import SigningKey

from node.p2p.errors import StreamBroken
from node.p2p.multiaddrs import decode_multiaddr_untrusted, encode_multiaddr, encode_varint
from node.p2p.stream import Stream
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId, peer_id_untrusted, public_key_of_untrusted
from protocol.limits import KIB, MAX_ADDRESSES

M = TypeVar("M", bound=Message)

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"
AUTONAT_PROTOCOL: Final = "/libp2p/autonat/1.0.0"
DCUTR_PROTOCOL: Final = "/libp2p/dcutr"

#: DCUtR's own bound. The others have none; MAX_ADDRESSES addresses, two ids and a voucher need 3 KiB.
MAX_NAT_MESSAGE_BYTES: Final = 4 * KIB

#: A length up to MAX_NAT_MESSAGE_BYTES.
_MAX_LENGTH_BYTES: Final = 2

#: Before the key in libp2p's PublicKey message: type Ed25519 (1), 32 bytes.
_KEY_PREFIX: Final = bytes((0x08, 0x01, 0x12, 0x20))

#: circuit-v2, "Reservation Vouchers"; the code is sent as two plain bytes by go-libp2p and who follows it.
_VOUCHER_DOMAIN: Final = b"libp2p-relay-rsvp"
_VOUCHER_CODE: Final = b"\x03\x02"

STATUS_OK: Final = int(OK)
STATUS_RESERVATION_REFUSED: Final = int(RESERVATION_REFUSED)
STATUS_RESOURCE_LIMIT: Final = int(RESOURCE_LIMIT_EXCEEDED)
STATUS_PERMISSION_DENIED: Final = int(PERMISSION_DENIED)
STATUS_CONNECTION_FAILED: Final = int(CONNECTION_FAILED)
STATUS_NO_RESERVATION: Final = int(NO_RESERVATION)
STATUS_MALFORMED: Final = int(MALFORMED_MESSAGE)
STATUS_UNEXPECTED: Final = int(UNEXPECTED_MESSAGE)

_WORDS: Final = {
    STATUS_RESERVATION_REFUSED: "the relay has no room for another reservation",
    STATUS_RESOURCE_LIMIT: "the relay's limits are reached",
    STATUS_PERMISSION_DENIED: "the relay does not serve us",
    STATUS_CONNECTION_FAILED: "the relay could not reach the peer",
    STATUS_NO_RESERVATION: "the peer has no reservation at this relay",
    STATUS_MALFORMED: "the relay did not understand us",
    STATUS_UNEXPECTED: "the relay did not expect this",
}

DIAL_OK: Final = int(AutoNatMessage.OK)
DIAL_ERROR: Final = int(AutoNatMessage.E_DIAL_ERROR)
DIAL_REFUSED: Final = int(AutoNatMessage.E_DIAL_REFUSED)
DIAL_BAD_REQUEST: Final = int(AutoNatMessage.E_BAD_REQUEST)


def status_words(status: int) -> str:
    """A relay's answer for people."""
    return _WORDS.get(status, f"the relay answered {status}")


# --- framing ------------------------------------------------------------------------------------


async def receive_message_untrusted(stream: Stream) -> bytes:
    """One message after its length; what follows stays in the stream. Raises ProtocolError, StreamBroken."""
    buffer = bytearray()
    while True:
        start, size = _length_untrusted(buffer)
        if start and len(buffer) >= start + size:
            stream.unreceive(bytes(buffer[start + size :]))
            return bytes(buffer[start : start + size])
        chunk = await stream.receive_some(MAX_NAT_MESSAGE_BYTES)
        if not chunk:
            if buffer:
                raise ProtocolError(Fault.MALFORMED, "the stream ended inside a message")
            raise StreamBroken("the peer closed the stream")
        buffer += chunk


async def send_message(stream: Stream, body: bytes) -> None:
    """Raises StreamBroken."""
    await stream.send_all(encode_varint(len(body)) + body)


def _length_untrusted(buffer: bytearray) -> tuple[int, int]:
    """Where the body begins and its size; (0, 0) while that is not known. Raises ProtocolError."""
    size = 0
    for at, byte in enumerate(buffer[:_MAX_LENGTH_BYTES]):
        size |= (byte & 0x7F) << 7 * at
        if not byte & 0x80:
            if size > MAX_NAT_MESSAGE_BYTES:
                raise ProtocolError(Fault.OVERSIZE, f"a message of {size} bytes")
            return at + 1, size
    if len(buffer) >= _MAX_LENGTH_BYTES:
        raise ProtocolError(Fault.OVERSIZE, "a message with too long a length")
    return 0, 0


# --- relays -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """What a relay allows one relayed connection. 0: no limit."""

    seconds: int
    bytes_each_way: int


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """Let others reach me through you."""


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """Join me to this peer."""

    peer: PeerId


HopRequest: TypeAlias = ReserveRequest | ConnectRequest


@dataclass(frozen=True, slots=True)
class HopStatus:
    """A relay's answer. Expiry and addresses (the relay's own, with its id) come with a reservation only."""

    status: int
    expires_unix_s: int = 0
    addresses: tuple[str, ...] = ()
    voucher: bytes = b""
    limit: CircuitLimit | None = None


@dataclass(frozen=True, slots=True)
class StopConnect:
    """A relay tells us: this peer wants to be joined to you (what noise has to prove)."""

    peer: PeerId
    limit: CircuitLimit | None


def encode_hop_request(request: HopRequest) -> bytes:
    if isinstance(request, ReserveRequest):
        return HopMessage(type=HopMessage.RESERVE).SerializeToString()
    peer = CircuitPeer(id=base58.b58decode(request.peer))
    return HopMessage(type=HopMessage.CONNECT, peer=peer).SerializeToString()


def decode_hop_request_untrusted(data: bytes) -> HopRequest:
    """Raises ProtocolError."""
    message = _parse_untrusted(HopMessage(), data)
    if message.HasField("type") and message.type == HopMessage.RESERVE:
        return ReserveRequest()
    if message.type == HopMessage.CONNECT and message.HasField("peer"):
        return ConnectRequest(_peer_untrusted(message.peer.id))
    raise ProtocolError(Fault.UNEXPECTED, "neither a reservation nor a connection was asked for")


def encode_hop_status(answer: HopStatus) -> bytes:
    message = HopMessage(type=HopMessage.STATUS, status=Status.ValueType(answer.status))
    if answer.expires_unix_s:
        message.reservation.CopyFrom(
            Reservation(
                expire=answer.expires_unix_s,
                addrs=[encode_multiaddr(text) for text in answer.addresses],
                voucher=answer.voucher,
            )
        )
    if answer.limit is not None:
        message.limit.CopyFrom(_limit(answer.limit))
    return message.SerializeToString()


def decode_hop_status_untrusted(data: bytes) -> HopStatus:
    """Raises ProtocolError."""
    message = _parse_untrusted(HopMessage(), data)
    if message.type != HopMessage.STATUS:
        raise ProtocolError(Fault.UNEXPECTED, "a relay's answer that is no status")
    return HopStatus(
        status=int(message.status),
        expires_unix_s=message.reservation.expire,
        addresses=_addresses_untrusted(message.reservation.addrs),
        voucher=message.reservation.voucher,
        limit=_limit_of(message.limit) if message.HasField("limit") else None,
    )


def encode_stop_connect(request: StopConnect) -> bytes:
    message = StopMessage(type=StopMessage.CONNECT, peer=CircuitPeer(id=base58.b58decode(request.peer)))
    if request.limit is not None:
        message.limit.CopyFrom(_limit(request.limit))
    return message.SerializeToString()


def decode_stop_connect_untrusted(data: bytes) -> StopConnect:
    """Raises ProtocolError."""
    message = _parse_untrusted(StopMessage(), data)
    if not message.HasField("type") or message.type != StopMessage.CONNECT or not message.HasField("peer"):
        raise ProtocolError(Fault.UNEXPECTED, "a relay that does not say who comes")
    limit = _limit_of(message.limit) if message.HasField("limit") else None
    return StopConnect(_peer_untrusted(message.peer.id), limit)


def encode_stop_status(status: int) -> bytes:
    return StopMessage(type=StopMessage.STATUS, status=Status.ValueType(status)).SerializeToString()


def decode_stop_status_untrusted(data: bytes) -> int:
    """Raises ProtocolError."""
    message = _parse_untrusted(StopMessage(), data)
    if message.type != StopMessage.STATUS:
        raise ProtocolError(Fault.UNEXPECTED, "an answer to a relay that is no status")
    return int(message.status)


def make_voucher(seed: bytes, relay: PeerId, peer: PeerId, expires_unix_s: int) -> bytes:
    """The relay's signed word that it will serve `peer` (advisory in the specification)."""
    payload = Voucher(
        relay=base58.b58decode(relay), peer=base58.b58decode(peer), expiration=expires_unix_s
    ).SerializeToString()
    parts = (_VOUCHER_DOMAIN, _VOUCHER_CODE, payload)
    signed = b"".join(encode_varint(len(part)) + part for part in parts)
    envelope = Envelope(
        payload_type=_VOUCHER_CODE,
        payload=payload,
        signature=SigningKey(seed).sign(signed).signature,
    )
    envelope.public_key.ParseFromString(_KEY_PREFIX + public_key_of_untrusted(relay))
    return envelope.SerializeToString()


# --- reachability -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DialRequest:
    """Dial me back at one of these addresses."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DialResponse:
    """How that went; `address` is the one that answered."""

    status: int
    address: str | None = None


def encode_dial_request(request: DialRequest) -> bytes:
    message = AutoNatMessage(type=AutoNatMessage.DIAL)
    message.dial.peer.id = base58.b58decode(request.peer)
    message.dial.peer.addrs.extend(map(encode_multiaddr, request.addresses))
    return message.SerializeToString()


def decode_dial_request_untrusted(data: bytes) -> DialRequest:
    """Raises ProtocolError."""
    message = _parse_untrusted(AutoNatMessage(), data)
    if message.type != AutoNatMessage.DIAL or not message.HasField("dial"):
        raise ProtocolError(Fault.UNEXPECTED, "no request to be dialled")
    peer = message.dial.peer
    return DialRequest(_peer_untrusted(peer.id), _addresses_untrusted(peer.addrs))


def encode_dial_response(response: DialResponse) -> bytes:
    message = AutoNatMessage(type=AutoNatMessage.DIAL_RESPONSE)
    message.dialResponse.status = AutoNatMessage.ResponseStatus.ValueType(response.status)
    if response.address is not None:
        message.dialResponse.addr = encode_multiaddr(response.address)
    return message.SerializeToString()


def decode_dial_response_untrusted(data: bytes) -> DialResponse:
    """Raises ProtocolError."""
    message = _parse_untrusted(AutoNatMessage(), data)
    if message.type != AutoNatMessage.DIAL_RESPONSE or not message.HasField("dialResponse"):
        raise ProtocolError(Fault.UNEXPECTED, "no answer to a request to be dialled")
    addresses = _addresses_untrusted([message.dialResponse.addr])
    return DialResponse(int(message.dialResponse.status), addresses[0] if addresses else None)


# --- hole punching ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PunchConnect:
    """Here is where I am seen."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PunchSync:
    """Dial now."""


PunchMessage: TypeAlias = PunchConnect | PunchSync


def encode_punch(message: PunchMessage) -> bytes:
    if isinstance(message, PunchSync):
        return HolePunch(type=HolePunch.SYNC).SerializeToString()
    return HolePunch(
        type=HolePunch.CONNECT, ObsAddrs=list(map(encode_multiaddr, message.addresses))
    ).SerializeToString()


def decode_punch_untrusted(data: bytes) -> PunchMessage:
    """Raises ProtocolError."""
    message = _parse_untrusted(HolePunch(), data)
    if message.type == HolePunch.SYNC:
        return PunchSync()
    if message.type == HolePunch.CONNECT:
        return PunchConnect(_addresses_untrusted(message.ObsAddrs))
    raise ProtocolError(Fault.UNEXPECTED, "neither CONNECT nor SYNC")


# --- inside -------------------------------------------------------------------------------------


def _parse_untrusted(message: M, data: bytes) -> M:
    if len(data) > MAX_NAT_MESSAGE_BYTES:
        raise ProtocolError(Fault.OVERSIZE, f"a message of {len(data)} bytes")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ProtocolError(Fault.MALFORMED, "a message that is no protobuf") from error
    if not message.IsInitialized():
        raise ProtocolError(Fault.MALFORMED, "a message without its required fields")
    return message


def _peer_untrusted(data: bytes) -> PeerId:
    if len(data) > 64:
        raise ProtocolError(Fault.MALFORMED, f"a peer id of {len(data)} bytes")
    return peer_id_untrusted(base58.b58encode(data).decode("ascii"))


def _addresses_untrusted(addresses: Sequence[bytes] | Iterable[bytes]) -> tuple[str, ...]:
    """Those that we can read, MAX_ADDRESSES at most: a peer may well listen where we can not dial."""
    found: list[str] = []
    for data in addresses:
        if len(found) >= MAX_ADDRESSES:
            break
        try:
            found.append(decode_multiaddr_untrusted(data))
        except ProtocolError:
            continue
    return tuple(found)


def _limit(limit: CircuitLimit) -> Limit:
    return Limit(duration=limit.seconds, data=limit.bytes_each_way)


def _limit_of(limit: Limit) -> CircuitLimit:
    return CircuitLimit(limit.duration, limit.data)
