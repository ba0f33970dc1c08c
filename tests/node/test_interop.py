"""Against py-libp2p's own host: the wire is libp2p's, and plaintext is refused (trap 6)."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import multiaddr
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_static_pair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from node.identity import new_identity
from node.p2p import Unreachable, open_host

PATIENCE_S = 30


@asynccontextmanager
async def stock_host(*, plaintext: bool = False) -> AsyncGenerator:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    pair = create_new_key_pair()
    security = (
        {PLAINTEXT_PROTOCOL_ID: InsecureTransport(pair)}
        if plaintext
        else {NOISE_ID: NoiseTransport(pair, noise_privkey=create_static_pair().private_key)}
    )
    host = new_host(key_pair=pair, sec_opt=security)
    async with host.run([multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.close()


async def test_stock_libp2p_dials_us() -> None:
    async def echo(stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)

    blob = os.urandom(700_000)
    got = bytearray()
    async with open_host(new_identity()) as ours, stock_host() as stock:
        ours.handle("/echo/1", echo)
        await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(ours.addresses[0])))
        stream = await stock.new_stream(ID.from_base58(ours.peer), ["/nobody/1", "/echo/1"])

        async def read() -> None:
            while len(got) < len(blob):
                got.extend(await stream.read(65536))

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await stream.write(blob)
        await stream.close()
    assert got == blob


async def test_we_dial_stock_libp2p() -> None:
    async def echo(stream) -> None:
        await stream.write(await stream.read(1000))
        await stream.close()

    async with stock_host() as stock, open_host(new_identity()) as ours:
        stock.set_stream_handler("/echo/1", echo)
        peer = await ours.connect(str(stock.get_addrs()[0]))
        with pytest.raises(Unreachable, match="does not speak"):
            await ours.open_stream(peer, "/nobody/1")
        stream = await ours.open_stream(peer, "/echo/1")
        await stream.send_all(b"hello")
        with trio.fail_after(PATIENCE_S):
            assert await stream.receive_some() == b"hello"
            assert await stream.receive_some() == b""
        await stream.aclose()


async def test_trap_6_plaintext_is_refused_both_ways() -> None:
    async with open_host(new_identity()) as ours, stock_host(plaintext=True) as stock:
        with pytest.raises(Exception, match=r"(?i)connect|upgrade|security"):
            await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(ours.addresses[0])))
        assert ours.counters.connections_accepted == 0
        with pytest.raises(Unreachable, match="noise"):
            await ours.connect(str(stock.get_addrs()[0]))
        assert ours.connected() == ()
