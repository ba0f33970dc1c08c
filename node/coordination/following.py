"""A gateway's ear in the overlay: which Islands have the Cargos that it serves, as other coordinators tell.

What to follow and whom to ask is the machine's business (routing/following.py). Coordinators are found by
gossip (their summaries), by their hello, and by the DHT when the machine asks for more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from dht.keys import key_of_role
from node.coordination.affiliation import WANTED_COORDINATORS
from node.coordination.driver import MachineDriver
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.port import CoordinationPort
from node.overlay.overlay import Overlay
from node.peers import PeerDown, PeerEvent, Peers
from protocol.coordination import METHOD_COORDINATION, CoordinationMessage
from protocol.dice import Dice
from protocol.envelope import Envelope, Signer
from protocol.ids import PeerId
from routing.candidates import CoordinatorCandidate
from routing.following import Follower
from routing.following_events import (
    CoordinatorKnown,
    CoordinatorLost,
    CoordinatorUp,
    FollowingCommand,
    FollowingEvent,
    FollowingPolicy,
    FoundCoordinators,
    LearnSummary,
    NeedCoordinators,
    RoundTripMeasured,
    Served,
    Unwant,
    Want,
)
from routing.notary import EnvelopeNotary

_log = structlog.get_logger("mesh")


class FollowingService:
    """`run` until cancelled. `on_event` gets what the machine tells, in order; it must not block or raise."""

    def __init__(
        self,
        peers: Peers,
        overlay: Overlay,
        port: CoordinationPort,
        nursery: trio.Nursery,
        *,
        signer: Signer,
        on_event: Callable[[FollowingEvent[PeerId]], None],
        policy: FollowingPolicy = FollowingPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self._peers = peers
        self._overlay = overlay
        self._nursery = nursery
        self._listener = on_event
        self._pins: dict[PeerId, Callable[[], None]] = {}
        self._searching = False
        self.machine: Final[Follower[PeerId]] = Follower(
            overlay.peer,
            EnvelopeNotary(signer),
            Dice(overlay.dice.u64(), stream=5),
            unix_offset_ns=overlay.unix_offset_ns,
            policy=policy,
        )
        self._driver: MachineDriver[CoordinationMessage, FollowingCommand[PeerId], FollowingEvent[PeerId]] = (
            MachineDriver(
                self.machine, peers, METHOD_COORDINATION, nursery, self._on_event, reach=overlay.reach
            )
        )
        port.listen(self._driver.received)
        peers.subscribe(self._on_peer)
        overlay.clock.subscribe(self._set_clock)
        peers.subscribe_round_trips(self._on_round_trip)

    async def run(self) -> None:
        """Keep time until cancelled."""
        await self._driver.run()

    def vouchers(self, cargo: str, island: PeerId) -> tuple[PeerId, ...]:
        """Coordinators that say the Island advertises to them with this Cargo."""
        known = self.machine.followed.get(cargo, island)
        return () if known is None else tuple(known.by)

    def want(self, cargo: str) -> None:
        """Follow this Cargo (a digest). Idempotent."""
        self._driver.order(Want(cargo))

    def unwant(self, cargo: str) -> None:
        self._driver.order(Unwant(cargo))

    def learn(self, summary: Envelope) -> None:
        """A coordinator's summary came by gossip."""
        self._driver.order(LearnSummary(summary))

    # --- inside -------------------------------------------------------------------------------------

    def _set_clock(self, unix_offset_ns: int) -> None:
        self.machine.set_clock(unix_offset_ns)
        self._driver.wake()

    def _on_event(self, event: FollowingEvent[PeerId]) -> None:
        match event:
            case NeedCoordinators():
                if not self._searching:
                    self._searching = True
                    self._nursery.start_soon(self._search)
            case CoordinatorKnown(peer, addresses):
                self._overlay.hear(peer, addresses)
                self._driver.order(FoundCoordinators((self._candidate(peer),)))
            case Served(coordinator=peer):
                if peer not in self._pins:
                    self._pins[peer] = self._peers.pin(peer)
            case CoordinatorLost(peer, reason):
                _log.info("coordinator lost", peer=peer, reason=reason)
            case _:
                pass
        for peer in [peer for peer in self._pins if peer not in self.machine.linked]:
            self._pins.pop(peer)()  # also those that were left in peace, which is no event
        self._listener(event)

    async def _search(self) -> None:
        try:
            found = await self._overlay.find_providers(
                key_of_role(ROLE_COORDINATOR), wanted=WANTED_COORDINATORS
            )
            candidates = tuple(self._candidate(peer) for peer in found.providers)
            self._driver.order(FoundCoordinators(candidates))
        finally:
            self._searching = False

    def _candidate(self, peer: PeerId) -> CoordinatorCandidate[PeerId]:
        return CoordinatorCandidate(peer, self._overlay.rtt_ns(peer), self._overlay.group_of(peer))

    def _on_peer(self, event: PeerEvent) -> None:
        if not isinstance(event, PeerDown) and ROLE_COORDINATOR in event.hello.roles:
            self._driver.order(FoundCoordinators((self._candidate(event.peer),)))
            self._driver.order(CoordinatorUp(event.peer))

    def _on_round_trip(self, peer: PeerId, rtt_ns: int) -> None:
        if peer in self.machine.candidates:
            self._driver.order(RoundTripMeasured(peer, rtt_ns))
