"""What a host promises beyond the traps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from node.identity import new_identity
from node.p2p import (
    AddressInvalid,
    HostLimits,
    PeerConnected,
    PeerDisconnected,
    StreamBroken,
    Unreachable,
    open_host,
)
from node.p2p.relay_dial import is_from_listener

PATIENCE_S = 30
ROOT = Path(__file__).parents[2]


async def test_events_come_once_per_peer(until) -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        seen_a, seen_b = [], []
        stop = a.subscribe(seen_a.append)
        b.subscribe(seen_b.append)
        await a.connect(b.addresses[0])
        await until(b.connected)
        await b.connect(a.addresses[0])
        assert seen_a == [PeerConnected(b.peer)]
        assert seen_b == [PeerConnected(a.peer)]
        await a.disconnect(b.peer, "no longer wanted")
        assert seen_a[1:] == [PeerDisconnected(b.peer, "no longer wanted")]
        await until(lambda: not b.connected())
        assert isinstance(seen_b[1], PeerDisconnected)
        stop()
        await a.connect(b.addresses[0])
        assert len(seen_a) == 2


async def test_concurrent_connects_make_one_connection() -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(a.connect, b.addresses[0])
        assert a.counters.connections_dialled == 1
        assert a._dials == {}


async def test_dialling_fails_with_reasons() -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        wrong = b.addresses[0].replace(b.peer, new_identity().peer)
        with pytest.raises(Unreachable, match="handshake"):
            await a.connect(wrong)
        with pytest.raises(Unreachable, match="itself"):
            await a.connect(a.addresses[0])
        with pytest.raises(AddressInvalid):
            await a.connect("nonsense")
        with pytest.raises(Unreachable, match="not connected"):
            await a.open_stream(b.peer, "/echo/1")
        with pytest.raises(Unreachable):
            await a.connect(f"/dns/no-such-host.invalid/tcp/1/p2p/{b.peer}")
        assert a.connected() == ()
        assert a.counters.connections_failed == 2  # the others never left this machine


async def test_a_silent_listener_is_given_up_and_a_caller_may_cancel() -> None:
    async def silent(stream) -> None:
        await stream.receive_some()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, silent, [listener])
        address = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{new_identity().peer}"
        async with open_host(new_identity(), limits=HostLimits(handshake_s=0.2)) as host:
            with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
                await host.connect(address)
        async with open_host(new_identity()) as host:
            with trio.move_on_after(0.05) as scope:
                await host.connect(address)
            assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_strangers_who_send_anything_are_sent_away(until) -> None:
    async with open_host(new_identity(), limits=HostLimits(handshake_s=0.3)) as host:
        port = int(host.addresses[0].split("/")[4])
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 100):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
                await stranger.send_all(data)
                with trio.fail_after(PATIENCE_S):
                    try:
                        while await stranger.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
        await until(lambda: host.counters.connections_refused == 3)
        async with open_host(new_identity()) as other:
            await other.connect(host.addresses[0])


async def test_handshakes_of_strangers_are_bounded_and_do_not_block_for_ever() -> None:
    async with open_host(new_identity(), limits=HostLimits(max_handshakes=2, handshake_s=0.3)) as host:
        port = int(host.addresses[0].split("/")[4])
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        async with open_host(new_identity()) as other:
            with trio.fail_after(PATIENCE_S):
                await other.connect(host.addresses[0])  # waits for its turn
        for stream in silent:
            await stream.aclose()


def test_connections_leave_descriptors_for_others() -> None:
    """A process that may open 300 files: no more than a quarter of them are connections."""
    program = (
        "import resource, trio\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))\n"
        "from node.identity import new_identity\n"
        "from node.p2p import open_host\n"
        "async def main():\n"
        "    async with open_host(new_identity()) as host:\n"
        "        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], host.limits.max_connections)\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "300 75"
    assert "few open files are allowed" in done.stdout + done.stderr


async def test_strangers_who_say_nothing_keep_nobody_out(until) -> None:
    """Two hundred of them, for places that they may have for a minute: who holds most is the first to give."""
    async with open_host(new_identity(), limits=HostLimits(max_handshakes=4, handshake_s=60)) as host:
        port = int(host.addresses[0].split("/")[4])
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(200)]
        await until(lambda: host.counters.connections_refused >= 192)  # four have a place, four wait
        async with open_host(new_identity(), ("/ip4/127.0.0.2/tcp/0",)) as other:
            with trio.fail_after(30):
                while True:
                    try:
                        await other.connect(host.addresses[0], over=is_from_listener)
                        break
                    except Unreachable:
                        await trio.sleep(0.05)
            assert other.connected() == (host.peer,)
        for stream in silent:
            await stream.aclose()


async def test_streams_to_and_from_a_peer_end_when_it_is_disconnected(connected_hosts, until) -> None:
    async with connected_hosts() as (a, b):
        stream = await a.open_stream(b.peer, "/echo/1")
        await b.disconnect(a.peer)
        with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
            await stream.receive_some()
        await until(lambda: not a.connected() and not b.inbound_streams)


async def test_a_stream_that_never_names_its_protocol_is_dropped(until) -> None:
    async with (
        open_host(new_identity(), limits=HostLimits(negotiation_s=0.1)) as b,
        open_host(new_identity()) as a,
    ):
        await a.connect(b.addresses[0])
        connection = a._usable(b.peer)
        assert connection
        stream = await connection.open_stream()
        await until(lambda: b.inbound_streams == 1)
        with trio.fail_after(PATIENCE_S), pytest.raises(StreamBroken):
            await stream.receive_some()
        assert b.inbound_streams == 0


async def test_streams_opened_and_reset_in_haste_are_bounded_by_their_handlers() -> None:
    """A peer may not start more handlers than its share by resetting streams at once."""
    async with open_host(new_identity(), limits=HostLimits(max_inbound_streams_per_peer=5)) as b:
        running = []

        async def slow(_) -> None:
            running.append(1)
            await trio.sleep_forever()

        b.handle("/slow/1", slow)
        async with open_host(new_identity()) as a:
            await a.connect(b.addresses[0])
            for _ in range(5):
                (await a.open_stream(b.peer, "/slow/1")).reset()
            with pytest.raises(Unreachable):
                await a.open_stream(b.peer, "/slow/1")
        assert len(running) == 5


async def test_a_handler_that_returns_closes_its_stream_in_order(connected_hosts) -> None:
    async def reply(stream) -> None:
        await stream.send_all(b"answer")

    async with connected_hosts() as (a, b):
        b.handle("/reply/1", reply)
        stream = await a.open_stream(b.peer, "/reply/1")
        assert stream.protocol == "/reply/1"
        assert stream.peer == b.peer
        with trio.fail_after(PATIENCE_S):
            assert await stream.receive_some() == b"answer"
            assert await stream.receive_some() == b""
        await stream.aclose()


async def test_an_error_of_the_user_leaves_the_host_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with open_host(new_identity()):
            raise KeyError("mine")


async def test_handlers_are_registered_once() -> None:
    async with open_host(new_identity()) as host:

        async def nothing(_) -> None: ...

        host.handle("/x/1", nothing)
        with pytest.raises(ValueError, match="already"):
            host.handle("/x/1", nothing)
        with pytest.raises(ValueError, match="too long"):
            host.handle("/" + "x" * 2000, nothing)


async def test_memory_stays_flat_over_many_streams(connected_hosts, until) -> None:
    async with connected_hosts() as (a, b):
        for _ in range(300):
            stream = await a.open_stream(b.peer, "/echo/1")
            await stream.send_all(b"hello")
            await stream.receive_some()
            await stream.aclose()
        await until(lambda: b.inbound_streams == 0)
        connection_a, connection_b = a._usable(b.peer), b._usable(a.peer)
        await until(lambda: not connection_a.streams and not connection_b.streams)
        assert a.unread_bytes == b.unread_bytes == 0


async def test_streams_go_to_the_connection_that_lives(until) -> None:
    """An Island restarts behind a cut cable: its old connection stands, but nobody is at its other end."""
    identity = new_identity()

    async def answer(stream) -> None:
        await stream.send_all(b"new")

    async with open_host(new_identity()) as a, open_host(identity) as old, open_host(identity) as new:
        new.handle("/who/1", answer)
        port = int(a.addresses[0].split("/")[4])
        cut = trio.Event()

        async def pump(source, target) -> None:
            while data := await source.receive_some():
                if cut.is_set():
                    await trio.sleep_forever()
                await target.send_all(data)

        async def proxy(client) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as both:
                both.start_soon(pump, client, server)
                both.start_soon(pump, server, client)

        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, proxy, [listener])
            await old.connect(f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{a.peer}")
            await until(lambda: identity.peer in a.connected())
            cut.set()
            await new.connect(a.addresses[0])
            await until(lambda: a.counters.connections_accepted == 2)
            with trio.fail_after(10):
                stream = await a.open_stream(identity.peer, "/who/1")
                assert await stream.receive_some() == b"new"
            nursery.cancel_scope.cancel()


async def test_a_host_may_only_dial() -> None:
    async with open_host(new_identity()) as listens, open_host(new_identity(), ()) as dials:
        assert dials.addresses == ()
        assert await dials.connect(listens.addresses[0]) == listens.peer
