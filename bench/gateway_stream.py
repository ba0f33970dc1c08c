"""Streamed chunks/s of the HTTP side alone, against bare hypercorn-trio in the same run.

    python -m bench gateway_stream [--rounds N]

The whole FastAPI application (keys, validation, chunks, metrics) over a service in the same process that has
its tokens ready, against a plain ASGI application on the same server that sends chunks of the same bytes. Each
has a process of its own; one client reads both, interleaved. `added` is what a chunk costs more, in
microseconds of the server's one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import trio

from bench.figures import header, median, row
from bench.mesh_stream import BARE, KEY, TOKENS, child, rate, sample_chunk
from gateway.app import create_app
from gateway.http import HttpSettings
from gateway.http_server import open_listener, serve_http
from gateway.keys import KeyRing
from gateway.service import Completed, JobEvent, ModelInfo, Placed, Released
from protocol.ids import CargoDigest, JobId, PeerId
from protocol.jobs import Token, Usage
from protocol.work import Work

MODEL = ModelInfo(
    id="scripted",
    digest=CargoDigest("sha256:" + "0" * 64),
    version="1.0.0",
    runtime="llmcpp",
    context_length=262_144,
    publisher="archipelag",
    islands=1,
    ready=1,
    decode_tps=0.0,
    first_seen_unix_s=1_800_000_000,
)


class ReadyJob:
    """Its tokens are there at once; one event each, as from an Island that makes them one by one."""

    id = JobId("0" * 32)

    def __init__(self, tokens: int) -> None:
        self._events = [Released(i, (Token(i, f" w{i}"),)) for i in range(tokens)]

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        yield Placed("scripted", PeerId(""), 0, 0, 0)
        for event in self._events:
            yield event
        count = len(self._events)
        yield Completed("length", "", Usage(1, count, count), 0, "scripted")


class ReadyService:
    """A mesh of nothing."""

    def models(self) -> tuple[ModelInfo, ...]:
        return (MODEL,)

    def model(self, name: str) -> ModelInfo | None:
        return MODEL if name == MODEL.id else None

    @asynccontextmanager
    async def run(
        self,
        model: ModelInfo,  # noqa: ARG002  # the service's signature
        work: Work,
        *,
        deadline_ns: int | None = None,  # noqa: ARG002  # the service's signature
    ) -> AsyncGenerator[ReadyJob]:
        yield ReadyJob(work.max_tokens or TOKENS)


async def serve() -> None:
    keys = KeyRing.from_config([{"name": "bench", "key": KEY}])
    app = create_app(ReadyService(), keys=keys, settings=HttpSettings(requests_per_minute=0))
    listener = open_listener("127.0.0.1", 0)
    print("listening", listener.getsockname()[1], flush=True)
    await serve_http(app, listener)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gateway_stream", description="HTTP side against a bare server"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        trio.run(serve)
        return 0
    header("streamed chunks/s of the HTTP side")
    with (
        child("-c", BARE, sample_chunk().hex(), str(TOKENS)) as bare,
        child("-m", "bench.gateway_stream", "--serve") as ours,
    ):
        ports = int(bare[1]), int(ours[1])
        row("connections", "bare chunks/s", "ours chunks/s", "ours / bare", "added us")
        for connections in (1, 16, 64):
            pairs: list[tuple[float, float]] = []
            for index in range(arguments.rounds + 1):
                order = (0, 1) if index % 2 else (1, 0)
                rates = {side: trio.run(rate, ports[side], connections) for side in order}
                if index:  # the first round warms up
                    pairs.append((rates[0], rates[1]))
            bare_rate, our_rate = median([a for a, _ in pairs]), median([b for _, b in pairs])
            added_us = median([1e6 / b - 1e6 / a for a, b in pairs])
            ratio = median([b / a for a, b in pairs])
            row(str(connections), f"{bare_rate:.0f}", f"{our_rate:.0f}", f"{ratio:.2f}", f"{added_us:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
