"""Coordinators and Islands: in `sim.World`, and as `archi-gateway` and `archi-node` processes.

The simulated glue is what node/coordination does around the same machines: coordinators are found by the DHT,
heartbeats on kept links report round trips, statements are signed, gossiped and merged.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self, cast

import trio

from bench.networks.base import CoordinationNetwork
from bench.networks.processes import Spawner, announced
from bench.networks.simulated import DHT, SimulatedNetwork
from dht.coordinates import estimate_ns
from dht.events import FindProviders, Found, Provide
from dht.keys import key_of_role
from node.control import NoParams, ask
from node.coordination.karma_views import KarmaParams, KarmaView
from node.identity import load_or_create_identity
from node.overlay.overlay import NODE_POLICY
from node.snapshot import Snapshot
from protocol.adverts import IslandAdvert
from protocol.codec import Codec, Message, encode
from protocol.coordination import COORDINATION, SUMMARY_KIND
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs, after
from routing import affiliation
from routing.candidates import CoordinatorCandidate
from routing.coordinator import Coordinator
from routing.coordinator_events import (
    CoordinatorPolicy,
    Identity,
    LearnCoordinator,
    RoundTripSeen,
    Serve,
    StatementsDue,
    SummaryMade,
)
from routing.gossip import GossipMachine
from routing.gossip_messages import GOSSIP_CODEC, MAX_ITEM_BYTES, AddPeer, Item, Learnt, Opening, Publish
from routing.gossip_peers import GossipPolicy, KindPolicy
from routing.karma import KarmaPolicy, Statement
from routing.karma_store import KarmaStore
from routing.karma_wire import KARMA_KIND, karma_item, karma_kind, karma_opener, seal_statement
from routing.karma_witness import KarmaWitness
from routing.notary import PlainNotary
from routing.trust import FULL
from sim.connections import ConnectionPolicy

_COORDINATION: Final = "coordination"
_GOSSIP: Final = "gossip"
_ROLE: Final = key_of_role("coordinator")
_ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)

#: Between two searches of a coordinator for others.
_SEARCH_NS: Final = 4 * SECOND_NS


class SimulatedCoordination(CoordinationNetwork):
    """Nodes 0, 1, ... of the world are the coordinators, the Islands follow."""

    kind: ClassVar[str] = "sim"

    def __init__(self, seed: int) -> None:
        self.net: Final = SimulatedNetwork(seed, NODE_POLICY, connections=ConnectionPolicy())
        self.world: Final = self.net.world
        self.stores: Final[list[KarmaStore[PeerId]]] = []
        self._coordinators = 0
        self._karma = KarmaPolicy()
        self._searches: dict[int, int] = {}
        self.world.service(_COORDINATION, round_trip=_through(COORDINATION))
        self.world.service(_GOSSIP, round_trip=_through(GOSSIP_CODEC))
        self.world.observe(DHT, self._found)
        self.world.observe(_COORDINATION, self._coordination_event)
        self.world.observe(_GOSSIP, self._gossip_event)

    async def start(self, coordinators: int, islands: int) -> None:
        self._coordinators = coordinators
        await self.net.join(coordinators + islands)
        trusted = {self.net.signers[peer].peer: FULL for peer in range(coordinators)}
        for node in range(coordinators):
            self._be_coordinator(node, trusted)
        for node in range(coordinators, coordinators + islands):
            self._be_island(node)
        self._heartbeat()

    def _be_coordinator(self, node: int, trusted: dict[PeerId, int]) -> None:
        world = self.world
        self.stores.append(KarmaStore(self.net.signers[node].peer, trusted, self._karma))
        machine: Coordinator[int] = Coordinator(
            node,
            PlainNotary(node),
            Dice(world.seed, stream=3000 + node),
            unix_offset_ns=world.unix_start_ns,
            estimate=estimate_ns,
            witness=KarmaWitness(node, self._karma),
        )
        openers = {SUMMARY_KIND: _open_summary(PlainNotary(node)), KARMA_KIND: karma_opener(self._karma)}
        kinds = {
            SUMMARY_KIND: KindPolicy(CoordinatorPolicy().summary_ttl_ns, MAX_ITEM_BYTES),
            KARMA_KIND: karma_kind(self._karma),
        }
        dice = Dice(world.seed, stream=4000 + node)
        gossip: GossipMachine[int] = GossipMachine(
            dice, GossipPolicy(), openers, kinds, unix_offset_ns=world.unix_start_ns
        )
        world.install(node, _COORDINATION, machine, polled=True)
        world.install(node, _GOSSIP, gossip, polled=True)
        world.order(node, _COORDINATION, Serve(Identity(f"coordinator-{node}")))
        self.net.begin(node, lambda ticket: Provide(ticket, _ROLE))
        self._search_often(node)

    def _be_island(self, node: int) -> None:
        world, notary = self.world, PlainNotary(node)
        machine: affiliation.Affiliation[int] = affiliation.Affiliation(
            lambda advert, sequence, expires: notary.seal_advert(
                advert, sequence=sequence, expires_unix_ns=expires
            ),
            Dice(world.seed, stream=5000 + node),
            unix_offset_ns=world.unix_start_ns,
        )
        world.install(node, _COORDINATION, machine, polled=True)
        world.order(node, _COORDINATION, affiliation.Advertise(IslandAdvert(f"island-{node}", ())))

    # --- glue ---------------------------------------------------------------------------------------

    def _search_often(self, node: int) -> None:
        def search() -> None:
            if self.world.is_up(node):
                self._search(node)
                self._search_often(node)

        self.world.at(after(self.world.now, _SEARCH_NS), search)

    def _search(self, node: int) -> None:
        ticket = self.net.begin(node, lambda ticket: FindProviders(ticket, _ROLE, 40))
        self._searches[ticket] = node

    def _found(self, now: Instant, node: int, event: object) -> None:
        del now
        if not isinstance(event, Found) or self._searches.pop(event.ticket, None) is None:
            return
        others = [peer for peer in event.providers if peer != node]
        if node < self._coordinators:
            for peer in others:
                self.world.order(node, _GOSSIP, AddPeer(peer))
                self.world.order(peer, _GOSSIP, AddPeer(node))  # as its hello tells the other side
            return
        machine = self.net.machines[node]
        found = tuple(CoordinatorCandidate(peer, machine.rtt_estimate_ns(peer)) for peer in others)
        self.world.order(node, _COORDINATION, affiliation.FoundCoordinators(found))

    def _coordination_event(self, now: Instant, node: int, event: object) -> None:
        match event:
            case affiliation.NeedCandidates():
                self._search(node)
            case SummaryMade(envelope=envelope):
                item = Item(SUMMARY_KIND, envelope.issuer, b"", envelope.sequence, encode(envelope))
                self.world.order(node, _GOSSIP, Publish(item))
            case StatementsDue(statements):
                for statement in statements:
                    self._state(now, node, statement)
            case _:
                pass

    def _state(self, now: Instant, node: int, said: Statement[int]) -> None:
        """Sign it, hold it, spread it."""
        signers = self.net.signers
        statement = Statement(
            signers[said.issuer].peer,
            signers[said.subject].peer,
            said.sequence,
            said.counters,
            said.past,
            said.min_rtt_us,
        )
        self.stores[node].merge(statement, self._epoch(now))
        envelope = seal_statement(signers[node], statement, self._karma)
        self.world.order(node, _GOSSIP, Publish(karma_item(envelope)))

    def _gossip_event(self, now: Instant, node: int, event: object) -> None:
        if not isinstance(event, Learnt):
            return
        if isinstance(event.body, Statement):
            self.stores[node].merge(cast("Statement[PeerId]", event.body), self._epoch(now))
        elif isinstance(event.body, Envelope):
            self.world.order(node, _COORDINATION, LearnCoordinator(event.body))

    def _heartbeat(self) -> None:
        """Round trips on links between Islands and the coordinators that have their advert."""
        world = self.world
        for island in range(self._coordinators, world.nodes):
            for peer in self._machine(island).coordinators:
                if world.is_up(peer):
                    rtt_ns = world.rtt_ns(island, peer)
                    world.order(peer, _COORDINATION, RoundTripSeen(island, rtt_ns))
                    world.order(island, _COORDINATION, affiliation.RoundTripMeasured(peer, rtt_ns))
        world.at(after(world.now, SECOND_NS), self._heartbeat)

    def _machine(self, island: int) -> affiliation.Affiliation[int]:
        return cast("affiliation.Affiliation[int]", self.world.machine(island, _COORDINATION))

    def _epoch(self, now: Instant) -> int:
        return self._karma.epoch_at(UnixNs(now + self.world.unix_start_ns))

    # --- what scenarios ask -------------------------------------------------------------------------

    async def coordinators_of(self, island: int) -> set[int]:
        await trio.lowlevel.checkpoint()
        return set(self._machine(self._coordinators + island).coordinators)

    async def issuers_about(self, coordinator: int, island: int) -> set[int]:
        await trio.lowlevel.checkpoint()
        signers = self.net.signers
        subject = signers[self._coordinators + island].peer
        issuers = {statement.issuer for statement in self.stores[coordinator].about(subject)}
        return {node for node in range(self._coordinators) if signers[node].peer in issuers}

    async def kill(self, coordinator: int, *, silent: bool = False) -> None:
        self.world.kill(coordinator, silent=silent)
        await trio.lowlevel.checkpoint()

    async def wait(self, seconds: float) -> None:
        await self.net.wait(seconds)

    @property
    def step_s(self) -> float:
        return 0.5

    @property
    def now_s(self) -> float:
        return self.net.now_s


def _through(codec: Codec[Any]) -> Callable[[int, int, Any], tuple[Any, int]]:
    """Every message as the other side decodes it."""

    def round_trip(source: int, target: int, message: Message) -> tuple[Any, int]:
        del source, target
        data = codec.encode(message)
        return codec.decode_untrusted(data), len(data)

    return round_trip


def _open_summary(notary: PlainNotary) -> Callable[[Item, UnixNs], Opening]:
    def open_untrusted(item: Item, now: UnixNs) -> Opening:
        envelope = _ENVELOPE.decode_untrusted(item.payload)
        return Opening(notary.open_summary_untrusted(envelope, now).expires_unix_ns, envelope)

    return open_untrusted


class ProcessCoordination(CoordinationNetwork):
    """Gateways (which are coordinators) and Islands without Cargos, on loopback."""

    kind: ClassVar[str] = "node"

    def __init__(self, spawner: Spawner, folder: Path) -> None:
        self._spawner = spawner
        self._folder = folder
        self._pids: dict[str, int] = {}
        self._coordinators: dict[PeerId, int] = {}
        self._islands: list[PeerId] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def start(self, coordinators: int, islands: int) -> None:
        for number in range(coordinators):
            home = self._home(f"gateway-{number}")
            self._coordinators[load_or_create_identity(home / "identity.key").peer] = number
        entrance = ""
        for number in range(coordinators):
            others = ",".join(peer for peer, other in self._coordinators.items() if other != number)
            settings = {
                "http.port": 0,
                "open": "true",
                "mesh.listen": "/ip4/127.0.0.1/tcp/0",
                "mesh.bootstrap": entrance,
                "mesh.trusted": others,
            }
            out, err = self._start(f"gateway-{number}", settings, gateway=True)
            entrance = entrance or await announced(out, "mesh", err)
        for number in range(islands):
            name = f"island-{number}"
            self._islands.append(load_or_create_identity(self._home(name) / "identity.key").peer)
            settings = {"cargos": "", "network.bootstrap": entrance, "cache_dir": self._folder / "cache"}
            out, err = self._start(name, settings)
            await announced(out, "listening", err)

    def _start(self, name: str, settings: dict[str, Any], *, gateway: bool = False) -> tuple[Path, Path]:
        out, err = self._folder / f"{name}.out", self._folder / f"{name}.err"
        self._pids[name] = self._spawner.start(
            {"name": name, "data_dir": self._home(name), **settings},
            out=out,
            err=err,
            program="archi-gateway" if gateway else "archi-node",
        )
        return out, err

    async def coordinators_of(self, island: int) -> set[int]:
        found = await ask(self._home(f"island-{island}"), "status", NoParams(), result=Snapshot)
        return {self._coordinators[PeerId(peer)] for peer in found.coordinators}

    async def issuers_about(self, coordinator: int, island: int) -> set[int]:
        params = KarmaParams(self._islands[island])
        found = await ask(self._home(f"gateway-{coordinator}"), "karma", params, result=KarmaView)
        return {self._coordinators[PeerId(statement.issuer)] for statement in found.statements}

    async def kill(self, coordinator: int, *, silent: bool = False) -> None:
        # A stopped process is a cut cable to others: the kernel still acknowledges, the program is silent.
        os.kill(self._pids[f"gateway-{coordinator}"], signal.SIGSTOP if silent else signal.SIGKILL)
        await trio.lowlevel.checkpoint()

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    @property
    def step_s(self) -> float:
        return 0.5

    @property
    def now_s(self) -> float:
        return time.monotonic()

    def _home(self, name: str) -> Path:
        return self._folder / name
