"""A network of real `archi-node` processes, asked through their control sockets.

On loopback, or each in a network namespace of a delay laboratory (bench.lab), whose links can be cut.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Literal, Self, TypeVar

import msgspec
import trio

from bench.lab import Lab
from bench.networks.base import LookupResult, Network
from bench.networks.spawner import Order
from dht.keys import key_of_peer
from node.control import NotRunning, ask
from node.identity import load_or_create_identity
from node.overlay.views import (
    CostView,
    FindView,
    NameParams,
    PutParams,
    RecordParams,
    RecordsView,
    StoredView,
    TableView,
)
from protocol.ids import PeerId

T = TypeVar("T")

#: The namespace of records that scenarios put.
NAMESPACE: Final = "conformance"

#: Importing takes seconds of processor time, and neighbours on the machine may want it, too.
_START_S: Final = 120.0

_ROOT: Final = Path(__file__).parents[2]


class Spawner:
    """The process that forks nodes (bench.networks.spawner). They all die with it. `before`: a command that
    runs it, such as ("nice", "-n", "-10"); its nodes inherit what that changes.
    """

    def __init__(self, before: Sequence[str] = ()) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ARCHI_")}
        environment["PYTHONWARNINGS"] = "default"
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "bench.networks.spawner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=environment,
        )
        if self._line() != "ready":
            raise RuntimeError("the spawner of nodes did not start; its standard error says why")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(
        self,
        settings: Mapping[str, object],
        *,
        out: Path,
        err: Path,
        program: Literal["archi-node", "archi-gateway"] = "archi-node",
        namespace: str = "",
    ) -> int:
        """Run the program with these settings; its process id."""
        argv = ["run", *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]
        order = Order(program, argv, str(out), str(err), namespace)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class ProcessNetwork(Network):
    """Its peers live in `folder`. With a laboratory, peer i is its node i; else all are on loopback."""

    kind: ClassVar[str] = "node"

    def __init__(
        self,
        spawner: Spawner,
        folder: Path,
        *,
        settings: Mapping[str, object],
        lab: Lab | None = None,
    ) -> None:
        super().__init__()
        self.peer_ids: Final[list[PeerId]] = []
        self.pids: Final[list[int]] = []
        self._spawner = spawner
        self._folder = folder
        self._settings = dict(settings)
        self._lab = lab
        self._numbers: dict[str, int] = {}
        self._entrance = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        for peer in self.live:
            with suppress(ProcessLookupError):
                os.kill(self.pids[peer], signal.SIGKILL)

    # --- peers --------------------------------------------------------------------------------------

    async def join(self, count: int) -> list[int]:
        peers = [self._start() for _ in range(1 if not self.keys else count)]
        if not self._entrance:
            self._entrance = await self.address(0)
            peers += [self._start() for _ in range(count - 1)]
        for peer in peers:
            await self.address(peer)
        return peers

    def identity_file(self, peer: int) -> Path:
        return self._home(peer) / "identity.key"

    async def kill(self, peers: Sequence[int]) -> None:
        for peer in peers:
            os.kill(self.pids[peer], signal.SIGKILL)
            self._dead.add(peer)
        await trio.lowlevel.checkpoint()

    async def partition(self, groups: Sequence[Sequence[int]]) -> None:
        assert self._lab is not None, "processes on loopback can not be parted"
        self._lab.partition(groups)
        await trio.lowlevel.checkpoint()

    async def heal(self) -> None:
        assert self._lab is not None
        self._lab.heal()
        await trio.lowlevel.checkpoint()

    def log(self, peer: int) -> str:
        """What it wrote on standard error."""
        return self._err(peer).read_text()

    # --- time ---------------------------------------------------------------------------------------

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    @property
    def step_s(self) -> float:
        return 0.5

    @property
    def now_s(self) -> float:
        return time.monotonic()

    # --- the DHT ------------------------------------------------------------------------------------

    async def table(self, peer: int) -> list[int]:
        found = await self.view(peer)
        return [self._numbers[row.peer] for row in found.peers]

    async def view(self, peer: int) -> TableView:
        """The table with round trips and links."""
        return await self._ask(peer, "dht.peers", None, TableView)

    async def find_closest(self, asker: int, key: int) -> LookupResult:
        found = await self._ask(asker, "dht.find", NameParams(f"{key:064x}"), FindView)
        return self._found(found)

    async def put(self, peer: int, name: str, value: bytes, *, ttl_s: int = 3600) -> int:
        params = PutParams(NAMESPACE, name, value, ttl_s)
        return (await self._ask(peer, "dht.put", params, StoredView)).copies

    async def get(self, asker: int, name: str) -> LookupResult:
        found = await self._ask(asker, "dht.get", RecordParams(NAMESPACE, name), RecordsView)
        return _result(found.cost, values=tuple(record.value for record in found.records))

    async def provide(self, peer: int, key: int) -> int:
        return (await self._ask(peer, "dht.provide", NameParams(f"{key:064x}"), StoredView)).copies

    async def withdraw(self, peer: int, key: int) -> None:
        await self._ask(peer, "dht.withdraw", NameParams(f"{key:064x}"), StoredView)

    async def find_providers(self, asker: int, key: int) -> LookupResult:
        return self._found(await self._ask(asker, "dht.providers", NameParams(f"{key:064x}"), FindView))

    # --- inside -------------------------------------------------------------------------------------

    def _start(self) -> int:
        peer = len(self.keys)
        home = self._home(peer)
        home.mkdir(mode=0o700, parents=True)
        peer_id = load_or_create_identity(self.identity_file(peer)).peer
        self.peer_ids.append(peer_id)
        self.keys.append(key_of_peer(peer_id))
        self._numbers[peer_id] = peer
        host = "127.0.0.1" if self._lab is None else self._lab.address(peer)
        settings = {
            "name": f"peer-{peer}",
            "data_dir": home,
            "cache_dir": self._folder / "cache",
            "cargos": "",
            "network.listen": f"/ip4/{host}/tcp/0",
            "network.bootstrap": self._entrance,
            **self._settings,
        }
        namespace = "" if self._lab is None else self._lab.namespace(peer)
        pid = self._spawner.start(settings, out=self._out(peer), err=self._err(peer), namespace=namespace)
        self.pids.append(pid)
        return peer

    async def address(self, peer: int) -> str:
        """Where it listens, once it does."""
        return await announced(self._out(peer), "listening", self._err(peer))

    async def _ask(self, peer: int, method: str, params: object, result: type[T]) -> T:
        try:
            return await ask(self._home(peer), method, params, result=result)
        except NotRunning as error:
            error.add_note(f"peer {peer} wrote:\n{self.log(peer)[-2000:]}")
            raise

    def _found(self, found: FindView) -> LookupResult:
        return _result(found.cost, peers=tuple(self._numbers[row.peer] for row in found.peers))

    def _home(self, peer: int) -> Path:
        return self._folder / f"{peer}"

    def _out(self, peer: int) -> Path:
        return self._folder / f"{peer}.out"

    def _err(self, peer: int) -> Path:
        return self._folder / f"{peer}.err"


async def announced(out: Path, what: str, err: Path) -> str:
    """The first thing that a program says it is `what` ("listening", "mesh")."""
    deadline = trio.current_time() + _START_S
    while trio.current_time() < deadline:
        for line in _lines(out):
            if line.startswith(f"{what} "):
                return line.removeprefix(f"{what} ")
        await trio.sleep(0.02)
    raise RuntimeError("\n".join(["it did not start:", *_lines(err)]))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []


def _result(cost: CostView, *, peers: tuple[int, ...] = (), values: tuple[bytes, ...] = ()) -> LookupResult:
    return LookupResult(peers, values, cost.took_ms, cost.hops, cost.queries, cost.failures)
