"""What the network layer adds to plain TCP: echo on a kept stream, opening a stream, bulk.

Two processes on loopback; raw trio TCP and our streams are measured in turns within one run, so that the
ratio means something on a shared machine. Run: .venv/bin/python bench/kept_stream.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from bench.figures import header

sys.path.insert(0, str(Path(__file__).parents[1]))

from node.identity import new_identity
from node.p2p import Host, Stream, open_host
from node.peers import Peers, open_peers
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

MESSAGE = b"t" * 120  # one tick's token on a job stream
BULK_BYTES = 32 * 1024 * 1024
CHUNK = bytes(256 * 1024)


async def _echo(stream: Stream | trio.SocketStream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def _sink(stream: Stream | trio.SocketStream) -> None:
    left = BULK_BYTES
    while left:
        left -= len(await stream.receive_some(65536))
    await stream.send_all(b"k")


async def _server() -> None:
    async with (
        trio.open_nursery() as nursery,
        open_host(new_identity()) as host,
        open_peers(host, hello=Hello("server", "0"), dice=Dice(2)) as peers,
    ):
        host.handle("/echo/1", _echo)
        host.handle("/sink/1", _sink)

        async def answer(_: PeerId, hello: Hello) -> Hello:
            return hello

        peers.serve("echo", HELLO, answer)
        ports: list[int] = []
        for serve in (_echo, _sink):
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            ports.append(listener.socket.getsockname()[1])
            nursery.start_soon(trio.serve_listeners, serve, [listener])
        sys.stdout.write(json.dumps({"address": host.addresses[0], "tcp": ports}) + "\n")
        sys.stdout.flush()
        await trio.sleep_forever()


async def _tcp(port: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    stream.setsockopt(6, 1, 1)  # TCP_NODELAY
    return stream


async def _time_echo(stream: Stream | trio.SocketStream) -> int:
    began = time.perf_counter_ns()
    await stream.send_all(MESSAGE)
    got = 0
    while got < len(MESSAGE):
        got += len(await stream.receive_some(65536))
    return time.perf_counter_ns() - began


async def _time_bulk(stream: Stream | trio.SocketStream) -> float:
    """MB/s."""
    began = time.perf_counter()
    for _ in range(BULK_BYTES // len(CHUNK)):
        await stream.send_all(CHUNK)
    await stream.receive_some(1)
    return BULK_BYTES / 1e6 / (time.perf_counter() - began)


@dataclass
class Samples:
    tcp: list[int]
    ours: list[int]
    rpc: list[int]
    open_ns: list[int]
    cpu_tcp_ns: int = 0
    cpu_ours_ns: int = 0


async def _timed(into: list[int], work: Callable[[], Awaitable[object]]) -> None:
    began = time.perf_counter_ns()
    await work()
    into.append(time.perf_counter_ns() - began)


async def _measure(host: Host, peers: Peers, address: str, echo_port: int, rounds: int) -> Samples:
    peers.keep(address)
    peer = await host.connect(address)
    while peer not in peers.up():  # noqa: ASYNC110 - once, before the clock runs
        await trio.sleep(0.01)
    ours, tcp = await host.open_stream(peer, "/echo/1"), await _tcp(echo_port)
    samples = Samples([], [], [], [])

    async def call() -> None:
        await peers.call(peer, "echo", Hello("x" * 100, "0"), HELLO, deadline_ns=10 * SECOND_NS)

    async def open_one() -> None:
        await (await host.open_stream(peer, "/echo/1")).aclose()

    for turn in range(rounds + 1):
        if turn == 1:  # the first turn warms up
            samples = Samples([], [], [], [])
        before = time.process_time_ns()
        for _ in range(200):
            samples.tcp.append(await _time_echo(tcp))
        between = time.process_time_ns()
        for _ in range(200):
            samples.ours.append(await _time_echo(ours))
        samples.cpu_tcp_ns += between - before
        samples.cpu_ours_ns += time.process_time_ns() - between
        for _ in range(50):
            await _timed(samples.rpc, call)
        for _ in range(20):
            await _timed(samples.open_ns, open_one)
    return samples


def _row(name: str, values: list[int], base: list[int]) -> str:
    ordered, floor = sorted(values), sorted(base)
    p50, p99 = statistics.median(ordered) / 1e6, ordered[len(ordered) * 99 // 100] / 1e6
    ratio = statistics.median(ordered) / statistics.median(floor)
    return f"{name:<34}{p50:>9.3f}{p99:>10.3f}{ratio:>12.2f}"


async def _client(rounds: int) -> None:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "bench.kept_stream", "--server"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some()
        server = json.loads(line)
        async with (
            open_host(new_identity()) as host,
            open_peers(host, hello=Hello("client", "0"), dice=Dice(1)) as peers,
        ):
            samples = await _measure(host, peers, server["address"], server["tcp"][0], rounds)
            [peer] = host.connected()
            bulk_tcp: list[float] = []
            bulk_ours: list[float] = []
            for _ in range(5):
                async with await _tcp(server["tcp"][1]) as stream:
                    bulk_tcp.append(await _time_bulk(stream))
                stream = await host.open_stream(peer, "/sink/1")
                bulk_ours.append(await _time_bulk(stream))
                await stream.aclose()
            _report(samples, bulk_tcp, bulk_ours)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()


def _report(samples: Samples, bulk_tcp: list[float], bulk_ours: list[float]) -> None:
    count = len(samples.ours)
    print(f"{count} echoes of {len(MESSAGE)} bytes each")
    print(f"{'':<34}{'p50 ms':>9}{'p99 ms':>10}{'x TCP p50':>12}")
    print(_row("trio TCP echo", samples.tcp, samples.tcp))
    print(_row("kept stream echo", samples.ours, samples.tcp))
    print(_row("RPC call", samples.rpc, samples.tcp))
    print(_row("open and close a stream", samples.open_ns, samples.tcp))
    cpu_tcp, cpu_ours = samples.cpu_tcp_ns / count / 1e3, samples.cpu_ours_ns / count / 1e3
    print(f"client CPU per echo: TCP {cpu_tcp:.0f} us, kept stream {cpu_ours:.0f} us")
    tcp, ours = statistics.median(bulk_tcp), statistics.median(bulk_ours)
    print(
        f"bulk, {BULK_BYTES >> 20} MiB: TCP {tcp:.0f} MB/s, "
        f"kept stream {ours:.0f} MB/s (encrypted), ratio {ours / tcp:.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench kept_stream", description="kept streams against raw TCP"
    )
    parser.add_argument("--server", action="store_true", help="the other process; used by the benchmark itself")
    parser.add_argument("--rounds", type=int, default=10, help="turns of 200 echoes each")
    arguments = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    if arguments.server:
        trio.run(_server)
    else:
        header("the network layer")
        trio.run(_client, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
