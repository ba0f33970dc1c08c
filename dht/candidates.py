"""Peers that a full bucket has no place for, a few per bucket: who replaces a dead entry, who would be a nearer
one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from dht.coordinates import UNKNOWN, estimate_ns

#: No peer.
NOBODY: Final = 0xFFFF_FFFF


class Candidates:
    """`width` slots per bucket, 12 bytes each, made when a bucket first needs them."""

    __slots__ = ("_coordinates", "_peers", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._peers = array("I")
        self._coordinates = array("Q")

    def hold(self, bucket: int, peer: int, coordinate: int, own: int, *, nearest: bool) -> None:
        """Remember a peer. When the slots are full, `nearest` keeps those nearest to our coordinate `own`, else
        the latest stay.
        """
        width = self._width
        if not width:
            return
        peers, coordinates = self._peers, self._coordinates
        first, end = bucket * width, (bucket + 1) * width
        if len(peers) < end:
            missing = end - len(peers)
            peers.extend([NOBODY] * missing)
            coordinates.extend([UNKNOWN] * missing)
        held = peers[first:end]
        if peer in held:
            return
        if NOBODY in held:
            slot = first + held.index(NOBODY)
        elif nearest:
            distances = [_distance(there, own) for there in coordinates[first:end]]
            farthest = max(distances)
            if _distance(coordinate, own) >= farthest:
                return
            slot = first + distances.index(farthest)
        else:
            peers[first + 1 : end] = peers[first : end - 1]
            coordinates[first + 1 : end] = coordinates[first : end - 1]
            slot = first
        peers[slot] = peer
        coordinates[slot] = coordinate

    def of(self, bucket: int) -> Iterator[tuple[int, int, int]]:
        """Slot, peer and coordinate of each candidate of a bucket."""
        width = self._width
        for slot in range(bucket * width, min((bucket + 1) * width, len(self._peers))):
            peer = self._peers[slot]
            if peer != NOBODY:
                yield slot, peer, self._coordinates[slot]

    def __iter__(self) -> Iterator[int]:
        return (peer for peer in self._peers if peer != NOBODY)

    def drop(self, slot: int) -> None:
        self._peers[slot] = NOBODY

    @property
    def buckets(self) -> int:
        return len(self._peers) // self._width if self._width else 0


def _distance(coordinate: int, own: int) -> int:
    return estimate_ns(coordinate, own) if coordinate != UNKNOWN else 1 << 62
