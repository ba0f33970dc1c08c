"""What relays, reachability checks and hole punching say: round trips, and hostile bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from node.identity import new_identity
from node.p2p import StreamBroken, parse_peer_address
from node.p2p.errors import AddressInvalid
from node.p2p.nat_messages import (
    MAX_NAT_MESSAGE_BYTES,
    CircuitLimit,
    ConnectRequest,
    DialRequest,
    DialResponse,
    HopStatus,
    PunchConnect,
    PunchSync,
    ReserveRequest,
    StopConnect,
    decode_dial_request_untrusted,
    decode_dial_response_untrusted,
    decode_hop_request_untrusted,
    decode_hop_status_untrusted,
    decode_punch_untrusted,
    decode_stop_connect_untrusted,
    decode_stop_status_untrusted,
    encode_dial_request,
    encode_dial_response,
    encode_hop_request,
    encode_hop_status,
    encode_punch,
    encode_stop_connect,
    encode_stop_status,
    receive_message_untrusted,
    send_message,
)
from protocol.errors import ProtocolError

PEER, RELAY = new_identity().peer, new_identity().peer
ADDRESSES = ("/ip4/1.2.3.4/tcp/4001", f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}", "/dns4/example.org/tcp/443")
DECODERS = [
    decode_hop_request_untrusted,
    decode_hop_status_untrusted,
    decode_stop_connect_untrusted,
    decode_stop_status_untrusted,
    decode_dial_request_untrusted,
    decode_dial_response_untrusted,
    decode_punch_untrusted,
]
GOOD = [
    (encode_hop_request, decode_hop_request_untrusted, ReserveRequest()),
    (encode_hop_request, decode_hop_request_untrusted, ConnectRequest(PEER)),
    (encode_hop_status, decode_hop_status_untrusted, HopStatus(204)),
    (
        encode_hop_status,
        decode_hop_status_untrusted,
        HopStatus(100, 1_900_000_000, ADDRESSES, b"voucher", CircuitLimit(60, 1 << 40)),
    ),
    (encode_stop_connect, decode_stop_connect_untrusted, StopConnect(PEER, CircuitLimit(1, 2))),
    (encode_stop_connect, decode_stop_connect_untrusted, StopConnect(PEER, None)),
    (encode_stop_status, decode_stop_status_untrusted, 203),
    (encode_dial_request, decode_dial_request_untrusted, DialRequest(PEER, ADDRESSES)),
    (encode_dial_response, decode_dial_response_untrusted, DialResponse(0, ADDRESSES[0])),
    (encode_dial_response, decode_dial_response_untrusted, DialResponse(101)),
    (encode_punch, decode_punch_untrusted, PunchConnect(ADDRESSES)),
    (encode_punch, decode_punch_untrusted, PunchSync()),
]


@pytest.mark.parametrize(("encode", "decode", "value"), GOOD)
def test_messages_come_out_as_they_went_in(encode, decode, value) -> None:
    assert decode(encode(value)) == value


@given(st.sampled_from(DECODERS), st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(decode, data: bytes) -> None:
    with suppress(ProtocolError):
        decode(data)


@given(st.sampled_from(GOOD), st.data())
def test_damaged_messages_are_messages_or_protocol_errors(good, data) -> None:
    encode, decode, value = good
    body = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(body) - 1)))
        body[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with suppress(ProtocolError):
        decode(bytes(body))


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (decode_hop_request_untrusted, HopMessage()),
        (decode_hop_request_untrusted, HopMessage(type=HopMessage.CONNECT)),
        (decode_hop_request_untrusted, HopMessage(type=HopMessage.STATUS)),
        (decode_hop_status_untrusted, HopMessage(type=HopMessage.RESERVE)),
        (decode_stop_connect_untrusted, StopMessage()),
        (decode_stop_connect_untrusted, StopMessage(type=StopMessage.CONNECT)),
        (decode_stop_status_untrusted, StopMessage(type=StopMessage.CONNECT)),
        (decode_dial_request_untrusted, Message(type=Message.DIAL_RESPONSE)),
        (decode_dial_response_untrusted, Message(type=Message.DIAL)),
        (decode_punch_untrusted, HolePunch()),
    ],
)
def test_messages_that_do_not_belong_here_are_refused(decode, message) -> None:
    with pytest.raises(ProtocolError):
        decode(message.SerializePartialToString())


def test_peers_with_other_keys_and_long_ids_are_refused() -> None:
    for identity in (b"", b"\x12\x20" + bytes(32), bytes(4000)):
        message = HopMessage(type=HopMessage.CONNECT)
        message.peer.id = identity
        with pytest.raises(ProtocolError):
            decode_hop_request_untrusted(message.SerializeToString())


def test_unreadable_addresses_are_left_out_and_their_number_is_bounded() -> None:
    message = HolePunch(type=HolePunch.CONNECT)
    message.ObsAddrs.extend([b"\xff\xff", b"", b"\x04\x01"] + [b"\x04\x01\x02\x03\x04\x06\x0f\xa1"] * 100)
    decoded = decode_punch_untrusted(message.SerializeToString())
    assert decoded == PunchConnect(("/ip4/1.2.3.4/tcp/4001",) * 16)


class Script:
    """A stream that brings given pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.rest = b""
        self.sent = b""

    async def receive_some(self, _: int = 0) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def unreceive(self, data: bytes) -> None:
        self.rest = data

    async def send_all(self, data: bytes) -> None:
        self.sent += data


async def test_framing_takes_any_pieces_and_leaves_what_follows() -> None:
    out = Script()
    await send_message(out, bytes(300))
    assert out.sent[:2] == b"\xac\x02"
    whole = out.sent + b"rest"
    for size in (1, 2, 3, 301, 302, 303, len(whole)):
        stream = Script(*(whole[at : at + size] for at in range(0, len(whole), size)))
        assert await receive_message_untrusted(stream) == bytes(300)
        assert stream.rest + b"".join(stream.pieces) == b"rest"


@pytest.mark.parametrize("data", [b"\xff\xff\x7f", b"\x80\x80", b"\x81\x20" + bytes(4097), b"\x05abc"])
async def test_framing_refuses_long_and_cut_messages(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        await receive_message_untrusted(Script(data))
    assert MAX_NAT_MESSAGE_BYTES == 4096


async def test_an_end_without_a_message_is_no_ones_fault() -> None:
    with pytest.raises(StreamBroken):
        await receive_message_untrusted(Script())


def test_relayed_addresses_come_out_as_they_went_in() -> None:
    text = f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    address, peer = parse_peer_address(text)
    assert (str(address), peer, address.relay) == (text, PEER, RELAY)
    assert str(address.of_relay) == f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}"


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/1.2.3.4/tcp/4001/p2p-circuit/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/Qm",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit/ip4/{PEER}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuitp2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        f"/p2p-circuit/p2p/{PEER}",
    ],
)
def test_bad_relayed_addresses_are_refused(text: str) -> None:
    with pytest.raises(AddressInvalid):
        parse_peer_address(text)
