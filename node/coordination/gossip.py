"""Gossip among coordinators over libp2p: the machine, its neighbours, and where they are found.

Neighbours are coordinators: whoever says so in its hello, and those that the DHT names. A link to a neighbour
is pinned while it is one. How many are wanted, and who loses its place, the machine decides.

Anybody can say that it is a coordinator. So those who come by themselves get a part of the places only, few of
them from one network; the rest is for those whom this node found itself, or believes by its settings. Who wants
to cut it off from the others would have to keep all of these from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

#: Of them, such that this node found itself: they are looked for although others came by themselves.
WANTED_CHOSEN: Final = 6

#: Those who came by themselves: of `GossipPolicy.max_neighbours` so many leave room for those that are looked
#: for. And of one network, if its addresses are the world's.
MAX_STRANGERS: Final = 48
MAX_STRANGERS_PER_GROUP: Final = 4

#: How often to look for other coordinators: at the start, and when there are enough.
SEARCH_FIRST_S: Final = 2.0
SEARCH_MAX_S: Final = 120.0

Taker: TypeAlias = Callable[[object], None]
"""Takes what an opener made of an item."""

_log = structlog.get_logger("gossip")


class GossipService:
    """Gossip for the coordinator of this node. `run` until cancelled. `believed`: coordinators named in the
    settings, whose neighbour it wants to be.
    """

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
        believed: Iterable[PeerId] = (),
        policy: GossipPolicy = GossipPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self._host = host
        self._peers = peers
        self._overlay = overlay
        self._take = take
        self._pins: dict[PeerId, Callable[[], None]] = {}
        self._believed: Final = frozenset(believed) - {overlay.peer}
        self._chosen: set[PeerId] = set()  # found by ourselves
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
            self._take_in(peer)
        elif peer in self._pins:
            self._driver.order(RemovePeer(peer))
            self._release(peer)

    def _take_in(self, peer: PeerId) -> None:
        """There is a link to a coordinator: make it a neighbour, if there is a place for it."""
        if not self._has_place(peer):
            return
        self._driver.order(AddPeer(peer))
        if peer in self.machine.neighbours and peer not in self._pins:
            self._pins[peer] = self._peers.pin(peer)

    def _has_place(self, peer: PeerId) -> bool:
        known = self._chosen | self._believed
        if peer in known or peer in self._pins:
            return True
        strangers = [one for one in self._pins if one not in known]
        group = self._overlay.group_of(peer)
        beside = sum(self._overlay.group_of(one) == group for one in strangers) if group else 0
        return len(strangers) < MAX_STRANGERS and beside < MAX_STRANGERS_PER_GROUP

    def _release(self, peer: PeerId) -> None:
        self._chosen.discard(peer)
        release = self._pins.pop(peer, None)
        if release is not None:
            release()

    async def _search(self) -> None:
        """Look for coordinators in the DHT, ever more seldom while there are enough."""
        pause_s = SEARCH_FIRST_S
        while True:
            if not self._has_enough():
                await self._meet_some()
            pause_s = SEARCH_MAX_S if self._has_enough() else min(SEARCH_MAX_S, 2 * pause_s)
            with trio.move_on_after(pause_s * (0.75 + 0.5 * self._overlay.dice.unit())):
                await self._lonely.wait()
                pause_s = SEARCH_FIRST_S
                await trio.sleep(SEARCH_FIRST_S)
            self._lonely = trio.Event()

    def _has_enough(self) -> bool:
        return (
            len(self._pins) >= WANTED_NEIGHBOURS
            and sum(peer in self._chosen for peer in self._pins) >= WANTED_CHOSEN
            and self._believed <= self._pins.keys()
        )

    async def _meet_some(self) -> None:
        found = await self._overlay.find_providers(key_of_role(ROLE_COORDINATOR), wanted=4 * WANTED_NEIGHBOURS)
        # Those of the neighbours that the DHT names, too, are more than their own word for it.
        self._chosen.update(peer for peer in found.providers if peer in self._pins)
        strangers = [peer for peer in found.providers if peer not in self._pins and peer != self._overlay.peer]
        lacking = max(WANTED_NEIGHBOURS - len(self._pins), WANTED_CHOSEN - len(self._chosen))
        chosen = self._overlay.dice.sample(strangers, max(lacking, 0))
        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys((*sorted(self._believed - self._pins.keys()), *chosen)):
                nursery.start_soon(self._meet, peer)

    async def _meet(self, peer: PeerId) -> None:
        """Have a link; the rest follows from its hello."""
        self._chosen.add(peer)
        try:
            await self._overlay.reach(peer)
        except PeerUnreachable as error:
            self._chosen.discard(peer)
            _log.debug("coordinator not reached", peer=peer, reason=str(error))
            return
        hello = self._peers.hello(peer)
        if hello is not None and ROLE_COORDINATOR in hello.roles:
            self._take_in(peer)  # it was there before, without a place
        else:
            self._chosen.discard(peer)
