"""How far apart stages are: the shortest answer to a ping on each link, gathered by the end of a session."""

from __future__ import annotations

from typing import Any

from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.machine import Ordered, Received, Send, Woken
from protocol.ring import Chain, RingEnd, RingOpen, RingOpened, RingPing, RingPong, Stage, StagePeer
from routing.chains.events import ShardHeldHere
from routing.chains.ring import RingMachine, RingPolicy

CARGO = "sha256:" + "d" * 64
SESSION = "5e" * 16
A, H = PeerId("a"), PeerId("h")
CHAIN = Chain(CARGO, tuple(Stage(StagePeer(name), n * 4, n * 4 + 4) for n, name in enumerate("abh")))


def sent(machine: RingMachine, now: int, what: Any) -> list[tuple[str, Any]]:
    return [(e.peer, e.message) for e in machine.receive(Instant(now), what) if isinstance(e, Send)]


def test_the_shortest_answer_counts_and_the_end_gathers_it(ring_sign: Any) -> None:
    machine = RingMachine(PeerId("b"), sign=ring_sign, unix_offset_ns=SECOND_NS)
    sent(machine, 0, Ordered(ShardHeldHere(CARGO, 4, 8)))
    opening = RingOpen(SESSION, CHAIN, 1, upto=0, prompt=8, consumer="gateway", began=7)
    assert {type(m) for _, m in sent(machine, 0, Received(A, opening))} == {RingOpen, RingOpened}
    sent(machine, 0, Received(H, RingOpened(SESSION, 0, 0, 7)))
    ping_ns = RingPolicy().ping_ns
    for count, way_ms in enumerate((80, 40, 90), 1):
        asked_at = count * ping_ns
        (ping,) = [m for _, m in sent(machine, asked_at, Woken()) if isinstance(m, RingPing)]
        for number in (ping.number, ping.number, 99):  # once more says nothing, nor does one that was not asked
            sent(machine, asked_at + way_ms * MILLISECOND_NS, Received(H, RingPong(number)))
    ((peer, end),) = sent(machine, 4 * ping_ns, Received(A, RingEnd(SESSION, hops=(5, 6), rtts=(7,))))
    assert peer == H
    assert end.rtts == (7, 40 * MILLISECOND_NS)
