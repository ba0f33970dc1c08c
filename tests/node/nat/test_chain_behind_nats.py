"""A real model over Islands that all sit behind NAT routers of their own: where holes can be punched, and where
every link of the ring has to go over the relay. A gateway with a public address is relay and coordinator.
And over Islands that can all be dialled, of which two lose sight of each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

pytestmark = [pytest.mark.model, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
CARGO = "smollm2-135m-f16"
KEY = "ak_0123456789abcdef0123"
#: Two Islands have room for all layers, one has not; the third stands by.
MEMORY_MIB = 210
NAMES = ("coral", "atoll", "lagoon")
#: Of an answer, and the one at which something happens: long enough before its end on any machine.
TOKENS = 120
AT_TOKEN = 8
READY_S = 240
DIRECT = "direct connection"
#: Of the lab's public net (conftest.py).
PUBLIC_PREFIX = "5.6.7."

#: A streaming client, for within a namespace: a line of JSON for each chunk.
CLIENT = """
import sys, urllib.request
url, key, body = sys.argv[1:]
headers = {"authorization": "Bearer " + key, "content-type": "application/json"}
with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=240) as answer:
    for line in answer:
        if line.startswith(b"data: {"):
            print(line[6:].decode().strip(), flush=True)
"""


class Scene:
    """Processes in namespaces, and what they wrote."""

    def __init__(self, folder: Path, place: tuple[str, str]) -> None:
        self.folder = folder
        self.place = place
        self.places: dict[str, tuple[str, str]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, namespace: str, *arguments: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", *arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - our own programs
                [*command, "--log-format", "json", "--data-dir", str(self.folder / name)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "ARCHI_API_KEY": KEY, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def start_gateway(self) -> None:
        namespace, address = self.place
        arguments = ["gateway.cli", "run", "--host", "127.0.0.1", "--port", "0"]
        arguments += ["--listen", f"/ip4/{address}/tcp/4001", "--set", "nat.reachability=public"]
        self.start("gateway", namespace, *arguments, "--set", "nat.serve_relay=true")

    def start_island(self, name: str, namespace: str, coordinator: str) -> None:
        arguments = ["node.cli", "run", "--name", name, "--cargo", CARGO, "--coordinator", coordinator]
        arguments += ["--listen", "/ip4/0.0.0.0/tcp/4001", "--set", f"shards.memory_mib={MEMORY_MIB}"]
        self.start(
            name, namespace, *arguments, "--set", "shards.slots=2", "--set", "shards.context_length=1024"
        )

    def lines(self, name: str) -> list[str]:
        return (self.folder / f"{name}.log").read_text(errors="replace").splitlines()

    def said(self, name: str, word: str) -> list[str]:
        return [line for line in self.lines(name) if word in line]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        with trio.move_on_after(READY_S):
            while not condition():  # noqa: ASYNC110 - in other processes
                await trio.sleep(0.2)
            return
        tails = "\n".join(f"{name}: {line[:400]}" for name in self.processes for line in self.lines(name)[-8:])
        pytest.fail(f"{what}\n{tails}")

    async def word(self, start: str) -> str:
        await self.until(lambda: self.said("gateway", start), f"the gateway never said {start!r}")
        return self.said("gateway", start)[0].removeprefix(start)

    def layout(self) -> tuple[list[list], list[list]]:
        lines = self.said("gateway", '"chain ready"')
        said = json.loads(lines[-1]) if lines else {"stages": [], "spares": []}
        return said["stages"], said["spares"]

    def ring(self) -> tuple[str, str]:
        """Of the job that was placed last: at whose place somebody stands by, and the other one."""
        ring = [
            part.split()[0]
            for part in json.loads(self.said("gateway", '"job placed"')[-1])["layers"].split(", ")
        ]
        stages, spares = self.layout()
        layers = {name: layers for name, *layers in (*stages, *spares)}
        (spare,) = set(layers) - set(ring)
        (doubled,) = (name for name in ring if layers[name] == layers[spare])
        (other,) = set(ring) - {doubled}
        return doubled, other

    async def undisturbed(self, url: str) -> tuple[str, list[str]]:
        """An answer that cost no stage, and its ring. An earlier one may come before all Islands have told
        where they are met; a spare stands in for whoever is not found.
        """
        for _ in range(5):
            text, usage = await self.ask(url)
            if usage["stages_lost"] == 0:
                return text, [stage["island"] for stage in usage["stages"]]
        pytest.fail("every answer cost a stage")

    async def ask(self, url: str, at_token: Callable[[int], None] = lambda _: None) -> tuple[str, dict]:
        """The answer's text and the gateway's account of it."""
        body = {
            "model": CARGO,
            "messages": [{"role": "user", "content": "Tell a short story about a lighthouse."}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "deterministic": True,
            "ignore_eos": True,
        }
        command = ["ip", "netns", "exec", self.place[0], sys.executable, "-c", CLIENT]
        command += [f"{url}/v1/chat/completions", KEY, json.dumps(body)]
        text, usage, count, rest = "", {}, 0, b""
        with trio.fail_after(READY_S):
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            try:
                async for chunk in process.stdout:
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        assert "error" not in event, event
                        usage = event.get("usage") or usage
                        piece = "".join(c["delta"].get("content") or "" for c in event.get("choices", ()))
                        text += piece
                        if piece:
                            count += 1
                            at_token(count)
                assert await process.wait() == 0
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
                    await process.stdout.aclose()
        return text, usage["archipelag"]

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()


def cut(place: tuple[str, str], other: tuple[str, str]) -> None:
    """Nothing goes between these two any more, without a word."""
    rules = f"""
table ip cut {{
    chain coming {{
        type filter hook input priority 0
        ip saddr {other[1]} drop
    }}
    chain going {{
        type filter hook output priority 0
        ip daddr {other[1]} drop
    }}
}}
"""
    command = ["ip", "netns", "exec", place[0], "nft", "-f", "-"]
    subprocess.run(command, input=rules, text=True, check=True, timeout=30)


@asynccontextmanager
async def scene(network, folder: Path, places: list[tuple[str, str]]) -> AsyncGenerator[tuple[Scene, str]]:
    """A gateway, and Islands there with a chain and a spare; its URL."""
    # As on the internet: what is meant for somebody's private network vanishes.
    network._in(network._hub, "ip route add blackhole 10.0.0.0/8")
    here = Scene(folder, network.public())
    try:
        here.start_gateway()
        url = (await here.word("listening ")).split()[0]
        coordinator = (await here.word("mesh ")).strip()
        for name, (namespace, address) in zip(NAMES, places, strict=True):
            here.start_island(name, namespace, coordinator)
            here.places[name] = (namespace, address)
        for name in NAMES:
            known = '"public"' if here.places[name][1].startswith(PUBLIC_PREFIX) else "a place at a relay"
            await here.until(lambda name=name, known=known: here.said(name, known), f"{name} can not be met")
        await here.until(lambda: len(here.layout()[0]) == 2 and here.layout()[1], "no chain with a spare")
        yield here, url
    finally:
        here.end()


@pytest.mark.parametrize("punched", [True, False], ids=["holes can be punched", "all links are relayed"])
async def test_a_chain_answers_and_a_killed_stage_is_replaced(network, tmp_path, *, punched: bool) -> None:
    places = [network.private(ports="" if punched else "random,fully-random") for _ in NAMES]
    async with scene(network, tmp_path, places) as (here, url):
        undisturbed, ring = await here.undisturbed(url)
        assert len(undisturbed) > TOKENS
        killed: list[str] = []
        if punched:
            await here.until(lambda: any(here.said(name, DIRECT) for name in ring), "no hole was punched")

        def kill(count: int) -> None:
            if count == AT_TOKEN:
                killed.append(here.ring()[0])
                here.processes[killed[0]].kill()

        text, usage = await here.ask(url, kill)
        assert text == undisturbed
        names = {stage["island"] for stage in usage["stages"]}
        assert names == set(NAMES) - set(killed)
        assert all(punched or not here.said(name, DIRECT) for name in NAMES)


async def test_two_that_lose_sight_of_each_other_are_kept_apart_and_not_charged(network, tmp_path) -> None:
    async with scene(network, tmp_path, [network.public() for _ in NAMES]) as (here, url):
        undisturbed, _ = await here.undisturbed(url)
        parted: list[str] = []

        def lose(count: int) -> None:
            if count == AT_TOKEN:
                parted[:] = here.ring()
                cut(here.places[parted[0]], here.places[parted[1]])
                cut(here.places[parted[1]], here.places[parted[0]])

        text, usage = await here.ask(url, lose)
        assert text == undisturbed
        victim = parted[0]
        assert {stage["island"] for stage in usage["stages"]} == set(NAMES) - {victim}
        await here.until(lambda: here.said("gateway", "stages kept apart"), "nobody is kept apart")
        # The next job has no trouble any more: it goes another way from the start.
        replaced = sum(len(here.said(name, "stage replaced")) for name in NAMES)
        _, usage = await here.ask(url)
        assert {stage["island"] for stage in usage["stages"]} == set(NAMES) - {victim}
        assert usage["stages_lost"] == 0
        assert sum(len(here.said(name, "stage replaced")) for name in NAMES) == replaced
        assert not here.said("gateway", "stage failed")
