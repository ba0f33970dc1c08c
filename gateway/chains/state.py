"""What is remembered of a Cargo while its chain is formed and kept (gateway/chains/book.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from gateway.chains.layout import Layout
from gateway.chains.shortage import Shortage
from protocol.ids import PeerId
from protocol.instants import Instant
from routing.chains.plan import ModelShape
from routing.chains.rebalance import Balancer
from routing.job_events import NotYet

NEVER: Final = Instant(0)


@dataclass(slots=True)
class Taken:
    """An Island said that it holds these layers, or will; its advert is to show it."""

    first: int
    last: int
    until: Instant
    asked: tuple[int, int]


@dataclass(slots=True)
class Refused:
    """It did not take the last `times` orders, and is asked again at `until`."""

    until: Instant
    times: int = 1


@dataclass(slots=True)
class ChainedCargo:
    """One Cargo's chain. Times are when Islands came, when a job asked for it, and when it was looked at."""

    known: dict[PeerId, None] = field(default_factory=dict[PeerId, None])
    asked: Instant | None = None
    shape: ModelShape | None = None
    first_seen: Instant = NEVER
    newcomer: Instant = NEVER
    asking: dict[PeerId, tuple[int, int]] = field(default_factory=dict[PeerId, tuple[int, int]])
    taken: dict[PeerId, Taken] = field(default_factory=dict[PeerId, Taken])
    refused: dict[PeerId, Refused] = field(default_factory=dict[PeerId, Refused])
    loading: dict[PeerId, Instant] = field(default_factory=dict[PeerId, Instant])
    layer_ns: dict[PeerId, float] = field(default_factory=dict[PeerId, float])
    progress: NotYet | None = None
    layout: Layout | None = None
    ready: bool = False
    shortage: Shortage | None = None
    token_ns: int = 0
    basis: object = None
    balancer: Balancer[PeerId] = field(default_factory=Balancer[PeerId])
    balanced: Instant = NEVER
    settled: bool = False
    stagger_ns: int | None = None
