"""A scripted mesh, and the real HTTP server over it on a loopback port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import trio

from gateway.app import create_app
from gateway.http import HttpSettings
from gateway.http_server import open_listener, serve_http
from gateway.keys import ApiKey, KeyRing, hash_of_key
from gateway.metrics import GatewayMetrics
from gateway.service import Completed, JobEvent, ModelInfo, Placed, Released
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.jobs import TO_ISLAND, JobOffer, Token, TopLogprob, Usage
from protocol.work import Generation

KEY = "ak_test-key-of-the-gateway-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}

JOB_ID = JobId("0" * 32)

#: What a job does: events to give, trio.Events to wait for first.
Step = JobEvent | trio.Event
Script = Callable[[Generation, int], Iterable[Step]]

MODEL = ModelInfo(
    id="tiny",
    digest=CargoDigest("sha256:" + "ab" * 32),
    version="1.2",
    runtime="llama",
    context_length=2048,
    publisher="tests",
    islands=2,
    ready=1,
    decode_tps=123.456,
    first_seen_unix_s=1_700_000_000,
)


@dataclass
class ScriptedService:
    """Runs scripts instead of models. Every Work is put through the wire's own checks first."""

    script: Script
    known: tuple[ModelInfo, ...] = (MODEL,)
    works: list[Generation] = field(default_factory=list)
    deadlines_ns: list[int | None] = field(default_factory=list)
    given: list[int] = field(default_factory=list)  # events taken, per job
    left: list[str] = field(default_factory=list)  # "ended" or "cancelled", in order of leaving
    gone: dict[int, trio.Event] = field(default_factory=dict)

    def models(self) -> tuple[ModelInfo, ...]:
        return self.known

    def model(self, name: str) -> ModelInfo | None:
        return next((m for m in self.known if name in (m.id, f"{m.id}@{m.version}", m.digest)), None)

    def gone_event(self, index: int) -> trio.Event:
        return self.gone.setdefault(index, trio.Event())

    @asynccontextmanager
    async def run(self, model: ModelInfo, work: Generation, *, deadline_ns: int | None = None):
        offer = JobOffer(job="0" * 32, cargo=model.digest, work=work)
        assert TO_ISLAND.decode_untrusted(TO_ISLAND.encode(offer)) == offer
        index = len(self.works)
        self.works.append(work)
        self.deadlines_ns.append(deadline_ns)
        self.given.append(0)
        job = ScriptedJob(self, index, self.script(work, index))
        try:
            yield job
        finally:
            self.left.append("ended" if job.ended else "cancelled")
            self.gone_event(index).set()


@dataclass
class ScriptedJob:
    service: ScriptedService
    index: int
    steps: Iterable[Step]
    ended: bool = False
    id: JobId = JOB_ID

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        for step in self.steps:
            if isinstance(step, trio.Event):
                await step.wait()
                continue
            await trio.lowlevel.checkpoint()
            self.service.given[self.index] += 1
            self.ended = isinstance(step, Completed) or type(step).__name__ == "Failed"
            yield step


@dataclass(frozen=True)
class Scripts:
    """Building blocks of scripts, for tests (importlib mode: no imports between test files)."""

    KEY = KEY
    HEADERS = HEADERS
    MODEL = MODEL

    @staticmethod
    def placed(island: str = "reef", hand_over: int = 0) -> Placed:
        return Placed(island, PeerId("12D3KooW"), 1_500_000, 2_250_000, hand_over)

    @staticmethod
    def token(i: int, text: str, *, logprob: float | None = None, top: int = 0) -> Token:
        piece = text.encode()
        tops = tuple(TopLogprob(i + k, piece + b"*" * k, (logprob or 0.0) - k) for k in range(top))
        return Token(i, text, piece if logprob is not None else b"", logprob, tops)

    @staticmethod
    def completed(count: int, *, finish: Any = "stop", tail: str = "", hand_overs: int = 0) -> Completed:
        usage = Usage(prompt_tokens=7, completion_tokens=count, generated_tokens=count, cached_tokens=3)
        return Completed(finish, tail, usage, hand_overs, "reef")

    @classmethod
    def says(cls, *texts: str, finish: str = "stop", tail: str = "") -> Script:
        """Each text is one token, in an event of its own."""

        def script(work: Generation, index: int) -> Iterable[Step]:
            top = work.top_logprobs
            yield cls.placed()
            for i, text in enumerate(texts):
                logprob = None if top is None else -0.25 * (i + 1)
                yield Released(i, (cls.token(i, text, logprob=logprob, top=top or 0),))
            yield cls.completed(len(texts), finish=finish, tail=tail)

        return script


@pytest.fixture
def scripts() -> Scripts:
    return Scripts()


@pytest.fixture
def service(scripts: Scripts) -> ScriptedService:
    """Says 'Hello there!' unless the test gives it another script."""
    return ScriptedService(scripts.says("Hello", " there", "!"))


@dataclass
class Gateway:
    """The running server."""

    url: str
    port: int
    client: httpx.AsyncClient
    metrics: GatewayMetrics

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "once", **fields}
        return await self.client.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def start_gateway(service: ScriptedService):
    """`async with start_gateway(settings) as gateway`: the app behind hypercorn on a free loopback port."""

    @asynccontextmanager
    async def start(
        settings: HttpSettings | None = None, *, keys: KeyRing | None = None, stalled_ms: int = 60_000
    ):
        keys = keys or KeyRing([ApiKey("tests", hash_of_key(KEY), requests_per_minute=0)])
        metrics = GatewayMetrics(service.models)
        settings = settings or HttpSettings(version="9.9")
        app = create_app(service, keys=keys, settings=settings, metrics=metrics, island_count=lambda: 2)
        listener = open_listener("127.0.0.1", 0, stalled_write_ms=stalled_ms)
        port = listener.getsockname()[1]
        async with trio.open_nursery() as nursery:

            async def serve(task_status: Any) -> None:
                await serve_http(app, listener, task_status=task_status)

            await nursery.start(serve)
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=30) as client:
                yield Gateway(url, port, client, metrics)
            nursery.cancel_scope.cancel()

    return start


@pytest.fixture
async def gateway(start_gateway: Any):
    async with start_gateway() as running:
        yield running
