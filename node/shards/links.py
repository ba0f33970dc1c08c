"""Links of the ring: to each peer that we feed one that we opened, from each that feeds us one that it opened.

Nobody who sends ever waits. What the network does not take at once lies in the link's outbox, as messages (an
activation there is the one in the log, not a copy) and up to a bound; a peer that leaves more lying has
failed us as if it were dead. A process that is killed ends its links at once, because the kernel closes its
sockets; one that is frozen is found out by the machine's pings.

A link to a peer behind a NAT begins at a relay, if there is no other way, and moves once there is a direct one,
in the midst of its sessions: who opened it finishes the old stream between two messages and goes on with a new
one; each side reads the old one to its end first, so that nothing is lost or turned round.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec
import structlog
import trio

from node.p2p import Host, PeerDirect, Stream, StreamBroken, Unreachable
from node.p2p.host_events import HostEvent
from node.rpc import PeerUnreachable
from node.shards.link import Link, Watched
from node.streams import MessageStream
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.limits import MIB
from protocol.ring import (
    FROM_STAGE,
    RING_PROTOCOL,
    TO_STAGE,
    FromStage,
    RingOpen,
    RingPing,
    ToStage,
)

#: What one link may leave unsent. A replacement is fed the whole log of a session at once: 8192 tokens of a
#: 70B model in 16 bit are 128 MiB.
MAX_OUTBOX_BYTES: Final = 256 * MIB

#: Links that we open. A stage feeds one peer per session, and slots are few.
MAX_DOWNSTREAMS: Final = 64

#: Links that others open.
MAX_UPSTREAMS: Final = 64

#: Messages that have come in part, on all of those together: a feed of usual size (2 MiB) on each.
MAX_PARTIAL_BYTES: Final = 128 * MIB

#: Connections that are made in advance at a time.
MAX_WARMING: Final = 16

#: An upstream that said nothing for this long (pings count) makes room for another one.
IDLE_UPSTREAM_S: Final = 30.0

#: One over which no session runs makes room after this long, whatever it says.
UNUSED_UPSTREAM_S: Final = 5.0

#: A link that we opened and on which nothing was sent for this long is used by no session: those ping it
#: several times a second. Until then the next session finds it open.
IDLE_DOWNSTREAM_S: Final = 60.0

#: To dial, agree on keys and open a stream. Whoever waits for a token has another stage to ask.
OPEN_S: Final = 5.0

#: A link on which we do not read just now is looked at so often whether it is still there.
_BROKEN_LOOK_S: Final = 0.2

#: Bytes of a message that is not complete yet are as good as a ping after this long: on a slow line a large
#: one takes seconds, and pings wait behind it.
_PROGRESS_S: Final = 0.2

#: A link that moves has this long to bring what is still on its old way, and ends sooner if nothing comes there
#: for so long: then it has not moved, but was lost by the other side.
_MOVE_S: Final = 10.0
_STILL_S: Final = 1.5
_LATE_S: Final = 0.25

_log = structlog.get_logger("ring")

Reach: TypeAlias = Callable[[PeerId], Awaitable[None]]
"""Have a connection to the peer, wherever it is. Raises PeerUnreachable."""


class LinkUser(msgspec.Struct, frozen=True):
    """What is told of links, in order, from the task where it happens. None of it may block or raise."""

    received: Callable[[PeerId, ToStage | FromStage], None]
    downstream_lost: Callable[[PeerId, str], None]
    upstream_lost: Callable[[PeerId], None]
    has_room: Callable[[], bool]
    """May more rows be taken in now?"""
    is_used: Callable[[PeerId], bool]
    """Do sessions run over the link that this peer opened?"""
    is_needed: Callable[[PeerId], bool]
    """Do sessions run over the link that we opened to this peer?"""


@dataclass(slots=True)
class LinkCounters:
    """For metrics and tests."""

    opened: int = 0
    accepted: int = 0
    refused: int = 0
    lost: int = 0
    moved: int = 0
    """From a relay to a direct way."""
    overflowed: int = 0
    malformed: int = 0
    dropped: int = 0


class RingLinks:
    """All links of this node. `nursery`: where they live."""

    def __init__(
        self, host: Host, nursery: trio.Nursery, user: LinkUser, *, reach: Reach | None = None
    ) -> None:
        self.counters: Final = LinkCounters()
        self._host = host
        self._nursery = nursery
        self._user = user
        self._reach = reach
        self._down: dict[PeerId, Link] = {}
        self._up: dict[PeerId, Link] = {}
        self._room = trio.lowlevel.ParkingLot()
        self._warming: set[PeerId] = set()
        self._closed = False
        host.handle(RING_PROTOCOL, self._serve, bulk=True)
        self._deaf = host.subscribe(self._on_host)
        nursery.start_soon(self._end_idle)

    @property
    def downstreams(self) -> tuple[PeerId, ...]:
        """Whom we feed."""
        return tuple(self._down)

    @property
    def upstreams(self) -> tuple[PeerId, ...]:
        """Who feeds us."""
        return tuple(self._up)

    def send_to_stage(self, peer: PeerId, message: ToStage) -> None:
        """Down the ring. A `RingOpen` opens the link if there is none; all else without one is dropped, as its
        loss was told.
        """
        link = self._down.get(peer)
        if link is None:
            if not isinstance(message, RingOpen) or self._closed:
                self.counters.dropped += 1
                return
            link = self._open(peer, message)
            if link is None:
                self._nursery.start_soon(self._tell_refused, peer)
                return
        elif isinstance(message, RingOpen):
            self._warm(message)
        if link.put(message) > MAX_OUTBOX_BYTES:
            self._overflow(link, self._down)

    def send_from_stage(self, peer: PeerId, message: FromStage) -> None:
        """Back to who feeds us, on its own link; dropped without one."""
        link = self._up.get(peer)
        if link is None:
            self.counters.dropped += 1
        elif link.put(message) > MAX_OUTBOX_BYTES:
            self._overflow(link, self._up)

    def drop(self, peer: PeerId, reason: str) -> None:
        """End the link by which we feed this peer. Nothing is told of it."""
        link = self._down.pop(peer, None)
        if link is not None:
            link.end(reason)

    def note_room(self) -> None:
        """More rows may be taken in."""
        self._room.unpark_all()

    def close(self) -> None:
        """End them all; nothing is told any more."""
        self._closed = True
        self._deaf()
        for link in (*self._down.values(), *self._up.values()):
            link.end("this node is shutting down")

    async def _end_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_DOWNSTREAM_S / 4)
            for peer, link in tuple(self._down.items()):
                if trio.current_time() - link.used_at >= IDLE_DOWNSTREAM_S:
                    self.drop(peer, "not used")

    # --- out ------------------------------------------------------------------------------------------

    def _open(self, peer: PeerId, message: RingOpen) -> Link | None:
        if len(self._down) >= MAX_DOWNSTREAMS:
            idle = [link for link in self._down.values() if not self._user.is_needed(link.peer)]
            if not idle:
                return None
            self.drop(min(idle, key=lambda link: link.used_at).peer, "another peer needs its place")
        link = self._down[peer] = Link(peer, TO_STAGE)
        stages = message.chain.stages
        holders = [h for stage in stages for h in (stage.holder, *stage.spares) if h.peer == peer]
        addresses = tuple(dict.fromkeys(address for holder in holders for address in holder.addresses))
        self._nursery.start_soon(self._feed, link, addresses)
        self._warm(message)
        return link

    def _warm(self, message: RingOpen) -> None:
        """The next in line gets a connection now: when it is needed, somebody waits for a token."""
        stages = message.chain.stages
        if message.index < len(stages):
            for spare in stages[message.index].spares[:1]:
                if spare.peer not in self._down:
                    self._nursery.start_soon(self._warm_one, PeerId(spare.peer), spare.addresses)

    async def _warm_one(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        if peer in self._warming or len(self._warming) >= MAX_WARMING:
            return
        self._warming.add(peer)
        try:
            await self._host.warm_bulk(peer, RING_PROTOCOL, addresses)
        finally:
            self._warming.discard(peer)

    async def _tell_refused(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        if not self._closed and peer not in self._down:
            self._user.downstream_lost(peer, f"{MAX_DOWNSTREAMS} links are open, as many as are allowed")

    async def _feed(self, link: Link, addresses: tuple[str, ...]) -> None:
        """The life of a link that we opened."""
        reason = "closed by the peer"
        with link.scope:
            try:
                with trio.fail_after(OPEN_S):
                    link.stream = await self._dial(link.peer, addresses)
                self.counters.opened += 1
                self._consider_move(link)  # the direct way may have come first
                await self._run(link, MessageStream(link.stream, TO_STAGE, FROM_STAGE), None)
            except trio.TooSlowError:
                reason = f"no answer within {OPEN_S:g} s"
            except (Unreachable, StreamBroken) as error:
                reason = error.reason
            except ProtocolError as error:
                self.counters.malformed += 1
                reason = f"broke the protocol: {error.detail}"
        link.end(reason)
        if self._down.get(link.peer) is link and not self._closed:
            del self._down[link.peer]
            self._lost(link)
            self._user.downstream_lost(link.peer, link.reason)

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> Stream:
        try:
            return await self._host.open_bulk_stream(peer, RING_PROTOCOL, addresses)
        except Unreachable as error:
            if self._reach is None or peer in self._host.connected():
                raise
            try:
                await self._reach(peer)
            except PeerUnreachable:
                raise error from None
            return await self._host.open_bulk_stream(peer, RING_PROTOCOL)

    # --- moving ---------------------------------------------------------------------------------------

    def _on_host(self, event: HostEvent) -> None:
        if isinstance(event, PeerDirect) and (link := self._down.get(event.peer)) is not None:
            self._consider_move(link)

    def _consider_move(self, link: Link) -> None:
        direct = any(path.relay is None for path in self._host.paths(link.peer))
        if direct and link.is_relayed and not self._closed:
            self._nursery.start_soon(self._move, link)

    async def _move(self, link: Link) -> None:
        """From a relay to the direct way, if that serves; else it stays as it is."""
        try:
            with trio.fail_after(OPEN_S):
                stream = await self._host.open_bulk_stream(link.peer, RING_PROTOCOL)
        except (Unreachable, trio.TooSlowError) as error:
            _log.debug("link stays relayed", peer=link.peer, reason=str(error))
            return
        if stream.path.relay is None and self._down.get(link.peer) is link and link.is_relayed:
            self.counters.moved += 1
            link.move(stream)
        else:
            stream.reset()

    # --- in -------------------------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        """The life of a link that a peer opened."""
        if self._closed or not self._make_room(stream.peer):
            self.counters.refused += 1
            stream.reset()
            return
        link = Link(stream.peer, FROM_STAGE, stream)
        watched = link.watched = Watched(stream, lambda: self._progress(link))
        before = self._up.get(stream.peer)
        self.counters.accepted += 1
        if before is not None:
            await self._succeed(before, stream)
            before = self._up.get(stream.peer)
        self._up[stream.peer] = link
        if before is not None and before.moving:
            before.finish()
        elif before is not None:  # whoever lost it knows; the sessions on it go on
            before.end("replaced by a newer link")
        with link.scope:
            try:
                await self._run(link, MessageStream(watched, FROM_STAGE, TO_STAGE), watched)
            except StreamBroken as error:
                link.reason = link.reason or error.reason
            except ProtocolError as error:
                self.counters.malformed += 1
                link.reason = f"broke the protocol: {error.detail}"
        link.end("closed by the peer")
        if self._up.get(link.peer) is link and not link.moving:
            del self._up[link.peer]
            self._lost(link)
            if not self._closed:
                self._user.upstream_lost(link.peer)

    async def _succeed(self, before: Link, stream: Stream) -> None:
        """If a link has moved here, wait until what is on its old way has come. Until then answers go there,
        too, since they are read there.
        """
        if not before.is_relayed or stream.path.relay is not None or before.watched is None:
            return
        before.moving = True
        began = trio.current_time()
        while not before.emptied.is_set():
            until = min(max(before.watched.heard_at, began) + _STILL_S, began + _MOVE_S)
            with trio.move_on_at(until):
                await before.emptied.wait()
            late_s = trio.current_time() - until
            if late_s > _LATE_S:
                began = trio.current_time()  # this process was stopped: what came meanwhile is not read yet
            elif late_s >= 0:
                break
        before.moving = before.emptied.is_set()

    def _progress(self, link: Link) -> None:
        if sum(each.partial for each in self._up.values()) > MAX_PARTIAL_BYTES:
            slowest = min(self._up.values(), key=lambda each: (not each.partial, each.whole_at))
            slowest.end("too much that came in part lies here, and its was begun first")
        now = trio.current_time()
        if now - link.heard_at >= _PROGRESS_S and self._up.get(link.peer) is link:
            link.heard_at = now
            self._user.received(link.peer, RingPing(0))

    def _make_room(self, peer: PeerId) -> bool:
        if peer in self._up or len(self._up) < MAX_UPSTREAMS:
            return True
        now = trio.current_time()
        idle = min(self._up.values(), key=lambda link: link.heard_at)
        if now - idle.heard_at < IDLE_UPSTREAM_S:
            unused = [link for link in self._up.values() if not self._user.is_used(link.peer)]
            idle = min(unused, key=lambda link: link.since, default=idle)
            if idle not in unused or now - idle.since < UNUSED_UPSTREAM_S:
                return False
        idle.end("another peer needs its place")
        del self._up[idle.peer]
        self._user.upstream_lost(idle.peer)
        return True

    # --- both -----------------------------------------------------------------------------------------

    async def _run(
        self,
        link: Link,
        messages: MessageStream[ToStage, FromStage] | MessageStream[FromStage, ToStage],
        watched: Watched | None,
    ) -> None:
        """Both directions of an open link, until it ends. Raises StreamBroken, ProtocolError.

        `watched`: rows come this way; they are read only as fast as they can be computed.
        """
        failed: list[StreamBroken | ProtocolError] = []
        stream = link.stream
        assert stream is not None  # noqa: S101 - it is open

        async def write() -> None:
            try:
                await link.write()
            except StreamBroken as error:
                failed.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            try:
                await self._read(link, stream, messages, watched)
                while link.stream is not stream and link.stream is not None:  # it has moved
                    stream = link.stream
                    await self._read(link, stream, MessageStream(stream, TO_STAGE, FROM_STAGE), None)
                link.emptied.set()
                if link.moving:  # they wait for our last word on the old way: see `_serve`
                    nursery.cancel_scope.deadline = trio.current_time() + _MOVE_S
                else:
                    nursery.cancel_scope.cancel()
            except (StreamBroken, ProtocolError) as error:  # here: the nursery would wrap it in a group
                failed.append(error)
                nursery.cancel_scope.cancel()
        if failed:
            raise failed[0]

    async def _read(
        self,
        link: Link,
        stream: Stream,
        messages: MessageStream[ToStage, FromStage] | MessageStream[FromStage, ToStage],
        watched: Watched | None,
    ) -> None:
        """To the stream's end. While this task waits, messages are taken where they come, by the connection's
        own: a token wakes one task less. What is left lying wakes this one.
        """
        bugs: list[Exception] = []
        waits = False

        def arrived() -> None:
            if not waits or bugs or (watched is not None and not self._user.has_room()):
                return
            try:
                message = messages.take_nowait((watched or stream).receive_nowait())
                while message is not None and not link.scope.cancel_called:
                    self._take(link, watched, message)
                    message = messages.take_nowait(b"")
            except Exception as error:  # noqa: BLE001 - a bug of ours ends this link's task, not the connection's
                bugs.append(error)
                stream.reset()

        stream.on_arrival(arrived)
        try:
            while True:
                waits = True
                message = await messages.receive()
                waits = False
                if message is None:
                    return
                self._take(link, watched, message)
                if watched is not None and not isinstance(message, RingPing):
                    await self._wait_for_room(link)
        except StreamBroken:
            if bugs:
                raise bugs[0] from None
            raise
        finally:
            stream.on_arrival(None)

    def _take(self, link: Link, watched: Watched | None, message: ToStage | FromStage) -> None:
        link.heard_at = link.whole_at = trio.current_time()
        self._user.received(link.peer, message)
        if watched is not None:
            watched.partial = 0

    async def _wait_for_room(self, link: Link) -> None:
        while not self._user.has_room():
            if link.stream is not None and link.stream.broken is not None:
                raise StreamBroken(link.stream.broken)
            with trio.move_on_after(_BROKEN_LOOK_S):
                await self._room.park()

    def _overflow(self, link: Link, group: dict[PeerId, Link]) -> None:
        """It does not take what it is sent. Its task tells, so that nobody is told while he is sending."""
        self.counters.overflowed += 1
        if group.get(link.peer) is link:
            link.end(f"{MAX_OUTBOX_BYTES // MIB} MiB lie unsent")

    def _lost(self, link: Link) -> None:
        self.counters.lost += 1
        _log.debug("link lost", peer=link.peer, reason=link.reason)
