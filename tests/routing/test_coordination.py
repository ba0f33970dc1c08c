"""Islands, coordinators and gateways together: who finds whom, and what happens when a coordinator dies."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from protocol.coordination import AdvertPut, AdvertTaken, Follow, IslandsPushed, PushTaken, SeenIsland
from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.machine import Effect, Received, Send, Woken
from routing import affiliation, following_events
from routing.affiliation import (
    Advertise,
    Affiliated,
    Affiliation,
    AffiliationPolicy,
    Leave,
    NeedCandidates,
    Parted,
    TurnedAway,
)
from routing.candidates import CoordinatorCandidate
from routing.coordinator import Coordinator
from routing.coordinator_events import Identity, LearnCoordinator, Serve, SummaryMade
from routing.following import Follower
from routing.following_events import (
    Find,
    FoundIslands,
    IslandSeen,
    IslandsVouched,
    IslandUnseen,
    Served,
    Unwant,
    Want,
)
from routing.notary import PlainNotary

COORDINATORS = (1, 2, 3, 4)
ISLANDS = tuple(range(10, 22))
GATEWAY = 100


class Town:
    """Four coordinators, twelve Islands, a gateway. Coordinator n is n x 10 ms away."""

    def __init__(self, kit: Any, seed: int = 0, loss: float = 0.0, islands: tuple[int, ...] = ISLANDS) -> None:
        self.kit = kit
        self.cargo = kit.digest("c")
        self.world = kit.World(
            seed, loss=loss, delay_ns=lambda a, b: 5 * MILLISECOND_NS * min(a, b) if min(a, b) < 10 else 10**7
        )
        self.candidates = tuple(CoordinatorCandidate(n, n * 10 * MILLISECOND_NS, n) for n in COORDINATORS)
        for n in COORDINATORS:
            self.world.add(n, self.coordinator(n))
            self.world.order(n, Serve(Identity(f"c{n}", (f"/ip4/10.0.0.{n}/tcp/1",))))
        for n in islands:
            self.world.add(n, self.island(n))
            self.world.order(n, affiliation.FoundCoordinators(self.candidates))
            self.world.order(n, Advertise(kit.advert(f"i{n}")))
        self.world.add(GATEWAY, self.follower())
        self.world.order(GATEWAY, following_events.FoundCoordinators(self.candidates))

    def coordinator(self, n: int) -> Coordinator[int]:
        return Coordinator(n, PlainNotary(n), Dice(n), unix_offset_ns=self.kit.unix_offset_ns)

    def island(self, n: int, policy: AffiliationPolicy | None = None) -> Affiliation[int]:
        def seal(advert: Any, sequence: int, expires: Any) -> Any:
            return PlainNotary(n).seal_advert(advert, sequence=sequence, expires_unix_ns=expires)

        return Affiliation(
            seal, Dice(n), unix_offset_ns=self.kit.unix_offset_ns, policy=policy or AffiliationPolicy()
        )

    def follower(self) -> Follower[int]:
        return Follower(GATEWAY, PlainNotary(GATEWAY), Dice(GATEWAY), unix_offset_ns=self.kit.unix_offset_ns)

    def machine(self, n: int) -> Any:
        return self.world.nodes[n].machines[0]

    def living(self, peers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(p for p in peers if not self.world.nodes[p].dead)

    def known_to_gateway(self) -> set[int]:
        return {island.peer for island in self.machine(GATEWAY).followed.islands(self.cargo)}


def test_islands_choose_the_two_nearest_and_gateways_hear_of_them(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(2 * SECOND_NS)
    for n in ISLANDS:
        assert set(town.machine(n).coordinators) == {1, 2}
        assert len(list(town.world.events(n, Affiliated))) == 2
    assert len(town.machine(1).book) == len(town.machine(2).book) == len(ISLANDS)
    assert town.known_to_gateway() == set(ISLANDS)
    assert town.machine(GATEWAY).coordinators(town.cargo) == (1, 2)
    assert {e.coordinator for e in town.world.events(GATEWAY, Served)} == {1, 2}
    seen = [e.island.peer for e in town.world.events(GATEWAY, IslandSeen)]
    assert sorted(seen) == sorted(ISLANDS)  # once each, though two coordinators tell of them


def test_a_change_reaches_followers_soon_and_islands_stay_while_they_live(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(5 * SECOND_NS)
    busy = kit.advert("i10", kit.offer(active=3))
    town.world.order(10, Advertise(busy))
    assert town.world.run(
        SECOND_NS,
        lambda: town.machine(GATEWAY).followed.get(town.cargo, 10).advert.cargos[0].active == 3,
    )
    town.world.run(300 * SECOND_NS)  # much longer than a signature holds
    assert town.known_to_gateway() == set(ISLANDS)
    assert not list(town.world.events(GATEWAY, IslandUnseen))
    vouched = [at for at, e in town.world.nodes[GATEWAY].events if isinstance(e, IslandsVouched)]
    assert max(b - a for a, b in itertools.pairwise(vouched)) < 5 * SECOND_NS


def test_an_island_that_dies_or_loses_the_cargo_is_unseen(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(2 * SECOND_NS)
    town.world.kill(10)  # silent
    town.world.kill(11, tell_ns=10 * MILLISECOND_NS)  # its links break
    town.world.order(12, Advertise(kit.advert("i12", kit.offer(digest=kit.digest("d")))))
    town.world.order(13, Leave(kit.advert("i13", draining=True)))
    town.world.run(SECOND_NS)
    assert town.known_to_gateway() == set(ISLANDS) - {11, 12}
    assert town.machine(GATEWAY).followed.get(town.cargo, 13).advert.draining
    assert town.world.run(10 * SECOND_NS, lambda: 10 not in town.known_to_gateway())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("told", [True, False])
def test_a_dead_coordinator_is_replaced_within_ten_seconds(kit: Any, seed: int, *, told: bool) -> None:
    """Both coordinators that all Islands and the gateway use die at once, with 10 % loss: within 10 s all
    Islands have two others, and the gateway hears of all of them from others, also of changes.
    """
    town = Town(kit, seed, loss=0.1)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(20 * SECOND_NS)
    assert town.known_to_gateway() == set(ISLANDS)
    before = {n: town.machine(n).coordinators for n in ISLANDS}
    assert all(len(coordinators) == 2 for coordinators in before.values())
    for n in (1, 2):
        town.world.kill(n, tell_ns=50 * MILLISECOND_NS if told else None)

    def healed() -> bool:
        ties_ok = all(set(town.machine(n).coordinators) == {3, 4} for n in ISLANDS)
        follows = town.machine(GATEWAY)
        return (
            ties_ok
            and len(set(follows.coordinators(town.cargo)) & {3, 4}) == 2
            and all(
                (known := follows.followed.get(town.cargo, n)) is not None and set(known.by) == {3, 4}
                for n in ISLANDS
            )
        )

    died = town.world.now
    assert town.world.run(10 * SECOND_NS, healed)
    assert town.world.now - died <= 10 * SECOND_NS
    assert not list(town.world.events(GATEWAY, IslandUnseen))  # nothing was lost meanwhile
    town.world.order(10, Advertise(kit.advert("i10", kit.offer(active=2))))
    assert town.world.run(
        5 * SECOND_NS, lambda: town.machine(GATEWAY).followed.get(town.cargo, 10).advert.cargos[0].active == 2
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_waiting_job_is_served_though_the_coordinators_die(kit: Any, seed: int) -> None:
    """A gateway waits for a Cargo that nobody has; its coordinators die; an Island with the Cargo appears
    elsewhere.
    """
    town = Town(kit, seed, loss=0.1, islands=())
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(5 * SECOND_NS)
    town.world.kill(1)
    town.world.kill(2)
    died = town.world.now
    town.world.add(10, town.island(10))
    town.world.order(10, affiliation.FoundCoordinators(town.candidates))
    town.world.order(10, Advertise(kit.advert("late")))
    assert town.world.run(10 * SECOND_NS, lambda: 10 in town.known_to_gateway())
    assert town.world.now - died <= 10 * SECOND_NS


def test_a_stale_list_of_coordinators_costs_three_seconds_more(kit: Any) -> None:
    """The two next best of the list died long ago; no link tells so, they are only silent."""
    town = Town(kit)
    world = town.world
    for n in (5, 6):
        world.add(n, town.coordinator(n))
        world.order(n, Serve(Identity()))
    world.kill(3)
    world.kill(4)
    more = tuple(CoordinatorCandidate(n, n * 10 * MILLISECOND_NS, n) for n in (5, 6))
    for n in ISLANDS:
        world.order(n, affiliation.FoundCoordinators(more))
    world.order(GATEWAY, following_events.FoundCoordinators(more))
    world.order(GATEWAY, Want(town.cargo))
    world.run(3 * SECOND_NS)
    world.kill(1)
    world.kill(2)
    gateway = town.machine(GATEWAY)
    assert world.run(
        10 * SECOND_NS,
        lambda: (
            all(set(town.machine(n).coordinators) == {5, 6} for n in ISLANDS)
            and all(set(gateway.followed.get(town.cargo, n).by) & {5, 6} for n in ISLANDS)
        ),
    )
    assert not list(world.events(GATEWAY, IslandUnseen))


def test_one_of_two_dies_and_nobody_notices(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(3 * SECOND_NS)
    town.world.kill(1)
    town.world.run(60 * SECOND_NS)
    assert not list(town.world.events(GATEWAY, IslandUnseen))
    for n in ISLANDS:
        assert set(town.machine(n).coordinators) == {2, 3}
    assert [e.reason for e in town.world.events(10, Parted)] == ["silent"]


def test_a_coordinator_that_comes_back_is_used_again(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(3 * SECOND_NS)
    town.world.kill(1)
    town.world.run(20 * SECOND_NS)
    town.world.revive(1, town.coordinator(1))
    town.world.order(1, Serve(Identity("c1")))
    town.world.run(900 * SECOND_NS)
    assert all(set(town.machine(n).coordinators) == {1, 2} for n in ISLANDS)
    assert len(town.machine(1).book) == len(ISLANDS)
    assert len(town.machine(3).book) == 0  # they said good-bye
    assert town.known_to_gateway() == set(ISLANDS)
    assert not list(town.world.events(GATEWAY, IslandUnseen))


def test_a_restarted_coordinator_asks_for_adverts_and_followers_start_anew(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(3 * SECOND_NS)
    town.world.revive(1, town.coordinator(1))  # it forgot everything, and nobody noticed
    town.world.order(1, Serve(Identity("c1")))
    town.world.run(10 * SECOND_NS)
    assert len(town.machine(1).book) == len(ISLANDS)
    known = town.machine(GATEWAY).followed.get(town.cargo, 10)
    assert set(known.by) == {1, 2}
    assert not list(town.world.events(GATEWAY, IslandUnseen))


def test_not_two_coordinators_in_one_network(kit: Any) -> None:
    world = kit.World(delay_ns=lambda a, b: 10**6)
    town = Town(kit, islands=())
    for n in COORDINATORS:
        world.add(n, town.coordinator(n))
        world.order(n, Serve(Identity()))
    world.add(10, town.island(10))
    near = tuple(CoordinatorCandidate(n, n * 10**6, 7 if n < 4 else 9) for n in COORDINATORS)
    world.order(10, affiliation.FoundCoordinators(near))
    world.order(10, Advertise(kit.advert()))
    world.run(SECOND_NS)
    assert set(world.nodes[10].machines[0].coordinators) == {1, 4}
    world.kill(4)
    world.run(10 * SECOND_NS)
    assert set(world.nodes[10].machines[0].coordinators) == {1, 2}  # better than only one


def test_pinned_ones_are_always_told_and_too_few_are_searched_for(kit: Any) -> None:
    world = kit.World()
    town = Town(kit, islands=())
    for n in (1, 2, 3):
        world.add(n, town.coordinator(n))
    world.add(10, town.island(10))
    world.order(10, Advertise(kit.advert()))
    world.run(10 * SECOND_NS)
    searches = len(list(world.events(10, NeedCandidates)))
    assert 3 <= searches <= 6  # at once, then ever more slowly
    pinned = tuple(CoordinatorCandidate(n, None, 0, pinned=True) for n in (1, 2, 3))
    world.order(10, affiliation.FoundCoordinators(pinned))
    world.run(SECOND_NS)
    assert set(world.nodes[10].machines[0].coordinators) == {1, 2, 3}
    world.kill(2)
    world.run(10 * SECOND_NS)
    world.revive(2, town.coordinator(2))
    world.order(10, affiliation.CoordinatorUp(2))
    world.run(SECOND_NS)
    assert set(world.nodes[10].machines[0].coordinators) == {1, 2, 3}


def test_a_gateway_asks_and_is_referred(kit: Any) -> None:
    """The Cargo is only at coordinator 4, which the gateway does not know; coordinator 1 heard of it by
    gossip.
    """
    town = Town(kit, islands=())
    world = town.world
    world.add(10, town.island(10))
    world.order(10, affiliation.FoundCoordinators((CoordinatorCandidate(4),)))
    world.order(10, Advertise(kit.advert("i10", kit.offer(name="rare", version="7"))))
    world.run(15 * SECOND_NS)
    summary = list(world.events(4, SummaryMade))[-1]
    assert [(c.name, c.version, c.islands, c.ready) for c in summary.summary.cargos] == [("rare", "7", 1, 1)]
    world.order(1, LearnCoordinator(summary.envelope))
    world.nodes[GATEWAY].machines[0] = town.follower()
    world.order(GATEWAY, following_events.FoundCoordinators((CoordinatorCandidate(1, 10**7),)))
    for name in ("rare", "rare@7", kit.digest("c")):
        world.order(GATEWAY, Find(1, name))
        world.run(5 * SECOND_NS)
        found = list(world.events(GATEWAY, FoundIslands))[-1]
        assert [i.peer for i in found.islands] == [10]
    world.order(GATEWAY, Find(2, "nobody-has-this"))
    world.run(10 * SECOND_NS)
    found = list(world.events(GATEWAY, FoundIslands))[-1]
    assert (found.ticket, found.islands) == (2, ())
    # Following it leads to coordinator 4 as well: its summary says that it has the Cargo.
    world.order(GATEWAY, Want(town.cargo))
    assert world.run(SECOND_NS, lambda: town.known_to_gateway() == {10})


def test_a_question_to_the_dead_ends(kit: Any) -> None:
    town = Town(kit)
    town.world.run(2 * SECOND_NS)
    for n in (1, 2, 3):
        town.world.kill(n)
    town.world.order(GATEWAY, Find(5, "m"))
    town.world.run(8 * SECOND_NS)
    found = list(town.world.events(GATEWAY, FoundIslands))
    assert [(f.ticket, f.asked) for f in found] == [(5, 1)]


def test_a_followed_cargo_that_is_no_longer_wanted_is_left(kit: Any) -> None:
    town = Town(kit)
    town.world.order(GATEWAY, Want(town.cargo))
    town.world.run(2 * SECOND_NS)
    town.world.order(GATEWAY, Unwant(town.cargo))
    town.world.run(SECOND_NS)
    assert town.known_to_gateway() == set()
    assert len(list(town.world.events(GATEWAY, IslandUnseen))) == len(ISLANDS)
    assert town.machine(1).follows == town.machine(2).follows == 0
    before = town.world.messages
    for n in ISLANDS:
        town.world.kill(n)
    for n in COORDINATORS:
        town.world.kill(n)
    town.world.run(60 * SECOND_NS)
    assert town.world.messages == before  # the gateway has nothing to say


# --- clocks and liars ------------------------------------------------------------------------------


def test_an_island_whose_clock_is_behind_says_so_and_is_back_when_it_is_set(kit: Any) -> None:
    """As after a night's sleep: the clock of instants stood still, so what is signed has expired long ago."""
    town = Town(kit, islands=())
    world, machine = town.world, town.island(10)
    machine.set_clock(kit.unix_offset_ns - 8 * 3600 * SECOND_NS)
    world.add(10, machine)
    world.order(10, affiliation.FoundCoordinators(town.candidates))
    world.order(10, Advertise(kit.advert("i10")))
    world.run(20 * SECOND_NS)
    assert machine.coordinators == ()
    refusals = list(world.events(10, TurnedAway))
    assert {refusal.peer for refusal in refusals} == set(COORDINATORS)
    assert {(refusal.code, refusal.detail) for refusal in refusals} == {("invalid", "the envelope has expired")}
    machine.set_clock(kit.unix_offset_ns)
    world.at(world.now, lambda: world._feed(10, 0, Woken()))
    assert world.run(2 * SECOND_NS, lambda: set(machine.coordinators) == {1, 2})


def test_a_clock_that_is_set_back_takes_nothing_from_anybody(kit: Any) -> None:
    town = Town(kit, islands=(10,))
    world = town.world
    town.machine(1).set_clock(kit.unix_offset_ns + 3600 * SECOND_NS)
    world.at(world.now, lambda: world._feed(1, 0, Woken()))
    world.run(30 * SECOND_NS)
    first = list(world.events(1, SummaryMade))[-1].envelope
    for n in (1, 10):
        town.machine(n).set_clock(kit.unix_offset_ns)
        world.at(world.now, lambda n=n: world._feed(n, 0, Woken()))
    world.run(SECOND_NS)
    again = list(world.events(1, SummaryMade))[-1].envelope
    assert again.sequence > first.sequence  # or others would keep the former one
    assert again.expires_unix_ns < first.expires_unix_ns
    world.run(600 * SECOND_NS)  # it moves slowly to what is nearer
    assert set(town.machine(10).coordinators) == {1, 2}


def test_two_islands_with_one_identity_are_told_apart_from_a_clock_set_back(kit: Any) -> None:
    town = Town(kit, islands=())
    world = town.world
    island, twin = town.island(10), town.island(10)
    world.add(10, island, twin)  # what is for one, both hear, as on a link that one took from the other
    for index, name in enumerate(("one", "other")):
        world.order(10, affiliation.FoundCoordinators(town.candidates[:1]), index)
        world.order(10, Advertise(kit.advert(name)), index)
        world.run(SECOND_NS)
    world.run(60 * SECOND_NS)
    assert any("another machine" in parted.reason for parted in world.events(10, Parted))
    assert world.messages < 2000


class Liar:
    """A coordinator that answers what a test wants."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.heard: list[Any] = []

    def receive(self, now: Instant, what: Any) -> list[Effect[int, Any, Any]]:
        if isinstance(what, Received):
            self.heard.append(what.message)
            return [Send(what.peer, message) for message in self.answer(what.message)]
        return []

    def next_wake(self) -> None:
        return None


@pytest.mark.parametrize("ahead", [None, 1, 3600 * SECOND_NS * 2])
def test_a_coordinator_that_confirms_other_numbers_costs_a_few_adverts(kit: Any, ahead: int | None) -> None:
    def confirm(message: Any) -> list[Any]:
        if not isinstance(message, AdvertPut):
            return []
        number = 1 if ahead is None else message.envelope.sequence + ahead
        return [AdvertTaken(message.call, number)] * 3

    town = Town(kit, islands=())
    world, liar = town.world, Liar(confirm)
    world.add(1, liar)
    world.add(10, town.island(10))
    world.order(10, affiliation.FoundCoordinators((CoordinatorCandidate(1, 1),)))
    world.order(10, Advertise(kit.advert("i10")))
    world.run(20 * SECOND_NS)
    assert (
        1 <= len([m for m in liar.heard if isinstance(m, AdvertPut)]) <= 45
    )  # two a second, as if it were silent
    assert len(town.world.nodes[10].events) < 50


def test_a_liar_is_not_forgiven_because_it_connects_anew(kit: Any) -> None:
    def forge(message: Any) -> list[Any]:
        if not isinstance(message, Follow):
            return []
        advert = PlainNotary(10).seal_advert(kit.advert(), sequence=1, expires_unix_ns=UnixNs(1 << 62))
        forged = msgspec.structs.replace(advert, signature=bytes([1]) * 64)
        return [IslandsPushed(message.call, message.cargo, (SeenIsland(forged),), ())]

    town = Town(kit, islands=())
    world, liar = town.world, Liar(forge)
    world.add(1, liar)
    world.order(GATEWAY, Want(town.cargo))
    world.run(5 * SECOND_NS)
    assert len(liar.heard) < 5
    for _ in range(20):
        world.order(GATEWAY, following_events.CoordinatorUp(1))
        world.run(SECOND_NS)
    assert len(liar.heard) < 5
    assert town.machine(GATEWAY).coordinators(town.cargo) == (2, 3)


def test_a_coordinator_that_shows_and_shows_is_left(kit: Any) -> None:
    """Every push is in order, and each costs as many signatures to check as one push may hold."""
    islands = tuple(
        SeenIsland(PlainNotary(n).seal_advert(kit.advert(), sequence=1, expires_unix_ns=UnixNs(1 << 62)))
        for n in range(1000, 1128)
    )

    def show(message: Any) -> list[Any]:
        if not isinstance(message, Follow):
            return []
        return [IslandsPushed(1000 * message.call + i, message.cargo, islands, ()) for i in range(200)]

    town = Town(kit, islands=())
    world, liar = town.world, Liar(show)
    world.add(1, liar)
    world.order(GATEWAY, Want(town.cargo))
    world.run(10 * SECOND_NS)
    assert "floods" in [lost.reason for lost in world.events(GATEWAY, following_events.CoordinatorLost)]
    assert len([m for m in liar.heard if isinstance(m, PushTaken)]) <= 140
    assert town.machine(GATEWAY).coordinators(town.cargo) == (2, 3)


def test_same_seed_same_story(kit: Any) -> None:
    def story() -> list[Any]:
        town = Town(kit, 5, loss=0.2)
        town.world.order(GATEWAY, Want(town.cargo))
        town.world.run(10 * SECOND_NS)
        town.world.kill(1)
        town.world.run(30 * SECOND_NS)
        return [repr(node.events) for node in town.world.nodes.values()] + [
            town.world.messages,
            town.world.bytes,
        ]

    assert story() == story()
