"""What the network's tests share: hosts here, peers in other processes, channels that a test controls."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from node.identity import Identity, new_identity
from node.p2p import Host, HostLimits, Stream, open_host
from node.p2p.errors import ChannelBroken
from node.p2p.muxer import Connection
from node.p2p.stream import Counters, UnreadBudget
from protocol.ids import PeerId

PROCESS = Path(__file__).with_name("peer_process.py")
ROOT = Path(__file__).parents[2]


class TestChannel:
    """One end of a secured connection: the other end's, or the test's own, bytes."""

    __test__ = False
    remote = "memory"

    def __init__(self) -> None:
        self.other: TestChannel | None = None
        self.sent = bytearray()  # what the muxer sent, if the test is the other end
        self.stalled = False  # the kernel takes nothing
        self.closed = False
        self.largest_record = 0
        self.records = 0  # delivered
        self._waiting = b""
        self._room = trio.lowlevel.ParkingLot()
        self._into, self._from = trio.open_memory_channel[bytes](math.inf)

    def send_nowait(self, data: bytes) -> bool:
        assert not self._waiting, "a record was sent before the last one had left"
        if self.closed:
            raise ChannelBroken("closed here")
        self.largest_record = max(self.largest_record, len(data))
        if self.stalled:
            self._waiting = data
            return False
        self._deliver(data)
        return True

    async def flush(self) -> None:
        while self.stalled:
            await self._room.park()
            if self.closed:
                raise ChannelBroken("closed here")
        self._deliver(self._waiting)
        self._waiting = b""

    def resume(self) -> None:
        self.stalled = False
        self._room.unpark_all()

    async def receive(self) -> list[bytes]:
        try:
            return [await self._from.receive()]
        except trio.EndOfChannel:
            return []
        except trio.ClosedResourceError:
            raise ChannelBroken("closed here") from None

    def inject(self, data: bytes) -> None:
        if data and not self.closed:
            self._into.send_nowait(data)

    def end(self) -> None:
        self._into.close()

    def close(self) -> None:
        self.closed = True
        self._from.close()
        self._room.unpark_all()
        if self.other is not None:
            self.other.end()

    def _deliver(self, data: bytes) -> None:
        self.records += 1
        if self.other is None:
            self.sent += data
        else:
            self.other.inject(data)


class Mux:
    """Makes muxed connections: two joined in memory, or one whose peer the test plays."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.accepted: list[Stream] = []

    def connection(
        self, channel: TestChannel, *, initiator: bool, limits: HostLimits | None = None, accept: bool = True
    ) -> Connection:
        limits = limits or HostLimits()

        def admit(stream: Stream) -> bool:
            if accept:
                self.accepted.append(stream)
            return accept

        connection = Connection(
            channel,
            PeerId("the-other"),
            initiator=initiator,
            limits=limits,
            counters=Counters(),
            budget=UnreadBudget(limits.max_unread_bytes),
            accept=admit,
        )
        self.nursery.start_soon(connection.run)
        return connection

    def alone(self, **options: object) -> tuple[Connection, TestChannel]:
        """A connection that was accepted; the test plays the dialler."""
        channel = TestChannel()
        return self.connection(channel, initiator=False, **options), channel  # type: ignore[arg-type]

    def pair(self, **options: object) -> tuple[Connection, Connection]:
        """Two connections joined back to back."""
        left, right = TestChannel(), TestChannel()
        left.other, right.other = right, left
        return (
            self.connection(left, initiator=True, **options),  # type: ignore[arg-type]
            self.connection(right, initiator=False, **options),  # type: ignore[arg-type]
        )

    async def streams(self, **options: object) -> tuple[Stream, Stream]:
        """Both ends of a stream between two joined connections."""
        left, _ = self.pair(**options)
        opened = await left.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        return opened, self.accepted[-1]


@pytest.fixture
async def mux() -> AsyncGenerator[Mux]:
    async with trio.open_nursery() as nursery:
        yield Mux(nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """`await until(lambda: condition)`: for what has no event to wait for. Fails after 30 s."""

    async def wait(condition: Callable[[], object]) -> None:
        with trio.fail_after(30):
            while not condition():  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.005)

    return wait


@pytest.fixture
def make_channel() -> Callable[[], TestChannel]:
    return TestChannel


HostPair = Callable[..., AbstractAsyncContextManager[tuple[Host, Host]]]


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@asynccontextmanager
async def _connected_hosts(
    left: HostLimits | None = None, right: HostLimits | None = None
) -> AsyncGenerator[tuple[Host, Host]]:
    async with (
        open_host(new_identity(), limits=left or HostLimits()) as a,
        open_host(new_identity(), limits=right or HostLimits()) as b,
    ):
        for host in (a, b):
            host.handle("/echo/1", echo)
        await a.connect(b.addresses[0])
        yield a, b


@pytest.fixture
def connected_hosts() -> HostPair:
    """`async with connected_hosts() as (a, b)`: a has dialled b; both serve /echo/1."""
    return _connected_hosts


class PeerProcess:
    """A peer in a process of its own (peer_process.py)."""

    def __init__(self, process: trio.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.peer = PeerId(address.rpartition("/")[2])

    @property
    def port(self) -> int:
        return int(self.address.split("/")[4])


@asynccontextmanager
async def _peer_process(
    identity: Identity | None = None, port: int = 0, *, keep: str = ""
) -> AsyncGenerator[PeerProcess]:
    seed = (identity or new_identity()).seed.hex()
    process = await trio.lowlevel.open_process(
        [sys.executable, str(PROCESS), seed, str(port), keep], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(60):  # imports take seconds on a busy machine
            text = b""
            while not text.endswith(b"\n"):
                more = await process.stdout.receive_some()
                assert more, "the peer process ended"
                text += more
        yield PeerProcess(process, text.decode().strip())
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()


@pytest.fixture
def peer_process() -> Callable[..., AbstractAsyncContextManager[PeerProcess]]:
    """`async with peer_process() as peer`: killed on leaving."""
    return _peer_process
