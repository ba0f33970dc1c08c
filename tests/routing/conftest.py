"""A small world of virtual time for machines that exchange datagrams, shared by the tests of coordination."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from protocol.adverts import IslandAdvert, OfferedCargo
from protocol.coordination import COORDINATION
from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, after
from protocol.machine import Emit, Ordered, PeerLost, Received, Send, Woken

UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS


@dataclass
class Node:
    machines: list[Any]
    dead: bool = False
    events: list[tuple[int, Any]] = field(default_factory=list)


class World:
    """Nodes by number, each with one machine or more (all hear each message). Messages go through the
    codec, are delayed by `delay_ns(a, b)`, lost with `loss`, and may overtake each other. A killed node is
    silent; `tell_ns` later (None: never) those that it spoke with hear that the link is gone, as a broken
    connection does.
    """

    def __init__(self, seed: int = 0, *, loss: float = 0.0, delay_ns: Callable[[int, int], int] | None = None):
        self.now = Instant(0)
        self.dice = Dice(seed, 77)
        self.loss = loss
        self.delay_ns = delay_ns or (lambda a, b: 10 * MILLISECOND_NS)
        self.nodes: dict[int, Node] = {}
        self.messages = 0
        self.bytes = 0
        self.partitioned: set[frozenset[int]] = set()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._wakes: dict[tuple[int, int], int] = {}

    def add(self, number: int, *machines: Any) -> None:
        self.nodes[number] = Node(list(machines))

    def at(self, instant: int, action: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (instant, self._number, action))

    def order(self, number: int, command: Any, machine: int = 0) -> None:
        self._feed(number, machine, Ordered(command))

    def kill(self, number: int, *, tell_ns: int | None = None) -> None:
        self.nodes[number].dead = True
        if tell_ns is not None:
            for other in self.nodes:
                if other != number:
                    self.at(after(self.now, tell_ns), lambda other=other: self._lost(other, number))

    def revive(self, number: int, *machines: Any) -> None:
        self.add(number, *machines)

    def run(self, duration_ns: int, until: Callable[[], bool] | None = None) -> bool:
        """True as soon as `until` holds."""
        end = after(self.now, duration_ns)
        while self._queue and self._queue[0][0] <= end:
            instant, _, action = heapq.heappop(self._queue)
            self.now = Instant(max(self.now, instant))
            action()
            if until is not None and until():
                return True
        self.now = end
        return until is not None and until()

    def events(self, number: int, kind: type) -> Iterator[Any]:
        return (event for _, event in self.nodes[number].events if isinstance(event, kind))

    def _lost(self, number: int, peer: int) -> None:
        for index in range(len(self.nodes[number].machines)):
            self._feed(number, index, PeerLost(peer))

    def _feed(self, number: int, index: int, what: Any) -> None:
        node = self.nodes[number]
        if node.dead:
            return
        machine = node.machines[index]
        for effect in list(machine.receive(self.now, what)):
            match effect:
                case Send(peer, message):
                    self._post(number, peer, message)
                case Emit(event):
                    node.events.append((self.now, event))
                case _:
                    pass
        wake = machine.next_wake()
        if wake is not None:
            known = self._wakes.get((number, index))
            if known is None or wake < known or known <= self.now:
                self._wakes[number, index] = wake
                self.at(wake, lambda: self._wake(number, index, machine, wake))

    def _wake(self, number: int, index: int, machine: Any, wake: int) -> None:
        if self._wakes.get((number, index)) == wake:
            del self._wakes[number, index]
        if self.nodes[number].machines[index] is machine:
            due = machine.next_wake()
            if due is not None and due <= self.now:
                self._feed(number, index, Woken())
            elif due is not None and self._wakes.get((number, index), due + 1) > due:
                self._wakes[number, index] = due
                self.at(due, lambda: self._wake(number, index, machine, due))

    def _post(self, sender: int, peer: int, message: Any) -> None:
        data = COORDINATION.encode(message)
        self.messages += 1
        self.bytes += len(data)
        if self.dice.unit() < self.loss or frozenset((sender, peer)) in self.partitioned:
            return
        delay = self.delay_ns(sender, peer)
        delay += self.dice.below(delay // 2 + 1)
        self.at(after(self.now, delay), lambda: self._arrive(sender, peer, data))

    def _arrive(self, sender: int, peer: int, data: bytes) -> None:
        node = self.nodes.get(peer)
        if node is None or node.dead:
            return
        message = COORDINATION.decode_untrusted(data)
        for index in range(len(node.machines)):
            self._feed(peer, index, Received(sender, message))


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def make_offer(**changes: Any) -> OfferedCargo:
    fields: dict[str, Any] = {
        "digest": digest("c"),
        "name": "m",
        "version": "1",
        "runtime": "llmcpp",
        "state": "ready",
        "context_length": 2048,
        "slots": 4,
        "active": 0,
        "queued": 0,
        "decode_tps": 100.0,
        "prefill_tps": 500.0,
    }
    return OfferedCargo(**{**fields, **changes})


def make_advert(name: str = "island", *cargos: OfferedCargo, **fields: Any) -> IslandAdvert:
    return IslandAdvert(name=name, cargos=cargos or (make_offer(),), **fields)


class Kit:
    """What the tests of this folder share."""

    World = World
    unix_offset_ns = UNIX_OFFSET_NS
    digest = staticmethod(digest)
    offer = staticmethod(make_offer)
    advert = staticmethod(make_advert)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
