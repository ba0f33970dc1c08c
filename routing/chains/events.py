"""What a node's ring machine is told and what it tells: its commands and its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from protocol.envelope import Envelope
from protocol.ids import PeerId
from protocol.ring import Chain, Dtype, StageWork

# --- commands ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Head: a session of ours starts on this chain. Its tokens come by `Draw`. `permit`: the consumer's, see
    `ring_door`.
    """

    session: str
    chain: Chain
    consumer: PeerId
    deterministic: bool
    permit: Envelope | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Head: its engine wants these rows (uint32 token ids) fed into the ring from `position` on."""

    session: str
    position: int
    rows: int
    payload: bytes
    prompt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Head: the session is over, well or not. `Ended` follows, at the latest after the policy's patience."""

    session: str


@dataclass(frozen=True, slots=True)
class Done:
    """The engine computed rows of a session; `payload` is what comes out (empty in a head)."""

    session: str
    position: int
    rows: int
    payload: bytes
    compute_ns: int
    wait_ns: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine of this Cargo's shard here lost all that it had in memory; it takes sessions again at once."""

    cargo: str


@dataclass(frozen=True, slots=True)
class EngineRefused:
    """`code`: busy, invalid."""

    session: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class ShardHeldHere:
    """From now on this node holds these layers of the Cargo; with `first == last` none any more. `slots`:
    sessions at once. `row_bytes`: what a row takes in each dtype, if that is known.
    """

    cargo: str
    first: int
    last: int
    slots: int = 0
    row_bytes: Mapping[Dtype, int] = field(default_factory=dict[Dtype, int])


@dataclass(frozen=True, slots=True)
class DownstreamLost:
    """The link by which we fed this peer is gone, or could not be made."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class UpstreamLost:
    """The link by which this peer fed us is gone."""

    peer: PeerId


Command: TypeAlias = (
    Begin | Draw | Finish | Done | EngineLost | EngineRefused | ShardHeldHere | DownstreamLost | UpstreamLost
)

# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the session a slot in the engine of this Cargo's shard (`StageRuntime.open`), from nothing."""

    session: str
    cargo: str
    dtype: Dtype
    prompt: int
    deterministic: bool


@dataclass(frozen=True, slots=True)
class Compute:
    """Feed the engine (`StageRuntime.feed`)."""

    session: str
    position: int
    rows: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Release:
    """The session is over here (`StageRuntime.close`)."""

    session: str


@dataclass(frozen=True, slots=True)
class StageReplaced:
    """Somebody else stands at a place of the chain now. `lost`: the account of who was there."""

    session: str
    chain: Chain
    lost: StageWork


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """Head: the session can not go on with this chain. `code` as in RingFault. `works`: those that failed."""

    session: str
    code: str
    index: int
    detail: str
    works: tuple[StageWork, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """Head: the end went round the ring, or did not come back in time. `works`: all stages, lost ones too."""

    session: str
    chain: Chain
    works: tuple[StageWork, ...]


RingEvent: TypeAlias = Admit | Compute | Release | StageReplaced | SessionFailed | Ended
