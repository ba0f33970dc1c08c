"""N machines that are network namespaces, and between each two of them whatever delay the experiment wants.

    with Lab(delays_ms) as lab:
        server = lab.run(0, ["python3", "server.py"])
        client = lab.run(1, ["python3", "client.py", lab.address(0)])
        lab.partition([[0], [1]])

Every namespace has loopback and one TUN device. All packets between namespaces pass through one process
(router.c) that holds each back for its link's delay. Nothing has a name or lies in the file system: when the
laboratory ends, however it ends, its processes, devices and namespaces are gone.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from bench.lab.figures import LabFigures, Shared
from bench.lab.namespaces import Namespace, inside, make_namespaces
from bench.lab.need import LabUnavailable, router_program, why_unavailable

T = TypeVar("T")

Matrix: TypeAlias = npt.ArrayLike
"""A number, or N rows of N numbers: row i, column j holds for what i sends to j. The diagonal means nothing."""

#: Names a laboratory in the environment of its processes: pid and start time of its owner, and a random part.
MARK: Final = "ARCHI_LAB"
_MARK_FORM: Final = re.compile(rb"ARCHI_LAB=(\d+)-(\d+)-[0-9a-f]+\Z")

#: 10.99.0.0/16; node i is the (i+1)-th address. Private, so that no address rule takes it for the internet.
_NETWORK: Final = 10 << 24 | 99 << 16
_PREFIX: Final = 16

#: Two descriptors a node; a thousand nodes are more than two cores can run.
MAX_NODES: Final = 1000

#: Longest delay: beyond it TCP gives up anyway.
MAX_DELAY_MS: Final = 60_000

#: Packets under way in all; a gigabit for two seconds.
_HELD_BYTES_MAX: Final = 256 << 20

_START_S: Final = 10.0
_STOP_S: Final = 5.0


class Lab:
    """See the module's head. Raises LabUnavailable if the machine or the user can not have one.

    `delays_ms`: one-way. `loss`: share of packets, 0 to 1. `jitter_ms`: up to so much more, uniformly; packets
    of one direction keep their order. `rates_mbit`: 0 is no limit; what exceeds it waits in `queue_kib`, then
    is dropped. `seed` of losses and jitter. `awake`: processors do not sleep meanwhile, so that timers ring in
    time; they use more power.
    """

    def __init__(
        self,
        delays_ms: Matrix,
        *,
        nodes: int = 0,
        loss: Matrix = 0.0,
        jitter_ms: Matrix = 0.0,
        rates_mbit: Matrix = 0.0,
        queue_kib: int = 256,
        mtu: int = 1500,
        seed: int = 1,
        awake: bool = True,
    ) -> None:
        if reason := why_unavailable():
            raise LabUnavailable(reason)
        delays = np.asarray(delays_ms, dtype=np.float64)
        self.nodes: Final = nodes or (len(delays) if delays.ndim == 2 else 0)
        if not 1 <= self.nodes <= MAX_NODES:
            raise ValueError(
                f"a laboratory has 1 to {MAX_NODES} nodes: give N x N delays, or one delay and nodes=N"
            )
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: list[Namespace] = []
        self._router: subprocess.Popen[bytes] | None = None
        self._awake: int | None = None
        self._shared = Shared(self.nodes)
        self._mark = f"{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}"
        shared = self._shared
        shared["network"], shared["seed"] = _NETWORK, seed
        shared["queue_bytes"], shared["held_bytes_max"] = queue_kib << 10, _HELD_BYTES_MAX
        try:
            self.set_delays(delays)
            self.set_loss(loss)
            self.set_jitter(jitter_ms)
            self.set_rates(rates_mbit)
            kill_orphans()
            if awake:
                self._awake = _keep_awake()
            self._open(mtu)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- machines -------------------------------------------------------------------------------

    def address(self, node: int) -> str:
        """The IPv4 address of a node."""
        return socket.inet_ntoa(struct.pack("!I", _NETWORK + self._known(node) + 1))

    def command(self, node: int, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command that runs `argv` within a node, for other starters; give it `environment`, too."""
        return ["nsenter", f"--net={self.namespace(node)}", "--", *(os.fspath(argument) for argument in argv)]

    def namespace(self, node: int) -> str:
        """The file of a node's namespace, for programs that enter it themselves (setns)."""
        return f"/proc/{os.getpid()}/fd/{self._namespaces[self._known(node)].descriptor}"

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (default: ours) with the mark by which processes of this laboratory are found and ended."""
        return {**(os.environ if base is None else base), MARK: self._mark}

    def run(
        self,
        node: int,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.Popen[Any]:
        """Start a program within a node. It and what it starts are killed with the laboratory."""
        process: subprocess.Popen[Any] = subprocess.Popen(
            self.command(node, argv),
            env=self.environment(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            cwd=cwd,
        )
        self._processes.append(process)
        return process

    @property
    def router_pid(self) -> int:
        """The process that carries the packets, to measure it."""
        if self._router is None:
            raise ValueError("the laboratory is closed")
        return self._router.pid

    def inside(self, node: int, work: Callable[[], T]) -> T:
        """Call `work` within a node and return what it does: sockets that it opens stay there."""
        return inside(self._namespaces[self._known(node)].descriptor, work)

    # --- links ----------------------------------------------------------------------------------

    def set_delays(self, delays_ms: Matrix) -> None:
        """One-way delays. Packets under way keep the time that they were given."""
        self._shared.links["delay_ns"] = self._matrix(delays_ms, "a delay in ms", MAX_DELAY_MS) * 1e6

    def set_jitter(self, jitter_ms: Matrix) -> None:
        self._shared.links["jitter_ns"] = self._matrix(jitter_ms, "jitter in ms", MAX_DELAY_MS) * 1e6

    def set_loss(self, loss: Matrix) -> None:
        self._shared.links["loss"] = self._matrix(loss, "loss", 1.0) * (2**32 - 1)

    def set_rates(self, rates_mbit: Matrix) -> None:
        self._shared.links["bytes_per_s"] = self._matrix(rates_mbit, "a rate in Mbit/s", 1e6) * 125_000

    def partition(self, groups: Iterable[Iterable[int]]) -> None:
        """From now on only nodes of one group reach each other; nodes that are not named form one more group.

        Packets under way over a link that is cut are lost.
        """
        group_of = np.full(self.nodes, -1)
        for number, group in enumerate(groups):
            for node in group:
                if group_of[self._known(node)] >= 0:
                    raise ValueError(f"node {node} is in two groups")
                group_of[node] = number
        self._shared.links["cut"] = group_of[:, None] != group_of[None, :]

    def cut(self, node: int) -> None:
        """Pull this node's cable, beside all that is cut already."""
        self._shared.links["cut"][self._known(node), :] = 1
        self._shared.links["cut"][:, node] = 1

    def heal(self) -> None:
        """All links carry packets again."""
        self._shared.links["cut"] = 0

    def figures(self) -> LabFigures:
        """What the router did so far."""
        return self._shared.figures()

    # --- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill every process of this laboratory and remove it. Idempotent."""
        router, self._router = self._router, None
        if router is not None and router.stdin is not None:
            router.stdin.close()  # it kills what carries our mark, then ends
            try:
                router.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                router.kill()
                router.wait()
        _kill_marked(lambda mark: mark == f"{MARK}={self._mark}".encode())
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(OSError):  # what was not flushed has no reader any more
                        pipe.close()
        self._processes.clear()
        if self._awake is not None:
            os.close(self._awake)
            self._awake = None
        for namespace in self._namespaces:
            os.close(namespace.descriptor)
        self._namespaces = []
        self._shared.close()

    # --- inside ---------------------------------------------------------------------------------

    def _open(self, mtu: int) -> None:
        program = router_program()
        self._namespaces = make_namespaces([self.address(node) for node in range(self.nodes)], _PREFIX, mtu)
        tuns = [namespace.tun for namespace in self._namespaces]
        try:
            self._shared.tuns[:] = tuns
            self._router = subprocess.Popen(
                [program, str(self._shared.descriptor), f"{MARK}={self._mark}"],
                stdin=subprocess.PIPE,
                pass_fds=[self._shared.descriptor, *tuns],
                start_new_session=True,  # Ctrl-C is ours; it ends when we do
            )
        finally:
            for tun in tuns:
                os.close(tun)
        deadline = time.monotonic() + _START_S
        while not self._shared["ready"]:
            if self._router.poll() is not None or time.monotonic() > deadline:
                raise LabUnavailable(f"the laboratory's router did not start (exit code {self._router.poll()})")
            time.sleep(0.001)

    def _known(self, node: int) -> int:
        if not 0 <= node < self.nodes:
            raise ValueError(f"there is no node {node}; there are 0 to {self.nodes - 1}")
        return node

    def _matrix(self, values: Matrix, what: str, most: float) -> NDArray[np.float64]:
        matrix = np.asarray(values, dtype=np.float64)
        if matrix.ndim != 0 and matrix.shape != (self.nodes, self.nodes):
            raise ValueError(
                f"one number or {self.nodes} x {self.nodes} numbers were expected, not {matrix.shape}"
            )
        if not np.all((matrix >= 0) & (matrix <= most)):
            raise ValueError(f"{what} lies between 0 and {most:g}")
        return matrix


def _keep_awake() -> int | None:
    """While this descriptor is open, the kernel lets no processor sleep deeper than it can wake in 0 us
    (kernel documentation, pm_qos_interface). None where that is not allowed: delays are then 0.2 ms longer.
    """
    try:
        descriptor = os.open("/dev/cpu_dma_latency", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return None
    os.write(descriptor, struct.pack("i", 0))
    return descriptor


def kill_orphans() -> int:
    """End processes of laboratories whose owner and router are gone (both killed). How many there were."""

    def orphaned(mark: bytes) -> bool:
        match = _MARK_FORM.match(mark)
        return match is not None and _started(int(match[1])) != int(match[2])

    return _kill_marked(orphaned)


def _kill_marked(wanted: Callable[[bytes], bool]) -> int:
    killed: set[int] = set()
    for _ in range(2):  # twice: one may have forked behind our back
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):  # it ended meanwhile
                variables = (entry / "environ").read_bytes().split(b"\0")
                if any(wanted(variable) for variable in variables):
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.add(int(entry.name))
    return len(killed)


def _started(pid: int) -> int:
    """When it started, in the kernel's ticks since boot; -1 if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(status.rpartition(")")[2].split()[19])
