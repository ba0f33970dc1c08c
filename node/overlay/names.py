"""Places in the key space as people write them."""

from __future__ import annotations

import re
from typing import Final

from dht.keys import KEY_BYTES, key_of_capability, key_of_cargo, key_of_peer, key_of_region, key_of_role
from protocol.errors import ProtocolError
from protocol.ids import cargo_digest_untrusted, peer_id_untrusted
from protocol.limits import MAX_NAME_CHARS

FORMS: Final = (
    "a peer id, sha256:DIGEST of a Cargo, role:NAME[@REGION], capability:NAME[@REGION], "
    "region:NAME, or 64 hexadecimal digits"
)
_HEX_KEY: Final = re.compile(rf"[0-9a-fA-F]{{{2 * KEY_BYTES}}}\Z")


def key_of_name(text: str) -> int:
    """The key that this names. Raises ValueError, which says what is understood."""
    if len(text) > 2 * MAX_NAME_CHARS:
        raise ValueError(f"a name of {len(text)} characters is too long; known forms: {FORMS}")
    if _HEX_KEY.match(text):
        return int(text, 16)
    kind, colon, rest = text.partition(":")
    name, _, region = rest.partition("@")
    try:
        if kind == "sha256":
            return key_of_cargo(cargo_digest_untrusted(text))
        if not colon:
            return key_of_peer(peer_id_untrusted(text))
    except ProtocolError as error:
        raise ValueError(f"{text!r}: {error.detail}; known forms: {FORMS}") from error
    if kind == "role" and name:
        return key_of_role(name, region)
    if kind == "capability" and name:
        return key_of_capability(name, region)
    if kind == "region" and rest:
        return key_of_region(rest)
    raise ValueError(f"{text!r} names no key; known forms: {FORMS}")
