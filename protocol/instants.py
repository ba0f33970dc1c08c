"""Time as integers.

`Instant` is nanoseconds on the caller's own monotonic clock (in the simulator: virtual time); it means
nothing on another machine and never travels. `UnixNs` is nanoseconds of civil time since 1970 (UTC);
it travels in envelopes and receipts and is only ever compared with a tolerance. Pure code receives both
as arguments and never reads a clock.
"""

from __future__ import annotations

from typing import Final, NewType

Instant = NewType("Instant", int)
UnixNs = NewType("UnixNs", int)

MICROSECOND_NS: Final = 1_000
MILLISECOND_NS: Final = 1_000_000
SECOND_NS: Final = 1_000_000_000


def seconds_to_ns(seconds: float) -> int:
    """Nearest whole number of nanoseconds. Raises ValueError on NaN, infinities and negatives."""
    if not 0 <= seconds < 1e9:
        raise ValueError(f"a duration in seconds between 0 and 1e9 was expected, not {seconds!r}")
    return round(seconds * SECOND_NS)


def ns_to_seconds(duration_ns: int) -> float:
    return duration_ns / SECOND_NS


def ns_to_ms(duration_ns: int) -> float:
    return duration_ns / MILLISECOND_NS


def after(start: Instant, duration_ns: int) -> Instant:
    return Instant(start + duration_ns)
