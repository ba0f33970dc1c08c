"""Streamed chunks/s through HTTP, gateway and mesh, against bare hypercorn-trio in the same run.

    python -m bench mesh_stream [--rounds N]

A scripted Island sends tokens as fast as the gateway grants them, over real libp2p streams, from a process of
its own; the bare server is a plain ASGI application on hypercorn's trio worker that sends chunks of the same
bytes. One client process reads both, interleaved. The ratio says what authentication, supervision, the mesh
and the making of each chunk cost beside the server that carries them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from bench.figures import header, median, row

KEY = "ak_bench_0123456789abcdef"
TOKENS = 1500

BARE = """
import sys, trio
from gateway.http_server import open_listener, serve_http
CHUNK = bytes.fromhex(sys.argv[1])
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError  # hypercorn takes it as: no lifespan
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(int(sys.argv[2])):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\\n\\n"})
async def main():
    listener = open_listener("127.0.0.1", 0)
    print("listening", listener.getsockname()[1], flush=True)
    await serve_http(app, listener)
trio.run(main)
"""


@contextmanager
def child(*arguments: str, env: dict[str, str] | None = None) -> Iterator[list[str]]:
    """A process; yields the words of each `listening`/`mesh` line that it prints first."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stdout is not None
    try:
        words: list[str] = []
        for line in process.stdout:
            words += line.split()
            if line.startswith("mesh ") or "gateway.cli" not in arguments:
                break
        yield words
    finally:
        process.terminate()
        process.wait(20)


async def read_stream(port: int) -> int:
    """One streamed answer; returns the chunks in it."""
    body = json.dumps(
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "go"}],
            "stream": True,
            "max_tokens": TOKENS,
        }
    )
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    chunks, tail = 0, b""
    async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
        await connection.send_all(request.encode())
        while data := await connection.receive_some(262144):
            data = tail + data
            chunks += data.count(b"data: {")
            if b"data: [DONE]" in data:
                return chunks
            tail = data[-12:] if not data.endswith(b"\n") else b""
    return chunks


async def rate(port: int, connections: int) -> float:
    """Chunks per second over this many streams at once."""
    total = 0

    async def one() -> None:
        nonlocal total
        chunks = await read_stream(port)
        total += chunks

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(one)
    if total < connections * TOKENS:
        raise SystemExit(f"{total} chunks came where {connections * TOKENS} were due")
    return total / (time.perf_counter() - began)


def sample_chunk() -> bytes:
    choice = {"index": 0, "delta": {"content": " w1000"}, "logprobs": None, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1800000000,
        "model": "scripted",
        "system_fingerprint": "fp_0123456789",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


async def wait_offered(port: int) -> None:
    with trio.fail_after(30):
        while not await read_stream(port):  # noqa: ASYNC110 - another process sends us no event
            await trio.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench mesh_stream", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    header("streamed chunks/s through gateway and mesh")
    with (
        tempfile.TemporaryDirectory() as temporary,
        child("-c", BARE, sample_chunk().hex(), str(TOKENS)) as bare,
        child(
            *("-m", "gateway.cli", "run", "--port", "0", "--data-dir", str(Path(temporary) / "gateway")),
            *("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "http.requests_per_minute=0"),
            env={"ARCHI_API_KEY": KEY},
        ) as ours,
        child("-m", "bench.scripted_island", "--coordinator", ours[3]),
    ):
        bare_port, our_port = int(bare[1]), int(ours[1].rsplit(":", 1)[1])
        trio.run(wait_offered, our_port)
        row("connections", "bare chunks/s", "ours chunks/s", "ours / bare")
        for connections in (1, 16, 64):
            pairs: list[tuple[float, float]] = []
            for index in range(arguments.rounds + 1):
                first, second = (bare_port, our_port) if index % 2 else (our_port, bare_port)
                a, b = trio.run(rate, first, connections), trio.run(rate, second, connections)
                if index:  # the first round warms up
                    pairs.append((a, b) if index % 2 else (b, a))
            bare_rate, our_rate = median([a for a, _ in pairs]), median([b for _, b in pairs])
            ratio = median([b / a for a, b in pairs])
            row(str(connections), f"{bare_rate:.0f}", f"{our_rate:.0f}", f"{ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
