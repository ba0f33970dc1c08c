"""An Island whose engine is a script: everything but the model is real.

    python -m bench.scripted_island --coordinator ADDRESS [--tokens-per-s R]

For measuring and soaking the mesh and the gateway without spending the processor on inference. It offers a
Cargo named `scripted`; each job gets the words w0, w1, ... at the given rate (0: as fast as grants allow).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from cargos.manifest import RuntimeType
from cargos.runtimes.base import Finished, RuntimeEvent, RuntimeLoad, RuntimeSpec, Tokens
from node.config import LogSettings, NetworkSettings, NodeSettings
from node.island import Island
from node.runner import run_program
from node.state import IslandState
from protocol.jobs import Token, Usage, token_hash
from protocol.work import Work

MANIFEST = """
schema = 1
name = "scripted"
version = "1.0.0"
title = "A script in place of a model"
runtime = "llmcpp"
publisher = "archipelag"
context_length = 262144
licence = {{ spdx = "Apache-2.0" }}
needs = {{ memory_mib = 1 }}

[[files]]
name = "script.txt"
role = "model"
size_bytes = {size}
sha256 = "{sha256}"
sources = ["file:script.txt"]
"""


class ScriptedSession:
    def __init__(self, limit: int, rate: float, resume: tuple[int, ...], granted: int, *, stamp: bool) -> None:
        self._stamp = stamp
        self._limit = limit
        self._period = 1 / rate if rate else 0.0
        self._resumed = len(resume)
        self._next = len(resume)
        self._granted = granted
        self._room = trio.Event()
        self._due = trio.current_time()

    def grant(self, until: int) -> None:
        self._granted = max(self._granted, until)
        self._room.set()

    async def receive(self) -> RuntimeEvent:
        if self._next >= self._limit:
            ids = tuple(range(self._limit))
            usage = Usage(1, self._limit, self._limit - self._resumed)
            return Finished("length", "", usage, token_hash([0]), token_hash(ids))
        while self._next >= self._granted:
            self._room = trio.Event()
            await self._room.wait()
        if self._period:
            self._due = max(self._due + self._period, trio.current_time() - 1)
            await trio.sleep_until(self._due)
        else:
            await trio.lowlevel.checkpoint()
        index = self._next
        self._next += 1
        text = f" {time.monotonic_ns()}" if self._stamp else f" w{index}"
        return Tokens(index, (Token(index, text),))


class ScriptedRuntime:
    def __init__(self, rate: float, *, stamp: bool) -> None:
        self._rate = rate
        self._stamp = stamp
        self._active = 0

    @asynccontextmanager
    async def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AsyncGenerator[ScriptedSession]:
        self._active += 1
        try:
            yield ScriptedSession(work.max_tokens or 256, self._rate, resume, granted, stamp=self._stamp)
        finally:
            self._active -= 1

    def load(self) -> RuntimeLoad:
        return RuntimeLoad("ready", 1000, self._active, 0, self._rate or 1e6, 1e6, 0, 0)


def write_manifest(folder: Path) -> Path:
    """A manifest for the scripted Cargo, with its one file beside it."""
    script = b"w0 w1 w2 ...\n" * 8192  # 100 KiB: large enough that a few tokens of it count as work
    (folder / "script.txt").write_bytes(script)
    path = folder / "scripted.toml"
    path.write_text(MANIFEST.format(size=len(script), sha256=hashlib.sha256(script).hexdigest()))
    return path


async def run(coordinator: str, rate: float, name: str, *, stamp: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = NodeSettings(
            name=name,
            data_dir=str(folder / "data"),
            cache_dir=str(folder / "cache"),
            cargos=(str(write_manifest(folder)),),
            network=NetworkSettings(coordinators=(coordinator,)),
        )

        @asynccontextmanager
        async def open_script(_: RuntimeSpec) -> AsyncGenerator[ScriptedRuntime]:
            yield ScriptedRuntime(rate, stamp=stamp)

        async def ready(state: IslandState) -> None:
            print(f"listening {state.host.addresses[0]}", flush=True)

        await Island(settings, {RuntimeType.LLMCPP: open_script}).run(ready=ready)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--tokens-per-s", type=float, default=0.0)
    parser.add_argument("--name", default="script")
    parser.add_argument("--stamp", action="store_true", help="tokens are the time at which they are made")
    arguments = parser.parse_args()
    return run_program(
        lambda: run(arguments.coordinator, arguments.tokens_per_s, arguments.name, stamp=arguments.stamp),
        logs=LogSettings(level="warning"),
    )


if __name__ == "__main__":
    sys.exit(main())
