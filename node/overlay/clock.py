"""How far civil time is from the clock that machines count by.

trio's clock stands still while a computer sleeps, and civil time jumps when somebody, or NTP after a start
without a battery clock, sets it. Either way what was signed until some hour would be refused by everybody, for
ever, if the distance were taken once; so it is looked at every second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog
import trio

from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs

#: How often the two clocks are compared.
LOOK_S: Final = 1.0

#: A smaller difference is not told: NTP moves a clock by less than a millisecond a second, and envelopes
#: tolerate thirty seconds.
STEP_NS: Final = 500 * MILLISECOND_NS

#: From here on it is worth a line in the log.
_NOTABLE_NS: Final = 5 * SECOND_NS

_log = structlog.get_logger("clock")


def monotonic_now() -> Instant:
    """The clock of instants: trio's, which tests can bend."""
    return Instant(round(trio.current_time() * SECOND_NS))


def civil_now() -> UnixNs:
    """What the computer believes the time is."""
    return UnixNs(time.time_ns())


class CivilClock:
    """`offset_ns`: civil time minus the clock of instants. `run` keeps it true."""

    def __init__(self) -> None:
        self.offset_ns = civil_now() - monotonic_now()
        self._subscribers: list[Callable[[int], None]] = []

    def unix_now(self) -> UnixNs:
        """Civil time now, whenever the clocks were compared last."""
        return civil_now()

    def subscribe(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call `callback(offset_ns)` whenever the offset has changed. Returns what ends it."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Compare the clocks now."""
        offset_ns = civil_now() - monotonic_now()
        step_ns = offset_ns - self.offset_ns
        if abs(step_ns) < STEP_NS:
            return
        self.offset_ns = offset_ns
        if abs(step_ns) >= _NOTABLE_NS:
            _log.warning("the clock was set, or this computer slept", by_s=round(step_ns / SECOND_NS, 1))
        for callback in tuple(self._subscribers):
            callback(offset_ns)
