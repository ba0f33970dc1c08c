"""Which links are opened and which end: the peer table over streams in memory, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

import pytest
import trio
import trio.testing

from node.identity import new_identity
from node.p2p import Unreachable
from node.peers import PeerChanged, PeerDown, Peers, PeersConfig, PeerUp, open_peers
from node.reach import MAX_ADDRESSES_TRIED
from node.rpc import PeerUnreachable
from node.streams import MemoryStream, memory_stream_pair
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

CONFIG = PeersConfig()
IDLE_S = CONFIG.idle_ns / SECOND_NS


class MemoryHost:
    """What the peer table uses of a host, with streams in memory. `hosts`: who can be dialled, by address."""

    def __init__(self, hosts: dict[str, MemoryHost], nursery: trio.Nursery) -> None:
        self.peer = new_identity().peer
        self.addresses = (f"/ip4/127.0.0.1/tcp/{len(hosts) + 1}/p2p/{self.peer}",)
        self.hosts = hosts
        self.nursery = nursery
        self.handlers: dict[str, Callable[[Any], Awaitable[None]]] = {}
        self.streams: dict[PeerId, list[MemoryStream]] = {}
        self.silent: dict[PeerId, float] = {}  # peers that froze, and since when
        self.held: set[PeerId] = set()
        self.dialled: list[str] = []
        self.dial_s = 0.05
        hosts[self.addresses[0]] = self

    def handle(self, protocol: str, handler: Callable[[Any], Awaitable[None]]) -> None:
        self.handlers[protocol] = handler

    def subscribe(self, _: object) -> Callable[[], None]:
        return lambda: None

    async def connect(self, address: str) -> PeerId:
        self.dialled.append(address)
        await trio.sleep(self.dial_s)
        other = self.hosts.get(address)
        if other is None:
            raise Unreachable("connection refused")
        self.streams.setdefault(other.peer, [])
        other.streams.setdefault(self.peer, [])
        return other.peer

    async def open_stream(self, peer: PeerId, protocol: str) -> MemoryStream:
        if peer not in self.streams:
            raise Unreachable("not connected")
        [other] = [host for host in self.hosts.values() if host.peer == peer]
        await trio.sleep(0.01)
        mine, theirs = memory_stream_pair(self.peer, peer)
        self.streams[peer].append(mine)
        other.streams[self.peer].append(theirs)
        other.nursery.start_soon(other.handlers[protocol], theirs)
        return mine

    async def disconnect(self, peer: PeerId, reason: str = "") -> None:
        await trio.lowlevel.checkpoint()
        for stream in self.streams.pop(peer, ()):
            stream.reset()
        for host in self.hosts.values():
            if host.peer == peer:
                host.streams.pop(self.peer, None)

    def heard_at(self, peer: PeerId) -> float | None:
        if peer not in self.streams:
            return None
        return self.silent.get(peer, trio.current_time())

    def streams_of(self, peer: PeerId) -> int:
        return sum(stream._out.broken is None for stream in self.streams.get(peer, ()))

    def connected(self) -> tuple[PeerId, ...]:
        return tuple(self.streams)

    def remote_of(self, peer: PeerId) -> str | None:
        return "127.0.0.1:1" if peer in self.streams else None

    def is_held(self, peer: PeerId) -> bool:
        return peer in self.held

    def paths(self, _: PeerId) -> tuple[()]:
        return ()


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.hosts: dict[str, MemoryHost] = {}
        self.nursery = nursery

    async def add(self, config: PeersConfig = CONFIG) -> tuple[MemoryHost, Peers]:
        host = MemoryHost(self.hosts, self.nursery)
        return host, await self.nursery.start(self._run, host, config)

    async def _run(self, host: MemoryHost, config: PeersConfig, task_status: trio.TaskStatus[Peers]) -> None:
        hello, dice = Hello(host.peer[-4:], "0"), Dice(len(self.hosts))
        async with open_peers(cast("Any", host), hello=hello, config=config, dice=dice) as peers:
            task_status.started(peers)
            await trio.sleep_forever()


@pytest.fixture
async def world() -> AsyncGenerator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


async def test_however_many_want_a_link_one_dial_runs(world: World, autojump_clock) -> None:
    (a, pa), (b, pb) = await world.add(), await world.add()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(pa.reach, b.peer, b.addresses)
    assert a.dialled == [b.addresses[0]]
    assert pa.up() == (b.peer,)
    assert pb.up() == (a.peer,)
    await pa.reach(b.peer, ())  # up already
    assert len(a.dialled) == 1


async def test_one_caller_gives_up_and_the_others_still_get_their_link(world: World, autojump_clock) -> None:
    (a, pa), (b, _) = await world.add(), await world.add()
    a.dial_s = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pa.reach, b.peer, b.addresses)
        with trio.move_on_after(0.5) as gave_up:
            await pa.reach(b.peer, b.addresses)
        assert gave_up.cancelled_caught
    assert pa.up() == (b.peer,)


async def test_a_dial_that_nobody_waits_for_ends_and_can_be_made_anew(world: World, autojump_clock) -> None:
    (a, pa), (b, _) = await world.add(), await world.add()
    a.dial_s = 2.0
    with trio.move_on_after(1):
        await pa.reach(b.peer, b.addresses)
    await trio.sleep(5)
    assert pa.up() == ()
    with trio.move_on_after(1):
        await pa.reach(b.peer, b.addresses)
    await pa.reach(b.peer, b.addresses)  # while the one before is being wound up
    assert pa.up() == (b.peer,)


async def test_addresses_are_tried_in_order_and_failed_ones_rest(world: World, autojump_clock) -> None:
    (a, pa), (b, _) = await world.add(), await world.add()
    wrong = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{b.peer}" for port in range(9000, 9020)]
    await pa.reach(b.peer, [*wrong[:2], *b.addresses])
    assert a.dialled == [*wrong[:2], *b.addresses]
    await a.disconnect(b.peer)
    await trio.sleep(0.5)
    a.dialled.clear()
    await pa.reach(b.peer, [*wrong[:2], *b.addresses])
    assert a.dialled == [*b.addresses]  # the wrong ones failed a moment ago
    await a.disconnect(b.peer)
    await trio.sleep(10)
    a.dialled.clear()
    await pa.reach(b.peer, [wrong[0], *b.addresses])
    assert a.dialled == [wrong[0], *b.addresses]
    await a.disconnect(b.peer)
    await trio.sleep(3)
    a.dialled.clear()
    with pytest.raises(PeerUnreachable, match="a moment ago"):
        await pa.reach(b.peer, wrong[:1])  # twice as long now
    pa.forgive(wrong[0])
    with pytest.raises(PeerUnreachable, match="refused"):
        await pa.reach(b.peer, wrong[:1])
    a.dialled.clear()
    with pytest.raises(PeerUnreachable):
        await pa.reach(b.peer, wrong[2:])
    assert len(a.dialled) == MAX_ADDRESSES_TRIED
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await pa.reach(new_identity().peer)
    with pytest.raises(PeerUnreachable, match="itself"):
        await pa.reach(a.peer, a.addresses)


async def test_an_unused_link_ends_in_order_and_a_used_one_stays(world: World, autojump_clock) -> None:
    (a, pa), (b, pb), (c, _) = await world.add(), await world.add(), await world.add()
    downs: list[PeerDown] = []
    pb.subscribe(lambda event: downs.append(event) if isinstance(event, PeerDown) else None)
    pb.serve_notice("news", HELLO, lambda *_: None)
    await pa.reach(b.peer, b.addresses)
    await pa.reach(c.peer, c.addresses)
    for _ in range(10):
        await trio.sleep(IDLE_S / 4)
        pa.notify(b.peer, "news", Hello("x", "0"))
    assert pa.up() == (b.peer,)
    assert c.peer not in a.streams  # its connection went with it
    await trio.sleep(IDLE_S + 5)
    assert pa.up() == pb.up() == ()
    assert [(down.peer, down.orderly) for down in downs] == [(a.peer, True)]
    await pa.reach(b.peer, b.addresses)
    assert pa.up() == (b.peer,)


async def test_links_that_somebody_needs_stay(world: World, autojump_clock) -> None:
    (a, pa), (b, pb) = await world.add(), await world.add()
    (pinned, _), (kept, _), (working, _), (held, _) = [await world.add() for _ in range(4)]
    pa.keep(kept.addresses[0])
    for host in (b, pinned, working, held):
        await pa.reach(host.peer, host.addresses)
    release = pa.pin(pinned.peer)
    a.held.add(held.peer)

    async def work(_: object) -> None:
        await trio.sleep_forever()

    working.handle("/job/1", work)
    job = await a.open_stream(working.peer, "/job/1")
    await trio.sleep(10 * IDLE_S)
    assert set(pa.up()) == {pinned.peer, kept.peer, working.peer, held.peer}
    release()
    release()
    job.reset()
    pa.forget(kept.addresses[0])
    a.held.clear()
    await trio.sleep(2 * IDLE_S)
    assert pa.up() == ()
    assert pb.up() == ()


async def test_on_demand_links_are_bounded_and_the_one_unused_for_longest_goes(
    world: World, autojump_clock
) -> None:
    config = PeersConfig(max_on_demand=4)
    _, pa = await world.add(config)
    others = [await world.add() for _ in range(8)]
    for host, _ in others:
        await pa.reach(host.peer, host.addresses)
        await trio.sleep(1)
        pa.notify(others[0][0].peer, "news", Hello("x", "0"))
    await trio.sleep(1)
    hosts = [host.peer for host, _ in others]
    assert set(pa.up()) == {hosts[0], *hosts[5:]}
    async with trio.open_nursery() as nursery:  # a burst never holds more either
        for host, _ in others:
            nursery.start_soon(pa.reach, host.peer, host.addresses)
    await trio.testing.wait_all_tasks_blocked()
    assert len(pa.up()) == 4


async def test_strangers_are_bounded_and_do_not_push_out_who_is_in_use(world: World, autojump_clock) -> None:
    config = PeersConfig(max_strangers=3)
    hub, peers = await world.add(config)
    others = [await world.add() for _ in range(6)]
    for _, other in others[:3]:
        await other.reach(hub.peer, hub.addresses)
    with pytest.raises(PeerUnreachable, match="as many links are in use"):
        await others[3][1].reach(hub.peer, hub.addresses)
    assert set(peers.up()) == {host.peer for host, _ in others[:3]}
    await trio.sleep(30)
    for _, other in others[1:3]:
        other.notify(hub.peer, "news", Hello("x", "0"))
    peers.notify(others[1][0].peer, "news", Hello("x", "0"))
    peers.notify(others[2][0].peer, "news", Hello("x", "0"))
    await others[4][1].reach(hub.peer, hub.addresses)
    await trio.sleep(1)
    assert set(peers.up()) == {host.peer for host, _ in (others[1], others[2], others[4])}
    peers.pin(others[5][0].peer)  # somebody whom we want is no stranger
    await others[5][1].reach(hub.peer, hub.addresses)
    assert others[5][0].peer in peers.up()


async def test_a_quiet_link_costs_a_ping_now_and_then_and_dead_ones_are_found(
    world: World, autojump_clock
) -> None:
    config = PeersConfig(idle_ns=3600 * SECOND_NS)
    (a, pa), (b, pb) = await world.add(config), await world.add(config)
    await pa.reach(b.peer, b.addresses)
    await trio.sleep(30)
    trips: list[int] = []
    pa.subscribe_round_trips(lambda _, rtt_ns: trips.append(rtt_ns))
    await trio.sleep(600)
    assert 25 <= len(trips) <= 35  # each 20 s, not each second
    assert pa.up() == (b.peer,)
    a.silent[b.peer] = trio.current_time()
    began = trio.current_time()
    with trio.fail_after(60):
        while pa.up():  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.1)
    assert trio.current_time() - began < 26  # a heartbeat, then the patience of four seconds
    assert pb.up() == ()


async def test_a_peer_in_use_is_found_dead_within_five_seconds(world: World, autojump_clock) -> None:
    (a, pa), (b, _) = await world.add(), await world.add()
    await pa.reach(b.peer, b.addresses)
    pa.pin(b.peer)
    await trio.sleep(60)
    a.silent[b.peer] = began = trio.current_time()
    with trio.fail_after(60):
        while pa.up():  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.1)
    assert trio.current_time() - began <= 5


async def test_a_link_that_wakes_up_is_not_judged_by_its_sleep(world: World, autojump_clock) -> None:
    (a, pa), (b, _) = await world.add(), await world.add()
    await pa.reach(b.peer, b.addresses)
    await trio.sleep(40)
    a.silent[b.peer] = pa._known[b.peer].pinged_at + 0.1  # its last answer; nothing was due since
    assert trio.current_time() - a.silent[b.peer] > CONFIG.dead_after_ns / SECOND_NS
    release = pa.pin(b.peer)
    await trio.sleep(2)
    del a.silent[b.peer]
    await trio.sleep(10)
    assert pa.up() == (b.peer,)
    release()


async def test_connections_on_which_nothing_is_said_end(world: World, autojump_clock) -> None:
    (a, pa), (b, pb) = await world.add(), await world.add()
    await a.connect(b.addresses[0])
    assert b.connected() == (a.peer,)
    await trio.sleep(CONFIG.streamless_ns / SECOND_NS + 3)
    assert a.connected() == b.connected() == ()
    await a.connect(b.addresses[0])
    pa.pin(b.peer)
    pb.pin(a.peer)
    await trio.sleep(10 * CONFIG.streamless_ns / SECOND_NS)
    assert b.connected() == (a.peer,)


async def test_what_a_peer_says_of_itself_may_change(world: World, autojump_clock) -> None:
    (a, pa), (b, pb) = await world.add(), await world.add()
    await pa.reach(b.peer, b.addresses)
    events: list[object] = []
    pa.subscribe(events.append)
    pb.subscribe(events.append)
    for peers, host, other in ((pa, a, pb), (pb, b, pa)):
        said = Hello("new", "1", ("role",), host.addresses)
        peers.introduce(said)
        peers.introduce(said)
        await trio.testing.wait_all_tasks_blocked()
        assert other.hello(host.peer) == said
        assert events == [PeerChanged(host.peer, said)]
        events.clear()
    await a.disconnect(b.peer)
    await trio.testing.wait_all_tasks_blocked()
    events.clear()
    await pa.reach(b.peer, b.addresses)
    up = [event for event in events if isinstance(event, PeerUp)]
    assert {(event.peer, event.hello.version) for event in up} == {(a.peer, "1"), (b.peer, "1")}
