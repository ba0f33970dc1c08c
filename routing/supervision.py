"""One job's supervisor: nothing is lost when an Island is.

A machine that lives in the gateway for one job. It dispatches the job to an Island, checks what comes back,
and on loss, stall or broken promise dispatches the rest (the same work plus the tokens so far) to the next.
What it emits is one unbroken sequence: tokens in order of their index, none twice, none missing.

States: waiting (no Island can take it now) -> offered (an attempt was sent out) -> running (accepted) ->
ended. An attempt is identified by its peer: there is at most one at a time, and the driver drops its
stream on `Disconnect`, so nothing of an old attempt arrives after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.codec import excerpt
from protocol.ids import CargoDigest, JobId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.jobs import (
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
    ToIsland,
)
from protocol.limits import MAX_CONTEXT_TOKENS
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from protocol.ring import Chain
from protocol.work import Generation
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
    JobEvent,
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
    Verdict,
)
from routing.job_receipts import Facts, later_session, receipt_untrusted, stages_untrusted, usage_plausible
from routing.pace import Pace

P = TypeVar("P")

#: A refusal for load without a hint is retried after this.
BUSY_RETRY_NS: Final = 250 * MILLISECOND_NS

#: A refusing Island's hint does not make us ask more often than this.
MIN_RETRY_NS: Final = 50 * MILLISECOND_NS

#: An Island that failed this job is not asked again for the same job for this long; after that it is only
#: the last choice, because the coordinator's book suspects it.
FAILED_COOLDOWN_NS: Final = 2 * SECOND_NS

#: Progress notices of one attempt: the longest prompt in chunks of 32 tokens gives 8,192, loading some hundred.
MAX_PROGRESS_NOTICES: Final = 10_000

#: A job that waits for layers to be loaded asks this often how far that is; it is told when they are.
NOT_YET_NS: Final = SECOND_NS

#: What a head says when a stage and its spares have no free slot, and when it is asked again: adverts tell by
#: then who is full.
CHAIN_BUSY: Final = "chain-busy"
CHAIN_BUSY_NS: Final = 500 * MILLISECOND_NS

#: Reasons that any Island would give: the consumer's to mend.
CONSUMER_ERRORS: Final = frozenset({"too-long", "invalid"})


Effects: TypeAlias = Iterator[Effect[P, ToIsland, JobEvent[P]]]
Placer: TypeAlias = Callable[[Instant, Ask[P]], Assignment[P] | NotYet | Full | None]
"""The best Island or chain for it; NotYet: there will be one; Full: all have as much as they take; None: there
is none. Pure, reads the coordinator's book.
"""


class _State(Enum):
    WAITING = "waiting"
    OFFERED = "offered"
    RUNNING = "running"
    ENDED = "ended"


class JobSupervisor(Generic[P]):
    """See the module's text. `unix_offset_ns`: civil time minus the clock that instants come from.
    `consumer`: whose name receipts must bear. `why_nobody`: what is known of why no Island can take it.
    """

    def __init__(
        self,
        job: JobId,
        cargo: CargoDigest,
        work: Generation,
        place: Placer[P],
        *,
        policy: SupervisionPolicy,
        unix_offset_ns: int,
        name_of: Callable[[P], str],
        consumer: str,
        why_nobody: Callable[[], str] = str,
    ) -> None:
        self._job = job
        self._cargo = cargo
        self._work = work
        self._place = place
        self._policy = policy
        self._unix_offset_ns = unix_offset_ns
        self._name_of = name_of
        self._consumer, self._why_nobody = consumer, why_nobody
        self._state = _State.WAITING
        self._peer: P | None = None
        self._chain: Chain | None = None
        self._going_on = False
        self._before: Chain | None = None
        self._session, self._sessions = job, 0
        self._accusers: frozenset[P] = frozenset()
        self._lost: dict[str, Instant] = {}
        self._ids: list[int] = []
        self._resumed_at = 0
        self._consumed = 0
        self._granted = 0
        self._placed = 0
        self._failures = 0
        self._last_failure = ""
        self._cooldown: dict[P, Instant] = {}
        self._busy: frozenset[P] = frozenset()
        self._deadline = Instant(0)
        self._without_island_since: Instant | None = None
        self._pace = Pace(Instant(0))
        self._notices = 0
        self._verdict: Verdict[P] | None = None
        self._not_yet_until: Instant | None = None
        self._seen_loading: NotYet | None = None

    @property
    def ended(self) -> bool:
        return self._state is _State.ENDED

    @property
    def waiting(self) -> bool:
        """No Island can take it now: `IslandsChanged` may help."""
        return self._state is _State.WAITING

    @property
    def peer(self) -> P | None:
        """The Island of the current attempt."""
        return self._peer

    def receive(self, now: Instant, what: Input[P, FromIsland, Command]) -> Effects[P]:
        """Take one input. A generator: run it to its end before the next input."""
        if self._state is _State.ENDED:
            return
        match what:
            case Ordered(command):
                yield from self._command(now, command)
            case Received(peer, message) if peer == self._peer:
                yield from self._message(now, peer, message)
            case PeerLost(peer) if peer == self._peer:
                left = self._chain if self._going_on or self._state is _State.RUNNING else None
                yield from self._fail_attempt(now, peer, "connection lost", disconnect=False, left=left)
            case Woken():
                yield from self._woken(now)
            case _:
                pass

    def next_wake(self) -> Instant | None:
        if self._state is _State.ENDED:
            return None
        return min(self._deadline, self._state_limit() or self._deadline)

    # --- inputs -----------------------------------------------------------------------------------

    def _command(self, now: Instant, command: Command) -> Effects[P]:
        match command:
            case Start():
                self._deadline = after(now, self._policy.deadline_ns)
                yield from self._dispatch(now)
            case Consumed(until):
                self._consumed = max(self._consumed, until)
                yield from self._grant(now)
            case IslandsChanged():
                if self._state is _State.WAITING:
                    yield from self._dispatch(now)
            case Abort():
                if self._peer is not None:
                    yield from self._speed(self._peer)
                    yield Send(self._peer, JobCancel())
                    yield Disconnect(self._peer, "consumer gone")
                self._end()

    def _woken(self, now: Instant) -> Effects[P]:
        if now >= self._deadline:
            yield from self._give_up("deadline", "the job's time is up")
            return
        limit = self._state_limit()
        if limit is None or now < limit:
            return
        if self._peer is None:
            yield from self._dispatch(now)
        elif self._state is _State.OFFERED:
            yield from self._fail_attempt(now, self._peer, "no answer to the offer", timeout=True)
        else:
            yield from self._fail_attempt(now, self._peer, "stalled", timeout=True)

    def _message(self, now: Instant, peer: P, message: FromIsland) -> Effects[P]:
        generating = self._state is _State.RUNNING and len(self._ids) > self._resumed_at
        gap_ns = self._pace.heard(now, generating=generating)
        match message, self._state:
            case JobAccept(ahead=ahead), _State.OFFERED:
                self._state = _State.RUNNING
                self._without_island_since = None
                self._busy = frozenset()
                yield Emit(JobPlaced(peer, ahead, self._placed, self._chain))
                self._placed += 1
                yield from self._grant(now)
            case JobReject(), _State.OFFERED:
                yield from self._rejected(now, peer, message)
            case JobProgress(stage=stage, done=done, total=total), _State.RUNNING if self._may_prepare():
                yield Emit(JobPreparing(stage, done, total))
            case JobTokens(), _State.RUNNING:
                yield from self._tokens(now, peer, message, gap_ns)
            case JobDone(), _State.RUNNING:
                yield from self._done(now, peer, message)
            case JobError(), _State.RUNNING:
                yield from self._error(now, peer, message)
            case _:
                yield from self._fail_attempt(now, peer, f"unexpected {type(message).__name__}")

    def _may_prepare(self) -> bool:
        """Progress is for the time before the first token, else it would hide a stall."""
        self._notices += 1
        return len(self._ids) == self._resumed_at and self._notices <= MAX_PROGRESS_NOTICES

    def _error(self, now: Instant, peer: P, message: JobError) -> Effects[P]:
        code, detail = message.code, message.detail
        if code in CONSUMER_ERRORS or not message.retryable:
            yield from self._judged(now, peer, code, detail)
            return
        reason = f"error: {excerpt(code)} {excerpt(detail)}"
        accused = tuple(stage for stage in self._stages(now, message) if stage.failed)
        if self._chain is not None and code == CHAIN_BUSY:
            if accused:
                yield Emit(ChainFailed(peer, self._chain, reason, accused))
            self._lost |= {stage.peer: after(now, FAILED_COOLDOWN_NS) for stage in accused}
            yield from self._come_back(now, peer, CHAIN_BUSY_NS)
            return
        if self._chain is None or not accused:
            yield from self._fail_attempt(now, peer, reason)
            return
        # The first time it is believed, for this job: the next chain is without those whom it names. A head
        # that complains again is itself not asked any more.
        yield Emit(ChainFailed(peer, self._chain, reason, accused))
        self._lost |= {stage.peer: after(now, FAILED_COOLDOWN_NS) for stage in accused}
        again = peer in self._accusers
        self._accusers |= {peer}
        yield from self._fail_attempt(now, peer, reason, blamed=False, avoided=again)

    def _come_back(self, now: Instant, peer: P, wait_ns: int) -> Effects[P]:
        """It has no place now; that is no failure."""
        yield from self._speed(peer)
        self._peer = self._before = None
        yield Disconnect(peer, "rejected")
        self._busy |= {peer}
        self._cooldown[peer] = after(now, wait_ns)
        yield from self._dispatch(now)

    def _tokens(self, now: Instant, peer: P, message: JobTokens, gap_ns: int) -> Effects[P]:
        limit = self._work.max_tokens or MAX_CONTEXT_TOKENS
        end = len(self._ids) + len(message.tokens)
        if message.first != len(self._ids):
            yield from self._fail_attempt(now, peer, f"token {message.first} where {len(self._ids)} was due")
        elif end > self._granted:
            yield from self._fail_attempt(now, peer, "more tokens than granted")
        elif end > limit:
            yield from self._fail_attempt(now, peer, "more tokens than asked for")
        else:
            yield from self._refute(peer)
            self._ids.extend(token.id for token in message.tokens)
            self._pace.took(len(message.tokens), gap_ns)
            yield Emit(TokensReleased(message.first, message.tokens))

    def _done(self, now: Instant, peer: P, message: JobDone) -> Effects[P]:
        if message.usage.completion_tokens != len(self._ids) or message.finish not in {"stop", "length"}:
            yield from self._fail_attempt(now, peer, "done before all tokens were sent")
            return
        if not usage_plausible(message.usage, len(self._ids) - self._resumed_at, self._work):
            yield from self._fail_attempt(now, peer, "figures that can not be")
            return
        yield from self._refute(peer)
        yield from self._speed(peer)
        receipt = receipt_untrusted(message, peer, self._facts(now))
        if receipt is None:
            yield Emit(IslandFailed(peer, "receipt does not match"))
        self._peer = None
        yield Disconnect(peer, "done")
        hand_overs = self._placed - 1
        stages, finish = self._stages(now, message), message.finish
        yield Emit(
            JobCompleted(peer, finish, message.tail, message.usage, hand_overs, receipt, self._chain, stages)
        )
        self._end()

    def _rejected(self, now: Instant, peer: P, message: JobReject) -> Effects[P]:
        if message.code in CONSUMER_ERRORS:
            yield from self._judged(now, peer, message.code, message.detail)
            return
        self._peer = None
        self._before = self._chain if self._going_on else None
        yield Disconnect(peer, "rejected")
        wait_ns = max(message.retry_after_ms * MILLISECOND_NS or BUSY_RETRY_NS, MIN_RETRY_NS)
        if message.code != "busy":
            wait_ns = max(wait_ns, FAILED_COOLDOWN_NS)
            self._last_failure = f"{self._name_of(peer)}: {excerpt(f'{message.code} {message.detail}')}".strip()
        else:
            self._busy |= {peer}
        self._cooldown[peer] = after(now, wait_ns)
        yield from self._dispatch(now)

    def _judged(self, now: Instant, peer: P, code: str, detail: str) -> Effects[P]:
        """An Island says that no other would do this job either. One alone is not believed, or a single liar
        that claims to be fast would end every job: a second one is asked, if there is one.
        """
        if code not in CONSUMER_ERRORS:
            code, detail = "exhausted", detail or code
        elif self._ids:
            # Its prompt was accepted before. What is refused is an Island's tokens, not the consumer's request.
            code, detail = "exhausted", f"no Island can go on with it: {detail}"
        self._peer = None
        yield Disconnect(peer, "rejected")
        if self._verdict is not None:
            yield from self._give_up(code, excerpt(detail))
            return
        self._verdict = Verdict(peer, code, excerpt(detail))
        self._cooldown[peer] = self._deadline
        yield from self._dispatch(now)

    def _refute(self, peer: P) -> Effects[P]:
        """This Island does what another one said could not be done."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            yield Emit(IslandFailed(verdict.peer, f"refused what {self._name_of(peer)} does: {verdict.detail}"))

    # --- moves ------------------------------------------------------------------------------------

    def _dispatch(self, now: Instant) -> Effects[P]:
        self._cooldown = {peer: until for peer, until in self._cooldown.items() if until > now}
        self._lost = {name: until for name, until in self._lost.items() if until > now}
        ask = Ask(frozenset(self._cooldown), len(self._ids), self._before, frozenset(self._lost))
        place = self._place(now, ask)
        if isinstance(place, Assignment):
            yield from self._offer(now, place)
        elif self._verdict is not None:
            yield from self._give_up(self._verdict.code, self._verdict.detail)
        else:
            yield from self._wait(now, place)

    def _offer(self, now: Instant, place: Assignment[P]) -> Effects[P]:
        peer = self._peer = place.peer
        self._chain, self._going_on, self._before = place.chain, place.goes_on, None
        self._state = _State.OFFERED
        self._resumed_at = len(self._ids)
        self._granted = self._consumed + self._policy.window
        self._pace, self._notices = Pace(now), 0
        left_ms = max(1, (self._deadline - now) // MILLISECOND_NS)
        yield Send(
            peer,
            JobOffer(
                job=self._name_attempt(),
                cargo=self._cargo,
                work=self._work,
                resume=tuple(self._ids),
                granted=self._granted,
                deadline_ms=left_ms,
                chain=place.chain,
            ),
        )

    def _name_attempt(self) -> JobId:
        """The job's own name, except for a second chain: what stages of the first one have is not for it."""
        if self._chain is None:
            return self._job
        if not self._going_on:
            self._sessions += 1
            self._session = self._job if self._sessions == 1 else later_session(self._job, self._sessions)
        return self._session

    def _wait(self, now: Instant, what: NotYet | Full | None) -> Effects[P]:
        first_time = self._without_island_since is None
        if self._without_island_since is None:
            self._without_island_since = now
        self._state = _State.WAITING
        self._not_yet_until = None
        if isinstance(what, NotYet):
            self._without_island_since = now  # its patience begins when nobody works on it any more
            self._not_yet_until = after(now, NOT_YET_NS)
            if first_time:
                yield Emit(JobWaiting())
            if what != self._seen_loading:
                self._seen_loading = what
                yield Emit(JobPreparing("loading", what.done, what.total))
        elif now - self._without_island_since >= self._patience_ns(full=what is not None):
            retry_ms = 1000
            if self._busy or what is not None:
                yield from self._give_up("busy", "every Island that runs this model is busy", retry_ms)
            else:
                lost = f"; the last one failed: {self._last_failure}" if self._last_failure else ""
                why = self._why_nobody() or "no Island runs this model now"
                yield from self._give_up("no-islands", why + lost, 5 * retry_ms)
        else:
            if what is not None:
                self._not_yet_until = after(now, NOT_YET_NS)
            if first_time:
                yield Emit(JobWaiting())

    def _patience_ns(self, *, full: bool) -> int:
        """Chains have no queue of their own: a job waits here as long as it would in an Island's."""
        return max(self._policy.wait_ns, self._policy.first_token_ns) if full else self._policy.wait_ns

    def _fail_attempt(
        self,
        now: Instant,
        peer: P,
        reason: str,
        *,
        disconnect: bool = True,
        timeout: bool = False,
        blamed: bool = True,
        avoided: bool = True,
        left: Chain | None = None,
    ) -> Effects[P]:
        """`left`: a chain whose other stages wait for a new head. They do not if the old one could tell them
        that the session is over.
        """
        yield from self._speed(peer)
        self._peer = None
        self._before = left
        self._failures += 1
        self._last_failure = f"{self._name_of(peer)}: {reason}"
        if avoided:
            self._cooldown[peer] = after(now, FAILED_COOLDOWN_NS)
        self._busy -= {peer}
        if disconnect:
            yield Disconnect(peer, reason)
        if blamed:
            yield Emit(IslandFailed(peer, reason, timeout))
        if self._failures >= self._policy.attempts:
            yield from self._give_up(
                "exhausted", f"{self._failures} attempts failed, the last at {self._last_failure}"
            )
        else:
            yield from self._dispatch(now)

    def _give_up(self, code: str, detail: str, retry_after_ms: int = 0) -> Effects[P]:
        if self._peer is not None:
            yield from self._speed(self._peer)
            yield Send(self._peer, JobCancel())
            yield Disconnect(self._peer, code)
        yield Emit(JobFailed(code, detail, retry_after_ms))
        self._end()

    def _grant(self, now: Instant) -> Effects[P]:
        """Move the window on, in steps of a quarter, so that grants stay rare beside tokens."""
        until = self._consumed + self._policy.window
        if (
            self._peer is None
            or self._state is not _State.RUNNING
            or until < self._granted + max(1, self._policy.window // 4)
        ):
            return
        if len(self._ids) >= self._granted:
            self._pace.alive_at = now  # it was paused by us; its time runs from now
        self._granted = until
        yield Send(self._peer, JobGrant(until))

    def _end(self) -> None:
        self._state = _State.ENDED
        self._peer = None

    # --- time -------------------------------------------------------------------------------------

    def _speed(self, peer: P) -> Effects[P]:
        if (speed := self._pace.speed) is not None:
            yield Emit(SpeedSeen(peer, *speed))

    def _state_limit(self) -> Instant | None:
        """When the present state has lasted too long; None: it may last (up to the deadline)."""
        policy = self._policy
        if self._state is _State.OFFERED:
            return after(self._pace.alive_at, policy.accept_ns)
        if self._state is _State.WAITING:
            if self._without_island_since is None:
                return None
            limit = self._not_yet_until or after(self._without_island_since, policy.wait_ns)
            return min([limit, *self._cooldown.values(), *self._lost.values()])
        if len(self._ids) >= self._granted:
            return None  # paused by the consumer, not stalled
        if len(self._ids) == self._resumed_at:
            return after(self._pace.alive_at, policy.first_token_ns)
        in_chain = self._chain is not None
        return after(self._pace.alive_at, self._pace.stall_ns(policy, in_chain=in_chain))

    def _facts(self, now: Instant) -> Facts:
        return Facts(
            job=self._job if self._chain is None else self._session,
            cargo=self._cargo,
            consumer=self._consumer,
            seed=self._work.sampling.seed,
            first=self._resumed_at,
            ids=self._ids,
            chain=self._chain,
            unix_now=UnixNs(now + self._unix_offset_ns),
        )

    def _stages(self, now: Instant, message: JobDone | JobError) -> tuple[StageSeen, ...]:
        return stages_untrusted(message.stages, self._facts(now))
