"""Messages over a stream, and a stream in memory with the same interface for tests and local loops."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, Protocol, TypeVar

import trio

from node.p2p.errors import StreamBroken
from node.p2p.yamux import INITIAL_WINDOW_BYTES
from protocol.codec import Codec, FrameBuffer, Message
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId

Out = TypeVar("Out", bound=Message)
In = TypeVar("In", bound=Message)

#: Bytes asked of the stream at once: also the most that decoded messages in waiting were made from.
_READ_BYTES: Final = 64 * 1024


class ByteStream(Protocol):
    """What `node.p2p.Stream` offers, and whatever else carries bytes to a known peer."""

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, authenticated."""
        ...

    def send_nowait(self, data: bytes) -> bool:
        """All of it now, or False and nothing. Raises StreamBroken."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Waits for the peer's window, without limit. A cancelled part of it resets the stream."""
        ...

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """b"" at the end. Raises StreamBroken."""
        ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def reset(self) -> None: ...


class MessageStream(Generic[Out, In]):
    """Sends messages of one union and receives those of another, length-prefixed.

    Any number of tasks may send; one may receive.
    """

    def __init__(self, stream: ByteStream, outgoing: Codec[Out], incoming: Codec[In]) -> None:
        self._stream = stream
        self._outgoing = outgoing
        self._buffer = FrameBuffer(incoming)
        self._ready: deque[In] = deque()
        self._fault: ProtocolError | None = None

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def send(self, message: Out) -> None:
        """Raises StreamBroken; ValueError if the message exceeds its own limit (nothing is sent then)."""
        await self._stream.send_all(self._outgoing.encode_frame(message))

    def send_nowait(self, message: Out) -> bool:
        """Send it now, or (False) not at all because it would have to wait. Raises as `send`."""
        return self._stream.send_nowait(self._outgoing.encode_frame(message))

    async def send_many(self, messages: Iterable[Out]) -> None:
        """As `send` for each, in as few frames of the connection as possible. All are encoded first."""
        await self._stream.send_all(b"".join(map(self._outgoing.encode_frame, messages)))

    async def receive(self) -> In | None:
        """The next message; None when the peer has finished in order.

        Raises ProtocolError on bytes that are no message (the stream is reset then) and StreamBroken.
        Cancelling loses nothing.
        """
        if self._ready:
            await trio.lowlevel.checkpoint_if_cancelled()
            return self._ready.popleft()
        while self._fault is None:
            try:
                chunk = await self._stream.receive_some(_READ_BYTES)
            except StreamBroken:
                if self._fault is not None:
                    break
                raise
            if not chunk:
                if not len(self._buffer):
                    return None
                self._fault = ProtocolError(Fault.MALFORMED, "the stream ended inside a message")
                break
            self._decode(chunk)
            if self._ready:
                return self._ready.popleft()
        self._stream.reset()
        raise self._fault

    def take_nowait(self, chunk: bytes) -> In | None:
        """For who reads the stream where bytes come (`Stream.on_arrival`): `chunk` was read from it. Returned:
        the next message, or None; call it with b"" for further ones. Bytes that are no message reset the
        stream, and `receive` raises then.
        """
        if chunk:
            self._decode(chunk)
        if self._ready:
            return self._ready.popleft()
        if self._fault is not None:
            self._stream.reset()
        return None

    def _decode(self, chunk: bytes) -> None:
        try:
            for message in self._buffer.feed_untrusted(chunk):
                self._ready.append(message)
        except ProtocolError as error:
            self._fault = error  # raised once the good messages before it are taken

    def __aiter__(self) -> MessageStream[Out, In]:
        return self

    async def __anext__(self) -> In:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    async def send_eof(self) -> None:
        """Say that we send no more. Raises StreamBroken."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close in order: what was sent arrives."""
        await self._stream.aclose()

    def reset(self) -> None:
        """End it at once; the peer's reads and writes fail."""
        self._stream.reset()


class _Pipe:
    """One direction: bytes under way, at most a window of them."""

    def __init__(self, window: int) -> None:
        self.window: Final = window
        self.buffer = bytearray()
        self.finished = False  # by its writer
        self.broken: str | None = None
        self.refused = False  # its reader has closed
        self.moved: Final = trio.lowlevel.ParkingLot()

    def check_sendable(self) -> None:
        if self.broken is not None:
            raise StreamBroken(self.broken)
        if self.finished:
            raise StreamBroken("the stream was finished here")

    def put(self, data: bytes | memoryview) -> None:
        if self.refused and data:
            self.break_("the peer closed the stream")
            self.check_sendable()
        self.buffer += data
        self.moved.unpark_all()

    def take(self, size: int) -> bytes:
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        self.moved.unpark_all()
        return data

    def break_(self, reason: str) -> None:
        if self.broken is None and not self.finished:
            self.broken = reason
            self.moved.unpark_all()


class MemoryStream:
    """One end of a stream between two tasks, with a window, resets and half-closing as on the network."""

    def __init__(self, peer: PeerId, outgoing: _Pipe, incoming: _Pipe) -> None:
        self.peer: Final = peer
        self._out = outgoing
        self._in = incoming
        self._lock = trio.Lock()

    def send_nowait(self, data: bytes) -> bool:
        self._out.check_sendable()
        if self._lock.locked() or len(data) > self._out.window - len(self._out.buffer):
            return False
        self._out.put(data)
        return True

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        async with self._lock:
            view, at = memoryview(data), 0
            try:
                while True:
                    self._out.check_sendable()
                    take = min(len(view) - at, self._out.window - len(self._out.buffer))
                    self._out.put(view[at : at + take])
                    at += take
                    if at == len(view):
                        return
                    await self._out.moved.park()
            finally:
                if 0 < at < len(view):
                    self.reset()

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._in.buffer:
            if self._in.broken is not None or self._in.refused:
                raise StreamBroken(self._in.broken or "the stream was closed here")
            if self._in.finished:
                return b""
            await self._in.moved.park()
        return self._in.take(max_bytes)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._out.finished:
            return
        async with self._lock:
            self._out.check_sendable()
            self._out.finished = True
            self._out.moved.unpark_all()

    async def aclose(self) -> None:
        try:
            await self.send_eof()
        except StreamBroken:
            return
        except BaseException:
            self.reset()
            raise
        self._in.refused = True
        self._in.take(len(self._in.buffer))

    def reset(self) -> None:
        if self._out.finished and self._in.finished:
            return
        for pipe in (self._in, self._out):
            pipe.break_("the stream was reset")
        self._in.take(len(self._in.buffer))


def memory_stream_pair(
    left: PeerId, right: PeerId, *, window: int = INITIAL_WINDOW_BYTES
) -> tuple[MemoryStream, MemoryStream]:
    """The ends held by `left` and by `right`. `window`: bytes in flight each way before a writer waits."""
    to_right, to_left = _Pipe(window), _Pipe(window)
    return MemoryStream(right, to_right, to_left), MemoryStream(left, to_left, to_right)
