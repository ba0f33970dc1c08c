"""The ring service: one machine over the ring's links, and the engines of the shards that this node holds.

A short match over what the machine wants done. Everything happens in the task that has the news (a message, an
engine's event, a lost link, the alarm), nothing waits; what one step causes is queued behind it.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Final, TypeAlias

import structlog
import trio

from cargos.runtimes.shards.base import Computed, Lost, OnEvent, Refused, StageEvent, StageRuntime, Wanted
from cargos.shards.dtypes import row_bytes
from node.jobs import RECEIPT_TTL_NS
from node.machine_loop import MachineLoop
from node.overlay.clock import monotonic_now
from node.p2p import Host
from node.p2p.host import plain_errors
from node.shards.links import LinkUser, Reach, RingLinks
from protocol.envelope import Envelope, Signer
from protocol.ids import PeerId
from protocol.instants import UnixNs
from protocol.limits import MIB
from protocol.machine import Disconnect, Effect, Emit, Ordered, Received, Send, Trace
from protocol.ring import (
    DTYPES,
    STAGE_RECEIPT_KIND,
    Chain,
    Dtype,
    FromStage,
    RingEnd,
    RingFeed,
    RingOpen,
    RingPing,
    StageReceipt,
    ToStage,
)
from routing.chains.events import (
    Admit,
    Begin,
    Command,
    Compute,
    Done,
    DownstreamLost,
    Draw,
    Ended,
    EngineLost,
    EngineRefused,
    Finish,
    Release,
    RingEvent,
    SessionFailed,
    ShardHeldHere,
    StageReplaced,
    UpstreamLost,
)
from routing.chains.ring import RingMachine
from routing.chains.ring_door import Door

#: Rows that wait for the engines of this node. The machine bounds what each session sends ahead, the engine how
#: many sessions there are; beyond this nothing is read any more, not even pings.
MAX_WAITING_BYTES: Final = 1024 * MIB

#: Chains whose traversal time is remembered for the next session.
_MAX_TRIPS: Final = 64

RingMessage: TypeAlias = ToStage | FromStage

_log = structlog.get_logger("ring")


@asynccontextmanager
async def open_ring(
    host: Host, signer: Signer, *, unix_offset_ns: int, reach: Reach | None = None, door: Door | None = None
) -> AsyncGenerator[RingService]:
    """The node's part in rings. On leaving, all links are closed. `unix_offset_ns`: civil time minus trio's
    clock. `door`: whose sessions it works on; None: everybody's.
    """
    sequence = count(monotonic_now() + unix_offset_ns)  # above any number of an earlier run

    def sign(receipt: StageReceipt) -> Envelope:
        expires = UnixNs(receipt.finished_unix_ns + RECEIPT_TTL_NS)
        return signer.seal(STAGE_RECEIPT_KIND, receipt, sequence=next(sequence), expires_unix_ns=expires)

    machine = RingMachine(host.peer, sign=sign, unix_offset_ns=unix_offset_ns, door=door)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            ring = RingService(host, nursery, machine, reach=reach)
            nursery.start_soon(ring.run)
            try:
                yield ring
            finally:
                ring.close()
                nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class Held:
    """A shard that is loaded here."""

    cargo: str
    first: int
    last: int
    runtime: StageRuntime

    @property
    def is_head(self) -> bool:
        """Whether its last layer is the model's, so that it takes jobs (`HeadRuntime`)."""
        return getattr(self.runtime, "submit", None) is not None


@dataclass(slots=True, eq=False)
class RingSession:
    """A session of which this node is the head. `failing` is cancelled when it fails, `over` is set once it has
    ended, which follows when it is finished.
    """

    session: str
    cargo: str
    chain: Chain
    failure: SessionFailed | None = None
    ended: Ended | None = None
    replaced: int = 0
    over: trio.Event = field(default_factory=trio.Event)
    failing: trio.CancelScope = field(default_factory=trio.CancelScope)
    finished: bool = False

    @property
    def route(self) -> tuple[str, ...]:
        return tuple(stage.holder.peer for stage in self.chain.stages)


@dataclass(slots=True)
class RingCounters:
    """For metrics and status."""

    admitted: int = 0
    begun: int = 0
    rows: int = 0
    replaced: int = 0
    failed: int = 0
    engines_lost: int = 0


class RingService:
    """Made with the machine; `run` keeps its time. `nursery`: where links live."""

    def __init__(
        self, host: Host, nursery: trio.Nursery, machine: RingMachine, *, reach: Reach | None = None
    ) -> None:
        self.counters: Final = RingCounters()
        self._machine = machine
        self._held: dict[str, Held] = {}
        self._engine_of: dict[str, str] = {}  # session -> Cargo
        self._waiting: dict[str, deque[tuple[int, int]]] = {}  # session -> (end of rows, bytes)
        self._waiting_bytes = 0
        self._heads: dict[str, RingSession] = {}
        self._trips: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._loop: MachineLoop[PeerId, RingMessage, Command, RingEvent] = MachineLoop(machine, self._apply)
        user = LinkUser(
            self._received,
            lambda peer, reason: self._order(DownstreamLost(peer, reason)),
            lambda peer: self._order(UpstreamLost(peer)),
            lambda: self._waiting_bytes < MAX_WAITING_BYTES,
            machine.is_fed_by,
            machine.feeds,
        )
        self.links: Final = RingLinks(host, nursery, user, reach=reach)

    # --- shards ---------------------------------------------------------------------------------------

    def hold(self, cargo: str, first: int, last: int, runtime: StageRuntime) -> None:
        """From now on sessions may run through these layers, which `runtime` has loaded."""
        self._held[cargo] = Held(cargo, first, last, runtime)
        load = runtime.load()
        dtypes = DTYPES if load.width else ()
        sizes: dict[Dtype, int] = {dtype: row_bytes(dtype, load.width) for dtype in dtypes}
        self._order(ShardHeldHere(cargo, first, last, load.slots, sizes))

    def let_go(self, cargo: str) -> None:
        """No longer; the machine ends the sessions that do."""
        if cargo in self._held:
            self._order(ShardHeldHere(cargo, 0, 0))
            del self._held[cargo]
            for session in [s for s, of in self._engine_of.items() if of == cargo]:
                self._forget(session)

    def held(self, cargo: str) -> Held | None:
        """What is loaded here of a Cargo."""
        return self._held.get(cargo)

    def sessions_of(self, cargo: str) -> int:
        """Sessions that this node works on with this Cargo's shard."""
        return sum(1 for of in self._engine_of.values() if of == cargo)

    def events_of(self, cargo: str) -> OnEvent:
        """What a shard's runtime is to be opened with."""

        def tell(event: StageEvent) -> None:
            self._on_engine(cargo, event)

        return tell

    # --- heads ----------------------------------------------------------------------------------------

    def is_known(self, session: str) -> bool:
        """Does this node work on it, in whatever place?"""
        return session in self._heads or session in self._engine_of

    def turned_away(self, begin: Begin) -> tuple[str, str] | None:
        """Why this node would be no head of that session: (code, detail)."""
        return self._machine.turned_away(monotonic_now(), begin)

    def begin(self, begin: Begin) -> RingSession:
        """Start a session of ours, with us as the head of its chain."""
        session, chain = begin.session, begin.chain
        head = self._heads[session] = RingSession(session, chain.cargo, chain)
        self._engine_of[session] = chain.cargo
        self.counters.begun += 1
        self._order(begin)
        return head

    def finish(self, head: RingSession) -> None:
        """It is over, well or not: `head.over` follows. Idempotent."""
        if head.finished:
            return
        head.finished = True
        trip_ns = self._machine.trip_ns(head.session)
        if trip_ns:
            self._trips[head.route] = trip_ns
            self._trips.move_to_end(head.route)
            if len(self._trips) > _MAX_TRIPS:
                self._trips.popitem(last=False)
        self._order(Finish(head.session))

    def trip_ns(self, head: RingSession) -> int:
        """What one traversal of its ring takes for a token or a draft; 0: not known yet."""
        return self._machine.trip_ns(head.session) or self._trips.get(head.route, 0)

    # --- running --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wake the machine when it asks for it, until cancelled."""
        await self._loop.run()

    def close(self) -> None:
        """End all links; peers learn it from that."""
        self.links.close()

    def _received(self, peer: PeerId, message: RingMessage) -> None:
        self._loop.feed(Received(peer, message))

    def _order(self, command: Command) -> None:
        self._loop.feed(Ordered(command))

    def _apply(self, effect: Effect[PeerId, RingMessage, RingEvent]) -> None:
        match effect:
            case Send(peer, message):
                if isinstance(message, RingOpen | RingFeed | RingEnd | RingPing):
                    self.links.send_to_stage(peer, message)
                else:
                    self.links.send_from_stage(peer, message)
            case Emit(event):
                self._on_event(event)
            case Disconnect(peer, reason):
                self.links.drop(peer, reason)
            case Trace(name, values):
                _log.debug(name, **dict(values))
            case _:
                pass

    # --- from the machine -----------------------------------------------------------------------------

    def _on_event(self, event: RingEvent) -> None:
        match event:
            case Admit(session, cargo, dtype, prompt, deterministic):
                held = self._held.get(cargo)
                if held is None or held.is_head:
                    # A head's engine takes jobs alone: rows for anything else would wait in it for ever.
                    self._order(EngineRefused(session, "invalid", "no such shard here"))
                    return
                self._forget(session)
                self._engine_of[session] = cargo
                self.counters.admitted += 1
                held.runtime.open(session, dtype=dtype, prompt=prompt, deterministic=deterministic)
            case Compute(session, position, rows, payload):
                held = self._held_for(session)
                if held is None:
                    return  # its shard was given up; the machine has been told
                self.counters.rows += rows
                self._note_waiting(session, position + rows, len(payload))
                held.runtime.feed(session, position, rows, payload)
            case Release(session):
                held = self._held_for(session)
                self._forget(session)
                if held is not None:
                    held.runtime.close(session)
            case StageReplaced(session, chain, lost):
                self.counters.replaced += 1
                _log.info("stage replaced", session=session[:8], index=lost.index, lost=lost.peer[-8:])
                head = self._heads.get(session)
                if head is not None:
                    head.chain = chain
                    head.replaced += 1
            case SessionFailed(session):
                self.counters.failed += 1
                head = self._heads.get(session)
                if head is not None:
                    head.failure = event
                    head.failing.cancel()
            case Ended(session, chain):
                head = self._heads.pop(session, None)
                self._forget(session)
                if head is not None:
                    head.ended, head.chain = event, chain
                    head.over.set()

    # --- from the engines -----------------------------------------------------------------------------

    def _on_engine(self, cargo: str, event: StageEvent) -> None:
        match event:
            case Computed(session, position, rows, payload, compute_ns, wait_ns):
                self._note_computed(session, position + rows)
                self._order(Done(session, position, rows, payload, compute_ns, wait_ns))
            case Wanted(session, position, tokens, prompt):
                payload = struct.pack(f"<{len(tokens)}I", *tokens)
                self._order(Draw(session, position, len(tokens), payload, prompt))
            case Lost():
                self.counters.engines_lost += 1
                for session in [s for s, of in self._engine_of.items() if of == cargo]:
                    self._note_computed(session, None)
                self._order(EngineLost(cargo))
            case Refused(session, code, detail):
                self._order(EngineRefused(session, code, detail))

    # --- bookkeeping ----------------------------------------------------------------------------------

    def _held_for(self, session: str) -> Held | None:
        cargo = self._engine_of.get(session)
        return None if cargo is None else self._held.get(cargo)

    def _note_waiting(self, session: str, end: int, size: int) -> None:
        self._waiting.setdefault(session, deque()).append((end, size))
        self._waiting_bytes += size

    def _note_computed(self, session: str, end: int | None) -> None:
        """Rows below `end` wait no longer; None: none do."""
        waiting = self._waiting.get(session)
        if waiting is None:
            return
        full = self._waiting_bytes >= MAX_WAITING_BYTES
        while waiting and (end is None or waiting[0][0] <= end):
            self._waiting_bytes -= waiting.popleft()[1]
        if not waiting:
            del self._waiting[session]
        if full and self._waiting_bytes < MAX_WAITING_BYTES:
            self.links.note_room()

    def _forget(self, session: str) -> None:
        self._note_computed(session, None)
        self._engine_of.pop(session, None)
