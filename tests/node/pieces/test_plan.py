"""The plan of a fetch: what must hold whatever peers do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cargos.shards.pieces_plan import TICK_NS, PiecesPlan, PiecesPolicy
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant

SIZE = 1 << 20
POLICY = PiecesPolicy(max_open_per_peer=4, max_open=10)


@dataclass
class Peer:
    """`pace_ns`: for one piece; 0: never answers. `fault`: what it does to its n-th piece."""

    held: frozenset[int]
    pace_ns: int
    fault: str = ""
    at: int = 0
    queue: list[int] = field(default_factory=list[int])
    next_at: int = 0
    served: int = 0


class World:
    """Peers with faults, and a check of each decision."""

    def __init__(self, wanted: int, peers: dict[int, Peer]) -> None:
        self.now = Instant(0)
        self.peers = peers
        self.plan = PiecesPlan[int](dict.fromkeys(range(wanted), SIZE), POLICY, seed=1)
        self.verified: list[int] = []
        self.dead: set[int] = set()
        self.liars: set[int] = set()
        for name, peer in peers.items():
            self.plan.add_peer(self.now, name, peer.held)

    def decide(self) -> None:
        decision = self.plan.decide(self.now)
        for name, piece in decision.cancel:
            if piece in self.peers[name].queue:
                self.peers[name].queue.remove(piece)
        for name in decision.stalled:
            self.dead.add(name)
            self.peers[name].queue.clear()
        for name, piece in decision.ask:
            peer = self.peers[name]
            assert name not in self.dead
            assert name not in self.liars
            assert piece in peer.held, "asked for what it has not"
            assert piece not in self.verified
            assert piece not in peer.queue
            if not peer.queue:
                peer.next_at = self.now + peer.pace_ns
            peer.queue.append(piece)
        for name, peer in self.peers.items():
            assert len(peer.queue) <= POLICY.max_open_per_peer
            assert self.plan.open_at(name) == len(peer.queue)
        assert sum(len(peer.queue) for peer in self.peers.values()) <= POLICY.max_open
        copies = Counter(piece for peer in self.peers.values() for piece in peer.queue)
        assert all(count <= POLICY.max_copies for count in copies.values())

    def step(self) -> None:
        self.now = Instant(self.now + TICK_NS)
        for name, peer in self.peers.items():
            while peer.queue and peer.pace_ns and peer.next_at <= self.now and name not in self.dead:
                piece = peer.queue.pop(0)
                peer.next_at += peer.pace_ns
                peer.served += 1
                fault = peer.fault if peer.served == peer.at else ""
                if fault == "die":
                    self.dead.add(name)
                    peer.queue.clear()
                    self.plan.lost(name)
                elif fault == "refuse":
                    peer.held -= {piece}
                    self.plan.refused(self.now, name, piece, busy=False)
                elif fault == "busy":
                    self.plan.refused(self.now, name, piece, busy=True)
                elif self.plan.arrived(self.now, name, piece):
                    if fault == "lie":
                        self.liars.add(name)
                        peer.queue.clear()
                        self.plan.wrong(name, piece)
                    else:
                        self.plan.verified(piece)
                        self.verified.append(piece)
                self.decide()
        self.decide()


faulty = st.builds(
    Peer,
    held=st.frozensets(st.integers(0, 19)),
    pace_ns=st.sampled_from([0, 10 * MILLISECOND_NS, 300 * MILLISECOND_NS, 5 * SECOND_NS]),
    fault=st.sampled_from(["", "die", "lie", "refuse", "busy"]),
    at=st.integers(1, 4),
)


@settings(max_examples=150, deadline=None)
@given(peers=st.lists(faulty, max_size=5), wanted=st.integers(0, 20))
def test_one_good_peer_is_enough_whatever_others_do(peers: list[Peer], wanted: int) -> None:
    good = Peer(frozenset(range(wanted)), 100 * MILLISECOND_NS)
    world = World(wanted, {**dict(enumerate(peers)), 99: good})
    world.decide()
    for _ in range(4 * 60):  # a minute; the good peer alone needs two seconds
        if world.plan.complete:
            break
        world.step()
    assert world.plan.complete
    assert sorted(world.verified) == list(range(wanted))
    assert set(world.plan.banned) == world.liars


@settings(max_examples=100, deadline=None)
@given(peers=st.lists(faulty, min_size=1, max_size=5))
def test_what_nobody_has_is_named_and_all_else_comes_from_whoever_lives(peers: list[Peer]) -> None:
    world = World(20, dict(enumerate(peers)))
    world.decide()
    for _ in range(4 * 200):
        world.step()
    alive = [p for n, p in world.peers.items() if n not in world.dead and n not in world.liars and p.pace_ns]
    held = frozenset[int]().union(*(peer.held for peer in alive))
    assert held <= set(world.verified)
    assert set(world.plan.left) == set(range(20)) - set(world.verified)
    for peer in world.peers.values():
        assert not peer.queue or not peer.pace_ns


def test_the_rarest_piece_is_asked_for_first() -> None:
    plan = PiecesPlan[str](dict.fromkeys(range(8), SIZE), PiecesPolicy(first_open=1))
    plan.add_peer(Instant(0), "a", range(8))
    plan.add_peer(Instant(0), "b", range(8))
    plan.add_peer(Instant(0), "c", range(7))
    assert plan.decide(Instant(0)).ask[0].piece == 7


def test_seeds_spread_those_who_fetch_together() -> None:
    firsts = set[int]()
    for seed in range(20):
        plan = PiecesPlan[str](dict.fromkeys(range(100), SIZE), seed=seed)
        plan.add_peer(Instant(0), "a", range(100))
        firsts.add(plan.decide(Instant(0)).ask[0].piece)
    assert len(firsts) > 10


def test_slow_peers_get_less() -> None:
    fast, slow = Peer(frozenset(range(100)), 50 * MILLISECOND_NS), Peer(frozenset(range(100)), 3 * SECOND_NS)
    world = World(100, {1: fast, 2: slow})
    world.decide()
    for _ in range(4 * 8):
        world.step()
    assert fast.served > 10 * slow.served > 0
    assert world.plan.rate(1) > 10 * world.plan.rate(2)
    assert world.plan.open_at(2) <= 1


def test_the_end_does_not_wait_for_the_slowest_and_cancels_what_it_need_not_send() -> None:
    fast, slow = Peer(frozenset(range(6)), 50 * MILLISECOND_NS), Peer(frozenset(range(6)), 9 * SECOND_NS)
    world = World(6, {1: slow, 2: fast})
    world.decide()
    assert slow.queue
    for _ in range(4 * 5):
        world.step()
    assert world.plan.complete
    assert slow.served == 0
    assert not slow.queue, "told that its pieces are not wanted any more"


def test_a_busy_peer_is_left_alone_for_longer_and_longer() -> None:
    plan = PiecesPlan[str]({0: SIZE}, POLICY)
    plan.add_peer(Instant(0), "a", [0])
    asked: list[int] = []
    for tick in range(4 * 40):
        now = Instant(tick * TICK_NS)
        for peer, piece in plan.decide(now).ask:
            asked.append(now // SECOND_NS)
            plan.refused(now, peer, piece, busy=True)
    assert asked == [0, 1, 3, 7, 15, 31]


def test_a_liar_is_not_taken_back() -> None:
    plan = PiecesPlan[str]({0: SIZE}, POLICY)
    plan.add_peer(Instant(0), "a", [0])
    assert plan.decide(Instant(0)).ask
    assert plan.arrived(Instant(1), "a", 0)
    plan.wrong("a", 0)
    plan.add_peer(Instant(2), "a", [0])
    assert not plan.decide(Instant(3)).ask
    assert plan.missing() == {0}
    plan.add_peer(Instant(4), "b", [0])
    assert plan.decide(Instant(5)).ask == [("b", 0)]


def test_what_was_not_asked_changes_nothing() -> None:
    plan = PiecesPlan[str]({0: SIZE, 1: SIZE}, POLICY)
    plan.add_peer(Instant(0), "a", [0])
    assert not plan.arrived(Instant(0), "a", 0)
    assert not plan.arrived(Instant(0), "b", 0)
    plan.verified(1)
    plan.refused(Instant(0), "a", 1, busy=False)
    plan.received(Instant(0), "b", 7)
    plan.lost("b")
    assert set(plan.left) == {0, 1}
