"""Strangers on stages and at heads: they get no more than their share, and who is known goes on."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from node.identity import new_identity
from node.p2p import open_host
from node.streams import MessageStream
from protocol.jobs import FROM_ISLAND, JOB_PROTOCOL, TO_ISLAND, JobDone, JobError, JobOffer, JobReject
from protocol.ring import (
    FROM_STAGE,
    RING_PROTOCOL,
    TO_STAGE,
    Chain,
    RingFault,
    RingOpen,
    RingOpened,
    Stage,
    StagePeer,
)
from protocol.work import Generation, Sampling, TextPrompt

CARGO = "sha256:" + "c" * 64


async def test_a_stranger_gets_half_of_a_stage_and_others_go_on(toys, answer, make_permit) -> None:
    a, b = await toys.node(0, 6, guarded=True), await toys.node(6, 12, guarded=True)
    identity = new_identity()
    async with open_host(identity) as host:
        raw = await host.open_bulk_stream(a.host.peer, RING_PROTOCOL, a.host.addresses)
        stream = MessageStream(raw, TO_STAGE, FROM_STAGE)
        stages = (Stage(a.peer, 0, 6), Stage(StagePeer(host.peer, host.addresses), 6, 12))
        said: Counter[str] = Counter()
        for number in range(40):
            name = f"{number:032}"
            # Every second one is said to be of the gateway that is known here.
            consumer = toys.gateway.peer if number % 2 else host.peer
            permit = make_permit(identity.signer, name)
            await stream.send(RingOpen(name, Chain(CARGO, stages, "f32"), 0, 0, 5, consumer, permit=permit))
            with trio.fail_after(30):
                while not isinstance(answered := await stream.receive(), RingOpened | RingFault):
                    pass
            said[answered.code if isinstance(answered, RingFault) else "opened"] += 1
        assert said == {"opened": 2, "refused": 20, "busy": 18}
        assert len(a.stage.memories) == 2
        for number in range(3):
            ids, done = await toys.tokens(await toys.offer(toys.chain_of([a, b]), 6, f"{number + 100:032}"))
            assert isinstance(done, JobDone)
            assert ids == answer(6, 12)


@pytest.mark.parametrize("taken", [2, 0])
async def test_a_stranger_at_a_head(toys, until, answer, make_permit, taken: int) -> None:
    """With permits of its own it gets its share, without any nothing."""
    a, b = await toys.node(0, 6, guarded=True), await toys.node(6, 12, guarded=True)
    for node in (a, b):
        node.stage.pace_s = 0.002
    chain = toys.chain_of([a, b])
    identity = new_identity()
    async with open_host(identity) as host:
        await host.connect(b.host.addresses[0])
        ends: list[object] = []

        async def offer(number: int) -> None:
            name = f"{number:032}"
            stream = MessageStream(await host.open_stream(b.host.peer, JOB_PROTOCOL), TO_ISLAND, FROM_ISLAND)
            work = Generation(TextPrompt("hi"), Sampling(seed=3), max_tokens=4000)
            permit = make_permit(identity.signer, name) if taken else None
            await stream.send(JobOffer(name, CARGO, work, chain=chain, granted=4096, permit=permit))
            ends.extend([message async for message in stream if isinstance(message, JobReject | JobError)])

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(offer, number)
            await until(lambda: len(ends) == 12 - taken)
            assert len(b.stage.memories) == taken
            await until(lambda: len(a.stage.memories) == taken)
            ids, done = await toys.tokens(await toys.offer(chain, 6, "f" * 32))
            assert isinstance(done, JobDone)
            assert ids == answer(6, 12)
            nursery.cancel_scope.cancel()
