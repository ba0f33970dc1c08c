"""Fetching from several peers: good ones, and all sorts of others."""

from __future__ import annotations

import hashlib

import trio

from cargos.shards.pieces_plan import PiecesPolicy
from node.pieces.limits import FetchLimits, ServeLimits
from node.streams import MessageStream
from protocol.instants import SECOND_NS
from protocol.pieces import FROM_HOLDER, TO_HOLDER, FileHeld, FileRefused, PieceData, held_parts

#: Times that make a test short; everything else as in life.
QUICK = FetchLimits(policy=PiecesPolicy(stall_ns=2 * SECOND_NS), search_s=1.0, ask_again_s=0.3, patience_s=15.0)


async def test_a_file_from_three_peers_each_with_a_part_of_it(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(40)
    async with open_swarm() as swarm:
        holders = [
            await swarm.add(memory_source(whole, [i for i in range(40) if i % 3 != left])) for left in range(3)
        ]
        sink = memory_sink(whole)
        assert await swarm.fetch(sink) == frozenset()
        assert sorted(sink.got) == list(range(40))
        assert sink.list == whole.hashes
        assert all(holder.server.counters.pieces > 5 for holder in holders)
        assert swarm.counters.pieces == 40
        assert swarm.counters.bytes == whole.file.size_bytes
        assert swarm.host.bulk_connections(holders[0].host.peer) == 1
        assert swarm.host.connected() == ()


async def test_only_what_is_wanted_is_fetched(open_swarm, make_whole, memory_source, memory_sink) -> None:
    whole = make_whole(40)
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(whole))
        sink = memory_sink(whole)
        assert await swarm.fetch(sink, [3, 4, 39]) == frozenset()
        assert sorted(sink.got) == [3, 4, 39]
        assert holder.server.counters.pieces == 3


async def test_a_peer_that_dies_in_the_middle_a_liar_a_slow_one_and_a_stalled_one(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(120)
    async with open_swarm() as swarm:
        # Slow enough (10 MB/s) that all take part.
        dying = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=10_000_000))
        good = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=10_000_000))
        liar = await swarm.add(memory_source(whole, lies=range(120)))
        slow = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=400_000))
        stalled = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=1))
        sink = memory_sink(whole)

        def kill(index: int) -> None:
            if len(sink.got) == 20:
                dying.scope.cancel()

        assert await swarm.fetch(sink, limits=QUICK, note=kill) == frozenset()
        assert hashlib.sha256(b"".join(sink.got[i] for i in range(120))).hexdigest() == whole.file.sha256
        now = trio.current_time()
        assert swarm.suspects.banned(liar.host.peer, now)
        assert len(swarm.suspects) == 1, "nobody else is blamed"
        assert 1 <= swarm.counters.wrong_pieces <= 2
        assert dying.ended.is_set()
        assert good.server.counters.pieces > 5 * slow.server.counters.pieces
        assert stalled.server.counters.pieces <= 2


async def test_a_silent_peer_is_given_up_and_what_it_alone_has_is_named(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(10)
    async with open_swarm() as swarm:
        await swarm.add(memory_source(whole, range(9)))
        silent = memory_source(whole, [9])
        await swarm.add(silent, ServeLimits(upload_bytes_per_s=1, read_bytes=1024))
        sink = memory_sink(whole, listed=True)
        limits = FetchLimits(policy=PiecesPolicy(stall_ns=SECOND_NS), search_s=0.2, idle_s=1.0)
        assert await swarm.fetch(sink, limits=limits) == {9}
        assert sorted(sink.got) == list(range(9))
        assert swarm.counters.stalled_peers == 1
        assert len(swarm.suspects) == 0, "to be slow is no lie"


async def test_a_peer_that_comes_back_is_asked_for_the_rest(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(60)
    async with open_swarm() as swarm:
        holder = await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=4_000_000))
        sink = memory_sink(whole)
        broken = False

        def cut(index: int) -> None:
            nonlocal broken
            if len(sink.got) == 10 and not broken:
                broken = True
                swarm.nursery.start_soon(swarm.host.disconnect, holder.host.peer)

        assert await swarm.fetch(sink, limits=QUICK, note=cut) == frozenset()
        assert broken
        assert holder.server.counters.streams == 2


async def test_pieces_that_a_peer_gets_while_we_ask_come_from_it(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(20)
    async with open_swarm() as swarm:
        source = memory_source(whole, range(5))
        await swarm.add(source)
        sink = memory_sink(whole)

        async def grow() -> None:
            while len(sink.got) < 5:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.01)
            source.held |= set(range(5, 20))

        swarm.nursery.start_soon(grow)
        assert await swarm.fetch(sink, limits=QUICK) == frozenset()


async def test_a_wrong_piece_list_is_not_taken_and_whoever_sent_it_is_asked_no_more(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(10)
    async with open_swarm() as swarm:
        liar = memory_source(whole)
        liar.list = bytes(len(whole.hashes))
        liar_peer = (await swarm.add(liar)).host.peer
        sink = memory_sink(whole)
        assert await swarm.fetch(sink, limits=QUICK) == set(range(10))
        assert sink.list is None
        assert swarm.suspects.banned(liar_peer, trio.current_time())
        await swarm.add(memory_source(whole))
        assert await swarm.fetch(sink, limits=QUICK) == frozenset()
        assert sink.list == whole.hashes
        assert not liar.reads


async def test_without_peers_it_ends_at_once(open_swarm, make_whole, memory_sink) -> None:
    whole = make_whole(5)
    async with open_swarm() as swarm:
        with trio.fail_after(30):  # half of its patience with peers that give nothing
            assert await swarm.fetch(memory_sink(whole)) == set(range(5))
        assert swarm.searches == 1


async def test_busy_and_ignorant_peers_are_left_alone(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    whole = make_whole(10)
    async with open_swarm() as swarm:
        busy = await swarm.add(memory_source(whole), ServeLimits(max_streams=0))
        empty = await swarm.add(memory_source(whole, []))
        await swarm.add(memory_source(whole))
        assert await swarm.fetch(memory_sink(whole), limits=QUICK) == frozenset()
        assert busy.server.counters.refused_busy == 1
        assert empty.server.counters.refused_unknown == 1
        assert len(swarm.suspects) == 0


async def test_hostile_holders_end_their_own_session_only(
    open_swarm, make_whole, memory_source, memory_sink
) -> None:
    """Whatever comes instead of an answer, the good peer's pieces arrive, nothing is raised."""
    whole = make_whole(12)
    file = whole.file
    shape = FileHeld(file.size_bytes, file.piece_bytes)
    bits = memory_source(whole).bits()
    full = held_parts(file.pieces, bits)

    def says(*messages, then=b"", hold=True):
        async def handler(stream) -> None:
            talk = MessageStream(stream, FROM_HOLDER, TO_HOLDER)
            await talk.receive()
            for message in messages:
                await talk.send(message)
            if then:
                await stream.send_all(then)
            if hold:
                await trio.sleep_forever()

        return handler

    hostile = [
        says(shape, *full, then=b"\xff\xff\xff\xff and more"),
        says(shape, *full, PieceData(0, 0, b"not asked for")),
        says(shape, *full, FileRefused("busy")),
        says(shape, *full, *full),
        says(shape, held_parts(8 * 4096, bytes(4096))[0]),
        says(PieceData(0, 0, b"x")),
        says(shape, hold=False),
        says(then=b"\x00\x00\x00\x01\xc1"),
    ]
    async with open_swarm() as swarm:
        for handler in hostile:
            await swarm.add(memory_source(whole), handler=handler)
        await swarm.add(memory_source(whole), ServeLimits(upload_bytes_per_s=300_000))
        sink = memory_sink(whole, listed=True)
        limits = FetchLimits(policy=QUICK.policy, max_peers=20, open_s=5.0, search_s=1.0)
        assert await swarm.fetch(sink, limits=limits) == frozenset()
        assert swarm.counters.failed_peers >= len(hostile) - 1
        assert len(swarm.suspects) >= 6
