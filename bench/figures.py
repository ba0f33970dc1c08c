"""Shared by the benchmarks: percentiles, ratios, and one way to print them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

import trio

from cargos.resolve import resolve_cargo
from cargos.store import CargoStore


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """The machine in a line, without its name."""
    name = "unknown processor"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            name = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), name
            )
    except OSError:
        name = platform.processor() or name
    return f"{os.cpu_count()} cores, {name}, Python {platform.python_version()}, {platform.system()}"


def model_path(cargo: str = "smollm2-135m") -> str:
    """The weights of a Cargo (of the demo's), fetched into the store if need be."""

    async def fetch() -> str:
        entry = resolve_cargo(cargo)
        files = await CargoStore().ensure(entry.manifest, base=None)
        return str(next(iter(files.values())))

    return trio.run(fetch)


def header(title: str) -> None:
    """What every benchmark prints first, so that a result can be cited."""
    print(f"# {title}\n{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine()}")


def row(label: str, *cells: str) -> None:
    print(f"  {label:<44}" + "".join(f"{cell:>14}" for cell in cells))
