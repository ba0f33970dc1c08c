"""Routing tables of a network at rest, all of a node's buckets at a time.

Of each bucket's key range k nodes; in an RTT-aware network the first `senior_entries` drawn and the nearest of
REST_POOL times k drawn ones. The own neighbourhood is complete. Draws are SHAKE-256's (`sim.draws.BulkDraws`);
numpy adds, compares and sorts whole numbers only, so that tables are the same on every machine.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dht.coordinates import UNKNOWN
from dht.directory import Keys
from dht.keys import KEY_BITS
from dht.policy import DhtPolicy
from dht.table import MAX_BUCKETS, VERIFIED, RoutingTable
from sim.draws import BulkDraws
from sim.world import World

#: Candidates per place that a table at rest has chosen among, by RTT: the nearest k of so many times k.
#: Measured: live nodes among 10,000 come to a mean RTT of 44 ms in their far buckets after ten minutes (plain:
#: 94 ms), whether they began with random or half sorted tables; built ones have 51 ms with 8, 45 with 16, 42
#: with 32. So 16 is a network after ten minutes; after hours it is better.
REST_POOL: Final = 16

# An entry is one integer that sorts by round trip, then by node: nanoseconds above, the node below.
_NODE_BITS: Final = 24
_NODE_MASK: Final = (1 << _NODE_BITS) - 1
_NOBODY: Final = (1 << 63) - 1

# A place in the order of keys, as one integer: access line (both ways), site, node.
_SITE_BITS: Final = 12
_SITE_MASK: Final = (1 << _SITE_BITS) - 1

#: Bits for a draw's number within its bucket: k may be 64, so that 1280 are drawn.
_DRAW_BITS: Final = 11

Entries = NDArray[np.int64]


class RestTables:
    """`serving`: (key, node), sorted. `measured`: whether entries have round trips; those of a connection that
    is yet to be made have none.
    """

    def __init__(
        self,
        world: World,
        policy: DhtPolicy,
        serving: Sequence[tuple[int, int]],
        coordinates: Mapping[int, int],
        *,
        measured: bool,
    ) -> None:
        if world.nodes > _NODE_MASK or world.links.sites > _SITE_MASK:
            raise ValueError(f"tables at rest are for fewer than {_NODE_MASK} nodes and {_SITE_MASK} sites")
        self._world = world
        self._policy = policy
        self._measured = measured
        self._sorted = [key for key, _ in serving]
        self._coordinates = np.full(world.nodes, UNKNOWN, np.uint64)
        self._coordinates[list(coordinates)] = np.fromiter(coordinates.values(), np.uint64, len(coordinates))
        self._round_trips = np.array(world.links.round_trips, np.int64).reshape(world.links.sites, -1)
        self._access = [2 * world.access_ns(node) for node in range(world.nodes)]
        nodes = [node for _, node in serving]
        packed = [
            (self._access[node] << _SITE_BITS | world.site_of(node)) << _NODE_BITS | node for node in nodes
        ]
        self._packed = np.array(packed, np.int64)
        k = policy.k
        self._pool = k * REST_POOL if policy.rtt_aware else k
        self._draws = self._pool + self._pool // 4
        self._numbers = np.arange(self._draws, dtype=np.int64)

    def fill(self, table: RoutingTable, node: int, keys: Keys, dice: BulkDraws) -> None:
        """Write a node's table as one piece."""
        buckets = self.buckets(node, keys[node], dice)
        entries = np.concatenate(buckets)
        count = len(entries)
        peers = entries & _NODE_MASK
        table.peers = array("I", peers.astype(np.uint32).tobytes())
        table.coordinates = array("Q", self._coordinates[peers].tobytes())
        table.rtts_us = array("I", self.rtts_us(entries).astype(np.uint32).tobytes())
        table.checked = array("I", bytes(4 * count))
        table.since = array("I", bytes(4 * count))
        table.groups = array("H", bytes(2 * count))
        table.flags = bytearray([VERIFIED]) * count
        table.starts = array("H", accumulate((len(bucket) for bucket in buckets), initial=0))

    def rtts_us(self, entries: Entries) -> Entries:
        """Round trips as tables hold them."""
        if not self._measured:
            return np.zeros(len(entries), np.int64)
        return np.maximum((entries >> _NODE_BITS) // 1000, 1)

    @staticmethod
    def peers(entries: Entries) -> list[int]:
        return (entries & _NODE_MASK).tolist()

    def buckets(self, node: int, key: int, dice: BulkDraws) -> list[Entries]:
        """Entries by bucket: bucket i shares i bits with the node, the last one all that share more."""
        k = self._policy.k
        spans, start, end = self._spans(key)
        own = self._entries(node, self._packed[start:end])
        last = own[own & _NODE_MASK != node][:k]
        large = [number for number, (left, right) in enumerate(spans) if right - left > k]
        chosen = self._chosen(node, [spans[number] for number in large], dice)
        found = [self._entries(node, self._packed[left:right]) for left, right in spans]
        for number, entries in zip(large, chosen, strict=True):
            found[number] = entries
        return [*found, last]

    def _spans(self, key: int) -> tuple[list[tuple[int, int]], int, int]:
        """Where the nodes of each bucket but the last stand in the order of keys; then those of the last."""
        ordered, k = self._sorted, self._policy.k
        spans: list[tuple[int, int]] = []
        start, end = 0, len(ordered)
        for bit in range(MAX_BUCKETS - 1):
            if end - start <= k:
                break
            shift = KEY_BITS - 1 - bit
            middle = bisect_left(ordered, (key >> shift | 1) << shift, start, end)
            if key >> shift & 1:
                spans.append((start, middle))
                start = middle
            else:
                spans.append((middle, end))
                end = middle
        return spans, start, end

    def _entries(self, node: int, packed: Entries) -> Entries:
        """Places in the order of keys as entries of this node."""
        world = self._world
        rtts_ns = self._round_trips[world.site_of(node)][packed >> _NODE_BITS & _SITE_MASK]
        rtts_ns = rtts_ns + (packed >> (_NODE_BITS + _SITE_BITS)) + self._access[node]
        return rtts_ns << _NODE_BITS | packed & _NODE_MASK

    def _chosen(self, node: int, spans: Sequence[tuple[int, int]], dice: BulkDraws) -> list[Entries]:
        """Of each span with more than k nodes those that stand in the table. A row per span."""
        if not spans:
            return []
        policy = self._policy
        left = np.array([span[0] for span in spans], np.int64)[:, None]
        size = np.array([span[1] - span[0] for span in spans], np.int64)[:, None]
        drawn = [number for number, (start, end) in enumerate(spans) if end - start > self._pool]
        places = np.minimum(self._numbers, size - 1)
        fresh = self._numbers < size
        if drawn:
            u32s = np.frombuffer(dice.rows(self._draws, len(drawn)), np.uint32).astype(np.int64)
            places[drawn] = u32s.reshape(len(drawn), -1) * size[drawn] >> 32
            fresh[drawn] = self._first_time(places[drawn])
        number = np.cumsum(fresh, axis=1)
        entries = self._entries(node, self._packed[left + places])
        if not policy.rtt_aware:
            taken = fresh & (number <= policy.k)
            return [row[mask] for row, mask in zip(entries, taken, strict=True)]
        seniors = fresh & (number <= policy.senior_entries)
        others = fresh & (number > policy.senior_entries) & (number <= self._pool)
        wanted = policy.k - policy.senior_entries
        near = np.where(others, entries, _NOBODY)
        if wanted:
            near.partition(wanted - 1, axis=1)
        near = np.sort(near[:, :wanted], axis=1)
        return [
            np.concatenate((row[first], rest[rest != _NOBODY]))
            for row, first, rest in zip(entries, seniors, near, strict=True)
        ]

    def _first_time(self, places: Entries) -> NDArray[np.bool_]:
        """Which draws of a row gave a place that none before them gave."""
        ordered = np.sort(places << _DRAW_BITS | self._numbers, axis=1)
        again = np.zeros(places.shape, np.bool_)
        again[:, 1:] = ordered[:, 1:] >> _DRAW_BITS == ordered[:, :-1] >> _DRAW_BITS
        rows, columns = np.nonzero(again)
        first = np.ones(places.shape, np.bool_)
        first[rows, ordered[rows, columns] & ((1 << _DRAW_BITS) - 1)] = False
        return first
