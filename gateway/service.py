"""What the HTTP side asks of the mesh side, and nothing more.

`gateway.openai` turns HTTP requests into `Work` and events into chunks; `gateway.mesh` finds Islands, runs the
supervisor and yields these events. Neither knows the other's library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from protocol.ids import CargoDigest, JobId, PeerId
from protocol.jobs import Token, Usage
from protocol.work import Work


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A Cargo that some Island offers now, or that the gateway's own catalogue knows (`islands` 0).

    `id` is the manifest's name, what consumers write in `model`. Rates: best Island's, tokens/s.
    """

    id: str
    digest: CargoDigest
    version: str
    runtime: str
    context_length: int
    publisher: str
    islands: int
    ready: int
    decode_tps: float
    first_seen_unix_s: int


@dataclass(frozen=True, slots=True)
class StageInfo:
    """Who holds which layers of a model that runs over several Islands: `first` to `last`, exclusive."""

    island: str
    peer: PeerId
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Placed:
    """An Island accepted the job (`hand_over` 0), or the rest of it (1, 2, ...). `stages`: if it is the head of
    a chain, all of the chain, itself the last.
    """

    island: str
    peer: PeerId
    rtt_ns: int
    queue_ns: int
    hand_over: int
    stages: tuple[StageInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Preparing:
    """Before the first token: 'loading' (bytes; of a chain that is being formed, layers), 'prompt' (tokens),
    'waiting' (for an Island; 0, 0).
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Released:
    """Tokens in order, each exactly once over the whole job; the first has index `first`."""

    first: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """The end. `tail` is text still to be shown. Usage is that of the last attempt, whose
    `completion_tokens` counts the whole job. `prefill_ns`/`decode_ns` in it are the last Island's.
    `stages`: of a chain, those that stood in it at the end; `stages_lost`: how many were replaced on the way.
    """

    finish: Literal["stop", "length"]
    tail: str
    usage: Usage
    hand_overs: int
    island: str
    stages: tuple[StageInfo, ...] = ()
    stages_lost: int = 0


FailureCode: TypeAlias = Literal[
    "no-islands",  # nobody offers the Cargo (any more), and the job may not wait or waited in vain
    "busy",  # every Island that has it refused for load
    "too-long",  # prompt and context length: the consumer's to mend
    "invalid",  # grammar, token id, template...: the consumer's to mend
    "deadline",  # the job's own time is up
    "exhausted",  # as many attempts as allowed failed
]


@dataclass(frozen=True, slots=True)
class Failed:
    """The end, without the whole output. `detail` is written for the consumer."""

    code: FailureCode
    detail: str
    retry_after_ms: int = 0


JobEvent: TypeAlias = Placed | Preparing | Released | Completed | Failed


class Job(Protocol):
    """A running job. Iterating takes its events; what is taken makes room for more tokens (the
    window), what is not taken pauses the Island. Ends after Completed or Failed.
    """

    id: JobId

    def __aiter__(self) -> AsyncIterator[JobEvent]: ...


class InferenceService(Protocol):
    """The mesh, as the HTTP side sees it."""

    def models(self) -> tuple[ModelInfo, ...]:
        """Every model that can be asked for, by id."""
        ...

    def model(self, name: str) -> ModelInfo | None:
        """By id, `id@version` or digest; None if nobody knows it."""
        ...

    def run(
        self, model: ModelInfo, work: Work, *, deadline_ns: int | None = None
    ) -> AbstractAsyncContextManager[Job]:
        """Run a job within `deadline_ns` from now (None: as configured). Leaving the context cancels it."""
        ...
