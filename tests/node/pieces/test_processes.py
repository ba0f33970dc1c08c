"""Islands as real processes: one with an empty store and a source that refuses gets its Cargo from others."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import pytest

from cargos.manifest import CargoFile, Licence, Manifest, Needs, RuntimeType, canonical_json
from cargos.store import CargoStore

T = TypeVar("T")

ISLAND = Path(__file__).with_name("island_process.py")
ROOT = Path(__file__).parents[3]
PATIENCE_S = 90  # imports take seconds on a busy machine


class Island:
    """A process and what it said so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ISLAND), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": "/nonexistent"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def line(self, start: str) -> str:
        """The rest of the first line that starts so."""
        return until(
            lambda: next((line.removeprefix(start) for line in self.lines if line.startswith(start)), ""), self
        )

    def logged(self, event: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def until(condition: Callable[[], T], island: Island) -> T:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if island.process.poll() is not None:
            break
        time.sleep(0.02)
    pytest.fail("it did not come; the Island said:\n" + "\n".join(island.lines[-40:]))


@pytest.fixture
def start() -> Generator[Callable[..., Island]]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str) -> Island:
            island = Island(*arguments)
            stack.callback(island.kill)
            return island

        yield begin


def cargo(folder: Path, file: CargoFile) -> Path:
    """A manifest whose source refuses."""
    path = folder / "weights.json"
    path.write_text(
        canonical_json(
            Manifest(
                schema=1,
                name="weights",
                version="1.0.0",
                title="Weights",
                runtime=RuntimeType.LLMCPP,
                publisher="test",
                licence=Licence(spdx="Apache-2.0"),
                needs=Needs(memory_mib=1),
                files=(file,),
            )
        )
    )
    return path


def fill(cache: Path, data: bytes, file: CargoFile) -> None:
    """A store that has the file, as if it had been fetched."""
    blob = cache / "blobs" / file.sha256[:2] / file.sha256
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)


@pytest.mark.slow
def test_an_island_gets_its_cargo_from_peers_killed_and_started_again_while_a_peer_dies(
    start: Callable[..., Island], tmp_path: Path, make_whole
) -> None:
    whole = make_whole(96, piece_bytes=256 * 1024)
    file = whole.file
    manifest = str(cargo(tmp_path, file))
    for name in ("a", "b"):
        fill(tmp_path / name, whole.data, file)

    def island(name: str, bootstrap: str, mbit: int = 0) -> Island:
        return start(manifest, str(tmp_path / name), str(tmp_path / f"{name}.data"), bootstrap, str(mbit))

    first = island("a", "", 24)  # 3 MB/s
    address = first.line("listening ")
    second = island("b", address, 24)
    for holder in (first, second):
        assert holder.line("loaded ") == file.sha256

    marks = tmp_path / "c" / "pieces" / f"{file.sha256}.map"

    def held() -> int:
        return int.from_bytes(marks.read_bytes()[64:]).bit_count() if marks.exists() else 0

    client = island("c", address)
    until(lambda: held() >= 24, client)
    client.kill()
    before = held()
    assert 24 <= before < 96

    client = island("c", address)
    until(lambda: held() >= before + 12, client)
    first.kill()  # the one that it entered by, too
    assert client.line("loaded ") == file.sha256
    until(lambda: client.logged("pieces from peers"), client)
    assert client.logged("pieces from peers")[-1]["pieces"] == 96 - before, "nothing was fetched twice"
    assert CargoStore(tmp_path / "c").verified_path(file) is not None
    assert not marks.exists()
    # What it has now it gives to others, alone.
    second.kill()
    assert (
        start(manifest, str(tmp_path / "d"), str(tmp_path / "d.data"), client.line("listening "), "0").line(
            "loaded "
        )
        == file.sha256
    )
