"""What runtime and worker process say to each other: length-prefixed MessagePack on its stdin and stdout."""

from __future__ import annotations

from typing import ClassVar, Final, Literal, TypeAlias

from cargos.runtimes.base import Finished
from protocol.codec import Codec, Message
from protocol.jobs import Token, Usage
from protocol.limits import KIB, MAX_OFFER_BYTES
from protocol.work import Generation, Part

#: Either way, a frame holds what one peer may send us (an offer) or one step of all sequences, with room.
_MAX_FRAME_BYTES: Final = 8 * MAX_OFFER_BYTES

#: The worker says that it lives this often.
BEAT_INTERVAL_S: Final = 0.5


class _Frame(Message, frozen=True, gc=False):
    max_bytes: ClassVar[int] = _MAX_FRAME_BYTES


class Load(_Frame, frozen=True, gc=False, tag="load"):
    """First frame: which model, and how to run it. `lanes`: deterministic jobs at a time."""

    paths: tuple[str, ...]
    context_length: int
    chat_template: str | None
    system_prompt: str | None
    slots: int
    threads: int
    lanes: int


class Submit(_Frame, frozen=True, gc=False, tag="submit"):
    id: int
    work: Generation
    resume: tuple[int, ...]
    granted: int


class Grant(_Frame, frozen=True, gc=False, tag="grant"):
    id: int
    until: int


class Cancel(_Frame, frozen=True, gc=False, tag="cancel"):
    id: int


class Beat(_Frame, frozen=True, gc=False, tag="beat"):
    pass


class Loading(_Frame, frozen=True, gc=False, tag="loading"):
    """Bytes."""

    done: int
    total: int


class Ready(_Frame, frozen=True, gc=False, tag="ready"):
    decode_tps: float
    prefill_tps: float


class LoadFailed(_Frame, frozen=True, gc=False, tag="load-failed"):
    detail: str


class Refused(_Frame, frozen=True, gc=False, tag="refused"):
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


class Step(_Frame, frozen=True, gc=False, tag="step"):
    updates: tuple[Update, ...]
    active: int
    queued: int
    decode_tps: float
    prefill_tps: float


ToWorker: TypeAlias = Load | Submit | Grant | Cancel
FromWorker: TypeAlias = Beat | Loading | Ready | LoadFailed | Refused | Step

TO_WORKER: Final[Codec[ToWorker]] = Codec(ToWorker)
FROM_WORKER: Final[Codec[FromWorker]] = Codec(FromWorker)

#: One read from the pipe.
READ_BYTES: Final = 64 * KIB
