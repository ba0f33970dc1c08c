"""The book of Islands and the order in which jobs are offered to them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.adverts import ADVERT_TTL_NS, IslandAdvert, OfferedCargo, ShardRange
from protocol.ids import CargoDigest
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling, TextPrompt, TokenPrompt
from routing.islands import SUSPICION_NS, IslandBook
from routing.placement import JobShape, most_prompt_tokens, rank, shape_of

CARGO = CargoDigest("sha256:" + "c" * 64)
OTHER = CargoDigest("sha256:" + "d" * 64)
NOW = Instant(100 * SECOND_NS)
JOB = JobShape(CARGO, prompt_tokens=100, output_tokens=100)


def offered(**changes: object) -> OfferedCargo:
    fields: dict[str, object] = {
        "digest": CARGO,
        "name": "m",
        "version": "1",
        "runtime": "llmcpp",
        "state": "ready",
        "context_length": 2048,
        "slots": 4,
        "active": 0,
        "queued": 0,
        "decode_tps": 100.0,
        "prefill_tps": 500.0,
    }
    return OfferedCargo(**{**fields, **changes})  # type: ignore[arg-type]


def advert(name: str = "x", *, draining: bool = False, **changes: object) -> IslandAdvert:
    return IslandAdvert(name=name, cargos=(offered(**changes),), draining=draining)


def book_of(**islands: IslandAdvert) -> IslandBook[str]:
    book: IslandBook[str] = IslandBook()
    for peer, said in islands.items():
        book.admit(NOW, peer, said, 1)
    return book


def order(book: IslandBook[str], rtt_ms: dict[str, float] | None = None, job: JobShape = JOB) -> list[str]:
    def rtt_of(peer: str) -> int | None:
        return round((rtt_ms or {}).get(peer, 1.0) * MILLISECOND_NS)

    return [candidate.peer for candidate in rank(NOW, book, job, rtt_of)]


def test_the_nearest_of_equals_comes_first() -> None:
    book = book_of(a=advert(), b=advert(), c=advert())
    assert order(book, {"a": 80, "b": 2, "c": 30}) == ["b", "c", "a"]


def test_speed_can_outweigh_distance() -> None:
    book = book_of(near=advert(decode_tps=10.0), far=advert(decode_tps=200.0))
    assert order(book, {"near": 1, "far": 150}) == ["far", "near"]


def test_a_short_job_prefers_the_near_one() -> None:
    book = book_of(near=advert(decode_tps=50.0), far=advert(decode_tps=60.0))
    assert order(book, {"near": 1, "far": 150}, JobShape(CARGO, 1, 5)) == ["near", "far"]


def test_load_sends_the_next_job_elsewhere() -> None:
    book = book_of(a=advert(), b=advert())
    assert order(book, {"a": 1, "b": 2}) == ["a", "b"]
    book.reserve("a")
    assert order(book, {"a": 1, "b": 2}) == ["b", "a"]
    book.release("a")
    assert order(book, {"a": 1, "b": 2}) == ["a", "b"]


def test_a_queue_costs_its_rounds() -> None:
    book = book_of(full=advert(active=4, queued=4), free=advert(decode_tps=30.0))
    ranked = rank(NOW, book, JOB, lambda _: 0)
    assert [candidate.peer for candidate in ranked] == ["free", "full"]
    assert ranked[0].queue_ns == 0
    assert ranked[1].queue_ns == 2 * 4 * SECOND_NS  # two rounds of 100 tokens at 100/4 tokens/s


def test_who_does_not_qualify() -> None:
    book = book_of(
        other=advert(digest=OTHER),
        failed=advert(state="failed"),
        leaving=advert(draining=True),
        small=advert(context_length=40),
        good=advert(),
        loading=advert(state="loading"),
    )
    assert order(book) == ["good", "loading", "small"]  # what looks too small is asked last
    ranked = rank(NOW, book, JOB, lambda _: 0, excluded={"good"})
    assert [candidate.peer for candidate in ranked] == ["loading", "small"]


def test_who_has_only_a_part_or_room_for_one_does_not_run_the_whole() -> None:
    book = book_of(
        part=advert(shard=ShardRange(0, 5, 10), decode_tps=1000.0),
        room=advert(shard=ShardRange(0, 0, 10, room_mib=100), decode_tps=1000.0),
        whole=advert(decode_tps=1.0),
    )
    assert order(book) == ["whole"]


def test_a_suspect_is_last_and_forgiven() -> None:
    book = book_of(a=advert(), b=advert(decode_tps=1.0))
    book.suspect(NOW, "a")
    assert order(book) == ["b", "a"]
    later = Instant(NOW + SUSPICION_NS + 1)
    assert [c.peer for c in rank(later, book, JOB, lambda _: 0)] == ["a", "b"]


def test_a_claim_is_corrected_by_what_was_measured() -> None:
    book = book_of(boaster=advert(decode_tps=1000.0), honest=advert(decode_tps=90.0))
    assert order(book) == ["boaster", "honest"]
    book.measured("boaster", CARGO, 10.0)
    assert order(book) == ["honest", "boaster"]


def test_adverts_expire_and_stale_ones_are_dropped() -> None:
    book = book_of(a=advert("old"))
    assert not book.admit(NOW, "a", advert("replayed"), 1)
    assert book.admit(Instant(NOW + SECOND_NS), "a", advert("new"), 2)
    assert book.next_expiry() == NOW + SECOND_NS + ADVERT_TTL_NS
    assert book.expire(Instant(NOW + SECOND_NS + ADVERT_TTL_NS)) == []
    assert book.expire(Instant(NOW + SECOND_NS + ADVERT_TTL_NS + 1)) == ["a"]
    assert len(book) == 0
    assert not book.lost("a")


def test_the_book_is_bounded_and_forgets_the_longest_unheard() -> None:
    book: IslandBook[int] = IslandBook(capacity=3)
    for peer in range(5):
        book.admit(Instant(NOW + peer), peer, advert(), 1)
    assert [island.peer for island in book] == [2, 3, 4]


def test_shapes_of_prompts() -> None:
    sampling = Sampling(seed=0)
    chat = Generation(ChatPrompt((ChatMessage("user", "x" * 400),)), sampling, max_tokens=50)
    assert shape_of(CARGO, chat).output_tokens == 50
    assert 100 <= shape_of(CARGO, chat).prompt_tokens <= 110
    assert shape_of(CARGO, chat, done=20).output_tokens == 30
    assert shape_of(CARGO, Generation(TextPrompt("x" * 400), sampling)).prompt_tokens == 101
    assert shape_of(CARGO, Generation(TokenPrompt((1, 2, 3)), sampling)).prompt_tokens == 4


rates = st.floats(1, 1e4)


@given(decode=rates, prefill=rates, rtt=st.integers(0, 10**9), factor=st.floats(1.01, 10))
def test_faster_or_nearer_is_never_placed_later(decode: float, prefill: float, rtt: int, factor: float) -> None:
    def time_of(said: IslandAdvert, rtt_ns: int) -> int:
        return rank(NOW, book_of(a=said), JOB, lambda _: rtt_ns)[0].expected_ns

    base = time_of(advert(decode_tps=decode, prefill_tps=prefill), rtt)
    assert time_of(advert(decode_tps=decode * factor, prefill_tps=prefill), rtt) <= base
    assert time_of(advert(decode_tps=decode, prefill_tps=prefill * factor), rtt) <= base
    assert time_of(advert(decode_tps=decode, prefill_tps=prefill), rtt + 1) > base
    assert time_of(advert(decode_tps=decode, prefill_tps=prefill, active=2), rtt) > base


def test_absurd_claims_are_ranked_not_fatal() -> None:
    """The smallest float in an advert would make a wait that no integer can be rounded from."""
    for rates in (
        {"decode_tps": 5e-324},
        {"prefill_tps": 5e-324},
        {"decode_tps": 1e-300, "prefill_tps": 1e-300},
    ):
        for load in ({}, {"active": 1_000_000, "queued": 1_000_000}, {"slots": 0}, {"slots": 1_000_000}):
            book = book_of(absurd=advert(**rates, **load), good=advert())
            assert order(book) == ["good", "absurd"]


def test_suspicion_and_speed_outlive_a_reconnect() -> None:
    """An Island that dies with a job would else come back as an innocent one, and be asked first again."""
    book = book_of(a=advert(), b=advert(decode_tps=1.0))
    book.measured("a", CARGO, 50.0)
    book.lost("a")
    book.suspect(NOW, "a")  # the job's failure may be noticed after the connection's
    book.admit(NOW, "a", advert(), 1)
    assert order(book) == ["b", "a"]
    found = book.get("a")
    assert found is not None
    assert found.experience.decode_tps == {CARGO: 50.0}
    late = Instant(NOW + ADVERT_TTL_NS + 1)
    assert book.expire(late) == ["b", "a"]
    book.admit(late, "a", advert(), 2)
    again = book.get("a")
    assert again is not None
    assert again.experience.decode_tps == {CARGO: 50.0}


def test_reservations_survive_the_advert() -> None:
    book = book_of(a=advert(), b=advert())
    book.reserve("a")
    book.reserve("a")
    book.lost("a")
    book.release("a")
    book.admit(NOW, "a", advert(), 1)
    island = book.get("a")
    assert island is not None
    assert island.experience.reserved == 1


def test_experience_is_bounded() -> None:
    book: IslandBook[int] = IslandBook(capacity=3)
    for peer in range(50):
        book.suspect(NOW, peer)
    assert book.remembered == 3
    for peer in range(3):
        book.admit(NOW, peer, advert(), 1)
        book.suspect(NOW, peer)
    for peer in range(100, 150):
        book.suspect(NOW, peer)
    assert book.remembered <= 6
    known = book.get(0)
    assert known is not None
    assert known.experience.suspect_until > NOW  # strangers push out strangers, not those who are here


def test_most_tokens_that_a_prompt_can_have() -> None:
    sampling = Sampling(seed=0)
    assert most_prompt_tokens(Generation(TokenPrompt((1, 2, 3)), sampling)) < 20
    assert 400 <= most_prompt_tokens(Generation(TextPrompt("x" * 400), sampling)) < 500
    chat = most_prompt_tokens(Generation(ChatPrompt((ChatMessage("user", "\u00fc" * 400),)), sampling))
    assert 800 <= chat < 10_000
