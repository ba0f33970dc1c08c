"""An upper bound on bytes per second, shared by all who take from it in turn."""

from __future__ import annotations

import trio

#: Unused time counts for this long: short pauses of the senders cost no throughput.
_BURST_S = 0.1


class Throttle:
    """At most `bytes_per_s`; 0: no bound. Tasks are served in the order in which they ask, a frame each, so
    that many streams share what there is in equal parts.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._next_at = 0.0
        self._turn = trio.Lock()

    async def take(self, size: int) -> None:
        """Return when `size` bytes may be sent."""
        if not self._rate:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        async with self._turn:
            now = trio.current_time()
            self._next_at = max(self._next_at, now - _BURST_S)
            if self._next_at > now:
                await trio.sleep_until(self._next_at)
            self._next_at += size / self._rate
