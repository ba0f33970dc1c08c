"""One stream of a connection: ordered bytes both ways, each way closed by itself, with its own window.

Writing is cancel-safe by construction: bytes are given to the connection between two checkpoints, in whole
frames, and the socket is written by nobody who can be cancelled. What a cancellation can do is leave a
*message* half sent; then the stream (and only it) is reset, because the reader could not know.

Nothing here has a timer. A reader that does not read makes its writer wait, for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from node.p2p import yamux
from node.p2p.errors import StreamBroken
from node.p2p.noise import MAX_RECORD_BYTES
from node.p2p.transport import Path
from protocol.ids import PeerId

#: The largest body that shares one noise record with its header.
MAX_BODY_BYTES: Final = MAX_RECORD_BYTES - yamux.HEADER_BYTES

#: A writer that never has to wait must still let other tasks run; a scheduler pass costs as much as a
#: small frame, so it is taken once in so many.
_SENDS_PER_CHECKPOINT: Final = 16


@dataclass(slots=True)
class Counters:
    """What happened on a host since its start, for metrics."""

    bytes_received: int = 0
    bytes_sent: int = 0
    connections_dialled: int = 0
    connections_accepted: int = 0
    connections_refused: int = 0
    connections_failed: int = 0
    streams_opened: int = 0
    streams_accepted: int = 0
    streams_refused: int = 0
    streams_reset: int = 0
    handler_failures: int = 0


@dataclass(slots=True)
class UnreadBudget:
    """Bytes received and not yet read, over all streams of a host."""

    limit: int
    used: int = 0


class Mux(Protocol):
    """What a stream needs of its connection. All of it returns at once except `wait_room`."""

    peer: PeerId
    budget: UnreadBudget
    counters: Counters
    path: Path

    @property
    def remote(self) -> str: ...
    def post(self, frame: bytes) -> None: ...
    def has_room(self, size: int) -> bool: ...
    async def wait_room(self, size: int) -> None: ...
    def want_update(self, stream: Stream) -> None: ...
    def acknowledged(self, stream: Stream) -> None: ...
    def forget(self, stream: Stream) -> None: ...
    def linger(self, stream: Stream) -> None: ...


class Stream:
    """A half-closable byte stream to `peer`, agreed to speak `protocol`.

    One task may read and any number may write: what one `send_all` is given stays in one piece.
    """

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_broken",
        "_buffer",
        "_consumed",
        "_counted",
        "_eof",
        "_finished",
        "_lock",
        "_mux",
        "_parked",
        "_reading",
        "_retired",
        "_send_window",
        "_sends",
        "_target_window",
        "_window",
        "_window_limit",
        "_writers",
        "adopted",
        "awaiting_ack",
        "peer",
        "protocol",
        "stream_id",
        "update_wanted",
    )

    def __init__(self, mux: Mux, stream_id: int, target_window: int) -> None:
        self._mux = mux
        self.stream_id: Final = stream_id
        self.peer: Final[PeerId] = mux.peer
        self.protocol: str = ""
        self._send_window = yamux.INITIAL_WINDOW_BYTES
        self._window = yamux.INITIAL_WINDOW_BYTES  # what the peer may still send
        self._window_limit = yamux.INITIAL_WINDOW_BYTES
        self._target_window = max(target_window, yamux.INITIAL_WINDOW_BYTES)
        self._consumed = 0  # read since the last window update
        self._buffer = bytearray()
        self._counted = True  # what is unread counts against the host's budget
        self._eof = False  # the peer will send no more
        self._finished = False  # we will send no more
        self._retired = False  # we read no more
        self._broken: str | None = None
        self._lock = trio.Lock()
        self._writers = trio.lowlevel.ParkingLot()
        self._parked = trio.lowlevel.ParkingLot()
        self._reading = False
        self._arrived: Callable[[], None] | None = None
        self._sends = 0
        self.update_wanted = False
        self.awaiting_ack = False
        self.adopted = False  # it outlives its handler: whoever adopted it ends it

    def __repr__(self) -> str:
        state = "broken" if self._broken else "open"
        return f"<Stream {self.stream_id} {self.protocol or '(unnamed)'} to {self.peer}, {state}>"

    # --- for users ------------------------------------------------------------------------------

    @property
    def remote(self) -> str:
        """Where the other end's bytes come from ('host:port' of a socket), for displays and identify."""
        return self._mux.remote

    @property
    def path(self) -> Path:
        """How its connection reaches the peer."""
        return self._mux.path

    @property
    def broken(self) -> str | None:
        """Why it is gone, for who neither reads nor writes just now; None while it is not."""
        return self._broken

    def send_nowait(self, data: bytes) -> bool:
        """Send all of it now, or (False) nothing, because it would have to wait or does not fit one frame.

        Raises StreamBroken.
        """
        self._check_sendable()
        size = len(data)
        if (
            size > self._send_window
            or size > MAX_BODY_BYTES
            or self._lock.locked()
            or not self._mux.has_room(size)
        ):
            return False
        self._send_window -= size
        self._mux.post(yamux.HEADER.pack(0, yamux.DATA, 0, self.stream_id, size) + data)
        return True

    async def send_all(self, data: bytes) -> None:
        """Send it, waiting for the peer's window as long as need be.

        Cancelled before the first byte left, nothing happened; later, the stream is reset, as the peer
        would otherwise wait for the rest. Raises StreamBroken.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not data:
            self._check_sendable()
            return
        if self.send_nowait(data):
            self._sends += 1
            if self._sends >= _SENDS_PER_CHECKPOINT:
                self._sends = 0
                await trio.lowlevel.cancel_shielded_checkpoint()
            return
        async with self._lock:
            await self._send_slowly(memoryview(data))

    async def _send_slowly(self, view: memoryview) -> None:
        size, at = len(view), 0
        try:
            while True:
                self._check_sendable()
                if not self._mux.has_room(size):
                    await self._mux.wait_room(size)
                elif self._send_window <= 0:
                    await self._writers.park()
                else:
                    take = min(self._send_window, MAX_BODY_BYTES, size - at)
                    self._send_window -= take
                    head = yamux.HEADER.pack(0, yamux.DATA, 0, self.stream_id, take)
                    self._mux.post(head + view[at : at + take])
                    at += take
                    if at == size:
                        return
                    await trio.lowlevel.checkpoint()
        finally:
            if 0 < at < size:
                self._break("a message was cut off", tell=True)

    def send_some_nowait(self, data: bytes | memoryview) -> int:
        """Send as many leading bytes as there is room for now, and say how many (a pipe's way of writing).

        Only for a stream with one writer. Raises StreamBroken.
        """
        self._check_sendable()
        take = min(len(data), self._send_window, MAX_BODY_BYTES)
        if take <= 0 or not self._mux.has_room(take):
            return 0
        self._send_window -= take
        self._mux.post(yamux.HEADER.pack(0, yamux.DATA, 0, self.stream_id, take) + bytes(data[:take]))
        return take

    async def wait_sendable(self) -> None:
        """Return when `send_some_nowait` may take more. Raises StreamBroken."""
        while True:
            self._check_sendable()
            if self._send_window <= 0:
                await self._writers.park()
            elif not self._mux.has_room(MAX_BODY_BYTES):
                await self._mux.wait_room(MAX_BODY_BYTES)
            else:
                return

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """1 to `max_bytes` bytes, or b"" when the peer has finished.

        What arrived before the stream broke is delivered first; then it raises StreamBroken.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        buffer = self._buffer
        while not buffer:
            if self._eof:
                return b""
            if self._broken is not None or self._retired:
                raise StreamBroken(self._broken or "the stream was closed here")
            if self._reading:
                raise trio.BusyResourceError("another task reads this stream")
            self._reading = True
            try:
                await self._parked.park()
            finally:
                self._reading = False
        return self._take(max_bytes)

    def _take(self, max_bytes: int) -> bytes:
        buffer = self._buffer
        if len(buffer) <= max_bytes:
            data = bytes(buffer)
            buffer.clear()
        else:
            data = bytes(buffer[:max_bytes])
            del buffer[:max_bytes]
        self._read(len(data))
        return data

    def receive_nowait(self, max_bytes: int = 65536) -> bytes:
        """What is here already, up to `max_bytes`; b"" says nothing but that."""
        return self._take(max_bytes)

    def on_arrival(self, arrived: Callable[[], None] | None) -> None:
        """Have this called when bytes come, from the connection's own task: what it takes costs no other task's
        waking, what it leaves is there for `receive_some`. It may neither wait nor raise. None: no more.
        """
        self._arrived = arrived

    def unreceive(self, data: bytes) -> None:
        """Put bytes back that `receive_some` returned and whose place in time is later."""
        self._buffer[:0] = data
        if self._counted:
            self._mux.budget.used += len(data)
            self._consumed -= len(data)

    async def send_eof(self) -> None:
        """Say that we send no more; reading goes on. Idempotent. Raises StreamBroken."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._finished:
            return
        async with self._lock:  # behind a message that is being sent
            self._check_sendable()
            self._finish()

    async def aclose(self) -> None:
        """Close it in order: what was sent arrives. Unread bytes are dropped, later ones refused.

        Idempotent; does nothing to a stream that is broken already. Cancelled, it resets the stream.
        """
        try:
            await self.send_eof()
        except StreamBroken:
            return
        except BaseException:
            self.reset()
            raise
        if self._retired or self._broken is not None:
            return
        self._retired = True
        self._settle()
        self._buffer.clear()
        self._parked.unpark_all()
        if self._eof:
            self._mux.forget(self)
        else:
            self._mux.linger(self)

    def reset(self) -> None:
        """End it at once, both ways; the peer's reads and writes fail. Idempotent."""
        self._break("the stream was reset here", tell=True)

    # --- for the connection ---------------------------------------------------------------------

    def send_opening(self, data: bytes) -> None:
        """The first bytes of a stream that we open (at most one frame): they never wait."""
        self._send_window -= len(data)
        self._mux.post(yamux.HEADER.pack(0, yamux.DATA, 0, self.stream_id, len(data)) + data)

    def on_frame(self, flags: int) -> None:
        """ACK, FIN, RST of a frame for this stream (after its body)."""
        if flags & yamux.ACK:
            self._mux.acknowledged(self)
        if flags & yamux.RST:
            self._mux.counters.streams_reset += 1
            self._break("the peer reset the stream", tell=False)
        elif flags & yamux.FIN and not self._eof:
            self._eof = True
            self._parked.unpark_all()
            if self._finished:
                self._settle()
                self._mux.forget(self)

    def on_window(self, delta: int) -> None:
        """The peer allows this much more."""
        # The peer's memory is the peer's business (py-libp2p grants far too much); ours stays bounded by
        # the connection's send queue.
        self._send_window += delta
        self._writers.unpark_all()

    def on_body_announced(self, size: int) -> None:
        """A DATA frame of this size begins."""
        if size > self._window:
            raise yamux.YamuxViolation("a peer that sends beyond its window")
        if size and self._eof:
            raise yamux.YamuxViolation("data after the end of a stream")
        self._window -= size

    def on_body(self, piece: bytes) -> None:
        """A piece of its body."""
        if self._broken is not None:
            return
        if self._retired:
            # We closed, and the peer goes on sending: tell it, or it would wait for a window for ever.
            self._break("the stream was closed here", tell=True)
            return
        budget = self._mux.budget
        budget.used += len(piece)
        self._buffer += piece
        if budget.used > budget.limit:
            self._break("too much unread data on this host", tell=True)
        elif self._arrived is not None:
            self._arrived()
        if self._buffer or self._broken is not None:
            self._parked.unpark_all()

    def on_lost(self, reason: str) -> None:
        """The connection is gone."""
        self._break(reason, tell=False)

    def take_update(self) -> int:
        """How much more the peer may send; 0 if nothing is to be said."""
        self.update_wanted = False
        if self._eof or self._broken is not None or self._retired:
            return 0
        delta, self._consumed = self._consumed, 0
        if self._window_limit < self._target_window:
            # It has moved a good part of a first window: this is bulk, let more of it be in flight.
            delta += self._target_window - self._window_limit
            self._window_limit = self._target_window
        self._window += delta
        return delta

    # --- inside ---------------------------------------------------------------------------------

    def _check_sendable(self) -> None:
        if self._broken is not None:
            raise StreamBroken(self._broken)
        if self._finished:
            raise StreamBroken("the stream was finished here")

    def _read(self, size: int) -> None:
        if not self._counted:
            return
        self._mux.budget.used -= size
        self._consumed += size
        if self._consumed * 2 >= self._window_limit and not self.update_wanted and not self._eof:
            self.update_wanted = True
            self._mux.want_update(self)

    def _finish(self) -> None:
        self._finished = True
        self._mux.post(yamux.frame(yamux.DATA, yamux.FIN, self.stream_id, 0))
        if self._eof:
            self._settle()
            self._mux.forget(self)

    def _settle(self) -> None:
        """No more can come: what is unread (a window at most) is now the owner's alone."""
        if self._counted:
            self._counted = False
            self._mux.budget.used -= len(self._buffer)

    def _break(self, reason: str, *, tell: bool) -> None:
        if self._broken is not None or (self._eof and self._finished):
            return  # nothing left to break: what is unread stays readable
        self._broken = reason
        self._settle()
        if tell:
            self._buffer.clear()
            self._mux.counters.streams_reset += 1
            self._mux.post(yamux.frame(yamux.WINDOW, yamux.RST, self.stream_id, 0))
        self._writers.unpark_all()
        self._parked.unpark_all()
        self._mux.forget(self)
