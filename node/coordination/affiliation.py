"""An Island's side of coordination: it finds coordinators, chooses some, and tells them what it offers.

The choice is the machine's (routing/affiliation.py). Candidates are those named in the settings, whoever comes
with the role in its hello, and those that the DHT names when the machine asks for more. A link to a coordinator
that has taken the advert is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import structlog
import trio

from dht.keys import key_of_role
from node.coordination.driver import MachineDriver
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.port import CoordinationPort
from node.overlay.overlay import Overlay
from node.p2p import parse_peer_address
from node.peers import PeerDown, PeerEvent, Peers
from protocol.adverts import IslandAdvert
from protocol.coordination import METHOD_COORDINATION, CoordinationMessage
from protocol.dice import Dice
from protocol.envelope import Signer
from protocol.ids import PeerId
from routing.affiliation import (
    Advertise,
    Affiliated,
    Affiliation,
    AffiliationCommand,
    AffiliationEvent,
    AffiliationPolicy,
    CoordinatorUp,
    FoundCoordinators,
    Leave,
    NeedCandidates,
    Parted,
    RoundTripMeasured,
    TurnedAway,
)
from routing.candidates import CoordinatorCandidate
from routing.notary import EnvelopeNotary

#: Coordinators that one search asks the DHT for.
WANTED_COORDINATORS: Final = 40

#: The last advert gets this long to leave this machine.
FAREWELL_S: Final = 0.1

_log = structlog.get_logger("island")


class AffiliationService:
    """`run` until cancelled. `pinned`: full addresses of coordinators that are always told."""

    def __init__(
        self,
        peers: Peers,
        overlay: Overlay,
        port: CoordinationPort,
        nursery: trio.Nursery,
        *,
        signer: Signer,
        pinned: Iterable[str] = (),
        region: str = "",
        policy: AffiliationPolicy = AffiliationPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        notary = EnvelopeNotary(signer)
        self._peers = peers
        self._overlay = overlay
        self._nursery = nursery
        self._region = region
        self._pins: dict[PeerId, Callable[[], None]] = {}
        self._searching = False
        self.machine: Final[Affiliation[PeerId]] = Affiliation(
            lambda advert, sequence, expires: notary.seal_advert(
                advert, sequence=sequence, expires_unix_ns=expires
            ),
            Dice(overlay.dice.u64(), stream=4),
            unix_offset_ns=overlay.unix_offset_ns,
            policy=policy,
        )
        self._driver: MachineDriver[
            CoordinationMessage, AffiliationCommand[PeerId], AffiliationEvent[PeerId]
        ] = MachineDriver(
            self.machine, peers, METHOD_COORDINATION, nursery, self._on_event, reach=overlay.reach
        )
        port.listen(self._driver.received)
        peers.subscribe(self._on_peer)
        overlay.clock.subscribe(self._set_clock)
        peers.subscribe_round_trips(self._on_round_trip)
        named = [parse_peer_address(address)[1] for address in pinned]
        self._driver.order(FoundCoordinators(tuple(CoordinatorCandidate(peer, pinned=True) for peer in named)))
        for peer in peers.up():
            self._meet(peer)

    @property
    def coordinators(self) -> tuple[PeerId, ...]:
        """Those that have the advert."""
        return self.machine.coordinators

    async def run(self) -> None:
        """Keep time until cancelled."""
        await self._driver.run()

    def advertise(self, advert: IslandAdvert) -> None:
        """This is what the Island offers now; nothing happens if it is what was told."""
        self._driver.order(Advertise(advert))

    async def leave(self, advert: IslandAdvert) -> None:
        """Tell all coordinators once that this Island stops."""
        self._driver.order(Leave(advert))
        await trio.sleep(FAREWELL_S)

    # --- inside -------------------------------------------------------------------------------------

    def _set_clock(self, unix_offset_ns: int) -> None:
        self.machine.set_clock(unix_offset_ns)
        self._driver.wake()

    def _on_event(self, event: AffiliationEvent[PeerId]) -> None:
        match event:
            case NeedCandidates():
                if not self._searching:
                    self._searching = True
                    self._nursery.start_soon(self._search)
            case Affiliated(peer):
                hello = self._peers.hello(peer)
                _log.info("coordinator", peer=peer, name=hello.name if hello else "")
                if peer not in self._pins:
                    self._pins[peer] = self._peers.pin(peer)
            case Parted(peer, reason):
                _log.info("coordinator left", peer=peer, reason=reason)
                release = self._pins.pop(peer, None)
                if release is not None:
                    release()
            case TurnedAway(peer, "invalid", detail):
                _log.warning(
                    "a coordinator refuses what this Island says of itself",
                    peer=peer,
                    reason=detail,
                    remedy="if it says expired, set this computer's clock",
                )
            case TurnedAway(peer, code, detail):
                _log.info("a coordinator has no place for this Island", peer=peer, reason=code, detail=detail)

    async def _search(self) -> None:
        """Those of our region first, then any."""
        try:
            for region in dict.fromkeys((self._region, "")):
                found = await self._overlay.find_providers(
                    key_of_role(ROLE_COORDINATOR, region), wanted=WANTED_COORDINATORS
                )
                candidates = [self._candidate(p) for p in found.providers if p != self._overlay.peer]
                self._driver.order(FoundCoordinators(tuple(candidates)))
        finally:
            self._searching = False

    def _candidate(self, peer: PeerId) -> CoordinatorCandidate[PeerId]:
        return CoordinatorCandidate(peer, self._overlay.rtt_ns(peer), self._overlay.group_of(peer))

    def _on_peer(self, event: PeerEvent) -> None:
        if not isinstance(event, PeerDown):
            self._meet(event.peer)

    def _meet(self, peer: PeerId) -> None:
        hello = self._peers.hello(peer)
        if hello is not None and ROLE_COORDINATOR in hello.roles:
            self._driver.order(FoundCoordinators((self._candidate(peer),)))
            self._driver.order(CoordinatorUp(peer))

    def _on_round_trip(self, peer: PeerId, rtt_ns: int) -> None:
        if peer in self.machine.candidates:
            self._driver.order(RoundTripMeasured(peer, rtt_ns))
