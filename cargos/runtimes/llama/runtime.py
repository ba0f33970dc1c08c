"""The llama.cpp runtime: `open_llama` and the supervisor of its worker process.

A worker that dies, freezes or gets stuck is started again, and each open session goes on with the tokens it
has: nobody notices but by a pause. A job that itself kills workers is found out: after two crashes the jobs
that were there both times are tried one at a time, and the one that kills a worker alone has failed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final

import trio

from cargos.runtimes.base import JobRefused, Progress, RuntimeFailed, RuntimeLoad, RuntimeSpec
from cargos.runtimes.llama.process import WorkerDied, WorkerProcess
from cargos.runtimes.llama.session import LlamaSession
from cargos.runtimes.llama.wire import (
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
)
from protocol.work import Work

#: Crashes that a job may have been present at before it is tried alone.
_SUSPECT_AFTER: Final = 2

#: Pause before a restart; doubles with each recent one up to the longest.
_BACKOFF_S: Final = 0.05
_LONGEST_BACKOFF_S: Final = 5.0

_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How the worker is run and watched.

    `max_restarts` within `restart_window_s` are tolerated, one more and the runtime has failed. `silence_s`:
    without a sign of life so long, a worker is frozen. `stall_s`: without a step so long although there is
    work, it is stuck (a step is short, but loading a large model from a slow disk is not). `lanes`:
    `deterministic` jobs at a time, each with a memory of a full context, made when first needed.
    """

    max_restarts: int = 5
    restart_window_s: float = 60.0
    silence_s: float = 10.0
    stall_s: float = 60.0
    lanes: int = 2


def model_paths(files: dict[str, str]) -> tuple[str, ...]:
    """The GGUF file among a Cargo's files, or all parts of a split one in order.

    Raises RuntimeFailed if there is none or the choice is not clear.
    """
    names = sorted(name for name in files if name.endswith(".gguf"))
    parts = [name for name in names if _SPLIT.search(name)]
    if len(names) != 1 and len(parts) != len(names):
        raise RuntimeFailed(f"one GGUF model is needed, the Cargo has {', '.join(names) or 'none'}")
    if not names:
        raise RuntimeFailed("the Cargo has no .gguf file")
    return tuple(files[name] for name in names)


class LlamaRuntime:
    """Implements `base.Runtime`. Made by `open_llama`."""

    def __init__(self, spec: RuntimeSpec, options: LlamaOptions) -> None:
        self._spec = spec
        self._options = options
        self._frame = Load(
            model_paths(spec.files),
            spec.context_length,
            spec.chat_template,
            spec.system_prompt,
            spec.slots,
            spec.threads,
            options.lanes,
        )
        self._state: str = "loading"
        self._detail = ""
        self._settled = trio.Event()
        self._worker: WorkerProcess | None = None
        self._up = False
        self._was_up = False
        self._load_error = ""
        self._sessions: dict[int, LlamaSession] = {}
        self._in_worker: set[int] = set()
        self._suspects: deque[int] = deque()
        self._on_trial: int | None = None
        self._keys = count(1)
        self._restarts = 0
        self._counts = (0, 0)
        self._speeds = (0.0, 0.0)
        self._tokens_total = 0

    # --- for the job service --------------------------------------------------------------------

    @asynccontextmanager
    async def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AsyncGenerator[LlamaSession]:
        session = LlamaSession(next(self._keys), work, resume, granted, self._grant)
        self._sessions[session.key] = session
        if self._state == "failed":
            session.on_error(RuntimeFailed(self._detail))
        elif self._up:
            self._submit(session)
        try:
            yield session
        finally:
            self._forget(session)

    def load(self) -> RuntimeLoad:
        active, queued = self._counts
        decode_tps, prefill_tps = self._speeds
        return RuntimeLoad(
            state="failed" if self._state == "failed" else "ready" if self._state == "ready" else "loading",
            slots=self._spec.slots,
            active=active,
            queued=queued,
            decode_tps=decode_tps,
            prefill_tps=prefill_tps,
            restarts=self._restarts,
            tokens_total=self._tokens_total,
            detail=self._detail,
        )

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises RuntimeFailed if it can not be."""
        await self._settled.wait()
        if self._state == "failed":
            raise RuntimeFailed(self._detail)

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    def _grant(self, session: LlamaSession) -> None:
        if self._worker is not None and session.key in self._in_worker:
            self._worker.outbox.put(Grant(session.key, session.granted))

    def _submit(self, session: LlamaSession) -> None:
        if self._worker is not None and not session.ended:
            self._in_worker.add(session.key)
            self._worker.outbox.put(Submit(session.key, session.work, tuple(session.ids), session.granted))

    def _forget(self, session: LlamaSession) -> None:
        self._sessions.pop(session.key, None)
        if session.key in self._in_worker:
            self._in_worker.discard(session.key)
            if self._worker is not None and not session.ended:
                self._worker.outbox.put(Cancel(session.key))
        self._try_next(session.key)

    # --- frames ---------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the worker owes somebody a step."""
        if not self._up:
            return True  # it is loading, and says how far it is
        return any(
            not s.ended and len(s.ids) < s.granted for key in self._in_worker if (s := self._sessions.get(key))
        )

    def _on_frame(self, frame: FromWorker) -> None:
        match frame:
            case Step():
                self._on_step(frame)
            case Refused():
                session = self._sessions.get(frame.id)
                if session is not None:
                    session.on_error(JobRefused(frame.code, frame.detail))
                self._left(frame.id)
            case Loading():
                for session in self._sessions.values():
                    session.on_progress(Progress("loading", frame.done, frame.total))
            case Ready():
                self._on_ready(frame)
            case LoadFailed():
                self._load_error = frame.detail
            case _:
                raise ValueError(f"an unexpected {type(frame).__name__}")

    def _on_step(self, frame: Step) -> None:
        self._counts = (frame.active, frame.queued)
        self._speeds = (frame.decode_tps, frame.prefill_tps)
        for update in frame.updates:
            self._tokens_total += len(update.tokens)
            session = self._sessions.get(update.id)
            if session is None:
                continue  # cancelled; the worker had not read it yet
            session.on_update(update)
            if update.done is not None or update.failed:
                self._left(update.id)
            elif update.tokens:
                self._try_next(update.id)

    def _left(self, key: int) -> None:
        self._in_worker.discard(key)
        self._try_next(key)

    def _on_ready(self, frame: Ready) -> None:
        self._up = self._was_up = True
        self._state, self._detail = "ready", ""
        self._speeds = (frame.decode_tps, frame.prefill_tps)
        self._settled.set()
        for session in list(self._sessions.values()):
            if session.ended:
                continue
            if session.crashes >= _SUSPECT_AFTER:
                self._suspects.append(session.key)
            else:
                self._submit(session)
        self._try_next(None)

    def _try_next(self, cleared: int | None) -> None:
        """`cleared` made a token or is gone: if it was on trial, the next suspect is."""
        if self._on_trial is not None and cleared != self._on_trial:
            return
        self._on_trial = None
        while self._up and self._suspects and self._on_trial is None:
            session = self._sessions.get(self._suspects.popleft())
            if session is not None and not session.ended:
                self._on_trial = session.key
                self._submit(session)

    # --- supervision ----------------------------------------------------------------------------

    async def supervise(self) -> None:
        """Keep a worker running until cancelled, or until it died too often."""
        deaths: deque[float] = deque()
        while True:
            self._worker = WorkerProcess(
                self._frame,
                self._on_frame,
                self._is_due,
                silence_s=self._options.silence_s,
                stall_s=self._options.stall_s,
            )
            reason = ""
            try:
                await self._worker.run()
            except WorkerDied as death:
                reason = str(death)
            finally:
                self._worker = None
            if not self._was_up:
                self._fail(f"{self._spec.name} can not be loaded: {self._load_error or reason}")
                return
            self._bury(reason)
            now = trio.current_time()
            deaths.append(now)
            while deaths[0] < now - self._options.restart_window_s:
                deaths.popleft()
            if len(deaths) > self._options.max_restarts:
                self._fail(f"the worker of {self._spec.name} died {len(deaths)} times, last: {self._detail}")
                return
            self._restarts += 1
            await trio.sleep(min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** (len(deaths) - 1)))

    def _bury(self, reason: str) -> None:
        """The worker is dead: note who was there."""
        self._up = False
        self._state, self._detail = "loading", f"restarting: {self._load_error or reason}"
        self._load_error = ""
        self._counts = (0, len(self._sessions))
        for key in self._in_worker:
            session = self._sessions.get(key)
            if session is None:
                continue
            session.crashes += 1
            if key == self._on_trial:
                session.on_error(RuntimeFailed(f"this job ends the worker each time it is tried: {reason}"))
        self._in_worker.clear()
        self._suspects.clear()
        self._on_trial = None

    def _fail(self, detail: str) -> None:
        self._state, self._detail = "failed", detail
        self._counts = (0, 0)
        for session in self._sessions.values():
            session.on_error(RuntimeFailed(detail))
        self._settled.set()


@asynccontextmanager
async def open_llama(spec: RuntimeSpec, options: LlamaOptions | None = None) -> AsyncGenerator[LlamaRuntime]:
    """Load a GGUF Cargo. Yields at once; the model loads meanwhile (`load().state`, `ready()`).

    Jobs may be queued before it is ready. On leaving, the worker is gone. Raises RuntimeFailed if `spec` has no
    usable model file.
    """
    runtime = LlamaRuntime(spec, options or LlamaOptions())
    escaped: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.supervise)
        try:
            yield runtime
        except BaseException as error:  # noqa: BLE001  (raised again below: a nursery would wrap the user's exception in a group)
            escaped = error
        nursery.cancel_scope.cancel()
    if escaped is not None:
        raise escaped
