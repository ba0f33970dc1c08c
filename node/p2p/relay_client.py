"""Being reachable through relays: keep places at some of them, and take the circuits that they bring (stop).

A place is renewed often, not only before it expires: that keeps the NAT's mapping open and shows within a
minute that a relay is gone. A relay that fails is left for another one, if there is one, and tried again later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
import trio

from node.p2p.addresses import Address, is_public, parse_address, parse_peer_address
from node.p2p.errors import AddressInvalid, StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.host_events import HostEvent, PeerDisconnected
from node.p2p.nat_messages import (
    HOP_PROTOCOL,
    STATUS_OK,
    STATUS_PERMISSION_DENIED,
    STOP_PROTOCOL,
    HopStatus,
    ReserveRequest,
    decode_hop_status_untrusted,
    decode_stop_connect_untrusted,
    encode_hop_request,
    encode_stop_status,
    receive_message_untrusted,
    send_message,
    status_words,
)
from node.p2p.relay_dial import StreamTransport, is_direct, is_from_listener
from node.p2p.stream import Stream
from node.p2p.transport import Path
from protocol.dice import Dice
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.limits import MAX_ADDRESS_CHARS

_log = structlog.get_logger("relay")

#: A reservation is one round trip.
_REQUEST_S: Final = 10.0

#: Circuits whose handshake runs at once; more wait for their turn. Each costs a few ms of CPU.
_MAX_HANDSHAKES: Final = 32

#: Of one relay: how we reach it, and two that it says itself (another family, another interface).
_MAX_ADDRESSES_PER_RELAY: Final = 3

#: Relays that are remembered as candidates; the DHT may know thousands.
MAX_CANDIDATES: Final = 64


@dataclass(frozen=True, slots=True)
class RelayClientConfig:
    """How places at relays are kept."""

    places: int = 2
    """Relays used at once: one may fail, and a third would only cost its owner."""

    renew_s: float = 60.0
    """Longest time between renewals. Home routers forget an idle mapping after some minutes."""

    min_renew_s: float = 10.0
    """Shortest, whatever a relay's clock or reservation says."""

    backoff_first_s: float = 1.0
    """After a failure; doubles each time."""

    backoff_max_s: float = 300.0
    """A relay that is back is found within this time."""


@dataclass(slots=True, eq=False)
class _Candidate:
    address: Address
    relay: PeerId
    failures: int = 0
    ready_at: float = 0.0
    busy: bool = False
    detail: str = ""
    lost: trio.Event = field(default_factory=trio.Event)
    addresses: tuple[str, ...] = ()  # ours, through it, while the place is held


class RelayClient:
    """Keeps places at relays while `run` runs. `on_circuit` hears of each peer that came through one, `changed`
    of other addresses; both are called where it happens and must not raise.
    """

    def __init__(
        self,
        host: Host,
        config: RelayClientConfig,
        *,
        dice: Dice,
        unix_now_s: Callable[[], int],
        on_circuit: Callable[[PeerId], None],
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._config = config
        self._dice = dice
        self._unix_now_s = unix_now_s
        self._on_circuit = on_circuit
        self._changed = changed
        self._candidates: dict[PeerId, _Candidate] = {}
        self._idle = trio.lowlevel.ParkingLot()  # places without a relay
        self._handshakes = trio.CapacityLimiter(_MAX_HANDSHAKES)
        host.handle(STOP_PROTOCOL, self._serve)
        host.subscribe(self._on_event)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach us through relays now."""
        return tuple(a for c in self._candidates.values() for a in c.addresses)

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """Those that hold a place for us now."""
        return tuple(c.relay for c in self._candidates.values() if c.addresses)

    def offer(self, address: str) -> None:
        """A relay that may be used. Raises AddressInvalid. Idempotent; the first MAX_CANDIDATES are kept."""
        target, relay = parse_peer_address(address)
        if target.relay is not None:
            raise AddressInvalid(f"{address!r} is itself behind a relay")
        if relay == self._host.peer or relay in self._candidates or len(self._candidates) >= MAX_CANDIDATES:
            return
        self._candidates[relay] = _Candidate(target, relay)
        self._idle.unpark_all()

    async def run(self) -> None:
        """Hold places until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._config.places):
                    nursery.start_soon(self._hold_one)
        finally:
            for candidate in self._candidates.values():
                candidate.addresses = ()
            self._changed()

    # --- holding places -------------------------------------------------------------------------

    async def _hold_one(self) -> None:
        while True:
            candidate = await self._next_candidate()
            candidate.busy = True
            release = self._host.hold(candidate.relay)
            try:
                await self._hold(candidate)
            except Unreachable as error:
                candidate.detail = error.reason
                # Said once, when it begins.
                level = logging.INFO if candidate.addresses or not candidate.failures else logging.DEBUG
                _log.log(level, "no place at the relay", relay=candidate.relay, reason=error.reason)
            finally:
                release()
                candidate.busy = False
                self._idle.unpark_all()
                if candidate.addresses:
                    candidate.addresses = ()
                    self._changed()
            candidate.ready_at = trio.current_time() + self._backoff_s(candidate.failures)
            candidate.failures += 1

    async def _next_candidate(self) -> _Candidate:
        while True:
            free = [c for c in self._candidates.values() if not c.busy]
            best = min(free, key=lambda c: c.ready_at, default=None)
            if best is not None and best.ready_at <= trio.current_time():
                return best
            with trio.move_on_at(best.ready_at if best is not None else float("inf")):
                await self._idle.park()

    async def _hold(self, candidate: _Candidate) -> None:
        """Reserve and renew until that fails, which it says by Unreachable."""
        while True:
            candidate.lost = trio.Event()
            answer = await self._reserve(candidate)
            addresses = self._through(candidate, answer)
            if addresses != candidate.addresses:
                _log.info("a place at a relay", relay=candidate.relay, addresses=list(addresses))
                candidate.addresses = addresses
                self._changed()
            candidate.failures = 0
            left_s = answer.expires_unix_s - self._unix_now_s()
            with trio.move_on_after(max(self._config.min_renew_s, min(self._config.renew_s, left_s * 2 / 3))):
                await candidate.lost.wait()
                raise Unreachable("the connection to the relay was lost")

    async def _reserve(self, candidate: _Candidate) -> HopStatus:
        relay = candidate.relay
        # From the listening port: the relay then sees us where others may meet us directly.
        await self._host.connect(str(candidate.address), over=is_from_listener)
        try:
            with trio.fail_after(_REQUEST_S):
                stream = await self._host.open_stream(relay, HOP_PROTOCOL, over=is_direct)
                try:
                    await send_message(stream, encode_hop_request(ReserveRequest()))
                    answer = decode_hop_status_untrusted(await receive_message_untrusted(stream))
                except BaseException:
                    stream.reset()
                    raise
                await stream.aclose()
        except StreamBroken as error:
            raise Unreachable(error.reason) from error
        except ProtocolError as error:
            raise Unreachable(f"the relay broke the protocol: {error.detail}") from error
        except trio.TooSlowError:
            # Maybe a connection whose other end is gone: the next attempt needs a fresh one.
            await self._host.disconnect(relay, "the relay did not answer")
            raise Unreachable(f"no answer from the relay within {_REQUEST_S:g} s") from None
        if answer.status != STATUS_OK:
            raise Unreachable(status_words(answer.status))
        return answer

    def _through(self, candidate: _Candidate, answer: HopStatus) -> tuple[str, ...]:
        """Our addresses at this relay: by the one that works for us, then by those that it says."""
        ways = [candidate.address]
        for text in answer.addresses:
            try:
                address = parse_address(text)
            except AddressInvalid:
                continue
            if address.peer == candidate.relay and address.relay is None and is_public(address):
                ways.append(address)
        found = dict.fromkeys(
            str(Address(way.kind, way.host, way.port, self._host.peer, candidate.relay)) for way in ways
        )
        return tuple(text for text in found if len(text) <= MAX_ADDRESS_CHARS)[:_MAX_ADDRESSES_PER_RELAY]

    def _backoff_s(self, failures: int) -> float:
        whole = min(self._config.backoff_max_s, self._config.backoff_first_s * 2 ** min(failures, 16))
        return whole * (0.5 + 0.5 * self._dice.unit())

    def _on_event(self, event: HostEvent) -> None:
        if isinstance(event, PeerDisconnected) and event.peer in self._candidates:
            self._candidates[event.peer].lost.set()

    # --- circuits -------------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        """A relay brings somebody."""
        relay = stream.peer
        with trio.fail_after(_REQUEST_S):
            request = decode_stop_connect_untrusted(await receive_message_untrusted(stream))
            candidate = self._candidates.get(relay)
            if candidate is None or not candidate.addresses or not is_direct(stream.path):
                await send_message(stream, encode_stop_status(STATUS_PERMISSION_DENIED))
                return
        async with self._handshakes:
            with trio.fail_after(_REQUEST_S):
                await send_message(stream, encode_stop_status(STATUS_OK))
            path = Path(relay=relay, inbound=True)
            peer = await self._host.join_inbound(StreamTransport(stream), path, expected=request.peer)
            stream.adopted = True
        self._on_circuit(peer)
