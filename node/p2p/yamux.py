"""The wire format of yamux (hashicorp/yamux spec.md, as libp2p's /yamux/1.0.0 uses it), without I/O.

A frame is a header of 12 bytes (version, type, flags, stream id, length; big-endian) and, for data, a body.
The parser holds no body: pieces go to the sink as they come.
"""

from __future__ import annotations

import struct
from typing import Final, Protocol

HEADER: Final = struct.Struct("!BBHII")
HEADER_BYTES: Final = HEADER.size

DATA: Final = 0
WINDOW: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

GOODBYE: Final = 0
PROTOCOL_FAULT: Final = 1

#: Each side may send this much on a new stream before it is told more (the spec's constant).
INITIAL_WINDOW_BYTES: Final = 256 * 1024

MAX_STREAM_ID: Final = (1 << 32) - 1

#: Largest window and largest frame that a peer may believe in. rust-yamux grows windows up to 16 MiB.
MAX_WINDOW_BYTES: Final = 16 * 1024 * 1024

#: Streams that we open before the peer acknowledges the first of them (rust-yamux closes beyond it).
ACK_BACKLOG: Final = 256


class YamuxViolation(Exception):
    """The peer broke the protocol; the connection can not go on."""


def frame(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """A header. For DATA `length` bytes must follow."""
    return HEADER.pack(0, kind, flags, stream_id, length)


class Sink(Protocol):
    """Takes what the parser finds. Each method may raise YamuxViolation."""

    def on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """A header; for DATA with a body, `on_body` follows."""
        ...

    def on_body(self, piece: bytes, *, last: bool) -> None:
        """A piece of the body of the last DATA frame."""
        ...


class FrameParser:
    """Cuts a byte stream into frames. Holds at most one partial header."""

    __slots__ = ("_header", "_left", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._header = b""
        self._left = 0

    def feed_untrusted(self, data: bytes) -> None:
        """Any bytes. Raises YamuxViolation, nothing else; after that the parser must not be fed again."""
        sink = self._sink
        size = len(data)
        at = 0
        while at < size:
            if self._left:
                end = min(size, at + self._left)
                self._left -= end - at
                sink.on_body(data[at:end], last=not self._left)
                at = end
                continue
            if self._header or size - at < HEADER_BYTES:
                end = min(size, at + HEADER_BYTES - len(self._header))
                self._header += data[at:end]
                at = end
                if len(self._header) < HEADER_BYTES:
                    return
                version, kind, flags, stream_id, length = HEADER.unpack(self._header)
                self._header = b""
            else:
                version, kind, flags, stream_id, length = HEADER.unpack_from(data, at)
                at += HEADER_BYTES
            if version != 0 or kind > GO_AWAY:
                raise YamuxViolation(f"a frame of version {version}, type {kind}")
            if kind == DATA:
                if length > MAX_WINDOW_BYTES:
                    raise YamuxViolation(f"a frame of {length} bytes")
                self._left = length
            sink.on_frame(kind, flags, stream_id, length)
