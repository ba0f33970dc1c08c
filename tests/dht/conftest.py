"""A small world of virtual time for the DHT's tests. The simulator has the large one."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from dht.events import DhtCommand, DhtEvent, Join
from dht.machine import DhtMachine
from dht.messages import DhtMessage
from dht.policy import DhtPolicy
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.machine import Emit, Ordered, PeerLost, Received, Send, WakeAt, Woken

UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS


class Book:
    """A directory: keys and groups by number."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.groups: dict[int, int] = {}

    def add(self, key: int | None = None) -> int:
        number = len(self.keys)
        digest = hashlib.sha256(f"peer {number}".encode()).digest()
        self.keys.append(int.from_bytes(digest, "big") if key is None else key)
        return number

    def group_of(self, peer: int) -> int:
        return self.groups.get(peer, 0)


@dataclass
class World:
    """Nodes on a plane; a message takes half a round trip. `liars` answer instead of a machine."""

    seed: int = 1
    book: Book = field(default_factory=Book)
    machines: dict[int, DhtMachine] = field(default_factory=dict[int, DhtMachine])
    liars: dict[int, Callable[[int, DhtMessage], Iterable[tuple[int, DhtMessage]]]] = field(
        default_factory=dict
    )
    dead: set[int] = field(default_factory=set[int])
    events: list[tuple[int, DhtEvent]] = field(default_factory=list[tuple[int, DhtEvent]])
    sent: dict[str, int] = field(default_factory=dict[str, int])
    log: list[str] | None = None
    blocked: Callable[[int, int], bool] = lambda a, b: False
    now: int = SECOND_NS
    queue: list[tuple[int, int, int, object]] = field(default_factory=list)
    order: int = 0

    def add(self, policy: DhtPolicy, *, client: bool = False, key: int | None = None) -> int:
        number = self.book.add(key)
        self.machines[number] = DhtMachine(
            number, self.book, Dice(self.seed, number), policy, unix_offset_ns=UNIX_OFFSET_NS, client=client
        )
        return number

    def rtt_ns(self, a: int, b: int) -> int:
        def place(n: int) -> tuple[float, float, float]:
            digest = hashlib.sha256(f"place {n}".encode()).digest()
            return digest[0] * 0.5, digest[1] * 0.5, 1 + digest[2] / 16

        x, y = place(a), place(b)
        return int((math.dist(x[:2], y[:2]) + x[2] + y[2]) * MILLISECOND_NS)

    def push(self, at: int, who: int, what: object) -> None:
        self.order += 1
        heapq.heappush(self.queue, (at, self.order, who, what))

    def do(self, who: int, what: object) -> list[object]:
        effects = self.machines[who].receive(Instant(self.now), what)
        for effect in effects:
            if self.log is not None:
                self.log.append(f"{self.now} {who} {effect!r}")
            match effect:
                case Send(peer, message):
                    self.send(who, peer, message)
                case WakeAt(instant):
                    self.push(instant, who, Woken())
                case Emit(event):
                    self.events.append((who, event))
        return effects

    def send(self, who: int, peer: int, message: DhtMessage) -> None:
        name = type(message).__name__
        self.sent[name] = self.sent.get(name, 0) + 1
        if peer not in self.dead and not self.blocked(who, peer):
            self.push(self.now + self.rtt_ns(who, peer) // 2, peer, Received(who, message))

    def order_of(self, who: int, command: DhtCommand) -> None:
        self.do(who, Ordered(command))

    def lose(self, who: int, peer: int) -> None:
        self.do(who, PeerLost(peer))

    def run(self, seconds: float) -> None:
        until = self.now + int(seconds * SECOND_NS)
        while self.queue and self.queue[0][0] <= until:
            at, _, who, what = heapq.heappop(self.queue)
            self.now = at
            if who in self.dead:
                continue
            if who in self.liars:
                if isinstance(what, Received):
                    for peer, message in self.liars[who](what.peer, what.message):
                        self.send(who, peer, message)
            elif who in self.machines:
                self.do(who, what)
        self.now = until

    def result(self, who: int, ticket: int, seconds: float = 60) -> DhtEvent:
        """The event that ends this order."""
        until = self.now + int(seconds * SECOND_NS)
        while True:
            for node, event in self.events:
                if node == who and getattr(event, "ticket", None) == ticket:
                    return event
            assert self.now < until, "the order did not end"
            self.run(0.02)

    def join_all(self, nodes: Iterable[int], *, gap: float = 0.02, settle: float = 10) -> None:
        dice = Dice(self.seed, 1 << 40)
        joined: list[int] = []
        for node in nodes:
            seeds = tuple(dice.sample(joined, 3))
            self.order_of(node, Join(seeds))
            self.run(gap)
            joined.append(node)
        self.run(settle)

    def closest(self, target: int, count: int, *, without: Iterable[int] = ()) -> list[int]:
        left_out = {*without, *self.dead}
        live = [n for n, m in self.machines.items() if n not in left_out and not m.client]
        return sorted(live, key=lambda n: self.book.keys[n] ^ target)[:count]


def key_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


@pytest.fixture
def new_world() -> Callable[..., World]:
    return World


@pytest.fixture
def key() -> Callable[[str], int]:
    """A key by any text."""
    return key_of


@pytest.fixture
def signer() -> Callable[[str], Signer]:
    """A signer by any text."""
    return lambda text: Signer(hashlib.sha256(text.encode()).digest())


@pytest.fixture(scope="session")
def network() -> Callable[..., World]:
    """`network(nodes, policy, seed)`: a world whose nodes have joined."""

    def build(nodes: int, policy: DhtPolicy | None = None, seed: int = 1, settle: float = 10) -> World:
        world = World(seed)
        for _ in range(nodes):
            world.add(policy or DhtPolicy())
        world.join_all(range(nodes), settle=settle)
        return world

    return build
