"""One Island, assembled: network, Cargos, jobs, adverts, status.

Everything runs in one trio task tree; leaving `Island.run` (Ctrl-C, SIGTERM) ends all of it: running jobs are
handed over by their gateways, worker processes and listeners are gone.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import structlog
import trio

from cargos.catalogue import CargoEntry
from cargos.errors import CargoError, FetchFailed
from cargos.manifest import ROLE_DRAFT, Manifest, RuntimeType
from cargos.progress import FetchProgress
from cargos.resolve import resolve_cargo
from cargos.runtimes.base import Runtime, RuntimeFailed, RuntimeSpec
from cargos.runtimes.llama import open_llama
from cargos.runtimes.shards import ShardOptions, open_stage
from cargos.shards.store import ShardStore
from cargos.store import CargoStore
from dht.keys import key_of_capability, key_of_cargo, key_of_region
from node.adverts import AdvertMaker
from node.config import NodeSettings
from node.control import ControlMethods, NoParams, serve_control
from node.coordination.affiliation import AffiliationService
from node.coordination.coordinator import CoordinatorConfig, open_coordinator
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.karma_control import KarmaControl
from node.coordination.port import CoordinationPort
from node.identity import load_or_create_identity
from node.jobs import JobService
from node.manifests import serve_manifests
from node.overlay.control import OverlayControl
from node.overlay.overlay import NODE_POLICY, OverlayConfig, open_overlay
from node.p2p import open_host
from node.p2p.host import plain_errors
from node.p2p.identify import serve_identify
from node.p2p.ping import serve_ping
from node.peers import open_peers
from node.pieces.limits import ServeLimits
from node.pieces.service import PiecesConfig, PieceService, open_pieces
from node.settings import SettingsError
from node.shards.head import ChainHeads
from node.shards.hosted import share_out
from node.shards.hosting import ShardHost, StageOpener
from node.shards.ring import RingService, open_ring
from node.snapshot import Snapshot, snapshot
from node.state import HostedCargo, IslandState
from node.traversal import open_traversal
from protocol.adverts import Hello, IslandAdvert
from protocol.dice import Dice
from protocol.ids import CargoDigest, PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs
from protocol.jobs import JOB_PROTOCOL
from protocol.limits import MAX_ADVERT_CARGOS
from protocol.ring import HOLD_SHARD, METHOD_HOLD, METHOD_HOLD_FOR, RELAYED_ORDER
from routing.chains.ring_door import Door

VERSION: Final = package_version("archipelag")
#: What other libp2p peers see as our software.
AGENT: Final = f"archipelag/{VERSION}"
ROLE_ISLAND: Final = "island"

#: What is offered is looked at this often, and at once when something is known to have changed.
ADVERT_CHECK_S: Final = 2.0

#: The place in the network that adverts tell moves this seldom.
COORDINATE_S: Final = 60.0

#: A Cargo that nobody could deliver is tried again after this long, then twice as long, up to ten minutes.
FETCH_AGAIN_S: Final = 30.0
MAX_FETCH_AGAIN_S: Final = 600.0

RuntimeOpener: TypeAlias = Callable[[RuntimeSpec], AbstractAsyncContextManager[Runtime]]

#: What opens a Cargo of each runtime type; a new runtime joins here.
RUNTIMES: Final[Mapping[RuntimeType, RuntimeOpener]] = MappingProxyType({RuntimeType.LLMCPP: open_llama})

_log = structlog.get_logger("island")


def overlay_config(settings: NodeSettings) -> OverlayConfig:
    """How an Island takes part in the overlay: coordinators are peers to enter by like any other."""
    network, overlay = settings.network, settings.overlay
    policy = dataclasses.replace(
        NODE_POLICY,
        k=overlay.k,
        provider_ttl_ns=overlay.provider_ttl_s * SECOND_NS,
        provide_interval_ns=overlay.provider_ttl_s * SECOND_NS // 3,
    )
    return OverlayConfig(
        settings.data_path,
        (*network.bootstrap, *network.coordinators),
        region=settings.region,
        policy=policy,
        heal_s=overlay.heal_s,
    )


def coordinator_config(settings: NodeSettings) -> CoordinatorConfig:
    """How a node coordinates, if it does. Raises SettingsError."""
    return CoordinatorConfig(
        settings.name,
        settings.data_path,
        region=settings.region,
        country=settings.coordinator.country,
        trusted=settings.coordinator.trusted_peers,
    )


def pieces_config(settings: NodeSettings) -> PiecesConfig:
    """What of its store an Island gives to others."""
    upload = settings.pieces.upload_mbit * 1_000_000 // 8
    return PiecesConfig(settings.pieces.serve, ServeLimits(upload_bytes_per_s=upload))


def unix_now() -> UnixNs:
    return UnixNs(time.time_ns())


def monotonic_now() -> Instant:
    return Instant(time.monotonic_ns())


class Island:
    """Settings made into a running Island by `run`."""

    def __init__(
        self,
        settings: NodeSettings,
        openers: Mapping[RuntimeType, RuntimeOpener] = RUNTIMES,
        *,
        open_shard: StageOpener | None = None,
    ) -> None:
        """Raises SettingsError."""
        self.settings = settings
        self._openers = openers
        self._open_shard = open_shard
        self._adverts = AdvertMaker(settings, openers, VERSION)
        self.identity = load_or_create_identity(settings.data_path / "identity.key")
        self.store = CargoStore(Path(settings.cache_dir).expanduser() if settings.cache_dir else None)
        self._runtimes: dict[str, Runtime] = {}
        self._changed = trio.Event()
        self._coordinate = 0
        self._coordinate_from = -COORDINATE_S
        self.state: IslandState
        self._pieces: PieceService

    async def run(self, *, ready: Callable[[IslandState], Awaitable[None]] | None = None) -> None:
        """Run until cancelled. `ready` is called once the Island listens (its Cargos may still load)."""
        entries = [resolve_cargo(reference) for reference in self.settings.cargos]
        if len(entries) > MAX_ADVERT_CARGOS:
            raise SettingsError(
                f"cargos: {len(entries)} are too many; an Island offers {MAX_ADVERT_CARGOS} at most"
            )
        entries = list({entry.digest: entry for entry in entries}.values())
        leave = trio.Event()
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._live, entries, ready, leave)
                try:
                    await trio.sleep_forever()
                finally:
                    leave.set()

    async def _live(
        self,
        entries: list[CargoEntry],
        ready: Callable[[IslandState], Awaitable[None]] | None,
        leave: trio.Event,
    ) -> None:
        """From the first listener to the farewell. Shielded: the links must outlive the order to stop, or
        nobody would hear of it.
        """
        settings = self.settings
        coordinates = settings.coordinator.enabled
        roles = (ROLE_ISLAND, ROLE_COORDINATOR) if coordinates else (ROLE_ISLAND,)
        hello = Hello(settings.name, VERSION, roles)
        dice = Dice(int.from_bytes(secrets.token_bytes(8), "little"))
        with trio.CancelScope(shield=True):
            async with (
                open_host(self.identity, settings.network.listen) as host,
                open_peers(host, hello=hello, dice=dice) as peers,
                open_overlay(host, peers, overlay_config(settings), self.identity) as overlay,
                open_traversal(host, overlay, settings.nat),
                open_pieces(host, overlay, self.store, pieces_config(settings)) as self._pieces,
                nullcontext(CoordinationPort(peers)) as port,
                open_coordinator(
                    host,
                    peers,
                    overlay,
                    port=port,
                    signer=self.identity.signer,
                    config=coordinator_config(settings),
                )
                if coordinates
                else nullcontext(),
                open_ring(
                    host,
                    self.identity.signer,
                    unix_offset_ns=overlay.unix_offset_ns,
                    reach=overlay.reach,
                    door=Door(self._works_for),
                )
                if settings.shards.offered
                else nullcontext() as ring,
            ):
                jobs = JobService(
                    signer=self.identity.signer,
                    runtimes=self._runtimes,
                    queue=settings.engine.queue,
                    unix_now=unix_now,
                    changed=self._note_change,
                    heads=None if ring is None else ChainHeads(ring, host.peer).job_for,
                )
                state = self.state = IslandState(settings, self.identity, host, peers, jobs, overlay)
                state.pieces = self._pieces
                host.handle(JOB_PROTOCOL, jobs.handle)
                serve_identify(host, agent=AGENT)
                serve_ping(host)
                serve_manifests(peers, self._manifest)
                for address in settings.network.coordinators:
                    peers.keep(address)
                async with trio.open_nursery() as nursery:
                    state.affiliation = AffiliationService(
                        peers,
                        overlay,
                        port,
                        nursery,
                        signer=self.identity.signer,
                        pinned=settings.network.coordinators,
                        region=settings.region,
                    )
                    nursery.start_soon(state.affiliation.run)
                    await nursery.start(serve_control, settings.data_path, self._control_methods())
                    _log.info("listening", name=settings.name, peer=host.peer, addresses=list(host.addresses))
                    for entry in entries:
                        self._pieces.know(*entry.manifest.files)
                    whole, shared, left_mib = share_out(entries, settings.shards)
                    for entry in whole:
                        hosted = state.cargos[entry.digest] = HostedCargo(entry)
                        nursery.start_soon(self._host_cargo, hosted)
                    if ring is not None:
                        state.shards = self._shard_host(ring, left_mib)
                        for entry in shared:
                            state.shards.offer(entry)
                        nursery.start_soon(state.shards.run)
                    nursery.start_soon(self._advertise)
                    if ready is not None:
                        await ready(state)
                    await leave.wait()
                    await self._say_farewell()
                    nursery.cancel_scope.cancel()

    def _shard_host(self, ring: RingService, room_mib: int) -> ShardHost:
        settings, state = self.settings, self.state
        host = ShardHost(
            ring,
            ShardStore(self.store),
            self._open_shard or partial(open_stage, options=ShardOptions(drafts=settings.shards.drafts)),
            settings=settings.shards,
            engine=settings.engine,
            data_dir=settings.data_path,
            coordinators=lambda: () if state.affiliation is None else state.affiliation.coordinators,
            changed=self._note_change,
            room_mib=room_mib,
            me=state.host.peer,
            unix_now=unix_now,
            fetch_pieces=self._pieces.fetch_pieces if settings.pieces.fetch else None,
            fetched=self._pieces.note_change,
        )
        state.peers.serve(METHOD_HOLD, HOLD_SHARD, host.hold)
        state.peers.serve(METHOD_HOLD_FOR, RELAYED_ORDER, host.hold_for)
        return host

    def _works_for(self, cargo: str) -> set[str]:
        """Whose sessions may use all slots of its layers here: coordinators', and whoever ordered them."""
        affiliation, shards = self.state.affiliation, self.state.shards
        shard = None if shards is None else shards.shards.get(cargo)
        known: set[str] = set() if affiliation is None else {*affiliation.coordinators}
        return known if shard is None else known | {shard.owner}

    def _manifest(self, digest: str) -> Manifest | None:
        hosted = self.state.cargos.get(digest)
        if hosted is None and self.state.shards is not None:
            hosted = self.state.shards.shards.get(digest)
        return None if hosted is None else hosted.entry.manifest

    def _control_methods(self) -> ControlMethods:
        """What commands may ask the running Island."""
        state, methods = self.state, ControlMethods()

        async def status(_: NoParams) -> Snapshot:
            return snapshot(state)

        methods.serve("status", NoParams, status)
        if state.overlay is not None:
            OverlayControl(state.overlay, state.peers, self.identity.signer).register(methods)
            KarmaControl(state.overlay, self._believed).register(methods)
        return methods

    def _believed(self) -> tuple[PeerId, ...]:
        """Whose word on karma counts here: those that this Island works for, and those of the settings."""
        affiliation = self.state.affiliation
        chosen = () if affiliation is None else affiliation.coordinators
        return (*chosen, *self.settings.coordinator.trusted_peers)

    async def _say_farewell(self) -> None:
        """No coordinator places anything here any more. Running jobs are handed over when their streams end."""
        self.state.jobs.draining = True
        if self.state.affiliation is not None:
            await self.state.affiliation.leave(self._advert())

    # --- Cargos -------------------------------------------------------------------------------------

    async def _host_cargo(self, hosted: HostedCargo) -> None:
        """Fetch, load and keep a Cargo. What fails here is shown and advertised, not raised."""
        manifest = hosted.entry.manifest

        def note(progress: FetchProgress) -> None:
            hosted.done_bytes, hosted.total_bytes = progress.done_bytes, progress.total_bytes or 0

        peers = self._pieces.fetch_pieces if self.settings.pieces.fetch else None
        pause_s, files = FETCH_AGAIN_S, None
        try:
            while files is None:
                try:
                    files = await self.store.ensure(
                        manifest, base=hosted.entry.base, progress=note, peers=peers, drafts=False
                    )
                except FetchFailed as error:  # sources come back, and peers that have it come
                    self._give_up_cargo(hosted, str(error))
                    await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_FETCH_AGAIN_S)
            self._pieces.note_change()
        except CargoError as error:
            self._give_up_cargo(hosted, str(error))
            return
        open_runtime = self._openers.get(manifest.runtime)
        if open_runtime is None:
            self._give_up_cargo(hosted, f"this Island has no runtime for {manifest.runtime} Cargos")
            return
        engine = self.settings.engine
        spec = RuntimeSpec(
            name=manifest.name,
            files={file.name: str(files[file.name]) for file in manifest.files if file.role != ROLE_DRAFT},
            context_length=engine.context_length or manifest.context_length,
            chat_template=manifest.chat_template,
            system_prompt=manifest.defaults.system_prompt,
            slots=engine.slots,
            threads=engine.threads,
        )
        hosted.state, hosted.detail = "loading", ""
        self._note_change()
        try:
            async with open_runtime(spec) as runtime:
                hosted.runtime = self._runtimes[hosted.entry.digest] = runtime
                try:
                    await self._watch_runtime(hosted, runtime)
                finally:
                    hosted.runtime = None
                    del self._runtimes[hosted.entry.digest]
        except RuntimeFailed as error:
            self._give_up_cargo(hosted, str(error))

    async def _watch_runtime(self, hosted: HostedCargo, runtime: Runtime) -> None:
        last = ""
        while True:
            load = runtime.load()
            hosted.state, hosted.detail = load.state, load.detail
            if load.state != last:
                last = load.state
                tell = _log.warning if load.state == "failed" else _log.info
                tell(
                    "cargo state",
                    cargo=hosted.entry.manifest.name,
                    state=load.state,
                    decode_tps=round(load.decode_tps),
                    prefill_tps=round(load.prefill_tps),
                    detail=load.detail or None,
                )
                self._note_change()
            await trio.sleep(0.1 if load.state == "loading" else 1.0)

    def _give_up_cargo(self, hosted: HostedCargo, detail: str) -> None:
        hosted.state, hosted.detail = "failed", detail
        _log.warning("cargo not available", cargo=hosted.entry.manifest.name, detail=detail)
        self._note_change()

    # --- adverts ------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        self._changed.set()

    async def _advertise(self) -> None:
        """Tell coordinators of what changes; how, and whom, is the affiliation's business."""
        assert self.state.affiliation is not None  # noqa: S101 - made before this task
        while True:
            self._provide()
            self.state.affiliation.advertise(self._advert())
            with trio.move_on_after(ADVERT_CHECK_S):
                await self._changed.wait()
            self._changed = trio.Event()

    def _provide(self) -> None:
        """Stand in the overlay where those look who want what is ready here."""
        if self.state.overlay is None:
            return
        ready = {
            digest: hosted.entry.manifest
            for digest, hosted in self.state.cargos.items()
            if hosted.state == "ready" and not self.state.jobs.draining
        }
        if self.state.shards is not None and not self.state.jobs.draining:
            # Those who look for the Cargo find who has a part of it, or would hold one.
            ready |= {
                digest: shard.entry.manifest
                for digest, shard in self.state.shards.shards.items()
                if shard.state != "failed"
            }
        keys = {key_of_cargo(CargoDigest(digest)) for digest in ready}
        if ready and self.settings.region:
            keys.add(key_of_region(self.settings.region))
        for runtime in {manifest.runtime.value for manifest in ready.values()}:
            keys.update(key_of_capability(f"runtime:{runtime}", at) for at in {"", self.settings.region})
        self.state.overlay.provide_all("cargos", keys)

    def _advert(self) -> IslandAdvert:
        state = self.state
        return self._adverts.advert(
            state.cargos.values(),
            state.shards,
            draining=state.jobs.draining,
            addresses=() if state.overlay is None else state.overlay.announced,
            coordinate=self._place(),
        )

    def _place(self) -> int:
        """Where we are in the network's space of latencies, as told: it moves a little all the time."""
        overlay, now = self.state.overlay, trio.current_time()
        if overlay is not None and (not self._coordinate or now - self._coordinate_from > COORDINATE_S):
            self._coordinate, self._coordinate_from = overlay.driver.machine.coordinate, now
        return self._coordinate
