"""The messages: any bytes decode or raise ProtocolError; bounds; bits and parts."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos import manifest
from protocol import pieces
from protocol.codec import LENGTH, FrameBuffer
from protocol.errors import Fault, ProtocolError
from protocol.pieces import (
    FROM_HOLDER,
    MAX_BITS_PER_PART,
    MAX_DATA_BYTES,
    TO_HOLDER,
    FileHeld,
    FileWanted,
    Hashes,
    HashesWanted,
    PieceData,
    PieceRefused,
    PiecesHeld,
    PieceWanted,
    held_parts,
    pieces_of_bits,
)

CODECS = {"to": TO_HOLDER, "from": FROM_HOLDER}
SOME = {
    "to": [FileWanted("0" * 64), HashesWanted(5, 7), PieceWanted(3)],
    "from": [
        FileHeld(100, 10),
        PiecesHeld(0, b"\xff\x03", last=True),
        Hashes(0, bytes(64)),
        PieceData(1, 2, b"data"),
        PieceRefused(1, "busy"),
    ],
}


@pytest.mark.parametrize("name", CODECS)
@given(data=st.binary(max_size=300))
def test_any_bytes_decode_or_raise_protocol_error(name: str, data: bytes) -> None:
    try:
        CODECS[name].decode_untrusted(data)
    except ProtocolError as error:
        assert error.fault in {Fault.MALFORMED, Fault.OVERSIZE}


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_damaged_streams_decode_or_raise_protocol_error(name: str, data: st.DataObject) -> None:
    wire = bytearray(b"".join(CODECS[name].encode_frame(message) for message in SOME[name]))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    buffer = FrameBuffer(CODECS[name])
    with contextlib.suppress(ProtocolError):
        for at in range(0, len(wire), 7):
            for _ in buffer.feed_untrusted(wire[at : at + 7]):
                pass
    assert len(buffer) <= CODECS[name].max_bytes + LENGTH.size


@pytest.mark.parametrize("name", CODECS)
def test_round_trip(name: str) -> None:
    for message in SOME[name]:
        assert CODECS[name].decode_untrusted(CODECS[name].encode(message)) == message


@pytest.mark.parametrize(
    ("codec", "fields"),
    [
        (TO_HOLDER, {"type": "fw", "file": "0" * 63 + "G"}),
        (TO_HOLDER, {"type": "fw", "file": "../../etc/passwd"}),
        (TO_HOLDER, {"type": "pw", "index": -1}),
        (TO_HOLDER, {"type": "pw", "index": pieces.MAX_PIECES}),
        (TO_HOLDER, {"type": "lw", "first": 0, "count": pieces.MAX_HASHES_PER_PART + 1}),
        (FROM_HOLDER, {"type": "pd", "index": 0, "offset": 0, "data": b""}),
        (FROM_HOLDER, {"type": "pd", "index": 0, "offset": 0, "data": bytes(MAX_DATA_BYTES + 1)}),
        (FROM_HOLDER, {"type": "fh", "size_bytes": 1, "piece_bytes": pieces.MAX_PIECE_BYTES + 1}),
        (FROM_HOLDER, {"type": "px", "index": 0, "code": "because"}),
    ],
)
def test_bounds_hold(codec, fields) -> None:
    with pytest.raises(ProtocolError):
        codec.decode_untrusted(msgspec.msgpack.encode(fields))


def test_manifests_and_messages_agree_about_pieces() -> None:
    assert manifest.MAX_PIECES == pieces.MAX_PIECES
    assert manifest.MAX_PIECE_BYTES == pieces.MAX_PIECE_BYTES


@given(held=st.sets(st.integers(0, 99)), spare=st.integers(0, 7))
def test_bits_name_pieces(held: set[int], spare: int) -> None:
    count = 100 - spare
    bits = bytearray(-(-count // 8))
    for index in held:
        if index < 8 * len(bits):
            bits[index // 8] |= 1 << index % 8
    (part,) = held_parts(count, bytes(bits))
    assert pieces_of_bits(part.first, part.bits, count) == sorted(index for index in held if index < count)


def test_the_largest_file_is_told_in_parts_that_fit() -> None:
    bits = bytes(pieces.MAX_PIECES // 8)
    parts = held_parts(pieces.MAX_PIECES, bits)
    assert [part.first for part in parts] == list(range(0, pieces.MAX_PIECES, MAX_BITS_PER_PART))
    assert [part.last for part in parts] == [False, False, False, True]
    for part in parts:
        FROM_HOLDER.encode_frame(part)
    FROM_HOLDER.encode_frame(PieceData(pieces.MAX_PIECES - 1, 1 << 21, bytes(MAX_DATA_BYTES)))
    FROM_HOLDER.encode_frame(Hashes(0, bytes(pieces.MAX_HASHES_PER_PART * 32)))
