"""Machines talking to machines: join, find, put, get, provide, time-outs, losses."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dht import events as e
from dht import messages as m
from dht.limits import MAX_QUERIES_PER_WINDOW
from dht.policy import DhtPolicy
from dht.records import NAMESPACE_KARMA, NAMESPACE_PEER, RecordBody, seal_record
from protocol.envelope import Envelope, Signer
from protocol.instants import MILLISECOND_NS, SECOND_NS, UnixNs
from protocol.machine import Emit, Received, Send, WakeAt

UNIX_OFFSET_NS = 1_800_000_000 * SECOND_NS
Signers = Callable[[str], Signer]


def record(signer: Signer, name: str, *, sequence: int = 1, ttl_s: int = 7200, now: int = 0) -> Envelope:
    expires = UnixNs(UNIX_OFFSET_NS + now + ttl_s * SECOND_NS)
    return seal_record(signer, NAMESPACE_KARMA, name, b"v", sequence=sequence, expires_unix_ns=expires)


# --- alice and bob ----------------------------------------------------------------------------------


@pytest.fixture
def pair(new_world):
    world = new_world()
    alice, bob = world.add(DhtPolicy()), world.add(DhtPolicy())
    world.order_of(bob, e.Join(()))
    return world, alice, bob


def test_a_join_to_one_peer(pair) -> None:
    world, alice, bob = pair
    world.order_of(alice, e.Join((bob,)))
    world.run(2)
    assert (alice, e.Joined(1)) in world.events
    entry = next(iter(world.machines[alice].table))
    assert entry.peer == bob
    assert entry.verified
    assert entry.rtt_ns == pytest.approx(world.rtt_ns(alice, bob), rel=0.01)
    world.run(10)  # bob heard alice ask, and has pinged it since
    (entry,) = world.machines[bob].table
    assert entry.peer == alice
    assert entry.verified


def test_a_join_to_nobody_is_told(new_world) -> None:
    world = new_world()
    alice, gone = world.add(DhtPolicy()), world.add(DhtPolicy())
    world.dead.add(gone)
    world.order_of(alice, e.Join((gone,)))
    world.run(20)
    assert world.events == [(alice, e.Joined(0))]
    assert world.machines[alice].open_calls == 0


def test_an_order_of_a_lonely_node_ends(new_world, signer: Signers) -> None:
    world = new_world()
    alice = world.add(DhtPolicy())
    world.order_of(alice, e.FindClosest(1, 5))
    world.order_of(alice, e.GetRecords(2, 5))
    world.order_of(alice, e.FindProviders(3, 5))
    world.order_of(alice, e.Provide(4, 5))
    world.order_of(alice, e.PutRecord(5, record(signer("a"), "x")))
    tickets = [event.ticket for _, event in world.events]
    assert tickets == [1, 2, 3, 4, 5]
    assert all(getattr(event, "copies", 0) == 0 for _, event in world.events)


def test_a_query_is_answered_and_measured(pair) -> None:
    world, alice, bob = pair
    effects = world.do(bob, Received(alice, m.FindNode(9, 0, 1000, False, 77)))
    answer = next(x for x in effects if isinstance(x, Send))
    assert answer.peer == alice
    assert isinstance(answer.message, m.Nodes)
    assert answer.message.call == 9
    assert alice not in answer.message.contacts


def test_an_answer_that_does_not_come_costs_a_bounded_time(pair) -> None:
    world, alice, bob = pair
    world.order_of(alice, e.Join((bob,)))
    world.run(2)
    world.dead.add(bob)
    world.order_of(alice, e.FindClosest(1, 5))
    found = world.result(alice, 1, seconds=DhtPolicy().max_timeout_ns / SECOND_NS + 1)
    assert isinstance(found, e.Found)
    assert found.closest == ()
    assert found.cost.failures == 1


def test_a_broken_connection_ends_waiting_at_once(pair) -> None:
    world, alice, bob = pair
    world.order_of(alice, e.Join((bob,)))
    world.run(2)
    world.dead.add(bob)
    world.order_of(alice, e.FindClosest(1, 5))
    before = world.now
    world.lose(alice, bob)
    assert world.result(alice, 1).closest == ()
    assert world.now - before < 100 * MILLISECOND_NS
    world.lose(alice, bob)  # the second look failed too
    assert len(world.machines[alice].table) == 0


def test_losing_strangers_changes_nothing(pair) -> None:
    world, alice, _bob = pair
    world.book.add()
    world.lose(alice, 2)
    assert len(world.machines[alice].table) == 0


def test_wrong_late_and_unasked_answers_are_ignored(pair) -> None:
    world, alice, bob = pair
    stranger = world.book.add()
    world.order_of(alice, e.Join((bob,)))
    sent = world.queue[0][3].message.call if isinstance(world.queue[0][3], Received) else 1
    # The right number from the wrong peer, and a number never given.
    for peer, call in ((stranger, sent), (bob, 999_999)):
        world.do(alice, Received(peer, m.Nodes(call, 0, 1000, False, (stranger,), (0,))))
    assert len(world.machines[alice].table) == 0
    # The wrong kind of answer counts as none.
    world.do(alice, Received(bob, m.Pong(sent, 0, 1000, False)))
    world.run(1)
    assert (alice, e.Joined(0)) in world.events


def test_our_own_messages_and_contacts_are_ignored(pair) -> None:
    world, alice, bob = pair
    assert not [x for x in world.do(alice, Received(alice, m.Ping(1, 0, 0, False))) if isinstance(x, Send)]
    world.liars[bob] = lambda asker, q: [(asker, m.Nodes(q.call, 0, 9, False, (alice, alice, bob), (0, 0, 0)))]
    world.order_of(alice, e.Join((bob,)))
    world.run(3)
    assert [entry.peer for entry in world.machines[alice].table] == [bob]


def test_wakes_are_told_once_and_come_true(pair) -> None:
    world, alice, bob = pair
    world.order_of(alice, e.Join((bob,)))
    machine = world.machines[alice]
    for _ in range(200):
        wake = machine.next_wake()
        assert wake is not None
        at = next((at for at, _, who, _ in sorted(world.queue) if who == alice and at <= wake), None)
        assert at is not None, "nobody would wake it"
        world.run(0.25)


# --- clients ----------------------------------------------------------------------------------------


def test_a_client_asks_but_stands_in_no_table(network) -> None:
    world = network(20)
    client = world.add(DhtPolicy(), client=True)
    world.order_of(client, e.Join((3,)))
    world.run(20)
    assert len(world.machines[client].table) == 20
    assert all(client not in machine.table.peers for n, machine in world.machines.items() if n != client)
    world.order_of(client, e.Provide(1, 77))
    world.run(5)
    world.order_of(4, e.FindProviders(2, 77))
    assert world.result(4, 2).providers == (client,)
    world.do(client, Received(5, m.AddProvider(1, 0, 0, False, 78)))
    assert world.machines[client].stored_providers == 0


def test_who_becomes_unreachable_leaves_the_tables_and_returns(network) -> None:
    world = network(12)
    world.order_of(5, e.SetReachable(False))
    assert world.machines[5].client
    world.run(120)
    assert not [n for n, machine in world.machines.items() if n != 5 and 5 in machine.table.peers]
    world.order_of(5, e.SetReachable(True))
    world.run(60)
    holders = [n for n, machine in world.machines.items() if n != 5 and 5 in machine.table.peers]
    assert len(holders) == 11


# --- networks ---------------------------------------------------------------------------------------


def test_lookups_find_the_closest(network, key) -> None:
    world = network(120, settle=30)
    shared = 0
    for i in range(12):
        target = key(f"target {i}")
        world.order_of(i, e.FindClosest(i, target))
        found = world.result(i, i)
        truth = world.closest(target, 20, without=[i])
        assert found.closest[:3] == tuple(truth[:3])
        shared += len(set(found.closest) & set(truth))
        assert 1 <= found.cost.hops <= 5
        assert found.cost.queries <= 25
    assert shared >= 0.95 * 12 * 20


def test_the_own_neighbourhood_is_known(network) -> None:
    world = network(100, settle=60)
    complete = 0
    for node, machine in world.machines.items():
        own = world.book.keys[node]
        known = [machine.table.peers[place] for place in machine.table.closest(own, 20)]
        complete += len(set(known) & set(world.closest(own, 20, without=[node])))
    assert complete >= 0.97 * 20 * 100


def test_what_is_put_is_got(network, signer: Signers) -> None:
    world = network(60)
    one, two = record(signer("a"), "x", now=world.now), record(signer("b"), "x", now=world.now)
    world.order_of(3, e.PutRecord(1, one))
    world.order_of(4, e.PutRecord(2, two))
    assert world.result(3, 1).copies >= 15
    world.result(4, 2)
    world.run(3)
    where = RecordBody(NAMESPACE_KARMA, "x", b"").key
    for reader in (10, 20, 30):
        world.order_of(reader, e.GetRecords(reader, where, quorum=2))
        assert set(world.result(reader, reader).records) == {one, two}
    holders = [n for n, machine in world.machines.items() if machine.stored_records]
    assert len(set(holders) & set(world.closest(where, 20))) >= 17


def test_a_newer_record_wins_wherever_the_old_one_lies(network, signer: Signers) -> None:
    world = network(40)
    old, new = (record(signer("a"), "x", sequence=i, now=world.now) for i in (1, 2))
    world.order_of(3, e.PutRecord(1, old))
    world.result(3, 1)
    world.run(2)
    world.order_of(9, e.PutRecord(2, new))
    world.result(9, 2)
    world.run(2)
    where = RecordBody(NAMESPACE_KARMA, "x", b"").key
    world.order_of(20, e.GetRecords(5, where, quorum=3))
    assert world.result(20, 5).records == (new,)


def test_an_invalid_record_is_not_put(network, signer: Signers) -> None:
    world = network(5)
    good = record(signer("a"), "x", now=world.now)
    forged = Envelope(good.issuer, good.kind, 2, good.expires_unix_ns, good.body, good.signature)
    world.order_of(1, e.PutRecord(1, forged))
    assert world.result(1, 1).copies == 0
    me = signer("me")
    body = RecordBody(NAMESPACE_PEER, "somebody else", b"")
    stolen = me.seal("dht-record", body, sequence=1, expires_unix_ns=good.expires_unix_ns)
    world.order_of(1, e.PutRecord(2, stolen))
    assert world.result(1, 2).copies == 0
    world.do(2, Received(1, m.Store(1, 0, 0, False, forged)))
    assert world.machines[2].stored_records == 0


def test_what_is_provided_is_found_until_it_expires(network) -> None:
    policy = DhtPolicy(provider_ttl_ns=120 * SECOND_NS, provide_interval_ns=40 * SECOND_NS)
    world = network(50, policy)
    for provider in (3, 7):
        world.order_of(provider, e.Provide(provider, 1 << 255))
        assert world.result(provider, provider).copies >= 15
    world.run(300)  # longer than a record lives: it is told again
    world.order_of(20, e.FindProviders(1, 1 << 255))
    assert set(world.result(20, 1).providers) == {3, 7}
    world.order_of(3, e.Withdraw(1 << 255))
    world.dead.add(7)
    world.run(200)
    world.order_of(21, e.FindProviders(2, 1 << 255))
    assert world.result(21, 2).providers == ()
    assert sum(machine.stored_providers for n, machine in world.machines.items() if n != 7) <= 50


def test_records_are_told_again_to_those_who_come_later(network, signer: Signers) -> None:
    policy = DhtPolicy(republish_interval_ns=60 * SECOND_NS)
    world = network(30, policy)
    put = record(signer("a"), "x", now=world.now)
    where = RecordBody(NAMESPACE_KARMA, "x", b"").key
    world.order_of(3, e.PutRecord(1, put))
    world.result(3, 1)
    world.run(5)
    world.dead.update(n for n, machine in world.machines.items() if machine.stored_records and n != 3)
    world.run(90)
    live = [n for n in world.machines if n not in world.dead]
    world.order_of(live[-1], e.GetRecords(2, where))
    assert world.result(live[-1], 2).records == (put,)


def test_a_cancelled_order_says_nothing(network) -> None:
    world = network(20)
    world.order_of(1, e.FindClosest(9, 123))
    assert world.machines[1].open_operations == 1
    world.order_of(1, e.Cancel(9))
    assert world.machines[1].open_operations == 0
    world.run(10)
    assert not [event for _, event in world.events if getattr(event, "ticket", None) == 9]


def test_enough_providers_end_a_search(network) -> None:
    world = network(40)
    for provider in range(10):
        world.order_of(provider, e.Provide(provider, 99))
        world.result(provider, provider)
    world.run(2)
    world.order_of(30, e.FindProviders(50, 99, wanted=1))
    assert len(world.result(30, 50).providers) >= 1


def test_a_partition_heals(network) -> None:
    world = network(40)
    half = set(range(20))
    world.blocked = lambda a, b: (a in half) != (b in half)
    world.run(240)
    across = sum(p in half for n in range(20, 40) for p in world.machines[n].table.peers)
    assert across < 20
    world.blocked = lambda _a, _b: False
    for node in (1, 2):
        world.order_of(node, e.Join((39,)))
    world.run(240)
    world.order_of(5, e.FindClosest(1, world.book.keys[30]))
    assert world.result(5, 1).closest[0] == 30


# --- death ------------------------------------------------------------------------------------------


def test_a_minute_after_a_third_died_hardly_any_dead_entry_is_left(network) -> None:
    world = network(100, settle=60)
    dead = {n for n in range(100) if n % 10 in {0, 3, 6}}
    world.dead |= dead
    live = [machine for n, machine in world.machines.items() if n not in dead]
    world.sent.clear()
    world.run(60)
    entries = [peer for machine in live for peer in machine.table.peers]
    assert len(entries) > 50 * len(live)
    assert sum(peer in dead for peer in entries) <= 0.05 * len(entries)
    # What it cost: the tables were swept about twice, not more.
    assert world.sent["Ping"] < 6 * len(entries)
    world.run(120)
    assert all(machine.ping_interval_ns > 2 * SECOND_NS for machine in live)


def test_a_lost_packet_is_not_a_death(network) -> None:
    world = network(20, settle=60)
    sizes = [len(machine.table) for machine in world.machines.values()]
    count = [0]

    def lossy(a: int, b: int) -> bool:
        count[0] += 1
        return count[0] % 40 == 0

    world.blocked = lossy
    world.run(300)
    assert sum(len(machine.table) for machine in world.machines.values()) >= 0.97 * sum(sizes)


def test_a_quiet_network_is_quiet(network) -> None:
    world = network(30, settle=1500)
    world.sent.clear()
    world.run(300)
    per_minute = sum(world.sent.values()) / 30 / 5
    assert per_minute < 55
    assert world.sent["Ping"] / 30 / 5 <= 20.5


# --- the same again ---------------------------------------------------------------------------------


def history(new_world) -> str:
    world = new_world(5)
    world.log = []
    for _ in range(25):
        world.add(DhtPolicy(full_table=True))
    world.join_all(range(25), settle=5)
    world.order_of(3, e.Provide(1, 99))
    world.order_of(4, e.FindProviders(2, 99))
    world.dead.add(7)
    world.run(40)
    return hashlib.sha256("\n".join(world.log).encode()).hexdigest()


def test_the_same_seed_makes_the_same_history_whatever_the_hash_seed(new_world) -> None:
    here = history(new_world)
    assert here == history(new_world)
    script = (
        "import importlib.util, sys\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "def load(name, path):\n"
        "    spec = importlib.util.spec_from_file_location(name, path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    sys.modules[name] = module\n"
        "    spec.loader.exec_module(module)\n"
        "    return module\n"
        f"conftest = load('conf', {str(Path(__file__).parent / 'conftest.py')!r})\n"
        f"tests = load('tests_of_machine', {__file__!r})\n"
        "print(tests.history(conftest.World))\n"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_effects_are_what_an_interpreter_expects(pair) -> None:
    world, alice, bob = pair
    world.log = []
    world.order_of(alice, e.Join((bob,)))
    for effect in world.do(bob, Received(alice, m.Ping(1, 0, 0, False))):
        assert isinstance(effect, Send | WakeAt | Emit)


def test_a_flood_from_one_peer_is_not_answered(pair) -> None:
    world, alice, bob = pair
    answers = 0
    for i in range(3 * MAX_QUERIES_PER_WINDOW):
        effects = world.do(bob, Received(alice, m.FindNode(i, 0, 1000, False, i)))
        answers += any(isinstance(x, Send) and x.peer == alice for x in effects)
    assert answers <= MAX_QUERIES_PER_WINDOW
    world.run(11)
    effects = world.do(bob, Received(alice, m.FindNode(1, 0, 1000, False, 1)))
    assert any(isinstance(x, Send) for x in effects)
