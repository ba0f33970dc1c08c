"""A model that fits no Island, on chains: what planning is worth, and what failures cost.

Production's: the ring machine on every Island (openings, feeds, pings, replays, replacements) and, in the
variant "planner", the planner's `route`, `allocate` and `best_spare`. Models: engines (`sim.chain_engine`),
gateways (`sim.chains`), and two short cuts: what Islands hold and how busy they are is known to all gateways
after a delay, instead of by adverts through coordinators; and the upkeep of ranges that lost a holder is
decided in one place, which knows who is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dht.coordinates import Vivaldi, estimate_ns
from protocol.instants import MILLISECOND_NS, Instant, after, ns_to_seconds, seconds_to_ns
from protocol.limits import MIB
from protocol.ring import Chain
from routing.chains.costs import cost_of
from routing.chains.plan import Assigned, Holder, ModelShape, Room, Speed
from routing.chains.rebalance import BalancePolicy, Balancer
from routing.chains.ring import RingPolicy
from sim.arrivals import Span, arrivals
from sim.build import NodeMaker, Progress, build_world, run_in_slices
from sim.chain_engine import StageEngine
from sim.chain_strategies import ByChance, Greedy, Job, Planned, Strategy
from sim.chains import (
    CHAINS,
    ChainGateway,
    ChainIsland,
    Hold,
    JobEnded,
    JobPlacedOn,
    LoadIs,
    PlaceJob,
    Replaced,
    TokenCame,
    name_of,
    node_of,
    size_of,
)
from sim.churn import turns
from sim.config import ScenarioSettings
from sim.coordinates import settle
from sim.draws import Draws, Stream
from sim.record import Recorder, mean
from sim.settings import ScenarioError
from sim.world import World

_CARGO: Final = "sha256:" + hashlib.sha256(b"70b").hexdigest()

#: How long after a change of its load an Island's is known elsewhere: adverts and a coordinator on the way.
_NEWS_NS: Final = 300 * MILLISECOND_NS

#: The vocabulary head of a 70B model takes about as long as two of its layers.
_HEAD_LAYERS: Final = 2


@dataclass(slots=True)
class _Island:
    """What is true of an Island. `until`: when what it was told to hold is loaded."""

    room: Room[str]
    speed: Speed
    range: tuple[int, int] | None = None
    ready: bool = False
    generation: int = 0


@dataclass(slots=True)
class _Range:
    """One place of a chain that was laid out, and who holds it or will."""

    chain: int
    place: int
    first: int
    last: int
    members: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Running:
    """A job. `disturbed`: what was lost since the last token, "stage" or "chain" (the head, or all of it)."""

    began: Instant
    first: Instant | None = None
    last: Instant | None = None
    tokens: int = 0
    disturbed: str = ""
    expected_ns: int = 0


class ChainStudy:
    """One variant's run."""

    def __init__(
        self, settings: ScenarioSettings, folder: Path, recorder: Recorder, progress: Progress
    ) -> None:
        said = settings.chains
        if settings.world.nodes <= said.gateways:
            raise ScenarioError(f"world.nodes must exceed chains.gateways = {said.gateways}")
        if not settings.connections.kept:
            raise ScenarioError("chains need connections: set connections.kept, for example to 128")
        self.settings = settings
        self.folder = folder
        self.record = recorder
        self.progress = progress
        self.world: World = build_world(settings, folder)
        maker = NodeMaker(self.world, settings)
        nodes = [maker.add()[0] for _ in range(settings.world.nodes)]
        self.gateways, self.nodes = nodes[: said.gateways], nodes[said.gateways :]
        self.shape = ModelShape(
            [(said.layer_mb + said.cache_mb_per_layer) * MIB] * said.layers,
            said.embedding_mb * MIB,
            said.head_mb * MIB,
        )
        row_bytes = 2 * said.width
        default = RingPolicy()
        self.ring_policy = RingPolicy(
            feed_rows=max(1, min(default.feed_rows, default.feed_bytes // row_bytes)),
            window_rows=max(1, min(default.window_rows, default.window_bytes // row_bytes)),
        )
        self.islands: dict[int, _Island] = {}
        self.known: dict[int, Holder[str]] = {}
        self.ranges: list[_Range] = []
        self.running: dict[int, _Running] = {}
        self.jobs = recorder.table(
            "generations", "time_s", "tokens", "first_token_s", "tokens_per_s", "expected_per_s", "tries"
        )
        self.gaps = recorder.table("gaps", "time_s", "lost", "gap_s")
        self.balancer: Balancer[str] = Balancer(BalancePolicy(smoothing_ns=seconds_to_ns(said.balance_s)))
        self.joined = 0
        self.replaced = 0
        self.died_working = 0
        self.given_up = 0
        self._start = Instant(0)
        self._end = Instant(0)
        self.world.service(CHAINS, size_of=lambda message: size_of(message, row_bytes))
        self.world.observe(CHAINS, self._heard)
        self._build()

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        said, world, seed = self.settings.chains, self.world, self.settings.world.seed
        coordinates = settle(world, {n: Vivaldi() for n in range(world.nodes)}, Draws(seed, Stream.BOOTSTRAP))
        self._coordinates: dict[str, int] = {name_of(node): place for node, place in coordinates.items()}
        dice = Draws(seed, Stream.CHAINS)
        kinds = {"planner": Planned, "random": ByChance, "greedy": Greedy}
        self.strategy: Strategy = kinds[said.strategy](self.shape, self._rtt_of, dice)
        draws = Draws(seed, Stream.ISLANDS)
        for node in self.nodes:
            layer_ns = round(draws.log_normal(said.layer_ms_median, said.layer_sigma) * MILLISECOND_NS)
            room = round(draws.log_normal(said.room_gb_median, said.room_sigma) * 1024) * MIB
            speed = Speed(layer_ns, round(layer_ns / said.row_factor), _HEAD_LAYERS * layer_ns)
            self.islands[node] = _Island(Room(name_of(node), room, speed), speed)
            self._install(node)
        for node in self.gateways:
            world.install(node, CHAINS, ChainGateway(node, self._plan))
        self._lay_out()

    def _rtt_of(self, a: str, b: str) -> int:
        return estimate_ns(self._coordinates[a], self._coordinates[b])

    def _install(self, node: int) -> None:
        speed = self.islands[node].speed
        engine = StageEngine(
            speed.layer_ns, speed.prefill_layer_ns, speed.vocabulary_ns, self.settings.chains.slots
        )
        machine = ChainIsland(node, engine, self.ring_policy, unix_offset_ns=self.world.unix_start_ns)
        self.world.install(node, CHAINS, machine, polled=True)

    def _lay_out(self) -> None:
        """Chains and their spares, loaded before anything begins."""
        said = self.settings.chains
        for _ in range(said.replicas):
            stages = self.strategy.lay_out(self._free_rooms())
            if not stages:
                break
            self._new_chain(stages, loaded=True)
        for _ in range(said.spares):
            for one in self.ranges:
                peer = self.strategy.join(self._stages_of(one.chain), one.place, self._free_rooms())
                if peer is not None:
                    self._assign(one, node_of(peer), loaded=True)

    def _new_chain(self, stages: Sequence[Assigned[str]], *, loaded: bool) -> None:
        chain = self.ranges[-1].chain + 1 if self.ranges else 0
        for place, stage in enumerate(stages):
            self.ranges.append(_Range(chain, place, stage.first, stage.last))
            self._assign(self.ranges[-1], node_of(stage.peer), loaded=loaded)

    def _free_rooms(self) -> list[Room[str]]:
        """Islands that are known to be there, and to hold nothing."""
        return [i.room for node, i in self.islands.items() if i.range is None and self.world.is_up(node)]

    def _stages_of(self, chain: int) -> list[Assigned[str]]:
        """Those who stand at its places; a place that has lost all stands for itself."""
        return [
            Assigned(name_of(one.members[0] if one.members else self.gateways[0]), one.first, one.last)
            for one in self.ranges
            if one.chain == chain
        ]

    def _assign(self, one: _Range, node: int, *, loaded: bool) -> None:
        island = self.islands[node]
        one.members.append(node)
        island.range, island.ready = (one.first, one.last), False
        generation = island.generation
        fetch_s = self.shape.bytes_of(one.first, one.last) * 8 / (self.settings.chains.fetch_mbps * 1e6)
        at = self.world.now if loaded else after(self.world.now, seconds_to_ns(fetch_s))
        hold = Hold(_CARGO, one.first, one.last, self.shape.layers)

        def arrived() -> None:
            if island.generation != generation or not self.world.is_up(node):
                return
            island.ready = True
            self.world.order(node, CHAINS, hold)
            self.known[node] = Holder(
                name_of(node), one.first, one.last, island.speed, self.settings.chains.slots
            )

        self.world.at(at, arrived)

    # --- what gateways know -----------------------------------------------------------------------

    def _plan(self, now: Instant, gateway: int, place: PlaceJob, excluded: frozenset[str]) -> Chain | None:
        del now, gateway
        holders = list(self.known.values())
        return self.strategy.route(_CARGO, holders, Job(place.prompt, place.output), excluded)

    def _heard(self, now: Instant, node: int, event: Any) -> None:  # noqa: ANN401 - events of two machines
        match event:
            case LoadIs(active=active):
                self.world.at(after(now, _NEWS_NS), lambda: self._load_known(node, active))
            case TokenCame(job=job):
                self._token(now, job)
            case Replaced(session=session):
                self.replaced += 1
                self._disturbed(int(session, 16))
            case JobPlacedOn():
                self._placed(event)
            case JobEnded():
                self._ended(event)
            case _:
                pass

    def _load_known(self, node: int, active: int) -> None:
        holder = self.known.get(node)
        if holder is not None:
            self.known[node] = Holder(
                holder.peer, holder.first, holder.last, holder.speed, holder.slots, active
            )

    def _disturbed(self, job: int) -> None:
        running = self.running.get(job)
        if running is not None:
            running.disturbed = running.disturbed or "stage"

    def _placed(self, event: JobPlacedOn) -> None:
        running = self.running[event.job]
        if event.tries > 1:
            running.disturbed = "chain"
        elif event.tries == 1:
            running.expected_ns = self._true_token_ns(event.chain)

    def _true_token_ns(self, chain: Chain) -> int:
        """What a token takes on it alone, by true distances."""
        nodes = [node_of(stage.holder.peer) for stage in chain.stages]
        rows = [
            (node, self.islands[node].speed, stage.last - stage.first, 0)
            for node, stage in zip(nodes, chain.stages, strict=True)
        ]
        return cost_of(rows, self.world.rtt_ns).token_ns

    def _token(self, now: Instant, job: int) -> None:
        running = self.running[job]
        if running.first is None:
            running.first = now
        elif running.disturbed and running.last is not None:
            gap_s = ns_to_seconds(now - running.last)
            self.gaps.rows.append((ns_to_seconds(now - self._start), running.disturbed, gap_s))
        running.disturbed = ""
        running.last = now
        running.tokens += 1

    def _ended(self, event: JobEnded) -> None:
        running = self.running.pop(event.job)
        if not event.tries or running.first is None or running.last is None:
            self.given_up += 1
            return
        took_ns = running.last - running.first
        rate = (running.tokens - 1) / ns_to_seconds(took_ns) if took_ns else 0.0
        first_s = ns_to_seconds(running.first - running.began)
        at_s = ns_to_seconds(running.began - self._start)
        expected = 1e9 / max(1, running.expected_ns)
        self.jobs.rows.append((at_s, running.tokens, first_s, rate, expected, event.tries))

    # --- failures ---------------------------------------------------------------------------------

    def _go_down(self, node: int, *, silent: bool) -> None:
        if not self.world.is_up(node):
            return
        machine: ChainIsland = self.world.machine(node, CHAINS)
        self.died_working += len(machine.engine.sessions)
        island = self.islands[node]
        island.generation += 1
        generation = island.generation
        self.world.kill(node, silent=silent)

        def noticed() -> None:
            if island.generation == generation:
                self._forget(node)

        self.world.at(after(self.world.now, seconds_to_ns(self.settings.chains.notice_s)), noticed)

    def _forget(self, node: int) -> None:
        self.known.pop(node, None)
        self.islands[node].range = None
        for one in self.ranges:
            if node in one.members:
                one.members.remove(node)

    def _come_back(self, node: int) -> None:
        """With nothing loaded."""
        if self.world.is_up(node):
            return
        self.islands[node].generation += 1
        self._forget(node)
        self.world.revive(node)
        self._install(node)

    def _review(self) -> None:
        """Ranges that have lost a holder get another one."""
        said = self.settings.chains
        for one in self.ranges:
            while len(one.members) < 1 + said.spares:
                peer = self.strategy.join(self._stages_of(one.chain), one.place, self._free_rooms())
                if peer is None:
                    break
                self._assign(one, node_of(peer), loaded=False)
        if said.balance_s:
            self._balance()
        if self.world.now < self._end:
            self.world.at(after(self.world.now, seconds_to_ns(said.review_s)), self._review)

    def _balance(self) -> None:
        """Ranges that are busy for long are joined by Islands with room. (Nobody leaves a range for another
        here: there is room.)
        """
        holders, now = list(self.known.values()), self.world.now
        self.balancer.watch(now, holders)
        moves = self.balancer.moves(now, self.shape, self._free_rooms(), holders)
        if not moves:
            stages = self.balancer.further(now, self.shape, self._free_rooms(), holders, self._rtt_of)
            self._new_chain([Assigned(move.peer, move.first, move.last) for move in stages], loaded=False)
            self.joined += len(stages)
        for move in moves:
            same = [one for one in self.ranges if (one.first, one.last) == (move.first, move.last)]
            if move.leaves is None and same:
                self.joined += 1
                self._assign(min(same, key=lambda one: len(one.members)), node_of(move.peer), loaded=False)

    # --- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it. `sum_up` afterwards, also if it was cut short."""
        world, said = self.world, self.settings
        world.run_for(seconds_to_ns(1.0))
        self._start = world.now
        end = self._end = after(self._start, seconds_to_ns(said.world.duration_s))
        span = Span(self._start, end)
        lengths = Draws(said.world.seed, Stream.KEYS)
        for number, arrival in enumerate(
            arrivals(said.arrivals, Draws(said.world.seed, Stream.WORKLOAD), span, self.folder)
        ):
            prompt = arrival.prompt_tokens or round(
                lengths.log_normal(said.chains.prompt_median, said.chains.token_sigma)
            )
            output = arrival.output_tokens or round(
                lengths.log_normal(said.chains.output_median, said.chains.token_sigma)
            )
            place = PlaceJob(number, max(1, prompt), max(2, output))
            world.at(Instant(arrival.at_ns), self._ask(place, lengths.choice(self.gateways)))
        sites = [(node, world.links.names[world.site_of(node)]) for node in self.nodes]
        for turn in turns(said.churn, said.world.seed, sites, span, self.folder):
            world.at(Instant(turn.at_ns), self._turn(turn.node, up=turn.up))
        for kill in said.kill:
            world.at(after(self._start, seconds_to_ns(kill.at_s)), self._kill(kill.share, silent=kill.silent))
        world.at(after(self._start, seconds_to_ns(said.chains.review_s)), self._review)
        run_in_slices(world, end, said.world.slices, self._slice)
        world.run_for(seconds_to_ns(said.chains.grace_s))

    def _ask(self, place: PlaceJob, gateway: int) -> Any:  # noqa: ANN401 - a thunk
        def ask() -> None:
            self.running[place.job] = _Running(self.world.now)
            self.world.order(gateway, CHAINS, place)

        return ask

    def _turn(self, node: int, *, up: bool) -> Any:  # noqa: ANN401 - a thunk
        return lambda: self._come_back(node) if up else self._go_down(node, silent=self.settings.churn.silent)

    def _kill(self, share: float, *, silent: bool) -> Any:  # noqa: ANN401 - a thunk
        def kill() -> None:
            up = [node for node in self.nodes if self.world.is_up(node)]
            for node in Draws(self.settings.world.seed, Stream.CHURN).sample(up, round(share * len(up))):
                self._go_down(node, silent=silent)

        return kill

    def _slice(self, share: float) -> None:
        at = self.world.now - self._start
        record = self.record
        record.point("jobs open", at, float(len(self.running)))
        record.point("Islands that hold layers", at, float(len(self.known)))
        record.point("Islands that joined busy ranges", at, float(self.joined))
        record.point("ranges without a holder", at, float(sum(not self._held(one) for one in self.ranges)))
        self.progress("measuring", share)

    def _held(self, one: _Range) -> bool:
        return any(self.islands[node].ready for node in one.members)

    def sum_up(self) -> None:
        """Figures of what has happened so far."""
        record = self.record
        rates = self.jobs.numbers("tokens_per_s")
        for percent, name in ((50, "p50"), (10, "p10")):
            ordered = sorted(rates)
            if ordered:
                value = ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
                record.measure(f"token rate of a job {name}", value, "tokens/s", "higher")
        record.measure("token rate of a job mean", mean(rates), "tokens/s", "higher")
        firsts = self.jobs.numbers("first_token_s")
        record.measure_spread("first token", firsts, "s")
        lasted_s = ns_to_seconds(self.world.now - self._start)
        tokens = sum(self.jobs.numbers("tokens"))
        record.measure("tokens per second, all together", tokens / lasted_s, "tokens/s", "higher")
        alone = mean(self.jobs.numbers("expected_per_s"))
        record.measure("rate that the chain alone would give, mean", alone, "tokens/s")
        chains = len({one.chain for one in self.ranges})
        record.measure("chains laid out", float(chains), "chains", "higher")
        record.measure("stages per chain", len(self.ranges) / max(1, chains), "mean")
        record.measure("jobs done", float(len(rates)), "jobs", "higher")
        record.measure("jobs given up", float(self.given_up), "jobs", "lower")
        record.measure("jobs unfinished", float(len(self.running)), "jobs", "lower")
        record.measure("chains per job", mean(self.jobs.numbers("tries")), "mean", "lower")
        record.measure("Islands that joined busy ranges", float(self.joined), "Islands")
        record.measure("sessions whose stage died", float(self.died_working), "sessions")
        record.measure("stages replaced by spares", float(self.replaced), "times")
        lost = zip(self.gaps.column("lost"), self.gaps.numbers("gap_s"), strict=True)
        gaps: dict[str, list[float]] = {"stage": [], "chain": []}
        for what, gap_s in lost:
            gaps[str(what)].append(gap_s)
        record.measure_spread("gap when a spare took a stage's place", gaps["stage"], "s")
        record.measure_spread("gap when the head or all was lost", gaps["chain"], "s")
