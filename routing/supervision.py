"""One job's supervisor: nothing is lost when an Island is.

A machine that lives in the gateway for one job. It dispatches the job to an Island, checks what comes back,
and on loss, stall or broken promise dispatches the rest (the same work plus the tokens so far) to the next.
What it emits is one unbroken sequence: tokens in order of their index, none twice, none missing.

States: waiting (no Island can take it now) -> offered (an attempt was sent out) -> running (accepted) ->
ended. An attempt is identified by its peer: there is at most one at a time, and the driver drops its
stream on `Disconnect`, so nothing of an old attempt arrives after it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.envelope import open_untrusted
from protocol.errors import ProtocolError
from protocol.ids import CargoDigest, JobId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.jobs import (
    RECEIPT,
    RECEIPT_KIND,
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
    Usage,
)
from protocol.limits import DEFAULT_TOKEN_WINDOW
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from protocol.work import Generation

P = TypeVar("P")

#: A refusal for load without a hint is retried after this.
BUSY_RETRY_NS: Final = 250 * MILLISECOND_NS

#: An Island that failed this job is not asked again for the same job for this long; after that it is only
#: the last choice, because the coordinator's book suspects it.
FAILED_COOLDOWN_NS: Final = 2 * SECOND_NS

#: A running attempt's stall limit is this many times its mean gap between frames, within the policy's bounds.
STALL_FACTOR: Final = 50
GAP_WEIGHT: Final = 0.1

#: Reasons that any Island would give: the consumer's to mend.
CONSUMER_ERRORS: Final = frozenset({"too-long", "invalid"})


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """How patient to be. All durations in nanoseconds.

    `accept_ns`: from offer to accept or reject. `first_token_ns`: from accept, or the last sign of progress,
    to the first token. `stall_ns`: longest gap between tokens; once gaps are known the limit
    adapts down to STALL_FACTOR gaps but not below `stall_floor_ns`. `wait_ns`: how long a job may be without
    any Island before it fails; 0 fails at once. `deadline_ns`: the whole job. `attempts`: dispatches that may
    fail (refusals for load do not count). `window`: tokens that the Island may be ahead of the consumer.
    """

    accept_ns: int = 3 * SECOND_NS
    first_token_ns: int = 60 * SECOND_NS
    stall_ns: int = 5 * SECOND_NS
    stall_floor_ns: int = 1 * SECOND_NS
    wait_ns: int = 10 * SECOND_NS
    deadline_ns: int = 600 * SECOND_NS
    attempts: int = 8
    window: int = DEFAULT_TOKEN_WINDOW


# --- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Begin."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """The consumer has taken all tokens with an index below `until`."""

    until: int


@dataclass(frozen=True, slots=True)
class IslandsChanged:
    """An Island appeared or became free: look again if waiting."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The consumer is gone."""


Command: TypeAlias = Start | Consumed | IslandsChanged | Abort

# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobWaiting:
    """No Island can take it now."""


@dataclass(frozen=True, slots=True)
class JobPlaced(Generic[P]):
    """An Island accepted. `hand_over` counts the Islands that had accepted before."""

    peer: P
    ahead: int
    hand_over: int


@dataclass(frozen=True, slots=True)
class JobPreparing:
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokensReleased:
    first: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class IslandFailed(Generic[P]):
    """For the coordinator's book: this Island let the job down."""

    peer: P
    reason: str


@dataclass(frozen=True, slots=True)
class JobCompleted(Generic[P]):
    """The end. `receipt` is None if what the Island signed does not match what it sent."""

    peer: P
    finish: str
    tail: str
    usage: Usage
    hand_overs: int
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The end. `code`: no-islands, busy, too-long, invalid, deadline, exhausted."""

    code: str
    detail: str
    retry_after_ms: int = 0


JobEvent: TypeAlias = (
    JobWaiting | JobPlaced[P] | JobPreparing | TokensReleased | IslandFailed[P] | JobCompleted[P] | JobFailed
)

Effects: TypeAlias = Iterator[Effect[P, ToIsland, JobEvent[P]]]
Placer: TypeAlias = Callable[[Instant, frozenset[P], int], P | None]
"""(now, peers not to ask, tokens done) -> the best Island, or None. Pure, reads the coordinator's book."""


class _State(Enum):
    WAITING = "waiting"
    OFFERED = "offered"
    RUNNING = "running"
    ENDED = "ended"


class JobSupervisor(Generic[P]):
    """See the module's text. `unix_offset_ns`: civil time minus the clock that instants come from."""

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
    ) -> None:
        self._job = job
        self._cargo = cargo
        self._work = work
        self._place = place
        self._policy = policy
        self._unix_offset_ns = unix_offset_ns
        self._name_of = name_of
        self._state = _State.WAITING
        self._peer: P | None = None
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
        self._alive_at = Instant(0)
        self._gap_ns = 0.0

    @property
    def ended(self) -> bool:
        return self._state is _State.ENDED

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
                yield from self._fail_attempt(now, peer, "connection lost", disconnect=False)
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
            yield from self._fail_attempt(now, self._peer, "no answer to the offer")
        else:
            yield from self._fail_attempt(now, self._peer, "stalled")

    def _message(self, now: Instant, peer: P, message: FromIsland) -> Effects[P]:
        self._note_alive(now)
        match message, self._state:
            case JobAccept(ahead=ahead), _State.OFFERED:
                self._state = _State.RUNNING
                self._gap_ns = 0.0
                self._without_island_since = None
                self._busy = frozenset()
                yield Emit(JobPlaced(peer, ahead, self._placed))
                self._placed += 1
                yield from self._grant(now)
            case JobReject(), _State.OFFERED:
                yield from self._rejected(now, peer, message)
            case JobProgress(stage=stage, done=done, total=total), _State.RUNNING:
                yield Emit(JobPreparing(stage, done, total))
            case JobTokens(), _State.RUNNING:
                yield from self._tokens(now, peer, message)
            case JobDone(), _State.RUNNING:
                yield from self._done(now, peer, message)
            case JobError(code=code, detail=detail, retryable=retryable), _State.RUNNING:
                if code in CONSUMER_ERRORS:
                    yield from self._give_up(code, detail)
                elif not retryable:
                    yield from self._give_up("exhausted", detail or code)
                else:
                    yield from self._fail_attempt(now, peer, f"error: {code} {detail}")
            case _:
                yield from self._fail_attempt(now, peer, f"unexpected {type(message).__name__}")

    def _tokens(self, now: Instant, peer: P, message: JobTokens) -> Effects[P]:
        limit = self._work.max_tokens
        end = len(self._ids) + len(message.tokens)
        if message.first != len(self._ids):
            yield from self._fail_attempt(now, peer, f"token {message.first} where {len(self._ids)} was due")
        elif end > self._granted:
            yield from self._fail_attempt(now, peer, "more tokens than granted")
        elif limit is not None and end > limit:
            yield from self._fail_attempt(now, peer, "more tokens than asked for")
        else:
            self._ids.extend(token.id for token in message.tokens)
            yield Emit(TokensReleased(message.first, message.tokens))

    def _done(self, now: Instant, peer: P, message: JobDone) -> Effects[P]:
        if message.usage.completion_tokens != len(self._ids) or message.finish not in {"stop", "length"}:
            yield from self._fail_attempt(now, peer, "done before all tokens were sent")
            return
        receipt = self._check_receipt(now, peer, message)
        if receipt is None:
            yield Emit(IslandFailed(peer, "receipt does not match"))
        self._peer = None
        yield Disconnect(peer, "done")
        hand_overs = self._placed - 1
        yield Emit(JobCompleted(peer, message.finish, message.tail, message.usage, hand_overs, receipt))
        self._end()

    def _rejected(self, now: Instant, peer: P, message: JobReject) -> Effects[P]:
        if message.code in CONSUMER_ERRORS:
            yield from self._give_up(message.code, message.detail)
            return
        self._peer = None
        yield Disconnect(peer, "rejected")
        wait_ns = message.retry_after_ms * MILLISECOND_NS or BUSY_RETRY_NS
        if message.code != "busy":
            wait_ns = max(wait_ns, FAILED_COOLDOWN_NS)
            self._last_failure = f"{self._name_of(peer)}: {message.code} {message.detail}".strip()
        else:
            self._busy |= {peer}
        self._cooldown[peer] = after(now, wait_ns)
        yield from self._dispatch(now)

    # --- moves ------------------------------------------------------------------------------------

    def _dispatch(self, now: Instant) -> Effects[P]:
        self._cooldown = {peer: until for peer, until in self._cooldown.items() if until > now}
        peer = self._place(now, frozenset(self._cooldown), len(self._ids))
        if peer is None:
            yield from self._wait(now)
            return
        self._peer = peer
        self._state = _State.OFFERED
        self._resumed_at = len(self._ids)
        self._granted = self._consumed + self._policy.window
        self._alive_at = now
        left_ms = max(1, (self._deadline - now) // MILLISECOND_NS)
        yield Send(
            peer,
            JobOffer(
                job=self._job,
                cargo=self._cargo,
                work=self._work,
                resume=tuple(self._ids),
                granted=self._granted,
                deadline_ms=left_ms,
            ),
        )

    def _wait(self, now: Instant) -> Effects[P]:
        first_time = self._without_island_since is None
        if self._without_island_since is None:
            self._without_island_since = now
        self._state = _State.WAITING
        if now - self._without_island_since >= self._policy.wait_ns:
            retry_ms = 1000
            if self._busy:
                yield from self._give_up("busy", "every Island that runs this model is busy", retry_ms)
            else:
                lost = f"; the last one failed: {self._last_failure}" if self._last_failure else ""
                yield from self._give_up("no-islands", f"no Island runs this model now{lost}", 5 * retry_ms)
        elif first_time:
            yield Emit(JobWaiting())

    def _fail_attempt(self, now: Instant, peer: P, reason: str, *, disconnect: bool = True) -> Effects[P]:
        self._peer = None
        self._failures += 1
        self._last_failure = f"{self._name_of(peer)}: {reason}"
        self._cooldown[peer] = after(now, FAILED_COOLDOWN_NS)
        self._busy -= {peer}
        if disconnect:
            yield Disconnect(peer, reason)
        yield Emit(IslandFailed(peer, reason))
        if self._failures >= self._policy.attempts:
            yield from self._give_up(
                "exhausted", f"{self._failures} attempts failed, the last at {self._last_failure}"
            )
        else:
            yield from self._dispatch(now)

    def _give_up(self, code: str, detail: str, retry_after_ms: int = 0) -> Effects[P]:
        if self._peer is not None:
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
            self._alive_at = now  # it was paused by us; its time runs from now
        self._granted = until
        yield Send(self._peer, JobGrant(until))

    def _end(self) -> None:
        self._state = _State.ENDED
        self._peer = None

    # --- time -------------------------------------------------------------------------------------

    def _note_alive(self, now: Instant) -> None:
        if self._state is _State.RUNNING and len(self._ids) > self._resumed_at:
            gap = now - self._alive_at
            self._gap_ns = gap if self._gap_ns == 0 else self._gap_ns + GAP_WEIGHT * (gap - self._gap_ns)
        self._alive_at = now

    def _state_limit(self) -> Instant | None:
        """When the present state has lasted too long; None: it may last (up to the deadline)."""
        policy = self._policy
        if self._state is _State.OFFERED:
            return after(self._alive_at, policy.accept_ns)
        if self._state is _State.WAITING:
            if self._without_island_since is None:
                return None
            limit = after(self._without_island_since, policy.wait_ns)
            return min([limit, *self._cooldown.values()])
        if len(self._ids) >= self._granted:
            return None  # paused by the consumer, not stalled
        if len(self._ids) == self._resumed_at:
            return after(self._alive_at, policy.first_token_ns)
        if self._gap_ns == 0:
            return after(self._alive_at, policy.stall_ns)
        adaptive = max(policy.stall_floor_ns, round(STALL_FACTOR * self._gap_ns))
        return after(self._alive_at, min(policy.stall_ns, adaptive))

    def _check_receipt(self, now: Instant, peer: P, message: JobDone) -> Receipt | None:
        try:
            unix = UnixNs(now + self._unix_offset_ns)
            opened = open_untrusted(message.receipt, RECEIPT_KIND, RECEIPT, unix)
        except ProtocolError:
            return None
        receipt = opened.body
        honest = (
            opened.issuer == peer
            and receipt.job == self._job
            and receipt.cargo == self._cargo
            and receipt.first == self._resumed_at
            and receipt.completion_tokens == len(self._ids)
            and receipt.prompt_tokens == message.usage.prompt_tokens
            and receipt.seed == self._work.sampling.seed
            and receipt.output_hash == token_hash(self._ids)
        )
        return receipt if honest else None


def token_hash(ids: list[int] | tuple[int, ...]) -> bytes:
    """SHA-256 over little-endian 32-bit token ids: how receipts name a prompt or an output."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()
