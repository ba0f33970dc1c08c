"""The muxer alone, over channels in memory."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.p2p import HostLimits, StreamBroken, Unreachable, yamux
from node.p2p.errors import ChannelBroken
from node.p2p.muxer import Connection
from node.p2p.noise import MAX_RECORD_BYTES
from node.p2p.stream import Counters, UnreadBudget
from node.p2p.yamux import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW, frame
from protocol.ids import PeerId

blocked = trio.testing.wait_all_tasks_blocked
WINDOW_BYTES = yamux.INITIAL_WINDOW_BYTES


def frames(data: bytes) -> list[tuple[int, int, int, int]]:
    """(type, flags, stream, length) of the frames in these bytes."""
    found, at = [], 0
    while at < len(data):
        _, kind, flags, stream_id, length = yamux.HEADER.unpack_from(data, at)
        found.append((kind, flags, stream_id, length))
        at += yamux.HEADER_BYTES + (length if kind == DATA else 0)
    return found


def data_frame(stream_id: int, body: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, len(body)) + body


async def read_all(stream) -> bytes:
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


async def write_for_ever(stream) -> None:
    while True:
        await stream.send_all(bytes(1000))
        await blocked()


# --- the wire -----------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.found: list[tuple[object, ...]] = []

    def on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self.found.append((kind, flags, stream_id, length))

    def on_body(self, piece: bytes, *, last: bool) -> None:
        if self.found and self.found[-1][0] == "body" and not self.found[-1][2]:
            piece = bytes(self.found.pop()[1]) + piece  # type: ignore[arg-type]
        self.found.append(("body", piece, last))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([DATA, WINDOW, PING]), st.integers(0, 15), st.integers(0, 9), st.binary(max_size=40)
        )
    ),
    st.integers(1, 30),
)
def test_frames_are_found_however_they_are_cut(sent: list[tuple[int, int, int, bytes]], step: int) -> None:
    wire, expected = b"", []
    for kind, flags, stream_id, body in sent:
        wire += frame(kind, flags, stream_id, len(body)) + (body if kind == DATA else b"")
        expected.append((kind, flags, stream_id, len(body)))
        if kind == DATA and body:
            expected.append(("body", body, True))
    recorder = Recorder()
    parser = yamux.FrameParser(recorder)
    for at in range(0, len(wire), step):
        parser.feed_untrusted(wire[at : at + step])
    assert recorder.found == expected


@given(st.lists(st.binary(max_size=60)))
def test_the_parser_survives_any_bytes(chunks: list[bytes]) -> None:
    parser = yamux.FrameParser(Recorder())
    try:
        for chunk in chunks:
            parser.feed_untrusted(chunk)
    except yamux.YamuxViolation:
        pass


_any_frame = st.builds(
    lambda kind, flags, stream_id, body: (
        frame(kind, flags, stream_id, len(body)) + (body if kind == DATA else b"")
    ),
    st.sampled_from([DATA, WINDOW, PING, GO_AWAY]),
    st.sampled_from([0, SYN, ACK, FIN, RST, SYN | ACK, SYN | FIN, SYN | RST, FIN | RST, 15]),
    st.integers(0, 7),
    st.binary(max_size=300),
)


class _Peer:
    """What a hostile peer talks to: a connection whose streams are read, closed or ignored in turn."""

    remote = "memory"

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.sent = 0

    def send_nowait(self, data: bytes) -> bool:
        self.sent += len(data)
        return True

    async def flush(self) -> None: ...

    async def receive(self) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [self.chunks.pop(0)] if self.chunks else []

    def close(self) -> None: ...


@settings(deadline=None, max_examples=300)
@given(st.lists(_any_frame | st.binary(max_size=40), max_size=30))
def test_a_connection_survives_any_frames(chunks: list[bytes]) -> None:
    async def main() -> None:
        budget = UnreadBudget(HostLimits().max_unread_bytes)
        async with trio.open_nursery() as nursery:

            async def use(number: int) -> None:
                stream = streams[number]
                try:
                    if number % 3 == 0:
                        while await stream.receive_some(7):
                            pass
                        await stream.send_all(b"bye")
                    await stream.aclose()
                except StreamBroken:
                    pass

            def accept(stream: object) -> bool:
                streams.append(stream)
                nursery.start_soon(use, len(streams) - 1)
                return True

            streams: list = []
            connection = Connection(
                _Peer([c for c in chunks if c]),
                PeerId("x"),
                initiator=False,
                limits=HostLimits(),
                counters=Counters(),
                budget=budget,
                accept=accept,
            )
            await connection.run()
        assert connection.broken
        assert connection.streams == {}
        for stream in streams:
            stream.reset()
        assert budget.used == 0

    trio.run(main)


# --- streams ------------------------------------------------------------------------------------


async def test_bytes_go_both_ways_and_each_way_ends_by_itself(mux) -> None:
    left, right = await mux.streams()
    await left.send_all(b"question")
    await left.send_eof()
    assert await right.receive_some() == b"question"
    assert await right.receive_some() == b""
    assert await right.receive_some() == b""
    await right.send_all(b"answer")
    await right.aclose()
    assert await left.receive_some(3) == b"ans"
    assert await left.receive_some(100) == b"wer"
    assert await left.receive_some() == b""
    with pytest.raises(StreamBroken, match="finished here"):
        await left.send_all(b"more")


async def test_large_transfers_arrive_whole(mux) -> None:
    left, right = await mux.streams()
    sent = bytes(range(256)) * 12_000
    got = bytearray()

    async def send() -> None:
        await left.send_all(sent)
        await left.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while data := await right.receive_some(50_000):
            got += data
    assert got == sent


async def test_concurrent_messages_stay_whole(mux) -> None:
    left, right = await mux.streams()
    letters = b"abcdefgh"
    async with trio.open_nursery() as nursery:
        for letter in letters:
            nursery.start_soon(left.send_all, bytes([letter]) * 200_000)
        for _ in letters:
            message = b""
            while len(message) < 200_000:
                message += await right.receive_some(200_000 - len(message))
            assert len(set(message)) == 1


async def test_a_small_write_on_an_idle_connection_needs_no_other_task(mux) -> None:
    left, _ = await mux.streams()
    channel = left._mux._channel
    before = channel.records
    assert left.send_nowait(b"tick")
    assert channel.records == before + 1  # in the kernel's hands already


async def test_records_never_exceed_what_noise_can_seal(mux) -> None:
    left, right = await mux.streams()
    channel = left._mux._channel
    channel.stalled = True
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(left.send_all, bytes(90_000))
        await blocked()
        channel.resume()
        got = 0
        while got < 6 * 90_000:
            got += len(await right.receive_some())
    assert channel.largest_record <= MAX_RECORD_BYTES


async def test_a_slow_reader_makes_the_writer_wait_without_a_limit_of_time(mux, autojump_clock) -> None:
    left, right = await mux.streams()
    done = trio.Event()

    async def write() -> None:
        await left.send_all(bytes(2 * 1024 * 1024))
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.sleep(24 * 3600)
        assert not done.is_set()
        assert left._mux.broken is None
        got = 0
        while got < 2 * 1024 * 1024:
            got += len(await right.receive_some())
    assert done.is_set()
    assert right._mux.budget.used == 0


async def test_cancelled_before_the_first_byte_nothing_happened(mux) -> None:
    left, right = await mux.streams()
    await left.send_all(bytes(WINDOW_BYTES))  # the window is full
    with trio.move_on_after(0.01) as scope:
        await left.send_all(b"late")
    assert scope.cancelled_caught
    got = 0
    while got < WINDOW_BYTES:
        got += len(await right.receive_some())
    await left.send_all(b"next")
    assert await right.receive_some() == b"next"


async def test_cancelled_inside_a_message_the_stream_is_reset_and_no_other(mux) -> None:
    left, right = await mux.streams()
    other = await left._mux.open_stream()
    await blocked()
    with trio.move_on_after(0.01) as scope:
        await left.send_all(bytes(WINDOW_BYTES + 1))
    assert scope.cancelled_caught
    with pytest.raises(StreamBroken):
        await left.send_all(b"x")
    with pytest.raises(StreamBroken, match="peer reset"):
        await read_all(right)
    await other.send_all(b"fine")
    assert await mux.accepted[-1].receive_some() == b"fine"


async def test_a_stream_opened_behind_full_queues_is_not_lost(mux) -> None:
    left, right = await mux.streams()
    channel = left._mux._channel
    channel.stalled = True
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(left.send_all, bytes(100_000))
        await blocked()
        await left._mux.open_stream(b"first words")
        channel.resume()
        got = 0
        while got < 800_000:
            got += len(await right.receive_some())
    assert await mux.accepted[-1].receive_some() == b"first words"


async def test_small_messages_pass_where_bulk_waits_for_room(mux) -> None:
    left, _ = await mux.streams()
    other, bulk = await left._mux.open_stream(), await left._mux.open_stream()
    left._mux._channel.stalled = True
    async with trio.open_nursery() as nursery:
        for stream in (left, bulk):
            nursery.start_soon(stream.send_all, bytes(WINDOW_BYTES))
        await blocked()
        assert other.send_nowait(b"token")
        assert not other.send_nowait(bytes(60_000))
        nursery.cancel_scope.cancel()


async def test_a_reset_wakes_reader_and_writer_at_both_ends(mux) -> None:
    left, right = await mux.streams()
    broken = []

    async def read(stream) -> None:
        with pytest.raises(StreamBroken):
            await stream.receive_some()
        broken.append(stream)

    async def write(stream) -> None:
        with pytest.raises(StreamBroken):
            await stream.send_all(bytes(WINDOW_BYTES * 2))
        broken.append(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, left)
        nursery.start_soon(write, left)
        await blocked()
        right.reset()
        right.reset()
    assert len(broken) == 2
    assert left._mux.streams == {}
    assert right._mux.streams == {}
    assert left._mux.budget.used == 0


async def test_what_came_before_the_connection_was_lost_is_delivered(mux) -> None:
    left, right = await mux.streams()
    await left.send_all(b"last words")
    await blocked()
    left._mux.abort("cable cut")
    await blocked()
    assert await right.receive_some() == b"last words"
    with pytest.raises(StreamBroken, match="closed the connection"):
        await right.receive_some()
    with pytest.raises(StreamBroken, match="cable cut"):
        await left.send_all(b"x")
    with pytest.raises(Unreachable, match="cable cut"):
        await left._mux.open_stream()


async def test_a_writer_learns_that_the_reader_has_closed(mux) -> None:
    left, right = await mux.streams()
    await right.aclose()
    assert await left.receive_some() == b""
    with pytest.raises(StreamBroken, match="peer reset"):
        await write_for_ever(left)


async def test_one_reader_at_a_time(mux) -> None:
    left, _ = await mux.streams()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.receive_some)
        await blocked()
        with pytest.raises(trio.BusyResourceError):
            await left.receive_some()
        nursery.cancel_scope.cancel()


async def test_goodbye_refuses_new_streams_and_keeps_old_ones(mux) -> None:
    left, right = await mux.streams()
    await right._mux.drain()
    await blocked()
    with pytest.raises(Unreachable, match="shutting down"):
        await left._mux.open_stream()
    await right.send_all(b"still here")
    assert await left.receive_some() == b"still here"


# --- bounds: the test is the peer ---------------------------------------------------------------


async def test_pings_are_answered(mux) -> None:
    _, channel = mux.alone()
    channel.inject(frame(PING, SYN, 0, 77))
    await blocked()
    assert frames(channel.sent) == [(PING, ACK, 0, 77)]


async def test_a_peer_that_sends_beyond_its_window_is_disconnected(mux) -> None:
    connection, channel = mux.alone()
    channel.inject(frame(WINDOW, SYN, 1, 0))
    for _ in range(4):
        channel.inject(data_frame(1, bytes(WINDOW_BYTES // 4)))
    await blocked()
    assert connection.broken is None
    channel.inject(data_frame(1, b"x"))
    await blocked()
    assert "beyond its window" in connection.broken
    assert frames(channel.sent)[-1] == (GO_AWAY, 0, 0, yamux.PROTOCOL_FAULT)
    assert channel.closed


async def test_reading_gives_the_window_back_and_bulk_gets_a_larger_one(mux) -> None:
    connection, channel = mux.alone()
    channel.inject(frame(WINDOW, SYN, 1, 0) + data_frame(1, bytes(WINDOW_BYTES)))
    await blocked()
    got = 0
    while got < WINDOW_BYTES:
        got += len(await mux.accepted[0].receive_some())
    granted = sum(length for kind, _, _, length in frames(channel.sent) if kind == WINDOW)
    assert granted > 2 * WINDOW_BYTES
    for _ in range(granted // 1024):
        channel.inject(data_frame(1, bytes(1024)))
    await blocked()
    assert connection.broken is None
    channel.inject(data_frame(1, bytes(1024)))
    await blocked()
    assert connection.broken


@pytest.mark.parametrize(
    "hostile",
    [
        frame(WINDOW, SYN, 2, 0),  # our own numbers
        frame(WINDOW, SYN, 1, 0) * 2,
        frame(WINDOW, SYN, 0, 0),
        data_frame(0, b"x"),
        frame(DATA, 0, 1, yamux.MAX_WINDOW_BYTES + 1),
        frame(WINDOW, SYN, 1, 0) + data_frame(1, b"a", FIN) + data_frame(1, b"b"),
        b"\x01" + bytes(11),
        b"\x00\x09" + bytes(10),
    ],
)
async def test_violations_end_the_connection_and_nothing_else(mux, hostile: bytes) -> None:
    connection, channel = mux.alone()
    channel.inject(hostile)
    await blocked()
    assert "broke the protocol" in connection.broken


@pytest.mark.parametrize("flood", ["pings", "streams"])
async def test_a_flood_of_provocations_costs_bounded_memory(mux, flood: str) -> None:
    limits = HostLimits(max_queued_replies=100)
    connection, channel = mux.alone(limits=limits, accept=False)
    channel.stalled = True  # it does not read
    longest = 0
    for number in range(1000):
        channel.inject(
            frame(PING, SYN, 0, number) if flood == "pings" else frame(WINDOW, SYN, 2 * number + 1, 0)
        )
        await blocked()
        longest = max(longest, len(connection._replies) + len(connection._frames))
        assert connection.streams == {}
        if connection.broken:
            break
    assert "floods" in connection.broken
    assert longest <= 100


async def test_a_flood_of_window_updates_and_data_for_ended_streams_leaves_nothing(mux) -> None:
    connection, channel = mux.alone()
    channel.inject(frame(WINDOW, SYN, 1, 0) + frame(WINDOW, RST, 1, 0))
    for _ in range(2000):
        channel.inject(frame(WINDOW, 0, 1, 5) + data_frame(1, b"for nobody") + frame(WINDOW, 0, 99, 5))
    await blocked()
    assert connection.broken is None
    assert connection.streams == {}
    assert connection.budget.used == 0
    assert frames(channel.sent) == [(WINDOW, ACK, 1, 0)]


async def test_refused_streams_are_reset(mux) -> None:
    connection, channel = mux.alone(accept=False)
    channel.inject(frame(DATA, SYN, 1, 5) + b"hello" + frame(PING, SYN, 0, 1))
    await blocked()
    assert frames(channel.sent) == [(WINDOW, RST, 1, 0), (PING, ACK, 0, 1)]
    assert connection.counters.streams_refused == 1


async def test_closed_streams_whose_peer_stays_silent_are_bounded(mux) -> None:
    connection, channel = mux.alone(limits=HostLimits(max_closing_streams=10))
    for number in range(50):
        channel.inject(frame(WINDOW, SYN, 2 * number + 1, 0))
        await blocked()
        await mux.accepted[-1].aclose()
    assert len(connection.streams) == 10
    assert sum(flags & RST != 0 for _, flags, _, _ in frames(channel.sent)) == 40


async def test_unread_data_of_all_streams_is_bounded(mux) -> None:
    connection, channel = mux.alone(limits=HostLimits(max_unread_bytes=300_000))
    for stream_id in (1, 3, 5):
        channel.inject(frame(WINDOW, SYN, stream_id, 0) + data_frame(stream_id, bytes(120_000)))
    await blocked()
    assert connection.broken is None
    assert connection.budget.used == 240_000
    with pytest.raises(StreamBroken, match="too much unread"):
        await mux.accepted[2].receive_some()
    assert len(await mux.accepted[0].receive_some(120_000)) == 120_000


async def test_tiny_frames_cost_their_bytes_only(mux) -> None:
    """100,000 one-byte frames must not become 100,000 objects."""
    _, channel = mux.alone()
    channel.inject(frame(WINDOW, SYN, 1, 0) + data_frame(1, b"x") * 100_000)
    await blocked()
    assert await mux.accepted[0].receive_some(200_000) == b"x" * 100_000


async def test_opening_waits_for_a_peer_that_does_not_acknowledge(mux, make_channel) -> None:
    from_test = make_channel()
    connection = mux.connection(from_test, initiator=True)
    for _ in range(yamux.ACK_BACKLOG):
        await connection.open_stream()
    with trio.move_on_after(0.01) as scope:
        await connection.open_stream()
    assert scope.cancelled_caught
    from_test.inject(frame(WINDOW, ACK, 1, 0))
    with trio.fail_after(5):
        await connection.open_stream()


async def test_a_connection_that_the_kernel_breaks_while_sending(mux) -> None:
    left, _ = await mux.streams()

    def fail(data: bytes) -> bool:
        raise ChannelBroken("broken pipe")

    left._mux._channel.send_nowait = fail
    await left.send_all(b"x")
    with pytest.raises(StreamBroken, match="broken pipe"):
        await left.send_all(b"y")


async def test_abort_works_while_the_peer_takes_nothing(mux) -> None:
    left, _ = await mux.streams()
    left._mux._channel.stalled = True
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(StreamBroken, match="frozen"):
                await left.send_all(bytes(5_000_000))

        nursery.start_soon(write)
        await blocked()
        left._mux.abort("frozen")
