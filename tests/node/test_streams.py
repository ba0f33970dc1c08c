"""Messages over streams, in memory and on the network alike."""

from __future__ import annotations

from typing import ClassVar

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.identity import new_identity
from node.p2p import StreamBroken
from node.streams import MessageStream, memory_stream_pair
from protocol.codec import LENGTH, Codec, Message
from protocol.errors import Fault, ProtocolError

LEFT, RIGHT = new_identity().peer, new_identity().peer
blocked = trio.testing.wait_all_tasks_blocked


class Ask(Message, frozen=True, gc=False, tag="ask"):
    max_bytes: ClassVar[int] = 400_000
    body: bytes


class Tell(Message, frozen=True, gc=False, tag="tell"):
    number: int


ASK, TELL = Codec(Ask), Codec(Tell)


def pair(window: int = 256 * 1024):
    left, right = memory_stream_pair(LEFT, RIGHT, window=window)
    return MessageStream(left, ASK, TELL), MessageStream(right, TELL, ASK), left


async def test_messages_both_ways_until_the_end() -> None:
    left, right, _ = pair()
    assert (left.peer, right.peer) == (RIGHT, LEFT)
    await left.send(Ask(b"one"))
    await left.send_many([Ask(b"two"), Ask(b"three")])
    assert left.send_nowait(Ask(b"four"))
    await left.send_eof()
    assert [message.body async for message in right] == [b"one", b"two", b"three", b"four"]
    assert await right.receive() is None
    await right.send(Tell(5))
    await right.aclose()
    assert await left.receive() == Tell(5)
    assert await left.receive() is None


async def test_a_message_larger_than_the_window() -> None:
    left, right, _ = pair(window=1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send, Ask(bytes(300_000)))
        await blocked()
        assert not left.send_nowait(Ask(b"x"))
        assert await right.receive() == Ask(bytes(300_000))


async def test_our_own_oversized_message_is_our_bug_and_sends_nothing() -> None:
    left, right, _ = pair()
    with pytest.raises(ValueError, match="exceeds"):
        await left.send(Ask(bytes(500_000)))
    await left.send(Ask(b"fine"))
    assert await right.receive() == Ask(b"fine")


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (LENGTH.pack(1 << 30), Fault.OVERSIZE),
        (LENGTH.pack(3) + b"\xc1\xc1\xc1", Fault.MALFORMED),
        (TELL.encode_frame(Tell(1)), Fault.MALFORMED),
    ],
)
async def test_bad_bytes_reset_the_stream_after_the_good_messages(bad: bytes, fault: Fault) -> None:
    left, right, raw = pair()
    await raw.send_all(ASK.encode_frame(Ask(b"good")) + bad)
    assert await right.receive() == Ask(b"good")
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            await right.receive()
        assert caught.value.fault is fault
    with pytest.raises(StreamBroken):
        await left.send(Ask(b"x"))
    with pytest.raises(StreamBroken):
        await left.receive()


async def test_an_end_inside_a_message_is_no_end() -> None:
    _, right, raw = pair()
    await raw.send_all(ASK.encode_frame(Ask(b"cut"))[:-1])
    await raw.send_eof()
    with pytest.raises(ProtocolError, match="inside a message"):
        await right.receive()


async def test_a_cancelled_receive_loses_nothing() -> None:
    left, right, raw = pair()
    data = ASK.encode_frame(Ask(b"slow"))
    for at in range(len(data)):
        with trio.move_on_after(0.001):
            await right.receive()
        await raw.send_all(data[at : at + 1])
    assert await right.receive() == Ask(b"slow")
    del left


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=10))
def test_any_bytes_are_messages_an_end_or_an_error(chunks: list[bytes]) -> None:
    async def main() -> None:
        _, right, raw = pair()
        for chunk in chunks:
            await raw.send_all(chunk)
        await raw.send_eof()
        try:
            while await right.receive() is not None:
                pass
        except ProtocolError:
            pass

    trio.run(main)


async def test_the_pair_in_memory_behaves_as_the_network(connected_hosts) -> None:
    """One script, run over both kinds of stream."""

    async def script(near, far) -> list[object]:
        seen: list[object] = []
        await near.send_all(b"abc")
        await near.send_eof()
        await near.send_eof()
        seen.append(await far.receive_some(2))
        seen.append(await far.receive_some(2))
        seen.append(await far.receive_some(2))
        try:
            await near.send_all(b"x")
        except StreamBroken as error:
            seen.append(str(error))
        await far.send_all(b"d")
        seen.append(await near.receive_some())
        await far.aclose()
        await far.aclose()
        seen.append(await near.receive_some())
        await near.aclose()
        near.reset()
        return seen

    async def reset_script(near, far) -> list[object]:
        seen: list[object] = []
        near.reset()
        near.reset()
        for call in (near.receive_some, far.receive_some, lambda: near.send_all(b"x"), near.send_eof):
            try:
                with trio.fail_after(10):
                    await call()
            except StreamBroken:
                seen.append("broken")
        await near.aclose()
        return seen

    send, receive = trio.open_memory_channel(5)
    done = trio.Event()

    async def give(stream) -> None:
        await send.send(stream)
        await done.wait()

    async with connected_hosts() as (a, b):
        b.handle("/give/1", give)
        for each in (script, reset_script):
            near = await a.open_stream(b.peer, "/give/1")
            on_network = await each(near, await receive.receive())
            assert on_network == await each(*memory_stream_pair(LEFT, RIGHT))
        done.set()
