"""A network of DHT nodes in a world: keys, groups, joining, tables as at rest, the wire format, and the truth
to compare with.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import struct
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final, Protocol, TypeAlias, cast

from dht.coordinates import UNKNOWN
from dht.core import Core
from dht.directory import Keys
from dht.events import RoundTripSeen
from dht.keys import KEY_BITS, key_of_peer
from dht.machine import DhtMachine
from dht.messages import DhtMessage
from dht.policy import DhtPolicy
from dht.table import MAX_BUCKETS, VERIFIED
from protocol.ids import PeerId, peer_id_of
from protocol.instants import MILLISECOND_NS, Instant
from sim.config import DhtSettings
from sim.connections import ConnectionPolicy
from sim.coordinates import settle
from sim.draws import BulkDraws, Draws, Stream, machine_stream
from sim.settings import ScenarioError
from sim.world import AnyMachine, World

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

#: Candidates per place that a table at rest has chosen among, by RTT: the nearest k of so many times k.
#: Measured: live nodes among 10,000 come to a mean RTT of 44 ms in their far buckets after ten minutes (plain:
#: 94 ms), whether they began with random or half sorted tables; built ones have 51 ms with 8, 45 with 16, 42
#: with 32. So 16 is a network after ten minutes; after hours it is better.
REST_POOL: Final = 16

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
        #: Keys of the nodes that serve (up, joined or about to, no clients), sorted, each with its node.
        self.serving: list[tuple[int, int]] = []
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
            insort(self.serving, (self.directory.keys[node], node))
        return machine

    def left(self, node: int) -> None:
        """The node is down (or out): it is no longer among those to be found."""
        item = (self.directory.keys[node], node)
        at = bisect_left(self.serving, item)
        if at < len(self.serving) and self.serving[at] == item:
            del self.serving[at]

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

        Coordinates: real Vivaldi, see `sim.coordinates`. Tables: of each bucket's
        key range k nodes, drawn; in an RTT-aware network the nearest of REST_POOL times k drawn ones; all of
        them verified. The own neighbourhood is complete. No message is sent for this, so no cost of joining can
        be read from it.
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
        for done, node in enumerate(order):
            self._fill(node, fast)
            if done % 256 == 0:
                tell(0.5 + done / len(order) / 2)

    def _fill(self, node: int, dice: BulkDraws) -> None:
        machine = self.machine(node)
        if machine is None:
            return
        buckets = self._buckets(node, dice)
        rtts_us = [self._measured_us(node, bucket) for bucket in buckets]
        core = _core_of(machine)
        if self.settings.hosts_per_group:  # the table itself decides on groups
            for peers, rtts in zip(buckets, rtts_us, strict=True):
                for peer, rtt_us in zip(peers, rtts, strict=True):
                    there = self._coordinates.get(peer, UNKNOWN)
                    core.table.answered(peer, 0, rtt_us, there, core.vivaldi.packed)
            return
        table = core.table
        peers = [peer for bucket in buckets for peer in bucket]
        count = len(peers)
        table.peers = array("I", peers)
        table.coordinates = array("Q", [self._coordinates.get(peer, UNKNOWN) for peer in peers])
        table.rtts_us = array("I", [rtt for bucket in rtts_us for rtt in bucket])
        table.checked = array("I", bytes(4 * count))
        table.since = array("I", bytes(4 * count))
        table.groups = array("H", bytes(2 * count))
        table.flags = bytearray([VERIFIED]) * count
        table.starts = array("H", accumulate((len(bucket) for bucket in buckets), initial=0))

    def _measured_us(self, node: int, peers: Sequence[int]) -> list[int]:
        """Round trips as entries hold them. A measured entry is one with a connection: where there are
        connections, there are none yet.
        """
        if self.world.connections is not None:
            return [0] * len(peers)
        return [rtt_ns // 1000 or 1 for rtt_ns in self.world.rtts_ns(node, peers)]

    def _buckets(self, node: int, dice: BulkDraws) -> list[list[int]]:
        """Peers by bucket: bucket i shares i bits with the node, the last one all that share more."""
        serving, key, k = self.serving, self.directory.keys[node], self.policy.k
        buckets: list[list[int]] = []
        start, end = 0, len(serving)
        for bit in range(MAX_BUCKETS - 1):
            if end - start <= k:
                break
            shift = KEY_BITS - 1 - bit
            upper = (key >> shift | 1) << shift
            middle = bisect_left(serving, (upper, -1), start, end)
            if key >> shift & 1:
                buckets.append(self._chosen(node, start, middle, dice))
                start = middle
            else:
                buckets.append(self._chosen(node, middle, end, dice))
                end = middle
        buckets.append([peer for _, peer in serving[start:end] if peer != node][:k])
        return buckets

    def _chosen(self, node: int, left: int, right: int, dice: BulkDraws) -> list[int]:
        serving, policy, span = self.serving, self.policy, right - left
        if span <= policy.k:
            return [peer for _, peer in serving[left:right]]
        wanted = min(span, policy.k * REST_POOL if policy.rtt_aware else policy.k)
        if wanted == span:
            drawn = [peer for _, peer in serving[left:right]]
        else:
            places = dict.fromkeys([left + (u32 * span >> 32) for u32 in dice.u32s(wanted + wanted // 4)])
            drawn = [serving[place][1] for place in places][:wanted]
        if not policy.rtt_aware:
            return drawn[: policy.k]
        seniors, rest = drawn[: policy.senior_entries], drawn[policy.senior_entries :]
        near = sorted(zip(self.world.rtts_ns(node, rest), rest, strict=True))
        return [*seniors, *(peer for _, peer in near[: policy.k - len(seniors)])]


def estimated_size(message: DhtMessage) -> int:
    """About what the wire format takes, without encoding."""
    contacts = len(getattr(message, "contacts", ())) + len(getattr(message, "providers", ()))
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
