"""What `archi-node status` shows: a snapshot of a running Island."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import trio

from cargos.runtimes.base import RuntimeLoad

if TYPE_CHECKING:
    from node.overlay.overlay import Overlay
    from node.pieces.service import PieceService
    from node.shards.hosted import HostedShard
    from node.shards.hosting import ShardHost
    from node.state import IslandState


class ShardSnapshot(msgspec.Struct, frozen=True):
    """Layers `first` to `last` (exclusive) of `layers`; none of them yet if `first == last`. Times per row."""

    first: int
    last: int
    layers: int
    words: str
    slots: int
    active: int
    layer_us: float
    restarts: int
    rows: int


class CargoSnapshot(msgspec.Struct, frozen=True):
    name: str
    version: str
    digest: str
    state: str
    detail: str
    done_bytes: int
    total_bytes: int
    load: RuntimeLoad | None
    shard: ShardSnapshot | None = None


class PeerSnapshot(msgspec.Struct, frozen=True):
    peer: str
    name: str
    roles: tuple[str, ...]
    address: str
    state: str
    rtt_ms: float | None


class JobSnapshot(msgspec.Struct, frozen=True):
    job: str
    consumer: str
    state: str
    tokens: int
    age_s: float


class CounterSnapshot(msgspec.Struct, frozen=True):
    """Jobs and tokens since the start (not `node.jobs.JobCounters` itself, which loads the network)."""

    accepted: int
    rejected: int
    done: int
    failed: int
    cancelled: int
    tokens: int


class OverlaySnapshot(msgspec.Struct, frozen=True):
    """`table`: entries of the routing table. `network_size`: peers in the overlay, estimated; 0: unknown.
    `coordinate_ms`: place in the network's space of latencies, its last number the height; empty: unknown.
    """

    joined: bool
    reachable: bool
    table: int
    buckets: int
    network_size: int
    coordinate_ms: tuple[float, ...]
    known_peers: int
    links: int
    records: int
    providers: int
    messages_sent: int
    messages_received: int
    messages_refused: int
    announced: tuple[str, ...]


class PiecesSnapshot(msgspec.Struct, frozen=True):
    """Files of Cargos between peers, since the start. `files`: of which pieces are here and told to others.
    `streams`: on which others fetch now. `wrong_pieces`: that others sent us.
    """

    files: int
    streams: int
    given_pieces: int
    given_bytes: int
    got_pieces: int
    got_bytes: int
    wrong_pieces: int


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that `archi-node status` shows. Times in seconds, rates in tokens/s."""

    name: str
    peer: str
    addresses: tuple[str, ...]
    uptime_s: float
    draining: bool
    cargos: tuple[CargoSnapshot, ...]
    peers: tuple[PeerSnapshot, ...]
    jobs: tuple[JobSnapshot, ...]
    counters: CounterSnapshot
    overlay: OverlaySnapshot | None = None
    coordinators: tuple[str, ...] = ()
    """Peer ids of those that have this Island's advert."""

    pieces: PiecesSnapshot | None = None


def shard_snapshots(host: ShardHost) -> tuple[CargoSnapshot, ...]:
    return tuple(_shard(digest, shard) for digest, shard in host.shards.items())


def _shard(digest: str, shard: HostedShard) -> CargoSnapshot:
    load = shard.load()
    return CargoSnapshot(
        name=shard.entry.manifest.name,
        version=shard.entry.manifest.version,
        digest=digest,
        state=shard.state,
        detail=shard.detail,
        done_bytes=shard.done_bytes,
        total_bytes=shard.total_bytes,
        load=None,
        shard=ShardSnapshot(
            first=shard.first,
            last=shard.last,
            layers=shard.layers,
            words=shard.words,
            slots=load.slots if load else 0,
            active=load.active if load else 0,
            layer_us=round(load.layer_ns / 1000, 1) if load else 0.0,
            restarts=load.restarts if load else 0,
            rows=load.rows_total if load else 0,
        ),
    )


def overlay_snapshot(overlay: Overlay) -> OverlaySnapshot:
    return msgspec.convert(overlay.view(), OverlaySnapshot, from_attributes=True)


def _pieces(service: PieceService) -> PiecesSnapshot:
    given, got = service.server.counters, service.fetched
    return PiecesSnapshot(
        files=len(service.here),
        streams=service.server.streams,
        given_pieces=given.pieces,
        given_bytes=given.bytes,
        got_pieces=got.pieces,
        got_bytes=got.bytes,
        wrong_pieces=got.wrong_pieces,
    )


def snapshot(state: IslandState) -> Snapshot:
    jobs = state.jobs
    now = trio.current_time()
    return Snapshot(
        name=state.settings.name,
        peer=state.identity.peer,
        addresses=state.host.addresses,
        uptime_s=round(time.monotonic() - state.started, 1),
        draining=jobs.draining,
        cargos=tuple(
            CargoSnapshot(
                name=hosted.entry.manifest.name,
                version=hosted.entry.manifest.version,
                digest=digest,
                state=hosted.state,
                detail=hosted.detail,
                done_bytes=hosted.done_bytes,
                total_bytes=hosted.total_bytes,
                load=hosted.runtime.load() if hosted.runtime is not None else None,
            )
            for digest, hosted in state.cargos.items()
        )
        + (() if state.shards is None else shard_snapshots(state.shards)),
        peers=tuple(
            PeerSnapshot(
                peer=view.peer or "",
                name=view.name,
                roles=view.roles,
                address=view.address or "",
                state=view.state,
                rtt_ms=None if view.rtt_ns is None else round(view.rtt_ns / 1e6, 3),
            )
            for view in state.peers.table()
        ),
        jobs=tuple(
            JobSnapshot(
                job=job.job,
                consumer=job.consumer,
                state=job.state,
                tokens=job.tokens,
                age_s=round(now - job.started, 2),
            )
            for job in jobs.jobs.values()
        ),
        counters=msgspec.convert(jobs.counters, CounterSnapshot, from_attributes=True),
        coordinators=() if state.affiliation is None else state.affiliation.coordinators,
        overlay=None if state.overlay is None else overlay_snapshot(state.overlay),
        pieces=None if state.pieces is None else _pieces(state.pieces),
    )
