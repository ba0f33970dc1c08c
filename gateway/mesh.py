"""The gateway's side of the mesh: Islands, streams ready for jobs, and the jobs.

Islands come from two sources (gateway/mesh_book.py): they advertise to the coordinator of this very node,
or other coordinators tell of them. One job is `gateway.mesh_job`.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final

import structlog
import trio

from dht.coordinates import estimate_ns
from gateway.chains.keeper import ChainKeeper
from gateway.chains.orders import OrderGiver
from gateway.followed_cargos import FollowedCargos
from gateway.mesh_book import MeshBook
from gateway.mesh_job import MeshJob, Stream
from gateway.service import ModelInfo
from gateway.work_done import WorkBook
from node.coordination.coordinator import CoordinatorService
from node.coordination.following import FollowingService
from node.coordination.port import CoordinationPort
from node.manifests import fetch_manifest
from node.overlay.overlay import Overlay
from node.p2p import Host, Unreachable
from node.p2p.host import plain_errors
from node.peers import PeerDown, PeerEvent, Peers
from node.rpc import PeerUnreachable
from node.streams import MessageStream
from protocol.coordination import CargoCount
from protocol.dice import Dice
from protocol.envelope import Envelope, Signer
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.instants import MILLISECOND_NS, Instant, UnixNs
from protocol.jobs import FROM_ISLAND, JOB_PROTOCOL, TO_ISLAND, JobOffer
from protocol.ring import PERMIT_SLACK_NS, SESSION_PERMIT_KIND, Dtype, SessionPermit
from protocol.work import Work
from routing.chains.rebalance import BalancePolicy
from routing.coordinator_events import CoordinatorEvent, IslandChanged, IslandGone
from routing.following_events import FollowingEvent, IslandSeen, IslandUnseen
from routing.islands import IslandBook
from routing.job_events import Ask, Assignment, Full, NotYet, SupervisionPolicy
from routing.placement import Query, choose, shape_of, soonest
from routing.requirements import ANYTHING, Outlook, Requirements

#: Job streams kept open in advance per Island: opening one costs a protocol negotiation, which a first token
#: should not wait for. One is refilled while the other is used.
READY_STREAMS: Final = 2

#: Filling up an Island's ready streams may take this long; the next job tries again.
FILL_S: Final = 10.0

#: A stream that was taken is replaced this much later: not while its job waits for its first token.
REFILL_AFTER_S: Final = 0.05

#: An Island that others told of is dialled when a job goes there; a job's own patience is longer.
DIAL_S: Final = 5.0

_log = structlog.get_logger("mesh")


@asynccontextmanager
async def open_mesh(
    host: Host,
    peers: Peers,
    overlay: Overlay,
    *,
    coordinator: CoordinatorService,
    port: CoordinationPort,
    signer: Signer,
    policy: SupervisionPolicy,
    now: Callable[[], Instant],
    unix_now: Callable[[], UnixNs],
    requirements: Requirements = ANYTHING,
    dtype: Dtype = "f16s",
    balance: BalancePolicy | None = None,
) -> AsyncGenerator[Mesh]:
    """The mesh as this gateway sees it, until left."""
    with plain_errors():
        async with trio.open_nursery() as nursery:
            mesh = Mesh(
                host,
                peers,
                overlay,
                coordinator=coordinator,
                signer=signer,
                policy=policy,
                now=now,
                unix_now=unix_now,
                requirements=requirements,
                dtype=dtype,
                balance=balance,
                nursery=nursery,
            )
            following = FollowingService(
                peers, overlay, port, nursery, signer=signer, on_event=mesh.on_following
            )
            mesh.follow(following)
            nursery.start_soon(following.run)
            nursery.start_soon(mesh.keep_streams_ready)
            nursery.start_soon(mesh.chains.run)
            yield mesh
            nursery.cancel_scope.cancel()


class Mesh:
    """Made by `open_mesh`. Implements `gateway.service.InferenceService`."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        overlay: Overlay,
        *,
        coordinator: CoordinatorService,
        signer: Signer,
        policy: SupervisionPolicy,
        now: Callable[[], Instant],
        unix_now: Callable[[], UnixNs],
        requirements: Requirements,
        dtype: Dtype,
        balance: BalancePolicy | None,
        nursery: trio.Nursery,
    ) -> None:
        self.peer: Final = host.peer
        self._host = host
        self._peers = peers
        self._overlay = overlay
        self._coordinator = coordinator
        self._signer = signer
        self._policy = policy
        self._requirements = requirements
        self._nursery = nursery
        self.now = now
        self._unix_now = unix_now
        self.known: Final = MeshBook(now, unix_now, self._elsewhere)
        self.work: Final = WorkBook(coordinator)
        self._dice = Dice(overlay.dice.u64(), stream=6)
        self._outlook: Outlook[PeerId] = Outlook(
            rtt_of=peers.rtt_ns,
            estimate_of=self._estimate_ns,
            karma_of=coordinator.karma.points_mpt,
            sightings_of=coordinator.sightings,
            unix_offset_ns=unix_now() - now(),
        )
        self.chains: Final = ChainKeeper(
            peers,
            overlay,
            self.known,
            self.work,
            self._outlook,
            giver=OrderGiver(
                peers, overlay, self.known, signer=signer, vouchers=self._vouchers, unix_now=unix_now
            ),
            me=host.peer,
            requirements=requirements,
            now=now,
            nursery=nursery,
            ready=self._tell_jobs,
            dtype=dtype,
            balance=balance,
        )
        self._following: FollowingService | None = None
        self._followed: FollowedCargos | None = None
        self._filling: set[PeerId] = set()
        self._waiting: dict[JobId, MeshJob] = {}
        self._ready: dict[PeerId, deque[Stream]] = {}
        self._jobs: dict[JobId, MeshJob] = {}
        self._refill: trio.MemorySendChannel[PeerId]
        self._refills: trio.MemoryReceiveChannel[PeerId]
        self._refill, self._refills = trio.open_memory_channel[PeerId](1024)
        peers.subscribe(self._on_peer)
        coordinator.subscribe(self._on_coordinator)

    @property
    def unix_offset_ns(self) -> int:
        """Civil time minus the clock of instants, as they stand now: the one is set, the other sleeps."""
        return self._unix_now() - self.now()

    def follow(self, following: FollowingService) -> None:
        """Hear of Islands from other coordinators by this."""
        self._following = following
        self._followed = FollowedCargos(self._coordinator, following)
        self._nursery.start_soon(self._followed.run)

    @property
    def book(self) -> IslandBook[PeerId]:
        """All Islands known here."""
        return self.known.islands

    def permit_for(self, offer: JobOffer) -> Envelope:
        """What shows the stages of this offer's chain that the session is ours."""
        unix_now = UnixNs(self.now() + self.unix_offset_ns)
        expires = UnixNs(unix_now + offer.deadline_ms * MILLISECOND_NS + PERMIT_SLACK_NS)
        permit = SessionPermit(offer.job, offer.cargo)
        return self._signer.seal(SESSION_PERMIT_KIND, permit, sequence=unix_now, expires_unix_ns=expires)

    # --- what the HTTP side asks --------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        return self.known.models()

    def model(self, name: str) -> ModelInfo | None:
        """Also one that was here a while ago: a job for it may wait for an Island to come back."""
        info = self.known.model(name)
        if info is not None and self._followed is not None:
            self._followed.asked_for(info.digest)
        return info

    @asynccontextmanager
    async def run(
        self, model: ModelInfo, work: Work, *, deadline_ns: int | None = None
    ) -> AsyncGenerator[MeshJob]:
        """Run a job; leaving the context cancels what is still going on."""
        policy = self._policy
        if deadline_ns is not None:
            policy = replace(policy, deadline_ns=min(deadline_ns, policy.deadline_ns))
        job = MeshJob(self, self._nursery, JobId(secrets.token_hex(16)), model.digest, work, policy=policy)
        self._jobs[job.id] = job
        try:
            job.begin()
            yield job
        finally:
            job.abort()
            del self._jobs[job.id]
            self._waiting.pop(job.id, None)

    # --- what jobs ask ------------------------------------------------------------------------------

    def place(
        self, cargo: CargoDigest, work: Work, now: Instant, ask: Ask[PeerId]
    ) -> Assignment[PeerId] | NotYet | Full | None:
        """An Island that has the whole Cargo; if there is none, a chain of such as have parts of it."""
        query = Query(shape_of(cargo, work, ask.done), self._outlook, ask.excluded, self._requirements)
        chosen = choose(soonest(now, self.book, query), self._dice)
        return self.chains.place(cargo, work, now, ask) if chosen is None else Assignment(chosen.peer)

    def name_of(self, peer: PeerId) -> str:
        return self.known.name_of(peer)

    def rtt_ns(self, peer: PeerId) -> int:
        return self._peers.rtt_ns(peer) or 0

    def note_waiting(self, job: MeshJob, *, waiting: bool) -> None:
        """Whether it wants to hear of Islands that appear or become free."""
        if waiting:
            self._waiting[job.id] = job
        else:
            self._waiting.pop(job.id, None)

    def freed(self) -> None:
        """A chain's slots are free again: jobs wait here for them, not at its Islands."""
        self._tell_jobs()

    def ready_stream(self, peer: PeerId) -> Stream | None:
        """One that is kept ready, if there is one; it may have broken meanwhile. Another takes its place."""
        ready = self._ready.get(peer)
        self._want_stream(peer)
        return ready.popleft() if ready else None

    async def open_stream(self, peer: PeerId) -> Stream:
        """A job stream to an Island, which is dialled first if need be. Raises Unreachable."""
        if self._peers.hello(peer) is None:
            try:
                with trio.fail_after(DIAL_S):
                    await self._overlay.reach(peer)
            except PeerUnreachable as error:
                raise Unreachable(str(error)) from error
            except trio.TooSlowError:
                raise Unreachable(f"not reached within {DIAL_S:g} s") from None
        return MessageStream(await self._host.open_stream(peer, JOB_PROTOCOL), TO_ISLAND, FROM_ISLAND)

    # --- Islands ------------------------------------------------------------------------------------

    def on_following(self, event: FollowingEvent[PeerId]) -> None:
        """What other coordinators tell."""
        match event:
            case IslandSeen(cargo, island):
                self._overlay.hear(island.peer, island.advert.addresses)
                self.known.vouched(cargo, island.peer, island.advert, island.sequence)
                self._changed()
            case IslandUnseen(cargo, peer):
                if self.known.unvouched(cargo, peer):
                    self._drop_ready(peer)
                self.chains.look()
            case _:
                pass

    def _on_coordinator(self, event: CoordinatorEvent[PeerId]) -> None:
        match event:
            case IslandChanged(peer, advert, sequence, new):
                self.known.advertised(peer, advert, sequence)
                if new:
                    self._want_stream(peer)
                    digests = tuple(offered.digest for offered in advert.cargos)
                    self._nursery.start_soon(self._learn_manifests, peer, digests)
                self._changed()
            case IslandGone(peer):
                if self.known.left(peer):
                    self._drop_ready(peer)
                self.chains.look()
            case _:
                pass

    def _vouchers(self, cargo: str, island: PeerId) -> tuple[PeerId, ...]:
        return () if self._following is None else self._following.vouchers(cargo, island)

    def _elsewhere(self) -> Iterator[CargoCount]:
        """Cargos that other coordinators say they have."""
        for other in self._coordinator.machine.others:
            yield from other.summary.cargos

    def _estimate_ns(self, coordinate: int) -> int | None:
        own = self._overlay.driver.machine.coordinate
        return estimate_ns(own, coordinate) if own and coordinate else None

    async def _learn_manifests(self, peer: PeerId, digests: tuple[str, ...]) -> None:
        """Ask an Island for the manifests that nobody here knows."""
        for digest in digests:
            if self.work.lacks(digest):
                manifest = await fetch_manifest(self._peers, peer, CargoDigest(digest))
                if manifest is not None:
                    self.work.learn(manifest)

    def _changed(self) -> None:
        self.chains.look()
        self._tell_jobs()

    def _tell_jobs(self) -> None:
        for job in tuple(self._waiting.values()):
            job.islands_changed()

    # --- ready streams ------------------------------------------------------------------------------

    def _want_stream(self, peer: PeerId) -> None:
        with suppress(trio.WouldBlock):  # a missed refill costs one negotiation later
            self._refill.send_nowait(peer)

    async def keep_streams_ready(self) -> None:
        """Until cancelled."""
        async for peer in self._refills:
            if peer not in self._filling:  # one that fills sees what was taken meanwhile
                self._filling.add(peer)
                self._nursery.start_soon(self._fill, peer)

    async def _fill(self, peer: PeerId) -> None:
        try:
            await trio.sleep(REFILL_AFTER_S)
            with trio.move_on_after(FILL_S):
                while self.book.get(peer) is not None and len(self._ready.get(peer, ())) < READY_STREAMS:
                    stream = await self.open_stream(peer)
                    if self.book.get(peer) is None:
                        stream.reset()  # it left meanwhile
                        return
                    self._ready.setdefault(peer, deque()).append(stream)
        except Unreachable:
            pass  # the peer table will say so soon
        finally:
            self._filling.discard(peer)

    def _on_peer(self, event: PeerEvent) -> None:
        if isinstance(event, PeerDown):
            self._drop_ready(event.peer)

    def _drop_ready(self, peer: PeerId) -> None:
        for stream in self._ready.pop(peer, ()):
            stream.reset()
