"""The interface of a stage: one loaded range of layers that works on several sessions at once.

The ring service (node/shards) knows nothing else of llama.cpp. A stage's engine runs in a supervised worker
process. If that process dies, the memory of all sessions is gone: the stage says `Lost`, and the ring feeds the
sessions again. Calls never block; what comes of them is told to `on_event`, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from cargos.runtimes.base import Session
from protocol.ring import Dtype
from protocol.work import Work


@dataclass(frozen=True, slots=True)
class StageSpec:
    """`path`: GGUF of the slice (cargos/shards/cut.py). `first`, `last` (exclusive) of `layers` in the whole
    model. The stage with the last layer is a head. `slots`: sessions at once. `draft_path`: GGUF of a small
    model with the same vocabulary that a head may draft with.
    """

    name: str
    path: str
    first: int
    last: int
    layers: int
    context_length: int
    chat_template: str | None = None
    system_prompt: str | None = None
    slots: int = 4
    threads: int = 1
    draft_path: str | None = None

    @property
    def is_head(self) -> bool:
        return self.last == self.layers


@dataclass(frozen=True, slots=True)
class StageLoad:
    """State and measured speed. `layer_ns`, `prefill_layer_ns`: for one row through one layer, decoding alone
    and in a large batch; `vocabulary_ns`: one row in the head. 0 until measured. `width`: values in a row.
    """

    state: Literal["loading", "ready", "failed"]
    slots: int
    active: int
    layer_ns: int
    prefill_layer_ns: int
    vocabulary_ns: int
    restarts: int
    rows_total: int
    width: int = 0
    detail: str = ""


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows `position` to `position + rows` of a session are in memory. `payload`: what came out, in the
    session's dtype (empty in a head). One feed may be computed in several steps, each told once it is done.
    """

    session: str
    position: int
    rows: int
    payload: bytes
    compute_ns: int
    wait_ns: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Head: feed these token ids into the ring, the first at `position`. What the stages have from there on is
    void. `prompt`: how many tokens the session's prompt has (told with each).
    """

    session: str
    position: int
    tokens: tuple[int, ...]
    prompt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine is gone, and with it what it had in memory of all sessions. It starts again by itself;
    sessions must be opened again. A head's jobs go on by themselves: each tells `Wanted` from position 0 again.
    """


@dataclass(frozen=True, slots=True)
class Refused:
    """This session can not be worked on. `code`: busy (no slot), invalid."""

    session: str
    code: Literal["busy", "invalid"]
    detail: str


StageEvent: TypeAlias = Computed | Wanted | Lost | Refused
OnEvent: TypeAlias = Callable[[StageEvent], None]


class StageRuntime(Protocol):
    """A stage that is loaded, or being loaded, or being reloaded after a crash."""

    def open(self, session: str, *, dtype: Dtype, prompt: int, deterministic: bool) -> None:
        """Give the session a slot. Opened again, it starts from nothing. (A head opens its own by `submit`.)"""
        ...

    def feed(self, session: str, position: int, rows: int, payload: bytes) -> None:
        """Rows for the session. Place 0: uint32 token ids, else activations in the session's dtype. What is in
        memory from `position` on is forgotten; a gap before `position` is `Refused` as invalid.
        """
        ...

    def close(self, session: str) -> None:
        """Forget the session; its slot is free within one engine step. Unknown ones are no error."""
        ...

    def load(self) -> StageLoad:
        """State and speed now. Cheap: callable at any time."""
        ...

    async def ready(self) -> None:
        """Wait until it is loaded. Raises RuntimeFailed if it can not be."""
        ...


class HeadRuntime(StageRuntime, Protocol):
    """A stage with the last layer and the vocabulary: it renders, tokenises, samples, detokenises."""

    def submit(
        self,
        session: str,
        work: Work,
        *,
        dtype: Dtype,
        resume: tuple[int, ...] = (),
        granted: int,
        trip_ns: Callable[[], int],
    ) -> AbstractAsyncContextManager[Session]:
        """A job. It tells `Wanted` (all tokens there are, first), is fed what comes out of the stage before it,
        and its tokens come out of the session, as from any runtime. Leaving the context ends it.

        `trip_ns`: the measured time of one traversal of the ring, for the length of drafts; 0: unknown.
        """
        ...
