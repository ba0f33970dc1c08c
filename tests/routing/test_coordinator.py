"""The coordinator against those who are not honest, and its own accounts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adverts import IslandAdvert, OfferedCargo
from protocol.coordination import (
    COORDINATION,
    MAX_ISLANDS_PER_MESSAGE,
    AdvertKeep,
    AdvertPut,
    AdvertTaken,
    AdvertWithdrawn,
    CargoCount,
    CoordinationMessage,
    CoordinatorSummary,
    Declined,
    FindIslands,
    Follow,
    Following,
    IslandsFound,
    IslandsPushed,
    PushTaken,
    SeenIsland,
    Unfollow,
    Wanted,
)
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.errors import Fault, ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.limits import MAX_RPC_BYTES
from protocol.machine import Emit, Ordered, PeerLost, Received, Send, Woken
from routing import affiliation, following_events
from routing.affiliation import Affiliation
from routing.candidates import CoordinatorCandidate
from routing.coordinator import Coordinator
from routing.coordinator_events import (
    CoordinatorPolicy,
    Identity,
    LearnCoordinator,
    PeerMisbehaved,
    RoundTripSeen,
    Serve,
    StatementsDue,
    SummaryMade,
    WorkSeen,
)
from routing.following import Follower
from routing.following_events import CoordinatorLost, Find, FoundIslands, IslandSeen, Want
from routing.karma_witness import KarmaWitness
from routing.meter import Allowance, RateMeter
from routing.notary import EnvelopeNotary, PlainNotary
from routing.referrals import CoordinatorBook

ANY = Wanted()


class Desk:
    """One coordinator (number 1) and those who write to it."""

    def __init__(self, kit: Any, policy: CoordinatorPolicy | None = None, **more: Any) -> None:
        self.kit = kit
        self.now = Instant(SECOND_NS)
        self.machine: Coordinator[int] = Coordinator(
            1,
            PlainNotary(1),
            Dice(1),
            unix_offset_ns=kit.unix_offset_ns,
            policy=policy or CoordinatorPolicy(),
            **more,
        )
        self.sequence = 0

    def tell(self, what: Any) -> list[Any]:
        effects = self.machine.receive(self.now, what)
        for effect in effects:
            if isinstance(effect, Send):
                assert len(COORDINATION.encode(effect.message)) <= MAX_RPC_BYTES
        return effects

    def say(self, peer: int, message: CoordinationMessage) -> list[CoordinationMessage]:
        """What it answers to that peer at once."""
        effects = self.tell(Received(peer, message))
        return [e.message for e in effects if isinstance(e, Send) and e.peer == peer]

    def events(self, effects: Iterable[Any], kind: type) -> list[Any]:
        return [e.event for e in effects if isinstance(e, Emit) and isinstance(e.event, kind)]

    def wait(self, duration_ns: int) -> list[Any]:
        """Let time pass; all effects on the way."""
        end, effects = after(self.now, duration_ns), list[Any]()
        while (wake := self.machine.next_wake()) is not None and wake <= end:
            self.now = Instant(max(self.now, wake))
            effects += self.tell(Woken())
        self.now = end
        return effects

    def envelope(self, island: int, advert: IslandAdvert | None = None, **fields: Any) -> Any:
        self.sequence += 1
        envelope = PlainNotary(island).seal_advert(
            advert or self.kit.advert(f"i{island}"),
            sequence=self.sequence,
            expires_unix_ns=UnixNs(self.now + self.kit.unix_offset_ns + 120 * SECOND_NS),
        )
        return msgspec.structs.replace(envelope, **fields)

    def put(self, island: int, advert: IslandAdvert | None = None, **fields: Any) -> list[CoordinationMessage]:
        return self.say(island, AdvertPut(7, self.envelope(island, advert, **fields)))


@pytest.fixture
def desk(kit: Any) -> Desk:
    return Desk(kit)


# --- adverts --------------------------------------------------------------------------------------


def test_an_advert_is_taken_once_and_kept_by_signs_of_life(desk: Desk) -> None:
    first = desk.envelope(10)
    assert desk.say(10, AdvertPut(1, first)) == [AdvertTaken(1, 1)]
    assert desk.say(10, AdvertPut(2, first)) == [AdvertTaken(2, 1)]  # again: the first answer was lost
    for _ in range(10):
        desk.wait(5 * SECOND_NS)
        assert desk.say(10, AdvertKeep(3, 1)) == [AdvertTaken(3, 1)]
    assert len(desk.machine.book) == 1
    desk.wait(9 * SECOND_NS)
    assert len(desk.machine.book) == 0
    assert desk.say(10, AdvertKeep(4, 1)) == [AdvertTaken(4, 0)]  # "who are you?"


def test_an_expired_signature_is_not_kept_alive(desk: Desk) -> None:
    desk.put(10)
    for _ in range(30):
        desk.wait(5 * SECOND_NS)
        answer = desk.say(10, AdvertKeep(3, 1))
    assert answer == [AdvertTaken(3, 0)]


def test_what_is_not_the_islands_own_is_refused(desk: Desk) -> None:
    cases = {
        "wrong-issuer": desk.envelope(11),
        "signature": desk.envelope(10, signature=b"x" * 64),
        "unexpected": desk.envelope(10, kind="receipt"),
        "malformed": desk.envelope(10, body=b"nothing"),
        "twice": desk.envelope(10, desk.kit.advert("i", desk.kit.offer(), desk.kit.offer())),
        "digest": desk.envelope(10, desk.kit.advert("i", desk.kit.offer(digest="x" * 71))),
    }
    for name, envelope in cases.items():
        effects = desk.tell(Received(10, AdvertPut(1, envelope)))
        (answer,) = [e.message for e in effects if isinstance(e, Send)]
        assert isinstance(answer, Declined), name
        assert answer.code == "invalid"
        assert len(desk.events(effects, PeerMisbehaved)) == 1, name
    old = desk.envelope(10, expires_unix_ns=1)
    effects = desk.tell(Received(10, AdvertPut(1, old)))
    assert not desk.events(effects, PeerMisbehaved)  # a wrong clock is no crime
    assert len(desk.machine.book) == 0


def test_real_signatures(kit: Any) -> None:
    island, other = Signer(b"1" * 32), Signer(b"2" * 32)
    notary, expires = EnvelopeNotary(other), UnixNs(10**18)
    envelope = EnvelopeNotary(island).seal_advert(kit.advert("x"), sequence=3, expires_unix_ns=expires)
    stated = notary.open_advert_untrusted(envelope, UnixNs(0))
    assert (stated.peer, stated.sequence, stated.body) == (island.peer, 3, kit.advert("x"))
    assert notary.peer_of_untrusted(envelope.issuer) == island.peer
    for bad in (
        msgspec.structs.replace(envelope, body=envelope.body[:-1] + bytes([envelope.body[-1] ^ 1])),
        msgspec.structs.replace(envelope, issuer=other.public_key),
    ):
        with pytest.raises(ProtocolError) as caught:
            notary.open_advert_untrusted(bad, UnixNs(0))
        assert caught.value.fault is Fault.SIGNATURE
    with pytest.raises(ProtocolError):
        notary.peer_of_untrusted(b"short")


def test_a_full_book_keeps_those_that_are_there(kit: Any) -> None:
    desk = Desk(kit, CoordinatorPolicy(islands=5))
    for island in range(10, 15):
        assert isinstance(desk.put(island)[0], AdvertTaken)
    for newcomer in range(100, 1100):
        (answer,) = desk.put(newcomer)
        assert isinstance(answer, Declined)
        assert answer.code == "full"
    assert {island.peer for island in desk.machine.book} == set(range(10, 15))
    assert isinstance(desk.put(12)[0], AdvertTaken)
    desk.tell(PeerLost(10))
    assert isinstance(desk.put(100)[0], AdvertTaken)


def test_one_network_gets_its_share_only(kit: Any) -> None:
    desk = Desk(kit, CoordinatorPolicy(islands_per_group=3), group_of=lambda peer: peer // 100)
    taken = [isinstance(desk.put(peer)[0], AdvertTaken) for peer in range(100, 110)]
    assert sum(taken) == 3
    assert isinstance(desk.put(200)[0], AdvertTaken)
    desk.tell(PeerLost(101))
    assert isinstance(desk.put(105)[0], AdvertTaken)
    assert all(isinstance(desk.put(peer)[0], AdvertTaken) for peer in range(50, 60))  # 0: not limited


# --- floods ---------------------------------------------------------------------------------------


def test_a_flood_is_refused_then_ignored_and_reported_once(desk: Desk) -> None:
    answers, reports = 0, 0
    for call in range(5000):
        effects = desk.tell(Received(66, FindIslands(call, "m")))
        answers += sum(isinstance(e, Send) for e in effects)
        reports += len(desk.events(effects, PeerMisbehaved))
    policy = CoordinatorPolicy()
    assert answers <= 2 * policy.request_burst + 1
    assert reports == 1
    assert isinstance(desk.put(10)[0], AdvertTaken)  # others are served
    desk.wait(60 * SECOND_NS)
    assert isinstance(desk.say(66, FindIslands(1, "m"))[0], IslandsFound)  # and it is forgiven


@given(gaps=st.lists(st.integers(0, SECOND_NS), max_size=60))
def test_a_meter_admits_no_more_than_its_rate(gaps: list[int]) -> None:
    meter: RateMeter[int] = RateMeter(10, 5, 3)
    now, granted = Instant(0), 0
    for gap in gaps:
        now = after(now, gap)
        granted += meter.take(now, 1) is Allowance.GRANTED
    assert granted <= 5 + 10 * now // SECOND_NS + 1
    for peer in range(50):
        meter.take(now, peer)
    assert len(meter) == 3


def test_subscriptions_are_bounded_per_peer_and_in_total(kit: Any) -> None:
    policy = CoordinatorPolicy(follows=10, follows_per_peer=4, requests_per_s=10**6, request_burst=10**6)
    desk = Desk(kit, policy)
    cargos = ["sha256:" + f"{n:064x}" for n in range(20)]

    def served(peer: int) -> int:
        answers = [desk.say(peer, Follow(n, cargo, 8))[0] for n, cargo in enumerate(cargos)]
        assert all(isinstance(a, Following) or a.code == "full" for a in answers)  # type: ignore[union-attr]
        return sum(isinstance(a, Following) for a in answers)

    assert [served(peer) for peer in (50, 51, 52, 53)] == [4, 4, 2, 0]
    assert desk.machine.follows == 10
    desk.say(50, Unfollow(cargos[0]))
    desk.tell(PeerLost(51))
    assert desk.machine.follows == 5
    desk.wait(policy.follow_lease_ns + SECOND_NS)
    assert desk.machine.follows == 0
    assert isinstance(desk.say(50, Follow(1, "not a digest", 8))[0], Declined)


def test_a_follower_that_takes_nothing_costs_one_push_and_is_forgotten(kit: Any) -> None:
    desk = Desk(kit)
    for island in range(10, 30):
        desk.put(island)
    pushes = desk.say(50, Follow(1, kit.digest("c"), 8))[1:]
    pushes += [e.message for e in desk.wait(6 * SECOND_NS) if isinstance(e, Send) and e.peer == 50]
    assert all(push == pushes[0] for push in pushes)  # the same one, again and again
    for _ in range(4):
        for island in range(10, 30):
            desk.put(island)
        pushes += [e.message for e in desk.wait(2 * SECOND_NS) if isinstance(e, Send) and e.peer == 50]
    assert len(pushes) == CoordinatorPolicy().push_tries
    assert desk.machine.follows == 0


def test_a_follower_hears_of_as_many_as_it_wished_and_of_others_in_their_place(kit: Any) -> None:
    desk = Desk(kit)
    for island in range(10, 30):
        desk.put(island)
    effects = desk.tell(Received(50, Follow(1, kit.digest("c"), 8)))
    known: dict[bytes, int] = {}

    def take(effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, IslandsPushed):
                push = effect.message
                for key in push.lost:
                    known.pop(key, None)
                known.update({seen.envelope.issuer: 1 for seen in push.islands})
                take(desk.tell(Received(50, PushTaken(push.push, push.cargo))))

    take(effects)
    take(desk.wait(SECOND_NS))
    assert len(known) == 8
    for island in range(10, 20):
        desk.tell(PeerLost(island))
        take(desk.wait(SECOND_NS))
        for other in range(20, 30):
            desk.say(other, AdvertKeep(1, desk.machine.book.get(other).sequence))  # type: ignore[union-attr]
    assert len(known) == 8
    assert {int.from_bytes(key, "big") for key in known} <= set(range(20, 30))


def test_messages_stay_within_their_size_though_adverts_are_large(kit: Any) -> None:
    """Each advert takes some 100 KB: two fit into a message, all come in the end."""
    desk = Desk(kit, CoordinatorPolicy(request_burst=10**6))
    offers = [
        kit.offer(digest="sha256:" + f"{n:064x}", name="\N{SNOWMAN}" * 128, version="\N{SNOWMAN}" * 128)
        for n in range(63)
    ]
    for island in range(10, 18):
        desk.put(island, kit.advert("i", kit.offer(), *offers))
    (found,) = desk.say(50, FindIslands(1, kit.digest("c"), limit=MAX_ISLANDS_PER_MESSAGE))
    assert isinstance(found, IslandsFound)
    assert 1 <= len(found.islands) < 8
    assert found.known == 8
    effects, seen = desk.tell(Received(50, Follow(1, kit.digest("c"), 128))), set[bytes]()
    for _ in range(20):
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, IslandsPushed):
                seen |= {island.envelope.issuer for island in effect.message.islands}
                desk.say(50, PushTaken(effect.message.push, effect.message.cargo))
        effects = desk.wait(SECOND_NS // 2)
    assert len(seen) == 8


# --- questions ------------------------------------------------------------------------------------


def test_answers_are_in_order_and_filtered_by_what_was_asked(kit: Any) -> None:
    desk = Desk(kit, estimate=lambda one, other: abs(one - other) * MILLISECOND_NS)
    desk.put(10, kit.advert("a", kit.offer(output_ask_ucr=5000), country="FR", coordinate=50))
    desk.put(11, kit.advert("b", kit.offer(), country="CH", coordinate=500))
    desk.put(12, kit.advert("c", kit.offer(vram_mib=4000, decode_tps=20.0), country="GB", coordinate=60))
    desk.put(13, kit.advert("d", kit.offer(state="failed")))
    desk.put(14, kit.advert("e", kit.offer(), draining=True))

    def found(wanted: Wanted = ANY, limit: int = 16, cargo: str = "m@1") -> list[int]:
        (answer,) = desk.say(50, FindIslands(1, cargo, wanted, limit))
        assert isinstance(answer, IslandsFound)
        return [int.from_bytes(seen.envelope.issuer, "big") for seen in answer.islands]

    here = Wanted(10, 100, coordinate=55)
    assert found(here) == [10, 11, 12]
    assert found(here, limit=1) == [10]
    assert found(Wanted(10, 100, max_price_ucr=499, coordinate=55)) == [11, 12]
    assert found(Wanted(10, 100, jurisdictions=("EU", "UK"), coordinate=55)) == [10, 12]
    assert found(Wanted(gpu=True)) == [12]
    assert found(cargo=kit.digest("c")) == found(cargo="m")
    assert found(cargo="nobody") == []


def test_a_name_means_what_most_islands_have_ready(kit: Any) -> None:
    desk = Desk(kit)
    desk.put(10, kit.advert("liar", kit.offer(digest=kit.digest("e"))))
    desk.put(11)
    desk.put(12)
    (answer,) = desk.say(50, FindIslands(1, "m"))
    assert isinstance(answer, IslandsFound)
    assert {int.from_bytes(seen.envelope.issuer, "big") for seen in answer.islands} == {11, 12}


def test_round_trips_are_shown_the_smallest(kit: Any) -> None:
    desk = Desk(kit)
    desk.put(10)
    for rtt_ns in (9_000_000, 4_000_000, 7_000_000):
        desk.tell(Ordered(RoundTripSeen(10, rtt_ns)))
    (answer,) = desk.say(50, FindIslands(1, "m"))
    assert isinstance(answer, IslandsFound)
    assert answer.islands[0].rtt_ns == 4_000_000
    desk.tell(Ordered(RoundTripSeen(99, 1)))  # nobody's


# --- itself ---------------------------------------------------------------------------------------


def test_summaries_say_what_there_is_and_hush_when_nothing_changes(kit: Any) -> None:
    desk = Desk(kit)
    effects = desk.tell(Ordered(Serve(Identity("c", ("/ip4/1.2.3.4/tcp/5",), "eu-west", "FR", 9))))
    (made,) = desk.events(effects, SummaryMade)
    assert (made.summary.name, made.summary.islands, made.summary.cargos) == ("c", 0, ())
    assert not desk.events(desk.wait(25 * SECOND_NS), SummaryMade)
    assert len(desk.events(desk.wait(10 * SECOND_NS), SummaryMade)) == 1
    desk.put(10)
    (news,) = desk.events(desk.wait(10 * SECOND_NS), SummaryMade)[:1]
    assert [(c.name, c.islands, c.ready) for c in news.summary.cargos] == [("m", 1, 1)]
    assert PlainNotary(5).open_summary_untrusted(news.envelope, UnixNs(0)).body == news.summary


def test_others_are_remembered_within_bounds(kit: Any) -> None:
    desk = Desk(kit, CoordinatorPolicy(coordinators=5))
    for other in range(2, 40):
        their = Desk(kit)
        their.machine = Coordinator(other, PlainNotary(other), Dice(1), unix_offset_ns=kit.unix_offset_ns)
        their.put(10)
        (made,) = their.events(their.tell(Ordered(Serve(Identity()))), SummaryMade)
        desk.tell(Ordered(LearnCoordinator(made.envelope)))
        desk.tell(Ordered(LearnCoordinator(made.envelope)))
    desk.tell(Ordered(LearnCoordinator(msgspec.structs.replace(made.envelope, body=b"?"))))
    assert [known.peer for known in desk.machine.others] == [35, 36, 37, 38, 39]
    (answer,) = desk.say(50, FindIslands(1, "m"))
    assert isinstance(answer, IslandsFound)
    assert len(answer.coordinators) == 4
    desk.wait(100 * SECOND_NS)
    (answer,) = desk.say(50, FindIslands(1, "m"))
    assert isinstance(answer, IslandsFound)
    assert answer.coordinators == ()  # they have expired


def test_listings_of_coordinators_are_bounded_in_all() -> None:
    book: CoordinatorBook[int] = CoordinatorBook(100, listings=10)
    counts = tuple(CargoCount("sha256:" + f"{n:064x}", "m", "1", 1, 1) for n in range(4))
    for peer in range(5):
        summary = CoordinatorSummary("c", (), cargos=counts)
        envelope = PlainNotary(peer).seal_summary(summary, sequence=1, expires_unix_ns=UnixNs(10))
        stated = PlainNotary(0).open_summary_untrusted(envelope, UnixNs(0))
        assert book.admit(stated, envelope)
        assert not book.admit(stated, envelope)
    assert [known.peer for known in book] == [3, 4]
    assert [known.peer for known in book.having("m@1", UnixNs(0))] == [3, 4]
    assert [known.peer for known in book.having("m", UnixNs(11))] == []
    book.drop(3)
    book.drop(4)
    assert list(book.having(counts[0].digest, UnixNs(0))) == []


def test_work_becomes_statements(kit: Any) -> None:
    desk = Desk(kit, witness=KarmaWitness(1))
    desk.tell(Ordered(Serve(Identity())))
    desk.put(10)
    desk.tell(Ordered(WorkSeen(10, work_units=500)))
    desk.tell(Ordered(WorkSeen(10, failures=1, timeouts=2)))
    desk.tell(Ordered(RoundTripSeen(10, 4_000_001)))
    (due,) = desk.events(desk.wait(11 * SECOND_NS), StatementsDue)
    (statement,) = due.statements
    assert (statement.issuer, statement.subject, statement.min_rtt_us) == (1, 10, 4001)
    counters = statement.counters
    assert (counters.work_units, counters.failures, counters.timeouts) == (500, 1, 2)
    assert not desk.events(desk.wait(60 * SECOND_NS), StatementsDue)
    quiet = Desk(kit)
    quiet.tell(Ordered(WorkSeen(10, work_units=500)))  # nobody counts: nothing happens


def test_a_stopped_process_blames_nobody(desk: Desk) -> None:
    """It was frozen for a minute; the Islands' words wait in its sockets."""
    desk.put(10)
    desk.now = after(desk.now, 60 * SECOND_NS)
    desk.tell(Woken())
    assert len(desk.machine.book) == 1
    desk.say(10, AdvertKeep(1, 1))
    desk.wait(5 * SECOND_NS)
    assert len(desk.machine.book) == 1


# --- lying coordinators ---------------------------------------------------------------------------


def follower(kit: Any) -> Follower[int]:
    machine: Follower[int] = Follower(50, PlainNotary(50), Dice(50), unix_offset_ns=kit.unix_offset_ns)
    machine.receive(Instant(0), Ordered(following_events.FoundCoordinators((CoordinatorCandidate(1),))))
    return machine


def test_a_coordinator_that_forges_is_left_alone(kit: Any, desk: Desk) -> None:
    machine = follower(kit)
    machine.receive(Instant(0), Ordered(Want(kit.digest("c"))))
    good, forged = desk.envelope(10), desk.envelope(11, signature=b"x" * 64)
    push = IslandsPushed(1, kit.digest("c"), (SeenIsland(good), SeenIsland(forged)), ())
    effects = machine.receive(Instant(0), Received(1, push))
    lost = desk.events(effects, CoordinatorLost)
    assert [(e.peer, e.reason) for e in lost] == [(1, "lied")]
    effects = machine.receive(Instant(1), Ordered(Find(3, "m")))
    assert desk.events(effects, FoundIslands) == [FoundIslands(3, (), 0)]  # nobody else to ask


def test_a_coordinator_tells_of_no_more_than_it_was_asked(kit: Any, desk: Desk) -> None:
    machine = follower(kit)
    machine.receive(Instant(0), Ordered(Want(kit.digest("c"))))
    seen = 0
    for number in range(1, 8):
        shown = tuple(SeenIsland(desk.envelope(1000 * number + n)) for n in range(100))
        push = IslandsPushed(number, kit.digest("c"), shown, ())
        seen += len(desk.events(machine.receive(Instant(number), Received(1, push)), IslandSeen))
    assert seen == machine.followed.count(kit.digest("c")) == 128
    again = machine.receive(Instant(9), Received(1, IslandsPushed(3, kit.digest("c"), (), (), anew=True)))
    assert machine.followed.count(kit.digest("c")) == 128  # an old push, come late
    assert [e.message for e in again if isinstance(e, Send)] == [PushTaken(3, kit.digest("c"))]


# --- anything at all ------------------------------------------------------------------------------

numbers = st.integers(0, 40)
cargos = st.sampled_from(["sha256:" + "c" * 64, "sha256:" + "d" * 64, "m", "x"])


@st.composite
def messages(draw: st.DrawFn) -> CoordinationMessage:
    """Well-formed, mostly senseless."""
    kit_offer = {"digest": "sha256:" + draw(st.sampled_from("cd")) * 64, "name": "m", "version": "1"}

    def envelope() -> Any:
        issuer = draw(st.integers(0, 60))
        advert = IslandAdvert(
            name="x",
            cargos=(
                OfferedCargo(
                    **kit_offer,
                    runtime="r",
                    state=draw(st.sampled_from(["ready", "failed"])),
                    context_length=1,
                    slots=1,
                    active=0,
                    queued=0,
                    decode_tps=1.0,
                    prefill_tps=1.0,
                ),
            )
            * draw(st.integers(0, 2)),
        )
        made = PlainNotary(issuer).seal_advert(
            advert,
            sequence=draw(st.integers(-1, 1 << 62)),
            expires_unix_ns=UnixNs(draw(st.sampled_from([0, 1 << 62]))),
        )
        return draw(st.sampled_from([made, msgspec.structs.replace(made, body=b"\xc1", issuer=b"")]))

    def summary() -> Any:
        count = CargoCount(kit_offer["digest"], "m", "1", 3, 2)
        return PlainNotary(draw(numbers)).seal_summary(
            CoordinatorSummary("c", (), cargos=(count,) * draw(st.integers(0, 2))),
            sequence=draw(st.integers(0, 9)),
            expires_unix_ns=UnixNs(1 << 62),
        )

    def islands() -> Any:
        return tuple(SeenIsland(envelope(), draw(numbers)) for _ in range(draw(st.integers(0, 2))))

    call, cargo = draw(numbers), draw(cargos)
    kind = draw(st.integers(0, 11))
    match kind:
        case 0:
            return AdvertPut(call, envelope())
        case 1:
            return AdvertKeep(call, draw(st.integers(0, 1 << 62)))
        case 2:
            return AdvertTaken(call, draw(st.integers(0, (1 << 63) - 1)))
        case 3:
            return AdvertWithdrawn()
        case 4:
            return Declined(
                call, draw(st.sampled_from(["full", "too-fast", "?"])), draw(st.integers(0, 3_600_000))
            )
        case 5:
            return FindIslands(call, cargo, Wanted(max_price_ucr=draw(numbers)), draw(st.integers(1, 256)))
        case 6:
            return IslandsFound(call, islands(), draw(numbers), (summary(),) * draw(st.integers(0, 2)))
        case 7:
            return Follow(call, cargo, draw(st.integers(1, 256)), draw(numbers))
        case 8:
            return Following(call, cargo, 1000, 1)
        case 9:
            lost = (draw(st.sampled_from([b"", bytes(32), (10).to_bytes(32, "big")])),)
            return IslandsPushed(draw(numbers), cargo, islands(), lost, draw(st.booleans()))
        case 10:
            return PushTaken(call, cargo)
        case _:
            return Unfollow(cargo)


@settings(max_examples=80, deadline=None)
@given(
    story=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5), messages() | st.none(), st.integers(0, 8 * SECOND_NS)),
        max_size=40,
    )
)
def test_no_message_makes_a_machine_fail_or_loop(
    story: list[tuple[int, int, CoordinationMessage | None, int]],
) -> None:
    offset = 1_800_000_000 * SECOND_NS
    cargo = "sha256:" + "c" * 64
    candidates = tuple(CoordinatorCandidate(n, n * 10**6, n % 3) for n in range(6))
    advert = IslandAdvert(name="x", cargos=())

    def seal(said: IslandAdvert, sequence: int, expires: UnixNs) -> Any:
        return PlainNotary(9).seal_advert(said, sequence=sequence, expires_unix_ns=expires)

    machines: list[Any] = [
        Coordinator(90, PlainNotary(90), Dice(1), unix_offset_ns=offset, policy=CoordinatorPolicy(islands=3)),
        Affiliation(seal, Dice(2), unix_offset_ns=offset),
        Follower(91, PlainNotary(91), Dice(3), unix_offset_ns=offset),
    ]
    now = Instant(0)
    orders: list[Any] = [
        [Serve(Identity())],
        [affiliation.FoundCoordinators(candidates), affiliation.Advertise(advert)],
        [following_events.FoundCoordinators(candidates), Want(cargo), Find(1, "m"), Find(2, cargo)],
    ]
    for machine, commands in zip(machines, orders, strict=True):
        for command in commands:
            machine.receive(now, Ordered(command))
    for which, peer, message, wait in story:
        machine = machines[which]
        machine.receive(now, PeerLost(peer) if message is None else Received(peer, message))
        end = after(now, wait)
        steps = 0
        while (wake := machine.next_wake()) is not None and wake <= end:
            now = Instant(max(now, wake))
            machine.receive(now, Woken())
            steps += 1
            assert steps < 500
        now = end
    coordinator, _, gateway = machines
    assert len(coordinator.book) <= 3
    assert gateway.followed.count(cargo) <= 4 * 128
