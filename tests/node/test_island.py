"""One Island, assembled, with a script for an engine and a coordinator that keeps what it is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import trio

from bench.scripted_island import write_manifest
from cargos.manifest import RuntimeType
from cargos.runtimes.base import RuntimeFailed, RuntimeSpec
from node.config import NetworkSettings, NodeSettings
from node.control import ask_status
from node.coordination.gossip import ROLE_COORDINATOR
from node.identity import new_identity
from node.island import Island
from node.p2p import Host, open_host
from node.peers import Peers, open_peers
from node.settings import SettingsError
from node.state import IslandState
from protocol.adverts import ADVERT, ADVERT_KIND, Hello, IslandAdvert
from protocol.coordination import (
    COORDINATION,
    METHOD_COORDINATION,
    AdvertKeep,
    AdvertPut,
    AdvertTaken,
    CoordinationMessage,
)
from protocol.dice import Dice
from protocol.envelope import open_untrusted
from protocol.ids import PeerId
from protocol.instants import UnixNs


class Coordinator:
    """Keeps the adverts that it gets, opened. `deaf`: it answers none."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self.host = host
        self.peers = peers
        self.adverts: list[IslandAdvert] = []
        self.sequences: list[int] = []
        self.deaf = False
        peers.serve_notice(METHOD_COORDINATION, COORDINATION, self.take)

    @property
    def address(self) -> str:
        return self.host.addresses[0]

    def take(self, peer: PeerId, message: CoordinationMessage) -> None:
        if isinstance(message, AdvertPut):
            opened = open_untrusted(message.envelope, ADVERT_KIND, ADVERT, UnixNs(0))
            assert opened.issuer == peer
            self.adverts.append(opened.body)
            self.sequences.append(opened.sequence)
        if isinstance(message, AdvertPut | AdvertKeep) and not self.deaf:
            taken = AdvertTaken(message.call, self.sequences[-1])
            self.peers.notify(peer, METHOD_COORDINATION, taken)


@asynccontextmanager
async def coordinator() -> AsyncGenerator[Coordinator]:
    hello = Hello("c", "0", (ROLE_COORDINATOR,))
    async with open_host(new_identity()) as host, open_peers(host, hello=hello, dice=Dice(1)) as peers:
        yield Coordinator(host, peers)


@asynccontextmanager
async def running(island: Island) -> AsyncGenerator[IslandState]:
    """The Island's life; leaving it is its Ctrl-C."""
    up: list[IslandState] = []
    ready = trio.Event()

    async def announce(state: IslandState) -> None:
        up.append(state)
        ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: island.run(ready=announce))
        with trio.fail_after(30):
            await ready.wait()
        yield up[0]
        nursery.cancel_scope.cancel()


@pytest.fixture
def make_island(tmp_path: Path, scripted_runtime: Callable[..., Any]) -> Callable[..., Island]:
    manifest = write_manifest(tmp_path)

    def make(*coordinators: str, cargos: tuple[str, ...] = (), opener: Any = None) -> Island:
        @asynccontextmanager
        async def open_script(_: RuntimeSpec) -> AsyncGenerator[Any]:
            yield scripted_runtime()

        settings = NodeSettings(
            name="isle",
            data_dir=str(tmp_path / "data"),
            cache_dir=str(tmp_path / "cache"),
            cargos=cargos or (str(manifest),),
            network=NetworkSettings(coordinators=coordinators),
        )
        return Island(settings, {RuntimeType.LLMCPP: opener or open_script})

    return make


async def test_it_advertises_what_it_runs_and_takes_its_leave(make_island, until) -> None:
    async with coordinator() as taker:
        async with running(make_island(taker.address)):
            await until(lambda: taker.adverts and taker.adverts[-1].cargos[0].state == "ready")
            assert taker.adverts[-1].name == "isle"
            assert taker.adverts[-1].cargos[0].name == "scripted"
            assert not taker.adverts[-1].draining
        assert taker.sequences == sorted(set(taker.sequences))
        last = taker.sequences[-1]
        assert taker.adverts[-1].draining
        async with running(make_island(taker.address)):  # the same identity, restarted
            await until(lambda: taker.sequences[-1] > last and not taker.adverts[-1].draining)


async def test_a_deaf_coordinator_delays_no_other(make_island, until) -> None:
    async with coordinator() as good, coordinator() as deaf:
        deaf.deaf = True
        async with running(make_island(good.address, deaf.address)) as state:
            await until(lambda: good.adverts and deaf.adverts)
            await until(lambda: good.adverts[-1].cargos[0].state == "ready")
            before = len(good.adverts)
            with trio.fail_after(4.5):  # a deaf one is given up after 5 s
                for _ in range(3):
                    state.jobs.draining = not state.jobs.draining
                    state.jobs._changed()  # noqa: SLF001 - what a job does at its begin and end
                    count = len(good.adverts)
                    while len(good.adverts) == count:  # noqa: ASYNC110 - another host sends us no event
                        await trio.sleep(0.005)
            assert len(good.adverts) >= before + 3


async def test_one_cargo_named_twice_is_loaded_once(
    make_island, tmp_path: Path, until, scripted_runtime
) -> None:
    opened: list[RuntimeSpec] = []

    @asynccontextmanager
    async def open_script(spec: RuntimeSpec) -> AsyncGenerator[Any]:
        opened.append(spec)
        yield scripted_runtime()

    path = str(tmp_path / "scripted.toml")
    async with running(make_island(cargos=(path, path), opener=open_script)) as state:
        await until(lambda: [hosted.state for hosted in state.cargos.values()] == ["ready"])
        assert len(opened) == 1


async def test_a_runtime_that_gave_up_takes_no_jobs(make_island, until, scripted_runtime) -> None:
    """It raises out of its context: what is left of it must not be asked any more."""
    give_up = trio.Event()

    @asynccontextmanager
    async def open_script(_: RuntimeSpec) -> AsyncGenerator[Any]:
        runtime = scripted_runtime()

        def load() -> Any:
            if give_up.is_set():
                raise RuntimeFailed("its worker died too often")
            return scripted_runtime().load()

        runtime.load = load
        yield runtime

    async with running(make_island(opener=open_script)) as state:
        await until(lambda: [hosted.state for hosted in state.cargos.values()] == ["ready"])
        (hosted,) = state.cargos.values()
        give_up.set()
        await until(lambda: hosted.state == "failed")
        assert hosted.runtime is None
        assert state.jobs._runtimes == {}  # noqa: SLF001
        snapshot = await ask_status(state.settings.data_path)
        assert [cargo.state for cargo in snapshot.cargos] == ["failed"]
        assert snapshot.cargos[0].detail == "its worker died too often"


async def test_more_cargos_than_an_advert_holds(make_island, tmp_path: Path) -> None:
    text = (tmp_path / "scripted.toml").read_text()
    paths: list[str] = []
    for number in range(65):
        path = tmp_path / f"{number}.toml"
        path.write_text(text.replace('version = "1.0.0"', f'version = "1.0.{number}"'))
        paths.append(str(path))
    with pytest.raises(SettingsError, match="64"):
        await make_island(cargos=tuple(paths)).run()


async def test_a_large_machine_can_say_how_much_it_has(make_island, until, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 << 40, total=4 << 40))
    async with coordinator() as taker, running(make_island(taker.address)):
        await until(lambda: taker.adverts)


async def test_status_of_a_running_island(make_island, until) -> None:
    async with coordinator() as taker, running(make_island(taker.address)) as state:
        await until(state.peers.up)
        snapshot = await ask_status(state.settings.data_path)
        assert (snapshot.name, snapshot.peer) == ("isle", state.host.peer)
        assert [peer.roles for peer in snapshot.peers] == [(ROLE_COORDINATOR,)]
