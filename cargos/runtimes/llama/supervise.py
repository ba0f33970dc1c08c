"""Keeps a worker process running: starts it, starts it again when it ends, gives up when it ends too often."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Generic, Literal, Protocol, TypeVar

import trio

from cargos.runtimes.base import RuntimeFailed
from cargos.runtimes.llama.process import WorkerDied, WorkerProcess
from cargos.runtimes.llama.wire import From, To, WorkerKind
from protocol.codec import Message

#: Pause before a restart; doubles with each recent one up to the longest.
_BACKOFF_S: Final = 0.05
_LONGEST_BACKOFF_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Supervision:
    """How a worker is watched.

    `max_restarts` within `restart_window_s` are tolerated, one more and the runtime has failed. `silence_s`:
    without a sign of life so long, a worker is frozen. `stall_s`: without a step so long although there is
    work, it is stuck (a step is short, but loading a large model from a slow disk is not).
    """

    max_restarts: int = 5
    restart_window_s: float = 60.0
    silence_s: float = 10.0
    stall_s: float = 60.0


From_contra = TypeVar("From_contra", bound=Message, contravariant=True)


class Supervised(Protocol[From_contra]):
    """What a runtime does with its worker's life. Nothing here may block."""

    def on_frame(self, frame: From_contra) -> None:
        """Raises ValueError to declare the worker broken."""
        ...

    def is_due(self) -> bool:
        """Whether a worker that is up owes somebody a step."""
        ...

    def on_down(self, reason: str) -> None:
        """A worker that was up, or was to be again, is gone."""
        ...

    def on_failed(self, detail: str) -> None:
        """There will be no worker any more."""
        ...


class Supervisor(Generic[To, From]):
    """`name`: what error details call the model. `load`: the first frame to each worker."""

    def __init__(
        self,
        name: str,
        kind: WorkerKind[To, From],
        load: To,
        user: Supervised[From],
        options: Supervision,
    ) -> None:
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.detail = ""
        self.restarts = 0
        self.up = False
        self._name = name
        self._kind = kind
        self._load = load
        self._user = user
        self._options = options
        self._settled = trio.Event()
        self._worker: WorkerProcess[To, From] | None = None
        self._was_up = False
        self._load_error = ""

    @property
    def pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    def send(self, frame: To, *, at_once: bool = False) -> None:
        """To the worker that there is now; nowhere if there is none. `at_once`: see `Outbox.put`."""
        if self._worker is not None:
            self._worker.outbox.put(frame, at_once=at_once)

    def came_up(self) -> None:
        """The worker has said that the model is loaded."""
        self.up = self._was_up = True
        self.state, self.detail = "ready", ""
        self._settled.set()

    def could_not_load(self, detail: str) -> None:
        """The worker has said why it is about to end."""
        self._load_error = detail

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises RuntimeFailed if it can not be."""
        await self._settled.wait()
        if self.state == "failed":
            raise RuntimeFailed(self.detail)

    async def run(self) -> None:
        """Keep a worker running until cancelled, or until it died too often."""
        deaths: deque[float] = deque()
        while True:
            reason = await self._live()
            if not self._was_up:
                self._fail(f"{self._name} can not be loaded: {self._load_error or reason}")
                return
            self._bury(reason)
            now = trio.current_time()
            deaths.append(now)
            while deaths[0] < now - self._options.restart_window_s:
                deaths.popleft()
            if len(deaths) > self._options.max_restarts:
                self._fail(f"the worker of {self._name} died {len(deaths)} times, last: {self.detail}")
                return
            self.restarts += 1
            await trio.sleep(min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** (len(deaths) - 1)))

    async def _live(self) -> str:
        """One worker from start to end; how it ended."""
        self._worker = WorkerProcess(
            self._kind,
            self._load,
            self._user.on_frame,
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
        return reason

    def _is_due(self) -> bool:
        return not self.up or self._user.is_due()  # one that is loading says how far it is

    def _bury(self, reason: str) -> None:
        self.up = False
        self.state, self.detail = "loading", f"restarting: {self._load_error or reason}"
        self._load_error = ""
        self._user.on_down(reason)

    def _fail(self, detail: str) -> None:
        self.state, self.detail = "failed", detail
        self._user.on_failed(detail)
        self._settled.set()


class Kept(Generic[To, From]):
    """A runtime with a worker that is kept running."""

    _supervisor: Supervisor[To, From]

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises RuntimeFailed if it can not be."""
        await self._supervisor.ready()

    async def supervise(self) -> None:
        """Keep a worker running until cancelled, or until it died too often."""
        await self._supervisor.run()

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._supervisor.pid


@asynccontextmanager
async def kept_running(supervise: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
    """`supervise` runs while the context is open. What the user raises in it comes out as it is."""
    escaped: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise)
        try:
            yield
        except BaseException as error:  # noqa: BLE001  (raised again below: a nursery would wrap the user's exception in a group)
            escaped = error
        nursery.cancel_scope.cancel()
    if escaped is not None:
        raise escaped
