"""The shard runtime: a contiguous range of a model's layers, and the head where sampling happens.

`open_stage` loads a slice of a GGUF into a supervised worker process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cargos.runtimes.shards.head_runtime import ShardHead
    from cargos.runtimes.shards.opening import open_stage
    from cargos.runtimes.shards.runtime import SessionMemory, ShardOptions, ShardStage

__all__ = ["SessionMemory", "ShardHead", "ShardOptions", "ShardStage", "open_stage"]


def __getattr__(name: str) -> object:
    # Late, because the worker process imports this package too and has no use for trio: it starts sooner.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cargos.runtimes.shards import head_runtime, opening, runtime  # noqa: PLC0415  (the reason is the line above)

    homes = {"ShardHead": head_runtime, "open_stage": opening}
    return getattr(homes.get(name, runtime), name)
