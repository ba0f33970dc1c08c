"""Sessions that a stranger opens with an account of a chain that is meant to do harm."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from node.identity import new_identity
from node.p2p import Host, open_host
from node.streams import MessageStream
from protocol.codec import encode
from protocol.envelope import Envelope
from protocol.jobs import JobDone
from protocol.limits import MAX_ADDRESS_CHARS, MAX_ADDRESSES, MIB
from protocol.ring import (
    FROM_STAGE,
    MAX_GENERATION,
    MAX_LOSS_CHARS,
    MAX_SPARES,
    RING_PROTOCOL,
    TO_STAGE,
    Chain,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    Stage,
    StageLoss,
    StagePeer,
)

CARGO = "sha256:" + "c" * 64
SESSION = "7" * 32


@asynccontextmanager
async def stranger_at(node: Any) -> AsyncGenerator[tuple[Host, MessageStream[Any, Any]]]:
    """A peer that nobody knows, with a link to this stage."""
    async with open_host(new_identity()) as host:
        raw = await host.open_bulk_stream(node.host.peer, RING_PROTOCOL, node.host.addresses)
        yield host, MessageStream(raw, TO_STAGE, FROM_STAGE)


def nobody(addresses: tuple[str, ...] = ()) -> StagePeer:
    return StagePeer(new_identity().peer, addresses)


def whereabouts(host: Host) -> StagePeer:
    return StagePeer(host.peer, host.addresses)


async def heard(stream: MessageStream[Any, Any], kind: type) -> Any:
    with trio.fail_after(30):
        async for message in stream:
            if isinstance(message, kind):
                return message
    raise AssertionError("the stage hung up")


def largest(message: RingOpen) -> RingOpen:
    """With spares at its first stage and behind its second, until one byte more would be too much."""
    chain = message.chain
    stages = list(chain.stages)
    for at in (0, *range(2, len(stages) - 1)):
        for _ in range(MAX_SPARES):
            for count in (MAX_ADDRESSES, *range(MAX_ADDRESSES)[::-1]):
                addresses = ("/" * MAX_ADDRESS_CHARS,) * count
                more = (*stages[at].spares, nobody(addresses))
                stage = msgspec.structs.replace(stages[at], spares=more)
                longer = msgspec.structs.replace(chain, stages=(*stages[:at], stage, *stages[at + 1 :]))
                made = msgspec.structs.replace(message, chain=longer)
                if len(msgspec.msgpack.encode(made)) <= message.max_bytes:
                    message, chain, stages[at] = made, longer, stage
                    break
    for length in (MAX_LOSS_CHARS,) * 8 + tuple(range(MAX_LOSS_CHARS)):
        loss = StageLoss(nobody().peer, 1, length, reason="/" * length)
        made = msgspec.structs.replace(message, losses=(*message.losses, loss))
        if len(msgspec.msgpack.encode(made)) <= message.max_bytes:
            message = made
    return message


async def refuse(raw: Any) -> None:
    """A stage that takes nothing."""
    answers = MessageStream(raw, FROM_STAGE, TO_STAGE)
    async for message in answers:
        if isinstance(message, RingOpen):
            await answers.send(RingFault(SESSION, "unknown", message.index, "x" * 100))


async def test_an_account_that_fills_a_message_is_refused(toys, answer) -> None:
    """What this stage adds to it would have no room in a message any more."""
    a, b = await toys.nodes((0, 6), (6, 12))
    async with stranger_at(a) as (host, stream), open_host(new_identity()) as friend:
        friend.handle(RING_PROTOCOL, refuse, bulk=True)
        inner = (Stage(nobody(("/" * MAX_ADDRESS_CHARS,) * MAX_ADDRESSES), at, at + 1) for at in range(7, 12))
        stages = (
            Stage(a.peer, 0, 6),
            Stage(whereabouts(friend), 6, 7),
            *inner,
            Stage(whereabouts(host), 12, 13),
        )
        message = largest(RingOpen(SESSION, Chain(CARGO, stages, "f32"), 0, 0, 5, "me"))
        assert len(encode(message)) > RingOpen.max_bytes - 200
        await stream.send(message)
        assert (await heard(stream, RingFault)).code == "refused"
    ids, _ = await toys.tokens(await toys.offer(toys.chain_of([a, b]), 5))
    assert ids == answer(5, 12)


async def test_receipts_that_fill_the_end_leave_room_for_ours(toys, answer) -> None:
    a, b = await toys.nodes((0, 6), (6, 12))
    async with stranger_at(a) as (host, stream), open_host(new_identity()) as friend:
        ends: list[RingEnd] = []
        ended = trio.Event()

        async def take(raw: Any) -> None:
            answers = MessageStream(raw, FROM_STAGE, TO_STAGE)
            async for message in answers:
                if isinstance(message, RingOpen):
                    await answers.send(RingOpened(SESSION, 0))
                if isinstance(message, RingEnd):
                    ends.append(message)
                    ended.set()

        friend.handle(RING_PROTOCOL, take, bulk=True)
        stages = (Stage(a.peer, 0, 6), Stage(whereabouts(friend), 6, 9), Stage(whereabouts(host), 9, 12))
        await stream.send(RingOpen(SESSION, Chain(CARGO, stages, "f32"), 0, 0, 5, "me"))
        await heard(stream, RingOpened)
        body = bytes(RingEnd.max_bytes - 500)
        await stream.send(RingEnd(SESSION, (Envelope(bytes(32), "stage-receipt", 1, 1, body, bytes(64)),)))
        with trio.fail_after(30):
            await ended.wait()
        assert [receipt.peer for receipt in ends[0].receipts] == [a.host.peer]
    ids, _ = await toys.tokens(await toys.offer(toys.chain_of([a, b]), 5))
    assert ids == answer(5, 12)


async def test_generations_at_their_end_break_no_link_of_others(toys, answer) -> None:
    """One more would be no message any more, and who gets such a thing hangs up on all sessions."""
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    for node in (a, b, c):
        node.stage.pace_s = 0.002
    job = await toys.offer(toys.chain_of([a, b, c]), 80)
    await toys.tokens(job, until=3)
    async with stranger_at(a) as (host, stream):
        stages = (
            Stage(a.peer, 0, 4),
            Stage(nobody(), 4, 9, (b.peer,), MAX_GENERATION),
            Stage(whereabouts(host), 9, 12),
        )
        await stream.send(RingOpen(SESSION, Chain(CARGO, stages, "f32"), 0, 0, 5, "me"))
        assert (await heard(stream, RingFault)).code == "stranded"
    _, done = await toys.tokens(job)
    assert isinstance(done, JobDone)
    assert not any(work.failed for work in done.stages)
    assert b.ring.links.counters.malformed == 0


async def test_a_head_is_no_stage_in_the_midst(toys) -> None:
    """Its engine takes jobs alone: rows for a session that it does not know would wait for ever."""
    a, b = await toys.nodes((0, 6), (6, 12))
    async with stranger_at(b) as (host, stream):
        stages = (Stage(whereabouts(host), 0, 6), Stage(b.peer, 6, 12), Stage(nobody(), 12, 13))
        await stream.send(RingOpen(SESSION, Chain(CARGO, stages, "f32"), 1, 0, 5, "me"))
        await stream.send(RingFeed(SESSION, 0, 1, bytes(MIB)))
        assert (await heard(stream, RingFault)).code == "invalid"
        assert not b.stage.memories
        assert not b.ring._waiting_bytes  # noqa: SLF001
    assert not a.stage.memories


async def test_rows_of_another_size_never_get_to_the_engine(toys) -> None:
    """It may be busy for long, and eight megabytes could pass for one row."""
    b = await toys.node(4, 9)
    b.stage.held = trio.Event()
    async with stranger_at(b) as (host, stream):
        stages = (Stage(whereabouts(host), 0, 4), Stage(b.peer, 4, 9), Stage(nobody(), 9, 12))
        await stream.send(RingOpen(SESSION, Chain(CARGO, stages, "f32"), 1, 0, 5, "me"))
        await stream.send(RingFeed(SESSION, 0, 2, bytes(8)))
        await stream.send(RingFeed(SESSION, 2, 1, bytes(MIB)))
        fault = await heard(stream, RingFault)
        assert (fault.code, "none of this model's" in fault.detail) == ("invalid", True)
        assert not b.ring._waiting_bytes  # noqa: SLF001
