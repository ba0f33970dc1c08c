"""Messages between a peer that wants pieces of a file and one that has some (docs/network.md).

    wants                              holds
      FileWanted     ------------->                   first on the stream: it is about this file only
                     <-------------   FileHeld        the file's shape; or FileRefused, and the stream ends
                     <-------------   PiecesHeld*     which pieces are here; all parts, in order
      HashesWanted   ------------->
                     <-------------   Hashes          a part of the piece list
      PieceWanted*   ------------->                   several may be open; they are answered one after the other
                     <-------------   PieceData*      its bytes in order; or PieceRefused
      PieceUnwanted  ------------->                   it came from elsewhere
      HoldingsWanted ------------->                   a holder may be fetching itself, and has more by now
                     <-------------   PiecesHeld*

Nothing here is believed: the file's shape and the hash of its piece list are in the manifest, the list
tells whether a piece is right.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, TypeAlias

from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.limits import KIB, MIB

PIECES_PROTOCOL: Final = "/archipelag/pieces/1.0.0"

#: Bytes of one piece at most: what a receiver holds in memory before it can tell whether it is right.
MAX_PIECE_BYTES: Final = 4 * MIB
#: Pieces of one file: a piece list of 32 MiB, a file of 4 TiB in the largest pieces.
MAX_PIECES: Final = 1 << 20
#: One SHA-256.
HASH_BYTES: Final = 32

#: Bytes of a piece in one frame: four records of the connection, so that others' frames get between.
MAX_DATA_BYTES: Final = 256 * KIB
#: Hashes in one message: 128 KiB. The longest piece list takes 256 messages.
MAX_HASHES_PER_PART: Final = 4096
#: Pieces told of in one message: 32 KiB of bits; the largest file takes four messages.
MAX_BITS_PER_PART: Final = 1 << 18
#: Pieces that may be asked for and not answered on one stream. 16 of 1 MiB keep 1 Gbit/s busy over 130 ms.
MAX_OPEN_PIECES: Final = 16

#: Fields around the bytes of a message.
_OVERHEAD_BYTES: Final = 128

_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Index = Annotated[int, Meta(ge=0, lt=MAX_PIECES)]

#: `unknown`: not here (any more). `busy`: asked of too much; later, perhaps.
RefusalCode = Literal["unknown", "busy"]


class FileWanted(Message, frozen=True, gc=False, tag="fw"):
    """Have you pieces of the file with this SHA-256?"""

    max_bytes: ClassVar[int] = 256

    file: _Sha256


class HashesWanted(Message, frozen=True, gc=False, tag="lw"):
    """The hashes of pieces `first` to `first + count`."""

    max_bytes: ClassVar[int] = 256

    first: _Index
    count: Annotated[int, Meta(ge=1, le=MAX_HASHES_PER_PART)]


class HoldingsWanted(Message, frozen=True, gc=False, tag="hw"):
    """Say again what you have."""

    max_bytes: ClassVar[int] = 256


class PieceWanted(Message, frozen=True, gc=False, tag="pw"):
    max_bytes: ClassVar[int] = 256

    index: _Index


class PieceUnwanted(Message, frozen=True, gc=False, tag="pu"):
    """Do not send it, or no more of it. Data on its way may still come; no answer follows."""

    max_bytes: ClassVar[int] = 256

    index: _Index


class FileHeld(Message, frozen=True, gc=False, tag="fh"):
    """Pieces of it are here. `listed`: the piece list, too."""

    max_bytes: ClassVar[int] = 256

    size_bytes: Annotated[int, Meta(ge=1, lt=1 << 53)]
    piece_bytes: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)]
    listed: bool = True


class FileRefused(Message, frozen=True, gc=False, tag="fx"):
    max_bytes: ClassVar[int] = 256

    code: RefusalCode


class PiecesHeld(Message, frozen=True, gc=False, tag="ph"):
    """Piece `first + i` is here if bit `i % 8` (1 << it) of byte `i // 8` is set. `last`: no more parts."""

    max_bytes: ClassVar[int] = MAX_BITS_PER_PART // 8 + _OVERHEAD_BYTES

    first: _Index
    bits: Annotated[bytes, Meta(max_length=MAX_BITS_PER_PART // 8)]
    last: bool


class Hashes(Message, frozen=True, gc=False, tag="lp"):
    """The hashes of the pieces from `first` on, 32 bytes each."""

    max_bytes: ClassVar[int] = MAX_HASHES_PER_PART * HASH_BYTES + _OVERHEAD_BYTES

    first: _Index
    data: Annotated[bytes, Meta(max_length=MAX_HASHES_PER_PART * HASH_BYTES)]


class PieceData(Message, frozen=True, gc=False, tag="pd"):
    """Bytes of a piece from `offset` on. They come in order, one piece after the other."""

    max_bytes: ClassVar[int] = MAX_DATA_BYTES + _OVERHEAD_BYTES

    index: _Index
    offset: Annotated[int, Meta(ge=0, lt=MAX_PIECE_BYTES)]
    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_DATA_BYTES)]


class PieceRefused(Message, frozen=True, gc=False, tag="px"):
    """Not this piece. It may come in the middle of it, if it can not be read further."""

    max_bytes: ClassVar[int] = 256

    index: _Index
    code: RefusalCode


ToHolder: TypeAlias = FileWanted | HashesWanted | HoldingsWanted | PieceWanted | PieceUnwanted
FromHolder: TypeAlias = FileHeld | FileRefused | PiecesHeld | Hashes | PieceData | PieceRefused

TO_HOLDER: Final[Codec[ToHolder]] = Codec(ToHolder)
FROM_HOLDER: Final[Codec[FromHolder]] = Codec(FromHolder)


def held_parts(count: int, bits: bytes) -> list[PiecesHeld]:
    """What is held of a file of `count` pieces, in messages. `bits`: as in `PiecesHeld`, from piece 0 on."""
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes of bits for {count} pieces")
    parts: list[PiecesHeld] = []
    for first in range(0, count, MAX_BITS_PER_PART):
        last = first + MAX_BITS_PER_PART >= count
        parts.append(PiecesHeld(first, bits[first // 8 : (first + MAX_BITS_PER_PART) // 8], last))
    return parts


def pieces_of_bits(first: int, bits: bytes, count: int) -> list[int]:
    """The pieces that these bits name, those at or beyond `count` left out (padding)."""
    return [
        first + 8 * at + bit
        for at, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte >> bit & 1 and first + 8 * at + bit < count
    ]
