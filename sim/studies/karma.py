"""Karma under attack: do lies, rings and fresh names pay?

Production's machines and rules: each coordinator runs a gossip machine over the world's links, a witness that
counts what it saw, and a store that weighs statements by trust. Work is a model: each hour every machine gets
an hour of jobs from two coordinators drawn by lot; some are audited before they are paid; a coordinator pays
who is monetizable in its own eyes. Computing costs a machine half of what honest work is paid; junk costs
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import Fault, ProtocolError
from protocol.instants import SECOND_NS, Instant, UnixNs, seconds_to_ns
from routing.gossip import GossipMachine
from routing.gossip_messages import GOSSIP_CODEC, METHOD_GOSSIP, AddPeer, Item, Learnt, Opening, Publish
from routing.gossip_peers import GossipPolicy, KindPolicy
from routing.karma import HOUR_UNITS, MAX_COUNTER, Counters, KarmaPolicy, Past, Statement
from routing.karma_store import KarmaStore
from routing.karma_witness import KarmaWitness
from routing.trust import FULL
from sim.build import NodeMaker, Progress, build_world, run_in_slices
from sim.codecs import use_codec
from sim.config import ScenarioSettings
from sim.draws import Draws, Stream, machine_stream
from sim.karma_actors import SYBIL_NAMES, Actor
from sim.record import Recorder, mean, quantile
from sim.settings import ScenarioError
from sim.world import World

GOSSIP: Final = "gossip"
KIND: Final = "karma"

_GOSSIP_SERVICE: Final = 3
_HOUR_NS: Final = 3600 * SECOND_NS

#: Neighbours of a gossiping node; a small network is a full mesh.
_NEIGHBOURS: Final = 8

#: Comparisons in quiet times: production's 32 s would be most of a simulated month's events and change nothing
#: here.
_SYNC_NS: Final = 6 * _HOUR_NS

#: What a coordinator replays of another's statements in an hour: a quarter of an hour's work.
_VERIFIED_UNITS: Final = HOUR_UNITS // 4

#: Computing a job costs its machine this share of the price: electricity, wear, what else it could do.
_COST_SHARE: Final = 0.5

_CODEC: Final = msgspec.msgpack.Decoder(tuple[int, int, int, Counters, Past, int])


class KarmaStudy:
    """One variant's run."""

    def __init__(
        self, settings: ScenarioSettings, folder: Path, recorder: Recorder, progress: Progress
    ) -> None:
        said = settings.karma
        machines = settings.world.nodes - said.coordinators
        if machines < 2:
            raise ScenarioError(
                "world.nodes must exceed karma.coordinators by two at least: the rest are Islands"
            )
        self.settings = settings
        self.record = recorder
        self.progress = progress
        self.world: World = build_world(settings, folder)
        use_codec(self.world, GOSSIP, GOSSIP_CODEC, METHOD_GOSSIP, round_trip=settings.world.codec)
        self._maker = NodeMaker(self.world, settings)
        self.policy = KarmaPolicy()
        self.dice = Draws(settings.world.seed, Stream.WORKLOAD)
        self.coordinators = [self._maker.add()[0] for _ in range(said.coordinators)]
        self.witnesses: dict[int, KarmaWitness[int]] = {}
        self.stores: dict[int, KarmaStore[int]] = {}
        self._gossipers: list[int] = []
        self._sequences: dict[tuple[int, int], int] = {}
        self._hour = 0
        for at, node in enumerate(self.coordinators):
            self._add_coordinator(at, node)
        attackers = round(said.attackers * machines) if said.attack != "none" else 0
        self.actors: list[Actor] = []
        for number in range(machines):
            hostile = number < attackers
            actor = Actor(said.attack if hostile and said.attack != "none" else "honest")
            self.actors.append(actor)
            for _ in range(SYBIL_NAMES if actor.strategy == "sybil" else 1):
                self._new_name(actor)
        self.world.observe(GOSSIP, self._learnt)

    # --- building ---------------------------------------------------------------------------------

    def _add_coordinator(self, at: int, node: int) -> None:
        """It believes itself and the next two fully: what an operator's configuration names."""
        count = len(self.coordinators)
        seeds = {self.coordinators[(at + step) % count]: FULL for step in (1, 2) if step < count}
        self.witnesses[node] = KarmaWitness(node, self.policy, restate_ns=6 * _HOUR_NS)
        self.stores[node] = KarmaStore(node, seeds, self.policy)
        self._add_gossiper(node)

    def _add_gossiper(self, node: int) -> None:
        dice = Draws(self.world.seed, machine_stream(node, _GOSSIP_SERVICE))
        kinds = {KIND: KindPolicy((self.policy.keep_epochs + 2) * self.policy.epoch_ns, 1024)}
        machine: GossipMachine[int] = GossipMachine(
            dice,
            GossipPolicy(sync_max_ns=_SYNC_NS),
            {KIND: self._open_untrusted},
            kinds,
            unix_offset_ns=self.world.unix_start_ns,
        )
        self.world.install(node, GOSSIP, machine)
        for other in dice.sample(self._gossipers, _NEIGHBOURS):
            self.world.order(node, GOSSIP, AddPeer(other))
            self.world.order(other, GOSSIP, AddPeer(node))
        self._gossipers.append(node)

    def _new_name(self, actor: Actor) -> None:
        node = self._maker.add()[0]
        actor.names.append(node)
        if actor.states and len(actor.names) == 1:  # later names speak through the machine's first node
            self._add_gossiper(node)

    # --- statements -------------------------------------------------------------------------------

    @property
    def _unix(self) -> UnixNs:
        return UnixNs(self.world.now + self.world.unix_start_ns)

    @property
    def _epoch(self) -> int:
        return self.policy.epoch_at(self._unix)

    def _publish(self, node: int, statement: Statement[int]) -> None:
        payload = msgspec.msgpack.encode(
            (
                statement.issuer,
                statement.subject,
                statement.sequence,
                statement.counters,
                statement.past,
                statement.min_rtt_us,
            )
        )
        issuer, subject = statement.issuer.to_bytes(32, "big"), statement.subject.to_bytes(32, "big")
        item = Item(KIND, issuer, subject, statement.sequence, payload)
        self.world.order(node, GOSSIP, Publish(item))

    def _open_untrusted(self, item: Item, now: UnixNs) -> Opening:
        """Nobody forges signatures here: the item's origin is who it says. Raises ProtocolError."""
        try:
            issuer, subject, sequence, counters, past, rtt_us = _CODEC.decode(item.payload)
        except (msgspec.DecodeError, ValueError) as error:
            raise ProtocolError(Fault.MALFORMED, "no statement") from error
        if item.origin != issuer.to_bytes(32, "big") or item.version != sequence or issuer == subject:
            raise ProtocolError(Fault.WRONG_ISSUER, "the item is not what it says")
        if sequence > self.policy.sequence_at(UnixNs(now + 30 * SECOND_NS)):
            raise ProtocolError(Fault.EXPIRED, "the statement is from the future")
        statement = Statement(issuer, subject, sequence, counters, past, rtt_us)
        expires = UnixNs((statement.epoch + 1 + self.policy.keep_epochs) * self.policy.epoch_ns)
        return Opening(expires, statement)

    def _learnt(self, now: Instant, node: int, event: Any) -> None:  # noqa: ANN401, ARG002 - an observer
        if isinstance(event, Learnt) and node in self.stores and isinstance(event.body, Statement):
            self.stores[node].merge(event.body, self._epoch)  # pyright: ignore[reportUnknownArgumentType,reportUnknownMemberType] - the opener made it

    # --- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it. `sum_up` afterwards, also if it was cut short."""
        hours = max(1, round(self.settings.world.duration_s / 3600.0))
        for hour in range(hours):
            self.world.at(Instant(hour * _HOUR_NS), self._work_an_hour)
        end = seconds_to_ns(hours * 3600.0)
        run_in_slices(self.world, end, min(self.settings.world.slices, hours), self._slice)

    def _work_an_hour(self) -> None:
        self._hour += 1
        for actor in self.actors:
            self._work(actor)
            if actor.wants_name:
                actor.wants_name = False
                self._new_name(actor)
        for at, node in enumerate(self.coordinators):
            others = len(self.coordinators) - 1
            if others:
                other = self.coordinators[(at + 1 + self._hour % others) % len(self.coordinators)]
                self.witnesses[node].saw(self._unix, other, attested_units=_VERIFIED_UNITS)
            for statement in self.witnesses[node].due(self._unix, limit=10_000):
                self.stores[node].merge(statement, self._epoch)
                self._publish(node, statement)
        if self._hour % 6 == 1:
            for through, statement in self._hostile_statements():
                self._publish(through, statement)

    def _work(self, actor: Actor) -> None:
        said = self.settings.karma
        asked = self.dice.sample(self.coordinators, 2)
        worst = min(self.stores[node].points_mpt(actor.names[-1], self._epoch) for node in asked)
        plan = actor.plan(self._hour, worst, self.policy.threshold_mpt)
        caught = False
        share_h = 1.0 / said.jobs_per_hour
        for node in asked:
            payable = self.policy.monetizable(self.stores[node].points_mpt(plan.name, self._epoch))
            done = passed = lies = 0
            for _ in range(said.jobs_per_hour // len(asked)):
                audited = self.dice.unit() < said.audited
                if self.dice.below(100) < plan.junk_percent:
                    if audited:
                        lies = 1
                        break  # a proven liar gets no more jobs
                    actor.junk_paid_h += payable * share_h
                else:
                    passed += audited
                    actor.worked_h += share_h
                actor.paid_h += payable * share_h
                done += 1
            units = done * HOUR_UNITS // said.jobs_per_hour
            self.witnesses[node].saw(self._unix, plan.name, work_units=units, audits_passed=passed, lies=lies)
            caught = caught or bool(lies)
        actor.heard(caught=caught)

    def _hostile_statements(self) -> Iterator[tuple[int, Statement[int]]]:
        """(node that spreads it, statement): praise within the ring or among a sybil's names; slander of honest
        Islands.
        """
        hostile = [actor for actor in self.actors if actor.states]
        ring = [actor.names[-1] for actor in hostile if actor.strategy == "collusion"]
        for actor in hostile:
            if actor.strategy == "slander":
                rivals = [other.names[-1] for other in self.actors if other.honest]
                said = Counters(failures=10**6, lies=10**6)
                pairs = [(actor.names[-1], rival) for rival in rivals]
            else:
                said = Counters(work_units=MAX_COUNTER, attested_units=MAX_COUNTER)
                issuers = actor.names if actor.strategy == "sybil" else [actor.names[-1]]
                subjects = actor.names if actor.strategy == "sybil" else ring
                pairs = [(issuer, subject) for issuer in issuers for subject in subjects]
            for issuer, subject in pairs:
                if issuer != subject:
                    yield actor.names[0], Statement(issuer, subject, self.policy.sequence_at(self._unix), said)

    # --- figures ----------------------------------------------------------------------------------

    def _karma_of(self, actor: Actor) -> float:
        """In points, the best of its names, mean over coordinators."""
        epoch = self._epoch
        return max(
            mean([self.stores[node].points_mpt(name, epoch) / 1000.0 for node in self.coordinators])
            for name in actor.names[-SYBIL_NAMES:]
        )

    def _slice(self, share: float) -> None:
        for label, honest in (("honest", True), ("attackers", False)):
            karma = sorted(self._karma_of(actor) for actor in self.actors if actor.honest == honest)
            if karma:
                self.record.point(f"karma: {label}", self.world.now, quantile(karma, 0.5))
        self.progress("working", share)

    def sum_up(self) -> None:
        """Figures of what has happened so far."""
        record = self.record
        table = record.table(
            "machines", "machine", "strategy", "names", "worked_h", "paid_h", "junk_paid_h", "income_h", "karma"
        )
        incomes: dict[bool, list[float]] = {True: [], False: []}
        for number, actor in enumerate(self.actors):
            income = actor.paid_h - _COST_SHARE * actor.worked_h
            incomes[actor.honest].append(income)
            karma = self._karma_of(actor)
            figures = (actor.worked_h, actor.paid_h, actor.junk_paid_h, income, karma)
            table.rows.append((number, actor.strategy, len(actor.names), *figures))
        honest = mean(incomes[True])
        record.measure("income of an honest machine", honest, "hours' prices", "higher")
        honest_karma = sorted(self._karma_of(actor) for actor in self.actors if actor.honest)
        record.measure("karma of honest p50", quantile(honest_karma, 0.5), "points", "higher")
        record.measure("karma of honest p10", quantile(honest_karma, 0.1), "points", "higher")
        paid = [actor for actor in self.actors if actor.honest and actor.paid_h]
        record.measure("honest machines paid", 100.0 * len(paid) / max(1, len(honest_karma)), "%", "higher")
        if incomes[False]:
            hostile = mean(incomes[False])
            record.measure("income of an attacking machine", hostile, "hours' prices", "lower")
            if honest > 0:
                record.measure("attack pays, against honest work", hostile / honest, "ratio", "lower")
            theirs = sorted(self._karma_of(actor) for actor in self.actors if not actor.honest)
            record.measure("karma of attackers p50", quantile(theirs, 0.5), "points", "lower")
            junk = sum(actor.junk_paid_h for actor in self.actors)
            total = sum(actor.paid_h for actor in self.actors)
            record.measure("junk among paid work", 100.0 * junk / max(1e-9, total), "%", "lower")
            names = sum(len(actor.names) for actor in self.actors if not actor.honest)
            record.measure("names used by attackers", float(names), "names")
        held = [float(len(store)) for store in self.stores.values()]
        record.measure("statements held", mean(held), "mean per coordinator")
