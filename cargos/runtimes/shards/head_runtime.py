"""A head, seen from the peer: a stage whose sessions are jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cargos.runtimes.llama.jobs import OpenJobs
from cargos.runtimes.llama.session import LlamaSession
from cargos.runtimes.llama.wire import Loading
from cargos.runtimes.llama.wire import Refused as JobRefusal
from cargos.runtimes.shards.base import OnEvent, Refused, StageSpec
from cargos.runtimes.shards.runtime import ShardOptions, ShardStage
from cargos.runtimes.shards.wire import Fault, Feed, FromShard, Job, StageStep
from protocol.ring import Dtype
from protocol.work import Work

if TYPE_CHECKING:
    from cargos.runtimes.shards.base import HeadRuntime


class ShardHead(ShardStage):
    """Implements `base.HeadRuntime`. Made by `open_stage`."""

    def __init__(self, spec: StageSpec, on_event: OnEvent, options: ShardOptions) -> None:
        super().__init__(spec, on_event, options)
        self._drafts = options.drafts
        self._jobs = OpenJobs(self._submit, self._send)
        self._dtypes: dict[int, Dtype] = {}
        self._trips: dict[int, Callable[[], int]] = {}
        #: Jobs whose memory was lost: rows that do not begin at 0 are answers to questions from before.
        self._stale: set[int] = set()

    def open(self, session: str, *, dtype: Dtype, prompt: int, deterministic: bool) -> None:
        """A head's sessions are opened by `submit`."""

    def close(self, session: str) -> None:
        """A head's sessions end when their users leave them."""

    @asynccontextmanager
    async def submit(
        self,
        session: str,
        work: Work,
        *,
        dtype: Dtype,
        resume: tuple[int, ...] = (),
        granted: int,
        trip_ns: Callable[[], int],
    ) -> AsyncGenerator[LlamaSession]:
        """As `base.HeadRuntime.submit`. If the session is open already, it is this newer one's from now on."""
        self._forget(session)
        failed = self._supervisor.detail if self._supervisor.state == "failed" else ""
        key = self._name(session)
        self._dtypes[key] = dtype
        self._trips[key] = trip_ns
        job = self._jobs.open(work, resume, granted, failed, key)
        try:
            yield job
        finally:
            if self._keys.get(session) == key:
                self._forget(session)
            self._stale.discard(key)
            del self._dtypes[key], self._trips[key]
            self._jobs.forget(job)

    def _submit(self, session: LlamaSession) -> None:
        self._send(
            Job(
                session.key,
                session.work,
                tuple(session.ids),
                session.granted,
                self._dtypes[session.key],
                self._drafts,
            )
        )

    def feed(self, session: str, position: int, rows: int, payload: bytes) -> None:
        key = self._keys.get(session)
        if key is None or not self._supervisor.up or (position and key in self._stale):
            return
        self._stale.discard(key)
        self._send(Feed(key, position, rows, payload, max(0, self._trips[key]())))

    def on_frame(self, frame: FromShard) -> None:
        match frame:
            case JobRefusal():
                self._jobs.on_refused(frame)
            case Loading():
                self._jobs.on_loading(frame)
            case _:
                super().on_frame(frame)

    def _on_up(self) -> None:
        super()._on_up()
        self._jobs.on_up()

    def _on_step(self, frame: StageStep) -> None:
        # Tokens first: whoever hears that the next rows are wanted may ask what the last ones made.
        for update in frame.updates:
            self._jobs.on_update(update)
        super()._on_step(frame)

    def _on_fault(self, name: str, fault: Fault) -> None:
        self._jobs.on_fault(fault.id, fault.detail)
        self._on_event(Refused(name, fault.code, fault.detail))

    def on_down(self, reason: str) -> None:
        self._stale = set(self._names)
        self._jobs.on_down(reason)
        super().on_down(reason)

    def _lose(self) -> None:
        """Nothing: jobs go on in the next worker."""

    def on_failed(self, detail: str) -> None:
        self._jobs.on_failed(detail)
        super().on_failed(detail)


if TYPE_CHECKING:

    def _is_head(head: ShardHead) -> HeadRuntime:  # pyright: ignore[reportUnusedFunction]  (the check is its body)
        return head
