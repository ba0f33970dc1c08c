"""Gossip among coordinators over libp2p: the machine, its neighbours, and where they are found.

Neighbours are coordinators: whoever says so in its hello, and those that the DHT names. A link to a neighbour
is pinned while it is one. How many are wanted, and who loses its place, the machine decides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

import structlog
import trio

from dht.keys import key_of_role
from node.coordination.driver import MachineDriver
from node.overlay.overlay import Overlay
from node.p2p import Host
from node.peers import PeerDown, PeerEvent, Peers
from node.rpc import PeerUnreachable
from protocol.dice import Dice
from protocol.ids import PeerId
from routing.gossip import GossipMachine
from routing.gossip_messages import (
    GOSSIP_CODEC,
    METHOD_GOSSIP,
    AddPeer,
    Expelled,
    GossipCommand,
    GossipEvent,
    GossipMessage,
    Item,
    Learnt,
    Opener,
    Publish,
    Refused,
    RemovePeer,
    Thin,
)
from routing.gossip_peers import GossipPolicy, KindPolicy

ROLE_COORDINATOR: Final = "coordinator"

#: Neighbours that are looked for. Twice what the machine needs at least, so that half may die at once.
WANTED_NEIGHBOURS: Final = 12

#: How often to look for other coordinators: at the start, and when there are enough.
SEARCH_FIRST_S: Final = 2.0
SEARCH_MAX_S: Final = 120.0

Taker: TypeAlias = Callable[[object], None]
"""Takes what an opener made of an item."""

_log = structlog.get_logger("gossip")


class GossipService:
    """Gossip for the coordinator of this node. `run` until cancelled."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        overlay: Overlay,
        nursery: trio.Nursery,
        *,
        openers: Mapping[str, Opener],
        kinds: Mapping[str, KindPolicy],
        take: Taker,
        favoured: Callable[[bytes], bool],
        policy: GossipPolicy = GossipPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self._host = host
        self._peers = peers
        self._overlay = overlay
        self._take = take
        self._pins: dict[PeerId, Callable[[], None]] = {}
        self._lonely = trio.Event()
        self.machine: Final[GossipMachine[PeerId]] = GossipMachine(
            Dice(overlay.dice.u64(), stream=2),
            policy,
            openers,
            kinds,
            favoured=favoured,
            unix_offset_ns=overlay.unix_offset_ns,
        )
        self._driver: MachineDriver[GossipMessage, GossipCommand[PeerId], GossipEvent[PeerId]] = MachineDriver(
            self.machine, peers, METHOD_GOSSIP, nursery, self._on_event, disconnect=host.disconnect
        )
        peers.serve_notice(METHOD_GOSSIP, GOSSIP_CODEC, self._driver.received)
        peers.subscribe(self._on_peer)
        overlay.clock.subscribe(self._set_clock)

    async def run(self) -> None:
        """Keep time, and keep neighbours."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._driver.run)
            nursery.start_soon(self._search)

    def publish(self, item: Item) -> None:
        """Spread an item of our own."""
        self._driver.order(Publish(item))

    # --- inside -------------------------------------------------------------------------------------

    def _set_clock(self, unix_offset_ns: int) -> None:
        self.machine.set_clock(unix_offset_ns)
        self._driver.wake()

    def _on_event(self, event: GossipEvent[PeerId]) -> None:
        match event:
            case Learnt(body=body):
                self._take(body)
            case Expelled(peer, fault, detail):
                _log.warning("neighbour expelled", peer=peer, fault=str(fault), detail=detail)
                self._release(peer)
            case Refused(item, fault, detail):  # an item of our own: a clock far off, or a bug of ours
                _log.error("own item refused", kind=item.kind, fault=str(fault), detail=detail)
            case Thin():
                self._lonely.set()

    def _on_peer(self, event: PeerEvent) -> None:
        peer = event.peer
        if isinstance(event, PeerDown):
            self._release(peer)
        elif ROLE_COORDINATOR in event.hello.roles:
            self._driver.order(AddPeer(peer))
            if peer in self.machine.neighbours and peer not in self._pins:
                self._pins[peer] = self._peers.pin(peer)
        elif peer in self._pins:
            self._driver.order(RemovePeer(peer))
            self._release(peer)

    def _release(self, peer: PeerId) -> None:
        release = self._pins.pop(peer, None)
        if release is not None:
            release()

    async def _search(self) -> None:
        """Look for coordinators in the DHT, ever more seldom while there are enough."""
        pause_s = SEARCH_FIRST_S
        while True:
            if len(self._pins) < WANTED_NEIGHBOURS:
                await self._meet_some()
            enough = len(self._pins) >= WANTED_NEIGHBOURS
            pause_s = SEARCH_MAX_S if enough else min(SEARCH_MAX_S, 2 * pause_s)
            with trio.move_on_after(pause_s * (0.75 + 0.5 * self._overlay.dice.unit())):
                await self._lonely.wait()
                pause_s = SEARCH_FIRST_S
                await trio.sleep(SEARCH_FIRST_S)
            self._lonely = trio.Event()

    async def _meet_some(self) -> None:
        found = await self._overlay.find_providers(key_of_role(ROLE_COORDINATOR), wanted=4 * WANTED_NEIGHBOURS)
        strangers = [peer for peer in found.providers if peer not in self._pins and peer != self._overlay.peer]
        chosen = self._overlay.dice.sample(strangers, WANTED_NEIGHBOURS - len(self._pins))
        async with trio.open_nursery() as nursery:
            for peer in chosen:
                nursery.start_soon(_meet, self._overlay.reach, peer)


async def _meet(reach: Callable[[PeerId], Awaitable[None]], peer: PeerId) -> None:
    """Have a link; the rest follows from its hello."""
    try:
        await reach(peer)
    except PeerUnreachable as error:
        _log.debug("coordinator not reached", peer=peer, reason=str(error))
