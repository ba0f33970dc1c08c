"""What a job's supervisor is told and what it tells: its policy, its commands and its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.instants import SECOND_NS
from protocol.jobs import Receipt, Token, Usage
from protocol.limits import DEFAULT_TOKEN_WINDOW
from protocol.ring import Chain, StageReceipt

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """How patient to be. All durations in nanoseconds.

    `accept_ns`: from offer to accept or reject. `first_token_ns`: from accept, or the last sign of progress,
    to the first token. `stall_ns`: longest gap between tokens; once gaps are known the limit
    adapts down to 50 gaps but not below `stall_floor_ns`. `chain_stall_ns`: the same for a chain, which
    may be replacing a stage meanwhile (a head that froze is noticed sooner, by its link). `wait_ns`: how long
    a job may be without any Island before it fails; 0 fails at once. `deadline_ns`: the whole job.
    `attempts`: dispatches that may fail (refusals for load do not count). `window`: tokens that the Island may
    be ahead of the consumer.
    """

    accept_ns: int = 3 * SECOND_NS
    first_token_ns: int = 60 * SECOND_NS
    stall_ns: int = 5 * SECOND_NS
    stall_floor_ns: int = 1 * SECOND_NS
    chain_stall_ns: int = 15 * SECOND_NS
    wait_ns: int = 10 * SECOND_NS
    deadline_ns: int = 600 * SECOND_NS
    attempts: int = 8
    window: int = DEFAULT_TOKEN_WINDOW


# --- where to ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assignment(Generic[P]):
    """Who gets the job: an Island that has the whole Cargo, or the head of a chain, and the chain. `goes_on`:
    the chain is the one that had it before with another head; its other stages go on with the same session.
    """

    peer: P
    chain: Chain | None = None
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Ask(Generic[P]):
    """A job looks for a place. `excluded`: peers not to ask. `done`: tokens that there are. `chain`: one whose
    head was lost; its other stages still have what they computed: it is worth going on with. `lost`:
    peers (as chains name them) that its head says let it down.
    """

    excluded: frozenset[P] = frozenset()
    done: int = 0
    chain: Chain | None = None
    lost: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody can take it, but somebody will: `done` of `total` layers are loaded. The job waits for it, up to
    its deadline.
    """

    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Full:
    """Those that could take it have no free slot: it waits as if they had refused it for load."""


FULL: Final = Full()


@dataclass(frozen=True, slots=True)
class Verdict(Generic[P]):
    """One Island's word that no Island would do this job."""

    peer: P
    code: str
    detail: str


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
    """An Island accepted. `hand_over` counts the Islands that had accepted before. `chain`: it is the head of
    this one.
    """

    peer: P
    ahead: int
    hand_over: int
    chain: Chain | None = None


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
class StageSeen:
    """What a head says of one stage of its chain: of the chain indeed, but a claim, except for what the stage
    itself signed. `peer`: as the chain names it. `receipt`: its own, verified; None: it gave none.
    """

    peer: str
    index: int
    first: int
    last: int
    hop_ns: int
    failed: bool
    reason: str
    receipt: StageReceipt | None
    rtt_ns: int = 0
    """There and back on the link from the stage before; 0: not measured."""


@dataclass(frozen=True, slots=True)
class ChainFailed(Generic[P]):
    """The head `peer` says that these stages let it down, and that it can not go on with the chain. Whether it
    is true, whoever hears this finds out for himself.
    """

    peer: P
    chain: Chain
    reason: str
    stages: tuple[StageSeen, ...]


@dataclass(frozen=True, slots=True)
class SpeedSeen(Generic[P]):
    """For the coordinator's book, at an attempt's end: so many tokens came in this time, pauses left out."""

    peer: P
    tokens: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class JobCompleted(Generic[P]):
    """The end. `receipt` is None if what the Island signed does not match what it sent. `chain`: as the gateway
    made it; `stages`: those who stood in it, lost ones too.
    """

    peer: P
    finish: str
    tail: str
    usage: Usage
    hand_overs: int
    receipt: Receipt | None
    chain: Chain | None = None
    stages: tuple[StageSeen, ...] = ()


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
    | ChainFailed[P]
    | SpeedSeen[P]
    | JobCompleted[P]
    | JobFailed
)
