"""Serving pieces: each stream is about one file, and answers one question after the other.

A stream's reader only notes what is wanted, its sender answers in order; so what a peer asks for costs a
bounded queue however fast it asks, and one that does not read what it asked for is cut off.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import structlog
import trio

from cargos.errors import CargoError
from node.p2p.errors import StreamBroken
from node.p2p.sockets import leaves
from node.pieces.limits import ServeLimits
from node.pieces.throttle import Throttle
from node.streams import ByteStream, MessageStream
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.pieces import (
    FROM_HOLDER,
    HASH_BYTES,
    MAX_DATA_BYTES,
    MAX_OPEN_PIECES,
    TO_HOLDER,
    FileHeld,
    FileRefused,
    FileWanted,
    FromHolder,
    Hashes,
    HashesWanted,
    HoldingsWanted,
    PieceData,
    PieceRefused,
    PieceUnwanted,
    PieceWanted,
    ToHolder,
    held_parts,
)

_log = structlog.get_logger("pieces")


class PieceSource(Protocol):
    """A file of which pieces are here. All of it may be called from threads, and while the file grows; `close`
    is called once at the end, when nothing else runs.
    """

    @property
    def size_bytes(self) -> int: ...
    @property
    def piece_bytes(self) -> int: ...

    @property
    def pieces(self) -> int:
        """How many the whole file has."""
        ...

    def has(self, index: int) -> bool: ...

    def bits(self) -> bytes:
        """Which pieces are here, as in `protocol.pieces.PiecesHeld`."""
        ...

    def hashes(self) -> bytes | None:
        """The piece list; None while it is not known here. Raises OSError, CargoError."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file, exactly `size`. Raises OSError, CargoError, also when they are gone."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class ServeCounters:
    """Since the start, for metrics."""

    streams: int = 0
    refused_busy: int = 0
    evicted: int = 0
    refused_unknown: int = 0
    violations: int = 0
    pieces: int = 0
    bytes: int = 0
    failed_reads: int = 0


_Question: TypeAlias = HashesWanted | HoldingsWanted | PieceWanted
_Out: TypeAlias = MessageStream[FromHolder, ToHolder]


class PieceServer:
    """`find`, called in a thread: opens the file with this SHA-256; None if nothing of it is here."""

    def __init__(
        self,
        find: Callable[[str], PieceSource | None],
        limits: ServeLimits = ServeLimits(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self.counters: Final = ServeCounters()
        self._find = find
        self._limits = limits
        self._throttle = Throttle(limits.upload_bytes_per_s)
        self._readers = trio.CapacityLimiter(limits.readers)
        self._open: Counter[PeerId] = Counter()
        self._served: dict[_Served, None] = {}

    @property
    def streams(self) -> int:
        """Being served now."""
        return self._open.total()

    async def handle(self, stream: ByteStream) -> None:
        """For `Host.handle(PIECES_PROTOCOL, ..., bulk=True)`."""
        peer, limits = stream.peer, self._limits
        messages: _Out = MessageStream(stream, FROM_HOLDER, TO_HOLDER)
        if self._open[peer] >= limits.max_streams_per_peer or not self._find_room():
            self.counters.refused_busy += 1
            await self.send(messages, FileRefused("busy"))
            return
        self._open[peer] += 1
        self.counters.streams += 1
        try:
            await self._serve(messages)
        except* ProtocolError as broken:  # in groups, and beside cancellations when this node shuts down
            self.counters.violations += 1
            detail = str(next(leaves(broken)))
            _log.info("a peer broke the protocol of pieces", peer=peer, reason=detail)
            messages.reset()
        except* (StreamBroken, trio.TooSlowError) as ended:
            _log.debug("a stream for pieces ended", peer=peer, reason=str(next(leaves(ended))))
            messages.reset()
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

    def _find_room(self) -> bool:
        """Is there room for one more? A stream that only occupies its place makes way."""
        if self.streams < self._limits.max_streams:
            return True
        idlest = min(self._served, key=lambda served: served.used_at, default=None)
        if idlest is None or trio.current_time() - idlest.used_at < self._limits.yield_s:
            return False
        self.counters.evicted += 1
        idlest.end()
        return True

    async def _serve(self, messages: _Out) -> None:
        with trio.fail_after(self._limits.hello_s):
            first = await messages.receive()
        if first is None:
            return
        if not isinstance(first, FileWanted):
            raise ProtocolError(Fault.UNEXPECTED, "a stream for pieces that does not begin with its file")
        source = await trio.to_thread.run_sync(self._find, first.file, limiter=self._readers)
        if source is None:
            self.counters.refused_unknown += 1
            await self.send(messages, FileRefused("unknown"))
            return
        try:
            await self._talk(messages, source)
        finally:
            source.close()

    async def _talk(self, messages: _Out, source: PieceSource) -> None:
        served = _Served(messages, source, self)
        if not await served.greet():
            self.counters.refused_unknown += 1
            await self.send(messages, FileRefused("unknown"))
            return
        self._served[served] = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.answer)
                await served.listen()
                nursery.cancel_scope.cancel()
        finally:
            self._served.pop(served, None)

    # --- for the streams ----------------------------------------------------------------------------

    @property
    def limits(self) -> ServeLimits:
        return self._limits

    def forget(self, served: _Served) -> None:
        self._served.pop(served, None)

    async def send(self, messages: _Out, message: FromHolder, size: int = 0) -> None:
        """In its turn, if there is a bound on the upload. Raises StreamBroken."""
        if size:
            await self._throttle.take(size)
        with trio.move_on_after(self._limits.send_s) as scope:
            await messages.send(message)
        if scope.cancelled_caught:
            messages.reset()
            raise StreamBroken("the peer does not read what it asked for")

    async def read(self, source: PieceSource, offset: int, size: int) -> bytes | None:
        """None: it can not be read (any more)."""
        try:
            return await trio.to_thread.run_sync(source.read, offset, size, limiter=self._readers)
        except (OSError, CargoError) as error:
            self.counters.failed_reads += 1
            _log.warning("a piece can not be read", reason=str(error))
            return None

    async def hashes(self, source: PieceSource) -> bytes | None:
        """The piece list; None as for `read`."""
        try:
            return await trio.to_thread.run_sync(source.hashes, limiter=self._readers)
        except (OSError, CargoError) as error:
            self.counters.failed_reads += 1
            _log.warning("a piece list can not be read", reason=str(error))
            return None


class _Served:
    """One stream: what was asked and not answered yet."""

    def __init__(self, messages: _Out, source: PieceSource, server: PieceServer) -> None:
        self._messages = messages
        self._source = source
        self._server = server
        self._queue: deque[_Question] = deque()
        self._pieces = 0  # open ones, that being sent among them
        self._sending: int | None = None
        self._stop = False  # the one being sent is not wanted any more
        self._asked = trio.lowlevel.ParkingLot()
        self.used_at = trio.current_time()  # when a piece was last asked for or sent

    def end(self) -> None:
        """At once; `listen` raises StreamBroken."""
        self._server.forget(self)
        self._messages.reset()

    async def greet(self) -> bool:
        """Say what is here; False if it is nothing."""
        source = self._source
        if not any(source.bits()):
            return False
        listed = await self._server.hashes(source) is not None
        hello = FileHeld(source.size_bytes, source.piece_bytes, listed=listed)
        await self._server.send(self._messages, hello)
        await self._tell()
        return True

    async def listen(self) -> None:
        """Note what is wanted until the peer has finished, or asks nothing for long."""
        limits = self._server.limits
        while True:
            message: ToHolder | None = None
            with trio.move_on_after(limits.idle_s) as scope:
                message = await self._messages.receive()
            if message is not None:
                self._note(message)
            elif not scope.cancelled_caught or not (self._queue or self._sending is not None):
                return

    def _note(self, message: ToHolder) -> None:
        match message:
            case PieceWanted(index=index):
                if self._pieces >= MAX_OPEN_PIECES:
                    raise ProtocolError(Fault.UNEXPECTED, f"more than {MAX_OPEN_PIECES} pieces asked for")
                if index >= self._source.pieces:
                    raise ProtocolError(Fault.UNEXPECTED, "a piece beyond the end of the file")
                self._pieces += 1
                self._queue.append(message)
                self.used_at = trio.current_time()
            case HashesWanted() | HoldingsWanted():
                questions = sum(not isinstance(question, PieceWanted) for question in self._queue)
                if questions >= self._server.limits.max_questions:
                    raise ProtocolError(Fault.UNEXPECTED, "more questions than may be open")
                self._queue.append(message)
            case PieceUnwanted(index=index):
                self._forget(index)
            case FileWanted():
                raise ProtocolError(Fault.UNEXPECTED, "a stream is about one file")
        self._asked.unpark()

    def _forget(self, index: int) -> None:
        if self._sending == index and not self._stop:
            self._stop = True
            self._pieces -= 1
            return
        for question in self._queue:
            if isinstance(question, PieceWanted) and question.index == index:
                self._queue.remove(question)
                self._pieces -= 1
                return

    async def answer(self) -> None:
        """Send what was asked for, in order, until cancelled."""
        while True:
            while not self._queue:
                await self._asked.park()
            match self._queue.popleft():
                case PieceWanted(index=index):
                    self._sending, self._stop = index, False
                    await self._send_piece(index)
                    if not self._stop:
                        self._pieces -= 1
                    self._sending = None
                case HoldingsWanted():
                    await self._tell()
                case HashesWanted(first=first, count=count):
                    await self._send_hashes(first, count)

    async def _tell(self) -> None:
        for part in held_parts(self._source.pieces, self._source.bits()):
            await self._server.send(self._messages, part)

    async def _send_hashes(self, first: int, count: int) -> None:
        hashes = await self._server.hashes(self._source) or b""
        data = hashes[first * HASH_BYTES : (first + count) * HASH_BYTES]
        await self._server.send(self._messages, Hashes(first, data), len(data))

    async def _send_piece(self, index: int) -> None:
        source, server = self._source, self._server
        start = index * source.piece_bytes
        size = min(source.piece_bytes, source.size_bytes - start)
        if not source.has(index):
            await server.send(self._messages, PieceRefused(index, "unknown"))
            return
        for at in range(0, size, server.limits.read_bytes):
            chunk = await server.read(source, start + at, min(server.limits.read_bytes, size - at))
            if chunk is None:
                await server.send(self._messages, PieceRefused(index, "unknown"))
                return
            for begin in range(0, len(chunk), MAX_DATA_BYTES):
                data = chunk[begin : begin + MAX_DATA_BYTES]
                if self._stop:
                    return
                await server.send(self._messages, PieceData(index, at + begin, data), len(data))
                server.counters.bytes += len(data)
                self.used_at = trio.current_time()
        server.counters.pieces += 1
