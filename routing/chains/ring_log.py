"""What a stage made for a session so far: the rows that the next stage is fed, and fed again if it dies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from protocol.errors import Fault, ProtocolError
from protocol.ring import Dtype

Cut: TypeAlias = Callable[[Dtype, bytes, int, int, int], bytes]
"""(dtype, payload, its rows, start, stop) -> the bytes of rows `start` to `stop`. Raises ProtocolError."""


def cut_equal_rows(dtype: Dtype, payload: bytes, rows: int, start: int, stop: int) -> bytes:  # noqa: ARG001 - a Cut
    """For dtypes whose rows stand one after the other and are of one length. Raises ProtocolError if not."""
    size, rest = divmod(len(payload), rows)
    if rest:
        raise ProtocolError(Fault.MALFORMED, f"{len(payload)} bytes are not {rows} rows")
    return payload[start * size : stop * size]


@dataclass(slots=True)
class Rows:
    """Rows `position` to `position + rows`, asked for in `turn`."""

    position: int
    rows: int
    turn: int
    payload: bytes

    @property
    def end(self) -> int:
        return self.position + self.rows


class RowLog:
    """Rows `base` to `end` without gap; the turn never falls from one to the next. `size`: bytes held."""

    __slots__ = ("_chunks", "_cut", "base", "end", "size")

    def __init__(self, cut: Callable[[bytes, int, int, int], bytes]) -> None:
        self._cut = cut
        self._chunks: list[Rows] = []
        self.base = 0
        self.end = 0
        self.size = 0

    def append(self, rows: int, turn: int, payload: bytes) -> None:
        """At the end."""
        self._chunks.append(Rows(self.end, rows, turn, payload))
        self.end += rows
        self.size += len(payload)

    def truncate(self, position: int) -> None:
        """Forget what is at `position` and beyond."""
        while self._chunks and self._chunks[-1].end > position:
            chunk = self._chunks.pop()
            self.size -= len(chunk.payload)
            if chunk.position < position:
                kept = position - chunk.position
                payload = self._cut(chunk.payload, chunk.rows, 0, kept)
                self._chunks.append(Rows(chunk.position, kept, chunk.turn, payload))
                self.size += len(payload)
        self.end = min(self.end, position)
        self.base = min(self.base, self.end)

    def forget_before(self, position: int) -> None:
        """Whole feeds below `position`."""
        keep = bisect_right(self._chunks, position, key=lambda chunk: chunk.end)
        self.size -= sum(len(chunk.payload) for chunk in self._chunks[:keep])
        del self._chunks[:keep]
        self.base = self._chunks[0].position if self._chunks else self.end

    def clear(self) -> None:
        """Forget all, row 0 comes next."""
        self._chunks.clear()
        self.base = self.end = self.size = 0

    def renumber(self, turn: int) -> None:
        """All that is here counts as of this turn."""
        for chunk in self._chunks:
            chunk.turn = turn

    def first_after(self, turn: int) -> int | None:
        """Where the rows begin that are of a later turn."""
        found = bisect_right(self._chunks, turn, key=lambda chunk: chunk.turn)
        return self._chunks[found].position if found < len(self._chunks) else None

    def gather(self, position: int, most_rows: int, most_bytes: int) -> Rows:
        """Rows of one turn from `position` on (`base` <= it < `end`), one at least."""
        at = bisect_right(self._chunks, position, key=lambda chunk: chunk.position) - 1
        turn, rows, size, parts = self._chunks[at].turn, 0, 0, list[bytes]()
        while at < len(self._chunks) and rows < most_rows and size < most_bytes:
            chunk = self._chunks[at]
            if chunk.turn != turn:
                break
            skip = position + rows - chunk.position
            row_bytes = max(1, len(chunk.payload) // chunk.rows)
            take = min(chunk.rows - skip, most_rows - rows, max(0, most_bytes - size) // row_bytes)
            if take <= 0:
                if rows:
                    break
                take = 1
            payload = chunk.payload
            if take < chunk.rows:
                payload = self._cut(payload, chunk.rows, skip, skip + take)
            parts.append(payload)
            rows, size, at = rows + take, size + len(payload), at + 1
            if skip + take < chunk.rows:
                break
        return Rows(position, rows, turn, parts[0] if len(parts) == 1 else b"".join(parts))

    def read(self, position: int) -> bytes:
        """All bytes from `position` on, whatever turn (the head compares tokens)."""
        parts = list[bytes]()
        for chunk in reversed(self._chunks):
            if chunk.end <= position:
                break
            skip = max(0, position - chunk.position)
            parts.append(self._cut(chunk.payload, chunk.rows, skip, chunk.rows) if skip else chunk.payload)
        return b"".join(reversed(parts))
