"""Where messages of coordination come in: those for a coordinator to the one here, those of coordinators to
whoever asked (the Island's side, the gateway's side). One node may play several of these parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, get_args

from node.peers import Peers
from protocol.coordination import (
    COORDINATION,
    METHOD_COORDINATION,
    CoordinationMessage,
    FromCoordinator,
)
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId

Taker = Callable[[PeerId, CoordinationMessage], None]

_FROM_COORDINATOR: Final = frozenset[type](get_args(FromCoordinator))


class CoordinationPort:
    """Serves the notices of METHOD_COORDINATION; once per peer table."""

    def __init__(self, peers: Peers) -> None:
        self._coordinator: Taker | None = None
        self._askers: list[Taker] = []
        peers.serve_notice(METHOD_COORDINATION, COORDINATION, self._take)

    def serve(self, coordinator: Taker) -> None:
        """Give it what is for a coordinator."""
        self._coordinator = coordinator

    def listen(self, asker: Taker) -> None:
        """Give it what coordinators answer; each asker knows its own call numbers."""
        self._askers.append(asker)

    def _take(self, peer: PeerId, message: CoordinationMessage) -> None:
        """Raises ProtocolError, which the link counts."""
        if type(message) in _FROM_COORDINATOR:
            for asker in self._askers:
                asker(peer, message)
        elif self._coordinator is None:
            raise ProtocolError(Fault.UNEXPECTED, "this peer is no coordinator")
        else:
            self._coordinator(peer, message)
