"""Fixtures shared by the tests of Cargos and their runtimes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from cargos.resolve import builtin_catalogue
from cargos.runtimes.base import Finished, Progress, RuntimeSpec, Session, Tokens
from cargos.runtimes.llama import LlamaRuntime
from cargos.store import CargoStore
from protocol.jobs import Token
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo Cargo's model: ARCHI_TEST_MODEL if set, else from the store (fetched if it is not there)."""
    if chosen := os.environ.get("ARCHI_TEST_MODEL"):
        return Path(chosen)
    entry = builtin_catalogue().lookup("smollm2-135m")

    async def ensure() -> dict[str, Path]:
        return await CargoStore().ensure(entry.manifest, base=entry.base)

    files = trio.run(ensure)
    return next(path for name, path in files.items() if name.endswith(".gguf"))


@pytest.fixture
def llama_spec(smollm2_path: Path) -> Callable[..., RuntimeSpec]:
    """Builds a spec: `llama_spec(slots=2)`."""

    def build(
        context_length: int = 512, slots: int = 8, chat_template: str | None = None, model: str | None = None
    ) -> RuntimeSpec:
        files = {"model.gguf": model or str(smollm2_path)}
        return RuntimeSpec("smollm2", files, context_length, chat_template, slots=slots, threads=1)

    return build


class Answer:
    """What came out of one session."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.progress: list[Progress] = []
        self.finished: Finished | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + (self.finished.tail if self.finished else "")


async def _drain(session: Session, answer: Answer, first: int, until: int) -> None:
    while len(answer.tokens) < until:
        match await session.receive():
            case Tokens(index, tokens):
                assert index == first + len(answer.tokens), "a token is missing or came twice"
                answer.tokens += tokens
            case Finished() as finished:
                answer.finished = finished
                return
            case progress:
                answer.progress.append(progress)


@pytest.fixture
def ask() -> Callable[..., Awaitable[Answer]]:
    """`await ask(runtime, work, resume=[...], until=n)`: run a job to its end, or for n new tokens."""

    async def run(
        runtime: LlamaRuntime, work: Generation, resume: Sequence[int] = (), until: int = 1 << 30
    ) -> Answer:
        answer = Answer()
        with trio.fail_after(60):
            async with runtime.session(work, resume=tuple(resume), granted=1 << 17) as session:
                await _drain(session, answer, len(resume), until)
        return answer

    return run


@pytest.fixture
def chat() -> Callable[..., Generation]:
    """Builds a job: `chat("Hello", temperature=0.8, seed=3, max_tokens=20, ...)`."""

    def build(text: str, *, seed: int = 1, temperature: float = 0.0, **fields: Any) -> Generation:
        names = set(Sampling.__struct_fields__)
        sampling = {name: fields.pop(name) for name in list(fields) if name in names}
        messages = (ChatMessage("system", "You are a helpful assistant."), ChatMessage("user", text))
        return Generation(
            ChatPrompt(messages),
            Sampling(seed=seed, temperature=temperature, **sampling),
            **{"max_tokens": 24, **fields},
        )

    return build
