"""The llama.cpp runtime: `open_llama` and what it has its supervised worker process do.

A worker that dies, freezes or gets stuck is started again, and each open session goes on with the tokens it
has: nobody notices but by a pause.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from cargos.runtimes.base import RuntimeFailed, RuntimeLoad, RuntimeSpec
from cargos.runtimes.llama.jobs import OpenJobs
from cargos.runtimes.llama.session import LlamaSession
from cargos.runtimes.llama.supervise import Kept, Supervision, Supervisor, kept_running
from cargos.runtimes.llama.wire import (
    LLAMA,
    FromWorker,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Refused,
    Step,
    Submit,
    ToWorker,
)
from protocol.work import Work

_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class LlamaOptions(Supervision):
    """How the worker is run and watched. `lanes`: `deterministic` jobs at a time, each with a memory of a full
    context, made when first needed.
    """

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


class LlamaRuntime(Kept[ToWorker, FromWorker]):
    """Implements `base.Runtime`. Made by `open_llama`."""

    def __init__(self, spec: RuntimeSpec, options: LlamaOptions) -> None:
        self._spec = spec
        load = Load(
            model_paths(spec.files),
            spec.context_length,
            spec.chat_template,
            spec.system_prompt,
            spec.slots,
            spec.threads,
            options.lanes,
        )
        self._supervisor: Supervisor[ToWorker, FromWorker] = Supervisor(spec.name, LLAMA, load, self, options)
        self._jobs = OpenJobs(self._submit, self._supervisor.send)
        self._counts = (0, 0)
        self._speeds = (0.0, 0.0)

    # --- for the job service --------------------------------------------------------------------

    @asynccontextmanager
    async def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AsyncGenerator[LlamaSession]:
        failed = self._supervisor.detail if self._supervisor.state == "failed" else ""
        session = self._jobs.open(work, resume, granted, failed)
        try:
            yield session
        finally:
            self._jobs.forget(session)

    def load(self) -> RuntimeLoad:
        active, queued = self._counts
        decode_tps, prefill_tps = self._speeds
        return RuntimeLoad(
            state=self._supervisor.state,
            slots=self._spec.slots,
            active=active,
            queued=queued,
            decode_tps=decode_tps,
            prefill_tps=prefill_tps,
            restarts=self._supervisor.restarts,
            tokens_total=self._jobs.tokens_total,
            detail=self._supervisor.detail,
        )

    def _submit(self, session: LlamaSession) -> None:
        self._supervisor.send(Submit(session.key, session.work, tuple(session.ids), session.granted))

    # --- for the supervisor ---------------------------------------------------------------------

    def is_due(self) -> bool:
        return self._jobs.is_due()

    def on_frame(self, frame: FromWorker) -> None:
        match frame:
            case Step():
                self._counts = (frame.active, frame.queued)
                self._speeds = (frame.decode_tps, frame.prefill_tps)
                for update in frame.updates:
                    self._jobs.on_update(update)
            case Refused():
                self._jobs.on_refused(frame)
            case Loading():
                self._jobs.on_loading(frame)
            case Ready():
                self._speeds = (frame.decode_tps, frame.prefill_tps)
                self._supervisor.came_up()
                self._jobs.on_up()
            case LoadFailed():
                self._supervisor.could_not_load(frame.detail)
            case _:
                raise ValueError(f"an unexpected {type(frame).__name__}")

    def on_down(self, reason: str) -> None:
        self._counts = (0, len(self._jobs))
        self._jobs.on_down(reason)

    def on_failed(self, detail: str) -> None:
        self._counts = (0, 0)
        self._jobs.on_failed(detail)


@asynccontextmanager
async def open_llama(spec: RuntimeSpec, options: LlamaOptions | None = None) -> AsyncGenerator[LlamaRuntime]:
    """Load a GGUF Cargo. Yields at once; the model loads meanwhile (`load().state`, `ready()`).

    Jobs may be queued before it is ready. On leaving, the worker is gone. Raises RuntimeFailed if `spec` has no
    usable model file.
    """
    runtime = LlamaRuntime(spec, options or LlamaOptions())
    async with kept_running(runtime.supervise):
        yield runtime
