"""What runtime and worker process say to each other: length-prefixed MessagePack on its stdin and stdout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Generic, Literal, TypeAlias, TypeVar

from cargos.runtimes.base import Finished
from protocol.codec import Codec, Message
from protocol.jobs import Token, Usage
from protocol.limits import KIB, MAX_OFFER_BYTES
from protocol.work import Generation, Part

#: Either way, a frame holds what one peer may send us (an offer) or one step of all sequences, with room.
_MAX_FRAME_BYTES: Final = 8 * MAX_OFFER_BYTES

#: The worker says that it lives this often.
BEAT_INTERVAL_S: Final = 0.5


To = TypeVar("To", bound=Message)
From = TypeVar("From", bound=Message)


@dataclass(frozen=True, slots=True)
class WorkerKind(Generic[To, From]):
    """Which module a worker process runs (it is started with nothing else), and what the two say."""

    module: str
    to_worker: Codec[To]
    from_worker: Codec[From]


class Frame(Message, frozen=True, gc=False):
    max_bytes: ClassVar[int] = _MAX_FRAME_BYTES


class Load(Frame, frozen=True, gc=False, tag="load"):
    """First frame: which model, and how to run it. `lanes`: deterministic jobs at a time."""

    paths: tuple[str, ...]
    context_length: int
    chat_template: str | None
    system_prompt: str | None
    slots: int
    threads: int
    lanes: int


class Submit(Frame, frozen=True, gc=False, tag="submit"):
    id: int
    work: Generation
    resume: tuple[int, ...]
    granted: int


class Grant(Frame, frozen=True, gc=False, tag="grant"):
    id: int
    until: int


class Cancel(Frame, frozen=True, gc=False, tag="cancel"):
    id: int


class Beat(Frame, frozen=True, gc=False, tag="beat"):
    pass


class Loading(Frame, frozen=True, gc=False, tag="loading"):
    """Bytes."""

    done: int
    total: int


class Ready(Frame, frozen=True, gc=False, tag="ready"):
    decode_tps: float
    prefill_tps: float


class LoadFailed(Frame, frozen=True, gc=False, tag="load-failed"):
    detail: str


class Refused(Frame, frozen=True, gc=False, tag="refused"):
    id: int
    code: Literal["too-long", "invalid"]
    detail: str


class Done(Part, frozen=True, gc=False):
    finish: Literal["stop", "length"]
    tail: str
    usage: Usage
    prompt_hash: bytes
    output_hash: bytes

    def finished(self, usage: Usage) -> Finished:
        return Finished(self.finish, self.tail, usage, self.prompt_hash, self.output_hash)


class Update(Part, frozen=True, gc=False, array_like=True):
    """One sequence's share of a step: progress in its prompt, or tokens from index `first` on, or its end.

    `failed`: it can not go on, and why.
    """

    id: int
    first: int = 0
    tokens: tuple[Token, ...] = ()
    prompt_done: int = 0
    prompt_total: int = 0
    done: Done | None = None
    failed: str = ""


class Step(Frame, frozen=True, gc=False, tag="step"):
    updates: tuple[Update, ...]
    active: int
    queued: int
    decode_tps: float
    prefill_tps: float


ToWorker: TypeAlias = Load | Submit | Grant | Cancel
FromWorker: TypeAlias = Beat | Loading | Ready | LoadFailed | Refused | Step

LLAMA: Final[WorkerKind[ToWorker, FromWorker]] = WorkerKind(
    "cargos.runtimes.llama.worker", Codec(ToWorker), Codec(FromWorker)
)

#: One read from the pipe.
READ_BYTES: Final = 64 * KIB
