"""Connections for bulk: kept apart at both ends, shared by one kind of stream, ended when idle."""

from __future__ import annotations

import socket

import pytest
import trio

from node.identity import new_identity
from node.p2p import HostLimits, StreamBroken, Unreachable, open_host, parse_address
from node.p2p.transport import Path

RING, FILES, CONTROL = "/ring/1", "/files/1", "/control/1"


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def serve(*hosts) -> None:
    for host in hosts:
        host.handle(RING, echo, bulk=True)
        host.handle(FILES, echo, bulk=True)
        host.handle(CONTROL, echo)


async def ask(stream, data: bytes = b"hello") -> bytes:
    got = b""
    with trio.fail_after(30):
        await stream.send_all(data)
        while len(got) < len(data):
            got += await stream.receive_some()
    return got


async def test_bulk_has_its_own_connection_and_control_stays_where_it_is(until) -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        serve(a, b)
        await a.connect(b.addresses[0])
        ring = await a.open_bulk_stream(b.peer, RING)  # dialled where a reached b before
        control = await a.open_stream(b.peer, CONTROL)
        assert ring.path.bulk
        assert not control.path.bulk
        assert await ask(ring) == await ask(control) == b"hello"
        # The other side uses the same connection, and for nothing else either.
        back = await b.open_bulk_stream(a.peer, RING)
        plain = await b.open_stream(a.peer, CONTROL)
        assert back.path.bulk
        assert not plain.path.bulk
        assert await ask(back) == await ask(plain) == b"hello"
        assert (a.bulk_connections(b.peer), b.bulk_connections(a.peer)) == (1, 1)
        assert a.paths(b.peer) == (Path(),)
        (connection,) = a._bulk.all  # noqa: SLF001
        sock = connection._channel._transport._socket  # type: ignore[attr-defined]  # noqa: SLF001
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        # A file beside activations goes its own way.
        file = await a.open_bulk_stream(b.peer, FILES)
        assert a.bulk_connections(b.peer) == 2
        assert await ask(file, bytes(1 << 17)) == bytes(1 << 17)
        # The connection that carries control may go, and the ring goes on; all go when the peer is dropped.
        for connection in a._connections[b.peer]:  # noqa: SLF001
            connection.abort("cut")
        await until(lambda: not a.connected())
        assert await ask(ring) == b"hello"
        await a.disconnect(b.peer)
        with pytest.raises(StreamBroken):
            await ask(ring)
        await until(lambda: not a.bulk_connections(b.peer) and not b.bulk_connections(a.peer))
        assert a._connection_count == b._connection_count == 0  # noqa: SLF001


async def test_nothing_but_bulk_is_served_there() -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        serve(a, b)
        ring = await a.open_bulk_stream(b.peer, RING, b.addresses)
        assert a.connected() == b.connected() == ()  # it does not count as being connected
        with pytest.raises(Unreachable, match="does not speak"):
            await a.open_bulk_stream(b.peer, CONTROL, b.addresses)
        with pytest.raises(Unreachable, match="not connected"):
            await a.open_stream(b.peer, CONTROL)
        assert await ask(ring) == b"hello"


async def test_a_host_that_takes_none_is_met_on_the_ordinary_connection() -> None:
    none = HostLimits(max_bulk_connections_per_peer=0)
    async with open_host(new_identity()) as a, open_host(new_identity(), limits=none) as b:
        serve(a, b)
        stream = await a.open_bulk_stream(b.peer, RING, b.addresses)
        assert not stream.path.bulk
        assert await ask(stream) == b"hello"
        again = await a.open_bulk_stream(b.peer, RING, b.addresses)
        assert await ask(again) == b"hello"
        assert len(a.paths(b.peer)) == 1


async def test_dials_are_shared_bounded_and_given_up() -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        serve(a, b)
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(a.open_bulk_stream, b.peer, RING, b.addresses)
        assert a.bulk_connections(b.peer) == 1
        with pytest.raises(Unreachable):
            await a.open_bulk_stream(new_identity().peer, RING, b.addresses)
        bound = HostLimits().max_bulk_connections_per_peer
        for _ in range(bound):
            try:
                await a.dial_bulk(parse_address(b.addresses[0]), b.peer)
            except Unreachable:
                break
        else:
            pytest.fail("no bound")
        assert a.bulk_connections(b.peer) == bound


async def test_an_idle_one_ends_and_is_dialled_anew(until) -> None:
    limits = HostLimits(bulk_idle_s=0.2)
    async with open_host(new_identity(), limits=limits) as a, open_host(new_identity(), limits=limits) as b:
        serve(a, b)
        stream = await a.open_bulk_stream(b.peer, RING, b.addresses)
        await trio.sleep(0.6)
        assert await ask(stream) == b"hello"  # a stream that rests keeps it
        await stream.aclose()
        await until(lambda: not a.bulk_connections(b.peer) and not b.bulk_connections(a.peer))
        assert await ask(await a.open_bulk_stream(b.peer, RING, b.addresses)) == b"hello"
