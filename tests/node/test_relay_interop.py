"""Relays against py-libp2p's own circuit v2: as relay, as the one who is relayed, as the dialler."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import multiaddr
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_static_pair
from libp2p.peer.envelope import unmarshal_envelope
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Voucher
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID, STOP_PROTOCOL_ID, CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits as StockLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from node.identity import new_identity
from node.p2p import Host, Unreachable, open_host
from node.p2p.relay_client import RelayClient, RelayClientConfig
from node.p2p.relay_service import RelayLimits, RelayService
from protocol.dice import Dice

PATIENCE_S = 30
STOCK_LIMITS = StockLimits(duration=600, data=1 << 24, max_circuit_conns=8, max_reservations=8)


@asynccontextmanager
async def stock_host(*, hop: bool = False) -> AsyncGenerator:
    """py-libp2p's host with its circuit v2, and the transport that dials through relays."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    pair = create_new_key_pair()
    noise = NoiseTransport(pair, noise_privkey=create_static_pair().private_key)
    host = new_host(key_pair=pair, sec_opt={NOISE_ID: noise})
    circuit = CircuitV2Protocol(host, limits=STOCK_LIMITS, allow_hop=hop)
    async with host.run([multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        host.set_stream_handler(STOP_PROTOCOL_ID, circuit._handle_stop_stream)
        if hop:
            host.set_stream_handler(PROTOCOL_ID, circuit._handle_hop_stream)
        try:
            yield (
                host,
                CircuitV2Transport(host, circuit, RelayConfig(roles=RelayRole.STOP, limits=STOCK_LIMITS)),
            )
        finally:
            with trio.CancelScope(shield=True):
                await host.close()


def unix_now_s() -> int:
    return int(time.time())


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@asynccontextmanager
async def relayed(host: Host, relay: str) -> AsyncGenerator[RelayClient]:
    """A place for `host` at this relay."""
    placed = trio.Event()
    client = RelayClient(
        host,
        RelayClientConfig(),
        dice=Dice(1),
        unix_now_s=unix_now_s,
        on_circuit=lambda _: None,
        changed=placed.set,
    )
    client.offer(relay)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        with trio.fail_after(PATIENCE_S):
            await placed.wait()
        yield client
        nursery.cancel_scope.cancel()


async def test_stock_libp2p_relays_for_us() -> None:
    async with (
        stock_host(hop=True) as (stock, _),
        open_host(new_identity()) as island,
        open_host(new_identity()) as gateway,
    ):
        island.handle("/echo/1", echo)
        async with relayed(island, str(stock.get_addrs()[0])) as client:
            [address] = client.addresses
            await gateway.connect(address)
            assert [path.relay for path in gateway.paths(island.peer)] == [str(stock.get_id())]
            stream = await gateway.open_stream(island.peer, "/echo/1")
            got = b""
            with trio.fail_after(PATIENCE_S):
                await stream.send_all(bytes(range(256)) * 100)
                while len(got) < 25_600:
                    got += await stream.receive_some()
            assert got == bytes(range(256)) * 100
            with pytest.raises(Unreachable, match="no reservation"):
                await island.connect(address.rpartition("/")[0] + "/" + new_identity().peer)


async def test_we_relay_for_stock_libp2p() -> None:
    async with (
        open_host(new_identity()) as relay,
        stock_host() as (stock, _),
        open_host(new_identity()) as gateway,
    ):
        RelayService(relay, RelayLimits(), unix_now_s=unix_now_s)

        async def stock_echo(stream) -> None:
            await stream.write(await stream.read(1000))
            await stream.close()

        stock.set_stream_handler("/echo/1", stock_echo)
        await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(relay.addresses[0])))
        hop = await stock.new_stream(ID.from_base58(relay.peer), [PROTOCOL_ID])
        await write_delimited_msg(hop, HopMessage(type=HopMessage.RESERVE))
        answer = await read_delimited_msg(hop, HopMessage)
        assert answer.status == 100
        assert abs(answer.reservation.expire - unix_now_s() - 3600) < 10
        assert str(multiaddr.Multiaddr(bytes(answer.reservation.addrs[0]))) == relay.addresses[0]
        assert answer.limit.data == RelayLimits().circuit_bytes

        envelope = unmarshal_envelope(answer.reservation.voucher)
        envelope.validate("libp2p-relay-rsvp")
        voucher = Voucher.FromString(envelope.raw_payload)
        assert ID(voucher.relay).to_base58() == relay.peer
        assert ID(voucher.peer) == stock.get_id()

        await gateway.connect(f"{relay.addresses[0]}/p2p-circuit/p2p/{stock.get_id()}")
        stream = await gateway.open_stream(str(stock.get_id()), "/echo/1")
        with trio.fail_after(PATIENCE_S):
            await stream.send_all(b"through our relay")
            assert await stream.receive_some() == b"through our relay"


async def test_stock_libp2p_dials_us_through_our_relay() -> None:
    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity()) as island,
        stock_host() as (stock, transport),
    ):
        service = RelayService(relay, RelayLimits(), unix_now_s=unix_now_s)
        island.handle("/echo/1", echo)
        async with relayed(island, relay.addresses[0]) as client:
            with trio.fail_after(PATIENCE_S):
                await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(relay.addresses[0])))
                await transport.dial(multiaddr.Multiaddr(client.addresses[0]))
                stream = await stock.new_stream(ID.from_base58(island.peer), ["/echo/1"])
                await stream.write(b"from the other side")
                assert await stream.read(100) == b"from the other side"
            assert service.circuits == 1
            assert [path.relay for path in island.paths(str(stock.get_id()))] == [relay.peer]
