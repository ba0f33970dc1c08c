"""Who opens and seals the signed things of coordination.

The machines hold envelopes and pass them on as they came; what is in them they learn from a `Notary`. The
node's checks Ed25519 signatures (`EnvelopeNotary`), the simulator's reads without (`PlainNotary`): same
bytes on the wire, same refusals, a hundredth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from protocol.adverts import ADVERT, ADVERT_KIND, IslandAdvert
from protocol.codec import Codec, Message, encode
from protocol.coordination import SUMMARY, SUMMARY_KIND, CoordinatorSummary
from protocol.envelope import CLOCK_TOLERANCE_NS, SIGNATURE_BYTES, Envelope, Signer, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import PUBLIC_KEY_BYTES, PeerId, cargo_digest_untrusted, peer_id_of
from protocol.instants import UnixNs

P = TypeVar("P")
T = TypeVar("T", bound=Message)


@dataclass(frozen=True, slots=True)
class Stated(Generic[P, T]):
    """What a verified envelope says."""

    peer: P
    sequence: int
    expires_unix_ns: UnixNs
    body: T


class Notary(Protocol[P]):
    """All that ends in `_untrusted` raises ProtocolError and nothing else."""

    def open_advert_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[P, IslandAdvert]: ...

    def open_summary_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[P, CoordinatorSummary]: ...

    def peer_of_untrusted(self, public_key: bytes) -> P: ...

    def seal_advert(self, advert: IslandAdvert, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope: ...

    def seal_summary(
        self, summary: CoordinatorSummary, *, sequence: int, expires_unix_ns: UnixNs
    ) -> Envelope: ...


def check_advert_untrusted(advert: IslandAdvert) -> None:
    """Raises ProtocolError (MALFORMED) if a digest is none or a Cargo stands twice."""
    digests = {cargo_digest_untrusted(offered.digest) for offered in advert.cargos}
    if len(digests) < len(advert.cargos):
        raise ProtocolError(Fault.MALFORMED, "a Cargo stands twice in one advert")


class EnvelopeNotary:
    """The real one."""

    def __init__(self, signer: Signer) -> None:
        self._signer: Final = signer

    def open_advert_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[PeerId, IslandAdvert]:
        opened = open_untrusted(envelope, ADVERT_KIND, ADVERT, now)
        check_advert_untrusted(opened.body)
        return Stated(opened.issuer, opened.sequence, opened.expires_unix_ns, opened.body)

    def open_summary_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[PeerId, CoordinatorSummary]:
        opened = open_untrusted(envelope, SUMMARY_KIND, SUMMARY, now)
        return Stated(opened.issuer, opened.sequence, opened.expires_unix_ns, opened.body)

    def peer_of_untrusted(self, public_key: bytes) -> PeerId:
        if len(public_key) != PUBLIC_KEY_BYTES:
            raise ProtocolError(Fault.MALFORMED, "a public key has the wrong length")
        return peer_id_of(public_key)

    def seal_advert(self, advert: IslandAdvert, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        return self._signer.seal(ADVERT_KIND, advert, sequence=sequence, expires_unix_ns=expires_unix_ns)

    def seal_summary(self, summary: CoordinatorSummary, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        return self._signer.seal(SUMMARY_KIND, summary, sequence=sequence, expires_unix_ns=expires_unix_ns)


class PlainNotary:
    """For simulated worlds, where peers are small integers and nobody forges what is not modelled: the
    "key" is the number, the signature is zeros. Sizes and refusals are those of the real one.
    """

    def __init__(self, me: int) -> None:
        self._me: Final = me

    def open_advert_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[int, IslandAdvert]:
        stated = self._open_untrusted(envelope, ADVERT_KIND, ADVERT, now)
        check_advert_untrusted(stated.body)
        return stated

    def open_summary_untrusted(self, envelope: Envelope, now: UnixNs) -> Stated[int, CoordinatorSummary]:
        return self._open_untrusted(envelope, SUMMARY_KIND, SUMMARY, now)

    def peer_of_untrusted(self, public_key: bytes) -> int:
        if len(public_key) != PUBLIC_KEY_BYTES:
            raise ProtocolError(Fault.MALFORMED, "a public key has the wrong length")
        return int.from_bytes(public_key, "big")

    def seal_advert(self, advert: IslandAdvert, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        return self._seal(ADVERT_KIND, advert, sequence, expires_unix_ns)

    def seal_summary(self, summary: CoordinatorSummary, *, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        return self._seal(SUMMARY_KIND, summary, sequence, expires_unix_ns)

    def _seal(self, kind: str, body: Message, sequence: int, expires_unix_ns: UnixNs) -> Envelope:
        key = self._me.to_bytes(PUBLIC_KEY_BYTES, "big")
        return Envelope(key, kind, sequence, expires_unix_ns, encode(body), bytes(SIGNATURE_BYTES))

    def _open_untrusted(self, envelope: Envelope, kind: str, codec: Codec[T], now: UnixNs) -> Stated[int, T]:
        if envelope.kind != kind:
            raise ProtocolError(Fault.UNEXPECTED, f"an envelope of kind {kind!r} was expected")
        if envelope.signature != bytes(SIGNATURE_BYTES) or not 0 <= envelope.sequence < 1 << 63:
            raise ProtocolError(Fault.MALFORMED, "not an envelope of the simulator")
        if now > envelope.expires_unix_ns + CLOCK_TOLERANCE_NS:
            raise ProtocolError(Fault.EXPIRED, "the envelope has expired")
        peer = self.peer_of_untrusted(envelope.issuer)
        body = codec.decode_untrusted(envelope.body)
        return Stated(peer, envelope.sequence, UnixNs(envelope.expires_unix_ns), body)
