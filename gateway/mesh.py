"""The gateway's side of the mesh: keeps the book of Islands, streams ready for jobs, and the jobs.

One job is `gateway.mesh_job`.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final, NamedTuple

import structlog
import trio

from gateway.mesh_job import MeshJob, Stream
from gateway.service import ModelInfo
from node.p2p import Host, Unreachable
from node.peers import PeerDown, PeerEvent, Peers
from node.rpc import Refused
from node.streams import MessageStream
from protocol.adverts import ADVERT, ADVERT_KIND, METHOD_ADVERT, Accepted, OfferedCargo
from protocol.codec import Codec
from protocol.envelope import Envelope, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import CargoDigest, JobId, PeerId, cargo_digest_untrusted
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.jobs import FROM_ISLAND, JOB_PROTOCOL, TO_ISLAND
from protocol.work import Work
from routing.islands import Island, IslandBook
from routing.job_events import SupervisionPolicy
from routing.placement import rank, shape_of

#: Job streams kept open in advance per Island: opening one costs a protocol negotiation, which a first token
#: should not wait for. One is refilled while the other is used.
READY_STREAMS: Final = 2

#: Filling up an Island's ready streams may take this long; the next job tries again.
FILL_S: Final = 10.0

#: A stream that was taken is replaced this much later: not while its job waits for its first token.
REFILL_AFTER_S: Final = 0.05

#: A model whose last Island has gone is still known for this long (jobs for it wait, then fail with 503 and not
#: with 404): longer than a restart takes. So many at most, the one gone longest is forgotten first.
REMEMBER_MODEL_NS: Final = 600 * SECOND_NS
MAX_MODELS_REMEMBERED: Final = 256

#: Cargos whose first appearance is remembered (the models list shows it); the oldest is forgotten first.
MAX_CARGOS_SEEN: Final = 4096

#: Adverts of one Island that come closer together are refused: each costs a signature check and a look at the
#: waiting jobs. Islands wait five times as long.
MIN_ADVERT_GAP_NS: Final = 10 * MILLISECOND_NS

#: How often Islands whose adverts stopped are looked for.
EXPIRY_CHECK_S: Final = 1.0

ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)

_log = structlog.get_logger("mesh")


class _Naming(NamedTuple):
    """What an Island says of a Cargo besides its digest."""

    name: str
    version: str
    runtime: str
    publisher: str


class Mesh:
    """Islands, and jobs on them. Implements `gateway.service.InferenceService`."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        *,
        policy: SupervisionPolicy,
        now: Callable[[], Instant],
        unix_now: Callable[[], UnixNs],
    ) -> None:
        self.peer: Final = host.peer
        self._host = host
        self._peers = peers
        self._policy = policy
        self.now = now
        self._unix_now = unix_now
        self.unix_offset_ns: Final = unix_now() - now()
        self.book: IslandBook[PeerId] = IslandBook()
        self._first_seen: dict[CargoDigest, int] = {}
        self._gone: dict[CargoDigest, tuple[ModelInfo, Instant]] = {}
        self._called: dict[CargoDigest, _Naming] = {}
        self._filling: set[PeerId] = set()
        self._waiting: dict[JobId, MeshJob] = {}
        self._ready: dict[PeerId, deque[Stream]] = {}
        self._jobs: dict[JobId, MeshJob] = {}
        self._nursery: trio.Nursery
        self._refill: trio.MemorySendChannel[PeerId]
        self._refills: trio.MemoryReceiveChannel[PeerId]
        self._refill, self._refills = trio.open_memory_channel[PeerId](1024)
        peers.serve(METHOD_ADVERT, ENVELOPE, self._take_advert)
        peers.subscribe(self._on_peer)

    async def keep(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the book true until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._expire)
            nursery.start_soon(self._keep_streams_ready, nursery)
            task_status.started()

    # --- what the HTTP side asks --------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        offers: dict[CargoDigest, list[Island[PeerId]]] = {}
        for island in self.book:
            for offered in island.advert.cargos:
                if offered.state != "failed":
                    offers.setdefault(CargoDigest(offered.digest), []).append(island)
        infos = [self._model_info(digest, islands) for digest, islands in offers.items()]
        return tuple(sorted(infos, key=lambda info: (info.id, -info.ready, info.version, info.digest)))

    def model(self, name: str) -> ModelInfo | None:
        """Also one that was here a while ago: a job for it may wait for an Island to come back."""
        for info in self.models():
            if name in _names_of(info):
                return info
        for info, gone in reversed(self._gone.values()):
            if name in _names_of(info) and self.now() - gone < REMEMBER_MODEL_NS:
                return info
        return None

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
        self, cargo: CargoDigest, work: Work, now: Instant, excluded: frozenset[PeerId], done: int
    ) -> PeerId | None:
        ranked = rank(now, self.book, shape_of(cargo, work, done), self._peers.rtt_ns, excluded)
        return ranked[0].peer if ranked else None

    def name_of(self, peer: PeerId) -> str:
        island = self.book.get(peer)
        return island.advert.name if island is not None else peer[-8:]

    def rtt_ns(self, peer: PeerId) -> int:
        return self._peers.rtt_ns(peer) or 0

    def note_waiting(self, job: MeshJob, *, waiting: bool) -> None:
        """Whether it wants to hear of Islands that appear or become free."""
        if waiting:
            self._waiting[job.id] = job
        else:
            self._waiting.pop(job.id, None)

    def ready_stream(self, peer: PeerId) -> Stream | None:
        """One that is kept ready, if there is one; it may have broken meanwhile. Another takes its place."""
        ready = self._ready.get(peer)
        self._want_stream(peer)
        return ready.popleft() if ready else None

    async def open_stream(self, peer: PeerId) -> Stream:
        return MessageStream(await self._host.open_stream(peer, JOB_PROTOCOL), TO_ISLAND, FROM_ISLAND)

    async def _take_advert(self, peer: PeerId, envelope: Envelope) -> Accepted:
        known = self.book.get(peer)
        if known is not None and self.now() - known.heard < MIN_ADVERT_GAP_NS:
            raise Refused("busy", "adverts come too close together")
        opened = open_untrusted(envelope, ADVERT_KIND, ADVERT, self._unix_now())
        if opened.issuer != peer:
            raise ProtocolError(Fault.WRONG_ISSUER, "an advert must come from the Island itself")
        digests = [cargo_digest_untrusted(offered.digest) for offered in opened.body.cargos]
        if len(set(digests)) < len(digests):
            raise ProtocolError(Fault.MALFORMED, "a Cargo stands twice in one advert")
        if self.book.admit(self.now(), peer, opened.body, opened.sequence):
            for digest in digests:
                self._first_seen.setdefault(digest, self._unix_now() // SECOND_NS)
                if len(self._first_seen) > MAX_CARGOS_SEEN:
                    oldest = next(iter(self._first_seen))
                    del self._first_seen[oldest]
                    self._called.pop(oldest, None)
            if known is None:
                _log.info("island", name=opened.body.name, peer=peer, cargos=len(opened.body.cargos))
                self._want_stream(peer)
            self._tell_jobs()
        return Accepted()

    def _tell_jobs(self) -> None:
        for job in tuple(self._waiting.values()):
            job.islands_changed()

    def _want_stream(self, peer: PeerId) -> None:
        with suppress(trio.WouldBlock):  # a missed refill costs one negotiation later
            self._refill.send_nowait(peer)

    async def _keep_streams_ready(self, nursery: trio.Nursery) -> None:
        async for peer in self._refills:
            if peer not in self._filling:  # one that fills sees what was taken meanwhile
                self._filling.add(peer)
                nursery.start_soon(self._fill, peer)

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
            self._drop(event.peer, event.reason)

    async def _expire(self) -> None:
        while True:
            before = self.now()
            await trio.sleep(EXPIRY_CHECK_S)
            if self.now() - before > 2 * EXPIRY_CHECK_S * SECOND_NS:
                continue  # we were stopped: their adverts wait in our sockets
            for peer in self.book.expire(self.now()):
                _log.info("island lost", peer=peer, reason="adverts stopped")
                self._drop_ready(peer)

    def _drop(self, peer: PeerId, reason: str) -> None:
        island = self.book.get(peer)
        if island is not None:
            self._remember_models(island)
            self.book.lost(peer)
            _log.info("island lost", name=island.advert.name, peer=peer, reason=reason)
        self._drop_ready(peer)

    def _remember_models(self, island: Island[PeerId]) -> None:
        for offered in island.advert.cargos:
            if offered.state == "ready":
                digest = CargoDigest(offered.digest)
                info = self._model_info(digest, [other for other in self.book if other.cargo(digest)])
                self._gone.pop(digest, None)
                self._gone[digest] = (replace(info, islands=0, ready=0, decode_tps=0.0), self.now())
                if len(self._gone) > MAX_MODELS_REMEMBERED:
                    del self._gone[next(iter(self._gone))]

    def _drop_ready(self, peer: PeerId) -> None:
        for stream in self._ready.pop(peer, ()):
            stream.reset()

    def _model_info(self, digest: CargoDigest, islands: list[Island[PeerId]]) -> ModelInfo:
        offers = [offered for island in islands if (offered := island.cargo(digest)) is not None]
        ready = [offered for offered in offers if offered.state == "ready"]
        called = self._name_cargo(digest, offers)
        return ModelInfo(
            id=called.name,
            digest=digest,
            version=called.version,
            runtime=called.runtime,
            context_length=max(offered.context_length for offered in ready or offers),
            publisher=called.publisher,
            islands=len(offers),
            ready=len(ready),
            decode_tps=max(offered.decode_tps for offered in offers),
            first_seen_unix_s=self._first_seen.get(digest, 0),
        )

    def _name_cargo(self, digest: CargoDigest, offers: list[OfferedCargo]) -> _Naming:
        """What most Islands call it, and on a tie what it was called before: one liar renames nothing."""
        counts = Counter(_Naming(o.name, o.version, o.runtime, o.publisher) for o in offers)
        naming, count = counts.most_common(1)[0]
        before = self._called.get(digest)
        if before is not None and counts[before] == count:
            return before
        self._called[digest] = naming
        return naming


def _names_of(info: ModelInfo) -> tuple[str, str, str]:
    return info.id, f"{info.id}@{info.version}", info.digest
