"""What a stage and its worker process say to each other. Some frames are those of a whole model's worker."""

from __future__ import annotations

from typing import ClassVar, Final, Literal, TypeAlias

from cargos.runtimes.llama.wire import (
    Beat,
    Cancel,
    Frame,
    Grant,
    LoadFailed,
    Loading,
    Refused,
    Submit,
    Update,
    WorkerKind,
)
from protocol.codec import Codec
from protocol.limits import MIB
from protocol.ring import MAX_FEED_BYTES, Dtype
from protocol.work import Part

#: A step's rows: a batch of 63 and a chunk of 32 for each lane, each row 64 KiB at most.
_MAX_STEP_BYTES: Final = 2 * MAX_FEED_BYTES

#: A session's memory goes over the pipe in parts of this size.
MEMORY_PART_BYTES: Final = 4 * MIB


class Stage(Frame, frozen=True, gc=False, tag="stage"):
    """First frame: which slice, and how to run it. Fields as in `base.StageSpec`; `lanes`: deterministic
    sessions at a time.
    """

    path: str
    first: int
    last: int
    layers: int
    context_length: int
    chat_template: str | None
    system_prompt: str | None
    slots: int
    threads: int
    lanes: int
    draft_path: str | None


class Open(Frame, frozen=True, gc=False, tag="open"):
    id: int
    dtype: Dtype
    prompt: int
    deterministic: bool


class Job(Submit, frozen=True, gc=False, tag="job"):
    """Head: a session of our own."""

    dtype: Dtype
    drafts: bool


class Feed(Frame, frozen=True, gc=False, tag="feed"):
    """`trip_ns`: head: one traversal of the ring as measured now; 0: unknown."""

    max_bytes: ClassVar[int] = MAX_FEED_BYTES + 1024

    id: int
    position: int
    rows: int
    payload: bytes
    trip_ns: int


class Export(Frame, frozen=True, gc=False, tag="export"):
    id: int
    request: int


class MemoryPart(Frame, frozen=True, gc=False, tag="memory"):
    """Part `part` of `parts` of a session's memory with `rows` rows: asked for by `Export`, or (the other way)
    to be put into session `id`. 0 rows: there is none.
    """

    max_bytes: ClassVar[int] = MEMORY_PART_BYTES + 1024

    id: int
    request: int
    rows: int
    part: int
    parts: int
    data: bytes


class Imported(Frame, frozen=True, gc=False, tag="imported"):
    """`detail`: why not, if not."""

    request: int
    detail: str


class Done(Part, frozen=True, gc=False, array_like=True):
    id: int
    position: int
    rows: int
    payload: bytes
    compute_ns: int
    wait_ns: int


class Ask(Part, frozen=True, gc=False, array_like=True):
    id: int
    position: int
    tokens: tuple[int, ...]
    prompt: int


class Fault(Part, frozen=True, gc=False, array_like=True):
    id: int
    code: Literal["busy", "invalid"]
    detail: str


class Pace(Part, frozen=True, gc=False, array_like=True):
    """As in `base.StageLoad`."""

    layer_ns: int = 0
    prefill_layer_ns: int = 0
    vocabulary_ns: int = 0


class StageReady(Frame, frozen=True, gc=False, tag="stage-ready"):
    width: int
    pace: Pace


class StageStep(Frame, frozen=True, gc=False, tag="stage-step"):
    """`heard`: commands taken so far; `idle`: with them there is nothing left to do."""

    max_bytes: ClassVar[int] = _MAX_STEP_BYTES

    heard: int
    idle: bool
    active: int
    pace: Pace
    done: tuple[Done, ...] = ()
    asks: tuple[Ask, ...] = ()
    faults: tuple[Fault, ...] = ()
    updates: tuple[Update, ...] = ()


ToShard: TypeAlias = Stage | Open | Job | Feed | Grant | Cancel | Export | MemoryPart
FromShard: TypeAlias = Beat | Loading | StageReady | LoadFailed | Refused | StageStep | MemoryPart | Imported

SHARD: Final[WorkerKind[ToShard, FromShard]] = WorkerKind(
    "cargos.runtimes.shards.worker", Codec(ToShard), Codec(FromShard)
)
