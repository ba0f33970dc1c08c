"""Real models in a wide network, every peer a process of its own: Islands that advertise to coordinators which
are no gateways, and a gateway to which none of them advertises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

pytestmark = [pytest.mark.model, pytest.mark.slow]

CARGO = "smollm2-135m-f16"
#: A machine with two busy cores starts six programs and loads three parts of a model.
READY_S = 240
ISLAND = ("shards.memory_mib=150", "shards.context_length=512", "shards.slots=2")
HUB = ("coordinator.enabled=true", "cargos=")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Program:
    """A process of ours: what it prints, and the events of its log."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.process = process
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        """Where other peers reach it; empty until it says so."""
        said = (line.partition(" ") for line in self.lines)
        return next((rest for word, _, rest in said if word in {"listening", "mesh"} and "/p2p/" in rest), "")

    @property
    def url(self) -> str:
        return next((line.split()[1] for line in self.lines if line.startswith("listening http")), "")

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line.get("event") == event]

    async def read(self, stream: Any, take: Callable[[str], None]) -> None:
        text = b""
        async for chunk in stream:
            *whole, text = (text + chunk).split(b"\n")
            for line in whole:
                take(line.decode(errors="replace"))

    def take_event(self, line: str) -> None:
        self.events.append(json.loads(line) if line.startswith("{") else {"event": line})


class Net:
    def __init__(self, folder: Path, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self._nursery = nursery
        self._stack = stack

    async def start(self, module: str, name: str, *settings: str) -> Program:
        program = await self._stack.enter_async_context(self._run(module, name, settings))
        await self.until(lambda: program.address, f"{name} listens")
        return program

    async def node(self, name: str, *settings: str) -> Program:
        return await self.start("node.cli", name, *settings)

    async def gateway(self, name: str, *settings: str) -> Program:
        own = ("open=true", "http.port=0", "mesh.listen=/ip4/127.0.0.1/tcp/0", "jobs.wait_ms=60000")
        return await self.start("gateway.cli", name, *own, *settings)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        with trio.move_on_after(READY_S):
            while all(p.process.poll() is None for p in self.programs):
                if condition():
                    return
                await trio.sleep(0.1)
        told = [f"{p.name}: {event}" for p in self.programs for event in p.events[-30:]]
        raise AssertionError(f"not in time: {what}\n" + "\n".join(told))

    @asynccontextmanager
    async def _run(self, module: str, name: str, settings: tuple[str, ...]) -> AsyncGenerator[Program]:
        command = [sys.executable, "-m", module, "run", "--name", name, "--until-stdin-closes"]
        command += ["--data-dir", str(self.folder / name), "--log-format", "json"]
        for setting in settings:
            command += ["--set", setting]
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
        )
        assert process.stdin is not None
        program = Program(name, process)
        self.programs.append(program)
        self._nursery.start_soon(program.read, process.stdout, program.lines.append)
        self._nursery.start_soon(program.read, process.stderr, program.take_event)
        try:
            yield program
        finally:
            with trio.CancelScope(shield=True):
                await process.stdin.aclose()
                with trio.move_on_after(20):
                    await process.wait()
                process.kill()
                await process.wait()


@pytest.fixture
def net(tmp_path: Path):
    @asynccontextmanager
    async def make() -> AsyncGenerator[Net]:
        async with trio.open_nursery() as nursery:
            async with AsyncExitStack() as stack:
                yield Net(tmp_path, nursery, stack)
            nursery.cancel_scope.cancel()

    return make


async def ask(client: httpx.AsyncClient, gateway: Program, model: str = CARGO) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 8, "temperature": 0}
    return await client.post(f"{gateway.url}/v1/chat/completions", json=body)


async def until_answered(client: httpx.AsyncClient, gateway: Program, model: str = CARGO) -> dict[str, Any]:
    with trio.fail_after(READY_S):
        while True:
            answer = await ask(client, gateway, model)
            if answer.status_code == 200:
                return answer.json()
            await trio.sleep(0.5)


async def test_a_chain_of_islands_that_are_known_through_coordinators_only(net) -> None:
    async with net() as here, httpx.AsyncClient(timeout=READY_S) as client:
        first = await here.node("hub-a", *HUB)
        door = f"network.bootstrap={first.address}"
        second = await here.node("hub-b", *HUB, door)
        hubs = {first.peer: first, second.peer: second}
        islands = [await here.node(f"isle-{n}", *ISLAND, f"cargos={CARGO}", door) for n in range(3)]
        for island in islands:
            await here.until(lambda one=island: len(one.logged("coordinator")) == 2, "two coordinators")
        gateway = await here.gateway("gate", f"mesh.bootstrap={first.address}")
        answer = await until_answered(client, gateway)
        stages = answer["usage"]["archipelag"]["stages"]
        assert {stage["island"] for stage in stages} == {"isle-0", "isle-1", "isle-2"}
        for island in islands:
            assert {line["peer"] for line in island.logged("coordinator")} == hubs.keys()
            assert island.logged("layers ordered")
        passed = [line for hub in hubs.values() for line in hub.logged("order passed on")]
        assert len(passed) >= 3
        assert {line["by"] for line in passed} == {gateway.peer[-8:]}
        # An order is the gateway's own, whoever brought it.
        for n in range(3):
            kept = json.loads((here.folder / f"isle-{n}" / "shards.json").read_bytes())
            assert {one["owner"] for one in kept.values()} == {gateway.peer}
