"""Places in the key space: 256-bit integers, SHA-256 of what they name.

Each kind of name has its own prefix under the hash, so that a record can not be placed where a peer lies.
Peers hash without a prefix, so that any program that knows a peer id finds the peer.
"""

from __future__ import annotations

import hashlib
from typing import Final

from protocol.ids import CargoDigest, PeerId

KEY_BITS: Final = 256
KEY_BYTES: Final = 32

_RECORD: Final = b"archipelag-dht-record\x00"
_CARGO: Final = b"archipelag-dht-cargo\x00"
_ROLE: Final = b"archipelag-dht-role\x00"
_CAPABILITY: Final = b"archipelag-dht-capability\x00"
_REGION: Final = b"archipelag-dht-region\x00"
_FILE: Final = b"archipelag-dht-file\x00"


def _hash(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest(), "big")


def key_of_peer(peer: PeerId) -> int:
    """Where a peer stands: SHA-256 of its id's base58 text."""
    return _hash(peer.encode("ascii"))


def key_of_record(namespace: str, name: str) -> int:
    return _hash(_RECORD, namespace.encode(), b"\x00", name.encode())


def key_of_cargo(digest: CargoDigest) -> int:
    """Where the providers of a Cargo are told."""
    return _hash(_CARGO, digest.encode())


def key_of_role(role: str, region: str = "") -> int:
    """Where peers with a role ("coordinator") are told; with `region` ("eu"), those of that region only."""
    return _hash(_ROLE, role.encode(), b"\x00", region.encode())


def key_of_capability(capability: str, region: str = "") -> int:
    """Where peers that can do something ("runtime:llama", "container") are told, in all or in one region."""
    return _hash(_CAPABILITY, capability.encode(), b"\x00", region.encode())


def key_of_region(region: str) -> int:
    return _hash(_REGION, region.encode())


def key_of_file(sha256: str) -> int:
    """Where those are told who hold pieces of the file with this SHA-256 (64 lower-case hex digits)."""
    return _hash(_FILE, sha256.encode())
