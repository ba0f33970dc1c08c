"""A peer's place in the overlay: what programs ask of the DHT, and what keeps the peer in it.

async with open_overlay(host, peers, config, identity) as overlay:
    found = await overlay.find_providers(key_of_role("coordinator"))
    for peer in found.providers:
        await peers.reach(peer, overlay.addresses(peer))
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog
import trio

from dht.coordinates import unpack
from dht.events import (
    Cost,
    DhtCommand,
    FindClosest,
    FindProviders,
    Found,
    GetRecords,
    Provide,
    PutRecord,
    SetReachable,
    Stored,
    Withdraw,
)
from dht.keys import key_of_peer, key_of_record
from dht.machine import DhtMachine
from dht.policy import DhtPolicy
from dht.records import NAMESPACE_PEER, open_record_untrusted
from node.identity import Identity
from node.overlay.addresses import Scope, scope_of, widest_scope
from node.overlay.book import AddressBook
from node.overlay.cache import OverlayFiles
from node.overlay.clock import CivilClock
from node.overlay.driver import DhtDriver
from node.overlay.membership import HEAL_S, Membership
from node.overlay.records import PeerRecord, peer_record_untrusted, seal_peer_record
from node.p2p import Host, parse_address
from node.p2p.host import plain_errors
from node.peers import Peers
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, UnixNs
from protocol.limits import MAX_ADDRESSES

#: Making a connection takes a TCP, a noise, three protocol negotiations and a hello: so many round trips, and
#: some ms of CPU at both ends, on top of what an answer takes.
CONNECT_RTTS: Final = 6
CONNECT_ALLOWANCE_NS: Final = 100 * MILLISECOND_NS

#: What a node wants besides the defaults: messages wait for connections, so an answer's delay is no round trip.
NODE_POLICY: Final = DhtPolicy(
    connect_ns=CONNECT_ALLOWANCE_NS, connect_rtts=CONNECT_RTTS, rtt_from_first_answer=False
)

#: Orders of this node's users that run at once; more wait. The machine refuses beyond its own bound.
MAX_ORDERS: Final = 512

_log = structlog.get_logger("overlay")


@dataclass(frozen=True, slots=True)
class OverlayConfig:
    """`bootstrap`: full multiaddrs (with /p2p/ID) of peers to enter by. `data_dir`: peers are remembered
    there.
    """

    data_dir: Path
    bootstrap: tuple[str, ...] = ()
    region: str = ""
    client: bool = False
    """Ask, but stand in no table and store nothing: for short-lived programs."""

    policy: DhtPolicy = field(default=NODE_POLICY)

    heal_s: float = HEAL_S
    """How often bootstrap peers are asked even when all seems well, on average."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a lookup found. `closest`: live peers, nearest to the key first. `records`: opened and checked, the
    newest of each issuer. `providers`: in the order in which they were learnt.
    """

    closest: tuple[PeerId, ...]
    records: tuple[Envelope, ...]
    providers: tuple[PeerId, ...]
    cost: Cost


@dataclass(frozen=True, slots=True)
class OverlayView:
    """How the overlay stands, for displays. `network_size`: estimated; 0: unknown. `coordinate_ms`: x, y, z,
    height; empty while unknown.
    """

    table: int
    buckets: int
    network_size: int
    coordinate_ms: tuple[float, ...]
    reachable: bool
    joined: bool
    known_peers: int
    links: int
    records: int
    providers: int
    messages_sent: int
    messages_received: int
    messages_refused: int
    announced: tuple[str, ...]


@asynccontextmanager
async def open_overlay(
    host: Host, peers: Peers, config: OverlayConfig, identity: Identity
) -> AsyncGenerator[Overlay]:
    """Take part in the overlay. Enters it in the background, and again whenever it finds itself alone.

    On leaving, the peers met are remembered for the next time. Raises AddressInvalid (bootstrap).
    """
    with plain_errors():
        async with trio.open_nursery() as nursery:
            overlay = Overlay(host, peers, config, identity, nursery)
            nursery.start_soon(overlay.clock.run)
            nursery.start_soon(overlay.driver.run)
            nursery.start_soon(overlay.membership.run)
            try:
                yield overlay
            finally:
                overlay.driver.closed = True
                overlay.membership.save()
                nursery.cancel_scope.cancel()


class Overlay:
    """Made by `open_overlay`."""

    def __init__(
        self, host: Host, peers: Peers, config: OverlayConfig, identity: Identity, nursery: trio.Nursery
    ) -> None:
        self.peer: Final = host.peer
        self.config: Final = config
        self._host = host
        self._peers = peers
        self._identity = identity
        self._orders = trio.Semaphore(MAX_ORDERS)
        self._provided: dict[str, frozenset[int]] = {}
        self._said_sequence = 0  # of our peer record
        self._reachable = not config.client and bool(host.addresses)
        self.book: Final = AddressBook(host.peer)
        self.own_key: Final = self.book.keys[self.book.me]
        self.dice: Final = Dice(int.from_bytes(secrets.token_bytes(8), "little"), stream=1)
        self.clock: Final = CivilClock()
        machine = DhtMachine(
            self.book.me,
            self.book,
            Dice(self.dice.seed),
            config.policy,
            unix_offset_ns=self.clock.offset_ns,
            client=not self._reachable,
            check=open_record_untrusted,
        )
        files = OverlayFiles(config.data_dir)
        self.driver: Final = DhtDriver(
            host, peers, book=self.book, machine=machine, files=files, nursery=nursery
        )
        self.clock.subscribe(self.driver.set_clock)
        self.book.in_use = lambda: self.driver.references() | self.membership.references()
        self.membership: Final = Membership(self, host, peers, files, config.bootstrap)
        self.announce(host.addresses)

    # --- asking -------------------------------------------------------------------------------------

    async def find_closest(self, key: int) -> Lookup:
        """The live peers closest to a key."""
        return await self._find(partial(FindClosest, target=key))

    async def get_records(self, key: int, *, quorum: int = 1) -> Lookup:
        """Records at a key; done once `quorum` peers gave some, or all closest peers answered."""
        return await self._find(partial(GetRecords, key=key, quorum=quorum))

    async def find_providers(self, key: int, *, wanted: int = 20) -> Lookup:
        """Peers that provide a key, at least `wanted` if there are so many."""
        return await self._find(partial(FindProviders, key=key, wanted=wanted))

    async def put_record(self, envelope: Envelope) -> Stored:
        """Store a record (`dht.records.seal_record`) and keep it there until it expires or is withdrawn."""
        return await self._store(partial(PutRecord, envelope=envelope))

    async def provide(self, key: int) -> Stored:
        """Tell the network that we provide a key, and keep telling until `withdraw`."""
        return await self._store(partial(Provide, key=key))

    def withdraw(self, key: int) -> None:
        """Keep a record or provider record no longer; what others hold of it expires."""
        self.driver.order(Withdraw(key))

    def provide_all(self, topic: str, keys: Iterable[int]) -> None:
        """Provide exactly these keys for `topic` ("cargos", "role", ...) from now on, in the background."""
        before = self._all_provided()
        self._provided[topic] = frozenset(keys)
        after = self._all_provided()
        for key in sorted(before - after):
            self.withdraw(key)
        for key in sorted(after - before):
            self.driver.order_unattended(partial(Provide, key=key))

    def _all_provided(self) -> frozenset[int]:
        return frozenset(key for keys in self._provided.values() for key in keys)

    async def find_addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer can be met: as known here, else as the network knows. Empty: nobody knows."""
        if known := self.addresses(peer):
            await trio.lowlevel.checkpoint()
            return known
        record = await self.find_peer_record(peer)
        if record is not None:
            number = self.book.number_of(peer)
            self.book.own_word_untrusted(number, record.addresses, self._narrowest())
        if not self.addresses(peer):
            await self.find_closest(key_of_peer(peer))  # whoever is near to it names it with its addresses
        return self.addresses(peer)

    async def find_peer_record(self, peer: PeerId) -> PeerRecord | None:
        """What a peer says of itself in the network."""
        found = await self.get_records(key_of_record(NAMESPACE_PEER, peer))
        for envelope in found.records:
            try:
                opened = open_record_untrusted(envelope, self.unix_now())
                if opened.issuer == peer:
                    return peer_record_untrusted(opened.body)
            except ProtocolError as error:
                _log.debug("peer record", peer=peer, reason=error.detail)
        return None

    async def reach(self, peer: PeerId) -> None:
        """Have a link to a peer, wherever it is. Raises node.rpc.PeerUnreachable."""
        await self._peers.reach(peer, await self.find_addresses(peer))

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer can be met as far as this node knows, best first."""
        number = self.book.find(peer)
        return () if number is None else self.book.addresses(number)

    def hear(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """A peer said, signed, that it can be met at these addresses (they need not be true)."""
        if peer != self.peer:
            self.book.own_word_untrusted(self.book.number_of(peer), addresses, self._narrowest())

    def rtt_ns(self, peer: PeerId) -> int | None:
        """The round trip to a peer: measured on a link, else estimated from its place in the network."""
        measured = self._peers.rtt_ns(peer)
        if measured is not None:
            return measured
        number = self.book.find(peer)
        return None if number is None else self.driver.machine.rtt_estimate_ns(number)

    def group_of(self, peer: PeerId) -> int:
        """The network that a peer's address lies in; 0: unknown or not limited."""
        number = self.book.find(peer)
        return 0 if number is None else self.book.group_of(number)

    # --- belonging ----------------------------------------------------------------------------------

    async def join(self, addresses: Iterable[str] = ()) -> int:
        """Enter by these addresses (full) and all that are known. How many routing entries there are then.

        Raises AddressInvalid.
        """
        return await self.membership.join(addresses)

    def set_reachable(self, *, reachable: bool, addresses: Iterable[str] | None = None) -> None:
        """Whether others can dial us, and where (full addresses; None: where we listen), as was found out.

        Who can not be dialled is a client of the DHT: it asks, but stands in no table and stores nothing.
        """
        self.announce(self._host.addresses if addresses is None else addresses)
        reachable = reachable and not self.config.client
        if reachable != self._reachable:
            self._reachable = reachable
            self.driver.order(SetReachable(reachable))

    def announce(self, addresses: Iterable[str]) -> None:
        """Tell others to dial these addresses. Loopback is told only if there is nothing wider."""
        texts = tuple(addresses)
        narrowest = min(widest_scope(texts), Scope.NETWORK)
        told = tuple(
            text
            for text in texts
            if (scope := scope_of(parse_address(text))) is not None and scope >= narrowest
        )[:MAX_ADDRESSES]
        self.book.announce(told)
        self._peers.introduce(msgspec.structs.replace(self._peers.introduction, addresses=told))
        self.membership.note_change()

    @property
    def announced(self) -> tuple[str, ...]:
        """Where we tell others to dial us."""
        return self._peers.introduction.addresses

    @property
    def unix_offset_ns(self) -> int:
        """Civil time minus the clock of instants, now; `clock` tells when it changes."""
        return self.clock.offset_ns

    def view(self) -> OverlayView:
        """How things stand."""
        machine, counters = self.driver.machine, self.driver.counters
        return OverlayView(
            table=len(machine.table),
            buckets=machine.table.buckets,
            network_size=machine.size_estimate() if len(machine.table) else 0,
            coordinate_ms=() if machine.coordinate_error >= 1 else _place_ms(machine.coordinate),
            reachable=self._reachable,
            joined=self.membership.joined,
            known_peers=len(self.book),
            links=len(self._peers.up()),
            records=machine.stored_records,
            providers=machine.stored_providers,
            messages_sent=counters.sent,
            messages_received=counters.received,
            messages_refused=self.driver.guard.refused,
            announced=self.announced,
        )

    # --- within the package -------------------------------------------------------------------------

    def unix_now(self) -> UnixNs:
        return self.clock.unix_now()

    async def publish_self(self) -> int:
        """Put our peer record. At how many peers it lies."""
        hello = self._peers.introduction
        record = PeerRecord(hello.addresses[:8], hello.roles, self.config.region)
        now = self.unix_now()
        self._said_sequence = max(self._said_sequence + 1, now)
        envelope = seal_peer_record(self._identity.signer, record, now, sequence=self._said_sequence)
        copies = (await self.put_record(envelope)).copies
        if not copies:
            await self._learn_own_sequence()
        return copies

    async def _learn_own_sequence(self) -> None:
        """Nobody took our record. If others hold one of ours with a higher number (from before our clock was
        set back), the next has to be above it.
        """
        found = await self.get_records(key_of_record(NAMESPACE_PEER, self.peer), quorum=3)
        held = [envelope.sequence for envelope in found.records if envelope.peer == self.peer]
        self._said_sequence = max(self._said_sequence, *held) if held else self._said_sequence

    def provide_again(self) -> None:
        """After joining: what was told to nobody before is told now."""
        for key in sorted(self._all_provided()):
            self.driver.order_unattended(partial(Provide, key=key))

    async def _find(self, make: Callable[[int], DhtCommand]) -> Lookup:
        async with self._orders:
            answer = await self.driver.ask(make)
        found = answer.event
        assert isinstance(found, Found)  # noqa: S101 - the machine ends a lookup with `Found`
        return Lookup(answer.closest, found.records, answer.providers, found.cost)

    async def _store(self, make: Callable[[int], DhtCommand]) -> Stored:
        async with self._orders:
            stored = (await self.driver.ask(make)).event
        assert isinstance(stored, Stored)  # noqa: S101 - the machine ends what stores with `Stored`
        return stored

    def _narrowest(self) -> Scope:
        """Addresses in a record come without a connection to judge them by: ours says where we live."""
        return widest_scope(self._host.addresses)


def _place_ms(packed: int) -> tuple[float, ...]:
    return tuple(round(part_ns / MILLISECOND_NS, 2) for part_ns in unpack(packed))
