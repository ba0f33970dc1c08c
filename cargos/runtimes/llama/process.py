"""One worker process from start to end: frames in and out, its last words, and a watch over its life."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Generic

import trio

import cargos
from cargos.runtimes.llama.wire import BEAT_INTERVAL_S, READ_BYTES, Beat, From, To, WorkerKind
from protocol.codec import Codec, FrameBuffer
from protocol.errors import ProtocolError

#: Lines of the worker's stderr that are kept for error details.
_STDERR_LINES: Final = 30
_STDERR_LINE_CHARS: Final = 300

#: A worker whose stdin closed ends at once; one that does not is killed after this.
_EXIT_GRACE_S: Final = 2.0


class WorkerDied(Exception):
    """It ended, froze or talked nonsense. The message says how, with its last words."""


class Outbox(Generic[To]):
    """Frames for the worker's stdin. Never blocks: what the pipe does not take at once waits. Bounded by the
    jobs that are open and their grants, which a job service sends once per window of tokens, and by a ring's
    windows.
    """

    def __init__(self, codec: Codec[To]) -> None:
        self._codec = codec
        self._frames: deque[To] = deque()
        self._event = trio.Event()
        self._rest = b""  # of a frame that the pipe took in part
        self._fd: int | None = None  # of the pipe, while nothing waits

    def put(self, message: To, *, at_once: bool = False) -> None:
        """`at_once`: now, not together with what is put beside it before this task gives way."""
        if self._fd is None or self._frames or not at_once:
            self._frames.append(message)
            self._event.set()
            return
        data = self._codec.encode_frame(message)
        try:
            rest = data[os.write(self._fd, data) :]
        except (BlockingIOError, BrokenPipeError):
            rest = data  # for later, or never: the reader sees the end of the worker's output
        if rest:
            self._fd, self._rest = None, rest
            self._event.set()

    async def send_to(self, pipe: trio.abc.SendStream) -> None:
        """Send what is put, until cancelled. Raises trio.BrokenResourceError when the worker is dead."""
        fd = _descriptor(pipe)
        try:
            while True:
                self._fd = None  # nothing may get between
                while self._rest or self._frames:
                    data = self._rest + b"".join(map(self._codec.encode_frame, self._frames))
                    self._frames.clear()
                    self._rest = b""
                    await _send_all(pipe, fd, data)
                self._fd = fd
                self._event = trio.Event()
                await self._event.wait()
        finally:
            self._fd = None  # its number may soon be another file's


def _environment() -> dict[str, str]:
    root = str(Path(cargos.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, inherited]) if inherited else root,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GGML_NO_BACKTRACE": "1",
    }


def _descriptor(stream: object) -> int | None:
    """Of a pipe; None where pipes are something else."""
    fileno: Callable[[], int] | None = getattr(stream, "fileno", None)
    return None if fileno is None else fileno()


async def _receive_some(pipe: trio.abc.ReceiveStream) -> bytes:
    """As the pipe's own, which first gives way to all other tasks, then tries in vain, and only then waits:
    too much for what comes with every token.
    """
    fd = _descriptor(pipe)
    if fd is None:
        return bytes(await pipe.receive_some(READ_BYTES))
    while True:
        await trio.lowlevel.wait_readable(fd)
        try:
            return os.read(fd, READ_BYTES)
        except BlockingIOError:
            continue


async def _send_all(pipe: trio.abc.SendStream, fd: int | None, data: bytes) -> None:
    """As the pipe's own, without giving way first. Raises trio.BrokenResourceError."""
    if fd is None:
        await pipe.send_all(data)
        return
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(fd)
        except OSError as error:
            raise trio.BrokenResourceError from error


class WorkerProcess(Generic[To, From]):
    """`run` lives as long as the process. `on_frame` is called with each frame but beats, in order, and must
    not block; it may raise ValueError to declare the worker broken.

    `silence_s`: no sign of life for so long means frozen. `stall_s`: alive, but no step for so long although
    `is_due()` says that there is work, means stuck.
    """

    def __init__(
        self,
        kind: WorkerKind[To, From],
        load: To,
        on_frame: Callable[[From], None],
        is_due: Callable[[], bool],
        *,
        silence_s: float,
        stall_s: float,
    ) -> None:
        self._kind = kind
        self.outbox: Final[Outbox[To]] = Outbox(kind.to_worker)
        self.outbox.put(load)
        self.pid = 0
        self._on_frame = on_frame
        self._is_due = is_due
        self._silence_ticks = max(2, round(silence_s / BEAT_INTERVAL_S))
        self._stall_ticks = max(2, round(stall_s / BEAT_INTERVAL_S))
        self._quiet = 0
        self._idle = 0
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._why = ""

    async def run(self) -> None:
        """Raises WorkerDied at its end. On cancellation the process is ended and reaped first."""
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", self._kind.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is for us; we end the worker
            )
        except OSError as error:
            raise WorkerDied(f"the worker process can not be started: {error}") from error
        self.pid = process.pid
        code = 0
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_stderr, process)
                nursery.start_soon(self._write, process)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self._read(process)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                code = await self._end(process)
        raise WorkerDied(self._post_mortem(code))

    async def _read(self, process: trio.Process) -> None:
        stdout = process.stdout
        assert stdout is not None  # noqa: S101  (PIPE was asked for; tells the type checker)
        buffer = FrameBuffer(self._kind.from_worker)
        try:
            while chunk := await _receive_some(stdout):
                for frame in buffer.feed_untrusted(chunk):
                    self._quiet = 0
                    if not isinstance(frame, Beat):
                        self._idle = 0
                        self._on_frame(frame)
        except (ProtocolError, ValueError) as error:
            self._why = f"it sent what makes no sense: {error}"

    async def _write(self, process: trio.Process) -> None:
        stdin = process.stdin
        assert stdin is not None  # noqa: S101  (PIPE was asked for; tells the type checker)
        with suppress(trio.BrokenResourceError):  # it is dead; the reader sees the end of its output
            await self.outbox.send_to(stdin)

    async def _read_stderr(self, process: trio.Process) -> None:
        stderr = process.stderr
        assert stderr is not None  # noqa: S101  (PIPE was asked for; tells the type checker)
        rest = ""
        while chunk := await stderr.receive_some(READ_BYTES):
            *lines, rest = (rest + chunk.decode("utf-8", "replace"))[-READ_BYTES:].split("\n")
            self._stderr += [line[:_STDERR_LINE_CHARS] for line in lines if line.strip()]

    async def _watch(self, scope: trio.CancelScope) -> None:
        # Counts its own ticks, not time: if we ourselves were stopped for a while, nobody else is to blame.
        while True:
            await trio.sleep(BEAT_INTERVAL_S)
            self._quiet += 1
            self._idle = self._idle + 1 if self._is_due() else 0
            if self._quiet > self._silence_ticks:
                self._why = f"it gave no sign of life for {self._silence_ticks * BEAT_INTERVAL_S:.0f} s"
                break
            if self._idle > self._stall_ticks:
                self._why = f"it made no step for {self._stall_ticks * BEAT_INTERVAL_S:.0f} s"
                break
        scope.cancel()

    async def _end(self, process: trio.Process) -> int:
        """Close its stdin, wait a little, kill, reap."""
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await stream.aclose()
        if not self._why:
            with trio.move_on_after(_EXIT_GRACE_S):
                await process.wait()
        if process.poll() is None:
            process.kill()
        code = await process.wait()
        with trio.move_on_after(_EXIT_GRACE_S):
            await self._read_stderr(process)
        if process.stderr is not None:
            await process.stderr.aclose()
        return code

    def _post_mortem(self, code: int) -> str:
        how = self._why or (f"it was killed by signal {-code}" if code < 0 else f"it exited with code {code}")
        words = " | ".join(list(self._stderr)[-3:])
        return f"{how}; its last words: {words}" if words else how
