"""The record layer, and what the handshake accepts."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from node.identity import new_identity
from node.p2p.errors import ChannelBroken
from node.p2p.noise import MAX_RECORD_BYTES, Credentials, HandshakeFailed, NoiseChannel
from node.p2p.transport import ExactReader

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


class Pipe:
    """A transport that takes and gives a few bytes at a time."""

    remote = "memory"

    def __init__(self, wire: bytes = b"", pieces: int = 1 << 20, room: int = 1 << 20) -> None:
        self.wire = bytearray(wire)
        self.pieces = pieces
        self.sent = bytearray()
        self.room = room
        self.writable = trio.Event()

    def send_nowait(self, data: bytes | memoryview) -> int:
        taken = min(len(data), self.room)
        self.sent += data[:taken]
        self.room -= taken
        return taken

    async def wait_writable(self) -> None:
        await self.writable.wait()
        self.room = 1000

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        piece = bytes(self.wire[: self.pieces])
        del self.wire[: self.pieces]
        return piece

    def close(self) -> None: ...


def sealed(*records: bytes) -> bytes:
    pipe = Pipe()
    channel = NoiseChannel(pipe, KEY, OTHER_KEY)
    for record in records:
        assert channel.send_nowait(record)
    return bytes(pipe.sent)


async def opened(wire: bytes, pieces: int, early: int = 0) -> list[bytes]:
    channel = NoiseChannel(Pipe(wire[early:], pieces), OTHER_KEY, KEY, wire[:early])
    found: list[bytes] = []
    while records := await channel.receive():
        found += records
    return found


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1), st.integers(1, 50), st.integers(0, 300))
def test_records_come_out_however_the_wire_cuts_them(records: list[bytes], pieces: int, early: int) -> None:
    assert trio.run(opened, sealed(*records), pieces, early) == records


async def test_the_largest_record_in_the_smallest_segments() -> None:
    record = bytes(MAX_RECORD_BYTES)
    assert await opened(sealed(record, b"x"), 600) == [record, b"x"]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_bit_ends_the_connection(at: int, change: int) -> None:
    wire = bytearray(sealed(b"some words", b"and more"))
    wire[at % len(wire)] ^= change
    with pytest.raises(ChannelBroken):
        trio.run(opened, bytes(wire), 1000)


async def test_records_can_not_be_replayed_or_swapped() -> None:
    first, second = sealed(b"first"), sealed(b"first", b"second")[len(sealed(b"first")) :]
    with pytest.raises(ChannelBroken):
        await opened(second + first, 1000)
    with pytest.raises(ChannelBroken):
        await opened(first + first, 1000)


async def test_a_cut_record_is_an_error_not_an_end() -> None:
    with pytest.raises(ChannelBroken, match="inside a record"):
        await opened(sealed(b"words")[:-1], 1000)


async def test_a_cancelled_flush_loses_no_byte() -> None:
    pipe = Pipe(room=7)
    channel = NoiseChannel(pipe, KEY, OTHER_KEY)
    assert not channel.send_nowait(b"a record that does not fit")
    for _ in range(3):
        with trio.move_on_after(0.001) as scope:
            await channel.flush()
        assert scope.cancelled_caught
    pipe.writable.set()
    await channel.flush()
    assert channel.send_nowait(b"the next")
    assert bytes(pipe.sent) == sealed(b"a record that does not fit", b"the next")


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_any_bytes_to_the_handshake(wire: bytes) -> None:
    """The library raises a dozen kinds of errors; none may escape."""
    credentials = Credentials(new_identity().seed)

    async def main() -> None:
        for pipe in (Pipe(wire), Pipe(len(wire).to_bytes(2, "big") + wire)):
            with pytest.raises((HandshakeFailed, ChannelBroken)):
                await credentials.accept(pipe, ExactReader(pipe))
            pipe.wire[:] = len(wire).to_bytes(2, "big") + wire
            with pytest.raises((HandshakeFailed, ChannelBroken)):
                await credentials.dial(pipe, ExactReader(pipe), new_identity().peer)

    trio.run(main)
