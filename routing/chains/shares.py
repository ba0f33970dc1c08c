"""A chain's price, shared by measured work: layers times rows kept, and the head's vocabulary beside it.

Integers throughout, and the shares add up to the price exactly (largest remainder, Hamilton's method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routing.chains.costs import VOCABULARY_LAYERS


@dataclass(frozen=True, slots=True)
class StageDone:
    """What a stage is paid for. `rows`: kept at the end, not computed: drafts that were wrong and replays are
    the chain's own affair. `sampled`: rows of which the head computed the vocabulary; 0 for others.
    """

    layers: int
    rows: int
    sampled: int = 0

    @property
    def work(self) -> int:
        """In rows of one layer. The vocabulary counts as `VOCABULARY_LAYERS`."""
        return self.layers * self.rows + VOCABULARY_LAYERS * self.sampled


def shares(price: int, done: Sequence[StageDone]) -> tuple[int, ...]:
    """The price's part of each stage, in the order given. Where nobody did anything measurable, by layers.

    Raises ValueError if there is no stage, or a negative number.
    """
    if any(min(each.layers, each.rows, each.sampled) < 0 for each in done):
        raise ValueError("work is never negative")
    weights = [each.work for each in done]
    if not any(weights):
        weights = [each.layers for each in done]
    return split_exactly(price, weights)


def split_exactly(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` in proportion to `weights` (all equal if all are 0), summing up to it exactly.

    Who is rounded down most gets one more; of equals the first. Raises ValueError on a negative number or if
    there is nobody to share it.
    """
    if not weights or total < 0 or min(weights) < 0:
        raise ValueError("a share needs somebody to get it, and nothing negative")
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    remainders = [total * weight % whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda n: (-remainders[n], n))
    for n in order[: total - sum(parts)]:
        parts[n] += 1
    return tuple(parts)
