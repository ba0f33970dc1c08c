"""The worker process of a stage: `python -m cargos.runtimes.shards.worker`, frames of `wire` on its pipes."""

from __future__ import annotations

from typing import TypeAlias

from cargos.runtimes.llama.native import NativeError
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.prepare import Preparer
from cargos.runtimes.llama.wire import Cancel, Grant, Update
from cargos.runtimes.llama.workshop import (
    Dropped,
    FromIntake,
    Intake,
    Output,
    Workshop,
    load_model,
    work,
)
from cargos.runtimes.shards.engine import StageEngine
from cargos.runtimes.shards.head import HeadEngine
from cargos.runtimes.shards.wire import (
    MEMORY_PART_BYTES,
    SHARD,
    Ask,
    Export,
    Feed,
    Imported,
    Job,
    MemoryPart,
    Open,
    Stage,
    StageReady,
    StageStep,
    ToShard,
)

_Told: TypeAlias = Open | Job | Feed | Grant | Cancel | Export | MemoryPart
_Command: TypeAlias = _Told | FromIntake


class _Worker(Workshop[ToShard, _Command]):
    reads_between_steps = True  # a ring waits for each command

    def __init__(self, output: Output, load: ToShard) -> None:
        super().__init__(output)
        if not isinstance(load, Stage):
            raise TypeError(f"the first frame must be Stage, not {type(load).__name__}")
        model = load_model((load.path,), output)
        self._head: HeadEngine | None = None
        self._intake: Intake | None = None
        if load.last == load.layers:
            if not model.has_vocabulary:
                raise NativeError(f"{load.path} has no vocabulary: it is not a last slice")
            self._engine: StageEngine = HeadEngine(model, load)
            self._head = self._engine
            preparer = Preparer(model, load.context_length, load.chat_template, load.system_prompt)
            self._intake = Intake(model, preparer, output, self.tell)
        else:
            self._engine = StageEngine(model, load)
        self._heard = 0
        self._memory: dict[int, list[bytes]] = {}  # parts that have come, by request

    def warm_up(self) -> StageReady:
        self._engine.warm_up()
        if self._intake is not None:
            self._intake.start()
        return StageReady(self._engine.width, self._engine.meter.pace)

    def patiences(self) -> list[Patience]:
        if self._head is None or self._intake is None:
            return []
        return [self._intake.patience, self._head.patience]

    def dispatch(self, message: ToShard) -> None:
        if isinstance(message, Stage):
            return
        self.inbox.put(message)
        if isinstance(message, Job) and self._intake is not None:
            self._intake.take(message)

    def step(self) -> bool:
        head = self._head
        if head is not None:
            head.ask()
            if head.asks:  # the ring should not wait for what is computed here meanwhile
                self._say(idle=False)
        self._engine.step()
        if head is not None:
            head.ask()
        # One frame says what came of it and that nothing is left: each one wakes the peer.
        left = self._engine.has_work()
        self._say(idle=not left)
        return left

    def _say(self, *, idle: bool) -> None:
        engine, head = self._engine, self._head
        asks: tuple[Ask, ...] = ()
        updates: tuple[Update, ...] = ()
        if head is not None:
            asks, updates = tuple(head.asks), tuple(head.updates)
            head.asks.clear()
            head.updates.clear()
        done, faults = tuple(engine.done), tuple(engine.faults)
        engine.done.clear()
        engine.faults.clear()
        self.output.send(
            StageStep(self._heard, idle, engine.active, engine.meter.pace, done, asks, faults, updates)
        )

    def handle(self, command: _Command) -> None:
        if isinstance(command, Open | Job | Feed | Grant | Cancel | Export | MemoryPart):
            self._heard += 1
            self._obey(command)
        elif self._intake is not None and self._head is not None:
            sequence = self._intake.handle(command)
            if sequence is not None:
                self._head.admit(sequence)
            elif isinstance(command, Dropped):
                self._engine.close(command.key)

    def _obey(self, command: _Told) -> None:
        match command:
            case Open():
                self._engine.open(command)
            case Feed():
                self._engine.feed(command)
            case Job():
                if self._head is not None:
                    self._head.expect(command)
            case Grant():
                self._grant(command)
            case Cancel():
                if self._intake is not None:
                    self._intake.cancel(command.id)
                self._engine.close(command.id)
            case Export():
                self._export(command)
            case MemoryPart():
                self._import(command)

    def _grant(self, command: Grant) -> None:
        if self._head is None or self._intake is None:
            return
        if not self._intake.grant(command.id, command.until):
            self._head.grant(command.id, command.until)

    def _export(self, command: Export) -> None:
        rows, data = self._engine.export(command.id)
        parts = max(1, -(-len(data) // MEMORY_PART_BYTES))
        for part in range(parts):
            piece = data[part * MEMORY_PART_BYTES : (part + 1) * MEMORY_PART_BYTES]
            self.output.send(MemoryPart(command.id, command.request, rows, part, parts, piece))

    def _import(self, command: MemoryPart) -> None:
        parts = self._memory.setdefault(command.request, [])
        parts.append(command.data)
        if len(parts) == command.parts:
            del self._memory[command.request]
            detail = self._engine.load_memory(command.id, command.rows, b"".join(parts))
            self.output.send(Imported(command.request, detail))


if __name__ == "__main__":
    work(SHARD, _Worker)
