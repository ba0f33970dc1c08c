"""Agreement on a protocol (multistream-select 1.0.0), as two small machines without I/O.

The side that wants something says the heading and the protocol in one go, so agreement takes one round
trip. Lines are a length (unsigned varint), the text and a newline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

HEADING: Final = "/multistream/1.0.0"
_REFUSED: Final = "na"

#: A protocol name is a few dozen characters. Two bytes of varint hold this.
MAX_LINE_BYTES: Final = 1024

#: How many names one may try on one stream; libp2p peers try a handful.
MAX_PROPOSALS: Final = 16


class NegotiationFailed(Exception):
    """The remote broke the rules of multistream-select, or speaks another version of it."""


class NotSupported(Exception):
    """The remote does not speak the protocol."""


def line(text: str) -> bytes:
    """One line, encoded. Raises ValueError if it is too long."""
    body = text.encode() + b"\n"
    size = len(body)
    if size > MAX_LINE_BYTES:
        raise ValueError(f"a protocol name of {size} bytes is too long")
    if size < 0x80:
        return bytes((size,)) + body
    return bytes((size & 0x7F | 0x80, size >> 7)) + body


class _Lines:
    """Cuts lines out of bytes that come in pieces. Holds at most one line and the last piece."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_untrusted(self) -> str | None:
        """The next line without its newline, None if it is not complete. Raises NegotiationFailed."""
        buffer = self._buffer
        if not buffer:
            return None
        size, start = buffer[0], 1
        if size & 0x80:
            if len(buffer) < 2:
                return None
            size, start = (size & 0x7F) | buffer[1] << 7, 2
        if not 1 <= size <= MAX_LINE_BYTES or (start == 2 and buffer[1] & 0x80):
            raise NegotiationFailed("a line of forbidden length")
        if len(buffer) < start + size:
            return None
        body = bytes(buffer[start : start + size])
        del buffer[: start + size]
        if body[-1:] != b"\n":
            raise NegotiationFailed("a line without its newline")
        try:
            return body[:-1].decode()
        except UnicodeDecodeError as error:
            raise NegotiationFailed("a line that is not UTF-8") from error

    def rest(self) -> bytes:
        return bytes(self._buffer)


class Proposer:
    """The side that wants `protocol`. Send `opening`, then feed what comes until `agreed`."""

    def __init__(self, protocol: str) -> None:
        self.opening: Final = line(HEADING) + line(protocol)
        self.agreed = False
        self._expected = [HEADING, protocol]
        self._lines = _Lines()

    def feed_untrusted(self, data: bytes) -> None:
        """Raises NegotiationFailed or NotSupported."""
        self._lines.feed(data)
        while self._expected:
            text = self._lines.next_untrusted()
            if text is None:
                return
            if text != self._expected[0]:
                if text == _REFUSED and len(self._expected) == 1:
                    raise NotSupported
                raise NegotiationFailed("an unexpected answer")
            del self._expected[0]
        self.agreed = True

    def rest(self) -> bytes:
        """Bytes after the agreement; they belong to the protocol."""
        return self._lines.rest()


class Responder:
    """The side that is asked. Feed what comes and send what `feed_untrusted` returns, until `agreed`."""

    def __init__(self, supports: Callable[[str], bool]) -> None:
        self.agreed: str | None = None
        self._supports = supports
        self._greeted = False
        self._proposals = 0
        self._lines = _Lines()

    def feed_untrusted(self, data: bytes) -> bytes:
        """What to answer. Raises NegotiationFailed."""
        self._lines.feed(data)
        answer = b""
        while self.agreed is None:
            text = self._lines.next_untrusted()
            if text is None:
                break
            if not self._greeted:
                if text != HEADING:
                    raise NegotiationFailed("not multistream-select 1.0.0")
                self._greeted = True
                answer += line(HEADING)
            elif self._supports(text):
                self.agreed = text
                answer += line(text)
            else:
                self._proposals += 1
                if self._proposals >= MAX_PROPOSALS:
                    raise NegotiationFailed("too many proposals")
                answer += line(_REFUSED)
        return answer

    def rest(self) -> bytes:
        """Bytes after the agreement; they belong to the protocol."""
        return self._lines.rest()
