"""A network of DHT nodes in a world: keys, groups, joining, tables as at rest, the wire format, and the truth
to compare with.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias, cast

from dht.coordinates import UNKNOWN
from dht.core import Core
from dht.directory import Keys
from dht.events import RoundTripSeen
from dht.keys import KEY_BITS, key_of_peer
from dht.machine import DhtMachine
from dht.messages import DhtMessage, Nodes, Page, Pong, Providers, Records
from dht.policy import DhtPolicy
from protocol.ids import PeerId, peer_id_of
from protocol.instants import MILLISECOND_NS, Instant
from sim.config import DhtSettings
from sim.connections import ConnectionPolicy
from sim.coordinates import settle
from sim.draws import BulkDraws, Draws, Stream, machine_stream
from sim.ports import AnyMachine
from sim.rest_tables import RestTables
from sim.settings import ScenarioError
from sim.world import World

DHT: Final = "dht"

#: Service number of the DHT in `machine_stream`.
DHT_SERVICE: Final = 0

#: Size of a message without lists, and per contact in it, bytes: means of the wire format (tests compare).
BASE_BYTES: Final = 70
CONTACT_BYTES: Final = 89

#: As in the node: what making a connection may take beside its round trips.
CONNECT_ALLOWANCE_NS: Final = 100 * MILLISECOND_NS

#: The first heartbeat on a new connection is back a round trip and this much later.
_HEARTBEAT_NS: Final = 1 * MILLISECOND_NS

#: Messages that list peers.
_LISTING: Final = (Nodes, Pong, Records, Providers, Page)

#: Newcomers up to this many are put in their places one by one.
_FEW: Final = 64

_PLACE: Final = struct.Struct("<QQ")


class Behaviour(Protocol):
    """A machine around a machine: what an attacker does differently."""

    inner: AnyMachine


Wrap: TypeAlias = Callable[[int, AnyMachine], AnyMachine]


class SimDirectory:
    """Keys and network groups by node number."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self.groups: list[int] = []

    @property
    def keys(self) -> Keys:
        return self._keys

    def group_of(self, peer: int) -> int:
        return self.groups[peer]

    def add(self, key: int, group: int) -> None:
        self._keys.append(key)
        self.groups.append(group)

    def __len__(self) -> int:
        return len(self._keys)


class DhtNetwork:
    """Adds nodes with a DHT machine to a world, and knows who is in."""

    def __init__(self, world: World, settings: DhtSettings, *, codec: bool = False) -> None:
        self.world = world
        self.settings = settings
        self.directory = SimDirectory()
        self.policy = policy_of(settings, None if world.connections is None else world.connections.policy)
        self._serving: list[tuple[int, int]] = []
        self._unsorted: list[tuple[int, int]] = []
        self.clients: set[int] = set()
        self.wrap: Wrap | None = None
        self._coordinates: dict[int, int] = {}
        self._groups = Draws(world.seed, Stream.ISLANDS)
        world.service(DHT, size_of=estimated_size)
        if world.connections is not None:
            world.connections.opened.append(self._connected)
        if codec:
            from sim.dht_codec import DhtCodec  # noqa: PLC0415 - only this mode pays for it

            world.service(DHT, round_trip=DhtCodec(self).round_trip)

    # --- nodes ------------------------------------------------------------------------------------

    def add(self, node: int, *, client: bool = False, key: int | None = None, group: int | None = None) -> None:
        """Give a node of the world a key and a machine. Nodes must come in order of their numbers."""
        if node != len(self.directory):
            raise ValueError(f"node {len(self.directory)} comes next, not {node}")
        hosts = self.settings.hosts_per_group
        if group is None:
            group = 1 + self._groups.below(max(1, self.world.nodes // hosts)) if hosts else 0
        self.directory.add(key_of_peer(self.peer_id(node)) if key is None else key, group)
        if client:
            self.clients.add(node)
        self.install(node)

    def install(self, node: int) -> DhtMachine:
        """A new machine for a node (its first, or after it came back)."""
        world = self.world
        dice = Draws(world.seed, machine_stream(node, DHT_SERVICE), world.now)
        client = node in self.clients
        offset = world.unix_start_ns
        machine = DhtMachine(node, self.directory, dice, self.policy, unix_offset_ns=offset, client=client)
        world.install(node, DHT, machine if self.wrap is None else self.wrap(node, machine))
        if not client:
            self._unsorted.append((self.directory.keys[node], node))
        return machine

    @property
    def serving(self) -> list[tuple[int, int]]:
        """Keys of the nodes that serve (up, joined or about to, no clients), sorted, each with its node."""
        # A million nodes are sorted at once; each put in its place would move half of those before it.
        if len(self._unsorted) > _FEW:
            self._serving.extend(self._unsorted)
            self._serving.sort()
        else:
            for item in self._unsorted:
                insort(self._serving, item)
        self._unsorted.clear()
        return self._serving

    def left(self, node: int) -> None:
        """The node is down (or out): it is no longer among those to be found."""
        item = (self.directory.keys[node], node)
        serving = self.serving
        at = bisect_left(serving, item)
        if at < len(serving) and serving[at] == item:
            del serving[at]

    def machine(self, node: int) -> DhtMachine | None:
        """The node's machine, without the behaviours around it."""
        machine = self.world.machine(node, DHT)
        while machine is not None and not isinstance(machine, DhtMachine):
            machine = cast("Behaviour", machine).inner
        return machine

    def _connected(self, a: int, b: int, ready: int) -> None:
        """Heartbeats measure the round trip of a kept connection at both ends."""
        rtt_ns = self.world.rtt_ns(a, b)
        at = Instant(ready + rtt_ns + _HEARTBEAT_NS)
        self.world.order(a, DHT, RoundTripSeen(b, rtt_ns), at)
        self.world.order(b, DHT, RoundTripSeen(a, rtt_ns), at)

    def closest(self, target: int, count: int) -> list[int]:
        """The truth: the `count` serving nodes closest to the target, closest first."""
        serving = self.serving
        bits = max(0, len(serving).bit_length() - count.bit_length() + 2)
        while True:
            shift = KEY_BITS - bits
            low = target >> shift << shift
            start = bisect_left(serving, (low, -1))
            end = bisect_left(serving, (low + (1 << shift), -1))
            if end - start >= count or bits == 0:
                break
            bits -= 1
        near = sorted((key ^ target, node) for key, node in serving[start:end])
        return [node for _, node in near[:count]]

    def peer_id(self, node: int) -> PeerId:
        """A real peer id; nobody knows its private key."""
        place = _PLACE.pack(self.world.seed, node)
        return peer_id_of(hashlib.blake2b(place, digest_size=32, person=b"archipelag-sim").digest())

    # --- tables at rest ---------------------------------------------------------------------------

    def build_tables(self, progress: Callable[[float], None] | None = None) -> None:
        """Give every node the table and the coordinate that a network at rest would have given it.

        Coordinates: real Vivaldi, see `sim.coordinates`. Tables: see `sim.rest_tables`; all entries verified.
        No message is sent for this, so no cost of joining can be read from it.
        """
        dice = Draws(self.world.seed, Stream.BOOTSTRAP)
        tell = progress or _silent
        nodes = [node for _, node in self.serving]
        machines = {node: self.machine(node) for node in nodes}
        vivaldis = {
            node: _core_of(machine).vivaldi for node, machine in machines.items() if machine is not None
        }
        self._coordinates = settle(self.world, vivaldis, dice, lambda share: tell(share / 2))
        order = [*nodes, *sorted(self.clients)]
        fast = BulkDraws(dice.u64())
        # A measured entry is one with a connection: where there are connections, there are none yet.
        measured = self.world.connections is None
        tables = RestTables(self.world, self.policy, self.serving, self._coordinates, measured=measured)
        for done, node in enumerate(order):
            self._fill(node, tables, fast)
            if done % 256 == 0:
                tell(0.5 + done / len(order) / 2)

    def _fill(self, node: int, tables: RestTables, dice: BulkDraws) -> None:
        machine = self.machine(node)
        if machine is None:
            return
        core = _core_of(machine)
        if not self.settings.hosts_per_group:
            tables.fill(core.table, node, self.directory.keys, dice)
            return
        for bucket in tables.buckets(
            node, self.directory.keys[node], dice
        ):  # the table itself decides on groups
            for peer, rtt_us in zip(tables.peers(bucket), tables.rtts_us(bucket).tolist(), strict=True):
                there = self._coordinates.get(peer, UNKNOWN)
                core.table.answered(peer, 0, rtt_us, there, core.vivaldi.packed)


def estimated_size(message: DhtMessage) -> int:
    """About what the wire format takes, without encoding."""
    if not isinstance(message, _LISTING):
        return BASE_BYTES
    contacts = len(message.contacts)
    if isinstance(message, Providers):
        contacts += len(message.providers)
    return BASE_BYTES + CONTACT_BYTES * contacts


def policy_of(settings: DhtSettings, connections: ConnectionPolicy | None = None) -> DhtPolicy:
    """The policy with the scenario's changes; where messages wait for connections, with the node's own changes
    first. Raises ScenarioError.
    """
    base = DhtPolicy()
    if connections is not None:
        base = dataclasses.replace(
            base,
            connect_ns=CONNECT_ALLOWANCE_NS,
            connect_rtts=connections.setup_rtts + 1,
            rtt_from_first_answer=False,
        )
    known = {field.name: field for field in dataclasses.fields(DhtPolicy)}
    for name, value in settings.policy.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise ScenarioError(f"dht.policy has no {name!r}; {hint}")
        if isinstance(value, bool) != isinstance(known[name].default, bool):
            kind = "true or false" if isinstance(known[name].default, bool) else "a whole number"
            raise ScenarioError(f"dht.policy.{name} must be {kind}")
    try:
        return dataclasses.replace(base, **settings.policy)  # type: ignore[arg-type]
    except ValueError as error:
        raise ScenarioError(f"dht.policy: {error}") from error


def _silent(share: float) -> None:
    """Nobody watches."""


def _core_of(machine: DhtMachine) -> Core:
    """The inside of a node, for tables at rest: they are built, not told."""
    return machine._core  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
