"""The lookup as a state machine, without machines or messages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.lookup import MAX_BAD_REFERRALS, MAX_OPEN_FACTOR, WINDOW_FACTOR, Lookup
from protocol.dice import Dice

ME = 0


def keys_of(count: int, seed: int = 1) -> list[int]:
    dice = Dice(seed, 3)
    return [dice.u64() << 192 | dice.u64() << 128 | dice.u64() << 64 | dice.u64() for _ in range(count)]


class Net:
    """A static network: every node has k others in each bucket, or all that there are."""

    def __init__(self, nodes: int, *, seed: int, k: int) -> None:
        self.keys = keys_of(nodes, seed)
        self.k = k
        dice = Dice(seed, 4)
        self.known: list[list[int]] = []
        for node in range(nodes):
            buckets: dict[int, list[int]] = {}
            for other in range(nodes):
                if other != node:
                    buckets.setdefault((self.keys[node] ^ self.keys[other]).bit_length(), []).append(other)
            self.known.append([peer for bucket in buckets.values() for peer in dice.sample(bucket, k)])

    def answer(self, node: int, target: int) -> list[int]:
        return sorted(self.known[node], key=lambda n: self.keys[n] ^ target)[: self.k]

    def truth(self, target: int, without: Sequence[int] = ()) -> list[int]:
        live = [n for n in range(len(self.keys)) if n != ME and n not in without]
        return sorted(live, key=lambda n: self.keys[n] ^ target)[: self.k]


def drive(
    lookup: Lookup,
    net: Net,
    dice: Dice,
    *,
    alpha: int,
    dead: Sequence[int] = (),
    paths: int = 1,
    slow: bool = False,
) -> None:
    """Answers come in random order, the dead fail, some are slow first."""
    open_peers: list[int] = []
    late: set[int] = set()
    per_path = alpha if paths == 1 else max(1, alpha // paths)
    while True:
        while (peer := lookup.next_peer()) is not None:
            open_peers.append(peer)
        assert lookup.active_queries <= per_path * paths
        assert lookup.open_queries <= per_path * paths * MAX_OPEN_FACTOR
        if lookup.done:
            return
        assert open_peers, "nothing is asked, nothing is awaited, and it is not done"
        place = dice.below(len(open_peers))
        peer = open_peers[place]
        if slow and peer not in late and dice.below(4) == 0:
            late.add(peer)
            lookup.slow(peer)
            continue
        del open_peers[place]
        if peer in dead:
            lookup.failed(peer)
        else:
            lookup.answered(peer, net.answer(peer, lookup.target))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    alpha=st.integers(1, 5),
    paths=st.integers(1, 3),
    dead_share=st.integers(0, 40),
)
def test_a_lookup_ends_and_keeps_its_bounds(seed: int, alpha: int, paths: int, dead_share: int) -> None:
    k = 8
    net = Net(60, seed=seed, k=k)
    dice = Dice(seed, 5)
    dead = dice.sample(range(1, 60), 59 * dead_share // 100)
    target = keys_of(1, seed + 1)[0]
    lookup = Lookup(
        ME, target, net.answer(ME, target), net.keys, k=k, alpha=alpha, beta=3, paths=paths, max_queries=40
    )
    drive(lookup, net, dice, alpha=alpha, dead=dead, paths=paths, slow=True)
    assert lookup.queries <= 40
    found = lookup.closest()
    assert len(found) <= k
    assert found == sorted(found, key=lambda n: net.keys[n] ^ target)
    assert ME not in found
    assert not set(lookup.closest(answered_only=True)) & set(dead)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), beta=st.sampled_from([3, 8]))
def test_it_finds_the_k_closest_of_a_static_network(seed: int, beta: int) -> None:
    k = 8
    net = Net(80, seed=seed, k=k)
    target = keys_of(1, seed + 1)[0]
    lookup = Lookup(ME, target, net.answer(ME, target), net.keys, k=k, alpha=3, beta=beta)
    drive(lookup, net, Dice(seed, 5), alpha=3)
    truth = net.truth(target)
    if beta == k:
        assert lookup.closest(answered_only=True) == truth
    else:
        assert lookup.closest(count=beta) == truth[:beta]
        assert len(set(lookup.closest()) & set(truth)) >= k - 1


def test_hops_count_the_longest_chain_of_referrals() -> None:
    keys = [0, *[1 << (60 - i) for i in range(1, 6)]]
    lookup = Lookup(ME, 0, [1], keys, k=4, alpha=1, beta=1)
    for peer in range(1, 5):
        assert lookup.next_peer() == peer
        lookup.answered(peer, [peer + 1])
    assert lookup.next_peer() == 5
    lookup.answered(5, [])
    assert lookup.next_peer() is None
    assert lookup.done
    assert lookup.hop(5) == 5
    assert lookup.hops([1, 2]) == 2


def test_alpha_bounds_what_is_open_and_slow_peers_make_room() -> None:
    keys = [0, *range(100, 120)]
    lookup = Lookup(ME, 0, list(range(1, 21)), keys, k=20, alpha=3, beta=20)
    asked = [lookup.next_peer() for _ in range(4)]
    assert asked == [1, 2, 3, None]
    lookup.slow(1)
    assert lookup.next_peer() == 4
    assert lookup.next_peer() is None
    for peer in range(2, 9):
        lookup.slow(peer)
        lookup.next_peer()
    assert lookup.open_queries <= 3 * MAX_OPEN_FACTOR
    lookup.answered(1, [])  # late, but welcome
    assert 1 in lookup.closest(answered_only=True)


def test_answers_of_those_not_asked_or_heard_twice_change_nothing() -> None:
    keys = keys_of(10)
    lookup = Lookup(ME, 0, [1, 2], keys, k=4, alpha=1, beta=2)
    assert lookup.answered(7, [8, 9]) == []
    first = lookup.next_peer()
    assert first is not None
    assert lookup.answered(first, [5, 5, ME, 6]) == [0, 1, 3]
    assert lookup.answered(first, [8]) == []
    lookup.failed(first)
    lookup.slow(first)
    assert lookup.failures == 0
    assert 8 not in lookup.closest()


def test_a_liar_that_names_ever_closer_inventions_is_stopped() -> None:
    k = 20
    honest = 30
    keys = [*keys_of(honest), *[1 << 200 - i for i in range(150)]]
    lookup = Lookup(ME, 0, [1, 2, 3], keys, k=k, alpha=3, beta=3, max_queries=60)
    fresh = iter(range(honest, len(keys)))
    asked = 0
    liar = 1
    while (peer := lookup.next_peer()) is not None or not lookup.done:
        if peer is None:
            raise AssertionError("stuck")
        asked += 1
        if peer == liar:
            lookup.answered(peer, [next(fresh) for _ in range(k)])
        elif peer < honest:
            lookup.answered(peer, list(range(1, honest)))
        else:
            lookup.failed(peer)
        assert lookup.held() <= WINDOW_FACTOR * k + asked
    inventions = lookup.failures
    assert inventions <= MAX_BAD_REFERRALS + 3  # those open when the list was dropped
    assert lookup.closest()[0] == min(range(1, honest), key=lambda n: keys[n])


def test_liars_in_league_cost_a_bounded_number_of_queries() -> None:
    """Every peer answers and names twenty more, each closer than all before: without an end, were it not
    bounded.
    """
    keys = {ME: 0}
    made = [0]

    def invent() -> int:
        made[0] += 1
        keys[made[0]] = (1 << 250) - made[0]
        return made[0]

    lookup = Lookup(ME, 0, [invent() for _ in range(3)], keys, k=20, alpha=3, beta=3, max_queries=50)
    while (peer := lookup.next_peer()) is not None:
        lookup.answered(peer, [invent() for _ in range(1000)])
        assert lookup.held() <= WINDOW_FACTOR * 20 + 50
    assert lookup.done
    assert lookup.queries <= 50


def test_disjoint_paths_never_ask_a_peer_twice() -> None:
    net = Net(60, seed=5, k=8)
    lookup = Lookup(ME, 77 << 200, net.answer(ME, 77 << 200), net.keys, k=8, alpha=3, beta=3, paths=3)
    seen: list[int] = []
    while True:
        batch = []
        while (peer := lookup.next_peer()) is not None:
            batch.append(peer)
        if not batch:
            break
        seen += batch
        for peer in batch:
            lookup.answered(peer, net.answer(peer, lookup.target))
    assert lookup.done
    assert len(seen) == len(set(seen))
    assert lookup.closest()[0] == net.truth(lookup.target)[0]


@pytest.mark.parametrize("paths", [1, 3])
def test_a_liar_on_one_path_does_not_capture_the_others(paths: int) -> None:
    """A clique near the target answers and names only itself; it sits first in one path's seeds."""
    honest = keys_of(200, 9)
    target = 0
    clique = [1 << 225 | i for i in range(12)]
    keys = [*honest, *clique]
    members = list(range(200, 212))
    order = sorted(range(1, 200), key=lambda n: keys[n])
    lookup = Lookup(ME, target, [200, order[150], order[160]], keys, k=8, alpha=3, beta=3, paths=paths)
    while (peer := lookup.next_peer()) is not None:
        if peer >= 200:
            lookup.answered(peer, members)
        else:
            place = order.index(peer)
            lookup.answered(peer, order[place // 2 : place // 2 + 8])
    answered = lookup.closest(count=40, answered_only=True)
    reached = order[0] in answered
    assert reached == (paths == 3)


def test_no_seeds_end_at_once() -> None:
    lookup = Lookup(ME, 5, [], [1], k=3, alpha=2, beta=2)
    assert lookup.next_peer() is None
    assert lookup.done
    assert lookup.closest() == []


def test_near_peers_find_room_though_those_who_answered_are_far() -> None:
    """The window of candidates is full, and its farthest has answered: a nearer one still comes in."""
    keys = [1000 - i for i in range(100)]  # peer i lies at distance 1000 - i from 0
    lookup = Lookup(99, 0, [0], keys, k=2, alpha=1, beta=2)
    assert lookup.next_peer() == 0
    lookup.answered(0, [1, 2])
    for named in range(3, 60, 2):
        peer = lookup.next_peer()
        assert peer is not None
        lookup.answered(peer, [named, named + 1])
    assert lookup.closest()[0] >= 58
