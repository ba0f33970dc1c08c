"""Requests per minute and consumer: the generic cell rate algorithm (ITU-T I.371, annex A).

One integer per consumer: the theoretical arrival time. A full minute's allowance may come at once; after that
one request becomes free each 60/limit seconds. No clock in here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from protocol.instants import SECOND_NS

MINUTE_NS: Final = 60 * SECOND_NS

#: Consumers whose state is kept; the one idle longest is forgotten first (and starts afresh). Keys are few;
#: addresses, in an open gateway, are not: 65,536 cost some 10 MB.
MAX_CONSUMERS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a consumer has now. `wait_ns` is 0 if this request may pass, else the time until one may."""

    limit: int
    remaining: int
    reset_ns: int
    wait_ns: int


class RateLimiter:
    """State of all consumers."""

    def __init__(self) -> None:
        self._arrival: OrderedDict[str, int] = OrderedDict()

    def take(self, consumer: str, limit: int, now_ns: int) -> Allowance:
        """Count one request of this consumer, `limit` a minute (>= 1). A refused one is not counted."""
        step_ns = MINUTE_NS // limit
        arrival = max(self._arrival.pop(consumer, now_ns), now_ns)
        used_after = arrival + step_ns - now_ns
        wait_ns = max(0, used_after - limit * step_ns)
        if wait_ns == 0:
            arrival += step_ns
        self._arrival[consumer] = arrival
        while len(self._arrival) > MAX_CONSUMERS:
            self._arrival.popitem(last=False)
        backlog_ns = arrival - now_ns
        used = -(-backlog_ns // step_ns)
        return Allowance(limit, max(0, limit - used), backlog_ns, wait_ns)


def limit_headers(allowance: Allowance) -> tuple[tuple[str, str], ...]:
    """OpenAI's `x-ratelimit-*` headers; reset is the time until the whole allowance is back."""
    return (
        ("x-ratelimit-limit-requests", str(allowance.limit)),
        ("x-ratelimit-remaining-requests", str(allowance.remaining)),
        ("x-ratelimit-reset-requests", f"{allowance.reset_ns / SECOND_NS:.3f}s"),
    )
