"""Whose layers have the memory: what is free, what is idle, and what gives way to a Cargo that is asked for.

Layers stay as long as nobody wants their memory, however long they were of no use. Once they are idle, an
order for another Cargo that somebody asks for may have it; the least recently used ones go first. So of two
Cargos that do not both fit, the one that is used stays, and memory changes hands once in the idle time at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from node.shards.hosted import HostedShard

#: Layers that nobody has used since they were loaded were ordered in advance, or by one who has gone: they get
#: so long to be used once. Longer than consumers wait before they ask again, shorter than what was used before.
UNUSED_S: Final = 60.0

_MINUTE_S: Final = 60.0


class ShardMemory:
    """`idle_minutes`: layers unused for so long give way; 0: none ever do. Times are seconds of one clock."""

    def __init__(self, room_mib: int, *, idle_minutes: int) -> None:
        self.room_mib: Final = room_mib
        self._idle_s: Final = idle_minutes * _MINUTE_S

    def free_mib(self, shard: HostedShard, shards: Iterable[HostedShard]) -> int:
        """What layers of this Cargo may take, beside those that are wanted of others."""
        others = sum(other.mib_of(*other.wanted) for other in shards if other is not shard)
        return max(0, self.room_mib - others)

    def fits_now(self, shard: HostedShard, shards: Iterable[HostedShard]) -> bool:
        """Whether the layers that are wanted of it fit beside what others still occupy."""
        others = sum(other.mib_of(*other.occupied) for other in shards if other is not shard)
        return others + shard.mib_of(*shard.wanted) <= self.room_mib

    def is_idle(self, shard: HostedShard, now: float) -> bool:
        """Whether its layers give way. Such as could not be loaded do: they are of no use to anybody."""
        if not self._idle_s or shard.wanted == (0, 0):
            return False
        if shard.state == "failed":
            return True
        if shard.state != "ready" or shard.wanted != (shard.first, shard.last):
            return False
        was_used = shard.used_at >= shard.ready_at
        since, patience_s = (shard.used_at, self._idle_s) if was_used else (shard.ready_at, UNUSED_S)
        return now - since >= min(patience_s, self._idle_s)

    def giving_way(
        self, shard: HostedShard, needed_mib: int, shards: Iterable[HostedShard], now: float
    ) -> list[HostedShard] | None:
        """Those that must go so that layers of `shard` have their memory; None if that is not enough."""
        every = list(shards)
        missing = needed_mib - self.free_mib(shard, every)
        idle = [other for other in every if other is not shard and self.is_idle(other, now)]
        idle.sort(key=lambda other: max(other.used_at, other.ready_at))
        going: list[HostedShard] = []
        for other in idle:
            if missing <= 0:
                break
            going.append(other)
            missing -= other.mib_of(*other.wanted)
        return going if missing <= 0 else None
