"""How much later a token arrives because of a gateway: ours with its mesh, and LiteLLM's proxy.

    python -m bench latency [--rounds N]

No model here, so that nothing else varies: tokens are the time at which they were made, 100 a second. Three
ways, interleaved in one run: a bare server on hypercorn's trio worker called directly (the floor); LiteLLM's
proxy in front of that server; our gateway in front of a scripted Island in another process, over libp2p. A
token's latency is its arrival minus the time in it (one clock: one machine). What a way adds is its median
minus the floor's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from bench.figures import header, median, percentile, row
from bench.llama_server import start_litellm
from bench.mesh_stream import KEY, child, wait_offered
from protocol.dice import Dice

MODEL = "scripted"
TOKENS = 60
PERIOD_S = 0.01

BARE = """
import json, sys, time, trio
from gateway.http_server import open_listener, serve_http
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1800000000, "model": "scripted"}
def chunk(delta, finish=None):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps(HEAD | {"choices": [choice]}).encode() + b"\\n\\n"
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    part = lambda data: send({"type": "http.response.body", "body": data, "more_body": True})
    await part(chunk({"role": "assistant", "content": ""}))
    due = trio.current_time()
    for _ in range(json.loads(body)["max_tokens"]):
        due += float(sys.argv[1])
        await trio.sleep_until(due)
        await part(chunk({"content": f" {time.monotonic_ns()}"}))
    await part(chunk({}, "length"))
    await send({"type": "http.response.body", "body": b"data: [DONE]\\n\\n"})
async def main():
    listener = open_listener("127.0.0.1", 0)
    print("listening", listener.getsockname()[1], flush=True)
    await serve_http(app, listener)
trio.run(main)
"""


@dataclass
class Seen:
    """Milliseconds."""

    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def ask(port: int, seen: Seen | None) -> None:
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "go"}],
        "stream": True,
        "max_tokens": TOKENS,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    began = time.perf_counter_ns()
    connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read()[:500]!r}")
    count = 0
    while line := response.readline():
        now_ns = time.monotonic_ns()
        if not line.startswith(b"data: {"):
            continue
        choices = json.loads(line[6:])["choices"]
        text = choices[0]["delta"].get("content") if choices else None
        if text and text.strip():
            if seen is not None:
                if count == 0:
                    seen.first.append((time.perf_counter_ns() - began) / 1e6 - PERIOD_S * 1e3)
                seen.latency.append((now_ns - int(text)) / 1e6)
            count += 1
    connection.close()
    if count != TOKENS:
        raise SystemExit(f"{count} tokens came where {TOKENS} were due")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench latency", description="what a gateway adds to a token"
    )
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args(argv)
    header("added latency of a token")
    with (
        tempfile.TemporaryDirectory() as temporary,
        child("-c", BARE, str(PERIOD_S)) as bare,
        child(
            *("-m", "gateway.cli", "run", "--port", "0", "--data-dir", str(Path(temporary) / "gateway")),
            *("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "http.requests_per_minute=0"),
            *("--set", "log.level=warning"),
            env={"ARCHI_API_KEY": KEY},
        ) as ours,
        child(
            *("-m", "bench.scripted_island", "--coordinator", ours[3], "--stamp"),
            *("--tokens-per-s", str(1 / PERIOD_S)),
        ),
    ):
        bare_port, our_port = int(bare[1]), int(ours[1].rsplit(":", 1)[1])
        trio.run(wait_offered, our_port)
        litellm, litellm_port = start_litellm(bare_port, MODEL, KEY)
        try:
            ways = {"bare server": bare_port, "LiteLLM": litellm_port, "archipelag": our_port}
            seen = {name: Seen() for name in ways}
            dice = Dice(11)
            for index in range(arguments.rounds + 2):
                for name in dice.sample(list(ways), len(ways)):
                    ask(ways[name], seen[name] if index >= 2 else None)  # two rounds warm up
        finally:
            litellm.terminate()
            litellm.wait(30)
    row("milliseconds", "token p50", "p99", "first p50", "p99")
    for name, way in seen.items():
        cells = (
            median(way.latency),
            percentile(way.latency, 0.99),
            median(way.first),
            percentile(way.first, 0.99),
        )
        row(name, *(f"{cell:.2f}" for cell in cells))
    floor = seen["bare server"]
    added = {
        name: (
            median(seen[name].latency) - median(floor.latency),
            median(seen[name].first) - median(floor.first),
        )
        for name in ("LiteLLM", "archipelag")
    }
    for name, (token, first) in added.items():
        row(f"{name} adds", f"{token:+.2f}", "", f"{first:+.2f}")
    (their_token, their_first), (our_token, our_first) = added["LiteLLM"], added["archipelag"]
    row(
        "LiteLLM adds as often what ours adds",
        f"{their_token / our_token:.1f} x",
        "",
        f"{their_first / our_first:.1f} x",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
