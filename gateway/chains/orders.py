"""How an order for layers gets to its Island: directly if it advertises here, else through its coordinators.

An Island takes orders from coordinators that it works for. Of those that work for others, this gateway hears
through their coordinators, and one of these passes the order on; it is signed, so that the layers are ours
whoever brings it. If one coordinator fails, the next one gets the same order. One that says it passed an order
on and did not is found out when the Island's advert shows nothing: the next order goes to another one first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

import trio

from gateway.mesh_book import MeshBook
from node.overlay.overlay import Overlay
from node.peers import Peers
from node.rpc import CallFailed, PeerUnreachable
from protocol.envelope import Signer
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from protocol.ring import (
    METHOD_HOLD,
    METHOD_RELAY_HOLD,
    SHARD_HELD,
    SHARD_ORDER_KIND,
    SHARD_ORDER_TTL_NS,
    HoldShard,
    RelayedOrder,
    ShardHeld,
    ShardOrder,
)

#: An Island says at once what it will hold; loading comes after. It may have to be dialled before.
HOLD_NS: Final = 10 * SECOND_NS
REACH_S: Final = 10.0

#: A coordinator asks the Island for 4 s at most. It is linked already: we follow it.
RELAY_NS: Final = 5 * SECOND_NS
RELAY_S: Final = 6.0

#: Coordinators that one order is tried through: an Island has two, and those that its owner names.
MAX_WAYS: Final = 3

#: Islands of which it is remembered through whom the last order went.
MAX_ISLANDS: Final = 4096


class OrderGiver:
    """`vouchers`: coordinators that show an Island to us as one with that Cargo."""

    def __init__(
        self,
        peers: Peers,
        overlay: Overlay,
        known: MeshBook,
        *,
        signer: Signer,
        vouchers: Callable[[str, PeerId], Iterable[PeerId]],
        unix_now: Callable[[], UnixNs],
    ) -> None:
        self._peers = peers
        self._overlay = overlay
        self._known = known
        self._signer = signer
        self._vouchers = vouchers
        self._unix_now = unix_now
        self._number = 0
        self._last_way: OrderedDict[PeerId, PeerId] = OrderedDict()

    async def give(self, island: PeerId, hold: HoldShard) -> ShardHeld:
        """What the Island says. Raises CallFailed, PeerUnreachable."""
        ways = self._ways(island, hold.cargo)
        if self._known.advertises_here(island):
            try:
                return await self._directly(island, hold)
            except PeerUnreachable:
                if not ways:
                    raise
        if not ways:
            await trio.lowlevel.checkpoint()
            raise PeerUnreachable("it advertises neither here nor at a coordinator that this gateway follows")
        return await self._through(ways, island, hold)

    async def _directly(self, island: PeerId, hold: HoldShard) -> ShardHeld:
        with trio.move_on_after(REACH_S):
            await self._overlay.reach(island)
            return await self._peers.call(island, METHOD_HOLD, hold, SHARD_HELD, deadline_ns=HOLD_NS)
        raise PeerUnreachable(f"no answer within {REACH_S:g} s")

    async def _through(self, ways: list[PeerId], island: PeerId, hold: HoldShard) -> ShardHeld:
        order = self._signed(island, hold)
        failure: CallFailed | PeerUnreachable = PeerUnreachable("no coordinator answered in time")
        for coordinator in ways:
            self._note(island, coordinator)
            try:
                with trio.move_on_after(RELAY_S):
                    await self._overlay.reach(coordinator)
                    return await self._peers.call(
                        coordinator, METHOD_RELAY_HOLD, order, SHARD_HELD, deadline_ns=RELAY_NS
                    )
            except (CallFailed, PeerUnreachable) as error:
                failure = error
        raise failure

    def _ways(self, island: PeerId, cargo: str) -> list[PeerId]:
        """The one that passed on the last order for the Island comes last."""
        last = self._last_way.get(island)
        others = [peer for peer in self._vouchers(cargo, island) if peer != island]
        return sorted(others, key=lambda peer: peer == last)[:MAX_WAYS]

    def _signed(self, island: PeerId, hold: HoldShard) -> RelayedOrder:
        now = self._unix_now()
        self._number = max(self._number + 1, now)
        expires = UnixNs(now + SHARD_ORDER_TTL_NS)
        order = ShardOrder(island, hold)
        return RelayedOrder(
            self._signer.seal(SHARD_ORDER_KIND, order, sequence=self._number, expires_unix_ns=expires)
        )

    def _note(self, island: PeerId, coordinator: PeerId) -> None:
        self._last_way[island] = coordinator
        self._last_way.move_to_end(island)
        if len(self._last_way) > MAX_ISLANDS:
            self._last_way.popitem(last=False)
