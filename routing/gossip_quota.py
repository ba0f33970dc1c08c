"""A bounded map that stays fair when it is full.

Every entry belongs to an origin (who signed it). Identities are free, so neither "oldest first" (one flood
washes all out) nor "the largest origin first" alone (a thousand fresh origins with one entry each squeeze the
honest large one) is fair. Here origins are in one of two pools: those the owner favours, and strangers.
Strangers hold at most `stranger_capacity` entries and make room first; within a pool the largest origin makes
room; within an origin its oldest entry. So a flood by strangers costs favoured origins nothing, and a
favoured origin can not squeeze out another that holds less than itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

O = TypeVar("O")  # noqa: E741 - an origin; the letter stands alone only in type parameters
K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class _Pool(Generic[O]):
    """Origins by how many entries they have, so that the largest is found at once."""

    by_count: dict[int, OrderedDict[O, None]] = field(default_factory=dict[int, "OrderedDict[O, None]"])
    largest: int = 0
    entries: int = 0

    def moved(self, origin: O, before: int, now: int) -> None:
        self.entries += now - before
        if before:
            row = self.by_count[before]
            del row[origin]
            if not row:
                del self.by_count[before]
        if now:
            self.by_count.setdefault(now, OrderedDict())[origin] = None
        if now > self.largest:
            self.largest = now
        elif before == self.largest:
            # Counts move by one, except when an origin changes its pool: then look.
            self.largest = now if before - now == 1 and now else max(self.by_count, default=0)
            if before in self.by_count:
                self.largest = before

    def first_largest(self) -> O:
        return next(iter(self.by_count[self.largest]))


class QuotaMap(Generic[O, K, V]):
    """`favoured(origin)` is asked when an origin's first entry comes, and again by `reconsider`."""

    def __init__(
        self,
        capacity: int,
        stranger_capacity: int,
        per_origin: int,
        favoured: Callable[[O], bool],
    ) -> None:
        if not 1 <= stranger_capacity <= capacity or per_origin < 1:
            raise ValueError("1 <= stranger_capacity <= capacity and per_origin >= 1 are needed")
        self._capacity: Final = capacity
        self._stranger_capacity: Final = stranger_capacity
        self._per_origin: Final = per_origin
        self._favoured: Final = favoured
        self._entries: dict[O, OrderedDict[K, V]] = {}
        self._in_favour: dict[O, bool] = {}
        self._known: _Pool[O] = _Pool()
        self._strangers: _Pool[O] = _Pool()

    def __len__(self) -> int:
        return self._known.entries + self._strangers.entries

    @property
    def strangers(self) -> int:
        """Entries of origins that are not favoured."""
        return self._strangers.entries

    def get(self, origin: O, key: K) -> V | None:
        entries = self._entries.get(origin)
        return None if entries is None else entries.get(key)

    def of(self, origin: O) -> Iterator[tuple[K, V]]:
        """An origin's entries, the one written longest ago first."""
        return iter(tuple(self._entries.get(origin, OrderedDict[K, V]()).items()))

    def __iter__(self) -> Iterator[tuple[O, K, V]]:
        """All entries, by origin in the order in which they first came."""
        for origin, entries in tuple(self._entries.items()):
            for key, value in tuple(entries.items()):
                yield origin, key, value

    def put(self, origin: O, key: K, value: V) -> list[tuple[O, K, V]]:
        """Write an entry; returns the entries that had to go for it: itself, if it is a stranger's and no
        stranger has one to give.
        """
        entries = self._entries.get(origin)
        if entries is not None and key in entries:
            entries[key] = value
            entries.move_to_end(key)
            return []
        gone: list[tuple[O, K, V]] = []
        if entries is None:
            favoured = self._in_favour[origin] = self._favoured(origin)
            entries = self._entries[origin] = OrderedDict()
        else:
            favoured = self._in_favour[origin]
        pool = self._known if favoured else self._strangers
        if len(entries) >= self._per_origin:
            gone.append(self._evict(origin))
        elif not favoured and self._strangers.entries >= self._stranger_capacity:
            gone.append(self._make_room(self._strangers, origin))
        elif len(self) >= self._capacity:
            if not favoured and not self._strangers.entries:
                del self._entries[origin], self._in_favour[origin]
                return [(origin, key, value)]
            gone.append(self._make_room(self._strangers if self._strangers.entries else self._known, origin))
        # The victim may have been this origin's only entry.
        entries = self._entries.setdefault(origin, OrderedDict())
        self._in_favour[origin] = favoured
        entries[key] = value
        pool.moved(origin, len(entries) - 1, len(entries))
        return gone

    def pop(self, origin: O, key: K) -> V | None:
        entries = self._entries.get(origin)
        if entries is None or key not in entries:
            return None
        value = entries.pop(key)
        self._shrunk(origin)
        return value

    def reconsider(self) -> list[tuple[O, K, V]]:
        """Ask again who is favoured; returns the strangers' entries that no longer have room."""
        for origin, entries in self._entries.items():
            favoured = self._favoured(origin)
            if favoured != self._in_favour[origin]:
                old, new = (self._strangers, self._known) if favoured else (self._known, self._strangers)
                old.moved(origin, len(entries), 0)
                new.moved(origin, 0, len(entries))
                self._in_favour[origin] = favoured
        gone: list[tuple[O, K, V]] = []
        while self._strangers.entries > self._stranger_capacity:
            gone.append(self._evict(self._strangers.first_largest()))
        return gone

    def _make_room(self, pool: _Pool[O], origin: O) -> tuple[O, K, V]:
        """The largest of the pool gives; among equals the newcomer itself, if it is one of them."""
        held = len(self._entries[origin])
        own = held == pool.largest and held and origin in pool.by_count[held]
        return self._evict(origin if own else pool.first_largest())

    def _evict(self, origin: O) -> tuple[O, K, V]:
        key, value = self._entries[origin].popitem(last=False)
        self._shrunk(origin)
        return origin, key, value

    def _shrunk(self, origin: O) -> None:
        left = len(self._entries[origin])
        pool = self._known if self._in_favour[origin] else self._strangers
        pool.moved(origin, left + 1, left)
        if not left:
            del self._entries[origin], self._in_favour[origin]
