"""How exactly the laboratory delays, beside the kernel's own path between two namespaces, and what it carries.

Whoever measures here runs with the router's priority, so that neighbours on the machine blur neither path. A
round trip after a pause costs more than one straight after another, because idle processors wake up late; so
each is compared with round trips on the kernel's own path between which the same time passed.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.figures import header, median, percentile
from bench.lab.lab import Lab

_PORT = 4007
_MESSAGE = bytes(100)
_LOAD_S = 6.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _hurry() -> None:
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _echo() -> None:
    _hurry()
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", _PORT))
    print("up", flush=True)
    while True:
        data, whence = server.recvfrom(2048)
        server.sendto(data, whence)


def _ask(address: str, count: int, pause_ms: float) -> None:
    """One after the other; the round-trip times in microseconds, sorted."""
    _hurry()
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect((address, _PORT))
    client.settimeout(5)
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter_ns()
        client.send(_MESSAGE)
        client.recv(2048)
        times.append((time.perf_counter_ns() - began) / 1e3)
        if pause_ms:
            time.sleep(pause_ms / 1e3)
    print(*(f"{t:.1f}" for t in sorted(times)))


def _flood(address: str, rate: int, seconds: float) -> None:
    """`rate` packets/s, a millisecond's share at a time."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((address, _PORT + 1))
    began = time.perf_counter()
    sent = 0
    while (passed := time.perf_counter() - began) < seconds:
        for _ in range(int(rate * passed) - sent):
            sender.send(_MESSAGE)
            sent += 1
        time.sleep(0.001)
    print(sent)


def _sink() -> None:
    """A stream's bytes, counted until its end."""
    listener = socket.socket()
    listener.bind(("0.0.0.0", _PORT))
    listener.listen()
    print("up", flush=True)
    peer, _ = listener.accept()
    got = 0
    while data := peer.recv(1 << 18):
        got += len(data)
    peer.sendall(got.to_bytes(8, "big"))


def _pour(address: str, size: int) -> None:
    peer = socket.create_connection((address, _PORT))
    began = time.perf_counter()
    chunk = bytes(1 << 18)
    for _ in range(size // len(chunk)):
        peer.sendall(chunk)
    peer.shutdown(socket.SHUT_WR)
    assert int.from_bytes(peer.recv(8), "big") == size // len(chunk) * len(chunk)
    print(f"{size / 1e6 / (time.perf_counter() - began):.1f}")


def _start(lab: Lab, node: int, *arguments: object) -> subprocess.Popen[Any]:
    argv = [sys.executable, "-m", "bench.lab.accuracy", "--part", *map(str, arguments)]
    return lab.run(node, argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def _served(lab: Lab, node: int, what: str) -> subprocess.Popen[Any]:
    process = _start(lab, node, what)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _result(lab: Lab, node: int, *arguments: object) -> list[float]:
    return [float(word) for word in _start(lab, node, *arguments).communicate()[0].split()]


def _row(name: str, times_us: list[float], asked_ms: float, plain_us: float) -> float:
    """Errors: against what was asked for plus what the kernel's own path takes. Returns the median, in us."""
    cells = "".join(
        f"{(percentile(times_us, share) - 1000 * asked_ms - plain_us) / 1e3:>+10.3f}"
        for share in (0.5, 0.9, 0.99)
    )
    print(f"{name:<36}{len(times_us):>6}{median(times_us) / 1e3:>11.3f}{cells}")
    return median(times_us)


def _plain_path(lab: Lab, server: subprocess.Popen[Any], client: subprocess.Popen[Any]) -> None:
    """A veth pair between nodes 0 and 1: what two namespaces have without the laboratory."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("link", "add", "labv0", "type", "veth", "peer", "name", "labv1")
    for node, process in ((0, server), (1, client)):
        ip("link", "set", f"labv{node}", "netns", str(process.pid))
        for words in (f"addr add 10.98.0.{node + 1}/24 dev labv{node}", f"link set labv{node} up"):
            subprocess.run(lab.command(node, ["ip", *words.split()]), check=True)


def _measure(rate: int) -> None:
    with Lab(0.0, nodes=4) as lab:
        server = _served(lab, 0, "echo")
        _plain_path(lab, server, lab.run(1, ["sleep", "600"]))
        print(f"{'round trips of 100 bytes, ms':<36}{'count':>6}{'p50':>11}", end="")
        print(f"{'error p50':>10}{'p90':>10}{'p99':>10}")
        for delay_ms, count in ((0, 5000), (1, 2000), (10, 400), (50, 150), (200, 50)):
            asked_ms = 2 * delay_ms
            plain = _result(lab, 1, "ask", "10.98.0.1", count, asked_ms)
            plain_us = _row(f"kernel only (veth), every {asked_ms} ms", plain, 0, median(plain))
            lab.set_delays(delay_ms)
            times = _result(lab, 1, "ask", lab.address(0), count, 0)
            _row(f"laboratory, {delay_ms} ms each way", times, asked_ms, plain_us)
        _under_load(lab, rate)
        lab.set_delays(0)
        _served(lab, 3, "sink")
        [speed] = _result(lab, 2, "pour", lab.address(3), 64 << 20)
        print(f"one TCP stream without delay: {speed:.0f} MB/s")


def _under_load(lab: Lab, rate: int) -> None:
    """Round trips between two nodes while two others keep the router busy."""
    lab.set_delays(5)
    plain = _result(lab, 1, "ask", "10.98.0.1", 300, 10)
    drain = lab.inside(3, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    drain.bind(("0.0.0.0", _PORT + 1))  # nobody reads: the kernel drops what is too much, after the router
    before, cpu = lab.figures(), _cpu_s(lab.router_pid)
    flood = _start(lab, 2, "flood", lab.address(3), rate, _LOAD_S)
    time.sleep(1.0)
    times = _result(lab, 1, "ask", lab.address(0), 300, 0)
    sent = int(flood.communicate()[0])
    time.sleep(0.1)
    figures = lab.figures()
    cpu = _cpu_s(lab.router_pid) - cpu
    carried = figures.forwarded - before.forwarded
    _row(f"5 ms each way beside {sent / _LOAD_S:,.0f} packets/s", times, 10, median(plain))
    share = (carried - 2 * len(times)) / sent
    print(f"that load: {share:.2%} of {sent} packets carried, {cpu / carried * 1e6:.1f} us of CPU each")
    print(f"the router's own lateness: p50 < {figures.late_p50_us} us, p99 < {figures.late_p99_us} us")
    drain.close()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench lab", description=__doc__)
    parser.add_argument("--rate", type=int, default=40_000, help="packets/s of the load")
    parser.add_argument("--part", nargs="+", help="another process of the benchmark; used by itself")
    arguments = parser.parse_args(argv)
    match arguments.part:
        case ["echo"]:
            _echo()
        case ["sink"]:
            _sink()
        case ["ask", address, count, pause_ms]:
            _ask(address, int(count), float(pause_ms))
        case ["flood", address, rate, seconds]:
            _flood(address, int(rate), float(seconds))
        case ["pour", address, size]:
            _pour(address, int(size))
        case _:
            header("the delay laboratory")
            _measure(arguments.rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
