"""Two Cargos that do not both fit on the same Islands: which one has a chain, and how often that changes. The
book and the Islands' own rule of memory, on a clock of the test's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cargos.manifest import Sharding
from gateway.chains.book import STAGGER_NS, ChainBook, Order
from node.shards.hosted import HostedShard
from node.shards.memory import UNUSED_S, ShardMemory
from protocol.adverts import IslandAdvert, OfferedCargo, ShardRange
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.ids import CargoDigest, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, after
from protocol.limits import MIB
from protocol.ring import HoldShard, ShardHeld
from protocol.work import Generation, Sampling, TextPrompt
from routing.chains.costs import ModelShape
from routing.islands import IslandBook
from routing.job_events import Ask, Assignment
from routing.requirements import ANYTHING, Outlook

LAYERS = 12
FIRST, SECOND = (CargoDigest("sha256:" + digit * 64) for digit in "fe")
ME = Signer(b"g" * 32).peer
#: 12 layers of 10 MiB, with 20 for the embedding and for the head: 160 MiB in all.
SHARDING = Sharding(
    architecture="llama",
    layers=LAYERS,
    width=64,
    layer_bytes=(10 * MIB,) * LAYERS,
    embedding_bytes=20 * MIB,
    head_bytes=20 * MIB,
    kv_bytes=0,
)
WORK = Generation(TextPrompt("hi"), Sampling(seed=1), max_tokens=8)
IDLE_MINUTES = 5
IDLE_S = 60.0 * IDLE_MINUTES


class Isle:
    """Keeps `ShardMemory`'s rule, loads in `load_s`, and counts what it has to let go."""

    def __init__(self, peer: PeerId, room_mib: int, load_s: float) -> None:
        self.peer = peer
        self.load_s = load_s
        self.memory = ShardMemory(room_mib, idle_minutes=IDLE_MINUTES)
        shape = ModelShape.of_sharding(SHARDING, slots=1, context=1)
        self.shards = {cargo: HostedShard(cast("Any", None), SHARDING, shape, 1) for cargo in (FIRST, SECOND)}
        self.offered: tuple[CargoDigest, ...] = (FIRST, SECOND)
        self.displaced: list[float] = []

    def hold(self, now: float, order: HoldShard) -> ShardHeld | None:
        shard, shards = self.shards[CargoDigest(order.cargo)], self.shards.values()
        wanted = (order.first, order.last) if order.first < order.last else (0, 0)
        needed = shard.mib_of(*wanted)
        if needed > self.memory.free_mib(shard, shards):
            going = self.memory.giving_way(shard, needed, shards, now) if order.displace else None
            if going is None:
                return None
            for other in going:
                self._set(other, (0, 0), now)
                self.displaced.append(now)
        self._set(shard, wanted, now)
        return ShardHeld(*wanted)

    def _set(self, shard: HostedShard, wanted: tuple[int, int], now: float) -> None:
        shard.first, shard.last = shard.wanted = wanted
        shard.state = "loading" if wanted != (0, 0) else "room"
        shard.ready_at = now + self.load_s

    def pass_time(self, now: float) -> None:
        for shard in self.shards.values():
            if shard.state == "loading" and shard.ready_at <= now:
                shard.state = "ready"

    def advert(self, now: float) -> IslandAdvert:
        offers: list[OfferedCargo] = []
        for cargo in self.offered:
            shard = self.shards[cargo]
            told = ShardRange(
                shard.first,
                shard.last,
                LAYERS,
                self.memory.free_mib(shard, self.shards.values()),
                layer_ns=MILLISECOND_NS,
                idle=self.memory.is_idle(shard, now),
            )
            state: Any = "loading" if shard.state == "loading" else "ready"
            offered = OfferedCargo(cargo, cargo[-4:], "1", "llmcpp", state, 1, 1, 0, 0, 0.0, 0.0, shard=told)
            mib = shard.mib_of(shard.first, shard.last)
            offers.append(msgspec.structs.replace(offered, memory_mib=mib))
        return IslandAdvert("isle", tuple(offers))


class World:
    """Gateways that see the same Islands, and jobs."""

    def __init__(
        self,
        rooms: Sequence[int],
        *,
        gateways: int = 1,
        load_s: float = 5.0,
        offered: tuple[CargoDigest, ...] = (FIRST, SECOND),
        ours: bool = True,
    ) -> None:
        self.now = Instant(SECOND_NS)
        self.sequence = 0
        self.isles = {
            peer: Isle(peer, room, load_s)
            for n, room in enumerate(rooms)
            for peer in [Signer(bytes([n + 1]) * 32).peer]
        }
        for isle in self.isles.values():
            isle.offered = offered
        self.orderers: set[int] = set()
        self.books = [self._book(n, ours=ours) for n in range(gateways)]
        self.pass_time(0.5 if not ours else 6.0)

    @staticmethod
    def _book(seed: int, *, ours: bool) -> tuple[ChainBook, IslandBook[PeerId]]:
        islands: IslandBook[PeerId] = IslandBook(ttl_ns=1 << 62)
        book = ChainBook(
            islands,
            Outlook(),
            me=ME,
            requirements=ANYTHING,
            sharding_of=lambda _: SHARDING,
            rtt_of=lambda a, b: zlib.crc32(f"{seed}{min(a, b)}{max(a, b)}".encode()) % (50 * MILLISECOND_NS),
            dice=Dice(seed),
            ours=lambda _: ours,
        )
        return book, islands

    @property
    def now_s(self) -> float:
        return self.now / SECOND_NS

    def pass_time(self, seconds: float, step_s: float = 1.0) -> None:
        """All gateways look at all they know every second, one after the other."""
        left = seconds
        while left > 0:
            self.now = after(self.now, round(min(step_s, left) * SECOND_NS))
            left -= step_s
            for isle in self.isles.values():
                isle.pass_time(self.now_s)
            self._tell()
            given: list[tuple[ChainBook, str, Order]] = []
            for book, _ in self.books:
                for digest in book.wanted():
                    stepped = book.step(self.now, digest, learning=False)
                    given += [(book, digest, order) for order in stepped.orders]
            for book, digest, order in given:  # all orders of one moment are under way together
                self.orderers.add(next(n for n, (one, _) in enumerate(self.books) if one is book))
                book.answered(self.now, digest, order, self.isles[order.peer].hold(self.now_s, order.hold))
            self._tell()

    def _tell(self) -> None:
        self.sequence += 1
        for _, islands in self.books:
            for isle in self.isles.values():
                islands.admit(self.now, isle.peer, isle.advert(self.now_s), self.sequence)

    def ask(self, cargo: CargoDigest, gateway: int = 0) -> bool:
        """A job; whether it got a chain. Its stages were used."""
        book, _ = self.books[gateway]
        book.note_asked(self.now, cargo)
        placed = book.place(self.now, cargo, WORK, Ask())
        if not isinstance(placed, Assignment) or placed.chain is None:
            return False
        for stage in placed.chain.stages:
            shard = self.isles[PeerId(stage.holder.peer)].shards[cargo]
            assert (shard.state, shard.first, shard.last) == ("ready", stage.first, stage.last)
            shard.used_at = self.now_s
        return True

    def ask_until_served(self, cargo: CargoDigest, limit_s: float, gateway: int = 0) -> float:
        """A consumer that comes again every second."""
        for waited in range(round(limit_s)):
            if self.ask(cargo, gateway):
                return waited
            self.pass_time(1.0)
        raise AssertionError(f"not served within {limit_s} s")

    @property
    def moves(self) -> int:
        return sum(len(isle.displaced) for isle in self.isles.values())

    def ready(self, gateway: int = 0) -> list[CargoDigest]:
        book, _ = self.books[gateway]
        return [cargo for cargo in (FIRST, SECOND) if book.ready_tps(cargo) is not None]


def test_where_there_is_room_for_both_both_are_formed_before_anybody_asks() -> None:
    world = World([120, 120, 120])
    world.pass_time(60)
    assert world.ready() == [FIRST, SECOND]
    assert world.moves == 0


def test_what_does_not_fit_is_not_begun_and_comes_when_it_is_asked_for() -> None:
    world = World([80, 80])
    world.pass_time(60)
    (there,) = world.ready()
    other = SECOND if there == FIRST else FIRST
    assert all(isle.shards[other].wanted == (0, 0) for isle in world.isles.values())
    world.pass_time(IDLE_S)
    assert world.ready() == [there], "idle, and nobody wants the memory"
    assert world.moves == 0
    assert not world.ask(other)
    world.pass_time(20)
    assert world.ready() == [other]
    assert world.ask(other)
    moves = world.moves
    world.pass_time(3 * IDLE_S)
    assert world.ready() == [other], "the first one is not formed again before it is asked for"
    assert world.moves == moves == 2
    assert not world.ask(there)
    world.pass_time(20)
    assert world.ready() == [there]


def test_what_is_used_stays_however_often_the_other_one_is_asked_for() -> None:
    world = World([80, 80])
    world.pass_time(60)
    (there,) = world.ready()
    other = SECOND if there == FIRST else FIRST
    for _ in range(40):
        assert world.ask(there)
        assert not world.ask(other)
        world.pass_time(30)
    assert world.moves == 0
    shortage = world.books[0][0].shortage(other)
    assert shortage is not None
    assert "held for other models" in shortage.detail
    assert world.ask_until_served(other, IDLE_S + 30) > IDLE_S - 60


def test_chains_come_before_spares() -> None:
    world = World([80] * 4)
    world.pass_time(20)
    assert world.ready() == [FIRST, SECOND]


def test_spares_give_way_to_a_chain_that_is_asked_for() -> None:
    """Four Islands: two hold a chain that is used, and two its spares, which nobody uses."""
    world = World([80] * 4, offered=(FIRST,))
    world.pass_time(60)
    assert all(isle.shards[FIRST].state == "ready" for isle in world.isles.values())
    for isle in world.isles.values():
        isle.offered = (FIRST, SECOND)
    for _ in range(round(UNUSED_S / 10) + 2):
        assert world.ask(FIRST)
        world.pass_time(10)
    assert world.ready() == [FIRST], "nobody asked for it"
    assert world.ask_until_served(SECOND, 60) < 30
    assert world.ask(FIRST)
    assert world.ready() == [FIRST, SECOND]


def test_gateways_that_see_the_same_islands_from_afar_do_not_order_at_once() -> None:
    """Six of them, whose plans differ. The first one forms a chain, the others find it."""
    world = World([80] * 3, gateways=6, offered=(FIRST,), ours=False)
    world.pass_time(STAGGER_NS / SECOND_NS + 8, step_s=0.1)
    assert [world.ready(gateway) for gateway in range(6)] == [[FIRST]] * 6
    assert len(world.orderers) == 1
    asked = World([80] * 3, gateways=6, offered=(FIRST,), ours=False)
    assert asked.ask_until_served(FIRST, 20, gateway=5) < 10, "who is asked does not wait"


def test_gateways_that_order_at_once_end_with_one_chain() -> None:
    world = World([80] * 5, gateways=6, offered=(FIRST,))
    world.pass_time(30)
    assert len(world.orderers) > 1
    assert [world.ready(gateway) for gateway in range(6)] == [[FIRST]] * 6


def test_two_gateways_want_one_each() -> None:
    """They see the same Islands and begin at the same moment."""
    world = World([80, 80], gateways=2)
    world.pass_time(10)
    served = [0, 0]
    for _ in range(600):
        for gateway, cargo in enumerate((FIRST, SECOND)):
            served[gateway] += world.ask(cargo, gateway)
        world.pass_time(2)
    assert max(served) > 0
    assert world.moves <= 2 * (1 + 1200 / UNUSED_S)


@settings(max_examples=12, deadline=None)
@given(
    rooms=st.lists(st.integers(50, 170), min_size=2, max_size=4),
    load_s=st.floats(0, 60),
    periods_s=st.tuples(st.integers(5, 400), st.integers(5, 400)),
)
def test_with_constant_demand_memory_changes_hands_seldom(
    rooms: list[int], load_s: float, periods_s: tuple[int, int]
) -> None:
    """Jobs for both come at their own steady pace: no Island lets layers go more often than once in the time
    that unused ones are kept.
    """
    world = World(rooms, load_s=load_s)
    seconds = 900
    for second in range(0, seconds, 5):
        for cargo, period_s in zip((FIRST, SECOND), periods_s, strict=True):
            if second % (period_s - period_s % 5) == 0:
                world.ask(cargo)
        world.pass_time(5, step_s=2.5)
    for isle in world.isles.values():
        gaps = [after - before for before, after in pairwise(isle.displaced)]
        assert all(gap >= UNUSED_S for gap in gaps if gap), "each change of hands lasts"
    assert world.moves <= len(rooms) * (2 + seconds / UNUSED_S)
