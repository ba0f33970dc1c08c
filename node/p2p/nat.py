"""NAT traversal as one service beside a host: what am I, who carries me, and how do we meet directly.

`open_nat` finds out whether others can dial this node (reachability.py). If not, it keeps places at relays
(relay_client.py) and turns what comes through them into direct connections where NATs let it (hole_punch.py).
For others it answers dial-back requests and, if it is told to, relays (relay_service.py). Identify has to be
served on the host by its owner: peers learn from it where they see each other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import structlog
import trio

from node.p2p.errors import Unreachable
from node.p2p.hole_punch import GAP_S, HolePuncher
from node.p2p.host import Host, plain_errors
from node.p2p.host_events import AddressesChanged, HostEvent, PeerConnected, PeerDirect, PeerDisconnected
from node.p2p.nat_messages import AUTONAT_PROTOCOL
from node.p2p.own_addresses import OwnAddresses
from node.p2p.reachability import DialBackLimits, DialBackServer, Reachability, Verdicts, ask_to_be_dialled
from node.p2p.relay_client import RelayClient, RelayClientConfig
from node.p2p.relay_dial import is_direct
from node.p2p.relay_service import RelayLimits, RelayService
from protocol.dice import Dice
from protocol.ids import PeerId

_log = structlog.get_logger("nat")

#: Peers that connect within this time are asked in one round.
_GATHER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class NatConfig:
    """What a node does about NATs. Durations in seconds."""

    relays: tuple[str, ...] = ()
    """Addresses of relays to use if nobody can dial us; more come by `Nat.offer_relay`."""

    serve_relay: bool = False
    """Relay for others: for nodes with a public address and bandwidth to give."""

    relay_limits: RelayLimits = field(default_factory=RelayLimits)
    relay_client: RelayClientConfig = field(default_factory=RelayClientConfig)
    dial_back_limits: DialBackLimits = field(default_factory=DialBackLimits)

    assume: Reachability | None = None
    """Somebody knows it (a forwarded port, a server): do not ask."""

    confirmations: int = 3
    """Servers that have to agree, if there are so many: what the specification asks for."""

    settled_s: float = 900.0
    """Between questions once a belief is confirmed. Routers restart and laptops move."""

    unsettled_s: float = 30.0
    """Between questions before that, at first; doubles while there is nobody new to ask."""

    hole_punching: bool = True

    private_addresses: bool = False
    """Punch towards addresses that are not public, too: for networks that have no others (laboratories)."""

    punch_gap_s: float = GAP_S
    """Between the attempts at one hole."""

    retire_s: float = 300.0
    """How long streams on a relayed connection (an answer under way) have to end after a direct one stands."""


@dataclass(frozen=True, slots=True)
class ReachabilityChanged:
    """Whether others can dial this node (the DHT's SetReachable)."""

    reachability: Reachability


NatEvent: TypeAlias = ReachabilityChanged | AddressesChanged | PeerDirect


@asynccontextmanager
async def open_nat(
    host: Host,
    config: NatConfig = NatConfig(),  # noqa: B008 - frozen: one shared default is safe
    *,
    dice: Dice,
    unix_now_s: Callable[[], int],
) -> AsyncGenerator[Nat]:
    """NAT traversal for a host, until left. `unix_now_s`: civil time, for reservations.

    Once per host: its protocols stay handled. Raises AddressInvalid if one of the relays can not be dialled.
    """
    with plain_errors():
        async with trio.open_nursery() as nursery:
            nat = Nat(host, config, dice, unix_now_s, nursery)
            for relay in config.relays:
                nat.offer_relay(relay)
            stop = host.subscribe(nat.on_host_event)
            nursery.start_soon(nat.keep_asking)
            nursery.start_soon(nat.keep_places)
            try:
                yield nat
            finally:
                stop()
                nat.close()
                nursery.cancel_scope.cancel()


class Nat:
    """Made by `open_nat`."""

    def __init__(
        self, host: Host, config: NatConfig, dice: Dice, unix_now_s: Callable[[], int], nursery: trio.Nursery
    ) -> None:
        self._host = host
        self._config = config
        self._dice = dice
        self._nursery = nursery
        self._own = OwnAddresses(host)
        self._verdicts = Verdicts(config.confirmations)
        self._mute: set[PeerId] = set()  # connected peers that do not answer AutoNAT
        # Asked, but said nothing of use (too busy, a broken connection): not new any more, or they would be
        # asked again at once, for ever.
        self._reticent: set[PeerId] = set()
        self._wake = trio.lowlevel.ParkingLot()
        self._subscribers: list[Callable[[NatEvent], None]] = []
        self._belief_changed = trio.lowlevel.ParkingLot()
        self._places = trio.CancelScope()
        self._was_unplugged = False
        self._closed = False
        self.dial_back: Final = DialBackServer(host, config.dial_back_limits)
        self.relay: Final = (
            RelayService(host, config.relay_limits, unix_now_s=unix_now_s) if config.serve_relay else None
        )
        self.puncher: Final = HolePuncher(
            host,
            own=self._own,
            private_addresses=config.private_addresses,
            gap_s=config.punch_gap_s,
            dice=dice,
            nursery=nursery,
        )
        self.relay_client: Final = RelayClient(
            host,
            config.relay_client,
            dice=dice,
            unix_now_s=unix_now_s,
            on_circuit=self._on_circuit,
            changed=self._announce,
        )

    # --- for users ------------------------------------------------------------------------------

    @property
    def reachability(self) -> Reachability:
        """What is believed now."""
        return self._config.assume or self._verdicts.belief

    @property
    def addresses(self) -> tuple[str, ...]:
        """What to tell others, the best first: where we were met, our places at relays, where we listen."""
        return self._host.addresses

    def subscribe(self, callback: Callable[[NatEvent], None]) -> Callable[[], None]:
        """Call `callback` at each event, in order, from the task where it happens; it must not raise.

        Returns what ends it.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def offer_relay(self, address: str) -> None:
        """A relay that may be used when need be. Idempotent. Raises AddressInvalid."""
        self.relay_client.offer(address)

    # --- for open_nat ---------------------------------------------------------------------------

    def on_host_event(self, event: HostEvent) -> None:
        """What the host tells."""
        if isinstance(event, PeerConnected):
            if self._was_unplugged:
                self._was_unplugged = False
                self._verdicts.forget()  # maybe in another network now
            if not self._verdicts.settled:
                self._wake.unpark_all()
        elif isinstance(event, PeerDisconnected):
            self._mute.discard(event.peer)
            self._reticent.discard(event.peer)
            self._was_unplugged = not self._host.connected()
        elif isinstance(event, PeerDirect):
            self._nursery.start_soon(self._host.retire_relayed, event.peer, self._config.retire_s)
            self._publish(event)
        else:
            self._publish(event)

    async def keep_asking(self) -> None:
        """Ask peers whether they can dial us, again and again."""
        if self._config.assume is not None:
            self._learned()
            return
        if not self._host.endpoints:
            self._verdicts.belief = Reachability.PRIVATE  # it listens nowhere
            self._learned()
            return
        repeats = 0  # rounds since somebody new could be asked
        asked = False
        while True:
            if self._verdicts.settled:
                wait_s = self._config.settled_s
            elif asked:
                wait_s = min(self._config.settled_s, self._config.unsettled_s * 2 ** min(repeats, 16))
            else:
                wait_s = float("inf")
            fresh = await self._ask_round(again=False)
            with trio.move_on_after(wait_s):
                while not fresh:
                    await self._wake.park()
                    await trio.sleep(self._dice.unit() * _GATHER_S)
                    fresh = await self._ask_round(again=False)
            repeats = 0 if fresh else repeats + 1
            asked = fresh or await self._ask_round(again=True)

    async def keep_places(self) -> None:
        """Hold places at relays while nobody can dial us."""
        while True:
            if self.reachability is Reachability.PRIVATE:
                with self._places:
                    await self.relay_client.run()
                self._places = trio.CancelScope()
            else:
                await self._belief_changed.park()

    def close(self) -> None:
        """What comes now is not for us any more."""
        self._closed = True

    # --- inside ---------------------------------------------------------------------------------

    async def _ask_round(self, *, again: bool) -> bool:
        """Ask some servers that have not been asked; else, if `again`, some others. False: there are none."""
        servers = self._servers()
        fresh = [s for s in servers if not self._verdicts.heard(s) and s not in self._reticent]
        chosen = self._dice.sample(fresh or (servers if again else ()), self._config.confirmations)
        async with trio.open_nursery() as nursery:
            for server in chosen:
                nursery.start_soon(self._ask, server)
        return bool(chosen)

    async def _ask(self, server: PeerId) -> None:
        told = await self._own.learn(server)
        if told is not None and AUTONAT_PROTOCOL not in told.protocols:
            self._mute.add(server)
            return
        try:
            met_at = await ask_to_be_dialled(self._host, server, self._own.candidates())
        except Unreachable as error:
            _log.debug("no answer on reachability", server=server, reason=error.reason)
            self._reticent.add(server)
            return
        self._reticent.discard(server)
        before = self._verdicts.met_at
        if self._verdicts.record(server, met_at, available=len(self._servers())):
            self._learned()
        elif self._verdicts.met_at != before:
            self._announce()

    def _servers(self) -> list[PeerId]:
        """Whom to ask: peers that we dialled, if there are enough. Who came by itself may have come to make us
        believe that nobody can dial us (and proved the contrary by coming, if the address was public).
        """
        direct = {
            peer: [path for path in self._host.paths(peer) if is_direct(path)]
            for peer in self._host.connected()
            if peer not in self._mute
        }
        dialled = [peer for peer, paths in direct.items() if any(not path.inbound for path in paths)]
        if len(dialled) >= self._config.confirmations:
            return dialled
        return [peer for peer, paths in direct.items() if paths]

    def _learned(self) -> None:
        _log.info("reachability", reachability=str(self.reachability))
        if self.reachability is not Reachability.PRIVATE:
            self._places.cancel()
        self._belief_changed.unpark_all()
        self._announce()
        self._publish(ReachabilityChanged(self.reachability))

    def _announce(self) -> None:
        met_at = self._verdicts.met_at if self.reachability is Reachability.PUBLIC else ()
        own = [f"{text}/p2p/{self._host.peer}" for text in met_at]
        self._host.announce((*own, *self.relay_client.addresses))

    def _on_circuit(self, peer: PeerId) -> None:
        if self._config.hole_punching and not self._closed:
            self.puncher.begin(peer)

    def _publish(self, event: NatEvent) -> None:
        for callback in tuple(self._subscribers):
            callback(event)
