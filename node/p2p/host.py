"""A peer on the network: listens, dials, and gives each stream to whoever handles its protocol.

py-libp2p's own Swarm and BasicHost are not used: see docs/network.md for what they do and what stands here
instead. The pieces below them are libp2p's: TCP, multistream-select, noise, yamux, Ed25519 peer ids.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

import structlog
import trio

from node.identity import Identity
from node.p2p.addresses import Address, addresses_of, parse_address, parse_peer_address
from node.p2p.errors import ChannelBroken, ListenFailed, StreamBroken, Unreachable
from node.p2p.limits import HostLimits
from node.p2p.multistream import MAX_LINE_BYTES, NegotiationFailed, NotSupported, Proposer, Responder, line
from node.p2p.muxer import Connection
from node.p2p.noise import HandshakeFailed, Secured
from node.p2p.stream import Counters, Stream, UnreadBudget
from node.p2p.upgrade import Upgrader
from protocol.codec import excerpt
from protocol.errors import ProtocolError
from protocol.ids import PeerId

Handler: TypeAlias = Callable[[Stream], Awaitable[None]]

_log = structlog.get_logger("p2p")

#: What the kernel keeps of connections that we have not accepted yet; Linux caps it at its own somaxconn.
_LISTEN_BACKLOG: Final = 512


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection to this peer is up."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to this peer is gone."""

    peer: PeerId
    reason: str


HostEvent: TypeAlias = PeerConnected | PeerDisconnected


@asynccontextmanager
async def open_host(
    identity: Identity,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    *,
    limits: HostLimits = HostLimits(),  # noqa: B008 - frozen: one shared default is safe
) -> AsyncGenerator[Host]:
    """A host that listens. On leaving, listeners and connections are closed and all its tasks have ended.

    Raises ListenFailed (address in use, ...) or AddressInvalid.
    """
    listeners = await _open_listeners(listen)
    addresses = tuple(
        text
        for listener in listeners
        for text in addresses_of(cast("tuple[str, int]", listener.socket.getsockname()[:2]), identity.peer)
    )
    with plain_errors():
        async with trio.open_nursery() as connections:
            host = Host(identity, addresses, limits, connections)
            try:
                async with trio.open_nursery() as handlers:
                    host.handler_tasks = handlers
                    if listeners:  # a host may only dial
                        handlers.start_soon(trio.serve_listeners, host.accept, listeners)
                    try:
                        yield host
                    finally:
                        host.closing = True
                        handlers.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    for listener in listeners:
                        await listener.aclose()
                    await host.shut_down()
                connections.cancel_scope.cancel()


@contextmanager
def plain_errors() -> Generator[None]:
    """Let the single error that left a nursery out of its groups, so that callers can catch it by type."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        if len(leaves) != 1:
            raise
        leaf = leaves[0]
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
        addresses: tuple[str, ...],
        limits: HostLimits,
        connections: trio.Nursery,
    ) -> None:
        self.peer: Final = identity.peer
        self.addresses: Final = addresses
        self.counters: Final = Counters()
        self._limits = limits
        self.closing = False
        self._connection_tasks = connections
        self.handler_tasks = connections  # their own nursery, as soon as it is open
        self._upgrader = Upgrader(identity.seed, limits)
        self._budget = UnreadBudget(limits.max_unread_bytes)
        self._handlers: dict[str, Handler] = {}
        self._connections: dict[PeerId, list[Connection]] = {}
        self._connection_count = 0
        self._dials: dict[PeerId, trio.Lock] = {}
        self._handshakes = trio.CapacityLimiter(limits.max_handshakes)
        self._inbound: dict[PeerId, int] = {}
        self._inbound_count = 0
        self._subscribers: list[Callable[[HostEvent], None]] = []

    # --- for users ------------------------------------------------------------------------------

    def handle(self, protocol: str, handler: Handler) -> None:
        """Give each inbound stream of this protocol to `handler`, in a task of its own.

        An exception of the handler is logged, counted, and resets that stream only. When it returns, the
        stream is closed. Raises ValueError if the name is too long or taken.
        """
        line(protocol)
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is handled already")
        self._handlers[protocol] = handler

    def subscribe(self, callback: Callable[[HostEvent], None]) -> Callable[[], None]:
        """Call `callback` at each event, in order, from the task where it happens; it must not raise.

        Callbacks, because then no event is ever queued, dropped or late. Returns what ends it.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a connection, in the order in which they came."""
        return tuple(self._connections)

    def remote_of(self, peer: PeerId) -> str | None:
        """'host:port' of the connection in use, for displays."""
        connections = self._connections.get(peer)
        return connections[0].remote if connections else None

    def heard_at(self, peer: PeerId) -> float | None:
        """`trio.current_time()` when bytes last came from it, on whatever stream; None if not connected."""
        return max((c.heard_at for c in self._connections.get(peer, ())), default=None)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What is handled here, in the order in which it was registered."""
        return tuple(self._handlers)

    def streams_of(self, peer: PeerId) -> int:
        """Open streams on all connections to it, whoever opened them."""
        return sum(len(c.streams) for c in self._connections.get(peer, ()))

    @property
    def inbound_streams(self) -> int:
        """Streams with a handler now."""
        return self._inbound_count

    @property
    def unread_bytes(self) -> int:
        """Received and not yet read, over all streams."""
        return self._budget.used

    async def connect(self, address: str) -> PeerId:
        """Connect to the peer at `/ip4/…/tcp/…/p2p/ID` (or ip6, dns, dns4, dns6). No-op if connected.

        No retries, no memory of failures, no wait: what bounds it is the caller's cancel scope and
        `HostLimits.handshake_s`. Raises Unreachable.
        """
        target, peer = parse_peer_address(address)
        if peer == self.peer:
            raise Unreachable("that is this node itself")
        lock = self._dials.setdefault(peer, trio.Lock())
        try:
            async with lock:  # two callers, one connection
                if self._usable(peer) is None:
                    await self._dial(target, peer)
        finally:
            if not lock.locked():
                self._dials.pop(peer, None)
        return peer

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """A new stream to a connected peer, after it agreed to speak `protocol`. Raises Unreachable."""
        connection = self._usable(peer)
        if connection is None:
            raise Unreachable("not connected")
        proposer = Proposer(protocol)
        stream = await connection.open_stream(proposer.opening)
        agreed = False
        try:
            with trio.fail_after(self._limits.negotiation_s):
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
            raise Unreachable(f"no answer within {self._limits.negotiation_s:g} s") from None
        finally:
            if not agreed:
                stream.reset()
        stream.protocol = protocol
        if rest := proposer.rest():
            stream.unreceive(rest)
        return stream

    async def disconnect(self, peer: PeerId, reason: str = "disconnected here") -> None:
        """Drop all connections to it at once, also when it is frozen. Its streams fail."""
        for connection in list(self._connections.get(peer, ())):
            connection.abort(reason)
            self._remove(connection)
        await trio.lowlevel.checkpoint()

    # --- for open_host --------------------------------------------------------------------------

    async def accept(self, stream: trio.SocketStream) -> None:
        """One inbound connection. The outermost task boundary for what strangers send."""
        try:
            async with self._handshakes:
                with trio.fail_after(self._limits.handshake_s):
                    secured = await self._upgrader.accept(stream, self._check_capacity)
        except (HandshakeFailed, ChannelBroken, OSError, trio.TooSlowError) as error:
            self.counters.connections_refused += 1
            _log.debug("inbound connection refused", reason=excerpt(str(error)))
            return
        except Unreachable as error:
            self.counters.connections_refused += 1
            _log.info("inbound connection refused", reason=error.reason)
            return
        self.counters.connections_accepted += 1
        self._add(secured, initiator=False)

    async def shut_down(self) -> None:
        """Let the last frames leave, then close everything. Takes `shutdown_s` at most."""
        connections = [c for group in self._connections.values() for c in group]
        with trio.move_on_after(self._limits.shutdown_s):
            async with trio.open_nursery() as nursery:
                for connection in connections:
                    nursery.start_soon(connection.drain)
        for connection in connections:
            connection.abort("this node is shutting down")

    # --- connections ----------------------------------------------------------------------------

    def _usable(self, peer: PeerId) -> Connection | None:
        """The connection heard of last: one whose other end is gone without a word (a cut cable, a restarted
        machine) may stand beside the one that replaced it.
        """
        usable = [c for c in self._connections.get(peer, ()) if c.broken is None and not c.departing]
        return max(usable, key=lambda c: c.heard_at, default=None)

    async def _dial(self, target: Address, peer: PeerId) -> None:
        if self.closing:
            raise Unreachable("this node is shutting down")
        self._check_capacity(peer)
        try:
            with trio.fail_after(self._limits.handshake_s):
                stream = await trio.open_tcp_stream(target.host, target.port)
                secured = await self._upgrader.dial(stream, peer)
        except OSError as error:
            self.counters.connections_failed += 1
            raise Unreachable(_explain(error)) from error
        except (HandshakeFailed, ChannelBroken) as error:
            self.counters.connections_failed += 1
            raise Unreachable(str(error)) from error
        except trio.TooSlowError:
            self.counters.connections_failed += 1
            raise Unreachable(f"no answer within {self._limits.handshake_s:g} s") from None
        self.counters.connections_dialled += 1
        self._add(secured, initiator=True)

    def _check_capacity(self, peer: PeerId) -> None:
        """May one more connection to this peer exist? Raises Unreachable."""
        if peer == self.peer:
            raise Unreachable("a peer that uses this node's own identity")
        if self._connection_count >= self._limits.max_connections:
            raise Unreachable(f"{self._connection_count} connections are open, as many as are allowed")
        if len(self._connections.get(peer, ())) >= self._limits.max_connections_per_peer:
            raise Unreachable(f"{self._limits.max_connections_per_peer} connections to this peer are open")

    def _add(self, secured: Secured, *, initiator: bool) -> None:
        connection = Connection(
            secured.channel,
            secured.peer,
            initiator=initiator,
            limits=self._limits,
            counters=self.counters,
            budget=self._budget,
            accept=self._admit,
        )
        group = self._connections.setdefault(connection.peer, [])
        group.append(connection)
        self._connection_count += 1
        self._connection_tasks.start_soon(self._run_connection, connection)
        if len(group) == 1:
            self._publish(PeerConnected(connection.peer))

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
        if not group:
            del self._connections[connection.peer]
            self._publish(PeerDisconnected(connection.peer, connection.broken or "closed"))

    def _publish(self, event: HostEvent) -> None:
        for callback in tuple(self._subscribers):
            callback(event)

    # --- inbound streams ------------------------------------------------------------------------

    def _admit(self, stream: Stream) -> bool:
        """Start a handler for a stream that the peer opens, unless there are too many."""
        peer = stream.peer
        running = self._inbound.get(peer, 0)
        if (
            self.closing
            or running >= self._limits.max_inbound_streams_per_peer
            or self._inbound_count >= self._limits.max_inbound_streams
        ):
            return False
        self._inbound[peer] = running + 1
        self._inbound_count += 1
        self.handler_tasks.start_soon(self._run_handler, stream)
        return True

    async def _run_handler(self, stream: Stream) -> None:
        in_order = False
        try:
            in_order = await self._handle(stream)
        finally:
            if not in_order:  # else the peer may still be reading what it was sent
                stream.reset()
            self._inbound_count -= 1
            self._inbound[stream.peer] -= 1
            if not self._inbound[stream.peer]:
                del self._inbound[stream.peer]

    async def _handle(self, stream: Stream) -> bool:
        """The wall round handlers. Did it end in order, with the stream closed?"""
        try:
            with trio.fail_after(self._limits.negotiation_s):
                handler = await self._agree(stream)
            if handler is not None:
                await handler(stream)
                await stream.aclose()
                return True
        except (StreamBroken, trio.TooSlowError, NegotiationFailed) as error:
            _log.debug("stream ended", peer=stream.peer, protocol=stream.protocol, reason=excerpt(str(error)))
        except Exception as error:  # noqa: BLE001 - the outermost boundary of a handler's task
            if _only_remote(error):
                _log.debug("stream ended", peer=stream.peer, protocol=stream.protocol, reason=repr(error))
                return False
            self.counters.handler_failures += 1
            _log.exception("a stream handler failed", peer=stream.peer, protocol=stream.protocol)
        return False

    async def _agree(self, stream: Stream) -> Handler | None:
        responder = Responder(self._handlers.__contains__)
        while responder.agreed is None:
            data = await stream.receive_some(MAX_LINE_BYTES)
            if not data:
                return None
            answer = responder.feed_untrusted(data)
            if answer:
                await stream.send_all(answer)
        if rest := responder.rest():
            stream.unreceive(rest)
        stream.protocol = responder.agreed
        return self._handlers[responder.agreed]


def _leaves(error: BaseException) -> Generator[BaseException]:
    """The errors inside the groups that nurseries make."""
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _only_remote(error: BaseException) -> bool:
    """Is this nothing but what remotes cause?"""
    return all(isinstance(leaf, (StreamBroken, Unreachable, ProtocolError)) for leaf in _leaves(error))


def _explain(error: OSError) -> str:
    """The system's words; trio reports several attempts as a group that caused a plain OSError."""
    causes = [leaf for leaf in _leaves(error.__cause__ or error) if isinstance(leaf, OSError)]
    first = causes[0] if causes else error
    if first.errno is not None and first.errno > 0:
        return os.strerror(first.errno).lower()  # trio repeats the address in `strerror`
    return (first.strerror or str(first) or type(first).__name__).lower()


async def _open_listeners(listen: Sequence[str]) -> list[trio.SocketListener]:
    listeners: list[trio.SocketListener] = []
    try:
        for text in listen:
            address = parse_address(text)
            try:
                listeners += await trio.open_tcp_listeners(
                    address.port, host=address.host, backlog=_LISTEN_BACKLOG
                )
            except OSError as error:
                raise ListenFailed(_advice(text, error)) from error
    except BaseException:
        for listener in listeners:
            await listener.aclose()
        raise
    return listeners


def _advice(text: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{text}: another program listens there; choose another port, or port 0 for any"
    if error.errno == errno.EACCES:
        return f"{text}: this user may not listen there; choose a port above 1023"
    return f"{text}: {(error.strerror or str(error)).lower()}"
