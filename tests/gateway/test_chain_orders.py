"""Orders for layers that go through coordinators, over real connections: who may ask, who brings them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
import trio

from gateway.chains.orders import OrderGiver
from gateway.mesh_book import MeshBook
from node.coordination.orders import ORDER_BURST, OrderRelay
from node.identity import Identity, new_identity
from node.island import monotonic_now, unix_now
from node.overlay.overlay import Overlay
from node.p2p import Host, open_host
from node.p2p.host import plain_errors
from node.peers import Peers, open_peers
from node.rpc import CallFailed, PeerUnreachable
from node.shards.orders import RelayedOrders
from protocol.adverts import Hello, IslandAdvert, OfferedCargo, ShardRange
from protocol.codec import encode
from protocol.coordination import AdvertPut, Follow
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from protocol.machine import Received
from protocol.ring import (
    HOLD_SHARD,
    MAX_LAYERS,
    METHOD_HOLD,
    METHOD_HOLD_FOR,
    METHOD_RELAY_HOLD,
    RELAYED_ORDER,
    SHARD_HELD,
    SHARD_ORDER,
    SHARD_ORDER_KIND,
    HoldShard,
    RelayedOrder,
    ShardHeld,
    ShardOrder,
)
from routing.coordinator import Coordinator
from routing.notary import EnvelopeNotary

CARGO, OTHER = ("sha256:" + digit * 64 for digit in "co")
HOLD = HoldShard(CARGO, 0, 6)


class Node:
    """A peer, and what plays its overlay: it knows where everybody is."""

    def __init__(self, identity: Identity, host: Host, peers: Peers, addresses: dict[PeerId, str]) -> None:
        self.identity = identity
        self.host = host
        self.peers = peers
        self.peer = host.peer
        self._addresses = addresses

    async def reach(self, peer: PeerId) -> None:
        await self.peers.reach(peer, (self._addresses[peer],))


class Hub:
    """A coordinator's relay over its real machine."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.peer = node.peer
        self.machine: Coordinator[PeerId] = Coordinator(
            node.peer,
            EnvelopeNotary(node.identity.signer),
            Dice(1),
            unix_offset_ns=unix_now() - monotonic_now(),
        )
        OrderRelay(node.peers, self.machine, unix_now=unix_now)

    def advertised(self, island: Isle, cargo: str = CARGO) -> None:
        shard = ShardRange(0, 0, 12, room_mib=80)
        offered = OfferedCargo(cargo, "m", "1", "llmcpp", "ready", 512, 4, 0, 0, 0.0, 0.0, shard=shard)
        envelope = EnvelopeNotary(island.node.identity.signer).seal_advert(
            IslandAdvert("isle", (offered,)),
            sequence=unix_now(),
            expires_unix_ns=UnixNs(unix_now() + 60 * SECOND_NS),
        )
        self.machine.receive(monotonic_now(), Received(island.peer, AdvertPut(1, envelope)))
        assert self.machine.book.get(island.peer) is not None

    def followed(self, peer: PeerId, cargo: str = CARGO) -> None:
        self.machine.receive(monotonic_now(), Received(peer, Follow(1, cargo, 16)))
        assert self.machine.serves(peer, cargo)


class Isle:
    """Takes orders as an Island does, and remembers whose they are."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.peer = node.peer
        self.coordinators: tuple[PeerId, ...] = ()
        self.taken: list[tuple[PeerId, HoldShard]] = []
        self.brought: list[tuple[PeerId, Envelope]] = []
        self._orders = RelayedOrders(node.peer, lambda: self.coordinators, unix_now)
        node.peers.serve(METHOD_HOLD_FOR, RELAYED_ORDER, self._hold_for)
        node.peers.serve(METHOD_HOLD, HOLD_SHARD, self._hold)

    async def _hold_for(self, peer: PeerId, message: RelayedOrder) -> ShardHeld:
        await trio.lowlevel.checkpoint()
        self.brought.append((peer, message.envelope))
        self.taken.append(self._orders.open(peer, message.envelope))
        return ShardHeld(self.taken[-1][1].first, self.taken[-1][1].last)

    async def _hold(self, peer: PeerId, order: HoldShard) -> ShardHeld:
        await trio.lowlevel.checkpoint()
        self.taken.append((peer, order))
        return ShardHeld(order.first, order.last)


class World:
    """A gateway, an Island that works for two hubs, and the gateway follows both."""

    def __init__(self, gateway: Node, isle: Isle, hubs: list[Hub]) -> None:
        self.gateway = gateway
        self.isle = isle
        self.hubs = hubs
        self.ways: list[PeerId] = [hub.peer for hub in hubs]
        self.known = MeshBook(monotonic_now, unix_now, tuple)
        isle.coordinators = tuple(self.ways)
        self.giver = self.giver_of(gateway)
        for hub in hubs:
            hub.advertised(isle)
            hub.followed(gateway.peer)

    def giver_of(self, node: Node) -> OrderGiver:
        def vouchers(cargo: str, island: PeerId) -> Iterable[PeerId]:
            assert (cargo, island) == (CARGO, self.isle.peer)
            return self.ways

        signer = node.identity.signer
        overlay = cast("Overlay", node)  # all that it takes of one is `reach`
        return OrderGiver(node.peers, overlay, self.known, signer=signer, vouchers=vouchers, unix_now=unix_now)

    async def give(self, hold: HoldShard = HOLD) -> ShardHeld:
        return await self.giver.give(self.isle.peer, hold)


@pytest.fixture
def world():
    @asynccontextmanager
    async def make() -> AsyncGenerator[Any]:
        addresses: dict[PeerId, str] = {}
        async with AsyncExitStack() as stack:
            stack.enter_context(plain_errors())
            stack.enter_context(trio.fail_after(60))

            async def node(name: str) -> Node:
                identity = new_identity()
                host = await stack.enter_async_context(open_host(identity))
                peers = await stack.enter_async_context(
                    open_peers(host, hello=Hello(name, "0"), dice=Dice(len(addresses)))
                )
                addresses[host.peer] = host.addresses[0]
                return Node(identity, host, peers, addresses)

            hubs = [Hub(await node("hub")), Hub(await node("hub"))]
            isle = Isle(await node("isle"))
            for hub in hubs:
                await isle.node.reach(hub.peer)  # it keeps a link to its coordinators
            yield World(await node("gate"), isle, hubs), node

    return make


async def test_orders_go_through_an_islands_coordinators_in_turn_and_stay_the_gateways(world) -> None:
    async with world() as (here, _):
        assert await here.give() == ShardHeld(0, 6)
        assert await here.give(HoldShard(CARGO, 6, 12, displace=True)) == ShardHeld(6, 12)
        assert here.isle.taken == [
            (here.gateway.peer, HOLD),
            (here.gateway.peer, HoldShard(CARGO, 6, 12, displace=True)),
        ]
        assert [by for by, _ in here.isle.brought] == here.ways, "the next one goes another way"
        # Who advertises here is told directly.
        here.known.advertised(here.isle.peer, IslandAdvert("isle", ()), 1)
        await here.give()
        assert len(here.isle.brought) == 2
        assert here.isle.taken[-1] == (here.gateway.peer, HOLD)


async def test_one_coordinator_fails_and_the_next_one_brings_it(world) -> None:
    async with world() as (here, node):
        older = await node("hub")
        here.ways.insert(0, older.peer)  # knows no such method
        assert await here.give() == ShardHeld(0, 6)
        assert here.isle.brought[0][0] == here.hubs[0].peer
        # The Island has left one of them, which does not know it yet.
        here.isle.coordinators = (here.hubs[1].peer,)
        here.ways[:] = [hub.peer for hub in here.hubs]
        here.giver = here.giver_of(here.gateway)
        assert await here.give() == ShardHeld(0, 6)
        assert [by for by, _ in here.isle.brought[-2:]] == here.ways
        first, second = (envelope for _, envelope in here.isle.brought[-2:])
        assert first == second, "it is the same order"
        # Nobody is left.
        here.isle.coordinators = ()
        with pytest.raises(CallFailed, match="works for"):
            await here.give()
        here.ways.clear()
        with pytest.raises(PeerUnreachable, match="neither here nor"):
            await here.give()


async def test_a_coordinator_that_only_says_so_is_passed_over_next(world) -> None:
    async with world() as (here, node):
        liar = await node("hub")

        async def lie(_: PeerId, message: RelayedOrder) -> ShardHeld:
            await trio.lowlevel.checkpoint()
            assert message.envelope.issuer == here.gateway.identity.signer.public_key
            return ShardHeld(0, 6)

        liar.peers.serve(METHOD_RELAY_HOLD, RELAYED_ORDER, lie)
        here.ways.insert(0, liar.peer)
        assert await here.give() == ShardHeld(0, 6)
        assert not here.isle.brought
        await here.give()
        assert here.isle.taken == [(here.gateway.peer, HOLD)]


async def test_whom_a_coordinator_serves(world) -> None:
    async with world() as (here, node):
        guest = await node("guest")
        giver = here.giver_of(guest)
        with pytest.raises(CallFailed, match="follow the Cargo"):
            await giver.give(here.isle.peer, HOLD)
        for hub in here.hubs:
            hub.followed(guest.peer)
        assert await giver.give(here.isle.peer, HOLD) == ShardHeld(0, 6)
        assert here.isle.taken == [(guest.peer, HOLD)]
        _, order = here.isle.brought[-1]

        async def bring(node: Node, envelope: Envelope) -> ShardHeld:
            hub = here.hubs[0].peer
            await node.reach(hub)
            return await node.peers.call(
                hub, METHOD_RELAY_HOLD, RelayedOrder(envelope), SHARD_HELD, deadline_ns=10 * SECOND_NS
            )

        with pytest.raises(CallFailed, match="who signed it"):
            await bring(here.gateway, order)
        forged = msgspec.structs.replace(order, sequence=order.sequence + 1)
        with pytest.raises(CallFailed, match="signature"):
            await bring(guest, forged)
        await giver.give(here.isle.peer, HOLD)
        with pytest.raises(CallFailed, match="later order"):
            await bring(guest, order)
        here.hubs[0].machine.book.lost(here.isle.peer)
        with pytest.raises(CallFailed, match="no such Island"):
            await bring(guest, order)
        codes: list[str] = []
        for _ in range(2 * ORDER_BURST):
            with pytest.raises(CallFailed) as refused:
                await bring(guest, order)
            codes.append(refused.value.code)
        assert "busy" in codes
        assert await here.give() == ShardHeld(0, 6), "others are not hindered by it"


def test_the_largest_order_fits_into_its_message() -> None:
    signer = new_identity().signer
    largest = ShardOrder("p" * 64, HoldShard(CARGO, MAX_LAYERS, MAX_LAYERS, displace=True))
    most = (1 << 63) - 1
    envelope = signer.seal(SHARD_ORDER_KIND, largest, sequence=most, expires_unix_ns=UnixNs(most))
    relayed = RELAYED_ORDER.decode_untrusted(encode(RelayedOrder(envelope)))
    assert SHARD_ORDER.decode_untrusted(relayed.envelope.body) == largest
