"""Nodes of chains in one process, each with its own host, whose engine is arithmetic instead of a model.

What a stage makes of a row depends on all rows before it, as in a model: rows that are lost, doubled or fed
to a memory that is not what it should be change all tokens that follow.
"""

from __future__ import annotations

import functools
import math
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec
import pytest
import trio

from cargos.runtimes.base import Finished, RuntimeEvent, Tokens
from cargos.runtimes.shards.base import Computed, Lost, OnEvent, Refused, StageLoad, Wanted
from node.identity import Identity, new_identity
from node.jobs import JobService
from node.p2p import Host, open_host
from node.shards.head import ChainHeads
from node.shards.ring import RingService, open_ring
from node.streams import MessageStream
from protocol.envelope import Envelope, Signer
from protocol.instants import SECOND_NS, UnixNs
from protocol.jobs import FROM_ISLAND, JOB_PROTOCOL, TO_ISLAND, JobOffer, JobTokens, Token, Usage, token_hash
from protocol.ring import SESSION_PERMIT_KIND, Chain, SessionPermit, Stage, StagePeer
from protocol.work import Generation, Sampling, TextPrompt
from routing.chains.ring_door import Door

CARGO = "sha256:" + "c" * 64
PROMPT = tuple(range(10, 90))
MODULUS = (1 << 31) - 1


def through_layers(values: Sequence[int], first: int, last: int) -> list[int]:
    """What layers make of rows."""
    rows = list(values)
    for layer in range(first, last):
        total = layer + 1
        for at, value in enumerate(rows):
            total = (total * 31 + value) % MODULUS
            rows[at] = total
    return rows


def toy_answer(count: int, layers: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """The tokens of the whole model."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(through_layers(tokens, 0, layers)[-1] % 5000)
    return tokens[len(prompt) :]


@dataclass
class _Memory:
    prompt: int
    rows: list[int] = field(default_factory=list[int])
    epoch: object = field(default_factory=object)
    head: ToySession | None = None


class ToySession:
    """A head's job."""

    def __init__(self, stage: ToyStage, session: str, work: Any, resume: tuple[int, ...], granted: int) -> None:
        self.stage = stage
        self.session = session
        self.limit = work.max_tokens
        self.tokens = [*PROMPT, *resume]
        self.resumed = len(resume)
        self.granted = granted
        self.asked = 0
        self.into, self.events = trio.open_memory_channel[RuntimeEvent](math.inf)

    def grant(self, until: int) -> None:
        self.granted = max(self.granted, until)
        self.ask()

    async def receive(self) -> RuntimeEvent:
        return await self.events.receive()

    def ask(self) -> None:
        made = len(self.tokens) - len(PROMPT)
        if self.asked < len(self.tokens) and made < min(self.granted, self.limit):
            position = self.asked
            self.asked = len(self.tokens)
            self.stage.on_event(Wanted(self.session, position, tuple(self.tokens[position:]), len(PROMPT)))

    def hear(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self.tokens) or self.asked < len(self.tokens):
            return
        made = len(self.tokens) - len(PROMPT)
        self.tokens.append(rows[len(self.tokens) - 1] % 5000)
        self.into.send_nowait(Tokens(made, (Token(self.tokens[-1], f" {self.tokens[-1]}"),)))
        made += 1
        if made == self.limit:
            usage = Usage(len(PROMPT), made, made - self.resumed)
            ids = self.tokens[len(PROMPT) :]
            self.into.send_nowait(Finished("length", "", usage, token_hash(PROMPT), token_hash(ids)))
        self.ask()


class ToyStage:
    """A `HeadRuntime` without a model. `pace_s`: what a feed takes; `hold`: nothing is computed while set."""

    def __init__(self, first: int, last: int, layers: int, on_event: OnEvent, slots: int = 4) -> None:
        self.first, self.last, self.layers = first, last, layers
        self.on_event = on_event
        self.slots = slots
        self.width = 4  # bytes of a row that it makes, the first four of which mean something
        self.wide = 4  # and of one that it takes
        self.pace_s = 0.0
        self.held = trio.Event()
        self.held.set()
        self.memories: dict[str, _Memory] = {}
        self.rows = 0
        self._into, self._work = trio.open_memory_channel[tuple[str, object, int, int, bytes]](math.inf)
        if last < layers:
            self.submit = None  # type: ignore[method-assign,assignment]

    @property
    def is_head(self) -> bool:
        return self.last == self.layers

    async def run(self) -> None:
        async for session, epoch, position, rows, payload in self._work:
            await self.held.wait()
            await trio.sleep(self.pace_s)
            memory = self.memories.get(session)
            if memory is None or memory.epoch is not epoch:
                continue
            if position > len(memory.rows):
                self.on_event(Refused(session, "invalid", f"a gap before {position}"))
                continue
            if len(payload) != self.wide * rows:
                self.memories.pop(session, None)
                self.on_event(Refused(session, "invalid", f"{len(payload)} bytes are not {rows} rows"))
                continue
            values = [struct.unpack_from("<I", payload, at * self.wide)[0] for at in range(rows)]
            memory.rows[position:] = values
            out = through_layers(memory.rows, self.first, self.last)
            self.rows += rows
            made = b"" if self.is_head else b"".join(self._row(value) for value in out[position:])
            self.on_event(Computed(session, position, rows, made, 1000, 100))
            if memory.head is not None:
                memory.head.hear(out)

    def _row(self, value: int) -> bytes:
        return struct.pack("<I", value) + bytes(self.width - 4)

    def crash(self) -> None:
        """The engine dies and starts again."""
        for session, memory in list(self.memories.items()):
            if memory.head is None:
                del self.memories[session]
            else:
                memory.rows.clear()
                memory.epoch = object()
        self.on_event(Lost())
        for memory in self.memories.values():
            if memory.head is not None:
                memory.head.asked = 0
                memory.head.ask()

    def open(self, session: str, *, dtype: str, prompt: int, deterministic: bool) -> None:  # noqa: ARG002
        if session not in self.memories and len(self.memories) >= self.slots:
            self.on_event(Refused(session, "busy", "no slot"))
            return
        self.memories[session] = _Memory(prompt)

    def feed(self, session: str, position: int, rows: int, payload: bytes) -> None:
        memory = self.memories.get(session)
        if memory is not None:
            self._into.send_nowait((session, memory.epoch, position, rows, payload))

    def close(self, session: str) -> None:
        self.memories.pop(session, None)

    def load(self) -> StageLoad:
        width = self.wide // 4
        return StageLoad("ready", self.slots, len(self.memories), 1000, 100, 500, 0, self.rows, width)

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def submit(
        self, session: str, work: Any, *, dtype: str, resume: tuple[int, ...] = (), granted: int, trip_ns: Any
    ) -> AsyncGenerator[ToySession]:
        assert dtype
        assert callable(trip_ns)
        job = ToySession(self, session, work, resume, granted)
        self.memories[session] = _Memory(len(PROMPT), head=job)
        job.ask()
        try:
            yield job
        finally:
            self.memories.pop(session, None)


@dataclass
class ToyNode:
    """One Island of a chain. `alive`: cancelled, it is gone as if killed."""

    identity: Identity
    alive: trio.CancelScope = field(default_factory=trio.CancelScope)
    up: trio.Event = field(default_factory=trio.Event)
    host: Host = None  # type: ignore[assignment]
    ring: RingService = None  # type: ignore[assignment]
    stage: ToyStage = None  # type: ignore[assignment]
    jobs: JobService = None  # type: ignore[assignment]

    @property
    def peer(self) -> StagePeer:
        return StagePeer(self.identity.peer, self.host.addresses)

    async def run(self, first: int, last: int, layers: int, door: Door | None) -> None:
        with self.alive:
            async with (
                open_host(self.identity) as self.host,
                open_ring(self.host, self.identity.signer, unix_offset_ns=10**18, door=door) as self.ring,
                trio.open_nursery() as nursery,
            ):
                self.stage = ToyStage(first, last, layers, self.ring.events_of(CARGO))
                nursery.start_soon(self.stage.run)
                self.ring.hold(CARGO, first, last, self.stage)
                self.jobs = JobService(
                    signer=self.identity.signer,
                    runtimes={},
                    queue=4,
                    unix_now=lambda: UnixNs(1_800_000_000 * SECOND_NS),
                    changed=lambda: None,
                    heads=ChainHeads(self.ring, self.host.peer).job_for,
                )
                self.host.handle(JOB_PROTOCOL, self.jobs.handle)
                self.up.set()
                await trio.sleep_forever()

    def kill(self) -> None:
        """Its connections break at once, with nothing said."""
        for connection in (*self.host._bulk.all, *chain.from_iterable(self.host._connections.values())):  # noqa: SLF001
            connection._channel.close()  # noqa: SLF001
        self.alive.cancel()


async def slow_line(
    to: str, bytes_per_s: int, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """A way to the peer at this address that takes its time: reports its own address."""
    _, kind, host, _, port, *rest = to.split("/")

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        size = max(1000, bytes_per_s // 50)
        try:
            while data := await source.receive_some(size):
                await sink.send_all(data)
                await trio.sleep(len(data) / bytes_per_s)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await sink.aclose()

    async def serve(inbound: trio.SocketStream) -> None:
        # Little may lie between: else it would be a fast line with a delay.
        inbound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        async with await trio.open_tcp_stream(host, int(port)) as outbound, trio.open_nursery() as nursery:
            nursery.start_soon(pump, inbound, outbound)
            nursery.start_soon(pump, outbound, inbound)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        own = listeners[0].socket.getsockname()[1]
        task_status.started("/".join(("", kind, "127.0.0.1", "tcp", str(own), *rest)))


def permit_of(signer: Signer, session: str, cargo: str = CARGO) -> Envelope:
    """For as long as any test takes."""
    return signer.seal(
        SESSION_PERMIT_KIND,
        SessionPermit(session, cargo),
        sequence=1,
        expires_unix_ns=UnixNs(4_000_000_000 * SECOND_NS),
    )


class Toys:
    """Makes nodes; plays the gateway."""

    def __init__(self, nursery: trio.Nursery, gateway: Host, signer: Signer) -> None:
        self.nursery = nursery
        self.gateway = gateway
        self.signer = signer

    async def node(self, first: int, last: int, layers: int = 12, *, guarded: bool = False) -> ToyNode:
        """`guarded`: it works for this gateway; all others are guests."""
        node = ToyNode(new_identity())
        door = Door(lambda _: {self.gateway.peer}) if guarded else None
        self.nursery.start_soon(node.run, first, last, layers, door)
        with trio.fail_after(30):
            await node.up.wait()
        return node

    async def nodes(self, *ranges: tuple[int, int], layers: int = 12) -> list[ToyNode]:
        return [await self.node(first, last, layers) for first, last in ranges]

    async def slowly(self, node: ToyNode, bytes_per_s: int) -> tuple[str, ...]:
        """Addresses at which the node is met over a slow line."""
        return (await self.nursery.start(slow_line, node.host.addresses[0], bytes_per_s),)

    def chain_of(self, nodes: Sequence[ToyNode], spares: dict[int, Sequence[ToyNode]] | None = None) -> Chain:
        stages = tuple(
            Stage(
                node.peer,
                node.stage.first,
                node.stage.last,
                tuple(spare.peer for spare in (spares or {}).get(index, ())),
            )
            for index, node in enumerate(nodes)
        )
        return Chain(CARGO, stages, "f32")

    async def offer(
        self, chain: Chain | None, count: int, job: str = "1" * 32, to: ToyNode | None = None, **more: Any
    ) -> MessageStream[Any, Any]:
        """The stream on which the head answers."""
        address = to.host.addresses[0] if to is not None else chain.head.addresses[0]  # type: ignore[union-attr]
        peer = await self.gateway.connect(address)
        stream = MessageStream(await self.gateway.open_stream(peer, JOB_PROTOCOL), TO_ISLAND, FROM_ISLAND)
        work = Generation(TextPrompt("hi"), Sampling(seed=3), max_tokens=count)
        offer = JobOffer(job, CARGO, work, chain=chain, granted=4096, permit=permit_of(self.signer, job))
        await stream.send(msgspec.structs.replace(offer, **more))
        return stream

    async def tokens(self, stream: MessageStream[Any, Any], until: int | None = None) -> tuple[list[int], Any]:
        """Ids until there are so many, or the last message."""
        ids: list[int] = []
        start = 0
        with trio.fail_after(30):
            while until is None or len(ids) < until:
                message = await stream.receive()
                if isinstance(message, JobTokens):
                    assert not ids or message.first == start + len(ids)
                    start = start if ids else message.first
                    ids += [token.id for token in message.tokens]
                elif type(message).__name__ not in {"JobAccept", "JobProgress"}:
                    return ids, message
        return ids, None


@pytest.fixture
async def toys() -> AsyncGenerator[Toys]:
    identity = new_identity()
    async with open_host(identity) as gateway, trio.open_nursery() as nursery:
        yield Toys(nursery, gateway, identity.signer)
        nursery.cancel_scope.cancel()


@pytest.fixture
def make_permit() -> Callable[..., Envelope]:
    """`make_permit(signer, session)`"""
    return permit_of


@pytest.fixture
def answer() -> Callable[..., list[int]]:
    return toy_answer


@pytest.fixture
def make_stage() -> Callable[..., ToyStage]:
    """`make_stage(first, last, layers, on_event)`: a stage of arithmetic; run it."""
    return ToyStage
