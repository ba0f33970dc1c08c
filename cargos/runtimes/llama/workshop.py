"""What every worker process is made of: its pipe to the parent, its threads, its ways to end.

The main thread is the engine. A reader thread takes commands off stdin, a preparer thread renders and tokenises
new jobs, a beat thread says that the process lives. It ends when its stdin does: with its parent.

Where a command's way counts more than what can be done beside a step (`reads_between_steps`), there is no
reader thread: the engine's own takes commands when it has nothing to do, and between steps. That saves waking
one more thread for each. If the parent ends during a step, the beat finds out.
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
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, NoReturn, TypeAlias, TypeVar

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.native import Model, NativeError
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.prepare import Preparer
from cargos.runtimes.llama.sampling import BadLogits
from cargos.runtimes.llama.sequence import Sequence
from cargos.runtimes.llama.template import TemplateFailed
from cargos.runtimes.llama.wire import (
    BEAT_INTERVAL_S,
    READ_BYTES,
    Beat,
    From,
    LoadFailed,
    Loading,
    Refused,
    Submit,
    To,
    WorkerKind,
)
from protocol.codec import LENGTH, FrameBuffer, Message, encode
from protocol.limits import MIB

#: Exit codes, for the parent's log: a bug in here, and a failure of the native library.
EXIT_BUG: Final = 70
EXIT_NATIVE: Final = 71

#: A thread that renders a template gives the engine the interpreter back this often.
_SWITCH_INTERVAL_S: Final = 0.0005

#: Of a command that has come in part, the rest is waited for before the next step: the parent is about to send
#: it.
_REST_MS: Final = 50

#: Between two steps at most this much is read, so that no flood of commands keeps the engine from its work.
_MOST_BYTES: Final = 32 * MIB

#: Load progress is reported in steps of this share of the file.
_LOAD_REPORT_SHARE: Final = 0.02


class Output:
    """Frames to the parent, whole, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        body = encode(message)
        data = memoryview(LENGTH.pack(len(body)) + body)
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


def load_model(paths: Iterable[str], output: Output) -> Model:
    """The model, while the parent is told how far it is. Raises NativeError."""
    files = tuple(paths)
    total = sum(os.path.getsize(path) for path in files if os.path.isfile(path))  # noqa: PTH113, PTH202
    said = 0.0

    def progress(share: float) -> None:
        nonlocal said
        if share >= said + _LOAD_REPORT_SHARE or share >= 1.0:
            said = share
            output.send(Loading(int(share * total), total))

    return Model(files, progress)


@dataclass(frozen=True, slots=True)
class Announced:
    """A job is being prepared."""

    job: Submit


@dataclass(frozen=True, slots=True)
class Dropped:
    """A job that was refused."""

    key: int


Command = TypeVar("Command")
FromIntake: TypeAlias = Announced | Dropped | Sequence


class Intake:
    """Jobs on their way into the engine. `take` is called by the reader, the rest by the engine's thread."""

    def __init__(
        self, model: Model, preparer: Preparer, output: Output, tell: Callable[[FromIntake], None]
    ) -> None:
        self._model = model
        self._preparer = preparer
        self._output = output
        self._tell = tell
        self._jobs: queue.SimpleQueue[tuple[Submit, int]] = queue.SimpleQueue()
        self._expected: dict[int, int] = {}  # granted, by key of a job that is being prepared

    def __len__(self) -> int:
        return len(self._expected)

    @property
    def patience(self) -> Patience:
        return self._preparer.patience

    def start(self) -> None:
        threading.Thread(target=self._prepare, daemon=True).start()

    def take(self, job: Submit) -> None:
        self._tell(Announced(job))
        self._jobs.put((job, time.monotonic_ns()))

    def _prepare(self) -> NoReturn:
        while True:
            message, now_ns = self._jobs.get()
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
                self._tell(Dropped(message.id))
                self._output.send(Refused(message.id, refused.code, refused.detail))
            else:
                self._tell(sequence)

    def handle(self, command: FromIntake) -> Sequence | None:
        """A job that is ready for the engine and still wanted, if this is one."""
        match command:
            case Announced(job):
                self._expected[job.id] = job.granted
            case Dropped(key):
                self._expected.pop(key, None)
            case Sequence():
                granted = self._expected.pop(command.key, None)
                if granted is not None:
                    command.granted = max(command.granted, granted)
                    return command
                command.close()  # cancelled meanwhile
        return None

    def grant(self, key: int, until: int) -> bool:
        """True if the job is still here."""
        if key not in self._expected:
            return False
        self._expected[key] = max(self._expected[key], until)
        return True

    def cancel(self, key: int) -> bool:
        """True if the job was still here."""
        return self._expected.pop(key, None) is not None


class Workshop(ABC, Generic[To, Command]):
    """One worker process's work; made with the first frame, when the model has been loaded.

    `inbox`: what the engine's thread is to `handle` between steps; other threads use `tell`.
    """

    reads_between_steps: ClassVar[bool] = False

    def __init__(self, output: Output) -> None:
        self.output = output
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._bell, self._rope = os.pipe()

    def tell(self, command: Command) -> None:
        """Put it into the inbox, and wake the engine's thread."""
        self.inbox.put(command)
        if self.reads_between_steps:
            os.write(self._rope, b"!")

    @abstractmethod
    def warm_up(self) -> Message:
        """Get ready; the frame that says so."""

    @abstractmethod
    def patiences(self) -> list[Patience]:
        """What may take for ever."""

    @abstractmethod
    def dispatch(self, message: To) -> None:
        """A command, in the reader's thread."""

    @abstractmethod
    def handle(self, command: Command) -> None:
        """A command, in the engine's thread."""

    @abstractmethod
    def step(self) -> bool:
        """One step of the engine, and to the parent what came of it. False if there is nothing (more) to do."""

    def run(self) -> NoReturn:
        worked = False
        while True:
            if self.reads_between_steps:
                self._listen(wait=not worked)
            elif not worked:
                self.handle(self.inbox.get())
            while not self.inbox.empty():
                self.handle(self.inbox.get())
            worked = self.step()

    def _listen(self, *, wait: bool) -> None:
        """Take what commands there are; with `wait` at least one, or what another thread tells."""
        for fd, _ in self._poll.poll(None if wait else 0):
            if fd == self._bell:
                os.read(fd, READ_BYTES)
            else:
                self._read_some()

    def _read_some(self) -> None:
        size = 0
        while size < _MOST_BYTES:
            chunk = os.read(0, READ_BYTES)
            if not chunk:
                os._exit(0)
            size += len(chunk)
            for message in self._commands.feed_untrusted(chunk):
                self.dispatch(message)
            if len(chunk) < READ_BYTES and not len(self._commands):
                return
            if not self._poll_stdin.poll(_REST_MS if len(self._commands) else 0):
                return

    def start(self, commands: FrameBuffer[To], first: list[To]) -> None:
        ready = self.warm_up()
        gc.collect()
        gc.freeze()
        self.output.send(ready)
        threading.Thread(target=self._watch, daemon=True).start()
        self._commands = commands
        for message in first:
            self.dispatch(message)
        if self.reads_between_steps:
            self._poll, self._poll_stdin = select.poll(), select.poll()
            for poll, fd in ((self._poll, 0), (self._poll, self._bell), (self._poll_stdin, 0)):
                poll.register(fd, select.POLLIN)
            if first:
                os.write(self._rope, b"!")
        else:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while chunk := os.read(0, READ_BYTES):
            for message in self._commands.feed_untrusted(chunk):
                self.dispatch(message)
        os._exit(0)

    def _watch(self) -> NoReturn:
        """End the process when a job's grammar holds a thread up for ever, and say which job it is."""
        while True:
            time.sleep(BEAT_INTERVAL_S)
            for patience in self.patiences():
                key = patience.overdue()
                if key is not None:
                    self.output.send(Refused(key, "invalid", "the constraint's grammar is too complex"))
                    os._exit(EXIT_NATIVE)


def _claim_stdout() -> int:
    """The pipe to the parent for us alone: what native code prints goes to stderr."""
    fd = os.dup(1)
    os.dup2(2, 1)
    return fd


def _first_frames(buffer: FrameBuffer[To]) -> list[To]:
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


def work(kind: WorkerKind[To, From], make: Callable[[Output, To], Workshop[To, Command]]) -> None:
    """The life of a worker process. `make` raises TypeError if the first frame is not what it should be."""
    threading.excepthook = _die
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    output = Output(_claim_stdout())
    buffer: FrameBuffer[To] = FrameBuffer(kind.to_worker)
    load, *rest = _first_frames(buffer)
    threading.Thread(target=output.beat, daemon=True).start()
    try:
        workshop = make(output, load)
    except (NativeError, TemplateFailed) as error:
        output.send(LoadFailed(str(error)))
        sys.exit(EXIT_NATIVE)
    try:
        workshop.start(buffer, rest)
        workshop.run()
    except (NativeError, BadLogits) as error:
        print(f"native failure: {error}", file=sys.stderr, flush=True)  # noqa: T201  (the parent keeps the last lines)
        os._exit(EXIT_NATIVE)
