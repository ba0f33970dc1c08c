"""The Island's side of the job stream: admit, run, stream, sign.

One call of `JobService.handle` serves one stream, which carries one attempt at one job. The stream is
the job's life: when it breaks or closes, the session in the runtime ends and its slot is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

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
from protocol.limits import MAX_REMOTE_TEXT_CHARS, MAX_TOKEN_WINDOW, MAX_TOKENS_PER_FRAME
from protocol.ring import StageShare, StageWork

#: Receipts are claimed within minutes; a month leaves room for disputes and for a gateway that was away.
RECEIPT_TTL_NS: Final = 30 * 24 * 3600 * SECOND_NS

#: What a busy Island suggests: about the time in which one of its slots becomes free.
BUSY_RETRY_MS: Final = 500

#: A stream that waits this long for its offer is kept in reserve. A gateway keeps two or so; with more than
#: MAX_RESERVE_STREAMS of them it holds places that others need, and the newest are reset.
RESERVE_AFTER_S: Final = 30.0
MAX_RESERVE_STREAMS: Final = 32

#: A gateway may grant a whole context at once; we hold at most MAX_TOKEN_WINDOW tokens that it has not taken,
#: and move the engine on in steps of this.
GRANT_STEP: Final = MAX_TOKEN_WINDOW // 4

#: Of an error's code (protocol/jobs.py).
MAX_CODE_CHARS: Final = 32

#: After the last message the gateway closes the stream; one that does not may not hold a task for ever.
LINGER_S: Final = 5.0

_log = structlog.get_logger("jobs")
Stream = MessageStream[FromIsland, ToIsland]


class ChainFailed(RuntimeFailed):
    """The chain can not go on with this job; another one may. `code` as in `RingFault`. `works`: the stages
    that let it down.
    """

    def __init__(self, code: str, detail: str, works: tuple[StageWork, ...]) -> None:
        super().__init__(detail)
        self.code = code
        self.works = works


class ChainJob(Runtime, Protocol):
    """One job on one chain of which this Island is the head. Its session raises ChainFailed, too."""

    @property
    def shares(self) -> tuple[StageShare, ...]:
        """Who has which layers now."""
        ...

    async def settle(self) -> tuple[StageWork, ...]:
        """Once the job is finished: what each stage did."""
        ...


Heads: TypeAlias = Callable[[JobOffer, PeerId], ChainJob | JobReject]
"""What runs an offer that names a chain, for this consumer."""


@dataclass(slots=True)
class RunningJob:
    """For status displays, and what a job on a chain is run by."""

    job: str
    cargo: str
    consumer: PeerId
    started: float
    tokens: int = 0
    state: str = "queued"
    chain: ChainJob | None = None


@dataclass(slots=True)
class JobCounters:
    accepted: int = 0
    rejected: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0


class JobService:
    """Runs jobs on the Island's runtimes. `runtimes` maps a Cargo digest to its runtime; it may change.
    `heads`: what takes jobs on chains; without it they are refused.
    """

    def __init__(
        self,
        *,
        signer: Signer,
        runtimes: dict[str, Runtime],
        queue: int,
        unix_now: Callable[[], UnixNs],
        changed: Callable[[], None],
        heads: Heads | None = None,
    ) -> None:
        self._heads = heads
        self._signer = signer
        self._runtimes = runtimes
        self._queue = queue
        self._unix_now = unix_now
        self._changed = changed
        # Later than any number of an earlier run, so that no receipt looks like a replay.
        self._receipts: int = unix_now()
        self._reserve: Counter[PeerId] = Counter()
        self.jobs: dict[int, RunningJob] = {}
        self.counters = JobCounters()
        self.draining = False

    async def handle(self, byte_stream: ByteStream) -> None:
        """Serve one job stream until its end."""
        stream: Stream = MessageStream(byte_stream, FROM_ISLAND, TO_ISLAND)
        try:
            offer = await self._await_offer(stream)
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

    async def _await_offer(self, stream: Stream) -> ToIsland | None:
        """The stream's first message; None if it ends without one."""
        with trio.move_on_after(RESERVE_AFTER_S):
            return await stream.receive()
        if self._reserve[stream.peer] >= MAX_RESERVE_STREAMS:
            _log.warning("too many streams without an offer", peer=stream.peer)
            stream.reset()
            return None
        self._reserve[stream.peer] += 1
        try:
            return await stream.receive()
        finally:
            self._reserve[stream.peer] -= 1
            if not self._reserve[stream.peer]:
                del self._reserve[stream.peer]

    async def _serve(self, stream: Stream, offer: JobOffer) -> None:
        runtime: Runtime | None = None
        chain = self._chain_job(offer, stream.peer)
        if isinstance(chain, JobReject):
            refusal, chain = chain, None
        else:
            runtime = chain or self._runtimes.get(offer.cargo)
            refusal = self._refusal(offer, runtime)
        if runtime is None or refusal is not None:
            self.counters.rejected += 1
            await stream.send(refusal or JobReject("unknown-cargo"))
            await _linger(stream)
            return
        self.counters.accepted += 1
        job = RunningJob(offer.job, offer.cargo, stream.peer, trio.current_time(), chain=chain)
        key = id(job)
        self.jobs[key] = job
        self._changed()
        log = _log.bind(job=offer.job[:8], peer=stream.peer[-8:])
        log.debug("job accepted", resume=len(offer.resume))  # info would cost the first token its time
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

    def _chain_job(self, offer: JobOffer, consumer: PeerId) -> ChainJob | JobReject | None:
        """What runs it if it names a chain."""
        if offer.chain is None:
            return None
        if self._heads is None:
            return JobReject("unknown-cargo", "this Island takes no part in chains")
        return self._heads(offer, consumer)

    def _refusal(self, offer: JobOffer, runtime: Runtime | None) -> JobReject | None:
        if runtime is None:
            return JobReject("unknown-cargo", "this Island does not run that Cargo")
        if self.draining:
            return JobReject("draining", "this Island is shutting down")
        load = runtime.load()
        if load.state == "failed":
            return JobReject("unknown-cargo", load.detail[:MAX_REMOTE_TEXT_CHARS])
        # The runtime's own count may lag behind a burst of offers; ours does not.
        here = sum(1 for job in self.jobs.values() if job.cargo == offer.cargo)
        waiting = max(load.queued, here - load.slots)
        # In a chain nobody waits: other stages would keep a place for who does not work.
        queue = 0 if offer.chain is not None else self._queue
        if waiting >= queue and (load.queued or here >= load.slots):
            return JobReject("busy", f"{waiting} jobs wait", BUSY_RETRY_MS)
        return None

    async def _run(self, stream: Stream, offer: JobOffer, runtime: Runtime, job: RunningJob) -> bool:
        """True if the job came to its own end, False if the consumer left."""
        ended = False
        async with trio.open_nursery() as nursery:
            scope = trio.move_on_after(offer.deadline_ms * MILLISECOND_NS / SECOND_NS)
            with scope:
                granted = min(offer.granted, len(offer.resume) + MAX_TOKEN_WINDOW)
                async with runtime.session(offer.work, resume=offer.resume, granted=granted) as session:
                    window = _Window(session, len(offer.resume), granted, offer.granted)
                    nursery.start_soon(_obey, stream, window, scope)
                    with suppress(StreamBroken):  # here: the nursery would wrap it in a group
                        ended = await self._stream_out(stream, offer, session, window, job)
            nursery.cancel_scope.cancel()
        return ended

    async def _stream_out(
        self, stream: Stream, offer: JobOffer, session: Session, window: _Window, job: RunningJob
    ) -> bool:
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
                        window.sent(first + len(tokens))
                    case Finished():
                        job.state = "done"
                        self.counters.done += 1
                        await stream.send(await self._done(offer, event, job, started))
                        return True
        except JobRefused as refused:
            job.state = "failed"
            self.counters.failed += 1
            await stream.send(JobError(refused.code, refused.detail[:MAX_REMOTE_TEXT_CHARS], retryable=False))
        except RuntimeFailed as failure:
            job.state = "failed"
            self.counters.failed += 1
            code, works = "runtime", ()
            if isinstance(failure, ChainFailed):
                code, works = f"chain-{failure.code}"[:MAX_CODE_CHARS], failure.works
            detail = str(failure)[:MAX_REMOTE_TEXT_CHARS]
            await stream.send(JobError(code, detail, retryable=True, stages=works))
        return True

    async def _done(self, offer: JobOffer, end: Finished, job: RunningJob, started: UnixNs) -> JobDone:
        works: tuple[StageWork, ...] = ()
        shares: tuple[StageShare, ...] = ()
        if job.chain is not None:
            works, shares = await job.chain.settle(), job.chain.shares
        now = UnixNs(max(started, self._unix_now()))  # civil time may have been set back meanwhile
        receipt = Receipt(
            job=offer.job,
            cargo=offer.cargo,
            consumer=job.consumer,
            prompt_hash=end.prompt_hash,
            output_hash=end.output_hash,
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            first=len(offer.resume),
            seed=offer.work.sampling.seed,
            started_unix_ns=started,
            finished_unix_ns=now,
            stages=shares,
        )
        self._receipts += 1
        envelope = self._signer.seal(
            RECEIPT_KIND, receipt, sequence=self._receipts, expires_unix_ns=UnixNs(now + RECEIPT_TTL_NS)
        )
        return JobDone(end.finish, end.tail, end.usage, envelope, works)


class _Window:
    """What the gateway granted, cut to what we are willing to hold for it."""

    def __init__(self, session: Session, sent: int, granted: int, asked: int) -> None:
        self._session = session
        self._sent = sent
        self._granted = granted
        self._asked = asked

    def grant(self, until: int) -> None:
        """The gateway allows tokens below this index."""
        self._asked = max(self._asked, until)
        self._pass_on()

    def sent(self, until: int) -> None:
        """Tokens below this index have left."""
        self._sent = until
        self._pass_on()

    def _pass_on(self) -> None:
        until = min(self._asked, self._sent + MAX_TOKEN_WINDOW)
        if until > self._granted and (until == self._asked or until >= self._granted + GRANT_STEP):
            self._granted = until
            self._session.grant(until)


def _frames(tokens: tuple[Token, ...]) -> Iterator[tuple[int, tuple[Token, ...]]]:
    for start in range(0, len(tokens), MAX_TOKENS_PER_FRAME):
        yield start, tokens[start : start + MAX_TOKENS_PER_FRAME]


async def _obey(stream: Stream, window: _Window, scope: trio.CancelScope) -> None:
    """Take the gateway's grants; end the job when it cancels, closes or breaks the stream."""
    try:
        while (message := await stream.receive()) is not None:
            match message:
                case JobGrant(until=until):
                    window.grant(until)
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
