"""Names of things: peers, Cargos, jobs.

A peer's name *is* its Ed25519 public key: the libp2p peer id of such a key is the identity multihash of
the key's protobuf, in base58btc (libp2p spec, peer-ids), so a name can be turned back into the key that
must have signed what the peer says.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Final, NewType

import base58

from protocol.errors import Fault, ProtocolError

PeerId = NewType("PeerId", str)
"""Base58 libp2p peer id of an Ed25519 key, `12D3KooW…`, 52 characters."""

CargoDigest = NewType("CargoDigest", str)
"""`sha256:` and 64 lower-case hex digits: SHA-256 of a manifest's canonical bytes."""

JobId = NewType("JobId", str)
"""32 lower-case hex digits, drawn by the gateway; unguessable, unique per consumer request."""

PUBLIC_KEY_BYTES: Final = 32

#: Names that were checked lately. A check takes 60 us, and a contact names its peer in each of its addresses.
_CHECKED_NAMES: Final = 4096

# identity multihash (code 0x00, length 0x24) of protobuf { 1: Ed25519 (1), 2: key (32 bytes) }
_PEER_ID_PREFIX: Final = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
# `\Z`, not `$`: a trailing newline is not part of a name.
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")


def peer_id_of(public_key: bytes) -> PeerId:
    """The name of the peer that holds this Ed25519 public key (32 bytes)."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii"))


@lru_cache(maxsize=_CHECKED_NAMES)
def public_key_of_untrusted(peer_id: str) -> bytes:
    """The Ed25519 public key (32 bytes) inside a peer id that came from somewhere else.

    Raises ProtocolError if the text is not the canonical base58 id of an Ed25519 key.
    """
    if len(peer_id) > 64:
        raise ProtocolError(Fault.MALFORMED, "peer id is too long")
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as error:
        raise ProtocolError(Fault.MALFORMED, "peer id is not base58") from error
    key = raw[len(_PEER_ID_PREFIX) :]
    if not raw.startswith(_PEER_ID_PREFIX) or len(key) != PUBLIC_KEY_BYTES or peer_id_of(key) != peer_id:
        raise ProtocolError(Fault.MALFORMED, "peer id does not name an Ed25519 key")
    return key


def peer_id_untrusted(text: str) -> PeerId:
    """The text as a PeerId, or ProtocolError."""
    public_key_of_untrusted(text)
    return PeerId(text)


def cargo_digest_of(canonical: bytes) -> CargoDigest:
    return CargoDigest("sha256:" + hashlib.sha256(canonical).hexdigest())


def cargo_digest_untrusted(text: str) -> CargoDigest:
    """The text as a CargoDigest, or ProtocolError."""
    if not _DIGEST.match(text):
        raise ProtocolError(Fault.MALFORMED, "a Cargo digest is 'sha256:' and 64 lower-case hex digits")
    return CargoDigest(text)
