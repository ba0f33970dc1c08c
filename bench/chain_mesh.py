"""For the benchmarks of chains: a gateway and Islands as processes, on loopback or each in a namespace of the
delay laboratory, and a client that streams from the gateway as any OpenAI client would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, cast

from bench.chain_client import KEY, Answer, Client
from bench.lab import Lab
from cargos.resolve import resolve_cargo
from protocol.limits import MIB
from routing.chains.plan import ModelShape

#: The demo's Cargo: small enough for a benchmark of minutes.
CARGO = "smollm2-135m"

#: Sessions at a time in each stage, and tokens in each.
SLOTS = 8
CONTEXT = 2048


NAMES = ("coral", "atoll", "lagoon", "reef", "skerry", "cay", "holm", "islet")

#: Slices are cut and models loaded on a machine that does other things too.
READY_S = 240
#: Of a line of a log, its end: there stands what an exception says.
LINE_CHARS = 600


#: Island, first layer, last layer (exclusive).
Part: TypeAlias = tuple[str, int, int]


class Program:
    """A process whose output is read as it comes."""

    def __init__(
        self, label: str, start: Callable[[Sequence[str], dict[str, str]], subprocess.Popen[str]]
    ) -> None:
        self.label = label
        self.lines: list[str] = []
        self._start = start
        self._changed = threading.Condition()
        self.process: subprocess.Popen[str] | None = None

    def begin(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.process = self._start([sys.executable, "-m", *arguments], environment)
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, start: str) -> str:
        """The rest of the first line that starts like this. Raises SystemExit if it does not come."""
        deadline = time.monotonic() + READY_S
        with self._changed:
            while True:
                for line in self.lines:
                    if line.startswith(start):
                        return line.removeprefix(start)
                left = deadline - time.monotonic()
                if left < 0 or (self.process is not None and self.process.poll() is not None):
                    raise SystemExit(f"{self.label} did not say {start!r}; it said:\n" + self.last_words())
                self._changed.wait(min(left, 0.5))

    def last_words(self) -> str:
        return "\n".join(f"  {self.label}: {line[-LINE_CHARS:]}" for line in self.lines[-12:])

    def end(self, number: int = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Mesh(Client):
    """A gateway and its Islands. With a laboratory, the gateway is node 0 of it and Island i node i + 1."""

    def __init__(
        self,
        cargo: str,
        model: str,
        *,
        activations: str = "f16s",
        settings: Sequence[str] = (),
        lab: Lab | None = None,
    ) -> None:
        """`settings`: of the gateway, as for `--set`."""
        super().__init__("127.0.0.1" if lab is None else lab.address(0), 0, model, lab=lab)
        self.cargo = cargo
        self._folder = tempfile.TemporaryDirectory(prefix="archipelag-bench-")
        self.root = Path(self._folder.name)
        self.islands: dict[str, Program] = {}
        self._settings: dict[str, tuple[str, ...]] = {}
        self._caches: dict[str, Path] = {}
        self.gateway = self._program("gateway", 0)
        try:
            self.gateway.begin(
                [
                    *("gateway.cli", "run", "--host", self.host, "--port", "0", "--log-format", "json"),
                    *("--data-dir", str(self.root / "gateway"), "--listen", f"/ip4/{self.host}/tcp/0"),
                    *("--set", "http.requests_per_minute=0", "--set", f"mesh.activations={activations}"),
                    *(part for text in settings for part in ("--set", text)),
                ],
                {"ARCHI_API_KEY": KEY},
            )
            self.port = int(self.gateway.wait_line("listening ").rsplit(":", 1)[1])
            self.address = self.gateway.wait_line("mesh ")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for program in (*self.islands.values(), self.gateway):
            program.end()
        self._folder.cleanup()

    def _host(self, node: int) -> str:
        return "127.0.0.1" if self.lab is None else self.lab.address(node)

    def _program(self, label: str, node: int) -> Program:
        def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
            full = {
                **{name: value for name, value in os.environ.items() if name != "ARCHI_CONFIG"},
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONUNBUFFERED": "1",
                "NO_COLOR": "1",
                **environment,
            }
            pipe = subprocess.PIPE
            if self.lab is not None:
                return self.lab.run(node, command, env=full, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            return subprocess.Popen(
                command,
                env=full,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

        return Program(label, start)

    # --- Islands --------------------------------------------------------------------------------

    def start_island(self, name: str, *settings: str, cache: Path | None = None) -> None:
        """Settings as for `archi-node run --set`. `cache`: a store of its own."""
        if cache is not None:
            self._caches[name] = cache
        node = 1 + NAMES.index(name)
        program = self.islands[name] = self._program(name, node)
        self._settings[name] = settings
        program.begin(
            [
                *(
                    "node.cli",
                    "run",
                    "--name",
                    name,
                    "--data-dir",
                    str(self.root / name),
                    "--cargo",
                    self.cargo,
                ),
                *("--coordinator", self.address, "--listen", f"/ip4/{self._host(node)}/tcp/0"),
                *("--log-format", "json", *(part for text in settings for part in ("--set", text))),
            ],
            {"ARCHI_CACHE": str(self._caches[name])} if name in self._caches else {},
        )

    def kill_island(self, name: str) -> None:
        """As by a power cut: the processes that it started go with it by themselves."""
        self.islands[name].end(signal.SIGKILL)

    def restart_island(self, name: str) -> None:
        self.start_island(name, *self._settings[name])

    def signal_island(self, name: str, number: int) -> None:
        process = self.islands[name].process
        assert process is not None
        process.send_signal(number)

    # --- chains ---------------------------------------------------------------------------------

    def layout(self) -> tuple[list[Part], list[Part]]:
        """Stages, the head last, and spares; empty: no chain stands."""
        return layout_of(self.gateway.lines)

    def layout_words(self) -> str:
        stages, spares = self.layout()
        words = ", ".join(f"{name} {first}-{last - 1}" for name, first, last in stages)
        standing = ", ".join(f"{name} {first}-{last - 1}" for name, first, last in spares)
        return (words or "one Island with all layers") + (f"; spares {standing}" if standing else "")

    def serving(self) -> list[str]:
        """The Islands of the last job that began, the head last."""
        return serving_of(self.gateway.lines)

    def wait_spares(self) -> None:
        """Until each stage has a spare again."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            stages, spares = self.layout()
            ranges = {(first, last) for _, first, last in stages}
            if ranges and ranges == {(first, last) for _, first, last in spares}:
                return
            time.sleep(0.2)
        raise SystemExit(f"not every stage has a spare: {self.layout_words()}\n{self.gateway.last_words()}")

    def wait_answers(self) -> None:
        """Until the model answers. Raises SystemExit with what the processes said last if it does not."""
        deadline = time.monotonic() + READY_S
        answer = Answer(error="nothing was asked")
        while time.monotonic() < deadline:
            if self.get(f"/v1/models/{self.model}") is not None:
                answer = self.ask("Hello", 2)
                if not answer.error and answer.finish:
                    return
                if answer.error.startswith("500"):  # ours to repair; it will not go away
                    break
            for name, island in self.islands.items():
                if island.process is not None and island.process.poll() is not None:
                    raise SystemExit(f"{name} ended:\n{island.last_words()}")
            time.sleep(0.5)
        words = "\n".join(island.last_words() for island in self.islands.values())
        raise SystemExit(f"the model does not answer: {answer.error}\n{self.gateway.last_words()}\n{words}")


def layout_of(lines: Sequence[str]) -> tuple[list[Part], list[Part]]:
    """Stages and spares as a gateway's log tells them last."""
    for line in reversed(lines):
        if '"chain ready"' in line:
            said = json.loads(line)
            parts = [[cast("Part", tuple(part)) for part in said[key]] for key in ("stages", "spares")]
            return parts[0], parts[1]
        if '"chain incomplete"' in line or '"no chain"' in line:
            break
    return [], []


def serving_of(lines: Sequence[str]) -> list[str]:
    """The Islands of the last job that a gateway's log tells of. Raises SystemExit if it ran on no chain."""
    for line in reversed(lines):
        if line.startswith("{") and '"queue_ms"' in line:
            layers = json.loads(line).get("layers", "")
            if layers:
                return [part.rsplit(" ", 1)[0] for part in layers.split(", ")]
            break
    raise SystemExit("the gateway told of no chain for its last job")


def shape_of(cargo: str, *, slots: int = SLOTS) -> ModelShape:
    """Raises SystemExit if the Cargo can not be spread."""
    sharding = resolve_cargo(cargo).manifest.sharding
    if sharding is None:
        raise SystemExit(f"{cargo} can not be spread: its manifest does not say how")
    return ModelShape.of_sharding(sharding, slots=slots, context=CONTEXT)


def memory_mib(shape: ModelShape, stages: int) -> int:
    """What each Island gets, so that so many are needed and suffice. Raises SystemExit if it can not be."""

    def needed(room_bytes: int) -> int:
        """Stages, each as full as it goes."""
        count = at = 0
        while at < shape.layers:
            last = at
            while last < shape.layers and shape.bytes_of(at, last + 1) <= room_bytes:
                last += 1
            if last == at:
                return sys.maxsize  # not even one layer fits
            count, at = count + 1, last
        return count

    room_mib = 1
    while needed(room_mib * MIB) > stages:
        room_mib += 1
    roomier = room_mib + room_mib // 16  # not only one cut fits
    room_mib = roomier if needed(roomier * MIB) == stages else room_mib
    if needed(room_mib * MIB) != stages:
        raise SystemExit(f"there is no cut into {stages} parts of about the same size")
    return room_mib


@contextmanager
def open_whole(cargo: str) -> Generator[Mesh]:
    """One Island with all layers."""
    with Mesh(cargo, resolve_cargo(cargo).manifest.name) as mesh:
        mesh.start_island(NAMES[0], f"engine.slots={SLOTS}", f"engine.context_length={CONTEXT}")
        mesh.wait_answers()
        yield mesh


@contextmanager
def open_chain(
    cargo: str,
    stages: int,
    *,
    spares: bool = False,
    drafts: bool = True,
    activations: str = "f16s",
    lab: Lab | None = None,
) -> Generator[Mesh]:
    """So many Islands that none has room for all (twice as many with spares), and a chain over them."""
    room_mib = memory_mib(shape_of(cargo), stages)
    with Mesh(cargo, resolve_cargo(cargo).manifest.name, activations=activations, lab=lab) as mesh:
        for name in NAMES[: stages * (2 if spares else 1)]:
            mesh.start_island(
                name,
                *(f"shards.slots={SLOTS}", f"shards.context_length={CONTEXT}"),
                *(f"shards.memory_mib={room_mib}", f"shards.drafts={'true' if drafts else 'false'}"),
            )
        mesh.wait_answers()
        if spares:
            mesh.wait_spares()
        if len(mesh.serving()) != stages:
            raise SystemExit(f"a chain of {stages} was wanted: {mesh.layout_words()}")
        yield mesh
