"""Peers that hold pieces, by the overlay; streams to them, on connections for bulk."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

import structlog
import trio

from dht.keys import key_of_file
from node.overlay.overlay import Overlay
from node.p2p import Host, Stream
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.pieces import PIECES_PROTOCOL

#: Holders looked for at once: more than are asked, so that those that can not be reached matter little.
PROVIDERS_WANTED: Final = 20

#: A node that just started knows nobody: entering the overlay gets this long before it counts as alone.
JOIN_S: Final = 10.0
_LOOK_S: Final = 0.1

#: Peers whose round trips differ by less are equally near; among them the choice is by chance.
NEARNESS_NS: Final = 20 * MILLISECOND_NS
_FAR_NS: Final = SECOND_NS

_log = structlog.get_logger("pieces")


class OverlayNetwork:
    """`fetch.PieceNetwork`."""

    def __init__(self, host: Host, overlay: Overlay) -> None:
        self._host = host
        self._overlay = overlay
        self._join_until = trio.current_time() + JOIN_S
        self._dice: Final = Dice(int.from_bytes(secrets.token_bytes(8), "little"))

    async def find(self, sha256: str) -> Sequence[PeerId]:
        """Nearest first."""
        await self._wait_until_joined()
        found = await self._overlay.find_providers(key_of_file(sha256), wanted=PROVIDERS_WANTED)
        peers = [peer for peer in found.providers if peer != self._host.peer]
        _log.debug("holders of a file", file=sha256, peers=len(peers))
        return sorted(self._dice.sample(peers, len(peers)), key=self._distance)

    async def open(self, peer: PeerId) -> Stream:
        """Raises Unreachable."""
        return await self._host.open_bulk_stream(
            peer, PIECES_PROTOCOL, await self._overlay.find_addresses(peer)
        )

    def _distance(self, peer: PeerId) -> int:
        rtt_ns = self._overlay.rtt_ns(peer)
        return (_FAR_NS if rtt_ns is None else rtt_ns) // NEARNESS_NS

    async def _wait_until_joined(self) -> None:
        while (  # noqa: ASYNC110 - the overlay has no event for it
            self._overlay.config.bootstrap
            and not self._overlay.membership.joined
            and trio.current_time() < self._join_until
        ):
            await trio.sleep(_LOOK_S)
