"""Identify and ping: between our hosts, against py-libp2p's own host both ways, and against liars."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import multiaddr
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_static_pair
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push.identify_push import push_identify_to_peer
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from node.identity import new_identity
from node.p2p import Host, Stream, Unreachable, open_host
from node.p2p import identify as identify_module
from node.p2p import ping as ping_module
from node.p2p.identify import (
    IDENTIFY_PROTOCOL,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGES,
    MAX_PROTOCOLS,
    PUSH_PROTOCOL,
    Identified,
    decode_identify_untrusted,
    encode_identify,
    identify,
    join_messages_untrusted,
    observed_address,
    push_identify,
    serve_identify,
)
from node.p2p.multiaddrs import (
    MAX_MULTIADDR_BYTES,
    decode_multiaddr_untrusted,
    decode_varint_untrusted,
    encode_multiaddr,
    encode_varint,
)
from node.p2p.ping import MAX_STREAMS_PER_PEER, PING_BYTES, PING_PROTOCOL, ping, serve_ping
from protocol.errors import Fault, ProtocolError
from protocol.limits import MAX_ADDRESSES

PATIENCE_S = 30
AGENT = "archipelag/test"
PEER = new_identity().peer


@asynccontextmanager
async def stock_host() -> AsyncGenerator:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    pair = create_new_key_pair()
    noise = NoiseTransport(pair, noise_privkey=create_static_pair().private_key)
    host = new_host(key_pair=pair, sec_opt={NOISE_ID: noise})
    async with host.run([multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.close()


@asynccontextmanager
async def pair_of_hosts() -> AsyncGenerator[tuple[Host, Host]]:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        await a.connect(b.addresses[0])
        yield a, b


async def silent(_: Stream) -> None:
    await trio.sleep_forever()


def port_of(remote: str) -> str:
    return remote.rpartition(":")[2]


# --- identify -------------------------------------------------------------------------------------


async def test_both_sides_of_a_connection_identify() -> None:
    async with pair_of_hosts() as (a, b):
        for host in (a, b):
            serve_identify(host, agent=AGENT)
            serve_ping(host)
        told = await identify(a, b.peer)
        assert told.peer == b.peer
        assert told.agent == AGENT
        assert set(told.protocols) == {IDENTIFY_PROTOCOL, PUSH_PROTOCOL, PING_PROTOCOL}
        assert [f"{address}/p2p/{b.peer}" for address in told.listen] == list(b.addresses)
        # b sees the dialler at the very port that a's socket has.
        assert told.observed == f"/ip4/127.0.0.1/tcp/{port_of(b.remote_of(a.peer) or '')}"
        back = await identify(b, a.peer)
        assert (back.peer, back.observed) == (a.peer, b.addresses[0].removesuffix(f"/p2p/{b.peer}"))


async def test_a_push_reaches_whoever_wants_it() -> None:
    async with pair_of_hosts() as (a, b):
        pushed: list[Identified] = []
        came = trio.Event()

        def take(told: Identified) -> None:
            pushed.append(told)
            came.set()

        serve_identify(a, agent=AGENT)
        serve_identify(b, agent=AGENT, pushed=take)
        await push_identify(a, b.peer, agent=AGENT)
        with trio.fail_after(PATIENCE_S):
            await came.wait()
        assert pushed[0].peer == a.peer
        assert pushed[0].listen == tuple(x.removesuffix(f"/p2p/{a.peer}") for x in a.addresses)
        await push_identify(b, a.peer, agent=AGENT)  # nobody listens there: read and dropped
        await identify(b, a.peer)
        assert a.counters.handler_failures == b.counters.handler_failures == 0


async def test_peers_that_do_not_serve_it_are_unreachable() -> None:
    async with pair_of_hosts() as (a, b):
        for ask in (identify, ping):
            with pytest.raises(Unreachable, match="does not speak"):
                await ask(a, b.peer)
            with pytest.raises(Unreachable, match="not connected"):
                await ask(a, PEER)
        with pytest.raises(Unreachable, match="does not speak"):
            await push_identify(a, b.peer, agent=AGENT)


async def test_stock_libp2p_identifies_us() -> None:
    async with open_host(new_identity()) as ours, stock_host() as stock:
        serve_identify(ours, agent=AGENT)
        await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(ours.addresses[0])))
        stream = await stock.new_stream(ID.from_base58(ours.peer), [IDENTIFY_PROTOCOL])
        data = b""
        with trio.fail_after(PATIENCE_S):
            # Its muxer may bring the answer and the end in one read or in two.
            while True:
                try:
                    chunk = await stream.read(65536)
                except Exception as error:  # noqa: BLE001 - what it raises at the end differs
                    assert "EOF" in repr(error) or "Closed" in repr(error), repr(error)  # never a reset
                    break
                if not chunk:
                    break
                data += chunk
        message = parse_identify_response(data)
        assert message.agent_version == AGENT
        assert ID.from_base58(ours.peer).to_base58() == ours.peer
        assert [str(multiaddr.Multiaddr(raw)) for raw in message.listen_addrs] == [
            ours.addresses[0].removesuffix(f"/p2p/{ours.peer}")
        ]
        expected = f"/ip4/127.0.0.1/tcp/{port_of(ours.remote_of(ours.connected()[0]) or '')}"
        assert str(multiaddr.Multiaddr(message.observed_addr)) == expected


async def test_we_identify_stock_libp2p() -> None:
    async with stock_host() as stock, open_host(new_identity()) as ours:
        peer = await ours.connect(str(stock.get_addrs()[0]))
        told = await identify(ours, peer)
        assert told.agent.startswith("py-libp2p")
        assert {IDENTIFY_PROTOCOL, PING_PROTOCOL} <= set(told.protocols)
        assert f"{told.listen[0]}/p2p/{peer}" == str(stock.get_addrs()[0])
        assert told.observed
        assert told.observed.startswith("/ip4/127.0.0.1/tcp/")


async def test_stock_libp2p_pushes_to_us() -> None:
    pushed: list[Identified] = []
    came = trio.Event()

    def take(told: Identified) -> None:
        pushed.append(told)
        came.set()

    async with open_host(new_identity()) as ours, stock_host() as stock:
        serve_identify(ours, agent=AGENT, pushed=take)
        await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(ours.addresses[0])))
        assert await push_identify_to_peer(stock, ID.from_base58(ours.peer))
        with trio.fail_after(PATIENCE_S):
            await came.wait()
        assert pushed[0].agent.startswith("py-libp2p")
        assert pushed[0].peer == stock.get_id().to_base58()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"", Fault.MALFORMED),
        (b"\x05abc", Fault.MALFORMED),
        (b"\x03\xff\xff\xff", Fault.MALFORMED),
        (encode_varint(MAX_MESSAGE_BYTES + 1), Fault.OVERSIZE),
        (b"\x00" * (MAX_MESSAGES + 1), Fault.OVERSIZE),
        (b"\xff\xff\xff\xff\xff\x01", Fault.MALFORMED),
        (bytes(MAX_MESSAGES * (MAX_MESSAGE_BYTES + 2) + 1), Fault.OVERSIZE),
    ],
)
async def test_answers_that_make_no_sense_are_protocol_errors(answer: bytes, fault: Fault) -> None:
    async def lie(stream: Stream) -> None:
        await stream.send_all(answer)

    async with pair_of_hosts() as (a, b):
        b.handle(IDENTIFY_PROTOCOL, lie)
        with trio.fail_after(PATIENCE_S), pytest.raises(ProtocolError) as caught:
            await identify(a, b.peer)
        assert caught.value.fault is fault
        assert a.unread_bytes == 0


async def test_a_push_that_makes_no_sense_costs_its_stream_only() -> None:
    async with pair_of_hosts() as (a, b):
        serve_identify(b, agent=AGENT)
        stream = await a.open_stream(b.peer, PUSH_PROTOCOL)
        await stream.send_all(b"\x03\xff\xff\xff")
        await stream.send_eof()
        with trio.fail_after(PATIENCE_S):
            await identify(a, b.peer)
        assert b.counters.handler_failures == 0


async def test_who_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair_of_hosts() as (a, b):
        for protocol in (IDENTIFY_PROTOCOL, PING_PROTOCOL):
            b.handle(protocol, silent)
        monkeypatch.setattr(identify_module, "IDENTIFY_S", 0.05)
        monkeypatch.setattr(ping_module, "PING_S", 0.05)
        for ask in (identify, ping):
            with trio.fail_after(PATIENCE_S), pytest.raises(Unreachable, match="no answer"):
                await ask(a, b.peer)


def test_a_foreign_key_is_refused_and_a_missing_one_is_not() -> None:
    assert decode_identify_untrusted(b"", PEER).protocols == ()
    foreign = Identify(public_key=b"\x08\x01\x12\x20" + bytes(32)).SerializeToString()
    with pytest.raises(ProtocolError) as caught:
        decode_identify_untrusted(foreign, PEER)
    assert caught.value.fault is Fault.WRONG_ISSUER


def test_claims_are_bounded_and_safe_to_show() -> None:
    message = Identify(
        agent_version="\x1b[31m" + "x" * 5000,
        protocols=[f"/p/{i}\n" for i in range(2000)],
        listen_addrs=[b"\xff\x01junk", *[encode_multiaddr("/ip4/1.2.3.4/tcp/1")] * 100],
        observed_addr=b"\xff\xff\xff",
    )
    told = decode_identify_untrusted(message.SerializeToString(), PEER)
    assert told.agent.isprintable()
    assert len(told.agent) <= 500
    assert len(told.protocols) == MAX_PROTOCOLS
    assert all(protocol.isprintable() for protocol in told.protocols)
    assert set(told.listen) == {"/ip4/1.2.3.4/tcp/1"}
    assert len(told.listen) < MAX_ADDRESSES
    assert told.observed is None


def test_ids_at_the_ends_of_addresses_are_cut_off() -> None:
    """js-libp2p appends our own id to what it observed."""
    relayed = encode_multiaddr(f"/ip4/5.6.7.8/tcp/9/p2p/{new_identity().peer}/p2p-circuit")
    for observed, expected in (
        (encode_multiaddr(f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}"), "/ip4/1.2.3.4/tcp/5"),
        (relayed, None),
    ):
        listen = [encode_multiaddr(f"/ip4/9.9.9.9/tcp/1/p2p/{PEER}"), relayed]
        message = Identify(observed_addr=observed, listen_addrs=listen).SerializeToString()
        told = decode_identify_untrusted(message, PEER)
        assert told.observed == expected
        assert told.listen == ("/ip4/9.9.9.9/tcp/1", decode_multiaddr_untrusted(relayed))


async def test_our_own_message_fits_whatever_is_registered() -> None:
    async with open_host(new_identity(), ()) as host:
        for number in range(1000):
            host.handle(f"/a-protocol-with-a-long-name/{number}", silent)
        data = encode_identify(host, agent=AGENT, observed="/ip6/::1/tcp/65535")
        assert MAX_MESSAGE_BYTES * 0.9 < len(data) <= MAX_MESSAGE_BYTES
        told = decode_identify_untrusted(data, host.peer)
        assert told.observed == "/ip6/::1/tcp/65535"


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (lambda: decode_identify_untrusted(data, PEER), lambda: join_messages_untrusted(data)):
        with suppress(ProtocolError):
            decode()


@given(st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    good = bytearray(
        Identify(
            protocol_version="ipfs/0.1.0",
            agent_version="é",
            listen_addrs=[
                encode_multiaddr("/dns4/example.org/tcp/4001"),
                encode_multiaddr("/ip6/::1/udp/1/quic-v1"),
            ],
            observed_addr=encode_multiaddr(f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/p2p-circuit"),
            protocols=["/a/1", "/b/1"],
        ).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        told = decode_identify_untrusted(bytes(good), PEER)
    except ProtocolError:
        return
    assert told.agent.isprintable()


# --- addresses in binary --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.168.0.1/tcp/65535",
        "/ip6/2001:db8::1/tcp/4001",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        "/dns4/example.org/tcp/443/wss",
        "/ip4/1.2.3.4/tcp/80/ws",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{PEER}/p2p-circuit",
        f"/dns/example.org/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{new_identity().peer}",
    ],
)
def test_binary_addresses_are_the_library_s(text: str) -> None:
    data = encode_multiaddr(text)
    assert data == multiaddr.Multiaddr(text).to_bytes()
    assert decode_multiaddr_untrusted(data) == text


@pytest.mark.parametrize(
    "text",
    ["", "ip4/1.2.3.4", "/ip4/1.2.3", "/ip4/1.2.3.4/tcp/65536", "/ip4/1.2.3.4/tcp/", "/onion/x", "/p2p/0OIl"],
)
def test_what_is_no_address_has_no_binary_form(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        encode_multiaddr(text)


@given(st.binary(max_size=MAX_MULTIADDR_BYTES + 8))
def test_any_bytes_are_an_address_or_a_protocol_error(data: bytes) -> None:
    try:
        text = decode_multiaddr_untrusted(data)
    except ProtocolError:
        return
    assert text.isprintable()
    assert encode_multiaddr(text) == data or "/p2p/" in text


def test_binary_addresses_that_are_refused() -> None:
    tcp = encode_multiaddr("/ip4/1.2.3.4/tcp/1")
    for data in (
        b"",
        tcp[:-1],
        bytes(MAX_MULTIADDR_BYTES + 1),
        tcp * 7,
        b"\x35\x00",
        b"\x35\x03a/b",
        b"\x35\x03a\nb",
    ):
        with pytest.raises(ProtocolError):
            decode_multiaddr_untrusted(data)


@given(st.integers(0, (1 << 28) - 1))
def test_varints_survive(value: int) -> None:
    data = encode_varint(value)
    assert decode_varint_untrusted(b"x" + data, 1) == (value, 1 + len(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff\xff\xff\xff\x01"])
def test_varints_that_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_varint_untrusted(data, 0)


def test_a_socket_s_address_as_a_multiaddress() -> None:
    assert observed_address("1.2.3.4:5") == "/ip4/1.2.3.4/tcp/5"
    assert observed_address("fe80::1%eth0:5") == "/ip6/fe80::1/tcp/5"
    assert observed_address("(gone)") is None
    assert observed_address("relay") is None


# --- ping -----------------------------------------------------------------------------------------


async def test_ping_takes_a_round_trip() -> None:
    async with pair_of_hosts() as (a, b):
        for host in (a, b):
            serve_ping(host)
        assert 0 < await ping(a, b.peer) < PATIENCE_S * 10**9
        assert await ping(b, a.peer) > 0


async def test_stock_libp2p_pings_us() -> None:
    async with open_host(new_identity()) as ours, stock_host() as stock:
        serve_ping(ours)
        await stock.connect(info_from_p2p_addr(multiaddr.Multiaddr(ours.addresses[0])))
        with trio.fail_after(PATIENCE_S):
            times = await PingService(stock).ping(ID.from_base58(ours.peer), 5)
        assert len(times) == 5


async def test_we_ping_stock_libp2p() -> None:
    async with stock_host() as stock, open_host(new_identity()) as ours:
        peer = await ours.connect(str(stock.get_addrs()[0]))
        with trio.fail_after(PATIENCE_S):
            assert await ping(ours, peer) > 0


async def test_pings_in_pieces_come_back_whole() -> None:
    async with pair_of_hosts() as (a, b):
        serve_ping(b)
        stream = await a.open_stream(b.peer, PING_PROTOCOL)
        payloads = secrets.token_bytes(3 * PING_BYTES)
        with trio.fail_after(PATIENCE_S):
            got = b""
            await stream.send_all(payloads[:5])
            await ping(a, b.peer)  # the piece has arrived before this answer
            await stream.send_all(payloads[5:70])
            while len(got) < 2 * PING_BYTES:
                got += await stream.receive_some()
            assert len(got) == 2 * PING_BYTES
            await stream.send_all(payloads[70:])
            while len(got) < 3 * PING_BYTES:
                got += await stream.receive_some()
        assert got == payloads
        await stream.aclose()


async def test_a_peer_has_two_ping_streams() -> None:
    async with pair_of_hosts() as (a, b):
        serve_ping(b)
        streams = [await a.open_stream(b.peer, PING_PROTOCOL) for _ in range(MAX_STREAMS_PER_PEER)]
        with trio.fail_after(PATIENCE_S):
            for stream in streams:
                await stream.send_all(bytes(PING_BYTES))
                assert await stream.receive_some() == bytes(PING_BYTES)
            with pytest.raises(Unreachable):
                await ping(a, b.peer)
            await streams[0].aclose()
            while b.inbound_streams > 1:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.005)
            assert await ping(a, b.peer) > 0
        assert b.counters.handler_failures == 0


async def test_an_idle_ping_stream_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping_module, "IDLE_S", 0.05)
    async with pair_of_hosts() as (a, b):
        serve_ping(b)
        stream = await a.open_stream(b.peer, PING_PROTOCOL)
        with trio.fail_after(PATIENCE_S):
            while b.inbound_streams:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.005)
        stream.reset()


@pytest.mark.parametrize("answer", [bytes(PING_BYTES), b""])
async def test_a_wrong_answer_is_no_round_trip(answer: bytes) -> None:
    async def lie(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    async with pair_of_hosts() as (a, b):
        b.handle(PING_PROTOCOL, lie)
        with trio.fail_after(PATIENCE_S), pytest.raises(ProtocolError if answer else Unreachable):
            await ping(a, b.peer)
