"""What all tests share: patience with properties, and a runtime whose engine is a script."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import HealthCheck, settings

from cargos.runtimes.base import Finished, Progress, RuntimeEvent, RuntimeLoad, Tokens
from protocol.jobs import Token, Usage, token_hash
from protocol.work import Work

# Properties hold however long an example takes: on a busy machine any of them may take longer than the 200 ms
# that Hypothesis grants, and is then called flaky.
settings.register_profile(
    "archipelag", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("archipelag")

PROMPT_IDS = (7, 8, 9)
#: Token i of every scripted job has this id more than i.
FIRST_ID = 1000


def scripted_ids(count: int) -> list[int]:
    return [FIRST_ID + i for i in range(count)]


@dataclass
class ScriptedSession:
    """`next`: index of the token that `receive` gives next; `granted`: as the runtime was told last."""

    runtime: ScriptedRuntime
    work: Work
    resume: tuple[int, ...]
    granted: int
    next: int = 0
    prepared: int = 0
    grants: list[int] = field(default_factory=list[int])
    ended: trio.Event = field(default_factory=trio.Event)

    def grant(self, until: int) -> None:
        self.grants.append(until)
        self.granted = max(self.granted, until)
        self.runtime.moved.unpark_all()

    async def receive(self) -> RuntimeEvent:
        await trio.lowlevel.checkpoint()
        runtime = self.runtime
        if self.next == len(self.resume) and self.prepared < runtime.preparations:
            self.prepared += 1
            return Progress("prompt", self.prepared, runtime.preparations)
        limit = self.work.max_tokens or 64
        if self.next >= limit:
            count = limit - len(self.resume)
            usage = Usage(len(PROMPT_IDS), limit, count)
            ids = [*self.resume, *scripted_ids(limit)[len(self.resume) :]]
            return Finished("length", "", usage, token_hash(PROMPT_IDS), token_hash(ids))
        while self.next >= min(self.granted, runtime.may_reach):
            if runtime.error is not None and self.next >= runtime.may_reach:
                raise runtime.error
            await runtime.moved.park()
        end = min(self.next + runtime.burst, self.granted, runtime.may_reach, limit)
        tokens = tuple(Token(FIRST_ID + i, f" w{i}") for i in range(self.next, end))
        first, self.next = self.next, end
        return Tokens(first, tokens)


@dataclass
class ScriptedRuntime:
    """Makes token i as soon as it is granted and i < `may_reach`; there it waits, or raises `error`."""

    may_reach: int = 1 << 30
    burst: int = 1
    preparations: int = 0
    slots: int = 100
    queued: int = 0
    state: str = "ready"
    error: Exception | None = None
    sessions: list[ScriptedSession] = field(default_factory=list[ScriptedSession])
    moved: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    active: int = 0

    def proceed(self, may_reach: int = 1 << 30) -> None:
        self.may_reach = may_reach
        self.moved.unpark_all()

    @asynccontextmanager
    async def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AsyncGenerator[ScriptedSession]:
        session = ScriptedSession(self, work, resume, granted, next=len(resume))
        self.sessions.append(session)
        self.active += 1
        try:
            yield session
        finally:
            self.active -= 1
            session.ended.set()

    def load(self) -> RuntimeLoad:
        return RuntimeLoad(self.state, self.slots, self.active, self.queued, 50.0, 500.0, 0, 0)  # type: ignore[arg-type]


@pytest.fixture
def scripted_runtime() -> Callable[..., ScriptedRuntime]:
    """`scripted_runtime(may_reach=3, ...)`."""
    return ScriptedRuntime


@pytest.fixture
def ids_of() -> Callable[[int], list[int]]:
    """The ids of the first so many tokens of every scripted job."""
    return scripted_ids
