"""Gossip in a small world of virtual time: delivery under loss, churn and partition, and bad neighbours."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.dice import Dice
from protocol.errors import Fault, ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.machine import Disconnect, Emit, Ordered, PeerLost, Received, Send, WakeAt, Woken
from routing.gossip import GossipMachine
from routing.gossip_messages import (
    GOSSIP_CODEC,
    AddPeer,
    Compare,
    Digest,
    Expelled,
    GossipMessage,
    Have,
    Item,
    Learnt,
    Opening,
    Prune,
    Publish,
    Push,
    Reconsider,
    Refused,
    RemovePeer,
    Sums,
    Thin,
    Want,
)
from routing.gossip_peers import GossipPolicy, KindPolicy

KIND = "news"
FOREVER = UnixNs(10**9 * SECOND_NS)
START = Instant(0)


def open_news(item: Item, now: UnixNs) -> Opening:
    """News are valid unless they say otherwise."""
    if item.payload.startswith(b"bad"):
        raise ProtocolError(Fault.SIGNATURE, "not signed")
    expires = UnixNs(int.from_bytes(item.payload[:8], "big"))
    if now > expires:
        raise ProtocolError(Fault.EXPIRED, "old news")
    return Opening(expires, item.payload)


def news(origin: int, name: int, version: int = 0, *, expires: int = FOREVER, text: bytes = b"x" * 40) -> Item:
    return Item(
        KIND, origin.to_bytes(8, "big"), name.to_bytes(8, "big"), version, expires.to_bytes(8, "big") + text
    )


@dataclass
class World:
    """Nodes by number, links with delay and loss, in virtual time. Every message makes the trip through its
    codec."""

    seed: int = 0
    loss: float = 0.0
    policy: GossipPolicy = field(default_factory=GossipPolicy)
    now: Instant = START
    nodes: dict[int, GossipMachine[int]] = field(default_factory=dict)
    learnt: dict[int, list[Item]] = field(default_factory=dict)
    expelled: list[tuple[int, int, Fault]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    sent_bytes: int = 0
    cut: Callable[[int, int], bool] = lambda _a, _b: False
    _queue: list[tuple[int, int, int, object]] = field(default_factory=list)
    _serial: int = 0

    def __post_init__(self) -> None:
        self.dice = Dice(self.seed, 1)

    def start(self, count: int) -> None:
        for node in range(count):
            self.boot(node)

    def boot(self, node: int, favoured: Callable[[bytes], bool] = lambda _: True) -> None:
        self.nodes[node] = GossipMachine(
            Dice(self.seed, 1000 + node),
            self.policy,
            {KIND: open_news},
            {KIND: KindPolicy(FOREVER, 4096)},
            favoured=favoured,
        )
        self.learnt[node] = []

    def link(self, a: int, b: int) -> None:
        self.order(a, AddPeer(b))
        self.order(b, AddPeer(a))

    def link_randomly(self, degree: int) -> None:
        names = sorted(self.nodes)
        for a in names:
            for b in self.dice.sample([n for n in names if n != a], degree):
                self.link(a, b)

    def order(self, node: int, command: object) -> None:
        self.apply(node, self.nodes[node].receive(self.now, Ordered(command)))

    def link_stranger(self, node: int, stranger: int) -> None:
        """A neighbour that is no machine."""
        self.order(node, AddPeer(stranger))

    def inject(self, sender: int, node: int, message: GossipMessage) -> None:
        """From a peer that is no machine: an adversary."""
        self.apply(node, self.nodes[node].receive(self.now, Received(sender, message)))

    def kill(self, node: int) -> None:
        del self.nodes[node]
        for other in sorted(self.nodes):
            self._at(self.now + 50 * MILLISECOND_NS, other, PeerLost(node))

    def apply(self, node: int, effects: Iterable[object]) -> None:
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    data = GOSSIP_CODEC.encode(message)
                    name = type(message).__name__
                    self.sent[name] = self.sent.get(name, 0) + 1
                    self.sent_bytes += len(data)
                    if self.dice.unit() >= self.loss and not self.cut(node, peer):
                        delay = 20 * MILLISECOND_NS + self.dice.below(80 * MILLISECOND_NS)
                        self._at(self.now + delay, peer, Received(node, GOSSIP_CODEC.decode_untrusted(data)))
                case Emit(event=Learnt(item=item)):
                    self.learnt[node].append(item)
                case Emit(event=Expelled(peer=peer, fault=fault)):
                    self.expelled.append((node, peer, fault))
                case Emit(event=Thin()):
                    others = [n for n in sorted(self.nodes) if n not in {node, *self.nodes[node].neighbours}]
                    if others:
                        self._at(self.now, node, Ordered(AddPeer(other := self.dice.choice(others))))
                        self._at(self.now, other, Ordered(AddPeer(node)))
                case WakeAt(instant=instant):
                    self._at(instant, node, Woken())
                case Disconnect(peer=peer):
                    if peer in self.nodes:
                        self._at(self.now, peer, PeerLost(node))
                case _:
                    pass

    def run(self, seconds: float) -> None:
        end = Instant(self.now + round(seconds * SECOND_NS))
        while self._queue and self._queue[0][0] <= end:
            at, _, node, what = heapq.heappop(self._queue)
            self.now = Instant(max(self.now, at))
            if node in self.nodes:
                self.apply(node, self.nodes[node].receive(self.now, what))
        self.now = end

    def _at(self, when: int, node: int, what: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (when, self._serial, node, what))

    def holds(self, node: int, item: Item) -> bool:
        return self.nodes[node].store.get(item.id) is not None

    def everybody_holds(self, items: list[Item]) -> bool:
        return all(self.holds(node, item) for node in self.nodes for item in items)


def test_news_reach_everybody_by_push_alone() -> None:
    world = World()
    world.start(40)
    world.link_randomly(4)
    world.run(5)
    item = news(0, 1)
    world.order(0, Publish(item))
    world.run(1)
    assert world.everybody_holds([item])
    assert all(learnt == [item] for node, learnt in world.learnt.items() if node != 0)


@pytest.mark.parametrize("seed", range(20))
def test_delivery_under_loss_and_churn(seed: int) -> None:
    """30 % of the nodes die while news are published, a tenth of all messages are lost."""
    world = World(seed=seed, loss=0.1)
    world.start(40)
    world.link_randomly(4)
    world.run(3)
    victims = world.dice.sample(range(40), 12)
    items: list[Item] = []
    for i in range(36):
        if i % 3 == 0:
            world.kill(victims[i // 3])
        publisher = world.dice.choice(sorted(set(world.nodes) - set(victims)))
        items.append(news(publisher, i))
        world.order(publisher, Publish(items[-1]))
        world.run(0.1)
    world.run(60)
    assert world.everybody_holds(items)
    assert not world.expelled


@pytest.mark.parametrize("seed", range(20))
def test_a_partition_heals(seed: int) -> None:
    """Two halves publish apart from each other, the same keys in different versions among them."""
    world = World(seed=seed)
    world.start(20)
    world.link_randomly(4)
    world.run(3)
    world.cut = lambda a, b: (a < 10) != (b < 10)
    for i in range(30):
        world.order(i % 10, Publish(news(i, i, 2)))
        world.order(10 + i % 10, Publish(news(i, i, 1 + i % 3)))
        world.run(0.05)
    world.run(30)
    world.cut = lambda _a, _b: False
    world.run(90)
    winners = [news(i, i, max(2, 1 + i % 3)) for i in range(30)]
    assert world.everybody_holds(winners)
    assert {len(node.store) for node in world.nodes.values()} == {30}
    assert not world.expelled


def test_replays_byte_for_byte() -> None:
    """The same seed gives the same messages, bytes and times."""

    def run() -> tuple[dict[str, int], int, Instant | None]:
        world = World(seed=3, loss=0.1)
        world.start(12)
        world.link_randomly(3)
        for i in range(20):
            world.order(i % 12, Publish(news(i, i)))
            world.run(0.3)
        return world.sent, world.sent_bytes, world.nodes[5].next_wake()

    assert run() == run()


def test_pushes_thin_out_towards_the_redundancy() -> None:
    """The first item floods; later ones come little more than twice to each node."""
    world = World(seed=1)
    world.start(40)
    world.link_randomly(4)
    world.run(5)

    def copies(first: int, count: int) -> float:
        before = world.sent.get("Push", 0)
        for i in range(first, first + count):
            world.order(i % 40, Publish(news(i % 40, i)))
            world.run(1.2)
        return (world.sent["Push"] - before) / (count * 39)

    assert copies(0, 1) > 3.5
    copies(1, 80)
    assert copies(100, 20) < 2.8


def test_equal_stores_cost_one_small_message() -> None:
    world = World()
    world.start(2)
    for i in range(500):
        world.order(0, Publish(news(0, i)))
    world.link(0, 1)
    world.run(30)
    assert world.everybody_holds([news(0, i) for i in range(500)])
    world.sent.clear()
    world.sent_bytes = 0
    world.run(300)
    assert set(world.sent) == {"Digest"}
    assert world.sent["Digest"] <= 2 * 300 / 16
    assert world.sent_bytes <= 40 * world.sent["Digest"]


def test_a_newcomer_gets_a_large_store() -> None:
    """More than a message's ids: page by page, each item once."""
    world = World()
    world.start(2)
    items = [news(i % 7, i) for i in range(9000)]
    for item in items:
        world.order(0, Publish(item))
    world.link(0, 1)
    world.run(60)
    assert world.everybody_holds(items)
    assert len(world.learnt[1]) == 9000
    assert not world.expelled


def test_the_highest_version_stands_and_the_older_is_not_told_again() -> None:
    world = World()
    world.start(3)
    world.link(0, 1)
    world.link(1, 2)
    for version in (1, 3, 2):
        world.order(0, Publish(news(0, 1, version)))
        world.run(1)
    assert world.learnt[2] == [news(0, 1, 1), news(0, 1, 3)]
    assert {len(node.store) for node in world.nodes.values()} == {1}


def test_two_items_with_one_number_end_the_same_everywhere() -> None:
    """Their origin broke the rules; replicas still agree, and each that sees both tells its user."""
    world = World()
    world.start(4)
    for a, b in ((0, 1), (1, 2), (2, 3)):
        world.link(a, b)
    world.order(0, Publish(one := news(9, 1, text=b"a" * 40)))
    world.order(3, Publish(other := news(9, 1, text=b"b" * 40)))
    world.run(60)
    assert world.everybody_holds([other])
    assert world.learnt[1] == [one, other]
    assert world.learnt[2] == [other, one]


def test_an_item_of_ours_that_our_opener_refuses_is_told_to_us() -> None:
    world = World()
    world.start(1)
    bad = Item(KIND, b"1", b"1", 0, b"bad")
    effects = world.nodes[0].receive(world.now, Ordered(Publish(bad)))
    assert effects == [Emit(Refused(bad, Fault.SIGNATURE, "not signed"))]
    assert len(world.nodes[0].store) == 0


def test_news_expire() -> None:
    world = World()
    world.start(2)
    world.link(0, 1)
    item = news(0, 1, expires=20 * SECOND_NS)
    world.order(0, Publish(item))
    world.run(10)
    assert world.everybody_holds([item])
    world.run(20)
    assert not any(world.holds(node, item) for node in (0, 1))
    world.inject(0, 1, Push((item,)))
    assert not world.holds(1, item)
    assert not world.expelled


def test_what_claims_to_last_longer_than_its_kind_may_is_not_held() -> None:
    world = World()
    world.start(1)
    world.link_stranger(0, 99)
    eternal = news(5, 1, expires=FOREVER * 5)
    world.inject(99, 0, Push((eternal,)))
    assert not world.holds(0, eternal)


def test_items_of_several_kinds_travel_side_by_side() -> None:
    """Each kind has its opener and its bounds; a node that does not know a kind lets it be, without blame."""
    world = World()

    def machine(*kinds: str) -> GossipMachine[int]:
        return GossipMachine(
            Dice(len(kinds)),
            GossipPolicy(),
            dict.fromkeys(kinds, open_news),
            {kind: KindPolicy(60 * SECOND_NS, 60 if kind == KIND else 400) for kind in kinds},
        )

    for node, kinds in enumerate([(KIND, "summary"), (KIND, "summary"), (KIND,)]):
        world.nodes[node] = machine(*kinds)
        world.learnt[node] = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        world.link(a, b)
    soon = 50 * SECOND_NS
    short = news(0, 1, expires=soon)
    summary = msgspec.structs.replace(news(0, 1, expires=soon, text=b"s" * 300), kind="summary")
    world.order(0, Publish(short))
    world.order(0, Publish(summary))
    world.run(5)
    assert sorted(item.kind for item in world.learnt[1]) == [KIND, "summary"]
    assert world.learnt[2] == [short]
    world.inject(0, 1, Push((msgspec.structs.replace(summary, kind=KIND, version=9),)))
    assert len(world.learnt[1]) == 2, "too long for its kind"
    world.run(25)
    world.sent.clear()
    world.run(20)
    assert world.sent.get("Compare", 0) <= 6, "a difference that stays is not compared ever again in haste"
    world.run(30)
    assert [len(world.nodes[node].store) for node in range(3)] == [0, 0, 0]
    assert not world.expelled


def test_favour_may_change() -> None:
    """Who becomes a stranger keeps only strangers' room."""
    favoured = {(7).to_bytes(8, "big")}
    world = World(policy=GossipPolicy(capacity=100, stranger_capacity=20, per_origin=90))
    world.boot(0, favoured=favoured.__contains__)
    for i in range(50):
        world.order(0, Publish(news(7, i)))
    assert len(world.nodes[0].store) == 50
    favoured.clear()
    world.order(0, Reconsider())
    assert len(world.nodes[0].store) == 20
    assert world.holds(0, news(7, 49))


# --- bad neighbours -------------------------------------------------------------------------------

STRANGER = 99


def beset(**policy: int) -> World:
    """One machine with a stranger as its neighbour, which says what a test makes it say."""
    world = World(policy=GossipPolicy(**policy))
    world.start(1)
    world.link_stranger(0, STRANGER)
    world.run(3)
    return world


def faults(world: World) -> list[Fault]:
    return [fault for _, _, fault in world.expelled]


def test_who_sends_invalid_items_loses_its_place() -> None:
    world = beset()
    for i in range(4):
        assert not world.expelled
        world.inject(STRANGER, 0, Push((news(1, i, text=b"x"), Item(KIND, b"1", bytes([i]), 0, b"bad"))))
    assert faults(world) == [Fault.SIGNATURE]
    assert world.nodes[0].neighbours == ()
    world.link_stranger(0, STRANGER)
    assert world.nodes[0].neighbours == ()
    world.run(601)
    world.link_stranger(0, STRANGER)
    assert world.nodes[0].neighbours == (STRANGER,)


def test_an_invalid_item_now_and_then_is_forgiven() -> None:
    world = beset()
    for i in range(50):
        world.inject(STRANGER, 0, Push((Item(KIND, b"1", bytes([i]), 0, b"bad"),)))
        world.run(121)
    assert not world.expelled


def test_who_floods_loses_its_place_and_little_is_verified() -> None:
    world = beset()
    opened = 0

    def counted(item: Item, now: UnixNs) -> Opening:
        nonlocal opened
        opened += 1
        return open_news(item, now)

    world.nodes[0]._openers[KIND] = counted
    for i in range(1000):
        world.inject(STRANGER, 0, Push(tuple(news(i, k) for k in range(64))))
    assert faults(world) == [Fault.UNEXPECTED]
    assert opened <= world.policy.take_burst


@pytest.mark.parametrize(
    "message",
    [
        Digest(7, 7),
        Sums((1,) * 256),
        Compare((1, 2), tuple(range(4096))),
        Compare((1,) * 256, ()),
        Have(tuple(range(4096))),
        Have(tuple(range(4096)), missing=True),
        Want(tuple(range(4096))),
        Prune(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_any_message_in_floods_costs_bounded_memory_and_the_place(message: GossipMessage) -> None:
    world = beset()
    for i in range(100):
        world.order(0, Publish(news(0, i)))
    for _ in range(world.policy.take_burst + 100):
        world.inject(STRANGER, 0, message)
    assert faults(world) == [Fault.UNEXPECTED]
    node = world.nodes[0]
    assert len(node._missing._sources) <= world.policy.max_missing
    world.run(1)
    assert len(node._missing._sources) == len(node._missing._asked) == len(node._missing._waiting) == 0
    assert len(node.store) == 100


def test_who_announces_and_withholds_loses_its_place_and_the_news_come_from_another() -> None:
    world = World()
    world.start(2)
    world.link_stranger(0, STRANGER)
    world.run(3)
    items = [news(1, i) for i in range(2000)]
    for first in range(0, 2000, 500):
        world.inject(STRANGER, 0, Have(tuple(item.id for item in items[first : first + 500]), missing=True))
    world.run(1)
    assert len(world.nodes[0]._missing._asked) == world.policy.max_asked
    for item in items:
        world.order(1, Publish(item))
    world.link(0, 1)
    world.run(60)
    assert world.everybody_holds(items)
    assert (0, STRANGER, Fault.UNEXPECTED) in world.expelled


def test_bogus_announcements_hold_bounded_memory() -> None:
    world = beset()
    for i in range(60):
        world.inject(STRANGER, 0, Have(tuple(range(i * 4096, (i + 1) * 4096))))
    node = world.nodes[0]
    assert len(node._missing._sources) <= world.policy.max_missing // 4  # the rest is for what others announce
    world.run(600)
    assert not node._missing._sources
    assert not node._missing._waiting
    assert not node._missing._asked


def test_replays_of_old_items_change_nothing() -> None:
    world = beset()
    old, new = news(1, 1, 1), news(1, 1, 2)
    world.inject(STRANGER, 0, Push((old,)))
    world.inject(STRANGER, 0, Push((new,)))
    for _ in range(50):
        world.inject(STRANGER, 0, Push((old, new)))
    assert world.learnt[0] == [old, new]
    assert world.holds(0, new)
    assert not world.holds(0, old)


def test_a_withholding_parent_delays_but_does_not_stop_news() -> None:
    """Node 0 pushes to and hears from strangers that keep silent; one honest neighbour suffices."""
    world = World()
    world.start(2)
    for stranger in range(90, 100):
        world.link_stranger(0, stranger)
    world.link(0, 1)
    world.run(3)
    world.order(1, Publish(item := news(1, 1)))
    world.run(2)
    assert world.holds(0, item)


def test_messages_from_nobodys_neighbour_are_ignored() -> None:
    world = World()
    world.start(1)
    world.inject(STRANGER, 0, Push((news(1, 1),)))
    assert len(world.nodes[0].store) == 0


def test_a_flood_of_origins_leaves_the_favoured_in_place() -> None:
    world = World(policy=GossipPolicy(capacity=100, stranger_capacity=20, per_origin=90))
    world.boot(0, favoured=lambda origin: origin == (7).to_bytes(8, "big"))
    world.link_stranger(0, STRANGER)
    kept = [news(7, i) for i in range(80)]
    for item in kept:
        world.order(0, Publish(item))
    for i in range(1000):
        world.inject(STRANGER, 0, Push((news(1000 + i, 1),)))
    assert len(world.nodes[0].store) == 100
    assert world.everybody_holds(kept)


def test_removed_peers_are_forgotten_and_the_owner_told() -> None:
    world = beset()
    world.inject(STRANGER, 0, Have((1, 2, 3)))
    effects = world.nodes[0].receive(world.now, Ordered(RemovePeer(STRANGER)))
    assert Emit(Thin(0)) in effects
    world.run(10)
    assert not world.nodes[0]._missing._sources
    assert world.nodes[0].next_wake() is None


# --- total ----------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 40), min_size=1, max_size=8).map(tuple)
items = st.lists(
    st.builds(
        news, st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), text=st.sampled_from([b"a", b"b"])
    ),
    min_size=1,
    max_size=4,
).map(tuple)
messages = st.one_of(
    st.builds(Push, items),
    st.builds(Have, ids, st.booleans()),
    st.builds(Want, ids, st.booleans()),
    st.builds(Prune),
    st.builds(Digest, st.integers(0, 5), st.integers(0, 5)),
    st.builds(Sums, st.lists(st.integers(0, 3), min_size=256, max_size=256).map(tuple)),
    st.builds(Compare, st.lists(st.integers(0, 255), min_size=1, max_size=9).map(tuple), ids),
)
peers = st.integers(0, 3)
inputs = st.one_of(
    st.builds(Received, peers, messages),
    st.builds(PeerLost, peers),
    st.just(Woken()),
    st.builds(Ordered, st.one_of(st.builds(AddPeer, peers), st.builds(RemovePeer, peers))),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2 * SECOND_NS), inputs), max_size=40))
def test_no_input_raises_and_the_books_stay_right(rows: list[tuple[int, object]]) -> None:
    node: GossipMachine[int] = GossipMachine(
        Dice(1),
        GossipPolicy(capacity=4, stranger_capacity=2, max_missing=16, max_asked=3),
        {KIND: open_news},
        {KIND: KindPolicy(FOREVER, 4096)},
        favoured=lambda origin: origin[-1] < 2,
    )
    now = START
    for delay, what in rows:
        now = Instant(now + delay)
        node.receive(now, what)  # type: ignore[arg-type]
        assert len(node.store) <= 4
        assert len(node._missing._sources) <= 16
        assert (
            node._missing._waiting.keys() | node._missing._asked.keys()
            <= node._missing._sources.keys() | node._missing._asked.keys()
        )
        queued = {item_id for n in node._neighbours.values() for item_id in n.backlog}
        assert (
            node._missing._sources.keys()
            <= node._missing._waiting.keys() | node._missing._asked.keys() | queued
        )
        owed = [peer for _, peer in node._missing._asked.values()]
        assert all(n.asked == owed.count(peer) <= 3 for peer, n in node._neighbours.items())
        wake = node.next_wake()
        assert wake is None or wake > now or node._sync_at == wake
        store = node.store
        assert store.total() == sum(held.id for held in store) % (1 << 63)
