"""The Island's side of the job stream: admit, run, stream, sign.

One call of `JobService.handle` serves one stream, which carries one attempt at one job. The stream is
the job's life: when it breaks or closes, the session in the runtime ends and its slot is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from cargos.runtimes.base import Finished, JobRefused, Progress, Runtime, RuntimeFailed, Session, Tokens
from node.p2p import StreamBroken
from node.streams import ByteStream, MessageStream
from protocol.envelope import Signer
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, UnixNs
from protocol.jobs import (
    FROM_ISLAND,
    RECEIPT_KIND,
    TO_ISLAND,
    FromIsland,
    JobAccept,
    JobCancel,
    JobDone,
    JobError,
    JobGrant,
    JobOffer,
    JobProgress,
    JobReject,
    JobTokens,
    Receipt,
    ToIsland,
    Token,
)
from protocol.limits import MAX_REMOTE_TEXT_CHARS, MAX_TOKENS_PER_FRAME

#: Receipts are claimed within minutes; a month leaves room for disputes and for a gateway that was away.
RECEIPT_TTL_NS: Final = 30 * 24 * 3600 * SECOND_NS

#: What a busy Island suggests: about the time in which one of its slots becomes free.
BUSY_RETRY_MS: Final = 500

#: After the last message the gateway closes the stream; one that does not may not hold a task for ever.
LINGER_S: Final = 5.0

_log = structlog.get_logger("jobs")
Stream = MessageStream[FromIsland, ToIsland]


@dataclass(slots=True)
class RunningJob:
    """For status displays."""

    job: str
    cargo: str
    consumer: PeerId
    started: float
    tokens: int = 0
    state: str = "queued"


@dataclass(slots=True)
class JobCounters:
    accepted: int = 0
    rejected: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0


class JobService:
    """Runs jobs on the Island's runtimes. `runtimes` maps a Cargo digest to its runtime; it may change."""

    def __init__(
        self,
        *,
        signer: Signer,
        runtimes: dict[str, Runtime],
        queue: int,
        unix_now: Callable[[], UnixNs],
        changed: Callable[[], None],
    ) -> None:
        self._signer = signer
        self._runtimes = runtimes
        self._queue = queue
        self._unix_now = unix_now
        self._changed = changed
        self._receipts = 0
        self.jobs: dict[int, RunningJob] = {}
        self.counters = JobCounters()
        self.draining = False

    async def handle(self, byte_stream: ByteStream) -> None:
        """Serve one job stream until its end."""
        stream: Stream = MessageStream(byte_stream, FROM_ISLAND, TO_ISLAND)
        try:
            offer = await stream.receive()
            if offer is None:
                return  # a stream kept ready in advance and not needed
            if not isinstance(offer, JobOffer):
                stream.reset()
                return
            await self._serve(stream, offer)
        except ProtocolError as error:
            _log.warning("bad message", peer=stream.peer, fault=error.fault, detail=error.detail)
            stream.reset()
        except StreamBroken:
            pass  # the gateway is gone, and with it whoever wanted the answer

    async def _serve(self, stream: Stream, offer: JobOffer) -> None:
        runtime = self._runtimes.get(offer.cargo)
        refusal = self._refusal(runtime)
        if runtime is None or refusal is not None:
            self.counters.rejected += 1
            await stream.send(refusal or JobReject("unknown-cargo"))
            await _linger(stream)
            return
        self.counters.accepted += 1
        job = RunningJob(offer.job, offer.cargo, stream.peer, trio.current_time())
        key = id(job)
        self.jobs[key] = job
        self._changed()
        log = _log.bind(job=offer.job[:8], peer=stream.peer[-8:])
        log.info("job accepted", resume=len(offer.resume))
        try:
            await stream.send(JobAccept(ahead=runtime.load().queued))
            ended = await self._run(stream, offer, runtime, job)
        finally:
            del self.jobs[key]
            self.counters.tokens += job.tokens
            self._changed()
            if job.state not in {"done", "failed"}:
                self.counters.cancelled += 1
            log.info("job ended", state=job.state, tokens=job.tokens)
        if ended:
            await _linger(stream)

    def _refusal(self, runtime: Runtime | None) -> JobReject | None:
        if runtime is None:
            return JobReject("unknown-cargo", "this Island does not run that Cargo")
        if self.draining:
            return JobReject("draining", "this Island is shutting down")
        load = runtime.load()
        if load.state == "failed":
            return JobReject("unknown-cargo", load.detail[:MAX_REMOTE_TEXT_CHARS])
        if load.queued >= self._queue:
            return JobReject("busy", f"{load.queued} jobs wait", BUSY_RETRY_MS)
        return None

    async def _run(self, stream: Stream, offer: JobOffer, runtime: Runtime, job: RunningJob) -> bool:
        """True if the job came to its own end, False if the consumer left."""
        ended = False
        async with trio.open_nursery() as nursery:
            scope = trio.move_on_after(offer.deadline_ms * MILLISECOND_NS / SECOND_NS)
            with scope:
                async with runtime.session(offer.work, resume=offer.resume, granted=offer.granted) as session:
                    nursery.start_soon(_obey, stream, session, scope)
                    ended = await self._stream_out(stream, offer, session, job)
            nursery.cancel_scope.cancel()
        return ended

    async def _stream_out(self, stream: Stream, offer: JobOffer, session: Session, job: RunningJob) -> bool:
        started = self._unix_now()
        try:
            while True:
                event = await session.receive()
                match event:
                    case Progress(stage, done, total):
                        job.state = stage
                        await stream.send(JobProgress(stage, done, total))
                    case Tokens(first, tokens):
                        job.state = "running"
                        job.tokens += len(tokens)
                        for start, part in _frames(tokens):
                            await stream.send(JobTokens(first + start, part))
                    case Finished():
                        job.state = "done"
                        self.counters.done += 1
                        await stream.send(self._done(offer, event, stream.peer, started))
                        return True
        except JobRefused as refused:
            job.state = "failed"
            self.counters.failed += 1
            await stream.send(JobError(refused.code, refused.detail[:MAX_REMOTE_TEXT_CHARS], retryable=False))
        except RuntimeFailed as failure:
            job.state = "failed"
            self.counters.failed += 1
            await stream.send(JobError("runtime", str(failure)[:MAX_REMOTE_TEXT_CHARS], retryable=True))
        return True

    def _done(self, offer: JobOffer, end: Finished, consumer: PeerId, started: UnixNs) -> JobDone:
        now = self._unix_now()
        receipt = Receipt(
            job=offer.job,
            cargo=offer.cargo,
            consumer=consumer,
            prompt_hash=end.prompt_hash,
            output_hash=end.output_hash,
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            first=len(offer.resume),
            seed=offer.work.sampling.seed,
            started_unix_ns=started,
            finished_unix_ns=now,
        )
        self._receipts += 1
        envelope = self._signer.seal(
            RECEIPT_KIND, receipt, sequence=self._receipts, expires_unix_ns=UnixNs(now + RECEIPT_TTL_NS)
        )
        return JobDone(end.finish, end.tail, end.usage, envelope)


def _frames(tokens: tuple[Token, ...]) -> Iterator[tuple[int, tuple[Token, ...]]]:
    for start in range(0, len(tokens), MAX_TOKENS_PER_FRAME):
        yield start, tokens[start : start + MAX_TOKENS_PER_FRAME]


async def _obey(stream: Stream, session: Session, scope: trio.CancelScope) -> None:
    """Take the gateway's grants; end the job when it cancels, closes or breaks the stream."""
    try:
        while (message := await stream.receive()) is not None:
            match message:
                case JobGrant(until=until):
                    session.grant(until)
                case JobCancel():
                    break
                case JobOffer():
                    _log.warning("a second offer on one stream", peer=stream.peer)
                    stream.reset()
                    break
    except StreamBroken:
        pass
    except ProtocolError as error:
        _log.warning("bad message", peer=stream.peer, fault=error.fault, detail=error.detail)
        stream.reset()
    scope.cancel()


async def _linger(stream: Stream) -> None:
    """Close our side and wait for the gateway's, so that the last message is not cut off by a reset."""
    await stream.send_eof()
    with trio.move_on_after(LINGER_S):
        while await stream.receive() is not None:
            pass
    await stream.aclose()
