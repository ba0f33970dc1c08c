"""Random draws of the world: what `protocol.dice` has, in shapes and at speeds that a world needs.

Every stream of draws has a number of its own (`Stream`), so that a change in one part of a scenario (another
workload, say) leaves the dice of all others as they were.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array
from bisect import bisect_right
from enum import IntEnum
from typing import Final

from protocol.dice import Dice
from sim import portable

_BLOCK: Final = struct.Struct("<QQQ")
_EIGHT: Final = struct.Struct("<8Q")
_TWO_53: Final = float(1 << 53)

#: Streams of machines begin here: node n's service s has `MACHINES + n * SERVICES + s`.
MACHINES: Final = 1 << 32
SERVICES: Final = 64


class Stream(IntEnum):
    """Who draws. The numbers are part of what a seed means: never renumber, only add."""

    PLACES = 1
    WIRE = 2
    INFLATION = 3
    KEYS = 4
    CHURN = 5
    WORKLOAD = 6
    ATTACK = 7
    NAT = 8
    BOOTSTRAP = 9
    PROBES = 10
    ISLANDS = 11
    RELAYS = 12
    CHAINS = 13


def machine_stream(node: int, service: int) -> int:
    """The stream of a machine's own dice."""
    return MACHINES + node * SERVICES + service


class Draws(Dice):
    """Dice with the distributions of scenarios. All of them portable (see `sim.portable`)."""

    __slots__ = ()

    def exponential(self, mean: float) -> float:
        """Exponentially distributed with this mean."""
        return -mean * portable.ln(1.0 - self.unit())

    def weibull(self, scale: float, shape: float) -> float:
        """Weibull. Shape below 1: who has stayed long will stay on (session times of real peers)."""
        return scale * portable.power(-portable.ln(1.0 - self.unit()), 1.0 / shape)

    def normal(self) -> float:
        """Standard normal (Marsaglia's polar method, one of its pair)."""
        while True:
            x, y = 2.0 * self.unit() - 1.0, 2.0 * self.unit() - 1.0
            square = x * x + y * y
            if 0.0 < square < 1.0:
                return x * math.sqrt(-2.0 * portable.ln(square) / square)

    def log_normal(self, median: float, sigma: float) -> float:
        """`median * e**(sigma * normal)`."""
        return median * portable.exp(sigma * self.normal())

    def weighted(self, cumulative: list[int]) -> int:
        """An index, by cumulative integer weights."""
        return bisect_right(cumulative, self.below(cumulative[-1]))


class WireDraws:
    """Cheap draws for loss and jitter, one or two per message: eight from each hash instead of one."""

    __slots__ = ("_left", "_seed", "_turn")

    def __init__(self, seed: int) -> None:
        self._seed = seed & ((1 << 64) - 1)
        self._turn = 0
        self._left: list[int] = []

    def u64(self) -> int:
        if not self._left:
            place = _BLOCK.pack(self._seed, Stream.WIRE, self._turn)
            self._left = list(_EIGHT.unpack(hashlib.blake2b(place, digest_size=64).digest()))
            self._turn += 1
        return self._left.pop()

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        return (self.u64() >> 11) / _TWO_53


class BulkDraws:
    """Many small draws at a time: 32 bits each from SHAKE-256 of (seed, turn)."""

    __slots__ = ("_seed", "_turn")

    def __init__(self, seed: int) -> None:
        self._seed = seed & ((1 << 64) - 1)
        self._turn = 0

    def rows(self, count: int, rows: int) -> bytes:
        """What so many calls of `u32s` would give, one after the other, in this machine's byte order."""
        drawn = array("I")
        for _ in range(rows):
            drawn.extend(self.u32s(count))
        return drawn.tobytes()

    def u32s(self, count: int) -> array[int]:
        """So many numbers below 2**32."""
        place = _BLOCK.pack(self._seed, Stream.BOOTSTRAP, self._turn)
        self._turn += 1
        drawn = array("I", hashlib.shake_256(place).digest(4 * count))
        if sys.byteorder == "big":
            drawn.byteswap()
        return drawn
