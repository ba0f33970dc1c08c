"""Messages to bytes and back.

A message is a frozen `msgspec.Struct` with a tag; on the wire it is MessagePack, on a stream it is
prefixed by its length (4 bytes, big-endian). Each message type has a size limit of its own
(`max_bytes`); a stream's codec admits a frame only up to the largest of its members, and then holds the
decoded message to its own limit. Whatever bytes come in, decoding either returns a message or raises
`ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import ClassVar, Final, Generic, TypeVar, cast, get_args

import msgspec

from protocol.errors import Fault, ProtocolError
from protocol.limits import MAX_CONTROL_BYTES, MAX_REMOTE_TEXT_CHARS

LENGTH: Final = struct.Struct("!I")

_encoder: Final = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=False):
    """Base of everything that travels. Unknown fields are ignored, so that a newer peer may say more."""

    max_bytes: ClassVar[int] = MAX_CONTROL_BYTES


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """MessagePack bytes of a message of ours. Raises ValueError if it exceeds its own type's limit."""
    data = _encoder.encode(message)
    if len(data) > message.max_bytes:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes exceeds its {message.max_bytes}")
    return data


def excerpt(text: str) -> str:
    """A remote's words, cut and escaped so that they can be shown."""
    cut = text[:MAX_REMOTE_TEXT_CHARS]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)


class Codec(Generic[M]):
    """Encoder and decoder of one protocol's message union.

    `Codec(JobOffer | JobCancel)`: members must be `Message` types with different tags.
    """

    def __init__(self, union: object) -> None:
        members = cast("tuple[type[Message], ...]", get_args(union) or (union,))
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(cast("type[M]", union))
        self.max_bytes: Final[int] = max(member.max_bytes for member in members)

    def encode(self, message: M) -> bytes:
        return encode(message)

    def encode_frame(self, message: M) -> bytes:
        """The message with its length prefix, ready for a stream."""
        body = encode(message)
        return LENGTH.pack(len(body)) + body

    def decode_untrusted(self, data: bytes | bytearray | memoryview) -> M:
        """The message in these bytes. Raises ProtocolError (OVERSIZE, MALFORMED), nothing else."""
        size = len(data)
        if size > self.max_bytes:
            raise ProtocolError(Fault.OVERSIZE, f"a message of {size} bytes exceeds {self.max_bytes}")
        try:
            message = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ProtocolError(Fault.MALFORMED, excerpt(str(error))) from error
        if size > message.max_bytes:
            name = type(message).__name__
            raise ProtocolError(Fault.OVERSIZE, f"{name} of {size} bytes exceeds its {message.max_bytes}")
        return message


class FrameBuffer(Generic[M]):
    """Cuts a byte stream into messages. Holds at most one incomplete frame plus the last chunk fed."""

    def __init__(self, codec: Codec[M]) -> None:
        self._codec = codec
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes held."""
        return len(self._buffer)

    def feed_untrusted(self, chunk: bytes | bytearray | memoryview) -> Iterator[M]:
        """Add bytes; yield each message that is complete now.

        Raises ProtocolError as soon as a frame announces more than the codec's limit (before its body
        arrives) or a body does not decode; the stream can not be resynchronised after that.
        """
        self._buffer += chunk
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self._buffer, start)
                if size > self._codec.max_bytes:
                    raise ProtocolError(
                        Fault.OVERSIZE, f"a frame of {size} bytes exceeds {self._codec.max_bytes}"
                    )
                end = start + LENGTH.size + size
                if len(self._buffer) < end:
                    break
                body = self._buffer[start + LENGTH.size : end]
                start = end
                yield self._codec.decode_untrusted(body)
        finally:
            del self._buffer[:start]
