"""A small world of virtual time for ring machines: links, engines, a gateway, deaths."""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from protocol.codec import encode
from protocol.dice import Dice
from protocol.envelope import SIGNATURE_BYTES, Envelope
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, after
from protocol.machine import Disconnect, Emit, Ordered, Received, Send, Woken
from protocol.ring import (
    FROM_STAGE,
    TO_STAGE,
    Chain,
    RingFeed,
    RingPing,
    RingPong,
    Stage,
    StagePeer,
    StageReceipt,
)
from routing.chains import events as ev
from routing.chains.ring import RingMachine, RingPolicy

UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS
CARGO = "sha256:" + "c" * 64
LAYERS = 12
VOCABULARY = 50_000
GRID = 32
STEP_ROWS = 63


def digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"|".join(parts), digest_size=8).digest()


def sign(receipt: StageReceipt) -> Envelope:
    return Envelope(bytes(32), "stage-receipt", 0, 0, encode(receipt), bytes(SIGNATURE_BYTES))


class Layers:
    """What layers make of rows: each output is a hash of all rows so far, so that one that is lost, doubled or
    stale changes all that follow. In deterministic sessions also of the steps they were computed in.
    """

    def __init__(self, first: int, last: int):
        self.name = struct.pack("<HH", first, last)
        self.states: list[bytes] = []

    def compute(self, position: int, rows: list[bytes], step: bytes = b"") -> list[bytes]:
        assert position <= len(self.states), "a gap"
        del self.states[position:]
        out = []
        for row in rows:
            last = self.states[-1] if self.states else b""
            self.states.append(digest(self.name, last, row, step))
            out.append(self.states[-1])
        return out


def grid_step(position: int, prompt: int) -> tuple[int, int]:
    """Where the step that has this row begins and ends, in a deterministic session."""
    if position >= prompt:
        return position, position + 1
    start = position // GRID * GRID
    return start, min(start + GRID, prompt)


def token_row(token: int) -> bytes:
    return struct.pack("<I", token)


def token_of(row: bytes) -> int:
    return int.from_bytes(row, "little") % VOCABULARY


def reference(chain: Chain, prompt: list[int], count: int, *, deterministic: bool) -> list[int]:
    """The tokens that an undisturbed ring makes."""
    parts = [Layers(stage.first, stage.last) for stage in chain.stages]
    tokens = list(prompt)
    position = 0
    while len(tokens) < len(prompt) + count:
        end = len(tokens)
        while position < end:
            start, stop = grid_step(position, len(prompt)) if deterministic else (position, position + 1)
            rows = [token_row(token) for token in tokens[start:stop]]
            step = struct.pack("<II", start, stop) if deterministic else b""
            for part in parts:
                rows = part.compute(start, rows, step)
            position = stop
        tokens.append(token_of(rows[-1]))
    return tokens[len(prompt) :]


@dataclass
class EngineSession:
    layers: Layers
    prompt: int
    deterministic: bool
    end: int = 0
    queue: list[tuple[int, list[bytes]]] = field(default_factory=list)


class Engine:
    """One step at a time, sessions in turn."""

    def __init__(self, node: Node, first: int, last: int, *, slots: int = 64):
        self.node, self.first, self.last, self.slots = node, first, last, slots
        self.sessions: dict[str, EngineSession] = {}
        self.busy = False
        self.life = 0
        self.rows = 0
        self.hung = False

    def open(self, name: str, prompt: int, *, deterministic: bool) -> bool:
        if name not in self.sessions and len(self.sessions) >= self.slots and not self.node.is_head:
            return False
        self.sessions[name] = EngineSession(Layers(self.first, self.last), prompt, deterministic)
        return True

    def feed(self, name: str, position: int, rows: list[bytes]) -> None:
        session = self.sessions.get(name)
        if session is None:
            return
        assert position <= session.end, f"a gap: {position} after {session.end}"
        while session.queue and session.queue[-1][0] + len(session.queue[-1][1]) > position:
            at, waiting = session.queue.pop()
            if at < position:
                session.queue.append((at, waiting[: position - at]))
        session.end = position + len(rows)
        session.queue.append((position, rows))
        self.work()

    def close(self, name: str) -> None:
        self.sessions.pop(name, None)

    def lost(self) -> None:
        self.sessions.clear()
        self.life += 1
        self.busy = False

    def _next_step(self, session: EngineSession) -> tuple[int, list[bytes], bytes] | None:
        position = session.queue[0][0]
        if not session.deterministic:
            rows: list[bytes] = []
            while session.queue and len(rows) < STEP_ROWS and session.queue[0][0] == position + len(rows):
                at, waiting = session.queue.pop(0)
                take = STEP_ROWS - len(rows)
                rows += waiting[:take]
                if waiting[take:]:
                    session.queue.insert(0, (at + take, waiting[take:]))
            return position, rows, b""
        start, stop = grid_step(position, session.prompt)
        assert start == position, f"row {position} is no beginning of a step"
        there = [row for at, waiting in session.queue for row in waiting]
        if len(there) < stop - start:
            return None
        rows, rest = there[: stop - start], there[stop - start :]
        session.queue = [(stop, rest)] if rest else []
        return start, rows, struct.pack("<II", start, stop)

    def work(self) -> None:
        if self.busy or self.hung:
            return
        for name in list(self.sessions):
            session = self.sessions[name]
            step = self._next_step(session) if session.queue else None
            if step is None:
                continue
            self.sessions[name] = self.sessions.pop(name)  # others first, next time
            self.busy = True
            self._start(name, session, step)
            return

    def _start(self, name: str, session: EngineSession, step: Any) -> None:
        life, duration = self.life, (1_000 + 100 * len(step[1])) * 1_000
        done = lambda: self._stepped(life, name, session, step, duration)  # noqa: E731 - short
        self.node.world.later(duration, done, self.node)

    def _stepped(self, life: int, name: str, session: EngineSession, step: Any, duration: int) -> None:
        if life != self.life:
            return
        self.busy = False
        if self.sessions.get(name) is session:
            position, rows, mark = step
            self.rows += len(rows)
            out = session.layers.compute(position, rows, mark)
            self.node.computed(name, position, out, duration)
        self.work()


class HeadJob:
    """What a head's engine does with the rows: samples, drafts, wants more."""

    def __init__(self, node: Node, name: str, prompt: list[int], resume: list[int], count: int, drafts: Drafts):
        self.node, self.name, self.prompt = node, name, len(prompt)
        self.tokens = prompt + resume
        self.goal = len(prompt) + count
        self.drafts = drafts
        self.drawn: list[int] = []
        self.at = 0
        self.out: dict[int, bytes] = {}

    def want(self, position: int) -> None:
        guesses = self.drafts(self.tokens, self.goal) if position else []  # all tokens there are, first
        self.drawn = self.tokens[position:] + guesses
        self.at = position
        session = self.node.engine.sessions[self.name]
        while session.queue and session.queue[-1][0] + len(session.queue[-1][1]) > position:
            at, waiting = session.queue.pop()
            if at < position:
                session.queue.append((at, waiting[: position - at]))
        session.end = min(session.end, position)
        self.out = {at: row for at, row in self.out.items() if at < position}
        payload = b"".join(token_row(token) for token in self.drawn)
        self.node.order(ev.Draw(self.name, position, len(self.drawn), payload, self.prompt))

    def computed(self, position: int, rows: list[bytes]) -> None:
        for index, row in enumerate(rows):
            self.out[position + index] = row
        end = self.at + len(self.drawn)
        if any(at not in self.out for at in range(self.at, end)):
            return
        known = len(self.tokens)
        guesses = self.drawn[known - self.at :]
        fresh: list[int] = []
        for row in range(known - 1, end):
            fresh.append(token_of(self.out[row]))
            if len(fresh) > len(guesses) or guesses[len(fresh) - 1] != fresh[-1]:
                break
        fresh = fresh[: self.goal - known]
        self.tokens += fresh
        self.node.world.gateway.tokens(self.node, self.name, known - self.prompt, fresh)
        if len(self.tokens) >= self.goal:
            self.node.finished(self.name)
        else:
            self.want(len(self.tokens) - 1)


Drafts = Callable[[list[int], int], list[int]]


@dataclass
class Link:
    """Opened by one side. Messages of each direction stay in order."""

    opener: str
    other: str
    up: bool = True
    last: dict[str, int] = field(default_factory=dict)


class Node:
    def __init__(self, world: World, name: str, first: int, last: int, policy: RingPolicy, slots: int):
        self.world, self.name = world, name
        self.machine = RingMachine(PeerId(name), policy, sign=sign, unix_offset_ns=UNIX_OFFSET_NS)
        self.engine = Engine(self, first, last, slots=slots)
        self.jobs: dict[str, HeadJob] = {}
        self.dead = self.frozen = False
        self.waiting: list[Callable[[], None]] = []
        self.events: list[Any] = []
        self.most_log_bytes = 0
        self._wake: int | None = None

    @property
    def is_head(self) -> bool:
        return self.engine.last == LAYERS

    def run(self, action: Callable[[], None]) -> None:
        if self.dead:
            return
        if self.frozen:
            self.waiting.append(action)
        else:
            action()

    def order(self, command: Any) -> None:
        self.give(Ordered(command))

    def give(self, what: Any) -> None:
        if self.dead:
            return
        for effect in self.machine.receive(self.world.now, what):
            match effect:
                case Send(peer, message):
                    self.world.carry(self, peer, message)
                case Disconnect(peer):
                    self.world.hang_up(self, peer)
                case Emit(event):
                    self.events.append(event)
                    self._event(event)
                case _:
                    raise AssertionError(effect)
        self.most_log_bytes = max(self.most_log_bytes, self.machine.log_bytes)
        wake = self.machine.next_wake()
        if wake is not None and (self._wake is None or wake < self._wake or self._wake <= self.world.now):
            self._wake = wake
            self.world.at(max(wake, self.world.now), lambda: self.run(lambda: self.give(Woken())))

    def _event(self, event: Any) -> None:
        match event:
            case ev.Admit():
                if not self.engine.open(event.session, event.prompt, deterministic=event.deterministic):
                    refused = ev.EngineRefused(event.session, "busy", "no slot")
                    self.world.later(100_000, lambda: self.order(refused), self)
            case ev.Compute():
                size = len(event.payload) // event.rows
                rows = [event.payload[at : at + size] for at in range(0, len(event.payload), size)]
                self.engine.feed(event.session, event.position, rows)
            case ev.Release():
                self.engine.close(event.session)
            case ev.SessionFailed():
                self.jobs.pop(event.session, None)
                self.engine.close(event.session)
                self.world.later(0, lambda: self.order(ev.Finish(event.session)), self)
                self.world.gateway.failed(self, event)
            case ev.Ended():
                self.world.gateway.ended(self, event)
            case _:
                pass

    def computed(self, name: str, position: int, rows: list[bytes], duration: int) -> None:
        job = self.jobs.get(name)
        done = ev.Done(name, position, len(rows), b"" if job else b"".join(rows), duration, 0)
        self.order(done)
        if job is not None:
            job.computed(position, rows)

    def finished(self, name: str) -> None:
        self.jobs.pop(name)
        self.engine.close(name)
        self.order(ev.Finish(name))

    def cancel(self, name: str) -> None:
        """The gateway does not want it any more."""
        if name in self.jobs:
            self.finished(name)

    def submit(
        self, name: str, chain: Chain, prompt: list[int], resume: list[int], count: int, **how: Any
    ) -> None:
        if self.dead or self.frozen:
            return
        deterministic = how["deterministic"]
        self.order(ev.Begin(name, chain, PeerId("gateway"), deterministic))
        self.engine.open(name, len(prompt), deterministic=deterministic)
        job = self.jobs[name] = HeadJob(self, name, prompt, resume, count, how["drafts"])
        job.want(0)

    def lose_engine(self) -> None:
        """Its process dies and comes back at once."""
        if self.dead:
            return
        self.engine.lost()
        self.order(ev.EngineLost(CARGO))
        for job in list(self.jobs.values()):
            self.engine.open(job.name, job.prompt, deterministic=self.world.deterministic)
            job.out.clear()
            job.want(0)


@dataclass
class Order:
    """A job as the gateway knows it."""

    name: str
    chain: Chain
    prompt: list[int]
    count: int
    how: dict[str, Any]
    got: list[int] = field(default_factory=list)
    head: str = ""
    attempts: int = 0
    ended: list[Any] = field(default_factory=list)
    failures: list[Any] = field(default_factory=list)
    done_at: int | None = None
    gaps: list[int] = field(default_factory=list)
    last_at: int = 0


class Gateway:
    """Takes tokens in order of their index, and gives the rest to another head when one is lost."""

    def __init__(self, world: World):
        self.world = world
        self.orders: dict[str, Order] = {}

    def start(self, name: str, chain: Chain, prompt: list[int], count: int, **how: Any) -> Order:
        order = self.orders[name] = Order(name, chain, prompt, count, how)
        self.dispatch(order, chain)
        return order

    def dispatch(self, order: Order, chain: Chain) -> None:
        if order.head:
            old = self.world.nodes[order.head]
            self.world.later(0, lambda: old.cancel(order.name), old)
        order.attempts += 1
        order.chain, order.head = chain, chain.head.peer
        order.last_at = self.world.now
        resume, attempt = list(order.got), order.attempts
        node = self.world.nodes[order.head]

        def begin() -> None:
            if order.attempts == attempt:
                node.submit(order.name, chain, order.prompt, resume, order.count, **order.how)

        self.world.later(2 * MILLISECOND_NS, begin)

    def tokens(self, node: Node, name: str, first: int, tokens: list[int]) -> None:
        order, attempt = self.orders[name], self.orders[name].attempts

        def arrive() -> None:
            if order.head == node.name and order.attempts == attempt and order.done_at is None:
                assert first == len(order.got), "tokens of another index"
                order.got.extend(tokens)
                order.gaps.append(self.world.now - order.last_at)
                order.last_at = self.world.now
                if len(order.got) >= order.count:
                    order.done_at = self.world.now

        self.world.later(3 * MILLISECOND_NS, arrive)

    def failed(self, node: Node, event: Any) -> None:
        order = self.orders[event.session]
        if order.head == node.name:
            order.failures.append(event)
            self.world.later(2 * MILLISECOND_NS, lambda: self.again(order))

    def ended(self, node: Node, event: Any) -> None:
        self.orders[event.session].ended.append(event)

    def head_lost(self, name: str) -> None:
        for order in self.orders.values():
            if order.head == name and order.done_at is None:
                self.again(order)

    def again(self, order: Order) -> None:
        """With Islands that live, and as many of those before as do; like a planner that was told."""
        if order.done_at is not None:
            return
        used: set[str] = set()
        stages = []
        for stage in order.chain.stages:
            all_there = [peer for peer in self.world.holders(stage.first, stage.last) if peer not in used]
            if not all_there:
                self.world.later(SECOND_NS, lambda: self.again(order))
                return
            holder = stage.holder.peer if stage.holder.peer in all_there else all_there[0]
            used.add(holder)
            spares = tuple(StagePeer(peer) for peer in all_there if peer != holder)[:3]
            generation = (order.attempts + 1) << 8
            stages.append(Stage(StagePeer(holder), stage.first, stage.last, spares, generation))
        self.dispatch(order, Chain(order.chain.cargo, tuple(stages), order.chain.dtype))


class World:
    """See the module's text. `delay_ns`: one way, between any two; up to `jitter_ns` more for each message."""

    def __init__(self, seed: int = 0, *, delay_ns: int = 5 * MILLISECOND_NS, policy: RingPolicy | None = None):
        self.now = Instant(0)
        self.dice = Dice(seed, 4)
        self.jitter, self.jitter_ns = Dice(seed, 8), 0
        self.delay_ns = delay_ns
        self.policy = policy or RingPolicy()
        self.nodes: dict[str, Node] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.gateway = Gateway(self)
        self.deterministic = False
        self.messages = 0
        self.fed_rows: dict[str, int] = {}
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    # --- building -----------------------------------------------------------------------------------

    def add(
        self, name: str, first: int, last: int, *, policy: RingPolicy | None = None, slots: int = 64
    ) -> Node:
        node = self.nodes[name] = Node(self, name, first, last, policy or self.policy, slots)
        node.order(ev.ShardHeldHere(CARGO, first, last))
        return node

    def ring(self, stages: int, *, spares: int = 1, **how: Any) -> Chain:
        """Islands `0`, `1`, … and their spares `0a`, `0b`, …"""
        places = []
        for index in range(stages):
            first, last = LAYERS * index // stages, LAYERS * (index + 1) // stages
            names = [str(index), *(f"{index}{'abc'[spare]}" for spare in range(spares))]
            for name in names:
                if name not in self.nodes:
                    self.add(name, first, last, **how)
            places.append(Stage(StagePeer(names[0]), first, last, tuple(StagePeer(name) for name in names[1:])))
        return Chain(CARGO, tuple(places), "f32")

    def holders(self, first: int, last: int) -> list[str]:
        return [
            node.name
            for node in self.nodes.values()
            if (node.engine.first, node.engine.last) == (first, last) and not node.dead and not node.frozen
        ]

    # --- time -----------------------------------------------------------------------------------------

    def at(self, instant: int, action: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (instant, self._number, action))

    def later(self, duration_ns: int, action: Callable[[], None], node: Node | None = None) -> None:
        self.at(self.now + duration_ns, action if node is None else lambda: node.run(action))

    def run(self, *, until: Callable[[], bool] = lambda: False, limit_ns: int = 60 * SECOND_NS) -> None:
        end = after(self.now, limit_ns)
        while self._queue and self._queue[0][0] <= end and not until():
            when, _, action = heapq.heappop(self._queue)
            self.now = Instant(max(self.now, when))
            action()
        if not until():
            self.now = max(self.now, end)

    # --- links ----------------------------------------------------------------------------------------

    def carry(self, sender: Node, to: str, message: Any) -> None:
        self.messages += 1
        to_stage = type(message).__name__ in {"RingOpen", "RingFeed", "RingEnd", "RingPing"}
        codec = TO_STAGE if to_stage else FROM_STAGE
        message = codec.decode_untrusted(codec.encode(message))
        key = (sender.name, to) if to_stage else (to, sender.name)
        link = self.links.get(key)
        if link is None:
            if not to_stage:
                return
            link = self.links[key] = Link(sender.name, to)
            if to not in self.nodes or self.nodes[to].dead:
                self.later(self.delay_ns, lambda: self._refused(sender, link))
        if not link.up or to not in self.nodes:
            return
        delay_ns = self.delay_ns + self.jitter.below(self.jitter_ns + 1)
        when = max(self.now + delay_ns, link.last.get(sender.name, 0))
        link.last[sender.name] = when

        def arrive() -> None:
            if link.up or (self.links.get(key) is link):
                self.nodes[to].run(lambda: self._deliver(link, key, sender.name, to, message))

        self.at(when, arrive)

    def _deliver(self, link: Link, key: tuple[str, str], sender: str, to: str, message: Any) -> None:
        if self.links.get(key) is link and link.up:
            self.nodes[to].give(Received(PeerId(sender), message))

    def _refused(self, sender: Node, link: Link) -> None:
        if self.links.get((link.opener, link.other)) is link:
            del self.links[link.opener, link.other]
            sender.run(lambda: sender.order(ev.DownstreamLost(PeerId(link.other), "connection refused")))

    def break_link(self, opener: str, other: str) -> None:
        link = self.links.pop((opener, other), None)
        if link is None:
            return
        link.up = False
        a, b = self.nodes[opener], self.nodes[other]
        self.later(self.delay_ns, lambda: a.order(ev.DownstreamLost(PeerId(other), "reset")), a)
        self.later(self.delay_ns, lambda: self._tell_upstream_lost(opener, b), b)

    def _tell_upstream_lost(self, opener: str, node: Node) -> None:
        if (opener, node.name) not in self.links:
            node.order(ev.UpstreamLost(PeerId(opener)))

    def hang_up(self, node: Node, peer: str) -> None:
        link = self.links.pop((node.name, peer), None)
        if link is not None:
            link.up = False
            other = self.nodes[peer]
            self.later(self.delay_ns, lambda: self._tell_upstream_lost(node.name, other), other)

    # --- deaths ---------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        node = self.nodes[name]
        node.dead = True
        for opener, other in list(self.links):
            if name in {opener, other}:
                self.break_link(opener, other)
        self.later(20 * MILLISECOND_NS, lambda: self.gateway.head_lost(name))

    def freeze(self, name: str) -> None:
        self.nodes[name].frozen = True
        self.later(1500 * MILLISECOND_NS, lambda: self._stalled(name))

    def _stalled(self, name: str) -> None:
        if self.nodes[name].frozen:
            self.gateway.head_lost(name)

    def thaw(self, name: str) -> None:
        node = self.nodes[name]
        node.frozen = False
        waiting, node.waiting = node.waiting, []
        for action in waiting:
            action()


@pytest.fixture
def ring_world() -> type[World]:
    return World


@pytest.fixture
def ring_reference() -> Callable[..., list[int]]:
    return reference


@pytest.fixture
def ring_sign() -> Callable[[StageReceipt], Envelope]:
    return sign


class Bench:
    """One machine, which the test plays all others to, and what it did."""

    def __init__(
        self, cargo: str, session: str, me: str, layers: tuple[int, int], policy: RingPolicy | None = None
    ):
        self.session = session
        self.machine = RingMachine(PeerId(me), policy or RingPolicy(), sign=sign, unix_offset_ns=UNIX_OFFSET_NS)
        self.now = Instant(0)
        self.order(ev.ShardHeldHere(cargo, *layers))

    def give(self, what: Any) -> list[Any]:
        """What it sends, as (peer, message), what it tells, as the event, and whom it hangs up on."""
        out: list[Any] = []
        for effect in self.machine.receive(self.now, what):
            match effect:
                case Send(peer, message):
                    out.append((peer, message))
                case Emit(event):
                    out.append(event)
                case _:
                    out.append(effect)
        return out

    def hear(self, peer: str, message: Any) -> list[Any]:
        return self.give(Received(PeerId(peer), message))

    def order(self, command: Any) -> list[Any]:
        return self.give(Ordered(command))

    def wait(self, duration_ns: int, answering: tuple[str, ...] = ()) -> list[Any]:
        """Time passes; the named peers answer pings."""
        out: list[Any] = []
        end = self.now + duration_ns
        while (wake := self.machine.next_wake()) is not None and wake <= end:
            self.now = Instant(max(self.now, wake))
            told = self.give(Woken())
            for one in told:
                match one:
                    case (str() as peer, RingPing(number)) if peer in answering:
                        told += self.hear(peer, RingPong(number))
                    case _:
                        pass
            out += told
        self.now = Instant(end)
        return out

    def feed(self, position: int, rows: int, *, peer: str = "a", turn: int = 0, mark: int = 1) -> list[Any]:
        return self.hear(peer, RingFeed(self.session, position, rows, bytes([mark]) * 16 * rows, turn))

    def done(self, position: int, rows: int, mark: int = 2) -> list[Any]:
        return self.order(ev.Done(self.session, position, rows, bytes([mark]) * 16 * rows, 1000, 10))


@pytest.fixture
def ring_bench() -> type[Bench]:
    return Bench
