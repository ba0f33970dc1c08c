"""Randomness that replays.

A draw is a pure function of (seed, stream, counter): BLAKE2b of the three (RFC 7693), so a node's whole
generator is two integers, draws can be repeated out of order, and a run on another machine throws the
same numbers. (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, has the idea.) Not for
keys: secrets come from the operating system, in the shell.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

_TWO_53: Final = float(1 << 53)
_MASK_64: Final = (1 << 64) - 1


def draw_u64(seed: int, stream: int, counter: int) -> int:
    """The 64-bit draw at this place. Arguments are taken modulo 2**64."""
    place = struct.pack("<QQQ", seed & _MASK_64, stream & _MASK_64, counter & _MASK_64)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")


def draw_unit(seed: int, stream: int, counter: int) -> float:
    """Uniform in [0, 1), 53 bits."""
    return (draw_u64(seed, stream, counter) >> 11) / _TWO_53


class Dice:
    """A sequence of draws keyed (seed, stream). `counter` is its whole state."""

    __slots__ = ("counter", "seed", "stream")

    def __init__(self, seed: int, stream: int = 0, counter: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self.counter = counter

    def u64(self) -> int:
        value = draw_u64(self.seed, self.stream, self.counter)
        self.counter += 1
        return value

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        return (self.u64() >> 11) / _TWO_53

    def below(self, bound: int) -> int:
        """Uniform in 0..bound-1, without bias (rejection). Raises ValueError if bound < 1."""
        if not 1 <= bound <= 1 << 63:
            raise ValueError(f"bound must lie between 1 and 2**63, not {bound}")
        limit = (1 << 64) - (1 << 64) % bound
        while (value := self.u64()) >= limit:
            pass
        return value % bound

    def exponential(self, mean: float) -> float:
        """Exponentially distributed with this mean (same unit as the mean)."""
        return -mean * math.log1p(-self.unit())

    def choice(self, items: Sequence[T]) -> T:
        """One item, uniformly. Raises ValueError if there is none."""
        if not items:
            raise ValueError("choice from an empty sequence")
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`min(count, len(items))` different items in random order (partial Fisher-Yates)."""
        pool = list(items)
        taken = min(count, len(pool))
        for i in range(taken):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:taken]
