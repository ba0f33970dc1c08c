"""The record of what happened, and its fingerprint.

Every input that a machine gets is one row of five integers: time (ns), source, destination, kind, size. The
SHA-256 over all rows names a run: two runs with the same hash were the same history. Rows are kept for one
block, then hashed, counted and (if wanted) written out; so a log of a hundred million events costs no memory.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: time_ns, source, destination, kind, size.
COLUMNS: Final = 5

#: A kind is `service * KINDS_PER_SERVICE + number`.
KINDS_PER_SERVICE: Final = 256

_NAME: Final = struct.Struct("<qI")

Rows = NDArray[np.int64]


class EventLog:
    """Takes rows, keeps their hash and counts. `sinks` get each block as an (n, 5) array of int64."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.events = 0
        self.names: dict[int, str] = {}
        self.sinks: list[Callable[[Rows], None]] = []
        self._hash = hashlib.sha256()
        self._by_kind = np.zeros(0, np.int64)
        self._bytes_by_kind = np.zeros(0, np.int64)
        self._received = np.zeros(0, np.int64)
        self._sent = np.zeros(0, np.int64)

    def name_kind(self, kind: int, name: str) -> None:
        """Say what a kind stands for. Names are part of the hash: numbers are given in order of first use."""
        self.names[kind] = name
        self.flush()
        text = name.encode()
        self._hash.update(_NAME.pack(-kind - 1, len(text)) + text)

    def flush(self) -> None:
        """Hash and count the rows so far."""
        if not self.rows:
            return
        packed = array("q", self.rows)
        self.rows.clear()
        table: Rows = np.frombuffer(packed, np.int64).reshape(-1, COLUMNS)
        self.events += len(table)
        for sink in self.sinks:
            sink(table)
        kinds = table[:, 3]
        self._by_kind = _add(self._by_kind, kinds, None)
        self._bytes_by_kind = _add(self._bytes_by_kind, kinds, np.maximum(table[:, 4], 0))
        messages = table[table[:, 4] >= 0]
        self._received = _add(self._received, messages[:, 2], None)
        self._sent = _add(self._sent, messages[:, 1], None)
        if sys.byteorder == "big":
            packed.byteswap()
        self._hash.update(packed)

    def digest(self) -> str:
        """SHA-256 over everything so far, hex."""
        self.flush()
        return self._hash.hexdigest()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Events and bytes by kind's name, in order of the kinds' numbers."""
        self.flush()
        return {
            self.names[kind]: (int(self._by_kind[kind]), int(self._bytes_by_kind[kind]))
            for kind in sorted(self.names)
            if kind < len(self._by_kind) and self._by_kind[kind]
        }

    def received_by_node(self, nodes: int) -> list[int]:
        """Messages that each node got."""
        self.flush()
        return _padded(self._received, nodes)

    def sent_by_node(self, nodes: int) -> list[int]:
        """Messages of each node that arrived somewhere."""
        self.flush()
        return _padded(self._sent, nodes)


def _add(totals: Rows, index: Rows, weights: Rows | None) -> Rows:
    """Totals plus what stands at each index. Weights stay below 2**53 per block, where doubles are exact."""
    size = max(len(totals), int(index.max()) + 1 if len(index) else 0)
    block = np.bincount(index, weights, size).astype(np.int64)
    block[: len(totals)] += totals
    return block


def _padded(totals: Rows, nodes: int) -> list[int]:
    values = [int(value) for value in totals[:nodes]]
    return values + [0] * (nodes - len(values))
