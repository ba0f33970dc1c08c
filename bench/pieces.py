"""Pieces from 1 and 3 peers over loopback, beside copying the same file over one bare TCP stream.

Holders are processes of their own. Each way ends with the bytes in a file; ours come with noise, yamux, and a
SHA-256 of every piece. Ways take turns, so that what else the machine does strikes all of them; on a busy
machine the processor time says more than the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import trio

from bench.figures import header, median, row
from cargos.manifest import CargoFile
from cargos.shards.pieces import PieceFile, hash_pieces, list_sha256
from node.identity import new_identity
from node.p2p import Host, Stream, open_host, parse_peer_address
from node.pieces.fetch import FetchCounters, PieceFetch
from node.pieces.limits import FetchLimits
from node.pieces.server import PieceServer
from node.pieces.sources import BlobSource
from node.pieces.suspects import Suspects
from protocol.ids import PeerId
from protocol.limits import KIB, MIB
from protocol.pieces import PIECES_PROTOCOL

RAW_PROTOCOL = "/archipelag/bench/raw/1.0.0"
CHUNK = 256 * KIB


def describe(path: Path) -> tuple[CargoFile, bytes]:
    hashes, sha256 = hash_pieces(path, MIB)
    file = CargoFile(
        name=path.name,
        role="model",
        size_bytes=path.stat().st_size,
        sha256=sha256,
        sources=("https://example.invalid/weights",),
        piece_bytes=MIB,
        pieces_sha256=list_sha256(hashes),
    )
    return file, hashes


async def hold(path: Path) -> None:
    """A holder: pieces, the file as one stream of the host, and as bare TCP."""
    file, hashes = describe(path)
    server = PieceServer(lambda _: BlobSource(path, file, hashes))

    async def send(sink: Callable[[bytes], Awaitable[None]]) -> None:
        with path.open("rb", buffering=0) as data:  # noqa: ASYNC230 - from the page cache
            while chunk := data.read(CHUNK):
                await sink(chunk)

    async def raw(stream: Stream) -> None:
        await send(stream.send_all)

    async def bare(stream: trio.SocketStream) -> None:
        async with stream:
            await send(stream.send_all)

    async with open_host(new_identity()) as host, trio.open_nursery() as nursery:
        host.handle(PIECES_PROTOCOL, server.handle, bulk=True)
        host.handle(RAW_PROTOCOL, raw, bulk=True)
        listeners = await nursery.start(trio.serve_tcp, bare, 0)
        port = listeners[0].socket.getsockname()[1]
        print(f"{host.addresses[0]} {port}", flush=True)
        await trio.sleep_forever()


class Holders:
    """`PieceNetwork` of processes; `use` of them."""

    def __init__(self, host: Host, addresses: list[str]) -> None:
        self.use = len(addresses)
        self._host = host
        self._addresses = {parse_peer_address(address)[1]: address for address in addresses}

    async def find(self, sha256: str) -> Sequence[PeerId]:  # noqa: ARG002 - they hold one file
        await trio.lowlevel.checkpoint()
        return list(self._addresses)[: self.use]

    async def open(self, peer: PeerId, protocol: str = PIECES_PROTOCOL) -> Stream:
        return await self._host.open_bulk_stream(peer, protocol, [self._addresses[peer]])


@asynccontextmanager
async def holders(path: Path, count: int) -> AsyncGenerator[tuple[list[str], int, list[psutil.Process]]]:
    """Their addresses, the bare port of the first, and the processes."""
    command = [sys.executable, "-m", "bench.pieces", "--hold", str(path)]
    processes: list[trio.Process] = []
    lines: list[list[str]] = []
    try:
        for _ in range(count):
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            text = b""
            while not text.endswith(b"\n"):
                text += await process.stdout.receive_some()
            lines.append(text.decode().split())
        yield [line[0] for line in lines], int(lines[0][1]), [psutil.Process(p.pid) for p in processes]
    finally:
        with trio.CancelScope(shield=True):
            for process in processes:
                process.kill()
                await process.wait()
                assert process.stdout is not None
                await process.stdout.aclose()


async def copy(receive: Callable[[int], Awaitable[bytes]], target: Path, size: int) -> None:
    with target.open("wb", buffering=0) as file:  # noqa: ASYNC230 - as plain as can be
        done = 0
        while done < size:
            data = await receive(CHUNK)
            assert data
            file.write(data)
            done += len(data)


async def fetch(network: Holders, file: CargoFile, root: Path) -> None:
    async with PieceFile.held(root, file) as pieces:
        left = await PieceFetch(
            network,
            file,
            range(file.pieces),
            pieces,
            limits=FetchLimits(),
            suspects=Suspects(1, 1),
            counters=FetchCounters(),
            seed=1,
        ).run()
        assert not left


async def measure(folder: Path, size_mib: int, rounds: int) -> None:
    path = folder / "weights.bin"
    with path.open("wb") as out:  # noqa: ASYNC230 - before anything is measured
        for index in range(size_mib):
            out.write(hashlib.shake_256(index.to_bytes(4)).digest(MIB))
    file, _ = describe(path)
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[tuple[float, float]]] = {}
    async with holders(path, 3) as (addresses, port, processes), open_host(new_identity(), ()) as host:
        network = Holders(host, addresses)

        async def bare(target: Path) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await copy(stream.receive_some, target, file.size_bytes)

        async def plain(target: Path) -> None:
            stream = await network.open(next(iter(await network.find(""))), RAW_PROTOCOL)
            await copy(stream.receive_some, target, file.size_bytes)
            await stream.aclose()

        async def from_peers(root: Path, count: int) -> None:
            network.use = count
            await fetch(network, file, root)

        async def one(root: Path) -> None:
            await from_peers(root, 1)

        async def three(root: Path) -> None:
            await from_peers(root, 3)

        ways = {
            "bare TCP, one stream": bare,
            "noise and yamux, one stream": plain,
            "pieces from 1 peer": one,
            "pieces from 3 peers": three,
        }
        for number in range(rounds):
            for name, way in ways.items():
                root = folder / f"{number}-{name.replace(' ', '-')}"
                there, here = _cpu_s(processes), time.process_time()
                started = trio.current_time()
                await way(root)
                seconds.setdefault(name, []).append(trio.current_time() - started)
                cpu.setdefault(name, []).append((time.process_time() - here, _cpu_s(processes) - there))
    base = median(seconds["bare TCP, one stream"])
    row("", "MB/s", "of bare TCP", "CPU s/GB", "at holders")
    for name, times in seconds.items():
        middle = median(times)
        used = [median([pair[side] for pair in cpu[name]]) * 1e9 / file.size_bytes for side in (0, 1)]
        rate = f"{file.size_bytes / middle / 1e6:.0f}"
        row(name, rate, f"{base / middle:.2f}", *(f"{seconds:.1f}" for seconds in used))


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(spent.user + spent.system for spent in times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench pieces", description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.hold is not None:
        trio.run(hold, arguments.hold)
        return 0
    header(f"Pieces from peers: {arguments.mib} MiB over loopback, median of {arguments.rounds}")
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        trio.run(measure, Path(folder), arguments.mib, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
