"""Relays: places, circuits, their bounds, and what liars get out of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import trio

from node.identity import new_identity
from node.p2p import AddressInvalid, Host, HostLimits, ListenFailed, StreamBroken, Unreachable, open_host
from node.p2p.errors import ChannelBroken
from node.p2p.nat_messages import (
    HOP_PROTOCOL,
    STATUS_OK,
    STATUS_PERMISSION_DENIED,
    STOP_PROTOCOL,
    ConnectRequest,
    HopStatus,
    ReserveRequest,
    StopConnect,
    decode_hop_request_untrusted,
    decode_hop_status_untrusted,
    decode_stop_status_untrusted,
    encode_hop_request,
    encode_hop_status,
    encode_stop_connect,
    receive_message_untrusted,
    send_message,
)
from node.p2p.noise import HandshakeFailed
from node.p2p.relay_client import MAX_CANDIDATES, RelayClient, RelayClientConfig
from node.p2p.relay_dial import StreamTransport
from node.p2p.relay_service import RelayLimits, RelayService, _Throttle
from node.peer_types import PeersConfig
from node.peers import open_peers
from protocol.adverts import Hello
from protocol.dice import Dice
from protocol.instants import SECOND_NS

PATIENCE_S = 30
QUICK = RelayClientConfig(renew_s=0.2, min_renew_s=0.1, backoff_first_s=0.05, backoff_max_s=0.2)


def unix_now_s() -> int:
    return int(time.time())


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@dataclass
class Meeting:
    """A relay, an Island with a place there, and somebody who wants to meet it."""

    relay: Host
    service: RelayService
    island: Host
    client: RelayClient
    gateway: Host
    came: list

    @property
    def address(self) -> str:
        return f"{self.relay.addresses[0]}/p2p-circuit/p2p/{self.island.peer}"


@asynccontextmanager
async def meeting(
    limits: RelayLimits | None = None,
    config: RelayClientConfig = QUICK,
    *,
    island_limits: HostLimits | None = None,
    wait: bool = True,
) -> AsyncGenerator[Meeting]:
    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity(), limits=island_limits or HostLimits()) as island,
        open_host(new_identity()) as gateway,
        trio.open_nursery() as nursery,
    ):
        came: list = []
        changed = trio.Event()
        service = RelayService(relay, limits or RelayLimits(), unix_now_s=unix_now_s)
        client = RelayClient(
            island, config, dice=Dice(1), unix_now_s=unix_now_s, on_circuit=came.append, changed=changed.set
        )
        client.offer(relay.addresses[0])
        nursery.start_soon(client.run)
        island.handle("/echo/1", echo)
        gateway.handle("/echo/1", echo)
        if wait:
            with trio.fail_after(PATIENCE_S):
                await changed.wait()
        yield Meeting(relay, service, island, client, gateway, came)
        nursery.cancel_scope.cancel()


async def ask(host: Host, relay: Host, request) -> HopStatus:
    """One request to a relay, by hand."""
    await host.connect(relay.addresses[0])
    stream = await host.open_stream(relay.peer, HOP_PROTOCOL)
    with trio.fail_after(PATIENCE_S):
        await send_message(stream, encode_hop_request(request))
        answer = decode_hop_status_untrusted(await receive_message_untrusted(stream))
    if answer.status != STATUS_OK or isinstance(request, ReserveRequest):
        await stream.aclose()
    return answer


async def test_a_peer_is_met_through_a_relay_and_streams_go_both_ways() -> None:
    async with meeting() as m:
        assert m.client.addresses == (m.address,)
        assert await m.gateway.connect(m.address) == m.island.peer
        assert m.gateway.remote_of(m.island.peer) == f"relayed by {m.relay.peer}"
        assert [path.relay for path in m.gateway.paths(m.island.peer)] == [m.relay.peer]
        assert [path.inbound for path in m.island.paths(m.gateway.peer)] == [True]
        assert m.came == [m.gateway.peer]
        blob = bytes(range(256)) * 4096
        for here, there in ((m.gateway, m.island), (m.island, m.gateway)):
            stream = await here.open_stream(there.peer, "/echo/1")
            got = bytearray()
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, blob)
                    while len(got) < len(blob):
                        got += await stream.receive_some()
            assert got == blob
            await stream.aclose()
        assert m.service.counters.circuits_opened == m.service.circuits == 1
        assert m.service.counters.bytes_relayed > 4 * len(blob)


async def test_bulk_for_a_peer_at_a_relay_waits_for_none_of_its_plain_addresses(until) -> None:
    """Behind a router they lead nowhere, and nobody says so."""

    async def say_nothing(stream) -> None:
        await stream.receive_some()
        await trio.sleep_forever()

    patient = HostLimits(handshake_s=10 * PATIENCE_S, bulk_dial_s=10 * PATIENCE_S)
    async with (
        meeting() as m,
        open_host(new_identity(), limits=patient) as here,
        open_host(new_identity(), limits=patient) as other,
        trio.open_nursery() as nursery,
    ):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say_nothing, [listener])
        dead = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{m.island.peer}"
        m.island.handle("/rows/1", echo, bulk=True)
        with trio.fail_after(PATIENCE_S):
            stream = await here.open_bulk_stream(m.island.peer, "/rows/1", (dead, m.address))
            assert stream.path.relay == m.relay.peer
            await stream.send_all(b"rows")
            assert await stream.receive_some() == b"rows"
            # Who stands by is met there in advance, too.
            await other.warm_bulk(m.island.peer, "/rows/1", (dead, m.address))
            assert [path.relay for path in other.paths(m.island.peer)] == [m.relay.peer]
        nursery.cancel_scope.cancel()


async def test_who_has_learnt_of_a_relay_waits_for_no_dial_from_before(until) -> None:
    """A spare may be dialled in advance before it has told that it is behind a NAT."""
    reached: list[object] = []

    async def say_nothing(stream) -> None:
        reached.append(stream)
        await trio.sleep_forever()

    patient = HostLimits(handshake_s=10 * PATIENCE_S, bulk_dial_s=10 * PATIENCE_S)
    async with (
        meeting() as m,
        open_host(new_identity(), limits=patient) as here,
        trio.open_nursery() as nursery,
    ):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say_nothing, [listener])
        dead = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{m.island.peer}"
        m.island.handle("/rows/1", echo, bulk=True)
        nursery.start_soon(here.warm_bulk, m.island.peer, "/rows/1", (dead,))
        nursery.start_soon(here.connect, dead)
        await until(lambda: len(reached) == 2)
        with trio.fail_after(PATIENCE_S):
            stream = await here.open_bulk_stream(m.island.peer, "/rows/1", (dead, m.address))
        assert stream.path.relay == m.relay.peer
        nursery.cancel_scope.cancel()


async def test_bulk_is_dialled_at_all_addresses_at_once() -> None:
    async def say_nothing(stream) -> None:
        await stream.receive_some()
        await trio.sleep_forever()

    patient = HostLimits(handshake_s=10 * PATIENCE_S)
    async with (
        open_host(new_identity()) as island,
        open_host(new_identity(), limits=patient) as here,
        trio.open_nursery() as nursery,
    ):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say_nothing, [listener])
        dead = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{island.peer}"
        island.handle("/rows/1", echo, bulk=True)
        with trio.fail_after(PATIENCE_S):
            stream = await here.open_bulk_stream(island.peer, "/rows/1", (dead, *island.addresses))
        assert stream.path.bulk
        assert here.bulk_connections(island.peer) == 1
        nursery.cancel_scope.cancel()


async def test_what_was_sent_before_closing_arrives_through_a_relay(until) -> None:
    got = bytearray()

    async def read(stream) -> None:
        while data := await stream.receive_some():
            got.extend(data)

    async with meeting() as m:
        m.gateway.handle("/read/1", read)
        async with open_host(new_identity()) as sender:
            gateway = RelayClient(
                m.gateway,
                QUICK,
                dice=Dice(2),
                unix_now_s=unix_now_s,
                on_circuit=lambda _: None,
                changed=lambda: None,
            )
            gateway.offer(m.relay.addresses[0])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gateway.run)
                await until(lambda: gateway.addresses)
                await sender.connect(gateway.addresses[0])
                nursery.cancel_scope.cancel()
            stream = await sender.open_stream(m.gateway.peer, "/read/1")
            await stream.send_all(bytes(200_000))
            await stream.aclose()
        await until(lambda: len(got) == 200_000)
        await until(lambda: sender.peer not in m.gateway.connected())


async def test_places_are_bounded_and_renewal_needs_no_new_one() -> None:
    async with meeting(RelayLimits(max_reservations=1)) as m:
        refused = await ask(m.gateway, m.relay, ReserveRequest())
        assert refused.status == 200
        await trio.sleep(0.5)  # the Island has renewed meanwhile
        assert m.service.reservations == 1
        assert m.service.counters.reservations_made == 1
        assert m.service.counters.reservations_refused == 1
    async with meeting(RelayLimits(max_reservations_per_ip=1)) as m:
        assert (await ask(m.gateway, m.relay, ReserveRequest())).status == 200


async def test_an_expired_place_is_gone() -> None:
    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity()) as island,
        open_host(new_identity()) as gateway,
    ):
        service = RelayService(relay, RelayLimits(reservation_s=1), unix_now_s=unix_now_s)
        assert (await ask(island, relay, ReserveRequest())).status == STATUS_OK
        assert relay.is_held(island.peer)
        await trio.sleep(1.2)
        with pytest.raises(Unreachable, match="no reservation"):
            await gateway.connect(f"{relay.addresses[0]}/p2p-circuit/p2p/{island.peer}")
        assert service.reservations == 0
        assert not relay.is_held(island.peer)


async def test_who_disconnects_loses_its_place(until) -> None:
    async with meeting() as m:
        await m.relay.disconnect(m.island.peer)
        assert m.service.reservations == 0
        assert not m.relay.is_held(m.island.peer)
        await until(lambda: m.service.reservations == 1)  # it comes back by itself
        await until(lambda: m.client.addresses == (m.address,))


async def test_circuits_are_bounded_per_peer_and_in_all() -> None:
    for limits in (RelayLimits(max_circuits_per_peer=1), RelayLimits(max_circuits=1)):
        async with meeting(limits) as m, open_host(new_identity()) as other:
            await m.gateway.connect(m.address)
            with pytest.raises(Unreachable, match="limits"):
                await other.connect(m.address)
            await m.gateway.disconnect(m.island.peer)
            with trio.fail_after(PATIENCE_S):
                while m.service.circuits:  # noqa: ASYNC110 - there is no event
                    await trio.sleep(0.01)
            await other.connect(m.address)
            assert m.service._circuits == {other.peer: 1, m.island.peer: 1}


@pytest.mark.parametrize(
    "limits", [RelayLimits(circuit_bytes=300_000), RelayLimits(circuit_s=1, max_bytes_per_s=1_000_000)]
)
async def test_circuits_that_exceed_time_or_bytes_are_cut(limits: RelayLimits, until) -> None:
    async with meeting(limits) as m:
        await m.gateway.connect(m.address)
        stream = await m.gateway.open_stream(m.island.peer, "/echo/1")

        async def read() -> None:
            with suppress(StreamBroken):
                while await stream.receive_some():
                    pass

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                with suppress(StreamBroken):
                    while True:
                        await stream.send_all(bytes(10_000))
        assert m.service.counters.circuits_cut >= 1
        assert m.service.counters.bytes_relayed < 5_000_000
        await until(lambda: m.gateway.peer not in m.island.connected())
        await until(lambda: m.service.circuits == 0)
        await m.gateway.connect(m.address)  # and a new one may be made


async def test_requests_are_rated() -> None:
    async with meeting(RelayLimits(max_requests_per_minute=3), RelayClientConfig()) as m:
        answers = [await ask(m.gateway, m.relay, ConnectRequest(new_identity().peer)) for _ in range(5)]
        assert [answer.status for answer in answers] == [204, 204, 204, 201, 201]


async def test_bandwidth_is_shared_out(autojump_clock) -> None:
    throttle = _Throttle(1000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(11):
            nursery.start_soon(throttle.pass_, 1000)
    assert trio.current_time() - began == pytest.approx(10, abs=0.01)
    await trio.sleep(100)
    began = trio.current_time()
    await throttle.pass_(1000)  # unused time is not saved up, nor waited for
    assert trio.current_time() == began


async def test_a_reader_who_stops_makes_the_writer_wait_not_the_relay_hold() -> None:
    async def deaf(_) -> None:
        await trio.sleep_forever()

    async with meeting() as m:
        m.island.handle("/deaf/1", deaf)
        await m.gateway.connect(m.address)
        stream = await m.gateway.open_stream(m.island.peer, "/deaf/1")
        with trio.move_on_after(1) as scope:
            while True:
                await stream.send_all(bytes(50_000))
        assert scope.cancelled_caught
        assert m.service.counters.bytes_relayed < 1_000_000
        assert m.relay.unread_bytes < 1_000_000
        other = await m.gateway.open_stream(m.island.peer, "/echo/1")
        with trio.fail_after(PATIENCE_S):
            await other.send_all(b"still here")
            assert await other.receive_some() == b"still here"


async def test_relays_are_not_chained() -> None:
    """A relay's relayed peers get neither a place nor a circuit over that connection."""
    async with meeting() as m:
        RelayService(m.island, RelayLimits(), unix_now_s=unix_now_s)
        await m.gateway.connect(m.address)
        stream = await m.gateway.open_stream(m.island.peer, HOP_PROTOCOL)
        await send_message(stream, encode_hop_request(ReserveRequest()))
        with trio.fail_after(PATIENCE_S):
            answer = decode_hop_status_untrusted(await receive_message_untrusted(stream))
        assert answer.status == STATUS_PERMISSION_DENIED


async def test_a_peer_that_is_not_our_relay_brings_nobody() -> None:
    async with meeting() as m:
        await m.gateway.connect(m.island.addresses[0])
        stream = await m.gateway.open_stream(m.island.peer, STOP_PROTOCOL)
        await send_message(stream, encode_stop_connect(StopConnect(new_identity().peer, None)))
        with trio.fail_after(PATIENCE_S):
            status = decode_stop_status_untrusted(await receive_message_untrusted(stream))
        assert status == STATUS_PERMISSION_DENIED


async def test_a_relay_that_lies_about_who_comes_gains_nothing() -> None:
    """It says that somebody else comes; noise shows that it is the relay itself."""
    async with meeting() as m:
        stream = await m.relay.open_stream(m.island.peer, STOP_PROTOCOL)
        await send_message(stream, encode_stop_connect(StopConnect(m.gateway.peer, None)))
        with trio.fail_after(PATIENCE_S):
            assert decode_stop_status_untrusted(await receive_message_untrusted(stream)) == STATUS_OK
            liar = m.relay._upgrader
            with pytest.raises((HandshakeFailed, ChannelBroken)):
                await liar.dial(StreamTransport(stream), m.island.peer)
        assert m.island.connected() == (m.relay.peer,)
        assert m.came == []


@pytest.mark.parametrize("answer", [b"", b"\xff" * 10, b"\x02\x08\x02", b"\x03\x28\xc8\x01", b"\x81\x40"])
async def test_relays_that_answer_nonsense_are_left_for_better_ones(answer: bytes, until) -> None:
    async def nonsense(stream) -> None:
        await receive_message_untrusted(stream)
        await stream.send_all(answer)

    async with meeting(wait=False) as m, open_host(new_identity()) as liar:
        liar.handle(HOP_PROTOCOL, nonsense)
        m.client.offer(liar.addresses[0])
        await until(lambda: m.client.relays == (m.relay.peer,))
        with pytest.raises(Unreachable):
            await m.gateway.connect(f"{liar.addresses[0]}/p2p-circuit/p2p/{m.island.peer}")
        assert m.client.relays == (m.relay.peer,)
        assert m.gateway.counters.handler_failures == m.island.counters.handler_failures == 0


async def test_a_relay_whose_clock_is_wrong_is_not_asked_all_the_time() -> None:
    asked = []

    async def past(stream) -> None:
        decode_hop_request_untrusted(await receive_message_untrusted(stream))
        asked.append(trio.current_time())
        await send_message(stream, encode_hop_status(HopStatus(STATUS_OK, 1, ("/ip4/9.9.9.9/tcp/1",))))

    async with open_host(new_identity()) as relay, open_host(new_identity()) as island:
        relay.handle(HOP_PROTOCOL, past)
        client = RelayClient(
            island,
            RelayClientConfig(min_renew_s=0.5),
            dice=Dice(1),
            unix_now_s=unix_now_s,
            on_circuit=lambda _: None,
            changed=lambda: None,
        )
        client.offer(relay.addresses[0])
        with trio.move_on_after(1.4):
            await client.run()
        assert 1 <= len(asked) <= 3


async def test_garbage_to_a_relay_is_answered_and_harms_nobody(until) -> None:
    async with meeting() as m:
        await m.gateway.connect(m.relay.addresses[0])
        for data in (b"\x05hello", b"\x00", b"\x02\x08\x07"):
            stream = await m.gateway.open_stream(m.relay.peer, HOP_PROTOCOL)
            await stream.send_all(data)
            with trio.fail_after(PATIENCE_S):
                assert decode_hop_status_untrusted(await receive_message_untrusted(stream)).status == 400
        for data in (b"\x05hello", b"\xff\xff\xff"):
            stream = await m.relay.open_stream(m.island.peer, STOP_PROTOCOL)
            await stream.send_all(data)
            with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
                await stream.receive_some()
        assert m.relay.counters.handler_failures == m.island.counters.handler_failures == 0
        await m.gateway.connect(m.address)


async def test_another_relay_takes_over_when_one_dies(until) -> None:
    config = RelayClientConfig(places=1, backoff_first_s=0.05)
    async with meeting(config=config) as m, open_host(new_identity()) as second:
        RelayService(second, RelayLimits(), unix_now_s=unix_now_s)
        m.client.offer(second.addresses[0])
        m.relay.handlers.close()
        await m.relay.disconnect(m.island.peer)
        await until(lambda: m.client.relays == (second.peer,))
        await m.gateway.connect(m.client.addresses[0])


async def test_relayed_connections_are_bounded() -> None:
    async with (
        meeting(island_limits=HostLimits(max_relayed_connections=1)) as m,
        open_host(new_identity()) as other,
    ):
        await m.gateway.connect(m.address)
        with pytest.raises(Unreachable):
            await other.connect(m.address)
        assert m.island.connected() == (m.relay.peer, m.gateway.peer)


async def test_candidates_are_bounded_and_must_be_dialable() -> None:
    async with meeting() as m:
        for _ in range(MAX_CANDIDATES + 5):
            m.client.offer(f"/ip4/127.0.0.1/tcp/1/p2p/{new_identity().peer}")
        assert len(m.client._candidates) == MAX_CANDIDATES
        m.client.offer(m.island.addresses[0])  # itself: ignored
        with pytest.raises(AddressInvalid, match="behind a relay"):
            m.client.offer(m.address)
        with pytest.raises(AddressInvalid, match="reserves"):
            async with open_host(new_identity(), [m.address]):
                pass


async def test_a_direct_connection_is_preferred_and_the_relayed_one_retired(until) -> None:
    async with meeting() as m:
        events = []
        m.gateway.subscribe(events.append)
        await m.gateway.connect(m.address)
        old = await m.gateway.open_stream(m.island.peer, "/echo/1")
        await m.gateway.connect(m.island.listening[0])  # no-op: it is connected
        assert len(m.gateway.paths(m.island.peer)) == 1
        await m.gateway.connect(m.island.listening[0], over=lambda path: path.relay is None)
        assert type(events[-1]).__name__ == "PeerDirect"
        new = await m.gateway.open_stream(m.island.peer, "/echo/1")
        assert (old.path.relay, new.path.relay) == (m.relay.peer, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(m.gateway.retire_relayed, m.island.peer, 30.0)
            await trio.sleep(1.5)
            await old.send_all(b"not idle yet")
            assert await old.receive_some() == b"not idle yet"
            await old.aclose()
            await until(lambda: len(m.gateway.paths(m.island.peer)) == 1)
        await new.send_all(b"goes on")
        assert await new.receive_some() == b"goes on"


async def test_connections_that_hold_a_place_are_not_closed_for_want_of_use(until) -> None:
    config = PeersConfig(heartbeat_ns=SECOND_NS // 20, idle_ns=SECOND_NS // 10, streamless_ns=SECOND_NS // 10)
    hello = Hello("test", "0", ())
    async with (
        meeting() as m,
        open_peers(m.relay, hello=hello, config=config, dice=Dice(1)),
        open_peers(m.island, hello=hello, config=config, dice=Dice(2)),
        open_host(new_identity()) as idle,
    ):
        await idle.connect(m.relay.addresses[0])
        await until(lambda: not idle.connected())  # so much for those without a place
        assert m.service.counters.reservations_made == m.service.reservations == 1
        assert m.relay.is_held(m.island.peer)
        assert m.island.is_held(m.relay.peer)


async def test_two_programs_on_one_port_are_still_an_error() -> None:
    async with open_host(new_identity()) as first:
        with pytest.raises(ListenFailed, match="another program"):
            async with open_host(new_identity(), [first.listening[0].partition("/p2p/")[0]]):
                pass
