"""Provider records: who has what. Each is a peer's word about itself, proved by its connection."""

from __future__ import annotations

from typing import NamedTuple

from dht.coordinates import UNKNOWN, estimate_ns
from dht.limits import (
    MAX_KEYS_PER_PROVIDER,
    MAX_PROVIDER_RECORDS,
    MAX_PROVIDERS,
    MAX_PROVIDERS_IN_ANSWER,
    MAX_PROVIDERS_PER_GROUP,
    MAX_PROVIDERS_PER_KEY,
    SWEEP_GAP_NS,
)
from dht.messages import Outcome
from protocol.dice import Dice
from protocol.instants import SECOND_NS, Instant

#: What has expired is dropped this often.
_SWEEP_NS = 60 * SECOND_NS


class Provider(NamedTuple):
    """`coordinate`: where the provider stood when it said so."""

    expires: int
    coordinate: int
    group: int


class ProviderStore:
    """Providers by key. A full key refuses newcomers: who provides and repeats it stays."""

    __slots__ = ("_by_key", "_by_peer", "_count", "_swept_at")

    def __init__(self) -> None:
        self._by_key: dict[int, dict[int, Provider]] = {}
        self._by_peer: dict[int, int] = {}
        self._count = 0
        self._swept_at = -_SWEEP_NS

    def __len__(self) -> int:
        return self._count

    def add(self, key: int, peer: int, now: Instant, *, coordinate: int, ttl_ns: int, group: int) -> Outcome:
        """Keep that `peer`, of this network group, provides `key` for another `ttl_ns`, if bounds allow it."""
        if now >= self._swept_at + _SWEEP_NS:
            self.expire(now)
        of_key = self._by_key.get(key)
        if of_key is not None and peer in of_key:
            of_key[peer] = Provider(now + ttl_ns, coordinate, group)
            return Outcome.TAKEN
        if not self._has_room(of_key, peer, group):
            if now < self._swept_at + SWEEP_GAP_NS:
                return Outcome.FULL
            self.expire(now)
            if not self._has_room(self._by_key.get(key), peer, group):
                return Outcome.FULL
        self._by_key.setdefault(key, {})[peer] = Provider(now + ttl_ns, coordinate, group)
        self._by_peer[peer] = self._by_peer.get(peer, 0) + 1
        self._count += 1
        return Outcome.TAKEN

    def _has_room(self, of_key: dict[int, Provider] | None, peer: int, group: int) -> bool:
        if self._count >= MAX_PROVIDER_RECORDS or self._by_peer.get(peer, 0) >= MAX_KEYS_PER_PROVIDER:
            return False
        if peer not in self._by_peer and len(self._by_peer) >= MAX_PROVIDERS:
            return False
        if of_key is None:
            return True
        if len(of_key) >= MAX_PROVIDERS_PER_KEY:
            return False
        return not group or sum(p.group == group for p in of_key.values()) < MAX_PROVIDERS_PER_GROUP

    def get(self, key: int, near: int, now: Instant, dice: Dice) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Up to MAX_PROVIDERS_IN_ANSWER providers and their coordinates. If there are more: half of them are
        the nearest to the asker's coordinate `near`, the others drawn, so that nobody stays unheard.
        """
        of_key = self._by_key.get(key)
        if of_key is None:
            return (), ()
        live = [(peer, p.coordinate) for peer, p in of_key.items() if p.expires > now]
        if len(live) > MAX_PROVIDERS_IN_ANSWER:
            half = MAX_PROVIDERS_IN_ANSWER // 2
            if near != UNKNOWN:
                far = 1 << 62
                live.sort(key=lambda item: estimate_ns(item[1], near) if item[1] != UNKNOWN else far)
            live = live[:half] + dice.sample(live[half:], MAX_PROVIDERS_IN_ANSWER - half)
        return tuple(peer for peer, _ in live), tuple(coordinate for _, coordinate in live)

    def forget(self, key: int, peer: int) -> None:
        of_key = self._by_key.get(key)
        if of_key is None or peer not in of_key:
            return
        del of_key[peer]
        if not of_key:
            del self._by_key[key]
        left = self._by_peer[peer] - 1
        if left:
            self._by_peer[peer] = left
        else:
            del self._by_peer[peer]
        self._count -= 1

    def references(self) -> set[int]:
        """Peers that provide something."""
        return set(self._by_peer)

    def expire(self, now: Instant) -> None:
        """Drop what has expired; `add` does it once a minute."""
        self._swept_at = now
        gone = [
            (key, peer)
            for key, of_key in self._by_key.items()
            for peer, provider in of_key.items()
            if provider.expires <= now
        ]
        for key, peer in gone:
            self.forget(key, peer)
