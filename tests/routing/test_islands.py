"""The book's indices always say what its Islands say."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.adverts import IslandAdvert, OfferedCargo, ShardRange
from protocol.instants import SECOND_NS, Instant, after
from routing.islands import IslandBook, naming_of

DIGESTS = ["sha256:" + letter * 64 for letter in "abc"]
peers = st.integers(0, 6)
offers = st.builds(
    OfferedCargo,
    digest=st.sampled_from(DIGESTS),
    name=st.sampled_from(["m", "n"]),
    version=st.sampled_from(["1", "2"]),
    runtime=st.just("llmcpp"),
    state=st.sampled_from(["ready", "loading", "failed"]),
    context_length=st.sampled_from([1024, 4096]),
    slots=st.integers(0, 4),
    active=st.integers(0, 4),
    queued=st.integers(0, 2),
    decode_tps=st.sampled_from([0.0, 1.0, 5.0, 100.0]),
    prefill_tps=st.just(10.0),
    shard=st.sampled_from([None, None, ShardRange(0, 2, 4), ShardRange(0, 0, 4, room_mib=5)]),
)
cargos = st.lists(offers, max_size=3, unique_by=lambda offered: offered.digest).map(tuple)


class Book(RuleBasedStateMachine):
    """Against a plain dictionary of adverts."""

    def __init__(self) -> None:
        super().__init__()
        self.book: IslandBook[int] = IslandBook(capacity=5, ttl_ns=10 * SECOND_NS)
        self.now = Instant(0)
        self.sequence = 0

    @rule(peer=peers, cargos=cargos)
    def admit(self, peer: int, cargos: tuple[OfferedCargo, ...]) -> None:
        self.sequence += 1
        assert self.book.admit(self.now, peer, IslandAdvert(name="x", cargos=cargos), self.sequence)

    @rule(peer=peers)
    def lost(self, peer: int) -> None:
        self.book.lost(peer)

    @rule(peer=peers)
    def touch(self, peer: int) -> None:
        self.book.touch(self.now, peer)

    @rule(seconds=st.integers(0, 6))
    def wait(self, seconds: int) -> None:
        self.now = after(self.now, seconds * SECOND_NS)
        late = self.book.late(self.now)
        assert self.book.expire(self.now) == late

    @rule(peer=peers, cargo=st.sampled_from(DIGESTS), tps=st.floats(0, 100))
    def measure(self, peer: int, cargo: Any, tps: float) -> None:
        self.book.measured(peer, cargo, tps)
        self.book.measured_prefill(peer, cargo, tps)

    @precondition(lambda self: len(self.book) > 0)
    @rule()
    def next_expiry_is_of_the_first(self) -> None:
        heard = [island.heard for island in self.book]
        assert heard == sorted(heard)
        assert self.book.next_expiry() == after(heard[0], 10 * SECOND_NS)

    @invariant()
    def indices_agree_with_adverts(self) -> None:
        islands = list(self.book)
        assert len(islands) == len(self.book) <= 5
        assert self.book.remembered <= 10
        for digest in DIGESTS:
            here = {i.peer: i.cargo(digest) for i in islands if i.cargo(digest) is not None}  # type: ignore[arg-type]
            assert {i.peer: offered for i, offered in self.book.offers(digest)} == here
            shelf = self.book.shelves.get(digest)
            if not here:
                assert shelf is None
                continue
            assert shelf is not None
            good = [offered for offered in here.values() if offered is not None and offered.state != "failed"]
            whole = [offered for offered in good if offered.shard is None]
            ready = [offered for offered in whole if offered.state == "ready"]
            assert shelf.shards == sum(o is not None and o.shard is not None for o in here.values())
            assert shelf.usable == bool(good)
            assert (shelf.islands, shelf.ready) == (len(good), len(ready))
            assert shelf.decode_tps == max((o.decode_tps for o in whole), default=0.0)
            assert shelf.context_length == max((o.context_length for o in ready or good), default=0)
            assert sum(shelf.namings.values()) == len(good)
            assert set(shelf.namings) == {naming_of(o) for o in good}
        for name in ("m", "n", "m@1", "n@2", "nobody"):
            said = {
                offered.digest
                for island in islands
                for offered in island.advert.cargos
                if name in {offered.name, f"{offered.name}@{offered.version}"}
            }
            assert set(self.book.called(name)) == said
        assert self.book.called(DIGESTS[0]) == ((DIGESTS[0],) if DIGESTS[0] in self.book.shelves else ())


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
