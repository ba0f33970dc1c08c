"""Many streams over one secured connection: yamux, written so that none of its known failures can arise.

How the usual failures are excluded:

* The reader never waits for a write. What it must answer (pings, window updates, acknowledgements) goes to
  queues; so two sides that both write in bulk and open streams can not freeze each other.
* Queues are bounded: data by `send_queue_bytes` (writers wait), window updates by one per stream, answers
  that the peer provokes by `max_queued_replies` (beyond: disconnect), new streams by what `accept` admits.
* Only one task (`_write_loop`) ever waits for the socket, and no user can cancel it. A frame that finds the
  connection idle is sealed and given to the kernel at once by the task that has it: a small message costs
  no task switch.
* Windows are enforced: a peer that sends more than it was allowed is disconnected.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

import trio

from node.p2p import yamux
from node.p2p.errors import ChannelBroken, Unreachable
from node.p2p.limits import HostLimits
from node.p2p.noise import MAX_RECORD_BYTES, Channel
from node.p2p.stream import Counters, Stream, UnreadBudget
from node.p2p.transport import Path
from protocol.ids import PeerId

#: Messages up to this size (tokens, pings, calls) need not queue up with bulk for room in the send queue;
#: they have another queue's length for themselves.
_SMALL_BYTES: Final = 4 * 1024


class Connection:
    """Streams to one peer. `run` does the work; `accept` is asked for each stream that the peer opens."""

    def __init__(
        self,
        channel: Channel,
        peer: PeerId,
        *,
        initiator: bool,
        limits: HostLimits,
        counters: Counters,
        budget: UnreadBudget,
        accept: Callable[[Stream], bool],
        path: Path = Path(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self.peer = peer
        self.path = path
        self.initiator: Final = initiator
        self.budget = budget
        self.counters = counters
        self.streams: dict[int, Stream] = {}
        self.broken: str | None = None
        self.departing = False  # the peer takes no new streams
        self.heard_at = trio.current_time()  # when bytes last came
        self._channel = channel
        self._limits = limits
        self._accept = accept
        self._parser = yamux.FrameParser(self)
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._unacknowledged = 0
        self._openers = trio.lowlevel.ParkingLot()
        self._lingering: OrderedDict[int, Stream] = OrderedDict()
        self._body: Stream | None = None  # whose DATA frame is being received
        self._body_flags = 0
        self._replies: deque[bytes] = deque()
        self._updates: dict[int, Stream] = {}
        self._frames: deque[bytes] = deque()
        self._queued_bytes = 0
        self._flushing = False  # the channel holds bytes that the kernel did not take
        self._writer = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._scope: Final = trio.CancelScope()

    @property
    def remote(self) -> str:
        return self._channel.remote

    # --- for the host ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it ends, for whatever reason; `broken` says which."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    await self._read_loop()
                    nursery.cancel_scope.cancel()
        finally:
            self.abort("the connection was closed here")

    async def open_stream(self, opening: bytes = b"") -> Stream:
        """A new stream, with its first bytes (up to one frame) in the same record. Raises Unreachable."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        while self._unacknowledged >= yamux.ACK_BACKLOG:
            await self._openers.park()
            self._check_open()
        stream_id = self._next_id
        if stream_id > yamux.MAX_STREAM_ID:
            raise Unreachable("this connection has used up its stream numbers; connect anew")
        self._next_id += 2
        stream = Stream(self, stream_id, self._limits.stream_window_bytes)
        stream.awaiting_ack = True
        self._unacknowledged += 1
        self.streams[stream_id] = stream
        self.counters.streams_opened += 1
        self.post(yamux.frame(yamux.WINDOW, yamux.SYN, stream_id, 0))
        if opening:
            stream.send_opening(opening)
        self._check_open()
        return stream

    def abort(self, reason: str) -> None:
        """End it at once, whatever state the peer is in. Its streams break. Idempotent."""
        if self.broken is not None:
            return
        self.broken = reason
        for stream in list(self.streams.values()):
            stream.on_lost(reason)
        self.streams.clear()
        self._lingering.clear()
        self._frames.clear()
        self._replies.clear()
        self._updates.clear()
        self._channel.close()
        self._scope.cancel()
        for lot in (self._room, self._openers, self._writer):
            lot.unpark_all()

    async def drain(self) -> None:
        """Say goodbye and wait until all queued frames have left."""
        if self.broken is None:
            self.post(yamux.frame(yamux.GO_AWAY, 0, 0, yamux.GOODBYE))
        while self.broken is None and (self._flushing or self._frames):
            await self._room.park()

    def _check_open(self) -> None:
        if self.broken is not None:
            raise Unreachable(self.broken)
        if self.departing:
            raise Unreachable("the peer is shutting down")

    # --- for streams ----------------------------------------------------------------------------

    def post(self, frame: bytes) -> None:
        """Send this frame after all posted before; now if nothing waits."""
        if self.broken is not None:
            return
        if self._flushing or self._frames or self._replies or self._updates:
            self._frames.append(frame)
            self._queued_bytes += len(frame)
            self._writer.unpark()
        else:
            self._send_now(frame)

    def has_room(self, size: int) -> bool:
        if size <= _SMALL_BYTES:
            return self._queued_bytes < 2 * self._limits.send_queue_bytes
        return self._queued_bytes < self._limits.send_queue_bytes

    async def wait_room(self, size: int) -> None:
        if self.broken is None and not self.has_room(size):
            await self._room.park()

    def want_update(self, stream: Stream) -> None:
        if self.broken is not None:
            return
        if self._flushing or self._frames or self._replies:
            self._updates[stream.stream_id] = stream
            self._writer.unpark()
        elif delta := stream.take_update():
            self._send_now(yamux.frame(yamux.WINDOW, 0, stream.stream_id, delta))

    def acknowledged(self, stream: Stream) -> None:
        if stream.awaiting_ack:
            stream.awaiting_ack = False
            self._unacknowledged -= 1
            self._openers.unpark()

    def forget(self, stream: Stream) -> None:
        self.streams.pop(stream.stream_id, None)
        self._lingering.pop(stream.stream_id, None)
        self._updates.pop(stream.stream_id, None)
        self.acknowledged(stream)

    def linger(self, stream: Stream) -> None:
        self._lingering[stream.stream_id] = stream
        if len(self._lingering) > self._limits.max_closing_streams:
            _, oldest = self._lingering.popitem(last=False)
            oldest.reset()

    # --- writing --------------------------------------------------------------------------------

    def _send_now(self, record: bytes) -> None:
        self.counters.bytes_sent += len(record)
        try:
            if self._channel.send_nowait(record):
                return
        except ChannelBroken as error:
            self.abort(str(error))
            return
        self._flushing = True
        self._writer.unpark()

    def _reply(self, frame: bytes) -> None:
        """Answer something that the peer sent: it can make us do this as often as it likes."""
        if self.broken is not None:
            return
        if not (self._flushing or self._frames or self._replies or self._updates):
            self._send_now(frame)
            return
        if len(self._replies) >= self._limits.max_queued_replies:
            raise yamux.YamuxViolation("a peer that floods us and does not read")
        self._replies.append(frame)
        self._writer.unpark()

    async def _write_loop(self) -> None:
        try:
            while self.broken is None:
                if self._flushing:
                    await self._channel.flush()
                    self._flushing = False
                record = self._next_record()
                if record:
                    self._send_now(record)
                    if self.has_room(MAX_RECORD_BYTES):
                        self._room.unpark_all()
                    if not self._flushing:
                        await trio.lowlevel.checkpoint()
                else:
                    self._room.unpark_all()
                    await self._writer.park()
        except ChannelBroken as error:
            self.abort(str(error))

    def _next_record(self) -> bytes:
        """Waiting frames, as many as fit: answers first, as they are small and someone waits for them."""
        record = bytearray()
        while self._replies and len(record) + yamux.HEADER_BYTES <= MAX_RECORD_BYTES:
            record += self._replies.popleft()
        while self._updates and len(record) + yamux.HEADER_BYTES <= MAX_RECORD_BYTES:
            stream_id, stream = next(iter(self._updates.items()))
            del self._updates[stream_id]
            if delta := stream.take_update():
                record += yamux.frame(yamux.WINDOW, 0, stream_id, delta)
        while self._frames and len(record) + len(self._frames[0]) <= MAX_RECORD_BYTES:
            frame = self._frames.popleft()
            self._queued_bytes -= len(frame)
            record += frame
        return bytes(record)

    # --- reading --------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        try:
            while records := await self._channel.receive():
                self.heard_at = trio.current_time()
                for record in records:
                    if self.broken is not None:
                        return
                    self.counters.bytes_received += len(record)
                    self._parser.feed_untrusted(record)
            reason = "the peer closed the connection"
        except ChannelBroken as error:
            reason = str(error)
        except yamux.YamuxViolation as error:
            reason = f"the peer broke the protocol: {error}"
            self.post(yamux.frame(yamux.GO_AWAY, 0, 0, yamux.PROTOCOL_FAULT))
        self.abort(reason)

    def on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """The parser found a header (`yamux.Sink`)."""
        if kind == yamux.DATA:
            stream = self._stream(stream_id, flags)
            if not length:
                if stream is not None:
                    stream.on_frame(flags)
                return
            self._body, self._body_flags = stream, flags
            if stream is not None:
                stream.on_body_announced(length)
        elif kind == yamux.WINDOW:
            stream = self._stream(stream_id, flags)
            if stream is not None:
                if length:
                    stream.on_window(length)
                stream.on_frame(flags)
        elif kind == yamux.PING:
            if flags & yamux.SYN:
                self._reply(yamux.frame(yamux.PING, yamux.ACK, 0, length))
        else:
            self.departing = True
            self._openers.unpark_all()

    def on_body(self, piece: bytes, *, last: bool) -> None:
        """The parser found a piece of a body (`yamux.Sink`)."""
        stream = self._body
        if stream is not None:
            stream.on_body(piece)
            if last:
                stream.on_frame(self._body_flags)

    def _stream(self, stream_id: int, flags: int) -> Stream | None:
        """Whose frame this is. None: a stream that has ended here; what is still under way is dropped."""
        if self.broken is not None:
            return None
        stream = self.streams.get(stream_id)
        if not flags & yamux.SYN:
            if stream is None and stream_id == 0:
                raise yamux.YamuxViolation("stream number 0")
            return stream
        if stream is not None or stream_id == 0 or stream_id % 2 != self._peer_parity:
            raise yamux.YamuxViolation(f"a new stream with the number {stream_id}")
        stream = Stream(self, stream_id, self._limits.stream_window_bytes)
        self.streams[stream_id] = stream
        if not self._accept(stream):
            del self.streams[stream_id]
            self.counters.streams_refused += 1
            self._reply(yamux.frame(yamux.WINDOW, yamux.RST, stream_id, 0))
            return None
        self.counters.streams_accepted += 1
        self._reply(yamux.frame(yamux.WINDOW, yamux.ACK, stream_id, 0))
        return stream
