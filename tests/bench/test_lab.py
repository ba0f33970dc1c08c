"""The delay laboratory: delays as asked, bytes intact, partitions, limits, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.lab import Lab, why_unavailable
from bench.lab.lab import kill_orphans

REASON = why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30


def udp(lab: Lab, node: int, port: int = 0) -> socket.socket:
    """A socket of this process within a node."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((lab.address(node), port))
        made.settimeout(PATIENCE_S)
        return made

    return lab.inside(node, make)


def one_way_s(lab: Lab, here: int, there: int) -> float:
    with udp(lab, here) as sender, udp(lab, there) as receiver:
        began = time.perf_counter()
        sender.sendto(b"hello", receiver.getsockname())
        data, whence = receiver.recvfrom(100)
        took = time.perf_counter() - began
        assert (data, whence) == (b"hello", sender.getsockname())
        return took


def shortest_s(lab: Lab, here: int, there: int) -> float:
    """Of several: a busy machine makes some late, none early."""
    return min(one_way_s(lab, here, there) for _ in range(5))


def arrives(lab: Lab, here: int, there: int, within_s: float) -> bool:
    with udp(lab, here) as sender, udp(lab, there) as receiver:
        receiver.settimeout(within_s)
        sender.sendto(b"hello", receiver.getsockname())
        try:
            receiver.recv(100)
        except TimeoutError:
            return False
        return True


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_direction_has_its_own_delay() -> None:
    with Lab([[0, 10, 40], [80, 0, 0], [1, 0, 0]]) as lab:
        for here, there, asked_s in ((0, 1, 0.010), (0, 2, 0.040), (1, 0, 0.080), (2, 0, 0.001), (1, 2, 0)):
            assert asked_s <= shortest_s(lab, here, there) < asked_s + 0.02
        lab.set_delays(30)
        for here, there in ((0, 1), (1, 0), (1, 2)):
            assert 0.030 <= shortest_s(lab, here, there) < 0.050


def test_a_program_within_a_node_is_met_at_its_address() -> None:
    """Real processes: a server in one namespace, a client in another."""
    server_text = (
        "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
    )
    client_text = (
        "import sys, time, socket\n"
        "while True:\n"
        "    try: s = socket.create_connection((sys.argv[1], 8000), 5); break\n"
        "    except OSError: time.sleep(0.05)\n"
        "print(s.getsockname()[0], s.getpeername()[0])\n"
    )
    with Lab(2, nodes=2) as lab:
        lab.run(0, [sys.executable, "-c", server_text], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = lab.run(
            1, [sys.executable, "-c", client_text, lab.address(0)], stdout=subprocess.PIPE, text=True
        )
        seen = client.communicate(timeout=PATIENCE_S)[0].split()
        assert seen == [lab.address(1), lab.address(0)]
        # The namespaces are nowhere else: no such address from outside.
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        outside.connect((lab.address(0), 9))
        assert outside.getsockname()[0] != lab.address(1)
        outside.close()


def test_a_stream_s_bytes_arrive_intact() -> None:
    blob = os.urandom(8 << 20)
    with Lab(2, nodes=2) as lab:

        def listen() -> socket.socket:
            made = socket.create_server((lab.address(0), 0))
            made.settimeout(PATIENCE_S)
            return made

        listener = lab.inside(0, listen)
        client = lab.inside(1, lambda: socket.create_connection(listener.getsockname(), PATIENCE_S))
        client.setblocking(True)  # noqa: FBT003 - no keyword there
        server, _ = listener.accept()
        server.settimeout(PATIENCE_S)
        reader = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os, sys; s = os.fdopen({client.fileno()}, 'wb'); s.write(sys.stdin.buffer.read())",
            ],
            stdin=subprocess.PIPE,
            pass_fds=[client.fileno()],
        )
        client.close()
        assert reader.stdin is not None
        reader.stdin.write(blob)
        reader.stdin.close()
        digest = hashlib.sha256()
        while chunk := server.recv(1 << 16):
            digest.update(chunk)
        assert reader.wait() == 0
        assert digest.digest() == hashlib.sha256(blob).digest()
        figures = lab.figures()
        assert figures.forwarded > len(blob) // 1500
        assert figures.failed == figures.cut == figures.lost == 0
        for made in (server, listener):
            made.close()


def test_partition_and_heal() -> None:
    with Lab(1, nodes=5) as lab:
        lab.partition([[0, 1], [2]])  # 3 and 4 are the rest
        for here in range(5):
            for there in range(5):
                if here != there:
                    together = {here, there} in ({0, 1}, {3, 4})
                    assert arrives(lab, here, there, PATIENCE_S if together else 0.05) is together
        assert lab.figures().cut >= 16
        lab.heal()
        assert all(arrives(lab, 0, there, PATIENCE_S) for there in range(1, 5))
        lab.cut(2)
        assert not arrives(lab, 2, 3, 0.05)
        assert not arrives(lab, 3, 2, 0.05)
        assert arrives(lab, 3, 4, PATIENCE_S)


def test_what_is_under_way_is_lost_with_its_link() -> None:
    with Lab(300, nodes=2) as lab, udp(lab, 0) as sender, udp(lab, 1) as receiver:
        sender.sendto(b"lost", receiver.getsockname())
        lab.partition([[0], [1]])
        eventually(lambda: lab.figures().cut == 1)
        lab.heal()
        sender.sendto(b"arrives", receiver.getsockname())
        assert receiver.recv(100) == b"arrives"


def test_loss_is_a_share_and_packets_keep_their_order() -> None:
    with Lab(1, nodes=2, jitter_ms=5, seed=7) as lab, udp(lab, 0) as sender, udp(lab, 1) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        for lost in (0.0, 0.3, 1.0):
            lab.set_loss(lost)
            before = lab.figures()
            for number in range(500):
                sender.sendto(number.to_bytes(4, "big"), receiver.getsockname())

            def settled(before=before) -> bool:
                now = lab.figures()
                return now.forwarded + now.lost - before.forwarded - before.lost == 500

            eventually(settled)
            after = lab.figures()
            assert abs((after.lost - before.lost) / 500 - lost) < 0.1
            got = [int.from_bytes(receiver.recv(10), "big") for _ in range(after.forwarded - before.forwarded)]
            assert got == sorted(got)


def test_a_rate_delays_and_its_queue_overflows() -> None:
    with Lab(0, nodes=2, rates_mbit=8, queue_kib=64) as lab, udp(lab, 0) as sender, udp(lab, 1) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        began = time.perf_counter()
        for _ in range(50):  # 50 kB at 1 MB/s: 50 ms
            sender.sendto(bytes(972), receiver.getsockname())  # 1000 bytes as a packet
        for _ in range(50):
            receiver.recv(2000)
        assert time.perf_counter() - began >= 0.049
        for _ in range(200):  # 200 kB at once into 64 KiB
            sender.sendto(bytes(972), receiver.getsockname())
        eventually(lambda: lab.figures().forwarded + lab.figures().overflow == 250)
        assert 0 < lab.figures().overflow < 200


def test_thirty_nodes_reach_each_other() -> None:
    generator = np.random.default_rng(3)
    delays = generator.uniform(1, 10, (30, 30))
    with Lab(delays) as lab:
        for here in range(30):
            there = (here + 11) % 30
            assert delays[here, there] / 1e3 <= one_way_s(lab, here, there) < PATIENCE_S
        assert lab.figures().forwarded == 30


DAEMON = """
import os, time
if os.fork():
    os._exit(0)
os.setsid()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_behind() -> None:
    with Lab(1, nodes=2) as lab:
        # A daemon that has left its session and its parent.
        process = lab.run(0, [sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        daemon = int(process.stdout.readline())
        router = lab.router_pid
        assert is_alive(daemon)
        assert is_alive(router)
    assert not is_alive(router)
    eventually(lambda: not is_alive(daemon))
    lab.close()  # once more does nothing


OWNER = """
import sys, time
from bench.lab import Lab
lab = Lab(1, nodes=2)
child = lab.run(0, ["sh", "-c", "echo; exec sleep 600"], stdout=-1)
child.stdout.readline()
print(lab.router_pid, child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("router_too", [False, True])
def test_a_killed_owner_leaves_nothing_behind(router_too: object) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    router, child = map(int, owner.stdout.readline().split())
    if router_too:
        os.kill(router, signal.SIGSTOP)  # it must not see its owner go
    owner.kill()
    owner.wait()
    owner.stdout.close()
    if router_too:
        os.kill(router, signal.SIGKILL)
        eventually(lambda: not is_alive(router))
        assert is_alive(child)
        with Lab(0, nodes=1):  # whoever comes next sweeps
            pass
    eventually(lambda: not is_alive(child) and not is_alive(router))
    assert kill_orphans() == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descriptors() -> set[str]:
    """Those that are open here."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"delays_ms": 1}, "nodes=N"),
        ({"delays_ms": [[1, 2, 3], [1, 2, 3]]}, "2 x 2"),
        ({"delays_ms": -1, "nodes": 2}, "delay"),
        ({"delays_ms": 1, "nodes": 2, "loss": 1.5}, "loss"),
        ({"delays_ms": 1, "nodes": 2000}, "1000"),
    ],
)
def test_impossible_laboratories(arguments: dict[str, object], words: str) -> None:
    before = descriptors()
    with pytest.raises(ValueError, match=words):
        Lab(**arguments)  # type: ignore[arg-type]
    assert descriptors() == before


def test_descriptors_are_given_back() -> None:
    before = descriptors()
    with Lab(0, nodes=10) as lab, udp(lab, 0):
        lab.run(3, ["sleep", "600"], stdout=subprocess.PIPE)
        assert len(descriptors()) >= len(before) + 10
    assert descriptors() == before
    assert lab.figures().forwarded == 0


def test_unknown_nodes_are_named() -> None:
    with Lab(0, nodes=2) as lab:
        for use in (lab.address, lab.cut, lambda node: lab.run(node, ["true"])):
            with pytest.raises(ValueError, match="no node 2"):
                use(2)
        with pytest.raises(ValueError, match="two groups"):
            lab.partition([[0, 1], [1]])
