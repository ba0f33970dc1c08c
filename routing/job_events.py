"""What a job's supervisor is told and what it tells: its policy, its commands and its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from protocol.instants import SECOND_NS
from protocol.jobs import Receipt, Token, Usage
from protocol.limits import DEFAULT_TOKEN_WINDOW

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """How patient to be. All durations in nanoseconds.

    `accept_ns`: from offer to accept or reject. `first_token_ns`: from accept, or the last sign of progress,
    to the first token. `stall_ns`: longest gap between tokens; once gaps are known the limit
    adapts down to 50 gaps but not below `stall_floor_ns`. `wait_ns`: how long a job may be without
    any Island before it fails; 0 fails at once. `deadline_ns`: the whole job. `attempts`: dispatches that may
    fail (refusals for load do not count). `window`: tokens that the Island may be ahead of the consumer.
    """

    accept_ns: int = 3 * SECOND_NS
    first_token_ns: int = 60 * SECOND_NS
    stall_ns: int = 5 * SECOND_NS
    stall_floor_ns: int = 1 * SECOND_NS
    wait_ns: int = 10 * SECOND_NS
    deadline_ns: int = 600 * SECOND_NS
    attempts: int = 8
    window: int = DEFAULT_TOKEN_WINDOW


# --- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Begin."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """The consumer has taken all tokens with an index below `until`."""

    until: int


@dataclass(frozen=True, slots=True)
class IslandsChanged:
    """An Island appeared or became free: look again if waiting."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The consumer is gone."""


Command: TypeAlias = Start | Consumed | IslandsChanged | Abort

# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobWaiting:
    """No Island can take it now."""


@dataclass(frozen=True, slots=True)
class JobPlaced(Generic[P]):
    """An Island accepted. `hand_over` counts the Islands that had accepted before."""

    peer: P
    ahead: int
    hand_over: int


@dataclass(frozen=True, slots=True)
class JobPreparing:
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokensReleased:
    first: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class IslandFailed(Generic[P]):
    """For the coordinator's book: this Island let the job down. `timeout`: it let it hang."""

    peer: P
    reason: str
    timeout: bool = False


@dataclass(frozen=True, slots=True)
class SpeedSeen(Generic[P]):
    """For the coordinator's book, at an attempt's end: so many tokens came in this time, pauses left out."""

    peer: P
    tokens: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class JobCompleted(Generic[P]):
    """The end. `receipt` is None if what the Island signed does not match what it sent."""

    peer: P
    finish: str
    tail: str
    usage: Usage
    hand_overs: int
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The end. `code`: no-islands, busy, too-long, invalid, deadline, exhausted."""

    code: str
    detail: str
    retry_after_ms: int = 0


JobEvent: TypeAlias = (
    JobWaiting
    | JobPlaced[P]
    | JobPreparing
    | TokensReleased
    | IslandFailed[P]
    | SpeedSeen[P]
    | JobCompleted[P]
    | JobFailed
)
