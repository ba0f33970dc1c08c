"""The planner of chains: what gateways, coordinators and the simulator call.

`route` finds the best chain out of ranges that are held, for a job. If there is none, `allocate` says who
should hold which layers, out of Islands with room. Both are pure and deterministic. Their inputs are made of
adverts by `routing.chains.offers`.
"""

from __future__ import annotations

from routing.chains.allocation import Allocation, Assigned, NoAllocation, allocate, best_spare
from routing.chains.costs import ChainCost, Holder, ModelShape, Room, Rtt, Speed
from routing.chains.routes import NoRoute, Route, missing_layers, route

__all__ = [
    "Allocation",
    "Assigned",
    "ChainCost",
    "Holder",
    "ModelShape",
    "NoAllocation",
    "NoRoute",
    "Room",
    "Route",
    "Rtt",
    "Speed",
    "allocate",
    "best_spare",
    "missing_layers",
    "route",
]
