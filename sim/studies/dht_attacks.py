"""Who attacks the DHT, with which keys, from which networks, and what it gets them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from dht.keys import KEY_BITS
from protocol.instants import MILLISECOND_NS
from sim.behaviours import Conspirator, FreeRider, Liar, Ring, SlowLoris
from sim.config import AttackSettings
from sim.dht_network import DhtNetwork
from sim.draws import Draws, Stream
from sim.ports import AnyMachine
from sim.record import Recorder, mean

#: Bits that an eclipse attacker's key shares with its victim's target: what grinding keys on one machine for
#: some days gives (2**40 hashes), far more than a network of millions needs to stand closest.
ECLIPSE_BITS: Final = 40

#: Keys of phantoms that liars name.
PHANTOMS: Final = 20

#: Lookups for a victim's key, while there are eclipse attackers: every other one.
_TARGETED: Final = 2


class Attackers:
    """Assigned by lot: node n attacks if its draw falls into an attack's share; the same nodes for the same
    seed.
    """

    def __init__(self, network: DhtNetwork, attacks: Sequence[AttackSettings]) -> None:
        self._network = network
        self._attacks = tuple(attacks)
        self._dice = Draws(network.world.seed, Stream.ATTACK)
        self._role: dict[int, AttackSettings] = {}
        self._ring = Ring()
        self._phantoms: list[int] = []
        self._victims = [
            self._key() for _ in range(max((a.victims for a in attacks if a.kind == "eclipse"), default=0))
        ]
        self._turn = 0
        self._taken: list[float] = []
        self._first: list[float] = []
        if attacks:
            network.wrap = self._wrap

    def identity(self, node: int) -> tuple[int | None, int | None]:
        """Key and group of a node to be added; None: as usual. Decides who attacks."""
        if not self._attacks:
            return None, None
        drawn = self._dice.unit()
        for attack in self._attacks:
            drawn -= attack.share
            if drawn < 0.0:
                self._role[node] = attack
                break
        else:
            return None, None
        attack = self._role[node]
        key = None
        if attack.kind == "eclipse":
            victim = self._victims[self._dice.below(attack.victims)]
            low = KEY_BITS - ECLIPSE_BITS
            key = victim >> low << low | self._key() & ((1 << low) - 1)
        group = None
        if attack.kind in ("sybil", "eclipse") and self._network.settings.hosts_per_group:
            group = 1_000_000 + self._dice.below(attack.groups)
        return key, group

    def joined(self, node: int) -> None:
        """The node has been added."""
        attack = self._role.get(node)
        if attack is not None and attack.kind in ("sybil", "eclipse"):
            self._ring.add(self._network.directory.keys[node], node)

    def make_phantoms(self) -> None:
        """Peers that liars name: keys that were seen once, nobody there."""
        if not any(attack.kind == "liar" for attack in self._attacks):
            return
        world, directory = self._network.world, self._network.directory
        for _ in range(PHANTOMS):
            node = world.add_node()
            directory.add(self._key(), 0)
            world.kill(node, silent=True)
            self._phantoms.append(node)

    def honest_of(self, nodes: Sequence[int], dice: Draws) -> int:
        """One node by lot that does not attack."""
        while True:
            node = nodes[dice.below(len(nodes))]
            if node not in self._role:
                return node

    def target(self, target: int) -> int:
        """What a lookup is for: of victims, every other one."""
        if not self._victims:
            return target
        self._turn += 1
        if self._turn % _TARGETED:
            return target
        return self._victims[self._dice.below(len(self._victims))]

    def count(self, peers: Iterable[int]) -> int:
        """Attackers among these."""
        return sum(peer in self._role for peer in peers) if self._role else 0

    def judge(self, closest: Sequence[int]) -> None:
        """A lookup's result: how much of it is theirs?"""
        if self._attacks and closest:
            self._taken.append(self.count(closest) / len(closest))
            self._first.append(float(closest[0] in self._role))

    def sum_up(self, record: Recorder) -> None:
        if not self._attacks:
            return
        record.measure("attackers", 100.0 * len(self._role) / len(self._network.directory), "% of nodes")
        record.measure("attackers in results", 100.0 * mean(self._taken), "%", "lower")
        record.measure("attacker is the closest", 100.0 * mean(self._first), "% of lookups", "lower")
        in_tables = [value for _, value in record.series.get("attackers in tables (%)", [])]
        record.measure("attackers in tables", mean(in_tables), "% mean", "lower")

    def _wrap(self, node: int, machine: AnyMachine) -> AnyMachine:
        attack = self._role.get(node)
        match None if attack is None else attack.kind:
            case "free-rider":
                return FreeRider(machine)
            case "slow-loris":
                return SlowLoris(machine, round((attack.delay_ms if attack else 0) * MILLISECOND_NS))
            case "liar":
                return Liar(machine, self._phantoms)
            case "sybil" | "eclipse":
                return Conspirator(machine, self._ring)
            case _:
                return machine

    def _key(self) -> int:
        key = 0
        for _ in range(KEY_BITS // 64):
            key = key << 64 | self._dice.u64()
        return key
