"""The supervisor against Islands that die, stall, lie and refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.envelope import Signer
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.jobs import (
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
    Usage,
    token_hash,
)
from protocol.limits import MAX_CONTEXT_TOKENS
from protocol.machine import Disconnect, Emit, Ordered, PeerLost, Received, Send, Woken
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling
from routing.job_events import (
    Abort,
    Ask,
    Assignment,
    Consumed,
    IslandFailed,
    IslandsChanged,
    JobCompleted,
    JobFailed,
    JobPlaced,
    JobWaiting,
    SpeedSeen,
    Start,
    SupervisionPolicy,
    TokensReleased,
)
from routing.supervision import MAX_PROGRESS_NOTICES, MIN_RETRY_NS, JobSupervisor

CARGO = CargoDigest("sha256:" + "c" * 64)
JOB = JobId("1" * 32)
LENGTH = 12
ANSWER = [1000 + i for i in range(LENGTH)]
SIGNERS = [Signer(bytes([i]) * 32) for i in range(1, 5)]
PEERS = [signer.peer for signer in SIGNERS]
A, B, C, D = PEERS
ZERO = Instant(0)
UNIX = UnixNs(1_800_000_000 * SECOND_NS)


def work(max_tokens: int | None = LENGTH) -> Generation:
    prompt = ChatPrompt(messages=(ChatMessage("user", "hi"),))
    return Generation(prompt=prompt, sampling=Sampling(seed=9), max_tokens=max_tokens)


@dataclass
class Bench:
    """A supervisor, a clock, and a record of what it did."""

    policy: SupervisionPolicy = field(default_factory=lambda: SupervisionPolicy(window=4))
    up: list[PeerId] = field(default_factory=lambda: list(PEERS))
    now: Instant = ZERO
    sent: list[tuple[PeerId, ToIsland]] = field(default_factory=list)
    dropped: list[tuple[PeerId, str]] = field(default_factory=list)
    events: list[object] = field(default_factory=list)
    max_tokens: int | None = LENGTH

    def __post_init__(self) -> None:
        self.machine: JobSupervisor[PeerId] = JobSupervisor(
            JOB,
            CARGO,
            work(self.max_tokens),
            self.place,
            policy=self.policy,
            unix_offset_ns=UNIX,
            name_of=lambda peer: f"island-{PEERS.index(peer)}",
            consumer="c",
        )

    def place(self, _: Instant, ask: Ask[PeerId]) -> Assignment[PeerId] | None:
        return next((Assignment(p) for p in self.up if p not in ask.excluded), None)

    def feed(self, what: object) -> None:
        for effect in self.machine.receive(self.now, what):
            match effect:
                case Send(peer, message):
                    self.sent.append((peer, message))
                case Disconnect(peer, reason):
                    self.dropped.append((peer, reason))
                case Emit(event):
                    self.events.append(event)
                case _:
                    pytest.fail(f"unexpected effect {effect}")

    def say(self, peer: PeerId, message: FromIsland) -> None:
        self.feed(Received(peer, message))

    def start_only(self) -> None:
        self.feed(Ordered(Start()))

    def start(self) -> JobOffer:
        self.start_only()
        return self.offer

    def accept(self, peer: PeerId) -> None:
        self.say(peer, JobAccept())

    def tokens(self, peer: PeerId, first: int, count: int = 1) -> None:
        self.say(peer, JobTokens(first, tuple(Token(t, f"<{t}>") for t in ANSWER[first : first + count])))

    def consume(self, until: int) -> None:
        self.feed(Ordered(Consumed(until)))

    def wait(self, duration_ns: int) -> None:
        self.now = Instant(self.now + duration_ns)
        self.feed(Woken())

    def sleep_until_woken(self) -> None:
        wake = self.machine.next_wake()
        assert wake is not None
        self.now = max(self.now, wake)
        self.feed(Woken())

    def done(self, peer: PeerId, count: int = LENGTH, first: int = 0, **changes: object) -> None:
        honest = Receipt(
            job=JOB,
            cargo=CARGO,
            consumer="c",
            prompt_hash=b"p" * 32,
            output_hash=token_hash(ANSWER[:count]),
            prompt_tokens=5,
            completion_tokens=count,
            first=first,
            seed=9,
            started_unix_ns=1,
            finished_unix_ns=2,
        )
        receipt = msgspec.structs.replace(honest, **changes)
        signer = SIGNERS[PEERS.index(peer)]
        envelope = signer.seal(
            RECEIPT_KIND, receipt, sequence=1, expires_unix_ns=UnixNs(UNIX + self.now + SECOND_NS)
        )
        usage = Usage(prompt_tokens=5, completion_tokens=count, generated_tokens=count - len(self.offer.resume))
        self.say(peer, JobDone("stop", "!", usage, envelope))

    @property
    def offer(self) -> JobOffer:
        return next(m for _, m in reversed(self.sent) if isinstance(m, JobOffer))

    @property
    def asked(self) -> list[PeerId]:
        return [peer for peer, message in self.sent if isinstance(message, JobOffer)]

    @property
    def released(self) -> list[int]:
        ids: list[int] = []
        for event in self.events:
            if isinstance(event, TokensReleased):
                assert event.first == len(ids), "a token twice, or one missing"
                ids.extend(token.id for token in event.tokens)
        return ids

    def last(self, kind: type) -> object:
        return next(event for event in reversed(self.events) if isinstance(event, kind))


def test_the_quiet_life_of_a_job() -> None:
    bench = Bench(policy=SupervisionPolicy(window=64))
    offer = bench.start()
    assert (offer.job, offer.cargo, offer.resume, offer.granted) == (JOB, CARGO, (), 64)
    bench.accept(A)
    bench.tokens(A, 0, LENGTH)
    bench.done(A)
    assert bench.released == ANSWER
    completed = bench.last(JobCompleted)
    assert isinstance(completed, JobCompleted)
    assert (completed.peer, completed.hand_overs, completed.tail) == (A, 0, "!")
    assert completed.receipt is not None
    assert bench.machine.ended
    assert bench.machine.next_wake() is None


@pytest.mark.parametrize("before", range(LENGTH))
def test_an_island_lost_at_any_token_costs_none(before: int) -> None:
    bench = Bench(policy=SupervisionPolicy(window=64))
    bench.start()
    bench.accept(A)
    for index in range(before):
        bench.tokens(A, index)
    bench.feed(PeerLost(A))
    assert bench.offer.resume == tuple(ANSWER[:before])
    bench.accept(B)
    bench.tokens(B, before, LENGTH - before)
    bench.done(B, first=before)
    assert bench.released == ANSWER
    completed = bench.last(JobCompleted)
    assert isinstance(completed, JobCompleted)
    assert (completed.hand_overs, completed.peer) == (1, B)
    assert completed.receipt is not None
    assert isinstance(bench.last(IslandFailed), IslandFailed)


def test_a_stall_moves_the_rest_and_drops_the_frozen_island() -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0)
    bench.wait(bench.policy.stall_ns - 1)
    assert bench.asked == [A]
    bench.wait(1)
    assert bench.asked == [A, B]
    assert (A, "stalled") in bench.dropped
    bench.tokens(A, 1)  # it wakes up: too late
    assert bench.released == ANSWER[:1]


def test_the_stall_limit_adapts_to_the_usual_gap() -> None:
    bench = Bench(policy=SupervisionPolicy(window=64, stall_floor_ns=500 * MILLISECOND_NS))
    bench.start()
    bench.accept(A)
    for index in range(6):
        bench.now = Instant(bench.now + 10 * MILLISECOND_NS)
        bench.tokens(A, index)
    bench.sleep_until_woken()
    assert bench.asked == [A, B]
    assert bench.now < 2 * SECOND_NS


def test_a_paused_island_is_not_stalled() -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 4)  # all that was granted; the consumer does not read
    bench.wait(bench.policy.stall_ns * 10)
    assert bench.asked == [A]
    bench.consume(4)
    assert (A, JobGrant(8)) in bench.sent
    bench.wait(bench.policy.stall_ns - 1)
    assert bench.asked == [A]
    bench.sleep_until_woken()
    assert bench.asked == [A, B]


def test_grants_come_in_quarters_of_the_window() -> None:
    bench = Bench(policy=SupervisionPolicy(window=8))
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 4)
    bench.consume(1)
    assert not [m for _, m in bench.sent if isinstance(m, JobGrant)]
    bench.consume(2)
    assert bench.sent[-1] == (A, JobGrant(10))


SIGNED_NOTHING = SIGNERS[0].seal("x", JobAccept(), sequence=1, expires_unix_ns=UnixNs(1))
BORED = JobDone("bored", "", Usage(1, 2, 2), SIGNED_NOTHING)
LIES: dict[str, Callable[[Bench], None]] = {
    "a token twice": lambda b: b.tokens(A, 0),
    "a gap": lambda b: b.tokens(A, 3),
    "more than granted": lambda b: b.tokens(A, 2, 5),
    "done too early": lambda b: b.done(A, count=7),
    "accepted twice": lambda b: b.accept(A),
    "rejected when running": lambda b: b.say(A, JobReject("busy")),
    "an end that is none": lambda b: b.say(A, BORED),
    "an error of its own": lambda b: b.say(A, JobError("runtime", "oops")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_broken_promise_moves_the_rest(lie: str) -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 2)
    LIES[lie](bench)
    assert bench.asked == [A, B]
    assert bench.offer.resume == tuple(ANSWER[:2])
    assert bench.released == ANSWER[:2]


def test_more_tokens_than_asked_for_is_a_broken_promise() -> None:
    bench = Bench(policy=SupervisionPolicy(window=64), max_tokens=3)
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 4)
    assert bench.asked == [A, B]
    assert bench.released == []


@pytest.mark.parametrize(
    "changes",
    [
        {"output_hash": b"x" * 32},
        {"job": "2" * 32},
        {"completion_tokens": 3},
        {"seed": 8},
        {"first": 1},
        {"cargo": "sha256:" + "d" * 64},
        {"prompt_tokens": 500},
    ],
)
def test_a_receipt_that_does_not_match_is_worth_nothing(changes: dict[str, object]) -> None:
    bench = Bench(policy=SupervisionPolicy(window=64))
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, LENGTH)
    bench.done(A, **changes)
    completed = bench.last(JobCompleted)
    assert isinstance(completed, JobCompleted)
    assert completed.receipt is None
    assert isinstance(bench.last(IslandFailed), IslandFailed)


def test_busy_islands_are_asked_in_turn_and_then_again() -> None:
    bench = Bench(up=[A, B])
    bench.start()
    bench.say(A, JobReject("busy", retry_after_ms=100))
    bench.say(B, JobReject("busy", retry_after_ms=300))
    assert isinstance(bench.last(JobWaiting), JobWaiting)
    bench.sleep_until_woken()
    assert bench.asked == [A, B, A]
    assert bench.now == 100 * MILLISECOND_NS
    bench.accept(A)
    assert isinstance(bench.last(JobPlaced), JobPlaced)
    placed = bench.last(JobPlaced)
    assert isinstance(placed, JobPlaced)
    assert placed.hand_over == 0


def test_all_busy_for_too_long_is_said() -> None:
    bench = Bench(up=[A], policy=SupervisionPolicy(wait_ns=SECOND_NS))
    bench.start()
    while not bench.machine.ended:
        bench.say(A, JobReject("busy", retry_after_ms=200))
        if not bench.machine.ended:
            bench.sleep_until_woken()
    assert bench.last(JobFailed) == JobFailed("busy", "every Island that runs this model is busy", 1000)


def test_nobody_there_fails_at_once_or_waits_as_configured() -> None:
    impatient = Bench(up=[], policy=SupervisionPolicy(wait_ns=0))
    impatient.start_only()
    failed = impatient.last(JobFailed)
    assert isinstance(failed, JobFailed)
    assert failed.code == "no-islands"

    patient = Bench(up=[], policy=SupervisionPolicy(wait_ns=SECOND_NS))
    patient.start_only()
    assert not patient.machine.ended
    patient.up.append(B)
    patient.feed(Ordered(IslandsChanged()))
    assert patient.asked == [B]

    disappointed = Bench(up=[], policy=SupervisionPolicy(wait_ns=SECOND_NS))
    disappointed.start_only()
    disappointed.sleep_until_woken()
    assert disappointed.now == SECOND_NS
    assert isinstance(disappointed.last(JobFailed), JobFailed)


def test_all_islands_lost_in_mid_job_wait_for_a_new_one() -> None:
    bench = Bench(up=[A])
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 3)
    bench.up.clear()
    bench.feed(PeerLost(A))
    assert not bench.machine.ended
    bench.up.append(C)
    bench.feed(Ordered(IslandsChanged()))
    assert bench.offer.resume == tuple(ANSWER[:3])


def test_the_only_island_comes_back() -> None:
    bench = Bench(up=[A])
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, 3)
    bench.feed(PeerLost(A))
    bench.sleep_until_woken()
    assert bench.asked == [A, A]


@pytest.mark.parametrize("code", ["too-long", "invalid"])
def test_what_the_consumer_must_mend_is_said_once_two_islands_agree(code: str) -> None:
    for refuse in (JobReject(code, "why"), JobError(code, "why", retryable=False)):
        for up in ([A], [A, B], PEERS):
            bench = Bench(up=list(up))
            bench.start()
            for peer in up[:2]:
                if isinstance(refuse, JobError):
                    bench.accept(peer)
                bench.say(peer, refuse)
            assert bench.asked == up[:2]
            assert bench.last(JobFailed) == JobFailed(code, "why")


def test_no_answer_to_an_offer() -> None:
    bench = Bench()
    bench.start()
    bench.sleep_until_woken()
    assert bench.asked == [A, B]
    assert bench.now == bench.policy.accept_ns


def test_progress_keeps_a_slow_start_alive() -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    for done in range(5):
        bench.wait(bench.policy.first_token_ns - 1)
        bench.say(A, JobProgress("prompt", done, 10))
    assert bench.asked == [A]
    bench.wait(bench.policy.first_token_ns)
    assert bench.asked == [A, B]


def test_attempts_are_bounded() -> None:
    bench = Bench(policy=SupervisionPolicy(attempts=3))
    bench.start()
    for peer in (A, B, C):
        bench.accept(peer)
        bench.feed(PeerLost(peer))
    failed = bench.last(JobFailed)
    assert isinstance(failed, JobFailed)
    assert failed.code == "exhausted"
    assert "island-2" in failed.detail


def test_the_deadline_ends_everything() -> None:
    bench = Bench(policy=SupervisionPolicy(deadline_ns=2 * SECOND_NS))
    bench.start()
    bench.accept(A)
    bench.wait(2 * SECOND_NS)
    assert (A, JobCancel()) in bench.sent
    failed = bench.last(JobFailed)
    assert isinstance(failed, JobFailed)
    assert failed.code == "deadline"


def test_a_consumer_who_leaves_cancels_the_island() -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    bench.feed(Ordered(Abort()))
    assert bench.sent[-1] == (A, JobCancel())
    assert bench.dropped[-1][0] == A
    assert bench.machine.ended
    bench.tokens(A, 0)
    assert bench.released == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_islands_do_the_stream_is_whole_or_fails_clearly(data: st.DataObject) -> None:
    """Random life: each released token in order, exactly once, and always an end."""
    bench = Bench(policy=SupervisionPolicy(window=data.draw(st.integers(1, 20)), attempts=6, wait_ns=SECOND_NS))
    bench.start()
    made = dict.fromkeys(PEERS, 0)
    for _ in range(80):
        if bench.machine.ended:
            break
        peer = bench.machine.peer
        choices = ["wake", "changed"]
        if peer is not None:
            choices += [
                "accept",
                "reject",
                "tokens",
                "tokens",
                "tokens",
                "lose",
                "lie",
                "done",
                "consume",
                "ghost",
            ]
        action = data.draw(st.sampled_from(choices))
        so_far = len(bench.released)
        if action == "wake":
            bench.sleep_until_woken()
        elif action == "changed":
            bench.feed(Ordered(IslandsChanged()))
        elif peer is None:
            continue
        elif action == "accept":
            bench.accept(peer)
        elif action == "reject":
            bench.say(peer, JobReject("busy"))
        elif action == "tokens" and so_far < LENGTH:
            bench.tokens(peer, so_far, data.draw(st.integers(1, LENGTH - so_far)))
        elif action == "lose":
            bench.feed(PeerLost(peer))
        elif action == "lie":
            bench.tokens(peer, data.draw(st.integers(0, LENGTH - 1)))
        elif action == "done":
            bench.done(peer, count=so_far, first=len(bench.offer.resume))
        elif action == "consume":
            bench.consume(data.draw(st.integers(0, so_far)))
        elif action == "ghost":
            bench.tokens(data.draw(st.sampled_from(PEERS)), so_far)
        made[peer] = 1
    for _ in range(100):
        if bench.machine.ended:
            break
        bench.sleep_until_woken()
    assert bench.machine.ended
    assert bench.released == ANSWER[: len(bench.released)]
    ends = [event for event in bench.events if isinstance(event, JobCompleted | JobFailed)]
    assert len(ends) == 1
    assert bench.events[-1] is ends[0]


def run_to_tokens(bench: Bench, count: int = 2) -> None:
    bench.start()
    bench.accept(A)
    bench.tokens(A, 0, count)


def test_one_island_alone_does_not_condemn_a_job() -> None:
    """A liar that refuses everything as the consumer's fault costs one more round trip, not the job."""
    for refuse in (JobReject("too-long", "lie"), JobError("invalid", "lie", retryable=False)):
        bench = Bench(policy=SupervisionPolicy(window=64))
        bench.start()
        if isinstance(refuse, JobError):
            bench.accept(A)
        bench.say(A, refuse)
        assert bench.asked == [A, B]
        bench.accept(B)
        bench.tokens(B, 0, LENGTH)
        blamed = bench.last(IslandFailed)
        assert isinstance(blamed, IslandFailed)
        assert blamed.peer == A
        bench.done(B)
        assert bench.released == ANSWER


def test_a_final_error_of_one_island_is_not_the_end() -> None:
    bench = Bench()
    run_to_tokens(bench)
    bench.say(A, JobError("runtime", "lie", retryable=False))
    assert bench.asked == [A, B]
    bench.accept(B)
    bench.say(B, JobError("runtime", "too", retryable=False))
    failed = bench.last(JobFailed)
    assert isinstance(failed, JobFailed)
    assert failed.code == "exhausted"


def test_a_judgement_stands_when_nobody_else_can_be_asked_in_the_end() -> None:
    bench = Bench(up=[A, B])
    bench.start()
    bench.say(A, JobReject("too-long", "why"))
    bench.say(B, JobReject("busy"))
    assert bench.last(JobFailed) == JobFailed("too-long", "why")


def test_tokens_that_nobody_can_continue_are_not_the_consumers_fault() -> None:
    """An Island may poison a job with ids that its successors must refuse."""
    bench = Bench()
    run_to_tokens(bench)
    bench.feed(PeerLost(A))
    bench.say(B, JobReject("invalid", "token 9999999"))
    assert bench.asked == [A, B, C]
    bench.say(C, JobReject("invalid", "token 9999999"))
    failed = bench.last(JobFailed)
    assert isinstance(failed, JobFailed)
    assert failed.code == "exhausted"
    assert [e.peer for e in bench.events if isinstance(e, IslandFailed)] == [A]


def test_progress_after_the_first_token_is_no_sign_of_life() -> None:
    bench = Bench()
    run_to_tokens(bench)
    bench.say(A, JobProgress("prompt", 1, 2))
    assert bench.asked == [A, B]


def test_a_flood_of_progress_is_a_broken_promise() -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    for done in range(MAX_PROGRESS_NOTICES):
        bench.say(A, JobProgress("prompt", done, 10))
    assert bench.asked == [A]
    bench.say(A, JobProgress("prompt", 0, 10))
    assert bench.asked == [A, B]


def test_a_job_without_a_limit_has_one() -> None:
    """Past the longest context a successor could not even be given the tokens so far."""
    bench = Bench(policy=SupervisionPolicy(window=4096), max_tokens=None)
    bench.start()
    bench.accept(A)
    frame = tuple(Token(1, "") for _ in range(256))
    for first in range(0, MAX_CONTEXT_TOKENS, 256):
        bench.say(A, JobTokens(first, frame))
        bench.consume(first + 256)
    assert bench.asked == [A]
    bench.say(A, JobTokens(MAX_CONTEXT_TOKENS, (Token(1, ""),)))
    assert bench.asked == [A, B]
    assert TO_ISLAND.decode_untrusted(TO_ISLAND.encode(bench.offer)) == bench.offer
    assert all(TO_ISLAND.decode_untrusted(TO_ISLAND.encode(m)) for _, m in bench.sent)


@pytest.mark.parametrize(
    "usage",
    [
        Usage(200_000, LENGTH, LENGTH),
        Usage(5, LENGTH, 3),
        Usage(5, LENGTH, LENGTH, cached_tokens=6),
        Usage(5, LENGTH, LENGTH, drafts=1, drafts_right=2),
        Usage(5, LENGTH, LENGTH, drafts=2 * LENGTH, drafts_right=LENGTH + 1),
    ],
)
def test_figures_that_can_not_be_are_a_broken_promise(usage: Usage) -> None:
    bench = Bench(policy=SupervisionPolicy(window=64))
    run_to_tokens(bench, LENGTH)
    bench.say(A, JobDone("stop", "", usage, SIGNED_NOTHING))
    assert bench.asked == [A, B]


def test_a_receipt_for_another_consumer_is_worth_nothing() -> None:
    for changes in ({"consumer": "somebody else"}, {"started_unix_ns": 3}):
        bench = Bench(policy=SupervisionPolicy(window=64))
        run_to_tokens(bench, LENGTH)
        bench.done(A, **changes)
        completed = bench.last(JobCompleted)
        assert isinstance(completed, JobCompleted)
        assert completed.receipt is None


def test_a_busy_island_does_not_set_the_pace() -> None:
    bench = Bench(up=[A])
    bench.start()
    for _ in range(10):
        bench.say(A, JobReject("busy", retry_after_ms=1))
        bench.sleep_until_woken()
    assert bench.now >= 10 * MIN_RETRY_NS


def test_speed_is_what_was_seen_here_and_pauses_do_not_count() -> None:
    bench = Bench(policy=SupervisionPolicy(window=8, stall_ns=100 * SECOND_NS))
    bench.start()
    bench.accept(A)
    for index in range(8):
        bench.now = Instant(bench.now + 100 * MILLISECOND_NS)
        bench.tokens(A, index)
    bench.now = Instant(bench.now + 60 * SECOND_NS)  # the consumer does not read
    bench.consume(8)
    for index in range(8, LENGTH):
        bench.now = Instant(bench.now + 100 * MILLISECOND_NS)
        bench.tokens(A, index)
    bench.done(A)
    assert bench.last(SpeedSeen) == SpeedSeen(A, LENGTH - 1, (LENGTH - 1) * 100 * MILLISECOND_NS)


@pytest.mark.parametrize("end", ["abort", "lost", "stall", "lie"])
def test_an_island_that_drips_is_remembered_however_it_ends(end: str) -> None:
    bench = Bench()
    bench.start()
    bench.accept(A)
    for index in range(3):
        bench.now = Instant(bench.now + 4 * SECOND_NS)
        bench.tokens(A, index)
    match end:
        case "abort":
            bench.feed(Ordered(Abort()))
        case "lost":
            bench.feed(PeerLost(A))
        case "stall":
            bench.sleep_until_woken()
        case _:
            bench.tokens(A, 0)
    assert bench.last(SpeedSeen) == SpeedSeen(A, 2, 8 * SECOND_NS)
