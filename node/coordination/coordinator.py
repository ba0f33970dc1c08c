"""The coordinator's part of a node: adverts, questions, gossip and karma, over libp2p.

A peer with this part is an ordinary peer with a role. Islands and gateways find it by the DHT (it provides the
key of its role), other coordinators gossip with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import structlog
import trio

from dht.coordinates import estimate_ns
from dht.keys import key_of_role
from node.coordination.driver import MachineDriver
from node.coordination.gossip import ROLE_COORDINATOR, GossipService
from node.coordination.karma import KarmaKeeper
from node.coordination.orders import OrderRelay
from node.coordination.port import CoordinationPort
from node.coordination.vantage import Vantage
from node.overlay.addresses import group_of_host, host_of_remote
from node.overlay.overlay import Overlay
from node.p2p import Host
from node.p2p.host import plain_errors
from node.peers import Peers
from protocol.codec import Codec, encode
from protocol.coordination import METHOD_COORDINATION, SUMMARY_KIND, CoordinationMessage
from protocol.dice import Dice
from protocol.envelope import Envelope, Signer
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import MICROSECOND_NS, UnixNs
from routing.coordinator import Coordinator
from routing.coordinator_events import (
    CoordinatorCommand,
    CoordinatorEvent,
    CoordinatorPolicy,
    Identity,
    IslandChanged,
    IslandGone,
    LearnCoordinator,
    PeerMisbehaved,
    RoundTripSeen,
    Serve,
    StatementsDue,
    SummaryMade,
    WorkSeen,
)
from routing.gossip_messages import MAX_ITEM_BYTES, Item, Opener, Opening
from routing.gossip_peers import KindPolicy
from routing.islands import IslandBook
from routing.jurisdiction import Sighting
from routing.karma import KarmaPolicy, Statement
from routing.karma_wire import KARMA_KIND, karma_kind, karma_opener
from routing.karma_witness import KarmaWitness
from routing.notary import EnvelopeNotary, Notary

#: Addresses and the coordinate move: what we say of ourselves is looked at this often.
IDENTITY_S: Final = 10.0

#: Addresses in a summary: it is shown to gateways, and goes to all coordinators.
MAX_SUMMARY_ADDRESSES: Final = 8

Listener = Callable[[CoordinatorEvent[PeerId]], None]

_ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)

_log = structlog.get_logger("coordinator")


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """`trusted`: coordinators whose word on karma counts in full; others are trusted as far as these vouch for
    them by their audits (routing/trust.py).
    """

    name: str
    data_dir: Path
    region: str = ""
    country: str = ""
    trusted: tuple[PeerId, ...] = ()
    vantages: tuple[Vantage, ...] = ()
    policy: CoordinatorPolicy = field(default_factory=CoordinatorPolicy)
    karma: KarmaPolicy = field(default_factory=KarmaPolicy)


@asynccontextmanager
async def open_coordinator(
    host: Host,
    peers: Peers,
    overlay: Overlay,
    *,
    port: CoordinationPort,
    signer: Signer,
    config: CoordinatorConfig,
) -> AsyncGenerator[CoordinatorService]:
    """Be a coordinator until left."""
    with plain_errors():
        async with trio.open_nursery() as nursery:
            service = CoordinatorService(host, peers, overlay, signer=signer, config=config, nursery=nursery)
            port.serve(service.driver.received)
            nursery.start_soon(service.run)
            try:
                yield service
            finally:
                service.karma.save()
                nursery.cancel_scope.cancel()


class CoordinatorService:
    """Made by `open_coordinator`."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        overlay: Overlay,
        *,
        signer: Signer,
        config: CoordinatorConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._nursery = nursery
        self._peers = peers
        self._overlay = overlay
        self._config = config
        self._listeners: list[Listener] = []
        self._names: dict[PeerId, str] = {}  # of the Islands in the book
        self._summary_takers: list[Callable[[Envelope], None]] = []
        notary = EnvelopeNotary(signer)
        self.karma: Final = KarmaKeeper(
            signer,
            overlay,
            config.data_dir,
            seeds=config.trusted,
            policy=config.karma,
            spread=self._spread,
        )
        self.gossip: Final = GossipService(
            host,
            peers,
            overlay,
            nursery,
            openers={SUMMARY_KIND: _summary_opener(notary), KARMA_KIND: karma_opener(config.karma)},
            kinds={
                SUMMARY_KIND: KindPolicy(config.policy.summary_ttl_ns, MAX_ITEM_BYTES),
                KARMA_KIND: karma_kind(config.karma),
            },
            take=self._take_item,
            favoured=self._favours(notary),
            believed=config.trusted,
        )
        self._witness: KarmaWitness[PeerId] = KarmaWitness(host.peer, config.karma)
        self.machine: Final[Coordinator[PeerId]] = Coordinator(
            host.peer,
            notary,
            Dice(overlay.dice.u64(), stream=3),
            unix_offset_ns=overlay.unix_offset_ns,
            policy=config.policy,
            group_of=self._group_of,
            estimate=estimate_ns,
            witness=self._witness,
        )
        self.driver: Final[
            MachineDriver[CoordinationMessage, CoordinatorCommand[PeerId], CoordinatorEvent[PeerId]]
        ] = MachineDriver(self.machine, peers, METHOD_COORDINATION, nursery, self._on_event)
        self.orders: Final = OrderRelay(peers, self.machine, unix_now=overlay.unix_now)
        peers.subscribe_round_trips(self._on_round_trip)
        overlay.clock.subscribe(self._set_clock)

    @property
    def book(self) -> IslandBook[PeerId]:
        """The Islands that advertise here."""
        return self.machine.book

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` at each event of the coordinator; it must return at once and not raise."""
        self._listeners.append(listener)

    def subscribe_summaries(self, taker: Callable[[Envelope], None]) -> None:
        """Call `taker` with each verified summary of another coordinator that comes by gossip."""
        self._summary_takers.append(taker)

    def sightings(self, peer: PeerId) -> tuple[Sighting, ...]:
        """Round trips to an Island from vantage points whose place the settings tell: our own, and those of
        coordinators that are named there, as they state them.
        """
        vantages = {vantage.peer: vantage for vantage in self._config.vantages}
        seen = [
            Sighting(vantages[issuer].operator, vantages[issuer].place, rtt_us * MICROSECOND_NS)
            for issuer, _, rtt_us in self.karma.store.min_rtts(peer, self.karma.epoch())
            if issuer in vantages and issuer != self._host.peer
        ]
        own, rtt_ns = vantages.get(self._host.peer), self._peers.min_rtt_ns(peer)
        if own is not None and rtt_ns is not None:
            seen.append(Sighting(own.operator, own.place, rtt_ns))
        return tuple(seen)

    def note_work(self, seen: WorkSeen[PeerId]) -> None:
        """What happened with a job, for the Island's karma."""
        self.driver.order(seen)

    async def run(self) -> None:
        """Until cancelled."""
        self._witness.restore(self.karma.restore())
        regions = {"", self._config.region}
        self._overlay.provide_all("role", [key_of_role(ROLE_COORDINATOR, region) for region in regions])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.driver.run)
            nursery.start_soon(self.gossip.run)
            nursery.start_soon(self.karma.run)
            nursery.start_soon(self._tell_identity)

    # --- inside -------------------------------------------------------------------------------------

    def _set_clock(self, unix_offset_ns: int) -> None:
        self.machine.set_clock(unix_offset_ns)
        self.driver.wake()

    async def _tell_identity(self) -> None:
        while True:
            config = self._config
            identity = Identity(
                name=config.name,
                addresses=self._overlay.announced[:MAX_SUMMARY_ADDRESSES],
                region=config.region,
                country=config.country,
                coordinate=self._overlay.driver.machine.coordinate,
            )
            self.driver.order(Serve(identity))
            await trio.sleep(IDENTITY_S)

    def _on_event(self, event: CoordinatorEvent[PeerId]) -> None:
        match event:
            case IslandChanged(peer=peer, advert=advert, new=new):
                self._names[peer] = advert.name
                if new:
                    _log.info("island", name=advert.name, peer=peer, cargos=len(advert.cargos))
            case IslandGone(peer, reason):
                _log.info("island lost", name=self._names.pop(peer, ""), peer=peer, reason=reason)
            case SummaryMade(envelope=envelope):
                self.gossip.publish(_summary_item(envelope))
            case StatementsDue(statements):
                self.karma.state(statements)
            case PeerMisbehaved(peer, fault):
                _log.warning("misbehaviour", peer=peer, fault=fault)
                if fault == "flood":
                    self._nursery.start_soon(self._host.disconnect, peer, "it floods the coordinator")
            case _:
                pass
        for listener in self._listeners:
            listener(event)

    def _spread(self, item: Item) -> None:
        self.gossip.publish(item)

    def _take_item(self, body: object) -> None:
        if isinstance(body, Statement):
            statement = cast("Statement[PeerId]", body)
            if self.karma.learn(statement):
                self._witness.restore((statement,))
        elif isinstance(body, Envelope):
            self.driver.order(LearnCoordinator(body))
            for taker in self._summary_takers:
                taker(body)

    def _on_round_trip(self, peer: PeerId, rtt_ns: int) -> None:
        if self.book.get(peer) is not None:
            self.driver.order(RoundTripSeen(peer, rtt_ns))

    def _group_of(self, peer: PeerId) -> int:
        remote = self._host.remote_of(peer)
        return 0 if remote is None else group_of_host(host_of_remote(remote))

    def _favours(self, notary: Notary[PeerId]) -> Callable[[bytes], bool]:
        def favoured(origin: bytes) -> bool:
            try:
                peer = notary.peer_of_untrusted(origin)
            except ProtocolError:
                return False
            return self.karma.store.trust(peer, self.karma.epoch()) > 0

        return favoured


def _summary_item(envelope: Envelope) -> Item:
    return Item(SUMMARY_KIND, envelope.issuer, b"", envelope.sequence, encode(envelope))


def _summary_opener(notary: Notary[PeerId]) -> Opener:
    """`Opening.body` is the envelope, verified."""

    def open_untrusted(item: Item, now: UnixNs) -> Opening:
        envelope = _ENVELOPE.decode_untrusted(item.payload)
        if (item.origin, item.version, item.name) != (envelope.issuer, envelope.sequence, b""):
            raise ProtocolError(Fault.WRONG_ISSUER, "the item is not what its envelope says")
        stated = notary.open_summary_untrusted(envelope, now)
        return Opening(stated.expires_unix_ns, envelope)

    return open_untrusted
