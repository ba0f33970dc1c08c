"""Peers that flood, lie, withhold and replay: they gain nothing, and what they cost is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from dht import events as e
from dht import limits
from dht import messages as m
from dht.coordinates import pack
from dht.policy import DhtPolicy
from dht.records import NAMESPACE_KARMA, RecordBody, seal_record
from protocol.instants import MILLISECOND_NS, SECOND_NS, UnixNs
from protocol.machine import Received, Send

UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS
Answer = Iterable[tuple[int, m.DhtMessage]]


def inventor(world, near: int, *, count: int = 20) -> Callable[[int, m.DhtMessage], Answer]:
    """Answers every query with fresh inventions ever closer to the target; nobody stands behind them."""
    made = [0]

    def answer(asker: int, query: m.DhtMessage) -> Answer:
        if isinstance(query, m.Ping):
            return [(asker, m.Pong(query.call, near, 1, False))]
        target = getattr(query, "target", getattr(query, "key", 0))
        fakes = []
        for _ in range(count):
            made[0] += 1
            fake = world.book.add(target ^ (1 << 120) - made[0])
            world.dead.add(fake)
            fakes.append(fake)
        return [(asker, m.Nodes(query.call, near, 1, False, tuple(fakes), (near,) * count))]

    return answer


def test_inventors_slow_lookups_down_but_do_not_stop_them(network, key) -> None:
    world = network(60)
    for liar in range(6):
        world.liars[liar] = inventor(world, 0)
    right = 0
    for i in range(10, 20):
        target = key(f"t{i}")
        world.order_of(i, e.FindClosest(i, target))
        found = world.result(i, i)
        truth = world.closest(target, 20, without=[i])
        right += found.closest[0] == truth[0] or world.closest(target, 1)[0] in range(6)
        assert found.cost.queries <= DhtPolicy().max_queries
        assert found.cost.took_ns < 30 * SECOND_NS
    assert right >= 9


def test_inventions_do_not_stay_in_tables_nor_spread(network, key) -> None:
    world = network(40)
    honest = len(world.book.keys)
    for liar in range(4):
        world.liars[liar] = inventor(world, 0)
    for round_ in range(5):
        for i in range(10, 20):
            world.order_of(i, e.FindClosest(100 * round_ + i, key(f"{round_} {i}")))
        world.run(10)
    told = [
        peer
        for n, machine in world.machines.items()
        if n not in world.liars
        for target in (key("a"), key("b"))
        for peer in (machine.table.peers[p] for p in machine.table.closest(target, 20, told=True))
    ]
    assert told
    assert max(told) < honest
    sizes = [len(machine.table) for machine in world.machines.values()]
    assert max(sizes) <= 20 * 12
    world.run(400)
    held = [p for n, machine in world.machines.items() if n not in world.liars for p in machine.table.peers]
    assert sum(p >= honest for p in held) <= 0.1 * len(held)


def test_a_liar_with_huge_lists_costs_no_more_than_k_contacts(network) -> None:
    world = network(10)
    crowd = tuple(world.book.add() for _ in range(5000))
    world.dead.update(crowd)

    def answer(asker: int, query: m.DhtMessage) -> Answer:
        return [
            (asker, m.Nodes(query.call, 0, 1, False, crowd, (0,) * 7))
        ]  # fewer coordinates than contacts too

    world.liars[3] = answer
    for i in range(20):
        world.order_of(1, e.FindClosest(i, world.book.keys[crowd[i]]))
    world.run(30)
    assert len(world.machines[1].table) <= 200
    assert world.machines[1].open_operations == 0
    assert world.machines[1].open_calls <= 40


def test_withholding_peers_do_not_hide_what_others_tell(network, signer) -> None:
    """The seven closest holders answer like everyone else but keep silent about records."""
    world = network(60)
    expires = UnixNs(UNIX_OFFSET_NS + world.now + 7200 * SECOND_NS)
    record = seal_record(signer("a"), NAMESPACE_KARMA, "x", b"v", sequence=1, expires_unix_ns=expires)
    where = RecordBody(NAMESPACE_KARMA, "x", b"").key
    world.order_of(30, e.PutRecord(1, record))
    world.result(30, 1)
    world.run(3)
    for liar in world.closest(where, 7):
        machine = world.machines[liar]

        def silent(asker: int, query: m.DhtMessage, machine=machine, liar=liar) -> Answer:
            if isinstance(query, m.FindRecords):
                plain = m.FindNode(query.call, query.coordinate, query.error, query.client, query.key)
                effects = machine.receive(world.now, Received(asker, plain))
                for effect in effects:
                    if isinstance(effect, Send) and effect.peer == asker:
                        nodes = effect.message
                        yield asker, m.Records(nodes.call, 0, 1, False, nodes.contacts, nodes.coordinates, ())

        world.liars[liar] = silent
    honest_holders = [
        n for n, machine in world.machines.items() if machine.stored_records and n not in world.liars
    ]
    assert honest_holders
    reader = next(n for n in world.machines if n not in world.liars and n not in honest_holders)
    world.order_of(reader, e.GetRecords(5, where, quorum=1))
    found = world.result(reader, 5)
    assert found.records == (record,)
    assert found.cost.queries <= 60


def test_replayed_and_forged_records_are_not_given_back(network, signer) -> None:
    world = network(30)
    expires = UnixNs(UNIX_OFFSET_NS + world.now + 7200 * SECOND_NS)
    where = RecordBody(NAMESPACE_KARMA, "x", b"").key
    old, new = (
        seal_record(signer("a"), NAMESPACE_KARMA, "x", b"v", sequence=s, expires_unix_ns=expires)
        for s in (1, 2)
    )
    elsewhere = seal_record(signer("a"), NAMESPACE_KARMA, "y", b"v", sequence=9, expires_unix_ns=expires)
    forged = m.Envelope(new.issuer, new.kind, 77, expires, new.body, new.signature)
    world.order_of(3, e.PutRecord(1, new))
    world.result(3, 1)
    world.run(2)
    liars = [n for n in world.closest(where, 12) if n not in {3, 4}][:8]
    for liar in liars:
        world.liars[liar] = lambda asker, q: [
            (asker, m.Records(q.call, 0, 1, False, (), (), (old, elsewhere, forged)))
            if isinstance(q, m.FindRecords)
            else (asker, m.Pong(q.call, 0, 1, False))
        ]
    world.order_of(4, e.GetRecords(2, where, quorum=5))
    found = world.result(4, 2)
    assert found.records in {(new,), (old,)}
    assert forged not in found.records
    assert elsewhere not in found.records
    # Whoever holds the new one does not take the old one back.
    holder = next(n for n, machine in world.machines.items() if machine.stored_records and n not in world.liars)
    effects = world.do(holder, Received(liars[0], m.Store(1, 0, 1, False, old)))
    (kept,) = [x.message for x in effects if isinstance(x, Send)]
    assert kept.outcome == m.Outcome.OLDER


def test_storage_far_from_the_key_is_refused(network) -> None:
    world = network(100, settle=40)
    target = 1 << 255
    order = world.closest(target, 100)
    outcomes = {}
    for node in order:
        effects = world.do(
            node,
            Received(order[node == order[0]], m.AddProvider(1, 0, 1, False, target)),
        )
        (kept,) = [x.message for x in effects if isinstance(x, Send) and isinstance(x.message, m.Kept)]
        outcomes[node] = m.Outcome(kept.outcome)
    assert all(outcomes[node] is m.Outcome.TAKEN for node in order[:20])
    assert sum(outcomes[node] is m.Outcome.NOT_CLOSE for node in order[60:]) >= 34


def test_one_peer_cannot_fill_a_node_with_provider_records(network) -> None:
    world = network(5)
    for i in range(3 * limits.MAX_KEYS_PER_PROVIDER):
        world.now += SECOND_NS // 10
        world.do(2, Received(3, m.AddProvider(i, 0, 1, False, i << 200)))
    assert world.machines[2].stored_providers <= limits.MAX_KEYS_PER_PROVIDER


def test_providers_named_by_a_liar_are_bounded(network) -> None:
    world = network(6)
    crowd = tuple(world.book.add() for _ in range(3000))
    for liar in range(1, 5):
        world.liars[liar] = lambda asker, q: [
            (asker, m.Providers(q.call, 0, 1, False, (), (), crowd, (0,) * len(crowd)))
        ]
    world.order_of(0, e.FindProviders(1, 99, wanted=1 << 30))
    assert len(world.result(0, 1).providers) <= 256


def test_a_table_is_not_taken_over_by_a_crowd_of_near_machines(network) -> None:
    """300 identities of one network, all a millisecond away, get their group's share of a table."""
    world = network(40, settle=60)
    group = 4242
    sybils = [world.book.add() for _ in range(300)]
    here = world.machines[5].coordinate
    for sybil in sybils:
        world.book.groups[sybil] = group
        world.liars[sybil] = lambda asker, q: (
            [(asker, m.Nodes(q.call, here, 1, False, (), ()))]
            if isinstance(q, m.FindNode)
            else [(asker, m.Pong(q.call, here, 1, False))]
        )
    for i, sybil in enumerate(sybils):
        world.do(5, Received(sybil, m.FindNode(i, here, 1, False, i << 240)))
        world.run(1)
    taken = [p for p in world.machines[5].table.peers if p in set(sybils)]
    assert len(taken) <= DhtPolicy().max_group_per_table
    assert len([p for p in world.machines[5].table.peers if p < 40]) >= 35


def test_liars_about_coordinates_hurt_only_themselves(network) -> None:
    world = network(40, settle=200)
    for liar in range(4):
        world.liars[liar] = lambda asker, q: [
            (asker, m.Pong(q.call, pack(-400 * MILLISECOND_NS, 0, 0, 0), 0, False))
        ]
    world.run(400)
    machines = [machine for n, machine in world.machines.items() if n not in world.liars]
    assert sum(machine.coordinate_error for machine in machines) / len(machines) < 0.3


@pytest.mark.parametrize("call", [0, 1, 2, 7, 1 << 52])
def test_no_message_raises_whatever_it_says(network, call: int) -> None:
    world = network(8)
    huge = (1 << 63) - 1
    ones = tuple(range(8))
    record = m.Envelope(b"", "x", -5, huge, b"\xff" * 10, b"")
    texts: list[m.DhtMessage] = [
        m.Pong(call, huge, 0, True),
        m.Nodes(call, huge, 1000, False, ones * 8, (huge,)),
        m.Records(call, 0, 0, False, ones, (), (record,) * 9),
        m.Providers(call, 1, 1, False, (), (), ones, ()),
        m.Kept(call, 0, 0, False, 99),
        m.Page(call, 0, 0, False, ones, (), True),
        m.Differences(call, 0, 0, False, (5, 255)),
        m.Store(call, 0, 0, False, record),
        m.GetPage(call, 0, 0, False, 5, 3),
        m.CompareTables(call, 0, 0, False, (1, 2, 3)),
        m.FindRecords(call, huge, 1000, True, 0),
    ]
    for _ in range(3):
        for text in texts:
            world.do(1, Received(2, text))
    world.run(5)
    world.order_of(1, e.FindClosest(1, 5))
    assert world.result(1, 1).closest
