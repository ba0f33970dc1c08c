"""A stage, seen from the peer: what it has its supervised worker process do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import trio

from cargos.runtimes.base import RuntimeFailed
from cargos.runtimes.llama.runtime import LlamaOptions
from cargos.runtimes.llama.supervise import Kept, Supervisor
from cargos.runtimes.llama.wire import Cancel, LoadFailed, Loading
from cargos.runtimes.shards.base import Computed, Lost, OnEvent, Refused, StageLoad, StageSpec, Wanted
from cargos.runtimes.shards.wire import (
    MEMORY_PART_BYTES,
    SHARD,
    Export,
    Fault,
    Feed,
    FromShard,
    Imported,
    MemoryPart,
    Open,
    Pace,
    Stage,
    StageReady,
    StageStep,
    ToShard,
)
from protocol.ring import Dtype

if TYPE_CHECKING:
    from cargos.runtimes.shards.base import StageRuntime


@dataclass(frozen=True, slots=True)
class ShardOptions(LlamaOptions):
    """As for whole models. `drafts`: a head may ask for several tokens at once that it thinks likely."""

    drafts: bool = True


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """What a stage knows of a session after `rows` rows. Only for a stage with the same slice, and only from a
    peer that is trusted (or this very process): it is in the library's own format, which is hardly checked.
    """

    rows: int
    data: bytes


@dataclass(slots=True)
class _Request:
    """Somebody waits for an export or import."""

    answered: trio.Event = field(default_factory=trio.Event)
    rows: int = 0
    parts: list[bytes] = field(default_factory=list[bytes])
    error: str = ""


class ShardStage(Kept[ToShard, FromShard]):
    """Implements `base.StageRuntime`. Made by `open_stage`."""

    def __init__(self, spec: StageSpec, on_event: OnEvent, options: ShardOptions) -> None:
        self._spec = spec
        self._on_event = on_event
        load = Stage(
            spec.path,
            spec.first,
            spec.last,
            spec.layers,
            spec.context_length,
            spec.chat_template,
            spec.system_prompt,
            spec.slots,
            spec.threads,
            options.lanes,
            spec.draft_path,
        )
        self._supervisor: Supervisor[ToShard, FromShard] = Supervisor(spec.name, SHARD, load, self, options)
        self._numbers = count(1)
        self._keys: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._waiting: list[ToShard] = []  # for the next worker
        self._requests: dict[int, _Request] = {}
        self._sent = self._heard = 0
        self._idle = True
        self._active = 0
        self._rows_total = 0
        self._width = 0
        self._pace = Pace()

    # --- for the ring ---------------------------------------------------------------------------

    def open(self, session: str, *, dtype: Dtype, prompt: int, deterministic: bool) -> None:
        if self._supervisor.state == "failed":
            # Told after this call has returned, as everything is.
            refused = Refused(session, "busy", self._supervisor.detail)
            trio.lowlevel.current_trio_token().run_sync_soon(self._on_event, refused)
            return
        self.close(session)
        self._send(Open(self._name(session), dtype, prompt, deterministic))

    def feed(self, session: str, position: int, rows: int, payload: bytes) -> None:
        key = self._keys.get(session)
        if key is not None:
            self._send(Feed(key, position, rows, payload, 0))

    def close(self, session: str) -> None:
        key = self._forget(session)
        if key is not None:
            self._send(Cancel(key))

    def load(self) -> StageLoad:
        pace = self._pace
        return StageLoad(
            state=self._supervisor.state,
            slots=self._spec.slots,
            active=self._active,
            layer_ns=pace.layer_ns,
            prefill_layer_ns=pace.prefill_layer_ns,
            vocabulary_ns=pace.vocabulary_ns,
            restarts=self._supervisor.restarts,
            rows_total=self._rows_total,
            width=self._width,
            detail=self._supervisor.detail,
        )

    async def export(self, session: str) -> SessionMemory:
        """What the stage has in memory of a session, for `import_memory` of a stage with the same slice.

        No rows if there is nothing. Raises RuntimeFailed if the worker dies meanwhile.
        """
        key = self._keys.get(session)
        if key is None:
            return SessionMemory(0, b"")
        request = await self._ask(lambda number: [Export(key, number)])
        return SessionMemory(request.rows, b"".join(request.parts))

    async def import_memory(self, session: str, memory: SessionMemory) -> None:
        """Have an open session go on from there: the next row it takes is number `memory.rows`.

        Raises RuntimeFailed if it is not this slice's memory, or the worker dies meanwhile.
        """
        key = self._keys.get(session)
        if key is None:
            raise RuntimeFailed(f"session {session} is not open")
        size = MEMORY_PART_BYTES
        pieces = [memory.data[at : at + size] for at in range(0, max(1, len(memory.data)), size)]
        await self._ask(
            lambda number: [
                MemoryPart(key, number, memory.rows, part, len(pieces), piece)
                for part, piece in enumerate(pieces)
            ]
        )

    async def _ask(self, frames: Callable[[int], list[Export] | list[MemoryPart]]) -> _Request:
        number = next(self._numbers)
        request = self._requests[number] = _Request()
        try:
            for frame in frames(number):
                self._send(frame)
            await request.answered.wait()
        finally:
            del self._requests[number]
        if request.error:
            raise RuntimeFailed(request.error)
        return request

    # --- sessions -------------------------------------------------------------------------------

    def _name(self, session: str) -> int:
        """A number for it: each opening has another, so that nothing said of an earlier one is taken for it."""
        key = next(self._numbers)
        self._keys[session] = key
        self._names[key] = session
        return key

    def _forget(self, session: str) -> int | None:
        key = self._keys.pop(session, None)
        if key is not None:
            del self._names[key]
        return key

    def _send(self, frame: ToShard) -> None:
        """To the worker, or to the next one once it is there."""
        if self._supervisor.up:
            self._sent += 1
            # What several sessions have for the engine at a time should reach it together, for one step.
            self._supervisor.send(frame, at_once=len(self._keys) <= 1)
        elif self._supervisor.state != "failed":
            self._waiting.append(frame)

    # --- for the supervisor ---------------------------------------------------------------------

    def is_due(self) -> bool:
        return self._sent > self._heard or not self._idle

    def on_frame(self, frame: FromShard) -> None:
        match frame:
            case StageStep():
                self._on_step(frame)
            case MemoryPart():
                self._on_memory(frame)
            case Imported():
                request = self._requests.get(frame.request)
                if request is not None:
                    request.error = frame.detail
                    request.answered.set()
            case StageReady():
                self._width = frame.width
                self._pace = frame.pace
                self._on_up()
            case LoadFailed():
                self._supervisor.could_not_load(frame.detail)
            case Loading():
                pass
            case _:
                raise ValueError(f"an unexpected {type(frame).__name__}")

    def _on_up(self) -> None:
        self._sent = self._heard = 0
        self._idle = True
        self._supervisor.came_up()
        waiting, self._waiting = self._waiting, []
        for frame in waiting:
            self._send(frame)

    def _on_step(self, frame: StageStep) -> None:
        self._heard, self._idle = frame.heard, frame.idle
        self._active, self._pace = frame.active, frame.pace
        for done in frame.done:
            self._rows_total += done.rows
            name = self._names.get(done.id)
            if name is not None:
                self._on_event(
                    Computed(name, done.position, done.rows, done.payload, done.compute_ns, done.wait_ns)
                )
        for ask in frame.asks:
            name = self._names.get(ask.id)
            if name is not None:
                self._on_event(Wanted(name, ask.position, ask.tokens, ask.prompt))
        for fault in frame.faults:
            name = self._names.get(fault.id)
            if name is not None:
                self._on_fault(name, fault)

    def _on_fault(self, name: str, fault: Fault) -> None:
        self._forget(name)
        self._on_event(Refused(name, fault.code, fault.detail))

    def _on_memory(self, frame: MemoryPart) -> None:
        request = self._requests.get(frame.request)
        if request is None:
            return
        request.rows = frame.rows
        request.parts.append(frame.data)
        if len(request.parts) == frame.parts:
            request.answered.set()

    def on_down(self, reason: str) -> None:
        self._active = 0
        for request in self._requests.values():
            request.error = request.error or f"the worker died: {reason}"
            request.answered.set()
        self._lose()
        self._on_event(Lost())

    def _lose(self) -> None:
        """Forget the sessions that the worker had. Those that wait for the next one were never in this one."""
        waiting = {frame.id for frame in self._waiting if isinstance(frame, Open)}
        for name, key in list(self._keys.items()):
            if key not in waiting:
                self._forget(name)

    def on_failed(self, detail: str) -> None:
        for name in list(self._keys):
            self._forget(name)
            self._on_event(Refused(name, "busy", detail))
        self._waiting.clear()


if TYPE_CHECKING:

    def _is_stage(stage: ShardStage) -> StageRuntime:  # pyright: ignore[reportUnusedFunction]  (the check is its body)
        return stage
