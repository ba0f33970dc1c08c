"""The overlay over real hosts on loopback: entering, finding, storing, losing peers, liars."""

# ruff: noqa: SIM117, ASYNC110 - the nesting shows what outlives what; machines have no event for a test to wait for

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from dht.keys import key_of_peer, key_of_record, key_of_role
from dht.records import seal_record
from dht.wire import METHOD_DHT, Contact, WireFindNode, WireNodes, WirePing
from node.coordination.gossip import GossipService
from node.identity import Identity, IdentityError, load_or_create_identity, new_identity
from node.overlay.addresses import Scope
from node.overlay.book import AddressBook
from node.overlay.cache import CachedPeer, OverlayFiles
from node.overlay.flood import BURST_PER_PEER
from node.overlay.overlay import Overlay, OverlayConfig, open_overlay
from node.overlay.records import PeerRecord, seal_peer_record
from node.p2p import AddressInvalid, Host, open_host
from node.peers import Peers, PeersConfig, open_peers
from node.rpc import PeerUnreachable
from protocol.adverts import Hello
from protocol.codec import Message
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from routing.gossip_peers import GossipPolicy

PATIENCE_S = 90  # a dozen peers in one process, on a machine that may be busy


@dataclass
class Node:
    identity: Identity
    host: Host
    peers: Peers
    overlay: Overlay
    scope: trio.CancelScope
    gone: trio.Event

    @property
    def peer(self) -> PeerId:
        return self.host.peer

    @property
    def address(self) -> str:
        return self.host.addresses[0]

    async def stop(self) -> None:
        self.scope.cancel()
        await self.gone.wait()

    def record(self, name: str, value: bytes):
        now = self.overlay.unix_now()
        return seal_record(
            self.identity.signer, "note", name, value, sequence=now, expires_unix_ns=now + 3600 * SECOND_NS
        )


class Network:
    """Peers in one process, each with sockets, links and a machine of its own."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.nursery = nursery
        self.nodes: list[Node] = []

    async def add(
        self,
        *,
        bootstrap: tuple[str, ...] | None = None,
        identity: Identity | None = None,
        listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",),
        roles: tuple[str, ...] = (),
        config: PeersConfig | None = None,
    ) -> Node:
        """A new node; without `bootstrap` it enters by the first."""
        if bootstrap is None:
            bootstrap = (self.nodes[0].address,) if self.nodes else ()
        identity = identity or new_identity()
        node = await self.nursery.start(self._run, identity, bootstrap, listen, roles, config or PeersConfig())
        self.nodes.append(node)
        return node

    async def _run(self, identity, bootstrap, listen, roles, config, task_status) -> None:
        scope, gone = trio.CancelScope(), trio.Event()
        hello = Hello(identity.peer[-6:], "0", roles)
        settings = OverlayConfig(self.folder / identity.peer, bootstrap)
        try:
            with scope:
                async with open_host(identity, listen) as host:
                    async with open_peers(host, hello=hello, config=config, dice=Dice(1)) as peers:
                        async with open_overlay(host, peers, settings, identity) as overlay:
                            task_status.started(Node(identity, host, peers, overlay, scope, gone))
                            await trio.sleep_forever()
        finally:
            gone.set()

    async def grow(self, count: int) -> list[Node]:
        """So many nodes, all in."""
        nodes = [await self.add() for _ in range(count)]
        await self.joined(*nodes)
        return nodes

    async def joined(self, *nodes: Node) -> None:
        with trio.fail_after(PATIENCE_S):
            while not all(len(node.overlay.driver.machine.table) for node in nodes):
                await trio.sleep(0.01)


@pytest.fixture
async def network(tmp_path: Path) -> AsyncGenerator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(tmp_path, nursery)
        nursery.cancel_scope.cancel()


async def test_ten_peers_find_each_other_records_and_providers(network: Network) -> None:
    nodes = await network.grow(10)
    first, last = nodes[0], nodes[-1]
    with trio.fail_after(PATIENCE_S):
        for node in nodes[1:]:
            while (await node.overlay.find_closest(key_of_peer(first.peer))).closest[:1] != (first.peer,):
                await trio.sleep(0.05)  # a handshake took longer than the lookup waited
        assert (await first.overlay.put_record(first.record("greeting", b"hello"))).copies
        while not (found := await last.overlay.get_records(key_of_record("note", "greeting"))).records:
            await trio.sleep(0.05)
        assert [record.peer for record in found.records] == [first.peer]
        key = key_of_role("coordinator")
        assert (await last.overlay.find_providers(key)).providers == ()
        assert (await nodes[3].overlay.provide(key)).copies
        assert (await nodes[4].overlay.provide(key)).copies
        while set((await last.overlay.find_providers(key)).providers) != {nodes[3].peer, nodes[4].peer}:
            await trio.sleep(0.05)
        assert last.overlay.addresses(nodes[3].peer) == (nodes[3].address,)
        while (view := last.overlay.view()).network_size != 10 or not view.coordinate_ms:
            await trio.sleep(0.05)
        assert (view.joined, view.reachable) == (True, True)


async def test_what_a_peer_says_of_itself_lies_in_the_network(network: Network) -> None:
    await network.grow(4)
    coordinator = await network.add(roles=("coordinator",))
    await network.joined(coordinator)
    coordinator.overlay.provide_all("role", [key_of_role("coordinator")])
    asker = network.nodes[1]
    with trio.fail_after(PATIENCE_S):
        while (record := await asker.overlay.find_peer_record(coordinator.peer)) is None:
            await trio.sleep(0.1)  # put some seconds after the start
        assert record.addresses == (coordinator.address,)
        assert record.roles == ("coordinator",)
        while not (found := await asker.overlay.find_providers(key_of_role("coordinator"))).providers:
            await trio.sleep(0.05)
        await asker.overlay.reach(found.providers[0])
        assert asker.peers.hello(coordinator.peer) is not None
        coordinator.overlay.provide_all("role", [])
        own = await coordinator.overlay.find_providers(key_of_role("coordinator"))
        assert coordinator.peer not in own.providers or own.cost.queries  # others forget it when it expires


async def test_a_third_of_the_peers_dies_and_the_rest_goes_on(network: Network) -> None:
    nodes = await network.grow(10)
    with trio.fail_after(PATIENCE_S):
        for i, node in enumerate(nodes):
            assert (await node.overlay.put_record(node.record(f"r{i}", b"x"))).copies
        dead = nodes[1:4]
        for node in dead:
            await node.stop()
        live = [node for node in nodes if node not in dead]
        for i in range(10):
            while not (await live[i % len(live)].overlay.get_records(key_of_record("note", f"r{i}"))).records:
                await trio.sleep(0.05)
        gone = {node.peer for node in dead}
        for node in live:
            # Broken links tell at once; whoever had none learns it by pings.
            while gone & set((await node.overlay.find_closest(key_of_peer(dead[0].peer))).closest):
                await trio.sleep(0.1)


async def test_back_by_the_peers_of_last_time_alone(network: Network) -> None:
    nodes = await network.grow(5)
    one = nodes[2]
    with trio.fail_after(PATIENCE_S):
        while len(one.overlay.book.met_numbers(9)) < 4:
            await one.overlay.find_closest(one.overlay.own_key)
            await trio.sleep(0.05)
    await one.stop()
    kept = OverlayFiles(network.folder / one.peer).load_peers_untrusted()
    assert {peer.peer for peer in kept} <= {node.peer for node in nodes}
    assert len(kept) == 4
    again = await network.add(bootstrap=(), identity=one.identity)
    await network.joined(again)
    with trio.fail_after(PATIENCE_S):
        while (await again.overlay.find_closest(key_of_peer(nodes[0].peer))).closest[:1] != (nodes[0].peer,):
            await trio.sleep(0.05)


async def test_who_comes_first_waits_for_the_others(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.overlay.membership.REJOIN_MAX_S", 0.1)
    async with open_host(new_identity()) as reserved:
        port = reserved.addresses[0].split("/")[4]
    later = new_identity()
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{later.peer}"
    quick = PeersConfig(failed_first_ns=SECOND_NS // 20, failed_max_ns=SECOND_NS // 10)
    early = await network.add(bootstrap=(address,), config=quick)
    with trio.fail_after(PATIENCE_S):
        assert await early.overlay.join() == 0
        assert not early.overlay.membership.joined
        late = await network.add(
            bootstrap=(), identity=later, listen=(address.partition("/p2p/")[0],), config=quick
        )
        await network.joined(early, late)


async def test_alone_again_it_enters_anew(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.overlay.membership.ALONE_CHECK_S", 0.1)
    monkeypatch.setattr("node.overlay.membership.REJOIN_MAX_S", 0.2)
    quick = PeersConfig(failed_first_ns=SECOND_NS // 20, failed_max_ns=SECOND_NS // 10)
    hub = await network.add(config=quick)
    one = await network.add(config=quick)
    await network.joined(hub, one)
    port = hub.address.split("/")[4]
    await hub.stop()
    with trio.fail_after(PATIENCE_S):
        while one.overlay.membership.joined:
            await trio.sleep(0.02)
        back = await network.add(
            bootstrap=(), identity=hub.identity, listen=(f"/ip4/127.0.0.1/tcp/{port}",), config=quick
        )
        await network.joined(back, one)
        while not one.overlay.membership.joined:
            await trio.sleep(0.02)


async def test_a_cancelled_lookup_leaves_nothing_behind(network: Network) -> None:
    nodes = await network.grow(3)
    one = nodes[1]
    with trio.move_on_after(0) as scope:
        await one.overlay.find_closest(123)
    assert scope.cancelled_caught
    machine = one.overlay.driver.machine
    with trio.CancelScope() as scope:
        scope.cancel()
        await one.overlay.get_records(5)
    with trio.fail_after(PATIENCE_S):
        while machine.open_operations:
            await trio.sleep(0.01)
    assert one.overlay.driver._waiters == {}


async def test_a_computer_that_slept_signs_by_the_new_time(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock of instants stood still for eight hours; a record holds for four."""
    nodes = await network.grow(2)
    monkeypatch.setattr("node.overlay.clock.civil_now", lambda: UnixNs(time.time_ns() + 8 * 3600 * SECOND_NS))
    awake = await network.add()  # it knows no other time
    await network.joined(awake)
    with trio.fail_after(PATIENCE_S):
        while await awake.overlay.find_peer_record(nodes[0].peer) is None:
            await nodes[0].overlay.publish_self()
            await trio.sleep(0.1)


async def test_a_record_goes_above_one_from_before_the_clock_was_set_back(network: Network) -> None:
    nodes = await network.grow(3)
    one = nodes[1]
    future = UnixNs(time.time_ns() + 3600 * SECOND_NS)
    with trio.fail_after(PATIENCE_S):
        early = seal_peer_record(one.identity.signer, PeerRecord(("/ip4/127.0.0.1/tcp/1",)), future)
        while (await one.overlay.put_record(early)).copies < 2:
            await trio.sleep(0.1)
        one.overlay.withdraw(key_of_record("peer", one.peer))
        while not await one.overlay.publish_self():
            await trio.sleep(0.1)
        while True:
            record = await nodes[2].overlay.find_peer_record(one.peer)
            if record is not None and record.addresses == (one.address,):
                return
            await trio.sleep(0.1)


async def test_bootstrap_addresses_are_checked(network: Network) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await Network(network.folder, nursery).add(bootstrap=("nowhere",))
    assert caught.group_contains(AddressInvalid)


# --- liars ------------------------------------------------------------------------------------------


class Liar:
    """Speaks the DHT's messages as it likes."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self.host = host
        self.peers = peers

    def say(self, victim: PeerId, message: Message) -> None:
        self.peers.notify(victim, METHOD_DHT, message)


@asynccontextmanager
async def liar(addresses: tuple[str, ...] = ()) -> AsyncGenerator[Liar]:
    async with open_host(new_identity()) as host:
        hello = Hello("liar", "0", (), addresses)
        async with open_peers(host, hello=hello, dice=Dice(2)) as peers:
            yield Liar(host, peers)


async def test_a_flood_is_refused_undecoded_and_the_others_are_served(network: Network) -> None:
    nodes = await network.grow(3)
    victim = nodes[0]
    async with liar() as bad:
        await bad.peers.reach(victim.peer, [victim.address])
        before = victim.overlay.driver.counters.received
        with trio.fail_after(PATIENCE_S):
            while victim.overlay.driver.guard.refused < 1000:
                for _ in range(200):
                    bad.say(victim.peer, WireFindNode(1, 0, 1000, True, bytes(32)))
                await trio.sleep(0.001)
            taken = victim.overlay.driver.counters.received - before
            assert taken < 2 * BURST_PER_PEER
            while (await nodes[1].overlay.find_closest(key_of_peer(victim.peer))).closest[:1] != (victim.peer,):
                await trio.sleep(0.05)


async def test_garbage_and_false_contacts_do_no_harm(network: Network) -> None:
    nodes = await network.grow(3)
    victim = nodes[0]
    known = len(victim.overlay.book)
    table = {entry.peer for entry in victim.overlay.driver.machine.table}
    async with liar(("/ip4/127.0.0.1/tcp/0", "/dns4/localhost/tcp/22", "garbage")) as bad:
        await bad.peers.reach(victim.peer, [victim.address])
        malformed = victim.peers.counters.malformed
        contacts = tuple(
            Contact(text, addresses)
            for text, addresses in (
                ("nobody", ("/ip4/127.0.0.1/tcp/1",)),
                (new_identity().peer, ()),
                (new_identity().peer, ("/dns4/victim.example/tcp/80",)),
                (new_identity().peer, ("/ip4/224.0.0.1/tcp/80", "/ip4/0.0.0.0/tcp/80", "/ip4/127.0.0.1/tcp/0")),
                (new_identity().peer, (f"/ip4/127.0.0.1/tcp/1/p2p/{new_identity().peer}",)),
                (new_identity().peer, ("x" * 250,)),
            )
        )
        for contact in contacts:
            number = victim.overlay.book.intern_untrusted(contact.peer, contact.addresses, Scope.MACHINE)
            assert number is None
        bad.say(victim.peer, WireNodes(7, 0, 1000, False, contacts))
        bad.say(victim.peer, Hello("not", "a DHT message"))
        bad.say(victim.peer, WirePing(1, (1 << 63) - 1, 0, False))
        with trio.fail_after(PATIENCE_S):
            while victim.peers.counters.malformed == malformed:
                await trio.sleep(0.01)
            await nodes[1].overlay.find_closest(key_of_peer(victim.peer))
        assert len(victim.overlay.book) == known + 1  # the liar itself, because it has a link
        assert {entry.peer for entry in victim.overlay.driver.machine.table} == table  # no address, no entry
        assert victim.overlay.addresses(bad.host.peer) == ()


async def test_answers_that_nobody_asked_for_are_not_taken_up(network: Network) -> None:
    victim = (await network.grow(2))[0]
    known = len(victim.overlay.book)
    async with liar() as bad:
        await bad.peers.reach(victim.peer, [victim.address])
        contacts = tuple(Contact(new_identity().peer, (f"/ip4/127.0.0.1/tcp/{i + 1}",)) for i in range(20))
        for call in range(1, 10):
            bad.say(victim.peer, WireNodes(call, 0, 1000, False, contacts))
        with trio.fail_after(PATIENCE_S):
            while victim.overlay.driver.counters.unasked < 9:
                await trio.sleep(0.01)
        assert len(victim.overlay.book) == known + 1  # the liar itself


async def test_who_asks_and_hangs_up_is_not_dialled(network: Network) -> None:
    victim = (await network.grow(2))[0]  # in the network, so that it need not enter by strangers
    async with liar() as bad:
        bad.peers.introduce(Hello("liar", "0", (), bad.host.addresses))
        await bad.peers.reach(victim.peer, [victim.address])
        bad.say(victim.peer, WireFindNode(1, 0, 1000, True, bytes(32)))
        await bad.host.disconnect(victim.peer)
        await trio.sleep(0.2)
        assert bad.host.counters.connections_accepted == 0


async def test_strangers_do_not_take_all_places_among_gossips_neighbours(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls itself a coordinator gets a place, but some are kept for those that the node finds."""
    monkeypatch.setattr("node.coordination.gossip.MAX_STRANGERS", 2)
    monkeypatch.setattr("node.coordination.gossip.SEARCH_MAX_S", 0.2)
    policy = GossipPolicy(max_neighbours=4)
    (victim, *_) = await network.grow(3)
    honest = await network.add(roles=("coordinator",))
    await network.joined(honest)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            service = GossipService(
                victim.host,
                victim.peers,
                victim.overlay,
                nursery,
                openers={},
                kinds={},
                take=lambda _: None,
                favoured=lambda _: False,
                policy=policy,
            )
            for _ in range(5):
                sybil = await stack.enter_async_context(liar())
                sybil.peers.introduce(Hello("sybil", "0", ("coordinator",), ()))
                await sybil.peers.reach(victim.peer, [victim.address])
            while len(victim.peers.up()) < 7:
                await trio.sleep(0.01)
            assert len(service.machine.neighbours) == 2
            assert honest.peer not in service.machine.neighbours
            honest.overlay.provide_all("role", [key_of_role("coordinator")])
            nursery.start_soon(service.run)
            while honest.peer not in service.machine.neighbours:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


# --- parts ------------------------------------------------------------------------------------------


def test_the_book_is_bounded_and_keeps_what_is_in_use() -> None:
    me = new_identity().peer
    book = AddressBook(me, capacity=8)
    ids = [new_identity().peer for _ in range(30)]
    precious = [book.number_of(peer) for peer in ids[:3]]
    book.in_use = lambda: set(precious)
    given = {book.me, *precious}
    for i, peer in enumerate(ids[3:]):
        number = book.intern_untrusted(peer, (f"/ip4/127.0.0.1/tcp/{i + 1}",), Scope.MACHINE)
        assert number is not None
        assert number not in given  # never given out twice
        given.add(number)
        assert len(book) <= 8
    for number, peer in zip(precious, ids, strict=False):
        assert book.peer_of(number) == peer
        assert book.keys[number] == key_of_peer(peer)
    assert book.find(me) == book.me
    book.in_use = lambda: given | set(range(1000))
    for peer in (new_identity().peer for _ in range(10)):
        book.number_of(peer)  # all in use: what refers to them bounds the book then


def test_a_book_of_which_all_is_in_use_is_not_searched_for_each_newcomer() -> None:
    book = AddressBook(new_identity().peer, capacity=32)
    looks = 0

    def in_use() -> range:
        nonlocal looks
        looks += 1
        return range(1000)

    book.in_use = in_use
    for peer in (new_identity().peer for _ in range(96)):
        book.number_of(peer)
    assert len(book) == 97
    assert looks <= 40
    book.in_use = frozenset  # nothing any more
    for peer in (new_identity().peer for _ in range(4)):
        book.number_of(peer)
    assert len(book) <= 32


def test_ones_own_word_counts_more_than_hearsay() -> None:
    book = AddressBook(new_identity().peer)
    peer = new_identity().peer
    number = book.intern_untrusted(peer, ("/ip4/127.0.0.1/tcp/1",), Scope.MACHINE)
    assert number is not None
    assert book.intern_untrusted(peer, ("/ip4/127.0.0.1/tcp/2",), Scope.MACHINE) == number
    assert book.addresses(number) == tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}" for port in (1, 2))
    assert book.own_word_untrusted(number, ["/ip4/127.0.0.1/tcp/3"], Scope.MACHINE)
    book.intern_untrusted(peer, ("/ip4/127.0.0.1/tcp/4",), Scope.MACHINE)
    assert book.addresses(number) == (f"/ip4/127.0.0.1/tcp/3/p2p/{peer}",)
    book.trust(peer, f"/ip4/127.0.0.1/tcp/5/p2p/{peer}")
    assert book.addresses(number)[0].startswith("/ip4/127.0.0.1/tcp/3/")
    book.met(number, "127.0.0.1:5")
    assert book.addresses(number)[0].startswith("/ip4/127.0.0.1/tcp/5/")


@pytest.mark.parametrize(
    ("address", "narrowest", "taken"),
    [
        ("/ip4/127.0.0.1/tcp/1", Scope.MACHINE, True),
        ("/ip4/127.0.0.1/tcp/1", Scope.NETWORK, False),
        ("/ip4/10.1.2.3/tcp/1", Scope.NETWORK, True),
        ("/ip4/10.1.2.3/tcp/1", Scope.WORLD, False),
        ("/ip4/8.8.8.8/tcp/1", Scope.WORLD, True),
        ("/ip6/::1/tcp/1", Scope.NETWORK, False),
        ("/ip6/::ffff:127.0.0.1/tcp/1", Scope.NETWORK, False),
        ("/ip6/2001:4860:4860::8888/tcp/1", Scope.WORLD, True),
        ("/ip6/fe80::1/tcp/1", Scope.MACHINE, False),
        ("/ip4/169.254.169.254/tcp/80", Scope.MACHINE, False),
    ],
)
def test_nobody_from_outside_names_addresses_inside(address: str, narrowest: Scope, *, taken: bool) -> None:
    book = AddressBook(new_identity().peer)
    number = book.intern_untrusted(new_identity().peer, (address,), narrowest)
    assert (number is not None) == taken


def test_groups_are_networks_of_the_world() -> None:
    book = AddressBook(new_identity().peer)

    def group(address: str) -> int:
        number = book.intern_untrusted(new_identity().peer, (address,), Scope.MACHINE)
        assert number is not None
        return book.group_of(number)

    assert group("/ip4/127.0.0.1/tcp/1") == group("/ip4/192.168.1.1/tcp/1") == 0
    assert group("/ip4/8.8.8.8/tcp/1") == group("/ip4/8.8.4.4/tcp/1") != group("/ip4/8.9.4.4/tcp/1")
    assert group("/ip6/2001:4860:1::1/tcp/1") == group("/ip6/2001:4860:2::1/tcp/1") != 0


def test_a_damaged_peer_cache_is_worth_nothing(tmp_path: Path) -> None:
    files = OverlayFiles(tmp_path)
    assert files.load_peers_untrusted() == ()
    peer = CachedPeer(new_identity().peer, ("/ip4/127.0.0.1/tcp/1",))
    files.save_peers((peer,) * 300)
    assert files.load_peers_untrusted() == (peer,) * 256
    path = tmp_path / "overlay" / "peers"
    data = path.read_bytes()
    for damaged in (b"", data[:100], b"\xff" * 50, data + b"x", b"\x00" * 10_000_000):
        path.write_bytes(damaged)
        assert files.load_peers_untrusted() == ()
    files.save_value("coordinate", b"\x01")
    assert files.load_values_untrusted() == {"coordinate": b"\x01"}
    with pytest.raises(ValueError, match="can not be kept"):
        files.save_value("../x", b"")


def test_a_full_disk_keeps_what_was_there_and_no_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OverlayFiles(tmp_path)
    files.save_value("a", b"1")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    files.save_value("a", b"22")
    files.save_value("b", b"1")
    with pytest.raises(IdentityError, match="No space left"):
        load_or_create_identity(tmp_path / "identity")
    assert files.load_values_untrusted() == {"a": b"1"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["value-a"]


async def test_reaching_nobody_says_so(network: Network) -> None:
    nodes = await network.grow(2)
    with trio.fail_after(PATIENCE_S), pytest.raises(PeerUnreachable):
        await nodes[0].overlay.reach(new_identity().peer)


def test_names_of_keys(until: Callable) -> None:
    from node.overlay.names import key_of_name

    peer = new_identity().peer
    assert key_of_name(peer) == key_of_peer(peer)
    assert key_of_name("role:coordinator") == key_of_role("coordinator")
    assert key_of_name("role:coordinator@eu") == key_of_role("coordinator", "eu")
    assert key_of_name("f" * 64) == (1 << 256) - 1
    for wrong in ("", "role:", "nonsense", "sha256:1", "x" * 1000, "role:" + "x" * 1000):
        with pytest.raises(ValueError, match="known forms"):
            key_of_name(wrong)
