"""The worker process: `python -m cargos.runtimes.llama.worker`, frames of `wire` on stdin and stdout."""

from __future__ import annotations

from typing import TypeAlias

from cargos.runtimes.llama.engine import Engine
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.prepare import Preparer
from cargos.runtimes.llama.wire import LLAMA, Cancel, Grant, Load, Ready, Step, Submit, ToWorker
from cargos.runtimes.llama.workshop import FromIntake, Intake, Output, Workshop, load_model, work

_Command: TypeAlias = FromIntake | Grant | Cancel


class _Worker(Workshop[ToWorker, _Command]):
    def __init__(self, output: Output, load: ToWorker) -> None:
        super().__init__(output)
        if not isinstance(load, Load):
            raise TypeError(f"the first frame must be Load, not {type(load).__name__}")
        model = load_model(load.paths, output)
        preparer = Preparer(model, load.context_length, load.chat_template, load.system_prompt)
        self._intake = Intake(model, preparer, output, self.inbox.put)
        self._engine = Engine(model, load)
        self._said: tuple[int, int] = (0, 0)

    def warm_up(self) -> Ready:
        self._engine.warm_up()
        self._intake.start()
        return Ready(self._engine.decode.tps, self._engine.prefill.tps)

    def patiences(self) -> list[Patience]:
        return [self._intake.patience, self._engine.patience]

    def dispatch(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._intake.take(message)
        elif isinstance(message, Grant | Cancel):
            self.inbox.put(message)

    def step(self) -> bool:
        updates, worked = self._engine.step()
        counts = (self._engine.active, self._engine.queued + len(self._intake))
        if updates or counts != self._said:
            self._said = counts
            self.output.send(Step(tuple(updates), *counts, self._engine.decode.tps, self._engine.prefill.tps))
        return worked

    def handle(self, command: _Command) -> None:
        match command:
            case Grant():
                if not self._intake.grant(command.id, command.until):
                    self._engine.grant(command.id, command.until)
            case Cancel():
                if not self._intake.cancel(command.id):
                    self._engine.cancel(command.id)
            case _:
                sequence = self._intake.handle(command)
                if sequence is not None:
                    self._engine.add(sequence)


if __name__ == "__main__":
    work(LLAMA, _Worker)
