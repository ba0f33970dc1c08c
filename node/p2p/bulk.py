"""Connections for bulk: activations of a chain, pieces of files. Nothing else travels on them.

Streams of one connection share its order, so bulk beside tokens would cost the tokens its queue. A connection
for bulk is dialled beside the one that carries control, with its own socket, keys and muxer. Both sides
know what it is for, because they agreed on it by the muxer's name (`upgrade.BULK_PROTOCOL`): neither counts
it as "connected", opens anything else on it, or serves protocols there that were not registered for bulk.

Either side may use it, whoever dialled. One connection carries one kind of stream at a time, so that a download
does not delay activations. It ends when no stream has been open on it for `HostLimits.bulk_idle_s`.

A peer behind a NAT can not be dialled a second time: not through a hole that was punched, which takes one
connection, and not through a relay, which counts them. Then the stream takes the ordinary connection, be it
direct, punched or relayed. Whoever names a relay says by that where it is to be met; its plain addresses are
tried for a moment only, in case that it is next door.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Final, Protocol

import trio

from node.p2p.addresses import Address, parse_peer_address
from node.p2p.errors import AddressInvalid, StreamBroken, Unreachable
from node.p2p.limits import HostLimits
from node.p2p.multistream import MAX_LINE_BYTES, NegotiationFailed, NotSupported, Proposer
from node.p2p.muxer import Connection
from node.p2p.stream import Stream
from protocol.ids import PeerId

#: Looks per idle time.
_LOOKS: Final = 4

#: A connection may end just when we want to use it; then another is made.
_ATTEMPTS: Final = 2

#: Addresses of one peer that are dialled, all at once: several interfaces, two families.
_MAX_TARGETS: Final = 8


class BulkHost(Protocol):
    """What of a host is needed here."""

    def connected(self) -> tuple[PeerId, ...]: ...
    def dialled_at(self, peer: PeerId) -> Address | None: ...
    async def dial_bulk(self, target: Address, peer: PeerId) -> Connection: ...
    async def connect(self, address: str) -> PeerId: ...
    async def open_stream(self, peer: PeerId, protocol: str) -> Stream: ...


async def open_agreed(connection: Connection, protocol: str, patience_s: float) -> Stream:
    """A new stream on this connection, once the peer agreed to speak `protocol`. Raises Unreachable."""
    proposer = Proposer(protocol)
    stream = await connection.open_stream(proposer.opening)
    agreed = False
    try:
        with trio.fail_after(patience_s):
            while not proposer.agreed:
                data = await stream.receive_some(MAX_LINE_BYTES)
                if not data:
                    raise Unreachable("the peer closed the stream")
                proposer.feed_untrusted(data)
        agreed = True
    except NotSupported:
        raise Unreachable(f"the peer does not speak {protocol}") from None
    except NegotiationFailed as error:
        raise Unreachable(f"the peer broke the negotiation: {error}") from error
    except StreamBroken as error:
        raise Unreachable(error.reason) from error
    except trio.TooSlowError:
        raise Unreachable(f"no answer within {patience_s:g} s") from None
    finally:
        if not agreed:
            stream.reset()
    stream.protocol = protocol
    if rest := proposer.rest():
        stream.unreceive(rest)
    return stream


class BulkConnections:
    """Those of one host."""

    def __init__(self, host: BulkHost, limits: HostLimits) -> None:
        self._host = host
        self._limits = limits
        self._of_peer: dict[PeerId, list[Connection]] = {}
        self._dials: dict[tuple[PeerId, bool], trio.Lock] = {}

    @property
    def all(self) -> tuple[Connection, ...]:
        """To all peers."""
        return tuple(c for group in self._of_peer.values() for c in group)

    def of(self, peer: PeerId) -> tuple[Connection, ...]:
        """To this peer."""
        return tuple(self._of_peer.get(peer, ()))

    def has_room(self, peer: PeerId) -> bool:
        """May there be one more to this peer?"""
        return len(self._of_peer.get(peer, ())) < self._limits.max_bulk_connections_per_peer

    def add(self, connection: Connection) -> None:
        """One was agreed on."""
        self._of_peer.setdefault(connection.peer, []).append(connection)

    def remove(self, connection: Connection) -> None:
        """It has ended."""
        group = self._of_peer[connection.peer]
        group.remove(connection)
        if not group:
            del self._of_peer[connection.peer]

    async def run(self, connection: Connection) -> None:
        """Serve a connection until it breaks or is not used for long."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_idle, connection)
            await connection.run()
            nursery.cancel_scope.cancel()

    async def open_stream(self, peer: PeerId, protocol: str, addresses: Iterable[str]) -> Stream:
        """See `Host.open_bulk_stream`."""
        texts = tuple(addresses)
        for _ in range(_ATTEMPTS):
            connection = await self._connection(peer, protocol, texts)
            if connection is None:
                break
            try:
                return await open_agreed(connection, protocol, self._limits.negotiation_s)
            except Unreachable:
                if connection.broken is None and not connection.departing:
                    raise
        if peer not in self._host.connected():
            await self._connect(peer, texts)
        return await self._host.open_stream(peer, protocol)

    async def warm(self, peer: PeerId, protocol: str, addresses: Iterable[str]) -> None:
        """See `Host.warm_bulk`."""
        texts = tuple(addresses)
        if await self._connection(peer, protocol, texts) is None and peer not in self._host.connected():
            with suppress(Unreachable):
                await self._connect(peer, texts)

    # --- inside -------------------------------------------------------------------------------------

    def _usable(self, peer: PeerId, protocol: str) -> Connection | None:
        """One that carries nothing or this kind of stream, rather the one heard of last."""
        usable = [
            c
            for c in self._of_peer.get(peer, ())
            if c.broken is None
            and not c.departing
            and all(stream.protocol in {"", protocol} for stream in c.streams.values())
        ]
        return max(usable, key=lambda c: c.heard_at, default=None)

    async def _connection(self, peer: PeerId, protocol: str, addresses: tuple[str, ...]) -> Connection | None:
        # Two callers, one connection. But whoever has learnt of a relay waits for nobody who dials without it.
        dialling = (peer, bool(_split(peer, addresses)[1]))
        lock = self._dials.setdefault(dialling, trio.Lock())
        try:
            async with lock:
                return self._usable(peer, protocol) or await self._dial(peer, addresses)
        finally:
            if not lock.locked():
                self._dials.pop(dialling, None)

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> Connection | None:
        """At the first address that answers; None if none does, or the peer takes no such connection."""
        if not self.has_room(peer):
            return None
        known = self._host.dialled_at(peer)
        plain, relayed = _split(peer, addresses)
        targets = list(dict.fromkeys(plain if known is None else (known, *plain)))[:_MAX_TARGETS]
        patience_s = self._limits.handshake_s
        if relayed and known is None:
            patience_s = self._limits.next_door_dial_s
        elif peer in self._host.connected():
            patience_s = self._limits.bulk_dial_s
        won: list[Connection] = []

        async def dial(target: Address) -> None:
            try:
                won.append(await self._host.dial_bulk(target, peer))
            except Unreachable:
                return
            scope.cancel()

        with trio.move_on_after(patience_s) as scope:
            async with trio.open_nursery() as nursery:
                for target in targets:
                    nursery.start_soon(dial, target)
        return won[0] if won else None

    async def _connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """An ordinary connection, through a relay rather than where nobody answered just now.

        Raises Unreachable.
        """
        reason = "no address of the peer is known"
        plain, relayed = _split(peer, addresses)
        for target in (*relayed, *plain):
            try:
                await self._host.connect(str(target))
            except Unreachable as error:
                reason = error.reason
            else:
                return
        raise Unreachable(reason)

    async def _end_idle(self, connection: Connection) -> None:
        idle_s = self._limits.bulk_idle_s * (1 if connection.initiator else 1.5)
        used_at = trio.current_time()
        while True:
            await trio.sleep(idle_s / _LOOKS)
            now = trio.current_time()
            used_at = now if connection.streams else max(used_at, connection.heard_at)
            if now - used_at >= idle_s:
                connection.abort("not used")
                return


def _split(peer: PeerId, texts: Iterable[str]) -> tuple[list[Address], list[Address]]:
    """Of these addresses those of this peer: where a socket leads, and at relays."""
    plain: list[Address] = []
    relayed: list[Address] = []
    for text in texts:
        try:
            target, named = parse_peer_address(text)
        except AddressInvalid:
            continue
        if named == peer:
            (plain if target.relay is None else relayed).append(target)
    return plain, relayed
