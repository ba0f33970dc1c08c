"""What a running Island consists of, for those who look at it (status) and those who build it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cargos.catalogue import CargoEntry
from cargos.runtimes.base import Runtime
from node.config import NodeSettings
from node.coordination.affiliation import AffiliationService
from node.identity import Identity
from node.jobs import JobService
from node.overlay.overlay import Overlay
from node.p2p import Host
from node.peers import Peers
from node.pieces.service import PieceService
from node.shards.hosting import ShardHost


@dataclass(slots=True)
class HostedCargo:
    """A Cargo on this Island, from the moment it was asked for."""

    entry: CargoEntry
    state: str = "fetching"
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    runtime: Runtime | None = None


@dataclass(slots=True)
class IslandState:
    """What `archi-node status` shows."""

    settings: NodeSettings
    identity: Identity
    host: Host
    peers: Peers
    jobs: JobService
    overlay: Overlay | None = None
    affiliation: AffiliationService | None = None
    shards: ShardHost | None = None
    pieces: PieceService | None = None
    cargos: dict[str, HostedCargo] = field(default_factory=dict[str, HostedCargo])
    started: float = field(default_factory=time.monotonic)
