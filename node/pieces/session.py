"""One stream to a peer that holds pieces: what it says is checked against the file's own shape, and against
what it was asked. Nothing is believed that is not in the manifest.
"""

from __future__ import annotations

import hashlib
from typing import Final, Protocol, TypeAlias

import trio

from cargos.manifest import CargoFile
from node.p2p.errors import StreamBroken
from node.pieces.limits import FetchLimits
from node.streams import ByteStream, MessageStream
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.pieces import (
    FROM_HOLDER,
    HASH_BYTES,
    MAX_BITS_PER_PART,
    MAX_HASHES_PER_PART,
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
    PiecesHeld,
    PieceUnwanted,
    PieceWanted,
    ToHolder,
    pieces_of_bits,
)

_Stream: TypeAlias = MessageStream[ToHolder, FromHolder]


class HolderRefused(Exception):
    """The peer has nothing of the file, or no time for us."""


class WrongList(Exception):
    """The peer's piece list is not the one that the manifest names."""


class Listener(Protocol):
    """What a session tells the fetch."""

    def on_holdings(self, peer: PeerId, held: list[int]) -> None: ...
    def on_bytes(self, peer: PeerId, index: int, size: int) -> None: ...
    def on_refusal(self, peer: PeerId, index: int, *, busy: bool) -> None: ...

    async def on_piece(self, peer: PeerId, index: int, data: bytes) -> None:
        """A whole piece, unchecked. The session reads on when this returns."""
        ...


class HolderSession:
    """`run` after `open`; `ask`, `cancel` and `ask_again` return at once."""

    def __init__(self, stream: ByteStream, file: CargoFile, limits: FetchLimits, listener: Listener) -> None:
        self.peer: Final[PeerId] = stream.peer
        self.held: list[int] = []
        self._file = file
        self._limits = limits
        self._listener = listener
        self._messages: _Stream = MessageStream(stream, TO_HOLDER, FROM_HOLDER)
        self._asked: set[int] = set()  # ever
        self._open: set[int] = set()
        self._allowed_bytes = 0  # that the peer may still send, for all it was asked
        self._telling = False  # holdings are wanted, or are coming
        self._told: list[int] = []
        self._told_until = 0
        self._index = -1
        self._piece = bytearray()
        # Bounded by what may be open: the plan asks for no more before something comes.
        queue = 2 * limits.policy.max_open_per_peer + 8
        self._outbox, self._outgoing = trio.open_memory_channel[ToHolder](queue)

    async def open(self) -> None:
        """Ask for the file and hear what is there of it: `held`. Raises HolderRefused, ProtocolError,
        StreamBroken.
        """
        await self._messages.send(FileWanted(self._file.sha256))
        self._telling = True
        match await self._receive():
            case FileHeld(size_bytes=size, piece_bytes=piece):
                if (size, piece) != (self._file.size_bytes, self._file.piece_bytes):
                    raise HolderRefused("its file has another shape")
            case FileRefused(code=code):
                raise HolderRefused(code)
            case other:
                raise _unexpected(other)
        while self._telling:
            match await self._receive():
                case PiecesHeld() as part:
                    if (held := self._take_part(part)) is not None:
                        self.held = held
                case other:
                    raise _unexpected(other)

    async def fetch_list(self) -> bytes | None:
        """The piece list, right; None if the peer has it not. After `open`, before `run`.

        Raises WrongList, ProtocolError, StreamBroken, TooSlowError.
        """
        found = bytearray()
        while len(found) < self._file.pieces * HASH_BYTES:
            first = len(found) // HASH_BYTES
            count = min(MAX_HASHES_PER_PART, self._file.pieces - first)
            with trio.fail_after(self._limits.list_s):
                await self._messages.send(HashesWanted(first, count))
                match await self._receive():
                    case Hashes(first=at, data=data):
                        if not data:
                            return None
                        if at != first or len(data) != count * HASH_BYTES:
                            raise ProtocolError(Fault.UNEXPECTED, "another part of the list than was asked for")
                        found += data
                    case other:
                        raise _unexpected(other)
        if hashlib.sha256(found).hexdigest() != self._file.pieces_sha256:
            raise WrongList
        return bytes(found)

    # --- at once ------------------------------------------------------------------------------------

    def ask(self, index: int) -> None:
        self._open.add(index)
        self._asked.add(index)
        self._allowed_bytes += self._size(index)
        self._post(PieceWanted(index))

    def cancel(self, index: int) -> None:
        self._open.discard(index)
        self._post(PieceUnwanted(index))

    def ask_again(self) -> None:
        """What does the peer have by now? `on_holdings` follows."""
        if not self._telling:
            self._telling = True
            self._post(HoldingsWanted())

    def close(self) -> None:
        """End it at once; `run` returns or raises StreamBroken."""
        self._messages.reset()

    def _post(self, message: ToHolder) -> None:
        try:
            self._outbox.send_nowait(message)
        except trio.WouldBlock:  # it does not read what we ask
            self.close()

    # --- running ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the peer has finished. Raises ProtocolError, StreamBroken (perhaps in a group)."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            while (message := await self._messages.receive()) is not None:
                await self._take(message)
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        async for message in self._outgoing:
            await self._messages.send(message)

    async def _receive(self) -> FromHolder:
        message = await self._messages.receive()
        if message is None:
            raise StreamBroken("the peer finished before it had answered")
        return message

    async def _take(self, message: FromHolder) -> None:
        match message:
            case PieceData(index=index, offset=offset, data=data):
                await self._take_data(index, offset, data)
            case PieceRefused(index=index, code=code):
                if index in self._open:
                    self._open.discard(index)
                    self._listener.on_refusal(self.peer, index, busy=code == "busy")
            case PiecesHeld() as part:
                if (held := self._take_part(part)) is not None:
                    self.held = held
                    self._listener.on_holdings(self.peer, held)
            case _:
                raise _unexpected(message)

    async def _take_data(self, index: int, offset: int, data: bytes) -> None:
        """In order, from the start; what was cancelled may still come, and is dropped."""
        self._allowed_bytes -= len(data)
        if index not in self._asked or self._allowed_bytes < 0:
            raise ProtocolError(Fault.UNEXPECTED, "data that was not asked for")
        if offset == 0:
            self._index = index
            self._piece.clear()
        if index != self._index or offset != len(self._piece):
            raise ProtocolError(Fault.UNEXPECTED, "data out of order")
        self._piece += data
        size = self._size(index)
        if len(self._piece) > size:
            raise ProtocolError(Fault.UNEXPECTED, "more data than the piece has")
        wanted = index in self._open
        if wanted:
            self._listener.on_bytes(self.peer, index, len(data))
        if len(self._piece) == size:
            piece = bytes(self._piece)
            self._piece.clear()
            self._index = -1
            if wanted:
                self._open.discard(index)
                await self._listener.on_piece(self.peer, index, piece)

    def _take_part(self, part: PiecesHeld) -> list[int] | None:
        """All that is held, when its last part is here. Raises ProtocolError."""
        count = self._file.pieces
        expected = min(MAX_BITS_PER_PART, count - self._told_until)
        is_last = self._told_until + MAX_BITS_PER_PART >= count
        if (
            not self._telling
            or part.first != self._told_until
            or len(part.bits) != -(-expected // 8)
            or part.last != is_last
        ):
            raise ProtocolError(Fault.UNEXPECTED, "holdings out of order")
        self._told += pieces_of_bits(part.first, part.bits, count)
        self._told_until += MAX_BITS_PER_PART
        if not is_last:
            return None
        told, self._told, self._told_until, self._telling = self._told, [], 0, False
        return told

    def _size(self, index: int) -> int:
        return min(self._file.piece_bytes, self._file.size_bytes - index * self._file.piece_bytes)


def _unexpected(message: FromHolder) -> ProtocolError:
    return ProtocolError(Fault.UNEXPECTED, f"{type(message).__name__} was not asked for")
