"""A stage of a chain that says whatever comes to its mind, before and behind an honest one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from node.identity import new_identity
from node.p2p import StreamBroken, open_host
from node.streams import MessageStream
from protocol.errors import ProtocolError
from protocol.jobs import JobDone
from protocol.ring import (
    FROM_STAGE,
    RING_PROTOCOL,
    TO_STAGE,
    Chain,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    RingPong,
    Stage,
    StagePeer,
)

CARGO = "sha256:" + "c" * 64
MESSAGES = 1500


class Liar:
    """Sends messages that decode and make no sense."""

    def __init__(self, seed: int, host: Any, friend: Any, victim: StagePeer) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - a test's
        self.host = host
        self.victim = victim
        self.sessions = [f"{n:032}" for n in range(12)]
        self.heard = 0
        self.friend = friend
        for each in (host, friend):
            each.handle(RING_PROTOCOL, self.answer, bulk=True)

    def number(self, most: int = 1 << 18) -> int:
        return self.dice.choice((0, 1, 2, 5, 63, 64, 100, self.dice.randrange(most)))

    def chain(self) -> Chain:
        me = StagePeer(self.host.peer, self.host.addresses)
        nobody = StagePeer(new_identity().peer, ("/ip4/127.0.0.1/tcp/1/p2p/x",))
        middle, last = self.dice.choice(((4, 9), (4, 9), (0, 4), (9, 12))), self.dice.choice((12, 12, 40))
        if self.dice.random() < 0.5:  # one that could be
            friend = StagePeer(self.friend.peer, self.friend.addresses)
            stages = (Stage(me, 0, 4), Stage(self.victim, 4, 9, (), self.number(9)), Stage(friend, 9, 12))
            return Chain(CARGO, stages, "f32")
        pick = [me, self.victim, nobody]
        stages = (
            Stage(self.dice.choice(pick), 0, middle[0], (nobody,), self.number(1000)),
            Stage(self.dice.choice((self.victim, me)), *middle, (me,), self.number(1000)),
            Stage(self.dice.choice(pick), middle[1], last, (self.victim, me), self.number(1000)),
        )
        return Chain(self.dice.choice((CARGO, CARGO, "sha256:" + "d" * 64)), stages, "f32")

    def to_stage(self) -> Any:
        session, dice = self.dice.choice(self.sessions), self.dice
        match dice.randrange(6):
            case 0 | 1:
                return RingOpen(
                    session,
                    self.chain(),
                    dice.choice((0, 1, 1, 1, 2, 3)),
                    self.number(),
                    self.number(),
                    "me",
                    deterministic=dice.random() < 0.3,
                    began=self.number(),
                )
            case 2 | 3:
                rows = dice.randrange(1, 70)
                size = 4 * rows if dice.random() < 0.8 else dice.randrange(1, 300)
                return RingFeed(session, self.number(), rows, bytes(size), self.number(4))
            case 4:
                return RingEnd(session)
            case _:
                return RingPing(self.number())

    def from_stage(self) -> Any:
        session, dice = self.dice.choice(self.sessions), self.dice
        match dice.randrange(4):
            case 0:
                return RingOpened(
                    session, self.number(), self.number(5), self.number(), again=dice.random() < 0.5
                )
            case 1:
                return RingAck(session, self.number(), self.number(), self.number())
            case 2:
                return RingFault(session, dice.choice(("busy", "lost", "what")), dice.randrange(8), "\x1b[0m")
            case _:
                return RingPong(self.number())

    async def answer(self, stream: Any) -> None:
        """The victim feeds us."""
        messages = MessageStream(stream, FROM_STAGE, TO_STAGE)
        async for _ in messages:
            self.heard += 1
            await messages.send(self.from_stage())

    async def feed(self) -> None:
        """We feed the victim."""
        for _ in range(MESSAGES // 100):
            stream = await self.host.open_bulk_stream(self.victim.peer, RING_PROTOCOL, self.victim.addresses)
            messages = MessageStream(stream, TO_STAGE, FROM_STAGE)
            try:
                for _ in range(100):
                    await messages.send(self.to_stage())
                    with trio.move_on_after(0.002):
                        await messages.receive()
            except (StreamBroken, ProtocolError):
                pass
            stream.reset()


@pytest.mark.parametrize("seed", [1, 2])
async def test_nonsense_hurts_nobody_else(toys, until, answer, seed: int) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    for node in (a, b, c):
        node.stage.pace_s = 0.001
        node.stage.slots = 64
    job = await toys.offer(toys.chain_of([a, b, c]), 120)
    async with open_host(new_identity()) as host, open_host(new_identity()) as friend:
        liar = Liar(seed, host, friend, b.peer)
        with trio.fail_after(60):
            await liar.feed()
        assert liar.heard  # it was believed now and then
    ids, done = await toys.tokens(job)
    assert ids == answer(120, 12)
    assert isinstance(done, JobDone)
    assert not any(work.failed for work in done.stages)
    assert [node.host.counters.handler_failures for node in (a, b, c)] == [0, 0, 0]
    assert b.ring._waiting_bytes < 1 << 20  # noqa: SLF001
