"""The jobs that are open at a runtime, and which of them the worker has.

A job that itself kills workers is found out: after two crashes the jobs that were there both times are tried
one at a time, and the one that kills a worker alone has failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Final

from cargos.runtimes.base import JobRefused, Progress, RuntimeFailed
from cargos.runtimes.llama.session import LlamaSession
from cargos.runtimes.llama.wire import Cancel, Grant, Loading, Refused, Update
from protocol.work import Work

#: Crashes that a job may have been present at before it is tried alone.
_SUSPECT_AFTER: Final = 2


class OpenJobs:
    """`submit` gives a job to the worker, `send` tells it what comes after."""

    def __init__(self, submit: Callable[[LlamaSession], None], send: Callable[[Grant | Cancel], None]) -> None:
        self._to_worker = submit
        self._send = send
        self._sessions: dict[int, LlamaSession] = {}
        self._in_worker: set[int] = set()
        self._suspects: deque[int] = deque()
        self._on_trial: int | None = None
        self._keys = count(1)
        self._up = False
        self.tokens_total = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, work: Work, resume: tuple[int, ...], granted: int, failed: str = "", key: int | None = None
    ) -> LlamaSession:
        """`failed`: why there is no worker any more, if so. `key`: a number of the caller's own choice."""
        session = LlamaSession(next(self._keys) if key is None else key, work, resume, granted, self._grant)
        self._sessions[session.key] = session
        if failed:
            session.on_error(RuntimeFailed(failed))
        elif self._up:
            self._submit(session)
        return session

    def forget(self, session: LlamaSession) -> None:
        """Its user has left."""
        self._sessions.pop(session.key, None)
        if session.key in self._in_worker:
            self._in_worker.discard(session.key)
            if not session.ended:
                self._send(Cancel(session.key))
        self._try_next(session.key)

    def _grant(self, session: LlamaSession) -> None:
        if session.key in self._in_worker:
            self._send(Grant(session.key, session.granted))

    def _submit(self, session: LlamaSession) -> None:
        if self._up and not session.ended:
            self._in_worker.add(session.key)
            self._to_worker(session)

    def is_due(self) -> bool:
        """Whether the worker owes somebody a token."""
        return any(
            not s.ended and len(s.ids) < s.granted for key in self._in_worker if (s := self._sessions.get(key))
        )

    # --- from the worker ------------------------------------------------------------------------

    def on_update(self, update: Update) -> None:
        self.tokens_total += len(update.tokens)
        session = self._sessions.get(update.id)
        if session is None:
            return  # cancelled; the worker had not read it yet
        session.on_update(update)
        if update.done is not None or update.failed:
            self._left(update.id)
        elif update.tokens:
            self._try_next(update.id)

    def on_refused(self, frame: Refused) -> None:
        session = self._sessions.get(frame.id)
        if session is not None:
            session.on_error(JobRefused(frame.code, frame.detail))
        self._left(frame.id)

    def on_fault(self, key: int, detail: str) -> None:
        """Something other than the job itself went wrong with it: elsewhere it may succeed."""
        session = self._sessions.get(key)
        if session is not None:
            session.on_error(RuntimeFailed(detail))
        self._left(key)

    def on_loading(self, frame: Loading) -> None:
        for session in self._sessions.values():
            session.on_progress(Progress("loading", frame.done, frame.total))

    def _left(self, key: int) -> None:
        self._in_worker.discard(key)
        self._try_next(key)

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

    # --- the worker's life ----------------------------------------------------------------------

    def on_up(self) -> None:
        """A worker is ready: it gets all jobs, those under suspicion one at a time."""
        self._up = True
        for session in list(self._sessions.values()):
            if session.ended:
                continue
            if session.crashes >= _SUSPECT_AFTER:
                self._suspects.append(session.key)
            else:
                self._submit(session)
        self._try_next(None)

    def on_down(self, reason: str) -> None:
        """The worker is dead: note who was there."""
        self._up = False
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

    def on_failed(self, detail: str) -> None:
        """There will be no worker any more."""
        for session in self._sessions.values():
            session.on_error(RuntimeFailed(detail))
