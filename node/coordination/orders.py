"""Passes on orders for layers of models: from those who follow a Cargo here to Islands that advertise here.

An Island takes orders only from coordinators that it has chosen, and a gateway learns of most Islands through
coordinators that others chose. So it signs its order and asks the coordinator to pass it on. Who may ask:
whoever follows that Cargo here, at a rate, for an Island that is in the book with room for it. The Island
decides itself (node/shards/orders.py); nothing is kept here, and an order that fails is tried elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from node.overlay.clock import monotonic_now
from node.peers import Peers
from node.rpc import CallFailed, PeerUnreachable, Refused
from protocol.codec import excerpt
from protocol.envelope import open_untrusted
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from protocol.ring import (
    METHOD_HOLD_FOR,
    METHOD_RELAY_HOLD,
    RELAYED_ORDER,
    SHARD_HELD,
    SHARD_ORDER,
    SHARD_ORDER_KIND,
    RelayedOrder,
    ShardHeld,
    ShardOrder,
)
from routing.coordinator import Coordinator
from routing.meter import Allowance, RateMeter

#: Orders of one asker: a chain with all its spares at once (8 stages, 32 Islands), and one a second to mend it.
ORDERS_PER_S: Final = 1
ORDER_BURST: Final = 32

#: Askers whose rate is remembered: as many as there may be subscriptions.
MAX_METERED: Final = 4096

#: Orders on their way at a time, of all askers: an Island that does not answer holds one for ISLAND_NS.
MAX_UNDER_WAY: Final = 256

#: An Island says at once what it will hold. Shorter than an asker's patience with us.
ISLAND_NS: Final = 4 * SECOND_NS

_log = structlog.get_logger("coordinator")


class OrderRelay:
    """Serves METHOD_RELAY_HOLD; once per peer table."""

    def __init__(self, peers: Peers, machine: Coordinator[PeerId], *, unix_now: Callable[[], UnixNs]) -> None:
        self._peers = peers
        self._machine = machine
        self._unix_now = unix_now
        self._meter: Final[RateMeter[PeerId]] = RateMeter(ORDERS_PER_S, ORDER_BURST, MAX_METERED)
        self._under_way = 0
        peers.serve(METHOD_RELAY_HOLD, RELAYED_ORDER, self.relay)

    async def relay(self, peer: PeerId, message: RelayedOrder) -> ShardHeld:
        """What the Island answers. Raises Refused, also with what the Island says."""
        if self._meter.take(monotonic_now(), peer) is not Allowance.GRANTED:
            raise Refused("busy", "too many orders at a time")
        order = self._opened(peer, message)
        island = PeerId(order.island)
        if not self._machine.serves(peer, order.hold.cargo):
            raise Refused("failed", "orders are passed on for those who follow the Cargo here")
        known = self._machine.book.get(island)
        offered = (
            None
            if known is None
            else next((one for one in known.advert.cargos if one.digest == order.hold.cargo), None)
        )
        if offered is None or offered.shard is None:
            raise Refused("failed", "no such Island offers room for that Cargo here")
        if self._under_way >= MAX_UNDER_WAY:
            raise Refused("busy", "too many orders are under way")
        self._under_way += 1
        try:
            held = await self._peers.call(island, METHOD_HOLD_FOR, message, SHARD_HELD, deadline_ns=ISLAND_NS)
        except CallFailed as error:
            raise Refused(error.code, excerpt(f"the Island: {error.detail}")) from error
        except PeerUnreachable as error:
            raise Refused("failed", f"the Island is gone: {error}") from error
        finally:
            self._under_way -= 1
        _log.info("order passed on", by=peer[-8:], island=island[-8:], first=held.first, last=held.last)
        return held

    def _opened(self, peer: PeerId, message: RelayedOrder) -> ShardOrder:
        """Raises Refused."""
        try:
            opened = open_untrusted(message.envelope, SHARD_ORDER_KIND, SHARD_ORDER, self._unix_now())
        except ProtocolError as error:
            raise Refused("malformed", excerpt(error.detail)) from error
        if opened.issuer != peer:
            raise Refused("failed", "an order must come from who signed it")
        return opened.body
