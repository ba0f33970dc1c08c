"""Chains in a simulated network: Islands that run production's ring machine, and gateways that use them.

`ChainIsland` is the machine of production (`routing.chains.ring`) with a modelled engine (`sim.chain_engine`)
in place of the worker process. `ChainGateway` is a model of a gateway: it asks a planner for a chain, gives the
job to its head, and when the head dies or the chain fails, gives it to the next one with the tokens so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec

from protocol.envelope import Envelope
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant, after
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Received, Send, WakeAt, Woken
from protocol.ring import (
    STAGE_RECEIPT,
    STAGE_RECEIPT_KIND,
    Chain,
    FromStage,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    RingPong,
    Stage,
    StageReceipt,
    ToStage,
)
from routing.chains.events import (
    Admit,
    Begin,
    Command,
    Compute,
    Done,
    Draw,
    Ended,
    EngineRefused,
    Finish,
    Release,
    RingEvent,
    SessionFailed,
    ShardHeldHere,
    StageReplaced,
)
from routing.chains.ring import RingMachine, RingPolicy
from sim.chain_engine import StageEngine

#: Service under which Islands and gateways speak.
CHAINS: Final = "chains"

#: A gateway that found no chain looks again this often, and gives a job up after so long.
RETRY_NS: Final = SECOND_NS
GIVE_UP_NS: Final = 120 * SECOND_NS

#: Without a token for so long, the head is taken to be stuck.
STALL_NS: Final = 30 * SECOND_NS

_NEVER: Final = Instant(0)

#: Frames around a message's own bytes, and around a session's name and numbers.
_FRAME_BYTES: Final = 120


def name_of(node: int) -> PeerId:
    """A node's peer id, as short as it can be."""
    return PeerId(f"n{node}")


def node_of(peer: str) -> int:
    return int(peer[1:])


# --- messages between gateways and heads --------------------------------------------------------------


class StartChain(msgspec.Struct, frozen=True):
    """Gateway to head: do this job. `have`: tokens that exist already."""

    job: int
    chain: Chain
    prompt: int
    output: int
    have: int


class ChainToken(msgspec.Struct, frozen=True, gc=False):
    """Head to gateway: the token of this index exists."""

    job: int
    index: int


class ChainDone(msgspec.Struct, frozen=True, gc=False):
    job: int


class ChainFailed(msgspec.Struct, frozen=True, gc=False):
    """Head to gateway: not with this chain. `peers`: whose fault it was."""

    job: int
    code: str
    peers: tuple[str, ...] = ()


class StopChain(msgspec.Struct, frozen=True, gc=False):
    """Gateway to head: somebody else does it now."""

    job: int


# --- commands and events ------------------------------------------------------------------------------


class Hold(msgspec.Struct, frozen=True, gc=False):
    """A command to an Island: from now on it has these layers (of `layers`) loaded."""

    cargo: str
    first: int
    last: int
    layers: int


class PlaceJob(msgspec.Struct, frozen=True, gc=False):
    """A command to a gateway: somebody wants this."""

    job: int
    prompt: int
    output: int


class LoadIs(msgspec.Struct, frozen=True, gc=False):
    """Emitted by an Island: sessions in its engine."""

    active: int


class Replaced(msgspec.Struct, frozen=True, gc=False):
    """Emitted by an Island: a spare took a place of a session that runs through it."""

    session: str


class JobPlacedOn(msgspec.Struct, frozen=True):
    """Emitted by a gateway: this chain shall do it. `tries`: counts from 1."""

    job: int
    chain: Chain
    tries: int


class TokenCame(msgspec.Struct, frozen=True, gc=False):
    job: int
    index: int


class JobEnded(msgspec.Struct, frozen=True, gc=False):
    """`tries`: chains that it took, 0 if it was given up."""

    job: int
    tries: int


ChainMessage: TypeAlias = ToStage | FromStage | StartChain | ChainToken | ChainDone | ChainFailed | StopChain
ChainInput: TypeAlias = Input[int, Any, Any]
ChainEffects: TypeAlias = list[Effect[int, Any, Any]]

_TO_OR_FROM_STAGE: Final = (
    RingOpen,
    RingFeed,
    RingEnd,
    RingPing,
    RingOpened,
    RingAck,
    RingFault,
    RingPong,
)


def sealed(receipt: StageReceipt) -> Envelope:
    """A receipt without a signature: nobody here checks one."""
    body = STAGE_RECEIPT.encode(receipt)
    return Envelope(bytes(32), STAGE_RECEIPT_KIND, 0, 0, body, bytes(64))


def size_of(message: ChainMessage, row_bytes: int) -> int:
    """About what it takes on the wire. Payloads here stand for rows of `row_bytes` each, except token ids."""
    match message:
        case RingFeed(payload=payload, rows=rows):
            return _FRAME_BYTES + (4 * rows if len(payload) == 4 * rows else row_bytes * rows)
        case RingOpen(chain=chain):
            return _FRAME_BYTES + sum(100 * (1 + len(stage.spares)) for stage in chain.stages)
        case StartChain(prompt=prompt, have=have):
            return 1000 + 4 * (prompt + have)
        case RingEnd(receipts=receipts):
            return _FRAME_BYTES + 300 * len(receipts)
        case _:
            return _FRAME_BYTES


@dataclass(slots=True)
class _HeadJob:
    """A job whose head is here."""

    job: int
    gateway: int
    prompt: int
    output: int
    known: int
    """Prompt and tokens so far."""


class ChainIsland:
    """A ring machine, its engine, and the jobs whose head it is."""

    def __init__(self, node: int, engine: StageEngine, policy: RingPolicy, *, unix_offset_ns: int) -> None:
        self.engine = engine
        self.ring: Final = RingMachine(name_of(node), policy, sign=sealed, unix_offset_ns=unix_offset_ns)
        self._jobs: dict[str, _HeadJob] = {}
        self._effects: deque[Effect[PeerId, ToStage | FromStage, RingEvent]] = deque()
        self._out: ChainEffects = []
        self._told = 0

    def next_wake(self) -> Instant | None:
        ring, ends = self.ring.next_wake(), self.engine.ends
        if ring is None or ends is None:
            return ring if ends is None else Instant(ends)
        return Instant(min(ring, ends))

    def receive(self, now: Instant, what: ChainInput) -> ChainEffects:
        match what:
            case Received(peer=peer, message=message):
                self._received(now, peer, message)
            case Ordered(command=Hold() as hold):
                self.engine.hold(hold.last - hold.first, is_head=hold.last == hold.layers)
                self._order(now, ShardHeldHere(hold.cargo, hold.first, hold.last))
            case PeerLost(peer=peer):
                self._tell_ring(now, PeerLost(name_of(peer)))
                for session in [s for s, job in self._jobs.items() if job.gateway == peer]:
                    self._stop(now, session)
            case Woken():
                self._tell_ring(now, Woken())
            case _:
                pass
        self._carry_out(now)
        self._compute(now)
        self._carry_out(now)
        if len(self.engine.sessions) != self._told:
            self._told = len(self.engine.sessions)
            self._out.append(Emit(LoadIs(self._told)))
        out, self._out = self._out, []
        return out

    def _received(self, now: Instant, peer: int, message: ChainMessage) -> None:
        if isinstance(message, _TO_OR_FROM_STAGE):
            self._tell_ring(now, Received(name_of(peer), message))
            return
        match message:
            case StartChain():
                self._start(now, peer, message)
            case StopChain(job=job):
                self._stop(now, _session(job))
            case _:
                pass

    # --- the engine -------------------------------------------------------------------------------

    def _compute(self, now: Instant) -> None:
        for piece, took_ns, waited_ns in self.engine.finished(now):
            job = self._jobs.get(piece.session)
            made = b"" if job is not None else b"\0" * piece.rows
            self._order(now, Done(piece.session, piece.position, piece.rows, made, took_ns, waited_ns))
            if job is not None and piece.position + piece.rows == job.known:
                self._sampled(now, piece.session, job)

    def _sampled(self, now: Instant, session: str, job: _HeadJob) -> None:
        """All rows there are have come round: the next token exists."""
        self._out.append(Send(job.gateway, ChainToken(job.job, job.known - job.prompt)))
        job.known += 1
        if job.known - job.prompt >= job.output:
            self._out.append(Send(job.gateway, ChainDone(job.job)))
            self._stop(now, session)
        else:
            self._order(now, Draw(session, job.known - 1, 1, _tokens(job.known - 1, 1), job.prompt))

    # --- jobs -------------------------------------------------------------------------------------

    def _start(self, now: Instant, gateway: int, start: StartChain) -> None:
        session = _session(start.job)
        if session in self._jobs:
            self._stop(now, session)
        if not self.engine.open(session):
            self._out.append(Send(gateway, ChainFailed(start.job, "busy")))
            return
        known = start.prompt + start.have
        self._jobs[session] = _HeadJob(start.job, gateway, start.prompt, start.output, known)
        self._order(now, Begin(session, start.chain, name_of(gateway), deterministic=False))
        self._order(now, Draw(session, 0, known, _tokens(0, known), start.prompt))

    def _stop(self, now: Instant, session: str) -> None:
        if self._jobs.pop(session, None) is not None:
            self.engine.close(session)
            self._order(now, Finish(session))

    # --- the ring machine -------------------------------------------------------------------------

    def _order(self, now: Instant, command: Command) -> None:
        self._tell_ring(now, Ordered(command))

    def _tell_ring(self, now: Instant, what: Input[PeerId, ToStage | FromStage, Command]) -> None:
        self._effects.extend(self.ring.receive(now, what))

    def _carry_out(self, now: Instant) -> None:
        """What the ring machine wants, in its order; what that makes it want comes behind."""
        while self._effects:
            match self._effects.popleft():
                case Send(peer, message):
                    self._out.append(Send(node_of(peer), message))
                case Emit(event):
                    self._heard(now, event)
                case Disconnect(peer, reason):
                    self._out.append(Disconnect(node_of(peer), reason))
                case _:
                    pass

    def _heard(self, now: Instant, event: RingEvent) -> None:
        match event:
            case Admit(session=session):
                if not self.engine.open(session):
                    self._order(now, EngineRefused(session, "busy", "no slot"))
            case Compute():
                self.engine.feed(now, event.session, event.position, event.rows)
            case Release(session=session):
                self.engine.close(session)
            case StageReplaced(session=session, lost=lost):
                if lost.failed:
                    self._out.append(Emit(Replaced(session)))
            case SessionFailed():
                job = self._jobs.get(event.session)
                if job is not None:
                    peers = tuple(work.peer for work in event.works)
                    self._out.append(Send(job.gateway, ChainFailed(job.job, event.code, peers)))
                    self._stop(now, event.session)
            case Ended():
                pass


def _session(job: int) -> str:
    return f"{job:032x}"


def _tokens(position: int, rows: int) -> bytes:
    """The same ones at the same places, whoever asks."""
    return b"".join(n.to_bytes(4, "little") for n in range(position, position + rows))


# --- gateways -----------------------------------------------------------------------------------------

Planner: TypeAlias = Callable[[Instant, int, PlaceJob, frozenset[str]], Chain | None]
"""(now, gateway, job, peers not to use) -> a chain of Islands as far as is known now, or None."""


@dataclass(slots=True)
class _Job:
    place: PlaceJob
    began: Instant
    chain: Chain | None = None
    have: int = 0
    tries: int = 0
    heard: Instant = _NEVER
    excluded: set[str] = field(default_factory=set[str])


class ChainGateway:
    """Gives jobs to chains, and sees to it that they end."""

    def __init__(self, node: int, planner: Planner) -> None:
        self._node = node
        self._planner = planner
        self._jobs: dict[int, _Job] = {}
        self._out: ChainEffects = []
        self._wake: Instant | None = None

    @property
    def open_jobs(self) -> int:
        return len(self._jobs)

    def next_wake(self) -> Instant | None:
        return self._wake

    def receive(self, now: Instant, what: ChainInput) -> ChainEffects:
        match what:
            case Ordered(command=PlaceJob() as place):
                self._jobs[place.job] = _Job(place, now)
                self._place(now, self._jobs[place.job])
            case Received(peer=peer, message=message):
                self._received(now, peer, message)
            case PeerLost(peer=peer):
                for job in [job for job in self._jobs.values() if _head(job) == peer]:
                    self._head_lost(now, job)
            case Woken():
                self._wake = None
                self._look(now)
            case _:
                pass
        if self._jobs and self._wake is None:
            self._wake = after(now, RETRY_NS)
            self._out.append(WakeAt(self._wake))
        out, self._out = self._out, []
        return out

    def _received(self, now: Instant, peer: int, message: ChainMessage) -> None:
        if not isinstance(message, ChainToken | ChainDone | ChainFailed):
            return
        job = self._jobs.get(message.job)
        if job is None or _head(job) != peer:
            return
        job.heard = now
        match message:
            case ChainToken(index=index):
                if index == job.have:
                    job.have += 1
                    self._out.append(Emit(TokenCame(message.job, index)))
            case ChainDone():
                self._end(message.job, job.tries)
            case ChainFailed(code=code, peers=peers):
                if code == "busy":
                    job.excluded.add(name_of(peer))
                job.excluded.update(peers)
                job.chain = None
                self._place(now, job)

    def _look(self, now: Instant) -> None:
        for number, job in list(self._jobs.items()):
            if now - job.began > GIVE_UP_NS and job.chain is None:
                self._end(number, 0)
            elif job.chain is None:
                job.excluded.clear()
                self._place(now, job)
            elif now - job.heard > STALL_NS:
                self._out.append(Send(_head(job), StopChain(number)))
                self._head_lost(now, job)

    def _head_lost(self, now: Instant, job: _Job) -> None:
        """Another one takes its place, if one stands by: the other stages keep what they have."""
        chain = job.chain
        if chain is None:
            return
        stage = chain.stages[-1]
        job.excluded.add(stage.holder.peer)
        job.chain = None
        if stage.spares:
            head = Stage(stage.spares[0], stage.first, stage.last, stage.spares[1:], stage.generation + 1)
            self._give(now, job, msgspec.structs.replace(chain, stages=(*chain.stages[:-1], head)))
        else:
            self._place(now, job)

    def _place(self, now: Instant, job: _Job) -> None:
        chain = self._planner(now, self._node, job.place, frozenset(job.excluded))
        if chain is not None:
            # One that is made anew has a higher generation at each place than all before it.
            generation = 100 * job.tries
            stages = tuple(msgspec.structs.replace(stage, generation=generation) for stage in chain.stages)
            self._give(now, job, msgspec.structs.replace(chain, stages=stages))

    def _give(self, now: Instant, job: _Job, chain: Chain) -> None:
        job.chain, job.heard = chain, now
        job.tries += 1
        place = job.place
        self._out.append(
            Send(node_of(chain.head.peer), StartChain(place.job, chain, place.prompt, place.output, job.have))
        )
        self._out.append(Emit(JobPlacedOn(place.job, chain, job.tries)))

    def _end(self, number: int, tries: int) -> None:
        del self._jobs[number]
        self._out.append(Emit(JobEnded(number, tries)))


def _head(job: _Job) -> int:
    return -1 if job.chain is None else node_of(job.chain.head.peer)
