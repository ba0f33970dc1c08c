"""The worker process: `python -m cargos.runtimes.llama.worker`, frames of `wire` on stdin and stdout.

The main thread is the engine. A reader thread takes commands off stdin, a preparer thread renders and tokenises
new jobs, a beat thread says that the process lives. It ends when its stdin does: with its parent.
"""

from __future__ import annotations

import os
import sys

# Before anything loads the native library: idle OpenMP threads must sleep, not spin (several processes
# share these cores), and an abort must not start a debugger.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import gc
import queue
import threading
import time
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.engine import Engine
from cargos.runtimes.llama.native import Model, NativeError
from cargos.runtimes.llama.prepare import Preparer
from cargos.runtimes.llama.sampling import BadLogits
from cargos.runtimes.llama.sequence import Sequence
from cargos.runtimes.llama.template import TemplateFailed
from cargos.runtimes.llama.wire import (
    BEAT_INTERVAL_S,
    FROM_WORKER,
    READ_BYTES,
    TO_WORKER,
    Beat,
    Cancel,
    FromWorker,
    Grant,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Refused,
    Step,
    Submit,
    ToWorker,
)
from protocol.codec import FrameBuffer

#: Exit codes, for the parent's log: a bug in here, and a failure of the native library.
EXIT_BUG: Final = 70
EXIT_NATIVE: Final = 71

#: A thread that renders a template gives the engine the interpreter back this often.
_SWITCH_INTERVAL_S: Final = 0.0005

#: Load progress is reported in steps of this share of the file.
_LOAD_REPORT_SHARE: Final = 0.02


@dataclass(frozen=True, slots=True)
class _Announced:
    """A job is being prepared."""

    key: int
    granted: int


@dataclass(frozen=True, slots=True)
class _Dropped:
    """A job that was refused."""

    key: int


_Command: TypeAlias = _Announced | _Dropped | Sequence | Grant | Cancel


class _Output:
    """Frames to the parent, whole, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        data = memoryview(FROM_WORKER.encode_frame(message))
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except BrokenPipeError:
                os._exit(0)  # nobody listens any more

    def beat(self) -> NoReturn:
        while True:
            self.send(Beat())
            time.sleep(BEAT_INTERVAL_S)


class _Worker:
    def __init__(self, output: _Output, load: Load) -> None:
        self._output = output
        self._load = load
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue[tuple[Submit, int]] = queue.SimpleQueue()
        self._expected: dict[int, int] = {}  # granted, by key of a job that is being prepared
        self._model = self._load_model()
        self._preparer = Preparer(self._model, load.context_length, load.chat_template, load.system_prompt)
        self._engine = Engine(self._model, load)
        self._said: tuple[int, int] = (0, 0)

    def _load_model(self) -> Model:
        total = sum(os.path.getsize(path) for path in self._load.paths if os.path.isfile(path))  # noqa: PTH113, PTH202
        said = 0.0

        def progress(share: float) -> None:
            nonlocal said
            if share >= said + _LOAD_REPORT_SHARE or share >= 1.0:
                said = share
                self._output.send(Loading(int(share * total), total))

        return Model(self._load.paths, progress)

    def start(self, commands: FrameBuffer[ToWorker], first: list[ToWorker]) -> None:
        self._engine.warm_up()
        gc.collect()
        gc.freeze()
        self._output.send(Ready(self._engine.decode.tps, self._engine.prefill.tps))
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._prepare, daemon=True).start()
        threading.Thread(target=self._read, args=(commands, first), daemon=True).start()

    def _read(self, commands: FrameBuffer[ToWorker], first: list[ToWorker]) -> None:
        for message in first:
            self._dispatch(message)
        while chunk := os.read(0, READ_BYTES):
            for message in commands.feed_untrusted(chunk):
                self._dispatch(message)
        os._exit(0)

    def _dispatch(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._inbox.put(_Announced(message.id, message.granted))
            self._to_prepare.put((message, time.monotonic_ns()))
        elif isinstance(message, Grant | Cancel):
            self._inbox.put(message)

    def _watch(self) -> NoReturn:
        """End the process when a job's grammar holds a thread up for ever, and say which job it is."""
        while True:
            time.sleep(BEAT_INTERVAL_S)
            for patience in (self._preparer.patience, self._engine.patience):
                key = patience.overdue()
                if key is not None:
                    self._output.send(Refused(key, "invalid", "the constraint's grammar is too complex"))
                    os._exit(EXIT_NATIVE)

    def _prepare(self) -> NoReturn:
        while True:
            message, now_ns = self._to_prepare.get()
            try:
                sequence = Sequence(
                    message.id,
                    self._preparer.prepare(message.id, message.work, message.resume),
                    granted=message.granted,
                    piece=self._model.piece,
                    eog=self._model.eog,
                    submitted_ns=now_ns,
                )
            except JobRefused as refused:
                self._inbox.put(_Dropped(message.id))
                self._output.send(Refused(message.id, refused.code, refused.detail))
            else:
                self._inbox.put(sequence)

    def run(self) -> NoReturn:
        worked = False
        while True:
            if not worked:
                self._handle(self._inbox.get())
            while not self._inbox.empty():
                self._handle(self._inbox.get())
            updates, worked = self._engine.step()
            counts = (self._engine.active, self._engine.queued + len(self._expected))
            if updates or counts != self._said:
                self._said = counts
                self._output.send(
                    Step(tuple(updates), *counts, self._engine.decode.tps, self._engine.prefill.tps)
                )

    def _handle(self, command: _Command) -> None:
        match command:
            case _Announced(key, granted):
                self._expected[key] = granted
            case _Dropped(key):
                self._expected.pop(key, None)
            case Sequence():
                granted = self._expected.pop(command.key, None)
                if granted is None:
                    command.close()  # cancelled meanwhile
                else:
                    command.granted = max(command.granted, granted)
                    self._engine.add(command)
            case Grant():
                if command.id in self._expected:
                    self._expected[command.id] = max(self._expected[command.id], command.until)
                else:
                    self._engine.grant(command.id, command.until)
            case Cancel():
                if self._expected.pop(command.id, None) is None:
                    self._engine.cancel(command.id)


def _claim_stdout() -> int:
    """The pipe to the parent for us alone: what native code prints goes to stderr."""
    fd = os.dup(1)
    os.dup2(2, 1)
    return fd


def _first_frames(buffer: FrameBuffer[ToWorker]) -> list[ToWorker]:
    while True:
        chunk = os.read(0, READ_BYTES)
        if not chunk:
            os._exit(0)
        messages = list(buffer.feed_untrusted(chunk))
        if messages:
            return messages


def _die(args: threading.ExceptHookArgs) -> None:
    sys.__excepthook__(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    sys.stderr.flush()
    os._exit(EXIT_BUG)  # a worker without one of its threads would hang; the parent restarts it


def main() -> None:
    threading.excepthook = _die
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    output = _Output(_claim_stdout())
    buffer = FrameBuffer(TO_WORKER)
    load, *rest = _first_frames(buffer)
    if not isinstance(load, Load):
        raise TypeError(f"the first frame must be Load, not {type(load).__name__}")
    threading.Thread(target=output.beat, daemon=True).start()
    try:
        worker = _Worker(output, load)
    except (NativeError, TemplateFailed) as error:
        output.send(LoadFailed(str(error)))
        sys.exit(EXIT_NATIVE)
    try:
        worker.start(buffer, rest)
        worker.run()
    except (NativeError, BadLogits) as error:
        print(f"native failure: {error}", file=sys.stderr, flush=True)  # noqa: T201  (the parent keeps the last lines)
        os._exit(EXIT_NATIVE)


if __name__ == "__main__":
    main()
