"""One machine against peers that the test plays: bounds, order, hostility, time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.machine import Disconnect, Woken
from protocol.ring import (
    Chain,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    Stage,
    StagePeer,
)
from routing.chains import events as ev
from routing.chains.ring import RingPolicy
from routing.chains.ring_policy import MAX_TAKEN_ROWS

CARGO = "sha256:" + "d" * 64
SESSION = "5e" * 16
UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS


def chain_of(*spares: str, generation: int = 0, holder: str = "b") -> Chain:
    """head h, stages a (layers 0-4), b (4-8), h (8-12); `spares` are b's."""
    return Chain(
        CARGO,
        (
            Stage(StagePeer("a"), 0, 4),
            Stage(StagePeer(holder), 4, 8, tuple(StagePeer(name) for name in spares), generation),
            Stage(StagePeer("h"), 8, 12),
        ),
        "f32",
    )


def opening(index: int, chain: Chain | None = None, *, session: str = SESSION, **how: Any) -> RingOpen:
    fields: dict[str, Any] = {"upto": 0, "prompt": 8, "consumer": "gateway", "began": 7}
    return RingOpen(session=session, chain=chain or chain_of(), index=index, **(fields | how))


@pytest.fixture
def bench(ring_bench: Any) -> Any:
    return lambda me="b", layers=(4, 8), policy=None: ring_bench(CARGO, SESSION, me, layers, policy)


@pytest.fixture
def opened(bench: Any) -> Any:
    """Stage b of a chain with spares c and d; h is open behind it unless told otherwise."""

    def make(policy: RingPolicy | None = None, *, have: int | None = 0) -> Any:
        made = bench(policy=policy)
        made.hear("a", opening(1, chain_of("c", "d")))
        if have is not None:
            made.hear("h", RingOpened(SESSION, have, 0, 7))
        return made

    return make


def kinds(out: list[Any]) -> list[Any]:
    """(peer, message type) and event types."""
    return [(one[0], type(one[1])) if isinstance(one, tuple) else type(one) for one in out]


# --- opening ------------------------------------------------------------------------------------------


def test_a_new_session_is_admitted_answered_and_passed_on(bench: Any) -> None:
    out = bench().hear("a", opening(1))
    assert out == [
        ev.Admit(SESSION, CARGO, "f32", 8, deterministic=False),
        ("a", RingOpened(SESSION, 0, 0, 7)),
        ("h", opening(2)),
    ]


@pytest.mark.parametrize(
    ("peer", "message", "code"),
    [
        ("x", opening(1), "refused"),  # the chain names another before us
        ("a", opening(1, chain_of(holder="c")), "refused"),  # and another here
        ("a", opening(5), "refused"),
        ("a", opening(1, msgspec.structs.replace(chain_of(), cargo="sha256:" + "e" * 64)), "unknown"),
        ("a", opening(1, msgspec.structs.replace(chain_of(), stages=chain_of().stages[:2])), "unknown"),
        ("a", opening(1, msgspec.structs.replace(chain_of(), stages=chain_of().stages[1:])), "refused"),
    ],
)
def test_what_does_not_fit_is_refused(bench: Any, peer: str, message: RingOpen, code: str) -> None:
    stage = bench()
    ((to, fault),) = stage.hear(peer, message)
    assert (to, fault.code, fault.session) == (peer, code, SESSION)
    assert stage.machine.sessions(CARGO) == 0


def test_a_peer_has_so_many_sessions_and_no_more(bench: Any) -> None:
    stage = bench(policy=RingPolicy(sessions=5, sessions_per_peer=3))
    for number in range(4):
        out = stage.hear("a", opening(1, session=f"{number:032d}"))
    assert kinds(out) == [("a", RingFault)]
    assert out[0][1].code == "busy"
    other = msgspec.structs.replace(chain_of(), stages=(Stage(StagePeer("z"), 0, 4), *chain_of().stages[1:]))
    for number in range(10, 13):
        out = stage.hear("z", opening(1, other, session=f"{number:032d}"))
    assert out[0][1].code == "busy"
    assert stage.machine.sessions(CARGO) == 5


def test_an_engine_that_refuses_sends_the_stage_before_elsewhere(opened: Any) -> None:
    stage = opened()
    out = stage.order(ev.EngineRefused(SESSION, "busy", "no slot"))
    assert out == [("a", RingFault(SESSION, "busy", 1, "no slot")), ev.Release(SESSION)]
    assert stage.machine.sessions(CARGO) == 0


# --- rows ---------------------------------------------------------------------------------------------


def test_rows_go_to_the_engine_and_what_comes_out_goes_on(opened: Any) -> None:
    stage = opened()
    assert stage.feed(0, 3) == [ev.Compute(SESSION, 0, 3, b"\x01" * 48)]
    assert stage.done(0, 3) == [
        ("h", RingFeed(SESSION, 0, 3, b"\x02" * 48)),
        ("a", RingAck(SESSION, 3, 1000, 10)),
    ]


def test_what_is_made_before_the_next_stage_answers_waits_and_what_it_has_is_not_sent(opened: Any) -> None:
    stage = opened(have=None)
    stage.feed(0, 6)
    assert kinds(stage.done(0, 6)) == [("a", RingAck)]
    out = stage.hear("h", RingOpened(SESSION, 4, 0, 7))
    assert out == [("h", RingFeed(SESSION, 4, 2, b"\x02" * 32))]


def test_rows_that_it_has_are_passed_over_and_a_later_turn_voids_them(opened: Any) -> None:
    stage = opened()
    stage.feed(0, 4)
    stage.done(0, 4)
    assert stage.feed(0, 4) == [("a", RingAck(SESSION, 4))]
    assert stage.feed(2, 4) == [ev.Compute(SESSION, 4, 2, b"\x01" * 32)]
    stage.done(4, 2)
    assert stage.feed(3, 1, turn=1, mark=9) == [ev.Compute(SESSION, 3, 1, b"\x09" * 16)]
    out = stage.done(3, 1, mark=8)
    assert ("h", RingFeed(SESSION, 3, 1, b"\x08" * 16, 1)) in out


def test_a_correction_waits_until_the_engine_is_through_with_what_is_void(opened: Any) -> None:
    stage = opened()
    stage.feed(0, 6)
    assert stage.feed(3, 1, turn=1, mark=9) == []
    out = stage.done(0, 4)  # the last of these is void
    assert ("h", RingFeed(SESSION, 0, 3, b"\x02" * 48)) in out
    out = stage.done(4, 2)
    assert ev.Compute(SESSION, 3, 1, b"\x09" * 16) in out
    assert not any(isinstance(one, tuple) and isinstance(one[1], RingFeed) for one in out)


def test_a_head_that_is_ahead_with_its_turns_still_gets_the_rows_of_its_last_one(opened: Any) -> None:
    stage = opened(have=None)
    stage.hear("h", RingOpened(SESSION, 0, 2, 7))
    stage.feed(0, 4)
    stage.done(0, 4)  # the last two are void at the head already
    stage.feed(2, 1, turn=2, mark=9)
    assert ("h", RingFeed(SESSION, 2, 1, b"\x08" * 16, 2)) in stage.done(2, 1, mark=8)


def test_an_engine_that_never_ends_what_is_void_is_started_over(opened: Any) -> None:
    stage = opened()
    stage.feed(0, 6)
    stage.feed(3, 1, turn=1)
    stage.hear("a", RingPing(1))
    out: list[Any] = []
    for number in range(2, 7):
        stage.hear("a", RingPing(number))
        out += stage.wait(7 * SECOND_NS, answering=("h",))
    assert ev.Admit(SESSION, CARGO, "f32", 8, deterministic=False) in out
    assert ("a", RingOpened(SESSION, 0, 1, 7, again=True)) in out


def test_a_gap_is_asked_for_once(opened: Any) -> None:
    stage = opened()
    stage.feed(0, 2)
    assert stage.feed(5, 1) == [("a", RingOpened(SESSION, 2, 0, 7, again=True))]
    assert stage.feed(6, 1) == []
    assert kinds(stage.feed(2, 5)) == [ev.Compute]


def test_the_window_holds_rows_back_and_so_the_stage_before(opened: Any) -> None:
    stage = opened(RingPolicy(window_rows=4, feed_rows=2))
    for position in range(0, 20, 2):
        stage.feed(position, 2)
    sent: list[RingFeed] = []
    acks: list[int] = []
    for position in range(0, 20, 2):
        for one in stage.done(position, 2):
            match one:
                case (_, RingFeed() as feed):
                    sent.append(feed)
                case (_, RingAck(until=until)):
                    acks.append(until)
                case _:
                    pass
    assert [feed.position for feed in sent] == [0, 2]
    assert max(acks) == 8  # four rows beyond what could be sent on
    out = stage.hear("h", RingAck(SESSION, 2))
    assert out == [("h", RingFeed(SESSION, 4, 2, b"\x02" * 32)), ("a", RingAck(SESSION, 10, 0, 10))]


def test_a_stage_before_us_that_ignores_the_window_is_thrown_out(opened: Any) -> None:
    stage = opened()
    out: list[Any] = []
    for position in range(0, MAX_TAKEN_ROWS + 1000, 500):
        out = stage.feed(position, 500)
        if kinds(out) != [ev.Compute]:
            break
    assert kinds(out) == [("a", RingFault), ev.Release]
    assert out[0][1].code == "invalid"


def test_rows_that_are_no_rows_end_the_session(opened: Any) -> None:
    stage = opened()
    out = stage.hear("a", RingFeed(SESSION, 0, 3, b"12345"))
    assert kinds(out) == [("a", RingFault), ev.Release]


def test_a_feed_for_nobody_and_a_feed_by_somebody_else(opened: Any) -> None:
    stage = opened()
    ((_, fault),) = stage.hear("a", RingFeed("0" * 32, 0, 1, b"1234"))
    assert fault.code == "unknown"
    assert stage.feed(0, 1, peer="x") == []


# --- deaths -------------------------------------------------------------------------------------------


def two_in_the_midst() -> Chain:
    """a, then b, then c with spare d, then the head."""
    return Chain(
        CARGO,
        (
            Stage(StagePeer("a"), 0, 4),
            Stage(StagePeer("b"), 4, 8),
            Stage(StagePeer("c"), 8, 12, (StagePeer("d"), StagePeer("e"))),
            Stage(StagePeer("h"), 12, 16),
        ),
        "f32",
    )


@pytest.fixture
def feeding(bench: Any) -> Any:
    """Stage b that has sent five rows to c."""

    def make(policy: RingPolicy | None = None) -> Any:
        stage = bench(policy=policy)
        stage.hear("a", opening(1, two_in_the_midst()))
        stage.hear("c", RingOpened(SESSION, 0, 0, 7))
        for row in range(5):
            stage.feed(row, 1)
            stage.done(row, 1, mark=row)
        return stage

    return make


REPLAYED = b"".join(bytes([row]) * 16 for row in range(5))


def test_a_link_that_breaks_puts_the_spare_there_and_the_log_is_sent_again(feeding: Any) -> None:
    stage = feeding()
    replaced, (peer, message) = stage.order(ev.DownstreamLost(PeerId("c"), "reset"))
    assert (replaced.lost.peer, replaced.lost.failed, replaced.lost.index) == ("c", True, 2)
    assert peer == "d"
    assert message.chain.stages[2].holder.peer == "d"
    assert message.chain.stages[2].generation == 1
    assert [loss.peer for loss in message.losses] == ["c"]
    assert stage.hear("d", RingOpened(SESSION, 0, 0, 7)) == [("d", RingFeed(SESSION, 0, 5, REPLAYED))]


def test_silence_does_it_too_within_a_second(feeding: Any) -> None:
    stage = feeding()
    stage.hear("c", RingAck(SESSION, 5))
    assert ev.StageReplaced not in kinds(stage.wait(3 * SECOND_NS, answering=("c",)))
    out = stage.wait(1050 * MILLISECOND_NS)
    assert Disconnect(PeerId("c"), "silent") in out
    assert ("d", RingOpen) in kinds(out)


def test_our_own_sleep_is_nobodys_fault(feeding: Any) -> None:
    stage = feeding()
    stage.now = Instant(stage.now + 30 * SECOND_NS)
    assert ev.Release not in kinds(out := stage.give(Woken()))
    assert Disconnect(PeerId("c"), "silent") not in out


def test_a_spare_that_is_busy_is_passed_over_without_blame(feeding: Any) -> None:
    stage = feeding()
    stage.order(ev.DownstreamLost(PeerId("c"), "reset"))
    out = stage.hear("d", RingFault(SESSION, "busy", 2, "no slot"))
    replaced = next(one for one in out if isinstance(one, ev.StageReplaced))
    assert (replaced.lost.peer, replaced.lost.failed) == ("d", False)
    assert ("e", RingOpen) in kinds(out)


def test_when_nobody_is_left_the_stage_before_hears_it_and_so_does_a_later_one(feeding: Any) -> None:
    stage = feeding()
    for peer in "cde":
        out = stage.order(ev.DownstreamLost(PeerId(peer), "refused"))
    assert ("e", RingOpen) in kinds(out)  # once more, perhaps only the link broke
    out = stage.order(ev.DownstreamLost(PeerId("e"), "refused"))
    ((peer, fault),) = out
    assert (peer, fault.code, fault.index) == ("a", "stranded", 2)
    first, *rest = two_in_the_midst().stages
    later = msgspec.structs.replace(
        two_in_the_midst(), stages=(Stage(StagePeer("z"), first.first, first.last, (), 1), *rest)
    )
    assert ("z", fault) in stage.hear("z", opening(1, later))


def test_a_link_that_breaks_again_and_again_is_not_mended_for_ever(feeding: Any) -> None:
    stage = feeding()
    for number in range(100):
        peer = "cde"[min(number, 2)]
        out = stage.order(ev.DownstreamLost(PeerId(peer), "reset"))
        if ev.StageReplaced not in kinds(out):
            break
        stage.hear("cde"[min(number + 1, 2)], RingOpened(SESSION, 0, 0, 7))
        stage.hear("cde"[min(number + 1, 2)], RingAck(SESSION, 1))
    assert [(one[0], one[1].code) for one in out] == [("a", "stranded")]
    assert number == 32


def test_a_stage_that_lives_but_does_not_work_is_replaced(feeding: Any) -> None:
    stage = feeding(RingPolicy(stall_ns=5 * SECOND_NS))
    out = stage.wait(4 * SECOND_NS, answering=("c",))
    stage.hear("c", RingAck(SESSION, 0))  # it waits for one behind it, and says so
    out += stage.wait(4 * SECOND_NS, answering=("c",))
    assert ev.StageReplaced not in kinds(out)
    out = stage.wait(4 * SECOND_NS, answering=("c",))
    assert ("c", RingEnd(SESSION, replaced=True)) in out
    assert ("d", RingOpen) in kinds(out)


def test_one_that_was_replaced_does_not_count_any_more(opened: Any) -> None:
    stage = opened()
    newer = msgspec.structs.replace(
        chain_of("c", "d"), stages=(Stage(StagePeer("z"), 0, 4, (), 1), *chain_of("c", "d").stages[1:])
    )
    stage.feed(0, 2)
    stage.done(0, 2)
    out = stage.hear("z", opening(1, newer))
    assert ("z", RingOpened(SESSION, 2, 0, 7, again=True)) in out
    assert ("h", RingOpen) in kinds(out)  # it learns who is there
    assert stage.hear("a", opening(1, chain_of("c", "d"))) == []
    assert stage.feed(2, 1, peer="a") == []
    assert kinds(stage.feed(2, 1, peer="z")) == [ev.Compute]


def test_an_engine_that_dies_gets_its_rows_again_and_nothing_is_passed_on_twice(opened: Any) -> None:
    stage = opened()
    stage.feed(0, 4)
    stage.done(0, 4)
    out = stage.order(ev.EngineLost(CARGO))
    assert out == [
        ev.Admit(SESSION, CARGO, "f32", 8, deterministic=False),
        ("a", RingOpened(SESSION, 0, 0, 7, again=True)),
    ]
    assert stage.feed(4, 1) == []  # was on its way
    stage.feed(0, 5)
    out = stage.done(0, 5, mark=3)
    assert [one[1] for one in out if isinstance(one, tuple) and one[0] == "h"] == [
        RingFeed(SESSION, 4, 1, b"\x03" * 16)
    ]


@pytest.mark.parametrize("answers", [True, False])
def test_rows_that_nobody_takes_fill_no_memory(opened: Any, *, answers: bool) -> None:
    """The stage before this one does not care for what is acknowledged, that behind it takes nothing or does
    not even answer.
    """
    policy = RingPolicy(log_bytes=500, most_log_bytes=1000, window_rows=4, feed_rows=2)
    stage = opened(policy, have=0 if answers else None)
    for position in range(1000 // 16):
        stage.feed(position, 1)
        out = stage.done(position, 1)
        assert stage.machine.log_bytes <= 1000
        assert ev.Release(SESSION) not in out
    stage.feed(62, 1)
    out = stage.done(62, 1)
    assert ev.Release(SESSION) in out
    assert [
        (p, m.code) for p, m in (one for one in out if isinstance(one, tuple)) if isinstance(m, RingFault)
    ] == [("a", "busy")]
    assert stage.machine.log_bytes == 0


def test_logs_are_bounded_and_what_was_forgotten_is_made_again(feeding: Any) -> None:
    stage = feeding(RingPolicy(log_bytes=64))
    stage.hear("c", RingAck(SESSION, 5))
    stage.feed(5, 1)
    stage.done(5, 1)
    assert stage.machine.log_bytes <= 64
    stage.order(ev.DownstreamLost(PeerId("c"), "reset"))
    out = stage.hear("d", RingOpened(SESSION, 0, 0, 7))
    assert out == [("a", RingOpened(SESSION, 0, 0, 7, again=True))]
    assert stage.feed(0, 6) == [ev.Compute(SESSION, 0, 6, b"\x01" * 96)]
    assert ("d", RingFeed(SESSION, 0, 6, b"\x05" * 96)) in stage.done(0, 6, mark=5)


# --- ends ---------------------------------------------------------------------------------------------


def test_an_orphan_is_kept_a_while_and_those_behind_it_are_told(opened: Any) -> None:
    stage = opened()
    stage.order(ev.UpstreamLost(PeerId("a")))
    out = stage.wait(29 * SECOND_NS, answering=("h",))
    assert ev.Release not in kinds(out)
    out = stage.wait(2 * SECOND_NS, answering=("h",))
    assert ("h", RingEnd(SESSION)) in out
    assert ev.Release(SESSION) in out
    assert stage.machine.sessions(CARGO) == 0


def test_one_whose_feeder_forgot_it_asks_and_is_told(opened: Any, bench: Any) -> None:
    stage = opened()
    out: list[Any] = []
    for number in range(40):
        stage.hear("a", RingPing(number))  # it lives, for the sake of others
        out += stage.wait(SECOND_NS, answering=("h",))
    question = next(one[1] for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpened))
    answer = bench("a", (0, 4)).hear("b", question)
    assert answer == [("b", RingEnd(SESSION, replaced=True))]
    assert bench("a", (0, 4)).hear("b", msgspec.structs.replace(question, asks=False)) == []  # a mere answer
    assert ev.Release(SESSION) in stage.hear("a", answer[0][1])


def test_a_session_that_nothing_is_done_with_gives_its_slot_back(opened: Any) -> None:
    stage = opened(RingPolicy(idle_ns=100 * SECOND_NS))
    out: list[Any] = []
    for number in range(140):
        assert ev.Release not in kinds(out) or number >= 100
        stage.hear("a", RingPing(number))
        out += stage.wait(SECOND_NS, answering=("h",))
    assert ev.Release(SESSION) in out
    ((peer, fault),) = stage.feed(0, 1)
    assert (peer, fault.code) == ("a", "unknown")  # then the stage before finds another, or this one again


def test_only_the_feeder_ends_a_session(opened: Any) -> None:
    stage = opened()
    assert stage.hear("x", RingEnd(SESSION)) == []
    (peer, end), released = stage.hear("a", RingEnd(SESSION, hops=(5,)))
    assert peer == "h"
    assert len(end.receipts) == 1
    assert len(end.hops) == 2
    assert released == ev.Release(SESSION)


def test_a_shard_that_is_let_go_ends_its_sessions(opened: Any) -> None:
    stage = opened()
    out = stage.order(ev.ShardHeldHere(CARGO, 0, 0))
    assert kinds(out) == [("a", RingFault), ev.Release]


# --- heads --------------------------------------------------------------------------------------------


def draw(position: int, *tokens: int, prompt: int = 3) -> ev.Draw:
    payload = b"".join(token.to_bytes(4, "little") for token in tokens)
    return ev.Draw(SESSION, position, len(tokens), payload, prompt)


@pytest.fixture
def head(bench: Any) -> Any:
    """The head of h; a has answered, and b has opened it. Three tokens are drawn."""
    made = bench("h", (8, 12))
    made.order(ev.Begin(SESSION, chain_of("c"), PeerId("gateway"), deterministic=False))
    ((_, message),) = [one for one in made.order(draw(0, 1, 2, 3)) if isinstance(one, tuple)]
    made.began = message.began
    made.hear("a", RingOpened(SESSION, 0, 0, made.began))
    made.hear("b", opening(2, chain_of("c"), began=made.began))
    return made


def test_a_head_passes_on_only_rows_that_it_still_wants(head: Any) -> None:
    assert kinds(head.feed(0, 3, peer="b")) == [ev.Compute]
    head.done(0, 3)
    assert head.order(draw(3, 4, 50, 60)) == [
        ("a", RingFeed(SESSION, 3, 3, b"".join(t.to_bytes(4, "little") for t in (4, 50, 60))))
    ]
    head.feed(3, 1, peer="b")
    head.done(3, 1)
    assert head.order(draw(4, 5)) == [("a", RingFeed(SESSION, 4, 1, (5).to_bytes(4, "little"), 1))]
    assert kinds(head.feed(4, 2, peer="b")) == [("b", RingAck)]  # of before
    assert head.feed(4, 1, peer="b", turn=1, mark=9) == [ev.Compute(SESSION, 4, 1, b"\x09" * 16)]
    assert kinds(head.feed(5, 40, peer="b", turn=1)) == [("b", RingAck)]  # nobody asked for these


def test_a_head_whose_engine_died_gets_its_rows_from_the_stage_before(head: Any) -> None:
    head.feed(0, 3, peer="b")
    head.done(0, 3)
    head.order(ev.EngineLost(CARGO))
    assert head.feed(3, 1, peer="b") == []
    assert head.order(draw(0, 1, 2, 3)) == [("b", RingOpened(SESSION, 0, 0, head.began, again=True))]


def test_a_first_stage_with_other_tokens_is_fed_all(bench: Any) -> None:
    made = bench("h", (8, 12))
    made.order(ev.Begin(SESSION, chain_of("c"), PeerId("gateway"), deterministic=False))
    ((_, message),) = made.order(draw(0, 1, 2, 3))
    out = made.hear("a", RingOpened(SESSION, 2, 0, message.began, mark=b"x" * 16))
    ((_, feed),) = out
    assert (feed.position, feed.rows, feed.turn) == (0, 3, 1)


def test_the_time_of_a_traversal_is_measured(head: Any) -> None:
    assert head.machine.trip_ns(SESSION) == 0
    head.now = Instant(head.now + 40 * MILLISECOND_NS)
    head.feed(0, 3, peer="b")
    head.done(0, 3)
    assert head.machine.trip_ns(SESSION) == 40 * MILLISECOND_NS


def test_an_end_that_does_not_come_back_is_not_waited_for(head: Any) -> None:
    assert kinds(head.order(ev.Finish(SESSION))) == [("a", RingEnd)]
    out = head.wait(1100 * MILLISECOND_NS, answering=("a",))
    (ended,) = [one for one in out if isinstance(one, ev.Ended)]
    assert [(work.peer, work.receipt is not None) for work in ended.works] == [
        ("a", False),
        ("b", False),
        ("h", True),
    ]
    assert head.machine.next_wake() is None or not head.wait(SECOND_NS)


def test_a_session_that_is_stranded_fails_at_the_head_with_a_name(head: Any) -> None:
    (failed,) = head.hear("a", RingFault(SESSION, "stranded", 1, "no spare"))
    assert (failed.code, failed.index) == ("stranded", 1)
    assert [(work.peer, work.failed) for work in failed.works] == [("b", True)]
    assert head.order(draw(3, 4)) == []
    assert kinds(head.order(ev.Finish(SESSION))) == [("a", RingEnd)]


def test_stages_that_let_a_session_go_are_opened_again_if_there_is_something_to_do(head: Any) -> None:
    out = head.hear("b", RingEnd(SESSION))
    (asked,) = [one for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpen)]
    assert (asked[0], asked[1].chain.stages[0].generation) == ("a", 1)
    head.hear("a", RingOpened(SESSION, 0, 0, head.began))
    head.feed(0, 3, peer="b")
    head.done(0, 3)
    head.hear("a", RingAck(SESSION, 3))
    assert head.hear("b", RingEnd(SESSION)) == []  # for the time being there is not
    head.order(draw(3, 4))
    out = head.hear("a", RingFault(SESSION, "unknown", 0))
    assert any(isinstance(one, tuple) and isinstance(one[1], RingOpen) for one in out)


def test_a_session_that_begins_again_before_its_end_came_round_is_ended_first(head: Any) -> None:
    head.order(ev.Finish(SESSION))
    out = head.order(ev.Begin(SESSION, chain_of("c"), PeerId("gateway"), deterministic=False))
    assert kinds(out) == [ev.Ended]
    ((_, message),) = head.order(draw(0, 1, 2, 3))
    assert message.began > head.began
    assert head.hear("b", RingEnd(SESSION)) == []  # of before


def test_a_chain_that_is_none_fails_at_once(bench: Any) -> None:
    made = bench("x", (8, 12))
    (failed,) = made.order(ev.Begin(SESSION, chain_of(), PeerId("gateway"), deterministic=False))
    assert failed.code == "invalid"
    (ended,) = made.order(ev.Finish(SESSION))
    assert isinstance(ended, ev.Ended)


# --- a head after another -----------------------------------------------------------------------------


def later_head(chain: Chain, **how: Any) -> RingOpen:
    """The same ring under a head that began later; `how` as of RingOpen."""
    stages = (*chain.stages[:-1], Stage(StagePeer("i"), *_layers(chain.stages[-1]), (), 256))
    return opening(1, msgspec.structs.replace(chain, stages=stages), **({"began": 8} | how))


def _layers(stage: Stage) -> tuple[int, int]:
    return stage.first, stage.last


def test_under_a_new_head_it_keeps_what_it_was_fed_without_a_break(feeding: Any) -> None:
    stage = feeding()
    out = stage.hear("a", later_head(two_in_the_midst(), upto=4))
    assert ("a", RingOpened(SESSION, 4, 0, 8)) in out
    ((_, passed),) = [one for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpen)]
    assert (passed.upto, passed.began, passed.chain.head.peer) == (4, 8, "i")
    assert stage.hear("c", RingOpened(SESSION, 2, 0, 7)) == []  # said to the head before
    assert stage.hear("c", RingOpened(SESSION, 3, 0, 8)) == [("c", RingFeed(SESSION, 3, 1, REPLAYED[48:64]))]


@pytest.mark.parametrize("how", ["broken link", "another feeder"])
def test_under_a_new_head_it_takes_all_anew_if_it_may_have_missed_a_turn(feeding: Any, how: str) -> None:
    stage = feeding()
    chain, feeder = two_in_the_midst(), "a"
    if how == "broken link":
        stage.order(ev.UpstreamLost(PeerId("a")))
    else:
        feeder = "z"
        chain = msgspec.structs.replace(chain, stages=(Stage(StagePeer("z"), 0, 4), *chain.stages[1:]))
    out = stage.hear(feeder, later_head(chain, upto=4))
    ((_, answer),) = [one for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpened)]
    assert answer.have == 0
    ((_, passed),) = [one for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpen)]
    assert passed.upto == 0
    assert stage.machine.log_bytes == 0


def test_what_the_next_stage_claims_to_have_is_vouched_for_only_as_far_as_our_own_log_goes(bench: Any) -> None:
    stage = bench()
    stage.hear("a", opening(1, two_in_the_midst()))
    stage.hear("c", RingOpened(SESSION, 40, 3, 7))  # from before us; some of it may be void
    stage.feed(0, 10)
    stage.done(0, 10)
    out = stage.hear("a", later_head(two_in_the_midst(), upto=30))
    ((_, passed),) = [one for one in out if isinstance(one, tuple) and isinstance(one[1], RingOpen)]
    assert passed.upto == 10


def test_a_head_that_begins_anew_at_the_same_place_counts_more_than_itself(bench: Any) -> None:
    made = bench("h", (8, 12))
    began: list[int] = []
    for _ in range(2):
        made.order(ev.Begin(SESSION, chain_of("c"), PeerId("gateway"), deterministic=False))
        ((_, message),) = made.order(draw(0, 1, 2, 3))
        began.append(message.began)
        assert message.upto == 2  # the last one may stand where a rejected draft is
    assert began[1] > began[0]


def test_without_drafts_no_row_is_doubtful(bench: Any) -> None:
    made = bench("h", (8, 12))
    made.order(ev.Begin(SESSION, chain_of("c"), PeerId("gateway"), deterministic=True))
    ((_, message),) = made.order(draw(0, 1, 2, 3))
    assert message.upto == 3  # and the step of the grid that ends here is not cut in two
