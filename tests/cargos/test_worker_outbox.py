"""Frames on their way into a worker's stdin: in order and whole, whichever way they take."""

from __future__ import annotations

import os

import trio
import trio.testing

from cargos.runtimes.llama.process import Outbox
from cargos.runtimes.shards.wire import SHARD, Feed
from protocol.codec import FrameBuffer
from protocol.dice import Dice

#: More than a pipe takes at once.
LARGE_BYTES = 150_000
FRAMES = 300


async def test_frames_that_go_at_once_and_those_that_wait_keep_their_order() -> None:
    dice = Dice(5)
    source, sink = os.pipe()
    outbox = Outbox(SHARD.to_worker)
    buffer = FrameBuffer(SHARD.to_worker)
    sizes = [dice.choice([4, 4, 1200, 5000, LARGE_BYTES]) for _ in range(FRAMES)]
    came: list[int] = []
    all_came = trio.Event()

    async def read(pipe: trio.lowlevel.FdStream) -> None:
        while len(came) < FRAMES:
            for frame in buffer.feed_untrusted(await pipe.receive_some(20_000)):
                assert isinstance(frame, Feed)
                assert frame.payload == bytes([frame.position % 256]) * sizes[frame.position]
                came.append(frame.position)
        all_came.set()

    async with trio.lowlevel.FdStream(source) as reading, trio.lowlevel.FdStream(sink) as writing:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outbox.send_to, writing)
                nursery.start_soon(read, reading)
                for number, size in enumerate(sizes):
                    frame = Feed(1, number, 1, bytes([number % 256]) * size, 0)
                    outbox.put(frame, at_once=bool(dice.below(2)))
                    if dice.below(3):
                        await trio.lowlevel.checkpoint()
                await all_came.wait()
                nursery.cancel_scope.cancel()
    assert came == list(range(FRAMES))


async def test_what_is_put_after_the_pipe_is_gone_goes_nowhere() -> None:
    source, sink = os.pipe()
    outbox = Outbox(SHARD.to_worker)
    async with trio.lowlevel.FdStream(sink) as writing:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outbox.send_to, writing)
                await trio.testing.wait_all_tasks_blocked()
                outbox.put(Feed(1, 0, 1, b"1234", 0), at_once=True)
                scope.cancel()
        before = os.read(source, 1000)
        outbox.put(Feed(1, 1, 1, b"1234", 0), at_once=True)
        os.set_blocking(source, False)
        try:
            more = os.read(source, 1000)
        except BlockingIOError:
            more = b""
    os.close(source)
    assert before
    assert more == b""
