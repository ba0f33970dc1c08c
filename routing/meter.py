"""How much each peer asks of us: token buckets, for as many peers as there is room for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from protocol.instants import SECOND_NS, Instant

P = TypeVar("P")


class Allowance(Enum):
    GRANTED = "granted"
    #: Too fast: say so.
    REFUSED = "refused"
    #: It was told and goes on all the same. This comes once; from then on:
    FLOODING = "flooding"
    #: An answer would only double the flood.
    IGNORED = "ignored"


@dataclass(slots=True)
class _Bucket:
    tokens_ns: int
    filled: Instant
    flooding: bool = False


class RateMeter(Generic[P]):
    """Admits `per_s` messages a second from each peer, `burst` at once. As many refusals are answered as a
    bucket holds. A forgotten peer starts with a full bucket, which is worth one burst per connection.
    """

    def __init__(self, per_s: int, burst: int, capacity: int) -> None:
        # A token is worth the time in which it comes; so all is whole nanoseconds.
        self._token_ns: Final = SECOND_NS // per_s
        self._full_ns: Final = burst * self._token_ns
        self._capacity: Final = capacity
        self._buckets: OrderedDict[P, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, now: Instant, peer: P) -> Allowance:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = _Bucket(self._full_ns, now)
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(peer)
        bucket.tokens_ns = min(self._full_ns, bucket.tokens_ns + max(0, now - bucket.filled))
        bucket.filled = max(bucket.filled, now)
        if bucket.tokens_ns - self._token_ns >= 0:
            bucket.tokens_ns -= self._token_ns
            bucket.flooding = False
            return Allowance.GRANTED
        if bucket.tokens_ns - self._token_ns >= -self._full_ns:
            bucket.tokens_ns -= self._token_ns
            return Allowance.REFUSED
        if bucket.flooding:
            return Allowance.IGNORED
        bucket.flooding = True
        return Allowance.FLOODING

    def retry_ns(self, peer: P) -> int:
        """When it may come again."""
        bucket = self._buckets.get(peer)
        return 0 if bucket is None else max(0, self._token_ns - bucket.tokens_ns)
