"""An Island in a process of its own, whose engine is a script: MANIFEST CACHE DATA BOOTSTRAP UPLOAD_MBIT.

Prints `listening ADDRESS`, and `loaded SHA256` of the file that it was given to run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from bench.scripted_island import ScriptedRuntime
from cargos.manifest import RuntimeType
from cargos.runtimes.base import RuntimeSpec
from node.config import LogSettings, NetworkSettings, NodeSettings, OverlaySettings, PieceSettings
from node.island import Island
from node.runner import run_program
from node.state import IslandState

manifest, cache, data, bootstrap, upload_mbit = sys.argv[1:]


@asynccontextmanager
async def open_script(spec: RuntimeSpec) -> AsyncGenerator[ScriptedRuntime]:
    data = await trio.Path(next(iter(spec.files.values()))).read_bytes()
    print(f"loaded {hashlib.sha256(data).hexdigest()}", flush=True)
    yield ScriptedRuntime(1000, stamp=False)


async def ready(state: IslandState) -> None:
    print(f"listening {state.host.addresses[0]}", flush=True)


settings = NodeSettings(
    data_dir=data,
    cache_dir=cache,
    cargos=(manifest,),
    network=NetworkSettings(bootstrap=(bootstrap,) if bootstrap else ()),
    overlay=OverlaySettings(provider_ttl_s=60),
    pieces=PieceSettings(upload_mbit=int(upload_mbit)),
)
sys.exit(
    run_program(
        lambda: Island(settings, {RuntimeType.LLMCPP: open_script}).run(ready=ready),
        logs=LogSettings(level="debug", format="json"),
    )
)
