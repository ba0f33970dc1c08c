"""The items one peer holds, their digests, and what it has seen of late."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from protocol.instants import UnixNs
from routing.gossip_messages import BUCKETS, ID_BITS, MAX_IDS, Item
from routing.gossip_quota import QuotaMap

_SUM_MASK: Final = (1 << ID_BITS) - 1

Key = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Held:
    item: Item
    id: int
    expires_unix_ns: UnixNs


def supersedes(item: Item, other: Item) -> bool:
    """The law of two items with one key: the higher version stands, among equals the greater payload."""
    return (item.version, item.payload) > (other.version, other.payload)


class ItemStore:
    """Bounded by count per `QuotaMap`. A sum of ids stands for a set of them: equal sets have equal sums,
    unequal ones almost never (63 bits), unless somebody worked to make his own items collide, which hides
    only those from a comparison.
    """

    def __init__(
        self, capacity: int, stranger_capacity: int, per_origin: int, favoured: Callable[[bytes], bool]
    ) -> None:
        self._held: QuotaMap[bytes, Key, Held] = QuotaMap(capacity, stranger_capacity, per_origin, favoured)
        self._by_id: dict[int, Held] = {}
        self._buckets: list[dict[int, None]] = [{} for _ in range(BUCKETS)]
        self._sums: list[int] = [0] * BUCKETS
        self._expiry: list[tuple[UnixNs, int]] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Held]:
        for _, _, held in self._held:
            yield held

    def get(self, item_id: int) -> Held | None:
        return self._by_id.get(item_id)

    def standing(self, item: Item) -> Held | None:
        """What stands now at the item's key."""
        return self._held.get(item.origin, (item.kind, item.name))

    def put(self, item: Item, item_id: int, expires_unix_ns: UnixNs) -> bool:
        """Hold an item that supersedes what stands at its key. False if there was no room for it."""
        held = Held(item, item_id, expires_unix_ns)
        before = self.standing(item)
        gone = self._held.put(item.origin, (item.kind, item.name), held)
        if before is not None:
            self._unindex(before.id)
        self._by_id[item_id] = held
        bucket = item_id % BUCKETS
        self._buckets[bucket][item_id] = None
        self._sums[bucket] = (self._sums[bucket] + item_id) & _SUM_MASK
        heapq.heappush(self._expiry, (expires_unix_ns, item_id))
        self._drop(gone)
        if len(self._expiry) > 2 * len(self._by_id) + BUCKETS:  # superseded items leave theirs behind
            self._expiry = [(one.expires_unix_ns, one.id) for one in self._by_id.values()]
            heapq.heapify(self._expiry)
        return item_id in self._by_id

    def expire(self, now: UnixNs) -> int:
        """Forget what has expired; how many."""
        count = 0
        while self._expiry and self._expiry[0][0] < now:
            _, item_id = heapq.heappop(self._expiry)
            held = self._by_id.get(item_id)
            if held is not None and held.expires_unix_ns < now:
                self._held.pop(held.item.origin, (held.item.kind, held.item.name))
                self._unindex(item_id)
                count += 1
        return count

    def next_expiry(self) -> UnixNs | None:
        return self._expiry[0][0] if self._expiry else None

    def reconsider(self) -> None:
        self._drop(self._held.reconsider())

    # --- digests --------------------------------------------------------------------------------

    def total(self) -> int:
        return sum(self._sums) & _SUM_MASK

    def sums(self) -> tuple[int, ...]:
        return tuple(self._sums)

    def ids_in(self, buckets: Iterable[int]) -> list[int]:
        """Ids in these buckets."""
        return [item_id for bucket in buckets for item_id in self._buckets[bucket]]

    def differing(self, sums: tuple[int, ...], first: int) -> tuple[list[int], list[int]]:
        """(buckets whose sums differ, our ids in them), beginning at bucket `first` and going round, as many
        as fit in one message.
        """
        buckets: list[int] = []
        ids: list[int] = []
        for step in range(BUCKETS):
            bucket = (first + step) % BUCKETS
            if self._sums[bucket] == sums[bucket]:
                continue
            here = list(self._buckets[bucket])
            if len(ids) + len(here) > MAX_IDS:
                if not buckets:
                    return [bucket], here[:MAX_IDS]
                break
            buckets.append(bucket)
            ids += here
        return buckets, ids

    def _drop(self, gone: list[tuple[bytes, Key, Held]]) -> None:
        for _, _, held in gone:
            self._unindex(held.id)

    def _unindex(self, item_id: int) -> None:
        del self._by_id[item_id]
        bucket = item_id % BUCKETS
        del self._buckets[bucket][item_id]
        self._sums[bucket] = (self._sums[bucket] - item_id) & _SUM_MASK


class RecentIds:
    """Items that need not be asked for (again): held, superseded, refused or expired; and how often each
    came. The oldest are forgotten first; to forget one costs at most a repeated transfer.
    """

    def __init__(self, capacity: int) -> None:
        self._copies: OrderedDict[int, int] = OrderedDict()
        self._capacity = capacity

    def __contains__(self, item_id: int) -> bool:
        return item_id in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    def clear(self) -> None:
        self._copies.clear()

    def count(self, item_id: int) -> int:
        """It came (once more); how often by now."""
        copies = self._copies[item_id] = self._copies.get(item_id, 0) + 1
        if len(self._copies) > self._capacity:
            self._copies.popitem(last=False)
        return copies
