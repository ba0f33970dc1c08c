"""One link of the ring: a stream, what waits to be sent on it, and how it goes on with another stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from node.p2p import Stream, StreamBroken
from protocol.codec import Codec, Message
from protocol.ids import PeerId
from protocol.limits import KIB
from protocol.ring import FromStage, RingFeed, RingPing, RingPong, ToStage

#: What a message without rows counts for in the outbox, and each one besides its payload.
_MESSAGE_BYTES: Final = KIB

#: Larger messages never fit one frame.
_SMALL_BYTES: Final = 60_000


def weight_of(message: Message) -> int:
    """What a message counts for in an outbox, in bytes."""
    return _MESSAGE_BYTES + (len(message.payload) if isinstance(message, RingFeed) else 0)


class Watched:
    """A stream that tells when bytes came that complete no message. `partial`: bytes since one was complete."""

    def __init__(self, stream: Stream, told: Callable[[], None]) -> None:
        self.partial = 0
        self.heard_at = trio.current_time()
        self._stream = stream
        self._told = told
        self.send_nowait: Final = stream.send_nowait
        self.send_all: Final = stream.send_all
        self.send_eof: Final = stream.send_eof
        self.aclose: Final = stream.aclose
        self.reset: Final = stream.reset

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self.partial:
            self._told()
        data = await self._stream.receive_some(max_bytes)
        self.heard_at = trio.current_time()
        self.partial += len(data)
        return data

    def receive_nowait(self, max_bytes: int = 65536) -> bytes:
        if self.partial:
            self._told()
        data = self._stream.receive_nowait(max_bytes)
        self.partial += len(data)
        return data


@dataclass(slots=True, eq=False)
class Link:
    """Either direction. `stream` is missing while it is being opened."""

    peer: PeerId
    codec: Codec[ToStage] | Codec[FromStage]
    stream: Stream | None = None
    outbox: deque[ToStage | FromStage] = field(default_factory=deque[ToStage | FromStage])
    queued_bytes: int = 0
    sending: bool = False
    wanted: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    heard_at: float = field(default_factory=trio.current_time)
    whole_at: float = field(default_factory=trio.current_time)
    used_at: float = field(default_factory=trio.current_time)
    since: float = field(default_factory=trio.current_time)
    reason: str = ""
    watched: Watched | None = None
    better: Stream | None = None
    """Where it goes on after the message that is being sent."""
    moving: bool = False
    """Its successor is there, and waits until all that came on this one has been taken."""
    finishing: bool = False
    emptied: trio.Event = field(default_factory=trio.Event)
    """All that came on it has been taken."""

    @property
    def partial(self) -> int:
        """Bytes of a message that has come in part."""
        return 0 if self.watched is None else self.watched.partial

    def put(self, message: ToStage | FromStage) -> int:
        """Send it now or later. How many bytes lie here."""
        self.used_at = trio.current_time()
        if self.stream is not None and not self.outbox and not self.sending:
            weight = weight_of(message)
            if weight < _SMALL_BYTES:
                try:
                    if self.stream.send_nowait(self._frame(message)):
                        return 0
                except StreamBroken:
                    return 0  # whoever reads the link says so
        if isinstance(message, RingPing | RingPong):
            self.outbox.appendleft(message)  # what asks whether we live does not wait behind bulk
        else:
            self.outbox.append(message)
        self.queued_bytes += weight_of(message)
        self.wanted.set()
        return self.queued_bytes

    def end(self, reason: str) -> None:
        """Close it at once."""
        self.reason = self.reason or reason
        self.scope.cancel()
        for stream in (self.stream, self.better):
            if stream is not None:
                stream.reset()
        self.outbox.clear()
        self.emptied.set()

    @property
    def is_relayed(self) -> bool:
        """It goes through a relay, and has nowhere better to go yet."""
        return self.better is None and self.stream is not None and self.stream.path.relay is not None

    def finish(self) -> None:
        """Send what lies here, then say that there is no more."""
        self.finishing = True
        self.wanted.set()

    def move(self, stream: Stream) -> None:
        """Go on with this one."""
        self.better = stream
        self.wanted.set()

    async def write(self) -> None:
        """Send what lies in the outbox, until cancelled, broken, or finished."""
        assert self.stream is not None  # noqa: S101 - it is written to once it is open
        while True:
            if self.better is not None:
                self.sending = True  # what is said meanwhile waits
                try:
                    await self.stream.send_eof()
                finally:
                    self.sending = False
                self.stream, self.better = self.better, None
            while self.outbox and self.better is None:
                message = self.outbox.popleft()
                self.queued_bytes -= weight_of(message)
                self.sending = True
                try:
                    await self.stream.send_all(self._frame(message))
                finally:
                    self.sending = False
            if self.finishing:
                await self.stream.send_eof()
                return
            if self.better is None:
                self.wanted = trio.Event()
                await self.wanted.wait()

    def _frame(self, message: ToStage | FromStage) -> bytes:
        return self.codec.encode_frame(message)  # type: ignore[arg-type]
