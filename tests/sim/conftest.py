"""A toy machine and a toy world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from protocol.machine import Disconnect, Emit, Ordered, PeerLost, Persist, Received, Send, Trace, WakeAt, Woken
from sim.world import World


class Say(msgspec.Struct, frozen=True, gc=False):
    """A command: send `text` to the peer; the peer echoes `echoes` times, back and forth."""

    peer: int
    text: str
    echoes: int = 0


class Word(msgspec.Struct, frozen=True, gc=False):
    text: str
    echoes: int


class Alarm(msgspec.Struct, frozen=True, gc=False):
    """A command: wake at this instant (in addition to those asked for before)."""

    instant: int


class Hang(msgspec.Struct, frozen=True, gc=False):
    """A command: drop the peer."""

    peer: int


class Keep(msgspec.Struct, frozen=True, gc=False):
    """A command: persist."""

    key: str
    value: bytes


@dataclass
class Parrot:
    """Echoes words, keeps alarms, tells its user everything it sees. `heard`: (instant, input)."""

    alarms: list[int] = field(default_factory=list)
    heard: list[tuple[int, Any]] = field(default_factory=list)

    def receive(self, now: int, what: Any) -> list[Any]:
        self.heard.append((now, what))
        match what:
            case Ordered(command=Say() as say):
                return [Send(say.peer, Word(say.text, say.echoes))]
            case Ordered(command=Alarm() as alarm):
                self.alarms = sorted([*self.alarms, alarm.instant])
                return [WakeAt(self.alarms[0])]
            case Ordered(command=Hang() as hang):
                return [Disconnect(hang.peer, "enough")]
            case Ordered(command=Keep() as keep):
                return [Persist(keep.key, keep.value), Trace("kept", (("bytes", len(keep.value)),))]
            case Received(peer=peer, message=Word() as word):
                answer = [Send(peer, Word(word.text, word.echoes - 1))] if word.echoes else []
                return [Emit((peer, word.text)), *answer]
            case Woken():
                self.alarms = [alarm for alarm in self.alarms if alarm > now]
                return [Emit("woken")]
            case PeerLost(peer=peer):
                return [Emit(("lost", peer))]
        return []

    def next_wake(self) -> int | None:
        return self.alarms[0] if self.alarms else None


@dataclass
class Toy:
    """A world of parrots. `events`: (now, node, event) as emitted."""

    world: World
    parrots: list[Parrot]
    events: list[tuple[int, int, Any]]

    def say(self, source: int, target: int, text: str = "hello", *, echoes: int = 0, at: int = 0) -> None:
        self.world.order(source, "toy", Say(target, text, echoes), at)

    def heard(self, node: int) -> list[str]:
        """Words that the node's user was told of, in order."""
        return [e[1] for _, n, e in self.events if n == node and isinstance(e, tuple) and e[0] != "lost"]

    def losses(self, node: int) -> list[tuple[int, int]]:
        """(instant, peer) of each PeerLost."""
        return [(t, e[1]) for t, n, e in self.events if n == node and isinstance(e, tuple) and e[0] == "lost"]


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """`toy(nodes, **World's arguments)`; `node_options` are add_node's."""

    def make(nodes: int, *, node_options: dict[str, Any] | None = None, seed: int = 1, **options: Any) -> Toy:
        world = World(seed, **options)
        parrots = [Parrot() for _ in range(nodes)]
        for parrot in parrots:
            world.install(world.add_node(**(node_options or {})), "toy", parrot)
        events: list[tuple[int, int, Any]] = []
        world.observe("toy", lambda now, node, event: events.append((now, node, event)))
        return Toy(world, parrots, events)

    return make


@pytest.fixture
def alarm() -> type[Alarm]:
    return Alarm


@pytest.fixture
def hang() -> type[Hang]:
    return Hang


@pytest.fixture
def keep() -> type[Keep]:
    return Keep


@pytest.fixture
def parrot() -> type[Parrot]:
    return Parrot
