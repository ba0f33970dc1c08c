"""Files in pieces, peers that hold them, and one that fetches: real hosts over loopback."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import trio

from cargos.errors import WrongContent
from cargos.manifest import CargoFile
from node.identity import new_identity
from node.p2p import Host, Stream, open_host
from node.pieces.fetch import FetchCounters, PieceFetch
from node.pieces.limits import FetchLimits, ServeLimits
from node.pieces.server import PieceServer, PieceSource
from node.pieces.suspects import Suspects
from protocol.ids import PeerId
from protocol.pieces import PIECES_PROTOCOL

PIECE = 64 * 1024


@dataclass
class Whole:
    """A file, its bytes, its piece list."""

    file: CargoFile
    data: bytes
    hashes: bytes

    def piece(self, index: int) -> bytes:
        return self.data[index * self.file.piece_bytes : (index + 1) * self.file.piece_bytes]


def _whole(pieces: int = 40, *, piece_bytes: int = PIECE, seed: int = 1) -> Whole:
    data = random.Random(seed).randbytes(pieces * piece_bytes - 1000)  # the last piece is shorter
    parts = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    file = CargoFile(
        name="weights.bin",
        role="model",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sources=("https://127.0.0.1:1/weights.bin",),
        piece_bytes=piece_bytes,
        pieces_sha256=hashlib.sha256(hashes).hexdigest(),
    )
    return Whole(file, data, hashes)


@pytest.fixture
def make_whole() -> Callable[..., Whole]:
    return _whole


class MemorySource:
    """Some pieces of a file, perhaps wrong ones."""

    def __init__(
        self, whole: Whole, held: Collection[int] | None = None, *, lies: Collection[int] = ()
    ) -> None:
        self.whole = whole
        self.held = set(range(whole.file.pieces) if held is None else held)
        self.lies = set(lies)
        self.list = whole.hashes
        self.reads: list[int] = []

    @property
    def size_bytes(self) -> int:
        return self.whole.file.size_bytes

    @property
    def piece_bytes(self) -> int:
        return self.whole.file.piece_bytes

    @property
    def pieces(self) -> int:
        return self.whole.file.pieces

    def has(self, index: int) -> bool:
        return index in self.held

    def bits(self) -> bytes:
        bits = bytearray(-(-self.pieces // 8))
        for index in self.held:
            bits[index // 8] |= 1 << index % 8
        return bytes(bits)

    def hashes(self) -> bytes | None:
        return self.list

    def read(self, offset: int, size: int) -> bytes:
        data = self.whole.data[offset : offset + size]
        self.reads.append(offset // self.piece_bytes)
        return bytes(len(data)) if offset // self.piece_bytes in self.lies else data

    def close(self) -> None:
        pass


class MemorySink:
    """What was fetched."""

    def __init__(self, whole: Whole, *, listed: bool = False) -> None:
        self.whole = whole
        self.list = whole.hashes if listed else None
        self.got: dict[int, bytes] = {}

    def hashes(self) -> bytes | None:
        return self.list

    async def learn(self, hashes: bytes) -> None:
        self.list = hashes

    async def put(self, index: int, data: bytes) -> None:
        assert index not in self.got, "fetched twice"
        if data != self.whole.piece(index):
            raise WrongContent("a piece", "", "")
        self.got[index] = data


@dataclass
class Holder:
    """A peer that serves one file. `stop`: it is gone at once."""

    host: Host
    server: PieceServer
    source: PieceSource
    scope: trio.CancelScope
    ended: trio.Event = field(default_factory=trio.Event)

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


class Swarm:
    """Holders, and a host that fetches from them (`PieceNetwork`)."""

    def __init__(self, nursery: trio.Nursery, host: Host) -> None:
        self.nursery = nursery
        self.host = host
        self.holders: dict[PeerId, Holder] = {}
        self.addresses: dict[PeerId, tuple[str, ...]] = {}
        self.searches = 0
        self.counters = FetchCounters()
        self.suspects = Suspects(3600.0, 256)

    async def add(
        self,
        source: PieceSource,
        limits: ServeLimits | None = None,
        handler: Callable[[Stream], Awaitable[None]] | None = None,
    ) -> Holder:
        return await self.nursery.start(self._hold, source, limits or ServeLimits(), handler)

    async def _hold(
        self,
        source: PieceSource,
        limits: ServeLimits,
        handler: Callable[[Stream], Awaitable[None]] | None,
        task_status: trio.TaskStatus[Holder],
    ) -> None:
        server = PieceServer(lambda sha256: source, limits)
        with trio.CancelScope() as scope:
            async with open_host(new_identity()) as host:
                host.handle(PIECES_PROTOCOL, handler or server.handle, bulk=True)
                holder = self.holders[host.peer] = Holder(host, server, source, scope)
                self.addresses[host.peer] = host.addresses
                task_status.started(holder)
                await trio.sleep_forever()
        holder.ended.set()

    async def find(self, sha256: str) -> Sequence[PeerId]:
        await trio.lowlevel.checkpoint()
        self.searches += 1
        return tuple(self.holders)

    async def open(self, peer: PeerId) -> Stream:
        return await self.host.open_bulk_stream(peer, PIECES_PROTOCOL, self.addresses[peer])

    async def fetch(
        self,
        sink: MemorySink,
        wanted: Sequence[int] | None = None,
        *,
        limits: FetchLimits | None = None,
        note: Callable[[int], None] = lambda _: None,
    ) -> frozenset[int]:
        """Fails after 60 s."""
        file = sink.whole.file
        fetch = PieceFetch(
            self,
            file,
            range(file.pieces) if wanted is None else wanted,
            sink,
            limits=limits or FetchLimits(),
            suspects=self.suspects,
            counters=self.counters,
            seed=1,
            note=note,
        )
        with trio.fail_after(60):
            return await fetch.run()


@asynccontextmanager
async def _swarm() -> AsyncGenerator[Swarm]:
    async with trio.open_nursery() as nursery, open_host(new_identity(), ()) as host:
        yield Swarm(nursery, host)
        nursery.cancel_scope.cancel()


@pytest.fixture
def open_swarm() -> Callable[[], AbstractAsyncContextManager[Swarm]]:
    return _swarm


@pytest.fixture
def memory_source() -> type[MemorySource]:
    return MemorySource


@pytest.fixture
def memory_sink() -> type[MemorySink]:
    return MemorySink


def _load(path: str) -> ModuleType:
    """A helper of another folder's tests."""
    unique = f"archipelag_tests_pieces_{path.replace('/', '_')}"
    if unique not in sys.modules:
        place = Path(__file__).parents[2] / "cargos" / f"{path}.py"
        spec = importlib.util.spec_from_file_location(unique, place)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[unique] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[unique]


@pytest.fixture
def server() -> Iterator[object]:
    """The file server of the store's tests: `server.serve(path, data, ...)`."""
    store = _load("store/conftest")
    with store.running(store.FileServer()) as server:
        yield server


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """`synthetic.write_model(path, synthetic.Shape(...))`."""
    return _load("shards/synthetic")
