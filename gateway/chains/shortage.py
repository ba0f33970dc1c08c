"""Why Islands can not hold a model together, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocol.ring import MAX_STAGES, MIN_STAGES
from routing.chains.plan import ModelShape

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Shortage:
    """`detail`: for people. What would do: so many Islands with as much room as those here have on average
    (`room_mib`), or as many Islands as there are (`here`) with so much room each. None: nothing would.
    """

    detail: str
    here: int
    room_mib: int
    enough_islands: int | None
    enough_room_mib: int | None


def shortage_of(shape: ModelShape, rooms: Sequence[int], elsewhere_mib: int = 0) -> Shortage:
    """Why nothing fits, and what would. `rooms`: bytes that each Island offers. `elsewhere_mib`: what layers of
    other models take there, all together.
    """
    here = len(rooms)
    room = sum(rooms) // max(1, here)
    most_mib = -(-shape.total_bytes // _MIB)

    def fits(islands: int, room_bytes: int) -> bool:
        """Each takes as many layers as it can; with equal rooms nothing goes farther."""
        at = 0
        for _ in range(islands):
            ends = [end for end in range(at + 1, shape.layers + 1) if shape.bytes_of(at, end) <= room_bytes]
            at = max(ends, default=at)
        return at == shape.layers

    islands = next((n for n in range(max(here, MIN_STAGES), MAX_STAGES + 1) if fits(n, room)), None)
    count = min(max(here, MIN_STAGES), MAX_STAGES)
    low, high = room // _MIB, most_mib
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(count, middle * _MIB) else (middle, high)
    enough = high if here >= MIN_STAGES and fits(count, high * _MIB) else None
    offer = "Island offers" if here == 1 else "Islands offer"
    detail = f"{most_mib} MiB are needed, {here} {offer} {sum(rooms) // _MIB} MiB"
    if elsewhere_mib:
        detail += f"; {elsewhere_mib} MiB are held for other models, and given up once those are idle"
    return Shortage(detail, here, room // _MIB, islands, enough)
