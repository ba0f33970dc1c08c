"""The peers this node knows: one RPC link each, kept alive, measured, and declared dead in time.

Who opens the link. Whoever dials opens the stream and says hello; the answer carries the other's hello, and
the link is up on both sides after that one round trip. When both sides dial at once, each sees the other's
stream while its own is open or under way; then the stream opened by the peer with the smaller id stays, and the
other's hello is refused ("busy") or its link is replaced. Both sides decide alike without a message.

Who is dead. Any byte on a peer's connections shows that it lives; a ping each second makes sure that there are
some. A peer that is silent for `dead_after_ns` is disconnected, which breaks its streams at once: a frozen
process or a cut cable looks the same. If this node itself was frozen, it gives everybody a new chance first.

Which links stay. Addresses given to `keep` are dialled for ever, links to peers that are `pin`ned or that have
other streams open stay as they are; all others were opened on demand (`reach`) or by strangers, and end when
nobody uses them (node/link_watch.py).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import structlog
import trio

from node.keep import Keeper
from node.link_watch import LinkWatch, finish_link
from node.p2p import Host, HostEvent, PeerDirect, Stream, StreamBroken, Unreachable, parse_peer_address
from node.p2p.errors import AddressInvalid
from node.p2p.host import plain_errors
from node.p2p.rates import RateLimit
from node.peer_types import Known, PeerChanged, PeerDown, PeerEvent, PeersConfig, PeerState, PeerUp, PeerView
from node.reach import Reacher
from node.rpc import CallFailed, Method, Methods, PeerUnreachable, Refused, RpcCounters, RpcLink
from protocol.adverts import ACCEPTED, HELLO, METHOD_BYE, METHOD_HELLO, METHOD_STAY, Accepted, Hello
from protocol.codec import Codec, Message
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant
from protocol.rpc import RPC_PROTOCOL

__all__ = [
    "PeerChanged",
    "PeerDown",
    "PeerEvent",
    "PeerState",
    "PeerUp",
    "PeerView",
    "Peers",
    "PeersConfig",
    "open_peers",
]

#: How often a peer may say something new of itself. Addresses and roles change a few times an hour, in bursts
#: while a node finds out how it can be reached; each word is looked at by all parts of this node.
HELLOS_PER_MINUTE: Final = 60

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

_log = structlog.get_logger("peers")


@asynccontextmanager
async def open_peers(
    host: Host,
    *,
    hello: Hello,
    config: PeersConfig = PeersConfig(),  # noqa: B008 - frozen: one shared default is safe
    dice: Dice,
) -> AsyncGenerator[Peers]:
    """The peer table over a host. On leaving, all links are closed; the host stays as it is."""
    with plain_errors():
        async with trio.open_nursery() as nursery:
            peers = Peers(host, hello, config, dice, nursery)
            nursery.start_soon(peers.watch.run)
            try:
                yield peers
            finally:
                peers.close()
                nursery.cancel_scope.cancel()


class Peers:
    """Made by `open_peers`."""

    def __init__(
        self, host: Host, hello: Hello, config: PeersConfig, dice: Dice, nursery: trio.Nursery
    ) -> None:
        self.counters: Final = RpcCounters()
        self._host = host
        self._hello = hello
        self._config = config
        self._dice = dice
        self._nursery = nursery
        self._methods = Methods()
        self._known: dict[PeerId, Known] = {}
        self._pins: dict[PeerId, int] = {}
        self._opening: dict[PeerId, RpcLink] = {}  # those of them that said hello
        self._dialling: dict[PeerId, int] = {}  # our own links under way
        self._links: set[RpcLink] = set()
        self._subscribers: list[Callable[[PeerEvent], None]] = []
        self._listeners: list[Callable[[PeerId, int], None]] = []
        self._closed = False
        self._hellos = RateLimit[PeerId](HELLOS_PER_MINUTE, per_s=60.0)
        self.watch: Final = LinkWatch(host, self._known, self._needed, config)
        self._reacher = Reacher(
            self._open_link, self._known.__contains__, self._host_connected, nursery, config
        )
        self._keeper = Keeper(self._known, self._open_link, self.pin, nursery, config=config, dice=dice)
        self.serve(METHOD_HELLO, HELLO, self._greet_again)
        self.serve_notice(METHOD_BYE, ACCEPTED, self._take_bye)
        self.serve_notice(METHOD_STAY, ACCEPTED, self._take_stay)
        host.handle(RPC_PROTOCOL, self._serve_inbound)
        host.subscribe(self._on_host_event)

    # --- serving --------------------------------------------------------------------------------

    def serve(self, method: str, request: Codec[Q], handler: Callable[[PeerId, Q], Awaitable[Message]]) -> None:
        """Answer calls of `method` from any peer. `handler` returns the answer or raises `rpc.Refused`.

        It is cancelled when the caller gives up or its deadline passes. Another exception is logged and
        counted, and the caller gets "failed". Raises ValueError if the method is served already.
        """
        self._methods.serve(method, request, handler)

    def serve_notice(
        self,
        method: str,
        codec: Codec[Q],
        handler: Callable[[PeerId, Q], None],
        *,
        admit: Callable[[PeerId], bool] | None = None,
    ) -> None:
        """Take notices of `method` from any peer; those that `admit` refuses are dropped undecoded.

        Raises ValueError if it is served already.
        """
        self._methods.serve_notice(method, codec, handler, admit=admit)

    def subscribe(self, callback: Callable[[PeerEvent], None]) -> Callable[[], None]:
        """Call `callback` at each event, in order; it must return at once and not raise.

        Callbacks, because then no event is ever queued, dropped or late. Returns what ends it.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def subscribe_round_trips(self, callback: Callable[[PeerId, int], None]) -> Callable[[], None]:
        """Call `callback(peer, rtt_ns)` at each round trip measured on a link. Returns what ends it."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def introduce(self, hello: Hello) -> None:
        """Say this of ourselves from now on; peers with a link are told at once."""
        if hello == self._hello:
            return
        self._hello = hello
        for known in self._known.values():
            self._nursery.start_soon(self._say_hello_again, known.link)

    @property
    def introduction(self) -> Hello:
        """What we say of ourselves."""
        return self._hello

    # --- staying connected ----------------------------------------------------------------------

    async def reach(self, peer: PeerId, addresses: Iterable[str] = ()) -> None:
        """Return once there is a link to the peer: the one that is up, or a new one on demand.

        The addresses (full, with /p2p/ID) are tried in order, except those that failed a moment ago; an
        existing connection comes first. However many callers, one dial runs. The link ends when it is not used
        for `PeersConfig.idle_ns`, unless somebody pins the peer. Raises PeerUnreachable.
        """
        if peer == self._host.peer:
            raise PeerUnreachable("that is this node itself")
        await self._reacher.reach(peer, addresses)

    def forgive(self, address: str) -> None:
        """There is news of this address: even if it failed a moment ago, it may be dialled on demand."""
        self._reacher.forgive(address)

    def pin(self, peer: PeerId) -> Callable[[], None]:
        """Somebody here needs the connection to this peer: it is not closed for want of use.

        Returns what ends it.
        """
        self._pins[peer] = self._pins.get(peer, 0) + 1
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._pins[peer] -= 1
                if not self._pins[peer]:
                    del self._pins[peer]

        return release

    def keep(self, address: str) -> None:
        """Dial `address` (with /p2p/ID) and stay connected, with backoff. Idempotent.

        Raises AddressInvalid.
        """
        _, peer = parse_peer_address(address)
        if peer == self._host.peer:
            raise AddressInvalid(f"{address!r} is this node itself")
        self._keeper.keep(address, peer)

    def forget(self, address: str) -> None:
        """Dial it no more. A link that is up stays as long as it is used. Idempotent."""
        self._keeper.forget(address)

    # --- calling --------------------------------------------------------------------------------

    async def call(
        self, peer: PeerId, method: str, message: Message, reply: Codec[R], *, deadline_ns: int
    ) -> R:
        """Call a peer and wait for its answer for `deadline_ns` at most (a duration).

        Cancelled or out of time, the peer's handler is cancelled, too. Raises PeerUnreachable (no link, or
        lost meanwhile) and CallFailed (refused, failed there, malformed, out of time).
        """
        known = self._known.get(peer)
        if known is None:
            await trio.lowlevel.checkpoint()
            raise PeerUnreachable("not connected")
        return await known.link.call(method, message, reply, deadline_ns=deadline_ns)

    def notify(self, peer: PeerId, method: str, message: Message) -> None:
        """Tell a peer, if it can be told at once; else dropped and counted.

        A peer that tells us something while our hello is under way can be answered on that link already.
        """
        known = self._known.get(peer)
        link = self._opening.get(peer) if known is None else known.link
        if link is None:
            self.counters.notices_dropped += 1
        else:
            link.notify(method, message)

    # --- looking --------------------------------------------------------------------------------

    def up(self) -> tuple[PeerId, ...]:
        """Peers whose link is up, in the order in which they came."""
        return tuple(self._known)

    def hello(self, peer: PeerId) -> Hello | None:
        """What the peer said of itself; None while there is no link."""
        known = self._known.get(peer)
        return known.hello if known else None

    def rtt_ns(self, peer: PeerId) -> int | None:
        """Smoothed round-trip time on the link; None while unknown."""
        known = self._known.get(peer)
        return known.link.rtt_ns if known else None

    def min_rtt_ns(self, peer: PeerId) -> int | None:
        """The shortest round trip seen on the link: the path itself, without queues."""
        known = self._known.get(peer)
        return known.link.min_rtt_ns if known else None

    def table(self) -> tuple[PeerView, ...]:
        """All peers: those with a link, then kept addresses without one."""
        addresses = {kept.peer: kept.address for kept in self._keeper.kept()}
        rows = [
            PeerView(
                peer=peer,
                name=known.hello.name,
                roles=known.hello.roles,
                address=addresses.get(peer) or self._host.remote_of(peer) or "",
                state="connected",
                rtt_ns=known.link.rtt_ns,
                last_seen=self._last_seen(peer),
            )
            for peer, known in self._known.items()
        ]
        rows += [
            PeerView(kept.peer, "", (), kept.address, kept.state, None, kept.last_seen, kept.detail)
            for kept in self._keeper.kept()
            if kept.peer not in self._known
        ]
        return tuple(rows)

    def _last_seen(self, peer: PeerId) -> Instant | None:
        heard = self._host.heard_at(peer)
        return None if heard is None else Instant(round(heard * SECOND_NS))

    # --- links ----------------------------------------------------------------------------------

    async def _serve_inbound(self, stream: Stream) -> None:
        """A peer opened a link."""
        if self._closed:
            return

        async def greet(peer: PeerId, hello: Hello) -> Hello:
            known = self._known.get(peer)
            if known is not None and known.link is link:
                self._admit_news(peer)
            if not self._adopt(link, hello, ours=False):
                raise Refused("busy", f"another link to {peer} is in use")
            await trio.lowlevel.checkpoint_if_cancelled()
            return self._hello

        greeting = (METHOD_HELLO, Method(HELLO, greet))
        link = RpcLink(stream, self._methods, self.counters, greeting=greeting, measured=self._measured)
        await self._run_link(link)

    async def _open_link(self, peer: PeerId, address: str | None) -> RpcLink:
        """Connect (unless `address` is None: we are connected), open a stream, say hello.

        Raises Unreachable, CallFailed, PeerUnreachable.
        """
        self._dialling[peer] = self._dialling.get(peer, 0) + 1
        link: RpcLink | None = None
        opened = False
        try:
            if address is not None:
                await self._host.connect(address)
            stream = await self._host.open_stream(peer, RPC_PROTOCOL)
            link = RpcLink(stream, self._methods, self.counters, measured=self._measured)
            self._opening[peer] = link
            self._nursery.start_soon(self._run_link, link)
            hello = await link.call(METHOD_HELLO, self._hello, HELLO, deadline_ns=self._config.connect_ns)
            opened = self._adopt(link, hello, ours=True)
            if not opened:
                raise PeerUnreachable("another link is in use")
            return link
        finally:
            self._dialling[peer] -= 1
            if not self._dialling[peer]:
                del self._dialling[peer]
            if link is not None and self._opening.get(peer) is link:
                del self._opening[peer]
            if link is not None and not opened:
                link.close("hello failed")

    async def _run_link(self, link: RpcLink) -> None:
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)
            orderly = self._drop(link)
        if link.violated:
            _log.warning("disconnected", peer=link.peer, reason=link.reason)
            await self._host.disconnect(link.peer, link.reason)
        elif orderly and not self.watch.protected(link.peer) and not self._host.streams_of(link.peer):
            await self._host.disconnect(link.peer, "not used")

    def _adopt(self, link: RpcLink, hello: Hello, *, ours: bool) -> bool:
        """Make this the peer's link, unless another one has the better right. See the module's head."""
        peer = link.peer
        if self._closed or link.ended.is_set():
            return False
        known = self._known.get(peer)
        if known is not None and known.link is link:
            self._renew(link, hello)
            return True
        if ours:
            if known is not None and not known.ours and peer < self._host.peer:
                return False
        elif self._host.peer < peer and (peer in self._dialling or (known is not None and known.ours)):
            return False
        if known is None:
            self._make_room(peer, ours=ours)
        link.opened = True
        now = trio.current_time()
        self._known[peer] = Known(link, hello, ours, lively=True, judged_from=now, pinged_at=now)
        self._reacher.note_up(peer)
        if known is not None:
            self._replace(known.link)
        else:
            _log.log(self._level(peer), "peer up", peer=peer, name=hello.name, roles=hello.roles)
            self._publish(PeerUp(peer, hello))
        link.ping()
        return True

    def _replace(self, link: RpcLink) -> None:
        """End a link that has a successor; not at once if it merely moves from a relayed connection."""
        relayed = {path.relay is not None for path in self._host.paths(link.peer)}
        if link.busy and len(relayed) == 2:
            self._nursery.start_soon(finish_link, link)
        else:
            link.close("replaced by a newer link")

    def _on_host_event(self, event: HostEvent) -> None:
        if isinstance(event, PeerDirect) and not self._closed:
            known = self._known.get(event.peer)
            if known is not None and known.ours:
                self._nursery.start_soon(self._move_link, event.peer)

    async def _move_link(self, peer: PeerId) -> None:
        """From a relayed connection, which will be closed, to the direct one."""
        try:
            with trio.fail_after(self._config.connect_ns / SECOND_NS):
                await self._open_link(peer, None)
        except (Unreachable, CallFailed, PeerUnreachable, StreamBroken, trio.TooSlowError) as error:
            _log.debug("link stays relayed", peer=peer, reason=str(error))

    def _drop(self, link: RpcLink) -> bool:
        """The link is gone. Whether that was agreed."""
        known = self._known.get(link.peer)
        if known is None or known.link is not link:
            return False
        del self._known[link.peer]
        level = self._level(link.peer)
        _log.log(level, "peer down", peer=link.peer, name=known.hello.name, reason=link.reason)
        self._publish(PeerDown(link.peer, link.reason, orderly=known.leaving))
        return known.leaving

    def _make_room(self, peer: PeerId, *, ours: bool) -> None:
        """Bound the links that nobody needs. Raises Refused if there is no room for this one."""
        if self._needed(peer):
            return
        try:
            leaver = self.watch.find_room(ours=ours)
        except BlockingIOError:
            raise Refused("busy", "as many links are in use as are allowed") from None
        if leaver is not None:
            self._known[leaver].part(trio.current_time())

    def _level(self, peer: PeerId) -> int:
        """Links that come and go as lookups need them are nobody's news."""
        return logging.INFO if self._needed(peer) else logging.DEBUG

    def _needed(self, peer: PeerId) -> bool:
        return peer in self._pins

    def _host_connected(self, peer: PeerId) -> bool:
        return self._host.heard_at(peer) is not None

    def _measured(self, peer: PeerId, rtt_ns: int) -> None:
        for listener in tuple(self._listeners):
            listener(peer, rtt_ns)

    async def _say_hello_again(self, link: RpcLink) -> None:
        try:
            hello = await link.call(METHOD_HELLO, self._hello, HELLO, deadline_ns=self._config.connect_ns)
        except (CallFailed, PeerUnreachable) as error:
            _log.debug("hello not heard", peer=link.peer, reason=str(error))
        else:
            self._renew(link, hello)

    async def _greet_again(self, peer: PeerId, hello: Hello) -> Hello:
        """A peer whose link we opened says something new of itself."""
        self._admit_news(peer)
        known = self._known.get(peer)
        if known is not None:
            self._renew(known.link, hello)
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._hello

    def _admit_news(self, peer: PeerId) -> None:
        """Raises Refused if this peer says too often who it is."""
        if not self._hellos.take(peer, trio.current_time()):
            raise Refused("busy", "too much that is new at a time")

    def _take_bye(self, peer: PeerId, _: Accepted) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.leaving = True
            known.link.close("the peer needs the link no more")

    def _take_stay(self, peer: PeerId, _: Accepted) -> None:
        """The peer needs the link: that this came is use of it (`RpcLink.used_at`)."""

    def _renew(self, link: RpcLink, hello: Hello) -> None:
        known = self._known.get(link.peer)
        if known is not None and known.link is link and known.hello != hello:
            known.hello = hello
            self._publish(PeerChanged(link.peer, hello))

    def _publish(self, event: PeerEvent) -> None:
        for callback in tuple(self._subscribers):
            callback(event)

    def close(self) -> None:
        """For open_peers."""
        self._closed = True
        for link in tuple(self._links):
            link.close("this node is shutting down")
