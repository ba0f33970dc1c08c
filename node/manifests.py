"""Islands show the manifests of their Cargos to whoever asks; the digest says whether the answer is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Final

import trio
from msgspec import Meta

from cargos.errors import ManifestError
from cargos.manifest import Manifest, canonical_json
from cargos.manifest_text import MAX_MANIFEST_BYTES, parse_manifest_untrusted
from node.peers import Peers
from node.rpc import CallFailed, PeerUnreachable, Refused
from protocol.codec import Codec, Message
from protocol.ids import CargoDigest, PeerId
from protocol.instants import SECOND_NS

METHOD_MANIFEST: Final = "manifest"

_DEADLINE_NS: Final = 10 * SECOND_NS


class ManifestWanted(Message, frozen=True, gc=False, tag="mw"):
    """The manifest of the Cargo with this digest."""

    digest: Annotated[str, Meta(min_length=71, max_length=71)]


class ManifestShown(Message, frozen=True, gc=False, tag="ms"):
    """Its canonical JSON, from which the digest can be made."""

    max_bytes: ClassVar[int] = MAX_MANIFEST_BYTES + 64

    data: Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]


_WANTED: Final[Codec[ManifestWanted]] = Codec(ManifestWanted)
_SHOWN: Final[Codec[ManifestShown]] = Codec(ManifestShown)


def serve_manifests(peers: Peers, find: Callable[[str], Manifest | None]) -> None:
    """Answer with what `find(digest)` gives."""

    async def show(_: PeerId, wanted: ManifestWanted) -> ManifestShown:
        await trio.lowlevel.checkpoint()
        manifest = find(wanted.digest)
        if manifest is None:
            raise Refused("failed", "no such Cargo here")
        return ManifestShown(canonical_json(manifest).encode())

    peers.serve(METHOD_MANIFEST, _WANTED, show)


async def fetch_manifest(peers: Peers, peer: PeerId, digest: CargoDigest) -> Manifest | None:
    """A Cargo's manifest from an Island that has it; None if it does not show it, or shows another one."""
    try:
        shown = await peers.call(
            peer, METHOD_MANIFEST, ManifestWanted(digest), _SHOWN, deadline_ns=_DEADLINE_NS
        )
        manifest = parse_manifest_untrusted(shown.data, "json")
    except (CallFailed, PeerUnreachable, ManifestError):
        return None
    return manifest if manifest.digest == digest else None
