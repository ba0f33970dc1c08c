"""Which layers are ordered from whom, which chain a job gets, and what becomes of it when Islands go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from cargos.manifest import Sharding
from gateway.chains.book import (
    LOADING_NS,
    ORDER_SHOWN_NS,
    REFUSED_FIRST_NS,
    SETTLE_NS,
    ChainBook,
    Order,
    Stepped,
)
from gateway.chains.layout import MAX_STAGE_ADDRESSES
from protocol.adverts import IslandAdvert, OfferedCargo, ShardRange
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.ids import CargoDigest, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.limits import MAX_ADDRESS_CHARS, MAX_ADDRESSES
from protocol.ring import MAX_CHAIN_BYTES, MAX_SPARES, MAX_STAGES, Chain, ShardHeld
from protocol.work import Generation, Sampling, TextPrompt
from routing.islands import IslandBook
from routing.job_events import FULL, Ask, Assignment, NotYet, StageSeen
from routing.requirements import ANYTHING, Outlook

MIB = 1 << 20
LAYERS = 12
CARGO = CargoDigest("sha256:" + "c" * 64)
PEERS = [Signer(bytes([i]) * 32).peer for i in range(1, 9)]
A, B, C, D, E = PEERS[:5]
ME = PEERS[-1]
#: 12 layers of 10 MiB, with 20 for the embedding and for the head: 160 MiB in all.
SHARDING = Sharding(
    architecture="llama",
    layers=LAYERS,
    width=64,
    layer_bytes=(10 * MIB,) * LAYERS,
    embedding_bytes=20 * MIB,
    head_bytes=20 * MIB,
    kv_bytes=1,
)


def work(*, deterministic: bool = False) -> Generation:
    return Generation(TextPrompt("hi"), Sampling(seed=1), max_tokens=8, deterministic=deterministic)


class World:
    """A book, a clock, and Islands that do as they are told unless the test does it for them."""

    def __init__(self, sharding: Sharding | None = SHARDING) -> None:
        self.islands: IslandBook[PeerId] = IslandBook(ttl_ns=1 << 60)
        self.sharding = sharding
        self.book = ChainBook(
            self.islands,
            Outlook(),
            me=ME,
            requirements=ANYTHING,
            sharding_of=lambda _: self.sharding,
            rtt_of=lambda _a, _b: MILLISECOND_NS,
            dice=Dice(1),
        )
        self.now = Instant(SECOND_NS)
        self.sequence = 0

    def offer(self, peer: PeerId, first: int = 0, last: int = 0, room: int = 80, **changes: Any) -> None:
        self.sequence += 1
        addresses = changes.pop("addresses", ())
        layers = changes.pop("layers", LAYERS)
        shard = ShardRange(first, last, layers, room_mib=room, layer_ns=changes.pop("layer_ns", MILLISECOND_NS))
        cargo = OfferedCargo(CARGO, "m", "1", "llmcpp", "ready", 1, 4, 0, 0, 0.0, 0.0, shard=shard)
        cargo = msgspec.structs.replace(cargo, **changes)
        advert = IslandAdvert(peer[-4:], (cargo,), addresses=addresses)
        assert self.islands.admit(self.now, peer, advert, self.sequence)

    def step(self, wait_ns: int = 0, *, learning: bool = False) -> Stepped:
        self.now = Instant(self.now + wait_ns)
        assert self.book.wanted() == ([CARGO] if CARGO in self.islands.shelves else [])
        return self.book.step(self.now, CARGO, learning=learning)

    def obey(self, orders: Iterable[Order], state: str = "ready") -> None:
        for order in orders:
            held = ShardHeld(order.hold.first, order.hold.last)
            self.book.answered(self.now, CARGO, order, held)
            self.offer(order.peer, held.first, held.last, state=state)

    def form(self, *peers: PeerId) -> None:
        """A complete chain, with what spares there are."""
        for peer in peers:
            self.offer(peer)
        self.step()
        self.obey(self.step(SETTLE_NS).orders)
        assert self.step().became_ready

    def place(self, **changes: Any) -> Assignment[PeerId] | NotYet | object | None:
        ask: Ask[PeerId] = Ask(**changes)
        return self.book.place(self.now, CARGO, work(), ask)

    def chain(self, **changes: Any) -> Chain:
        found = self.place(**changes)
        assert isinstance(found, Assignment)
        assert found.chain is not None
        assert found.chain.is_whole
        assert found.chain.head.peer == found.peer
        return found.chain

    def ranges(self) -> dict[PeerId, tuple[int, int]]:
        return {
            island.peer: (offered.shard.first, offered.shard.last)
            for island, offered in self.islands.offers(CARGO)
            if offered.shard is not None
        }


def test_layers_are_ordered_once_newcomers_have_settled_and_jobs_get_the_chain() -> None:
    world = World()
    for peer in (A, B, C):
        world.offer(peer)
        stepped = world.step(SETTLE_NS // 2)
        assert stepped.orders == ()
        assert stepped.wake is not None
        assert world.place() == NotYet(0, LAYERS)
    stepped = world.step(SETTLE_NS)
    assert {order.peer for order in stepped.orders} == {A, B, C}
    assert world.step().orders == (), "an order that waits for its answer is not given twice"
    world.obey(stepped.orders, state="loading")
    stepped = world.step()
    assert (stepped.orders, stepped.became_ready) == ((), False)
    assert world.place() == NotYet(0, LAYERS)
    for peer, (first, last) in world.ranges().items():
        world.offer(peer, first, last)
    stepped = world.step()
    assert stepped.became_ready
    assert not world.step().became_ready
    chain = world.chain()
    assert [(s.first, s.last) for s in chain.stages] == sorted(world.ranges().values())
    assert chain.dtype == "f16s"
    assert world.book.ready_tps(CARGO) is not None
    layout = world.book.layout(CARGO)
    assert layout is not None
    assert [row[0] for row in layout.stages] == [s.holder.peer for s in chain.stages]


def test_deterministic_work_travels_losslessly() -> None:
    world = World()
    world.form(A, B, C)
    found = world.book.place(world.now, CARGO, work(deterministic=True), Ask())
    assert isinstance(found, Assignment)
    assert found.chain is not None
    assert found.chain.dtype == "f32"


def test_what_does_not_fit_is_said_and_what_comes_later_helps() -> None:
    world = World()
    world.offer(A)
    world.step()
    stepped = world.step(SETTLE_NS)
    assert stepped.orders == ()
    assert world.place() is None
    short = world.book.shortage(CARGO)
    assert short is not None
    assert "80 MiB" in short.detail
    # Ends of 20 MiB and 12 layers of 10 with some bytes of keys and values: six layers do not fit into 60 MiB.
    assert (short.here, short.room_mib, short.enough_islands, short.enough_room_mib) == (1, 80, 3, None)
    world.offer(B)
    world.offer(C)
    stepped = world.step()
    assert len(stepped.orders) == 3
    assert world.book.shortage(CARGO) is None


def test_an_island_that_is_left_over_becomes_a_spare_of_the_chain() -> None:
    world = World()
    world.form(A, B, C)
    world.offer(D)
    orders = world.step().orders
    assert [order.peer for order in orders] == [D]
    assert (orders[0].hold.first, orders[0].hold.last) in world.ranges().values()
    world.obey(orders)
    world.step()
    chain = world.chain()
    assert [spare.peer for stage in chain.stages for spare in stage.spares] == [D]


def test_a_holder_that_went_is_replaced_by_one_with_room() -> None:
    world = World()
    world.form(A, B, C)
    gone = PeerId(world.chain().stages[1].holder.peer)
    missing = world.ranges()[gone]
    world.islands.lost(gone)
    assert world.step().orders == ()
    assert world.book.ready_tps(CARGO) is None
    assert world.place() is None, "nobody can hold what is missing"
    world.offer(D)
    orders = world.step().orders
    assert [(o.peer, o.hold.first, o.hold.last) for o in orders] == [(D, *missing)]
    assert world.place() == NotYet(LAYERS - (missing[1] - missing[0]), LAYERS)
    world.obey(orders)
    assert world.step().became_ready


def test_an_island_that_answers_with_other_layers_is_planned_with_as_it_is() -> None:
    world = World()
    for peer in (A, B, C):
        world.offer(peer)
    world.step()
    orders = world.step(SETTLE_NS).orders
    first = next(order for order in orders if order.hold.first == 0)
    wrong = ShardHeld(0, first.hold.last - 1)
    world.book.answered(world.now, CARGO, first, wrong)
    world.obey([order for order in orders if order is not first])
    world.offer(first.peer, wrong.first, wrong.last)
    for _ in range(4):
        stepped = world.step()
        world.obey(stepped.orders)
        if stepped.became_ready:
            break
    chain = world.chain()
    assert chain.stages[0].last in (wrong.last, first.hold.last)


def test_one_that_refuses_is_asked_again_later_and_its_jobs_wait() -> None:
    world = World()
    for peer in (A, B, C):
        world.offer(peer)
    world.step()
    orders = world.step(SETTLE_NS).orders
    refusing, *others = orders
    world.obey(others)
    world.book.answered(world.now, CARGO, refusing, None)
    stepped = world.step()
    assert stepped.orders == ()
    assert stepped.wake == world.now + REFUSED_FIRST_NS
    assert isinstance(world.place(), NotYet)
    again = world.step(REFUSED_FIRST_NS)
    assert [order.peer for order in again.orders] == [refusing.peer]
    world.book.answered(world.now, CARGO, again.orders[0], None)
    wake = world.step().wake
    assert wake == world.now + 2 * REFUSED_FIRST_NS, "the wait doubles"


def test_an_order_that_never_shows_is_given_again() -> None:
    world = World()
    for peer in (A, B, C):
        world.offer(peer)
    world.step()
    orders = world.step(SETTLE_NS).orders
    silent, *others = orders
    world.obey(others)
    world.book.answered(world.now, CARGO, silent, ShardHeld(silent.hold.first, silent.hold.last))
    assert world.step().orders == ()
    assert [order.peer for order in world.step(ORDER_SHOWN_NS + 1).orders] == [silent.peer]


def test_one_that_loads_for_ever_is_not_waited_for() -> None:
    world = World()
    for peer in (A, B, C):
        world.offer(peer)
    world.step()
    orders = world.step(SETTLE_NS).orders
    world.obey(orders[1:])
    world.obey(orders[:1], state="loading")
    world.step()
    assert isinstance(world.place(), NotYet)
    world.step(LOADING_NS + 2)
    assert world.place() is None


def test_ranges_that_do_not_fit_together_are_given_up() -> None:
    world = World()
    world.offer(A, 0, 5)
    world.offer(B, 4, 8)
    world.offer(C, 7, 12)
    world.step()
    stepped = world.step(SETTLE_NS)
    assert stepped.orders, "others than the held ranges are ordered"
    world.obey(stepped.orders)
    assert world.step().became_ready
    assert world.chain().is_whole


def test_a_dead_head_is_replaced_and_the_others_stay() -> None:
    world = World()
    world.form(A, B, C, D, E, PEERS[5])
    before = world.chain()
    head = PeerId(before.head.peer)
    world.islands.lost(head)
    found = world.place(excluded=frozenset({head}), chain=before)
    assert isinstance(found, Assignment)
    assert found.goes_on
    after = found.chain
    assert after is not None
    assert after.stages[:-1] == before.stages[:-1]
    assert after.stages[-1].generation == before.stages[-1].generation + 1
    assert after.head.peer == found.peer == before.stages[-1].spares[0].peer


def test_a_dead_head_without_a_spare_leads_to_a_new_chain_or_to_patience() -> None:
    world = World()
    world.form(A, B, C)
    before = world.chain()
    head = PeerId(before.head.peer)
    world.islands.lost(head)
    world.offer(D)
    world.obey(world.step().orders)
    world.step()
    chain = world.chain(excluded=frozenset({head}), chain=before)
    assert chain.head.peer == D


def test_a_living_head_gets_another_chain_without_those_it_lost() -> None:
    world = World()
    world.form(A, B, C, D, E, PEERS[5])
    before = world.chain()
    lost = before.stages[1].holder.peer
    found = world.place(lost=frozenset({lost}), chain=None)
    assert isinstance(found, Assignment)
    assert not found.goes_on
    assert found.chain is not None
    assert lost not in {s.holder.peer for s in found.chain.stages}


def test_a_full_chain_is_full_and_not_missing() -> None:
    world = World()
    world.form(A, B, C)
    for peer, (first, last) in world.ranges().items():
        world.offer(peer, first, last, active=4)
    assert world.place() is FULL


def test_a_chain_without_its_lost_stage_is_full_until_it_is_seen_to_be_gone() -> None:
    world = World()
    world.form(A, B, C)
    lost = PeerId(world.chain().stages[1].holder.peer)
    assert world.place(lost=frozenset({lost})) is FULL
    world.islands.lost(lost)
    world.step()
    assert world.place(lost=frozenset({lost})) is None


def test_without_a_manifest_nothing_is_ordered() -> None:
    world = World(sharding=None)
    for peer in (A, B, C):
        world.offer(peer)
    assert world.step(learning=True).orders == ()
    assert world.place() == NotYet()
    assert world.step(SETTLE_NS).orders == ()
    assert world.place() is None


def test_measured_layers_change_the_next_choice() -> None:
    world = World()
    world.form(A, B, C, D, E, PEERS[5])
    before = world.chain()
    slow = before.stages[1]
    seen = [
        StageSeen(s.holder.peer, n, s.first, s.last, 1 + (SECOND_NS if s is slow else 0), False, "", None)
        for n, s in enumerate(before.stages)
    ]
    for _ in range(10):
        world.book.measured(CARGO, seen)
    assert slow.holder.peer not in {s.holder.peer for s in world.chain().stages}


def test_the_largest_chain_fits_into_an_offer() -> None:
    world = World()
    for n, peer in enumerate(PEERS[:6]):
        texts = tuple(f"/dns4/{i}{n}".ljust(MAX_ADDRESS_CHARS, "x") for i in range(MAX_ADDRESSES))
        world.offer(peer, 0 if n < 3 else 6, 6 if n < 3 else 12, addresses=texts)
    world.step()
    world.step(SETTLE_NS)
    chain = world.chain()
    everybody = [one for s in chain.stages for one in (s.holder, *s.spares)]
    assert len(everybody) == 6
    assert all(len(one.addresses) == MAX_STAGE_ADDRESSES for one in everybody)
    most = MAX_STAGES * (1 + MAX_SPARES)
    assert len(msgspec.msgpack.encode(chain)) * most // len(everybody) < MAX_CHAIN_BYTES


@pytest.mark.parametrize(
    "lie",
    [
        {"first": 0, "last": 400, "layers": 512},
        {"first": 500, "last": 512, "layers": 512},
        {"first": 9, "last": 3},
        {"first": 0, "last": 6, "layers": 6},
        {"first": 0, "last": 12, "room": 1 << 30, "layer_ns": (1 << 53) - 1},
        {"room": 1 << 30, "layer_ns": 1, "slots": 1_000_000, "context_length": 262_144},
        {"first": 0, "last": 4, "slots": 0, "active": 1_000_000},
    ],
)
def test_what_can_not_be_true_of_an_island_breaks_nothing(lie: dict[str, Any]) -> None:
    world = World()
    world.offer(D, **lie)
    for peer in (A, B, C):
        world.offer(peer)
    world.step()
    for _ in range(6):
        world.obey(world.step(SETTLE_NS).orders)
    place = world.place()
    assert place is None or isinstance(place, Assignment | NotYet) or place is FULL
    if lie.get("context_length"):
        assert world.chain().is_whole, "what one wants for itself is not what all need"
    if "layers" in lie or lie.get("first", 0) > lie.get("last", 0):
        assert D not in {s.holder.peer for s in world.chain().stages}


def test_cargos_and_islands_that_went_leave_nothing() -> None:
    world = World()
    world.form(A, B, C)
    for peer in (A, B, C):
        world.islands.lost(peer)
    assert world.book.wanted() == []
    assert world.book.layout(CARGO) is None
    assert world.place() is None


def load(world: World, looks: int = 40) -> list[Order]:
    """All slots of all holders are in use for twenty minutes; what is ordered, and nobody obeys."""
    orders: list[Order] = []
    for _ in range(looks):
        for peer, (first, last) in world.ranges().items():
            if first < last:
                world.offer(peer, first, last, active=4)
        orders += world.step(30 * SECOND_NS).orders
    return orders


def test_layers_that_are_busy_for_long_are_joined_by_whoever_comes() -> None:
    world = World()
    world.form(*PEERS[:6])  # three stages, and a spare for each
    assert load(world) == []
    world.offer(PEERS[6])
    orders = world.step(30 * SECOND_NS).orders
    assert [order.peer for order in orders] == [PEERS[6]]
    assert (orders[0].hold.first, orders[0].hold.last) in world.ranges().values()
    assert load(world) == [], "it was asked and has not answered"
    world.obey(orders)
    assert load(world) == [], "nobody is left to be sent"


def test_a_newcomer_under_load_is_told_one_thing_only() -> None:
    """It is wanted as a spare and where it is busy: the first word holds while its advert offers room."""
    world = World()
    world.form(A, B, C)
    assert load(world) == []
    world.offer(D)
    told = world.step(30 * SECOND_NS).orders
    assert [order.peer for order in told] == [D]
    for order in told:
        world.book.answered(world.now, CARGO, order, ShardHeld(order.hold.first, order.hold.last))
    assert world.step(SECOND_NS).orders == ()
    assert world.step(10 * SECOND_NS).orders == ()


def test_who_refuses_to_join_is_asked_again_later() -> None:
    world = World()
    world.form(*PEERS[:6])
    load(world)
    world.offer(PEERS[6])
    (order,) = world.step(30 * SECOND_NS).orders
    world.book.answered(world.now, CARGO, order, None)
    again = load(world, looks=4)
    assert {order.peer for order in again} == {PEERS[6]}


def test_a_chain_that_stands_is_ready_while_a_better_one_loads() -> None:
    """A quicker Island holds a range now, but loads it still: jobs go on over those that are ready."""
    world = World()
    world.form(*PEERS[:6])
    (first, last), *_ = sorted(set(world.ranges().values()))
    moved = next(peer for peer, span in world.ranges().items() if span == (first, last))
    world.offer(moved, first, last, state="loading", layer_ns=1)
    stepped = world.step(SECOND_NS)
    assert not stepped.became_ready, "it was ready all the time"
    assert world.book.ready_tps(CARGO) is not None
    layout = world.book.layout(CARGO)
    assert layout is not None
    assert moved not in {peer for peer, *_ in layout.stages}
    assert moved in {peer for peer, *_ in layout.spares}
    assert moved not in {stage.holder.peer for stage in world.chain().stages}
