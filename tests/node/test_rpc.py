"""RPC links over streams in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import pytest
import trio
import trio.testing

from node.identity import new_identity
from node.p2p import StreamBroken
from node.rpc import (
    MAX_QUEUED_ANSWERS,
    CallFailed,
    Methods,
    PeerUnreachable,
    Refused,
    RpcCounters,
    RpcLink,
)
from node.streams import MessageStream, memory_stream_pair
from protocol.codec import LENGTH, Codec, Message
from protocol.errors import Fault, ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.limits import MAX_RPC_BYTES, MAX_RPC_INFLIGHT_PER_PEER
from protocol.rpc import RPC_CODEC, Abandon, Notice, Ping, Pong, Refusal, Reply, Request

LEFT, RIGHT = new_identity().peer, new_identity().peer
blocked = trio.testing.wait_all_tasks_blocked


class Text(Message, frozen=True, gc=False, tag="text"):
    max_bytes = MAX_RPC_BYTES
    text: str


class Other(Message, frozen=True, gc=False, tag="other"):
    pass


TEXT = Codec(Text)
LONG_NS = 20 * SECOND_NS


class Pair:
    def __init__(self, nursery: trio.Nursery, window: int = 256 * 1024) -> None:
        self.methods = Methods()
        self.counters = RpcCounters()
        near, far = memory_stream_pair(LEFT, RIGHT, window=window)
        self.near = RpcLink(near, Methods(), RpcCounters())
        self.far = RpcLink(far, self.methods, self.counters)
        for link in (self.near, self.far):
            nursery.start_soon(link.run)

    async def call(self, method: str, text: str = "", deadline_ns: int = LONG_NS) -> str:
        return (await self.near.call(method, Text(text), TEXT, deadline_ns=deadline_ns)).text


class Raw:
    """The test speaks the frames itself."""

    def __init__(self, nursery: trio.Nursery, window: int = 256 * 1024) -> None:
        self.methods = Methods()
        near, far = memory_stream_pair(LEFT, RIGHT, window=window)
        self.bytes = near
        self.frames = MessageStream(near, RPC_CODEC, RPC_CODEC)
        self.link = RpcLink(far, self.methods, RpcCounters())
        nursery.start_soon(self.link.run)


@pytest.fixture
async def nursery() -> AsyncGenerator[trio.Nursery]:
    async with trio.open_nursery() as opened:
        yield opened
        opened.cancel_scope.cancel()


async def _upper(_, request: Text) -> Text:
    await trio.lowlevel.checkpoint()
    return Text(request.text.upper())


async def _hang(_, __) -> Text:
    await trio.sleep_forever()
    raise AssertionError


async def test_calls_and_answers(nursery) -> None:
    pair = Pair(nursery)
    pair.methods.serve("upper", TEXT, _upper)
    async with trio.open_nursery() as callers:

        async def one(number: int) -> None:
            assert await pair.call("upper", f"a{number}") == f"A{number}"

        for number in range(200):  # more than may be open at once: they take turns
            callers.start_soon(one, number)
    assert pair.counters.requests == 200
    assert pair.counters.requests_refused == 0


async def test_both_sides_call_at_once_with_large_bodies(nursery) -> None:
    """Replies of 200 kB both ways through a 256 KiB window: the readers must never wait for a write."""
    pair = Pair(nursery)
    large = "x" * 200_000

    async def big(_, request: Text) -> Text:
        await trio.lowlevel.checkpoint()
        return Text(large)

    pair.methods.serve("big", TEXT, big)
    pair.near._methods.serve("big", TEXT, big)
    with trio.fail_after(30):
        async with trio.open_nursery() as callers:
            for link in (pair.near, pair.far):
                for _ in range(100):

                    async def one(link: RpcLink = link) -> None:
                        answer = await link.call("big", Text(large), TEXT, deadline_ns=60 * SECOND_NS)
                        assert answer.text == large

                    callers.start_soon(one)


async def test_refusals(nursery) -> None:
    async def refuse(_, __) -> Text:
        raise Refused("busy", "come back later")

    async def bug(_, __) -> Text:
        raise RuntimeError("secret detail")

    async def bad(_, __) -> Text:
        raise ProtocolError(Fault.SIGNATURE, "not signed")

    async def wrong(_, __) -> Message:
        return Other()

    pair = Pair(nursery)
    for name, handler in (("refuse", refuse), ("bug", bug), ("bad", bad), ("wrong", wrong)):
        pair.methods.serve(name, TEXT, handler)
    outcomes = {}
    for name in ("refuse", "bug", "bad", "wrong", "nobody"):
        with pytest.raises(CallFailed) as caught:
            await pair.call(name)
        outcomes[name] = caught.value
    assert {name: error.code for name, error in outcomes.items()} == {
        "refuse": "busy",
        "bug": "failed",
        "bad": "malformed",
        "wrong": "malformed",
        "nobody": "unknown-method",
    }
    assert outcomes["refuse"].detail == "come back later"
    assert "secret" not in outcomes["bug"].detail
    assert pair.counters.handler_failures == 1
    with pytest.raises(CallFailed, match="malformed"):
        await pair.near.call("bad", Other(), TEXT, deadline_ns=LONG_NS)


async def test_a_deadline_ends_the_call_on_both_sides(nursery, autojump_clock) -> None:
    pair = Pair(nursery)
    pair.methods.serve("hang", TEXT, _hang)
    began = trio.current_time()
    with pytest.raises(CallFailed) as caught:
        await pair.call("hang", deadline_ns=500 * MILLISECOND_NS)
    assert caught.value.code == "deadline"
    assert trio.current_time() - began == pytest.approx(0.5, abs=0.01)
    await blocked()
    assert pair.far._serving == {}
    assert pair.near._calls == {}


async def test_the_callee_keeps_the_deadline_without_being_told(nursery, autojump_clock) -> None:
    raw = Raw(nursery)
    raw.methods.serve("hang", TEXT, _hang)
    began = trio.current_time()
    await raw.frames.send(Request(1, "hang", 500, TEXT.encode(Text(""))))
    answer = await raw.frames.receive()
    assert trio.current_time() - began == pytest.approx(0.5, abs=0.01)
    assert isinstance(answer, Refusal)
    assert answer.code == "deadline"


async def test_a_cancelled_call_cancels_the_handler(nursery) -> None:
    cancelled = trio.Event()

    async def watch(_, __) -> Text:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    pair = Pair(nursery)
    pair.methods.serve("watch", TEXT, watch)
    pair.methods.serve("upper", TEXT, _upper)
    with trio.move_on_after(0.05) as scope:
        await pair.call("watch")
    assert scope.cancelled_caught
    with trio.fail_after(10):
        await cancelled.wait()
    assert await pair.call("upper", "next") == "NEXT"


async def test_a_lost_stream_fails_calls_and_cancels_handlers(nursery) -> None:
    pair = Pair(nursery)
    pair.methods.serve("hang", TEXT, _hang)
    async with trio.open_nursery() as callers:

        async def one() -> None:
            with pytest.raises(PeerUnreachable):
                await pair.call("hang")

        for _ in range(100):  # also those that wait for their turn
            callers.start_soon(one)
        await blocked()
        assert pair.far._running == MAX_RPC_INFLIGHT_PER_PEER
        pair.far.close("gone")
    await blocked()
    assert pair.near.ended.is_set()
    assert pair.far._running == 0
    assert not pair.near.notify("n", Text(""))


async def test_too_many_requests_are_refused_not_queued(nursery) -> None:
    raw = Raw(nursery)
    raw.methods.serve("hang", TEXT, _hang)
    body = TEXT.encode(Text(""))
    for number in range(MAX_RPC_INFLIGHT_PER_PEER + 5):
        await raw.frames.send(Request(number, "hang", 60_000, body))
    for number in range(5):
        answer = await raw.frames.receive()
        assert isinstance(answer, Refusal)
        assert (answer.call, answer.code) == (MAX_RPC_INFLIGHT_PER_PEER + number, "busy")
    assert raw.link._running == MAX_RPC_INFLIGHT_PER_PEER


@pytest.mark.parametrize("flood", [Ping(1), Request(1, "nobody", 1000, b"")])
async def test_a_peer_that_floods_and_does_not_read_is_dropped(nursery, flood) -> None:
    raw = Raw(nursery, window=4096)
    for _ in range(20_000):
        if raw.link.ended.is_set():
            break
        if not raw.frames.send_nowait(flood):
            await blocked()
    assert raw.link.violated
    assert "floods" in raw.link.reason
    assert raw.link._queued_answers <= MAX_QUEUED_ANSWERS + 1


async def test_answers_to_a_reader_are_never_dropped(nursery) -> None:
    raw = Raw(nursery, window=4096)
    total = 5000
    async with trio.open_nursery() as both:

        async def send() -> None:
            for number in range(total):
                await raw.frames.send(Ping(number))

        both.start_soon(send)
        for number in range(total):
            assert await raw.frames.receive() == Pong(number)


@pytest.mark.parametrize(
    "bad",
    [LENGTH.pack(1 << 31), LENGTH.pack(2) + b"\xc1\xc1", RPC_CODEC.encode_frame(Request(1, "m", 1, b""))[:-1]],
)
async def test_garbage_ends_the_link(nursery, bad: bytes) -> None:
    raw = Raw(nursery)
    await raw.bytes.send_all(bad)
    with contextlib.suppress(StreamBroken):  # it may be gone already
        await raw.bytes.send_eof()
    with trio.fail_after(10):
        await raw.link.ended.wait()
    assert raw.link.violated


async def test_a_call_number_that_is_in_use_ends_the_link(nursery) -> None:
    raw = Raw(nursery)
    raw.methods.serve("hang", TEXT, _hang)
    for _ in range(2):
        await raw.frames.send(Request(1, "hang", 1000, TEXT.encode(Text(""))))
    with trio.fail_after(10):
        await raw.link.ended.wait()
    assert raw.link.violated


async def test_answers_nobody_waits_for_are_ignored(nursery) -> None:
    raw = Raw(nursery)
    for frame in (Reply(5, b"x"), Refusal(6, "busy", ""), Abandon(7), Pong(8), Notice("nobody", b"x")):
        await raw.frames.send(frame)
    await raw.frames.send(Ping(9))
    assert await raw.frames.receive() == Pong(9)


async def test_notices(nursery) -> None:
    pair = Pair(nursery)
    seen = []

    def note(peer, text: Text) -> None:
        seen.append((peer, text.text))
        if text.text == "bug":
            raise RuntimeError("a bug")

    pair.methods.serve_notice("note", TEXT, note)
    for text in ("one", "bug", "two"):
        assert pair.near.notify("note", Text(text))
    assert pair.near.notify("note", Other())
    await blocked()
    assert seen == [(LEFT, "one"), (LEFT, "bug"), (LEFT, "two")]
    assert pair.counters.handler_failures == 1
    assert pair.counters.malformed == 1


async def test_notices_are_dropped_when_the_peer_does_not_read(nursery) -> None:
    near, far = memory_stream_pair(LEFT, RIGHT)
    del far
    link = RpcLink(near, Methods(), RpcCounters())
    nursery.start_soon(link.run)
    sent = sum(link.notify("note", Text("x" * 10_000)) for _ in range(200))
    assert 50 < sent < 90
    assert link._counters.notices_dropped == 200 - sent
    assert not link.ended.is_set()


async def test_round_trip_times(nursery, autojump_clock) -> None:
    raw = Raw(nursery)
    assert raw.link.rtt_ns is None
    for delay_s in (0.1, 0.1, 0.02):
        raw.link.ping()
        ping = await raw.frames.receive()
        await trio.sleep(delay_s)
        assert isinstance(ping, Ping)
        await raw.frames.send(Pong(ping.number))
        await blocked()
    assert raw.link.min_rtt_ns == pytest.approx(0.02 * SECOND_NS, rel=0.05)
    assert raw.link.rtt_ns == pytest.approx(0.09 * SECOND_NS, rel=0.05)
    for _ in range(100):
        raw.link.ping()  # to a silent peer: a few, not a hundred
    assert len(raw.link._pings) < 20


async def test_names_are_checked_when_served() -> None:
    methods = Methods()
    methods.serve("m", TEXT, _upper)
    with pytest.raises(ValueError, match="already"):
        methods.serve("m", TEXT, _upper)
    with pytest.raises(ValueError, match="characters"):
        methods.serve("m" * 100, TEXT, _upper)
