"""How often somebody may ask for something: token buckets, one per key, of bounded number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

#: Keys that are remembered; beyond it the one unused for longest is forgotten, which gives it a full bucket.
MAX_RATED_KEYS: Final = 4096


class RateLimit(Generic[K]):
    """`burst` at once, and as many again each `per_s` seconds, for each key by itself."""

    def __init__(self, burst: int, *, per_s: float) -> None:
        self._burst: Final = burst
        self._per_s: Final = per_s
        self._buckets: OrderedDict[K, tuple[float, float]] = OrderedDict()

    def take(self, key: K, now_s: float) -> bool:
        """Is one more allowed at this moment? Then it is counted."""
        tokens, at = self._buckets.pop(key, (float(self._burst), now_s))
        tokens = min(float(self._burst), tokens + (now_s - at) * self._burst / self._per_s)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now_s)
        if len(self._buckets) > MAX_RATED_KEYS:
            self._buckets.popitem(last=False)
        return allowed
