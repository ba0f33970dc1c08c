"""Several processes and one store; processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cargos.manifest import canonical_json
from cargos.store import CargoStore

MIB = 1024 * 1024
DEADLINE_S = 30

#: Fetches a manifest and prints each new state, then a line with the result.
CHILD = """
import sys, trio, json
from pathlib import Path
from cargos.manifest_text import parse_manifest_untrusted
from cargos.store import CargoStore
manifest = parse_manifest_untrusted(Path(sys.argv[1]).read_bytes(), "json")
states = []
def note(step):
    if not states or states[-1] != step.state:
        states.append(step.state)
        print(step.state, flush=True)
async def main():
    paths = await CargoStore(Path(sys.argv[2])).ensure(manifest, base=Path(sys.argv[1]).parent, progress=note)
    print(json.dumps({name: str(path) for name, path in paths.items()}), flush=True)
trio.run(main)
"""


@pytest.fixture
def spawn(tmp_path, store):
    """Start a child that fetches the manifest; its stdout is a pipe."""
    children = []

    def start(manifest):
        path = tmp_path / "manifest.json"
        path.write_text(canonical_json(manifest))
        root = str(Path(__file__).parents[3])
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(store.root)],
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,  # the traceback of Ctrl-C
            env={**os.environ, "PYTHONPATH": root},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


def test_three_islands_that_start_together_download_once(server, spawn, store, cargo, blob):
    data = blob(3 * MIB)
    served = server.serve("/m", data, hold_after=2 * MIB)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    first = spawn(manifest)
    assert first.stdout.readline() == "downloading\n"
    others = [spawn(manifest), spawn(manifest)]
    assert [child.stdout.readline() for child in others] == ["waiting\n", "waiting\n"]
    served.release.set()
    for child in (first, *others):
        rest, _ = child.communicate(timeout=DEADLINE_S)
        states, result = rest.splitlines()[:-1], rest.splitlines()[-1]
        assert states == ["done"]
        assert Path(json.loads(result)["m"]).read_bytes() == data
    assert len(served.requests) == 1
    assert served.sent_bytes == len(data)


def test_when_the_one_that_downloads_is_killed_a_waiter_goes_on_from_there(server, spawn, store, cargo, blob):
    data = blob(4 * MIB)
    served = server.serve("/m", data, hold_after=2 * MIB + 512 * 1024)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    first = spawn(manifest)
    assert first.stdout.readline() == "downloading\n"
    second = spawn(manifest)
    assert second.stdout.readline() == "waiting\n"
    part = store.root / "parts" / f"{manifest.files[0].sha256}.part"
    until(lambda: part.stat().st_size >= 2 * MIB)
    served.hold_after = None
    os.kill(first.pid, signal.SIGKILL)
    rest, _ = second.communicate(timeout=DEADLINE_S)
    assert Path(json.loads(rest.splitlines()[-1])["m"]).read_bytes() == data
    (start,) = [r["range"] for r in served.requests[1:]]
    assert int(start.removeprefix("bytes=").removesuffix("-")) >= 2 * MIB


async def test_killed_in_the_middle_then_resumed(server, spawn, store, cargo, blob):
    data = blob(3 * MIB)
    served = server.serve("/m", data, hold_after=2 * MIB)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    child = spawn(manifest)
    part = store.root / "parts" / f"{manifest.files[0].sha256}.part"
    until(lambda: part.exists() and part.stat().st_size >= MIB)
    child.kill()
    child.wait()
    left = part.read_bytes()
    assert left == data[: len(left)]
    served.hold_after = None
    paths = await store.ensure(manifest, base=Path("/"))
    assert paths["m"].read_bytes() == data
    assert served.requests[1]["range"] == f"bytes={len(left)}-"


def test_ctrl_c_ends_quickly_and_keeps_a_part(server, spawn, store, cargo, blob):
    data = blob(3 * MIB)
    server.serve("/m", data, hold_after=MIB + 128 * 1024)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    child = spawn(manifest)
    part = store.root / "parts" / f"{manifest.files[0].sha256}.part"
    until(lambda: part.exists() and part.stat().st_size >= MIB)
    child.send_signal(signal.SIGINT)
    assert child.wait(DEADLINE_S) != 0
    assert part.read_bytes() == data[: part.stat().st_size]
    assert not list((store.root / "blobs").rglob("*"))


async def test_a_lock_left_by_the_dead_holds_nobody_up(store, cargo, blob, tmp_path):
    (tmp_path / "a").write_bytes(blob(10))
    manifest = cargo(("m", blob(10), ["file:a"]))
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / f"{manifest.files[0].sha256}.lock").write_bytes(b"")
    assert (await CargoStore(store.root).ensure(manifest, base=tmp_path))["m"].read_bytes() == blob(10)
