"""NAT traversal for a node of the overlay: whether others can dial it, which relays carry it if not.

What is found out goes to the overlay: a node behind a NAT is a client of the DHT (it asks, but stands in no
table, so that nobody's lookup depends on a relay), and can still be met, for jobs and by coordinators, at
its places at relays, which its peer record and its adverts name. Relays are those of the settings, and
those that the DHT names under their role.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import structlog
import trio

from dht.keys import key_of_role
from node.config import NatSettings
from node.overlay.overlay import Overlay
from node.p2p import AddressInvalid, Host
from node.p2p.host_events import AddressesChanged
from node.p2p.nat import Nat, NatConfig, NatEvent, ReachabilityChanged, open_nat
from node.p2p.reachability import Reachability
from node.p2p.relay_service import RelayLimits
from protocol.dice import Dice
from protocol.limits import MIB

ROLE_RELAY: Final = "relay"

#: Relays that one search asks the DHT for, and when it is repeated while there are too few.
WANTED_RELAYS: Final = 16
SEARCH_FIRST_S: Final = 2.0
SEARCH_MAX_S: Final = 120.0

_log = structlog.get_logger("nat")


@asynccontextmanager
async def open_traversal(host: Host, overlay: Overlay, settings: NatSettings) -> AsyncGenerator[Nat]:
    """Until left. Raises AddressInvalid (relays)."""
    assume = None if settings.reachability == "auto" else Reachability(settings.reachability)
    config = NatConfig(
        relays=settings.relays,
        serve_relay=settings.serve_relay,
        relay_limits=RelayLimits(
            circuit_bytes=settings.relay_circuit_mib * MIB, max_bytes_per_s=settings.relay_mbit * 125_000
        ),
        assume=assume,
        hole_punching=settings.hole_punching,
        private_addresses=settings.private_addresses,
    )
    dice = Dice(overlay.dice.u64(), stream=7)
    async with open_nat(host, config, dice=dice, unix_now_s=lambda: int(time.time())) as nat:
        traversal = _Traversal(host, overlay, nat, settings)
        unsubscribe = nat.subscribe(traversal.on_event)
        traversal.tell()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traversal.find_relays)
            try:
                yield nat
            finally:
                unsubscribe()
                nursery.cancel_scope.cancel()


class _Traversal:
    def __init__(self, host: Host, overlay: Overlay, nat: Nat, settings: NatSettings) -> None:
        self._host = host
        self._overlay = overlay
        self._nat = nat
        self._settings = settings
        self._changed = trio.Event()

    def on_event(self, event: NatEvent) -> None:
        if isinstance(event, ReachabilityChanged | AddressesChanged):
            self.tell()
            self._changed.set()

    def tell(self) -> None:
        """What others shall know."""
        reachability = self._nat.reachability
        private = reachability is Reachability.PRIVATE or not self._host.addresses
        self._overlay.set_reachable(reachable=not private, addresses=self._nat.addresses)
        relays = self._settings.serve_relay and reachability is not Reachability.PRIVATE
        self._overlay.provide_all("relay", [key_of_role(ROLE_RELAY)] if relays else [])

    async def find_relays(self) -> None:
        """Look for relays while nobody can dial us."""
        pause_s = SEARCH_FIRST_S
        while True:
            self._changed = trio.Event()
            if self._nat.reachability is Reachability.PRIVATE:
                await self._offer_some()
                pause_s = min(SEARCH_MAX_S, 2 * pause_s)
            else:
                pause_s = SEARCH_FIRST_S
            with trio.move_on_after(
                pause_s if self._nat.reachability is Reachability.PRIVATE else SEARCH_MAX_S
            ):
                await self._changed.wait()

    async def _offer_some(self) -> None:
        found = await self._overlay.find_providers(key_of_role(ROLE_RELAY), wanted=WANTED_RELAYS)
        for relay in found.providers:
            if relay == self._host.peer:
                continue
            for address in await self._overlay.find_addresses(relay):
                try:
                    self._nat.offer_relay(address)
                except AddressInvalid as error:
                    _log.debug("relay not usable", relay=relay, reason=str(error))
