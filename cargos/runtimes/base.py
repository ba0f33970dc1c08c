"""The interface of a runtime: one loaded Cargo that works on several jobs at once.

The Island's job service knows nothing else of llama.cpp, ONNX, WASM or containers. A runtime supervises
whatever does the native work (a worker process); a crash in there costs a restart and no job: the runtime
goes on with each open session where it stopped, and its user sees a pause.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from protocol.jobs import Token, Usage
from protocol.work import Work


class JobRefused(Exception):
    """The work can not be done with this Cargo, here or on any other Island that runs it.

    `code`: 'too-long' (prompt and context length) or 'invalid' (a grammar that does not parse, a token id
    out of range, ...). `detail` is written for the consumer.
    """

    def __init__(self, code: Literal["too-long", "invalid"], detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code: Literal["too-long", "invalid"] = code
        self.detail = detail


class RuntimeFailed(Exception):
    """The runtime could not finish this job (its worker died more often than it may be restarted, ...).

    Another Island may succeed.
    """


@dataclass(frozen=True, slots=True)
class Progress:
    """Before the first token. `stage` 'loading' (done/total in bytes) or 'prompt' (in tokens)."""

    stage: Literal["loading", "prompt"]
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens made in one step (or several, if the user was slow to ask). The first has index `first`."""

    first: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a job. `prompt_hash`/`output_hash`: SHA-256 over little-endian uint32 token ids,
    the prompt's, and those of all tokens from index 0.
    """

    finish: Literal["stop", "length"]
    tail: str
    usage: Usage
    prompt_hash: bytes
    output_hash: bytes


RuntimeEvent: TypeAlias = Progress | Tokens | Finished


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """What of a Cargo's manifest and the Island's configuration a runtime needs.

    `files`: the Cargo's files by name, on disk and verified. `threads`: of the engine. `slots`: sequences
    decoded together at most. `system_prompt`: put before a conversation that has none of its own.
    """

    name: str
    files: dict[str, str]
    context_length: int
    chat_template: str | None = None
    system_prompt: str | None = None
    slots: int = 8
    threads: int = 1


@dataclass(frozen=True, slots=True)
class RuntimeLoad:
    """State and measured speed. Rates in tokens/s, 0.0 until measured."""

    state: Literal["loading", "ready", "failed"]
    slots: int
    active: int
    queued: int
    decode_tps: float
    prefill_tps: float
    restarts: int
    tokens_total: int
    detail: str = ""


class Session(Protocol):
    """One job in a runtime."""

    async def receive(self) -> RuntimeEvent:
        """The next event. After `Finished` there is none.

        Raises JobRefused (only before any token) or RuntimeFailed.
        """
        ...

    def grant(self, until: int) -> None:
        """Allow tokens with an index below `until`. The engine pauses the sequence there and decodes
        the others on. Never shrinks.
        """
        ...


class Runtime(Protocol):
    """A Cargo that is loaded, or being loaded, or being reloaded after a crash."""

    def session(
        self, work: Work, *, resume: tuple[int, ...] = (), granted: int
    ) -> AbstractAsyncContextManager[Session]:
        """Queue a job. Leaving the context ends it: the slot is free within one engine step.

        `resume`: token ids generated so far; the first new token has index `len(resume)`.
        """
        ...

    def load(self) -> RuntimeLoad:
        """State and speed now. Cheap: callable at any time."""
        ...
