"""One job, seen from the trio side: what came from the worker and was not taken yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import trio

from cargos.runtimes.base import Finished, JobRefused, Progress, RuntimeEvent, RuntimeFailed, Tokens
from cargos.runtimes.llama.wire import Done, Update
from protocol.jobs import Token
from protocol.limits import MAX_TOKENS_PER_FRAME
from protocol.work import Work


class LlamaSession:
    """Implements `base.Session`. Holds at most the tokens that were granted and not yet received.

    `ids`: all tokens so far, the resumed ones first: with them the job starts again after a crash.
    """

    def __init__(
        self,
        key: int,
        work: Work,
        resume: tuple[int, ...],
        granted: int,
        on_grant: Callable[[LlamaSession], None],
    ) -> None:
        self.key: Final = key
        self.work: Final = work
        self.ids = list(resume)
        self.granted = granted
        self.crashes = 0
        self.ended = False
        self._resumed = len(resume)
        self._on_grant = on_grant
        self._tokens: list[Token] = []
        self._progress: Progress | None = None
        self._finished: Finished | None = None
        self._error: JobRefused | RuntimeFailed | None = None
        self._taken = False
        self._reader: trio.lowlevel.Task | None = None

    async def receive(self) -> RuntimeEvent:
        event = self._next()
        if event is not None:
            await trio.lowlevel.checkpoint()
            return event
        while event is None:
            await self._park()
            event = self._next()
        return event

    def grant(self, until: int) -> None:
        if until > self.granted:
            self.granted = until
            self._on_grant(self)

    def _next(self) -> RuntimeEvent | None:
        if self._tokens:
            tokens = tuple(self._tokens[:MAX_TOKENS_PER_FRAME])
            first = len(self.ids) - len(self._tokens)
            del self._tokens[: len(tokens)]
            return Tokens(first, tokens)
        if self._progress is not None:
            progress, self._progress = self._progress, None
            return progress
        if self._error is not None:
            raise self._error
        if self._finished is not None and not self._taken:
            self._taken = True
            return self._finished
        if self._taken:
            raise RuntimeError("receive() after Finished")
        return None

    async def _park(self) -> None:
        if self._reader is not None:
            raise trio.BusyResourceError("two tasks receive from one session")
        self._reader = trio.lowlevel.current_task()

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._reader = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            trio.lowlevel.reschedule(reader)

    # --- from the supervisor --------------------------------------------------------------------

    def on_progress(self, progress: Progress) -> None:
        if len(self.ids) == self._resumed and not self.ended:
            self._progress = progress
            self._wake()

    def on_update(self, update: Update) -> None:
        """Raises ValueError if the worker's tokens do not join on to those we have: then it is broken."""
        if self.ended:
            return
        if update.tokens:
            if update.first != len(self.ids):
                raise ValueError(f"token {update.first} from the worker where {len(self.ids)} is due")
            self.ids += [token.id for token in update.tokens]
            self._tokens += update.tokens
            self._progress = None
            self.crashes = 0
            self._wake()
        if update.failed:
            self.on_error(JobRefused("invalid", update.failed))
        elif update.done is not None:
            self._on_done(update.done)
        elif update.prompt_total and not update.tokens:
            self.on_progress(Progress("prompt", update.prompt_done, update.prompt_total))

    def _on_done(self, done: Done) -> None:
        usage = msgspec.structs.replace(done.usage, generated_tokens=len(self.ids) - self._resumed)
        self.ended = True
        self._finished = done.finished(usage)
        self._wake()

    def on_error(self, error: JobRefused | RuntimeFailed) -> None:
        if self.ended:
            return
        if isinstance(error, JobRefused) and len(self.ids) > self._resumed:
            error = RuntimeFailed(f"the job can not go on: {error.detail}")
        self.ended = True
        self._error = error
        self._progress = None
        self._wake()
