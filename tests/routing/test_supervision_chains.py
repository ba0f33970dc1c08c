"""The supervisor with chains: heads that die, stages that are accused, accounts that can not be true."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from protocol.envelope import Envelope, Signer
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs
from protocol.jobs import (
    RECEIPT_KIND,
    FromIsland,
    JobAccept,
    JobDone,
    JobError,
    JobOffer,
    JobReject,
    JobTokens,
    Receipt,
    Token,
    Usage,
    token_hash,
)
from protocol.machine import Disconnect, Emit, Ordered, PeerLost, Received, Send, Woken
from protocol.ring import STAGE_RECEIPT_KIND, Chain, Stage, StagePeer, StageReceipt, StageShare, StageWork
from protocol.work import Generation, Sampling, TextPrompt
from routing.job_events import (
    FULL,
    Ask,
    Assignment,
    ChainFailed,
    Full,
    IslandFailed,
    IslandsChanged,
    JobCompleted,
    JobFailed,
    JobPlaced,
    JobPreparing,
    JobWaiting,
    NotYet,
    Start,
    SupervisionPolicy,
)
from routing.supervision import JobSupervisor

CARGO = CargoDigest("sha256:" + "c" * 64)
JOB = JobId("1" * 32)
LENGTH = 6
ZERO = Instant(0)
ANSWER = [1000 + i for i in range(LENGTH)]
SIGNERS = [Signer(bytes([i]) * 32) for i in range(1, 7)]
FIRST, MIDDLE, HEAD, SPARE, SPARE_HEAD, STRANGER = PEERS = [signer.peer for signer in SIGNERS]
UNIX = UnixNs(1_800_000_000 * SECOND_NS)
CHAIN = Chain(
    CARGO,
    (
        Stage(StagePeer(FIRST), 0, 4),
        Stage(StagePeer(MIDDLE), 4, 8, (StagePeer(SPARE),)),
        Stage(StagePeer(HEAD), 8, 12, (StagePeer(SPARE_HEAD),)),
    ),
)


def with_head(peer: PeerId, generation: int) -> Chain:
    head = msgspec.structs.replace(CHAIN.stages[-1], holder=StagePeer(peer), generation=generation)
    return msgspec.structs.replace(CHAIN, stages=(*CHAIN.stages[:-1], head))


@dataclass
class Bench:
    """`places`: what the placer answers, one after the other; the last again and again."""

    places: list[Assignment[PeerId] | NotYet | Full | None]
    policy: SupervisionPolicy = field(default_factory=lambda: SupervisionPolicy(window=64))
    now: Instant = ZERO
    asks: list[Ask[PeerId]] = field(default_factory=list[Ask[PeerId]])
    offers: list[tuple[PeerId, JobOffer]] = field(default_factory=list[tuple[PeerId, JobOffer]])
    events: list[Any] = field(default_factory=list[Any])

    def __post_init__(self) -> None:
        self.machine: JobSupervisor[PeerId] = JobSupervisor(
            JOB,
            CARGO,
            Generation(TextPrompt("hi"), Sampling(seed=9), max_tokens=LENGTH),
            self.place,
            policy=self.policy,
            unix_offset_ns=UNIX,
            name_of=lambda peer: f"island-{PEERS.index(peer)}",
            consumer="c",
        )
        self.feed(Ordered(Start()))

    def place(self, _: Instant, ask: Ask[PeerId]) -> Assignment[PeerId] | NotYet | Full | None:
        self.asks.append(ask)
        return self.places.pop(0) if len(self.places) > 1 else self.places[0]

    def feed(self, what: Any) -> None:
        for effect in self.machine.receive(self.now, what):
            match effect:
                case Send(peer, JobOffer() as offer):
                    self.offers.append((peer, offer))
                case Emit(event):
                    self.events.append(event)
                case Send() | Disconnect():
                    pass
                case _:
                    pytest.fail(f"unexpected effect {effect}")

    def say(self, peer: PeerId, message: FromIsland) -> None:
        self.feed(Received(peer, message))

    def run(self, peer: PeerId, first: int, count: int) -> None:
        self.say(peer, JobAccept())
        if count:
            self.say(peer, JobTokens(first, tuple(Token(t, "x") for t in ANSWER[first : first + count])))

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, duration_ns: int) -> None:
        self.now = Instant(self.now + duration_ns)
        self.feed(Woken())

    @property
    def session(self) -> JobId:
        return JobId(self.offers[-1][1].job)

    def done(self, chain: Chain, first: int = 0, works: tuple[StageWork, ...] = (), **changes: Any) -> None:
        head = PeerId(chain.head.peer)
        shares = tuple(StageShare(s.holder.peer, s.first, s.last) for s in chain.stages)
        receipt = Receipt(
            job=self.session,
            cargo=CARGO,
            consumer="c",
            prompt_hash=b"p" * 32,
            output_hash=token_hash(ANSWER),
            prompt_tokens=3,
            completion_tokens=LENGTH,
            first=first,
            seed=9,
            started_unix_ns=UNIX,
            finished_unix_ns=UNIX,
            stages=changes.pop("stages", shares),
        )
        envelope = SIGNERS[PEERS.index(head)].seal(
            RECEIPT_KIND, receipt, sequence=1, expires_unix_ns=UnixNs(UNIX + SECOND_NS)
        )
        usage = Usage(3, LENGTH, LENGTH - first)
        self.say(head, JobDone("length", "", usage, envelope, works))

    def account(self, index: int, peer: PeerId, *, signer: PeerId | None = None, **changes: Any) -> StageWork:
        stage = CHAIN.stages[index]
        receipt = StageReceipt(
            session=changes.pop("session", self.session),
            cargo=CARGO,
            consumer=changes.pop("consumer", "c"),
            index=index,
            first=stage.first,
            last=changes.pop("signed_last", stage.last),
            rows=20,
            kept=changes.pop("kept", 8),
            compute_ns=5,
            started_unix_ns=UNIX,
            finished_unix_ns=UNIX,
        )
        envelope: Envelope = SIGNERS[PEERS.index(signer or peer)].seal(
            STAGE_RECEIPT_KIND, receipt, sequence=1, expires_unix_ns=UnixNs(UNIX + SECOND_NS)
        )
        work = StageWork(peer, index, stage.first, stage.last, hop_ns=7, receipt=envelope)
        return msgspec.structs.replace(work, **changes)


def test_a_chain_is_offered_to_its_head_and_its_accounts_are_passed_on() -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    peer, offer = bench.offers[0]
    assert (peer, offer.chain, offer.job) == (HEAD, CHAIN, JOB)
    bench.run(HEAD, 0, LENGTH)
    assert bench.of(JobPlaced)[0].chain == CHAIN
    works = (
        bench.account(0, FIRST),
        bench.account(1, MIDDLE, failed=True, reason="gone", receipt=None),
        bench.account(1, SPARE),
        bench.account(2, HEAD),
    )
    bench.done(CHAIN, works=works)
    (done,) = bench.of(JobCompleted)
    assert done.receipt is not None
    assert done.chain == CHAIN
    assert [(s.peer, s.index, s.failed, s.receipt is not None) for s in done.stages] == [
        (FIRST, 0, False, True),
        (MIDDLE, 1, True, False),
        (SPARE, 1, False, True),
        (HEAD, 2, False, True),
    ]
    assert bench.of(IslandFailed) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"signer": STRANGER},
        {"session": "2" * 32},
        {"consumer": "somebody"},
        {"signed_last": 9},
        {"kept": 21},
    ],
)
def test_a_stage_receipt_that_can_not_be_true_is_none(changes: dict[str, Any]) -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    bench.run(HEAD, 0, LENGTH)
    bench.done(CHAIN, works=(bench.account(1, MIDDLE, **changes),))
    (seen,) = bench.of(JobCompleted)[0].stages
    assert seen.receipt is None


def test_who_never_stood_in_the_chain_is_left_out() -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    bench.run(HEAD, 0, LENGTH)
    works = (
        bench.account(1, STRANGER),
        bench.account(0, SPARE),
        bench.account(1, MIDDLE, first=3),
        msgspec.structs.replace(bench.account(2, HEAD), index=5),
        bench.account(1, MIDDLE),
        bench.account(1, MIDDLE),
    )
    bench.done(CHAIN, works=works)
    assert [s.peer for s in bench.of(JobCompleted)[0].stages] == [MIDDLE]


@pytest.mark.parametrize(
    "shares",
    [
        (),
        (StageShare(FIRST, 0, 4), StageShare(MIDDLE, 4, 8)),
        (StageShare(FIRST, 0, 4), StageShare(STRANGER, 4, 8), StageShare(HEAD, 8, 12)),
        (StageShare(FIRST, 0, 5), StageShare(MIDDLE, 5, 8), StageShare(HEAD, 8, 12)),
        (StageShare(FIRST, 0, 4), StageShare(MIDDLE, 4, 8), StageShare(SPARE_HEAD, 8, 12)),
    ],
)
def test_a_receipt_must_name_the_stages_that_can_have_done_it(shares: tuple[StageShare, ...]) -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    bench.run(HEAD, 0, LENGTH)
    bench.done(CHAIN, stages=shares)
    (done,) = bench.of(JobCompleted)
    assert done.receipt is None
    assert [failed.peer for failed in bench.of(IslandFailed)] == [HEAD]


def test_who_has_no_chain_names_none() -> None:
    bench = Bench([Assignment(HEAD)])
    bench.run(HEAD, 0, LENGTH)
    bench.done(CHAIN, works=(bench.account(1, MIDDLE),))
    (done,) = bench.of(JobCompleted)
    assert (done.receipt, done.stages) == (None, ())


def test_a_lost_head_is_replaced_in_the_same_session() -> None:
    renewed = with_head(SPARE_HEAD, 1)
    bench = Bench([Assignment(HEAD, CHAIN), Assignment(SPARE_HEAD, renewed, goes_on=True)])
    bench.run(HEAD, 0, 4)
    bench.feed(PeerLost(HEAD))
    assert bench.asks[1].chain == CHAIN
    assert HEAD in bench.asks[1].excluded
    peer, offer = bench.offers[1]
    assert (peer, offer.chain, offer.job, offer.resume) == (SPARE_HEAD, renewed, JOB, tuple(ANSWER[:4]))
    assert [failed.peer for failed in bench.of(IslandFailed)] == [HEAD]
    bench.run(SPARE_HEAD, 4, 2)
    bench.done(renewed, first=4)
    (done,) = bench.of(JobCompleted)
    assert done.receipt is not None
    assert done.hand_overs == 1


def test_the_replacement_may_be_lost_or_refuse_and_the_next_one_goes_on() -> None:
    places: list[Any] = [
        Assignment(HEAD, CHAIN),
        Assignment(SPARE_HEAD, with_head(SPARE_HEAD, 1), goes_on=True),
        Assignment(SPARE, with_head(SPARE, 2), goes_on=True),
        Assignment(STRANGER, with_head(STRANGER, 3), goes_on=True),
    ]
    bench = Bench(places)
    bench.run(HEAD, 0, 2)
    bench.feed(PeerLost(HEAD))
    bench.say(SPARE_HEAD, JobReject("busy"))
    assert bench.asks[2].chain == with_head(SPARE_HEAD, 1)
    bench.feed(PeerLost(SPARE))  # before it accepted
    assert bench.asks[3].chain == with_head(SPARE, 2)
    assert [offer.job for _, offer in bench.offers] == [JOB] * 4


def test_a_chain_that_could_end_its_session_is_not_gone_on_with_and_the_next_has_its_own_name() -> None:
    bench = Bench([Assignment(HEAD, CHAIN), Assignment(SPARE_HEAD, with_head(SPARE_HEAD, 0))])
    bench.run(HEAD, 0, 2)
    bench.say(HEAD, JobError("runtime", "its engine died"))
    assert bench.asks[1].chain is None
    assert [failed.peer for failed in bench.of(IslandFailed)] == [HEAD]
    assert bench.session != JOB
    assert len(bench.session) == len(JOB)
    bench.run(SPARE_HEAD, 2, 4)
    bench.done(with_head(SPARE_HEAD, 0), first=2)
    assert bench.of(JobCompleted)[0].receipt is not None


def test_accused_stages_are_left_out_and_a_head_is_believed_once() -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    bench.run(HEAD, 0, 2)
    accusation = StageWork(MIDDLE, 1, 4, 8, failed=True, reason="silent")
    bench.say(HEAD, JobError("chain-stranded", "no way on", stages=(accusation,)))
    assert bench.of(IslandFailed) == []
    (broken,) = bench.of(ChainFailed)
    assert (broken.peer, [s.peer for s in broken.stages]) == (HEAD, [MIDDLE])
    assert (bench.asks[1].lost, bench.asks[1].excluded) == ({MIDDLE}, frozenset())
    bench.run(HEAD, 2, 1)
    bench.say(HEAD, JobError("chain-stranded", "again", stages=(accusation,)))
    assert bench.asks[2].excluded == {HEAD}
    assert bench.of(IslandFailed) == []


def test_a_chain_whose_spares_are_full_is_tried_again_and_did_not_fail() -> None:
    bench = Bench([Assignment(HEAD, CHAIN)], policy=SupervisionPolicy(attempts=2))
    loss = StageWork(MIDDLE, 1, 4, 8, failed=True, reason="gone")
    for count in range(6):
        bench.places = [Assignment(HEAD, CHAIN), FULL]
        bench.wait(SECOND_NS)
        bench.run(HEAD, 0, 0)
        bench.say(HEAD, JobError("chain-busy", "no slot", stages=() if count else (loss,)))
        assert bench.asks[-1].excluded == {HEAD}
    assert bench.of(JobFailed) == bench.of(IslandFailed) == []
    assert [s.peer for broken in bench.of(ChainFailed) for s in broken.stages] == [MIDDLE]
    assert len({offer.job for _, offer in bench.offers}) == len(bench.offers) >= 6


def test_an_accusation_of_strangers_is_the_heads_own_failure() -> None:
    bench = Bench([Assignment(HEAD, CHAIN)])
    bench.run(HEAD, 0, 2)
    stranger = StageWork(STRANGER, 1, 4, 8, failed=True, reason="silent")
    bench.say(HEAD, JobError("chain-stranded", "no way on", stages=(stranger,)))
    assert bench.of(ChainFailed) == []
    assert [failed.peer for failed in bench.of(IslandFailed)] == [HEAD]


def test_a_job_waits_as_long_as_layers_are_loading_and_not_much_longer() -> None:
    bench = Bench([NotYet(0, 12)], policy=SupervisionPolicy(wait_ns=2 * SECOND_NS))
    for second in range(30):
        bench.places = [NotYet(second // 10 * 4, 12)]
        bench.wait(SECOND_NS)
    assert bench.of(JobFailed) == []
    assert len(bench.of(JobWaiting)) == 1
    assert [(p.stage, p.done, p.total) for p in bench.of(JobPreparing)] == [
        ("loading", 0, 12),
        ("loading", 4, 12),
        ("loading", 8, 12),
    ]
    bench.places = [None]
    bench.wait(SECOND_NS)
    bench.wait(3 * SECOND_NS)
    assert bench.of(JobFailed)[0].code == "no-islands"


def test_what_is_loaded_is_told_by_news_and_the_deadline_holds() -> None:
    bench = Bench([NotYet(0, 12)], policy=SupervisionPolicy(deadline_ns=5 * SECOND_NS))
    bench.places = [Assignment(HEAD, CHAIN)]
    bench.feed(Ordered(IslandsChanged()))
    assert bench.offers[0][0] == HEAD
    other = Bench([NotYet(0, 12)], policy=SupervisionPolicy(deadline_ns=5 * SECOND_NS))
    other.wait(6 * SECOND_NS)
    assert other.of(JobFailed)[0].code == "deadline"


def test_a_full_chain_is_busy_and_not_missing() -> None:
    policy = SupervisionPolicy(wait_ns=2 * SECOND_NS, first_token_ns=20 * SECOND_NS)
    bench = Bench([FULL], policy=policy)
    for _ in range(19):
        bench.wait(SECOND_NS)
    assert bench.of(JobFailed) == [], "it waits as it would in an Island's queue"
    assert len(bench.asks) >= 19, "and looks for a free place"
    bench.wait(2 * SECOND_NS)
    assert bench.of(JobFailed)[0].code == "busy"


def test_a_chain_that_mends_itself_is_not_called_stalled() -> None:
    policy = SupervisionPolicy(window=64, stall_ns=SECOND_NS, stall_floor_ns=SECOND_NS)
    bench = Bench([Assignment(HEAD, CHAIN)], policy=policy)
    bench.run(HEAD, 0, 2)
    bench.wait(5 * SECOND_NS)
    assert bench.of(IslandFailed) == []
    bench.wait(policy.chain_stall_ns)
    assert [(failed.peer, failed.timeout) for failed in bench.of(IslandFailed)] == [(HEAD, True)]
