"""A network in `sim.World`: the same machines in virtual time, every message through the wire codec.

What stands around the machine in a real node is modelled here as far as the machine notices it: heartbeats on
kept links report round trips (node/link_watch.py), and who finds itself alone enters again
(node/overlay/membership.py), and so, now and then, does everybody.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import trio

from bench.networks.base import LookupResult, Network
from dht.events import (
    DhtCommand,
    DhtEvent,
    FindClosest,
    FindProviders,
    Found,
    GetRecords,
    Join,
    Provide,
    PutRecord,
    RoundTripSeen,
    Stored,
    Withdraw,
)
from dht.keys import key_of_peer, key_of_record
from dht.machine import DhtMachine
from dht.messages import DhtMessage
from dht.policy import DhtPolicy
from dht.records import open_record_untrusted, seal_record
from dht.wire import DHT_CODEC, METHOD_DHT, Contact, from_wire_untrusted, to_wire
from node.overlay.membership import HEAL_S, REJOIN_FIRST_S
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.rpc import RPC_CODEC, Notice
from sim.connections import ConnectionPolicy
from sim.links import Links
from sim.world import World

DHT: Final = "dht"

#: The namespace of records that scenarios put.
NAMESPACE: Final = "conformance"

#: An order that has not ended by then never will: more than a hundred queries that all time out.
_ORDER_S: Final = 120.0

#: Heartbeats of a link that was used lately, and of one that was not; what "lately" means. As
#: node.peer_types.PeersConfig says.
_HEARTBEAT_NS: Final = SECOND_NS
_QUIET_HEARTBEATS: Final = 20
_QUIET_AFTER_NS: Final = 5 * SECOND_NS

#: Virtual time between two looks whether an order has ended: the answer's own clock (`took_ms`) is exact.
_LOOK_NS: Final = 5 * MILLISECOND_NS


class SimulatedNetwork(Network):
    """`connections`: None sends datagrams. `service_ns`: what taking one message costs a peer."""

    kind: ClassVar[str] = "sim"

    def __init__(
        self,
        seed: int,
        policy: DhtPolicy,
        *,
        links: Links | None = None,
        connections: ConnectionPolicy | None = None,
        service_ns: int = 0,
        heal_s: float = HEAL_S,
    ) -> None:
        super().__init__()
        self.policy: Final = policy
        self.world: Final = World(seed, links or Links.geography(seed), connections=connections)
        self.signers: Final[list[Signer]] = []
        self.machines: Final[list[DhtMachine]] = []
        self._service_ns = service_ns
        self._heal_ns = round(heal_s * SECOND_NS)
        self._moods = Dice(seed, stream=999)
        self._numbers: dict[str, int] = {}
        self._answers: dict[int, Found | Stored] = {}
        self._next_ticket = 1
        self.world.service(DHT, round_trip=self._round_trip)
        self.world.observe(DHT, self._note)
        if connections is not None and not policy.rtt_from_first_answer:
            self._heartbeat(0)

    # --- peers --------------------------------------------------------------------------------------

    def add(
        self, *, signer: Signer | None = None, site: int | None = None, access_ns: int | None = None
    ) -> int:
        """A peer that stands alone yet. Without `signer` it gets an identity drawn from the seed."""
        world = self.world
        peer = world.add_node(site, access_ns=access_ns, service_ns=self._service_ns)
        if signer is None:
            place = struct.pack("<QQ", world.seed, peer)
            signer = Signer(hashlib.blake2b(place, digest_size=32, person=b"conformance").digest())
        self.signers.append(signer)
        self.keys.append(key_of_peer(signer.peer))
        self._numbers[signer.peer] = peer
        machine = DhtMachine(
            peer, self, Dice(world.seed, stream=1000 + peer), self.policy, unix_offset_ns=world.unix_start_ns
        )
        self.machines.append(machine)
        world.install(peer, DHT, machine)
        return peer

    def group_of(self, peer: int) -> int:
        """For `dht.directory.Directory`: as on loopback, nobody is limited."""
        del peer
        return 0

    async def join(self, count: int) -> list[int]:
        peers = [self.add() for _ in range(count)]
        for place, peer in enumerate(peers):
            if peer:
                self.begin_join(peer, after(self.world.now, place * 100 * MILLISECOND_NS))
        await self.wait(0.1 * count)
        return peers

    def begin_join(self, peer: int, at: Instant) -> None:
        """Enter by peer 0 at this instant, and stay in."""
        self.world.order(peer, DHT, Join((0,)), at)
        self._plan_healing(peer)

    async def kill(self, peers: Sequence[int]) -> None:
        for peer in peers:
            self.world.kill(peer)
            self._dead.add(peer)
        await trio.lowlevel.checkpoint()

    async def partition(self, groups: Sequence[Sequence[int]]) -> None:
        self.world.partition(groups)
        await trio.lowlevel.checkpoint()

    async def heal(self) -> None:
        self.world.heal()
        await trio.lowlevel.checkpoint()

    # --- time ---------------------------------------------------------------------------------------

    async def wait(self, seconds: float) -> None:
        self.world.run_for(round(seconds * SECOND_NS))
        await trio.lowlevel.checkpoint()

    @property
    def step_s(self) -> float:
        return 1.0

    @property
    def now_s(self) -> float:
        return self.world.now / SECOND_NS

    # --- the DHT ------------------------------------------------------------------------------------

    async def table(self, peer: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        return [entry.peer for entry in self.machines[peer].table]

    async def find_closest(self, asker: int, key: int) -> LookupResult:
        return self.result_of(await self._ask(asker, lambda ticket: FindClosest(ticket, key)))

    async def put(self, peer: int, name: str, value: bytes, *, ttl_s: int = 3600) -> int:
        now = UnixNs(self.world.unix_start_ns + self.world.now)
        expires = UnixNs(now + ttl_s * SECOND_NS)
        signer = self.signers[peer]
        envelope = seal_record(signer, NAMESPACE, name, value, sequence=now, expires_unix_ns=expires)
        return self._copies(await self._ask(peer, lambda ticket: PutRecord(ticket, envelope)))

    async def get(self, asker: int, name: str) -> LookupResult:
        key = key_of_record(NAMESPACE, name)
        return self.result_of(await self._ask(asker, lambda ticket: GetRecords(ticket, key)))

    async def provide(self, peer: int, key: int) -> int:
        return self._copies(await self._ask(peer, lambda ticket: Provide(ticket, key)))

    async def withdraw(self, peer: int, key: int) -> None:
        self.world.order(peer, DHT, Withdraw(key))
        await self.wait(0)

    async def find_providers(self, asker: int, key: int) -> LookupResult:
        found = await self._ask(asker, lambda ticket: FindProviders(ticket, key))
        return self.result_of(found, providers=True)

    # --- inside -------------------------------------------------------------------------------------

    def begin(self, peer: int, make: Callable[[int], DhtCommand], at: Instant | None = None) -> int:
        """Order what `make(ticket)` says; the ticket."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self.world.order(peer, DHT, make(ticket), at)
        return ticket

    def ended(self, ticket: int) -> Found | Stored | None:
        """How an order ended, if it has."""
        return self._answers.get(ticket)

    async def _ask(self, peer: int, make: Callable[[int], DhtCommand]) -> Found | Stored:
        ticket = self.begin(peer, make)
        last = after(self.world.now, round(_ORDER_S * SECOND_NS))
        while ticket not in self._answers:
            assert self.world.now < last, "an order did not end"
            self.world.run_for(_LOOK_NS)
        await trio.lowlevel.checkpoint()
        return self._answers.pop(ticket)

    def _note(self, now: Instant, peer: int, event: DhtEvent) -> None:
        if isinstance(event, Found | Stored):
            self._answers[event.ticket] = event
        elif not event.contacts and peer:
            self.world.order(peer, DHT, Join((0,)), after(now, round(REJOIN_FIRST_S * SECOND_NS)))

    def _plan_healing(self, peer: int) -> None:
        """Now and then it asks whom it entered by, even when all seems well."""

        def ask() -> None:
            if peer not in self._dead:
                self.world.order(peer, DHT, Join((0,)))
                self._plan_healing(peer)

        pause_ns = round(self._heal_ns * (0.5 + self._moods.unit()))
        self.world.at(after(self.world.now, pause_ns), ask)

    def _heartbeat(self, beat: int) -> None:
        """Each end of each link hears how long a round trip takes; quiet links are asked rarely."""
        world, connections = self.world, self.world.connections
        assert connections is not None
        for peer in self.live:
            for other in connections.kept_by(peer):
                used = connections.used_at(peer, other)
                if used is not None and (
                    world.now - used < _QUIET_AFTER_NS or (beat + peer) % _QUIET_HEARTBEATS == 0
                ):
                    world.order(peer, DHT, RoundTripSeen(other, world.rtt_ns(peer, other)))
        world.at(after(world.now, _HEARTBEAT_NS), lambda: self._heartbeat(beat + 1))

    def result_of(self, found: Found | Stored, *, providers: bool = False) -> LookupResult:
        """What a lookup found, as scenarios see it."""
        assert isinstance(found, Found)
        now = UnixNs(self.world.unix_start_ns + self.world.now)
        values = tuple(open_record_untrusted(envelope, now).body.value for envelope in found.records)
        peers = found.providers if providers else found.closest
        cost = found.cost
        return LookupResult(
            peers, values, cost.took_ns / MILLISECOND_NS, cost.hops, cost.queries, cost.failures
        )

    def _copies(self, stored: Found | Stored) -> int:
        assert isinstance(stored, Stored)
        return stored.copies

    def _contact(self, peer: int) -> Contact:
        return Contact(self.signers[peer].peer, (f"/ip4/10.99.{peer >> 8}.{peer & 255}/tcp/4001",), 0)

    def _round_trip(self, source: int, target: int, message: DhtMessage) -> tuple[DhtMessage, int]:
        del source, target
        body = DHT_CODEC.encode(to_wire(message, self._contact))
        frame = RPC_CODEC.encode_frame(Notice(METHOD_DHT, body))
        wire = DHT_CODEC.decode_untrusted(body)
        return from_wire_untrusted(wire, lambda contact: self._numbers.get(contact.peer)), len(frame)
