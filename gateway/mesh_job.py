"""One job on the mesh: drives its supervisor over streams and hands its events to the HTTP side."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, Literal, Protocol, TypeVarTuple, Unpack, cast

import msgspec
import structlog
import trio

from gateway.chains.keeper import ChainKeeper
from gateway.service import Completed, Failed, FailureCode, JobEvent, Placed, Preparing, Released
from gateway.work_done import WorkBook
from node.p2p import StreamBroken, Unreachable
from node.streams import MessageStream
from protocol.envelope import Envelope
from protocol.errors import ProtocolError
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.jobs import FromIsland, JobOffer, ToIsland, Usage
from protocol.machine import Disconnect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from protocol.ring import Chain
from protocol.work import Work
from routing.islands import IslandBook
from routing.job_events import (
    Abort,
    Ask,
    Assignment,
    ChainFailed,
    Command,
    Consumed,
    Full,
    IslandFailed,
    IslandsChanged,
    JobCompleted,
    JobFailed,
    JobPlaced,
    JobPreparing,
    JobWaiting,
    NotYet,
    SpeedSeen,
    StageSeen,
    Start,
    SupervisionPolicy,
    TokensReleased,
)
from routing.supervision import JobSupervisor

#: Preparation notices that may wait for a consumer who does not read; more are dropped, they are not data.
MAX_WAITING_NOTICES: Final = 32

#: Shorter prompts say more about the network than about the Island's prefill rate.
LEAST_PROMPT_TOKENS: Final = 32

#: An orderly close of a job stream may take this long before it is cut.
CLOSE_S: Final = 1.0

#: A timer that fires later than this says that this process was stopped or blocked. What Islands sent meanwhile
#: waits unread, so they get PARDON_S before anybody is called stalled: enough to read a window of each.
LATE_NS: Final = 250 * MILLISECOND_NS
PARDON_S: Final = 0.25

#: A head that is silent for so long is asked whether it lives (it has a second to answer). Tokens of a slow
#: chain come more often; a long prompt only costs some questions.
HEAD_SILENCE_NS: Final = 500 * MILLISECOND_NS
HEAD_LOOK_S: Final = 0.2

Stream = MessageStream[ToIsland, FromIsland]
JobInput = Input[PeerId, FromIsland, Command]

Ts = TypeVarTuple("Ts")


class MeshView(Protocol):
    """What a job asks of the mesh. `gateway.mesh.Mesh` is one."""

    @property
    def peer(self) -> PeerId: ...
    @property
    def book(self) -> IslandBook[PeerId]: ...
    @property
    def unix_offset_ns(self) -> int: ...
    def now(self) -> Instant: ...
    @property
    def work(self) -> WorkBook: ...
    def permit_for(self, offer: JobOffer) -> Envelope: ...
    def name_of(self, peer: PeerId) -> str: ...
    def rtt_ns(self, peer: PeerId) -> int: ...
    @property
    def chains(self) -> ChainKeeper: ...
    def place(
        self, cargo: CargoDigest, work: Work, now: Instant, ask: Ask[PeerId]
    ) -> Assignment[PeerId] | NotYet | Full | None: ...
    def ready_stream(self, peer: PeerId) -> Stream | None: ...
    async def open_stream(self, peer: PeerId) -> Stream: ...
    def freed(self) -> None: ...
    def note_waiting(self, job: MeshJob, *, waiting: bool) -> None: ...


_log = structlog.get_logger("mesh")


class _Attempt:
    """One stream to one Island."""

    def __init__(self, peer: PeerId, offer: JobOffer) -> None:
        self.peer: Final = peer
        self.offer: Final = offer
        chain = offer.chain
        self.islands: Final = (peer,) if chain is None else tuple(PeerId(s.holder.peer) for s in chain.stages)
        self.scope: Final = trio.CancelScope()
        self.stream: Stream | None = None
        self.offered = False
        self.heard = Instant(0)
        self.orderly = False
        # What is to be said but can not be now: before the offer, or while the Island does not read. One
        # is enough: a later grant includes the earlier one, and a cancel comes with the end of the stream.
        self.late: ToIsland | None = None
        self.sending_late = False


class MeshJob:
    """One job: its supervisor, its present attempt, and the events that the consumer has not taken yet.

    The queue of events is bounded by the supervisor's window (tokens) and MAX_WAITING_NOTICES (the rest).
    """

    def __init__(
        self,
        mesh: MeshView,
        nursery: trio.Nursery,
        job: JobId,
        cargo: CargoDigest,
        work: Work,
        *,
        policy: SupervisionPolicy,
    ) -> None:
        self._nursery = nursery
        self.id: JobId = job
        self._mesh = mesh
        self._cargo = cargo
        self._work = work
        self._events: deque[JobEvent] = deque()
        self._arrived = trio.Event()
        self._over = False
        self._tokens = 0
        self._attempt: _Attempt | None = None
        self._placed: JobPlaced[PeerId] | None = None
        self._story: dict[str, str | int | float] | None = None
        self._without_island_since = mesh.now()
        self._accepted = mesh.now()
        self._first_token_ns: int | None = None  # after acceptance, at the present Island
        self._placed_at = mesh.now()
        self._accused: set[str] = set()
        self._chain: Chain | None = None
        self._waiting = False
        self._timer: Instant | None = None
        self._timer_moved = trio.Event()
        self._supervisor: JobSupervisor[PeerId] = JobSupervisor(
            job,
            cargo,
            work,
            lambda now, ask: mesh.place(cargo, work, now, ask),
            policy=policy,
            unix_offset_ns=mesh.unix_offset_ns,
            name_of=mesh.name_of,
            consumer=mesh.peer,
            why_nobody=lambda: mesh.chains.why_nobody(cargo),
        )

    def begin(self) -> None:
        self._nursery.start_soon(self._guard, self._keep_time)
        self._feed(Ordered(Start()))

    def abort(self) -> None:
        self._tell_story()
        self._feed(Ordered(Abort()))

    def islands_changed(self) -> None:
        self._feed(Ordered(IslandsChanged()))

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        while True:
            while not self._events:
                if self._over:
                    return
                if self._arrived.is_set():
                    self._arrived = trio.Event()
                await self._arrived.wait()
            event = self._events.popleft()
            yield event
            self._tell_story()
            if isinstance(event, Released):
                self._feed(Ordered(Consumed(event.first + len(event.tokens))))

    # --- the interpreter of the supervisor's effects -------------------------------------------------

    def _feed(self, what: JobInput) -> None:
        for effect in self._supervisor.receive(self._mesh.now(), what):
            match effect:
                case Send(peer, JobOffer() as offer):
                    self._open_attempt(peer, offer)
                case Send(peer, message):
                    self._send(peer, message)
                case Disconnect(peer, reason):
                    self._close_attempt(peer, orderly=reason in {"done", "rejected"})
                case Emit(event):
                    self._take(event)
                case _:
                    pass
        if self._supervisor.waiting is not self._waiting:
            self._waiting = not self._waiting
            self._mesh.note_waiting(self, waiting=self._waiting)
        wake = self._supervisor.next_wake()
        if wake is not None and (self._timer is None or wake < self._timer):
            self._timer_moved.set()
        if self._supervisor.ended:
            self._over = True
            self._arrived.set()
            self._timer_moved.set()

    async def _guard(self, task: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> None:
        """The outermost boundary of a job's tasks: a bug of ours ends this job, not the gateway."""
        try:
            await task(*args)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("job task failed", job=self.id)
            self._put(Failed("exhausted", "internal error"))
            self._over = True

    async def _keep_time(self) -> None:
        while (wake := self._supervisor.next_wake()) is not None:
            self._timer = wake
            self._timer_moved = trio.Event()
            with trio.move_on_after(max(0, wake - self._mesh.now()) / SECOND_NS):
                await self._timer_moved.wait()
                continue
            self._timer = None
            if self._mesh.now() - wake > LATE_NS:
                await trio.sleep(PARDON_S)
            self._feed(Woken())

    def _open_attempt(self, peer: PeerId, offer: JobOffer) -> None:
        if offer.chain is not None:
            offer = msgspec.structs.replace(offer, permit=self._mesh.permit_for(offer))
        attempt = self._attempt = _Attempt(peer, offer)
        for island in attempt.islands:
            self._mesh.book.reserve(island)
        self._nursery.start_soon(self._guard, self._run_attempt, attempt)
        if offer.chain is not None:
            self._nursery.start_soon(self._guard, self._watch_head, attempt)

    def _send(self, peer: PeerId, message: ToIsland) -> None:
        attempt = self._attempt
        if attempt is None or attempt.peer != peer:
            return
        if attempt.stream is None or not attempt.offered or attempt.sending_late:
            attempt.late = message
            return
        with suppress(StreamBroken):  # the attempt's reader finds out too, and tells the supervisor
            if not attempt.stream.send_nowait(message):
                attempt.late = message
                self._nursery.start_soon(self._guard, _send_late, attempt, attempt.stream)

    def _close_attempt(self, peer: PeerId, *, orderly: bool) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.peer == peer:
            self._attempt = None
            attempt.orderly = orderly
            attempt.scope.cancel()

    async def _run_attempt(self, attempt: _Attempt) -> None:
        peer = attempt.peer
        try:
            with attempt.scope:
                stream = await self._offer(attempt)
                await _send_late(attempt, stream)
                while (answer := await stream.receive()) is not None:
                    attempt.heard = self._mesh.now()
                    self._feed(Received(peer, answer))
        except (StreamBroken, Unreachable, ProtocolError) as error:
            _log.info("attempt broken", job=self.id[:8], peer=peer[-8:], reason=str(error))
        finally:
            for island in attempt.islands:
                self._mesh.book.release(island)
            if attempt.stream is not None:
                await self._end_stream(attempt.stream, orderly=attempt.orderly)
            if attempt.offer.chain is not None:
                self._mesh.freed()
        if self._attempt is attempt:
            self._attempt = None
            self._feed(PeerLost(peer))

    async def _watch_head(self, attempt: _Attempt) -> None:
        """A head that says nothing is asked whether it lives. The other stages wait a few seconds for another
        one, which is less than it takes to declare a peer dead.
        """
        attempt.heard = self._mesh.now()
        while self._attempt is attempt:
            await trio.sleep(HEAD_LOOK_S)
            if not attempt.offered or self._mesh.now() - attempt.heard < HEAD_SILENCE_NS:
                continue
            alive = await self._mesh.chains.lives(attempt.peer)
            if alive:
                attempt.heard = self._mesh.now()
            elif self._attempt is attempt:
                _log.info("head does not answer", job=self.id[:8], island=self._mesh.name_of(attempt.peer))
                self._attempt = None
                attempt.scope.cancel()
                self._feed(PeerLost(attempt.peer))

    async def _offer(self, attempt: _Attempt) -> Stream:
        """Make the offer; returns the stream that it went out on. Raises Unreachable, StreamBroken."""
        stream = attempt.stream = self._mesh.ready_stream(attempt.peer)
        try:
            if stream is not None:
                try:
                    await stream.send(attempt.offer)
                except StreamBroken:
                    stream = None  # it broke while it waited, which says nothing of the Island
            if stream is None:
                stream = attempt.stream = await self._mesh.open_stream(attempt.peer)
                await stream.send(attempt.offer)
        except ValueError:  # larger than a message may be, and than any model's context
            self._put(Failed("too-long", "the request is larger than a job can be"))
            self._feed(Ordered(Abort()))
            await trio.lowlevel.checkpoint()  # the attempt's scope is cancelled
            raise
        attempt.offered = True
        return stream

    async def _end_stream(self, stream: Stream, *, orderly: bool) -> None:
        if orderly:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S), suppress(StreamBroken):
                await stream.aclose()
        else:
            stream.reset()

    # --- the supervisor's events to the HTTP side ----------------------------------------------------

    def _take(self, event: object) -> None:
        match event:
            case TokensReleased(first, tokens):
                if self._first_token_ns is None:
                    self._first_token_ns = self._mesh.now() - self._accepted
                self._show_placed()
                self._tokens = first + len(tokens)
                self._put(Released(first, tokens))
            case JobPlaced():
                self._accepted, self._first_token_ns = self._mesh.now(), None
                self._placed = cast("JobPlaced[PeerId]", event)
                self._chain = self._placed.chain
                if not self._placed.hand_over:
                    self._placed_at = self._mesh.now()
                if self._chain is not None:
                    self._show_placed()  # nobody waits in a chain
            case JobPreparing(stage, done, total):
                if stage != "loading":
                    self._show_placed()
                self._notice(Preparing(stage, done, total))
            case JobWaiting():
                self._notice(Preparing("waiting", 0, 0))
            case SpeedSeen(tokens=tokens, duration_ns=duration_ns):
                seen = cast("SpeedSeen[PeerId]", event)
                if self._chain is None:  # a chain's speed is no Island's
                    self._mesh.book.measured(seen.peer, self._cargo, tokens * SECOND_NS / duration_ns)
            case IslandFailed():
                failed = cast("IslandFailed[PeerId]", event)
                _log.warning(
                    "island failed a job",
                    job=self.id[:8],
                    island=self._mesh.name_of(failed.peer),
                    reason=failed.reason,
                )
                self._mesh.book.suspect(self._mesh.now(), failed.peer)
                self._mesh.work.failed(failed.peer, timeout=failed.timeout)
                self._without_island_since = self._mesh.now()
            case ChainFailed():
                broken = cast("ChainFailed[PeerId]", event)
                _log.warning(
                    "chain broken",
                    job=self.id[:8],
                    head=self._mesh.name_of(broken.peer),
                    stages=[self._mesh.name_of(PeerId(stage.peer)) for stage in broken.stages],
                    reason=broken.reason,
                )
                self._accuse(broken.chain, broken.stages)
                self._without_island_since = self._mesh.now()
            case JobCompleted():
                self._show_placed()
                self._complete(cast("JobCompleted[PeerId]", event))
            case JobFailed(code, detail, retry_after_ms):
                self._tell_story()
                _log.info("job failed", job=self.id[:8], code=code, detail=detail)
                self._put(Failed(cast("FailureCode", code), detail, retry_after_ms))
            case _:
                pass

    def _complete(self, event: JobCompleted[PeerId]) -> None:
        usage = event.usage
        self._tell_story()
        chain, stages, work = event.chain, event.stages, self._mesh.work
        if chain is None:
            self._measure_prefill(event.peer, usage)
            work.done(event.peer, self._cargo, self._work, usage, self._tokens)
        else:
            self._mesh.chains.measured(self._cargo, chain, stages)
            self._accuse(chain, stages)
            work.done_by_chain(chain, stages, self._work, usage, self._tokens)
        _log.info(
            "job completed",
            job=self.id[:8],
            tokens=usage.completion_tokens,
            hand_overs=event.hand_overs,
            receipt="valid" if event.receipt is not None else "invalid",
            **_account(stages, usage),
        )
        finish = cast("Literal['stop', 'length']", event.finish)  # the supervisor admits no other
        name = self._mesh.name_of(event.peer)
        lost = sum(stage.failed for stage in stages)
        final = self._mesh.chains.stages_of(chain, stages)
        self._put(Completed(finish, event.tail, usage, event.hand_overs, name, final, lost))

    def _accuse(self, chain: Chain, stages: Sequence[StageSeen]) -> None:
        """Each stage at most once for this job, however often its heads name it."""
        fresh = {stage.peer for stage in stages if stage.failed} - self._accused
        self._accused |= fresh
        self._mesh.chains.accused(self._placed_at, chain, stages, fresh)

    def _measure_prefill(self, peer: PeerId, usage: Usage) -> None:
        """How fast the prompt was read: acceptance to first token. If it waited there, we can not tell."""
        read = usage.prompt_tokens - usage.cached_tokens
        if self._first_token_ns and read >= LEAST_PROMPT_TOKENS and usage.queue_ns < LATE_NS:
            tps = read * SECOND_NS / self._first_token_ns
            self._mesh.book.measured_prefill(peer, self._cargo, tps)

    def _show_placed(self) -> None:
        """The Island has begun to work on it: only now is the time in queues known."""
        placed, self._placed = self._placed, None
        if placed is not None:
            peer = placed.peer
            queue_ns = self._mesh.now() - self._without_island_since
            name, rtt_ns = self._mesh.name_of(peer), self._mesh.rtt_ns(peer)
            stages = self._mesh.chains.stages_of(placed.chain)
            self._put(Placed(name, peer, rtt_ns, queue_ns, placed.hand_over, stages))
            self._story = {
                "job": self.id[:8],
                "island": name,
                "hand_over": placed.hand_over,
                "tokens": self._tokens,
                "rtt_ms": round(rtt_ns / MILLISECOND_NS, 2),
                "queue_ms": queue_ns // MILLISECOND_NS,
            }
            if stages:
                self._story["layers"] = ", ".join(f"{s.island} {s.first}-{s.last - 1}" for s in stages)

    def _tell_story(self) -> None:
        """Log where the job runs, once the consumer has taken an event: no token waits for a log line."""
        story, self._story = self._story, None
        if story is not None:
            _log.info("job placed", **story)

    def _notice(self, event: Preparing) -> None:
        if len(self._events) < MAX_WAITING_NOTICES:
            self._put(event)

    def _put(self, event: JobEvent) -> None:
        self._events.append(event)
        self._arrived.set()


def _account(stages: Sequence[StageSeen], usage: Usage) -> dict[str, int | list[float]]:
    """What a log line says of a chain: how many stages there were, signed for it, and were lost; how far each
    was from the one before it; how often the ring was gone round, and what became of guesses.
    """
    if not stages:
        return {}
    return {
        "stages": len(stages),
        "signed": sum(stage.receipt is not None for stage in stages),
        "lost": sum(stage.failed for stage in stages),
        "links_ms": [round(stage.rtt_ns / MILLISECOND_NS, 2) for stage in stages if not stage.failed],
        "traversals": usage.traversals,
        "drafts": usage.drafts,
        "drafts_right": usage.drafts_right,
    }


async def _send_late(attempt: _Attempt, stream: Stream) -> None:
    """Send what could not be sent at once. Whoever reads the stream finds out if it is broken."""
    attempt.sending_late = True
    with suppress(StreamBroken):
        while attempt.late is not None:
            message, attempt.late = attempt.late, None
            await stream.send(message)
    attempt.sending_late = False
