"""Kept connections: set-up, order, loss, NAT, and how their end is noticed."""

from __future__ import annotations

import pytest

from sim.connections import ConnectionPolicy, Nat
from sim.links import Links
from sim.world import World

MS = 1_000_000
SECOND = 1_000 * MS
POLICY = ConnectionPolicy(
    kept=2, setup_rtts=2, dial_timeout_ns=3 * SECOND, heartbeat_timeout_ns=SECOND, punch_share=0.0
)


def test_the_first_message_pays_for_the_set_up(toy):
    net = toy(2, connections=POLICY, links=Links.uniform(10 * MS))
    net.say(0, 1, "first", echoes=1)
    net.say(0, 1, "second", at=SECOND)
    net.world.run_until(2 * SECOND)
    assert [when for when, _, _ in net.events] == [50 * MS, 60 * MS, SECOND + 10 * MS]


def test_messages_of_one_connection_stay_in_order(toy):
    net = toy(2, connections=POLICY, links=Links.uniform(10 * MS, jitter_ns=30 * MS, loss=0.2))
    for n in range(200):
        net.say(0, 1, str(n), at=n * MS)
    net.world.run_until(600 * SECOND)
    assert net.heard(1) == [str(n) for n in range(200)]  # none lost either: TCP sends again


def test_dialling_the_dead_fails_after_the_time_out(toy):
    net = toy(2, connections=POLICY)
    net.world.kill(1, silent=True)
    net.say(0, 1)
    net.world.run_until(10 * SECOND)
    assert net.losses(0) == [(3 * SECOND, 1)]


def test_a_host_without_the_program_refuses_at_once(toy):
    net = toy(2, connections=POLICY)
    net.world.kill(1)
    net.say(0, 1)
    net.world.run_until(10 * SECOND)
    assert net.losses(0) == [(100 * MS, 1)]


@pytest.mark.parametrize(("silent", "after_ns"), [(False, 50 * MS), (True, SECOND)])
def test_peers_notice_a_death(toy, silent, after_ns):
    net = toy(3, connections=POLICY)
    net.say(0, 1)
    net.world.run_until(5 * SECOND)
    net.world.kill(1, silent=silent)
    net.world.run_until(20 * SECOND)
    assert net.losses(0) == [(5 * SECOND + after_ns, 1)]
    assert net.losses(2) == []


def test_a_partition_breaks_connections_unless_it_heals_soon(toy):
    net = toy(2, connections=POLICY)
    net.say(0, 1)
    net.world.run_until(5 * SECOND)
    net.world.partition([[0]])
    net.world.run_for(SECOND // 2)
    net.world.heal()
    net.say(0, 1, "again", at=6 * SECOND)
    net.world.run_until(10 * SECOND)
    assert net.heard(1) == ["hello", "again"]
    net.world.partition([[0]])
    net.world.run_until(20 * SECOND)
    assert net.losses(0) == [(11 * SECOND, 1)]
    assert net.losses(1) == [(11 * SECOND, 0)]


def test_the_connection_idle_longest_goes_silently(toy):
    net = toy(4, connections=POLICY)
    for target in (1, 2, 3):
        net.say(0, target, at=target * SECOND)
    net.world.run_until(10 * SECOND)
    kept = net.world.connections
    assert kept is not None
    assert kept.kept_by(0) == (2, 3)
    assert kept.kept_by(1) == ()
    assert [net.losses(n) for n in range(4)] == [[], [], [], []]
    net.say(0, 1, "back", at=10 * SECOND)
    net.world.run_until(20 * SECOND)
    assert net.heard(1) == ["hello", "back"]
    assert kept.dials == 4


def test_disconnect_ends_one_services_stream(toy, hang):
    net = toy(2, connections=POLICY)
    net.say(0, 1)
    net.world.run_until(SECOND)
    net.world.order(0, "toy", hang(1))
    net.world.run_until(2 * SECOND)
    assert net.losses(1) == [(SECOND + 50 * MS, 0)]
    assert net.losses(0) == []


def nat_world(toy, nat, punch_share=0.0):
    net = toy(
        3, connections=ConnectionPolicy(setup_rtts=1, punch_share=punch_share), links=Links.uniform(10 * MS)
    )
    node = net.world.add_node(nat=nat)
    other = net.world.add_node(nat=Nat.NATED)
    for n in (node, other):
        net.world.install(n, "toy", type(net.parrots[0])())
    return net, node, other


def test_who_can_not_be_dialled_answers_over_its_own_connections(toy):
    net, hidden, _ = nat_world(toy, Nat.UNREACHABLE)
    net.say(0, hidden)
    net.world.run_until(10 * SECOND)
    assert net.heard(hidden) == []
    assert [peer for _, peer in net.losses(0)] == [hidden]
    net.say(hidden, 0, "it is me", echoes=1, at=10 * SECOND)
    net.world.run_until(20 * SECOND)
    assert net.heard(0) == ["it is me"]
    assert net.heard(hidden) == ["it is me"]


def test_two_behind_nat_meet_through_a_relay_or_a_hole(toy):
    arrivals = []
    for punch_share in (0.0, 1.0):
        net, a, b = nat_world(toy, Nat.NATED, punch_share)
        net.say(a, b)
        net.say(a, b, at=SECOND)
        net.world.run_until(10 * SECOND)
        assert net.heard(b) == ["hello", "hello"]
        arrivals.append([when for when, _, _ in net.events])
    relayed, punched = arrivals
    assert relayed[1] == SECOND + 20 * MS  # two hops
    assert punched[1] == SECOND + 10 * MS
    assert punched[0] > relayed[0]  # the hole costs another exchange


def test_nat_needs_connections():
    with pytest.raises(ValueError, match="connections"):
        World(1).add_node(nat=Nat.NATED)
