"""The simulator against reality: the same lookups in 30 real nodes and in 30 simulated ones.

Real: `archi-node` processes, each in a network namespace of its own, with delays between them as a synthetic
geography says (bench/lab). Simulated: the same peer ids, the same delays, the same policy, the same lookups at
the same times, with what the real nodes were measured to cost: the round trips and the time that a connection
takes, and the processor time of a message.

Two figures for each: lookups soon after joining, when many links have to be opened first ("cold"), and lookups
once they are open ("warm").
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from bench.figures import header, median, percentile
from bench.lab import Lab, LabUnavailable
from bench.networks.base import LookupResult, Network
from bench.networks.processes import ProcessNetwork, Spawner
from bench.networks.simulated import SimulatedNetwork
from dht.events import FindClosest, Found, PutRecord
from node.config import LogSettings
from node.identity import Identity, load_or_create_identity, new_identity
from node.logs import set_up_logs
from node.overlay.membership import RECORD_SETTLE_S
from node.overlay.overlay import NODE_POLICY
from node.overlay.records import PeerRecord, seal_peer_record
from node.p2p import open_host, parse_peer_address
from node.peers import open_peers
from protocol.adverts import Hello
from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from sim.connections import ConnectionPolicy
from sim.draws import Draws, Stream
from sim.links import Links

#: The simulator is believed within this.
GOAL = 0.15

#: Lookups per second: so few that they do not wait for each other's processor time.
RATE = 5.0

#: From the last start to the first lookup.
SETTLE_S = 20.0

#: Simulated networks of different draws that are pooled: one real network is one draw, too, of course.
SIM_SEEDS = (1, 2, 3, 4, 5)

#: Real nodes go a little before other programs on this machine: it is the network that is
#: compared, not the neighbours.
PREFERRED = ("nice", "-n", "-10")

#: More than a node can have in a network of 30.
_LINKS_KEPT = 512


@dataclass(frozen=True, slots=True)
class Lookup:
    """`at_s`: since the end of settling."""

    at_s: float
    asker: int
    key: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured of real nodes: a connection's round trips and other time, a message's processor time."""

    setup_rtts: int
    setup_ms: float
    service_us: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`delays_ms[i][j]`: one way."""

    delays_ms: list[list[float]]
    k: int
    cold: list[Lookup]
    warming: list[Lookup]
    warm: list[Lookup]

    @property
    def nodes(self) -> int:
        return len(self.delays_ms)


def make_plan(seed: int, nodes: int, k: int, lookups: int) -> Plan:
    """Places drawn by the simulator's synthetic geography; lookups of random keys from random nodes."""
    links = Links.geography(seed)
    dice = Draws(seed, Stream.PLACES)
    places = [(links.draw_site(dice), links.draw_access_ns(dice)) for _ in range(nodes)]
    delays = [
        [
            0.0 if i == j else (links.table[a * links.sites + b] + access_a + access_b) / MILLISECOND_NS
            for j, (b, access_b) in enumerate(places)
        ]
        for i, (a, access_a) in enumerate(places)
    ]
    draw = Dice(seed, stream=4711)

    def some(count: int, start_s: float) -> list[Lookup]:
        keys = [sum(draw.u64() << (64 * word) for word in range(4)) for _ in range(count)]
        return [
            Lookup(start_s + n / RATE, n % nodes if n < nodes else draw.below(nodes), key)
            for n, key in enumerate(keys)
        ]

    cold = some(2 * nodes, 0.0)
    warming = some(lookups, cold[-1].at_s + 5)
    return Plan(delays, k, cold, warming, some(lookups, warming[-1].at_s + 5))


# --- real -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What lookups took, in their order."""

    took_ms: list[float]
    queries: list[int]
    failures: int
    missing: int

    @staticmethod
    def of(plan: Plan, net: Network, lookups: Sequence[Lookup], found: Sequence[LookupResult]) -> Outcome:
        missing = sum(
            len(set(net.closest(lookup.key, plan.k, but=lookup.asker)) - set(result.peers))
            for lookup, result in zip(lookups, found, strict=True)
        )
        return Outcome(
            [result.took_ms for result in found],
            [result.queries for result in found],
            sum(result.failures for result in found),
            missing,
        )


@dataclass(slots=True)
class Real:
    """`idle`: lookups without any delay. `cpu_s`: processor time of all nodes in the warm phase."""

    identities: list[Identity]
    cold: Outcome
    warm: Outcome
    idle: Outcome
    cpu_s: float
    late_p99_us: int


async def run_real(plan: Plan, folder: Path, spawner: Spawner, lab: Lab) -> Real:
    with ProcessNetwork(spawner, folder, settings={"overlay.k": plan.k}, lab=lab) as net:
        await net.join(plan.nodes)
        await net.settle(min(plan.k, plan.nodes - 1), within_s=120)
        await net.wait(SETTLE_S)
        began = trio.current_time()
        cold = await _ask_all(net, plan.cold, began)
        await _ask_all(net, plan.warming, began)
        cpu = _cpu_s(net.pids)
        warm = await _ask_all(net, plan.warm, began)
        cpu = _cpu_s(net.pids) - cpu
        late = lab.figures().late_p99_us
        lab.set_delays(0)
        await net.wait(5)
        idle = [dataclasses.replace(lookup, at_s=n / RATE) for n, lookup in enumerate(plan.warm[:150])]
        without = await _ask_all(net, idle, trio.current_time())
        return Real(
            [load_or_create_identity(net.identity_file(peer)) for peer in range(plan.nodes)],
            Outcome.of(plan, net, plan.cold, cold),
            Outcome.of(plan, net, plan.warm, warm),
            Outcome.of(plan, net, idle, without),
            cpu,
            late,
        )


async def _ask_all(net: Network, lookups: Sequence[Lookup], began: float) -> list[LookupResult]:
    """Each at its time, whatever became of the one before."""
    found: dict[int, LookupResult] = {}

    async def ask(number: int, lookup: Lookup) -> None:
        await trio.sleep_until(began + lookup.at_s)
        found[number] = await net.find_closest(lookup.asker, lookup.key)

    async with trio.open_nursery() as nursery:
        for number, lookup in enumerate(lookups):
            nursery.start_soon(ask, number, lookup)
    return [found[number] for number in range(len(lookups))]


def _cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


# --- what a connection costs ------------------------------------------------------------------------


def measure_dials(spawner: Spawner, folder: Path) -> tuple[int, float]:
    """Round trips and further milliseconds until a link is there: dials with and without delay."""
    delay_ms = 40.0

    def dial_ms(lab: Lab, address: str) -> float:
        argv = [*PREFERRED, sys.executable, "-m", "bench.validation", "--dial", address]
        dialler = lab.run(1, argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        words = dialler.communicate()[0].split()
        return median([float(word) for word in words])

    async def measure() -> tuple[float, float]:
        with Lab(0.0, nodes=2) as lab, ProcessNetwork(spawner, folder, settings={}, lab=lab) as net:
            await net.join(1)
            address = await net.address(0)
            fixed = dial_ms(lab, address)
            lab.set_delays(delay_ms)
            return fixed, dial_ms(lab, address)

    fixed_ms, delayed_ms = trio.run(measure)
    return round((delayed_ms - fixed_ms) / (2 * delay_ms)), fixed_ms


async def _dial(address: str, count: int = 9) -> None:
    """Links to a peer, one after the other, each over a new connection by a new identity."""
    _, peer = parse_peer_address(address)
    for number in range(count):
        async with (
            open_host(new_identity(), ()) as host,
            open_peers(host, hello=Hello("dialler", "0", ()), dice=Dice(number)) as peers,
        ):
            began = time.perf_counter()
            await peers.reach(peer, [address])
            if number:  # the first pays for what is done once
                print(f"{(time.perf_counter() - began) * 1e3:.3f}", flush=True)


# --- simulated ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Simulated:
    cold: Outcome
    warm: Outcome


def run_simulated(plan: Plan, identities: Sequence[Identity], costs: Costs, seed: int) -> Simulated:
    """The same network, virtually; everything that costs time is as measured."""
    net = _network(plan, identities, costs, seed, plan.delays_ms)
    cold, warm = _at(net, plan.cold), _at(net, plan.warm)
    _at(net, plan.warming)
    net.world.run_for(round((plan.warm[-1].at_s + 30) * SECOND_NS))
    return Simulated(
        Outcome.of(plan, net, plan.cold, _results(net, cold)),
        Outcome.of(plan, net, plan.warm, _results(net, warm)),
    )


def calibrate(plan: Plan, real: Real, setup_rtts: int, setup_ms: float) -> Costs:
    """The processor time of a message, such that lookups without any delay take as long as they really did."""
    lookups = plan.warm[: len(real.idle.took_ms)]
    nothing = [[0.0] * plan.nodes for _ in range(plan.nodes)]
    wanted_ms = median(real.idle.took_ms)
    low, high = 0.0, 20_000.0
    for _ in range(8):
        middle = (low + high) / 2
        costs = Costs(setup_rtts, setup_ms, middle)
        net = _network(plan, real.identities, costs, SIM_SEEDS[0], nothing)
        tickets = _at(net, [dataclasses.replace(lookup, at_s=n / RATE) for n, lookup in enumerate(lookups)])
        net.world.run_for(round((len(lookups) / RATE + 10) * SECOND_NS))
        took_ms = median([result.took_ms for result in _results(net, tickets)])
        low, high = (middle, high) if took_ms < wanted_ms else (low, middle)
    return Costs(setup_rtts, setup_ms, (low + high) / 2)


def _network(
    plan: Plan, identities: Sequence[Identity], costs: Costs, seed: int, delays_ms: list[list[float]]
) -> SimulatedNetwork:
    """Joined and settled."""
    nodes = plan.nodes
    table = [round(delays_ms[i][j] * MILLISECOND_NS) for i in range(nodes) for j in range(nodes)]
    links = Links(table, [f"node {n}" for n in range(nodes)], [1] * nodes)
    policy = dataclasses.replace(NODE_POLICY, k=plan.k)
    connections = ConnectionPolicy(
        kept=_LINKS_KEPT, setup_rtts=costs.setup_rtts, setup_ns=round(costs.setup_ms * MILLISECOND_NS)
    )
    net = SimulatedNetwork(
        seed, policy, links=links, connections=connections, service_ns=round(costs.service_us * 1000)
    )
    world = net.world
    for peer, identity in enumerate(identities):
        net.add(signer=identity.signer, site=peer, access_ns=0)
        joins_at = Instant(world.now + peer * 20 * MILLISECOND_NS)
        if peer:
            net.begin_join(peer, joins_at)
        # As node/overlay/membership.py does it: everybody puts a record about itself soon after joining.
        now = UnixNs(world.unix_start_ns + world.now)
        record = seal_peer_record(identity.signer, PeerRecord((f"/ip4/10.99.0.{peer}/tcp/4001",)), now)
        put_at = Instant(joins_at + round((RECORD_SETTLE_S + 1) * SECOND_NS))
        net.begin(peer, lambda ticket, record=record: PutRecord(ticket, record), put_at)
    world.run_for(round((SETTLE_S + 10) * SECOND_NS))
    return net


def _at(net: SimulatedNetwork, lookups: Sequence[Lookup]) -> list[int]:
    """Order them, each at its time from now on; their tickets."""
    now = net.world.now
    return [
        net.begin(
            lookup.asker,
            lambda ticket, key=lookup.key: FindClosest(ticket, key),
            Instant(now + round(lookup.at_s * SECOND_NS)),
        )
        for lookup in lookups
    ]


def _results(net: SimulatedNetwork, tickets: Sequence[int]) -> list[LookupResult]:
    results: list[LookupResult] = []
    for ticket in tickets:
        found = net.ended(ticket)
        assert isinstance(found, Found), "a simulated lookup did not end"
        results.append(net.result_of(found))
    return results


# --- report ---------------------------------------------------------------------------------------


def _row(name: str, outcome: Outcome) -> None:
    took = outcome.took_ms
    print(
        f"{name:<22}{len(took):>8}{percentile(took, 0.5):>10.1f}{percentile(took, 0.9):>10.1f}"
        f"{sum(outcome.queries) / len(took):>10.2f}{outcome.failures:>10}{outcome.missing:>10}"
    )


def _pooled(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        [ms for outcome in outcomes for ms in outcome.took_ms],
        [count for outcome in outcomes for count in outcome.queries],
        sum(outcome.failures for outcome in outcomes),
        sum(outcome.missing for outcome in outcomes),
    )


def _compare(what: str, real: Outcome, simulated: Sequence[Outcome]) -> bool:
    """Print both; whether they agree within GOAL."""
    pooled = _pooled(simulated)
    _row(f"{what}, real", real)
    _row(f"{what}, simulated", pooled)
    ratios = [percentile(pooled.took_ms, share) / percentile(real.took_ms, share) for share in (0.5, 0.9)]
    each = [
        [percentile(outcome.took_ms, share) / percentile(real.took_ms, share) for outcome in simulated]
        for share in (0.5, 0.9)
    ]
    spread = "; ".join(
        f"p{percent} {ratio - 1:+.1%} (seeds {min(of_each) - 1:+.1%} to {max(of_each) - 1:+.1%})"
        for percent, ratio, of_each in zip((50, 90), ratios, each, strict=True)
    )
    # The same lookup in both: how far apart are the two, whatever the distributions say?
    apart = median(
        [
            abs(ms - there) / there
            for outcome in simulated
            for ms, there in zip(outcome.took_ms, real.took_ms, strict=True)
        ]
    )
    print(f"{what}, simulated against real: {spread}; one and the same lookup: {apart:.1%} apart (median)\n")
    return all(abs(ratio - 1) <= GOAL for ratio in ratios)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench validation", description=__doc__)
    parser.add_argument("--nodes", type=int, default=30)
    parser.add_argument("--k", type=int, default=20, help="bucket size; small: lookups take several hops")
    parser.add_argument("--lookups", type=int, default=300, help="warm ones; as many more warm them up")
    parser.add_argument("--seed", type=int, default=1, help="of places and lookups")
    parser.add_argument("--dial", metavar="ADDRESS", help="another process of the benchmark; used by itself")
    arguments = parser.parse_args(argv)
    if arguments.dial:
        set_up_logs(LogSettings(level="warning"))
        trio.run(_dial, arguments.dial)
        return 0
    plan = make_plan(arguments.seed, arguments.nodes, arguments.k, arguments.lookups)
    header(f"simulator against reality: {plan.nodes} nodes, k = {plan.k}")
    try:
        with tempfile.TemporaryDirectory() as folder, Spawner(PREFERRED) as spawner:
            setup_rtts, setup_ms = measure_dials(spawner, Path(folder) / "dials")
            with Lab(plan.delays_ms) as lab:
                real = trio.run(run_real, plan, Path(folder) / "real", spawner, lab)
    except LabUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    costs = calibrate(plan, real, setup_rtts, setup_ms)
    rtts = [2 * plan.delays_ms[i][j] for i in range(plan.nodes) for j in range(i)]
    print(f"round trips between nodes: p50 {median(rtts):.0f} ms, p90 {percentile(rtts, 0.9):.0f} ms")
    print(f"a connection: {setup_rtts} round trips and {setup_ms:.1f} ms (measured)")
    print(
        f"a lookup without any delay: p50 {median(real.idle.took_ms):.1f} ms (measured); "
        f"hence {costs.service_us:.0f} us for a message"
    )
    print(
        f"processor time of all nodes while warm: {real.cpu_s / (len(plan.warm) / RATE):.2f} s a second; "
        f"packets late by {real.late_p99_us} us at most (p99)\n"
    )
    print(
        f"{'lookups':<22}{'count':>8}{'p50 ms':>10}{'p90 ms':>10}{'queries':>10}{'failures':>10}{'missing':>10}"
    )
    simulated = [run_simulated(plan, real.identities, costs, seed) for seed in SIM_SEEDS]
    warm = _compare("warm", real.warm, [one.warm for one in simulated])
    cold = _compare("cold", real.cold, [one.cold for one in simulated])
    print(f"within {GOAL:.0%}: warm {'yes' if warm else 'NO'}, cold {'yes' if cold else 'NO'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
