"""From a relayed connection to a direct one: both sides dial each other at the same moment (libp2p's DCUtR).

The side that was dialled through the relay begins, because it is the one that is known to sit behind a NAT.
Each side tells where others see its listening port, and then dials from that port: its own NAT takes the
other's SYN for the answer to its own. The TCP connection that arises has no dialler, so the roles are fixed:
who dialled through the relay speaks first, also when one side's listener gets the connection after all.

A remote says where we dial, so that we could be aimed at others: only public addresses are tried (of others
those in our own network, if both seem to sit behind the same public one), few of them, not often, and no more
once somebody else answers there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from node.p2p.addresses import Address, is_public, parse_address
from node.p2p.errors import AddressInvalid, StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.host_events import HostEvent, PeerDirect
from node.p2p.identify import identify
from node.p2p.nat_messages import (
    DCUTR_PROTOCOL,
    PunchConnect,
    PunchMessage,
    PunchSync,
    decode_punch_untrusted,
    encode_punch,
    receive_message_untrusted,
    send_message,
)
from node.p2p.own_addresses import OwnAddresses
from node.p2p.rates import RateLimit
from node.p2p.relay_dial import is_direct, is_relayed
from node.p2p.sockets import PortBusy, dial, explain, source_for
from node.p2p.stream import Stream
from node.p2p.transport import Path, SocketTransport
from protocol.dice import Dice
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId

_log = structlog.get_logger("hole-punch")

#: The specification: "retry twice (thus a total of 3 attempts)".
ATTEMPTS: Final = 3

#: A SYN that came too early is sent again after 1 and 3 s.
PUNCH_S: Final = 5.0

#: To tell each other addresses over the relay.
EXCHANGE_S: Final = 10.0

#: Between attempts. A NAT that answered a SYN that came too early remembers it for 10 s (Linux), and maps our
#: port to another one for as long.
GAP_S: Final = 12.0

#: Before a dial is repeated whose port was busy, or where somebody else answered.
_AGAIN_S: Final = 0.2

#: Somebody answers there and is not the peer: one more try, as the peer's other dial may have cut across.
_MAX_STRANGERS: Final = 2

#: Addresses with so many leading bits in common are taken for one home network.
_HOME_BITS: Final = {4: 24, 6: 64}

#: Addresses of one peer that are dialled: its IPv4, its IPv6, and what a second relay saw.
_MAX_TARGETS: Final = 4

#: Upgrades that run at once; beyond it connections stay relayed.
_MAX_RUNNING: Final = 32

#: Upgrades that we begin with one peer in `_PER_S` seconds, and rounds that one may begin with us.
_UPGRADES_PER_PEER: Final = 4
_ROUNDS_PER_PEER: Final = _UPGRADES_PER_PEER * ATTEMPTS
_PER_S: Final = 300.0


@dataclass(slots=True)
class PunchCounters:
    """What came of upgrades since the start, for metrics."""

    begun: int = 0
    punched: int = 0
    dialled: int = 0
    """The peer had a public address after all."""
    failed: int = 0


class HolePuncher:
    """DCUtR on a host. `private_addresses`: dial others than public ones, too (networks that have none);
    `gap_s`: pause between attempts.
    """

    def __init__(
        self,
        host: Host,
        *,
        own: OwnAddresses,
        private_addresses: bool,
        gap_s: float,
        dice: Dice,
        nursery: trio.Nursery,
    ) -> None:
        self.counters: Final = PunchCounters()
        self._host = host
        self._own = own
        self._private_addresses = private_addresses
        self._gap_s = gap_s
        self._dice = dice
        self._nursery = nursery
        self._running: set[PeerId] = set()
        self._upgrades = RateLimit[PeerId](_UPGRADES_PER_PEER, per_s=_PER_S)
        self._rounds = RateLimit[PeerId](_ROUNDS_PER_PEER, per_s=_PER_S)
        host.handle(DCUTR_PROTOCOL, self._serve)

    # --- the side that begins -------------------------------------------------------------------

    def begin(self, peer: PeerId) -> None:
        """`peer` came to us through a relay: try to meet it directly, in a task of its own."""
        if (
            peer not in self._running
            and len(self._running) < _MAX_RUNNING
            and not self._is_direct(peer)
            and self._upgrades.take(peer, trio.current_time())
        ):
            self._running.add(peer)
            self._nursery.start_soon(self._upgrade, peer)

    async def _upgrade(self, peer: PeerId) -> None:
        self.counters.begun += 1
        try:
            if await self._dial_public(peer):
                self.counters.dialled += 1
                return
            for path in self._host.paths(peer):
                await self._own.learn_port(path.relay)
            for attempt in range(ATTEMPTS):
                if attempt:
                    await trio.sleep(self._gap_s * (1 + self._dice.unit() / 4))
                if not self._host.paths(peer):
                    break
                try:
                    await self._attempt(peer)
                except (Unreachable, StreamBroken, ProtocolError, trio.TooSlowError) as error:
                    _log.debug("hole punching failed", peer=peer, attempt=attempt, reason=str(error))
                if self._is_direct(peer):
                    self.counters.punched += 1
                    _log.info("direct connection", peer=peer, attempts=attempt + 1)
                    return
            self.counters.failed += 1
            _log.info("stays relayed", peer=peer)
        finally:
            self._running.discard(peer)

    async def _dial_public(self, peer: PeerId) -> bool:
        """The peer may be dialable: what it says of itself, tried plainly."""
        try:
            told = await identify(self._host, peer)
        except (Unreachable, ProtocolError):
            return False
        for target in self._targets(told.listen):
            address = Address(target.kind, target.host, target.port, peer)
            with trio.move_on_after(PUNCH_S):
                try:
                    await self._host.connect(str(address), over=is_direct)
                except Unreachable:
                    continue
                return True
        return False

    async def _attempt(self, peer: PeerId) -> None:
        with trio.fail_after(EXCHANGE_S):
            stream = await self._host.open_stream(peer, DCUTR_PROTOCOL, over=is_relayed)
            try:
                began = trio.current_time()
                await _send(stream, PunchConnect(self._own.candidates()))
                theirs = await _receive_connect(stream)
                rtt_s = trio.current_time() - began
                await _send(stream, PunchSync())
            except BaseException:
                stream.reset()
                raise
            await stream.aclose()
        await trio.sleep(rtt_s / 2)  # when the other side gets our word
        await self._punch(peer, theirs.addresses, speaks_first=False)

    # --- the other side -------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        peer, path = stream.peer, stream.path
        if (
            path.relay is None
            or path.inbound
            or peer in self._running
            or len(self._running) >= _MAX_RUNNING
            or not self._rounds.take(peer, trio.current_time())
        ):
            stream.reset()
            return
        self._running.add(peer)
        try:
            with trio.fail_after(EXCHANGE_S):
                theirs = await _receive_connect(stream)
                await self._own.learn_port(path.relay)
                await _send(stream, PunchConnect(self._own.candidates()))
                if not isinstance(await _receive(stream), PunchSync):
                    raise ProtocolError(Fault.UNEXPECTED, "SYNC was expected")
            await self._punch(peer, theirs.addresses, speaks_first=True)
        finally:
            self._running.discard(peer)

    # --- both -----------------------------------------------------------------------------------

    async def _punch(self, peer: PeerId, addresses: Sequence[str], *, speaks_first: bool) -> None:
        """Dial all of them until there is a direct connection, by whichever socket, or PUNCH_S are over."""
        targets = self._targets(addresses)
        remotes = [f"{target.host}:{target.port}" for target in targets]
        with trio.move_on_after(PUNCH_S) as scope:

            def on_event(event: HostEvent) -> None:
                if event == PeerDirect(peer):
                    scope.cancel()

            stop = self._host.subscribe(on_event)
            try:
                with self._host.expect_punches(remotes, peer) if speaks_first else nullcontext():
                    async with trio.open_nursery() as nursery:
                        for target in targets:
                            nursery.start_soon(self._punch_one, peer, target, speaks_first)
            finally:
                stop()

    async def _punch_one(self, peer: PeerId, target: Address, speaks_first: bool) -> None:  # noqa: FBT001 - start_soon
        strangers = 0
        while strangers < _MAX_STRANGERS and not self._is_direct(peer):
            try:
                transport = SocketTransport(await dial(target, source_for(target, self._host.endpoints)))
            except PortBusy:
                await trio.sleep(_AGAIN_S)
                continue
            except OSError as error:
                # Another SYN would only be refused as well; the other side's may still come to our listener.
                _log.debug("no hole", peer=peer, target=str(target), reason=explain(error))
                await trio.sleep_forever()
                return
            try:
                if speaks_first:
                    path = Path(from_listener=True, punched=True)
                    await self._host.join_outbound(transport, peer, path)
                else:
                    path = Path(inbound=True, from_listener=True, punched=True)
                    await self._host.join_inbound(transport, path, expected=peer)
            except Unreachable as error:
                _log.debug("not the peer", peer=peer, target=str(target), reason=error.reason)
                strangers += 1
                await trio.sleep(_AGAIN_S)

    def _targets(self, addresses: Sequence[str]) -> list[Address]:
        """Which of a peer's addresses we are willing to dial, in its order."""
        found: list[Address] = []
        for text in addresses:
            try:
                address = parse_address(text)
            except AddressInvalid:
                continue
            if address.relay is None and address.kind in {"ip4", "ip6"} and address.port:
                found.append(Address(address.kind, address.host, address.port))
        neighbours = any(address.host in self._own.ips() for address in found)
        mine = [parse_address(text) for text in self._host.listening]
        wanted = [
            target
            for target in dict.fromkeys(found)
            if not any((own.host, own.port) == (target.host, target.port) for own in mine)
            and (
                is_public(target)
                or self._private_addresses
                or (neighbours and any(_at_home(own, target) for own in mine))
            )
        ]
        return wanted[:_MAX_TARGETS]

    def _is_direct(self, peer: PeerId) -> bool:
        return any(map(is_direct, self._host.paths(peer)))


def _at_home(own: Address, other: Address) -> bool:
    here, there = ipaddress.ip_address(own.host), ipaddress.ip_address(other.host)
    if here.version != there.version or there.is_loopback:
        return False
    return there in ipaddress.ip_network((here, _HOME_BITS[here.version]), strict=False)


async def _send(stream: Stream, message: PunchMessage) -> None:
    await send_message(stream, encode_punch(message))


async def _receive(stream: Stream) -> PunchMessage:
    return decode_punch_untrusted(await receive_message_untrusted(stream))


async def _receive_connect(stream: Stream) -> PunchConnect:
    message = await _receive(stream)
    if not isinstance(message, PunchConnect):
        raise ProtocolError(Fault.UNEXPECTED, "CONNECT was expected")
    return message
