"""What makes large networks cheap: events by day, tables at rest in columns; and how far a run has come."""

from __future__ import annotations

from heapq import heappop

import pytest

from dht.keys import KEY_BITS
from dht.table import MAX_BUCKETS
from protocol.dice import Dice
from sim import Scenario, run
from sim.agenda import DAY_BITS, Agenda
from sim.draws import BulkDraws
from sim.record import Recorder
from sim.rest_tables import REST_POOL, RestTables
from sim.studies.dht import DhtStudy

SECOND = 1_000_000_000


def test_events_come_in_order_however_they_were_put_down():
    dice, agenda, now = Dice(7), Agenda(), 0
    come, put = [], 0
    spans = (1, 1 << DAY_BITS, 50_000_000, 3 * SECOND)
    for _ in range(200):
        agenda.push((dice.below(SECOND), put))
        put += 1
    while len(come) < put:
        event = heappop(agenda.today or agenda.next_day())
        come.append(event)
        now = event[0]
        for _ in range(dice.below(3) if put < 3000 else 0):  # on the same day, the next, later; some at once
            agenda.push((now + dice.below(spans[dice.below(4)]), put))
            put += 1
    assert put == len(come) >= 3000
    assert come == sorted(come)
    with pytest.raises(IndexError):
        agenda.next_day()


def study(nodes, **changes):
    scenario = Scenario.load("dht-100k", nodes=nodes, changes={"storm.0.nodes": 0, **changes})
    return DhtStudy(scenario.variants[0][1], scenario.folder, Recorder("base"), lambda what, share: None)


def plainly(network, node, dice):
    """A table at rest as it is described, an entry at a time: (peer, round trip in ns) by bucket."""
    serving, key, policy, world = network.serving, network.directory.keys[node], network.policy, network.world
    depth = {peer: min(KEY_BITS - (key ^ other).bit_length(), MAX_BUCKETS - 1) for other, peer in serving}
    buckets = []
    members = [peer for _, peer in serving]
    for bit in range(MAX_BUCKETS - 1):
        if len(members) <= policy.k:
            break
        here = [peer for peer in members if depth[peer] == bit]
        members = [peer for peer in members if depth[peer] > bit]
        pool = policy.k * REST_POOL if policy.rtt_aware else policy.k
        if len(here) > policy.k:
            if len(here) > pool:
                drawn = [here[u32 * len(here) >> 32] for u32 in dice.u32s(pool + pool // 4)]
                here = list(dict.fromkeys(drawn))[:pool]
            if policy.rtt_aware:
                first, rest = here[: policy.senior_entries], here[policy.senior_entries :]
                rest.sort(key=lambda peer: (world.rtt_ns(node, peer), peer))
                here = first + rest
            here = here[: policy.k]
        buckets.append(here)
    buckets.append([peer for peer in members if peer != node][: policy.k])
    return [[(peer, world.rtt_ns(node, peer)) for peer in bucket] for bucket in buckets]


@pytest.mark.parametrize(
    ("nodes", "policy"),
    [
        (900, {}),  # the first bucket is drawn, with many draws that name the same node twice
        (900, {"rtt_aware": False}),
        (400, {"k": 3, "senior_entries": 3}),
        (400, {"k": 4, "senior_entries": 0}),
        (15, {}),  # one bucket holds all
    ],
)
def test_tables_at_rest_are_those_described(nodes, policy):
    made = study(nodes, **{f"dht.policy.{name}": value for name, value in policy.items()})
    for _ in range(nodes):
        made._add_node()
    network = made.network
    network.build_tables()
    coordinates = {node: network.machine(node).coordinate for node in range(nodes)}
    tables = RestTables(network.world, network.policy, network.serving, coordinates, measured=True)
    left, right = BulkDraws(5), BulkDraws(5)
    for node in range(0, nodes, 7):
        table = network.machine(node).table
        tables.fill(table, node, network.directory.keys, left)
        wanted = plainly(network, node, right)
        assert list(table.starts) == [sum(map(len, wanted[:i])) for i in range(len(wanted) + 1)]
        entries = [entry for bucket in wanted for entry in bucket]
        assert list(table.peers) == [peer for peer, _ in entries]
        assert list(table.rtts_us) == [max(rtt_ns // 1000, 1) for _, rtt_ns in entries]
        assert list(table.coordinates) == [coordinates[peer] for peer, _ in entries]
        for peer, _ in entries:
            assert table.find(peer) >= 0


@pytest.mark.parametrize("bootstrap", ["join", "built"])
def test_progress_only_grows_and_comes_to_the_end(bootstrap):
    told = []
    changes = {"dht.bootstrap": bootstrap, "dht.join_every_ms": 40, "world.duration_s": 5, "dht.settle_s": 5}
    scenario = Scenario.load("dht-100k", nodes=100, changes={**changes, "storm.0.nodes": 0, "world.slices": 5})
    result = run(scenario, progress=lambda what, share: told.append((what, share)))
    assert result.complete
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0.6 < shares[-1] <= 1.0
    assert told[-1][0] in ("measuring", "waiting for the last answers")
