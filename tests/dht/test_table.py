from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dht.candidates import Candidates
from dht.columns import Columns
from dht.coordinates import pack
from dht.policy import DhtPolicy
from dht.table import SUSPECT, TICK_BITS, VERIFIED, Failure, RoutingTable
from protocol.dice import Dice

MS = 1_000_000
ME = 0
OWN = pack(0, 0, 0, MS)


def at_ms(rtt_ms: float) -> int:
    """A coordinate that far from ours."""
    return pack((rtt_ms - 2) * MS, 0, 0, MS)


@dataclass
class Book:
    """Number 0 is us, with key 0: a peer's bucket is its key's leading zero bits."""

    keys: list[int] = field(default_factory=lambda: [0])
    groups: dict[int, int] = field(default_factory=dict[int, int])

    def group_of(self, peer: int) -> int:
        return self.groups.get(peer, 0)

    def in_bucket(self, bucket: int, group: int = 0) -> int:
        low = 255 - bucket
        number = len(self.keys)
        rest = Dice(number).u64() << 128 | number
        self.keys.append(1 << low | rest % (1 << low))
        self.groups[number] = group
        return number


def filled(book: Book, policy: DhtPolicy, far: int = 3) -> RoutingTable:
    """A table whose `far` first buckets are full at 100 ms each, and whose k neighbours are known."""
    table = RoutingTable(ME, book, policy)
    for bucket in range(far + 2):
        for _ in range(policy.k):
            assert table.answered(book.in_bucket(bucket), 1, 100_000, at_ms(100), OWN)
    assert table.is_far(0)
    return table


def rtts_ms(table: RoutingTable, bucket: int) -> list[int]:
    return [table.rtts_us[i] // 1000 for i in range(table.starts[bucket], table.starts[bucket + 1])]


def test_only_the_last_bucket_splits() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=4))
    for _ in range(40):
        table.answered(book.in_bucket(0), 1, 50_000, 0, OWN)
    assert len(table) == 4
    for bucket in range(1, 10):
        for _ in range(4):
            assert table.answered(book.in_bucket(bucket), 1, 50_000, 0, OWN)
    assert len(table) == 40
    assert table.buckets >= 9


@settings(max_examples=60, deadline=None)
@given(
    aware=st.booleans(),
    far=st.integers(0, 4),
    groups=st.booleans(),
    heard=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=60
    ),
)
def test_what_an_answer_names_is_heard_as_if_one_by_one(
    *, aware: bool, far: int, groups: bool, heard: list[tuple[int, int, int]]
) -> None:
    book = Book()
    policy = DhtPolicy(k=4, rtt_aware=aware, senior_entries=1, max_group_per_table=3)
    at_once, singly = RoutingTable(ME, book, policy), RoutingTable(ME, book, policy)
    for bucket in range(far + 1):
        for _ in range(5):
            peer = book.in_bucket(bucket)
            for table in (at_once, singly):
                table.answered(peer, 1, 200_000, at_ms(200), OWN)
    for answer in range(0, len(heard), 6):
        peers: list[int] = []
        coordinates: list[int] = []
        for bucket, ms, old in heard[answer : answer + 6]:
            known = len(book.keys)
            peers.append(old if 0 < old < known else book.in_bucket(bucket, group=bucket % 3 if groups else 0))
            coordinates.append(at_ms(ms) if ms > 2 else 0)
        del coordinates[4:]  # an answer may tell fewer coordinates than peers
        places = [place for place in range(len(peers)) if place != 1]
        at_once.hear(peers, coordinates, places, 2 + answer, OWN)
        for place in places:
            coordinate = coordinates[place] if place < len(coordinates) else 0
            singly.heard_of(peers[place], 2 + answer, coordinate, OWN, self_said=False)
        assert list(at_once) == list(singly)
        assert at_once.starts == singly.starts
        assert at_once.groups == singly.groups
        assert at_once.references() == singly.references()


def test_hearsay_never_splits_and_is_never_told() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=4))
    for bucket in range(8):
        for _ in range(8):
            table.heard_of(book.in_bucket(bucket), 1, 0, OWN, self_said=False)
    assert table.buckets == 1
    assert len(table) == 4
    assert table.closest(0, 20, told=True) == []
    assert len(table.closest(0, 20)) == 4


def test_who_speaks_to_us_may_be_told_but_yields_to_who_answered() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=4))
    for _ in range(4):
        table.heard_of(book.in_bucket(0), 1, 0, OWN, self_said=True)
    assert len(table.closest(0, 20, told=True)) == 4
    proven = [book.in_bucket(0) for _ in range(4)]
    for peer in proven:
        assert table.answered(peer, 1, 1000, 0, OWN)
    assert sorted(table.peers) == proven


def test_a_nearer_peer_takes_the_farthest_place_of_a_far_bucket() -> None:
    book = Book()
    policy = DhtPolicy(k=8, senior_entries=2)
    table = filled(book, policy)
    slowest = table.peers[table.starts[0] + 5]
    table.rtts_us[table.find(slowest)] = 300_000
    newcomer = book.in_bucket(0)
    assert table.answered(newcomer, 9, 20_000, at_ms(20), OWN)
    assert table.find(slowest) == -1
    assert table.find(newcomer) >= 0


def test_without_rtt_awareness_the_old_stay() -> None:
    book = Book()
    table = filled(book, DhtPolicy(k=8, rtt_aware=False))
    before = list(table.peers)
    assert not table.answered(book.in_bucket(0), 9, 1000, at_ms(1), OWN)
    assert list(table.peers) == before


def test_a_newcomer_that_is_hardly_nearer_changes_nothing() -> None:
    book = Book()
    table = filled(book, DhtPolicy(k=8))
    assert not table.answered(book.in_bucket(0), 9, 90_000, at_ms(90), OWN)


def test_seniors_do_not_yield_to_a_crowd_of_near_peers() -> None:
    """Whoever rents machines beside us takes at most k - senior_entries places of a bucket."""
    book = Book()
    policy = DhtPolicy(k=8, senior_entries=3)
    table = RoutingTable(ME, book, policy)
    old = [book.in_bucket(0) for _ in range(3)]
    for peer in old:
        table.answered(peer, 1, 250_000, at_ms(250), OWN)
    for bucket in [*[0] * 5, *[1] * 8, *[2] * 8]:
        table.answered(book.in_bucket(bucket), 2, 100_000, at_ms(100), OWN)
    for i in range(200):
        table.answered(book.in_bucket(0), 10 + i, 1000, at_ms(2), OWN)
    assert all(table.find(peer) >= 0 for peer in old)
    assert sorted(rtts_ms(table, 0)) == [1] * 5 + [250] * 3


def test_the_own_neighbourhood_prefers_closer_keys_to_near_peers() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=4))
    for bucket in (0, 0, 0, 0, 9, 9, 9, 9):
        table.answered(book.in_bucket(bucket), 1, 200_000, at_ms(200), OWN)
    # Bucket 1 is empty so far; what stands in the last bucket is our k closest.
    neighbours = [book.in_bucket(3) for _ in range(4)]
    for peer in neighbours:
        assert table.answered(peer, 1, 200_000, at_ms(200), OWN)
    closest = sorted(range(1, len(book.keys)), key=lambda n: book.keys[n])[:4]
    for _ in range(50):
        table.answered(book.in_bucket(3), 2, 1000, at_ms(2), OWN)
        table.answered(book.in_bucket(9), 2, 150_000, at_ms(150), OWN)
        known = sorted(range(1, len(book.keys)), key=lambda n: book.keys[n])[:4]
        assert [table.peers[i] for i in table.closest(0, 4)] == known
    assert closest != known


def test_few_of_one_network_per_bucket_and_table() -> None:
    book = Book()
    policy = DhtPolicy(k=8, max_group_per_bucket=2, max_group_per_table=5)
    table = filled(book, policy, far=6)
    for i in range(60):
        table.answered(book.in_bucket(i % 6, group=7), 5 + i, 1000, at_ms(2), OWN)
    members = [p for p in table.peers if book.groups[p] == 7]
    assert 2 <= len(members) <= 5
    for bucket in range(6):
        inside = table.peers[table.starts[bucket] : table.starts[bucket + 1]]
        assert sum(book.groups[p] == 7 for p in inside) <= 2


def test_two_failures_end_an_entry_one_success_clears_it() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=4))
    peer = book.in_bucket(0)
    table.answered(peer, 1, 1000, 0, OWN)
    assert table.failed(peer) == (Failure.SUSPECTED, -1)
    assert table.closest(0, 4) == []
    table.answered(peer, 2, 1000, 0, OWN)
    assert len(table.closest(0, 4)) == 1
    table.failed(peer)
    assert table.failed(peer) == (Failure.LOST, 0)
    assert len(table) == 0
    table.heard_of(peer, 3, 0, OWN, self_said=False)
    assert table.failed(peer) == (Failure.NEVER_LIVED, 0)
    assert table.failed(peer) == (Failure.NO_ENTRY, -1)


def test_a_promising_candidate_is_one_that_would_take_a_place() -> None:
    book = Book()
    table = filled(book, DhtPolicy(k=8))
    far, near = book.in_bucket(0), book.in_bucket(0)
    table.heard_of(far, 2, at_ms(99), OWN, self_said=False)
    assert table.promising(OWN) is None
    table.heard_of(near, 2, at_ms(30), OWN, self_said=False)
    assert table.promising(OWN) == near
    assert table.promising(OWN) is None


def test_round_trips_follow_lower_samples_fast_and_spikes_slowly() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy())
    peer = book.in_bucket(0)
    table.answered(peer, 1, 100_000, 0, OWN)
    place = table.find(peer)
    table.measured(place, 900_000)
    assert table.rtts_us[place] <= 200_000
    for _ in range(3):
        table.measured(place, 20_000)
    assert table.rtts_us[place] < 30_000


def test_a_table_is_small() -> None:
    """What 100,000 nodes have: 13 full buckets. The simulator holds a million of these."""
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy())
    for bucket in range(14):
        for _ in range(20):
            table.answered(book.in_bucket(bucket), 1, 50_000, at_ms(50), OWN)
        for _ in range(8):
            table.heard_of(book.in_bucket(bucket), 1, at_ms(5), OWN, self_said=False)
    assert len(table) == 280
    columns = [getattr(table, name) for name in (*Columns.__slots__, *RoutingTable.__slots__)]
    columns += [getattr(table._candidates, name) for name in Candidates.__slots__]
    size = sum(c.__sizeof__() for c in columns if isinstance(c, array | bytearray))
    assert size <= 10 * 1024


@pytest.mark.parametrize("told", [False, True])
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_closest_is_the_sorted_truth(*, told: bool, seed: int, count: int) -> None:
    dice = Dice(seed)
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy(k=5))
    for _ in range(150):
        peer = book.in_bucket(dice.below(12))
        if dice.below(3):
            table.answered(peer, 1, 1000, 0, OWN)
        else:
            table.heard_of(peer, 1, 0, OWN, self_said=False)
        if dice.below(5) == 0:
            table.failed(peer)
    target = dice.u64() << 192 >> dice.below(14)
    found = [table.peers[i] for i in table.closest(target, count, told=told)]
    eligible = [
        p
        for p, f in zip(table.peers, table.flags, strict=True)
        if not f & SUSPECT and (f & VERIFIED or not told)
    ]
    assert found == sorted(eligible, key=lambda p: book.keys[p] ^ target)[:count]


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, the arrays stay parallel, every entry stands in its bucket, once, and bounds hold."""

    @initialize(k=st.integers(2, 6), aware=st.booleans())
    def begin(self, *, k: int, aware: bool) -> None:
        self.book = Book()
        self.policy = DhtPolicy(k=k, rtt_aware=aware, senior_entries=1, max_group_per_table=4)
        self.table = RoutingTable(ME, self.book, self.policy)
        self.tick = 1

    def peer(self, number: int, bucket: int) -> int:
        if number >= len(self.book.keys) or number == ME:
            return self.book.in_bucket(bucket, group=bucket % 3)
        return number

    @rule(number=st.integers(0, 60), bucket=st.integers(0, 9), rtt=st.integers(0, 500_000))
    def answers(self, number: int, bucket: int, rtt: int) -> None:
        self.tick += 1
        peer = self.peer(number, bucket)
        taken = self.table.answered(peer, self.tick, rtt, at_ms(max(rtt / 1000, 2)), OWN)
        assert taken == (self.table.find(peer) >= 0)

    @rule(number=st.integers(0, 60), bucket=st.integers(0, 9), said=st.booleans(), ms=st.integers(2, 400))
    def heard(self, *, number: int, bucket: int, said: bool, ms: int) -> None:
        self.table.heard_of(self.peer(number, bucket), self.tick, at_ms(ms), OWN, self_said=said)

    @rule(number=st.integers(0, 60), bucket=st.integers(0, 9))
    def fails(self, number: int, bucket: int) -> None:
        self.table.failed(self.peer(number, bucket))

    @rule(number=st.integers(0, 60), bucket=st.integers(0, 9))
    def leaves(self, number: int, bucket: int) -> None:
        peer = self.peer(number, bucket)
        self.table.remove(peer)
        assert self.table.find(peer) == -1

    @rule()
    def candidates(self) -> None:
        peer = self.table.promising(OWN)
        assert peer is None or self.table.find(peer) == -1
        for bucket in range(self.table.buckets):
            taken = self.table.take_candidate(bucket)
            assert taken is None or self.table.find(taken[0]) == -1

    @invariant()
    def holds(self) -> None:
        table = self.table
        sizes = {
            len(c)
            for c in (table.peers, table.coordinates, table.rtts_us, table.checked, table.since, table.groups)
        }
        assert sizes == {len(table)}
        assert len(table.flags) == len(table)
        assert table.starts[0] == 0
        assert table.starts[-1] == len(table)
        assert len(set(table.peers)) == len(table)
        assert ME not in table.peers
        for bucket in range(table.buckets):
            start, end = table.starts[bucket], table.starts[bucket + 1]
            assert 0 <= end - start <= self.policy.k
            assert all(table.bucket_of(self.book.keys[p]) == bucket for p in table.peers[start:end])
            if bucket < table.buckets - 1:
                groups = [g for g in table.groups[start:end] if g]
                assert all(groups.count(g) <= self.policy.max_group_per_bucket for g in groups)
        assert all(table.groups.count(g) <= 4 for g in set(table.groups) if g)


AnyHistory.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestAnyHistory = AnyHistory.TestCase


def test_entries_can_be_read() -> None:
    book = Book()
    table = RoutingTable(ME, book, DhtPolicy())
    peer = book.in_bucket(0)
    table.answered(peer, 5, 12_000, at_ms(12), OWN)
    (entry,) = table
    assert (entry.peer, entry.rtt_ns, entry.verified, entry.suspect) == (peer, 12 * MS, True, False)
    assert entry.heard == 5 << TICK_BITS


def test_keys_share_bits(key: Callable[[str], int]) -> None:
    table = RoutingTable(ME, Book([key("me")]), DhtPolicy())
    assert table.bucket_of(key("me") ^ 1 << 255) == 0
