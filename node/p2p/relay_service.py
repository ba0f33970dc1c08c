"""A relay: who can not be dialled reserves a place, others are joined to it (libp2p circuit-v2, hop).

What strangers cost is bounded by `RelayLimits`: places, circuits, their time and bytes, requests a minute, and
the relay's whole bandwidth. A circuit holds at most a stream's window each way. The relay sees who meets whom
and how much they say; what they say is sealed between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from node.p2p.errors import StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.host_events import HostEvent, PeerDisconnected
from node.p2p.nat_messages import (
    HOP_PROTOCOL,
    STATUS_CONNECTION_FAILED,
    STATUS_MALFORMED,
    STATUS_NO_RESERVATION,
    STATUS_OK,
    STATUS_PERMISSION_DENIED,
    STATUS_RESERVATION_REFUSED,
    STATUS_RESOURCE_LIMIT,
    STOP_PROTOCOL,
    CircuitLimit,
    ConnectRequest,
    HopStatus,
    ReserveRequest,
    StopConnect,
    decode_hop_request_untrusted,
    decode_stop_status_untrusted,
    encode_hop_status,
    encode_stop_connect,
    make_voucher,
    receive_message_untrusted,
    send_message,
)
from node.p2p.rates import RateLimit
from node.p2p.relay_dial import is_direct
from node.p2p.stream import Stream
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.limits import KIB, MAX_ADDRESSES, MIB

_log = structlog.get_logger("relay")

#: Bytes moved at once from one side of a circuit to the other.
_CHUNK_BYTES: Final = 64 * KIB


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives away at most."""

    reservation_s: int = 3600
    """How long a place lasts without renewal; what go-libp2p gives."""

    max_reservations: int = 256
    """Each keeps one connection open: about 20 KiB and two tasks."""

    max_reservations_per_ip: int = 16
    """Households and small offices behind one address, but not a whole farm of identities."""

    max_circuits: int = 256
    """Each holds two streams and up to 2 MiB in flight."""

    max_circuits_per_peer: int = 16
    """As source or as target: an Island with sixteen consumers who all have to be relayed."""

    circuit_s: int = 3600
    """A relayed connection is ended after this time; its ends then connect anew."""

    circuit_bytes: int = 4096 * MIB
    """Each way. A quarter of a million tokens of a 70B model between two stages of a chain, at 16 KiB a token.
    What carrying costs is bounded below; this only makes who carries much come back for more."""

    max_bytes_per_s: int = 8 * MIB
    """All circuits together, first come first served: less than the upstream of a small server."""

    max_requests_per_minute: int = 60
    """Of one peer. Each request to connect makes the relay disturb somebody."""

    request_s: float = 10.0
    """To send a request, and for a target to accept a circuit."""


@dataclass(slots=True)
class RelayCounters:
    """What a relay did since its start, for metrics."""

    reservations_made: int = 0
    reservations_refused: int = 0
    circuits_opened: int = 0
    circuits_refused: int = 0
    circuits_cut: int = 0
    """Ended by the relay: out of time or bytes."""
    bytes_relayed: int = 0


@dataclass(slots=True)
class _Place:
    ip: str
    expires: float  # trio's clock
    release: Callable[[], None]


class _Throttle:
    """Spreads bytes so that no more than a rate passes, first come first served."""

    def __init__(self, bytes_per_s: int) -> None:
        self._rate: Final = bytes_per_s
        self._free_at = 0.0

    async def pass_(self, size: int) -> None:
        now = trio.current_time()
        start = max(now, self._free_at)
        self._free_at = start + size / self._rate
        if start > now:
            await trio.sleep_until(start)


class RelayService:
    """The hop protocol on a host. `unix_now_s` is civil time, which reservations are stamped with."""

    def __init__(self, host: Host, limits: RelayLimits, *, unix_now_s: Callable[[], int]) -> None:
        self.counters: Final = RelayCounters()
        self._host = host
        self._limits = limits
        self._unix_now_s = unix_now_s
        self._places: dict[PeerId, _Place] = {}
        self._circuits: dict[PeerId, int] = {}
        self._circuit_count = 0
        self._requests = RateLimit[PeerId](limits.max_requests_per_minute, per_s=60.0)
        self._throttle = _Throttle(limits.max_bytes_per_s)
        host.handle(HOP_PROTOCOL, self._serve)
        host.subscribe(self._on_event)

    @property
    def reservations(self) -> int:
        """Places taken now."""
        return len(self._places)

    @property
    def circuits(self) -> int:
        """Relayed connections now."""
        return self._circuit_count

    # --- requests -------------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        """One request. Over a relayed connection nothing is served: relays are not chained."""
        try:
            with trio.fail_after(self._limits.request_s):
                request = decode_hop_request_untrusted(await receive_message_untrusted(stream))
        except ProtocolError:
            await self._answer(stream, HopStatus(STATUS_MALFORMED))
            return
        if not is_direct(stream.path):
            await self._answer(stream, HopStatus(STATUS_PERMISSION_DENIED))
        elif not self._requests.take(stream.peer, trio.current_time()):
            await self._answer(stream, HopStatus(STATUS_RESOURCE_LIMIT))
        elif isinstance(request, ReserveRequest):
            await self._reserve(stream)
        else:
            await self._connect(stream, request)

    async def _answer(self, stream: Stream, answer: HopStatus) -> None:
        with trio.fail_after(self._limits.request_s):
            await send_message(stream, encode_hop_status(answer))

    async def _reserve(self, stream: Stream) -> None:
        self._drop_expired()
        peer, ip = stream.peer, stream.remote.rpartition(":")[0]
        others = sum(1 for other, place in self._places.items() if place.ip == ip and other != peer)
        full = peer not in self._places and len(self._places) >= self._limits.max_reservations
        if full or others >= self._limits.max_reservations_per_ip:
            self.counters.reservations_refused += 1
            await self._answer(stream, HopStatus(STATUS_RESERVATION_REFUSED))
            return
        expires_unix_s = self._unix_now_s() + self._limits.reservation_s
        place = self._places.get(peer)
        if place is None:
            self.counters.reservations_made += 1
            place = self._places[peer] = _Place(ip, 0.0, self._host.hold(peer))
            _log.info("reservation", peer=peer, places=len(self._places))
        place.ip, place.expires = ip, trio.current_time() + self._limits.reservation_s
        answer = HopStatus(
            STATUS_OK,
            expires_unix_s,
            tuple(a for a in self._host.addresses if "/p2p-circuit" not in a)[:MAX_ADDRESSES],
            make_voucher(self._host.identity.seed, self._host.peer, peer, expires_unix_s),
            self._limit,
        )
        await self._answer(stream, answer)

    async def _connect(self, source: Stream, request: ConnectRequest) -> None:
        self._drop_expired()
        status = self._refusal(source.peer, request.peer)
        if status == STATUS_OK:
            self._count(source.peer, request.peer, 1)
            try:
                target = await self._open_target(source.peer, request.peer)
                if target is not None:
                    self.counters.circuits_opened += 1
                    await self._run_circuit(source, target)
                    return
            finally:
                self._count(source.peer, request.peer, -1)
            status = STATUS_CONNECTION_FAILED
        self.counters.circuits_refused += 1
        await self._answer(source, HopStatus(status))

    def _refusal(self, source: PeerId, target: PeerId) -> int:
        if target not in self._places:
            return STATUS_NO_RESERVATION
        if source == target:
            return STATUS_PERMISSION_DENIED
        most = self._limits.max_circuits_per_peer
        if (
            self._circuit_count >= self._limits.max_circuits
            or self._circuits.get(source, 0) >= most
            or self._circuits.get(target, 0) >= most
        ):
            return STATUS_RESOURCE_LIMIT
        return STATUS_OK

    def _count(self, source: PeerId, target: PeerId, step: int) -> None:
        self._circuit_count += step
        for peer in (source, target):
            self._circuits[peer] = self._circuits.get(peer, 0) + step
            if not self._circuits[peer]:
                del self._circuits[peer]

    async def _open_target(self, source: PeerId, target: PeerId) -> Stream | None:
        """A stream to the target that it has accepted, if it does."""
        stream: Stream | None = None
        accepted = False
        try:
            with trio.fail_after(self._limits.request_s):
                stream = await self._host.open_stream(target, STOP_PROTOCOL, over=is_direct)
                await send_message(stream, encode_stop_connect(StopConnect(source, self._limit)))
                status = decode_stop_status_untrusted(await receive_message_untrusted(stream))
                accepted = status == STATUS_OK
        except (Unreachable, StreamBroken, ProtocolError, trio.TooSlowError) as error:
            _log.debug("target did not accept", target=target, reason=str(error))
        finally:
            if stream is not None and not accepted:
                stream.reset()
        return stream if accepted else None

    # --- circuits -------------------------------------------------------------------------------

    @property
    def _limit(self) -> CircuitLimit:
        return CircuitLimit(self._limits.circuit_s, self._limits.circuit_bytes)

    async def _run_circuit(self, source: Stream, target: Stream) -> None:
        """Carry bytes both ways until both have ended, one breaks, or a limit is reached."""
        try:
            await self._answer(source, HopStatus(STATUS_OK, limit=self._limit))
            with trio.move_on_after(self._limits.circuit_s) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, source, target, nursery)
                    nursery.start_soon(self._pump, target, source, nursery)
            self.counters.circuits_cut += scope.cancelled_caught
        finally:
            for stream in (source, target):  # does nothing to what has ended in order
                stream.reset()

    async def _pump(self, source: Stream, target: Stream, circuit: trio.Nursery) -> None:
        left = self._limits.circuit_bytes
        try:
            while data := await source.receive_some(_CHUNK_BYTES):
                left -= len(data)
                if left < 0:
                    self.counters.circuits_cut += 1
                    break
                await self._throttle.pass_(len(data))
                await target.send_all(data)
                self.counters.bytes_relayed += len(data)
            else:
                await target.send_eof()
                return
        except StreamBroken as error:
            _log.debug("circuit ended", source=source.peer, target=target.peer, reason=error.reason)
        circuit.cancel_scope.cancel()

    # --- places ---------------------------------------------------------------------------------

    def _drop_expired(self) -> None:
        now = trio.current_time()
        for peer in [peer for peer, place in self._places.items() if place.expires <= now]:
            self._drop(peer)

    def _drop(self, peer: PeerId) -> None:
        place = self._places.pop(peer, None)
        if place is not None:
            place.release()

    def _on_event(self, event: HostEvent) -> None:
        if isinstance(event, PeerDisconnected):
            self._drop(event.peer)
