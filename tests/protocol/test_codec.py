"""Codec: round trips, limits, and any bytes at all."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import adverts, coordination, envelope, jobs, ring, rpc
from protocol.codec import LENGTH, Codec, FrameBuffer, Message, encode
from protocol.errors import Fault, ProtocolError
from protocol.jobs import FROM_ISLAND, TO_ISLAND, JobAccept, JobOffer, JobTokens, Token
from protocol.limits import MAX_CONTROL_BYTES
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling

DECODERS = {
    "to_island": TO_ISLAND,
    "from_island": FROM_ISLAND,
    "receipt": jobs.RECEIPT,
    "rpc": rpc.RPC_CODEC,
    "advert": adverts.ADVERT,
    "hello": adverts.HELLO,
    "accepted": adverts.ACCEPTED,
    "coordination": coordination.COORDINATION,
    "summary": coordination.SUMMARY,
    "hold": ring.HOLD_SHARD,
    "held": ring.SHARD_HELD,
    "order": ring.SHARD_ORDER,
    "relayed_order": ring.RELAYED_ORDER,
    "envelope": Codec[envelope.Envelope](envelope.Envelope),
}

WORK = Generation(prompt=ChatPrompt(messages=(ChatMessage("user", "hi"),)), sampling=Sampling(seed=1))
OFFER = JobOffer(job="0" * 32, cargo="sha256:" + "0" * 64, work=WORK, resume=(1, 2, 3))

json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=300))
def test_any_bytes_decode_or_raise_protocol_error(name: str, data: bytes) -> None:
    try:
        DECODERS[name].decode_untrusted(data)
    except ProtocolError as error:
        assert error.fault in {Fault.MALFORMED, Fault.OVERSIZE}


@pytest.mark.parametrize("name", DECODERS)
@given(value=json_like)
def test_any_messagepack_decodes_or_raises_protocol_error(name: str, value: object) -> None:
    try:
        DECODERS[name].decode_untrusted(msgspec.msgpack.encode(value))
    except ProtocolError as error:
        assert error.fault in {Fault.MALFORMED, Fault.OVERSIZE}


@given(data=st.data())
def test_mutations_of_a_real_offer_decode_or_raise_protocol_error(data: st.DataObject) -> None:
    raw = bytearray(TO_ISLAND.encode(OFFER))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        TO_ISLAND.decode_untrusted(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def test_nested_beyond_all_reason_is_a_protocol_error() -> None:
    bomb = b"\x91" * 100_000 + b"\x00"
    with pytest.raises(ProtocolError):
        TO_ISLAND.decode_untrusted(b"\x81\xa1x" + bomb)


def test_round_trip() -> None:
    assert TO_ISLAND.decode_untrusted(TO_ISLAND.encode(OFFER)) == OFFER


def test_unknown_fields_are_ignored_so_that_newer_peers_may_say_more() -> None:
    raw = msgspec.msgpack.decode(FROM_ISLAND.encode(JobAccept(ahead=2)))
    raw["colour"] = "blue"
    assert FROM_ISLAND.decode_untrusted(msgspec.msgpack.encode(raw)) == JobAccept(ahead=2)


def test_each_type_has_its_own_limit() -> None:
    # An accept may not be as large as a token frame, though both travel on the same stream.
    raw = msgspec.msgpack.decode(FROM_ISLAND.encode(JobAccept()))
    raw["padding"] = b"x" * (MAX_CONTROL_BYTES + 1)
    with pytest.raises(ProtocolError) as caught:
        FROM_ISLAND.decode_untrusted(msgspec.msgpack.encode(raw))
    assert caught.value.fault is Fault.OVERSIZE


def test_encoding_beyond_the_limit_is_our_bug() -> None:
    class Small(Message, frozen=True, gc=False, tag="s"):
        max_bytes = 8
        text: str

    with pytest.raises(ValueError, match="exceeds"):
        encode(Small("much too long for eight bytes"))


def test_bounds_of_fields_hold() -> None:
    raw = msgspec.msgpack.decode(TO_ISLAND.encode(OFFER))
    raw["work"]["sampling"]["temperature"] = 99.0
    with pytest.raises(ProtocolError):
        TO_ISLAND.decode_untrusted(msgspec.msgpack.encode(raw))


@given(cuts=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_frames_survive_any_segmentation(cuts: list[int]) -> None:
    messages = [JobTokens(i, (Token(i, f"t{i}"),)) for i in range(20)]
    wire = b"".join(FROM_ISLAND.encode_frame(message) for message in messages)
    buffer = FrameBuffer(FROM_ISLAND)
    got: list[object] = []
    position = 0
    while position < len(wire):
        cut = cuts[len(got) % len(cuts)]
        got.extend(buffer.feed_untrusted(wire[position : position + cut]))
        position += cut
    assert got == messages
    assert len(buffer) == 0


def test_an_oversize_frame_is_refused_before_its_body_arrives() -> None:
    buffer = FrameBuffer(rpc.RPC_CODEC)
    with pytest.raises(ProtocolError) as caught:
        list(buffer.feed_untrusted(LENGTH.pack(rpc.RPC_CODEC.max_bytes + 1)))
    assert caught.value.fault is Fault.OVERSIZE


@given(data=st.binary(max_size=200))
def test_frame_buffer_survives_any_bytes(data: bytes) -> None:
    buffer = FrameBuffer(rpc.RPC_CODEC)
    with contextlib.suppress(ProtocolError):
        list(buffer.feed_untrusted(data))
    assert len(buffer) <= len(data)


def test_a_remotes_words_are_cut_and_escaped_in_errors() -> None:
    with pytest.raises(ProtocolError) as caught:
        FROM_ISLAND.decode_untrusted(msgspec.msgpack.encode({"type": "\x1b[2J" * 1000}))
    assert len(caught.value.detail) <= 500
    assert "\x1b" not in caught.value.detail
