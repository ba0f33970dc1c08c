"""A mesh of real processes: a gateway and Islands, each of which a test may kill, freeze and bring back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

MODEL = "smollm2-135m"
KEY = "ak_test_0123456789abcdef"
#: Generous: these machines are shared, and one busy core loads a model slowly.
READY_S = 120


class Program:
    """A child process whose output is read as it comes."""

    def __init__(self, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **(env or {})},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._arrived:
                self.lines.append(line.rstrip("\n"))
                self._arrived.notify_all()
        with self._arrived:
            self.lines.append("<end of output>")
            self._arrived.notify_all()

    def wait_line(self, matches: Callable[[str], bool], timeout_s: float = READY_S) -> str:
        """The first line that matches; fails the test if the program ends or stays silent."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            seen = 0
            while True:
                for line in self.lines[seen:]:
                    if matches(line):
                        return line
                seen = len(self.lines)
                if self.lines and self.lines[-1] == "<end of output>":
                    break
                if not self._arrived.wait(timeout=max(0.0, deadline - time.monotonic())):
                    break
        pytest.fail("the line did not come; the program said:\n" + "\n".join(self.lines[-40:]))

    def strike(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGINT, timeout_s: float = 20) -> int:
        """End it and return its exit code; a program that does not end by itself fails the test."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.strike(signal.SIGCONT)
                self.strike(number)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail("did not end when asked; it said:\n" + "\n".join(self.lines[-40:]))
        finally:
            self._close()
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.strike(signal.SIGKILL)
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class MeshUnderTest:
    """One gateway and any number of Islands, in processes of their own."""

    def __init__(self, root: Path, *gateway_settings: str) -> None:
        self.root = root
        self.islands: dict[str, Program] = {}
        settings = [part for text in gateway_settings for part in ("--set", text)]
        self.gateway = Program(
            *("gateway.cli", "run", "--port", "0", "--data-dir", str(root / "gateway")),
            *("--listen", "/ip4/127.0.0.1/tcp/0", "--log-format", "json", *settings),
            env={"ARCHI_API_KEY": KEY},
        )
        self.base = self.gateway.wait_line(lambda line: line.startswith("listening ")).split()[1]
        self.url = self.base + "/v1"
        self.address = self.gateway.wait_line(lambda line: line.startswith("mesh ")).split()[1]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def start_island(self, name: str, *settings: str) -> Program:
        flags = [part for text in settings for part in ("--set", text)]
        program = self.islands[name] = Program(
            *("node.cli", "run", "--name", name, "--data-dir", str(self.root / name), "--cargo", MODEL),
            *("--coordinator", self.address, "--log-format", "json", *flags),
            env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        return program

    def wait_ready(self, count: int, timeout_s: float = READY_S) -> None:
        """Until that many Islands offer the model, loaded."""
        deadline = time.monotonic() + timeout_s
        ready: object = None
        while time.monotonic() < deadline:
            ready = self.model().get("ready")
            if ready == count:
                return
            time.sleep(0.1)
        lines = "\n".join(f"{name}: {line}" for name, i in self.islands.items() for line in i.lines[-10:])
        pytest.fail(f"{ready} of {count} Islands ready; they said:\n{lines}")

    def model(self) -> dict[str, object]:
        response = httpx.get(f"{self.url}/models", headers=self.headers, timeout=20)
        response.raise_for_status()
        found = [model for model in response.json()["data"] if model["id"] == MODEL]
        return found[0].get("archipelag", found[0]) if found else {}

    def stop(self) -> None:
        for program in (*self.islands.values(), self.gateway):
            program.kill()


@pytest.fixture
def start_mesh(tmp_path: Path) -> Iterator[Callable[..., MeshUnderTest]]:
    """Start a gateway with these settings (`a.b=c`); everything is gone when the test ends."""
    meshes: list[MeshUnderTest] = []

    def start(*gateway_settings: str) -> MeshUnderTest:
        mesh = MeshUnderTest(tmp_path / f"mesh-{len(meshes)}", *gateway_settings)
        meshes.append(mesh)
        return mesh

    yield start
    for mesh in meshes:
        mesh.stop()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshUnderTest]:
    """One gateway and two Islands for all tests of a file that kill nothing."""
    started = MeshUnderTest(tmp_path_factory.mktemp("mesh"))
    started.start_island("coral")
    started.start_island("atoll")
    started.wait_ready(2)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def program_class() -> type[Program]:
    return Program


@pytest.fixture(scope="session")
def model_name() -> str:
    return MODEL


@pytest.fixture(scope="session")
def api_key() -> str:
    return KEY
