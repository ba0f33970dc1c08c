"""The head of a chain for the job service: a job on a chain looks to it like a job on any runtime.

The engine's session and the ring's session live together. The ring may fail (no stage takes a place any more)
while the engine waits: then the job fails, with the account of who let it down, and another chain may do it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final, cast

import msgspec
import structlog
import trio

from cargos.runtimes.base import RuntimeEvent, RuntimeLoad, Session
from cargos.runtimes.shards.base import HeadRuntime
from node.jobs import BUSY_RETRY_MS, ChainFailed
from node.shards.ring import Held, RingService, RingSession
from protocol.ids import PeerId
from protocol.jobs import JobOffer, JobReject
from protocol.ring import StageShare, StageWork
from protocol.work import Work
from routing.chains.events import Begin

#: The end goes once round the ring; the machine gives it up sooner than this.
SETTLE_S: Final = 10.0

_log = structlog.get_logger("ring")


class ChainHeads:
    """Finds what an offer with a chain is to be run on. `me`: this node."""

    def __init__(self, ring: RingService, me: PeerId) -> None:
        self._ring = ring
        self._me = me
        self._open: set[str] = set()

    def job_for(self, offer: JobOffer, consumer: PeerId) -> HeadJob | JobReject:
        """What runs this offer, which names a chain, or why it is refused here."""
        chain = offer.chain
        if chain is None or chain.cargo != offer.cargo or not chain.is_whole or not chain.is_bounded:
            return JobReject("unknown-cargo", "these stages make no chain of that Cargo")
        if chain.head.peer != self._me:
            return JobReject("unknown-cargo", "this Island is not the last stage of that chain")
        held = self._ring.held(offer.cargo)
        last = chain.stages[-1]
        if held is None or (held.first, held.last) != (last.first, last.last):
            return JobReject("unknown-cargo", f"this Island does not hold layers {last.first} to {last.last}")
        if not held.is_head:
            return JobReject("unknown-cargo", "layers follow those that this Island holds")
        if self._ring.is_known(offer.job) or offer.job in self._open:
            # An attempt whose gateway is gone, or a chain that names us twice.
            return JobReject("busy", "this session is still being ended here", retry_after_ms=200)
        if offer.work.deterministic and chain.dtype != "f32":
            chain = msgspec.structs.replace(chain, dtype="f32")
        begin = Begin(offer.job, chain, consumer, offer.work.deterministic, offer.permit)
        away = self._ring.turned_away(begin)
        if away is not None:
            code, detail = away
            return JobReject("busy" if code == "busy" else "unknown-cargo", detail, BUSY_RETRY_MS)
        return HeadJob(self._ring, held, begin, running=self._open)


class HeadJob:
    """One job on one chain; a `Runtime` for the job service."""

    def __init__(
        self,
        ring: RingService,
        held: Held,
        begin: Begin,
        *,
        running: set[str],
    ) -> None:
        """`running`: the sessions whose jobs run now, kept by this."""
        self._running = running
        self._ring = ring
        self._runtime = cast("HeadRuntime", held.runtime)
        self._begin = begin
        self._session = begin.session
        self._chain = begin.chain
        self._cargo = held.cargo
        self._head: RingSession | None = None

    @property
    def shares(self) -> tuple[StageShare, ...]:
        """Who has which layers, as far as is known."""
        chain = self._chain if self._head is None else self._head.chain
        return tuple(StageShare(stage.holder.peer, stage.first, stage.last) for stage in chain.stages)

    def load(self) -> RuntimeLoad:
        """Of the engine here; a session waits nowhere."""
        load = self._runtime.load()
        return RuntimeLoad(
            state=load.state,
            slots=load.slots,
            active=load.active,
            queued=0,
            decode_tps=0.0,
            prefill_tps=0.0,
            restarts=load.restarts,
            tokens_total=0,
            detail=load.detail,
        )

    @asynccontextmanager
    async def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AsyncGenerator[Session]:
        """See `Runtime.session`. Leaving the context ends the session in all stages."""
        head = self._head = self._ring.begin(self._begin)
        self._running.add(self._session)
        try:
            async with self._runtime.submit(
                self._session,
                work,
                dtype=self._chain.dtype,
                resume=resume,
                granted=granted,
                trip_ns=lambda: self._ring.trip_ns(head),
            ) as inner:
                yield _ChainSession(inner, head)
        finally:
            self._running.discard(self._session)
            self._ring.finish(head)

    async def settle(self) -> tuple[StageWork, ...]:
        """End the session round the ring; what each stage did."""
        head = self._head
        if head is None:
            return ()
        self._ring.finish(head)
        with trio.move_on_after(SETTLE_S):
            await head.over.wait()
        if head.ended is None:
            _log.warning("no account of the stages", session=self._session[:8])
            return ()
        return head.ended.works


class _ChainSession:
    """The engine's session, which ends when the ring's does."""

    def __init__(self, inner: Session, head: RingSession) -> None:
        self._inner = inner
        self._head = head

    async def receive(self) -> RuntimeEvent:
        """As `Session.receive`; raises ChainFailed, too."""
        event: RuntimeEvent | None = None
        with trio.CancelScope() as scope:
            self._head.failing = scope
            if self._head.failure is not None:
                scope.cancel()
            event = await self._inner.receive()
        failure = self._head.failure
        if event is None:
            assert failure is not None  # noqa: S101 - nothing else cancels the scope
            raise ChainFailed(failure.code, failure.detail, failure.works)
        return event

    def grant(self, until: int) -> None:
        self._inner.grant(until)
