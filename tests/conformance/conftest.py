"""The networks that every scenario runs against: the simulator, with several seeds, and real processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest

from bench.lab import Lab, why_unavailable
from bench.networks.base import CoordinationNetwork, LookupResult, Network
from bench.networks.coordination import ProcessCoordination, SimulatedCoordination
from bench.networks.processes import ProcessNetwork, Spawner
from bench.networks.simulated import SimulatedNetwork
from dht.keys import key_of_capability
from dht.policy import DhtPolicy
from node.overlay.overlay import NODE_POLICY
from protocol.instants import SECOND_NS
from sim.connections import ConnectionPolicy

#: Small, so that lookups take several hops and tables do not hold everybody.
K = 5

#: So short that expiry can be waited for.
PROVIDER_TTL_S = 9

#: Bootstrap peers are asked this often.
HEAL_S = 8

#: Within this time a lookup lacks nobody: one retry in virtual time, in real as many as a busy machine needs.
LATE_S = {"sim": 3.0, "node": 45.0}

#: What holds at the first look in virtual time, holds within this time for processes: one that is kept from its
#: processor stores late, answers late, and is left out of lookups.
AT_ONCE_S = {"sim": 0.0, "node": 45.0}

SIM_PEERS = 36
NODE_PEERS = 16
LAB_PEERS = 10

#: With these the simulator's network is as the processes': kept connections, heartbeats, their policy.
SIMULATED = ["sim-1", "sim-2", "sim-datagrams"]
PROCESSES = pytest.param("node", marks=pytest.mark.slow)


@dataclass
class Scenario:
    """A network of at least `size` live peers that know their neighbours, and what its settings say."""

    net: Network
    size: int
    k: int = K
    provider_ttl_s: int = PROVIDER_TTL_S

    def some(self, count: int, *, but: tuple[int, ...] = (0,)) -> list[int]:
        """Live peers, spread over the network."""
        peers = [peer for peer in self.net.live if peer not in but]
        return [peers[place * len(peers) // count] for place in range(count)]

    @property
    def enough_copies(self) -> int:
        """An order to store is done when three quarters of k peers have what was stored; the rest follows."""
        return self.k * 3 // 4

    @property
    def first_tries(self) -> float:
        """Which share of the k nearest may lack in lookups that were not repeated."""
        return 0.05 if self.net.kind == "sim" else 0.3

    async def holds(self, what: str, condition: Callable[[], object]) -> None:
        """Assert it: at once in virtual time, soon in real."""
        await self.net.until(condition, what, within_s=AT_ONCE_S[self.net.kind])

    def missing(self, asker: int, key: int, found: LookupResult, among: list[int] | None = None) -> int:
        """How many of the k nearest a lookup did not find. What it found must be in order."""
        truth = self.net.closest(key, self.k, among, but=asker)
        assert list(found.peers) == self.net.closest(key, self.k, found.peers)
        return len(set(truth) - set(found.peers))

    async def still_missing(self, asker: int, key: int) -> int:
        """The same for a lookup now; should it lack somebody, for the best of those made in the time after it.
        Who is late is left out of a result: a far peer if a link to it had to be opened first, any process
        while others keep it from its processor.
        """
        missing = self.missing(asker, key, await self.net.find_closest(asker, key))
        deadline_s = self.net.now_s + LATE_S[self.net.kind]
        while missing and self.net.now_s < deadline_s:
            await self.net.wait(3)
            missing = min(missing, self.missing(asker, key, await self.net.find_closest(asker, key)))
        return missing


@pytest.fixture(scope="package")
def spawner() -> Generator[Spawner]:
    with Spawner() as spawner:
        yield spawner


@pytest.fixture(scope="package")
def processes(spawner: Spawner, tmp_path_factory: pytest.TempPathFactory) -> Generator[ProcessNetwork]:
    """On loopback, shared by all scenarios: each fills up what an earlier one killed."""
    with ProcessNetwork(spawner, tmp_path_factory.mktemp("peers"), settings=node_settings()) as net:
        yield net


@pytest.fixture
def parted_processes(spawner: Spawner, tmp_path_factory: pytest.TempPathFactory) -> Generator[ProcessNetwork]:
    """Each in a network namespace of its own, so that the network between them can be cut."""
    if reason := why_unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("parted")
    with (
        Lab(2.0, nodes=LAB_PEERS) as lab,
        ProcessNetwork(spawner, folder, settings=node_settings(), lab=lab) as net,
    ):
        yield net


def node_settings() -> dict[str, object]:
    return {"overlay.k": K, "overlay.provider_ttl_s": PROVIDER_TTL_S, "overlay.heal_s": HEAL_S}


def simulated(name: str) -> SimulatedNetwork:
    connections = None if name == "sim-datagrams" else ConnectionPolicy()
    policy = dataclasses.replace(
        DhtPolicy() if connections is None else NODE_POLICY,
        k=K,
        provider_ttl_ns=PROVIDER_TTL_S * SECOND_NS,
        provide_interval_ns=PROVIDER_TTL_S * SECOND_NS // 3,
    )
    seed = 1 + SIMULATED.index(name)
    return SimulatedNetwork(seed, policy, connections=connections, heal_s=HEAL_S)


@pytest.fixture(params=[*SIMULATED, PROCESSES])
def network(request: pytest.FixtureRequest) -> Network:
    if request.param == "node":
        return request.getfixturevalue("processes")
    return simulated(request.param)


@pytest.fixture(params=[*SIMULATED, PROCESSES])
def network_to_part(request: pytest.FixtureRequest) -> Network:
    if request.param == "node":
        return request.getfixturevalue("parted_processes")
    return simulated(request.param)


async def filled(net: Network, size: int) -> Scenario:
    if len(net.live) < size:
        await net.join(size - len(net.live))
    await net.settle(K, within_s=180)
    return Scenario(net, size)


@pytest.fixture
async def scenario(network: Network) -> Scenario:
    return await filled(network, NODE_PEERS if network.kind == "node" else SIM_PEERS)


@pytest.fixture
async def scenario_to_part(network_to_part: Network) -> Scenario:
    return await filled(network_to_part, LAB_PEERS if network_to_part.kind == "node" else SIM_PEERS)


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> Callable[[int], list[int]]:
    """`keys(n)`: n places in the key space, for each test its own, always the same."""
    test = request.function.__name__
    return lambda count: [key_of_capability(f"{test}-{number}") for number in range(count)]


@pytest.fixture
def coordinating_processes(
    spawner: Spawner, tmp_path_factory: pytest.TempPathFactory
) -> Generator[ProcessCoordination]:
    with ProcessCoordination(spawner, tmp_path_factory.mktemp("coordination")) as net:
        yield net


@pytest.fixture(params=["sim-1", "sim-2", PROCESSES])
def coordination(request: pytest.FixtureRequest) -> CoordinationNetwork:
    if request.param == "node":
        return request.getfixturevalue("coordinating_processes")
    return SimulatedCoordination(int(request.param.removeprefix("sim-")))
