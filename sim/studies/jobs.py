"""Jobs on Islands: how good placement is, and what the loss of coordinators costs.

Production's machines: coordinators, the Islands' affiliation, the gateways' followers, their books and
placement policies. Models: engines and dispatchers (`sim.jobs`). Short cuts, each a delay instead of messages:
candidates for coordinator come 200 ms after they are asked for (a DHT lookup), and a coordinator's summary
reaches the others after one way (gossip).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from dht.coordinates import Vivaldi, estimate_ns
from protocol.adverts import IslandAdvert, OfferedCargo
from protocol.coordination import COORDINATION as COORDINATION_CODEC
from protocol.coordination import METHOD_COORDINATION
from protocol.instants import MILLISECOND_NS, Instant, UnixNs, after, ns_to_seconds, seconds_to_ns
from routing import affiliation, following, following_events
from routing.candidates import CoordinatorCandidate
from routing.coordinator import Coordinator
from routing.coordinator_events import Identity, LearnCoordinator, Serve, SummaryMade
from routing.notary import PlainNotary
from routing.placement import Policy, soonest
from routing.policies import at_random, by_price, by_rtt
from routing.requirements import Outlook
from sim.arrivals import Span, arrivals, zipf_weights
from sim.build import NodeMaker, Progress, build_world, run_in_slices
from sim.codecs import use_codec
from sim.config import ScenarioSettings
from sim.coordinates import settle
from sim.draws import Draws, Stream, machine_stream
from sim.jobs import (
    JOBS,
    Dispatcher,
    Engine,
    JobDone,
    JobPlaced,
    LoadChanged,
    Place,
    Seen,
    Unseen,
    job_bytes,
    shape_of_tokens,
)
from sim.record import Recorder, mean
from sim.settings import ScenarioError
from sim.world import World

COORDINATION: Final = "coordination"

#: Numbers of services in `machine_stream`.
_COORDINATION_SERVICE: Final = 1
_JOBS_SERVICE: Final = 2

#: A lookup in the DHT, which finds coordinators in production: p50 of the DHT scenarios.
_LOOKUP_NS: Final = 200 * MILLISECOND_NS

#: How often it is looked who is known to how many coordinators.
_LOOK_NS: Final = 100 * MILLISECOND_NS

#: How long after the last arrival jobs may still end.
_GRACE_S: Final = 60.0

#: The median ask, micro-credits per 1000 tokens of output; of prompts a quarter.
_MEDIAN_ASK_UCR: Final = 100


class JobStudy:
    """One variant's run."""

    def __init__(
        self, settings: ScenarioSettings, folder: Path, recorder: Recorder, progress: Progress
    ) -> None:
        said = settings.jobs
        islands = settings.world.nodes - said.coordinators - said.gateways
        if islands < 1:
            others = said.coordinators + said.gateways
            raise ScenarioError(f"world.nodes must exceed jobs.coordinators + jobs.gateways = {others}")
        if not settings.connections.kept:
            raise ScenarioError("the study of jobs needs connections: set connections.kept, for example to 512")
        self.settings = settings
        self.folder = folder
        self.record = recorder
        self.progress = progress
        self.world: World = build_world(settings, folder)
        maker = NodeMaker(self.world, settings)
        nodes = [maker.add()[0] for _ in range(settings.world.nodes)]
        self.coordinators = nodes[: said.coordinators]
        self.gateways = nodes[said.coordinators : said.coordinators + said.gateways]
        self.islands = nodes[said.coordinators + said.gateways :]
        self.cargos = ["sha256:" + hashlib.sha256(b"cargo %d" % n).hexdigest() for n in range(said.cargos)]
        self.engines: dict[int, Engine] = {}
        self.dice = Draws(settings.world.seed, Stream.WORKLOAD)
        self.jobs = recorder.table(
            "jobs", "time_s", "gateway", "island", "cargo", "latency_s", "regret_s", "price_ucr", "attempts"
        )
        self._adverts: dict[int, IslandAdvert] = {}
        self._known: dict[tuple[int, int], set[str]] = {}
        self._open: dict[int, tuple[Instant, str, int, int]] = {}
        self._best: dict[int, int] = {}
        self._paid: dict[int, int] = {}
        self._start = Instant(0)
        self._killed_at: Instant | None = None
        self._orphans: dict[int, Instant] = {}
        self._picked_up: list[float] = []
        self._build()

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        world, seed = self.world, self.settings.world.seed
        vivaldis = {node: Vivaldi() for node in range(world.nodes)}
        self.coordinates = settle(world, vivaldis, Draws(seed, Stream.BOOTSTRAP))
        codec = self.settings.world.codec
        use_codec(world, COORDINATION, COORDINATION_CODEC, METHOD_COORDINATION, round_trip=codec)
        world.service(JOBS, size_of=job_bytes)
        world.observe(COORDINATION, self._heard)
        world.observe(JOBS, self._job_heard)
        for node in self.coordinators:
            dice = Draws(seed, machine_stream(node, _COORDINATION_SERVICE))
            machine = Coordinator(
                node, PlainNotary(node), dice, unix_offset_ns=world.unix_start_ns, estimate=estimate_ns
            )
            world.install(node, COORDINATION, machine, polled=True)
            world.order(node, COORDINATION, Serve(Identity(f"c{node}", coordinate=self.coordinates[node])))
        draws = Draws(seed, Stream.ISLANDS)
        for node in self.islands:
            self._build_island(node, draws)
        for node in self.gateways:
            self._build_gateway(node)

    def _build_island(self, node: int, draws: Draws) -> None:
        said, world = self.settings.jobs, self.world
        decode = draws.log_normal(said.decode_tps_median, said.decode_sigma)
        engine = Engine(1 + draws.below(said.slots), decode * said.prefill_factor, decode)
        self.engines[node] = engine
        offered = [
            OfferedCargo(
                digest=digest,
                name=f"cargo-{digest[7:11]}",
                version="1",
                runtime="llama",
                state="ready",
                context_length=8192,
                slots=engine.slots,
                active=0,
                queued=0,
                decode_tps=engine.decode_tps,
                prefill_tps=engine.prefill_tps,
                prompt_ask_ucr=max(1, round(draws.log_normal(_MEDIAN_ASK_UCR / 4.0, said.price_sigma))),
                output_ask_ucr=max(1, round(draws.log_normal(float(_MEDIAN_ASK_UCR), said.price_sigma))),
            )
            for digest in draws.sample(self.cargos, said.cargos_per_island)
        ]
        self._adverts[node] = IslandAdvert(
            name=f"island-{node}", cargos=tuple(offered), coordinate=self.coordinates[node]
        )
        notary = PlainNotary(node)

        def seal(advert: IslandAdvert, sequence: int, expires: UnixNs) -> Any:  # noqa: ANN401 - an envelope
            return notary.seal_advert(advert, sequence=sequence, expires_unix_ns=expires)

        dice = Draws(world.seed, machine_stream(node, _COORDINATION_SERVICE))
        machine = affiliation.Affiliation[int](seal, dice, unix_offset_ns=world.unix_start_ns)
        world.install(node, COORDINATION, machine, polled=True)
        world.install(node, JOBS, engine)
        world.order(node, COORDINATION, affiliation.FoundCoordinators(self._candidates(node)))
        world.order(node, COORDINATION, affiliation.Advertise(self._adverts[node]))

    def _build_gateway(self, node: int) -> None:
        world = self.world
        dice = Draws(world.seed, machine_stream(node, _COORDINATION_SERVICE))
        follower = following.Follower(node, PlainNotary(node), dice, unix_offset_ns=world.unix_start_ns)
        world.install(node, COORDINATION, follower, polled=True)
        own = self.coordinates[node]
        outlook: Outlook[int] = Outlook(
            rtt_of=lambda peer: self._measured(node, peer), estimate_of=lambda there: estimate_ns(own, there)
        )
        jobs_dice = Draws(world.seed, machine_stream(node, _JOBS_SERVICE))
        said = self.settings.jobs
        two = said.two_choices and said.policy == "completion"
        world.install(node, JOBS, Dispatcher(self._policy(jobs_dice), outlook, jobs_dice, two_choices=two))
        world.order(node, COORDINATION, following_events.FoundCoordinators(self._candidates(node)))
        for cargo in self.cargos:
            world.order(node, COORDINATION, following_events.Want(cargo))

    def _policy(self, dice: Draws) -> Policy[int]:
        match self.settings.jobs.policy:
            case "random":
                return at_random(dice)
            case "rtt":
                return by_rtt()
            case "price":
                return by_price()
            case _:
                return soonest

    def _measured(self, node: int, peer: int) -> int | None:
        """A round trip is known where a connection is kept: heartbeats run on it."""
        connections = self.world.connections
        if connections is not None and connections.keeps(node, peer):
            return self.world.rtt_ns(node, peer)
        return None

    def _candidates(self, node: int) -> tuple[CoordinatorCandidate[int], ...]:
        own = self.coordinates[node]
        return tuple(
            CoordinatorCandidate(peer, estimate_ns(own, self.coordinates[peer])) for peer in self.coordinators
        )

    # --- glue -------------------------------------------------------------------------------------

    def _heard(self, now: Instant, node: int, event: Any) -> None:  # noqa: ANN401 - events of three machines
        world = self.world
        match event:
            case affiliation.NeedCandidates():
                found = affiliation.FoundCoordinators(self._candidates(node))
                world.order(node, COORDINATION, found, after(now, _LOOKUP_NS))
            case following_events.NeedCoordinators():
                wanted = following_events.FoundCoordinators(self._candidates(node))
                world.order(node, COORDINATION, wanted, after(now, _LOOKUP_NS))
            case SummaryMade():
                self._spread(now, node, event)
            case following_events.IslandSeen():
                self._seen(node, cast("following_events.IslandSeen[int]", event))
            case following_events.IslandUnseen():
                self._unseen(node, cast("following_events.IslandUnseen[int]", event))
            case _:
                pass

    def _seen(self, node: int, event: following_events.IslandSeen[int]) -> None:
        island = event.island
        self._known.setdefault((node, island.peer), set()).add(event.cargo)
        self.world.order(node, JOBS, Seen(island.peer, island.advert, island.sequence))

    def _unseen(self, node: int, event: following_events.IslandUnseen[int]) -> None:
        cargos = self._known.get((node, event.peer), set())
        cargos.discard(event.cargo)
        if not cargos:
            self.world.order(node, JOBS, Unseen(event.peer))

    def _spread(self, now: Instant, node: int, made: SummaryMade) -> None:
        for other in (*self.coordinators, *self.gateways):
            if other != node:
                at = after(now, self.world.one_way_ns(node, other))
                learn = following_events.LearnSummary if other in self.gateways else LearnCoordinator
                self.world.order(other, COORDINATION, learn(made.envelope), at)

    def _job_heard(self, now: Instant, node: int, event: Any) -> None:  # noqa: ANN401 - the union of job events
        match event:
            case LoadChanged(active=active, queued=queued):
                self._advertise(node, active, queued)
            case JobPlaced():
                self._paid[event.job] = event.price_ucr
                if event.attempt == 1:
                    self._best[event.job] = self._oracle_ns(now, node, event.job)
            case JobDone():
                self._done(node, event)
            case _:
                pass

    def _advertise(self, node: int, active: int, queued: int) -> None:
        advert = self._adverts[node]
        if advert.cargos[0].active == active and advert.cargos[0].queued == queued:
            return
        cargos = tuple(msgspec.structs.replace(c, active=active, queued=queued) for c in advert.cargos)
        self._adverts[node] = msgspec.structs.replace(advert, cargos=cargos)
        self.world.order(node, COORDINATION, affiliation.Advertise(self._adverts[node]))

    def _oracle_ns(self, now: Instant, gateway: int, job: int) -> int:
        """How soon the job could have ended, for one who knows all loads and distances at this moment."""
        _, cargo, prompt, output = self._open[job]
        best = 1 << 62
        for node in self.islands:
            if not self.world.is_up(node) or all(c.digest != cargo for c in self._adverts[node].cargos):
                continue
            engine = self.engines[node]
            together = min(engine.active, engine.slots - 1) + 1
            took = engine.free_in_ns(now) + engine.run_ns(prompt, output, together)
            best = min(best, self.world.rtt_ns(gateway, node) + took)
        return best

    def _done(self, node: int, event: JobDone) -> None:
        at, cargo, _, _ = self._open.pop(event.job)
        regret_ns = event.took_ns - self._best.pop(event.job, event.took_ns)
        self.jobs.rows.append(
            (
                ns_to_seconds(at - self._start),
                node,
                event.peer,
                self.cargos.index(cargo),
                ns_to_seconds(event.took_ns),
                ns_to_seconds(regret_ns),
                self._paid.pop(event.job, 0),
                event.attempts,
            )
        )

    # --- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it. `sum_up` afterwards, also if it was cut short."""
        world, said = self.world, self.settings
        world.run_for(seconds_to_ns(said.jobs.settle_s))
        self._start = world.now
        end = after(self._start, seconds_to_ns(said.world.duration_s))
        wanted = Draws(said.world.seed, Stream.KEYS)
        popularity = zipf_weights(len(self.cargos), said.arrivals.zipf)
        models: dict[str, int] = {}
        for number, arrival in enumerate(
            arrivals(said.arrivals, self.dice, Span(self._start, end), self.folder)
        ):
            which = wanted.weighted(popularity)
            prompt = round(wanted.log_normal(said.jobs.prompt_median, said.jobs.token_sigma))
            output = round(wanted.log_normal(said.jobs.output_median, said.jobs.token_sigma))
            if arrival.model:
                which = models.setdefault(arrival.model, len(models)) % len(self.cargos)
                prompt, output = arrival.prompt_tokens, arrival.output_tokens
            gateway = wanted.choice(self.gateways)
            world.at(Instant(arrival.at_ns), self._ask(number, gateway, self.cargos[which], prompt, output))
        for loss in said.loss:
            at = after(self._start, seconds_to_ns(loss.at_s))
            world.at(at, self._lose(loss.coordinators, silent=loss.silent))
        run_in_slices(world, end, said.world.slices, self._slice)
        world.run_for(seconds_to_ns(_GRACE_S))

    def _ask(self, number: int, gateway: int, cargo: str, prompt: int, output: int) -> Any:  # noqa: ANN401, PLR0917
        def ask() -> None:
            self._open[number] = (self.world.now, cargo, max(1, prompt), max(1, output))
            self.world.order(gateway, JOBS, Place(number, shape_of_tokens(cargo, prompt, output)))

        return ask

    def _lose(self, count: int, *, silent: bool) -> Any:  # noqa: ANN401 - a thunk
        def lose() -> None:
            """Those that most Islands use die."""
            books = {node: len(m.book) for node in self.coordinators if (m := self._coordinator(node))}
            busiest = sorted(books, key=lambda node: (-books[node], node))[:count]
            before = self._vouching()
            for node in busiest:
                self.world.kill(node, silent=silent)
            self._killed_at = self.world.now
            after_it = self._vouching()
            self._orphans = {
                island: self.world.now for island in self.islands if after_it[island] < min(2, before[island])
            }
            self._watch()

        return lose

    def _coordinator(self, node: int) -> Coordinator[int] | None:
        return self.world.machine(node, COORDINATION) if self.world.is_up(node) else None

    def _vouching(self) -> dict[int, int]:
        """Live coordinators that know each Island."""
        live = [machine for node in self.coordinators if (machine := self._coordinator(node))]
        return {island: sum(m.book.get(island) is not None for m in live) for island in self.islands}

    def _watch(self) -> None:
        """Look whether those that lost a coordinator have as many again as they should."""
        up = sum(self.world.is_up(node) for node in self.coordinators)
        wanted = min(2, up)
        vouching = self._vouching()
        for island, since in list(self._orphans.items()):
            if vouching[island] >= wanted:
                self._picked_up.append(ns_to_seconds(self.world.now - since))
                del self._orphans[island]
        if self._orphans:
            self.world.at(after(self.world.now, _LOOK_NS), self._watch)

    def _slice(self, share: float) -> None:
        world, record = self.world, self.record
        at = world.now - self._start
        dispatchers = [world.machine(node, JOBS) for node in self.gateways]
        record.point("jobs open", at, float(sum(d.open_jobs for d in dispatchers)))
        record.point("jobs waiting for an Island", at, float(sum(d.waiting for d in dispatchers)))
        record.point("Islands known per gateway", at, mean([float(len(d.book)) for d in dispatchers]))
        vouching = self._vouching().values()
        record.point("Islands with fewer than two coordinators", at, float(sum(n < 2 for n in vouching)))
        self.progress("measuring", share)

    def sum_up(self) -> None:
        """Figures of what has happened so far."""
        record = self.record
        latencies = self.jobs.numbers("latency_s")
        record.measure_spread("job latency", latencies, "s")
        record.measure("job latency mean", mean(latencies), "s", "lower")
        regrets = self.jobs.numbers("regret_s")
        record.measure("placement regret mean", mean(regrets), "s over the best possible", "lower")
        record.measure_spread("placement regret", regrets, "s")
        record.measure("price per job", mean(self.jobs.numbers("price_ucr")), "micro-credits", "lower")
        record.measure("Islands asked per job", mean(self.jobs.numbers("attempts")), "mean", "lower")
        record.measure("jobs done", float(len(latencies)), "jobs", "higher")
        record.measure("jobs unfinished", float(len(self._open)), "jobs", "lower")
        if self._killed_at is not None:
            picked = sorted(self._picked_up)
            record.measure_spread("Islands picked up after", picked, "s")
            record.measure("Islands picked up after at most", max(picked, default=0.0), "s", "lower")
            record.measure("Islands never picked up", float(len(self._orphans)), "Islands", "lower")
            lost_s = ns_to_seconds(self._killed_at - self._start)
            during = [
                latency
                for at, latency in zip(self.jobs.numbers("time_s"), latencies, strict=True)
                if lost_s <= at < lost_s + 10.0
            ]
            record.measure("job latency mean in the 10 s after", mean(during), "s", "lower")
