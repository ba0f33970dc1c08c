"""What attacks on karma bring, against honest work: one machine each, eight weeks, the same coordinators.

A deterministic loop over the real parts (KarmaWitness, KarmaStore, trust, KarmaPolicy). Five honest
coordinators state what they see, verify samples of each other's statements, and share all statements. Each
machine is offered an hour of one-minute jobs an hour by two of them; an Island is paid for a job if the
coordinator holds it for monetizable and the job's output is not found to be junk. One job in twenty is
audited, before it is paid. Computing a job costs the machine half of its price; junk costs nothing. Run:
python -m bench attacks
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bench.figures import header, row
from protocol.dice import Dice
from protocol.instants import UnixNs
from routing.karma import HOUR_UNITS, Counters, KarmaPolicy, Statement
from routing.karma_store import KarmaStore
from routing.karma_witness import KarmaWitness
from routing.trust import FULL

POLICY = KarmaPolicy()
HOURS = 8 * 7 * 24
HOUR_NS = 3_600 * 10**9
START = 80_000 * POLICY.epoch_ns
HONEST = 5  # coordinators 0..4
JOBS_PER_HOUR = 60
AUDITED_PERCENT = 5
COST_PERCENT = 50  # of a job's price: electricity, wear, and what else the machine could do
VERIFIED_UNITS = HOUR_UNITS // 4  # what a coordinator replays of another's statements in an hour


class Network:
    """The honest coordinators, and whoever else states something."""

    def __init__(self, seed: int) -> None:
        self.dice = Dice(seed)
        self.hour = 0
        self.witnesses = [KarmaWitness[int](i, POLICY, restate_ns=HOUR_NS) for i in range(HONEST)]
        # Each believes itself and the next two, fully: what an operator's configuration names.
        self.stores = [
            KarmaStore[int](i, {(i + 1) % HONEST: FULL, (i + 2) % HONEST: FULL}, POLICY) for i in range(HONEST)
        ]
        self._names = iter(range(1_000, 1_000_000))

    @property
    def now(self) -> UnixNs:
        return UnixNs(START + self.hour * HOUR_NS)

    @property
    def epoch(self) -> int:
        return POLICY.epoch_at(self.now)

    def identity(self) -> int:
        return next(self._names)

    def points_mpt(self, coordinator: int, island: int) -> int:
        return self.stores[coordinator].points_mpt(island, self.epoch)

    def best_mpt(self, island: int) -> int:
        return max(self.points_mpt(coordinator, island) for coordinator in range(HONEST))

    def state(self, statement: Statement[int]) -> None:
        for store in self.stores:
            store.merge(statement, self.epoch)

    def end_hour(self) -> None:
        """Coordinators verify each other, restate, and all learn all."""
        for i, witness in enumerate(self.witnesses):
            other = (i + 1 + self.hour % (HONEST - 1)) % HONEST
            witness.saw(self.now, other, attested_units=VERIFIED_UNITS)
        self.hour += 1
        for witness in self.witnesses:
            for statement in witness.due(self.now, limit=1_000):
                self.state(statement)

    def run(self, machine: Callable[[Network, Machine], Iterator[None]], name: str) -> Machine:
        one = Machine(name)
        steps = machine(self, one)
        for _ in range(HOURS):
            next(steps)
            self.end_hour()
        return one


@dataclass
class Machine:
    """What one machine did and got, in jobs."""

    name: str
    worked: int = 0
    paid: int = 0
    identities: dict[int, None] = field(default_factory=dict[int, None])
    top_mpt: int = 0

    def income(self) -> float:
        """In hours' prices."""
        return (self.paid - self.worked * COST_PERCENT / 100) / JOBS_PER_HOUR


def work(net: Network, machine: Machine, island: int, jobs: int, junk_percent: int) -> bool:
    """Jobs by two coordinators; junk is returned at this rate. True if it was caught."""
    caught = False
    machine.identities[island] = None
    for coordinator in (0, 1):
        payable = POLICY.monetizable(net.points_mpt(coordinator, island))
        done = passed = lies = 0
        for _ in range(jobs // 2):
            audited = net.dice.below(100) < AUDITED_PERCENT
            if net.dice.below(100) < junk_percent:
                if audited:
                    lies += 1
                    break  # no more jobs for a proven liar
                machine.paid += payable
            else:
                passed += audited
                machine.worked += 1
                machine.paid += payable
            done += 1
        units = done * HOUR_UNITS // JOBS_PER_HOUR
        if done or lies:
            net.witnesses[coordinator].saw(net.now, island, work_units=units, audits_passed=passed, lies=lies)
        caught = caught or lies > 0
    machine.top_mpt = max(machine.top_mpt, net.best_mpt(island))
    return caught


# --- strategies: each yields once an hour ---------------------------------------------------------


def honest(net: Network, machine: Machine) -> Iterator[None]:
    island = net.identity()
    while True:
        work(net, machine, island, JOBS_PER_HOUR, 0)
        yield


def free_rider(net: Network, machine: Machine) -> Iterator[None]:
    """Junk from the first job; a new name when caught."""
    island = net.identity()
    while True:
        if work(net, machine, island, JOBS_PER_HOUR, 100):
            island = net.identity()
        yield


def whitewash(net: Network, machine: Machine) -> Iterator[None]:
    """Honest up to the threshold, then junk until caught, then a new name."""
    island = net.identity()
    while True:
        ready = POLICY.monetizable(min(net.points_mpt(0, island), net.points_mpt(1, island)))
        if work(net, machine, island, JOBS_PER_HOUR, 100 if ready else 0):
            island = net.identity()
        yield


def sleeper(net: Network, machine: Machine) -> Iterator[None]:
    """Honest until nothing more can be saved up, then junk as long as anybody pays, then a new name."""
    island, betrays = net.identity(), False
    while True:
        betrays = betrays or min(net.points_mpt(0, island), net.points_mpt(1, island)) >= 40_000
        work(net, machine, island, JOBS_PER_HOUR, 100 if betrays else 0)
        if betrays and not POLICY.monetizable(net.best_mpt(island)):
            island, betrays = net.identity(), False
        yield


def now_and_then(net: Network, machine: Machine) -> Iterator[None]:
    """One job in fifty is junk; a new name when caught."""
    island = net.identity()
    while True:
        ready = POLICY.monetizable(min(net.points_mpt(0, island), net.points_mpt(1, island)))
        if work(net, machine, island, JOBS_PER_HOUR, 2 if ready else 0):
            island = net.identity()
        yield


def sybil(net: Network, machine: Machine) -> Iterator[None]:
    """Thirty names on one machine, honest work in turns; each praises all others."""
    names = [net.identity() for _ in range(30)]
    while True:
        island = names[net.hour % len(names)]
        work(net, machine, island, JOBS_PER_HOUR, 0)
        praise(net, names, names)
        yield


def ring(net: Network, machine: Machine) -> Iterator[None]:
    """Thirty names, each coordinator and Island, credit each other with all there is, and return junk. Caught
    ones get new names.
    """
    names = [net.identity() for _ in range(30)]
    while True:
        at = net.hour % len(names)
        praise(net, names, names)
        if work(net, machine, names[at], JOBS_PER_HOUR, 100):
            names[at] = net.identity()
        yield


def sleeping_coordinator(net: Network, machine: Machine) -> Iterator[None]:
    """Four weeks of true statements backed by the machine's own work, verified by the honest; then it credits
    thirty names with all there is, and they return junk. The honest go on verifying, and find nothing behind
    its words.
    """
    coordinator = net.identity()
    names = [net.identity() for _ in range(30)]
    while True:
        if net.hour < HOURS // 2:
            machine.worked += JOBS_PER_HOUR
            net.witnesses[net.hour % HONEST].saw(net.now, coordinator, attested_units=VERIFIED_UNITS)
        else:
            net.witnesses[net.hour % HONEST].saw(net.now, coordinator, lies=1)
            praise(net, [coordinator], names)
            at = net.hour % len(names)
            if work(net, machine, names[at], JOBS_PER_HOUR, 100):
                names[at] = net.identity()
        yield


def slander(net: Network, machine: Machine) -> Iterator[None]:
    """Honest work; and thirty names of its own call its rival a liar."""
    names = [net.identity() for _ in range(30)]
    island = net.identity()
    while True:
        work(net, machine, island, JOBS_PER_HOUR, 0)
        accuse(net, names, RIVAL)
        yield


def trusted_slander(net: Network, machine: Machine) -> Iterator[None]:
    """The same by one coordinator whose statements the honest verified for four weeks, as often as each
    other's. Failures can not be verified, so it is never found out.
    """
    coordinator = net.identity()
    while True:
        machine.worked += JOBS_PER_HOUR
        net.witnesses[net.hour % HONEST].saw(net.now, coordinator, attested_units=VERIFIED_UNITS)
        if net.hour >= HOURS // 2:
            accuse(net, [coordinator], RIVAL)
        yield


RIVAL = 999


def praise(net: Network, issuers: list[int], subjects: list[int]) -> None:
    """All the credit there is, from each issuer to each subject, renewed once an epoch."""
    if net.hour % 6:
        return
    said = Counters(work_units=10**15, attested_units=10**15)
    for issuer in issuers:
        for subject in subjects:
            if issuer != subject:
                net.state(Statement(issuer, subject, POLICY.sequence_at(net.now), said))


def accuse(net: Network, issuers: list[int], subject: int) -> None:
    if net.hour % 6:
        return
    for issuer in issuers:
        net.state(Statement(issuer, subject, POLICY.sequence_at(net.now), Counters(failures=10**6)))


STRATEGIES: dict[str, Callable[[Network, Machine], Iterator[None]]] = {
    "honest": honest,
    "free-rider": free_rider,
    "whitewash": whitewash,
    "sleeper": sleeper,
    "now and then": now_and_then,
    "sybil, 30 names": sybil,
    "collusion ring, 30": ring,
    "sleeping coordinator": sleeping_coordinator,
}


def rival_points(strategy: Callable[[Network, Machine], Iterator[None]] | None, seed: int) -> list[float]:
    """Points of an honest rival in the eyes of each honest coordinator, under a slanderer."""
    net = Network(seed)

    def both(net: Network, machine: Machine) -> Iterator[None]:
        steps = strategy(net, machine) if strategy else None
        rival = Machine("rival")
        while True:
            work(net, rival, RIVAL, JOBS_PER_HOUR, 0)
            if steps is not None:
                next(steps)
            yield

    net.run(both, "rival")
    return [net.points_mpt(i, RIVAL) / 1000 for i in range(HONEST)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attacks")
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args(arguments).seed
    header("attacks on karma: one machine, eight weeks; honest work = 1.00")
    row("strategy", "paid h", "worked h", "paid/worked", "income h", "income ratio", "names", "top karma")
    base: Machine | None = None
    for name, strategy in STRATEGIES.items():
        one = Network(seed).run(strategy, name)
        base = base or one
        per_hour = one.paid / one.worked if one.worked else float(one.paid > 0)
        row(
            name,
            f"{one.paid / JOBS_PER_HOUR:.0f}",
            f"{one.worked / JOBS_PER_HOUR:.0f}",
            f"{per_hour / (base.paid / base.worked):.2f}",
            f"{one.income():.1f}",
            f"{one.income() / base.income():.2f}",
            f"{len(one.identities)}",
            f"{one.top_mpt / 1000:.1f}",
        )
    print("\n  an honest rival's karma, lowest and highest in the eyes of the five coordinators")
    for name, attack in (
        ("unmolested", None),
        ("slandered by 30 names", slander),
        ("by a coordinator verified for weeks", trusted_slander),
    ):
        points = rival_points(attack, seed)
        row(name, f"{min(points):.1f}", f"{max(points):.1f}", "paid" if min(points) >= 10 else "NOT PAID")
    return 0
