"""Stages of a real model joined back to back, without a network."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from cargos.resolve import builtin_catalogue
from cargos.runtimes.base import Finished, Tokens
from cargos.runtimes.shards import ShardHead, ShardOptions, ShardStage, open_stage
from cargos.runtimes.shards.base import Computed, Lost, Refused, StageSpec, Wanted
from cargos.shards.cut import cut
from cargos.shards.dtypes import row_bytes
from cargos.store import CargoStore
from protocol.ring import Dtype
from protocol.work import Generation

WIDTH = 576
CONTEXT = 320


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """The second real model: another architecture, sliding windows, a large vocabulary tied at both ends."""
    entry = builtin_catalogue().lookup("gemma3-270m")

    async def ensure() -> dict[str, Path]:
        return await CargoStore().ensure(entry.manifest, base=entry.base)

    return next(path for name, path in trio.run(ensure).items() if name.endswith(".gguf"))


@pytest.fixture(scope="session")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int, int], str]:
    """`slice_path(model, first, last)`: a model's layers, cut once for all tests."""
    folder = tmp_path_factory.mktemp("slices")

    def build(model: Path, first: int, last: int) -> str:
        path = folder / f"{model.stem}.{first}-{last}.gguf"
        if not path.exists():
            cut(model, path, first, last)
        return str(path)

    return build


@pytest.fixture
def stage_spec(slice_path: Callable[[Path, int, int], str], smollm2_path: Path) -> Callable[..., StageSpec]:
    """`stage_spec(first, last, slots=2)`: of the demo model, if no other is named."""

    def build(
        first: int,
        last: int,
        *,
        slots: int = 4,
        draft_path: str | None = None,
        model: Path | None = None,
        layers: int = 30,
    ) -> StageSpec:
        path = slice_path(model or smollm2_path, first, last)
        return StageSpec("slice", path, first, last, layers, CONTEXT, slots=slots, draft_path=draft_path)

    return build


@dataclass
class Logged:
    """What has gone into a stage for a session: (position, rows, payload), in order, without what was void."""

    deterministic: bool
    prompt: int
    rows: list[bytes] = field(default_factory=list[bytes])

    def put(self, position: int, rows: int, payload: bytes) -> None:
        assert position <= len(self.rows), "a gap"
        size = len(payload) // rows
        del self.rows[position:]
        self.rows += [payload[i * size : (i + 1) * size] for i in range(rows)]


@dataclass
class Ring:
    """The least that a ring service does: passes on, keeps logs, replays them to whoever lost its memory."""

    dtype: Dtype
    deterministic: dict[str, bool] = field(default_factory=dict[str, bool])
    stages: list[ShardStage] = field(default_factory=list[ShardStage])
    logs: list[dict[str, Logged]] = field(default_factory=list[dict[str, Logged]])
    wanted: list[Wanted] = field(default_factory=list[Wanted])
    refused: list[Refused] = field(default_factory=list[Refused])
    computed: list[tuple[int, Computed]] = field(default_factory=list[tuple[int, Computed]])
    lost: int = 0

    @property
    def head(self) -> ShardHead:
        head = self.stages[-1]
        assert isinstance(head, ShardHead)
        return head

    def on_event(self, index: int, event: Computed | Wanted | Lost | Refused) -> None:
        match event:
            case Wanted():
                self.wanted.append(event)
                self._draw(event)
            case Computed():
                self.computed.append((index, event))
                if index + 1 < len(self.stages):
                    self._feed(index + 1, event.session, event.position, event.rows, event.payload)
            case Refused():
                self.refused.append(event)
            case Lost():
                self.lost += 1
                if index + 1 < len(self.stages):
                    for session, log in list(self.logs[index].items()):
                        self._open(index, session, log)
                        self.stages[index].feed(session, 0, len(log.rows), b"".join(log.rows))

    def _draw(self, event: Wanted) -> None:
        alone = self.deterministic.get(event.session, False)
        for index in range(len(self.stages)):
            if event.session not in self.logs[index]:
                log = self.logs[index][event.session] = Logged(alone, event.prompt)
                self._open(index, event.session, log)
        payload = b"".join(token.to_bytes(4, "little") for token in event.tokens)
        self._feed(0, event.session, event.position, len(event.tokens), payload)

    def _open(self, index: int, session: str, log: Logged) -> None:
        self.stages[index].open(session, dtype=self.dtype, prompt=log.prompt, deterministic=log.deterministic)

    def _feed(self, index: int, session: str, position: int, rows: int, payload: bytes) -> None:
        log = self.logs[index].get(session)
        if log is None:
            return
        log.put(position, rows, payload)
        self.stages[index].feed(session, position, rows, payload)

    def end(self, session: str) -> None:
        for index, stage in enumerate(self.stages):
            self.logs[index].pop(session, None)
            stage.close(session)

    async def ask(
        self,
        work: Generation,
        *,
        name: str = "session",
        resume: tuple[int, ...] = (),
        granted: int = 1 << 17,
        until: int = 1 << 30,
        on_token: Callable[[int], None] | None = None,
        trip_ns: int = 0,
    ) -> tuple[list[int], Finished | None]:
        """Run a job: its new tokens, and its end if it came to it within `until` of them."""
        self.deterministic[name] = work.deterministic
        ids: list[int] = []
        finished: Finished | None = None
        with trio.fail_after(60):
            async with self.head.submit(
                name, work, dtype=self.dtype, resume=resume, granted=granted, trip_ns=lambda: trip_ns
            ) as session:
                while finished is None and len(ids) < until:
                    match await session.receive():
                        case Tokens(first, tokens):
                            assert first == len(resume) + len(ids), "a token is missing or came twice"
                            ids += [token.id for token in tokens]
                            if on_token is not None:
                                on_token(len(ids))
                        case Finished() as end:
                            finished = end
                        case _:
                            pass
        self.end(name)
        return ids, finished


@pytest.fixture
def ring(stage_spec: Callable[..., StageSpec]) -> Callable[..., AbstractAsyncContextManager[Ring]]:
    """`async with ring(15)`: two stages cut before layer 15; `ring(10, 20, dtype="q8x", drafts=False)`."""

    @asynccontextmanager
    async def build(
        *cuts: int,
        dtype: Dtype = "f32",
        slots: int = 4,
        drafts: bool = False,
        draft_path: str | None = None,
        model: Path | None = None,
        layers: int = 30,
        **options: Any,
    ) -> AsyncGenerator[Ring]:
        made = Ring(dtype)
        edges = [0, *cuts, layers]
        async with AsyncExitStack() as stack:
            for index in range(len(edges) - 1):
                spec = stage_spec(
                    edges[index],
                    edges[index + 1],
                    slots=slots,
                    draft_path=draft_path,
                    model=model,
                    layers=layers,
                )
                stage = await stack.enter_async_context(
                    open_stage(spec, partial(made.on_event, index), ShardOptions(drafts=drafts, **options))
                )
                made.stages.append(stage)
                made.logs.append({})
            with trio.fail_after(60):
                for stage in made.stages:
                    await stage.ready()
            yield made

    return build


@pytest.fixture
def bytes_of_row() -> Callable[[Dtype], int]:
    """Bytes of one row of the demo model's activations."""
    return lambda dtype: row_bytes(dtype, WIDTH)
