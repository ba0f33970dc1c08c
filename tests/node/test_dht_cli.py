"""`archi-node dht` against running nodes: real processes, as people and scripts meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from node.control import ask_status

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240  # a dozen programs start, one after the other, on a machine that may be busy


@dataclass
class RunningNode:
    data_dir: Path
    address: str

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    async def dht(self, *words: str, code: int | None = 0) -> str:
        """Standard output (or error, if it fails) of one command. `code` None: it may fail."""
        command = [sys.executable, "-m", "node.cli", "dht", *words, "--data-dir", str(self.data_dir)]
        done = await trio.run_process(command, cwd=ROOT, capture_stdout=True, capture_stderr=True, check=False)
        assert code is None or done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        return (done.stdout or done.stderr).decode()

    async def json(self, *words: str, code: int | None = 0) -> Any:
        return json.loads(await self.dht(*words, "--json", code=code))

    async def stores(self, *words: str) -> None:
        """A command that stores something at the one other node, which may be too busy the first time."""
        while (await self.json(*words, code=None))["copies"] != 1:  # noqa: ASYNC110 - another process
            await trio.sleep(0.2)


@asynccontextmanager
async def running(folder: Path, *flags: str) -> AsyncGenerator[RunningNode]:
    """A node without Cargos in a process of its own."""
    command = [sys.executable, "-m", "node.cli", "run", "--data-dir", str(folder), "--set", "cargos="]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = await trio.lowlevel.open_process(
            [*command, *flags], stdout=subprocess.PIPE, stderr=log, cwd=ROOT
        )
    assert process.stdout is not None
    try:
        line = b""
        with trio.fail_after(PATIENCE_S):
            while not line.endswith(b"\n"):
                more = await process.stdout.receive_some(1)
                assert more, (folder.parent / f"{folder.name}.log").read_text()
                line += more
        yield RunningNode(folder, line.decode().split()[1])
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            with trio.move_on_after(10):
                await process.wait()
            process.kill()
            await process.wait()
            await process.stdout.aclose()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    return lambda name, *flags: running(tmp_path / name, *flags)


@pytest.mark.slow
async def test_commands_on_a_network_of_processes(start: Callable[..., Any]) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(start("first"))
        second = await stack.enter_async_context(start("second", "--bootstrap", first.address))
        with trio.fail_after(PATIENCE_S):
            while (await ask_status(second.data_dir)).overlay.table == 0:  # noqa: ASYNC110 - another process
                await trio.sleep(0.1)
            assert first.peer in await second.dht("peers")
            await second.stores("put", "note", "hello", "a value")
            assert "a value" in await first.dht("get", "note", "hello")
            await second.stores("provide", "role:tester")
            found = await first.json("providers", "role:tester")
            assert [row["peer"] for row in found["peers"]] == [second.peer]
            assert found["peers"][0]["addresses"] == [second.address]
            assert "no providers found" in await first.dht("providers", "role:nobody", code=1)


@pytest.mark.slow
async def test_what_goes_wrong_is_one_helpful_line(start: Callable[..., Any], tmp_path: Path) -> None:
    nobody = RunningNode(tmp_path / "empty", "/p2p/x")
    with trio.fail_after(PATIENCE_S):
        assert "start one with: archi-node run" in await nobody.dht("peers", code=1)
        async with start("alone") as node:
            assert "known forms: a peer id" in await node.dht("find", "nonsense", code=1)
            assert "only under its own name" in await node.dht("put", "peer", "somebody", "x", code=1)
            assert "not in the overlay" in await node.dht("peers")
