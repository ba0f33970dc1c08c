"""A peer on the network: listens, dials, and gives each stream to whoever handles its protocol.

py-libp2p's own Swarm and BasicHost are not used: see docs/network.md for what they do and what stands here
instead. The pieces below them are libp2p's: TCP, multistream-select, noise, yamux, Ed25519 peer ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import structlog
import trio

from node.identity import Identity
from node.p2p.addresses import Address, parse_peer_address
from node.p2p.bulk import BulkConnections, open_agreed
from node.p2p.errors import ChannelBroken, Unreachable
from node.p2p.handlers import Handler, Handlers
from node.p2p.handshakes import Handshakes
from node.p2p.host_events import (
    AddressesChanged,
    HostEvent,
    Observed,
    PeerConnected,
    PeerDirect,
    PeerDisconnected,
)
from node.p2p.limits import HostLimits
from node.p2p.muxer import Connection
from node.p2p.noise import HandshakeFailed, Secured
from node.p2p.relay_dial import PathFilter, is_direct, is_from_listener, is_relayed, open_circuit
from node.p2p.sockets import (
    Endpoint,
    PortBusy,
    dial,
    explain,
    leaves,
    remote_host,
    source_for,
)
from node.p2p.stream import Counters, Stream, UnreadBudget
from node.p2p.transport import Path, SocketTransport, Transport
from node.p2p.upgrade import Upgrader
from protocol.codec import excerpt
from protocol.ids import PeerId

_log = structlog.get_logger("p2p")

#: How often a connection that shall end is looked at.
_IDLE_S: Final = 1.0

#: Peers whose word on our own address is remembered.
_MAX_OBSERVERS: Final = 64


@contextmanager
def plain_errors() -> Generator[None]:
    """Let the single error that left a nursery out of its groups, so that callers can catch it by type."""
    try:
        yield
    except BaseExceptionGroup as group:
        found = list(leaves(group))
        if len(found) != 1:
            raise
        leaf = found[0]
        context = leaf.__context__
        try:
            raise leaf
        finally:
            leaf.__context__ = context  # not the group that it was taken from


class Host:
    """Made by `open_host`."""

    def __init__(
        self,
        identity: Identity,
        endpoints: tuple[Endpoint, ...],
        addresses: tuple[str, ...],
        limits: HostLimits,
        connections: trio.Nursery,
    ) -> None:
        self.peer: Final = identity.peer
        self.identity: Final = identity
        self.endpoints: Final = endpoints  # where our sockets listen
        self.listening: Final = addresses
        self.observed: Final = OrderedDict[PeerId, Observed]()
        self._announced: tuple[str, ...] = ()
        self.counters: Final = Counters()
        self._limits = limits
        self.closing = False
        self._connection_tasks = connections
        self.handlers: Final = Handlers(limits, self.counters)
        self._upgrader = Upgrader(identity.seed, limits)
        self._budget = UnreadBudget(limits.max_unread_bytes)
        self._connections: dict[PeerId, list[Connection]] = {}
        self._connection_count = 0
        self._relayed_count = 0
        self._held: dict[PeerId, int] = {}
        self._punches: dict[str, PeerId] = {}
        self._dials: dict[tuple[PeerId, bool], trio.Lock] = {}
        self._bulk = BulkConnections(self, limits)
        self._handshakes = Handshakes(limits.max_handshakes)
        self._subscribers: list[Callable[[HostEvent], None]] = []

    # --- for users ------------------------------------------------------------------------------

    def handle(self, protocol: str, handler: Handler, *, bulk: bool = False) -> None:
        """Give each inbound stream of this protocol to `handler`, in a task of its own. `bulk`: it may also
        come on connections for bulk, where nothing else may.

        An exception of the handler is logged, counted, and resets that stream only. When it returns, the
        stream is closed. Raises ValueError if the name is too long or taken.
        """
        self.handlers.add(protocol, handler, bulk=bulk)

    def subscribe(self, callback: Callable[[HostEvent], None]) -> Callable[[], None]:
        """Call `callback` at each event, in order, from the task where it happens; it must not raise.

        Callbacks, because then no event is ever queued, dropped or late. Returns what ends it.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    @property
    def limits(self) -> HostLimits:
        """What it holds at most."""
        return self._limits

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may find this node, the best first: what was announced, then where it listens."""
        return self._announced + tuple(a for a in self.listening if a not in self._announced)

    def announce(self, addresses: Sequence[str]) -> None:
        """Addresses besides those that we listen on (public, relayed), instead of those named before."""
        before = self.addresses
        self._announced = tuple(addresses)
        if self.addresses != before:
            self._publish(AddressesChanged(self.addresses))

    def note_observed(self, peer: PeerId, address: str, *, mapped: bool = False) -> None:
        """Remember where `peer` sees us (identify's observed address)."""
        self.observed[peer] = Observed(address, mapped)
        self.observed.move_to_end(peer)
        while len(self.observed) > _MAX_OBSERVERS:
            self.observed.popitem(last=False)

    def hold(self, peer: PeerId) -> Callable[[], None]:
        """Say that the connection to this peer has a use even without streams (a place at a relay).

        Nothing here closes idle connections; who does has to ask `is_held`. Returns what ends it.
        """
        self._held[peer] = self._held.get(peer, 0) + 1
        released = False

        def release() -> None:
            nonlocal released
            if not released:
                released = True
                self._held[peer] -= 1
                if not self._held[peer]:
                    del self._held[peer]

        return release

    def is_held(self, peer: PeerId) -> bool:
        """Is the connection to it of use even without streams?"""
        return peer in self._held

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a connection, in the order in which they came."""
        return tuple(self._connections)

    def remote_of(self, peer: PeerId) -> str | None:
        """'host:port' of the connection in use, or who relays it, for displays."""
        connection = self._usable(peer)
        return connection.remote if connection else None

    def dialled_at(self, peer: PeerId) -> Address | None:
        """Where we reached the peer ourselves and may do so again, if one of its connections was made so."""
        for connection in self._connections.get(peer, ()):
            path = connection.path
            if connection.broken is None and is_direct(path) and not (path.inbound or path.punched):
                host, _, port = connection.remote.rpartition(":")
                if port.isdigit():
                    return Address("ip6" if ":" in host else "ip4", host, int(port), peer)
        return None

    def paths(self, peer: PeerId) -> tuple[Path, ...]:
        """Of its connections, in the order in which they came."""
        return tuple(c.path for c in self._connections.get(peer, ()) if c.broken is None)

    def heard_at(self, peer: PeerId) -> float | None:
        """`trio.current_time()` when bytes last came from it, on whatever stream; None if not connected."""
        return max((c.heard_at for c in self._connections.get(peer, ())), default=None)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What is handled here, in the order in which it was registered."""
        return self.handlers.protocols

    def streams_of(self, peer: PeerId) -> int:
        """Open streams on all connections to it, whoever opened them."""
        return sum(len(c.streams) for c in (*self._connections.get(peer, ()), *self._bulk.of(peer)))

    @property
    def inbound_streams(self) -> int:
        """Streams with a handler now."""
        return self.handlers.running

    @property
    def unread_bytes(self) -> int:
        """Received and not yet read, over all streams."""
        return self._budget.used

    async def connect(self, address: str, *, over: PathFilter | None = None) -> PeerId:
        """Connect to the peer at `/ip4/…/tcp/…/p2p/ID` (or ip6, dns, dns4, dns6), or through a relay at
        `/ip4/…/tcp/…/p2p/RELAY/p2p-circuit/p2p/ID`. No-op if connected, by a path that `over` accepts.

        No retries, no memory of failures, no wait: what bounds it is the caller's cancel scope and
        `HostLimits.handshake_s`. Raises Unreachable.
        """
        target, peer = parse_peer_address(address)
        if peer == self.peer:
            raise Unreachable("that is this node itself")
        # Two callers, one connection. But the way through a relay waits for no socket that nobody answers.
        dialling = (peer, target.relay is not None)
        lock = self._dials.setdefault(dialling, trio.Lock())
        try:
            async with lock:
                if self._usable(peer, over) is None:
                    await self._dial(target, peer, from_listener=over is is_from_listener)
        finally:
            if not lock.locked():
                self._dials.pop(dialling, None)
        return peer

    async def open_stream(self, peer: PeerId, protocol: str, *, over: PathFilter | None = None) -> Stream:
        """A new stream to a connected peer, after it agreed to speak `protocol`, on a connection whose path
        `over` accepts. Raises Unreachable.
        """
        connection = self._usable(peer, over)
        if connection is None:
            raise Unreachable("not connected" if over is None else "no such connection to the peer")
        return await open_agreed(connection, protocol, self._limits.negotiation_s)

    async def open_bulk_stream(self, peer: PeerId, protocol: str, addresses: Iterable[str] = ()) -> Stream:
        """A new stream on a connection that carries nothing else but its kind (see node/p2p/bulk.py), dialled
        at `addresses` (full, with /p2p/ID) if there is none. If the peer can only be met at a relay, or knows
        no such connections, on the one that there is, or at last on a new one. Raises Unreachable.
        """
        return await self._bulk.open_stream(peer, protocol, addresses)

    async def warm_bulk(self, peer: PeerId, protocol: str, addresses: Iterable[str]) -> None:
        """Have a connection for bulk in case that a stream is needed soon, if one can be had."""
        await self._bulk.warm(peer, protocol, addresses)

    def bulk_connections(self, peer: PeerId) -> int:
        """How many connections for bulk there are to it."""
        return len(self._bulk.of(peer))

    async def disconnect(self, peer: PeerId, reason: str = "disconnected here") -> None:
        """Drop all connections to it at once, also when it is frozen. Its streams fail."""
        for connection in list(self._connections.get(peer, ())):
            connection.abort(reason)
            self._remove(connection)
        for connection in self._bulk.of(peer):
            connection.abort(reason)
        await trio.lowlevel.checkpoint()

    # --- for the NAT traversal ------------------------------------------------------------------

    async def join_outbound(self, transport: Transport, peer: PeerId, path: Path) -> None:
        """Make a pipe to `peer` on which we speak first a connection. Closes it on failure.

        Raises Unreachable.
        """
        try:
            self._check_capacity(peer, path)
        except Unreachable:
            transport.close()
            raise
        with self._as_unreachable():
            secured = await self._upgrader.dial(transport, peer)
        self.counters.connections_dialled += 1
        self._add(secured, path, initiator=True)

    async def dial_bulk(self, target: Address, peer: PeerId) -> Connection:
        """A new connection for bulk. Raises Unreachable."""
        if self.closing:
            raise Unreachable("this node is shutting down")
        self._check_capacity(peer, Path(bulk=True))
        with self._as_unreachable():
            transport = SocketTransport(await dial(target))
            secured = await self._upgrader.dial(transport, peer, bulk=True)
        transport.limit_unsent()
        self.counters.connections_dialled += 1
        return self._add(secured, Path(), initiator=True)

    async def join_inbound(self, transport: Transport, path: Path, *, expected: PeerId | None = None) -> PeerId:
        """Make a pipe on which the other side speaks first a connection; who it is. Closes it on failure.

        Raises Unreachable.
        """

        def admit(peer: PeerId, bulk: bool) -> None:  # noqa: FBT001 - the upgrade's own callback
            if expected is not None and peer != expected:
                raise Unreachable("another peer than the one that was expected")
            self._check_capacity(peer, replace(path, bulk=bulk))

        def takes_bulk(peer: PeerId) -> bool:
            return path == Path(inbound=True) and self._bulk.has_room(peer)

        with self._as_unreachable():
            secured = await self._upgrader.accept(transport, admit, takes_bulk)
        if secured.bulk and isinstance(transport, SocketTransport):
            transport.limit_unsent()
        self.counters.connections_accepted += 1
        self._add(secured, path, initiator=False)
        return secured.peer

    async def prove(self, transport: Transport, peer: PeerId) -> None:
        """Is `peer` at the other end? Closes the pipe. Raises Unreachable if not."""
        with self._as_unreachable():
            await self._upgrader.prove(transport, peer)

    @contextmanager
    def expect_punches(self, remotes: Iterable[str], peer: PeerId) -> Generator[None]:
        """While this lasts, connections from these 'host:port' are the other end of our own dials to `peer`, in
        which we speak first, also when our listener gets them.
        """
        mine = {remote: peer for remote in remotes if remote not in self._punches}
        self._punches |= mine
        try:
            yield
        finally:
            for remote in mine:
                del self._punches[remote]

    async def retire_relayed(self, peer: PeerId, grace_s: float) -> None:
        """Close relayed connections to a peer that has a direct one, when idle or after this time."""
        until = trio.current_time() + grace_s
        await trio.sleep(min(_IDLE_S, grace_s))  # the other side may be opening a stream there
        while relayed := [c for c in self._connections.get(peer, ()) if is_relayed(c.path)]:
            if all(is_relayed(path) for path in self.paths(peer)):
                return  # the direct one did not last
            late = trio.current_time() >= until
            for connection in relayed:
                if late or not connection.streams:
                    connection.abort("a direct connection took over")
                    self._remove(connection)
            await trio.sleep(min(_IDLE_S, grace_s))

    @contextmanager
    def _as_unreachable(self) -> Generator[None]:
        """What goes wrong with a remote while a connection is made, in one type, and an end to waiting."""
        try:
            with trio.fail_after(self._limits.handshake_s):
                yield
        except OSError as error:
            raise Unreachable(explain(error)) from error
        except (HandshakeFailed, ChannelBroken) as error:
            raise Unreachable(str(error)) from error
        except trio.TooSlowError:
            raise Unreachable(f"no answer within {self._limits.handshake_s:g} s") from None

    # --- for open_host --------------------------------------------------------------------------

    async def accept(self, stream: trio.SocketStream) -> None:
        """One inbound connection. The outermost task boundary for what strangers send."""
        try:
            async with self._handshakes.place(remote_host(stream)):
                transport = SocketTransport(stream)
                punched = self._punches.get(transport.remote)
                if punched is not None:
                    await self.join_outbound(transport, punched, Path(inbound=True, punched=True))
                else:
                    await self.join_inbound(transport, Path(inbound=True))
        except Unreachable as error:
            self.counters.connections_refused += 1
            _log.debug("inbound connection refused", reason=excerpt(error.reason))

    async def shut_down(self) -> None:
        """Let the last frames leave, then close everything. Takes `shutdown_s` at most."""
        deadline = trio.current_time() + self._limits.shutdown_s
        for relayed in (True, False):  # relayed ones leave through the others
            connections = [
                c for group in self._connections.values() for c in group if is_relayed(c.path) is relayed
            ]
            if not relayed:
                connections += self._bulk.all
            with trio.move_on_at(deadline):
                async with trio.open_nursery() as nursery:
                    for connection in connections:
                        nursery.start_soon(connection.drain)
            for connection in connections:
                connection.abort("this node is shutting down")

    # --- connections ----------------------------------------------------------------------------

    def _usable(self, peer: PeerId, over: PathFilter | None = None) -> Connection | None:
        """A direct connection rather than a relayed one, then the one heard of last: one whose other end is
        gone without a word (a cut cable, a restarted machine) may stand beside the one that replaced it.
        """
        usable = [
            c
            for c in self._connections.get(peer, ())
            if c.broken is None and not c.departing and (over is None or over(c.path))
        ]
        return max(usable, key=lambda c: (not is_relayed(c.path), c.heard_at), default=None)

    async def _dial(self, target: Address, peer: PeerId, *, from_listener: bool) -> None:
        if self.closing:
            raise Unreachable("this node is shutting down")
        try:
            if target.relay is not None:
                path = Path(relay=target.relay)
                self._check_capacity(peer, path)
                # It sees us where others may find us, in case that we try to meet the peer directly later.
                await self.connect(str(target.of_relay), over=is_from_listener)
                transport = await open_circuit(self, target)
            else:
                source = source_for(target, self.endpoints) if from_listener else None
                if from_listener and source is None and self._usable(peer, is_direct):
                    return
                path = Path(from_listener=source is not None)
                self._check_capacity(peer, path)
                with self._as_unreachable():
                    transport = SocketTransport(await dial(target, source))
            await self.join_outbound(transport, peer, path)
        except PortBusy:
            if self._usable(peer, is_direct) is None:
                await self._dial(target, peer, from_listener=False)
        except Unreachable:
            self.counters.connections_failed += 1
            raise

    def _check_capacity(self, peer: PeerId, path: Path) -> None:
        """May one more connection to this peer exist? Raises Unreachable."""
        if peer == self.peer:
            raise Unreachable("a peer that uses this node's own identity")
        if self._connection_count >= self._limits.max_connections:
            raise Unreachable(f"{self._connection_count} connections are open, as many as are allowed")
        if is_relayed(path) and self._relayed_count >= self._limits.max_relayed_connections:
            raise Unreachable(f"{self._relayed_count} relayed connections are open, as many as are allowed")
        if path.bulk:
            if not self._bulk.has_room(peer):
                raise Unreachable("as many connections for bulk to this peer are open as are allowed")
        elif len(self._connections.get(peer, ())) >= self._limits.max_connections_per_peer:
            raise Unreachable(f"{self._limits.max_connections_per_peer} connections to this peer are open")

    def _add(self, secured: Secured, path: Path, *, initiator: bool) -> Connection:
        connection = Connection(
            secured.channel,
            secured.peer,
            initiator=initiator,
            limits=self._limits,
            counters=self.counters,
            budget=self._budget,
            accept=self.handlers.admit,
            path=replace(path, bulk=secured.bulk),
        )
        self._connection_count += 1
        if secured.bulk:
            self._bulk.add(connection)
            self._connection_tasks.start_soon(self._run_bulk, connection)
            return connection
        group = self._connections.setdefault(connection.peer, [])
        only_relayed = bool(group) and all(is_relayed(c.path) for c in group)
        group.append(connection)
        self._relayed_count += is_relayed(path)
        self._connection_tasks.start_soon(self._run_connection, connection)
        if len(group) == 1:
            self._publish(PeerConnected(connection.peer))
        elif only_relayed and not is_relayed(path):
            self._publish(PeerDirect(connection.peer))
        return connection

    async def _run_bulk(self, connection: Connection) -> None:
        try:
            await self._bulk.run(connection)
        finally:
            self._bulk.remove(connection)
            self._connection_count -= 1

    async def _run_connection(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            self._remove(connection)

    def _remove(self, connection: Connection) -> None:
        group = self._connections.get(connection.peer)
        if group is None or connection not in group:
            return
        group.remove(connection)
        self._connection_count -= 1
        self._relayed_count -= is_relayed(connection.path)
        if not group:
            del self._connections[connection.peer]
            self.observed.pop(connection.peer, None)  # a NAT maps the next connection anew
            self._publish(PeerDisconnected(connection.peer, connection.broken or "closed"))

    def _publish(self, event: HostEvent) -> None:
        for callback in tuple(self._subscribers):
            callback(event)
