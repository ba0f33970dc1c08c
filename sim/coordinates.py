"""Network coordinates of a network at rest, without simulating its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dht.coordinates import Vivaldi
from sim.draws import Draws
from sim.world import World

#: Rounds of Vivaldi between random pairs; its error stops falling after some 30.
REST_ROUNDS: Final = 32


def settle(world: World, vivaldis: Mapping[int, Vivaldi], dice: Draws) -> dict[int, int]:
    """Let each node measure random others for some rounds; gives the packed coordinates by node."""
    nodes = list(vivaldis)
    for _ in range(REST_ROUNDS):
        for node in nodes:
            other = nodes[dice.below(len(nodes))]
            if other != node:
                there = vivaldis[other]
                vivaldis[node].sample(there.packed, there.error_parts, world.rtt_ns(node, other), dice)
    return {node: vivaldi.packed for node, vivaldi in vivaldis.items()}
