"""Signed statements: who says it, which number it has, until when it holds.

Every advert, receipt and record travels in an `Envelope`: Ed25519 (RFC 8032, by libsodium) over a
domain-separated, canonical byte string, so that a signature for one kind can not be shown as another.
Expired and replayed envelopes are refused. Signatures are made over the *encoded* body, which is kept
as received, so verification never depends on re-encoding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeVar

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocol.codec import Codec, Message, encode
from protocol.errors import Fault, ProtocolError
from protocol.ids import PUBLIC_KEY_BYTES, PeerId, peer_id_of
from protocol.instants import SECOND_NS, UnixNs
from protocol.limits import MAX_ENVELOPE_OVERHEAD_BYTES, MAX_RPC_BYTES

T = TypeVar("T", bound=Message)

SIGNATURE_BYTES: Final = 64
SEED_BYTES: Final = 32
_DOMAIN: Final = b"archipelag-envelope-1\x00"

#: Clocks of volunteers' machines differ; an envelope is accepted this long past its expiry.
CLOCK_TOLERANCE_NS: Final = 30 * SECOND_NS


class Envelope(Message, frozen=True, gc=False, tag="env"):
    """A body and the proof of who said it. `expires_unix_ns` is civil time."""

    max_bytes: ClassVar[int] = MAX_RPC_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES

    issuer: bytes
    kind: str
    sequence: int
    expires_unix_ns: int
    body: bytes
    signature: bytes

    @property
    def peer(self) -> PeerId:
        """The issuer's peer id. Raises ValueError if the key has the wrong length (check first)."""
        return peer_id_of(self.issuer)

    def is_below(self, limit_bytes: int) -> bool:
        """Whether it takes less than this in a message, for those that pass others' envelopes on."""
        return len(msgspec.msgpack.encode(self)) < limit_bytes


@dataclass(frozen=True, slots=True)
class Opened(Generic[T]):
    """What a verified envelope says."""

    issuer: PeerId
    sequence: int
    expires_unix_ns: UnixNs
    body: T


class Signer:
    """Holds an Ed25519 key (32-byte seed) and signs envelopes with it. `repr` never shows the key."""

    __slots__ = ("_key", "peer", "public_key")

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.public_key: Final = bytes(self._key.verify_key)
        self.peer: Final = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Signer({self.peer})"

    def seal(self, kind: str, body: Message, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        data = encode(body)
        to_sign = _signed_bytes(self.public_key, kind, sequence, expires_unix_ns, data)
        signature = self._key.sign(to_sign).signature
        return Envelope(self.public_key, kind, sequence, expires_unix_ns, data, signature)


def open_untrusted(envelope: Envelope, kind: str, codec: Codec[T], now: UnixNs) -> Opened[T]:
    """Verify and decode an envelope from anywhere.

    Raises ProtocolError: UNEXPECTED (another kind), MALFORMED, EXPIRED, SIGNATURE, OVERSIZE.
    """
    if envelope.kind != kind:
        raise ProtocolError(Fault.UNEXPECTED, f"an envelope of kind {kind!r} was expected")
    if len(envelope.issuer) != PUBLIC_KEY_BYTES or len(envelope.signature) != SIGNATURE_BYTES:
        raise ProtocolError(Fault.MALFORMED, "key or signature has the wrong length")
    if not 0 <= envelope.sequence < 1 << 63 or not 0 <= envelope.expires_unix_ns < 1 << 63:
        raise ProtocolError(Fault.MALFORMED, "sequence number or expiry out of range")
    if now > envelope.expires_unix_ns + CLOCK_TOLERANCE_NS:
        raise ProtocolError(Fault.EXPIRED, "the envelope has expired")
    to_verify = _signed_bytes(
        envelope.issuer, envelope.kind, envelope.sequence, envelope.expires_unix_ns, envelope.body
    )
    try:
        VerifyKey(envelope.issuer).verify(to_verify, envelope.signature)
    except (BadSignatureError, ValueError) as error:
        raise ProtocolError(Fault.SIGNATURE, "the signature does not match") from error
    body = codec.decode_untrusted(envelope.body)
    return Opened(envelope.peer, envelope.sequence, UnixNs(envelope.expires_unix_ns), body)


def _signed_bytes(issuer: bytes, kind: str, sequence: int, expires_unix_ns: int, body: bytes) -> bytes:
    name = kind.encode()
    return b"".join(
        (
            _DOMAIN,
            struct.pack("!H", len(name)) + name,
            issuer,
            struct.pack("!QQI", sequence, expires_unix_ns, len(body)),
            body,
        )
    )
