"""The gateway's side of the mesh: keeps the book of Islands and drives one supervisor per job.

The driver is short on purpose: a supervisor (`routing.supervision`) says what should happen, this module makes
it happen over libp2p streams and hands the events to the HTTP side.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final, Literal, TypeVarTuple, Unpack, cast

import structlog
import trio

from gateway.service import Completed, Failed, FailureCode, JobEvent, ModelInfo, Placed, Preparing, Released
from node.p2p import Host, StreamBroken, Unreachable
from node.peers import PeerDown, PeerEvent, Peers
from node.streams import MessageStream
from protocol.adverts import ADVERT, ADVERT_KIND, METHOD_ADVERT, Accepted
from protocol.codec import Codec
from protocol.envelope import Envelope, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.jobs import FROM_ISLAND, JOB_PROTOCOL, TO_ISLAND, FromIsland, JobOffer, ToIsland
from protocol.machine import Disconnect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from protocol.work import Work
from routing.islands import Island, IslandBook
from routing.job_events import (
    Abort,
    Command,
    Consumed,
    IslandFailed,
    IslandsChanged,
    JobCompleted,
    JobFailed,
    JobPlaced,
    JobPreparing,
    JobWaiting,
    Start,
    SupervisionPolicy,
    TokensReleased,
)
from routing.placement import rank, shape_of
from routing.supervision import JobSupervisor

#: Job streams kept open in advance per Island: opening one costs a protocol negotiation, which a first token
#: should not wait for. One is refilled while the other is used.
READY_STREAMS: Final = 2

#: Preparation notices that may wait for a consumer who does not read; more are dropped, they are not data.
MAX_WAITING_NOTICES: Final = 32

#: A stream that was taken is replaced this much later: not while its job waits for its first token.
REFILL_AFTER_S: Final = 0.05

#: Cargos whose first appearance is remembered (the models list shows it); the oldest is forgotten first.
MAX_CARGOS_SEEN: Final = 4096

#: An orderly close of a job stream may take this long before it is cut.
CLOSE_S: Final = 1.0

#: How often Islands whose adverts stopped are looked for.
EXPIRY_CHECK_S: Final = 1.0

Stream = MessageStream[ToIsland, FromIsland]
JobInput = Input[PeerId, FromIsland, Command]
ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)

Ts = TypeVarTuple("Ts")

_log = structlog.get_logger("mesh")


class Mesh:
    """Islands, and jobs on them. Implements `gateway.service.InferenceService`."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        *,
        policy: SupervisionPolicy,
        now: Callable[[], Instant],
        unix_now: Callable[[], UnixNs],
    ) -> None:
        self.peer: Final = host.peer
        self._host = host
        self._peers = peers
        self._policy = policy
        self.now = now
        self._unix_now = unix_now
        self.unix_offset_ns: Final = unix_now() - now()
        self.book: IslandBook[PeerId] = IslandBook()
        self._first_seen: dict[CargoDigest, int] = {}
        self._ready: dict[PeerId, deque[Stream]] = {}
        self._jobs: dict[JobId, MeshJob] = {}
        self._nursery: trio.Nursery
        self._refill: trio.MemorySendChannel[PeerId]
        self._refills: trio.MemoryReceiveChannel[PeerId]
        self._refill, self._refills = trio.open_memory_channel[PeerId](1024)
        peers.serve(METHOD_ADVERT, ENVELOPE, self._take_advert)
        peers.subscribe(self._on_peer)

    async def keep(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the book true until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._expire)
            nursery.start_soon(self._keep_streams_ready, nursery)
            task_status.started()

    # --- what the HTTP side asks --------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        offers: dict[CargoDigest, list[Island[PeerId]]] = {}
        for island in self.book:
            for offered in island.advert.cargos:
                if offered.state != "failed":
                    offers.setdefault(CargoDigest(offered.digest), []).append(island)
        infos = [self._model_info(digest, islands) for digest, islands in offers.items()]
        return tuple(sorted(infos, key=lambda info: (info.id, -info.ready, info.version, info.digest)))

    def model(self, name: str) -> ModelInfo | None:
        for info in self.models():
            if name in {info.id, f"{info.id}@{info.version}", info.digest}:
                return info
        return None

    @asynccontextmanager
    async def run(
        self, model: ModelInfo, work: Work, *, deadline_ns: int | None = None
    ) -> AsyncGenerator[MeshJob]:
        """Run a job; leaving the context cancels what is still going on."""
        policy = self._policy
        if deadline_ns is not None:
            policy = replace(policy, deadline_ns=min(deadline_ns, policy.deadline_ns))
        job = MeshJob(self, self._nursery, JobId(secrets.token_hex(16)), model.digest, work, policy=policy)
        self._jobs[job.id] = job
        try:
            job.begin()
            yield job
        finally:
            job.abort()
            del self._jobs[job.id]

    # --- what jobs ask ------------------------------------------------------------------------------

    def place(
        self, cargo: CargoDigest, work: Work, now: Instant, excluded: frozenset[PeerId], done: int
    ) -> PeerId | None:
        ranked = rank(now, self.book, shape_of(cargo, work, done), self._peers.rtt_ns, excluded)
        return ranked[0].peer if ranked else None

    def name_of(self, peer: PeerId) -> str:
        island = self.book.get(peer)
        return island.advert.name if island is not None else peer[-8:]

    def rtt_ns(self, peer: PeerId) -> int:
        return self._peers.rtt_ns(peer) or 0

    async def job_stream(self, peer: PeerId) -> Stream:
        """A stream that is ready, or a new one. Raises Unreachable."""
        ready = self._ready.get(peer)
        self._want_stream(peer)
        if ready:
            return ready.popleft()
        return await self._open(peer)

    # --- upkeep -------------------------------------------------------------------------------------

    async def _open(self, peer: PeerId) -> Stream:
        return MessageStream(await self._host.open_stream(peer, JOB_PROTOCOL), TO_ISLAND, FROM_ISLAND)

    async def _take_advert(self, peer: PeerId, envelope: Envelope) -> Accepted:
        opened = open_untrusted(envelope, ADVERT_KIND, ADVERT, self._unix_now())
        if opened.issuer != peer:
            raise ProtocolError(Fault.WRONG_ISSUER, "an advert must come from the Island itself")
        known = self.book.get(peer) is not None
        if self.book.admit(self.now(), peer, opened.body, opened.sequence):
            for offered in opened.body.cargos:
                self._first_seen.setdefault(CargoDigest(offered.digest), self._unix_now() // SECOND_NS)
                if len(self._first_seen) > MAX_CARGOS_SEEN:
                    del self._first_seen[next(iter(self._first_seen))]
            if not known:
                _log.info("island", name=opened.body.name, peer=peer, cargos=len(opened.body.cargos))
                self._want_stream(peer)
            self._tell_jobs()
        return Accepted()

    def _tell_jobs(self) -> None:
        for job in tuple(self._jobs.values()):
            job.islands_changed()

    def _want_stream(self, peer: PeerId) -> None:
        with suppress(trio.WouldBlock):  # a missed refill costs one negotiation later
            self._refill.send_nowait(peer)

    async def _keep_streams_ready(self, nursery: trio.Nursery) -> None:
        async for peer in self._refills:
            nursery.start_soon(self._fill, peer)

    async def _fill(self, peer: PeerId) -> None:
        await trio.sleep(REFILL_AFTER_S)
        try:
            with trio.move_on_after(10):
                while self.book.get(peer) is not None:
                    ready = self._ready.setdefault(peer, deque())
                    if len(ready) >= READY_STREAMS:
                        return
                    stream = await self._open(peer)
                    self._ready.setdefault(peer, deque()).append(stream)
        except Unreachable:
            pass  # the peer table will say so soon

    def _on_peer(self, event: PeerEvent) -> None:
        if isinstance(event, PeerDown):
            self._drop(event.peer, event.reason)

    async def _expire(self) -> None:
        while True:
            await trio.sleep(EXPIRY_CHECK_S)
            for peer in self.book.expire(self.now()):
                self._drop(peer, "adverts stopped")

    def _drop(self, peer: PeerId, reason: str) -> None:
        name = self.name_of(peer)
        if self.book.lost(peer):
            _log.info("island lost", name=name, peer=peer, reason=reason)
        for stream in self._ready.pop(peer, ()):
            stream.reset()

    def _model_info(self, digest: CargoDigest, islands: list[Island[PeerId]]) -> ModelInfo:
        offers = [offered for island in islands if (offered := island.cargo(digest)) is not None]
        ready = [offered for offered in offers if offered.state == "ready"]
        first = (ready or offers)[0]
        return ModelInfo(
            id=first.name,
            digest=digest,
            version=first.version,
            runtime=first.runtime,
            context_length=min(offered.context_length for offered in ready or offers),
            publisher=first.publisher,
            islands=len(offers),
            ready=len(ready),
            decode_tps=max(offered.decode_tps for offered in offers),
            first_seen_unix_s=self._first_seen.get(digest, 0),
        )


class _Attempt:
    """One stream to one Island."""

    def __init__(self, peer: PeerId, offer: JobOffer) -> None:
        self.peer: Final = peer
        self.offer: Final = offer
        self.scope: Final = trio.CancelScope()
        self.stream: Stream | None = None
        self.offered = False
        self.orderly = False
        # Grants and a cancel that came before the offer was out: the supervisor makes few of them.
        self.waiting: list[ToIsland] = []


class MeshJob:
    """One job: its supervisor, its present attempt, and the events that the consumer has not taken yet.

    The queue of events is bounded by the supervisor's window (tokens) and MAX_WAITING_NOTICES (the rest).
    """

    def __init__(
        self,
        mesh: Mesh,
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
        self._events: deque[JobEvent] = deque()
        self._arrived = trio.Event()
        self._over = False
        self._tokens = 0
        self._attempt: _Attempt | None = None
        self._placed: JobPlaced[PeerId] | None = None
        self._began = mesh.now()
        self._timer: Instant | None = None
        self._timer_moved = trio.Event()
        self._supervisor: JobSupervisor[PeerId] = JobSupervisor(
            job,
            cargo,
            work,
            lambda now, excluded, done: mesh.place(cargo, work, now, excluded, done),
            policy=policy,
            unix_offset_ns=mesh.unix_offset_ns,
            name_of=mesh.name_of,
            consumer=mesh.peer,
        )

    def begin(self) -> None:
        self._nursery.start_soon(self._guard, self._keep_time)
        self._feed(Ordered(Start()))

    def abort(self) -> None:
        self._feed(Ordered(Abort()))

    def islands_changed(self) -> None:
        self._feed(Ordered(IslandsChanged()))

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        while True:
            while not self._events:
                if self._over:
                    return
                self._arrived = trio.Event()
                await self._arrived.wait()
            event = self._events.popleft()
            yield event
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
            self._feed(Woken())

    def _open_attempt(self, peer: PeerId, offer: JobOffer) -> None:
        attempt = self._attempt = _Attempt(peer, offer)
        self._mesh.book.reserve(peer)
        self._nursery.start_soon(self._guard, self._run_attempt, attempt)

    def _send(self, peer: PeerId, message: ToIsland) -> None:
        attempt = self._attempt
        if attempt is None or attempt.peer != peer:
            return
        if attempt.stream is None or not attempt.offered:
            attempt.waiting.append(message)
            return
        with suppress(StreamBroken):  # the attempt's reader finds out too, and tells the supervisor
            if not attempt.stream.send_nowait(message):
                # Grants only ever grow, so one that overtakes another does no harm.
                self._nursery.start_soon(self._guard, _send_later, attempt.stream, message)

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
                stream = attempt.stream = await self._mesh.job_stream(peer)
                await stream.send(attempt.offer)
                attempt.offered = True
                for message in attempt.waiting:
                    await stream.send(message)
                while (answer := await stream.receive()) is not None:
                    self._feed(Received(peer, answer))
        except (StreamBroken, Unreachable, ProtocolError) as error:
            _log.info("attempt broken", job=self.id[:8], peer=peer[-8:], reason=str(error))
        finally:
            self._mesh.book.release(peer)
            if attempt.stream is not None:
                await self._end_stream(attempt.stream, orderly=attempt.orderly)
        if self._attempt is attempt:
            self._attempt = None
            self._feed(PeerLost(peer))

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
                self._show_placed()
                self._tokens = first + len(tokens)
                self._put(Released(first, tokens))
            case JobPlaced():
                self._placed = cast("JobPlaced[PeerId]", event)
            case JobPreparing(stage, done, total):
                if stage != "loading":
                    self._show_placed()
                self._notice(Preparing(stage, done, total))
            case JobWaiting():
                self._notice(Preparing("waiting", 0, 0))
            case IslandFailed():
                failed = cast("IslandFailed[PeerId]", event)
                _log.warning(
                    "island failed a job",
                    job=self.id[:8],
                    island=self._mesh.name_of(failed.peer),
                    reason=failed.reason,
                )
                self._mesh.book.suspect(self._mesh.now(), failed.peer)
            case JobCompleted():
                self._show_placed()
                self._complete(cast("JobCompleted[PeerId]", event))
            case JobFailed(code, detail, retry_after_ms):
                _log.info("job failed", job=self.id[:8], code=code, detail=detail)
                self._put(Failed(cast("FailureCode", code), detail, retry_after_ms))
            case _:
                pass

    def _complete(self, event: JobCompleted[PeerId]) -> None:
        usage = event.usage
        tps = usage.generated_tokens * SECOND_NS / usage.decode_ns if usage.decode_ns > 0 else 0.0
        if usage.generated_tokens > 1:
            self._mesh.book.measured(event.peer, self._cargo, tps)
        _log.info(
            "job completed",
            job=self.id[:8],
            tokens=usage.completion_tokens,
            tps=round(tps),
            hand_overs=event.hand_overs,
            receipt="valid" if event.receipt is not None else "invalid",
        )
        finish = cast("Literal['stop', 'length']", event.finish)  # the supervisor admits no other
        self._put(Completed(finish, event.tail, usage, event.hand_overs, self._mesh.name_of(event.peer)))

    def _show_placed(self) -> None:
        """The Island has begun to work on it: only now is the time in queues known."""
        placed, self._placed = self._placed, None
        if placed is not None:
            peer = placed.peer
            queue_ns = self._mesh.now() - self._began
            name, rtt_ns = self._mesh.name_of(peer), self._mesh.rtt_ns(peer)
            self._put(Placed(name, peer, rtt_ns, queue_ns, placed.hand_over))
            _log.info(
                "job placed",
                job=self.id[:8],
                island=name,
                hand_over=placed.hand_over,
                tokens=self._tokens,
                rtt_ms=round(rtt_ns / MILLISECOND_NS, 2),
                queue_ms=queue_ns // MILLISECOND_NS,
            )

    def _notice(self, event: Preparing) -> None:
        if len(self._events) < MAX_WAITING_NOTICES:
            self._put(event)

    def _put(self, event: JobEvent) -> None:
        self._events.append(event)
        self._arrived.set()


async def _send_later(stream: Stream, message: ToIsland) -> None:
    with suppress(StreamBroken):
        await stream.send(message)
