"""One session in a stage: which of its rows are in memory, and which were fed and wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

from cargos.runtimes.shards.native import StageContext, Values
from protocol.ring import Dtype


@dataclass(slots=True)
class _Block:
    """Rows that were fed together and are not computed yet."""

    values: Values
    arrived_ns: int


class Resident:
    """`have`: rows in memory. `context`, `sequence`: where; None while it waits for a place.

    `prompt`: rows of its prompt; in a head it is known when the job is prepared.
    """

    def __init__(self, key: int, dtype: Dtype, prompt: int, *, deterministic: bool) -> None:
        self.key: Final = key
        self.dtype: Final[Dtype] = dtype
        self.prompt = prompt
        self.deterministic: Final = deterministic
        self.context: StageContext | None = None
        self.sequence = -1
        self.have = 0
        self._blocks: deque[_Block] = deque()

    @property
    def pending(self) -> int:
        """Rows that wait."""
        return sum(len(block.values) for block in self._blocks)

    @property
    def until(self) -> int:
        """The position after the last row that was fed."""
        return self.have + self.pending

    @property
    def front(self) -> int:
        """How many of the next rows were fed together."""
        return len(self._blocks[0].values) if self._blocks else 0

    @property
    def since_ns(self) -> int:
        """When the next row came."""
        return self._blocks[0].arrived_ns if self._blocks else 0

    def feed(self, position: int, values: Values, now_ns: int) -> None:
        """Rows from `position` on, in place of what was there. Raises ValueError for a gap before them."""
        if position > self.until:
            raise ValueError(f"rows from {position} on, where {self.until} is next")
        self.cut(position)
        self._blocks.append(_Block(values, now_ns))

    def cut(self, position: int) -> None:
        """Forget what there is from `position` on."""
        while self._blocks and self.until > position:
            block = self._blocks.pop()
            start = self.until
            if start < position:
                self._blocks.append(_Block(block.values[: position - start], block.arrived_ns))
        if position < self.have:
            if self.context is not None and not self.context.cut(self.sequence, position):
                raise ValueError("this model's memory can not be cut")
            self.have = position

    def take(self, count: int) -> Values:
        """The next `count` rows, which are being computed now."""
        taken: list[Values] = []
        while count > 0:
            block = self._blocks[0]
            part = block.values[:count]
            taken.append(part)
            count -= len(part)
            if len(part) == len(block.values):
                self._blocks.popleft()
            else:
                block.values = block.values[len(part) :]
        return taken[0] if len(taken) == 1 else np.concatenate(taken)
