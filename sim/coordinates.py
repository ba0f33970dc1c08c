"""Network coordinates of a network at rest, without simulating its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from dht.coordinates import Vivaldi
from sim.draws import BulkDraws, Draws
from sim.world import World

#: Rounds of Vivaldi between random pairs; its error stops falling after some 30.
REST_ROUNDS: Final = 32


def settle(
    world: World,
    vivaldis: Mapping[int, Vivaldi],
    dice: Draws,
    progress: Callable[[float], None] | None = None,
) -> dict[int, int]:
    """Let each node measure random others for some rounds; gives the packed coordinates by node."""
    nodes = list(vivaldis)
    fast = BulkDraws(dice.u64())
    for number in range(REST_ROUNDS):
        if progress is not None:
            progress(number / REST_ROUNDS)
        for node, u32 in zip(nodes, fast.u32s(len(nodes)), strict=True):
            other = nodes[u32 * len(nodes) >> 32]
            if other != node:
                there = vivaldis[other]
                vivaldis[node].sample(there.packed, there.error_parts, world.rtt_ns(node, other), dice)
    return {node: vivaldi.packed for node, vivaldi in vivaldis.items()}
