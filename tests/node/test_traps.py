"""The traps of the network library, one test each (docs/network.md lists them). Real sockets.

Each of these fails, hangs or corrupts with py-libp2p's own host.
"""

# ruff: noqa: SIM117 - hosts outlive what runs on them: the nesting shows it

from __future__ import annotations

import os
import signal
import socket
import warnings

import pytest
import trio
import trio.testing

from node.identity import new_identity
from node.p2p import HostLimits, StreamBroken, Unreachable, open_host
from node.peers import PeerDown, PeerUp, open_peers
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.instants import SECOND_NS

PATIENCE_S = 30  # machines are shared; every wait below ends long before


async def ask(stream, data: bytes = b"ping") -> None:
    """The stream still works."""
    with trio.fail_after(PATIENCE_S):
        await stream.send_all(data)
        got = b""
        while len(got) < len(data):
            more = await stream.receive_some()
            assert more
            got += more
    assert got == data


async def read_on(stream) -> None:
    while True:
        await stream.receive_some()


async def test_trap_1_an_exception_in_a_handler_costs_its_stream_only(connected_hosts) -> None:
    async def boom(_) -> None:
        raise RuntimeError("a bug")

    async def boom_in_a_nursery(stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(boom, stream)
            await trio.sleep_forever()

    async with connected_hosts() as (a, b):
        b.handle("/boom/1", boom)
        b.handle("/boom/2", boom_in_a_nursery)
        kept = await a.open_stream(b.peer, "/echo/1")
        for protocol in ("/boom/1", "/boom/2"):
            stream = await a.open_stream(b.peer, protocol)
            with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
                await stream.receive_some()
        await ask(kept)
        assert b.counters.handler_failures == 2


async def test_trap_2_cancelled_writes_leave_the_connection_whole(connected_hosts) -> None:
    async def sink(stream) -> None:
        await trio.sleep(0.02)
        while await stream.receive_some():
            pass

    async with connected_hosts() as (a, b):
        b.handle("/sink/1", sink)
        kept = await a.open_stream(b.peer, "/echo/1")
        blob = os.urandom(200_000)
        for round_ in range(60):
            stream = await a.open_stream(b.peer, "/sink/1")
            with trio.move_on_after(0.001 * (round_ % 12) + 0.0005):
                while True:
                    await stream.send_all(blob)
            stream.reset()
            await ask(kept, b"after %d" % round_)
        assert a.connected() == (b.peer,)


async def test_trap_3_bulk_and_opens_both_ways_do_not_freeze(connected_hosts, until) -> None:
    moved = {"a": 0, "b": 0, "opens": 0}

    async def sink(stream) -> None:
        while await stream.receive_some():
            pass

    async with connected_hosts() as (a, b):
        for host in (a, b):
            host.handle("/sink/1", sink)

        async def bulk(host, peer, name) -> None:
            stream = await host.open_stream(peer, "/sink/1")
            while True:
                await stream.send_all(bytes(200_000))
                moved[name] += 1

        async def opens(host, peer) -> None:
            while True:
                stream = await host.open_stream(peer, "/echo/1")
                await ask(stream)
                await stream.aclose()
                moved["opens"] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(bulk, a, b.peer, "a")
                nursery.start_soon(bulk, b, a.peer, "b")
                nursery.start_soon(opens, a, b.peer)
                nursery.start_soon(opens, b, a.peer)
            for _ in range(3):  # progress of each kind in each of three periods
                before = dict(moved)
                await trio.sleep(0.6)
                await until(lambda before=before: all(moved[key] - before[key] >= 3 for key in moved))
            nursery.cancel_scope.cancel()


async def test_trap_4_an_idle_reader_is_waited_for_and_buffers_are_bounded(connected_hosts) -> None:
    go = trio.Event()
    total = 8 * 1024 * 1024
    got = trio.Event()

    async def late(stream) -> None:
        await go.wait()
        size = 0
        while data := await stream.receive_some():
            size += len(data)
        assert size == total
        got.set()

    async with connected_hosts() as (a, b):
        b.handle("/late/1", late)
        stream = await a.open_stream(b.peer, "/late/1")
        kept = await a.open_stream(b.peer, "/echo/1")

        async def write() -> None:
            await stream.send_all(bytes(total))
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(1)
            await ask(kept)  # other streams are not behind it
            # No clock runs against the writer (the muxer's own test waits a day); it waits at its window.
            assert b.unread_bytes <= 256 * 1024
            go.set()
            with trio.fail_after(PATIENCE_S):
                await got.wait()


async def test_trap_5_segments_of_600_bytes(connected_hosts) -> None:
    """A proxy forwards in small pieces, as small as a bad link's packets."""
    async with open_host(new_identity()) as b, open_host(new_identity()) as a:

        async def echo(stream) -> None:
            while data := await stream.receive_some():
                await stream.send_all(data)

        b.handle("/echo/1", echo)
        port = int(b.addresses[0].split("/")[4])

        async def pump(source, target) -> None:
            while data := await source.receive_some(600):
                await target.send_all(data)

        async def proxy(client) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as nursery:
                nursery.start_soon(pump, client, server)
                await pump(server, client)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, proxy, [listener])
            address = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{b.peer}"
            await a.connect(address)
            stream = await a.open_stream(b.peer, "/echo/1")
            blob = os.urandom(500_000)
            async with trio.open_nursery() as both:
                both.start_soon(stream.send_all, blob)
                got = bytearray()
                with trio.fail_after(PATIENCE_S):
                    while len(got) < len(blob):
                        got += await stream.receive_some()
            assert got == blob
            await a.disconnect(b.peer)
            nursery.cancel_scope.cancel()


async def test_trap_7_dialling_waits_for_nothing_and_remembers_no_failure(peer_process) -> None:
    async with open_host(new_identity()) as a:
        identity = new_identity()
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer}"
        with pytest.raises(Unreachable, match="refused"):
            await a.connect(address)
        async with open_host(identity, [f"/ip4/127.0.0.1/tcp/{port}"]) as b:
            times = []
            for _ in range(5):
                began = trio.current_time()
                await a.connect(address)  # at once after a failure
                times.append(trio.current_time() - began)
                await a.connect(address)  # a no-op
                assert b.counters.connections_accepted == len(times)
                await a.disconnect(b.peer)
        assert min(times) < 0.2  # the library's own connect() takes 251 ms at least


async def test_trap_8_a_frozen_peer_is_noticed(peer_process) -> None:
    async with peer_process() as remote, open_host(new_identity()) as host:
        async with open_peers(host, hello=Hello("test", "0"), dice=Dice(1)) as peers:
            up, down = trio.Event(), trio.Event()
            reasons = []

            def notice(event) -> None:
                if isinstance(event, PeerUp):
                    up.set()
                elif isinstance(event, PeerDown):
                    reasons.append(event.reason)
                    down.set()

            peers.subscribe(notice)
            peers.keep(remote.address)
            with trio.fail_after(PATIENCE_S):
                await up.wait()
            stream = await host.open_stream(remote.peer, "/drip/1")
            await stream.receive_some()
            os.kill(remote.process.pid, signal.SIGSTOP)
            frozen_at = trio.current_time()
            with trio.fail_after(PATIENCE_S):
                with pytest.raises(StreamBroken, match="silent"):
                    await read_on(stream)
                await down.wait()
            print(f"noticed after {trio.current_time() - frozen_at:.2f} s")
            assert "silent" in reasons[0]
            assert host.connected() == ()
            os.kill(remote.process.pid, signal.SIGCONT)
            up = trio.Event()
            with trio.fail_after(PATIENCE_S):
                await up.wait()  # and found again when it thaws
                answer = await peers.call(
                    remote.peer, "echo", Hello("x", "1"), HELLO, deadline_ns=20 * SECOND_NS
                )
            assert answer == Hello("x", "1")


async def test_trap_9_more_than_300_streams_and_caps_of_our_own(connected_hosts, until) -> None:
    async with connected_hosts() as (a, b):
        streams = [await a.open_stream(b.peer, "/echo/1") for _ in range(400)]
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(ask, stream)
        assert b.inbound_streams == 400
    async with connected_hosts(right=HostLimits(max_inbound_streams_per_peer=3)) as (a, b):
        streams = [await a.open_stream(b.peer, "/echo/1") for _ in range(3)]
        with pytest.raises(Unreachable, match="reset"):
            await a.open_stream(b.peer, "/echo/1")
        await ask(streams[0])
        await streams[0].aclose()
        await until(lambda: b.inbound_streams < 3)
        await ask(await a.open_stream(b.peer, "/echo/1"))


async def test_trap_9_a_refused_dialler_sees_an_error(until) -> None:
    async with open_host(new_identity(), limits=HostLimits(max_connections=1)) as b:
        async with open_host(new_identity()) as first, open_host(new_identity()) as second:
            await first.connect(b.addresses[0])
            with pytest.raises(Unreachable, match="refused"):
                await second.connect(b.addresses[0])
            assert second.connected() == ()
            await first.disconnect(b.peer)
            await until(lambda: not b.connected())
            await second.connect(b.addresses[0])


async def test_trap_10_nobody_dials_by_itself(connected_hosts) -> None:
    async with connected_hosts() as (a, b), open_host(new_identity()) as c:
        await c.connect(b.addresses[0])  # b knows both; with an auto-connector they would meet
        await trio.sleep(0.5)
        assert a.connected() == (b.peer,)
        assert c.connected() == (b.peer,)
        assert sum(host.counters.connections_dialled for host in (a, b, c)) == 2


async def test_trap_11_nothing_stays_behind() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with open_host(new_identity()) as a, open_host(new_identity()) as b:
            port = int(b.addresses[0].split("/")[4])

            async def hang(_) -> None:
                await trio.sleep_forever()

            b.handle("/hang/1", hang)
            await a.connect(b.addresses[0])
            await a.open_stream(b.peer, "/hang/1")
            assert b.inbound_streams == 1
    assert trio.lowlevel.current_statistics().tasks_living == before
    # The address is free at once.
    async with open_host(new_identity(), [f"/ip4/127.0.0.1/tcp/{port}"]):
        pass
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


async def test_trap_11_leaving_does_not_wait_for_a_frozen_peer(peer_process) -> None:
    async with peer_process() as remote:
        with trio.fail_after(PATIENCE_S):
            async with open_host(new_identity(), limits=HostLimits(shutdown_s=0.2)) as host:
                await host.connect(remote.address)
                stream = await host.open_stream(remote.peer, "/echo/1")
                os.kill(remote.process.pid, signal.SIGSTOP)
                with trio.move_on_after(0.5):
                    while True:
                        await stream.send_all(bytes(1_000_000))
                with trio.fail_after(5):
                    await host.disconnect(remote.peer)
                with pytest.raises(StreamBroken):
                    await stream.send_all(b"x")


async def test_a_port_in_use_is_explained() -> None:
    from node.p2p import ListenFailed

    async with open_host(new_identity()) as host:
        port = host.addresses[0].split("/")[4]
        with pytest.raises(ListenFailed, match="another program listens there"):
            async with open_host(new_identity(), [f"/ip4/127.0.0.1/tcp/{port}"]):
                pass
