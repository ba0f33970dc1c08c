"""The server against clients that ask too much, the wrong thing, or read nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio

from node.p2p import Stream, StreamBroken
from node.pieces.limits import ServeLimits
from node.streams import MessageStream
from protocol.pieces import (
    FROM_HOLDER,
    MAX_OPEN_PIECES,
    PIECES_PROTOCOL,
    TO_HOLDER,
    FileHeld,
    FileRefused,
    FileWanted,
    Hashes,
    HashesWanted,
    HoldingsWanted,
    PieceData,
    PieceRefused,
    PiecesHeld,
    PieceUnwanted,
    PieceWanted,
)


@asynccontextmanager
async def talking(swarm, holder, *, greeted: bool = True) -> AsyncGenerator[tuple[MessageStream, Stream]]:
    """A stream to the holder, past the greeting."""
    stream = await swarm.open(holder.host.peer)
    talk = MessageStream(stream, TO_HOLDER, FROM_HOLDER)
    try:
        with trio.fail_after(30):
            if greeted:
                await talk.send(FileWanted(holder.source.whole.file.sha256))
                assert isinstance(await talk.receive(), FileHeld)
                assert isinstance(await talk.receive(), PiecesHeld)
            yield talk, stream
    finally:
        stream.reset()


async def exhaust(talk: MessageStream) -> None:
    while await talk.receive() is not None:
        pass


async def test_it_answers_in_order_and_leaves_out_what_is_not_wanted(
    open_swarm, make_whole, memory_source
) -> None:
    whole = make_whole(10)
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(whole, [0, 1, 2, 3, 5]), ServeLimits(upload_bytes_per_s=500_000))
        async with talking(swarm, holder) as (talk, _):
            for index in (3, 1, 4, 2):
                await talk.send(PieceWanted(index))
            await talk.send(PieceUnwanted(1))
            await talk.send(HashesWanted(8, 100))
            await talk.send(HoldingsWanted())
            got = [await talk.receive() for _ in range(5)]
    assert got[0] == PieceData(3, 0, whole.piece(3))
    assert got[1] == PieceRefused(4, "unknown")
    assert got[2] == PieceData(2, 0, whole.piece(2))
    assert got[3] == Hashes(8, whole.hashes[8 * 32 :])
    assert got[4] == PiecesHeld(0, b"\x2f\x00", last=True)


async def test_a_piece_that_can_not_be_read_any_more_is_refused(open_swarm, make_whole, memory_source) -> None:
    whole = make_whole(3)
    source = memory_source(whole)

    def gone(offset: int, size: int) -> bytes:
        raise FileNotFoundError("the disk was pulled")

    source.read = gone
    async with open_swarm() as swarm:
        holder = await swarm.add(source)
        async with talking(swarm, holder) as (talk, _):
            await talk.send(PieceWanted(1))
            assert await talk.receive() == PieceRefused(1, "unknown")
        assert holder.server.counters.failed_reads == 1
        assert holder.host.counters.handler_failures == 0


@pytest.mark.parametrize(
    "flood",
    [
        [PieceWanted(i % 10) for i in range(MAX_OPEN_PIECES + 2)],
        [HashesWanted(0, 10)] * 40,
        [HoldingsWanted()] * 40,
        [PieceWanted(10)],
        [FileWanted("0" * 64)],
    ],
    ids=["pieces", "hashes", "holdings", "beyond the end", "another file"],
)
async def test_who_asks_beyond_the_bounds_is_cut_off(
    flood, open_swarm, make_whole, memory_source, until
) -> None:
    whole = make_whole(10)
    async with open_swarm() as swarm:
        # So slow that the first answer is still under way.
        holder = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=1000))
        async with talking(swarm, holder) as (talk, _):
            for _ in range(2):  # the throttle lets the first one pass
                await talk.send(PieceWanted(9))
            await talk.send_many(flood)
            with pytest.raises(StreamBroken):
                await exhaust(talk)
        assert holder.server.counters.violations == 1
        await until(lambda: holder.server.streams == 0)
        # Others are served as before.
        async with talking(swarm, holder):
            pass


async def test_streams_are_bounded_per_peer_and_free_again_at_once(
    open_swarm, make_whole, memory_source, until
) -> None:
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(make_whole(3)), ServeLimits(max_streams_per_peer=2))
        async with (
            talking(swarm, holder),
            talking(swarm, holder),
            talking(swarm, holder, greeted=False) as (talk, _),
        ):
            assert await talk.receive() == FileRefused("busy")
            assert await talk.receive() is None
        await until(lambda: holder.server.streams == 0)
        async with talking(swarm, holder):
            pass


async def test_a_stream_that_only_occupies_its_place_makes_way_for_another(
    open_swarm, make_whole, memory_source
) -> None:
    limits = ServeLimits(max_streams=1)
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(make_whole(3)), limits)
        async with talking(swarm, holder) as (idle, _):
            async with talking(swarm, holder, greeted=False) as (talk, _):
                assert await talk.receive() == FileRefused("busy"), "it may be about to ask"
            for served in holder.server._served:
                served.used_at -= limits.yield_s  # time passes
            await idle.send(HoldingsWanted())  # is no use of it
            assert isinstance(await idle.receive(), PiecesHeld)
            async with talking(swarm, holder) as (talk, _):
                await talk.send(PieceWanted(0))
                assert isinstance(await talk.receive(), PieceData)
                with pytest.raises(StreamBroken):
                    await exhaust(idle)
        assert holder.server.counters.evicted == 1


async def test_who_says_nothing_or_reads_nothing_is_cut_off(
    open_swarm, make_whole, memory_source, until
) -> None:
    limits = ServeLimits(hello_s=0.3, idle_s=0.3, send_s=0.5)
    whole = make_whole(10, piece_bytes=1 << 20)
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(whole), limits)
        async with talking(swarm, holder, greeted=False) as (_, stream):
            with pytest.raises(StreamBroken):
                await stream.receive_some()
        async with talking(swarm, holder) as (talk, _):
            assert await talk.receive() is None, "idle streams are closed in order"
        async with talking(swarm, holder) as (talk, _):
            for index in range(10):  # 10 MiB fill every window and queue between the two
                await talk.send(PieceWanted(index))
            await until(lambda: holder.server.streams == 0)
        assert holder.server.counters.bytes < whole.file.size_bytes
        assert holder.host.counters.handler_failures == 0


async def test_the_upload_is_bounded(open_swarm, make_whole, memory_source, memory_sink) -> None:
    whole = make_whole(32)
    async with open_swarm() as swarm:
        await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=1_000_000))
        started = trio.current_time()
        assert await swarm.fetch(memory_sink(whole)) == frozenset()
        assert trio.current_time() - started > 1.5, "2 MB at 1 MB/s"


async def test_nothing_is_sent_where_nothing_was_asked(open_swarm, make_whole, memory_source) -> None:
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(make_whole(3)))
        assert PIECES_PROTOCOL in holder.host.protocols
        async with talking(swarm, holder, greeted=False) as (talk, _):
            await talk.send(PieceWanted(0))
            with pytest.raises(StreamBroken):
                await talk.receive()
        assert holder.server.counters.pieces == 0
