"""The DHT under load, churn, partitions, storms and attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from dht.events import FindClosest, FindProviders, Found, Join, Joined, Provide, Stored
from dht.keys import KEY_BITS
from dht.messages import DhtAnswer, DhtQuery
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, after, ns_to_ms, seconds_to_ns
from sim.arrivals import Span, arrivals, zipf_weights
from sim.build import NodeMaker, Progress, build_world, run_in_slices
from sim.churn import turns
from sim.config import ScenarioSettings
from sim.connections import Nat
from sim.dht_network import DHT, DhtNetwork
from sim.draws import Draws, Stream
from sim.record import Recorder, mean, quantile
from sim.studies.dht_attacks import Attackers
from sim.world import World

#: Bits of a ticket that number the order; higher ones say what it was for.
_LOOKUP: Final = 1 << 40
_PROVIDE: Final = 1 << 41

#: Kinds of events that are messages, by their type's name.
_MESSAGES: Final = frozenset(kind.__name__ for kind in (*get_args(DhtQuery), *get_args(DhtAnswer)))

#: How long after the last order answers are still waited for.
_GRACE_NS: Final = 10 * SECOND_NS

#: Events that a node has had at an age (s) after joining, and per second from then on; measured, for the
#: progress line only.
_EVENTS_BY_AGE_S: Final = ((0, 0), (1, 40), (9, 143), (13, 180), (23, 227), (37, 277), (60, 313))
_EVENTS_PER_S: Final = 1.7

#: Nodes that stand for all that join, there.
_JOIN_SAMPLES: Final = 200


@dataclass(slots=True)
class _Asked:
    """A lookup under way. `truth`: who the right answer was when it began."""

    at: Instant
    node: int
    target: int
    truth: tuple[int, ...]


class DhtStudy:
    """One variant's run."""

    def __init__(
        self, settings: ScenarioSettings, folder: Path, recorder: Recorder, progress: Progress
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.record = recorder
        self.progress = progress
        self.world: World = build_world(settings, folder)
        self.network = DhtNetwork(self.world, settings.dht, codec=settings.world.codec)
        self.maker = NodeMaker(self.world, settings)
        self.dice = Draws(settings.world.seed, Stream.WORKLOAD)
        self.attackers = Attackers(self.network, settings.attack)
        self.lookups = recorder.table(
            "lookups", "time_s", "node", "latency_ms", "hops", "queries", "failures", "right_share", "found"
        )
        self.joins = recorder.table("joins", "time_s", "node", "took_ms", "contacts")
        self._asked: dict[int, _Asked] = {}
        self._joining: dict[int, Instant] = {}
        self._live: list[int] = []
        self._place: dict[int, int] = {}
        self._seeds = Draws(settings.world.seed, Stream.BOOTSTRAP)
        self._start = Instant(0)
        self._recent: list[float] = []
        self._phase = "joining"
        self._way: Callable[[Instant], float] = _unknown_way
        self._counted = 0
        self.world.observe(DHT, self._heard)

    # --- phases -----------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it. `sum_up` afterwards, also if it was cut short."""
        self.world.watch = self._tell
        self._bootstrap()
        self._phase = "measuring"
        self._start = self.world.now
        self._counted = self._messages()
        end = after(self._start, seconds_to_ns(self.settings.world.duration_s))
        self._disturb(end)
        self._schedule_lookups(end)
        run_in_slices(self.world, end, self.settings.world.slices, self._slice)
        self._phase = "waiting for the last answers"
        self.world.run_until(after(end, _GRACE_NS))

    def _rest_ns(self) -> int:
        """Virtual time after the nodes are there."""
        said = self.settings
        return seconds_to_ns(said.dht.settle_s) + seconds_to_ns(said.world.duration_s) + _GRACE_NS

    def _tell(self, now: Instant) -> None:
        self.progress(self._phase, self._way(now))

    def _bootstrap(self) -> None:
        nodes, dht = self.settings.world.nodes, self.settings.dht
        for number in range(nodes):
            if number % 4096 == 0:
                self.progress("making nodes", 0.0)
            self._add_node()
        self.attackers.make_phantoms()
        if dht.bootstrap == "built":
            self.network.build_tables(lambda share: self.progress("building tables", share / 2))
            for node in range(nodes):
                self._enter(node)
            start, rest_ns = self.world.now, self._rest_ns()
            self._way = lambda now: 0.5 + 0.5 * min(1.0, (now - start) / rest_ns)
            self.record.note(
                "The first nodes did not join: their tables were built as those of a network at rest."
            )
        else:
            every_ns = dht.join_every_ms * MILLISECOND_NS
            for node in range(nodes):
                self.world.at(Instant(round(node * every_ns)), _call(self._join, node))
            self._way = _joining_way(nodes * every_ns, self._rest_ns() + SECOND_NS)
            self._phase = "joining"
            self.world.run_until(Instant(round(nodes * every_ns) + SECOND_NS))
        self._phase = "settling"
        self.world.run_for(seconds_to_ns(dht.settle_s))

    def _add_node(self) -> int:
        node, nat = self.maker.add()
        key, group = self.attackers.identity(node)
        self.network.add(node, client=nat is Nat.UNREACHABLE, key=key, group=group)
        self.attackers.joined(node)
        return node

    def _join(self, node: int) -> None:
        if not self.world.is_up(node):
            return
        seeds: dict[int, None] = {}
        for _ in range(min(len(self._live), self.settings.dht.seeds)):
            seeds[self._live[self._seeds.below(len(self._live))]] = None
        self._joining[node] = self.world.now
        self.world.order(node, DHT, Join(tuple(seeds)))
        self._enter(node)

    def _enter(self, node: int) -> None:
        """It may be chosen from now on."""
        if node not in self._place:
            self._place[node] = len(self._live)
            self._live.append(node)

    def _leave(self, node: int, *, silent: bool) -> None:
        self.world.kill(node, silent=silent)
        self.network.left(node)
        place = self._place.pop(node, None)
        if place is not None:
            last = self._live.pop()
            if last != node:
                self._live[place] = last
                self._place[last] = place

    def _come_back(self, node: int) -> None:
        if not self.world.is_up(node):
            self.world.revive(node)
            self.network.install(node)
            self._join(node)

    # --- disturbances -----------------------------------------------------------------------------

    def _disturb(self, end: Instant) -> None:
        said, world = self.settings, self.world
        sites = [(node, world.links.names[world.site_of(node)]) for node in range(world.nodes)]
        span = Span(self._start, end)
        for turn in turns(said.churn, said.world.seed, sites, span, self.folder):
            if turn.up:
                world.at(Instant(turn.at_ns), _call(self._come_back, turn.node))
            else:
                world.at(Instant(turn.at_ns), _call(self._leave_by_churn, turn.node))
        for cut in said.partition:
            world.at(self._at(cut.at_s), _call(self._cut, cut.shares))
            world.at(self._at(cut.heal_s), world.heal)
        for kill in said.kill:
            world.at(self._at(kill.at_s), _call(self._kill_some, (kill.share, kill.silent)))
        for storm in said.storm:
            within_ns = seconds_to_ns(storm.within_s)
            for number in range(storm.nodes):
                at = after(self._at(storm.at_s), within_ns * number // max(1, storm.nodes))
                world.at(at, self._newcomer)

    def _at(self, seconds: float) -> Instant:
        return after(self._start, seconds_to_ns(seconds))

    def _leave_by_churn(self, node: int) -> None:
        self._leave(node, silent=self.settings.churn.silent)

    def _newcomer(self) -> None:
        self._join(self._add_node())

    def _cut(self, shares: tuple[float, ...]) -> None:
        """Groups by lot: each node falls into one with the group's share."""
        sides: list[list[int]] = [[] for _ in shares]
        dice = Draws(self.settings.world.seed, Stream.PROBES, self.world.now)
        for node in range(self.world.nodes):
            drawn = dice.unit()
            for side, share in zip(sides, shares, strict=True):
                drawn -= share
                if drawn < 0.0:
                    side.append(node)
                    break
        self.world.partition(sides)

    def _kill_some(self, what: tuple[float, bool]) -> None:
        share, silent = what
        dice = Draws(self.settings.world.seed, Stream.PROBES, self.world.now)
        for node in dice.sample(self._live, round(share * len(self._live))):
            self._leave(node, silent=silent)

    # --- lookups ----------------------------------------------------------------------------------

    def _schedule_lookups(self, end: Instant) -> None:
        said = self.settings
        wanted = Draws(said.world.seed, Stream.KEYS)
        targets = [_key(wanted) for _ in range(said.dht.keys)]
        popularity = zipf_weights(len(targets), said.arrivals.zipf) if targets else []
        if said.dht.lookup == "providers":
            self._provide(targets)
        models: dict[str, int] = {}
        for number, arrival in enumerate(
            arrivals(said.arrivals, self.dice, Span(self._start, end), self.folder)
        ):
            if arrival.model and targets:
                target = targets[models.setdefault(arrival.model, len(models)) % len(targets)]
            else:
                target = targets[wanted.weighted(popularity)] if targets else _key(wanted)
            target = self.attackers.target(target)
            self.world.at(Instant(arrival.at_ns), _call(self._look_up, (number, target)))

    def _provide(self, targets: list[int]) -> None:
        """Some nodes provide each key, before the measuring starts."""
        for number, target in enumerate(targets):
            for node in self.dice.sample(self._live, self.settings.dht.providers):
                self.world.order(node, DHT, Provide(_PROVIDE | number, target))
        self.world.run_for(_GRACE_NS)
        self._start = self.world.now

    def _look_up(self, what: tuple[int, int]) -> None:
        number, target = what
        node = self.attackers.honest_of(self._live, self.dice)
        k = self.network.policy.k
        others = [peer for peer in self.network.closest(target, k + 1) if peer != node]
        truth = tuple(others[:k])
        self._asked[number] = _Asked(self.world.now, node, target, truth)
        providers = self.settings.dht.lookup == "providers"
        ticket = _LOOKUP | number
        self.world.order(node, DHT, FindProviders(ticket, target) if providers else FindClosest(ticket, target))

    def _heard(self, now: Instant, node: int, event: Any) -> None:  # noqa: ANN401 - the union of all events
        if isinstance(event, Found) and event.ticket & _LOOKUP:
            self._found(now, node, event)
        elif isinstance(event, Joined):
            started = self._joining.pop(node, None)
            if started is not None:
                took_ms = ns_to_ms(now - started)
                self.joins.rows.append((ns_to_ms(now) / 1000, node, took_ms, event.contacts))
        elif isinstance(event, Stored):
            self.record.table("stores", "time_s", "node", "latency_ms", "copies").rows.append(
                (ns_to_ms(now) / 1000, node, ns_to_ms(event.cost.took_ns), event.copies)
            )

    def _found(self, now: Instant, node: int, event: Found) -> None:
        asked = self._asked.pop(event.ticket ^ _LOOKUP, None)
        if asked is None:
            return
        if self.settings.dht.lookup == "providers":
            found = len(event.providers)
            right = 1.0 if found else 0.0
        else:
            found = len(event.closest)
            truth = {peer for peer in asked.truth if self.world.is_up(peer)}
            right = len(truth.intersection(event.closest)) / max(1, len(truth))
            self.attackers.judge(event.closest)
        cost, latency = event.cost, ns_to_ms(now - asked.at)
        at_s = (asked.at - self._start) / SECOND_NS
        self.lookups.rows.append((at_s, node, latency, cost.hops, cost.queries, cost.failures, right, found))
        self._recent.append(latency)

    # --- figures ----------------------------------------------------------------------------------

    def _messages(self) -> int:
        return sum(count for name, (count, _) in self.world.log.counts().items() if _is_message(name))

    def _slice(self, share: float) -> None:  # noqa: ARG002 - the world's time says it better
        world, record = self.world, self.record
        at = world.now - self._start
        sample = Draws(self.settings.world.seed, Stream.PROBES, world.now).sample(
            self._live, self.settings.dht.health_sample
        )
        entries = dead = hostile = 0
        for node in sample:
            machine = self.network.machine(node)
            if machine is not None:
                peers = machine.table.peers
                entries += len(peers)
                dead += sum(not world.is_up(peer) for peer in peers)
                hostile += self.attackers.count(peers)
        record.point("dead table entries (%)", at, 100.0 * dead / max(1, entries))
        record.point("table entries per node", at, entries / max(1, len(sample)))
        if self.settings.attack:
            record.point("attackers in tables (%)", at, 100.0 * hostile / max(1, entries))
        record.point("nodes up", at, float(len(self._live)))
        if self._recent:
            record.point("lookup p50 over time (ms)", at, quantile(sorted(self._recent), 0.5))
            self._recent.clear()
        self._tell(world.now)

    def sum_up(self) -> None:
        """Figures of what has happened so far."""
        record, world = self.record, self.world
        seconds = max(1e-9, (world.now - self._start) / SECOND_NS)
        record.measure_spread("lookup latency", self.lookups.numbers("latency_ms"), "ms")
        for name in ("hops", "queries", "failures"):
            record.measure(f"lookup {name}", mean(self.lookups.numbers(name)), "mean", "lower")
        right = self.lookups.numbers("right_share")
        record.measure("lookups right", 100.0 * mean(right), "% of the true closest", "higher")
        record.measure("lookups done", float(len(right)), "lookups")
        record.measure("lookups unfinished", float(len(self._asked)), "lookups", "lower")
        per_node = (self._messages() - self._counted) / seconds / max(1, len(self._live))
        record.measure("messages", per_node, "per node and s", "lower")
        dead = [value for _, value in record.series.get("dead table entries (%)", [])]
        record.measure("dead table entries", mean(dead), "% mean", "lower")
        record.measure("dead table entries at the end", dead[-1] if dead else 0.0, "%", "lower")
        if self.joins.rows:
            record.measure_spread("join", self.joins.numbers("took_ms"), "ms")
            lonely = sum(contacts == 0 for contacts in self.joins.numbers("contacts"))
            record.measure("joins without contact", float(lonely), "joins", "lower")
        self.attackers.sum_up(record)
        received = world.log.received_by_node(world.nodes)
        sent = world.log.sent_by_node(world.nodes)
        table = record.table("nodes", "node", "site", "received", "sent", "table_entries")
        for node in range(world.nodes):
            machine = self.network.machine(node)
            entries = 0 if machine is None else len(machine.table)
            site = world.links.names[world.site_of(node)]
            table.rows.append((node, site, received[node], sent[node], entries))


def _unknown_way(now: Instant) -> float:  # noqa: ARG001 - nothing is known yet
    return 0.0


def _joining_way(joins_ns: float, rest_ns: int) -> Callable[[Instant], float]:
    """How much of a run is done at an instant, if nodes join evenly for `joins_ns` and live on for `rest_ns`:
    by what a node does in its first minute.
    """
    ages, events = zip(*_EVENTS_BY_AGE_S, strict=True)
    joined_s = np.linspace(0.0, joins_ns / SECOND_NS, _JOIN_SAMPLES)

    def done(now_s: float) -> float:
        age_s = now_s - joined_s
        older_s = np.maximum(age_s - ages[-1], 0.0)
        return float(np.sum(np.interp(age_s, ages, events) + _EVENTS_PER_S * older_s))

    total = max(done((joins_ns + rest_ns) / SECOND_NS), 1.0)
    return lambda now: min(1.0, done(now / SECOND_NS) / total)


def _call(action: Any, argument: Any) -> Any:  # noqa: ANN401 - any action with its argument
    return lambda: action(argument)


def _is_message(name: str) -> bool:
    return name.rpartition(".")[2] in _MESSAGES


def _key(dice: Draws) -> int:
    key = 0
    for _ in range(KEY_BITS // 64):
        key = key << 64 | dice.u64()
    return key
