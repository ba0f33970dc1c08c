"""`open_stage`: a slice of a model becomes a stage, or a head if it has the last layer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from cargos.runtimes.llama.supervise import kept_running
from cargos.runtimes.shards.base import OnEvent, StageSpec
from cargos.runtimes.shards.head_runtime import ShardHead
from cargos.runtimes.shards.runtime import ShardOptions, ShardStage


@asynccontextmanager
async def open_stage(
    spec: StageSpec, on_event: OnEvent, options: ShardOptions | None = None
) -> AsyncGenerator[ShardStage]:
    """Load a slice; it is a `ShardHead` if the slice has the last layer.

    Yields at once; the slice loads meanwhile (`load().state`, `ready()`), and what the stage is told before is
    done then. On leaving, the worker is gone.
    """
    made = ShardHead if spec.is_head else ShardStage
    stage = made(spec, on_event, options or ShardOptions())
    async with kept_running(stage.supervise):
        yield stage
