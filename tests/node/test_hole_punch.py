"""Direct connections out of relayed ones. Real NATs: nat/test_nat_namespaces.py."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from node.identity import new_identity
from node.p2p import Host, PeerDirect, StreamBroken, open_host, parse_address
from node.p2p.hole_punch import ATTEMPTS, HolePuncher
from node.p2p.identify import serve_identify
from node.p2p.nat import Nat, NatConfig, open_nat
from node.p2p.nat_messages import (
    DCUTR_PROTOCOL,
    PunchConnect,
    PunchSync,
    encode_punch,
    receive_message_untrusted,
    send_message,
)
from node.p2p.reachability import Reachability
from node.p2p.relay_client import RelayClientConfig
from node.p2p.sockets import PortBusy, dial, source_for
from node.p2p.transport import Path, SocketTransport
from node.peers import open_peers
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.ids import PeerId

PATIENCE_S = 30


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@dataclass
class Scene:
    """An Island at a relay, and a gateway that may meet it there."""

    relay: Host
    island: Host
    gateway: Host
    island_nat: Nat
    gateway_nat: Nat

    @property
    def address(self) -> str:
        return f"{self.relay.listening[0]}/p2p-circuit/p2p/{self.island.peer}"

    def directly(self) -> bool:
        return any(path.relay is None for path in self.gateway.paths(self.island.peer))


@asynccontextmanager
async def scene(until, *, identify: bool = False, **config: object) -> AsyncGenerator[Scene]:
    def nat_of(host: Host, **more: object):
        settings = NatConfig(
            relay_client=RelayClientConfig(backoff_first_s=0.05),
            **{"private_addresses": True, "retire_s": 0.5, "punch_gap_s": 0.2, **config, **more},  # type: ignore[arg-type]
        )
        return open_nat(host, settings, dice=Dice(5), unix_now_s=lambda: int(time.time()))

    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity()) as island,
        open_host(new_identity()) as gateway,
        nat_of(relay, serve_relay=True, assume=Reachability.PUBLIC),
        nat_of(island, relays=(relay.listening[0],), assume=Reachability.PRIVATE) as island_nat,
        nat_of(gateway, assume=Reachability.PRIVATE) as gateway_nat,
    ):
        serve_identify(relay, agent="test/1")
        if identify:
            serve_identify(gateway, agent="test/1")
        await until(lambda: island_nat.relay_client.relays)
        yield Scene(relay, island, gateway, island_nat, gateway_nat)


async def test_a_relayed_connection_becomes_a_direct_one(until) -> None:
    async with scene(until) as s:
        events = []
        s.gateway_nat.subscribe(events.append)
        await s.gateway.connect(s.address)
        await until(lambda: s.island_nat.puncher.counters.punched == 1)
        await until(lambda: [path.relay for path in s.gateway.paths(s.island.peer)] == [None])
        await until(lambda: [path.relay for path in s.island.paths(s.gateway.peer)] == [None])
        assert PeerDirect(s.island.peer) in events
        assert s.island_nat.puncher.counters.dialled == 0
        # The hole lets in no second connection: what is bulk shares this one.
        s.island.handle("/rows/1", echo, bulk=True)
        stream = await s.gateway.open_bulk_stream(s.island.peer, "/rows/1")
        assert not stream.path.bulk
        assert s.gateway.dialled_at(s.island.peer) is s.island.dialled_at(s.gateway.peer) is None
        assert s.gateway.bulk_connections(s.island.peer) == 0


async def test_a_peer_that_can_be_dialled_is(until) -> None:
    async with scene(until, identify=True) as s:
        await s.gateway.connect(s.address)
        await until(lambda: s.island_nat.puncher.counters.dialled == 1)
        assert s.directly()


async def test_the_rpc_link_moves_and_calls_on_it_are_not_lost(until) -> None:
    async with scene(until, retire_s=20.0) as s:
        release = trio.Event()

        async def slow(_: PeerId, hello: Hello) -> Hello:
            await release.wait()
            return hello

        hello = Hello("test", "0", ("island",))
        async with (
            open_peers(s.island, hello=hello, dice=Dice(1)) as island,
            open_peers(s.gateway, hello=hello, dice=Dice(2)) as gateway,
        ):
            island.serve("slow", HELLO, slow)
            events = []
            gateway.subscribe(events.append)
            await s.gateway.connect(s.address)
            await gateway.reach(s.island.peer, [s.address])
            first = gateway._known[s.island.peer].link
            answers = []

            async def call() -> None:
                answers.append(await gateway.call(s.island.peer, "slow", hello, HELLO, deadline_ns=20 * 10**9))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await until(s.directly)
                if first._stream.path.relay is not None:  # else it was opened after the hole was punched
                    await until(lambda: gateway._known[s.island.peer].link is not first)
                release.set()
            assert answers == [hello]
            assert gateway._known[s.island.peer].link._stream.path.relay is None
            assert [type(event).__name__ for event in events] == ["PeerUp"]


async def test_addresses_that_are_not_public_are_not_dialled(until) -> None:
    came = []

    async def victim(stream) -> None:
        came.append(stream)

    async with scene(until, private_addresses=False) as s, trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, victim, [listener])
        target = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        s.island_nat.puncher._upgrades._burst = 0  # type: ignore[misc]  # the test plays the Island
        await s.gateway.connect(s.address)
        stream = await s.island.open_stream(s.gateway.peer, DCUTR_PROTOCOL)
        with trio.fail_after(PATIENCE_S):
            await send_message(stream, encode_punch(PunchConnect((target, "/ip4/10.0.0.1/tcp/80"))))
            await receive_message_untrusted(stream)
            await send_message(stream, encode_punch(PunchSync()))
            assert await stream.receive_some() == b""  # done, without a dial
        assert came == []
        assert not s.directly()
        nursery.cancel_scope.cancel()


def test_a_neighbour_behind_the_same_nat_may_be_met_at_home() -> None:
    """Its private address is dialled only if we share the public one."""

    class OfHost:
        listening = ("/ip4/192.168.1.5/tcp/4001",)

    class Own:
        def __init__(self, *ips: str) -> None:
            self._ips = frozenset(ips)

        def ips(self) -> frozenset[str]:
            return self._ips

    told = [
        "/ip4/8.8.4.4/tcp/4001",
        "/ip4/192.168.1.9/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001",
        "/ip4/192.168.1.5/tcp/4001",
        "/ip4/10.0.0.1/tcp/80",
        "/dns4/x.example/tcp/1",
    ]
    puncher = HolePuncher.__new__(HolePuncher)
    puncher._host, puncher._private_addresses = OfHost(), False  # type: ignore[assignment]
    puncher._own = Own("8.8.4.4")  # type: ignore[assignment]
    assert [address.host for address in puncher._targets(told)] == ["8.8.4.4", "192.168.1.9"]
    puncher._own = Own("9.9.9.9")  # type: ignore[assignment]
    assert [address.host for address in puncher._targets(told)] == ["8.8.4.4"]
    many = [f"/ip4/8.8.4.{n}/tcp/1" for n in range(100)]
    assert len(puncher._targets(many)) == 4


async def test_who_answers_and_is_not_the_peer_is_not_dialled_again_and_again(until) -> None:
    came = []

    async def victim(stream) -> None:
        came.append(stream)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n")

    async with scene(until) as s, trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, victim, [listener])
        target = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        s.island_nat.puncher._upgrades._burst = 0  # type: ignore[misc]  # the test plays the Island
        await s.gateway.connect(s.address)
        stream = await s.island.open_stream(s.gateway.peer, DCUTR_PROTOCOL)
        with trio.fail_after(PATIENCE_S):
            await send_message(stream, encode_punch(PunchConnect((target,))))
            await receive_message_untrusted(stream)
            await send_message(stream, encode_punch(PunchSync()))
            assert await stream.receive_some() == b""
        assert len(came) == 2
        nursery.cancel_scope.cancel()


async def test_it_is_served_only_to_who_was_dialled_through_a_relay(until) -> None:
    async with scene(until, hole_punching=False) as s:
        await s.gateway.connect(s.address)
        # The side that was dialled does not serve, and nobody does on a direct connection.
        for host, peer in ((s.gateway, s.island.peer), (s.gateway, s.relay.peer)):
            stream = await host.open_stream(peer, DCUTR_PROTOCOL)
            with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
                await stream.receive_some()


@pytest.mark.parametrize("data", [b"\x05hello", b"\x00", b"\x03\x08\xac\x02", b"\xff\xff\xff"])
async def test_garbage_fails_that_attempt_only(data: bytes, until) -> None:
    async with scene(until, hole_punching=False) as s:
        await s.gateway.connect(s.address)
        stream = await s.island.open_stream(s.gateway.peer, DCUTR_PROTOCOL)
        await stream.send_all(data)
        with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
            await stream.receive_some()
        assert s.gateway.counters.handler_failures == 0
        assert not s.gateway_nat.puncher._running


async def test_when_no_hole_can_be_had_the_connection_stays_relayed(until, monkeypatch) -> None:
    monkeypatch.setattr("node.p2p.hole_punch.PUNCH_S", 0.3)

    async def echo(stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)

    async with scene(until, private_addresses=False) as s:  # on loopback nothing is public
        s.island.handle("/echo/1", echo)
        await s.gateway.connect(s.address)
        await until(lambda: s.island_nat.puncher.counters.failed == 1)
        assert not s.directly()
        stream = await s.gateway.open_stream(s.island.peer, "/echo/1")
        await stream.send_all(b"hello")
        with trio.fail_after(PATIENCE_S):
            assert await stream.receive_some() == b"hello"
        assert ATTEMPTS == 3
        # Who comes again and again is not punched at for ever.
        for _ in range(6):
            s.island_nat.puncher.begin(s.gateway.peer)
            await until(lambda: not s.island_nat.puncher._running)
        assert s.island_nat.puncher.counters.begun == 4


async def test_sockets_that_meet_in_the_middle_become_one_connection(until) -> None:
    """TCP simultaneous open: both dial from their listening ports; the roles are agreed before."""
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        [(_, port_a)], [(_, port_b)] = a.endpoints, b.endpoints
        outcome = []

        async def one(host: Host, other: Host, port: int, *, speaks_first: bool) -> None:
            target = parse_address(f"/ip4/127.0.0.1/tcp/{port}")
            try:
                transport = SocketTransport(await dial(target, source_for(target, host.endpoints)))
            except PortBusy:
                outcome.append("busy")  # the other's dial was taken by our listener
                return
            if speaks_first:
                await host.join_outbound(transport, other.peer, Path())
            else:
                await host.join_inbound(transport, Path(inbound=True), expected=other.peer)
            outcome.append("met")

        with trio.fail_after(PATIENCE_S), a.expect_punches([f"127.0.0.1:{port_b}"], b.peer):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: one(a, b, port_b, speaks_first=True))
                nursery.start_soon(lambda: one(b, a, port_a, speaks_first=False))
            await until(lambda: a.connected() == (b.peer,) and b.connected() == (a.peer,))
        assert "met" in outcome
