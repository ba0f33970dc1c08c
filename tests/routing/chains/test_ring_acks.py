"""When a stage acknowledges rows, and what the stage before it learns from that."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.machine import Ordered, Received, Send, Woken
from protocol.ring import (
    Chain,
    RingAck,
    RingEnd,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    RingPong,
    Stage,
    StagePeer,
)
from routing.chains.events import Done, ShardHeldHere
from routing.chains.ring import RingMachine, RingPolicy

CARGO = "sha256:" + "c" * 64
SESSION = "5e" * 16
A, H = PeerId("a"), PeerId("h")


class Middle:
    """Stage b between a and the head h, opened by a and answered by h."""

    def __init__(self, sign: Any) -> None:
        self.machine = RingMachine(PeerId("b"), RingPolicy(), sign=sign, unix_offset_ns=10**18)
        self.now = Instant(0)
        self.give(Ordered(ShardHeldHere(CARGO, 4, 8)))
        ranges = (("a", 0, 4), ("b", 4, 8), ("h", 8, 12))
        chain = Chain(CARGO, tuple(Stage(StagePeer(name), first, last) for name, first, last in ranges), "f32")
        self.hear(A, RingOpen(SESSION, chain, 1, upto=0, prompt=8, consumer="gateway", began=7))
        self.hear(H, RingOpened(SESSION, 0, 0, 7))

    def give(self, what: Any) -> list[tuple[PeerId, Any]]:
        return [(e.peer, e.message) for e in self.machine.receive(self.now, what) if isinstance(e, Send)]

    def hear(self, peer: PeerId, message: Any) -> list[tuple[PeerId, Any]]:
        return self.give(Received(peer, message))

    def compute(self, position: int, rows: int) -> list[RingAck]:
        """Rows come and are computed; what a is told."""
        payload = bytes(16 * rows)
        self.hear(A, RingFeed(SESSION, position, rows, payload))
        out = self.give(Ordered(Done(SESSION, position, rows, payload, 1000, 10)))
        return [message for peer, message in out if peer == A and isinstance(message, RingAck)]

    def wait(self, duration_ns: int) -> list[RingAck]:
        """Time passes, h answers pings; what a is told."""
        acks: list[RingAck] = []
        end = self.now + duration_ns
        while (wake := self.machine.next_wake()) is not None and wake <= end:
            self.now = Instant(max(self.now, wake))
            for peer, message in self.give(Woken()):
                if isinstance(message, RingPing):
                    self.hear(peer, RingPong(message.number))
                elif isinstance(message, RingAck):
                    acks.append(message)
        self.now = Instant(end)
        return acks

    def hop_ns(self) -> int:
        """What it says at the end about the hop to h."""
        ends = [message for _, message in self.hear(A, RingEnd(SESSION)) if isinstance(message, RingEnd)]
        return ends[0].hops[-1]


@pytest.fixture
def stage(ring_sign: Any) -> Middle:
    return Middle(ring_sign)


def test_single_rows_are_acknowledged_together_but_for_the_first_ones(stage: Middle) -> None:
    acks = [ack for row in range(22) for ack in stage.compute(row, 1)]
    assert [ack.until for ack in acks] == [1, 2, 3, 4, 12, 20]
    assert all(ack.compute_ns == 1000 for ack in acks)
    # Told later than when they were done: 0, so that nobody takes the time for theirs.
    assert stage.wait(2 * SECOND_NS)[0] == RingAck(SESSION, 22)
    assert stage.compute(22, 9) == [RingAck(SESSION, 31, 1000, 10)]


def test_an_acknowledgement_of_several_rows_measures_the_last_one(stage: Middle) -> None:
    for row in range(6):
        stage.now = Instant(row * 50 * MILLISECOND_NS)
        stage.compute(row, 1)
    stage.now = Instant(stage.now + 30 * MILLISECOND_NS)
    stage.hear(H, RingAck(SESSION, 6, 1000, 10))
    assert stage.hop_ns() == 30 * MILLISECOND_NS


def test_a_late_acknowledgement_measures_nothing(stage: Middle) -> None:
    stage.compute(0, 1)
    stage.now = Instant(900 * MILLISECOND_NS)
    stage.hear(H, RingAck(SESSION, 1))
    assert stage.hop_ns() == 0
