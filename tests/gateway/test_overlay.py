"""Several gateways and Islands that know only one way in: they find each other, and do without any of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.scripted_island import write_manifest
from cargos.manifest import RuntimeType
from gateway.config import GatewaySettings, HttpBindSettings, JobSettings, MeshSettings
from gateway.server import GatewayReady, run_gateway
from node.config import CoordinatorSettings, NetworkSettings, NodeSettings
from node.island import Island
from node.state import IslandState
from protocol.instants import SECOND_NS


class Running:
    """A task with a way to end it at once, as a crash would."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.up: Any = None
        self.ready = trio.Event()

    async def announce(self, up: Any) -> None:
        self.up = up
        self.ready.set()


class Net:
    def __init__(
        self, folder: Path, manifest: Path, runtime: Callable[..., Any], nursery: trio.Nursery
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._runtime = runtime
        self._nursery = nursery

    async def gateway(self, name: str, *bootstrap: str, patience_ms: int = 10_000) -> Running:
        """`patience_ms`: how long jobs wait for an Island: 10 s at most, if the machine is not busy."""
        running = Running()
        settings = GatewaySettings(
            name=name,
            data_dir=str(self._folder / name),
            open=True,
            http=HttpBindSettings(port=0),
            jobs=JobSettings(wait_ms=patience_ms),
            mesh=MeshSettings(listen=("/ip4/127.0.0.1/tcp/0",), bootstrap=bootstrap),
        )

        async def live() -> None:
            with running.scope:
                await run_gateway(settings, ready=running.announce)

        self._nursery.start_soon(live)
        with trio.fail_after(60):
            await running.ready.wait()
        assert isinstance(running.up, GatewayReady)
        return running

    async def island(
        self,
        name: str,
        *bootstrap: str,
        coordinator: CoordinatorSettings = CoordinatorSettings(),  # noqa: B008 - frozen
    ) -> Running:
        @asynccontextmanager
        async def open_script(_: object) -> Any:
            yield self._runtime()

        running = Running()
        settings = NodeSettings(
            name=name,
            data_dir=str(self._folder / name),
            cache_dir=str(self._folder / "cache"),
            cargos=(str(self._manifest),),
            network=NetworkSettings(bootstrap=bootstrap),
            coordinator=coordinator,
        )
        island = Island(settings, {RuntimeType.LLMCPP: open_script})

        async def live() -> None:
            with running.scope:
                await island.run(ready=running.announce)

        self._nursery.start_soon(live)
        with trio.fail_after(60):
            await running.ready.wait()
        assert isinstance(running.up, IslandState)
        return running


@pytest.fixture
def net(tmp_path: Path, scripted_runtime: Callable[..., Any]) -> Any:
    manifest = write_manifest(tmp_path)

    @asynccontextmanager
    async def make() -> Any:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            yield (
                Net(tmp_path, manifest, scripted_runtime, nursery),
                await stack.enter_async_context(httpx.AsyncClient(timeout=60)),
            )
            nursery.cancel_scope.cancel()

    return make


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.02)


async def ask(client: httpx.AsyncClient, gateway: Running) -> httpx.Response:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    return await client.post(f"{gateway.up.url}/v1/chat/completions", json=body)


async def until_listed(client: httpx.AsyncClient, gateway: Running) -> None:
    with trio.fail_after(60):
        while True:
            listed = (await client.get(f"{gateway.up.url}/v1/models")).json()["data"]
            if any(model["id"] == "scripted" for model in listed):
                return
            await trio.sleep(0.1)


@pytest.mark.slow
async def test_islands_find_coordinators_and_gateways_find_islands(net: Any) -> None:
    async with net() as (here, client):
        first = await here.gateway("first")
        door = first.up.addresses[0]
        second = await here.gateway("second", door)
        island = await here.island("isle", door)
        affiliation = island.up.affiliation
        await until(lambda: len(affiliation.coordinators) == 2)
        # A third gateway is nobody's coordinator: the Island has two. It serves all the same.
        third = await here.gateway("third", second.up.addresses[0])
        for gateway in (first, second, third):
            await until_listed(client, gateway)
            answer = await ask(client, gateway)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5


@pytest.mark.slow
async def test_when_coordinators_die_their_islands_are_served_by_others(net: Any) -> None:
    async with net() as (here, client):
        first = await here.gateway("first")
        door = first.up.addresses[0]
        second = await here.gateway("second", door)
        island = await here.island("isle", door)
        affiliation = island.up.affiliation
        await until(lambda: len(affiliation.coordinators) == 2)
        third = await here.gateway("third", second.up.addresses[0], patience_ms=45_000)
        await until_listed(client, third)
        # Both coordinators of the Island die. The third becomes one, and a job that comes now is served.
        first.scope.cancel()
        second.scope.cancel()
        with trio.fail_after(50):
            answer = await ask(client, third)
        assert answer.status_code == 200, answer.text
        await until(lambda: len(affiliation.coordinators) == 1)
        answer = await ask(client, third)
        assert answer.status_code == 200, answer.text


@pytest.mark.slow
async def test_an_island_may_coordinate_others(net: Any) -> None:
    async with net() as (here, client):
        hub = await here.island("hub", coordinator=CoordinatorSettings(enabled=True))
        door = hub.up.host.addresses[0]
        isle = await here.island("isle", door)
        await until(lambda: hub.up.host.peer in isle.up.affiliation.coordinators)
        gateway = await here.gateway("gateway", door)
        await until_listed(client, gateway)
        answer = await ask(client, gateway)
        assert answer.status_code == 200, answer.text


@pytest.mark.slow
async def test_work_that_was_done_becomes_karma_and_is_stated(net: Any) -> None:
    async with net() as (here, client):
        gateway = await here.gateway("gateway")
        # It may state how far away the Island is before that has done any work; the next word comes soon.
        gateway.up.coordinator._witness._restate_ns = SECOND_NS
        island = await here.island("isle", gateway.up.addresses[0])
        await until_listed(client, gateway)
        assert (await ask(client, gateway)).status_code == 200
        karma = gateway.up.coordinator.karma
        peer = island.up.host.peer
        await until(lambda: any(said.counters.work_units for said in karma.store.about(peer)))
        (statement,) = karma.store.about(peer)
        assert statement.issuer == gateway.up.coordinator.machine.me
        assert (statement.counters.failures, statement.counters.timeouts) == (0, 0)
