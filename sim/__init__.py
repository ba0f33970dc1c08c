"""The simulator: a world of virtual time that interprets the very machines that run in production.

    from sim import Scenario, run
    result = run("dht-rtt", nodes=500, seed=3)
    result.metric("lookup latency p50", "rtt-aware")

Guide: docs/simulator.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.scenario import Result, Scenario, ScenarioError, run
    from sim.world import World

__all__ = ["Result", "Scenario", "ScenarioError", "World", "run"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - one of __all__
    """Import on first use: `archi-sim --help` must not load numpy."""
    if name == "World":
        from sim.world import World  # noqa: PLC0415

        return World
    if name in __all__:
        from sim import scenario  # noqa: PLC0415

        return getattr(scenario, name)
    raise AttributeError(f"module 'sim' has no attribute {name!r}")
