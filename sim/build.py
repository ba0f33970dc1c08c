"""From settings to a world: links, connections, and nodes with the lines and NAT that a scenario asks for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from protocol.instants import Instant, seconds_to_ns
from sim.config import ScenarioSettings
from sim.connections import ConnectionPolicy, Nat
from sim.draws import Draws, Stream
from sim.links import ACCESS_US, Links, LinksError
from sim.settings import ScenarioError
from sim.world import World

#: Told (what is being done, share done from 0 to 1).
Progress: TypeAlias = Callable[[str, float], None]

_MBIT: Final = 1_000_000


def build_world(settings: ScenarioSettings, folder: Path) -> World:
    """An empty world with these links. `folder`: where files are looked up. Raises ScenarioError."""
    links = _links(settings, folder)
    kept = settings.connections
    if not kept.kept:
        if kept.nat_share or kept.unreachable_share:
            raise ScenarioError("NAT needs connections: set connections.kept, for example to 128")
        return World(settings.world.seed, links)
    policy = ConnectionPolicy(
        kept=kept.kept,
        setup_rtts=kept.setup_rtts,
        dial_timeout_ns=seconds_to_ns(kept.dial_timeout_s),
        heartbeat_timeout_ns=seconds_to_ns(kept.heartbeat_timeout_s),
        punch_share=kept.punch_share,
    )
    return World(settings.world.seed, links, connections=policy)


def _links(settings: ScenarioSettings, folder: Path) -> Links:
    said = settings.links
    jitter_ns = round(said.jitter_ms * 1_000_000)
    try:
        if said.model == "uniform":
            return Links.uniform(round(said.one_way_ms * 1_000_000), loss=said.loss, jitter_ns=jitter_ns)
        if said.model == "matrix":
            return Links.from_matrix(folder / said.file, loss=said.loss, jitter_ns=jitter_ns)
        low, high = said.inflation
        return Links.geography(
            settings.world.seed,
            inflation_pm=(round(low * 1000), round(high * 1000)),
            access_us=ACCESS_US if said.access else (0,),
            loss=said.loss,
            jitter_ns=jitter_ns,
        )
    except (LinksError, ValueError) as error:
        raise ScenarioError(f"links: {error}") from error


class NodeMaker:
    """Adds nodes to a world as the scenario describes them."""

    def __init__(self, world: World, settings: ScenarioSettings) -> None:
        self._world = world
        self._dice = Draws(world.seed, Stream.NAT)
        self._connections = settings.connections
        links = settings.links
        self._up_bps = round(links.up_mbps * _MBIT)
        self._down_bps = round(links.down_mbps * _MBIT)
        self._service_ns = round(links.service_us * 1000)

    def add(self) -> tuple[int, Nat]:
        """One more node: its number and how it can be reached."""
        nat = Nat.OPEN
        kept = self._connections
        if kept.nat_share or kept.unreachable_share:
            drawn = self._dice.unit()
            if drawn < kept.unreachable_share:
                nat = Nat.UNREACHABLE
            elif drawn < kept.unreachable_share + kept.nat_share:
                nat = Nat.NATED
        node = self._world.add_node(
            nat=nat, up_bps=self._up_bps, down_bps=self._down_bps, service_ns=self._service_ns
        )
        return node, nat


@contextmanager
def calm_collector() -> Generator[None]:
    """No cycle collections while a world runs: its millions of objects form no cycles, and each full collection
    would walk all of them. What exists already is frozen.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def run_in_slices(world: World, until_ns: int, slices: int, each: Callable[[float], None]) -> None:
    """Run to an instant; after each slice of the way call `each` with the share done."""
    start = world.now
    for n in range(1, slices + 1):
        world.run_until(Instant(start + (until_ns - start) * n // slices))
        each(n / slices)
